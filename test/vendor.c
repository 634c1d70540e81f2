// A program that vendors qlora.c and qlora.h: fine-tunes a tiny model for a few steps and
// generates.
#include "qlora.h"

#include <stdio.h>
#include <string.h>

static int collect(void *user, const char *utf8, size_t n) {
    size_t *bytes = user;
    (void)utf8;
    *bytes += n;
    return 0;
}

static void show(void *user, const qlora_progress *p) {
    double *last = user;
    *last = p->loss;
}

int main(int argc, char **argv) {
    qlora_error err = {{0}};
    qlora_options options = qlora_default_options();
    qlora_train_options train = qlora_default_train_options();
    double loss = 0;
    size_t bytes = 0, n = 0;
    int32_t *ids = NULL;
    if (argc != 3) return fprintf(stderr, "usage: vendor MODEL DATA\n"), 2;
    options.threads = 2;
    qlora_model *model = qlora_open(argv[1], &options, &err);
    if (!model) return fprintf(stderr, "%s\n", err.text), 1;
    train.output_dir = NULL;
    train.max_steps = 3;
    train.progress = show;
    train.user = &loss;
    if (qlora_train(model, argv[2], &train, &err)) return fprintf(stderr, "%s\n", err.text), 1;
    if (qlora_tokenize(model, "Once", strlen("Once"), 1, &ids, &n, &err) ||
        qlora_generate(model, ids, n, NULL, collect, &bytes, NULL, NULL, &err))
        return fprintf(stderr, "%s\n", err.text), 1;
    qlora_free(model, ids);
    qlora_close(model);
    if (!(loss > 0)) return fprintf(stderr, "no loss was reported\n"), 1;
    return 0;
}
