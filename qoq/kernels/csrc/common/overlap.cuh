// A kernel may start while those before it in the stream still run (programmatic dependent launch, sm_90 and newer):
// what it does first must not depend on it. Launches of `build.Module` always allow this, so every kernel here waits
// before it touches memory that another kernel writes or reads; only constants, such as weights, and what the caller
// calls settled (attend.cuh) may be read earlier.
#pragma once

#if __CUDA_ARCH__ >= 900
constexpr bool OVERLAPS = true;
#else
constexpr bool OVERLAPS = false;
#endif

// Until every kernel before this one has ended and what it wrote is visible. For each thread by itself.
__device__ __forceinline__ void wait_for_predecessor() {
    if constexpr (OVERLAPS) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The next kernel may take the multiprocessors that this one leaves free.
__device__ __forceinline__ void allow_successor() {
    if constexpr (OVERLAPS) asm volatile("griddepcontrol.launch_dependents;");
}
