// SPDX-License-Identifier: Apache-2.0
// Fibers hand the processor to each other: one that waits picks the next by the order of the run and switches to it, and the
// last to come to a collective does its work for all and makes them runnable. Whoever would wait for somebody that cannot come
// ends the launch at once: every thread that has begun is then ended by an exception of its own, so that its stack unwinds.
#include "cuda/host/executor.h"

#include <algorithm>
#include <bit>
#include <exception>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/host/fiber.h"

namespace dien_ops::cuda {

ExecutorOptions& executor_options() {
    static ExecutorOptions options;
    return options;
}

namespace host {

Running running;

namespace {

constexpr int kLanes = 32;
constexpr int kMostThreads = 1024;
constexpr const char* kBlockBarrier = "sync_block";

// Thrown through a fiber to end it; not an error of its own.
struct Stop {};

class Random {  // splitmix64
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t operator()() {
        uint64_t x = state_ += 0x9e3779b97f4a7c15;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
        x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
        return x ^ (x >> 31);
    }
    int below(int n) { return static_cast<int>((*this)() % static_cast<uint64_t>(n)); }
    template <typename T>
    void shuffle(std::vector<T>& v) {
        for (size_t i = v.size(); i > 1; --i) std::swap(v[i - 1], v[(*this)() % i]);
    }

  private:
    uint64_t state_;
};

// The threads that can run, by rank: their place in the order of this block.
class Runnable {
  public:
    void set(int rank) { words_[rank / 64] |= uint64_t{1} << rank % 64; }
    void clear(int rank) { words_[rank / 64] &= ~(uint64_t{1} << rank % 64); }
    void clear_all() { std::fill(std::begin(words_), std::end(words_), 0); }
    bool contains(int rank) const { return (words_[rank / 64] >> rank % 64 & 1) != 0; }
    // The first from the given rank on, and around the end.
    int next(int from) const {
        const int word = from / 64 % kWords, bit = from % 64;
        if (const uint64_t rest = words_[word] >> bit; rest != 0) return from % kMostThreads + std::countr_zero(rest);
        for (int i = 1; i <= kWords; ++i) {
            const int w = (word + i) % kWords;
            if (words_[w] != 0) return w * 64 + std::countr_zero(words_[w]);
        }
        throw std::logic_error("host executor: no thread can run");
    }

  private:
    static constexpr int kWords = kMostThreads / 64;
    uint64_t words_[kWords] = {};
};

struct Copy {
    Access to;
    const void* from;
    int group;
    bool happened;
};

struct Thread {
    Fiber fiber;
    bool started = false, exited = false;
    const char* waits_in = nullptr;  // the collective, at the site
    Site site;
    std::vector<Copy> copies;  // not waited for yet, oldest first
    int groups = 0;            // committed
};

struct Warp {
    int waiting = 0, waiting_for_block = 0, exited = 0;
    int first = 0;  // of the waiting lanes, the one that came first
    void* operands[kLanes] = {};
};

class Executor {
  public:
    void run(const Launch& launch);
    void wait_for_block(Site site);
    void wait_for_warp(const char* what, Site site, void* operands, void (*all)(void* const* lanes));
    void copy_async16(const Access& to, const void* from);
    void commit_copies() { ++self().groups; }
    void wait_for_copies(int groups_left);

    Shadow shadow;

  private:
    static void thread_main();

    Thread& self() { return threads_[running.thread]; }
    void run_block();
    void arrange_threads();
    int pick();
    void wait();
    void leave();
    void go_to(int rank, bool last);
    void arrive(const char* what, const Site& site);
    void check_exit();
    bool waits(int thread) const { return threads_[thread].waits_in != nullptr && !runnable_.contains(rank_of_[thread]); }
    bool waits_for_block(int thread) const { return waits(thread) && threads_[thread].waits_in == kBlockBarrier; }
    bool exited(int thread) const { return threads_[thread].exited; }
    template <typename Is>
    int first(int begin, int end, Is is) const;
    [[noreturn]] void diverged(int other);
    std::string where(int thread) const;

    const Launch* launch_ = nullptr;
    ExecutorOptions::Order order_ = ExecutorOptions::in_order;
    Random random_{0};
    std::vector<Thread> threads_ = std::vector<Thread>(kMostThreads);
    Warp warps_[kMostThreads / kLanes];
    std::vector<int> thread_at_, rank_of_;  // of this block's order
    Runnable runnable_;
    int rank_ = 0;  // of the running thread
    int waiting_for_block_ = 0, first_at_barrier_ = 0, exited_ = 0;
    Fiber caller_;
    bool stopping_ = false;
    std::exception_ptr error_;
    std::vector<unsigned char> shared_;
};

Executor executor;

thread_local bool runs_kernel = false;

std::string block_name(const Launch& launch, const int64_t* block) {
    std::string name = "block " + std::to_string(block[0]);
    if (launch.blocks[1] > 1 || launch.blocks[2] > 1) {
        name += ", " + std::to_string(block[1]) + ", " + std::to_string(block[2]);
    }
    return name;
}

void Executor::run(const Launch& launch) {
    const ExecutorOptions& options = executor_options();
    launch_ = &launch;
    order_ = options.order;
    random_ = Random(options.seed);
    stopping_ = false;
    shadow.start_launch();
    shared_.resize(launch.shared_bytes + 256);
    running = {};
    running.threads = launch.threads;
    running.blocks = launch.blocks[0];
    running.shared = shared_.data() + (-reinterpret_cast<uintptr_t>(shared_.data()) & 255);
    running.shared_bytes = launch.shared_bytes;

    std::vector<int64_t> blocks(launch.blocks[0] * launch.blocks[1] * launch.blocks[2]);
    std::iota(blocks.begin(), blocks.end(), 0);
    if (order_ == ExecutorOptions::reverse) std::reverse(blocks.begin(), blocks.end());
    if (order_ == ExecutorOptions::shuffled || order_ == ExecutorOptions::skewed) random_.shuffle(blocks);
    running.check = options.check;
    for (size_t i = 0; i < blocks.size() && !stopping_; ++i) {
        running.block[0] = blocks[i] % launch.blocks[0];
        running.block[1] = blocks[i] / launch.blocks[0] % launch.blocks[1];
        running.block[2] = blocks[i] / launch.blocks[0] / launch.blocks[1];
        run_block();
    }

    const std::vector<std::string>& lines = shadow.reports.lines();
    const std::exception_ptr error = std::exchange(error_, nullptr);
    if (lines.empty()) {
        if (error != nullptr) std::rethrow_exception(error);
        return;
    }
    std::string text;
    if (error != nullptr) {
        try {
            std::rethrow_exception(error);
        } catch (const std::exception& thrown) {
            text = std::string(thrown.what()) + "\n";
        }
    }
    text += std::string("kernel ") + launch.kernel + ":";
    for (const std::string& line : lines) text += "\n" + line;
    throw std::runtime_error(text);
}

void Executor::run_block() {
    shadow.start_block(block_name(*launch_, running.block));
    std::memset(running.shared, 0xff, running.shared_bytes);  // NaN in every format
    for (Warp& warp : warps_) warp = {};
    waiting_for_block_ = exited_ = 0;
    arrange_threads();
    runnable_.clear_all();
    for (int i = 0; i < running.threads; ++i) {
        Thread& thread = threads_[i];
        thread.fiber.start(i, thread_main);
        thread.started = thread.exited = false;
        thread.waits_in = nullptr;
        thread.copies.clear();
        thread.groups = 0;
        runnable_.set(i);
    }
    rank_ = 0;
    rank_ = pick();
    running.thread = thread_at_[rank_];
    self().started = true;
    caller_.switch_to(self().fiber);
    // All threads are done, or one has failed: then those that wait end as well, each by an exception of its own.
    for (int i = 0; i < running.threads; ++i) {
        if (!threads_[i].started || threads_[i].exited) continue;
        running.thread = i;
        caller_.switch_to(threads_[i].fiber);
    }
}

void Executor::arrange_threads() {
    thread_at_.resize(running.threads);
    rank_of_.resize(running.threads);
    std::iota(thread_at_.begin(), thread_at_.end(), 0);
    if (order_ == ExecutorOptions::reverse) std::reverse(thread_at_.begin(), thread_at_.end());
    if (order_ == ExecutorOptions::shuffled) random_.shuffle(thread_at_);
    if (order_ == ExecutorOptions::skewed) {
        std::vector<int> warps(running.threads / kLanes);
        std::iota(warps.begin(), warps.end(), 0);
        random_.shuffle(warps);
        for (int i = 0; i < running.threads; ++i) thread_at_[i] = warps[i / kLanes] * kLanes + i % kLanes;
    }
    for (int i = 0; i < running.threads; ++i) rank_of_[thread_at_[i]] = i;
}

// The rank of the next thread. There is always one that can run: no thread begins to wait where those that it waits for cannot
// come.
int Executor::pick() {
    switch (order_) {
        case ExecutorOptions::shuffled:
            return runnable_.next(random_.below(running.threads));
        case ExecutorOptions::skewed:
            return runnable_.next(0);
        default:
            return runnable_.next(rank_);
    }
}

void Executor::thread_main() {
    Fiber::entered();
    try {
        executor.launch_->thread(executor.launch_->call);
        executor.check_exit();
    } catch (const Stop&) {
        executor.stopping_ = true;
    } catch (...) {
        executor.error_ = std::current_exception();
        executor.stopping_ = true;
    }
    executor.leave();
}

// Runs other threads until it is this one's turn again.
void Executor::wait() {
    go_to(pick(), false);
    if (stopping_) throw Stop{};
    self().waits_in = nullptr;
}

// This thread is done.
void Executor::leave() {
    self().exited = true;
    runnable_.clear(rank_);
    ++exited_;
    ++warps_[running.thread / kLanes].exited;
    if (stopping_ || exited_ == running.threads) self().fiber.switch_to(caller_, true);
    go_to(pick(), true);
}

void Executor::go_to(int rank, bool last) {
    Thread& from = self();
    rank_ = rank;
    running.thread = thread_at_[rank];
    Thread& to = self();
    if (&to == &from) return;
    to.started = true;
    from.fiber.switch_to(to.fiber, last);
}

// The running thread comes to a collective.
void Executor::arrive(const char* what, const Site& site) {
    Thread& thread = self();
    thread.waits_in = what;
    thread.site = site;
    runnable_.clear(rank_);
}

void Executor::wait_for_block(Site site) {
    arrive(kBlockBarrier, site);
    if (exited_ > 0) diverged(first(0, running.threads, &Executor::exited));
    Warp& warp = warps_[running.thread / kLanes];
    if (warp.waiting > 0) diverged(warp.first);
    if (waiting_for_block_ == 0) first_at_barrier_ = running.thread;
    if (!(threads_[first_at_barrier_].site == site)) diverged(first_at_barrier_);
    ++warp.waiting_for_block;
    if (++waiting_for_block_ == running.threads) {
        shadow.block_barrier();
        waiting_for_block_ = 0;
        for (Warp& each : warps_) each.waiting_for_block = 0;
        for (int rank = 0; rank < running.threads; ++rank) runnable_.set(rank);
        rank_ = 0;  // the order begins anew: whoever comes last does not go on first
    }
    wait();
}

void Executor::wait_for_warp(const char* what, Site site, void* operands, void (*all)(void* const* lanes)) {
    arrive(what, site);
    const int lane = running.thread % kLanes, lane_0 = running.thread - lane;
    Warp& warp = warps_[running.thread / kLanes];
    if (warp.exited > 0) diverged(first(lane_0, lane_0 + kLanes, &Executor::exited));
    if (warp.waiting_for_block > 0) diverged(first(lane_0, lane_0 + kLanes, &Executor::waits_for_block));
    if (warp.waiting == 0) warp.first = running.thread;
    if (!(threads_[warp.first].site == site)) diverged(warp.first);
    warp.operands[lane] = operands;
    if (++warp.waiting < kLanes) return wait();
    warp.waiting = 0;
    all(warp.operands);
    for (int i = 0; i < kLanes; ++i) runnable_.set(rank_of_[lane_0 + i]);
    self().waits_in = nullptr;
}

// Whoever leaves the kernel must not be waited for.
void Executor::check_exit() {
    if (waiting_for_block_ > 0) diverged(first_at_barrier_);
    const Warp& warp = warps_[running.thread / kLanes];
    if (warp.waiting > 0) diverged(warp.first);
}

template <typename Is>
int Executor::first(int begin, int end, Is is) const {
    while (begin < end && !(this->*is)(begin)) ++begin;
    return begin;
}

void Executor::diverged(int other) {
    shadow.reports.add("divergence: " + where(running.thread) + ", " + where(other) + " (" + shadow.block() + ")");
    throw Stop{};
}

std::string Executor::where(int number) const {
    const Thread& thread = threads_[number];
    const std::string name = "thread " + std::to_string(number);
    if (thread.waits_in == nullptr) return name + " has left the kernel";
    return name + " waits in " + thread.waits_in + " " + file_and_line(thread.site);
}

// The copy happens now or when it is waited for: a kernel must not see a difference.
void Executor::copy_async16(const Access& to, const void* from) {
    const bool now = (random_() & 1) != 0;
    if (now) std::memcpy(const_cast<void*>(to.address), from, to.bytes);
    self().copies.push_back({to, from, self().groups, now});
}

void Executor::wait_for_copies(int groups_left) {
    std::vector<Copy>& copies = self().copies;
    auto copy = copies.begin();
    for (; copy != copies.end() && copy->group < self().groups - groups_left; ++copy) {
        if (!copy->happened) std::memcpy(const_cast<void*>(copy->to.address), copy->from, copy->to.bytes);
        if (running.check) shadow.finish_copy(copy->to, running.thread);
    }
    copies.erase(copies.begin(), copy);
}

}  // namespace

bool in_kernel() { return runs_kernel; }

void run(const Launch& launch) {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    struct Scope {
        Scope() { runs_kernel = true; }
        ~Scope() { runs_kernel = false; }
    } scope;
    executor.run(launch);
}

std::string this_thread() { return "thread " + std::to_string(running.thread) + " (" + executor.shadow.block() + ")"; }

void fail(const std::string& message) { throw std::runtime_error(message + ", " + this_thread()); }

void report(const char* what, const std::string& detail, const char* buffer, const Site& site) {
    if (!executor.shadow.reports.wants(what, buffer, site)) return;
    executor.shadow.reports.add(std::string(what) + ": " + detail + " " + file_and_line(site) + ", " + this_thread());
}

void shadow_access(const Access& access) { executor.shadow.access(access, running.thread); }

void wait_for_block(Site site) { executor.wait_for_block(site); }

void wait_for_warp(const char* what, Site site, void* operands, void (*all)(void* const* lanes)) {
    executor.wait_for_warp(what, site, operands, all);
}

void order_warp(void* const*) { executor.shadow.warp_barrier(running.thread / kLanes); }

void copy_async16(const Access& to, const void* from) { executor.copy_async16(to, from); }
void commit_copies() { executor.commit_copies(); }
void wait_for_copies(int groups_left) { executor.wait_for_copies(groups_left); }

}  // namespace host
}  // namespace dien_ops::cuda
