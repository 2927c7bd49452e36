// SPDX-License-Identifier: Apache-2.0
// How depthwise convolutions are cut into tiles: a block brings what its outputs read, halo and all, into shared memory
// once, and every thread takes a strip of outputs one below the other, whose taps share what it loads from there.
#pragma once
#include "depthwise_group.h"

namespace fastnas::cuda {

constexpr int kLogStrip = 2, kStrip = 1 << kLogStrip;  // outputs of a thread
constexpr int kTileBytes = 24 << 10;  // of shared memory: several blocks fit a multiprocessor
constexpr int kMostLanes = 16;        // channels side by side
constexpr int kMostDilation = 2;      // beyond, a tile would be halo for the most part
constexpr int64_t kWeightBlocks =
    1024;  // of the gradients of weights: enough to fill the largest GPU

// Sizes of a tile are powers of two. In planes a tile is of one channel, in columns of `lanes` channels side by side;
// small images are stacked.
struct Tile {
  bool fits;
  int log_lanes, log_width, log_height, log_images;  // of its outputs
  int pad, pitch;  // of what is in shared memory: outermost tap, pixels from one row to the next
  int64_t across, down, groups,
      chunks;  // tiles side by side, below each other, of images, of channels

  Divider by_across, by_down, by_chunks;

  FASTNAS_HOST_DEVICE int lanes() const { return 1 << log_lanes; }
  FASTNAS_HOST_DEVICE int width() const { return 1 << log_width; }
  FASTNAS_HOST_DEVICE int height() const { return 1 << log_height; }
  FASTNAS_HOST_DEVICE int images() const { return 1 << log_images; }
  FASTNAS_HOST_DEVICE int64_t tiles() const { return across * down * groups; }  // of each chunk
};

inline int log_up(int64_t n) {
  int log = 0;
  while ((int64_t{1} << log) < n) ++log;
  return log;
}

// Tiles of height x width outputs an image, which read pixels `stride` apart. One that does not fit reaches too far.
inline Tile plan_tile(const Convolutions& c, int64_t height, int64_t width, int stride) {
  Tile t{};
  const int64_t most = int64_t{1} << 31;
  if (c.C * c.H * c.W >= most || c.C * c.oh * c.ow >= most) return t;  // of an image
  for (int i = 0; i < c.count; ++i) {
    const int64_t pad = int64_t{c.dilation[i]} * (c.side[i] / 2);
    if (c.side[i] > 1 && c.dilation[i] > kMostDilation) return t;
    if (pad > t.pad) t.pad = static_cast<int>(pad);
  }
  const auto rows = [&] { return (t.height() - 1) * stride + 1 + 2 * t.pad; };
  const auto set_pitch = [&] {
    t.pitch = (t.width() - 1) * stride + 1 + 2 * t.pad;
    // Threads of a warp that are in other rows of strips meet other banks (narrower tiles have no such pitch).
    if (!c.columns && t.log_width < 5 && t.log_width >= kLogStrip)
      while ((kStrip * stride * t.pitch - stride * t.width()) % 32) ++t.pitch;
  };
  const auto values = [&] {
    set_pitch();
    return int64_t{rows()} * t.pitch << (t.log_images + t.log_lanes);
  };
  t.log_lanes = c.columns ? log_up(c.C < kMostLanes ? c.C : kMostLanes) : 0;
  // As square as possible, in a block of one strip a thread.
  const int total = log_up(kThreads * kStrip) - t.log_lanes;
  const int wide = log_up(width), high = log_up(height > kStrip ? height : kStrip);
  t.log_height = kLogStrip;
  for (bool grows = true; grows && t.log_width + t.log_height < total;) {
    const bool wider = t.log_width < wide, higher = t.log_height < high;
    grows = wider || higher;
    if (wider && (t.log_width <= t.log_height || !higher)) {
      ++t.log_width;
    } else if (higher) {
      ++t.log_height;
    }
  }
  const int stacked = log_up(c.N), left = total - t.log_width - t.log_height;
  t.log_images = stacked < left ? stacked : left;
  const int64_t room = kTileBytes / static_cast<int64_t>(accumulator_size(c.dtype));
  while (values() > room) {
    if (t.log_images > 0) {
      --t.log_images;
    } else if (t.log_width > t.log_height) {
      --t.log_width;
    } else if (t.height() > kStrip) {
      --t.log_height;
    } else if (t.log_lanes > 0) {
      --t.log_lanes;
    } else {
      return t;
    }
  }
  t.across = ceil_div(width, t.width());
  t.down = ceil_div(height, t.height());
  t.groups = ceil_div(c.N, t.images());
  t.chunks = ceil_div(c.C, t.lanes());
  const auto divider = [&](int64_t d) {
    return Divider(d > 0 ? d : 1, t.tiles() * (t.chunks > 0 ? t.chunks : 1));
  };
  t.by_across = divider(t.across);
  t.by_down = divider(t.down);
  t.by_chunks = divider(t.chunks);
  t.fits = true;
  return t;
}

cudaError_t launch_tiled_convolutions(const Convolutions& c, const Tile& tile, const Outputs& to,
                                      cudaStream_t stream);
cudaError_t launch_tiled_input_gradients(const Convolutions& c, const Tile& tile,
                                         const OutputGradients& from, const InputGradients& to,
                                         const InputSums& sums, cudaStream_t stream);

// `parts` of `share` tiles.
cudaError_t launch_tiled_weight_gradients(const Convolutions& c, const Tile& tile, int64_t parts,
                                          int64_t share, const OutputGradients& from,
                                          const WeightGradients& to, cudaStream_t stream);

}  // namespace fastnas::cuda
