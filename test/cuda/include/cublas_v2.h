// cublas_v2.h: the few functions of cuBLAS that qlora.cu uses, with sums in double and one
// rounding, and the dlopen that finds them.
#pragma once
#include "cuda_runtime.h"
#include "cuda_bf16.h"

enum [[nodiscard]] cublasStatus_t {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_ARCH_MISMATCH = 8,
    CUBLAS_STATUS_MAPPING_ERROR = 11, CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_INTERNAL_ERROR = 14, CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_OP_C = 2 };
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
typedef cudaDataType cudaDataType_t;
enum cublasComputeType_t {
    CUBLAS_COMPUTE_16F = 64, CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_PEDANTIC = 69,
    CUBLAS_COMPUTE_64F = 70, CUBLAS_COMPUTE_32F_FAST_16F = 74, CUBLAS_COMPUTE_32F_FAST_16BF = 75,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77
};
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99 };
enum cublasMath_t {
    CUBLAS_DEFAULT_MATH = 0, CUBLAS_TENSOR_OP_MATH = 1, CUBLAS_PEDANTIC_MATH = 2,
    CUBLAS_TF32_TENSOR_OP_MATH = 3, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
};
struct cublasContext { cudaStream_t stream; };
typedef cublasContext *cublasHandle_t;
#define cublasCreate cublasCreate_v2
#define cublasDestroy cublasDestroy_v2
#define cublasSetStream cublasSetStream_v2
#define cublasSetWorkspace cublasSetWorkspace_v2

namespace emulator {

struct Matrix { const char *data; cudaDataType type; int ld; long long stride; bool transposed; };
struct Gemm { int m, n, k, batch; float alpha, beta; Matrix A, B, C; };

inline size_t bytes_of(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }

EMULATOR_CODE inline double element(const Matrix &x, int batch, int row, int column) {
    if (x.transposed) std::swap(row, column);
    size_t i = (size_t)(batch * x.stride) + (size_t)column * (size_t)x.ld + (size_t)row;
    if (x.type == CUDA_R_32F) return ((const float *)x.data)[i];
    unsigned short bits = ((const unsigned short *)x.data)[i];
    return x.type == CUDA_R_16BF ? bf16_to_float(bits) : __half2float({bits});
}

// C (m, n) = alpha A (m, k) B (k, n) + beta C, column by column.
EMULATOR_CODE inline void run_gemm(const Gemm &g) {
    DeviceWork work;
    double *a = (double *)malloc(sizeof *a * ((size_t)g.m * (size_t)g.k + (size_t)g.m)), *sum = a;
    sum += (size_t)g.m * (size_t)g.k;
    for (int batch = 0; batch < g.batch; batch++) {
        for (int p = 0; p < g.k; p++)
            for (int i = 0; i < g.m; i++) a[(size_t)p * g.m + i] = element(g.A, batch, i, p);
        for (int j = 0; j < g.n; j++) {
            for (int i = 0; i < g.m; i++) sum[i] = 0;
            for (int p = 0; p < g.k; p++) {
                double b = element(g.B, batch, p, j);
                const double *column = a + (size_t)p * g.m;
                for (int i = 0; i < g.m; i++) sum[i] += column[i] * b;
            }
            size_t place = (size_t)(batch * g.C.stride) + (size_t)j * (size_t)g.C.ld;
            for (int i = 0; i < g.m; i++, place++) {
                double old = g.beta == 0 ? 0 : g.beta * element(g.C, batch, i, j);
                float value = (float)(g.alpha * sum[i] + old);
                if (g.C.type == CUDA_R_32F) ((float *)g.C.data)[place] = value;
                else if (g.C.type == CUDA_R_16F) ((__half *)g.C.data)[place] = __float2half(value);
                else ((__nv_bfloat16 *)g.C.data)[place] = __float2bfloat16(value);
            }
        }
    }
    free(a);
}

// Is this matrix of rows x columns, stored by columns, inside one device buffer?
inline bool check_matrix(const char *name, const Matrix &x, int rows, int columns, int batch) {
    if (x.transposed) std::swap(rows, columns);
    if (x.ld < (rows > 1 ? rows : 1)) return false;
    if (!rows || !columns) return true;
    long long elements = (batch - 1) * x.stride + (columns - 1LL) * x.ld + rows;
    if (find(buffers, x.data, (size_t)elements * bytes_of(x.type))) return true;
    report({nullptr, 0}, "out of bounds: matrix %s of a gemm, %d x %d, ld %d, x %d, is not in a "
           "device buffer", name, rows, columns, x.ld, batch);
    return false;
}

inline bool handle_is_bad(cublasHandle_t handle) {
    return check_handle(handle, "cuBLAS handle", {nullptr, 0}) != cudaSuccess;
}

inline cublasStatus_t gemm(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb,
                           Gemm g, const void *alpha, const void *beta,
                           cublasComputeType_t compute) {
    if (asked_to_fail() || fault != cudaSuccess) return CUBLAS_STATUS_EXECUTION_FAILED;
    if (handle_is_bad(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
    cudaDataType in = g.A.type, out = g.C.type;
    bool half = in == CUDA_R_16BF || in == CUDA_R_16F;
    if (compute == CUBLAS_COMPUTE_16F || compute == CUBLAS_COMPUTE_64F || g.B.type != in ||
        !(half ? out == in || out == CUDA_R_32F : in == CUDA_R_32F && out == in))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (g.m < 0 || g.n < 0 || g.k < 0 || g.batch < 0 || !alpha || !beta)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (!g.m || !g.n || !g.batch) return CUBLAS_STATUS_SUCCESS;
    g.A.transposed = ta != CUBLAS_OP_N, g.B.transposed = tb != CUBLAS_OP_N;
    g.alpha = *(const float *)alpha, g.beta = *(const float *)beta;
    if (!check_matrix("A", g.A, g.m, g.k, g.batch) || !check_matrix("B", g.B, g.k, g.n, g.batch) ||
        !check_matrix("C", g.C, g.m, g.n, g.batch)) return CUBLAS_STATUS_INVALID_VALUE;
    return submit(handle->stream, [g] { run_gemm(g); }) == cudaSuccess && fault == cudaSuccess
           ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

} // namespace emulator

extern "C" {

inline const char *cublasGetStatusName(cublasStatus_t status) {
    switch ((int)status) {
    case 0: return "CUBLAS_STATUS_SUCCESS";
    case 1: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case 3: return "CUBLAS_STATUS_ALLOC_FAILED";
    case 7: return "CUBLAS_STATUS_INVALID_VALUE";
    case 13: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case 15: return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "CUBLAS_STATUS_INTERNAL_ERROR";
}
inline const char *cublasGetStatusString(cublasStatus_t status) {
    return cublasGetStatusName(status);
}

inline cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    if (emulator::asked_to_fail()) return CUBLAS_STATUS_ALLOC_FAILED;
    *handle = new cublasContext{nullptr};
    emulator::handles[*handle] = {"cuBLAS handle", {nullptr, 0}};
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    bool failing = emulator::asked_to_fail();
    if (emulator::handle_is_bad(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
    emulator::run_all();
    emulator::handles.erase(handle);
    delete handle;
    return failing ? CUBLAS_STATUS_INTERNAL_ERROR : CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    if (emulator::asked_to_fail()) return CUBLAS_STATUS_MAPPING_ERROR;
    if (emulator::handle_is_bad(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (emulator::check_stream(stream, {nullptr, 0})) return CUBLAS_STATUS_INVALID_VALUE;
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t bytes) {
    if (emulator::asked_to_fail()) return CUBLAS_STATUS_INVALID_VALUE;
    if (emulator::handle_is_bad(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
    bool good = !workspace || ((uintptr_t)workspace % 256 == 0 &&
                               emulator::find(emulator::buffers, workspace, bytes));
    return good ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
inline cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t) {
    if (emulator::asked_to_fail()) return CUBLAS_STATUS_INVALID_VALUE;
    return emulator::handle_is_bad(handle) ? CUBLAS_STATUS_NOT_INITIALIZED : CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
    const void *alpha, const void *A, cudaDataType a_type, int lda, long long a_stride,
    const void *B, cudaDataType b_type, int ldb, long long b_stride, const void *beta, void *C,
    cudaDataType c_type, int ldc, long long c_stride, int batch, cublasComputeType_t compute,
    cublasGemmAlgo_t) {
    return emulator::gemm(handle, ta, tb,
                          {m, n, k, batch, 0, 0, {(const char *)A, a_type, lda, a_stride, false},
                           {(const char *)B, b_type, ldb, b_stride, false},
                           {(const char *)C, c_type, ldc, c_stride, false}}, alpha, beta, compute);
}
inline cublasStatus_t cublasGemmEx(
    cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
    const void *alpha, const void *A, cudaDataType a_type, int lda, const void *B,
    cudaDataType b_type, int ldb, const void *beta, void *C, cudaDataType c_type, int ldc,
    cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    return cublasGemmStridedBatchedEx(handle, ta, tb, m, n, k, alpha, A, a_type, lda, 0, B, b_type,
                                      ldb, 0, beta, C, c_type, ldc, 0, 1, compute, algo);
}

} // extern "C"

// ------------------------------------------------------------------------------------- its loading

namespace emulator {

inline char cublas_library;     // its address is the handle
inline const char *loader_error;

inline void *open_library(const char *name, int flags) {
    if (!name || !strstr(name, "cublas")) return dlopen(name, flags);
    bool failing = asked_to_fail() || options.no_cublas;
    loader_error = failing ? "cannot open shared object file: No such file or directory" : nullptr;
    return failing ? nullptr : &cublas_library;
}

inline void *find_symbol(void *library, const char *name) {
    static const std::map<std::string, void *> symbols = {
        {"cublasCreate_v2", (void *)cublasCreate_v2},
        {"cublasDestroy_v2", (void *)cublasDestroy_v2},
        {"cublasSetStream_v2", (void *)cublasSetStream_v2},
        {"cublasSetWorkspace_v2", (void *)cublasSetWorkspace_v2},
        {"cublasSetMathMode", (void *)cublasSetMathMode}, {"cublasGemmEx", (void *)cublasGemmEx},
        {"cublasGemmStridedBatchedEx", (void *)cublasGemmStridedBatchedEx},
        {"cublasGetStatusName", (void *)cublasGetStatusName},
        {"cublasGetStatusString", (void *)cublasGetStatusString},
    };
    if (library != &cublas_library) return dlsym(library, name);
    auto i = symbols.find(name);
    bool found = !asked_to_fail() && i != symbols.end();
    loader_error = found ? nullptr : "undefined symbol";
    return found ? i->second : nullptr;
}

inline int close_library(void *library) {
    return library == &cublas_library ? 0 : dlclose(library);
}

inline char *what_went_wrong() {
    const char *error = loader_error;
    loader_error = nullptr;
    return error ? const_cast<char *>(error) : dlerror();
}

} // namespace emulator

#define dlopen emulator::open_library
#define dlsym emulator::find_symbol
#define dlclose emulator::close_library
#define dlerror emulator::what_went_wrong
