/* Arithmetic on bits: every value is an unsigned integer of its size.  All of it is exact (rounded once, as PTX says), but
   for the section on approximations. */
#include "machine.h"

double exp2(double), log2(double), sin(double), cos(double), tanh(double), sqrt(double), fma(double, double, double);
double floor(double), ceil(double), trunc(double), rint(double), fabs(double);
float floorf(float), ceilf(float), truncf(float), rintf(float), fmaf(float, float, float);

/* --- Bits and numbers --------------------------------------------------------------------------------------------- */

INLINE float F(u32 bits) { float f; __builtin_memcpy(&f, &bits, 4); return f; }
INLINE u32 bits32(float f) { u32 bits; __builtin_memcpy(&bits, &f, 4); return bits; }
INLINE double D(u64 bits) { double d; __builtin_memcpy(&d, &bits, 8); return d; }
INLINE u64 bits64(double d) { u64 bits; __builtin_memcpy(&bits, &d, 8); return bits; }

/* The result of float32 arithmetic: NVIDIA's NaN is always the same. */
INLINE u32 result32(float f) { return f == f ? bits32(f) : 0x7fffffffu; }
/* Subnormals to zero, sign kept; into [0, 1]. */
INLINE u32 flush(u32 bits) { return bits & 0x7f800000u ? bits : bits & 0x80000000u; }
INLINE u32 saturate32(u32 bits) { float f = F(bits); return !(f > 0) ? 0 : f >= 1 ? 0x3f800000u : bits; }

INLINE float h2f(u16 bits) { _Float16 h; __builtin_memcpy(&h, &bits, 2); return (float)h; }
INLINE u16 f2h(float f) { _Float16 h = (_Float16)f; u16 bits; __builtin_memcpy(&bits, &h, 2); return f == f ? bits : 0x7fff; }
INLINE u16 f2h_rz(float f) { u16 bits = f2h(f); return fabs(h2f(bits)) > fabs(f) ? bits - 1 : bits; }
INLINE float bf2f(u16 bits) { return F((u32)bits << 16); }
INLINE u16 f2bf(float f) { u32 bits = bits32(f); return f == f ? (bits + 0x7fffu + (bits >> 16 & 1)) >> 16 : 0x7fff; }
INLINE u16 f2bf_rz(float f) { return f == f ? bits32(f) >> 16 : 0x7fff; }
INLINE u32 f2tf32_rna(u32 bits) { return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u; }
INLINE u32 f2tf32_rn(u32 bits) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0xfffu + (bits >> 13 & 1)) & 0xffffe000u;
}

INLINE u16 low16(u32 x) { return (u16)x; }
INLINE u16 high16(u32 x) { return (u16)(x >> 16); }
INLINE u32 pack16(u16 low, u16 high) { return (u32)low | (u32)high << 16; }

/* --- Rounding once: through an intermediate rounded to odd, which keeps what a later rounding has to know ---------- */

INLINE float step_down(float f) { return f == 0 ? F(0x80000001u) : F(f > 0 ? bits32(f) - 1 : bits32(f) + 1); }
INLINE float d2f_rm(double d) { float f = (float)d; return (double)f > d ? step_down(f) : f; }
INLINE float d2f_rp(double d) { return -d2f_rm(-d); }
INLINE float d2f_rz(double d) { return d > 0 ? d2f_rm(d) : d2f_rp(d); }
INLINE float d2f_odd(double d) { float f = d2f_rz(d); return f != f || (double)f == d ? f : F(bits32(f) | 1); }
INLINE u16 d2h(double d) { return f2h(d2f_odd(d)); }
INLINE u16 d2bf(double d) { return f2bf(d2f_odd(d)); }
/* a + b rounded to odd: the error of the rounded sum is exact (Knuth's two-sum) and says which way to step. */
INLINE double add_odd(double a, double b) {
  double sum = a + b, rest = sum - a, error = (a - (sum - rest)) + (b - rest);
  u64 bits = bits64(sum);
  if (!(fabs(error) > 0) || bits & 1 || sum - sum != 0) return sum;
  return D((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}
/* Products of two float32 are exact in double. */
#define DIRECTED(mode) \
  INLINE float fma_##mode(float a, float b, float c) { return d2f_##mode(add_odd((double)a * (double)b, (double)c)); } \
  INLINE float add_##mode(float a, float b) { return d2f_##mode(add_odd((double)a, (double)b)); } \
  INLINE float mul_##mode(float a, float b) { return d2f_##mode((double)a * (double)b); }
DIRECTED(rm) DIRECTED(rp) DIRECTED(rz)

INLINE u16 add_f16(u16 a, u16 b) { return f2h(h2f(a) + h2f(b)); }
INLINE u16 sub_f16(u16 a, u16 b) { return f2h(h2f(a) - h2f(b)); }
INLINE u16 mul_f16(u16 a, u16 b) { return f2h(h2f(a) * h2f(b)); }
INLINE u16 fma_f16(u16 a, u16 b, u16 c) { return d2h(add_odd((double)h2f(a) * (double)h2f(b), (double)h2f(c))); }
INLINE u16 add_bf16(u16 a, u16 b) { return d2bf(add_odd((double)bf2f(a), (double)bf2f(b))); }
INLINE u16 sub_bf16(u16 a, u16 b) { return d2bf(add_odd((double)bf2f(a), -(double)bf2f(b))); }
INLINE u16 mul_bf16(u16 a, u16 b) { return d2bf((double)bf2f(a) * (double)bf2f(b)); }
INLINE u16 fma_bf16(u16 a, u16 b, u16 c) { return d2bf(add_odd((double)bf2f(a) * (double)bf2f(b), (double)bf2f(c))); }

/* --- Approximations: rounded from double, or off by up to the bound in the PTX manual ------------------------------ */

/* A float32 within `relative` and `absolute` of an exact result; results that are float32 themselves stay. */
SHARED_CODE u32 approximate(double exact, u32 seed, u32 nudge, double relative, double absolute) {
  float rounded = (float)exact;
  if (!nudge || (double)rounded == exact || rounded != rounded) return result32(rounded);
  u32 hash = (bits32(rounded) ^ seed) * 2654435761u;
  hash = (hash ^ hash >> 15) * 2246822519u;
  double share = (double)(s32)(hash ^ hash >> 13) / 2147483648.0, half_ulp = 0x1p-24;
  return result32((float)(exact + share * (fabs(exact) * (relative > half_ulp ? relative - half_ulp : 0) + absolute)));
}
INLINE u32 ex2_approx(u32 x, u32 nudge) { return approximate(exp2((double)F(x)), x, nudge, 0x1p-22, 0); }
INLINE u32 lg2_approx(u32 x, u32 nudge) {
  float f = F(x);
  if (f < 0) return 0x7fffffffu;
  return f > 0.5f && f < 2 ? approximate(log2((double)f), x, nudge, 0, 0x1p-22)
                           : approximate(log2((double)f), x, nudge, 0x1p-22, 0);
}
INLINE u32 sin_approx(u32 x, u32 nudge) { return approximate(sin((double)F(x)), x, nudge, 0, 0x1p-21); }
INLINE u32 cos_approx(u32 x, u32 nudge) { return approximate(cos((double)F(x)), x, nudge, 0, 0x1p-21); }
INLINE u32 tanh_approx(u32 x, u32 nudge) { return approximate(tanh((double)F(x)), x, nudge, 0x1p-11, 0); }
INLINE u32 rcp_approx(u32 x, u32 nudge) { return approximate(1.0 / (double)F(x), x, nudge, 0x1p-23, 0); }
INLINE u32 sqrt_approx(u32 x, u32 nudge) { return approximate(sqrt((double)F(x)), x, nudge, 0x1p-23, 0); }
INLINE u32 rsqrt_approx(u32 x, u32 nudge) { return approximate(1.0 / sqrt((double)F(x)), x, nudge, 0x1.1p-23, 0); }
/* Exact quotients of float32 don't fit into double, but the rounded ones are correct: 53 >= 2 * 24 + 2. */
INLINE u32 div_full(u32 a, u32 b, u32 nudge) {
  return approximate((double)F(a) / (double)F(b), a ^ b << 1, nudge, 0x1p-22, 0);
}
INLINE u32 div_approx(u32 a, u32 b, u32 nudge) { /* a huge divisor gives 0, or NaN for an infinite dividend */
  float divisor = __builtin_fabsf(F(b));
  if (divisor > 0x1p126f && divisor < __builtin_inff()) return result32((F(a) - F(a)) * 0.0f);
  return div_full(a, b, nudge);
}
/* The upper 32 bits of a float64, subnormals flushed: a start for Newton's iteration. */
INLINE u64 upper(u64 bits) {
  return (bits & 0x7ff0000000000000ull ? bits : bits & 0x8000000000000000ull) & 0xffffffff00000000ull;
}
INLINE u64 rcp_approx64(u64 x) { return upper(bits64(1.0 / D(upper(x)))); }
INLINE u64 rsqrt_approx64(u64 x) { return upper(bits64(1.0 / sqrt(D(upper(x))))); }

/* --- Minimum and maximum: without .NaN a number wins over NaN; -0 < +0 ---------------------------------------------- */

#define MINIMUM_MAXIMUM(type, T, number, value, canonical) \
  INLINE T min_##type(T a, T b) { \
    number x = value(a), y = value(b); \
    return x != x ? (y != y ? canonical : b) : y != y ? a : x == y ? (a | b) : x < y ? a : b; } \
  INLINE T max_##type(T a, T b) { \
    number x = value(a), y = value(b); \
    return x != x ? (y != y ? canonical : b) : y != y ? a : x == y ? (a & b) : x > y ? a : b; } \
  INLINE T min_nan_##type(T a, T b) { return value(a) != value(a) || value(b) != value(b) ? canonical : min_##type(a, b); } \
  INLINE T max_nan_##type(T a, T b) { return value(a) != value(a) || value(b) != value(b) ? canonical : max_##type(a, b); }
MINIMUM_MAXIMUM(f32, u32, float, F, 0x7fffffffu)
MINIMUM_MAXIMUM(f64, u64, double, D, 0x7fffffffffffffffull)
MINIMUM_MAXIMUM(f16, u16, float, h2f, 0x7fff)
MINIMUM_MAXIMUM(bf16, u16, float, bf2f, 0x7fff)

/* --- To integers: into range; NaN gives 0, or the smallest 64-bit integer ------------------------------------------- */

#define TO_INTEGER(T, low, high, nan) \
  INLINE T to_##T(double d) { return d != d ? (T)(nan) : d <= (double)(low) ? (T)(low) : d >= (double)(high) ? (T)(high) : (T)d; }
TO_INTEGER(s8, -128, 127, 0) TO_INTEGER(u8, 0, 255, 0)
TO_INTEGER(s16, -32768, 32767, 0) TO_INTEGER(u16, 0, 65535, 0)
TO_INTEGER(s32, -2147483648LL, 2147483647LL, 0) TO_INTEGER(u32, 0, 4294967295ull, 0)
TO_INTEGER(s64, -0x7fffffffffffffffll - 1, 0x7fffffffffffffffll, 0x8000000000000000ull)
TO_INTEGER(u64, 0, 0xffffffffffffffffull, 0x8000000000000000ull)

/* --- Integers ------------------------------------------------------------------------------------------------------ */

/* Division by zero, and the one quotient that overflows, don't trap on a GPU. */
#define DIVISION(bits) \
  INLINE u##bits div_u##bits(u##bits a, u##bits b) { return b ? a / b : (u##bits)~0ull; } \
  INLINE u##bits rem_u##bits(u##bits a, u##bits b) { return b ? a % b : a; } \
  INLINE u##bits div_s##bits(u##bits a, u##bits b) { \
    return !b ? (u##bits)~0ull : b == (u##bits)~0ull ? (u##bits)(0 - a) : (u##bits)((s##bits)a / (s##bits)b); } \
  INLINE u##bits rem_s##bits(u##bits a, u##bits b) { \
    return !b ? a : b == (u##bits)~0ull ? 0 : (u##bits)((s##bits)a % (s##bits)b); }
DIVISION(16) DIVISION(32) DIVISION(64)

INLINE u64 mul_hi_u64(u64 a, u64 b) { return (u64)((unsigned __int128)a * b >> 64); }
INLINE u64 mul_hi_s64(u64 a, u64 b) { return (u64)((__int128)(s64)a * (s64)b >> 64); }

/* Bit fields: `length` bits from `start`, sign-extended or not. */
INLINE u32 bfe_u32(u32 a, u32 start, u32 length) {
  start &= 255; length &= 255;
  return start > 31 || !length ? 0 : length > 31 ? a >> start : a >> start & ((1u << length) - 1);
}
INLINE u32 bfe_s32(u32 a, u32 start, u32 length) {
  start &= 255; length &= 255;
  if (!length) return 0;
  u32 end = start + length > 32 ? 32 : start + length;
  if (start > 31) return (u32)((s32)a >> 31);
  return (u32)((s32)(a << (32 - end)) >> (32 - end + start));
}
INLINE u64 bfe_u64(u64 a, u32 start, u32 length) {
  start &= 255; length &= 255;
  return start > 63 || !length ? 0 : length > 63 ? a >> start : a >> start & ((1ull << length) - 1);
}
INLINE u32 bfi_b32(u32 field, u32 into, u32 start, u32 length) {
  start &= 255; length &= 255;
  if (start > 31 || !length) return into;
  u32 mask = (length > 31 ? ~0u : (1u << length) - 1) << start;
  return (into & ~mask) | (field << start & mask);
}
INLINE u32 clz32(u32 x) { return x ? __builtin_clz(x) : 32; }
INLINE u32 clz64(u64 x) { return x ? __builtin_clzll(x) : 64; }
INLINE u32 brev32(u32 x) { u32 r = 0; for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i); return r; }
INLINE u32 prmt(u32 a, u32 b, u32 selectors) { /* bytes of b:a; a selector's top bit asks for the sign instead */
  u64 bytes = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 selector = selectors >> 4 * i & 15, byte = bytes >> 8 * (selector & 7) & 255;
    r |= (selector & 8 ? (byte & 0x80 ? 0xffu : 0) : byte) << 8 * i;
  }
  return r;
}
INLINE u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 r = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
/* Funnel shifts of high:low. */
INLINE u32 shf_l_wrap(u32 low, u32 high, u32 n) { return (u32)(((u64)high << 32 | low) << (n & 31) >> 32); }
INLINE u32 shf_r_wrap(u32 low, u32 high, u32 n) { return (u32)(((u64)high << 32 | low) >> (n & 31)); }
INLINE u32 shf_l_clamp(u32 low, u32 high, u32 n) { return n > 31 ? low : shf_l_wrap(low, high, n); }
INLINE u32 shf_r_clamp(u32 low, u32 high, u32 n) { return n > 31 ? high : shf_r_wrap(low, high, n); }
