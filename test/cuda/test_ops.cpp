// test_ops.cpp: every op of qlora.cu against the plain op of the same name in qlora.c.
//
//     test_ops [--list] [--seed N] [name ...]       a name runs all tests that begin with it
//
// Built by g++ or clang++ it contains qlora.cu as translate.sh leaves it and runs on the emulated
// GPU; built by nvcc (-x cu) it contains qlora.cu itself and runs on a real one. Each op meets at
// least 20 random shapes with both types of activations: sizes that divide no tile, 0 and 1. Memory
// is allocated to the byte, and scratch is what the op `scratch` asks for. The last lines are a
// hash of all that was computed, which must not depend on schedules, and the count of tests.
#ifdef __CUDACC__
#include "../../qlora.cu"
#else
#include "qlora_emulated.cpp"
#endif
#include <vector>

extern "C" {
int cpu_open(Device *dev, DType act);
void cpu_close(Device *dev);
void cpu_tables(float levels[16], float map[256], DType type);
const qlora_allocator *cpu_allocator(void);
}

// --------------------------------------------------------------------------------------- framework

static uint64_t test_seed = 1, test_state, test_digest = 0xCBF29CE484222325u;

static uint64_t test_random() {                               // splitmix64
    uint64_t z = test_state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}
static size_t test_below(size_t n) { return (size_t)(test_random() % n); }
static float test_float() { return (float)(test_random() >> 40) * 0x1p-23f - 1; }     // -1 .. 1
// A size up to `most`; 1 and multiples of 8 more often than chance would have it.
static size_t test_size(size_t most) {
    size_t n = 1 + test_below(most), kind = test_below(8);
    return kind == 0 ? 1 : kind < 4 ? (n + 7) / 8 * 8 : n;
}

__attribute__((format(printf, 1, 2)))
static int test_fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fprintf(stderr, "    ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    return 1;
}

static void test_hash(const void *data, size_t bytes) {      // FNV-1a
    for (size_t i = 0; i < bytes; i++)
        test_digest = (test_digest ^ ((const uint8_t *)data)[i]) * 0x100000001B3u;
}

// The GPU with activations of this type, as a card with or without bf16 units; opened once each.
static Device test_devices[2][2];

static Device *test_device(DType act, bool matrix_units) {
    Device *dev = &test_devices[act == DT_BF16][matrix_units];
#ifdef CUDA_ON_CPU
    emulator_set(matrix_units ? "sm=80" : "sm=75");
#endif
    if (dev->gpu) return dev;
    qlora_error err = {{0}};
    char name[256];
    dev->allocator = cpu_allocator();
    if (qlora_cuda_open(dev, 0, act == DT_BF16 ? QLORA_COMPUTE_BF16 : QLORA_COMPUTE_F32, name,
                        sizeof name, &err)) {
        fprintf(stderr, "%s\n", err.text);
        exit(2);
    }
    Gpu *gpu = (Gpu *)dev->gpu;
    if (gpu->matrix_units && !matrix_units) {                // a new card plays an old one
        gpu->matrix_units = false;
        if (device_memory((void **)&gpu->widened, 3 * (size_t)WIDENED * sizeof(float))) exit(2);
    }
    return dev;
}

// An array on both devices.
struct Array {
    size_t n, size;                     // elements, bytes of each
    bool act;                           // bf16 if they are two bytes long
    void *at[2];                        // CPU, GPU
    template <typename T> T *on(int d) const { return (T *)at[d]; }
};

// A case: two devices, what was allocated on them, what went wrong.
struct Case {
    Device *dev[2], cpu;
    DType act;
    std::vector<Array *> arrays;
    void *scratch[2];
    size_t scratch_bytes[2];
    int bad;
    const char *what;                   // the shapes, for messages
    char text[256];
};

static float bf16_up(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static uint16_t bf16_down(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static Case *case_open(DType act, bool matrix_units = true) {
    Case *c = new Case();
    c->act = act;
    c->dev[1] = test_device(act, matrix_units);
    c->dev[0] = &c->cpu;
    c->what = c->text;
    if (cpu_open(&c->cpu, act)) exit(2);
    return c;
}

static Array *array(Case *c, size_t n, size_t size, const void *data) {
    Array *a = new Array();
    a->n = n, a->size = size, a->act = size == 2;
    std::vector<uint8_t> blank(n * size + 1, 0xFF);
    for (int d = 0; d < 2; d++) {
        a->at[d] = c->dev[d]->ops->allocate(c->dev[d], n * size, NULL);
        c->dev[d]->ops->upload(c->dev[d], a->at[d], data ? data : blank.data(), n * size);
    }
    c->arrays.push_back(a);
    return a;
}

static size_t act_bytes(const Case *c) { return c->act == DT_BF16 ? 2 : 4; }
static Array *blank(Case *c, size_t n, size_t size) { return array(c, n, size, NULL); }
static Array *blank_act(Case *c, size_t n) { return blank(c, n, act_bytes(c)); }
static Array *floats(Case *c, size_t n, float scale = 1, float offset = 0) {
    std::vector<float> x(n + 1);
    for (size_t i = 0; i < n; i++) x[i] = offset + scale * test_float();
    return array(c, n, 4, x.data());
}
static Array *acts(Case *c, size_t n, float scale = 1) {
    if (c->act != DT_BF16) return floats(c, n, scale);
    std::vector<uint16_t> x(n + 1);
    for (size_t i = 0; i < n; i++) x[i] = bf16_down(scale * test_float());
    return array(c, n, 2, x.data());
}
static Array *ints(Case *c, size_t n, size_t below) {
    std::vector<int32_t> x(n + 1);
    for (size_t i = 0; i < n; i++) x[i] = (int32_t)test_below(below);
    return array(c, n, 4, x.data());
}

static std::vector<uint8_t> fetch(Case *c, const Array *a, int d) {
    std::vector<uint8_t> bytes(a->n * a->size + 1);
    c->dev[d]->ops->download(c->dev[d], bytes.data(), a->at[d], a->n * a->size);
    return bytes;
}
static double value_of(const Array *a, const std::vector<uint8_t> &bytes, size_t i) {
    if (a->size == 2) return bf16_up(((const uint16_t *)bytes.data())[i]);
    return ((const float *)bytes.data())[i];
}

// Largest error, relative to the value and the array's size; a NaN on one side only is infinite.
static double max_error(const Array *a, const std::vector<uint8_t> &x,
                        const std::vector<uint8_t> &y) {
    double squares = 0, worst = 0;
    for (size_t i = 0; i < a->n; i++) {
        double v = value_of(a, x, i);
        if (v - v == 0) squares += v * v;
    }
    double size = sqrt(squares / (double)(a->n ? a->n : 1)) + 1e-30;
    for (size_t i = 0; i < a->n; i++) {
        double u = value_of(a, x, i), v = value_of(a, y, i);
        if (u == v || (u != u && v != v)) continue;
        double error = fabs(u - v) / (fabs(u) + size);
        if (!(error <= worst)) worst = error == error ? error : INFINITY;
    }
    return worst;
}

// Compares what the two devices computed. tolerance 0: the same bytes.
static void compare(Case *c, const char *name, const Array *a, double tolerance) {
    std::vector<uint8_t> x = fetch(c, a, 0), y = fetch(c, a, 1);
    test_hash(y.data(), a->n * a->size);
    if (tolerance == 0) {
        for (size_t i = 0; i < a->n * a->size; i++)
            if (x[i] != y[i]) {
                c->bad += test_fail("%s: byte %zu of %zu is %02x, expected %02x [%s]", name, i,
                                    a->n * a->size, y[i], x[i], c->what);
                return;
            }
        return;
    }
    double error = max_error(a, x, y);
    if (!(error <= tolerance))
        c->bad += test_fail("%s: error %.3g, at most %.3g [%s]", name, error, tolerance, c->what);
}
// For activations: float32 arithmetic, or one rounding to bf16 that may fall to the other side.
static void compare_act(Case *c, const char *name, const Array *a, double full = 1e-5) {
    compare(c, name, a, c->act == DT_BF16 ? 1.01 / 128 : full);
}

// What is rounded once from the same sum in another order is mostly the same.
static void compare_rounding(Case *c, const char *name, const Array *a, double full) {
    std::vector<uint8_t> x = fetch(c, a, 0), y = fetch(c, a, 1);
    size_t others = 0;
    compare_act(c, name, a, full);
    for (size_t i = 0; i < a->n && a->size == 2; i++)
        others += value_of(a, x, i) != value_of(a, y, i);
    if (8 * others > a->n + 64)
        c->bad += test_fail("%s: %zu of %zu values are rounded differently [%s]", name, others,
                            a->n, c->what);
}

static void scratch(Case *c, OpSizes sizes) {
    sizes.threads = 1;
    for (int d = 0; d < 2; d++) {
        Device *dev = c->dev[d];
        dev->ops->scratch(dev, &sizes);
        c->scratch_bytes[d] = dev->scratch_size + dev->thread_size;
        c->scratch[d] = dev->ops->allocate(dev, c->scratch_bytes[d], NULL);
        dev->scratch = (char *)c->scratch[d];
        dev->thread_scratch = dev->scratch + dev->scratch_size;
    }
}

static int case_close(Case *c) {
    qlora_error err = {{0}};
    if (c->dev[1]->ops->check(c->dev[1], &err)) c->bad += test_fail("%s [%s]", err.text, c->what);
    for (Array *a : c->arrays) {
        for (int d = 0; d < 2; d++) c->dev[d]->ops->release(c->dev[d], a->at[d], a->n * a->size);
        delete a;
    }
    for (int d = 0; d < 2; d++)
        if (c->scratch[d]) c->dev[d]->ops->release(c->dev[d], c->scratch[d], c->scratch_bytes[d]);
    c->dev[1]->scratch = NULL;
    cpu_close(&c->cpu);
    int bad = c->bad;
    delete c;
    return bad;
}

#define SHAPE(c, ...) snprintf((c)->text, sizeof (c)->text, __VA_ARGS__)

// Both types of activations, n shapes each.
static int for_shapes(int n, int (*one)(DType act, int i)) {
    int bad = 0;
    for (int a = 0; a < 2; a++)
        for (int i = 0; i < n; i++) bad += one(a ? DT_BF16 : DT_REAL, i) != 0;
    return bad;
}

// A weight of any type on both devices; 4-bit ones are quantised by the CPU.
static void weight_array(Case *c, Weight w[2], DType type, bool nested, size_t N, size_t K) {
    size_t n = N * K, blocks = (n + QUANT_BLOCK - 1) / QUANT_BLOCK;
    std::vector<float> raw(n + 1), absmax(blocks + 1), map(256), absmax2(blocks / 256 + 2);
    std::vector<uint8_t> packed(n / 2 + 33), absmax8(blocks + 1);
    std::vector<uint16_t> half(n + 1);
    for (size_t i = 0; i <= n; i++) {                         // blocks of different size
        static const float sizes[] = {0.1f, 0.02f, 0.3f, 0.07f, 0.011f};
        raw[i] = sizes[i / 64 % 5] * test_float();
    }
    w[0] = w[1] = Weight();
    w[0].dtype = type, w[0].N = N, w[0].K = K;
    if (type == DT_F32 || type == DT_BF16 || type == DT_F16) {
        for (size_t i = 0; i < n; i++)      // any finite half precision number will do
            half[i] = type == DT_BF16 ? bf16_down(raw[i])
                                      : (uint16_t)((test_random() & 0x9FFF) | 0x2000);
        Array *a = type == DT_F32 ? array(c, n, 4, raw.data()) : array(c, n, 2, half.data());
        w[1] = w[0];
        for (int d = 0; d < 2; d++) w[d].data = a->at[d];
        return;
    }
    float levels[16];
    cpu_tables(levels, map.data(), type);
    c->cpu.ops->quantize(&c->cpu, packed.data(), absmax.data(), raw.data(), DT_F32, type, n);
    if (nested && n)
        w[0].offset = c->cpu.ops->quantize_scales(&c->cpu, absmax8.data(), absmax2.data(),
                                                  absmax.data(), blocks, map.data());
    w[1] = w[0];
    Array *data = array(c, (n + 1) / 2, 1, packed.data()), *code = array(c, 16, 4, levels);
    Array *scales = nested ? array(c, blocks, 1, absmax8.data())
                           : array(c, blocks, 4, absmax.data());
    Array *code8 = nested ? array(c, 256, 4, map.data()) : NULL;
    Array *scales2 = nested ? array(c, (blocks + 255) / 256, 4, absmax2.data()) : NULL;
    for (int d = 0; d < 2; d++) {
        w[d].data = data->at[d];
        w[d].code = code->on<float>(d);
        if (nested) {
            w[d].absmax8 = scales->on<uint8_t>(d);
            w[d].code8 = code8->on<float>(d);
            w[d].absmax2 = scales2->on<float>(d);
        } else w[d].absmax = scales->on<float>(d);
    }
}

// A batch of T rows in up to four spans, one of them perhaps empty, on both devices.
static void batch_arrays(Case *c, Batch b[2], size_t T) {
    std::vector<Span> spans;
    for (size_t at = 0; at < T || spans.empty();) {
        size_t n = spans.size() == 3 ? T - at : test_below(T - at + 1);
        spans.push_back({at, n, at, n, (uint32_t)test_below(100)});
        at += n;
        if (spans.size() == 4) break;
    }
    std::vector<int32_t> position(T + 1);
    for (const Span &s : spans)
        for (size_t i = 0; i < s.nq; i++) position[s.q0 + i] = (int32_t)i;
    Array *s = array(c, spans.size(), sizeof(Span), spans.data());
    Array *p = array(c, T, 4, position.data());
    for (int d = 0; d < 2; d++) {
        b[d] = Batch();
        b[d].T = T;
        b[d].n_spans = spans.size();
        b[d].most_queries = b[d].most_keys = T;
        b[d].spans = s->on<Span>(d);
        b[d].position = p->on<int32_t>(d);
        b[d].seed = 0x123456789ABCDEFu + test_seed;
        b[d].step = 7;
        b[d].training = true;
    }
}

// ------------------------------------------------------------------------------ chapter 3: weights

static const DType file_types[] = {DT_F32, DT_BF16, DT_F16};

static int quantize_case(DType act, int i) {
    Case *c = case_open(act);
    size_t n = i == 0 ? 0 : i == 1 ? 1 : i == 2 ? 64 : test_size(1000);
    DType from = file_types[i % 3], to = i % 2 ? DT_NF4 : DT_FP4;
    float scale = i % 5 == 3 ? 1e-39f : i % 5 == 4 ? 1e30f : 1;
    std::vector<float> x(n + 1);
    std::vector<uint16_t> half(n + 1);
    SHAPE(c, "n %zu from %d to %d scale %g", n, from, to, scale);
    for (size_t k = 0; k < n; k++) {
        size_t kind = test_below(16);
        x[k] = kind == 0 ? 0 : kind == 1 ? -0.0f : kind == 2 ? scale : kind == 3 ? -scale
             : kind == 4 ? qlora_nf4_thresholds[test_below(15)] * scale : scale * test_float();
        if (k / 64 % 3 == 2 && i % 4 == 0) x[k] = -0.0f;      // a block of zeros
        half[k] = from == DT_BF16 ? bf16_down(x[k]) : (uint16_t)(test_random() & 0xBBFF);
    }
    Array *raw = from == DT_F32 ? array(c, n, 4, x.data()) : array(c, n, 2, half.data());
    Array *packed = blank(c, (n + 1) / 2, 1), *absmax = blank(c, (n + 63) / 64, 4);
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->quantize(c->dev[d], packed->on<uint8_t>(d), absmax->on<float>(d),
                                 raw->at[d], from, to, n);
    compare(c, "packed", packed, 0);
    compare(c, "absmax", absmax, 0);
    return case_close(c);
}
static int quantize_test() { return for_shapes(20, quantize_case); }

static int quantize_scales_case(DType act, int i) {
    Case *c = case_open(act);
    size_t n = i == 0 ? 1 : i == 1 ? 256 : i == 2 ? 4096 : i == 3 ? 9000 : test_size(5000);
    float map[256], levels[16], offset[2];
    SHAPE(c, "n %zu", n);
    cpu_tables(levels, map, DT_NF4);
    Array *absmax = i % 5 == 4 ? floats(c, n, 0, 0.25f) : floats(c, n, 0.01f, 0.02f);
    Array *codes = blank(c, n, 1), *absmax2 = blank(c, (n + 255) / 256, 4);
    Array *levels8 = array(c, 256, 4, map);
    for (int d = 0; d < 2; d++)
        offset[d] = c->dev[d]->ops->quantize_scales(c->dev[d], codes->on<uint8_t>(d),
                                                    absmax2->on<float>(d), absmax->on<float>(d), n,
                                                    levels8->on<float>(d));
    if (memcmp(&offset[0], &offset[1], 4)) c->bad += test_fail("offset %.9g, expected %.9g [%s]",
                                                               offset[1], offset[0], c->what);
    compare(c, "codes", codes, 0);
    compare(c, "absmax2", absmax2, 0);
    return case_close(c);
}
static int quantize_scales_test() { return for_shapes(20, quantize_scales_case); }

static int low_rank_case(DType act, int i) {
    Case *c = case_open(act);
    size_t rows = i == 0 ? 0 : test_size(20), K = test_size(200), r = test_size(20);
    SHAPE(c, "rows %zu K %zu r %zu", rows, K, r);
    Array *A = floats(c, r * K), *B = floats(c, rows * r), *delta = blank(c, rows * K, 4);
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->low_rank(c->dev[d], delta->on<float>(d), B->on<float>(d), A->on<float>(d),
                                 1.7f, rows, K, r);
    compare(c, "delta", delta, 0);
    return case_close(c);
}
static int low_rank_test() { return for_shapes(20, low_rank_case); }

static const DType weight_types[] = {DT_NF4, DT_NF4, DT_FP4, DT_BF16, DT_F16, DT_F32};

static int embed_case(DType act, int i) {
    Case *c = case_open(act);
    size_t V = test_size(50), D = test_size(300), T = i == 0 ? 0 : test_size(30);
    DType type = weight_types[i % 6];
    SHAPE(c, "V %zu D %zu T %zu type %d", V, D, T, type);
    Weight w[2];
    weight_array(c, w, type, i % 6 == 0, V, D);
    Array *ids = ints(c, T, V), *h = blank_act(c, T * D);
    OpSizes sizes = {};
    sizes.T = T, sizes.D = D;
    scratch(c, sizes);
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->embed(c->dev[d], h->at[d], &w[d], ids->on<int32_t>(d), T);
    compare(c, "h", h, 0);
    return case_close(c);
}
static int embed_test() { return for_shapes(24, embed_case); }

// ------------------------------------------------------------------------------ chapter 4: linears

// Up to three linears that read one x, on both devices.
struct LinearsCase {
    size_t T, K, n, N[3], r[3];
    Linear linear[2][3];
    Product products[2][3];
    Array *x, *dx, *y[3], *u[3], *dA[3], *dB[3];
    Batch batch[2];
};

static void linears_arrays(Case *c, LinearsCase *l, bool backward, bool head, int i) {
    DType type = weight_types[i % 6];
    bool bias = i % 4 == 1, drops = i % 3 == 1;
    l->T = i == 0 ? 0 : i == 1 ? 1 : i % 4 == 3 ? 1 + test_below(8) : 9 + test_below(40);
    l->K = i % 2 ? test_size(90) : 64 * (1 + test_below(2));
    l->n = head ? 1 : 1 + test_below(3);
    SHAPE(c, "T %zu K %zu N %zu type %d%s%s%s", l->T, l->K, l->n, type, bias ? " bias" : "",
          drops ? " dropout" : "", c->act == DT_BF16 ? " bf16" : "");
    batch_arrays(c, l->batch, l->T);
    l->x = acts(c, l->T * l->K);
    for (size_t p = 0; p < l->n; p++) {
        size_t N = l->N[p] = test_size(head ? 300 : 100);
        size_t r = l->r[p] = i % 5 == 0 ? 0 : test_size(9);
        Weight w[2];
        weight_array(c, w, type, i % 6 == 0, N, l->K);
        Array *b = bias ? floats(c, N) : NULL;
        Array *A = floats(c, r * l->K, 0.3f), *B = floats(c, N * r, 0.3f);
        l->dA[p] = floats(c, r * l->K);
        l->dB[p] = floats(c, N * r);
        l->u[p] = backward ? acts(c, l->T * r) : blank_act(c, l->T * r);
        l->y[p] = backward ? acts(c, l->T * N)
                : head     ? blank(c, l->T * N, 4)
                           : blank_act(c, l->T * N);
        for (int d = 0; d < 2; d++) {
            Linear *linear = &l->linear[d][p];
            *linear = Linear();
            linear->weight = w[d];
            linear->bias = b ? b->on<float>(d) : NULL;
            linear->lora.r = r;
            linear->lora.scale = 0.75f;
            linear->lora.dropout = drops ? 0.25f : 0;
            linear->lora.module = (uint32_t)(10 + p);
            linear->lora.A = A->on<float>(d);
            linear->lora.B = B->on<float>(d);
            linear->lora.dA = l->dA[p]->on<float>(d);
            linear->lora.dB = l->dB[p]->on<float>(d);
            l->products[d][p] = {linear, head && !backward ? NULL : l->y[p]->at[d], l->u[p]->at[d]};
        }
    }
    OpSizes sizes = {};
    sizes.T = head ? 0 : l->T, sizes.S = head ? l->T : 0, sizes.D = l->K;
    for (size_t p = 0; p < l->n; p++) {
        if (head) sizes.V_chunk = l->N[p];
        else sizes.F = max_size(sizes.F, l->N[p]);
        sizes.max_r = max_size(sizes.max_r, l->r[p]);
    }
    sizes.training = true;
    scratch(c, sizes);
}

static void compare_gradients(Case *c, const LinearsCase *l) {
    // du is rounded to bf16 from sums in another order: a few of its values are one step apart.
    double tolerance = c->act == DT_BF16 ? 1.0 / 256 : 1e-5;
    for (size_t p = 0; p < l->n; p++) {
        compare(c, "dB", l->dB[p], 1e-5);
        compare(c, "dA", l->dA[p], tolerance);
    }
}

static int linears_forward_on(DType act, bool matrix_units, int i) {
    Case *c = case_open(act, matrix_units);
    LinearsCase l;
    linears_arrays(c, &l, false, false, i);
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->linears_forward(c->dev[d], l.products[d], l.n, l.x->at[d], &l.batch[d]);
    for (size_t p = 0; p < l.n; p++) {
        compare_rounding(c, "u", l.u[p], 1e-5);
        compare_rounding(c, "y", l.y[p], 2e-5);
    }
    return case_close(c);
}
static int linears_forward_case(DType act, int i) { return linears_forward_on(act, true, i); }
static int linears_forward_test() { return for_shapes(36, linears_forward_case); }

static int linears_backward_on(DType act, bool matrix_units, int i) {
    Case *c = case_open(act, matrix_units);
    LinearsCase l;
    linears_arrays(c, &l, true, false, i);
    bool dx = i % 7 != 6;
    l.dx = blank_act(c, l.T * l.K);
    if (i % 6 == 2)                     // panels of a few rows: the sum takes several products
        ((Gpu *)c->dev[1]->gpu)->panel_bytes = round_up((l.K + 40) * 4 * 3, 256);
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->linears_backward(c->dev[d], dx ? l.dx->at[d] : NULL, l.products[d], l.n,
                                         l.x->at[d], &l.batch[d]);
    compare_act(c, "dx", l.dx, 2e-5);
    compare_gradients(c, &l);
    return case_close(c);
}
static int linears_backward_case(DType act, int i) { return linears_backward_on(act, true, i); }
static int linears_backward_test() { return for_shapes(36, linears_backward_case); }

static int old_card_case(DType act, int i) {
    if (act != DT_BF16) return 0;
    return linears_forward_on(act, false, i) + linears_backward_on(act, false, i);
}
static int old_card_test() { return for_shapes(20, old_card_case); }

static int head_logits_case(DType act, int i) {
    Case *c = case_open(act);
    LinearsCase l;
    linears_arrays(c, &l, false, true, i);
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->head_logits(c->dev[d], l.y[0]->on<float>(d), l.products[d], l.x->at[d],
                                    &l.batch[d]);
    compare_act(c, "u", l.u[0]);
    // u differs by a rounding now and then.
    compare(c, "logits", l.y[0], act == DT_BF16 && l.r[0] ? 1.0 / 256 : 2e-5);
    return case_close(c);
}
static int head_logits_test() { return for_shapes(30, head_logits_case); }

static int head_backward_case(DType act, int i) {
    Case *c = case_open(act);
    LinearsCase l;
    linears_arrays(c, &l, true, true, i);
    l.dx = floats(c, l.T * l.K);
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->head_backward(c->dev[d], l.dx->on<float>(d), l.products[d], l.x->at[d],
                                      &l.batch[d]);
    compare(c, "dx", l.dx, act == DT_BF16 && l.r[0] ? 1.0 / 256 : 2e-5);
    compare_gradients(c, &l);
    return case_close(c);
}
static int head_backward_test() { return for_shapes(30, head_backward_case); }

// Hints, right, wrong, doubled and for another scratch, change no bit, nor does a nested session.
static int prefetch_case(DType act, int i) {
    Case *c = case_open(act);
    Device *dev = c->dev[1];
    const size_t T = 12, K = 64, N = 40, n = 4, steps = 16;
    Weight w[4][2];
    Linear linear[4] = {};
    Array *y[2][16][2];
    Batch b[2];
    OpSizes sizes = {};
    SHAPE(c, "sequence %d", i);
    batch_arrays(c, b, T);
    Array *x = acts(c, T * K);
    for (size_t p = 0; p < n; p++) {
        weight_array(c, w[p], DT_NF4, p % 2, N, K);
        linear[p].weight = w[p][1];
    }
    for (auto &run : y)
        for (auto &step : run)
            for (Array *&one : step) one = blank_act(c, T * N);
    sizes.T = T, sizes.D = K, sizes.F = N;
    scratch(c, sizes);
    Device inner = *dev;
    void *other = dev->ops->allocate(dev, dev->scratch_size, NULL);
    std::vector<uint8_t> codes(N * K / 2, 0x5A);
    for (int hints = 0; hints < 2; hints++) {
        uint64_t state = test_state;
        for (size_t p = 0; p < n; p++)
            dev->ops->upload(dev, (void *)w[p][1].data, codes.data(), codes.size());
        size_t last = 0, p = 0, next = 0;
        for (size_t step = 0; step < steps; step++) {
            last = next;
            p = step % 5 == 2 ? p : step == 8 ? last : test_below(n);
            next = test_below(n);
            Product products[2] = {{&linear[p], y[hints][step][0]->at[1], NULL},
                                   {&linear[(p + 1) % n], y[hints][step][1]->at[1], NULL}};
            char *before = dev->scratch;
            if (step == 5 || step == 8) dev->scratch = (char *)other;       // a nested session
            dev->ops->linears_forward(dev, products, 1 + step % 2, x->at[1], &b[1]);
            if (step % 5 == 1) {            // other weights in the place of those hinted at last
                for (uint8_t &byte : codes) byte = (uint8_t)test_random();
                dev->ops->upload(dev, (void *)w[p = last][1].data, codes.data(), codes.size());
                for (uint8_t &byte : codes) byte = 0x5A;
            }
            if (hints && step % 5 != 1) dev->ops->prefetch(dev, &w[next][1]);
            if (hints && step % 7 == 3) dev->ops->prefetch(dev, &w[p][1]);
            if (step == 5 || step == 8) dev->scratch = before;
        }
        if (!hints) test_state = state;
    }
    dev->ops->release(dev, other, inner.scratch_size);
    for (size_t step = 0; step < steps; step++)
        for (size_t k = 0; k < 1 + step % 2; k++) {
            std::vector<uint8_t> plain = fetch(c, y[0][step][k], 1);
            std::vector<uint8_t> hinted = fetch(c, y[1][step][k], 1);
            test_hash(hinted.data(), hinted.size() - 1);
            if (plain == hinted) continue;
            c->bad += test_fail("step %zu differs with hints [%s]", step, c->what);
        }
    return case_close(c);
}
static int prefetch_test() { return for_shapes(10, prefetch_case); }

// -------------------------------------------------------------------------- chapter 5: elementwise

static int residual_norm_forward_case(DType act, int i) {
    Case *c = case_open(act);
    size_t T = i == 0 ? 0 : test_size(12), D = i == 1 ? 1 : i == 2 ? 2048 : test_size(700);
    bool add = i % 3 != 0;
    SHAPE(c, "T %zu D %zu%s", T, D, add ? " add" : "");
    Array *h = acts(c, T * D), *a = acts(c, T * D), *w = floats(c, D, 1, 1);
    Array *y = blank_act(c, T * D);
    Array *sum = i % 4 == 3 ? h : blank_act(c, T * D);
    OpSizes sizes = {};
    sizes.T = T, sizes.D = D;
    scratch(c, sizes);
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->residual_norm_forward(c->dev[d], y->at[d], sum->at[d], h->at[d],
                                              add ? a->at[d] : NULL, w->on<float>(d), T, D, 1e-5f);
    compare(c, "sum", sum, 0);
    compare_act(c, "y", y);
    return case_close(c);
}
static int residual_norm_forward_test() { return for_shapes(20, residual_norm_forward_case); }

static int residual_norm_backward_case(DType act, int i) {
    Case *c = case_open(act);
    size_t T = i == 0 ? 0 : test_size(12), D = i == 1 ? 1 : i == 2 ? 2048 : test_size(700);
    SHAPE(c, "T %zu D %zu", T, D);
    Array *sum = acts(c, T * D), *dy = acts(c, T * D), *w = floats(c, D, 1, 1);
    Array *dh = floats(c, T * D), *da = blank_act(c, T * D);
    OpSizes sizes = {};
    sizes.T = T, sizes.D = D;
    scratch(c, sizes);
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->residual_norm_backward(c->dev[d], dh->on<float>(d),
                                               i % 4 == 3 ? NULL : da->at[d], dy->at[d], sum->at[d],
                                               w->on<float>(d), T, D, 1e-5f);
    compare(c, "dh", dh, 1e-5);
    compare_act(c, "da", da);
    return case_close(c);
}
static int residual_norm_backward_test() { return for_shapes(20, residual_norm_backward_case); }

static int rope_case(DType act, int i) {
    Case *c = case_open(act);
    size_t T = i == 0 ? 0 : test_size(20), heads = test_size(4);
    size_t hd = i % 2 ? 16 * (1 + test_below(8)) : 2 * (1 + test_below(40));
    SHAPE(c, "T %zu heads %zu hd %zu", T, heads, hd);
    std::vector<float> frequency(hd / 2);
    for (size_t k = 0; k < hd / 2; k++) frequency[k] = powf(10000, -2.0f * (float)k / (float)hd);
    Array *f = array(c, hd / 2, 4, frequency.data()), *x = acts(c, T * heads * hd);
    Array *position = ints(c, T, i % 3 ? 100 : 200000);
    Batch b = {};
    b.T = T;
    OpSizes sizes = {};
    sizes.T = T, sizes.H = heads, sizes.hd = hd, sizes.D = heads * hd;
    scratch(c, sizes);
    for (int d = 0; d < 2; d++) {
        b.position = position->on<int32_t>(d);
        c->dev[d]->ops->rope(c->dev[d], x->at[d], heads, hd, f->on<float>(d), i % 2 ? 1 : -1, &b);
    }
    compare_act(c, "x", x);
    return case_close(c);
}
static int rope_test() { return for_shapes(20, rope_case); }

static int append_keys_case(DType act, int i) {
    Case *c = case_open(act);
    size_t T = i == 0 ? 0 : test_size(30), width = test_size(40), extra = test_below(10);
    SHAPE(c, "T %zu width %zu extra %zu", T, width, extra);
    Batch b[2];
    batch_arrays(c, b, T);
    // Each span's keys begin after its predecessor's, `extra` older ones first.
    std::vector<uint8_t> spans(b[0].n_spans * sizeof(Span));
    c->cpu.ops->download(&c->cpu, spans.data(), b[0].spans, spans.size());
    size_t rows = 0;
    for (size_t s = 0; s < b[0].n_spans; s++) {
        Span *span = (Span *)spans.data() + s;
        span->k0 = rows;
        span->nk = span->nq + extra;
        rows += span->nk;
    }
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->upload(c->dev[d], (void *)b[d].spans, spans.data(), spans.size());
    Array *k = acts(c, T * width), *v = acts(c, T * width);
    Array *keys = acts(c, rows * width), *values = acts(c, rows * width);
    for (int d = 0; d < 2; d++)
        c->dev[d]->ops->append_keys(c->dev[d], keys->at[d], values->at[d], k->at[d], v->at[d],
                                    width, &b[d]);
    compare(c, "keys", keys, 0);
    compare(c, "values", values, 0);
    return case_close(c);
}
static int append_keys_test() { return for_shapes(20, append_keys_case); }

static int swiglu_case(DType act, int i) {
    Case *c = case_open(act);
    size_t T = i == 0 ? 0 : test_size(9), F = i == 1 ? 1 : test_size(300);
    SHAPE(c, "T %zu F %zu", T, F);
    Array *gate = acts(c, T * F, i % 4 == 2 ? 100.0f : 3.0f), *up = acts(c, T * F);
    Array *dy = acts(c, T * F), *y = blank_act(c, T * F);
    Array *dgate = i % 2 ? gate : blank_act(c, T * F), *dup = i % 2 ? up : blank_act(c, T * F);
    OpSizes sizes = {};
    sizes.T = T, sizes.F = F;
    scratch(c, sizes);
    for (int d = 0; d < 2; d++) {
        const Ops *op = c->dev[d]->ops;
        op->swiglu_forward(c->dev[d], y->at[d], gate->at[d], up->at[d], T, F);
        op->swiglu_backward(c->dev[d], dgate->at[d], dup->at[d], dy->at[d], gate->at[d], up->at[d],
                            T, F);
    }
    compare_act(c, "y", y);
    compare_act(c, "dgate", dgate);
    compare_act(c, "dup", dup);
    return case_close(c);
}
static int swiglu_test() { return for_shapes(20, swiglu_case); }

static int gather_case(DType act, int i) {
    Case *c = case_open(act);
    size_t T = test_size(30), D = test_size(60), n = i == 0 ? 0 : 1 + test_below(T);
    SHAPE(c, "T %zu D %zu n %zu", T, D, n);
    std::vector<int32_t> rows(T);
    for (size_t t = 0; t < T; t++) rows[t] = (int32_t)t;
    for (size_t t = T; t-- > 1;) std::swap(rows[t], rows[test_below(t + 1)]);
    Array *index = array(c, n, 4, rows.data()), *x = acts(c, T * D), *out = blank_act(c, n * D);
    Array *dout = floats(c, n * D), *dh = blank(c, T * D, 4), *y = blank_act(c, T * D);
    for (int d = 0; d < 2; d++) {
        const Ops *op = c->dev[d]->ops;
        op->gather(c->dev[d], out->at[d], x->at[d], index->on<int32_t>(d), n, D);
        op->scatter(c->dev[d], dh->on<float>(d), dout->on<float>(d), index->on<int32_t>(d), n, T,
                    D);
        op->round_rows(c->dev[d], y->at[d], dh->on<float>(d), T * D);
    }
    compare(c, "out", out, 0);
    compare(c, "dh", dh, 0);
    compare(c, "rounded", y, 0);
    return case_close(c);
}
static int gather_test() { return for_shapes(20, gather_case); }

// -------------------------------------------------------------------------- chapter 7: loss, AdamW

static int cross_entropy_case(DType act, int i) {
    Case *c = case_open(act);
    size_t S = i == 0 ? 0 : test_size(12), V = 1 + test_below(600), slices = 1 + test_below(3);
    size_t chunk = (V + slices - 1) / slices;
    SHAPE(c, "S %zu V %zu chunk %zu", S, V, chunk);
    Array *target = ints(c, S, V), *logits[4], *dlogits[4];
    Array *max = blank(c, S, 4), *sum = blank(c, S, 4), *chosen = blank(c, S, 4);
    Array *nll = blank(c, S, 4), *hit = blank(c, S, 1);
    double none = 3;
    Array *total = array(c, 1, 8, &none);
    size_t n = 0;
    for (size_t first = 0; first < V; first += chunk, n++) {
        size_t C = min_size(chunk, V - first);
        logits[n] = floats(c, S * C, i % 3 ? 5.0f : 60.0f);
        dlogits[n] = blank_act(c, S * C);
        std::vector<uint8_t> z = fetch(c, logits[n], 0);
        float *x = (float *)z.data();
        for (size_t k = 0; k < S * C; k += 7)
            if (i % 4 == 3) x[k] = -INFINITY;                 // masked tokens
        if (i == 6 && S) x[S * C / 2] = NAN;                  // must reach the loss
        for (int d = 0; d < 2; d++)
            c->dev[d]->ops->upload(c->dev[d], logits[n]->at[d], x, S * C * 4);
    }
    OpSizes sizes = {};
    sizes.S = S, sizes.V_chunk = chunk;
    scratch(c, sizes);
    for (int d = 0; d < 2; d++) {
        const Ops *op = c->dev[d]->ops;
        float *m = max->on<float>(d), *s = sum->on<float>(d), *z = chosen->on<float>(d);
        const int32_t *wanted = target->on<int32_t>(d);
        for (size_t k = 0; k < n; k++)
            op->cross_entropy_forward(c->dev[d], m, s, z, logits[k]->on<float>(d), wanted,
                                      k * chunk, min_size(chunk, V - k * chunk), S);
        op->cross_entropy_end(c->dev[d], nll->on<float>(d), hit->on<uint8_t>(d),
                              i % 5 == 4 ? NULL : total->on<double>(d), m, s, z, S);
        for (size_t k = 0; k < n; k++)
            op->cross_entropy_backward(c->dev[d], dlogits[k]->at[d], logits[k]->on<float>(d), m, s,
                                       wanted, 0.125f, k * chunk,
                                       min_size(chunk, V - k * chunk), S);
    }
    if (i != 6) compare(c, "max", max, 1e-30);
    compare(c, "sum", sum, 1e-5);
    compare(c, "nll", nll, 1e-5);
    compare(c, "hit", hit, 0);
    for (size_t k = 0; k < n; k++) compare_act(c, "dlogits", dlogits[k], 2e-5);
    double sums[2];
    for (int d = 0; d < 2; d++) memcpy(&sums[d], fetch(c, total, d).data(), 8);
    if (sums[0] != sums[1] && !(fabs(sums[0] - sums[1]) <= 1e-5 * fabs(sums[0])) &&
        sums[0] == sums[0])
        c->bad += test_fail("total %g, expected %g [%s]", sums[1], sums[0], c->what);
    if (sums[0] != sums[0] && sums[1] == sums[1])
        c->bad += test_fail("a NaN was lost [%s]", c->what);
    return case_close(c);
}
static int cross_entropy_test() { return for_shapes(24, cross_entropy_case); }

static int adamw_case(DType act, int i) {
    Case *c = case_open(act);
    size_t n = i == 0 ? 0 : i == 1 ? 1 : i == 2 ? 30000 : test_size(3000);
    SHAPE(c, "n %zu case %d", n, i);
    Array *p = floats(c, n), *g = floats(c, n, i % 3 ? 1.0f : 0.001f), *m = floats(c, n, 0.1f);
    Array *v = floats(c, n, 0.01f, 0.01f);
    StepRecord zero[2] = {};
    zero[0].loss = i % 5 == 2 ? NAN : 2.5;
    zero[1].loss = i % 5 == 3 ? NAN : 1;
    if (i % 7 == 5 && n) {                                    // a gradient that is not finite
        float bad = i % 2 ? NAN : INFINITY;
        for (int d = 0; d < 2; d++)
            c->dev[d]->ops->upload(c->dev[d], g->on<float>(d) + n / 2, &bad, 4);
    }
    Array *records = array(c, 2, sizeof(StepRecord), zero);
    StepRecord seen[2][2];
    for (int d = 0; d < 2; d++) {
        const Ops *op = c->dev[d]->ops;
        StepRecord *r = records->on<StepRecord>(d);
        for (size_t step = 0; step < 2; step++) {
            op->clip_gradient(c->dev[d], r + step, step ? r : NULL, g->on<float>(d), n, 1);
            op->adamw(c->dev[d], p->on<float>(d), g->on<float>(d), m->on<float>(d), v->on<float>(d),
                      n, 1e-2f, 0.9f, 0.99f, 1e-8f, 0.1f, r + step, step + 1);
        }
        op->download(c->dev[d], seen[d], r, sizeof seen[d]);
    }
    for (int step = 0; step < 2; step++) {
        const StepRecord *a = &seen[0][step], *b = &seen[1][step];
        bool both = a->squares == b->squares ||
                    (a->squares != a->squares && b->squares != b->squares);
        if (a->refused != b->refused ||
            (!both && !(fabs(a->squares - b->squares) <= 1e-12 * a->squares)) ||
            (!a->refused && !(fabsf(a->clip - b->clip) <= 1e-6f)))
            c->bad += test_fail("step %d: squares %g clip %g refused %d, expected %g %g %d [%s]",
                                step, b->squares, (double)b->clip, b->refused, a->squares,
                                (double)a->clip, a->refused, c->what);
    }
    compare(c, "p", p, 1e-6);
    compare(c, "m", m, 1e-6);
    compare(c, "v", v, 1e-6);
    return case_close(c);
}
static int adamw_test() { return for_shapes(20, adamw_case); }

// ----------------------------------------------------------------------------- chapters 2 and 9

// Uploads larger than the ring of pinned pieces, unaligned ones, and a buffer written right after.
static int upload_test() {
    Device *dev = test_device(DT_BF16, true);
    size_t sizes[] = {0, 1, 3, 4096, STAGING_BYTES, STAGING_BYTES + 1,
                      (size_t)STAGING_PIECES * STAGING_BYTES + 12345};
    int bad = 0;
    for (size_t bytes : sizes) {
        std::vector<uint8_t> data(bytes + 1), back(bytes + 8, 1);
        for (size_t i = 0; i < bytes; i++) data[i] = (uint8_t)(i * 31 + i / 255);
        std::vector<uint8_t> copy = data;
        uint8_t *memory = (uint8_t *)dev->ops->allocate(dev, bytes + 8, NULL);
        dev->ops->zero(dev, memory, bytes + 8);
        dev->ops->upload(dev, memory + 5, data.data(), bytes);
        memset(data.data(), 0xEE, bytes);                     // upload has read it
        dev->ops->download(dev, back.data(), memory + 5, bytes);
        if (bytes && memcmp(back.data(), copy.data(), bytes)) bad += test_fail("%zu bytes", bytes);
        dev->ops->download(dev, back.data(), memory, 5);
        for (int i = 0; i < 5; i++) bad += back[i] != 0;
        dev->ops->release(dev, memory, bytes + 8);
    }
    return bad + (dev->ops->available(dev) == 0) + (dev->ops->check(dev, NULL) != 0);
}

static int open_fails(const char *options, int number, const char *expected) {
    Device dev = {};
    qlora_error err = {{0}};
    char name[64];
    dev.allocator = cpu_allocator();
#ifdef CUDA_ON_CPU
    emulator_set(options);
#else
    if (options[0]) return 0;
#endif
    int bad = qlora_cuda_open(&dev, number, QLORA_COMPUTE_AUTO, name, sizeof name, &err) == 0;
    if (bad) qlora_cuda_close(&dev);
#ifdef CUDA_ON_CPU
    emulator_set("devices=1 sm=80");
    if (!strcmp(options, "no_cublas")) emulator_set("no_cublas=0");
#endif
    if (bad) return test_fail("a GPU was opened with \"%s\"", options);
    if (dev.ops || dev.gpu) return test_fail("a device that was not opened was changed");
    if (strstr(err.text, expected)) return 0;
    return test_fail("\"%s\" does not say \"%s\"", err.text, expected);
}
static int open_test() {
    return open_fails("", 99, "GPU 99") + open_fails("", -1, "GPU -1") +
           open_fails("devices=0", 0, "no NVIDIA GPU") + open_fails("sm=70", 0, "7.5") +
           open_fails("no_cublas", 0, "cuBLAS") + open_fails("fail_malloc=1", 0, "memory");
}

// Larger than the card: an answer, and the device works on.
static int memory_test() {
    Device *dev = test_device(DT_REAL, true);
    qlora_error err = {{0}};
    if (dev->ops->allocate(dev, (size_t)1 << 45, &err)) return test_fail("32 TiB were found");
    if (!strstr(err.text, "out of GPU memory")) return test_fail("%s", err.text);
    void *memory = dev->ops->allocate(dev, 100, &err);
    if (!memory || (uintptr_t)memory % 256) return test_fail("%s", err.text);
    dev->ops->zero(dev, memory, 100);
    dev->ops->release(dev, memory, 100);
    dev->ops->release(dev, NULL, 0);
    return dev->ops->check(dev, &err) ? test_fail("%s", err.text) : 0;
}

#ifdef CUDA_ON_CPU
// One short run of everything; each of its calls fails once. The failure is told, never passed
// over, and nothing is left behind.
static int failing_run(qlora_error *err, long *closing) {
    Device dev = {};
    char name[64];
    dev.allocator = cpu_allocator();
    if (qlora_cuda_open(&dev, 0, QLORA_COMPUTE_BF16, name, sizeof name, err)) return -1;
    const size_t T = 10, K = 64, N = 64, r = 4;
    OpSizes sizes = {};
    sizes.T = T, sizes.D = K, sizes.F = N, sizes.max_r = r, sizes.training = true;
    dev.ops->scratch(&dev, &sizes);
    size_t bytes = dev.scratch_size + 65536;
    char *memory = (char *)dev.ops->allocate(&dev, bytes, err);
    int result = memory ? 0 : -1;
    if (memory) {
        std::vector<uint8_t> host(65536, 0);
        Span span = {0, T, 0, T, 0};
        Linear linear[2] = {};
        Product products[2];
        Batch b = {};
        char *at = memory + dev.scratch_size;
        dev.scratch = memory;
        dev.ops->upload(&dev, at, host.data(), host.size());
        dev.ops->upload(&dev, at + 60000, &span, sizeof span);
        for (int i = 0; i < 2; i++) {
            linear[i].weight.dtype = DT_NF4;
            linear[i].weight.N = N, linear[i].weight.K = K;
            linear[i].weight.data = at + 4096 * i;
            linear[i].weight.code = linear[i].weight.absmax = (const float *)(at + 8192);
            linear[i].lora.r = r;
            linear[i].lora.A = linear[i].lora.B = (float *)(at + 12288);
            linear[i].lora.dA = linear[i].lora.dB = (float *)(at + 16384);
            linear[i].lora.dropout = i ? 0.5f : 0;
            products[i] = {&linear[i], at + 20480 + 4096 * i, at + 30720 + 1024 * i};
        }
        b.T = T, b.n_spans = 1, b.most_queries = b.most_keys = T, b.training = true;
        b.spans = (const Span *)(at + 60000);
        dev.ops->linears_forward(&dev, products, 2, at + 40960, &b);
        dev.ops->prefetch(&dev, &linear[0].weight);
        dev.ops->linears_backward(&dev, at + 49152, products, 2, at + 40960, &b);
        dev.ops->quantize_scales(&dev, (uint8_t *)at, (float *)(at + 4096),
                                 (const float *)(at + 8192), 300, (const float *)(at + 12288));
        dev.ops->clip_gradient(&dev, (StepRecord *)(at + 57344), NULL, (const float *)(at + 8192),
                               100, 1);
        dev.ops->download(&dev, host.data(), at, host.size());
        result = dev.ops->check(&dev, err);
        dev.ops->release(&dev, memory, bytes);
        if (!result) result = dev.ops->check(&dev, err);
    }
    *closing = emulator_calls();
    qlora_cuda_close(&dev);
    *closing = emulator_calls() - *closing;
    return result;
}

static int failing_calls_test() {
    emulator_set("sm=80");
    int calls = 0, told = 0;
    long closing = 0;
    for (bool more = true; more && calls < 2000; calls++) {
        char option[64];
        qlora_error err = {{0}};
        long before = emulator_calls();
        snprintf(option, sizeof option, "fail_call=%d", calls + 1);
        emulator_set(option);
        int result = failing_run(&err, &closing);
        emulator_set("fail_call=0");
        more = emulator_calls() - before > calls;             // was there an n-th call?
        emulator_reset();
        if (result && !err.text[0]) return test_fail("call %d failed without a message", calls + 1);
        if (result && !more) return test_fail("nothing failed, yet: %s", err.text);
        told += result != 0;
    }
    // What fails while the GPU is closed is told to nobody, and when the first name of cuBLAS is
    // not found there are others.
    if (told + closing + 1 == calls - 1) return 0;
    return test_fail("%d calls, %d failures told, %ld calls to close", calls - 1, told, closing);
}
#endif

#define ATTENTION_TESTS "test_attention.inc"
#define DECODE_TESTS "test_decode.inc"
#if __has_include(ATTENTION_TESTS) && !defined ONLY_K1
#include ATTENTION_TESTS
#endif
#if __has_include(DECODE_TESTS) && !defined ONLY_K1
#include DECODE_TESTS
#endif

// ------------------------------------------------------------------------------------------- main

struct Test { const char *name, *proves; int (*function)(); };

static const Test tests[] = {
    {"quantize", "codes and scales are the CPU's, bit for bit, short blocks and denormals too",
     quantize_test},
    {"quantize_scales", "so are doubly quantised scales and their offset", quantize_scales_test},
    {"low_rank", "an adapter's share of a merged matrix is the CPU's, bit for bit", low_rank_test},
    {"embed", "rows of every type of table are read exactly", embed_test},
    {"linears_forward", "y and u of groups of linears, all types, biases, dropout, few rows",
     linears_forward_test},
    {"linears_backward", "dx, dA, dB of the same", linears_backward_test},
    {"old_card", "the same on a card without bf16 units", old_card_test},
    {"head_logits", "logits of the head, in pieces where a panel is too small", head_logits_test},
    {"head_backward", "the way back from them", head_backward_test},
    {"prefetch", "hints, right or wrong, and nested sessions change no bit", prefetch_test},
    {"residual_norm_forward", "sum exactly, norm closely", residual_norm_forward_test},
    {"residual_norm_backward", "its gradient", residual_norm_backward_test},
    {"rope", "rotation both ways, also far out", rope_test},
    {"append_keys", "new keys go behind the old ones of their span", append_keys_test},
    {"swiglu", "both ways, in place too", swiglu_test},
    {"gather", "gather, scatter and round_rows, exactly", gather_test},
    {"cross_entropy", "softmax over slices, loss and gradient; infinities, and a NaN gets through",
     cross_entropy_test},
    {"adamw", "clipping and AdamW; steps that are not finite are refused, and those after",
     adamw_test},
    {"upload", "uploads of any size, whose source may change at once", upload_test},
    {"memory", "a refused allocation is told and harms nothing", memory_test},
    {"open", "why a GPU cannot be opened is said", open_test},
#ifdef CUDA_ON_CPU
    {"failing_calls", "every call that fails is told, and nothing is left behind",
     failing_calls_test},
#endif
};

int main(int argc, char **argv) {
    std::vector<Test> all(tests, tests + sizeof tests / sizeof *tests);
    std::vector<const char *> names;
    int passed = 0, failed = 0, skipped = 0;
#if __has_include(ATTENTION_TESTS) && !defined ONLY_K1
    for (auto &t : attention_tests) all.push_back({t.name, t.proves, t.function});
#endif
#if __has_include(DECODE_TESTS) && !defined ONLY_K1
    for (auto &t : decode_tests) all.push_back({t.name, t.proves, t.function});
#endif
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--list")) {
            for (const Test &t : all) printf("%-24s %s\n", t.name, t.proves);
            return 0;
        }
        if (!strcmp(argv[i], "--seed") && i + 1 < argc) test_seed = strtoull(argv[++i], NULL, 10);
        else names.push_back(argv[i]);
    }
    for (const Test &t : all) {
        bool wanted = names.empty();
        for (const char *name : names) wanted = wanted || !strncmp(t.name, name, strlen(name));
        if (!wanted) { skipped++; continue; }
        test_state = test_seed;
        for (const char *p = t.name; *p; p++) test_state = test_state * 31 + (uint8_t)*p;
        int bad = t.function();
#ifdef CUDA_ON_CPU
        if (emulator_failures()) bad++;
        emulator_reset();
#endif
        printf("%-4s %s\n", bad ? "FAIL" : "ok", t.name);
        fflush(stdout);
        *(bad ? &failed : &passed) += 1;
    }
    for (auto &pair : test_devices)
        for (Device &dev : pair)
            if (dev.gpu) qlora_cuda_close(&dev);
#ifdef CUDA_ON_CPU
    if (emulator_leaks()) failed++;
    emulator_reset();
#endif
    printf("hash %016llx\n%d passed, %d failed, %d skipped\n", (unsigned long long)test_digest,
           passed, failed, skipped);
    return failed != 0;
}
