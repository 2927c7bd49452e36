// SPDX-License-Identifier: Apache-2.0
// The schema of every op of the package. Tensors named by role; K inputs, N, C, S as in the Python docstrings.
// A list that the caller has no entries for is empty; a tensor that is not needed comes back with no elements.
#include <torch/library.h>

TORCH_LIBRARY(fastnas, m) {
  m.def("mixed_sum(Tensor[] xs, Tensor weights) -> Tensor");
  m.def(
      "mixed_sum_backward(Tensor grad, Tensor[] xs, Tensor weights, int[] need_xs, bool "
      "need_weights) "
      "-> (Tensor[], Tensor)");

  // kinds[k]: 0 plain, 1 normalised by the statistics of the batch, 2 by running ones.
  m.def(
      "mixed_batch_norm(Tensor[] xs, Tensor weights, int[] kinds, float[] eps, int[] affine, "
      "Tensor[] gammas, Tensor[] betas, Tensor[] running_means, Tensor[] running_vars, Tensor[] "
      "carriers) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mixed_batch_norm_backward(Tensor grad, Tensor[] xs, Tensor weights, Tensor mean, Tensor "
      "var, int[] kinds, "
      "float[] eps, int[] affine, Tensor[] gammas, Tensor[] betas, int[] need_xs, bool "
      "need_weights) "
      "-> (Tensor[], Tensor, Tensor, Tensor, Tensor)");

  // Row rows[i] of mean and (biased) var, statistics of count values a channel, goes into the i-th running ones.
  m.def(
      "update_running_statistics(Tensor(a!)[] running_means, Tensor(b!)[] running_vars, "
      "Tensor(c!)[] counters, Tensor mean, Tensor var, int[] rows, float[] momenta, SymInt "
      "count) -> ()");

  // weights (T, K); the sum of each row, norms as in mixed_batch_norm. Without norms mean and var are empty.
  m.def(
      "multi_target_sum(Tensor[] xs, Tensor weights, int[] kinds, float[] eps, int[] affine, "
      "Tensor[] gammas, Tensor[] betas, Tensor[] running_means, Tensor[] running_vars) -> "
      "(Tensor[], Tensor, Tensor)");
  m.def(
      "multi_target_sum_backward(Tensor[] grads, Tensor[] xs, Tensor weights, Tensor mean, Tensor "
      "var, int[] kinds, float[] eps, int[] affine, Tensor[] gammas, Tensor[] betas, int[] "
      "need_xs, bool need_weights) -> (Tensor[], Tensor, Tensor, Tensor)");

  m.def(
      "partial_channel_mix(Tensor rest, Tensor[] xs, Tensor weights, int k, int[] kinds, float[] "
      "eps, "
      "int[] affine, Tensor[] gammas, Tensor[] betas, Tensor[] running_means, Tensor[] "
      "running_vars) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "partial_channel_mix_backward(Tensor grad, Tensor rest, int[] rest_size, Tensor[] xs, Tensor "
      "weights, int k, "
      "Tensor mean, Tensor var, int[] kinds, float[] eps, int[] affine, Tensor[] gammas, Tensor[] "
      "betas, "
      "bool need_rest, int[] need_xs, bool need_weights) -> (Tensor, Tensor[], Tensor, Tensor, "
      "Tensor)");

  // With rest the sum of weights[e] rests[e], the shuffled channels of both: the first C/k, the others. Backward: the
  // gradient of either part, or both; rests only with need_weights.
  m.def(
      "partial_channel_node(Tensor mixed, Tensor[] rests, Tensor weights, int k) -> (Tensor, "
      "Tensor)");
  m.def(
      "partial_channel_node_backward(Tensor? grad_mixed, Tensor? grad_rest, Tensor[] rests, Tensor "
      "weights, int k, bool need_mixed, int[] need_rests, bool need_weights) -> (Tensor, Tensor[], "
      "Tensor)");

  m.def(
      "sample_paths(Tensor logits, Tensor? counts, int seed, int step, bool two) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "sample_paths_backward(Tensor grad, Tensor logits, Tensor? counts, Tensor active, Tensor "
      "inactive) -> Tensor");
  m.def(
      "gate_gradient(Tensor grad_output, Tensor[] outputs, Tensor probs, int[] present) -> Tensor");

  // in_degrees: the edges of each node, one node's after the other's, E in all; beta has one entry a node.
  m.def(
      "sparse_connections(Tensor alpha, Tensor beta, int[] in_degrees, float tau, bool node_norm) "
      "-> Tensor");
  m.def(
      "sparse_connections_backward(Tensor grad, Tensor alpha, Tensor beta, int[] in_degrees, float "
      "tau, bool node_norm, bool detach_max) -> (Tensor, Tensor)");

  // kind, gamma, beta and running statistics: of the BatchNorm, as in mixed_batch_norm; absent where it has none.
  m.def(
      "batch_norm_depthwise(Tensor x, int kind, float eps, Tensor? gamma, Tensor? beta, Tensor? "
      "running_mean, Tensor? running_var, Tensor[] weights, int[] dilations, int stride) -> "
      "(Tensor[], Tensor, Tensor)");
  m.def(
      "batch_norm_depthwise_backward(Tensor[] grads, int[] present, Tensor x, Tensor mean, Tensor "
      "var, int kind, float eps, Tensor? gamma, Tensor? beta, Tensor[] weights, int[] dilations, "
      "int stride, bool need_x, bool need_norm, int[] need_weights) -> (Tensor, Tensor[], Tensor, "
      "Tensor)");

  // grads: of the outputs i with present[i]; size: H and W of x, which is empty where nothing reads it.
  m.def(
      "depthwise_group(Tensor x, Tensor[] weights, int[] dilations, int stride, bool relu) -> "
      "Tensor[]");
  m.def(
      "depthwise_group_backward(Tensor[] grads, int[] present, Tensor x, int[] size, Tensor[] "
      "weights, "
      "int[] dilations, int stride, bool relu, bool need_x, int[] need_weights) -> (Tensor, "
      "Tensor[])");

  // As batch_norm_depthwise, and kind 0 where no norm is before the ReLU; pointwise[i] stands behind depthwise[i].
  m.def(
      "separable_group(Tensor x, int kind, float eps, Tensor? gamma, Tensor? beta, Tensor? "
      "running_mean, Tensor? running_var, Tensor[] depthwise, Tensor[] pointwise, int[] dilations, "
      "int stride, Tensor? carrier, bool carry) -> (Tensor[], Tensor, Tensor, Tensor[])");
  m.def(
      "separable_group_backward(Tensor[] grads, int[] present, Tensor x, Tensor mean, Tensor var, "
      "int kind, float eps, Tensor? gamma, Tensor? beta, Tensor[] depthwise, Tensor[] pointwise, "
      "int[] dilations, int stride, int need_x, bool need_norm, int[] need_depthwise, int[] "
      "need_pointwise, Tensor[] outputs, Tensor[] carried) -> (Tensor, Tensor[], Tensor[], Tensor, "
      "Tensor, Tensor)");

  // separable_group of one convolution for each of several sources that have norms. Backward: of outputs that all have
  // gradients; lists of results have an entry for each need, dgamma and dbeta a row for each affine norm, or none.
  m.def(
      "separable_each(Tensor[] xs, int[] kinds, float[] eps, int[] affine, Tensor[] gammas, "
      "Tensor[] "
      "betas, Tensor[] running_means, Tensor[] running_vars, Tensor[] depthwise, Tensor[] "
      "pointwise, int[] dilations, int stride, Tensor[] carriers, bool carry) -> (Tensor[], "
      "Tensor, Tensor, Tensor[])");
  m.def(
      "separable_each_backward(Tensor[] grads, Tensor[] xs, Tensor mean, Tensor var, int[] kinds, "
      "float[] eps, int[] affine, Tensor[] gammas, Tensor[] betas, Tensor[] depthwise, Tensor[] "
      "pointwise, int[] dilations, int stride, int[] need_xs, int[] need_norms, int[] "
      "need_depthwise, int[] need_pointwise, Tensor[] outputs, Tensor[] carried) -> (Tensor[], "
      "Tensor[], Tensor[], Tensor, Tensor, Tensor)");

  // 3x3, padding 1: the maximum, and the average of what is inside the image. x may be empty without grad_max.
  m.def("pool_pair(Tensor x, int stride, bool carry) -> (Tensor, Tensor, Tensor[])");
  m.def(
      "pool_pair_backward(Tensor? grad_max, Tensor? grad_avg, Tensor x, int[] size, int stride) -> "
      "Tensor");
  // Of each output a gradient for every reader, with numbers (4, C) that finish it, or empty ones.
  m.def(
      "pool_pair_carried_backward(Tensor[] grads_max, Tensor[] numbers_max, Tensor[] grads_avg, "
      "Tensor[] numbers_avg, Tensor max, Tensor avg, Tensor x, int stride) -> Tensor");

  // y = W max(x, 0), weight (C', C, 1, 1).
  m.def("relu_pointwise(Tensor x, Tensor weight) -> Tensor");
  m.def(
      "relu_pointwise_backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool "
      "need_weight) -> (Tensor, Tensor)");
}
