// Runs a program's tests on the instruction set that its argument names, or on the host build of the GPU kernels, "simt": 0 passed,
// 1 failed, 77 the processor lacks it.
#include <stdarg.h>
#include <stdio.h>

#include "../../csrc/cpu/isa.h"
#include "testing.h"

namespace test {

bool on_simt = false;

namespace {

struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}
constexpr int kShown = 20;
int failures = 0;
const char* running = "";
char description[256] = "";

}  // namespace

bool add(const char* name, void (*run)()) {
  tests().push_back({name, run});
  return true;
}

void describe(const char* format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(description, sizeof description, format, values);
  va_end(values);
}

void fail(const char* format, ...) {
  if (++failures > kShown) return;
  printf("%s (%s): %s: ", running, on_simt ? "simt" : mk::cpu::isa(), description);
  va_list values;
  va_start(values, format);
  vprintf(format, values);
  va_end(values);
  printf("\n");
}

}  // namespace test

int main(int count, char** arguments) {
  const char* isa = count > 1 ? arguments[1] : mk::cpu::isa();
  test::on_simt = !strcmp(isa, "simt");
  if (!test::on_simt && !mk::cpu::set_isa(isa)) {
    printf("this processor lacks %s\n", isa);
    return 77;
  }
  CHECK(test::on_simt || !strcmp(mk::cpu::isa(), isa));
  for (const test::Test& each : test::tests()) {
    int before = test::failures;
    test::running = each.name;
    test::describe("%s", "");
    each.run();
    printf("%s %s\n", test::failures == before ? "passed" : "FAILED", each.name);
  }
  if (test::failures > test::kShown) printf("%d failures, the first %d shown\n", test::failures, test::kShown);
  return test::failures ? 1 : 0;
}
