// The dialect's parts by themselves: conversions of 16-bit numbers, spans, reductions, races among the lanes of a warp, and speed.
#include <chrono>

#include "../../csrc/simt/simt.h"
#include "simt_testing.h"

using namespace mk;
using namespace mk::simt;
using test::describe;
using test::fail;
using test::kSeeds;

namespace {

template <class T>
void check_conversions(test::Format f) {
  describe("%s", f.name);
  for (uint32_t i = 0; i < 65536; ++i) {
    double exact = test::decode(uint16_t(i), f);
    float low, high;
    unpack(Type<T>{}, i | 0x3c000000u, low, high);
    if (isnan(exact) ? !isnan(low) : low != exact || signbit(low) != signbit(exact)) fail("%04x loads as %g", i, low);
    uint32_t back = pack(Type<T>{}, low, high);
    if (back >> 16 != 0x3c00u || (isnan(exact) ? !isnan(test::decode(uint16_t(back), f)) : (back & 0xffff) != i))
      fail("%04x comes back as %08x", i, back);
  }
  for (uint64_t bits = 0; bits <= UINT32_MAX; bits += 1021) {
    float x = as_float(uint32_t(bits));
    uint16_t stored = uint16_t(pack(Type<T>{}, x, 0.f));
    if (isnan(x) ? !isnan(test::decode(stored, f)) : stored != test::encode(x, f)) fail("%a is stored as %04x", x, stored);
  }
  for (uint32_t i = 0; i < 0x7bff; ++i) {  // ties between neighbours
    double a = test::decode(uint16_t(i), f), b = test::decode(uint16_t(i + 1), f);
    float tie = float((a + b) / 2);
    if (isinf(b)) break;
    if (pack(Type<T>{}, tie, 0.f) != test::encode(tie, f)) fail("the tie %a is stored wrongly", tie);
  }
}

MK_KERNEL void count_lanes_kernel(float* out) {
  MK_SHARED(float, scratch, 8);
  float four = warp_reduce<4>(float(lane()), Sum{}), top = block_reduce(float(thread()), Max{}, -1.f, scratch);
  store_one(out + block() * threads() + thread(), four + 1000 * top);
}

// Each warp passes a value to its next lane through shared memory.
template <bool kBarrier>
MK_KERNEL void neighbours_kernel(float* out) {
  MK_SHARED(float, scratch, 64);
  scratch.set(thread(), float(thread()));
  if (kBarrier) sync_warp();
  store_one(out + thread(), scratch.get(thread() ^ 1));
}

// y may be x; each thread loads the element `ahead` of its own, so with y = x and ahead > 0 it meets its neighbour's store.
MK_KERNEL void double_kernel(const float* x, float* y, int ahead) {
  store_one(y + thread(), 2 * load_one(x + (thread() + ahead) % threads()));
}
// Every lane reads what lane 0 then writes, with nothing or a warp barrier between.
template <bool kBarrier>
MK_KERNEL void read_then_write_kernel(float* out) {
  MK_SHARED(float, scratch, 1);
  if (thread() == 0) scratch.set(0, 1.f);
  sync_block();
  store_one(out + thread(), scratch.get(0));
  if (kBarrier) sync_warp();
  if (thread() == 0) scratch.set(0, 2.f);
}

std::vector<int> seen;  // lanes, as they come out of a shuffle
MK_KERNEL void log_order_kernel(float* out) {
  store_one(out + thread(), shuffle_xor(float(lane()), 1));
  seen.push_back(lane());
}

bool found_race(test::Kind kind) {
  bool race = false;
  for (const test::Finding& f : simt::host::take_findings()) race |= f.kind == kind;
  return race;
}

template <class Kernel>
std::vector<float> launch_with_output(Kernel kernel, int64_t blocks, int threads, uint64_t seed) {
  test::Options options;
  options.seed = seed;
  test::begin(options);
  std::vector<float> out(size_t(blocks * threads), NAN);
  test::expect_ok(launch("kernel", {writes("out", out.data(), int64_t(out.size()))}, blocks, threads, {}, kernel, out.data()));
  return out;
}

template <class T, int W>
MK_KERNEL void softmax_kernel(const T* x, T* y, int64_t cols) {
  MK_SHARED(float, tops, 8);
  MK_SHARED(float, sums, 8);
  x += block() * cols;
  y += block() * cols;
  auto row = load_row<2>(x, span<W>(x, cols), whole_block());
  float top = -kInfinity<float>, sum = 0;
  row.for_each([&](int64_t, auto& p) {
    for (float e : widen(p).v) top = Max{}(top, e);
  });
  top = block_reduce(top, Max{}, -kInfinity<float>, tops);
  row.for_each([&](int64_t, auto& p) {
    for (float e : widen(p).v) sum += math::exp2(e - top);
  });
  sum = block_reduce(sum, Sum{}, 0.f, sums);
  row.for_each([&](int64_t j, auto& p) {
    auto v = widen(p);
    for (float& e : v.v) e = math::exp2(e - top) / sum;
    store_once(y + j, v);
  });
}

}  // namespace

TEST(half_conversions) { check_conversions<half>(test::format(DType::f16)); }
TEST(bfloat16_conversions) { check_conversions<bfloat16>(test::format(DType::bf16)); }

// Every column once, packets at multiples of 16 bytes, whatever the row's start and length.
TEST(spans_cover_rows) {
  alignas(16) static bfloat16 row[64];
  for (int offset = 0; offset < 8; ++offset)
    for (int cols = 1; cols < 50; ++cols)
      for (int size : {1, 4, 32}) {
        describe("offset %d, %d columns, %d threads", offset, cols, size);
        std::vector<int> seen(size_t(cols), 0);
        Span<8> s = span<8>(row + offset, cols);
        for (int rank = 0; rank < size; ++rank)
          for_each_packet(s, Team{rank, size}, [&](int64_t j, auto width) {
            constexpr int W = decltype(width)::value;
            if (W > 1) CHECK((offset + j) % W == 0);
            for (int i = 0; i < W; ++i) ++seen.at(size_t(j + i));
          });
        CHECK(std::count(seen.begin(), seen.end(), 1) == cols);
      }
}

TEST(bytes_and_integers_of_packets) {
  Packet<uint8_t, 8> bytes = {{0x83828180u, 0x87868584u}};
  for (int i = 0; i < 8; ++i) CHECK(bytes.get(i) == 0x80 + i);
  Packet<int64_t, 1> number = {{0xfffffff0u, 0xffffffffu}};
  CHECK(number.get(0) == -16);
}

TEST(reductions) {
  for (uint64_t seed : kSeeds) {
    std::vector<float> out = launch_with_output(count_lanes_kernel, 3, 96, seed);
    test::expect_no_findings();
    for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == float(i % 32 / 4 * 16 + 6) + 95000);
  }
}

TEST(a_warp_barrier_orders_a_warp) {
  for (uint64_t seed : kSeeds) {
    std::vector<float> out = launch_with_output(neighbours_kernel<true>, 1, 64, seed);
    test::expect_no_findings();
    for (int i = 0; i < 64; ++i) CHECK(out[size_t(i)] == float(i ^ 1));
    launch_with_output(neighbours_kernel<false>, 1, 64, seed);
    bool race = false;
    for (const test::Finding& f : simt::host::take_findings())
      race |= f.kind == test::Kind::shared_race || f.kind == test::Kind::uninitialised_shared;
    CHECK(race);
  }
}

TEST(a_read_before_a_write_is_a_race_too) {
  for (uint64_t seed = 0; seed < 400; ++seed) {  // in some orders the thread that writes is the last to read
    describe("seed %ld", long(seed));
    launch_with_output(read_then_write_kernel<true>, 1, 32, seed);
    test::expect_no_findings();
    launch_with_output(read_then_write_kernel<false>, 1, 32, seed);
    CHECK(found_race(test::Kind::shared_race));
    launch_with_output(read_then_write_kernel<true>, 1, 64, seed);  // a warp barrier does not order two warps
    CHECK(found_race(test::Kind::shared_race));
  }
}

TEST(the_seed_orders_lanes) {
  std::vector<std::vector<int>> orders;
  for (uint64_t seed : {1, 1, 2, 3}) {
    seen.clear();
    launch_with_output(log_order_kernel, 1, 32, seed);
    orders.push_back(seen);
  }
  CHECK(orders[0] == orders[1]);
  CHECK(orders[0] != orders[2] && orders[2] != orders[3]);
  for (const std::vector<int>& order : orders)
    CHECK(!std::is_sorted(order.begin() + 1, order.end()));  // the last to arrive is first
}

TEST(in_place) {
  for (uint64_t seed : kSeeds)
    for (int ahead : {0, 1}) {
      describe("seed %ld, %d ahead", long(seed), ahead);
      test::Options options;
      options.seed = seed;
      test::begin(options);
      std::vector<float> x(64, 3.f);
      test::expect_ok(launch("double", {reads("x", x.data(), 64), writes("y", x.data(), 64)}, 1, 64, {}, double_kernel, x.data(),
                             x.data(), ahead));
      auto traffic = simt::host::take_traffic();
      test::expect_traffic(traffic, "x", 256, 0);
      test::expect_traffic(traffic, "y", 0, 256);
      if (ahead) {
        CHECK(found_race(test::Kind::global_race));
      } else {
        test::expect_no_findings();
        CHECK(std::count(x.begin(), x.end(), 6.f) == 64);
      }
    }
}

TEST(tensors_that_overlap_in_part_are_reported) {
  test::begin({});
  std::vector<float> x(65, 3.f);
  const float* from = x.data();
  test::expect_ok(
      launch("double", {reads("x", from, 64), writes("y", x.data() + 1, 64)}, 1, 64, {}, double_kernel, from, x.data() + 1, 0));
  CHECK(found_race(test::Kind::bad_launch));
}

TEST(launches_from_several_threads) {
  std::vector<float> a(64, 1.f), b(64, 1.f);
  test::begin({});
  auto work = [](std::vector<float>& x) {
    for (int i = 0; i < 20; ++i)
      launch("double", {reads("x", x.data(), 64), writes("y", x.data(), 64)}, 1, 64, {}, double_kernel, x.data(), x.data(), 0);
  };
  std::thread other([&] { work(b); });
  work(a);
  other.join();
  test::expect_no_findings();
  CHECK(a == b && a[63] == 0x1p20f);
}

TEST(impossible_launches_are_refused) {
  test::begin({});
  float out = 0;
  auto with = [&](int64_t blocks, int threads) {
    return launch("kernel", {writes("out", &out, 1)}, blocks, threads, {}, neighbours_kernel<true>, &out);
  };
  CHECK(with(1, 33) && with(1, 0) && with(1, 1056) && with(-1, 32) && with(int64_t(1) << 31, 32));
  CHECK(!with(0, 32));
  test::expect_no_findings();
}

// 2^19 elements by 65536 threads; about 50 ms on an idle core without a sanitizer.
TEST(speed) {
  constexpr int64_t kRows = 256, kCols = 2048;
  std::vector<bfloat16> x(kRows * kCols, bfloat16{0x3f80}), y(x.size());
  for (bool shadow : {false, true}) {
    test::Options options;
    options.shadow = shadow;
    test::begin(options);
    auto start = std::chrono::steady_clock::now();
    int64_t n = int64_t(x.size());
    const bfloat16* from = x.data();
    test::expect_ok(launch("softmax", {reads("x", from, n), writes("y", y.data(), n)}, kRows, 256, {}, softmax_kernel<bfloat16, 8>,
                           from, y.data(), kCols));
    std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - start;
    test::expect_no_findings();
    CHECK(y[5].bits == 0x3a00);  // 2^-11
    printf("256 blocks of 256 threads: %.0f ms%s\n", taken.count(), shadow ? " with shadow" : "");
  }
}
