// Functions of one float; math::exp2, divide, log, rsqrt and maximum come from the compiler's header.
#pragma once

#include "../elementary.h"

namespace mk::math {

// e^(x^2) erfc(x) for x >= 0.
MK_FN float erfcx(float x) { return erfcx_polynomial(divide(1.f, 1.f + 0.35f * x)); }

}  // namespace mk::math

#include "../scalar.h"
