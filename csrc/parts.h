// SPDX-License-Identifier: Apache-2.0
// What partial_channel_node asks of its arguments, on every device, and the sizes that follow from them.
#pragma once
#include <optional>

#include "check.h"

namespace fastnas {

// A state in two parts, (N, c, H, W) and (N, (k - 1) c, H, W).
struct PartSizes {
  int64_t N, c, k, H, W;

  int64_t others() const { return (k - 1) * c; }
  int64_t space() const { return H * W; }
  std::vector<int64_t> mixed() const { return {N, c, H, W}; }
  std::vector<int64_t> rest() const { return {N, others(), H, W}; }
};

inline void check_groups(const char* op, int64_t k) {
  TORCH_CHECK_VALUE(k >= 2 && k <= (int64_t{1} << 20), op, ": expected k of 2 to 2^20, but got ",
                    k);
}

inline PartSizes check_parts(const char* op, const at::Tensor& mixed, at::TensorList rests,
                             const at::Tensor& weights, int64_t k) {
  check_groups(op, k);
  check_floating(op, "mixed", mixed);
  check_inputs(op, rests, mixed);
  check_weights(op, weights, rests.size(), mixed);
  TORCH_CHECK_VALUE(mixed.dim() == 4, op, ": expected mixed of shape (N, C/k, H, W), but got ",
                    mixed.sizes());
  const PartSizes s{mixed.size(0), mixed.size(1), k, mixed.size(2), mixed.size(3)};
  TORCH_CHECK_VALUE(rests[0].sizes() == at::IntArrayRef(s.rest()), op, ": expected rests of shape ",
                    at::IntArrayRef(s.rest()), " for k = ", k, ", but got ", rests[0].sizes());
  return s;
}

// Gradients of both parts, or of the one that has one; rests as the forward kept them.
inline PartSizes check_parts_backward(const char* op, const std::optional<at::Tensor>& grad_mixed,
                                      const std::optional<at::Tensor>& grad_rest,
                                      at::TensorList rests, const at::Tensor& weights, int64_t k,
                                      at::IntArrayRef need_rests, bool need_weights) {
  check_groups(op, k);
  TORCH_CHECK_VALUE(grad_mixed || grad_rest, op, ": expected a gradient of a part, but got none");
  const at::Tensor& first = grad_mixed ? *grad_mixed : *grad_rest;
  check_floating(op, "gradients", first);
  TORCH_CHECK_VALUE(first.dim() == 4 && (grad_mixed || first.size(1) % (k - 1) == 0), op,
                    ": expected gradients of shape (N, C, H, W) for k = ", k, ", but got ",
                    first.sizes());
  const PartSizes s{first.size(0), grad_mixed ? first.size(1) : first.size(1) / (k - 1), k,
                    first.size(2), first.size(3)};
  if (grad_rest)
    TORCH_CHECK_VALUE(grad_rest->sizes() == at::IntArrayRef(s.rest()) &&
                          grad_rest->scalar_type() == first.scalar_type() &&
                          grad_rest->device() == first.device(),
                      op, ": expected grad_rest of shape ", at::IntArrayRef(s.rest()),
                      " like grad_mixed in dtype and device, but got ", grad_rest->sizes(), ", ",
                      grad_rest->scalar_type(), " on ", grad_rest->device());
  check_weights(op, weights, need_rests.size(), first);
  check_saved(op, rests, s.rest(), first);
  TORCH_CHECK_VALUE(need_rests.size() <= static_cast<size_t>(kMaxCandidates) &&
                        rests.size() == (need_weights ? need_rests.size() : 0),
                    op, ": expected at most ", kMaxCandidates, " rests, all (", need_rests.size(),
                    ") to find the gradients of weights and none otherwise, but got ",
                    rests.size());
  return s;
}

}  // namespace fastnas
