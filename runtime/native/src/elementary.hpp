// eˣ, ln x and cos x from IEEE + − × ÷ alone, so that a schedule has the same bits on every machine: libm's own differ in
// the last bit from one processor and version to the next, and the checksum in a model file notices. The same operations
// in the same order as in runtime/ddpmx/diffusion/elementary.py; a test demands equality. Within 0.5001 ulp.
#pragma once

namespace ddpmx::elementary {

double exp(double x);
double log(double x);
double cos(double x);  // NaN where x is past a million quarter turns

}  // namespace ddpmx::elementary
