// tokenize_many.c: the ids and the text of many texts, for check_tokenizers.py.
//
//     tokenize_many DIRECTORY <texts >answers
//
// A text comes as its length (4 bytes, little-endian) and its bytes. For each come back: how many
// ids there are, the ids with what the post-processor adds, the length of the text that the ids
// without that decode to, that text. A failure is a count of -1 and a message instead of the text.
#include "../../qlora.c"

static void put_number(size_t n) {
    int32_t number = (int32_t)n;
    fwrite(&number, 4, 1, stdout);
}

int main(int argc, char **argv) {
    static const qlora_allocator heap = {default_allocate, default_release, NULL};
    qlora_error err = {{0}};
    Tokenizer *t = argc == 2 ? tokenizer_open(argv[1], &heap, &err) : NULL;
    Buffer text = {.allocator = &heap}, ids = {.allocator = &heap}, decoded = {.allocator = &heap};
    if (!t) {
        fprintf(stderr, "%s\n", argc == 2 ? err.text : "usage: tokenize_many DIRECTORY");
        return 1;
    }
    for (uint32_t n; fread(&n, 4, 1, stdin) == 1;) {
        text.size = ids.size = decoded.size = 0;
        if (buffer_reserve(&text, n, &err) || fread(text.data, 1, n, stdin) != n) return 1;
        int bad = tokenizer_encode(t, text.data, n, true, &ids, &err);
        const int32_t *id = (const int32_t *)(void *)ids.data;
        size_t count = ids.size / sizeof *id, plain = count - t->n_prefix - t->n_suffix;
        if (!bad && count)
            bad = tokenizer_decode(t, id + t->n_prefix, plain, false, &decoded, &err);
        put_number(bad ? (size_t)-1 : count);
        if (!bad) fwrite(id, 4, count, stdout);
        put_number(bad ? strlen(err.text) : decoded.size);
        fwrite(bad ? err.text : decoded.data, 1, bad ? strlen(err.text) : decoded.size, stdout);
    }
    buffer_free(&text);
    buffer_free(&ids);
    buffer_free(&decoded);
    tokenizer_close(t);
    return 0;
}
