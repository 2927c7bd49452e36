// SPDX-License-Identifier: Apache-2.0
// All binary gates of a network in one call; a few hundred numbers, so nothing here is vectorised or threaded.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "../check.h"
#include "../philox.h"
#include "dispatch.h"

namespace fastnas {

namespace {

// E edges with logits [E][K] and the number of candidates of each.
struct Edges {
  int64_t E, K;
  std::vector<int64_t> count;
  std::vector<double> logits;

  const double* row(int64_t e) const { return logits.data() + e * K; }
};

Edges make_edges(const char* op, const at::Tensor& logits,
                 const std::optional<at::Tensor>& counts) {
  check_floating(op, "logits", logits);
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= kMaxCandidates,
                    op, ": expected logits of shape (E, K) with K of 1 to ", kMaxCandidates,
                    ", but got ", logits.sizes());
  const int64_t E = logits.size(0), K = logits.size(1);
  Edges edges{E, K, std::vector<int64_t>(E, K), to_doubles(logits)};
  if (!counts) return edges;
  check_int64(op, "counts", *counts, E, logits);
  const at::Tensor c = counts->contiguous();
  std::copy_n(c.const_data_ptr<int64_t>(), E, edges.count.begin());
  for (int64_t n : edges.count)
    TORCH_CHECK_VALUE(n >= 0 && n <= K, op, ": expected counts in [0, ", K, "], but got ", n);
  return edges;
}

// p[k]: softmax of an edge's live candidates, or of its pair where one is inactive; 0 for the others.
void path_softmax(const double* logits, int64_t count, Path path, double* p) {
  const auto kept = [&](int64_t k) {
    return path.inactive < 0 ? !std::isnan(logits[k]) : k == path.active || k == path.inactive;
  };
  double top = -INFINITY, sum = 0;
  for (int64_t k = 0; k < count; ++k)
    if (kept(k)) top = std::max(top, logits[k]);
  for (int64_t k = 0; k < count; ++k)
    sum += p[k] = kept(k) ? std::exp(below_top(logits[k], top)) : 0.0;
  for (int64_t k = 0; k < count; ++k) p[k] /= sum;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_paths_cpu(
    const at::Tensor& logits, const std::optional<at::Tensor>& counts, int64_t seed, int64_t step,
    bool two) {
  const Edges edges = make_edges("sample_paths", logits, counts);
  const int64_t E = edges.E;
  at::Tensor active = at::empty({E}, logits.options().dtype(at::kLong)),
             inactive = at::empty_like(active);
  std::vector<double> probs(2 * E);
  for (int64_t e = 0; e < E; ++e) {
    const double* row = edges.row(e);
    const Path path =
        sample_path([&](int64_t k) { return row[k]; }, edges.count[e], seed, step, e, two);
    active.mutable_data_ptr<int64_t>()[e] = path.active;
    inactive.mutable_data_ptr<int64_t>()[e] = path.inactive;
    if (path.active < 0) continue;
    double p[kMaxCandidates];
    path_softmax(row, edges.count[e], path, p);
    probs[2 * e] = p[path.active];
    if (path.inactive >= 0) probs[2 * e + 1] = p[path.inactive];
  }
  return {active, inactive, from_doubles(probs, {E, 2}, logits.options())};
}

// dlogit_k = p_k (d_k - sum_j p_j d_j), where d is the gradient of the active and of the inactive one's probability.
at::Tensor sample_paths_backward_cpu(const at::Tensor& grad, const at::Tensor& logits,
                                     const std::optional<at::Tensor>& counts,
                                     const at::Tensor& active, const at::Tensor& inactive) {
  const char* op = "sample_paths_backward";
  const Edges edges = make_edges(op, logits, counts);
  const int64_t E = edges.E, K = edges.K;
  check_path_gradient(op, grad, active, inactive, E, logits);
  const std::vector<double> g = to_doubles(grad);
  const at::Tensor first = active.contiguous(), second = inactive.contiguous();
  std::vector<double> out(E * K);
  for (int64_t e = 0; e < E; ++e) {
    const Path path{first.const_data_ptr<int64_t>()[e], second.const_data_ptr<int64_t>()[e]};
    TORCH_CHECK_VALUE(path.active < edges.count[e] && path.inactive < edges.count[e], op,
                      ": expected active and inactive below the ", edges.count[e],
                      " candidates of edge ", e, ", but got ", path.active, " and ", path.inactive);
    if (path.active < 0) continue;
    double p[kMaxCandidates];
    path_softmax(edges.row(e), edges.count[e], path, p);
    const double d0 = g[2 * e], d1 = path.inactive < 0 ? 0.0 : g[2 * e + 1];
    const double mean = p[path.active] * d0 + (path.inactive < 0 ? 0.0 : p[path.inactive] * d1);
    for (int64_t k = 0; k < edges.count[e]; ++k) {
      const double d = k == path.active ? d0 : k == path.inactive ? d1 : 0.0;
      out[e * K + k] = p[k] * (d - mean);
    }
  }
  return from_doubles(out, {E, K}, logits.options());
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) {
  m.impl("sample_paths", &fastnas::sample_paths_cpu);
  m.impl("sample_paths_backward", &fastnas::sample_paths_backward_cpu);
}
