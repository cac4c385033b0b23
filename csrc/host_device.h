// The mark of a function that host and device code both call.
#pragma once

#ifdef __CUDACC__
#define LYAPCUDA_HOST_DEVICE __host__ __device__
#else
#define LYAPCUDA_HOST_DEVICE
#endif
