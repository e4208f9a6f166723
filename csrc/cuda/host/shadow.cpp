// SPDX-License-Identifier: Apache-2.0
#include "cuda/host/shadow.h"

#include <algorithm>

namespace dien_ops::cuda::host {
namespace {

std::string file_name(const Site& site) {
    const std::string path = site.at.file_name();
    return path.substr(path.rfind('/') + 1);
}

const char* name(Use use) {
    switch (use) {
        case Use::read:
            return "read";
        case Use::write:
            return "write";
        default:
            return "copy";
    }
}

}  // namespace

std::string file_and_line(const Site& site) { return file_name(site) + ":" + std::to_string(site.at.line()); }

bool Reports::wants(const char* what, const char* buffer, const Site& site, const Site* before) {
    const Site& other = before != nullptr ? *before : site;
    const auto same = [&](const Seen& seen) {
        return std::strcmp(seen.what, what) == 0 && std::strcmp(seen.buffer, buffer) == 0 && seen.site == site &&
               seen.before == other;
    };
    if (seen_.size() == kMost || std::any_of(seen_.begin(), seen_.end(), same)) return false;
    seen_.push_back({what, buffer, site, other});
    return true;
}

void Shadow::start_launch() {
    for (auto& [number, page] : pages_) {
        if (spare_.size() < kRecent) spare_.push_back(std::move(page));
    }
    pages_.clear();
    std::fill(recent_.begin(), recent_.end(), nullptr);
    blocks_.clear();
    reports.clear();
    now_ = 0;
}

void Shadow::start_block(std::string block) {
    block_barrier();
    block_begin_ = now_;
    blocks_.push_back({now_, std::move(block)});
}

void Shadow::block_barrier() {
    barrier_ = ++now_;
    std::fill(std::begin(warp_time_), std::end(warp_time_), now_);
}

Shadow::Page& Shadow::page(const void* address, int cell_bytes) {
    const uintptr_t number = reinterpret_cast<uintptr_t>(address) / kPageBytes;
    Page*& recent = recent_[number % kRecent];
    if (recent == nullptr || recent->number != number) {
        std::unique_ptr<Page>& found = pages_[number];
        if (found == nullptr) {
            if (spare_.empty()) {
                found = std::make_unique<Page>();
            } else {
                found = std::move(spare_.back());
                spare_.pop_back();
            }
            found->number = number;
            found->cell_bytes = cell_bytes;
            found->cells.assign(kPageBytes / cell_bytes, Cell{});
        }
        recent = found.get();
    }
    if (cell_bytes < recent->cell_bytes) {  // smaller numbers than before: each cell becomes several
        const int parts = recent->cell_bytes / cell_bytes;
        std::vector<Cell> cells(kPageBytes / cell_bytes);
        for (size_t i = 0; i < cells.size(); ++i) cells[i] = recent->cells[i / parts];
        recent->cell_bytes = cell_bytes;
        recent->cells = std::move(cells);
    }
    return *recent;
}

bool Shadow::ordered(const Past& past, Memory memory, int thread) const {
    if (past.time < block_begin_) return past.time == 0 || memory == Memory::shared;
    if (past.pending) return false;
    if (past.time < barrier_ || past.thread == thread) return true;
    const int warp = thread / 32;
    return past.thread / 32 == warp && past.time < warp_time_[warp];
}

void Shadow::remember_read(Cell& cell, Memory memory, const Past& read) const {
    Past &last = cell.read, &other = cell.other_read;
    const auto by_other_block = [&](const Past& past) {
        return memory == Memory::global && past.time != 0 && past.time < block_begin_;
    };
    const bool other_counts = by_other_block(other) || (other.time >= barrier_ && other.thread / 32 != read.thread / 32);
    if (!other_counts && (last.thread != read.thread || by_other_block(last))) other = last;
    last = read;
}

void Shadow::access(const Access& access, int thread) {
    const int cell_bytes = std::min(access.number_bytes, 4);
    Page& page = this->page(access.address, cell_bytes);
    const uintptr_t offset = reinterpret_cast<uintptr_t>(access.address) % kPageBytes;
    Cell* const first = &page.cells[offset / page.cell_bytes];
    Cell* const end = first + access.bytes / page.cell_bytes;
    const Past now = {warp_time_[thread / 32], static_cast<uint16_t>(thread), access.use, access.use == Use::copy, access.site};
    for (Cell* cell = first; cell != end; ++cell) {
        if (!ordered(cell->write, access.memory, thread)) report(cell->write, access, thread);
        if (access.use == Use::read) {
            if (access.memory == Memory::shared && cell->write.time < block_begin_ &&
                reports.wants("unwritten", access.buffer, access.site)) {
                reports.add("unwritten: read '" + std::string(access.buffer) + "' " + file_and_line(access.site) + ", thread " +
                            std::to_string(thread) + " (" + block() + ")");
            }
            remember_read(*cell, access.memory, now);
        } else {
            if (!ordered(cell->read, access.memory, thread)) {
                report(cell->read, access, thread);
            } else if (!ordered(cell->other_read, access.memory, thread)) {
                report(cell->other_read, access, thread);
            }
            cell->write = now;
        }
    }
}

void Shadow::finish_copy(const Access& copy, int thread) {
    Page& page = this->page(copy.address, std::min(copy.number_bytes, 4));
    Cell* const first = &page.cells[reinterpret_cast<uintptr_t>(copy.address) % kPageBytes / page.cell_bytes];
    const Past now = {warp_time_[thread / 32], static_cast<uint16_t>(thread), Use::copy, false, copy.site};
    std::for_each(first, first + copy.bytes / page.cell_bytes, [&](Cell& cell) { cell.write = now; });
}

void Shadow::report(const Past& past, const Access& access, int thread) {
    if (!reports.wants(name(past.use), access.buffer, access.site, &past.site)) return;
    const auto after = [&](const Block& block) { return past.time < block.begin; };
    const std::string& past_block = (std::find_if(blocks_.begin(), blocks_.end(), after) - 1)->name;
    const std::string second = file_name(past.site) == file_name(access.site) ? ":" + std::to_string(access.site.at.line())
                                                                              : file_and_line(access.site);
    reports.add(std::string("race: ") + (past.pending ? "pending " : "") + name(past.use) + "/" + name(access.use) + " '" +
                access.buffer + "' " + file_and_line(past.site) + " -> " + second + ", thread " + std::to_string(past.thread) +
                (past_block == block() ? "" : " (" + past_block + ")") + " and thread " + std::to_string(thread) + " (" +
                block() + ")");
}

}  // namespace dien_ops::cuda::host
