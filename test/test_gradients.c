// Every derivative of the plain ops and of whole models, against differences in float64.
//
// Where this file is included real is double. A derivative is compared with the four-point stencil
//     f'(x) = (8 (f(x + h) - f(x - h)) - (f(x + 2h) - f(x - 2h))) / 12 h
// whose own error is h^4/30 times the fifth derivative, plus the rounding of f (1e-16 of its size,
// a few times over) divided by h. Inputs are of size 1, so with h = 1e-3 both are near 1e-13: what
// is measured is 1e-11 or less of the largest gradient. The bounds, 1e-7 for an op and 1e-6 for a
// model, leave four orders for unlucky inputs, and a wrong formula is off by 1e-4 and more: the
// planted errors at the end, one part in a thousand and subtler ones, must all be seen.

enum { STENCIL_POINTS = 4 };
static const double stencil_step = 1e-3, op_bound = 1e-7, model_bound = 1e-6;

typedef double (*Loss)(void *user);

// d loss / d *x by the stencil; *x is left as it was.
static double stencil(Loss loss, void *user, real *x) {
    static const double offset[STENCIL_POINTS] = {1, -1, 2, -2};
    static const double factor[STENCIL_POINTS] = {8, -8, -1, 1};
    real keep = *x;
    double sum = 0;
    for (int i = 0; i < STENCIL_POINTS; i++) {
        *x = keep + offset[i] * stencil_step;
        sum += factor[i] * loss(user);
    }
    *x = keep;
    return sum / (12 * stencil_step);
}

// An op's surroundings: a device with exactly the scratch that is planned for it (allocated apart,
// so that ASan sees an op that takes more), memory for its tensors, and the worst error so far.
typedef struct {
    Device dev;
    Region region;
    Random random;
    double worst;
} Bench;

static void open_bench(Bench *b, const Ops *ops, OpSizes sizes, uint64_t seed) {
    qlora_error err = {{0}};
    *b = (Bench){.dev = {.ops = ops, .act = DT_REAL, .pool = pool_open(1, &heap, &err)},
                 .region.allocator = &heap, .random = {seed, 0}};
    sizes.threads = 1;
    plain_scratch(&b->dev, &sizes);
    b->dev.scratch = grab(b->dev.scratch_size, 1);
    b->dev.thread_scratch = grab(b->dev.thread_size, 1);
}

static double close_bench(Bench *b) {
    free(b->dev.scratch);
    free(b->dev.thread_scratch);
    pool_close(b->dev.pool);
    region_free(&b->region);
    return b->worst;
}

static void *bench_alloc(Bench *b, size_t n, size_t size) {
    qlora_error err = {{0}};
    void *p = region_alloc(&b->region, n, size, &err);
    if (!p) { printf("%s\n", err.text); exit(2); }
    return p;
}

static real *normals(Bench *b, size_t n) {
    real *x = bench_alloc(b, n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = normal(&b->random);
    return x;
}

static float *float_normals(Bench *b, size_t n) {
    float *x = bench_alloc(b, n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = (float)normal(&b->random);
    return x;
}

// An output: NaN everywhere, so that what an op leaves out or adds to shows.
static real *unwritten(Bench *b, size_t n) {
    real *x = bench_alloc(b, n, sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = NAN;
    return x;
}

static real *copied(Bench *b, const real *x, size_t n) {
    real *copy = bench_alloc(b, n, sizeof *copy);
    memcpy(copy, x, n * sizeof *copy);
    return copy;
}

static double dot(const real *a, const real *b, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Once NaN, the worst error stays NaN, which passes no bound.
static void note_error(double *worst, double error) {
    if (!isnan(*worst) && !(error <= *worst)) *worst = error;
}

// Compares gradient (n) minus what it started as (NULL: nothing) with differences of the loss in x.
static void compare(Bench *b, Loss loss, void *user, real *x, const real *gradient,
                    const real *started, size_t n) {
    real *numeric = grab(n, sizeof *numeric), *added = grab(n, sizeof *added);
    for (size_t i = 0; i < n; i++) {
        numeric[i] = stencil(loss, user, &x[i]);
        added[i] = gradient[i] - (started ? started[i] : 0);
    }
    note_error(&b->worst, max_err(added, numeric, n));
    free(numeric);
    free(added);
}

// The micro-batch of the op tests: sequences of 5, 1 and 6 tokens, their ordinals in no order.
enum { BATCH_T = 12 };
static const Span batch_spans[] = {{0, 5, 0, 5, 7}, {5, 1, 5, 1, 0}, {6, 6, 6, 6, 2}};
static const int32_t batch_position[BATCH_T] = {0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 99};
static const Batch training_batch = {BATCH_T, 3, 6, 6, batch_spans, batch_position,
                                     0x123456789ABCu, 3, true};

// ----------------------------------------------------------------------------------- residual norm

typedef struct {
    Bench *b;
    real *h, *a, *y, *sum;
    const real *dy, *dsum;
    const float *w;
    size_t T, D;
} NormRun;

// The loss reads the norm and the stream, as the rest of a model does.
static double norm_loss(void *user) {
    NormRun *r = user;
    r->b->dev.ops->residual_norm_forward(&r->b->dev, r->y, r->sum, r->h, r->a, r->w, r->T, r->D,
                                         1e-5f);
    return dot(r->dy, r->y, r->T * r->D) + dot(r->dsum, r->sum, r->T * r->D);
}

// dh starts as the gradient that reaches the stream from above and ends as that of h, and of a.
static double norm_error(const Ops *ops) {
    double worst = 0;
    for (size_t with_a = 0; with_a < 2; with_a++) {
        enum { T = 11, D = 10, N = T * D };       // 11 rows: a task of 8 and one of 3
        Bench b;
        open_bench(&b, ops, (OpSizes){.T = T, .D = D}, 1 + with_a);
        NormRun r = {&b, normals(&b, N), with_a ? normals(&b, N) : NULL, unwritten(&b, N),
                     unwritten(&b, N), normals(&b, N), normals(&b, N), float_normals(&b, D), T, D};
        real *dh = copied(&b, r.dsum, N), *da = unwritten(&b, N);
        norm_loss(&r);
        ops->residual_norm_backward(&b.dev, dh, with_a ? da : NULL, r.dy, r.sum, r.w, T, D, 1e-5f);
        compare(&b, norm_loss, &r, r.h, dh, NULL, N);
        if (with_a) compare(&b, norm_loss, &r, r.a, da, NULL, N);
        note_error(&worst, close_bench(&b));
    }
    return worst;
}

// ----------------------------------------------------------------------------------------- linears

// A frozen (N, K) matrix of normal values in the given type.
static Weight random_weight(Bench *b, DType type, bool nested, size_t N, size_t K) {
    Weight w = {.N = N, .K = K};
    Arena arena = {NULL, 0};
    size_t n = N * K;
    float *values = float_normals(b, n);
    place_weight(&w, type, nested, &arena);
    arena = (Arena){bench_alloc(b, arena.used, 1), 0};
    place_weight(&w, type, nested, &arena);
    uint16_t *half = (uint16_t *)(uintptr_t)w.data;
    if (is_4bit(type)) {
        float *absmax = bench_alloc(b, ceil_div(n, QUANT_BLOCK), sizeof *absmax);
        uint8_t *codes = (uint8_t *)(uintptr_t)w.data;
        quantize_values(&b->dev, codes, scales_of(&w, absmax), values, DT_F32,
                        type, n);
        finish_weight(&b->dev, &w, absmax);
    } else if (type == DT_F32) memcpy((float *)(uintptr_t)w.data, values, n * sizeof *values);
    // A random fraction with an exponent around 1 is a good enough float16.
    else for (size_t i = 0; i < n; i++)
        half[i] = type == DT_BF16 ? float_to_bf16(values[i])
                : (uint16_t)((pick(&b->random, 0, 1) << 15) | (pick(&b->random, 12, 15) << 10) |
                             pick(&b->random, 0, 1023));
    return w;
}

static Lora random_lora(Bench *b, size_t r, size_t N, size_t K, float dropout, uint32_t module) {
    if (!r) return (Lora){.module = module};
    return (Lora){r, 0.7, dropout, module, normals(b, r * K), normals(b, N * r), normals(b, r * K),
                  normals(b, N * r)};
}

typedef struct { DType type; bool nested, bias; size_t N, r; } ProductCase;
typedef struct { size_t n, K; float dropout; bool training; ProductCase products[3]; } LinearsCase;

// K = 70: rows begin inside 4-bit blocks, and dx has a strip of 64 columns and one of 6.
static const LinearsCase linears_cases[] = {
    {1, 70, 0, true, {{DT_F32, false, false, 9, 0}}},
    {1, 70, 0, true, {{DT_NF4, false, false, 9, 3}}},
    {1, 70, 0.4f, true, {{DT_NF4, true, true, 9, 3}}},
    {1, 5, 0.4f, false, {{DT_BF16, false, true, 3, 2}}},                  // dropout of no training
    {1, 5, 0, true, {{DT_FP4, true, false, 7, 9}}},                       // a rank above K and N
    {2, 70, 0.25f, true, {{DT_F16, false, true, 6, 2}, {DT_BF16, false, false, 6, 5}}},
    {2, 64, 0, true, {{DT_F32, false, true, 4, 0}, {DT_NF4, true, true, 8, 4}}},
    {3, 70, 0.5f, true, {{DT_NF4, false, true, 8, 4}, {DT_NF4, true, false, 4, 0},
                         {DT_BF16, false, true, 5, 1}}},
    {3, 6, 0, true, {{DT_F32, false, false, 1, 1}, {DT_F16, false, false, 2, 2},
                     {DT_BF16, false, false, 3, 3}}}};
enum { N_LINEARS_CASES = sizeof linears_cases / sizeof *linears_cases };

typedef struct {
    Bench *b;
    const Batch *batch;
    size_t n;
    real *x, *y[3], *dy[3];
    Linear linear[3];
    Product product[3];
} LinearsRun;

static double linears_loss(void *user) {
    LinearsRun *r = user;
    double loss = 0;
    r->b->dev.ops->linears_forward(&r->b->dev, r->product, r->n, r->x, r->batch);
    for (size_t i = 0; i < r->n; i++)
        loss += dot(r->dy[i], r->y[i], r->batch->T * r->linear[i].weight.N);
    return loss;
}

static void check_linears(const Ops *ops, const LinearsCase *c, uint64_t seed, double *worst) {
    Bench b;
    Batch batch = training_batch;
    size_t T = batch.T, widest = c->K;
    for (size_t i = 0; i < c->n; i++) widest = max_size(widest, c->products[i].N);
    open_bench(&b, ops, (OpSizes){.T = T, .D = widest, .max_r = 9}, seed);
    batch.training = c->training;
    LinearsRun r = {.b = &b, .batch = &batch, .n = c->n, .x = normals(&b, T * c->K)};
    Product backward[3];
    real *startA[3], *startB[3], *dx = unwritten(&b, T * c->K);
    for (size_t i = 0; i < c->n; i++) {
        const ProductCase *p = &c->products[i];
        Lora lora = random_lora(&b, p->r, p->N, c->K, c->dropout, (uint32_t)i + 4);
        r.linear[i] = (Linear){random_weight(&b, p->type, p->nested, p->N, c->K),
                               p->bias ? float_normals(&b, p->N) : NULL, lora};
        r.y[i] = unwritten(&b, T * p->N);
        r.dy[i] = normals(&b, T * p->N);
        r.product[i] = (Product){&r.linear[i], r.y[i], unwritten(&b, T * p->r)};
        backward[i] = (Product){&r.linear[i], r.dy[i], r.product[i].u};
        // dA and dB start as anything and are added to.
        startA[i] = p->r ? copied(&b, lora.dA, p->r * c->K) : NULL;
        startB[i] = p->r ? copied(&b, lora.dB, p->r * p->N) : NULL;
    }
    linears_loss(&r);
    ops->linears_backward(&b.dev, dx, backward, c->n, r.x, &batch);
    compare(&b, linears_loss, &r, r.x, dx, NULL, T * c->K);
    for (size_t i = 0; i < c->n; i++) {
        Lora *lora = &r.linear[i].lora;
        size_t nA = lora->r * c->K, nB = lora->r * c->products[i].N;
        if (!lora->r) continue;
        compare(&b, linears_loss, &r, lora->A, lora->dA, startA[i], nA);
        compare(&b, linears_loss, &r, lora->B, lora->dB, startB[i], nB);
        // Without dx the parameters' gradients are the same, to the bit.
        real *dA = copied(&b, lora->dA, nA), *dB = copied(&b, lora->dB, nB);
        memcpy(lora->dA, startA[i], nA * sizeof *dA);
        memcpy(lora->dB, startB[i], nB * sizeof *dB);
        linears_loss(&r);
        ops->linears_backward(&b.dev, NULL, &backward[i], 1, r.x, &batch);
        if (memcmp(dA, lora->dA, nA * sizeof *dA) || memcmp(dB, lora->dB, nB * sizeof *dB))
            note_error(&b.worst, NAN);
    }
    note_error(worst, close_bench(&b));
}

static double linears_error(const Ops *ops) {
    double worst = 0;
    for (size_t i = 0; i < N_LINEARS_CASES; i++)
        check_linears(ops, &linears_cases[i], 10 + i, &worst);
    return worst;
}

// -------------------------------------------------------------------------------------------- rope

typedef struct { Bench *b; real *x, *y; const real *dy; const float *frequency; size_t heads, hd; }
    RopeRun;

static double rope_loss(void *user) {
    RopeRun *r = user;
    size_t n = BATCH_T * r->heads * r->hd;
    memcpy(r->y, r->x, n * sizeof *r->y);
    r->b->dev.ops->rope(&r->b->dev, r->y, r->heads, r->hd, r->frequency, 1, &training_batch);
    return dot(r->dy, r->y, n);
}

static double rope_error(const Ops *ops) {
    static const size_t shapes[][2] = {{1, 2}, {2, 4}, {3, 6}, {1, 10}};
    double worst = 0;
    for (size_t i = 0; i < 4; i++) {
        size_t heads = shapes[i][0], hd = shapes[i][1], n = BATCH_T * heads * hd;
        Bench b;
        open_bench(&b, ops, (OpSizes){.T = BATCH_T, .D = heads * hd, .hd = hd}, 30 + i);
        float *frequency = bench_alloc(&b, hd / 2, sizeof *frequency);
        for (size_t k = 0; k < hd / 2; k++) frequency[k] = powf(0.1f, (float)k);
        RopeRun r = {&b, normals(&b, n), unwritten(&b, n), normals(&b, n), frequency, heads, hd};
        real *dx = copied(&b, r.dy, n);
        ops->rope(&b.dev, dx, heads, hd, frequency, -1, &training_batch);
        compare(&b, rope_loss, &r, r.x, dx, NULL, n);
        note_error(&worst, close_bench(&b));
    }
    return worst;
}

// --------------------------------------------------------------------------------------- attention

typedef struct { Bench *b; const Batch *batch; AttentionShape shape; real *q, *k, *v, *out, *lse;
                 const real *dout; } AttentionRun;

static double attention_loss(void *user) {
    AttentionRun *r = user;
    r->b->dev.ops->attention_forward(&r->b->dev, r->out, r->lse, r->q, r->k, r->v, r->shape,
                                     r->batch);
    return dot(r->dout, r->out, r->batch->T * r->shape.H * r->shape.hd);
}

// Several sequences, queries that share keys, windows; and queries behind keys that were there
// before (q0 != k0, nk > nq), for which the same formulas hold.
static double attention_error(const Ops *ops) {
    static const struct { size_t H, G, hd, window; } shapes[] = {
        {4, 2, 4, 0}, {4, 2, 6, 3}, {4, 1, 10, 0}, {4, 1, 4, 3}, {3, 3, 6, 0}, {3, 3, 10, 3},
        {1, 1, 4, 1}};
    static const Span behind[] = {{0, 3, 0, 7, 0}, {3, 2, 7, 2, 1}};
    Batch cached = {.T = 5, .n_spans = 2, .most_queries = 3, .most_keys = 7, .spans = behind};
    double worst = 0;
    for (size_t i = 0; i < 14; i++) {
        size_t H = shapes[i / 2].H, G = shapes[i / 2].G, hd = shapes[i / 2].hd;
        const Batch *batch = i % 2 ? &cached : &training_batch;
        size_t keys = i % 2 ? 9 : BATCH_T, nq = batch->T * H * hd, nk = keys * G * hd;
        Bench b;
        open_bench(&b, ops, (OpSizes){.T = BATCH_T, .D = H * hd, .H = H, .G = G, .hd = hd,
                                      .max_span = 7}, 40 + i);
        AttentionRun r = {&b, batch, {H, G, hd, shapes[i / 2].window, 1 / sqrt((double)hd)},
                          normals(&b, nq), normals(&b, nk), normals(&b, nk), unwritten(&b, nq),
                          unwritten(&b, batch->T * H), normals(&b, nq)};
        real *dq = unwritten(&b, nq), *dk = unwritten(&b, nk), *dv = unwritten(&b, nk);
        attention_loss(&r);
        ops->attention_backward(&b.dev, dq, dk, dv, r.dout, r.q, r.k, r.v, r.out, r.lse, r.shape,
                                batch);
        compare(&b, attention_loss, &r, r.q, dq, NULL, nq);
        compare(&b, attention_loss, &r, r.k, dk, NULL, nk);
        compare(&b, attention_loss, &r, r.v, dv, NULL, nk);
        note_error(&worst, close_bench(&b));
    }
    return worst;
}

// ------------------------------------------------------------------------------------------ swiglu

typedef struct { Bench *b; real *gate, *up, *y; const real *dy; size_t T, F; } SwigluRun;

static double swiglu_loss(void *user) {
    SwigluRun *r = user;
    r->b->dev.ops->swiglu_forward(&r->b->dev, r->y, r->gate, r->up, r->T, r->F);
    return dot(r->dy, r->y, r->T * r->F);
}

static double swiglu_error(const Ops *ops) {
    double worst = 0;
    for (size_t in_place = 0; in_place < 2; in_place++) {
        enum { T = 5, F = 13, N = T * F };
        Bench b;
        open_bench(&b, ops, (OpSizes){.T = T, .F = F}, 60 + in_place);
        SwigluRun r = {&b, normals(&b, N), normals(&b, N), unwritten(&b, N), normals(&b, N), T, F};
        for (size_t i = 0; i < N; i++) r.gate[i] *= 3;        // the sigmoid's tails too
        real *gate = copied(&b, r.gate, N), *up = copied(&b, r.up, N);
        real *dgate = in_place ? gate : unwritten(&b, N), *dup = in_place ? up : unwritten(&b, N);
        ops->swiglu_backward(&b.dev, dgate, dup, r.dy, gate, up, T, F);
        compare(&b, swiglu_loss, &r, r.gate, dgate, NULL, N);
        compare(&b, swiglu_loss, &r, r.up, dup, NULL, N);
        note_error(&worst, close_bench(&b));
    }
    return worst;
}

// ------------------------------------------------------------------------------ gather and scatter

typedef struct { Bench *b; real *x, *y; const real *dy; const int32_t *index; size_t n, T, D; }
    GatherRun;

static double gather_loss(void *user) {
    GatherRun *r = user;
    r->b->dev.ops->gather(&r->b->dev, r->y, r->x, r->index, r->n, r->D);
    return dot(r->dy, r->y, r->n * r->D);
}

static double gather_error(const Ops *ops) {
    enum { T = 7, D = 5, N = 4 };
    static const int32_t index[N] = {0, 2, 3, 6};
    Bench b;
    open_bench(&b, ops, (OpSizes){.T = T, .D = D}, 70);
    GatherRun r = {&b, normals(&b, T * D), unwritten(&b, N * D), normals(&b, N * D), index, N, T,
                   D};
    real *dx = unwritten(&b, T * D);
    ops->scatter(&b.dev, dx, r.dy, index, N, T, D);
    compare(&b, gather_loss, &r, r.x, dx, NULL, T * D);
    return close_bench(&b);
}

// ----------------------------------------------------------------------------- head, cross-entropy

typedef struct {
    Transformer *m;
    Workspace *w;
    const Batch *rows;
    const int32_t *target;
} HeadRun;

static const double head_scale = 0.37;

static double head_run(HeadRun *r, bool gradient) {
    double loss = 0;
    head_loss(r->m, r->w, &loss, r->target, head_scale, gradient, r->rows);
    return head_scale * loss;
}

static double head_run_loss(void *user) { return head_run(user, false); }

// head_loss as it is: the vocabulary of 23 in one piece, in 8 + 8 + 7 and in 22 + 1, with targets
// at both ends of each; LoRA on the head with dropout, or none.
static double head_error(const Ops *ops) {
    enum { V = 23, D = 6, S = 7 };
    static const struct { size_t chunk, r; DType type; float dropout; } cases[] = {
        {V, 0, DT_F32, 0}, {V, 3, DT_BF16, 0.3f}, {8, 0, DT_F16, 0}, {8, 3, DT_F32, 0.3f},
        {8, 2, DT_BF16, 0}, {22, 2, DT_F32, 0.5f}};
    static const int32_t target[S] = {0, 22, 7, 8, 16, 15, 22};
    static const Span spans[] = {{0, 3, 0, 3, 1}, {3, 0, 3, 0, 2}, {3, 4, 3, 4, 0}};
    const Batch rows = {S, 3, 4, 4, spans, NULL, 99, 5, true};
    double worst = 0, whole = 0;
    for (size_t i = 0; i < 6; i++) {
        size_t r = cases[i].r;
        Bench b;
        open_bench(&b, ops, (OpSizes){.S = S, .D = D, .V_chunk = cases[i].chunk, .max_r = 3}, 80);
        Lora lora = random_lora(&b, r, V, D, cases[i].dropout, 15);
        Transformer m = {.config = {.V = V, .D = D}, .dev = &b.dev,
                         .head = {random_weight(&b, cases[i].type, false, V, D), NULL, lora}};
        Workspace w = {.chunk = cases[i].chunk, .xs = normals(&b, S * D),
                       .dxs_sum = unwritten(&b, S * D), .logits = unwritten(&b, S * cases[i].chunk),
                       .dlogits = unwritten(&b, S * cases[i].chunk), .head_u = unwritten(&b, S * r),
                       .max = unwritten(&b, S), .sum = unwritten(&b, S),
                       .chosen = unwritten(&b, S), .nll = unwritten(&b, S),
                       .hit = bench_alloc(&b, S, 1)};
        real *startA = r ? copied(&b, lora.dA, r * D) : NULL;
        real *startB = r ? copied(&b, lora.dB, V * r) : NULL;
        HeadRun run = {&m, &w, &rows, target};
        double loss = head_run(&run, true);
        real *dx = copied(&b, w.dxs_sum, S * D), *dA = r ? copied(&b, lora.dA, r * D) : NULL;
        real *dB = r ? copied(&b, lora.dB, V * r) : NULL;
        compare(&b, head_run_loss, &run, w.xs, dx, NULL, S * D);
        if (r) {
            compare(&b, head_run_loss, &run, lora.A, dA, startA, r * D);
            compare(&b, head_run_loss, &run, lora.B, dB, startB, V * r);
        }
        // The loss itself does not depend on the pieces: once more in one.
        w.chunk = V;
        w.logits = unwritten(&b, S * V);
        whole = head_run(&run, false);
        note_error(&b.worst, fabs(whole - loss) / whole * 1e5);       // 1e-12 of the loss
        note_error(&worst, close_bench(&b));
    }
    return worst;
}

// -------------------------------------------------------------------------------- tests of the ops

static void check_family(Test *t, const char *family, double error) {
    check(t, error <= op_bound, "%s: a gradient is off by %.2e of the largest", family, error);
    printf("    %-10s %.1e\n", family, error);
}

static void test_norm_gradient(Test *t) { check_family(t, "norm", norm_error(&plain_ops)); }
static void test_linears_gradient(Test *t) {
    check_family(t, "linears", linears_error(&plain_ops));
}
static void test_rope_gradient(Test *t) { check_family(t, "rope", rope_error(&plain_ops)); }
static void test_attention_gradient(Test *t) {
    check_family(t, "attention", attention_error(&plain_ops));
}
static void test_swiglu_gradient(Test *t) { check_family(t, "swiglu", swiglu_error(&plain_ops)); }
static void test_gather_gradient(Test *t) { check_family(t, "gather", gather_error(&plain_ops)); }
static void test_head_gradient(Test *t) { check_family(t, "head", head_error(&plain_ops)); }

// ------------------------------------------------------------------------------------ whole models

typedef struct {
    qlora_model *q;
    Session session;
    TestBatch batch;
} ModelRun;

static void set_gradients(qlora_model *q, real value) {
    for (size_t i = 0; i < q->transformer.n_parameters; i++) q->transformer.gradients[i] = value;
}

static double run_model(ModelRun *r, bool gradient) {
    size_t S = max_size(r->batch.S, 1);
    return batch_loss(&r->q->transformer, &r->session.w, &r->batch.batch, 1 / (real)S, gradient) /
           (double)S;
}

static double model_loss(void *user) { return run_model(user, false); }

// Sequences of ids that exceed Mistral's window of 8; about every third label is masked.
static void add_random_sequence(TestBatch *b, Random *r, size_t n, size_t V, uint32_t ordinal) {
    int32_t ids[64], labels[64];
    for (size_t i = 0; i < n; i++) {
        ids[i] = (int32_t)pick(r, 0, V - 1);
        labels[i] = pick(r, 0, 2) ? ids[i] : -100;
    }
    add_sequence(b, ids, labels, n, ordinal);
}

// A fixture model, quantised, with an adapter on `targets` (NULL: the fixture's own) whose
// parameters are all trainable and, unlike a fresh adapter's B, not zero.
static bool open_run(Test *t, ModelRun *r, const char *name, const char *targets, int double_quant,
                     float dropout) {
    char directory[128], adapter[160];
    qlora_error err = {{0}};
    Random random = {7, 0};
    qlora_options opt = {.quant = QLORA_QUANT_NF4, .double_quant = double_quant, .threads = 1,
                         .compute = QLORA_COMPUTE_F32};
    snprintf(directory, sizeof directory, "test/fixtures/models/%s", name);
    snprintf(adapter, sizeof adapter, "%s/adapter", directory);
    *r = (ModelRun){.q = qlora_open(directory, &opt, &err)};
    if (!check(t, r->q != NULL, "%s", err.text)) return false;
    Transformer *m = &r->q->transformer;
    r->q->device.ops = &plain_ops;
    if (targets) {
        if (!check(t, !new_adapter(m, targets, 3, 6, dropout, 42, &err), "%s", err.text))
            return false;
        for (size_t i = 0; i < n_modules(m); i++) {
            const Linear *linear = module_linear(m, i);
            for (size_t k = 0; k < linear->lora.r * linear->weight.N; k++)
                linear->lora.B[k] = 0.1 * normal(&random);
        }
    } else {
        if (!check(t, !qlora_load_adapter(r->q, adapter, &err), "%s", err.text)) return false;
        size_t n = m->n_parameters;
        real *values = grab(n, sizeof *values);
        memcpy(values, m->parameters, n * sizeof *values);
        check(t, !allocate_parameters(m, true, &err), "%s", err.text);
        memcpy(m->parameters, values, n * sizeof *values);
        free(values);
        for (size_t i = 0; i < n_modules(m); i++) module_linear(m, i)->lora.dropout = dropout;
    }
    return true;
}

// Room for the batch. `chunk`: columns of the vocabulary at a time.
static bool start_run(Test *t, ModelRun *r, size_t chunk) {
    qlora_error err = {{0}};
    SessionShape shape = {.T = r->batch.T, .S = r->batch.S, .n_spans = r->batch.n, .max_span = 64,
                          .training = true};
    if (!check(t, !session_open(&r->session, r->q, shape, &err), "%s", err.text)) return false;
    r->session.w.chunk = min_size(r->session.w.chunk, chunk);
    return true;
}

static void end_run(ModelRun *r) {
    session_close(&r->session);
    r->session.q = NULL;
}

static void close_run(ModelRun *r) {
    if (r->session.q) end_run(r);
    free_batch(&r->batch);
    qlora_close(r->q);
}

// `each` random elements of every adapter tensor; returns the largest error, relative to the
// largest gradient of its tensor.
static double model_error(ModelRun *r, size_t each, const Ops *ops) {
    Transformer *m = &r->q->transformer;
    Random random = {11, 0};
    double worst = 0;
    r->q->device.ops = ops;
    set_gradients(r->q, 0);
    run_model(r, true);
    for (size_t i = 0; i < n_modules(m); i++) {
        const Linear *linear = module_linear(m, i);
        for (int part = 0; part < 2 && linear->lora.r; part++) {
            size_t n = linear->lora.r * (part ? linear->weight.N : linear->weight.K);
            real *values = part ? linear->lora.B : linear->lora.A;
            const real *gradient = part ? linear->lora.dB : linear->lora.dA;
            double scale = 0;
            for (size_t k = 0; k < n; k++) scale = fmax(scale, fabs(gradient[k]));
            if (!(scale > 0)) return NAN;                     // all of them learn something
            for (size_t k = 0; k < each; k++) {
                size_t at = pick(&random, 0, n - 1);
                double error = fabs(stencil(model_loss, r, &values[at]) - gradient[at]);
                note_error(&worst, error / scale);
            }
        }
    }
    r->q->device.ops = &plain_ops;
    return worst;
}

// 28 tensors of two layers, 11 elements of each; dropout, masked labels, several sequences, the
// vocabulary in pieces, and in the second model the layers recomputed.
static void test_model_gradients(Test *t) {
    static const char *const names[] = {"llama", "qwen2", "mistral"};
    for (int i = 0; i < 3; i++) {
        Random random = {5, 0};
        ModelRun r;
        if (!open_run(t, &r, names[i], NULL, i == 1, i ? 0.2f : 0)) return;
        add_random_sequence(&r.batch, &random, 3, r.q->transformer.config.V, 3);
        add_random_sequence(&r.batch, &random, 10, r.q->transformer.config.V, 1);
        if (!start_run(t, &r, 200)) return;
        double error = model_error(&r, 11, &plain_ops);
        check(t, error <= model_bound, "%s: a gradient is off by %.2e", names[i], error);
        printf("    %-8s %.1e\n", names[i], error);
        close_run(&r);
    }
}

// Bit for bit: a sequence whose labels are all -100 adds nothing, nor do tokens behind the last
// supervised one, and a batch without any label has gradients that are exactly zero.
static void test_masked_tokens(Test *t) {
    static const int32_t ids[] = {5, 17, 301, 44, 9, 120, 77, 31};
    static const int32_t labels[] = {-100, -100, 301, 44, -100, 120, -100, -100};
    static const int32_t none[] = {-100, -100, -100, -100, -100, -100, -100, -100};
    static const struct { size_t tail, before, after; } cases[] = {{6, 0, 0}, {8, 0, 0}, {6, 1, 1},
                                                                   {8, 2, 1}};
    real *expected = NULL;
    double expected_loss = 0;
    ModelRun r;
    if (!open_run(t, &r, "mistral", NULL, 1, 0.2f)) return;
    size_t bytes = r.q->transformer.n_parameters * sizeof(real);
    for (int i = 0; i < 4; i++) {
        for (size_t k = 0; k < cases[i].before; k++) add_sequence(&r.batch, ids + k, none, 5, 9);
        add_sequence(&r.batch, ids, labels, cases[i].tail, 4);
        for (size_t k = 0; k < cases[i].after; k++) add_sequence(&r.batch, ids, none, 8, 2);
        if (!start_run(t, &r, 200)) return;
        set_gradients(r.q, 0);
        double loss = run_model(&r, true);
        if (!expected) {
            expected = grab(1, bytes);
            expected_loss = loss;
            memcpy(expected, r.q->transformer.gradients, bytes);
            check(t, sum_of_squares(&r.q->device, expected, bytes / sizeof(real)) > 0,
                  "the expected gradients are zero");
        }
        // Compared as numbers, since 0 + -0 is 0: no difference at all is allowed.
        check(t, loss == expected_loss && l2_err(r.q->transformer.gradients, expected,
              bytes / sizeof(real)) == 0, "case %d: masked tokens change loss or gradients", i);
        end_run(&r);
        free_batch(&r.batch);
    }
    add_sequence(&r.batch, ids, none, 8, 0);
    if (!start_run(t, &r, 200)) return;
    set_gradients(r.q, 0);
    check(t, run_model(&r, true) == 0, "a batch without labels has a loss");
    check(t, sum_of_squares(&r.q->device, r.q->transformer.gradients,
                                      bytes / sizeof(real)) == 0, "a batch without labels teaches");
    close_run(&r);
    free(expected);
}

// What backward called, counted by ops that pass on to the plain ones.
static struct { int linears, without_dx, attention, norms, head; } calls;

static void counting_linears(Device *dev, void *dx, const Product *products, size_t n,
                             const void *x, const Batch *batch) {
    calls.linears++;
    calls.without_dx += dx == NULL;
    plain_ops.linears_backward(dev, dx, products, n, x, batch);
}

static void counting_attention(Device *dev, void *dq, void *dk, void *dv, const void *dout,
                               const void *q, const void *k, const void *v, const void *out,
                               const real *lse, AttentionShape shape, const Batch *batch) {
    calls.attention++;
    plain_ops.attention_backward(dev, dq, dk, dv, dout, q, k, v, out, lse, shape, batch);
}

static void counting_norm(Device *dev, real *dh, void *da, const void *dy, const void *sum,
                          const float *w, size_t T, size_t D, float eps) {
    calls.norms++;
    plain_ops.residual_norm_backward(dev, dh, da, dy, sum, w, T, D, eps);
}

static void counting_head(Device *dev, real *dx, const Product *slice, const void *x,
                          const Batch *rows) {
    calls.head++;
    plain_ops.head_backward(dev, dx, slice, x, rows);
}

// An adapter on one linear only: the same gradients, to the bit, as in a full adapter whose other B
// are zero, and backward goes no further down than to it.
static void check_early_stop(Test *t, const char *targets, int linears, int attention, int norms) {
    Random random = {13, 0};
    ModelRun full, one;
    Ops counting = plain_ops;
    counting.linears_backward = counting_linears;
    counting.attention_backward = counting_attention;
    counting.residual_norm_backward = counting_norm;
    counting.head_backward = counting_head;
    if (!open_run(t, &full, "llama",
                  "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head",
                  1, 0.2f)) return;
    if (!open_run(t, &one, "llama", targets, 1, 0.2f)) return;
    size_t found = n_modules(&one.q->transformer);
    for (size_t i = 0; i < n_modules(&one.q->transformer); i++) {
        Linear *to = module_linear(&one.q->transformer, i);
        Linear *from = module_linear(&full.q->transformer, i);
        size_t nA = to->lora.r * to->weight.K, nB = to->lora.r * to->weight.N;
        if (!to->lora.r) {
            memset(from->lora.B, 0, from->lora.r * from->weight.N * sizeof(real));
            continue;
        }
        found = i;
        memcpy(to->lora.A, from->lora.A, nA * sizeof(real));
        memcpy(to->lora.B, from->lora.B, nB * sizeof(real));
    }
    for (int i = 0; i < 2; i++) {
        ModelRun *r = i ? &one : &full;
        random.count = 0;
        add_random_sequence(&r->batch, &random, 11, r->q->transformer.config.V, 6);
        add_random_sequence(&r->batch, &random, 3, r->q->transformer.config.V, 2);
        if (!start_run(t, r, 1000)) return;
        set_gradients(r->q, 0);
        memset(&calls, 0, sizeof calls);
        r->q->device.ops = &counting;
        run_model(r, true);
        r->q->device.ops = &plain_ops;
    }
    check(t, calls.linears == linears && calls.without_dx == (linears ? 1 : 0) &&
          calls.attention == attention && calls.norms == norms && calls.head == 1,
          "%s: backward ran %d linears (%d without dx), %d attentions, %d norms, %d heads; "
          "expected %d, %d, %d, 1", targets, calls.linears, calls.without_dx, calls.attention,
          calls.norms, calls.head, linears, attention, norms);
    const Linear *a = module_linear(&full.q->transformer, found);
    const Linear *b = module_linear(&one.q->transformer, found);
    size_t nA = b->lora.r * b->weight.K, nB = b->lora.r * b->weight.N;
    check(t, b->lora.r && dot(b->lora.dA, b->lora.dA, nA) > 0 &&
          dot(b->lora.dB, b->lora.dB, nB) > 0,
          "%s: no gradient at all", targets);
    check(t, l2_err(b->lora.dA, a->lora.dA, nA) == 0 && l2_err(b->lora.dB, a->lora.dB, nB) == 0,
          "%s: alone dA differs by %.2e, dB by %.2e", targets, l2_err(b->lora.dA, a->lora.dA, nA),
          l2_err(b->lora.dB, a->lora.dB, nB));
    close_run(&full);
    close_run(&one);
}

static void test_early_stop(Test *t) {
    // The final norm is always there; then two a layer.
    check_early_stop(t, "model.layers.1.mlp.down_proj", 1, 0, 1);
    check_early_stop(t, "model.layers.1.mlp.up_proj", 2, 0, 1);
    check_early_stop(t, "model.layers.1.self_attn.o_proj", 3, 0, 2);
    check_early_stop(t, "model.layers.1.self_attn.v_proj", 4, 1, 2);
    check_early_stop(t, "model.layers.0.mlp.gate_proj", 6, 1, 3);
    check_early_stop(t, "model.layers.0.self_attn.q_proj", 8, 2, 4);
}

// Adapters on one place only, against differences: v_proj of layer 1, and the head, whose loss
// needs nothing of the layers' backward. Qwen2's head is its embedding.
static void test_partial_adapters(Test *t) {
    static const struct { const char *model, *targets; } cases[] = {
        {"llama", "model.layers.1.self_attn.v_proj"}, {"llama", "lm_head"}, {"qwen2", "lm_head"},
        {"mistral", "k_proj,lm_head"}};
    for (int i = 0; i < 4; i++) {
        Random random = {17, 0};
        ModelRun r;
        if (!open_run(t, &r, cases[i].model, cases[i].targets, 0, 0.1f)) return;
        add_random_sequence(&r.batch, &random, 10, r.q->transformer.config.V, 1);
        if (!start_run(t, &r, 130)) return;
        double error = model_error(&r, 12, &plain_ops);
        check(t, error <= model_bound, "%s, %s: a gradient is off by %.2e", cases[i].model,
              cases[i].targets, error);
        close_run(&r);
    }
}

// ---------------------------------------------------------------------------------- planted errors
//
// Ops with a wrong derivative, each a mistake that is easily made. The comparisons above must see
// it.

static void scale_values(real *x, size_t n, double factor) {
    for (size_t i = 0; i < n; i++) x[i] *= factor;
}

static void norm_forgets_stream(Device *dev, real *dh, void *da, const void *dy, const void *sum,
                                const float *w, size_t T, size_t D, float eps) {
    memset(dh, 0, T * D * sizeof *dh);
    plain_ops.residual_norm_backward(dev, dh, da, dy, sum, w, T, D, eps);
}

static void norm_forgets_root(Device *dev, real *dh, void *da, const void *dy, const void *sum,
                              const float *w, size_t T, size_t D, float eps) {
    (void)dev;
    for (size_t t = 0; t < T; t++) {
        real n = inverse_rms((const real *)sum + t * D, D, eps);
        for (size_t i = 0; i < D; i++)
            dh[t * D + i] += n * (real)w[i] * ((const real *)dy)[t * D + i];
    }
    if (da) memcpy(da, dh, T * D * sizeof *dh);
}

static void norm_scales_da(Device *dev, real *dh, void *da, const void *dy, const void *sum,
                           const float *w, size_t T, size_t D, float eps) {
    plain_ops.residual_norm_backward(dev, dh, da, dy, sum, w, T, D, eps);
    if (da) scale_values(da, T * D, 1.001);
}

static void linears_forget_masks(Device *dev, void *dx, const Product *products, size_t n,
                                 const void *x, const Batch *batch) {
    Batch other = *batch;
    other.training = false;
    plain_ops.linears_backward(dev, dx, products, n, x, &other);
}

static void linears_mask_another_step(Device *dev, void *dx, const Product *products, size_t n,
                                      const void *x, const Batch *batch) {
    Batch other = *batch;
    other.step++;
    plain_ops.linears_backward(dev, dx, products, n, x, &other);
}

static void linears_scale_dx(Device *dev, void *dx, const Product *products, size_t n,
                             const void *x, const Batch *batch) {
    plain_ops.linears_backward(dev, dx, products, n, x, batch);
    if (dx) scale_values(dx, batch->T * products[0].linear->weight.K, 1.001);
}

static void linears_overwrite_da(Device *dev, void *dx, const Product *products, size_t n,
                                 const void *x, const Batch *batch) {
    for (size_t i = 0; i < n; i++) {
        const Linear *linear = products[i].linear;
        size_t n_da = linear->lora.r * linear->weight.K;
        if (n_da) memset(linear->lora.dA, 0, n_da * sizeof(real));
    }
    plain_ops.linears_backward(dev, dx, products, n, x, batch);
}

static void linears_scale_db(Device *dev, void *dx, const Product *products, size_t n,
                             const void *x, const Batch *batch) {
    plain_ops.linears_backward(dev, dx, products, n, x, batch);
    for (size_t i = 0; i < n; i++) {
        const Linear *linear = products[i].linear;
        scale_values(linear->lora.dB, linear->lora.r * linear->weight.N, 1.001);
    }
}

static void linears_forget_a_product(Device *dev, void *dx, const Product *products, size_t n,
                                     const void *x, const Batch *batch) {
    plain_ops.linears_backward(dev, dx, products, n, x, batch);
    if (n > 1) plain_ops.linears_backward(dev, dx, products, n - 1, x, batch);
}

static void rope_forgets_sign(Device *dev, void *x, size_t heads, size_t hd, const float *frequency,
                              int sign, const Batch *batch) {
    (void)sign;
    plain_ops.rope(dev, x, heads, hd, frequency, 1, batch);
}

static double attention_factors[3];                           // of dq, dk, dv

static void attention_scales(Device *dev, void *dq, void *dk, void *dv, const void *dout,
                             const void *q, const void *k, const void *v, const void *out,
                             const real *lse, AttentionShape shape, const Batch *batch) {
    const Span *last = &batch->spans[batch->n_spans - 1];
    size_t keys = (last->k0 + last->nk) * shape.G * shape.hd;
    plain_ops.attention_backward(dev, dq, dk, dv, dout, q, k, v, out, lse, shape, batch);
    scale_values(dq, batch->T * shape.H * shape.hd, attention_factors[0]);
    scale_values(dk, keys, attention_factors[1]);
    scale_values(dv, keys, attention_factors[2]);
}

static void attention_forgets_window(Device *dev, void *dq, void *dk, void *dv, const void *dout,
                                     const void *q, const void *k, const void *v, const void *out,
                                     const real *lse, AttentionShape shape, const Batch *batch) {
    shape.window = 0;
    plain_ops.attention_backward(dev, dq, dk, dv, dout, q, k, v, out, lse, shape, batch);
}

static void swiglu_scales_dgate(Device *dev, void *dgate, void *dup, const void *dy,
                                const void *gate, const void *up, size_t T, size_t F) {
    plain_ops.swiglu_backward(dev, dgate, dup, dy, gate, up, T, F);
    scale_values(dgate, T * F, 1.001);
}

// Right unless dgate is gate: then dup is computed from what dgate has become.
static void swiglu_in_place(Device *dev, void *dgate, void *dup, const void *dy, const void *gate,
                            const void *up, size_t T, size_t F) {
    if (dgate != gate) { plain_ops.swiglu_backward(dev, dgate, dup, dy, gate, up, T, F); return; }
    real *spare = grab(T * F, sizeof *spare);
    plain_ops.swiglu_backward(dev, dgate, spare, dy, gate, up, T, F);
    plain_ops.swiglu_backward(dev, spare, dup, dy, gate, up, T, F);
    free(spare);
}

static void scatter_adds(Device *dev, real *dh, const real *dout, const int32_t *index, size_t n,
                         size_t T, size_t D) {
    (void)dev;
    (void)T;
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < D; k++) dh[(size_t)index[i] * D + k] = dout[i * D + k];
}

static void head_overwrites_dx(Device *dev, real *dx, const Product *slice, const void *x,
                               const Batch *rows) {
    memset(dx, 0, rows->T * slice->linear->weight.K * sizeof *dx);
    plain_ops.head_backward(dev, dx, slice, x, rows);
}

static void entropy_forgets_sum(Device *dev, real *max, real *sum, real *chosen, const real *logits,
                                const int32_t *target, size_t first, size_t C, size_t S) {
    real *before = grab(2 * S, sizeof *before);
    memcpy(before, max, S * sizeof *before);
    memcpy(before + S, sum, S * sizeof *before);
    plain_ops.cross_entropy_forward(dev, max, sum, chosen, logits, target, first, C, S);
    // As if the maximum had not grown: the old sum is not brought to the new one.
    for (size_t s = 0; s < S && first; s++)
        sum[s] += before[S + s] * (1 - exp_real(before[s] - max[s]));
    free(before);
}

static void entropy_forgets_first(Device *dev, void *dlogits, const real *logits, const real *max,
                                  const real *sum, const int32_t *target, real scale, size_t first,
                                  size_t C, size_t S) {
    (void)first;
    plain_ops.cross_entropy_backward(dev, dlogits, logits, max, sum, target, scale, 0, C, S);
}

static void entropy_scales(Device *dev, void *dlogits, const real *logits, const real *max,
                           const real *sum, const int32_t *target, real scale, size_t first,
                           size_t C, size_t S) {
    plain_ops.cross_entropy_backward(dev, dlogits, logits, max, sum, target, scale * 1.001, first,
                                     C, S);
}

static void expect_seen(Test *t, const char *mistake, double error) {
    check(t, !(error <= 100 * op_bound), "a planted mistake passes: %s, off by only %.2e", mistake,
          error);
}

#define PLANT(op, wrong, family)                                                                   \
    do {                                                                                           \
        Ops ops = plain_ops;                                                                       \
        ops.op = wrong;                                                                            \
        expect_seen(t, #wrong, family(&ops));                                                      \
    } while (0)

static void test_planted(Test *t) {
    PLANT(residual_norm_backward, norm_forgets_stream, norm_error);
    PLANT(residual_norm_backward, norm_forgets_root, norm_error);
    PLANT(residual_norm_backward, norm_scales_da, norm_error);
    PLANT(linears_backward, linears_forget_masks, linears_error);
    PLANT(linears_backward, linears_mask_another_step, linears_error);
    PLANT(linears_backward, linears_scale_dx, linears_error);
    PLANT(linears_backward, linears_overwrite_da, linears_error);
    PLANT(linears_backward, linears_scale_db, linears_error);
    PLANT(linears_backward, linears_forget_a_product, linears_error);
    PLANT(rope, rope_forgets_sign, rope_error);
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < 3; k++) attention_factors[k] = k == i ? 1.001 : 1;
        PLANT(attention_backward, attention_scales, attention_error);
    }
    PLANT(attention_backward, attention_forgets_window, attention_error);
    PLANT(swiglu_backward, swiglu_scales_dgate, swiglu_error);
    PLANT(swiglu_backward, swiglu_in_place, swiglu_error);
    PLANT(scatter, scatter_adds, gather_error);
    PLANT(head_backward, head_overwrites_dx, head_error);
    PLANT(cross_entropy_forward, entropy_forgets_sum, head_error);
    PLANT(cross_entropy_backward, entropy_forgets_first, head_error);
    PLANT(cross_entropy_backward, entropy_scales, head_error);
}

// The same for the comparison of whole models.
static void test_planted_model(Test *t) {
    Random random = {19, 0};
    ModelRun r;
    if (!open_run(t, &r, "llama", "q_proj,down_proj,lm_head", 1, 0.2f)) return;
    add_random_sequence(&r.batch, &random, 8, r.q->transformer.config.V, 3);
    if (!start_run(t, &r, 200)) return;
    for (int i = 0; i < 8; i++) {
        static const char *const names[] = {"norm_scales_da", "linears_scale_dx",
            "linears_scale_db", "linears_mask_another_step", "rope_forgets_sign",
            "swiglu_scales_dgate", "head_overwrites_dx", "entropy_scales"};
        Ops ops = plain_ops;
        if (i == 0) ops.residual_norm_backward = norm_scales_da;
        if (i == 1) ops.linears_backward = linears_scale_dx;
        if (i == 2) ops.linears_backward = linears_scale_db;
        if (i == 3) ops.linears_backward = linears_mask_another_step;
        if (i == 4) ops.rope = rope_forgets_sign;
        if (i == 5) ops.swiglu_backward = swiglu_scales_dgate;
        if (i == 6) ops.head_backward = head_overwrites_dx;
        if (i == 7) ops.cross_entropy_backward = entropy_scales;
        double error = model_error(&r, 2, &ops);
        check(t, !(error <= 10 * model_bound), "a planted mistake passes: %s, off by only %.2e",
              names[i], error);
    }
    double right = model_error(&r, 2, &plain_ops);
    check(t, right <= model_bound, "without a planted mistake: %.2e", right);
    close_run(&r);
}

#define GRADIENT_TESTS                                                                             \
    {"norm_gradient", "residual + RMS norm: dh, da and what dh starts as", test_norm_gradient},    \
    {"linears_gradient",                                                                           \
     "dx, dA, dB: weight types, biases, dropout, shared x", test_linears_gradient},                \
    {"rope_gradient", "turning back is the gradient", test_rope_gradient},                         \
    {"attention_gradient",                                                                         \
     "dq, dk, dv: shared keys, windows, sequences", test_attention_gradient},                      \
    {"swiglu_gradient", "dgate, dup, in place too", test_swiglu_gradient},                         \
    {"gather_gradient", "scatter is gather's gradient", test_gather_gradient},                     \
    {"head_gradient", "head, LoRA on it, cross-entropy, in pieces", test_head_gradient},           \
    {"model_gradients", "d loss / d LoRA parameters of whole models", test_model_gradients},       \
    {"masked_tokens", "labels of -100 contribute exactly zero", test_masked_tokens},               \
    {"early_stop", "backward stops at the lowest adapter, same bits", test_early_stop},            \
    {"partial_adapters", "adapters on one linear or the head alone", test_partial_adapters},       \
    {"planted", "a wrong derivative of any op is seen", test_planted},                             \
    {"planted_model", "and in a whole model", test_planted_model},
