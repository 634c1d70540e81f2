// qlora.c: QLoRA fine-tuning of language models, in one file.
//
// Reads a Hugging Face model directory, quantises it to 4 bits while reading, learns a low-rank
// adapter from a dataset, and writes what peft and transformers take as it is. Needs a C11
// compiler, POSIX threads and libm; nothing else, no Python anywhere. It is not a framework: no
// plug-ins, no downloads, no other file formats, and what it does not implement it refuses by name.
//
// Build the program:  make          Use it as a library:  cc yours.c qlora.c -lm -pthread (qlora.h)
//
//  Part I, the idea: read this and you know QLoRA
//      1  Conventions: letters, contracts, errors, memory, threads, random numbers
//      2  Numbers: bf16, NF4, double quantisation
//      3  Kernels: each operation forward, then at once backward
//      4  The transformer: one forward, one backward, for every architecture and device
//      5  AdamW and the schedules
//  Part II, the files
//      6  JSON
//      7  Files and safetensors
//      8  Unicode and regular expressions
//      9  The tokenizer
//     10  From config.json and weight files to a model
//     11  Chat templates and loss masks
//     12  Datasets
//     13  Adapters, model directories, the model handle, merging
//  Part III, the program
//     14  The trainer
//     15  Generation
//     16  What a person sees
//     17  Command line and chat
//  Part IV, the machine
//     18  Fast kernels
//     Generated tables
//
// To follow one token from its JSON line to the updated weight, read in this order: dataset_open
// (12), template_apply (11), tokenizer_encode (9), make_batch and train_step (14),
// loss_and_gradients (4), the kernels it calls (3), adamw (5).
#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#define QLORA_INTERNAL
#include "qlora.h"

// A product and a sum are rounded one by one, whatever the compiler: clang would join them.
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#endif

#if QLORA_VERSION_MAJOR != 0 || QLORA_VERSION_MINOR != 1
#error "qlora.c and qlora.h are of different versions"
#endif

enum { MAX_THREADS = 256 };

// =================================================================================================
//  1. Conventions: letters, contracts, errors, memory, threads, random numbers
//
//  Dimension letters, the same on every tensor of this file and of qlora.cu:
//      T   tokens of a micro-batch, its sequences laid end to end, no padding
//      S   supervised positions among them: the only ones that meet the output head
//      D   hidden size          F   feed-forward size       V   vocabulary
//      H   query heads          G   key/value heads (G divides H)
//      hd  head size            r   LoRA rank               L   layers
//      N,K rows (out features) and columns (in features) of a weight matrix
//  A comment (T, D) after a pointer means T rows of D values, row-major.
//
//  Names: a leading d means "gradient of the loss with respect to".
//  Arguments: outputs, inputs, saved values, sizes, in this order.
//  The gradient contract: gradients of activations are written (=), with one exception, the
//  residual stream's dh, to which every block adds (+=). Gradients of parameters are added to (+=),
//  sequence after sequence, each sequence's sum formed on its own first. The trainer zeroes them.
//
//  Determinism: work is split over outputs, never over a sum. Whatever thread computes an element,
//  it adds the same terms in the same order.
// =================================================================================================

// real is the type of all arithmetic: float. The tests build this file once more with double, so
// that finite differences can check every derivative to seven digits.
#ifdef QLORA_REAL_DOUBLE
#define REAL_IS_DOUBLE 1
#else
#define REAL_IS_DOUBLE 0
#endif

// ---------------------------------------------------------------------------------------- errors

static size_t utf8_decode(const char *text, size_t n, uint32_t *code);     // chapter 6

// Bytes of the character at the start of the text that a terminal may be shown as they are. 0: it
// is a control character (C0, DEL, C1) or no UTF-8, and its first byte should be shown as \xHH.
static size_t harmless_bytes(const char *text, size_t n) {
    uint32_t code;
    size_t bytes = utf8_decode(text, n, &code);
    return bytes && code >= 0x20 && !(code >= 0x7F && code < 0xA0) ? bytes : 0;
}

// Writes the message and returns -1. It stays one line of valid UTF-8 whatever names a hostile file
// holds, and ends between characters when it is too long.
__attribute__((format(printf, 2, 3)))
static int fail(qlora_error *err, const char *format, ...) {
    if (!err) return -1;
    char raw[sizeof err->text + 4];
    va_list args;
    va_start(args, format);
    vsnprintf(raw, sizeof raw, format, args);
    va_end(args);
    size_t n = 0, length = strlen(raw), room = sizeof err->text - 1;
    for (size_t i = 0; i < length;) {
        size_t bytes = harmless_bytes(raw + i, length - i);
        if (n + (bytes ? bytes : 4) > room) break;
        if (bytes) memcpy(err->text + n, raw + i, bytes);
        else snprintf(err->text + n, 5, "\\x%02X", (unsigned char)raw[i]);
        n += bytes ? bytes : 4;
        i += bytes ? bytes : 1;
    }
    err->text[n] = 0;
    return -1;
}

// ---------------------------------------------------------------------------------------- memory

// Products and sums of numbers that come from files go through these: true when they overflow.
static bool mul_overflows(size_t a, size_t b, size_t *out) {
    return __builtin_mul_overflow(a, b, out);
}

static bool add_overflows(size_t a, size_t b, size_t *out) {
    return __builtin_add_overflow(a, b, out);
}

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static size_t max_size(size_t a, size_t b) { return a > b ? a : b; }
static size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }
static size_t ceil_div(size_t n, size_t d) { return (n + d - 1) / d; }

static void *default_allocate(void *user, size_t bytes) { (void)user; return malloc(bytes); }
static void default_release(void *user, void *p, size_t bytes) { (void)user; (void)bytes; free(p); }

// n objects of the given size, not cleared; NULL with a message when that much is not to be had.
static void *mem_reserve(const qlora_allocator *a, size_t n, size_t size, qlora_error *err) {
    size_t bytes;
    void *p = NULL;
    if (!mul_overflows(n, size, &bytes)) p = a->allocate(a->user, max_size(bytes, 1));
    if (!p) fail(err, "out of memory: %zu x %zu bytes were refused", n, size);
    return p;
}

static void *mem_alloc(const qlora_allocator *a, size_t n, size_t size, qlora_error *err) {
    void *p = mem_reserve(a, n, size, err);
    if (p) memset(p, 0, n * size);
    return p;
}

static void mem_free(const qlora_allocator *a, void *p, size_t n, size_t size) {
    if (p) a->release(a->user, p, max_size(n * size, 1));
}

// A region: many small allocations of one owner (a parsed file, a tokenizer), freed together.
typedef struct RegionBlock {
    _Alignas(16) struct RegionBlock *next;            // what follows the block is 16-aligned too
    size_t size, used;
} RegionBlock;
typedef struct {
    const qlora_allocator *allocator;
    RegionBlock *blocks;
    size_t held;                    // bytes of all blocks
} Region;

static void *region_alloc(Region *region, size_t n, size_t size, qlora_error *err) {
    size_t bytes;
    if (mul_overflows(n, size, &bytes) || bytes > SIZE_MAX / 2) {
        fail(err, "out of memory: %zu x %zu bytes were asked for", n, size);
        return NULL;
    }
    bytes = round_up(bytes ? bytes : 1, 16);
    RegionBlock *block = region->blocks;
    if (!block || block->size - block->used < bytes) {
        // Blocks double up to 1 MiB, so that tiny files stay tiny and large ones need few calls.
        size_t size_now = block ? min_size(block->size * 2, (size_t)1 << 20) : 4096;
        size_now = max_size(size_now, bytes);
        block = mem_alloc(region->allocator, 1, sizeof *block + size_now, err);
        if (!block) return NULL;
        block->next = region->blocks;
        block->size = size_now;
        region->blocks = block;
        region->held += size_now;
    }
    void *p = (char *)(block + 1) + block->used;
    block->used += bytes;
    return p;
}

static char *region_text(Region *region, const char *text, size_t n, qlora_error *err) {
    char *copy = region_alloc(region, n + 1, 1, err);
    if (copy) memcpy(copy, text, n);
    return copy;
}

static void region_free(Region *region) {
    while (region->blocks) {
        RegionBlock *block = region->blocks;
        region->blocks = block->next;
        mem_free(region->allocator, block, 1, sizeof *block + block->size);
    }
}

// A growing array of bytes; with sizeof(T) as unit, of anything.
typedef struct { char *data; size_t size, capacity; const qlora_allocator *allocator; } Buffer;

static int buffer_reserve(Buffer *b, size_t more, qlora_error *err) {
    size_t need;
    if (add_overflows(b->size, more, &need)) return fail(err, "out of memory: size overflow");
    if (need <= b->capacity) return 0;
    size_t capacity = max_size(need, max_size(256, b->capacity + b->capacity / 2));
    char *data = mem_reserve(b->allocator, capacity, 1, err);
    if (!data) return -1;
    if (b->size) memcpy(data, b->data, b->size);
    mem_free(b->allocator, b->data, b->capacity, 1);
    b->data = data;
    b->capacity = capacity;
    return 0;
}

static int buffer_append(Buffer *b, const void *bytes, size_t n, qlora_error *err) {
    if (buffer_reserve(b, n, err)) return -1;
    if (n) memcpy(b->data + b->size, bytes, n);
    b->size += n;
    return 0;
}

__attribute__((format(printf, 3, 4)))
static int buffer_printf(Buffer *b, qlora_error *err, const char *format, ...) {
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    int bad = n < 0 ? fail(err, "cannot format text") : buffer_reserve(b, (size_t)n + 1, err);
    if (!bad) {
        vsnprintf(b->data + b->size, (size_t)n + 1, format, again);
        b->size += (size_t)n;
    }
    va_end(again);
    return bad;
}

static void buffer_free(Buffer *b) {
    mem_free(b->allocator, b->data, b->capacity, 1);
    b->data = NULL;
    b->size = b->capacity = 0;
}

// The arena: everything whose size the model and the batch determine lies in one allocation. The
// same carving code runs twice, first with base NULL to learn the size, then to hand out addresses.
typedef struct { char *base; size_t used; } Arena;

static void *arena_alloc(Arena *arena, size_t n, size_t size) {
    void *p = arena->base ? arena->base + arena->used : NULL;
    arena->used += round_up(n * size, 64);            // 64: a cache line, an AVX-512 register
    return p;
}

// --------------------------------------------------------------------------------------- threads

// A pool of threads that sleep between jobs. A job is n tasks; threads take the next task off a
// shared counter, which balances load and cannot change results (see Determinism above).
typedef void (*TaskFunction)(void *arguments, size_t task, int thread);

typedef struct Pool {
    int threads;                    // including the caller's
    pthread_t *handles;             // (threads - 1)
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    unsigned job;                   // number of the current job; a change wakes the workers
    int busy;                       // workers that have not finished it
    int started, quit;
    TaskFunction function;
    void *arguments;
    size_t n_tasks;
    atomic_size_t next;
    const qlora_allocator *allocator;
} Pool;

typedef struct { Pool *pool; int thread; } PoolWorker;

static void pool_run_tasks(Pool *pool, int thread) {
    for (;;) {
        size_t task = atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (task >= pool->n_tasks) return;
        pool->function(pool->arguments, task, thread);
    }
}

static void *pool_worker(void *pointer) {
    Pool *pool = pointer;
    pthread_mutex_lock(&pool->lock);
    int thread = ++pool->started;                     // 1, 2, ...; the caller is 0
    unsigned seen = 0;
    for (;;) {
        while (pool->job == seen && !pool->quit) pthread_cond_wait(&pool->work, &pool->lock);
        if (pool->quit) break;
        seen = pool->job;
        pthread_mutex_unlock(&pool->lock);
        pool_run_tasks(pool, thread);
        pthread_mutex_lock(&pool->lock);
        if (--pool->busy == 0) pthread_cond_signal(&pool->done);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

// Calls function(arguments, task, thread) for every task in 0..n_tasks-1 and returns when all
// ended.
static void parallel_for(Pool *pool, size_t n_tasks, TaskFunction function, void *arguments) {
    if (pool->threads == 1 || n_tasks < 2) {
        for (size_t task = 0; task < n_tasks; task++) function(arguments, task, 0);
        return;
    }
    pthread_mutex_lock(&pool->lock);
    pool->function = function;
    pool->arguments = arguments;
    pool->n_tasks = n_tasks;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    pool->busy = pool->threads - 1;
    pool->job++;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);

    pool_run_tasks(pool, 0);

    pthread_mutex_lock(&pool->lock);
    while (pool->busy) pthread_cond_wait(&pool->done, &pool->lock);
    pthread_mutex_unlock(&pool->lock);
}

static void pool_close(Pool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->lock);
    pool->quit = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->threads - 1; i++) pthread_join(pool->handles[i], NULL);
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->done);
    pthread_mutex_destroy(&pool->lock);
    mem_free(pool->allocator, pool->handles, MAX_THREADS, sizeof *pool->handles);
    mem_free(pool->allocator, pool, 1, sizeof *pool);
}

static Pool *pool_open(int threads, const qlora_allocator *allocator, qlora_error *err) {
    Pool *pool = mem_alloc(allocator, 1, sizeof *pool, err);
    if (!pool) return NULL;
    pool->allocator = allocator;
    pool->threads = 1;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->handles = mem_alloc(allocator, MAX_THREADS, sizeof *pool->handles, err);
    while (pool->handles && pool->threads < threads) {
        int bad = pthread_create(&pool->handles[pool->threads - 1], NULL, pool_worker, pool);
        if (bad) { fail(err, "cannot start thread %d: %s", pool->threads, strerror(bad)); break; }
        pool->threads++;
    }
    if (!pool->handles || pool->threads < threads) { pool_close(pool); return NULL; }
    return pool;
}

// =================================================================================================
//  2. Numbers: bf16, NF4, double quantisation
//
//  A weight of a 7B model costs 28 GB in float32, 14 in bf16, 3.6 in NF4: that is why QLoRA fits.
//  bf16 is a float32 with its lower 16 bits cut off. NF4 stores, for 64 weights at a time, their
//  largest magnitude and for each weight the nearest of 16 fixed levels, which lie where normally
//  distributed weights are equally likely to fall. The frozen weights are read through these
//  formats and never updated; what is trained stays float32.
// =================================================================================================

static uint32_t float_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
static float bits_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

static float bf16_to_float(uint16_t h) { return bits_float((uint32_t)h << 16); }

// Round to nearest, ties to even; a NaN stays one (its payload's upper bit is set).
static uint16_t float_to_bf16(float x) {
    uint32_t u = float_bits(x);
    uint32_t rounded = u + 0x7FFF + (u >> 16 & 1);
    return (uint16_t)((u & 0x7FFFFFFF) > 0x7F800000 ? u >> 16 | 0x40 : rounded >> 16);
}

static float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 0x3FF;
    if (exponent == 31) return bits_float(sign | 0x7F800000 | fraction << 13);
    if (exponent) return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
    float value = (float)fraction * 0x1p-24f;                 // subnormal: fraction * 2^-24, exact
    return sign ? -value : value;
}

// Activations are real or bf16; rows are widened on the way in and rounded once on the way out.
static size_t act_size(DType act) { return act == DT_BF16 ? 2 : sizeof(real); }

static void *act_at(DType act, const void *base, size_t index) {
    return (char *)(uintptr_t)base + index * act_size(act);
}

static void load_row(real *row, DType act, const void *base, size_t index, size_t n) {
    if (act == DT_BF16) {
        const uint16_t *from = (const uint16_t *)base + index;
        for (size_t i = 0; i < n; i++) row[i] = bf16_to_float(from[i]);
    } else memcpy(row, (const real *)base + index, n * sizeof(real));
}

static void store_row(DType act, void *base, size_t index, const real *row, size_t n) {
    if (act == DT_BF16) {
        uint16_t *to = (uint16_t *)base + index;
        for (size_t i = 0; i < n; i++) to[i] = float_to_bf16((float)row[i]);
    } else memcpy((real *)base + index, row, n * sizeof(real));
}

// A value as a matrix multiplication sees it: rounded to the compute type.
static real as_act(DType act, real x) {
    return act == DT_BF16 ? bf16_to_float(float_to_bf16((float)x)) : x;
}

// ------------------------------------------------------------------------------ NF4 and FP4 blocks

// The levels (QLoRA, appendix E): quantiles of the normal distribution, scaled to [-1, 1], with an
// exact zero. The thresholds are their midpoints in float32, as bitsandbytes' CPU code forms them
// (a few of its CUDA constants differ in the last bit): x above one means the next level, x equal
// to it the lower.
static const float nf4_levels[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

const float qlora_nf4_thresholds[15] = {
    -0.848096371f, -0.610632896f, -0.45999527f, -0.33967942f, -0.234607399f, -0.137911737f,
    -0.0455250181f, 0.0397901498f, 0.120255247f, 0.203521252f, 0.292013764f, 0.389312536f,
    0.501663446f, 0.64278692f, 0.861478448f};

// FP4: a sign bit and eight magnitudes whose codes are not in order of size.
static const float fp4_levels[16] = {
    0.0f, 0.00520833349f, 0.666666687f, 1.0f, 0.333333343f, 0.5f, 0.166666672f, 0.25f, 0.0f,
    -0.00520833349f, -0.666666687f, -1.0f, -0.333333343f, -0.5f, -0.166666672f, -0.25f};
const float qlora_fp4_thresholds[7] = {
    0.00260416674f, 0.0859375f, 0.208333343f, 0.291666687f, 0.416666687f, 0.583333373f,
    0.833333373f};
const uint8_t qlora_fp4_by_size[8] = {0, 1, 6, 7, 4, 5, 2, 3};     // by ascending magnitude

// The level of x in -1..1 is the number of thresholds below it. Thresholds outside, values inside:
// a loop that compilers turn into vector code.
static void nf4_codes(uint8_t *codes, const float *x, size_t n) {
    int32_t level[QUANT_BLOCK] = {0};
    for (int k = 0; k < 15; k++)
        for (size_t i = 0; i < n; i++) level[i] += x[i] > qlora_nf4_thresholds[k];
    for (size_t i = 0; i < n; i++) codes[i] = (uint8_t)level[i];
}

// Like NF4's, ties go to the lower value, which is the larger magnitude of a negative one.
static void fp4_codes(uint8_t *codes, const float *x, size_t n) {
    for (size_t i = 0; i < n; i++) {
        int rank = 0;
        for (int k = 0; k < 7; k++)
            rank += x[i] < 0 ? -x[i] >= qlora_fp4_thresholds[k] : x[i] > qlora_fp4_thresholds[k];
        codes[i] = (uint8_t)(qlora_fp4_by_size[rank] | (x[i] < 0 ? 8 : 0));
    }
}

// Quantises n values (at most 64) to (n + 1) / 2 bytes and their scale. bitsandbytes multiplies a
// full block by the float32 reciprocal of its largest magnitude, and divides in a short last one.
static float quantize_block(uint8_t *packed, const float *x, size_t n, DType type) {
    const float smallest = 1e-38f;          // keeps a block of zeros dividable
    float absmax = 0, scaled[QUANT_BLOCK];
    uint8_t codes[QUANT_BLOCK + 1] = {0};
    bool full = n == QUANT_BLOCK;
    for (size_t i = 0; i < n; i++) absmax = fabsf(x[i]) > absmax ? fabsf(x[i]) : absmax;
    float divisor = absmax > smallest ? absmax : smallest, reciprocal = 1.0f / divisor;
    for (size_t i = 0; i < n; i++) {
        float s = full ? x[i] * reciprocal : x[i] / divisor;
        s = s > -1.0f ? s : -1.0f;
        scaled[i] = s < 1.0f ? s : 1.0f;
    }
    if (type == DT_NF4) nf4_codes(codes, scaled, n);
    else fp4_codes(codes, scaled, n);
    codes[n] = type == DT_NF4 ? 7 : 0;      // an odd tail's partner is the value 0
    for (size_t i = 0; i < n; i += 2) packed[i / 2] = (uint8_t)(codes[i] << 4 | codes[i + 1]);
    return full ? absmax : divisor;
}

// ----------------------------------------------------------------------------- double quantisation

// The 256 levels scales are quantised to (Dettmers 2015, dynamic 8-bit type, signed): for each
// power of ten from 1e-6 to 1 the means of neighbouring points of 2^i equal intervals of [0.1, 1],
// their negatives, 0 and 1. PyTorch forms the points from the nearer end, with one rounding (a
// fused multiply-add); double arithmetic rounded once is the same.
static void dynamic_map(float map[256]) {
    const float start = 0.1f, end = 1.0f;
    size_t n = 128;
    map[127] = 0;
    for (int i = 0; i < 7; i++) {
        int intervals = 1 << i;
        float step = (end - start) / (float)intervals, before = start;
        for (int k = 1; k <= intervals; k++) {
            bool low = k < (intervals + 1) / 2;
            float point = low ? (float)((double)start + (double)step * k)
                              : (float)((double)end - (double)step * (intervals - k));
            map[n++] = (float)pow(10, i - 6) * ((before + point) / 2);
            before = point;
        }
    }
    map[255] = 1.0f;
    for (size_t i = 128; i < 255; i++) map[254 - i] = -map[i];
}

// Index of the level nearest to x; x halfway between two goes to the lower.
static uint8_t nearest_level(const float map[256], float x) {
    int low = 0, high = 255;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (x > map[middle]) low = middle;
        else high = middle;
    }
    return (uint8_t)(x > (map[low] + map[high]) / 2 ? high : low);
}

// Scales (n) to 8-bit codes (n), one float32 per 256 of them, and their common offset, the mean.
// The mean is summed in double, in pieces so that a GPU can do the same, and rounded once;
// bitsandbytes sums in float32 in an order of its own, so the offset's last bit may differ from its
// files.
static float quantize_scales(Device *dev, uint8_t *codes, float *absmax2, const float *absmax,
                             size_t n, const float *map) {
    double sum = 0;
    (void)dev;
    for (size_t start = 0; start < n; start += SCALE_SUM) {
        double piece = 0;
        for (size_t i = start; i < min_size(n, start + SCALE_SUM); i++) piece += (double)absmax[i];
        sum += piece;
    }
    float offset = (float)(sum / (double)n);
    for (size_t start = 0; start < n; start += SCALE_BLOCK) {
        size_t end = min_size(start + SCALE_BLOCK, n);
        float largest = 0;
        for (size_t i = start; i < end; i++) largest = fmaxf(largest, fabsf(absmax[i] - offset));
        absmax2[start / SCALE_BLOCK] = largest;
        for (size_t i = start; i < end; i++) {
            float scaled = (absmax[i] - offset) * (1.0f / fmaxf(largest, 1e-38f));
            // All scales equal: bitsandbytes divides 0 by 0 and lands on code 0; so do we.
            codes[i] = largest > 0 ? nearest_level(map, fminf(fmaxf(scaled, -1.0f), 1.0f)) : 0;
        }
    }
    return offset;
}

// ---------------------------------------------------------------------------------------- reading

static bool is_4bit(DType type) { return type == DT_NF4 || type == DT_FP4; }

static size_t dtype_size(DType type) {
    return type == DT_F32 ? 4 : type == DT_REAL ? sizeof(real) : type == DT_OTHER ? 0 : 2;
}

static float block_scale(const Weight *w, size_t block) {
    if (w->absmax) return w->absmax[block];
    return w->code8[w->absmax8[block]] * w->absmax2[block / SCALE_BLOCK] + w->offset;
}

// n values of a row from column k on, widened. 4-bit values are level * scale in float32; with bf16
// compute every type is rounded to bf16, as bitsandbytes dequantises to its compute type.
static void weight_row(real *out, const Weight *w, size_t row, size_t k, size_t n, DType act) {
    size_t index = row * w->K + k;
    if (is_4bit(w->dtype)) {
        const uint8_t *packed = w->data;
        for (size_t i = 0; i < n;) {
            size_t end = min_size(n, i + QUANT_BLOCK - (index + i) % QUANT_BLOCK);
            float scale = block_scale(w, (index + i) / QUANT_BLOCK);
            for (; i < end; i++) {
                size_t at = index + i;
                unsigned nibble = at % 2 ? packed[at / 2] & 15u : packed[at / 2] >> 4;
                out[i] = as_act(act, w->code[nibble] * scale);
            }
        }
        return;
    }
    for (size_t i = 0; i < n; i++) {
        float value = w->dtype == DT_F32 ? ((const float *)w->data)[index + i]
                    : w->dtype == DT_F16 ? f16_to_float(((const uint16_t *)w->data)[index + i])
                                         : bf16_to_float(((const uint16_t *)w->data)[index + i]);
        out[i] = as_act(act, value);
    }
}
// =================================================================================================
//  3. Kernels: each operation forward, then at once backward
//
//  These are the plain versions: one loop nest per formula, the specification that the fast kernels
//  of chapter 18 and of qlora.cu are compared with. Rows are independent of each other (a row is a
//  token), so a task is a row or a feature and no sum is ever split between threads.
// =================================================================================================

static real *thread_rows(const Device *dev, int thread) {
    return (real *)(void *)(dev->thread_scratch + (size_t)thread * dev->thread_size);
}

enum { ROWS_PER_TASK = 8 };

// exp without a library call, so that loops over it become vector code and its bits are the same
// everywhere: 2^n * e^r with n = round(x / ln 2), |r| <= ln 2 / 2; relative error below 2e-7.
static inline float exp_float(float x) {
    x = x > 88.0f ? 88.0f : x;                                // a NaN fails both and stays one
    x = x < -87.0f ? -87.0f : x;
    const float shift = 12582912.0f;                      // 1.5 * 2^23: adding it rounds to integer
    float shifted = x * 1.44269504f + shift, n = shifted - shift;
    float r = x - n * 0.693145752f - n * 1.42860677e-6f;      // ln 2 in two parts
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * bits_float((float_bits(shifted) - float_bits(shift) + 127) << 23);
}

static inline real exp_real(real x) {
#if REAL_IS_DOUBLE
    return exp(x);
#else
    return exp_float(x);
#endif
}

// ------------------------------------------------------------------------------------- embedding

typedef struct { Device *dev; void *h; const Weight *table; const int32_t *ids; } EmbedTask;

static void embed_task(void *arguments, size_t t, int thread) {
    EmbedTask *a = arguments;
    real *row = thread_rows(a->dev, thread);
    size_t D = a->table->K;
    weight_row(row, a->table, (size_t)a->ids[t], 0, D, a->dev->act);
    store_row(a->dev->act, a->h, t * D, row, D);
}

static void embed(Device *dev, void *h, const Weight *table, const int32_t *ids, size_t T) {
    EmbedTask a = {dev, h, table, ids};
    parallel_for(dev->pool, T, embed_task, &a);
}

// ----------------------------------------------------------------------- residual add and RMS norm
//
// Zhang and Sennrich 2019. With n = 1 / sqrt(mean(x^2) + eps):   y_i = w_i x_i n

typedef struct {
    Device *dev;
    void *y, *sum;                  // (T, D) act
    const void *h, *a, *dy;         // (T, D) act
    real *dh;                       // (T, D)
    const float *w;                 // (D)
    size_t T, D;
    float eps;
} NormTask;

static real inverse_rms(const real *x, size_t D, float eps) {
    real squares = 0;
    for (size_t i = 0; i < D; i++) squares += x[i] * x[i];
    return 1 / (real)sqrt(squares / (real)D + (real)eps);
}

static void residual_norm_forward_task(void *arguments, size_t task, int thread) {
    NormTask *a = arguments;
    size_t D = a->D, last = min_size(a->T, (task + 1) * ROWS_PER_TASK);
    DType act = a->dev->act;
    real *x = thread_rows(a->dev, thread), *add = x + D;
    for (size_t t = task * ROWS_PER_TASK; t < last; t++) {
        load_row(x, act, a->h, t * D, D);
        if (a->a) {
            load_row(add, act, a->a, t * D, D);
            for (size_t i = 0; i < D; i++) x[i] += add[i];
        }
        store_row(act, a->sum, t * D, x, D);
        load_row(x, act, a->sum, t * D, D);                   // use what is saved, rounded
        real n = inverse_rms(x, D, a->eps);
        for (size_t i = 0; i < D; i++) x[i] *= n * (real)a->w[i];
        store_row(act, a->y, t * D, x, D);
    }
}

static void residual_norm_forward(Device *dev, void *y, void *sum, const void *h, const void *a,
                                  const float *w, size_t T, size_t D, float eps) {
    NormTask task = {dev, y, sum, h, a, NULL, NULL, w, T, D, eps};
    parallel_for(dev->pool, ceil_div(T, ROWS_PER_TASK), residual_norm_forward_task, &task);
}

// dn / dx_j = -n^3 x_j / D, hence   dx_j = n (w_j dy_j  -  x_j n^2 / D * sum_i w_i x_i dy_i)
static void residual_norm_backward_task(void *arguments, size_t task, int thread) {
    NormTask *a = arguments;
    size_t D = a->D, last = min_size(a->T, (task + 1) * ROWS_PER_TASK);
    DType act = a->dev->act;
    real *x = thread_rows(a->dev, thread), *dy = x + D;
    for (size_t t = task * ROWS_PER_TASK; t < last; t++) {
        real *dh = a->dh + t * D, dot = 0;
        load_row(x, act, a->h, t * D, D);
        load_row(dy, act, a->dy, t * D, D);
        real n = inverse_rms(x, D, a->eps);
        for (size_t i = 0; i < D; i++) dot += (real)a->w[i] * x[i] * dy[i];
        real pull = n * n * dot / (real)D;
        for (size_t i = 0; i < D; i++) dh[i] += n * ((real)a->w[i] * dy[i] - x[i] * pull);
        if (a->sum) store_row(act, a->sum, t * D, dh, D);
    }
}

static void residual_norm_backward(Device *dev, real *dh, void *da, const void *dy, const void *sum,
                                   const float *w, size_t T, size_t D, float eps) {
    NormTask task = {dev, NULL, da, sum, NULL, dy, dh, w, T, D, eps};
    parallel_for(dev->pool, ceil_div(T, ROWS_PER_TASK), residual_norm_backward_task, &task);
}

// ---------------------------------------------------------------------------------- LoRA linear
//
// The heart of QLoRA. W is frozen and 4-bit; only A and B learn:
//     1   x~ = dropout(x)                               (T, K)
//     2   u  = s x~ A^T                                 (T, r)
//     3   y  = x W^T + u B^T + bias                     (T, N)
// and, since W gets no gradient, backward is
//     1   du = s dy B                                   (T, r)
//     2   dB += dy^T u          dA += du^T x~           (N, r), (r, K)
//     3   dx = dy W + dropout(du A)                     (T, K)

// Multiplies the row of one token with its dropout mask: 0 or 1 / (1 - p).
static void dropout_row(real *row, size_t K, const Lora *lora, const Batch *batch, const Span *span,
                        size_t t) {
    uint32_t key[2] = {(uint32_t)batch->seed ^ (uint32_t)(batch->seed >> 32) * 0x9E3779B9u,
                       batch->step};
    uint32_t counter[4] = {0, (uint32_t)(t - span->q0), span->ordinal, lora->module}, bits[4];
    real keep = 1 / (1 - (real)lora->dropout);
    for (size_t k = 0; k < K; k++) {
        if (k % 4 == 0) {
            counter[0] = (uint32_t)(k / 4);
            philox(bits, counter, key);
        }
        row[k] *= unit_float(bits[k % 4]) < lora->dropout ? 0 : keep;
    }
}

static bool has_dropout(const Lora *lora, const Batch *batch) {
    return batch->training && lora->dropout > 0;
}

typedef struct {
    Device *dev;
    const Product *product;
    real *x, *masked, *dx;          // (T, K) x, x~ and dx; all are widened copies
    real *dy, *du;                  // (T, N), (T, r)
    real *logits;                   // (T, N) where y goes unrounded, for the head; else NULL
    const Batch *batch;
    size_t K;
} LinearTask;

// Forward 1: one token's x~, rounded as the multiplication will see it.
static void mask_task(void *arguments, size_t s, int thread) {
    LinearTask *a = arguments;
    const Lora *lora = &a->product->linear->lora;
    const Span *span = &a->batch->spans[s];
    (void)thread;
    for (size_t t = span->q0; t < span->q0 + span->nq; t++) {
        real *row = a->masked + t * a->K;
        memcpy(row, a->x + t * a->K, a->K * sizeof *row);
        if (has_dropout(lora, a->batch)) dropout_row(row, a->K, lora, a->batch, span, t);
        for (size_t k = 0; k < a->K; k++) row[k] = as_act(a->dev->act, row[k]);
    }
}

// Forward 2: column j of u.
static void lora_down_task(void *arguments, size_t j, int thread) {
    LinearTask *a = arguments;
    const Lora *lora = &a->product->linear->lora;
    (void)thread;
    for (size_t t = 0; t < a->batch->T; t++) {
        real sum = 0;
        for (size_t k = 0; k < a->K; k++)
            sum += a->masked[t * a->K + k] * as_act(a->dev->act, lora->A[j * a->K + k]);
        sum *= lora->scale;
        store_row(a->dev->act, a->product->u, t * lora->r + j, &sum, 1);
    }
}

// Forward 3: column n of y.
static void linear_column_task(void *arguments, size_t n, int thread) {
    LinearTask *a = arguments;
    const Linear *linear = a->product->linear;
    const Lora *lora = &linear->lora;
    size_t N = linear->weight.N, r = lora->r;
    real *w = thread_rows(a->dev, thread), *u = w + a->K;
    weight_row(w, &linear->weight, n, 0, a->K, a->dev->act);
    for (size_t t = 0; t < a->batch->T; t++) {
        real sum = 0;
        for (size_t k = 0; k < a->K; k++) sum += a->x[t * a->K + k] * w[k];
        if (r) load_row(u, a->dev->act, a->product->u, t * r, r);
        for (size_t j = 0; j < r; j++) sum += u[j] * as_act(a->dev->act, lora->B[n * r + j]);
        if (linear->bias) sum += (real)linear->bias[n];
        if (a->logits) a->logits[t * N + n] = sum;
        else store_row(a->dev->act, a->product->y, t * N + n, &sum, 1);
    }
}

static real *widen(Arena *scratch, DType act, const void *x, size_t n) {
    real *copy = arena_alloc(scratch, n, sizeof *copy);
    load_row(copy, act, x, 0, n);
    return copy;
}

static void linear_forward_plain(Device *dev, real *logits, const Product *product, const void *x,
                                 const Batch *batch) {
    const Linear *linear = product->linear;
    size_t K = linear->weight.K, T = batch->T;
    Arena scratch = {dev->scratch, 0};
    LinearTask a = {.dev = dev, .product = product, .batch = batch, .K = K, .logits = logits};
    a.x = widen(&scratch, dev->act, x, T * K);
    if (linear->lora.r) {
        a.masked = arena_alloc(&scratch, T * K, sizeof *a.masked);
        parallel_for(dev->pool, batch->n_spans, mask_task, &a);
        parallel_for(dev->pool, linear->lora.r, lora_down_task, &a);
    }
    parallel_for(dev->pool, linear->weight.N, linear_column_task, &a);
}

static void linears_forward_plain(Device *dev, Product *products, size_t n, const void *x,
                                  const Batch *batch) {
    for (size_t i = 0; i < n; i++) linear_forward_plain(dev, NULL, &products[i], x, batch);
}

// Backward 1: one token's du.
static void lora_du_task(void *arguments, size_t t, int thread) {
    LinearTask *a = arguments;
    const Lora *lora = &a->product->linear->lora;
    size_t N = a->product->linear->weight.N;
    (void)thread;
    for (size_t j = 0; j < lora->r; j++) {
        real sum = 0;
        for (size_t n = 0; n < N; n++)
            sum += a->dy[t * N + n] * as_act(a->dev->act, lora->B[n * lora->r + j]);
        a->du[t * lora->r + j] = as_act(a->dev->act, lora->scale * sum);
    }
}

// Backward 2, first half: row n of dB. Each sequence's sum is formed on its own, then added.
static void lora_db_task(void *arguments, size_t n, int thread) {
    LinearTask *a = arguments;
    const Lora *lora = &a->product->linear->lora;
    size_t N = a->product->linear->weight.N, r = lora->r;
    real *sum = thread_rows(a->dev, thread), *u = sum + r;
    for (size_t s = 0; s < a->batch->n_spans; s++) {
        const Span *span = &a->batch->spans[s];
        memset(sum, 0, r * sizeof *sum);
        for (size_t t = span->q0; t < span->q0 + span->nq; t++) {
            load_row(u, a->dev->act, a->product->u, t * r, r);
            for (size_t j = 0; j < r; j++) sum[j] += a->dy[t * N + n] * u[j];
        }
        for (size_t j = 0; j < r; j++) lora->dB[n * r + j] += sum[j];
    }
}

// Backward 2, second half: row j of dA.
static void lora_da_task(void *arguments, size_t j, int thread) {
    LinearTask *a = arguments;
    const Lora *lora = &a->product->linear->lora;
    real *sum = thread_rows(a->dev, thread);
    for (size_t s = 0; s < a->batch->n_spans; s++) {
        const Span *span = &a->batch->spans[s];
        memset(sum, 0, a->K * sizeof *sum);
        for (size_t t = span->q0; t < span->q0 + span->nq; t++)
            for (size_t k = 0; k < a->K; k++)
                sum[k] += a->du[t * lora->r + j] * a->masked[t * a->K + k];
        for (size_t k = 0; k < a->K; k++) lora->dA[j * a->K + k] += sum[k];
    }
}

// Backward 3, first half: dy W, a strip of 64 columns of dx.
static void linear_dx_task(void *arguments, size_t strip, int thread) {
    LinearTask *a = arguments;
    const Weight *weight = &a->product->linear->weight;
    size_t k = strip * 64, width = min_size(64, a->K - k);
    real *w = thread_rows(a->dev, thread);
    for (size_t n = 0; n < weight->N; n++) {
        weight_row(w, weight, n, k, width, a->dev->act);
        for (size_t t = 0; t < a->batch->T; t++)
            for (size_t i = 0; i < width; i++)
                a->dx[t * a->K + k + i] += a->dy[t * weight->N + n] * w[i];
    }
}

// Backward 3, second half: dropout(du A), for the tokens of one sequence.
static void lora_dx_task(void *arguments, size_t s, int thread) {
    LinearTask *a = arguments;
    const Lora *lora = &a->product->linear->lora;
    const Span *span = &a->batch->spans[s];
    real *row = thread_rows(a->dev, thread);
    for (size_t t = span->q0; t < span->q0 + span->nq; t++) {
        memset(row, 0, a->K * sizeof *row);
        for (size_t j = 0; j < lora->r; j++)
            for (size_t k = 0; k < a->K; k++)
                row[k] += a->du[t * lora->r + j] * as_act(a->dev->act, lora->A[j * a->K + k]);
        if (has_dropout(lora, a->batch)) dropout_row(row, a->K, lora, a->batch, span, t);
        for (size_t k = 0; k < a->K; k++) a->dx[t * a->K + k] += row[k];
    }
}

// Everything one product adds: to dA, dB and, unless it is NULL, to dx (T, K).
static void linear_backward_plain(Device *dev, real *dx, const Product *product, const void *x,
                                  const Batch *batch) {
    const Linear *linear = product->linear;
    size_t K = linear->weight.K, T = batch->T, r = linear->lora.r;
    Arena scratch = {dev->scratch, 0};
    LinearTask a = {.dev = dev, .product = product, .batch = batch, .K = K, .dx = dx};
    a.dy = widen(&scratch, dev->act, product->y, T * linear->weight.N);
    if (r) {
        a.x = widen(&scratch, dev->act, x, T * K);
        a.masked = arena_alloc(&scratch, T * K, sizeof *a.masked);
        a.du = arena_alloc(&scratch, T * r, sizeof *a.du);
        parallel_for(dev->pool, batch->n_spans, mask_task, &a);
        parallel_for(dev->pool, T, lora_du_task, &a);
        parallel_for(dev->pool, linear->weight.N, lora_db_task, &a);
        parallel_for(dev->pool, r, lora_da_task, &a);
    }
    if (!dx) return;
    parallel_for(dev->pool, ceil_div(K, 64), linear_dx_task, &a);
    if (r) parallel_for(dev->pool, batch->n_spans, lora_dx_task, &a);
}

static void linears_backward_plain(Device *dev, void *dx, const Product *products, size_t n,
                                   const void *x, const Batch *batch) {
    size_t K = products[0].linear->weight.K, T = batch->T;
    real *sum = dx ? (real *)(void *)(dev->scratch + dev->scratch_size) - T * K : NULL;
    if (sum) memset(sum, 0, T * K * sizeof *sum);
    for (size_t i = 0; i < n; i++) linear_backward_plain(dev, sum, &products[i], x, batch);
    if (dx) store_row(dev->act, dx, 0, sum, T * K);
}

// ------------------------------------------------------------------------------------------ RoPE
//
// Rotary position embedding (Su 2021), rotate-half layout: features i and i + hd/2 of a head are a
// point of the plane, turned by the angle position * frequency[i]. Backward turns the other way.

typedef struct {
    Device *dev;
    void *x;                        // (T, heads, hd) act
    size_t heads, hd;
    const float *frequency;         // (hd / 2)
    int sign;
    const Batch *batch;
} RopeTask;

static void rope_task(void *arguments, size_t t, int thread) {
    RopeTask *a = arguments;
    size_t half = a->hd / 2, width = a->heads * a->hd;
    real *row = thread_rows(a->dev, thread), *cosine = row + width, *sine = cosine + half;
    for (size_t i = 0; i < half; i++) {
        // The angle is rounded to float32 as the reference does, then taken exactly.
        real angle = (real)((float)a->batch->position[t] * a->frequency[i]);
        cosine[i] = (real)cos((double)angle);
        sine[i] = (real)sin((double)angle) * (real)a->sign;
    }
    load_row(row, a->dev->act, a->x, t * width, width);
    for (real *head = row; head < row + width; head += a->hd)
        for (size_t i = 0; i < half; i++) {
            real x = head[i], y = head[i + half];
            head[i] = x * cosine[i] - y * sine[i];
            head[i + half] = y * cosine[i] + x * sine[i];
        }
    store_row(a->dev->act, a->x, t * width, row, width);
}

static void rope(Device *dev, void *x, size_t heads, size_t hd, const float *frequency, int sign,
                 const Batch *batch) {
    RopeTask a = {dev, x, heads, hd, frequency, sign, batch};
    parallel_for(dev->pool, batch->T, rope_task, &a);
}

// Where a cache holds the keys and values of earlier tokens, the new rows go behind them.
static void append_keys(Device *dev, void *keys, void *values, const void *k, const void *v,
                        size_t width, const Batch *batch) {
    for (const Span *s = batch->spans; s < batch->spans + batch->n_spans; s++) {
        size_t to = (s->k0 + s->nk - s->nq) * width, bytes = s->nq * width * act_size(dev->act);
        memcpy(act_at(dev->act, keys, to), act_at(dev->act, k, s->q0 * width), bytes);
        memcpy(act_at(dev->act, values, to), act_at(dev->act, v, s->q0 * width), bytes);
    }
}

// ------------------------------------------------------------------------------------- attention
//
// Causal, grouped-query (Ainslie 2023), over sequences laid end to end: a query sees the keys of
// its own sequence up to its own place, and with a window only the last `window` of them.
//     1   s_j = scale q . k_j            2   p = softmax(s), lse = log sum exp s
//     3   out = sum_j p_j v_j

typedef struct {
    Device *dev;
    void *out, *dq, *dk, *dv;       // act: those of q (T, H, hd), those of k and v (.., G, hd)
    const void *q, *k, *v, *dout;
    real *lse;                      // (T, H)
    AttentionShape shape;
    const Batch *batch;
} AttentionTask;

// First and one past the last key that query number i (of span->nq) sees.
static size_t first_key(const Span *span, size_t i, size_t window) {
    size_t end = span->nk - span->nq + i + 1;
    return window && end > window ? end - window : 0;
}
static size_t end_key(const Span *span, size_t i) { return span->nk - span->nq + i + 1; }

static real dot_rows(const real *a, const real *b, size_t n) {
    real sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// A task is one head of one sequence.
static void attention_forward_task(void *arguments, size_t task, int thread) {
    AttentionTask *a = arguments;
    size_t H = a->shape.H, G = a->shape.G, hd = a->shape.hd, head = task % H,
           group = head / (H / G);
    const Span *span = &a->batch->spans[task / H];
    DType act = a->dev->act;
    real *q = thread_rows(a->dev, thread), *out = q + hd, *row = out + hd, *p = row + hd;
    for (size_t i = 0; i < span->nq; i++) {
        size_t first = first_key(span, i, a->shape.window), end = end_key(span, i);
        real largest = -INFINITY, sum = 0;
        load_row(q, act, a->q, ((span->q0 + i) * H + head) * hd, hd);
        for (size_t j = first; j < end; j++) {                                     // 1
            load_row(row, act, a->k, ((span->k0 + j) * G + group) * hd, hd);
            p[j] = a->shape.scale * dot_rows(q, row, hd);
            if (!(p[j] <= largest)) largest = p[j];
        }
        memset(out, 0, hd * sizeof *out);
        for (size_t j = first; j < end; j++) {                                     // 2, 3
            real e = exp_real(p[j] - largest);
            sum += e;
            load_row(row, act, a->v, ((span->k0 + j) * G + group) * hd, hd);
            for (size_t d = 0; d < hd; d++) out[d] += e * row[d];
        }
        for (size_t d = 0; d < hd; d++) out[d] /= sum;
        store_row(act, a->out, ((span->q0 + i) * H + head) * hd, out, hd);
        a->lse[(span->q0 + i) * H + head] = largest + (real)log(sum);
    }
}

static void attention_forward_plain(Device *dev, void *out, real *lse, const void *q, const void *k,
                                    const void *v, AttentionShape shape, const Batch *batch) {
    AttentionTask a = {.dev = dev, .out = out, .lse = lse, .q = q, .k = k, .v = v, .shape = shape,
                       .batch = batch};
    parallel_for(dev->pool, batch->n_spans * shape.H, attention_forward_task, &a);
}

// With p_j = exp(s_j - lse):
//     3   dv_j += p_j dout              dp_j = dout . v_j
//     2   ds_j = p_j (dp_j - sum_i p_i dp_i),    and that sum is dout . out
//     1   dq = scale sum_j ds_j k_j     dk_j += scale ds_j q
// A task is one key/value head of one sequence with all the query heads that share it, so that dk
// and dv are summed by one thread, head after head.
static void attention_backward_task(void *arguments, size_t task, int thread) {
    AttentionTask *a = arguments;
    size_t H = a->shape.H, G = a->shape.G, hd = a->shape.hd, group = task % G;
    const Span *span = &a->batch->spans[task / G];
    DType act = a->dev->act;
    real *q = thread_rows(a->dev, thread), *dq = q + hd, *out = dq + hd, *dout = out + hd;
    real *k = dout + hd, *v = k + hd, *dk = v + hd, *dv = dk + span->nk * hd;
    memset(dk, 0, 2 * span->nk * hd * sizeof *dk);
    for (size_t head = group * (H / G); head < (group + 1) * (H / G); head++)
        for (size_t i = 0; i < span->nq; i++) {
            size_t at = ((span->q0 + i) * H + head) * hd;
            load_row(q, act, a->q, at, hd);
            load_row(out, act, a->out, at, hd);
            load_row(dout, act, a->dout, at, hd);
            memset(dq, 0, hd * sizeof *dq);
            real expected = dot_rows(dout, out, hd), lse = a->lse[(span->q0 + i) * H + head];
            for (size_t j = first_key(span, i, a->shape.window); j < end_key(span, i); j++) {
                load_row(k, act, a->k, ((span->k0 + j) * G + group) * hd, hd);
                load_row(v, act, a->v, ((span->k0 + j) * G + group) * hd, hd);
                real p = exp_real(a->shape.scale * dot_rows(q, k, hd) - lse);
                real ds = a->shape.scale * p * (dot_rows(dout, v, hd) - expected);
                for (size_t d = 0; d < hd; d++) {
                    dv[j * hd + d] += p * dout[d];
                    dk[j * hd + d] += ds * q[d];
                    dq[d] += ds * k[d];
                }
            }
            store_row(act, a->dq, at, dq, hd);
        }
    for (size_t j = 0; j < span->nk; j++) {
        store_row(act, a->dk, ((span->k0 + j) * G + group) * hd, dk + j * hd, hd);
        store_row(act, a->dv, ((span->k0 + j) * G + group) * hd, dv + j * hd, hd);
    }
}

static void attention_backward_plain(Device *dev, void *dq, void *dk, void *dv, const void *dout,
                                     const void *q, const void *k, const void *v, const void *out,
                                     const real *lse, AttentionShape shape, const Batch *batch) {
    AttentionTask a = {dev, (void *)(uintptr_t)out, dq, dk, dv, q, k, v, dout,
                       (real *)(uintptr_t)lse, shape, batch};
    parallel_for(dev->pool, batch->n_spans * shape.G, attention_backward_task, &a);
}

// ---------------------------------------------------------------------------------------- SwiGLU
//
// Shazeer 2020:   y = silu(g) u,   silu(g) = g sigma(g),   sigma(g) = 1 / (1 + exp(-g))

typedef struct {
    Device *dev;
    void *y, *dgate, *dup;          // (T, F) act
    const void *gate, *up, *dy;     // (T, F) act
    size_t F;
} SwigluTask;

static void swiglu_forward_task(void *arguments, size_t t, int thread) {
    SwigluTask *a = arguments;
    size_t F = a->F;
    DType act = a->dev->act;
    real *g = thread_rows(a->dev, thread), *u = g + F;
    load_row(g, act, a->gate, t * F, F);
    load_row(u, act, a->up, t * F, F);
    for (size_t i = 0; i < F; i++) u[i] *= g[i] / (1 + exp_real(-g[i]));
    store_row(act, a->y, t * F, u, F);
}

static void swiglu_forward(Device *dev, void *y, const void *gate, const void *up, size_t T,
                           size_t F) {
    SwigluTask a = {.dev = dev, .y = y, .gate = gate, .up = up, .F = F};
    parallel_for(dev->pool, T, swiglu_forward_task, &a);
}

// dup = dy silu(g),   dg = dy u (sigma + g sigma (1 - sigma)). dgate and dup may be gate and up.
static void swiglu_backward_task(void *arguments, size_t t, int thread) {
    SwigluTask *a = arguments;
    size_t F = a->F;
    DType act = a->dev->act;
    real *g = thread_rows(a->dev, thread), *u = g + F, *dy = u + F;
    load_row(g, act, a->gate, t * F, F);
    load_row(u, act, a->up, t * F, F);
    load_row(dy, act, a->dy, t * F, F);
    for (size_t i = 0; i < F; i++) {
        real sigma = 1 / (1 + exp_real(-g[i])), dsilu = sigma * (1 + g[i] * (1 - sigma));
        real up = u[i];
        u[i] = dy[i] * g[i] * sigma;
        g[i] = dy[i] * up * dsilu;
    }
    store_row(act, a->dgate, t * F, g, F);
    store_row(act, a->dup, t * F, u, F);
}

static void swiglu_backward(Device *dev, void *dgate, void *dup, const void *dy, const void *gate,
                            const void *up, size_t T, size_t F) {
    SwigluTask a = {dev, NULL, dgate, dup, gate, up, dy, F};
    parallel_for(dev->pool, T, swiglu_backward_task, &a);
}

// ----------------------------------------------------------------------------- gather and scatter

static void gather(Device *dev, void *out, const void *x, const int32_t *index, size_t n,
                   size_t D) {
    size_t bytes = D * act_size(dev->act);
    for (size_t i = 0; i < n; i++)
        memcpy((char *)out + i * bytes, (const char *)x + (size_t)index[i] * bytes, bytes);
}

static void scatter(Device *dev, real *dh, const real *dout, const int32_t *index, size_t n,
                    size_t T, size_t D) {
    (void)dev;
    memset(dh, 0, T * D * sizeof *dh);
    for (size_t i = 0; i < n; i++)
        memcpy(dh + (size_t)index[i] * D, dout + i * D, D * sizeof *dh);
}

// ---------------------------------------------------------------------- output head, cross-entropy
//
// The head is a linear whose logits stay unrounded and are only ever held for a slice of the
// vocabulary. Over slices the softmax is kept as a running maximum and a running sum of
// exp(z - max).
//     nll = log sum exp z - z_target         dz = softmax(z) - onehot(target)

static void head_logits_plain(Device *dev, real *logits, const Product *slice, const void *x,
                              const Batch *rows) {
    linear_forward_plain(dev, logits, slice, x, rows);
}

static void head_backward_plain(Device *dev, real *dx, const Product *slice, const void *x,
                                const Batch *rows) {
    linear_backward_plain(dev, dx, slice, x, rows);
}

typedef struct {
    Device *dev;
    void *dlogits;                  // (S, C) act
    const real *logits;             // (S, C)
    real *max, *sum, *chosen;       // (S) each
    const int32_t *target;          // (S)
    real scale;
    size_t first, C;                // the slice of the vocabulary
} CrossEntropyTask;

static void cross_entropy_forward_task(void *arguments, size_t s, int thread) {
    CrossEntropyTask *a = arguments;
    const real *z = a->logits + s * a->C;
    real largest = a->first ? a->max[s] : -(real)INFINITY, sum = 0;
    size_t target = (size_t)a->target[s];
    (void)thread;
    for (size_t v = 0; v < a->C; v++)
        if (!(z[v] <= largest)) largest = z[v];                       // a NaN gets through
    for (size_t v = 0; v < a->C; v++) sum += exp_real(z[v] - largest);
    a->sum[s] = (a->first ? a->sum[s] * exp_real(a->max[s] - largest) : 0) + sum;
    a->max[s] = largest;
    if (target >= a->first && target < a->first + a->C) a->chosen[s] = z[target - a->first];
}

static void cross_entropy_forward(Device *dev, real *max, real *sum, real *chosen,
                                  const real *logits, const int32_t *target, size_t first, size_t C,
                                  size_t S) {
    CrossEntropyTask a = {dev, NULL, logits, max, sum, chosen, target, 0, first, C};
    parallel_for(dev->pool, S, cross_entropy_forward_task, &a);
}

static void cross_entropy_end(Device *dev, real *nll, uint8_t *hit, double *total, const real *max,
                              const real *sum, const real *chosen, size_t S) {
    (void)dev;
    for (size_t s = 0; s < S; s++) {
        nll[s] = max[s] - chosen[s] + (real)log(sum[s]);
        hit[s] = chosen[s] >= max[s];
        if (total) *total += (double)nll[s];
    }
}

static void cross_entropy_backward_task(void *arguments, size_t s, int thread) {
    CrossEntropyTask *a = arguments;
    const real *z = a->logits + s * a->C;
    real *dz = thread_rows(a->dev, thread), inverse = 1 / a->sum[s];
    size_t target = (size_t)a->target[s];
    for (size_t v = 0; v < a->C; v++) dz[v] = a->scale * inverse * exp_real(z[v] - a->max[s]);
    if (target >= a->first && target < a->first + a->C) dz[target - a->first] -= a->scale;
    store_row(a->dev->act, a->dlogits, s * a->C, dz, a->C);
}

static void cross_entropy_backward(Device *dev, void *dlogits, const real *logits, const real *max,
                                   const real *sum, const int32_t *target, real scale, size_t first,
                                   size_t C, size_t S) {
    CrossEntropyTask a = {
        dev,   dlogits, logits, (real *)(uintptr_t)max, (real *)(uintptr_t)sum, NULL, target,
        scale, first,   C};
    parallel_for(dev->pool, S, cross_entropy_backward_task, &a);
}

static void round_rows(Device *dev, void *y, const real *x, size_t n) {
    store_row(dev->act, y, 0, x, n);
}

// ------------------------------------------------------------------ memory, and the plain op table
//
// On the CPU the device's memory is the program's own: nothing needs to be copied, nothing fails
// later.

static void *host_allocate(Device *dev, size_t bytes, qlora_error *err) {
    // The arenas begin at a multiple of 256; what was moved is remembered in front.
    char *p = mem_reserve(dev->allocator, bytes + 512, 1, err);
    if (!p) return NULL;
    char *aligned = p + 256 - (uintptr_t)p % 256;
    memcpy(aligned - sizeof p, &p, sizeof p);
    return aligned;
}

static void host_release(Device *dev, void *memory, size_t bytes) {
    char *p;
    if (!memory) return;
    memcpy(&p, (char *)memory - sizeof p, sizeof p);
    mem_free(dev->allocator, p, bytes + 512, 1);
}

// Bytes of memory nobody uses now.
static size_t host_available(Device *dev) {
    size_t kib = 0;
    FILE *file = fopen("/proc/meminfo", "re");
    char line[128];
    (void)dev;
    while (file && !kib && fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %zu kB", &kib) != 1) kib = 0;
    if (file) fclose(file);
    if (kib) return kib * 1024;
    return (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE) / 2;
}

static void host_copy(Device *dev, void *to, const void *from, size_t bytes) {
    (void)dev;
    if (bytes) memcpy(to, from, bytes);
}

static void host_zero(Device *dev, void *memory, size_t bytes) {
    (void)dev;
    memset(memory, 0, bytes);
}

static int host_check(Device *dev, qlora_error *err) { (void)dev; (void)err; return 0; }

static void no_prefetch(Device *dev, const Weight *weight) { (void)dev; (void)weight; }

static void call_step(Device *dev, void **record, void (*step)(void *user), void *user) {
    (void)dev;
    (void)record;
    step(user);
}

static void no_record(Device *dev, void *record) { (void)dev; (void)record; }

// Chapters 5, 10, 13 and 15 hold the ops that belong there.
static void clip_gradient(Device *dev, StepRecord *record, const StepRecord *before, const real *g,
                          size_t n, real most);
static void adamw(Device *dev, real *p, const real *g, real *m, real *v, size_t n, real lr,
                  real beta1, real beta2, real eps, real decay, const StepRecord *record,
                  size_t step);
static void quantize_values(Device *dev, uint8_t *packed, float *absmax, const void *raw,
                            DType from, DType to, size_t n);
static void low_rank(Device *dev, real *delta, const real *B, const real *A, real s, size_t rows,
                     size_t K, size_t r);
static void next_token(Device *dev, real *logits, const Sequence *s, size_t V);

static void plain_scratch(Device *dev, const OpSizes *s) {
    size_t width = max_size(s->D, s->F), rows = max_size(s->T, s->S);
    size_t out = max_size(s->T * width, s->S * s->V_chunk);
    dev->scratch_size = round_up((3 * rows * width + out + rows * s->max_r) * sizeof(real) + 512,
                                 64);
    size_t attention = 8 * s->hd + (2 * s->hd + 1) * s->max_span;
    size_t row = max_size(3 * width, s->V_chunk) + 2 * s->max_r;
    dev->thread_size = round_up((max_size(attention, row) + s->D) * sizeof(real), 64);
}

// What every CPU op table has in common; the fast one of chapter 18 replaces the rest.
#define HOST_OPS                                                                                   \
    .host = true, .allocate = host_allocate, .release = host_release,                              \
    .available = host_available, .upload = host_copy, .download = host_copy, .zero = host_zero,    \
    .check = host_check, .quantize = quantize_values, .quantize_scales = quantize_scales,          \
    .low_rank = low_rank, .prefetch = no_prefetch, .append_keys = append_keys,                     \
    .gather = gather, .scatter = scatter, .cross_entropy_end = cross_entropy_end,                  \
    .clip_gradient = clip_gradient, .adamw = adamw, .next_token = next_token,                      \
    .replay = call_step, .forget = no_record

// Used by the tests, which compare the others with it.
__attribute__((unused)) static const Ops plain_ops = {
    HOST_OPS, .scratch = plain_scratch, .embed = embed,
    .residual_norm_forward = residual_norm_forward,
    .residual_norm_backward = residual_norm_backward, .linears_forward = linears_forward_plain,
    .linears_backward = linears_backward_plain, .rope = rope,
    .attention_forward = attention_forward_plain, .attention_backward = attention_backward_plain,
    .swiglu_forward = swiglu_forward, .swiglu_backward = swiglu_backward,
    .head_logits = head_logits_plain, .head_backward = head_backward_plain,
    .cross_entropy_forward = cross_entropy_forward,
    .cross_entropy_backward = cross_entropy_backward, .round_rows = round_rows};

static const Ops fast_ops;          // chapter 18

static void upload(Device *dev, const void *to, const void *host, size_t bytes) {
    dev->ops->upload(dev, (void *)(uintptr_t)to, host, bytes);
}

// What the host sees of the device's memory: itself, or a copy in `room`.
static const void *seen(Device *dev, void *room, const void *memory, size_t bytes) {
    if (dev->ops->host) return memory;
    dev->ops->download(dev, room, memory, bytes);
    return room;
}
// =================================================================================================
//  4. The transformer: one forward, one backward, for every architecture and device
//
//  A layer turns the residual stream h into  mid = h + attention(norm(h))  and then into
//  mid + mlp(norm(mid)). What an architecture does differently is data: which linears have a bias,
//  which layers a window, what the rotation frequencies are.
// =================================================================================================

enum { LINEAR_Q, LINEAR_K, LINEAR_V, LINEAR_O, LINEAR_GATE, LINEAR_UP, LINEAR_DOWN, N_LINEARS };

// Linears that read the same input, in the order in which forward meets them.
enum { GROUP_QKV, GROUP_O, GROUP_GATE_UP, GROUP_DOWN, N_GROUPS };
static const struct { int first, count; } linear_groups[N_GROUPS] = {
    {LINEAR_Q, 3}, {LINEAR_O, 1}, {LINEAR_GATE, 2}, {LINEAR_DOWN, 1}};

typedef struct {
    const float *attention_norm, *mlp_norm; // (D) each
    Linear linear[N_LINEARS];
    size_t window;                          // keys a query sees; 0: all before it
} Layer;

typedef struct Architecture Architecture;   // chapter 10

typedef struct {
    const Architecture *architecture;
    size_t D, F, V, L, H, G, hd;
    size_t context;                         // tokens the model was made for
    float eps;
    bool tied;                              // the head is the embedding
} Config;

typedef struct {
    Config config;
    Device *dev;
    Weight embedding;                       // (V, D)
    Layer *layers;                          // (L)
    const float *final_norm;                // (D)
    Linear head;                            // (V, D)
    float *rope_frequency;                  // (hd / 2) rotation per position, on the host
    float *frequency;                       // the same on the device, loaded with the weights
    // Trainable parameters: A and B of every adapted linear, and like them gradients and moments.
    real *parameters, *gradients, *moment1, *moment2;
    size_t n_parameters;                    // padding between tensors included
    size_t lowest_layer;                    // backward stops here: the first layer with an adapter,
    int lowest_group;                       // and in it the first group that has one
} Transformer;

// What forward saves of a layer for backward.
typedef struct {
    void *h;                                // (T, D) residual stream on entry
    void *q, *k, *v;                        // (T, H hd), (T, G hd), (T, G hd), rotated
    void *keys, *values;                    // all rows attention reads: k, v, or the cache they end
    void *attended;                         // (T, H hd)
    real *lse;                              // (T, H)
    void *mid;                              // (T, D) residual stream between the two blocks
    void *gate, *up;                        // (T, F)
    void *u[N_LINEARS];                     // (T, r) each
} LayerActs;

// All memory of a forward and backward pass over at most T tokens, S of them supervised.
typedef struct {
    size_t T, S;
    size_t kept;                            // layers whose activations are kept; others recompute
    LayerActs *layers;                      // (L)
    void *h;                                // (T, D) the stream after the last layer
    void *x;                                // (T, D) a norm's output
    void *y;                                // (T, F) swiglu's output
    void *add;                              // (T, D) what a block adds to the stream
    // backward
    real *dh;                               // (T, D)
    void *dadd, *dx;                        // (T, D)
    void *dq, *dk, *dv, *dattended;
    void *dgate, *dup, *dy;                 // (T, F)
    // head, on the S supervised rows
    size_t chunk;                           // columns of the vocabulary at a time
    void *xs, *hs, *dxs;                    // (S, D)
    real *dxs_sum, *dhs;                    // (S, D)
    real *logits;                           // (S, chunk)
    void *dlogits;                          // (S, chunk)
    void *head_u;                           // (S, r)
    real *max, *sum, *chosen;               // (S)
    real *nll;                              // (S) and whether the target was the most likely token
    uint8_t *hit;                           // (S)
} Workspace;

// Bytes of logits that are held at a time; sets the chunk of the vocabulary.
enum { LOGITS_BYTES = 64 << 20 };

static size_t linear_rank(const Transformer *m, size_t l, int i) {
    return m->layers[l].linear[i].lora.r;
}

static void carve_layer(LayerActs *a, const Transformer *m, size_t l, size_t T, Arena *arena) {
    const Config *c = &m->config;
    size_t size = act_size(m->dev->act);
    a->q = arena_alloc(arena, T * c->H * c->hd, size);
    a->keys = a->k = arena_alloc(arena, T * c->G * c->hd, size);
    a->values = a->v = arena_alloc(arena, T * c->G * c->hd, size);
    a->attended = arena_alloc(arena, T * c->H * c->hd, size);
    a->lse = arena_alloc(arena, T * c->H, sizeof(real));
    a->mid = arena_alloc(arena, T * c->D, size);
    a->gate = arena_alloc(arena, T * c->F, size);
    a->up = arena_alloc(arena, T * c->F, size);
    for (int i = 0; i < N_LINEARS; i++)
        a->u[i] = arena_alloc(arena, T * linear_rank(m, l, i), size);
}

// Lays out a workspace in the arena. `layers` (L) is memory of the caller; training adds what
// backward needs. Layers that recompute share one set of buffers and keep only their input.
static void workspace_carve(Workspace *w, const Transformer *m, LayerActs *layers, size_t T,
                            size_t S, size_t kept, bool training, Arena *arena) {
    const Config *c = &m->config;
    size_t size = act_size(m->dev->act), D = c->D, F = c->F, query = c->H * c->hd;
    LayerActs shared = {0};
    *w = (Workspace){.T = T, .S = S, .kept = kept, .layers = layers};
    if (kept < c->L) {
        // The shared set must hold the largest u of any layer that uses it.
        size_t widest[N_LINEARS] = {0};
        for (size_t l = 0; l < c->L; l++)
            for (int i = 0; i < N_LINEARS; i++)
                widest[i] = max_size(widest[i], linear_rank(m, l, i));
        carve_layer(&shared, m, 0, T, arena);
        for (int i = 0; i < N_LINEARS; i++) shared.u[i] = arena_alloc(arena, T * widest[i], size);
    }
    for (size_t l = 0; l < c->L; l++) {
        layers[l] = shared;
        // The last layers are kept: backward begins with them.
        if (l >= c->L - kept) carve_layer(&layers[l], m, l, T, arena);
        if (training || l == 0) layers[l].h = arena_alloc(arena, T * D, size);
        else layers[l].h = layers[0].h;
    }
    w->h = arena_alloc(arena, T * D, size);
    w->x = arena_alloc(arena, T * D, size);
    w->y = arena_alloc(arena, T * F, size);
    w->add = arena_alloc(arena, T * D, size);
    w->xs = arena_alloc(arena, S * D, size);
    w->head_u = arena_alloc(arena, S * m->head.lora.r, size);
    if (!training) return;
    w->dh = arena_alloc(arena, T * D, sizeof(real));
    w->dadd = arena_alloc(arena, T * D, size);
    w->dx = arena_alloc(arena, T * D, size);
    w->dq = arena_alloc(arena, T * query, size);
    w->dk = arena_alloc(arena, T * c->G * c->hd, size);
    w->dv = arena_alloc(arena, T * c->G * c->hd, size);
    w->dattended = arena_alloc(arena, T * query, size);
    w->dgate = arena_alloc(arena, T * F, size);
    w->dup = arena_alloc(arena, T * F, size);
    w->dy = arena_alloc(arena, T * F, size);
    w->chunk = min_size(c->V, max_size(64, LOGITS_BYTES / sizeof(real) / max_size(S, 1) / 64 * 64));
    w->hs = arena_alloc(arena, S * D, size);
    w->dxs = arena_alloc(arena, S * D, size);
    w->dxs_sum = arena_alloc(arena, S * D, sizeof(real));
    w->dhs = arena_alloc(arena, S * D, sizeof(real));
    w->logits = arena_alloc(arena, S * w->chunk, sizeof(real));
    w->dlogits = arena_alloc(arena, S * w->chunk, size);
    w->max = arena_alloc(arena, S, sizeof(real));
    w->sum = arena_alloc(arena, S, sizeof(real));
    w->chosen = arena_alloc(arena, S, sizeof(real));
    w->nll = arena_alloc(arena, S, sizeof(real));
    w->hit = arena_alloc(arena, S, 1);
}

// ---------------------------------------------------------------------------------------- forward

// The products of one group; their y are set by the caller.
static size_t group_products(Product *p, const Transformer *m, size_t l, int group, LayerActs *a,
                             void *y0, void *y1, void *y2) {
    void *y[3] = {y0, y1, y2};
    for (int i = 0; i < linear_groups[group].count; i++) {
        int linear = linear_groups[group].first + i;
        p[i] = (Product){&m->layers[l].linear[linear], y[i], a->u[linear]};
    }
    return (size_t)linear_groups[group].count;
}

static AttentionShape attention_shape(const Transformer *m, size_t l) {
    const Config *c = &m->config;
    return (AttentionShape){c->H, c->G, c->hd, m->layers[l].window, 1 / (real)sqrt((real)c->hd)};
}

// One layer: from the stream h (T, D) and what the block before adds to it (NULL: nothing) to
// a->mid and w->add, whose sum is the stream after the layer.
static void layer_forward(const Transformer *m, size_t l, Workspace *w, const void *h,
                          const void *add, const Batch *b) {
    const Config *c = &m->config;
    const Layer *layer = &m->layers[l];
    const Ops *op = m->dev->ops;
    Device *dev = m->dev;
    LayerActs *a = &w->layers[l];
    Product p[3];
    size_t n, T = b->T;
    // attention block
    op->residual_norm_forward(dev, w->x, a->h, h, add, layer->attention_norm, T, c->D, c->eps);
    n = group_products(p, m, l, GROUP_QKV, a, a->q, a->k, a->v);
    op->linears_forward(dev, p, n, w->x, b);
    op->prefetch(dev, &layer->linear[LINEAR_O].weight);
    op->rope(dev, a->q, c->H, c->hd, m->frequency, 1, b);
    op->rope(dev, a->k, c->G, c->hd, m->frequency, 1, b);
    if (a->keys != a->k) op->append_keys(dev, a->keys, a->values, a->k, a->v, c->G * c->hd, b);
    op->attention_forward(dev, a->attended, a->lse, a->q, a->keys, a->values, attention_shape(m, l),
                          b);
    n = group_products(p, m, l, GROUP_O, a, w->add, NULL, NULL);
    op->linears_forward(dev, p, n, a->attended, b);
    op->prefetch(dev, &layer->linear[LINEAR_GATE].weight);
    // feed-forward block
    op->residual_norm_forward(dev, w->x, a->mid, a->h, w->add, layer->mlp_norm, T, c->D, c->eps);
    n = group_products(p, m, l, GROUP_GATE_UP, a, a->gate, a->up, NULL);
    op->linears_forward(dev, p, n, w->x, b);
    op->prefetch(dev, &layer->linear[LINEAR_DOWN].weight);
    op->swiglu_forward(dev, w->y, a->gate, a->up, T, c->F);
    n = group_products(p, m, l, GROUP_DOWN, a, w->add, NULL, NULL);
    op->linears_forward(dev, p, n, w->y, b);
    if (l + 1 < c->L) op->prefetch(dev, &m->layers[l + 1].linear[LINEAR_Q].weight);
}

// From ids (T) to w->x (T, D), the final norm's output, and w->h, the stream before it.
static void transformer_forward(const Transformer *m, Workspace *w, const int32_t *ids,
                                const Batch *b) {
    const Config *c = &m->config;
    const Ops *op = m->dev->ops;
    const void *h = w->layers[0].h, *add = NULL;
    op->embed(m->dev, w->layers[0].h, &m->embedding, ids, b->T);
    for (size_t l = 0; l < c->L; l++) {
        layer_forward(m, l, w, h, add, b);
        h = w->layers[l].mid;
        add = w->add;
    }
    op->residual_norm_forward(m->dev, w->x, w->h, h, add, m->final_norm, b->T, c->D, c->eps);
}

// --------------------------------------------------------------------------------------- backward

static bool group_trains(const Transformer *m, size_t l, int group) {
    for (int i = 0; i < linear_groups[group].count; i++)
        if (linear_rank(m, l, linear_groups[group].first + i)) return true;
    return false;
}

// Finds where backward may stop.
static void find_lowest_adapter(Transformer *m) {
    for (m->lowest_layer = 0; m->lowest_layer < m->config.L; m->lowest_layer++)
        for (m->lowest_group = 0; m->lowest_group < N_GROUPS; m->lowest_group++)
            if (group_trains(m, m->lowest_layer, m->lowest_group)) return;
}

// One layer, layer_forward read from bottom to top. On entry w->dh is the gradient of the stream
// after the layer and w->dadd the same rounded; on return, of the stream before it.
static void layer_backward(const Transformer *m, size_t l, Workspace *w, const Batch *b) {
    const Config *c = &m->config;
    const Layer *layer = &m->layers[l];
    const Ops *op = m->dev->ops;
    Device *dev = m->dev;
    LayerActs *a = &w->layers[l];
    Product p[3];
    size_t n, T = b->T;
    int last = l == m->lowest_layer ? m->lowest_group : -1;  // the group after which nothing learns
    if (l < c->L - w->kept) layer_forward(m, l, w, a->h, NULL, b);
    // feed-forward block; the norm's and swiglu's outputs are cheaper to compute again than to keep
    op->swiglu_forward(dev, w->y, a->gate, a->up, T, c->F);
    n = group_products(p, m, l, GROUP_DOWN, a, w->dadd, NULL, NULL);
    op->linears_backward(dev, last == GROUP_DOWN ? NULL : w->dy, p, n, w->y, b);
    if (last == GROUP_DOWN) return;
    op->prefetch(dev, &layer->linear[LINEAR_GATE].weight);
    op->swiglu_backward(dev, w->dgate, w->dup, w->dy, a->gate, a->up, T, c->F);
    op->residual_norm_forward(dev, w->x, a->mid, a->mid, NULL, layer->mlp_norm, T, c->D, c->eps);
    n = group_products(p, m, l, GROUP_GATE_UP, a, w->dgate, w->dup, NULL);
    op->linears_backward(dev, last == GROUP_GATE_UP ? NULL : w->dx, p, n, w->x, b);
    if (last == GROUP_GATE_UP) return;
    op->prefetch(dev, &layer->linear[LINEAR_O].weight);
    op->residual_norm_backward(dev, w->dh, w->dadd, w->dx, a->mid, layer->mlp_norm, T, c->D,
                               c->eps);
    // attention block
    n = group_products(p, m, l, GROUP_O, a, w->dadd, NULL, NULL);
    op->linears_backward(dev, last == GROUP_O ? NULL : w->dattended, p, n, a->attended, b);
    if (last == GROUP_O) return;
    op->prefetch(dev, &layer->linear[LINEAR_Q].weight);
    op->attention_backward(dev, w->dq, w->dk, w->dv, w->dattended, a->q, a->keys, a->values,
                           a->attended, a->lse, attention_shape(m, l), b);
    op->rope(dev, w->dq, c->H, c->hd, m->frequency, -1, b);
    op->rope(dev, w->dk, c->G, c->hd, m->frequency, -1, b);
    op->residual_norm_forward(dev, w->x, a->h, a->h, NULL, layer->attention_norm, T, c->D, c->eps);
    n = group_products(p, m, l, GROUP_QKV, a, w->dq, w->dk, w->dv);
    op->linears_backward(dev, last == GROUP_QKV ? NULL : w->dx, p, n, w->x, b);
    if (last == GROUP_QKV) return;
    if (l > m->lowest_layer)
        op->prefetch(dev, &layer[-1].linear[l > c->L - w->kept ? LINEAR_DOWN : LINEAR_Q].weight);
    op->residual_norm_backward(dev, w->dh, w->dadd, w->dx, a->h, layer->attention_norm, T, c->D,
                               c->eps);
}

// ------------------------------------------------------------------------------------------- loss

// Rows first .. first+C-1 of the head, as a linear of its own.
static Linear head_slice(const Linear *head, size_t first, size_t C) {
    Linear slice = *head;
    size_t skip = first * head->weight.K * dtype_size(head->weight.dtype);
    slice.weight.data = (const char *)head->weight.data + skip;
    slice.weight.N = C;
    if (head->bias) slice.bias = head->bias + first;
    if (head->lora.r) slice.lora.B = head->lora.B + first * head->lora.r;
    if (head->lora.dB) slice.lora.dB = head->lora.dB + first * head->lora.r;
    return slice;
}

// Cross-entropy of the rows w->xs (S, D) with their targets: w->nll and w->hit (S), its sum added
// to *total and, with `gradient`, scale times its gradient in w->dxs_sum. The vocabulary is walked
// twice in chunks, first for the softmax's denominator, then for the gradient; the second walk
// computes a chunk's logits again unless there is only one.
static void head_loss(const Transformer *m, Workspace *w, double *total, const int32_t *target,
                      real scale, bool gradient, const Batch *rows) {
    const Ops *op = m->dev->ops;
    Device *dev = m->dev;
    size_t V = m->config.V, S = rows->T, C;
    for (size_t first = 0; first < V; first += C) {
        C = min_size(w->chunk, V - first);
        Linear slice = head_slice(&m->head, first, C);
        Product p = {&slice, NULL, w->head_u};
        op->head_logits(dev, w->logits, &p, w->xs, rows);
        op->cross_entropy_forward(dev, w->max, w->sum, w->chosen, w->logits, target, first, C, S);
    }
    op->cross_entropy_end(dev, w->nll, w->hit, total, w->max, w->sum, w->chosen, S);
    if (!gradient) return;
    op->zero(dev, w->dxs_sum, S * m->config.D * sizeof(real));
    for (size_t first = 0; first < V; first += C) {
        C = min_size(w->chunk, V - first);
        Linear slice = head_slice(&m->head, first, C);
        Product p = {&slice, NULL, w->head_u};
        if (C < V) op->head_logits(dev, w->logits, &p, w->xs, rows);
        op->cross_entropy_backward(dev, w->dlogits, w->logits, w->max, w->sum, target, scale, first,
                                   C, S);
        p.y = w->dlogits;
        op->head_backward(dev, w->dxs_sum, &p, w->xs, rows);
    }
}

// A micro-batch with its labels: row supervised[i] is to predict target[i].
typedef struct {
    Batch batch;
    Batch rows;                             // the S supervised rows, as spans of their own
    const int32_t *ids;                     // (T) this and the rest is the device's
    const int32_t *supervised, *target;     // (S)
} LabelledBatch;

// Forward and, with `gradient`, backward: adds scale * d(sum of nll) to the gradients of all
// trainable parameters, and the sum of nll to *total, which is the device's and may be NULL. Leaves
// w->nll and w->hit (S).
static void loss_and_gradients(const Transformer *m, Workspace *w, const LabelledBatch *labelled,
                               double *total, real scale, bool gradient) {
    const Config *c = &m->config;
    const Ops *op = m->dev->ops;
    const Batch *b = &labelled->batch;
    size_t S = labelled->rows.T;
    Device *dev = m->dev;
    transformer_forward(m, w, labelled->ids, b);
    op->gather(dev, w->xs, w->x, labelled->supervised, S, c->D);
    head_loss(m, w, total, labelled->target, scale, gradient, &labelled->rows);
    if (!gradient || m->lowest_layer == c->L) return;
    op->gather(dev, w->hs, w->h, labelled->supervised, S, c->D);
    op->round_rows(dev, w->dxs, w->dxs_sum, S * c->D);
    op->zero(dev, w->dhs, S * c->D * sizeof(real));
    op->residual_norm_backward(dev, w->dhs, NULL, w->dxs, w->hs, m->final_norm, S, c->D, c->eps);
    op->scatter(dev, w->dh, w->dhs, labelled->supervised, S, b->T, c->D);
    op->round_rows(dev, w->dadd, w->dh, b->T * c->D);
    for (size_t l = c->L; l-- > m->lowest_layer;) layer_backward(m, l, w, b);
}
// =================================================================================================
//  5. AdamW and the schedules
//
//  All trainable parameters lie in one flat buffer, their gradients in a second, the two moments in
//  a third and a fourth, so the optimiser is one loop and the gradient's norm another.
// =================================================================================================

enum { PARAMETER_ALIGNMENT = 256 };     // elements a tensor starts at a multiple of, in all four

// A fixed number of elements per partial sum keeps the result independent of the number of threads.
enum { NORM_CHUNK = 4096, NORM_BATCH = 1024 };

typedef struct { const real *x; size_t n; double *sums; } SquaresTask;

static void squares_task(void *arguments, size_t task, int thread) {
    SquaresTask *a = arguments;
    size_t end = min_size(a->n, (task + 1) * NORM_CHUNK);
    double sum = 0;
    (void)thread;
    for (size_t i = task * NORM_CHUNK; i < end; i++) sum += (double)a->x[i] * (double)a->x[i];
    a->sums[task] = sum;
}

static double sum_of_squares(Device *dev, const real *x, size_t n) {
    double sums[NORM_BATCH], total = 0;
    for (size_t start = 0; start < n; start += (size_t)NORM_BATCH * NORM_CHUNK) {
        SquaresTask a = {x + start, min_size(n - start, (size_t)NORM_BATCH * NORM_CHUNK), sums};
        size_t tasks = ceil_div(a.n, NORM_CHUNK);
        parallel_for(dev->pool, tasks, squares_task, &a);
        for (size_t i = 0; i < tasks; i++) total += sums[i];
    }
    return total;
}

// A gradient longer than `most` is shortened to it. One that is not finite, or belongs to a loss
// that is not, must never reach the parameters, and no step after it may either.
static void clip_gradient(Device *dev, StepRecord *record, const StepRecord *before, const real *g,
                          size_t n, real most) {
    record->squares = sum_of_squares(dev, g, n);
    double clip = (double)most / (sqrt(record->squares) + 1e-6);
    record->clip = (real)(clip < 1 ? clip : 1);
    record->refused = (before && before->refused) || !isfinite(record->loss) ||
                      !isfinite(record->squares);
}

// Loshchilov and Hutter 2017, in PyTorch's order: decay first, then
//     m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2
//     p -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)
typedef struct {
    real *p, *m, *v;
    const real *g;
    size_t n;
    real decay, beta1, beta2, rate, root, eps, clip;
} AdamwTask;

static void adamw_task(void *arguments, size_t task, int thread) {
    AdamwTask *a = arguments;
    size_t end = min_size(a->n, (task + 1) * NORM_CHUNK);
    (void)thread;
    for (size_t i = task * NORM_CHUNK; i < end; i++) {
        real g = a->g[i] * a->clip;
        a->m[i] = a->beta1 * a->m[i] + (1 - a->beta1) * g;
        a->v[i] = a->beta2 * a->v[i] + (1 - a->beta2) * g * g;
        real p = a->p[i] * a->decay;
        a->p[i] = p - a->rate * a->m[i] / ((real)sqrt(a->v[i]) * a->root + a->eps);
    }
}

static void adamw(Device *dev, real *p, const real *g, real *m, real *v, size_t n, real lr,
                  real beta1, real beta2, real eps, real decay, const StepRecord *record,
                  size_t step) {
    if (record->refused) return;
    double correct1 = 1 - pow((double)beta1, (double)step);
    double correct2 = 1 - pow((double)beta2, (double)step);
    AdamwTask a = {p, m, v, g, n, 1 - lr * decay, beta1, beta2, (real)((double)lr / correct1),
                   (real)(1 / sqrt(correct2)), eps, record->clip};
    parallel_for(dev->pool, ceil_div(n, NORM_CHUNK), adamw_task, &a);
}

// ------------------------------------------------------------------------------------- schedules

typedef enum { SCHEDULE_CONSTANT, SCHEDULE_CONSTANT_WITH_WARMUP, SCHEDULE_LINEAR, SCHEDULE_COSINE }
    Schedule;

static const char *const schedule_names[] = {"constant", "constant_with_warmup", "linear",
                                             "cosine"};

// The share of the learning rate that step t (from 0) of T uses, with W steps of warmup. Warmup
// counts from 1: step 0 at rate 0, as transformers has it, would teach nothing. `constant` warms up
// too when it is told to.
static double schedule_factor(Schedule schedule, size_t t, size_t T, size_t W) {
    if (t < W) return (double)(t + 1) / (double)W;
    double rest = T > W ? (double)(t - W) / (double)(T - W) : 0;
    if (schedule == SCHEDULE_LINEAR) return 1 - rest;
    if (schedule == SCHEDULE_COSINE) return 0.5 * (1 + cos(3.141592653589793 * rest));
    return 1;
}
// =================================================================================================
//  6. JSON
//
//  A strict reader (RFC 8259) that turns a text into a tree inside a region. Numbers keep their
//  text, so that 64-bit offsets are exact; objects keep their order and refuse duplicate keys only
//  where the caller asks (safetensors does). Errors name line and column.
// =================================================================================================

typedef enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT }
    JsonKind;

// One value. Children form a linked list in file order; in an object each child carries its key.
typedef struct Json {
    JsonKind kind;
    uint32_t count;                 // children
    size_t length;                  // bytes of text
    const char *text;               // string: unescaped UTF-8, NUL-terminated; number: as written
    const char *key;                // in an object: unescaped, NUL-terminated
    size_t key_length;
    struct Json *first, *next;
} Json;

// A tree takes more memory than its text: "[]," with its comma 64 bytes. No file in use needs more
// than this much and four times its size.
enum { JSON_MAX_DEPTH = 128, JSON_SPARE = 1 << 26 };

typedef struct {
    const char *name;               // for messages: the file
    const char *start, *at, *end;
    size_t first_line;              // the text starts on this line of the file
    int depth;
    Region *region;
    size_t held;                    // what the region held before
    qlora_error *err;
} JsonParser;

static const char *json_kind_name(JsonKind kind) {
    static const char *const names[] = {"null", "false", "true", "a number", "a string", "an array",
                                        "an object"};
    return names[kind];
}

static int json_fail(JsonParser *p, const char *at, const char *what) {
    size_t line = p->first_line, column = 1;
    for (const char *c = p->start; c < at; c++) {
        if (*c == '\n') { line++; column = 1; }
        else if (((unsigned char)*c & 0xC0) != 0x80) column++;        // count characters, not bytes
    }
    return fail(p->err, "%s:%zu:%zu: %s", p->name, line, column, what);
}

static void json_space(JsonParser *p) {
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\t' || *p->at == '\n' || *p->at == '\r'))
        p->at++;
}

// Decodes one UTF-8 character; returns its length, or 0 if the bytes are not valid UTF-8 (overlong
// forms, surrogates and values above U+10FFFF included).
static size_t utf8_decode(const char *text, size_t n, uint32_t *code) {
    const unsigned char *s = (const unsigned char *)text;
    if (n == 0) return 0;
    if (s[0] < 0x80) { *code = s[0]; return 1; }
    size_t length = s[0] >= 0xF0 ? 4 : s[0] >= 0xE0 ? 3 : 2;
    if (s[0] < 0xC2 || s[0] > 0xF4 || length > n) return 0;
    uint32_t c = s[0] & (0x7Fu >> length);
    for (size_t i = 1; i < length; i++) {
        if ((s[i] & 0xC0) != 0x80) return 0;
        c = c << 6 | (s[i] & 0x3Fu);
    }
    static const uint32_t smallest[] = {0, 0, 0x80, 0x800, 0x10000};
    if (c < smallest[length] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000)) return 0;
    *code = c;
    return length;
}

static size_t utf8_encode(char out[4], uint32_t c) {
    if (c < 0x80) { out[0] = (char)c; return 1; }
    if (c < 0x800) {
        out[0] = (char)(0xC0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3F));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xE0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3F));
        out[2] = (char)(0x80 | (c & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3F));
    out[2] = (char)(0x80 | (c >> 6 & 0x3F));
    out[3] = (char)(0x80 | (c & 0x3F));
    return 4;
}

static int json_hex4(JsonParser *p, uint32_t *out) {
    *out = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        int c = p->at < p->end ? (unsigned char)*p->at : 0;
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10
                  : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (digit < 0) return json_fail(p, p->at, "\\u needs four hexadecimal digits");
        *out = *out << 4 | (uint32_t)digit;
    }
    return 0;
}

// Reads the escape after a backslash into out; a pair of \u surrogates is one character.
static int json_escape(JsonParser *p, char out[4], size_t *n) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    char c = p->at < p->end ? *p->at++ : 0;
    const char *known = c ? strchr(from, c) : NULL;
    if (known) { out[0] = to[known - from]; *n = 1; return 0; }
    if (c != 'u') return json_fail(p, p->at - 1, "unknown escape in string");
    uint32_t code, low;
    if (json_hex4(p, &code)) return -1;
    if (code >= 0xDC00 && code < 0xE000) return json_fail(p, p->at, "lone low surrogate");
    if (code >= 0xD800 && code < 0xDC00) {
        if (p->end - p->at < 2 || p->at[0] != '\\' || p->at[1] != 'u')
            return json_fail(p, p->at, "high surrogate without its low half");
        p->at += 2;
        if (json_hex4(p, &low)) return -1;
        if (low < 0xDC00 || low > 0xDFFF)
            return json_fail(p, p->at, "high surrogate without its low half");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    *n = utf8_encode(out, code);
    return 0;
}

static int json_string(JsonParser *p, const char **text, size_t *length) {
    const char *start = p->at + 1;
    const char *close = start;                        // unescaping never lengthens: bound the copy
    while (close < p->end && *close != '"') close += *close == '\\' ? 2 : 1;
    if (close >= p->end) return json_fail(p, p->at, "string without an end");
    char *out = region_alloc(p->region, (size_t)(close - start) + 1, 1, p->err);
    if (!out) return -1;
    size_t n = 0;
    for (p->at = start; *p->at != '"';) {
        uint32_t code;
        size_t bytes = 0;
        if (*p->at == '\\') {
            p->at++;
            if (json_escape(p, out + n, &bytes)) return -1;
        } else {
            if ((unsigned char)*p->at < 0x20)
                return json_fail(p, p->at, "control character in string (write \\n, \\t, \\u00XX)");
            bytes = utf8_decode(p->at, (size_t)(p->end - p->at), &code);
            if (!bytes) return json_fail(p, p->at, "invalid UTF-8 in string");
            memcpy(out + n, p->at, bytes);
            p->at += bytes;
        }
        n += bytes;
    }
    p->at++;
    out[n] = 0;
    *text = out;
    *length = n;
    return 0;
}

static bool json_digits(JsonParser *p) {
    const char *start = p->at;
    while (p->at < p->end && *p->at >= '0' && *p->at <= '9') p->at++;
    return p->at > start;
}

static int json_number(JsonParser *p, Json *value) {
    const char *start = p->at;
    if (*p->at == '-') p->at++;
    const char *digits = p->at;
    if (!json_digits(p)) return json_fail(p, start, "expected a value");
    if (*digits == '0' && p->at - digits > 1)
        return json_fail(p, start, "number with leading zero");
    if (p->at < p->end && *p->at == '.') {
        p->at++;
        if (!json_digits(p)) return json_fail(p, p->at, "expected a digit after the point");
    }
    if (p->at < p->end && (*p->at == 'e' || *p->at == 'E')) {
        p->at++;
        if (p->at < p->end && (*p->at == '+' || *p->at == '-')) p->at++;
        if (!json_digits(p)) return json_fail(p, p->at, "expected a digit in the exponent");
    }
    value->kind = JSON_NUMBER;
    value->length = (size_t)(p->at - start);
    value->text = region_text(p->region, start, value->length, p->err);
    return value->text ? 0 : -1;
}

static int json_value(JsonParser *p, Json *value);

static int json_children(JsonParser *p, Json *value) {
    bool object = *p->at == '{';
    char close = object ? '}' : ']';
    Json **link = &value->first;
    value->kind = object ? JSON_OBJECT : JSON_ARRAY;
    if (++p->depth > JSON_MAX_DEPTH) return json_fail(p, p->at, "nested deeper than 128");
    p->at++;
    json_space(p);
    if (p->at < p->end && *p->at == close) { p->at++; p->depth--; return 0; }
    for (;;) {
        Json *child = region_alloc(p->region, 1, sizeof *child, p->err);
        if (!child) return -1;
        if ((p->region->held - p->held) / 4 > JSON_SPARE / 4 + (size_t)(p->end - p->start))
            return json_fail(p, p->at, "more values than a file of this size has in practice");
        *link = child;
        link = &child->next;
        value->count++;
        json_space(p);
        if (object) {
            if (p->at >= p->end || *p->at != '"') return json_fail(p, p->at, "expected a \"key\"");
            if (json_string(p, &child->key, &child->key_length)) return -1;
            json_space(p);
            if (p->at >= p->end || *p->at != ':') return json_fail(p, p->at, "expected ':'");
            p->at++;
        }
        if (json_value(p, child)) return -1;
        json_space(p);
        if (p->at < p->end && *p->at == ',') { p->at++; continue; }
        if (p->at < p->end && *p->at == close) { p->at++; p->depth--; return 0; }
        return json_fail(p, p->at, object ? "expected ',' or '}'" : "expected ',' or ']'");
    }
}

static int json_value(JsonParser *p, Json *value) {
    static const struct { const char *word; JsonKind kind; } words[] = {
        {"null", JSON_NULL}, {"false", JSON_FALSE}, {"true", JSON_TRUE}};
    json_space(p);
    if (p->at >= p->end) return json_fail(p, p->at, "expected a value, found the end");
    if (*p->at == '{' || *p->at == '[') return json_children(p, value);
    if (*p->at == '"') {
        value->kind = JSON_STRING;
        return json_string(p, &value->text, &value->length);
    }
    for (size_t i = 0; i < 3; i++) {
        size_t n = strlen(words[i].word);
        if ((size_t)(p->end - p->at) >= n && memcmp(p->at, words[i].word, n) == 0) {
            value->kind = words[i].kind;
            p->at += n;
            return 0;
        }
    }
    return json_number(p, value);
}

// Parses one value and requires that nothing but space follows it. `name` and `first_line` are for
// messages. The tree lives in the region.
static Json *json_parse(const char *text, size_t n, const char *name, size_t first_line,
                        Region *region, qlora_error *err) {
    JsonParser p = {name, text, text, text + n, first_line, 0, region, region->held, err};
    Json *value = region_alloc(region, 1, sizeof *value, err);
    if (!value || json_value(&p, value)) return NULL;
    json_space(&p);
    if (p.at < p.end) { json_fail(&p, p.at, "expected the end after the value"); return NULL; }
    return value;
}

// The member of that name, or NULL (also when `object` is NULL or no object). Of duplicates the
// last counts, as in Python's json.
static const Json *json_get(const Json *object, const char *key) {
    const Json *found = NULL;
    if (!object || object->kind != JSON_OBJECT) return NULL;
    size_t n = strlen(key);
    for (const Json *child = object->first; child; child = child->next)
        if (child->key_length == n && memcmp(child->key, key, n) == 0) found = child;
    return found;
}

static bool json_is(const Json *value, JsonKind kind) { return value && value->kind == kind; }

// The text of a string member, or NULL.
static const char *json_get_text(const Json *object, const char *key) {
    const Json *value = json_get(object, key);
    return json_is(value, JSON_STRING) ? value->text : NULL;
}

static bool json_get_bool(const Json *object, const char *key, bool otherwise) {
    const Json *value = json_get(object, key);
    if (json_is(value, JSON_TRUE)) return true;
    return json_is(value, JSON_FALSE) ? false : otherwise;
}

// A whole number from 0 to 2^63-1, written without point or exponent.
static bool json_to_size(const Json *value, size_t *out) {
    if (!json_is(value, JSON_NUMBER) || value->length > 19) return false;
    size_t n = 0;
    for (const char *c = value->text; *c; c++) {
        if (*c < '0' || *c > '9') return false;
        if (mul_overflows(n, 10, &n) || add_overflows(n, (size_t)(*c - '0'), &n)) return false;
    }
    *out = n;
    return n <= (size_t)INT64_MAX;
}

// Any finite number. strtod is given text that the grammar above has accepted.
static bool json_to_double(const Json *value, double *out) {
    if (!json_is(value, JSON_NUMBER)) return false;
    *out = strtod(value->text, NULL);
    return isfinite(*out);
}

// Appends text as a JSON string, quotes included.
static int json_write_string(Buffer *b, const char *text, size_t n, qlora_error *err) {
    static const char hex[] = "0123456789abcdef";
    if (buffer_append(b, "\"", 1, err)) return -1;
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        char escape[6] = {'\\', 0, '0', '0', 0, 0};
        size_t length = 2;
        if (c == '"' || c == '\\') escape[1] = (char)c;
        else if (c == '\n') escape[1] = 'n';
        else if (c == '\t') escape[1] = 't';
        else if (c == '\r') escape[1] = 'r';
        else if (c < 0x20) {
            escape[1] = 'u';
            escape[4] = hex[c >> 4];
            escape[5] = hex[c & 15];
            length = 6;
        } else length = 0;
        if (buffer_append(b, length ? escape : text + i, length ? length : 1, err)) return -1;
    }
    return buffer_append(b, "\"", 1, err);
}

// Appends a value, indented like Python's json.dumps(indent=2) at the given depth of spaces.
static int json_write(Buffer *b, const Json *value, int indent, qlora_error *err) {
    static const char *const words[] = {"null", "false", "true"};
    bool object = value->kind == JSON_OBJECT;
    if (value->kind <= JSON_TRUE) return buffer_printf(b, err, "%s", words[value->kind]);
    if (value->kind == JSON_NUMBER) return buffer_append(b, value->text, value->length, err);
    if (value->kind == JSON_STRING) return json_write_string(b, value->text, value->length, err);
    if (buffer_append(b, object ? "{" : "[", 1, err)) return -1;
    for (const Json *child = value->first; child; child = child->next) {
        if (buffer_printf(b, err, "\n%*s", indent + 2, "")) return -1;
        if (object && (json_write_string(b, child->key, child->key_length, err) ||
                       buffer_append(b, ": ", 2, err))) return -1;
        if (json_write(b, child, indent + 2, err)) return -1;
        if (child->next && buffer_append(b, ",", 1, err)) return -1;
    }
    if (value->first && buffer_printf(b, err, "\n%*s", indent, "")) return -1;
    return buffer_append(b, object ? "}" : "]", 1, err);
}
// =================================================================================================
//  7. Files and safetensors
//
//  The one reader and the one writer of this program. Files from outside are read with pread, never
//  mapped, so that a file that shrinks meanwhile is an error and not a crash; every length is
//  checked against the bytes that are there before anything is allocated. A file of ours appears
//  under its name only when it is complete and on the disk.
// =================================================================================================

typedef struct { int fd; size_t size; const char *path; } File;     // path: the caller's

// A path that is NULL is one that path_join had no memory for, and has said so.
static int file_open(File *file, const char *path, qlora_error *err) {
    struct stat info;
    if (!path) return -1;
    file->path = path;
    file->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (file->fd < 0) return fail(err, "%s: cannot open: %s", path, strerror(errno));
    if (fstat(file->fd, &info) || !S_ISREG(info.st_mode)) {
        close(file->fd);
        file->fd = -1;
        return fail(err, "%s: expected a regular file", path);
    }
    file->size = (size_t)info.st_size;
    return 0;
}

static void file_close(File *file) {
    if (file->fd >= 0) close(file->fd);
    file->fd = -1;
}

// Exactly n bytes from the offset on.
static int file_read(const File *file, void *out, size_t n, size_t offset, qlora_error *err) {
    for (size_t done = 0; done < n;) {
        size_t some = min_size(n - done, (size_t)1 << 30);
        ssize_t got = pread(file->fd, (char *)out + done, some, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return fail(err, "%s: read error at byte %zu: %s", file->path, offset + done,
                                 strerror(errno));
        if (got == 0) return fail(err, "%s: ends at byte %zu, expected %zu more bytes", file->path,
                                  offset + done, n - done);
        done += (size_t)got;
    }
    return 0;
}

static bool file_exists(const char *path) { return access(path, F_OK) == 0; }

// The whole file into the buffer, which must be empty; refuses files larger than `most` bytes.
static int read_whole_file(const char *path, size_t most, Buffer *out, qlora_error *err) {
    File file;
    if (file_open(&file, path, err)) return -1;
    int bad = file.size > most
            ? fail(err, "%s: %zu bytes, expected at most %zu", path, file.size, most)
            : buffer_reserve(out, file.size + 1, err) ||
              file_read(&file, out->data, file.size, 0, err);
    if (!bad) {
        out->size = file.size;
        out->data[file.size] = 0;                             // handy for text, not counted
    }
    file_close(&file);
    return bad;
}

// Whether a directory holds a file of that name.
static bool directory_has(const char *directory, const char *name) {
    char path[PATH_MAX];
    int n = snprintf(path, sizeof path, "%s/%s", directory, name);
    return n > 0 && (size_t)n < sizeof path && file_exists(path);
}

// Joins a directory and a name; the result lives in the region.
static char *path_join(Region *region, const char *directory, const char *name, qlora_error *err) {
    size_t n = strlen(directory), m = strlen(name);
    while (n > 1 && directory[n - 1] == '/') n--;
    char *path = region_alloc(region, n + m + 2, 1, err);
    if (!path) return NULL;
    memcpy(path, directory, n);
    path[n] = '/';
    memcpy(path + n + 1, name, m);
    return path;
}

// Reads and parses directory/name. *found says whether it exists; a missing file is no error here.
static const Json *read_json(const char *directory, const char *name, size_t most, Region *region,
                             bool *found, qlora_error *err) {
    Buffer text = {.allocator = region->allocator};
    const char *path = path_join(region, directory, name, err);
    const Json *json = NULL;
    *found = !path || file_exists(path);                      // out of memory is not "missing"
    if (*found && !read_whole_file(path, most, &text, err))
        json = json_parse(text.data, text.size, path, 1, region, err);
    buffer_free(&text);
    return json;
}

// ---------------------------------------------------------------------------------- the one writer

typedef struct {
    int fd;
    const char *path;               // the final name; the file is written as path + ".tmp"
    char temporary[PATH_MAX];
    size_t held;                    // bytes in the buffer
    char buffer[1 << 14];
    qlora_error *err;
} Writer;

static int writer_open(Writer *w, const char *path, qlora_error *err) {
    w->fd = -1;
    w->path = path;
    w->held = 0;
    w->err = err;
    if (!path) return -1;
    int n = snprintf(w->temporary, sizeof w->temporary, "%s.tmp", path);
    if (n < 0 || (size_t)n >= sizeof w->temporary) return fail(err, "%s: path is too long", path);
    w->fd = open(w->temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (w->fd < 0) return fail(err, "%s: cannot write: %s", w->temporary, strerror(errno));
    return 0;
}

static int writer_put(Writer *w, const void *data, size_t n) {
    for (size_t done = 0; done < n;) {
        ssize_t put = write(w->fd, (const char *)data + done, min_size(n - done, (size_t)1 << 30));
        if (put < 0 && errno == EINTR) continue;
        if (put < 0) return fail(w->err, "%s: write error: %s", w->temporary, strerror(errno));
        done += (size_t)put;
    }
    return 0;
}

static int writer_write(Writer *w, const void *data, size_t n) {
    if (w->held + n > sizeof w->buffer) {
        if (writer_put(w, w->buffer, w->held)) return -1;
        w->held = 0;
        if (n > sizeof w->buffer) return writer_put(w, data, n);
    }
    memcpy(w->buffer + w->held, data, n);
    w->held += n;
    return 0;
}

// Syncs the directory of a path, so that a rename in it survives a power failure.
static void sync_directory(const char *path) {
    char directory[PATH_MAX];
    const char *slash = strrchr(path, '/');
    int n = slash ? (int)(slash - path) + 1 : 1;
    snprintf(directory, sizeof directory, "%.*s", n, slash ? path : ".");
    int fd = open(directory, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;                                       // some file systems cannot: no harm
    (void)!fsync(fd);
    close(fd);
}

// Ends the file: on success it stands under its name, complete and synced; on failure (or when the
// caller had one, bad != 0) nothing of it remains and what stood there before is untouched.
static int writer_close(Writer *w, int bad) {
    if (w->fd < 0) return -1;
    if (!bad) bad = writer_put(w, w->buffer, w->held);
    if (!bad && fsync(w->fd)) bad = fail(w->err, "%s: sync: %s", w->temporary, strerror(errno));
    if (close(w->fd) && !bad) bad = fail(w->err, "%s: close: %s", w->temporary, strerror(errno));
    if (!bad && rename(w->temporary, w->path))
        bad = fail(w->err, "%s: cannot rename to %s: %s", w->temporary, w->path, strerror(errno));
    if (bad) unlink(w->temporary);
    else sync_directory(w->path);
    w->fd = -1;
    return bad;
}

static int write_file(const char *path, const void *data, size_t n, qlora_error *err) {
    Writer w;
    if (writer_open(&w, path, err)) return -1;
    return writer_close(&w, writer_write(&w, data, n));
}

// Writes a text put together in a buffer, unless `bad` says that this failed, and frees the buffer.
static int write_buffer(const char *path, Buffer *text, int bad, qlora_error *err) {
    bad = bad || write_file(path, text->data, text->size, err);
    buffer_free(text);
    return bad ? -1 : 0;
}

// Copies a file if it exists; one that does not is fine.
static int copy_file(const char *from_dir, const char *to_dir, const char *name, Region *region,
                     qlora_error *err) {
    Buffer content = {.allocator = region->allocator};
    if (!directory_has(from_dir, name)) return 0;
    const char *from = path_join(region, from_dir, name, err);
    const char *to = path_join(region, to_dir, name, err);
    return write_buffer(to, &content, read_whole_file(from, SIZE_MAX / 4, &content, err), err);
}

static int make_directory(const char *path, qlora_error *err) {
    if (mkdir(path, 0777) == 0 || errno == EEXIST) return 0;
    return fail(err, "%s: cannot make the directory: %s", path, strerror(errno));
}

// ------------------------------------------------------------------------------------- safetensors
//
// Eight bytes of length, a JSON header {"name": {"dtype", "shape", "data_offsets"}}, the data. The
// ranges must tile the data without hole or overlap, and every size must equal its shape's.

enum { MAX_RANK = 8, MAX_TENSORS = 1 << 20, MAX_TENSOR_NAME = 1024, MAX_HEADER = 100000000,
       MAX_SHARDS = 4096 };

// In the order in which the reference library writes them: larger alignment first.
static const struct { const char *name; size_t size; DType dtype; } safetensors_types[] = {
    {"U64", 8, DT_OTHER}, {"I64", 8, DT_OTHER}, {"F64", 8, DT_OTHER}, {"C64", 8, DT_OTHER},
    {"F32", 4, DT_F32}, {"U32", 4, DT_OTHER}, {"I32", 4, DT_OTHER}, {"BF16", 2, DT_BF16},
    {"F16", 2, DT_F16}, {"U16", 2, DT_OTHER}, {"I16", 2, DT_OTHER}, {"F8_E4M3", 1, DT_OTHER},
    {"F8_E5M2", 1, DT_OTHER}, {"F8_E8M0", 1, DT_OTHER}, {"I8", 1, DT_OTHER}, {"U8", 1, DT_OTHER},
    {"BOOL", 1, DT_OTHER}};
enum { N_SAFETENSORS_TYPES = sizeof safetensors_types / sizeof *safetensors_types };
enum { ST_F32 = 4, ST_BF16 = 7, ST_F16 = 8, ST_U8 = 15 };             // places in that table

typedef struct {
    const char *name;
    int type;                       // index into safetensors_types
    size_t rank, shape[MAX_RANK];
    size_t elements, bytes, begin;  // begin: from the start of the file
    size_t file;                    // index of the shard
    bool used;                      // somebody has asked for it
    const void *data;               // of a tensor that is to be written: see write_tensors
} TensorInfo;

typedef struct {
    Region region;
    size_t n_files, n_tensors;
    File *files;                    // (n_files)
    TensorInfo *tensors;            // (n_tensors) sorted by name
    Buffer list;                    // of TensorInfo while reading
} TensorFiles;

static int parse_tensor(TensorInfo *t, const Json *entry, const char *path, qlora_error *err) {
    const Json *shape = json_get(entry, "shape"), *offsets = json_get(entry, "data_offsets");
    const char *type = json_get_text(entry, "dtype");
    size_t end;
    if (entry->key_length > MAX_TENSOR_NAME || strlen(entry->key) != entry->key_length)
        return fail(err, "%s: a tensor name is longer than 1024 bytes or holds a NUL", path);
    t->name = entry->key;
    while (type && t->type < N_SAFETENSORS_TYPES && strcmp(safetensors_types[t->type].name, type))
        t->type++;
    if (!type || t->type == N_SAFETENSORS_TYPES)
        return fail(err, "%s: tensor %s: expected a known \"dtype\", found %s", path, t->name,
                    type ? type : "none");
    if (!json_is(shape, JSON_ARRAY) || shape->count > MAX_RANK)
        return fail(err, "%s: tensor %s: expected a \"shape\" of at most 8 numbers", path, t->name);
    t->elements = 1;
    for (const Json *size = shape->first; size; size = size->next, t->rank++)
        if (!json_to_size(size, &t->shape[t->rank]) ||
            mul_overflows(t->elements, t->shape[t->rank], &t->elements))
            return fail(err, "%s: tensor %s: shape overflows or is no whole number", path, t->name);
    if (!json_is(offsets, JSON_ARRAY) || offsets->count != 2 ||
        !json_to_size(offsets->first, &t->begin) || !json_to_size(offsets->first->next, &end) ||
        end < t->begin)
        return fail(err, "%s: tensor %s: expected \"data_offsets\": [begin, end]", path, t->name);
    if (mul_overflows(t->elements, safetensors_types[t->type].size, &t->bytes) ||
        t->bytes != end - t->begin)
        return fail(err, "%s: tensor %s: %s with %zu elements expected, %zu bytes found", path,
                    t->name, type, t->elements, end - t->begin);
    return 0;
}

static int by_place(const void *a, const void *b) {
    const TensorInfo *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}
static int by_name(const void *a, const void *b) {
    return strcmp(((const TensorInfo *)a)->name, ((const TensorInfo *)b)->name);
}

// Reads one shard's header and appends its tensors to the list.
static int read_shard(TensorFiles *t, size_t index, qlora_error *err) {
    File *file = &t->files[index];
    unsigned char raw[8];
    if (file->size < 8 || file_read(file, raw, 8, 0, err))
        return fail(err, "%s: %zu bytes, too short for a safetensors file", file->path, file->size);
    uint64_t header = 0;
    for (int i = 7; i >= 0; i--) header = header << 8 | raw[i];
    if (header > MAX_HEADER || header > file->size - 8)
        return fail(err, "%s: header of %llu bytes announced, file has %zu (at most 100,000,000)",
                    file->path, (unsigned long long)header, file->size);
    char *text = region_alloc(&t->region, (size_t)header + 1, 1, err);
    if (!text || file_read(file, text, (size_t)header, 8, err)) return -1;
    if (text[0] != '{') return fail(err, "%s: byte 8: expected '{' of the header", file->path);
    const Json *json = json_parse(text, (size_t)header, file->path, 1, &t->region, err);
    if (!json) return -1;
    size_t start = 8 + (size_t)header, first = t->list.size;
    for (const Json *entry = json->first; entry; entry = entry->next) {
        TensorInfo tensor = {.file = index};
        if (strcmp(entry->key, "__metadata__") == 0) {
            if (entry->kind != JSON_OBJECT)
                return fail(err, "%s: __metadata__: expected an object, found %s", file->path,
                            json_kind_name(entry->kind));
            for (const Json *m = entry->first; m; m = m->next)
                if (m->kind != JSON_STRING)
                    return fail(err, "%s: __metadata__: %s: expected a string, found %s",
                                file->path, m->key, json_kind_name(m->kind));
            continue;
        }
        if (parse_tensor(&tensor, entry, file->path, err)) return -1;
        if (t->list.size / sizeof tensor >= MAX_TENSORS)
            return fail(err, "%s: more than 1,048,576 tensors", file->path);
        if (buffer_append(&t->list, &tensor, sizeof tensor, err)) return -1;
    }
    // Sorted by place the ranges must follow each other without a hole and end with the file.
    size_t n = (t->list.size - first) / sizeof(TensorInfo), at = 0;
    TensorInfo *own = n ? (TensorInfo *)(void *)(t->list.data + first) : NULL;
    if (n) qsort(own, n, sizeof *own, by_place);
    for (size_t i = 0; i < n; i++) {
        if (own[i].begin != at)
            return fail(err, "%s: tensor %s: data expected at offset %zu, found at %zu", file->path,
                        own[i].name, at, own[i].begin);
        at += own[i].bytes;
        own[i].begin += start;
    }
    if (at != file->size - start)
        return fail(err, "%s: header describes %zu bytes of data, file has %zu (truncated?)",
                    file->path, at, file->size - start);
    return 0;
}

static void tensors_close(TensorFiles *t) {
    if (!t) return;
    const qlora_allocator *allocator = t->region.allocator;
    for (size_t i = 0; i < t->n_files; i++) file_close(&t->files[i]);
    buffer_free(&t->list);
    region_free(&t->region);
    mem_free(allocator, t, 1, sizeof *t);
}

static const TensorInfo *tensors_find(const TensorFiles *t, const char *name) {
    TensorInfo key = {.name = name};
    return t->n_tensors ? bsearch(&key, t->tensors, t->n_tensors, sizeof key, by_name) : NULL;
}

// The name of a file in its directory.
static const char *file_name(const File *file) { return strrchr(file->path, '/') + 1; }

// Opens a file and reads its header, unless that was done before.
static int open_shard(TensorFiles *t, const char *directory, const char *name, qlora_error *err) {
    for (size_t i = 0; i < t->n_files; i++)
        if (strcmp(file_name(&t->files[i]), name) == 0) return 0;
    if (t->n_files == MAX_SHARDS) return fail(err, "%s: more than 4096 shards", directory);
    const char *path = path_join(&t->region, directory, name, err);
    if (file_open(&t->files[t->n_files], path, err)) return -1;
    return read_shard(t, t->n_files++, err);
}

// Opens directory/single, or if that does not exist the shards that the index names. Its names must
// be plain ones in the same directory, and every tensor must be in the shard where it says.
static int open_shards(TensorFiles *t, const char *directory, const char *single,
                       qlora_error *err) {
    static const char index_name[] = "model.safetensors.index.json";
    const Json *map = NULL;
    if (!directory_has(directory, single)) {
        bool found;
        const Json *index = read_json(directory, index_name, MAX_HEADER, &t->region, &found, err);
        if (!found)
            return fail(err, "%s: no %s (nor %s) in this directory", directory, single, index_name);
        if (!index) return -1;
        map = json_get(index, "weight_map");
        if (!json_is(map, JSON_OBJECT) || !map->count)
            return fail(err, "%s/%s: expected a \"weight_map\" object", directory, index_name);
    }
    const Json *first = map ? map->first : NULL;
    t->files = region_alloc(&t->region, map ? map->count : 1, sizeof *t->files, err);
    if (!t->files || (!map && open_shard(t, directory, single, err))) return -1;
    for (const Json *e = first; e; e = e->next) {
        if (e->kind != JSON_STRING || !e->text[0] || strchr(e->text, '/') || e->text[0] == '.' ||
            strlen(e->text) != e->length)
            return fail(err, "%s/%s: %s: expected a plain file name", directory, index_name,
                        e->key);
        if (open_shard(t, directory, e->text, err)) return -1;
    }
    t->tensors = (TensorInfo *)(void *)t->list.data;
    t->n_tensors = t->list.size / sizeof *t->tensors;
    if (t->n_tensors) qsort(t->tensors, t->n_tensors, sizeof *t->tensors, by_name);
    for (size_t i = 1; i < t->n_tensors; i++)
        if (strcmp(t->tensors[i - 1].name, t->tensors[i].name) == 0)
            return fail(err, "%s: tensor %s appears twice", t->files[t->tensors[i].file].path,
                        t->tensors[i].name);
    for (const Json *e = first; e; e = e->next) {
        const TensorInfo *tensor = tensors_find(t, e->key);
        if (!tensor || strcmp(file_name(&t->files[tensor->file]), e->text))
            return fail(err, "%s/%s: tensor %s expected here by %s, not found", directory, e->text,
                        e->key, index_name);
    }
    return 0;
}

static TensorFiles *tensors_open(const char *directory, const char *single,
                                 const qlora_allocator *allocator, qlora_error *err) {
    TensorFiles *t = mem_alloc(allocator, 1, sizeof *t, err);
    if (!t) return NULL;
    t->region.allocator = t->list.allocator = allocator;
    if (!open_shards(t, directory, single, err)) return t;
    tensors_close(t);
    return NULL;
}

// The file a tensor is in.
static const char *tensor_path(const TensorFiles *t, const TensorInfo *tensor) {
    return t->files[tensor->file].path;
}

// n bytes of a tensor from the offset on.
static int tensor_read(const TensorFiles *t, const TensorInfo *tensor, void *out, size_t offset,
                       size_t n, qlora_error *err) {
    return file_read(&t->files[tensor->file], out, n, tensor->begin + offset, err);
}

// Writes the tensor->bytes bytes of a tensor, made from tensor->data.
typedef int (*TensorFill)(void *user, const TensorInfo *tensor, Writer *w);

static int by_writing_order(const void *a, const void *b) {
    const TensorInfo *x = a, *y = b;
    return x->type != y->type ? x->type - y->type : strcmp(x->name, y->name);
}

// A tensor to write: `data` is for write_tensors, which says what it must be.
static void describe_tensor(TensorInfo *t, const char *name, int type, size_t rank, size_t rows,
                            size_t columns, const void *data) {
    *t = (TensorInfo){.name = name, .type = type, .rank = rank, .shape = {rows, columns}};
    t->elements = rows * (rank > 1 ? columns : 1);
    t->bytes = t->elements * safetensors_types[type].size;
    t->data = data;
}

// Writes a safetensors file as the reference library does: header sorted by type and name, padded
// to eight bytes, {"format": "pt"}. Sorts `tensors`. Without a `fill` their data are the bytes.
static int write_tensors(const char *path, TensorInfo *tensors, size_t n, TensorFill fill,
                         void *user, const qlora_allocator *allocator, qlora_error *err) {
    Buffer b = {.allocator = allocator};
    Writer w;
    size_t at = 0;
    qsort(tensors, n, sizeof *tensors, by_writing_order);
    int bad = buffer_append(&b, "length..", 8, err) ||
              buffer_printf(&b, err, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (size_t i = 0; i < n && !bad; i++) {
        const TensorInfo *t = &tensors[i];
        bad = buffer_append(&b, ",", 1, err) ||
              json_write_string(&b, t->name, strlen(t->name), err) ||
              buffer_printf(&b, err, ":{\"dtype\":\"%s\",\"shape\":[",
                            safetensors_types[t->type].name);
        for (size_t d = 0; d < t->rank && !bad; d++)
            bad = buffer_printf(&b, err, "%s%zu", d ? "," : "", t->shape[d]);
        bad = bad || buffer_printf(&b, err, "],\"data_offsets\":[%zu,%zu]}", at, at + t->bytes);
        at += t->bytes;
    }
    bad = bad || buffer_append(&b, "}", 1, err);
    while (!bad && b.size % 8) bad = buffer_append(&b, " ", 1, err);
    for (int i = 0; i < 8 && !bad; i++) b.data[i] = (char)((b.size - 8) >> (8 * i));
    if (!bad && !(bad = writer_open(&w, path, err))) {
        bad = writer_write(&w, b.data, b.size);
        for (size_t i = 0; i < n && !bad; i++)
            bad = fill ? fill(user, &tensors[i], &w)
                       : writer_write(&w, tensors[i].data, tensors[i].bytes);
        bad = writer_close(&w, bad);
    }
    buffer_free(&b);
    return bad ? -1 : 0;
}
// =================================================================================================
//  8. Unicode and regular expressions
//
//  Tokenizers cut text by regular expressions over Unicode's general categories; some (Qwen) want
//  it in a normal form first. Both need tables, which stand packed at the end of this file; each
//  tokenizer unpacks them. The regular expressions are those of Oniguruma, the library inside
//  `tokenizers`, as far as tokenizer.json files use them; the rest is refused, with its place, when
//  the pattern is compiled.
// =================================================================================================

enum { UNICODE_LIMIT = 0x110000, MAX_CANONICAL = 2100, MAX_COMPATIBLE = 3900, MAX_PARTS = 6000 };

typedef enum {
    UNICODE_CATEGORIES, UNICODE_CLASSES, UNICODE_CANONICAL, UNICODE_COMPATIBLE
} UnicodeTable;
static const char *const *unicode_table(UnicodeTable which);       // the last lines of this file

// General categories by their place in this list; a set of them is a mask of bits.
static const char category_names[] = "LuLlLtLmLoMnMcMeNdNlNoPcPdPsPePiPfPoSmScSkSoZsZlZpCcCfCsCoCn";
enum { CAT_LU, CAT_LL, CAT_LT, CAT_ND = 8, CAT_NL, CAT_PC = 11, CAT_COUNT = 30 };
#define CAT_BIT(category) (1u << (category))
#define CAT_CASED (CAT_BIT(CAT_LU) | CAT_BIT(CAT_LL) | CAT_BIT(CAT_LT))
#define CAT_WORD (CAT_BIT(CAT_PC) | CAT_BIT(CAT_NL) | (CAT_BIT(CAT_ND + 1) - 1))      // Lu to Nd

typedef struct { uint64_t key, value; } KeyValue;     // arrays of them are sorted by key

typedef struct {
    uint8_t category[UNICODE_LIMIT];        // flat: one load answers \p{L}
    uint8_t class[UNICODE_LIMIT];           // canonical combining class, or NFC_CARE, see below
    size_t n_splits, n_joins, n_compatible, n_parts;
    KeyValue splits[MAX_CANONICAL];         // a character -> the two it is made of (or one: 0, x)
    KeyValue joins[MAX_CANONICAL];          // two characters -> the one that they make
    KeyValue compatible[MAX_COMPATIBLE];    // a character -> place and count of its parts, below:
    uint32_t parts[MAX_PARTS];              // those that it only looks like, as 2 in a circle does
} Unicode;

// ------------------------------------------------------------------------------------ the tables

// Reads the numbers of a packed table one after the other: base 26, the last digit in lower case.
typedef struct { const char *const *line; const char *at; } PackedReader;

static PackedReader packed_open(UnicodeTable which) {
    const char *const *lines = unicode_table(which);
    return (PackedReader){lines, *lines};
}

static bool packed_more(PackedReader *r) {
    while (*r->line && !*r->at) r->at = *++r->line;
    return *r->line != NULL;
}

static uint32_t packed_number(PackedReader *r) {
    uint32_t n = 0;
    while (*r->at >= 'A' && *r->at <= 'Z') n = (n + (uint32_t)(*r->at++ - 'A')) * 26;
    return n + (uint32_t)(*r->at++ - 'a');
}

static int32_t packed_signed(PackedReader *r) {
    uint32_t n = packed_number(r);
    return n & 1 ? -(int32_t)(n / 2) - 1 : (int32_t)(n / 2);
}

// A table of runs: a value, how many characters have it.
static void unpack_runs(UnicodeTable which, uint8_t out[UNICODE_LIMIT]) {
    PackedReader r = packed_open(which);
    for (uint32_t code = 0; packed_more(&r);) {
        int value = (int)packed_number(&r);
        uint32_t length = packed_number(&r);
        memset(out + code, value, length);
        code += length;
    }
}

static int compare_keys(const void *a, const void *b) {
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void unpack_compatible(Unicode *u) {
    PackedReader r = packed_open(UNICODE_COMPATIBLE);
    uint32_t code = 0, part = 0;
    for (; packed_more(&r) && u->n_compatible < MAX_COMPATIBLE; code++) {
        code += packed_number(&r);
        uint32_t n = packed_number(&r);
        u->compatible[u->n_compatible++] = (KeyValue){code, (uint64_t)u->n_parts << 32 | n};
        for (; n && u->n_parts < MAX_PARTS; n--)
            u->parts[u->n_parts++] = part = (uint32_t)((int32_t)part + packed_signed(&r));
    }
}

static const Unicode *unicode_open(Region *region, qlora_error *err) {
    Unicode *u = region_alloc(region, 1, sizeof *u, err);
    if (!u) return NULL;
    unpack_runs(UNICODE_CATEGORIES, u->category);
    unpack_runs(UNICODE_CLASSES, u->class);
    PackedReader r = packed_open(UNICODE_CANONICAL);
    uint32_t code = 0, part[2] = {0, 0};              // each part as distance to the one before it
    for (; packed_more(&r) && u->n_splits < MAX_CANONICAL; code++) {
        code += packed_number(&r);
        uint32_t kind = packed_number(&r);            // 0 one part; 1 two; 2 two, kept apart
        for (uint32_t i = kind ? 0 : 1; i < 2; i++)
            part[i] = (uint32_t)((int32_t)part[i] + packed_signed(&r));
        uint64_t both = (uint64_t)(kind ? part[0] : 0) << 32 | part[1];
        u->splits[u->n_splits++] = (KeyValue){code, both};
        if (kind == 1) u->joins[u->n_joins++] = (KeyValue){both, code};
    }
    qsort(u->joins, u->n_joins, sizeof *u->joins, compare_keys);
    unpack_compatible(u);
    return u;
}

static bool unicode_in(const Unicode *u, uint32_t code, uint32_t categories) {
    return categories >> u->category[code] & 1;
}

// The property White_Space, which is what \s means.
static bool unicode_is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680
        || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F
        || c == 0x205F || c == 0x3000;
}

// Letters, marks, digits, connectors and the circled letters: what \w means.
static bool unicode_is_word(const Unicode *u, uint32_t c) {
    return unicode_in(u, c, CAT_WORD) || (c >= 0x24B6 && c <= 0x24E9)
        || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169)
        || (c >= 0x1F170 && c <= 0x1F189);
}

// ------------------------------------------------------------------------------------------ UTF-8

// Decodes a character of text that is known to be valid and not at its end.
static inline size_t utf8_next(const char *text, uint32_t *code) {
    *code = (unsigned char)*text;
    return *code < 0x80 ? 1 : utf8_decode(text, 4, code);
}

// The start of the character that ends before `at`; text is valid and at > 0.
static inline size_t utf8_before(const char *text, size_t at) {
    do at--; while (((unsigned char)text[at] & 0xC0) == 0x80);
    return at;
}

// How many of the bytes at an invalid place stand for one U+FFFD: as many as begin a character
// (Unicode's "maximal subpart", the practice of Python and Rust): those that some continuation
// makes valid, which the lowest or the highest one shows. *cut: the text ended too early.
static size_t utf8_invalid_length(const char *text, size_t n, bool *cut) {
    for (size_t length = min_size(n, 3); length; length--) {
        for (int fill = 0x80; fill <= 0xBF; fill += 0x3F) {
            char whole[4];
            uint32_t code;
            memset(whole, fill, sizeof whole);
            memcpy(whole, text, length);
            if (utf8_decode(whole, sizeof whole, &code) <= length) continue;
            *cut = length == n;
            return length;
        }
    }
    *cut = false;
    return 1;
}

// Length of the valid text at the beginning.
static size_t utf8_valid_prefix(const char *text, size_t n) {
    size_t i = 0, length = 1;
    for (uint32_t code; i < n && length; i += length) length = utf8_decode(text + i, n - i, &code);
    return i;
}

// Appends the text with every invalid part replaced by U+FFFD. Where hold_back is given, an
// incomplete character at the end is left out and its length stored there.
static int utf8_append_lossy(Buffer *out, const char *text, size_t n, size_t *hold_back,
                             qlora_error *err) {
    if (hold_back) *hold_back = 0;
    while (n) {
        bool cut;
        size_t valid = utf8_valid_prefix(text, n);
        if (buffer_append(out, text, valid, err)) return -1;
        text += valid;
        n -= valid;
        if (!n) break;
        size_t bad = utf8_invalid_length(text, n, &cut);
        if (cut && hold_back) { *hold_back = n; return 0; }
        if (buffer_append(out, "\xEF\xBF\xBD", 3, err)) return -1;
        text += bad;
        n -= bad;
    }
    return 0;
}

// ----------------------------------------------------------------------------------- normal forms

// Unicode Standard Annex 15: decompose every character, sort the marks behind each letter by their
// class; in the forms C then unite what can be united. In the forms K characters that are variants
// of others (ligatures, circled digits, wide letters) become those. Text in which no character has
// a class is in form C already. NFC_CARE marks characters of class 0 that are changed or may unite
// with what is before them. Korean syllables follow from a formula, all others stand in the table.
enum { NFC_CARE = 255, HANGUL = 0xAC00, HANGUL_COUNT = 11172, JAMO_L = 0x1100, JAMO_V = 0x1161,
       JAMO_T = 0x11A7, JAMO_LS = 19, JAMO_VS = 21, JAMO_TS = 28 };

// A character on its way through: its class, its place (so that sorting keeps the order of equals)
// and its code.
static uint32_t nfc_class(uint64_t item) { return (uint32_t)(item >> 56); }
static uint32_t nfc_code(uint64_t item) { return (uint32_t)(item & 0x1FFFFF); }

static uint64_t key_value(const KeyValue *table, size_t n, uint64_t key) {
    const KeyValue *found = bsearch(&key, table, n, sizeof *table, compare_keys);
    return found ? found->value : 0;
}

// The forms as sets of bits.
typedef enum { FORM_C, FORM_D, FORM_KC, FORM_KD } NormalForm;
enum { FORM_DECOMPOSED = 1, FORM_COMPATIBLE = 2 };

// Appends the full decomposition. The recursion follows our own tables, which are four deep.
static int decompose(const Unicode *u, uint32_t code, NormalForm form, Buffer *items,
                     qlora_error *err) {
    uint64_t two = code < 0x80 ? 0 : key_value(u->splits, u->n_splits, code);
    uint64_t many = code < 0x80 || two || !(form & FORM_COMPATIBLE)
                        ? 0 : key_value(u->compatible, u->n_compatible, code);
    if (code >= HANGUL && code < HANGUL + HANGUL_COUNT) {
        uint32_t s = code - HANGUL, t = s % JAMO_TS;
        two = t ? (uint64_t)(code - t) << 32 | (JAMO_T + t)
            : (uint64_t)(JAMO_L + s / JAMO_TS / JAMO_VS) << 32 | (JAMO_V + s / JAMO_TS % JAMO_VS);
    }
    const uint32_t parts[2] = {(uint32_t)(two >> 32), (uint32_t)two};
    const uint32_t *part = two ? parts + !parts[0] : u->parts + (many >> 32);
    for (size_t i = 0, n = two ? 2 - (size_t)!parts[0] : many & 255; i < n; i++)
        if (decompose(u, part[i], form, items, err)) return -1;
    if (two || many) return 0;
    uint64_t class = u->class[code] == NFC_CARE ? 0 : u->class[code];
    uint64_t item = class << 56 | items->size / sizeof item << 21 | code;
    return buffer_append(items, &item, sizeof item, err);
}

// The one character that the two make, or 0.
static uint32_t nfc_join(const Unicode *u, uint32_t first, uint32_t second) {
    uint32_t l = first - JAMO_L, v = second - JAMO_V, s = first - HANGUL, t = second - JAMO_T;
    if (l < JAMO_LS && v < JAMO_VS) return HANGUL + (l * JAMO_VS + v) * JAMO_TS;
    if (s < HANGUL_COUNT && s % JAMO_TS == 0 && t > 0 && t < JAMO_TS) return first + t;
    return (uint32_t)key_value(u->joins, u->n_joins, (uint64_t)first << 32 | second);
}

// Composes in place; returns the new count. A mark unites with the last starter (a character of
// class 0) unless a mark of its own or a higher class stands between them.
static size_t nfc_compose(const Unicode *u, uint64_t *items, size_t n) {
    size_t out = 0, starter = SIZE_MAX;
    uint32_t last_class = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t class = nfc_class(items[i]), composed = 0;
        if (starter != SIZE_MAX && (out == starter + 1 || last_class < class))
            composed = nfc_join(u, nfc_code(items[starter]), nfc_code(items[i]));
        if (composed) { items[starter] = composed; continue; }
        if (class == 0) starter = out;
        last_class = class;
        items[out++] = items[i];
    }
    return out;
}

// Appends the normal form of valid text; if it is in that form for sure, only sets *same.
static int normalize(const Unicode *u, NormalForm form, const char *text, size_t n, Buffer *out,
                     bool *same, qlora_error *err) {
    Buffer items = {.allocator = out->allocator};
    uint32_t code;
    int bad = 0;
    *same = true;
    for (size_t i = 0; i < n && *same; *same = code < 0x80 || (form == FORM_C && !u->class[code]))
        i += utf8_next(text + i, &code);
    if (*same) return 0;
    for (size_t i = 0; i < n && !bad;) {
        i += utf8_next(text + i, &code);
        bad = decompose(u, code, form, &items, err);
    }
    uint64_t *list = (uint64_t *)(void *)items.data;
    size_t count = items.size / sizeof *list;
    for (size_t i = 0, marks; i < count; i += marks + 1) {
        for (marks = 0; i + marks < count && nfc_class(list[i + marks]); marks++) {}
        if (marks > 1) qsort(list + i, marks, sizeof *list, compare_keys);
    }
    if (!(form & FORM_DECOMPOSED)) count = nfc_compose(u, list, count);
    for (size_t i = 0; i < count && !bad; i++) {
        char bytes[4];
        bad = buffer_append(out, bytes, utf8_encode(bytes, nfc_code(list[i])), err);
    }
    buffer_free(&items);
    return bad ? -1 : 0;
}

// --------------------------------------------------------------- regular expressions: the program

// A pattern becomes a program for a small backtracking machine. Jumps are relative, so that a step
// may be put before a finished piece of program.
typedef enum {
    OP_CLASS,                       // min to max characters of class `class`, as many as there are
    OP_SPLIT,                       // try at +x first, at +y when that fails
    OP_JUMP,                        // go on at +x
    OP_AHEAD, OP_NOT_AHEAD,         // what follows, up to OP_END, must or must not match here
    OP_ATOMIC,                      // it must match, the first way is the only one; +x is behind
    OP_LINE_START, OP_LINE_END,
    OP_END                          // of the pattern, or of what one of the three above has begun
} RegexOp;

typedef struct {
    RegexOp op;
    bool possessive;                // OP_CLASS: never gives a character back
    uint32_t class, min, max;
    int32_t x, y;
} RegexStep;

// One part of a class: a range, a set of categories, white space or word characters.
typedef enum { ITEM_RANGE, ITEM_CATEGORIES, ITEM_SPACE, ITEM_WORD } ItemKind;
typedef struct { ItemKind kind; bool negate; uint32_t first, last; } ClassItem;

typedef struct {
    uint64_t ascii[2];              // the answer for U+0000 to U+007F
    uint32_t first, count;          // the items that give it for all others
    bool negate, others;            // others: there may be some above U+007F
} CharClass;

enum { REGEX_MAX_PATTERN = 4096, REGEX_MAX_DEPTH = 64, REGEX_MAX_CALLS = 4096 };
#define REGEX_NO_LIMIT UINT32_MAX

typedef struct {
    const Unicode *unicode;
    RegexStep *steps;
    CharClass *classes;
    ClassItem *items;
    uint32_t n_steps, n_classes, n_items, n_alternatives;
    uint32_t start[64];             // of the alternatives at the top level
    uint64_t by_byte[256];          // which of them can begin with this byte
} Regex;

static bool item_holds(const Unicode *u, const ClassItem *item, uint32_t code) {
    bool in = item->kind == ITEM_RANGE ? code >= item->first && code <= item->last
            : item->kind == ITEM_CATEGORIES ? unicode_in(u, code, item->first)
            : item->kind == ITEM_SPACE ? unicode_is_space(code)
            // Oniguruma counts these six Latin-1 numbers as word characters, and no others.
            : unicode_is_word(u, code) || code == 0xB2 || code == 0xB3 || code == 0xB9
              || (code >= 0xBC && code <= 0xBE);
    return in != item->negate;
}

// The answer without the table.
static bool class_search(const Regex *re, const CharClass *class, uint32_t code) {
    for (uint32_t i = 0; i < class->count; i++)
        if (item_holds(re->unicode, &re->items[class->first + i], code)) return !class->negate;
    return class->negate;
}

static inline bool class_holds(const Regex *re, const CharClass *class, uint32_t code) {
    if (code < 128) return class->ascii[code / 64] >> code % 64 & 1;
    return class_search(re, class, code);
}

// -------------------------------------------------------------- regular expressions: the compiler

// Recursive descent over the pattern. The arrays of the program are as long as any pattern of that
// length can need: for one byte at most two steps, one class and four items are added, and on the
// way out after an error at most two more at each of 64 levels.
typedef struct {
    const char *pattern, *at;       // ends with NUL
    const char *name;               // for messages: where the pattern stands
    Regex *re;
    bool fold;                      // inside (?i:
    bool failed;
    int depth;
    qlora_error *err;
} RegexCompiler;

// The first error counts. The rest of the pattern is passed over, so that everything ends by
// itself.
static void regex_fail(RegexCompiler *c, const char *at, const char *what) {
    if (!c->failed)
        fail(c->err, "%s: regular expression, character %td: %s is not supported in \"%.200s\"",
             c->name, at - c->pattern + 1, what, c->pattern);
    c->failed = true;
    c->at = c->pattern + strlen(c->pattern);
}

// Puts a step before step `at`, or at the end.
static void regex_insert(Regex *re, uint32_t at, RegexStep step) {
    memmove(re->steps + at + 1, re->steps + at, (re->n_steps++ - at) * sizeof step);
    re->steps[at] = step;
}

static void regex_emit(Regex *re, RegexStep step) { regex_insert(re, re->n_steps, step); }

// Wraps the steps from `from` on in OP_AHEAD, OP_NOT_AHEAD or OP_ATOMIC.
static void regex_wrap(Regex *re, uint32_t from, RegexOp op) {
    regex_insert(re, from, (RegexStep){.op = op, .x = (int32_t)(re->n_steps - from) + 2});
    regex_emit(re, (RegexStep){.op = OP_END});
}

static void regex_item(Regex *re, ItemKind kind, uint32_t first, uint32_t last, bool negate) {
    re->items[re->n_items++] = (ClassItem){kind, negate, first, last};
}

// A range, or where case does not matter one ASCII character: besides the other case of a letter, k
// has the Kelvin sign and s the long s.
static void regex_range(RegexCompiler *c, uint32_t first, uint32_t last) {
    regex_item(c->re, ITEM_RANGE, first, last, false);
    if (!c->fold || (first == last && first < 128 && !isalpha((int)first))) return;
    if (first != last || first >= 128)
        regex_fail(c, c->at, "more than an ASCII character where case does not matter");
    uint32_t low = first | 32;
    uint32_t kin[] = {low, low - 32, low == 'k' ? 0x212A : low == 's' ? 0x17F : low};
    for (int i = 0; i < 3; i++) regex_item(c->re, ITEM_RANGE, kin[i], kin[i], false);
}

// Makes a class of all items from first_item on and emits one character of it.
static void regex_class(Regex *re, uint32_t first_item, bool negate) {
    CharClass *class = &re->classes[re->n_classes];
    *class = (CharClass){.first = first_item, .count = re->n_items - first_item, .negate = negate,
                         .others = negate};
    for (uint32_t code = 0; code < 128; code++)
        class->ascii[code / 64] |= (uint64_t)class_search(re, class, code) << code % 64;
    for (const ClassItem *item = re->items + first_item; item < re->items + re->n_items; item++)
        if (item->kind != ITEM_RANGE || item->last >= 128) class->others = true;
    regex_emit(re, (RegexStep){.op = OP_CLASS, .class = re->n_classes++, .min = 1, .max = 1});
}

// After \p or \P: {L} or {Lu}.
static void regex_property(RegexCompiler *c, bool negate) {
    const char *start = c->at;
    uint32_t set = 0;
    size_t n = strcspn(start, "}");
    for (size_t i = 0; i < CAT_COUNT && start[0] == '{' && (n == 2 || n == 3); i++)
        if (memcmp(category_names + 2 * i, start + 1, n - 1) == 0) set |= CAT_BIT(i);
    regex_item(c->re, ITEM_CATEGORIES, set, 0, negate);
    c->at += n + 1;
    if (!set || start[n] != '}')
        regex_fail(c, start, "a property other than a general category");
    if (c->fold && (set & CAT_CASED) && (set & CAT_CASED) != CAT_CASED)
        regex_fail(c, start, "a property of case where case does not matter");
}

// Reads one character or escape. A shorthand such as \s becomes an item, and true is returned;
// otherwise *code is the character.
static bool regex_character(RegexCompiler *c, uint32_t *code) {
    static const char from[] = "tnrfv", to[] = "\t\n\r\f\v";
    const char *start = c->at;
    *code = 0;
    if (!start[0] || (start[0] == '\\' && !start[1])) {
        regex_fail(c, start, "an end at this place");
        return true;
    }
    c->at += utf8_next(c->at, code);
    if (*code != '\\') return false;
    c->at += utf8_next(c->at, code);
    if (*code >= 128 || !isalnum((int)*code)) return false;
    const char *control = strchr(from, (int)*code);
    bool negate = isupper((int)*code);
    if (control) *code = (uint32_t)to[control - from];
    switch (control ? 0 : *code | 32) {
    case 0: return false;
    case 's': regex_item(c->re, ITEM_SPACE, 0, 0, negate); return true;
    case 'w': regex_item(c->re, ITEM_WORD, 0, 0, negate); return true;
    case 'd': regex_item(c->re, ITEM_CATEGORIES, CAT_BIT(CAT_ND), 0, negate); return true;
    case 'p': regex_property(c, negate); return true;
    default: regex_fail(c, start, "this escape"); return true;
    }
}

// What stands in the brackets of a class; a class in brackets inside it adds what it holds.
static void regex_items(RegexCompiler *c) {
    if (++c->depth > REGEX_MAX_DEPTH) regex_fail(c, c->at, "so much inside one another");
    for (bool first = true; !c->failed && (first || *c->at != ']'); first = false) {
        const char *here = c->at;
        uint32_t low, high;
        if (here[0] == '[' ? here[1] == '^' || here[1] == ':' : here[0] == '&' && here[1] == '&')
            regex_fail(c, here, "a class of this kind inside a class");
        if (*c->at == '[') { c->at++; regex_items(c); continue; }
        if (regex_character(c, &low)) continue;
        high = low;
        if (c->at[0] == '-' && c->at[1] != ']') {
            c->at++;
            if (*c->at == '[' || regex_character(c, &high) || high < low)
                regex_fail(c, here, "a range of this kind");
        }
        regex_range(c, low, high);
    }
    if (!c->failed) c->at++;
    c->depth--;
}

// A class in brackets.
static void regex_brackets(RegexCompiler *c) {
    uint32_t first_item = c->re->n_items;
    bool negate = *++c->at == '^';
    if (negate) c->at++;
    regex_items(c);
    regex_class(c->re, first_item, negate);
}

static void regex_alternatives(RegexCompiler *c);

static void regex_group(RegexCompiler *c) {
    static const struct { const char *open; RegexOp op; } groups[] = {
        {"(?i:", OP_END}, {"(?:", OP_END}, {"(?=", OP_AHEAD}, {"(?!", OP_NOT_AHEAD},
        {"(?>", OP_ATOMIC}, {"(?", OP_END}, {"(", OP_END}};
    const char *start = c->at;
    uint32_t from = c->re->n_steps;
    bool fold = c->fold;
    size_t i = 0;
    while (strncmp(start, groups[i].open, strlen(groups[i].open)) != 0) i++;
    c->at += strlen(groups[i].open);
    c->fold = fold || i == 0;
    if (i == 5) regex_fail(c, start, "this group or flag");
    regex_alternatives(c);
    if (*c->at == ')') c->at++;
    else regex_fail(c, start, "( without )");
    c->fold = fold;
    if (groups[i].op != OP_END) regex_wrap(c->re, from, groups[i].op);
}

// One unit: a character, a class, a group, an assertion.
static void regex_atom(RegexCompiler *c) {
    uint32_t first_item = c->re->n_items, code;
    bool any = *c->at == '.';                         // . is [^\n]
    if (*c->at == '(') { regex_group(c); return; }
    if (*c->at == '[') { regex_brackets(c); return; }
    if (*c->at == '^' || *c->at == '$') {
        regex_emit(c->re, (RegexStep){.op = *c->at++ == '^' ? OP_LINE_START : OP_LINE_END});
        return;
    }
    if (strchr("*+?{", *c->at)) regex_fail(c, c->at, "a quantifier with nothing before it");
    if (any) regex_item(c->re, ITEM_RANGE, '\n', '\n', false);
    if (any) c->at++;
    else if (!regex_character(c, &code)) regex_range(c, code, code);
    regex_class(c->re, first_item, any);
}

// With which bytes can a match of the steps [i, end) begin? And can they match nothing?
typedef struct { bool byte[256], empty; int steps; } FirstSet;

static void regex_first(const Regex *re, int32_t i, int32_t end, FirstSet *first) {
    while (i < end && ++first->steps < 1000) {        // so many: "can match nothing", to be safe
        const RegexStep *s = &re->steps[i];
        if (s->op == OP_CLASS) {
            const CharClass *class = &re->classes[s->class];
            for (size_t b = 0; b < 256; b++)          // bytes from 0x80 to 0xC1 begin nothing
                if (b < 128 ? class->ascii[b / 64] >> b % 64 & 1 : b > 0xC1 && class->others)
                    first->byte[b] = true;
            if (s->min) return;
        }
        if (s->op == OP_SPLIT) regex_first(re, i + s->y, end, first);
        i += s->op == OP_CLASS || s->op >= OP_ATOMIC ? 1 : s->x;
    }
    first->empty = true;
}

typedef struct { uint32_t min, max; bool lazy, possessive; } Quantifier;

// ? * + each with ? (lazy) or + (possessive) behind it, or {n} {n,} {n,m}
static Quantifier regex_quantifier(RegexCompiler *c) {
    const char *start = c->at++;
    Quantifier q = {.min = *start == '+', .max = *start == '?' ? 1 : REGEX_NO_LIMIT};
    if (*start != '{') {
        q.lazy = *c->at == '?';
        q.possessive = *c->at == '+';
        c->at += q.lazy || q.possessive;
        return q;
    }
    char *end;
    unsigned long low = strtoul(c->at, &end, 10), high = low;
    if (*end == ',' && end[1] == '}') { high = REGEX_NO_LIMIT; end++; }
    else if (*end == ',') high = strtoul(end + 1, &end, 10);
    bool digits = isdigit((unsigned char)*c->at);
    c->at = end + 1;
    if (!digits || *end != '}' || end[1] == '?' || low > 1000 || high == 0 || high < low
        || (high > 1000 && high != REGEX_NO_LIMIT))
        regex_fail(c, start, "a repetition of this kind");
    return (Quantifier){.min = (uint32_t)low, .max = (uint32_t)high};
}

// Turns the unit at the steps from `from` on into its repetition:
//   ?  split(+1, behind) unit     *  split(+1, behind) unit jump(back)     +  unit split(back, +1)
static void regex_repeat(RegexCompiler *c, uint32_t from, Quantifier q) {
    Regex *re = c->re;
    RegexStep *unit = &re->steps[from];
    int32_t n = (int32_t)(re->n_steps - from);
    if (n == 1 && unit->op == OP_CLASS && unit->min == 1 && unit->max == 1 && !q.lazy) {
        unit->min = q.min;
        unit->max = q.max;
        unit->possessive = q.possessive;
        return;
    }
    FirstSet first = {.empty = false};
    bool once = q.max == 1;
    regex_first(re, (int32_t)from, (int32_t)re->n_steps, &first);
    if (q.min > 1 || (!once && (q.max != REGEX_NO_LIMIT || first.empty)))
        regex_fail(c, c->at, "{n,m} of a group, or a repetition of what can match nothing,");
    int32_t more = q.min ? -n : 1, behind = q.min ? 1 : n + (once ? 1 : 2);
    RegexStep split = {.op = OP_SPLIT, .x = q.lazy ? behind : more, .y = q.lazy ? more : behind};
    if (!(once && q.min)) regex_insert(re, q.min ? re->n_steps : from, split);
    if (!once && !q.min) regex_emit(re, (RegexStep){.op = OP_JUMP, .x = -n - 1});
    if (q.possessive) regex_wrap(re, from, OP_ATOMIC);
}

// Units one after the other, up to | or ) or the end.
static void regex_sequence(RegexCompiler *c) {
    while (*c->at && *c->at != '|' && *c->at != ')') {
        uint32_t from = c->re->n_steps;
        regex_atom(c);
        while (*c->at && strchr("*+?{", *c->at)) regex_repeat(c, from, regex_quantifier(c));
    }
}

// Alternatives inside a group: split(+1, next) sequence jump(end), and so on with the next.
static void regex_alternatives(RegexCompiler *c) {
    Regex *re = c->re;
    uint32_t from = re->n_steps;
    if (++c->depth > REGEX_MAX_DEPTH) regex_fail(c, c->at, "so much inside one another");
    regex_sequence(c);
    if (*c->at == '|') {
        uint32_t jump = re->n_steps + 1;
        c->at++;
        RegexStep split = {.op = OP_SPLIT, .x = 1, .y = (int32_t)(jump - from) + 1};
        regex_insert(re, from, split);
        regex_emit(re, (RegexStep){.op = OP_JUMP});
        regex_alternatives(c);
        re->steps[jump].x = (int32_t)(re->n_steps - jump);
    }
    c->depth--;
}

// The alternatives of the whole pattern are kept apart, with the bytes they can begin with.
static void regex_top_level(RegexCompiler *c, Regex *re) {
    for (bool more = true; more; more = *c->at == '|') {
        uint32_t from = re->n_steps, n = re->n_alternatives;
        FirstSet first = {.empty = false};
        if (n) c->at++;
        regex_sequence(c);
        regex_first(re, (int32_t)from, (int32_t)re->n_steps, &first);
        if (first.empty) regex_fail(c, c->at, "an alternative that can match nothing");
        for (size_t b = 0; b < 256; b++) re->by_byte[b] |= (uint64_t)first.byte[b] << n;
        re->start[n] = from;
        regex_emit(re, (RegexStep){.op = OP_END});
        if (++re->n_alternatives == 64) regex_fail(c, c->at, "so many alternatives");
    }
    if (*c->at) regex_fail(c, c->at, ") without (");
}

// Compiles a pattern of UTF-8; `name` says in messages where it stands. Every alternative must take
// at least one character.
static const Regex *regex_compile(const Unicode *unicode, const char *pattern, const char *name,
                                  Region *region, qlora_error *err) {
    Regex *re = region_alloc(region, 1, sizeof *re, err);
    RegexCompiler c = {.pattern = pattern, .at = pattern, .name = name, .re = re, .err = err};
    size_t n = strlen(pattern);
    if (n > REGEX_MAX_PATTERN) regex_fail(&c, pattern, "more than 4096 bytes");
    if (!re || c.failed) return NULL;
    re->unicode = unicode;
    re->steps = region_alloc(region, 2 * n + 2 * REGEX_MAX_DEPTH + 8, sizeof *re->steps, err);
    re->classes = region_alloc(region, n + 8, sizeof *re->classes, err);
    re->items = region_alloc(region, 4 * n + 8, sizeof *re->items, err);
    if (!re->steps || !re->classes || !re->items) return NULL;
    regex_top_level(&c, re);
    return c.failed ? NULL : re;
}

// --------------------------------------------------------------- regular expressions: the matcher

// Backtracking can take exponential time. No pattern that is met in practice needs more than a few
// steps a character; one that does, or that repeats a group thousands of times, ends in an error.
typedef struct {
    size_t budget;                  // steps that may still be taken
    const Regex *re;                // the rest is what regex_find was given
    const char *text;
    size_t n;
    qlora_error *err;
} RegexRun;

static RegexRun regex_run(size_t text_bytes, qlora_error *err) {
    return (RegexRun){.budget = ((size_t)1 << 24) + 512 * text_bytes, .err = err};
}

// Tries to match from one step on at one place. Returns 1 and the end of the match, 0, or -1. It
// calls itself where there is more than one way to go on.
static int regex_try(RegexRun *run, uint32_t step, size_t at, size_t *match_end, int depth) {
    const char *text = run->text;
    for (const RegexStep *s;;) {
        size_t low = at, length, inner;
        uint32_t count = 0, code;
        int found;
        s = &run->re->steps[step];
        if (depth > REGEX_MAX_CALLS || run->budget-- == 0) {
            run->budget = 0;
            return fail(run->err,
                        "a regular expression of the tokenizer takes too long on this text");
        }
        switch (s->op) {
        case OP_CLASS:
            for (; at < run->n && count < s->max; at += length, count++) {
                length = utf8_next(text + at, &code);
                if (!class_holds(run->re, &run->re->classes[s->class], code)) break;
                if (count < s->min) low = at + length;
            }
            run->budget -= min_size(count / 8, run->budget);
            if (count < s->min) return 0;
            step++;
            // Nothing can fail after the last step, so nothing would be given back.
            if (at == low || s->possessive || s[1].op == OP_END) break;
            for (;; at = utf8_before(text, at)) {
                found = regex_try(run, step, at, match_end, depth + 1);
                if (found || at == low) return found;
            }
        case OP_SPLIT:
            found = regex_try(run, step + (uint32_t)s->x, at, match_end, depth + 1);
            if (found) return found;
            step += (uint32_t)s->y;
            break;
        case OP_JUMP: step += (uint32_t)s->x; break;
        case OP_AHEAD: case OP_NOT_AHEAD: case OP_ATOMIC:
            found = regex_try(run, step + 1, at, &inner, depth + 1);
            if (found < 0 || found != (s->op != OP_NOT_AHEAD)) return found < 0 ? -1 : 0;
            if (s->op == OP_ATOMIC) at = inner;
            step += (uint32_t)s->x;
            break;
        case OP_LINE_START: case OP_LINE_END:
            if (s->op == OP_LINE_END ? at < run->n && text[at] != '\n'
                                     : at > 0 && (text[at - 1] != '\n' || at == run->n)) return 0;
            step++;
            break;
        case OP_END: *match_end = at; return 1;
        }
    }
}

// Finds the leftmost match that begins at `from` or later in valid UTF-8. Returns 1, 0 or -1.
static int regex_find(RegexRun *run, const Regex *re, const char *text, size_t n, size_t from,
                      size_t *start, size_t *end) {
    run->re = re;
    run->text = text;
    run->n = n;
    for (*start = from; *start < n; ++*start) {
        uint64_t ways = re->by_byte[(unsigned char)text[*start]];
        for (uint32_t i = 0; ways; i++, ways >>= 1) {
            int found = ways & 1 ? regex_try(run, re->start[i], *start, end, 0) : 0;
            if (found) return found;
        }
    }
    return 0;
}
// =================================================================================================
//  9. The tokenizer
//
//  Text to ids as Hugging Face's `tokenizers` does it, id for id. The way of a text:
//      added tokens found in the raw text        <|im_start|> becomes its id, the rest goes on
//      normalizers                               NFC; " " becomes "▁"
//      added tokens found in normalised text
//      pre-tokenizers                            cut into pieces: words, numbers, white space
//      byte-pair encoding of each piece          the merge of lowest rank first, leftmost first
//      post-processor                            <s> in front
//  Two styles exist: byte-level (GPT-2, Llama-3, Qwen), whose alphabet is the 256 bytes, and
//  sentencepiece's (Llama-2, Mistral), whose alphabet is characters, unknown ones as <0xHH> bytes.
//  All of it is data read from tokenizer.json; a kind that is not known is refused by name.
// =================================================================================================

enum { MAX_TOKEN_BYTES = 1 << 16, MAX_TOKENS = 1 << 21, MAX_ID_HOLES = 1 << 16,
       MAX_STEPS = 24, MAX_AFFIX = 8, MAX_NAMED = 8 };

// ------------------------------------------------------------------------------------ vocabulary

typedef struct {
    const char *text;               // NULL: no token has this id
    uint32_t length;
    bool added;                     // is looked for in the text itself
    bool special;
    bool outside;                   // not one of the model's own tokens, only an added one
    bool fresh;                     // added by --add-tokens, and not in the files yet
} Token;

typedef struct { int32_t left, right, merged; uint32_t rank; } Merge;      // left -1: empty slot

typedef struct {
    Token *tokens;                  // (n_ids) by id
    uint32_t *by_text;              // hash table of id + 1
    Merge *merges;                  // hash table
    size_t n_ids, n_tokens, max_ids, longest, n_text_slots, n_merge_slots;
} Vocabulary;

static uint64_t hash_mix(uint64_t h) {
    h *= 0x9E3779B97F4A7C15u;
    return h ^ h >> 32;
}

static uint64_t hash_bytes(const char *text, size_t n) {
    uint64_t h = n, word;
    for (; n >= 8; text += 8, n -= 8) {
        memcpy(&word, text, 8);
        h = hash_mix(h ^ word);
    }
    for (word = 0; n; n--) word = word << 8 | (unsigned char)text[n - 1];
    return hash_mix(hash_mix(h ^ word));
}

// A power of two that leaves at least a third of a hash table of n entries empty. The tables below
// are searched from the hash on, slot by slot, up to an empty one.
static size_t hash_slots(size_t n) {
    size_t slots = 16;
    while (slots < n + n / 2) slots *= 2;
    return slots;
}

// The slot of that text, or the empty one where it would go.
static uint32_t *vocabulary_slot(const Vocabulary *v, const char *text, size_t n) {
    for (size_t i = hash_bytes(text, n);; i++) {
        uint32_t *slot = &v->by_text[i & (v->n_text_slots - 1)];
        if (!*slot) return slot;
        const Token *token = &v->tokens[*slot - 1];
        if (token->length == n && memcmp(token->text, text, n) == 0) return slot;
    }
}

// The id of the token with exactly this text, or -1.
static int32_t vocabulary_id(const Vocabulary *v, const char *text, size_t n) {
    return n > v->longest ? -1 : (int32_t)*vocabulary_slot(v, text, n) - 1;
}

// The same among the tokens that merging knows.
static int32_t model_id(const Vocabulary *v, const char *text, size_t n) {
    int32_t id = vocabulary_id(v, text, n);
    return id >= 0 && !v->tokens[id].outside ? id : -1;
}

static const Token *vocabulary_token(const Vocabulary *v, size_t id) {
    return id < v->n_ids && v->tokens[id].text ? &v->tokens[id] : NULL;
}

// The merge of the pair, or the empty slot where it would go: the innermost step of encoding.
static inline Merge *merge_slot(const Vocabulary *v, int32_t left, int32_t right) {
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    for (size_t i = hash_mix(key);; i++) {
        Merge *slot = &v->merges[i & (v->n_merge_slots - 1)];
        if ((slot->left == left && slot->right == right) || slot->left < 0) return slot;
    }
}

// -------------------------------------------------------------------------------- what is read

// What is done to a text before it is encoded: some steps rewrite it, splits cut it into pieces.
typedef enum {
    STEP_NFC, STEP_NFD, STEP_NFKC, STEP_NFKD,         // in the order of NormalForm
    STEP_STRIP, STEP_PREPEND, STEP_REPLACE, STEP_TRIM, STEP_ALPHABET, STEP_SPLIT
} StepKind;

// What a split does with the matches: they are pieces of their own, are left out, belong to what is
// before or behind them, or several in a row are one piece.
typedef enum {
    SPLIT_ISOLATED, SPLIT_REMOVED, SPLIT_WITH_PREVIOUS, SPLIT_WITH_NEXT, SPLIT_CONTIGUOUS
} SplitBehavior;
typedef enum { PREPEND_FIRST, PREPEND_ALWAYS, PREPEND_NEVER } PrependScheme;

typedef struct {
    StepKind kind;
    const Regex *regex;             // what is replaced, or cuts
    const char *text;               // what is prepended, or put in the place of a match
    PrependScheme scheme;           // STEP_PREPEND: always, or only where the whole text begins
    bool once;                      // STEP_PREPEND: not to what begins with it, or with a space
    SplitBehavior behavior;
    bool invert;                    // what does not match counts as match, and the other way round
    bool left, right;               // STEP_STRIP: white space at these ends
} Step;

// Tokens to text: Replace or Metaspace, then ByteFallback or ByteLevel, then Strip.
typedef struct {
    const Regex *replace;           // NULL: nothing is replaced
    const char *with, *strip;       // strip: text taken away from the beginning
    size_t strips;                  // as often at most
    bool drop_first;                // Metaspace: in the first token nothing comes in its place
    bool byte_fallback, byte_level;
} DecodeSteps;

// A token that is looked for in the text itself. `pattern` is its text, normalised if it says so.
typedef struct AddedToken {
    const char *pattern;
    size_t length;
    int32_t id;
    bool lstrip, rstrip, single_word;
    const struct AddedToken *shorter;       // the longest other one that this one begins with
} AddedToken;

// Added tokens sorted by pattern.
typedef struct {
    AddedToken *tokens;
    size_t n;
    size_t first[257];              // tokens that begin with byte b: first[b] .. first[b + 1] - 1
} AddedSet;

typedef struct Tokenizer {
    Region region;                  // everything below lives here
    const Unicode *unicode;
    Vocabulary vocabulary;
    AddedSet added_raw, added_normalized;
    Step steps[MAX_STEPS];          // first the normalizers, then the pre-tokenizers
    size_t n_normalizers, n_steps;
    DecodeSteps decode;

    bool byte_level;                // pieces are bytes, tokens are written in the alphabet below
    bool ignore_merges;             // a piece that is a token as a whole is not built up
    bool byte_fallback, fuse_unk;
    uint64_t *neighbours;           // see may_cut; NULL: pieces are never cut
    struct EncoderList *encoders;   // what calls of tokenizer_encode have left for the next
    int32_t unk_id;                 // of unknown characters; -1: they are left out
    int32_t byte_id[256];           // byte_level: of a byte; else of <0xHH>; -1: there is none
    int32_t prefix[MAX_AFFIX], suffix[MAX_AFFIX];     // what stands around a text
    size_t n_prefix, n_suffix;

    // From tokenizer_config.json and its companions. Texts NULL and ids -1 where there is none.
    const char *chat_template, *bos_token, *eos_token;
    int32_t bos_id, eos_id;
} Tokenizer;

static const char space_mark[] = "\xE2\x96\x81";      // ▁ U+2581, how sentencepiece writes a space

static bool starts_with(const char *text, size_t n, const char *start) {
    size_t length = strlen(start);
    return n >= length && memcmp(text, start, length) == 0;
}

// The alphabet of byte-level tokenizers: printable Latin-1 bytes stand for themselves, the other 68
// are written as U+0100, U+0101, ...
static uint32_t byte_to_char(unsigned byte) {
    if ((byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD)) return byte;
    return byte < 0x21 ? 0x100 + byte : byte == 0xAD ? 0x143 : 0x121 + (byte - 0x7F);
}

static int char_to_byte(uint32_t code) {              // or -1
    uint32_t byte = code < 0x100 ? code : code <= 0x120 ? code - 0x100
                  : code <= 0x142 ? code - 0x121 + 0x7F : 0xAD;
    return byte_to_char(byte) == code ? (int)byte : -1;
}

// The byte of a byte token, <0xHH> with exactly two hexadecimal digits, or -1.
static int byte_token(const char *text, size_t n) {
    if (n != 6 || !starts_with(text, n, "<0x") || text[5] != '>') return -1;
    bool digits = isxdigit((unsigned char)text[3]) && isxdigit((unsigned char)text[4]);
    return digits ? (int)strtol(text + 3, NULL, 16) : -1;
}

// ----------------------------------------------------------------------------- byte-pair encoding

// Pieces repeat: a table of the latest ones and their ids saves most of the work.
typedef struct { uint8_t key, count; char text[26]; int32_t ids[9]; } CachedPiece;
enum { MAX_CACHED_PIECES = 1 << 16 };

// A symbol of a piece: a token so far, in a linked list.
typedef struct { int32_t id, previous, next; } Symbol;
#define NO_RANK UINT32_MAX

// What one call of tokenizer_encode works with. The buffers are scratch: of what each step has
// made of the text, then those below.
enum { SCRATCH_IDS = MAX_STEPS, SCRATCH_SYMBOLS, SCRATCH_RANKS, SCRATCH_TEXT, SCRATCH_VALID,
       N_SCRATCH };

typedef struct Encoder {
    const Tokenizer *t;
    Buffer *ids;                    // of int32_t
    Buffer scratch[N_SCRATCH];
    RegexRun regex;
    CachedPiece *cache;
    size_t n_cache;                 // a power of two, or 0
    size_t seen;                    // bytes of text so far
    bool failed;                    // once something has, nothing more is appended
    qlora_error *err;
    struct Encoder *next;
} Encoder;

// Encoders that no call works with now; there are as many as calls were ever at work at once.
typedef struct EncoderList { pthread_mutex_t lock; Encoder *first; } EncoderList;

// The cache grows with the text seen: a short one would pay more for it than it saves.
static void cache_grow(Encoder *e, const qlora_allocator *a) {
    size_t wanted = 64;
    if (e->seen < 256 || e->seen / 32 < e->n_cache || e->n_cache == MAX_CACHED_PIECES) return;
    while (wanted < e->seen / 8 && wanted < MAX_CACHED_PIECES) wanted *= 2;
    mem_free(a, e->cache, e->n_cache, sizeof *e->cache);
    e->cache = mem_alloc(a, wanted, sizeof *e->cache, e->err);
    e->n_cache = e->cache ? wanted : 0;
    e->failed = !e->cache;
}

// Takes an encoder from the list, or makes one, for a text of n bytes.
static Encoder *encoder_open(const Tokenizer *t, size_t n, Buffer *ids, qlora_error *err) {
    const qlora_allocator *a = t->region.allocator;
    pthread_mutex_lock(&t->encoders->lock);
    Encoder *e = t->encoders->first;
    if (e) t->encoders->first = e->next;
    pthread_mutex_unlock(&t->encoders->lock);
    if (!e && !(e = mem_alloc(a, 1, sizeof *e, err))) return NULL;
    for (size_t i = 0; i < N_SCRATCH; i++) e->scratch[i].allocator = a;
    e->t = t;
    e->ids = ids;
    e->regex = regex_run(n, err);
    e->err = err;
    e->failed = false;
    e->seen += n;
    cache_grow(e, a);
    return e;
}

static void encoder_done(Encoder *e) {
    EncoderList *list = e->t->encoders;
    pthread_mutex_lock(&list->lock);
    e->next = list->first;
    list->first = e;
    pthread_mutex_unlock(&list->lock);
}

// Gives their memory back, while no call is at work.
static void encoders_free(const Tokenizer *t) {
    const qlora_allocator *a = t->region.allocator;
    for (Encoder *e = t->encoders->first, *next; e; e = next) {
        next = e->next;
        for (size_t i = 0; i < N_SCRATCH; i++) buffer_free(&e->scratch[i]);
        mem_free(a, e->cache, e->n_cache, sizeof *e->cache);
        mem_free(a, e, 1, sizeof *e);
    }
    t->encoders->first = NULL;
}

static void put(Encoder *e, Buffer *out, const void *data, size_t n) {
    if (!e->failed && buffer_append(out, data, n, e->err)) e->failed = true;
}

static void put_ids(Encoder *e, const int32_t *ids, size_t n) {
    put(e, e->ids, ids, n * sizeof *ids);
}

// The ranks of a piece's pairs, as a tree of minima: ranks[leaves + i] is that of the pair which
// symbol i begins, ranks[k] the lower one of ranks[2k] and ranks[2k + 1], ranks[1] the lowest.
static void rank_pair(const Vocabulary *v, const Symbol *symbols, uint32_t *ranks, size_t leaves,
                      int32_t i) {
    if (i < 0) return;
    int32_t next = symbols[i].next;
    const Merge *merge = next < 0 ? NULL : merge_slot(v, symbols[i].id, symbols[next].id);
    size_t k = leaves + (size_t)i;
    uint32_t rank = merge && merge->left >= 0 ? merge->rank : NO_RANK;
    for (; k && ranks[k] != rank; k /= 2) {
        ranks[k] = rank;
        rank = ranks[k ^ 1] < rank ? ranks[k ^ 1] : rank;
    }
}

// Merges what can be merged: the lowest rank first, of equal ones the leftmost; O(n log n). Returns
// how many ids are left.
static size_t merge_symbols(Encoder *e, int32_t *ids, size_t n) {
    const Vocabulary *v = &e->t->vocabulary;
    Buffer *list = &e->scratch[SCRATCH_SYMBOLS], *tree = &e->scratch[SCRATCH_RANKS];
    size_t leaves = 1, k;
    while (leaves < n) leaves *= 2;
    list->size = tree->size = 0;
    if (n > INT32_MAX / 2 || buffer_reserve(list, n * sizeof(Symbol), e->err)
        || buffer_reserve(tree, 2 * leaves * sizeof(uint32_t), e->err)) {
        e->failed = true;
        return 0;
    }
    Symbol *symbols = (Symbol *)(void *)list->data;
    uint32_t *ranks = (uint32_t *)(void *)tree->data;
    int32_t count = (int32_t)n;
    memset(ranks, 0xFF, 2 * leaves * sizeof *ranks);          // NO_RANK
    for (int32_t i = 0; i < count; i++)
        symbols[i] = (Symbol){ids[i], i - 1, i + 1 < count ? i + 1 : -1};
    for (int32_t i = 0; i < count; i++) rank_pair(v, symbols, ranks, leaves, i);
    while (ranks[1] != NO_RANK) {
        for (k = 1; k < leaves;) k = 2 * k + (ranks[2 * k] > ranks[1]);
        int32_t i = (int32_t)(k - leaves), gone = symbols[i].next;
        Symbol *left = &symbols[i], *right = &symbols[gone];
        left->id = merge_slot(v, left->id, right->id)->merged;
        left->next = right->next;
        right->next = -1;
        if (left->next >= 0) symbols[left->next].previous = i;
        rank_pair(v, symbols, ranks, leaves, gone);
        rank_pair(v, symbols, ranks, leaves, i);
        rank_pair(v, symbols, ranks, leaves, left->previous);
    }
    n = 0;
    for (int32_t i = 0; i >= 0; i = symbols[i].next) ids[n++] = symbols[i].id;
    return n;
}

// The symbols a piece begins with, before any merge. A character that is no token becomes its byte
// tokens, if all exist, else the unknown token; with fuse_unk several become one of them.
static void first_symbols(Encoder *e, const char *text, size_t n, Buffer *symbols) {
    const Tokenizer *t = e->t;
    bool after_unknown = false;
    for (size_t i = 0, length; i < n; i += length) {
        uint32_t code;
        int32_t ids[4] = {-1};
        size_t count = 1, known = 1;
        length = t->byte_level ? 1 : utf8_next(text + i, &code);
        if (!t->byte_level) ids[0] = model_id(&t->vocabulary, text + i, length);
        if (ids[0] < 0 && (t->byte_fallback || t->byte_level))
            for (count = 0; count < length; count++)
                ids[count] = t->byte_id[(unsigned char)text[i + count]];
        for (size_t k = 0; k < count; k++) known &= ids[k] >= 0;
        if (!known) {
            ids[0] = t->unk_id;
            count = t->unk_id >= 0 && !(after_unknown && t->fuse_unk);
        }
        after_unknown = !known;
        put(e, symbols, ids, count * sizeof *ids);
    }
}

// Appends bytes written in the alphabet of byte-level tokenizers.
static void put_alphabet(Encoder *e, Buffer *out, const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        char text[4];
        put(e, out, text, utf8_encode(text, byte_to_char((unsigned char)bytes[i])));
    }
}

// The id of a whole piece that is in the model's vocabulary, or -1.
static int32_t whole_piece(Encoder *e, const char *text, size_t n) {
    Buffer *name = &e->scratch[SCRATCH_TEXT];
    if (!e->t->byte_level) return model_id(&e->t->vocabulary, text, n);
    name->size = 0;
    if (n <= e->t->vocabulary.longest) put_alphabet(e, name, text, n);
    return name->size ? model_id(&e->t->vocabulary, name->data, name->size) : -1;
}

// Where two characters stand side by side in no token, no merge reaches from one to the other, and
// what is on both sides can be encoded apart: the same ids, from short pieces that repeat. A bit
// for each pair of characters says whether they do, in one table shared by all pairs; where a token
// ends inside a character, for the bytes on both sides.
enum { NEIGHBOUR_BITS = 1 << 20, FRAGMENT = UNICODE_LIMIT };

static size_t neighbour_bit(uint32_t left, uint32_t right) {
    return hash_mix((uint64_t)left << 32 | right) & (NEIGHBOUR_BITS - 1);
}

static size_t fragment_bit(const char *right) {
    return neighbour_bit(FRAGMENT + (unsigned char)right[-1], (unsigned char)*right);
}

static void note_neighbours(uint64_t *bits, const char *text, size_t n) {
    uint32_t left = 0, right;
    for (size_t i = 0, length; i < n; i += length, left = right) {
        length = utf8_decode(text + i, n - i, &right);
        if (!length) {
            right = FRAGMENT;
            for (length = 1; i + length < n && (text[i + length] & 0xC0) == 0x80;) length++;
        }
        bool whole = left != FRAGMENT && right != FRAGMENT;
        size_t bit = !i ? 0 : whole ? neighbour_bit(left, right) : fragment_bit(text + i);
        if (i) bits[bit / 64] |= (uint64_t)1 << bit % 64;
    }
}

static inline bool has_bit(const uint64_t *bits, size_t bit) {
    return bits[bit / 64] >> bit % 64 & 1;
}

// Can text be cut between `left` and `right`, which begins at `at`?
static inline bool may_cut(const Tokenizer *t, uint32_t left, uint32_t right, const char *at) {
    return !has_bit(t->neighbours, neighbour_bit(left, right)) &&
           ((left < 0x80 && right < 0x80) || !has_bit(t->neighbours, fragment_bit(at)));
}

static void encode_piece(Encoder *e, const char *text, size_t n, bool part);

// Encodes a piece part by part.
static void encode_parts(Encoder *e, const char *text, size_t n) {
    size_t begin = 0;
    uint32_t left, right;
    for (size_t i = utf8_next(text, &left), length; i < n; i += length, left = right) {
        length = utf8_next(text + i, &right);
        if (!may_cut(e->t, left, right, text + i)) continue;
        encode_piece(e, text + begin, i - begin, true);
        begin = i;
    }
    encode_piece(e, text + begin, n - begin, true);
}

// Byte-pair encoding of one piece, or of a part of it, which is not looked up as a whole.
static void encode_piece(Encoder *e, const char *text, size_t n, bool part) {
    const Tokenizer *t = e->t;
    CachedPiece *cached = NULL;
    uint8_t key = (uint8_t)(n | (part && t->ignore_merges ? 0x80 : 0));
    if (e->n_cache && n <= sizeof cached->text) {
        cached = &e->cache[(hash_bytes(text, n) + key) & (e->n_cache - 1)];
        if (cached->key == key && memcmp(cached->text, text, n) == 0) {
            put_ids(e, cached->ids, cached->count);
            return;
        }
    }
    size_t first = e->ids->size;
    int32_t whole = t->ignore_merges && !part ? whole_piece(e, text, n) : -1;
    if (whole >= 0) put_ids(e, &whole, 1);
    else if (t->neighbours && !part) encode_parts(e, text, n);
    else {
        Buffer *symbols = &e->scratch[SCRATCH_IDS];
        symbols->size = 0;
        first_symbols(e, text, n, symbols);
        int32_t *ids = (int32_t *)(void *)symbols->data;
        size_t count = symbols->size / sizeof *ids;
        put_ids(e, ids, count > 1 ? merge_symbols(e, ids, count) : count);
    }
    size_t bytes = e->ids->size - first;
    if (!cached || e->failed || bytes > sizeof cached->ids) return;
    *cached = (CachedPiece){.key = key, .count = (uint8_t)(bytes / sizeof *cached->ids)};
    memcpy(cached->text, text, n);
    if (bytes) memcpy(cached->ids, e->ids->data + first, bytes);
}

// ----------------------------------------------------------------------------------------- steps

// How many bytes of white space text begins with, or (at_end) ends with.
static size_t space_length(const char *text, size_t n, bool at_end) {
    size_t length = 0;
    while (length < n) {
        uint32_t code;
        size_t bytes = utf8_next(text + (at_end ? utf8_before(text, n - length) : length), &code);
        if (!unicode_is_space(code)) break;
        length += bytes;
    }
    return length;
}

// Appends text with every match replaced.
static int replace_matches(RegexRun *run, const Regex *regex, const char *text, size_t n,
                           const char *with, Buffer *out) {
    size_t done = 0, start, end;
    int found;
    while ((found = regex_find(run, regex, text, n, done, &start, &end)) > 0) {
        if (buffer_append(out, text + done, start - done, run->err)
            || buffer_append(out, with, strlen(with), run->err)) return -1;
        done = end;
    }
    return found < 0 ? -1 : buffer_append(out, text + done, n - done, run->err);
}

// Sentencepiece's remove_extra_whitespaces: spaces at both ends go, several in a row become one.
static int append_trimmed(Buffer *out, const char *text, size_t n, qlora_error *err) {
    for (size_t mark = 1; mark; n -= mark)
        mark = n >= 3 && starts_with(text + n - 3, 3, space_mark) ? 3 : n && text[n - 1] == ' ';
    for (size_t i = 0; i < n; i++) {
        bool extra = text[i] == ' ' && (out->size == 0 || out->data[out->size - 1] == ' ');
        if (!extra && buffer_append(out, text + i, 1, err)) return -1;
    }
    return 0;
}

// Does a step that rewrites; *text and *n become what it makes of the text. at_start: it is where
// the whole text begins.
static void rewrite(Encoder *e, size_t step, const char **text, size_t *n, bool at_start) {
    const Step *s = &e->t->steps[step];
    Buffer *out = &e->scratch[step];
    bool same = e->failed || *n == 0, bad = false;
    out->size = 0;
    if (!same && s->kind == STEP_PREPEND)
        same = s->scheme == PREPEND_NEVER || (s->scheme == PREPEND_FIRST && !at_start)
            || (s->once && (**text == ' ' || starts_with(*text, *n, s->text)));
    if (same) return;
    if (s->kind <= STEP_NFKD)
        bad = normalize(e->t->unicode, (NormalForm)s->kind, *text, *n, out, &same, e->err);
    if (s->kind == STEP_STRIP) {
        size_t left = s->left ? space_length(*text, *n, false) : 0;
        *text += left;
        *n -= left;
        *n -= s->right ? space_length(*text, *n, true) : 0;
        return;
    }
    if (s->kind == STEP_TRIM) bad = append_trimmed(out, *text, *n, e->err);
    if (s->kind == STEP_ALPHABET) put_alphabet(e, out, *text, *n);
    if (s->kind == STEP_REPLACE)
        bad = replace_matches(&e->regex, s->regex, *text, *n, s->text, out);
    if (s->kind == STEP_PREPEND) {
        put(e, out, s->text, strlen(s->text));
        put(e, out, *text, *n);
    }
    e->failed = e->failed || bad;
    if (!same) { *text = out->data; *n = out->size; }
}

// Sends text through pre-tokenizer `step` and all that follow, as deep as there are steps.
static void pre_tokenize(Encoder *e, size_t step, const char *text, size_t n, bool at_start) {
    for (; step < e->t->n_steps && e->t->steps[step].kind != STEP_SPLIT; step++)
        rewrite(e, step, &text, &n, at_start);
    if (n == 0 || e->failed) return;
    if (step == e->t->n_steps) { encode_piece(e, text, n, false); return; }
    // A piece ends where a match begins or ends, unless the behaviour joins what is on both sides.
    const Step *s = &e->t->steps[step++];
    size_t piece = 0, start = 0, end = 0;
    bool before = false;                              // is what ends at `at` a match?
    for (size_t at = 0, next; at < n && !e->failed; at = next) {
        int found = at < end ? 1 : regex_find(&e->regex, s->regex, text, n, at, &start, &end);
        if (found < 0) { e->failed = true; return; }
        if (!found) start = end = n;
        bool match = (at == start) != s->invert;
        next = at == start ? end : start;
        bool joins = s->behavior == SPLIT_WITH_PREVIOUS ? match && !before
                   : s->behavior == SPLIT_WITH_NEXT ? before && !match
                   : s->behavior == SPLIT_CONTIGUOUS && before == match;
        if (at > piece && !joins) {
            if (!before || s->behavior != SPLIT_REMOVED)
                pre_tokenize(e, step, text + piece, at - piece, at_start && piece == 0);
            piece = at;
        }
        before = match;
    }
    if (!before || s->behavior != SPLIT_REMOVED)
        pre_tokenize(e, step, text + piece, n - piece, at_start && piece == 0);
}

// -------------------------------------------------------------------------------- added tokens

// Is the pattern behind the text in the order of strcmp? And does the text begin with it?
static bool is_behind(const AddedToken *token, const char *text, size_t n) {
    int order = memcmp(token->pattern, text, min_size(token->length, n));
    return order ? order > 0 : token->length > n;
}

static bool begins_with(const char *text, size_t n, const AddedToken *token) {
    return token->length <= n && memcmp(text, token->pattern, token->length) == 0;
}

// The longest added token that text begins with, or NULL. Whatever sorts between such a token and
// the text begins with that token, too: from the last one not behind the text, follow `shorter`.
static const AddedToken *longest_added(const AddedSet *set, const char *text, size_t n) {
    size_t begin = set->first[(unsigned char)text[0]], low = begin;
    size_t high = set->first[(unsigned char)text[0] + 1];
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (is_behind(&set->tokens[middle], text, n)) high = middle;
        else low = middle + 1;
    }
    const AddedToken *token = low > begin ? &set->tokens[low - 1] : NULL;
    while (token && !begins_with(text, n, token)) token = token->shorter;
    return token;
}

// Do no word characters stand on either side?
static bool is_single_word(const Unicode *u, const char *text, size_t n, size_t start, size_t end) {
    uint32_t before = ' ', behind = ' ';
    if (start > 0) utf8_next(text + utf8_before(text, start), &before);
    if (end < n) utf8_next(text + end, &behind);
    bool joins = (before | 1) == 0x200D || (behind | 1) == 0x200D;     // zero-width (non-)joiners
    return !joins && !unicode_is_word(u, before) && !unicode_is_word(u, behind);
}

// Cuts text at the added tokens, whose ids are appended; what is between goes on its way. Called
// with the raw text and again (normal) with what the normalizers have made of its parts.
static void encode_text(Encoder *e, bool normal, const char *text, size_t n, bool at_start);

static void encode_part(Encoder *e, bool normal, const char *text, size_t n, bool at_start) {
    if (normal) { pre_tokenize(e, e->t->n_normalizers, text, n, at_start); return; }
    for (size_t i = 0; i < e->t->n_normalizers; i++) rewrite(e, i, &text, &n, at_start);
    encode_text(e, true, text, n, at_start);
}

static void encode_text(Encoder *e, bool normal, const char *text, size_t n, bool at_start) {
    const AddedSet *set = normal ? &e->t->added_normalized : &e->t->added_raw;
    size_t done = 0;
    for (size_t i = 0; i < n && set->n;) {
        const size_t *first = &set->first[(unsigned char)text[i]];
        const AddedToken *token = first[0] == first[1] ? NULL : longest_added(set, text + i, n - i);
        if (!token) { i++; continue; }
        size_t start = i, end = i + token->length;
        i = end;
        if (token->single_word && !is_single_word(e->t->unicode, text, n, start, end)) continue;
        if (token->lstrip) start = max_size(done, start - space_length(text, start, true));
        if (token->rstrip) end += space_length(text + end, n - end, false);
        if (done < start) encode_part(e, normal, text + done, start - done, at_start && done == 0);
        // An overlap with white space that the token before has eaten may leave nothing.
        if (start < end) put_ids(e, &token->id, 1);
        done = max_size(start, end);
    }
    if (done < n) encode_part(e, normal, text + done, n - done, at_start && done == 0);
}

// Appends the ids of text (n bytes; invalid UTF-8 counts as U+FFFD) to ids, a Buffer of int32_t.
// add_special: with what the post-processor puts around it. Added tokens in the text become their
// ids. Safe to call from several threads at once.
static int tokenizer_encode(const Tokenizer *t, const char *text, size_t n, bool add_special,
                            Buffer *ids, qlora_error *err) {
    Encoder *e = encoder_open(t, n, ids, err);
    size_t before = ids->size;
    if (!e) return -1;
    Buffer *valid = &e->scratch[SCRATCH_VALID];
    valid->size = 0;
    if (!e->failed) e->failed = utf8_append_lossy(valid, text, n, NULL, err);
    if (add_special) put_ids(e, t->prefix, t->n_prefix);
    encode_text(e, false, valid->data, valid->size, true);
    if (add_special) put_ids(e, t->suffix, t->n_suffix);
    bool failed = e->failed;
    encoder_done(e);
    if (failed) ids->size = before;
    return failed ? -1 : 0;
}

// ------------------------------------------------------------------------------------- decoding

// A text that grows token by token. Start with TokenStream s = {0}; end with token_stream_end or
// token_stream_free.
typedef struct {
    Buffer held;                    // bytes that cannot be shown yet
    Buffer token;                   // the token with its spaces replaced
    RegexRun regex;
    size_t strips;                  // how often the beginning may still be stripped
    bool open, any;                 // any: a token has come
} TokenStream;

// Appends decoded text, without what is stripped from the beginning of the whole.
static int stream_emit(const Tokenizer *t, TokenStream *s, const char *text, size_t n, Buffer *out,
                       qlora_error *err) {
    for (; s->strips && starts_with(text, n, t->decode.strip); s->strips--) {
        text += strlen(t->decode.strip);
        n -= strlen(t->decode.strip);
    }
    if (n) s->strips = 0;
    return buffer_append(out, text, n, err);
}

// Appends the held bytes, which nothing can complete any more: an incomplete character of
// byte-level tokens is one U+FFFD; a run of byte tokens that is no valid UTF-8 is one for each
// byte.
static int stream_flush(const Tokenizer *t, TokenStream *s, Buffer *out, qlora_error *err) {
    size_t n = s->held.size, marks = t->decode.byte_level ? min_size(n, 1) : n;
    bool valid = utf8_valid_prefix(s->held.data, n) == n;
    int bad = n && valid ? stream_emit(t, s, s->held.data, n, out, err) : 0;
    for (size_t i = 0; i < marks && !valid && !bad; i++)
        bad = stream_emit(t, s, "\xEF\xBF\xBD", 3, out, err);
    s->held.size = 0;
    return bad;
}

// Bytes of byte-level tokens: whole characters are handed on, an incomplete one is kept. A token
// with a character outside the alphabet is plain text.
static int stream_bytes(TokenStream *s, const char *text, size_t n, Buffer *out, qlora_error *err) {
    size_t old = s->held.size, keep;
    uint32_t code;
    int byte = 0;
    for (size_t i = 0; i < n && byte >= 0;) {
        i += utf8_next(text + i, &code);
        byte = char_to_byte(code);
        char c = (char)byte;
        if (buffer_append(&s->held, &c, 1, err)) return -1;
    }
    if (byte < 0) {
        s->held.size = old;
        if (buffer_append(&s->held, text, n, err)) return -1;
    }
    if (utf8_append_lossy(out, s->held.data, s->held.size, &keep, err)) return -1;
    if (keep) memmove(s->held.data, s->held.data + s->held.size - keep, keep);
    s->held.size = keep;
    return 0;
}

// Appends what token `id` adds to the text. Bytes that do not make a character yet are held back,
// so that all pieces together are exactly tokenizer_decode of all ids. Ids without a token, and
// with skip_special special tokens, add nothing.
static int token_stream_push(const Tokenizer *t, TokenStream *s, int32_t id, bool skip_special,
                             Buffer *out, qlora_error *err) {
    const qlora_allocator *a = t->region.allocator;
    const DecodeSteps *d = &t->decode;
    if (!s->open)
        *s = (TokenStream){.held = {.allocator = a}, .token = {.allocator = a},
                           .regex = regex_run(0, err), .strips = d->strips, .open = true};
    const Token *token = id < 0 ? NULL : vocabulary_token(&t->vocabulary, (size_t)id);
    if (!token || (skip_special && token->special)) return 0;
    const char *text = token->text;
    size_t n = token->length;
    if (d->replace) {
        s->token.size = 0;
        s->regex.budget = (size_t)1 << 20;
        s->regex.err = err;
        if (replace_matches(&s->regex, d->replace, text, n, d->drop_first && !s->any ? "" : d->with,
                            &s->token)) return -1;
        text = s->token.data;
        n = s->token.size;
    }
    s->any = true;
    if (d->byte_level) return stream_bytes(s, text, n, out, err);
    int byte = d->byte_fallback ? byte_token(text, n) : -1;
    char c = (char)byte;
    if (byte >= 0) return buffer_append(&s->held, &c, 1, err);
    return stream_flush(t, s, out, err) || stream_emit(t, s, text, n, out, err) ? -1 : 0;
}

// Releases a stream that is not ended.
static void token_stream_free(TokenStream *s) {
    if (!s->open) return;
    buffer_free(&s->held);
    buffer_free(&s->token);
    s->open = false;
}

// Appends what is still held back and releases the stream.
static int token_stream_end(const Tokenizer *t, TokenStream *s, Buffer *out, qlora_error *err) {
    int bad = s->open ? stream_flush(t, s, out, err) : 0;
    token_stream_free(s);
    return bad;
}

// Appends the text of the ids.
static int tokenizer_decode(const Tokenizer *t, const int32_t *ids, size_t n, bool skip_special,
                            Buffer *text, qlora_error *err) {
    TokenStream s = {.open = false};
    int bad = 0;
    for (size_t i = 0; i < n && !bad; i++)
        bad = token_stream_push(t, &s, ids[i], skip_special, text, err);
    bad = bad || token_stream_end(t, &s, text, err);
    token_stream_free(&s);
    return bad ? -1 : 0;
}

// The largest id + 1.
static size_t tokenizer_size(const Tokenizer *t) { return t->vocabulary.n_ids; }

// The id of the token with exactly this text, or -1.
static int32_t tokenizer_id(const Tokenizer *t, const char *text, size_t n) {
    return vocabulary_id(&t->vocabulary, text, n);
}

#ifdef QLORA_MAIN
// The text of a token as the file has it, or NULL; *n is its length.
static const char *tokenizer_token(const Tokenizer *t, int32_t id, size_t *n) {
    const Token *token = id < 0 ? NULL : vocabulary_token(&t->vocabulary, (size_t)id);
    if (token) *n = token->length;
    return token ? token->text : NULL;
}
#endif

// ------------------------------------------------------------- reading the steps of tokenizer.json

// What reading a tokenizer works with. The parsed files live in `scratch` and go in the end; what
// is kept is copied to the tokenizer's own region. The first failure is remembered, and nothing is
// read or added after it: so only the end asks whether all went well.
typedef struct {
    Tokenizer *t;
    const char *directory;
    const char *file;               // that is being read, for messages
    Region scratch;
    Encoder *encoder;               // normalises added tokens
    Buffer text;                    // of no lasting use
    int decoder;                    // place of the latest decoder in their order
    const Json *config, *map;       // tokenizer_config.json, special_tokens_map.json, or NULL
    const Json *root;               // tokenizer.json, or NULL
    const Json **flags;             // (max_ids) the configuration's added tokens by id, or NULL
    bool failed;
    qlora_error *err;
} Loader;

static void refuse(Loader *l, const char *what, const char *name) {
    if (!l->failed) fail(l->err, "%s: %s: %.100s", l->file, what, name ? name : "(none)");
    l->failed = true;
}

// n cleared objects that live as long as the tokenizer, or NULL.
static void *keep(Loader *l, size_t n, size_t size) {
    void *p = l->failed ? NULL : region_alloc(&l->t->region, n, size, l->err);
    if (!p) l->failed = true;
    return p;
}

static const char *keep_text(Loader *l, const char *text, size_t n) {
    char *copy = keep(l, n + 1, 1);
    if (copy) memcpy(copy, text, n);
    return copy ? copy : "";
}

// A copy of a member that must be a string without NUL.
static const char *read_text(Loader *l, const Json *object, const char *key) {
    const Json *value = json_get(object, key);
    bool ok = json_is(value, JSON_STRING) && strlen(value->text) == value->length;
    if (!ok) refuse(l, "no text where one is expected", key);
    return ok ? keep_text(l, value->text, value->length) : "";
}

// Which of the names (ended by NULL) is this one? Or -1.
static int type_index(const char *name, const char *const *names) {
    for (int i = 0; name && names[i]; i++)
        if (strcmp(name, names[i]) == 0) return i;
    return -1;
}

static const Regex *compile(Loader *l, const char *pattern) {
    const Regex *regex = l->failed ? NULL
        : regex_compile(l->t->unicode, pattern, l->file, &l->t->region, l->err);
    if (!regex) l->failed = true;
    return regex;
}

// A regular expression that matches exactly this text.
static const Regex *compile_literal(Loader *l, const char *text) {
    l->text.size = 0;
    for (const char *c = text; *c; c++) {
        bool plain = isalnum((unsigned char)*c) || (unsigned char)*c >= 0x80;
        if (buffer_append(&l->text, "\\", plain ? 0 : 1, l->err)
            || buffer_append(&l->text, c, 1, l->err)) l->failed = true;
    }
    if (buffer_append(&l->text, "", 1, l->err)) l->failed = true;
    return compile(l, l->text.data);
}

// "pattern": {"Regex": "..."} or {"String": "..."}.
static const Regex *compile_pattern(Loader *l, const Json *step) {
    const Json *pattern = json_get(step, "pattern");
    return json_get(pattern, "Regex") ? compile(l, read_text(l, pattern, "Regex"))
                                      : compile_literal(l, read_text(l, pattern, "String"));
}

// Calls read on a step, or on each step of a "Sequence" whose list has that key.
typedef void (*StepReader)(Loader *l, const Json *step, const char *type);

static void read_steps(Loader *l, const Json *step, const char *list, StepReader read) {
    const char *type = json_get_text(step, "type");
    if (!step || step->kind == JSON_NULL) return;
    if (!type || strcmp(type, "Sequence") != 0) { read(l, step, type); return; }
    const Json *steps = json_get(step, list);
    if (!json_is(steps, JSON_ARRAY)) { refuse(l, "a Sequence without its list", list); return; }
    for (step = steps->first; step; step = step->next) read_steps(l, step, list, read);
}

// Adds a step; `pattern` is its regular expression, unless it has been compiled. One that follows
// ByteLevel works on the alphabet that bytes are written in: that is what pieces are made of then.
static void add_step(Loader *l, Step step, const char *pattern) {
    Tokenizer *t = l->t;
    if (t->n_steps + t->byte_level >= MAX_STEPS)
        refuse(l, "unsupported tokenizer", "more than 24 steps");
    if (t->byte_level && !l->failed) t->steps[t->n_steps++].kind = STEP_ALPHABET;
    t->byte_level = false;
    if (pattern) step.regex = compile(l, pattern);
    if (!l->failed) t->steps[t->n_steps++] = step;
}

static void read_normalizer(Loader *l, const Json *step, const char *type) {
    static const char *const names[] = {"NFC", "NFD", "NFKC", "NFKD", "Strip", "Prepend", "Replace",
                                        NULL};
    Step s = {.kind = (StepKind)type_index(type, names), .scheme = PREPEND_ALWAYS,
              .left = json_get_bool(step, "strip_left", false),
              .right = json_get_bool(step, "strip_right", false)};
    if (type_index(type, names) < 0) refuse(l, "unsupported normalizer", type);
    if (s.kind == STEP_PREPEND) s.text = read_text(l, step, "prepend");
    if (s.kind == STEP_REPLACE) s.text = read_text(l, step, "content");
    if (s.kind == STEP_REPLACE) s.regex = compile_pattern(l, step);
    add_step(l, s, NULL);
}

// How texts are cut where the file does not say it: by the pattern of GPT-2 (which "ByteLevel"
// stands for when use_regex is set) or of Qwen2.
static const char gpt2_pattern[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
static const char qwen2_pattern[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+"
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

// The pieces are bytes from here on, perhaps cut by a pattern and with a space in front.
static void add_byte_level(Loader *l, bool prefix_space, const char *pattern) {
    Step space = {.kind = STEP_PREPEND, .text = " ", .scheme = PREPEND_ALWAYS, .once = true};
    if (prefix_space) add_step(l, space, NULL);
    if (pattern) add_step(l, (Step){.kind = STEP_SPLIT}, pattern);
    l->t->byte_level = true;
}

// What Metaspace, pre-tokenizer or decoder, says: the one character that stands for a space, and
// "prepend_scheme" (in older files "add_prefix_space").
static const char *read_metaspace(Loader *l, const Json *step, PrependScheme *scheme) {
    static const char *const schemes[] = {"first", "always", "never", NULL};
    const char *mark = read_text(l, step, "replacement");
    const char *name = json_get_text(step, "prepend_scheme");
    uint32_t code;
    if (!name) name = json_get_bool(step, "add_prefix_space", true) ? "always" : "never";
    int found = type_index(name, schemes);
    *scheme = found < 0 ? PREPEND_NEVER : (PrependScheme)found;
    if (!*mark || mark[utf8_next(mark, &code)] || found < 0)
        refuse(l, "unsupported Metaspace", name);
    return mark;
}

// Metaspace is three steps in one: a mark in front, a mark for each space, a cut before each mark.
static void read_pre_metaspace(Loader *l, const Json *step) {
    const Tokenizer *t = l->t;
    Step front = {.kind = STEP_PREPEND, .once = true};
    front.text = read_metaspace(l, step, &front.scheme);
    // Where the text begins is not known any more once a step has put something in front of it.
    for (size_t i = 0; i < t->n_steps && front.scheme == PREPEND_FIRST; i++)
        if (t->steps[i].kind > STEP_STRIP && t->steps[i].kind != STEP_SPLIT)
            refuse(l, "unsupported pre_tokenizer", "Metaspace (first) after a step that rewrites");
    add_step(l, front, NULL);
    add_step(l, (Step){.kind = STEP_REPLACE, .text = front.text}, " ");
    if (json_get_bool(step, "split", true))
        add_step(l, (Step){.kind = STEP_SPLIT, .behavior = SPLIT_WITH_NEXT,
                           .regex = compile_literal(l, front.text)}, NULL);
}

static void read_pre_tokenizer(Loader *l, const Json *step, const char *type) {
    static const char *const names[] = {"Split", "ByteLevel", "Metaspace", "Digits", "Punctuation",
                                        "WhitespaceSplit", NULL};
    static const char *const behaviors[] = {"Isolated", "Removed", "MergedWithPrevious",
                                            "MergedWithNext", "Contiguous", NULL};
    const char *name = json_get_text(step, "behavior");
    int kind = type_index(type, names), behavior = name ? type_index(name, behaviors) : 0;
    bool each = json_get_bool(step, "individual_digits", false), alone;
    Step s = {.kind = STEP_SPLIT, .behavior = (SplitBehavior)behavior,
              .invert = json_get_bool(step, "invert", false)};
    if (behavior < 0) refuse(l, "unsupported behavior of a pre_tokenizer", name);
    switch (kind) {
    case 0:
        s.regex = compile_pattern(l, step);
        add_step(l, s, NULL);
        break;
    case 1:
        // transformers lets its configuration decide about the space where the step stands alone.
        alone = l->config && step == json_get(l->root, "pre_tokenizer");
        add_byte_level(l, json_get_bool(alone ? l->config : step, "add_prefix_space", !alone),
                       json_get_bool(step, "use_regex", true) ? gpt2_pattern : NULL);
        break;
    case 2: read_pre_metaspace(l, step); break;
    case 3: add_step(l, s, each ? "\\p{N}" : "\\p{N}+"); break;
    case 4: add_step(l, s, "[!-/:-@\\[-`{-~\\p{P}]"); break;
    case 5: s.behavior = SPLIT_REMOVED; add_step(l, s, "\\s+"); break;
    default: refuse(l, "unsupported pre_tokenizer", type);
    }
}

// Decoders are known in one order, each at most once: ByteLevel or Metaspace alone, or Replace,
// ByteFallback, Fuse, and Strip, which only takes away from the beginning.
static void read_decoder(Loader *l, const Json *step, const char *type) {
    static const char *const names[] = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace",
                                        "ByteLevel", NULL};
    DecodeSteps *d = &l->t->decode;
    int kind = type_index(type, names), before = l->decoder;
    PrependScheme scheme;
    size_t stop = 0;
    if (kind <= before || (kind == 3 && before != 2) || (kind > 3 && before >= 0))
        refuse(l, "unsupported decoder, or not in its place", type);
    l->decoder = kind;
    if (kind == 0) {
        d->with = read_text(l, step, "content");
        d->replace = compile_pattern(l, step);
    }
    if (kind == 1) d->byte_fallback = true;
    if (kind == 3) {
        d->strip = read_text(l, step, "content");
        if (!json_to_size(json_get(step, "start"), &d->strips)
            || !json_to_size(json_get(step, "stop"), &stop) || stop || !*d->strip)
            refuse(l, "unsupported decoder", "Strip of this kind");
    }
    if (kind == 4) {
        d->replace = compile_literal(l, read_metaspace(l, step, &scheme));
        d->with = " ";
        d->drop_first = scheme != PREPEND_NEVER;
    }
    if (kind == 5) d->byte_level = true;
}

// Puts a token in front of every text, or behind it.
static void add_affix(Loader *l, const Json *id, bool behind) {
    Tokenizer *t = l->t;
    size_t number, *n = behind ? &t->n_suffix : &t->n_prefix;
    if (l->failed) return;
    if (*n == MAX_AFFIX || !json_to_size(id, &number) || !vocabulary_token(&t->vocabulary, number))
        refuse(l, "unsupported post_processor", "too many ids, or one without a token");
    else (behind ? t->suffix : t->prefix)[(*n)++] = (int32_t)number;
}

// The template: special tokens, whose ids go before or behind the text, and the text.
static void read_template(Loader *l, const Json *post) {
    const Json *single = json_get(post, "single");
    bool behind = false;
    for (const Json *piece = single ? single->first : NULL; piece; piece = piece->next) {
        const char *name = json_get_text(json_get(piece, "SpecialToken"), "id");
        const char *text = json_get_text(json_get(piece, "Sequence"), "id");
        if (text && !behind && strcmp(text, "A") == 0) { behind = true; continue; }
        const Json *ids = json_get(json_get(post, "special_tokens"), name ? name : "");
        ids = json_get(ids, "ids");
        if (!json_is(ids, JSON_ARRAY)) refuse(l, "TemplateProcessing without ids of", name);
        for (ids = ids ? ids->first : NULL; ids; ids = ids->next) add_affix(l, ids, behind);
    }
    if (!behind) refuse(l, "unsupported post_processor", "TemplateProcessing without a text");
}

static void read_post_processor(Loader *l, const Json *post, const char *type) {
    static const char *const names[] = {"ByteLevel", "TemplateProcessing", "RobertaProcessing",
                                        "BertProcessing", NULL};
    int kind = type_index(type, names);
    if (kind == 0) return;                            // moves offsets only
    if (kind < 0 || l->t->n_prefix || l->t->n_suffix) refuse(l, "unsupported post_processor", type);
    if (kind == 1) read_template(l, post);
    for (int behind = 0; behind < 2 && kind > 1; behind++) {          // ["text", id]
        const Json *token = json_get(post, behind ? "sep" : "cls");
        add_affix(l, token && token->first ? token->first->next : NULL, behind);
    }
}

// --------------------------------------------------------------------------- reading the model

// Room for n tokens, whose ids may leave some holes.
static void vocabulary_open(Loader *l, size_t n) {
    Vocabulary *v = &l->t->vocabulary;
    if (n > MAX_TOKENS) refuse(l, "a vocabulary", "of more than 2097152 tokens");
    v->max_ids = n + MAX_ID_HOLES;
    v->n_text_slots = hash_slots(v->max_ids);
    v->tokens = keep(l, v->max_ids, sizeof *v->tokens);
    v->by_text = keep(l, v->n_text_slots, sizeof *v->by_text);
}

// Adds a token, whose text and id must be new.
static void vocabulary_add(Loader *l, const char *text, size_t n, size_t id) {
    Vocabulary *v = &l->t->vocabulary;
    uint32_t *slot = l->failed ? NULL : vocabulary_slot(v, text, n);
    if (slot && (n > MAX_TOKEN_BYTES || id >= v->max_ids || *slot || v->tokens[id].text))
        refuse(l, "a token that is too long, there twice or with a wrong id", text);
    const char *kept = keep_text(l, text, n);
    if (l->failed) return;
    v->tokens[id] = (Token){.text = kept, .length = (uint32_t)n};
    *slot = (uint32_t)id + 1;
    v->longest = max_size(v->longest, n);
    v->n_ids = max_size(v->n_ids, id + 1);
    v->n_tokens++;
}

static void merges_open(Loader *l, size_t n) {
    Vocabulary *v = &l->t->vocabulary;
    v->n_merge_slots = hash_slots(n);
    v->merges = keep(l, v->n_merge_slots, sizeof *v->merges);
    for (size_t i = 0; v->merges && i < v->n_merge_slots; i++) v->merges[i].left = -1;
}

// Adds the merge of two tokens given by text. Of duplicates the last counts, as in `tokenizers`.
static void merge_add(Loader *l, const char *left, size_t n_left, const char *right, size_t n_right,
                      size_t rank) {
    Vocabulary *v = &l->t->vocabulary;
    l->text.size = 0;
    if (l->failed || buffer_append(&l->text, left, n_left, l->err)
        || buffer_append(&l->text, right, n_right, l->err)
        || buffer_append(&l->text, "", 1, l->err)) { l->failed = true; return; }
    int32_t a = vocabulary_id(v, left, n_left), b = vocabulary_id(v, right, n_right);
    int32_t both = vocabulary_id(v, l->text.data, l->text.size - 1);
    if (a < 0 || b < 0 || both < 0)
        refuse(l, "a merge, of which not all is in the vocabulary", l->text.data);
    else *merge_slot(v, a, b) = (Merge){a, b, both, (uint32_t)rank};
}

// A merge written "a b".
static void merge_add_line(Loader *l, const char *text, size_t n, size_t rank) {
    const char *space = n ? memchr(text, ' ', n) : NULL;
    size_t left = space ? (size_t)(space - text) : 0;
    if (!space || memchr(space + 1, ' ', n - left - 1)) refuse(l, "a merge that is no pair", text);
    else merge_add(l, text, left, space + 1, n - left - 1, rank);
}

static void read_merges(Loader *l, const Json *merges) {
    size_t rank = 0;
    if (!json_is(merges, JSON_ARRAY)) { refuse(l, "model without a list", "merges"); return; }
    merges_open(l, merges->count);
    for (const Json *merge = merges->first; merge; merge = merge->next) {
        const Json *a = merge->first, *b = a ? a->next : NULL;
        bool text = json_is(merge, JSON_STRING);
        if (text && strncmp(merge->text, "#version", 8) == 0) continue;
        if (json_is(a, JSON_STRING) && json_is(b, JSON_STRING) && !b->next)
            merge_add(l, a->text, a->length, b->text, b->length, rank++);
        else merge_add_line(l, text ? merge->text : "", text ? merge->length : 0, rank++);
    }
}

// Reads {"text": id, ...}, leaving room for the added tokens.
static void read_vocabulary(Loader *l, const Json *vocab, size_t n_added) {
    if (!json_is(vocab, JSON_OBJECT)) { refuse(l, "model without an object", "vocab"); return; }
    vocabulary_open(l, vocab->count + n_added);
    for (const Json *entry = vocab->first; entry; entry = entry->next) {
        size_t id;
        if (!json_to_size(entry, &id)) id = SIZE_MAX;
        vocabulary_add(l, entry->key, entry->key_length, id);
    }
}

// Notes which characters are neighbours in tokens, unless merges know of them otherwise: if
// characters are left out or united, or merged as unknown ones or as bytes <0xHH>.
static void read_neighbours(Loader *l) {
    Tokenizer *t = l->t;
    const Vocabulary *v = &t->vocabulary;
    bool every_byte = t->byte_level || t->byte_fallback;
    for (int byte = 0; byte < 256; byte++) every_byte &= t->byte_id[byte] >= 0;
    if (!every_byte && (t->byte_level || t->unk_id < 0 || t->fuse_unk)) return;
    for (size_t i = 0; i < 2 * v->n_merge_slots; i++) {
        int32_t id = i % 2 ? v->merges[i / 2].right : v->merges[i / 2].left;
        if (v->merges[i / 2].left < 0) continue;
        bool byte = !t->byte_level && byte_token(v->tokens[id].text, v->tokens[id].length) >= 0;
        if (byte || id == t->unk_id) return;
    }
    uint64_t *bits = keep(l, NEIGHBOUR_BITS / 64, sizeof *bits);
    char *bytes = keep(l, v->longest + 1, 1);
    for (size_t id = 0; id < v->n_ids && !l->failed; id++) {
        const Token *token = &v->tokens[id];
        size_t n = 0;
        uint32_t code;
        for (size_t k = 0; token->text && k < token->length; n++) {
            if (!t->byte_level) bytes[n] = token->text[k++];
            else {
                k += utf8_next(token->text + k, &code);
                bytes[n] = (char)char_to_byte(code);
            }
        }
        note_neighbours(bits, bytes, n);
    }
    t->neighbours = bits;
}

// What follows from vocabulary, merges and pre-tokenizers together.
static void finish_model(Loader *l) {
    Tokenizer *t = l->t;
    if (l->failed) return;
    for (unsigned byte = 0; byte < 256; byte++) {
        char text[8];
        size_t n = t->byte_level ? utf8_encode(text, byte_to_char(byte))
                                 : (size_t)snprintf(text, sizeof text, "<0x%02X>", byte);
        t->byte_id[byte] = model_id(&t->vocabulary, text, n);
    }
    read_neighbours(l);
}

// Reads "model", but for options that change what merging does and are not built here.
static void read_model(Loader *l, const Json *model, size_t n_added) {
    static const char *const empty[] = {"dropout", "end_of_word_suffix",
                                        "continuing_subword_prefix"};
    Tokenizer *t = l->t;
    const char *type = json_get_text(model, "type"), *unk = json_get_text(model, "unk_token");
    if (type ? strcmp(type, "BPE") != 0 : !json_get(model, "merges"))
        refuse(l, "unsupported model", type);
    for (size_t i = 0; i < sizeof empty / sizeof *empty; i++) {
        const Json *value = json_get(model, empty[i]);
        double number = 0;
        if (value && value->kind != JSON_NULL && !(value->kind == JSON_STRING && !value->length)
            && !(json_to_double(value, &number) && number == 0))
            refuse(l, "unsupported option of the model", empty[i]);
    }
    t->fuse_unk = json_get_bool(model, "fuse_unk", false);
    t->byte_fallback = json_get_bool(model, "byte_fallback", false);
    t->ignore_merges = json_get_bool(model, "ignore_merges", false);
    read_vocabulary(l, json_get(model, "vocab"), n_added);
    read_merges(l, json_get(model, "merges"));
    t->unk_id = unk && !l->failed ? vocabulary_id(&t->vocabulary, unk, strlen(unk)) : -1;
    if (unk && t->unk_id < 0) refuse(l, "unk_token is not in the vocabulary", unk);
    finish_model(l);
}

// ---------------------------------------------------------------------- reading added tokens

static int compare_added(const void *a, const void *b) {
    const AddedToken *x = a, *y = b;
    return is_behind(x, y->pattern, y->length) - is_behind(y, x->pattern, x->length);
}

static void added_sort(Loader *l, AddedSet *set) {
    if (set->n) qsort(set->tokens, set->n, sizeof *set->tokens, compare_added);
    for (size_t i = 0; i < set->n; i++) {
        AddedToken *token = &set->tokens[i];
        const AddedToken *shorter = i ? token - 1 : NULL;
        while (shorter && !begins_with(token->pattern, token->length, shorter))
            shorter = shorter->shorter;
        if (shorter && shorter->length == token->length)
            refuse(l, "added token that is another one when normalised", token->pattern);
        token->shorter = shorter;
        for (size_t b = (unsigned char)token->pattern[0] + 1u; b < 257; b++) set->first[b] = i + 1;
    }
}

static void added_open(Loader *l, size_t n) {
    l->t->added_raw.tokens = keep(l, n, sizeof(AddedToken));
    l->t->added_normalized.tokens = keep(l, n, sizeof(AddedToken));
}

static void added_close(Loader *l) {
    added_sort(l, &l->t->added_raw);
    added_sort(l, &l->t->added_normalized);
}

// Makes a token of the vocabulary one that is looked for in the text.
static AddedToken *add_token(Loader *l, int32_t id, bool special, bool normalized) {
    AddedSet *set = normalized ? &l->t->added_normalized : &l->t->added_raw;
    Token *token = &l->t->vocabulary.tokens[id];
    token->added = true;
    token->special = special;
    set->tokens[set->n] = (AddedToken){.pattern = token->text, .length = token->length, .id = id};
    return &set->tokens[set->n++];
}

// Enters an added token in any of three forms: {"id": 7, "content": "x", ...} in a list, "7":
// {"content": "x", ...} in added_tokens_decoder, "x": 7 in added_tokens.json. In a tokenizer.json
// its id must be the one the vocabulary has for it, or the next free one; the configuration adds
// what is missing there and decides how tokens are found. Elsewhere (next_id NULL) the file alone
// decides.
static void read_added_token(Loader *l, const Json *entry, size_t *next_id) {
    Vocabulary *v = &l->t->vocabulary;
    const Json key = {.kind = JSON_NUMBER, .text = entry->key, .length = entry->key_length};
    bool bare = entry->kind == JSON_NUMBER;
    const Json *text = bare ? &key : json_get(entry, "content");
    size_t id;
    if (!json_to_size(bare ? entry : entry->key ? &key : json_get(entry, "id"), &id) || !text
        || !text->text) { refuse(l, "added token without text or id", entry->key); return; }
    if (text->length == 0 || l->failed) return;
    int32_t known = vocabulary_id(v, text->text, text->length);
    if (next_id && entry->key && known >= 0 && v->tokens[known].added) return;
    size_t expected = known >= 0 ? (size_t)known : next_id ? *next_id : id;
    if (id != expected || (known >= 0 && v->tokens[known].added))
        refuse(l, "added token that stands there twice or has another id in the vocabulary",
               text->text);
    if (next_id) *next_id = max_size(*next_id, id + 1);
    if (known < 0) vocabulary_add(l, text->text, text->length, id);
    if (l->failed) return;
    v->tokens[id].outside = known < 0;
    const Json *other = l->flags ? l->flags[id] : NULL;
    const char *content = json_get_text(other, "content");
    if (content && strcmp(content, text->text) == 0) entry = other;
    bool special = json_get_bool(entry, "special", false);
    bool normalized = json_get_bool(entry, "normalized", !special);
    AddedToken *added = add_token(l, (int32_t)id, special, normalized);
    added->lstrip = json_get_bool(entry, "lstrip", false);
    added->rstrip = json_get_bool(entry, "rstrip", false);
    added->single_word = json_get_bool(entry, "single_word", false);
    for (size_t i = 0; i < l->t->n_normalizers && normalized; i++)
        rewrite(l->encoder, i, &added->pattern, &added->length, true);
    if (!added->length) refuse(l, "added token that normalising removes", text->text);
    added->pattern = keep_text(l, added->pattern, added->length);
}

static void read_added_tokens(Loader *l, const Json *list, size_t *next_id) {
    l->encoder = encoder_open(l->t, 0, NULL, l->err);
    if (!l->encoder) { l->failed = true; return; }
    for (const Json *entry = list ? list->first : NULL; entry; entry = entry->next)
        read_added_token(l, entry, next_id);
    if (l->encoder->failed) l->failed = true;
    encoder_done(l->encoder);
}

// ------------------------------------------------------------------------------ reading the files

enum { MAX_TOKENIZER_FILE = 1 << 28 };      // bytes; the largest in use has 34 million

// Reads and parses a file of the directory; NULL if there is none. Messages from now on name this
// file.
static const Json *read_json_file(Loader *l, const char *name) {
    bool found = false;
    const Json *value = l->failed ? NULL
        : read_json(l->directory, name, MAX_TOKENIZER_FILE, &l->scratch, &found, l->err);
    if (found && !value) l->failed = true;
    const char *path = value ? path_join(&l->scratch, l->directory, name, l->err) : NULL;
    if (path) l->file = path;
    return value;
}

// Reads a file of the directory that is no JSON into the empty buffer; false if there is none.
static bool read_other_file(Loader *l, const char *name, Buffer *out) {
    const char *path = l->failed ? NULL : path_join(&l->scratch, l->directory, name, l->err);
    if (!path) l->failed = true;
    if (!path || !file_exists(path)) return false;
    l->file = path;
    if (read_whole_file(path, MAX_TOKENIZER_FILE, out, l->err)) l->failed = true;
    return !l->failed;
}

// A token that the configuration names: "text" or {"content": "text"}, else NULL. *id: its id or
// -1.
static const char *config_token(const Loader *l, const char *key, int32_t *id) {
    const Json *value = json_get(l->config, key);
    if (!value) value = json_get(l->map, key);
    if (json_is(value, JSON_OBJECT)) value = json_get(value, "content");
    const char *text = json_is(value, JSON_STRING) ? value->text : NULL;
    *id = text && !l->failed ? tokenizer_id(l->t, text, strlen(text)) : -1;
    return text;
}

// The chat template: a text, or a list of named ones, of which "default" counts.
static void read_chat_template(Loader *l, const Json *config) {
    const Json *value = json_get(config, "chat_template");
    const Json *entry = json_is(value, JSON_ARRAY) ? value->first : NULL;
    for (; entry; entry = entry->next) {
        const char *name = json_get_text(entry, "name");
        if (name && strcmp(name, "default") == 0) value = json_get(entry, "template");
    }
    if (json_is(value, JSON_STRING)) l->t->chat_template = keep_text(l, value->text, value->length);
}

// Of three places for a chat template the later one counts.
static void read_config(Loader *l) {
    Tokenizer *t = l->t;
    Buffer text = {.allocator = t->region.allocator};
    t->bos_token = config_token(l, "bos_token", &t->bos_id);
    t->eos_token = config_token(l, "eos_token", &t->eos_id);
    if (t->bos_token) t->bos_token = keep_text(l, t->bos_token, strlen(t->bos_token));
    if (t->eos_token) t->eos_token = keep_text(l, t->eos_token, strlen(t->eos_token));
    read_chat_template(l, l->config);
    read_chat_template(l, read_json_file(l, "chat_template.json"));
    if (read_other_file(l, "chat_template.jinja", &text))
        t->chat_template = keep_text(l, text.data, text.size);
    buffer_free(&text);
}

// Tokens that the configuration says are special, and that are in the vocabulary, are looked for in
// the text like those that were added.
static void add_named_tokens(Loader *l) {
    static const char *const names[] = {"bos_token", "eos_token", "unk_token", "sep_token",
                                        "pad_token", "cls_token", "mask_token"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int32_t id;
        const char *text = config_token(l, names[i], &id);
        if (id >= 0 && *text && !l->t->vocabulary.tokens[id].added) add_token(l, id, true, false);
    }
}

// Puts a token that the configuration names (or, if it names none, `otherwise`) at one end of every
// text, where the configuration says so.
static void set_affix(Loader *l, const char *key, const char *otherwise, bool add, int32_t *id,
                      size_t *n) {
    const char *text = config_token(l, key, id);
    if (!text && !l->failed) *id = tokenizer_id(l->t, otherwise, strlen(otherwise));
    *n = add;
    if (add && *id < 0) refuse(l, "not in the vocabulary", key);
}

static void set_bos_and_eos(Loader *l, bool add_bos, const char *bos, const char *eos) {
    Tokenizer *t = l->t;
    add_bos = json_get_bool(l->config, "add_bos_token", add_bos);
    set_affix(l, "bos_token", bos, add_bos, t->prefix, &t->n_prefix);
    set_affix(l, "eos_token", eos, json_get_bool(l->config, "add_eos_token", false), t->suffix,
              &t->n_suffix);
}

// The added tokens of the configuration: added_tokens_decoder, or a file of its own.
static const Json *find_added_tokens(Loader *l) {
    const char *file = l->file;
    const Json *added = json_get(l->config, "added_tokens_decoder");
    if (!added && !l->root) added = read_json_file(l, "added_tokens.json");
    l->file = file;
    if (added && added->kind != JSON_OBJECT) refuse(l, "no object", "the added tokens");
    return added;
}

// transformers' classes of these names put BOS and EOS where the configuration says, whatever the
// post-processor does.
static void set_class_affixes(Loader *l) {
    static const struct { const char *class, *bos, *eos; bool add_bos; } rows[] = {
        {"LlamaTokenizer", "<s>", "</s>", true}, {"CodeLlamaTokenizer", "<s>", "</s>", true},
        {"GemmaTokenizer", "<bos>", "<eos>", true},
        {"CohereTokenizer", "<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", true},
        {"GPTNeoXTokenizer", "<|endoftext|>", "<|endoftext|>", false}};
    const char *name = json_get_text(l->config, "tokenizer_class");
    for (size_t i = 0; name && i < sizeof rows / sizeof *rows; i++)
        if (starts_with(name, strlen(name), rows[i].class))
            set_bos_and_eos(l, rows[i].add_bos, rows[i].bos, rows[i].eos);
}

static void read_tokenizer_json(Loader *l) {
    Tokenizer *t = l->t;
    const Json *added = json_get(l->root, "added_tokens"), *more = find_added_tokens(l);
    size_t n_added = (added ? added->count : 0) + (more ? more->count : 0);
    read_steps(l, json_get(l->root, "normalizer"), "normalizers", read_normalizer);
    t->n_normalizers = t->n_steps;
    read_steps(l, json_get(l->root, "pre_tokenizer"), "pretokenizers", read_pre_tokenizer);
    read_steps(l, json_get(l->root, "decoder"), "decoders", read_decoder);
    if (l->decoder < 0) refuse(l, "unsupported decoder", NULL);
    read_model(l, json_get(l->root, "model"), n_added);
    added_open(l, n_added + MAX_NAMED);
    size_t next_id = t->vocabulary.n_tokens, id, max_ids = t->vocabulary.max_ids;
    if (more && !l->failed) {
        l->flags = region_alloc(&l->scratch, max_ids, sizeof *l->flags, l->err);
        l->failed = !l->flags;
    }
    for (const Json *e = l->flags ? more->first : NULL; e; e = e->next) {
        const Json key = {.kind = JSON_NUMBER, .text = e->key, .length = e->key_length};
        if (json_to_size(&key, &id) && id < max_ids) l->flags[id] = e;
    }
    read_added_tokens(l, added, &next_id);
    read_added_tokens(l, more, &next_id);
    add_named_tokens(l);
    added_close(l);
    read_steps(l, json_get(l->root, "post_processor"), "processors", read_post_processor);
    set_class_affixes(l);
}

// ----------------------------------------------------------- directories without a tokenizer.json

// merges.txt: "a b" on each line, the first perhaps "#version".
static void read_merges_txt(Loader *l) {
    Buffer text = {.allocator = l->t->region.allocator};
    size_t lines = 1, rank = 0;
    if (!read_other_file(l, "merges.txt", &text)) refuse(l, "no such file beside it", "merges.txt");
    for (size_t i = 0; i < text.size; i++) lines += text.data[i] == '\n';
    merges_open(l, lines);
    for (char *line = text.data, *end; line && line < text.data + text.size; line = end + 1) {
        end = line + strcspn(line, "\n");
        size_t n = (size_t)(end - line);
        *end = 0;
        if (n && line[n - 1] == '\r') line[--n] = 0;
        if (n && !(rank == 0 && starts_with(line, n, "#version")))
            merge_add_line(l, line, n, rank++);
    }
    buffer_free(&text);
}

// vocab.json and merges.txt are byte-level; how the text is cut, the name of the class decides.
static void read_vocab_and_merges(Loader *l, const Json *vocab) {
    static const char *const classes[] = {"Qwen2Tokenizer", "GPT2Tokenizer", "CodeGenTokenizer"};
    const char *name = json_get_text(l->config, "tokenizer_class");
    Tokenizer *t = l->t;
    size_t class = 0;
    while (class < 3 && !(name && starts_with(name, strlen(name), classes[class]))) class++;
    if (class == 3) refuse(l, "no tokenizer.json, and unsupported tokenizer_class", name);
    if (class == 0) add_step(l, (Step){.kind = STEP_NFC}, NULL);
    t->n_normalizers = t->n_steps;
    t->decode.byte_level = true;
    add_byte_level(l, json_get_bool(l->config, "add_prefix_space", false),
                   class == 0 ? qwen2_pattern : gpt2_pattern);
    const Json *added = find_added_tokens(l);
    size_t n_added = added ? added->count : 0;
    read_vocabulary(l, vocab, n_added);
    read_merges_txt(l);
    finish_model(l);
    added_open(l, n_added + MAX_NAMED);
    read_added_tokens(l, added, NULL);
    add_named_tokens(l);
    added_close(l);
    set_bos_and_eos(l, false, "<|endoftext|>", "<|endoftext|>");
}

// ----------------------------------------------------------------- sentencepiece's tokenizer.model

// Protocol buffers: a message is a list of (field number, wire type, value).
typedef struct { const uint8_t *at, *end; bool bad; } ProtoReader;
typedef struct { uint64_t field, number; ProtoReader bytes; } ProtoField;

static uint64_t proto_varint(ProtoReader *r) {
    uint64_t value = 0;
    for (unsigned shift = 0; r->at < r->end && shift < 64; shift += 7) {
        uint8_t byte = *r->at++;
        value |= (uint64_t)(byte & 0x7F) << shift;
        if (!(byte & 0x80)) return value;
    }
    r->bad = true;
    return 0;
}

// Reads the next field. Returns false at the end, and if the message is malformed (r->bad).
static bool proto_next(ProtoReader *r, ProtoField *f) {
    static const uint8_t sizes[8] = {[1] = 8, [5] = 4};
    if (r->at == r->end || r->bad) return false;
    uint64_t key = proto_varint(r), wire = key & 7;
    *f = (ProtoField){.field = key >> 3, .number = wire == 0 ? proto_varint(r) : 0};
    uint64_t n = wire == 2 ? proto_varint(r) : sizes[wire];
    if ((n == 0 && wire != 0 && wire != 2) || n > (uint64_t)(r->end - r->at)) r->bad = true;
    if (r->bad) return false;
    f->bytes = (ProtoReader){r->at, r->at + n, false};
    if (wire == 1 || wire == 5) memcpy(&f->number, r->at, n);         // little-endian, as we are
    r->at += n;
    return true;
}

typedef enum { PIECE_NORMAL = 1, PIECE_UNKNOWN, PIECE_CONTROL, PIECE_USER_DEFINED, PIECE_UNUSED,
               PIECE_BYTE } PieceType;

// The fields of TrainerSpec and NormalizerSpec that matter here.
enum { MODEL_TYPE = 3, SUFFIX_SPACES = 24, BYTE_FALLBACK = 35, CHARACTER_MAP = 2, DUMMY_PREFIX,
       TRIM_SPACES, ESCAPE_SPACES, MAX_FIELDS = 64 };

typedef struct {
    size_t n;
    float *score;                   // (n)
    uint64_t *type;                 // (n) a PieceType
    uint64_t trainer[MAX_FIELDS], normalizer[MAX_FIELDS];
} PieceModel;

// Reads a message of numbers by their fields (of texts, the lengths).
static void read_numbers(Loader *l, ProtoReader message, uint64_t numbers[MAX_FIELDS]) {
    ProtoField f;
    while (proto_next(&message, &f))
        if (f.field < MAX_FIELDS)
            numbers[f.field] = f.number ? f.number : (uint64_t)(f.bytes.end - f.bytes.at);
    if (message.bad) refuse(l, "malformed", "sentencepiece model");
}

// A piece: text, score, type. Its id is its place in the file.
static void read_piece(Loader *l, ProtoReader message, PieceModel *m, size_t id) {
    ProtoReader text = {0}, rest = message;
    uint64_t numbers[MAX_FIELDS] = {[3] = PIECE_NORMAL};
    ProtoField f;
    while (proto_next(&rest, &f))
        if (f.field == 1) text = f.bytes;
    read_numbers(l, message, numbers);
    uint32_t bits = (uint32_t)numbers[2];
    size_t n = (size_t)(text.end - text.at);
    const char *start = (const char *)text.at;
    memcpy(&m->score[id], &bits, sizeof bits);
    m->type[id] = numbers[3];
    if (!n || !isfinite(m->score[id]) || (m->type[id] == PIECE_NORMAL && n > 512)
        || utf8_valid_prefix(start, n) < n || memchr(start, 0, n))
        refuse(l, "wrong text or score", "a piece");
    vocabulary_add(l, start, n, id);
    if (l->failed) return;
    l->t->vocabulary.tokens[id].outside = m->type[id] != PIECE_NORMAL && m->type[id] != PIECE_BYTE;
    if (m->type[id] == PIECE_UNKNOWN) l->t->unk_id = (int32_t)id;
}

// The model is a list of pieces (field 1), a TrainerSpec (2) and a NormalizerSpec (3).
static void read_pieces(Loader *l, const Buffer *file, PieceModel *m, size_t n_added) {
    const uint8_t *data = (const uint8_t *)file->data;
    const ProtoReader whole = {data, data + file->size, false};
    ProtoReader r = whole;
    ProtoField f;
    while (proto_next(&r, &f)) {
        m->n += f.field == 1;
        if (f.field == 2) read_numbers(l, f.bytes, m->trainer);
        if (f.field == 3) read_numbers(l, f.bytes, m->normalizer);
    }
    if (file->size > 2 && starts_with(file->data + 2, file->size - 2, "== 0\n"))      // base64, id
        refuse(l, "is tiktoken's list of tokens, which does not say how text is cut",
               "take the tokenizer.json of the same model");
    if (r.bad || !m->n) refuse(l, "malformed", "sentencepiece model");
    if (m->trainer[MODEL_TYPE] != 2) refuse(l, "unsupported sentencepiece model", "not BPE");
    if (m->normalizer[CHARACTER_MAP] || m->trainer[SUFFIX_SPACES] || !m->normalizer[ESCAPE_SPACES])
        refuse(l, "unsupported sentencepiece option", "character map, suffix or unescaped spaces");
    vocabulary_open(l, m->n + n_added);
    m->score = keep(l, m->n, sizeof *m->score);
    m->type = keep(l, m->n, sizeof *m->type);
    size_t id = 0;
    for (r = whole; !l->failed && proto_next(&r, &f);)
        if (f.field == 1) read_piece(l, f.bytes, m, id++);
}

// Sentencepiece merges any two neighbours that make a piece, the highest score first: the same as a
// merge for every way to cut a piece in two, ranked by its score.
static void add_piece_merges(Loader *l, const PieceModel *m) {
    Vocabulary *v = &l->t->vocabulary;
    size_t bytes = 0;
    for (size_t i = 0; i < m->n && !l->failed; i++)
        bytes += m->type[i] == PIECE_NORMAL ? v->tokens[i].length : 0;
    merges_open(l, bytes);                            // more than there can be
    for (size_t i = 0; i < m->n && !l->failed; i++) {
        const char *text = v->tokens[i].text;
        size_t n = v->tokens[i].length;
        uint32_t bits, code;
        float score = m->score[i] + 0.0f;             // -0 becomes 0
        memcpy(&bits, &score, sizeof bits);
        // The bits of floats, ordered: below zero they grow with the amount, above they fall.
        uint32_t rank = bits >> 31 ? bits : 0x7FFFFFFF - bits;
        size_t k = m->type[i] == PIECE_NORMAL ? utf8_next(text, &code) : n;
        for (; k < n; k += utf8_next(text + k, &code)) {
            int32_t left = vocabulary_id(v, text, k), right = vocabulary_id(v, text + k, n - k);
            if (left >= 0 && right >= 0 && m->type[left] == PIECE_NORMAL
                && m->type[right] == PIECE_NORMAL) merge_add(l, text, k, text + k, n - k, rank);
        }
    }
}

// The normalizers and the decoder that its specification stands for. "legacy" false: a text that
// follows a special token does not begin with a space.
static void add_piece_steps(Loader *l, const PieceModel *m) {
    Tokenizer *t = l->t;
    bool prefix = m->normalizer[DUMMY_PREFIX], legacy = json_get_bool(l->config, "legacy", true);
    t->decode = (DecodeSteps){.with = " ", .byte_fallback = true, .strip = " ",
                              .strips = m->normalizer[TRIM_SPACES] ? SIZE_MAX : prefix,
                              .replace = compile_literal(l, space_mark)};
    t->byte_fallback = m->trainer[BYTE_FALLBACK];
    t->fuse_unk = true;
    if (m->normalizer[TRIM_SPACES]) add_step(l, (Step){.kind = STEP_TRIM}, NULL);
    if (prefix) add_step(l, (Step){.kind = STEP_PREPEND, .text = space_mark,
                                   .scheme = legacy ? PREPEND_ALWAYS : PREPEND_FIRST}, NULL);
    add_step(l, (Step){.kind = STEP_REPLACE, .text = space_mark}, " ");
    t->n_normalizers = t->n_steps;
}

static void read_sentencepiece(Loader *l, const Buffer *file) {
    PieceModel m = {.trainer = {[MODEL_TYPE] = 1},
                    .normalizer = {[DUMMY_PREFIX] = 1, [TRIM_SPACES] = 1, [ESCAPE_SPACES] = 1}};
    const Json *added = find_added_tokens(l);
    size_t n_added = added ? added->count : 0;
    read_pieces(l, file, &m, n_added);
    add_piece_steps(l, &m);
    add_piece_merges(l, &m);
    finish_model(l);
    added_open(l, m.n + n_added);
    read_added_tokens(l, added, NULL);
    for (size_t i = 0; i < m.n && !l->failed; i++) {
        // Pieces that the user defined are whole, and are looked for where spaces are "▁"
        // already.
        const Token *token = &l->t->vocabulary.tokens[i];
        bool whole = m.type[i] == PIECE_USER_DEFINED;
        if (whole && m.normalizer[TRIM_SPACES]
            && (strchr(token->text, ' ') || strstr(token->text, space_mark)))
            refuse(l, "unsupported user-defined piece with a space", token->text);
        if ((m.type[i] == PIECE_UNKNOWN || m.type[i] == PIECE_CONTROL || whole) && !token->added)
            add_token(l, (int32_t)i, !whole, whole);
    }
    added_close(l);
    set_bos_and_eos(l, true, "<s>", "</s>");
}

// ------------------------------------------------------------------------------- opening it all

// Takes the first of tokenizer.json, vocab.json with merges.txt, tokenizer.model.
static void read_tokenizer(Loader *l) {
    Buffer file = {.allocator = l->t->region.allocator};
    l->config = read_json_file(l, "tokenizer_config.json");
    l->map = read_json_file(l, "special_tokens_map.json");
    l->root = read_json_file(l, "tokenizer.json");
    const Json *vocab = l->root ? NULL : read_json_file(l, "vocab.json");
    if (l->root) read_tokenizer_json(l);
    else if (vocab) read_vocab_and_merges(l, vocab);
    else if (read_other_file(l, "tokenizer.model", &file)) read_sentencepiece(l, &file);
    else refuse(l, "no tokenizer.json, vocab.json or tokenizer.model in", l->directory);
    buffer_free(&file);
}

static void tokenizer_close(Tokenizer *t) {
    if (!t) return;
    Region region = t->region;                        // t itself lies in it
    if (t->encoders) {
        encoders_free(t);
        pthread_mutex_destroy(&t->encoders->lock);
    }
    region_free(&region);
}

// Reads the tokenizer of a Hugging Face model directory. The tables are unpacked for it, or, given,
// outlive it.
static Tokenizer *tokenizer_load(const char *directory, const Unicode *unicode,
                                 const qlora_allocator *a, qlora_error *err) {
    Region region = {.allocator = a};
    Tokenizer *t = region_alloc(&region, 1, sizeof *t, err);
    if (!t) return NULL;
    t->region = region;
    t->unk_id = -1;
    t->unicode = unicode ? unicode : unicode_open(&t->region, err);
    EncoderList *encoders = region_alloc(&t->region, 1, sizeof *encoders, err);
    Loader l = {.t = t, .directory = directory, .file = directory, .scratch = {.allocator = a},
                .text = {.allocator = a}, .decoder = -1, .failed = !t->unicode || !encoders,
                .err = err};
    if (encoders) {
        pthread_mutex_init(&encoders->lock, NULL);
        t->encoders = encoders;
        read_tokenizer(&l);
        read_config(&l);
        encoders_free(t);
    }
    buffer_free(&l.text);
    region_free(&l.scratch);
    if (!l.failed) return t;
    tokenizer_close(t);
    return NULL;
}

static Tokenizer *tokenizer_open(const char *directory, const qlora_allocator *a,
                                 qlora_error *err) {
    return tokenizer_load(directory, NULL, a, err);
}
// =================================================================================================
//  10. From config.json and weight files to a model
//
//  A configuration is read strictly: a field that changes the mathematics and is not implemented
//  stops the run by name, for a model computed a little wrongly is worse than none. The tensors of
//  a model are a list of slots made from one table; loading, `init`, `quantize` and the memory plan
//  all walk this list, so name, shape and place of a tensor have one source.
// =================================================================================================

struct Architecture {
    const char *type;                       // "model_type"
    const char *class_name;                 // "architectures"
    bool qkv_bias;                          // q, k, v always have one
    bool window;                            // sliding_window holds for every layer when it is set
    const char *linear[N_LINEARS];          // module names within a layer
};

#define LLAMA_LINEARS {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",               \
                       "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}

static const Architecture architectures[] = {
    {"llama", "LlamaForCausalLM", false, false, LLAMA_LINEARS},
    {"qwen2", "Qwen2ForCausalLM", true, false, LLAMA_LINEARS},
    {"mistral", "MistralForCausalLM", false, true, LLAMA_LINEARS}};
enum { N_ARCHITECTURES = sizeof architectures / sizeof *architectures };

// ------------------------------------------------------------------------------------ config.json

// An object of settings and where it stands, for messages: "config.json", or deeper within it.
typedef struct { const Json *json; const char *directory, *place; qlora_error *err; } ConfigReader;

// A member that is neither missing nor null.
static const Json *config_get(const Json *json, const char *key) {
    const Json *value = json_get(json, key);
    return json_is(value, JSON_NULL) ? NULL : value;
}

static int config_fail(const ConfigReader *r, const char *key, const char *expected) {
    const Json *value = json_get(r->json, key);
    bool scalar = value && value->kind >= JSON_NUMBER && value->kind <= JSON_STRING;
    return fail(r->err, "%s/%s: %s: expected %s, found %.80s", r->directory, r->place, key,
                expected, !value ? "nothing" : scalar ? value->text : json_kind_name(value->kind));
}

// A whole number in [1, most]; with `otherwise` non-zero the member may be missing.
static int config_size(const ConfigReader *r, const char *key, size_t most, size_t otherwise,
                       size_t *out) {
    char expected[64];
    const Json *value = config_get(r->json, key);
    *out = otherwise;
    if (!value && otherwise) return 0;
    if (json_to_size(value, out) && *out >= 1 && *out <= most) return 0;
    snprintf(expected, sizeof expected, "a whole number from 1 to %zu", most);
    return config_fail(r, key, expected);
}

// Any number in a range; when the member is missing *out keeps its default.
static int config_number(const ConfigReader *r, const char *key, double least, double most,
                         double *out) {
    char expected[64];
    const Json *value = config_get(r->json, key);
    if (!value || (json_to_double(value, out) && *out >= least && *out <= most)) return 0;
    snprintf(expected, sizeof expected, "a number from %g to %g", least, most);
    return config_fail(r, key, expected);
}

static int config_bool(const ConfigReader *r, const char *key, bool *out) {
    const Json *value = config_get(r->json, key);
    *out = json_is(value, JSON_TRUE);
    return !value || *out || value->kind == JSON_FALSE ? 0 : config_fail(r, key, "true or false");
}

// What none of the members may ask for: each must be missing, null, false, zero or empty.
static int config_off(const ConfigReader *r, const char *const *keys, size_t n,
                      const char *expected) {
    for (size_t i = 0; i < n; i++) {
        const Json *value = config_get(r->json, keys[i]);
        double number = 1;
        if (!value || value->kind == JSON_FALSE) continue;
        if (value->kind >= JSON_ARRAY ? !value->count
                                      : json_to_double(value, &number) && number == 0) continue;
        return config_fail(r, keys[i], expected);
    }
    return 0;
}

// Fields that only models of other kinds have, each with the one value that changes nothing.
static int refuse_unknown_mathematics(const ConfigReader *r) {
    static const char *const must_be_off[] = {"attn_logit_softcapping", "final_logit_softcapping",
        "qk_layernorm", "use_qk_norm", "alibi", "logit_scale", "embedding_multiplier",
        "residual_multiplier", "attention_multiplier", "logits_scaling", "num_local_experts",
        "num_experts", "n_routed_experts", "attention_dropout", "resid_pdrop", "embd_pdrop"};
    const Json *act = config_get(r->json, "hidden_act");
    ConfigReader quantization = {config_get(r->json, "quantization_config"), r->directory,
                                 "config.json: quantization_config", r->err};
    const char *method = json_get_text(quantization.json, "quant_method");
    double factor = 1;
    if (config_off(r, must_be_off, sizeof must_be_off / sizeof *must_be_off,
                   "it to be off (not implemented)") ||
        config_number(r, "partial_rotary_factor", 0, 1, &factor)) return -1;
    if (factor != 1)
        return config_fail(r, "partial_rotary_factor", "1 (other shares are not implemented)");
    if (act && (act->kind != JSON_STRING || (strcmp(act->text, "silu") &&
                                             strcmp(act->text, "swish"))))
        return config_fail(r, "hidden_act", "\"silu\"");
    if (quantization.json && ((method && strcmp(method, "bitsandbytes")) ||
                              !json_get_bool(quantization.json, "load_in_4bit", false)))
        return config_fail(&quantization, "quant_method",
                           "bitsandbytes in 4 bits (or start from the unquantised model)");
    return 0;
}

// Rotation frequencies theta^(-2i/hd), slowed down for long contexts as rope_scaling says.
static int read_rope(const ConfigReader *r, size_t hd, float *frequency) {
    const Json *rope = config_get(r->json, "rope_parameters");       // transformers 5
    ConfigReader s = {rope ? rope : config_get(r->json, "rope_scaling"), r->directory,
                      rope ? "config.json: rope_parameters" : "config.json: rope_scaling", r->err};
    const char *type = json_get_text(s.json, "rope_type");
    double theta = 10000, factor = 1, low = 1, high = 4, original = 0;
    if (!type) type = json_get_text(s.json, "type");
    if (s.json && (s.json->kind != JSON_OBJECT || (!type && s.json->count)))
        return config_fail(&s, "rope_type", "default, linear or llama3");
    if (!type) type = "default";
    if (config_number(r, "rope_theta", 1, 1e12, &theta) ||
        (rope && config_number(&s, "rope_theta", 1, 1e12, &theta)) ||
        config_number(&s, "factor", 1, 1e6, &factor) ||
        config_number(&s, "low_freq_factor", 1e-3, 1e6, &low) ||
        config_number(&s, "high_freq_factor", 1e-3, 1e6, &high) ||
        config_number(&s, "original_max_position_embeddings", 1, 1e9, &original)) return -1;
    bool llama3 = strcmp(type, "llama3") == 0, linear = strcmp(type, "linear") == 0;
    if (!llama3 && !linear && strcmp(type, "default"))
        return fail(r->err, "%s/%s: \"%s\" is not implemented (default, linear and llama3 are)",
                    s.directory, s.place, type);
    if ((llama3 || linear) && !config_get(s.json, "factor"))
        return config_fail(&s, "factor", "a number");
    if (llama3 && original == 0)
        return config_fail(&s, "original_max_position_embeddings", "a number");
    if (llama3 && !(high > low))
        return config_fail(&s, "high_freq_factor", "more than low_freq_factor");
    for (size_t i = 0; i < hd / 2; i++) {
        float base = 1.0f / powf((float)theta, (float)(2 * i) / (float)hd);
        double wavelength = 6.283185307179586 / (double)base, f = (double)base;
        if (linear) f /= factor;
        if (llama3 && wavelength > original / low) f /= factor;
        else if (llama3 && wavelength > original / high) {
            double smooth = (original / wavelength - low) / (high - low);
            f = (1 - smooth) * f / factor + smooth * f;
        }
        frequency[i] = (float)f;
    }
    return 0;
}

// Which layers have a sliding window: all (Mistral), those that layer_types names, or for Qwen2
// with use_sliding_window the ones from max_window_layers on.
static int read_windows(const ConfigReader *r, const Architecture *arch, size_t L, Layer *layers) {
    size_t window = 0, from = L;
    const Json *types = config_get(r->json, "layer_types");
    bool used;
    if (config_bool(r, "use_sliding_window", &used)) return -1;
    if (config_get(r->json, "sliding_window") &&
        config_size(r, "sliding_window", (size_t)1 << 40, 0, &window)) return -1;
    if (config_get(r->json, "max_window_layers") &&
        !json_to_size(config_get(r->json, "max_window_layers"), &from))
        return config_fail(r, "max_window_layers", "a whole number");
    if (types && (types->kind != JSON_ARRAY || types->count != L))
        return config_fail(r, "layer_types", "one entry for each layer");
    const Json *type = types ? types->first : NULL;
    for (size_t l = 0; l < L; l++) {
        bool slides = arch->window || (used && l >= from);
        if (type) {
            const char *name = json_is(type, JSON_STRING) ? type->text : "";
            slides = strcmp(name, "sliding_attention") == 0;
            if (!slides && strcmp(name, "full_attention"))
                return config_fail(r, "layer_types", "full_attention or sliding_attention");
            type = type->next;
        }
        layers[l].window = slides ? window : 0;
    }
    return 0;
}

static int read_architecture(const ConfigReader *r, const Architecture **out) {
    const char *type = json_get_text(r->json, "model_type");
    const Json *classes = config_get(r->json, "architectures");
    for (size_t i = 0; type && i < N_ARCHITECTURES; i++) {
        if (strcmp(architectures[i].type, type)) continue;
        if (json_is(classes, JSON_ARRAY) && json_is(classes->first, JSON_STRING) &&
            strcmp(classes->first->text, architectures[i].class_name))
            return fail(r->err, "%s/config.json: architectures: expected %s, found %s",
                        r->directory, architectures[i].class_name, classes->first->text);
        *out = &architectures[i];
        return 0;
    }
    return config_fail(r, "model_type", "llama, qwen2 or mistral");
}

// ---------------------------------------------------------------------------------------- tensors

typedef enum { SLOT_LINEAR, SLOT_MATRIX, SLOT_VECTOR } SlotKind;    // only linears are quantised

// One tensor of the model: what it is called in files, its shape, and where it goes.
typedef struct {
    char name[64];
    SlotKind kind;
    size_t rows, columns;                   // columns 1 for a vector
    Weight *weight;                         // of a linear or matrix
    const float **vector;
    int file_type;                          // type of its numbers in files (ST_BF16, ...)
} Slot;

typedef struct { Slot *slots; size_t n; } SlotList;

// `place`: the Weight, or of a vector the pointer that will lead to its values.
__attribute__((format(printf, 6, 7)))
static void add_slot(SlotList *list, SlotKind kind, size_t rows, size_t columns, void *place,
                     const char *format, ...) {
    Slot *slot = &list->slots[list->n++];
    *slot = (Slot){.kind = kind, .rows = rows, .columns = columns, .file_type = ST_BF16};
    va_list args;
    va_start(args, format);
    vsnprintf(slot->name, sizeof slot->name, format, args);
    va_end(args);
    if (kind == SLOT_VECTOR) { slot->vector = place; return; }
    slot->weight = place;
    slot->weight->N = rows;
    slot->weight->K = columns;
}

// The list of all tensors, in the order in which they are used.
static int list_slots(SlotList *list, Transformer *m, const bool has_bias[N_LINEARS],
                      Region *region, qlora_error *err) {
    const Config *c = &m->config;
    size_t query = c->H * c->hd, key = c->G * c->hd;
    const size_t rows[N_LINEARS] = {query, key, key, c->D, c->F, c->F, c->D};
    const size_t columns[N_LINEARS] = {c->D, c->D, c->D, query, c->D, c->D, c->F};
    list->slots = region_alloc(region, c->L * (2 * N_LINEARS + 2) + 3, sizeof(Slot), err);
    if (!list->slots) return -1;
    add_slot(list, SLOT_MATRIX, c->V, c->D, &m->embedding, "model.embed_tokens.weight");
    for (size_t l = 0; l < c->L; l++) {
        Layer *layer = &m->layers[l];
        add_slot(list, SLOT_VECTOR, c->D, 1, &layer->attention_norm,
                 "model.layers.%zu.input_layernorm.weight", l);
        add_slot(list, SLOT_VECTOR, c->D, 1, &layer->mlp_norm,
                 "model.layers.%zu.post_attention_layernorm.weight", l);
        for (size_t i = 0; i < N_LINEARS; i++) {
            const char *module = c->architecture->linear[i];
            Linear *linear = &layer->linear[i];
            linear->lora.module = (uint32_t)(l * N_LINEARS + i + 1);
            add_slot(list, SLOT_LINEAR, rows[i], columns[i], &linear->weight,
                     "model.layers.%zu.%s.weight", l, module);
            if (has_bias[i])
                add_slot(list, SLOT_VECTOR, rows[i], 1, &linear->bias, "model.layers.%zu.%s.bias",
                         l, module);
        }
    }
    m->head.lora.module = (uint32_t)(c->L * N_LINEARS + 1);
    add_slot(list, SLOT_VECTOR, c->D, 1, &m->final_norm, "model.norm.weight");
    if (c->tied) m->head.weight = m->embedding;               // its shape: the values come later
    else add_slot(list, SLOT_MATRIX, c->V, c->D, &m->head.weight, "lm_head.weight");
    return 0;
}

// Reads config.json: fills the transformer's configuration, allocates its layers in the region and
// lists the tensors that such a model has.
static int parse_config(Transformer *m, SlotList *list, const Json *json, const char *directory,
                        Region *region, qlora_error *err) {
    ConfigReader r = {json, directory, "config.json", err};
    Config *c = &m->config;
    double eps = 1e-6;
    if (json->kind != JSON_OBJECT)
        return fail(err, "%s/config.json: expected an object, found %s", directory,
                    json_kind_name(json->kind));
    if (read_architecture(&r, &c->architecture) || refuse_unknown_mathematics(&r) ||
        config_size(&r, "hidden_size", 1 << 17, 0, &c->D) ||
        config_size(&r, "intermediate_size", 1 << 20, 0, &c->F) ||
        config_size(&r, "vocab_size", 1 << 24, 0, &c->V) ||
        config_size(&r, "num_hidden_layers", 1 << 10, 0, &c->L) ||
        config_size(&r, "num_attention_heads", 1 << 12, 0, &c->H) ||
        config_size(&r, "num_key_value_heads", 1 << 12, c->H, &c->G) ||
        config_size(&r, "head_dim", 1 << 10, max_size(c->D / c->H, 1), &c->hd) ||
        config_size(&r, "max_position_embeddings", (size_t)1 << 31, 2048, &c->context) ||
        config_number(&r, "rms_norm_eps", 0, 1, &eps)) return -1;
    if (!config_get(json, "head_dim") && c->D % c->H)
        return config_fail(&r, "num_attention_heads", "a divisor of hidden_size");
    if (c->H % c->G) return config_fail(&r, "num_key_value_heads", "a divisor of the heads");
    if (c->hd % 2) return config_fail(&r, "head_dim", "an even number");
    c->eps = (float)eps;
    bool attention_bias, mlp_bias, has_bias[N_LINEARS];
    if (config_bool(&r, "tie_word_embeddings", &c->tied) ||
        config_bool(&r, "attention_bias", &attention_bias) ||
        config_bool(&r, "mlp_bias", &mlp_bias)) return -1;
    for (int i = 0; i < N_LINEARS; i++)
        has_bias[i] = i >= LINEAR_GATE ? mlp_bias
                    : attention_bias || (i < LINEAR_O && c->architecture->qkv_bias);
    m->rope_frequency = region_alloc(region, c->hd / 2, sizeof *m->rope_frequency, err);
    m->layers = region_alloc(region, c->L, sizeof *m->layers, err);
    if (!m->rope_frequency || !m->layers || read_rope(&r, c->hd, m->rope_frequency) ||
        read_windows(&r, c->architecture, c->L, m->layers)) return -1;
    return list_slots(list, m, has_bias, region, err);
}

// -------------------------------------------------------------------------------- numbers in files

// Carves a matrix of the given type. 4-bit ones get their scales too, quantised twice or not.
static void place_weight(Weight *w, DType dtype, bool double_quant, Arena *arena) {
    size_t n = w->N * w->K, blocks = ceil_div(n, QUANT_BLOCK);
    w->dtype = dtype;
    w->absmax = w->absmax2 = w->code8 = NULL;
    w->absmax8 = NULL;
    if (!is_4bit(dtype)) {
        w->data = arena_alloc(arena, n, dtype_size(dtype));
        return;
    }
    w->data = arena_alloc(arena, (n + 1) / 2, 1);
    w->code = arena_alloc(arena, 16, sizeof(float));
    if (double_quant) {
        w->absmax8 = arena_alloc(arena, blocks, 1);
        w->absmax2 = arena_alloc(arena, ceil_div(blocks, SCALE_BLOCK), sizeof(float));
        w->code8 = arena_alloc(arena, 256, sizeof(float));
    } else w->absmax = arena_alloc(arena, blocks, sizeof(float));
}

static uint16_t float_to_f16(float x) {
    uint32_t sign = float_bits(x) >> 16 & 0x8000;
    float magnitude = fabsf(x);
    if (isnan(x)) return (uint16_t)(sign | 0x7E00);
    if (magnitude >= 65520.0f) return (uint16_t)(sign | 0x7C00);
    // Below 2^-14 float16 counts steps of 2^-24, and so does float32 between 0.5 and 1.
    if (magnitude < 0x1p-14f)
        return (uint16_t)(sign | (float_bits(magnitude + 0.5f) - float_bits(0.5f)));
    // Above, 13 bits of the fraction are rounded away, ties to even, and the exponent is 112 less.
    uint32_t bits = float_bits(magnitude);
    return (uint16_t)(sign | (((bits + 0xFFF + (bits >> 13 & 1)) >> 13) - (112u << 10)));
}

// Widens n values of a file's type.
static void widen_values(float *out, const void *raw, DType type, size_t n) {
    const uint16_t *half = raw;
    if (type == DT_F32) memcpy(out, raw, n * sizeof *out);
    else if (type == DT_BF16) for (size_t i = 0; i < n; i++) out[i] = bf16_to_float(half[i]);
    else for (size_t i = 0; i < n; i++) out[i] = f16_to_float(half[i]);
}

// Rounds n values to a file's type.
static void narrow_values(void *raw, const float *values, DType type, size_t n) {
    uint16_t *half = raw;
    if (type == DT_F32) memcpy(raw, values, n * sizeof *values);
    else if (type == DT_BF16) for (size_t i = 0; i < n; i++) half[i] = float_to_bf16(values[i]);
    else for (size_t i = 0; i < n; i++) half[i] = float_to_f16(values[i]);
}

// An infinite or NaN value has all exponent bits set.
static bool all_finite(const void *raw, DType type, size_t n) {
    const uint16_t *half = raw;
    const float *full = raw;
    uint32_t exponent = type == DT_F32 ? 0x7F800000 : type == DT_BF16 ? 0x7F80 : 0x7C00, bad = 0;
    if (type == DT_F32)
        for (size_t i = 0; i < n; i++)
            bad |= (uint32_t)((float_bits(full[i]) & exponent) == exponent);
    else for (size_t i = 0; i < n; i++) bad |= (uint32_t)((half[i] & exponent) == exponent);
    return !bad;
}

// Refuses a tensor of another shape (of rank 1 without columns) or of numbers of other kinds than
// this program computes with.
static int check_tensor(const TensorFiles *files, const TensorInfo *t, size_t rank, size_t rows,
                        size_t columns, qlora_error *err) {
    const char *path = tensor_path(files, t);
    if (t->rank != rank || t->shape[0] != rows || (rank > 1 && t->shape[1] != columns))
        return fail(err, "%s: tensor %s: shape [%zu, %zu] expected, found [%zu, %zu]: does it "
                    "belong to another model?", path, t->name, rows, columns,
                    t->rank ? t->shape[0] : 0, t->rank > 1 ? t->shape[1] : 1);
    if (safetensors_types[t->type].dtype != DT_OTHER) return 0;
    return fail(err, "%s: tensor %s: expected F32, F16 or BF16, found %s", path, t->name,
                safetensors_types[t->type].name);
}

// n values of a tensor from number `at` on, as they are in the file, which must be finite.
static int read_values(const TensorFiles *files, const TensorInfo *t, void *raw, size_t at,
                       size_t n, qlora_error *err) {
    size_t size = safetensors_types[t->type].size;
    DType type = safetensors_types[t->type].dtype;
    if (tensor_read(files, t, raw, at * size, n * size, err)) return -1;
    if (type == DT_OTHER || all_finite(raw, type, n)) return 0;
    return fail(err, "%s: tensor %s holds NaN or infinity: the file is damaged or the model was "
                "trained to pieces", tensor_path(files, t), t->name);
}

// Quantises part of a tensor: `count` values in their file's type, starting at a block boundary.
typedef struct {
    const void *raw;
    DType from, to;
    size_t count;
    uint8_t *packed;
    float *absmax;
} QuantizeTask;

enum { BLOCKS_PER_TASK = 256 };

static void quantize_task(void *arguments, size_t task, int thread) {
    QuantizeTask *a = arguments;
    size_t first = task * BLOCKS_PER_TASK;
    size_t end = min_size(first + BLOCKS_PER_TASK, ceil_div(a->count, QUANT_BLOCK));
    (void)thread;
    for (size_t block = first; block < end; block++) {
        float values[QUANT_BLOCK];
        size_t at = block * QUANT_BLOCK, n = min_size(QUANT_BLOCK, a->count - at);
        widen_values(values, (const char *)a->raw + at * dtype_size(a->from), a->from, n);
        a->absmax[block] = quantize_block(a->packed + at / 2, values, n, a->to);
    }
}

static void quantize_values(Device *dev, uint8_t *packed, float *absmax, const void *raw,
                            DType from, DType to, size_t n) {
    QuantizeTask a = {raw, from, to, n, packed, absmax};
    parallel_for(dev->pool, ceil_div(n, (size_t)QUANT_BLOCK * BLOCKS_PER_TASK), quantize_task, &a);
}

// Where the scales of a weight go first: to their place, or to `room` to be quantised themselves.
static float *scales_of(const Weight *w, float *room) {
    return w->absmax8 ? room : (float *)(uintptr_t)w->absmax;
}

// Finishes a 4-bit weight whose codes and scales are there: the tables, the second quantisation.
static void finish_weight(Device *dev, Weight *w, const float *absmax) {
    size_t blocks = ceil_div(w->N * w->K, QUANT_BLOCK);
    float map[256];
    upload(dev, w->code, w->dtype == DT_NF4 ? nf4_levels : fp4_levels, sizeof nf4_levels);
    if (!w->absmax8) return;
    dynamic_map(map);
    upload(dev, w->code8, map, sizeof map);
    w->offset = dev->ops->quantize_scales(dev, (uint8_t *)(uintptr_t)w->absmax8,
                                          (float *)(uintptr_t)w->absmax2, absmax, blocks, w->code8);
}

// The tensors bitsandbytes stores a 4-bit weight in (FACTS 3), by what follows the weight's name;
// its quant_state, a JSON text, is the last.
typedef struct { const char *suffix; int type; size_t n; const void *data; } WeightPart;
enum { MAX_WEIGHT_PARTS = 6 };

static size_t list_weight_parts(const Weight *w, WeightPart parts[MAX_WEIGHT_PARTS]) {
    size_t n = w->N * w->K, blocks = ceil_div(n, QUANT_BLOCK);
    parts[0] = (WeightPart){"", ST_U8, (n + 1) / 2, w->data};
    parts[1] = (WeightPart){".quant_map", ST_F32, 16, w->code};
    parts[2] = (WeightPart){".absmax", ST_F32, blocks, w->absmax};
    if (!w->absmax8) return 3;
    parts[2] = (WeightPart){".absmax", ST_U8, blocks, w->absmax8};
    parts[3] = (WeightPart){".nested_absmax", ST_F32, ceil_div(blocks, SCALE_BLOCK), w->absmax2};
    parts[4] = (WeightPart){".nested_quant_map", ST_F32, 256, w->code8};
    return 5;
}

static const char *quant_state_suffix(DType type) {
    return type == DT_NF4 ? ".quant_state.bitsandbytes__nf4" : ".quant_state.bitsandbytes__fp4";
}

// ----------------------------------------------------------------------------------- random models

typedef struct { uint64_t seed; uint32_t stream; size_t at, n; uint16_t *out; } RandomTask;

enum { RANDOM_PER_TASK = 1 << 16 };

// Bell-shaped values with deviation 0.02, in bf16: the sum of four uniform 16-bit numbers has
// variance 4/12 and costs no logarithm.
static void random_values_task(void *arguments, size_t task, int thread) {
    RandomTask *a = arguments;
    size_t first = task * RANDOM_PER_TASK, end = min_size(a->n, first + RANDOM_PER_TASK);
    float scale = 0.02f * 1.7320508f / 65536.0f;
    uint32_t key[2] = {(uint32_t)a->seed, RANDOM_INIT}, bits[4] = {0};
    (void)thread;
    for (size_t k = first; k < end; k++) {
        size_t i = a->at + k;
        uint32_t counter[4] = {(uint32_t)(i / 2), (uint32_t)(i / 2 >> 32), 1, a->stream};
        if (i % 2 == 0) philox(bits, counter, key);
        const uint32_t *pair = bits + i % 2 * 2;
        float sum = (float)((pair[0] & 0xFFFF) + (pair[0] >> 16) + (pair[1] & 0xFFFF) +
                            (pair[1] >> 16));
        a->out[k] = float_to_bf16((sum - 131070.0f) * scale);
    }
}

// ---------------------------------------------------------------------------------------- loading

enum { STAGING_VALUES = 4 << 20 };          // values read at a time while quantising

typedef struct {
    TensorFiles *files;                     // NULL: a random model, always the same for a seed
    uint64_t seed;
    const qlora_options *options;
    Device *dev;                            // whose memory the weights go to
    char *staging;                          // (STAGING_VALUES) values of at most 4 bytes
    void *remote;                           // the same on a device with memory of its own
    float *absmax;                          // scales of the largest linear; the device's
    uint32_t slot;                          // number of the one at work
    qlora_error *err;
} WeightLoader;

static const TensorInfo *loader_find(WeightLoader *l, const char *name, const char *suffix) {
    char full[MAX_TENSOR_NAME];
    snprintf(full, sizeof full, "%s%s", name, suffix);
    const TensorInfo *t = l->files ? tensors_find(l->files, full) : NULL;
    if (t) l->files->tensors[t - l->files->tensors].used = true;
    return t;
}

// Whether a linear is stored 4-bit by bitsandbytes: the name of its type, or DT_OTHER.
static DType stored_4bit(WeightLoader *l, const Slot *slot) {
    if (slot->kind != SLOT_LINEAR) return DT_OTHER;
    if (loader_find(l, slot->name, quant_state_suffix(DT_NF4))) return DT_NF4;
    return loader_find(l, slot->name, quant_state_suffix(DT_FP4)) ? DT_FP4 : DT_OTHER;
}

// First pass: decides each slot's type and carves its memory; reads nothing but headers.
static int place_slot(WeightLoader *l, Slot *slot, Arena *arena) {
    DType type = stored_4bit(l, slot);
    bool nested = l->options->double_quant != 0, vector = slot->kind == SLOT_VECTOR;
    if (type != DT_OTHER) nested = loader_find(l, slot->name, ".nested_absmax") != NULL;
    else {
        const TensorInfo *t = loader_find(l, slot->name, "");
        if (l->files && !t) return fail(l->err, "%s: tensor %s expected, not found",
                                        l->files->files[0].path, slot->name);
        if (t && check_tensor(l->files, t, vector ? 1 : 2, slot->rows, slot->columns, l->err))
            return -1;
        if (t) slot->file_type = t->type;
        type = safetensors_types[slot->file_type].dtype;
        if (slot->kind == SLOT_LINEAR && l->options->quant != QLORA_QUANT_NONE)
            type = l->options->quant == QLORA_QUANT_NF4 ? DT_NF4 : DT_FP4;
    }
    if (vector) *slot->vector = arena_alloc(arena, slot->rows, sizeof(float));
    else place_weight(slot->weight, type, nested, arena);
    return 0;
}

// n values of a slot from number `at` on, in bf16: random ones for a matrix, ones for a norm, zeros
// for a bias.
static void make_values(WeightLoader *l, const Slot *slot, uint16_t *out, size_t at, size_t n) {
    RandomTask a = {l->seed, l->slot, at, n, out};
    bool bias = strstr(slot->name, ".bias") != NULL;
    if (slot->kind == SLOT_VECTOR)
        for (size_t i = 0; i < n; i++) out[i] = bias ? 0 : float_to_bf16(1);
    else parallel_for(l->dev->pool, ceil_div(n, RANDOM_PER_TASK), random_values_task, &a);
}

// n values of a slot's tensor t (NULL: a random model's) from number `at` on: into `to`, which is
// the device's memory, and in `staging` too if that is apart. Returns where the host sees them.
static const char *load_values(WeightLoader *l, const Slot *slot, const TensorInfo *t, size_t at,
                               size_t n, void *to, char *staging) {
    char *raw = to && l->dev->ops->host ? to : staging;
    if (!t) make_values(l, slot, (uint16_t *)(void *)raw, at, n);
    else if (read_values(l->files, t, raw, at, n, l->err)) return NULL;
    if (to && raw != to)
        upload(l->dev, to, raw, n * safetensors_types[t ? t->type : slot->file_type].size);
    return raw;
}

// Reads what bitsandbytes wrote: the quant_state JSON, cross-checked, then codes and scales.
static int load_4bit(WeightLoader *l, const Slot *slot) {
    Weight *w = slot->weight;
    const char *type = w->dtype == DT_NF4 ? "nf4" : "fp4";
    const TensorInfo *state = loader_find(l, slot->name, quant_state_suffix(w->dtype));
    const char *path = tensor_path(l->files, state);
    Region *region = &l->files->region;
    size_t number = 0, rows = 0, columns = 0;
    double offset = 0;
    if (state->bytes > 65536) return fail(l->err, "%s: tensor %s is too large", path, state->name);
    char *text = region_alloc(region, state->bytes + 1, 1, l->err);
    if (!text || tensor_read(l->files, state, text, 0, state->bytes, l->err)) return -1;
    const Json *json = json_parse(text, state->bytes, state->name, 1, region, l->err);
    const Json *shape = json_get(json, "shape");
    const char *stored = json_get_text(json, "quant_type");
    if (!json) return -1;
    if (!stored || strcmp(stored, type) || !json_to_size(json_get(json, "blocksize"), &number) ||
        number != QUANT_BLOCK || !json_is(shape, JSON_ARRAY) || shape->count != 2 ||
        !json_to_size(shape->first, &rows) || !json_to_size(shape->first->next, &columns) ||
        rows != w->N || columns != w->K)
        return fail(l->err, "%s: tensor %s: quant_state: expected %s in blocks of 64, shape "
                    "[%zu, %zu], found %.200s", path, slot->name, type, w->N, w->K, text);
    if (w->absmax8 && (!json_to_size(json_get(json, "nested_blocksize"), &number) ||
                       number != SCALE_BLOCK ||
                       !json_to_double(json_get(json, "nested_offset"), &offset) ||
                       !isfinite((float)offset)))
        return fail(l->err, "%s: tensor %s: quant_state: expected nested_blocksize 256 and a "
                    "nested_offset", path, slot->name);
    w->offset = (float)offset;
    WeightPart parts[MAX_WEIGHT_PARTS];
    size_t n_parts = list_weight_parts(w, parts);
    for (const WeightPart *part = parts; part < parts + n_parts; part++) {
        const TensorInfo *t = loader_find(l, slot->name, part->suffix);
        if (!t || t->type != part->type || t->elements != part->n)
            return fail(l->err, "%s: tensor %s%s: %zu values of type %s expected, found %s", path,
                        slot->name, part->suffix, part->n, safetensors_types[part->type].name,
                        t ? "others" : "none");
        for (size_t at = 0; at < part->n; at += STAGING_VALUES) {
            char *to = (char *)(uintptr_t)part->data + at * safetensors_types[part->type].size;
            size_t n = min_size(STAGING_VALUES, part->n - at);
            if (!load_values(l, slot, t, at, n, to, l->staging)) return -1;
        }
    }
    return 0;
}

// Second pass: reads a slot's values into its place.
static int load_slot(WeightLoader *l, const Slot *slot) {
    if (stored_4bit(l, slot) != DT_OTHER) return load_4bit(l, slot);
    const TensorInfo *t = loader_find(l, slot->name, "");
    DType from = safetensors_types[slot->file_type].dtype;
    bool vector = slot->kind == SLOT_VECTOR, in_place = !vector && !is_4bit(slot->weight->dtype);
    size_t most = vector ? STAGING_VALUES / 2 : STAGING_VALUES, all = slot->rows * slot->columns;
    for (size_t at = 0; at < all; at += most) {
        size_t n = min_size(most, all - at);
        // A vector is read into the upper half of the staging memory and widened into the lower.
        char *staging = l->staging + (vector ? most * sizeof(float) : 0);
        char *place = in_place ? (char *)(uintptr_t)slot->weight->data + at * dtype_size(from)
                    : vector ? NULL : l->remote;
        const char *raw = load_values(l, slot, t, at, n, place, staging);
        if (!raw) return -1;
        if (vector) {
            widen_values((float *)(void *)l->staging, raw, from, n);
            upload(l->dev, *slot->vector + at, l->staging, n * sizeof(float));
        } else if (!in_place)
            l->dev->ops->quantize(l->dev, (uint8_t *)(uintptr_t)slot->weight->data + at / 2,
                                  scales_of(slot->weight, l->absmax) + at / QUANT_BLOCK,
                                  l->remote ? l->remote : raw, from, slot->weight->dtype, n);
        if (l->options->stop && l->options->stop(l->options->stop_user))
            return fail(l->err, "stopped while loading");
    }
    if (!in_place && !vector) finish_weight(l->dev, slot->weight, l->absmax);
    return l->dev->ops->check(l->dev, l->err);
}

// A tensor that no slot asked for means another model than this program would compute.
static int refuse_unused(const WeightLoader *l, bool tied) {
    for (size_t i = 0; l->files && i < l->files->n_tensors; i++) {
        const TensorInfo *t = &l->files->tensors[i];
        if (t->used || strstr(t->name, "rotary_emb.inv_freq")) continue;    // recomputed
        if (tied && strcmp(t->name, "lm_head.weight") == 0) continue;       // the embedding again
        return fail(l->err, "%s: tensor %s is not part of this architecture as implemented here",
                    tensor_path(l->files, t), t->name);
    }
    return 0;
}

// Reads all weights into one allocation of the device, *weights of *bytes, that the caller owns. To
// plan, weights is NULL: types and *bytes are found out from the files' headers.
static int load_weights(WeightLoader *l, Transformer *m, const SlotList *list, void **weights,
                        size_t *bytes) {
    Device *dev = l->dev;
    size_t blocks = 0, staging = STAGING_VALUES * sizeof(float);
    Arena arena = {NULL, 0};
    for (size_t i = 0; i < list->n; i++) {
        Slot *slot = &list->slots[i];
        if (place_slot(l, slot, &arena)) return -1;
        blocks = max_size(blocks, ceil_div(slot->rows * slot->columns, QUANT_BLOCK));
    }
    size_t turns = m->config.hd / 2 * sizeof(float);
    *bytes = arena.used + turns;
    if (weights) {
        l->staging = mem_reserve(dev->allocator, staging, 1, l->err);
        l->absmax = l->staging ? dev->ops->allocate(dev, blocks * sizeof(float), l->err) : NULL;
        if (l->absmax && !dev->ops->host) l->remote = dev->ops->allocate(dev, staging, l->err);
        bool ready = l->absmax && (dev->ops->host || l->remote);
        *weights = ready ? dev->ops->allocate(dev, *bytes, l->err) : NULL;
        bool bad = !*weights;
        arena = (Arena){*weights, 0};
        for (size_t i = 0; i < list->n && !bad; i++) {
            l->slot = (uint32_t)i;
            bad = place_slot(l, &list->slots[i], &arena) || load_slot(l, &list->slots[i]);
        }
        bad = bad || refuse_unused(l, m->config.tied);
        if (!bad) {
            m->frequency = arena_alloc(&arena, turns, 1);
            upload(dev, m->frequency, m->rope_frequency, turns);
        }
        dev->ops->release(dev, l->remote, staging);
        dev->ops->release(dev, l->absmax, blocks * sizeof(float));
        mem_free(dev->allocator, l->staging, staging, 1);
        if (bad) {
            dev->ops->release(dev, *weights, *bytes);
            *weights = NULL;
            return -1;
        }
    }
    if (m->config.tied) m->head.weight = m->embedding;
    return 0;
}
// =================================================================================================
//  11. Chat templates and loss masks
//
//  A template is one object: it makes the training mask, the chat prompt and, when a model is
//  saved, the chat template beside it, so that they cannot drift apart. Hugging Face models carry
//  theirs as a Jinja program; here it is a row of strings, and the program is only compared with
//  those known to write what a row writes. The ids are those of transformers' apply_chat_template.
// =================================================================================================

typedef struct {
    const char *role;               // "system", "user" or "assistant"
    const char *content;            // UTF-8, not necessarily NUL-terminated
    size_t length;
    bool skip;                      // not learnt, whatever the mask says
    size_t input;                   // where a second text begins (Alpaca's input) behind the first
} Message;                          // and a newline; 0: there is none

// Which tokens the loss looks at. The end token belongs to the content: learning to stop is part of
// learning to answer.
typedef enum {
    MASK_CONTENT,                   // the assistant's text and its end token
    MASK_TURN,                      // the assistant's whole turn, header and trailing newline too
    MASK_ALL                        // every token but the first, which nothing predicts
} MaskKind;

enum { ROLE_SYSTEM, ROLE_USER, ROLE_ASSISTANT, N_ROLES };
static const char *const role_names[N_ROLES] = {"system", "user", "assistant"};

typedef struct { const char *before, *end, *after; } TurnForm;   // before CONTENT end after

// In the strings of a row: the tokenizer's BOS and EOS token, whatever their texts are.
#define BOS "\1"
#define EOS "\2"

enum {
    TRIM_SYSTEM = 1 << ROLE_SYSTEM, TRIM_USER = 1 << ROLE_USER, TRIM_ANSWER = 1 << ROLE_ASSISTANT,
    TRIM_ALL = TRIM_SYSTEM | TRIM_USER | TRIM_ANSWER,
    NO_SYSTEM = 8,                  // a system message is refused
    SYSTEM_IN_FIRST = 16,           // its text goes into the first user turn,
    SYSTEM_IN_LAST = 32,            // or into the last,
    SYSTEM_IF_LAST = 64,            // or into the last if no answer follows; else it is left out
    SKIP_EMPTY_SYSTEM = 128,        // an empty system message is left out
    ALTERNATES = 256,               // user, assistant, user, ... or refused
    MERGES = 512,                   // neighbours of one role are one turn
    THINKS = 1024,                  // Qwen3: see write_answer
    SYSTEM_INSIDE = SYSTEM_IN_FIRST | SYSTEM_IN_LAST | SYSTEM_IF_LAST,
    ASKS_ALWAYS = 2048,             // the header of an answer is there even if none is asked for
    BOS_INSIDE = 4096               // the program writes the first BOS together with other text
};

enum { MAX_CONTROLS = 4 };

typedef struct {
    const char *name;
    const char *controls[MAX_CONTROLS];        // strings that must be one added token each
    const char *stop;               // ends an answer: one of these, or EOS
    TurnForm turns[N_ROLES];
    int flags;
    const char *begin;              // before all
    const char *ask;                // what asks for an answer; NULL: what an answer begins with
    const char *tail;               // behind all if no answer is asked for
    const char *system;             // stands in for a missing system message
    const char *opening;            // before the text of the first system message
    const char *input, *input_system;          // before a second text; `system` where there is one
} TemplateRow;

#define CHATML_TURN(role, newline) {"<|im_start|>" role "\n", "<|im_end|>", newline}
#define CHATML(newline) {CHATML_TURN("system", newline), CHATML_TURN("user", newline),           \
                         CHATML_TURN("assistant", newline)}
#define CHATML_TOKENS {"<|im_start|>", "<|im_end|>"}, "<|im_end|>"
#define LLAMA3_TURN(role) {"<|start_header_id|>" role "<|end_header_id|>\n\n", "<|eot_id|>", ""}
#define LLAMA3 {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}, "<|eot_id|>",         \
    {LLAMA3_TURN("system"), LLAMA3_TURN("user"), LLAMA3_TURN("assistant")}, .flags = TRIM_ALL
#define INST_TOKENS {"[INST]", "[/INST]"}
#define NO_TURN {"", "", ""}
#define IN_USER {"", "", "\n\n"}               // a system text inside a user's

static const TemplateRow template_rows[] = {
    {"chatml", CHATML_TOKENS, CHATML("\n"), .begin = ""},
    // as tutorial 000 writes it
    {"chatml-compact", CHATML_TOKENS, CHATML(""), .begin = ""},
    {"qwen2.5", CHATML_TOKENS, CHATML("\n"),
     .system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."},
    {"qwen3", CHATML_TOKENS, CHATML("\n"), .flags = THINKS},
    {"llama2", {NULL}, EOS,
     {{"<<SYS>>\n", "", "\n<</SYS>>\n\n"}, {BOS "[INST] ", "", " [/INST]"}, {" ", " " EOS, ""}},
     .flags = SYSTEM_IN_FIRST | ALTERNATES | TRIM_USER | TRIM_ANSWER, .ask = ""},
    {"llama3", LLAMA3, .begin = BOS},
    {"llama3.1", LLAMA3, .begin = BOS, .system = "",
     .opening = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"},
    // Mistral: "-common" are those of the mistral-common library, the others those of the models.
    {"mistral-v0.1", {NULL}, EOS, {NO_TURN, {"[INST] ", "", " [/INST]"}, {"", EOS, " "}},
     .flags = NO_SYSTEM | ALTERNATES, .begin = BOS, .ask = ""},
    {"mistral-v0.2", {NULL}, EOS, {NO_TURN, {"[INST] ", "", " [/INST]"}, {"", EOS, ""}},
     .flags = NO_SYSTEM | ALTERNATES, .begin = BOS, .ask = ""},
    {"mistral-v1", {NULL}, EOS, {IN_USER, {" [INST] ", "", " [/INST]"}, {" ", EOS, ""}},
     .flags = SYSTEM_IN_FIRST | ALTERNATES, .begin = BOS, .ask = ""},
    {"mistral-v3", INST_TOKENS, EOS, {IN_USER, {"[INST] ", "", "[/INST]"}, {" ", EOS, ""}},
     .flags = SYSTEM_IF_LAST | ALTERNATES | TRIM_ANSWER, .begin = BOS, .ask = ""},
    {"mistral-v3-tekken", INST_TOKENS, EOS, {IN_USER, {"[INST]", "", "[/INST]"}, {"", EOS, ""}},
     .flags = SYSTEM_IF_LAST | ALTERNATES, .begin = BOS, .ask = ""},
    {"mistral-v7", {"[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"}, EOS,
     {{"[SYSTEM_PROMPT] ", "", "[/SYSTEM_PROMPT]"}, {"[INST] ", "", "[/INST]"}, {" ", EOS, ""}},
     .begin = BOS, .ask = ""},
    {"mistral-common-v1", {NULL}, EOS, {IN_USER, {"[INST] ", "", " [/INST]"}, {"", EOS, ""}},
     .flags = SYSTEM_IN_FIRST | MERGES, .begin = BOS, .ask = ""},
    {"mistral-common-v3", INST_TOKENS, EOS, {IN_USER, {"[INST]", "", "[/INST]"}, {"", EOS, ""}},
     .flags = SYSTEM_IN_LAST | MERGES, .begin = BOS, .ask = ""},
    {"phi3", {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"}, "<|end|>",
     {{"<|system|>\n", "<|end|>", "\n"}, {"<|user|>\n", "<|end|>", "\n"},
      {"<|assistant|>\n", "<|end|>", "\n"}}, .tail = EOS},
    // the first of them: no system message, and every question asks for an answer
    {"phi3-first", {"<|user|>", "<|assistant|>", "<|end|>"}, "<|end|>",
     {NO_TURN, {"<|user|>\n", "<|end|>", "\n<|assistant|>\n"}, {"", "<|end|>", "\n"}},
     .flags = NO_SYSTEM},
    {"zephyr", {NULL}, EOS, {{"<|system|>\n", EOS, "\n"}, {"<|user|>\n", EOS, "\n"},
                             {"<|assistant|>\n", EOS, "\n"}}, .begin = ""},
    {"alpaca", {NULL}, EOS, {IN_USER, {"### Instruction:\n", "", "\n\n### Response:\n"},
                             {"", EOS, ""}},
     .system = "Below is an instruction that describes a task. Write a response that appropriately "
               "completes the request.",
     .input = "\n\n### Input:\n",
     .input_system = "Below is an instruction that describes a task, paired with an input that "
                     "provides further context. Write a response that appropriately completes the "
                     "request."},
    // tutorial 003: from an answer to the instruction that asked for it
    {"dolly", {NULL}, EOS,
     {NO_TURN, {"### Instruction:\nUse the Input below to create an instruction, which could have "
                "been used to generate the input using an LLM.\n\n### Input:\n", "",
                "\n\n### Response:\n"}, {"", "\n" EOS, ""}}, .flags = NO_SYSTEM},
    {"tutorial-004", {NULL}, EOS, {NO_TURN, {BOS "[INST] ", "", " [/INST]"}, {" \n ", " " EOS, ""}},
     .flags = NO_SYSTEM, .input = " here are the inputs "},
};
enum { N_TEMPLATE_ROWS = sizeof template_rows / sizeof *template_rows };

// A row, fitted to one tokenizer.
typedef struct ChatTemplate {
    const TemplateRow *row;
    TurnForm turns[N_ROLES];
    int flags;                      // the row's and those of the program that was recognised
    const char *begin, *ask, *tail, *bos, *eos;               // "" where there is none
    const char *system;             // stands in for a missing system message, or NULL
    const char *end;                // the token that ends the assistant's turn
    int32_t end_id;
    bool own;                       // the model's own chat template says the same
    const char *refused;            // not NULL: there is none, and why
    const char *cuts[MAX_CONTROLS + 2];        // tokens before which the text may be cut in two
    size_t n_cuts;
    const char *prompt;             // --prompt-template: the text with holes, else NULL
    const char **holes, **between;  // (n_holes) names of fields; what follows each. The last one is
    size_t n_holes;                 // the answer
} ChatTemplate;

// ----------------------------------------------------------------- Jinja programs in one spelling
//
// What a chat_template does is told from its program, brought to one spelling: white space and
// comments as Jinja treats them under transformers (trim_blocks, lstrip_blocks), x['role'] as
// x.role, neighbouring texts as one, branches for tools, which no message here has, left out. Two
// programs that spell alike do the same. One that is known is thus recognised however it is laid
// out and whatever it says of tools; one that is not is refused, never guessed at.

enum { MAX_JINJA_BLOCKS = 64 };

typedef struct {
    const char *at, *end;
    Buffer *out, *e;                // the program so far; the expression just read
    bool strip, trim;               // the tag before takes the white space behind it, or a newline
    bool line_start;
    bool bos, wrote;                // begins with {{ bos_token }}, which is not spelled; any output
    bool joins;                     // the last thing written is an output that may be continued
    bool complex;                   // the expression is more than a sum
    bool failed;                    // memory is short
    char blocks[MAX_JINJA_BLOCKS];  // open: 'i' an if that is not written yet, 'I' one that is, 'o'
    size_t depth;
    size_t dead;                    // blocks open in a branch that is left out, and this one itself
    qlora_error *err;
} JinjaReader;

static bool is_blank(char c) { return c && strchr(" \t\r\n", c); }
static bool is_word(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

static int spell_text(JinjaReader *r, const char *text, size_t n) {
    return buffer_append(r->e, text, n, r->err) ? (r->failed = true, -1) : 0;
}

// Appends a character of a string in the one spelling of strings, '...'.
static int spell(JinjaReader *r, char c) {
    return ((c == '\'' || c == '\\') && spell_text(r, "\\", 1)) || spell_text(r, &c, 1) ? -1 : 0;
}

// Undoes those escapes, in place. Returns the length.
static size_t unescape(char *text, size_t n) {
    size_t length = 0;
    for (size_t i = 0; i < n; i++) text[length++] = text[i += text[i] == '\\'];
    return length;
}

// Reads a string at its quote. NULL: unsupported, or out of memory.
static const char *read_jinja_string(JinjaReader *r, const char *p) {
    static const char from[] = "ntr\\'\"", to[] = "\n\t\r\\'\"";
    char quote = *p++;
    if (r->e->size >= 2 && memcmp(r->e->data + r->e->size - 2, "'+", 2) == 0) r->e->size -= 2;
    else if (spell_text(r, "'", 1)) return NULL;
    for (; p < r->end && *p != quote; p++) {
        const char *escape = *p == '\\' && p + 1 < r->end && p[1] ? strchr(from, p[1]) : NULL;
        if (*p == '\\' && !escape) return NULL;
        if (*p == '\r' && p + 1 < r->end && p[1] == '\n') continue;
        if (spell(r, escape ? to[escape - from] : *p)) return NULL;
        if (escape) p++;
    }
    return p < r->end && !spell_text(r, "'", 1) ? p + 1 : NULL;
}

// The end of a subscript ['name'] at p, whose name it appends as .name, or NULL if it is none.
static const char *read_subscript(JinjaReader *r, const char *p) {
    char last = r->e->size ? r->e->data[r->e->size - 1] : 0;
    if (!is_word(last) && last != ')' && last != ']') return NULL;
    for (p++; p < r->end && is_blank(*p);) p++;
    char quote = *p++;
    if (quote != '\'' && quote != '"') return NULL;
    const char *name = p;
    while (p < r->end && is_word(*p)) p++;
    size_t n = (size_t)(p - name);
    if (!n || *p++ != quote) return NULL;
    while (p < r->end && is_blank(*p)) p++;
    if (p >= r->end || *p != ']') return NULL;
    return spell_text(r, ".", 1) || spell_text(r, name, n) ? NULL : p + 1;
}

// Reads what stands in a tag that ends with `close` and }. Returns 1, 0 if unsupported, or -1.
static int read_tag(JinjaReader *r, char close) {
    const char *p = r->at + 2 + (r->at[2] == '-' || r->at[2] == '+');
    size_t braces = 0;
    bool gap = false;
    r->e->size = 0;
    r->complex = false;
    while (p < r->end) {
        const char *q = p + (*p == '-' || (*p == '+' && close == '%'));
        if (!braces && *q == close && q[1] == '}') {
            r->strip = *p == '-';
            r->trim = close == '%' && *p != '+';
            r->at = q + 2;
            return spell_text(r, "", 1) ? -1 : 1;
        }
        char c = *p, last = r->e->size ? r->e->data[r->e->size - 1] : 0;
        const char *next = c == '[' ? read_subscript(r, p) : NULL;
        if (c == '\'' || c == '"') {
            next = read_jinja_string(r, p);
            if (!next) return r->failed ? -1 : 0;
        } else if (!next && !is_blank(c)) {
            bool apart = gap && is_word(c) && is_word(last);
            if (apart || c == '~') r->complex = true;
            braces += c == '{';
            braces -= c == '}' && braces;
            if ((apart && spell_text(r, " ", 1)) || spell_text(r, &c, 1)) return -1;
        }
        gap = !next && is_blank(c);
        p = next ? next : p + 1;
    }
    return 0;
}

// Writes the output that `e` holds, a text or an expression.
static int write_output(JinjaReader *r) {
    Buffer *e = r->e, *out = r->out;
    const char *text = e->data;
    size_t n = e->size - 1;
    bool failure = starts_with(text, n, "raise_exception("), simple = !r->complex && !failure;
    if (r->dead || !n || strcmp(text, "''") == 0) return 0;
    if (strcmp(text, "bos_token") == 0 && !r->depth && !r->wrote) {
        r->bos = r->wrote = true;
        return 0;
    }
    r->wrote = r->wrote || !failure;
    if (failure) { text = "raise"; n = 5; }
    if (r->joins && simple) {
        out->size -= 2;                               // the ';' and its NUL
        bool both = *text == '\'' && out->data[out->size - 1] == '\'';
        if (both) { out->size--; text++; n--; }
        else if (buffer_append(out, "+", 1, r->err)) return -1;
    } else {
        out->size--;
        if (buffer_append(out, "O:", 2, r->err)) return -1;
    }
    r->joins = simple;
    return buffer_append(out, text, n, r->err) || buffer_append(out, ";", 2, r->err) ? -1 : 0;
}

// Writes the text before a tag, or the last one.
static int write_text(JinjaReader *r, const char *p, const char *end, bool strip, bool block) {
    if (r->strip) while (p < end && is_blank(*p)) p++;
    if (r->trim && p < end && *p == '\r') p++;
    bool line_start = r->line_start;
    if (r->trim && p < end && *p == '\n') { p++; line_start = true; }
    if (strip) while (end > p && is_blank(end[-1])) end--;
    const char *line = end;
    while (block && line > p && (line[-1] == ' ' || line[-1] == '\t')) line--;
    if (block && (line > p ? line[-1] == '\n' : line_start)) end = line;
    r->line_start = false;
    r->e->size = 0;
    r->complex = false;
    if (p == end) return 0;
    if (buffer_append(r->e, "'", 1, r->err)) return -1;
    for (; p < end; p++)
        if (!(*p == '\r' && p + 1 < end && p[1] == '\n') && spell(r, *p)) return -1;
    return buffer_append(r->e, "'", 2, r->err) || write_output(r);
}

// Is the condition of a branch never true here: for one, because it is about tools?
static bool is_never(const char *condition) {
    static const char *const never[] = {"tools", "tools is not none", "builtin_tools is defined",
        "builtin_tools is defined or tools is not none", "custom_tools is defined",
        "message.tool_calls", "message.role=='tool'", "'tool_calls'in message",
        "tools is not none and not tools_in_user_message",
        "tools_in_user_message and not tools is none",
        "tools is not none and(message==user_messages[-1])",
        "message.role=='tool'or message.role=='ipython'",
        "message.role=='tool_results'or message.role=='tool'",
        "message.tool_calls is defined and message.tool_calls is not none",
        "(message.tool_calls is defined and message.tool_calls is not none)"};
    for (size_t i = 0; i < sizeof never / sizeof *never; i++)
        if (strcmp(condition, never[i]) == 0) return true;
    return starts_with(condition, strlen(condition), "false==true") && !strstr(condition, "or");
}

static int write_statement(JinjaReader *r, const char *word, const char *rest) {
    r->out->size--;
    r->joins = false;
    return buffer_printf(r->out, r->err, "%%%s%s;", word, rest) ||
           buffer_append(r->out, "", 1, r->err) ? -1 : 0;
}

// Takes in the statement that `e` holds. A branch about tools leaves no trace: an if without a
// branch that is written is left out, and its else is what stands there. Returns as read_tag.
static int read_statement(JinjaReader *r) {
    static const char *const words[] = {"if", "elif", "else", "for", "macro", "set", "generation",
                                        "endgeneration", "endif", "endfor", "endmacro", "endset"};
    enum { IF, ELIF, ELSE, FOR, MACRO, SET, GENERATION, ENDGENERATION, ENDS, N = 12 };
    const char *e = r->e->data;
    size_t n = 0, kind = 0;
    while (is_word(e[n])) n++;
    while (kind < N && (strncmp(e, words[kind], n) || words[kind][n])) kind++;
    if (kind == N || r->depth == MAX_JINJA_BLOCKS) return 0;
    if (kind == GENERATION || kind == ENDGENERATION) return 1;
    bool opens = kind == IF || kind == FOR || kind == MACRO || (kind == SET && !strchr(e, '='));
    bool ends = kind >= ENDS, goes_on = kind == ELIF || kind == ELSE || ends;
    if (r->dead && (opens || (ends && r->dead > 1))) {
        r->dead = opens ? r->dead + 1 : r->dead - 1;
        return 1;
    }
    if (r->dead > 1 || (r->dead && !goes_on)) return 1;
    if (goes_on && !r->depth) return 0;
    if (opens) r->blocks[r->depth++] = kind == IF ? 'i' : 'o';
    char *block = &r->blocks[r->depth ? r->depth - 1 : 0];
    if (goes_on) r->dead = 0;
    if (ends) r->depth--;
    if (kind == IF || kind == ELIF) {
        const char *condition = e + n + (e[n] == ' ');
        r->dead = is_never(condition);
        if (r->dead) return 1;
        bool first = *block == 'i';
        *block = 'I';
        return write_statement(r, first ? "if " : "elif ", condition) ? -1 : 1;
    }
    if (goes_on && *block == 'i') return 1;
    return write_statement(r, e, "") ? -1 : 1;
}

// Passes over a comment. Returns as read_tag.
static int read_comment(JinjaReader *r) {
    const char *close = strstr(r->at + 2, "#}");
    if (!close || close >= r->end) return 0;
    r->strip = close[-1] == '-';
    r->trim = true;
    r->at = close + 2;
    return 1;
}

// Spells a program. Returns 1, 0 if it uses what this reader does not know, -1 if memory is short.
static int spell_jinja(Buffer *out, bool *bos, const char *text, qlora_error *err) {
    Buffer e = {.allocator = out->allocator};
    size_t n = strlen(text);
    n -= n && text[n - 1] == '\n';                    // as Jinja does
    JinjaReader r = {.at = text, .end = text + n, .out = out, .e = &e, .line_start = true,
                     .err = err};
    int good = buffer_append(out, "", 1, err) ? -1 : 1;
    while (good == 1 && r.at < r.end) {
        const char *tag = r.at;
        while (tag < r.end && !(tag[0] == '{' && tag[1] && strchr("{%#", tag[1]))) tag++;
        char kind = tag < r.end ? tag[1] : 0;
        bool strip = kind && tag[2] == '-', block = kind && kind != '{' && tag[2] != '+';
        if (write_text(&r, r.at, tag, strip, block)) good = -1;
        r.at = tag;
        if (good < 0 || !kind) break;
        good = kind == '#' ? read_comment(&r) : read_tag(&r, kind == '{' ? '}' : '%');
        if (good == 1 && kind == '{') good = write_output(&r) ? -1 : 1;
        if (good == 1 && kind == '%') good = read_statement(&r);
    }
    *bos = r.bos;
    buffer_free(&e);
    return good == 1 && r.depth ? 0 : good;
}

// ------------------------------------------------------------------------------ finding a template

// Programs that are known to write what a row writes: hashes (hash_bytes) of their spelling.
static const struct { uint64_t hash; const char *row; int flags; } known_programs[] = {
    {0x23ad0d237208e059, "chatml", 0},                      // most models
    {0xe8f549312d6fd146, "chatml", 0},                      // Dolphin
    {0xdf9998273af3a80b, "chatml-compact", 0},
    {0x7ec888fb075ff151, "qwen2.5", 0},                     // Qwen2.5, MiMo
    {0x167ae6b8b2f388e2, "qwen2.5", 0},                     // the same without tools
    {0xcc9a35c2941adc15, "qwen2.5", 0},                     // Qwen2, SmolLM2
    {0xc24ffeed8166d3ef, "qwen3", 0},
    {0x8f0b55cdaaef5068, "qwen3", 0},                       // of trl
    {0x15dfd397e432003d, "llama2", 0},
    {0x2d015da9f0cf5793, "llama2", 0},                      // of older tokenizers
    {0xe9fea88d7657f74a, "llama3", BOS_INSIDE},
    {0x9f6cdee22f16423e, "llama3", BOS_INSIDE | ASKS_ALWAYS},            // the first weeks'
    {0x5b2d441c8214f9fb, "llama3.1", 0},                    // 3.1, 3.3
    {0xd15c46be7693d6d9, "mistral-v0.1", 0},
    {0xf98c60a51e9a76fb, "mistral-v0.2", 0},                // and Mixtral 8x7B
    {0x9b4a96ec560a8d1e, "mistral-v1", 0},
    {0x507068e0fe504a46, "mistral-v3", 0},
    {0xa1a7714cfa25b9ee, "mistral-v3-tekken", 0},
    {0x7d2cd4b927810a82, "mistral-v7", 0},
    {0xfd43f80688ee586c, "mistral-common-v1", 0},
    {0x90ae8001feed3e92, "mistral-common-v3", 0},
    {0x7db3aaad91c75b4e, "phi3", 0},
    {0x0a0799b44f73d6c6, "phi3", SKIP_EMPTY_SYSTEM},        // Phi-3.5
    {0xa8c7919dcb9ba6d8, "phi3", 0},                        // Phi-3-small
    {0x00f707825d08e7d2, "phi3-first", 0},
    {0xffb28f4d1953c92d, "zephyr", 0},                      // and TinyLlama
};
enum { N_KNOWN_PROGRAMS = sizeof known_programs / sizeof *known_programs };

static const TemplateRow *find_row(const char *name) {
    for (size_t i = 0; i < N_TEMPLATE_ROWS; i++)
        if (strcmp(template_rows[i].name, name) == 0) return &template_rows[i];
    return NULL;
}

// Makes `c` the row, not yet fitted to a tokenizer. plain: without its controls, with EOS as stop.
static void set_row(ChatTemplate *c, const TemplateRow *row, bool plain) {
    c->row = row;
    c->flags = row->flags;
    c->begin = row->begin ? row->begin : "";
    c->tail = row->tail ? row->tail : "";
    c->system = row->system;
    c->end = plain ? EOS : row->stop;
    memcpy(c->turns, row->turns, sizeof c->turns);
    for (int role = 0; role < N_ROLES && plain; role++)
        if (strcmp(c->turns[role].end, row->stop) == 0) c->turns[role].end = EOS;
    c->ask = row->ask ? row->ask : c->turns[ROLE_ASSISTANT].before;
}

// Takes the system text that the spelled program writes when it is given none, as Qwen2.5's
// '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n', out of it: models differ in it.
static int take_default_system(Buffer *spelled, const char **system, Region *region,
                               qlora_error *err) {
    static const char before[] = "'<|im_start|>system\n", after[] = "<|im_end|>\n";
    char *text = spelled->data, *end = text;
    for (bool found = false; !found;) {
        text = strstr(text, before);
        if (!text) return 0;
        text = end = text + strlen(before);
        while (*end && *end != '\'' && !starts_with(end, strlen(end), after))
            end += *end == '\\' ? 2 : 1;
        found = end > text && starts_with(end, strlen(end), after);
    }
    size_t n = (size_t)(end - text);
    char *copy = region_text(region, text, n, err), *plain = region_text(region, text, n, err);
    if (!copy || !plain) return -1;
    plain[unescape(plain, n)] = 0;
    *system = plain;
    for (char *p = spelled->data; (p = strstr(p, copy)) != NULL;) {
        memmove(p + 1, p + n, strlen(p + n) + 1);
        *p++ = '\5';
    }
    spelled->size = strlen(spelled->data) + 1;
    return 0;
}

static int template_jinja(const ChatTemplate *c, Buffer *b, qlora_error *err);

// Spells a program without its default system text, as spell_jinja does.
static int spell_program(Buffer *spelled, const char *text, const char **system, bool *bos,
                         Region *region, qlora_error *err) {
    int good = spell_jinja(spelled, bos, text, err);
    return good == 1 && take_default_system(spelled, system, region, err) ? -1 : good;
}

// Sets the row that the model's own program stands for: one that is known, or what we would save
// for a row. c->row stays NULL if there is none.
static int recognise(ChatTemplate *c, const char *text, uint64_t *hash, Region *region,
                     qlora_error *err) {
    Buffer spelled = {.allocator = region->allocator}, saved = spelled, ours = spelled;
    const char *system = NULL, *other;
    bool bos, other_bos;
    int good = spell_program(&spelled, text, &system, &bos, region, err);
    *hash = good == 1 ? hash_bytes(spelled.data, strlen(spelled.data)) : 0;
    for (size_t i = 0; i < N_KNOWN_PROGRAMS && good == 1 && !c->row; i++) {
        if (known_programs[i].hash != *hash) continue;
        set_row(c, find_row(known_programs[i].row), false);
        c->flags |= known_programs[i].flags;
    }
    for (size_t i = 0; i < 2 * N_TEMPLATE_ROWS && good == 1 && !c->row; i++) {
        saved.size = ours.size = 0;
        set_row(c, &template_rows[i / 2], i % 2);
        if (template_jinja(c, &saved, err) || buffer_append(&saved, "", 1, err) ||
            spell_program(&ours, saved.data, &other, &other_bos, region, err) < 0)
            good = -1;
        if (good < 0 || strcmp(ours.data, spelled.data) != 0) c->row = NULL;
    }
    if (c->row && c->system && system) c->system = system;
    if (c->row) c->begin = bos || c->flags & BOS_INSIDE ? BOS : "";
    if (c->row && c->flags & ASKS_ALWAYS) c->tail = c->ask;
    buffer_free(&spelled);
    buffer_free(&saved);
    buffer_free(&ours);
    return good < 0 ? -1 : 0;
}

// The id of a text that is one added token, which the tokenizer finds inside any text, or -1. Notes
// it as a place to cut: what is before it and what begins with it are tokenised independently,
// unless it eats the space to its left or is looked for only after normalising.
static int32_t add_control(ChatTemplate *c, const Tokenizer *t, const char *text) {
    int32_t id = tokenizer_id(t, text, strlen(text));
    for (size_t i = 0; id >= 0 && i < t->added_raw.n; i++) {
        const AddedToken *token = &t->added_raw.tokens[i];
        if (token->id != id || token->single_word) continue;
        if (!token->lstrip) c->cuts[c->n_cuts++] = text;
        return id;
    }
    for (size_t i = 0; id >= 0 && i < t->added_normalized.n; i++)
        if (t->added_normalized.tokens[i].id == id) return id;
    return -1;
}

// Looks the row's controls, BOS and EOS up in the vocabulary.
static int fit_tokens(ChatTemplate *c, const Tokenizer *t, qlora_error *err) {
    const TemplateRow *row = c->row;
    bool plain = *c->end == *EOS;
    c->bos = t->bos_token ? t->bos_token : "";
    c->eos = t->eos_token ? t->eos_token : "";
    c->end_id = -1;
    for (size_t i = 0; i < MAX_CONTROLS && row->controls[i] && plain == (*row->stop == *EOS); i++) {
        const char *control = row->controls[i];
        int32_t id = add_control(c, t, control);
        if (id < 0)
            return fail(err, "template %s: %s must be one added token of the vocabulary and is "
                        "not; --add-tokens '%s' makes it one, or choose the template that the "
                        "model was made with, or one made of text (zephyr, alpaca)", row->name,
                        control, control);
        if (strcmp(control, c->end) == 0) c->end_id = id;
    }
    int32_t eos = *c->eos ? add_control(c, t, c->eos) : -1;
    if (*c->bos) add_control(c, t, c->bos);
    if (plain) { c->end = c->eos; c->end_id = eos; }
    if (c->end_id < 0 || (strchr(c->tail, *EOS) && !*c->eos))
        return fail(err, "template %s: the vocabulary has no end-of-text token (eos_token in "
                    "tokenizer_config.json): the model could never learn to stop", row->name);
    if (strchr(c->turns[ROLE_USER].before, *BOS) && !*c->bos)
        return fail(err, "template %s: every question begins with a BOS token, and the tokenizer "
                    "has none (bos_token in tokenizer_config.json)", row->name);
    return 0;
}

static int unknown_template(const char *name, const char *text, uint64_t hash, Region *region,
                            qlora_error *err) {
    Buffer known = {.allocator = region->allocator};
    int bad = 0;
    for (size_t i = 0; i < N_TEMPLATE_ROWS && !bad; i++)
        bad = buffer_printf(&known, err, "%s%s", i ? ", " : "", template_rows[i].name);
    if (bad) buffer_free(&known);
    else if (name) fail(err, "template \"%s\" is not known; known are: %s", name, known.data);
    else if (strstr(text, "strftime_now"))
        fail(err, "the model's own chat template writes the date of the day, which training cannot "
             "follow; pass --template NAME to train and chat with another, as llama3.1, whose date "
             "is fixed; known are: %s", known.data);
    else
        fail(err, "the model's own chat template, which begins \"%.60s\" (program %016llx), does "
             "not do what one of those known does; pass --template NAME to train and chat with "
             "that one instead, or --prompt-template TEXT; known are: %s", text,
             (unsigned long long)hash, known.data);
    buffer_free(&known);
    return -1;
}

static int prompt_template(ChatTemplate *c, const char *text, const Tokenizer *t, Region *region,
                           qlora_error *err);
static int find_saved_prompt(ChatTemplate *c, const char *text, const Tokenizer *t, Region *region,
                             qlora_error *err);

// Fits a template to the tokenizer. Named, it is that row; with a prompt, text with holes; else
// what the model's own chat_template stands for, or, without one, ChatML. If the vocabulary lacks
// ChatML's tokens then (a raw Llama-2), its headers are ordinary text and the model's own
// end-of-text token ends a turn: every program stops there. Lines that a person should see are
// appended to `note`. What `out` points to lives in the region and the tokenizer.
static int template_find(ChatTemplate *out, const char *name, const char *prompt,
                         const Tokenizer *t, Region *region, Buffer *note, qlora_error *err) {
    const char *text = name || prompt ? NULL : t->chat_template;
    bool adds_bos = t->n_prefix && t->prefix[0] == t->bos_id;
    const TemplateRow *chatml = &template_rows[0];
    uint64_t hash = 0;
    *out = (ChatTemplate){.own = text != NULL, .prompt = prompt};
    if (prompt && prompt_template(out, prompt, t, region, err)) return -1;
    if (name && find_row(name)) set_row(out, find_row(name), false);
    if (text && (recognise(out, text, &hash, region, err) ||
                 (!out->row && find_saved_prompt(out, text, t, region, err))))
        return -1;
    if (!out->row && (name || text)) return unknown_template(name, text, hash, region, err);
    if (!out->row) {
        ChatTemplate none = {0};
        bool plain = false;
        for (size_t i = 0; i < 2; i++) plain |= add_control(&none, t, chatml->controls[i]) < 0;
        set_row(out, chatml, plain);
        if (buffer_printf(note, err, "template chatml: the model has no chat template of its own"
                          "%s\n", !plain ? "" : ", nor ChatML's tokens: its headers are written "
                          "as plain text and turns end with the end-of-text token"))
            return -1;
    }
    // Where no program of the model decides on a BOS, its tokenizer does, unless questions have it.
    bool has_bos = *out->turns[ROLE_USER].before == *BOS ||
                   *out->turns[ROLE_ASSISTANT].before == *BOS;
    if (!text && adds_bos && !has_bos) out->begin = BOS;
    return fit_tokens(out, t, err);
}

// ---------------------------------------------------------------------------- text with {holes}
//
// A prompt template is text with the names of a record's fields in braces; {{ and }} are braces.
// The last hole is the answer, which the loss looks at together with what follows and EOS. What
// stands before the first hole and before the answer begins and ends a user's turn, so that a
// template with one hole for the question can be chatted with.

// Makes `c` a template of that text. BOS at its beginning and EOS at its end, if they are there as
// text, are the template's own, so that neither is doubled.
static int prompt_template(ChatTemplate *c, const char *text, const Tokenizer *t, Region *region,
                           qlora_error *err) {
    const char *bos = t->bos_token ? t->bos_token : "", *eos = t->eos_token ? t->eos_token : "";
    size_t n = strlen(text), n_eos = strlen(eos), i = starts_with(text, n, bos) ? strlen(bos) : 0;
    TemplateRow *row = region_alloc(region, 1, sizeof *row, err);
    char *copy = region_alloc(region, n + 4, 1, err), *out = copy;
    const char *prompt = region_text(region, text, n, err), **part;
    c->holes = region_alloc(region, n + 1, sizeof *c->holes, err);
    c->between = part = region_alloc(region, n + 2, sizeof *part, err);
    if (!row || !copy || !prompt || !c->holes || !part) return -1;
    if (i) *out++ = *BOS;
    if (n_eos && n >= i + n_eos && memcmp(text + n - n_eos, eos, n_eos) == 0) n -= n_eos;
    for (*part++ = copy; i < n; i++) {
        bool brace = text[i] == '{' || text[i] == '}', twice = i + 1 < n && text[i + 1] == text[i];
        if (text[i] == *BOS || text[i] == *EOS)
            return fail(err, "prompt template: a control character at byte %zu", i + 1);
        if (!brace || twice) {
            *out++ = text[i];
            i += brace;
            continue;
        }
        size_t length = strcspn(text + i + 1, "{}");
        if (text[i] == '}' || !length || i + 1 + length >= n || text[i + 1 + length] != '}')
            return fail(err, "prompt template, byte %zu: expected {field}, found \"%.20s\"; a "
                        "brace itself is written {{ or }}", i + 1, text + i);
        *out++ = 0;
        c->holes[c->n_holes] = region_text(region, text + i + 1, length, err);
        if (!c->holes[c->n_holes++]) return -1;
        *part++ = out;
        i += length + 1;
    }
    memcpy(out, EOS, 2);
    if (!c->n_holes)
        return fail(err, "prompt template \"%.60s\": expected {field} for the answer, found none",
                    text);
    bool asks = c->n_holes > 1;
    const char *first = c->between[0], *answer = part[-1], *question = asks ? part[-2] : "";
    c->between++;                                     // from now on what follows each hole
    *row = (TemplateRow){.name = "prompt", .stop = EOS, .flags = NO_SYSTEM,
        .turns = {NO_TURN, {asks ? first : "", "", question}, {asks ? "" : first, answer, ""}}};
    set_row(c, row, false);
    c->prompt = prompt;
    return 0;
}

// Appends the messages that a record's fields make in a prompt template.
static int prompt_fill(const ChatTemplate *c, Buffer *messages, const Json *record, Region *region,
                       qlora_error *err) {
    Buffer text = {.allocator = region->allocator};
    int bad = 0;
    for (size_t i = 0; i < c->n_holes && !bad; i++) {
        const Json *value = json_get(record, c->holes[i]);
        bool answer = i + 1 == c->n_holes;
        if (!json_is(value, JSON_STRING) && !json_is(value, JSON_NUMBER)) {
            bad = fail(err, "\"%s\", a field of the prompt template: expected a string, found %s",
                       c->holes[i], value ? json_kind_name(value->kind) : "none");
        } else if (answer) {
            Message user = {"user", region_text(region, text.data ? text.data : "", text.size, err),
                            text.size, false, 0};
            Message assistant = {"assistant", value->text, value->length, false, 0};
            bad = !user.content ||
                  (i && buffer_append(messages, &user, sizeof user, err)) ||
                  buffer_append(messages, &assistant, sizeof assistant, err);
        } else {
            bad = buffer_append(&text, value->text, value->length, err) ||
                  (i + 2 < c->n_holes &&
                   buffer_append(&text, c->between[i], strlen(c->between[i]), err));
        }
    }
    buffer_free(&text);
    return bad ? -1 : 0;
}

// ---------------------------------------------------------------------------- applying a template
//
// Tokens of the rendered text do not respect the borders between its parts: "assistant\n" followed
// by an answer that begins with a newline has one token "\n\n" across the border. Two rules give
// the reference's ids and a sound mask. The text is cut only before tokens that split it anyway, so
// the ids are those of the whole text. Within such a chunk, what precedes a border is tokenised
// once more on its own: tokens that agree with the chunk's lie before the border; the first that
// does not, be it one across, begins what comes after. A token across the border is thus learnt
// with the answer, as in transformers' assistant mask.

typedef struct { size_t offset; bool learn; } MaskBorder;        // from this byte of the chunk on

typedef struct {
    const ChatTemplate *c;
    const Tokenizer *tokenizer;
    const Message *messages;
    size_t n;
    MaskKind mask;
    size_t host;                    // the user message that takes in the system text; n: none
    size_t query;                   // the last of the user's messages
    Buffer text, borders, prefix;   // the chunk, its MaskBorders, ids of what precedes a border
    Buffer body;                    // the content of a turn
    Buffer *ids, *learn;
    qlora_error *err;
} TemplateWriter;

// Tokenises the chunk, marks its tokens border by border, and empties it.
static int end_chunk(TemplateWriter *w) {
    size_t first = w->ids->size / sizeof(int32_t);
    if (tokenizer_encode(w->tokenizer, w->text.data, w->text.size, false, w->ids, w->err))
        return -1;
    size_t n = w->ids->size / sizeof(int32_t) - first;
    const int32_t *ids = (const int32_t *)(void *)w->ids->data + first;
    if (buffer_reserve(w->learn, n, w->err)) return -1;
    char *learn = w->learn->data + w->learn->size;
    const MaskBorder *borders = (const MaskBorder *)(void *)w->borders.data;
    for (size_t i = 0; i < w->borders.size / sizeof *borders; i++) {
        size_t before = 0;
        w->prefix.size = 0;
        if (tokenizer_encode(w->tokenizer, w->text.data, borders[i].offset, false, &w->prefix,
                             w->err))
            return -1;
        const int32_t *prefix = (const int32_t *)(void *)w->prefix.data;
        size_t most = min_size(n, w->prefix.size / sizeof *prefix);
        while (before < most && prefix[before] == ids[before]) before++;
        if (before < n) memset(learn + before, borders[i].learn, n - before);
    }
    w->learn->size += n;
    w->text.size = w->borders.size = 0;
    return 0;
}

// Would the tokenizer split the text here whatever stands before?
static bool cut_before(const ChatTemplate *c, const char *text, size_t n) {
    for (size_t i = 0; i < c->n_cuts; i++)
        if (starts_with(text, n, c->cuts[i])) return true;
    return false;
}

// Adds text to the chunk, or to a new one if a cut is possible here.
static int write_part(TemplateWriter *w, const char *text, size_t n, bool learn) {
    if (w->text.size && cut_before(w->c, text, n) && end_chunk(w)) return -1;
    const MaskBorder *borders = (const MaskBorder *)(void *)w->borders.data;
    size_t n_borders = w->borders.size / sizeof *borders;
    MaskBorder border = {w->text.size, learn};
    if ((!n_borders || borders[n_borders - 1].learn != learn) &&
        buffer_append(&w->borders, &border, sizeof border, w->err))
        return -1;
    return buffer_append(&w->text, text, n, w->err);
}

// Adds a string of the row.
static int write_string(TemplateWriter *w, const char *text, bool learn) {
    for (size_t n; *text; text += n) {
        const char *token = *text == *BOS ? w->c->bos : *text == *EOS ? w->c->eos : NULL;
        n = token ? 1 : strcspn(text, BOS EOS);
        if (write_part(w, token ? token : text, token ? strlen(token) : n, learn)) return -1;
    }
    return 0;
}

static int role_of(const Message *m) {
    for (int role = 0; role < N_ROLES; role++)
        if (strcmp(m->role, role_names[role]) == 0) return role;
    return -1;
}

static int add_body(TemplateWriter *w, const char *text, size_t n) {
    return buffer_append(&w->body, text, n, w->err);
}

// Python's str.strip(): white space and the four separators of ASCII.
static bool is_stripped(uint32_t c) { return unicode_is_space(c) || (c >= 0x1C && c <= 0x1F); }

// Takes them, or newlines alone, off the ends of a text.
static void trim(const char **text, size_t *n, bool newlines, bool left, bool right) {
    uint32_t code;
    for (size_t step; left && *n; *text += step, *n -= step) {
        step = utf8_next(*text, &code);
        if (!(newlines ? code == '\n' : is_stripped(code))) break;
    }
    for (size_t last; right && *n; *n = last) {
        last = utf8_before(*text, *n);
        utf8_next(*text + last, &code);
        if (!(newlines ? code == '\n' : is_stripped(code))) break;
    }
}

// Where `mark` stands in the text for the first time, or for the last; NULL: nowhere.
static const char *find_mark(const char *text, size_t n, const char *mark, bool last) {
    const char *found = NULL;
    for (size_t i = 0; i < n && (last || !found); i++)
        if (starts_with(text + i, n - i, mark)) found = text + i;
    return found;
}

// Qwen3: what is thought is taken out of answers to earlier questions. To the last question, the
// answer that ends the dialogue has a think block, be it empty; so have others that thought.
static int write_answer(TemplateWriter *w, size_t i, const char *text, size_t n) {
    static const char close[] = "</think>", open[] = "<think>";
    const char *end = find_mark(text, n, close, false), *thought = text;
    size_t length = 0;
    if (end) {
        length = (size_t)(end - text);
        trim(&thought, &length, true, false, true);
        const char *start = find_mark(thought, length, open, true);
        if (start) length -= (size_t)(start - thought) + strlen(open);
        if (start) thought = start + strlen(open);
        trim(&thought, &length, true, true, false);
        const char *rest = find_mark(text, n, close, true) + strlen(close);
        n -= (size_t)(rest - text);
        text = rest;
        trim(&text, &n, true, true, false);
    }
    if (i <= w->query || (i + 1 < w->n && !length)) return add_body(w, text, n);
    trim(&thought, &length, true, true, true);
    trim(&text, &n, true, true, false);
    return add_body(w, "<think>\n", 8) || add_body(w, thought, length) ||
           add_body(w, "\n</think>\n\n", 11) || add_body(w, text, n);
}

// The system text inside a user's turn.
static int add_system(TemplateWriter *w) {
    const TurnForm *form = &w->c->turns[ROLE_SYSTEM];
    size_t last = w->c->flags & MERGES ? w->n : 1, start = w->body.size, n = strlen(form->before);
    if (add_body(w, form->before, n)) return -1;
    size_t empty = w->body.size;
    for (size_t i = 0, parts = 0; i < last; i++) {
        const Message *m = &w->messages[i];
        if (role_of(m) != ROLE_SYSTEM) continue;
        if ((parts++ && add_body(w, "\n\n", 2)) || add_body(w, m->content, m->length)) return -1;
    }
    if (w->c->flags & MERGES && w->body.size == empty) { w->body.size = start; return 0; }
    return add_body(w, form->after, strlen(form->after));
}

// Appends a message's text to the body; a second text stands behind the row's string for it.
static int add_content(TemplateWriter *w, size_t i, int role) {
    const Message *m = &w->messages[i];
    const char *input = w->c->row->input;
    if (role == ROLE_ASSISTANT && w->c->flags & THINKS)
        return write_answer(w, i, m->content, m->length);
    if (!input || !m->input) return add_body(w, m->content, m->length);
    return add_body(w, m->content, m->input - 1) || add_body(w, input, strlen(input)) ||
           add_body(w, m->content + m->input, m->length - m->input);
}

// Writes a turn: the loss looks at an answer's text and its end, and at what the mask adds to that.
static int write_turn(TemplateWriter *w, int role, const char *opening, bool skip) {
    const TurnForm *form = &w->c->turns[role];
    const char *text = w->body.data;
    size_t n = w->body.size;
    bool answer = !skip && role == ROLE_ASSISTANT;
    bool turn = (!skip && w->mask == MASK_ALL) || (answer && w->mask == MASK_TURN);
    bool body = turn || answer;
    if (w->c->flags >> role & 1) trim(&text, &n, false, true, true);
    return write_string(w, form->before, turn) || write_string(w, opening, turn) ||
           write_part(w, text, n, body) || write_string(w, form->end, body) ||
           write_string(w, form->after, turn);
}

// The system message that stands in for none.
static int write_default_system(TemplateWriter *w) {
    const TemplateRow *row = w->c->row;
    bool input = w->messages[0].input && row->input_system;
    const char *system = input ? row->input_system : w->c->system;
    w->body.size = 0;
    return add_body(w, system, strlen(system)) ||
           write_turn(w, ROLE_SYSTEM, row->opening ? row->opening : "", false);
}

// Refuses what the template cannot express, and finds the messages that matter to others.
static int survey(TemplateWriter *w) {
    int flags = w->c->flags;
    const char *name = w->c->row->name;
    size_t n = w->n, first_user = n, last_user = n, turn = 0;
    if (!n) return fail(w->err, "expected at least one message, found none");
    w->query = n - 1;
    for (size_t i = 0; i < n; i++) {
        const Message *m = &w->messages[i];
        int role = role_of(m);
        if (role < 0)
            return fail(w->err, "message %zu: role \"%s\" is not supported; expected system, user "
                        "or assistant", i + 1, m->role);
        if (role == ROLE_SYSTEM &&
            (flags & NO_SYSTEM || (flags & SYSTEM_INSIDE && i && !(flags & MERGES))))
            return fail(w->err, "message %zu: the template %s has no place for a system message "
                        "here; put its text into the user's first message", i + 1, name);
        if (role == ROLE_SYSTEM) continue;
        if ((flags & ALTERNATES && role != (turn % 2 ? ROLE_ASSISTANT : ROLE_USER)) ||
            (flags & MERGES && !turn && role != ROLE_USER))
            return fail(w->err, "message %zu: the template %s expects user and assistant by turns, "
                        "the user first; found %s", i + 1, name, m->role);
        turn++;
        if (role == ROLE_ASSISTANT) continue;
        if (first_user == n) first_user = i;
        last_user = i;
        if (!(starts_with(m->content, m->length, "<tool_response>") && m->length >= 16 &&
              memcmp(m->content + m->length - 16, "</tool_response>", 16) == 0))
            w->query = i;
    }
    bool system = role_of(&w->messages[0]) == ROLE_SYSTEM || flags & MERGES;
    bool last = flags & SYSTEM_IN_LAST || (flags & SYSTEM_IF_LAST && last_user == n - 1);
    w->host = !system ? n : flags & SYSTEM_IN_FIRST ? first_user : last ? last_user : n;
    return 0;
}

// Writes message i, and those that are one turn with it; *next is the one after these.
static int write_message(TemplateWriter *w, size_t i, size_t *next) {
    const ChatTemplate *c = w->c;
    const Message *m = w->messages;
    const char *opening = c->row->opening && !i ? c->row->opening : "";
    int role = role_of(&m[i]), other;
    bool skip = m[i].skip, host = i == w->host;
    size_t end = i + 1;
    for (; c->flags & MERGES && end < w->n; end++) {
        other = role_of(&m[end]);
        if (other != role && other != ROLE_SYSTEM) break;
        host = host || end == w->host;
    }
    *next = end;
    w->body.size = 0;
    if (role == ROLE_SYSTEM && c->flags & SYSTEM_INSIDE) { *next = i + 1; return 0; }
    if (role == ROLE_SYSTEM && c->flags & SKIP_EMPTY_SYSTEM && !m[i].length) return 0;
    if (host && add_system(w)) return -1;
    for (size_t k = i; k < end; k++) {
        if (role_of(&m[k]) != role) continue;
        if ((k > i && add_body(w, "\n\n", 2)) || add_content(w, k, role)) return -1;
        skip = skip || m[k].skip;
    }
    if (c->flags & MERGES && role == ROLE_ASSISTANT && !w->body.size)
        return fail(w->err, "message %zu: the template %s has no empty answers", i + 1,
                    c->row->name);
    return write_turn(w, role, role == ROLE_SYSTEM ? opening : "", skip);
}

static int write_messages(TemplateWriter *w, bool ask) {
    const ChatTemplate *c = w->c;
    bool all = w->mask == MASK_ALL;
    if (survey(w) || write_string(w, c->begin, all)) return -1;
    if (c->system && role_of(&w->messages[0]) != ROLE_SYSTEM && write_default_system(w)) return -1;
    for (size_t i = 0; i < w->n;)
        if (write_message(w, i, &i)) return -1;
    return write_string(w, ask ? c->ask : c->tail, !ask && all) || end_chunk(w) ? -1 : 0;
}

// Renders the messages and appends their ids (int32_t) and, parallel to them, one byte each that is
// 1 if the token is to be learnt. `ask` adds the header of the assistant's turn, for generation.
// Control strings inside a message become control tokens, as they do in apply_chat_template.
static int template_apply(const ChatTemplate *c, const Tokenizer *t, const Message *m, size_t n,
                          MaskKind mask, bool ask, Buffer *ids, Buffer *learn, qlora_error *err) {
    const qlora_allocator *a = ids->allocator;
    TemplateWriter w = {.c = c, .tokenizer = t, .messages = m, .n = n, .mask = mask, .ids = ids,
                        .learn = learn, .err = err};
    size_t first = learn->size;
    if (c->refused) return fail(err, "%s", c->refused);
    w.text.allocator = w.borders.allocator = w.prefix.allocator = w.body.allocator = a;
    int bad = write_messages(&w, ask);
    if (!bad && learn->size > first) learn->data[first] = 0;  // nothing predicts the first token
    buffer_free(&w.text);
    buffer_free(&w.borders);
    buffer_free(&w.prefix);
    buffer_free(&w.body);
    return bad ? -1 : 0;
}

// ----------------------------------------------------------------------------- saving a template

// Appends n bytes as a Jinja string literal.
static int jinja_literal(Buffer *b, const char *text, size_t n, qlora_error *err) {
    static const char from[] = "\n\r'\\", to[] = "nr'\\";
    if (buffer_append(b, "'", 1, err)) return -1;
    for (; n; text++, n--) {
        const char *found = *text ? strchr(from, *text) : NULL;
        const char escaped[2] = {'\\', found ? to[found - from] : 0};
        if (buffer_append(b, found ? escaped : text, found ? 2 : 1, err)) return -1;
    }
    return buffer_append(b, "'", 1, err);
}

// Appends a string of the row: literals and the names of tokens.
static int jinja_string(Buffer *b, const char *text, qlora_error *err) {
    size_t n;
    do {
        const char *token = *text == *BOS ? "bos_token" : *text == *EOS ? "eos_token" : NULL;
        n = token ? 1 : strcspn(text, BOS EOS);
        if (token ? buffer_printf(b, err, "%s", token) : jinja_literal(b, text, n, err)) return -1;
        text += n;
        if (*text && buffer_append(b, " + ", 3, err)) return -1;
    } while (*text);
    return 0;
}

// Appends a format in which each %s is a string of the row; at most four.
static int jinja(Buffer *b, qlora_error *err, const char *format, const char *const *strings) {
    for (const char *hole; (hole = strstr(format, "%s")) != NULL; format = hole + 2)
        if (buffer_append(b, format, (size_t)(hole - format), err) ||
            jinja_string(b, *strings++, err))
            return -1;
    return buffer_append(b, format, strlen(format), err);
}

#define IS(role) "message['role'] == '" role "'"
#define OTHER(index, outside) "loop." outside " or turns[loop.index0 " index "]['role'] != "      \
    "message['role']"
#define SYSTEM_FIRST "messages[0]['role'] == 'system'"
#define TAKE_SYSTEM "{% set system = messages[0]['content'] if " SYSTEM_FIRST " else '' %}"        \
    "{% set turns = messages[1:] if " SYSTEM_FIRST " else messages %}"

// What is worked out before the loop over the messages.
static int jinja_prelude(const ChatTemplate *c, Buffer *b, qlora_error *err) {
    const TurnForm *form = &c->turns[ROLE_SYSTEM];
    const char *opening = c->row->opening, *text = opening ? opening : c->system;
    const char *const strings[] = {form->before, text, form->end, form->after};
    static const char merges[] =
        "{% set system = messages | selectattr('role', 'equalto', 'system') | "
        "map(attribute='content') | join('\\n\\n') %}"
        "{% set turns = messages | rejectattr('role', 'equalto', 'system') | list %}"
        "{% set ns = namespace(last=0) %}{% for message in turns %}{% if " IS("user")
        " and (" OTHER("- 1", "first") ") %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}";
    static const char thinks[] =
        "{% set ns = namespace(query=messages | length - 1) %}{% for message in messages %}"
        "{% if " IS("user") " and not (message['content'].startswith('<tool_response>') and "
        "message['content'].endswith('</tool_response>')) %}{% set ns.query = loop.index0 %}"
        "{% endif %}{% endfor %}";
    return jinja(b, err,
                 c->flags & MERGES ? merges
                 : c->flags & SYSTEM_INSIDE ? TAKE_SYSTEM
                 : c->flags & THINKS ? thinks
                 : opening ? TAKE_SYSTEM "{{ %s + %s + system | trim + %s + %s }}"
                 : c->system ? "{% if not " SYSTEM_FIRST " %}{{ %s + %s + %s + %s }}{% endif %}"
                             : "", strings);
}

// What is worked out for each message: whether it may stand there, and `content`.
static int jinja_content(const ChatTemplate *c, Buffer *b, qlora_error *err) {
    const TurnForm *form = &c->turns[ROLE_SYSTEM];
    const char *const strings[] = {form->before, form->after};
    static const char alternates[] = "{% if (" IS("user") ") != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate: user, assistant, user, ...') }}{% endif %}";
    static const char merges[] =
        "{% if loop.first and not " IS("user") " or not message['content'] and "
        IS("assistant") " and (" OTHER("- 1", "first") ") and (" OTHER("+ 1", "last") ") %}"
        "{{ raise_exception('expected a user message first, and no empty answers') }}{% endif %}";
    static const char thinks[] =
        "{% if " IS("assistant") " %}{% set thought = '' %}{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]"
        ".lstrip('\\n') %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}"
        "{% endif %}{% if loop.index0 > ns.query and (loop.last or thought) %}"
        "{% set content = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + "
        "content.lstrip('\\n') %}{% endif %}{% endif %}";
    static const char inside[] = "{% set content = %s + system + %s + content %}{% endif %}";
    const char *has = c->flags & MERGES ? "system" : SYSTEM_FIRST;
    const char *place = c->flags & SYSTEM_IN_FIRST  ? "loop.first"
                        : c->flags & SYSTEM_IN_LAST ? "loop.index0 == ns.last"
                                                    : "loop.last and " IS("user");
    if ((c->flags & ALTERNATES && jinja(b, err, alternates, NULL)) ||
        (c->flags & MERGES && jinja(b, err, merges, NULL)))
        return -1;
    if (!(c->flags & (THINKS | SYSTEM_INSIDE))) return 0;
    return jinja(b, err, "{% set content = message['content'] %}", NULL) ||
           (c->flags & THINKS ? jinja(b, err, thinks, NULL)
                              : buffer_printf(b, err, "{%% if %s and %s %%}", place, has) ||
                                    jinja(b, err, inside, strings));
}

// The turns of one role.
static int jinja_turn(const ChatTemplate *c, int role, Buffer *b, qlora_error *err) {
    const TurnForm *form = &c->turns[role];
    const char *const strings[] = {form->before, form->end, form->after};
    bool some = role == ROLE_SYSTEM && c->flags & SKIP_EMPTY_SYSTEM;
    const char *content = c->flags & (THINKS | SYSTEM_INSIDE) ? "content" : "message['content']";
    const char *trimmed = c->flags >> role & 1 ? " | trim" : "";
    if (buffer_printf(b, err, "{%% %s message['role'] == '%s'%s %%}", role ? "elif" : "if",
                      role_names[role], some ? " and message['content']" : ""))
        return -1;
    if (role == ROLE_SYSTEM && c->flags & NO_SYSTEM)
        return jinja(b, err, "{{ raise_exception('no system messages') }}", NULL);
    if (c->flags & MERGES)
        return jinja(b, err, "{{ %s if " OTHER("- 1", "first") " else '\\n\\n' }}{{ content }}"
                     "{% if " OTHER("+ 1", "last") " %}{{ %s + %s }}{% endif %}", strings);
    return jinja(b, err, "{{ %s + ", strings) || buffer_printf(b, err, "%s%s", content, trimmed) ||
           jinja(b, err, " + %s + %s }}", strings + 1);
}

// The template as the Jinja program that other tools read: what was trained with is what is served.
static int template_jinja(const ChatTemplate *c, Buffer *b, qlora_error *err) {
    const char *const ends[] = {c->ask, c->tail};
    bool turns = c->row->opening || c->flags & SYSTEM_INSIDE;
    if (c->prompt && (jinja(b, err, "{%- set qlora_prompt = ", NULL) ||
                      jinja_literal(b, c->prompt, strlen(c->prompt), err) ||
                      jinja(b, err, " -%}", NULL)))
        return -1;
    if ((*c->begin && jinja(b, err, "{{ bos_token }}", NULL)) || jinja_prelude(c, b, err) ||
        buffer_printf(b, err, "{%% for message in %s %%}", turns ? "turns" : "messages") ||
        jinja_content(c, b, err))
        return -1;
    for (int role = 0; role < N_ROLES; role++)
        if (jinja_turn(c, role, b, err)) return -1;
    return jinja(b, err, "{% endif %}{% endfor %}", NULL) ||
           jinja(b, err, c->flags & ASKS_ALWAYS ? "{{ %s }}"
                         : *c->tail ? "{% if add_generation_prompt %}{{ %s }}{% else %}{{ %s }}"
                                      "{% endif %}"
                                    : "{% if add_generation_prompt %}{{ %s }}{% endif %}", ends);
}

// Makes `c` the prompt template that a program written above holds, if that is what it is.
static int find_saved_prompt(ChatTemplate *c, const char *text, const Tokenizer *t, Region *region,
                             qlora_error *err) {
    static const char start[] = "{%- set qlora_prompt = ";
    Buffer e = {.allocator = region->allocator}, ours = e;
    size_t n = strlen(text);
    if (!starts_with(text, n, start)) return 0;
    JinjaReader r = {.end = text + n, .e = &e, .err = err};
    const char *literal = text + strlen(start);
    bool found = *literal == '\'' && read_jinja_string(&r, literal);
    int bad = r.failed ? -1 : 0;
    if (found) {                                              // what stands between the quotes
        e.data[1 + unescape(e.data + 1, e.size - 2)] = 0;
        bad = prompt_template(c, e.data + 1, t, region, err);
    }
    for (int bos = 0; bos < 2 && found && !bad; bos++) {
        c->begin = bos ? BOS : "";
        ours.size = 0;
        bad = template_jinja(c, &ours, err) || buffer_append(&ours, "", 1, err);
        if (!bad && strcmp(ours.data, text) == 0) break;
        if (bos) c->row = NULL;
    }
    buffer_free(&e);
    buffer_free(&ours);
    return bad;
}

// Writes chat_template.jinja beside a model whose own template is not what it was trained with.
static int write_chat_template(const ChatTemplate *c, const char *directory, Region *region,
                               qlora_error *err) {
    Buffer b = {.allocator = region->allocator};
    if (c->own) return 0;
    const char *path = path_join(region, directory, "chat_template.jinja", err);
    int bad = !path || template_jinja(c, &b, err) || write_file(path, b.data, b.size, err);
    buffer_free(&b);
    return bad ? -1 : 0;
}

// ------------------------------------------------------------------------------- adding tokens
//
// New tokens are looked for in the text like the tokenizer's own added ones. Their ids are the next
// free ones, as in transformers, and must be rows that the model's embedding has: Qwen's and Phi's
// have spare ones. Saved, they are entered in every file that must know, which is else written as
// it was read, in the layout of Python's json.dumps(indent=2).

// Adds the tokens of a list, separated by commas, unless they are there. Names like <this> are
// special: they are not shown in what the model says.
static int tokenizer_add(Tokenizer *t, const char *list, size_t vocab_size, qlora_error *err) {
    Vocabulary *v = &t->vocabulary;
    Loader l = {.t = t, .directory = "--add-tokens", .file = "--add-tokens", .err = err};
    size_t room = t->added_raw.n + strlen(list) / 2 + 1, next = 0, n;
    AddedToken *added = region_alloc(&t->region, room, sizeof *added, err);
    if (!added) return -1;
    if (t->added_raw.n) memcpy(added, t->added_raw.tokens, t->added_raw.n * sizeof *added);
    t->added_raw.tokens = added;
    for (size_t id = 0; id < v->n_ids; id++) next += v->tokens[id].text && !v->tokens[id].outside;
    for (size_t id = next; id < v->n_ids; id++)
        if (v->tokens[id].text && v->tokens[id].added) next = id + 1;
    for (; *list; list += n + (list[n] == ',')) {
        n = strcspn(list, ",");
        int32_t known = vocabulary_id(v, list, n);
        size_t id = known >= 0 ? (size_t)known : next;
        if (!n || (known >= 0 && v->tokens[known].added)) continue;
        if (id >= vocab_size)
            return fail(err, "--add-tokens: %.*s would be token %zu, and the model has rows for "
                        "%zu only; rows for new tokens cannot be trained yet: choose a --template "
                        "whose strings are tokens of this model, or text (zephyr, alpaca)",
                        (int)min_size(n, 80), list, id, vocab_size);
        if (known < 0) { vocabulary_add(&l, list, n, id); next++; }
        if (l.failed) return -1;
        v->tokens[id].outside = known < 0;
        v->tokens[id].fresh = true;
        add_token(&l, (int32_t)id, n > 2 && *list == '<' && list[n - 1] == '>', false);
    }
    added_sort(&l, &t->added_raw);
    return l.failed ? -1 : 0;
}

// Puts a value at the end of a list that was read; `key` is its name if the list is an object.
// Returns the value, or NULL, also if there is no list, when memory is short.
static const Json *json_add(const Json *list, const char *key, JsonKind kind, const char *text,
                            Region *region, qlora_error *err) {
    Json *value = list ? region_alloc(region, 1, sizeof *value, err) : NULL;
    if (!value) return NULL;
    *value = (Json){.kind = kind, .text = text, .length = strlen(text), .key = key,
                    .key_length = key ? strlen(key) : 0};
    Json **last = &((Json *)(uintptr_t)list)->first;          // it lies in a region of ours
    while (*last) last = &(*last)->next;
    return *last = value;
}

// Where tokens are listed: in which member of which file ("": in the file itself), and how.
typedef struct {
    const char *file, *list;
    enum { AS_ENTRY, AS_MEMBER, AS_ID, AS_NAME } as;
} TokenList;

static const TokenList token_lists[] = {
    {"tokenizer.json", "added_tokens", AS_ENTRY},                        // [{"id": 7, ...}]
    {"tokenizer_config.json", "added_tokens_decoder", AS_MEMBER},        // {"7": {...}}
    {"tokenizer_config.json", "additional_special_tokens", AS_NAME},     // ["<a>"]
    {"added_tokens.json", "", AS_ID},                                    // {"<a>": 7}
    {"special_tokens_map.json", "additional_special_tokens", AS_NAME}};

// Enters one token in a list.
static int list_token(const Json *list, const Token *token, size_t id, const TokenList *form,
                      Region *region, qlora_error *err) {
    static const char *const flags[] = {"lstrip", "normalized", "rstrip", "single_word", "special"};
    char digits[24];
    const char *text = token->text, *key = NULL;
    const char *number = region_text(region, digits,
                                     (size_t)snprintf(digits, sizeof digits, "%zu", id), err);
    if (!number) return -1;
    if (form->as == AS_ID) return json_add(list, text, JSON_NUMBER, number, region, err) ? 0 : -1;
    if (form->as == AS_NAME) return json_add(list, NULL, JSON_STRING, text, region, err) ? 0 : -1;
    if (form->as == AS_MEMBER) key = number;
    const Json *entry = json_add(list, key, JSON_OBJECT, "", region, err);
    bool good = entry && (key || json_add(entry, "id", JSON_NUMBER, number, region, err)) &&
                json_add(entry, "content", JSON_STRING, text, region, err);
    for (size_t i = 0; i < 5 && good; i++)
        good = json_add(entry, flags[i], i == 4 && token->special ? JSON_TRUE : JSON_FALSE, "",
                        region, err);
    return good ? 0 : -1;
}

// Enters the new tokens in one list, if it is there. *known: their ids stand in a list before it;
// otherwise added_tokens.json is made.
static int write_token_list(const Tokenizer *t, const TokenList *form, const char *directory,
                            bool *known, Region *region, qlora_error *err) {
    const Vocabulary *v = &t->vocabulary;
    Buffer text = {.allocator = region->allocator};
    bool exists, create = form->as == AS_ID && !*known;
    const char *path = path_join(region, directory, form->file, err);
    const Json *json = read_json(directory, form->file, MAX_TOKENIZER_FILE, region, &exists, err);
    if (path && !exists && create) json = json_parse("{}", 2, path, 1, region, err);
    if (!path || (!json && (exists || create))) return -1;
    const Json *list = *form->list ? json_get(json, form->list) : json;
    if (json && !list && strcmp(form->file, "special_tokens_map.json") == 0) {
        list = json_add(json, form->list, JSON_ARRAY, "", region, err);
        if (!list) return -1;
    }
    if (!json_is(list, JSON_OBJECT) && !json_is(list, JSON_ARRAY)) return 0;
    *known |= form->as <= AS_MEMBER;
    int bad = 0;
    for (size_t id = 0; id < v->n_ids && !bad; id++)
        if (v->tokens[id].fresh && (form->as != AS_NAME || v->tokens[id].special))
            bad = list_token(list, &v->tokens[id], id, form, region, err);
    if (!bad)
        bad = json_write(&text, json, 0, err) || buffer_append(&text, "\n", 1, err) ||
              write_file(path, text.data, text.size, err);
    buffer_free(&text);
    return bad ? -1 : 0;
}

// Enters the tokens that were added in the files of a directory that a tokenizer was copied to.
static int write_added_tokens(const Tokenizer *t, const char *directory, Region *region,
                              qlora_error *err) {
    bool fresh = false, known = false;
    int bad = 0;
    for (size_t id = 0; id < t->vocabulary.n_ids; id++) fresh |= t->vocabulary.tokens[id].fresh;
    for (size_t i = 0; i < sizeof token_lists / sizeof *token_lists && fresh && !bad; i++)
        bad = write_token_list(t, &token_lists[i], directory, &known, region, err);
    return bad;
}
// =================================================================================================
//  12. Datasets
//
//  From files of records to token ids with a mask. A file is JSONL or one JSON array, which its
//  first character tells. It is first cut into records; then each is parsed, templated and
//  tokenised on its own, many at a time, and what that took is released at once: besides the text
//  of one file only ids, mask and one Sample a record stay. Errors name file, line and column.
//
//  What can go wrong in silence (an end token that is never learnt, answers cut in half, records
//  left out) is counted on the way; one table then says which counts deserve a warning and which
//  stop a training. `train` and `inspect` both read it.
// =================================================================================================

// A sample is ids[first .. first+length-1]; it came from this line of the file of that number.
typedef struct { size_t first, length, supervised, line; uint32_t file; } Sample;

typedef enum { TRUNCATE_DROP, TRUNCATE_KEEP_START, TRUNCATE_KEEP_END } Truncate;
static const char *const truncate_names[] = {"drop", "keep-start", "keep-end"};

// --mask: content, turn and all are chapter 11's; last is content of the last answer alone.
static const struct { const char *name; MaskKind kind; bool last; } mask_rows[] = {
    {"content", MASK_CONTENT, false}, {"turn", MASK_TURN, false},
    {"last", MASK_CONTENT, true}, {"all", MASK_ALL, false}};
enum { N_MASK_ROWS = sizeof mask_rows / sizeof *mask_rows };

// A format is recognised by its keys; the first row that fits counts, other keys are ignored. The
// words of the user are the text of `user`, and that of `more` where there is one.
typedef struct {
    const char *name;
    const char *list;                          // a list of turns; or
    const char *user, *more, *assistant;       // one exchange in columns; or
    const char *text;                          // plain text, to be learnt as it stands;
    const char *system, *history;              // and what may stand before the exchange
} RecordFormat;

static const RecordFormat record_formats[] = {
    // OpenAI: {"messages": [{"role": "user", "content": "..."}, ...]}, or plain strings by turns
    {"messages", .list = "messages", .system = "system"},
    // {"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}
    {"ShareGPT", .list = "conversations", .system = "system"},
    // with the two further columns that LLaMA-Factory knows
    {"Alpaca", .user = "instruction", .more = "input", .assistant = "output", .system = "system",
     .history = "history"},
    {"Dolly", .user = "instruction", .more = "context", .assistant = "response"},
    {"prompt and completion", .user = "prompt", .assistant = "completion"},
    {"input and output", .user = "input", .assistant = "output", .system = "system"},
    {"raw text", .text = "text"},
};
enum { N_RECORD_FORMATS = sizeof record_formats / sizeof *record_formats };

typedef struct {
    size_t max_length;              // of a sample, in tokens
    Truncate truncate;              // what becomes of longer ones
    MaskKind mask;
    bool mask_last;                 // only the last answer is learnt
    RecordFormat fields;            // .user not NULL: the columns, named by --field-*
    const char *system;             // the column of the system text, by --field-system, or NULL
    size_t take_from, take_to;      // records [from, to) of all files together
    size_t max_samples;             // no more than this many
    bool skip_bad_lines;            // count malformed records instead of stopping at the first
    bool inspecting;                // so that the counts of everything can be shown
    bool keep_all;                  // records with nothing to learn are samples too: to be shown
    const qlora_allocator *allocator;          // called by several threads at once
    Pool *pool;
} DatasetOptions;

// What is counted, and where it was met first.
typedef struct { size_t n, line; uint32_t file; } Tally;
enum { TALLY_BAD, TALLY_UNSUPERVISED, TALLY_TOO_LONG, TALLY_CUT, TALLY_CUT_ANSWER, TALLY_NO_END,
       TALLY_DOUBLED_END, TALLY_DOUBLED_START, TALLY_CONTROL, TALLY_EMPTY, N_TALLIES };

typedef struct {
    int32_t *ids;                   // (tokens)
    uint8_t *learn;                 // (tokens) 1: the loss looks at the prediction of this token
    Sample *samples;                // (n) in the order of the files
    size_t n, tokens, supervised;
    size_t ends;                    // supervised end tokens
    size_t records;                 // looked at; n + too long + unsupervised + bad
    size_t seen;                    // in the files read, looked at or not
    size_t formats[N_RECORD_FORMATS + 1];      // records of each format; the last: by --field-*
    size_t *lengths;                // (n_lengths) tokens of each good record before truncation
    size_t n_lengths, longest;
    Tally tally[N_TALLIES];
    qlora_error first_bad;          // what was wrong with the first malformed record
    const char *const *paths;       // of the files, the caller's
    Buffer id_buffer, learn_buffer, sample_buffer, length_buffer;     // what these point into
} Dataset;

static void count_one(Tally *tally, const Sample *s) {
    if (!tally->n++) { tally->line = s->line; tally->file = s->file; }
}

// ----------------------------------------------------------------------- from a record to messages

// Where the messages of a record go. Their texts lie in the region.
typedef struct { Buffer *messages; Region *region; qlora_error *err; } RecordReader;

// The white space of JSON, which NUL and others are not.
static size_t skip_space(const char *text, size_t at, size_t end) {
    while (at < end && memchr(" \t\r\n", text[at], 4)) at++;
    return at;
}

static bool blank(const char *text, size_t n) {
    return skip_space(text, 0, n) == n;
}

// What the models' own templates would write elsewhere, or train in another way. To leave it out in
// silence would train another task than the data describes, so it is refused unless empty.
static int refuse_keys(const Json *object, qlora_error *err) {
    static const char tool[] = "tool calls", media[] = "images, video and sound",
                      preference[] = "preference data (DPO, KTO)";
    static const struct { const char *key, *what; } rows[] = {
        {"tools", tool}, {"functions", tool}, {"tool_calls", tool}, {"function_call", tool},
        {"images", media}, {"videos", media}, {"audios", media}, {"chosen", preference},
        {"rejected", preference}, {"kto_tag", preference}, {"label", preference}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const Json *value = json_get(object, rows[i].key);
        if (!value) continue;
        bool full = value->count > 0;
        if (rows[i].what == preference)
            full |= value->kind == JSON_TRUE || value->kind == JSON_FALSE;
        if (value->kind == JSON_STRING && strcmp(rows[i].key, "label"))       // in words: a class
            full = strspn(value->text, "[]{} \n") < value->length;     // "[]": LLaMA-Factory's none
        if (full) return fail(err, "\"%s\": %s are not supported", rows[i].key, rows[i].what);
    }
    return 0;
}

// The keys of an object as text, for messages.
static void list_keys(char out[400], const Json *object) {
    size_t n = 0;
    out[0] = 0;
    for (const Json *m = object->first; m && n < 360; m = m->next, n = strlen(out))
        snprintf(out + n, 400 - n, "%s\"%.100s\"", n ? ", " : "", m->key);
    if (!n) snprintf(out, 400, "(none)");
}

// The text of one of the parts that OpenAI makes a text of; NULL with a message if it is no text.
static const Json *part_text(const Json *part, const char *key, qlora_error *err) {
    const Json *text = json_get(part, json_get(part, "text") ? "text" : "value");
    const char *type = json_get_text(part, "type");
    if (json_is(text, JSON_STRING) && type && strcmp(type, "text") == 0) return text;
    fail(err, "\"%s\": expected a string or parts of type \"text\", found %s", key,
         type ? type : "a part without \"type\"");
    return NULL;
}

// The text of a member: a string or a list of parts; empty if it is not there and need not be.
static int get_text(RecordReader *r, Message *out, const Json *object, const char *key,
                    bool needed) {
    const Json *value = key ? json_get(object, key) : NULL, *text;
    char keys[400], *joined;
    size_t room = 1;
    out->content = "";
    out->length = 0;
    if (!needed && (!value || value->kind == JSON_NULL)) return 0;
    if (!value) {
        list_keys(keys, object);
        return fail(r->err, "expected \"%s\", found the keys %s", key, keys);
    }
    if (value->kind == JSON_STRING) {
        out->content = value->text;
        out->length = value->length;
        return 0;
    }
    if (value->kind != JSON_ARRAY)
        return fail(r->err, "\"%s\": expected a string, found %s", key,
                    json_kind_name(value->kind));
    for (const Json *part = value->first; part; part = part->next) {
        if (!(text = part_text(part, key, r->err))) return -1;
        room += text->length;
    }
    if (!(joined = region_alloc(r->region, room, 1, r->err))) return -1;
    out->content = joined;
    for (const Json *part = value->first; part; part = part->next) {
        text = part_text(part, key, r->err);
        memcpy(joined + out->length, text->text, text->length);
        out->length += text->length;
    }
    return 0;
}

// Appends the text of a member as a message; one that need not be there only if it says something.
static int push_text(RecordReader *r, int role, const Json *object, const char *key, bool needed) {
    Message m = {.role = role_names[role]};
    if (get_text(r, &m, object, key, needed)) return -1;
    return needed || m.length ? buffer_append(r->messages, &m, sizeof m, r->err) : 0;
}

// "train": false, or OpenAI's "weight": 0 (others say loss_weight): this message is not learnt.
static int get_weight(Message *m, const Json *turn, qlora_error *err) {
    static const char *const keys[] = {"train", "weight", "loss_weight"};
    for (size_t i = 0; i < 3; i++) {
        const Json *value = json_get(turn, keys[i]);
        double weight;
        if (!value || value->kind == JSON_NULL) continue;
        if (i == 0) weight = value->kind == JSON_TRUE ? 1 : value->kind == JSON_FALSE ? 0 : -1;
        else if (!json_to_double(value, &weight)) weight = -1;
        if (weight != 0 && weight != 1)
            return fail(err, "\"%s\": expected %s, found %.40s", keys[i],
                        i ? "0 or 1" : "true or false",
                        value->text ? value->text : json_kind_name(value->kind));
        m->skip |= weight == 0;
    }
    return 0;
}

// {"role", "content"} or {"from", "value"}; roles by any of the names in use.
static int read_turn(RecordReader *r, Message *m, const Json *turn) {
    static const struct { const char *name; int role; } names[] = {
        {"user", ROLE_USER}, {"human", ROLE_USER}, {"assistant", ROLE_ASSISTANT},
        {"gpt", ROLE_ASSISTANT}, {"model", ROLE_ASSISTANT}, {"system", ROLE_SYSTEM},
        {"tool", N_ROLES}, {"function", N_ROLES}, {"function_call", N_ROLES},
        {"observation", N_ROLES}};              // of tools
    enum { N_NAMES = sizeof names / sizeof *names };
    bool from = !json_get(turn, "role") && json_get(turn, "from");
    const char *given = json_get_text(turn, from ? "from" : "role");
    size_t i = 0;
    if (!given) {
        char keys[400];
        list_keys(keys, turn);
        return fail(r->err, "expected \"role\" and \"content\", or \"from\" and \"value\", found "
                    "the keys %s", keys);
    }
    while (i < N_NAMES && strcmp(given, names[i].name)) i++;
    if (i == N_NAMES)
        return fail(r->err, "role \"%.60s\" is not supported; expected system, user (human) or "
                    "assistant (gpt)", given);
    if (names[i].role == N_ROLES)
        return fail(r->err, "role \"%s\": tool calls are not supported", given);
    m->role = role_names[names[i].role];
    return refuse_keys(turn, r->err) || get_weight(m, turn, r->err) ||
           get_text(r, m, turn, from ? "value" : "content", true) ? -1 : 0;
}

// Turns are objects, or plain strings that alternate between user and assistant.
static int read_list(RecordReader *r, const RecordFormat *format, const Json *record) {
    const Json *list = json_get(record, format->list);
    size_t number = 0;
    if (list->kind != JSON_ARRAY)
        return fail(r->err, "\"%s\": expected an array, found %s", format->list,
                    json_kind_name(list->kind));
    if (push_text(r, ROLE_SYSTEM, record, format->system, false)) return -1;
    for (const Json *turn = list->first; turn; turn = turn->next) {
        Message m = {role_names[number++ % 2 ? ROLE_ASSISTANT : ROLE_USER], turn->text,
                     turn->length, false, 0};
        qlora_error inner = {{0}};
        RecordReader reader = {r->messages, r->region, &inner};
        if (turn->kind == JSON_OBJECT && read_turn(&reader, &m, turn))
            return fail(r->err, "message %zu: %s", number, inner.text);
        if (turn->kind != JSON_OBJECT && turn->kind != JSON_STRING)
            return fail(r->err, "message %zu: expected an object or a string, found %s", number,
                        json_kind_name(turn->kind));
        if (buffer_append(r->messages, &m, sizeof m, r->err)) return -1;
    }
    return 0;
}

// Earlier exchanges: [["question", "answer"], ...].
static int read_history(RecordReader *r, const Json *history) {
    bool ok = !history || history->kind == JSON_ARRAY || history->kind == JSON_NULL;
    for (const Json *pair = history ? history->first : NULL; pair && ok; pair = pair->next) {
        int role = ROLE_USER;
        ok = pair->kind == JSON_ARRAY && pair->count == 2;
        for (const Json *text = pair->first; text && ok; text = text->next, role = ROLE_ASSISTANT) {
            Message m = {role_names[role], text->text, text->length, false, 0};
            ok = text->kind == JSON_STRING;
            if (ok && buffer_append(r->messages, &m, sizeof m, r->err)) return -1;
        }
    }
    return ok ? 0 : fail(r->err, "\"history\": expected pairs [user, assistant] of strings");
}

// Instruction and input make one user's message, with a newline between where both say something.
static int read_columns(RecordReader *r, const RecordFormat *format, const Json *record) {
    Message user = {.role = role_names[ROLE_USER]}, more = user;
    if (get_text(r, &user, record, format->user, true) ||
        get_text(r, &more, record, format->more, false))
        return -1;
    char *joined = region_alloc(r->region, user.length + more.length + 1, 1, r->err);
    if (!joined) return -1;
    memcpy(joined, user.content, user.length);
    if (user.length && more.length) {
        joined[user.length++] = '\n';
        user.input = user.length;
    }
    memcpy(joined + user.length, more.content, more.length);
    user.content = joined;
    user.length += more.length;
    return push_text(r, ROLE_SYSTEM, record, format->system, false) ||
           (format->history && read_history(r, json_get(record, format->history))) ||
           buffer_append(r->messages, &user, sizeof user, r->err) ||
           push_text(r, ROLE_ASSISTANT, record, format->assistant, true) ? -1 : 0;
}

// The first key with a text whose name sounds like one of the words, or the n-th with a text.
static const char *guess_column(const Json *record, const char *const words[4], size_t n) {
    const char *other = NULL;
    for (const Json *m = record->first; m; m = m->next) {
        if (m->kind != JSON_STRING) continue;
        for (size_t i = 0; i < 4; i++)
            if (strstr(m->key, words[i])) return m->key;
        if (n-- == 0) other = m->key;
    }
    return other;
}

// Fails with the keys that were found, the formats that there are, and options to try.
static int unknown_format(const Json *record, qlora_error *err) {
    // Without their first letters, for it may be a capital.
    static const char *const asking[] = {"uestion", "uery", "rompt", "nput"};
    static const char *const answering[] = {"nswer", "esponse", "utput", "ompletion"};
    const char *user = guess_column(record, asking, 0);
    const char *assistant = guess_column(record, answering, 1);
    char keys[400], hint[300] = "";
    list_keys(keys, record);
    if (user && assistant && strcmp(user, assistant))
        snprintf(hint, sizeof hint, "name the columns, perhaps --field-user %.80s "
                 "--field-assistant %.80s; ", user, assistant);
    return fail(err, "no known format; found the keys %s; %sknown are \"messages\", "
                "\"conversations\", \"instruction\" with \"output\" or \"response\", \"prompt\" "
                "with \"completion\", \"input\" with \"output\", \"text\"", keys, hint);
}

// Reads the messages of a record and says in which format it was. Raw text is one message without
// a role.
static int read_record(RecordReader *r, size_t *format, const Json *record,
                       const DatasetOptions *o) {
    RecordFormat f = o->fields;
    size_t i = N_RECORD_FORMATS;
    if (record->kind != JSON_OBJECT)
        return fail(r->err, "expected an object, found %s", json_kind_name(record->kind));
    if (!f.user)
        for (i = 0; i < N_RECORD_FORMATS; i++) {
            f = record_formats[i];
            const char *first = f.list ? f.list : f.text ? f.text : f.user;
            if (json_get(record, first) && (!f.assistant || json_get(record, f.assistant))) break;
        }
    *format = i;
    if ((i == N_RECORD_FORMATS || !f.text) && refuse_keys(record, r->err)) return -1;
    if (i == N_RECORD_FORMATS && !o->fields.user) return unknown_format(record, r->err);
    if (o->system) f.system = o->system;
    if (f.list) return read_list(r, &f, record);
    if (f.user) return read_columns(r, &f, record);
    Message m = {.role = NULL};
    return get_text(r, &m, record, f.text, true) ||
           buffer_append(r->messages, &m, sizeof m, r->err) ? -1 : 0;
}

// ------------------------------------------------------------------------- from a file to records

// Where a record's text lies; line_start is where the line begins on which the record begins.
typedef struct { size_t start, end, line_start, line; } RecordPlace;

// Moves the start, counting lines on the way.
static void move_on(RecordPlace *place, const char *text, size_t to) {
    for (; place->start < to; place->start++)
        if (text[place->start] == '\n') { place->line++; place->line_start = place->start + 1; }
}

// Ends the record at the separator at `end`, and goes on behind that. A blank line is no record; a
// blank array element is one, so that the parser can object to it.
static int add_record(Buffer *records, const char *text, RecordPlace *place, size_t end,
                      bool may_be_blank, qlora_error *err) {
    move_on(place, text, skip_space(text, place->start, end));
    place->end = end;
    if ((place->start < end || !may_be_blank) &&
        buffer_append(records, place, sizeof *place, err))
        return -1;
    move_on(place, text, end + 1);                    // at the end of the file this is its NUL
    return 0;
}

// Fills `records` with the places of all records of the text: its lines, or what stands between the
// commas of an array; what is inside a record is for the parser to judge. *wrong is where an array
// itself is not well-formed, or NULL. It is reported after the records' own errors, for one of
// these may be the cause.
static int split_file(Buffer *records, const char *text, size_t n, bool *array, const char **wrong,
                      qlora_error *err) {
    size_t bom = starts_with(text, n, "\xEF\xBB\xBF") ? 3 : 0, i = skip_space(text, bom, n);
    size_t depth = *array = i < n && text[i] == '[';
    RecordPlace place = {.start = bom, .line_start = bom, .line = 1};
    bool string = false;
    if (*array) move_on(&place, text, ++i);
    for (; i < n && (depth || !*array); i++) {
        char c = text[i];
        bool ends = c == '\n', may_be_blank = true;
        if (*array) {
            if (c == '"') string = !string;
            if (string && c == '\\') i++;
            if (string) continue;
            depth = depth + (c == '[' || c == '{') - (c == ']' || c == '}');
            ends = !depth || (depth == 1 && c == ',');
            may_be_blank = !depth && !records->size;
        }
        if (ends && add_record(records, text, &place, i, may_be_blank, err)) return -1;
    }
    if ((depth || !*array) && add_record(records, text, &place, n, true, err)) return -1;
    i = skip_space(text, i, n);
    *wrong = !*array ? NULL : depth ? text + n : i < n ? text + i : NULL;
    return 0;
}

// ------------------------------------------------------------------------- from records to samples

// What became of a record: ids (int32_t) and mask (bytes), or what is wrong with it.
typedef struct {
    Buffer ids, learn;
    size_t format;
    bool empty, control;            // an answer is blank; a text holds a control token
    qlora_error err;
    bool bad, out_of_memory;
} EncodedRecord;

typedef struct {
    const char *path, *text;        // the file
    uint32_t file;                  // its number
    bool array;
    const RecordPlace *records;     // of this batch
    EncodedRecord *encoded;         // of this batch, used again by the next
    const ChatTemplate *chat;
    const Tokenizer *tokenizer;
    const DatasetOptions *options;
} EncodeJob;

// Raw text: with the tokens that the tokenizer puts before a text and the end token, each only if
// the text does not bring it along. All of it is learnt.
static int encode_plain(const Tokenizer *t, const Message *m, EncodedRecord *out,
                        qlora_error *err) {
    size_t prefix = t->n_prefix * sizeof *t->prefix;
    if (buffer_append(&out->ids, t->prefix, prefix, err) ||
        tokenizer_encode(t, m->content, m->length, false, &out->ids, err) ||
        buffer_reserve(&out->ids, sizeof(int32_t), err))
        return -1;
    int32_t *ids = (int32_t *)(void *)out->ids.data;
    size_t n = out->ids.size / sizeof *ids, own = t->n_prefix;
    if (own && n > own && ids[own] == t->bos_id && ids[own - 1] == t->bos_id) {
        n--;
        memmove(ids + own, ids + own + 1, (n - own) * sizeof *ids);
    }
    if (t->eos_id >= 0 && (!n || ids[n - 1] != t->eos_id)) ids[n++] = t->eos_id;
    out->ids.size = n * sizeof *ids;
    out->empty |= blank(m->content, m->length);
    if (buffer_reserve(&out->learn, n + 1, err)) return -1;
    memset(out->learn.data, 1, n);
    out->learn.data[0] = 0;                           // nothing predicts the first token
    out->learn.size = n;
    return 0;
}

// Does the text hold what the tokenizer would read as a token of the template's own?
static bool has_control(const ChatTemplate *c, const Message *m) {
    const char *end = m->content + m->length;
    for (size_t i = 0; i < c->n_cuts; i++)
        for (const char *at = m->content; at < end; at++) {
            at = memchr(at, *c->cuts[i], (size_t)(end - at));
            if (!at) break;
            if (starts_with(at, (size_t)(end - at), c->cuts[i])) return true;
        }
    return false;
}

static int encode_messages(const EncodeJob *job, Message *m, size_t n, EncodedRecord *out,
                           qlora_error *err) {
    const DatasetOptions *o = job->options;
    bool later = false;                               // an answer comes after this message
    if (n && !m[0].role) return encode_plain(job->tokenizer, m, out, err);
    for (size_t i = n; i-- > 0;) {
        bool answer = role_of(&m[i]) == ROLE_ASSISTANT;
        m[i].skip |= o->mask_last && later;
        later |= answer;
        out->empty |= answer && !m[i].skip && blank(m[i].content, m[i].length);
        out->control |= has_control(job->chat, &m[i]);
    }
    return template_apply(job->chat, job->tokenizer, m, n, o->mask, false, &out->ids, &out->learn,
                          err);
}

// Parses the whole text of a record. What people get wrong most has a message of its own.
static int parse_record(JsonParser *p, Json *record, bool array) {
    const char *start = p->at;
    if (!array && start < p->end && *start != '{')
        return json_fail(p, start, "expected a record {...} on each line, or one array [...] of "
                         "them; if this is plain text, make each document {\"text\": \"...\"}; if "
                         "it is UTF-16, save it as UTF-8");
    if (json_value(p, record)) {
        if (!array && p->at >= p->end)
            json_fail(p, p->end, "the record does not end on its line; write one object a line, "
                      "or all of them in an array [...]");
        return -1;
    }
    json_space(p);
    return p->at < p->end ? json_fail(p, p->at, "expected the end of the record") : 0;
}

// One task: record number `task` of a batch to ids.
static void encode_record(void *arguments, size_t task, int thread) {
    const EncodeJob *job = arguments;
    const RecordPlace *place = &job->records[task];
    EncodedRecord *out = &job->encoded[task];
    Region region = {.allocator = job->options->allocator};
    Buffer messages = {.allocator = job->options->allocator};
    qlora_error inner = {{0}};
    RecordReader reader = {&messages, &region, &inner};
    // The parser's text starts with the line, not with the record, so that it counts columns right.
    JsonParser p = {job->path, job->text + place->line_start, job->text + place->start,
                    job->text + place->end, place->line, 0, &region, 0, &out->err};
    Json *record = region_alloc(&region, 1, sizeof *record, &out->err);
    (void)thread;
    out->ids.size = out->learn.size = 0;
    out->empty = out->control = false;
    out->bad = !record || parse_record(&p, record, job->array);
    if (!out->bad) {
        out->format = N_RECORD_FORMATS;
        out->bad = (job->chat->n_holes
                        ? prompt_fill(job->chat, &messages, record, &region, &inner)
                        : read_record(&reader, &out->format, record, job->options)) ||
                   encode_messages(job, (Message *)(void *)messages.data,
                                   messages.size / sizeof(Message), out, &inner);
        if (out->bad) json_fail(&p, job->text + place->start, inner.text);
    }
    // Lack of memory is no fault of the record: it must not be skipped as one.
    out->out_of_memory = out->bad && strstr(out->err.text, "out of memory: ");
    buffer_free(&messages);
    region_free(&region);
}

// What is kept of n ids: the first `head` (a BOS token, without which some models stumble) and
// [from, to).
typedef struct { size_t head, from, to; } Kept;

static Kept truncate_sample(const int32_t *ids, size_t n, const DatasetOptions *o,
                            const Tokenizer *t) {
    if (n <= o->max_length) return (Kept){0, 0, n};
    if (o->truncate == TRUNCATE_DROP) return (Kept){0, 0, 0};
    if (o->truncate == TRUNCATE_KEEP_START) return (Kept){0, 0, o->max_length};
    size_t head = ids[0] == t->bos_id;
    return (Kept){head, n - (o->max_length - head), n};
}

static int append_ids(Dataset *d, const EncodedRecord *e, Kept kept, qlora_error *err) {
    size_t n = kept.to - kept.from, unit = sizeof *d->ids;
    if (buffer_append(&d->id_buffer, e->ids.data, kept.head * unit, err) ||
        buffer_append(&d->id_buffer, e->ids.data + kept.from * unit, n * unit, err) ||
        buffer_append(&d->learn_buffer, e->learn.data, kept.head, err) ||
        buffer_append(&d->learn_buffer, e->learn.data + kept.from, n, err))
        return -1;
    if (kept.head + n) d->learn_buffer.data[d->tokens] = 0;          // nothing predicts the first
    return 0;
}

// Counts what the checks ask for in a sample that was appended.
static void count_sample(Dataset *d, const Sample *s, const EncodeJob *job) {
    const int32_t *ids = (const int32_t *)(void *)d->id_buffer.data + s->first;
    const char *learn = d->learn_buffer.data + s->first;
    const int32_t end = job->chat->end_id, eos = job->tokenizer->eos_id;
    const int32_t bos = job->tokenizer->bos_id;
    size_t ends = 0, doubled = 0;
    for (size_t i = 0; i < s->length; i++) {
        bool is_end = ids[i] >= 0 && (ids[i] == end || ids[i] == eos);
        ends += is_end && learn[i] == 1;
        doubled += is_end && i && ids[i - 1] == ids[i];
    }
    d->ends += ends;
    if (!ends && (end >= 0 || eos >= 0)) count_one(&d->tally[TALLY_NO_END], s);
    if (doubled) count_one(&d->tally[TALLY_DOUBLED_END], s);
    if (s->length > 1 && bos >= 0 && ids[0] == bos && ids[1] == bos && bos != end && bos != eos)
        count_one(&d->tally[TALLY_DOUBLED_START], s);
}

// Takes a record into the dataset, or counts why not.
static int append_sample(Dataset *d, const EncodeJob *job, const EncodedRecord *e, size_t line,
                         qlora_error *err) {
    const DatasetOptions *o = job->options;
    Tally *tally = d->tally;
    size_t n = e->learn.size;
    Sample s = {.first = d->tokens, .line = line, .file = job->file};
    d->records++;
    if (e->bad) {
        if (e->out_of_memory || !(o->skip_bad_lines || o->inspecting))
            return fail(err, "%s", e->err.text);
        if (!tally[TALLY_BAD].n) d->first_bad = e->err;
        count_one(&tally[TALLY_BAD], &s);
        return 0;
    }
    d->formats[e->format]++;
    d->longest = max_size(d->longest, n);
    if (buffer_append(&d->length_buffer, &n, sizeof n, err)) return -1;
    Kept kept = truncate_sample((const int32_t *)(void *)e->ids.data, n, o, job->tokenizer);
    if (n && kept.to == 0) { count_one(&tally[TALLY_TOO_LONG], &s); return 0; }
    if (append_ids(d, e, kept, err)) return -1;
    s.length = kept.head + kept.to - kept.from;
    for (size_t i = 0; i < s.length; i++) s.supervised += d->learn_buffer.data[s.first + i] == 1;
    if (!s.supervised && !o->keep_all) {
        d->id_buffer.size = d->tokens * sizeof *d->ids;
        d->learn_buffer.size = d->tokens;
        count_one(&tally[TALLY_UNSUPERVISED], &s);
        return 0;
    }
    count_sample(d, &s, job);
    if (s.length < n) count_one(&tally[TALLY_CUT], &s);
    if (kept.to < n && memchr(e->learn.data + kept.to, 1, n - kept.to))
        count_one(&tally[TALLY_CUT_ANSWER], &s);
    if (e->empty) count_one(&tally[TALLY_EMPTY], &s);
    if (e->control) count_one(&tally[TALLY_CONTROL], &s);
    d->n++;
    d->tokens += s.length;
    d->supervised += s.supervised;
    return buffer_append(&d->sample_buffer, &s, sizeof s, err);
}

static bool dataset_full(const Dataset *d, const DatasetOptions *o) {
    return d->n >= o->max_samples || d->seen >= o->take_to;
}

// Records are encoded a batch at a time, in any order, and appended in the order of the file: the
// dataset is the same for any number of threads, and so is the first error.
static int encode_records(Dataset *d, EncodeJob *job, const Buffer *records, qlora_error *err) {
    enum { BATCH = 256 };
    const DatasetOptions *o = job->options;
    const RecordPlace *places = (const RecordPlace *)(void *)records->data;
    size_t n = records->size / sizeof *places;
    size_t from = o->take_from > d->seen ? min_size(o->take_from - d->seen, n) : 0;
    size_t to = o->take_to > d->seen ? min_size(o->take_to - d->seen, n) : 0;
    EncodedRecord *encoded = mem_alloc(o->allocator, BATCH, sizeof *encoded, err);
    int bad = encoded ? 0 : -1;
    for (size_t i = 0; encoded && i < BATCH; i++)
        encoded[i].ids.allocator = encoded[i].learn.allocator = o->allocator;
    job->encoded = encoded;
    for (size_t first = from; first < to && !bad && d->n < o->max_samples; first += BATCH) {
        size_t batch = min_size(BATCH, to - first);
        job->records = places + first;
        parallel_for(o->pool, batch, encode_record, job);
        for (size_t i = 0; i < batch && !bad && d->n < o->max_samples; i++)
            bad = append_sample(d, job, &encoded[i], places[first + i].line, err);
    }
    d->seen += n;
    for (size_t i = 0; encoded && i < BATCH; i++) {
        buffer_free(&encoded[i].ids);
        buffer_free(&encoded[i].learn);
    }
    mem_free(o->allocator, encoded, BATCH, sizeof *encoded);
    return bad;
}

static void dataset_close(Dataset *d) {
    buffer_free(&d->id_buffer);
    buffer_free(&d->learn_buffer);
    buffer_free(&d->sample_buffer);
    buffer_free(&d->length_buffer);
}

// The file's text lives only in here.
static int read_samples(Dataset *d, EncodeJob *job, qlora_error *err) {
    const qlora_allocator *a = job->options->allocator;
    Buffer text = {.allocator = a}, records = {.allocator = a};
    const char *wrong;
    int bad = read_whole_file(job->path, SIZE_MAX / 4, &text, err) ||
              split_file(&records, text.data, text.size, &job->array, &wrong, err);
    job->text = text.data;
    if (!bad && !records.size) bad = fail(err, "%s: expected records, found none", job->path);
    if (!bad) bad = encode_records(d, job, &records, err);
    if (!bad && wrong) {
        JsonParser p = {.name = job->path, .start = text.data, .first_line = 1, .err = err};
        bad = json_fail(&p, wrong, wrong < text.data + text.size
                                       ? "expected the end of the file after the array"
                                       : "the file ends inside its array: is it complete?");
    }
    buffer_free(&records);
    buffer_free(&text);
    return bad ? -1 : 0;
}

// Reads the files into one dataset. It may be without samples: see dataset_usable. To be closed
// after success; after failure it may be.
static int dataset_open(Dataset *d, const char *const *paths, size_t n_paths,
                        const ChatTemplate *chat, const Tokenizer *t, const DatasetOptions *options,
                        qlora_error *err) {
    const qlora_allocator *a = options->allocator;
    EncodeJob job = {.chat = chat, .tokenizer = t, .options = options};
    int bad = 0;
    *d = (Dataset){.paths = paths, .id_buffer.allocator = a, .learn_buffer.allocator = a,
                   .sample_buffer.allocator = a, .length_buffer.allocator = a};
    for (size_t i = 0; i < n_paths && !bad && !dataset_full(d, options); i++) {
        job.path = paths[i];
        job.file = (uint32_t)i;
        bad = read_samples(d, &job, err);
    }
    encoders_free(t);
    if (bad) dataset_close(d);
    d->ids = (int32_t *)(void *)d->id_buffer.data;
    d->learn = (uint8_t *)(void *)d->learn_buffer.data;
    d->samples = (Sample *)(void *)d->sample_buffer.data;
    d->lengths = (size_t *)(void *)d->length_buffer.data;
    d->n_lengths = d->length_buffer.size / sizeof *d->lengths;
    return bad;
}

// Fails unless there is a sample with something to learn, and says what to do.
static int dataset_usable(const Dataset *d, const DatasetOptions *o, qlora_error *err) {
    size_t bad = d->tally[TALLY_BAD].n, too_long = d->tally[TALLY_TOO_LONG].n;
    if (d->n) return 0;
    if (!d->records)
        return fail(err, "%s: no record was taken of the %zu that there are", d->paths[0], d->seen);
    if (bad == d->records)
        return fail(err, "all %zu records are malformed or not supported, the first: %s", bad,
                    d->first_bad.text);
    return fail(err, "%s: nothing to learn in %zu records: %zu malformed or not supported, %zu "
                "without a supervised token (no assistant's text), %zu longer than --max-length "
                "%zu (the longest has %zu tokens)%s", d->paths[0], d->records, bad,
                d->tally[TALLY_UNSUPERVISED].n, too_long, o->max_length, d->longest,
                too_long ? "; raise --max-length" : "");
}

// ---------------------------------------------------------------------------- files of a directory

enum { SPLIT_TRAIN, SPLIT_VALID, SPLIT_TEST, N_SPLITS };

// Appends the path, or, if it is a directory, the file in it that holds this split. With `needed`
// there must be one. A Buffer of const char *.
static int add_data_path(Buffer *paths, const char *path, int split, bool needed, Region *region,
                         qlora_error *err) {
    static const char *const names[N_SPLITS][4] = {
        {"train.jsonl", "train.json"},
        {"valid.jsonl", "valid.json", "validation.jsonl", "validation.json"},
        {"test.jsonl", "test.json"}};
    struct stat info;
    if (stat(path, &info) || !S_ISDIR(info.st_mode))
        return needed ? buffer_append(paths, &path, sizeof path, err) : 0;
    for (size_t i = 0; i < 4 && names[split][i]; i++) {
        const char *file = path_join(region, path, names[split][i], err);
        if (!file) return -1;
        if (file_exists(file)) return buffer_append(paths, &file, sizeof file, err);
    }
    return needed ? fail(err, "%s: is a directory without %s: name the file", path,
                         names[split][0]) : 0;
}

// "a:b" as in Python: records a to b-1, either may be left out.
static int parse_take(const char *text, DatasetOptions *o, qlora_error *err) {
    size_t *out[2] = {&o->take_from, &o->take_to};
    const char *at = text;
    bool ok = true;
    o->take_from = 0;
    o->take_to = SIZE_MAX;
    for (int i = 0; i < 2 && text && ok; i++) {
        char *end = (char *)(uintptr_t)at;
        errno = 0;
        if (isdigit((unsigned char)*at)) *out[i] = (size_t)strtoull(at, &end, 10);
        ok = !errno && *end == (i ? 0 : ':');
        at = end + 1;
    }
    return ok && o->take_from < o->take_to
               ? 0 : fail(err, "take: expected FIRST:END, records by number from 0, as 0:1000 or "
                          "1000:, found \"%s\"", text);
}

// ----------------------------------------------------------------------------------------- packing

// Samples of a dataset, by number: those to learn from, or those held out. A batch takes whole
// packs: pack p is index[pack[p] .. pack[p+1]-1]. Without packing each is one sample.
typedef struct {
    const Dataset *data;
    uint32_t *index;                // (n)
    size_t *pack;                   // (n_packs + 1)
    size_t n, n_packs;
} SampleList;

static int by_number(const void *a, const void *b) {
    size_t x = *(const size_t *)a, y = *(const size_t *)b;
    return (x > y) - (x < y);
}

// Best-fit decreasing: the longest sample first, each into the fullest pack that still has room for
// it, of equally full ones the youngest; a new pack if none has. Depends on the lengths alone.
// Orders list->index pack by pack, the longest document of each first.
static int pack_samples(SampleList *list, size_t room, Region *region, qlora_error *err) {
    size_t words = room / 64 + 1, n = list->n, n_packs = 0;
    size_t *key = region_alloc(region, n, sizeof *key, err);       // room left by a sample, index
    uint64_t *free_bits = region_alloc(region, words, sizeof *free_bits, err);   // rooms there are
    uint32_t *head = region_alloc(region, room + 1, sizeof *head, err);    // packs by room, 0: none
    uint32_t *next = region_alloc(region, n + 1, sizeof *next, err);       // in the same list
    uint32_t *of = region_alloc(region, n, sizeof *of, err);               // pack of a sample
    if (!key || !free_bits || !head || !next || !of) return -1;
    for (size_t i = 0; i < n; i++)
        key[i] = (room - list->data->samples[list->index[i]].length) << 32 | list->index[i];
    qsort(key, n, sizeof *key, by_number);
    for (size_t i = 0; i < n; i++) {
        size_t length = room - (key[i] >> 32), left = room, w = length / 64;
        uint64_t bits = free_bits[w] & ~(uint64_t)0 << length % 64;
        while (!bits && ++w < words) bits = free_bits[w];
        uint32_t pack = (uint32_t)++n_packs;          // numbered from 1, for 0 ends a list
        if (bits) {
            left = w * 64 + (size_t)__builtin_ctzll(bits);
            n_packs--;
            pack = head[left];
            head[left] = next[pack];
            if (!head[left]) free_bits[w] &= ~((uint64_t)1 << left % 64);
        }
        left -= length;
        of[i] = pack - 1;
        next[pack] = head[left];
        head[left] = pack;
        free_bits[left / 64] |= (uint64_t)1 << left % 64;
    }
    // Counting sort by pack.
    list->n_packs = n_packs;
    for (size_t i = 0; i < n; i++) list->pack[of[i] + 1]++;
    for (size_t p = 0; p < n_packs; p++) list->pack[p + 1] += list->pack[p];
    for (size_t i = 0; i < n; i++) list->index[list->pack[of[i]]++] = (uint32_t)key[i];
    for (size_t p = n_packs; p > 0; p--) list->pack[p] = list->pack[p - 1];
    list->pack[0] = 0;
    return 0;
}

// ---------------------------------------------------------------------------------------- checking

typedef enum { WARNING, ERROR } Severity;
static const char *const severity_names[] = {"warning", "error"};

// What a person should know before training, or what forbids it.
typedef struct { Severity severity; const char *code; size_t n; char text[700]; } Finding;
typedef struct { size_t n; Finding list[2 * N_TALLIES + 4]; } Findings;

// For each tally: from which share of the records (or samples) on it is an error; 2: never.
static const struct {
    const char *code;
    double error_share;
    bool of_records;
    const char *what, *cure;
} checks[N_TALLIES] = {
    {"malformed", 2, true, "malformed or not supported, left out", NULL},
    {"unsupervised", 1, true, "no supervised token, left out",
     "is there an answer, and is it short enough, with a weight that is not 0?"},
    {"too-long", 1, true, "longer than --max-length, left out",
     "raise --max-length, or cut them with --truncate keep-start or keep-end"},
    {"truncated", 2, false, "cut to --max-length", NULL},
    {"cut-answer", 2, false, "the answer's end is cut off, so that they do not teach how to stop",
     "raise --max-length or leave them out with --truncate drop"},
    {"no-end", 1, false, "no supervised end token", "a model that never sees one never stops: is "
     "the end of the answers masked or cut off?"},
    {"doubled-end", 0.5, false, "an end token stands twice",
     "the texts bring the template's end token along: take it out of the data"},
    {"doubled-start", 0.5, false, "the beginning-of-text token stands twice",
     "the texts bring it along: take it out of the data"},
    {"control-tokens", 2, false, "a text holds a control token of the template",
     "it is learnt as that token, not as its letters"},
    {"empty-answer", 1, false, "an answer is empty", "the model learns to say nothing there"}};

__attribute__((format(printf, 5, 6)))
static void add_finding(Findings *findings, Severity severity, const char *code, size_t n,
                        const char *format, ...) {
    Finding *f = &findings->list[findings->n++];
    va_list args;
    *f = (Finding){severity, code, n, ""};
    va_start(args, format);
    vsnprintf(f->text, sizeof f->text, format, args);
    va_end(args);
}

// What the counts of a dataset say. `which` is put before each, as "held-out data: ".
static void check_counts(Findings *findings, const Dataset *d, const DatasetOptions *o,
                         const char *which) {
    qlora_error text = {{0}};
    if (dataset_usable(d, o, &text))
        add_finding(findings, ERROR, "nothing-to-learn", 0, "%s%s", which, text.text);
    for (int i = 0; i < N_TALLIES; i++) {
        const Tally *tally = &d->tally[i];
        size_t all = checks[i].of_records ? d->records : d->n;
        if (!tally->n || (i == TALLY_BAD && tally->n == d->records)) continue;
        bool error = i == TALLY_BAD ? !o->skip_bad_lines
                                    : (double)tally->n >= checks[i].error_share * (double)all;
        const char *cure = i == TALLY_BAD ? d->first_bad.text : checks[i].cure;
        add_finding(findings, error ? ERROR : WARNING, checks[i].code, tally->n,
                    "%s%zu of %zu %s: %s (the first: %s:%zu)%s%s", which, tally->n, all,
                    checks[i].of_records ? "records" : "samples", checks[i].what,
                    d->paths[tally->file], tally->line, cure ? "; " : "", cure ? cure : "");
    }
}

// Runs over 8-byte words (the last one padded), which is fast enough for gigabytes.
static uint64_t checksum(uint64_t hash, const void *data, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        uint64_t word = 0;
        memcpy(&word, (const char *)data + i, min_size(8, n - i));
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 29;
    }
    return hash;
}

typedef struct { uint64_t hash; const Sample *sample; bool held; } SampleHash;

// Equal samples stand together, those to learn from first, then by their place.
static int by_hash(const void *a, const void *b) {
    const SampleHash *x = a, *y = b;
    if (x->hash != y->hash) return x->hash < y->hash ? -1 : 1;
    if (x->held != y->held) return x->held ? 1 : -1;
    return (x->sample > y->sample) - (x->sample < y->sample);
}

// Samples that are there twice, and held-out ones that are also learnt from: by a hash of 64 bits,
// of which two in a billion samples are equal by chance once in forty times.
static int check_duplicates(Findings *findings, const SampleList *train, const SampleList *held,
                            const qlora_allocator *allocator, qlora_error *err) {
    const SampleList *lists[2] = {train, held};
    size_t n = 0;
    Tally twice = {0}, overlap = {0};
    SampleHash *h = mem_alloc(allocator, train->n + held->n, sizeof *h, err);
    if (!h) return -1;
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < lists[k]->n; i++) {
            const Dataset *d = lists[k]->data;
            const Sample *s = &d->samples[lists[k]->index[i]];
            h[n++] = (SampleHash){checksum(s->length, d->ids + s->first,
                                           s->length * sizeof *d->ids), s, k};
        }
    qsort(h, n, sizeof *h, by_hash);
    for (size_t i = 1, first = 0; i < n; i++) {
        const Sample *s = h[i].sample;
        if (h[i].hash != h[first].hash) first = i;
        else if (h[i].held && !h[first].held) count_one(&overlap, s);
        else if (!h[i].held) count_one(&twice, s);
    }
    mem_free(allocator, h, n, sizeof *h);
    if (twice.n)
        add_finding(findings, WARNING, "duplicates", twice.n, "%zu of %zu samples to learn from "
                    "are copies of others (one: %s:%zu)", twice.n, train->n,
                    train->data->paths[twice.file], twice.line);
    if (overlap.n)
        add_finding(findings, WARNING, "overlap", overlap.n, "%zu of %zu held-out samples are also "
                    "learnt from (one: %s:%zu): the held-out loss looks better than it is",
                    overlap.n, held->n, held->data->paths[overlap.file], overlap.line);
    return 0;
}
// =================================================================================================
//  13. Adapters, and writing models
//
//  A PEFT adapter is two files: adapter_config.json says how A and B are scaled, and
//  adapter_model.safetensors holds them, named after the modules they belong to. What is written
//  here loads in peft, vLLM and llama.cpp as it is.
// =================================================================================================

// What a caller of the library holds.
struct qlora_model {
    qlora_options options;
    qlora_allocator allocator;
    Region region;                          // config, slots, layers, paths
    const char *directory;                  // of the base model
    const Json *config, *generation;        // generation_config.json or NULL
    SlotList slots;
    Transformer transformer;
    void *weights;
    size_t weight_bytes;
    Device host, device;                    // the CPU, and where the model computes: it or a GPU
    char device_name[128];                  // "" for the CPU
    Tokenizer *tokenizer;                   // NULL in models made by init without tokenizer files
    ChatTemplate chat;                      // valid when has_chat
    bool has_chat;
    char note[512];                         // what the user should know about the template
    char device_why[256];                   // why `auto` did not choose a GPU
    float lora_dropout;                     // of the adapter, for its configuration file
};

// ----------------------------------------------------------------------- adapted linears, in order

// All linears that can carry an adapter: those of the layers and, last, the output head.
static size_t n_modules(const Transformer *m) { return m->config.L * N_LINEARS + 1; }

static Linear *module_linear(Transformer *m, size_t i) {
    return i == m->config.L * N_LINEARS ? &m->head
                                        : &m->layers[i / N_LINEARS].linear[i % N_LINEARS];
}

// Its Hugging Face path; short: only the last part, as target_modules has it.
static void module_name(const Transformer *m, size_t i, bool only_last, char name[128]) {
    if (i == m->config.L * N_LINEARS) { snprintf(name, 128, "lm_head"); return; }
    const char *linear = m->config.architecture->linear[i % N_LINEARS];
    const char *last = strrchr(linear, '.') + 1;
    if (only_last) snprintf(name, 128, "%s", last);
    else snprintf(name, 128, "model.layers.%zu.%s", i / N_LINEARS, linear);
}

// Whether one target names the module: by its whole path or by its last parts.
static bool is_target(const char *target, size_t n, const char *module) {
    static const char all[] = "all-linear";
    size_t length = strlen(module);
    if (n == sizeof all - 1 && memcmp(target, all, n) == 0) return strcmp(module, "lm_head") != 0;
    return n && n <= length && memcmp(module + length - n, target, n) == 0 &&
           (n == length || module[length - n - 1] == '.');
}

enum { PIECE = 4096 };              // parameters that travel between host and device at a time

static void free_parameters(Transformer *m) {
    size_t copies = m->gradients ? 4 : 1;
    m->dev->ops->release(m->dev, m->parameters, m->n_parameters * copies * sizeof(real));
    m->parameters = m->gradients = m->moment1 = m->moment2 = NULL;
    m->n_parameters = 0;
}

// Carves A and B of every adapted linear (lora.r > 0) from the flat buffers, as far as there are
// any. Returns how many parameters they are, padding included.
static size_t carve_parameters(Transformer *m) {
    Arena values = {(char *)m->parameters, 0}, gradients = {(char *)m->gradients, 0};
    for (size_t i = 0; i < n_modules(m); i++) {
        Linear *linear = module_linear(m, i);
        Lora *lora = &linear->lora;
        size_t a = round_up(lora->r * linear->weight.K, PARAMETER_ALIGNMENT);
        size_t b = round_up(lora->r * linear->weight.N, PARAMETER_ALIGNMENT);
        lora->A = arena_alloc(&values, a, sizeof(real));
        lora->B = arena_alloc(&values, b, sizeof(real));
        lora->dA = arena_alloc(&gradients, a, sizeof(real));
        lora->dB = arena_alloc(&gradients, b, sizeof(real));
    }
    return values.used / sizeof(real);
}

// Makes room for the adapter, zeroed; training also gets gradients and moments. Replaces what was
// there.
static int allocate_parameters(Transformer *m, bool training, qlora_error *err) {
    Device *dev = m->dev;
    free_parameters(m);
    size_t n = carve_parameters(m), bytes = n * (training ? 4 : 1) * sizeof(real);
    m->parameters = dev->ops->allocate(dev, bytes, err);
    if (!m->parameters) return -1;
    dev->ops->zero(dev, m->parameters, bytes);
    m->n_parameters = n;
    if (training) {
        m->gradients = m->parameters + n;
        m->moment1 = m->parameters + 2 * n;
        m->moment2 = m->parameters + 3 * n;
    }
    carve_parameters(m);
    find_lowest_adapter(m);
    return 0;
}

static size_t count_parameters(Transformer *m) {
    size_t n = 0;
    for (size_t i = 0; i < n_modules(m); i++) {
        const Linear *linear = module_linear(m, i);
        n += linear->lora.r * (linear->weight.K + linear->weight.N);
    }
    return n;
}

static void remove_adapter(Transformer *m) {
    for (size_t i = 0; i < n_modules(m); i++) module_linear(m, i)->lora.r = 0;
    free_parameters(m);
    find_lowest_adapter(m);
}

// A fresh adapter for training: A uniform in +-1/sqrt(K) (PEFT's kaiming_uniform with a = sqrt 5),
// B zero, so that the adapted model starts as the base model, bit for bit.
static int new_adapter(Transformer *m, const char *targets, size_t r, float alpha, float dropout,
                       uint64_t seed, qlora_error *err) {
    char name[128];
    remove_adapter(m);
    for (const char *at = targets; at; at = *(at += strcspn(at, ",")) ? at + 1 : NULL) {
        size_t found = 0, n = strcspn(at, ",");
        for (size_t i = 0; i < n_modules(m); i++) {
            Lora *lora = &module_linear(m, i)->lora;
            module_name(m, i, false, name);
            if (!is_target(at, n, name)) continue;
            lora->r = r;
            lora->scale = (real)alpha / (real)r;
            lora->dropout = dropout;
            found++;
        }
        if (found) continue;
        remove_adapter(m);
        return fail(err, "target_modules: \"%.*s\" names no linear of this model (all-linear, "
                    "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj and lm_head do)",
                    (int)n, at);
    }
    if (allocate_parameters(m, true, err)) { remove_adapter(m); return -1; }
    for (size_t i = 0; i < n_modules(m); i++) {
        const Linear *linear = module_linear(m, i);
        size_t n = linear->lora.r * linear->weight.K;
        float bound = 1 / sqrtf((float)linear->weight.K);
        for (size_t at = 0; at < n; at += PIECE) {
            real values[PIECE];
            size_t count = min_size(PIECE, n - at);
            for (size_t k = 0; k < count; k++) {
                uint32_t bits = random_u32(seed, RANDOM_INIT, linear->lora.module, at + k);
                values[k] = (real)(bound * (2 * unit_float(bits) - 1));
            }
            upload(m->dev, linear->lora.A + at, values, count * sizeof *values);
        }
    }
    return m->dev->ops->check(m->dev, err);
}

// ------------------------------------------------------------------------------ reading an adapter

// Refuses what an adapter may ask for and is not implemented, by name.
static int check_adapter_config(const ConfigReader *r) {
    static const char *const must_be_off[] = {"use_dora", "fan_in_fan_out", "lora_bias",
        "modules_to_save", "trainable_token_indices", "layer_replication",
        "alora_invocation_tokens", "use_qalora", "target_parameters", "megatron_config",
        "use_bdlora", "arrow_config"};
    const char *type = json_get_text(r->json, "peft_type"), *bias = json_get_text(r->json, "bias");
    if (!type || strcmp(type, "LORA")) return config_fail(r, "peft_type", "\"LORA\"");
    if (bias && strcmp(bias, "none")) return config_fail(r, "bias", "\"none\"");
    return config_off(r, must_be_off, sizeof must_be_off / sizeof *must_be_off,
                      "it to be off (not implemented: merge this adapter with peft and open the "
                      "merged model)");
}

// Rank or alpha of a module: that of the first entry of the pattern whose key its name ends with,
// else the general one. Keys that are regular expressions are refused.
static int adapter_number(const ConfigReader *r, const char *key, const char *pattern_key,
                          const char *module, double *out) {
    const Json *pattern = config_get(r->json, pattern_key);
    *out = 8;                                                 // PEFT's default of both
    if (config_number(r, key, -1e6, 1e6, out)) return -1;
    for (const Json *p = pattern ? pattern->first : NULL; p && p->key; p = p->next) {
        if (strspn(p->key, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.") !=
            p->key_length)
            return fail(r->err, "%s/%s: %s: \"%s\" is a regular expression, which is not "
                        "implemented", r->directory, r->place, pattern_key, p->key);
        if (!is_target(p->key, p->key_length, module)) continue;
        if (json_to_double(p, out) && fabs(*out) <= 1e6) break;
        return config_fail(r, pattern_key, "numbers of at most a million");
    }
    return 0;
}

typedef struct {
    Transformer *m;
    const TensorFiles *files;
    ConfigReader config;
    size_t used;                            // tensors of the file that found their place
    qlora_error *err;
} AdapterReader;

static const TensorInfo *adapter_tensor(const AdapterReader *a, const char *module,
                                        const char *part) {
    char name[256];
    snprintf(name, sizeof name, "base_model.model.%s.%s", module, part);
    return tensors_find(a->files, name);
}

// First pass over a module: its rank and scale, from the shapes and the configuration.
static int read_module_shape(AdapterReader *a, size_t i) {
    Linear *linear = module_linear(a->m, i);
    const char *path = a->files->files[0].path;
    char module[128];
    double alpha, rank;
    bool rslora;
    module_name(a->m, i, false, module);
    const TensorInfo *A = adapter_tensor(a, module, "lora_A.weight");
    const TensorInfo *B = adapter_tensor(a, module, "lora_B.weight");
    linear->lora = (Lora){.module = linear->lora.module};
    if (!A && !B) return 0;
    if (!A || !B) return fail(a->err, "%s: %s has lora_%c but no lora_%c", path, module,
                              A ? 'A' : 'B', A ? 'B' : 'A');
    size_t r = A->rank == 2 ? A->shape[0] : 0;
    if (r < 1 || r > 4096)
        return fail(a->err, "%s: %s: rank %zu, expected 1 to 4096", path, A->name, r);
    if (check_tensor(a->files, A, 2, r, linear->weight.K, a->err) ||
        check_tensor(a->files, B, 2, linear->weight.N, r, a->err) ||
        adapter_number(&a->config, "lora_alpha", "alpha_pattern", module, &alpha) ||
        adapter_number(&a->config, "r", "rank_pattern", module, &rank) ||
        config_bool(&a->config, "use_rslora", &rslora)) return -1;
    if (rank != (double)r)
        return fail(a->err, "%s: %s has rank %zu, but adapter_config.json says %g", path, A->name,
                    r, rank);
    a->used += 2;
    linear->lora.r = r;
    linear->lora.scale = (real)(alpha / (rslora ? sqrt((double)r) : (double)r));
    return 0;
}

static int read_parameter(const AdapterReader *a, const TensorInfo *t, real *out) {
    real values[PIECE];
    char raw[PIECE * sizeof(float)];
    Weight piece = {.dtype = safetensors_types[t->type].dtype, .data = raw};
    for (size_t at = 0; at < t->elements; at += PIECE) {
        size_t n = min_size(PIECE, t->elements - at);
        if (read_values(a->files, t, raw, at, n, a->err)) return -1;
        weight_row(values, &piece, 0, 0, n, DT_REAL);
        upload(a->m->dev, out + at, values, n * sizeof *values);
    }
    return 0;
}

// When the head is adapted, PEFT may store a copy of the base head with it. It is accepted if it is
// that: equal to the model's own.
static int check_head_copy(AdapterReader *a) {
    const TensorInfo *t = adapter_tensor(a, "lm_head", "base_layer.weight");
    if (!t) return 0;
    Weight own = a->m->head.weight, copy = {.dtype = safetensors_types[t->type].dtype};
    const char *path = a->files->files[0].path, *head = own.data;
    size_t size = dtype_size(own.dtype);
    a->used++;
    if (!head)
        return fail(a->err, "%s: %s: an adapter that brings a copy of the head cannot be merged "
                    "here; remove that tensor or merge with peft", path, t->name);
    if (check_tensor(a->files, t, 2, own.N, own.K, a->err)) return -1;
    for (size_t at = 0; at < t->elements; at += PIECE) {
        real ours[PIECE], theirs[PIECE];
        char room[PIECE * sizeof(float)], raw[PIECE * sizeof(float)];
        size_t n = min_size(PIECE, t->elements - at);
        if (read_values(a->files, t, raw, at, n, a->err)) return -1;
        own.data = seen(a->m->dev, room, head + at * size, n * size);
        copy.data = raw;
        weight_row(ours, &own, 0, 0, n, DT_REAL);
        weight_row(theirs, &copy, 0, 0, n, DT_REAL);
        for (size_t k = 0; k < n; k++)
            if (ours[k] != theirs[k])
                return fail(a->err, "%s: %s differs from the base model's lm_head: a trained copy "
                            "of the head is not implemented", path, t->name);
    }
    return 0;
}

static int read_adapter_tensors(AdapterReader *a) {
    char module[128];
    for (size_t i = 0; i < n_modules(a->m); i++)
        if (read_module_shape(a, i)) return -1;
    if (check_head_copy(a)) return -1;
    if (a->used != a->files->n_tensors || !a->used)
        return fail(a->err, "%s: %zu of %zu tensors belong to linears of this model: is it an "
                    "adapter for another model?", a->files->files[0].path, a->used,
                    a->files->n_tensors);
    if (allocate_parameters(a->m, false, a->err)) return -1;
    for (size_t i = 0; i < n_modules(a->m); i++) {
        const Lora *lora = &module_linear(a->m, i)->lora;
        module_name(a->m, i, false, module);
        if (lora->r &&
            (read_parameter(a, adapter_tensor(a, module, "lora_A.weight"), lora->A) ||
             read_parameter(a, adapter_tensor(a, module, "lora_B.weight"), lora->B))) return -1;
    }
    return 0;
}

// Loads an adapter onto the model. On failure the model is left without one.
static int load_adapter(qlora_model *q, const char *directory, qlora_error *err) {
    Transformer *m = &q->transformer;
    Region region = {.allocator = &q->allocator};
    bool found;
    const Json *json = read_json(directory, "adapter_config.json", 1 << 24, &region, &found, err);
    TensorFiles *files = NULL;
    ConfigReader config = {json, directory, "adapter_config.json", err};
    remove_adapter(m);
    if (!found) fail(err, "%s/adapter_config.json: not found: is this a PEFT adapter?", directory);
    if (json && !check_adapter_config(&config))
        files = tensors_open(directory, "adapter_model.safetensors", &q->allocator, err);
    AdapterReader a = {m, files, config, 0, err};
    int bad = files ? read_adapter_tensors(&a) : -1;
    if (bad) remove_adapter(m);
    tensors_close(files);
    region_free(&region);
    return bad;
}

// ------------------------------------------------------------------------------ writing an adapter

// n values that may lie on a device, in float32; *hash, unless it is NULL, runs over them.
static int write_parameters(Writer *w, uint64_t *hash, Device *dev, const real *values, size_t n) {
    for (size_t at = 0; at < n; at += PIECE) {
        size_t count = min_size(PIECE, n - at);
        real room[PIECE];
        float narrow[PIECE];
        const real *here = seen(dev, room, values + at, count * sizeof *room);
        for (size_t k = 0; k < count; k++) narrow[k] = (float)here[k];
        if (hash) *hash = checksum(*hash, narrow, count * sizeof *narrow);
        if (dev->ops->check(dev, w->err) || writer_write(w, narrow, count * sizeof *narrow))
            return -1;
    }
    return 0;
}

static int fill_adapter(void *user, const TensorInfo *tensor, Writer *w) {
    return write_parameters(w, NULL, user, tensor->data, tensor->elements);
}

static double lora_rank(const Lora *lora) { return (double)lora->r; }
static double lora_alpha(const Lora *lora) { return (double)lora->scale * (double)lora->r; }

// Lists adapted modules as PEFT reads them. Without a number this is target_modules: short names if
// every layer has the same, else whole paths. With one it is rank_pattern or alpha_pattern: whole
// paths and numbers of the modules whose number is not the usual one.
static int write_modules(Buffer *b, Transformer *m, double (*number)(const Lora *lora),
                         const Lora *usual, qlora_error *err) {
    bool uniform = !number, first = true;
    size_t in_layers = n_modules(m) - 1;
    char name[128];
    for (size_t i = 0; i < in_layers; i++)
        uniform &= !module_linear(m, i)->lora.r == !module_linear(m, i % N_LINEARS)->lora.r;
    for (size_t i = 0; i < n_modules(m); i++) {
        const Lora *lora = &module_linear(m, i)->lora;
        bool repeated = uniform && i >= N_LINEARS && i < in_layers;
        if (!lora->r || repeated || (number && number(lora) == number(usual))) continue;
        module_name(m, i, uniform, name);
        if (buffer_printf(b, err, "%s\n    \"%s\"", first ? "" : ",", name) ||
            (number && buffer_printf(b, err, ": %.9g", number(lora)))) return -1;
        first = false;
    }
    return first ? 0 : buffer_append(b, "\n  ", 3, err);
}

// The classic keys, sorted: older versions of peft refuse keys they do not know.
static int write_adapter_config(qlora_model *q, const char *directory, Region *region,
                                qlora_error *err) {
    Transformer *m = &q->transformer;
    Buffer b = {.allocator = region->allocator};
    const Lora *lora = NULL;
    char base[PATH_MAX];
    if (!realpath(q->directory, base)) snprintf(base, sizeof base, "%s", q->directory);
    for (size_t i = 0; i < n_modules(m) && !lora; i++)
        if (module_linear(m, i)->lora.r) lora = &module_linear(m, i)->lora;
    if (!lora) return fail(err, "the model has no adapter to save");
    int bad =
        buffer_printf(&b, err, "{\n  \"alpha_pattern\": {") ||
        write_modules(&b, m, lora_alpha, lora, err) ||
        buffer_printf(&b, err, "},\n  \"base_model_name_or_path\": ") ||
        json_write_string(&b, base, strlen(base), err) ||
        buffer_printf(
            &b, err,
            ",\n  \"bias\": \"none\",\n  \"fan_in_fan_out\": false,\n"
            "  \"inference_mode\": true,\n  \"init_lora_weights\": true,\n"
            "  \"layers_pattern\": null,\n  \"layers_to_transform\": null,\n"
            "  \"lora_alpha\": %.9g,\n  \"lora_dropout\": %.9g,\n  \"modules_to_save\": null,\n"
            "  \"peft_type\": \"LORA\",\n  \"r\": %zu,\n  \"rank_pattern\": {",
            lora_alpha(lora), (double)q->lora_dropout, lora->r) ||
        write_modules(&b, m, lora_rank, lora, err) ||
        buffer_printf(&b, err, "},\n  \"revision\": null,\n  \"target_modules\": [") ||
        write_modules(&b, m, NULL, NULL, err) ||
        buffer_printf(&b, err, "],\n  \"task_type\": \"CAUSAL_LM\",\n  \"use_dora\": false,\n"
                      "  \"use_rslora\": false\n}\n");
    return write_buffer(path_join(region, directory, "adapter_config.json", err), &b, bad, err);
}

int qlora_save_adapter(qlora_model *q, const char *directory, qlora_error *err) {
    Transformer *m = &q->transformer;
    Region region = {.allocator = &q->allocator};
    size_t n = 0;
    TensorInfo *tensors = region_alloc(&region, 2 * n_modules(m), sizeof *tensors, err);
    bool bad = !tensors;
    for (size_t i = 0; i < n_modules(m) && !bad; i++) {
        const Linear *linear = module_linear(m, i);
        const Lora *lora = &linear->lora;
        char module[128], name[256];
        if (!lora->r) continue;
        module_name(m, i, false, module);
        for (int part = 0; part < 2 && !bad; part++) {
            int length = snprintf(name, sizeof name, "base_model.model.%s.lora_%c.weight", module,
                                  "AB"[part]);
            const char *copy = region_text(&region, name, (size_t)length, err);
            TensorInfo *t = &tensors[n++];
            if (part) describe_tensor(t, copy, ST_F32, 2, linear->weight.N, lora->r, lora->B);
            else describe_tensor(t, copy, ST_F32, 2, lora->r, linear->weight.K, lora->A);
            bad = !copy;
        }
    }
    bad = bad || make_directory(directory, err) ||
          write_adapter_config(q, directory, &region, err) ||
          write_tensors(path_join(&region, directory, "adapter_model.safetensors", err), tensors, n,
                        fill_adapter, m->dev, &q->allocator, err);
    region_free(&region);
    return bad ? -1 : 0;
}

// --------------------------------------------------------------------------------- writing a model

// The files of a model directory besides its weights and config.json.
static const char *const side_files[] = {"generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"};

static int copy_side_files(const char *from, const char *to, Region *region, qlora_error *err) {
    for (size_t i = 0; i < sizeof side_files / sizeof *side_files; i++)
        if (copy_file(from, to, side_files[i], region, err)) return -1;
    return 0;
}

// The quant_state JSON, byte for byte as bitsandbytes writes it; returns its length.
static size_t quant_state(char *text, size_t size, const Slot *slot) {
    const Weight *w = slot->weight;
    const char *dtype = slot->file_type == ST_F32   ? "float32"
                        : slot->file_type == ST_F16 ? "float16"
                                                    : "bfloat16";
    int n = snprintf(text, size, "{\"quant_type\": \"%s\", \"blocksize\": 64, \"dtype\": "
                     "\"%s\", \"shape\": [%zu, %zu]", w->dtype == DT_NF4 ? "nf4" : "fp4", dtype,
                     w->N, w->K);
    if (w->absmax8) {
        // Python prints the shortest text that reads back as the same double.
        char offset[40];
        int digits = 1;
        do snprintf(offset, sizeof offset, "%.*g", digits, (double)w->offset);
        while (strtod(offset, NULL) != (double)w->offset && ++digits < 18);
        n += snprintf(text + n, size - (size_t)n, ", \"nested_blocksize\": 256, "
                      "\"nested_dtype\": \"float32\", \"nested_offset\": %s", offset);
    }
    text[n++] = '}';
    return (size_t)n;
}

// Appends what a slot becomes in a file: one tensor, or the parts of a 4-bit one.
static int describe_slot(TensorInfo *out, size_t *n, const Slot *slot, Region *region,
                         qlora_error *err) {
    const Weight *w = slot->weight;
    bool vector = slot->kind == SLOT_VECTOR;
    TensorInfo *t = &out[*n];
    if (vector || !is_4bit(w->dtype)) {
        // Vectors are float32 in memory; those that were float16 stay so.
        int type = vector && slot->file_type != ST_BF16 ? ST_F32 : slot->file_type;
        void *values = vector ? region_alloc(region, slot->rows, sizeof(float), err) : NULL;
        if (vector && !values) return -1;
        if (vector)
            narrow_values(values, *slot->vector, safetensors_types[type].dtype, slot->rows);
        describe_tensor(t, slot->name, type, vector ? 1 : 2, slot->rows, slot->columns,
                        vector ? values : w->data);
        *n += 1;
        return 0;
    }
    char text[512], name[128];
    WeightPart parts[MAX_WEIGHT_PARTS];
    size_t n_parts = list_weight_parts(w, parts), length = quant_state(text, sizeof text, slot);
    const char *state = region_text(region, text, length, err);
    if (!state) return -1;
    parts[n_parts++] = (WeightPart){quant_state_suffix(w->dtype), ST_U8, length, state};
    for (size_t i = 0; i < n_parts; i++) {
        int bytes = snprintf(name, sizeof name, "%s%s", slot->name, parts[i].suffix);
        const char *copy = region_text(region, name, (size_t)bytes, err);
        if (!copy) return -1;
        describe_tensor(&t[i], copy, parts[i].type, i ? 1 : 2, parts[i].n, 1, parts[i].data);
    }
    *n += n_parts;
    return 0;
}

// config.json, with a bitsandbytes quantization_config if the linears are 4-bit and without one if
// they are not (linear may be NULL then).
static int write_config(const char *directory, const Json *config, const Weight *linear,
                        Region *region, qlora_error *err) {
    Buffer b = {.allocator = region->allocator};
    bool quantised = linear && is_4bit(linear->dtype), first = true;
    int bad = buffer_append(&b, "{", 1, err);
    for (const Json *child = config->first; child && !bad; child = child->next) {
        if (strcmp(child->key, "quantization_config") == 0) continue;
        bad = buffer_printf(&b, err, "%s\n  ", first ? "" : ",") ||
              json_write_string(&b, child->key, child->key_length, err) ||
              buffer_append(&b, ": ", 2, err) || json_write(&b, child, 2, err);
        first = false;
    }
    if (!bad && quantised)
        bad = buffer_printf(
            &b, err,
            "%s\n  \"quantization_config\": {\n"
            "    \"_load_in_4bit\": true,\n    \"_load_in_8bit\": false,\n"
            "    \"bnb_4bit_compute_dtype\": \"bfloat16\",\n    \"bnb_4bit_quant_storage\": "
            "\"uint8\",\n"
            "    \"bnb_4bit_quant_type\": \"%s\",\n    \"bnb_4bit_use_double_quant\": %s,\n"
            "    \"llm_int8_enable_fp32_cpu_offload\": false,\n"
            "    \"llm_int8_has_fp16_weight\": false,\n    \"llm_int8_skip_modules\": null,\n"
            "    \"llm_int8_threshold\": 6.0,\n    \"load_in_4bit\": true,\n"
            "    \"load_in_8bit\": false,\n    \"quant_method\": \"bitsandbytes\"\n  }",
            first ? "" : ",", linear->dtype == DT_NF4 ? "nf4" : "fp4",
            linear->absmax8 ? "true" : "false");
    bad = bad || buffer_printf(&b, err, "\n}\n");
    return write_buffer(path_join(region, directory, "config.json", err), &b, bad, err);
}

// -------------------------------------------------------------------------------- the model handle

static int physical_cores(void) {
    int online = (int)sysconf(_SC_NPROCESSORS_ONLN), cores = 0;
#ifdef __linux__
    // A core is counted at the first of the threads it runs; unreadable files count as cores.
    for (int cpu = 0; cpu < online && cpu < MAX_THREADS; cpu++) {
        char path[96];
        int first = cpu;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list",
                 cpu);
        FILE *file = fopen(path, "re");
        if (file && fscanf(file, "%d", &first) != 1) first = cpu;
        if (file) fclose(file);
        cores += first == cpu;
    }
#endif
    if (cores < 1) cores = online;
    return cores < 1 ? 1 : cores > MAX_THREADS ? MAX_THREADS : cores;
}

qlora_options qlora_default_options(void) {
    return (qlora_options){
        .quant = QLORA_QUANT_NF4, .double_quant = 1, .compute = QLORA_COMPUTE_AUTO};
}

static bool has_bf16_units(void) {
#ifdef __AVX512BF16__
    return true;
#else
    return false;
#endif
}

static int cuda_open(qlora_model *q, int number, qlora_error *err) {
#ifdef QLORA_CUDA
    return qlora_cuda_open(&q->device, number, q->options.compute, q->device_name,
                           sizeof q->device_name, err);
#else
    (void)q;
    return fail(err, "device cuda:%d: this program was built without CUDA; install the CUDA "
                "Toolkit and run make again", number);
#endif
}

// "cpu"; "cuda" or "cuda:N"; "auto" (and NULL): the first GPU if there is one that works, else the
// CPU, with the reason in q->note when there might have been one.
static int choose_device(qlora_model *q, qlora_error *err) {
    const char *name = q->options.device ? q->options.device : "auto";
    int number = 0, end = 0;
    if (strcmp(name, "cpu") == 0) return 0;
    if (strcmp(name, "auto") == 0) {
#ifdef QLORA_CUDA
        qlora_error why = {{0}};
        if (cuda_open(q, 0, &why))
            snprintf(q->device_why, sizeof q->device_why, "%.255s", why.text);
#endif
        return 0;
    }
    if (strcmp(name, "cuda") == 0 ||
        (sscanf(name, "cuda:%d%n", &number, &end) == 1 && !name[end] && number >= 0))
        return cuda_open(q, number, err);
    return fail(err, "device: expected auto, cpu, cuda or cuda:N, found %s", name);
}

static int open_device(qlora_model *q, qlora_error *err) {
    int threads = q->options.threads;
    if (threads < 0 || threads > MAX_THREADS)
        return fail(err, "threads: expected 0 to %d, found %d", MAX_THREADS, threads);
    qlora_compute compute = q->options.compute;
    if (compute == QLORA_COMPUTE_AUTO) compute = has_bf16_units() ? QLORA_COMPUTE_BF16
                                                                  : QLORA_COMPUTE_F32;
    q->host.ops = &fast_ops;
    q->host.act = compute == QLORA_COMPUTE_BF16 ? DT_BF16 : DT_REAL;
    q->host.allocator = &q->allocator;
    q->host.pool = pool_open(threads ? threads : physical_cores(), &q->allocator, err);
    q->device = q->host;
    q->transformer.dev = &q->device;
    return q->host.pool ? choose_device(q, err) : -1;
}

// The options of the caller, or the defaults, with an allocator in any case.
static qlora_options complete_options(const qlora_options *options) {
    qlora_options opt = options ? *options : qlora_default_options();
    if (!opt.allocator.allocate || !opt.allocator.release)
        opt.allocator = (qlora_allocator){default_allocate, default_release, NULL};
    return opt;
}

// A handle with its options, threads and parsed config.json, but no weights.
static qlora_model *open_handle(const char *directory, const qlora_options *options,
                                qlora_error *err) {
    qlora_options opt = complete_options(options);
    qlora_model *q = mem_alloc(&opt.allocator, 1, sizeof *q, err);
    bool found = true;
    if (!q) return NULL;
    q->options = opt;
    q->allocator = opt.allocator;
    q->region.allocator = &q->allocator;
    q->directory = region_text(&q->region, directory, strlen(directory), err);
    if (q->directory && !open_device(q, err))
        q->config = read_json(directory, "config.json", 1 << 26, &q->region, &found, err);
    if (!found) fail(err, "%s/config.json: not found; expected a Hugging Face model directory",
                     directory);
    if (!q->config || parse_config(&q->transformer, &q->slots, q->config, directory, &q->region,
                                   err)) {
        qlora_close(q);
        return NULL;
    }
    find_lowest_adapter(&q->transformer);
    return q;
}

void qlora_close(qlora_model *q) {
    if (!q) return;
    qlora_allocator allocator = q->allocator;
    if (q->transformer.dev) {
        free_parameters(&q->transformer);
        q->device.ops->release(&q->device, q->weights, q->weight_bytes);
    }
#ifdef QLORA_CUDA
    if (q->device.gpu) qlora_cuda_close(&q->device);
#endif
    tokenizer_close(q->tokenizer);
    pool_close(q->host.pool);
    region_free(&q->region);
    mem_free(&allocator, q, 1, sizeof *q);
}

static bool has_tokenizer_files(const char *directory) {
    return directory_has(directory, "tokenizer.json") || directory_has(directory, "vocab.json") ||
           directory_has(directory, "tokenizer.model");
}

// Tokenizer, template and generation settings: those of an adapter's directory if it has its own,
// else of the model. A model without tokenizer files still computes.
static int open_text(qlora_model *q, const char *directory, qlora_error *err) {
    bool found;
    if (!has_tokenizer_files(directory)) directory = q->directory;
    q->generation = read_json(directory, "generation_config.json", 1 << 24, &q->region, &found,
                              err);
    if (found && !q->generation) return -1;
    if (!has_tokenizer_files(directory)) return 0;
    q->tokenizer = tokenizer_open(directory, &q->allocator, err);
    if (!q->tokenizer) return -1;
    size_t ids = tokenizer_size(q->tokenizer), V = q->transformer.config.V;
    if (ids > V)
        return fail(err, "%s: the tokenizer has ids up to %zu, but config.json says vocab_size "
                    "%zu: do these files belong together?", directory, ids - 1, V);
    return q->options.add_tokens ? tokenizer_add(q->tokenizer, q->options.add_tokens, V, err) : 0;
}

// An adapter's base model: the path in its configuration, seen from the adapter or as it stands.
static const char *find_base(const char *directory, Region *region, qlora_error *err) {
    bool found;
    const Json *json = read_json(directory, "adapter_config.json", 1 << 24, region, &found, err);
    const char *base = json_get_text(json, "base_model_name_or_path");
    const char *inside = base ? path_join(region, directory, base, err) : NULL;
    if (!json || (base && !inside)) return NULL;
    if (base && directory_has(inside, "config.json")) return inside;
    if (base && directory_has(base, "config.json")) return base;
    fail(err, "%s/adapter_config.json: base model \"%s\" is not here; open the base model's "
         "directory and give the adapter with --adapter", directory, base ? base : "(none)");
    return NULL;
}

// Finds out from the files' headers what the weights take, and reads them unless it is a plan or
// they are there.
static int need_weights(qlora_model *q, bool plan, qlora_error *err) {
    if (q->weights) return 0;
    WeightLoader l = {.options = &q->options, .dev = &q->device, .err = err};
    l.files = tensors_open(q->directory, "model.safetensors", &q->allocator, err);
    int bad = l.files ? load_weights(&l, &q->transformer, &q->slots, plan ? NULL : &q->weights,
                                     &q->weight_bytes) : -1;
    tensors_close(l.files);
    return bad;
}

qlora_model *qlora_open(const char *path, const qlora_options *options, qlora_error *err) {
    qlora_options opt = complete_options(options);
    Region region = {.allocator = &opt.allocator};
    bool is_adapter = directory_has(path, "adapter_config.json");
    const char *base = is_adapter ? find_base(path, &region, err) : path;
    qlora_model *q = base ? open_handle(base, &opt, err) : NULL;
    if (q && (open_text(q, path, err) || need_weights(q, opt.defer_weights && !is_adapter, err) ||
              (is_adapter && load_adapter(q, path, err)))) {
        qlora_close(q);
        q = NULL;
    }
    region_free(&region);
    return q;
}

const char *qlora_note(const qlora_model *q) { return q->note; }

int qlora_load_adapter(qlora_model *q, const char *directory, qlora_error *err) {
    q->lora_dropout = 0;
    return need_weights(q, false, err) || load_adapter(q, directory, err) ? -1 : 0;
}

qlora_model_info qlora_info(const qlora_model *q) {
    const Config *c = &q->transformer.config;
    qlora_model_info info = {
        .architecture = c->architecture->type, .layers = c->L, .hidden = c->D, .vocab = c->V,
        .context = c->context, .weight_bytes = q->weight_bytes,
        .adapter_parameters = count_parameters((Transformer *)(uintptr_t)&q->transformer),
        .compute = q->device.act == DT_BF16 ? QLORA_COMPUTE_BF16 : QLORA_COMPUTE_F32,
        .threads = q->host.pool->threads, .device = q->device_name};
    for (size_t i = 0; i < q->slots.n; i++)
        info.parameters += q->slots.slots[i].rows * q->slots.slots[i].columns;
    return info;
}

// Memory handed to callers carries its size in front, since the hook wants it back.
enum { GIFT_HEADER = 16 };

static void *give(qlora_model *q, const void *data, size_t n, qlora_error *err) {
    char *p = mem_reserve(&q->allocator, n + GIFT_HEADER + 1, 1, err);
    if (!p) return NULL;
    memcpy(p, &n, sizeof n);
    if (n) memcpy(p + GIFT_HEADER, data, n);
    p[GIFT_HEADER + n] = 0;
    return p + GIFT_HEADER;
}

void qlora_free(qlora_model *q, void *memory) {
    size_t n;
    if (!memory) return;
    memcpy(&n, (char *)memory - GIFT_HEADER, sizeof n);
    mem_free(&q->allocator, (char *)memory - GIFT_HEADER, n + GIFT_HEADER + 1, 1);
}

static int need_tokenizer(const qlora_model *q, qlora_error *err) {
    if (q->tokenizer) return 0;
    return fail(err, "%s: no tokenizer.json (nor tokenizer.model, nor vocab.json) in this "
                "directory", q->directory);
}

// The chat template is looked for when something needs it: a base model that only continues text
// may well have one that is not known here.
static int open_chat(qlora_model *q, qlora_error *err) {
    Buffer note = {.allocator = &q->allocator};
    q->has_chat = false;
    int bad = need_tokenizer(q, err) ||
              template_find(&q->chat, q->options.chat_template, q->options.prompt_template,
                            q->tokenizer, &q->region, &note, err);
    size_t n = min_size(note.size, sizeof q->note - 1);
    if (n) memcpy(q->note, note.data, n);
    q->note[n] = 0;
    q->has_chat = !bad;
    buffer_free(&note);
    return bad ? -1 : 0;
}

static int need_chat(qlora_model *q, qlora_error *err) {
    return q->has_chat ? 0 : open_chat(q, err);
}

// For data: raw text is trained without a template, so that the lack of one is told where a record
// needs it.
static int need_data_chat(qlora_model *q, qlora_error *err) {
    static const TemplateRow none = {"none", {NULL}, "", {NO_TURN, NO_TURN, NO_TURN},
                                     .flags = NO_SYSTEM};
    qlora_error why = {{0}};
    if (!need_chat(q, &why)) return 0;
    bool asked = q->options.chat_template || q->options.prompt_template || !q->tokenizer;
    const char *refused = asked ? NULL : region_text(&q->region, why.text, strlen(why.text), err);
    if (asked) fail(err, "%s", why.text);
    q->chat = (ChatTemplate){.own = true, .end_id = -1, .refused = refused};
    set_row(&q->chat, &none, false);
    return refused ? 0 : -1;
}

int qlora_tokenize(qlora_model *q, const char *text, size_t n, int add_special, int32_t **ids,
                   size_t *n_ids, qlora_error *err) {
    Buffer out = {.allocator = &q->allocator};
    int bad = need_tokenizer(q, err) ||
              tokenizer_encode(q->tokenizer, text, n, add_special != 0, &out, err);
    *ids = bad ? NULL : give(q, out.data, out.size, err);
    *n_ids = *ids ? out.size / sizeof **ids : 0;
    buffer_free(&out);
    return *ids ? 0 : -1;
}

int qlora_detokenize(qlora_model *q, const int32_t *ids, size_t n_ids, int skip_special,
                     char **text, size_t *n_text, qlora_error *err) {
    Buffer out = {.allocator = &q->allocator};
    int bad = need_tokenizer(q, err) ||
              tokenizer_decode(q->tokenizer, ids, n_ids, skip_special != 0, &out, err);
    *text = bad ? NULL : give(q, out.data, out.size, err);
    *n_text = *text ? out.size : 0;
    buffer_free(&out);
    return *text ? 0 : -1;
}

// ------------------------------------------------------------------ from one directory to another

// What goes from file to file needs no GPU.
static qlora_model *open_on_host(const char *directory, const qlora_options *options,
                                 qlora_error *err) {
    qlora_options host = complete_options(options);
    host.device = "cpu";
    return open_handle(directory, &host, err);
}

// Writes the model as a directory of its own, which has none yet.
static int write_model(qlora_model *q, const char *out, qlora_error *err) {
    size_t n = 0;
    TensorInfo *tensors = region_alloc(&q->region, q->slots.n * MAX_WEIGHT_PARTS, sizeof *tensors,
                                       err);
    if (!tensors) return -1;
    if (directory_has(out, "model.safetensors") || directory_has(out, "config.json"))
        return fail(err, "%s: there is a model in this directory already; choose another", out);
    for (size_t i = 0; i < q->slots.n; i++)
        if (describe_slot(tensors, &n, &q->slots.slots[i], &q->region, err)) return -1;
    return write_tensors(path_join(&q->region, out, "model.safetensors", err), tensors, n, NULL,
                         NULL, &q->allocator, err) ||
           write_config(out, q->config, &q->transformer.layers[0].linear[0].weight, &q->region,
                        err) ||
           copy_side_files(q->directory, out, &q->region, err);
}

int qlora_init(const char *config, const char *out_dir, uint64_t seed, const qlora_options *options,
               qlora_error *err) {
    char directory[PATH_MAX];
    size_t n = strlen(config), tail = strlen("config.json");
    if (n >= sizeof directory) return fail(err, "%s: path is too long", config);
    memcpy(directory, config, n + 1);
    if (n >= tail && strcmp(config + n - tail, "config.json") == 0) directory[n - tail] = 0;
    if (!directory[0]) strcpy(directory, ".");
    qlora_model *q = open_on_host(directory, options, err);
    if (!q) return -1;
    WeightLoader l = {.seed = seed, .options = &q->options, .dev = &q->device, .err = err};
    int bad = make_directory(out_dir, err) ||
              load_weights(&l, &q->transformer, &q->slots, &q->weights, &q->weight_bytes) ||
              write_model(q, out_dir, err);
    qlora_close(q);
    return bad ? -1 : 0;
}

int qlora_quantize(const char *model_dir, const char *out_dir, const qlora_options *options,
                   qlora_error *err) {
    qlora_model *q = open_on_host(model_dir, options, err);
    if (!q) return -1;
    int bad = q->options.quant == QLORA_QUANT_NONE
            ? fail(err, "quantize: expected --quant nf4 or fp4, found none")
            : make_directory(out_dir, err) || need_weights(q, false, err) ||
              write_model(q, out_dir, err);
    qlora_close(q);
    return bad ? -1 : 0;
}

// ---------------------------------------------------------------------------------------- sessions

// The arrays that describe a micro-batch: one block, filled on the host and uploaded as a whole.
typedef struct {
    Span *spans, *row_spans;                // (n_spans) of the tokens, of the supervised rows
    int32_t *ids, *position;                // (T)
    int32_t *supervised, *target;           // (S)
} BatchArrays;

// The memory of one activity on a model (training, scoring, generating): one arena of the device,
// planned, then allocated, then carved by the same code.
typedef struct {
    qlora_model *q;
    Workspace w;
    LayerActs *layers;
    real *logits;                           // (rows, V) when inferring
    size_t cache_rows, past;                // room and tokens in the layers' keys and values
    BatchArrays here, there;                // on the host and on the device; on the CPU the same
    size_t batch_bytes;
    Sequence text;                          // what is being generated
    void *record;                           // of the step that generates a token
    void *memory;                           // (bytes) the arena
    size_t bytes;
    Region region;                          // what the host holds
    Device outer;                           // scratch of the session around this one, if any
} Session;

typedef struct {
    size_t T, S, n_spans, max_span, kept, logit_rows, cache_rows;
    bool training;
} SessionShape;

static OpSizes op_sizes(Transformer *m, const SessionShape *shape, size_t chunk) {
    const Config *c = &m->config;
    OpSizes s = {.T = shape->T, .S = shape->S, .D = max_size(c->D, c->H * c->hd), .F = c->F,
                 .H = c->H, .G = c->G, .hd = c->hd, .V_chunk = chunk, .V = c->V,
                 .max_span = max_size(shape->max_span, shape->cache_rows),
                 .n_spans = shape->n_spans, .threads = (size_t)m->dev->pool->threads,
                 .training = shape->training};
    for (size_t i = 0; i < n_modules(m); i++)
        s.max_r = max_size(s.max_r, module_linear(m, i)->lora.r);
    return s;
}

static void carve_batch(BatchArrays *b, const SessionShape *shape, Arena *arena) {
    b->spans = arena_alloc(arena, shape->n_spans, sizeof *b->spans);
    b->row_spans = arena_alloc(arena, shape->n_spans, sizeof *b->row_spans);
    b->ids = arena_alloc(arena, shape->T, sizeof *b->ids);
    b->position = arena_alloc(arena, shape->T, sizeof *b->position);
    b->supervised = arena_alloc(arena, shape->S, sizeof *b->supervised);
    b->target = arena_alloc(arena, shape->S, sizeof *b->target);
}

static void session_carve(Session *s, const SessionShape *shape, Arena *arena) {
    qlora_model *q = s->q;
    const Config *c = &q->transformer.config;
    size_t size = act_size(q->device.act);
    workspace_carve(&s->w, &q->transformer, s->layers, shape->T, shape->S, shape->kept,
                    shape->training, arena);
    OpSizes sizes = op_sizes(&q->transformer, shape, shape->training ? s->w.chunk : c->V);
    q->device.ops->scratch(&q->device, &sizes);
    q->device.scratch = arena_alloc(arena, q->device.scratch_size, 1);
    q->device.thread_scratch = arena_alloc(arena, q->device.thread_size * sizes.threads, 1);
    s->logits = arena_alloc(arena, shape->logit_rows * c->V, sizeof(real));
    size_t before = arena->used;
    carve_batch(&s->there, shape, arena);
    s->batch_bytes = arena->used - before;
    s->cache_rows = shape->cache_rows;
    if (!s->cache_rows) return;
    for (size_t l = 0; l < c->L; l++) {
        s->layers[l].keys = arena_alloc(arena, s->cache_rows * c->G * c->hd, size);
        s->layers[l].values = arena_alloc(arena, s->cache_rows * c->G * c->hd, size);
    }
    s->text.ids = arena_alloc(arena, s->cache_rows, sizeof *s->text.ids);
    s->text.n = arena_alloc(arena, 1, sizeof *s->text.n);
    s->text.id = arena_alloc(arena, 1, sizeof *s->text.id);
    s->text.position = arena_alloc(arena, 1, sizeof *s->text.position);
    s->text.span = arena_alloc(arena, 1, sizeof *s->text.span);
    s->text.work = arena_alloc(arena, sample_bytes(c->V), 1);
}

static void session_close(Session *s) {
    Device *dev = &s->q->device;
    if (s->record) dev->ops->forget(dev, s->record);
    dev->ops->release(dev, s->memory, s->bytes);
    region_free(&s->region);
    s->q->device = s->outer;
}

// Finds out how much a session needs, keeping the activations of as many layers as there is room
// for. Nothing has been read or allocated yet when there is too little.
static int session_plan(Session *s, SessionShape *shape, qlora_error *err) {
    qlora_model *q = s->q;
    Device *dev = &q->device;
    size_t weights = q->weight_bytes, parameters = q->transformer.n_parameters * 4 * sizeof(real);
    size_t limit = q->options.memory, free_now = dev->ops->available(dev);
    size_t taken = limit ? weights + parameters : q->weights ? 0 : weights;
    size_t all = limit ? limit : free_now, room = all - min_size(taken, all);
    size_t most = limit ? room : room / 10 * 9;             // leave a tenth to others
    for (shape->kept = shape->training ? q->transformer.config.L : 0;; shape->kept--) {
        Arena plan = {NULL, 0};
        session_carve(s, shape, &plan);
        s->bytes = plan.used;
        if (s->bytes <= most || shape->kept == 0) break;
    }
    if (s->bytes <= room) return 0;
    return fail(err,
                "memory: %zu MB are not enough: the model takes %zu MB, its adapter %zu MB and a "
                "batch of %zu tokens %zu MB more; lower --batch or --max-length",
                all >> 20, weights >> 20, parameters >> 20, shape->T, s->bytes >> 20);
}

static int session_open(Session *s, qlora_model *q, SessionShape shape, qlora_error *err) {
    Device *dev = &q->device;
    *s = (Session){.q = q, .outer = q->device, .region.allocator = &q->allocator};
    s->layers = region_alloc(&s->region, q->transformer.config.L, sizeof *s->layers, err);
    bool ready = s->layers && !session_plan(s, &shape, err) && !need_weights(q, false, err);
    void *host = ready && !dev->ops->host ? region_alloc(&s->region, s->batch_bytes, 1, err) : NULL;
    if (ready && (dev->ops->host || host)) s->memory = dev->ops->allocate(dev, s->bytes, err);
    if (!s->memory) { session_close(s); return -1; }
    Arena arena = {s->memory, 0};
    session_carve(s, &shape, &arena);
    s->here = s->there;
    arena = (Arena){host, 0};
    if (host) carve_batch(&s->here, &shape, &arena);
    return 0;
}

// What was written to s->here becomes what the device sees.
static void upload_batch(Session *s) {
    if (s->here.spans != s->there.spans)
        upload(&s->q->device, s->there.spans, s->here.spans, s->batch_bytes);
}

// ----------------------------------------------------------------------------------------- merging
//
// W + s B A, formed in float32 and rounded once to the type the base has in its file. Tensors
// stream: a few million values are read, changed and written at a time.

enum { MERGE_VALUES = 4 << 20 };

typedef struct {
    qlora_model *q;
    WeightLoader loader;
    size_t values;                          // at a time: MERGE_VALUES, or a row if that is longer
    char *raw;                              // (values) as read and as written
    real *rows;                             // (values) widened
    real *delta, *remote;                   // (values) s B A, on the host and on the device
    double *sums;                           // (rows, 4): of W^2, D^2, |D| > 0, of these unchanged
    double totals[4];
    // of the rows at work
    DType type;                             // as they are written
    Weight from;                            // what they are read from: the file's or a 4-bit one
    size_t first;                           // of them in there
    const real *change;                     // the delta as the host sees it, or NULL
} Merger;

typedef struct { real *delta; const real *B, *A; real s; size_t K, r; } LowRankTask;

static void low_rank_task(void *arguments, size_t row, int thread) {
    LowRankTask *a = arguments;
    (void)thread;
    for (size_t k = 0; k < a->K; k++) {
        real sum = 0;
        for (size_t j = 0; j < a->r; j++) sum += a->B[row * a->r + j] * a->A[j * a->K + k];
        a->delta[row * a->K + k] = a->s * sum;
    }
}

static void low_rank(Device *dev, real *delta, const real *B, const real *A, real s, size_t rows,
                     size_t K, size_t r) {
    LowRankTask a = {delta, B, A, s, K, r};
    parallel_for(dev->pool, rows, low_rank_task, &a);
}

// One row: widened, with the adapter's share, rounded.
static void merge_row_task(void *arguments, size_t row, int thread) {
    Merger *a = arguments;
    size_t K = a->from.K, size = dtype_size(a->type);
    real *w = a->rows + row * K;
    double *sums = a->sums + 4 * row;
    (void)thread;
    weight_row(w, &a->from, a->first + row, 0, K, DT_REAL);
    sums[0] = sums[1] = sums[2] = sums[3] = 0;
    for (size_t k = 0; k < K; k++) {
        char *out = a->raw + (row * K + k) * size;
        float before = (float)w[k], delta = a->change ? (float)a->change[row * K + k] : 0;
        float merged = before + delta;
        narrow_values(out, &merged, a->type, 1);
        widen_values(&merged, out, a->type, 1);
        sums[0] += (double)before * (double)before;
        sums[1] += (double)delta * (double)delta;
        sums[2] += !(fabsf(delta) <= 0);
        sums[3] += !(fabsf(delta) <= 0) && merged == before;
    }
}

// The linear a weight slot belongs to, if it has an adapter.
static const Lora *slot_lora(qlora_model *q, const Slot *slot) {
    for (size_t i = 0; i < n_modules(&q->transformer); i++) {
        const Linear *linear = module_linear(&q->transformer, i);
        if (slot->weight == &linear->weight && linear->lora.r) return &linear->lora;
    }
    return NULL;
}

// Writes a merged tensor, some rows at a time. They are read from the file, those of a 4-bit slot
// from its weight.
static int merge_rows(Merger *a, const Slot *slot, Writer *w) {
    Device *dev = &a->q->device;
    qlora_error *err = a->loader.err;
    bool packed = slot->weight && is_4bit(slot->weight->dtype);
    const TensorInfo *t = packed ? NULL : loader_find(&a->loader, slot->name, "");
    const Lora *lora = slot_lora(a->q, slot);
    size_t K = slot->columns, rows;
    a->type = safetensors_types[slot->file_type].dtype;
    a->from = packed ? *slot->weight : (Weight){.dtype = a->type, .K = K, .data = a->raw};
    for (size_t first = 0; first < slot->rows; first += rows) {
        rows = min_size(a->values / K, slot->rows - first);
        size_t n = rows * K;
        if (t && read_values(a->loader.files, t, a->raw, first * K, n, err)) return -1;
        if (lora)
            dev->ops->low_rank(dev, a->remote, lora->B + first * lora->r, lora->A, lora->scale,
                               rows, K, lora->r);
        a->change = lora ? seen(dev, a->delta, a->remote, n * sizeof(real)) : NULL;
        if (dev->ops->check(dev, err)) return -1;
        a->first = packed ? first : 0;
        if (lora || packed) parallel_for(dev->pool, rows, merge_row_task, a);
        for (size_t i = 0; lora && i < 4 * rows; i++) a->totals[i % 4] += a->sums[i];
        if (lora && !all_finite(a->raw, a->type, n))
            return fail(err, "tensor %s: the merged values are not finite", slot->name);
        if (writer_write(w, a->raw, n * dtype_size(a->type))) return -1;
    }
    return 0;
}

// Writes one merged tensor. A 4-bit one is loaded whole first, packed.
static int fill_merged(void *user, const TensorInfo *tensor, Writer *w) {
    Merger *a = user;
    WeightLoader *l = &a->loader;
    Slot *slot = (Slot *)(uintptr_t)tensor->data;
    Arena arena = {NULL, 0};
    if (!slot->weight || !is_4bit(slot->weight->dtype)) return merge_rows(a, slot, w);
    if (place_slot(l, slot, &arena)) return -1;
    size_t bytes = arena.used;
    char *memory = host_allocate(l->dev, bytes, l->err);
    arena = (Arena){memory, 0};
    int bad = !memory || place_slot(l, slot, &arena) || load_4bit(l, slot) ||
              merge_rows(a, slot, w);
    host_release(l->dev, memory, bytes);
    return bad ? -1 : 0;
}

static void shard_name(char name[64], size_t i, size_t n) {
    if (n == 1) snprintf(name, 64, "model.safetensors");
    else snprintf(name, 64, "model-%05zu-of-%05zu.safetensors", i + 1, n);
}

static int write_merged_index(const SlotList *list, const TensorInfo *tensors, size_t shards,
                              const char *path, const qlora_allocator *allocator,
                              qlora_error *err) {
    Buffer b = {.allocator = allocator};
    size_t total = 0;
    char name[64];
    for (size_t i = 0; i < list->n; i++) total += tensors[i].bytes;
    int bad = buffer_printf(&b, err, "{\n  \"metadata\": {\n    \"total_size\": %zu\n  },\n"
                            "  \"weight_map\": {", total);
    for (size_t i = 0; i < list->n && !bad; i++) {
        shard_name(name, tensors[i].file, shards);
        bad = buffer_printf(&b, err, "%s\n    \"%s\": \"%s\"", i ? "," : "", list->slots[i].name,
                            name);
    }
    return write_buffer(path, &b, bad || buffer_printf(&b, err, "\n  }\n}\n"), err);
}

// Writes the tensors of all slots in shards of at most `most` bytes, at least one tensor each.
static int write_merged_shards(Merger *a, const char *out, size_t most, qlora_error *err) {
    const SlotList *list = &a->q->slots;
    Region *region = &a->q->region;
    size_t shards = 1, bytes = 0, end;
    char name[64];
    TensorInfo *tensors = region_alloc(region, list->n, sizeof *tensors, err);
    const char *index = path_join(region, out, "model.safetensors.index.json", err);
    const char *single = path_join(region, out, "model.safetensors", err);
    if (!tensors || !index || !single) return -1;
    for (size_t i = 0; i < list->n; i++) {
        const Slot *slot = &list->slots[i];
        describe_tensor(&tensors[i], slot->name, slot->file_type,
                        slot->kind == SLOT_VECTOR ? 1 : 2, slot->rows, slot->columns, slot);
        if (bytes && bytes + tensors[i].bytes > most) { shards++; bytes = 0; }
        bytes += tensors[i].bytes;
        tensors[i].file = shards - 1;
    }
    for (size_t first = 0; first < list->n; first = end) {
        for (end = first; end < list->n && tensors[end].file == tensors[first].file;) end++;
        shard_name(name, tensors[first].file, shards);
        if (write_tensors(path_join(region, out, name, err), tensors + first, end - first,
                          fill_merged, a, region->allocator, err)) return -1;
    }
    // When the directory that was read is written to, what is no longer part of it goes last.
    if (shards == 1) { unlink(index); return 0; }
    if (write_merged_index(list, tensors, shards, index, region->allocator, err)) return -1;
    unlink(single);
    return 0;
}

// What merging would lose or overwrite is refused before anything is written.
static int check_merge(qlora_model *q, const char *out, qlora_error *err) {
    char from[PATH_MAX], to[PATH_MAX];
    if (q->transformer.config.tied && q->transformer.head.lora.r)
        return fail(err, "the adapter changes lm_head, which is the embedding of this model too: "
                    "merging would change both; use the adapter as it is");
    if (make_directory(out, err)) return -1;
    bool same = realpath(q->directory, from) && realpath(out, to) && strcmp(from, to) == 0;
    if (!same && directory_has(out, "config.json"))
        return fail(err, "%s: there is a model in this directory already; choose another", out);
    return 0;
}

// Finds every tensor and gets the memory for merging.
static int prepare_merge(Merger *a, qlora_error *err) {
    static const char *const parts[] = {"", ".quant_map", ".absmax", ".nested_quant_map"};
    qlora_model *q = a->q;
    size_t tallest = 1;
    Arena plan = {NULL, 0};
    a->values = MERGE_VALUES;
    for (size_t i = 0; i < q->slots.n; i++) {
        Slot *slot = &q->slots.slots[i];
        if (place_slot(&a->loader, slot, &plan)) return -1;
        if (slot->weight && is_4bit(slot->weight->dtype))     // loaded later, but found now
            for (size_t k = 0; k < sizeof parts / sizeof *parts; k++)
                loader_find(&a->loader, slot->name, parts[k]);
        a->values = max_size(a->values, slot->columns);
        tallest = max_size(tallest, slot->rows);
    }
    if (refuse_unused(&a->loader, q->transformer.config.tied)) return -1;
    a->rows = region_alloc(&q->region, a->values, sizeof *a->rows, err);
    a->raw = region_alloc(&q->region, a->values, sizeof(real), err);
    a->delta = region_alloc(&q->region, a->values, sizeof *a->delta, err);
    a->sums = region_alloc(&q->region, 4 * tallest, sizeof *a->sums, err);
    a->remote = q->device.ops->allocate(&q->device, a->values * sizeof *a->remote, err);
    return a->rows && a->raw && a->delta && a->sums && a->remote ? 0 : -1;
}

int qlora_merge(const char *model_dir, const char *adapter_dir, const char *out_dir,
                size_t max_shard_bytes, const qlora_options *options, qlora_merge_report *report,
                qlora_error *err) {
    qlora_model *q = open_handle(model_dir, options, err);
    if (!q) return -1;
    Merger a = {.q = q, .loader = {.options = &q->options, .dev = &q->host, .err = err}};
    q->options.quant = QLORA_QUANT_NONE;                    // 16-bit tensors are merged as they are
    a.loader.files = tensors_open(model_dir, "model.safetensors", &q->allocator, err);
    int bad =
        !a.loader.files || load_adapter(q, adapter_dir, err) ||
        open_text(q, adapter_dir, err) || check_merge(q, out_dir, err) || prepare_merge(&a, err) ||
        write_merged_shards(&a, out_dir, max_size(max_shard_bytes, 1), err) ||
        write_config(out_dir, q->config, NULL, &q->region, err) ||
        (strcmp(model_dir, out_dir) && copy_side_files(model_dir, out_dir, &q->region, err)) ||
        copy_side_files(adapter_dir, out_dir, &q->region, err) ||
        (q->tokenizer && write_added_tokens(q->tokenizer, out_dir, &q->region, err)) ||
        (q->tokenizer && !open_chat(q, NULL) &&
         write_chat_template(&q->chat, out_dir, &q->region, err));
    if (report && !bad)
        *report = (qlora_merge_report){count_parameters(&q->transformer),
                                       a.totals[0] > 0 ? sqrt(a.totals[1] / a.totals[0]) : 0,
                                       a.totals[2] > 0 ? a.totals[3] / a.totals[2] : 0};
    q->device.ops->release(&q->device, a.remote, a.values * sizeof *a.remote);
    tensors_close(a.loader.files);
    qlora_close(q);
    return bad ? -1 : 0;
}
// =================================================================================================
//  14. The trainer
//
//  A step draws batch x accumulation samples, runs them a micro-batch at a time, and applies AdamW
//  to the gradient of their mean loss: the sum over all supervised tokens of the step divided by
//  their number, whatever the micro-batches look like.
// =================================================================================================

qlora_train_options qlora_default_train_options(void) {
    return (qlora_train_options){
        .output_dir = "out", .target_modules = "all-linear", .mask = "content",
        .truncate = "drop", .packing = "none", .lora_r = 16,
        .lora_alpha = 32, .learning_rate = 2e-4f, .warmup_ratio = 0.03f, .max_grad_norm = 1,
        .lr_scheduler_type = "cosine", .num_train_epochs = 3, .per_device_train_batch_size = 4,
        .gradient_accumulation_steps = 4, .max_length = 1024, .val_split = 0.1, .logging_steps = 1,
        .seed = 42};
}

static const char *const quant_names[] = {"none", "nf4", "fp4"};      // by qlora_quant

typedef struct {
    qlora_model *q;
    const qlora_train_options *options;
    DatasetOptions how;                     // the data is read
    bool packing;                           // batches count packs, not samples
    Buffer paths, val_paths;                // of the files: const char *
    Dataset data, val_data;                 // val_data: of files of its own, else empty
    SampleList train, val;                  // val: held out
    Findings findings;                      // of the checks of the data
    Session session;
    Schedule schedule;
    size_t per_step;                        // packs of a step
    size_t steps_per_epoch, steps, warmup;
    size_t step;                            // optimiser steps done
    bool evaluated;                         // what is due after them is in the log
    size_t saved_step;                      // of the newest checkpoint
    size_t best_step;                       // of the checkpoint with the least held-out loss
    double best_loss;                       // INFINITY before the first evaluation
    uint32_t *shuffled;                     // (train.n_packs) this epoch's permutation of the packs
    SampleList epoch;                       // the samples in that order
    SessionShape shape;                     // T, S, n_spans: the most a micro-batch can have
    // Steps whose loss and norm have not been looked at yet: on the CPU none, on a GPU those since
    // the last line of the log, so that no step waits for it.
    size_t window, n_pending;               // the most there can be, how many there are
    qlora_progress *pending;                // (window)
    StepRecord *records, *seen;             // (window) on the device, on the host
    real *nll;                              // (S) what an evaluation looks at, on the host
    uint8_t *hit;                           // (S)
    Buffer log;                             // text of log.jsonl
    Buffer checkpoints;                     // list_checkpoints: their steps (size_t), ascending
    double log_written, window_began;       // seconds
    char settings[1024];                    // all that decides the result, as text
    Region region;
    qlora_error *err;
} Trainer;

static int check_train_options(const qlora_train_options *o, qlora_error *err) {
    const struct { const char *name; double value, least, most; } ranges[] = {
        {"lora_r", (double)o->lora_r, 1, 4096}, {"lora_alpha", (double)o->lora_alpha, 1e-6, 1e6},
        {"lora_dropout", (double)o->lora_dropout, 0, 0.99},
        {"learning_rate", (double)o->learning_rate, 0, 1e3},
        {"warmup_ratio", (double)o->warmup_ratio, 0, 1},
        {"max_grad_norm", (double)o->max_grad_norm, 1e-9, 1e9},
        {"weight_decay", (double)o->weight_decay, 0, 1e3},
        {"num_train_epochs", o->num_train_epochs, 1e-6, 1e6},
        {"per_device_train_batch_size", (double)o->per_device_train_batch_size, 1, 1 << 16},
        {"gradient_accumulation_steps", (double)o->gradient_accumulation_steps, 1, 1 << 16},
        {"max_length", (double)o->max_length, 2, 1 << 24}, {"val_split", o->val_split, 0, 0.9},
        {"logging_steps", (double)o->logging_steps, 1, 1 << 30}};
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (!(ranges[i].value >= ranges[i].least && ranges[i].value <= ranges[i].most))
            return fail(err, "%s: expected %g to %g, found %g", ranges[i].name, ranges[i].least,
                        ranges[i].most, ranges[i].value);
    return 0;
}

// Which of the names an option has.
static int choose(const char *const *names, size_t n, const char *name, const char *option,
                  int *out, qlora_error *err) {
    for (*out = 0; (size_t)*out < n; ++*out)
        if (strcmp(names[*out], name) == 0) return 0;
    char list[256] = "";
    for (size_t i = 0; i < n; i++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", i ? ", " : "", names[i]);
    return fail(err, "%s: expected one of %s, found %s", option, list, name);
}

// The most tokens, supervised tokens and samples that any `batch` packs of one list have together.
static int largest_batch(Trainer *t, const SampleList *list, size_t batch) {
    size_t *sizes = region_alloc(&t->region, list->n_packs, sizeof *sizes, t->err);
    size_t *most[3] = {&t->shape.T, &t->shape.S, &t->shape.n_spans};
    if (!sizes) return -1;
    for (int kind = 0; kind < 3; kind++) {
        size_t sum = 0;
        for (size_t p = 0; p < list->n_packs; p++) {
            sizes[p] = 0;
            for (size_t i = list->pack[p]; i < list->pack[p + 1]; i++) {
                const Sample *sample = &list->data->samples[list->index[i]];
                sizes[p] += kind == 0 ? sample->length : kind == 1 ? sample->supervised : 1;
            }
        }
        qsort(sizes, list->n_packs, sizeof *sizes, by_number);
        for (size_t p = 0; p < min_size(batch, list->n_packs); p++)
            sum += sizes[list->n_packs - 1 - p];
        *most[kind] = max_size(*most[kind], sum);
    }
    return 0;
}

// Fisher and Yates, from numbers that depend on seed and epoch alone.
static void shuffle(uint32_t *order, size_t n, uint64_t seed, size_t epoch) {
    for (size_t i = 0; i < n; i++) order[i] = (uint32_t)i;
    for (size_t i = n; i-- > 1;) {
        uint32_t bits = random_u32(seed, RANDOM_SHUFFLE, (uint32_t)epoch, i);
        size_t j = (size_t)((uint64_t)bits * (i + 1) >> 32);
        uint32_t swapped = order[i];
        order[i] = order[j];
        order[j] = swapped;
    }
}

// The packs of an epoch in their order, and the samples pack by pack.
static void order_epoch(Trainer *t, size_t epoch) {
    const SampleList *list = &t->train;
    t->epoch.n = t->epoch.n_packs = 0;
    shuffle(t->shuffled, list->n_packs, t->options->seed, epoch);
    for (size_t p = 0; p < list->n_packs; p++) {
        size_t pack = t->shuffled[p];
        for (size_t i = list->pack[pack]; i < list->pack[pack + 1]; i++)
            t->epoch.index[t->epoch.n++] = list->index[i];
        t->epoch.pack[++t->epoch.n_packs] = t->epoch.n;
    }
}

// Lays n samples end to end. `ordinal` numbers them within the step.
static LabelledBatch make_batch(Trainer *t, const Dataset *data, const uint32_t *samples, size_t n,
                                size_t ordinal, size_t step, bool training) {
    const BatchArrays *here = &t->session.here, *there = &t->session.there;
    size_t T = 0, S = 0, longest = 0, most_rows = 0;
    for (size_t i = 0; i < n; i++) {
        const Sample *sample = &data->samples[samples[i]];
        size_t rows = 0;
        memcpy(here->ids + T, data->ids + sample->first, sample->length * sizeof *here->ids);
        for (size_t k = 0; k < sample->length; k++) {
            here->position[T + k] = (int32_t)k;
            if (k == 0 || !data->learn[sample->first + k]) continue;
            here->supervised[S + rows] = (int32_t)(T + k - 1);   // the token before predicts it
            here->target[S + rows] = data->ids[sample->first + k];
            rows++;
        }
        uint32_t number = (uint32_t)(ordinal + i);
        here->spans[i] = (Span){T, sample->length, T, sample->length, number};
        here->row_spans[i] = (Span){S, rows, S, rows, number};
        T += sample->length;
        S += rows;
        longest = max_size(longest, sample->length);
        most_rows = max_size(most_rows, rows);
    }
    upload_batch(&t->session);
    Batch batch = {.T = T, .n_spans = n, .most_queries = longest, .most_keys = longest,
                   .spans = there->spans, .position = there->position, .seed = t->options->seed,
                   .step = (uint32_t)step, .training = training};
    Batch rows = batch;
    rows.T = S;
    rows.most_queries = rows.most_keys = most_rows;
    rows.spans = there->row_spans;
    return (LabelledBatch){batch, rows, there->ids, there->supervised, there->target};
}

static double now_seconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

// What makes a step's loss or gradient useless is reported with the samples it came from.
static int not_finite(Trainer *t, const char *what, size_t step) {
    const SampleList *list = &t->epoch;
    size_t pack = step % t->steps_per_epoch * t->per_step;
    size_t end = list->pack[min_size(pack + t->per_step, list->n_packs)];
    char lines[400] = "";
    uint32_t file = UINT32_MAX;             // named where it changes
    for (size_t i = list->pack[pack]; i < end && strlen(lines) < 300; i++) {
        const Sample *sample = &t->data.samples[list->index[i]];
        snprintf(lines + strlen(lines), sizeof lines - strlen(lines), "%s%s%s%zu",
                 *lines ? ", " : "", sample->file == file ? "" : t->data.paths[sample->file],
                 sample->file == file ? "" : " ", sample->line);
        file = sample->file;
    }
    return fail(t->err, "step %zu: the %s is not a finite number and was not applied; samples of "
                "lines %s; try a lower --learning-rate or --compute f32", step + 1, what, lines);
}

static bool should_stop(const qlora_model *q) {
    return q->options.stop && q->options.stop(q->options.stop_user);
}

__attribute__((format(printf, 2, 3)))
static void tell(const qlora_train_options *o, const char *format, ...) {
    char line[1024];
    va_list args;
    if (!o->message) return;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    o->message(o->user, line);
}

enum { STOPPED = 1 };                       // the stop callback asked for it: no error yet
enum { MAX_PENDING = 1024 };

// The next optimiser step, over packs of this epoch. Nothing is changed when it is stopped, or when
// its loss or gradient is not finite, which read_back finds out.
static int train_step(Trainer *t) {
    const qlora_train_options *o = t->options;
    Transformer *m = &t->q->transformer;
    Device *dev = m->dev;
    size_t step = t->step, batch = o->per_device_train_batch_size;
    size_t skipped = step % t->steps_per_epoch * t->per_step;
    size_t n = min_size(t->per_step, t->train.n_packs - skipped);
    const size_t *pack = t->epoch.pack + skipped;
    const uint32_t *samples = t->epoch.index + pack[0];
    StepRecord *record = &t->records[t->n_pending];
    qlora_progress *p = &t->pending[t->n_pending];
    *p = (qlora_progress){
        .step = step + 1, .steps = t->steps,
        .epoch = (double)(step + 1) / (double)t->steps_per_epoch,
        .learning_rate = (double)o->learning_rate *
                         schedule_factor(t->schedule, step, t->steps, t->warmup)};
    for (size_t i = 0; i < pack[n] - pack[0]; i++) {
        p->supervised += t->data.samples[samples[i]].supervised;
        p->tokens += t->data.samples[samples[i]].length;
    }
    dev->ops->zero(dev, m->gradients, m->n_parameters * sizeof(real));
    dev->ops->zero(dev, record, sizeof *record);
    for (size_t at = 0; at < n; at += batch) {
        size_t first = pack[at] - pack[0], end = pack[min_size(at + batch, n)] - pack[0];
        LabelledBatch labelled = make_batch(t, &t->data, samples + first, end - first, first, step,
                                            true);
        loss_and_gradients(m, &t->session.w, &labelled, &record->loss, 1 / (real)p->supervised,
                           true);
        if (should_stop(t->q)) return STOPPED;
    }
    dev->ops->clip_gradient(dev, record, t->n_pending ? record - 1 : NULL, m->gradients,
                            m->n_parameters, (real)o->max_grad_norm);
    dev->ops->adamw(dev, m->parameters, m->gradients, m->moment1, m->moment2, m->n_parameters,
                    (real)p->learning_rate, (real)0.9, (real)0.999, (real)1e-8,
                    (real)o->weight_decay, record, step + 1);
    t->step++;
    t->n_pending++;
    t->evaluated = false;
    return 0;
}

// -------------------------------------------------------------------------------------- evaluation

// Scores the samples. Sums go over the supervised tokens in the order of the list: the same for
// every batch size.
static int evaluate(Trainer *t, const SampleList *list, qlora_score *score) {
    Workspace *w = &t->session.w;
    Device *dev = &t->q->device;
    size_t batch = t->options->per_device_train_batch_size, hits = 0;
    double sum = 0, squares = 0;
    *score = (qlora_score){.samples = list->n};
    for (size_t at = 0; at < list->n; at += batch) {
        LabelledBatch labelled = make_batch(t, list->data, list->index + at,
                                            min_size(batch, list->n - at), 0, 0, false);
        loss_and_gradients(&t->q->transformer, w, &labelled, NULL, 0, false);
        size_t S = labelled.rows.T;
        const real *nll = seen(dev, t->nll, w->nll, S * sizeof *nll);
        const uint8_t *hit = seen(dev, t->hit, w->hit, S);
        if (dev->ops->check(dev, t->err)) return -1;
        for (size_t s = 0; s < S; s++) {
            sum += (double)nll[s];
            squares += (double)nll[s] * (double)nll[s];
            hits += hit[s];
        }
        score->tokens += S;
        if (should_stop(t->q)) return STOPPED;
    }
    double n = (double)score->tokens;
    score->loss = sum / n;
    score->perplexity = exp(score->loss);
    score->accuracy = (double)hits / n;
    // Of the mean over tokens, as if they were independent.
    if (n > 1)
        score->standard_error = sqrt(fmax(0, squares / n - score->loss * score->loss) / (n - 1));
    return 0;
}

// A text callback: appends to the Buffer `user`.
static int collect_text(void *user, const char *utf8, size_t n) {
    return buffer_append(user, utf8, n, NULL) ? 1 : 0;
}

// The last user turn of a rendered prompt, without the strings of the template around it.
static void last_question(const ChatTemplate *c, Buffer *text) {
    const TurnForm *user = &c->turns[ROLE_USER];
    const char *before = user->before + (*user->before == *BOS), *after = user->end;
    char *start = text->data, *next = start;
    if (!*after || *after == *EOS) after = *after ? c->eos : user->after;
    while (*before && (next = strstr(next, before)) != NULL) start = next += strlen(before);
    char *end = *after ? strstr(start, after) : NULL;
    if (end) *end = 0;
    memmove(text->data, start, strlen(start) + 1);
}

// Shows what the model says to a sample's question beside the expected answer. The question is what
// comes before the last run of learnt tokens, the answer that run.
static int show_sample(Trainer *t, const SampleList *list, size_t i, const char *kind) {
    const Sample *sample = &list->data->samples[list->index[i]];
    const int32_t *ids = list->data->ids + sample->first;
    const uint8_t *learn = list->data->learn + sample->first;
    size_t end = sample->length, start;
    while (end && !learn[end - 1]) end--;
    for (start = end; start && learn[start - 1]; start--) {}
    if (start < 2) return 0;                                  // all is learnt: there is no question
    Buffer question = {.allocator = &t->q->allocator}, expected = question, answer = question;
    const Tokenizer *tokenizer = t->q->tokenizer;
    qlora_sampling how = {.max_new_tokens = min_size(2 * (end - start) + 8, 64), .top_p = 1,
                          .repetition_penalty = 1};
    int bad = tokenizer_decode(tokenizer, ids, start, false, &question, t->err) ||
              buffer_append(&question, "", 1, t->err) ||
              tokenizer_decode(tokenizer, ids + start, end - start, true, &expected, t->err) ||
              qlora_generate(t->q, ids, start, &how, collect_text, &answer, NULL, NULL, t->err);
    if (!bad) {
        last_question(&t->q->chat, &question);
        tell(t->options, "  %s, %s:%zu: %.400s", kind, list->data->paths[sample->file],
             sample->line, question.data);
        tell(t->options, "    expected: %.*s", (int)min_size(expected.size, 400), expected.data);
        tell(t->options, "    answers:  %.*s", (int)min_size(answer.size, 400), answer.data);
    }
    buffer_free(&question);
    buffer_free(&expected);
    buffer_free(&answer);
    return bad ? -1 : 0;
}

static int show_samples(Trainer *t) {
    if (!t->options->message) return 0;
    if (show_sample(t, &t->train, 0, "training sample")) return -1;
    for (size_t i = 0; i < min_size(t->val.n, 2); i++)
        if (show_sample(t, &t->val, i, "held-out sample")) return -1;
    return 0;
}

// ------------------------------------------------------------------- log.jsonl, loss.svg, run.json

// log.jsonl is rewritten whole, at most every two seconds unless `now`.
static int write_log(Trainer *t, bool now) {
    if (!t->options->output_dir || (!now && now_seconds() - t->log_written < 2)) return 0;
    t->log_written = now_seconds();
    return write_file(path_join(&t->region, t->options->output_dir, "log.jsonl", t->err),
                      t->log.data ? t->log.data : "", t->log.size, t->err);
}

// The next line of a text, which *at moves behind; NULL at the end.
static const char *next_line(const Buffer *text, size_t *at, size_t *n) {
    if (*at >= text->size) return NULL;
    const char *line = text->data + *at, *end = memchr(line, '\n', text->size - *at);
    *n = end ? (size_t)(end - line) : text->size - *at;
    *at += *n + 1;
    return line;
}

// Goes through the values that the log has for the key: without `svg` for the highest of them, with
// it to append them as the points of a curve.
static int plot_values(Trainer *t, Buffer *svg, const char *key, double *highest) {
    Region region = {.allocator = &t->q->allocator};
    const char *line;
    double step, value;
    size_t n;
    int bad = 0;
    for (size_t at = 0; !bad && (line = next_line(&t->log, &at, &n)) != NULL;) {
        const Json *json = json_parse(line, n, "log.jsonl", 1, &region, t->err);
        if (!json) bad = -1;
        else if (json_to_double(json_get(json, key), &value) &&
                 json_to_double(json_get(json, "step"), &step)) {
            if (!svg) *highest = fmax(*highest, value);
            else bad = buffer_printf(svg, t->err, "%.1f,%.1f ", 50 + 730 * step / (double)t->steps,
                                     370 - 340 * value / *highest);
        }
        region_free(&region);
    }
    return bad;
}

static int write_plot(Trainer *t) {
    static const struct { const char *key, *name, *colour; } curves[] = {
        {"loss", "training loss", "steelblue"}, {"eval_loss", "held-out loss", "firebrick"}};
    double highest = 1e-3;
    Buffer svg = {.allocator = &t->q->allocator};
    int bad = plot_values(t, NULL, "loss", &highest) ||
              plot_values(t, NULL, "eval_loss", &highest) ||
              buffer_printf(&svg, t->err,
                            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"800\" "
                            "height=\"400\" font-family=\"sans-serif\" font-size=\"12\">\n"
                            "<rect width=\"800\" height=\"400\" fill=\"white\"/>\n"
                            "<path d=\"M50 20V370H780\" fill=\"none\" stroke=\"black\"/>\n"
                            "<text x=\"10\" y=\"34\">%.2f</text><text x=\"30\" y=\"374\">0</text>"
                            "<text x=\"750\" y=\"390\">step %zu</text>\n", highest, t->steps);
    for (int k = 0; k < 2; k++)
        bad = bad ||
              buffer_printf(&svg, t->err, "<text x=\"600\" y=\"%d\" fill=\"%s\">%s</text>\n"
                            "<polyline fill=\"none\" stroke=\"%s\" points=\"", 30 + 16 * k,
                            curves[k].colour, curves[k].name, curves[k].colour) ||
              plot_values(t, &svg, curves[k].key, &highest) ||
              buffer_printf(&svg, t->err, "\"/>\n");
    bad = bad || buffer_printf(&svg, t->err, "</svg>\n");
    return write_buffer(path_join(&t->region, t->options->output_dir, "loss.svg", t->err), &svg,
                        bad, t->err);
}

// Of what is trained on: ids, masks and lengths.
static uint64_t data_hash(const Trainer *t) {
    uint64_t hash = 1;
    const Dataset *sets[2] = {&t->data, &t->val_data};
    for (int i = 0; i < 2; i++) {
        hash = checksum(hash, sets[i]->ids, sets[i]->tokens * sizeof(int32_t));
        hash = checksum(hash, sets[i]->learn, sets[i]->tokens);
        for (size_t k = 0; k < sets[i]->n; k++)
            hash = checksum(hash, &sets[i]->samples[k].length, sizeof(size_t));
    }
    return hash;
}

// All that decides the bits of the result. The split of a step into micro-batches does not, nor do
// threads and memory.
static void describe_settings(Trainer *t) {
    const qlora_train_options *o = t->options;
    const Weight *w = &t->q->transformer.layers[0].linear[0].weight;
    snprintf(t->settings, sizeof t->settings,
             "lora_r=%zu lora_alpha=%.9g lora_dropout=%.9g target_modules=%s learning_rate=%.9g "
             "lr_scheduler_type=%s warmup=%zu max_grad_norm=%.9g weight_decay=%.9g steps=%zu "
             "samples_per_step=%zu seed=%llu quant=%d double_quant=%d compute=%s packing=%zu "
             "data=%016llx",
             o->lora_r, (double)o->lora_alpha, (double)o->lora_dropout, o->target_modules,
             (double)o->learning_rate, o->lr_scheduler_type, t->warmup, (double)o->max_grad_norm,
             (double)o->weight_decay, t->steps,
             t->per_step, (unsigned long long)o->seed, (int)w->dtype, w->absmax8 != NULL,
             t->q->device.act == DT_BF16 ? "bf16" : "f32", t->packing ? t->how.max_length : 0,
             (unsigned long long)data_hash(t));
}

// A Buffer of paths as an array.
static const char *const *path_list(const Buffer *paths) {
    return (const char *const *)(const void *)paths->data;
}

// Enough to repeat the run, and to open the adapter in the quantisation it was trained in.
static int write_run(Trainer *t, const char *directory) {
    const qlora_train_options *o = t->options;
    const Weight *w = &t->q->transformer.layers[0].linear[0].weight;
    qlora_quant quant = w->dtype == DT_NF4 ? QLORA_QUANT_NF4
                      : w->dtype == DT_FP4 ? QLORA_QUANT_FP4 : QLORA_QUANT_NONE;
    const struct { const char *key, *text; } texts[] = {
        {"version", QLORA_VERSION}, {"command", o->command_line ? o->command_line : ""},
        {"model", t->q->directory}, {"template", t->q->chat.row->name},
        {"quant", quant_names[quant]}, {"settings", t->settings}};
    const char *const *data = path_list(&t->paths);
    Buffer b = {.allocator = &t->q->allocator};
    int bad = buffer_printf(&b, t->err, "{\n");
    for (size_t i = 0; i < sizeof texts / sizeof *texts && !bad; i++)
        bad = buffer_printf(&b, t->err, "  \"%s\": ", texts[i].key) ||
              json_write_string(&b, texts[i].text, strlen(texts[i].text), t->err) ||
              buffer_printf(&b, t->err, ",\n");
    for (size_t i = 0; i < t->paths.size / sizeof *data && !bad; i++)
        bad = buffer_printf(&b, t->err, i ? ", " : "  \"data\": [") ||
              json_write_string(&b, data[i], strlen(data[i]), t->err);
    bad = bad || buffer_printf(&b, t->err, "],\n  \"double_quant\": %s,\n  \"seed\": %llu\n}\n",
                               w->absmax8 ? "true" : "false", (unsigned long long)o->seed);
    return write_buffer(path_join(&t->region, directory, "run.json", t->err), &b, bad, t->err);
}

// ------------------------------------------------------------------------------------- checkpoints
//
// checkpoint-N is a complete adapter directory and state.bin: StateHead, a text (a line of JSON,
// then the log so far), parameters and both moments (float32), and a checksum over all of it. Each
// part is a multiple of 8 bytes long, as the checksum wants it. The directory is filled under
// another name and renamed when everything in it is on the disk. Since all random numbers are
// functions of seed and step, nothing else is needed to go on as if never stopped.

typedef struct { char magic[8]; uint64_t text; } StateHead;           // text: its bytes
static const char state_magic[8] = {'Q', 'L', 'O', 'R', 'A', 'C', 'K', '2'};

static int write_state(Trainer *t, const char *path) {
    const Transformer *m = &t->q->transformer;
    const real *values[] = {m->parameters, m->moment1, m->moment2};
    Writer w;
    StateHead head;
    Buffer text = {.allocator = &t->q->allocator};
    double best = isfinite(t->best_loss) ? t->best_loss : -1;
    int bad = buffer_printf(&text, t->err, "{\"step\": %zu, \"evaluated\": %s, \"best_step\": %zu, "
                            "\"best_loss\": %.17g, \"settings\": ", t->step,
                            t->evaluated ? "true" : "false", t->best_step, best) ||
              json_write_string(&text, t->settings, strlen(t->settings), t->err);
    size_t more = text.size + 2 + t->log.size;
    bad = bad || buffer_printf(&text, t->err, "%*s}\n", (int)(round_up(more, 8) - more), "") ||
          buffer_append(&text, t->log.data, t->log.size, t->err) || writer_open(&w, path, t->err);
    if (!bad) {
        memcpy(head.magic, state_magic, sizeof state_magic);
        head.text = text.size;
        uint64_t hash = checksum(checksum(1, &head, sizeof head), text.data, text.size);
        bad = writer_write(&w, &head, sizeof head) || writer_write(&w, text.data, text.size);
        for (int i = 0; i < 3; i++)
            bad = bad || write_parameters(&w, &hash, m->dev, values[i], m->n_parameters);
        bad = writer_close(&w, bad || writer_write(&w, &hash, sizeof hash));
    }
    buffer_free(&text);
    return bad ? -1 : 0;
}

static int save_outputs(Trainer *t, const char *directory) {
    return qlora_save_adapter(t->q, directory, t->err) ||
           copy_side_files(t->q->directory, directory, &t->region, t->err) ||
           write_added_tokens(t->q->tokenizer, directory, &t->region, t->err) ||
           copy_file(t->q->directory, directory, "config.json", &t->region, t->err) ||
           write_chat_template(&t->q->chat, directory, &t->region, t->err) ||
           write_run(t, directory) ? -1 : 0;
}

// Removes a directory of plain files.
static void remove_directory(const char *path, Region *region) {
    DIR *directory = opendir(path);
    struct dirent *entry;
    while (directory && (entry = readdir(directory)) != NULL) {
        const char *file = path_join(region, path, entry->d_name, NULL);
        if (file && entry->d_name[0] != '.') unlink(file);
    }
    if (directory) closedir(directory);
    rmdir(path);
}

// Fills t->checkpoints. Also removes what a killed run left half done.
static int list_checkpoints(Trainer *t) {
    const char *directory = t->options->output_dir;
    DIR *open_directory = opendir(directory);
    struct dirent *entry;
    int bad = 0;
    t->checkpoints.size = 0;
    while (open_directory && !bad && (entry = readdir(open_directory)) != NULL) {
        char *end;
        if (strncmp(entry->d_name, "checkpoint-", 11)) continue;
        size_t step = strtoull(entry->d_name + 11, &end, 10);
        if (strcmp(end, ".tmp") == 0) {
            const char *left = path_join(&t->region, directory, entry->d_name, t->err);
            if (left) remove_directory(left, &t->region);
        } else if (!*end) bad = buffer_append(&t->checkpoints, &step, sizeof step, t->err);
    }
    if (open_directory) closedir(open_directory);
    if (t->checkpoints.size)
        qsort(t->checkpoints.data, t->checkpoints.size / sizeof(size_t), sizeof(size_t), by_number);
    return bad;
}

static const char *checkpoint_path(Trainer *t, size_t step, const char *suffix) {
    char name[64];
    snprintf(name, sizeof name, "checkpoint-%zu%s", step, suffix);
    return path_join(&t->region, t->options->output_dir, name, t->err);
}

// Removes all checkpoints but the newest `keep` and the best one.
static int remove_checkpoints(Trainer *t, size_t keep) {
    if (list_checkpoints(t)) return -1;
    const size_t *steps = (const size_t *)(const void *)t->checkpoints.data;
    for (size_t n = t->checkpoints.size / sizeof *steps, i = 0; i + keep < n; i++) {
        const char *path = checkpoint_path(t, steps[i], "");
        if (path && steps[i] != t->best_step) remove_directory(path, &t->region);
    }
    return 0;
}

static int save_checkpoint(Trainer *t) {
    if (!t->options->output_dir || t->saved_step == t->step || t->step == 0) return 0;
    const char *building = checkpoint_path(t, t->step, ".tmp"),
               *path = checkpoint_path(t, t->step, "");
    const char *state = building ? path_join(&t->region, building, "state.bin", t->err) : NULL;
    if (!path || !state || save_outputs(t, building) || write_state(t, state)) return -1;
    if (rename(building, path) && (errno == EEXIST || errno == ENOTEMPTY)) {
        remove_directory(path, &t->region);                   // an older run's, or a damaged one
        if (rename(building, path))
            return fail(t->err, "%s: cannot rename: %s", path, strerror(errno));
    }
    sync_directory(path);
    t->saved_step = t->step;
    size_t limit = t->options->save_total_limit;
    return (limit && remove_checkpoints(t, limit)) || write_log(t, true);
}

enum { DAMAGED = 1 };

// Continues from the state in a file if it belongs to this run. DAMAGED if any byte of it is wrong.
static int read_state(Trainer *t, const char *path, Buffer *file, Region *region) {
    Transformer *m = &t->q->transformer;
    real *const to[] = {m->parameters, m->moment1, m->moment2};
    StateHead head;
    uint64_t stored;
    size_t bytes = m->n_parameters * sizeof(real);
    if (read_whole_file(path, SIZE_MAX / 4, file, NULL) ||
        file->size < sizeof head + sizeof stored)
        return DAMAGED;
    const char *text = file->data + sizeof head, *end = file->data + file->size - sizeof stored;
    memcpy(&head, file->data, sizeof head);
    memcpy(&stored, end, sizeof stored);
    if (memcmp(head.magic, state_magic, sizeof state_magic) || head.text > (size_t)(end - text) ||
        checksum(1, file->data, (size_t)(end - file->data)) != stored)
        return DAMAGED;
    const char *values = text + head.text, *log = memchr(text, '\n', (size_t)head.text);
    const Json *json = log ? json_parse(text, (size_t)(log - text), path, 1, region, NULL) : NULL;
    if (!json) return DAMAGED;
    const char *settings = json_get_text(json, "settings");
    if (!settings || strcmp(settings, t->settings)) {
        size_t i = 0;
        while (settings && settings[i] && settings[i] == t->settings[i]) i++;
        while (i && t->settings[i - 1] != ' ') i--;
        return fail(t->err,
                    "%s: this run was started with other settings: %.60s..., now %.60s...; resume "
                    "with the same ones",
                    path, settings ? settings + i : "none", t->settings + i);
    }
    if ((size_t)(end - values) != 3 * bytes || !json_to_size(json_get(json, "step"), &t->step) ||
        t->step > t->steps || !json_to_size(json_get(json, "best_step"), &t->best_step))
        return fail(t->err, "%s: does not fit this model", path);
    t->evaluated = json_get_bool(json, "evaluated", true);
    json_to_double(json_get(json, "best_loss"), &t->best_loss);
    if (t->best_loss < 0) t->best_loss = INFINITY;
    for (size_t i = 0; i < 3; i++) upload(m->dev, to[i], values + i * bytes, bytes);
    t->saved_step = t->step;
    return buffer_append(&t->log, log + 1, (size_t)(values - log - 1), t->err);
}

// Goes on from the newest good checkpoint; damaged ones are passed over, and said so.
static int resume(Trainer *t) {
    if (list_checkpoints(t)) return -1;
    const size_t *steps = (const size_t *)(const void *)t->checkpoints.data;
    int state = DAMAGED;
    for (size_t i = t->checkpoints.size / sizeof *steps; state == DAMAGED && i-- > 0;) {
        Region region = {.allocator = &t->q->allocator};
        Buffer file = {.allocator = &t->q->allocator};
        const char *path = checkpoint_path(t, steps[i], "/state.bin");
        state = path ? read_state(t, path, &file, &region) : -1;
        if (state == DAMAGED)
            tell(t->options, "%s is damaged; trying the checkpoint before it", path);
        buffer_free(&file);
        region_free(&region);
    }
    if (!state) tell(t->options, "resuming after step %zu of %zu", t->step, t->steps);
    if (state == DAMAGED)
        tell(t->options, "no checkpoint in %s yet: starting at the beginning",
             t->options->output_dir);
    return state < 0 ? -1 : 0;
}

// ----------------------------------------------------------------------------------- the main loop

static int log_step(Trainer *t, const qlora_progress *p) {
    const qlora_train_options *o = t->options;
    if (p->step % o->logging_steps && p->step != p->steps) return 0;
    if (o->progress) o->progress(o->user, p);
    return buffer_printf(&t->log, t->err,
                         "{\"step\": %zu, \"epoch\": %.4f, \"loss\": %.6f, \"grad_norm\": "
                         "%.6f, \"learning_rate\": %.9g, \"num_tokens\": %zu}\n",
                         p->step, p->epoch, p->loss, p->grad_norm, p->learning_rate, p->tokens) ||
           write_log(t, false);
}

// Looks at the steps that are pending: logs them, or says which one went wrong. All of them belong
// to this epoch.
static int read_back(Trainer *t) {
    Device *dev = &t->q->device;
    size_t n = t->n_pending;
    if (!n) return 0;
    t->n_pending = 0;
    dev->ops->download(dev, t->seen, t->records, n * sizeof *t->seen);
    if (dev->ops->check(dev, t->err)) return -1;
    double now = now_seconds(), seconds = (now - t->window_began) / (double)n;
    t->window_began = now;
    for (size_t i = 0; i < n; i++) {
        const StepRecord *record = &t->seen[i];
        qlora_progress *p = &t->pending[i];
        p->loss = record->loss / (double)p->supervised;
        p->grad_norm = sqrt(record->squares);
        p->seconds = seconds;
        if (record->refused)
            return not_finite(t, isfinite(record->loss) ? "gradient" : "loss", p->step - 1);
        if (log_step(t, p)) return -1;
    }
    return 0;
}

// Scores the held-out samples, if there are any, and remembers the best step.
static int evaluate_and_log(Trainer *t) {
    qlora_score s;
    if (!t->val.n) return 0;
    int stopped = evaluate(t, &t->val, &s);
    if (stopped) return stopped;
    tell(t->options,
         "held-out loss %.4f +- %.4f, perplexity %.2f, %.1f %% of tokens right (step %zu)", s.loss,
         s.standard_error, s.perplexity, 100 * s.accuracy, t->step);
    if (s.loss < t->best_loss && t->step) {
        t->best_loss = s.loss;
        t->best_step = t->step;
    }
    return buffer_printf(&t->log, t->err, "{\"step\": %zu, \"epoch\": %.4f, \"eval_loss\": %.6f, "
                         "\"eval_mean_token_accuracy\": %.6f}\n", t->step,
                         (double)t->step / (double)t->steps_per_epoch, s.loss, s.accuracy);
}

// Stopping keeps the last completed step.
static int stopped(Trainer *t) {
    if (read_back(t) || save_checkpoint(t)) return -1;
    if (!t->options->output_dir) return fail(t->err, "stopped after step %zu", t->step);
    return fail(t->err, "stopped after step %zu of %zu; continue with --resume %s", t->step,
                t->steps, t->options->output_dir);
}

// What is due when t->step steps are done: evaluation, a checkpoint, samples to look at. A resumed
// run comes here first, so that an evaluation that was stopped is made up for.
static int after_step(Trainer *t) {
    const qlora_train_options *o = t->options;
    size_t step = t->step;
    bool epoch_ends = step % t->steps_per_epoch == 0 || step == t->steps;
    bool evaluates = !t->evaluated && (epoch_ends || (o->eval_steps && step % o->eval_steps == 0));
    bool saves = o->save_steps ? step % o->save_steps == 0 || step == t->steps : epoch_ends;
    int bad = 0;
    if ((epoch_ends || evaluates || saves || t->n_pending == t->window) && read_back(t)) return -1;
    if (evaluates) bad = evaluate_and_log(t);
    if (bad) return bad;
    t->evaluated = true;
    if (saves) bad = save_checkpoint(t);
    if (!bad && epoch_ends) bad = show_samples(t);
    return bad ? bad : step < t->steps && should_stop(t->q) ? STOPPED : 0;
}

static int train_loop(Trainer *t) {
    size_t epoch = SIZE_MAX;
    int bad;
    while (!(bad = after_step(t)) && t->step < t->steps) {
        if (t->step / t->steps_per_epoch != epoch) {
            epoch = t->step / t->steps_per_epoch;
            order_epoch(t, epoch);
        }
        if (!t->n_pending) t->window_began = now_seconds();
        bad = train_step(t);
        if (bad) break;
    }
    return bad == STOPPED ? stopped(t) : bad;
}

// --------------------------------------------------------------------------------------- preparing

// A list with room for n samples, each a pack of its own.
static int new_list(Trainer *t, SampleList *list, const Dataset *data, size_t n) {
    *list = (SampleList){data, region_alloc(&t->region, n, sizeof *list->index, t->err),
                         region_alloc(&t->region, n + 1, sizeof *list->pack, t->err), 0, 0};
    return list->index && list->pack ? 0 : -1;
}

static void list_sample(SampleList *list, size_t i) {
    list->index[list->n] = (uint32_t)i;
    list->pack[++list->n] = ++list->n_packs;
}

// Holds out a share of the samples, chosen by the seed alone, or takes all of the files for it.
static int split_samples(Trainer *t) {
    const qlora_train_options *o = t->options;
    bool files = t->val_paths.size > 0;
    size_t n = t->data.n, held = files ? 0 : (size_t)((double)n * o->val_split + 0.5);
    uint32_t *order = region_alloc(&t->region, n, sizeof *order, t->err);
    uint8_t *is_held = region_alloc(&t->region, n, 1, t->err);
    held = n ? min_size(held, n - 1) : 0;
    if (!order || !is_held || new_list(t, &t->train, &t->data, n) ||
        new_list(t, &t->val, files ? &t->val_data : &t->data, files ? t->val_data.n : held))
        return -1;
    shuffle(order, n, o->seed, UINT32_MAX);
    for (size_t i = 0; i < held; i++) is_held[order[i]] = 1;
    for (size_t i = 0; i < n; i++) list_sample(is_held[i] ? &t->val : &t->train, i);
    for (size_t i = 0; i < t->val_data.n; i++) list_sample(&t->val, i);
    if (!t->packing || !n) return 0;
    memset(t->train.pack, 0, (n + 1) * sizeof *t->train.pack);
    return pack_samples(&t->train, t->how.max_length, &t->region, t->err);
}

static int prepare_training(Trainer *t) {
    const qlora_train_options *o = t->options;
    size_t batch = min_size(o->per_device_train_batch_size, max_size(t->train.n, t->val.n));
    t->per_step = o->per_device_train_batch_size * o->gradient_accumulation_steps;
    t->steps_per_epoch = ceil_div(t->train.n_packs, t->per_step);
    double steps = ceil(o->num_train_epochs * (double)t->steps_per_epoch - 1e-9);
    t->steps = o->max_steps ? o->max_steps : (size_t)fmin(steps, 1e9);
    t->warmup = (size_t)ceil((double)o->warmup_ratio * (double)t->steps - 1e-9);
    t->best_loss = INFINITY;
    t->window = t->q->device.ops->host ? 1 : min_size(o->logging_steps, MAX_PENDING);
    if (largest_batch(t, &t->train, batch) || largest_batch(t, &t->val, batch) ||
        new_list(t, &t->epoch, &t->data, t->train.n))
        return -1;
    t->shape.max_span = t->shape.T;
    t->shape.training = true;
    t->shuffled = region_alloc(&t->region, t->train.n_packs, sizeof *t->shuffled, t->err);
    t->nll = region_alloc(&t->region, t->shape.S, sizeof *t->nll, t->err);
    t->hit = region_alloc(&t->region, t->shape.S, 1, t->err);
    t->pending = region_alloc(&t->region, t->window, sizeof *t->pending, t->err);
    t->seen = region_alloc(&t->region, t->window, sizeof *t->seen, t->err);
    return t->shuffled && t->nll && t->hit && t->pending && t->seen ? 0 : -1;
}

// Before anything long begins: can the output be written, and is nothing of the user's overwritten?
static int check_output(Trainer *t) {
    const qlora_train_options *o = t->options;
    if (!o->output_dir) return 0;
    if (make_directory(o->output_dir, t->err)) return -1;
    bool has_run = directory_has(o->output_dir, "adapter_model.safetensors");
    if (list_checkpoints(t)) return -1;
    if (o->overwrite_output_dir && remove_checkpoints(t, 0)) return -1;
    if (!o->overwrite_output_dir && !o->resume && (has_run || t->checkpoints.size))
        return fail(t->err, "%s: there is a run in this directory already; continue it with "
                    "--resume %s, choose another with --output, or give --overwrite-output-dir",
                    o->output_dir, o->output_dir);
    return access(o->output_dir, W_OK)
               ? fail(t->err, "%s: cannot write here: %s", o->output_dir, strerror(errno)) : 0;
}

// The adapter, and checkpoints of four times its size, must find room.
static int check_disk(Trainer *t) {
    struct statvfs disk;
    const qlora_train_options *o = t->options;
    size_t saves = o->save_steps ? t->steps / o->save_steps + 1 : (size_t)ceil(o->num_train_epochs);
    if (o->save_total_limit) saves = min_size(saves, o->save_total_limit + 2);
    if (!o->output_dir || statvfs(o->output_dir, &disk)) return 0;
    double need = (double)t->q->transformer.n_parameters * 4 * (4 * (double)saves + 1);
    double room = (double)disk.f_bavail * (double)disk.f_frsize;
    return need <= room
               ? 0 : fail(t->err, "%s: %.0f MB are free, but %zu checkpoints and the adapter need "
                          "%.0f MB; save less often (--save-steps) or keep fewer "
                          "(--save-total-limit)", o->output_dir, room * 1e-6, saves, need * 1e-6);
}

static void tell_plan(const Trainer *t) {
    const qlora_train_options *o = t->options;
    const Dataset *d = &t->data;
    if (*t->q->note) tell(o, "%s", t->q->note);
    tell(o, "data: %zu samples (%zu held out), %zu tokens, %zu supervised, %zu ends of turn among "
         "them", d->n, t->val.n, d->tokens, d->supervised, d->ends);
    for (const Finding *f = t->findings.list; f < t->findings.list + t->findings.n; f++)
        tell(o, "  %s: %s", severity_names[f->severity], f->text);
    if (t->packing)
        tell(o, "packing: %zu samples in %zu packs of at most %zu tokens", t->train.n,
             t->train.n_packs, t->how.max_length);
    tell(o, "adapter: r %zu, alpha %g on %s: %zu parameters", o->lora_r, (double)o->lora_alpha,
         o->target_modules, count_parameters(&t->q->transformer));
    tell(o, "steps: %zu of %zu x %zu %s, %zu an epoch; learning rate %g, %s, %zu steps of warmup",
         t->steps, o->per_device_train_batch_size, o->gradient_accumulation_steps,
         t->packing ? "packs" : "samples", t->steps_per_epoch, (double)o->learning_rate,
         o->lr_scheduler_type, t->warmup);
    tell(o, "memory: %zu MB weights, %zu MB activations (%zu of %zu layers kept, %zu recomputed)",
         t->q->weight_bytes >> 20, t->session.bytes >> 20, t->session.w.kept,
         t->q->transformer.config.L, t->q->transformer.config.L - t->session.w.kept);
}

// How the data is to be read, as the options say.
static int read_data_options(Trainer *t) {
    static const char *const packings[] = {"none", "bfd"};
    const qlora_train_options *o = t->options;
    const char *masks[N_MASK_ROWS];
    for (size_t i = 0; i < N_MASK_ROWS; i++) masks[i] = mask_rows[i].name;
    int mask, truncate, packing;
    if (choose(masks, N_MASK_ROWS, o->mask, "mask", &mask, t->err) ||
        choose(truncate_names, 3, o->truncate, "truncate", &truncate, t->err) ||
        choose(packings, 2, o->packing, "packing", &packing, t->err))
        return -1;
    if (!o->field_user != !o->field_assistant)
        return fail(t->err, "field-user and field-assistant: expected both or none");
    t->packing = packing == 1;
    t->how = (DatasetOptions){
        .max_length = min_size(o->max_length, t->q->transformer.config.context),
        .truncate = (Truncate)truncate, .mask = mask_rows[mask].kind,
        .mask_last = mask_rows[mask].last,
        .fields = {.name = "--field-user", .user = o->field_user, .assistant = o->field_assistant},
        .system = o->field_system, .max_samples = o->max_samples ? o->max_samples : SIZE_MAX,
        .skip_bad_lines = o->skip_bad_lines != 0, .allocator = &t->q->allocator,
        .pool = t->q->host.pool};
    return parse_take(o->take, &t->how, t->err);
}

static int read_files(Trainer *t, Dataset *d, const Buffer *paths, const DatasetOptions *how) {
    return dataset_open(d, path_list(paths), paths->size / sizeof(char *), &t->q->chat,
                        t->q->tokenizer, how, t->err);
}

// Finds, reads and splits the data. Scoring wants the test split of a directory, training the
// others.
static int open_data(Trainer *t, const char *data, bool scoring) {
    const qlora_train_options *o = t->options;
    DatasetOptions all = t->how;            // of held-out files
    int split = scoring ? SPLIT_TEST : SPLIT_TRAIN, bad = 0;
    for (size_t i = 0; data && !bad; data = o->more_data ? o->more_data[i++] : NULL) {
        bad = add_data_path(&t->paths, data, split, true, &t->region, t->err);
        if (!bad && !scoring && !o->val_file)
            bad = add_data_path(&t->val_paths, data, SPLIT_VALID, false, &t->region, t->err);
    }
    if (!bad && !scoring && o->val_file)
        bad = add_data_path(&t->val_paths, o->val_file, SPLIT_VALID, true, &t->region, t->err);
    all.take_from = 0;
    all.take_to = all.max_samples = SIZE_MAX;
    return bad || read_files(t, &t->data, &t->paths, &t->how) ||
           read_files(t, &t->val_data, &t->val_paths, &all) || split_samples(t) ? -1 : 0;
}

// Fills t->findings with what speaks against training on this data.
static int check_data(Trainer *t) {
    check_counts(&t->findings, &t->data, &t->how, "");
    if (t->val_paths.size)
        check_counts(&t->findings, &t->val_data, &t->how, "held-out data: ");
    return check_duplicates(&t->findings, &t->train, &t->val, &t->q->allocator, t->err);
}

// Fails with the first of the findings that is an error.
static int refuse_errors(const Trainer *t) {
    for (const Finding *f = t->findings.list; f < t->findings.list + t->findings.n; f++)
        if (f->severity == ERROR) return fail(t->err, "%s", f->text);
    return 0;
}

static void trainer_close(Trainer *t) {
    dataset_close(&t->data);
    dataset_close(&t->val_data);
    buffer_free(&t->paths);
    buffer_free(&t->val_paths);
    buffer_free(&t->log);
    buffer_free(&t->checkpoints);
    region_free(&t->region);
}

// The run itself, when all is checked.
static int run_training(Trainer *t) {
    const qlora_train_options *o = t->options;
    Device *dev = &t->q->device;
    size_t bytes = t->window * sizeof *t->records;
    if (session_open(&t->session, t->q, t->shape, t->err)) return -1;
    tell_plan(t);
    describe_settings(t);
    t->records = dev->ops->allocate(dev, bytes, t->err);
    int bad = !t->records || check_disk(t) || (o->output_dir && write_run(t, o->output_dir)) ||
              (o->resume && resume(t)) || train_loop(t) ||
              (o->output_dir &&
               (save_outputs(t, o->output_dir) || write_log(t, true) || write_plot(t)));
    dev->ops->release(dev, t->records, bytes);
    session_close(&t->session);
    return bad;
}

static Trainer new_trainer(qlora_model *q, const qlora_train_options *o, qlora_error *err) {
    const qlora_allocator *a = &q->allocator;
    return (Trainer){.q = q, .options = o, .err = err, .region.allocator = a, .log.allocator = a,
                     .paths.allocator = a, .val_paths.allocator = a,
                     .checkpoints.allocator = a};
}

int qlora_train(qlora_model *q, const char *data, const qlora_train_options *options,
                qlora_error *err) {
    qlora_train_options o = options ? *options : qlora_default_train_options();
    Trainer t = new_trainer(q, &o, err);
    int schedule;
    if (choose(schedule_names, 4, o.lr_scheduler_type, "lr_scheduler_type", &schedule, err) ||
        check_train_options(&o, err) || read_data_options(&t) || need_data_chat(q, err))
        return -1;
    t.schedule = (Schedule)schedule;
    q->lora_dropout = o.lora_dropout;
    int bad = check_output(&t) || open_data(&t, data, false) || check_data(&t) ||
              refuse_errors(&t) || prepare_training(&t) ||
              new_adapter(&q->transformer, o.target_modules, o.lora_r, o.lora_alpha, o.lora_dropout,
                          o.seed, err) || run_training(&t);
    trainer_close(&t);
    return bad ? -1 : 0;
}

// ------------------------------------------------------------------------------------ scoring only

// Bytes of the text of all supervised tokens.
static int supervised_bytes(const Trainer *t, size_t *bytes) {
    const Dataset *d = &t->data;
    Buffer text = {.allocator = &t->q->allocator};
    int bad = 0;
    *bytes = 0;
    for (size_t i = 0; i < d->tokens && !bad;) {
        size_t n = 0;
        while (i + n < d->tokens && d->learn[i + n]) n++;
        text.size = 0;
        if (n) bad = tokenizer_decode(t->q->tokenizer, d->ids + i, n, true, &text, t->err);
        *bytes += text.size;
        i += n + 1;
    }
    buffer_free(&text);
    return bad;
}

int qlora_evaluate(qlora_model *q, const char *data, const qlora_train_options *options,
                   qlora_score *result, qlora_error *err) {
    qlora_train_options o = options ? *options : qlora_default_train_options();
    Trainer t = new_trainer(q, &o, err);
    size_t bytes = 0;
    o.val_split = 0;
    o.packing = "none";
    *result = (qlora_score){0};
    int bad = check_train_options(&o, err) || read_data_options(&t) || need_data_chat(q, err) ||
              open_data(&t, data, true) || dataset_usable(&t.data, &t.how, err) ||
              prepare_training(&t) || supervised_bytes(&t, &bytes) ||
              session_open(&t.session, q, t.shape, err);
    if (!bad) {
        bad = evaluate(&t, &t.train, result);
        session_close(&t.session);
        if (bad == STOPPED) bad = fail(err, "stopped while scoring");
    }
    if (!bad && bytes)
        result->bits_per_byte = result->loss * (double)result->tokens / log(2) / (double)bytes;
    trainer_close(&t);
    return bad ? -1 : 0;
}
// =================================================================================================
//  15. Generation
//
//  One token at a time through the same forward as training. Keys and values of earlier tokens stay
//  in the cache: the linears write the new rows right behind the old ones, and attention reads all.
// =================================================================================================

enum { PREFILL_TOKENS = 512 };              // of a prompt that go through the layers at once

static int check_ids(const qlora_model *q, const int32_t *ids, size_t n, qlora_error *err) {
    size_t V = q->transformer.config.V;
    if (!n) return fail(err, "expected at least one token");
    for (size_t i = 0; i < n; i++)
        if (ids[i] < 0 || (size_t)ids[i] >= V)
            return fail(err, "token %zu: id %d is outside the vocabulary of %zu", i, ids[i], V);
    return 0;
}

// Runs n tokens that follow what the cache holds; their final norm outputs are in s->w.x.
static void session_forward(Session *s, const int32_t *ids, size_t n) {
    for (size_t t = 0; t < n; t++) {
        s->here.ids[t] = ids[t];
        s->here.position[t] = (int32_t)(s->past + t);
    }
    s->here.spans[0] = (Span){0, n, 0, s->past + n, 0};
    upload_batch(s);
    Batch batch = {.T = n, .n_spans = 1, .most_queries = n, .most_keys = s->past + n,
                   .spans = s->there.spans, .position = s->there.position};
    transformer_forward(&s->q->transformer, &s->w, s->there.ids, &batch);
    s->past += n;
}

// Logits of the `rows` rows of s->w.x from `first` on, into s->logits. They are one span.
static void head_rows(Session *s, size_t first, size_t rows, const Span *span) {
    const Transformer *m = &s->q->transformer;
    Batch batch = {.T = rows, .n_spans = 1, .most_queries = rows, .most_keys = rows,
                   .spans = span};
    Product p = {&m->head, NULL, s->w.head_u};
    m->dev->ops->head_logits(m->dev, s->logits, &p,
                             act_at(m->dev->act, s->w.x, first * m->config.D), &batch);
}

static void session_logits(Session *s, size_t first, size_t rows) {
    s->here.row_spans[0] = (Span){0, rows, 0, rows, 0};
    upload_batch(s);
    head_rows(s, first, rows, s->there.row_spans);
}

static int open_inference(Session *s, qlora_model *q, size_t tokens, size_t logit_rows,
                          qlora_error *err) {
    size_t T = min_size(tokens, PREFILL_TOKENS);
    SessionShape shape = {.T = T, .S = logit_rows, .n_spans = 1, .max_span = tokens,
                          .logit_rows = logit_rows, .cache_rows = tokens};
    return session_open(s, q, shape, err);
}

int qlora_logits(qlora_model *q, const int32_t *ids, size_t n, float *logits, qlora_error *err) {
    enum { ROWS = 32 };
    size_t V = q->transformer.config.V;
    Device *dev = &q->device;
    Session s;
    if (check_ids(q, ids, n, err) || open_inference(&s, q, n, ROWS, err)) return -1;
    Buffer room = {.allocator = &q->allocator};
    int bad = dev->ops->host ? 0 : buffer_reserve(&room, ROWS * V * sizeof(real), err);
    for (size_t at = 0; at < n && !bad;) {
        size_t T = min_size(n - at, PREFILL_TOKENS);
        session_forward(&s, ids + at, T);
        for (size_t t = 0; t < T; t += ROWS) {
            size_t rows = min_size(ROWS, T - t);
            session_logits(&s, t, rows);
            const real *here = seen(dev, room.data, s.logits, rows * V * sizeof *here);
            for (size_t i = 0; i < rows * V; i++) logits[(at + t) * V + i] = (float)here[i];
        }
        at += T;
        bad = dev->ops->check(dev, err);
    }
    buffer_free(&room);
    session_close(&s);
    return bad;
}

// --------------------------------------------------------------------------------------- sampling

// A number of generation_config.json, if it is there and in the range.
static double generation_number(const qlora_model *q, const char *key, double least, double most,
                                double otherwise) {
    double value;
    if (!json_to_double(json_get(q->generation, key), &value)) return otherwise;
    return value >= least && value <= most ? value : otherwise;
}

qlora_sampling qlora_default_sampling(const qlora_model *q) {
    qlora_sampling how = {.max_new_tokens = 256, .top_p = 1, .repetition_penalty = 1, .seed = 42};
    if (!json_get_bool(q->generation, "do_sample", false)) return how;
    how.temperature = (float)generation_number(q, "temperature", 0, 1e6, 1);
    how.top_k = (int)generation_number(q, "top_k", 0, 1e9, 50);
    how.top_p = (float)generation_number(q, "top_p", 0, 1, 1);
    how.min_p = (float)generation_number(q, "min_p", 0, 1, 0);
    how.repetition_penalty = (float)generation_number(q, "repetition_penalty", 1e-6, 1e6, 1);
    return how;
}

typedef struct { real score; int32_t id; } Scored;

static int by_score(const void *a, const void *b) {
    const Scored *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return (x->id > y->id) - (x->id < y->id);
}

// Moves the k best of n to the front, in no order (Hoare's quickselect).
static void select_best(Scored *scored, size_t n, size_t k) {
    size_t low = 0, high = n;                                 // the border k lies in low..high
    while (high - low > 1) {
        Scored pivot = scored[low + (high - 1 - low) / 2];
        size_t i = low, j = high - 1;
        for (;; i++, j--) {
            while (by_score(&scored[i], &pivot) < 0) i++;
            while (by_score(&pivot, &scored[j]) < 0) j--;
            if (i >= j) break;
            Scored swapped = scored[i];
            scored[i] = scored[j];
            scored[j] = swapped;
        }
        if (k <= j) high = j + 1;                             // low..j is no worse than j + 1..high
        else low = j + 1;
    }
}

// Each token seen so far counts once: positive logits are divided, negative ones multiplied.
static void penalise(real *logits, const int32_t *seen, size_t n, float penalty, uint8_t *marked) {
    for (size_t i = 0; i < n; i++) {
        if (marked[seen[i]]) continue;
        marked[seen[i]] = 1;
        real *z = &logits[seen[i]];
        *z = *z > 0 ? *z / (real)penalty : *z * (real)penalty;
    }
    for (size_t i = 0; i < n; i++) marked[seen[i]] = 0;
}

static int32_t most_likely(const real *logits, size_t V) {
    size_t best = 0;
    for (size_t v = 1; v < V; v++)
        if (logits[v] > logits[best]) best = v;
    return (int32_t)best;
}

// Draws a token as transformers does: temperature, top-k, top-p, min-p, softmax. `u` in [0, 1).
static int32_t sample(const real *logits, size_t V, const qlora_sampling *how, float u,
                      Scored *scored) {
    size_t n = V;
    real sum = 0, running = 0;
    if (how->temperature <= 0) return most_likely(logits, V);
    for (size_t v = 0; v < V; v++)
        scored[v] = (Scored){logits[v] / (real)how->temperature, (int32_t)v};
    if (how->top_k > 0) n = min_size(n, (size_t)how->top_k);
    if (n < V) select_best(scored, V, n);
    qsort(scored, n, sizeof *scored, by_score);
    real largest = scored[0].score;
    for (size_t i = 0; i < n; i++) {
        scored[i].score = exp_real(scored[i].score - largest);
        sum += scored[i].score;
    }
    // top-p keeps the fewest tokens that reach the share; min-p those near enough to the best.
    size_t kept = 0;
    real nucleus = (real)how->top_p * sum;
    while (kept < n && (kept == 0 || (running < nucleus &&
                                      scored[kept].score >= (real)how->min_p)))
        running += scored[kept++].score;
    real target = (real)u * running;
    for (size_t i = 0; i < kept; i++) {
        target -= scored[i].score;
        if (target < 0) return scored[i].id;
    }
    return scored[kept - 1].id;
}

// The op: see Sequence in qlora.h. Of the work memory the marks come first.
static void next_token(Device *dev, real *logits, const Sequence *s, size_t V) {
    uint8_t *marked = s->work;
    Scored *scored = (Scored *)(void *)(marked + round_up(V, sizeof *scored));
    uint32_t n = *s->n;
    (void)dev;
    if (s->how->repetition_penalty != 1)
        penalise(logits, s->ids, n, s->how->repetition_penalty, marked);
    float u = unit_float(random_u32(s->how->seed, RANDOM_SAMPLE, 0, n - s->prompt));
    s->ids[n] = *s->id = sample(logits, V, s->how, u, scored);
    *s->n = n + 1;
    *s->position += 1;
    s->span->nk += 1;
}

// All ids that end an answer: eos_token_id of both configuration files, a number or a list each,
// the tokenizer's eos token and the end of turn of the chat template.
static bool json_holds_id(const Json *value, int32_t id) {
    size_t number;
    if (json_is(value, JSON_ARRAY)) {
        for (const Json *entry = value->first; entry; entry = entry->next)
            if (json_holds_id(entry, id)) return true;
        return false;
    }
    return json_to_size(value, &number) && number == (size_t)id;
}

static bool is_end(const qlora_model *q, int32_t id) {
    return json_holds_id(json_get(q->generation, "eos_token_id"), id) ||
           json_holds_id(json_get(q->config, "eos_token_id"), id) ||
           (q->tokenizer && q->tokenizer->eos_id == id) || (q->has_chat && q->chat.end_id == id);
}

// ------------------------------------------------------------------------------------- generating

typedef struct {
    qlora_model *q;
    const qlora_sampling *how;
    qlora_text_callback text;
    void *user;
    Buffer ids;                             // of the answer
    Buffer piece;                           // text to hand out
    TokenStream stream;
    qlora_error *err;
} Generation;

// Hands out the text that one more token makes certain, or (id -1) the end of all. Returns 1 when
// the caller has enough.
static int emit(Generation *g, int32_t id) {
    const Tokenizer *t = g->q->tokenizer;
    Buffer *piece = &g->piece;
    if (!g->text || !t) return 0;
    piece->size = 0;
    if (id < 0 ? token_stream_end(t, &g->stream, piece, g->err)
               : token_stream_push(t, &g->stream, id, !g->how->keep_special, piece, g->err))
        return -1;
    return piece->size && g->text(g->user, piece->data, piece->size) ? 1 : 0;
}

// The step that is the same for every new token: a row through the model, its logits, the next id.
static void decode_step(void *user) {
    Session *s = user;
    const Transformer *m = &s->q->transformer;
    Batch batch = {.T = 1, .n_spans = 1, .most_queries = 1, .most_keys = s->cache_rows,
                   .spans = s->text.span, .position = s->text.position};
    transformer_forward(m, &s->w, s->text.id, &batch);
    head_rows(s, 0, 1, s->text.span);
    m->dev->ops->next_token(m->dev, s->logits, &s->text, m->config.V);
}

// Runs the prompt and draws the first new token.
static void start_text(Generation *g, Session *s, const int32_t *ids, size_t prompt) {
    Device *dev = &g->q->device;
    size_t last = 0, V = g->q->transformer.config.V;
    uint32_t n = (uint32_t)prompt;
    int32_t position = (int32_t)prompt - 1;
    Span span = {0, 1, 0, prompt, 0};
    s->text.prompt = prompt;
    s->text.how = g->how;
    upload(dev, s->text.ids, ids, prompt * sizeof *ids);
    upload(dev, s->text.n, &n, sizeof n);
    upload(dev, s->text.position, &position, sizeof position);
    upload(dev, s->text.span, &span, sizeof span);
    dev->ops->zero(dev, s->text.work, sample_bytes(V));
    for (size_t at = 0; at < prompt; at += last) {
        last = min_size(prompt - at, PREFILL_TOKENS);
        session_forward(s, ids + at, last);
    }
    session_logits(s, last - 1, 1);
    dev->ops->next_token(dev, s->logits, &s->text, V);
}

static int generate_tokens(Generation *g, Session *s, const int32_t *ids, size_t prompt,
                           size_t room) {
    Device *dev = &g->q->device;
    start_text(g, s, ids, prompt);
    for (size_t i = 0; i < room; i++) {
        int32_t id = 0;
        dev->ops->download(dev, &id, s->text.id, sizeof id);
        if (dev->ops->check(dev, g->err) || buffer_append(&g->ids, &id, sizeof id, g->err))
            return -1;
        if (!g->how->ignore_eos && is_end(g->q, id)) break;
        int enough = emit(g, id);
        if (enough < 0) return -1;
        if (enough || should_stop(g->q)) break;
        if (i + 1 < room) dev->ops->replay(dev, &s->record, decode_step, s);
    }
    return emit(g, -1) < 0 ? -1 : 0;
}

int qlora_generate(qlora_model *q, const int32_t *ids, size_t n, const qlora_sampling *how,
                   qlora_text_callback text, void *user, int32_t **ids_out, size_t *n_out,
                   qlora_error *err) {
    size_t context = q->transformer.config.context;
    qlora_sampling defaults = qlora_default_sampling(q);
    Generation g = {.q = q, .how = how ? how : &defaults, .text = text, .user = user, .err = err,
                    .ids.allocator = &q->allocator, .piece.allocator = &q->allocator};
    Session s;
    if (ids_out) *ids_out = NULL;
    if (n_out) *n_out = 0;
    if (check_ids(q, ids, n, err)) return -1;
    if (n >= context) return fail(err, "the prompt has %zu tokens, the model's context is %zu", n,
                                  context);
    size_t room = min_size(g.how->max_new_tokens, context - n);
    if (open_inference(&s, q, n + max_size(room, 1), 1, err)) return -1;
    int bad = generate_tokens(&g, &s, ids, n, room);
    if (!bad && ids_out) {
        *ids_out = give(q, g.ids.data, g.ids.size, err);
        bad = !*ids_out;
        if (n_out) *n_out = g.ids.size / sizeof *ids;
    }
    token_stream_free(&g.stream);
    buffer_free(&g.ids);
    buffer_free(&g.piece);
    session_close(&s);
    return bad ? -1 : 0;
}

int qlora_chat(qlora_model *q, const qlora_message *messages, size_t n, const qlora_sampling *how,
               qlora_text_callback text, void *user, qlora_error *err) {
    Region region = {.allocator = &q->allocator};
    Buffer ids = {.allocator = &q->allocator}, learn = {.allocator = &q->allocator};
    Message *list = region_alloc(&region, n, sizeof *list, err);
    int bad = !list || need_chat(q, err) ? -1 : 0;
    for (size_t i = 0; i < n && !bad; i++)
        list[i] = (Message){.role = messages[i].role, .content = messages[i].content,
                            .length = strlen(messages[i].content)};
    if (!bad)
        bad = template_apply(&q->chat, q->tokenizer, list, n, MASK_CONTENT, true, &ids, &learn,
                             err);
    if (!bad) bad = qlora_generate(q, (const int32_t *)(const void *)ids.data,
                                   ids.size / sizeof(int32_t), how, text, user, NULL, NULL, err);
    buffer_free(&ids);
    buffer_free(&learn);
    region_free(&region);
    return bad ? -1 : 0;
}
// =================================================================================================
//  16. What a person sees
//
//  Everything the program prints, as text or as JSON. Texts from files and models may hold control
//  characters, which must not drive a terminal, and bytes that JSON does not allow; two functions
//  stand between them and the output.
// =================================================================================================
#ifdef QLORA_MAIN

// All but newline and tab of what is no harmless character is shown as \xHH.
static void print_safely(const char *text, size_t n) {
    for (size_t i = 0; i < n;) {
        size_t bytes = text[i] == '\n' || text[i] == '\t' ? 1 : harmless_bytes(text + i, n - i);
        if (bytes) fwrite(text + i, 1, bytes, stdout);
        else printf("\\x%02X", (unsigned char)text[i]);
        i += bytes ? bytes : 1;
    }
}

// A JSON string, valid whatever bytes the text has: what is no UTF-8 becomes U+FFFD.
static void print_json(const char *text, size_t n) {
    putchar('"');
    for (size_t i = 0; i < n;) {
        uint32_t code;
        size_t bytes = utf8_decode(text + i, n - i, &code);
        if (!bytes) printf("\xEF\xBF\xBD");
        else if (code == '"' || code == '\\') printf("\\%c", (int)code);
        else if (code == '\n') printf("\\n");
        else if (code < 0x20) printf("\\u%04x", (unsigned)code);
        else fwrite(text + i, 1, bytes, stdout);
        i += bytes ? bytes : 1;
    }
    putchar('"');
}

static void print_either(bool json, const char *text) {
    if (json) print_json(text, strlen(text));
    else print_safely(text, strlen(text));
}

static const char *comma(size_t i) { return i ? ", " : ""; }

static double percent(size_t part, size_t all) {
    return all ? 100 * (double)part / (double)all : 0;
}

// On a terminal a bar that is drawn over itself; elsewhere a line for each step.
typedef struct {
    bool terminal, open;                    // open: the cursor stands in a bar
    double start;
    size_t first;                           // of the steps that were reported
} ProgressView;

static void close_bar(ProgressView *view) {
    if (view->open) printf("\n");
    view->open = false;
}

// Most memory this process ever held, in MB.
static size_t peak_memory(void) {
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
    return (size_t)usage.ru_maxrss >> 20;                     // bytes there, KiB elsewhere
#else
    return (size_t)usage.ru_maxrss >> 10;
#endif
}

static void print_progress(void *user, const qlora_progress *p) {
    static const char bar[] = "========================>                        ";
    enum { WIDTH = sizeof bar / 2 - 1 };
    ProgressView *view = user;
    if (!view->first) {
        view->first = p->step;
        view->start = now_seconds() - p->seconds;
    }
    double elapsed = now_seconds() - view->start;
    unsigned long left = (unsigned long)(elapsed / (double)(p->step - view->first + 1) *
                                         (double)(p->steps - p->step) + 0.5);
    if (view->terminal) printf("\r\033[K[%.*s] ", WIDTH, bar + WIDTH - WIDTH * p->step / p->steps);
    else printf("step ");
    printf("%zu/%zu  epoch %.2f  loss %.4f  grad %.3f  lr %.2e  %.0f tokens/s  %zu MB  "
           "%lu:%02lu:%02lu left", p->step, p->steps, p->epoch, p->loss, p->grad_norm,
           p->learning_rate, (double)p->tokens / p->seconds, peak_memory(), left / 3600,
           left / 60 % 60, left % 60);
    view->open = view->terminal && p->step < p->steps;
    if (!view->open) printf("\n");
    fflush(stdout);
}

// A line of the library's; `user` is a ProgressView or NULL.
static void print_message(void *user, const char *line) {
    if (user) close_bar(user);
    print_safely(line, strlen(line));
    printf("\n");
    fflush(stdout);
}

static void print_banner(const qlora_model *q) {
    qlora_model_info info = qlora_info(q);
    const Weight *w = &q->transformer.layers[0].linear[0].weight;
    const char *type = w->dtype == DT_NF4 ? "NF4" : w->dtype == DT_FP4 ? "FP4" : "unquantised";
    printf("model: %s, %zu layers, %.1f M parameters, %s%s, %zu MB; compute %s, ",
           info.architecture, info.layers, (double)info.parameters * 1e-6, type,
           w->absmax8 ? " with double quantisation" : "", info.weight_bytes >> 20,
           info.compute == QLORA_COMPUTE_BF16 ? "bf16" : "f32");
    if (info.device[0]) printf("%s\n", info.device);
    else printf("%d thread%s%s%s\n", info.threads, info.threads == 1 ? "" : "s",
                q->device_why[0] ? "; no GPU: " : "", q->device_why);
    fflush(stdout);
}

// ----------------------------------------------------------------------------------------- inspect
//
// What a training would see. The data is read, split and checked by the trainer's own code; only
// the weights are never opened. Each function prints its part of the report, as text or as JSON.

// What the records were recognised by, as "messages" or "prompt" and "completion".
static void print_format(const Trainer *t, size_t format, bool json) {
    bool known = format < N_RECORD_FORMATS;
    const RecordFormat *f = known ? &record_formats[format] : &t->how.fields;
    const char *name = known ? f->name : f->user ? "--field-*" : "--prompt-template";
    const char *first = f->list ? f->list : f->text ? f->text : f->user;
    if (json) {
        printf("\"%s\": %zu", name, t->data.formats[format]);
        return;
    }
    printf("  %zu records are %s, recognised by ", t->data.formats[format], name);
    if (first) print_json(first, strlen(first));
    else printf("its fields");
    if (first && f->assistant) {
        printf(" and ");
        print_json(f->assistant, strlen(f->assistant));
    }
    printf("\n");
}

static void print_source(const Trainer *t, bool json) {
    const qlora_model *q = t->q;
    const Dataset *d = &t->data;
    size_t n_formats = 0;
    // The last format is raw text; n_lengths counts the records of all.
    bool raw_text = d->n_lengths && d->formats[N_RECORD_FORMATS - 1] == d->n_lengths;
    const char *origin = raw_text ? "not used, the data is raw text"
                       : q->chat.refused ? "see below"
                       : q->chat.own ? "recognised in the model's own chat template"
                       : q->options.chat_template || q->options.prompt_template
                           ? "as asked for" : "the model has no chat template of its own";
    printf(json ? "{\"model\": " : "model: ");
    print_either(json, q->directory);
    if (!json) printf(": %s, context %zu\n", q->transformer.config.architecture->type,
                      q->transformer.config.context);
    printf(json ? ", \"template\": \"%s\", \"template_origin\": \"%s\", \"template_note\": "
                : "template: %s, %s\n", q->chat.row->name, origin);
    if (json || !raw_text) print_either(json, q->note);
    if (json) printf(", \"files\": [");
    for (size_t i = 0; i < t->paths.size / sizeof *d->paths; i++) {
        printf("%s", json ? comma(i) : "data: ");
        print_either(json, d->paths[i]);
        if (!json) printf("\n");
    }
    if (json) printf("], \"formats\": {");
    for (size_t i = 0; i <= N_RECORD_FORMATS; i++) {
        if (!d->formats[i]) continue;
        if (json) printf("%s", comma(n_formats++));
        print_format(t, i, json);
    }
    if (json) printf("}, ");
}

static void print_counts(const Trainer *t, bool json) {
    const Dataset *d = &t->data;
    size_t tokens = 0;                      // to learn from
    for (size_t i = 0; i < t->train.n; i++) tokens += d->samples[t->train.index[i]].length;
    if (json)
        printf("\"context\": %zu, \"max_length\": %zu, \"records\": %zu, \"samples\": %zu, "
               "\"held_out\": %zu, \"packs\": %zu, \"tokens\": %zu, \"supervised_tokens\": %zu, "
               "\"supervised_ends\": %zu, ", t->q->transformer.config.context, t->how.max_length,
               d->records, d->n, t->val.n, t->train.n_packs, d->tokens, d->supervised, d->ends);
    else
        printf("samples: %zu of %zu records; %zu to learn from, %zu held out\n"
               "tokens: %zu, of which %zu are supervised (%.1f %%), %zu of these end tokens, in "
               "%zu of %zu samples\n", d->n, d->records, t->train.n, t->val.n, d->tokens,
               d->supervised, percent(d->supervised, d->tokens), d->ends,
               d->n - d->tally[TALLY_NO_END].n, d->n);
    if (!json && t->packing)
        printf("packing: %zu packs, %.1f %% full\n", t->train.n_packs,
               percent(tokens, t->train.n_packs * t->how.max_length));
}

// Of the lengths of all records in tokens, before truncation, which are in ascending order by now.
static size_t quantile(const Dataset *d, double share) {
    size_t n = d->n_lengths;
    return n ? d->lengths[min_size(n - 1, (size_t)(share * (double)n))] : 0;
}

// How many are under a limit.
static size_t shorter_than(const Dataset *d, size_t limit) {
    size_t n = 0;
    while (n < d->n_lengths && d->lengths[n] < limit) n++;
    return n;
}

// The last bin has no upper end.
static void print_histogram(const Dataset *d, bool json) {
    enum { MAX_BINS = 14, WIDTH = 40 };
    size_t width = 1, most = 1, n_bins, bins[MAX_BINS];
    for (size_t i = 0; width * (MAX_BINS - 2) < quantile(d, 0.99); i++)      // 1, 2, 5, 10, ...
        width = i % 3 == 1 ? width / 2 * 5 : width * 2;
    n_bins = min_size(MAX_BINS, quantile(d, 1) / width + 1);
    for (size_t i = 0; i < n_bins; i++) {
        size_t end = i + 1 < n_bins ? shorter_than(d, (i + 1) * width) : d->n_lengths;
        bins[i] = end - shorter_than(d, i * width);
        most = max_size(most, bins[i]);
    }
    for (size_t i = 0; i < n_bins; i++) {
        if (json) {
            printf("%s{\"from\": %zu, \"samples\": %zu}", comma(i), i * width, bins[i]);
            continue;
        }
        if (quantile(d, 0) >= (i + 1) * width && i + 1 < n_bins) continue;    // below the shortest
        if (i + 1 < n_bins) printf("  %6zu - %-6zu ", i * width, (i + 1) * width - 1);
        else printf("  %6zu and up  ", i * width);
        for (size_t k = 0; k < ceil_div(bins[i] * WIDTH, most); k++) putchar('#');
        printf(" %zu\n", bins[i]);
    }
}

static void print_lengths(Trainer *t, bool json) {
    Dataset *d = &t->data;
    size_t n = d->n_lengths;
    size_t context = t->q->transformer.config.context;
    if (n) qsort(d->lengths, n, sizeof *d->lengths, by_number);
    else if (!json) return;
    printf(json ? "\"lengths\": {\"shortest\": %zu, \"median\": %zu, \"p90\": %zu, \"p99\": %zu, "
                  "\"longest\": %zu, \"histogram\": ["
                : "length: shortest %zu tokens, median %zu, 90 %% up to %zu, 99 %% up to %zu, "
                  "longest %zu\n", quantile(d, 0), quantile(d, 0.5), quantile(d, 0.9),
           quantile(d, 0.99), quantile(d, 1));
    print_histogram(d, json);
    if (json) printf("], \"over\": [");
    for (size_t limit = 128, over = 1; over && limit < 2 * context; limit *= 2) {
        over = n - shorter_than(d, limit + 1);
        if (json) printf("%s{\"limit\": %zu, \"samples\": %zu}", comma(limit > 128), limit, over);
        else printf("  %zu (%.1f %%) do not fit into %zu\n", over, percent(over, n), limit);
    }
    // The suggestion holds everything, unless a rare few would double it.
    size_t p99 = round_up(quantile(d, 0.99), 64);
    size_t most = max_size(round_up(quantile(d, 1), 64), 64);
    size_t suggested = min_size(most <= 2 * p99 ? most : p99, context);
    size_t fit = shorter_than(d, suggested + 1);
    printf(json ? "], \"suggested_max_length\": %zu}, "
                : "  suggested: --max-length %zu holds %zu of %zu (%.1f %%)\n", suggested, fit, n,
           percent(fit, n));
}

// A sample token by token, as it was before truncation.
typedef struct {
    const Tokenizer *tokenizer;
    const int32_t *ids;                     // (n)
    const uint8_t *learn;                   // (n)
    size_t n;
    Kept kept;
    TokenStream stream;
    Buffer text;                            // of the newest token
} TokenView;

typedef enum { TOKEN_MASKED, TOKEN_LEARNT, TOKEN_CUT } TokenClass;

static TokenClass token_class(const TokenView *v, size_t i) {
    bool kept = i < v->kept.head || (i >= v->kept.from && i < v->kept.to);
    return !kept ? TOKEN_CUT : v->learn[i] == 1 ? TOKEN_LEARNT : TOKEN_MASKED;
}

static bool token_special(const TokenView *v, size_t i) {
    const Token *token = vocabulary_token(&v->tokenizer->vocabulary, (size_t)v->ids[i]);
    return token && (token->special || token->added);
}

static int token_text(TokenView *v, size_t i, qlora_error *err) {
    v->text.size = 0;
    return token_stream_push(v->tokenizer, &v->stream, v->ids[i], false, &v->text, err);
}

// Newlines are shown as \n too: whether one is learnt can matter.
static void print_token_text(const char *text, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const char *newline = memchr(text + i, '\n', n - i);
        size_t length = newline ? (size_t)(newline - text) - i : n - i;
        print_safely(text + i, length);
        if (newline) printf("\\n\n");
        i += length;
    }
}

// Colours on a terminal, brackets elsewhere or if the user asks for them.
typedef struct { const char *open[3], *close[3], *special, *end, *legend; } TokenMarks;

static const TokenMarks *token_marks(void) {
    static const TokenMarks brackets = {
        {"", "[", "{"}, {"", "]", "}"}, "(", "",
        "plain: context, [ ] learnt, { } cut off, ( ) a special token"};
    static const TokenMarks colours = {
        {"\033[0;2m", "\033[0;32m", "\033[0;31;9m"}, {"", "", ""}, "\033[1;4m", "\033[0m",
        "\033[2mcontext\033[0m, \033[32mlearnt\033[0m, \033[31;9mcut off\033[0m, "
        "\033[1;4mspecial token\033[0m"};
    const char *no_colour = getenv("NO_COLOR");
    return isatty(STDOUT_FILENO) && !(no_colour && *no_colour) ? &colours : &brackets;
}

// Prints the tokens; of a long run of one class the middle is left out.
static int print_tokens(TokenView *v, const TokenMarks *marks, qlora_error *err) {
    enum { WHOLE_RUN = 160, ENDS = 60 };
    for (size_t start = 0, end = 0; start < v->n; start = end) {
        TokenClass class = token_class(v, start);
        while (end < v->n && token_class(v, end) == class) end++;
        printf("%s", marks->open[class]);
        for (size_t i = start; i < end; i++) {
            bool special = token_special(v, i);
            if (token_text(v, i, err)) return -1;
            if (end - start > WHOLE_RUN && i >= start + ENDS && i < end - ENDS) {
                if (i == start + ENDS) printf(" ... %zu tokens ... ", end - start - 2 * ENDS);
                continue;
            }
            if (special) printf("%s", marks->special);
            print_token_text(v->text.data, v->text.size);
            if (special) printf("%s", *marks->end ? marks->open[class] : ")");
        }
        printf("%s", marks->close[class]);
    }
    printf("%s\n", marks->end);
    return 0;
}

static int print_tokens_json(TokenView *v, qlora_error *err) {
    static const char *const names[] = {"context", "learnt", "cut"};
    for (size_t i = 0; i < v->n; i++) {
        if (token_text(v, i, err)) return -1;
        printf("%s{\"id\": %d, \"text\": ", comma(i), v->ids[i]);
        print_json(v->text.data, v->text.size);
        printf(", \"class\": \"%s\", \"special\": %s}", names[token_class(v, i)],
               token_special(v, i) ? "true" : "false");
    }
    return 0;
}

// `shown` are the first records read once more, whole: what is left out of them or cut off is shown
// as such.
static int print_samples(const Trainer *t, const Dataset *shown, bool json, qlora_error *err) {
    const TokenMarks *marks = token_marks();
    int bad = 0;
    if (json) printf("\"shown\": [");
    for (size_t i = 0; i < shown->n && !bad; i++) {
        const Sample *s = &shown->samples[i];
        TokenView v = {.tokenizer = t->q->tokenizer, .ids = shown->ids + s->first, .n = s->length,
                       .learn = shown->learn + s->first, .text.allocator = &t->q->allocator};
        v.kept = truncate_sample(v.ids, v.n, &t->how, v.tokenizer);
        size_t kept = v.kept.head + v.kept.to - v.kept.from, learnt = 0;
        for (size_t k = 0; k < v.n; k++) learnt += token_class(&v, k) == TOKEN_LEARNT;
        printf(json ? "%s{\"file\": " : "\n", comma(i));
        print_either(json, shown->paths[s->file]);
        if (json) printf(", \"line\": %zu, \"tokens\": [", s->line);
        else printf(":%zu: %zu tokens, %zu learnt%s%s\n", s->line, v.n, learnt,
                    kept == v.n ? "" : kept ? ", cut" : ", too long", learnt ? "" : ": left out");
        bad = json ? print_tokens_json(&v, err) : print_tokens(&v, marks, err);
        if (json) printf("]}");
        token_stream_free(&v.stream);
        buffer_free(&v.text);
    }
    if (json) printf("], ");
    else if (shown->n) printf("\n(%s)\n", marks->legend);
    return bad;
}

static void print_findings(const Trainer *t, bool json) {
    if (json) printf("\"findings\": [");
    else if (!t->findings.n) printf("checks: nothing is wrong\n");
    for (size_t i = 0; i < t->findings.n; i++) {
        const Finding *f = &t->findings.list[i];
        if (json) printf("%s{\"severity\": \"%s\", \"code\": \"%s\", \"count\": %zu, \"text\": ",
                         comma(i), severity_names[f->severity], f->code, f->n);
        else printf("%s: ", severity_names[f->severity]);
        print_either(json, f->text);
        printf(json ? "}" : "\n");
    }
    if (json) printf("]}\n");
}

// The report on what open_data and check_data found, with the first `show` records.
static int report_data(Trainer *t, size_t show, bool json, qlora_error *err) {
    DatasetOptions how = t->how;
    Dataset shown;
    how.max_length = SIZE_MAX;
    how.max_samples = show;
    how.keep_all = true;
    if (read_files(t, &shown, &t->paths, &how)) return -1;
    print_source(t, json);
    print_counts(t, json);
    print_lengths(t, json);
    int bad = print_samples(t, &shown, json, err);
    print_findings(t, json);
    dataset_close(&shown);
    return bad;
}
// =================================================================================================
//  17. Command line and chat
//
//  One table of options makes the parser and --help; names are those of transformers, peft and trl,
//  with - or _. Exit status: 0 done, 1 failed, 2 usage, 128 + n after signal n.
// =================================================================================================

typedef struct {
    const char *path, *data;                // the first two positional arguments,
    const char *const *more;                // and those after them, NULL at the end
    const char *adapter, *prompt, *ids, *output, *system, *resume, *quant, *compute;
    int json, ids_only, decode;
    int double_quant;                       // -1: as the run that made the adapter, or yes
    size_t show, max_shard;
    qlora_options options;
    qlora_train_options train;
    qlora_sampling sampling;
    const char *given[128];                 // what was given to each option of the table, or NULL
    char command_line[2048];
    Region region;                          // of a command: freed at its end
    qlora_model *q;                         // the model at `path`, for the commands that want one
} Arguments;

enum { CMD_TRAIN = 1, CMD_GENERATE = 2, CMD_CHAT = 4, CMD_LOGITS = 8, CMD_TOKENIZE = 16,
       CMD_QUANTIZE = 32, CMD_INIT = 64, CMD_INFO = 128, CMD_EVAL = 256, CMD_MERGE = 512,
       CMD_INSPECT = 1024, CMD_DATA = CMD_TRAIN | CMD_EVAL | CMD_INSPECT,
       CMD_ANSWER = CMD_GENERATE | CMD_CHAT, CMD_SPLIT = CMD_TRAIN | CMD_INSPECT,
       CMD_RUN = CMD_ANSWER | CMD_LOGITS | CMD_EVAL, CMD_DEVICE = CMD_TRAIN | CMD_RUN,
       CMD_TEXT = CMD_DATA | CMD_RUN, CMD_COMPUTE = CMD_DEVICE | CMD_QUANTIZE | CMD_INIT };

typedef enum { OPT_TEXT, OPT_WHOLE, OPT_REAL, OPT_BYTES, OPT_SWITCH } OptionKind;

typedef struct {
    const char *name;
    size_t offset, size;                    // of the value in Arguments
    OptionKind kind;
    int commands;
    const char *help;
} Option;

// Where an option's value is kept. The type of the field says what it takes; for bytes (8G) and
// switches (true or false, alone true) it must be said.
#define PLACE(field) offsetof(Arguments, field), sizeof ((Arguments *)0)->field
#define AT(field) PLACE(field), _Generic(((Arguments *)0)->field, const char *: OPT_TEXT, \
                                         float: OPT_REAL, double: OPT_REAL, default: OPT_WHOLE)
#define BYTES(field) PLACE(field), OPT_BYTES
#define SWITCH(field) PLACE(field), OPT_SWITCH

static const Option option_table[] = {
    {"adapter", AT(adapter), CMD_RUN, "PEFT adapter directory on top of the model"},
    {"quant", AT(quant), CMD_COMPUTE, "nf4, fp4 or none: the layers' frozen weights"},
    {"double-quant", SWITCH(double_quant), CMD_COMPUTE, "true or false: quantise the scales too"},
    {"compute", AT(compute), CMD_COMPUTE, "auto, bf16 or f32: what is multiplied"},
    {"device", AT(options.device), CMD_DEVICE | CMD_MERGE, "auto, cpu, cuda or cuda:N"},
    {"threads", AT(options.threads), CMD_COMPUTE | CMD_INSPECT, "0: one for each physical core"},
    {"memory", BYTES(options.memory), CMD_DEVICE, "most bytes, e.g. 8G; less only costs time"},
    {"output", AT(output), CMD_TRAIN | CMD_LOGITS, "results: a directory (train), a file (logits)"},
    {"lora-r", AT(train.lora_r), CMD_TRAIN, "rank of the adapter"},
    {"lora-alpha", AT(train.lora_alpha), CMD_TRAIN, "scale: alpha / r"},
    {"lora-dropout", AT(train.lora_dropout), CMD_TRAIN, "on the adapter's input"},
    {"target-modules", AT(train.target_modules), CMD_TRAIN,
     "all-linear, or names such as q_proj,v_proj,lm_head"},
    {"mask", AT(train.mask), CMD_DATA,
     "content (answers and their end), turn (headers too), last (only the last answer) or all"},
    {"field-user", AT(train.field_user), CMD_DATA, "the question's column, in data of your own"},
    {"field-assistant", AT(train.field_assistant), CMD_DATA, "the answer's column"},
    {"field-system", AT(train.field_system), CMD_DATA, "the column of the system message"},
    {"take", AT(train.take), CMD_DATA, "FIRST:END, the records to use, from 0; also FIRST:, :END"},
    {"max-samples", AT(train.max_samples), CMD_DATA, "use no more than the first so many; 0: all"},
    {"template", AT(options.chat_template), CMD_TEXT, "a template by name, not the model's own"},
    {"prompt-template", AT(options.prompt_template), CMD_TEXT,
     "text with {field} holes, the last the answer"},
    {"add-tokens", AT(options.add_tokens), CMD_TEXT, "a,b: texts that become tokens of their own"},
    {"learning-rate", AT(train.learning_rate), CMD_TRAIN, "its peak"},
    {"lr-scheduler-type", AT(train.lr_scheduler_type), CMD_TRAIN,
     "constant, constant_with_warmup, linear or cosine"},
    {"warmup-ratio", AT(train.warmup_ratio), CMD_TRAIN, "share of the steps"},
    {"weight-decay", AT(train.weight_decay), CMD_TRAIN, "AdamW's"},
    {"max-grad-norm", AT(train.max_grad_norm), CMD_TRAIN, "gradients are clipped to it"},
    {"num-train-epochs", AT(train.num_train_epochs), CMD_TRAIN, "passes over the data"},
    {"max-steps", AT(train.max_steps), CMD_TRAIN, "0: as many as the epochs need"},
    {"per-device-train-batch-size", AT(train.per_device_train_batch_size), CMD_TRAIN | CMD_EVAL,
     "samples at a time"},
    {"gradient-accumulation-steps", AT(train.gradient_accumulation_steps), CMD_TRAIN,
     "batches in a step"},
    {"max-length", AT(train.max_length), CMD_DATA, "most tokens of a sample"},
    {"truncate", AT(train.truncate), CMD_DATA,
     "of longer samples: drop (leave them out), keep-start, keep-end"},
    {"packing", AT(train.packing), CMD_SPLIT, "none, or bfd: packs, filled to --max-length"},
    {"skip-bad-lines", SWITCH(train.skip_bad_lines), CMD_DATA, "count malformed records, go on"},
    {"val-split", AT(train.val_split), CMD_SPLIT, "share held out for evaluation"},
    {"val", AT(train.val_file), CMD_SPLIT, "a file or directory to evaluate on instead"},
    {"eval-steps", AT(train.eval_steps), CMD_TRAIN, "between evaluations; also after each epoch"},
    {"save-steps", AT(train.save_steps), CMD_TRAIN, "between checkpoints; 0: one after each epoch"},
    {"save-total-limit", AT(train.save_total_limit), CMD_TRAIN, "how many to keep; 0: all"},
    {"resume", AT(resume), CMD_TRAIN, "a run's output directory: go on from its last checkpoint"},
    {"overwrite-output-dir", SWITCH(train.overwrite_output_dir), CMD_TRAIN, "replace a run"},
    {"logging-steps", AT(train.logging_steps), CMD_TRAIN, "steps between lines"},
    {"seed", AT(train.seed), CMD_SPLIT | CMD_INIT | CMD_ANSWER, "of all random numbers"},
    {"prompt", AT(prompt), CMD_GENERATE, "the text to continue"},
    {"system", AT(system), CMD_CHAT, "system message"},
    {"max-new-tokens", AT(sampling.max_new_tokens), CMD_ANSWER, "most tokens of an answer"},
    {"temperature", AT(sampling.temperature), CMD_ANSWER, "0: greedy"},
    {"top-k", AT(sampling.top_k), CMD_ANSWER, "0: off"},
    {"top-p", AT(sampling.top_p), CMD_ANSWER, "1: off"},
    {"min-p", AT(sampling.min_p), CMD_ANSWER, "0: off"},
    {"repetition-penalty", AT(sampling.repetition_penalty), CMD_ANSWER, "1: off"},
    {"ids", AT(ids), CMD_LOGITS, "token ids, e.g. 1,2,3"},
    {"ids-only", SWITCH(ids_only), CMD_TOKENIZE, "one line of ids for each line of text"},
    {"decode", SWITCH(decode), CMD_TOKENIZE, "ids on standard input to text"},
    {"json", SWITCH(json), CMD_GENERATE | CMD_EVAL | CMD_INSPECT, "JSON instead of text"},
    {"show", AT(show), CMD_INSPECT, "samples to print token by token"},
    {"max-shard-size", BYTES(max_shard), CMD_MERGE, "most bytes of a weight file"},
};
enum { N_OPTIONS = sizeof option_table / sizeof *option_table };
_Static_assert(N_OPTIONS <= sizeof ((Arguments *)0)->given / sizeof(char *), "room in given");

// Other names of options.
static const char *const option_aliases[][2] = {
    {"lr", "learning-rate"}, {"epochs", "num-train-epochs"}, {"output-dir", "output"},
    {"batch", "per-device-train-batch-size"}, {"accum", "gradient-accumulation-steps"},
    {"resume-from-checkpoint", "resume"}, {"ids", "ids-only"}};

// ---------------------------------------------------------------------------------------- signals

static volatile sig_atomic_t caught_signal;

static void on_signal(int number) {
    if (caught_signal) _exit(128 + number);           // the second one leaves at once
    caught_signal = number;
}

static int stop_on_signal(void *user) { (void)user; return caught_signal != 0; }

// ---------------------------------------------------------------------------------------- parsing

static bool same_name(const char *given, size_t n, const char *name) {
    if (strlen(name) != n) return false;
    for (size_t i = 0; i < n; i++)
        if ((given[i] == '_' ? '-' : given[i]) != name[i]) return false;
    return true;
}

// The option that a command knows by this name; NULL if there is none.
static const Option *find_option(const char *given, size_t n, int command) {
    for (size_t i = 0; i < N_OPTIONS; i++)
        if (option_table[i].commands & command && same_name(given, n, option_table[i].name))
            return &option_table[i];
    for (size_t i = 0; i < sizeof option_aliases / sizeof *option_aliases; i++) {
        const char *const *alias = option_aliases[i];
        if (same_name(given, n, alias[0])) return find_option(alias[1], strlen(alias[1]), command);
    }
    return NULL;
}

// Edits that turn one word into the other (Levenshtein), for "did you mean".
static size_t edit_distance(const char *a, size_t n, const char *b) {
    size_t row[64], m = min_size(strlen(b), 63);
    for (size_t j = 0; j <= m; j++) row[j] = j;
    for (size_t i = 1; i <= n; i++) {
        size_t diagonal = row[0];
        row[0] = i;
        for (size_t j = 1; j <= m; j++) {
            size_t change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            row[j] = min_size(change, min_size(row[j], row[j - 1]) + 1);
        }
    }
    return row[m];
}

static int unknown_option(const char *given, size_t n, int command, qlora_error *err) {
    const char *nearest = "help";
    size_t best = SIZE_MAX;
    for (size_t i = 0; i < N_OPTIONS; i++) {
        size_t distance = edit_distance(given, n, option_table[i].name);
        if (!(option_table[i].commands & command) || distance >= best) continue;
        best = distance;
        nearest = option_table[i].name;
    }
    return fail(err, "unknown option --%.*s; did you mean --%s?", (int)n, given, nearest);
}

// Bytes with an optional K, M, G or T (powers of 1024).
static bool parse_bytes(const char *text, size_t *out) {
    static const char units[] = "KMGT";
    char *end;
    double value = strtod(text, &end);
    const char *unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
    if (end == text || !(value >= 0) || (*end && (!unit || end[1]))) return false;
    for (const char *u = units; unit && u <= unit; u++) value *= 1024;
    if (!(value < 1e18)) return false;
    *out = (size_t)value;
    return true;
}

static int set_option(Arguments *a, const Option *option, const char *text, qlora_error *err) {
    static const char *const expected[] = {"a text", "a whole number", "a number",
                                           "bytes such as 800M or 16G", "true or false"};
    void *to = (char *)a + option->offset;
    char *end = NULL;
    bool ok = true;
    errno = 0;
    if (option->kind == OPT_TEXT) *(const char **)to = text;
    else if (option->kind == OPT_BYTES) ok = parse_bytes(text, to);
    else if (option->kind == OPT_SWITCH) {
        *(int *)to = strcmp(text, "true") == 0 || strcmp(text, "1") == 0;
        ok = *(int *)to || strcmp(text, "false") == 0 || strcmp(text, "0") == 0;
    } else if (option->kind == OPT_REAL) {
        double value = strtod(text, &end);
        ok = end != text && !*end && isfinite(value);
        if (option->size == sizeof(float)) *(float *)to = (float)value;
        else *(double *)to = value;
    } else {
        unsigned long long value = strtoull(text, &end, 10);
        ok = isdigit((unsigned char)*text) && !*end && !errno &&
             (option->size > sizeof(int) || value <= INT_MAX);
        memcpy(to, &value, option->size);             // int, size_t or uint64_t, little-endian
    }
    if (!ok)
        return fail(err, "--%s: expected %s, found \"%s\"", option->name, expected[option->kind],
                    text);
    a->given[option - option_table] = text;
    return 0;
}

// Sets the option at argv[*at]; its value may be the next argument.
static int parse_option(Arguments *a, int command, char **argv, int argc, int *at,
                        qlora_error *err) {
    const char *name = argv[*at] + 2, *equals = strchr(name, '=');
    const char *next = *at + 1 < argc ? argv[*at + 1] : "--";
    size_t n = equals ? (size_t)(equals - name) : strlen(name);
    const Option *option = find_option(name, n, command);
    if (!option) return unknown_option(name, n, command, err);
    if (equals) return set_option(a, option, equals + 1, err);
    if (option->kind == OPT_SWITCH && strcmp(next, "true") && strcmp(next, "false"))
        return set_option(a, option, "true", err);
    if (strncmp(next, "--", 2) == 0) return fail(err, "--%s: expected a value", option->name);
    ++*at;
    return set_option(a, option, next, err);
}

// The quantisation when none is given: that of the run that made the adapter, else none.
static int recorded_quant(Arguments *a, qlora_error *err) {
    bool found;
    const Json *run = read_json(a->adapter ? a->adapter : a->path, "run.json", 1 << 24, &a->region,
                                &found, err);
    const char *name = json_get_text(run, "quant");
    int quant = QLORA_QUANT_NONE;
    if (name) choose(quant_names, 3, name, "quant", &quant, NULL);
    a->options.quant = quant < 3 ? (qlora_quant)quant : QLORA_QUANT_NONE;
    if (a->double_quant < 0) a->double_quant = json_get_bool(run, "double_quant", true);
    return found && !run ? -1 : 0;
}

// What follows from the arguments together, before a file is opened.
static int finish_arguments(Arguments *a, int command, qlora_error *err) {
    static const char *const computes[] = {"auto", "f32", "bf16"};
    int quant = command == CMD_INIT ? QLORA_QUANT_NONE : QLORA_QUANT_NF4;
    int compute = QLORA_COMPUTE_AUTO;
    if ((a->quant && choose(quant_names, 3, a->quant, "--quant", &quant, err)) ||
        (a->compute && choose(computes, 3, a->compute, "--compute", &compute, err)))
        return -1;
    if (command == CMD_GENERATE && !a->prompt == !a->data)
        return fail(err, "generate: expected --prompt TEXT or a file with one prompt a line");
    if (command == CMD_LOGITS && (!a->ids || !a->output))
        return fail(err, "logits: expected --ids 1,2,3 and --output FILE");
    if (command == CMD_CHAT && !a->path) a->path = "out";
    if (command & CMD_DATA) a->train.more_data = a->more;
    a->options.quant = (qlora_quant)quant;
    a->options.compute = (qlora_compute)compute;
    if (command & CMD_RUN && !a->quant && recorded_quant(a, err)) return -1;
    a->options.double_quant = a->double_quant != 0;
    a->options.defer_weights = command == CMD_TRAIN;  // data, disk and memory are checked first
    a->options.stop = stop_on_signal;
    return 0;
}

// --------------------------------------------------------------------------------------- commands
//
// a->q is opened and closed by main.

static int run_train(Arguments *a, qlora_error *err) {
    qlora_train_options *o = &a->train;
    ProgressView view = {.terminal = isatty(STDOUT_FILENO)};
    print_banner(a->q);
    if (a->output) o->output_dir = a->output;
    if (a->resume) o->output_dir = a->resume;
    o->resume = a->resume != NULL;
    o->command_line = a->command_line;
    o->progress = print_progress;
    o->message = print_message;
    o->user = &view;
    int bad = qlora_train(a->q, a->data, o, err);
    close_bar(&view);
    if (!bad)
        printf("the adapter is in %s, its losses in %s/loss.svg. Next:\n  ./qlora chat %s\n"
               "  ./qlora merge %s %s merged/\n", o->output_dir, o->output_dir, o->output_dir,
               a->path, o->output_dir);
    return bad;
}

static int print_text(void *user, const char *utf8, size_t n) {
    (void)user;
    print_safely(utf8, n);
    fflush(stdout);
    return caught_signal != 0;
}

// The model's own way to sample, changed by what was given.
static void choose_sampling(Arguments *a) {
    size_t first = offsetof(Arguments, sampling);
    a->sampling = qlora_default_sampling(a->q);
    for (size_t i = 0; i < N_OPTIONS; i++) {
        const Option *o = &option_table[i];
        if (a->given[i] && o->offset >= first && o->offset < first + sizeof a->sampling)
            set_option(a, o, a->given[i], NULL);
    }
    a->sampling.seed = a->train.seed;
}

static int generate_one(const Arguments *a, const char *prompt, size_t n, qlora_error *err) {
    Buffer text = {.allocator = a->region.allocator};
    int32_t *ids = NULL;
    size_t n_ids = 0;
    int bad = qlora_tokenize(a->q, prompt, n, 1, &ids, &n_ids, err);
    if (!bad && !a->json) print_safely(prompt, n);
    bad = bad || qlora_generate(a->q, ids, n_ids, &a->sampling,
                                a->json ? collect_text : print_text, &text, NULL, NULL, err);
    if (!bad && a->json) {
        printf("{\"prompt\": ");
        print_json(prompt, n);
        printf(", \"completion\": ");
        print_json(text.data, text.size);
        printf("}");
    }
    printf("\n");
    qlora_free(a->q, ids);
    buffer_free(&text);
    return bad ? -1 : 0;
}

static int run_generate(Arguments *a, qlora_error *err) {
    Buffer file = {.allocator = a->region.allocator};
    const char *line;
    size_t n;
    choose_sampling(a);
    if (a->prompt) return generate_one(a, a->prompt, strlen(a->prompt), err);
    int bad = read_whole_file(a->data, SIZE_MAX / 4, &file, err);
    for (size_t at = 0; !bad && !caught_signal && (line = next_line(&file, &at, &n)) != NULL;)
        if (n) bad = generate_one(a, line, n, err);
    buffer_free(&file);
    return bad;
}

// Ids separated by commas or space.
static int parse_ids(const char *text, Buffer *ids, qlora_error *err) {
    for (const char *at = text; *at;) {
        char *end;
        errno = 0;
        long value = isdigit((unsigned char)*at) ? strtol(at, &end, 10) : -1;
        if (value < 0 || value > INT32_MAX || errno)
            return fail(err, "ids: expected whole numbers, found \"%.20s\"", at);
        int32_t id = (int32_t)value;
        if (buffer_append(ids, &id, sizeof id, err)) return -1;
        at = end + strspn(end, ", \t\r\n");
    }
    return 0;
}

static int run_logits(Arguments *a, qlora_error *err) {
    Buffer ids = {.allocator = a->region.allocator};
    TensorInfo tensor;
    int bad = parse_ids(a->ids, &ids, err);
    size_t V = a->q->transformer.config.V, n = ids.size / sizeof(int32_t);
    float *logits = bad ? NULL : region_alloc(&a->region, n * V, sizeof *logits, err);
    describe_tensor(&tensor, "logits", ST_F32, 2, n, V, logits);
    bad = !logits || qlora_logits(a->q, (const int32_t *)(const void *)ids.data, n, logits, err) ||
          write_tensors(a->output, &tensor, 1, NULL, NULL, a->region.allocator, err);
    buffer_free(&ids);
    return bad ? -1 : 0;
}

static int read_standard_input(Buffer *text, qlora_error *err) {
    for (;;) {
        if (buffer_reserve(text, 65536, err)) return -1;
        size_t got = fread(text->data + text->size, 1, 65535, stdin);
        text->size += got;
        text->data[text->size] = 0;
        if (got == 0) return ferror(stdin) ? fail(err, "standard input: read error") : 0;
    }
}

static int tokenize_piece(const Arguments *a, const Tokenizer *t, const char *text, size_t n,
                          Buffer *ids, qlora_error *err) {
    ids->size = 0;
    if (tokenizer_encode(t, text, n, true, ids, err)) return -1;
    const int32_t *id = (const int32_t *)(const void *)ids->data;
    for (size_t i = 0; i < ids->size / sizeof *id; i++) {
        if (a->ids_only) { printf("%s%d", i ? " " : "", id[i]); continue; }
        size_t length;
        const char *token = tokenizer_token(t, id[i], &length);
        printf("%7d  ", id[i]);
        print_safely(token, token ? length : 0);
        printf("\n");
    }
    if (a->ids_only) printf("\n");
    return 0;
}

static int run_tokenize(Arguments *a, qlora_error *err) {
    const qlora_allocator *heap = a->region.allocator;
    Buffer text = {.allocator = heap}, ids = {.allocator = heap}, out = {.allocator = heap};
    Tokenizer *t = tokenizer_open(a->path, heap, err);
    const char *line;
    size_t n;
    int bad = !t || read_standard_input(&text, err);
    if (!bad && a->decode) {
        bad = parse_ids(text.data, &ids, err) ||
              tokenizer_decode(t, (const int32_t *)(const void *)ids.data,
                               ids.size / sizeof(int32_t), false, &out, err);
        if (!bad && out.size && fwrite(out.data, 1, out.size, stdout) != out.size)
            bad = fail(err, "standard output: write error");
    } else if (!bad && !a->ids_only) bad = tokenize_piece(a, t, text.data, text.size, &ids, err);
    else
        for (size_t at = 0; !bad && (line = next_line(&text, &at, &n)) != NULL;)
            bad = tokenize_piece(a, t, line, n, &ids, err);
    buffer_free(&text);
    buffer_free(&ids);
    buffer_free(&out);
    tokenizer_close(t);
    return bad ? -1 : 0;
}

static int run_eval(Arguments *a, qlora_error *err) {
    qlora_score s;
    if (qlora_evaluate(a->q, a->data, &a->train, &s, err)) return -1;
    printf(a->json ? "{\"loss\": %.6f, \"standard_error\": %.6f, \"perplexity\": %.4f, "
                     "\"bits_per_byte\": %.4f, \"accuracy\": %.4f, \"tokens\": %zu, "
                     "\"samples\": %zu}\n"
                   : "loss %.6f +- %.6f, perplexity %.4f, %.4f bits a byte, accuracy %.4f (%zu "
                     "tokens of %zu samples)\n",
           s.loss, s.standard_error, s.perplexity, s.bits_per_byte, s.accuracy, s.tokens,
           s.samples);
    return 0;
}

static int run_merge(Arguments *a, qlora_error *err) {
    qlora_merge_report r;
    if (qlora_merge(a->path, a->data, a->more[0], a->max_shard, &a->options, &r, err)) return -1;
    printf("merged %zu parameters: |change| / |weights| %.2e; rounding undid %.1f %% of the "
           "changes\n", r.adapter_parameters, r.relative_change, 100 * r.lost_in_rounding);
    return 0;
}

static int run_quantize(Arguments *a, qlora_error *err) {
    return qlora_quantize(a->path, a->data, &a->options, err);
}

static int run_init(Arguments *a, qlora_error *err) {
    return qlora_init(a->path, a->data, a->train.seed, &a->options, err);
}

// Fails as train would, after it has shown why. Opens the model itself: it wants no weights.
static int run_inspect(Arguments *a, qlora_error *err) {
    qlora_model *q = open_on_host(a->path, &a->options, err);
    if (!q) return -1;
    Trainer t = new_trainer(q, &a->train, err);
    int bad = open_text(q, a->path, err) || need_data_chat(q, err) ||
              check_train_options(&a->train, err) || read_data_options(&t);
    t.how.inspecting = true;
    bad = bad || open_data(&t, a->data, false) || check_data(&t) ||
          report_data(&t, a->show, a->json, err) || refuse_errors(&t);
    trainer_close(&t);
    qlora_close(q);
    return bad ? -1 : 0;
}

// ------------------------------------------------------------------------------------------- info

// |B A| in the Frobenius norm, from two r x r products: |BA|^2 = trace((B^T B)(A A^T)).
static double product_norm(const float *A, const float *B, size_t r, size_t K, size_t N) {
    double sum = 0;
    for (size_t i = 0; i < r; i++)
        for (size_t j = 0; j < r; j++) {
            double aa = 0, bb = 0;
            for (size_t k = 0; k < K; k++) aa += (double)A[i * K + k] * (double)A[j * K + k];
            for (size_t n = 0; n < N; n++) bb += (double)B[n * r + i] * (double)B[n * r + j];
            sum += aa * bb;
        }
    return sqrt(fmax(sum, 0));
}

static float *read_floats(const TensorFiles *files, const TensorInfo *t, Region *region,
                          qlora_error *err) {
    DType type = safetensors_types[t->type].dtype;
    void *raw = region_alloc(region, t->bytes, 1, err);
    float *values = raw ? region_alloc(region, t->elements, sizeof *values, err) : NULL;
    if (!values || check_tensor(files, t, 2, t->shape[0], t->shape[1], err) ||
        tensor_read(files, t, raw, 0, t->bytes, err))
        return NULL;
    widen_values(values, raw, type, t->elements);
    return values;
}

static int info_adapter(Arguments *a, const TensorFiles *files, qlora_error *err) {
    bool found;
    const Json *json = read_json(a->path, "adapter_config.json", 1 << 24, &a->region, &found, err);
    double alpha;
    size_t parameters = 0;
    if (!json) return -1;
    if (!json_to_double(json_get(json, "lora_alpha"), &alpha)) alpha = 8;     // peft's default
    for (size_t i = 0; i < files->n_tensors; i++) {
        const TensorInfo *A = &files->tensors[i], *B = A + 1;         // sorted by name: B follows A
        const char *tail = strstr(A->name, ".lora_A.weight");
        parameters += A->elements;
        if (!tail || i + 1 == files->n_tensors || A->rank != 2 || B->rank != 2 ||
            A->shape[0] != B->shape[1] || strncmp(A->name, B->name, (size_t)(tail - A->name)))
            continue;
        Region values = {.allocator = a->region.allocator};
        const float *a_values = read_floats(files, A, &values, err);
        const float *b_values = a_values ? read_floats(files, B, &values, err) : NULL;
        if (b_values) {
            size_t r = A->shape[0];
            double norm = product_norm(a_values, b_values, r, A->shape[1], B->shape[0]);
            print_safely(A->name, (size_t)(tail - A->name));
            printf(": r %zu, |s B A| %.4g\n", r, alpha / (double)r * norm);
        }
        region_free(&values);
        if (!b_values) return -1;
    }
    printf("adapter: %zu tensors, %zu parameters\n", files->n_tensors, parameters);
    return 0;
}

static int info_model(Arguments *a, const TensorFiles *files, qlora_error *err) {
    qlora_model *q = open_on_host(a->path, &a->options, err);
    if (!q) return -1;
    const Config *c = &q->transformer.config;
    qlora_model_info info = qlora_info(q);
    printf("%s: %zu layers, hidden %zu, feed-forward %zu, %zu heads of %zu (%zu for keys), "
           "vocabulary %zu%s, context %zu\n%.1f M parameters\n", info.architecture, c->L, c->D,
           c->F, c->H, c->hd, c->G, c->V, c->tied ? " (tied)" : "", c->context,
           (double)info.parameters * 1e-6);
    for (int type = 0; type < N_SAFETENSORS_TYPES; type++) {
        size_t n = 0, bytes = 0;
        for (size_t i = 0; i < files->n_tensors; i++)
            if (files->tensors[i].type == type) { n++; bytes += files->tensors[i].bytes; }
        if (n) printf("%zu tensors of type %s, %.1f MB\n", n, safetensors_types[type].name,
                      (double)bytes * 1e-6);
    }
    qlora_close(q);
    return 0;
}

static int run_info(Arguments *a, qlora_error *err) {
    bool adapter = directory_has(a->path, "adapter_config.json");
    TensorFiles *files = tensors_open(a->path, adapter ? "adapter_model.safetensors"
                                                       : "model.safetensors",
                                      a->region.allocator, err);
    int bad = !files ? -1 : adapter ? info_adapter(a, files, err) : info_model(a, files, err);
    tensors_close(files);
    return bad;
}

// ------------------------------------------------------------------------------------------- chat

typedef struct {
    qlora_model *q;
    Region *region;                         // of the messages' texts
    Buffer messages, answer;                // qlora_message; the newest answer's text
    qlora_error *err;
} Chat;

static qlora_message *chat_messages(const Chat *chat, size_t *n) {
    *n = chat->messages.size / sizeof(qlora_message);
    return (qlora_message *)(void *)chat->messages.data;
}

static int chat_push(Chat *chat, const char *role, const char *text, size_t n) {
    qlora_message message = {role, region_text(chat->region, text, n, chat->err)};
    return message.content ? buffer_append(&chat->messages, &message, sizeof message, chat->err)
                           : -1;
}

static int show_answer(void *user, const char *utf8, size_t n) {
    Chat *chat = user;
    return collect_text(&chat->answer, utf8, n) || print_text(NULL, utf8, n);
}

// Generates the answer to the conversation so far and makes it part of it. Ctrl-C ends the answer.
static int chat_answer(Chat *chat, const qlora_sampling *how) {
    size_t n;
    const qlora_message *messages = chat_messages(chat, &n);
    chat->answer.size = 0;
    int bad = qlora_chat(chat->q, messages, n, how, show_answer, chat, chat->err);
    printf("\n");
    if (caught_signal == SIGINT) caught_signal = 0;
    return bad ? -1 : chat_push(chat, "assistant", chat->answer.size ? chat->answer.data : "",
                                chat->answer.size);
}

// Commands of the conversation; 1 when the line was one, 2 to leave.
static int chat_command(Chat *chat, const char *line, const qlora_sampling *how) {
    size_t n;
    const qlora_message *messages = chat_messages(chat, &n);
    if (strcmp(line, "/exit") == 0 || strcmp(line, "/quit") == 0) return 2;
    if (strcmp(line, "/help") == 0)
        printf("/reset      start again\n/system X  start again with system message X\n"
               "/regen      another answer to the last message\n"
               "/exit       leave (so does Ctrl-D)\n");
    else if (strcmp(line, "/reset") == 0)             // the system message stays
        chat->messages.size = n && strcmp(messages[0].role, "system") == 0 ? sizeof *messages : 0;
    else if (strncmp(line, "/system ", 8) == 0) {
        chat->messages.size = 0;
        if (chat_push(chat, "system", line + 8, strlen(line + 8))) return -1;
    } else if (strcmp(line, "/regen") == 0 && n && strcmp(messages[n - 1].role, "assistant") == 0) {
        qlora_sampling again = *how;
        again.seed += n + (uint64_t)time(NULL);
        chat->messages.size -= sizeof *messages;
        if (chat_answer(chat, &again)) return -1;
    } else if (strcmp(line, "/regen") == 0) printf("there is no answer yet\n");
    else return 0;
    return 1;
}

static int run_chat(Arguments *a, qlora_error *err) {
    qlora_model *q = a->q;
    Chat chat = {.q = q, .region = &a->region, .messages.allocator = &q->allocator,
                 .answer.allocator = &q->allocator, .err = err};
    char *line = NULL;
    size_t capacity = 0;
    ssize_t n;
    int bad = need_chat(q, err), command = 0;
    print_banner(q);
    if (!bad && *q->note) print_message(NULL, q->note);
    if (!bad && a->system) bad = chat_push(&chat, "system", a->system, strlen(a->system));
    choose_sampling(a);
    for (; !bad && command != 2 && caught_signal != SIGTERM; a->sampling.seed++) {
        if (isatty(STDIN_FILENO)) printf("> ");
        fflush(stdout);
        caught_signal = 0;
        if ((n = getline(&line, &capacity, stdin)) < 0) break;
        while (n && (line[n - 1] == '\n' || line[n - 1] == '\r')) line[--n] = 0;
        if (!n) continue;
        command = *line == '/' ? chat_command(&chat, line, &a->sampling) : 0;
        bad = command < 0 || (command == 0 && (chat_push(&chat, "user", line, (size_t)n) ||
                                               chat_answer(&chat, &a->sampling)));
    }
    free(line);
    buffer_free(&chat.messages);
    buffer_free(&chat.answer);
    return bad ? -1 : 0;
}

// ------------------------------------------------------------------------------------------- main

typedef struct {
    const char *name;
    const char *positional;                 // arguments; [may be left out], any number of those...
    bool model;                             // the first is a model or adapter, to be opened
    int (*run)(Arguments *a, qlora_error *err);
    const char *help;
} Command;

// In the order of the CMD_ bits.
static const Command command_table[] = {
    {"train", "MODEL DATA...", true, run_train, "fine-tune: learn an adapter from a dataset"},
    {"generate", "PATH [FILE]", true, run_generate, "continue --prompt, or each line of a file"},
    {"chat", "[PATH]", true, run_chat, "talk with a model or adapter; out/ if none is named"},
    {"logits", "PATH", true, run_logits, "logits of --ids to a safetensors file"},
    {"tokenize", "MODEL", false, run_tokenize, "text on standard input to token ids, and back"},
    {"quantize", "MODEL OUT", false, run_quantize, "write a 4-bit directory, as bitsandbytes does"},
    {"init", "CONFIG OUT", false, run_init, "make a random model of the shape of a config.json"},
    {"info", "PATH", false, run_info, "what a model or adapter directory holds"},
    {"eval", "PATH DATA...", true, run_eval, "loss, perplexity and accuracy on a dataset"},
    {"merge", "MODEL ADAPTER OUT", false, run_merge, "base and adapter as one model directory"},
    {"inspect", "MODEL DATA...", false, run_inspect,
     "what a training would see, and what is wrong with it"}};
enum { N_COMMANDS = sizeof command_table / sizeof *command_table };

// The value that an option has now, in brackets, if it is worth showing.
static void print_default(const Arguments *a, const Option *option) {
    const void *from = (const char *)a + option->offset;
    unsigned long long whole = 0;
    if (option->kind == OPT_TEXT && *(const char *const *)from)
        printf(" [%s]", *(const char *const *)from);
    else if (option->kind == OPT_REAL)
        printf(" [%g]", option->size == sizeof(float) ? (double)*(const float *)from
                                                      : *(const double *)from);
    else if (option->kind == OPT_WHOLE) {
        memcpy(&whole, from, option->size);
        printf(" [%llu]", whole);
    }
}

static void print_usage(const Command *command, const Arguments *a) {
    if (!command) {
        printf("qlora %s: QLoRA fine-tuning in one file of C\n\n"
               "usage: qlora COMMAND PATH [...] [--option value]\n\n", QLORA_VERSION);
        for (const Command *c = command_table; c < command_table + N_COMMANDS; c++)
            printf("  %-9s %-18s %s\n", c->name, c->positional, c->help);
        printf("\nqlora COMMAND --help lists the options of a command.\n");
        return;
    }
    printf("usage: qlora %s %s [--option value]\n%s\n\n", command->name, command->positional,
           command->help);
    for (const Option *o = option_table; o < option_table + N_OPTIONS; o++) {
        if (!(o->commands >> (command - command_table) & 1)) continue;
        printf("  --%-28s %s", o->name, o->help);
        print_default(a, o);
        printf("\n");
    }
}

// Options and positional arguments of a command into a. Returns 1 if only --help was asked for.
static int parse_arguments(Arguments *a, const Command *command, char **argv, int argc,
                           qlora_error *err) {
    const char *positional = command->positional;
    int n = 0, most = 1, least, bit = 1 << (command - command_table);
    for (const char *c = positional; *c; c++) most += *c == ' ';
    least = most - (strchr(positional, '[') != NULL);
    if (strstr(positional, "...")) most = INT_MAX;
    for (int i = 2; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return 1;
        if (strncmp(argv[i], "--", 2) == 0) {
            if (parse_option(a, bit, argv, argc, &i, err)) return -1;
        } else if (n == most)
            return fail(err, "%s: expected %s, found also %s", command->name, positional, argv[i]);
        else argv[n++] = argv[i];           // moved to the front, which is read by then
    }
    if (n < least)
        return fail(err, "%s: expected %s; see qlora %s --help", command->name, positional,
                    command->name);
    for (int i = n; i < argc; i++) argv[i] = NULL;
    a->path = argv[0];
    a->data = argv[1];
    a->more = (const char *const *)argv + 2;
    return 0;
}

int main(int argc, char **argv) {
    const qlora_allocator heap = {default_allocate, default_release, NULL};
    qlora_error err = {{0}};
    Arguments a = {.options = qlora_default_options(), .train = qlora_default_train_options(),
                   .sampling = {.max_new_tokens = 256, .top_p = 1, .repetition_penalty = 1},
                   .double_quant = -1, .max_shard = (size_t)5000000000, .show = 3,
                   .region.allocator = &heap};
    const Command *command = NULL;
    const char *name = argc > 1 ? argv[1] : "";
    if (strcmp(name, "--version") == 0) {
        printf("qlora %s, bf16 %s\n", QLORA_VERSION, has_bf16_units() ? "in hardware" : "emulated");
        return 0;
    }
    for (size_t i = 0; i < N_COMMANDS; i++)
        if (strcmp(name, command_table[i].name) == 0) command = &command_table[i];
    if (!command) {
        bool help = strcmp(name, "--help") == 0 || strcmp(name, "help") == 0;
        print_usage(NULL, &a);
        if (*name && !help) fprintf(stderr, "qlora: unknown command %s\n", name);
        return help ? 0 : 2;
    }
    for (int i = 0; i < argc; i++) {
        size_t used = strlen(a.command_line);
        snprintf(a.command_line + used, sizeof a.command_line - used, "%s%s", i ? " " : "",
                 argv[i]);
    }
    int parsed = parse_arguments(&a, command, argv, argc, &err);
    if (parsed > 0) print_usage(command, &a);
    if (parsed < 0) fprintf(stderr, "qlora: %s\n", err.text);
    if (parsed) return parsed < 0 ? 2 : 0;
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    int bad = finish_arguments(&a, 1 << (command - command_table), &err) ||
              (command->model && !(a.q = qlora_open(a.path, &a.options, &err))) ||
              (a.adapter && qlora_load_adapter(a.q, a.adapter, &err)) || command->run(&a, &err);
    qlora_close(a.q);
    region_free(&a.region);
    if (bad) fprintf(stderr, "qlora: %s\n", err.text);
    return caught_signal ? 128 + caught_signal : bad;
}
#endif // QLORA_MAIN
// =================================================================================================
//  18. Fast kernels
//
//  The operations of chapter 3 that cost time, once more: the LoRA linears, the head and attention.
//  All of them are sums of matrix products, C += A B, and all products run through one small
//  kernel, which keeps a tile of C, 12 rows x 32 columns, in registers while it walks along the
//  sum:
//
//      word    32 bits: one float32, or two bf16 that are neighbours along the sum
//      A       a row's words, up to 256 of them, are contiguous; rows are PITCH words apart
//      B       a line for each step of the sum, which holds the words of all columns
//
//  A step loads two vectors of B and 12 words of A for 24 multiply-adds, so that the multipliers
//  never wait: with float32 words 24 x 16 of them, with bf16 words (vdpbf16ps) twice as many. That
//  is the roofline of this chapter. Everything else is packing: bringing activations, 4-bit
//  weights, keys or probabilities into the shapes of A and B, a cache-sized block at a time. A
//  packed block of weights meets up to 516 rows, so that unpacking NF4 is a few percent of the
//  work.
//
//  Determinism: a sum runs over k upwards, whatever the height of the tile and wherever a block
//  ends (float32 sums in memory and in registers are the same). So a token's result has the same
//  bits in any batch, with a cache or without, and with any number of threads.
// =================================================================================================
#if !REAL_IS_DOUBLE

// ---------------------------------------------------------------------------------------- vectors
//
// Vectors are as wide as the machine's registers, by the vector types of gcc and clang. A tile is
// two of them wide and as high as registers suffice. Intrinsics stand where the types have no word
// for it: fused multiply-adds, bf16, table lookups and transposing.

#if defined(__AVX512F__)
#include <immintrin.h>
enum { LANES = 16, TILE_ROWS = 12 };                          // 24 of 32 registers are sums
#elif defined(__AVX__)
#include <immintrin.h>
enum { LANES = 8, TILE_ROWS = 6 };                            // 12 of 16
#else
enum { LANES = 4, TILE_ROWS = 6 };
#endif

typedef float Word __attribute__((may_alias));                // may hold two bf16 instead
typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t VecInt __attribute__((vector_size(LANES * 4)));
typedef float VecUnaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline Vec vec_load(const Word *from) { return *(const VecUnaligned *)from; }
static inline void vec_store(Word *to, Vec v) { *(VecUnaligned *)to = v; }
static inline Vec vec_all(float x) { return x - (Vec){0}; }
static inline Vec vec_where(VecInt mask, Vec v) { return (Vec)((VecInt)v & mask); }     // else 0

// sum + a b, with one rounding where the machine has it.
static inline Vec vec_fma(Vec sum, Vec a, Vec b) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX__) && defined(__FMA__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

// sum + a b over the two bf16 of each word. Without such an instruction words are float32 always.
#if defined(__AVX512BF16__)
static inline Vec vec_dot_bf16(Vec sum, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
#define vec_dot_bf16 vec_fma
#endif

static inline float vec_largest(Vec v) {
    float largest = v[0];
    for (int i = 1; i < LANES; i++) largest = v[i] > largest ? v[i] : largest;
    return largest;
}

static inline float vec_sum(Vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

// exp_float of chapter 3 in every lane, for arguments from which a maximum was subtracted. What is
// below e^-87 becomes 0: masked scores are -inf and must vanish.
static inline Vec vec_exp(Vec x) {
    const Vec shift = vec_all(12582912.0f);
    Vec shifted = vec_fma(shift, x, vec_all(1.44269504f)), n = shifted - shift;
    Vec r = vec_fma(vec_fma(x, n, vec_all(-0.693145752f)), n, vec_all(-1.42860677e-6f));
    static const float coefficients[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    Vec p = vec_all(1.0f / 720);
    for (int i = 0; i < 6; i++) p = vec_fma(vec_all(coefficients[i]), p, r);
    return vec_where(~(x < vec_all(-87.0f)),
                     p * (Vec)(((VecInt)shifted - (VecInt)shift + 127) << 23));      // p 2^n
}

// --------------------------------------------------------------------------------- the tile kernel

enum {
    BLOCK_STEPS = 256,              // steps of a sum that are packed together
    PACK_ROWS = 32,                 // rows of a packing task
    PITCH = BLOCK_STEPS + 16,       // of A's rows: no power of 2, which would crowd one cache set
    LINE = 64                       // words of a line of packed weights: columns of a task
};

// One tile, c (HEIGHT, 2 vectors) = or += a b. HEIGHT is a constant, so that every sum is a
// register. While a full tile is computed, the rows of the next are fetched: they lie right behind.
// noinline: within a larger function gcc 12 spills sums, which halves the speed.
#define TILE(name, HEIGHT, MULTIPLY_ADD) \
    __attribute__((noinline)) \
    static void name(Word *c, size_t c_stride, bool add, const Word *a, const Word *b, \
                     size_t b_stride, size_t steps) { \
        Vec left[HEIGHT], right[HEIGHT]; \
        const Word *next = a + HEIGHT * PITCH; \
        _Pragma("GCC unroll 12") \
        for (size_t i = 0; i < HEIGHT; i++) { \
            left[i] = add ? vec_load(c + i * c_stride) : (Vec){0}; \
            right[i] = add ? vec_load(c + i * c_stride + LANES) : (Vec){0}; \
        } \
        for (; steps--; a++, b += b_stride, next += HEIGHT) { \
            if (HEIGHT == TILE_ROWS) __builtin_prefetch(next); \
            Vec b0 = vec_load(b), b1 = vec_load(b + LANES); \
            _Pragma("GCC unroll 12") \
            for (size_t i = 0; i < HEIGHT; i++) { \
                Vec x = vec_all(a[i * PITCH]); \
                left[i] = MULTIPLY_ADD(left[i], x, b0); \
                right[i] = MULTIPLY_ADD(right[i], x, b1); \
            } \
        } \
        _Pragma("GCC unroll 12") \
        for (size_t i = 0; i < HEIGHT; i++) { \
            vec_store(c + i * c_stride, left[i]); \
            vec_store(c + i * c_stride + LANES, right[i]); \
        } \
    }
TILE(tile_full, TILE_ROWS, vec_fma)
TILE(tile_4, 4, vec_fma)
TILE(tile_1, 1, vec_fma)
TILE(tile_full_bf16, TILE_ROWS, vec_dot_bf16)
TILE(tile_4_bf16, 4, vec_dot_bf16)
TILE(tile_1_bf16, 1, vec_dot_bf16)

static const struct {
    size_t height;
    void (*run[2])(Word *c, size_t c_stride, bool add, const Word *a, const Word *b,
                   size_t b_stride, size_t steps);            // [bf16]
} tiles[] = {{TILE_ROWS, {tile_full, tile_full_bf16}}, {4, {tile_4, tile_4_bf16}},
             {1, {tile_1, tile_1_bf16}}};

// c (rows, columns) = or += a (rows, steps) b (steps, columns). Whole tiles are written: up to 31
// columns of c beyond the last must exist and hold nothing that is needed.
static void multiply(bool bf16, Word *c, size_t c_stride, bool add, const Word *a, const Word *b,
                     size_t b_stride, size_t rows, size_t columns, size_t steps) {
    for (size_t row = 0, height; row < rows; row += height) {
        size_t kernel = 0;
        while (tiles[kernel].height > rows - row) kernel++;
        height = tiles[kernel].height;
        for (size_t column = 0; column < columns; column += 2 * LANES)
            tiles[kernel].run[bf16](c + row * c_stride + column, c_stride, add, a + row * PITCH,
                                    b + column, b_stride, steps);
    }
}

// Row j of `to` is column j of `from`, for 16 x 16 words.
static void transpose_16(Word *to, size_t to_stride, const Word *from, size_t from_stride) {
#if defined(__AVX512F__)
    // Riffling the upper with the lower half of the rows, word by word, halves the distance between
    // a column's words; four times, and they are neighbours.
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    __m512 a[16], b[16];
    for (size_t i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from + i * from_stride);
    #pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
        #pragma GCC unroll 8
        for (size_t i = 0; i < 8; i++) {
            b[2 * i] = _mm512_permutex2var_ps(a[i], low, a[i + 8]);
            b[2 * i + 1] = _mm512_permutex2var_ps(a[i], high, a[i + 8]);
        }
        memcpy(a, b, sizeof a);
    }
    for (size_t i = 0; i < 16; i++) _mm512_storeu_ps(to + i * to_stride, a[i]);
#else
    for (size_t i = 0; i < 16; i++)
        for (size_t j = 0; j < 16; j++) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

// ---------------------------------------------------------------------------------------- dropout

// Which mask rows get: row i is token first + i. lora NULL: none.
typedef struct { const Lora *lora; const Batch *batch; size_t first; } Mask;

static Mask mask_of(const Lora *lora, const Batch *batch, size_t first) {
    return (Mask){lora->r && has_dropout(lora, batch) ? lora : NULL, batch, first};
}

// Multiplies features k .. k+n-1 of a row with its mask, as dropout_row does, but runs Philox for
// several counters at once, 4 features each, in a loop that becomes vector code.
static void apply_mask(real *x, size_t k, size_t n, const Mask *mask, size_t row) {
    enum { MASK_LANES = 16 };
    const Lora *lora = mask->lora;
    const Batch *batch = mask->batch;
    const Span *span = batch->spans;
    size_t t = mask->first + row;
    while (t >= span->q0 + span->nq) span++;
    uint32_t key[2] = {(uint32_t)batch->seed ^ (uint32_t)(batch->seed >> 32) * 0x9E3779B9u,
                       batch->step};
    uint32_t position = (uint32_t)(t - span->q0), ordinal = span->ordinal, module = lora->module;
    real keep = 1 / (1 - (real)lora->dropout);                // so that the mean stays
    for (size_t begin = k / 4 * 4; begin < k + n; begin += 4 * MASK_LANES) {
        uint32_t bits[4][MASK_LANES];
        real factor[4 * MASK_LANES];
        for (size_t i = 0; i < MASK_LANES; i++) {
            uint32_t counter[4] = {(uint32_t)(begin / 4 + i), position, ordinal, module}, out[4];
            philox(out, counter, key);
            for (size_t j = 0; j < 4; j++) bits[j][i] = out[j];
        }
        for (size_t i = 0; i < MASK_LANES; i++)
            for (size_t j = 0; j < 4; j++)
                factor[4 * i + j] = unit_float(bits[j][i]) < lora->dropout ? 0 : keep;
        size_t from = max_size(begin, k), to = min_size(begin + 4 * MASK_LANES, k + n);
        for (size_t f = from; f < to; f++) x[f - k] *= factor[f - begin];
    }
}

// ---------------------------------------------------------------------------------------- operands

static bool uses_bf16(const Device *dev) { return has_bf16_units() && dev->act == DT_BF16; }

// Steps of a sum over n elements. The last word of an odd sum is padded with 0 on both sides.
static size_t steps_of(bool bf16, size_t n) { return bf16 ? (n + 1) / 2 : n; }

// What is packed: frozen weights, trainable ones or activations. As the right operand, straight:
// its columns are the rows of `matrix`, the sum runs along them (x W^T). Transposed: its columns
// are those of `matrix`, the sum runs down (dy W).
typedef struct {
    Weight matrix;                  // (columns, n) straight, (n, columns) transposed
    bool transposed;
    Mask mask;                      // of the matrix's rows, when it is x
} Right;

// A trainable matrix, or activations.
static Right plain_matrix(DType act, const void *data, size_t N, size_t K, bool transposed) {
    Weight w = {.dtype = act == DT_REAL ? DT_F32 : act, .N = N, .K = K, .data = data};
    return (Right){.matrix = w, .transposed = transposed};
}

// n elements (at most 512) of a row of the matrix from column k on, as they enter the product:
// bf16, or float32 with the values that chapter 3 would multiply.
static void unpack_row(void *out, const Right *b, size_t row, size_t k, size_t n,
                       const Device *dev) {
    const Weight *w = &b->matrix;
    size_t index = row * w->K + k;
    bool bf16 = uses_bf16(dev);
    real values[2 * BLOCK_STEPS];
#if defined(__AVX512BF16__)
    // Whole 4-bit blocks. The 16 levels are scaled and rounded once, then a permutation of 16-bit
    // words looks 32 weights up. Byte x, widened to 32 bits and spread to x << 16 | x >> 4, is two
    // indices: the high nibble comes first, and bits beyond the fourth meet copies of the table.
    if (bf16 && is_4bit(w->dtype) && index % QUANT_BLOCK == 0 && n % QUANT_BLOCK == 0) {
        const uint8_t *codes = (const uint8_t *)w->data + index / 2;
        __m512 levels = _mm512_loadu_ps(w->code);
        for (size_t i = 0; i < n; i += 32, codes += 16) {
            __m512 scale = _mm512_set1_ps(block_scale(w, (index + i) / QUANT_BLOCK));
            __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(levels, scale));
            __m128i packed = _mm_loadu_si128((const __m128i *)(const void *)codes);
            __m512i x = _mm512_cvtepu8_epi32(packed);
            x = _mm512_or_si512(_mm512_slli_epi32(x, 16), _mm512_srli_epi32(x, 4));
            x = _mm512_permutexvar_epi16(x, _mm512_broadcast_i64x4(rounded));
            _mm512_storeu_si512((uint16_t *)out + i, x);
        }
        return;
    }
#endif
    real *wide = bf16 ? values : out;
    DType final = bf16 ? DT_BF16 : dev->act == DT_REAL ? DT_F32 : DT_OTHER;   // enters as it stands
    if (w->dtype == final && !b->mask.lora) {
        memcpy(out, (const char *)w->data + index * dtype_size(final), n * dtype_size(final));
        return;
    }
    if (b->mask.lora) {                                       // then it is x
        load_row(wide, dev->act, w->data, index, n);
        apply_mask(wide, k, n, &b->mask, row);
        for (size_t i = 0; !bf16 && i < n; i++) wide[i] = as_act(dev->act, wide[i]);
    } else weight_row(wide, w, row, k, n, dev->act);
    if (bf16) store_row(DT_BF16, out, 0, values, n);
}

// ------------------------------------------------------------------------------------- packing A

// The left operand: blocks of 256 steps, in each the rows one after the other.
typedef struct { Word *words; size_t rows, n; } Left;         // n elements along the sum

static size_t left_words(size_t rows, size_t n) { return ceil_div(n, BLOCK_STEPS) * rows * PITCH; }

static Left left_alloc(Arena *arena, bool bf16, size_t rows, size_t n) {
    Word *words = arena_alloc(arena, left_words(rows, steps_of(bf16, n)), sizeof *words);
    return (Left){words, rows, n};
}

static Word *left_at(const Left *a, size_t row, size_t step) {
    return a->words + (step / BLOCK_STEPS * a->rows + row) * PITCH + step % BLOCK_STEPS;
}

typedef struct { const Device *dev; Left to; const Right *from; } PackTask;

static void pack_task(void *arguments, size_t task, int thread) {
    PackTask *a = arguments;
    bool bf16 = uses_bf16(a->dev);
    size_t n = a->to.n, end = min_size(a->to.rows, (task + 1) * PACK_ROWS), count;
    (void)thread;
    for (size_t i = task * PACK_ROWS; i < end; i++)
        for (size_t k = 0; k < n; k += count) {
            Word *to = left_at(&a->to, i, steps_of(bf16, k));
            count = min_size(bf16 ? 2 * BLOCK_STEPS : BLOCK_STEPS, n - k);
            if (bf16) to[count / 2] = 0;                      // half of it is an odd sum's padding
            unpack_row(to, a->from, i, k, count, a->dev);
        }
}

// The rows of a matrix, n columns of them.
static Left pack_rows(Device *dev, Arena *arena, const Right *from, size_t n) {
    PackTask a = {dev, left_alloc(arena, uses_bf16(dev), from->matrix.N, n), from};
    parallel_for(dev->pool, ceil_div(from->matrix.N, PACK_ROWS), pack_task, &a);
    return a.to;
}

// The transpose of x (T, r): row j holds feature j of n tokens from `first` on.
static Left pack_transposed(Device *dev, Arena *arena, const void *x, size_t first, size_t n,
                            size_t r) {
    bool bf16 = uses_bf16(dev);
    Left a = left_alloc(arena, bf16, r, n);
    for (size_t t = 0; t < round_up(n, 1 + bf16); t++)
        for (size_t j = 0; j < r; j++) {
            size_t index = (first + t) * r + j;
            void *to = left_at(&a, j, bf16 ? t / 2 : t);
            if (!bf16) load_row(to, dev->act, x, index, 1);
            else ((uint16_t *)to)[t % 2] = t < n ? ((const uint16_t *)x)[index] : 0;
        }
    return a;
}

// ------------------------------------------------------------------------------------- packing B

// Packs `width` columns (at most 64) of the right operand from `column` on, elements k .. k+n-1 of
// the sum, to lines of 64 words; what is beyond the width is 0. A transposed line is two rows of
// the matrix, word by word together (or one in float32). Straight, 16 columns at a time are
// unpacked and turned.
static void pack_right(Word *lines, const Right *b, size_t column, size_t width, size_t k, size_t n,
                       const Device *dev) {
    bool bf16 = uses_bf16(dev);
    size_t steps = steps_of(bf16, n);
    if (b->transposed) {
        for (size_t i = 0; i < n; i += 1 + bf16, lines += LINE) {
            uint16_t halves[2][LINE] = {{0}};
            if (!bf16) {
                memset(lines, 0, LINE * sizeof *lines);
                unpack_row(lines, b, k + i, column, width, dev);
                continue;
            }
            for (size_t h = 0; h < 2 && i + h < n; h++)
                unpack_row(halves[h], b, k + i + h, column, width, dev);
            for (size_t j = 0; j < LINE; j++) {
                uint32_t pair = halves[0][j] | (uint32_t)halves[1][j] << 16;
                memcpy(lines + j, &pair, sizeof pair);
            }
        }
        return;
    }
    Word rows[16][BLOCK_STEPS];
    memset(rows, 0, sizeof rows);
    for (size_t c = 0; c < LINE; c += 16) {
        for (size_t i = 0; i < 16; i++) {
            if (c + i < width) unpack_row(rows[i], b, column + c + i, k, n, dev);
            else memset(rows[i], 0, sizeof rows[i]);
        }
        for (size_t step = 0; step < steps; step += 16)
            transpose_16(lines + step * LINE + c, LINE, rows[0] + step, BLOCK_STEPS);
    }
}

// ----------------------------------------------------------------------------------------- matmul
//
// out (rows, columns) = or += scale * (sum over segments of left times right) + bias, rounded once.

enum { MAX_SEGMENTS = 6, TASK_ROWS = 516 };                   // three products and their adapters

typedef struct {
    Left left;                                                // (rows, n)
    Right right;                                              // (n, columns)
    Mask mask;                      // of the rows of the product
} Segment;

typedef struct {
    Device *dev;
    Segment segments[MAX_SEGMENTS];
    size_t n_segments, rows, columns;                         // of out
    real scale;                                               // 1 but for u and du
    const float *bias;              // (columns) or NULL
    void *out;                      // element (i, j) is out[i * row_stride + j * column_stride]
    DType type;                     // of out; real when adding
    size_t row_stride, column_stride;   // other than (columns, 1) for dB, which is stored turned
    bool add;                                                 // +=, else =
    size_t task_rows;                                         // of a task, see matmul
} Matmul;

// A task is up to 516 rows x 64 columns of the product. Its sums (129 KB) and a block of the right
// operand (64 KB) stay in the second-level cache, the part of the block that a tile needs in the
// first, and the left operand's rows stream past: 48 bytes in the 12 cycles of a step, a tenth of
// what that cache delivers.
static void matmul_task(void *arguments, size_t task, int thread) {
    const Matmul *m = arguments;
    bool bf16 = uses_bf16(m->dev);
    size_t row_tasks = ceil_div(m->rows, m->task_rows), row = task % row_tasks * m->task_rows;
    size_t column = task / row_tasks * LINE, width = min_size(LINE, m->columns - column);
    size_t rows = min_size(m->task_rows, m->rows - row);
    Arena scratch = {(char *)thread_rows(m->dev, thread), 0};
    Word *lines = arena_alloc(&scratch, (BLOCK_STEPS + 16) * LINE, sizeof *lines);
    Word *sums = arena_alloc(&scratch, TASK_ROWS * LINE, sizeof *sums);
    Word *share = arena_alloc(&scratch, TASK_ROWS * LINE, sizeof *share);
    for (size_t s = 0; s < m->n_segments; s++) {
        const Segment *segment = &m->segments[s];
        Word *to = segment->mask.lora ? share : sums;
        bool add = s && to == sums;
        size_t n = segment->left.n, per_block = bf16 ? 2 * BLOCK_STEPS : BLOCK_STEPS, count;
        for (size_t k = 0; k < n; k += count, add = true) {
            count = min_size(per_block, n - k);
            pack_right(lines, &segment->right, column, width, k, count, m->dev);
            multiply(bf16, to, LINE, add, left_at(&segment->left, row, steps_of(bf16, k)), lines,
                     LINE, rows, width, steps_of(bf16, count));
        }
        for (size_t i = 0; to == share && i < rows; i++) {
            apply_mask((real *)share + i * LINE, column, width, &segment->mask, row + i);
            for (size_t j = 0; j < width; j++) sums[i * LINE + j] += share[i * LINE + j];
        }
    }
    for (size_t i = 0; i < rows; i++, sums += LINE) {         // scale, bias, one rounding
        size_t at = (row + i) * m->row_stride + column * m->column_stride;
        if (m->scale != 1) for (size_t j = 0; j < width; j++) sums[j] *= m->scale;
        if (m->bias) for (size_t j = 0; j < width; j++) sums[j] += m->bias[column + j];
        real *out = (real *)m->out + at;                      // used where out is real
        if (!m->add) store_row(m->type, m->out, at, (const real *)sums, width);
        else for (size_t j = 0; j < width; j++) out[j * m->column_stride] += sums[j];
    }
}

// Tasks shrink until every thread has a few of them; fewer rows than 96 would unpack weights more
// often than it pays.
static void matmul(Matmul *m) {
    size_t threads = (size_t)m->dev->pool->threads, groups = ceil_div(m->columns, LINE);
    size_t wanted = threads == 1 ? 1 : min_size(ceil_div(4 * threads, groups), m->rows / 96);
    size_t parts = max_size(max_size(wanted, 1), ceil_div(m->rows, TASK_ROWS));
    m->task_rows = round_up(ceil_div(m->rows, parts), TILE_ROWS);
    parallel_for(m->dev->pool, groups * ceil_div(m->rows, m->task_rows), matmul_task, m);
}

// The common case: one segment, a row-major result that is written.
static Matmul matmul_of(Device *dev, Left left, Right right, size_t columns, void *out,
                        DType type) {
    return (Matmul){.dev = dev, .segments = {{.left = left, .right = right}}, .n_segments = 1,
                    .rows = left.rows, .columns = columns, .scale = 1, .out = out, .type = type,
                    .row_stride = columns, .column_stride = 1};
}

// ------------------------------------------------------------------------------------ LoRA linears
//
// With u and du packed like activations, the low-rank half of a linear is a few more terms of the
// sum that is in registers anyway:
//     u  = s x~ A^T                              du = s dy B
//     y  = [x | u] [W | B]^T + bias              dx = sum over products of [dy | du] [W ; A]
// and the gradients are products with r rows, whose left operands are u and du transposed:
//     dB^T += u^T dy                             dA += du^T x~
// FLOPs for T tokens: 2 T N K forward, the same for dx, and 2 T r (N + K) for each of [u, u B^T],
// [du, du A] and [dB, dA]. Bytes: N K / 2 of codes for every 512 tokens, which is nothing, so that
// all of it is bound by arithmetic; only at T = 1 do unpacking and memory decide.

enum {
    CHUNK_ROWS = 1024,              // tokens that are packed at a time: bounds scratch only
    HEAD_COLUMNS = 4096             // columns of dlogits at a time: 8 MB for 1024 rows
};

// Forward; the sums go to y, or unrounded to the logits.
static void forward_fast(Device *dev, real *logits, const Product *products, size_t n,
                         const void *x, const Batch *batch) {
    DType act = dev->act, type = logits ? DT_REAL : act;
    size_t K = products[0].linear->weight.K;
    for (size_t first = 0; first < batch->T; first += CHUNK_ROWS) {
        size_t rows = min_size(CHUNK_ROWS, batch->T - first);
        Arena scratch = {dev->scratch, 0};
        Right tokens = plain_matrix(act, act_at(act, x, first * K), rows, K, false);
        Left px = pack_rows(dev, &scratch, &tokens, K);
        for (size_t i = 0; i < n; i++) {
            const Linear *linear = products[i].linear;
            const Lora *lora = &linear->lora;
            size_t N = linear->weight.N, r = lora->r;
            Arena memory = scratch;                           // each product begins here
            Matmul y = matmul_of(dev, px, (Right){.matrix = linear->weight}, N,
                                 act_at(type, logits ? logits : products[i].y, first * N), type);
            y.bias = linear->bias;
            if (r) {                                          // u, and its share of y
                tokens.mask = mask_of(lora, batch, first);    // every module draws its own
                Left masked = tokens.mask.lora ? pack_rows(dev, &memory, &tokens, K) : px;
                Matmul u = matmul_of(dev, masked, plain_matrix(DT_REAL, lora->A, r, K, false), r,
                                     act_at(act, products[i].u, first * r), act);
                u.scale = lora->scale;
                matmul(&u);
                Right down = plain_matrix(act, u.out, rows, r, false);
                y.segments[y.n_segments++] = (Segment){
                    .left = pack_rows(dev, &memory, &down, r),
                    .right = plain_matrix(DT_REAL, lora->B, N, r, false)};
            }
            matmul(&y);
        }
    }
}

static void linears_forward_fast(Device *dev, Product *products, size_t n, const void *x,
                                 const Batch *batch) {
    forward_fast(dev, NULL, products, n, x, batch);
}

static void head_logits_fast(Device *dev, real *logits, const Product *slice, const void *x,
                             const Batch *rows) {
    forward_fast(dev, logits, slice, 1, x, rows);
}

// What the two halves of a backward pass share.
typedef struct {
    Device *dev;
    const Product *products;                                  // y: dy (T, N) act
    size_t n, K;
    const void *x;                  // (T, K)
    const Batch *batch;
    void *dx;                       // (T, K) act, or NULL; the head's is real and added to
    size_t dy_stride;               // of the head's dy, else 0: N
    void *du[3];                    // (T, r) act each
} Backward;

// du and dx of tokens first .. first+rows-1.
static void backward_chunk(const Backward *b, Arena scratch, size_t first, size_t rows) {
    Device *dev = b->dev;
    DType act = dev->act, type = b->dy_stride ? DT_REAL : act;
    void *out = b->dx ? act_at(type, b->dx, first * b->K) : NULL;
    Matmul dx = matmul_of(dev, (Left){.rows = rows}, (Right){0}, b->K, out, type);
    dx.add = b->dy_stride != 0;
    dx.n_segments = 0;
    for (size_t i = 0; i < b->n; i++) {
        const Product *p = &b->products[i];
        const Lora *lora = &p->linear->lora;
        size_t N = p->linear->weight.N, r = lora->r, stride = b->dy_stride ? b->dy_stride : N;
        if (!r && !out) continue;                             // frozen, and nothing below learns
        Right tokens = plain_matrix(act, act_at(act, p->y, first * stride), rows, stride, false);
        Left dy = pack_rows(dev, &scratch, &tokens, N);
        dx.segments[dx.n_segments++] = (Segment){
            .left = dy, .right = {.matrix = p->linear->weight, .transposed = true}};
        if (!r) continue;
        Matmul du = matmul_of(dev, dy, plain_matrix(DT_REAL, lora->B, N, r, true), r,
                              act_at(act, b->du[i], first * r), act);
        du.scale = lora->scale;
        matmul(&du);
        tokens = plain_matrix(act, du.out, rows, r, false);
        dx.segments[dx.n_segments++] = (Segment){
            .left = pack_rows(dev, &scratch, &tokens, r),
            .right = plain_matrix(DT_REAL, lora->A, r, b->K, true),
            .mask = mask_of(lora, b->batch, first)};
    }
    if (out) matmul(&dx);
}

// dA and dB of one sequence: each sum is formed on its own, from the sequence's first token to its
// last, and then added.
static void backward_span(const Backward *b, Arena scratch, const Span *span) {
    DType act = b->dev->act;
    size_t K = b->K, first = span->q0, n_tokens = span->nq;
    for (size_t i = 0; i < b->n && n_tokens; i++) {
        const Product *p = &b->products[i];
        const Lora *lora = &p->linear->lora;
        size_t N = p->linear->weight.N, r = lora->r, stride = b->dy_stride ? b->dy_stride : N;
        if (!r) continue;
        Arena memory = scratch;
        Left u = pack_transposed(b->dev, &memory, p->u, first, n_tokens, r);
        Left du = pack_transposed(b->dev, &memory, b->du[i], first, n_tokens, r);
        Right dy = plain_matrix(act, act_at(act, p->y, first * stride), n_tokens, stride, true);
        Right x = plain_matrix(act, act_at(act, b->x, first * K), n_tokens, K, true);
        x.mask = mask_of(lora, b->batch, first);
        Matmul dB = matmul_of(b->dev, u, dy, N, lora->dB, DT_REAL);
        Matmul dA = matmul_of(b->dev, du, x, K, lora->dA, DT_REAL);
        dA.add = dB.add = true;
        dB.row_stride = 1;                                    // dB is (N, r), the product (r, N)
        dB.column_stride = r;
        matmul(&dB);
        matmul(&dA);
    }
}

static void backward_fast(Device *dev, void *dx, size_t dy_stride, const Product *products,
                          size_t n, const void *x, const Batch *batch) {
    Backward b = {dev, products, n, products[0].linear->weight.K, x, batch, dx, dy_stride, {NULL}};
    Arena scratch = {dev->scratch, 0};
    for (size_t i = 0; i < n; i++)
        b.du[i] = arena_alloc(&scratch, batch->T * products[i].linear->lora.r, act_size(dev->act));
    for (size_t first = 0; first < batch->T; first += CHUNK_ROWS)
        backward_chunk(&b, scratch, first, min_size(CHUNK_ROWS, batch->T - first));
    for (size_t s = 0; s < batch->n_spans; s++) backward_span(&b, scratch, &batch->spans[s]);
}

static void linears_backward_fast(Device *dev, void *dx, const Product *products, size_t n,
                                  const void *x, const Batch *batch) {
    backward_fast(dev, dx, 0, products, n, x, batch);
}

// The head's dy is larger than any cache, so it is taken in slices of its columns, which are
// linears of their own that add to the same dx.
static void head_backward_fast(Device *dev, real *dx, const Product *slice, const void *x,
                               const Batch *rows) {
    size_t N = slice->linear->weight.N;
    for (size_t n = 0; n < N; n += HEAD_COLUMNS) {
        Linear part = head_slice(slice->linear, n, min_size(HEAD_COLUMNS, N - n));
        Product p = {&part, act_at(dev->act, slice->y, n), slice->u};
        backward_fast(dev, dx, N, &p, 1, x, rows);
    }
}

// -------------------------------------------------------------------------------------- attention
//
// After Dao 2022 and 2023 (FlashAttention): scores exist only as tiles in the cache, the softmax is
// kept as a running maximum and sum. All arithmetic is float32. The rows of a task are the (query,
// head) pairs of one key/value group, query by query, so that its heads share what is packed of the
// keys and values. FLOPs: 4 hd per visible pair forward, 10 hd backward, of which 2 hd recompute
// the scores. The products are those of chapter 3; what is needed as A is widened to rows, what is
// needed as B is widened, or turned, to lines.

enum { ATTENTION_ROWS = 64, ATTENTION_KEYS = 64, MAX_HEAD = BLOCK_STEPS };

// One group of one sequence, as rows.
typedef struct {
    const AttentionTask *a;
    const Span *span;
    size_t group, shared;           // shared: query heads of the group, H / G
    size_t rows;                    // nq * shared
    size_t hd, wide;                // wide: hd rounded up to whole tiles
} Group;

static Group attention_group(const AttentionTask *a, const Span *span, size_t group) {
    size_t shared = a->shape.H / a->shape.G;
    return (Group){a, span, group, shared, span->nq * shared, a->shape.hd,
                   round_up(a->shape.hd, 32)};
}

// Index of a row in tensors (T, H), of a key in tensors (.., G); times hd in those of heads.
static size_t row_index(const Group *g, size_t row) {
    return (g->span->q0 + row / g->shared) * g->a->shape.H + g->group * g->shared + row % g->shared;
}
static size_t key_index(const Group *g, size_t key) {
    return (g->span->k0 + key) * g->a->shape.G + g->group;
}

// The keys that a row sees.
static size_t row_first(const Group *g, size_t row) {
    return first_key(g->span, row / g->shared, g->a->shape.window);
}
static size_t row_end(const Group *g, size_t row) { return end_key(g->span, row / g->shared); }

// What a task keeps in its thread's scratch; every buffer's rows are PITCH words apart. Forward
// needs half of it.
typedef struct {
    Word *q, *out;                  // (ROWS, hd) rows of the task; in backward q and dout
    Word *k, *v;                    // (KEYS, hd) a block of keys and values
    Word *q_t, *dout_t, *k_t, *dq_t;    // (hd, ROWS or KEYS) turned
    Word *p, *ds;                   // forward: (TILE_ROWS, KEYS), backward: (KEYS, ROWS)
    Vec *sum;                       // (ROWS) partial sums of the softmax
    float *max, *expected;          // (ROWS) the largest score, or in backward lse; dout . out
    int32_t *first, *end;           // (ROWS) keys that a row sees
    Word *dk, *dv;                  // (keys, wide) of the whole sequence
} AttentionMemory;

static void carve_attention(AttentionMemory *m, size_t hd, size_t keys, Arena *arena) {
    size_t wide = round_up(hd, 32), rows[] = {ATTENTION_ROWS, ATTENTION_KEYS, wide};
    Word **blocks[3][4] = {{&m->q, &m->out}, {&m->k, &m->v, &m->p, &m->ds},
                           {&m->q_t, &m->dout_t, &m->k_t, &m->dq_t}};
    for (size_t i = 0; i < 3; i++)
        for (size_t j = 0; j < 4 && blocks[i][j]; j++)
            *blocks[i][j] = arena_alloc(arena, rows[i] * PITCH, sizeof(Word));
    m->sum = arena_alloc(arena, ATTENTION_ROWS, sizeof *m->sum);
    m->max = arena_alloc(arena, ATTENTION_ROWS, sizeof(float));
    m->expected = arena_alloc(arena, ATTENTION_ROWS, sizeof(float));
    m->first = arena_alloc(arena, ATTENTION_ROWS, sizeof(int32_t));
    m->end = arena_alloc(arena, ATTENTION_ROWS, sizeof(int32_t));
    m->dk = arena_alloc(arena, keys * wide, sizeof(Word));
    m->dv = arena_alloc(arena, keys * wide, sizeof(Word));
}

// Widens n rows, or keys, of x from number `first` on.
static void widen_heads(Word *to, const Group *g, const void *x, size_t first, size_t n,
                        size_t (*index)(const Group *, size_t)) {
    for (size_t i = 0; i < n; i++)
        load_row((real *)to + i * PITCH, g->a->dev->act, x, index(g, first + i) * g->hd, g->hd);
}

// to (columns, rows) = from (rows, columns) transposed, in blocks of 16 x 16.
static void transpose(Word *to, const Word *from, size_t rows, size_t columns) {
    for (size_t i = 0; i < rows; i += 16)
        for (size_t j = 0; j < columns; j += 16)
            transpose_16(to + j * PITCH + i, PITCH, from + i * PITCH + j, PITCH);
}

// One row meets keys j0 .. j0+n-1: its scores become exp(scale score - max), those of keys outside
// first .. end-1 become 0, and when the maximum grows its earlier sums shrink.
static void softmax_row(Word *scores, size_t j0, size_t n, size_t first, size_t end, float scale,
                        float *max, Vec *sum, Word *out, size_t wide) {
    size_t low = first > j0 ? min_size(first - j0, n) : 0;
    size_t high = end > j0 ? min_size(end - j0, n) : 0;
    for (size_t j = 0; j < low; j++) scores[j] = -INFINITY;
    for (size_t j = high; j < round_up(n, LANES); j++) scores[j] = -INFINITY;
    Vec largest = vec_all(-INFINITY), total = {0};            // of the n new scores
    for (size_t j = 0; j < n; j += LANES) {
        Vec s = vec_load(scores + j) * scale;
        VecInt larger = s > largest;
        largest = (Vec)((larger & (VecInt)s) | (~larger & (VecInt)largest));
    }
    float now = vec_largest(largest);
    if (now > *max) {                                         // what was summed so far shrinks
        Vec shrink = vec_exp(vec_all(*max - now));
        for (size_t d = 0; d < wide; d += LANES) vec_store(out + d, vec_load(out + d) * shrink);
        *sum *= shrink;
        *max = now;
    }
    for (size_t j = 0; j < n; j += LANES) {
        Vec p = vec_exp(vec_fma(vec_all(-*max), vec_load(scores + j), vec_all(scale)));
        vec_store(scores + j, p);
        total += p;
    }
    *sum += total;
}

// A few rows, one tile, meet the keys j0 .. j0+n-1:   s = q k^T,   p = exp(s - max),   out += p v.
static void forward_tile(const Group *g, const AttentionMemory *m, size_t begin, size_t row,
                         size_t rows, size_t j0, size_t n) {
    size_t end = row_end(g, begin + row + rows - 1);
    if (end <= j0 || row_first(g, begin + row) >= j0 + n) return;
    n = min_size(n, end - j0);
    Word *out = m->out + row * PITCH;
    multiply(false, m->p, PITCH, false, m->q + row * PITCH, m->k_t, PITCH, rows, n, g->hd);
    for (size_t i = 0; i < rows; i++) {
        size_t at = begin + row + i;
        softmax_row(m->p + i * PITCH, j0, n, row_first(g, at), row_end(g, at),
                    g->a->shape.scale, &m->max[row + i], &m->sum[row + i], out + i * PITCH,
                    g->wide);
    }
    multiply(false, out, PITCH, true, m->p, m->v, PITCH, rows, g->hd, n);
}

static size_t attention_blocks(const AttentionTask *a) {
    return ceil_div(a->batch->T * (a->shape.H / a->shape.G), ATTENTION_ROWS);
}

// A task is 64 rows of a group. Last rows, which see the most keys, come first. All groups count as
// if they had the batch's rows; what is beyond their own is empty.
static void attention_forward_block(void *arguments, size_t task, int thread) {
    const AttentionTask *a = arguments;
    size_t groups = a->batch->n_spans * a->shape.G;
    size_t begin = (attention_blocks(a) - 1 - task / groups) * ATTENTION_ROWS;
    const Span *span = &a->batch->spans[task % groups / a->shape.G];
    Group group = attention_group(a, span, task % a->shape.G), *g = &group;
    if (begin >= g->rows) return;
    size_t rows = min_size(ATTENTION_ROWS, g->rows - begin);
    Arena scratch = {(char *)thread_rows(a->dev, thread), 0};
    AttentionMemory memory, *m = &memory;
    carve_attention(m, g->hd, 0, &scratch);
    widen_heads(m->q, g, a->q, begin, rows, row_index);
    memset(m->out, 0, rows * PITCH * sizeof *m->out);
    memset(m->sum, 0, rows * sizeof *m->sum);
    for (size_t i = 0; i < rows; i++) m->max[i] = -1e30f;     // finite: -inf - max must not be NaN
    size_t j0 = row_first(g, begin) / ATTENTION_KEYS * ATTENTION_KEYS;
    for (size_t end = row_end(g, begin + rows - 1); j0 < end; j0 += ATTENTION_KEYS) {
        size_t n = min_size(ATTENTION_KEYS, end - j0);
        widen_heads(m->k, g, a->k, j0, n, key_index);
        transpose(m->k_t, m->k, n, g->hd);
        widen_heads(m->v, g, a->v, j0, n, key_index);
        // Rows of a tile multiply values that some of them do not see with p = 0. Where a value is
        // NaN or infinite that is NaN too, so that rows go one by one then, each to its own end.
        Vec poison = {0};
        for (size_t j = 0; j < n; j++)
            for (size_t d = 0; d < g->hd; d += LANES) poison += 0 * vec_load(m->v + j * PITCH + d);
        size_t height = vec_sum(poison) == 0 ? TILE_ROWS : 1;
        for (size_t row = 0; row < rows; row += height)
            forward_tile(g, m, begin, row, min_size(height, rows - row), j0, n);
    }
    for (size_t i = 0; i < rows; i++) {                       // out / sum, lse = max + log sum
        float sum = vec_sum(m->sum[i]), *out = m->out + i * PITCH;
        size_t at = row_index(g, begin + i);
        for (size_t d = 0; d < g->hd; d++) out[d] /= sum;
        store_row(a->dev->act, a->out, at * g->hd, (const real *)out, g->hd);
        a->lse[at] = m->max[i] + (real)log((double)sum);
    }
}

static void attention_forward_fast(Device *dev, void *out, real *lse, const void *q, const void *k,
                                   const void *v, AttentionShape shape, const Batch *batch) {
    AttentionTask a = {.dev = dev, .out = out, .lse = lse, .q = q, .k = k, .v = v, .shape = shape,
                       .batch = batch};
    size_t groups = batch->n_spans * shape.G;
    parallel_for(dev->pool, attention_blocks(&a) * groups, attention_forward_block, &a);
}

// Backward, in the notation of chapter 3. Scores are formed transposed, keys x rows, so that p and
// ds are at once A for the sums over rows, dv and dk, and B for the sum over keys, dq^T.
//
// A block of rows meets the keys j0 .. j0+n-1.
static void backward_block(const Group *g, const AttentionMemory *m, size_t rows, size_t j0,
                           size_t n) {
    const AttentionTask *a = g->a;
    size_t hd = g->hd, wide = g->wide, start = 0;
    while (m->end[min_size(start + 32, rows) - 1] <= (int32_t)j0) start += 32;
    const Word *q = m->q + start * PITCH, *dout = m->out + start * PITCH;
    Word *p = m->p + start, *ds = m->ds + start, *dk = m->dk + j0 * wide, *dv = m->dv + j0 * wide;
    size_t count = rows - start;                              // rows before see none of these keys
    float scale = a->shape.scale;
    widen_heads(m->k, g, a->k, j0, n, key_index);
    widen_heads(m->v, g, a->v, j0, n, key_index);
    transpose(m->k_t, m->k, n, hd);
    // s = k q^T,   dp = v dout^T
    multiply(false, p, PITCH, false, m->k, m->q_t + start, PITCH, n, count, hd);
    multiply(false, ds, PITCH, false, m->v, m->dout_t + start, PITCH, n, count, hd);
    for (size_t j = 0; j < n; j++)
        for (size_t i = start; i < rows; i += LANES) {        // what a row does not see becomes 0
            Word *s = m->p + j * PITCH + i, *dp = m->ds + j * PITCH + i;
            VecInt key = (int32_t)(j0 + j) - (VecInt){0}, first, end;
            memcpy(&first, m->first + i, sizeof first);
            memcpy(&end, m->end + i, sizeof end);
            VecInt sees = (key >= first) & (key < end);
            Vec e = vec_exp(vec_fma(-vec_load(m->max + i), vec_load(s), vec_all(scale)));
            e = vec_where(sees, e);                           // p = exp(scale s - lse)
            vec_store(s, e);                                  // ds = scale p (dp - expected)
            e = e * scale * (vec_load(dp) - vec_load(m->expected + i));
            vec_store(dp, vec_where(sees, e));
        }
    // dv += p dout,   dk += ds q,   dq^T += k^T ds
    multiply(false, dv, wide, true, p, dout, PITCH, n, hd, count);
    multiply(false, dk, wide, true, ds, q, PITCH, n, hd, count);
    multiply(false, m->dq_t + start, PITCH, true, m->k_t, ds, PITCH, hd, count, n);
}

// A task is a whole group of a sequence, so that dk and dv are summed by one thread, row after row.
static void attention_backward_group(void *arguments, size_t task, int thread) {
    AttentionTask *a = arguments;
    const Span *span = &a->batch->spans[task / a->shape.G];
    Group g = attention_group(a, span, task % a->shape.G);
    DType act = a->dev->act;
    Arena scratch = {(char *)thread_rows(a->dev, thread), 0};
    AttentionMemory m;
    carve_attention(&m, g.hd, span->nk, &scratch);
    memset(m.dk, 0, span->nk * g.wide * sizeof *m.dk);
    memset(m.dv, 0, span->nk * g.wide * sizeof *m.dv);
    for (size_t begin = 0; begin < g.rows; begin += ATTENTION_ROWS) {
        size_t rows = min_size(ATTENTION_ROWS, g.rows - begin);
        size_t j0 = row_first(&g, begin) / ATTENTION_KEYS * ATTENTION_KEYS;
        real *out = (real *)m.q, *dout = (real *)m.out;       // q takes out's place below
        widen_heads(m.q, &g, a->out, begin, rows, row_index);
        widen_heads(m.out, &g, a->dout, begin, rows, row_index);
        memset(m.dq_t, 0, g.hd * PITCH * sizeof *m.dq_t);
        memset(m.end, 0, ATTENTION_ROWS * sizeof *m.end);     // rows beyond the last see nothing
        for (size_t i = 0; i < rows; i++) {
            m.expected[i] = dot_rows(dout + i * PITCH, out + i * PITCH, g.hd);
            m.max[i] = a->lse[row_index(&g, begin + i)];
            m.first[i] = (int32_t)row_first(&g, begin + i);
            m.end[i] = (int32_t)row_end(&g, begin + i);
        }
        widen_heads(m.q, &g, a->q, begin, rows, row_index);
        transpose(m.q_t, m.q, rows, g.hd);
        transpose(m.dout_t, m.out, rows, g.hd);
        for (size_t end = row_end(&g, begin + rows - 1); j0 < end; j0 += ATTENTION_KEYS)
            backward_block(&g, &m, rows, j0, min_size(ATTENTION_KEYS, end - j0));
        transpose(m.q, m.dq_t, g.hd, rows);                   // and dq that of q
        for (size_t i = 0; i < rows; i++)
            store_row(act, a->dq, row_index(&g, begin + i) * g.hd, (real *)m.q + i * PITCH, g.hd);
    }
    for (size_t j = 0; j < span->nk; j++) {
        store_row(act, a->dk, key_index(&g, j) * g.hd, (real *)m.dk + j * g.wide, g.hd);
        store_row(act, a->dv, key_index(&g, j) * g.hd, (real *)m.dv + j * g.wide, g.hd);
    }
}

static void attention_backward_fast(Device *dev, void *dq, void *dk, void *dv, const void *dout,
                                    const void *q, const void *k, const void *v, const void *out,
                                    const real *lse, AttentionShape shape, const Batch *batch) {
    AttentionTask a = {dev, (void *)(uintptr_t)out, dq, dk, dv, q, k, v, dout,
                       (real *)(uintptr_t)lse, shape, batch};
    parallel_for(dev->pool, batch->n_spans * shape.G, attention_backward_group, &a);
}

// ----------------------------------------------------------------------- scratch and the op table

// Bytes for the largest call. Words are counted as float32, though bf16 takes half of them.
static void fast_scratch(Device *dev, const OpSizes *s) {
    size_t width = max_size(s->D, s->F), tokens = max_size(s->T, s->S);
    size_t rows = min_size(CHUNK_ROWS, tokens), rank = 3 * left_words(rows, s->max_r);
    // Forward: x, masked x and u.
    size_t forward = 2 * left_words(rows, width) + rank;
    // Backward: du of all tokens; then for a chunk dy and du, for a sequence u and du transposed.
    size_t dy = max_size(left_words(rows, HEAD_COLUMNS),
                         max_size(2 * left_words(rows, width), 3 * left_words(rows, s->D)));
    size_t backward = 3 * tokens * s->max_r + 48 +
                      max_size(dy + rank, 2 * left_words(s->max_r, tokens));
    dev->scratch_size = max_size(forward, backward) * sizeof(Word) + 64 * 32;

    Arena matmuls = {NULL, 0}, attention = {NULL, 0};
    AttentionMemory memory;
    arena_alloc(&matmuls, (BLOCK_STEPS + 16 + 2 * TASK_ROWS) * LINE, sizeof(Word));
    carve_attention(&memory, s->hd, s->max_span, &attention);
    size_t plain = max_size(max_size(3 * width, s->V_chunk), s->D + 2 * s->hd) * sizeof(real);
    dev->thread_size = max_size(max_size(matmuls.used, attention.used), round_up(plain, 64));
}

#define FAST(op) op##_fast
#else
#define FAST(op) op##_plain
#define fast_scratch plain_scratch
#endif // !REAL_IS_DOUBLE

static const Ops fast_ops = {
    HOST_OPS, .scratch = fast_scratch, .embed = embed,
    .residual_norm_forward = residual_norm_forward,
    .residual_norm_backward = residual_norm_backward, .linears_forward = FAST(linears_forward),
    .linears_backward = FAST(linears_backward), .rope = rope,
    .attention_forward = FAST(attention_forward), .attention_backward = FAST(attention_backward),
    .swiglu_forward = swiglu_forward, .swiglu_backward = swiglu_backward,
    .head_logits = FAST(head_logits), .head_backward = FAST(head_backward),
    .cross_entropy_forward = cross_entropy_forward,
    .cross_entropy_backward = cross_entropy_backward, .round_rows = round_rows};
// =================================================================================================
//  Generated tables: Unicode 16.0.0
//
//  Written by test/unicode_tables.py; do not edit. A number is in base 26, its digits upper-case
//  letters, the last one a lower-case letter; what can be negative is stored as 2n or -2n-1.
// =================================================================================================

// Runs from U+0000 on: general category (in the order of enum Category), length.
static const char *const unicode_categories[] = {
    "zBgwbrdtbrdnbobrbsbrbmbrcikrcsdrcaBanbrbobublbubbBanbsbobsbzBhwbrbtevbrbubvbebpbsbBabvbubvb",
    "sbkcubbbrcubkbebqbkdrbaxsbahbysbbiabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbab",
    "bbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbcabbbabbbabbbabbbabbbabbbabbbabbcabbbab",
    "bbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbacbbab",
    "bbabbdacbbabbbacbbadbcaebbacbbadbdacbbacbbabbbabbbacbbabbcabbbacbbadbbabbbacbcebabbdeeabcbbb",
    "abcbbbabcbbbabbbabbbabbbabbbabbbabbbabbbabbcabbbabbbabbbabbbabbbabbbabbbabbbabbcabcbbbabbbad",
    "bbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbab",
    "bbabbbabbbabbbabbbabbbabbhacbbacbcabbbaebbabbbabbbabbbabbCrebbBbdsuedmuodfuhdbubdburfEiabbb",
    "abbbdbubabbbBdcdbbdrbabBdeucabrbadBdbabBdbacbbarBdbajbBjabbcadbdabbbabbbabbbabbbabbbabbbabbb",
    "abbbabbbabbbabbbabbfabbbsbabbbacbcaBzbBwabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbb",
    "abbbabbbabbbabbbvbffhcabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbab",
    "bbabbbabbbabbbabbbabbbabbbabbbabbbabbbacbbabbbabbbabbbabbbabbbabbcabbbabbbabbbabbbabbbabbbab",
    "bbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbab",
    "bbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbBdbaBmBdcdbrgbBprb",
    "mbBdcvctbBdbfBtmbfbrbfcrbfcrbfbBdieBbBdeeercBdlBagsdrctbrcvcflrbBabrdeBgdbekfvikreecfbeDvrb",
    "ebfhBabvbfgdcfcvbfeecikedvcebroBdbBabebfbeBefBbBdceDlflebBdoikeBhfjdcvbrddbBdcfbtcewfedbfjdb",
    "fddbffBdcrpBdbezfdBdcrbBdbelBdfeyubegBdbBacBdffjeBpdbfyBabfBggbeCcfbgbfbebgdfigefbgcebfhekfc",
    "rcikrbdbepfbgcBdbeiBdcecBdcewBdbehBdbebBddeeBdcfbebgdfeBdcgcBdcgcfbebBdigbBdeecBdbedfcBdcik",
    "ectckgvbtbebrbfbBdcfcgbBdbegBdeecBdcewBdbehBdbecBdbecBdbecBdcfbBdbgdfcBdefcBdcfdBddfbBdhee",
    "BdbebBdhikfcedfbrbBdkfcgbBdbejBdbedBdbewBdbehBdbecBdbefBdcfbebgdffBdbfcgbBdbgcfbBdcebBdpecfc",
    "BdcikrbtbBdhebfgBdbfbgcBdbeiBdcecBdcewBdbehBdbecBdbefBdcfbebgbfbgbfeBdcgcBdcgcfbBdhfcgbBdeec",
    "BdbedfcBdcikvbebkgBdkfbebBdbegBddedBdbeeBddecBdbebBdbecBddecBddedBddemBdegcfbgcBddgdBdbgdfb",
    "BdcebBdggbBdoikkdvgtbvbBdffbgdfbeiBdbedBdbexBdbeqBdcfbebfdgeBdbfdBdbfeBdhfcBdbedBdcebBdcecfc",
    "BdcikBdhrbkhvbebfbgcrbeiBdbedBdbexBdbekBdbefBdcfbebgbfbgfBdbfbgcBdbgcfcBdhgcBdgecBdbecfcBdc",
    "ikBdbecgbBdmfcgcejBdbedBdbeBpfcebgdfeBdbgdBdbgdfbebvbBdeedgbkhedfcBdcikkjvbegBdbfbgcBdbesBdd",
    "eyBdbejBdbebBdcehBddfbBdegdfdBdbfbBdbgiBdgikBdcgcrbBdmeBwfbecfhBdetbegdbfirbikrcBdBlecBdbeb",
    "BdbefBdbeyBdbebBdbekfbecfjebBdcefBdbdbBdbfhBdbikBdceeBdBgebvdrpvbrbvdfcvgikkkvbfbvbfbvbfbnb",
    "obnbobgceiBdbeBkBdefogbffrbfcefflBdbfBkBdbvifbvgBdbvcrfvercBdBleBrgcfegbfggbfcgcfcebikrgeggc",
    "fceefdebgdecghedfeenfbgcfcggfbebgbikgdfbvcaBmBdbabBdfabBdcbBrrbdbbdeMrBdbeeBdcehBdbebBdbee",
    "BdceBpBdbeeBdceBhBdbeeBdcehBdbebBdbeeBdcepBdbeCfBdbeeBdceCpBdcfdrjkuBddeqvkBdgaDiBdcbgBdcmb",
    "eXwvbrberwbeBanbobBddeCxrdjdeiBdhesfdgbBdjetfcgbrcBdjesfcBdmenBdbedBdbfcBdmeCafcgbfhgifbgcfl",
    "rddbrdtbebfbBdcikBdgkkBdgrgmbrefdBabfbikBdgeBjdbeCbBdheffceBifbebBdfeCsBdkeBfBdbfdgefcgdBde",
    "gcfbggfdBdevbBddrcikeBeBdcefBdleBsBdeeBaBdgikkbBddvBiexfcgcfbBdcrceCbgbfbgbfhBdbfbgbfbgcfigg",
    "fkBdcfbikBdgikBdgrhdbrgBdcfohbfqBdBxfegbeBvfbgbffgbfbgffbgceiBdbrcikrhvkfjvjrdfcgbeBegbfegc",
    "fcgbfdecikeBsfbgbfcgdfbgbfdgcBdireeBkgifigcfcBddrfikBddedikeBedgrcbjabbbBdfaBrBdcadriBdifdrb",
    "fngbfheefbegfbecgbfcebBdfbBsdClbndbbBidBlfCmabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbb",
    "abbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbb",
    "abbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbb",
    "abbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbjabbbabbbabbbabbbabbbabbb",
    "abbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbb",
    "abbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbjaibgBdcagBdc",
    "biaibiaibgBdcagBdcbiBdbabBdbabBdbabBdbabbiaiboBdcbicibicibicibfBdbbcaecbubbbudbdBdbbcaecbud",
    "beBdcbcaeBdbudbiafudBdcbdBdbbcaecbucBdbwlBafmgrcpbqbnbpcqbnbpbrixbybBafwbrjpbqbrelcrdsbnbob",
    "rlsbrblbrkwbBafBdbBakkbdbBdckgsdnbobdbkksdnbobBdbdnBddtBhBdpfnhefbhdfmBdpvcabveabvcbbadbcad",
    "bbvbabvcsbafvgabvbabvbabvbaevbbbaebbeebbvcbcacsfabbevbsbvcbbvbkqjBjabbbjekbvcBdesfvfscvesbvc",
    "sbvcsbvhsbvBfscvcsbvbsbvBfsKivinbobnbobvuscvhnbobvDdsbvBeszvBosgvCuBdwvlBdvkCivDakwvHbsbvjsb",
    "vCcsivEhsbvJonbobnbobnbobnbobnbobnbobnbobkBevBssfnbobsBfnbobnbobnbobnbobnbobsqvJwsFbnbobnbob",
    "nbobnbobnbobnbobnbobnbobnbobnbobnbobsClnbobnbobsBgnbobsJyvBwsvvcsgvBnBdcvBgBdbvEbaBwbBwabbb",
    "adbcabbbabbbabbbaebbabbcabbgdcadbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbab",
    "bbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbab",
    "bbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbcvgabbbabbbfdabbbBdfrekbrcbBmBdbbbBdfbbBdceCe",
    "BdhdbrbBdofbexBdjehBdbehBdbehBdbehBdbehBdbehBdbehBdbehBdbfBgrcpbqbpbqbrdpbqbrbpbqbrjmbrcmbrb",
    "pbqbrcpbqbnbobnbobnbobnbobrfdbrkmcrembrbnbrnvcrdnbobnbobnbobnbobmbBdBivBaBdbvDlBdmvIgBdBavq",
    "wbrdvbdbebjbnbobnbobnbobnbobnbobvcnbobnbobnbobnbobmbnbocvbjjfegcmbdfvcjddbebrbvcBdbeDiBdcfc",
    "ucdcebmbeDmrbddebBdfeBrBdbeDqBdbvckevkeBgvBmBdjvbeqvBfBdbkkvBekivbkpvBgkkvBnkpvMieJTovCm",
    "eBFCfdbeBRzBddvCdBdjeBodgrceKidbrdeqikecBduabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbb",
    "abbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbebfbhdrbfkrbdbabbbabbbabbbabbbabbbabbbabbbabbbab",
    "bbabbbabbbabbbabbbabbbdcfceCsjkfcrgBdiuxdjucabbbabbbabbbabbbabbbabbbabbdabbbabbbabbbabbbabbb",
    "abbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbbabbb",
    "abbbabbbabbbdbbiabbbabbbacbbabbbabbbabbbabbbdbucabbbabbbebabbbabbdabbbabbbabbbabbbabbbabbbab",
    "bbabbbabbbabbbafbbafbbabbbabbbabbbabbbabbbabbbabbbaebbabbbacbbBdcabbbBdbbbBdbbbabbbabbbabbb",
    "abBdvddabbbebdcbbehfbedfbeefbexgcfcgbvefbBddkgvctbvbBdgeCareBdigceBygqfcBdircikBdgfsegrdebrb",
    "ecfbikeBcfircexflgcBdlrbeBdBddfdgbeBvfbgcfegcfcgdrnBdbdbikBderceffbdbejikefBdbeBpfggcfcgcfc",
    "BdjedfbeifbgbBdcikBdcreeqdbegvdebgbfbgbeByfbebfdecfceffcebfbebBdyecdbrcelgbfcgcrcebdcgbfbBdk",
    "egBdcegBdcegBdjehBdbehBdbbBrubdebjdbucBdebDceBjgcfbgcfbgcrbgbfbBdcikBdgeQNsBdmexBdeeBxBde",
    "BbDAuBcJMeeOcBdceEcBdBmbhBdmbfBdfebfbeksbenBdbefBdbebBdbecBdbecBdbeEeurBdqeNzobnbvqeCmBdceCc",
    "BdhvbBdBgemtbvdfqrhnbobrbBdgfqrbmclcnbobnbobnbobnbobnbobnbobnbobnbobrcnbobreldrdBdbrembnbob",
    "nbobnbobrdsbmbsdBdbrbtbrcBdeefBdbeFfBdcBabBdbrdtbrdnbobrbsbrbmbrcikrcsdrcaBanbrbobublbubbBa",
    "nbsbobsbnbobrbnbobrcekdbeBtdceBfBddegBdcegBdcegBdcedBddtcsbubvbtcBdbvbsevcBdkBadvcBdcemBdb",
    "eBaBdbetBdbecBdbepBdceoBdBieEtBdfrdBdekBtBddvjjCbkevrkcvdBdbvnBddvbBdBvvBtfbBdFaeBdBddeBxBdp",
    "fbkBbBdeeBgkeBdjeujbeijbBdfeBmffBdfeBeBdbrbeBkBdeeirbjfBdBqaBobBoeDaBdcikBdgaBkBdebBkBdeeBo",
    "BdieCaBdlrbalBdbapBdbahBdbacBdbblBdbbpBdbbhBdbbcBddeCaBdmeLzBdjewBdkeiBdydgBdbdBqBdbdjBdCreg",
    "BdcebBdbeBsBdbecBddebBdcexBdbrbkiexvckheBfBdikjBdBwetBdbecBdfkfewkgBddrbeBaBdfrbBdCmeCeBdekc",
    "eckqBdckBuebfdBdbfcBdffeeeBdbedBdbeBdBdcfdBdefbkjBdhrjBdheBdkcrbeBdkdBdBgeivbeBcfcBdekfrhBdj",
    "eCcBddrhewBdckietBdfkiesBdhreBdmkhBdDceCvBdCdaBzBdnbBzBdhkgeBkfeBdiikBdgikeedbebawBddffmbdb",
    "bwBdiscBdIakBfBdbeBqBdbfcmbBdcecBdqedBdCdfeeBdkkebBdiewflkerfBdwesfereBdBmevkhBduexBdjgbfbgb",
    "eCbfprhBdekuikfbecfcebBdjfdgbeBtgdfegcfcrcBabrefbBdkBabBdcezBdhikBdgfdeBkffgbfiBdbikreebgceb",
    "BdieBjfbrcebBdjfcgbeBwgdfjgceereferbgbfbikebrbebrdBdbkuBdlesBdbezgdfdgcfbgbfcrgfbecfbBdCkeh",
    "BdbebBdbeeBdbepBdbekrbBdgeBvfbgdfiBdfikBdgfcgcBdbeiBdcecBdcewBdbehBdbecBdbefBdbfcebgcfbgeBdc",
    "gcBdcgdBdcebBdggbBdfefgcBdcfhBddffBdlekBdbebBdcebBdbeBmBdbebgdfgBdbgbBdcgbBdbgeBdbgcfbgbfbeb",
    "fbebrcBdbrcBdifcBdBdeCbgdfigcfdgbfbeerfikrcBdbrbfbedBdBeeBwgdfggbfbgefcgbfcecrbebBdiikBdGk",
    "eBvgdfeBdcgefcgbfcrxeefcBdBieBwgdfigcfbgbfcrdebBdlikBdgrnBdteBrfbgbfbgcfggbfbebrbBdgikBdgiu",
    "BdBceBbBdcfbgbfbgcfegbffBdeikkcrdvbehBdHdeBsgdfjgbfcrbBdDwaBgbBgikkjBdmeiBdcebBdceiBdbecBdb",
    "eyggBdbgcBdcfcgbfbebgbebgbfbrdBdjikBdCseiBdceBngdfeBdcfcgefbebrbebgbBdBbebfkeBofggbebferifb",
    "BdiebfggcfdeBufngbfcrdebrfBdneCvBdhrkBdHaeBhrbBdoikBdgejBdbeBlgbfhBdbfggbfbebrfBdkikktBddrc",
    "eBeBdcfwBdbgbfhgbfcgbfcBdCvehBdbecBdbeBmfgBddfbBdbfcBdbfhebfbBdiikBdgegBdbecBdbeBggfBdbfcBdb",
    "gcfbgbfbebBdhikBdLyetfcgcrcBdhfcebgbenBdbeBigcffBddgcfbgbfbrnikfbBdDhebBdpkvvitevrBdnrbeBJm",
    "BdDyjEhBdbrfBdleHoBdDXkeDtrcBdneBPgBaqfbegfpBdkeFXrBdfeWlBdKDdeBefmgdfdikBdCOseVxBdheBfBdbik",
    "BderceDbBdbikBdgeBeBdcffrbBdkeBwfhrfvederbvbBdkikBdbkhBdbevBdfetBdQqddeBodcrdikBdHqaBgbBgkx",
    "reBdDxeCxBdefbebgCdBdhfednBdCmdcrbdbfbBdlgcBdoeJCaBdieBVqBdBpekBdNFrdeBdbdhBdbdcBdbeLfBdpeb",
    "BdBdedBdcebBdoeeBdiePgBdDKueEdBdfenBddejBdhekBdcvbfcrbBaeBdFVgvJgikBdgvQuBdCyfBuBdcfxBdjvEm",
    "BdCivJmBdkvBnBdcvCigcfdvdggBaifivcfhvBefevCjBdvvCofdvbBdEskuBdmkuBdmvDjBdjkzBdFfaBabBaaBabh",
    "BdbbsaBabBaabBdbacBdcabBdcacBdcaeBdbaibeBdbbbBdbbhBdbblaBabBaacBdbaeBdcaiBdbahBdbbBaacBdbae",
    "BdbafBdbabBddahBdbbBaaBabBaaBabBaaBabBaaBabBaaBabBaaBabBcBdcazsbbzsbbgazsbbzsbbgazsbbzsbbgaz",
    "sbbzsbbgazsbbzsbbgabbbBdciByvTsfCdvefByvifbvofbvcrfBdpffBdbfpBdBQmbkebbuBdgbgBdIffhBdbfrBdc",
    "fhBdbfcBdbffBdfdCkBdBhfbBdEieBtBddfhdhBdcikBdeebvbBdMieBefbBdreBsfeikBdftbBdRweBbdbfeikBdIg",
    "eBefcebikBderbBdSmehBdbeeBdbecBdbepBdbeHpBdckjfhBdBpaBibBifhdbBdeikBdercBdBEfkChvbkdtbkeBdCy",
    "kBtvbkpBdHmeeBdbeBbBdbecBdbebBdcebBdbekBdbeeBdbebBdbebBdgebBdeebBdbebBdbebBdbedBdbecBdbebBdc",
    "ebBdbebBdbebBdbebBdbebBdbecBdbebBdceeBdbehBdbeeBdbeeBdbebBdbekBdberBdfedBdbefBdberBdCascBdKk",
    "vBsBdevDwBdmvpBdcvpBdbvpBdbvBlBdkknvGfBdCevBdBdnvBsBdevjBdhvcBdovgBdFyvJrufvBCaBdevrBddvnBdd",
    "vEpBdevDrBdgvmBdevbBdpvmBdevCeBdivkBdgvBoBdivBeBdcvmBdevcBdCkvNcBdmvoBdcvnBddvkBdfvCeBdhvp",
    "BdcvlBdgvjBdhvFrBdbvDoikBdBNqeCLFcBdBgeGDuBdgeIoBdceINqBdoeLBlBdpeXyBdDQweUwBdCFyeHHzBdfeGFg",
    "BdBOMXlBabBdBeBaDsBdEyfJgBdDSFoBcDSYoBdcBcDSYoBdc",
    NULL
};

// Runs of canonical combining classes (Unicode 9) or NFC_CARE: class, length.
static const char *const unicode_classes[] = {
    "aBDoIwvIybImeIybIibImfHucImeHucImlbfImeIwiJgbIwbImdIwdImcabIwdImeIwbIybImcIwbIzbJacIzbJacIzb",
    "IwnaeJvbajJvbaiJvbaJrIwfaKfImbIweImbIwdIobImbIwgImgIwcImbIwcIobIubIwbkblbmbnbobpbqbrbsbtcub",
    "vbwbabxbabybzbabIwbImbabsbaCuIwiBebBfbBgbaBwBbbBcbBdbBebBfbBgbBhbBibIwcImcIwfImbIwcImbaqBjb",
    "aDxIwhacIweImbIwbacIwcabImbIwcImbaBjBkbaBeIwbImbIwcImbIwcImdIwbImcIwbImbIwdImbIwbImbIwbImb",
    "IwbImbIwcaGeIwhImbIwbaBiIweabIwjabIwdabIwfaBrImdaEqIwoabImbIwcImbIwcImbIwdImdBbbBcbBdbIwdImb",
    "IwcImcIwfaCihbaqjbadIwbImbIwcadJviaDohbabJvbaojbajJvbaeJvcabJvbaDfJvbacJvbafhbaqjbalJvdacJvb",
    "aDphbaqjbaEghbabJvbaojbaiJvcaeJvcaDsJvbaojbajJvbaEnjbahDgbDnbaDxhbafJvbakjbahJvcaDzJvbaojbaj",
    "JvbaEkjbaeJvbapJvbaDkDzcjbanEdeaEeEocaoEseaCyImcaBbImbabImbabIibajJvbajJvbaeJvbaeJvbaeJvbam",
    "JvbahEzbFabJvbFcbJvcabJvbabFaeacFabJvbIwcjbabIwcalJvbajJvbaeJvbaeJvbaeJvbamJvbamImbaDzJvbai",
    "hbabjcaDeImbaIdJvvaByJvBbaPuIwdaBKmjbaBfjbaGbjbakIwbaHvIubaFnIobIwbImbaIlIwbImbaCtjbauIwiac",
    "ImbaBwIwfImgIwcImbaEohbJvbaojbaBmIwbImbIwhaCcjcaCghbaljcaCphbaFwIwdabbbImfIwcImeIwbabbhaeImb",
    "agIwbadIwcaHqIwcImbIwhImbIwcJabIgbImbHubIwBlafIwbIzbImbIwbImbaOfJvbabJvbabJvbabJvbabJvbabJvb",
    "abJvbaCjJvbacJvbakJvbabJvbahJvbahJvbahJvbahJvbacJvcajJvbabJvbabJvbacJvcaHyIwcbcIwebdIwcaeIwb",
    "adbcIwbImbIwbbcImeIwbaCbJvbadJvcaTpJvcaCXtJvbaUkIwdaFljbaDsIwBgaViIkbIubIybIobIqcaEbicaBSQe",
    "IwbaeIwkaBgIwcaDcIwcaKqjbaHhjbaBbIwsaCfImdaBljbaDrhbamjbaJfIwbabIwcImbacIwcafIwcabIwbaCajb",
    "aJmjbaBDEwJvKkacJvbabJvbacJvkabJvbabJvbacJvcadJvCqacJvEcaCpJvbBabJvbakJvnabJvfabJvbabJvcab",
    "JvcabJvjaBBtIwhImhIwcaBLlImbaIsImbaFtIwfaCMsImbabIwbaBoIwbbbImbaejbaGjIwbImbaCAxjbaCejbaCfjb",
    "hbaCrIwdaBkJvbaljcaCkhbaCyjbajhbaEcjbhbaGwhbjbaDdhbabJvbaojbajJvbaoIwhadIwfaHxjbadhbaEbJvbaj",
    "JvbacJvbaejbhbaJbJvbapjbhbaEwjbaEojbhbaEljbaBXzjbaBDUubfaChIwhaBEVnbbaHWhJvhIicbdadIsbIifai",
    "ImiacIwfImcaBeIweanJvgaEzIwdaFFfIwhabIwracIwhabIwcabIwfaDHdImhaEfIwghbaDYNlJvUwaCAHMo",
    NULL
};

// Canonical decompositions (Unicode 9): codes left out; 0 for one character, 1 for a pair, 2
// for a pair that is never composed again; each character as signed distance to the last one
// in its place (a single one stands in the second).
static const char *const unicode_canonical[] = {
    "HkbFaCHcabacabacabacabakabaebbeCgabeCzabacabacabamabipabacabacabambbkjabcfabacabacabacabak",
    "cbmpabacabacabamabincbqbabacabacabacabakabaebbeCgabeCzabacabacabamabipabacabacabambbkjabcf",
    "abacabacabacabakcbmpabacabacabamabinbbaoabEhhabCmaabCleabCmaabClCqabCmaabChCzabCmaabClcabCma",
    "abClkabCmaabClkabCmaabCjaabCmacbCjpabCmaabCleabCmaabClcabCmaabClCoabCmaabClCdabCmaabChtabCma",
    "abCliabCmaabClcabCmaabClCmabCmaabCjCvabCmacbCjcabCmaabClcabCmaabCleabCmaabClCqabCmaabClCn",
    "dbcjabCmaabCjCwabCmabbCjCxabCmaabClCyabCmaabClCbabCmaebChvabCmaabClCyabCmaabClCbabCmadbCjp",
    "abCmaabCleabCmaabClkabCmacbCftabCmaabClCyabCmaabClCbabCmaabCjvabCmaabClcabCmaabClCwabCma",
    "abClCbabCmaabCjCcabCmaabClCbabCmacbCjrabCmaabClcabCmaabCleabCmaabCliabCmaabClcabCmaabClCg",
    "abCmaabChCxabCmaabChaabCmaabClmabcnabCmaabClmabCmaabClkabCmaBhbDhBeabCmanbBzaabCmaBcbDzBd",
    "abCmaabBvaabCmaabBzaabCmaabBzaabCmaabHypabCmaabClfabCmaabClwabCmaabClxabCmabbEhiabCmaabYua",
    "abcaabBBdaabCmacbMfqabCmaabCdaabCmaabCdCeabCmaabBDeCtabcaabDzqabQwaabBQladbCrvabCmacbBxb",
    "abCmaabGscabCmaabCjaabCmaabBbaabCmaabObBcabCmaabCleabCmaabCddabCmaabCleabCmaabCddabCmaabCle",
    "abCmaabBzdabCmaabCleabCmaabCfdabCmaabCleabCmaabCfdabCmaabCleabCmaabCpBqabCmaabCjaabCmacbDjBz",
    "abCmagbCzjabCmaabCdCmabCmaabIsCrabCmaabCnaabCmaabMtgabCmaabBIkfabcaabBKdaabCmaKiahaacbaBk",
    "acBYkBjBvaFnjaBXbgbBUtCCqabCFiaaaBTbabiBTcabeaabeabbmabbmaabiaabCoazbDtoabyaabynabiaabeaabea",
    "abBkazbBjoabyaablnabmaabiaebsaabaoBrbFepabaqbbdndbzoebBonabdbabwmkbvaBfbCmawbflabaqbbdndbCso",
    "ebCdnabdbabwmxbDusabcaCvbHhrabCmanbCxaabCmaabCleabCmacbCbdabCmacbMoeabcaabOzaabCmaabCjaabCma",
    "cbCjhabCmaabCliabCmaabBzaabCmacbNcaabcaabOlaabCmaabDfhabCmaabCliabCmaabClgabCmaabCdfabCma",
    "cbCdaabCmaLkbBKqCMwabacabCoaabCncabCsbFxbKsabbBnaqbBiaWzbBUaCFghbqacbgaBjcChaaccaaccaacka",
    "ackaaccaacsaaciaEdbLsKaabaBypcCxCbaccabcBaaDfcKcJwccmaBicCpaaccaackaccBeaIzbVwVscbaBvabaBy",
    "pcCxCbaccaCcbIqLyCbbEaBxabcaabbByEtbJwJuEpbJiJugboaabacbbaBnabiBmEwbJoIcabcaabbByFlbLiIwbbak",
    "abgjabfBqNscBBuBKijcuaeckaeckaeckamcCbdjcDuFdbcaeacFaybccaicFbarcCoEgjcuaeckaeckaeckamcCbd",
    "EebLmJiEDbbIGeIJebbeabbeabbeabbeadbiaBobDeabbeacbeaabcabbgaBAybULtSFvabCmaabCjChabCmaabClCe",
    "abCmaabClBcabCmaabHuDrabCmaabMnmabCmaabClCeabCmaabClBcabCmaabCltabCmaabClmabCmaabNkDlabca",
    "abbcabcaabPvDkabCmaabClgabCmaabBIsDfabcaabBLdcabCmaabCjfabCmaabCjgabCmaabClCeabCmaabClCb",
    "abCmaabClCkabCmaabCloabCmaabCjeabCmaabHwDpabCmaabMpaabCmaabClCqabCmaabClBcabCmaabCjBbabCma",
    "abWOqCjabcaabWRdDmabCmaabClhabCmaabCjDjabCmaabClmabCmaabClCeabCmaabCjCdabCmaabClCeabCma",
    "abClBcabCmaabClhabCmaabHyDjabCmaabCloabCmaabGspabcaabbcabcaabTlaabCmaabClmabCmaabChaabCma",
    "abClCeabCmaabWQyCjabcaabWTlDmabCmaabCjDfabCmaabClCeabCmaabRuCdabcaabkaabcaabVZeaabcaabWTxa",
    "abCmaabClCeabCmaabClBcabCmaabClhabCmaabCjrabCmaabClyabCmaabClfabCmaabSsDjabcaabcoabcaabVhj",
    "abCmaabClCmabCmaabCjCrabCmaabClcabCmaabCloabCmaabClbabCmaabClCeabCmaabCjCdabCmaabClcabCma",
    "abCjbabCmaabCjjabCmaabClCoabCmaabClBcabCmaabBjaabyDdabgeabeabbUefebYlCeabCmaabClBzabCmaabHmp",
    "abCmaabClbabCmaabClsabCmaabCllabCmaabWNsbabcaabWLhbabcaabbbabcaabbsabcaabblabcaabWLegabca",
    "abWZvCgabCmaabClBzabCmaabCllabCmaabHudabCmaabClbabCmaabClsabCmaabCllabCmaabWOybabcaabXBjo",
    "abCmaabClCaabCmaabBzaabCmaabClBzabCmaabHupabCmaabClbabCmaabClsabCmaabCllabCmaabWPsbabca",
    "abWCnbabcaabbbabcaabbsabcaabblabcaabbCmabcaabZnaabCmaabClBzabCmaabYepabcaabbbabcaabbsabca",
    "abblabcaabbCmabcaabBAjCrabCmaabClCsabCmaabClBzabCmaabCllabCmagbCLkBgabacabURuBnabcaabbcabca",
    "abbFaabcaabUUhDpabacabUUwBnabcaabbcabcaabbFaabcaabUSdDpabacabUSsBnabcaabbcabcacbUVfBkabac",
    "abUVuBnabcaabbcabcacbUTfBkabacabUTuBnabcaabbcabcaabbFaabcaabUWhDpabacabUWwBnabcaabbcabca",
    "abbFaabcaabUUhDpabacabUUwBnabcaabbcabcaabbFaabcaabUXjDpabacabUXyBnabcaabbcabcaabbFaabca",
    "abUVbDpabacabUVqBnabcaabbcabcacbUYdBkabacabUYsBnabcaabbcabcacbUVvBkabacabUWkBnabcaabbcabca",
    "abbFaabcabbUYxDnbbUZoBnbbacbbaFaabUWtDpabacabUXiBnabcaabbcabcaabbFaabcaabUZvDpabacabVAkBn",
    "abcaabbcabcaabbFaabcaabUZvFbaaNgabiNfaaNiabeNhaaNkabeNjaaNmabmNlaaPsabmPraaPuabiPtaaPw",
    "cbUPyKnabcaabcaabcaabcaabcaabcaabcaabcaabcaabcaabcaabcaabcaabcaabcaabBiaabcaabcaabcaabcaabca",
    "abcaabcaabcaabcaabcaabcaabcaabcaabcaabcaabDuaabcaabcaabcaabcaabcaabcaabcaabcaabcaabcaabca",
    "abcaabcaabcaabcaabVAhEvabadabVAkFaabVAjaabjabbkfabVFugabVIfEvabadabahaaKiabaEzbaIycbCFhJd",
    "abXImgabVAfaabrabbsfabVGogabVJdFhaaKmabeKlaaKoabaFfabVImFhabacabaFaabVFvEpabadabBihaaLc",
    "cbBhFzabBiaabDtEpabadabahaaKqbbVNeKpabacabaFaabVJtEpabadabmhaaNoabtMbabacabiDoabmaabCxEpabad",
    "abahaaKyabhJjabCGnBnaaKgaaCJxcbXJcCFaabUZlaabkabbjfabVIwgabVMbFhaaKuabuKtaaLaabaFraaBYncaXSm",
    "aacLgaVMhdaCOhaaJkEgbWQwBWgabeasbeaBebEqaabiaabdaCabDuaebkacbgaxbBwabbeaBabBuacboacbeabbga",
    "wbZUjabbZWiakbBnaabZUvaabeaabZWmaabcacbBaaabcacbgaabcagbgaabcacboaabcacbgaabcaBibCcaabmaabca",
    "abeaBwbDpaabcaabBoaabcagbCmaabcaabcaabcaChaBHYmaacCXtcGEqBHYnCBnbECyBIJqbbeabbeabbeabbeabbea",
    "bbeabbeabbeabbeabbeabbeacbgabbeabbeagboaabacbbgbabacbbgbabacbbgbabacbbgbabacwbEbbjbGsanbBca",
    "bbeabbeabbeabbeabbeabbeabbeabbeabbeabbeabbeacbgabbeabbeagboaabacbbgbabacbbgbabacbbgbabacbbgb",
    "abacwbEbbcbFqaabcaabcaabcadbwaCXThaCRLmaaBCHbaaBEEmaaBNnaaWSbaaYSjaaEIgaaCFJaaaaaaCBGfaaBQUq",
    "aaBTRfaaCVyaaGOyaaPMsaaGXkaaFCmaaBDeaaYmaaFTmaaBDFdaaCJaaaCVsaaCHmaaMKkaaJZmaaGLyaaCFDlaaDTm",
    "aaRVyaaFJqaaPFgaaSDmaaBXCdaaOCkaaQOyaaCSsaaBDGfaaXNqaaETqaaBFHxaaGHmaaEUoaaEFsaaWPgaaBXLn",
    "aaBReaaWsaaNOmaaEPiaaFMoaaDRiaaGXgaaEOoaaGqaaFTeaaHAkaaDFmaaBYcaaBCJbaaSsaaDDiaaERiaaLNy",
    "aaIScaaOXdaaBLVxaaERaaaWGeaaDDcaaKRvaaEWeaaPDgaaHTaaaBVBhaaCRsaaKJqaaCWkaaXuaaKSeaaUiaaSGe",
    "aaBZCraaBIQkaaBJJhaaBfaaBENwaaCToaaEScaaOAqaaIHtaaBEVhaaFLuaaYZoaaBUAraaKJkaaDEcaaOTeaaBLq",
    "aaBAAjaaBCSeaaBFFzaaMBkaaNItaaXHmaaFOhaaRYaaaBFIraaDMsaaXFiaaKBoaaEVqaaXLfaaBBGeaaBAQhaaHFv",
    "aaYEgaaXRtaaNLyaaBDIjaaCBuaaHkaaRFkaaPLsaaEEyaaGJeaaFHqaaBVPraaZqaaDYgaaEDuaaFEwaaHTiaaGYq",
    "aaVPmaaDPiaaDEgaaEgaaCFSnaaPHeaaDOkaaBBFiaaBLBnaaCJgaaIqaaBZgaaHZmaaBQiaaCMaaaDZmaaDEaaaBWw",
    "aaLDuaaHTfaaIMsaaCKcaaBXJxaaKuaaBPkaaVGgaaSEeaaBLoaaBHGbaaXcaaCRkaaGFmaaMOeaaGQzaaBBSbaaGDe",
    "aaDTcaaBJyaaBUyaaOVsaaOcaaIMkaaNgaaNPcaaDPsaaGiaaQaaaCCYraaBFXuaaSFcaaDUuaaBOUfaaNXlaaBTw",
    "aaIKeaaGgaaHCeaaDIwaaFXoaaDJsaaLEaaaISmaaLKsaaBREvaaBKCiaaBZGbaaPWmaaJgaaEAmaaBAsaaECwaaZw",
    "aaCImaaDNmaaURsaaCBSzaaMRyaaBNPsaaCBGjaaJUqaaMTeaaZEuaaBKBtaaBHyaaFEkaaIRgaaBANeaaBZUfaaBLk",
    "aaGIeaaHIqaaYgaaBAqaaDFmaaFKkaaBKqaaHGwaaHBwaaBkaaGTqaaDWeaaBZFxaaUVeaaUEbaaWMwaaCCuaaNEi",
    "aaMQcaaEIiaaBSyaaBPRraaESeaaPGcaaFKbaaGoaaBCmaaHLjaaBQjaaUGsaaBTXfaaBNTcaaBLCpaaDxaaJOoaaDEg",
    "aaTSgaaZGbaaNIoaaEWhaaBEScaaFGnaaKPuaaJRfaaBGJfaaKHhaaDKqcaBZgbaKRscaPPjaaZFsaaCTkaaBWeaaCq",
    "aaoaaDgaaWOkaaUDraaCHabaEUsbaDSmcaDZkaaPedaGAmaaBaaaDkaaDLoaaJStaaELeaaCBUvaaYcaaHwaaBDgaaCc",
    "aaIkaaBTgaaIcaaHoaaBKiaaIaaaCVoaauaaDDsaaQiaaCyaaHsaaCOgaaLiaaNmaaBMmaaDTkaaMoaaUiaaBTgaaOo",
    "aaBMsaaDJiaaNiaawaabaaqaamaaoaaDsaacaaNsaaFaaaYoaaBRkaaBqaaEiaaXmaaLiaaBLoaaKuaaaaaBKuaaDPa",
    "aaKiaaBByaaEiaaBFoaaEcaaCAuaaKaaaFBiaaVwaaEqaaBQGhaaOBLaaaNBYpcaBNIxaaCScaaFxaaBLnaaBIwaaEo",
    "aaZeaaDyaaBZyaaFnaaFgaaFqaaBWqaaGwaaLeaaBgaaUuaaPgaaCUeaaoaaLcaaFgaaXaaaJcaaFjaaKiaaDnaaLg",
    "aaFcaaBEuaaGuaaEeaaUaaaWaaaMoaaiaaEoaaDDmaaFaaaBEcaaBFoaaBfaaGsaaTkaaZwaaESoaaEDfaaJkaaJm",
    "aaZeaaLmaaEcaaRkaaeaaNeaaBiaaByaaGqaataaBEmaaBLiaaUwaaOkaaRgaaLuaaZkaaPiaaCNaaaMcaaCRsaaBJc",
    "aaFiaaBgaaWwaaEkaaDlaaEeaafaaBhaaFwaaGgaaBDkaaBRcaaYeaaWsaaRaaaDBgaaHyaaIwaaKgaaCuaayaaDs",
    "aaCDyaaDLkaaLLKuaalaaITuaaORXfaaDKgaaCoaaPLMeaaHZiaaZTuaaNZFraaFuCpcBGRnEMNrbcBygkcruacac",
    "acHDWabacacacHDXxvacacacaiaccaaccaaccaaccaaccaaccabceaaccaaccaaccaaccabceabceaaccabceaacca",
    "bceaaccaaccaaccaaccaacBpfachmacuaacsaIBrbHUAcHUFmbbeaobuaFabKuIkabcaUtbBPaBPeabaByOcbBCmBBi",
    "abatbbaBaJrbTqSqabcaCTBmcFMCqFMEmaccaacosacacacacacacacacDicGyzaccaaccsaccaacbcaccaEHLfaLHGt",
    "aajaasaaMRJuaaMQNraaGaaaBaaaFmaaJgaaCkaaGaaaBvaaVJdaaNOQyaaMSYbaaoaaBgaaBmaaMRYwaaNNSvaaVSu",
    "aaCyaaMSAuaaMRZzaaBaaaCDzaaCEqaasaaQUKaaaQUFbaaBcaaWBvaaWGeaawaaDkaakaaWGpaaWMuaaeaaCcaaBs",
    "aawaacaaBiaaDwaaqaasaaByaauaaeaaaaaaaaMUGoaaLYIpaaVSdaaBqaaMUXcaaMUWdaamaaBqaaLsaaHvaaBgaaCm",
    "aaEmaaGmaaCaaaFeaaBgaaCoaaaaaBqaaBkaaqaaBeaaBAeaaUxaaVaaaPfaaCsaaDJdaaFFyaaWdaaCyaaByaaJz",
    "aaMwaabaaJmaaMYLsaaMYGhaakaaBeaaBoaaqaaEyaaMZGmaaFcaaMZAxaaDqaayaaGbaaKyaaBAWlaaBcaaBBHwaaEe",
    "aaaaaNAFkaaMZVdaaBqaaBeaayaaNARiaaNAQjaaoaaCNaaaCKvaaBBThaaBBYcaaBcaaGiaaDxaaNCIoaaNBUn",
    "aaNBUsaaNBRjaafaaBiaaHuaacaaBCOjaaBCQmaaDiaaBqaaDkaaBCUvaaOGMcaaOGKbaaBCYiaagaagaaBoaaQXWy",
    "aaQXSxaaNEMwaaaaaMDZjaaBAKraaaaaBDBhaaOTFeaaBJSeaaOZRbaasaaBDEtaaBDIkaaDyaauaaCqaaKmaaBDTl",
    "aaChaaBDXgaaNGBgaaNFXhaaJyaaiaaeaadaaDoaaBoaaCuaaBbaawaaDqaaBoaaiaaCaaawaaFcaaGmaaCsaaJo",
    "aaNHEmaaNHFxaaEzaaIiaaCcaaHmaaNHKsaaNHFxaaHdaaCdaaBFKvaaBFZqaaBqaaCkaaCxaaBFVxaaBGMoaaCg",
    "aaNJJgaaNJAbaaViaaNlaaBGSlaaBGYaaaBGZhaaCtaaREqaagaaQFuaaHraaTTiaaBUBvaaBASaaaiaamaaEsaav",
    "aaNKTcaaOSChaaBHWcaaIzaaPuaaDyaaNKIqaaNKHxaaInaaSwaaBILhaaBIOwaaHmaaFmaaOqaaNKKcaaNKGdaaBJKv",
    "aaBJQgaaNLOmaaNLKnaaBJPzaaBJSiaaDmaaCcaacaaNMOaaaWJbaaWRmaaNMLbaaNNTsaaNNKzaaBcaaHvaaNmaaDc",
    "aaEkaaEdaaDcaaBeaaBaaaNNDiaaNNJnaaTiaaEwaaBLHlaaBLOqaahaaNNMaaaNOBvaaBCsaaNNKaaaDsaaNNGxaaIw",
    "aaCbaafaaBMGvaaBMKmaaDyaalaaEeaaLUIyaaLTXfaaNOHgaaNOAnaaNOZuaaNOOzaaBaaaCcaaNQGmaaNQCtaaBq",
    "aaNQYiaaReaaNQXvaaBiaaBOBdaaBODeaaBOCfaaaaaBOOsaaBqaaBqaaBoaaFiaaBORdaaBOYcaaNSUmaaNSSl",
    "aaNSZoaaNSVraaMMHyaaMLVpaaNURqaaBuaaKuaaPKDbaayaaBPPoaaNVAcaabaaDaaaCaaaNVBtaacaaaaaDiaaBPSj",
    "aaBPXkaaBPWjaaGeaaPMPaaaNWJtaaEuaaEyaaBQIzaaPNXeaaNXDnaaNXMmaaDiaaNXLjaaHcaaBQZfaaBRFuaauaak",
    "aaNYYcaaXaaaaaaNZIvaaBRCxaaPRFuaaNZMfaagaaBRQxaaPRTiaaNZHzaaBSBzaaBSDsaajaaCgaaOBMaaaOBEj",
    "aaBSFraaBSNkaaEoaaFeaaBSTdaaPVGaaaCkaaPVFnaaPVQuaaOCCraaOCKmaaOCIjaaHuaawaaODFmaaFqaaODEb",
    "aaODOiaaODNbaaMRKwaaOLIhaaBUCoaaGgaaBUEpaaBUJeaaBDEvaaPHPkaaBcaaBNMpaasaaMQKraagaaKHwaaCEYv",
    "aaBVBwaalaaBkaaBKHnaaBKJcaaeaauaaDeaaOFWmaaOFWnaaEiaaFkaaFsaaKpaaLwaaDgaaIqaaTzaaJeaaeaaBg",
    "aaOFWuaaXuaaLnaaQBVnaaBWHwaaeaaCsaaOKRwaaOKLvaaOGYyaaQDLtaaiaaQDVsaaWgaaQERdaaBXDyaayaawaae",
    "aaEyaaCnaaKiaaDjaaLqaaGfaaFeaaCcaaBXTlaaBYAmaaCmaaBYAhaaBYHqaagaaOKEiaaOJVjaaoaaBYMraaBYOw",
    "aaCLUzaaQXGoaaOeaaQKDzaasaaBZKcaaFyaaMcaaPqaaOLXuaaOLRdaaBsaaGyaaHcaaOMZgaaDMGraaLAMbaaBd",
    "aaEaaaLBAaaaLAIlaaHsaaOQRkaaCcaaOPSraaHeaaCmaaOQHuaaOQGzaaVyaaMgaacaaHbaaBDiaaCeaaORQwaaOQOb",
    "aaCFNvaaCFRgaaOROaaaQWYzaaCGFqaaBRFtaaBRNeaaOTIyaaQkaaRABvaaqaaCGQmaaOUWyaaRBItaaRBToaaOVEj",
    "aaaaaCiaaOVYgaaOVJzaaCGVtaaCHBgaaJsaaCcaaEqaaCHFraaRFXsaaOXWtaaXgaaOoaaCISzaaCkaaCIYuaaPAJm",
    "aaRJHjaaRJLqaaUkaaKcaaPARzaaCJQvaaCJVqaakaaoaauaaoaaCwaaPCXu",
    NULL
};

// Compatibility decompositions (Unicode 9): codes left out; how many characters; each as signed
// distance to the last one.
static const char *const unicode_compatible[] = {
    "GebCmhcaCFgbbCAfecEzCEycbCDnabcacBlCEsabOkccCTbCHqabCGhabEubdEtYHqYHjadfYHqYHnadcYHmYHj",
    "ElcBqcacCkclcChIgacFtFuicBNuBTjCbbkCqcDpYcacYbYeacVrVsacXndaceCiacedacCdhaciCeacihBkcCxBs",
    "acBrEeacBrBsHgbBjabBNgabBNbabqabBNyabeabmabBOdabeBfcGvCFcacCFbCFeacCFdCFkacCFjCHsacCHrCEw",
    "acCEvCFmcbMxabBMraboabkabBPqFtcBWjCJyjcCJxCEsCxbNqabmabBlcbCoablzblaboabcbbDfabCgdbBj",
    "PhcBIqCgJdcMsFyacDjDkacGkGjacDfDgCYccFYoCbExcLyCbBocnBjacBktBubIeEccMwDtbcDwDvOwbBAsEPzbMOz",
    "abKgabKdbbeabcabZiabZdabcabcabcabcabcabcabcbbcabBJyabBJvabeabeabcabeabuabBMcabcabUFqabVRrabe",
    "abcabBMmabeabcabBMnbbiabeabRcabQxabBLiabUGyabcabVSfabiabcabVSiabUFjabBMvabVSwabTHdabcabcabBk",
    "abcabCOhabsabgabcabCLsabcabBcabkabcnbJcBibBLtabBMbabBMiabBBlabBCaabBMpabBMwabeabiabgabcabc",
    "abUNaabUJbabDrabUNoabUJrabDnabbabeabcabcabcabgabuabcabQpabRcabcabUDgabUDdabcabBOtabBPcabcabc",
    "abWqIkcCNtBUoLecBZnCGcbcCGbCGcacCGbCJsCjcCJrCGedbCGdabaabaabaabaabaabaabaabagbYEyfcYExCIo",
    "mbCHlacaaadaaaibBbdcYHoaadaaabcgaadaaaecYHrabcbCFaicCCpaacaChacaCineYFeaaahbYHnqbBgabEkcbEb",
    "abcabcabcabcabcabBbabZRqabZQfabBpabcabFiabEtabcabcabcabcabcabcabcabcabcabBbabZRqabZQfabBpabc",
    "bbEiabiabuabsabBLaabBMfabgabcabcabcabeabgabclcCpCoDjdBjDvEaaddDvFgabDracIkIjbdCmDzEyadxDzFk",
    "abVubcRfIdabCoabCjabaabaabCmabOsabRbabaabgabCmbbChacaCocbCjabcabcabaabacccladoBdoacqnbbBadba",
    "dbBvabcbbCqabClabcbboabCqabEByabcabcabcabECpbdCrjBuabCPcabzabClabBaabXBmebZPpabCmabcabiabc",
    "gdEjYHqYHdadlYHqYGzaepYHqYHpbadcYHqYHladbYHoYHladdYHqYHhadfYHoYHhaddYHmYHhadbYHkYHhadhYHqYHf",
    "adbYHiYHfadjYHqYHbadjYHmYHbadfYHiYHbadbYHeYHbacnYHqabYFtacaaadaaaacaBaabaacazadBazaaeBazaa",
    "acaBeabaacaBdadBeBdaabgabrabcabsabCeacaaadaaaacaBaabaacazadBazaaeBazaaacaBeabaacaBdadBeBda",
    "abgabrabcabsjdErYHsYHlGgcZSyaadaaabcgaadaaaVnbZThabcabcabcabcabcabcabcabcacpbaccaacacacbe",
    "acdgacfiachkacjmacloacnqacndadpspadburadbwtadbyvadbBaxadbBczadbBeBbadbBgBdadbBiBfaebsbn",
    "aebsapaebscraebsetaebsgvaebsixaebskzaebsmBbaebsoBdaebsqBfaebudnacqfacihackjacmlaconacqpacsr",
    "acutacwvadgbdadgafadgchadgejadggladginadgkpadgmradgotadgqvadiddadlEkEhadbEmEjadbEoEladbEqEn",
    "adbEsEpadbEuEradbEwEtadbEyEvadbFaExadbFcEzadbFeFbadbFgFdadbFiFfadbFkFhadbFmFjadbFoFladbFqFn",
    "adbFsFpadbFuFradbFwFtadbFyFvadbGaFxadbGcFzadbGeGbadbGgGdadbGiGfabBwabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcaboabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabFrBYneZTeaaaDzdZSjagacaaadaaaTxbDmabBnJhbBIDa",
    "LrbBVHgDfbBNGmmbCJVhabDcabBcabsabCaabDkaboabBoabCaabBXqabCyabmabBuabBoabBqabEcabBqabwabLy",
    "abHgabCeabkabCiabsabCcabBaabByabEaabBkabCcabCGeabFoabBJkabBuabqabwabBkabFwabBKsabDsabJgabBu",
    "abBmabBsabEeabgabBBwabuabyabBaabIyabqabkabJaabuabBaabqabEsabBiabBkabGeabBSsabDoabBqabCEyabk",
    "abGkabBgabBaabBqabDaabkabUoabBwabCmabDAeabFcabBuabEmabBwabsaboabEaabkabCmabDFaabBIkabyabkabi",
    "abqabBkabeabGgabQqabkabBAcabuabDwaboabsabqabHaaboabRoaboabDuabBiabDqabSgaboabBiabZeabJsabm",
    "abOaabGsabDoabBDcabKgabBSeabCcabEkabDyabFgabwabmabCoabFwabuabBAqaboabsabsabBgabBeabiabGcabi",
    "abmabCXmabCiabBKcabyabBuabVuabBaabFmabDoabBRqabBeabBeabCsabCwabPiabyabFeabTcabCkabQcabBqabk",
    "abQyabOeabJqabmabkabCTwabsabMaabLwabgabDqabIcabBaabiaboabHoabCqabmabBcabMwabDyabiabOcabgabBm",
    "abTkabDsaboabFkabuabgabuabCiabBEkabBEuabuabCyabBsabqabuabiabDcabiabBiabkabBaabCcabBeabqabEo",
    "abBeabiBqbEQUxCbbBKIebbBAQwabgabcDscCKZhBKSoacBKSnBKSqccBjeDrcDeBqBxbYBvabcabNaabMxabNcabc",
    "abNbabcabcabNeabcabcabcabcabcabLxabBnabcabcabByabBvabcabcabcabcabcabcabcabcabcabGcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabBpabFvabcabNsabcabiabeabkabiabeabOnabOw",
    "abeabOxabcabeabeabcabiabeabeabcabcabcabcabgabiabuaboabkabMsabcabLxabcabcabDiabcabgabsabcabe",
    "abuabgdbBTSwabKuabKbabGRsabGRpabCsabCpabBDRaabBDKzabExabBvabILsabBMvabGKpDsdCHNfMTsMTp",
    "adbMTwMTtadbMTyMTvadbMUcMTzadbMUeMUbadbMUgMUdadbMUkMUhadbMUoMUladbMUqMUnadbMUuMUradbMUwMUt",
    "adbMUyMUvadbMVaMUxadbMVcMUzaebMTsHmNBbaebMTwHiNBbaebMTyHgNBbaebMUcHcNBbaebMUeHaNBb",
    "aebMUgGyNBbaebMUkGuNBbaebMUoGqNBbaebMUqGoNBbaebMUuGkNBbaebMUwGiNBbaebMUyGgNBbaebMVaGeNBb",
    "aebMVcGcNBbaebMUqHoNCbahbMUoHgHdGwFkNGtagbMUoHgGrHcNCbbdbCGYyCGYvadbCHJsCHJpadbCGZqCGZn",
    "adbCNRiCNRfadbCHKiCHKfadbCJOkCJOhadbCGZeCGZbadbCJOgCJOdadbCHGcCHFzadbCKYkCKYhadbCZXwCZXt",
    "adbDHAsDHApadbDDVsDDVpadbDAAiDAAfadbEGIkEGIhadbCNWoCNWladbCZBmCZBjadbDAUeDAUbadbCZXyCZXv",
    "adbDNSmDNSjadbCLOcCLNzadbDIPeDIPbadbECKgECKdadbDNUwDNUtadbCKNoCKNladbCHQkCHQhadbCLWqCLWn",
    "adbCRCuCRCradbDLYcDLXzadbCHSsCHSpadbECNeECNbadbCKZwCKZtadbDNWcDNVzadbCHTyCHTvadbDUHgDUHd",
    "adbDUHyDUHvabCMMuabGYsabFIsabQRwidDPIziBdacBlbaccaacacacbeacdgacfiachkacjmacloaclfacgdaceb",
    "accaacacacbeabMSsabeabcabeabcabcabeabeabcabeabcabcabcabcacBjHmacHhHiacHfHgacHbHcacGzHaacGxGy",
    "acGtGuacGpGqacGnGoacGjGkacGhGiacGfGgacGdGeacGbGcafGjGkGqObIcaeHdHoHpIcacIbHqbbBTWuabKuabKb",
    "abGRsabGGzabCEcabCPfabCPcabCIdabDSiabOZmabHCwabDEzabDVjabBGIcabBSLvabLEyabBSsabWfabNUoabBCEj",
    "abXBcabTVcabOPjabBDHhabBDQuabDNdabVAtabBPQiabBVXlabBSuabTHoabBGRaabCDGpabBXwabTNwabWFxabCs",
    "abCpabMAgabHNxabOdabGIqabDtabUViabBEFjabBUUmabBRNhabEJwacCPIvgacfiachkacjmacjhacifacgdaceb",
    "accaacacacbeacdgacfiachkachjaccCZXeacCZXbCZXcacCZWzCZXaacCZWxCZWyacCZWvCZWwacCZWtCZWu",
    "acCZWrCZWsacCZWpCZWqacCZWnCZWoadCZXdbCZXgadCZXdaCZXeadCZXdcCZXcacCZVjCkaddBavacdBdadtqBf",
    "abBKQmabeabeabeabeabcabeabeabeabeabeabeabeabeabeabeabeabgabeabeabeabcabcabcabcabcabgabgabg",
    "abgabgabcabcabcabcabeabeabeabcabcabcabcabcabeabcabcabcbeGdDqDiDzaeCxFqBrDzaecGgBxEhadaGyBh",
    "aeFlDaDcFdadxGcDvadCbgFsafFtBitFyDxaeCnGmGfGgadGhFqEladBdGiCdadEbnFkaeEvEuCxkaeCfFcfBk",
    "adGdFamadFlFmBpacDrdadeCgDuaeGbEikBkaeFzEsDhEqacGbEyafExEyErEkragDxEyxCcDzCsafEtEyeDjk",
    "adBvEkrafDrEkrBvDiafFfEqDpBvFqaeEtEuBeDpadCdFuFdadlEiCnadBtFqCjaeDbBhwEqafEdEuDvEoCd",
    "aeDdDysFdadwEiDvadlEiDhadpEqFdacBcBfacBkCqacCrDiacDdiadavkadoDhCmafBaDiEzEiDhadsDiEhaeyDkBfb",
    "afBtDvBuBeCsadBtCvEqacBtCnacCmBwafBrDzFoCxmaeyDvGwDzafBcBlxBfFgadBrBouafCbDdBgEsBhacBhCf",
    "adCgBdoadmBmCzadBsByEladCoCqFfadCoCsEraeCiEjGcDhadBoBeCracBmBwadBrBsDfadBkCoBhadBfCor",
    "aeBpElwEuadBdElFmadzCbyadBeBaEpafDqBqEpDsyaeBnDrEumacBnwafvwBzDkBhactEbaeEcEbCeDiaeBjCcDzCs",
    "adnBwDxadCcBwBhadjFfGgaerCzkCsacbbadeBtDcaeBhBiCxBqaccxafyoDhBrFaadhDjkacBKUxDHGcacDHFzDHGa",
    "acDHFxDHFyacDHFvDHFwacDHFtDHFuacDHFrDHFsacDHFpDHFqacDHFnDHFoacDHFlDHFmacDHFjDHFkadDHFzbDHGc",
    "adDHFzaDHGaadDHFzcDHFyadDHFzeDHFwadDHFzgDHFuadDHFziDHFsadDHFzkDHFqadDHFzmDHFoadDHFzoDHFm",
    "adDHFzqDHFkadDHFxdDHGcadDHFxbDHGaadDHFxaDHFyadDHFxcDHFwadDHFxeDHFuadDHBtBvBiacgfacClBo",
    "adBabBiacfBxacCazaccsadrsFiadFzsFkacIdyacCTHkCTeacDDaNJdacDMsNVcacEAzFBmaeDLxGXhMCfBFXw",
    "acDNMxDpacDmDlacCQoCQnacDkDjacDgDfacuracwvackjadCodwaebpdwaciDfacDcDbacCQeCQdacCQeCNpacml",
    "acihacCjDwadBdCrDwadDljDwadDxcDwadCxxDwacCMeWFuacYSxYSyacYTpYTqacYTbYTcacYTloaccbacCNeCNd",
    "acaaactuacdeadaaFiadGbuFiacFhFiadFleFiadFhaFkadGduFkacFjFkadFneFkadFjZMuZMhaelZMuZMhEwacHnBi",
    "aduCbBiadBngBiadBzsBiadBiBhgafBcBhgZNmZMhagbBhgZNmZMhEwacFbgacjkacCMsCMraclmacfBzacBwBv",
    "acCOyCOxacBuBtacBqBpacrsacCaBxacBuBtacCOwCOvacBsBracBoBnactuacBoCLwacCOdCOeaeCMpDxEwEvacBoDq",
    "acBbaacacaeCnZQaZMxhadCtDkEzacEeCpackDwacBhnacBxqacBykacCraacaeacCisacpcacbeaddgpackyacvv",
    "adwhgadcefacCdpaeDcFbEwEvadCqafacgeacCobacCjCsacCjwadxZOoZMtadDjZQeZMtacEpCZAuacCZArCZAs",
    "acCZApCZAqacCZAnCZAoacCZAlCZAmacCZAjCZAkacCZAhCZAiacCZAfCZAgacCZAdCZAeadCZAtbCZAwadCZAtaCZAu",
    "adCZAtcCZAsadCZAteCZAqadCZAtgCZAoadCZAtiCZAmadCZAtkCZAkadCZAtmCZAiadCZAtoCZAgadCZAtqCZAe",
    "adCZArdCZAwadCZArbCZAuadCZAraCZAsadCZArcCZAqadCZAreCZAoadCZArgCZAmadCZAriCZAkadCZArkCZAi",
    "adCZArmCZAgadCZAroCZAeadCZApfCZAwadCZApdCZAuadCYWplwBRKmbCYeabeIcbETOoFfbEVYnabDmBHibEVPo",
    "abDCaabEXVzabEXYcBEEacEZLvaacagacfmadlagadfamacVeUnacbcmcDUmeacdBdacBeracBmpacdnibJaabBjabg",
    "abcaboabcabcabwabeabEJdBlcEHeyabLmabaabuabaabaabaabgabaabaabaabeabaabaabaablabaabaabaabkaba",
    "abaabaablabaabaabaabDiabaabaabaabeabaabaabaabCpabaabaabaabbabaabaabaabgabaabaabaabcabaabaaba",
    "abmabaabbabaabeabaablabaabBgabaabnabaabBwabaabaabaabmabaabaabaabiabaabaabaabdabaabaabaabsaba",
    "abcabaabaabaabkabaabcabaabaabaabfabaabaabaabBoabaabcabaBhbCxabaabaabaabCaabaabbabaabeabaabGf",
    "abGmabaablabaabiabaaboabaabaabaabKjabaacCrcacbcacbNmacNlNmacNlCqacCpCqacCpMkacMjMkacMjMi",
    "acMhMiacMhMmacMlMmacMlNcacNbNcacNbNcacNbCsacCrCsacCrCsabKcabaabaabaacMtmacloacnCkacCjCs",
    "acCrCuacCpiachkacjmaclCgacCfCoacCnCqacCleacdgacfiachCcacCbCkacCjCmacCjcacbCaacBzCiacChCk",
    "acChcacbByacBvbaccBwacBtdacebaccBuacBjnacolacmjackBkacBfpacqBgacBdtacuracspacqBeacBbtacuBc",
    "aczBaacxzacBayacvBbacBcwachBpacBqBnacBoBlacBmiachqacpsacpBpacBqgacfoacnqacnCdacCeBtacBuBr",
    "acBsBpacBqcacbeacdmacloaclBvacBwBtacBuBracBscacbkacjmacjBxacByBvacBwBtacBuaacaiachkachBz",
    "acCaBxacByBvacBwbaccgacfiacfCbacCcdaceeacdgacaChacCiCfacCgCdacCejackbaccaacBzEyacEvEwacCzDa",
    "adEUhERokadERxERqiadERxERsgadERxERueadERxERwcadERxERyCkacFrwacvyacxCkacCjCmacClCsacCrCuacCps",
    "acruactCgacCfCiacChCoacCnCqacCloacnqacpCcacCbCeacCdCkacCjCmacCjmacloacnCaacBzCcacCbCiacChCk",
    "acrqacpsacpoacnqacnCdacCecacbeacdmacloaclcacbkacjmacjChacCiaaccBpacBqBnacBobaccaacagacfi",
    "acbDaacCxBxacByBvacBwjackhacibaccaacCtmacloacnqacpCkacCjCoacCjiachkacjmaclCgacCfCkacCfeacdg",
    "acfiachCcacCbCgacCdCaacBxcacbByacBvbaccBwacBtdaceBuacBjnacolacmjackBkacBfpacqnacoBgacBdtacur",
    "acspacqBeacBbtacwBaacxzacBayacvBbacBcwachBpacBqBnacBoBlacBmiacfBpacBqgacdBtacBuBracBsBpacBqc",
    "acbeacbBvacBwBtacBuBracBscacbgacdBxacByBvacBwBtacBuaaccBzacCaBxacByBvacBwbacccacaCbacCcd",
    "aceDeacCxChacCiCfacCgCdacCejackfacCnCkacCjCoacCjCgacCfCkacCfCcacCbCgacCdCaacBzCeacBnBkacBjBo",
    "acBlBiacBhBmachcacbeacbcaccbacccacgjackfadnBcgadBhBeeadBhBgcacBzBkacBjBmacBhBgacBfBiacBfBe",
    "acBdBgacBtBsacBrBuacBrBqacBpBsacCfCeacCdCgacChCgacCfCiacCdCcacCbCeacBpBoacBnBqacBnBmacBlBo",
    "acBrpacqnacolacmBiacBhfacedacihackjacmBkacBjBmacBhBgacBfBiacBfBeacBdBgacBtBsacBrBuacBrBq",
    "acBpBsacCfCeacCdCgacChCgacCfCiacCdCcacCbCeacBpBoacBnBqacBnBmacBlBoacBrpacqnacolacmBiacBhf",
    "acedacihackjacgpacqnacolacmBiacBjBoacBlBmacBfBcacBjnacolacmjacmpacqnacolacsBcaczBaacChCu",
    "acCtCusdCneByadCbgbaddgbaddgBwadCbiBuadCbCcBxaddCcBvadfCcBtaddByBvadbByBvadaBwkadCfBwiadBrlb",
    "adoncadmnCgadBrBkBvadmBkBvadmBkBxadoBkaadBjBkaadBfpaadqpaadqBgaadBhnBwadBhnBwadBhpCiadBrBiBt",
    "admBiBtadmBiaadBhBiaadBdrCeadBlpBuadBdpBuadBbBcBvaduBcBvaduBcaadBbBckadBhzByadxyaadxyaadxyi",
    "adBdwaadvwkadBfwiadpBlBuadhBlBuadfgBvadBqgaadbBtBwadbBtCgadlBtCeadjBvaadBwBvaadBwBrBuadbBrBu",
    "adbcBvadBucBvadBwBvbadByBvBwadaBvCgadjBxcadBwBxByadaBtdadByBtBucdaBxeadBydBxadCcdaadcBxBw",
    "adcBxCeadfBzByadcBzByadcBzCgadfbkadhbiadcjaadkjaadCfmCeadCleCiadCleCgadCjiCeadCliCcadCjCck",
    "adClCciadCfBykadChcCeadCfByiadBrjCcadBnpCgadBrnCgadBnrCgadlBvCiadlckadaCfCgadaChCiadajkadjak",
    "adpgkadhBxCgadpgBvadBuBtBwadxykadnekadhBzcadBwBtCeadlBvByaddeaadbBvByadcBzcadbcCgadCfbCi",
    "adjBxCiadrikadCpkCgadneaadxzByadBfBgaadBjjCeadhBzCiBodBpBeKyadLbeKyaeNdCgagaeClCeCbs",
    "aeBoBvBwBraemBevyaeBneBqhaevwmfaecBpBicadBfBekasBnBekERhEOsCgagERdEQcwmfERdERgBpBic",
    "aiBxBwEQxEPcBwCfCggaeBrLyMrCgtbEPzabBKFyabcabBKExabcabBzabCiabBKGcabcabMBxwbbabBhabbabYAhaba",
    "abEfabcabGiabeabBKBeabcabjabcabnabcabfabcabgabcabcabccbBKDjabeabYDuabaabaabaabYDpabaabaabDx",
    "abBKFyabBKFtbbBaabbabkabChabYFeabYEpabcabGiabeabBKBeabcabBKIdabgabiabcabeabBeabeabbbbCkabEh",
    "abcabCcecClERmacvwacERlERobcERnERqbcERpERsacBbBcacERrERuacBdBeacERtERwacBfBgacERvERyacBhBi",
    "acERxESaacBjBkabDtabcabaabcabaabcabaabcabaabcabaabaabaabcabaabcabaabaabaabcabaabcabaabaaba",
    "abcabaabaabaabcabaabaabaabcabaabaabaabcabaabaabaabcabaabcabaabcabaabcabaabcabaabaabaabcaba",
    "abaabaabcabaabaabaabcabaabaabaabcabaabaabaabcabaabaabaabcabaabaabaabcabaabaabaaboabaabaaba",
    "abcabaabaabaabcabaabaabaabcabaabaabaabcabaabaabaabcabaabaabaabcabaabaabaabcabaabcabaabcaba",
    "abaabaaclCpacCqCpacCqCnacCoCnacCoCjacCkCjacCkCfacCgCfebEOpabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabBFByabcabEXsabuabcabx",
    "abTgabrabGfabeabeabeabeabEmabeabeabCtabEkabGxabeabeabeabeabcabeabeabeabeabeabeabeabeabeabe",
    "abeabgabeabeabeabcabcabcabcabcabgabgabgabgabgabcabcabcabcabeabeabeabcabcabcabcabcabeabiabGx",
    "abcabPoabDxabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcdbcabcabcabcabcabccbcabcabcabcabcabccbcabcabcabcabcabccbcabcabcdbBKYbabcabsabgabrabb",
    "abYGmbbDHqabCPvabcabcabcabDBuabDiDCIbbBCLfabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcaboabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabEjabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcaboabcabcabcabcabcabcbbeabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabEjabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcaboabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabEjbbeabccbgcbgabccbgabcabcabcbbeabc",
    "abcabcabcabcabcabcaboabcabcabcbbebbeabcabcabcabcabcabcbbeabcabcabcabcabcabcabcabcabcabcabEj",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcaboabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabEjabcbbeabcabcabccbgabcabc",
    "abcabcabcabcabcbbeabcabcabcabcabcabcbbqabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabEjabcbbeabcabcabcbbeabcabcabcabcbbedbiabcabcabcabcabcabcbbqabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabEjabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcaboabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabEjabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcaboabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabEjabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcaboabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabEj",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcaboabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabEjabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcaboabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabEjabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcaboabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabOcabUecbBAqabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabGkabGfabcabc",
    "abcabcabcabcabXAaabWZjabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabWXeabWTtabCtabCkabCbabCeabCbabFhabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabGk",
    "abGfabcabcabcabcabcabcabXAaabWZjabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabWXeabWTtabCtabCkabCbabCeabCbabFhabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabGkabGfabcabcabcabcabcabcabXAaabWZjabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabWXeabWTtabCtabCkabCbabCeabCbabFhabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabGkabGfabcabcabcabcabcabcabXAaabWZjabcabcabcabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabWXeabWTtabCtabCkabCbabCeabCbabFhabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabGkabGfabcabcabcabcabcabcabXAaabWZjabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabWXeabWTtabCtabCkabCbabCeabCbabmabccbCUjabcabcabcabc",
    "abcabcabcabcabcabrabcabcabcabcabcabcabcabcabcabrabcabcabcabcabcabcabcabcabcabrabcabcabcabc",
    "abcabcabcabcabcabrabcabcabcabcabcabcabcabcabcIIqbEMuabcabiabgbbByabBrabjabuabBmabnabcabcabc",
    "abBlabmabqabxabBaabBhabgabtabcabgabeabmabeabeabEaabFwabBxabDvbbFlabibbCccbBzbbCgabnabcabcabc",
    "abBlabmabqabxabBabbBbabtabcabgbbqbbigbBbebcbbCgbblbbeabBlabmbbhabBabbBbcblbbqbbibbJwbbFtbbFl",
    "abibbCccbBzabuabBmabnbbeabcabBlabmabqabxabBabbBbabtabcabgbbqabeabeabEabbDybbJjabcabiabgabBw",
    "abcabBrabjabuabBmbblabcabcabBlabmabqabxabBaabBhabgabtabcabgabeabmabeabefbBjabiabgbbByabBrabj",
    "abuabBmbblabcabcabBlabmabqabxabBaabBhabgabtabcabgabeabmabeabeWicEOxdacehackjacmlaconacqpacsr",
    "acutacwvacyxacBazfdhByBvadbCaBxadbCcBzadbCeCbadbCgCdadbCiCfadbCkChadbCmCjadbCoCladbCqCn",
    "adbCsCpadbCuCradbCwCtadbCyCvadbDaCxadbDcCzadbDeDbadbDgDdadbDiDfadbDkDhadbDmDjadbDoDladbDqDn",
    "adbDsDpadbDuDradbDwDtadBKHqBKEjBKEmabBKFrabBeacBdcacBmgbbBxabcabcabcabcabcabcabcabcabcabcabc",
    "abcabcabcabcabcabcabcabcabcabcabcabcabcabcacBjBcacrsacfBdacBeaadfamaccBnBacutacurBkcam",
    "EhcBKNaDracIaaabenbBLOmabFGxabFSnabBANpabWOgabHZwabBKYsabBKXnabHZdabRUmabIIsabITbabOPzabKAw",
    "abKPpabPGoabOVlabBGRqabGEfabRVoabBNEnabDOvabUIwabJMbabOuabQEbabsabBYEsabBMEhabLXpabEJsabLKy",
    "abBGDeabBGQzabROmabTeabBDDbabUBgabFQzabbabKTaabBAIjabCMiabBTDmedCVQnBPSyBPSvadbWRyWRv",
    "adbXCaXBxadbBGXuBGXradbBWZaBWYxadbBMBmBMBjadbCBPmCBPjadbBAJaBAIxadbBOIwBOIthbBJZoabIVn",
    NULL
};

static const char *const *unicode_table(UnicodeTable which) {
    static const char *const *const tables[] = {
        unicode_categories, unicode_classes, unicode_canonical, unicode_compatible};
    return tables[which];
}
