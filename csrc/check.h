// SPDX-License-Identifier: Apache-2.0
// What every op asks of its arguments, and how operands are brought to one dtype and one memory format. The public
// Python functions check at the door; these checks keep a direct caller of torch.ops.fastnas from reading outside a
// tensor.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/MemoryFormat.h>
#include <c10/core/ScalarType.h>

#include <limits>
#include <vector>

namespace fastnas {

constexpr int64_t kMaxCandidates = 64;
constexpr int64_t kMaxNodes = 64;

inline at::ScalarType accumulate_dtype(at::ScalarType t) {
  return t == at::kDouble ? at::kDouble : at::kFloat;
}

// The format outputs take after x: channels_last if its channels are innermost, else contiguous.
inline at::MemoryFormat memory_format(const at::Tensor& x) {
  if ((x.dim() == 4 || x.dim() == 5) && x.stride(1) == 1 && !x.is_contiguous())
    return x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  return at::MemoryFormat::Contiguous;
}

inline void check_floating(const char* op, const char* name, const at::Tensor& x) {
  const at::ScalarType t = x.scalar_type();
  TORCH_CHECK_TYPE(t == at::kFloat || t == at::kDouble || t == at::kHalf || t == at::kBFloat16, op,
                   ": expected ", name, " to be float32, float64, float16 or bfloat16, but got ",
                   t);
}

// 1 to 64 floating-point tensors of one shape on the device of `like`.
inline void check_inputs(const char* op, at::TensorList xs, const at::Tensor& like) {
  TORCH_CHECK_VALUE(!xs.empty() && static_cast<int64_t>(xs.size()) <= kMaxCandidates, op,
                    ": expected 1 to ", kMaxCandidates, " tensors in xs, but got ", xs.size());
  for (size_t k = 0; k < xs.size(); ++k) {
    check_floating(op, "inputs", xs[k]);
    TORCH_CHECK_VALUE(xs[k].sizes() == xs[0].sizes(), op,
                      ": expected all inputs of one shape, but xs[", k, "] is ", xs[k].sizes(),
                      " and xs[0] is ", xs[0].sizes());
    TORCH_CHECK_VALUE(xs[k].device() == like.device(), op,
                      ": expected all inputs on one device, but xs[", k, "] is on ", xs[k].device(),
                      " and not on ", like.device());
  }
}

// Inputs of a backward: of the given shape, or without elements where the forward did not keep them.
inline void check_saved(const char* op, at::TensorList xs, at::IntArrayRef shape,
                        const at::Tensor& like) {
  for (size_t k = 0; k < xs.size(); ++k) {
    if (xs[k].numel() == 0) continue;
    check_floating(op, "inputs", xs[k]);
    TORCH_CHECK_VALUE(xs[k].sizes() == shape && xs[k].device() == like.device(), op,
                      ": expected xs[", k, "] of shape ", shape, " on ", like.device(),
                      " or empty, but got ", xs[k].sizes(), " on ", xs[k].device());
  }
}

inline at::ScalarType result_dtype(at::TensorList xs) {
  at::ScalarType t = xs[0].scalar_type();
  for (const at::Tensor& x : xs) t = c10::promoteTypes(t, x.scalar_type());
  return t;
}

inline void check_weights(const char* op, const at::Tensor& weights, size_t count,
                          const at::Tensor& like) {
  TORCH_CHECK_VALUE(weights.dim() == 1 && weights.size(0) == static_cast<int64_t>(count), op,
                    ": expected one weight per input, but got ", count,
                    " inputs and weights of shape ", weights.sizes());
  TORCH_CHECK_VALUE(weights.device() == like.device(), op, ": expected weights on ", like.device(),
                    " like the inputs, but got ", weights.device());
  check_floating(op, "weights", weights);
}

// Weights (T, K) of K inputs for 1 to 64 targets.
inline void check_target_weights(const char* op, const at::Tensor& weights, size_t count,
                                 const at::Tensor& like) {
  TORCH_CHECK_VALUE(weights.dim() == 2 && weights.size(0) >= 1 &&
                        weights.size(0) <= kMaxCandidates &&
                        weights.size(1) == static_cast<int64_t>(count),
                    op, ": expected weights of shape (T, ", count, ") with T of 1 to ",
                    kMaxCandidates, ", one column per input, but got ", weights.sizes());
  TORCH_CHECK_VALUE(weights.device() == like.device(), op, ": expected weights on ", like.device(),
                    " like the inputs, but got ", weights.device());
  check_floating(op, "weights", weights);
}

// Gradients of the targets, and inputs as check_saved has them.
inline void check_target_gradients(const char* op, at::TensorList grads, at::TensorList xs,
                                   const at::Tensor& weights, at::IntArrayRef need_xs) {
  TORCH_CHECK_VALUE(
      !grads.empty() && weights.dim() == 2 && weights.size(0) == static_cast<int64_t>(grads.size()),
      op, ": expected one gradient per row of weights, but got ", grads.size(),
      " gradients and weights of shape ", weights.sizes());
  for (const at::Tensor& g : grads) {
    check_floating(op, "grads", g);
    TORCH_CHECK_VALUE(g.sizes() == grads[0].sizes() && g.device() == weights.device() &&
                          g.scalar_type() == grads[0].scalar_type(),
                      op, ": expected all grads of one shape and dtype on ", weights.device(),
                      ", but got ", g.sizes(), " of ", g.scalar_type(), " on ", g.device(),
                      " beside ", grads[0].sizes(), " of ", grads[0].scalar_type());
  }
  check_target_weights(op, weights, xs.size(), grads[0]);
  check_saved(op, xs, grads[0].sizes(), grads[0]);
  TORCH_CHECK_VALUE(xs.size() <= static_cast<size_t>(kMaxCandidates) && need_xs.size() == xs.size(),
                    op, ": expected need_xs of one entry for each of at most ", kMaxCandidates,
                    " inputs (", xs.size(), "), but got ", need_xs.size());
}

inline bool all_plain(at::IntArrayRef kinds) {
  for (int64_t kind : kinds)
    if (kind != 0) return false;
  return true;
}

// Where something is normalised there are channels.
inline void check_channels(const char* op, at::IntArrayRef shape, bool plain) {
  TORCH_CHECK_VALUE(plain || shape.size() >= 2, op,
                    ": expected tensors of shape (N, C, ...), but got ", shape);
}

inline void check_int64(const char* op, const char* name, const at::Tensor& x, int64_t count,
                        const at::Tensor& like) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, op, ": expected ", name,
                   " of dtype int64, but got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == count && x.device() == like.device(), op,
                    ": expected ", name, " of shape [", count, "] on ", like.device(), ", but got ",
                    x.sizes(), " on ", x.device());
}

// What the backward of sample_paths takes beside the logits of E edges.
inline void check_path_gradient(const char* op, const at::Tensor& grad, const at::Tensor& active,
                                const at::Tensor& inactive, int64_t E, const at::Tensor& logits) {
  check_floating(op, "grad", grad);
  TORCH_CHECK_VALUE(
      grad.dim() == 2 && grad.size(0) == E && grad.size(1) == 2 && grad.device() == logits.device(),
      op, ": expected grad of shape [", E, ", 2] on ", logits.device(), ", but got ", grad.sizes(),
      " on ", grad.device());
  check_int64(op, "active", active, E, logits);
  check_int64(op, "inactive", inactive, E, logits);
}

// Logits (E, K) of the edges of a cell, a threshold for each node, and how many of the edges lead to it.
inline void check_connections(const char* op, const at::Tensor& alpha, const at::Tensor& beta,
                              at::IntArrayRef in_degrees, double tau) {
  check_floating(op, "alpha", alpha);
  check_floating(op, "beta", beta);
  TORCH_CHECK_VALUE(alpha.dim() == 2 && alpha.size(1) >= 1 && alpha.size(1) <= kMaxCandidates, op,
                    ": expected alpha of shape (E, K) with K of 1 to ", kMaxCandidates,
                    ", but got ", alpha.sizes());
  const int64_t nodes = static_cast<int64_t>(in_degrees.size()), E = alpha.size(0);
  TORCH_CHECK_VALUE(nodes <= kMaxNodes, op, ": expected at most ", kMaxNodes,
                    " nodes in in_degrees, but got ", nodes);
  TORCH_CHECK_VALUE(beta.dim() == 1 && beta.size(0) == nodes && beta.device() == alpha.device(), op,
                    ": expected beta of shape [", nodes, "] on ", alpha.device(),
                    ", one entry per node of in_degrees, but got ", beta.sizes(), " on ",
                    beta.device());
  int64_t left = E;
  for (int64_t degree : in_degrees) {
    TORCH_CHECK_VALUE(degree >= 1 && degree <= left, op, ": expected positive in_degrees that sum ",
                      "to the ", E, " edges of alpha, but got ", in_degrees);
    left -= degree;
  }
  TORCH_CHECK_VALUE(left == 0, op, ": expected positive in_degrees that sum to the ", E,
                    " edges of alpha, but got ", in_degrees);
  TORCH_CHECK_VALUE(tau > 0 && tau <= std::numeric_limits<double>::max(), op,
                    ": expected a positive, finite tau, but got ", tau);
}

inline void check_connection_gradient(const char* op, const at::Tensor& grad,
                                      const at::Tensor& alpha) {
  check_floating(op, "grad", grad);
  TORCH_CHECK_VALUE(grad.sizes() == alpha.sizes() && grad.device() == alpha.device(), op,
                    ": expected grad of shape ", alpha.sizes(), " on ", alpha.device(),
                    " like alpha, but got ", grad.sizes(), " on ", grad.device());
}

// What passes by the mixed channels of partial_channel_mix, against outputs (N, c, oh, ow).
inline void check_bypass(const char* op, int64_t k, at::IntArrayRef rest_shape, int64_t N,
                         int64_t c, int64_t oh, int64_t ow) {
  // The bound keeps the products below within 64 bits.
  TORCH_CHECK_VALUE(k >= 2 && k <= (int64_t{1} << 20), op, ": expected k of 2 to 2^20, but got ",
                    k);
  TORCH_CHECK_VALUE(rest_shape.size() == 4 && rest_shape[0] == N && rest_shape[1] == (k - 1) * c,
                    op, ": expected rest of shape [", N, ", ", (k - 1) * c, ", H, W], but got ",
                    rest_shape);
  const int64_t H = rest_shape[2], W = rest_shape[3];
  TORCH_CHECK_VALUE((oh == H && ow == W) || (oh == H / 2 && ow == W / 2), op,
                    ": expected outputs of ", H, "x", W, " like rest or of half that, but got ", oh,
                    "x", ow);
}

// The operand as the kernels take it; no copy where it is so already.
inline at::Tensor as_operand(const at::Tensor& x, at::ScalarType dtype, at::MemoryFormat format) {
  return x.to(dtype).contiguous(format);
}

// The format of the gradients: that of the first input that was kept, or of grad.
inline at::MemoryFormat saved_format(at::TensorList xs, const at::Tensor& grad) {
  for (const at::Tensor& x : xs)
    if (x.sizes() == grad.sizes()) return memory_format(x);
  return memory_format(grad);
}

inline std::vector<at::Tensor> as_operands(at::TensorList xs, at::ScalarType dtype,
                                           at::MemoryFormat format) {
  std::vector<at::Tensor> out;
  out.reserve(xs.size());
  for (const at::Tensor& x : xs) out.push_back(x.numel() ? as_operand(x, dtype, format) : x);
  return out;
}

// What is asked for an input: no gradient, a gradient, or the numbers that whoever made the input makes its gradient of
// while reading that of the output: a g + b (x - centre) + c, channel by channel. It is then never written.
enum Need : int64_t { kNone = 0, kWritten = 1, kCarried = 2 };

inline void check_written(const char* op, int64_t need) {
  TORCH_CHECK_VALUE(need != kCarried, op,
                    ": carried statistics and gradients are for the CPU alone");
}

// What comes with inputs from those who made them: (4, C), of which the first two rows are mean and biased variance of
// the input's channels. Empty for inputs that come alone, no list where all do.
inline void check_carriers(const char* op, at::TensorList xs, at::TensorList carriers) {
  TORCH_CHECK_VALUE(carriers.empty() || carriers.size() == xs.size(), op,
                    ": expected as many carriers as inputs (", xs.size(), ") or none, but got ",
                    carriers.size());
  for (size_t k = 0; k < carriers.size(); ++k)
    TORCH_CHECK_VALUE(
        carriers[k].numel() == 0 || (carriers[k].sizes() == at::IntArrayRef({4, xs[k].size(1)}) &&
                                     carriers[k].device() == xs[k].device()),
        op, ": expected carriers[", k, "] of shape [4, ", xs[k].size(1), "] on ", xs[k].device(),
        ", or empty, but got ", carriers[k].sizes(), " on ", carriers[k].device());
}

// Whether outputs of this dtype can have carriers: what is rounded afterwards has other statistics.
inline void check_carries(const char* op, bool carry, const at::Tensor& x) {
  TORCH_CHECK_VALUE(!carry || x.scalar_type() == accumulate_dtype(x.scalar_type()), op,
                    ": expected float32 or float64 for outputs with carriers, but got ",
                    x.scalar_type());
}

inline void check_no_carriers(const char* op, at::TensorList carriers, bool carry = false) {
  for (const at::Tensor& c : carriers) carry = carry || c.numel() > 0;
  check_written(op, carry ? kCarried : kNone);
}

}  // namespace fastnas
