// SPDX-License-Identifier: Apache-2.0
// Fibers: stacks of their own on one OS thread, which change only where one of them says so.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace dien_ops::cuda::host {

class Fiber {
  public:
    // The caller's own stack, to come back to.
    Fiber() = default;

    // The next switch to this fiber calls entry on the stack of the given number. entry never returns: it ends in a last
    // switch. Stacks are kept for the next launch; below each lies a page that nobody may touch.
    void start(int stack, void (*entry)());

    // Leaves this fiber, which runs, until somebody switches back to it; not at all if it is the last switch.
    void switch_to(Fiber& next, bool last = false);

    // The first thing that an entry does.
    static void entered();

  private:
    void* stack_bottom_ = nullptr;  // lowest address
    size_t stack_bytes_ = 0;
#ifdef __x86_64__
    void* stack_pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
    void* fake_stack_ = nullptr;  // AddressSanitizer's
};

}  // namespace dien_ops::cuda::host
