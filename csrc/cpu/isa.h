// Which of the builds of the CPU kernels runs: the widest instruction set that this processor has, or the one that a test asked
// for.
#pragma once

namespace mk::cpu {

const char* isa();               // "baseline", "avx2", "avx512" or "avx512bf16"
bool set_isa(const char* name);  // false: unknown, or this processor lacks it; "best" goes back to the widest

}  // namespace mk::cpu
