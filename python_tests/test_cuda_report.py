# SPDX-License-Identifier: Apache-2.0
"""The compile gate of the CUDA kernels, on what ptxas printed once (CUDA 13.0)."""

from __future__ import annotations

import shutil

import pytest

import cuda_report
from cuda_report import Kernel

UNIQUE = "41_GLOBAL__N__205bf7b3_4_t_cu_d51aa77d_4880"
CLEAN = f"_ZN8dien_ops4cuda{UNIQUE}5cleanINS_8BFloat16ELNS_4GateE1ELi4EEEvNS1_6ParamsE"
CHECKED = f"_ZN8dien_ops4cuda{UNIQUE}7checkedIfEEvNS1_6ParamsE"
FAIL = f"_ZN39_INTERNAL_205bf7b3_4_t_cu_d51aa77d_48808dien_ops4cuda{UNIQUE}4failEPKcll"
SPILLS = f"_ZN8dien_ops4cuda{UNIQUE}6spillsENS1_6ParamsE"
LOG = f"""\
t.cu(7): warning #177-D: function "dien_ops::cuda::<unnamed>::fail2" was declared but never referenced
ptxas info    : 188 bytes gmem, 72 bytes cmem[4]
ptxas info    : Compiling entry function '{CHECKED}' for 'sm_80'
ptxas info    : Function properties for {CHECKED}
    24 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers, 24 bytes cumulative stack size, 376 bytes cmem[0]
ptxas info    : Compile time = 1.514 ms
ptxas info    : Function properties for {FAIL}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '{CLEAN}' for 'sm_80'
ptxas info    : Function properties for {CLEAN}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 376 bytes cmem[0]
ptxas info    : 188 bytes gmem
ptxas info    : Compiling entry function '{SPILLS}' for 'sm_90a'
ptxas info    : Function properties for {SPILLS}
    248 bytes stack frame, 248 bytes spill stores, 312 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 248 bytes cumulative stack size, 256 bytes smem
"""

needs_binutils = pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt of binutils")


@needs_binutils
def test_every_kernel_is_read_with_its_gpu_registers_memory_and_spills():
    assert cuda_report.parse(LOG) == [
        Kernel("checked<float>", "sm_80", stack=24, spill_stores=0, spill_loads=0, registers=26),
        Kernel("fail", "sm_80", stack=0, spill_stores=0, spill_loads=0),  # a function, in its callers' registers
        Kernel("clean<BFloat16, (Gate)1, 4>", "sm_80", stack=0, spill_stores=0, spill_loads=0, registers=12),
        Kernel("spills", "sm_90a", stack=248, spill_stores=248, spill_loads=312, registers=32, shared=256),
    ]


@needs_binutils
def test_the_table_has_a_line_for_each_kernel():
    first, *lines = cuda_report.table(cuda_report.parse(LOG)).splitlines()
    assert first.split() == ["kernel", "for", "registers", "shared", "stack", "spill", "stores", "spill", "loads"]
    assert [line.split()[0] for line in lines] == ["checked<float>", "clean<BFloat16,", "fail", "spills"]
    assert lines[-1].split() == ["spills", "sm_90a", "32", "256", "248", "248", "312"]


def kernel(stack: int = 0, stores: int = 0, loads: int = 0) -> list[Kernel]:
    return [Kernel("sweep<float, 8>", "sm_80", stack, stores, loads, registers=255)]


def source(comment: str) -> dict[tuple[str, str], int]:
    return cuda_report.allowances(
        f"// About it.\n{comment}\ntemplate <typename T, int kRows>\nDIEN_OPS_KERNEL(256)\nvoid sweep(Params p) {{}}\n"
        f"DIEN_OPS_KERNEL(256)\nvoid other(Params p) {{}}\n"
    )


def test_a_kernel_that_neither_spills_nor_has_a_stack_frame_passes():
    assert cuda_report.excesses(kernel(), {}) == []


@pytest.mark.parametrize(
    "sizes, complaint",
    [
        ({"stack": 16, "stores": 16, "loads": 24}, "spills 24 bytes, allowed 0"),
        ({"stack": 16, "stores": 16, "loads": 8}, "spills 16 bytes, allowed 0"),
        ({"stack": 40}, "stack 40 bytes, allowed 0"),
    ],
)
def test_a_kernel_that_spills_or_has_a_stack_frame_is_named(sizes, complaint):
    assert cuda_report.excesses(kernel(**sizes), {}) == [f"sweep<float, 8> for sm_80: {complaint}"]


def test_a_comment_above_a_kernel_allows_spills_up_to_its_number():
    allowed = source("// spills allowed: 16 bytes (outside of the loop)")
    assert cuda_report.excesses(kernel(16, 16, 16), allowed) == []
    assert cuda_report.excesses(kernel(20, 20, 20), allowed) == [
        "sweep<float, 8> for sm_80: spills 20 bytes, allowed 16"
    ]


def test_spills_and_the_rest_of_the_stack_frame_are_allowed_apart():
    allowed = source("// spills allowed: 16 bytes (a)\n// stack allowed: 40 bytes (the message of require)")
    assert cuda_report.excesses(kernel(56, 16, 16), allowed) == []
    assert cuda_report.excesses(kernel(60, 16, 16), allowed) == [
        "sweep<float, 8> for sm_80: stack 44 bytes, allowed 40"
    ]


def test_a_comment_allows_nothing_to_the_kernel_after_the_next():
    assert source("// stack allowed: 40 bytes (why)") == {("sweep", "stack"): 40}


def test_an_allowance_needs_a_reason():
    assert source("// spills allowed: 16 bytes") == {}


def test_kernels_of_cub_are_shown_by_their_names_and_may_spill():
    name = cuda_report.short(
        "void cub::CUB_300001_SM_800_900::detail::radix_sort::DeviceRadixSortOnesweepKernel<cub::CUB_300001_SM_800_900::"
        "detail::radix::policy_hub<unsigned long>::Policy1000, (cub::CUB_300001_SM_800_900::SortOrder)0>(unsigned long*)"
    )
    assert name == "cub::DeviceRadixSortOnesweepKernel"
    assert cuda_report.excesses([Kernel(name, "sm_80", 40, 16, 16, registers=255)], {}) == []


# ------------------------------------------------------------------------------------------------ the kernels' text


@pytest.mark.parametrize(
    "line, what",
    [
        ('asm volatile("nop;");', "inline assembly"),
        ("sweep<<<grid, 128>>>(p);", "a launch"),
        ("__shared__ float x[4];", "a name of the compiler's"),
        ("float e = __expf(x);", "a name of the compiler's"),
        ("__global__ void sweep();", "a name of the compiler's"),
        ("  #ifdef DIEN_OPS_HOST_EXECUTOR", "a preprocessor condition"),
        ("#if 1", "a preprocessor condition"),
    ],
)
def test_kernel_files_may_not_reach_the_device_by_themselves(tmp_path, line, what):
    path = tmp_path / "kernel.cu"
    path.write_text(f"// first\n/* second\n third */ {line}\n")
    (complaint,) = cuda_report.check_source(path)
    assert complaint.startswith(f"kernel.cu:3: {what}") and "belongs into primitives.cuh" in complaint


def test_comments_text_and_restrict_are_no_reach(tmp_path):
    path = tmp_path / "kernel.cu"
    path.write_text('#pragma once\n// asm, #if\n/* __shared__\n<<< */\nlaunch("a <<< b", float* __restrict__ x);\n')
    assert cuda_report.check_source(path) == []


def test_the_files_that_may_reach_the_device_are_there():
    for name in cuda_report.DEVICES_OWN:
        assert cuda_report.check_source(cuda_report.CUDA / name), f"{name} has nothing of the device's own"


@pytest.mark.parametrize("path", cuda_report.kernel_files(), ids=lambda path: path.name)
def test_the_projects_kernels_reach_the_device_only_through_primitives_and_launch(path):
    assert cuda_report.check_source(path) == []
