// SPDX-License-Identifier: Apache-2.0
// What the executor finds out about a kernel, and the memory of who touched what that it finds races with.
//
// Two accesses to one number, one of them a write, by two threads, are a race unless a barrier lies between them: whatever the
// order of a run, another may differ. So each number has a cell, which remembers its last write and its last reads with their
// times. A block's barrier orders all its threads and a warp's the lanes of the warp; nothing orders the blocks of a launch.
// That is all there is, so one counter is a complete clock: each barrier advances it, an access is stamped with the time of its
// warp's last barrier, and a past access came before if its stamp is older than the block's last barrier, or than that of a
// warp it shares.
//
// Cells lie in pages that are found by address: buffers that overlap share them. Shared memory uses the same cells; there, what
// an earlier block did counts as nothing, and reading what this block did not write is an error.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "cuda/host/site.h"

namespace dien_ops::cuda::host {

// Lines such as "race: write/read 'h' gru.cu:99 -> :88, thread 17 and thread 82 (block 3)": the first of each kind, place and
// buffer, and not more than kMost.
class Reports {
  public:
    // what: the beginning up to the name of the buffer, by which kinds are told apart. before: the other access of a race.
    bool wants(const char* what, const char* buffer, const Site& site, const Site* before = nullptr);
    void add(std::string line) { lines_.push_back(std::move(line)); }
    const std::vector<std::string>& lines() const { return lines_; }
    void clear() { seen_.clear(), lines_.clear(); }

  private:
    static constexpr size_t kMost = 20;
    struct Seen {
        const char *what, *buffer;
        Site site, before;
    };
    std::vector<Seen> seen_;
    std::vector<std::string> lines_;
};

std::string file_and_line(const Site& site);

enum class Use : uint8_t { none, read, write, copy };  // copy: the write of an asynchronous copy
enum class Memory : uint8_t { global, shared };

// One access: of so many bytes (2 or more, aligned as a whole) at address, made of numbers of number_bytes.
struct Access {
    Use use;
    Memory memory;
    const void* address;
    int bytes, number_bytes;
    const char* buffer;
    Site site;
};

class Shadow {
  public:
    void start_launch();
    // block: its place in the grid, in words.
    void start_block(std::string block);
    void block_barrier();
    void warp_barrier(int warp) { warp_time_[warp] = ++now_; }

    // Remembers an access of the thread and reports its races; a copy is pending until finish_copy, and whoever touches it
    // meanwhile races with it.
    void access(const Access& access, int thread);
    void finish_copy(const Access& copy, int thread);

    Reports reports;
    const std::string& block() const { return blocks_.back().name; }

  private:
    struct Past {
        uint32_t time = 0;  // 0: never
        uint16_t thread = 0;
        Use use = Use::none;
        bool pending = false;
        Site site;
    };
    // Two reads tell all that a later write must know: read and other_read are by different warps of this block, or by
    // different lanes of one, or other_read is by another block, wherever there were such reads since the last barrier.
    struct Cell {
        Past write, read, other_read;
    };
    struct Page {
        uintptr_t number;
        int cell_bytes;  // the smallest numbers seen on it, at most 4
        std::vector<Cell> cells;
    };
    struct Block {
        uint32_t begin;
        std::string name;
    };

    static constexpr uintptr_t kPageBytes = 1024;
    static constexpr size_t kRecent = 4096;

    Page& page(const void* address, int cell_bytes);
    bool ordered(const Past& past, Memory memory, int thread) const;
    void remember_read(Cell& cell, Memory memory, const Past& read) const;
    void report(const Past& past, const Access& access, int thread);

    uint32_t now_ = 0, block_begin_ = 0, barrier_ = 0;
    uint32_t warp_time_[32] = {};
    std::vector<Block> blocks_;
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
    std::vector<std::unique_ptr<Page>> spare_;
    std::vector<Page*> recent_ = std::vector<Page*>(kRecent);  // of pages_, by the number's last bits
};

}  // namespace dien_ops::cuda::host
