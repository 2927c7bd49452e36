// SPDX-License-Identifier: Apache-2.0
// The passes over memory that all mixing ops are made of, as a table of functions for one instruction set.
//
// Each pass walks n consecutive elements of every operand. Element i has its coefficients at i mod L, where the
// period L is a multiple of the vector width: a plane of one channel (contiguous format) repeats that channel's
// value over one vector; pixels of C channels (channels_last) repeat the C values lcm(C, width) / C times. So both
// formats, and the plain weighted sum, run the same code at full width for every number of channels.
#pragma once
#include <cstdint>

#include "scalar_types.h"

namespace fastnas {

// Folds mean and squared deviations (m2) of `count` values into those of `total` values before them (Chan, Golub and
// LeVeque 1983): exact where the difference of two large sums would not be.
inline void merge_statistics(double* mean, double* m2, double total, double new_mean, double new_m2,
                             double count) {
  const double delta = new_mean - *mean, share = count / (total + count);
  *mean += delta * share;
  *m2 += new_m2 + delta * delta * total * share;
}

// Mean and squared deviations (m2) of `count` values by their deviations from a centre, summed, and their squares.
// What is left between the centre and the mean is put right by the former.
inline void deviation_statistics(double centre, double first, double second, double count,
                                 double* mean, double* m2) {
  const double off = first / count, squared = second - off * first;
  *mean = centre + off;
  *m2 = squared < 0 ? 0 : squared;  // NaN stays
}

constexpr int64_t kTargetGroup = 4;  // targets whose sums are in registers side by side

// For every target t: ys[t] = bias[t] + sum_k coef[t][k] xs[k] + own_coef[t] own[t], per channel as above. Bit t % group
// of users[t / group][k] tells whether it uses operand k, which is not read otherwise; own[t], an operand of this one
// sum, may be null.
template <typename T>
struct TargetSums {
  int64_t K, targets;
  const T* const* xs;
  T* const* ys;
  const T* const* own;
  const uint8_t* users;
  const acc_type<T>*coef, *own_coef, *bias;
};

template <typename T>
struct RangeKernels {
  using acc_t = acc_type<T>;

  int lanes;  // vector width in elements; L is a multiple of it

  // y[i] = bias[i % L] + sum_k coef[k][i % L] * xs[k][i]. bias may be null.
  void (*combine)(const T* const* xs, int64_t K, T* y, int64_t n, const acc_t* coef,
                  const acc_t* bias, int64_t L);

  // sums[i % L] += g[i]; dots[k][i % L] += g[i] * (xs[k][i] - centre[k][i % L]). centre may be null (zeros), and so
  // may sums and any xs[k] (its dots stay).
  void (*reduce)(const T* g, const T* const* xs, int64_t K, int64_t n, const acc_t* centre,
                 acc_t* sums, acc_t* dots, int64_t L);

  // dxs[k][i] = a[k][i % L] * g[i] + b[k][i % L] * (xs[k][i] - centre[k][i % L]) + c[k][i % L] where xs[k] is given,
  // a * g where it is null; nothing where dxs[k] is null.
  void (*gradients)(const T* g, const T* const* xs, T* const* dxs, int64_t K, int64_t n,
                    const acc_t* a, const acc_t* b, const acc_t* c, const acc_t* centre, int64_t L);

  // sums[i % L] += x[i].
  void (*sums)(const T* x, int64_t n, acc_t* sums, int64_t L);

  // With d = x[i] - centre[i % L]: first[i % L] += d, second[i % L] += d * d.
  void (*deviations)(const T* x, int64_t n, const acc_t* centre, acc_t* first, acc_t* second,
                     int64_t L);

  // Elements begin .. begin + n of all sums: few enough that those of every operand stay in the first-level cache.
  void (*combine_targets)(const TargetSums<T>& sums, int64_t begin, int64_t n, int64_t L);

  // With acc[targets][K + 1][L]: acc[t][0] += g_t and acc[t][k + 1] += g_t (x_k - centre[k]) over elements begin ..
  // begin + n; nothing where xs[k] is null.
  void (*reduce_targets)(const T* const* gs, int64_t targets, const T* const* xs, int64_t K,
                         int64_t begin, int64_t n, const acc_t* centre, acc_t* acc, int64_t L);
};

// The table for the instruction set torch runs with (ATEN_CPU_CAPABILITY lowers it).
template <typename T>
const RangeKernels<T>& range_kernels();

}  // namespace fastnas
