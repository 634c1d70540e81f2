// Number formats and files against the libraries that define them.

typedef struct { TensorFiles *files; Region region; } Reference;

static bool open_reference(Test *t, Reference *r, const char *directory, const char *file) {
    qlora_error err = {{0}};
    *r = (Reference){.region.allocator = &heap};
    r->files = tensors_open(directory, file, &heap, &err);
    return check(t, r->files != NULL, "%s", err.text);
}

static void close_reference(Reference *r) {
    tensors_close(r->files);
    region_free(&r->region);
}

// A tensor's bytes as stored, 64-aligned by the region; fails the test when it is missing.
static void *reference_bytes(Test *t, Reference *r, const char *name, const TensorInfo **info) {
    qlora_error err = {{0}};
    *info = tensors_find(r->files, name);
    if (!check(t, *info != NULL, "reference tensor %s is missing", name)) return NULL;
    char *raw = region_alloc(&r->region, (*info)->bytes, 1, &err);
    check(t, !tensor_read(r->files, *info, raw, 0, (*info)->bytes, &err), "%s", err.text);
    return raw;
}

// A tensor's values, widened; *n their number.
static real *reference_values(Test *t, Reference *r, const char *name, size_t *n) {
    qlora_error err = {{0}};
    const TensorInfo *info;
    const void *raw = reference_bytes(t, r, name, &info);
    *n = 0;
    if (!raw) return NULL;
    float *values = region_alloc(&r->region, info->elements, sizeof *values, &err);
    real *out = region_alloc(&r->region, info->elements, sizeof *out, &err);
    widen_values(values, raw, safetensors_types[info->type].dtype, info->elements);
    for (size_t i = 0; i < info->elements; i++) out[i] = (real)values[i];
    *n = info->elements;
    return out;
}

// ------------------------------------------------------------------------------------------- NF4

// Quantises one recorded tensor and compares every byte with bitsandbytes'.
static void check_quantised(Test *t, Reference *r, Device *dev, const char *name, DType type,
                            bool nested) {
    char key[128];
    const TensorInfo *source, *info;
    const char *kind = type == DT_NF4 ? nested ? "nf4dq" : "nf4" : nested ? "fp4dq" : "fp4";
    snprintf(key, sizeof key, "%s.source", name);
    const void *raw = reference_bytes(t, r, key, &source);
    if (!raw) return;
    size_t n = source->elements, blocks = ceil_div(n, QUANT_BLOCK);
    Weight w = {.N = 1, .K = n};
    Arena arena = {NULL, 0};
    place_weight(&w, type, nested, &arena);
    arena = (Arena){region_alloc(&r->region, arena.used, 1, NULL), 0};
    place_weight(&w, type, nested, &arena);
    float *absmax = region_alloc(&r->region, blocks, sizeof *absmax, NULL);
    real *values = region_alloc(&r->region, n, sizeof *values, NULL);
    quantize_values(dev, (uint8_t *)(uintptr_t)w.data, scales_of(&w, absmax), raw,
                    safetensors_types[source->type].dtype, type, n);
    finish_weight(dev, &w, absmax);
    weight_row(values, &w, 0, 0, n, DT_REAL);

    // FP4 has two zeros; ours are CUDA's.
    snprintf(key, sizeof key, "%s.%s.packed%s", name, kind, type == DT_FP4 ? "_cuda" : "");
    const uint8_t *packed = reference_bytes(t, r, key, &info);
    size_t wrong = 0;
    for (size_t i = 0; packed && i < (n + 1) / 2; i++) wrong += packed[i] != ((uint8_t *)w.data)[i];
    check(t, packed && wrong == 0, "%s: %zu of %zu bytes differ", key, wrong, (n + 1) / 2);
    snprintf(key, sizeof key, "%s.%s.absmax", name, kind);
    const void *scales = reference_bytes(t, r, key, &info);
    if (!nested) {
        bool same = scales && memcmp(scales, w.absmax, blocks * sizeof *absmax) == 0;
        check(t, same, "%s differs", key);
    } else {
        // Codes are equal. The offset is the mean, which torch sums in float32 in vector order and
        // we in double: it may differ in the last bit, and so may the scales' scale.
        size_t one, n_groups;
        wrong = 0;
        for (size_t i = 0; scales && i < blocks; i++)
            wrong += ((const uint8_t *)scales)[i] != w.absmax8[i];
        check(t, scales && wrong == 0, "%s: %zu of %zu codes differ", key, wrong, blocks);
        snprintf(key, sizeof key, "%s.%s.nested_offset", name, kind);
        const real *offset = reference_values(t, r, key, &one);
        float ulp = offset ? nextafterf(fabsf((float)offset[0]), INFINITY) - fabsf((float)offset[0])
                           : 0;
        check(t, offset && fabsf((float)offset[0] - w.offset) <= ulp, "%s: %.9g, expected %.9g",
              key, (double)w.offset, offset ? (double)offset[0] : 0.0);
        snprintf(key, sizeof key, "%s.%s.nested_absmax", name, kind);
        const real *absmax2 = reference_values(t, r, key, &n_groups);
        for (size_t i = 0; i < n_groups; i++)
            check(t, fabsf((float)absmax2[i] - w.absmax2[i]) <= 2 * ulp,
                  "%s[%zu]: %.9g, expected %.9g", key, i, (double)w.absmax2[i], (double)absmax2[i]);
    }
    // Values: exact without nesting; with it within the last bits of offset and scale.
    size_t count;
    snprintf(key, sizeof key, "%s.%s.dequant", name, kind);
    const real *expected = reference_values(t, r, key, &count);
    double error = expected ? max_err(values, expected, n) : NAN;
    check(t, nested ? error <= 3e-7 : error == 0, "%s: values differ by %.2e", key, error);
}

static void test_bitsandbytes(Test *t) {
    Reference r;
    Region region = {.allocator = &heap};
    qlora_error err = {{0}};
    bool found;
    const Json *json = read_json("test/fixtures", "nf4.json", 1 << 24, &region, &found, &err);
    Device dev = {.ops = &plain_ops, .allocator = &heap, .pool = pool_open(2, &heap, &err)};
    if (!check(t, json != NULL, "%s", err.text) ||
        !open_reference(t, &r, "test/fixtures", "nf4.safetensors")) return;
    const TensorInfo *info;
    float map[256];
    dynamic_map(map);
    const float *nested = reference_bytes(t, &r, "code.nested", &info);
    for (int i = 0; nested && i < 256; i++)
        check(t, nested[i] == map[i], "nested map [%d]: %.9g, expected %.9g", i, (double)map[i],
              (double)nested[i]);
    const float *nf4 = reference_bytes(t, &r, "code.nf4", &info);
    check(t, nf4 && memcmp(nf4, nf4_levels, sizeof nf4_levels) == 0, "the NF4 levels differ");
    size_t tensors = 0;
    for (const Json *e = json_get(json, "tensors")->first; e; e = e->next, tensors++)
        for (int k = 0; k < 4; k++)
            if (k < 2 || json_get_bool(e, "fp4", false))
                check_quantised(t, &r, &dev, json_get_text(e, "name"), k < 2 ? DT_NF4 : DT_FP4,
                                k % 2);
    check(t, tensors >= 8, "only %zu tensors", tensors);
    close_reference(&r);
    region_free(&region);
    pool_close(dev.pool);
}

// Every float16, and for every upper half of a float32 the lower halves around a tie, against the
// definitions: value = fraction * 2^exponent, and the nearer neighbour, or of two the even one.
static void test_conversions(Test *t) {
    for (uint32_t h = 0; h < 65536; h++) {
        int exponent = h >> 10 & 31;
        double fraction = (h & 1023) + (exponent ? 1024 : 0);
        double value = ldexp(fraction, (exponent ? exponent : 1) - 25) * (h & 0x8000 ? -1 : 1);
        float own = f16_to_float((uint16_t)h);
        if (exponent == 31) check(t, h & 1023 ? isnan(own) : isinf(own), "f16 %04X", h);
        else check(t, (double)own == value, "f16 %04X: %g, expected %g", h, (double)own, value);
    }
    static const uint32_t lows[] = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF};
    for (uint32_t high = 0; high < 65536; high++)
        for (int i = 0; i < 6; i++) {
            float x = bits_float(high << 16 | lows[i]);
            uint16_t own = float_to_bf16(x);
            if (isnan(x)) { check(t, isnan(bf16_to_float(own)), "bf16 of a NaN"); continue; }
            uint32_t up = lows[i] > 0x8000 || (lows[i] == 0x8000 && high & 1);
            check(t, own == (uint16_t)(high + up), "bf16 of %08X: %04X", high << 16 | lows[i], own);
        }
}

// ------------------------------------------------------------------------------------- tokenizers

// Ids and text of a small tokenizer of each kind equal those of Hugging Face tokenizers; streaming
// gives the same text piece by piece, never half a character.
static void check_tokenizer(Test *t, const char *name) {
    char directory[256];
    qlora_error err = {{0}};
    Region region = {.allocator = &heap};
    bool found;
    snprintf(directory, sizeof directory, "test/fixtures/tokenizers/%s", name);
    Tokenizer *tokenizer = tokenizer_open(directory, &heap, &err);
    const Json *texts = read_json(directory, "ids.json", 1 << 26, &region, &found, &err);
    if (!check(t, tokenizer && texts, "%s: %s", name, err.text)) return;
    Buffer ids = {.allocator = &heap}, text = {.allocator = &heap}, pieces = {.allocator = &heap};
    size_t n = 0;
    for (const Json *e = texts->first; e; e = e->next, n++) {
        const Json *input = json_get(e, "text"), *decoded = json_get(e, "decoded");
        for (int special = 0; special < 2; special++) {
            const Json *expected = json_get(e, special ? "ids" : "ids_plain");
            ids.size = 0;
            bool ok = !tokenizer_encode(tokenizer, input->text, input->length, special, &ids, &err);
            const int32_t *id = (const int32_t *)(const void *)ids.data;
            ok = ok && ids.size / sizeof *id == expected->count;
            size_t k = 0;
            for (const Json *x = expected->first; x && ok; x = x->next)
                ok = id[k++] == (int32_t)strtol(x->text, NULL, 10);
            check(t, ok, "%s: text %zu \"%.40s\": other ids %s", name, n, input->text, err.text);
        }
        // ids are now those with special tokens; take the plain ones for decoding.
        ids.size = text.size = pieces.size = 0;
        tokenizer_encode(tokenizer, input->text, input->length, false, &ids, &err);
        const int32_t *id = (const int32_t *)(const void *)ids.data;
        size_t count = ids.size / sizeof *id;
        check(t, !tokenizer_decode(tokenizer, id, count, false, &text, &err) &&
              text.size == decoded->length && memcmp(text.data ? text.data : "", decoded->text,
                                                     text.size) == 0,
              "%s: text %zu \"%.40s\" decodes to \"%.*s\"", name, n, decoded->text,
              (int)min_size(text.size, 40), text.data ? text.data : "");
        TokenStream stream = {0};
        for (size_t i = 0; i < count; i++) {
            size_t before = pieces.size;
            token_stream_push(tokenizer, &stream, id[i], false, &pieces, &err);
            for (size_t at = before; at < pieces.size;) {
                uint32_t code;
                size_t bytes = utf8_decode(pieces.data + at, pieces.size - at, &code);
                if (!check(t, bytes > 0, "%s: text %zu streams half a character", name, n)) break;
                at += bytes;
            }
        }
        token_stream_end(tokenizer, &stream, &pieces, &err);
        check(t,
              pieces.size == text.size && memcmp(pieces.data ? pieces.data : "",
                                                 text.data ? text.data : "", text.size) == 0,
              "%s: text %zu streams other text", name, n);
    }
    check(t, n > 100, "%s: only %zu texts", name, n);
    buffer_free(&ids);
    buffer_free(&text);
    buffer_free(&pieces);
    tokenizer_close(tokenizer);
    region_free(&region);
}

static void test_tokenizers(Test *t) {
    static const char *const names[] = {"byte", "llama3style", "spm", "gpt2style", "vocab_merges",
                                        "sentencepiece"};
    for (size_t i = 0; i < 6; i++) check_tokenizer(t, names[i]);
}

// The real tokenizers, with the vectors that llama.cpp recorded for them.
static void test_real_tokenizers(Test *t) {
    static const struct { const char *name, *vectors; } cases[] = {
        {"qwen2.5-0.5b-instruct", "qwen2"}, {"llama-2", "llama-spm"}, {"gpt2", "gpt-2"}};
    if (!file_exists("../shared/real/tokenizer_vectors")) {
        skip(t, "no ../shared/real here");
        return;
    }
    for (size_t i = 0; i < 3; i++) {
        char path[256];
        qlora_error err = {{0}};
        Buffer in = {.allocator = &heap}, out = {.allocator = &heap}, ids = {.allocator = &heap};
        snprintf(path, sizeof path, "../shared/real/tokenizers/%s", cases[i].name);
        Tokenizer *tokenizer = tokenizer_open(path, &heap, &err);
        snprintf(path, sizeof path,
                 "../shared/real/tokenizer_vectors/llama.cpp/ggml-vocab-%s.gguf.inp",
                 cases[i].vectors);
        check(t, !read_whole_file(path, 1 << 24, &in, &err), "%s", err.text);
        memcpy(strstr(path, ".inp"), ".out", 4);
        check(t, !read_whole_file(path, 1 << 24, &out, &err), "%s", err.text);
        if (!check(t, tokenizer && in.size && out.size, "%s", err.text)) return;
        const char *text = in.data, *line = out.data, *separator = "\n__ggml_vocab_test__\n";
        size_t n = 0;
        while (text && *line) {
            const char *end = strstr(text, separator);
            size_t length = end ? (size_t)(end - text) : strlen(text);
            bool ok = true;
            ids.size = 0;
            check(t, !tokenizer_encode(tokenizer, text, length, false, &ids, &err), "%s", err.text);
            const int32_t *id = (const int32_t *)(const void *)ids.data;
            size_t count = ids.size / sizeof *id, k = 0;
            for (; *line && *line != '\n'; k++) {
                char *after;
                long expected = strtol(line, &after, 10);
                if (after == line) break;
                ok = ok && k < count && id[k] == expected;
                line = after;
            }
            check(t, ok && k == count, "%s: text %zu \"%.40s\": other ids", cases[i].name, n, text);
            line += strcspn(line, "\n");
            line += *line == '\n';
            text = end ? end + strlen(separator) : NULL;
            n++;
        }
        check(t, n >= 40, "%s: only %zu texts", cases[i].name, n);
        tokenizer_close(tokenizer);
        buffer_free(&in);
        buffer_free(&out);
        buffer_free(&ids);
    }
}

#define FORMAT_TESTS                                                                               \
    {"bitsandbytes", "NF4, FP4, double quantisation equal bitsandbytes byte for byte",             \
     test_bitsandbytes},                                                                           \
        {"conversions", "bf16 and f16 are exact, ties to even", test_conversions},                 \
        {"tokenizers", "ids, text and streams equal Hugging Face tokenizers", test_tokenizers},    \
        {"real_tokenizers", "Qwen2.5, Llama-2, GPT-2 give llama.cpp's vectors",                    \
         test_real_tokenizers},
