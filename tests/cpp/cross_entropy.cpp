// cross_entropy against its formula in long double: a whole vocabulary, the same cut into shards, in place and not.
#include "../../csrc/cross_entropy.h"

#include "simt_testing.h"

using namespace test;

namespace {

constexpr int64_t kIgnore = -100;

struct Case {
  DType type;
  int64_t rows, cols, classes;  // columns beyond the classes are padding
  double smoothing = 0, z_loss = 0;
  bool shards = false;
};

struct Problem {
  Case c;
  int offset;
  Buffer logits, dloss, lse;  // lse is the exact one, rounded, for the backward
  std::vector<int64_t> target;
  std::vector<Real> exact_lse, loss, reach;  // reach is the size of what cancels in a row's loss

  Problem(const Case& which, int off)
      : c(which),
        offset(off),
        logits(c.type, c.rows * c.cols, off),
        dloss(acc(c.type), c.rows, off),
        lse(acc(c.type), c.rows, off) {
    logits.fill(1), dloss.fill(2);
    Random random{5};
    for (int64_t row = 0; row < c.rows; ++row) {
      int64_t t = int64_t((random() + 1) / 2 * double(c.classes));
      if (row == 0) t = 0;
      if (row == 1) t = c.classes - 1;
      if (row == 2 || row == 4) t = std::min(c.classes - 1, c.cols / (row == 2 ? 2 : 3));  // where a shard ends
      if (row % 5 == 3) t = kIgnore;
      target.push_back(t);
      for (int64_t j = c.classes; j < c.cols; ++j) logits.set(row * c.cols + j, j % 2 ? NAN : INFINITY);  // padding may be anything
      Real top = -INFINITY, exps = 0, sum = 0, size = 0;
      for (int64_t j = 0; j < c.classes; ++j) top = std::max(top, x(row, j)), size = std::max(size, fabsl(x(row, j)));
      for (int64_t j = 0; j < c.classes; ++j) exps += expl(x(row, j) - top), sum += x(row, j);
      Real l = top + logl(exps);
      exact_lse.push_back(l);
      reach.push_back(size + fabsl(l));
      lse.set(row, double(l));
      loss.push_back(ignored(row) ? 0
                                  : l - (1 - c.smoothing) * x(row, target[row]) - c.smoothing / c.classes * sum + c.z_loss * l * l);
    }
  }

  Real x(int64_t row, int64_t j) const { return logits[row * c.cols + j]; }
  bool ignored(int64_t row) const { return target[row] == kIgnore; }
  Real unit() const { return 8 * eps(acc(c.type)); }

  Buffer columns(int64_t first, int64_t last) const {
    Buffer part(c.type, c.rows * (last - first), offset);
    for (int64_t row = 0; row < c.rows; ++row)
      for (int64_t j = first; j < last; ++j) part.set(row * (last - first) + j - first, logits[row * c.cols + j]);
    return part;
  }

  void check_loss(int64_t row, const Buffer& seen) const {
    near("loss", seen, row, loss[row], unit() * (1 + 3 * reach[row] + c.z_loss * exact_lse[row] * exact_lse[row]));
  }
};

void check_whole_forward(const Problem& p) {
  const Case& c = p.c;
  std::vector<Buffer> out = on_every_pool([&](ParallelFor pool) {
    Buffer loss(acc(c.type), c.rows, p.offset), lse(acc(c.type), c.rows, p.offset);
    int64_t bad_row = c.rows;
    call(BOTH(cross_entropy_forward),
         {p.logits.data(), p.target.data(), loss.data(), lse.data(), nullptr, &bad_row, c.rows, c.cols, 0, c.classes, kIgnore,
          c.smoothing, c.z_loss, c.type},
         pool);
    CHECK(bad_row == c.rows);
    return list(std::move(loss), std::move(lse));
  });
  for (int64_t row = 0; row < c.rows; ++row) {
    p.check_loss(row, out[0]);
    if (p.ignored(row))
      near("ignored loss", out[0], row, 0, 0);
    else
      near("lse", out[1], row, p.exact_lse[row], p.unit() * (1 + p.reach[row]));
  }
}

// Each shard's max, sum of exponentials and weighted logits, put together as the all-gather's receiver does.
void check_shards_forward(const Problem& p, const std::vector<int64_t>& bounds) {
  const Case& c = p.c;
  std::vector<Buffer> partials;
  for (size_t s = 0; s + 1 < bounds.size(); ++s) {
    Buffer logits = p.columns(bounds[s], bounds[s + 1]);
    std::vector<Buffer> out = on_every_pool([&](ParallelFor pool) {
      Buffer partial(acc(c.type), c.rows * 3, p.offset);
      int64_t bad_row = c.rows;
      call(BOTH(cross_entropy_forward),
           {logits.data(), p.target.data(), nullptr, nullptr, partial.data(), &bad_row, c.rows, bounds[s + 1] - bounds[s],
            bounds[s], c.classes, kIgnore, c.smoothing, 0, c.type},
           pool);
      CHECK(bad_row == c.rows);
      return list(std::move(partial));
    });
    partials.push_back(std::move(out[0]));
  }
  Buffer loss(DType::f64, c.rows, 0);
  for (int64_t row = 0; row < c.rows; ++row) {
    if (p.ignored(row)) continue;
    Real top = -INFINITY, exps = 0, weighted = 0;
    for (const Buffer& part : partials) top = std::max(top, Real(part[row * 3]));
    for (const Buffer& part : partials) {
      exps += part[row * 3 + 1] ? part[row * 3 + 1] * expl(part[row * 3] - top) : 0;
      weighted += part[row * 3 + 2];
    }
    Real lse = top + logl(exps);
    loss.set(row, double(lse - weighted + c.z_loss * lse * lse));
    p.check_loss(row, loss);
  }
}

// `shift`: how much further from an aligned address than the logits their gradient begins.
void check_backward(const Problem& p, int64_t first, int64_t last, int shift = 0) {
  const Case& c = p.c;
  int64_t cols = last - first;
  auto run = [&](ParallelFor pool, bool in_place) {
    Buffer logits = p.columns(first, last), dlogits(c.type, c.rows * cols, p.offset + (in_place ? 0 : shift));
    Buffer& to = in_place ? logits : dlogits;
    call(BOTH(cross_entropy_backward),
         {p.dloss.data(), logits.data(), p.target.data(), p.lse.data(), to.data(), c.rows, cols, first, c.classes, kIgnore,
          c.smoothing, c.z_loss, c.type},
         pool);
    return list(std::move(to));
  };
  std::vector<Buffer> out = on_every_pool([&](ParallelFor pool) { return run(pool, false); });
  if (!shift && on_every_pool([&](ParallelFor pool) { return run(pool, true); }) != out) fail("in place gives another gradient");

  for (int64_t row = 0; row < c.rows; ++row)
    for (int64_t j = first; j < last; ++j) {
      int64_t i = row * cols + j - first;
      if (j >= c.classes || p.ignored(row)) {
        near("dlogits of padding or an ignored row", out[0], i, 0, 0);
        continue;
      }
      bool hit = j == p.target[row];
      Real lse = p.exact_lse[row], prob = expl(p.x(row, j) - lse), uniform = c.smoothing / Real(c.classes), z = 2 * c.z_loss * lse;
      Real d = p.dloss[row], value = d * (prob * (1 + z) - uniform - (hit ? 1 - c.smoothing : 0));
      Real slack = p.unit() * fabsl(d) * (prob * (1 + p.reach[row]) * (1 + fabsl(z)) + uniform + hit);
      near("dlogits", out[0], i, value,
           eps(c.type) * fabsl(value) + slack + tiny(c.type) + tiny(DType::f32) * fabsl(d) * (1 + fabsl(z)));
    }
}

void check(const Case& c) {
  for (int offset : {0, 1}) {
    describe("%s, [%ld, %ld], %ld classes, smoothing %g, z_loss %g, shards %d, offset %d", format(c.type).name, long(c.rows),
             long(c.cols), long(c.classes), c.smoothing, c.z_loss, c.shards, offset);
    Problem p(c, offset);
    if (!c.shards) {
      check_whole_forward(p);
      check_backward(p, 0, c.cols);
      continue;
    }
    std::vector<int64_t> bounds = {0, 1, c.cols / 3, c.cols / 2, c.cols};
    check_shards_forward(p, bounds);
    for (size_t s = 0; s + 1 < bounds.size(); ++s) check_backward(p, bounds[s], bounds[s + 1]);
  }
}

// The loss of one row of floats, and what bad_row says.
double row_loss(const std::vector<double>& values, int64_t target, double smoothing = 0) {
  int64_t n = int64_t(values.size()), bad_row = 1;
  Buffer logits(DType::f32, n, 0), loss(DType::f32, 1, 0), lse(DType::f32, 1, 0);
  for (int64_t j = 0; j < n; ++j) logits.set(j, values[j]);
  call(BOTH(cross_entropy_forward),
       {logits.data(), &target, loss.data(), lse.data(), nullptr, &bad_row, 1, n, 0, n, kIgnore, smoothing, 0, DType::f32}, serial);
  return loss[0];
}

}  // namespace

TEST(every_width) {
  for (DType type : types())
    for (int64_t cols : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 511, 512, 513, 1025, 5003}) {
      check({type, 5, cols, cols});
      check({type, 5, cols, cols, 0.1, 1e-3});
    }
}

// Rows of several chunks, and of several rounds of a block's threads.
TEST(long_rows) {
  for (DType type : types())
    for (int64_t cols : {4096, 8192, 8200, 16391, 33001}) {
      check({type, 4, cols, cols});
      check({type, 4, cols, cols - 2500, 0.1, 1e-3});
    }
}

TEST(gradients_that_lie_unlike_the_logits) {
  for (DType type : types())
    for (int64_t cols : {5, 33, 512, 513, 5003}) {
      describe("%s, %ld columns", format(type).name, long(cols));
      Problem p({type, 5, cols, cols, 0.1, 1e-3}, 0);
      check_backward(p, 0, cols, 1);
      check_backward(p, cols / 3, cols, 3);
    }
}

TEST(no_rows) {
  for (DType type : types()) check({type, 0, 5, 5});
}

TEST(padding_is_no_class) {
  for (DType type : types())
    for (int64_t classes : {1, 31, 512, 1000}) check({type, 6, 1025, classes, 0.2, 1e-2});
}

TEST(smoothing_and_z_loss) {
  for (double smoothing : {0., 0.3, 1.})
    for (double z_loss : {0., 0.5}) check({DType::f32, 7, 100, 90, smoothing, z_loss});
}

TEST(shards_of_a_vocabulary) {
  for (DType type : types())
    for (int64_t classes : {1, 40, 499, 1300})  // with 1 and 40 the last shards are all padding
      for (double smoothing : {0., 0.1}) check({type, 7, 1300, classes, smoothing, 1e-3, true});
}

TEST(targets_that_are_no_class) {
  int64_t rows = 40, cols = 17, classes = 15;
  std::vector<int64_t> target(rows, 3);
  target[11] = classes, target[9] = -1, target[30] = 1 << 20, target[5] = kIgnore;
  auto is_bad = [](int64_t row) { return row == 9 || row == 11 || row == 30; };
  Buffer logits(DType::f32, rows * cols, 0), ones(DType::f32, rows, 0);
  logits.fill(1);
  for (int64_t row = 0; row < rows; ++row) ones.set(row, 1);
  for (bool partial : {false, true}) {
    describe("partial %d", partial);
    std::vector<Buffer> out = on_every_pool([&](ParallelFor pool) {
      Buffer loss(DType::f32, rows, 0), lse(DType::f32, rows, 0), parts(DType::f32, rows * 3, 0);
      int64_t bad_row = rows;
      call(BOTH(cross_entropy_forward),
           {logits.data(), target.data(), partial ? nullptr : loss.data(), partial ? nullptr : lse.data(),
            partial ? parts.data() : nullptr, &bad_row, rows, cols, 0, classes, kIgnore, 0, 0, DType::f32},
           pool);
      CHECK(bad_row == (on_simt ? rows : 9));
      return list(std::move(partial ? parts : loss));
    });
    for (int64_t row = 0; row < rows; ++row) CHECK(isnan(out[0][partial ? row * 3 + 2 : row]) == is_bad(row));
  }
  std::vector<Buffer> out = on_every_pool([&](ParallelFor pool) {
    Buffer dlogits(DType::f32, rows * cols, 0);
    call(
        BOTH(cross_entropy_backward),
        {ones.data(), logits.data(), target.data(), ones.data(), dlogits.data(), rows, cols, 0, classes, kIgnore, 0, 0, DType::f32},
        pool);
    return list(std::move(dlogits));
  });
  for (int64_t i = 0; i < rows * cols; ++i) CHECK(isnan(out[0][i]) == (is_bad(i / cols) && i % cols < classes));
}

// What a shard hands over of rows that are ignored, are all -inf, or have no column here.
TEST(partial_results_of_nothing) {
  for (int64_t cols : {3, 40, 5000}) {
    describe("%ld columns", long(cols));
    std::vector<int64_t> target = {kIgnore, 1, 1, 1};
    int64_t rows = int64_t(target.size());
    Buffer logits(DType::f32, rows * cols, 0);
    logits.fill(1);
    for (int64_t j = 0; j < cols; ++j) logits.set(cols + j, -INFINITY);
    for (int64_t start : {int64_t(0), cols}) {  // the second shard is all padding
      std::vector<Buffer> out = on_every_pool([&](ParallelFor pool) {
        Buffer partial(DType::f32, rows * 3, 0);
        int64_t bad_row = rows;
        call(BOTH(cross_entropy_forward),
             {logits.data(), target.data(), nullptr, nullptr, partial.data(), &bad_row, rows, cols, start, cols, kIgnore, 0, 0,
              DType::f32},
             pool);
        return list(std::move(partial));
      });
      for (int64_t row = 0; row < rows; ++row)
        if (start || row < 2) {
          CHECK(out[0][row * 3] == -INFINITY && out[0][row * 3 + 1] == 0);
          CHECK(out[0][row * 3 + 2] == (!start && row == 1 ? -INFINITY : 0));
        } else {
          CHECK(isfinite(out[0][row * 3]) && out[0][row * 3 + 1] >= 1);
        }
    }
  }
}

TEST(minus_infinity_has_no_probability) {
  for (int64_t n : {2, 600, 1500}) {
    describe("%ld columns", long(n));
    std::vector<double> values(n, -INFINITY);  // more than a tile of nothing but -inf before the first finite value
    values[n - 1] = 2;
    CHECK(row_loss(values, n - 1) == 0);
    CHECK(row_loss(values, 0) == INFINITY);
    values[0] = 2;
    CHECK(fabs(row_loss(values, 0) - M_LN2) < 1e-6);
    CHECK(row_loss(values, n - 1, 0.1) == (n == 2 ? row_loss({2, 2}, 1, 0.1) : INFINITY));
  }
}

TEST(nan_reaches_the_loss) {
  for (int64_t n : {1, 40, 1500})
    for (int64_t at : {int64_t(0), n / 2, n - 1})
      for (double rest : {1., double(-INFINITY)}) {
        describe("%ld columns, NaN at %ld among %g", long(n), long(at), rest);
        std::vector<double> values(n, rest);
        values[at] = NAN;
        CHECK(isnan(row_loss(values, n - 1)));
      }
}

TEST(large_logits_do_not_cancel) {
  for (double centre : {1e4, -1e4, 3e38})
    for (int n : {4, 40, 2000}) CHECK(fabs(row_loss(std::vector<double>(n, centre), 2) - log(n)) < 1e-6);
}

namespace {

void check_traffic(DType type, int64_t cols, int64_t classes) {
  describe("%s, %ld columns, %ld classes", format(type).name, long(cols), long(classes));
  int64_t rows = 6, width = format(type).bytes, read = 5 * classes * width;  // but for the ignored row
  std::vector<int64_t> target = {0, classes - 1, kIgnore, 5, 6, 7};
  Buffer logits(type, rows * cols, 0), dlogits(type, rows * cols, 0), loss(DType::f32, rows, 0), lse(DType::f32, rows, 0),
      partial(DType::f32, rows * 3, 0), dloss(DType::f32, rows, 0);
  logits.fill(1), dloss.fill(2);
  auto narrow_ends = [&](const std::vector<Traffic>& all, const char* tensor, int64_t ends) {
    CHECK(traffic_of(all, tensor).narrow <= rows * (ends * (16 / width - 1) + 1));
  };
  begin({});
  expect_ok(mk::cuda::cross_entropy_forward(
      {logits.data(), target.data(), loss.data(), lse.data(), nullptr, nullptr, rows, cols, 0, classes, kIgnore, 0.1, 0.1, type},
      {}));
  std::vector<Traffic> forward = mk::simt::host::take_traffic();
  expect_traffic(forward, "logits", read + 5 * width, 0);  // the target's once more
  expect_traffic(forward, "loss", 0, 4 * rows);
  expect_traffic(forward, "lse", 0, 4 * rows);
  narrow_ends(forward, "logits", 2);
  int64_t packets = classes * width / 16, threads = packets > 128 ? std::min<int64_t>(512, (packets + 127) / 128 * 32) : 32;
  expect_traffic(forward, "target", rows * threads * 8, 0);

  expect_ok(mk::cuda::cross_entropy_forward(
      {logits.data(), target.data(), nullptr, nullptr, partial.data(), nullptr, rows, cols, 0, classes, kIgnore, 0, 0, type}, {}));
  forward = mk::simt::host::take_traffic();
  expect_traffic(forward, "logits", read + 5 * width, 0);
  expect_traffic(forward, "partial", 0, 12 * rows);

  expect_ok(mk::cuda::cross_entropy_backward(
      {dloss.data(), logits.data(), target.data(), lse.data(), dlogits.data(), rows, cols, 0, classes, kIgnore, 0.1, 0.1, type},
      {}));
  std::vector<Traffic> backward = mk::simt::host::take_traffic();
  expect_traffic(backward, "logits", read, 0);
  expect_traffic(backward, "dlogits", 0, rows * cols * width);
  narrow_ends(backward, "logits", 2);
  narrow_ends(backward, "dlogits", 4);  // of what is class and of what is padding
  packets = (cols * width + 31) / 16, threads = packets > 128 ? packets / 4 + 32 * (packets / 1024 + 1) : 32;  // at most
  CHECK(traffic_of(backward, "target").read <= rows * threads * 8);
  CHECK(traffic_of(backward, "lse").read <= 5 * threads * 4 && traffic_of(backward, "dloss").read <= 5 * threads * 4);
  expect_no_findings();
}

}  // namespace

TEST(every_logit_is_moved_once) {
  if (!on_simt) return;
  for (DType type : types())
    for (int64_t cols : {1024, 1031, 5000, 20001}) {
      check_traffic(type, cols, cols);
      check_traffic(type, cols, cols - 47);
    }
}

// The last blocks of tensors that are mostly address space.
TEST(more_elements_than_32_bits_count) {
  if (!on_simt) return;
  constexpr DType kType = DType::bf16;
  constexpr int64_t kCols = 131072, kRows = (int64_t(1) << 31) / kCols + 1, kTarget = kCols - 3;
  Format f = format(kType);
  Options options;
  options.first_block = kRows - 1;
  begin(options);
  Mapping logits(kRows * kCols * 2), dlogits(kRows * kCols * 2);
  std::vector<int64_t> target(kRows, kTarget);
  Buffer loss(DType::f32, kRows, 0), lse(DType::f32, kRows, 0), dloss(DType::f32, kRows, 0);
  reinterpret_cast<uint16_t*>(logits.data)[(kRows - 1) * kCols + kTarget] = encode(10, f);
  expect_ok(mk::cuda::cross_entropy_forward(
      {logits.data, target.data(), loss.data(), lse.data(), nullptr, nullptr, kRows, kCols, 0, kCols, kIgnore, 0, 0, kType}, {}));
  Real exact = logl(kCols - 1 + expl(10));
  near("lse", lse, kRows - 1, exact, 1e-5);
  near("loss", loss, kRows - 1, exact - 10, 1e-5);

  constexpr int64_t kChunks = kCols / 8192;
  options.first_block = kRows * kChunks - 1;
  begin(options);
  dloss.set(kRows - 1, 1), lse.set(kRows - 1, double(exact));
  expect_ok(mk::cuda::cross_entropy_backward(
      {dloss.data(), logits.data, target.data(), lse.data(), dlogits.data, kRows, kCols, 0, kCols, kIgnore, 0, 0, kType}, {}));
  Buffer seen(kType, 8192, 0);
  memcpy(seen.data(), dlogits.data + (kRows * kCols - 8192) * 2, 8192 * 2);
  for (int64_t j = 0; j < 8192; ++j) {
    bool hit = j == kTarget % 8192;
    Real value = hit ? expl(10 - exact) - 1 : expl(-exact);
    near("dlogits", seen, j, value, eps(kType) * fabsl(value) + 1e-7 * hit);
  }
  expect_no_findings();

  // The target is in another chunk of the row, a multiple of 2^32 columns away.
  constexpr int64_t kFar = int64_t(1) << 32, kLong = kFar + 8192;
  dloss.set(0, 1), lse.set(0, 0);
  for (int64_t first : {int64_t(0), kFar}) {
    describe("chunk at %ld", long(first));
    options.first_block = first / 8192, options.last_block = options.first_block + 1;
    begin(options);
    Mapping row(kLong * 2);
    target[0] = kFar - first + 5;
    expect_ok(mk::cuda::cross_entropy_backward(
        {dloss.data(), row.data, target.data(), lse.data(), row.data, 1, kLong, 0, kLong, kIgnore, 0, 0, kType}, {}));
    memcpy(seen.data(), row.data + first * 2, 8192 * 2);
    for (int64_t j = 0; j < 8192; ++j) near("dlogits", seen, j, 1, 0);
    expect_no_findings();
  }
  begin({});
}

TEST(float64_is_refused) {
  if (!on_simt) return;
  for (mk::Error error :
       {mk::cuda::cross_entropy_forward(
            {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1, 1, 0, 1, kIgnore, 0, 0, DType::f64}, {}),
        mk::cuda::cross_entropy_backward({nullptr, nullptr, nullptr, nullptr, nullptr, 1, 1, 0, 1, kIgnore, 0, 0, DType::f64}, {})})
    CHECK(error && strstr(error, "float64"));
}
