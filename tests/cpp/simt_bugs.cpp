// The finder is tested by bugs: one kernel, right where kBug is none, and wrong in one place for each other value. Every bug must
// be reported by its kind and place, in every order of threads; the right kernel must give right numbers and nothing to report.
#include "../../csrc/simt/simt.h"
#include "simt_testing.h"

using namespace mk;
using namespace mk::simt;
using test::begin;
using test::describe;
using test::fail;
using test::Kind;
using test::kSeeds;
using test::Mapping;

namespace {

enum Bug {
  none,
  removed_barrier,
  short_row_loop,
  tail_one_too_long,
  row_one_too_many,
  shared_not_written,
  shared_one_too_long,
  shuffle_in_a_branch,
  shuffle_after_return,
  barrier_in_a_branch,
  barrier_after_return,
  two_barriers_in_branches,
  misaligned_packet,
  int32_row_offset,
  two_threads_write,
  thread_writes_twice,
  write_into_input,
  read_of_output,
  block_reads_another,
  block_writes_another,
  race_in_a_tensor,
  an_exception,
};

constexpr int kThreads = 128, kWarps = 4, kRows = 3, kCols = 1024;

// y = x * (sum of the row), with the sum once more in `work`, [rows, 2]: each warp's part of it is added up in shared memory.
template <Bug kBug, class T, int W>
MK_KERNEL void scale_by_sum_kernel(const T* x, T* y, float* work, int64_t cols) {
  if (kBug == barrier_after_return && thread() >= 96) return;
  if (kBug == shuffle_after_return && thread() == 37) return;
  MK_SHARED(float, parts, kWarps);
  MK_SHARED(float, total, 1);
  int64_t row = block() * cols;
  if (kBug == int32_row_offset) row = int32_t(uint32_t(block()) * uint32_t(cols));
  const T* from = x + row;
  T* to = y + row;
  Span<W> s = {0, cols / W, cols % W};

  float sum = 0;
  Span<W> read = s;
  if (kBug == row_one_too_many) read.tail = 1;
  for_each_packet(read, whole_block(), [&](int64_t j, auto width) {
    auto v = widen(load(from + j, width));
    for (float e : v.v) sum += e;
  });
  if (kBug == shuffle_in_a_branch) {
    if (lane() < 16) sum = warp_reduce<16>(sum, Sum{});
    sum = shuffle_xor(sum, 16) + sum;
  } else {
    sum = warp_reduce(sum, Sum{});
  }
  if (lane() == 0 && !(kBug == shared_not_written && warp() == 2))
    parts.set(warp() + (kBug == shared_one_too_long && warp() == 3), sum);
  if (kBug == barrier_in_a_branch) {
    if (warp() < 2) sync_block();
  } else if (kBug == two_barriers_in_branches) {
    if (warp() < 2)
      sync_block();
    else
      sync_block();
  } else if (kBug != removed_barrier) {
    sync_block();
  }
  if (thread() == 0) {
    float all = 0;
    for (int w = 0; w < kWarps; ++w) all += parts.get(w);
    total.set(0, all);
    store_one(work + block() * 2, all);
  }
  sync_block();
  float factor = total.get(0);
  if (thread() == 1) {
    if (kBug == race_in_a_tensor) store_one(work + block() * 2 + 1, 1.f);
    store_one(work + block() * 2 + 1, load_one(work + block() * 2));
  }
  if (kBug == race_in_a_tensor && thread() == 64) store_one(work + block() * 2 + 1, 2.f);
  if (kBug == block_reads_another && thread() == 5) factor += 0 * load_one(work + (block() + 1) % blocks() * 2);
  if (kBug == block_writes_another && thread() == 5) store_one(work + (block() + 1) % blocks() * 2 + 1, 1.f);

  Span<W> write = s;
  if (kBug == short_row_loop) --write.packets;
  if (kBug == tail_one_too_long) ++write.tail;
  int64_t shift = kBug == misaligned_packet;
  for_each_packet(write, whole_block(), [&](int64_t j, auto width) {
    auto v = widen(load(from + j - (j > 0 ? shift : 0), width));
    for (float& e : v.v) e *= factor;
    store(to + j, v);
  });
  if (kBug == two_threads_write && thread() == 7 && block() == 1) store_one(to + 10, factor);
  if (kBug == thread_writes_twice && thread() == 0 && block() == 1) store_one(to + 1, factor);
  if (kBug == write_into_input && thread() == 3 && block() == 2) store_one(const_cast<T*>(from) + 5, factor);
  if (kBug == read_of_output && thread() == 3 && block() == 2) factor = load_one(to + 5);
#if !defined(__CUDACC__)
  if (kBug == an_exception && thread() == 3) throw 1;
#endif
}

struct Run {
  std::vector<float> y, work;
  std::vector<test::Finding> findings;
};

template <Bug kBug, class T = float, int W = kFull<T>>
Run run(uint64_t seed) {
  describe("bug %d, seed %ld", int(kBug), long(seed));
  test::Options options;
  options.seed = seed;
  begin(options);
  test::Buffer x(sizeof(T) == 4 ? DType::f32 : DType::bf16, kRows * kCols, 0),
      y(sizeof(T) == 4 ? DType::f32 : DType::bf16, kRows * kCols, 0);
  for (int64_t i = 0; i < x.size(); ++i) x.set(i, double(i % 5) / 4);
  Run out;
  out.work.assign(kRows * 2, 0.f);
  T* to = static_cast<T*>(y.data());
  const T* from = static_cast<const T*>(x.data());
  float* work = out.work.data();
  const char* error =
      launch("scale_by_sum", {reads("x", from, x.size()), writes("y", to, y.size()), updates("work", work, kRows * 2)}, kRows,
             kThreads, {}, scale_by_sum_kernel<kBug, T, W>, from, to, work, int64_t(kCols));
  test::expect_ok(error);
  for (int64_t i = 0; i < y.size(); ++i) out.y.push_back(float(y[i]));
  out.findings = simt::host::take_findings();
  return out;
}

// Where a finding must be; -1 and null: anywhere.
struct Expected {
  Kind kind;
  const char* tensor;
  int64_t element = -1, block = -1;
  int thread = -1;
};

template <Bug kBug>
void expect(const Expected& e) {
  for (uint64_t seed : kSeeds) {
    Run r = run<kBug>(seed);
    bool found = false;
    for (const test::Finding& f : r.findings)
      found |= f.kind == e.kind && f.kernel == "scale_by_sum" && f.tensor == e.tensor &&
               (e.element < 0 || f.element == e.element) && (e.block < 0 || f.block == e.block) &&
               (e.thread < 0 || f.thread == e.thread) &&
               (e.kind == Kind::unwritten || e.kind == Kind::bad_launch || strstr(f.what.c_str(), "(simt_bugs.cpp:"));
    if (found) continue;
    fail("not found; %ld other findings", long(r.findings.size()));
    for (const test::Finding& f : r.findings)
      fail("%s, %s[%ld]", simt::host::describe(f).c_str(), f.tensor.c_str(), long(f.element));
  }
}

template <class T, int W>
void expect_right() {
  for (uint64_t seed : kSeeds) {
    Run r = run<none, T, W>(seed);
    for (const test::Finding& f : r.findings) fail("found %s", simt::host::describe(f).c_str());
    for (int row = 0; row < kRows; ++row) {
      float sum = 0;
      for (int j = 0; j < kCols; ++j) sum += float((row * kCols + j) % 5) / 4;
      CHECK(r.work[size_t(row * 2)] == sum && r.work[size_t(row * 2 + 1)] == sum);
      for (int j = 0; j < kCols; ++j) {
        float exact = float((row * kCols + j) % 5) / 4 * sum;
        CHECK(fabsf(r.y[size_t(row * kCols + j)] - exact) <= (sizeof(T) == 4 ? 0.f : exact / 256));
      }
    }
  }
}

}  // namespace

TEST(right_kernel) {
  expect_right<float, 4>();
  expect_right<float, 1>();
  expect_right<bfloat16, 8>();
  expect_right<bfloat16, 1>();
}
TEST(a_removed_barrier) { expect<removed_barrier>({Kind::shared_race, "parts"}); }
TEST(a_row_loop_that_ends_early) { expect<short_row_loop>({Kind::unwritten, "y", kCols - 4}); }
// In the last row the tail leaves the tensor, in the others it meets the next row.
TEST(a_tail_one_too_long) {
  expect<tail_one_too_long>({Kind::out_of_bounds, "y", kRows * kCols, kRows - 1, 0});
  expect<tail_one_too_long>({Kind::written_twice, "y"});
}
TEST(a_load_past_the_end) { expect<row_one_too_many>({Kind::out_of_bounds, "x", kRows * kCols, kRows - 1, 0}); }
TEST(shared_used_before_written) { expect<shared_not_written>({Kind::uninitialised_shared, "parts", 2, -1, 0}); }
TEST(a_shared_array_one_too_short) { expect<shared_one_too_long>({Kind::shared_bounds, "parts", 4, -1, 96}); }
TEST(a_shuffle_in_a_branch) { expect<shuffle_in_a_branch>({Kind::divergent_shuffle, ""}); }
TEST(a_shuffle_after_a_return) { expect<shuffle_after_return>({Kind::divergent_shuffle, "", -1, -1, 32}); }
TEST(a_barrier_in_a_branch) { expect<barrier_in_a_branch>({Kind::divergent_barrier, ""}); }
TEST(a_barrier_after_a_return) { expect<barrier_after_return>({Kind::divergent_barrier, "", -1, -1, 0}); }
TEST(two_barriers_in_two_branches) { expect<two_barriers_in_branches>({Kind::divergent_barrier, ""}); }
TEST(a_misaligned_packet) { expect<misaligned_packet>({Kind::misaligned, "x"}); }
TEST(two_threads_write_one_element) { expect<two_threads_write>({Kind::written_twice, "y", kCols + 10, 1}); }
TEST(a_thread_writes_twice) { expect<thread_writes_twice>({Kind::written_twice, "y", kCols + 1, 1, 0}); }
TEST(a_write_into_an_input) { expect<write_into_input>({Kind::not_writable, "x", 2 * kCols + 5, 2, 3}); }
TEST(a_read_of_an_output) { expect<read_of_output>({Kind::not_readable, "y", 2 * kCols + 5, 2, 3}); }
TEST(a_block_reads_what_another_writes) { expect<block_reads_another>({Kind::global_race, "work"}); }
TEST(a_block_writes_what_another_writes) { expect<block_writes_another>({Kind::global_race, "work"}); }
TEST(a_race_in_a_tensor) { expect<race_in_a_tensor>({Kind::global_race, "work"}); }
TEST(an_exception_ends_its_thread_only) {
  expect<an_exception>({Kind::bad_launch, "", -1, -1, 3});
  expect_right<float, 4>();
}

// A store into an input is dropped, so the rest of the kernel computes what it would have.
TEST(inputs_stay_as_they_are) {
  Run wrong = run<write_into_input>(1), right = run<none>(1);
  CHECK(wrong.y == right.y && wrong.work == right.work);
}

namespace {

template <Bug kBug>
std::vector<test::Finding> run_last_block(int64_t rows) {
  test::Options options;
  options.first_block = rows - 1;
  begin(options);
  Mapping x(rows * kCols * 2), y(rows * kCols * 2), work(rows * 2 * 4);
  const bfloat16* from = reinterpret_cast<const bfloat16*>(x.data);
  bfloat16* to = reinterpret_cast<bfloat16*>(y.data);
  float* sums = reinterpret_cast<float*>(work.data);
  for (int64_t j = 0; j < kCols; ++j) reinterpret_cast<bfloat16*>(x.data)[(rows - 1) * kCols + j].bits = 0x3f80;
  test::expect_ok(launch("scale_by_sum",
                         {reads("x", from, rows * kCols), writes("y", to, rows * kCols), updates("work", sums, rows * 2)}, rows,
                         kThreads, {}, scale_by_sum_kernel<kBug, bfloat16, 8>, from, to, sums, int64_t(kCols)));
  if (kBug == none) {
    CHECK(sums[(rows - 1) * 2] == kCols);
    CHECK(to[rows * kCols - 1].bits == 0x4480);  // 1024
  }
  test::expect_traffic(simt::host::take_traffic(), "x", kBug == none ? 2 * kCols * 2 : 0, 0);
  return simt::host::take_findings();
}

}  // namespace

TEST(an_int32_row_offset) {
  constexpr int64_t kManyRows = (int64_t(1) << 21) + 1;  // the last begins at element 2^31
  describe("%s", "64-bit offset");
  for (const test::Finding& f : run_last_block<none>(kManyRows)) fail("found %s", simt::host::describe(f).c_str());
  describe("%s", "32-bit offset");
  bool loads = false, stores = false;
  for (const test::Finding& f : run_last_block<int32_row_offset>(kManyRows)) {
    bool here = f.kind == Kind::out_of_bounds && f.block == kManyRows - 1;
    loads |= here && strstr(f.what.c_str(), "loads");
    stores |= here && strstr(f.what.c_str(), "stores");
  }
  CHECK(loads && stores);
}
