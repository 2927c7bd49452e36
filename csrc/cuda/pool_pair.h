// SPDX-License-Identifier: Apache-2.0
// Maximum and average over the same 3x3 windows.
#pragma once
#include <cuda_runtime_api.h>

#include "plan.h"

namespace fastnas::cuda {

// x is (N, C, H, W) and its outputs (N, C, oh, ow), all dense and in one format.
struct PoolSizes {
  Dtype dtype;
  bool columns;
  int stride;
  int64_t N, C, H, W, oh, ow;

  int64_t sources() const { return N * C * H * W; }
  int64_t outputs() const { return N * C * oh * ow; }
};

cudaError_t launch_pool_pair(const PoolSizes& sizes, const void* x, void* max, void* avg,
                             cudaStream_t stream);

// g_max or g_avg may be null; x is read for that of max alone.
cudaError_t launch_pool_pair_gradient(const PoolSizes& sizes, const void* x, const void* g_max,
                                      const void* g_avg, void* dx, cudaStream_t stream);

}  // namespace fastnas::cuda
