// cuda_bf16.h and cuda_fp16.h: 16-bit floats, by conversion only; they have no arithmetic here.
#pragma once
#include "../cuda_on_cpu.h"

struct __nv_bfloat16 { unsigned short bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct __half { unsigned short bits; };
struct alignas(4) __half2 { __half x, y; };
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
typedef __half half;
typedef __half2 half2;

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 a) { return a.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }

inline float __bfloat162float(__nv_bfloat16 a) { return emulator::bf16_to_float(a.bits); }
// Rounds to nearest, ties to even; every NaN becomes the device's.
inline __nv_bfloat16 __float2bfloat16(float a) {
    uint32_t bits = __float_as_uint(a);
    if (a != a) return {0x7FFF};
    return {(unsigned short)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return __float2bfloat16(a); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16(x), __float2bfloat16(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 a) { return __floats2bfloat162_rn(a.x, a.y); }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 a) {
    return {__bfloat162float(a.x), __bfloat162float(a.y)};
}
inline float __low2float(__nv_bfloat162 a) { return __bfloat162float(a.x); }
inline float __high2float(__nv_bfloat162 a) { return __bfloat162float(a.y); }

inline float __half2float(__half a) {
    int exponent = a.bits >> 10 & 31, fraction = a.bits & 1023;
    float f = exponent == 0    ? ldexpf((float)fraction, -24)
              : exponent == 31 ? (fraction ? NAN : INFINITY)
                               : ldexpf((float)(1024 + fraction), exponent - 25);
    return a.bits >> 15 ? -f : f;
}
// Rounds to nearest, ties to even, above 65519 to infinity.
inline __half __float2half(float a) {
    unsigned short sign = (unsigned short)(__float_as_uint(a) >> 16 & 0x8000);
    float m = fabsf(a);
    if (a != a) return {0x7FFF};
    if (m >= 65520) return {(unsigned short)(sign | 0x7C00)};
    int exponent = -14;         // the steps of subnormals are those of the smallest exponent
    if (m >= ldexpf(1, -14)) frexpf(m, &exponent), exponent--;
    int steps = (int)nearbyintf(ldexpf(m, 10 - exponent));
    return {(unsigned short)(sign | (steps + ((exponent + 14) << 10)))};
}
inline __half __float2half_rn(float a) { return __float2half(a); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
