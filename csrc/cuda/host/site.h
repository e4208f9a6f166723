// SPDX-License-Identifier: Apache-2.0
// Where in the source an access or a collective stands: the default of the last argument of every primitive, so that it is the
// place of the call.
#pragma once

#include <cstring>
#include <source_location>

namespace dien_ops::cuda {

struct Site {
    constexpr Site(std::source_location at = std::source_location::current()) : at(at) {}

    std::source_location at;
};

inline bool operator==(const Site& a, const Site& b) {
    return a.at.line() == b.at.line() && a.at.column() == b.at.column() &&
           (a.at.file_name() == b.at.file_name() || std::strcmp(a.at.file_name(), b.at.file_name()) == 0);
}

}  // namespace dien_ops::cuda
