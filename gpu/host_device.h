// For functions that plain C++ and kernels share.
#pragma once

#if defined(__CUDACC__)
#define CLUSTERKV_HOST_DEVICE __host__ __device__
#else
#define CLUSTERKV_HOST_DEVICE
#endif
