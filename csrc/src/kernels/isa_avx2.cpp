// The kernels for x86-64 with AVX2, FMA and F16C.
#if defined(__x86_64__)
#define PLD_ISA_NS avx2
#include "isa.inl"
#endif
