// SPDX-License-Identifier: Apache-2.0
// All binary gates of a network in one call, on CUDA. Counts outside [0, K] are taken as the nearest of the two: to
// report them would mean to wait for the device.
#include "sample_paths.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>

#include "host.h"

namespace fastnas::cuda {

namespace {

// Logits and counts as the kernels read them, kept alive beside the arguments that point into them.
struct Edges {
  at::Tensor logits, counts;
  PathEdges args;
};

Edges make_edges(const char* op, const at::Tensor& logits,
                 const std::optional<at::Tensor>& counts) {
  check_floating(op, "logits", logits);
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= kMaxCandidates,
                    op, ": expected logits of shape (E, K) with K of 1 to ", kMaxCandidates,
                    ", but got ", logits.sizes());
  Edges edges;
  edges.args = {nullptr, nullptr, logits.size(0), logits.size(1)};
  edges.logits = logits.contiguous();
  edges.args.logits = pointer(edges.logits);
  if (!counts) return edges;
  check_int64(op, "counts", *counts, logits.size(0), logits);
  edges.counts = counts->contiguous();
  edges.args.counts = static_cast<const int64_t*>(pointer(edges.counts));
  return edges;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_paths(const at::Tensor& logits,
                                                            const std::optional<at::Tensor>& counts,
                                                            int64_t seed, int64_t step, bool two) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const Edges edges = make_edges("sample_paths", logits, counts);
  const int64_t E = edges.args.E;
  at::Tensor active = at::empty({E}, logits.options().dtype(at::kLong)),
             inactive = at::empty_like(active);
  at::Tensor probs = at::empty({E, 2}, logits.options());
  SamplePaths args{};
  args.edges = edges.args;
  args.seed = static_cast<uint64_t>(seed);
  args.step = static_cast<uint64_t>(step);
  args.two = two;
  args.active = static_cast<int64_t*>(mutable_pointer(active));
  args.inactive = static_cast<int64_t*>(mutable_pointer(inactive));
  args.probs = mutable_pointer(probs);
  C10_CUDA_CHECK(launch_sample_paths(dtype_of(logits.scalar_type()), args, stream_of(logits)));
  return {active, inactive, probs};
}

at::Tensor sample_paths_backward(const at::Tensor& grad, const at::Tensor& logits,
                                 const std::optional<at::Tensor>& counts, const at::Tensor& active,
                                 const at::Tensor& inactive) {
  const char* op = "sample_paths_backward";
  const c10::cuda::CUDAGuard guard(logits.device());
  const Edges edges = make_edges(op, logits, counts);
  check_path_gradient(op, grad, active, inactive, edges.args.E, logits);
  const at::Tensor g = grad.to(logits.scalar_type()).contiguous(), first = active.contiguous(),
                   second = inactive.contiguous();
  at::Tensor out = at::empty({edges.args.E, edges.args.K}, logits.options());
  PathGradient args{};
  args.edges = edges.args;
  args.grad = pointer(g);
  args.active = static_cast<const int64_t*>(pointer(first));
  args.inactive = static_cast<const int64_t*>(pointer(second));
  args.dlogits = mutable_pointer(out);
  C10_CUDA_CHECK(launch_path_gradient(dtype_of(logits.scalar_type()), args, stream_of(logits)));
  return out;
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("sample_paths", &fastnas::cuda::sample_paths);
  m.impl("sample_paths_backward", &fastnas::cuda::sample_paths_backward);
}
