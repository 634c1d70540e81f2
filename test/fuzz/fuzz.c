// fuzz.c: one libFuzzer program for each reader of bytes that come from other people.
//
//     make fuzz [FUZZ_SECONDS=20]        builds and runs them all, from seeds that seeds.py writes
//     build/fuzz-json corpus/            one of them, as long as it is let
//
// FUZZ_TARGET names the entry point, a function below. Files are kept in memory: the few system
// calls by which the one reader of qlora.c looks at a file are replaced, so that an execution costs
// microseconds and everything above them is the real program. What must hold, besides that no
// sanitizer objects, is checked by abort().
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

// --------------------------------------------------------------------------------- files in memory

typedef struct { const char *name; const void *data; size_t size; } MemoryFile;

// The input is cut at the first NUL NUL: the first part is one file, the second another.
static MemoryFile memory_files[4];
enum { FIRST_FD = 1 << 20 };

static int memory_find(const char *path) {
    const char *slash = strrchr(path, '/');
    for (int i = 0; i < 4; i++)
        if (memory_files[i].name && slash && strcmp(memory_files[i].name, slash + 1) == 0) return i;
    errno = ENOENT;
    return -1;
}

static int memory_open(const char *path, int flags, ...) {
    int i = memory_find(path);
    (void)flags;
    return i < 0 ? -1 : FIRST_FD + i;
}

static int memory_stat(int fd, struct stat *info) {
    memset(info, 0, sizeof *info);
    info->st_mode = S_IFREG;
    info->st_size = (off_t)memory_files[fd - FIRST_FD].size;
    return 0;
}

static ssize_t memory_read(int fd, void *out, size_t n, off_t offset) {
    const MemoryFile *file = &memory_files[fd - FIRST_FD];
    if (offset < 0 || (size_t)offset > file->size) abort();           // read outside of the file
    if (n > file->size - (size_t)offset) n = file->size - (size_t)offset;
    if (n) memcpy(out, (const char *)file->data + offset, n);
    return (ssize_t)n;
}

static bool use_memory_files;
#define open(...) (use_memory_files ? memory_open(__VA_ARGS__) : (open)(__VA_ARGS__))
#define fstat(fd, info) (use_memory_files ? memory_stat(fd, info) : (fstat)(fd, info))
#define pread(...) (use_memory_files ? memory_read(__VA_ARGS__) : (pread)(__VA_ARGS__))
#define access(path, mode) (use_memory_files ? memory_find(path) < 0 : (access)(path, mode))
#define close(fd) ((void)(use_memory_files ? 0 : (close)(fd)), 0)
#include "../../qlora.c"

static void set_file(int i, const char *name, const uint8_t *data, size_t n) {
    memory_files[i] = (MemoryFile){name, data, n};
}

// Two files in one input.
static void set_files(const char *first, const char *second, const uint8_t *data, size_t n) {
    const uint8_t *cut = memmem(data, n, "\0", 2);
    set_file(0, first, data, cut ? (size_t)(cut - data) : n);
    set_file(1, cut ? second : NULL, cut ? cut + 2 : NULL, cut ? n - 2 - (size_t)(cut - data) : 0);
}

// ----------------------------------------------------------------------------------------- helpers

static const qlora_allocator heap = {default_allocate, default_release, NULL};

static void require(bool ok) { if (!ok) abort(); }

// A message is one line of valid UTF-8 without control characters.
static void require_message(const qlora_error *err) {
    size_t n = strlen(err->text);
    require(n > 0 && utf8_valid_prefix(err->text, n) == n);
    for (size_t i = 0; i < n; i++) require((unsigned char)err->text[i] >= 0x20);
}

// Tables are unpacked once.
static const Unicode *shared_unicode(void) {
    static const Unicode *unicode;
    static Region region = {.allocator = &heap};
    if (!unicode) unicode = unicode_open(&region, NULL);
    return unicode;
}

// Encodes the text, with pieces cut and not, looks at the ids, and decodes them, at once and token
// by token.
static void use_tokenizer(const Tokenizer *t, const char *text, size_t n) {
    qlora_error err = {{0}};
    Buffer ids = {.allocator = &heap}, whole = {.allocator = &heap}, parts = {.allocator = &heap};
    Tokenizer uncut = *t;
    uncut.neighbours = NULL;
    bool refused = tokenizer_encode(t, text, n, true, &ids, &err);
    if (refused) require_message(&err);
    encoders_free(t);                                 // and with them the pieces they remember
    require(refused == (bool)tokenizer_encode(&uncut, text, n, true, &parts, &err));
    require(ids.size == parts.size && (!ids.size || memcmp(ids.data, parts.data, ids.size) == 0));
    parts.size = 0;
    const int32_t *id = (const int32_t *)(const void *)ids.data;
    size_t count = ids.size / sizeof *id;
    for (size_t i = 0; i < count; i++)
        require(id[i] >= 0 && vocabulary_token(&t->vocabulary, (size_t)id[i]));
    if (!tokenizer_decode(t, id, count, false, &whole, &err)) {
        TokenStream s = {.open = false};
        for (size_t i = 0; i < count; i++)
            require(!token_stream_push(t, &s, id[i], false, &parts, &err));
        require(!token_stream_end(t, &s, &parts, &err) && parts.size == whole.size);
        require(!whole.size || memcmp(parts.data, whole.data, whole.size) == 0);
        require(utf8_valid_prefix(whole.data, whole.size) == whole.size);
    }
    encoders_free(t);
    buffer_free(&ids);
    buffer_free(&whole);
    buffer_free(&parts);
}

// A little of everything: words, digits, spaces, Chinese, an emoji, marks, a broken character.
static const char mixed_text[] =
    "Hello, WORLD's  123\n\n\t <s>\xE4\xBD\xA0\xE5\xA5\xBD \xF0\x9F\x91\xA9"
    "\xE2\x80\x8D\xF0\x9F\x92\xBB e\xCC\x81\xCC\xA3 \xE2\x96\x81x <|a|> \xEA\xB0\x80\xFF aaaaaa  ";

static void use_mixed_text(const Tokenizer *t) {
    use_tokenizer(t, mixed_text, sizeof mixed_text - 1);
}

// ----------------------------------------------------------------------------------------- targets

// What is accepted and written is read again as the same.
static void json(const uint8_t *data, size_t n) {
    qlora_error err = {{0}};
    Region region = {.allocator = &heap};
    Buffer first = {.allocator = &heap}, second = {.allocator = &heap};
    const Json *value = json_parse((const char *)data, n, "f", 1, &region, &err);
    if (!value) require_message(&err);
    else {
        double number;
        size_t size;
        for (const Json *v = value; v; v = v->first) {
            json_to_double(v, &number);
            json_to_size(v, &size);
        }
        require(!json_write(&first, value, 0, &err));
        value = json_parse(first.data, first.size, "f", 1, &region, &err);
        require(value && !json_write(&second, value, 0, &err) && first.size == second.size);
        require(memcmp(first.data, second.data, first.size) == 0);
    }
    buffer_free(&first);
    buffer_free(&second);
    region_free(&region);
}

// A pattern, a NUL and a text. Matches follow each other and lie on characters.
static void regex(const uint8_t *data, size_t n) {
    qlora_error err = {{0}};
    Region region = {.allocator = &heap};
    size_t length = strnlen((const char *)data, n);
    Buffer pattern = {.allocator = &heap}, text = {.allocator = &heap};
    require(!utf8_append_lossy(&pattern, (const char *)data, length, NULL, &err));
    require(!buffer_append(&pattern, "", 1, &err));
    if (length < n) length++;
    require(!utf8_append_lossy(&text, (const char *)data + length, n - length, NULL, &err));
    const Regex *re = regex_compile(shared_unicode(), pattern.data, "f", &region, &err);
    RegexRun run = regex_run(0, &err);
    run.budget = 1 << 14;                             // slow patterns are refused, but not here
    size_t from = 0, start, end;
    int found = 0;
    if (!re) require_message(&err);
    while (re && (found = regex_find(&run, re, text.data, text.size, from, &start, &end)) > 0) {
        require(start >= from && end > start && end <= text.size);
        require(utf8_valid_prefix(text.data + start, end - start) == end - start);
        from = end;
    }
    if (found < 0) require_message(&err);
    buffer_free(&pattern);
    buffer_free(&text);
    region_free(&region);
}

static void tokenizer_files(const char *first, const char *second, const uint8_t *data, size_t n) {
    qlora_error err = {{0}};
    set_files(first, second, data, n);
    Tokenizer *t = tokenizer_load("d", shared_unicode(), &heap, &err);
    if (t) use_mixed_text(t);
    else require_message(&err);
    tokenizer_close(t);
}

static void tokenizer_json(const uint8_t *data, size_t n) {
    tokenizer_files("tokenizer.json", "tokenizer_config.json", data, n);
}

static void tokenizer_model(const uint8_t *data, size_t n) {
    tokenizer_files("tokenizer.model", "tokenizer_config.json", data, n);
}

static void vocab_json(const uint8_t *data, size_t n) {
    static const char config[] = "{\"tokenizer_class\": \"Qwen2Tokenizer\"}";
    set_file(2, "tokenizer_config.json", (const uint8_t *)config, sizeof config - 1);
    tokenizer_files("vocab.json", "merges.txt", data, n);
}

// Any text by tokenizers of both styles. Byte-level ids give back the valid part of the text.
static const Tokenizer *fixture(const char *name) {
    qlora_error err = {{0}};
    char path[256];
    snprintf(path, sizeof path, "test/fixtures/tokenizers/%s", name);
    use_memory_files = false;
    const Tokenizer *t = tokenizer_open(path, &heap, &err);
    use_memory_files = true;
    if (!t) fprintf(stderr, "%s\n", err.text);
    require(t != NULL);
    return t;
}

static void encode(const uint8_t *data, size_t n) {
    static const char *const names[] = {"byte", "gpt2style", "llama3style", "spm"};
    static const Tokenizer *fixtures[4];
    for (int i = 0; i < 4; i++) {
        if (!fixtures[i]) fixtures[i] = fixture(names[i]);
        use_tokenizer(fixtures[i], (const char *)data, n);
    }
}

// One file, or an index (which begins with its brace) and a shard of the name s.
static void safetensors(const uint8_t *data, size_t n) {
    qlora_error err = {{0}};
    if (n && data[0] == '{') set_files("model.safetensors.index.json", "s", data, n);
    else set_file(0, "model.safetensors", data, n);
    TensorFiles *t = tensors_open("d", "model.safetensors", &heap, &err);
    if (!t) require_message(&err);
    for (size_t i = 0; t && i < t->n_tensors; i++) {
        const TensorInfo *tensor = &t->tensors[i];
        char *bytes = malloc(tensor->bytes + 1);
        require(tensors_find(t, tensor->name) != NULL && bytes != NULL);
        require(!tensor_read(t, tensor, bytes, 0, tensor->bytes, &err));
        free(bytes);
    }
    tensors_close(t);
}

// The chat template of a model: found or refused, then one conversation is written with it.
static void chat_template(const uint8_t *data, size_t n) {
    static const Tokenizer *byte;
    if (!byte) byte = fixture("byte");
    qlora_error err = {{0}};
    Region region = {.allocator = &heap};
    Buffer note = {.allocator = &heap}, ids = {.allocator = &heap}, learn = {.allocator = &heap};
    Tokenizer t = *byte;
    ChatTemplate chat;
    const Message messages[] = {
        {.role = "user", .content = "a", .length = 1},
        {.role = "assistant", .content = mixed_text, .length = sizeof mixed_text - 1}};
    t.chat_template = region_text(&region, (const char *)data, n, &err);
    if (template_find(&chat, NULL, NULL, &t, &region, &note, &err) ||
        template_apply(&chat, &t, messages, 2, MASK_CONTENT, true, &ids, &learn, &err))
        require_message(&err);
    else require(learn.size * sizeof(int32_t) == ids.size);
    buffer_free(&note);
    buffer_free(&ids);
    buffer_free(&learn);
    region_free(&region);
}

static void dataset(const uint8_t *data, size_t n) {
    static const Tokenizer *t;
    static ChatTemplate chat;
    static Region region = {.allocator = &heap};
    static Pool *pool;
    qlora_error err = {{0}};
    Buffer note = {.allocator = &heap};
    if (!t) {
        t = fixture("byte");
        pool = pool_open(1, &heap, &err);
        require(!template_find(&chat, "chatml", NULL, t, &region, &note, &err));
        buffer_free(&note);
    }
    Dataset d;
    set_file(0, "data.jsonl", data, n);
    static const char *const path = "d/data.jsonl";
    DatasetOptions options = {.max_length = 64, .mask = MASK_CONTENT, .max_samples = SIZE_MAX,
                              .take_to = SIZE_MAX, .allocator = &heap, .skip_bad_lines = n % 2,
                              .pool = pool};
    if (dataset_open(&d, &path, 1, &chat, t, &options, &err)) {
        require_message(&err);
        return;
    }
    for (size_t i = 0; i < d.n; i++)
        require(d.samples[i].supervised && d.samples[i].length <= 64
                && d.samples[i].first + d.samples[i].length <= d.tokens);
    dataset_close(&d);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    // All are named, so that none is unused.
    static void (*const targets[])(const uint8_t *, size_t) = {
        json, regex, tokenizer_json, tokenizer_model, vocab_json, encode, safetensors,
        chat_template, dataset};
    (void)targets;
    use_memory_files = true;
    memset(memory_files, 0, sizeof memory_files);
    FUZZ_TARGET(data, n);
    return 0;
}
