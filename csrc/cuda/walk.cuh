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
