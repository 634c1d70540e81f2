// vector_types.h: CUDA's words for kernels, its small vectors, its errors.
#pragma once

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz) {}
};
inline uint3 threadIdx, blockIdx;       // of the thread that runs now
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// Vector types are aligned as on the device: a misaligned access faults or trips UBSan.
#define EMULATOR_VECTORS(T, name) \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; }; \
    struct name##3 { T x, y, z; }; \
    struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) name##4 { T x, y, z, w; }; \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned char, uchar)
EMULATOR_VECTORS(unsigned short, ushort)
EMULATOR_VECTORS(double, double)
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Errors must be looked at: ignoring one is a warning here. Cleanup code says (void).
#define EMULATOR_ERRORS(X) \
    X(Success, 0, "no error") \
    X(ErrorInvalidValue, 1, "invalid argument") \
    X(ErrorMemoryAllocation, 2, "out of memory") \
    X(ErrorInitializationError, 3, "initialization error") \
    X(ErrorInvalidConfiguration, 9, "invalid configuration argument") \
    X(ErrorInvalidMemcpyDirection, 21, "invalid copy direction for memcpy") \
    X(ErrorInsufficientDriver, 35, "CUDA driver version is insufficient for CUDA runtime version") \
    X(ErrorNoDevice, 100, "no CUDA-capable device is detected") \
    X(ErrorInvalidDevice, 101, "invalid device ordinal") \
    X(ErrorNoKernelImageForDevice, 209, "no kernel image is available for the device") \
    X(ErrorInvalidResourceHandle, 400, "invalid resource handle") \
    X(ErrorNotReady, 600, "device not ready") \
    X(ErrorIllegalAddress, 700, "an illegal memory access was encountered") \
    X(ErrorLaunchOutOfResources, 701, "too many resources requested for launch") \
    X(ErrorLaunchFailure, 719, "unspecified launch failure") \
    X(ErrorStreamCaptureUnsupported, 900, "operation not permitted when stream is capturing") \
    X(ErrorStreamCaptureInvalidated, 901, "operation failed due to a previous error in capture") \
    X(ErrorStreamCaptureUnmatched, 903, "capture was not initiated in this stream") \
    X(ErrorStreamCaptureUnjoined, 904, "capturing stream has unjoined work") \
    X(ErrorStreamCaptureImplicit, 906, "the legacy stream would depend on a capture") \
    X(ErrorUnknown, 999, "unknown error")
#define EMULATOR_ENUMERATOR(name, value, text) cuda##name = value,
enum [[nodiscard]] cudaError { EMULATOR_ERRORS(EMULATOR_ENUMERATOR) };
typedef cudaError cudaError_t;

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
typedef struct CUgraph_st *cudaGraph_t;
typedef struct CUgraphExec_st *cudaGraphExec_t;
