// SPDX-License-Identifier: Apache-2.0
#include "range.h"

#include <type_traits>

#include "capability.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// GCC 12 warns of the "any value will do" operands inside its own AVX-512 intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define FASTNAS_BODY "range.inc.h"
#include "isa.h"

namespace fastnas {

template <typename T>
const RangeKernels<T>& range_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512:
      return avx512::kRangeKernels<T>;
    case Isa::kAvx2:
      return avx2::kRangeKernels<T>;
    case Isa::kBaseline:
      break;
  }
#endif
  return baseline::kRangeKernels<T>;
}

template const RangeKernels<float>& range_kernels<float>();
template const RangeKernels<double>& range_kernels<double>();
template const RangeKernels<BFloat16>& range_kernels<BFloat16>();
template const RangeKernels<Half>& range_kernels<Half>();

}  // namespace fastnas
