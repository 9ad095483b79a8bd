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

// What `malloc` gave stands before the tensor.
void give_back(void* data) {
    if (!data) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    std::free(static_cast<void**>(data)[-1]);
}

struct Padded final : c10::Allocator {
    c10::DataPtr allocate(std::size_t bytes) override {
        const c10::Device cpu(c10::DeviceType::CPU);
        if (!bytes) return {nullptr, nullptr, &give_back, cpu};
        void* whole = bytes <= PTRDIFF_MAX - ROOM ? std::malloc(bytes + ROOM) : nullptr;
        TORCH_CHECK(whole, "can't allocate memory: ", bytes, " bytes of main memory were asked for");
        const auto first = reinterpret_cast<std::uintptr_t>(whole) + ROOM;
        void* data = reinterpret_cast<void*>(first - first % ALIGNMENT);
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
