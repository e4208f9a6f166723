// SPDX-License-Identifier: Apache-2.0
// On x86-64 a switch saves the registers that a call preserves and exchanges stack pointers: a few nanoseconds, which is what
// the executor spends most of its time on. ucontext does it anywhere else, with two system calls.
#include "cuda/host/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __x86_64__
extern "C" void dien_ops_switch_stack(void** save, void* load);
asm(R"(
    .text
    .p2align 4
    .type dien_ops_switch_stack, @function
dien_ops_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size dien_ops_switch_stack, . - dien_ops_switch_stack
)");
#endif

namespace dien_ops::cuda::host {
namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;  // redzones, and fragments that do not stay in registers
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

void* stack(int number) {
    static std::vector<void*> stacks;
    static const size_t page = sysconf(_SC_PAGESIZE);
    while (static_cast<size_t>(number) >= stacks.size()) {
        void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::runtime_error("no memory for a stack");
        stacks.push_back(static_cast<char*>(memory) + page);
    }
    return stacks[number];
}

[[maybe_unused]] Fiber* left = nullptr;  // by the last switch

}  // namespace

void Fiber::start(int number, void (*entry)()) {
    stack_bottom_ = stack(number);
    // Stacks that all began at the same offset of a page would meet in the same few sets of the caches.
    stack_bytes_ = kStackBytes - number % 32 * 128;
    fake_stack_ = nullptr;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack_bottom_, stack_bytes_);
#endif
#ifdef __x86_64__
    // As dien_ops_switch_stack leaves a stack: six registers, and where to return to; entry finds the alignment of a call.
    auto* top = reinterpret_cast<uintptr_t*>(static_cast<char*>(stack_bottom_) + stack_bytes_);
    *--top = 0;  // entry's return address
    *--top = reinterpret_cast<uintptr_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_bottom_;
    context_.uc_stack.ss_size = stack_bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
}

void Fiber::switch_to(Fiber& next, [[maybe_unused]] bool last) {
    left = this;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, next.stack_bottom_, next.stack_bytes_);
#endif
#ifdef __x86_64__
    dien_ops_switch_stack(&stack_pointer_, next.stack_pointer_);
#else
    swapcontext(&context_, &next.context_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#ifdef __SANITIZE_ADDRESS__
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    left->stack_bottom_ = const_cast<void*>(bottom);  // of the caller's stack nobody else says where it lies
    left->stack_bytes_ = bytes;
#endif
}

}  // namespace dien_ops::cuda::host
