// SPDX-License-Identifier: Apache-2.0
// The weights of the connections of a cell, on CUDA.
#include "sparse_connections.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "host.h"

namespace fastnas::cuda {

namespace {

static_assert(kMostNodes == kMaxNodes);

// alpha and beta as the kernels read them, kept alive beside the arguments that point into them.
struct Cell {
  at::Tensor alpha, beta;
  Connections args;
};

Cell make_cell(const char* op, const at::Tensor& alpha, const at::Tensor& beta,
               at::IntArrayRef in_degrees, double tau, bool node_norm) {
  check_connections(op, alpha, beta, in_degrees, tau);
  const at::ScalarType dtype = c10::promoteTypes(alpha.scalar_type(), beta.scalar_type());
  Cell cell{alpha.to(dtype).contiguous(), beta.to(dtype).contiguous(), {}};
  cell.args.alpha = pointer(cell.alpha);
  cell.args.beta = pointer(cell.beta);
  cell.args.nodes = static_cast<int64_t>(in_degrees.size());
  for (int64_t j = 0; j < cell.args.nodes; ++j)
    cell.args.first[j + 1] = cell.args.first[j] + in_degrees[j];
  cell.args.K = alpha.size(1);
  cell.args.tau = tau;
  cell.args.node_norm = node_norm;
  return cell;
}

}  // namespace

at::Tensor sparse_connections(const at::Tensor& alpha, const at::Tensor& beta,
                              at::IntArrayRef in_degrees, double tau, bool node_norm) {
  const c10::cuda::CUDAGuard guard(alpha.device());
  const Cell cell = make_cell("sparse_connections", alpha, beta, in_degrees, tau, node_norm);
  at::Tensor weights = at::empty(alpha.sizes(), cell.alpha.options());
  SparseConnections args{};
  args.cell = cell.args;
  args.weights = mutable_pointer(weights);
  C10_CUDA_CHECK(
      launch_sparse_connections(dtype_of(cell.alpha.scalar_type()), args, stream_of(alpha)));
  return weights.to(alpha.scalar_type());
}

std::tuple<at::Tensor, at::Tensor> sparse_connections_backward(
    const at::Tensor& grad, const at::Tensor& alpha, const at::Tensor& beta,
    at::IntArrayRef in_degrees, double tau, bool node_norm, bool detach_max) {
  const char* op = "sparse_connections_backward";
  const c10::cuda::CUDAGuard guard(alpha.device());
  const Cell cell = make_cell(op, alpha, beta, in_degrees, tau, node_norm);
  check_connection_gradient(op, grad, alpha);
  const at::Tensor g = grad.to(cell.alpha.scalar_type()).contiguous();
  at::Tensor dalpha = at::empty(alpha.sizes(), cell.alpha.options()),
             dbeta = at::empty(beta.sizes(), cell.beta.options());
  ConnectionGradient args{};
  args.cell = cell.args;
  args.grad = pointer(g);
  args.detach_max = detach_max;
  args.dalpha = mutable_pointer(dalpha);
  args.dbeta = mutable_pointer(dbeta);
  C10_CUDA_CHECK(
      launch_connection_gradient(dtype_of(cell.alpha.scalar_type()), args, stream_of(alpha)));
  return {dalpha.to(alpha.scalar_type()), dbeta.to(beta.scalar_type())};
}

}  // namespace fastnas::cuda

TORCH_LIBRARY_IMPL(fastnas, FASTNAS_CUDA_KEY, m) {
  m.impl("sparse_connections", &fastnas::cuda::sparse_connections);
  m.impl("sparse_connections_backward", &fastnas::cuda::sparse_connections_backward);
}
