// The dialect for any C++17 compiler: kernels are functions that run on the CPU, every thread of a block on a fiber of its own.
// host.cpp switches between them where they wait for each other, access.cpp checks what they touch, report.h tells what was found.
#pragma once
#include <stdint.h>
#include <string.h>

#include <initializer_list>

#include "../dtype.h"
#include "../stream.h"
#include "report.h"

#define MK_FN inline __attribute__((always_inline))
#define MK_KERNEL static
#define MK_MAX_THREADS(...)
#define MK_UNROLL
#define MK_NO_UNROLL
#define MK_SHARED(type, name, count)                                                                           \
  ::mk::simt::Shared<type> name {                                                                              \
    ::mk::simt::host::shared_array(#name, int(count), int(sizeof(type)), ::mk::simt::Site(__FILE__, __LINE__)) \
  }

namespace mk::math {

MK_FN float exp2(float x) { return __builtin_exp2f(x); }
MK_FN float divide(float a, float b) { return a / b; }
MK_FN float rsqrt(float x) { return 1.f / __builtin_sqrtf(x); }
MK_FN float log(float x) { return __builtin_logf(x); }
// NaN where either is.
MK_FN float maximum(float a, float b) { return a > b || a != a ? a : b; }

}  // namespace mk::math

namespace mk::simt {

// Where in the source a call stands: by default, where the function is called that has a Site for a parameter.
struct Site {
  const char* file;
  int line;
  constexpr Site(const char* f = __builtin_FILE(), int l = __builtin_LINE()) : file(f), line(l) {}
};

// What a kernel may do with a tensor of n elements. `writes` is for outputs, each element of which is written exactly once and
// never read; `updates` for memory that threads read and write as they like, as long as no two touch an element without a barrier
// between.
struct Tensor {
  const char* name;
  char* data;
  int64_t elements;
  int size;  // of an element, in bytes
  bool readable, writable;
};
template <class T>
Tensor reads(const char* name, const T* data, int64_t n) {
  return {name, reinterpret_cast<char*>(const_cast<T*>(data)), n, sizeof(T), true, false};
}
template <class T>
Tensor writes(const char* name, T* data, int64_t n) {
  return {name, reinterpret_cast<char*>(data), n, sizeof(T), false, true};
}
template <class T>
Tensor updates(const char* name, T* data, int64_t n) {
  return {name, reinterpret_cast<char*>(data), n, sizeof(T), true, true};
}

namespace host {

struct Position {
  int64_t block, blocks;
  int thread, threads;
};
extern Position here;  // of the thread that runs

void sync_block(Site);
void sync_warp(Site);
void exchange(void* value, int bytes, int mask, Site);
void load(const void* p, void* to, int bytes, Site);
void store(void* p, const void* from, int bytes, Site);

struct SharedArray {
  char* data;
  int number;  // among the arrays of the block
};
SharedArray shared_array(const char* name, int count, int size, Site);
// Whether the element is there; checks the access.
bool touch_shared(SharedArray, int i, bool writing, Site);

using Body = void (*)(void* context);
Error run(const char* kernel, std::initializer_list<Tensor>, int64_t blocks, int threads, Body, void* context);

}  // namespace host

MK_FN int thread() { return host::here.thread; }
MK_FN int threads() { return host::here.threads; }
MK_FN int64_t block() { return host::here.block; }
MK_FN int64_t blocks() { return host::here.blocks; }

MK_FN void sync_block(Site site = {}) { host::sync_block(site); }
MK_FN void sync_warp(Site site = {}) { host::sync_warp(site); }

template <class T>
MK_FN T shuffle_xor(T value, int mask, Site site = {}) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 32, "whole words, at most eight");
  host::exchange(&value, sizeof value, mask, site);
  return value;
}

template <class T>
struct Shared {
  host::SharedArray array;
  MK_FN T get(int i, Site site = {}) const {
    T value;
    if (host::touch_shared(array, i, false, site))
      memcpy(&value, array.data + i * int(sizeof(T)), sizeof(T));
    else
      memset(static_cast<void*>(&value), 0xff, sizeof(T));
    return value;
  }
  MK_FN void set(int i, T value, Site site = {}) const {
    if (host::touch_shared(array, i, true, site)) memcpy(array.data + i * int(sizeof(T)), &value, sizeof(T));
  }
};

template <int kBytes, bool kOnce>
MK_FN void load_bytes(const void* p, void* to, Site site) {
  host::load(p, to, kBytes, site);
}
template <int kBytes, bool kOnce>
MK_FN void store_bytes(void* p, const void* from, Site site) {
  host::store(p, from, kBytes, site);
}

MK_FN float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
MK_FN uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(Type<bfloat16>, uint32_t bits) { return as_float(bits << 16); }
inline float to_float(Type<half>, uint32_t bits) {
  uint32_t magnitude = (bits & 0x7fffu) << 13;
  // The exponents' biases differ by 112; infinities and NaNs go to the top, subnormals are normalised by one subtraction.
  float value = magnitude < 0x00800000u   ? as_float(magnitude + 0x38800000u) - as_float(0x38800000u)
                : magnitude < 0x0f800000u ? as_float(magnitude + 0x38000000u)
                                          : as_float(magnitude + 0x70000000u);
  return bits & 0x8000u ? -value : value;
}
inline uint32_t to_bits(Type<bfloat16>, float x) {
  uint32_t bits = as_bits(x);
  return x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fffu;
}
inline uint32_t to_bits(Type<half>, float x) {
  uint32_t bits = as_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffu;
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;
  // Adding 0.5 puts a subnormal half's bits, rounded by the addition itself, at the bottom of the mantissa.
  if (magnitude < 0x38800000u) return sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u);
  return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
}
template <class T>
void unpack(Type<T> type, uint32_t word, float& low, float& high) {
  low = to_float(type, word & 0xffffu);
  high = to_float(type, word >> 16);
}
template <class T>
uint32_t pack(Type<T> type, float low, float high) {
  return to_bits(type, low) | to_bits(type, high) << 16;
}

inline int multiprocessors(Stream) { return host::options().multiprocessors; }

template <class... Parameters, class... Arguments>
Error launch(const char* name, std::initializer_list<Tensor> tensors, int64_t blocks, int threads, Stream,
             void (*kernel)(Parameters...), Arguments... arguments) {
  auto body = [&] { kernel(arguments...); };
  return host::run(
      name, tensors, blocks, threads, [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
}

}  // namespace mk::simt
