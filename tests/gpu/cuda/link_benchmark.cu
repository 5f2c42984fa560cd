// How much may be on its way over the host link before it hurts: one warp of every block copies
// rows from pinned memory with a bounded number of bytes on their way, the others read device
// memory.
//
//   link_benchmark
//
// A line for each bound, all blocks together: the link's rate, and how long the device memory took.
// Medians of 21 launches on one H100 80GB HBM3 (PCIe 5 x16), two blocks a multiprocessor, 7 MiB
// over the link beside 26 MiB of device memory:
//
//   KiB on their way            66     132    264    528    1,056   2,112
//   link, GB/s                  42      51     50     50       51      51
//   device memory, us           14      12     11     11       12     113
//
// So beyond some size reads of device memory wait for all that is on its way over the link, in
// whichever kernel: Fetch copies what it needs of device memory ahead, and DecodeLayer starts with
// few missed rows (LayerTiles in layer_choice.cuh). Nothing but a CUDA runtime is needed.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "gpu/cuda/kernels/bulk_copy.cuh"

namespace clusterkv::gpu::cuda {
namespace {

constexpr uint32_t kThreads = 256;
[[maybe_unused]] constexpr uint32_t kMostBuffers = 8;
constexpr uint32_t kSharedBytes = 32 << 10;
constexpr uint64_t kLinkBytes = 7 << 20, kDeviceBytes = 26 << 20;
constexpr uint64_t kHostBytes = uint64_t{1} << 30, kMemoryBytes = uint64_t{1} << 32;
constexpr int kLaunches = 21;

void Require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

[[maybe_unused]] __device__ uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// How long a block took, in nanoseconds.
struct Times {
  uint64_t link, memory;
};

// pieces: of `piece_bytes`, of each block, `buffers` at a time.
__global__ void __launch_bounds__(kThreads)
    ReadBoth(const std::byte* host, uint32_t pieces, uint32_t piece_bytes, uint32_t buffers,
             const uint4* memory, uint64_t words, uint4* sink, Times* times) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ uint64_t barriers[kMostBuffers];
  const uint64_t start = Nanoseconds();
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : barriers) InitBarrier(&barrier);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x > 0) return;
    const std::byte* const own = host + size_t{blockIdx.x} * pieces * piece_bytes;
    const auto load = [&](uint32_t piece) {
      const uint32_t buffer = piece % buffers;
      StartBulkLoad(shared + buffer * piece_bytes, own + size_t{piece} * piece_bytes, piece_bytes,
                    &barriers[buffer]);
    };
    for (uint32_t piece = 0; piece < min(buffers, pieces); ++piece) load(piece);
    for (uint32_t piece = 0; piece < pieces; ++piece) {
      WaitBarrier(&barriers[piece % buffers], piece / buffers & 1);
      if (piece + buffers < pieces) load(piece + buffers);
    }
    times[blockIdx.x].link = Nanoseconds() - start;
    return;
  }
  const uint32_t readers = kThreads - 32, reader = threadIdx.x - 32;
  constexpr uint32_t kInFlight = 4;
  uint4 mixed = make_uint4(0, 0, 0, 0);
  for (uint64_t begin = uint64_t{blockIdx.x} * readers * kInFlight + reader; begin < words;
       begin += uint64_t{gridDim.x} * readers * kInFlight) {
    uint4 values[kInFlight];
#pragma unroll
    for (uint32_t i = 0; i < kInFlight; ++i) {
      values[i] = begin + i * readers < words ? __ldcs(memory + begin + i * readers) : mixed;
    }
#pragma unroll
    for (const uint4& value : values) {
      mixed.x ^= value.x, mixed.y ^= value.y, mixed.z ^= value.z, mixed.w ^= value.w;
    }
  }
  if (mixed.x == 0x12345678 && mixed.y == mixed.z) sink[reader] = mixed;  // so that it is read
  __syncwarp();
  if (reader == 0) times[blockIdx.x].memory = Nanoseconds() - start;
#endif
}

double Median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

int Run() {
  cudaDeviceProp device;
  Require(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  if (device.major < 9) {
    std::fprintf(stderr, "%s has no bulk copies\n", device.name);
    return 2;
  }
  std::byte* host = nullptr;
  uint4 *memory = nullptr, *sink = nullptr;
  Times* times = nullptr;
  const auto blocks = static_cast<uint32_t>(2 * device.multiProcessorCount);
  Require(cudaHostAlloc(&host, kHostBytes, cudaHostAllocDefault), "cudaHostAlloc");
  Require(cudaMalloc(&memory, kMemoryBytes), "cudaMalloc");
  Require(cudaMemset(memory, 1, kMemoryBytes), "cudaMemset");
  Require(cudaMalloc(&sink, kThreads * sizeof(uint4)), "cudaMalloc");
  Require(cudaMalloc(&times, blocks * sizeof(Times)), "cudaMalloc");
  Require(cudaFuncSetAttribute(ReadBoth, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
          "cudaFuncSetAttribute");
  std::printf("%s, %u blocks\n%10s %12s %12s\n", device.name, blocks, "KiB", "link GB/s",
              "memory us");
  constexpr struct {
    uint32_t piece_bytes, buffers;
  } kBounds[] = {{256, 1}, {512, 1}, {512, 2}, {1024, 2}, {4096, 1}, {4096, 2}, {4096, 8}};
  for (const auto [piece_bytes, buffers] : kBounds) {
    const auto pieces = static_cast<uint32_t>(kLinkBytes / blocks / piece_bytes);
    std::vector<double> link, read;
    for (int launch = 0; launch < kLaunches; ++launch) {
      // Each reads what no other has, of both.
      const uint64_t parts = kHostBytes / kLinkBytes, places = kMemoryBytes / kDeviceBytes;
      ReadBoth<<<blocks, kThreads, kSharedBytes>>>(
          host + launch % parts * kLinkBytes, pieces, piece_bytes, buffers,
          memory + launch % places * kDeviceBytes / sizeof(uint4), kDeviceBytes / sizeof(uint4),
          sink, times);
      Require(cudaGetLastError(), "ReadBoth");
      std::vector<Times> took(blocks);
      Require(cudaMemcpy(took.data(), times, blocks * sizeof(Times), cudaMemcpyDeviceToHost),
              "ReadBoth");
      Times most = {};
      for (const Times& block : took) {
        most.link = std::max(most.link, block.link);
        most.memory = std::max(most.memory, block.memory);
      }
      link.push_back(static_cast<double>(uint64_t{pieces} * piece_bytes * blocks) /
                     static_cast<double>(most.link));
      read.push_back(static_cast<double>(most.memory) * 1e-3);
    }
    std::printf("%10u %12.1f %12.1f\n", piece_bytes * buffers * blocks / 1024,
                Median(std::move(link)), Median(std::move(read)));
  }
  return 0;
}

}  // namespace
}  // namespace clusterkv::gpu::cuda

int main() { return clusterkv::gpu::cuda::Run(); }
