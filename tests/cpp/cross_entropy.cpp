// cross_entropy against its formula in long double: a whole vocabulary, the same cut into shards, in place and not.
#include "../../csrc/cross_entropy.h"

#include "testing.h"

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
    mk::cpu::cross_entropy_forward({p.logits.data(), p.target.data(), loss.data(), lse.data(), nullptr, &bad_row, c.rows, c.cols, 0,
                                    c.classes, kIgnore, c.smoothing, c.z_loss, c.type},
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
      mk::cpu::cross_entropy_forward({logits.data(), p.target.data(), nullptr, nullptr, partial.data(), &bad_row, c.rows,
                                      bounds[s + 1] - bounds[s], bounds[s], c.classes, kIgnore, c.smoothing, 0, c.type},
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

void check_backward(const Problem& p, int64_t first, int64_t last) {
  const Case& c = p.c;
  int64_t cols = last - first;
  auto run = [&](ParallelFor pool, bool in_place) {
    Buffer logits = p.columns(first, last), dlogits(c.type, c.rows * cols, p.offset);
    Buffer& to = in_place ? logits : dlogits;
    mk::cpu::cross_entropy_backward({p.dloss.data(), logits.data(), p.target.data(), p.lse.data(), to.data(), c.rows, cols, first,
                                     c.classes, kIgnore, c.smoothing, c.z_loss, c.type},
                                    pool);
    return list(std::move(to));
  };
  std::vector<Buffer> out = on_every_pool([&](ParallelFor pool) { return run(pool, false); });
  if (on_every_pool([&](ParallelFor pool) { return run(pool, true); }) != out) fail("in place gives another gradient");

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
  mk::cpu::cross_entropy_forward(
      {logits.data(), &target, loss.data(), lse.data(), nullptr, &bad_row, 1, n, 0, n, kIgnore, smoothing, 0, DType::f32}, serial);
  return loss[0];
}

}  // namespace

TEST(every_width) {
  for (DType type : kTypes)
    for (int64_t cols : {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65, 127, 129, 511, 512, 513, 1025, 5003}) {
      check({type, 5, cols, cols});
      check({type, 5, cols, cols, 0.1, 1e-3});
    }
}

TEST(no_rows) {
  for (DType type : kTypes) check({type, 0, 5, 5});
}

TEST(padding_is_no_class) {
  for (DType type : kTypes)
    for (int64_t classes : {1, 31, 512, 1000}) check({type, 6, 1025, classes, 0.2, 1e-2});
}

TEST(smoothing_and_z_loss) {
  for (double smoothing : {0., 0.3, 1.})
    for (double z_loss : {0., 0.5}) check({DType::f32, 7, 100, 90, smoothing, z_loss});
}

TEST(shards_of_a_vocabulary) {
  for (DType type : kTypes)
    for (int64_t classes : {1, 40, 499, 1300})  // with 1 and 40 the last shards are all padding
      for (double smoothing : {0., 0.1}) check({type, 7, 1300, classes, smoothing, 1e-3, true});
}

TEST(targets_that_are_no_class) {
  int64_t rows = 40, cols = 17, classes = 15;
  std::vector<int64_t> target(rows, 3);
  target[11] = classes, target[9] = -1, target[30] = 1 << 20, target[5] = kIgnore;
  for (bool partial : {false, true}) {
    std::vector<Buffer> out = on_every_pool([&](ParallelFor pool) {
      Buffer logits(DType::f32, rows * cols, 0), loss(DType::f32, rows, 0), lse(DType::f32, rows, 0),
          parts(DType::f32, rows * 3, 0);
      logits.fill(1);
      int64_t bad_row = rows;
      mk::cpu::cross_entropy_forward(
          {logits.data(), target.data(), partial ? nullptr : loss.data(), partial ? nullptr : lse.data(),
           partial ? parts.data() : nullptr, &bad_row, rows, cols, 0, classes, kIgnore, 0, 0, DType::f32},
          pool);
      CHECK(bad_row == 9);
      return list(std::move(partial ? parts : loss));
    });
    for (int64_t row : {int64_t(9), int64_t(11), int64_t(30)}) CHECK(isnan(out[0][partial ? row * 3 + 2 : row]));
    for (int64_t row : {int64_t(5), int64_t(8), rows - 1}) CHECK(!isnan(out[0][partial ? row * 3 + 2 : row]));
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
  for (double centre : {1e4, -1e4, 3e38}) CHECK(fabs(row_loss({centre, centre, centre, centre}, 2) - log(4)) < 1e-6);
}
