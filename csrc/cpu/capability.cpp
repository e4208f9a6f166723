// SPDX-License-Identifier: Apache-2.0
#include "cpu/capability.h"

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace dien_ops::cpu {
namespace {

bool is_usable(Capability capability) {
    switch (capability) {
        case Capability::baseline:
            return true;
#ifdef DIEN_OPS_X86
        case Capability::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Capability::avx512:
            return is_usable(Capability::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
        default:
            return false;
    }
}

constexpr std::array kBestFirst = {Capability::avx512, Capability::avx2, Capability::baseline};

Capability choose() {
    const char* wanted = std::getenv("DIEN_OPS_CPU_CAPABILITY");
    for (const Capability candidate : kBestFirst) {
        if (wanted == nullptr || *wanted == '\0') {
            if (is_usable(candidate)) return candidate;
        } else if (std::string_view(wanted) == name(candidate)) {
            if (is_usable(candidate)) return candidate;
            throw std::runtime_error("DIEN_OPS_CPU_CAPABILITY=" + std::string(wanted) +
                                     " is not supported by this processor or not part of this build");
        }
    }
    throw std::runtime_error("DIEN_OPS_CPU_CAPABILITY must be one of baseline, avx2, avx512; got " + std::string(wanted));
}

}  // namespace

Capability capability() {
    static const Capability chosen = choose();
    return chosen;
}

const char* name(Capability capability) {
    switch (capability) {
        case Capability::avx512:
            return "avx512";
        case Capability::avx2:
            return "avx2";
        default:
            return "baseline";
    }
}

}  // namespace dien_ops::cpu
