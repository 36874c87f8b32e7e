// The kernels for processors of x86 with vectors of 256 bits: 4 to 5 times as fast.

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define KERNEL(name) name##_avx2
#include "kernels.c"
#endif
