// SPDX-License-Identifier: Apache-2.0
// The Python module fastnas._C. Importing it registers the ops (ops.cpp and the files of cpu/ and
// cuda/ do that themselves); what it holds is only what this binary was built for and with.

#include <ATen/Version.h>
#include <pybind11/pybind11.h>

// setup.py passes the facts; an empty CUDA version means that there are no CUDA kernels.
PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of fastnas: importing this registers torch.ops.fastnas.*";
  m.attr("torch_version") = FASTNAS_TORCH_VERSION;
  m.attr("cuda_version") = FASTNAS_CUDA_VERSION;
  m.attr("cuda_archs") = FASTNAS_CUDA_ARCHS;
  m.attr("cuda_missing_reason") = FASTNAS_CUDA_MISSING_REASON;
  m.def("cpu_capability", &at::get_cpu_capability,
        "The CPU instruction set torch runs with (ATEN_CPU_CAPABILITY lowers it).");
}
