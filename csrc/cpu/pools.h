// SPDX-License-Identifier: Apache-2.0
// Pooling over 3x3 windows with one plane a lane of a vector (planes.h), as a table of functions for one instruction
// set. Windows are taken apart: rows of three first, which two or three windows have in common, then what three of them
// make up. The maximum of a window is its first in row-major order among equals and its last NaN, as in PyTorch.
#pragma once
#include <cstdint>

namespace fastnas {

// Rows of an image and of the windows over them, at `stride` 1 or 2 inside a border of one pixel.
struct PoolRows {
  int64_t H, W, oh, ow, stride;
  int64_t first, last;  // windows: rows of the outputs that buffers hold
  int64_t top, bottom;  // pixels: rows of x that buffers hold, all that these windows have

  // The rows of x in a row of windows: all are held.
  int64_t begin(int64_t row) const { return row == 0 ? 0 : stride * row - 1; }
  int64_t end(int64_t row) const { return stride * row + 2 < H ? stride * row + 2 : H; }
};

// Buffers hold vectors of L lanes: rows of W or ow pixels, one after the other.
template <typename A>
struct PoolKernels {
  // max and avg from x. best and sum: a row of outputs for every row of x.
  void (*pool)(const PoolRows& rows, const A* x, A* best, A* sum, A* max, A* avg);

  // dx, from row0 to row1 of the image, from the gradients of both outputs, of which one may be null; x is read for
  // that of max alone. best and column: a row of ow + 2 for every row of x; choice: a row of ow + 2 for every row of
  // windows; spread: two rows of ow + 2. The first and the last pixel of rows of ow + 2 are -1 in column, 0 in spread.
  void (*gradient)(const PoolRows& rows, int64_t row0, int64_t row1, const A* x, const A* g_max,
                   const A* g_avg, A* best, A* column, A* choice, A* spread, A* dx);
};

// The table of the instruction set that this process runs with.
template <typename A>
const PoolKernels<A>& pool_kernels();

}  // namespace fastnas
