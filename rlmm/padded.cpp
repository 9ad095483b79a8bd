// Main memory for torch's tensors: `malloc` with room to align in, where torch asks `posix_memalign`, whose freed blocks
// glibc does not use again (rlmm/allocator.py).
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {
constexpr std::uintptr_t ALIGNMENT = 64;  // torch's own
constexpr std::size_t ROOM = sizeof(void*) + ALIGNMENT - 1;

// What `malloc` gave stands before the tensor. oneDNN frees by whatever allocator there is then, so a block may be older
// than this one: what glibc has before it is its size, which is no address beside the block.
void give_back(void* data) {
    if (!data) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    void* whole = static_cast<void**>(data)[-1];
    const auto before = reinterpret_cast<std::uintptr_t>(data) - reinterpret_cast<std::uintptr_t>(whole);
    std::free(before <= ROOM ? whole : data);
}

struct Padded final : c10::Allocator {
    c10::DataPtr allocate(std::size_t bytes) override {
        const c10::Device cpu(c10::DeviceType::CPU);
        if (!bytes) return {nullptr, nullptr, &give_back, cpu};
        void* whole = bytes <= PTRDIFF_MAX - ROOM ? std::malloc(bytes + ROOM) : nullptr;
        if (!whole) c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
        // The words by which accelerate and others know torch's own error.
        TORCH_CHECK(whole, "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes.");
        const auto last = reinterpret_cast<std::uintptr_t>(whole) + ROOM;
        void* data = reinterpret_cast<void*>(last - last % ALIGNMENT);
        static_cast<void**>(data)[-1] = whole;
        c10::profiledCPUMemoryReporter().New(data, bytes);
        return {data, data, &give_back, cpu};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
}  // namespace

extern "C" void rlmm_pad() {
    static Padded* const padded = new Padded;  // for as long as any thread may still ask for memory
    c10::SetCPUAllocator(padded, 1);
}
