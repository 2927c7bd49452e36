// SPDX-License-Identifier: Apache-2.0
// Weights of the connections of a cell that are exactly zero below a learned threshold, and their gradients in closed
// form; a few dozen numbers, so nothing here is vectorised or threaded.
#include <torch/library.h>

#include <cmath>

#include "../check.h"
#include "../sparse.h"
#include "dispatch.h"

namespace fastnas {

namespace {

// One node: `edges` rows of K probabilities and of what is left of them, and the sums that divide them.
struct Node {
  int64_t edges, K;
  std::vector<double> p, q, sums;  // sums[e]: of the edge, or of the node
  double top = 0, gap = 0;         // the largest p, 1 - sigmoid(beta)
  int64_t best = 0;                // where the first of the largest is

  double ratio(int64_t i) const { return top > 0 ? p[i] / top : 0.0; }
};

// Softmax over the live candidates of an edge; 0 for those of -inf and NaN.
void edge_softmax(const double* logits, int64_t K, double tau, double* p) {
  double top = -INFINITY, sum = 0;
  for (int64_t k = 0; k < K; ++k)
    if (logits[k] > top) top = logits[k];
  for (int64_t k = 0; k < K; ++k)
    sum += p[k] = logits[k] > -INFINITY ? std::exp(below_top(logits[k], top) / tau) : 0.0;
  for (int64_t k = 0; k < K && sum > 0; ++k) p[k] /= sum;
}

Node make_node(const double* logits, double beta, int64_t edges, int64_t K, double tau,
               bool node_norm) {
  Node n{edges, K, std::vector<double>(edges * K), std::vector<double>(edges * K),
         std::vector<double>(edges)};
  for (int64_t e = 0; e < edges; ++e) edge_softmax(logits + e * K, K, tau, n.p.data() + e * K);
  for (int64_t i = 0; i < edges * K; ++i) {
    if (n.p[i] <= n.top) continue;
    n.top = n.p[i];
    n.best = i;
  }
  n.gap = below_one(beta);
  double all = 0;
  for (int64_t i = 0; i < edges * K; ++i) {
    n.q[i] = left_over(n.ratio(i), n.gap);
    n.sums[i / K] += n.q[i];
    all += n.q[i];
  }
  if (node_norm) std::fill(n.sums.begin(), n.sums.end(), all);
  return n;
}

// dL/dq: 1[q > 0] (g - <g, q / s>) / s, where s and the product are the edge's or the node's. Divided before it is
// multiplied, what is alone has exactly g there, and no gradient.
std::vector<double> left_over_gradient(const Node& n, const double* g, bool node_norm) {
  std::vector<double> dots(n.edges), dq(n.edges * n.K);
  for (int64_t i = 0; i < n.edges * n.K; ++i)
    if (n.q[i] != 0) dots[node_norm ? 0 : i / n.K] += g[i] * (n.q[i] / n.sums[i / n.K]);
  for (int64_t i = 0; i < n.edges * n.K; ++i)
    if (n.q[i] != 0) dq[i] = (g[i] - dots[node_norm ? 0 : i / n.K]) / n.sums[i / n.K];
  return dq;
}

// dalpha and, as the result, dbeta. Nothing small changes the weights of an edge with logits of +inf.
double node_gradient(const Node& n, const double* logits, const double* g, double tau,
                     bool node_norm, bool detach_max, double* dalpha) {
  const std::vector<double> dq = left_over_gradient(n, g, node_norm);
  double total = 0, through_max = 0;
  for (int64_t i = 0; i < n.edges * n.K; ++i) {
    total += dq[i];
    through_max += dq[i] * n.ratio(i);
  }
  for (int64_t e = 0; e < n.edges && n.top > 0; ++e) {
    const int64_t first = e * n.K;
    const auto dp = [&](int64_t i) {
      return (i == n.best && !detach_max ? dq[i] - through_max : dq[i]) / n.top;
    };
    double mean = 0;
    for (int64_t i = first; i < first + n.K; ++i) mean += n.p[i] * dp(i);
    for (int64_t i = first; i < first + n.K; ++i)
      if (logits[i] < INFINITY) dalpha[i] = n.p[i] / tau * (dp(i) - mean);
  }
  return below_one_slope(n.gap) * total;
}

// Calls f(node, its number, first index of its entries in alpha, its logits).
template <typename F>
void each_node(const at::Tensor& alpha, const at::Tensor& beta, at::IntArrayRef in_degrees,
               double tau, bool node_norm, F&& f) {
  const int64_t K = alpha.size(1);
  const std::vector<double> a = to_doubles(alpha), b = to_doubles(beta);
  for (int64_t j = 0, first = 0; j < static_cast<int64_t>(in_degrees.size()); ++j) {
    const double* logits = a.data() + first;
    f(make_node(logits, b[j], in_degrees[j], K, tau, node_norm), j, first, logits);
    first += in_degrees[j] * K;
  }
}

}  // namespace

at::Tensor sparse_connections_cpu(const at::Tensor& alpha, const at::Tensor& beta,
                                  at::IntArrayRef in_degrees, double tau, bool node_norm) {
  check_connections("sparse_connections", alpha, beta, in_degrees, tau);
  std::vector<double> out(alpha.numel());
  each_node(alpha, beta, in_degrees, tau, node_norm,
            [&](const Node& n, int64_t, int64_t first, const double*) {
              for (int64_t i = 0; i < n.edges * n.K; ++i)
                if (n.sums[i / n.K] != 0) out[first + i] = n.q[i] / n.sums[i / n.K];
            });
  return from_doubles(out, alpha.sizes(), alpha.options());
}

std::tuple<at::Tensor, at::Tensor> sparse_connections_backward_cpu(
    const at::Tensor& grad, const at::Tensor& alpha, const at::Tensor& beta,
    at::IntArrayRef in_degrees, double tau, bool node_norm, bool detach_max) {
  const char* op = "sparse_connections_backward";
  check_connections(op, alpha, beta, in_degrees, tau);
  check_connection_gradient(op, grad, alpha);
  const std::vector<double> g = to_doubles(grad);
  std::vector<double> dalpha(alpha.numel()), dbeta(beta.numel());
  each_node(alpha, beta, in_degrees, tau, node_norm,
            [&](const Node& n, int64_t j, int64_t first, const double* logits) {
              dbeta[j] = node_gradient(n, logits, g.data() + first, tau, node_norm, detach_max,
                                       dalpha.data() + first);
            });
  return {from_doubles(dalpha, alpha.sizes(), alpha.options()),
          from_doubles(dbeta, beta.sizes(), beta.options())};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("sparse_connections", &fastnas::sparse_connections_cpu);
  m.impl("sparse_connections_backward", &fastnas::sparse_connections_backward_cpu);
}
