// SPDX-License-Identifier: Apache-2.0
// From tensors to what the launchers take. Scratch memory comes from torch's allocator on the current stream: nothing
// here waits for the device, so every op can be captured into a CUDA graph.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "../check.h"
#include "mix.h"

// The dispatch key of the ops below. A test build that runs the kernels on the host takes another.
#ifndef FASTNAS_CUDA_KEY
#define FASTNAS_CUDA_KEY CUDA
#endif

namespace fastnas::cuda {

inline Dtype dtype_of(at::ScalarType t) {
  switch (t) {
    case at::kDouble:
      return Dtype::kDouble;
    case at::kHalf:
      return Dtype::kHalf;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kFloat;
  }
}

inline const void* pointer(const at::Tensor& x) { return x.numel() ? x.const_data_ptr() : nullptr; }
inline void* mutable_pointer(const at::Tensor& x) {
  return x.numel() ? x.mutable_data_ptr() : nullptr;
}

// Operands (N, C, ...) of the given shape, all in one dtype and memory format. `walked`: everything the passes touch.
inline Plan plan_channels(at::IntArrayRef shape, at::ScalarType dtype, at::MemoryFormat format,
                          const std::vector<const void*>& walked) {
  int64_t space = 1;
  for (size_t d = 2; d < shape.size(); ++d) space *= shape[d];
  return make_plan(dtype_of(dtype), shape[0], shape[1], space,
                   format != at::MemoryFormat::Contiguous, walked);
}

// Operands of n elements that have no channels: one plane.
inline Plan plan_flat(int64_t n, at::ScalarType dtype, const std::vector<const void*>& walked) {
  return make_plan(dtype_of(dtype), 1, 1, n, false, walked);
}

inline std::vector<const void*> pointers(at::TensorList xs) {
  std::vector<const void*> out;
  out.reserve(xs.size());
  for (const at::Tensor& x : xs) out.push_back(pointer(x));
  return out;
}

// Where the gradient of operand k goes: null if it is not needed.
inline std::vector<void*> gradient_pointers(at::IntArrayRef need,
                                            const std::vector<at::Tensor>& dxs) {
  std::vector<void*> out(need.size(), nullptr);
  for (size_t k = 0, i = 0; k < need.size(); ++k)
    if (need[k]) out[k] = mutable_pointer(dxs[i++]);
  return out;
}

inline cudaStream_t stream_of(const at::Tensor& x) {
  return c10::cuda::getCurrentCUDAStream(x.device().index());
}

inline at::Tensor scratch(int64_t n, at::ScalarType dtype, const at::Tensor& like) {
  return at::empty({n}, like.options().dtype(dtype).memory_format(at::MemoryFormat::Contiguous));
}

}  // namespace fastnas::cuda
