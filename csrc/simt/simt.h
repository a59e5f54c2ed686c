// The dialect in which GPU kernels are written. nvcc compiles them for a GPU; g++ compiles the same text into functions that run on
// the CPU, one fiber per thread, under checks that find a kernel's bugs. docs/kernels.md is the introduction.
//
//   nvcc.h or host.h   launch, thread numbers, barriers, shuffles, shared arrays, access to memory, 16-bit conversions
//   math.h             functions of one float
//   vec.h              packets: 16 bytes of a row, and the walk over a row in packets
//   reduce.h           reductions over a warp and over a block
#pragma once
#if defined(__CUDACC__)
#include "nvcc.h"
#else
#include "host.h"
#endif

#include "math.h"
#include "vec.h"
#include "reduce.h"
