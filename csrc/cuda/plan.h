// SPDX-License-Identifier: Apache-2.0
// How the passes over operands (N, C, ...) are split among threads. Everything here follows from sizes and
// alignment alone, never from the GPU, so sums are taken in the same order on every machine and in every run.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <vector>

#include "../philox.h"  // FASTNAS_HOST_DEVICE

// Indices below this are divided by multiplication, larger ones by 64-bit division. A small value in a test build
// sends ordinary tensors through what only huge ones need.
#ifndef FASTNAS_NARROW_LIMIT
#define FASTNAS_NARROW_LIMIT (int64_t{1} << 31)
#endif

namespace fastnas::cuda {

enum class Dtype : int { kFloat, kDouble, kHalf, kBFloat16 };

constexpr int kMaxOperands = 64;
constexpr int kThreads = 256;  // of a block, at most
constexpr int64_t kReduceBlocks =
    512;  // enough to fill the largest GPU, few enough to fold in one small launch
constexpr int64_t kReduceDepth =
    256;  // values a thread adds up in float before they are folded in double

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t item_size(Dtype t) { return t == Dtype::kDouble ? 8 : t == Dtype::kFloat ? 4 : 2; }
inline size_t accumulator_size(Dtype t) { return t == Dtype::kDouble ? 8 : 4; }

// Division by a number known before the launch (Granlund and Montgomery, PLDI 1994).
struct Divider {
  int64_t d = 1;
  uint32_t multiplier = 1, shift = 0;
  bool narrow = true;

  Divider() = default;
  // Exact for 0 <= x <= largest.
  Divider(int64_t divisor, int64_t largest) : d(divisor) {
    narrow = d < FASTNAS_NARROW_LIMIT && largest < FASTNAS_NARROW_LIMIT;
    if (!narrow) return;
    while ((int64_t{1} << shift) < d) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d) / d + 1);
  }

  FASTNAS_HOST_DEVICE int64_t quotient(int64_t x) const {
    if (!narrow) return x / d;
    const uint32_t n = static_cast<uint32_t>(x);
    return static_cast<int64_t>((static_cast<uint32_t>(uint64_t{n} * multiplier >> 32) + n) >>
                                shift);
  }
};

// Operands are dense and walked in vectors of `vector` elements. Planes (contiguous format): N * C planes of `row`
// vectors, each of one channel. Columns (channels innermost, or one value a plane): rows of `row` vectors, each of a
// whole number of pixels; table entry i belongs to channel i % C, and a vector meets the same entries in every row.
struct Plan {
  Dtype dtype;
  bool columns;
  int vector;        // elements of 16 bytes, or 1
  int64_t N, C, S;   // S values a plane
  int64_t elements;  // of an operand, a multiple of vector
  int64_t vectors;   // elements / vector
  int64_t period;    // entries of a row of a coefficient table: C, or in columns lcm(C, vector)
  int64_t row;       // vectors of a plane, or of a period
  int lanes, rows,
      chunks;  // columns: a block is rows x lanes threads; chunks of lanes make up a row
  int64_t parts,
      share;  // reductions: parts of `share` vectors of a channel, or in columns of `share` rows
  Divider by_row, by_channel;

  FASTNAS_HOST_DEVICE int64_t values() const { return N * S; }  // per channel
  int64_t column_rows() const { return ceil_div(vectors, row); }
  int threads() const {
    return columns ? static_cast<int>(ceil_div(int64_t{rows} * lanes, 32) * 32) : kThreads;
  }
  int64_t tables(int64_t K) const { return K * period; }  // entries of K coefficient rows
  int64_t partials() const {
    return period * parts;
  }  // partial results of one sum over every channel
};

// Cuts what a reduction reads of an operand into parts, for about so many blocks.
inline void share_out(Plan& p, int64_t blocks) {
  if (p.elements == 0) return;  // no parts
  const int64_t reduced = p.columns ? p.column_rows() : p.N * p.row,
                pass = p.columns ? p.rows : kThreads;
  const int64_t passes = ceil_div(reduced, pass), side_by_side = p.columns ? p.chunks : p.C;
  const int64_t filling = ceil_div(blocks, side_by_side);
  const int64_t shallow = ceil_div(passes * (p.columns ? 1 : p.vector), kReduceDepth);
  const int64_t parts = filling > shallow ? filling : shallow;
  p.share = ceil_div(passes, parts < passes ? parts : passes) * pass;
  p.parts = ceil_div(reduced, p.share);
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// `pointers`: every operand that is to be walked; null ones do not count.
inline Plan make_plan(Dtype dtype, int64_t N, int64_t C, int64_t S, bool columns,
                      const std::vector<const void*>& pointers) {
  Plan p{};
  p.dtype = dtype;
  p.columns = columns || S == 1;
  p.N = N;
  p.C = C;
  p.S = S;
  p.elements = N * C * S;
  const int64_t wide = 16 / item_size(dtype);
  bool vectorised = (p.columns ? p.elements : S) % wide == 0;
  for (const void* q : pointers) vectorised = vectorised && aligned(q);
  p.vector = vectorised ? static_cast<int>(wide) : 1;
  p.vectors = p.elements / p.vector;
  const int64_t channels = C > 0 ? C : 1;
  p.period = p.columns ? std::lcm(channels, int64_t{p.vector}) : C;
  p.row = (p.columns ? p.period : S) / p.vector;
  if (p.row < 1) p.row = 1;
  p.by_row = Divider(p.row, p.vectors);
  p.by_channel = Divider(channels, N * C);
  p.chunks = static_cast<int>(ceil_div(p.row, kThreads));
  p.lanes = static_cast<int>(ceil_div(p.row, p.chunks));
  p.rows = kThreads / p.lanes;
  share_out(p, kReduceBlocks);
  return p;
}

}  // namespace fastnas::cuda
