// SPDX-License-Identifier: Apache-2.0
// All binary gates of a network in one launch.
#pragma once
#include <cuda_runtime_api.h>

#include "plan.h"

namespace fastnas::cuda {

struct PathEdges {
  const void* logits;     // [E][K] of `dtype`
  const int64_t* counts;  // [E], or null: K everywhere
  int64_t E, K;
};

struct SamplePaths {
  PathEdges edges;
  uint64_t seed, step;
  bool two;
  int64_t *active, *inactive;  // [E]
  void* probs;                 // [E][2] of `dtype`
};
cudaError_t launch_sample_paths(Dtype dtype, const SamplePaths& args, cudaStream_t stream);

struct PathGradient {
  PathEdges edges;
  const void* grad;                  // [E][2] of `dtype`
  const int64_t *active, *inactive;  // [E], as drawn
  void* dlogits;                     // [E][K] of `dtype`
};
cudaError_t launch_path_gradient(Dtype dtype, const PathGradient& args, cudaStream_t stream);

}  // namespace fastnas::cuda
