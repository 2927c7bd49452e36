// SPDX-License-Identifier: Apache-2.0
// The BatchNorm in front of the convolutions of a source, as arguments of an op on every device.
#pragma once
#include <optional>

#include "check.h"

namespace fastnas {

using OptionalTensor = std::optional<at::Tensor>;

// kind: as in mixed_batch_norm; 0 where there is none.
struct SourceNorm {
  int64_t kind;
  double eps;
  const OptionalTensor &gamma, &beta;
};

// A list of one, or of none.
inline std::vector<at::Tensor> given(const OptionalTensor& t) {
  return t ? std::vector<at::Tensor>{*t} : std::vector<at::Tensor>{};
}

// least: 1 where the op asks for a norm.
inline void check_source_norm(const char* op, const at::Tensor& x, const SourceNorm& norm,
                              int64_t least) {
  check_floating(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() == 4, op, ": expected x of shape (N, C, H, W), but got ", x.sizes());
  TORCH_CHECK_VALUE(norm.kind >= least && norm.kind <= 2, op, ": expected kind ",
                    least ? "1 or 2" : "0, 1 or 2", ", but got ", norm.kind);
  TORCH_CHECK_VALUE(norm.gamma.has_value() == norm.beta.has_value(), op,
                    ": expected gamma and beta or neither");
}

// What a forward has found; a backward whose norm is of kind 0 has none.
inline void check_source_statistics(const char* op, const at::Tensor& x, const SourceNorm& norm,
                                    const at::Tensor& mean, const at::Tensor& var) {
  TORCH_CHECK_VALUE(norm.kind == 0 || (mean.numel() == x.size(1) && var.numel() == x.size(1)), op,
                    ": expected mean and var of shape [", x.size(1), "], but got ", mean.sizes(),
                    " and ", var.sizes());
}

}  // namespace fastnas
