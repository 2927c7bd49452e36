// SPDX-License-Identifier: Apache-2.0
// The instruction set that kernels of isa.h run with here: torch's own choice, which ATEN_CPU_CAPABILITY lowers.
#pragma once
#include <ATen/Version.h>

#include <string>

namespace fastnas {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa isa() {
  static const Isa chosen = [] {
    const std::string capability = at::get_cpu_capability();
    if (capability == "AVX512") return Isa::kAvx512;
    if (capability == "AVX2") return Isa::kAvx2;
    return Isa::kBaseline;
  }();
  return chosen;
}

}  // namespace fastnas
