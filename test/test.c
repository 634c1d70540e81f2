// test.c: the proofs. Includes the program itself, so that every static function can be called.
//
//     build/test [--list] [name ...]        run all tests, or those whose names are given
//
// Each test is a row of the table at the end: a name, what it proves, a function. Fixtures were
// recorded from transformers, peft and bitsandbytes by test/reference/make_fixtures.py and lie in
// test/fixtures; material in ../shared/real is used when it is there. Exit status 1 if any failed;
// the last line is "N passed, N failed, N skipped".
//
// With -DQLORA_REAL_DOUBLE it holds the finite-difference tests instead, with -DQLORA_CUDA the
// comparisons of a GPU with the CPU.
#include "../qlora.c"

#include <sys/wait.h>

// ------------------------------------------------------------------------------------ the harness

typedef struct {
    const char *name;
    int failures;
    bool skipped;
} Test;

__attribute__((format(printf, 3, 4)))
static bool check(Test *t, bool ok, const char *format, ...) {
    va_list args;
    if (ok) return true;
    t->failures++;
    if (t->failures > 12) return false;
    printf("  FAILED %s: ", t->name);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    return false;
}

__attribute__((format(printf, 2, 3)))
static void skip(Test *t, const char *format, ...) {
    va_list args;
    t->skipped = true;
    printf("  skipped %s: ", t->name);
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

static const qlora_allocator heap = {default_allocate, default_release, NULL};

// The one comparison: max |a - b| / max |b|, NaN if anything is NaN or infinite.
static double max_err(const real *a, const real *b, size_t n) {
    double worst = 0, scale = 0;
    for (size_t i = 0; i < n; i++) {
        double d = fabs((double)a[i] - (double)b[i]);
        if (!isfinite(d)) return NAN;
        if (d > worst) worst = d;
        if (fabs((double)b[i]) > scale) scale = fabs((double)b[i]);
    }
    return scale > 0 ? worst / scale : worst;
}

// |a - b| / |b| in the Euclidean norm, NaN if anything is.
static double l2_err(const real *a, const real *b, size_t n) {
    double difference = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - (double)b[i];
        difference += d * d;
        norm += (double)b[i] * (double)b[i];
    }
    if (!isfinite(difference) || !isfinite(norm)) return NAN;
    return norm > 0 ? sqrt(difference / norm) : sqrt(difference);
}

// A small generator for test inputs; the engine's own, so that runs repeat.
typedef struct { uint64_t seed, count; } Random;
static double uniform(Random *r) {
    return (double)random_u32(r->seed, 77, 0, r->count++) * 0x1p-32;
}
static double normal(Random *r) {                             // Box and Muller
    double u = uniform(r) + 0x1p-33, v = uniform(r);
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}
static size_t pick(Random *r, size_t least, size_t most) {
    return least + (size_t)(uniform(r) * (double)(most - least + 1));
}

static void *grab(size_t n, size_t size) {
    void *p = calloc(n ? n : 1, size);
    if (!p) { printf("the test program is out of memory\n"); exit(2); }
    return p;
}

// ------------------------------------------------------------------------------------------ labels

// A micro-batch made of id sequences with labels (-100: not supervised).
typedef struct {
    size_t n, T, S;
    int32_t *ids, *position, *supervised, *target;
    Span *spans, *rows;
    LabelledBatch batch;
} TestBatch;

static void add_sequence(TestBatch *b, const int32_t *ids, const int32_t *labels, size_t n,
                         uint32_t ordinal) {
    enum { MOST = 4096, MOST_SPANS = 64 };
    if (!b->ids) {
        b->ids = grab(MOST, sizeof *b->ids);
        b->position = grab(MOST, sizeof *b->position);
        b->supervised = grab(MOST, sizeof *b->supervised);
        b->target = grab(MOST, sizeof *b->target);
        b->spans = grab(MOST_SPANS, sizeof *b->spans);
        b->rows = grab(MOST_SPANS, sizeof *b->rows);
    }
    size_t S = b->S;
    for (size_t k = 0; k < n; k++) {
        b->ids[b->T + k] = ids[k];
        b->position[b->T + k] = (int32_t)k;
        if (k == 0 || labels[k] == -100) continue;
        b->supervised[b->S] = (int32_t)(b->T + k - 1);
        b->target[b->S++] = labels[k];
    }
    b->spans[b->n] = (Span){b->T, n, b->T, n, ordinal};
    b->rows[b->n] = (Span){S, b->S - S, S, b->S - S, ordinal};
    b->n++;
    b->T += n;
    Batch tokens = {b->T, b->n, b->T, b->T, b->spans, b->position, 1, 1, true};
    Batch rows = {b->S, b->n, b->S, b->S, b->rows, NULL, 1, 1, true};
    b->batch = (LabelledBatch){tokens, rows, b->ids, b->supervised, b->target};
}

// The sum of the batch's nll; gradients are added to with `gradient`.
static double batch_loss(const Transformer *m, Workspace *w, const LabelledBatch *batch, real scale,
                         bool gradient) {
    double total = 0;
    loss_and_gradients(m, w, batch, &total, scale, gradient);
    return total;
}

static void free_batch(TestBatch *b) {
    free(b->ids);
    free(b->position);
    free(b->supervised);
    free(b->target);
    free(b->spans);
    free(b->rows);
    *b = (TestBatch){0};
}

#ifdef QLORA_REAL_DOUBLE
#include "test_gradients.c"
#else
#include "test_formats.c"
#include "test_models.c"
#include "test_trainer.c"
#include "test_input.c"
#include "test_data.c"
#ifdef QLORA_CUDA
#include "test_gpu.c"
#endif
#include "test_templates.c"
#include "test_text.c"
#endif

// -------------------------------------------------------------------------------------- the table

typedef struct { const char *name, *proves; void (*run)(Test *t); } TestRow;

static const TestRow tests[] = {
#ifdef QLORA_REAL_DOUBLE
    GRADIENT_TESTS
#elif defined(QLORA_CUDA)
    GPU_TESTS
#else
    FORMAT_TESTS
    MODEL_TESTS
    TRAINER_TESTS
    INPUT_TESTS
    DATA_TESTS
    TEMPLATE_TESTS
    TEXT_TESTS
#endif
};

int main(int argc, char **argv) {
    size_t n = sizeof tests / sizeof *tests;
    int passed = 0, failed = 0, skipped = 0;
    signal(SIGPIPE, SIG_IGN);
    for (size_t i = 0; i < n; i++) {
        bool wanted = argc < 2;
        for (int k = 1; k < argc; k++) wanted |= strcmp(argv[k], tests[i].name) == 0;
        if (argc == 2 && strcmp(argv[1], "--list") == 0) {
            printf("%-28s %s\n", tests[i].name, tests[i].proves);
            continue;
        }
        if (!wanted) continue;
        Test t = {tests[i].name, 0, false};
        double start = now_seconds();
        tests[i].run(&t);
        const char *verdict = t.failures ? "FAILED" : t.skipped ? "skipped" : "ok";
        printf("%-8s %-28s %s (%.2f s)\n", verdict, t.name, tests[i].proves, now_seconds() - start);
        fflush(stdout);
        passed += !t.failures && !t.skipped;
        failed += t.failures > 0;
        skipped += t.skipped && !t.failures;
    }
    printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
    return failed ? 1 : 0;
}
