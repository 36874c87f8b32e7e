// The kernels for processors of x86 with vectors of 256 bits: 4 to 5 times as fast.

#if defined(__x86_64__)
#if defined(__clang__)  // has no such pragma of GCC's, and would leave the kernels as slow as the others
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define KERNEL(name) name##_avx2
#include "kernels.c"
#include "summaries.c"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
