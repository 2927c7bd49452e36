// SPDX-License-Identifier: Apache-2.0
#include "pools.h"

#include <type_traits>

#include "capability.h"
#include "scalar_types.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// GCC 12 warns of the "any value will do" operands inside its own AVX-512 intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define FASTNAS_BODY "pools.inc.h"
#include "isa.h"

namespace fastnas {

template <typename A>
const PoolKernels<A>& pool_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512:
      return avx512::kPoolKernels<A>;
    case Isa::kAvx2:
      return avx2::kPoolKernels<A>;
    case Isa::kBaseline:
      break;
  }
#endif
  return baseline::kPoolKernels<A>;
}

template const PoolKernels<float>& pool_kernels<float>();
template const PoolKernels<double>& pool_kernels<double>();

}  // namespace fastnas
