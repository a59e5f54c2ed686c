// What the C++ tests share: number formats, buffers that catch stray reads and writes, and ways to run a parallel loop.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <thread>
#include <vector>

#include "../../csrc/dtype.h"
#include "../../csrc/parallel_for.h"
#include "../../csrc/simt/report.h"
#include "../../csrc/stream.h"

// Defines a test; main.cpp runs every test of a program.
#define TEST(name)                                         \
  static void name();                                      \
  static const bool name##_added = test::add(#name, name); \
  static void name()
#define CHECK(condition) ((condition) ? void() : test::fail("%s:%d: %s", __FILE__, __LINE__, #condition))

namespace test {

using mk::DType;
using mk::ParallelFor;
using Real = long double;  // what expected values are computed in

bool add(const char* name, void (*run)());
// Says in every later failure what was being tested.
void describe(const char* format, ...) __attribute__((format(printf, 1, 2)));
void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// A binary floating point format: significant bits, and the exponent of the smallest normal number.
struct Format {
  const char* name;
  int bytes, digits, lowest;
};
constexpr Format kFormats[] = {
    {"float32", 4, 24, -126}, {"float16", 2, 11, -14}, {"bfloat16", 2, 8, -126}, {"float64", 8, 53, -1022}};

inline Format format(DType type) { return kFormats[int(type)]; }
inline Real eps(DType type) { return ldexpl(1, 1 - format(type).digits); }
inline Real tiny(DType type) { return ldexpl(1, format(type).lowest); }  // smallest normal
inline DType acc(DType type) { return type == DType::f64 ? DType::f64 : DType::f32; }

// A 16-bit format's number, and the nearest pattern (ties to even) of a number; written from the definition of the formats.
inline double decode(uint16_t bits, Format f) {
  int fraction = f.digits - 1, field = (bits & 0x7fff) >> fraction, mantissa = bits & ((1 << fraction) - 1);
  double value = field == (0x7fff >> fraction) ? (mantissa ? NAN : INFINITY)
                 : field                       ? ldexp(mantissa + (1 << fraction), field - 1 + f.lowest - fraction)
                                               : ldexp(mantissa, f.lowest - fraction);
  return bits & 0x8000 ? -value : value;
}
inline uint16_t encode(double value, Format f) {
  int fraction = f.digits - 1, infinity = (0x7fff >> fraction) << fraction, exponent;
  uint16_t sign = signbit(value) ? 0x8000 : 0;
  if (isnan(value)) return sign | infinity | 1 << (fraction - 1);
  if (isinf(value)) return sign | infinity;
  if (value == 0) return sign;
  frexp(value, &exponent);
  int quantum = std::max(exponent, f.lowest + 1) - f.digits;
  double units = nearbyint(ldexp(fabs(value), -quantum));  // 2^fraction of them carry into the exponent by themselves
  double bits = (quantum - f.lowest + fraction) * ldexp(1, fraction) + units;
  return sign | uint16_t(std::min<double>(bits, infinity));
}

// Values in [-1, 1) from a seed, the same on every machine.
struct Random {
  uint64_t state;
  double operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return double(int64_t(state) >> 11) * 0x1p-52;
  }
};

// n elements, at first all NaN. With offset 0 they fill their allocation, so that AddressSanitizer sees an access one element
// outside; with offset 1 they lie one element past an aligned address, between guards that nobody may write.
class Buffer {
 public:
  Buffer(DType type, int64_t n, int offset) : type_(type), n_(n), offset_(offset) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes())) abort();
    memory_.reset(static_cast<char*>(memset(memory, 0xff, bytes())));
  }
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;
  ~Buffer() {
    bool intact = true;
    for (int64_t i = 0; memory_ && i < int64_t(offset_) * width(); ++i)
      intact &= memory_[i] == char(0xff) && memory_[int64_t(bytes()) - 1 - i] == char(0xff);
    if (!intact) fail("written outside a buffer of %ld elements", long(n_));
  }

  int64_t size() const { return n_; }
  void* data() { return memory_.get() + offset_ * width(); }
  const void* data() const { return memory_.get() + offset_ * width(); }
  bool operator==(const Buffer& other) const {
    return bytes() == other.bytes() && !memcmp(memory_.get(), other.memory_.get(), bytes());
  }

  double operator[](int64_t i) const {
    switch (type_) {
      case DType::f32: return static_cast<const float*>(data())[i];
      case DType::f64: return static_cast<const double*>(data())[i];
      default: return decode(static_cast<const uint16_t*>(data())[i], format(type_));
    }
  }
  void set(int64_t i, double value) {
    switch (type_) {
      case DType::f32: static_cast<float*>(data())[i] = float(value); break;
      case DType::f64: static_cast<double*>(data())[i] = value; break;
      default: static_cast<uint16_t*>(data())[i] = encode(value, format(type_));
    }
  }
  // Bell-shaped values about a centre; one in fifty is thirty times as far out.
  Buffer& fill(uint64_t seed, double centre = 0) {
    Random random{seed * 1000003 + 17};
    for (int64_t i = 0; i < n_; ++i) {
      double value = random() + random() + random();
      set(i, centre + value * (random() > 0.96 ? 30 : 1));
    }
    return *this;
  }

 private:
  struct Free {
    void operator()(char* memory) const { free(memory); }
  };
  int width() const { return format(type_).bytes; }
  size_t bytes() const { return size_t(n_ + 2 * offset_) * width(); }

  DType type_;
  int64_t n_;
  int offset_;
  std::unique_ptr<char[], Free> memory_;
};

// |actual[i] - expected| <= bound; NaN where and only where NaN is expected.
inline void near(const char* what, const Buffer& actual, int64_t i, Real expected, Real bound) {
  double value = actual[i];
  if (isnan(expected) ? isnan(value) : fabsl(value - expected) <= bound || value == expected) return;
  fail("%s[%ld] is %.9g, expected %.9Lg +- %.3Lg", what, long(i), value, expected, bound);
}

// Set by main: the kernels of csrc/cuda run, in the host build of their dialect, instead of those of csrc/cpu.
extern bool on_simt;

// What the kernels compute on.
inline std::vector<DType> types() {
  std::vector<DType> all = {DType::f32, DType::f16, DType::bf16};
  if (!on_simt) all.push_back(DType::f64);
  return all;
}

// call(BOTH(layer_norm_forward), {...}, pool): the function of either backend.
#define BOTH(function) mk::cpu::function, mk::cuda::function
template <class T>
struct Same {
  using type = T;
};
template <class Arguments>
void call(void (*cpu)(const Arguments&, ParallelFor), mk::Error (*cuda)(const Arguments&, mk::Stream),
          const typename Same<Arguments>::type& arguments, ParallelFor pool) {
  if (!on_simt) return cpu(arguments, pool);
  if (mk::Error error = cuda(arguments, {})) fail("the launch says: %s", error);
}
// What a workspace for such a call holds.
inline int64_t workspace_size(int64_t (*cpu)(int64_t, int64_t), int64_t (*cuda)(int64_t, int64_t, mk::Stream), int64_t rows,
                              int64_t cols) {
  return on_simt ? cuda(rows, cols, {}) : cpu(rows, cols);
}

using Body = void (*)(int64_t, int64_t, void*);

inline void serial(int64_t begin, int64_t end, int64_t, Body body, void* context) { body(begin, end, context); }

// One item at a time, the last first.
inline void backwards(int64_t begin, int64_t end, int64_t, Body body, void* context) {
  while (begin < end--) body(end, end + 1, context);
}

// Neighbouring items on different threads: what isn't apart shows up as a data race.
inline void two_threads(int64_t begin, int64_t end, int64_t, Body body, void* context) {
  auto every_other = [=](int64_t first) {
    for (int64_t i = first; i < end; i += 2) body(i, i + 1, context);
  };
  std::thread other(every_other, begin + 1);
  every_other(begin);
  other.join();
}

// What the finder found since the last call is a failure.
inline void expect_no_findings() {
  for (const mk::simt::host::Finding& f : mk::simt::host::take_findings()) fail("found %s", describe(f).c_str());
}

// What run(parallel_for) returns, a vector of output buffers; it must be the same bit by bit however the items are shared out, and
// in whatever order the threads of a GPU kernel run.
template <class Run>
std::vector<Buffer> on_every_pool(Run run) {
  std::vector<Buffer> out = run(serial);
  if (on_simt) {
    for (uint64_t seed : {1, 12345}) {
      mk::simt::host::options().seed = seed;
      if (run(serial) != out) fail("the result depends on the order of threads (seed %ld)", long(seed));
    }
    mk::simt::host::options().seed = 0;
    expect_no_findings();
    return out;
  }
  for (ParallelFor pool : {backwards, two_threads})
    if (run(pool) != out) fail("the result depends on how items are shared among threads");
  return out;
}

template <class... Buffers>
std::vector<Buffer> list(Buffers&&... buffers) {
  std::vector<Buffer> out;
  (out.push_back(std::move(buffers)), ...);
  return out;
}

}  // namespace test
