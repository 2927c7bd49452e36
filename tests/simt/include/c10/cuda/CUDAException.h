// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                                            \
  do {                                                                                  \
    const cudaError_t result_ = (call);                                                 \
    TORCH_CHECK(result_ == cudaSuccess, "CUDA error ", static_cast<int>(result_), ": ", \
                simt::error());                                                         \
  } while (false)
