// SPDX-License-Identifier: Apache-2.0
// The Python module dien_ops._C: what was built and what this machine runs. No tensors pass through here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/capability.h"

PYBIND11_MODULE(_C, m) {
    m.doc() = "Build information of dien_ops.";
    m.attr("version") = DIEN_OPS_VERSION;
    m.attr("built_with_torch") = DIEN_OPS_TORCH_VERSION;
    m.attr("compiler") = DIEN_OPS_COMPILER;
    m.attr("cpu_capabilities") = std::vector<std::string>{
#ifdef DIEN_OPS_X86
        "baseline", "avx2", "avx512"
#else
        "baseline"
#endif
    };
    m.attr("cuda_architectures") = std::vector<std::string>{DIEN_OPS_CUDA_ARCHITECTURES};  // sm_*: code, compute_*: PTX
    m.attr("cuda_summary") = DIEN_OPS_CUDA_SUMMARY;  // the same in words, or why there are none
    m.def(
        "cpu_capability", [] { return dien_ops::cpu::name(dien_ops::cpu::capability()); },
        "The instruction set the CPU kernels run with; RuntimeError where DIEN_OPS_CPU_CAPABILITY names none that is usable.");
}
