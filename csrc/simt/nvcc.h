// The dialect for nvcc: thin names for what the language and the runtime library have.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <initializer_list>

#include "../dtype.h"
#include "../stream.h"

#define MK_FN __device__ __forceinline__
#define MK_KERNEL static __global__
// Between MK_KERNEL and void: the most threads a block of this kernel may have, and the fewest blocks that must fit on a
// multiprocessor; the compiler shares out registers accordingly.
#define MK_MAX_THREADS(...) __launch_bounds__(__VA_ARGS__)
#define MK_UNROLL _Pragma("unroll")
#define MK_NO_UNROLL _Pragma("unroll 1")

// A shared array: `count` elements of `type`, of unknown value at first, as a Shared<type> called `name`.
#define MK_SHARED(type, name, count)                                           \
  __shared__ __align__(16) unsigned char name##_bytes[sizeof(type) * (count)]; \
  ::mk::simt::Shared<type> name { reinterpret_cast<type*>(name##_bytes) }

namespace mk::math {

// One instruction, 2 ulp; results below the smallest normal number are 0.
MK_FN float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two instructions, 2 ulp, for |b| < 2^126; beyond that 0. A b below the smallest normal number counts as 0.
MK_FN float divide(float a, float b) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return a * reciprocal;
}
MK_FN float rsqrt(float x) { return ::rsqrtf(x); }
MK_FN float log(float x) { return ::logf(x); }
// NaN where either is.
MK_FN float maximum(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

}  // namespace mk::math

namespace mk::simt {

// Where in the source a call stands; the host build's reports show it.
struct Site {};

MK_FN int thread() { return int(threadIdx.x); }
MK_FN int threads() { return int(blockDim.x); }
MK_FN int64_t block() { return blockIdx.x; }
MK_FN int64_t blocks() { return gridDim.x; }

MK_FN void sync_block(Site = {}) { __syncthreads(); }
MK_FN void sync_warp(Site = {}) { __syncwarp(); }

// The value that lane `lane() ^ mask` hands in.
template <class T>
MK_FN T shuffle_xor(T value, int mask, Site = {}) {
  static_assert(sizeof(T) % 4 == 0, "whole words");
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
  MK_UNROLL
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffffu, word, mask);
  memcpy(&value, words, sizeof value);
  return value;
}

template <class T>
struct Shared {
  T* data;
  MK_FN T get(int i, Site = {}) const { return data[i]; }
  MK_FN void set(int i, T value, Site = {}) const { data[i] = value; }
};

template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<1> {
  using type = unsigned char;
};

template <int kBytes, bool kOnce>
MK_FN void load_bytes(const void* p, void* to, Site) {
  using W = typename Word<kBytes>::type;
  W word = kOnce ? __ldcs(static_cast<const W*>(p)) : *static_cast<const W*>(p);
  memcpy(to, &word, kBytes);
}
template <int kBytes, bool kOnce>
MK_FN void store_bytes(void* p, const void* from, Site) {
  using W = typename Word<kBytes>::type;
  W word;
  memcpy(&word, from, kBytes);
  if (kOnce)
    __stcs(static_cast<W*>(p), word);
  else
    *static_cast<W*>(p) = word;
}

MK_FN float as_float(uint32_t bits) { return __uint_as_float(bits); }
MK_FN uint32_t as_bits(float x) { return __float_as_uint(x); }

// Two 16-bit elements of a word, the one at the lower address in the lower half.
MK_FN void unpack(Type<bfloat16>, uint32_t word, float& low, float& high) {
  low = as_float(word << 16);
  high = as_float(word & 0xffff0000u);
}
MK_FN void unpack(Type<half>, uint32_t word, float& low, float& high) {
  __half2 pair;
  memcpy(&pair, &word, 4);
  low = __low2float(pair);
  high = __high2float(pair);
}
MK_FN uint32_t pack(Type<bfloat16>, float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
MK_FN uint32_t pack(Type<half>, float low, float high) {
  __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

// What a kernel is to do with a tensor of n elements, for the host build's checks.
struct Tensor {};
template <class T>
Tensor reads(const char*, const T*, int64_t) {
  return {};
}
template <class T>
Tensor writes(const char*, T*, int64_t) {
  return {};
}
template <class T>
Tensor updates(const char*, T*, int64_t) {
  return {};
}

inline int multiprocessors(Stream stream) {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, stream.device);
  return count > 0 ? count : 1;
}

// Starts `blocks` blocks of `threads` threads on the stream, and does not wait for them. No blocks: nothing to do.
template <class... Parameters, class... Arguments>
Error launch(const char*, std::initializer_list<Tensor>, int64_t blocks, int threads, Stream stream, void (*kernel)(Parameters...),
             Arguments... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks < 0 || blocks > 0x7fffffff) return "the grid needs more than 2^31 - 1 blocks";
  if (threads <= 0 || threads > 1024 || threads % 32) return "a block has whole warps and at most 1024 threads";
  // This library has a runtime of its own (linked statically), which learns of the device here; the caller's guard puts it back.
  cudaError_t error = cudaSetDevice(stream.device);
  if (error == cudaSuccess) {
    kernel<<<unsigned(blocks), unsigned(threads), 0, static_cast<cudaStream_t>(stream.handle)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mk::simt
