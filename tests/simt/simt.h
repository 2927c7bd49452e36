// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the host, to test them where there is no GPU: every thread of a block is a fiber, blocks and
// the threads between two barriers run in random order, and what would be undefined on a GPU is an error here:
//   - barriers that some threads of a block do not reach, or reach at another line;
//   - shuffles and votes by lanes outside their mask, from lanes outside it, or that not all of the mask reach;
//   - shared memory read before it is written, or outside its bounds;
//   - global memory outside an allocation, or at an address that is no multiple of what is moved (memory.cpp);
//   - either touched by two threads with no barrier between, one of them writing.
// The headers in include/ put this in the place of CUDA's.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

// The thread that runs.
struct Position {
  bool running = false;  // else what follows means nothing
  uint32_t launch = 0, block = 0, thread = 0,
           epoch = 0;  // epoch: barriers that the block has passed
};
inline Position position;

// Runs a kernel; false, with the reason in error(), if it did something undefined. `launcher` is the whole name of the
// function that launches, in which the kernel's types are.
bool launch(const char* file, const char* launcher, dim3 grid, dim3 block,
            const std::function<void()>& thread);
const char* error();
void set_seed(uint64_t seed);
int64_t launches();  // so far

// Below it, kernels divide by multiplication (csrc/cuda/plan.h); lowered, small tensors go the way of huge ones.
inline int64_t narrow_limit = int64_t{1} << 31;
// More blocks than this are an error of the launch; lowered, likewise.
inline int64_t grid_limit = (int64_t{1} << 31) - 1;

// Ends the launch with the kernel, block and thread in front of the reason. For the functions below.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void barrier(int line);
uint64_t shuffle(unsigned mask, uint64_t value, int source_lane, int line);
unsigned ballot(unsigned mask, bool vote, int line);
int lane();

// What happened to one element of a shared array since the last barrier.
struct Cell {
  bool written = false;
  int writer = -1, reader = -1;  // -1: none, -2: several
  uint64_t write_epoch = 0, read_epoch = 0;
};

struct Region {
  std::vector<unsigned char> bytes;
  std::vector<Cell> cells;
};

// The array that this declaration has in the running block.
Region& region(const void* declaration, size_t count, size_t size);
void note_read(Cell& cell, const char* name, size_t index);
void note_write(Cell& cell, const char* name, size_t index);

// A shared array whose elements know who touches them.
template <typename T>
class Shared {
 public:
  Shared(Region& region, const char* name) : region_(&region), name_(name) {}

  class Element {
   public:
    Element(const Shared& array, size_t index) : array_(array), index_(index) {}
    operator T() const {
      note_read(array_.cell(index_), array_.name_, index_);
      T value;
      std::memcpy(&value, array_.region_->bytes.data() + index_ * sizeof(T), sizeof(T));
      return value;
    }
    const Element& operator=(const T& value) const {
      note_write(array_.cell(index_), array_.name_, index_);
      std::memcpy(array_.region_->bytes.data() + index_ * sizeof(T), &value, sizeof(T));
      return *this;
    }

   private:
    const Shared& array_;
    size_t index_;
  };

  Element operator[](int64_t index) const {
    if (index < 0 || static_cast<size_t>(index) >= region_->cells.size())
      fail("shared array %s has %zu elements, but element %lld was touched", name_,
           region_->cells.size(), static_cast<long long>(index));
    return Element(*this, static_cast<size_t>(index));
  }

 private:
  Cell& cell(size_t index) const { return region_->cells[index]; }

  Region* region_;
  const char* name_;
};

template <typename T>
T exchange(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define __syncthreads() simt::barrier(__LINE__)
#define __syncwarp(...) simt::shuffle(0xffffffffu, 0, simt::lane(), __LINE__)
// A source beyond the warp's end is the lane itself, as on a GPU.
#define __shfl_sync(mask, value, source) simt::exchange(mask, value, (source) & 31, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  simt::exchange(mask, value, simt::lane() ^ (bits), __LINE__)
#define __shfl_down_sync(mask, value, delta)                                                       \
  simt::exchange(mask, value, simt::lane() + (delta) < 32 ? simt::lane() + (delta) : simt::lane(), \
                 __LINE__)

#define __shfl_up_sync(mask, value, delta)                                                    \
  simt::exchange(mask, value, simt::lane() < (delta) ? simt::lane() : simt::lane() - (delta), \
                 __LINE__)
#define __ballot_sync(mask, vote) simt::ballot(mask, (vote) != 0, __LINE__)
#define __any_sync(mask, vote) (__ballot_sync(mask, vote) != 0)
#define __all_sync(mask, vote) (__ballot_sync(mask, !(vote)) == 0)

#define FASTNAS_NARROW_LIMIT simt::narrow_limit
#define FASTNAS_GRID_LIMIT simt::grid_limit
#define FASTNAS_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream),                                       \
   simt::launch(__FILE__, __PRETTY_FUNCTION__, grid, block, [&] { (kernel)(__VA_ARGS__); }))
#define FASTNAS_SHARED(type, name, count)   \
  static const char name##_declaration = 0; \
  const simt::Shared<type> name(simt::region(&name##_declaration, count, sizeof(type)), #name)

namespace fastnas::cuda {

inline void store_whole(uint2* p, uint2 words) { *p = words; }
inline void store_whole(uint4* p, uint4 words) { *p = words; }

}  // namespace fastnas::cuda
