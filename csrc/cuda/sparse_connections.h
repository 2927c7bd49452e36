// SPDX-License-Identifier: Apache-2.0
// The weights of the connections of a cell in one launch.
#pragma once
#include <cuda_runtime_api.h>

#include "plan.h"

namespace fastnas::cuda {

constexpr int kMostNodes = 64;

// Tensors of one dtype; those of [E][K] hold the edges of one node after those of the other.
struct Connections {
  const void* alpha;              // [E][K]
  const void* beta;               // [nodes]
  int64_t first[kMostNodes + 1];  // edges first[j] to first[j + 1] - 1 lead to node j
  int64_t nodes, K;
  double tau;
  bool node_norm;
};

struct SparseConnections {
  Connections cell;
  void* weights;  // [E][K]
};
cudaError_t launch_sparse_connections(Dtype dtype, const SparseConnections& args,
                                      cudaStream_t stream);

struct ConnectionGradient {
  Connections cell;
  const void* grad;  // [E][K]
  bool detach_max;
  void *dalpha, *dbeta;  // [E][K], [nodes]
};
cudaError_t launch_connection_gradient(Dtype dtype, const ConnectionGradient& args,
                                       cudaStream_t stream);

}  // namespace fastnas::cuda
