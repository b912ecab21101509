// Many texts and scores: each text against a run of its own, scores against the file of -m logits. Part of test.c.

// What a command prints, which must succeed; to be freed.
static char *output_of(const char *arguments) {
    int status;
    char *out = run_command(arguments, &status);
    check(status == 0, "./run %s: got status %d, wanted 0", arguments, status);
    return out;
}

// ---- Texts ----

// Prompts with common beginnings, an empty one, bytes that are not UTF-8, and one that is longer than a pass.
static const char *const script_prompts[] = {
    "Once upon a time there was a house", "Once upon a time there was a dog", "Once", "", "Once upon a time",
    "\xFFn\xE4",
    "Once upon a time there was a house", "of the the the the the of of of on on on on", "Once upon a", "a",
};
enum { N_SCRIPT_PROMPTS = sizeof script_prompts / sizeof *script_prompts };

static void check_texts(const char *model, const char *options_, int samples) {
    Buffer wanted = { 0 };
    Error e = { 0 };
    char arguments[512];
    for (int i = 0; i < N_SCRIPT_PROMPTS * samples; i++) {
        write_text("one", script_prompts[i / samples]);
        snprintf(arguments, sizeof arguments, "%s -n 12 -s %d -q -f $T/one 2>/dev/null", model, 7 + i % samples);
        Result r = run_with(arguments);
        append(&wanted, r.out, r.n_out, &e);
        free_result(&r);
    }
    snprintf(arguments, sizeof arguments, "%s -n 12 -s 7 -q --prompts $T/prompts --samples %d %s 2>/dev/null", model,
             samples, options_);
    Result r = run_with(arguments);
    append(&wanted, "", 1, &e);
    check(r.status == 0 && r.n_out == wanted.n - 1 && !memcmp(r.out, wanted.bytes, r.n_out),
          "./run %s: got status %d and \"%.300s\", wanted \"%.300s\"", arguments, r.status, r.out,
                  (char *)wanted.bytes);
    free_result(&r);
    free(wanted.bytes);
}

static void test_script_texts(void) {
    Buffer lines = { 0 };
    Error e = { 0 };
    for (int i = 0; i < N_SCRIPT_PROMPTS; i++) {
        append(&lines, script_prompts[i], strlen(script_prompts[i]), &e);
        append(&lines, i == 1 ? "\r\n" : "\n", i == 1 ? 2 : 1, &e);
    }
    put_file("prompts", lines.bytes, lines.n - 1);  // the last line has no end
    free(lines.bytes);
    check_texts("$tied", "", 1);
    check_texts("$tied", "-j 1 -b 3 -c 64", 2);
    check_texts("$tied", "-j 3 -b 1", 1);
    check_texts("$qwen2 -t 0.5 -k 20", "-b 16", 3);
    check_texts("$mixed --kv f16", "", 1);
    check_texts("$v0 -z $z -t 0", "", 1);
}

// Many lines, more than go together or are held, and a long text among short ones: in order, each as it should be.
static void test_many_lines(void) {
    Result r = run_with("$tied -t 0 -q --json --prompts $T/many");
    char *at = r.out, *end = NULL;
    char *texts[3] = { NULL };
    int n = 0;
    for (; *at; at = end + 1, n++) {
        char id[32];
        snprintf(id, sizeof id, "\"id\": %d, ", n);
        end = strchr(at, '\n');
        if (!end) break;
        *end = 0;
        check(is_json(at) && strstr(at, id), "line %d of many: got \"%.100s\", wanted JSON with %s", n, at, id);
        char *text = strstr(at, "\"text\"");
        char **same = &texts[n == 5 ? 0 : 1 + n % 2];
        char *stop = text ? strstr(text, ", \"seed\"") : NULL;
        if (stop) *stop = 0;
        if (*same) check(text && !strcmp(text, *same), "line %d: got %s, wanted %s", n, text, *same);
        *same = text;
    }
    check(r.status == 0 && n == 1500, "many lines: got status %d and %d results, wanted 1500", r.status, n);
    free_result(&r);
}

// Lines that are wrong are told, and the others are done; the first one's status is the program's.
static void test_wrong_lines(void) {
    static const struct { const char *line, *wanted; } lines[] = {
        { "Once", "\"text\": " }, { "{\"prompt\": \"a\", \"temperature\": 1}",
        "no key \\\"temperature\\\"" },
        { "{\"prompt\": \"a\", \"n_predict\": 2, \"id\": \"x\\ny\"}", "{\"id\": \"x\\u000ay\", \"text\": \"" },
        { "{\"prompt\": \"a\"", "\"error\": \"line 1, column 15 is not JSON" },
        { "{\"prompt\": 1}", "prompt\\\" has a value of the wrong kind" }, { "{\"id\": 1.5}",
        "{\"id\": 1.5, \"line\": 6, \"error\": \"no \\\"prompt" },
        { "{\"prompt\": \"a\", \"temp\": 1e9}", "--temp 1000000000" }, { "{\"prompt\": \"a\", \"seed\": -7}",
        "--seed -7" },
        { "{\"prompt\": \"\\ud800\"}", "surrogate" }, { "{\"prompt\": \"a\", \"seed\": 9, \"n_predict\": 0}",
        "\"seed\": 9" },
        { "{\"prompt\": \"a\", \"seed\": \"1\\u00002\"}", "\\\"seed\\\" has a value of the wrong kind" },
        { "{\"prompt\": \"a\", \"seed\\u0000\": 1}", "a prompt has no key" },
        { "{\"prompt\": \"a\", \"seed\": \"18446744073709551615\"}", "\"seed\": 18446744073709551615" },
        { "{\"prompt\": \"a\", \"seed\": \"18446744073709551616\"}", "--seed 18446744073709551616: expected" },
        { "{\"prompt\": \"a\", \"seed\": 18446744073709551616}", "a number, or one that is too large" },
        { "{\"prompt\": \"a\", \"seed\": -1, \"temp\": 1e-320}", "\"text\": " },
        { "{\"prompt\": \"a\", \"top_k\": true}", "wrong kind" }, { "[1]", "\"text\": " },
        { "{\"prompt\": \"a\", \"stop\": []}", "\"text\": " },
        { "{\"prompt\": \"a\", \"stop\": [\"\"]}", "\\\"stop\\\": expected up to 64 texts" },
        { "the of on the of on the of on the of on the of on the of on the of on the of on the of on",
        "tokens, the context" },
    };
    enum { N_LINES = sizeof lines / sizeof *lines };
    Buffer text = { 0 };
    Error e = { 0 };
    for (int i = 0; i < N_LINES; i++) append(&text, lines[i].line, strlen(lines[i].line), &e), append(&text, "\n", 1,
            &e);
    put_file("wrong", text.bytes, text.n);
    free(text.bytes);
    Result r = run_with("$tied -t 0 -n 3 -c 24 -q --json --prompts - <$T/wrong");
    char *at = r.out;
    for (int i = 0; i < N_LINES; i++) {
        char *end = strchr(at, '\n');
        if (!check(end, "wrong lines: got %d results, wanted %d", i, N_LINES)) break;
        *end = 0;
        check(is_json(at) && strstr(at, lines[i].wanted), "%s: got \"%s\", wanted \"%s\"", lines[i].line, at,
                lines[i].wanted);
        at = end + 1;
    }
    check(r.status == 1 && is_error_line(r.err) && strstr(r.err, "14 of 21 lines failed; line 2: "),
          "wrong lines: got status %d and \"%s\"", r.status, r.err);
    free_result(&r);
    r = run_with("$T/rows.bin -t 0 -n 1 --no-bos -q --json --prompts $T/rows");  // most embeddings are NaN
    check(r.status == 1 && strstr(r.err, "of 4 lines failed") && strstr(r.out, "is not finite or too large") &&
              strstr(r.out, "{\"text\": "), "NaN: got status %d, \"%s\" and \"%s\"", r.status, r.out, r.err);
    free_result(&r);
}

// A line's own stop text ends it, and no other one.
static void test_own_stops(void) {
    Result all = run_with("$tied -t 0 -n 9 -q --no-echo -i a");
    char command[200], wanted[64] = "";
    size_t at = 0;
    while (all.out[at] && !isalnum((unsigned char)all.out[at])) at++;
    char stop = all.out[at] ? all.out[at] : 'x';
    snprintf(wanted, sizeof wanted, "%.*s\n%.50s", (int)at, all.out, all.out);
    snprintf(command, sizeof command, "printf '{\"prompt\": \"a\", \"stop\": [\"%c\"]}\na\n' | "
             "$EMULATOR ./run $tied -t 0 -n 9 -q --no-echo --prompts -", stop);
    Result r = run_shell(command);
    check(all.status == 0 && r.status == 0 && !strcmp(r.out, wanted),
          "a line's stop text %c: got \"%s\", wanted \"%s\"", stop, r.out, wanted);
    free_result(&r);
    snprintf(command, sizeof command, "$tied -t 0 -n 9 -q --json -i a --stop %c", stop);
    r = run_with(command);
    snprintf(wanted, sizeof wanted, "\"stop_text\": \"%c\"", stop);
    check(is_json(r.out) && strstr(r.out, wanted), "--json --stop %c: got %s", stop, r.out);
    free_result(&r);
    free_result(&all);
}

// An answer comes before the next line is there.
static void test_streaming(void) {
    Command c = start_command("$EMULATOR ./run $tied -q -t 0 -n 2 --json --prompts -", true, -1);
    bool ok = true;
    for (int i = 0; ok && i < 3; i++) {
        char id[32];
        snprintf(id, sizeof id, "{\"id\": %d, ", i);
        ok = dprintf(c.to_stdin, "{\"prompt\": \"a\", \"id\": %d}\n", i) > 0 && wait_for(&c, c.out, 1, id);
    }
    Result r = end_command(&c);
    check(ok && r.status == 0, "lines one by one: got status %d and \"%s\"", r.status, r.out);
    free_result(&r);
    c = start_command("exec $EMULATOR ./run $tied -q --json --samples 10000 -n 60 -i a", false, -1);
    ok = wait_for(&c, c.out, 1, NULL);
    r = interrupt(&c);
    check(ok && r.status == 130 && strstr(r.out, "\"stop\": \"interrupted\""), "Ctrl-C: got status %d and \"%.200s\"",
          r.status, r.out);
    free_result(&r);
}

// ---- Scores ----

// The logits of a text's tokens, as -m logits writes them, and the tokens. Returns how many these are.
static int read_logits(const char *model, const char *text, int *ids, float **logits, int *n_vocabulary) {
    char arguments[512];
    int n = 0;
    write_text("one", text);
    snprintf(arguments, sizeof arguments, "%s -m tokenize -f $T/one", model);
    char *list = output_of(arguments);
    for (char *at = strtok(list, " \n"); at; at = strtok(NULL, " \n")) ids[n++] = atoi(at);
    free(list);
    snprintf(arguments, sizeof arguments, "%s -m logits -f $T/one -o $T/logits", model);
    free(output_of(arguments));
    Bytes b = read_bytes(temporary("logits"));
    *logits = (float *)(void *)b.bytes;
    *n_vocabulary = (int)(b.n / sizeof(float)) / (n > 0 ? n : 1);
    return n;
}

// The log-probability of a token by plain arithmetic, and how many tokens are likelier.
static double plain_logprob(const float *logits, int n, int id, int *n_likelier) {
    long double sum = 0;
    *n_likelier = 0;
    for (int i = 0; i < n; i++) sum += expl((long double)logits[i] - logits[id]);
    for (int i = 0; i < n; i++) *n_likelier += logits[i] > logits[id];
    return (double)-logl(sum);
}

// The number after a key, from *at on; *at moves behind it. NaN: there is none.
static double number_after(const char **at, const char *key) {
    const char *found = *at ? strstr(*at, key) : NULL;
    *at = found ? found + strlen(key) : NULL;
    return found ? atof(*at) : NAN;
}

static bool is_near(double got, double wanted) { return fabs(got - wanted) <= 2e-6 * fmax(1, fabs(wanted)); }

static void test_scores(void) {
    static const char text[] = "Once upon a time there was the house";
    static const char *const models[] = { "$tied", "$qwen2" };
    for (size_t i = 0; i < 2; i++) {
        int ids[64], n_likelier, n_vocabulary;
        float *logits;
        double total = 0;
        char arguments[256];
        int n = read_logits(models[i], text, ids, &logits, &n_vocabulary);
        snprintf(arguments, sizeof arguments, "%s -m score --json -q --logprobs 3 -b %d -f $T/one", models[i],
                i ? 64 : 5);
        char *out = output_of(arguments);
        const char *at = out;
        check(is_json(out), "%s: not JSON: %s", arguments, out);
        for (int k = 1; k < n; k++) {
            const float *row = logits + (size_t)(k - 1) * (size_t)n_vocabulary;
            double wanted = plain_logprob(row, n_vocabulary, ids[k], &n_likelier);
            double id = number_after(&at, "\"id\": "), logprob = number_after(&at, "\"logprob\": ");
            double rank = number_after(&at, "\"rank\": ");
            total += wanted;
            check(id == ids[k] && is_near(logprob, wanted) && rank == n_likelier + 1,
                  "%s, token %d: got %g, %.9g, rank %g, wanted %d, %.9g, %d", arguments, k, id, logprob, rank,
                          ids[k], wanted,
                  n_likelier + 1);
            for (int place = 0; place < 3; place++) {
                int other = (int)number_after(&at, "\"id\": ");
                wanted = plain_logprob(row, n_vocabulary, other, &n_likelier);
                logprob = number_after(&at, "\"logprob\": ");
                check(n_likelier == place && is_near(logprob, wanted),
                        "%s, token %d, place %d: got %d, %.9g, wanted %.9g",
                      arguments, k, place, other, logprob, wanted);
            }
        }
        size_t n_bytes = strlen(text) - (i == 1);  // without a begin token, the first is not scored: "O"
        double got = number_after(&at, "\"total\": "), bits = number_after(&at, "\"bits_per_byte\": ");
        check(is_near(got, total) && is_near(bits, -total / log(2) / (double)n_bytes),
              "%s: got %.9g and %.9g, wanted %.9g and %.9g", arguments, got, bits, total,
                      -total / log(2) / (double)n_bytes);
        free(out);
        free(logits);
    }
}

// P(choice | prompt), where the prompt's last token and a choice's first letter may become one token.
static void test_choices(void) {
    static const char prompt[] = "Once up";
    static const char *const choices[] = { "on a", "", "per", " the house", "on" };
    double logprobs[5], sum = 0;
    int prefix[64], ids[5][64], n[5], n_likelier, n_vocabulary, common;
    float *logits[5];
    n[1] = read_logits("$tied", prompt, prefix, &logits[1], &n_vocabulary);
    common = n[1];
    for (int i = 0; i < 5; i++) {
        char text[64];
        if (i == 1) continue;
        snprintf(text, sizeof text, "%s%s", prompt, choices[i]);
        n[i] = read_logits("$tied", text, ids[i], &logits[i], &n_vocabulary);
        for (int k = 0; k < common; k++) if (k == n[i] || ids[i][k] != prefix[k]) common = k;
    }
    for (int i = 0; i < 5; i++) {
        logprobs[i] = 0;
        for (int k = common; i != 1 && k < n[i]; k++)
            logprobs[i] += plain_logprob(logits[i] + (k - 1) * n_vocabulary, n_vocabulary, ids[i][k], &n_likelier);
        if (i != 1) sum += exp(logprobs[i]);
        free(logits[i]);
    }
    char *out = output_of("$tied -m score --json -q -i 'Once up' --choose 'on a|per| the house|on'");
    const char *at = out;
    check(is_json(out) && common > 1, "--choose: not JSON: %s", out);
    for (int i = 0; i < 5; i++) {
        if (i == 1) continue;
        double p = number_after(&at, "\"p\": "), logprob = number_after(&at, "\"logprob\": ");
        double each = number_after(&at, "\"logprob_per_byte\": ");
        check(is_near(p, exp(logprobs[i]) / sum) && is_near(logprob, logprobs[i]) &&
                  is_near(each, logprobs[i] / (double)strlen(choices[i])),
              "--choose, \"%s\": got %.9g, %.9g, %.9g, wanted %.9g, %.9g", choices[i], p, logprob, each,
              exp(logprobs[i]) / sum, logprobs[i]);
    }
    free(out);
    char *one = output_of("$tied -q --no-echo -i Once --one-of 'yes|no|yesterday|n\xC3\xA9' -n 1 "
                          "--samples 60 -s 1 -t 2 -p 1");
    int found[4] = { 0 }, n_lines = 0;
    for (char *line = strtok(one, "\n"); line; line = strtok(NULL, "\n"), n_lines++) {
        static const char *const texts[] = { "yes", "no", "yesterday", "n\xC3\xA9" };
        for (int i = 0; i < 4; i++) found[i] += !strcmp(line, texts[i]);
    }
    check(n_lines == 60 && found[0] + found[1] + found[2] + found[3] == 60 && found[0] && found[1] && found[2] &&
            found[3],
          "--one-of: of %d lines got %d yes, %d no, %d yesterday, %d n\xC3\xA9", n_lines, found[0], found[1],
                  found[2],
          found[3]);
    free(one);
}

// ---- Evaluations ----

static void test_evaluation(void) {
    static const struct { const char *got, *wanted; bool right; } answers[] = {
        { "5", "5", true }, { "It is 5.", "5", true }, { "5.0", "5", true }, { "1,234", "1234", true }, { "-3", "-3",
        true },
        { "10-3 = 7", "7", true }, { "6 of 5", "6", false }, { "five", "5", false }, { "", "5", false },
        { "The answer is 72", "3 + 69 = 72\n#### 72", true }, { "72 or 71", "#### 72", false }, { "B", "B", true },
        { "b", "B", false }, { "B 2", "B", false }, { "2.50", "2.5", true }, { "$12", "12", true },
        { "0", "#### none", false }, { "#### none", "#### none", true }, { "0", "", false }, { "", "", true },
    };
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++) {
        Text got = { answers[i].got, strlen(answers[i].got) }, wanted = { answers[i].wanted,
                strlen(answers[i].wanted) };
        check(is_right(got, wanted) == answers[i].right, "\"%s\" where \"%s\" is wanted: got %s", answers[i].got,
              answers[i].wanted, answers[i].right ? "wrong" : "right");
    }
    write_text("tasks", "{\"question\": \"on\", \"answer\": 5, \"solution\": \"so\"}\n"
                        "{\"question\": \"of\", \"answer\": \"a\", \"choices\": [\"the\", \"a\"]}\n"
                        "{\"question\": \"up\", \"answer\": 1, \"choices\": [\"the\", \"a\"]}\n"
                        "{\"question\": \"at\", \"answer\": 7}\n{\"question\": \"at\"}\n");
    // what is asked by hand, as a text and as scores
    char *text = output_of("$tied -q -t 0 -n 20 --no-echo -i 'Question: on\nAnswer: 5\n\nQuestion: at\nAnswer:'");
    char *p = output_of("$tied -q -m score -i 'Question: on\nAnswer: 5\n\nQuestion: up\nAnswer: ' --choose 'the|a'");
    Result r = run_with("$tied -q -m eval -f $T/tasks --shots 1 -n 20 --json");
    char wanted[64], *first = text + strspn(text, " \n");
    snprintf(wanted, sizeof wanted, "\"line\": 3, \"correct\": %s, ", atof(p) < 0.5 ? "true" : "false");
    check(strstr(r.out, wanted), "-m eval: got %s, wanted %s", r.out, wanted);
    static const char key[] = "\"line\": 4, \"correct\": false, \"got\": \"";
    const char *at = strstr(r.out, key);
    check(at && at[sizeof key - 1] == *first, "-m eval: got %s, wanted line 4 to begin with \"%c\"", r.out, *first);
    check(r.status == 1 && strstr(r.out, "{\"line\": 5, \"error\": ") && strstr(r.out, "{\"n\": 3, \"correct\": ") &&
              strstr(r.err, "1 of 5 lines failed"), "-m eval: got status %d, %s and %s", r.status, r.out, r.err);
    free(text), free(p);
    free_result(&r);
}

static const Case script_cases[] = {
    { "$tied --prompts nowhere", 3, NULL, "nowhere: No such file" }, { "$tied --samples 0", 2, NULL, "--samples 0" },
    { "$tied --logprobs 101", 2, NULL, "--logprobs 101" }, { "$T/no_bos.bin -q -m score -i O", 1, NULL,
    "a single token" },
    { "$tied -q -m score -i Once --choose 'a||b'", 1, NULL, "choice 2 is empty" },
    { "$tied -q -m score --prompts $T/empty", 0, NULL, NULL }, { "$tied -q --prompts $T/empty --json", 0, NULL,
    NULL },
    { "$tied -m eval -f nowhere -q", 3, NULL, "nowhere: No such file" }, { "$tied -m eval -q", 2, NULL, "-f FILE" },
    { "$tied -q --one-of 'on the' -c 7 -i Once", 5, NULL, "could not become" },
    { "$tied -q -t 0 -n 3 -i Once --json >/dev/full", 3, NULL, "stdout" },
    { "$tied -q -m score --ids '1 2' --choose 'a|b'", 2, NULL, "--ids" },
    { "$tied -q -m score --ids '1 265 82' --json", 0, "{\"scores\": [{\"id\": 265, ", NULL },
    { "$tied -t 0 -n 2 -i Once --json", 0, "\"prompt_tokens\": ", "2 tokens written in " },
};

// A line with messages is answered as a chat would; a line's stop ends its text before its first place.
static void test_members(void) {
    write_text("members", "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi there\"}], \"n_predict\": 12, "
                          "\"temp\": 0}\n");
    Result chat = run_with("$long -m chat -st -t 0 -q -n 12 -i 'Hi there'");
    Result line = run_with("$long --prompts $T/members --no-echo -q");
    check(chat.status == 0 && line.status == 0 && chat.n_out == line.n_out && !memcmp(chat.out, line.out, line.n_out),
          "a line with messages: got \"%s\" %s, wanted the chat's \"%s\"", line.out, line.err, chat.out);
    free_result(&chat), free_result(&line);
    Result whole = run_with("$tied -i Once -n 20 -t 0 --no-echo -q");
    size_t at = 1;
    while (at < whole.n_out && !isalnum((unsigned char)whole.out[at])) at++;
    const char *first = memchr(whole.out, whole.out[at], whole.n_out);
    char text[160];
    snprintf(text, sizeof text, "{\"prompt\": \"Once\", \"n_predict\": 20, \"temp\": 0, \"stop\": [\"%c\"]}\n",
             whole.out[at]);
    write_text("members", text);
    line = run_with("$tied --prompts $T/members --no-echo -q");
    size_t wanted = (size_t)(first - whole.out);
    check(at < whole.n_out && line.n_out == wanted + 1 && !memcmp(line.out, whole.out, wanted),
          "a line that stops at %c: got \"%s\", wanted %zu bytes of \"%s\"", whole.out[at], line.out, wanted,
          whole.out);
    free_result(&whole), free_result(&line);
    static const char *const wrong[] = {
        "\"messages\": 1", "\"prompt\": \"a\", \"messages\": [{\"role\": \"user\"}]", "\"prompt\": \"a\", \"stop\": 1",
        "\"prompt\": \"a\", \"stop\": [\"\"]", "\"prompt\": \"a\", \"stop\": \"\\u0000\"",
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        snprintf(text, sizeof text, "{%s}\n", wrong[i]);
        write_text("members", text);
        line = run_with("$tied --template chatml --prompts $T/members -q --json");
        check(line.status == 1 && strstr(line.out, "\"error\": "), "%s: got status %d and %s", text, line.status,
              line.out);
        free_result(&line);
    }
}

static void test_scripts(void) {
    make_files();
    Buffer many = { 0 };
    Error e = { 0 };
    for (int i = 0; i < 1500; i++) {
        char line[80];
        int n = snprintf(line, sizeof line, "{\"id\": %d, \"prompt\": \"%s\", \"n_predict\": %d}\n", i,
                i % 2 ? "Once" : "of the",
                         i == 5 ? 40 : 1);
        append(&many, line, (size_t)n, &e);
    }
    put_file("many", many.bytes, many.n);
    free(many.bytes);
    write_text("rows", "\"\n#\na\n$\n");
    for (size_t i = 0; i < sizeof script_cases / sizeof *script_cases; i++) check_case(&script_cases[i]);
    test_script_texts();
    test_many_lines();
    test_wrong_lines();
    test_own_stops();
    test_streaming();
    test_scores();
    test_choices();
    test_evaluation();
    test_members();
    remove_files();
}
