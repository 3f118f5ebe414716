// The kernels for any machine.
#define PLD_ISA_NS portable
#include "isa.inl"
