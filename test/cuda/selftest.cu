// selftest.cu: tests the net. Every row of the table at the end is a small kernel, or some host
// code, that is right, and for most a seeded bug that turns it wrong. The right one must raise no
// alarm in any mode and give the same bits in all; the wrong one must be caught by the modes that
// the row names, and for the reason it names.
//
//     build/selftest            all rows that this build can run; exit status 1 if any fails
//     build/selftest --list     the table
//     build/selftest NAME [bug] one row, right or wrong, with the options in CUDA_EMULATOR
//
// Three builds together know all the tricks: plain, -fsanitize=address,undefined and
// -fsanitize=thread. nvcc compiles this file too; on a GPU it runs the right versions.
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

// ------------------------------------------------------------------- instructions, as in qlora.cu

static __device__ __forceinline__ void mma16816(float d[4], const uint32_t a[4],
                                                const uint32_t b[2], const float c[4]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]),
                   "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
    emulated_mma_m16n8k16_bf16(d, a, b, c);
#endif
}

static __device__ __forceinline__ void ldmatrix_x4(uint32_t r[4], const void *row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
#else
    emulated_ldmatrix_x4(r, row);
#endif
}

static __device__ __forceinline__ void ldmatrix_x2_trans(uint32_t r[2], const void *row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"((uint32_t)__cvta_generic_to_shared(row)) : "memory");
#else
    emulated_ldmatrix_x2_trans(r, row);
#endif
}

static __device__ __forceinline__ void cp_async16(void *to, const void *from, int bytes) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes) : "memory");
#else
    emulated_cp_async16(to, from, bytes);
#endif
}

static __device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulated_cp_async_commit();
#endif
}

template <int N> static __device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
#else
    emulated_cp_async_wait(N);
#endif
}

// --------------------------------------------------------------------------------------- the tools

static bool wrong;              // a result was not what it should be
static uint64_t hash = 14695981039346656037u;           // of all results: equal in every mode

static void expect(double got, double want, const char *what, size_t i) {
    if (got == want) return;    // NaN is never equal
    if (!wrong) fprintf(stderr, "wrong result: %s[%zu] is %g, not %g\n", what, i, got, want);
    wrong = true;
}
#define EXPECT(condition) do { \
        if (!(condition)) wrong = true, fprintf(stderr, "wrong result: not %s\n", #condition); \
    } while (0)
#define OK(call) EXPECT((call) == 0)

// n values on the device, exactly; the host sees them through download().
template <class T> struct Array {
    T *p = nullptr;
    size_t n;

    explicit Array(size_t count) : n(count) { OK(cudaMalloc(&p, n * sizeof(T))); }
    Array(size_t count, T (*value)(size_t)) : Array(count) {
        std::vector<T> host(n);
        for (size_t i = 0; i < n; i++) host[i] = value(i);
        OK(cudaMemcpy(p, host.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~Array() { OK(cudaFree(p)); }
    Array(const Array &) = delete;
    Array &operator=(const Array &) = delete;

    std::vector<T> download() const {
        std::vector<T> host(n);
        OK(cudaPeekAtLastError());
        OK(cudaMemcpy(host.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < n * sizeof(T); i++)
            hash = (hash ^ ((unsigned char *)host.data())[i]) * 1099511628211u;
        return host;
    }
    void expect_all(double (*want)(size_t)) const {
        std::vector<T> host = download();
        for (size_t i = 0; i < n; i++) expect((double)host[i], want(i), "output", i);
    }
};
static float one_more(size_t i) { return (float)i + 1; }

// =================================================================================================
//  Barriers
// =================================================================================================

// y[i] = x of the opposite thread, exchanged through shared memory.
__global__ void reverse(float *y, const float *x, bool bug) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    tile[i] = x[i];
    if (!bug) __syncthreads();
    y[i] = tile[63 - i];
}
static void missing_syncthreads(bool bug) {
    Array<float> x(64, one_more), y(64);
    reverse<<<1, 64>>>(y.p, x.p, bug);
    y.expect_all([](size_t i) { return 64.0 - (double)i; });
}

// Sums 4 tiles, each through the same shared array: the second barrier keeps a fast warp from
// overwriting what a slow one still reads.
__global__ void sum_tiles(float *y, const float *x, bool bug) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    float sum = 0;
    for (int step = 0; step < 4; step++) {
        tile[i] = x[64 * step + i];
        __syncthreads();
        sum += tile[63 - i];
        if (!bug) __syncthreads();
    }
    y[i] = sum;
}
static void missing_second_barrier(bool bug) {
    Array<float> x(256, one_more), y(64);
    sum_tiles<<<1, 64>>>(y.p, x.p, bug);
    y.expect_all([](size_t i) { return 4.0 * (64 - (double)i) + 64 * 6; });
}

__global__ void barriers(float *y, int kind) {
    int i = threadIdx.x;
    if (kind == 0) __syncthreads();
    if (kind == 1 && i < 32) __syncthreads();           // some threads never come
    if (kind == 2 && i == 5) return;                    // one has left
    if (kind == 2) __syncthreads();
    if (kind == 3) {
        if (i < 32) __syncthreads();                    // two places, one barrier each
        else __syncthreads();
    }
    if (kind == 4) {
        if (i < 40) __syncthreads();                    // a warp waits for itself in two places
        else __shfl_sync(0xFFFFFFFFu, i, 0);
    }
    y[i] = 1;
}
static void run_barriers(int kind) {
    Array<float> y(64);
    barriers<<<1, 64>>>(y.p, kind);
    y.expect_all([](size_t) { return 1.0; });
}
static void divergent_barrier(bool bug) { run_barriers(bug ? 1 : 0); }
static void return_before_barrier(bool bug) { run_barriers(bug ? 2 : 0); }
static void two_barriers(bool bug) { run_barriers(bug ? 3 : 0); }
static void deadlock(bool bug) { run_barriers(bug ? 4 : 0); }

__global__ void vote_in_block(int *y) {
    int i = threadIdx.x;
    int n = __syncthreads_count(i % 3 == 0);
    int any = __syncthreads_or(i == 70), all = __syncthreads_and(i);
    y[i] = 100 * n + 10 * any + all;
}
static void block_votes(bool) {
    Array<int> y(96);
    vote_in_block<<<1, 96>>>(y.p);
    y.expect_all([](size_t) { return 3210.0; });
}

// Waits for a value that a thread of the same block has yet to write. The GPU hangs as well.
__global__ void spin(unsigned *flag, bool bug) {
    if (bug && threadIdx.x == 0)
        while (*(volatile unsigned *)flag != 1) {}
    if (threadIdx.x == 1) *flag = 1;
}
static void endless_loop(bool bug) {
    Array<unsigned> flag(1);
    spin<<<1, 32>>>(flag.p, bug);
    flag.expect_all([](size_t) { return 1.0; });
}

// =================================================================================================
//  Warps
// =================================================================================================

__global__ void swap_in_warp(float *y, const float *x, bool bug) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    tile[i] = x[i];
    if (!bug) __syncwarp();
    y[i] = tile[i ^ 31];
}
static void missing_syncwarp(bool bug) {
    Array<float> x(64, one_more), y(64);
    swap_in_warp<<<1, 64>>>(y.p, x.p, bug);
    y.expect_all([](size_t i) { return (double)((i ^ 31) + 1); });
}

// A shuffle makes the lanes meet but orders no memory: right by luck on every machine so far.
__global__ void shuffle_as_fence(float *y, const float *x, bool bug) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    tile[i] = x[i];
    float zero = __shfl_sync(0xFFFFFFFFu, 0.0f, 0);
    if (!bug) __syncwarp();
    y[i] = tile[i ^ 31] + zero;
}
static void shuffle_instead_of_syncwarp(bool bug) {
    Array<float> x(64, one_more), y(64);
    shuffle_as_fence<<<1, 64>>>(y.p, x.p, bug);
    y.expect_all([](size_t i) { return (double)((i ^ 31) + 1); });
}

__global__ void shuffles(int *y, int kind) {
    int i = threadIdx.x, got = i;
    unsigned all = 0xFFFFFFFFu, half = 0xFFFFu;
    if (kind == 0) got = __shfl_xor_sync(all, i, 1);
    if (kind == 1) got = __shfl_xor_sync(half, i, 1);   // lanes 16-31 call it too
    if (kind == 2 && i < 16) got = __shfl_sync(half, i, 20);
    if (kind == 3) got = __shfl_xor_sync(i < 16 ? all : ~1u, i, 1);
    if (kind == 4) {
        if (i < 16) got = __shfl_xor_sync(all, i, 1);   // one meeting, two places
        else got = __shfl_xor_sync(all, i, 1);
    }
    if (kind == 5 && i < 31) got = __shfl_xor_sync(all, i, 1);      // lane 31 never comes
    y[i] = got;
}
static void run_shuffles(int kind) {
    Array<int> y(32);
    shuffles<<<1, 32>>>(y.p, kind);
    y.expect_all([](size_t i) { return (double)(i ^ 1); });
}
static void lane_outside_mask(bool bug) { run_shuffles(bug ? 1 : 0); }
static void shuffle_from_outside(bool bug) { run_shuffles(bug ? 2 : 0); }
static void lanes_disagree(bool bug) { run_shuffles(bug ? 3 : 0); }
static void divergent_shuffle(bool bug) { run_shuffles(bug ? 4 : 0); }
static void lane_missing(bool bug) { run_shuffles(bug ? 5 : 0); }

// Every kind of shuffle and vote with its corner cases.
__global__ void shuffle_table(int *y) {
    int i = threadIdx.x;
    unsigned all = 0xFFFFFFFFu;
    int *row = y + 12 * i;
    row[0] = __shfl_sync(all, i, 40);                   // lane 40 & 31
    row[1] = __shfl_sync(all, i, 3, 8);                 // lane 3 of the own eight
    row[2] = __shfl_up_sync(all, i, 2);
    row[3] = __shfl_up_sync(all, i, 3, 16);
    row[4] = __shfl_down_sync(all, i, 2);
    row[5] = __shfl_down_sync(all, i, 3, 16);
    row[6] = __shfl_xor_sync(all, i, 5);
    row[7] = __shfl_xor_sync(all, i, 12, 8);            // beyond the segment, where not before it
    row[8] = (int)(__ballot_sync(all, i % 4 == 1) == 0x22222222u);
    row[9] = __any_sync(all, i == 31) + 2 * __all_sync(all, i < 31) + 4 * __any_sync(all, 0);
    row[10] = (int)__shfl_xor_sync(all, (double)i, 16);
    row[11] = (int)(__shfl_xor_sync(all, (unsigned long long)i << 40, 8) >> 40);
}
static double shuffle_table_expected(size_t place) {
    int i = (int)(place / 12), up16 = i % 16 < 3 ? i : i - 3, down16 = i % 16 > 12 ? i : i + 3;
    int beyond = (i ^ 12) <= (i | 7) ? i ^ 12 : i;
    int row[12] = {8, i / 8 * 8 + 3, i < 2 ? i : i - 2, up16, i > 29 ? i : i + 2, down16, i ^ 5,
                   beyond, 1, 1, i ^ 16, i ^ 8};
    return row[place % 12];
}
static void shuffle_semantics(bool) {
    Array<int> y(32 * 12);
    shuffle_table<<<1, 32>>>(y.p);
    y.expect_all(shuffle_table_expected);
}

// =================================================================================================
//  Memory
// =================================================================================================

__global__ void global_bounds(float *y, const float *x, int n, int kind) {
    int i = threadIdx.x;
    float more = 0;
    if (kind == 1 && i == 0) y[n] = 7;                                  // one past the end
    if (kind == 2 && i == 0) more = x[n] > 1e30f ? 1 : 0;               // read, and no use of it
    if (kind == 3 && i == 0) y[n + 2000] = 7;                           // far away
    if (kind == 4 && i == 0) y[-1] = 7;
    if (i < n) y[i] = x[i] + more;
}
static void run_global_bounds(int kind) {
    Array<float> x(50, one_more), y(50);
    global_bounds<<<1, 64>>>(y.p, x.p, 50, kind);
    y.expect_all([](size_t i) { return (double)i + 1; });
}
static void global_write_past_end(bool bug) { run_global_bounds(bug ? 1 : 0); }
static void global_read_past_end(bool bug) { run_global_bounds(bug ? 2 : 0); }
static void global_write_far(bool bug) { run_global_bounds(bug ? 3 : 0); }
static void global_write_before(bool bug) { run_global_bounds(bug ? 4 : 0); }

__global__ void shared_bounds(float *y, const float *x, int kind) {
    __shared__ float a[32];
    __shared__ float b[32];
    float *to = a;              // through pointers, so that no compiler sees it coming
    const float *from = b;
    int i = threadIdx.x;
    float more = 0;
    a[i] = x[i], b[i] = x[i];
    if (kind == 1 && i == 0) to[31 + kind] = 7;
    if (kind == 2 && i == 0) more = from[1 - kind] > 1e30f ? 1 : 0;
    __syncthreads();
    y[i] = a[i ^ 1] + b[i ^ 1] + more;
}
static void run_shared_bounds(int kind) {
    Array<float> x(32, one_more), y(32);
    shared_bounds<<<1, 32>>>(y.p, x.p, kind);
    y.expect_all([](size_t i) { return 2.0 * (double)((i ^ 1) + 1); });
}
static void shared_write_past_end(bool bug) { run_shared_bounds(bug ? 1 : 0); }
static void shared_read_before(bool bug) { run_shared_bounds(bug ? 2 : 0); }

__global__ void unwritten(float *y, const float *x, int n, int kind) {
    __shared__ float tile[64];
    int i = threadIdx.x;
    if (kind != 1 || i < n) tile[i] = i < n ? x[i] : 0;
    __syncthreads();
    float sum = kind == 2 ? y[i] : 0;
    for (int j = 0; j < 64; j++) sum += tile[j];
    y[i] = sum;
}
static void run_unwritten(int kind) {
    Array<float> x(50, one_more), y(64);
    unwritten<<<1, 64>>>(y.p, x.p, 50, kind);
    y.expect_all([](size_t) { return 50 * 51 / 2.0; });
}
static void shared_not_written(bool bug) { run_unwritten(bug ? 1 : 0); }
static void global_not_written(bool bug) { run_unwritten(bug ? 2 : 0); }

struct Pair { const float *a; int n; };
__global__ void add_pair(float *y, Pair pair) {
    if ((int)threadIdx.x < pair.n) y[threadIdx.x] = pair.a[threadIdx.x] + 1;
}
__global__ void add_one(float *y, const float *x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i] + 1;
}
static void host_pointer(bool bug) {
    Array<float> x(32, one_more), y(32);
    std::vector<float> host = x.download();
    add_one<<<1, 32>>>(y.p, bug ? host.data() : x.p, 32);
    y.expect_all([](size_t i) { return (double)i + 2; });
}
static void host_pointer_in_struct(bool bug) {
    Array<float> x(32, one_more), y(32);
    std::vector<float> host = x.download();
    Pair pair = {bug ? host.data() : x.p, 32};
    add_pair<<<1, 32>>>(y.p, pair);
    y.expect_all([](size_t i) { return (double)i + 2; });
}
static void freed_memory(bool bug) {
    Array<float> y(32);
    float *x = nullptr;
    OK(cudaMalloc((void **)&x, 32 * sizeof *x));
    OK(cudaMemset(x, 0, 32 * sizeof *x));
    if (bug) OK(cudaFree(x));
    add_one<<<1, 32>>>(y.p, x, 32);
    y.expect_all([](size_t) { return 1.0; });
    if (!bug) OK(cudaFree(x));
}

// A row of 4 floats that is read as one vector must be aligned like one.
__global__ void read_vector(float *y) {
    __shared__ __align__(16) float first;
    __shared__ float loose[8];
    __shared__ __align__(16) float aligned[8];
    int i = threadIdx.x;
    if (i < 8) loose[i] = aligned[i] = 1;
    if (i == 8) first = 1;
    __syncthreads();
    float4 v = *(const float4 *)(y[i] == 2 ? loose : aligned);
    y[i] = v.x + v.y + v.z + v.w + first;
}
static void misaligned_vector(bool bug) {
    Array<float> y(32, bug ? +[](size_t) { return 2.0f; } : +[](size_t) { return 1.0f; });
    read_vector<<<1, 32>>>(y.p);
    y.expect_all([](size_t) { return 5.0; });
}

// =================================================================================================
//  Asynchronous copies and matrices
// =================================================================================================

// Copies rows of 4 floats to shared memory, two groups in flight; the second is half as long.
__global__ void async_copy(float *y, const float *x, int kind) {
    __shared__ __align__(16) float tile[2][4 * 32];
    int i = threadIdx.x, neighbour = i ^ 31;
    cp_async16(&tile[0][4 * i], x + 4 * i, 16);
    cp_async_commit();
    cp_async16(&tile[1][4 * i], x + 128 + 4 * i, 8);
    cp_async_commit();
    if (kind == 3) cp_async_wait<2>();
    else cp_async_wait<1>();
    if (kind != 1) __syncthreads();
    y[i] = tile[0][4 * neighbour + 2];
    if (kind != 2) cp_async_wait<0>();
    __syncthreads();
    y[32 + i] = tile[1][4 * neighbour + 1];
    y[64 + i] = tile[1][4 * neighbour + 2];
}
static double async_copy_expected(size_t i) {
    size_t neighbour = (i & 31) ^ 31;
    return i < 32 ? (double)(4 * neighbour + 3) : i < 64 ? (double)(128 + 4 * neighbour + 2) : 0;
}
static void run_async_copy(int kind) {
    Array<float> x(256, one_more), y(96);
    async_copy<<<1, 32>>>(y.p, x.p, kind);
    y.expect_all(async_copy_expected);
}
static void async_copy_without_barrier(bool bug) { run_async_copy(bug ? 1 : 0); }
static void async_copy_without_wait(bool bug) { run_async_copy(bug ? 2 : 0); }
static void async_copy_one_group_short(bool bug) { run_async_copy(bug ? 3 : 0); }

__global__ void async_misuse(const float *x, int kind) {
    __shared__ __align__(16) float tile[8];
    if (kind == 0) cp_async16(tile, x, 16);
    if (kind == 1) cp_async16(tile, x + 1, 16);                         // misaligned
    if (kind == 2) cp_async16(tile, x + 24, 16);                        // ends beyond the buffer
    if (kind == 3) cp_async16(tile + 8, x, 16);                         // beyond the shared array
    cp_async_commit();
    cp_async_wait<0>();
}
static void run_async_misuse(int kind) {
    Array<float> x(26, one_more);
    async_misuse<<<1, 1>>>(x.p, kind);
    OK(cudaPeekAtLastError());
    OK(cudaDeviceSynchronize());
}
static void async_copy_misaligned(bool bug) { run_async_misuse(bug ? 1 : 0); }
static void async_copy_past_buffer(bool bug) { run_async_misuse(bug ? 2 : 0); }
static void async_copy_past_shared(bool bug) { run_async_misuse(bug ? 3 : 0); }

// C (16, 8) = A (16, 16) B (16, 8) by one warp: A through ldmatrix, B through its transposing form.
__global__ void multiply(float *C, const __nv_bfloat16 *A, const __nv_bfloat16 *B, int kind) {
    __shared__ __align__(16) __nv_bfloat16 a[16][24];           // rows of 48 bytes
    __shared__ __align__(16) __nv_bfloat16 b[16][8];
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) a[i / 16][i % 16] = A[i];
    for (int i = lane; i < 128; i += 32) b[i / 8][i % 8] = B[i];
    __syncthreads();
    uint32_t fa[4], fb[2];
    float zero[4] = {}, c[4];
    const __nv_bfloat16 *row = &a[lane % 16][lane / 16 * 8];
    ldmatrix_x4(fa, kind == 1 ? row + 1 : kind == 2 ? A : row);
    ldmatrix_x2_trans(fb, &b[lane % 16][0]);
    mma16816(c, fa, fb, zero);
    int g = lane / 4, t = lane % 4;
    C[8 * g + 2 * t] = c[0], C[8 * g + 2 * t + 1] = c[1];
    C[8 * (g + 8) + 2 * t] = c[2], C[8 * (g + 8) + 2 * t + 1] = c[3];
}
static float a_value(size_t i) { return (float)((int)(i * 7 % 23) - 11); }
static float b_value(size_t i) { return (float)((int)(i * 5 % 19) - 9) / 4; }
static double product(size_t place) {
    double sum = 0;
    for (size_t k = 0; k < 16; k++) sum += a_value(place / 8 * 16 + k) * b_value(8 * k + place % 8);
    return sum;
}
__global__ void to_bf16(__nv_bfloat16 *y, const float *x, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = __float2bfloat16(x[i]);
}
static void run_multiply(int kind) {
    Array<float> af(256, a_value), bf(128, b_value), C(128);
    Array<__nv_bfloat16> A(256), B(128);
    to_bf16<<<4, 64>>>(A.p, af.p, 256);
    to_bf16<<<2, 64>>>(B.p, bf.p, 128);
    multiply<<<1, 32>>>(C.p, A.p, B.p, kind);
    C.expect_all(product);
}
static void matrix_row_misaligned(bool bug) { run_multiply(bug ? 1 : 0); }
static void matrix_row_not_shared(bool bug) { run_multiply(bug ? 2 : 0); }

// =================================================================================================
//  Races that give the right result here, whatever the order
// =================================================================================================

__global__ void count(unsigned *n, bool bug) {
    if (bug) n[0] = n[0] + 1;
    else atomicAdd(&n[0], 1u);
}
static void lost_update(bool bug) {
    Array<unsigned> n(1, [](size_t) { return 0u; });
    count<<<1, 64>>>(n.p, bug);
    n.expect_all([](size_t) { return 64.0; });
}

// Barriers order the threads of a block, never two blocks.
__global__ void count_blocks(unsigned *n, bool bug) {
    __syncthreads();
    if (threadIdx.x == 0 && bug) n[0] = n[0] + 1;
    if (threadIdx.x == 0 && !bug) atomicAdd(&n[0], 1u);
    __syncthreads();
}
static void race_between_blocks(bool bug) {
    Array<unsigned> n(1, [](size_t) { return 0u; });
    count_blocks<<<3, 32>>>(n.p, bug);
    n.expect_all([](size_t) { return 3.0; });
}

__global__ void carry(float *y, bool bug) {
    if (threadIdx.x) return;
    int b = blockIdx.x;
    y[b] = bug && b ? y[b - 1] + 1 : (float)b;
}
static void block_needs_earlier_block(bool bug) {
    Array<float> y(4);
    carry<<<4, 32>>>(y.p, bug);
    y.expect_all([](size_t i) { return (double)i; });
}

// The first warp writes, the second reads: a barrier, or nothing but the usual order of warps.
__global__ void hand_over(float *y, bool bug) {
    __shared__ float box;
    if (threadIdx.x == 0) box = 3;
    if (!bug) __syncthreads();
    if (threadIdx.x == 32) y[0] = box;
}
static void race_between_warps(bool bug) {
    Array<float> y(1);
    hand_over<<<1, 64>>>(y.p, bug);
    y.expect_all([](size_t) { return 3.0; });
}

__global__ void atomics(unsigned *u, int *s, unsigned long long *w) {
    unsigned i = threadIdx.x;
    atomicAdd(&u[0], i), atomicMax(&u[1], i), atomicMin(&u[2], i + 5);
    atomicOr(&u[3], 1u << i % 32);
    atomicAdd(&s[0], -(int)i), atomicMax(&s[1], -(int)i), atomicMin(&s[2], -(int)i);
    atomicAdd(w, (unsigned long long)i << 33);
    for (unsigned old = 0, seen = 1; old != seen;)      // 64 increments by compare and swap
        seen = old, old = atomicCAS(&u[4], seen, seen + 1);
}
static void atomic_semantics(bool) {
    Array<unsigned> u(5, [](size_t i) { return i == 2 ? 1000u : 0u; });
    Array<int> s(3, [](size_t i) { return i == 1 ? -9 : 0; });
    Array<unsigned long long> w(1, [](size_t) { return 0ull; });
    atomics<<<1, 64>>>(u.p, s.p, w.p);
    u.expect_all([](size_t i) { double want[] = {2016, 63, 5, 4294967295.0, 64}; return want[i]; });
    s.expect_all([](size_t i) { double want[] = {-2016, 0, -63}; return want[i]; });
    w.expect_all([](size_t) { return 2016.0 * 8589934592.0; });
}

// =================================================================================================
//  Launches and other calls
// =================================================================================================

__global__ void dynamic_sum(float *y, int n) {
    extern __shared__ __align__(16) unsigned char shared_memory[];
    float *tile = (float *)shared_memory;
    for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = 1;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < n; i += 500) sum += tile[i];
    if (threadIdx.x == 0) *y = sum;
}
static void too_much_shared(bool bug) {
    Array<float> y(1);
    int bytes = 60000;
    if (!bug)
        OK(cudaFuncSetAttribute(dynamic_sum, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    dynamic_sum<<<1, 32, bytes>>>(y.p, bytes / 4);
    if (!bug) y.expect_all([](size_t) { return 30.0; });
}
static void dynamic_past_end(bool bug) {
    Array<float> y(1);
    dynamic_sum<<<1, 32, 8000>>>(y.p, bug ? 2001 : 2000);
    y.expect_all([](size_t) { return 4.0; });
}
static void too_many_threads(bool bug) {
    Array<float> x(32, one_more), y(32);
    add_one<<<1, bug ? 2048 : 1024>>>(y.p, x.p, 32);
}

static void leak(bool bug) {
    void *p = nullptr;
    OK(cudaMalloc(&p, 100));
    if (!bug) OK(cudaFree(p));
}
static void leaked_stream(bool bug) {
    cudaStream_t stream = nullptr;
    OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    if (!bug) OK(cudaStreamDestroy(stream));
}
static void double_free(bool bug) {
    void *p = nullptr;
    OK(cudaMalloc(&p, 100));
    OK(cudaFree(p));
    if (bug) (void)cudaFree(p);
}
static void dead_event(bool bug) {
    cudaEvent_t event = nullptr;
    OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    if (!bug) OK(cudaEventRecord(event, 0));
    OK(cudaEventDestroy(event));
    if (bug) (void)cudaEventRecord(event, 0);
}
static void wrong_direction(bool bug) {
    Array<float> x(8, one_more);
    float host[8] = {};
    OK(cudaMemcpy(host, x.p, sizeof host, bug ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost));
    expect(host[7], 8, "host", 7);
}
static void copy_too_long(bool bug) {
    Array<float> x(8, one_more);
    float host[9] = {};
    OK(cudaMemcpy(host, x.p, bug ? 36 : 32, cudaMemcpyDeviceToHost));
    expect(host[7], 8, "host", 7);
}
static void host_reads_device(bool bug) {
#ifdef CUDA_ON_CPU
    Array<float> x(8, one_more);
    float seen = bug ? x.p[7] : x.download()[7];
    expect(seen, 8, "seen", 0);
#else
    (void)bug;
#endif
}

#ifdef CUDA_ON_CPU
// Uploads and computes. Must say so when any of its calls fails.
static bool compute(float *out, int n_calls_checked) {
    float *x = nullptr, host = 1;
    bool ok = n_calls_checked >= 1 ? cudaMalloc((void **)&x, 4) == cudaSuccess
                                   : ((void)cudaMalloc((void **)&x, 4), true);
    ok = ok && cudaMemcpy(x, &host, 4, cudaMemcpyHostToDevice) == cudaSuccess;
    if (ok) add_one<<<1, 32>>>(x, x, 1);
    if (n_calls_checked >= 2) ok = ok && cudaGetLastError() == cudaSuccess;
    ok = ok && cudaMemcpy(&host, x, 4, cudaMemcpyDeviceToHost) == cudaSuccess;
    (void)cudaFree(x);
    *out = host;
    return ok;
}
static void fail_each_call(int n_calls_checked) {
    for (int n = 1; n <= 5; n++) {
        float out = 0;
        char words[40];
        snprintf(words, sizeof words, "fail_call=%d", n);
        OK(emulator_set(words));
        bool ok = compute(&out, n_calls_checked);
        (void)cudaGetLastError();
        EXPECT(!(ok && out != 2));
    }
    OK(emulator_set("fail_call=0"));
}
#else
static void fail_each_call(int) {}
#endif
static void malloc_not_checked(bool bug) { fail_each_call(bug ? 0 : 2); }
static void launch_not_checked(bool bug) { fail_each_call(bug ? 1 : 2); }

// =================================================================================================
//  Streams
// =================================================================================================

struct TwoStreams {
    cudaStream_t a = nullptr, b = nullptr;
    cudaEvent_t event = nullptr;
    float *pinned = nullptr;

    TwoStreams() {
        OK(cudaStreamCreateWithFlags(&a, cudaStreamNonBlocking));
        OK(cudaStreamCreateWithFlags(&b, cudaStreamNonBlocking));
        OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        OK(cudaMallocHost((void **)&pinned, 32 * sizeof(float)));
    }
    ~TwoStreams() {
        OK(cudaFreeHost(pinned));
        OK(cudaEventDestroy(event));
        OK(cudaStreamDestroy(b));
        OK(cudaStreamDestroy(a));
    }
};

static void missing_synchronize(bool bug) {
    TwoStreams s;
    Array<float> x(32, one_more), y(32);
    add_one<<<1, 32, 0, s.a>>>(y.p, x.p, 32);
    OK(cudaMemcpyAsync(s.pinned, y.p, 32 * sizeof(float), cudaMemcpyDeviceToHost, s.a));
    if (!bug) OK(cudaStreamSynchronize(s.a));
    expect(s.pinned[31], 33, "pinned", 31);
}
static void missing_event_wait(bool bug) {
    TwoStreams s;
    Array<float> x(32, one_more), y(32), z(32);
    add_one<<<1, 32, 0, s.a>>>(y.p, x.p, 32);
    OK(cudaEventRecord(s.event, s.a));
    if (!bug) OK(cudaStreamWaitEvent(s.b, s.event, 0));
    add_one<<<1, 32, 0, s.b>>>(z.p, y.p, 32);
    OK(cudaStreamSynchronize(s.b));
    z.expect_all([](size_t i) { return (double)i + 3; });
}
static void pinned_reused_too_early(bool bug) {
    TwoStreams s;
    Array<float> x(32);
    for (int i = 0; i < 32; i++) s.pinned[i] = 5;
    OK(cudaMemcpyAsync(x.p, s.pinned, 32 * sizeof(float), cudaMemcpyHostToDevice, s.a));
    if (!bug) OK(cudaStreamSynchronize(s.a));
    for (int i = 0; i < 32; i++) s.pinned[i] = 6;
    OK(cudaStreamSynchronize(s.a));
    x.expect_all([](size_t) { return 5.0; });
}
// Pageable memory is read at the call: reusing it at once is allowed.
static void pageable_memory(bool) {
    TwoStreams s;
    Array<float> x(32);
    std::vector<float> host(32, 5.0f);
    OK(cudaMemcpyAsync(x.p, host.data(), 32 * sizeof(float), cudaMemcpyHostToDevice, s.a));
    for (float &value : host) value = 6;
    OK(cudaMemcpyAsync(host.data(), x.p, 32 * sizeof(float), cudaMemcpyDeviceToHost, s.a));
    expect(host[3], 5, "host", 3);
}
// The legacy stream waits for blocking streams and they for it, without events.
static void legacy_stream(bool) {
    cudaStream_t a = nullptr;
    OK(cudaStreamCreateWithFlags(&a, cudaStreamDefault));
    Array<float> x(32, one_more), y(32);
    add_one<<<1, 32, 0, a>>>(y.p, x.p, 32);
    add_one<<<1, 32>>>(y.p, y.p, 32);
    add_one<<<1, 32, 0, a>>>(y.p, y.p, 32);
    y.expect_all([](size_t i) { return (double)i + 4; });
    OK(cudaStreamDestroy(a));
}
static void event_times(bool) {
    cudaEvent_t begin = nullptr, end = nullptr;
    float ms = -1;
    Array<float> x(32, one_more);
    OK(cudaEventCreate(&begin));
    OK(cudaEventCreate(&end));
    OK(cudaEventRecord(begin, 0));
    add_one<<<1, 32>>>(x.p, x.p, 32);
    OK(cudaEventRecord(end, 0));
    OK(cudaEventSynchronize(end));
    OK(cudaEventElapsedTime(&ms, begin, end));
    EXPECT(ms >= 0 && ms < 10000);
    OK(cudaEventDestroy(begin));
    OK(cudaEventDestroy(end));
}

// Records y = x + 1, z = y + 1 on two streams and replays it on changing x.
static void run_graph(int kind) {
    TwoStreams s;
    Array<float> x(32, [](size_t) { return 0.0f; }), y(32), z(32);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    cudaEvent_t back = nullptr;
    OK(cudaEventCreateWithFlags(&back, cudaEventDisableTiming));
    OK(cudaStreamBeginCapture(s.a, cudaStreamCaptureModeGlobal));
    add_one<<<1, 32, 0, s.a>>>(y.p, x.p, 32);
    OK(cudaEventRecord(s.event, s.a));
    OK(cudaStreamWaitEvent(s.b, s.event, 0));
    add_one<<<1, 32, 0, s.b>>>(z.p, y.p, 32);
    OK(cudaEventRecord(back, s.b));
    if (kind == 1) (void)cudaStreamSynchronize(s.a);                    // not while capturing
    if (kind != 2) OK(cudaStreamWaitEvent(s.a, back, 0));               // or b is never joined
    OK(cudaMemcpyAsync(x.p, z.p, 32 * sizeof(float), cudaMemcpyDeviceToDevice, s.a));
    OK(cudaStreamEndCapture(s.a, &graph));
    if (graph) {
        OK(cudaGraphInstantiate(&exec, graph, 0));
        for (int i = 0; i < 3; i++) OK(cudaGraphLaunch(exec, s.a));
        OK(cudaStreamSynchronize(s.a));
        OK(cudaGraphExecDestroy(exec));
        OK(cudaGraphDestroy(graph));
        z.expect_all([](size_t) { return 6.0; });
    }
    OK(cudaEventDestroy(back));
}
static void graph_synchronized(bool bug) { run_graph(bug ? 1 : 0); }
static void graph_not_joined(bool bug) { run_graph(bug ? 2 : 0); }

// =================================================================================================
//  Numbers, cuBLAS
// =================================================================================================

// Every 16-bit pattern to float and back, and the rounding of what lies between.
__global__ void round_trip(unsigned *bad) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned short bits = (unsigned short)i;
    float b = __bfloat162float(__ushort_as_bfloat16(bits));
    float h = __half2float(__ushort_as_half(bits));
    if (b == b && __bfloat16_as_ushort(__float2bfloat16(b)) != bits) atomicAdd(&bad[0], 1u);
    if (h == h && __half_as_ushort(__float2half(h)) != bits) atomicAdd(&bad[1], 1u);
}
struct Rounding { float in; unsigned short bf16, half; };
static const Rounding roundings[] = {
    {1.00390625f, 0x3F80, 0x3C04}, {1.01171875f, 0x3F82, 0x3C0C}, {1.00392f, 0x3F81, 0x3C04},
    {65519.0f, 0x4780, 0x7BFF}, {65520.0f, 0x4780, 0x7C00}, {-65520.0f, 0xC780, 0xFC00},
    {2.9802322e-8f, 0x3300, 0}, {2.9802325e-8f, 0x3300, 1}, {8.9406967e-8f, 0x33C0, 2},
    {6.1006e-5f, 0x3880, 0x0400}, {3.3961775e38f, 0x7F80, 0x7C00}, {1.00048828f, 0x3F80, 0x3C00},
};
__global__ void round_numbers(unsigned short *out, const float *in, int n) {
    int i = threadIdx.x;
    if (i >= n) return;
    out[3 * i] = __bfloat16_as_ushort(__float2bfloat16(in[i]));
    out[3 * i + 1] = __half_as_ushort(__float2half(in[i]));
    out[3 * i + 2] = __bfloat16_as_ushort(__floats2bfloat162_rn(0, -in[i]).y);
}
__global__ void bit_functions(unsigned *out) {
    out[0] = __byte_perm(0x33221100u, 0x77665544u, 0x7406);
    out[1] = __umulhi(0x80000001u, 0x80000000u);
    out[2] = (unsigned)(__popc(0xF0F0u) + 100 * __clz(0x00010000) + 10000 * __ffs(0x40));
    out[3] = __float_as_uint(__fmaf_rn(3, 4, 5)) ^ __float_as_uint(max(17.0f, NAN)) ^
             (unsigned)min(2, 3);
}
static void number_formats(bool) {
    size_t n = sizeof roundings / sizeof *roundings;
    Array<unsigned> bad(2, [](size_t) { return 0u; }), bits(4);
    round_trip<<<65536 / 256, 256>>>(bad.p);
    bad.expect_all([](size_t) { return 0.0; });
    Array<float> in(n, [](size_t i) { return roundings[i].in; });
    Array<unsigned short> out(3 * n);
    round_numbers<<<1, 32>>>(out.p, in.p, (int)n);
    std::vector<unsigned short> got = out.download();
    for (size_t i = 0; i < n; i++) {
        expect(got[3 * i], roundings[i].bf16, "bf16", i);
        expect(got[3 * i + 1], roundings[i].half, "half", i);
        expect(got[3 * i + 2], roundings[i].bf16 ^ 0x8000, "negative bf16", i);
    }
    bit_functions<<<1, 1>>>(bits.p);
    bits.expect_all([](size_t i) {
        double want[] = {0x77440066, 0x40000000, 71508, 2};
        return want[i];
    });
}

typedef cublasStatus_t Create(cublasHandle_t *);
typedef cublasStatus_t Destroy(cublasHandle_t);
typedef cublasStatus_t GemmEx(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int,
                              const void *, const void *, cudaDataType, int, const void *,
                              cudaDataType, int, const void *, void *, cudaDataType, int,
                              cublasComputeType_t, cublasGemmAlgo_t);

static const int GM = 5, GN = 3, GK = 4, LD = 6;
static float gemm_a(size_t i) { return (float)(i * 3 % 7) - 3; }
static float gemm_b(size_t i) { return (float)(i * 5 % 11) - 5; }
// C (5, 3) = 2 op(A) op(B) + beta C, all leading dimensions 6, columns first.
static void one_gemm(GemmEx *gemm, cublasHandle_t handle, bool ta, bool tb, bool bf16, float beta,
                     int n) {
    Array<float> af(LD * LD, gemm_a), bf(LD * LD, gemm_b), C((size_t)(LD * (GN - 1) + GM));
    Array<__nv_bfloat16> ah(LD * LD), bh(LD * LD);
    to_bf16<<<1, 64>>>(ah.p, af.p, LD * LD);
    to_bf16<<<1, 64>>>(bh.p, bf.p, LD * LD);
    if (beta != 0) OK(cudaMemset(C.p, 0, C.n * sizeof(float)));
    float alpha = 2;
    cudaDataType in = bf16 ? CUDA_R_16BF : CUDA_R_32F;
    OK(gemm(handle, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_T : CUBLAS_OP_N, GM, n, GK,
            &alpha, bf16 ? (void *)ah.p : af.p, in, LD, bf16 ? (void *)bh.p : bf.p, in, LD, &beta,
            C.p, CUDA_R_32F, LD, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    std::vector<float> c = C.download();
    for (int j = 0; j < GN; j++)
        for (int i = 0; i < GM; i++) {
            float sum = 0;
            for (int k = 0; k < GK; k++)
                sum += gemm_a((size_t)(ta ? k + i * LD : i + k * LD)) *
                       gemm_b((size_t)(tb ? j + k * LD : k + j * LD));
            expect(c[(size_t)(j * LD + i)], 2 * sum, "C", (size_t)(j * LD + i));
        }
}
static void matrix_product(bool bug) {
    void *library = dlopen("libcublas.so.13", RTLD_NOW);
    EXPECT(library && !dlsym(library, "cublasNoSuchThing"));
    if (!library) return;
    Create *create = (Create *)dlsym(library, "cublasCreate_v2");
    Destroy *destroy = (Destroy *)dlsym(library, "cublasDestroy_v2");
    GemmEx *gemm = (GemmEx *)dlsym(library, "cublasGemmEx");
    cublasHandle_t handle = nullptr;
    EXPECT(create && destroy && gemm);
    OK(create(&handle));
    for (int kind = 0; kind < 16; kind++)
        one_gemm(gemm, handle, kind & 1, kind & 2, kind & 4, kind & 8 ? 1.0f : 0.0f, GN);
    if (bug) one_gemm(gemm, handle, false, false, false, 0, GN + 1);    // C has three columns
    OK(destroy(handle));
    OK(dlclose(library));
}

// =================================================================================================
//  The table
// =================================================================================================

// Where a bug must be found: in which build, with which options, and what is said.
// GCC: clang cannot clear padding, nor does its UBSan see misaligned copies of structs.
enum Build { ANY, GCC, ASAN, GCC_UBSAN, TSAN };
struct Find { Build build; const char *options, *text; };
struct Case {
    const char *name, *what;
    void (*run)(bool bug);
    std::vector<Find> finds;    // empty: there is no wrong version
};

static const char *const LATE = "lazy", *const PLAIN = "";
static const std::vector<Case> cases = {
    {"missing_syncthreads", "read before others have written", missing_syncthreads,
     {{ANY, PLAIN, "wrong result"}, {ANY, "schedule=descending", "wrong result"},
      {TSAN, PLAIN, "data race"}}},
    {"missing_second_barrier", "overwritten before others have read", missing_second_barrier,
     {{ANY, "schedule=warp", "wrong result"}, {ANY, "schedule=random", "wrong result"},
      {TSAN, PLAIN, "data race"}}},
    {"divergent_barrier", "__syncthreads for some threads", divergent_barrier,
     {{ANY, PLAIN, "divergent barrier"}, {ANY, "schedule=random", "divergent barrier"}}},
    {"return_before_barrier", "a thread leaves, the others wait", return_before_barrier,
     {{ANY, PLAIN, "threads 5-5 have returned"}}},
    {"two_barriers", "one barrier in each branch", two_barriers,
     {{ANY, PLAIN, "divergent barrier: not all threads wait at the same one"}}},
    {"deadlock", "half a warp at a barrier, half in a shuffle", deadlock,
     {{ANY, PLAIN, "deadlock"}, {ANY, "schedule=warp", "deadlock"}}},
    {"block_votes", "__syncthreads_count, _or, _and", block_votes, {}},
    {"endless_loop", "a thread waits for one that cannot run", endless_loop,
     {{ANY, "timeout=1", "running for 1 seconds"}}},

    {"missing_syncwarp", "exchange inside a warp", missing_syncwarp,
     {{ANY, PLAIN, "wrong result"}, {TSAN, PLAIN, "data race"}}},
    {"shuffle_instead_of_syncwarp", "shuffles order no memory", shuffle_instead_of_syncwarp,
     {{TSAN, PLAIN, "data race"}}},
    {"lane_outside_mask", "a lane calls with a mask without it", lane_outside_mask,
     {{ANY, PLAIN, "lane outside its own mask"}}},
    {"shuffle_from_outside", "reads a lane that takes no part", shuffle_from_outside,
     {{ANY, PLAIN, "leaves out"}}},
    {"lanes_disagree", "different masks in one shuffle", lanes_disagree,
     {{ANY, PLAIN, "disagree on the mask"}}},
    {"divergent_shuffle", "a shuffle in each branch", divergent_shuffle,
     {{ANY, PLAIN, "divergent collective"}, {ANY, "schedule=random", "divergent collective"}}},
    {"lane_missing", "a lane of the mask never comes", lane_missing,
     {{ANY, PLAIN, "threads 31-31 have returned"}}},
    {"shuffle_semantics", "shuffles and votes in all their forms", shuffle_semantics, {}},

    {"global_write_past_end", "one element too far", global_write_past_end,
     {{ANY, PLAIN, "out of bounds"}, {ASAN, PLAIN, "use-after-poison"}}},
    {"global_read_past_end", "read, without any effect", global_read_past_end,
     {{ASAN, PLAIN, "use-after-poison"}}},
    {"global_write_far", "thousands of elements too far", global_write_far,
     {{ANY, PLAIN, "out of bounds"}}},
    {"global_write_before", "index -1", global_write_before,
     {{ANY, PLAIN, "out of bounds"}, {ASAN, PLAIN, "use-after-poison"}}},
    {"shared_write_past_end", "shared array, one too far", shared_write_past_end,
     {{ANY, PLAIN, "just outside shared array"}, {ASAN, PLAIN, "use-after-poison"}}},
    {"shared_read_before", "shared array, index -1", shared_read_before,
     {{ASAN, PLAIN, "use-after-poison"}}},
    {"shared_not_written", "the tail of a tile is not zeroed", shared_not_written,
     {{ANY, PLAIN, "wrong result"}}},
    {"global_not_written", "adds to memory never cleared", global_not_written,
     {{ANY, PLAIN, "wrong result"}}},
    {"host_pointer", "a kernel gets a host pointer", host_pointer,
     {{ANY, PLAIN, "host pointer given to a kernel"}}},
    {"host_pointer_in_struct", "... inside a struct", host_pointer_in_struct,
     {{GCC, PLAIN, "host pointer given to a kernel"}}},
    {"freed_memory", "a kernel gets a freed buffer", freed_memory,
     {{ANY, PLAIN, "which was device memory once"}}},
    {"misaligned_vector", "float4 from an array of floats", misaligned_vector,
     {{GCC_UBSAN, PLAIN, "misaligned address"}}},

    {"async_copy_without_barrier", "waited for own copies, reads others'",
     async_copy_without_barrier, {{ANY, PLAIN, "wrong result"}, {TSAN, PLAIN, "data race"}}},
    {"async_copy_without_wait", "reads the copy before it is waited for", async_copy_without_wait,
     {{ANY, PLAIN, "wrong result"}}},
    {"async_copy_one_group_short", "wait<2> where wait<1> is needed", async_copy_one_group_short,
     {{ANY, PLAIN, "wrong result"}}},
    {"async_copy_misaligned", "4 bytes off", async_copy_misaligned,
     {{ANY, PLAIN, "not 16-byte aligned"}}},
    {"async_copy_past_buffer", "source ends beyond the buffer", async_copy_past_buffer,
     {{ANY, PLAIN, "not in a device buffer"}}},
    {"async_copy_past_shared", "destination beyond the array", async_copy_past_shared,
     {{ANY, PLAIN, "not in a shared array"}}},
    {"matrix_row_misaligned", "ldmatrix and mma; a row 2 bytes off", matrix_row_misaligned,
     {{ANY, PLAIN, "not 16-byte aligned"}}},
    {"matrix_row_not_shared", "ldmatrix from global memory", matrix_row_not_shared,
     {{ANY, PLAIN, "not in a shared array"}}},

    {"lost_update", "n = n + 1 by all threads", lost_update, {{TSAN, PLAIN, "data race"}}},
    {"race_between_warps", "the second warp reads what the first wrote", race_between_warps,
     {{ANY, "schedule=descending", "wrong result"}, {TSAN, PLAIN, "data race"}}},
    {"race_between_blocks", "n = n + 1 by all blocks", race_between_blocks,
     {{TSAN, "unordered", "data race"}}},
    {"block_needs_earlier_block", "y[b] from y[b - 1]", block_needs_earlier_block,
     {{ANY, "blocks=descending", "wrong result"}, {TSAN, "unordered", "data race"}}},
    {"atomic_semantics", "atomics of all types", atomic_semantics, {}},

    {"too_much_shared", "60000 bytes without asking", too_much_shared,
     {{ANY, PLAIN, "a launch failed, and nobody looked"}}},
    {"dynamic_past_end", "dynamic shared memory, one too far", dynamic_past_end,
     {{ANY, PLAIN, "out of bounds"}, {ASAN, PLAIN, "use-after-poison"}}},
    {"too_many_threads", "2048 threads in a block", too_many_threads,
     {{ANY, PLAIN, "a launch failed, and nobody looked"}}},
    {"leak", "device memory never freed", leak, {{ANY, PLAIN, "leak: 100 bytes of device memory"}}},
    {"leaked_stream", "a stream never destroyed", leaked_stream, {{ANY, PLAIN, "leak: stream"}}},
    {"double_free", "", double_free, {{ANY, PLAIN, "double free"}}},
    {"dead_event", "an event used after its end", dead_event, {{ANY, PLAIN, "invalid handle"}}},
    {"wrong_direction", "cudaMemcpy the wrong way", wrong_direction,
     {{ANY, PLAIN, "wrong direction"}}},
    {"copy_too_long", "cudaMemcpy beyond the buffer", copy_too_long,
     {{ANY, PLAIN, "out of bounds"}}},
    {"host_reads_device", "the host follows a device pointer", host_reads_device,
     {{ANY, "protect", "host code touches device memory"}}},
    {"malloc_not_checked", "one failing call is overlooked", malloc_not_checked,
     {{ANY, PLAIN, "wrong result"}}},
    {"launch_not_checked", "... a failing launch", launch_not_checked,
     {{ANY, PLAIN, "wrong result"}}},

    {"missing_synchronize", "reads the result of an asynchronous copy", missing_synchronize,
     {{ANY, LATE, "wrong result"}}},
    {"missing_event_wait", "two streams without an event", missing_event_wait,
     {{ANY, LATE, "wrong result"}}},
    {"pinned_reused_too_early", "overwrites what is being copied", pinned_reused_too_early,
     {{ANY, LATE, "wrong result"}}},
    {"pageable_memory", "is copied at the call", pageable_memory, {}},
    {"legacy_stream", "orders itself with blocking streams", legacy_stream, {}},
    {"event_times", "cudaEventElapsedTime", event_times, {}},
    {"graph_synchronized", "waits while a graph is recorded", graph_synchronized,
     {{ANY, PLAIN, "wrong result"}}},
    {"graph_not_joined", "a second stream is left behind", graph_not_joined,
     {{ANY, PLAIN, "wrong result"}}},

    {"number_formats", "bf16, half, bits", number_formats, {}},
    {"matrix_product", "cublasGemmEx through dlopen; a matrix too small", matrix_product,
     {{ANY, PLAIN, "out of bounds: matrix C"}}},
};

static int run_case(const Case &c, bool bug) {
    c.run(bug);
    return wrong ? 1 : 0;
}

#ifdef CUDA_ON_CPU

template <class T, class = void> struct AtomicAdd : std::false_type {};
template <class T> struct AtomicAdd<T, decltype((void)atomicAdd((T *)0, T()))> : std::true_type {};
static_assert(AtomicAdd<int>::value && !AtomicAdd<float>::value,
              "atomics on floats do not compile");

// Runs this program again with the arguments and options. Returns its exit status, -1 if a signal
// ended it; *said is all it wrote to stderr.
static int run_again(const std::string &arguments, const char *opts, std::string *said) {
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n < 0 ? 0 : n] = 0;
    std::string command = std::string("CUDA_EMULATOR='") + opts +
        "' TSAN_OPTIONS=\"$TSAN_OPTIONS atexit_sleep_ms=0\" '" + self + "' " + arguments + " 2>&1";
    FILE *pipe = popen(command.c_str(), "r");
    char buffer[4096];
    said->clear();
    while (size_t got = fread(buffer, 1, sizeof buffer, pipe)) said->append(buffer, got);
    int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

int main(int argc, char **argv) {
    bool all = argc > 1 && !strcmp(argv[1], "--right");
    bool list = argc > 1 && !strcmp(argv[1], "--list");
    if (argc > 1) {
        int status = 0;
        for (const Case &c : cases) {
            if (list) printf("%-28s %s\n", c.name, c.what);
            else if (all || !strcmp(argv[1], c.name)) status |= run_case(c, argc > 2);
            if (all && (wrong || emulator_failures())) fprintf(stderr, "  in %s\n", c.name);
            if (all && wrong) break;
        }
        if (!list) printf("hash %016llx\n", (unsigned long long)hash);
        return status;
    }

#ifdef __clang__
    const bool clang = true;
#else
    const bool clang = false;
#endif
    static const char *const modes[] = {
        "", "schedule=descending blocks=descending", "lazy", "protect", "unordered",
        "schedule=random blocks=random seed=1", "schedule=warp seed=2",
        "schedule=random blocks=random seed=3 lazy protect", "schedule=warp seed=4 lazy protect",
    };
    int passed = 0, failed = 0, others = 0;
    std::string said, first;
    for (const char *mode : modes) {
        int status = run_again("--right", mode, &said);
        size_t line = said.find("hash ");
        if (line != std::string::npos && first.empty()) first = said.substr(line);
        bool ok = status == 0 && line != std::string::npos && said.substr(line) == first;
        ok ? passed++ : failed++;
        if (!ok) printf("  FAILED [%s]: false alarm or other results\n%s", mode, said.c_str());
    }
    printf("%s", first.c_str());
    for (const Case &c : cases)
        for (const Find &find : c.finds) {
            if ((find.build == ASAN && !EMULATOR_ASAN) || (find.build == TSAN && !EMULATOR_TSAN) ||
                (find.build == GCC && clang) ||
                (find.build == GCC_UBSAN && (!EMULATOR_ASAN || clang))) {
                others++;
                continue;
            }
            int status = run_again(std::string(c.name) + " bug", find.options, &said);
            bool found = status != 0 && said.find(find.text) != std::string::npos;
            if (find.build == ANY && status != 0 && !found)     // a sanitizer may come first
                found = (EMULATOR_ASAN && said.find("AddressSanitizer") != std::string::npos) ||
                        (EMULATOR_TSAN && said.find("data race") != std::string::npos) ||
                        (EMULATOR_TSAN && status == 128 + SIGALRM);     // it holds our handler back
            found ? passed++ : failed++;
            if (!found) printf("  FAILED %s [%s]: not found: %s\n%s", c.name, find.options,
                               find.text, said.c_str());
        }
    printf("%d rows belong to a build with another sanitizer or none\n", others);
    printf("%d passed, %d failed, 0 skipped\n", passed, failed);
    return failed != 0;
}

#else

int main() {
    int failed = 0;
    for (const Case &c : cases) {
        wrong = false;
        failed += run_case(c, false);
        if (wrong) printf("  FAILED %s\n", c.name);
    }
    printf("%zu passed, %d failed, 0 skipped\n", cases.size() - (size_t)failed, failed);
    return failed != 0;
}

#endif
