// qlora.h: fine-tune a Hugging Face language model with QLoRA, from C or C++.
//
// A whole program that trains an adapter and then talks with it:
//
//     #include "qlora.h"
//     #include <stdio.h>
//
//     static int print(void *user, const char *utf8, size_t n) {
//         (void)user;
//         return fwrite(utf8, 1, n, stdout) == n ? 0 : 1;      // non-zero stops the generation
//     }
//
//     int main(void) {
//         qlora_error err = {{0}};
//         qlora_options opt = qlora_default_options();         // NF4, bf16 where the CPU has it
//         qlora_model *model = qlora_open("model/", &opt, &err);
//         if (!model) return fprintf(stderr, "%s\n", err.text), 1;
//
//         qlora_train_options train = qlora_default_train_options();
//         train.output_dir = "out";
//         if (qlora_train(model, "data.jsonl", &train, &err) != 0)
//             return fprintf(stderr, "%s\n", err.text), 1;
//
//         qlora_sampling how = qlora_default_sampling(model);
//         qlora_message ask = {"user", "What has keys but opens no lock?"};
//         if (qlora_chat(model, &ask, 1, &how, print, NULL, &err) != 0)
//             return fprintf(stderr, "%s\n", err.text), 1;
//         qlora_close(model);
//     }
//
// Build it with    cc -O3 -march=native program.c qlora.c -lm -pthread    and nothing else.
//
// Conventions
//   Errors     A function that can fail returns 0 or a pointer on success, -1 or NULL on failure,
//              and writes one line into err->text: what file, what place, what was expected, what
//              was found. err may be NULL. The library never prints, exits or aborts.
//   Ownership  What a function returns through a `**out` belongs to the caller and is released with
//              qlora_free(model, ptr). Everything else stays with the handle it came from.
//   Threads    A handle may be used by one thread at a time; different handles are independent
//              (there is no global state). Each handle owns its pool of worker threads.
//   Text       Is UTF-8, with a length or NUL-terminated, as each function says.
//   Results    Do not depend on the number of threads nor on how sequences are batched.
#ifndef QLORA_H
#define QLORA_H

#include <stddef.h>
#include <stdint.h>

#define QLORA_VERSION_MAJOR 0
#define QLORA_VERSION_MINOR 1
#define QLORA_VERSION "0.1"

#ifdef __cplusplus
extern "C" {
#endif

// ------------------------------------------------------------------------------ errors and options

// Where a failing call leaves its message. Start with qlora_error err = {{0}}.
typedef struct { char text[1024]; } qlora_error;

// Memory hook: every byte the library holds comes from here. allocate returns memory aligned for
// any type, or NULL; release gets the size that was asked for.
typedef struct {
    void *(*allocate)(void *user, size_t bytes);
    void (*release)(void *user, void *memory, size_t bytes);
    void *user;
} qlora_allocator;

// How the frozen matrices of the layers are held. Embeddings, norms, biases and the output head
// always keep the type they have in the file.
typedef enum {
    QLORA_QUANT_NONE,   // as in the file (plain LoRA)
    QLORA_QUANT_NF4,    // 4-bit NormalFloat, bit for bit bitsandbytes (Dettmers 2023, section 3)
    QLORA_QUANT_FP4     // bitsandbytes' 4-bit float, the type its own default asks for
} qlora_quant;

// What goes into a matrix multiplication. Sums, norms, softmax, loss, LoRA weights, their gradients
// and the optimiser are float32 in both.
typedef enum {
    QLORA_COMPUTE_AUTO, // bf16 where the processor multiplies it in hardware, else f32
    QLORA_COMPUTE_F32,
    QLORA_COMPUTE_BF16
} qlora_compute;

typedef struct {
    qlora_quant quant;
    int double_quant;               // 1: the block scales are quantised too (4.13 bits per weight)
    qlora_compute compute;
    const char *device;             // "auto" (or NULL): a GPU if one works, else the CPU; "cpu";
                                    // "cuda" or "cuda:N"
    int threads;                    // 0: one for each physical core
    int defer_weights;              // 1: read when first needed: qlora_train checks data before
    size_t memory;                  // bytes this model may take in all; 0: what the machine has.
                                    // Less memory means more recomputation, never other results
    qlora_allocator allocator;      // {NULL, NULL, NULL}: malloc and free
    int (*stop)(void *user);        // polled; non-zero ends the call at the next safe point
    void *stop_user;
    const char *chat_template;      // a template's name; NULL: the model's own, or ChatML
    const char *prompt_template;    // instead: text with {field} holes, the last one the answer
    const char *add_tokens;         // "a,b": made tokens of their own; must fit in the vocabulary
} qlora_options;

// NF4 with double quantisation, automatic compute type, all physical cores.
qlora_options qlora_default_options(void);

// ------------------------------------------------------------------------------------------ models

typedef struct qlora_model qlora_model;

// Opens a Hugging Face model directory (config.json, *.safetensors, tokenizer files) or a PEFT
// adapter directory, whose base model is found through its adapter_config.json. Quantises while
// reading, one tensor at a time. A directory that is 4-bit already keeps its own quantisation.
// opt may be NULL. Returns NULL and a message if anything is missing, malformed or unsupported.
qlora_model *qlora_open(const char *path, const qlora_options *opt, qlora_error *err);
void qlora_close(qlora_model *model);           // NULL is fine

// What a person should know about how the model's chat template was found; "" if nothing.
const char *qlora_note(const qlora_model *model);

// Loads a PEFT LoRA adapter (adapter_config.json + adapter_model.safetensors) onto the model, in
// place of the one it may have. Every tensor of the file must find its place, with equal shapes.
int qlora_load_adapter(qlora_model *model, const char *directory, qlora_error *err);

// Writes the model's adapter as a PEFT directory, each file whole or not at all.
int qlora_save_adapter(qlora_model *model, const char *directory, qlora_error *err);

typedef struct {
    const char *architecture;       // "llama", "qwen2", "mistral"
    size_t layers, hidden, vocab;   // L, D, V
    size_t context;                 // tokens the model was made for
    size_t parameters;              // of the base model, logical elements (4-bit ones count once)
    size_t weight_bytes;            // what they take in memory
    size_t adapter_parameters;      // trainable, 0 without an adapter
    qlora_compute compute;          // the one in force, never AUTO
    int threads;                    // the number in force
    const char *device;             // the GPU's name, "" when the CPU computes
} qlora_model_info;
qlora_model_info qlora_info(const qlora_model *model);

void qlora_free(qlora_model *model, void *memory);      // what came through a `**out`

// ------------------------------------------------------------------------------------ text and ids

// Text (n bytes of UTF-8) to token ids, exactly as the model's own tokenizer does it. add_special
// also adds what the tokenizer puts around a text, such as <s>.
int qlora_tokenize(qlora_model *model, const char *text, size_t n, int add_special,
                   int32_t **ids, size_t *n_ids, qlora_error *err);

// Ids to text; *n_text counts the bytes before its NUL. skip_special leaves special tokens out.
int qlora_detokenize(qlora_model *model, const int32_t *ids, size_t n_ids, int skip_special,
                     char **text, size_t *n_text, qlora_error *err);

// ------------------------------------------------------------------------------------- computation

// The model's answer to n ids: logits (n, V), row t scores the token after ids[0..t]. float32,
// n * vocab values in the caller's memory.
int qlora_logits(qlora_model *model, const int32_t *ids, size_t n, float *logits, qlora_error *err);

typedef struct {
    size_t max_new_tokens;
    float temperature;              // 0: greedy, the most likely token
    int top_k;                      // 0: off
    float top_p, min_p;             // 1 and 0: off
    float repetition_penalty;       // 1: off (Keskar 2019: positive logits divided, others times p)
    uint64_t seed;
    int keep_special;               // 1: special tokens are part of the text
    int ignore_eos;                 // 1: go on after an end token
} qlora_sampling;

// The model's generation_config.json where it has one, else greedy; 256 new tokens, seed 42.
qlora_sampling qlora_default_sampling(const qlora_model *model);

// Called with each piece of text as it becomes certain, whole characters only. Non-zero stops.
typedef int (*qlora_text_callback)(void *user, const char *utf8, size_t n);

// Continues the ids up to an end token of the model, max_new_tokens, the end of the context, or
// until the callback says so. ids_out may be NULL; else it gets the new ids with the end token.
int qlora_generate(qlora_model *model, const int32_t *ids, size_t n, const qlora_sampling *how,
                   qlora_text_callback text, void *user, int32_t **ids_out, size_t *n_out,
                   qlora_error *err);

typedef struct { const char *role, *content; } qlora_message;   // role: system, user, assistant

// Applies the model's chat template to the messages and generates the assistant's turn.
int qlora_chat(qlora_model *model, const qlora_message *messages, size_t n,
               const qlora_sampling *how, qlora_text_callback text, void *user, qlora_error *err);

// ---------------------------------------------------------------------------------------- training

// Everything `./qlora train` can be told, with the same names. See `./qlora train --help`.
struct qlora_progress;
typedef struct {
    const char *output_dir;         // made if missing; NULL: nothing is written
    const char *target_modules;     // "all-linear", or names: "q_proj,v_proj,lm_head"
    const char *mask;               // what is learnt: "content", "turn", "last" or "all"
    const char *truncate;           // samples over max_length: "drop", "keep-start" or "keep-end"
    const char *packing;            // "none", or "bfd": batches count packs filled to max_length
    const char *const *more_data;   // further data files, NULL at the end, or NULL
    const char *field_user, *field_assistant;   // columns of the data, if it has its own names,
    const char *field_system;                   // or NULL
    const char *take;               // "a:b": records a to b-1 of all files together, or NULL
    size_t max_samples;             // no more than the first so many; 0: all
    size_t lora_r;
    float lora_alpha, lora_dropout;
    float learning_rate, warmup_ratio, max_grad_norm, weight_decay;
    const char *lr_scheduler_type;  // "constant", "constant_with_warmup", "linear", "cosine"
    double num_train_epochs;
    size_t max_steps;               // 0: as the epochs say
    size_t per_device_train_batch_size, gradient_accumulation_steps;
    size_t max_length;              // tokens of a sample or a pack
    int skip_bad_lines;             // 1: malformed records are counted instead of ending the run
    double val_split;               // share of the samples that is held out for evaluation
    const char *val_file;           // a file to evaluate on instead, or NULL (see qlora_train)
    size_t eval_steps;              // evaluate after so many, and before all, after each epoch
    size_t save_steps;              // a checkpoint every so many steps; 0: after each epoch
    size_t save_total_limit;        // checkpoints that are kept besides the best; 0: all
    int resume;                     // 1: go on from the newest good checkpoint in output_dir
    int overwrite_output_dir;       // 1: a run that is in output_dir may be replaced
    size_t logging_steps;
    uint64_t seed;
    const char *command_line;       // for run.json, may be NULL
    void (*progress)(void *user, const struct qlora_progress *progress);
    void (*message)(void *user, const char *line);
    void *user;
} qlora_train_options;

// What is known after an optimiser step.
typedef struct qlora_progress {
    size_t step, steps;             // done, in all
    double epoch, loss;             // mean over the step's supervised tokens, before the update
    double grad_norm;               // before clipping
    double learning_rate;           // used by this step
    size_t tokens, supervised;      // of this step
    double seconds;                 // it took
} qlora_progress;

// Defaults: r 16, alpha 32, dropout 0, all linears; lr 2e-4, cosine, warmup 3 %, clip 1.0; 3
// epochs, batch 4, accumulate 4; max_length 1024; 10 % held out; seed 42.
qlora_train_options qlora_default_train_options(void);

// Fine-tunes a new adapter on a dataset and leaves it on the model. `data` is a file, JSONL or one
// JSON array, of records in any of the forms that README lists, or a directory with train.jsonl and
// perhaps valid.jsonl, which is then held out. Data that would spoil the training in silence (no
// supervised end token, every sample too long, ...) is refused; the rest is reported to
// options->message. A step's loss is the mean over all supervised tokens of its micro-batches.
// output_dir gets the adapter with tokenizer and configuration, log.jsonl, loss.svg, run.json and
// checkpoint-N/ directories. When the model's stop callback asks, the last completed step is saved
// and -1 returned; a resumed run ends with the same bits as one never stopped.
int qlora_train(qlora_model *model, const char *data, const qlora_train_options *options,
                qlora_error *err);

typedef struct {
    double loss, standard_error;    // mean negative log-likelihood of a supervised token, in nats
    double perplexity;              // exp(loss)
    double bits_per_byte;           // of the supervised text: comparable between tokenizers
    double accuracy;                // share of supervised tokens that were the most likely one
    size_t tokens, samples;         // supervised tokens, samples
} qlora_score;

// Scores the model, with its adapter if it has one, on a dataset file, or the test.jsonl of a
// directory. Of the options those that say how data is read are used, and the batch size.
int qlora_evaluate(qlora_model *model, const char *data, const qlora_train_options *options,
                   qlora_score *score, qlora_error *err);

// ------------------------------------------------------------------------------- model directories

typedef struct {
    size_t adapter_parameters;      // that went into the merged weights
    double relative_change;         // |s B A| / |W| over all merged matrices (Frobenius)
    double lost_in_rounding;        // share of changed weights that rounding set back
} qlora_merge_report;

// Writes base + adapter as a complete Hugging Face directory: W + s B A in float32, rounded once to
// the base's own type (a 4-bit base is dequantised), in shards of at most max_shard_bytes. Streams:
// needs memory for a few million values. out_dir may be model_dir. report may be NULL.
int qlora_merge(const char *model_dir, const char *adapter_dir, const char *out_dir,
                size_t max_shard_bytes, const qlora_options *options, qlora_merge_report *report,
                qlora_error *err);

// Writes the model 4-bit, as transformers and bitsandbytes do (quant: NF4 or FP4): a directory of
// its own with config, tokenizer and the other small files. Nothing is overwritten.
int qlora_quantize(const char *model_dir, const char *out_dir, const qlora_options *options,
                   qlora_error *err);

// Makes a model with random weights from a config.json (or a directory that has one), for tests and
// benchmarks; bf16, or 4-bit at once when options->quant is NF4 or FP4. Tokenizer files that lie
// beside the config are copied.
int qlora_init(const char *config, const char *out_dir, uint64_t seed, const qlora_options *options,
               qlora_error *err);

// =================================================================================================
//  For qlora.c and qlora.cu only: the op table
//
//  The transformer of qlora.c is written once, against these operations. Chapter 3 holds their
//  plain CPU versions, which are the specification; chapter 18 the fast ones; qlora.cu those on a
//  GPU. Letters and contracts are in chapter 1. Activations ("act") are float32 or bf16, as the
//  device was opened; arithmetic inside an op is float32 and every output is rounded once.
//
//  Every pointer in an op's arguments that is not said to be the host's is memory of the device:
//  what `allocate` gave, filled by `upload` and seen through `download`. Structures themselves
//  (Weight, Batch, Product) are the host's. Ops of a GPU are asked for and run later, in order;
//  what goes wrong in them sticks, makes the ops after it do nothing, and is told by `check`.
// =================================================================================================
#ifdef QLORA_INTERNAL

#ifndef __cplusplus
#include <stdbool.h>
#endif

#ifdef __CUDACC__
#define QLORA_BOTH __host__ __device__
#else
#define QLORA_BOTH
#endif

#ifdef QLORA_REAL_DOUBLE            // the tests' float64 build, see chapter 1
typedef double real;
#else
typedef float real;
#endif

typedef enum { DT_REAL, DT_BF16, DT_F16, DT_F32, DT_NF4, DT_FP4, DT_OTHER } DType;

// Values of a block, scales of a block, scales summed in a row when their mean is formed.
enum { QUANT_BLOCK = 64, SCALE_BLOCK = 256, SCALE_SUM = 4096 };

// Chapter 2: midpoints between the levels of the two 4-bit types; FP4's codes by magnitude.
extern const float qlora_nf4_thresholds[15], qlora_fp4_thresholds[7];
extern const uint8_t qlora_fp4_by_size[8];

// A frozen matrix (N, K), row-major. 4-bit: element i = row * K + column lies in byte i / 2, the
// even one in the high nibble; its value is code[nibble] * scale of block i / 64.
typedef struct {
    DType dtype;                    // DT_F32, DT_BF16, DT_F16, DT_NF4, DT_FP4
    size_t N, K;
    const void *data;
    const float *code;              // (16) 4-bit: the values of the nibbles
    const float *absmax;            // (blocks) one scale a block, or NULL when it is quantised:
    const uint8_t *absmax8;         // (blocks) code8[absmax8] * absmax2[block / 256] + offset
    const float *code8;             // (256)
    const float *absmax2;           // (blocks / 256, rounded up)
    float offset;
} Weight;

// The trainable low-rank pair of a linear: y += s (x A^T) B^T (Hu 2021). r = 0: none.
typedef struct {
    size_t r;
    real scale;                     // s = alpha / r
    float dropout;                  // probability that a feature of x is zeroed on the way to A
    uint32_t module;                // number of this linear: the dropout's stream
    real *A, *B;                    // (r, K), (N, r)
    real *dA, *dB;                  // same shapes; NULL when not training
} Lora;

typedef struct {
    Weight weight;
    const float *bias;              // (N) or NULL
    Lora lora;
} Linear;

// One sequence of a micro-batch: its queries are rows q0 .. q0+nq-1, its keys rows k0 .. k0+nk-1.
// The last query sees the last key; without a cache q0 = k0 and nq = nk.
typedef struct { size_t q0, nq, k0, nk; uint32_t ordinal; } Span;

// A micro-batch: T rows laid end to end, and what the random numbers are keyed with.
typedef struct {
    size_t T, n_spans;
    size_t most_queries, most_keys; // of any one span, at most
    const Span *spans;              // (n_spans) cover 0..T-1 in order; device
    const int32_t *position;        // (T) place of each row in its sequence; device
    uint64_t seed;
    uint32_t step;
    bool training;                  // dropout happens
} Batch;

// One of several linears that read the same x: q, k, v or gate, up.
typedef struct {
    const Linear *linear;
    void *y;                        // (T, N) act: the output; in the backward pass dy
    void *u;                        // (T, r) act: s x A^T, saved for the backward pass
} Product;

typedef struct { size_t H, G, hd, window; real scale; } AttentionShape;   // window 0: all keys

// What one optimiser step leaves behind, in the memory of the device.
typedef struct {
    double loss;                    // sum of the nll of its supervised tokens
    double squares;                 // of its gradient
    real clip;                      // what the gradient is multiplied with
    int32_t refused;                // 1: loss or gradient, here or in a step before, is not finite
} StepRecord;

// A text that is being generated. Pointers are the device's, the numbers and `how` the host's.
typedef struct {
    int32_t *ids;                   // prompt and answer
    uint32_t *n;                    // (1) how many there are
    int32_t *id, *position;         // (1) (1) the batch of one row that comes next,
    Span *span;                     // (1) with its span
    void *work;                     // sample_bytes(V) of scratch; zero between calls
    size_t prompt;                  // ids that were given, not drawn
    const qlora_sampling *how;
} Sequence;

// Where ops run.
typedef struct Device {
    const struct Ops *ops;
    DType act;                      // of activations: DT_REAL or DT_BF16
    const qlora_allocator *allocator;
    struct Pool *pool;              // threads of the host
    char *scratch;                  // (scratch_size) device memory for the duration of one op
    size_t scratch_size;
    char *thread_scratch;           // (threads, thread_size) CPU: one piece for each thread
    size_t thread_size;
    void *gpu;                      // state of qlora.cu
} Device;

// The most that ops are called with; decides how much scratch they need.
typedef struct {
    size_t T, S;                    // tokens and supervised rows of a micro-batch
    size_t D, F;                    // D: the larger of hidden size and H hd
    size_t H, G, hd;
    size_t V, V_chunk;              // columns of the head, in all and at a time
    size_t n_spans, max_span;       // sequences, and keys of one
    size_t max_r, threads;
    bool training;
} OpSizes;

typedef struct Ops {
    bool host;                      // the device's memory is the program's own

    // Memory. allocate: 256-aligned, NULL with a message when there is not as much. upload copies
    // from and download to the host; upload may return before the copy is done, but after it has
    // read `host`. download waits for everything asked for before; so does check, which returns -1
    // with a message when anything since the device was opened has failed. scratch sets
    // scratch_size and thread_size of the device.
    void *(*allocate)(Device *dev, size_t bytes, qlora_error *err);
    void (*release)(Device *dev, void *memory, size_t bytes);
    size_t (*available)(Device *dev);               // bytes that could be allocated now
    void (*upload)(Device *dev, void *to, const void *host, size_t bytes);
    void (*download)(Device *dev, void *host, const void *from, size_t bytes);
    void (*zero)(Device *dev, void *memory, size_t bytes);
    int (*check)(Device *dev, qlora_error *err);
    void (*scratch)(Device *dev, const OpSizes *sizes);

    // values raw (n) of type from, beginning at a block's start, to 4-bit codes and scales
    void (*quantize)(Device *dev, uint8_t *packed, float *absmax, const void *raw, DType from,
                     DType to, size_t n);
    // n scales to codes (n) and absmax2 (n / 256) with the levels map (256); returns their offset
    float (*quantize_scales)(Device *dev, uint8_t *codes, float *absmax2, const float *absmax,
                             size_t n, const float *map);
    // delta (rows, K) = s (B A), what merging adds to rows of a matrix: B (rows, r), A (r, K); each
    // product and each sum, in order of r, is rounded on its own
    void (*low_rank)(Device *dev, real *delta, const real *B, const real *A, real s, size_t rows,
                     size_t K, size_t r);

    // A GPU may get this matrix ready for the linears_forward or linears_backward that comes next
    void (*prefetch)(Device *dev, const Weight *weight);

    // h (T, D) = rows of the embedding
    void (*embed)(Device *dev, void *h, const Weight *table, const int32_t *ids, size_t T);

    // sum (T, D) = h + a (a may be NULL), y = rmsnorm(sum) * w
    void (*residual_norm_forward)(Device *dev, void *y, void *sum, const void *h, const void *a,
                                  const float *w, size_t T, size_t D, float eps);
    // dh (T, D) real += the norm's share of dy; da = dh rounded, the gradient of a (may be NULL)
    void (*residual_norm_backward)(Device *dev, real *dh, void *da, const void *dy, const void *sum,
                                   const float *w, size_t T, size_t D, float eps);

    // products[i].y = x W^T + b + u B^T with u = s dropout(x) A^T, for all i; x is (T, K)
    void (*linears_forward)(Device *dev, Product *products, size_t n, const void *x,
                            const Batch *batch);
    // dx (T, K) = sum over i of dy W + dropout(du A), du = s dy B; dA, dB += . dx may be NULL
    void (*linears_backward)(Device *dev, void *dx, const Product *products, size_t n,
                             const void *x, const Batch *batch);

    // rotates the heads of x (T, heads * hd) in place; sign -1 is the backward pass
    void (*rope)(Device *dev, void *x, size_t heads, size_t hd, const float *frequency, int sign,
                 const Batch *batch);

    // the rows k, v (T, width) to where attention reads them: the last nq of each span's keys
    void (*append_keys)(Device *dev, void *keys, void *values, const void *k, const void *v,
                        size_t width, const Batch *batch);
    // out (T, H * hd), lse (T, H) = attention of q (T, H * hd) on keys and values (.., G * hd)
    void (*attention_forward)(Device *dev, void *out, real *lse, const void *q, const void *k,
                              const void *v, AttentionShape shape, const Batch *batch);
    void (*attention_backward)(Device *dev, void *dq, void *dk, void *dv, const void *dout,
                               const void *q, const void *k, const void *v, const void *out,
                               const real *lse, AttentionShape shape, const Batch *batch);

    // y (T, F) = silu(gate) * up
    void (*swiglu_forward)(Device *dev, void *y, const void *gate, const void *up, size_t T,
                           size_t F);
    void (*swiglu_backward)(Device *dev, void *dgate, void *dup, const void *dy, const void *gate,
                            const void *up, size_t T, size_t F);

    // out (n, D) = rows index[i] of x; and back: dh (T, D) = 0 except rows index[i] = dout
    void (*gather)(Device *dev, void *out, const void *x, const int32_t *index, size_t n, size_t D);
    void (*scatter)(Device *dev, real *dh, const real *dout, const int32_t *index, size_t n,
                    size_t T, size_t D);

    // The head, a slice of C of its V rows at a time: logits (S, C) real of x (S, D), and slice->u
    void (*head_logits)(Device *dev, real *logits, const Product *slice, const void *x,
                        const Batch *rows);
    // dx (S, D) real += dlogits W + du A for slice->y = dlogits (S, C) act; dA, dB +=
    void (*head_backward)(Device *dev, real *dx, const Product *slice, const void *x,
                          const Batch *rows);
    // One slice of the softmax over columns first .. first+C-1: max, sum and chosen (S), the logit
    // of the target, are begun by the slice with first = 0 and updated by the others
    void (*cross_entropy_forward)(Device *dev, real *max, real *sum, real *chosen,
                                  const real *logits, const int32_t *target, size_t first, size_t C,
                                  size_t S);
    // nll (S) from the final max, sum, chosen; hit (S) = the target was the most likely; *total,
    // unless it is NULL, += the sum of nll
    void (*cross_entropy_end)(Device *dev, real *nll, uint8_t *hit, double *total, const real *max,
                              const real *sum, const real *chosen, size_t S);
    // dlogits (S, C) act = scale * (softmax - onehot), from the final max and sum
    void (*cross_entropy_backward)(Device *dev, void *dlogits, const real *logits, const real *max,
                                   const real *sum, const int32_t *target, real scale, size_t first,
                                   size_t C, size_t S);

    // y (n) act = x rounded
    void (*round_rows)(Device *dev, void *y, const real *x, size_t n);

    // record's squares of g (n), in double, in a fixed order; clip = min(1, most / norm); refused
    // when loss or squares are not finite or the step before was (NULL: none)
    void (*clip_gradient)(Device *dev, StepRecord *record, const StepRecord *before, const real *g,
                          size_t n, real most);
    // p, m, v (n): one AdamW step with gradient g * clip, unless refused; step counts from 1
    void (*adamw)(Device *dev, real *p, const real *g, real *m, real *v, size_t n, real lr,
                  real beta1, real beta2, real eps, real decay, const StepRecord *record,
                  size_t step);

    // Draws the token that follows s->ids from logits (V), which it may change, writes it to
    // ids[n] and id, and moves n, position and span on by one
    void (*next_token)(Device *dev, real *logits, const Sequence *s, size_t V);
    // Calls step(user), which asks for the same ops with the same arguments at every call: a GPU
    // records them once and replays the record. *record is NULL at first; forget releases it
    void (*replay)(Device *dev, void **record, void (*step)(void *user), void *user);
    void (*forget)(Device *dev, void *record);
} Ops;

// Bytes of Sequence.work: a mark for each token, and a score with its id.
static inline size_t sample_bytes(size_t V) { return V * (8 + 2 * sizeof(real)); }

// -------------------------------------------------------------------------------- random numbers

// Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a keyed
// bijection of a counter. Every random number of a run is a pure function of where it is used:
//     key     = (seed, step)                   counter = (feature / 4, position, ordinal, module)
// so that packing, recomputation, batch shape, resuming and the device cannot change it.
QLORA_BOTH static inline void philox(uint32_t out[4], const uint32_t counter[4],
                                     const uint32_t key[2]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t a = (uint64_t)0xD2511F53u * c0, b = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(b >> 32) ^ c1 ^ k0, n2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b;
        c3 = (uint32_t)a;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0; out[1] = c1; out[2] = c2; out[3] = c3;
}

// What a number is drawn for; the value takes the place of the step in the key (no run has as many
// steps), so that no two uses share a stream.
enum { RANDOM_INIT = 0x7F000001, RANDOM_SHUFFLE = 0x7F000002, RANDOM_SAMPLE = 0x7F000003 };

QLORA_BOTH static inline uint32_t random_u32(uint64_t seed, uint32_t use, uint32_t stream,
                                             uint64_t index) {
    uint32_t key[2] = {(uint32_t)seed ^ (uint32_t)(seed >> 32) * 0x9E3779B9u, use}, out[4];
    uint64_t block = index / 4;
    uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), 0, stream};
    philox(out, counter, key);
    return out[index % 4];
}

// Uniform in [0, 1): the upper 24 bits, which a float holds exactly.
QLORA_BOTH static inline float unit_float(uint32_t bits) { return (float)(bits >> 8) * 0x1p-24f; }

// ------------------------------------------------------------------------------------- qlora.cu

// Opens GPU `number` for the compute type asked for: fills ops, act and gpu of the device. name
// (size) gets what a person would call it. Fails, leaving the device as it was, when there is none.
int qlora_cuda_open(Device *dev, int number, qlora_compute compute, char *name, size_t size,
                    qlora_error *err);
void qlora_cuda_close(Device *dev);

#endif // QLORA_INTERNAL

#ifdef __cplusplus
}
#endif
#endif // QLORA_H
