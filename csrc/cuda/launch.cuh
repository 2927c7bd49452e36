// SPDX-License-Identifier: Apache-2.0
// Launching kernels. A launcher takes plain pointers, sizes and a stream and returns the launch's error, so a .cu file
// knows nothing of PyTorch; the .cpp beside it does.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "plan.h"

// Blocks a grid takes in x. A small value in a test build shows what happens beyond.
#ifndef FASTNAS_GRID_LIMIT
#define FASTNAS_GRID_LIMIT ((int64_t{1} << 31) - 1)
#endif

// A header that stands in for CUDA's (to run kernels on the host) brings its own of these.
#ifndef FASTNAS_LAUNCH
#define FASTNAS_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel)<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define FASTNAS_SHARED(type, name, count) __shared__ type name[count]

namespace fastnas::cuda {

// To global memory, in one instruction.
__device__ inline void store_whole(uint4* p, uint4 words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)),
               "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}
__device__ inline void store_whole(uint2* p, uint2 words) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(p)), "r"(words.x),
               "r"(words.y)
               : "memory");
}

}  // namespace fastnas::cuda
#endif

namespace fastnas::cuda {

// Multiprocessors of the current device; 0 if CUDA fails (the launch then reports why).
inline int multiprocessors() {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  count = known[device].load(std::memory_order_relaxed);
  if (count > 0) return count;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  known[device].store(count, std::memory_order_relaxed);
  return count;
}

// Blocks for kernels that walk tiles in a grid-stride loop and add nothing up across them: a few rounds of full
// multiprocessors, so that a thread's set-up is paid once.
inline unsigned grid_for(int64_t tiles) {
  const int64_t most = int64_t{16} * (multiprocessors() > 0 ? multiprocessors() : 1);
  return static_cast<unsigned>(tiles < 1 ? 1 : tiles < most ? tiles : most);
}

// For kernels that have a block, or a thread, for each item: what a grid cannot hold is an error of the launch, where a
// narrower number would lose blocks in silence.
inline bool fits_grid(int64_t blocks) { return blocks <= FASTNAS_GRID_LIMIT; }

template <typename T>
struct Type {
  using type = T;
};

template <int N>
struct Int {
  static constexpr int value = N;
};

}  // namespace fastnas::cuda
