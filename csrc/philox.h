// SPDX-License-Identifier: Apache-2.0
// The draws of sample_paths, written once for the CPU and the GPU. Everything a choice depends on is integer
// arithmetic, or double arithmetic in single correctly rounded operations (fma, never a contracted a * b + c), so
// both devices take bit-equal decisions.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define FASTNAS_HOST_DEVICE __host__ __device__
#else
#define FASTNAS_HOST_DEVICE
#endif

#include <cmath>
#include <cstring>

namespace fastnas {

struct Words {
  uint32_t w[4];
};

// Philox-4x32, 10 rounds (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011).
FASTNAS_HOST_DEVICE inline Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c.w[0], p1 = uint64_t{0xCD9E8D57u} * c.w[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.w[1] ^ k0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.w[3] ^ k1, static_cast<uint32_t>(p0)}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Three 32-bit words for an edge: a function of (seed, step, edge) and nothing else.
FASTNAS_HOST_DEVICE inline Words edge_words(uint64_t seed, uint64_t step, uint32_t edge) {
  const Words counter{{edge, 0, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)}};
  return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// exp(x) for x <= 0 to about one unit in the last place, the same bits on every device: Cody-Waite reduction and the
// Taylor polynomial of degree 13 on |r| <= ln 2 / 2, all by fma.
FASTNAS_HOST_DEVICE inline double exp_nonpositive(double x) {
  if (!(x > -700.0)) return 0.0;
  const double n = rint(x * 1.4426950408889634);
  double r = fma(n, -6.93147180369123816490e-01, x);
  r = fma(n, -1.90821492927058770002e-10, r);
  double p = 1.0 / 6227020800.0;
  const double inverse_factorial[13] = {1.0 / 479001600.0,
                                        1.0 / 39916800.0,
                                        1.0 / 3628800.0,
                                        1.0 / 362880.0,
                                        1.0 / 40320.0,
                                        1.0 / 5040.0,
                                        1.0 / 720.0,
                                        1.0 / 120.0,
                                        1.0 / 24.0,
                                        1.0 / 6.0,
                                        0.5,
                                        1.0,
                                        1.0};
  for (int i = 0; i < 13; ++i) p = fma(p, r, inverse_factorial[i]);
  const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(n) + 1023) << 52;
  double scale;
  memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

constexpr int64_t kMassUnit = int64_t{1} << 24;

// An integer in proportion to exp(logit - top): 2^24 at the top, at least 1 for a live candidate, 0 for a dead one
// (-inf or NaN).
FASTNAS_HOST_DEVICE inline int64_t path_mass(double logit, double top) {
  if (!(logit > -INFINITY)) return 0;
  if (logit == top) return kMassUnit;
  const int64_t mass =
      static_cast<int64_t>(rint(exp_nonpositive(logit - top) * static_cast<double>(kMassUnit)));
  return mass < 1 ? 1 : mass;
}

// logit - top for the exponential of a softmax: 0 at the top, also where that is +inf.
FASTNAS_HOST_DEVICE inline double below_top(double logit, double top) {
  return logit == top ? 0.0 : logit - top;
}

struct Path {
  int64_t active, inactive;
};

// Index drawn in proportion to mass(k), k < count, by a uniform word; -1 if all is 0. At most 64 candidates keep
// the total within 30 bits and the product within 62.
template <typename Mass>
FASTNAS_HOST_DEVICE inline int64_t draw(Mass mass, int64_t count, uint32_t word) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; ++k) total += mass(k);
  if (total == 0) return -1;
  const int64_t threshold =
      static_cast<int64_t>((static_cast<uint64_t>(word) * static_cast<uint64_t>(total)) >> 32);
  int64_t k = 0;
  for (int64_t sum = mass(0); sum <= threshold; sum += mass(k)) ++k;
  return k;
}

// The draw of one edge from masses: mass(k) for k < count.
template <typename Mass>
FASTNAS_HOST_DEVICE inline Path choose_path(Mass mass, int64_t count, uint64_t seed, uint64_t step,
                                            uint32_t edge, bool two) {
  const Words words = edge_words(seed, step, edge);
  const int64_t first = draw(mass, count, words.w[0]);
  if (!two || first < 0) return {first, -1};
  const int64_t second =
      draw([&](int64_t k) { return k == first ? int64_t{0} : mass(k); }, count, words.w[1]);
  if (second < 0) return {first, -1};
  const uint64_t m = mass(first), pair = m + mass(second);
  const bool swap = ((words.w[2] * pair) >> 32) >= m;
  return swap ? Path{second, first} : Path{first, second};
}

// The same from logit(k) as double for k < count.
template <typename Logit>
FASTNAS_HOST_DEVICE inline Path sample_path(Logit logit, int64_t count, uint64_t seed,
                                            uint64_t step, uint32_t edge, bool two) {
  double top = -INFINITY;
  for (int64_t k = 0; k < count; ++k)
    if (logit(k) > top) top = logit(k);
  return choose_path([&](int64_t k) { return path_mass(logit(k), top); }, count, seed, step, edge,
                     two);
}

}  // namespace fastnas
