// SPDX-License-Identifier: Apache-2.0
// The closed form behind the dot products of gate_gradient.
#pragma once
#include "mix.h"

namespace fastnas::cuda {

// dalpha_i = p_i (G_i - sum_j p_j G_j) for i < K. rows[j] is the row of `partial` [.][count] that sums up to G_j, -1
// for an output that is zero. Everything but partial and p is in double; p and dalpha in `probs`' dtype.
struct GateRows {
  int K;
  signed char rows[kMaxOperands];
};
cudaError_t launch_gates(Dtype accumulator, const GateRows& gates, const void* partial,
                         int64_t count, Dtype probs, const void* p, void* dalpha,
                         cudaStream_t stream);

}  // namespace fastnas::cuda
