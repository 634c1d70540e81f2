// Chat templates against transformers: ids, masks and refusals of every row, the saved programs,
// what is recognised and what is not, text with holes, and tokens that are added.
//
// test/fixtures/templates/rows.json holds what transformers' apply_chat_template made of the real
// templates (test/reference/make_templates.py says how). QLORA_TEMPLATES=DIR takes another
// rows.json, in which the templates' own programs must be recognised too.

#define TEMPLATES "test/fixtures/templates/rows.json"
#define TEMPLATE_WORK "build/templates-%d"              // + process id: where copies live

#define SAY(role, text) {role, text, sizeof text - 1, false, 0}

static const char *text_of(const Json *json, const char *key) {
    const char *text = json_get_text(json, key);
    return text ? text : "";
}

// ids (int32_t) and mask (bytes) of messages.
typedef struct { Buffer ids, learn; } Applied;

static int apply(Applied *a, const ChatTemplate *c, const Tokenizer *t, const Message *m, size_t n,
                 MaskKind mask, bool ask, qlora_error *err) {
    *a = (Applied){{.allocator = &heap}, {.allocator = &heap}};
    return template_apply(c, t, m, n, mask, ask, &a->ids, &a->learn, err);
}

static void free_applied(Applied *a) {
    buffer_free(&a->ids);
    buffer_free(&a->learn);
}

// One conversation: {"messages": [[role, text], ...], "ask": false, "ids": [...], "learn": "0011"},
// ids null if the template raises an exception. Returns 1 if all is equal, 0 if not.
static int same_conversation(Test *t, const ChatTemplate *c, const Tokenizer *tokenizer,
                             const Json *json, const char *what, size_t number) {
    Message list[64];
    Applied a;
    qlora_error err = {{0}};
    size_t n = 0, id;
    for (const Json *m = json_get(json, "messages")->first; m && n < 64; m = m->next, n++)
        list[n] = (Message){m->first->text, m->first->next->text, m->first->next->length, false, 0};
    bool ask = json_get_bool(json, "ask", false), good = true;
    int bad = apply(&a, c, tokenizer, list, n, MASK_CONTENT, ask, &err);
    const Json *expected = json_get(json, "ids");
    const char *learn = text_of(json, "learn");
    if (!json_is(expected, JSON_ARRAY)) {
        check(t, bad, "%s, conversation %zu: transformers refuses it, this does not", what, number);
        good = bad;
    } else if (bad) {
        check(t, false, "%s, conversation %zu: %s", what, number, err.text);
        good = false;
    } else {
        const int32_t *ids = (const int32_t *)(void *)a.ids.data;
        size_t i = 0;
        for (const Json *e = expected->first; e && good; e = e->next, i++) {
            good = i < a.learn.size && json_to_size(e, &id) && ids[i] == (int32_t)id;
            check(t, good, "%s, conversation %zu: token %zu is %d, expected %s", what, number, i,
                  i < a.learn.size ? ids[i] : -1, e->text);
        }
        if (good)
            good = check(t, i == a.learn.size, "%s, conversation %zu: %zu tokens, expected %zu",
                         what, number, a.learn.size, i);
        for (i = 0; good && *learn && i < a.learn.size; i++)
            good = check(t, a.learn.data[i] == learn[i] - '0', "%s, conversation %zu: the mask of "
                         "token %zu is %d", what, number, i, a.learn.data[i]);
    }
    free_applied(&a);
    return good;
}

static Tokenizer *open_with(const Json *set, qlora_error *err) {
    char directory[512];
    const char *name = text_of(set, "tokenizer");
    snprintf(directory, sizeof directory, "%s%s", *name == '/' ? "" : "test/fixtures/tokenizers/",
             name);
    Tokenizer *tokenizer = tokenizer_open(directory, &heap, err);
    if (tokenizer && *text_of(set, "add") &&
        tokenizer_add(tokenizer, text_of(set, "add"), SIZE_MAX, err)) {
        tokenizer_close(tokenizer);
        return NULL;
    }
    return tokenizer;
}

// A set: {"name": ..., "row": "chatml", "program": the real template, only in large files,
// "system": its default system text, "flags": its program's, "tokenizer", "add", "conversations"}.
static void check_set(Test *t, const Json *set, size_t *tried, size_t *equal) {
    qlora_error err = {{0}};
    Region region = {.allocator = &heap};
    Buffer note = {.allocator = &heap};
    ChatTemplate c;
    const char *what = text_of(set, "name"), *row = text_of(set, "row");
    Tokenizer *tokenizer = open_with(set, &err);
    const char *program = json_get_text(set, "program");
    if (!check(t, tokenizer != NULL, "%s: %s", what, err.text)) return;
    tokenizer->chat_template = program;
    int bad = template_find(&c, program ? NULL : row, NULL, tokenizer, &region, &note, &err);
    if (program && !*row) {
        check(t, bad && strstr(err.text, "--template") && strstr(err.text, "chatml"),
              "%s is not refused: %s", what, err.text);
    } else if (check(t, !bad && strcmp(c.row->name, row) == 0, "%s: %s, expected %s, %s", what,
                     bad ? "none" : c.row->name, row, err.text)) {
        size_t flags = 0, number = 0;
        if (json_to_size(json_get(set, "flags"), &flags)) c.flags |= (int)flags;
        if (c.flags & ASKS_ALWAYS) c.tail = c.ask;
        if (json_get_text(set, "system")) c.system = text_of(set, "system");
        if (json_get(set, "begin")) c.begin = json_get_bool(set, "begin", false) ? BOS : "";
        for (const Json *e = json_get(set, "conversations")->first; e; e = e->next) {
            *equal += (size_t)same_conversation(t, &c, tokenizer, e, what, number++);
            ++*tried;
        }
    }
    buffer_free(&note);
    region_free(&region);
    tokenizer_close(tokenizer);
}

static void templates_reference(Test *t) {
    const char *path = getenv("QLORA_TEMPLATES");
    Region region = {.allocator = &heap};
    qlora_error err = {{0}};
    size_t tried = 0, equal = 0, sets = 0;
    bool found;
    const Json *root = read_json(path ? path : "test/fixtures/templates", "rows.json",
                                 (size_t)1 << 30, &region, &found, &err);
    if (check(t, root != NULL, "%s%s", TEMPLATES, err.text))
        for (const Json *set = json_get(root, "sets")->first; set; set = set->next, sets++)
            check_set(t, set, &tried, &equal);
    printf("    %zu sets, %zu of %zu conversations equal\n", sets, equal, tried);
    region_free(&region);
}

// The program that each row saves is recognised as that row again; with QLORA_SAVED=DIR they are
// written there, for make_templates.py to compare with the real ones.
static void templates_saved(Test *t) {
    const char *out = getenv("QLORA_SAVED");
    for (size_t i = 0; i < N_TEMPLATE_ROWS; i++) {
        Region region = {.allocator = &heap};
        Buffer b = {.allocator = &heap};
        qlora_error err = {{0}};
        ChatTemplate c = {0}, again = {0};
        uint64_t hash;
        set_row(&c, &template_rows[i], false);
        const char *path = out ? path_join(&region, out, c.row->name, &err) : NULL;
        if (check(t, !template_jinja(&c, &b, &err) && !buffer_append(&b, "", 1, &err) &&
                  !recognise(&again, b.data, &hash, &region, &err), "%s", err.text)) {
            check(t, again.row == c.row, "%s is taken for %s", c.row->name,
                  again.row ? again.row->name : "none");
            check(t, again.flags == c.flags && strcmp(again.begin, c.begin) == 0 &&
                  strcmp(again.end, c.end) == 0, "%s comes back with other strings", c.row->name);
            char name[512];
            snprintf(name, sizeof name, "%s.jinja", path ? path : "");
            if (path) check(t, !write_file(name, b.data, b.size - 1, &err), "%s", err.text);
        }
        buffer_free(&b);
        region_free(&region);
    }
}


// ------------------------------------------------------------------------------------------- masks

// For every set of the fixture: what each mask learns follows from what the content mask learns,
// and a message that is skipped loses its own tokens only.
static void check_masks(Test *t, const ChatTemplate *c, const Tokenizer *tokenizer) {
    static const Message list[] = {SAY("user", "Hello"), SAY("assistant", "Hi there"),
                                   SAY("user", "And?"), SAY("assistant", "So")};
    const char *name = c->row->name;
    Message skipped[4];
    Applied a[3], one, none;
    qlora_error err = {{0}};
    size_t answers = 0, ends = 0;
    for (int mask = MASK_CONTENT; mask <= MASK_ALL; mask++)
        if (!check(t, !apply(&a[mask], c, tokenizer, list, 4, (MaskKind)mask, false, &err),
                   "%s: %s", name, err.text)) return;
    memcpy(skipped, list, sizeof list);
    skipped[1].skip = true;
    bool bad = apply(&one, c, tokenizer, skipped, 4, MASK_CONTENT, false, &err);
    for (size_t i = 0; i < 4; i++) skipped[i].skip = true;
    bad |= apply(&none, c, tokenizer, skipped, 4, MASK_ALL, false, &err);
    check(t, !bad, "%s: %s", name, err.text);
    const int32_t *ids = (const int32_t *)(void *)a[0].ids.data;
    size_t n = a[0].learn.size, half = 0, later = 0;
    check(t, none.learn.size == n && one.learn.size == n && a[1].learn.size == n &&
          a[2].learn.size == n && memcmp(ids, a[2].ids.data, n * sizeof *ids) == 0,
          "%s: the mask changes the ids", name);
    for (size_t i = 0; i < n; i++) {
        const char *learn = a[MASK_CONTENT].learn.data;
        bool content = learn[i], before = i && learn[i - 1];
        answers += content && !before;
        ends += content && ids[i] == c->end_id;
        if (answers == 1 && content) half++;
        if (answers == 2 && content) later += one.learn.data[i] == 1;
        check(t, !content || a[MASK_TURN].learn.data[i], "%s: content outside the turn", name);
        check(t, a[MASK_ALL].learn.data[i] == (i > 0), "%s: all does not learn token %zu", name, i);
        check(t, !(answers < 2 && one.learn.data[i]), "%s: a skipped answer is learnt", name);
        if (none.learn.data[i] && !c->system)
            check(t, ids[i] != c->end_id, "%s: what is skipped is learnt", name);
    }
    check(t, answers == 2 && ends == 2, "%s: %zu answers, %zu ends are learnt", name, answers,
          ends);
    check(t, half >= 2 && later >= 2, "%s: an answer and its end are learnt", name);
    for (size_t i = 0; i < 3; i++) free_applied(&a[i]);
    free_applied(&one);
    free_applied(&none);
}

static void templates_masks(Test *t) {
    Region region = {.allocator = &heap};
    qlora_error err = {{0}};
    bool found;
    const Json *root = read_json("test/fixtures/templates", "rows.json", 1 << 24, &region, &found,
                                 &err);
    if (!check(t, root != NULL, "%s", err.text)) return;
    for (const Json *set = json_get(root, "sets")->first; set; set = set->next) {
        Tokenizer *tokenizer = open_with(set, &err);
        Region own = {.allocator = &heap};
        Buffer note = {.allocator = &heap};
        ChatTemplate c;
        const char *row = text_of(set, "row");
        bool good = tokenizer && !template_find(&c, row, NULL, tokenizer, &own, &note, &err);
        if (check(t, good, "%s: %s", row, err.text)) check_masks(t, &c, tokenizer);
        buffer_free(&note);
        region_free(&own);
        tokenizer_close(tokenizer);
    }
    region_free(&region);
}

// ------------------------------------------------------------------------- what is recognised

// The row that a program is taken for, or NULL.
static const char *row_of(const char *program, bool *bos, char system[256]) {
    Region region = {.allocator = &heap};
    qlora_error err = {{0}};
    ChatTemplate c = {0};
    uint64_t hash;
    *system = 0;
    if (recognise(&c, program, &hash, &region, &err)) return err.text[0] ? "error" : NULL;
    *bos = c.row && *c.begin == *BOS;
    if (c.row && c.system) snprintf(system, 256, "%s", c.system);
    region_free(&region);
    return c.row ? c.row->name : NULL;
}

#define LOOP "{% for message in messages %}"
#define CHATML_HEAD "{{ '<|im_start|>' + message['role'] + '\\n' + message['content']"
#define CHATML_OUT CHATML_HEAD " + '<|im_end|>' + '\\n' }}"
#define CHATML_ASK "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

static void templates_recognised(Test *t) {
    static const struct { const char *program, *row, *system; bool bos; } rows[] = {
        {LOOP CHATML_OUT "{% endfor %}" CHATML_ASK, "chatml", "", false},
        {"{{ bos_token }}" LOOP CHATML_OUT "{% endfor %}" CHATML_ASK, "chatml", "", true},
        // white space, quotes, comments, subscripts, how outputs are cut: all one to Jinja
        {"{#- ChatML -#}\n{%- for  message in messages -%}\n  {{- \"<|im_start|>\" }}"
         "{{ message.role }}{{ \"\\n\" + message [ \"content\" ] }}{{- '<|im_end|>\\n' -}}\n"
         "{%- endfor -%}\n{%- if add_generation_prompt -%} {{- '<|im_start|>' + 'assistant\n' -}}"
         " {%- endif -%}\n", "chatml", "", false},
        {LOOP "{{ '<|im_start|>' + message['role'] + '\\n' }}{% generation %}{{ message['content'] "
         "+ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% endfor %}" CHATML_ASK, "chatml", "",
         false},
        // tools, in whatever words
        {"{% if tools %}{{ 'You have tools.' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
         "{% endif %}" LOOP "{% if message['role'] == 'tool' %}{{ 'result' }}{% else %}" CHATML_OUT
         "{% endif %}{% endfor %}" CHATML_ASK, "chatml", "", false},
        {LOOP "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
         "Don\\'t panic.<|im_end|>\\n' }}{% endif %}" CHATML_OUT "{% endfor %}" CHATML_ASK,
         "qwen2.5", "Don't panic.", false},
        {LOOP CHATML_HEAD " + '<|im_end|>' }}{% endfor %}" CHATML_ASK, "chatml-compact", "", false},
        // near misses: other text, other order, another condition, a trim, a missing part
        {LOOP "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n\n"
         "{% endfor %}\n" CHATML_ASK, NULL, "", false},
        {LOOP "{{ '<|im_start|>' + message['role'] + ' ' + message['content'] + '<|im_end|>' + "
         "'\\n' }}{% endfor %}" CHATML_ASK, NULL, "", false},
        {LOOP "{{ '<|im_start|>' + message['content'] + '\\n' + message['role'] + '<|im_end|>' + "
         "'\\n' }}{% endfor %}" CHATML_ASK, NULL, "", false},
        {LOOP "{% if not loop.last %}" CHATML_OUT "{% endif %}{% endfor %}" CHATML_ASK, NULL, "",
         false},
        {LOOP CHATML_HEAD " | trim + '<|im_end|>\\n' }}{% endfor %}" CHATML_ASK, NULL, "", false},
        {LOOP CHATML_OUT "{% endfor %}", NULL, "", false},
        {LOOP CHATML_OUT "{{ bos_token }}{% endfor %}" CHATML_ASK, NULL, "", false},
        {LOOP CHATML_OUT "{% endfor %}" CHATML_ASK "{{ eos_token }}", NULL, "", false},
        {"Hello" LOOP CHATML_OUT "{% endfor %}" CHATML_ASK, NULL, "", false},
        {"{% set messages = messages[1:] %}" LOOP CHATML_OUT "{% endfor %}" CHATML_ASK, NULL, "",
         false},
        {"{% raw %}" LOOP CHATML_OUT "{% endfor %}" CHATML_ASK "{% endraw %}", NULL, "", false},
        {"", NULL, "", false}, {"{{", NULL, "", false}, {"{% if", NULL, "", false},
        {"{#", NULL, "", false}, {"{{ 'open", NULL, "", false}, {"{% endfor %}", NULL, "", false},
        {"{% else %}", NULL, "", false}, {"{% if x %}", NULL, "", false},
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        bool bos = false;
        char system[256];
        const char *row = row_of(rows[i].program, &bos, system);
        check(t, (!row && !rows[i].row) || (row && rows[i].row && strcmp(row, rows[i].row) == 0),
              "program %zu is taken for %s", i, row ? row : "none");
        if (row) check(t, bos == rows[i].bos && strcmp(system, rows[i].system) == 0,
                       "program %zu: BOS %d, system \"%s\"", i, bos, system);
    }
    // Every beginning, and every byte changed, of a program: refused or the same, and no crash.
    Region region = {.allocator = &heap};
    Buffer b = {.allocator = &heap};
    qlora_error err = {{0}};
    ChatTemplate c = {0};
    set_row(&c, find_row("qwen3"), false);
    if (check(t, !template_jinja(&c, &b, &err) && !buffer_append(&b, "", 1, &err), "%s", err.text))
        for (size_t i = 0; i < b.size - 1; i++) {
            char system[256], *copy = region_text(&region, b.data, b.size, &err);
            bool bos;
            copy[i] = "{}%#'\\-\n"[i % 8];
            row_of(copy, &bos, system);
            copy[i] = 0;
            check(t, !row_of(copy, &bos, system), "the first %zu bytes are taken for a row", i);
            region_free(&region);
        }
    buffer_free(&b);
}

// Any allocation may fail while a template is recognised: it is said, and nothing is leaked.
static void templates_memory(Test *t) {
    Tokenizer *tokenizer = NULL;
    Buffer b = {.allocator = &heap};
    qlora_error err = {{0}};
    ChatTemplate c = {0};
    size_t calls = 1;
    set_row(&c, find_row("zephyr"), false);
    if (!check(t, !template_jinja(&c, &b, &err) && !buffer_append(&b, "", 1, &err) &&
               (tokenizer = tokenizer_open("test/fixtures/tokenizers/spm", &heap, &err)), "%s",
               err.text)) return;
    for (size_t n = 1; n <= calls; n += 1 + n / 16) {
        Ledger ledger = {.fail_at = n};
        qlora_allocator a = {ledger_allocate, ledger_release, &ledger};
        Region region = {.allocator = &a};
        Buffer note = {.allocator = &a};
        tokenizer->chat_template = n % 2 ? b.data : "{%- set qlora_prompt = 'Q: {a}' -%}";
        err.text[0] = 0;
        int bad = template_find(&c, NULL, NULL, tokenizer, &region, &note, &err);
        bool said = strstr(err.text, "out of memory") != NULL;
        check(t, ledger.failed ? bad && said : n % 2 ? !bad : bad, "call %zu: %d, \"%s\"", n, bad,
              err.text);
        buffer_free(&note);
        region_free(&region);
        check_ledger(t, &ledger, "templates");
        if (ledger.failed) calls = n + 40;
    }
    printf("    %zu allocations\n", calls - 40);
    buffer_free(&b);
    tokenizer_close(tokenizer);
}

// ------------------------------------------------------------------------------- what is refused

// Finds a template and applies it to messages; the error must hold the words given.
static void refused(Test *t, const char *tokenizer_name, const char *program, const char *name,
                    const char *prompt, const Message *m, size_t n, const char *const *words) {
    char directory[128];
    qlora_error err = {{0}};
    Region region = {.allocator = &heap};
    Buffer note = {.allocator = &heap};
    ChatTemplate c;
    Applied a = {{.allocator = &heap}, {.allocator = &heap}};
    snprintf(directory, sizeof directory, "test/fixtures/tokenizers/%s", tokenizer_name);
    Tokenizer *tokenizer = tokenizer_open(directory, &heap, &err);
    if (check(t, tokenizer != NULL, "%s", err.text)) {
        tokenizer->chat_template = program;
        int bad = template_find(&c, name, prompt, tokenizer, &region, &note, &err) ||
                  apply(&a, &c, tokenizer, m, n, MASK_CONTENT, false, &err);
        check(t, bad, "%s: nothing is refused", name ? name : program ? program : prompt);
        check_message(t, err.text, words, 4, name ? name : "template");
    }
    free_applied(&a);
    buffer_free(&note);
    region_free(&region);
    tokenizer_close(tokenizer);
}

static void templates_refused(Test *t) {
    static const Message system[] = {SAY("system", "s"), SAY("user", "u")};
    static const Message twice[] = {SAY("user", "u"), SAY("user", "v")};
    static const Message late[] = {SAY("user", "u"), SAY("assistant", "a"),
                                   SAY("system", "s")};
    static const Message tool[] = {SAY("tool", "u")};
    static const Message empty[] = {SAY("user", "u"), SAY("assistant", "")};
    refused(t, "spm", NULL, "nosuch", NULL, system, 2,
            (const char *const[]){"\"nosuch\"", "chatml", "tutorial-004", NULL});
    refused(t, "spm", "{{ messages }}", NULL, NULL, system, 2,
            (const char *const[]){"{{ messages }}", "--template", "qwen2.5", NULL});
    refused(t, "spm", "{{ strftime_now('%d') }}", NULL, NULL, system, 2,
            (const char *const[]){"date", "--template", "llama3.1", NULL});
    refused(t, "spm", NULL, "chatml", NULL, system, 2,
            (const char *const[]){"<|im_start|>", "one added token", "--add-tokens", NULL});
    refused(t, "spm", NULL, "mistral-v3", NULL, system, 2,
            (const char *const[]){"[INST]", "--add-tokens", NULL});
    refused(t, "spm", NULL, "mistral-v0.2", NULL, system, 2,
            (const char *const[]){"message 1", "system", "mistral-v0.2", NULL});
    refused(t, "spm", NULL, "llama2", NULL, twice, 2,
            (const char *const[]){"message 2", "turns", NULL});
    refused(t, "spm", NULL, "llama2", NULL, late, 3,
            (const char *const[]){"message 3", "system", NULL});
    refused(t, "spm", NULL, "zephyr", NULL, tool, 1,
            (const char *const[]){"message 1", "\"tool\"", NULL});
    refused(t, "spm", NULL, "mistral-common-v1", NULL, empty, 2,
            (const char *const[]){"message 2", "empty", NULL});
    refused(t, "spm", NULL, NULL, "no hole", system, 2, (const char *const[]){"{field}", NULL});
    refused(t, "spm", NULL, NULL, "{question", system, 2,
            (const char *const[]){"byte 1", "{{", NULL});
    refused(t, "spm", NULL, NULL, "a } b {x}", system, 2,
            (const char *const[]){"byte 3", "{{", NULL});
    refused(t, "spm", NULL, NULL, "Q: {q} A: {a}", system, 2,
            (const char *const[]){"system", NULL});
}

// ---------------------------------------------------------------------------- text with {holes}

// The text that a record makes in a prompt template, its learnt part in brackets.
static void filled(Test *t, const char *prompt, const char *record, const char *expected) {
    Region region = {.allocator = &heap};
    Buffer note = {.allocator = &heap}, messages = note, text = note, program = note;
    qlora_error err = {{0}};
    Tokenizer *tokenizer = tokenizer_open("test/fixtures/tokenizers/llama3style", &heap, &err);
    ChatTemplate c, again;
    Applied a[2] = {{note, note}, {note, note}};
    Json *json = json_parse(record, strlen(record), "record", 1, &region, &err);
    bool bad = !tokenizer || !json ||
               template_find(&c, NULL, prompt, tokenizer, &region, &note, &err) ||
               prompt_fill(&c, &messages, json, &region, &err);
    const Message *m = (const Message *)(void *)messages.data;
    size_t n = messages.size / sizeof *m;
    bad = bad || apply(&a[0], &c, tokenizer, m, n, MASK_CONTENT, false, &err) ||
          template_jinja(&c, &program, &err) || buffer_append(&program, "", 1, &err);
    if (check(t, !bad, "%s: %s", prompt, err.text)) {
        const int32_t *ids = (const int32_t *)(void *)a[0].ids.data;
        bool inside = false;
        for (size_t i = 0; i <= a[0].learn.size; i++) {
            bool learn = i < a[0].learn.size && a[0].learn.data[i];
            if (learn != inside) buffer_append(&text, learn ? "[" : "]", 1, NULL);
            inside = learn;
            if (i < a[0].learn.size) tokenizer_decode(tokenizer, ids + i, 1, false, &text, NULL);
        }
        buffer_append(&text, "", 1, NULL);
        check(t, strcmp(text.data, expected) == 0, "%s: \"%s\", expected \"%s\"", prompt, text.data,
              expected);
        // Saved and found again it makes the same ids.
        tokenizer->chat_template = program.data;
        bad = template_find(&again, NULL, NULL, tokenizer, &region, &note, &err) ||
              apply(&a[1], &again, tokenizer, m, n, MASK_CONTENT, false, &err);
        check(t, !bad && a[1].learn.size == a[0].learn.size &&
              memcmp(a[1].ids.data, ids, a[0].ids.size) == 0, "%s, saved: %s", prompt, err.text);
        program.data[program.size - 2] = ' ';
        check(t, template_find(&again, NULL, NULL, tokenizer, &region, &note, &err) == -1,
              "%s: a changed program is recognised", prompt);
    }
    for (size_t i = 0; i < 2; i++) free_applied(&a[i]);
    buffer_free(&note);
    buffer_free(&messages);
    buffer_free(&text);
    buffer_free(&program);
    region_free(&region);
    tokenizer_close(tokenizer);
}

static void prompt_templates(Test *t) {
#define BEGIN_ "<|begin_of_text|>"
#define END_ "<|eot_id|>"
    filled(t, "Q: {q}\nA: {a}", "{\"q\": \"why?\", \"a\": \"so\"}",
           BEGIN_ "Q: why?\nA:[ so" END_ "]");
    filled(t, "{x} and {y} make {{z}}: {z}!", "{\"x\": 1, \"y\": \"2\", \"z\": \"12\"}",
           BEGIN_ "1 and 2 make {z}: [12!" END_ "]");
    filled(t, "{text}", "{\"text\": \"only\"}", BEGIN_ "[only" END_ "]");
    filled(t, BEGIN_ "It's {a}\\{b}" END_, "{\"a\": \"%}\", \"b\": \"'\"}",
           BEGIN_ "It's %}\\['" END_ "]");
    Region region = {.allocator = &heap};
    Buffer note = {.allocator = &heap};
    qlora_error err = {{0}};
    ChatTemplate c;
    Tokenizer *tokenizer = tokenizer_open("test/fixtures/tokenizers/llama3style", &heap, &err);
    Json *json = json_parse("{\"q\": [], \"b\": \"\"}", 18, "record", 1, &region, &err);
    check(t, !template_find(&c, NULL, "{q}{a}", tokenizer, &region, &note, &err), "%s", err.text);
    check(t, prompt_fill(&c, &note, json, &region, &err) == -1, "a list is filled in");
    check_message(t, err.text, (const char *const[]){"\"q\"", "array"}, 2, "a list");
    buffer_free(&note);
    region_free(&region);
    tokenizer_close(tokenizer);
}

// ---------------------------------------------------------------------------------- adding tokens

// Is `now` the text `before` with things put in, and nothing else?
static bool only_inserted(const char *before, size_t n, const char *now, size_t m) {
    size_t at = 0;
    for (size_t i = 0; i < m && at < n; i++) at += now[i] == before[at];
    return at == n && m > n;
}

static void added_tokens(Test *t) {
    static const char *const names[] = {"byte", "gpt2style", "llama3style", "spm"};
    static const char *const files[] = {"tokenizer.json", "tokenizer_config.json",
                                        "added_tokens.json", "special_tokens_map.json"};
    static const char text[] = "Hello<|new|> two  plainword <|new|><|other|>plainwords";
    for (size_t i = 0; i < 4; i++) {
        Region region = {.allocator = &heap};
        qlora_error err = {{0}};
        Path from = path_of("test/fixtures/tokenizers/%s", names[i]);
        Path to = path_of(TEMPLATE_WORK, (int)getpid());
        remove_tree(to.text);
        mkdir("build", 0777);
        copy_tree(from.text, to.text);
        save_text(path_of("%s/added_tokens.json", to.text).text, "{\n  \"<|x|>\": 3\n}\n");
        save_text(path_of("%s/special_tokens_map.json", to.text).text, "{\"eos_token\": \"</s>\"}");
        char *before[4];
        size_t sizes[4];
        for (size_t k = 0; k < 4; k++)
            before[k] = load_bytes(path_of("%s/%s", to.text, files[k]).text, &sizes[k]);
        Tokenizer *a = tokenizer_open(to.text, &heap, &err), *b = NULL;
        size_t n = a ? tokenizer_size(a) : 0;
        Buffer ids = {.allocator = &heap}, again = ids, note = ids;
        bool bad = !a || tokenizer_add(a, "<|new|>,plainword,<|new|>", n + 2, &err);
        check(t, !bad, "%s: %s", from.text, err.text);
        check(t, !bad && tokenizer_size(a) == n + 2 &&
              tokenizer_id(a, "<|new|>", 7) == (int32_t)n &&
              tokenizer_id(a, "plainword", 9) == (int32_t)n + 1, "%s: wrong ids", from.text);
        check(t, !bad && tokenizer_add(a, "<|third|>", n + 2, &err) == -1, "a row too many");
        check_message(t, err.text, (const char *const[]){"<|third|>", "rows for"}, 2, "a row");
        bad = bad || write_added_tokens(a, to.text, &region, &err) ||
              !(b = tokenizer_open(to.text, &heap, &err));
        if (check(t, !bad, "%s: %s", from.text, err.text)) {
            bad = tokenizer_encode(a, text, strlen(text), true, &ids, &err) ||
                  tokenizer_encode(b, text, strlen(text), true, &again, &err);
            size_t found = 0;
            for (size_t k = 0; k < ids.size / sizeof(int32_t); k++)
                found += ((const int32_t *)(void *)ids.data)[k] >= (int32_t)n;
            check(t, !bad && found == 4 && ids.size == again.size &&
                  memcmp(ids.data, again.data, ids.size) == 0, "%s: other ids when reopened",
                  from.text);
            const Token *fresh = &b->vocabulary.tokens[n];
            check(t, fresh[0].special && !fresh[1].special, "%s: which are special is lost",
                  from.text);
        }
        for (size_t k = 0; k < 4; k++) {
            char *now = load_bytes(path_of("%s/%s", to.text, files[k]).text, &n);
            check(t, now && only_inserted(before[k], sizes[k], now, n), "%s/%s: more has changed",
                  from.text, files[k]);
            free(now);
            free(before[k]);
        }
        buffer_free(&ids);
        buffer_free(&again);
        buffer_free(&note);
        region_free(&region);
        tokenizer_close(a);
        tokenizer_close(b);
        if (!getenv("QLORA_KEEP")) remove_tree(to.text);
    }
}

#define TEMPLATE_TESTS                                                                             \
    {"templates_reference", "ids, masks and refusals of every row as transformers has them",      \
     templates_reference},                                                                        \
    {"templates_saved", "a saved program is recognised as the row that wrote it",                 \
     templates_saved},                                                                            \
    {"templates_masks", "content, turn, all, skipped messages: one follows from the other",       \
     templates_masks},                                                                            \
    {"templates_recognised", "programs however laid out; near misses are refused",                \
     templates_recognised},                                                                       \
    {"templates_memory", "any allocation may fail while a template is recognised",                \
     templates_memory},                                                                           \
    {"templates_refused", "what a template cannot express, in words that help",                   \
     templates_refused},                                                                          \
    {"prompt_templates", "text with {holes}: filled, learnt, saved, found again",                 \
     prompt_templates},                                                                           \
    {"added_tokens", "tokens added and entered in every file, which else stay as they are",       \
     added_tokens},
