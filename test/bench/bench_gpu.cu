// bench_gpu.cu: what qlora.cu reaches of what the card has, both measured in this run.
//
//     build/bench_gpu [name ...]          qwen2.5-0.5b qwen2.5-7b llama-3.1-8b; default: all three
//
// Prints the card's own limits (bf16 matrix products of cuBLAS on random numbers, copying), then
// the kernels that decide a step as shares of these, then whole models of random weights in NF4,
// made in build/bench-gpu/ by qlora_init and kept: training, decoding, peak memory, all through
// qlora.h.
// Every figure is the median of several after a warm-up. Other work on the card makes it worthless.
//
// Includes qlora.cu, to call its static functions; is linked with qlora.c built with -DQLORA_CUDA.
#include "../../qlora.cu"

#include <algorithm>
#include <string>
#include <sys/stat.h>
#include <time.h>
#include <vector>

static void stop_if(bool bad, const char *message) {
    if (!bad) return;
    fprintf(stderr, "bench_gpu: %s\n", message);
    exit(1);
}
static void must(cudaError_t error) { stop_if(error != cudaSuccess, cudaGetErrorString(error)); }

static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v.empty() ? 0 : v[v.size() / 2];
}

// Seconds that what `ask` asks for takes on the stream: the median of 9 after 3.
template <typename Ask> static double seconds_of(Device *dev, const Ask &ask) {
    Gpu *gpu = (Gpu *)dev->gpu;
    qlora_error err = {{0}};
    cudaEvent_t start, end;
    std::vector<double> all;
    must(cudaEventCreate(&start));
    must(cudaEventCreate(&end));
    for (int i = 0; i < 12; i++) {
        float ms = 0;
        must(cudaEventRecord(start, gpu->stream));
        ask();
        must(cudaEventRecord(end, gpu->stream));
        must(cudaEventSynchronize(end));
        must(cudaEventElapsedTime(&ms, start, end));
        if (i >= 3) all.push_back(ms * 1e-3);
    }
    stop_if(dev->ops->check(dev, &err) != 0, err.text);
    must(cudaEventDestroy(start));
    must(cudaEventDestroy(end));
    return median(all);
}

// ------------------------------------------------------------------------------ memory and numbers

static void *memory_of(Device *dev, size_t bytes) {
    qlora_error err = {{0}};
    void *p = dev->ops->allocate(dev, bytes, &err);
    stop_if(!p, err.text);
    return p;
}

// bf16 or float in -1 .. 1, or bytes: matrix units draw less power, and run faster, on zeros.
template <typename T> __global__ void fill_kernel(T *x, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    uint32_t bits = (uint32_t)(i * 0x9E3779B97F4A7C15u >> 32) * 0x85EBCA6Bu;
    bits ^= bits >> 15;
    if (i >= n) return;
    if constexpr (sizeof(T) == 1) x[i] = (T)(bits >> 8);
    else from_float(x + i, unit_float(bits * 0xC2B2AE35u) * 2 - 1);
}
template <typename T> static T *random_memory(Device *dev, size_t n) {
    T *x = (T *)memory_of(dev, n * sizeof(T));
    fill_kernel<T><<<blocks_for(n, 256), 256, 0, ((Gpu *)dev->gpu)->stream>>>(x, n);
    must(cudaGetLastError());
    return x;
}

// An NF4 matrix with quantised scales, of random codes.
static Weight random_nf4(Device *dev, size_t N, size_t K) {
    Weight w = {};
    w.dtype = DT_NF4, w.N = N, w.K = K, w.offset = 1;
    w.data = random_memory<uint8_t>(dev, N * K / 2);
    w.code = random_memory<float>(dev, 16);
    w.absmax8 = random_memory<uint8_t>(dev, N * K / QUANT_BLOCK);
    w.code8 = random_memory<float>(dev, 256);
    w.absmax2 = random_memory<float>(dev, ceil_div(N * K / QUANT_BLOCK, SCALE_BLOCK));
    return w;
}
static double nf4_bytes(double n) { return n * (0.5 + 1.0 / 64 + 4.0 / (64 * 256)); }

// -------------------------------------------------------------------------------- limits, kernels

struct Limits { double flops, bytes; };         // per second

static Limits measure_limits(Device *dev) {
    const int n = 8192;
    const size_t bytes = (size_t)1 << 30;
    Gpu *gpu = (Gpu *)dev->gpu;
    bf16 *a = random_memory<bf16>(dev, (size_t)n * n), *b = random_memory<bf16>(dev, (size_t)n * n);
    bf16 *c = (bf16 *)memory_of(dev, (size_t)n * n * 2);
    char *from = (char *)random_memory<uint8_t>(dev, bytes), *to = (char *)memory_of(dev, bytes);
    const float one = 1, zero = 0;
    double product = seconds_of(dev, [&] {
        cublasStatus_t status = gpu->blas.gemm(
            gpu->handle, CUBLAS_OP_T, CUBLAS_OP_N, n, n, n, &one, a, CUDA_R_16BF, n, b, CUDA_R_16BF,
            n, &zero, c, CUDA_R_16BF, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        stop_if(status != CUBLAS_STATUS_SUCCESS, "cublasGemmEx failed");
    });
    double copy = seconds_of(dev, [&] {
        must(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, gpu->stream));
    });
    for (void *p : {(void *)a, (void *)b, (void *)c, (void *)from, (void *)to})
        dev->ops->release(dev, p, 0);
    return {2.0 * n * n * n / product, 2.0 * (double)bytes / copy};
}

static void print_row(const char *what, double value, const char *unit, double share,
                      const char *of) {
    printf("%-46s %10.1f %-9s", what, value, unit);
    if (share > 0) printf(" %5.1f %% of %s", 100 * share, of);
    printf("\n");
    fflush(stdout);
}

static void bench_weights(Device *dev, Limits best) {
    const size_t K = 4096, N = 28672;           // gate and up of Llama-3.1-8B
    Gpu *gpu = (Gpu *)dev->gpu;
    Weight w = random_nf4(dev, N, K);
    bf16 *panel = (bf16 *)memory_of(dev, N * K * 2);
    double n = (double)N * (double)K;
    auto dequantise = [&] { dequantise_launch<bf16, 8>(panel, K, &w, 0, N, gpu->stream); };
    double rate = (nf4_bytes(n) + 2 * n) / seconds_of(dev, dequantise);
    print_row("dequantise NF4, 28672 x 4096", rate * 1e-9, "GB/s", rate / best.bytes,
              "copy bandwidth");

    // The same matrix times one to eight rows, and smaller ones, and a head.
    static const struct { size_t N, K, T; bool head; const char *name; } cases[] = {
        {28672, 4096, 1, false, "x W, NF4 28672 x 4096, 1 row"},
        {28672, 4096, 8, false, "x W, NF4 28672 x 4096, 8 rows"},
        {6144, 4096, 1, false, "x W, NF4 6144 x 4096, 1 row"},
        {4096, 14336, 1, false, "x W, NF4 4096 x 14336, 1 row"},
        {4096, 4096, 1, false, "x W, NF4 4096 x 4096, 1 row"},
        {28672, 4096, 1, true, "x W, bf16 28672 x 4096, 1 row"}};
    bf16 *x = random_memory<bf16>(dev, 8 * 14336), *y = (bf16 *)memory_of(dev, 8 * N * 4);
    for (auto c : cases) {
        Linear linear = {};
        linear.weight = w;
        linear.weight.N = c.N, linear.weight.K = c.K;
        if (c.head) linear.weight.dtype = DT_BF16, linear.weight.data = panel;
        Product p = {&linear, y, NULL};
        Batch batch = {};
        batch.T = c.T;
        double values = (double)c.N * (double)c.K, bytes = c.head ? 2 * values : nf4_bytes(values);
        // Eight in a row, of weights that the cache may hold: a model's are other ones each time.
        double seconds = seconds_of(dev, [&] {
            for (int i = 0; i < 8; i++) few_rows(dev, NULL, &p, 1, x, &batch, DECODE_WARPS);
        }) / 8;
        print_row(c.name, bytes / seconds * 1e-9, "GB/s", bytes / seconds / best.bytes,
                  "copy bandwidth");
    }
    for (void *p : {(void *)w.data, (void *)w.code, (void *)w.absmax8, (void *)w.code8,
                    (void *)w.absmax2, (void *)panel, (void *)x, (void *)y})
        dev->ops->release(dev, p, 0);
}

// Four causal sequences of 2048, 32 heads of 128 in groups of 4.
static void bench_attention(Device *dev) {
    const size_t H = 32, G = 8, hd = 128, n = 2048, spans = 4, T = spans * n;
    AttentionShape shape = {H, G, hd, 0, 0.088f};
    OpSizes sizes = {};
    sizes.T = sizes.S = T, sizes.D = sizes.F = H * hd, sizes.H = H, sizes.G = G, sizes.hd = hd;
    sizes.V = sizes.V_chunk = 1024, sizes.max_span = n, sizes.n_spans = spans, sizes.max_r = 16;
    sizes.threads = 1, sizes.training = true;
    dev->ops->scratch(dev, &sizes);
    dev->scratch = (char *)memory_of(dev, dev->scratch_size);
    bf16 *x[8];                             // q, out, dout, dq: (T, H hd); k, v, dk, dv: (T, G hd)
    for (int i = 0; i < 8; i++) x[i] = random_memory<bf16>(dev, T * (i < 4 ? H : G) * hd);
    float *lse = (float *)memory_of(dev, T * H * sizeof *lse);
    Span host[4];
    for (size_t i = 0; i < spans; i++) host[i] = {i * n, n, i * n, n, (uint32_t)i};
    Span *there = (Span *)memory_of(dev, sizeof host);
    dev->ops->upload(dev, there, host, sizeof host);
    Batch batch = {};
    batch.T = T, batch.n_spans = spans, batch.spans = there;
    batch.most_queries = batch.most_keys = n;
    double pairs = (double)spans * H * n * (n + 1) / 2;
    double forward = seconds_of(dev, [&] {
        dev->ops->attention_forward(dev, x[1], lse, x[0], x[4], x[5], shape, &batch);
    });
    double backward = seconds_of(dev, [&] {
        dev->ops->attention_backward(dev, x[3], x[6], x[7], x[2], x[0], x[4], x[5], x[1], lse,
                                     shape, &batch);
    });
    print_row("attention forward, hd 128, 2k causal", 4 * hd * pairs / forward * 1e-12, "TFLOP/s",
              0, "");
    print_row("attention backward", 10 * hd * pairs / backward * 1e-12, "TFLOP/s", 0, "");
    for (int i = 0; i < 8; i++) dev->ops->release(dev, x[i], 0);
    dev->ops->release(dev, lse, 0);
    dev->ops->release(dev, there, 0);
    dev->ops->release(dev, dev->scratch, 0);
    dev->scratch = NULL;
}

// ------------------------------------------------------------------------------------ whole models

static const struct Shape {
    const char *name, *config;
    double linears, head;                       // values in the layers' matrices, in the head
    bool tied;
} shapes[] = {
    {"qwen2.5-0.5b",
     "{\"architectures\": [\"Qwen2ForCausalLM\"], \"model_type\": \"qwen2\",\n"
     " \"vocab_size\": 151936, \"hidden_size\": 896, \"intermediate_size\": 4864,\n"
     " \"num_hidden_layers\": 24, \"num_attention_heads\": 14, \"num_key_value_heads\": 2,\n"
     " \"hidden_act\": \"silu\", \"max_position_embeddings\": 32768, \"rms_norm_eps\": 1e-06,\n"
     " \"rope_theta\": 1000000.0, \"tie_word_embeddings\": true, \"torch_dtype\": \"bfloat16\"}\n",
     24 * (2.0 * 896 * 896 + 2.0 * 896 * 128 + 3.0 * 896 * 4864), 151936.0 * 896, true},
    {"qwen2.5-7b",
     "{\"architectures\": [\"Qwen2ForCausalLM\"], \"model_type\": \"qwen2\",\n"
     " \"vocab_size\": 152064, \"hidden_size\": 3584, \"intermediate_size\": 18944,\n"
     " \"num_hidden_layers\": 28, \"num_attention_heads\": 28, \"num_key_value_heads\": 4,\n"
     " \"hidden_act\": \"silu\", \"max_position_embeddings\": 32768, \"rms_norm_eps\": 1e-06,\n"
     " \"rope_theta\": 1000000.0, \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\"}\n",
     28 * (2.0 * 3584 * 3584 + 2.0 * 3584 * 512 + 3.0 * 3584 * 18944), 152064.0 * 3584, false},
    {"llama-3.1-8b",
     "{\"architectures\": [\"LlamaForCausalLM\"], \"model_type\": \"llama\",\n"
     " \"vocab_size\": 128256, \"hidden_size\": 4096, \"intermediate_size\": 14336,\n"
     " \"num_hidden_layers\": 32, \"num_attention_heads\": 32, \"num_key_value_heads\": 8,\n"
     " \"hidden_act\": \"silu\", \"max_position_embeddings\": 131072, \"rms_norm_eps\": 1e-05,\n"
     " \"rope_theta\": 500000.0, \"tie_word_embeddings\": false, \"torch_dtype\": \"bfloat16\"}\n",
     32 * (2.0 * 4096 * 4096 + 2.0 * 4096 * 1024 + 3.0 * 4096 * 14336), 128256.0 * 4096, false}};

static void write_text(const std::string &path, const std::string &text) {
    FILE *file = fopen(path.c_str(), "wb");
    stop_if(!file || fwrite(text.data(), 1, text.size(), file) != text.size() || fclose(file),
            ("cannot write " + path).c_str());
}
static std::string read_text(const std::string &path) {
    std::string text;
    FILE *file = fopen(path.c_str(), "rb");
    stop_if(!file, ("cannot read " + path + "; start me in the repository's root").c_str());
    for (int c; (c = getc(file)) != EOF;) text += (char)c;
    fclose(file);
    return text;
}

// The model's directory, made when it is not there: random weights, 4-bit, and a small tokenizer.
static std::string make_model(const Shape &shape) {
    const std::string all = "build/bench-gpu/", from = all + shape.name + "-config",
                      model = all + shape.name, tokenizer = "test/fixtures/tokenizers/byte/";
    qlora_error err = {{0}};
    qlora_options opt = qlora_default_options();
    struct stat there;
    for (const std::string &folder : {std::string("build"), all, from}) mkdir(folder.c_str(), 0777);
    if (stat((model + "/config.json").c_str(), &there) == 0) return model;
    write_text(from + "/config.json", shape.config);
    for (const char *name : {"tokenizer.json", "tokenizer_config.json"})
        write_text(from + "/" + name, read_text(tokenizer + name));
    stop_if(qlora_init(from.c_str(), model.c_str(), 1, &opt, &err) != 0, err.text);
    return model;
}

// Samples of more than 2048 tokens each, to be cut.
static std::string make_data() {
    const std::string path = "build/bench-gpu/data.jsonl";
    std::string text;
    uint64_t state = 1;
    for (int sample = 0; sample < 80; sample++) {
        text += "{\"text\": \"";
        for (int i = 0; i < 8000; i++) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            text += i % 6 == 5 ? ' ' : (char)('a' + (state >> 33) % 26);
        }
        text += "\"}\n";
    }
    write_text(path, text);
    return path;
}

struct Watch {
    size_t before, most;                        // bytes of the card in use
    std::vector<double> seconds;                // of each step
    double tokens;
};

static size_t used_memory() {
    size_t available = 0, total = 0;
    must(cudaMemGetInfo(&available, &total));
    return total - available;
}
static void watch_step(void *user, const qlora_progress *p) {
    Watch *w = (Watch *)user;
    w->most = std::max(w->most, used_memory());
    w->tokens = (double)p->tokens;
    if (p->step > 3) w->seconds.push_back(p->seconds);
}

static double now() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Seconds to answer a prompt of 16 tokens with `tokens` new ones.
static double generate(qlora_model *q, size_t tokens) {
    qlora_error err = {{0}};
    qlora_sampling how = qlora_default_sampling(q);
    int32_t ids[16];
    for (int i = 0; i < 16; i++) ids[i] = 10 + i;
    how.max_new_tokens = tokens, how.ignore_eos = 1, how.temperature = 0;
    double start = now();
    stop_if(qlora_generate(q, ids, 16, &how, NULL, NULL, NULL, NULL, &err) != 0, err.text);
    return now() - start;
}

static void bench_model(const Shape &shape, Limits best) {
    qlora_error err = {{0}};
    qlora_options opt = qlora_default_options();
    qlora_train_options train = qlora_default_train_options();
    std::string model = make_model(shape), data = make_data(), name = shape.name;
    Watch watch = {used_memory(), 0, {}, 0};
    opt.device = "cuda";
    double start = now();
    qlora_model *q = qlora_open(model.c_str(), &opt, &err);
    stop_if(!q, err.text);
    print_row((name + ": load").c_str(), now() - start, "s", 0, "");

    std::vector<double> decode;
    generate(q, 8);
    for (int i = 0; i < 3; i++) decode.push_back((generate(q, 288) - generate(q, 32)) / 256);
    double seconds = median(decode), bytes = nf4_bytes(shape.linears) + 2 * shape.head;
    print_row((name + ": decode").c_str(), 1 / seconds, "tokens/s", bytes / seconds / best.bytes,
              "copy bandwidth");
    watch.most = used_memory();
    print_row((name + ": memory of decoding").c_str(), (double)(watch.most - watch.before) * 1e-9,
              "GB", 0, "");

    train.mask = "all", train.truncate = "keep-end", train.max_length = 2048, train.val_split = 0;
    train.per_device_train_batch_size = 4, train.gradient_accumulation_steps = 1;
    train.max_steps = 12, train.logging_steps = 1, train.num_train_epochs = 1;
    train.progress = watch_step, train.user = &watch;
    watch.most = 0;
    stop_if(qlora_train(q, data.c_str(), &train, &err) != 0, err.text);
    double rate = watch.tokens / median(watch.seconds), flops = 4 * (shape.linears + shape.head);
    print_row((name + ": train, r 16, 4 x 2048 tokens").c_str(), rate, "tokens/s",
              rate * flops / best.flops, "bf16 rate (4 P)");
    print_row((name + ": memory of training").c_str(), (double)(watch.most - watch.before) * 1e-9,
              "GB", 0, "");
    qlora_close(q);
}

static void *take(void *, size_t bytes) { return malloc(bytes); }
static void give(void *, void *memory, size_t) { free(memory); }

int main(int argc, char **argv) {
    static const qlora_allocator heap = {take, give, NULL};
    qlora_error err = {{0}};
    char name[256] = "";
    Device dev = {};
    dev.allocator = &heap;
    stop_if(qlora_cuda_open(&dev, 0, QLORA_COMPUTE_BF16, name, sizeof name, &err) != 0, err.text);
    Limits best = measure_limits(&dev);
    printf("%s\n", name);
    print_row("bf16 matrix product, cuBLAS 8192^3", best.flops * 1e-12, "TFLOP/s", 0, "");
    print_row("copy, read and written", best.bytes * 1e-9, "GB/s", 0, "");
    bench_weights(&dev, best);
    bench_attention(&dev);
    qlora_cuda_close(&dev);
    for (const Shape &shape : shapes) {
        bool wanted = argc < 2;
        for (int i = 1; i < argc; i++) wanted = wanted || strcmp(argv[i], shape.name) == 0;
        if (wanted) bench_model(shape, best);
    }
    return 0;
}
