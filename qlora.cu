// qlora.cu: the op table of qlora.c on NVIDIA GPUs.
//
// The same operations, names, arguments and stage comments as chapter 3 of qlora.c, which is their
// specification: read the CPU kernel of a name first, then the GPU kernel of that name here. Needs
// the CUDA runtime; cuBLAS is loaded when the first GPU is opened. Nothing here knows what a model
// is. Not here: other vendors, several GPUs at once, float atomics (results are the same bits from
// run to run).
//
//      1  The machine: matrix instructions, asynchronous copies, numbers
//      2  A GPU: memory, errors, streams
//      3  4-bit weights: quantise, dequantise, panels
//      4  Matrix products and the LoRA linear
//      5  Embedding, norms, rotation, activations, gather and scatter
//      6  Attention
//      7  Output head, cross-entropy, optimiser
//      8  Decoding one token: matrix-vector kernels, sampling, recorded steps
//      9  The op table
//
// Letters, names and the gradient contract are those of chapter 1 of qlora.c. A kernel's comment
// says what it computes, what a thread, warp or block owns, and what it should cost.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define QLORA_INTERNAL
#include "qlora.h"

// =================================================================================================
//  1. The machine: matrix instructions, asynchronous copies, numbers
//
//  All inline assembly of this file is here. Under test/cuda the same wrappers run on a CPU; what
//  follows #else is their body there.
// =================================================================================================

typedef __nv_bfloat16 bf16;

enum { WARP = 32 };

// d (16 x 8) = a (16 x 16) b (16 x 8) + c, bf16 in, float32 out, spread over the lanes of a warp as
// PTX defines for mma.m16n8k16: lane l holds of d rows l/4 and l/4 + 8, columns 2 (l%4) and + 1.
__device__ __forceinline__ void mma(float d[4], const uint32_t a[4], const uint32_t b[2],
                                    const float c[4]) {
#if !defined(__CUDACC__)
    emulated_mma_m16n8k16_bf16(d, a, b, c);
#elif __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),
                   "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    (void)d, (void)a, (void)b, (void)c;             // the launchers never come here before Ampere
    __trap();
#endif
}

// Four 8 x 8 matrices of bf16 from shared memory; lane l gives the address of row l % 8 of matrix
// l / 8, and gets of each matrix row l / 4, columns 2 (l % 4) and + 1. The second: transposed.
#ifdef __CUDACC__
#define LOAD_MATRICES(how, r, row) \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" how ".shared.b16 {%0,%1,%2,%3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) \
                 : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory")
#else
#define LOAD_MATRICES(how, r, row) \
    (*how ? emulated_ldmatrix_x4_trans(r, row) : emulated_ldmatrix_x4(r, row))
#endif
__device__ __forceinline__ void load_matrices(uint32_t r[4], const void *row) {
    LOAD_MATRICES("", r, row);
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t r[4], const void *row) {
    LOAD_MATRICES(".trans", r, row);
}

// Starts copying 16 bytes to shared memory, of which the first `bytes` (0 to 16) come from global
// memory and the rest are zero. Both addresses are 16-aligned.
__device__ __forceinline__ void copy_async(void *shared, const void *global, int bytes) {
#if !defined(__CUDACC__)
    emulated_cp_async16(shared, global, bytes);
#elif __CUDA_ARCH__ >= 800
    uint32_t address = (uint32_t)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(bytes)
                 : "memory");
#else
    (void)shared, (void)global, (void)bytes;
    __trap();
#endif
}

// Closes the group of copies started since the last commit.
__device__ __forceinline__ void copy_commit() {
#if !defined(__CUDACC__)
    emulated_cp_async_commit();
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `groups` of this thread's latest groups are under way.
template <int groups> __device__ __forceinline__ void copy_wait() {
#if !defined(__CUDACC__)
    emulated_cp_async_wait(groups);
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

// 2^x to 22 bits; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// Activations are float or bf16: kernels are templates over the type, and compute in float.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ void from_float(float *to, float x) { *to = x; }
__device__ __forceinline__ void from_float(bf16 *to, float x) { *to = __float2bfloat16(x); }
// x as a matrix product sees it: rounded to the activation type.
template <typename Act> __device__ __forceinline__ float rounded(float x) {
    Act y;
    from_float(&y, x);
    return to_float(y);
}

// Sixteen and four bytes at once, whatever they hold, at addresses that are multiples of that. (A
// memcpy says the same, but nvcc 13 makes single bytes of it.)
template <typename T> __device__ __forceinline__ uint4 load16(const T *from) {
    __uint128_t bits = *(const __uint128_t *)from;
    uint4 v;
    memcpy(&v, &bits, 16);
    return v;
}
template <typename T> __device__ __forceinline__ void store16(T *to, uint4 v) {
    __uint128_t bits;
    memcpy(&bits, &v, 16);
    *(__uint128_t *)to = bits;
}
template <typename T> __device__ __forceinline__ uint32_t load4(const T *from) {
    return *(const uint32_t *)from;
}
template <typename T> __device__ __forceinline__ void store4(T *to, uint32_t v) {
    *(uint32_t *)to = v;
}

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);     // one instruction since Ampere
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}

// Eight activations at once, widened. The address is 16-aligned.
__device__ __forceinline__ void load8(float x[8], const bf16 *from) {
    uint4 v = load16(from);
    bf16 y[8];
    memcpy(y, &v, 16);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __bfloat162float(y[i]);
}
__device__ __forceinline__ void load8(float x[8], const float *from) {
    uint4 low = load16(from), high = load16(from + 4);
    memcpy(x, &low, 16);
    memcpy(x + 4, &high, 16);
}
__device__ __forceinline__ void store8(bf16 *to, const float x[8]) {
    store16(to, make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]),
                           pack_bf16(x[6], x[7])));
}
__device__ __forceinline__ void store8(float *to, const float x[8]) {
    uint4 low, high;
    memcpy(&low, x, 16);
    memcpy(&high, x + 4, 16);
    store16(to, low);
    store16(to + 4, high);
}

// The same for kernels that are built for rows of whole 16-byte pieces (width 8) and for any other
// rows (width 1).
template <int width, typename T> __device__ __forceinline__ void load(float *x, const T *from) {
    if constexpr (width == 8) load8(x, from);
    else *x = to_float(*from);
}
template <int width, typename T> __device__ __forceinline__ void store(T *to, const float *x) {
    if constexpr (width == 8) store8(to, x);
    else from_float(to, *x);
}

// Runs a statement in which Act is the type of dev's activations.
#define FOR_ACT(dev, ...) \
    do { \
        if ((dev)->act == DT_BF16) { using Act = bf16; __VA_ARGS__; } \
        else { using Act = float; __VA_ARGS__; } \
    } while (0)
// Runs a statement in which `width` is how many values to take at a time of rows of n: 8 where rows
// begin at multiples of 16 bytes, else 1.
#define FOR_ROWS(n, ...) \
    do { \
        if ((n) % 8 == 0) { constexpr int width = 8; __VA_ARGS__; } \
        else { constexpr int width = 1; __VA_ARGS__; } \
    } while (0)

// Sum and maximum over a warp; every lane gets the same bits (xor order is symmetric).
template <typename T> __device__ __forceinline__ T warp_sum(T x) {
    for (int lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, lane);
    return x;
}
__device__ __forceinline__ float larger(float a, float b) {      // keeps a NaN of either
    return a > b || a != a ? a : b;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int lane = WARP / 2; lane; lane /= 2)
        x = larger(x, __shfl_xor_sync(0xFFFFFFFFu, x, lane));
    return x;
}

// Over each `lanes` neighbours of a warp, a power of two, of those that are numbers.
__device__ __forceinline__ float max_lanes(float x, int lanes) {
    for (int lane = lanes / 2; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, lane));
    return x;
}

// Sum and maximum over a block, for all its threads; partial (32) is shared memory. With barriers.
template <typename T> __device__ __forceinline__ T block_sum(T x, T *partial) {
    x = warp_sum(x);
    __syncthreads();                                // partial may still be read from the last call
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
    __syncthreads();
    T sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / WARP; warp++) sum += partial[warp];
    return sum;
}
__device__ __forceinline__ float block_max(float x, float *partial) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = x;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / WARP; warp++) x = larger(x, partial[warp]);
    return x;
}

// =================================================================================================
//  2. A GPU: memory, errors, streams
//
//  Work is asked for in order on one stream. A call that fails leaves its message in the Gpu and
//  every op after it returns at once; `check` hands the message out. So ops have no result, and no
//  failing call is ever passed over.
// =================================================================================================

// cuBLAS, found when the first GPU is opened: linking it would cost every start of the program, CPU
// runs too, the loading of its several hundred megabytes.
typedef struct {
    void *library;
    cublasStatus_t (*create)(cublasHandle_t *);
    cublasStatus_t (*destroy)(cublasHandle_t);
    cublasStatus_t (*set_stream)(cublasHandle_t, cudaStream_t);
    cublasStatus_t (*set_workspace)(cublasHandle_t, void *, size_t);
    cublasStatus_t (*set_math)(cublasHandle_t, cublasMath_t);
    cublasStatus_t (*gemm)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                           const void *, const void *, cudaDataType, int, const void *,
                           cudaDataType, int, const void *, void *, cudaDataType, int,
                           cublasComputeType_t, cublasGemmAlgo_t);
} Blas;

// Rows of a weight matrix in the activations' type, ready to be multiplied with (chapter 3).
typedef struct {
    const void *data;               // of the weight, which names it; NULL: the panel is empty
    size_t first, rows, pitch;      // rows first .. first+rows-1, their starts `pitch` values apart
    bool beside;                    // made on the side stream: `ready` tells when
    cudaEvent_t ready, unused;      // it was made; the last product that read it has ended
} Panel;

// Uploads go through these pinned pieces in turn, so that they need not wait for the GPU.
enum { STAGING_PIECES = 32, STAGING_BYTES = 512 << 10 };

enum { SUMS = 1024 };               // partial sums of a reduction over many blocks, at most
enum { BLAS_BYTES = 32 << 20 };     // cuBLAS' own scratch; fixed, so that its results are
enum { WIDENED = 4 << 20 };         // values

typedef struct Gpu {
    const qlora_allocator *allocator;   // for this structure itself
    int number;                         // of the card
    int major, minor;                   // compute capability
    int processors;                     // streaming multiprocessors
    bool matrix_units;                  // bf16 mma and cp.async: Ampere or newer
    cudaStream_t stream, side;          // `side` prepares panels
    Blas blas;
    cublasHandle_t handle;
    void *workspace;                    // (BLAS_BYTES)
    double *sums;                       // (SUMS + 1) partial sums, and what they add up to
    char *staging;                      // (STAGING_PIECES, STAGING_BYTES) pinned
    cudaEvent_t copied[STAGING_PIECES]; // the piece may be written again
    int piece;                          // the next one
    Panel panels[2];
    const void *panel_scratch;          // the scratch they lie in
    int panel;                          // the one to make next
    size_t panel_bytes, panel_columns;  // of each; columns it has beyond those of a weight
    size_t rows;                        // of the last linears: hints matter to many rows only
    bool recording;                     // inside replay: no hints
    bool written;                       // the host wrote something: panels made before are void
    float *widened;                     // (3, WIDENED) before Ampere: operands of a product, float
    bool failed;
    char message[256];                  // the first failure
} Gpu;

// ---------------------------------------------------------------------------------------- errors

__attribute__((format(printf, 2, 3)))
static void gpu_fail(Gpu *gpu, const char *format, ...) {
    va_list args;
    if (gpu->failed) return;
    gpu->failed = true;
    va_start(args, format);
    vsnprintf(gpu->message, sizeof gpu->message, format, args);
    va_end(args);
}

// True when the call failed; the first failure is kept. The rest of the file calls `try_cuda` where
// nothing follows from a failure.
static bool cuda_failed(Gpu *gpu, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return false;
    (void)cudaGetLastError();                       // else the next launch is blamed as well
    gpu_fail(gpu, "%s: %s", what, cudaGetErrorString(error));
    return true;
}

static void try_cuda(Gpu *gpu, cudaError_t error, const char *what) {
    (void)cuda_failed(gpu, error, what);
}

// Whether an op cannot do anything any more.
static bool unusable(Gpu *gpu) {
    return gpu->failed || cuda_failed(gpu, cudaSetDevice(gpu->number), "cudaSetDevice");
}

// Waits for all that a stream was asked for. True when something of it failed.
static bool wait_failed(Gpu *gpu, cudaStream_t stream) {
    return cuda_failed(gpu, cudaStreamSynchronize(stream), "waiting for the GPU");
}

// Launches a kernel with so many bytes of dynamic shared memory, unless something has failed or
// there is nothing to do; arguments are cast to what it takes, as an op's void * to activations.
template <typename... To, typename... From>
static void launch_shared(Device *dev, size_t shared, const char *name, void (*kernel)(To...),
                          dim3 grid, unsigned block, From... arguments) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (gpu->failed || !grid.x || !grid.y) return;
    kernel<<<grid, block, shared, gpu->stream>>>((To)arguments...);
    try_cuda(gpu, cudaGetLastError(), name);
}

// The same without such memory. LAUNCH takes name_kernel, LAUNCH_ACT its instance for the
// activations of dev, LAUNCH_ROWS that for rows of n of them; the arguments may then name `width`.
template <typename... Arguments> static void launch(Device *dev, Arguments... arguments) {
    launch_shared(dev, 0, arguments...);
}
#define LAUNCH(dev, name, ...) launch(dev, #name, name##_kernel, __VA_ARGS__)
#define LAUNCH_ACT(dev, name, ...) \
    FOR_ACT(dev, launch(dev, #name, name##_kernel<Act>, __VA_ARGS__))
#define LAUNCH_ROWS(dev, n, name, ...) \
    FOR_ACT(dev, FOR_ROWS(n, launch(dev, #name, name##_kernel<Act, width>, __VA_ARGS__)))

__attribute__((format(printf, 2, 3)))
static int open_fail(qlora_error *err, const char *format, ...) {
    va_list args;
    if (!err) return -1;
    va_start(args, format);
    vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return -1;
}

// ---------------------------------------------------------------------------------------- sizes

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }
static size_t ceil_div(size_t n, size_t d) { return (n + d - 1) / d; }
static size_t round_up(size_t n, size_t step) { return ceil_div(n, step) * step; }
static size_t act_size(DType act) { return act == DT_BF16 ? sizeof(bf16) : sizeof(float); }

// Blocks of a grid's x for n things, `each` per block. A launch of more than INT_MAX is refused.
static unsigned blocks_for(size_t n, size_t each) {
    return (unsigned)min_size(ceil_div(n, each), UINT_MAX);
}

// Pieces of the op's scratch, as arena_alloc of qlora.c hands them out; 256-aligned.
typedef struct { char *base; size_t used; } Carve;

static void *carve(Carve *c, size_t n, size_t size) {
    void *p = c->base ? c->base + c->used : NULL;
    c->used += round_up(n * size, 256);
    return p;
}

// ---------------------------------------------------------------------------------------- memory

// The only place where device memory comes from.
static cudaError_t device_memory(void **memory, size_t bytes) {
    *memory = NULL;
    return cudaMalloc(memory, max_size(bytes, 256));
}

static void *gpu_allocate(Device *dev, size_t bytes, qlora_error *err) {
    Gpu *gpu = (Gpu *)dev->gpu;
    void *memory = NULL;
    size_t available = 0, total = 0;
    if (unusable(gpu)) return open_fail(err, "GPU: %s", gpu->message), (void *)NULL;
    if (device_memory(&memory, bytes) == cudaSuccess) return memory;
    (void)cudaGetLastError();                       // a refusal that the caller may recover from
    if (cudaMemGetInfo(&available, &total) != cudaSuccess) (void)cudaGetLastError();
    open_fail(err, "out of GPU memory: %.1f MiB were asked for, %.1f of %.1f MiB are free",
              (double)bytes / (1 << 20), (double)available / (1 << 20), (double)total / (1 << 20));
    return NULL;
}

static void forget_panels(Gpu *gpu);                // chapter 3

// Nothing that was asked for may still use the memory.
static void gpu_release(Device *dev, void *memory, size_t bytes) {
    Gpu *gpu = (Gpu *)dev->gpu;
    (void)bytes;
    if (!memory) return;
    forget_panels(gpu);
    try_cuda(gpu, cudaSetDevice(gpu->number), "cudaSetDevice");
    (void)wait_failed(gpu, gpu->side), (void)wait_failed(gpu, gpu->stream);
    try_cuda(gpu, cudaFree(memory), "cudaFree");
}

static size_t gpu_available(Device *dev) {
    Gpu *gpu = (Gpu *)dev->gpu;
    size_t available = 0, total = 0;
    if (cuda_failed(gpu, cudaSetDevice(gpu->number), "cudaSetDevice")) return 0;
    if (cuda_failed(gpu, cudaMemGetInfo(&available, &total), "cudaMemGetInfo")) return 0;
    return available;
}

static void gpu_upload(Device *dev, void *to, const void *host, size_t bytes) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (unusable(gpu)) return;
    gpu->written = true;
    for (size_t at = 0, n; at < bytes; at += n) {
        char *piece = gpu->staging + (size_t)gpu->piece * STAGING_BYTES;
        cudaEvent_t copied = gpu->copied[gpu->piece];
        n = min_size(bytes - at, STAGING_BYTES);
        if (cuda_failed(gpu, cudaEventSynchronize(copied), "waiting for an upload")) return;
        memcpy(piece, (const char *)host + at, n);
        if (cuda_failed(gpu, cudaMemcpyAsync((char *)to + at, piece, n, cudaMemcpyHostToDevice,
                                             gpu->stream), "upload") ||
            cuda_failed(gpu, cudaEventRecord(copied, gpu->stream), "upload"))
            return;
        gpu->piece = (gpu->piece + 1) % STAGING_PIECES;
    }
}

// Where nothing can be had any more, the host gets zeros rather than what lay in its memory.
static void gpu_download(Device *dev, void *host, const void *from, size_t bytes) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (!bytes) return;
    if (unusable(gpu) ||
        cuda_failed(gpu, cudaMemcpyAsync(host, from, bytes, cudaMemcpyDeviceToHost, gpu->stream),
                    "download") || wait_failed(gpu, gpu->stream))
        memset(host, 0, bytes);
}

static void gpu_zero(Device *dev, void *memory, size_t bytes) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (!bytes || unusable(gpu)) return;
    try_cuda(gpu, cudaMemsetAsync(memory, 0, bytes, gpu->stream), "cudaMemsetAsync");
}

static int gpu_check(Device *dev, qlora_error *err) {
    Gpu *gpu = (Gpu *)dev->gpu;
    bool bad = unusable(gpu) || wait_failed(gpu, gpu->stream) || wait_failed(gpu, gpu->side);
    return bad ? open_fail(err, "GPU: %s", gpu->message) : 0;
}

// =================================================================================================
//  3. 4-bit weights: quantise, dequantise, panels
//
//  Weights stay 4-bit in memory. What a matrix product needs of one is dequantised just before into
//  a panel of scratch, and while that product runs, the panel of the next is made on a second
//  stream. Numbers are those of chapter 2 of qlora.c bit for bit: where the compiler might fuse a
//  product and a sum, or divide approximately, the rounding is spelled out.
// =================================================================================================

// ------------------------------------------------------------------------------------- quantising

// The constants of one 4-bit type; a kernel's argument.
typedef struct {
    bool nf4;
    float thresholds[15];           // NF4; FP4 has 7
    uint8_t by_size[8];             // FP4
} CodeLevels;

// Ties go to the lower value, which is the larger magnitude of a negative one of FP4.
__device__ __forceinline__ int nearest_code(const CodeLevels &levels, float x) {
    bool flip = !levels.nf4 && x < 0;
    int rank = 0;
#pragma unroll
    for (int k = 0; k < 15; k++)
        if (levels.nf4 || k < 7)
            rank += flip ? -x >= levels.thresholds[k] : x > levels.thresholds[k];
    return levels.nf4 ? rank : levels.by_size[rank] | (flip ? 8 : 0);
}

// Twin of quantize_block: eight lanes own a block of 64, a lane 8 of its values and so 4 bytes of
// codes. Reads 2 or 4 bytes a value, writes 0.56; the bus to the card, not the card, is the limit.
template <typename Raw>
__global__ void quantize_kernel(uint8_t *packed, float *absmax, const void *raw,
                                const __grid_constant__ CodeLevels levels, size_t n) {
    const float smallest = 1e-38f;                  // keeps a block of zeros dividable
    size_t at = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8, block = at / QUANT_BLOCK;
    bool full = (block + 1) * QUANT_BLOCK <= n;
    float x[8], largest = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        x[i] = at + i < n ? to_float(((const Raw *)raw)[at + i]) : 0;
        largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    }
    largest = max_lanes(largest, 8);
    float divisor = largest > smallest ? largest : smallest;
    float reciprocal = __fdiv_rn(1.0f, divisor);
    uint8_t codes[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float s = full ? __fmul_rn(x[i], reciprocal) : __fdiv_rn(x[i], divisor);
        s = s > -1.0f ? s : -1.0f;
        s = s < 1.0f ? s : 1.0f;
        codes[i] = (uint8_t)nearest_code(levels, s);
        if (at + i >= n) codes[i] = levels.nf4 ? 7 : 0;     // an odd tail's partner is the value 0
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2)
        if (at + i < n) packed[(at + i) / 2] = (uint8_t)(codes[i] << 4 | codes[i + 1]);
    if (at < n && at % QUANT_BLOCK == 0) absmax[block] = full ? largest : divisor;
}

static void quantize(Device *dev, uint8_t *packed, float *absmax, const void *raw, DType from,
                     DType to, size_t n) {
    Gpu *gpu = (Gpu *)dev->gpu;
    CodeLevels levels = {};
    levels.nf4 = to == DT_NF4;
    if (levels.nf4) memcpy(levels.thresholds, qlora_nf4_thresholds, sizeof qlora_nf4_thresholds);
    else memcpy(levels.thresholds, qlora_fp4_thresholds, sizeof qlora_fp4_thresholds);
    memcpy(levels.by_size, qlora_fp4_by_size, sizeof levels.by_size);
    gpu->written = true;
    auto kernel = from == DT_BF16 ? quantize_kernel<bf16>
                : from == DT_F16 ? quantize_kernel<__half> : quantize_kernel<float>;
    launch(dev, "quantize", kernel, blocks_for(n, 128 * 8), 128, packed, absmax, raw, levels, n);
}

// sums[i] = the sum, in order, of the i-th SCALE_SUM scales. A thread owns a sum: the order leaves
// it no help, and there are few scales.
__global__ void sum_scales_kernel(double *sums, const float *absmax, size_t n) {
    size_t start = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * SCALE_SUM;
    if (start >= n) return;
    size_t end = start + SCALE_SUM < n ? start + SCALE_SUM : n;
    double sum = 0;
    for (size_t i = start; i < end; i++) sum += (double)absmax[i];
    sums[start / SCALE_SUM] = sum;
}

// *total = or += the sums, in order. One thread.
__global__ void add_sums_kernel(double *total, const double *sums, size_t n, bool first) {
    double sum = first ? 0 : *total;
    for (size_t i = 0; i < n; i++) sum += sums[i];
    *total = sum;
}

// Twin of quantize_scales: a warp owns SCALE_BLOCK scales, a lane 8 of them. Reads 4 bytes a scale
// and writes 1; there is one for 64 values.
__global__ void quantize_scales_kernel(uint8_t *codes, float *absmax2, const float *absmax,
                                       size_t n, const float *map, const double *total) {
    __shared__ float levels[256];
    for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) levels[i] = map[i];
    __syncthreads();
    float offset = (float)(*total / (double)n);
    size_t warp = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    size_t at = warp * SCALE_BLOCK + threadIdx.x % WARP;
    float x[SCALE_BLOCK / WARP], largest = 0;
#pragma unroll
    for (int i = 0; i < SCALE_BLOCK / WARP; i++) {
        x[i] = at + i * WARP < n ? absmax[at + i * WARP] - offset : 0;
        largest = fmaxf(largest, fabsf(x[i]));
    }
    largest = warp_max(largest);
    float reciprocal = __fdiv_rn(1.0f, fmaxf(largest, 1e-38f));
    for (int i = 0; i < SCALE_BLOCK / WARP; i++) {
        float scaled = fminf(fmaxf(__fmul_rn(x[i], reciprocal), -1.0f), 1.0f);
        int low = 0, high = 255;
        while (high - low > 1) {                    // the nearest level; halfway goes to the lower
            int middle = (low + high) / 2;
            if (scaled > levels[middle]) low = middle;
            else high = middle;
        }
        if (scaled > (levels[low] + levels[high]) / 2) low = high;
        // All scales equal: bitsandbytes divides 0 by 0 and lands on code 0; so do we.
        if (at + i * WARP < n) codes[at + i * WARP] = (uint8_t)(largest > 0 ? low : 0);
    }
    if (at < n && threadIdx.x % WARP == 0) absmax2[warp] = largest;
}

static float quantize_scales(Device *dev, uint8_t *codes, float *absmax2, const float *absmax,
                             size_t n, const float *map) {
    Gpu *gpu = (Gpu *)dev->gpu;
    double sum = 0, *total = gpu->sums + SUMS;
    size_t each = (size_t)SUMS * SCALE_SUM;
    if (gpu->failed || !n) return 0;
    for (size_t start = 0; start < n; start += each) {
        size_t here = min_size(each, n - start), sums = ceil_div(here, SCALE_SUM);
        LAUNCH(dev, sum_scales, blocks_for(sums, WARP), WARP, gpu->sums, absmax + start, here);
        LAUNCH(dev, add_sums, 1, 1, total, gpu->sums, sums, start == 0);
    }
    LAUNCH(dev, quantize_scales, blocks_for(n, 4 * SCALE_BLOCK), 4 * WARP, codes, absmax2, absmax,
           n, map, total);
    gpu_download(dev, &sum, total, sizeof sum);
    return (float)(sum / (double)n);
}

// delta = s (B A); a block owns a row of it. What merging costs is writing the files.
__global__ void low_rank_kernel(float *delta, const float *B, const float *A, float s, size_t K,
                                size_t r) {
    size_t row = blockIdx.x;
    for (size_t k = threadIdx.x; k < K; k += blockDim.x) {
        float sum = 0;
        for (size_t j = 0; j < r; j++)
            sum = __fadd_rn(sum, __fmul_rn(B[row * r + j], A[j * K + k]));
        delta[row * K + k] = __fmul_rn(s, sum);
    }
}

static void low_rank(Device *dev, real *delta, const real *B, const real *A, real s, size_t rows,
                     size_t K, size_t r) {
    LAUNCH(dev, low_rank, blocks_for(rows, 1), 128, delta, B, A, s, K, r);
}

// --------------------------------------------------------------------------------------- reading

// The tables of a 4-bit weight in shared memory, for the whole block. Ends with a barrier.
__device__ __forceinline__ void load_tables(float code[16], float code8[256], const Weight &w) {
    bool packed = w.dtype == DT_NF4 || w.dtype == DT_FP4;
    for (unsigned i = threadIdx.x; packed && i < 16; i += blockDim.x) code[i] = w.code[i];
    for (unsigned i = threadIdx.x; packed && !w.absmax && i < 256; i += blockDim.x)
        code8[i] = w.code8[i];
    __syncthreads();
}

__device__ __forceinline__ float block_scale(const Weight &w, size_t block, const float *code8) {
    if (w.absmax) return w.absmax[block];
    return __fadd_rn(__fmul_rn(code8[w.absmax8[block]], w.absmax2[block / SCALE_BLOCK]), w.offset);
}

// Eight codes, the first of them number `at`, a multiple of eight.
__device__ __forceinline__ uint32_t load_codes(const Weight &w, size_t at) {
    return load4((const uint8_t *)w.data + at / 2);
}

// The value of nibble i of four bytes of codes; the even one is a byte's high nibble.
__device__ __forceinline__ float decode(uint32_t codes, int i, float scale, const float *code) {
    return __fmul_rn(code[codes >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15], scale);
}

// Twin of weight_row, before rounding: the `width` values of a weight from number `at` on. Width 8
// wants `at` to be a multiple of 8.
template <int width>
__device__ __forceinline__ void read_weight(float *x, const Weight &w, size_t at, const float *code,
                                            const float *code8) {
    if (w.dtype == DT_F32) load<width>(x, (const float *)w.data + at);
    else if (w.dtype == DT_BF16) load<width>(x, (const bf16 *)w.data + at);
    else if (w.dtype == DT_F16) {
        for (int i = 0; i < width; i++) x[i] = to_float(((const __half *)w.data)[at + i]);
    } else {
        float scale = block_scale(w, at / QUANT_BLOCK, code8);
        if constexpr (width == 8) {
            uint32_t codes = load_codes(w, at);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = decode(codes, i, scale, code);
        } else *x = decode(((const uint8_t *)w.data)[at / 2], at % 2, scale, code);
    }
}

enum { DEQUANTISE_PIECES = 4 };

// panel (rows, pitch) = rows of w from row `first` on, rounded to the activations' type. A warp
// owns 4 x 32 pieces of 8 values of a row (width 1: 4 x 32 values); all loads are under way before
// the first is used. Reads 0.56 (nested scales 0.52) bytes a value and writes 2: limited by memory.
template <typename Act, int width>
__global__ void dequantise_kernel(Act *panel, size_t pitch, Weight w, size_t first, size_t rows) {
    __shared__ float code[16];
    __shared__ float code8[256];
    load_tables(code, code8, w);
    size_t row = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    size_t column = ((size_t)blockIdx.y * DEQUANTISE_PIECES * WARP + threadIdx.x % WARP) * width;
    if (row >= rows) return;
    size_t at = (first + row) * w.K + column;
    Act *to = panel + row * pitch + column;
    const size_t step = WARP * width;
    if (width == 8 && (w.dtype == DT_NF4 || w.dtype == DT_FP4)) {
        uint32_t codes[DEQUANTISE_PIECES];
        float scale[DEQUANTISE_PIECES];
#pragma unroll
        for (int i = 0; i < DEQUANTISE_PIECES; i++) {
            bool inside = column + i * step < w.K;
            codes[i] = inside ? load_codes(w, at + i * step) : 0;
            scale[i] = inside ? block_scale(w, (at + i * step) / QUANT_BLOCK, code8) : 0;
        }
#pragma unroll
        for (int i = 0; i < DEQUANTISE_PIECES; i++) {
            float x[8];
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = decode(codes[i], j, scale[i], code);
            if (column + i * step < w.K) store<8>(to + i * step, x);
        }
        return;
    }
    for (int i = 0; i < DEQUANTISE_PIECES; i++) {
        float x[width];
        if (column + i * step >= w.K) return;
        read_weight<width>(x, w, at + i * step, code, code8);
        store<width>(to + i * step, x);
    }
}

// ---------------------------------------------------------------------------------------- panels
//
// Two panels lie at the end of the scratch and are made in turn. A panel names the weight it was
// made from, is used once, and is then free.

enum { FEW_ROWS = 8 };              // up to here chapter 8 reads the codes themselves,
enum { DECODE_WARPS = 8 };          // ... with blocks of so many warps

// A matrix larger than this is taken in pieces of some rows.
static const size_t panel_most = (size_t)256 << 20;

static void forget_panels(Gpu *gpu) {
    for (Panel *p = gpu->panels; p < gpu->panels + 2; p++) {
        if (p->beside) try_cuda(gpu, cudaStreamWaitEvent(gpu->stream, p->ready, 0), "panel");
        p->data = NULL;
        p->beside = false;
    }
}

// Bytes of the two panels. Never shrinks, so that the scratch of a session that was opened before
// another still holds what it was made for.
static size_t panels_scratch(Device *dev, const OpSizes *s) {
    Gpu *gpu = (Gpu *)dev->gpu;
    gpu->panel_columns = max_size(gpu->panel_columns, round_up(s->max_r + 2, 8));
    size_t D = s->D + 8 + gpu->panel_columns, F = s->F + 8 + gpu->panel_columns;
    size_t bytes = max_size(D * D, D * F) * act_size(dev->act);
    bytes = max_size(min_size(bytes, panel_most), max_size(D, F) * sizeof(float));
    gpu->panel_bytes = max_size(gpu->panel_bytes, round_up(bytes, 256));
    return 2 * gpu->panel_bytes;
}

// The op's own part of the scratch; NULL, and the op must return, when it is too small.
static char *op_scratch(Device *dev, size_t bytes) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (bytes + 2 * gpu->panel_bytes <= dev->scratch_size) return dev->scratch;
    gpu_fail(gpu, "an op needs %zu bytes of scratch and two panels of %zu, but there are %zu",
             bytes, gpu->panel_bytes, dev->scratch_size);
    return NULL;
}

static void *panel_memory(const Device *dev, const Panel *p) {
    const Gpu *gpu = (const Gpu *)dev->gpu;
    return dev->scratch + dev->scratch_size - (size_t)(gpu->panels + 2 - p) * gpu->panel_bytes;
}

// Whether a product can read the weight where it lies.
static bool in_place(const Device *dev, const Weight *w) {
    return w->dtype == (dev->act == DT_BF16 ? DT_BF16 : DT_F32);
}

// Values from one row of a panel to the next: room for `extra` columns, 16-byte pieces whole.
static size_t panel_pitch(const Gpu *gpu, const Weight *w, size_t extra) {
    return round_up(w->K + max_size(gpu->panel_columns, extra), 8);
}

// Rows of a weight that fit into a panel.
static size_t panel_rows(const Device *dev, const Weight *w, size_t pitch) {
    const Gpu *gpu = (const Gpu *)dev->gpu;
    return min_size(w->N, gpu->panel_bytes / (pitch * act_size(dev->act)));
}

template <typename Act, int width>
static void dequantise_launch(void *panel, size_t pitch, const Weight *w, size_t first, size_t rows,
                              cudaStream_t stream) {
    dim3 grid(blocks_for(rows, 4), blocks_for(w->K, DEQUANTISE_PIECES * WARP * width));
    Act *to = (Act *)panel;
    dequantise_kernel<Act, width><<<grid, 4 * WARP, 0, stream>>>(to, pitch, *w, first, rows);
}

// Makes a panel of rows first .. first+rows-1 of w in the place that is not `busy`. On the side
// stream it waits for the products that read what was there; on the main one for the side stream's
// work in that place, which nobody wanted after all.
static Panel *make_panel(Device *dev, const Weight *w, size_t first, size_t rows, size_t pitch,
                         const Panel *busy, bool beside) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (&gpu->panels[gpu->panel] == busy) gpu->panel ^= 1;
    Panel *p = &gpu->panels[gpu->panel];
    gpu->panel ^= 1;
    if (beside) try_cuda(gpu, cudaStreamWaitEvent(gpu->side, p->unused, 0), "panel");
    else if (p->beside) try_cuda(gpu, cudaStreamWaitEvent(gpu->stream, p->ready, 0), "panel");
    *p = {w->data, first, rows, pitch, beside, p->ready, p->unused};
    cudaStream_t stream = beside ? gpu->side : gpu->stream;
    void *to = panel_memory(dev, p);
    FOR_ACT(dev, FOR_ROWS(w->K, dequantise_launch<Act, width>(to, pitch, w, first, rows, stream)));
    try_cuda(gpu, cudaGetLastError(), "dequantise");
    if (beside) try_cuda(gpu, cudaEventRecord(p->ready, gpu->side), "panel");
    return p;
}

// Panels made for another scratch are void, for its memory may have served something else since,
// and so are those made before the host wrote anything, which may have been weights. The next ones
// wait for all that.
static void check_panels(Device *dev) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (!gpu->written && gpu->panel_scratch == dev->scratch + dev->scratch_size) return;
    forget_panels(gpu);
    for (int i = 0; i < 2 && !gpu->recording; i++)
        try_cuda(gpu, cudaEventRecord(gpu->panels[i].unused, gpu->stream), "panel");
    gpu->panel_scratch = dev->scratch + dev->scratch_size;
    gpu->written = false;
}

// A panel for the main stream to read: the one that was made before, or a new one.
static Panel *take_panel(Device *dev, const Weight *w, size_t first, size_t rows, size_t pitch) {
    Gpu *gpu = (Gpu *)dev->gpu;
    check_panels(dev);
    for (Panel *p = gpu->panels; p < gpu->panels + 2; p++) {
        if (p->data != w->data || p->first != first || p->rows != rows || p->pitch != pitch)
            continue;
        if (p->beside) try_cuda(gpu, cudaStreamWaitEvent(gpu->stream, p->ready, 0), "panel");
        p->beside = false;
        return p;
    }
    return make_panel(dev, w, first, rows, pitch, NULL, false);
}

// Everything that reads the panel has been asked for.
static void leave_panel(Gpu *gpu, Panel *p) {
    p->data = NULL;
    if (!gpu->recording)                            // nothing runs beside a recording
        try_cuda(gpu, cudaEventRecord(p->unused, gpu->stream), "panel");
}

// A hint. A wrong one costs the effort.
static void prefetch(Device *dev, const Weight *w) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (gpu->failed || gpu->recording || gpu->rows <= FEW_ROWS || in_place(dev, w)) return;
    size_t pitch = panel_pitch(gpu, w, 0), rows = panel_rows(dev, w, pitch);
    if (!rows || 2 * gpu->panel_bytes > dev->scratch_size) return;
    check_panels(dev);
    for (int i = 0; i < 2; i++)
        if (gpu->panels[i].data == w->data && gpu->panels[i].beside) return;
    make_panel(dev, w, 0, rows, pitch, NULL, true);
}

// =================================================================================================
//  4. Matrix products and the LoRA linear
//
//  Products are cuBLAS'. Around them: LoRA's A and B rounded to the activations' type, dropout, and
//  one trick that saves a pass over y and a rounding. With [x | u] and [W | B] as operands
//      y = x W^T + u B^T = [x | u] [W | B]^T
//  is a single product; a bias is two more columns of W, its rounded value and what that left over,
//  next to ones in x.
// =================================================================================================

// An operand or a result as it lies in memory, row-major, its rows `pitch` values apart.
typedef struct {
    void *data;
    size_t pitch;
    bool transposed;                // an operand: its transpose is meant
    bool full;                      // float32 whatever the activations are
} Matrix;

static Matrix act_matrix(const void *data, size_t pitch) {
    return {(void *)(uintptr_t)data, pitch, false, false};
}
static Matrix full_matrix(float *data, size_t pitch) { return {data, pitch, false, true}; }
static Matrix transposed(Matrix m) { return {m.data, m.pitch, !m.transposed, m.full}; }
static Matrix from_column(const Device *dev, Matrix m, size_t column) {
    m.data = (char *)m.data + column * (m.full ? sizeof(float) : act_size(dev->act));
    return m;
}

// C (m, n) = alpha A (m, k) B (k, n) + beta C. cuBLAS counts columns first: to it all three are
// transposed, and C^T = B^T A^T.
static void gemm(Gpu *gpu, void *C, cudaDataType c_type, size_t ldc, Matrix A, Matrix B,
                 cudaDataType type, size_t m, size_t n, size_t k, float alpha, float beta) {
    size_t most = max_size(max_size(m, n), max_size(k, max_size(ldc, max_size(A.pitch, B.pitch))));
    if (most > INT_MAX) return gpu_fail(gpu, "matrix product: %zu is too large a size", most);
    cublasOperation_t a = A.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t b = B.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasStatus_t status = gpu->blas.gemm(
        gpu->handle, b, a, (int)n, (int)m, (int)k, &alpha, B.data, type, (int)B.pitch, A.data, type,
        (int)A.pitch, &beta, C, c_type, (int)ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    if (status != CUBLAS_STATUS_SUCCESS)
        gpu_fail(gpu, "cublasGemmEx (%zu, %zu, %zu): status %d", m, n, k, (int)status);
}

// to (.., to_pitch) = from (.., pitch), `columns` of each row, a multiple of `width`. A block owns
// a row. Reads and writes each value once.
template <typename From, int width, typename To = From>
__global__ void copy_rows_kernel(To *to, size_t to_pitch, const From *from, size_t pitch,
                                 size_t columns) {
    size_t row = blockIdx.x;
    for (size_t i = width * threadIdx.x; i < columns; i += width * blockDim.x) {
        float x[width];
        load<width>(x, from + row * pitch + i);
        store<width>(to + row * to_pitch + i, x);
    }
}

// to (rows, pitch) = beta to + from (rows, columns), rounded once. A block owns a row.
__global__ void narrow_kernel(bf16 *to, size_t pitch, const float *from, size_t columns,
                              float beta) {
    size_t row = blockIdx.x;
    for (size_t i = threadIdx.x; i < columns; i += blockDim.x) {
        bf16 *y = to + row * pitch + i;
        from_float(y, from[row * columns + i] + (beta != 0 ? beta * to_float(*y) : 0));
    }
}

// Rows first .. first+n-1 of op(M) (.., k), widened into the given buffer.
static Matrix widened(Device *dev, float *to, Matrix M, size_t first, size_t n, size_t k) {
    size_t rows = M.transposed ? k : n, columns = M.transposed ? n : k;
    const bf16 *from = (const bf16 *)M.data + first * (M.transposed ? 1 : M.pitch);
    launch(dev, "widen", copy_rows_kernel<bf16, 1, float>, blocks_for(rows, 1), 128, to, columns,
           from, M.pitch, columns);
    return {to, columns, M.transposed, true};
}

// The same without bf16 units: operands are widened a piece of C at a time, multiplied as float32,
// and the sum is rounded once.
static void matmul_widened(Device *dev, Matrix C, Matrix A, Matrix B, size_t m, size_t n, size_t k,
                           float alpha, float beta) {
    Gpu *gpu = (Gpu *)dev->gpu;
    float *a = gpu->widened, *b = a + WIDENED, *c = b + WIDENED;
    if (k > WIDENED) return gpu_fail(gpu, "matrix product: %zu is too large a size", k);
    size_t height = min_size(m, WIDENED / k), width = min_size(n, WIDENED / max_size(k, height));
    for (size_t i = 0; i < m; i += height) {
        size_t rows = min_size(height, m - i);
        Matrix left = widened(dev, a, A, i, rows, k);
        for (size_t j = 0; j < n && !gpu->failed; j += width) {
            size_t columns = min_size(width, n - j), at = i * C.pitch + j;
            Matrix right = transposed(widened(dev, b, transposed(B), j, columns, k));
            float *to = C.full ? (float *)C.data + at : c;
            gemm(gpu, to, CUDA_R_32F, C.full ? C.pitch : columns, left, right, CUDA_R_32F, rows,
                 columns, k, alpha, C.full ? beta : 0);
            if (!C.full)
                LAUNCH(dev, narrow, blocks_for(rows, 1), 128, (bf16 *)C.data + at, C.pitch, c,
                       columns, beta);
        }
    }
}

// C (m, n) = alpha op(A) (m, k) op(B) (k, n) + beta C: activations in, float32 sums, one rounding.
static void matmul(Device *dev, Matrix C, Matrix A, Matrix B, size_t m, size_t n, size_t k,
                   float alpha, float beta) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (gpu->failed || !m || !n || !k) return;
    bool narrow = dev->act == DT_BF16;
    if (narrow && !gpu->matrix_units) return matmul_widened(dev, C, A, B, m, n, k, alpha, beta);
    cudaDataType type = narrow ? CUDA_R_16BF : CUDA_R_32F;
    gemm(gpu, C.data, C.full ? CUDA_R_32F : type, C.pitch, A, B, type, m, n, k, alpha, beta);
}

// --------------------------------------------------------------------------------------- dropout

// Which span row t belongs to: the last that does not begin behind it. Empty spans have no rows.
__device__ __forceinline__ const Span &span_of(const Span *spans, size_t n, size_t t) {
    size_t low = 0, high = n;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (spans[middle].q0 <= t) low = middle;
        else high = middle;
    }
    while (low > 0 && spans[low].nq == 0) low--;
    return spans[low];
}

// What dropout needs to know; a kernel's argument.
typedef struct {
    const Span *spans;
    size_t n_spans;
    uint32_t key[2], module;
    float dropout;
} Mask;

// Twin of dropout_row: what values column .. column+7 of row t are multiplied with.
__device__ __forceinline__ void mask8(float m[8], const Mask &a, const Span &span, size_t t,
                                      size_t column) {
    uint32_t bits[8];
    float keep = __fdiv_rn(1.0f, 1.0f - a.dropout);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        uint32_t counter[4] = {(uint32_t)(column / 4) + half, (uint32_t)(t - span.q0),
                               span.ordinal, a.module};
        philox(bits + 4 * half, counter, a.key);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) m[i] = unit_float(bits[i]) < a.dropout ? 0 : keep;
}

// sum (T, K) = or += dropout(part), rounded: forward, and the way back, where Out is float32 if
// more is to come. A block owns a row, a thread 8 columns at a time. Reads and writes each value
// once; ten rounds of Philox for 4 values are about as long as that takes.
template <typename Act, int width, typename Out = Act>
__global__ void dropout_kernel(Out *sum, const Act *part, size_t K, Mask a, bool add) {
    size_t t = blockIdx.x;
    const Span &span = span_of(a.spans, a.n_spans, t);
    for (size_t k = 8 * threadIdx.x; k < K; k += 8 * blockDim.x) {
        float m[8], v[width], s[width];
        mask8(m, a, span, t, k);
#pragma unroll
        for (int i = 0; i < 8; i += width) {
            size_t at = t * K + k + i;
            if (k + i >= K) continue;
            load<width>(v, part + at);
            if (add) load<width>(s, sum + at);
            for (int j = 0; j < width; j++) v[j] = add ? s[j] + v[j] * m[i + j] : v[j] * m[i + j];
            store<width>(sum + at, v);
        }
    }
}

static bool has_dropout(const Lora *lora, const Batch *batch) {
    return batch->training && lora->r && lora->dropout > 0;
}

static Mask mask_of(const Lora *lora, const Batch *batch) {
    uint32_t seed = (uint32_t)batch->seed ^ (uint32_t)(batch->seed >> 32) * 0x9E3779B9u;
    return {batch->spans, batch->n_spans, {seed, batch->step}, lora->module, lora->dropout};
}

// sum (T, K) = or += dropout(part).
static void dropout(Device *dev, Matrix sum, const void *part, size_t K, const Lora *lora,
                    const Batch *batch, bool add) {
    Mask a = mask_of(lora, batch);
    unsigned n = blocks_for(batch->T, 1);
    if (!sum.full) LAUNCH_ROWS(dev, K, dropout, n, 128, sum.data, part, K, a, add);
    else FOR_ACT(dev, FOR_ROWS(K, launch(dev, "dropout", dropout_kernel<Act, width, float>, n, 128,
                                         sum.data, part, K, a, add)));
}

// ------------------------------------------------------------------------- operands of the adapter

enum { MOST_PRODUCTS = 4 };              // linears that read the same x, at most

// Matrices that are rounded to the activations' type in one launch.
typedef struct {
    const float *from[2 * MOST_PRODUCTS];
    size_t to[2 * MOST_PRODUCTS + 1];    // where each begins in the result; the last: its end
} Masters;

// The blocks of one blockIdx.y own a matrix, their threads its values in turn. An adapter is small:
// 4 bytes read and 2 written for each of its parameters.
template <typename Act> __global__ void round_masters_kernel(Act *to, Masters a) {
    const float *from = a.from[blockIdx.y];
    size_t n = a.to[blockIdx.y + 1] - a.to[blockIdx.y], first = a.to[blockIdx.y];
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x)
        from_float(to + first + i, from[i]);
}

// The A (r, K) of all products beneath each other and, with `both`, after them each B (N, r).
typedef struct {
    void *A, *B[MOST_PRODUCTS];
    size_t R, at[MOST_PRODUCTS];         // rows of A altogether, and where each begins
} Masters16;

static Masters16 round_masters(Device *dev, Carve *scratch, const Product *products, size_t n,
                               bool both) {
    Masters16 m = {};
    Masters a = {};
    size_t pieces = 0, most = 0;
    for (size_t i = 0; i < n; i++) {
        const Linear *linear = products[i].linear;
        m.at[i] = m.R;
        m.R += linear->lora.r;
        a.from[pieces++] = linear->lora.A;
        a.to[pieces] = m.R * linear->weight.K;
    }
    for (size_t i = 0; i < n && both; i++) {
        const Linear *linear = products[i].linear;
        a.from[pieces++] = linear->lora.B;
        a.to[pieces] = a.to[pieces - 1] + linear->weight.N * linear->lora.r;
    }
    for (size_t i = 0; i < pieces; i++) most = max_size(most, a.to[i + 1] - a.to[i]);
    m.A = carve(scratch, a.to[pieces], act_size(dev->act));
    if (!m.R || !scratch->base) return m;
    for (size_t i = 0; i < n && both; i++)
        m.B[i] = (char *)m.A + a.to[n + i] * act_size(dev->act);
    dim3 grid((unsigned)min_size(ceil_div(most, 128), 1024), (unsigned)pieces);
    LAUNCH_ACT(dev, round_masters, grid, 128, m.A, a);
    return m;
}

// u (T, r) = s low, rounded, where low is r columns of (T, R); and the columns that stand beside x
// in `wide`, if that is not NULL: u, two ones if there is a bias, zeros up to `extra`. A warp owns
// a row.
template <typename Act>
__global__ void finish_u_kernel(Act *u, Act *wide, size_t pitch, const float *low, size_t R,
                                float s, size_t T, size_t r, bool bias, size_t extra) {
    size_t t = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    size_t columns = wide ? extra : r;
    if (t >= T) return;
    for (size_t j = threadIdx.x % WARP; j < columns; j += WARP) {
        float value = j < r ? s * low[t * R + j] : bias && j < r + 2 ? 1 : 0;
        if (j < r) from_float(u + t * r + j, value);
        if (wide) from_float(wide + t * pitch + j, value);
    }
}

// The columns beside W in a panel of its rows from `first` on: those of B (rows, r), the bias in
// two parts if there is one, zeros up to `extra`. A warp owns a row. Few values beside the K of W.
template <typename Act>
__global__ void panel_columns_kernel(Act *panel, size_t pitch, Linear linear, size_t first,
                                     size_t rows, size_t extra) {
    size_t row = (size_t)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    size_t n = first + row, r = linear.lora.r;
    if (row >= rows) return;
    for (size_t j = threadIdx.x % WARP; j < extra; j += WARP) {
        float value = 0;
        if (j < r) value = linear.lora.B[n * r + j];
        else if (linear.bias && j == r) value = linear.bias[n];
        else if (linear.bias && j == r + 1) value = linear.bias[n] - rounded<Act>(linear.bias[n]);
        from_float(panel + row * pitch + j, value);
    }
}

// logits (S, C) += bias (C). A block owns a row.
__global__ void add_bias_kernel(float *logits, const float *bias, size_t C) {
    size_t s = blockIdx.x;
    for (size_t c = threadIdx.x; c < C; c += blockDim.x) logits[s * C + c] += bias[c];
}

// ---------------------------------------------------------------------------------------- forward
//
//     1   x~ = dropout(x)                               (T, K)
//     2   u  = s x~ A^T                                 (T, r)
//     3   y  = x W^T + u B^T + bias                     (T, N)

static bool few_rows(Device *dev, float *logits, const Product *products, size_t n, const void *x,
                     const Batch *batch, unsigned warps);                       // chapter 8

// Columns beside x that a product needs.
static size_t extra_columns(const Linear *linear) {
    return round_up(linear->lora.r + (linear->bias ? 2 : 0), 8);
}

// What a pass keeps in scratch.
typedef struct {
    Masters16 masters;
    float *low;                     // (T, R) x~ A^T; forward
    void *du;                       // (T, R) act; backward
    void *masked;                   // (T, K) x~, backward later du A, when there is dropout
    void *wide;                     // (T, pitch) [x | u | 1], when there is anything beside x
    size_t pitch;
    float *sum;                     // (T, K) dx before it is rounded, where it is needed
} Work;

// With scratch.base NULL this only counts.
static Work carve_work(Device *dev, Carve *scratch, const Product *products, size_t n,
                       const Batch *batch, bool head, bool back) {
    const Gpu *gpu = (const Gpu *)dev->gpu;
    const Weight *weight = &products[0].linear->weight;
    Work f = {};
    size_t extra = 0, K = weight->K, T = batch->T, size = act_size(dev->act);
    bool drops = false;
    for (size_t i = 0; i < n; i++) {
        extra = max_size(extra, extra_columns(products[i].linear));
        drops = drops || has_dropout(&products[i].linear->lora, batch);
    }
    bool pieces = n > 1 || (!in_place(dev, weight) &&
                            panel_rows(dev, weight, panel_pitch(gpu, weight, 0)) < weight->N);
    f.masters = round_masters(dev, scratch, products, n, head || back);
    if (back) f.du = carve(scratch, T * f.masters.R, size);
    else f.low = (float *)carve(scratch, T * f.masters.R, sizeof(float));
    if (drops) f.masked = carve(scratch, T * K, size);
    f.pitch = round_up(K + extra, 8);
    if (extra && !head && !back) f.wide = carve(scratch, T * f.pitch, size);
    if (back && pieces && !head && dev->act == DT_BF16)
        f.sum = (float *)carve(scratch, T * K, sizeof(float));
    return f;
}

// False, with the message, when there are too many products or too little scratch.
static bool begin_work(Device *dev, Work *f, const Product *products, size_t n, const Batch *batch,
                       bool head, bool back) {
    Gpu *gpu = (Gpu *)dev->gpu;
    Carve count = {NULL, 0};
    if (n > MOST_PRODUCTS)
        return gpu_fail(gpu, "more than %d linears at once", MOST_PRODUCTS), false;
    carve_work(dev, &count, products, n, batch, head, back);
    Carve scratch = {op_scratch(dev, count.used), 0};
    if (scratch.base) *f = carve_work(dev, &scratch, products, n, batch, head, back);
    return scratch.base != NULL;
}

// x, or x~ where product i has dropout.
static Matrix lora_input(Device *dev, const Work *f, const Lora *lora, const void *x, size_t K,
                         const Batch *batch) {
    if (!has_dropout(lora, batch)) return act_matrix(x, K);
    dropout(dev, act_matrix(f->masked, K), x, K, lora, batch, false);
    return act_matrix(f->masked, K);
}

// 1 and 2 for all products that see the same x~ at once, for the others one by one.
static void lora_down(Device *dev, const Work *f, const Product *products, size_t n, const void *x,
                      const Batch *batch) {
    size_t K = products[0].linear->weight.K, T = batch->T, R = f->masters.R;
    Matrix A = act_matrix(f->masters.A, K), low = full_matrix(f->low, R);
    if (!f->masked)
        return matmul(dev, low, act_matrix(x, K), transposed(A), T, R, K, 1, 0);
    for (size_t i = 0; i < n; i++) {
        const Lora *lora = &products[i].linear->lora;
        if (!lora->r) continue;
        Matrix a = from_column(dev, A, f->masters.at[i] * K);
        matmul(dev, from_column(dev, low, f->masters.at[i]),
               lora_input(dev, f, lora, x, K, batch), transposed(a), T, lora->r, K, 1, 0);
    }
}

// The end of 2 for product i, and what stands beside x for it.
static void finish_u(Device *dev, const Work *f, const Product *product, size_t i, size_t T) {
    const Linear *linear = product->linear;
    size_t r = linear->lora.r, extra = extra_columns(linear);
    if (!r && !extra) return;
    void *wide = f->wide ? from_column(dev, act_matrix(f->wide, 0), linear->weight.K).data : NULL;
    LAUNCH_ACT(dev, finish_u, blocks_for(T, 4), 4 * WARP, product->u, wide, f->pitch,
               f->low + f->masters.at[i], f->masters.R, linear->lora.scale, T, r,
               linear->bias != NULL, extra);
}

// A walk over the rows of several weights, as many at a time as a panel holds; the next panel is
// made beside the product that reads this one.
typedef struct {
    const Product *products;
    size_t n, i;                    // product number i
    size_t first, rows, pitch;      // and rows first .. first+rows-1 of its weight
    Panel *panel;                   // NULL: they are read where they lie
    const void *data;               // (rows, pitch) act
} Walk;

// Where the walk goes from here: sets i, first, rows, pitch. False at the end.
static bool walk_step(const Device *dev, Walk *w, bool beside_x) {
    const Gpu *gpu = (const Gpu *)dev->gpu;
    w->first += w->rows;
    while (w->i < w->n && w->first >= w->products[w->i].linear->weight.N) w->first = 0, w->i++;
    if (w->i >= w->n) return false;
    const Linear *linear = w->products[w->i].linear;
    const Weight *weight = &linear->weight;
    size_t extra = beside_x ? extra_columns(linear) : 0;
    bool direct = in_place(dev, weight) && !extra;
    w->pitch = direct ? weight->K : panel_pitch(gpu, weight, extra);
    w->rows = weight->N - w->first;
    if (!direct) w->rows = min_size(w->rows, panel_rows(dev, weight, w->pitch));
    w->panel = NULL;
    w->data = direct ? weight->data : NULL;
    return true;
}

// Goes on to the next rows. beside_x: what stands beside them is needed too. False at the end.
static bool walk(Device *dev, Walk *w, bool beside_x) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (w->panel) leave_panel(gpu, w->panel);
    w->panel = NULL;
    if (gpu->failed || !walk_step(dev, w, beside_x)) return false;
    if (w->data) return true;
    if (!w->rows) return gpu_fail(gpu, "a row of a matrix is larger than a panel"), false;
    const Linear *linear = w->products[w->i].linear;
    w->panel = take_panel(dev, &linear->weight, w->first, w->rows, w->pitch);
    w->data = panel_memory(dev, w->panel);
    Walk next = *w;
    if (!gpu->recording && walk_step(dev, &next, beside_x) && !next.data && next.rows)
        make_panel(dev, &next.products[next.i].linear->weight, next.first, next.rows, next.pitch,
                   w->panel, true);
    size_t extra = beside_x ? extra_columns(linear) : 0;
    Matrix columns = from_column(dev, act_matrix(w->data, w->pitch), linear->weight.K);
    if (extra)
        LAUNCH_ACT(dev, panel_columns, blocks_for(w->rows, 4), 4 * WARP, columns.data, w->pitch,
                   *linear, w->first, w->rows, extra);
    return true;
}

static void linears_forward(Device *dev, Product *products, size_t n, const void *x,
                            const Batch *batch) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (gpu->failed || !n || !batch->T) return;
    gpu->rows = batch->T;
    if (few_rows(dev, NULL, products, n, x, batch, DECODE_WARPS)) return;
    size_t T = batch->T, K = products[0].linear->weight.K, done = 0;
    Work f;
    if (!begin_work(dev, &f, products, n, batch, false, false)) return;
    lora_down(dev, &f, products, n, x, batch);
    if (f.wide) LAUNCH_ROWS(dev, K, copy_rows, blocks_for(T, 1), 128, f.wide, f.pitch, x, K, K);
    Walk w = {products, n, 0, 0, 0, 0, NULL, NULL};
    while (walk(dev, &w, true)) {
        const Product *p = &products[w.i];
        size_t extra = extra_columns(p->linear);
        for (; done <= w.i; done++) finish_u(dev, &f, &products[done], done, T);
        Matrix left = extra ? act_matrix(f.wide, f.pitch) : act_matrix(x, K);
        Matrix y = from_column(dev, act_matrix(p->y, p->linear->weight.N), w.first);
        matmul(dev, y, left, transposed(act_matrix(w.data, w.pitch)), T, w.rows, K + extra, 1, 0);
    }
}

// Logits stay float32, so the parts may be added one after the other.
static void head_logits(Device *dev, real *logits, const Product *slice, const void *x,
                        const Batch *rows) {
    Gpu *gpu = (Gpu *)dev->gpu;
    const Linear *linear = slice->linear;
    size_t T = rows->T, K = linear->weight.K, C = linear->weight.N, r = linear->lora.r;
    if (gpu->failed || !T || !C) return;
    if (few_rows(dev, logits, slice, 1, x, rows, DECODE_WARPS)) return;
    Work f;
    if (!begin_work(dev, &f, slice, 1, rows, true, false)) return;
    Matrix y = full_matrix(logits, C);
    Walk w = {slice, 1, 0, 0, 0, 0, NULL, NULL};
    while (walk(dev, &w, false))
        matmul(dev, from_column(dev, y, w.first), act_matrix(x, K),
               transposed(act_matrix(w.data, w.pitch)), T, w.rows, K, 1, 0);
    if (r) {
        lora_down(dev, &f, slice, 1, x, rows);
        finish_u(dev, &f, slice, 0, T);
        matmul(dev, y, act_matrix(slice->u, r), transposed(act_matrix(f.masters.B[0], r)), T, C, r,
               1, 1);
    }
    if (linear->bias) LAUNCH(dev, add_bias, blocks_for(T, 1), 128, logits, linear->bias, C);
}

// --------------------------------------------------------------------------------------- backward
//
//     1   du = s dy B                                   (T, r)
//     2   dB += dy^T u          dA += du^T x~           (N, r), (r, K)
//     3   dx = dy W + dropout(du A)                     (T, K)
// Several linears add to one dx. Its sum is float32 where it has several parts, and rounded once.

// 1 and 2.
static void lora_backward(Device *dev, const Work *b, const Product *products, size_t n,
                          const void *x, const Batch *batch) {
    size_t T = batch->T, K = products[0].linear->weight.K, R = b->masters.R;
    for (size_t i = 0; i < n; i++) {
        const Lora *lora = &products[i].linear->lora;
        size_t N = products[i].linear->weight.N, r = lora->r;
        if (!r) continue;
        Matrix dy = act_matrix(products[i].y, N), u = act_matrix(products[i].u, r);
        Matrix du = from_column(dev, act_matrix(b->du, R), b->masters.at[i]);
        matmul(dev, du, dy, act_matrix(b->masters.B[i], r), T, r, N, lora->scale, 0);
        if (!lora->dA) continue;
        matmul(dev, full_matrix(lora->dB, r), transposed(dy), u, N, r, T, 1, 1);
        matmul(dev, full_matrix(lora->dA, K), transposed(du),
               lora_input(dev, b, lora, x, K, batch), r, K, T, 1, 1);
    }
}

// 3, second half: dx = or += dropout(du A) of all products. Returns whether dx has a value now.
static bool lora_dx(Device *dev, Matrix dx, const Work *b, const Product *products, size_t n,
                    const Batch *batch, bool begun) {
    size_t T = batch->T, K = products[0].linear->weight.K, R = b->masters.R;
    Matrix A = act_matrix(b->masters.A, K), du = act_matrix(b->du, R);
    if (R && !b->masked) matmul(dev, dx, du, A, T, K, R, 1, begun);
    for (size_t i = 0; i < n && b->masked; i++) {
        const Lora *lora = &products[i].linear->lora;
        Matrix du_i = from_column(dev, du, b->masters.at[i]);
        Matrix A_i = from_column(dev, A, b->masters.at[i] * K);
        if (!lora->r) continue;
        if (has_dropout(lora, batch)) {
            matmul(dev, act_matrix(b->masked, K), du_i, A_i, T, K, lora->r, 1, 0);
            dropout(dev, dx, b->masked, K, lora, batch, begun);
        } else matmul(dev, dx, du_i, A_i, T, K, lora->r, 1, begun);
        begun = true;
    }
    return begun || R;
}

// y (n) = x rounded. A thread owns `width` values. Reads 4 bytes a value and writes 2.
template <typename Act, int width>
__global__ void round_rows_kernel(Act *y, const float *x, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * width;
    float v[width];
    if (i >= n) return;
    load<width>(v, x + i);
    store<width>(y + i, v);
}

static void round_rows(Device *dev, void *y, const real *x, size_t n) {
    LAUNCH_ROWS(dev, n, round_rows, blocks_for(n, 128 * width), 128, y, x, n);
}

// dx: (T, K) act and written, or with `head` float32 and added to; NULL: nothing below learns.
static void backward(Device *dev, void *dx, bool head, const Product *products, size_t n,
                     const void *x, const Batch *batch) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (gpu->failed || !n || !batch->T) return;
    size_t T = batch->T, K = products[0].linear->weight.K;
    Work b;
    if (!begin_work(dev, &b, products, n, batch, head, true)) return;
    gpu->rows = max_size(T, FEW_ROWS + 1);          // backward always goes through panels
    lora_backward(dev, &b, products, n, x, batch);
    if (!dx) return;
    Matrix sum = b.sum ? full_matrix(b.sum, K) : act_matrix(dx, K);
    sum.full = b.sum || head;
    bool begun = lora_dx(dev, sum, &b, products, n, batch, head);
    Walk w = {products, n, 0, 0, 0, 0, NULL, NULL};
    while (walk(dev, &w, false)) {
        size_t N = products[w.i].linear->weight.N;
        Matrix dy = from_column(dev, act_matrix(products[w.i].y, N), w.first);
        matmul(dev, sum, dy, act_matrix(w.data, w.pitch), T, K, w.rows, 1, begun);
        begun = true;
    }
    if (b.sum) round_rows(dev, dx, b.sum, T * K);
}

static void linears_backward(Device *dev, void *dx, const Product *products, size_t n,
                             const void *x, const Batch *batch) {
    backward(dev, dx, false, products, n, x, batch);
}

static void head_backward(Device *dev, real *dx, const Product *slice, const void *x,
                          const Batch *rows) {
    backward(dev, dx, true, slice, 1, x, rows);
}

// The most that an op of this chapter carves. What several linears or pieces add to is D wide,
// unless the largest matrix is larger than a panel.
static size_t linear_scratch(const Device *dev, const OpSizes *s) {
    size_t size = act_size(dev->act), rows = max_size(s->T, s->S), r = s->max_r;
    size_t K = max_size(s->D, s->F), N = max_size(K, s->V_chunk), pieces = 256 * 8;
    size_t sum = (s->D + 128) * (s->F + 128) * size > panel_most / 2 ? K : s->D;
    size_t masters = MOST_PRODUCTS * r * (K + N) * size, masked = s->training ? rows * K * size : 0;
    size_t forward = rows * MOST_PRODUCTS * r * sizeof(float) + masked + rows * (K + r + 16) * size;
    size_t backward = rows * MOST_PRODUCTS * r * size + masked + rows * sum * sizeof(float);
    return masters + max_size(forward, s->training ? backward : 0) + pieces;
}

// =================================================================================================
//  5. Embedding, norms, rotation, activations, gather and scatter
//
//  Every value passes once, so each of these takes the time its bytes take. A block owns a row
//  unless said otherwise; a thread takes `width` values at a time, see FOR_ROWS.
// =================================================================================================

// h (T, D) = rows of the embedding, rounded. Reads 0.56 to 4 bytes a value, as the table has them.
template <typename Act, int width>
__global__ void embed_kernel(Act *h, Weight table, const int32_t *ids) {
    __shared__ float code[16];
    __shared__ float code8[256];
    load_tables(code, code8, table);
    size_t t = blockIdx.x, D = table.K, row = (size_t)ids[t] * D;
    for (size_t k = width * threadIdx.x; k < D; k += width * blockDim.x) {
        float x[width];
        read_weight<width>(x, table, row + k, code, code8);
        store<width>(h + t * D + k, x);
    }
}

static void embed(Device *dev, void *h, const Weight *table, const int32_t *ids, size_t T) {
    LAUNCH_ROWS(dev, table->K, embed, blocks_for(T, 1), 128, h, *table, ids);
}

// ----------------------------------------------------------------------- residual add and RMS norm
//
// With n = 1 / sqrt(mean(x^2) + eps):   y_i = w_i x_i n

// Threads for a row of D values, two pieces of 8 each: enough rows are under way at once.
static unsigned row_threads(size_t D) {
    return (unsigned)min_size(max_size(round_up(ceil_div(D, 16), WARP), 64), 512);
}

// sum = h + a rounded, y = norm of the rounded sum. Reads h and a, writes sum and y, and reads sum
// once more from the cache.
template <typename Act, int width>
__global__ void residual_norm_forward_kernel(Act *y, Act *sum, const Act *h, const Act *a,
                                             const float *w, size_t D, float eps) {
    __shared__ float partial[WARP];
    size_t row = (size_t)blockIdx.x * D;
    float squares = 0;
    for (size_t k = width * threadIdx.x; k < D; k += width * blockDim.x) {
        float x[width], add[width] = {0};
        load<width>(x, h + row + k);
        if (a) load<width>(add, a + row + k);
#pragma unroll
        for (int i = 0; i < width; i++) {
            x[i] = rounded<Act>(x[i] + add[i]);
            squares += x[i] * x[i];
        }
        if (a || sum != h) store<width>(sum + row + k, x);
    }
    float n = 1 / sqrtf(block_sum(squares, partial) / (float)D + eps);
    for (size_t k = width * threadIdx.x; k < D; k += width * blockDim.x) {
        float x[width], weight[width];
        load<width>(x, sum + row + k);              // what this thread itself has written
        load<width>(weight, w + k);
#pragma unroll
        for (int i = 0; i < width; i++) x[i] *= n * weight[i];
        store<width>(y + row + k, x);
    }
}

static void residual_norm_forward(Device *dev, void *y, void *sum, const void *h, const void *a,
                                  const float *w, size_t T, size_t D, float eps) {
    LAUNCH_ROWS(dev, D, residual_norm_forward, blocks_for(T, 1), row_threads(D), y, sum, h, a, w, D,
                eps);
}

// dx_j = n (w_j dy_j  -  x_j n^2 / D * sum_i w_i x_i dy_i),   dh += dx,   da = dh rounded.
// Reads sum, dy and dh, writes dh and da; sum and dy come a second time from the cache.
template <typename Act, int width>
__global__ void residual_norm_backward_kernel(float *dh, Act *da, const Act *dy, const Act *sum,
                                              const float *w, size_t D, float eps) {
    __shared__ float partial[WARP];
    size_t row = (size_t)blockIdx.x * D;
    float squares = 0, dot = 0;
    for (size_t k = width * threadIdx.x; k < D; k += width * blockDim.x) {
        float x[width], d[width], weight[width];
        load<width>(x, sum + row + k);
        load<width>(d, dy + row + k);
        load<width>(weight, w + k);
#pragma unroll
        for (int i = 0; i < width; i++) {
            squares += x[i] * x[i];
            dot += weight[i] * x[i] * d[i];
        }
    }
    float n = 1 / sqrtf(block_sum(squares, partial) / (float)D + eps);
    float pull = n * n * block_sum(dot, partial) / (float)D;
    for (size_t k = width * threadIdx.x; k < D; k += width * blockDim.x) {
        float x[width], d[width], weight[width], dx[width];
        load<width>(x, sum + row + k);
        load<width>(d, dy + row + k);
        load<width>(weight, w + k);
        load<width>(dx, dh + row + k);
#pragma unroll
        for (int i = 0; i < width; i++) dx[i] += n * (weight[i] * d[i] - x[i] * pull);
        store<width>(dh + row + k, dx);
        if (da) store<width>(da + row + k, dx);
    }
}

static void residual_norm_backward(Device *dev, real *dh, void *da, const void *dy, const void *sum,
                                   const float *w, size_t T, size_t D, float eps) {
    LAUNCH_ROWS(dev, D, residual_norm_backward, blocks_for(T, 1), row_threads(D), dh, da, dy, sum,
                w, D, eps);
}

// ------------------------------------------------------------------------------------------ RoPE

// Features i and i + hd/2 of each head of row t turn by position * frequency[i]. The block makes
// the row's sines and cosines once, in shared memory (hd floats), and turns all heads with them.
template <typename Act, int width>
__global__ void rope_kernel(Act *x, size_t heads, size_t hd, const float *frequency, float sign,
                            const int32_t *position) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float *cosine = (float *)shared_memory, *sine = cosine + hd / 2;
    size_t t = blockIdx.x, half = hd / 2, pieces = half / width;
    for (size_t i = threadIdx.x; i < half; i += blockDim.x) {
        float angle = __fmul_rn((float)position[t], frequency[i]), s, c;
        sincosf(angle, &s, &c);
        cosine[i] = c;
        sine[i] = s * sign;
    }
    __syncthreads();
    for (size_t p = threadIdx.x; p < heads * pieces; p += blockDim.x) {
        size_t i = p % pieces * width;
        Act *head = x + (t * heads + p / pieces) * hd + i;
        float a[width], b[width];
        load<width>(a, head);
        load<width>(b, head + half);
#pragma unroll
        for (int j = 0; j < width; j++) {
            float c = cosine[i + j], s = sine[i + j], before = a[j];
            a[j] = before * c - b[j] * s;
            b[j] = b[j] * c + before * s;
        }
        store<width>(head, a);
        store<width>(head + half, b);
    }
}

static void rope(Device *dev, void *x, size_t heads, size_t hd, const float *frequency, int sign,
                 const Batch *batch) {
    size_t shared = hd * sizeof(float), row = hd % 2 ? 1 : hd / 2;
    FOR_ACT(dev, FOR_ROWS(row, launch_shared(dev, shared, "rope", rope_kernel<Act, width>,
                                             blocks_for(batch->T, 1), 128, x, heads, hd, frequency,
                                             sign, batch->position)));
}

// ------------------------------------------------------------------------------------------- rows

// Copies a row of `pieces` pieces of 16, 4 or 2 bytes; the whole block.
template <int bytes>
__device__ __forceinline__ void copy_row(void *to, const void *from, size_t pieces) {
    for (size_t i = threadIdx.x; i < pieces; i += blockDim.x) {
        char *a = (char *)to + bytes * i;
        const char *b = (const char *)from + bytes * i;
        if constexpr (bytes == 16) store16(a, load16(b));
        else if constexpr (bytes == 4) store4(a, load4(b));
        else *(uint16_t *)a = *(const uint16_t *)b;
    }
}

// name_kernel for the largest pieces that rows of `width` bytes divide into.
#define LAUNCH_PIECES(dev, width, name, ...) \
    ((width) % 16 == 0  ? launch(dev, #name, name##_kernel<16>, __VA_ARGS__) \
     : (width) % 4 == 0 ? launch(dev, #name, name##_kernel<4>, __VA_ARGS__) \
                        : launch(dev, #name, name##_kernel<2>, __VA_ARGS__))

// Row t of a span's new keys and values goes to where attention reads the last nq of its nk keys.
// A block owns a row of both, `width` bytes each.
template <int bytes>
__global__ void append_keys_kernel(char *keys, char *values, const char *k, const char *v,
                                   size_t width, const Span *spans, size_t n_spans) {
    size_t t = blockIdx.x;
    const Span &span = span_of(spans, n_spans, t);
    size_t to = (span.k0 + span.nk - span.nq + t - span.q0) * width;
    copy_row<bytes>(keys + to, k + t * width, width / bytes);
    copy_row<bytes>(values + to, v + t * width, width / bytes);
}

static void append_keys(Device *dev, void *keys, void *values, const void *k, const void *v,
                        size_t width, const Batch *batch) {
    width *= act_size(dev->act);
    LAUNCH_PIECES(dev, width, append_keys, blocks_for(batch->T, 1), 128, keys, values, k, v, width,
                  batch->spans, batch->n_spans);
}

// Row i of `to` = row index[i] of `from`, or with `back` row index[i] of `to` = row i of `from`;
// rows of `width` bytes.
template <int bytes>
__global__ void move_rows_kernel(char *to, const char *from, const int32_t *index, size_t width,
                                 bool back) {
    size_t i = blockIdx.x, other = (size_t)index[i];
    copy_row<bytes>(to + (back ? other : i) * width, from + (back ? i : other) * width,
                    width / bytes);
}

static void gather(Device *dev, void *out, const void *x, const int32_t *index, size_t n,
                   size_t D) {
    size_t width = D * act_size(dev->act);
    LAUNCH_PIECES(dev, width, move_rows, blocks_for(n, 1), 128, out, x, index, width, false);
}

static void scatter(Device *dev, real *dh, const real *dout, const int32_t *index, size_t n,
                    size_t T, size_t D) {
    gpu_zero(dev, dh, T * D * sizeof *dh);
    size_t width = D * sizeof *dh;
    LAUNCH_PIECES(dev, width, move_rows, blocks_for(n, 1), 128, dh, dout, index, width, true);
}

// ---------------------------------------------------------------------------------------- SwiGLU
//
//     y = silu(g) u,   silu(g) = g sigma(g),   sigma(g) = 1 / (1 + exp(-g))

// The T F values are one row here; a thread owns `width` of them.
template <typename Act, int width>
__global__ void swiglu_forward_kernel(Act *y, const Act *gate, const Act *up, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * width;
    float g[width], u[width];
    if (i >= n) return;
    load<width>(g, gate + i);
    load<width>(u, up + i);
#pragma unroll
    for (int j = 0; j < width; j++) u[j] *= g[j] / (1 + expf(-g[j]));
    store<width>(y + i, u);
}

static void swiglu_forward(Device *dev, void *y, const void *gate, const void *up, size_t T,
                           size_t F) {
    size_t n = T * F;
    LAUNCH_ROWS(dev, n, swiglu_forward, blocks_for(n, 128 * width), 128, y, gate, up, n);
}

// dup = dy silu(g),   dg = dy u (sigma + g sigma (1 - sigma)). dgate and dup may be gate and up. A
// thread owns `width` values.
template <typename Act, int width>
__global__ void swiglu_backward_kernel(Act *dgate, Act *dup, const Act *dy, const Act *gate,
                                       const Act *up, size_t n) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * width;
    float g[width], u[width], d[width], dg[width], du[width];
    if (i >= n) return;
    load<width>(g, gate + i);
    load<width>(u, up + i);
    load<width>(d, dy + i);
#pragma unroll
    for (int j = 0; j < width; j++) {
        float sigma = 1 / (1 + expf(-g[j])), dsilu = sigma * (1 + g[j] * (1 - sigma));
        du[j] = d[j] * g[j] * sigma;
        dg[j] = d[j] * u[j] * dsilu;
    }
    store<width>(dgate + i, dg);
    store<width>(dup + i, du);
}

static void swiglu_backward(Device *dev, void *dgate, void *dup, const void *dy, const void *gate,
                            const void *up, size_t T, size_t F) {
    size_t n = T * F;
    LAUNCH_ROWS(dev, n, swiglu_backward, blocks_for(n, 128 * width), 128, dgate, dup, dy, gate, up,
                n);
}

// =================================================================================================
//  6. Attention
//
//  Causal, grouped-query, over sequences laid end to end; notation of chapter 3:
//      1   s_j = scale q . k_j            2   p = softmax(s), lse = log sum exp s
//      3   out = sum_j p_j v_j
//
//  Three ways to the same result:
//      tiles    bf16 on matrix units, after Dao 2022 and 2023 (FlashAttention): scores exist in
//               registers only, the softmax is a running maximum and sum. Training and prompts.
//      decode   one query in each sequence: keys are split among blocks, so that the whole GPU
//               reads the cache; a second kernel joins the parts.
//      rows     a warp for each row, plain arithmetic: float mode, GPUs before Ampere, odd sizes.
//  Sums are formed in an order that depends on shapes only, so every run gives the same bits.
//
//  What is not a number stays visible: maxima pass over NaN, sums do not. In `tiles` a NaN or
//  infinity also spoils rows of its own tile and sequence that do not see it, for there what is
//  unseen is multiplied with p = 0.
//
//  FLOPs: 4 hd per visible pair of query and key forward. Backward 10 hd, of which 2 hd recompute
//  the scores; two kernels without atomics instead of one with them recompute 4 hd more.
// =================================================================================================

static constexpr float LOG2_E = 1.44269504f;
enum { LANE_COLUMNS = 8, ROW_COLUMNS = WARP * LANE_COLUMNS };  // of a row, in `rows` and `decode`
enum { DECODE_BLOCKS = 512, DECODE_THREADS = 128 };

// What the backward pass knows of a query in one head.
struct RowTerms {
    float lse2 = INFINITY;              // log2(e) lse; of a query that does not exist p = 2^-inf
    float expected = 0;                 // dout . out = sum_j p_j dp_j
};

// What all kernels here are given. Tensors as in the op table; those not needed are NULL.
template <typename Act> struct Attention {
    Act *out, *dq, *dk, *dv;
    const Act *q, *k, *v, *dout;
    float *lse;                         // (T, H)
    RowTerms *terms;                    // (H, T)
    float *parts;                       // (n_spans, H, splits, 2 + hd) of decode: max, sum, out
    const Span *spans;
    size_t T, q_stride, k_stride;       // values from one row to the next: H hd and G hd
    unsigned n_spans, H, G, shared, hd; // shared: query heads of a group
    int window;                         // at least 1; all keys: at least as many as there are
    float scale;                        // > 0
    bool pieces;                        // every head's row begins at a multiple of 16 bytes
};

// Query i sees the keys from first_key to end_key-1, as in chapter 3, `own` being before + i.
__device__ __forceinline__ int first_key(int own, int window) { return max(own + 1 - window, 0); }
__device__ __forceinline__ int end_key(int own) { return own + 1; }

// Does any of n queries, the first of which is `own`, see any of the keys j .. j+keys-1?
__device__ __forceinline__ bool any_seen(int own, int n, int j, int keys, int window) {
    return j < end_key(own + n - 1) && first_key(own, window) < j + keys;
}

// What unit `index` of a grid is about: `tile` of `tiles`, then part of `parts` of a head, head of
// `heads`, span: units that run together share keys in the cache. Beyond the last span nq = nk = 0.
struct Unit {
    size_t q0, k0;                      // the sequence: rows q0 .. and k0 .. of the tensors
    int nq, nk, before, tile;           // `before` keys precede the first query's own
    unsigned part, head, span;
};

template <typename Act> __device__ __forceinline__ Unit
unit_number(const Attention<Act> &a, size_t index, unsigned tiles, unsigned heads, unsigned parts) {
    size_t head = index / tiles / parts;
    unsigned n = (unsigned)(head / heads);
    Span s = n < a.n_spans ? a.spans[n] : Span();
    return {s.q0, s.k0, (int)s.nq, (int)s.nk, (int)s.nk - (int)s.nq, (int)(index % tiles),
            (unsigned)(index / tiles % parts), (unsigned)(head % heads), n};
}

// Signed, as everything here, but known to the compiler not to be negative.
__device__ __forceinline__ int lane_number() { return (int)(threadIdx.x % WARP); }
__device__ __forceinline__ int warp_number() { return (int)(threadIdx.x / WARP); }

// What is subtracted from scores before exp: 0 while there are none, for -inf - -inf is NaN.
__device__ __forceinline__ float exp_base(float max) { return max == -INFINITY ? 0 : max; }

// ------------------------------------------------------------------------------------------ tiles
//
// A tile is (rows, HD) bf16 in shared memory, HD the head size rounded up to 32, 64, 96, 128, 192
// or 256. A warp owns whole rows of a product and keeps them in registers as mma leaves them: of
// block (m, n), 16 x 8, lane l holds x[m][n][0..3] = row l/4, columns 2 (l%4) and + 1, then row
// l/4 + 8. mma takes its left operand like that, so p goes to the next product in registers.

enum { TILE_WARPS = 4 };

// What fits in 255 registers, and in the 99 KB of shared memory that every GPU since Ampere has:
// blocks of 16 rows that a warp owns where it has one accumulator for each; keys of a tile in the
// forward pass; rows of a tile that passes by in the backward pass, where there are two such tiles.
template <int HD> __host__ __device__ constexpr int blocks_of_warp() { return HD <= 128 ? 2 : 1; }
template <int HD> __host__ __device__ constexpr int keys_of_tile() { return HD == 128 ? 48 : 64; }
template <int HD> __host__ __device__ constexpr int rows_of_step() { return HD <= 128 ? 32 : 16; }

// Where element (row, column) of a tile lies, column a multiple of 8. The 16-byte pieces of each
// 128 bytes, or 64 where rows are no multiple of 128, change places by the number of the row, so
// that the eight rows which load_matrices reads in one column lie in different banks.
template <int HD> __device__ __forceinline__ unsigned place(unsigned row, unsigned column) {
    constexpr unsigned n = HD % 64 ? 4 : 8;
    unsigned turn = HD % 64 ? row / 2 % n : row % n;
    return row * HD + column / (8 * n) * (8 * n) + ((column / 8 % n) ^ turn) * 8;
}

// Begins to copy the first `real` rows of a head, `stride` elements apart, to a tile; what is
// beyond them and beyond hd becomes zero.
template <int HD> __device__ __forceinline__ void
copy_tile(bf16 *tile, const bf16 *from, size_t stride, unsigned rows, int real, unsigned hd) {
    constexpr unsigned pieces = HD / 8;
    unsigned row = threadIdx.x / pieces, column = threadIdx.x % pieces * 8;
    unsigned step = blockDim.x / pieces;        // a tile's products fit 32 bits
    if (row == step) row = rows;                // threads left over
#pragma unroll 1
    for (; row < rows; row += step) {
        bool there = (int)row < real && column < hd;
        unsigned at = there ? row * (unsigned)stride + column : 0;
        copy_async(tile + place<HD>(row, column), from + at, there ? 16 : 0);
    }
}

// s (16 M x N) = a b^T with rows row .. row + 16 M - 1 of tile a and N rows of tile b.
template <int HD, int M, int N> __device__ __forceinline__ void
multiply_rows(float s[M][N / 8][4], const bf16 *a, int row, const bf16 *b) {
    int lane = lane_number();
#pragma unroll
    for (int i = 0; i < M * N / 2; i++) s[i / (N / 2)][i / 4 % (N / 8)][i % 4] = 0;
#pragma unroll
    for (int d = 0; d < HD; d += 16) {
        uint32_t x[M][4];
        for (int m = 0; m < M; m++)
            load_matrices(x[m], a + (row + 16 * m) * HD + place<HD>(lane % 16, d + lane / 16 * 8));
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t y[4];
            load_matrices(y, b + n * HD + place<HD>(lane / 16 * 8 + lane % 8,
                                                    d + lane / 8 % 2 * 8));
            for (int m = 0; m < M; m++) {
                mma(s[m][n / 8], x[m], y, s[m][n / 8]);
                mma(s[m][n / 8 + 1], x[m], y + 2, s[m][n / 8 + 1]);
            }
        }
    }
}

// p (16 x N) rounded to bf16, as the left operand of mma.
template <int N>
__device__ __forceinline__ void pack_operand(uint32_t x[N / 16][4], const float p[N / 8][4]) {
#pragma unroll
    for (int i = 0; i < N / 4; i++)
        x[i / 4][i % 4] = pack_bf16(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
}

// o (16 M x HD) += p (16 M x N) times tile b (N x HD).
template <int HD, int M, int N> __device__ __forceinline__ void
add_product(float o[M][HD / 8][4], const uint32_t p[M][N / 16][4], const bf16 *b) {
    int lane = lane_number();
#pragma unroll
    for (int n = 0; n < N; n += 16) {
#pragma unroll
        for (int d = 0; d < HD; d += 16) {
            uint32_t y[4];
            load_matrices_transposed(y, b + n * HD + place<HD>(lane % 16, d + lane / 16 * 8));
            for (int m = 0; m < M; m++) {
                mma(o[m][d / 8], p[m][n / 16], y, o[m][d / 8]);
                mma(o[m][d / 8 + 1], p[m][n / 16], y + 2, o[m][d / 8 + 1]);
            }
        }
    }
}

// Scores that are not seen become -inf, whose exponential is 0. In row 0 of s the columns low ..
// low + window - 1 are seen, in each further row those one to the right.
template <int M, int N>
__device__ __forceinline__ void hide_unseen(float s[M][N / 8][4], int low, int window) {
    int lane = lane_number();
    if (low + 16 * M <= 1 && N <= low + window) return;         // all are seen
#pragma unroll
    for (int i = 0; i < M * N / 2; i++) {
        int m = i / (N / 2), n = i / 4 % (N / 8), e = i % 4;
        int row = 16 * m + lane / 4 + e / 2 * 8, column = 8 * n + lane % 4 * 2 + e % 2;
        if (column < low + row || column >= low + row + window) s[m][n][e] = -INFINITY;
    }
}

// The scores s of some more keys become p = 2^(scale2 (s - max)); when the maximum of a row grows,
// its sum and out so far shrink. A lane's sum is of its own columns only.
template <int HD, int N> __device__ __forceinline__ void
softmax_step(float s[N / 8][4], float o[HD / 8][4], float largest[2], float sum[2], float scale2) {
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {                      // rows l/4 and l/4 + 8
        float now = largest[half], total = 0;
#pragma unroll
        for (int i = 0; i < N / 4; i++) now = fmaxf(now, s[i / 2][2 * half + i % 2]);
        now = max_lanes(now, 4);
        float base = exp_base(now) * scale2;
        shrink[half] = exp2_approx(fmaf(largest[half], scale2, -base));
#pragma unroll
        for (int i = 0; i < N / 4; i++) {
            float &p = s[i / 2][2 * half + i % 2];
            p = exp2_approx(fmaf(p, scale2, -base));
            total += p;
        }
        largest[half] = now;
        sum[half] = fmaf(sum[half], shrink[half], total);
    }
#pragma unroll
    for (int i = 0; i < HD / 2; i++) o[i / 4][i % 4] *= shrink[i / 2 % 2];
}

// Writes a warp's rows of x, each times a factor, to those rows of a head that exist: by way of the
// warp's own rows of a tile that is not needed any more, so that it can be 16 bytes at a time.
template <int HD, int M> __device__ __forceinline__ void
store_rows(bf16 *to, size_t stride, bf16 *tile, int row, int real, unsigned hd,
           const float x[M][HD / 8][4], const float factor[M][2]) {
    int lane = lane_number();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < M * HD / 4; i++) {
        int m = i / (HD / 4), d = i / 2 % (HD / 8), half = i % 2;
        float by = factor[m][half], low = x[m][d][2 * half] * by, high = x[m][d][2 * half + 1] * by;
        int at = place<HD>(row + 16 * m + lane / 4 + 8 * half, 8 * d) + lane % 4 * 2;
        store4(tile + at, pack_bf16(low, high));
    }
    __syncwarp();
    for (int i = lane; i < 2 * M * HD; i += WARP) {
        int at = row + i / (HD / 8), column = i % (HD / 8) * 8;
        if (at < real && column < (int)hd)
            store16(to + at * stride + column, load16(tile + place<HD>(at, column)));
    }
}

// attention_forward of a block of queries of one head. A warp owns 16 M of them, with out in
// registers; q and a tile of k and of v are in shared memory: while the scores are formed v
// arrives, while out grows the next k does. The last queries, which see most keys, come first.
// At HD 128: 56 KB of shared memory and 254 registers, two blocks in a multiprocessor; 171 bytes
// of shared memory per mma, 1.3 cycles, and 16 bytes of L2 a cycle and multiprocessor.
template <int HD> __global__ void __launch_bounds__(TILE_WARPS * WARP)
attention_forward_tiles(Attention<bf16> a, int tiles) {
    constexpr int M = blocks_of_warp<HD>(), N = keys_of_tile<HD>();
    extern __shared__ unsigned char shared_memory[];
    int lane = lane_number(), row = warp_number() * 16 * M, rows = (int)blockDim.x / WARP * 16 * M;
    Unit u = unit_number(a, blockIdx.x, (unsigned)tiles, a.H, 1);
    int i = (tiles - 1 - u.tile) * rows, left = u.nq - i;  // first query of the block
    if (left <= 0) return;

    bf16 *k = (bf16 *)shared_memory, *v = k + N * HD, *q = v + N * HD;
    size_t at = (u.q0 + i) * a.H + u.head;                      // of the first row, in (T, H)
    size_t k_at = (u.k0 * a.G + u.head / a.shared) * a.hd;
    unsigned k_stride = a.G * a.hd;             // as 64 bits it costs registers
    int own = u.before + i, end = min(end_key(own + rows - 1), u.nk);
    int j = first_key(own, a.window) / N * N;
    own = row < left ? own + row : -end;                        // of the warp's first query, if any

    float o[M][HD / 8][4] = {}, s[M][N / 8][4], largest[M][2], sum[M][2] = {};
    for (int m = 0; m < M; m++) largest[m][0] = largest[m][1] = -INFINITY;
    float scale2 = a.scale * LOG2_E;
    copy_tile<HD>(q, a.q + at * a.hd, a.q_stride, rows, left, a.hd);
    k_at += (size_t)j * k_stride;
    copy_tile<HD>(k, a.k + k_at, k_stride, N, end - j, a.hd);
    copy_commit();
    for (; j < end; j += N) {
        bool busy = any_seen(own, 16 * M, j, N, a.window);      // the same in a whole warp
        copy_wait<0>();
        __syncthreads();                        // k is there, and v is no longer needed
        copy_tile<HD>(v, a.v + k_at, k_stride, N, end - j, a.hd);
        copy_commit();
        if (busy) multiply_rows<HD, M, N>(s, q, row, k);        // 1
        copy_wait<0>();
        __syncthreads();                        // v is there, and k is no longer needed
        k_at += (size_t)N * k_stride;
        if (j + N < end) copy_tile<HD>(k, a.k + k_at, k_stride, N, end - j - N, a.hd);
        copy_commit();
        if (busy) {
            hide_unseen<M, N>(s, end_key(own) - a.window - j, a.window);
            uint32_t p[M][N / 16][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
                softmax_step<HD, N>(s[m], o[m], largest[m], sum[m], scale2);    // 2
                pack_operand<N>(p[m], s[m]);
            }
            __syncwarp();           // else loads of v begin before p is packed, and registers end
            add_product<HD, M, N>(o, p, v);                     // 3
        }
    }
#pragma unroll
    for (int e = 0; e < 2 * M; e++) {
        int r = row + lane / 4 + 8 * e;
        float total = sum[e / 2][e % 2];                        // of four lanes
        for (int by = 2; by; by /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, by);
        sum[e / 2][e % 2] = 1 / total;
        if (lane % 4 == 0 && r < left)
            a.lse[at + (size_t)r * a.H] = largest[e / 2][e % 2] * a.scale + logf(total);
    }
    store_rows<HD, M>(a.out + at * a.hd, a.q_stride, q, row, left, a.hd, o, sum);
}

// With p_j = exp(s_j - lse):
//     3   dv_j += p_j dout              dp_j = dout . v_j
//     2   ds_j = p_j (dp_j - sum_i p_i dp_i),    and that sum is dout . out
//     1   dq = scale sum_j ds_j k_j     dk_j += scale ds_j q
//
// terms: a warp owns a row of a head. Reads out and dout once: 4 T H hd bytes.
template <typename Act> __global__ void attention_row_terms(Attention<Act> a) {
    int lane = lane_number();
    size_t index = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP, t = index / a.H;
    if (t >= a.T) return;
    float sum = 0;
    for (size_t d = lane; d < a.hd; d += WARP)
        sum = fmaf(to_float(a.dout[index * a.hd + d]), to_float(a.out[index * a.hd + d]), sum);
    sum = warp_sum(sum);
    if (lane == 0) a.terms[index % a.H * a.T + t] = {a.lse[index] * LOG2_E, sum};
}

// dk and dv of a block of keys of one group: 16 keys for each warp, in registers, while queries
// pass by, of one head of the group after the other: a tile of q and one of dout at a time and the
// next under way. Scores are formed turned, keys x queries, so that p and ds are left operands of
// the sums over queries. Keys that nobody sees get 0. Beyond HD 128, where both sums do not fit in
// registers, one launch makes dv and another dk. At HD 128: 64.5 KB of shared memory, two blocks in
// a multiprocessor; 320 bytes of it per mma, 2.5 cycles, which is what limits this kernel.
template <int HD, bool make_dk, bool make_dv> __global__ void __launch_bounds__(TILE_WARPS * WARP)
attention_backward_keys(Attention<bf16> a, int tiles) {
    constexpr int M = rows_of_step<HD>();                       // queries at a time
    extern __shared__ unsigned char shared_memory[];
    int lane = lane_number(), row = warp_number() * 16, keys = (int)blockDim.x / WARP * 16;
    Unit u = unit_number(a, blockIdx.x, (unsigned)tiles, a.G, 1);
    int j = u.tile * keys;
    if (j >= u.nk) return;

    bf16 *q = (bf16 *)shared_memory, *dout = q + 2 * M * HD;    // (2, M, HD)
    RowTerms *terms = (RowTerms *)(dout + 2 * M * HD), mine;    // (2, M)
    bf16 *k = (bf16 *)(terms + 2 * M), *v = k + keys * HD;
    size_t k_at = (u.k0 + j) * a.k_stride + u.head * a.hd;
    // The last query that sees a key is `before` + window - 1 places after it.
    int first = max(j - u.before, 0) / M * M;
    int end = min(u.nq, min(j + keys, u.nk) - 1 - u.before + a.window);
    int tiles_of_head = end > first ? (end - first + M - 1) / M : 0;
    int steps = tiles_of_head * (int)a.shared;

    float dk[1][HD / 8][4] = {}, dv[1][HD / 8][4] = {}, scale2 = a.scale * LOG2_E;
    if (steps) {
        copy_tile<HD>(k, a.k + k_at, a.k_stride, keys, u.nk - j, a.hd);
        copy_tile<HD>(v, a.v + k_at, a.k_stride, keys, u.nk - j, a.hd);
    }
    for (int step = -1; step < steps; step++) {
        int buffer = step % 2 * M, i = first;
        if (step >= 0) {
            i += step % tiles_of_head * M;
            if (threadIdx.x < M) terms[buffer + threadIdx.x] = mine;
            copy_wait<0>();
            __syncthreads();                    // this step's are there, the last step's not needed
        }
        if (step + 1 < steps) {                 // the next step's
            unsigned head = u.head * a.shared + (unsigned)((step + 1) / tiles_of_head);
            int next = first + (step + 1) % tiles_of_head * M, to = (step + 1) % 2 * M * HD;
            size_t at = (u.q0 + next) * a.q_stride + head * a.hd;
            copy_tile<HD>(q + to, a.q + at, a.q_stride, M, u.nq - next, a.hd);
            copy_tile<HD>(dout + to, a.dout + at, a.q_stride, M, u.nq - next, a.hd);
            copy_commit();
            next += (int)threadIdx.x;
            mine = RowTerms();
            if (threadIdx.x < M && next < u.nq) mine = a.terms[head * a.T + u.q0 + next];
        }
        int own = u.before + i;
        if (step < 0 || !any_seen(own, M, j + row, 16, a.window)) continue; // all lanes or none

        float p[1][M / 8][4], ds[1][M / 8][4];
        multiply_rows<HD, 1, M>(p, k, row, q + buffer * HD);
        hide_unseen<1, M>(p, j + row - own, a.window);
        if (make_dk) multiply_rows<HD, 1, M>(ds, v, row, dout + buffer * HD);   // dp
#pragma unroll
        for (int e = 0; e < M / 2; e++) {
            RowTerms of = terms[buffer + 8 * (e / 4) + lane % 4 * 2 + e % 2];
            float &of_p = p[0][e / 4][e % 4], &of_ds = ds[0][e / 4][e % 4];
            of_p = exp2_approx(fmaf(of_p, scale2, -of.lse2));
            if (make_dk) of_ds = of_p * (of_ds - of.expected);
        }
        uint32_t x[1][M / 16][4];
        if (make_dv) {
            pack_operand<M>(x[0], p[0]);
            add_product<HD, 1, M>(dv, x, dout + buffer * HD);
        }
        if (make_dk) {
            pack_operand<M>(x[0], ds[0]);
            add_product<HD, 1, M>(dk, x, q + buffer * HD);
        }
    }
    const float one[1][2] = {{1, 1}}, scale[1][2] = {{a.scale, a.scale}};
    if (make_dv) store_rows<HD, 1>(a.dv + k_at, a.k_stride, v, row, u.nk - j, a.hd, dv, one);
    if (make_dk) store_rows<HD, 1>(a.dk + k_at, a.k_stride, k, row, u.nk - j, a.hd, dk, scale);
}

// dq of a block of queries of one head, 16 M for each warp, in registers, while keys pass by: a
// tile of k and one of v at a time and the next under way. The last queries come first.
// At HD 128: 96 KB of shared memory, 213 bytes from it per mma.
template <int HD> __global__ void __launch_bounds__(TILE_WARPS * WARP)
attention_backward_queries(Attention<bf16> a, int tiles) {
    constexpr int M = blocks_of_warp<HD>(), N = rows_of_step<HD>();
    extern __shared__ unsigned char shared_memory[];
    int lane = lane_number(), row = warp_number() * 16 * M, rows = (int)blockDim.x / WARP * 16 * M;
    Unit u = unit_number(a, blockIdx.x, (unsigned)tiles, a.H, 1);
    int i = (tiles - 1 - u.tile) * rows, left = u.nq - i;
    if (left <= 0) return;

    bf16 *k = (bf16 *)shared_memory, *v = k + 2 * N * HD;       // (2, N, HD)
    bf16 *q = v + 2 * N * HD, *dout = q + rows * HD;
    size_t q_at = ((u.q0 + i) * a.H + u.head) * a.hd;
    size_t k_at = u.k0 * a.k_stride + u.head / a.shared * a.hd;
    int own = u.before + i, end = min(end_key(own + rows - 1), u.nk);
    int first = first_key(own, a.window) / N * N;
    own = row < left ? own + row : -end;                        // of the warp's first query, if any

    float dq[M][HD / 8][4] = {}, scale2 = a.scale * LOG2_E;
    RowTerms terms[M][2];
    for (int e = 0; e < 2 * M; e++) {
        int r = row + lane / 4 + 8 * e;
        if (r < left) terms[e / 2][e % 2] = a.terms[u.head * a.T + u.q0 + i + r];
    }
    copy_tile<HD>(q, a.q + q_at, a.q_stride, rows, left, a.hd);
    copy_tile<HD>(dout, a.dout + q_at, a.q_stride, rows, left, a.hd);
    for (int j = first - N, buffer = 1; j < end; j += N, buffer ^= 1) {
        copy_wait<0>();
        __syncthreads();                        // this step's are there, the last step's not needed
        if (j + N < end) {                      // the next step's
            size_t at = k_at + (j + N) * a.k_stride;
            int to = (buffer ^ 1) * N * HD;
            copy_tile<HD>(k + to, a.k + at, a.k_stride, N, u.nk - j - N, a.hd);
            copy_tile<HD>(v + to, a.v + at, a.k_stride, N, u.nk - j - N, a.hd);
            copy_commit();
        }
        if (j < first || !any_seen(own, 16 * M, j, N, a.window)) continue;  // all lanes or none

        float s[M][N / 8][4], ds[M][N / 8][4];
        const bf16 *k_tile = k + buffer * N * HD, *v_tile = v + buffer * N * HD;
        multiply_rows<HD, M, N>(s, q, row, k_tile);
        hide_unseen<M, N>(s, end_key(own) - a.window - j, a.window);
        multiply_rows<HD, M, N>(ds, dout, row, v_tile);         // dp
        uint32_t x[M][N / 16][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int e = 0; e < N / 2; e++) {
                RowTerms of = terms[m][e / 2 % 2];
                float p = exp2_approx(fmaf(s[m][e / 4][e % 4], scale2, -of.lse2));
                ds[m][e / 4][e % 4] = p * (ds[m][e / 4][e % 4] - of.expected);
            }
            pack_operand<N>(x[m], ds[m]);
        }
        add_product<HD, M, N>(dq, x, k_tile);
    }
    const float scale[2][2] = {{a.scale, a.scale}, {a.scale, a.scale}};
    store_rows<HD, M>(a.dq + q_at, a.q_stride, q, row, left, a.hd, dq, scale);
}

// ------------------------------------------------------------------------------------------- rows
//
// A warp for each row of a head, or 256 columns of it where heads are larger. It takes the other
// side 32 rows at a time: first a lane is a row there and forms its products, then a lane is every
// 32nd column of the own row and adds up. Arithmetic as in chapter 3, 4 and 14 hd FLOPs for a pair.

// Columns column .. column+7 of a row; those beyond hd are 0.
template <typename Act> __device__ __forceinline__ void
load_piece(float x[8], const Act *row, unsigned column, unsigned hd, bool pieces) {
    if (pieces && column < hd) load8(x, row + column);
    else
        for (unsigned i = 0; i < 8; i++) x[i] = column + i < hd ? to_float(row[column + i]) : 0;
}

template <typename Act>
__device__ __forceinline__ float dot_rows(const Act *a, const Act *b, const Attention<Act> &of) {
    float sum = 0;
    for (unsigned d = 0; d < of.hd; d += 8) {
        float x[8], y[8];
        load_piece(x, a, d, of.hd, of.pieces);
        load_piece(y, b, d, of.hd, of.pieces);
        for (int i = 0; i < 8; i++) sum = fmaf(x[i], y[i], sum);
    }
    return sum;
}

// p and scale ds of query t of a head and the key that begins at `key`.
template <typename Act> __device__ __forceinline__ void
pair_terms(const Attention<Act> &a, size_t t, unsigned head, size_t key, float *p, float *ds) {
    size_t query = t * a.q_stride + head * a.hd;
    float expected = a.terms[head * a.T + t].expected;
    *p = expf(a.scale * dot_rows(a.q + query, a.k + key, a) - a.lse[t * a.H + head]);
    *ds = a.scale * *p * (dot_rows(a.dout + query, a.v + key, a) - expected);
}

// sum (this lane's columns) += weight row
template <typename Act> __device__ __forceinline__ void
add_row(float sum[LANE_COLUMNS], float weight, const Act *row, unsigned column, unsigned hd) {
    for (int c = 0; c < LANE_COLUMNS; c++, column += WARP)
        if (column < hd) sum[c] = fmaf(weight, to_float(row[column]), sum[c]);
}

template <typename Act> __device__ __forceinline__ void
store_row(Act *row, const float x[LANE_COLUMNS], float factor, unsigned column, unsigned hd) {
    for (int c = 0; c < LANE_COLUMNS; c++, column += WARP)
        if (column < hd) from_float(row + column, x[c] * factor);
}

// What this warp is about: n rows of `heads` heads at most, a tile being a row.
template <typename Act>
__device__ __forceinline__ Unit row_of_warp(const Attention<Act> &a, unsigned n, unsigned heads) {
    size_t warp = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    return unit_number(a, warp, n, heads, (a.hd + ROW_COLUMNS - 1) / ROW_COLUMNS);
}

// attention_forward of a query in one head, or its dq.
template <typename Act, bool backward>
__global__ void attention_query_rows(Attention<Act> a, unsigned most_queries) {
    Unit u = row_of_warp(a, most_queries, a.H);
    if (u.tile >= u.nq) return;
    int lane = lane_number(), own = u.before + u.tile, end = end_key(own);
    unsigned column = u.part * ROW_COLUMNS + (unsigned)lane, hd = a.hd;
    size_t t = u.q0 + u.tile, at = t * a.H + u.head, query = at * hd;
    size_t k_at = u.k0 * a.k_stride + u.head / a.shared * hd;
    const Act *of = (backward ? a.k : a.v) + k_at;
    float x[LANE_COLUMNS] = {}, largest = -INFINITY, sum = 0;   // x: out or dq
    for (int j = first_key(own, a.window); j < end; j += WARP) {
        int n = min((int)WARP, end - j);
        size_t key = k_at + (j + lane) * a.k_stride;
        float p = 0, weight = 0;
        if (!backward) {
            float s = lane < n ? a.scale * dot_rows(a.q + query, a.k + key, a) : -INFINITY; // 1
            float now = max_lanes(fmaxf(largest, s), WARP), base = exp_base(now);
            float shrink = expf(largest - base);
            largest = now;
            weight = expf(s - base);                                                        // 2
            sum = fmaf(sum, shrink, warp_sum(weight));
            for (int c = 0; c < LANE_COLUMNS; c++) x[c] *= shrink;
        } else if (lane < n) pair_terms(a, t, u.head, key, &p, &weight);
        for (int k = 0; k < n; k++)                                                         // 3
            add_row(x, __shfl_sync(0xFFFFFFFFu, weight, k), of + (j + k) * a.k_stride, column, hd);
    }
    store_row((backward ? a.dq : a.out) + query, x, backward ? 1 : 1 / sum, column, hd);
    if (!backward && u.part == 0 && lane == 0) a.lse[at] = largest + logf(sum);
}

// dk and dv of a key in one group.
template <typename Act> __global__ void attention_key_rows(Attention<Act> a, unsigned most_keys) {
    Unit u = row_of_warp(a, most_keys, a.G);
    if (u.tile >= u.nk) return;
    int lane = lane_number(), first = max(u.tile - u.before, 0);
    int end = min(u.nq, u.tile - u.before + a.window);
    unsigned column = u.part * ROW_COLUMNS + (unsigned)lane, hd = a.hd;
    size_t key = (u.k0 + u.tile) * a.k_stride + u.head * hd;
    float dk[LANE_COLUMNS] = {}, dv[LANE_COLUMNS] = {};
    for (unsigned head = u.head * a.shared; head < (u.head + 1) * a.shared; head++)
        for (int i = first; i < end; i += WARP) {
            int n = min((int)WARP, end - i);
            float p = 0, ds = 0;
            if (lane < n) pair_terms(a, u.q0 + i + lane, head, key, &p, &ds);
            for (int k = 0; k < n; k++) {
                size_t at = (u.q0 + i + k) * a.q_stride + head * hd;
                add_row(dv, __shfl_sync(0xFFFFFFFFu, p, k), a.dout + at, column, hd);
                add_row(dk, __shfl_sync(0xFFFFFFFFu, ds, k), a.q + at, column, hd);
            }
        }
    store_row(a.dk + key, dk, 1, column, hd);
    store_row(a.dv + key, dv, 1, column, hd);
}

// ----------------------------------------------------------------------------------------- decode
//
// One query in each sequence. Every grid is as the batch's most_keys would have it, whatever the
// spans hold when it runs, so that a recorded step stays right while the cache grows.

// Keys of a split of those that a sequence's only query sees: `least` or more.
__device__ __forceinline__ int keys_of_split(int own, int window, int splits, int least) {
    return max((end_key(own) - first_key(own, window) + splits - 1) / splits, least);
}

// A row's lanes, eight columns each, are the next power of two. hd <= 256.
__host__ __device__ inline int row_lanes(unsigned hd) {
    int lanes = 1;
    while (8 * lanes < (int)hd) lanes *= 2;
    return lanes;
}

// Keys of a team of row_lanes that are under way at once: as many as registers allow.
template <typename Act, int R> __host__ __device__ constexpr int keys_of_team() {
    return R * sizeof(Act) > 8 ? 2 : 4;
}

// Entry c of n parts (maximum, sum, out) together, which lie `width` apart; their maximum and sum.
__device__ __forceinline__ float join_parts(const float *parts, int n, int width, int c,
                                            float *largest, float *sum) {
    float top = -INFINITY, total = 0, x = 0;
    for (int k = 0; k < n; k++) top = fmaxf(top, parts[k * width]);
    for (int k = 0; k < n; k++) {
        float weight = expf(parts[k * width] - exp_base(top));
        total = fmaf(weight, parts[k * width + 1], total);
        x = fmaf(weight, parts[k * width + c], x);
    }
    *largest = top;
    *sum = total;
    return x;
}

// out, maximum and sum of R query heads of one group, or fewer, over one share of the keys. A
// block's threads form teams of row_lanes; a team takes keys of its own, each read once for all
// heads, and keeps a softmax of its own; teams are joined at the end by way of shared memory.
// Reads 4 G hd bytes of each key once, which is all the time it should take.
template <typename Act, int R> __global__ void __launch_bounds__(DECODE_THREADS)
attention_decode_share(Attention<Act> a, int splits, int least) {
    constexpr int B = keys_of_team<Act, R>();
    extern __shared__ unsigned char shared_memory[];
    Unit u = unit_number(a, blockIdx.x, (unsigned)splits, a.G, (a.shared + R - 1) / R);
    unsigned head = u.head * a.shared + u.part * R;             // the first
    int heads = (int)min((unsigned)R, (u.head + 1) * a.shared - head);
    int lanes = row_lanes(a.hd), teams = (int)blockDim.x / lanes, team = (int)threadIdx.x / lanes;
    unsigned column = threadIdx.x % (unsigned)lanes * 8;
    int each = keys_of_split(u.before, a.window, splits, least);
    int j = first_key(u.before, a.window) + u.tile * each, end = min(j + each, end_key(u.before));
    if (u.nq == 0 || j >= end) return;

    float q[R][8], out[R][8] = {}, largest[R], sum[R] = {};
#pragma unroll
    for (int r = 0; r < R; r++) {
        largest[r] = -INFINITY;
        load_piece(q[r], a.q + (u.q0 * a.H + head + (r < heads ? r : 0)) * a.hd, column, a.hd,
                   a.pieces);
    }
    size_t at = u.k0 * a.k_stride + u.head * a.hd;
    for (; j < end; j += B * teams) {
        float k[B][8], v[B][8], s[B][R];
#pragma unroll
        for (int b = 0; b < B; b++) {
            int key = j + b * teams + team;
            unsigned hd = key < end ? a.hd : 0;                 // 0: a row of zeros
            load_piece(k[b], a.k + at + key * a.k_stride, column, hd, a.pieces);
            load_piece(v[b], a.v + at + key * a.k_stride, column, hd, a.pieces);
        }
#pragma unroll
        for (int i = 0; i < B * R; i++) {
            float &of = s[i / R][i % R] = 0;
            for (int d = 0; d < 8; d++) of = fmaf(q[i % R][d], k[i / R][d], of);
        }
        for (int lane = lanes / 2; lane; lane /= 2)
#pragma unroll
            for (int i = 0; i < B * R; i++)
                s[i / R][i % R] += __shfl_xor_sync(0xFFFFFFFFu, s[i / R][i % R], lane);
#pragma unroll
        for (int r = 0; r < R; r++) {
            float before = largest[r];
            for (int b = 0; b < B; b++) {
                s[b][r] = j + b * teams + team < end ? a.scale * s[b][r] : -INFINITY;
                largest[r] = fmaxf(largest[r], s[b][r]);
            }
            float base = exp_base(largest[r]), shrink = expf(before - base);
            sum[r] *= shrink;
            for (int d = 0; d < 8; d++) out[r][d] *= shrink;
            for (int b = 0; b < B; b++) {
                float p = expf(s[b][r] - base);
                sum[r] += p;
                for (int d = 0; d < 8; d++) out[r][d] = fmaf(p, v[b][d], out[r][d]);
            }
        }
    }

    float *all = (float *)shared_memory;        // (teams, R, 2 + 8 lanes): maximum, sum, out
    int width = 2 + 8 * lanes;
#pragma unroll
    for (int r = 0; r < R; r++) {
        float *mine = all + (team * R + r) * width;
        if (column == 0) mine[0] = largest[r], mine[1] = sum[r];
        for (int d = 0; d < 8; d++) mine[2 + column + d] = out[r][d];
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < heads * (int)a.hd; i += (int)blockDim.x) {
        int r = i / (int)a.hd, c = 2 + i % (int)a.hd;
        float *part = a.parts + ((u.span * a.H + head + r) * (size_t)splits + u.tile) * (2 + a.hd);
        float top, total;
        part[c] = join_parts(all + r * width, teams, R * width, c, &top, &total);
        if (c == 2) part[0] = top, part[1] = total;
    }
}

// Joins the shares of a query in one head: a block for each, its threads the columns in turn. Reads
// a part of 4 hd bytes for each share.
template <typename Act>
__global__ void attention_decode_join(Attention<Act> a, int splits, int least) {
    Unit u = unit_number(a, blockIdx.x, 1, a.H, 1);
    if (u.nq == 0) return;
    int each = keys_of_split(u.before, a.window, splits, least), width = 2 + (int)a.hd;
    int used = (end_key(u.before) - first_key(u.before, a.window) + each - 1) / each;
    const float *parts = a.parts + (u.span * a.H + u.head) * (size_t)splits * width;
    size_t at = u.q0 * a.H + u.head;
    for (int c = 2 + (int)threadIdx.x; c < width; c += (int)blockDim.x) {
        float top, sum, out = join_parts(parts, used, width, c, &top, &sum);
        from_float(a.out + at * a.hd + (c - 2), out / sum);
        if (c == 2) a.lse[at] = top + logf(sum);
    }
}

// -------------------------------------------------------------------------------------- launchers

// Bytes of Device.scratch that this chapter needs: what the backward pass knows of each query, or
// the parts of a decode step.
static size_t attention_scratch(const OpSizes *s) {
    size_t shared = s->G ? s->H / s->G : 1, decode = DECODE_BLOCKS * shared * (2 + s->hd) * 4;
    return max_size(s->training ? s->T * s->H * sizeof(RowTerms) : 0, decode);
}

// A kernel of `tiles`, a warp of which has `each` of the at most n rows of a sequence, in so many
// heads; no more warps in a block than n rows keep busy. Shared memory: `bytes` for each of the
// block's rows, and `more`; above 48 KB it has to be asked for.
template <typename Kernel>
static void launch_tiles(Device *dev, const char *name, Kernel *kernel, const Attention<bf16> &a,
                         size_t n, size_t each, size_t heads, size_t bytes, size_t more) {
    size_t warps = min_size(ceil_div(n, each), TILE_WARPS), tiles = ceil_div(n, warps * each);
    bytes = bytes * warps * each + more;
    cudaError_t e = cudaFuncSetAttribute(
        (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
    try_cuda((Gpu *)dev->gpu, e, "shared memory of attention");
    launch_shared(dev, bytes, name, kernel, blocks_for(tiles * heads * a.n_spans, 1),
                  (unsigned)(warps * WARP), a, tiles);
}

// Takes the smallest tile that a head fits in.
template <int HD> static void run_tiles(Device *dev, const Attention<bf16> &a, const Batch *batch) {
    if constexpr (HD < 256)
        if (a.hd > HD) return run_tiles<HD < 128 ? HD + 32 : HD + 64>(dev, a, batch);
    constexpr size_t own = 16 * blocks_of_warp<HD>(), step = rows_of_step<HD>(), row = 2 * HD;
    size_t queries = batch->most_queries, keys = batch->most_keys, more = 4 * step * row;
    if (!a.dout)
        return launch_tiles(dev, "attention_forward_tiles", attention_forward_tiles<HD>, a, queries,
                            own, a.H, row, 2 * keys_of_tile<HD>() * row);
    size_t with_terms = more + 2 * step * sizeof(RowTerms);
    launch_tiles(dev, "attention_backward_keys", attention_backward_keys<HD, true, HD <= 128>, a,
                 keys, 16, a.G, 2 * row, with_terms);
    if constexpr (HD > 128)
        launch_tiles(dev, "attention_backward_keys", attention_backward_keys<HD, false, true>, a,
                     keys, 16, a.G, 2 * row, with_terms);
    launch_tiles(dev, "attention_backward_queries", attention_backward_queries<HD>, a, queries,
                 own, a.H, 2 * row, more);
}

// A kernel of `rows`, for each of the at most n rows of a sequence in so many heads.
template <typename Act, typename Kernel>
static void launch_rows(Device *dev, const char *name, Kernel *kernel, const Attention<Act> &a,
                        size_t n, size_t heads) {
    size_t warps = n * heads * ceil_div(a.hd, ROW_COLUMNS) * a.n_spans;
    launch(dev, name, kernel, blocks_for(warps, 4), 4 * WARP, a, n);
}

template <typename Act, int R>
static void decode(Device *dev, const Attention<Act> &a, const Batch *batch) {
    size_t pairs = (size_t)a.G * a.n_spans, processors = ((const Gpu *)dev->gpu)->processors;
    size_t blocks = min_size(2 * processors, DECODE_BLOCKS);
    int splits = (int)max_size(min_size(blocks / pairs, ceil_div(batch->most_keys, 16)), 1);
    size_t lanes = (size_t)row_lanes(a.hd), teams = DECODE_THREADS / lanes;
    size_t bytes = teams * R * (2 + 8 * lanes) * sizeof(float);
    int least = (int)teams * keys_of_team<Act, R>();
    launch_shared(dev, bytes, "attention_decode_share", attention_decode_share<Act, R>,
                  blocks_for(splits * pairs * ceil_div(a.shared, R), 1), DECODE_THREADS, a, splits,
                  least);
    launch(dev, "attention_decode_join", attention_decode_join<Act>,
           blocks_for(a.H * a.n_spans, 1), DECODE_THREADS, a, splits, least);
}

// Both ops: attention_backward, which only reads out and lse, where there is dout.
template <typename Act>
static void attention(Device *dev, const void *out, void *dq, void *dk, void *dv, const void *q,
                      const void *k, const void *v, const void *dout, const real *lse,
                      AttentionShape shape, const Batch *batch) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (gpu->failed || !batch->T || !batch->n_spans) return;
    size_t H = shape.H, G = shape.G, hd = shape.hd;
    size_t queries = batch->most_queries, keys = batch->most_keys;
    uintptr_t places = (uintptr_t)out | (uintptr_t)dq | (uintptr_t)dk | (uintptr_t)dv |
                       (uintptr_t)q | (uintptr_t)k | (uintptr_t)v | (uintptr_t)dout;
    Attention<Act> a = {                        // in the order of the structure
        (Act *)out, (Act *)dq, (Act *)dk, (Act *)dv,
        (const Act *)q, (const Act *)k, (const Act *)v, (const Act *)dout, (float *)lse,
        (RowTerms *)dev->scratch, (float *)dev->scratch, batch->spans, batch->T, H * hd, G * hd,
        (unsigned)batch->n_spans, (unsigned)H, (unsigned)G, (unsigned)(H / G), (unsigned)hd,
        (int)(shape.window ? min_size(shape.window, keys) : keys), shape.scale,
        hd % 8 == 0 && places % 16 == 0};
    if (dout)
        launch(dev, "attention_row_terms", attention_row_terms<Act>, blocks_for(a.T * H, 4),
               4 * WARP, a);
    else if (queries == 1 && hd <= ROW_COLUMNS && G * a.n_spans <= DECODE_BLOCKS)
        return a.shared == 1   ? decode<Act, 1>(dev, a, batch)
               : a.shared == 2 ? decode<Act, 2>(dev, a, batch)
               : a.shared <= 4 ? decode<Act, 4>(dev, a, batch)
                               : decode<Act, 8>(dev, a, batch);
    if constexpr (sizeof(Act) == sizeof(bf16))
        if (gpu->matrix_units && a.pieces && hd <= 256) return run_tiles<32>(dev, a, batch);
    if (!dout)
        return launch_rows(dev, "attention_query_rows", attention_query_rows<Act, false>, a,
                           queries, H);
    launch_rows(dev, "attention_key_rows", attention_key_rows<Act>, a, keys, G);
    launch_rows(dev, "attention_query_rows", attention_query_rows<Act, true>, a, queries, H);
}

static void attention_forward(Device *dev, void *out, real *lse, const void *q, const void *k,
                              const void *v, AttentionShape shape, const Batch *batch) {
    FOR_ACT(dev, attention<Act>(dev, out, NULL, NULL, NULL, q, k, v, NULL, lse, shape, batch));
}

static void attention_backward(Device *dev, void *dq, void *dk, void *dv, const void *dout,
                               const void *q, const void *k, const void *v, const void *out,
                               const real *lse, AttentionShape shape, const Batch *batch) {
    FOR_ACT(dev, attention<Act>(dev, out, dq, dk, dv, q, k, v, dout, lse, shape, batch));
}

// =================================================================================================
//  7. Output head, cross-entropy, optimiser
//
//  The loss and the decision whether a gradient may be applied stay on the card: a step is asked
//  for as a whole and read back when somebody wants to see it.
// =================================================================================================

// Threads for a row of C logits.
static unsigned head_threads(size_t C) { return C <= 1024 ? 128 : 256; }

// exp(a - b) for a <= b; 1 where both are the same infinity.
__device__ __forceinline__ float shrink(float a, float b) { return a == b ? 1 : expf(a - b); }

// The softmax's running max and sum over the columns of a slice, S rows of C logits. A block owns a
// row, each thread a maximum and a sum of its own, so that logits are read once, 4 bytes each.
template <int width>
__global__ void cross_entropy_forward_kernel(float *max, float *sum, float *chosen,
                                             const float *logits, const int32_t *target,
                                             size_t first, size_t C) {
    __shared__ float partial[WARP];
    size_t s = blockIdx.x;
    const float *z = logits + s * C;
    float largest = -INFINITY, total = 0;
    for (size_t v = width * threadIdx.x; v < C; v += width * blockDim.x) {
        float x[width], before = largest;
        load<width>(x, z + v);
#pragma unroll
        for (int i = 0; i < width; i++) largest = larger(largest, x[i]);
        total *= shrink(before, largest);
#pragma unroll
        for (int i = 0; i < width; i++) total += shrink(x[i], largest);
    }
    float mine = largest;
    largest = block_max(largest, partial);
    total = block_sum(total * shrink(mine, largest), partial);
    if (threadIdx.x != 0) return;
    if (first) {
        float before = max[s], now = larger(before, largest);
        total = sum[s] * shrink(before, now) + total * shrink(largest, now);
        largest = now;
    }
    max[s] = largest;
    sum[s] = total;
    size_t wanted = (size_t)target[s];
    if (wanted >= first && wanted < first + C) chosen[s] = z[wanted - first];
}

static void cross_entropy_forward(Device *dev, real *max, real *sum, real *chosen,
                                  const real *logits, const int32_t *target, size_t first, size_t C,
                                  size_t S) {
    FOR_ROWS(C, launch(dev, "cross_entropy_forward", cross_entropy_forward_kernel<width>,
                       blocks_for(S, 1), head_threads(C), max, sum, chosen, logits, target, first,
                       C));
}

// nll = max - chosen + log sum, and its sum over the S rows in double. One block, so that their
// order is fixed.
__global__ void cross_entropy_end_kernel(float *nll, uint8_t *hit, double *total, const float *max,
                                         const float *sum, const float *chosen, size_t S) {
    __shared__ double partial[WARP];
    double mine = 0;
    for (size_t s = threadIdx.x; s < S; s += blockDim.x) {
        nll[s] = max[s] - chosen[s] + logf(sum[s]);
        hit[s] = chosen[s] >= max[s];
        mine += (double)nll[s];
    }
    mine = block_sum(mine, partial);
    if (total && threadIdx.x == 0) *total += mine;
}

static void cross_entropy_end(Device *dev, real *nll, uint8_t *hit, double *total, const real *max,
                              const real *sum, const real *chosen, size_t S) {
    LAUNCH(dev, cross_entropy_end, 1, 128, nll, hit, total, max, sum, chosen, S);
}

// dz = scale (softmax - onehot) rounded. A block owns a row; 4 bytes read and 2 written a value.
template <typename Act, int width>
__global__ void cross_entropy_backward_kernel(Act *dlogits, const float *logits, const float *max,
                                              const float *sum, const int32_t *target, float scale,
                                              size_t first, size_t C) {
    size_t s = blockIdx.x, wanted = (size_t)target[s] - first;  // wraps around when it is before
    float largest = max[s], factor = scale * (1 / sum[s]);
    for (size_t v = width * threadIdx.x; v < C; v += width * blockDim.x) {
        float z[width];
        load<width>(z, logits + s * C + v);
#pragma unroll
        for (int i = 0; i < width; i++)
            z[i] = factor * expf(z[i] - largest) - (v + i == wanted ? scale : 0);
        store<width>(dlogits + s * C + v, z);
    }
}

static void cross_entropy_backward(Device *dev, void *dlogits, const real *logits, const real *max,
                                   const real *sum, const int32_t *target, real scale, size_t first,
                                   size_t C, size_t S) {
    LAUNCH_ROWS(dev, C, cross_entropy_backward, blocks_for(S, 1), head_threads(C), dlogits, logits,
                max, sum, target, scale, first, C);
}

// -------------------------------------------------------------------------------------- optimiser

// sums[block] = the block's share of the sum of squares of g, in double. Which elements are whose
// depends on n alone. Reads 4 bytes a value.
__global__ void squares_kernel(double *sums, const float *g, size_t n) {
    __shared__ double partial[WARP];
    size_t threads = (size_t)gridDim.x * blockDim.x;
    double sum = 0;
    for (size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8; i < n; i += threads * 8) {
        float x[8] = {0};
        if (i + 8 <= n) load8(x, g + i);
        else for (int j = 0; i + j < n; j++) x[j] = g[i + j];
#pragma unroll
        for (int j = 0; j < 8; j++) sum += (double)x[j] * (double)x[j];
    }
    sum = block_sum(sum, partial);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// The end of clip_gradient: the sum of n partial sums and what follows from it. One block.
__global__ void clip_kernel(StepRecord *record, const StepRecord *before, const double *sums,
                            unsigned n, float most) {
    __shared__ double partial[WARP];
    double sum = 0;
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum, partial);
    if (threadIdx.x != 0) return;
    double clip = (double)most / (sqrt(sum) + 1e-6);
    record->squares = sum;
    record->clip = (float)(clip < 1 ? clip : 1);
    record->refused = (before && before->refused) || !isfinite(record->loss) || !isfinite(sum);
}

static void clip_gradient(Device *dev, StepRecord *record, const StepRecord *before, const real *g,
                          size_t n, real most) {
    double *sums = ((Gpu *)dev->gpu)->sums;
    unsigned blocks = (unsigned)min_size(ceil_div(n, 128 * 8), SUMS);
    LAUNCH(dev, squares, blocks, 128, sums, g, n);
    LAUNCH(dev, clip, 1, 128, record, before, sums, blocks, most);
}

// What an AdamW step multiplies with; a kernel's argument.
typedef struct { float decay, beta1, beta2, rate, root, eps; } AdamwStep;

// m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2      p -= rate m / (sqrt(v) root + eps)
//
// A thread owns `width` parameters. Moves 28 bytes a parameter.
template <int width>
__global__ void adamw_kernel(float *p, const float *g, float *m, float *v, size_t n, AdamwStep a,
                             const StepRecord *record) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * width;
    float x[width], d[width], first[width], second[width], clip = record->clip;
    if (record->refused || i >= n) return;
    load<width>(x, p + i);
    load<width>(d, g + i);
    load<width>(first, m + i);
    load<width>(second, v + i);
#pragma unroll
    for (int j = 0; j < width; j++) {
        d[j] *= clip;
        first[j] = a.beta1 * first[j] + (1 - a.beta1) * d[j];
        second[j] = a.beta2 * second[j] + (1 - a.beta2) * d[j] * d[j];
        x[j] = x[j] * a.decay - a.rate * first[j] / (sqrtf(second[j]) * a.root + a.eps);
    }
    store<width>(p + i, x);
    store<width>(m + i, first);
    store<width>(v + i, second);
}

static void adamw(Device *dev, real *p, const real *g, real *m, real *v, size_t n, real lr,
                  real beta1, real beta2, real eps, real decay, const StepRecord *record,
                  size_t step) {
    double correct1 = 1 - pow((double)beta1, (double)step);
    double correct2 = 1 - pow((double)beta2, (double)step);
    AdamwStep a = {1 - lr * decay, beta1, beta2, (float)((double)lr / correct1),
                   (float)(1 / sqrt(correct2)), eps};
    FOR_ROWS(n, launch(dev, "adamw", adamw_kernel<width>, blocks_for(n, 128 * width), 128, p, g, m,
                       v, n, a, record));
}

// =================================================================================================
//  8. Decoding one token: matrix-vector products, sampling, recorded steps
//
//  A generated token passes each weight once, so what counts is how fast weights come from memory.
//  Little's law: 4.3 TB/s at 700 ns are 3 MB on their way, 23 KB for each of an H200's processors;
//  64 KB are kept under way. They arrive at 32 weights of 4 bits per cycle and processor, as many
//  levels as its shared memory can look up: nothing else may cost much.
// =================================================================================================

// ------------------------------------------------------------------------------ at most eight rows
//
// linears_forward and head_logits for T <= 8: weights are read once for all rows, no panel is made,
// and several products of one x are one launch. Two kernels:
//     tiles  y on matrix units, 16 rows of W by 8 columns of x, of which T = 1 wastes seven; the
//            units are idle otherwise. 4-bit and bf16 weights
//     plain  y in plain arithmetic: everything else; and before either, u = s x A^T
// A weight is rounded to the activation type as everywhere, so a prompt and the tokens after it see
// the same matrix.

enum { TILE = 16 };

// One linear of a launch. Its units are tiles or, in the plain kernel, rows of W or A.
struct FewPart : Linear {
    void *u, *y;                    // (T, r) act, (T, N) act; y of the head: float
    unsigned first;                 // number of its first unit: those of all parts are one row
};

struct FewRows {
    FewPart part[MOST_PRODUCTS];
    const void *x;                  // (T, K) act
    unsigned K, T;
    unsigned units, parts;          // units of all parts
    unsigned rounds;                // tiles: steps of one warp in a tile, rounded up to even
    unsigned split;                 // ... and warps that share one tile's columns
    bool wide;                      // y is float
};

__device__ __forceinline__ unsigned part_of(const FewRows &a, unsigned unit) {
    unsigned p = 0;
    while (p + 1 < a.parts && unit >= a.part[p + 1].first) p++;
    return p;
}

// low: u (T, r) = s x A^T, a few microseconds. Else y = x W^T + b + u B^T, any size and type. A
// block owns a row of A or W, its threads the columns in turn: many threads for the few rows of A.
template <typename Act, bool low>
__global__ void few_rows_plain(const __grid_constant__ FewRows a) {
    __shared__ float partial[WARP];
    const FewPart &part = a.part[part_of(a, blockIdx.x)];
    const Act *x = (const Act *)a.x, *u = (const Act *)part.u;
    size_t n = blockIdx.x - part.first, N = part.weight.N, r = part.lora.r;
    float sum[FEW_ROWS] = {0};
#pragma unroll 4
    for (unsigned k = threadIdx.x; k < a.K; k += blockDim.x) {
        float w;
        if (low) w = part.lora.A[n * a.K + k];
        else read_weight<1>(&w, part.weight, n * a.K + k, part.weight.code, part.weight.code8);
        w = rounded<Act>(w);
#pragma unroll
        for (unsigned t = 0; t < FEW_ROWS; t++)
            if (t < a.T) sum[t] += w * to_float(x[(size_t)t * a.K + k]);
    }
    for (size_t j = threadIdx.x; !low && j < r; j += blockDim.x) {
        float w = rounded<Act>(part.lora.B[n * r + j]);
#pragma unroll
        for (unsigned t = 0; t < FEW_ROWS; t++)
            if (t < a.T) sum[t] += w * to_float(u[t * r + j]);
    }
#pragma unroll
    for (unsigned t = 0; t < FEW_ROWS; t++) {
        if (t >= a.T) break;
        float y = block_sum(sum[t], partial) + (!low && part.bias ? part.bias[n] : 0);
        if (threadIdx.x != 0) continue;
        if (low) from_float((Act *)part.u + t * r + n, part.lora.scale * y);
        else if (a.wide) ((float *)part.y)[t * N + n] = y;
        else from_float((Act *)part.y + t * N + n, y);
    }
}

// ------------------------------------------------------------------------------------------- tiles
//
// A tile is 16 rows of W. The `split` warps that share it take its columns in turn, a step at a
// time: 128 bytes of each row, 256 or 64 columns of 4 or 16 bits. In a step lane l holds 32 bytes
// of rows l/4 and l/4 + 8, as the left operand of mma wants its rows. Its columns differ from what
// mma calls them, but a sum does not mind as long as x, the right operand, is numbered alike: a
// lane multiplies eight neighbours of its rows ("octet") with the same eight of x. Two steps are on
// their way while a third is worked on, across the ends of tiles too.

// What a lane loaded of one step.
struct Step {
    uint32_t raw[2][8];             // 32 bytes of rows l/4, l/4 + 8
    float absmax[2];                // 4-bit: of the one block that they are of each row,
    uint32_t code[2];               // ... and the code of the scale, when scales are quantised
};

// What a lane loads next.
struct Stream {
    unsigned lane, first, next;     // columns: where step 0 begins, from a step to the next
    unsigned ahead;                 // from a tile of this warp to its next
    unsigned tile, round, part;     // round: the how manieth of its steps in the tile
    const char *row[2];             // where its rows begin
    unsigned block[2];              // 4-bit: the first block of each
};

// The two levels of each byte, one copy for each of 16 lanes: 32 lanes read 8 bytes in two halves,
// and lane l finds its copy in banks 2 (l%16) and + 1, whatever the byte. 32 KB.
struct alignas(8) LevelPair { float first, second; };

// Number of a tile's row in its matrix; past the last one: the last one.
__device__ __forceinline__ size_t tile_row(const FewPart &part, unsigned tile, unsigned i) {
    size_t row = (size_t)(tile - part.first) * TILE + i;
    return row < part.weight.N ? row : part.weight.N - 1;
}

template <unsigned bits>
__device__ __forceinline__ void open_tile(Stream &s, const FewRows &a, unsigned tile) {
    s.tile = tile, s.round = 0, s.part = part_of(a, tile);
    if (tile >= a.units) return;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        size_t first = tile_row(a.part[s.part], tile, s.lane / 4 + 8 * half) * a.K;
        s.row[half] = (const char *)a.part[s.part].weight.data + first * bits / 8;
        s.block[half] = (unsigned)(first / QUANT_BLOCK);
    }
}

// Starts loading one step and moves on to the warp's next. Past K a lane loads zeros; of 4 bits
// something that is there, to be multiplied with a scale of 0.
template <unsigned bits>
__device__ __forceinline__ void load_step(Step &s, Stream &from, const FewRows &a) {
    if (from.tile >= a.units) return;
    const Weight &w = a.part[from.part].weight;
    unsigned k = from.first + from.round * from.next;
    if (bits == 4 && k >= a.K) k = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const char *bytes = from.row[half] + k * bits / 8;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint4 raw = {0, 0, 0, 0};
            if (bits == 4 || k + i * 32 < a.K) raw = load16(bytes + i * (bits == 4 ? 16 : 64));
            memcpy(s.raw[half] + 4 * i, &raw, 16);
        }
        if (bits != 4) continue;
        unsigned block = from.block[half] + k / QUANT_BLOCK;
        if (w.absmax) s.absmax[half] = w.absmax[block];
        else s.code[half] = w.absmax8[block], s.absmax[half] = w.absmax2[block / SCALE_BLOCK];
    }
    if (++from.round == a.rounds) open_tile<bits>(from, a, from.tile + from.ahead);
}

// sum (16, 8) += an octet of each row times the same columns of x, in each lane.
__device__ __forceinline__ void multiply_octet(float sum[4], const uint32_t top[4],
                                               const uint32_t bottom[4], const uint4 &x) {
    const uint32_t a[4] = {top[0], bottom[0], top[1], bottom[1]}, b[2] = {x.x, x.y};
    const uint32_t c[4] = {top[2], bottom[2], top[3], bottom[3]}, d[2] = {x.z, x.w};
    mma(sum, a, b, sum);
    mma(sum, c, d, sum);
}

// sum += x W^T over the columns of one step, for a lane those from k on; x is the lane's row. Past
// K its weights are 0, so any x will do; and past T any row, for its sums are not asked for.
template <unsigned bits>
__device__ __forceinline__ void multiply_step(float sum[4], const Step &s, const bf16 *x,
                                              unsigned k, unsigned K, const Weight &w,
                                              const char *levels, const float *code8) {
    const unsigned skip = bits == 4 ? 8 : 32;           // from one octet to the next
    float scale[2] = {s.absmax[0], s.absmax[1]};
    if (bits == 4 && !w.absmax)
        for (int half = 0; half < 2; half++)
            scale[half] = __fadd_rn(__fmul_rn(code8[s.code[half]], s.absmax[half]), w.offset);
    if (bits == 4 && k >= K) k = 0, scale[0] = scale[1] = 0;
#pragma unroll
    for (unsigned o = 0; o < 32 / bits; o++) {
        uint4 right = load16(x + (bits == 4 || k + o * skip < K ? k + o * skip : 0));
        uint32_t pair[2][4];                    // of bf16: the octet of each row
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t *raw = s.raw[i / 4];
            if constexpr (bits == 4) {
                uint32_t byte = __byte_perm(raw[o], 0, 0x4440 + i % 4);
                LevelPair l = *(const LevelPair *)(levels + byte * 128);
                pair[i / 4][i % 4] = pack_bf16(l.first * scale[i / 4], l.second * scale[i / 4]);
            } else pair[i / 4][i % 4] = raw[4 * o + i % 4];
        }
        multiply_octet(sum, pair[0], pair[1], right);
    }
}

// sum += u B^T: 32 columns of B a time, rounded. Any r, so value by value; once in a tile.
__device__ __forceinline__ void multiply_low_rank(float sum[4], const FewRows &a,
                                                  const FewPart &part, unsigned tile,
                                                  unsigned mine, unsigned lane) {
    size_t r = part.lora.r;
    const bf16 *u = (const bf16 *)part.u + lane / 4 * r;
    const float *B = part.lora.B + tile_row(part, tile, lane / 4) * r;
    const float *C = part.lora.B + tile_row(part, tile, lane / 4 + 8) * r;
    for (size_t j0 = 32 * mine; j0 < r; j0 += 32 * a.split) {
        uint32_t top[4], bottom[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            size_t j = j0 + lane % 4 * 8 + 2 * i;
            bool first = j < r, second = j + 1 < r, row = lane / 4 < a.T;
            top[i] = pack_bf16(first ? B[j] : 0, second ? B[j + 1] : 0);
            bottom[i] = pack_bf16(first ? C[j] : 0, second ? C[j + 1] : 0);
            low[i] = pack_bf16(row && first ? to_float(u[j]) : 0,
                               row && second ? to_float(u[j + 1]) : 0);
        }
        multiply_octet(sum, top, bottom, uint4{low[0], low[1], low[2], low[3]});
    }
}

// y = x W^T + b + u B^T for bf16 x, W of 4 or 16 bits. K is a multiple of 64 (4-bit) or 8, rows of
// W and x begin at multiples of 16 bytes, 4-bit weights have less than 2^32 blocks. A block of
// threads stays and takes tile after tile. Two weights of 4 bits cost a lane 6 instructions: byte,
// address, lookup, two products, one rounding; every 8th time an mma. 4 KB a warp are under way.
template <unsigned bits>
__global__ void __launch_bounds__(WARP * DECODE_WARPS, 2)
few_rows_tiles(const __grid_constant__ FewRows a) {
    __shared__ LevelPair levels[bits == 4 ? 256 * 16 : 1];
    __shared__ float code8[bits == 4 ? 256 : 1];
    __shared__ float sums[2][DECODE_WARPS][TILE * FEW_ROWS];
    // from a shuffle, so that the compiler knows it is one number for the whole warp
    const unsigned warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / WARP, 0);
    const unsigned lane = threadIdx.x % WARP;
    const unsigned mine = warp % a.split, together = blockDim.x / WARP / a.split;
    const unsigned ahead = gridDim.x * together;
    const unsigned columns = 1024 / bits, octet = lane % 4 * (bits == 4 ? 64 : 8);   // of a step
    Stream stream = {};
    Step ring[2] = {};
    stream.lane = lane, stream.first = columns * mine + octet, stream.next = columns * a.split;
    stream.ahead = ahead;
    open_tile<bits>(stream, a, blockIdx.x * together + warp / a.split);
    load_step<bits>(ring[0], stream, a);
    load_step<bits>(ring[1], stream, a);

    unsigned before = MOST_PRODUCTS, turn = 0;
    for (unsigned base = blockIdx.x * together; base < a.units; base += ahead, turn ^= 1) {
        unsigned p = part_of(a, base), tile = base + warp / a.split;
        const FewPart &part = a.part[p];
        const Weight &w = part.weight;
        if (bits == 4 && p != before) {         // each part may have levels of its own
            __syncthreads();
            for (unsigned i = threadIdx.x; i < 256 * 16; i += blockDim.x)
                levels[i] = {w.code[i / 256], w.code[i / 16 % 16]};
            for (unsigned i = threadIdx.x; i < 256 && !w.absmax; i += blockDim.x)
                code8[i] = w.code8[i];
            __syncthreads();
            before = p;
        }

        float sum[4] = {0, 0, 0, 0};
        if (mine == 0 && part.bias) {
            sum[0] = sum[1] = part.bias[tile_row(part, tile, lane / 4)];
            sum[2] = sum[3] = part.bias[tile_row(part, tile, lane / 4 + 8)];
        }
        multiply_low_rank(sum, a, part, tile, mine, lane);
        const bf16 *x = (const bf16 *)a.x + min(lane / 4, a.T - 1) * (size_t)a.K;
        unsigned k = mine * columns;
        for (unsigned round = 0; round < a.rounds; round += 2) {
#pragma unroll
            for (int i = 0; i < 2; i++, k += a.split * columns) {
                if (k < a.K)
                    multiply_step<bits>(sum, ring[i], x, k + octet, a.K, w,
                                        (const char *)levels + lane % 16 * 8, code8);
                load_step<bits>(ring[i], stream, a);
            }
        }

        for (int i = 0; i < 4; i++)
            sums[turn][warp][(lane / 4 + i / 2 * 8) * FEW_ROWS + lane % 4 * 2 + i % 2] = sum[i];
        __syncthreads();                        // one is enough, for the next tile has other sums
        for (unsigned i = threadIdx.x; i < together * TILE * FEW_ROWS; i += blockDim.x) {
            unsigned t = i % FEW_ROWS, which = i / (TILE * FEW_ROWS);
            size_t n = (size_t)(base + which - part.first) * TILE + i / FEW_ROWS % TILE;
            float total = 0;
            for (unsigned s = 0; s < a.split; s++)
                total += sums[turn][which * a.split + s][i % (TILE * FEW_ROWS)];
            if (t >= a.T || n >= w.N) continue;
            if (a.wide) ((float *)part.y)[t * w.N + n] = total;
            else from_float((bf16 *)part.y + t * w.N + n, total);
        }
    }
}

// How the units of a launch are spread: rows, or with `bits` tiles, with few columns for each warp
// where that gives every processor a block, and else at least two steps. Result: the blocks.
static unsigned spread_units(const Gpu *gpu, FewRows *a, bool low, unsigned bits, unsigned warps) {
    size_t steps = bits ? ceil_div(a->K, 1024 / bits) : 1, processors = gpu->processors, blocks;
    for (a->split = 1;; a->split *= 2) {
        unsigned together = bits ? warps / a->split : 1;
        a->units = 0;
        for (size_t p = 0; p < a->parts; p++) {         // no block has units of two parts at a time
            size_t rows = low ? a->part[p].lora.r : a->part[p].weight.N;
            a->part[p].first = a->units;
            a->units += round_up(ceil_div(rows, bits ? TILE : 1), together);
        }
        blocks = a->units / together;
        if (2 * a->split > warps || 2 * a->split > steps) break;
        if (4 * a->split > steps && blocks >= processors) break;
    }
    a->rounds = round_up(ceil_div(steps, a->split), 2);
    return bits ? min_size(blocks, 2 * processors) : blocks;
}

// Bits of a weight that can be worked on in tiles, else 0.
static unsigned tile_bits(const Device *dev, const Weight *w, const void *x) {
    unsigned bits = w->dtype == DT_NF4 || w->dtype == DT_FP4 ? 4 : w->dtype == DT_BF16 ? 16 : 0;
    bool can = dev->act == DT_BF16 && ((const Gpu *)dev->gpu)->matrix_units && w->K &&
               w->K % (bits == 4 ? QUANT_BLOCK : 8) == 0 && (uintptr_t)x % 16 == 0 &&
               (uintptr_t)w->data % 16 == 0;
    return can ? bits : 0;
}

// linears_forward, or head_logits to `logits`: the products in launches of up to four that one
// kernel takes, in blocks of so many warps. False: not for these kernels.
static bool few_rows(Device *dev, float *logits, const Product *products, size_t n, const void *x,
                     const Batch *batch, unsigned warps) {
    const Gpu *gpu = (const Gpu *)dev->gpu;
    const unsigned threads = WARP * warps;
    if (batch->T > FEW_ROWS) return false;
    for (size_t i = 0; i < n; i++)
        if (has_dropout(&products[i].linear->lora, batch)) return false;
    for (size_t i = 0; i < n && batch->T;) {
        FewRows a = {};
        unsigned bits = tile_bits(dev, &products[i].linear->weight, x);
        a.x = x, a.T = batch->T, a.K = products[i].linear->weight.K, a.wide = logits != NULL;
        for (; i < n && a.parts < MOST_PRODUCTS; i++) {
            const Product *p = &products[i];
            if (tile_bits(dev, &p->linear->weight, x) != bits) break;
            a.part[a.parts++] = {*p->linear, p->u, logits ? logits : p->y, 0};
        }
        unsigned blocks = spread_units(gpu, &a, true, 0, 1);
        FOR_ACT(dev, launch(dev, "few_rows_low", few_rows_plain<Act, true>, blocks, threads, a));
        blocks = spread_units(gpu, &a, false, bits, warps);
        if (bits == 4) launch(dev, "few_rows_tiles", few_rows_tiles<4>, blocks, threads, a);
        else if (bits) launch(dev, "few_rows_tiles", few_rows_tiles<16>, blocks, threads, a);
        else FOR_ACT(dev, launch(dev, "few_rows_plain", few_rows_plain<Act, false>, blocks, WARP,
                                 a));
    }
    return true;
}

// ---------------------------------------------------------------------------------------- sampling
//
// Draws from the softmax as `sample` of qlora.c does: all tokens in one order, best first, equal
// scores by id; top-k, top-p and min-p cut the order's end off; the drawn token is the one at which
// the running sum passes u times the whole. Instead of sorting, "where does the running count, or
// sum, pass this?" is answered as one finds a word in a dictionary: a histogram of the first digit
// tells in which bin the border lies and what comes before; then the second digit of the tokens in
// that bin; and so on, until one token is left. Summed are integers, which give the same in every
// order: exp(score - best) in units of 2^-40. 152 k tokens are wrong by 1e-7 of the best at most.
//
// The first digit is the distance to the best score in 1/64: most tokens agree in sign and exponent
// of their score, and threads would queue. The rest of a key are the 32 bits of the score, ordered,
// and those of the id: 8 digits, of which two or three are needed. One block reads V scores 4 to 7
// times from the cache, 600 KB each at V = 152 k: some 40 us, while an 8B model needs 1100 us for
// the token. Equal scores everywhere cost most: 32 lanes queue.

enum { COARSE = 2048, FINE = 256, SAMPLE_THREADS = 1024 };

// Tokens counted and weighed. Shared memory adds 32 bits in one instruction, not 64.
struct Bin {
    uint32_t count, low, high;
    __device__ __forceinline__ uint64_t mass() const { return (uint64_t)high << 32 | low; }
};

// What the threads of the block know together.
struct Search {
    Bin coarse[COARSE], fine[FINE];             // coarse: of all tokens
    uint64_t counts[WARP], masses[WARP];        // of each warp's bins
    uint64_t target, passed;                    // what is left of it in the bin found; mass before
    uint64_t key;
    uint32_t bin, count, listed;                // found: its number, tokens in it
};

// Smaller is better: the score's bits, brought into order and turned round, then the id. What is
// not a number comes last.
__device__ __forceinline__ uint64_t token_key(float score, size_t id) {
    uint32_t bits = __float_as_uint(score);
    bits = score != score ? 0 : bits >> 31 ? ~bits : bits | 0x80000000;
    return (uint64_t)~bits << 32 | id;
}
__device__ __forceinline__ float key_score(uint64_t key) {
    uint32_t bits = ~(uint32_t)(key >> 32);
    return __uint_as_float(bits >> 31 ? bits & 0x7FFFFFFF : ~bits);
}

// Distance to the best, at most 32, for exp(-32) is nothing in units of 2^-40.
__device__ __forceinline__ float distance(float score, float best) {
    float d = score == best ? 0 : best - score;
    return d < 32 ? d : 32;
}
__device__ __forceinline__ uint64_t token_mass(float d) {
    return (uint64_t)(expf(-d) * 0x1p40f + 0.5f);
}
__device__ __forceinline__ uint32_t coarse_bin(float d) {
    return d < 32 ? (uint32_t)(d * 64) : COARSE - 1;
}

__device__ __forceinline__ void clear_bins(Bin *bins, unsigned n) {
    for (unsigned i = threadIdx.x; i < n; i += blockDim.x) bins[i] = {0, 0, 0};
    __syncthreads();
}
__device__ __forceinline__ void add_to_bin(Bin *bin, uint64_t mass) {
    uint32_t low = (uint32_t)mass, before = atomicAdd(&bin->low, low);
    uint32_t high = (uint32_t)(mass >> 32) + (before + low < before);
    atomicAdd(&bin->count, 1u);
    if (high) atomicAdd(&bin->high, high);
}

// Which of n bins the running total passes s.target in. A thread adds up its bins, then the warps.
__device__ void find_bin(Search &s, const Bin *bins, unsigned n, bool by_count) {
    unsigned each = n / blockDim.x + (n < blockDim.x), first = threadIdx.x * each;
    unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, end = min(first + each, n);
    uint64_t counts = 0, masses = 0, target = s.target;
    for (unsigned i = first; i < end; i++) counts += bins[i].count, masses += bins[i].mass();
    for (unsigned delta = 1; delta < WARP; delta *= 2) {
        uint64_t c = __shfl_up_sync(0xFFFFFFFFu, counts, delta);
        uint64_t m = __shfl_up_sync(0xFFFFFFFFu, masses, delta);
        if (lane >= delta) counts += c, masses += m;
    }
    if (lane == WARP - 1) s.counts[warp] = counts, s.masses[warp] = masses;
    __syncthreads();
    for (unsigned w = 0; w < warp; w++) counts += s.counts[w], masses += s.masses[w];
    for (unsigned i = end; i-- > first;) {              // backwards, from the sums with all of them
        counts -= bins[i].count, masses -= bins[i].mass();
        uint64_t before = by_count ? counts : masses;
        uint64_t value = by_count ? bins[i].count : bins[i].mass();
        if (before <= target && target < before + value)
            s.bin = i, s.count = bins[i].count, s.target = target - before, s.passed += masses;
    }
    __syncthreads();
}

// Key of the token at which the running total of the order passes `target`. *total becomes the mass
// of the tokens up to it, itself included.
__device__ uint64_t find_token(Search &s, uint64_t *total, uint64_t *list, const float *scores,
                               size_t V, float best, uint64_t target, bool by_count) {
    __syncthreads();
    if (threadIdx.x == 0) s.target = target, s.passed = 0, s.listed = 0;
    __syncthreads();
    find_bin(s, s.coarse, COARSE, by_count);
    for (size_t v = threadIdx.x; v < V; v += blockDim.x)
        if (coarse_bin(distance(scores[v], best)) == s.bin)
            list[atomicAdd(&s.listed, 1u)] = token_key(scores[v], v);
    uint64_t prefix = 0, mask = 0;
    for (int shift = 56; s.count > 1; shift -= 8) {
        clear_bins(s.fine, FINE);
        for (uint32_t i = threadIdx.x; i < s.listed; i += blockDim.x)
            if (((list[i] ^ prefix) & mask) == 0)
                add_to_bin(&s.fine[list[i] >> shift & 255],
                           token_mass(distance(key_score(list[i]), best)));
        __syncthreads();
        find_bin(s, s.fine, FINE, by_count);
        prefix |= (uint64_t)s.bin << shift, mask |= (uint64_t)255 << shift;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < s.listed; i += blockDim.x)
        if (((list[i] ^ prefix) & mask) == 0) s.key = list[i];
    __syncthreads();
    *total = s.passed + token_mass(distance(key_score(s.key), best));
    return s.key;
}

// The token drawn with the upper 24 bits of `random`. scores (V), first: the best token's key.
__device__ uint64_t draw_token(Search &s, uint64_t *list, const float *scores, size_t V,
                               uint64_t first, const qlora_sampling &how, uint32_t random) {
    float best = key_score(first);
    uint64_t kept = 0, last = ~(uint64_t)0;
    clear_bins(s.coarse, COARSE);
    for (size_t v = threadIdx.x; v < V; v += blockDim.x) {
        float d = distance(scores[v], best);
        add_to_bin(&s.coarse[coarse_bin(d)], token_mass(d));
        kept += token_mass(d);
    }
    kept = block_sum(kept, s.masses);
    if (how.top_k > 0 && (size_t)how.top_k < V)
        last = find_token(s, &kept, list, scores, V, best, (uint64_t)how.top_k - 1, true);
    if (how.top_p < 1) {                        // the fewest that reach the share, one at least
        double share = ceil((double)how.top_p * (double)kept);
        uint64_t target = share > 1 ? (uint64_t)share - 1 : 0;
        last = find_token(s, &kept, list, scores, V, best, target, false);
    }
    if (how.min_p > 0) {
        kept = 0;
        for (size_t v = threadIdx.x; v < V; v += blockDim.x) {
            uint64_t key = token_key(scores[v], v);
            float d = distance(scores[v], best);
            if (key == first || (key <= last && expf(-d) >= how.min_p)) kept += token_mass(d);
        }
        kept = block_sum(kept, s.masses);
    }
    uint64_t u = random >> 8, target = (kept >> 24) * u + ((kept & 0xFFFFFF) * u >> 24);
    return find_token(s, &kept, list, scores, V, best, target, false);
}

// The token that follows a text: penalty and temperature, then the best one or one that is drawn.
// One block, as all of it is a few reductions. marked (V) is zero before and after.
__global__ void __launch_bounds__(SAMPLE_THREADS)
next_token_block(float *z, size_t V, Sequence q, qlora_sampling how) {
    __shared__ Search s;
    uint64_t *list = (uint64_t *)q.work, best = ~(uint64_t)0;
    uint32_t *marked = (uint32_t *)(list + V), n = *q.n;
    bool penalty = how.repetition_penalty != 1;         // each token seen so far counts once
    for (uint32_t i = threadIdx.x; penalty && i < n; i += blockDim.x) {
        float *seen = &z[q.ids[i]];
        if (atomicExch(&marked[q.ids[i]], 1u) == 0)
            *seen = *seen > 0 ? *seen / how.repetition_penalty : *seen * how.repetition_penalty;
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; penalty && i < n; i += blockDim.x)
        atomicExch(&marked[q.ids[i]], 0u);
    for (size_t v = threadIdx.x; v < V; v += blockDim.x) {
        // + 0: of -0 and 0, which are equal, only 0 is left
        z[v] = (how.temperature > 0 ? z[v] / how.temperature : z[v]) + 0.0f;
        best = min(best, token_key(z[v], v));
    }
    for (int lane = WARP / 2; lane; lane /= 2)
        best = min(best, __shfl_xor_sync(0xFFFFFFFFu, best, lane));
    if (threadIdx.x % WARP == 0) s.masses[threadIdx.x / WARP] = best;
    __syncthreads();
    for (unsigned w = 0; w < blockDim.x / WARP; w++) best = min(best, s.masses[w]);
    if (how.temperature > 0)
        best = draw_token(s, list, z, V, best, how,
                          random_u32(how.seed, RANDOM_SAMPLE, 0, n - q.prompt));
    __syncthreads();
    if (threadIdx.x == 0) {
        q.ids[n] = *q.id = (int32_t)(uint32_t)best;
        *q.n = n + 1, *q.position += 1, q.span->nk += 1;
    }
}

static void sample(Device *dev, real *logits, const Sequence *s, size_t V, unsigned threads) {
    Sequence there = *s;
    there.how = NULL;                                   // the host's
    launch(dev, "next_token_block", next_token_block, 1, threads, logits, V, there, *s->how);
}

static void next_token(Device *dev, real *logits, const Sequence *s, size_t V) {
    sample(dev, logits, s, V, SAMPLE_THREADS);
}

// ---------------------------------------------------------------------------------- recorded steps
//
// A step of decoding is some 300 small kernels, the same every time. Recorded as a graph they are
// asked for by one call, and the GPU starts one after the other without the host.

static void replay(Device *dev, void **record, void (*step)(void *user), void *user) {
    Gpu *gpu = (Gpu *)dev->gpu;
    const char *what = "recording a step";
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = (cudaGraphExec_t)*record;
    if (unusable(gpu)) return;
    if (!exec) {
        // Relaxed: the first launch of a kernel may have to load it.
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
        if (cuda_failed(gpu, cudaStreamBeginCapture(gpu->stream, mode), what)) return;
        gpu->recording = true;
        step(user);
        gpu->recording = false;
        try_cuda(gpu, cudaStreamEndCapture(gpu->stream, &graph), what);
        if (!gpu->failed && !cuda_failed(gpu, cudaGraphInstantiate(&exec, graph, 0), what))
            *record = exec;
        if (graph) try_cuda(gpu, cudaGraphDestroy(graph), what);
        if (gpu->failed) return;
    }
    try_cuda(gpu, cudaGraphLaunch(exec, gpu->stream), "replaying a step");
}

// Also when something has failed: a record is never left behind.
static void forget(Device *dev, void *record) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (!record) return;
    (void)wait_failed(gpu, gpu->stream);
    try_cuda(gpu, cudaGraphExecDestroy((cudaGraphExec_t)record), "forgetting a step");
}

// =================================================================================================
//  9. The op table
// =================================================================================================

static void gpu_scratch(Device *dev, const OpSizes *sizes) {
    size_t bytes = max_size(linear_scratch(dev, sizes), attention_scratch(sizes));
    dev->scratch_size = round_up(bytes, 256) + panels_scratch(dev, sizes);
    dev->thread_size = 0;
}

static const Ops gpu_ops = {
    /* host */ false, gpu_allocate, gpu_release, gpu_available, gpu_upload, gpu_download, gpu_zero,
    gpu_check, gpu_scratch, quantize, quantize_scales, low_rank, prefetch, embed,
    residual_norm_forward, residual_norm_backward, linears_forward, linears_backward, rope,
    append_keys, attention_forward, attention_backward, swiglu_forward, swiglu_backward, gather,
    scatter, head_logits, head_backward, cross_entropy_forward, cross_entropy_end,
    cross_entropy_backward, round_rows, clip_gradient, adamw, next_token, replay, forget};

// ---------------------------------------------------------------------------------------- opening

// Where libcublas may lie: where the system looks, then where the CUDA Toolkit puts it.
static void *find_blas() {
    static const char *const names[] = {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11",
                                        "libcublas.so"};
    const char *home = getenv("CUDA_HOME");
    const char *folders[] = {NULL, home && *home ? home : "/usr/local/cuda", "/usr/local/cuda"};
    char path[4096];
    for (const char *folder : folders)
        for (const char *name : names) {
            snprintf(path, sizeof path, "%s%s%s", folder ? folder : "", folder ? "/lib64/" : "",
                     name);
            if (void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL)) return library;
        }
    return NULL;
}

// dlsym's object pointer as the function it is.
template <typename F> static bool find_function(F *function, void *library, const char *name) {
    void *symbol = dlsym(library, name);
    memcpy(function, &symbol, sizeof symbol);
    return symbol != NULL;
}

static int open_blas(Gpu *gpu, qlora_error *err) {
    Blas *b = &gpu->blas;
    b->library = find_blas();
    if (!b->library)
        return open_fail(err, "GPU: cuBLAS (libcublas.so.13, .12 or .11) was not found; install "
                              "the CUDA Toolkit or its package libcublas, or set CUDA_HOME or "
                              "LD_LIBRARY_PATH to where it lies");
    if (!find_function(&b->create, b->library, "cublasCreate_v2") ||
        !find_function(&b->destroy, b->library, "cublasDestroy_v2") ||
        !find_function(&b->set_stream, b->library, "cublasSetStream_v2") ||
        !find_function(&b->set_workspace, b->library, "cublasSetWorkspace_v2") ||
        !find_function(&b->set_math, b->library, "cublasSetMathMode") ||
        !find_function(&b->gemm, b->library, "cublasGemmEx"))
        return open_fail(err, "GPU: libcublas lacks a function of CUDA 11; install a newer one");
    if (b->create(&gpu->handle) != CUBLAS_STATUS_SUCCESS) {
        gpu->handle = NULL;
        return open_fail(err, "GPU: cuBLAS did not start; is its version too new for the driver?");
    }
    // Sums of a product that is split are joined in float32 too. Setting the stream resets the
    // workspace, so that comes after it.
    if (b->set_stream(gpu->handle, gpu->stream) != CUBLAS_STATUS_SUCCESS ||
        b->set_workspace(gpu->handle, gpu->workspace, BLAS_BYTES) != CUBLAS_STATUS_SUCCESS ||
        b->set_math(gpu->handle, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION) !=
            CUBLAS_STATUS_SUCCESS)
        return open_fail(err, "GPU: cuBLAS refused its stream or its memory");
    return 0;
}

// The first kernel: fails when this program holds no code for the card.
__global__ void probe_kernel(double *sum) { *sum = 0; }

// The events of a Gpu: those of uploads, then those of panels.
enum { EVENTS = STAGING_PIECES + 4 };
static cudaEvent_t *event(Gpu *gpu, int i) {
    if (i < STAGING_PIECES) return &gpu->copied[i];
    Panel *p = &gpu->panels[(i - STAGING_PIECES) / 2];
    return i % 2 ? &p->ready : &p->unused;
}

// Everything a Gpu owns. gpu->failed tells what went wrong.
static void open_resources(Gpu *gpu) {
    const char *what = "opening the GPU";
    for (cudaStream_t *stream : {&gpu->stream, &gpu->side})
        if (cuda_failed(gpu, cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), what))
            return;
    for (int i = 0; i < EVENTS; i++)
        if (cuda_failed(gpu, cudaEventCreateWithFlags(event(gpu, i), cudaEventDisableTiming), what))
            return;
    size_t staging = (size_t)STAGING_PIECES * STAGING_BYTES;
    if (cuda_failed(gpu, cudaHostAlloc((void **)&gpu->staging, staging, cudaHostAllocDefault),
                    "pinned memory") ||
        cuda_failed(gpu, device_memory(&gpu->workspace, BLAS_BYTES), "memory for cuBLAS") ||
        cuda_failed(gpu, device_memory((void **)&gpu->sums, (SUMS + 1) * sizeof(double)), what))
        return;
    size_t widened = gpu->matrix_units ? 0 : 3 * (size_t)WIDENED * sizeof(float);
    if (widened && cuda_failed(gpu, device_memory((void **)&gpu->widened, widened), what)) return;
    probe_kernel<<<1, 1, 0, gpu->stream>>>(gpu->sums);
    cudaError_t error = cudaGetLastError();
    if (error == cudaErrorNoKernelImageForDevice)
        gpu_fail(gpu, "this program was built for other cards than this one, of compute capability "
                 "%d.%d; build it again with GPU_ARCH=%d%d", gpu->major, gpu->minor, gpu->major,
                 gpu->minor);
    if (!cuda_failed(gpu, error, what))
        try_cuda(gpu, cudaStreamSynchronize(gpu->stream), what);
}

// Also of one that was opened halfway, or has failed since; then nothing can be said about errors.
static void close_resources(Gpu *gpu) {
    (void)cudaSetDevice(gpu->number);
    if (gpu->side) (void)cudaStreamSynchronize(gpu->side);
    if (gpu->stream) (void)cudaStreamSynchronize(gpu->stream);
    if (gpu->handle) (void)gpu->blas.destroy(gpu->handle);
    if (gpu->blas.library) dlclose(gpu->blas.library);
    void *memory[] = {gpu->workspace, gpu->sums, gpu->widened};
    for (void *m : memory)
        if (m) (void)cudaFree(m);
    if (gpu->staging) (void)cudaFreeHost(gpu->staging);
    for (int i = 0; i < EVENTS; i++)
        if (*event(gpu, i)) (void)cudaEventDestroy(*event(gpu, i));
    if (gpu->side) (void)cudaStreamDestroy(gpu->side);
    if (gpu->stream) (void)cudaStreamDestroy(gpu->stream);
    (void)cudaGetLastError();
}

// Whether there is a card of that number; fast when there is no driver.
static int find_card(int number, cudaDeviceProp *card, qlora_error *err) {
    int cards = 0, driver = 0, runtime = 0;
    cudaError_t error = cudaGetDeviceCount(&cards);
    if (error != cudaSuccess) {
        (void)cudaGetLastError();
        (void)cudaDriverGetVersion(&driver);
        (void)cudaRuntimeGetVersion(&runtime);
        if (error == cudaErrorNoDevice) return open_fail(err, "no NVIDIA GPU was found");
        if (error == cudaErrorInsufficientDriver && driver)
            return open_fail(err, "the NVIDIA driver is too old: it knows CUDA %d.%d, this program "
                             "needs %d.%d", driver / 1000, driver % 1000 / 10, runtime / 1000,
                             runtime % 1000 / 10);
        if (error == cudaErrorInsufficientDriver)
            return open_fail(err, "no NVIDIA driver is installed");
        return open_fail(err, "no GPU: %s", cudaGetErrorString(error));
    }
    if (number < 0 || number >= cards)
        return open_fail(err, "GPU %d: not there; this machine has %d, counted from 0", number,
                         cards);
    error = cudaSetDevice(number);
    if (error == cudaSuccess) error = cudaGetDeviceProperties(card, number);
    if (error == cudaSuccess) return 0;
    (void)cudaGetLastError();
    return open_fail(err, "GPU %d: %s", number, cudaGetErrorString(error));
}

int qlora_cuda_open(Device *dev, int number, qlora_compute compute, char *name, size_t size,
                    qlora_error *err) {
    cudaDeviceProp card = {};
    if (find_card(number, &card, err)) return -1;
    if (card.major < 7 || (card.major == 7 && card.minor < 5))
        return open_fail(err, "GPU %d: %s has compute capability %d.%d; 7.5 or newer is needed",
                         number, card.name, card.major, card.minor);
    Gpu *gpu = (Gpu *)dev->allocator->allocate(dev->allocator->user, sizeof *gpu);
    if (!gpu) return open_fail(err, "out of memory: %zu bytes were refused", sizeof *gpu);
    memset(gpu, 0, sizeof *gpu);
    gpu->allocator = dev->allocator;
    gpu->number = number;
    gpu->major = card.major;
    gpu->minor = card.minor;
    gpu->processors = card.multiProcessorCount;
    gpu->matrix_units = card.major >= 8;
    open_resources(gpu);
    int bad = gpu->failed ? open_fail(err, "GPU %d: %s", number, gpu->message)
                          : open_blas(gpu, err);
    if (bad) {
        close_resources(gpu);
        dev->allocator->release(dev->allocator->user, gpu, sizeof *gpu);
        return -1;
    }
    snprintf(name, size, "%s", card.name);
    dev->ops = &gpu_ops;
    dev->act = compute == QLORA_COMPUTE_F32 ? DT_REAL : DT_BF16;
    dev->gpu = gpu;
    return 0;
}

void qlora_cuda_close(Device *dev) {
    Gpu *gpu = (Gpu *)dev->gpu;
    if (!gpu) return;
    const qlora_allocator *allocator = gpu->allocator;
    close_resources(gpu);
    allocator->release(allocator->user, gpu, sizeof *gpu);
    dev->gpu = NULL;
}
