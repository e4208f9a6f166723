// SPDX-License-Identifier: Apache-2.0
// Which instruction set the kernels run with: every kernel file is compiled once per capability, one is chosen at run time.
#pragma once

#include <type_traits>
#include <utility>

namespace dien_ops::cpu {

enum class Capability { baseline, avx2, avx512 };

// The best capability of this machine, or the one that the environment variable DIEN_OPS_CPU_CAPABILITY names
// ("baseline", "avx2", "avx512"). Decided once per process. Throws std::runtime_error where that variable names an unknown
// capability or one that this machine or this build lacks.
Capability capability();

const char* name(Capability capability);

// Calls f with the chosen capability as a compile-time constant: with_capability([&](auto c) { kernel<c()>(...); }).
template <typename F>
void with_capability(F&& f) {
    switch (capability()) {
#ifdef DIEN_OPS_X86
        case Capability::avx512:
            return f(std::integral_constant<Capability, Capability::avx512>{});
        case Capability::avx2:
            return f(std::integral_constant<Capability, Capability::avx2>{});
#endif
        default:
            return f(std::integral_constant<Capability, Capability::baseline>{});
    }
}

}  // namespace dien_ops::cpu
