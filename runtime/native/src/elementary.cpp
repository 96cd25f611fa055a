#include "elementary.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ddpmx::elementary {
namespace {

// high + low, of 106 bits together (Dekker 1971).
struct Pair {
  double high, low;
};

// In parts whose product with a whole number of 11 or 20 bits is exact, and a last one that is rounded.
constexpr double kLn2[] = {0x1.62e42fefa38p-1, 0x1.ef35793c76p-45, 0x1.cc01f97b57a08p-87};
constexpr double kHalfPi[] = {0x1.921fb544p+0, 0x1.0b4611a6p-34, 0x1.3198a2ep-69, 0x1.b839a252049c1p-104};
constexpr double kSqrtHalf = 0x1.6a09e667f3bcdp-1;
constexpr double kMostQuadrants = 0x1p20;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// a + b exactly (Knuth).
Pair two_sum(double a, double b) {
  const double s = a + b, t = s - a;
  return {s, (a - (s - t)) + (b - t)};
}

// high + low exactly, if |high| ≥ |low| (Dekker).
Pair fast_two_sum(double high, double low) {
  const double s = high + low;
  return {s, low - (s - high)};
}

// The upper 26 bits, and the others (Veltkamp).
Pair halves(double a) {
  const double c = 134217729.0 * a;  // 2²⁷ + 1
  const double high = c - (c - a);
  return {high, a - high};
}

// a·b exactly (Dekker). Not by fma(): Python has none.
Pair two_product(double a, double b) {
  const double p = a * b;
  const Pair x = halves(a), y = halves(b);
  return {p, ((x.high * y.high - p) + x.high * y.low + x.low * y.high) + x.low * y.low};
}

Pair add(Pair a, Pair b) {
  const Pair s = two_sum(a.high, b.high);
  return fast_two_sum(s.high, s.low + (a.low + b.low));
}

Pair multiply(Pair a, Pair b) {
  const Pair p = two_product(a.high, b.high);
  return fast_two_sum(p.high, p.low + (a.high * b.low + a.low * b.high));
}

Pair divide(Pair a, Pair b) {
  const double q = a.high / b.high;
  const Pair p = two_product(q, b.high);
  return fast_two_sum(q, (((a.high - p.high) - p.low) + (a.low - q * b.low)) / b.high);
}

Pair one_over(int n) { return divide({1.0, 0.0}, {static_cast<double>(n), 0.0}); }

// a·by, where by is a power of 2.
Pair scaled(Pair a, double by) { return {a.high * by, a.low * by}; }

// x − k·Σ parts.
template <size_t N>
Pair without(double x, double k, const double (&parts)[N]) {
  Pair rest = {x, 0.0};
  for (const double part : parts) rest = add(rest, {-(k * part), 0.0});
  return rest;
}

// 1 − z/(a·(a+1))·(1 − z/((a+2)·(a+3))·(…)) with a = 1 + first: cos r of z = r², or sin r over r.
Pair alternating(Pair square, int first) {
  double tail = 1.0;
  for (int n = 11; n > 4; --n) tail = 1.0 - square.high / ((2 * n - 1 + first) * (2 * n + first)) * tail;
  Pair total = {tail, 0.0};
  for (int n = 4; n > 0; --n) {
    const Pair term = multiply(multiply(square, one_over((2 * n - 1 + first) * (2 * n + first))), total);
    total = add({1.0, 0.0}, scaled(term, -1.0));
  }
  return total;
}

}  // namespace

// eˣ = 2ᵏ·eʳ with k = round(x/ln 2), and eʳ − 1 by Taylor's series at r/64, doubled six times: 2p + p².
double exp(double x) {
  if (std::isnan(x)) return x;
  const double held = std::min(std::max(x, -800.0), 800.0);
  const double k = std::nearbyint(held / kLn2[0]);
  const Pair r = scaled(without(held, k, kLn2), 1.0 / 64);
  double tail = 0.0;
  for (int n = 9; n > 2; --n) tail = (tail * r.high + 1.0) / n;  // 1/n·(1 + r/(n+1)·(1 + …))
  const double cube = r.high * r.high * r.high * 0.5;
  Pair p = add(add(r, scaled(multiply(r, r), 0.5)), {cube * tail, 0.0});
  for (int i = 0; i < 6; ++i) p = add(scaled(p, 2.0), multiply(p, p));
  return std::ldexp(add({1.0, 0.0}, p).high, static_cast<int>(k));
}

// ln x = e·ln 2 + 2·artanh(s) with x = m·2ᵉ, √½ ≤ m < √2, s = (m−1)/(m+1), and s·Σ s²ⁿ/(2n+1) for artanh.
double log(double x) {
  if (!(x > 0 && x < kInfinity)) return x == 0 ? -kInfinity : x > 0 ? x : kNaN;
  int exponent;
  double m = std::frexp(x, &exponent);
  if (m < kSqrtHalf) {
    m *= 2;
    --exponent;
  }
  const double e = exponent;
  const Pair s = divide({m - 1.0, 0.0}, two_sum(m, 1.0));
  const Pair square = multiply(s, s);
  double tail = 0.0;
  for (int n = 14; n > 3; --n) tail = tail * square.high + 1.0 / (2 * n + 1);
  Pair total = {tail, 0.0};
  for (int n = 3; n >= 0; --n) total = add(multiply(total, square), one_over(2 * n + 1));
  const Pair natural = multiply(scaled(s, 2.0), total);
  const Pair whole = add(add({e * kLn2[0], 0.0}, {e * kLn2[1], 0.0}), {e * kLn2[2], 0.0});
  return add(whole, natural).high;
}

// cos(k·π/2 + r) by Taylor's series of cos r or sin r.
double cos(double x) {
  const double k = std::nearbyint(x / kHalfPi[0]);
  if (!(std::fabs(k) <= kMostQuadrants)) return kNaN;
  const Pair r = without(x, k, kHalfPi);
  const Pair square = multiply(r, r);
  const double quadrant = k - 4.0 * std::floor(k / 4.0);
  const bool odd = quadrant == 1 || quadrant == 3;
  const double y = odd ? multiply(r, alternating(square, 1)).high : alternating(square, 0).high;
  return quadrant == 1 || quadrant == 2 ? -y : y;
}

}  // namespace ddpmx::elementary
