// What a target is to the loop: memory, and graphs that run in it (runtime/target.py).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "dtype.hpp"

namespace toprovar::runtime {

// A contiguous tensor in a target's memory, which the target owns.
struct Buffer {
    uint64_t address = 0;  // of what was allocated
    size_t capacityBytes = 0;
    DType type = DType::kFLOAT32;
    Shape shape;
    size_t offsetBytes = 0;

    uint64_t begin() const noexcept { return address + offsetBytes; }
    size_t count() const noexcept { return static_cast<size_t>(volume(shape)); }
    size_t sizeBytes() const noexcept { return count() * sizeOf(type); }

    // The same memory in another shape, beginning `firstRow` rows of that shape behind this tensor's begin. Throws
    // std::logic_error where it leaves the memory.
    Buffer view(Shape const& shape, int64_t firstRow = 0) const;
};

using Buffers = std::map<std::string, Buffer>;
using Run = std::function<void()>;

class Target {
public:
    virtual ~Target() = default;

    // Runtime, version and device, for reports.
    virtual std::string description() const = 0;

    // Fixes where every input of a graph is read and every output is written; the result runs the graph, as often as it
    // is called, and returns before the device is done.
    virtual Run bind(std::string const& graph, Buffers const& inputs, Buffers const& outputs) = 0;

    // Zeroed memory, aligned for every type; freed with the target.
    virtual uint64_t allocate(size_t sizeBytes) = 0;

    virtual void write(Buffer const& buffer, void const* values) = 0;
    virtual void read(Buffer const& buffer, void* values) = 0;

    // Waits until everything queued has run.
    virtual void synchronize() = 0;

    // Memory of so many bytes, from which a copy to the device is fast and need not be waited for: it belongs to the
    // target, and what is written from it must stay until the next synchronize().
    virtual void* staging(size_t sizeBytes) = 0;
};

}  // namespace toprovar::runtime
