// equalise.cu - histogram equalisation of an 8-bit grey image.
//
//     nvcc -O3 -arch=sm_80 equalise.cu -o equalise && ./equalise
//
// Three passes: count the grey values, turn the counts into a monotone map, apply the map. Counting
// is the interesting one. Photographs have large areas of one grey, and global atomics on a single
// bin would serialise the whole device. Every block therefore counts into shared memory, with one
// private histogram per warp, and adds its result to the global counters once.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(call)                                                                            \
    do {                                                                                       \
        const cudaError_t status = (call);                                                     \
        if (status != cudaSuccess) {                                                           \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, cudaGetErrorString(status)); \
            std::exit(1);                                                                      \
        }                                                                                      \
    } while (0)

constexpr int BINS = 256;
constexpr int WARPS = 8;
constexpr int THREADS = WARPS * 32;

__global__ void count_greys(const uchar4* __restrict__ pixels, int quads, unsigned* __restrict__ counts) {
    __shared__ unsigned local[WARPS][BINS];
    for (int i = threadIdx.x; i < WARPS * BINS; i += THREADS) (&local[0][0])[i] = 0;
    __syncthreads();

    unsigned* mine = local[threadIdx.x / 32];
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < quads; i += gridDim.x * THREADS) {
        const uchar4 p = pixels[i];  // four pixels per load keep the memory system busy
        atomicAdd(&mine[p.x], 1u);
        atomicAdd(&mine[p.y], 1u);
        atomicAdd(&mine[p.z], 1u);
        atomicAdd(&mine[p.w], 1u);
    }
    __syncthreads();

    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
        unsigned sum = 0;
        for (int w = 0; w < WARPS; ++w) sum += local[w][bin];
        if (sum) atomicAdd(&counts[bin], sum);
    }
}

// One block of 256 threads, thread t owns bin t. Inclusive scan within warps by shuffles, then the
// warp totals are added; the result is scaled so that the darkest grey in use becomes 0.
__global__ void build_map(const unsigned* __restrict__ counts, unsigned pixels, uint8_t* __restrict__ map) {
    __shared__ unsigned totals[BINS / 32];
    __shared__ unsigned darkest;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;

    const unsigned own = counts[t];
    unsigned sum = own;
    for (int step = 1; step < 32; step *= 2) {
        const unsigned left = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += left;
    }
    if (lane == 31) totals[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; ++w) sum += totals[w];

    if (own != 0 && sum == own) darkest = own;  // true for exactly one thread
    __syncthreads();
    const float range = static_cast<float>(pixels - darkest);
    // An image of a single grey has no range; leave it as it is instead of dividing by zero.
    map[t] = range > 0.0f ? static_cast<uint8_t>(255.0f * fmaxf(0.0f, float(sum) - float(darkest)) / range + 0.5f)
                          : static_cast<uint8_t>(t);
}

__global__ void apply_map(uchar4* pixels, int quads, const uint8_t* __restrict__ map) {
    __shared__ uint8_t table[BINS];
    table[threadIdx.x] = map[threadIdx.x];
    __syncthreads();
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < quads; i += gridDim.x * THREADS) {
        const uchar4 p = pixels[i];
        pixels[i] = make_uchar4(table[p.x], table[p.y], table[p.z], table[p.w]);
    }
}

int main() {
    static_assert(THREADS == BINS, "build_map and apply_map give each thread one bin");
    const int quads = 1 << 20;
    std::vector<uint8_t> image(4 * quads);
    for (size_t i = 0; i < image.size(); ++i) {
        image[i] = 90 + (static_cast<uint32_t>(i) * 2654435761u >> 27);  // a dull image: 90..121
    }

    uint8_t *pixels, *map;
    unsigned* counts;
    CHECK(cudaMalloc(&pixels, image.size()));
    CHECK(cudaMalloc(&map, BINS));
    CHECK(cudaMalloc(&counts, BINS * sizeof(unsigned)));
    CHECK(cudaMemset(counts, 0, BINS * sizeof(unsigned)));
    CHECK(cudaMemcpy(pixels, image.data(), image.size(), cudaMemcpyHostToDevice));

    auto* wide = reinterpret_cast<uchar4*>(pixels);
    count_greys<<<256, THREADS>>>(wide, quads, counts);
    build_map<<<1, BINS>>>(counts, 4u * quads, map);
    apply_map<<<256, THREADS>>>(wide, quads, map);
    CHECK(cudaGetLastError());
    CHECK(cudaMemcpy(image.data(), pixels, image.size(), cudaMemcpyDeviceToHost));

    uint8_t low = 255, high = 0;
    for (uint8_t p : image) {
        low = p < low ? p : low;
        high = p > high ? p : high;
    }
    std::printf("greys now span %d..%d\n", low, high);
    cudaFree(pixels);
    cudaFree(map);
    cudaFree(counts);
    return low == 0 && high == 255 ? 0 : 1;
}
