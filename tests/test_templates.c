// JSON, and chat templates against jinja2. Part of test.c.
//
// tests/golden/templates.jsonl is made by tests/compare_templates.py: first what the templates are given, then a line
// [template, text] for each; the text is null where jinja2 refuses.

static const struct tm golden_now = { .tm_year = 124, .tm_mon = 6, .tm_mday = 26, .tm_wday = 5, .tm_hour = 12 };

// Renders with a copy of the template that ends where its block does.
static bool render_text(const char *text, size_t n, const Value *given, Rendered *out, Error *e) {
    Bytes b = copy_bytes((const unsigned char *)text, n);
    *e = (Error){ 0 };
    *out = (Rendered){ .text = { 0 } };
    bool ok = render_template((Text){ (const char *)b.bytes, n }, given, &golden_now, MAX_TEMPLATE_WORK, out, e);
    free(b.bytes);
    return ok;
}

// A NUL in a string, numbers of many digits, many keys, many lists side by side; part of the error, or NULL.
static void test_json_limits(void) {
    static const struct { const char *before, *unit, *after; int n; const char *wanted; } cases[] = {
        { "0.", "0", "1", 300, NULL }, { "0.", "0", "1", 500, "too large" }, { "[", "[],", "[]]", 150, NULL },
        { "{", "\"%d\": 1,", "\"x\": 1}", 999, NULL }, { "{", "\"%d\": 1,", "\"x\": 1}", 1000, "1,000 keys" },
    };
    Pool pool = { 0 };
    Error e = { 0 };
    Value v;
    check(!parse_json("\"\\\0\"", 4, &pool, &v, &e) && strstr(e.text, "escape"), "an escaped NUL: got \"%s\"", e.text);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[20000], *end = text + sprintf(text, "%s", cases[i].before);
        for (int k = 0; k < cases[i].n; k++) end += sprintf(end, cases[i].unit, k);
        end += sprintf(end, "%s", cases[i].after);
        bool ok = parse_json(text, (size_t)(end - text), &pool, &v, &e);
        check(ok == !cases[i].wanted && (ok || strstr(e.text, cases[i].wanted)), "%d times %s: got %d, \"%s\"",
              cases[i].n, cases[i].unit, ok, e.text);
    }
    free_pool(&pool);
}

static void test_json_reader(void) {
    static const struct { const char *json, *wanted; } cases[] = {
        // values are shown as the template's tojson writes them, errors by a part of their text
        { " [1, -0, 2.5e1, true, false, null, \"\"] ", "[1, 0, 25.0, true, false, null, \"\"]" },
        { "\"\\u00e9\\ud83d\\ude00\\n\\/\"", "\"\u00e9\U0001F600\\n/\"" }, { "\xEF\xBB\xBF{}", "{}" },
        { "{\"a\": 1, \"b\": 2, \"a\": 3, \"\\u0061\": 4}", "{\"a\": 4, \"b\": 2}" },
        { "9223372036854775807", "9223372036854775807" }, { "-9223372036854775808", "-9223372036854775808" },
        { "9223372036854775808", "too large" }, { "1e999", "too large" }, { "\"\\ud83d\"", "surrogate" },
        { "\"\\ude00\"", "surrogate" }, { "\"\\ud83d\\u0041\"", "surrogate" }, { "\"\\x\"", "escape" },
        { "\"\\u12g4\"", "escape" }, { "\"a", "without an end" }, { "\"\\", "without an end" }, { "\"\n\"", "control" },
        { "\"\xFF\"", "UTF-8" }, { "\"\xED\xA0\x80\"", "UTF-8" }, { "", "unexpected end" }, { "[1,", "unexpected end" },
        { "[1,]", "number" }, { "[1 2]", "no , or ]" }, { "{\"a\" 1}", "expected :" }, { "{1: 2}", "no \"" },
        { "{\"a\": 1,}", "no \"" }, { "01", "number" }, { "1.", "after the value" }, { ".5", "number" },
        { "+1", "number" },
        { "-", "number" }, { "1e", "after the value" }, { "0x10", "after the value" }, { "NaN", "number" },
        { "nul", "number" },
        { "1 2", "after the value" }, { "[\n\n 1,\n  x]", "line 4, column 3" }, { "\"\x7F\"", "\"\x7F\"" },
        { "{\"\": {\"\": []}}", "{\"\": {\"\": []}}" },
        { "\"\\q0041\"", "escape" }, { "\"\\uff01\"", "\"\uFF01\"" }, { "\"\\u12\"", "escape" },
        { "\"\\ud83dxude00\"", "surrogate" }, { "\"\\ud83d\\xde00\"", "surrogate" },
        { "\"\\ude00\\ude00\"", "surrogate" }, { "\"\\ud83d\\ue000\"", "surrogate" },
        { "[1e+2, 1e-2, 1E2]", "[100.0, 0.01, 100.0]" }, { "1e-999", "0.0" }, { "{\"a\": 1 2}", "no , or }" },
        { "{\"\\q\": 1}", "escape" }, { "[1.5, 1]", "[1.5, 1]" }, { "nulL", "number" }, { "\"a\" \"b\"", "after the" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Pool pool = { 0 };
        Error e = { 0 };
        Bytes b = copy_bytes((const unsigned char *)cases[i].json, strlen(cases[i].json));
        Value given = { .kind = IS_DICT }, v;
        Rendered out = { .text = { 0 } };
        bool ok = parse_json((char *)b.bytes, b.n, &pool, &v, &e) && push_value(&pool, &given, string("v"), &e) &&
                  push_value(&pool, &given, v, &e) && render_text("{{ v|tojson }}", 14, &given, &out, &e);
        bool same = ok ? out.text.n == strlen(cases[i].wanted) && !memcmp(out.text.bytes, cases[i].wanted, out.text.n)
                       : strstr(e.text, cases[i].wanted) != NULL;
        check(same, "JSON %s: got \"%.*s\" %s, wanted %s", cases[i].json, (int)out.text.n,
              out.text.n ? (char *)out.text.bytes : "", e.text, cases[i].wanted);
        free_rendered(&out);
        free(b.bytes);
        free_pool(&pool);
    }
    test_json_limits();
    for (int depth = MAX_JSON_DEPTH - 1; depth <= MAX_JSON_DEPTH + 1; depth++) {
        char text[2 * MAX_JSON_DEPTH + 2];
        Pool pool = { 0 };
        Error e = { 0 };
        Value v;
        memset(text, '[', (size_t)depth);
        memset(text + depth, ']', (size_t)depth);
        bool ok = parse_json(text, 2 * (size_t)depth, &pool, &v, &e);
        check(ok == (depth <= MAX_JSON_DEPTH), "JSON of depth %d: got %d, \"%s\"", depth, ok, e.text);
        free_pool(&pool);
    }
}

enum { N_LACKING = 26 };  // of the templates in templates.jsonl that jinja2 renders, so many are refused by name

static void test_template_goldens(void) {
    Bytes file = read_golden("templates.jsonl");
    Pool pool = { 0 };
    Error e = { 0 };
    Value given = { .kind = IS_NONE };
    int n_lines = 0, n_lacking = 0;
    for (size_t at = 0, end; at < file.n; at = end + 1, n_lines++) {
        end = at + (size_t)((char *)memchr(file.bytes + at, '\n', file.n - at) - (char *)(file.bytes + at));
        Value line;
        Rendered out;
        if (!check(parse_json((char *)file.bytes + at, end - at, &pool, &line, &e), "line %d: %s", n_lines + 1,
                   e.text)) break;
        if (n_lines == 0) given = line;
        if (n_lines == 0) continue;
        Value text = line.items[0], wanted = line.items[1];
        bool ok = render_text(text.text, text.n, &given, &out, &e), refused = wanted.kind == IS_NONE;
        bool lacks_it = !ok && strstr(e.text, "not supported");
        bool same = ok ? !refused && out.text.n == wanted.n && (!wanted.n || !memcmp(out.text.bytes, wanted.text,
            wanted.n)) : refused;
        n_lacking += lacks_it && !refused;
        check(same || lacks_it, "template %.*s: got \"%.*s\" %s, wanted \"%.*s\"%s", (int)text.n, text.text,
              (int)out.text.n,
              ok && out.text.n ? (char *)out.text.bytes : "", e.text, refused ? 0 : (int)wanted.n, refused ? "" :
                  wanted.text,
              refused ? " a refusal" : "");
        free_rendered(&out);
    }
    check(n_lines > 1000 && n_lacking == N_LACKING, "%d templates: got %d that are not supported, wanted %d", n_lines,
          n_lacking, N_LACKING);
    free_pool(&pool);
    free(file.bytes);
}

// Which bytes count as the template's own: capital letters stand for them here, small ones and _ for the others.
static void test_origins(void) {
    static const struct { const char *text, *wanted; } cases[] = {
        { "AB{{ c }}C", "AB_____C" }, { "{{ 'A' ~ c ~ 'B' }}", "A_____B" },
        { "{{ 'AB' + c[1:3] + 'CD'[1:] }}", "AB__D" },
        { "{{ (' A' + c + 'B ') | trim }}", "A_____B" }, { "{{ c.replace('y', 'Y') }}", "__Y__" },
        { "{{ 'ABA'.replace('B', c) }}", "A_____A" }, { "{{ [c, 'B']|join('A') }}", "_____AB" },
        { "{{ 'ab' | upper ~ c | upper }}", "AB_____" },
        { "{{ ('A' ~ c) | tojson }}", "_A______" }, { "{{ {'A': c} | tojson }}", "__A___________" },
        { "{{ (c ~ 'A')[::-1] }}", "A_____" },
        { "{% set x %}A{{ c }}{% endset %}{{ x }}", "A_____" },
        { "{% macro f(x) %}A{{ x }}B{% endmacro %}{{ f(c) }}", "A_____B" },
        { "{{ c.split('y')[0] ~ 'A'.split(',')[0] }}", "__A" }, { "{{ c * 2 ~ 'A' * 2 }}", "__________AA" },
        { "{% filter upper %}a{{ c }}{% endfilter %}", "A_____" },
        { "{% for x in c %}{{ x }}A{% endfor %}", "_A_A_A_A_A" }, { "{{ c|indent(width=1, first=true) }}", "______" },
        { "{{ 'A' if c else 'B' }}{{ c|default('X') }}", "A_____" }, { "{{ 'Ab'|title ~ c|title }}", "AB_____" },
        { "{{ range(9223372036854775206, 9223372036854775807)|length }}", "601" },  // the ends are no doubles
        { "{{ range(3, -4, -3)|length ~ range(0, 1, -1)|length ~ range(-9223372036854775807, 5, 9223372036854775807)"
          "|length }}", "302" },
    };
    Pool pool = { 0 };
    Error e = { 0 };
    Value given;
    if (!check(parse_json("{\"c\": \"XxyZz\"}", 14, &pool, &given, &e), "%s", e.text)) return;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Rendered out;
        char got[64] = "";
        bool ok = render_text(cases[i].text, strlen(cases[i].text), &given, &out, &e);
        for (size_t k = 0; ok && k < out.text.n && k < 63; k++)
            got[k] = out.marks.bytes[k] ? (char)toupper(out.text.bytes[k]) : '_';
        check(ok && out.marks.n == out.text.n && !strcmp(got, cases[i].wanted),
              "origins of %s: got \"%s\" %s, wanted \"%s\"",
              cases[i].text, got, e.text, cases[i].wanted);
        free_rendered(&out);
    }
    free_pool(&pool);
}

// What would take for ever, or all memory, ends with one line.
static void test_template_limits(void) {
    static const struct { const char *text, *wanted; } cases[] = {
        { "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "too long" },
        { "{% for a in range(9999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "too long" },
        { "{% set n = namespace(s='abcdefgh') %}{% for a in range(9999) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "too long" },
        { "{% set n = namespace(l=[1]) %}{% for a in range(9999) %}{% set n.l = n.l + n.l %}{% endfor %}",
            "too long" },
        { "{{ 'x' * 99999999999 }}", "too long" }, { "{{ [1] * 99999999999 }}", "the operator *" },
        { "{{ range(99999999)|list }}", "range" },
        { "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "nested too deep" },
        { "{% macro f(x=f()) %}{% endmacro %}{{ f() }}", "nested too deep" },
        { "{% macro f(x) %}{{ {1: f(1)} }}{% endmacro %}{{ f() }}", "nested too deep" },
        { "{% macro f(x) %}{% for y in [1] %}{% set z %}{{ 1 < 2 < f(x) }}{% endset %}{% endfor %}{% endmacro %}"
          "{{ f(1) }}", "nested too deep" },
        { "{{ 'a'.replace('', 'x' * 9999999) * 99 }}", "too long" },
        { "{% set n = namespace(s='a') %}{% for a in range(9999) %}{% set n.s = n.s|tojson %}{% endfor %}",
            "too long" },
        { "{% set n = namespace(l=[]) %}{% for a in range(9999) %}{% set n.l = [n.l] %}{% endfor %}{{ n.l }}",
            "nested too deep" },
        { "{% set n = namespace(l=[]) %}{% set m = namespace(l=[]) %}{% for a in range(999) %}{% set n.l = [n.l] %}"
          "{% set m.l = [m.l] %}{% endfor %}{{ n.l == m.l }}", "nested too deep" },
        { "{% for a in range(9999) %}{{ ('a' * 99999).count('b') }}{% endfor %}", "too long" },
        { "{% set s = 'a' * 999999 %}{{ s.strip('b' * 999999 ~ 'a') }}", "too long" },
        { "{% set s = 'a' * 999999 %}{% for a in range(99999) %}{{ s.count('') }}{% endfor %}", "too long" },
        { "{% set s = 'a' * 999999 %}{% for a in range(99999) %}{% if s < s ~ 'b' %}{% endif %}{% endfor %}",
          "too long" },
        { "{% set s = 'a' * 999999 %}{% for a in range(99999) %}{% if s.startswith(s) %}{% endif %}{% endfor %}",
          "too long" },
        { "{% set s = 'a' * 999999 %}{% set d = {s: 1} %}{% for a in range(99999) %}{% set x = d[s] %}{% endfor %}",
          "too long" },
        { "{{ 'a' * 99999999 ~ 1 }}", "too long" }, { "{{ 'x'|indent(99999999999) }}", "too long" },
        { "{{ {'a': 1}|tojson(indent=99999999999) }}", "too long" },
    };
    Value given = { .kind = IS_DICT };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Rendered out;
        Error e;
        bool ok = render_text(cases[i].text, strlen(cases[i].text), &given, &out, &e);
        check(!ok && strstr(e.text, cases[i].wanted) && strstr(e.text, "line 1"), "%.60s: got \"%s\", wanted \"%s\"",
              cases[i].text,
              ok ? "text" : e.text, cases[i].wanted);
        free_rendered(&out);
    }
    static const struct { const char *before, *unit, *after; } deep[] = {
        { "{{ ", "(", "1" }, { "{{ ", "[", "1" }, { "{{ ", "{1:", "1" }, { "{{ ", "- ", "1 }}" },
        { "{{ ", "not ", "1 }}" }, { "", "{% if 1 %}", "" },
        { "", "{% for x in [1] %}", "" }, { "{{ 1", " if 1 else 1", " }}" }, { "{{ ", "f(", "" },
        { "{{ x", "[x", "" }, { "", "{% macro f() %}", "" }, { "", "{% set a %}", "" },
        { "", "{% filter upper %}", "" }, { "{{ ", "x.a(", "" }, { "{{ ", "x is in(", "" }, { "{{ ", "x|d(", "" },
    };
    for (size_t i = 0; i < sizeof deep / sizeof *deep; i++) {
        Buffer text = { 0 };
        Rendered out;
        Error e = { 0 };
        bool made = true;
        for (int k = -1; k <= 20000; k++) {
            const char *part = k < 0 ? deep[i].before : k < 20000 ? deep[i].unit : deep[i].after;
            if (*part) made = made && append(&text, part, strlen(part), &e);
        }
        bool ok = made && render_text((char *)text.bytes, text.n, &given, &out, &e);
        check(!ok && strstr(e.text, "nested too deep"), "20,000 times %s: got \"%s\"", deep[i].unit, ok ? "text" :
              e.text);
        free_rendered(&out);
        free(text.bytes);
    }
}

// Errors say what and where; what is not supported has a name and the way out.
static void test_template_errors(void) {
    static const struct { const char *text, *wanted; } cases[] = {
        { "a\n\n{{ x.y }}", "line 3: 'x' is undefined" }, { "{{ raise_exception('No ' ~ 1) }}", "line 1: No 1" },
        { "{% include 'x' %}", "the statement include is not supported; --template" },
        { "{{ 1|batch(2) }}", "the filter batch" },
        { "{{ 1 is upper }}", "the test upper" }, { "{{ 'a'.encode() }}", "the method encode" },
        { "{{ [].append(1) }}", "the method append" },
        { "{{ 'a'.strip }}", "without a call the method strip" }, { "{{ {}.items }}", "the method items" },
        { "{% for x in [1] %}{{ loop.depth }}{% endfor %}", "the loop's depth" },
        { "{% for x in [1] recursive %}{% endfor %}", "the loop that is recursive" },
        { "{{ cycler(1) }}", "the name cycler" }, { "\n{% if x %}\n", "line 2: endif is missing" },
        { "{% for x in [1] %}", "endfor is missing" },
        { "{{ 'a }}", "a string without an end" }, { "{{ 1 ", "a tag without }}" }, { "{# x", "a comment without #}" },
        { "{% endif %}", "the statement endif" }, { "{{ 1 + }}", "expected a value" },
        { "{{ (1 }}", "expected ), found }" },
        { "{{ }}", "expected a value" }, { "{% break %}", "break outside of a loop" },
        { "{{ 1 // 0 }}", "division by 0" },
        { "{{ 9223372036854775807 + 1 }}", "too large" }, { "{{ '\\N{DASH}' }}", "the escape \\N" },
        { "{{ 0x10 }}", "the number 0x" },
        { "{% for a, b in [1] %}{% endfor %}", "the items of a value of type int" },
        { "{% set a, b = [1, 2, 3] %}", "3 values for 2 names" },
        { "{{ '\u00e9'|upper }}", "the case of \u00e9 is not supported" },
        { "{% macro f(a) %}{% endmacro %}{{ f(1, 2) }}", "an argument" },
        { "{{ x.__class__ }}", "'x' is undefined" }, { "{{ ] }}", "found ]" },
        { "{{ 'a'.format() }}", "the method format" }, { "{{ 2 ** 3 }}", "the operator **" },
        { "{{ ; }}", "an unexpected character" },
        { "{{ strftime_now('%Y\\u0000%d') }}", "the date %Y is not supported" },
    };
    Value given = { .kind = IS_DICT };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Rendered out;
        Error e;
        bool ok = render_text(cases[i].text, strlen(cases[i].text), &given, &out, &e);
        check(!ok && strstr(e.text, cases[i].wanted) && strstr(e.text, "the chat template, line"),
              "%s: got \"%s\", wanted \"%s\"",
              cases[i].text, ok ? "text" : e.text, cases[i].wanted);
        free_rendered(&out);
    }
}

// --template NAME for every name, against what published templates give (chat.txt).
static void test_built_in(void) {
    Bytes file = read_golden("chat.txt");
    char *lines = get(file.n + 1);
    memcpy(lines, file.bytes, file.n);
    Model none = { .tokenizer = { .bos = -1, .eos = -1, .unk = -1 } };
    Text template = { 0 };
    Buffer unused = { 0 };
    Error e = { 0 };
    Pool pool = { 0 };
    Value messages = { .kind = IS_LIST };
    int n_cases = 0, n_templates = 0;
    char name[40] = "";
    options.template_args = (Texts){ 2, { "bos_token=\"<s>\"", "eos_token=\"</s>\"" } };
    for (char *line = strtok(lines, "\n"); line; line = strtok(NULL, "\n")) {
        char *quote = strchr(line, '"');
        if (!strncmp(line, "template ", 9)) {
            snprintf(name, sizeof name, "%.*s", (int)strcspn(line + 9, " "), line + 9);
            n_templates += check(find_template(&none, name, &unused, &template, &e), "%s: %s", name, e.text);
        }
        if (!strncmp(line, "case ", 5)) messages = (Value){ .kind = IS_LIST };
        if (line[0] == '#' || !quote) continue;
        Value content, message = { .kind = IS_DICT };
        *strchr(line, ' ') = 0;
        if (!check(parse_json(quote, strlen(quote), &pool, &content, &e), "chat.txt: %s", e.text)) continue;
        if (strcmp(line, "expect")) {
            give(&pool, &message, string("role"), string(line), &e);
            give(&pool, &message, string("content"), content, &e);
            push_value(&pool, &messages, message, &e);
            continue;
        }
        Rendered out = { .text = { 0 } };
        bool ok = render_chat(&none, template, &messages, true, &out, &e);
        check(ok && out.text.n == content.n && !memcmp(out.text.bytes, content.text, content.n),
              "%s: got \"%.*s\" %s, wanted \"%.*s\"", name, (int)out.text.n, out.text.n ? (char *)out.text.bytes : "",
                  e.text,
              (int)content.n, content.text);
        n_cases++;
        free_rendered(&out);
    }
    check(n_templates == N_BUILT_IN && n_cases >= 4 * N_BUILT_IN, "chat.txt: %d templates, %d cases", n_templates,
          n_cases);
    options.template_args.n = 0;
    free_pool(&pool);
    free(lines);
    free(file.bytes);
}

static void test_templates(void) {
    test_template_goldens();
    test_origins();
    test_template_limits();
    test_template_errors();
    test_built_in();
}

// Lines "TEMPLATE GIVEN", both in hexadecimal, the second JSON: build/test --templates, for compare_templates.py. For
// each a line "text HEX" or "error WHY".
static int render_lines(void) {
    Buffer line = { 0 };
    Error e = { 0 };
    while (read_line(&line, &e)) {
        char *text = (char *)line.bytes, *space = memchr(text, ' ', line.n), *json = space ? space + 1 : text;
        size_t n = space ? read_hex(text, (size_t)(space - text), text) : 0;
        size_t n_json = read_hex(json, line.n - (size_t)(json - text), json);
        Pool pool = { 0 };
        Value given;
        Rendered out = { .text = { 0 } };
        bool ok = parse_json(json, n_json, &pool, &given, &e) && render_text(text, n, &given, &out, &e);
        disarm(e.text, strlen(e.text), "");
        printf(ok ? "text " : "error %s", e.text);
        for (size_t i = 0; ok && i < out.text.n; i++) printf("%02x", out.text.bytes[i]);
        printf("\n");
        e = (Error){ 0 };
        free_rendered(&out);
        free_pool(&pool);
    }
    free(line.bytes);
    return 0;
}
