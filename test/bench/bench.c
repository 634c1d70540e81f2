// bench.c: what the engine reaches of what the machine has, both measured in this run.
//
//     build/bench [config.json]          default: the shape of Qwen2.5-0.5B
//
// Makes a random model of that shape (build/bench-model, kept between runs), opens it in NF4 with
// double quantisation, and prints prefill, forward + backward and decode speed as tokens/s and as
// shares of the multiply rate and memory bandwidth that this machine shows in the same minute. Each
// figure is the best of a few repetitions, with the machine's own peak measured between them: other
// programs may take cores and bandwidth at any time.
#include "../../qlora.c"


static const char default_config[] =
    "{\"architectures\": [\"Qwen2ForCausalLM\"], \"model_type\": \"qwen2\", \"vocab_size\": "
    "151936,\n"
    " \"hidden_size\": 896, \"intermediate_size\": 4864, \"num_hidden_layers\": 24,\n"
    " \"num_attention_heads\": 14, \"num_key_value_heads\": 2, \"hidden_act\": \"silu\",\n"
    " \"max_position_embeddings\": 32768, \"rms_norm_eps\": 1e-06, \"rope_theta\": 1000000.0,\n"
    " \"tie_word_embeddings\": true, \"torch_dtype\": \"bfloat16\"}\n";

// ---------------------------------------------------------------------------- the machine's limits

// Each task runs multiply-adds on registers alone: 24 independent sums, as many as hide the
// latency.
enum { PEAK_LOOPS = 4 << 20 };

#if defined(__AVX512BF16__)
static const double flops_per_loop = 24 * 64;                 // 24 x 32 products and sums
__attribute__((noinline)) static float peak_loop(void) {
    __m512 sum[24];
    __m512bh a = (__m512bh)_mm512_set1_epi32(0x3F803F80), b = a;      // bf16 ones
    for (int i = 0; i < 24; i++) sum[i] = _mm512_setzero_ps();
    for (int k = 0; k < PEAK_LOOPS; k++) {
#pragma GCC unroll 24
        for (int i = 0; i < 24; i++) sum[i] = _mm512_dpbf16_ps(sum[i], a, b);
    }
    for (int i = 1; i < 24; i++) sum[0] = _mm512_add_ps(sum[0], sum[i]);
    return _mm512_cvtss_f32(sum[0]);
}
#else
typedef float PeakVector __attribute__((vector_size(32)));
static const double flops_per_loop = 12 * 16;
__attribute__((noinline)) static float peak_loop(void) {
    PeakVector sum[12] = {{0}}, a = {0}, b = {0};
    for (int k = 0; k < PEAK_LOOPS; k++) {
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++) sum[i] += a * b;
        __asm__ volatile("" : "+x"(a));
    }
    for (int i = 1; i < 12; i++) sum[0] += sum[i];
    return sum[0][0];
}
#endif

typedef struct { const uint64_t *data; size_t words; float kept[MAX_THREADS]; } LimitTask;

static void peak_task(void *arguments, size_t task, int thread) {
    LimitTask *a = arguments;
    (void)thread;
    a->kept[task] = peak_loop();
}

static void read_task(void *arguments, size_t task, int thread) {
    LimitTask *a = arguments;
    const uint64_t *data = a->data + task * a->words;
    uint64_t sum[8] = {0};
    (void)thread;
    for (size_t i = 0; i + 8 <= a->words; i += 8)
        for (int k = 0; k < 8; k++) sum[k] += data[i + (size_t)k];
    a->kept[task] = (float)(sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7]);
}

typedef struct { double flops, bandwidth; } Limits;           // per second, all threads

static Limits measure_limits(Pool *pool, LimitTask *a) {
    size_t threads = (size_t)pool->threads;
    double start = now_seconds();
    parallel_for(pool, threads, peak_task, a);
    double middle = now_seconds();
    parallel_for(pool, threads, read_task, a);
    double end = now_seconds();
    return (Limits){(double)threads * PEAK_LOOPS * flops_per_loop / (middle - start),
                    (double)(threads * a->words) * 8 / (end - middle)};
}

// -------------------------------------------------------------------------------------- the engine

typedef struct {
    char name[64];
    double tokens_per_s, flops, bytes;
} Result; // flops, bytes: a second

typedef struct {
    qlora_model *q;
    Limits best;                            // over the whole run
    LimitTask limit;
    double linear_parameters, head_parameters;
    Result results[8];
    int n;
} Bench;

static Result *add_result(Bench *b, double tokens, double seconds, double flops, double bytes) {
    Result *r = &b->results[b->n++];
    *r = (Result){"", tokens / seconds, flops / seconds, bytes / seconds};
    return r;
}

// Shares are taken at the end, of the best that the machine showed in the whole run.
static void print_results(const Bench *b) {
    for (int i = 0; i < b->n; i++) {
        const Result *r = &b->results[i];
        printf("%-48s %9.1f tokens/s  ", r->name, r->tokens_per_s);
        if (r->flops > 0) printf("%5.1f %% of the multiply peak\n", 100 * r->flops / b->best.flops);
        else printf("%5.1f %% of the read bandwidth\n", 100 * r->bytes / b->best.bandwidth);
    }
}

static void count(Bench *b) {
    for (size_t i = 0; i < b->q->slots.n; i++) {
        const Slot *slot = &b->q->slots.slots[i];
        if (slot->kind == SLOT_LINEAR) b->linear_parameters += (double)(slot->rows * slot->columns);
    }
    b->head_parameters = (double)(b->q->transformer.config.V * b->q->transformer.config.D);
}

static void refresh_limits(Bench *b) {
    Limits now = measure_limits(b->q->device.pool, &b->limit);
    b->best.flops = fmax(b->best.flops, now.flops);
    b->best.bandwidth = fmax(b->best.bandwidth, now.bandwidth);
}

static void check_result(int bad, const qlora_error *err) {
    if (!bad) return;
    fprintf(stderr, "bench: %s\n", err->text);
    exit(1);
}

static int32_t *random_ids(Bench *b, size_t n) {
    int32_t *ids = calloc(n, sizeof *ids);
    for (size_t i = 0; ids && i < n; i++)
        ids[i] = (int32_t)(random_u32(7, 7, 7, i) % b->q->transformer.config.V);
    if (!ids) exit(1);
    return ids;
}

static void bench_prefill(Bench *b, size_t T, int repeats) {
    qlora_error err = {{0}};
    Session s;
    int32_t *ids = random_ids(b, T);
    double best = 1e9;
    check_result(open_inference(&s, b->q, T, 1, &err), &err);
    for (int i = 0; i < repeats; i++) {
        refresh_limits(b);
        s.past = 0;
        double start = now_seconds();
        session_forward(&s, ids, T);
        session_logits(&s, T - 1, 1);
        best = fmin(best, now_seconds() - start);
    }
    double flops = 2 * (b->linear_parameters * (double)T + b->head_parameters);
    snprintf(add_result(b, (double)T, best, flops, 0)->name, 64, "prefill, %zu tokens", T);
    session_close(&s);
    free(ids);
}

// One micro-batch of `sequences` x T tokens, every token supervised, LoRA r 16 on all linears.
static void bench_training(Bench *b, size_t T, size_t sequences, float dropout, int repeats) {
    qlora_error err = {{0}};
    Session s;
    size_t n = T * sequences, S = n - sequences;
    int32_t *ids = random_ids(b, n);
    Transformer *m = &b->q->transformer;
    check_result(new_adapter(m, "all-linear", 16, 32, dropout, 42, &err), &err);
    SessionShape shape = {.T = n, .S = S, .n_spans = sequences, .max_span = T, .training = true};
    check_result(session_open(&s, b->q, shape, &err), &err);
    for (size_t i = 0, k = 0; i < sequences; i++) {
        s.here.spans[i] = (Span){i * T, T, i * T, T, (uint32_t)i};
        s.here.row_spans[i] = (Span){i * (T - 1), T - 1, i * (T - 1), T - 1, (uint32_t)i};
        for (size_t t = 0; t < T; t++) {
            s.here.ids[i * T + t] = ids[i * T + t];
            s.here.position[i * T + t] = (int32_t)t;
            if (t == 0) continue;
            s.here.supervised[k] = (int32_t)(i * T + t - 1);
            s.here.target[k++] = ids[i * T + t];
        }
    }
    LabelledBatch batch = {{n, sequences, T, T, s.there.spans, s.there.position, 1, 1, true},
                           {S, sequences, T, T, s.there.row_spans, NULL, 1, 1, true},
                           s.there.ids, s.there.supervised, s.there.target};
    StepRecord record = {.clip = 1};
    double best = 1e9;
    for (int i = 0; i < repeats; i++) {
        refresh_limits(b);
        double start = now_seconds();
        loss_and_gradients(m, &s.w, &batch, NULL, 1 / (real)S, true);
        m->dev->ops->adamw(m->dev, m->parameters, m->gradients, m->moment1, m->moment2,
                           m->n_parameters, (real)1e-4, (real)0.9, (real)0.999, (real)1e-8, 0,
                           &record, 1);
        best = fmin(best, now_seconds() - start);
    }
    double flops = 4 * (b->linear_parameters + b->head_parameters) * (double)n;
    snprintf(add_result(b, (double)n, best, flops, 0)->name, 64,
             "forward+backward, %zu tokens, dropout %.2f", n, (double)dropout);
    session_close(&s);
    free(ids);
    remove_adapter(m);
}

static void bench_decode(Bench *b, size_t tokens, int repeats) {
    qlora_error err = {{0}};
    Session s;
    int32_t *ids = random_ids(b, tokens);
    double best = 1e9;
    check_result(open_inference(&s, b->q, tokens * (size_t)repeats + 1, 1, &err), &err);
    session_forward(&s, ids, 1);
    for (int i = 0; i < repeats; i++) {
        refresh_limits(b);
        double start = now_seconds();
        for (size_t t = 0; t < tokens; t++) {
            session_forward(&s, &ids[t], 1);
            session_logits(&s, 0, 1);
        }
        best = fmin(best, now_seconds() - start);
    }
    // Every weight is read once a token; of the embedding only when it is the head.
    double bytes = (double)b->q->weight_bytes;
    if (!b->q->transformer.config.tied) bytes -= 2 * b->head_parameters;
    snprintf(add_result(b, (double)tokens, best, 0, bytes * (double)tokens)->name, 64, "decode");
    session_close(&s);
    free(ids);
}

int main(int argc, char **argv) {
    qlora_error err = {{0}};
    Bench b = {0};
    const char *config = argc > 1 ? argv[1] : "build/bench-config.json",
               *model = "build/bench-model";
    qlora_options opt = qlora_default_options();
    if (argc > 1) model = "build/bench-model-custom";
    else check_result(write_file(config, default_config, sizeof default_config - 1, &err), &err);
    if (!file_exists(argc > 1 ? "build/bench-model-custom/config.json"
                              : "build/bench-model/config.json")) {
        char directory[] = "build/bench-shape";
        Region region = {.allocator = &(qlora_allocator){default_allocate, default_release, NULL}};
        Buffer text = {.allocator = region.allocator};
        check_result(make_directory(directory, &err) ||
                         read_whole_file(config, 1 << 20, &text, &err) ||
                         write_file("build/bench-shape/config.json", text.data, text.size, &err),
                     &err);
        buffer_free(&text);
        opt.quant = QLORA_QUANT_NONE;
        check_result(qlora_init("build/bench-shape", model, 1, &opt, &err), &err);
        opt.quant = QLORA_QUANT_NF4;
    }
    double start = now_seconds();
    b.q = qlora_open(model, &opt, &err);
    check_result(b.q == NULL, &err);
    double load = now_seconds() - start;
    count(&b);
    b.limit.words = ((size_t)256 << 20) / 8 / (size_t)b.q->device.pool->threads;
    uint64_t *data = malloc((size_t)256 << 20);
    if (!data) return 1;
    memset(data, 1, (size_t)256 << 20);
    b.limit.data = data;
    for (int i = 0; i < 3; i++) refresh_limits(&b);
    qlora_model_info info = qlora_info(b.q);
    printf("%s, %.0f M parameters, NF4, compute %s, %d threads\n", info.architecture,
           (double)info.parameters * 1e-6, info.compute == QLORA_COMPUTE_BF16 ? "bf16" : "f32",
           info.threads);
    printf("load and quantise: %.2f s, %.0f M weights/s\n", load,
           b.linear_parameters * 1e-6 / load);
    bench_prefill(&b, 512, 5);
    bench_training(&b, 512, 1, 0, 4);
    bench_training(&b, 512, 1, 0.05f, 3);
    bench_decode(&b, 24, 4);
    print_results(&b);
    printf("this machine: %.0f GFLOP/s (%s), %.1f GB/s read\n", b.best.flops * 1e-9,
           has_bf16_units() ? "vdpbf16ps" : "f32 multiply-add", b.best.bandwidth * 1e-9);
    free(data);
    qlora_close(b.q);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("peak memory: %.2f GB\n", (double)usage.ru_maxrss / 1048576);
    return 0;
}
