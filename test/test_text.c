// JSON's free cases, and tokenizers of every kind that a file can describe.

// ------------------------------------------------------------------------------------------- JSON

// The cases that the standard leaves open: numbers of any size are accepted (they keep their text),
// lone surrogates, broken UTF-8, UTF-16, a byte order mark and 500 arrays in one another are not.
static void test_json_free_cases(Test *t) {
    static const char folder[] = "../shared/real/hostile/JSONTestSuite/test_parsing";
    size_t accepted = 0, refused = 0;
    DIR *directory = opendir(folder);
    if (!directory) { skip(t, "%s is not here", folder); return; }
    for (struct dirent *e; (e = readdir(directory));) {
        Region region = {.allocator = &heap};
        qlora_error err = {{0}};
        size_t n;
        bool expected = strncmp(e->d_name, "i_number_", 9) == 0;
        if (strncmp(e->d_name, "i_", 2)) continue;
        char *data = load_bytes(path_of("%s/%s", folder, e->d_name).text, &n);
        bool ok = data && json_parse(data, n, "text", 1, &region, &err);
        check(t, ok == expected, "%s: %s", e->d_name, ok ? "accepted" : err.text);
        *(ok ? &accepted : &refused) += 1;
        free(data);
        region_free(&region);
    }
    closedir(directory);
    check(t, accepted == 10 && refused == 25, "%zu accepted, %zu refused", accepted, refused);
}

// ------------------------------------------------------------------------------- variants of files

// Puts a member in the place of the one of its name, or at the end.
static void set_member(Json *object, const char *key, const Json *value, Region *region) {
    Json **link = &object->first;
    while (*link && strcmp((*link)->key, key)) link = &(*link)->next;
    Json *member = region_alloc(region, 1, sizeof *member, NULL);
    *member = *value;
    member->key = region_text(region, key, strlen(key), NULL);
    member->key_length = strlen(key);
    member->next = *link ? (*link)->next : NULL;
    object->count += !*link;
    *link = member;
}

static Json *member_of(Json *object, const char *key) {
    Json *found = object ? object->first : NULL;
    while (found && strcmp(found->key, key)) found = found->next;
    return found;
}

static void save_json(const char *path, const Json *value) {
    Buffer text = {.allocator = &heap};
    qlora_error err = {{0}};
    if (json_write(&text, value, 0, &err)) exit(2);
    save_bytes(path, text.data, text.size);
    buffer_free(&text);
}

// Writes the changed tokenizer.json (and configuration) into the directory.
static void save_variant(const char *directory, Json *root, const Json *changes, Region *region) {
    remove(path_of("%s/tokenizer_config.json", directory).text);
    for (const Json *c = changes->first; c; c = c->next) {
        Json *added = member_of(root, "added_tokens");
        if (strcmp(c->key, "config") == 0)
            save_json(path_of("%s/tokenizer_config.json", directory).text, c);
        else if (strncmp(c->key, "model.", 6) == 0)
            set_member(member_of(root, "model"), c->key + 6, c, region);
        else if (c->kind != JSON_TRUE) set_member(root, c->key, c, region);
        else for (Json *token = added->first; token; token = token->next)
            set_member(token, c->key, c, region);
    }
    save_json(path_of("%s/tokenizer.json", directory).text, root);
}

static void check_texts(Test *t, const Tokenizer *tokenizer, const char *name, const Json *texts) {
    Buffer ids = {.allocator = &heap}, text = {.allocator = &heap};
    qlora_error err = {{0}};
    for (const Json *row = texts->first; row; row = row->next) {
        const Json *input = row->first, *expected = input->next, *decoded = expected->next;
        ids.size = text.size = 0;
        bool ok = !tokenizer_encode(tokenizer, input->text, input->length, true, &ids, &err);
        const int32_t *id = (const int32_t *)(const void *)ids.data;
        size_t n = ids.size / sizeof *id, k = 0;
        ok = ok && n == expected->count;
        for (const Json *x = expected->first; x && ok; x = x->next)
            ok = id[k++] == (int32_t)strtol(x->text, NULL, 10);
        if (!check(t, ok, "%s: \"%s\": other ids %s", name, input->text, err.text)) continue;
        ok = !tokenizer_decode(tokenizer, id + tokenizer->n_prefix,
                               n - tokenizer->n_prefix - tokenizer->n_suffix, false, &text, &err);
        check(t, ok && text.size == decoded->length
              && memcmp(text.size ? text.data : "", decoded->text, text.size) == 0,
              "%s: \"%s\" decodes to \"%.*s\"", name, decoded->text, (int)text.size,
              text.size ? text.data : "");
    }
    buffer_free(&ids);
    buffer_free(&text);
}

static void test_tokenizer_variants(Test *t) {
    static const char *const says[] = {"tokenizer.json", "unsupported"};
    Path place = path_of("build/variant-%d", (int)getpid());
    Region region = {.allocator = &heap};
    qlora_error err = {{0}};
    bool found;
    size_t read = 0, refused = 0;
    const Json *variants = read_json("test/fixtures/tokenizers", "variants.json", 1 << 24, &region,
                                     &found, &err);
    if (!check(t, variants != NULL, "%s", err.text)) return;
    mkdir(place.text, 0777);
    for (const Json *v = variants->first; v; v = v->next) {
        const char *name = json_get_text(v, "name");
        const Json *texts = json_get(v, "texts");
        Region own = {.allocator = &heap};
        Path base = path_of("test/fixtures/tokenizers/%s", json_get_text(v, "base"));
        const Json *root = read_json(base.text, "tokenizer.json", 1 << 24, &own, &found, &err);
        if (!check(t, root != NULL, "%s", err.text)) return;
        save_variant(place.text, (Json *)(uintptr_t)root, json_get(v, "changes"), &own);
        Tokenizer *tokenizer = tokenizer_open(place.text, &heap, &err);
        *(tokenizer ? &read : &refused) += 1;
        if (texts->count && check(t, tokenizer != NULL, "%s: %s", name, err.text))
            check_texts(t, tokenizer, name, texts);
        if (!texts->count && check(t, !tokenizer, "%s is not refused", name))
            check_message(t, err.text, says, 2, name);
        tokenizer_close(tokenizer);
        region_free(&own);
    }
    check(t, read > 70 && refused >= 8, "%zu variants read, %zu refused", read, refused);
    remove_tree(place.text);
    region_free(&region);
}

// --------------------------------------------------------------------------------- odds and ends

// A megabyte that is all one thing: ids and text come back, in whatever time (make bench shows it).
static void test_long_pieces(Test *t) {
    static const char *const pieces[] = {"a", " ", "\xF0\x9F\x91\xA9\xE2\x80\x8D", "\xFF\xC3",
                                         "\xE4\xBD\xA0"};
    static const char *const names[] = {"byte", "spm"};
    for (size_t i = 0; i < 2 * sizeof pieces / sizeof *pieces; i++) {
        qlora_error err = {{0}};
        Buffer text = {.allocator = &heap}, ids = {.allocator = &heap}, out = {.allocator = &heap};
        const char *piece = pieces[i / 2];
        Path path = path_of("test/fixtures/tokenizers/%s", names[i % 2]);
        Tokenizer *k = tokenizer_open(path.text, &heap, &err);
        if (!check(t, k != NULL, "%s", err.text)) return;
        while (text.size < 1000000) buffer_append(&text, piece, strlen(piece), &err);
        int bad = tokenizer_encode(k, text.data, text.size, false, &ids, &err);
        const int32_t *id = (const int32_t *)(const void *)ids.data;
        bad = bad || tokenizer_decode(k, id, ids.size / sizeof *id, false, &out, &err);
        check(t, !bad, "%s", err.text);
        if (i / 2 != 3)                               // broken bytes come back as U+FFFD
            check(t, out.size == text.size && memcmp(out.data, text.data, text.size) == 0,
                  "piece %zu: %zu bytes come back as %zu others", i, text.size, out.size);
        buffer_free(&text);
        buffer_free(&ids);
        buffer_free(&out);
        tokenizer_close(k);
    }
}

// Texts of tokens one behind the other, some cut short: the ids are those of pieces that
// are not cut, and cutting everywhere gives others.
static void check_cuts(Test *t, const char *directory) {
    enum { NORMAL, UNCUT, EVERYWHERE, WAYS };
    qlora_error err = {{0}};
    Buffer text = {.allocator = &heap}, ids[WAYS] = {text, text, text};
    uint64_t *none = calloc(NEIGHBOUR_BITS / 64, sizeof *none);
    Tokenizer *tokenizer = tokenizer_open(directory, &heap, &err);
    bool opened = tokenizer && tokenizer->neighbours && none;
    if (!check(t, opened, "%s: %s", directory, err.text)) return;
    const Vocabulary *v = &tokenizer->vocabulary;
    for (uint32_t i = 0; i < 60000; i++) {
        const int32_t id = (int32_t)(hash_mix(i) % v->n_ids);
        size_t size = text.size;
        if (!v->tokens[id].text || v->tokens[id].added) continue;
        check(t, !tokenizer_decode(tokenizer, &id, 1, false, &text, &err), "%s", err.text);
        if (i % 3 == 0 && text.size > size) text.size--;
    }
    for (int way = 0; way < WAYS; way++) {
        Tokenizer copy = *tokenizer;
        if (way) copy.neighbours = way == UNCUT ? NULL : none;
        check(t, !tokenizer_encode(&copy, text.data, text.size, false, &ids[way], &err), "%s",
              err.text);
        encoders_free(tokenizer);
        bool same = ids[way].size == ids[0].size &&
                    memcmp(ids[way].data, ids[0].data, ids[0].size) == 0;
        check(t, same == (way != EVERYWHERE), "%s: way %d", directory, way);
        if (way) buffer_free(&ids[way]);
    }
    buffer_free(&ids[0]);
    buffer_free(&text);
    free(none);
    tokenizer_close(tokenizer);
}

static void test_cut_pieces(Test *t) {
    static const char *const names[] = {"byte", "gpt2style", "llama3style", "spm"};
    static const char *const large[] = {"qwen2.5-0.5b-instruct", "gpt2", "llama-3", "llama-2",
                                        "mistral-7b-v0.1"};
    for (size_t i = 0; i < 4; i++)
        check_cuts(t, path_of("test/fixtures/tokenizers/%s", names[i]).text);
    for (size_t i = 0; i < 5 && file_exists("../shared/real/tokenizers"); i++)
        check_cuts(t, path_of("../shared/real/tokenizers/%s", large[i]).text);
}

// A vocab.json without its merges, or with none in them (found by test/fuzz: undefined behaviour),
// and a list of tokens that says nothing of cutting.
static void test_no_merges(Test *t) {
    Path place = path_of("build/merges-%d", (int)getpid());
    qlora_error err = {{0}};
    mkdir(place.text, 0777);
    save_text(path_of("%s/tokenizer_config.json", place.text).text,
              "{\"tokenizer_class\": \"Qwen2Tokenizer\"}");
    save_text(path_of("%s/vocab.json", place.text).text, "{\"a\": 0}");
    check(t, !tokenizer_open(place.text, &heap, &err), "opened without merges.txt");
    check_message(t, err.text, (const char *const[]){"vocab.json", "merges.txt"}, 2, "merges.txt");
    save_text(path_of("%s/merges.txt", place.text).text, "");
    Tokenizer *tokenizer = tokenizer_open(place.text, &heap, &err);
    check(t, tokenizer != NULL, "%s", err.text);
    tokenizer_close(tokenizer);
    remove(path_of("%s/vocab.json", place.text).text);
    save_text(path_of("%s/tokenizer.model", place.text).text, "IQ== 0\nIg== 1\n");
    check(t, !tokenizer_open(place.text, &heap, &err), "tiktoken's list is opened");
    check_message(t, err.text, (const char *const[]){"tiktoken", "tokenizer.json"}, 2, "a list");
    remove_tree(place.text);
}

// A text of nothing but brackets would take 21 times its size: refused once that is too much.
static void test_json_memory(Test *t) {
    for (size_t n = 1 << 20; n <= 1 << 23; n *= 8) {
        Region region = {.allocator = &heap};
        qlora_error err = {{0}};
        Buffer text = {.allocator = &heap};
        while (text.size < n) buffer_append(&text, text.size ? ",[]" : "[[]", 3, &err);
        buffer_append(&text, "]", 1, &err);
        bool read = json_parse(text.data, text.size, "brackets", 1, &region, &err);
        check(t, read == (n == 1 << 20), "%zu bytes of brackets: %s", n, err.text);
        check(t, read || strstr(err.text, "more values"), "%s", err.text);
        check(t, region.held < JSON_SPARE + 4 * n + (1 << 21), "%zu bytes held", region.held);
        buffer_free(&text);
        region_free(&region);
    }
}

#define TEXT_TESTS                                                                                 \
    {"json_free_cases", "JSONTestSuite's 35 open cases: 10 accepted, 25 refused",                  \
     test_json_free_cases},                                                                        \
        {"json_memory", "a text of brackets takes no more than 64 MiB and four times its size",    \
         test_json_memory},                                                                        \
        {"tokenizer_variants", "normalizers, splits, processors equal Hugging Face tokenizers",    \
         test_tokenizer_variants},                                                                 \
        {"long_pieces", "a megabyte of one character becomes ids and text again",                  \
         test_long_pieces},                                                                        \
        {"cut_pieces", "pieces cut where no merge reaches give the same ids", test_cut_pieces},    \
        {"no_merges", "vocab.json without merges.txt, tokens without rules", test_no_merges},
