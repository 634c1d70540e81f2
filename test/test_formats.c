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
static void check_quantised(Test *t, Reference *r, Pool *pool, const char *name, DType type,
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
    quantize_values(pool, (uint8_t *)(uintptr_t)w.data, absmax, raw,
                    safetensors_types[source->type].dtype, type, n);
    finish_weight(&w, absmax);
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
        check(t, scales && memcmp(scales, absmax, blocks * sizeof *absmax) == 0, "%s differs", key);
    } else {
        // Codes are equal. The offset is the mean, which torch sums in float32 in vector order and we
        // in double: it may differ in the last bit, and so may the scales' scale.
        size_t one, n_groups;
        wrong = 0;
        for (size_t i = 0; scales && i < blocks; i++)
            wrong += ((const uint8_t *)scales)[i] != w.absmax8[i];
        check(t, scales && wrong == 0, "%s: %zu of %zu codes differ", key, wrong, blocks);
        snprintf(key, sizeof key, "%s.%s.nested_offset", name, kind);
        const real *offset = reference_values(t, r, key, &one);
        float ulp = offset ? nextafterf(fabsf((float)offset[0]), INFINITY) - fabsf((float)offset[0]) : 0;
        check(t, offset && fabsf((float)offset[0] - w.offset) <= ulp, "%s: %.9g, expected %.9g", key,
              (double)w.offset, offset ? (double)offset[0] : 0.0);
        snprintf(key, sizeof key, "%s.%s.nested_absmax", name, kind);
        const real *absmax2 = reference_values(t, r, key, &n_groups);
        for (size_t i = 0; i < n_groups; i++)
            check(t, fabsf((float)absmax2[i] - w.absmax2[i]) <= 2 * ulp, "%s[%zu]: %.9g, expected %.9g",
                  key, i, (double)w.absmax2[i], (double)absmax2[i]);
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
    Pool *pool = pool_open(2, &heap, &err);
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
                check_quantised(t, &r, pool, json_get_text(e, "name"), k < 2 ? DT_NF4 : DT_FP4, k % 2);
    check(t, tensors >= 8, "only %zu tensors", tensors);
    close_reference(&r);
    region_free(&region);
    pool_close(pool);
}

#define FORMAT_TESTS                                                                                \
    {"bitsandbytes", "NF4, FP4, double quantisation equal bitsandbytes byte for byte",              \
     test_bitsandbytes},
