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
fewest=4  # gradient, weight, the rule's state and what lazy decay keeps
for object in $objects; do
    objdump -d -C --no-show-raw-insn "$object" | awk -v fewest=$fewest -v object="$object" '
        /^[0-9a-f]+ </ { name = $0; updates = /^[0-9a-f]+ <void dien_ops::cpu::update_rows</ && !/cold/; if (updates) found[name] = 0 }
        updates && /prefetch/ { ++found[name] }
        END {
            for (name in found) {
                ++functions
                if (found[name] < fewest) { print object ": " found[name] " prefetches, expected " fewest " or more, in " name; bad = 1 }
            }
            if (functions == 0) { print object ": no update_rows"; bad = 1 }
            exit bad
        }' >&2
done
for object in $(find build -path '*-sanitize0/*' \( -path '*kernels*/gru_*.cpp.o' -o -path '*dien_ops_cpu.dir/csrc/ops/embedding.cpp.o' \)); do
    objdump -d "$object" | awk '/prefetch/ { found = 1 } END { exit !found }' || { echo "$object: no prefetch" >&2; exit 1; }
done
echo "rows are fetched ahead in all updates of $(echo "$objects" | wc -l) kernel objects"
