// SPDX-License-Identifier: Apache-2.0
// Kernels with one fault each, to show that the harness finds it. Written like those of csrc/cuda, without PyTorch.
#include <cuda_runtime.h>

#include "faults.h"

namespace simt {

namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void none(float* data) {
  FASTNAS_SHARED(float, shared, 64);
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = static_cast<float>(t);
  __syncthreads();
  float sum = shared[63 - t];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(kAll, sum, offset);
  if (t == 0) data[0] = sum;  // the threads 32 to 63: 1520
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

__global__ void shuffle_outside_mask(float* data) {
  data[threadIdx.x % 4] = __shfl_xor_sync(0xffffu, 1.0f, 1);
}

__global__ void shuffle_not_reached(float* data) {
  if (threadIdx.x % 2 == 0) data[0] = __shfl_xor_sync(kAll, 1.0f, 2);
}

__global__ void shuffle_from_outside(float* data) {
  if (threadIdx.x < 16) data[threadIdx.x % 4] = __shfl_xor_sync(0xffffu, 1.0f, 16);
}

__global__ void shared_not_written(float* data) {
  FASTNAS_SHARED(float, shared, 64);
  if (threadIdx.x != 5) shared[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x % 4] = shared[threadIdx.x];
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
  data[threadIdx.x % 4] = shared[63 - threadIdx.x];
}

__global__ void shared_reused_without_barrier(float* data) {
  FASTNAS_SHARED(float, shared, 64);
  shared[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x % 4] = shared[63 - threadIdx.x];
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

}  // namespace

const std::vector<Fault>& faults() {
  static const std::vector<Fault> all = {
      {"none", none},
      {"barrier_not_reached", barrier_not_reached},
      {"barriers_apart", barriers_apart},
      {"shuffle_outside_mask", shuffle_outside_mask},
      {"shuffle_not_reached", shuffle_not_reached},
      {"shuffle_from_outside", shuffle_from_outside},
      {"shared_not_written", shared_not_written},
      {"shared_out_of_bounds", shared_out_of_bounds},
      {"shared_written_twice", shared_written_twice},
      {"shared_without_barrier", shared_without_barrier},
      {"shared_reused_without_barrier", shared_reused_without_barrier},
      {"read_past_the_end", read_past_the_end},
      {"write_past_the_end", write_past_the_end},
      {"write_before_the_start", write_before_the_start},
  };
  return all;
}

std::string run_fault(const std::string& name, float* data) {
  for (const Fault& fault : faults())
    if (name == fault.name) {
      FASTNAS_LAUNCH(fault.kernel, 1, 64, nullptr, data);
      return error();
    }
  return "no such kernel";
}

}  // namespace simt
