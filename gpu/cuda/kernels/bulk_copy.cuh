// Hopper's bulk copies: one thread moves kilobytes between global and shared memory, without
// registers; arrivals are counted by a barrier in shared memory. Compiled for sm_90 and later only.
#pragma once

#include <cstdint>

namespace clusterkv::gpu::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ inline void InitBarrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Starts a copy of `bytes`, a multiple of 16; the barrier's phase completes when all have arrived.
__device__ inline void StartBulkLoad(void* shared, const void* global, uint32_t bytes,
                                     uint64_t* barrier) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}

__device__ inline void WaitBarrier(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(phase)
      : "memory");
}

__device__ inline void StartBulkStore(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(SharedAddress(shared)), "r"(bytes)
               : "memory");
}
__device__ inline void CommitBulkStores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// This thread's stores have left shared memory.
__device__ inline void WaitBulkReads() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// This thread's stores are complete.
__device__ inline void WaitBulkStores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#endif

}  // namespace clusterkv::gpu::cuda
