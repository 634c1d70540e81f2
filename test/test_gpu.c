// Whole models on a GPU against the same on the CPU: built with -DQLORA_CUDA, once with qlora.cu
// compiled by nvcc (make test-gpu) and once with qlora.cu running on the CPU (make test).
//
// float32 results differ by the order of sums and the last bits of exp; bf16 results by roundings
// that fall the other way: each device is up to 2e-2 from float32 on these models (test_models.c,
// bf16_bounds), so two may be twice that apart.

static qlora_model *open_on(Test *t, const char *device, const char *model, qlora_quant quant,
                            qlora_compute compute) {
    qlora_error err = {{0}};
    qlora_options opt = {.quant = quant, .double_quant = 1, .compute = compute, .threads = 2,
                         .device = device};
    char directory[200];
    snprintf(directory, sizeof directory, MODELS "%s", model);
    qlora_model *q = qlora_open(directory, &opt, &err);
    check(t, q != NULL, "%s on %s: %s", model, device, err.text);
    return q;
}

static const char *const gpu_models[] = {"llama", "llama31", "qwen2", "mistral"};

// Of n values of the device, on the host; freed by the caller.
static real *fetched(Device *dev, const real *values, size_t n) {
    real *copy = grab(n, sizeof *copy);
    dev->ops->download(dev, copy, values, n * sizeof *copy);
    return copy;
}

static void same_on_device(Test *t, Device *dev, const void *there, const void *here, size_t bytes,
                           const char *what, size_t i) {
    void *copy = grab(bytes, 1);
    dev->ops->download(dev, copy, there, bytes);
    check(t, memcmp(copy, here, bytes) == 0, "slot %zu: %s differ from the CPU's", i, what);
    free(copy);
}

// Quantising while loading: codes, scales, maps, offsets.
static void test_gpu_quantise(Test *t) {
    static const qlora_quant kinds[] = {QLORA_QUANT_NF4, QLORA_QUANT_FP4};
    for (int k = 0; k < 4; k++) {
        qlora_model *q[2];
        for (int gpu = 0; gpu < 2; gpu++) {
            qlora_error err = {{0}};
            qlora_options opt = {.quant = kinds[k / 2], .double_quant = k % 2, .threads = 2,
                                 .device = gpu ? "cuda" : "cpu"};
            q[gpu] = qlora_open(MODELS "llama31", &opt, &err);
            if (!check(t, q[gpu] != NULL, "%s", err.text)) return;
        }
        for (size_t i = 0; i < q[0]->slots.n; i++) {
            const Weight *a = q[0]->slots.slots[i].weight, *b = q[1]->slots.slots[i].weight;
            if (!a || !is_4bit(a->dtype)) continue;
            Device *dev = &q[1]->device;
            size_t n = a->N * a->K, blocks = ceil_div(n, QUANT_BLOCK);
            same_on_device(t, dev, b->data, a->data, (n + 1) / 2, "codes", i);
            same_on_device(t, dev, b->code, a->code, 16 * sizeof(float), "levels", i);
            check(t, memcmp(&a->offset, &b->offset, sizeof a->offset) == 0 || !a->absmax8,
                  "slot %zu: offset %.9g, expected %.9g", i, (double)b->offset, (double)a->offset);
            if (a->absmax8) {
                same_on_device(t, dev, b->absmax8, a->absmax8, blocks, "scales' codes", i);
                same_on_device(t, dev, b->absmax2, a->absmax2,
                               ceil_div(blocks, SCALE_BLOCK) * sizeof(float), "outer scales", i);
            } else {
                same_on_device(t, dev, b->absmax, a->absmax, blocks * sizeof(float), "scales", i);
            }
        }
        qlora_close(q[0]);
        qlora_close(q[1]);
    }
}

static void test_gpu_logits(Test *t) {
    for (size_t i = 0; i < 16; i++) {
        const char *name = gpu_models[i / 4];
        qlora_quant quant = i % 2 ? QLORA_QUANT_NF4 : QLORA_QUANT_NONE;
        bool bf16 = i / 2 % 2;
        float *logits[2] = {NULL, NULL};
        int32_t ids[40];
        size_t V = 0, n = 40;
        for (int gpu = 0; gpu < 2; gpu++) {
            qlora_error err = {{0}};
            char adapter[200];
            qlora_model *q = open_on(t, gpu ? "cuda" : "cpu", name, quant,
                                     bf16 ? QLORA_COMPUTE_BF16 : QLORA_COMPUTE_F32);
            if (!q) return;
            V = q->transformer.config.V;
            for (size_t k = 0; k < n; k++) ids[k] = (int32_t)(random_u32(3, 3, 3, k) % V);
            snprintf(adapter, sizeof adapter, MODELS "%s/adapter", name);
            check(t, !qlora_load_adapter(q, adapter, &err), "%s", err.text);
            logits[gpu] = grab(n * V, sizeof *logits[gpu]);
            check(t, !qlora_logits(q, ids, n, logits[gpu], &err), "%s", err.text);
            qlora_close(q);
        }
        double error = max_err(logits[1], logits[0], n * V), bound = bf16 ? 4e-2 : 1e-5;
        check(t, error <= bound, "%s: logits differ by %.2e of the largest, %.0e allowed", name,
              error, bound);
        printf("    %-8s %s %s  %.1e\n", name, quant == QLORA_QUANT_NF4 ? "nf4 " : "none",
               bf16 ? "bf16" : "f32 ", error);
        free(logits[0]);
        free(logits[1]);
    }
}

// Loss and gradients of three sequences, dropout on, everything kept or everything recomputed.
static void test_gpu_gradients(Test *t) {
    for (size_t i = 0; i < 8; i++) {
        bool bf16 = i % 2, tight = i / 2 % 2;
        const char *name = gpu_models[i / 4 * 2 + 1];
        double loss[2] = {0, 0};
        real *gradients[2] = {NULL, NULL};
        size_t n = 0;
        for (int gpu = 0; gpu < 2; gpu++) {
            qlora_error err = {{0}};
            qlora_model *q = open_on(t, gpu ? "cuda" : "cpu", name, QLORA_QUANT_NF4,
                                     bf16 ? QLORA_COMPUTE_BF16 : QLORA_COMPUTE_F32);
            if (!q) return;
            Trainer trainer = {.q = q, .err = &err};
            qlora_train_options options = {.seed = 5};
            int32_t ids[96];
            uint8_t learn[96];
            Sample samples[3] = {{.first = 0, .length = 37}, {.first = 37, .length = 5},
                                 {.first = 42, .length = 54}};
            Dataset data = {.ids = ids, .learn = learn, .samples = samples, .n = 3};
            uint32_t order[3] = {2, 0, 1};
            for (size_t k = 0; k < 96; k++) {
                ids[k] = (int32_t)(random_u32(4, 4, 4, k) % q->transformer.config.V);
                learn[k] = k % 5 != 0;
            }
            trainer.options = &options;
            const char *all = "all-linear,lm_head";
            check(t, !new_adapter(&q->transformer, all, 4, 8, 0.2f, 42, &err), "%s",
                  err.text);
            Device *dev = &q->device;
            n = q->transformer.n_parameters;
            real *values = fetched(dev, q->transformer.parameters, n);
            for (size_t k = 0; k < n; k++)
                if (values[k] == 0) values[k] = (real)0.05 * (real)cos((double)k);
            upload(dev, q->transformer.parameters, values, n * sizeof *values);
            free(values);
            SessionShape shape = {.T = 96, .S = 96, .n_spans = 3, .max_span = 96, .training = true};
            StepRecord *record = dev->ops->allocate(dev, sizeof *record, &err), seen_record;
            bool open = record && !session_open(&trainer.session, q, shape, &err);
            if (!check(t, open, "%s", err.text))
                return;
            if (tight) trainer.session.w.kept = 0;
            dev->ops->zero(dev, record, sizeof *record);
            LabelledBatch batch = make_batch(&trainer, &data, order, 3, 0, 7, true);
            loss_and_gradients(&q->transformer, &trainer.session.w, &batch, &record->loss,
                               (real)0.01, true);
            dev->ops->download(dev, &seen_record, record, sizeof seen_record);
            gradients[gpu] = fetched(dev, q->transformer.gradients, n);
            check(t, !dev->ops->check(dev, &err), "%s", err.text);
            loss[gpu] = seen_record.loss;
            dev->ops->release(dev, record, sizeof *record);
            session_close(&trainer.session);
            qlora_close(q);
        }
        double error = l2_err(gradients[1], gradients[0], n), bound = bf16 ? 5e-2 : 2e-5;
        double off = fabs(loss[1] - loss[0]) / loss[0];
        check(t, error <= bound && off <= bound / 10, "%s: gradients differ by %.2e, loss by %.2e",
              name, error, off);
        printf("    %-8s %s %s  gradients %.1e, loss %.1e\n", name, bf16 ? "bf16" : "f32 ",
               tight ? "recomputed" : "kept      ", error, off);
        free(gradients[0]);
        free(gradients[1]);
    }
}

// A run of 20 steps: see test_run in test_trainer.c. Its settings here are those of `gpu_run`.
typedef struct { const char *device; qlora_compute compute; size_t logging_steps; bool resume;
                 size_t stop_at, steps; } GpuRun;

// A GPU tells of several steps at once: the one to stop at may be among them.
static void stop_at_step(void *user, const qlora_progress *p) {
    RunControl *c = user;
    control_progress(user, p);
    if (c->stop_at_step && p->step >= c->stop_at_step) c->stop = true;
}

static int gpu_run(const char *data, const char *out, GpuRun run, qlora_error *err) {
    RunControl control = {.stop_at_step = run.stop_at};
    qlora_options opt = {.quant = QLORA_QUANT_NF4, .double_quant = 1, .compute = run.compute,
                         .threads = 2, .device = run.device, .stop = control_stop,
                         .stop_user = &control};
    qlora_train_options train = qlora_default_train_options();
    qlora_model *q = qlora_open(MODELS "qwen2", &opt, err);
    if (!q) return -1;
    train.output_dir = out;
    train.lora_r = 4;
    train.lora_dropout = 0.1f;
    train.learning_rate = 5e-3f;
    train.warmup_ratio = 0.15f;
    train.per_device_train_batch_size = 2;
    train.gradient_accumulation_steps = 2;
    train.max_steps = run.steps;
    train.logging_steps = run.logging_steps;
    train.resume = run.resume;
    train.progress = stop_at_step;
    train.user = &control;
    int bad = qlora_train(q, data, &train, err);
    qlora_close(q);
    return bad;
}

// The losses of log.jsonl, eval_loss too; returns how many.
static size_t read_losses(const char *out, double losses[64]) {
    char path[500];
    Buffer text = {.allocator = &heap};
    size_t n = 0;
    snprintf(path, sizeof path, "%s/log.jsonl", out);
    if (read_whole_file(path, SIZE_MAX / 4, &text, NULL) || buffer_append(&text, "", 1, NULL))
        return 0;
    for (const char *at = text.data; (at = strstr(at, "loss\": ")) != NULL && n < 64; at++)
        losses[n++] = strtod(at + 7, NULL);
    buffer_free(&text);
    return n;
}

static void test_gpu_training(Test *t) {
    char data[200], out[2][200];
    snprintf(data, sizeof data, "build/gpu-%d.jsonl", (int)getpid());
    write_test_data(t, data, 8);
    for (int bf16 = 0; bf16 < 2; bf16++) {
        double losses[2][64], worst = 0;
        size_t n[2];
        for (int gpu = 0; gpu < 2; gpu++) {
            qlora_error err = {{0}};
            snprintf(out[gpu], sizeof out[gpu], "build/gpu-%d-%d", (int)getpid(), gpu);
            GpuRun run = {gpu ? "cuda" : "cpu", bf16 ? QLORA_COMPUTE_BF16 : QLORA_COMPUTE_F32, 1,
                          false, 0, 20};
            remove_run(out[gpu]);
            check(t, !gpu_run(data, out[gpu], run, &err), "%s", err.text);
            n[gpu] = read_losses(out[gpu], losses[gpu]);
        }
        check(t, n[0] == n[1] && n[0] > 20, "%zu and %zu losses", n[0], n[1]);
        for (size_t i = 0; i < min_size(n[0], n[1]); i++) {
            double off = fabs(losses[1][i] - losses[0][i]) / losses[0][i];
            if (!(off <= worst)) worst = off;
        }
        check(t, worst <= (bf16 ? 1e-2 : 1e-4), "the losses differ by %.2e", worst);
        printf("    %s: 20 steps and %zu evaluations, losses differ by %.1e at most\n",
               bf16 ? "bf16" : "f32", n[0] - 20, worst);
        remove_run(out[0]);
        remove_run(out[1]);
    }
    unlink(data);
}

// Stopped and resumed, and looked at every step or every fourth only: the same bits.
static void test_gpu_resume(Test *t) {
    char data[200], whole[200], out[200];
    qlora_error err = {{0}};
    snprintf(data, sizeof data, "build/gpu-%d.jsonl", (int)getpid());
    snprintf(whole, sizeof whole, "build/gpu-%d-whole", (int)getpid());
    snprintf(out, sizeof out, "build/gpu-%d-part", (int)getpid());
    write_test_data(t, data, 8);
    GpuRun run = {"cuda", QLORA_COMPUTE_BF16, 1, false, 0, 6};
    remove_run(whole);
    check(t, !gpu_run(data, whole, run, &err), "%s", err.text);
    for (size_t i = 0; i < 3; i++) {
        remove_run(out);
        run = (GpuRun){"cuda", QLORA_COMPUTE_BF16, i == 2 ? 4 : 1, false,
                       i == 2 ? 0 : 2 + 3 * i, 6};
        int stopped_run = gpu_run(data, out, run, &err);
        check(t, (stopped_run != 0) == (i < 2), "%s", err.text);
        run.stop_at = 0;
        run.resume = true;
        if (i < 2) check(t, !gpu_run(data, out, run, &err), "%s", err.text);
        check(t, same_files(whole, out, "adapter_model.safetensors"), "%zu: another adapter", i);
        check(t, i == 2 || same_files(whole, out, "log.jsonl"), "case %zu: another log", i);
    }
    remove_run(whole);
    remove_run(out);
    unlink(data);
}

// Greedy and drawn, short prompt and one longer than a piece of the prefill would be alone.
static void test_gpu_generate(Test *t) {
    for (size_t i = 0; i < 8; i++) {
        int32_t *ids[2] = {NULL, NULL}, prompt[24];
        size_t n[2] = {0, 0};
        qlora_sampling how = {.max_new_tokens = 30, .top_p = 1, .repetition_penalty = 1,
                              .seed = 9 + i, .ignore_eos = 1};
        if (i % 4) { how.temperature = 0.8f; how.top_k = 40; how.repetition_penalty = 1.1f; }
        if (i % 4 == 2) { how.top_p = 0.8f; how.top_k = 0; }
        if (i % 4 == 3) how.min_p = 0.05f;
        for (int gpu = 0; gpu < 2; gpu++) {
            qlora_error err = {{0}};
            qlora_model *q = open_on(t, gpu ? "cuda" : "cpu", i / 4 ? "mistral" : "qwen2",
                                     QLORA_QUANT_NF4, QLORA_COMPUTE_F32);
            if (!q) return;
            for (size_t k = 0; k < 24; k++)
                prompt[k] = (int32_t)(random_u32(8, 8, 8, k) % q->transformer.config.V);
            int32_t *out = NULL;
            check(t, !qlora_generate(q, prompt, 1 + 11 * (i % 3), &how, NULL, NULL, &out, &n[gpu],
                                     &err), "%s", err.text);
            ids[gpu] = grab(n[gpu], sizeof *out);
            if (out) memcpy(ids[gpu], out, n[gpu] * sizeof *out);
            qlora_free(q, out);
            qlora_close(q);
        }
        check(t, n[0] == 30 && n[1] == 30 && memcmp(ids[0], ids[1], 30 * sizeof *ids[0]) == 0,
              "case %zu: the GPU writes another text", i);
        free(ids[0]);
        free(ids[1]);
    }
}

// Merged on the GPU: every byte as on the CPU.
static void test_gpu_merge(Test *t) {
    char out[2][200];
    for (int gpu = 0; gpu < 2; gpu++) {
        qlora_error err = {{0}};
        qlora_options opt = {.threads = 2, .device = gpu ? "cuda" : "cpu"};
        snprintf(out[gpu], sizeof out[gpu], "build/gpu-%d-merged-%d", (int)getpid(), gpu);
        remove_run(out[gpu]);
        check(t, !qlora_merge(MODELS "qwen2", MODELS "qwen2/adapter", out[gpu], (size_t)1 << 30,
                              &opt, NULL, &err), "%s", err.text);
    }
    check(t, same_files(out[0], out[1], "model.safetensors"), "the merged weights differ");
    remove_run(out[0]);
    remove_run(out[1]);
}

// NaN in a weight: never applied, told at the next read-back although no step waits for it.
static void test_gpu_not_finite(Test *t) {
    char data[200];
    snprintf(data, sizeof data, "build/gpu-%d-nan.jsonl", (int)getpid());
    write_test_data(t, data, 6);
    for (int k = 0; k < 2; k++) {
        qlora_error err = {{0}};
        qlora_train_options train = qlora_default_train_options();
        qlora_model *q = open_on(t, "cuda", "qwen2", QLORA_QUANT_NF4, QLORA_COMPUTE_BF16);
        if (!q) return;
        float bad = NAN;
        train.output_dir = NULL;
        train.val_split = 0;
        train.logging_steps = k ? 5 : 1;
        upload(&q->device, q->transformer.final_norm + 3, &bad, sizeof bad);
        check(t, qlora_train(q, data, &train, &err) == -1 && strstr(err.text, "step 1: the ") &&
              strstr(err.text, "is not a finite number and was not applied; samples of lines"),
              "%s", err.text);
        for (size_t i = 0; i < n_modules(&q->transformer); i++) {
            const Linear *linear = module_linear(&q->transformer, i);
            size_t n = linear->lora.r * linear->weight.N;
            real *B = fetched(&q->device, linear->lora.B, n);
            for (size_t j = 0; j < n; j++)
                if (!check(t, B[j] == 0, "B was changed")) break;
            free(B);
        }
        qlora_close(q);
    }
    unlink(data);
}

#ifdef CUDA_ON_CPU
int emulator_set(const char *words);
long emulator_calls(void);
void emulator_reset(void);

// Opens, takes one step, writes two tokens. Returns 0 when nothing failed; *calls counts what was
// asked of CUDA before closing.
static int small_run(const char *data, long *calls, qlora_error *err) {
    qlora_options opt = {.quant = QLORA_QUANT_NF4, .double_quant = 1, .threads = 1,
                         .device = "cuda"};
    qlora_train_options train = qlora_default_train_options();
    qlora_sampling how = {.max_new_tokens = 3, .top_p = 1, .repetition_penalty = 1,
                          .ignore_eos = 1};
    int32_t prompt[3] = {5, 6, 7}, *ids = NULL;
    size_t n;
    train.output_dir = NULL;
    train.lora_r = 2;
    train.target_modules = "v_proj";
    train.max_steps = 1;
    train.val_split = 0;
    train.per_device_train_batch_size = train.gradient_accumulation_steps = 1;
    qlora_model *q = qlora_open(MODELS "qwen2", &opt, err);
    int bad = !q || qlora_train(q, data, &train, err) ||
              qlora_generate(q, prompt, 3, &how, NULL, NULL, &ids, &n, err);
    *calls = emulator_calls();
    if (q) qlora_free(q, ids);
    qlora_close(q);
    return bad ? -1 : 0;
}

// The n-th call to CUDA fails, for n over the whole run: one line says what, and nothing crashes.
// Only the first name under which cuBLAS is looked for may fail unseen.
static void test_gpu_failing_calls(Test *t) {
    char data[200], words[40];
    long calls = 0, before, last = 0;
    size_t runs = 0, unseen = 0, at_end = 0;
    snprintf(data, sizeof data, "build/gpu-%d-fail.jsonl", (int)getpid());
    write_test_data(t, data, 2);
    for (long n = 1; n == 1 || n <= last; n++, runs++) {
        qlora_error err = {{0}};
        if (n == 1) {
            before = emulator_calls();
            check(t, !small_run(data, &calls, &err), "%s", err.text);
            last = calls - before;
        }
        snprintf(words, sizeof words, "fail_call=%ld", n);
        emulator_set(words);
        bool good = !small_run(data, &calls, &err);
        if (!good) unseen += at_end;
        at_end = good ? at_end + 1 : 0;
        check(t, good || (strlen(err.text) > 8 && !strchr(err.text, '\n')), "call %ld: \"%s\"", n,
              err.text);
        emulator_set("fail_call=0");
        emulator_reset();
    }
    check(t, unseen <= 1, "%zu of %zu calls failed unseen", unseen, runs);
    check(t, at_end <= 8, "the last %zu calls failed unseen", at_end);
    printf("    each of the %ld calls failed, %zu and the last %zu unseen\n", last, unseen, at_end);
    unlink(data);
}
#define EMULATED_TESTS_ROWS                                                                        \
    {"gpu_failing_calls", "any failing CUDA call ends in one clear line", test_gpu_failing_calls},
#else
#define EMULATED_TESTS_ROWS
#endif

#define GPU_TESTS                                                                                  \
    {"gpu_quantise", "4-bit weights are the CPU's, bit for bit", test_gpu_quantise},               \
    {"gpu_logits", "logits are the CPU's, float32 and bf16, quantised and not", test_gpu_logits},  \
    {"gpu_gradients", "loss and LoRA gradients are the CPU's, dropout on", test_gpu_gradients},    \
    {"gpu_training", "20 steps and evaluations are the CPU's", test_gpu_training},                 \
    {"gpu_resume", "stopped and resumed = never stopped, bit for bit", test_gpu_resume},           \
    {"gpu_generate", "greedy and drawn texts are the CPU's", test_gpu_generate},                   \
    {"gpu_merge", "merged files are the CPU's, byte for byte", test_gpu_merge},                    \
    {"gpu_not_finite", "NaN is never applied and is told at the next read-back", \
     test_gpu_not_finite}, \
    EMULATED_TESTS_ROWS
