// SPDX-License-Identifier: Apache-2.0
// What the kernels on tiles of depthwise convolutions share: which tile and strip a thread has, how a tile is brought
// into shared memory, and what the taps of a strip multiply.
#pragma once
#include "depthwise_tile.h"
#include "vec.cuh"

namespace fastnas::cuda {

// Elements from one image, channel, row or pixel to the next. All but the first fit 32 bits (plan_tile).
struct Strides {
  int64_t image;
  int channel, row, pixel;

  __device__ int64_t at(int64_t n, int c, int y, int x) const {
    return n * image + (c * channel + y * row + x * pixel);
  }
};

inline Strides strides_of(const Convolutions& c, int64_t height, int64_t width) {
  const int C = static_cast<int>(c.C), h = static_cast<int>(height), w = static_cast<int>(width);
  if (c.columns) return {c.C * height * width, 1, w * C, C};
  return {c.C * height * width, h * w, w, 1};
}

// Where a tile begins: its first image and channel, and its first output.
struct Corner {
  int64_t image;
  int channel, y, x;
};

__device__ inline Corner corner_of(const Tile& t, int64_t tile, int64_t chunk) {
  const int64_t row = t.by_across.quotient(tile), group = t.by_down.quotient(row);
  return {group << t.log_images, static_cast<int>(chunk) << t.log_lanes,
          static_cast<int>(row - group * t.down) << t.log_height,
          static_cast<int>(tile - row * t.across) << t.log_width};
}

// The strip of a thread: its channel and image, and its first output within the tile.
struct Strip {
  int lane, image, y, x;
  bool valid;
};

__device__ inline Strip strip_of(const Tile& t) {
  int at = static_cast<int>(threadIdx.x);
  Strip s{};
  s.lane = at & (t.lanes() - 1);
  at >>= t.log_lanes;
  s.x = at & (t.width() - 1);
  at >>= t.log_width;
  const int log_strips = t.log_height - kLogStrip;
  s.y = (at & ((1 << log_strips) - 1)) << kLogStrip;
  s.image = at >> log_strips;
  s.valid = s.image < t.images();
  return s;
}

// What a tile reads, into shared memory: rows x columns pixels from (y, x) on, height x width of which there are, or
// fewer by `shift` powers of two with zeros between them; zeros around.
struct Window {
  int y, x, rows, columns, shift;
  int height, width;
  int source;  // whose BatchNorm and ReLU come before: a source, or a convolution for its own; -1: none
};

// scale x + shift of a channel of a source; x where there is no such table, or it is not to be read.
template <typename A>
struct Scaling {
  A scale = 1, shift = 0;

  __device__ Scaling(const Convolutions& c, bool reads, int source, int64_t channel) {
    if (!reads || !c.scale) return;
    const int64_t at = source * c.pitch + channel;
    scale = static_cast<const A*>(c.scale)[at];
    shift = static_cast<const A*>(c.shift)[at];
  }
  __device__ A of(A x) const { return scale * x + shift; }
};

// Loads that a thread has on their way at once: one after the other they would be all that a tile waits for.
constexpr int kLoads = 6;

// Which rows of a tile's images a thread brings: rows of `side` threads stand side by side, as many as fit a block.
struct RowShare {
  int first_image, image_step, first_row, row_step;
  bool works;

  __device__ RowShare(const Tile& t, int row, int fit) {
    const int images = t.images();
    const bool all = fit >= images;  // rows of all images at once
    first_image = row & (images - 1);
    image_step = all ? images : fit;
    first_row = all ? row >> t.log_images : 0;
    row_step = all ? fit >> t.log_images : 1;
    works = all ? row < row_step << t.log_images : row < fit;
  }
};

template <typename T, typename Shared>
__device__ inline void bring(const Convolutions& c, const Tile& t, const Strides& strides,
                             const Corner& corner, const Window& w, const T* source, Shared& tile) {
  using A = acc_type<T>;
  const int elements = w.columns << t.log_lanes, pitch = t.pitch << t.log_lanes;
  const int side = elements < kThreads ? elements : kThreads, zeros = (1 << w.shift) - 1;
  const int thread = static_cast<int>(threadIdx.x), in_row = thread / side;
  const RowShare share(t, in_row, kThreads / side);
  if (!share.works) return;
  const bool normed = w.source >= 0 && c.scale, relu = w.source >= 0 && c.relu;
  for (int e = thread - in_row * side; e < elements; e += side) {
    const int x = w.x + (e >> t.log_lanes), channel = corner.channel + (e & (t.lanes() - 1));
    const bool inside = x >= 0 && !(x & zeros) && (x >> w.shift) < w.width && channel < c.C;
    const Scaling<A> scaling(c, normed && inside, w.source, channel);
    for (int image = share.first_image; image < t.images(); image += share.image_step) {
      const bool exists = inside && corner.image + image < c.N;
      const T* column =
          source + (exists ? strides.at(corner.image + image, channel, 0, x >> w.shift) : 0);
      const int to = image * w.rows * pitch + e;
      for (int first = share.first_row; first < w.rows; first += kLoads * share.row_step) {
        A value[kLoads];
        unsigned there = 0;  // bit i: value[i] is a pixel's
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int row = first + i * share.row_step, y = w.y + row, at = y >> w.shift;
          value[i] = 0;
          // Rows above the first are beyond the last as well, as unsigned numbers.
          if (exists && row < w.rows && !(y & zeros) &&
              static_cast<unsigned>(at) < static_cast<unsigned>(w.height)) {
            value[i] = to_acc(column[at * strides.row]);
            there |= 1u << i;
          }
        }
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const int row = first + i * share.row_step;
          if (row >= w.rows) break;
          if (normed && (there >> i & 1u)) value[i] = scaling.of(value[i]);
          if (relu && value[i] <= 0) value[i] = 0;  // NaN stays
          tile[to + row * pitch] = value[i];
        }
      }
    }
  }
}

// f(Int<d>) with the dilation.
template <typename F>
__device__ inline void with_dilation(int dilation, F&& f) {
  static_assert(kMostDilation == 2, "one case each");
  if (dilation == 1) {
    f(Int<1>{});
  } else {
    f(Int<2>{});
  }
}

// f(Int<k>, Int<d>) for the k that the kernels serve.
template <typename F>
__device__ inline void with_kernel(int side, int dilation, F&& f) {
  if (side == 1) f(Int<1>{}, Int<1>{});
  if (side == 3) with_dilation(dilation, [&](auto d) { f(Int<3>{}, d); });
  if (side == 5) with_dilation(dilation, [&](auto d) { f(Int<5>{}, d); });
  if (side == 7) with_dilation(dilation, [&](auto d) { f(Int<7>{}, d); });
}

// What the taps in one column of a kernel multiply, for the outputs of a strip.
template <int K, int S, int D, typename A>
struct Column {
  static constexpr int kSpan = (kStrip - 1) * S + (K - 1) * D + 1;
  A value[kSpan];

  // Output 0's first tap reads tile[at].
  template <typename Shared>
  __device__ Column(const Shared& tile, int at, int row) {
#pragma unroll  // those that no tap uses are left out by the compiler
    for (int i = 0; i < kSpan; ++i) value[i] = tile[at + i * row];
  }

  // What output o's tap r multiplies.
  __device__ A of(int o, int r) const { return value[o * S + r * D]; }
};

// The convolutions of a source: `first` to `last`.
struct Range {
  int first, last;

  __device__ Range(const Convolutions& c, int source)
      : first(c.sources == 1 ? 0 : source), last(c.sources == 1 ? c.count : source + 1) {}
};

// Weights of one convolution for the channels of a tile: those of a tap side by side, kMostLanes from one to the next, so
// that the compiler knows where the taps are.
constexpr int kTileWeights = kMaxSide * kMaxSide * kMostLanes;

template <typename A, typename Shared>
__device__ inline void bring_weights(const Convolutions& c, const Tile& t, const Corner& corner,
                                     int i, Shared& weights) {
  const int taps = c.side[i] * c.side[i];
  for (int e = static_cast<int>(threadIdx.x); e < taps << t.log_lanes; e += kThreads) {
    const int lane = e & (t.lanes() - 1), tap = e >> t.log_lanes;
    const int64_t channel = corner.channel + lane;
    if (channel < c.C)
      weights[tap * kMostLanes + lane] =
          read_as<A>(c.weights[i], c.weight_dtype[i], channel * taps + tap);
  }
}

// Adds the taps of one convolution to the outputs of a strip; `at` is where the first of them reads its first tap. In an
// input gradient the kernel is turned around: its last tap is the first to be met.
template <int K, int S, int D, bool kTurned, typename A, typename Shared, typename Weights>
__device__ inline void add_taps(const Shared& tile, int at, int row, int pixel,
                                const Weights& weights, int lane, A (&sum)[kStrip]) {
#pragma unroll
  for (int j = 0; j < K; ++j) {
    const Column<K, S, D, A> column(tile, at + j * D * pixel, row);
#pragma unroll
    for (int r = 0; r < K; ++r) {
      const int tap = kTurned ? K * K - 1 - (r * K + j) : r * K + j;
      const A weight = weights[tap * kMostLanes + lane];
#pragma unroll
      for (int o = 0; o < kStrip; ++o) sum[o] += column.of(o, r) * weight;
    }
  }
}

}  // namespace fastnas::cuda
