#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Rows that lie anywhere in a table must be fetched ahead. GCC takes a function that only prefetches for one without effect and drops
# calls of it that it has not inlined, which no test of results can see: an update then takes twice as long. Needs a finished build.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(uname -m)" != x86_64 ]; then
    echo "the machine code of $(uname -m) is not looked at for prefetches"
    exit 0
fi
objects=$(find build -path '*-sanitize0/*dien_ops_kernels_*' -name 'embedding.cpp.o')
[ -n "$objects" ] || { echo "no objects of csrc/cpu/embedding.cpp under build/: build first" >&2; exit 1; }
for object in $objects; do
    objdump -d -C --no-show-raw-insn "$object" | awk -v object="$object" '
        BEGIN {
            fewest["update_rows"] = 6  # weight, state, what lazy decay keeps: the pages, and then the rows
            fewest["sum_rows"] = 1     # gradient
        }
        /^[0-9a-f]+ </ {
            kernel = ""
            for (k in fewest) if ($0 ~ "^[0-9a-f]+ <void dien_ops::cpu::" k "<" && !/cold/) kernel = k
            name = $0
            if (kernel != "") { found[name] = 0; kernel_of[name] = kernel }
        }
        kernel != "" && /prefetch/ { ++found[name] }
        END {
            for (name in found) {
                ++functions[kernel_of[name]]
                needed = fewest[kernel_of[name]]
                if (found[name] < needed) { print object ": " found[name] " prefetches, expected " needed " or more, in " name; bad = 1 }
            }
            for (k in fewest) if (!functions[k]) { print object ": no " k; bad = 1 }
            exit bad
        }' >&2
done
others=$(find build -path '*-sanitize0/*' \( -path '*kernels*/gru_*.cpp.o' -o -path '*dien_ops_cpu.dir/csrc/ops/embedding.cpp.o' \))
[ -n "$others" ] || { echo "no objects of csrc/cpu/gru_*.cpp and csrc/ops/embedding.cpp under build/" >&2; exit 1; }
for object in $others; do
    objdump -d "$object" | awk '/prefetch/ { found = 1 } END { exit !found }' || { echo "$object: no prefetch" >&2; exit 1; }
done
echo "rows are fetched ahead in all updates of $(echo "$objects" | wc -l) kernel objects"
