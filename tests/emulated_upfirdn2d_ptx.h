// csrc/_upfirdn2d_ptx.cuh on a CPU, see emulated_cuda.h. Copies arrive as early as they may, or as late.
#pragma once

#include "_ptx.cuh"

namespace clone_fast::fir {

struct Copy {
    std::uint32_t to;
    const void* from;
    bool real;

    void arrive() const {
        void* at = shared_pointer(to, 16);
        if (real) memcpy(at, from, 16);
        else memset(at, 0, 16);
    }
};
inline thread_local std::deque<std::vector<Copy>> on_their_way(1);  // by group, the last of them open

inline void copy16_async(std::uint32_t to, const void* from, bool real) {
    const Copy copy{to, from, real};
    if (threadIdx.x % 2) copy.arrive();
    else on_their_way.back().push_back(copy);
}
inline void end_copies() { on_their_way.emplace_back(); }
template <int kPending>
void wait_for_copies() {
    for (; on_their_way.size() > kPending + 1; on_their_way.pop_front())
        for (const Copy& copy : on_their_way.front()) copy.arrive();
}

inline Bytes16 load_shared16(std::uint32_t from) {
    Bytes16 bytes;
    memcpy(&bytes, shared_pointer(from, 16), 16);
    return bytes;
}
inline void store_shared16(std::uint32_t to, Bytes16 bytes) { memcpy(shared_pointer(to, 16), &bytes, 16); }

inline float sloped(float value, float seen, float slope) { return seen > 0 ? value : value * slope; }

template <typename T>
std::uint32_t pair_within(std::uint32_t pair, std::uint32_t limit) {
    const auto number = [](std::uint32_t word, int shift) { return to_float(T{std::uint16_t(word >> shift)}); };
    std::uint32_t mask = 0;
    for (int shift = 0; shift < 32; shift += 16)
        if (fabsf(number(pair, shift)) <= number(limit, shift)) mask |= 0xffffu << shift;
    return mask;
}

}  // namespace clone_fast::fir
