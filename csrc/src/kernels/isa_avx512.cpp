// The kernels for x86-64 with AVX-512 F, BW, VL, DQ, BF16 and VNNI.
#if defined(__x86_64__)
#define PLD_ISA_NS avx512
#include "isa.inl"
#endif
