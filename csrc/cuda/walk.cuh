// SPDX-License-Identifier: Apache-2.0
// From a block and a thread to the vectors they work on, for the kernels that add nothing up across threads.
#pragma once
#include "vec.cuh"

namespace fastnas::cuda {

// A vector of every operand: `at` is its first element, `slot` that element in the slot (of tensors with step), whose
// further elements are `stride` apart; `entry` is its first coefficient in a row of a table.
struct Place {
  int64_t at, slot, entry;
};

// In columns the slot is the dense operand with its elements spread `step` apart: (p C + c) step = p C step + c step.
// In planes it has step planes for each of the operand's.
template <int V, bool kColumns>
__device__ inline Place place_of(const Plan& p, int64_t vector, int64_t lane, int64_t step) {
  if constexpr (kColumns) {
    const int64_t at = vector * V;
    return {at, at * step, lane * V};
  } else {
    const int64_t plane = p.by_row.quotient(vector);
    const int64_t channel = p.C == 1 ? 0 : plane - p.by_channel.quotient(plane) * p.C;
    const int64_t at = vector * V;
    return {at, at + plane * (step - 1) * p.S, channel};
  }
}

// Tiles of U vectors a thread; neighbours in a warp are neighbours in memory.
template <bool kColumns, int U>
inline int64_t tiles_of(const Plan& p) {
  return kColumns ? ceil_div(p.column_rows(), int64_t{U} * p.rows) * p.chunks
                  : ceil_div(p.vectors, int64_t{U} * kThreads);
}

// What a thread of a reduction has: vectors row, row + rows, ... of a part of a channel (planes, where `side` is the
// channel), or those of a lane in rows of a part of a chunk of lanes (columns, where `side` is the chunk).
struct Share {
  int64_t side, part, lane;
  int row, rows;
  bool works;
};

// For a grid with parts of every channel or chunk in x.
template <bool kColumns>
__device__ inline Share share_of(const Plan& p) {
  const int64_t side = blockIdx.x / static_cast<unsigned>(p.parts),
                part = blockIdx.x - side * p.parts;
  const int thread = static_cast<int>(threadIdx.x);
  const int row = kColumns ? thread / p.lanes : thread, rows = kColumns ? p.rows : kThreads;
  const int64_t lane = kColumns ? side * p.lanes + thread - row * p.lanes : 0;
  return {side, part, lane, row, rows, row < rows && lane < p.row};
}

// Calls f(place) for the vectors of a share.
template <int V, bool kColumns, typename F>
__device__ inline void for_each_of_share(const Plan& p, const Share& s, int64_t step, F&& f) {
  const int64_t first = s.part * p.share + s.row, last = first - s.row + p.share;
  if constexpr (kColumns) {
    if (!s.works) return;
    const int64_t stride = s.rows * p.row, cut = last * p.row;
    const int64_t end = cut < p.vectors ? cut : p.vectors;
    for (int64_t vector = first * p.row + s.lane; vector < end; vector += stride)
      f(place_of<V, kColumns>(p, vector, s.lane, step));
  } else {
    const int64_t end = p.N * p.row;
    for (int64_t q = first; q < last; q += s.rows) {
      if (q >= end) break;
      const int64_t n = p.by_row.quotient(q), plane = n * p.C + s.side,
                    within = (q - n * p.row) * V;
      f(Place{plane * p.S + within, plane * step * p.S + within, s.side});
    }
  }
}

// Calls f(places, valid) for the `tiles` of the launch that fall to this thread. valid[0] holds always; a place that is not valid repeats place
// 0, so that it may be read but not written.
template <int V, bool kColumns, int U, typename F>
__device__ inline void for_each_tile(const Plan& p, int64_t tiles, int64_t step, F&& f) {
  Place at[U];
  bool valid[U];
  if constexpr (kColumns) {
    const int row_in_block = static_cast<int>(threadIdx.x) / p.lanes;
    const int lane_in_block = static_cast<int>(threadIdx.x) - row_in_block * p.lanes;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t row_tile = p.chunks == 1 ? tile : tile / p.chunks;
      const int64_t lane =
          lane_in_block + (p.chunks == 1 ? 0 : (tile - row_tile * p.chunks) * p.lanes);
      if (row_in_block >= p.rows || lane >= p.row) continue;
      const int64_t first = (row_tile * U * p.rows + row_in_block) * p.row + lane;
      if (first >= p.vectors) continue;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t vector = first + u * p.rows * p.row;
        valid[u] = vector < p.vectors;
        at[u] = place_of<V, kColumns>(p, valid[u] ? vector : first, lane, step);
      }
      f(at, valid);
    }
  } else {
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      const int64_t first = tile * U * kThreads + threadIdx.x;
      if (first >= p.vectors) continue;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int64_t vector = first + u * kThreads;
        valid[u] = vector < p.vectors;
        at[u] = place_of<V, kColumns>(p, valid[u] ? vector : first, 0, step);
      }
      f(at, valid);
    }
  }
}

}  // namespace fastnas::cuda
