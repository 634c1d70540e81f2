// bench_text.c: how fast text becomes ids, on one thread.
//
//     build/bench_text OUT [DIRECTORY ...]     default: the real tokenizers in ../shared, if here,
//                                              else the small ones of test/fixtures
//
// Writes the mixed text (code, Chinese, English) to OUT, so that others can be timed on the same, and
// prints MB per second of CPU time, the best of five, for texts of many kinds. A megabyte that is all
// one character is where a merge that is not O(n log n) takes minutes.
#include "../../qlora.c"

static const qlora_allocator heap = {default_allocate, default_release, NULL};

static void stop_if(int bad, const qlora_error *err) {
    if (!bad) return;
    fprintf(stderr, "bench_text: %s\n", err->text);
    exit(1);
}

// Code and whatever datasets are here, until there are 8 MB: a piece of each in turn, as in a
// file of records.
static void mix_text(Buffer *out) {
    static const char *const files[] = {
        "qlora.c", "../shared/real/datasets/huanhuan/huanhuan.jsonl",
        "../shared/real/datasets/gsm8k/test.jsonl",
        "../shared/real/datasets/lawyer-llama/legal_counsel_with_article_v2.json",
        "../shared/real/datasets/llama-factory/alpaca_en_demo.json"};
    enum { FILES = sizeof files / sizeof *files, TEXT_PIECE = 4000, MOST = 8000000 };
    Buffer parts[FILES] = {{0}};
    size_t at[FILES] = {0};
    qlora_error err = {{0}};
    for (int i = 0; i < FILES; i++) {
        parts[i].allocator = &heap;
        if (file_exists(files[i]))
            stop_if(read_whole_file(files[i], 1 << 26, &parts[i], &err), &err);
    }
    for (int i = 0; out->size < MOST; i = (i + 1) % FILES) {
        if (!parts[i].size) continue;
        size_t n = min_size(TEXT_PIECE, parts[i].size - at[i]);
        while (n && at[i] + n < parts[i].size && (parts[i].data[at[i] + n] & 0xC0) == 0x80) n--;
        stop_if(buffer_append(out, parts[i].data + at[i], n, &err), &err);
        at[i] = at[i] + n == parts[i].size ? 0 : at[i] + n;
    }
    for (int i = 0; i < FILES; i++) buffer_free(&parts[i]);
}

static void fill(Buffer *text, const char *what, size_t n) {
    qlora_error err = {{0}};
    size_t length = strlen(what);
    for (text->size = 0; text->size + length <= n;)
        stop_if(buffer_append(text, what, length, &err), &err);
}

// Seconds of this thread's own time: other programs may take the cores.
static double cpu_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void measure(const Tokenizer *t, const char *name, const Buffer *text, size_t piece) {
    Buffer ids = {.allocator = &heap};
    qlora_error err = {{0}};
    double best = 1e9;
    size_t count = 0;
    for (int i = 0; i < 5 && best > 1e-3; i++) {
        double start = cpu_seconds();
        count = 0;
        for (size_t at = 0; at < text->size; at += piece) {
            ids.size = 0;
            size_t n = min_size(piece, text->size - at);
            stop_if(tokenizer_encode(t, text->data + at, n, false, &ids, &err), &err);
            count += ids.size / sizeof(int32_t);
        }
        best = fmin(best, cpu_seconds() - start);
        if (best > 0.5) break;
    }
    printf("  %-34s %5.1f MB  %8.1f MB/s  %7.3f s  %9zu ids\n", name, (double)text->size * 1e-6,
           (double)text->size * 1e-6 / best, best, count);
    buffer_free(&ids);
}

static void bench(const char *directory, const Buffer *mixed) {
    static const struct { const char *name, *text; } same[] = {
        {"a", "a"}, {"spaces", " "}, {"emoji", "\xF0\x9F\x91\xA9\xE2\x80\x8D\xF0\x9F\x92\xBB"},
        {"invalid UTF-8", "\xFF\xC3"}, {"marks", "e\xCC\x81\xCC\xA3"}, {"digits", "1234567890"}};
    qlora_error err = {{0}};
    double start = cpu_seconds();
    Tokenizer *t = tokenizer_open(directory, &heap, &err);
    stop_if(!t, &err);
    printf("%s: opened in %.3f s\n", directory, cpu_seconds() - start);
    measure(t, "mixed text, one piece", mixed, mixed->size);
    measure(t, "mixed text, 4,000 bytes at a time", mixed, 4000);
    measure(t, "mixed text, 400 bytes at a time", mixed, 400);
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        Buffer text = {.allocator = &heap};
        fill(&text, same[i].text, 1000000);
        measure(t, same[i].name, &text, text.size);
        buffer_free(&text);
    }
    tokenizer_close(t);
}

int main(int argc, char **argv) {
    static const char *const at_hand[] = {"../shared/real/tokenizers/qwen2.5-0.5b-instruct",
        "../shared/real/tokenizers/llama-3", "../shared/real/tokenizers/gpt2",
        "../shared/real/tokenizers/llama-2", "../shared/real/tokenizers/mistral-7b-v0.1"};
    static const char *const small[] = {"test/fixtures/tokenizers/byte",
                                        "test/fixtures/tokenizers/spm"};
    Buffer mixed = {.allocator = &heap};
    qlora_error err = {{0}};
    mix_text(&mixed);
    if (argc > 1) stop_if(write_file(argv[1], mixed.data, mixed.size, &err), &err);
    for (int i = 2; i < argc; i++) bench(argv[i], &mixed);
    bool here = file_exists(at_hand[0]);
    for (size_t i = 0; argc <= 2 && i < (here ? 5 : 2); i++)
        bench(here ? at_hand[i] : small[i], &mixed);
    buffer_free(&mixed);
    return 0;
}
