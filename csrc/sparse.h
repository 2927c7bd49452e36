// SPDX-License-Identifier: Apache-2.0
// What sparse_connections computes of single numbers, written once for the CPU and the GPU.
#pragma once
#include "philox.h"  // FASTNAS_HOST_DEVICE, below_top

namespace fastnas {

// 1 - sigmoid(beta), from which q = ReLU((p / m - 1) + (1 - t)): where t itself rounds to 1, the largest p of a node
// would be lost with the others. Beyond 60 no double but 1 itself is that close to 1, so that nothing else can change.
FASTNAS_HOST_DEVICE inline double below_one(double beta) {
  return 1.0 / (1.0 + exp(beta > 60.0 ? 60.0 : beta));
}

// d below_one / d beta.
FASTNAS_HOST_DEVICE inline double below_one_slope(double gap) { return gap * (gap - 1.0); }

// What is left of a connection with ratio = p / m; NaN, as a diverged beta gives, stays NaN.
FASTNAS_HOST_DEVICE inline double left_over(double ratio, double gap) {
  const double q = ratio - 1.0 + gap;
  return q <= 0.0 ? 0.0 : q;
}

}  // namespace fastnas
