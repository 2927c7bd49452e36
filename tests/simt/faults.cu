// SPDX-License-Identifier: Apache-2.0
// Kernels with one fault each, to show that the harness finds it, and some without. Written like those of csrc/cuda, without PyTorch.
#include <cuda_runtime.h>

#include "faults.h"

namespace simt {

namespace {

constexpr unsigned kAll = 0xffffffffu;

// By one thread, so that this is no fault.
__device__ void keep(float* data, float x) {
  if (threadIdx.x == 0) data[0] = x;
}

__global__ void none(float* data) {
  FASTNAS_SHARED(float, shared, 64);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = static_cast<float>(t);
  __syncthreads();
  float sum = shared[63 - t];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(kAll, sum, offset);
  if (t == 0) data[0] = sum;  // the threads 32 to 63: 1520
}

__global__ void votes(float* data) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  const unsigned odd = __ballot_sync(kAll, lane % 2);
  const bool any = __any_sync(kAll, lane == 7), none = __any_sync(kAll, lane == 32);
  const bool all = __all_sync(kAll, lane < 32), most = __all_sync(kAll, lane < 31);
  const int before = __shfl_up_sync(kAll, lane, 3);
  bool few = true;
  if (lane < 4) few = __ballot_sync(0xfu, lane == 2) == 4u;
  const bool right = odd == 0xaaaaaaaau && any && !none && all && !most && few &&
                     before == (lane < 3 ? lane : lane - 3);
  const bool everywhere = __all_sync(kAll, right);
  if (t == 0) data[0] = everywhere ? 1.0f : 0.0f;
}

__global__ void barrier_not_reached(float*) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void barriers_apart(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void shuffle_outside_mask(float* data) { keep(data, __shfl_xor_sync(0xffffu, 1.0f, 1)); }

__global__ void shuffle_not_reached(float* data) {
  if (threadIdx.x % 2 == 0) data[0] = __shfl_xor_sync(kAll, 1.0f, 2);
}

__global__ void shuffle_from_outside(float* data) {
  if (threadIdx.x < 16) keep(data, __shfl_xor_sync(0xffffu, 1.0f, 16));
}

__global__ void vote_outside_mask(float* data) {
  if (__any_sync(0xffffu, true) && threadIdx.x == 0) data[0] = 1;
}

__global__ void vote_not_reached(float* data) {
  if (threadIdx.x % 2 == 0 && __all_sync(kAll, true) && threadIdx.x == 0) data[0] = 1;
}

__global__ void shared_not_written(float* data) {
  FASTNAS_SHARED(float, shared, 64);
  if (threadIdx.x != 5) shared[threadIdx.x] = 1;
  __syncthreads();
  keep(data, shared[threadIdx.x]);
}

__global__ void shared_out_of_bounds(float*) {
  FASTNAS_SHARED(float, shared, 63);
  shared[threadIdx.x] = 1;
}

__global__ void shared_written_twice(float*) {
  FASTNAS_SHARED(float, shared, 64);
  shared[threadIdx.x / 2] = 1;
}

__global__ void shared_without_barrier(float* data) {
  FASTNAS_SHARED(float, shared, 64);
  shared[threadIdx.x] = 0;
  __syncthreads();
  shared[threadIdx.x] = 1;
  keep(data, shared[63 - threadIdx.x]);
}

__global__ void shared_reused_without_barrier(float* data) {
  FASTNAS_SHARED(float, shared, 64);
  shared[threadIdx.x] = 1;
  __syncthreads();
  keep(data, shared[63 - threadIdx.x]);
  shared[threadIdx.x] = 2;
}

__global__ void read_past_the_end(float* data) {
  if (threadIdx.x == 3) data[0] = data[16];
}

__global__ void write_past_the_end(float* data) {
  if (threadIdx.x == 3) data[16] = 1;
}

__global__ void write_before_the_start(float* data) {
  if (threadIdx.x == 3) data[-1] = 1;
}

__global__ void read_before_the_start(float* data) {
  if (threadIdx.x == 3) data[0] = data[-1];
}

struct alignas(16) Four {
  float v[4];
};

__global__ void misaligned(float* data) {
  if (threadIdx.x == 3) *reinterpret_cast<Four*>(data + 2) = {};
}

__global__ void written_twice(float* data) { data[threadIdx.x % 16] = 1; }

__global__ void written_by_two_blocks(float* data) {
  if (threadIdx.x == 3) data[0] = 1;
}

__global__ void read_without_barrier(float* data) {
  if (threadIdx.x == 0) data[3] = 1;
  if (threadIdx.x == 1) data[4] = data[3];
}

__global__ void read_after_a_barrier(float* data) {
  if (threadIdx.x == 0) data[3] = 1;
  __syncthreads();
  if (threadIdx.x == 1) data[0] = data[3];
  __syncthreads();
  if (threadIdx.x == 2) data[3] = 5;
}

}  // namespace

const std::vector<Fault>& faults() {
  static const std::vector<Fault> all = {
      {"none", none},
      {"votes", votes},
      {"read_after_a_barrier", read_after_a_barrier},
      {"barrier_not_reached", barrier_not_reached},
      {"barriers_apart", barriers_apart},
      {"shuffle_outside_mask", shuffle_outside_mask},
      {"shuffle_not_reached", shuffle_not_reached},
      {"shuffle_from_outside", shuffle_from_outside},
      {"vote_outside_mask", vote_outside_mask},
      {"vote_not_reached", vote_not_reached},
      {"shared_not_written", shared_not_written},
      {"shared_out_of_bounds", shared_out_of_bounds},
      {"shared_written_twice", shared_written_twice},
      {"shared_without_barrier", shared_without_barrier},
      {"shared_reused_without_barrier", shared_reused_without_barrier},
      {"read_past_the_end", read_past_the_end},
      {"write_past_the_end", write_past_the_end},
      {"write_before_the_start", write_before_the_start},
      {"read_before_the_start", read_before_the_start},
      {"misaligned", misaligned},
      {"written_twice", written_twice},
      {"written_by_two_blocks", written_by_two_blocks, 2},
      {"read_without_barrier", read_without_barrier},
  };
  return all;
}

std::string run_fault(const std::string& name, float* data) {
  for (const Fault& fault : faults())
    if (name == fault.name) {
      FASTNAS_LAUNCH(fault.kernel, fault.blocks, 64, nullptr, data);
      return error();
    }
  return "no such kernel";
}

}  // namespace simt
