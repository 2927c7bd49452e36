// SPDX-License-Identifier: Apache-2.0
// All binary gates of a network in one call, on CUDA. Counts outside [0, K] are taken as the nearest of the two: to
// report them would mean to wait for the device.
#include "sample_paths.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>

#include "host.h"

namespace fastnas::cuda {

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_paths(const at::Tensor& logits,
                                                            const std::optional<at::Tensor>& counts,
                                                            int64_t seed, int64_t step, bool two) {
  const char* op = "sample_paths";
  check_floating(op, "logits", logits);
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= kMaxCandidates,
                    op, ": expected logits of shape (E, K) with K of 1 to ", kMaxCandidates,
                    ", but got ", logits.sizes());
  const int64_t E = logits.size(0), K = logits.size(1);
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor dense_counts;
  if (counts) {
    TORCH_CHECK_TYPE(counts->scalar_type() == at::kLong, op,
                     ": expected counts of dtype int64, but got ", counts->scalar_type());
    TORCH_CHECK_VALUE(
        counts->dim() == 1 && counts->size(0) == E && counts->device() == logits.device(), op,
        ": expected counts of shape [", E, "] on ", logits.device(), ", but got ", counts->sizes(),
        " on ", counts->device());
    dense_counts = counts->contiguous();
  }
  const at::Tensor dense = logits.contiguous();
  at::Tensor active = at::empty({E}, logits.options().dtype(at::kLong)),
             inactive = at::empty_like(active);
  at::Tensor probs = at::empty({E, 2}, logits.options());
  SamplePaths args{};
  args.logits = pointer(dense);
  args.counts = counts ? static_cast<const int64_t*>(pointer(dense_counts)) : nullptr;
  args.E = E;
  args.K = K;
  args.seed = static_cast<uint64_t>(seed);
  args.step = static_cast<uint64_t>(step);
  args.two = two;
  args.active = static_cast<int64_t*>(mutable_pointer(active));
  args.inactive = static_cast<int64_t*>(mutable_pointer(inactive));
  args.probs = mutable_pointer(probs);
  C10_CUDA_CHECK(launch_sample_paths(dtype_of(logits.scalar_type()), args, stream_of(logits)));
  return {active, inactive, probs};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("sample_paths", &fastnas::cuda::sample_paths);
}
