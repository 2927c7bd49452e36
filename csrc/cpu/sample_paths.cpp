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

// Probability of candidate k among those that `kept` admits, by a softmax that subtracts the largest first.
template <typename Kept>
double probability(const double* logits, int64_t count, int64_t k, Kept kept) {
  double top = -INFINITY, sum = 0;
  for (int64_t j = 0; j < count; ++j)
    if (kept(j)) top = std::max(top, logits[j]);
  for (int64_t j = 0; j < count; ++j)
    if (kept(j)) sum += std::exp(below_top(logits[j], top));
  return std::exp(below_top(logits[k], top)) / sum;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> sample_paths_cpu(
    const at::Tensor& logits, const std::optional<at::Tensor>& counts, int64_t seed, int64_t step,
    bool two) {
  const char* op = "sample_paths";
  check_floating(op, "logits", logits);
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= kMaxCandidates,
                    op, ": expected logits of shape (E, K) with K of 1 to ", kMaxCandidates,
                    ", but got ", logits.sizes());
  const int64_t E = logits.size(0), K = logits.size(1);
  std::vector<int64_t> count(E, K);
  if (counts) {
    TORCH_CHECK_TYPE(counts->scalar_type() == at::kLong, op,
                     ": expected counts of dtype int64, but got ", counts->scalar_type());
    TORCH_CHECK_VALUE(counts->dim() == 1 && counts->size(0) == E, op,
                      ": expected counts of shape [", E, "], but got ", counts->sizes());
    const at::Tensor c = counts->contiguous();
    std::copy_n(c.const_data_ptr<int64_t>(), E, count.begin());
    for (int64_t n : count)
      TORCH_CHECK_VALUE(n >= 0 && n <= K, op, ": expected counts in [0, ", K, "], but got ", n);
  }
  const std::vector<double> all = to_doubles(logits);
  at::Tensor active = at::empty({E}, logits.options().dtype(at::kLong)),
             inactive = at::empty_like(active);
  std::vector<double> probs(2 * E);
  for (int64_t e = 0; e < E; ++e) {
    const double* row = all.data() + e * K;
    const Path path = sample_path([&](int64_t k) { return row[k]; }, count[e], seed, step, e, two);
    active.mutable_data_ptr<int64_t>()[e] = path.active;
    inactive.mutable_data_ptr<int64_t>()[e] = path.inactive;
    if (path.active < 0) continue;
    const auto kept = [&](int64_t j) {
      return path.inactive < 0 ? !std::isnan(row[j]) : j == path.active || j == path.inactive;
    };
    probs[2 * e] = probability(row, count[e], path.active, kept);
    if (path.inactive >= 0) probs[2 * e + 1] = probability(row, count[e], path.inactive, kept);
  }
  return {active, inactive, from_doubles(probs, {E, 2}, logits.options())};
}

}  // namespace fastnas

TORCH_LIBRARY_IMPL(fastnas, CPU, m) { m.impl("sample_paths", &fastnas::sample_paths_cpu); }
