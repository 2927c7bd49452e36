// SPDX-License-Identifier: Apache-2.0
// What the tests steer: the seed of the random order, and whether torch's CPU memory is guarded and poisoned.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "faults.h"
#include "simt.h"

namespace simt {
void* guarded_alloc(size_t size);
void guarded_free(void* data);
std::string take_damage();
}  // namespace simt

namespace {

struct Guarded final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* data = n ? simt::guarded_alloc(n) : nullptr;
    TORCH_CHECK(n == 0 || data, "no memory for ", n, " bytes");
    return {data, data, &simt::guarded_free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &simt::guarded_free; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};

void guard(bool on) {
  static Guarded guarded;
  static c10::Allocator* const ordinary = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guarded : ordinary, 255);
}

}  // namespace

PYBIND11_MODULE(simt_kernels, m) {
  m.def("guard", &guard);
  m.def("take_damage", &simt::take_damage);
  m.def("set_seed", &simt::set_seed);
  m.def("set_narrow_limit", [](int64_t limit) { simt::narrow_limit = limit; });
  m.def("set_grid_limit", [](int64_t limit) { simt::grid_limit = limit; });
  m.def("launches", &simt::launches);
  m.def("run_fault", [](const std::string& name) {
    at::Tensor data = at::empty({16}, at::kFloat);
    const std::string said = simt::run_fault(name, static_cast<float*>(data.mutable_data_ptr()));
    return std::make_pair(said, static_cast<const float*>(data.const_data_ptr())[0]);
  });
}
