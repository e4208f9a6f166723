#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Code compiled for AVX2 or AVX-512 must not be linked into what runs on every processor: each symbol that the linker could
# share between object files (weak) must belong to one instruction set, by its template argument. Needs a finished build.
set -euo pipefail
cd "$(dirname "$0")/.."
objects=$(find build -path '*-sanitize0/*dien_ops_kernels_*' -name '*.o')
[ -n "$objects" ] || { echo "no kernel objects under build/: build first" >&2; exit 1; }
for object in $objects; do
    shared=$(nm --demangle "$object" | grep -E ' [WVu] ' | grep -vE 'dien_ops::cpu::Capability\)[0-9]|DW\.ref\.' || true)
    if [ -n "$shared" ]; then
        printf '%s shares code between instruction sets:\n%s\n' "$object" "$shared" >&2
        exit 1
    fi
done
echo "no code is shared between instruction sets in $(echo "$objects" | wc -l) kernel objects"
