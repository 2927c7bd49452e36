// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <string>
#include <vector>

namespace simt {

struct Fault {
  const char* name;
  void (*kernel)(float*);
  unsigned blocks = 1;
};
const std::vector<Fault>& faults();

// Runs the kernel of that name on 16 floats with blocks of 64 threads; what the harness says of it, "" for nothing.
std::string run_fault(const std::string& name, float* data);

}  // namespace simt
