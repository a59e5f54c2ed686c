// What sanitizers are for, done to a kernel on purpose: a build with one must not pass.
#include "../../csrc/layer_norm.h"

#include "testing.h"

using namespace test;

namespace {

[[maybe_unused]] void both_threads_do_all(int64_t begin, int64_t end, int64_t, Body body, void* context) {
  std::thread other(body, begin, end, context);
  body(begin, end, context);
  other.join();
}

void run(int64_t allocated, int64_t cols, ParallelFor pool) {
  Buffer x(DType::f32, allocated, 0), y(DType::f32, cols, 0), mean(DType::f32, 1, 0), rstd(DType::f32, 1, 0);
  Buffer workspace(DType::f32, mk::cpu::layer_norm_forward_workspace(1, cols), 0);
  x.fill(1);
  mk::cpu::layer_norm_forward({x.data(), nullptr, nullptr, y.data(), mean.data(), rstd.data(), workspace.data(), 1, cols, 1e-5,
                               DType::f32, DType::f32, DType::f32},
                              pool);
}

}  // namespace

#if defined(__SANITIZE_THREAD__)
TEST(two_threads_on_one_row) { run(32, 32, both_threads_do_all); }
#else
// Whole vectors: AddressSanitizer does not see through the masked loads of AVX-512.
TEST(row_one_element_longer_than_its_buffer) { run(31, 32, serial); }
#endif
