// SPDX-License-Identifier: Apache-2.0
#include "planes.h"

#include <algorithm>
#include <utility>

#include "capability.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// GCC 12 warns of the "any value will do" operands inside its own AVX-512 intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define FASTNAS_BODY "planes.inc.h"
#include "isa.h"

namespace fastnas {

template <typename T>
const PlaneKernels<T>& plane_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512:
      return avx512::kPlaneKernels<T>;
    case Isa::kAvx2:
      return avx2::kPlaneKernels<T>;
    case Isa::kBaseline:
      break;
  }
#endif
  return baseline::kPlaneKernels<T>;
}

template const PlaneKernels<float>& plane_kernels<float>();
template const PlaneKernels<double>& plane_kernels<double>();
template const PlaneKernels<BFloat16>& plane_kernels<BFloat16>();
template const PlaneKernels<Half>& plane_kernels<Half>();

}  // namespace fastnas
