// SPDX-License-Identifier: Apache-2.0
// Tensors as one long range of elements, for the ops that know no channels.
#pragma once
#include <algorithm>
#include <vector>

#include "mix.h"

namespace fastnas {

// f(task, begin, count) for the ranges of n elements. Their length is fixed, so sums over them do not depend on the
// number of threads.
template <typename F>
void parallel_ranges(int64_t n, int64_t operands, F&& f) {
  const int64_t tasks = (n + kTaskElements - 1) / kTaskElements;
  parallel_tasks(tasks, std::max<int64_t>(2 / operands, 1), [&](Tasks::Worker& worker) {
    for (int64_t t; worker.next(t);)
      f(t, t * kTaskElements, std::min(kTaskElements, n - t * kTaskElements));
  });
}

// One coefficient a row, repeated over a vector.
template <typename A>
std::vector<A> table(const std::vector<double>& weights, int64_t lanes) {
  std::vector<A> out;
  for (double w : weights) out.insert(out.end(), lanes, static_cast<A>(w));
  return out;
}

// dots[k] = <g, x_k> over n elements; partial sums of fixed ranges, folded in order.
template <typename T>
std::vector<double> dot_products(const T* g, const std::vector<const T*>& xs, int64_t n) {
  using acc_t = acc_type<T>;
  const RangeKernels<T>& kernels = range_kernels<T>();
  const int64_t K = xs.size(), tasks = (n + kTaskElements - 1) / kTaskElements, L = kernels.lanes;
  std::vector<double> partial(tasks * K);
  parallel_ranges(n, K + 1, [&](int64_t task, int64_t begin, int64_t count) {
    std::vector<acc_t> acc(K * L);
    std::vector<const T*> at(xs);
    for (const T*& p : at)
      if (p) p += begin;
    kernels.reduce(g + begin, at.data(), K, count, nullptr, nullptr, acc.data(), L);
    for (int64_t i = 0; i < K * L; ++i) partial[task * K + i / L] += acc[i];
  });
  std::vector<double> dots(K);
  for (int64_t i = 0; i < tasks * K; ++i) dots[i % K] += partial[i];
  return dots;
}

}  // namespace fastnas
