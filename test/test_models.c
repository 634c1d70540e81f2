// Whole models against transformers + peft + bitsandbytes, and against themselves.
//
// Tolerances. In float32 the reference sums a row of at most 172 products in an order of its own:
// each sum is off by a few rounding errors of 6e-8, and two layers multiply that by their gain.
// 1e-5 of the largest logit and 1e-4 of a gradient's norm leave a factor of about ten over what is
// measured, and a wrong formula is off by 1e-2 or more (the planted errors below are).

static const char *const model_names[] = {"llama", "llama31", "qwen2", "mistral"};
enum { N_TEST_MODELS = 4 };

typedef struct { const char *name; qlora_quant quant; int double_quant; } QuantCase;
static const QuantCase quant_cases[] = {{"none", QLORA_QUANT_NONE, 0}, {"nf4", QLORA_QUANT_NF4, 0},
                                        {"nf4dq", QLORA_QUANT_NF4, 1}};

#define MODELS "test/fixtures/models/"

static qlora_model *open_test_model(Test *t, const char *path, qlora_quant quant, int double_quant,
                                    qlora_compute compute, int threads) {
    qlora_error err = {{0}};
    qlora_options opt = qlora_default_options();
    opt.quant = quant;
    opt.double_quant = double_quant;
    opt.compute = compute;
    opt.threads = threads;
    qlora_model *q = qlora_open(path, &opt, &err);
    check(t, q != NULL, "%s", err.text);
    return q;
}

// ------------------------------------------------------------------------------------- references

// The sequences of ref.json or the micro-batches of ref_train.json.
typedef struct {
    size_t n, length[64];
    int32_t *ids[64], *labels[64];
    Region region;
    const Json *json;
} Sequences;

static bool read_sequences(Test *t, Sequences *s, const char *directory, const char *file,
                           const char *key) {
    qlora_error err = {{0}};
    bool found;
    *s = (Sequences){.region.allocator = &heap};
    s->json = read_json(directory, file, 1 << 26, &s->region, &found, &err);
    if (!check(t, s->json != NULL, "%s/%s: %s", directory, file, err.text)) return false;
    for (const Json *e = json_get(s->json, key)->first; e && s->n < 64; e = e->next) {
        const Json *ids = json_get(e, "ids"), *labels = json_get(e, "labels");
        size_t n = 0;
        s->ids[s->n] = region_alloc(&s->region, ids->count, sizeof(int32_t), &err);
        s->labels[s->n] = region_alloc(&s->region, ids->count, sizeof(int32_t), &err);
        for (const Json *id = ids->first; id; id = id->next)
            s->ids[s->n][n++] = (int32_t)strtol(id->text, NULL, 10);
        s->length[s->n] = n;
        n = 0;
        for (const Json *label = labels->first; label; label = label->next)
            s->labels[s->n][n++] = (int32_t)strtol(label->text, NULL, 10);
        s->n++;
    }
    return true;
}

// ----------------------------------------------------------------------------------- small actions

// The adapter's parameters get gradients and moments, keeping their values.
static void make_trainable(qlora_model *q) {
    qlora_error err = {{0}};
    size_t n = q->transformer.n_parameters;
    real *copy = grab(n, sizeof *copy);
    memcpy(copy, q->transformer.parameters, n * sizeof *copy);
    allocate_parameters(&q->transformer, true, &err);
    memcpy(q->transformer.parameters, copy, n * sizeof *copy);
    free(copy);
}

// Loss (mean over `total` supervised tokens) and gradients of a batch, added to what is there.
static double run_batch(Test *t, qlora_model *q, const TestBatch *b, size_t total, size_t memory) {
    qlora_error err = {{0}};
    Session s;
    size_t longest = 0;
    for (size_t i = 0; i < b->n; i++) longest = max_size(longest, b->spans[i].nk);
    SessionShape shape = {.T = b->T, .S = b->S, .n_spans = b->n, .max_span = longest,
                          .training = true};
    size_t before = q->options.memory;
    q->options.memory = memory;
    bool ok = check(t, !session_open(&s, q, shape, &err), "%s", err.text);
    q->options.memory = before;
    if (!ok) return NAN;
    double loss = batch_loss(&q->transformer, &s.w, &b->batch, 1 / (real)total, true);
    session_close(&s);
    return loss / (double)total;
}

static void clear_gradients(qlora_model *q) {
    memset(q->transformer.gradients, 0, q->transformer.n_parameters * sizeof(real));
}

static real *copy_gradients(const qlora_model *q) {
    real *copy = grab(q->transformer.n_parameters, sizeof *copy);
    memcpy(copy, q->transformer.gradients, q->transformer.n_parameters * sizeof *copy);
    return copy;
}

// The largest relative L2 difference of any adapter tensor from the reference's, which is named
// prefix + its PEFT name. `gradients`: compare dA and dB, else A and B.
static double compare_adapter(Test *t, qlora_model *q, Reference *r, const char *prefix,
                              bool gradients) {
    double worst = 0;
    for (size_t i = 0; i < n_modules(&q->transformer); i++) {
        const Linear *linear = module_linear(&q->transformer, i);
        char module[128], name[300];
        if (!linear->lora.r) continue;
        module_name(&q->transformer, i, false, module);
        for (int part = 0; part < 2; part++) {
            size_t n, expected = linear->lora.r * (part ? linear->weight.N : linear->weight.K);
            snprintf(name, sizeof name, "%sbase_model.model.%s.lora_%c.weight", prefix, module,
                     "AB"[part]);
            const real *reference = reference_values(t, r, name, &n);
            const real *own = gradients ? (part ? linear->lora.dB : linear->lora.dA)
                                        : (part ? linear->lora.B : linear->lora.A);
            if (!reference ||
                !check(t, n == expected, "%s: %zu values, expected %zu", name, n, expected))
                return NAN;
            double error = l2_err(own, reference, n);
            if (!(error <= worst)) worst = error;
            if (isnan(error)) return NAN;
        }
    }
    return worst;
}

static double compare_logits(Test *t, qlora_model *q, const Sequences *s, Reference *r,
                             const char *prefix) {
    size_t V = q->transformer.config.V, n;
    qlora_error err = {{0}};
    double worst = 0;
    for (size_t i = 0; i < s->n; i++) {
        char name[64];
        snprintf(name, sizeof name, "%s.%zu", prefix, i);
        const real *reference = reference_values(t, r, name, &n);
        float *logits = grab(s->length[i] * V, sizeof *logits);
        check(t, !qlora_logits(q, s->ids[i], s->length[i], logits, &err), "%s", err.text);
        double error = reference && n == s->length[i] * V ? max_err(logits, reference, n) : NAN;
        free(logits);
        if (!(error <= worst)) worst = error;
        if (isnan(error)) return NAN;
    }
    return worst;
}

static TestBatch whole_batch(const Sequences *s) {
    TestBatch b = {0};
    for (size_t i = 0; i < s->n; i++)
        add_sequence(&b, s->ids[i], s->labels[i], s->length[i], (uint32_t)i);
    return b;
}

// -------------------------------------------------------------------------- against the reference

static void check_against_reference(Test *t, const char *model, const QuantCase *quant,
                                    const Ops *ops) {
    char directory[256], file[64], adapter[300];
    qlora_error err = {{0}};
    Reference r;
    Sequences s;
    size_t n;
    snprintf(directory, sizeof directory, MODELS "%s", model);
    snprintf(file, sizeof file, "ref_%s.safetensors", quant->name);
    snprintf(adapter, sizeof adapter, "%s/adapter", directory);
    if (!open_reference(t, &r, directory, file)) return;
    if (!read_sequences(t, &s, directory, "ref.json", "sequences")) return;
    qlora_model *q = open_test_model(t, directory, quant->quant, quant->double_quant,
                                     QLORA_COMPUTE_F32, 2);
    if (!q) return;
    q->device.ops = ops;
    double base = compare_logits(t, q, &s, &r, "logits_base");
    check(t, base <= 1e-5, "%s %s: base logits differ by %.2e", model, quant->name, base);
    check(t, !qlora_load_adapter(q, adapter, &err), "%s", err.text);
    double adapted = compare_logits(t, q, &s, &r, "logits");
    check(t, adapted <= 1e-5, "%s %s: logits differ by %.2e", model, quant->name, adapted);
    make_trainable(q);
    TestBatch b = whole_batch(&s);
    double loss = run_batch(t, q, &b, b.S, 0);
    const real *expected = reference_values(t, &r, "loss", &n);
    double loss_error = expected ? fabs(loss - (double)expected[0]) / (double)expected[0] : NAN;
    check(t, loss_error <= 1e-5, "%s %s: loss %.7f differs by %.2e", model, quant->name, loss,
          loss_error);
    double gradient = compare_adapter(t, q, &r, "grad.", true);
    check(t, gradient <= 1e-4, "%s %s: gradients differ by %.2e", model, quant->name, gradient);
    printf("    %-8s %-6s logits %.1e, adapted %.1e, loss %.1e, gradients %.1e\n", model,
           quant->name, base, adapted, loss_error, gradient);
    // A wrong gradient must not pass: one element of one tensor, off by 1 % of its tensor's norm.
    q->transformer.gradients[0] += (real)0.01 * (real)sqrt(
        sum_of_squares(&q->device, module_linear(&q->transformer, 0)->lora.dA,
                                 module_linear(&q->transformer, 0)->lora.r *
                                 module_linear(&q->transformer, 0)->weight.K));
    double planted = compare_adapter(t, q, &r, "grad.", true);
    check(t, planted > 1e-3, "%s: a planted wrong gradient is off by only %.2e", model, planted);
    free_batch(&b);
    region_free(&s.region);
    close_reference(&r);
    qlora_close(q);
}

static void test_reference_plain(Test *t) {
    for (size_t i = 0; i < N_TEST_MODELS; i++)
        for (size_t k = 0; k < 3; k++)
            check_against_reference(t, model_names[i], &quant_cases[k], &plain_ops);
}

static void test_reference_fast(Test *t) {
    for (size_t i = 0; i < N_TEST_MODELS; i++)
        for (size_t k = 0; k < 3; k++)
            check_against_reference(t, model_names[i], &quant_cases[k], &fast_ops);
}

// LoRA on the output head, tied and untied.
static void test_adapted_head(Test *t) {
    static const char *const names[] = {"llama", "qwen2"};
    for (size_t i = 0; i < 2; i++) {
        char directory[256], adapter[300];
        qlora_error err = {{0}};
        Reference r;
        Sequences s;
        size_t n;
        snprintf(directory, sizeof directory, MODELS "%s", names[i]);
        snprintf(adapter, sizeof adapter, "%s/adapter_head", directory);
        qlora_model *q = open_test_model(t, directory, QLORA_QUANT_NONE, 0, QLORA_COMPUTE_F32, 2);
        if (!q || !open_reference(t, &r, directory, "ref_head_none.safetensors") ||
            !read_sequences(t, &s, directory, "ref.json", "sequences")) return;
        check(t, !qlora_load_adapter(q, adapter, &err), "%s", err.text);
        make_trainable(q);
        double logits = compare_logits(t, q, &s, &r, "logits");
        check(t, logits <= 1e-5, "%s: logits differ by %.2e", names[i], logits);
        TestBatch b = whole_batch(&s);
        double loss = run_batch(t, q, &b, b.S, 0);
        const real *expected = reference_values(t, &r, "loss", &n);
        check(t, expected && fabs(loss - (double)expected[0]) <= 1e-5 * (double)expected[0],
              "%s: loss %.7f", names[i], loss);
        double gradient = compare_adapter(t, q, &r, "grad.", true);
        check(t, gradient <= 1e-4, "%s: gradients differ by %.2e", names[i], gradient);
        free_batch(&b);
        region_free(&s.region);
        close_reference(&r);
        qlora_close(q);
    }
}

// Ten optimiser steps of PyTorch's AdamW, two unequal micro-batches each, clipping, warmup, cosine.
// Losses within 1e-5; parameters within 1e-4: Adam divides by the gradient's own size, so the first
// steps carry a gradient's relative error, not its absolute one, into the parameters.
static void test_adamw_steps(Test *t) {
    static const char *const names[] = {"llama", "qwen2"};
    for (size_t c = 0; c < 4; c++) {
        const QuantCase *quant = &quant_cases[c % 2];
        char directory[256], file[64], adapter[300];
        qlora_error err = {{0}};
        Reference r;
        Sequences s;
        snprintf(directory, sizeof directory, MODELS "%s", names[c / 2]);
        snprintf(adapter, sizeof adapter, "%s/adapter", directory);
        snprintf(file, sizeof file, "ref_train_%s.safetensors", quant->name);
        qlora_model *q = open_test_model(t, directory, quant->quant, quant->double_quant,
                                         QLORA_COMPUTE_F32, 2);
        if (!q || !open_reference(t, &r, directory, file) ||
            !read_sequences(t, &s, directory, "ref_train.json", "micro_batches")) return;
        const Json *log = json_get(json_get(s.json, "log"), quant->name);
        if (!check(t, log && log->count == 10, "ref_train.json has no log")) return;
        check(t, !qlora_load_adapter(q, adapter, &err), "%s", err.text);
        make_trainable(q);
        Transformer *m = &q->transformer;
        const Json *expected = log->first;
        int clipped = 0;
        double worst_loss = 0;
        for (size_t step = 0; step < 10; step++) {
            size_t total = 0;
            double loss = 0, value = 0, norm_value = 0;
            TestBatch b[2] = {{0}, {0}};
            for (size_t k = 0; k < 2; k++) {
                size_t i = 2 * step + k;
                add_sequence(&b[k], s.ids[i], s.labels[i], s.length[i], (uint32_t)k);
                total += b[k].S;
            }
            clear_gradients(q);
            for (size_t k = 0; k < 2; k++) loss += run_batch(t, q, &b[k], total, 0);
            StepRecord record = {.loss = loss};
            clip_gradient(m->dev, &record, NULL, m->gradients, m->n_parameters, (real)0.5);
            double norm = sqrt(record.squares);
            clipped += record.clip < 1;
            fast_ops.adamw(m->dev, m->parameters, m->gradients, m->moment1, m->moment2,
                           m->n_parameters,
                           (real)(1e-2 * schedule_factor(SCHEDULE_COSINE, step, 10, 3)), (real)0.9,
                           (real)0.999, (real)1e-8, (real)0.01, &record, step + 1);
            json_to_double(json_get(expected, "loss"), &value);
            json_to_double(json_get(expected, "grad_norm"), &norm_value);
            worst_loss = fmax(worst_loss, fabs(loss - value) / value);
            check(t, fabs(loss - value) <= 1e-5 * value, "%s %s step %zu: loss %.8f, expected %.8f",
                  names[c / 2], quant->name, step, loss, value);
            check(t, fabs(norm - norm_value) <= 1e-4 * norm_value,
                  "step %zu: norm %.8f, expected %.8f", step, norm, norm_value);
            expected = expected->next;
            free_batch(&b[0]);
            free_batch(&b[1]);
        }
        double parameters = compare_adapter(t, q, &r, "", false);
        check(t, parameters <= 1e-4, "%s %s: parameters differ by %.2e", names[c / 2], quant->name,
              parameters);
        check(t, clipped >= 5, "clipping was active in only %d steps", clipped);
        printf("    %-8s %-6s losses %.1e, parameters %.1e\n", names[c / 2], quant->name,
               worst_loss, parameters);
        region_free(&s.region);
        close_reference(&r);
        qlora_close(q);
    }
}

// bf16: how far from float32 may it be? torch's own bf16 run of the same weights was recorded; ours
// keeps sums and softmax in float32 and must be no farther from the float32 logits than 1.5 times
// it.
static void test_bf16_bounds(Test *t) {
    for (size_t i = 0; i < N_TEST_MODELS; i++)
        for (size_t k = 0; k < 2; k++) {
            char directory[256], file[64], adapter[300];
            qlora_error err = {{0}};
            Reference r;
            Sequences s;
            double theirs = 0;
            snprintf(directory, sizeof directory, MODELS "%s", model_names[i]);
            snprintf(file, sizeof file, "ref_%s.safetensors", quant_cases[k].name);
            snprintf(adapter, sizeof adapter, "%s/adapter", directory);
            qlora_model *q = open_test_model(t, directory, quant_cases[k].quant, 0,
                                             QLORA_COMPUTE_BF16, 2);
            if (!q || !open_reference(t, &r, directory, file) ||
                !read_sequences(t, &s, directory, "ref.json", "sequences")) return;
            check(t, !qlora_load_adapter(q, adapter, &err), "%s", err.text);
            for (size_t x = 0; x < s.n; x++) {
                char name[64];
                size_t n;
                snprintf(name, sizeof name, "bf16.logits.%zu", x);
                const real *rounded = reference_values(t, &r, name, &n);
                snprintf(name, sizeof name, "logits.%zu", x);
                const real *exact = reference_values(t, &r, name, &n);
                theirs = fmax(theirs, max_err(rounded, exact, n));
            }
            double fast = compare_logits(t, q, &s, &r, "logits");
            q->device.ops = &plain_ops;
            double plain = compare_logits(t, q, &s, &r, "logits");
            check(t, fast <= 1.5 * theirs, "%s %s: bf16 logits are %.2e from float32, torch's %.2e",
                  model_names[i], quant_cases[k].name, fast, theirs);
            check(t, plain <= 1.5 * theirs,
                  "%s %s: plain bf16 logits are %.2e from float32, torch's "
                  "%.2e",
                  model_names[i], quant_cases[k].name, plain, theirs);
            printf("    %-8s %-6s bf16 from f32: fast %.1e, plain %.1e, torch %.1e\n",
                   model_names[i], quant_cases[k].name, fast, plain, theirs);
            region_free(&s.region);
            close_reference(&r);
            qlora_close(q);
        }
}

static void test_greedy(Test *t) {
    for (size_t i = 0; i < N_TEST_MODELS; i++)
        for (int adapted = 0; adapted < 2; adapted++) {
            char directory[256], adapter[300];
            qlora_error err = {{0}};
            Sequences s;
            int32_t *ids = NULL;
            size_t n = 0;
            snprintf(directory, sizeof directory, MODELS "%s", model_names[i]);
            snprintf(adapter, sizeof adapter, "%s/adapter", directory);
            qlora_model *q = open_test_model(t, directory, QLORA_QUANT_NONE, 0, QLORA_COMPUTE_F32,
                                             2);
            if (!q || !read_sequences(t, &s, directory, "ref.json", "sequences")) return;
            if (adapted) check(t, !qlora_load_adapter(q, adapter, &err), "%s", err.text);
            const Json *expected = json_get(json_get(s.json, "greedy"),
                                            adapted ? "adapter" : "base");
            qlora_sampling how = {.max_new_tokens = 20, .top_p = 1, .repetition_penalty = 1,
                                  .ignore_eos = 1};
            check(t, !qlora_generate(q, s.ids[0], s.length[0], &how, NULL, NULL, &ids, &n, &err),
                  "%s", err.text);
            check(t, n == 20 && expected && expected->count == 20, "%zu ids", n);
            const Json *e = expected ? expected->first : NULL;
            for (size_t k = 0; k < n && e; k++, e = e->next)
                check(t, ids[k] == (int32_t)strtol(e->text, NULL, 10),
                      "%s: id %zu is %d, expected %s", model_names[i], k, ids[k], e->text);
            qlora_free(q, ids);
            region_free(&s.region);
            qlora_close(q);
        }
}

// ------------------------------------------------------------------------------ against themselves

// Opens a model with its adapter ready for training, in the compute type given.
static qlora_model *trainable_model(Test *t, const char *model, qlora_compute compute, int threads,
                                    float dropout, Sequences *s) {
    char directory[256], adapter[300];
    qlora_error err = {{0}};
    snprintf(directory, sizeof directory, MODELS "%s", model);
    snprintf(adapter, sizeof adapter, "%s/adapter", directory);
    qlora_model *q = open_test_model(t, directory, QLORA_QUANT_NF4, 1, compute, threads);
    if (!q || (s && !read_sequences(t, s, directory, "ref.json", "sequences"))) return NULL;
    check(t, !qlora_load_adapter(q, adapter, &err), "%s", err.text);
    make_trainable(q);
    for (size_t i = 0; i < n_modules(&q->transformer); i++)
        module_linear(&q->transformer, i)->lora.dropout = dropout;
    return q;
}

// The same bits for 1, 2, 3, 4, 7 threads, in both compute types and both op tables, with dropout.
static void test_threads(Test *t) {
    static const int counts[] = {1, 2, 3, 4, 7};
    for (int mode = 0; mode < 4; mode++) {
        real *first = NULL;
        double first_loss = 0;
        for (size_t k = 0; k < 5; k++) {
            Sequences s;
            qlora_model *q = trainable_model(t, "qwen2", mode & 1 ? QLORA_COMPUTE_BF16
                                             : QLORA_COMPUTE_F32, counts[k], 0.1f, &s);
            if (!q) return;
            q->device.ops = mode & 2 ? &plain_ops : &fast_ops;
            TestBatch b = whole_batch(&s);
            double loss = run_batch(t, q, &b, b.S, 0);
            real *gradients = copy_gradients(q);
            size_t bytes = q->transformer.n_parameters * sizeof(real);
            if (!first) { first = gradients; first_loss = loss; }
            else {
                check(t, loss == first_loss && memcmp(first, gradients, bytes) == 0,
                      "mode %d: %d threads give other bits than 1", mode, counts[k]);
                free(gradients);
            }
            free_batch(&b);
            region_free(&s.region);
            qlora_close(q);
        }
        free(first);
    }
}

// One batch of three sequences = three batches of one, and with little memory = with much: the same
// bits, for recomputation replays the same operations.
static void test_batch_shape(Test *t) {
    for (int mode = 0; mode < 4; mode++) {
        Sequences s;
        qlora_model *q = trainable_model(t, "llama", mode & 1 ? QLORA_COMPUTE_BF16
                                         : QLORA_COMPUTE_F32, 2, 0.1f, &s);
        if (!q) return;
        q->device.ops = mode & 2 ? &plain_ops : &fast_ops;
        TestBatch together = whole_batch(&s);
        double loss = run_batch(t, q, &together, together.S, 0);
        real *packed = copy_gradients(q);
        size_t bytes = q->transformer.n_parameters * sizeof(real);
        clear_gradients(q);
        double sum = 0;
        for (size_t i = 0; i < s.n; i++) {
            TestBatch alone = {0};
            add_sequence(&alone, s.ids[i], s.labels[i], s.length[i], (uint32_t)i);
            sum += run_batch(t, q, &alone, together.S, 0);
            free_batch(&alone);
        }
        check(t, fabs(loss - sum) <= 1e-12 * loss, "mode %d: loss %.9f packed, %.9f apart", mode,
              loss, sum);
        check(t, memcmp(packed, q->transformer.gradients, bytes) == 0,
              "mode %d: gradients of a pack differ from those of its sequences", mode);
        // The least memory that works: everything is recomputed.
        qlora_error err = {{0}};
        Session tight;
        SessionShape shape = {.T = together.T, .S = together.S, .n_spans = together.n,
                              .max_span = 64, .training = true};
        size_t held = q->weight_bytes + q->transformer.n_parameters * 4 * sizeof(real), most = 0;
        for (size_t budget = held + 65536; !most && budget < held + ((size_t)1 << 30);
             budget += budget / 512) {
            q->options.memory = budget;
            if (session_open(&tight, q, shape, &err)) continue;
            check(t, tight.w.kept == 0, "the tightest session keeps %zu layers", tight.w.kept);
            session_close(&tight);
            most = budget;
        }
        q->options.memory = 0;
        clear_gradients(q);
        double recomputed = run_batch(t, q, &together, together.S, most);
        check(t, recomputed == loss && memcmp(packed, q->transformer.gradients, bytes) == 0,
              "mode %d: recomputed gradients differ from stored ones", mode);
        free(packed);
        free_batch(&together);
        region_free(&s.region);
        qlora_close(q);
    }
}

// Tokens one by one through the cache = all at once: the same bits.
static void test_cache(Test *t) {
    for (size_t i = 0; i < N_TEST_MODELS; i++)
        for (int mode = 0; mode < 2; mode++) {
            Sequences s;
            qlora_error err = {{0}};
            qlora_model *q = trainable_model(t, model_names[i], mode ? QLORA_COMPUTE_BF16
                                             : QLORA_COMPUTE_F32, 2, 0, &s);
            if (!q) return;
            size_t V = q->transformer.config.V, n = s.length[1];
            float *all = grab(n * V, sizeof *all);
            check(t, !qlora_logits(q, s.ids[1], n, all, &err), "%s", err.text);
            Session session;
            check(t, !open_inference(&session, q, n, 1, &err), "%s", err.text);
            for (size_t k = 0; k < n; k++) {
                session_forward(&session, s.ids[1] + k, 1);
                session_logits(&session, 0, 1);
                check(t, memcmp(session.logits, all + k * V, V * sizeof *all) == 0,
                      "%s: token %zu through the cache differs by %.2e", model_names[i], k,
                      max_err(session.logits, all + k * V, V));
            }
            session_close(&session);
            free(all);
            region_free(&s.region);
            qlora_close(q);
        }
}

// A later token never changes an earlier logit; a masked token has no gradient of its own: changing
// its label changes nothing.
static void test_causality(Test *t) {
    Sequences s;
    qlora_error err = {{0}};
    qlora_model *q = trainable_model(t, "mistral", QLORA_COMPUTE_F32, 2, 0, &s);
    if (!q) return;
    size_t V = q->transformer.config.V, n = s.length[1];
    float *before = grab(n * V, sizeof *before), *after = grab(n * V, sizeof *after);
    check(t, !qlora_logits(q, s.ids[1], n, before, &err), "%s", err.text);
    s.ids[1][n - 1] = (s.ids[1][n - 1] + 1) % (int32_t)V;
    check(t, !qlora_logits(q, s.ids[1], n, after, &err), "%s", err.text);
    check(t, memcmp(before, after, (n - 1) * V * sizeof *before) == 0, "an earlier logit changed");
    check(t, memcmp(before + (n - 1) * V, after + (n - 1) * V, V * sizeof *before) != 0,
          "the last logit did not change");
    free(before);
    free(after);
    region_free(&s.region);
    qlora_close(q);
}

// B = 0 is the base model, bit for bit.
static void test_zero_adapter(Test *t) {
    Sequences s;
    qlora_error err = {{0}};
    for (int mode = 0; mode < 2; mode++) {
        qlora_model *q = open_test_model(t, MODELS "llama", QLORA_QUANT_NF4, 1,
                                         mode ? QLORA_COMPUTE_BF16 : QLORA_COMPUTE_F32, 2);
        if (!q || !read_sequences(t, &s, MODELS "llama", "ref.json", "sequences")) return;
        size_t V = q->transformer.config.V, n = s.length[1];
        float *base = grab(n * V, sizeof *base), *adapted = grab(n * V, sizeof *adapted);
        check(t, !qlora_logits(q, s.ids[1], n, base, &err), "%s", err.text);
        check(t,
              !new_adapter(&q->transformer, "all-linear,lm_head", 8, 16, 0, 42, &err) ||
                  !new_adapter(&q->transformer, "all-linear", 8, 16, 0, 42, &err),
              "%s", err.text);
        check(t, !qlora_logits(q, s.ids[1], n, adapted, &err), "%s", err.text);
        check(t, memcmp(base, adapted, n * V * sizeof *base) == 0,
              "a zero adapter changes the model");
        free(base);
        free(adapted);
        region_free(&s.region);
        qlora_close(q);
    }
}

// save -> load gives the same parameters and logits; ranks and scales that differ survive too.
static void test_adapter_round_trip(Test *t) {
    Sequences s;
    qlora_error err = {{0}};
    char out[64];
    snprintf(out, sizeof out, "build/adapter-%d", (int)getpid());
    qlora_model *q = trainable_model(t, "qwen2", QLORA_COMPUTE_F32, 2, 0, &s);
    if (!q) return;
    module_linear(&q->transformer, 3)->lora.scale *= 3;
    size_t V = q->transformer.config.V, n = s.length[1];
    float *before = grab(n * V, sizeof *before), *after = grab(n * V, sizeof *after);
    check(t, !qlora_logits(q, s.ids[1], n, before, &err), "%s", err.text);
    check(t, !qlora_save_adapter(q, out, &err), "%s", err.text);
    check(t, !qlora_load_adapter(q, out, &err), "%s", err.text);
    check(t, !qlora_logits(q, s.ids[1], n, after, &err), "%s", err.text);
    check(t, memcmp(before, after, n * V * sizeof *before) == 0,
          "saved and loaded adapters differ");
    qlora_close(q);
    q = qlora_open(out, &(qlora_options){.quant = QLORA_QUANT_NF4, .double_quant = 1,
                   .compute = QLORA_COMPUTE_F32}, &err);
    if (check(t, q != NULL, "opening the adapter's directory: %s", err.text)) {
        check(t, !qlora_logits(q, s.ids[1], n, after, &err), "%s", err.text);
        check(t, memcmp(before, after, n * V * sizeof *before) == 0,
              "the adapter's directory differs");
        qlora_close(q);
    }
    free(before);
    free(after);
    region_free(&s.region);
}

// A 4-bit directory written by `quantize` computes what quantising on the fly does.
static void test_quantized_directory(Test *t) {
    static const QuantCase cases[] = {{"nf4", QLORA_QUANT_NF4, 0}, {"nf4dq", QLORA_QUANT_NF4, 1},
                                      {"fp4", QLORA_QUANT_FP4, 1}};
    for (size_t i = 0; i < N_TEST_MODELS * 3; i++) {
        const QuantCase *c = &cases[i % 3];
        char directory[256], out[96];
        qlora_error err = {{0}};
        int32_t ids[] = {1, 5, 9, 2, 77, 30};
        snprintf(directory, sizeof directory, MODELS "%s", model_names[i / 3]);
        snprintf(out, sizeof out, "build/quantized-%d-%zu", (int)getpid(), i);
        qlora_options opt = {.quant = c->quant, .double_quant = c->double_quant, .threads = 2,
                             .compute = QLORA_COMPUTE_F32};
        check(t, !qlora_quantize(directory, out, &opt, &err), "%s", err.text);
        qlora_model *a = qlora_open(directory, &opt, &err);
        opt.quant = QLORA_QUANT_NONE;                         // the directory's own type wins
        qlora_model *b = qlora_open(out, &opt, &err);
        if (!check(t, a && b, "%s", err.text)) return;
        size_t V = a->transformer.config.V;
        float *x = grab(6 * V, sizeof *x), *y = grab(6 * V, sizeof *y);
        check(t, !qlora_logits(a, ids, 6, x, &err) && !qlora_logits(b, ids, 6, y, &err), "%s",
              err.text);
        check(t, memcmp(x, y, 6 * V * sizeof *x) == 0, "%s %s: differs by %.2e", model_names[i / 3],
              c->name, max_err(y, x, 6 * V));
        free(x);
        free(y);
        qlora_close(a);
        qlora_close(b);
    }
}

// Merged files compute what base + adapter do: exactly up to float32 rounding for a float32 base,
// up to one rounding of each weight for 16-bit ones (2^-9 of a weight in bf16, 2^-12 in float16;
// through two layers that is at most a few times as much of the logits). In shards and in one file
// alike.
static void test_merge(Test *t) {
    static const double limits[] = {1e-5, 2e-2, 1e-5, 3e-3};          // f32, bf16, f32, f16
    for (size_t i = 0; i < N_TEST_MODELS; i++)
        for (int sharded = 0; sharded < 2; sharded++) {
            char directory[256], adapter[300], out[96];
            qlora_error err = {{0}};
            qlora_merge_report report = {0};
            int32_t ids[] = {1, 5, 9, 2, 77, 30};
            snprintf(directory, sizeof directory, MODELS "%s", model_names[i]);
            snprintf(adapter, sizeof adapter, "%s/adapter", directory);
            snprintf(out, sizeof out, "build/adapter-merged-%d-%zu-%d", (int)getpid(), i, sharded);
            qlora_options opt = {
                .quant = QLORA_QUANT_NONE, .threads = 2, .compute = QLORA_COMPUTE_F32};
            check(t,
                  !qlora_merge(directory, adapter, out, sharded ? 60000 : SIZE_MAX, &opt, &report,
                               &err),
                  "%s", err.text);
            qlora_model *a = qlora_open(directory, &opt, &err), *b = qlora_open(out, &opt, &err);
            if (!check(t, a && b, "%s", err.text)) return;
            check(t, !qlora_load_adapter(a, adapter, &err), "%s", err.text);
            size_t V = a->transformer.config.V;
            float *x = grab(6 * V, sizeof *x), *y = grab(6 * V, sizeof *y);
            check(t, !qlora_logits(a, ids, 6, x, &err) && !qlora_logits(b, ids, 6, y, &err), "%s",
                  err.text);
            double error = max_err(y, x, 6 * V);
            check(t, error <= limits[i], "%s: merged logits differ by %.2e", model_names[i], error);
            check(t, report.adapter_parameters == qlora_info(a).adapter_parameters &&
                  report.relative_change > 0.01, "%s: the report says %zu parameters, change %.2e",
                  model_names[i], report.adapter_parameters, report.relative_change);
            free(x);
            free(y);
            qlora_close(a);
            qlora_close(b);
        }
    // Every float16 survives narrowing, and halves between them go to the even one.
    for (uint32_t h = 0; h < 0x7C00; h++) {
        float value = f16_to_float((uint16_t)h), next = f16_to_float((uint16_t)(h + 1));
        check(t, float_to_f16(value) == h && float_to_f16(-value) == (h | 0x8000), "f16 %04X", h);
        if (h + 1 < 0x7C00)
            check(t, float_to_f16((value + next) / 2) == h + h % 2, "between f16 %04X and the next",
                  h);
    }
}

// A really trained model that nobody here wrote: logits in float64, per-token losses, and the 200
// greedy tokens whose text llama2.c prints, byte for byte.
static int collect_text_piece(void *user, const char *utf8, size_t n) {
    return buffer_append(user, utf8, n, NULL);
}

static void test_stories260K(Test *t) {
    const char *directory = "../shared/real/checkpoints/stories260K";
    qlora_error err = {{0}};
    Region region = {.allocator = &heap};
    bool found;
    if (!file_exists("../shared/real/checkpoints/stories260K/golden.json")) {
        skip(t, "no ../shared/real here");
        return;
    }
    const Json *golden = read_json(directory, "golden.json", 1 << 26, &region, &found, &err);
    qlora_model *q = open_test_model(t, directory, QLORA_QUANT_NONE, 0, QLORA_COMPUTE_F32, 2);
    if (!q || !check(t, golden != NULL, "%s", err.text)) return;
    size_t V = q->transformer.config.V, cases = 0;
    double worst = 0;
    for (const Json *c = json_get(golden, "cases")->first; c; c = c->next, cases++) {
        const Json *ids_json = json_get(c, "ids"), *last = json_get(c, "last_logits");
        const Json *text = json_get(c, "text");
        size_t n = ids_json->count, k = 0, n_own;
        int32_t *ids = grab(n, sizeof *ids), *own;
        for (const Json *e = ids_json->first; e; e = e->next)
            ids[k++] = (int32_t)strtol(e->text, 0, 10);
        check(t, !qlora_tokenize(q, text->text, text->length, 1, &own, &n_own, &err), "%s",
              err.text);
        check(t, n_own == n && memcmp(own, ids, n * sizeof *ids) == 0, "other ids for \"%.40s\"",
              text->text);
        float *logits = grab(n * V, sizeof *logits), *expected = grab(V, sizeof *expected);
        check(t, !qlora_logits(q, ids, n, logits, &err), "%s", err.text);
        k = 0;
        for (const Json *e = last->first; e && k < V; e = e->next)
            expected[k++] = strtof(e->text, NULL);
        double error = max_err(logits + (n - 1) * V, expected, V);
        if (!(error <= worst)) worst = error;
        check(t, error <= 1e-5, "logits after \"%.40s\" differ by %.2e", text->text, error);
        k = 0;
        for (const Json *e = json_get(c, "nll")->first; e; e = e->next, k++) {
            double sum = 0, value = strtod(e->text, NULL);
            for (size_t v = 0; v < V; v++)
                sum += exp((double)logits[k * V + v] - (double)logits[k * V + (size_t)ids[k + 1]]);
            check(t, fabs(log(sum) - value) <= 1e-4, "loss of token %zu: %.6f, expected %.6f", k,
                  log(sum), value);
        }
        qlora_free(q, own);
        free(ids);
        free(logits);
        free(expected);
    }
    check(t, cases >= 3, "only %zu cases", cases);
    Buffer text = {.allocator = &heap}, expected = {.allocator = &heap};
    int32_t *ids;
    size_t n;
    qlora_sampling how = {
        .max_new_tokens = 200, .top_p = 1, .repetition_penalty = 1, .ignore_eos = 1};
    check(t,
          !qlora_tokenize(q, "", 0, 1, &ids, &n, &err) &&
              !qlora_generate(q, ids, n, &how, collect_text_piece, &text, NULL, NULL, &err),
          "%s", err.text);
    check(t, !read_whole_file("../shared/real/checkpoints/stories260K/original/expected_stdout.txt",
                              1 << 20, &expected, &err), "%s", err.text);
    check(t, text.size == expected.size && memcmp(text.data, expected.data, text.size) == 0,
          "the greedy text differs");
    printf("    stories260K  %zu cases, logits %.1e, %zu bytes of text\n", cases, worst, text.size);
    qlora_free(q, ids);
    buffer_free(&text);
    buffer_free(&expected);
    region_free(&region);
    qlora_close(q);
}

#define MODEL_TESTS                                                                                \
    {"reference_plain", "logits, loss, gradients equal transformers + peft (plain kernels)",       \
     test_reference_plain},                                                                        \
        {"reference_fast", "the same with the fast kernels", test_reference_fast},                 \
        {"adapted_head", "LoRA on lm_head, tied and untied, equals peft", test_adapted_head},      \
        {"adamw_steps", "10 AdamW steps equal PyTorch's: losses, norms, parameters",               \
         test_adamw_steps},                                                                        \
        {"bf16_bounds", "bf16 is as near to float32 as torch's bf16", test_bf16_bounds},           \
        {"greedy", "20 greedy tokens equal transformers'", test_greedy},                           \
        {"merge", "merged files compute what base + adapter do", test_merge},                      \
        {"stories260K", "a real trained model: golden logits, losses, greedy text",                \
         test_stories260K},                                                                        \
        {"threads", "1, 2, 3, 4, 7 threads give the same bits", test_threads},                     \
        {"batch_shape", "packed = apart, recomputed = stored, bit for bit", test_batch_shape},     \
        {"cache", "token by token through the cache = all at once, bit for bit", test_cache},      \
        {"causality", "a later token changes no earlier logit", test_causality},                   \
        {"zero_adapter", "a fresh adapter changes nothing, bit for bit", test_zero_adapter},       \
        {"adapter_round_trip", "save and load keep an adapter exactly", test_adapter_round_trip},  \
        {"quantized_directory", "a 4-bit directory computes what was quantised on the fly",        \
         test_quantized_directory},
