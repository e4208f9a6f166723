#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs a compilation by nvcc and keeps what it prints beside the object, for .ci/cuda_report.py: registers, stack and spills of
# each kernel. Warnings and errors are shown, ptxas's notes are not.
object=
previous=
for argument; do
    [ "$previous" = -o ] && object=$argument
    previous=$argument
done
"$@" 2> "$object.ptxas"
status=$?
grep -v -e '^ptxas info ' -e '^ *[0-9]* bytes stack frame,' "$object.ptxas" >&2
exit $status
