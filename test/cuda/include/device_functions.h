// device_functions.h: the arithmetic that CUDA gives to kernels, and its atomics.
#pragma once
#include "../cuda_on_cpu.h"

// -------------------------------------------------------------------------------------- arithmetic

// Compile with -ffp-contract=off: then a * b + c rounds twice here, and __fmaf_rn once.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1 / a; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __double2float_rn(double a) { return (float)a; }
inline float __int2float_rn(int a) { return (float)a; }
inline float __uint2float_rn(unsigned a) { return (float)a; }
inline int __float2int_rn(float a) { return (int)nearbyintf(a); }
inline float rsqrtf(float a) { return (float)(1 / sqrt((double)a)); }
inline double rsqrt(double a) { return 1 / sqrt(a); }

// The fast ones differ from the device's in the last bits: compare with tolerances.
inline float __expf(float a) { return expf(a); }
inline float __exp2f(float a) { return exp2f(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __fdividef(float a, float b) { return a / b; }

using std::isfinite;
using std::isinf;
using std::isnan;
template <class A, class B> using EmulatedCommon =
    typename std::enable_if<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value,
                            std::common_type<A, B>>::type::type;
template <class A, class B> constexpr EmulatedCommon<A, B> min(A a, B b) {     // like fmin: no NaN
    EmulatedCommon<A, B> x = a, y = b;
    return x != x ? y : y < x ? y : x;
}
template <class A, class B> constexpr EmulatedCommon<A, B> max(A a, B b) {
    EmulatedCommon<A, B> x = a, y = b;
    return x != x ? y : y > x ? y : x;
}

// -------------------------------------------------------------------------------------------- bits

template <class To, class From> To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float a) { return emulated_bits<unsigned>(a); }
inline float __uint_as_float(unsigned a) { return emulated_bits<float>(a); }
inline int __float_as_int(float a) { return emulated_bits<int>(a); }
inline float __int_as_float(int a) { return emulated_bits<float>(a); }
inline long long __double_as_longlong(double a) { return emulated_bits<long long>(a); }
inline double __longlong_as_double(long long a) { return emulated_bits<double>(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a ? __builtin_clz((unsigned)a) : 32; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __brev(unsigned a) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i);
    return r;
}
// Four bytes of the eight in b:a, each chosen by three bits of s; the fourth bit spreads its sign.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    uint64_t both = (uint64_t)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++, s >>= 4) {
        unsigned byte = both >> 8 * (s & 7) & 0xFF;
        if (s & 8) byte = byte & 0x80 ? 0xFF : 0;
        result |= byte << 8 * i;
    }
    return result;
}

// ------------------------------------------------------------------------------------------ memory

template <class T> T __ldg(const T *p) { return *p; }       // hints for the caches: no difference
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcs(T *p, T value) { *p = value; }
template <class T> void __stcg(T *p, T value) { *p = value; }

namespace emulator {
// With a random schedule others may come in before every atomic.
EMULATOR_CODE inline void before_atomic() {
    if (block.current < 0 || options.schedule != RANDOM || random_below(4)) return;
    block.thread[block.current].state = READY;
    block.runnable++;
    wait();
}
template <class T, class F> T update(T *p, F f) {
    before_atomic();
    const int relaxed = __ATOMIC_RELAXED;
    T old = __atomic_load_n(p, relaxed);
    while (!__atomic_compare_exchange_n(p, &old, f(old), false, relaxed, relaxed)) {}
    return old;
}
} // namespace emulator

// Relaxed, as on the device: an atomic orders no other memory.
#define EMULATOR_ATOMIC(T, name, result) \
    inline T name(T *p, T v) { return emulator::update(p, [=](T old) { return result; }); }
#define EMULATOR_ATOMICS(T) \
    EMULATOR_ATOMIC(T, atomicAdd, old + v) \
    EMULATOR_ATOMIC(T, atomicMax, old > v ? old : v) \
    EMULATOR_ATOMIC(T, atomicMin, old < v ? old : v) \
    EMULATOR_ATOMIC(T, atomicOr, old | v) \
    EMULATOR_ATOMIC(T, atomicAnd, old & v) \
    EMULATOR_ATOMIC(T, atomicExch, ((void)old, v)) \
    inline T atomicCAS(T *p, T compare, T v) { \
        return emulator::update(p, [=](T old) { return old == compare ? v : old; }); \
    }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
EMULATOR_ATOMIC(int, atomicSub, old - v)
EMULATOR_ATOMIC(unsigned, atomicSub, old - v)
// Their sums depend on the order of the threads: qlora.cu promises the same bits in every run.
float atomicAdd(float *, float) = delete;
double atomicAdd(double *, double) = delete;
