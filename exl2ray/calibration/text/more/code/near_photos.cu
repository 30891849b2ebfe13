// Find near-identical survey photographs: each picture is a 256-bit perceptual hash, and we want all
// pairs within a Hamming distance of `radius`. A hundred thousand hashes are 5e9 pairs, which is a
// coffee on the CPU and under a second here.
//
// Tile scheme: a block owns TILE rows and streams TILE columns at a time through shared memory; each
// thread keeps its own row hash in registers. Only the upper triangle is visited.

#include <algorithm>
#include <cooperative_groups.h>
#include <cstdint>
#include <cstdio>
#include <cuda_runtime.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace cg = cooperative_groups;

constexpr int kTile = 256;
constexpr int kWords = 8;                    // 8 x 32 bit

struct alignas(32) Hash {
    uint32_t w[kWords];
};

struct Pair {
    uint32_t a, b;
    uint32_t distance;
};

static void check(cudaError_t e, const char* what)
{
    if (e != cudaSuccess)
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(e));
}

// Shared layout is word-major: neighbouring threads never read neighbouring columns at the same time
// in the inner loop (all lanes read the same column), so this is a broadcast and free of conflicts;
// the transposition only matters for the store.
__global__ void __launch_bounds__(kTile)
near_pairs(const Hash* __restrict__ hashes, uint32_t n, uint32_t radius,
           Pair* __restrict__ out, uint32_t capacity, uint32_t* __restrict__ found)
{
    __shared__ uint32_t col[kWords][kTile];

    const cg::thread_block block = cg::this_thread_block();
    const uint32_t row = blockIdx.x * kTile + threadIdx.x;
    const bool live = row < n;

    uint32_t mine[kWords];
#pragma unroll
    for (int k = 0; k < kWords; ++k)
        mine[k] = live ? hashes[row].w[k] : 0u;

    for (uint32_t base = blockIdx.x * kTile + blockIdx.y * kTile; base < n; base += gridDim.y * kTile) {
        const uint32_t c = base + threadIdx.x;
        block.sync();                        // everyone is done with the previous tile
#pragma unroll
        for (int k = 0; k < kWords; ++k)
            col[k][threadIdx.x] = c < n ? hashes[c].w[k] : 0u;
        block.sync();

        const uint32_t m = min(uint32_t{kTile}, n - base);
        for (uint32_t j = 0; j < m; ++j) {
            // Half the words decide most comparisons: random hashes differ in about 64 of 128 bits.
            uint32_t d = 0;
#pragma unroll
            for (int k = 0; k < kWords / 2; ++k)
                d += __popc(mine[k] ^ col[k][j]);
            const bool maybe = live && base + j > row && d <= radius;
            if (!__any_sync(0xffffffffu, maybe))
                continue;
#pragma unroll
            for (int k = kWords / 2; k < kWords; ++k)
                d += __popc(mine[k] ^ col[k][j]);

            if (maybe && d <= radius) {
                const cg::coalesced_group hit = cg::coalesced_threads();
                uint32_t slot = 0;
                if (hit.thread_rank() == 0)
                    slot = atomicAdd(found, hit.size());
                slot = hit.shfl(slot, 0) + hit.thread_rank();
                if (slot < capacity)         // beyond that we only count
                    out[slot] = {row, base + j, d};
            }
        }
    }
}

template <class T>
class DeviceBuffer {
public:
    explicit DeviceBuffer(size_t n) { check(cudaMalloc(&p_, n * sizeof(T)), "cudaMalloc"); }
    ~DeviceBuffer() { cudaFree(p_); }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;
    T* get() const { return p_; }

private:
    T* p_ = nullptr;
};

std::vector<Pair> find_near_pairs(const std::vector<Hash>& hashes, uint32_t radius)
{
    const auto n = static_cast<uint32_t>(hashes.size());
    if (n < 2)
        return {};

    DeviceBuffer<Hash> d_hashes(n);
    DeviceBuffer<uint32_t> d_found(1);
    check(cudaMemcpy(d_hashes.get(), hashes.data(), n * sizeof(Hash), cudaMemcpyHostToDevice), "upload");

    const uint32_t tiles = (n + kTile - 1) / kTile;
    // Few rows alone would leave most of the card idle, so columns are split as well.
    const dim3 grid(tiles, std::min(tiles, 16u));

    for (uint32_t capacity = 4 * n;;) {
        DeviceBuffer<Pair> d_out(capacity);
        uint32_t found = 0;
        check(cudaMemset(d_found.get(), 0, sizeof found), "clear counter");
        near_pairs<<<grid, kTile>>>(d_hashes.get(), n, radius, d_out.get(), capacity, d_found.get());
        check(cudaGetLastError(), "launch near_pairs");
        check(cudaMemcpy(&found, d_found.get(), sizeof found, cudaMemcpyDeviceToHost), "near_pairs");

        if (found <= capacity) {
            std::vector<Pair> result(found);
            check(cudaMemcpy(result.data(), d_out.get(), found * sizeof(Pair), cudaMemcpyDeviceToHost),
                  "download");
            return result;                   // unordered; the caller sorts by distance
        }
        // A folder of black frames from the night camera matches itself completely. Refuse politely.
        if (found > 64u * n)
            throw std::runtime_error("radius " + std::to_string(radius) + " yields " +
                                     std::to_string(found) + " pairs; remove blank frames first");
        std::fprintf(stderr, "near_pairs: %u pairs, retrying with a larger buffer\n", found);
        capacity = found;
    }
}
