// Datasets: every format, every refusal with its place, truncation, packing, and the checks that
// `train` and `inspect` share.

typedef struct {
    qlora_model *q;
    Dataset d;
    DatasetOptions how;
    const char *paths[4];
    char names[4][100];
    size_t n_paths;
} DataTest;

static bool open_data_test(Test *t, DataTest *x, const char *model) {
    *x = (DataTest){.q = open_test_model(t, model, QLORA_QUANT_NONE, 0, QLORA_COMPUTE_F32, 2)};
    qlora_error err = {{0}};
    if (!x->q || !check(t, !need_chat(x->q, &err), "%s", err.text)) return false;
    x->how = (DatasetOptions){.max_length = 1024, .take_to = SIZE_MAX, .max_samples = SIZE_MAX,
                              .allocator = &x->q->allocator, .pool = x->q->device.pool};
    return true;
}

static void add_file(Test *t, DataTest *x, const char *text, size_t n) {
    qlora_error err = {{0}};
    snprintf(x->names[x->n_paths], sizeof *x->names, "build/data-%d-%zu.jsonl", (int)getpid(),
             x->n_paths);
    x->paths[x->n_paths] = x->names[x->n_paths];
    check(t, !write_file(x->names[x->n_paths++], text, n, &err), "%s", err.text);
}

static int read_test_data(DataTest *x, qlora_error *err) {
    return dataset_open(&x->d, x->paths, x->n_paths, &x->q->chat, x->q->tokenizer, &x->how, err);
}

static void remove_files(DataTest *x) {
    while (x->n_paths) unlink(x->paths[--x->n_paths]);
}

// A sample's text, learnt runs in brackets.
static void render(Test *t, const DataTest *x, size_t i, char out[2000]) {
    const Sample *s = &x->d.samples[i];
    Buffer text = {.allocator = &heap};
    qlora_error err = {{0}};
    int bad = 0;
    for (size_t k = 0, n; k < s->length && !bad; k += n) {
        uint8_t learn = x->d.learn[s->first + k];
        for (n = 0; k + n < s->length && x->d.learn[s->first + k + n] == learn;) n++;
        bad = buffer_printf(&text, &err, learn ? "[" : "") ||
              tokenizer_decode(x->q->tokenizer, x->d.ids + s->first + k, n, false, &text, &err) ||
              buffer_printf(&text, &err, learn ? "]" : "");
    }
    check(t, !bad, "%s", err.text);
    snprintf(out, 2000, "%.*s", (int)text.size, text.data ? text.data : "");
    buffer_free(&text);
}

// ---------------------------------------------------------------------------------------- formats

#define SYSTEM "<|im_start|>system\nS<|im_end|>\n"
#define USER(text) "<|im_start|>user\n" text "<|im_end|>\n"
#define ASKED "<|im_start|>assistant\n"
#define ANSWER(text) ASKED "[" text "<|im_end|>]\n"

typedef struct {
    const char *record;
    const char *expected;           // of the sample after the system turn; of the error otherwise
    const char *fields;             // "user assistant", or NULL
    int mask;                       // row of mask_rows
} FormatCase;

static const FormatCase good_records[] = {
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", "
     "\"content\": \"b\"}]}", USER("a") ANSWER("b"), NULL, 0},
    {"{\"messages\": [\"a\", \"b\", \"c\", \"d\"]}",
     USER("a") ANSWER("b") USER("c") ANSWER("d"), NULL, 0},
    {"{\"id\": 3, \"conversations\": [{\"from\": \"human\", \"value\": \"a\"}, {\"from\": \"gpt\", "
     "\"value\": \"b\"}], \"tools\": \"[]\"}", USER("a") ANSWER("b"), NULL, 0},
    {"{\"conversations\": [{\"role\": \"user\", \"content\": \"a\"}, {\"from\": \"gpt\", "
     "\"value\": \"b\"}]}", USER("a") ANSWER("b"), NULL, 0},
    {"{\"instruction\": \"a\", \"input\": \"i\", \"output\": \"b\"}", USER("a\ni") ANSWER("b"),
     NULL, 0},
    {"{\"instruction\": \"a\", \"input\": \"\", \"output\": \"b\", \"text\": \"x\"}",
     USER("a") ANSWER("b"), NULL, 0},
    {"{\"instruction\": \"a\", \"output\": \"b\", \"history\": [[\"p\", \"q\"]]}",
     USER("p") ANSWER("q") USER("a") ANSWER("b"), NULL, 0},
    {"{\"instruction\": \"a\", \"context\": \"c\", \"response\": \"b\", \"category\": \"x\"}",
     USER("a\nc") ANSWER("b"), NULL, 0},
    {"{\"prompt\": \"a\", \"completion\": \"b\"}", USER("a") ANSWER("b"), NULL, 0},
    {"{\"id\": 7, \"input\": \"a\", \"output\": \"b\"}", USER("a") ANSWER("b"), NULL, 0},
    {"{\"question\": \"a\", \"answer\": \"b\", \"text\": \"x\"}", USER("a") ANSWER("b"),
     "question answer", 0},
    {"{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"a\"}, "
     "{\"type\": \"text\", \"text\": \"z\"}]}, {\"role\": \"assistant\", \"content\": [{\"type\": "
     "\"text\", \"value\": \"b\"}], \"loss_weight\": 1.0}]}", USER("az") ANSWER("b"), NULL, 0},
    // what is learnt
    {"{\"messages\": [\"a\", \"b\", \"c\", \"d\"]}",
     USER("a") ASKED "b<|im_end|>\n" USER("c") ANSWER("d"), NULL, 2},
    {"{\"messages\": [\"a\", \"b\"]}", USER("a") "[" ASKED "b<|im_end|>\n]", NULL, 1},
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", "
     "\"content\": \"b\", \"weight\": 0}, {\"role\": \"user\", \"content\": \"c\"}, {\"role\": "
     "\"assistant\", \"content\": \"d\", \"weight\": 1}]}",
     USER("a") ASKED "b<|im_end|>\n" USER("c") ANSWER("d"), NULL, 0},
    {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", "
     "\"content\": \"b\", \"train\": false}, {\"role\": \"user\", \"content\": \"c\"}, {\"role\": "
     "\"assistant\", \"content\": \"d\", \"train\": true}]}",
     USER("a") ASKED "b<|im_end|>\n" USER("c") "[" ASKED "d<|im_end|>\n]", NULL, 1},
    // characters
    {"{\"prompt\": \"\\u4f60\\ud83d\\ude00\", \"completion\": \"\xC3\xA9\"}",
     USER("\xE4\xBD\xA0\xF0\x9F\x98\x80") ANSWER("\xC3\xA9"), NULL, 0},
};

static void set_fields(DataTest *x, const char *fields, char copy[100]) {
    x->how.fields = (RecordFormat){0};
    if (!fields) return;
    snprintf(copy, 100, "%s", fields);
    char *space = strchr(copy, ' ');
    *space = 0;
    x->how.fields = (RecordFormat){.user = copy, .assistant = space + 1};
}

// Each record as a line, as a line with CRLF after a BOM, and as an array.
static void test_data_formats(Test *t) {
    DataTest x;
    if (!open_data_test(t, &x, MODELS "qwen2")) return;
    for (size_t i = 0; i < sizeof good_records / sizeof *good_records; i++) {
        const FormatCase *c = &good_records[i];
        static const char *const shapes[] = {"%s", "\xEF\xBB\xBF\r\n%s\r\n", " [\n %s \n]\n"};
        for (int shape = 0; shape < 3; shape++) {
            char text[2000], got[2000], fields[100];
            qlora_error err = {{0}};
            set_fields(&x, c->fields, fields);
            x.how.mask = mask_rows[c->mask].kind;
            x.how.mask_last = mask_rows[c->mask].last;
            snprintf(text, sizeof text, shapes[shape], c->record);
            add_file(t, &x, text, strlen(text));
            if (check(t, !read_test_data(&x, &err) && x.d.n == 1, "%s: %s", c->record, err.text)) {
                render(t, &x, 0, got);
                const char *tail = strstr(got, "<|im_end|>\n");       // of the default system turn
                check(t, tail && strcmp(tail + 11, c->expected) == 0, "%s gives %s", c->record,
                      got);
                check(t, x.d.samples[0].line == (shape ? 2 : 1), "line %zu", x.d.samples[0].line);
            }
            dataset_close(&x.d);
            remove_files(&x);
        }
    }
    qlora_close(x.q);
}

static const FormatCase bad_records[] = {
    {"{\"messages\": [{\"role\": \"user\" \"content\": \"x\"}]}", ":2:31: expected ',' or '}'",
     NULL, 0},
    {"{\"question\": \"x\", \"answer\": \"y\"}", ":2:1: no known format; found the keys "
     "\"question\", \"answer\"; name the columns, perhaps --field-user question --field-assistant "
     "answer; known are", NULL, 0},
    {"{\"a\": \"x\", \"answer\": \"y\"}", ":2:1: expected \"question\", found the keys \"a\", "
     "\"answer\"", "question answer", 0},
    {"{\"prompt\": 1, \"completion\": \"y\"}", "\"prompt\": expected a string, found a number",
     NULL, 0},
    {"{\"messages\": {}}", "\"messages\": expected an array, found an object", NULL, 0},
    {"{\"messages\": []}", "expected at least one message", NULL, 0},
    {"{\"messages\": [\"a\", 3]}", "message 2: expected an object or a string, found a number",
     NULL, 0},
    {"{\"messages\": [{\"speaker\": \"x\"}]}", "message 1: expected \"role\" and \"content\", or "
     "\"from\" and \"value\", found the keys \"speaker\"", NULL, 0},
    {"{\"messages\": [{\"role\": \"user\"}]}", "message 1: expected \"content\", found the keys "
     "\"role\"", NULL, 0},
    {"{\"messages\": [{\"role\": \"tool\", \"content\": \"x\"}]}", "tool calls are not supported",
     NULL, 0},
    {"{\"conversations\": [{\"from\": \"function_call\", \"value\": \"x\"}]}",
     "message 1: role \"function_call\": tool calls are not supported", NULL, 0},
    {"{\"conversations\": [{\"from\": \"narrator\", \"value\": \"x\"}]}",
     "role \"narrator\" is not supported; expected system, user (human) or assistant (gpt)", NULL,
     0},
    {"{\"messages\": [\"a\", \"b\"], \"tools\": \"[{}, 1]\"}", "\"tools\": tool calls", NULL, 0},
    {"{\"messages\": [\"a\", \"b\"], \"images\": [\"x.jpg\"]}", "\"images\": images, video", NULL,
     0},
    {"{\"prompt\": \"a\", \"chosen\": [\"b\"], \"rejected\": [\"c\"]}",
     "\"chosen\": preference data (DPO, KTO) are not supported", NULL, 0},
    {"{\"prompt\": \"a\", \"completion\": \"b\", \"label\": false}", "\"label\": preference", NULL,
     0},
    {"{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", \"weight\": 0.5}]}",
     "message 1: \"weight\": expected 0 or 1, found 0.5", NULL, 0},
    {"{\"messages\": [{\"role\": \"assistant\", \"content\": \"a\", \"train\": \"no\"}]}",
     "message 1: \"train\": expected true or false, found no", NULL, 0},
    {"{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]}",
     "expected a string or parts of type \"text\", found image_url", NULL, 0},
    {"{\"prompt\": \"a\", \"completion\": \"\xC3(\"}", "invalid UTF-8", NULL, 0},
    {"{\"prompt\": \"a\", \"completion\": \"\\ud800\"}", "high surrogate", NULL, 0},
    {"{\"prompt\": \"a\",", ":2:16: the record does not end on its line; write one object a line",
     NULL, 0},
    {"{\"text\": \"a\"} {\"text\": \"b\"}", ":2:15: expected the end of the record", NULL, 0},
    {"Once upon a time", ":2:1: expected a record {...} on each line", NULL, 0},
    {"{\"instruction\": \"a\", \"output\": \"b\", \"history\": [[\"p\"]]}", "\"history\": expected "
     "pairs", NULL, 0},
};

// Every one is an error of line 2 of the file, or counted.
static void test_data_errors(Test *t) {
    DataTest x;
    if (!open_data_test(t, &x, MODELS "qwen2")) return;
    for (size_t i = 0; i < sizeof bad_records / sizeof *bad_records; i++) {
        const FormatCase *c = &bad_records[i];
        char text[2000], fields[100], place[200];
        qlora_error err = {{0}};
        set_fields(&x, c->fields, fields);
        snprintf(text, sizeof text, "%s\n%s\n", c->fields ? "{\"question\":\"q\",\"answer\":\"a\"}"
                                                         : "{\"text\": \"x\"}", c->record);
        add_file(t, &x, text, strlen(text));
        snprintf(place, sizeof place, "%s:2:", x.paths[0]);
        x.how.skip_bad_lines = false;
        check(t, read_test_data(&x, &err) != 0, "%s was accepted", c->record);
        check(t, strncmp(err.text, place, strlen(place)) == 0 && strstr(err.text, c->expected),
              "%s: %s", c->record, err.text);
        x.how.skip_bad_lines = true;
        check(t, !read_test_data(&x, &err) && x.d.n == 1 && x.d.tally[TALLY_BAD].n == 1 &&
              x.d.tally[TALLY_BAD].line == 2, "%s was not counted", c->record);
        dataset_close(&x.d);
        remove_files(&x);
    }
    qlora_close(x.q);
}

// Raw text gets BOS and an end token, each once, and all but the first token is learnt.
static void test_data_raw_text(Test *t) {
    static const struct { const char *record, *expected; } cases[] = {
        {"{\"text\": \"Once upon\"}", "<s>[Once upon</s>]"},
        {"{\"text\": \"<s>Once upon</s>\"}", "<s>[Once upon</s>]"},
        {"{\"text\": \"Once upon</s>\"}", "<s>[Once upon</s>]"},
        {"{\"text\": \"\"}", "<s>[</s>]"}};
    DataTest x;
    if (!open_data_test(t, &x, MODELS "llama")) return;
    for (size_t i = 0; i < 4; i++) {
        char got[2000], squeezed[2000];
        size_t n = 0;
        qlora_error err = {{0}};
        add_file(t, &x, cases[i].record, strlen(cases[i].record));
        if (check(t, !read_test_data(&x, &err) && x.d.n == 1, "%s", err.text)) {
            render(t, &x, 0, got);
            // A sentencepiece tokenizer writes a space before a text; its place is not the point.
            for (const char *c = got; *c; c++)
                if (*c != ' ' || isalpha((unsigned char)c[-1])) squeezed[n++] = *c;
            squeezed[n] = 0;
            check(t, strcmp(squeezed, cases[i].expected) == 0, "%s gives %s", cases[i].record, got);
        }
        dataset_close(&x.d);
        remove_files(&x);
    }
    qlora_close(x.q);
}

// -------------------------------------------------------------------------------- what is kept

static void numbered_records(Buffer *b, size_t first, size_t n) {
    qlora_error err;
    for (size_t i = first; i < first + n; i++) {
        buffer_printf(b, &err, "{\"messages\": [\"Question %zu, which is", i);
        for (size_t k = 0; k < i * 7 % 13; k++) buffer_printf(b, &err, " really");
        buffer_printf(b, &err, " the one?\", \"It is answer %zu", i);
        for (size_t k = 0; k < i * 5 % 11; k++) buffer_printf(b, &err, " and more");
        buffer_printf(b, &err, ".\"]}\n");
    }
}

static void test_data_truncation(Test *t) {
    DataTest x;
    Dataset whole;
    Buffer text = {.allocator = &heap};
    qlora_error err = {{0}};
    if (!open_data_test(t, &x, MODELS "llama")) return;     // its template begins with BOS
    numbered_records(&text, 0, 20);
    add_file(t, &x, text.data, text.size);
    check(t, !read_test_data(&x, &err) && x.d.n == 20, "%s", err.text);
    whole = x.d;
    size_t lengths[20], L, longer = 0, bos = 0;
    for (size_t i = 0; i < 20; i++) lengths[i] = whole.samples[i].length;
    qsort(lengths, 20, sizeof *lengths, by_number);
    L = lengths[9];
    x.how.max_length = L;
    for (size_t i = 0; i < 20; i++) longer += whole.samples[i].length > L;
    check(t, longer > 3 && longer < 17, "%zu of 20 are longer", longer);
    for (int kind = TRUNCATE_DROP; kind <= TRUNCATE_KEEP_END; kind++) {
        x.how.truncate = (Truncate)kind;
        check(t, !read_test_data(&x, &err), "%s", err.text);
        const Tally *tally = x.d.tally;
        check(t, kind == TRUNCATE_DROP ? x.d.n == 20 - longer && tally[TALLY_TOO_LONG].n == longer
                                       : x.d.n + tally[TALLY_UNSUPERVISED].n == 20 &&
                                         !tally[TALLY_TOO_LONG].n, "%s: %zu samples, %zu too long",
              truncate_names[kind], x.d.n, tally[TALLY_TOO_LONG].n);
        size_t cut_answers = 0;
        for (size_t i = 0; i < x.d.n; i++) {
            const Sample *s = &x.d.samples[i], *w = &whole.samples[s->line - 1];
            const int32_t *ids = x.d.ids + s->first, *all = whole.ids + w->first;
            size_t head = kind == TRUNCATE_KEEP_END && w->length > L, supervised = 0;
            size_t shift = head ? w->length - L : 0;
            check(t, s->length == min_size(w->length, L) && ids[0] == all[0] &&
                  !memcmp(ids + head, all + head + shift, (s->length - head) * sizeof *ids),
                  "%s: sample of line %zu", truncate_names[kind], s->line);
            for (size_t k = 0; k < s->length; k++) supervised += x.d.learn[s->first + k];
            check(t, supervised == s->supervised && supervised && !x.d.learn[s->first],
                  "%zu supervised, counted %zu", supervised, s->supervised);
            cut_answers += kind == TRUNCATE_KEEP_START && supervised < w->supervised;
            bos += ids[0] == x.q->tokenizer->bos_id;
        }
        check(t, tally[TALLY_CUT_ANSWER].n == cut_answers &&
              (kind != TRUNCATE_KEEP_START || cut_answers), "%zu answers are cut, counted %zu",
              cut_answers, tally[TALLY_CUT_ANSWER].n);
        check(t, x.d.n_lengths == 20 && x.d.longest == whole.longest, "other lengths than before");
        dataset_close(&x.d);
    }
    check(t, bos > 40, "only %zu samples begin with BOS", bos);
    dataset_close(&whole);
    remove_files(&x);
    buffer_free(&text);
    qlora_close(x.q);
}

// --take and --max-samples over two files, against the whole; and on any number of threads.
static void test_data_selection(Test *t) {
    static const struct { const char *take; size_t most, first, n; } cases[] = {
        {NULL, SIZE_MAX, 0, 900}, {"0:1", SIZE_MAX, 0, 1}, {"598:603", SIZE_MAX, 598, 5},
        {"890:", SIZE_MAX, 890, 10}, {":3", SIZE_MAX, 0, 3}, {"100:5000", 7, 100, 7},
        {NULL, 650, 0, 650}, {"2000:", SIZE_MAX, 0, 0}};
    static const char *const wrong[] = {"", "3", "5:5", "6:5", "-1:2", "a:b", "1:2:3", "1:2x",
                                        "99999999999999999999:", " 1:2"};
    DataTest x;
    Dataset whole;
    Buffer text = {.allocator = &heap};
    qlora_error err = {{0}};
    if (!open_data_test(t, &x, MODELS "qwen2")) return;
    numbered_records(&text, 0, 600);
    add_file(t, &x, text.data, text.size);
    text.size = 0;
    numbered_records(&text, 600, 300);
    add_file(t, &x, text.data, text.size);
    check(t, !read_test_data(&x, &err), "%s", err.text);
    whole = x.d;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Pool *pool = pool_open((int)i % 4 * 2 + 1, &heap, &err), *old = x.how.pool;
        check(t, !parse_take(cases[i].take, &x.how, &err), "%s", err.text);
        x.how.max_samples = cases[i].most;
        x.how.pool = pool;
        check(t, !read_test_data(&x, &err), "%s", err.text);
        x.how.pool = old;
        check(t, x.d.n == cases[i].n, "case %zu: %zu samples", i, x.d.n);
        for (size_t k = 0; k < x.d.n; k++) {
            const Sample *s = &x.d.samples[k], *w = &whole.samples[cases[i].first + k];
            check(t, s->length == w->length && s->line == w->line && s->file == w->file &&
                  !memcmp(x.d.ids + s->first, whole.ids + w->first, s->length * sizeof(int32_t)) &&
                  !memcmp(x.d.learn + s->first, whole.learn + w->first, s->length),
                  "case %zu, sample %zu", i, k);
        }
        check(t, x.d.n > 0 || (dataset_usable(&x.d, &x.how, &err) &&
              strstr(err.text, "no record was taken of the 900")), "%s", err.text);
        dataset_close(&x.d);
        pool_close(pool);
    }
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        check(t, parse_take(wrong[i], &x.how, &err), "--take %s was accepted", wrong[i]);
    dataset_close(&whole);
    remove_files(&x);
    buffer_free(&text);
    qlora_close(x.q);
}

// A directory: train.jsonl to learn from, valid.jsonl held out, test.jsonl to score.
static void test_data_directory(Test *t) {
    static const char *const names[] = {"train.jsonl", "valid.jsonl", "test.jsonl"};
    static const size_t sizes[] = {12, 5, 3};
    char directory[100], path[200];
    qlora_error err = {{0}};
    qlora_train_options o = qlora_default_train_options();
    DataTest x;
    if (!open_data_test(t, &x, MODELS "qwen2")) return;
    snprintf(directory, sizeof directory, "build/data-%d", (int)getpid());
    remove_run(directory);
    check(t, !make_directory(directory, &err), "%s", err.text);
    for (int i = 0; i < 3; i++) {
        Buffer text = {.allocator = &heap};
        for (size_t k = 0; k < sizes[i]; k++)
            buffer_printf(&text, &err, "{\"text\": \"%d %zu\"}\n", i, k);
        snprintf(path, sizeof path, "%s/%s", directory, names[i]);
        check(t, !write_file(path, text.data, text.size, &err), "%s", err.text);
        buffer_free(&text);
    }
    for (int scoring = 0; scoring < 2; scoring++) {
        Trainer trainer = new_trainer(x.q, &o, &err);
        check(t, !read_data_options(&trainer) && !open_data(&trainer, directory, scoring), "%s",
              err.text);
        check(t, scoring ? trainer.data.n == 3 && !trainer.val_data.n
                         : trainer.train.n == 12 && trainer.val.n == 5, "%zu, %zu and %zu samples",
              trainer.data.n, trainer.train.n, trainer.val.n);
        trainer_close(&trainer);
    }
    unlink(path);
    Trainer trainer = new_trainer(x.q, &o, &err);
    check(t, !read_data_options(&trainer) && open_data(&trainer, directory, true) &&
          strstr(err.text, "is a directory without test.jsonl: name the file"), "%s", err.text);
    trainer_close(&trainer);
    remove_run(directory);
    qlora_close(x.q);
}

// ----------------------------------------------------------------------------------------- packing

// Best-fit decreasing, the plain way: look at every pack for each document.
static size_t plain_packing(const size_t *length, size_t n, size_t room, size_t *pack) {
    size_t *left = grab(n, sizeof *left), *age = grab(n, sizeof *age), n_packs = 0, clock = 0;
    bool *placed = grab(n, 1);
    for (size_t k = 0; k < n; k++) {
        size_t longest = SIZE_MAX, best = SIZE_MAX;
        for (size_t i = 0; i < n; i++)
            if (!placed[i] && (longest == SIZE_MAX || length[i] > length[longest])) longest = i;
        for (size_t p = 0; p < n_packs; p++)
            if (left[p] >= length[longest] &&
                (best == SIZE_MAX || left[p] < left[best] ||
                 (left[p] == left[best] && age[p] > age[best])))
                best = p;
        if (best == SIZE_MAX) left[best = n_packs++] = room;
        left[best] -= length[longest];
        age[best] = ++clock;
        pack[longest] = best;
        placed[longest] = true;
    }
    free(left);
    free(age);
    free(placed);
    return n_packs;
}

static void test_packing(Test *t) {
    enum { MOST = 300 };
    Random random = {5, 0};
    qlora_error err = {{0}};
    for (int round = 0; round < 60; round++) {
        Region region = {.allocator = &heap};
        size_t n = pick(&random, 1, MOST), room = round % 4 ? pick(&random, 1, 300) : 64, total = 0;
        size_t length[MOST], expected[MOST], seen[MOST] = {0};
        Dataset d = {.samples = region_alloc(&region, n, sizeof *d.samples, &err), .n = n};
        SampleList list = {.data = &d, .n = n};
        list.index = region_alloc(&region, n, sizeof *list.index, &err);
        list.pack = region_alloc(&region, n + 1, sizeof *list.pack, &err);
        for (size_t i = 0; i < n; i++) {
            d.samples[i].length = length[i] = pick(&random, 1, round % 3 ? room : room / 8 + 1);
            list.index[i] = (uint32_t)i;
            total += length[i];
        }
        check(t, !pack_samples(&list, room, &region, &err), "%s", err.text);
        size_t packs = plain_packing(length, n, room, expected);
        check(t, list.n_packs == packs && packs * room >= total, "%zu packs, expected %zu",
              list.n_packs, packs);
        check(t, list.pack[0] == 0 && list.pack[list.n_packs] == n, "the packs do not cover");
        for (size_t p = 0; p < list.n_packs; p++) {
            size_t sum = 0;
            for (size_t i = list.pack[p]; i < list.pack[p + 1]; i++) {
                sum += length[list.index[i]];
                seen[list.index[i]]++;
                check(t, expected[list.index[i]] == p, "sample %u is in pack %zu, expected %zu",
                      list.index[i], p, expected[list.index[i]]);
                check(t, i == list.pack[p] || length[list.index[i]] <= length[list.index[i - 1]],
                      "a pack is not in descending order");
            }
            check(t, sum <= room, "pack %zu holds %zu of %zu", p, sum, room);
        }
        for (size_t i = 0; i < n; i++) check(t, seen[i] == 1, "sample %zu is there %zu times", i,
                                             seen[i]);
        region_free(&region);
    }
}

// Short documents: the test models see at most 128 tokens.
static void write_short_data(Test *t, const char *path, size_t records) {
    qlora_error err = {{0}};
    Buffer b = {.allocator = &heap};
    for (size_t i = 0; i < records; i++) {
        buffer_printf(&b, &err, "{\"text\": \"%zu:", i);
        for (size_t k = 0; k < 2 + i * 7 % 23; k++) buffer_printf(&b, &err, " %zu", (i + k) % 10);
        buffer_printf(&b, &err, "\"}\n");
    }
    check(t, !write_file(path, b.data, b.size, &err), "%s", err.text);
    buffer_free(&b);
}

// A pack's gradient is the sum of its documents', bit for bit: they do not see each other.
static void test_pack_gradient(Test *t) {
    qlora_model *q = trainable_model(t, "qwen2", QLORA_COMPUTE_F32, 2, 0.1f, NULL);
    qlora_error err = {{0}};
    qlora_train_options o = qlora_default_train_options();
    char data[100];
    if (!q) return;
    snprintf(data, sizeof data, "build/pack-%d.jsonl", (int)getpid());
    write_short_data(t, data, 24);
    double loss = 0;
    o.packing = "bfd";
    o.max_length = 100;
    o.val_split = 0;
    o.per_device_train_batch_size = 1;
    Trainer x = new_trainer(q, &o, &err);
    bool ok = check(t, !need_chat(q, &err) && !read_data_options(&x) &&
                    !open_data(&x, data, false) &&
                    !prepare_training(&x), "%s", err.text);
    ok = ok && check(t, !session_open(&x.session, q, x.shape, &err), "%s", err.text);
    check(t, !ok || (x.train.n_packs < 15 && x.shape.n_spans > 2 && x.shape.T <= 100),
          "%zu packs, at most %zu tokens", x.train.n_packs, x.shape.T);
    for (size_t p = 0; ok && p < x.train.n_packs; p++) {
        size_t first = x.train.pack[p], n = x.train.pack[p + 1] - first;
        size_t bytes = q->transformer.n_parameters * sizeof(real);
        LabelledBatch batch = make_batch(&x, &x.data, x.train.index + first, n, 0, 3, true);
        clear_gradients(q);
        loss_and_gradients(&q->transformer, &x.session.w, &batch, &loss, (real)0.01, true);
        real *packed = copy_gradients(q);
        clear_gradients(q);
        for (size_t i = 0; i < n; i++) {
            batch = make_batch(&x, &x.data, x.train.index + first + i, 1, i, 3, true);
            loss_and_gradients(&q->transformer, &x.session.w, &batch, &loss, (real)0.01,
                               true);
        }
        check(t, memcmp(packed, q->transformer.gradients, bytes) == 0,
              "pack %zu: the gradient is not the sum of its %zu documents'", p, n);
        free(packed);
    }
    if (ok) session_close(&x.session);
    trainer_close(&x);
    unlink(data);
    qlora_close(q);
}

static int packed_run(const char *data, const char *out, RunControl *control, bool again,
                      size_t batch, qlora_error *err) {
    qlora_options opt = qlora_default_options();
    qlora_train_options train = qlora_default_train_options();
    opt.compute = QLORA_COMPUTE_F32;
    opt.stop = control_stop;
    opt.stop_user = control;
    qlora_model *q = qlora_open(MODELS "qwen2", &opt, err);
    if (!q) return -1;
    train.output_dir = out;
    train.lora_r = 4;
    train.lora_dropout = 0.1f;
    train.packing = "bfd";
    train.max_length = 100;
    train.per_device_train_batch_size = batch;
    train.gradient_accumulation_steps = 4 / batch;
    train.max_steps = 7;
    train.resume = again;
    train.progress = control_progress;
    train.user = control;
    int bad = qlora_train(q, data, &train, err);
    qlora_close(q);
    return bad;
}

// Packed training: batches of 1 x 4 and of 4 x 1 packs, stopped and resumed: the same bits. Other
// packs are other settings, which a resumed run refuses.
static void test_packed_training(Test *t) {
    char data[100], a[100], b[100];
    qlora_error err = {{0}};
    snprintf(data, sizeof data, "build/packed-%d.jsonl", (int)getpid());
    snprintf(a, sizeof a, "build/packed-%d-a", (int)getpid());
    snprintf(b, sizeof b, "build/packed-%d-b", (int)getpid());
    write_short_data(t, data, 60);
    remove_run(a);
    RunControl whole = {0};
    check(t, !packed_run(data, a, &whole, false, 1, &err) && whole.last_step == 7 &&
          whole.last_loss < whole.first_loss, "%s", err.text);
    for (size_t stop = 0; stop < 6; stop++) {
        RunControl first = {.stop_at_step = stop}, second = {0};
        remove_run(b);
        int bad = packed_run(data, b, &first, false, 4, &err);
        check(t, stop ? bad != 0 : !bad, "stopped at %zu: %s", stop, err.text);
        if (stop) check(t, !packed_run(data, b, &second, true, 2, &err), "%s", err.text);
        check(t, same_files(a, b, "adapter_model.safetensors"), "stopped at %zu: differs", stop);
    }
    remove_run(a);
    remove_run(b);
    unlink(data);
}

// ---------------------------------------------------------------------------------------- checking

typedef struct {
    const char *records, *code;     // the finding that is expected, or NULL for none at all
    Severity severity;
    size_t n, max_length;
    const char *truncate;
} CheckCase;

#define LONG "a very long text that never ends and never ends and never ends and never ends"
#define PAIR(a, b) "{\"messages\": [\"" a "\", \"" b "\"]}\n"

static const CheckCase check_cases[] = {
    {PAIR("a", "b") PAIR("c", "d") PAIR("e", "f"), NULL, WARNING, 0, 0, NULL},
    {PAIR("a", "b") PAIR("a", "b") PAIR("e", "f") PAIR("a", "b"), "duplicates", WARNING, 2, 0,
     NULL},
    {PAIR("a", "b") PAIR("c", "") PAIR("e", "f"), "empty-answer", WARNING, 1, 0, NULL},
    {PAIR("a", "") PAIR("c", " \\n"), "empty-answer", ERROR, 2, 0, NULL},
    {PAIR("a", "b<|im_end|>") PAIR("c", "d<|im_end|>"), "doubled-end", ERROR, 2, 0, NULL},
    {PAIR("a", "b<|im_end|>") PAIR("c", "d") PAIR("e", "f"), "doubled-end", WARNING, 1, 0, NULL},
    {PAIR("a", "b <|im_start|> c") PAIR("c", "d"), "control-tokens", WARNING, 1, 0, NULL},
    {PAIR("a", "b") "{\"messages\": [\"a\"]}\n", "unsupervised", WARNING, 1, 0, NULL},
    {"{\"messages\": [\"a\"]}\n{\"messages\": [\"b\"]}\n", "unsupervised", ERROR, 2, 0, NULL},
    {"{\"messages\": [\"a\"]}\n", "nothing-to-learn", ERROR, 0, 0, NULL},
    {PAIR("a", "b") PAIR("c", LONG LONG LONG LONG), "too-long", WARNING, 1, 160, "drop"},
    {PAIR("c", LONG LONG LONG LONG), "too-long", ERROR, 1, 160, "drop"},
    {PAIR("c", LONG LONG LONG LONG), "nothing-to-learn", ERROR, 0, 160, "drop"},
    {PAIR("a", "b") PAIR("c", LONG LONG LONG LONG), "cut-answer", WARNING, 1, 160, "keep-start"},
    {PAIR("a", "b") PAIR("c", LONG LONG LONG LONG), "no-end", WARNING, 1, 160, "keep-start"},
    {PAIR("c", LONG LONG LONG LONG) PAIR("d", LONG LONG LONG LONG), "no-end", ERROR, 2, 160,
     "keep-start"},
    {PAIR("a", "b") PAIR("c", LONG LONG LONG LONG), "truncated", WARNING, 1, 160, "keep-end"},
};

// Every silent failure is found, as severe as it is, and training refuses exactly the errors.
static void test_data_checks(Test *t) {
    DataTest x;
    if (!open_data_test(t, &x, MODELS "qwen2")) return;
    for (size_t i = 0; i < sizeof check_cases / sizeof *check_cases; i++) {
        const CheckCase *c = &check_cases[i];
        qlora_train_options o = qlora_default_train_options();
        qlora_error err = {{0}};
        const Finding *found = NULL;
        bool error = false;
        add_file(t, &x, c->records, strlen(c->records));
        o.val_split = 0;
        o.output_dir = NULL;
        o.max_steps = 1;
        if (c->max_length) o.max_length = c->max_length;
        if (c->truncate) o.truncate = c->truncate;
        Trainer trainer = new_trainer(x.q, &o, &err);
        check(t, !read_data_options(&trainer) && !open_data(&trainer, x.paths[0], false) &&
              !check_data(&trainer), "case %zu: %s", i, err.text);
        for (size_t k = 0; k < trainer.findings.n; k++) {
            const Finding *f = &trainer.findings.list[k];
            error |= f->severity == ERROR;
            if (!c->code) check(t, false, "case %zu: %s", i, f->text);
            else if (strcmp(f->code, c->code) == 0) found = f;
        }
        check(t, !c->code || (found && found->severity == c->severity && found->n == c->n),
              "case %zu: %s %s, %zu times", i, c->code,
              found ? severity_names[found->severity] : "is missing", found ? found->n : 0);
        trainer_close(&trainer);
        check(t, error == (qlora_train(x.q, x.paths[0], &o, &err) != 0), "case %zu: train: %s", i,
              err.text);
        remove_files(&x);
    }
    qlora_close(x.q);
}

// A beginning-of-text token that the data brings along, and held-out samples that are learnt from.
static void test_data_checks_held_out(Test *t) {
    static const char records[] = PAIR("a", "b") PAIR("c", "d");
    static const char held[] = PAIR("e", "f") PAIR("c", "d") "{\"text\": \"<s><s>x\"}\n"
                               "{\"text\": \"<s><s>y\"}\n{\"messages\": [\"a\"]}\n";
    DataTest x;
    qlora_train_options o = qlora_default_train_options();
    qlora_error err = {{0}};
    char codes[300] = "";
    if (!open_data_test(t, &x, MODELS "llama")) return;
    add_file(t, &x, records, sizeof records - 1);
    add_file(t, &x, held, sizeof held - 1);
    o.val_file = x.paths[1];
    Trainer trainer = new_trainer(x.q, &o, &err);
    check(t, !read_data_options(&trainer) && !open_data(&trainer, x.paths[0], false) &&
          !check_data(&trainer), "%s", err.text);
    const Finding *all = trainer.findings.list;
    for (const Finding *f = all; f < all + trainer.findings.n; f++)
        snprintf(codes + strlen(codes), sizeof codes - strlen(codes), "%s%s:%zu:%s ",
                 strncmp(f->text, "held-out data: ", 15) ? "" : "held-", f->code, f->n,
                 severity_names[f->severity]);
    check(t, strcmp(codes, "held-unsupervised:1:warning held-doubled-start:2:error "
                           "overlap:1:warning ") == 0, "%s", codes);
    trainer_close(&trainer);
    remove_files(&x);
    qlora_close(x.q);
}

// A template that is not known stops data that needs one, and not raw text.
static void test_data_unknown_template(Test *t) {
    static const char *const records[] = {"{\"text\": \"a b\"}\n", PAIR("a", "b")};
    for (int i = 0; i < 2; i++) {
        DataTest x;
        qlora_train_options o = qlora_default_train_options();
        qlora_error err = {{0}};
        if (!open_data_test(t, &x, MODELS "llama")) return;
        x.q->has_chat = false;
        x.q->tokenizer->chat_template = "{{ messages }}";
        check(t, need_chat(x.q, &err) != 0, "an unknown template is taken for chatting");
        add_file(t, &x, records[i], strlen(records[i]));
        Trainer trainer = new_trainer(x.q, &o, &err);
        bool bad = need_data_chat(x.q, &err) || read_data_options(&trainer) ||
                   open_data(&trainer, x.paths[0], false);
        check(t, bad == (i == 1), "file %d: %s", i, err.text);
        const char *const says[] = {x.paths[0], ":1:1: ", "--template", "chatml, "};
        if (bad) check_message(t, err.text, says, 4, "a chat");
        trainer_close(&trainer);
        remove_files(&x);
        qlora_close(x.q);
    }
}

// --------------------------------------------------------------------------------- hostile bytes

static void put_bytes(Test *t, const char *path, const char *data, size_t n) {
    int file = open(path, O_WRONLY | O_CREAT, 0666);    // not O_TRUNC: ext4 then waits for the disk
    check(t, file >= 0 && write(file, data, n) == (ssize_t)n && !ftruncate(file, (off_t)n) &&
          !close(file), "cannot write %s", path);
}

// Reads, checks and packs a file as training does, or, inspecting, counts what is bad in it.
static int digest(DataTest *x, const char *path, bool inspecting, qlora_error *err) {
    qlora_train_options o = qlora_default_train_options();
    o.packing = "bfd";
    Trainer trainer = new_trainer(x->q, &o, err);
    int bad = read_data_options(&trainer);
    trainer.how.inspecting = inspecting;
    bad = bad || open_data(&trainer, path, false) || check_data(&trainer);
    trainer_close(&trainer);
    return bad;
}

// Every truncation and every changed byte of a file of all formats, as lines and as an array: read
// or refused with one line that names the file; nothing leaks.
static void test_data_hostile(Test *t) {
    static const char others[] = {'"', '\\', '{', ']', ',', '\n', '0', 0, (char)0xC3, (char)0xFF};
    qlora_error err = {{0}};
    Ledger ledger = {0};
    qlora_options opt = ledger_options(&ledger);
    DataTest x = {.q = qlora_open(MODELS "qwen2", &opt, &err)};
    char path[100];
    size_t refused = 0, runs = 0;
    if (!check(t, x.q && !need_chat(x.q, &err), "%s", err.text)) return;
    snprintf(path, sizeof path, "build/hostile-%d.json", (int)getpid());
    for (int array = 0; array < 2; array++) {
        Buffer text = {.allocator = &heap};
        for (size_t i = 0; i < sizeof good_records / sizeof *good_records; i++)
            if (!good_records[i].mask && !good_records[i].fields)
                buffer_printf(&text, &err, "%s%s\n", array ? i ? "," : "[" : "",
                              good_records[i].record);
        if (array) buffer_printf(&text, &err, "]\n");
        size_t live = ledger.live;
        for (size_t i = 0; i < text.size; i++)
            for (size_t k = 0; k <= sizeof others; k++) {
                char old = text.data[i];
                if (k < sizeof others) text.data[i] = others[k];
                put_bytes(t, path, text.data, k < sizeof others ? text.size : i);
                text.data[i] = old;
                bool bad = digest(&x, path, (i + k) % 2, &err);
                if (bad) check_line(t, err.text, path);
                check(t, !bad || strstr(err.text, path), "byte %zu: %s", i, err.text);
                check(t, ledger.live == live, "byte %zu, %zu: memory is not given back", i, k);
                refused += bad;
                runs++;
            }
        buffer_free(&text);
    }
    check(t, refused > runs / 8 && refused < runs, "%zu of %zu are refused", refused, runs);
    unlink(path);
    qlora_close(x.q);
    check_ledger(t, &ledger, "hostile data");
}

// Any allocation may fail while data is read, checked and packed: said so, and nothing leaks.
static void test_data_out_of_memory(Test *t) {
    qlora_error err = {{0}};
    Ledger ledger = {0};
    qlora_options opt = ledger_options(&ledger);
    Buffer text = {.allocator = &heap};
    DataTest x = {.q = qlora_open(MODELS "qwen2", &opt, &err)};
    if (!check(t, x.q && !need_chat(x.q, &err), "%s", err.text)) return;
    for (size_t i = 0; i < 6; i++) buffer_printf(&text, &err, "%s\n", good_records[i].record);
    add_file(t, &x, text.data, text.size);
    buffer_free(&text);
    size_t live = ledger.live, before = ledger.calls;
    check(t, !digest(&x, x.paths[0], true, &err), "%s", err.text);
    size_t n = ledger.calls - before;
    check(t, n > 40, "only %zu allocations", n);
    for (size_t i = 1; i <= n; i++) {
        ledger.fail_at = ledger.calls + i;
        check(t, digest(&x, x.paths[0], true, &err) && strstr(err.text, "out of memory"),
              "allocation %zu: %s", i, err.text);
        check(t, ledger.live == live, "allocation %zu: memory is not given back", i);
    }
    ledger.fail_at = 0;
    remove_files(&x);
    qlora_close(x.q);
    check_ledger(t, &ledger, "data without memory");
}

// The real datasets: read, or refused for the reason given.
static void test_real_datasets(Test *t) {
    static const struct { const char *path, *fields, *expected; size_t n; } cases[] = {
        {"huanhuan/huanhuan.json", NULL, NULL, 3729},
        {"huanhuan/huanhuan.jsonl", NULL, NULL, 3729},
        {"huanhuan/huanhuan-100.json", NULL, NULL, 100},
        {"llama-factory/alpaca_en_demo.json", NULL, NULL, 999},
        {"llama-factory/alpaca_zh_demo.json", NULL, NULL, 1000},
        {"llama-factory/identity.json", NULL, NULL, 91},
        {"llama-factory/glaive_toolcall_en_demo.json", NULL, "\"tools\": tool calls", 109},
        {"llama-factory/dataset_info.json", NULL, "the record does not end on its line", 0},
        {"torchtune/alpaca_tiny.json", NULL, NULL, 100},
        {"fastchat/dummy_conversation.json", NULL, NULL, 500},
        {"gsm8k/test.jsonl", NULL, "perhaps --field-user question --field-assistant answer", 0},
        {"gsm8k/test.jsonl", "question answer", NULL, 1319},
        {"mlx-wikisql/train.jsonl", NULL, NULL, 1000},
        {"mlx-wikisql/valid.jsonl", NULL, NULL, 100},
        {"mlx-wikisql/test.jsonl", NULL, NULL, 100},
        {"disc-law/qa_short_answer.json", NULL, NULL, 300},
        {"disc-law/example.json", NULL, "no known format; found the keys \"Question\"", 0},
        {"disc-law/example.json", "Question Baichuan-13B-Chat_response", NULL, 46},
        {"disc-law/lora_eval_outputs.jsonl", NULL,
         "perhaps --field-user question --field-assistant gold_answer", 0},
        {"disc-law/lora_eval_outputs.jsonl", "question gold_answer", NULL, 50},
        {"disc-law/triplet_laws.txt", NULL, "if this is plain text", 0},
        {"lawyer-llama/legal_counsel_with_article_v2.json", "query response", NULL, 1000}};
    DataTest x;
    if (access("../shared/real/datasets", R_OK)) { skip(t, "no ../shared/real/datasets"); return; }
    if (!open_data_test(t, &x, MODELS "qwen2")) return;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char path[200], fields[100];
        qlora_error err = {{0}};
        snprintf(path, sizeof path, "../shared/real/datasets/%s", cases[i].path);
        x.paths[0] = path;
        x.n_paths = 1;
        x.how.max_length = 100000;
        x.how.skip_bad_lines = false;
        set_fields(&x, cases[i].fields, fields);
        int bad = read_test_data(&x, &err);
        if (bad) {
            check(t, cases[i].expected && strstr(err.text, cases[i].expected), "%s: %s", path,
                  err.text);
            x.how.skip_bad_lines = true;
            bad = read_test_data(&x, &err);
        } else check(t, !cases[i].expected, "%s was accepted", path);
        check(t, !bad && x.d.n == cases[i].n, "%s: %zu samples, expected %zu", path, x.d.n,
              cases[i].n);
        check(t, x.d.ends >= x.d.n, "%s: %zu end tokens", path, x.d.ends);
        dataset_close(&x.d);
    }
    qlora_close(x.q);
}

#define DATA_TESTS \
    {"data_formats", "every format, as lines, with BOM and CRLF, as an array", test_data_formats}, \
    {"data_errors", "bad records: file:line:column, what was found, what to try", \
     test_data_errors}, \
    {"data_raw_text", "raw text: BOS and end token once, all learnt", test_data_raw_text}, \
    {"data_truncation", "drop, keep-start, keep-end; cut answers are counted", \
     test_data_truncation}, \
    {"data_selection", "--take, --max-samples, two files, any number of threads", \
     test_data_selection}, \
    {"data_directory", "train, valid and test.jsonl of a directory", test_data_directory}, \
    {"packing", "best-fit decreasing = the plain way, every sample once", test_packing}, \
    {"pack_gradient", "gradient of a pack = sum of its documents', bit for bit", \
     test_pack_gradient}, \
    {"packed_training", "1 x 4 packs = 4 x 1, stopped and resumed = never stopped", \
     test_packed_training}, \
    {"data_checks", "every silent failure is found; training refuses the errors", \
     test_data_checks}, \
    {"data_checks_held_out", "the same for held-out data; overlap with training", \
     test_data_checks_held_out}, \
    {"data_unknown_template", "raw text needs no template, chats do", \
     test_data_unknown_template}, \
    {"data_hostile", "any changed or missing byte of a dataset: read or one line", \
     test_data_hostile}, \
    {"data_out_of_memory", "any allocation may fail while data is read, checked, packed", \
     test_data_out_of_memory}, \
    {"real_datasets", "real datasets load or are refused by name", test_real_datasets},
