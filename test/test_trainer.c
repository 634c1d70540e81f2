// The trainer: stopping, resuming, being killed, and files that are damaged.

enum { TRAIN_STEPS = 20 };

// What a test run does: at which step it asks to stop, or after how many polls.
typedef struct {
    size_t stop_at_step, polls_left, last_step;
    bool stop;
    double first_loss, last_loss;
} RunControl;

static void control_progress(void *user, const qlora_progress *p) {
    RunControl *c = user;
    if (c->last_step == 0) c->first_loss = p->loss;
    c->last_step = p->step;
    c->last_loss = p->loss;
    if (p->step == c->stop_at_step) c->stop = true;
}

static int control_stop(void *user) {
    RunControl *c = user;
    if (c->polls_left && --c->polls_left == 0) c->stop = true;
    return c->stop;
}

static void write_test_data(Test *t, const char *path, size_t records) {
    qlora_error err = {{0}};
    Buffer b = {.allocator = &heap};
    for (size_t i = 0; i < records; i++)
        buffer_printf(&b, &err, "{\"messages\": [\"Question %zu%s?\", \"Answer %zu%s.\"]}\n", i,
                      i % 3 ? "" : ", a longer one", i * 7 % 11, i % 2 ? "" : " and more");
    check(t, !write_file(path, b.data, b.size, &err), "%s", err.text);
    buffer_free(&b);
}

// Trains the tiny Qwen2 into `out`: 20 steps over more than two epochs, dropout, warmup, held-out
// samples. Returns what qlora_train does.
static int test_run(const char *data, const char *out, RunControl *control, bool resume_run,
                    size_t save_steps, int threads, qlora_error *err) {
    qlora_options opt = qlora_default_options();
    qlora_train_options train = qlora_default_train_options();
    opt.threads = threads;
    opt.compute = QLORA_COMPUTE_F32;
    opt.stop = control_stop;
    opt.stop_user = control;
    qlora_model *q = qlora_open(MODELS "qwen2", &opt, err);
    if (!q) return -1;
    train.output_dir = out;
    train.lora_r = 4;
    train.lora_dropout = 0.1f;
    train.learning_rate = 5e-3f;
    train.warmup_ratio = 0.15f;
    train.per_device_train_batch_size = 2;
    train.gradient_accumulation_steps = 2;
    train.max_steps = TRAIN_STEPS;
    train.save_steps = save_steps;
    train.save_total_limit = 2;
    train.resume = resume_run;
    train.progress = control_progress;
    train.user = control;
    int bad = qlora_train(q, data, &train, err);
    qlora_close(q);
    return bad;
}

static bool same_files(const char *a_dir, const char *b_dir, const char *name) {
    char a_path[300], b_path[300];
    Buffer a = {.allocator = &heap}, b = {.allocator = &heap};
    snprintf(a_path, sizeof a_path, "%s/%s", a_dir, name);
    snprintf(b_path, sizeof b_path, "%s/%s", b_dir, name);
    bool same = !read_whole_file(a_path, SIZE_MAX / 4, &a, NULL) &&
                !read_whole_file(b_path, SIZE_MAX / 4, &b, NULL) && a.size == b.size &&
                memcmp(a.data, b.data, a.size) == 0;
    buffer_free(&a);
    buffer_free(&b);
    return same;
}

static void remove_run(const char *out) {
    char command[500];
    snprintf(command, sizeof command, "rm -rf '%s'", out);
    if (system(command)) printf("    cannot remove %s\n", out);
}

// The uninterrupted run that the others are compared with.
static bool reference_run(Test *t, char out[200], char data[200]) {
    qlora_error err = {{0}};
    RunControl control = {0};
    snprintf(data, 200, "build/train-%d.jsonl", (int)getpid());
    snprintf(out, 200, "build/train-%d-whole", (int)getpid());
    write_test_data(t, data, 40);
    remove_run(out);
    bool ok = check(t, !test_run(data, out, &control, false, 0, 1, &err), "%s", err.text);
    return ok &&
           check(t, control.last_step == TRAIN_STEPS && control.last_loss < control.first_loss,
                 "%zu steps, loss %.3f to %.3f", control.last_step, control.first_loss,
                 control.last_loss);
}

// Stopped after every single step, and at every poll inside one, then resumed: the same adapter and
// log, bit for bit. Threads change on the way.
static void test_resume(Test *t) {
    char whole[200], data[200], out[200];
    if (!reference_run(t, whole, data)) return;
    for (size_t s = 1; s < TRAIN_STEPS; s++) {
        qlora_error err = {{0}};
        RunControl first = {.stop_at_step = s}, second = {0};
        snprintf(out, sizeof out, "build/train-%d-stop", (int)getpid());
        remove_run(out);
        check(t, test_run(data, out, &first, false, 0, 1 + (int)(s % 3), &err) &&
              strstr(err.text, "continue with --resume"), "step %zu: %s", s, err.text);
        check(t, !test_run(data, out, &second, true, 0, 1, &err), "step %zu: %s", s, err.text);
        check(t, same_files(whole, out, "adapter_model.safetensors"),
              "resumed after step %zu: the adapter differs", s);
        check(t, same_files(whole, out, "log.jsonl"), "resumed after step %zu: the log differs", s);
    }
    // Mid-accumulation: the unfinished step is dropped and done again.
    for (size_t polls = 1; polls < 40; polls += 3) {
        qlora_error err = {{0}};
        RunControl first = {.polls_left = polls}, second = {0};
        remove_run(out);
        check(t, test_run(data, out, &first, false, 0, 2, &err) != 0, "it was not stopped");
        check(t, !test_run(data, out, &second, true, 0, 2, &err), "%zu polls: %s", polls, err.text);
        check(t, same_files(whole, out, "adapter_model.safetensors"),
              "resumed after %zu polls: the adapter differs", polls);
    }
    remove_run(out);
    remove_run(whole);
    unlink(data);
}

// Killed at 200 random moments, mid-save among them: what is left can always be resumed and ends in
// the same bits.
static void test_kill(Test *t) {
    enum { KILLS = 200 };
    char whole[200], data[200], out[200];
    Random random = {11, 0};
    size_t kills = 0, finished = 0, attempts = 0;
    if (!reference_run(t, whole, data)) return;
    snprintf(out, sizeof out, "build/train-%d-kill", (int)getpid());
    remove_run(out);
    while ((kills < KILLS || finished == 0) && attempts++ < 4000 && !t->failures) {
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            qlora_error err = {{0}};
            RunControl control = {0};
            _exit(test_run(data, out, &control, true, 1, 1, &err) ? 1 : 0);
        }
        if (kills < KILLS) {
            usleep((useconds_t)(uniform(&random) * 60000));
            kill(child, SIGKILL);
        }
        int status;
        waitpid(child, &status, 0);
        if (WIFSIGNALED(status)) { kills++; continue; }
        check(t, WIFEXITED(status) && WEXITSTATUS(status) == 0,
              "a resumed run failed after %zu kills", kills);
        check(t, same_files(whole, out, "adapter_model.safetensors"),
              "after %zu kills the adapter differs", kills);
        finished++;
        remove_run(out);
    }
    check(t, kills >= KILLS, "only %zu kills hit", kills);
    printf("    %zu kills, %zu runs finished, all with the same bits\n", kills, finished);
    remove_run(out);
    remove_run(whole);
    unlink(data);
}

// A damaged newest checkpoint (cut to many lengths, or one bit changed) is passed over for the one
// before it; the run still ends in the same bits. save_total_limit keeps what it says.
static void test_damaged_checkpoint(Test *t) {
    char whole[200], data[200], out[200], newest[300], text[400];
    Random random = {12, 0};
    if (!reference_run(t, whole, data)) return;
    snprintf(out, sizeof out, "build/train-%d-damaged", (int)getpid());
    snprintf(newest, sizeof newest, "%s/checkpoint-13/state.bin", out);
    for (int k = 0; k < 12; k++) {
        qlora_error err = {{0}};
        RunControl first = {.stop_at_step = 13}, second = {0};
        Buffer state = {.allocator = &heap};
        remove_run(out);
        check(t, test_run(data, out, &first, false, 4, 1, &err) != 0, "it was not stopped");
        if (!check(t, !read_whole_file(newest, SIZE_MAX / 4, &state, &err), "%s", err.text)) return;
        size_t at = k == 0 ? 0 : k == 1 ? state.size - 1 : pick(&random, 0, state.size - 1);
        if (k % 2) state.data[at] ^= 1;
        else state.size = at;
        check(t, !write_file(newest, state.data, state.size, &err), "%s", err.text);
        check(t, !test_run(data, out, &second, true, 4, 1, &err), "damage %d: %s", k, err.text);
        check(t, same_files(whole, out, "adapter_model.safetensors"),
              "damage %d: the adapter differs", k);
        buffer_free(&state);
    }
    size_t kept = 0;
    DIR *directory = opendir(out);
    for (struct dirent *e; directory && (e = readdir(directory)) != NULL;)
        kept += strncmp(e->d_name, "checkpoint-", 11) == 0;
    if (directory) closedir(directory);
    check(t, kept == 2 || kept == 3, "%zu checkpoints are kept, the limit is 2 and the best", kept);
    // Other settings are no continuation.
    qlora_error err = {{0}};
    RunControl control = {0};
    snprintf(text, sizeof text, "%s.other", data);
    write_test_data(t, text, 39);
    check(t, test_run(text, out, &control, true, 4, 1, &err) && strstr(err.text, "other settings"),
          "resumed with other data: %s", err.text);
    unlink(text);
    remove_run(out);
    remove_run(whole);
    unlink(data);
}

// A NaN or infinity in loss or gradient ends the run in the same step, names the samples, and
// is never applied: B is still zero.
static void test_not_finite_loss(Test *t) {
    char data[200];
    snprintf(data, sizeof data, "build/train-%d-nan.jsonl", (int)getpid());
    write_test_data(t, data, 12);
    for (int k = 0; k < 3; k++) {
        qlora_error err = {{0}};
        qlora_options opt = {.quant = QLORA_QUANT_NF4, .double_quant = 1, .threads = 2,
                             .compute = k == 1 ? QLORA_COMPUTE_BF16 : QLORA_COMPUTE_F32};
        qlora_train_options train = qlora_default_train_options();
        qlora_model *q = qlora_open(MODELS "qwen2", &opt, &err);
        if (!check(t, q != NULL, "%s", err.text)) return;
        train.output_dir = NULL;
        train.val_split = 0;
        const float *broken = k < 2 ? q->transformer.final_norm : q->transformer.layers[1].mlp_norm;
        ((float *)(uintptr_t)broken)[3] = k < 2 ? NAN : INFINITY;
        check(t, qlora_train(q, data, &train, &err) == -1 && strstr(err.text, "step 1: the ") &&
              strstr(err.text, "is not a finite number and was not applied; samples of lines"),
              "case %d: %s", k, err.text);
        for (size_t i = 0; i < n_modules(&q->transformer); i++) {
            const Linear *linear = module_linear(&q->transformer, i);
            for (size_t n = 0; n < linear->lora.r * linear->weight.N; n++)
                if (!check(t, linear->lora.B[n] == 0, "case %d: B was changed", k)) break;
        }
        qlora_close(q);
    }
    unlink(data);
}

#define TRAINER_TESTS                                                                              \
    {"resume", "stopped at every step and resumed = never stopped, bit for bit", test_resume},     \
        {"kill", "killed 200 times at random and resumed = never killed", test_kill},              \
        {"not_finite_loss", "NaN and infinity stop the step and are never applied",                \
         test_not_finite_loss},                                                                    \
        {"damaged_checkpoint", "a damaged checkpoint is passed over for the one before",           \
         test_damaged_checkpoint},
