// What a team of threads shares, and how many there are. Part of test.c.

// ---- Chunks ----

// Threads that take chunks in a random order, some of them never: every unit is taken exactly once.
static void check_chunks(size_t n, size_t unit, int threads, Gate *gate) {
    Team team[64];
    unsigned char *taken = get(n);
    bool is_lazy[64], is_done[64] = { false };
    int n_busy = 0, n_wrong = 0;
    size_t shares = 8 * (size_t)threads, most = round_up((n + shares - 1) / shares, unit);
    for (int i = 0; i < threads; i++) {
        team[i] = (Team){ .thread = i, .threads = threads, .gate = gate };
        gate->seats[i].taken[0] = 0;
        is_lazy[i] = random_below(3) == 0;
        n_busy += !is_lazy[i];
    }
    if (n_busy == 0) is_lazy[threads - 1] = false, n_busy = 1;
    while (n_busy > 0) {
        int i = (int)random_below((size_t)threads);
        Range r = { 0, 0 };
        if (is_lazy[i] || is_done[i]) continue;
        if (!take_chunk(&team[i], n, unit, &r)) {
            is_done[i] = true, n_busy--;
            continue;
        }
        bool good = r.from < r.to && r.to <= n && r.from % unit == 0 && (r.to % unit == 0 || r.to == n);
        n_wrong += !good || (threads > 1 && r.to - r.from > most);
        for (size_t k = r.from; good && k < r.to; k++) n_wrong += taken[k]++ > 0;
    }
    for (size_t k = 0; k < n; k++) n_wrong += !taken[k];
    check(n_wrong == 0, "%zu units in chunks of %zu, %d threads: %d mistakes", n, unit, threads, n_wrong);
    free(taken);
}

// A job of many steps: each adds up what the step before has put there, so that no chunk may be missing, or early.
enum { N_CHAIN = 237, N_CHAIN_STEPS = 60 };
typedef struct { unsigned value[2][N_CHAIN]; int n_mistakes; } Chain;

static void chain_team(void *job, Team *team) {
    Chain *c = job;
    for (int step = 0; step < N_CHAIN_STEPS; step++) {
        const unsigned *from = c->value[step % 2];
        unsigned *to = c->value[1 - step % 2];
        size_t unit = 1 + (size_t)step % 5, n = N_CHAIN - (size_t)step;
        for (Range r; take_chunk(team, n, unit, &r);) {
            for (volatile int i = 0; team->thread == 1 && i < 2000; i++) {}  // it is slow
            for (size_t k = r.from; k < r.to; k++) to[k] = from[k] + from[k + 1] + 1;
        }
        end_step(team, EMBED, 0);
    }
}

static void test_chunks(void) {
    static const size_t sizes[] = { 0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 64, 65, 100, 257, 1000, 4096, 12345 };
    static const int teams[] = { 1, 2, 3, 4, 5, 8, 13, 40, 64 };
    Gate *gate = get(sizeof *gate + 64);
    Gate *aligned = (Gate *)(void *)round_up((size_t)(uintptr_t)gate, 64);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        for (size_t k = 0; k < sizeof teams / sizeof *teams; k++)
            for (size_t unit = 1; unit <= 16; unit *= 2) check_chunks(sizes[i], unit, teams[k], aligned);
    free(gate);
    for (int threads = 1; threads <= 4; threads++) {
        Chain c = { .n_mistakes = 0 };
        unsigned wanted[N_CHAIN];
        for (int i = 0; i < N_CHAIN; i++) c.value[0][i] = wanted[i] = (unsigned)random_bits();
        for (int step = 0; step < N_CHAIN_STEPS; step++)
            for (int k = 0; k < N_CHAIN - step - 1; k++) wanted[k] += wanted[k + 1] + 1;
        run_team(threads, 0, chain_team, &c);
        size_t n = (N_CHAIN - N_CHAIN_STEPS) * sizeof *wanted;
        check(!memcmp(c.value[N_CHAIN_STEPS % 2], wanted, n), "steps of %d threads: other sums", threads);
    }
}

// ---- Threads that rest ----

// A pass of a second's work on some cores, one of which another program may use: a thread there makes the others wait.
static void simulate_pass(Rest *r, int rows, bool is_busy, int n_threads[]) {
    int now = r->threads - r->n_resting;
    bool waits = is_busy && now == r->threads;
    n_threads[now]++;
    judge_pass(r, rows, rows * (waits ? 3.0 : 1.0) / now, waits ? 2.0 * rows / now : 0);
}

static void test_resting(void) {
    for (int threads = 1; threads <= 8; threads *= 2) {
        Rest r = { .threads = threads };
        int n[9] = { 0 };
        for (int i = 0; i < 500; i++) simulate_pass(&r, i % 7 ? 1 : 128, false, n);
        check(n[threads] == 500, "%d threads, all cores idle: %d of 500 passes by all", threads, n[threads]);
        memset(n, 0, sizeof n);
        for (int i = 0; i < 2000; i++) simulate_pass(&r, 1, true, n);
        if (threads > 1)
            check(n[threads - 1] >= 1900 && n[threads] + n[threads - 1] == 2000,
                  "%d threads, a core busy: %d of 2000 passes by one thread less", threads, n[threads - 1]);
        else check(n[1] == 2000, "a single thread rests");
        for (int i = 0; i < 300; i++) simulate_pass(&r, 1, false, n);
        memset(n, 0, sizeof n);
        for (int i = 0; i < 300; i++) simulate_pass(&r, 1, false, n);
        check(n[threads] == 300, "%d threads, the other program has ended: %d of 300 passes by all", threads,
              n[threads]);
    }
    // By hand: rows of a pass, its seconds, those slept, how many threads of 3 then rest, and how many such passes.
    static const struct { int rows; double seconds, slept; int n_resting, times; } passes[] = {
        { 1, 1.0, 0.0, 0, 1 }, { 1, 1.0, 0.12, 0, 1 },    // others were waited for, but not for an eighth
        { 1, 1.0, 0.13, 0, 1 }, { 1, 1.0, 0.12, 0, 1 },   // one slow pass is a hiccup
        { 1, 1.0, 0.13, 0, 1 }, { 2, 1.9, 0.5, 0, 1 },    // two slow passes that cannot be compared
        { 2, 1.8, 0.5, 1, 1 }, { 2, 1.85, 0.0, 0, 1 },    // a trial that is faster than the slower one only,
        { 1, 1.0, 0.5, 0, 8 },                            // so that no other follows for 8 passes
        { 1, 1.1, 0.5, 1, 1 }, { 2, 0.9, 0.0, 0, 1 },     // one that cannot be compared: 24
        { 1, 1.0, 0.5, 0, 24 },
        { 1, 1.0, 0.5, 1, 1 }, { 1, 0.9, 0.5, 1, 1 },     // faster: one thread rests for 56
        { 1, 0.9, 0.5, 1, 56 },
        { 1, 0.9, 0.5, 2, 1 }, { 1, 0.95, 0.0, 1, 1 },    // a second one tries to, in vain
        { 1, 0.9, 0.0, 1, 120 }, { 1, 0.9, 0.0, 0, 1 },   // and the first is tried again
    };
    Rest r = { .threads = 3 };
    for (size_t i = 0; i < sizeof passes / sizeof *passes; i++) {
        for (int k = 0; k < passes[i].times; k++) {
            judge_pass(&r, passes[i].rows, passes[i].seconds, passes[i].slept);
            check(r.n_resting == passes[i].n_resting, "row %zu, pass %d: %d threads rest, wanted %d", i, k, r.n_resting,
                  passes[i].n_resting);
        }
    }
    // Each time that a rest has turned out well it lasts longer, but not for ever.
    r = (Rest){ .threads = 2 };
    for (int i = 0, length = 0, before = 0; i < 20; i++, before = length, length = 0) {
        judge_pass(&r, 1, 1.0, 0.5);
        judge_pass(&r, 1, 1.0, 0.5);
        do judge_pass(&r, 1, 0.9, 0), length++; while (r.n_resting && length < 1000);
        check(length < 300 && (length > before || length > 200), "rest %d lasts %d passes, the one before %d", i,
              length, before);
    }
}

// ---- Processors ----

#ifdef __linux__
// Files below a temporary folder stand for the system's.
static void place_file(const char *path, const char *text) {
    char whole[300];
    snprintf(whole, sizeof whole, "%s%s", system_root, path);
    for (char *p = whole + 1; (p = strchr(p, '/')); p++) *p = 0, mkdir(whole, 0700), *p = '/';
    check(write_bytes(whole, (Bytes){ (unsigned char *)(uintptr_t)text, strlen(text) }), "%s cannot be written", whole);
}

// Removes them, and expects others.
static void begin_system(void) {
    char command[200];
    snprintf(command, sizeof command, "rm -rf %s", system_root);
    check(system(command) == 0, "%s: got a status that is not 0", command);
    for (int i = 0; i < MOST_ALLOWED; i++) allowed_cpus[i] = -1;
}

static void allow(int from, int to) {
    int n = 0;
    while (allowed_cpus[n] >= 0) n++;
    for (int cpu = from; cpu <= to; cpu++) allowed_cpus[n++] = cpu;
}

static void put_cpu(int cpu, const char *siblings, const char *capacity) {
    char path[120];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    if (siblings) place_file(path, siblings);
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/cpu_capacity", cpu);
    if (capacity) place_file(path, capacity);
}

static void check_cores(const char *what, int by_default, int all) {
    int got = count_cores(true);
    check(got == by_default, "%s: got %d threads by default, wanted %d", what, got, by_default);
    got = count_cores(false);
    check(got == all, "%s: got %d threads at most, wanted %d", what, got, all);
}

static void test_lists(void) {
    static const struct { const char *list; int cpu; bool wanted; } cases[] = {
        { "0-3,8\n", 0, true }, { "0-3,8\n", 3, true }, { "0-3,8\n", 4, false }, { "0-3,8\n", 7, false },
        { "0-3,8\n", 8, true }, { "0-3,8\n", 9, false }, { "5\n", 5, true }, { "5\n", 4, false }, { "5\n", 6, false },
        { "0,2,4-6", 2, true }, { "0,2,4-6", 3, false }, { "0,2,4-6", 6, true }, { "\n", 0, false }, { "", 0, false },
        { "1-", 1, true }, { "1-x", 2, false }, { "16-31\n", 1, false }, { "16-31\n", 20, true },
    };
    const char *path = temporary("list");
    check(is_listed(path, 7), "a list that is not there has no 7");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *list = cases[i].list;
        write_bytes(path, (Bytes){ (unsigned char *)(uintptr_t)list, strlen(list) });
        check(is_listed(path, cases[i].cpu) == cases[i].wanted, "\"%.10s\" and %d: got %d", list, cases[i].cpu,
              !cases[i].wanted);
    }
    unlink(path);
}

static void test_quotas(void) {
    static const struct { const char *groups, *files[3][2]; double wanted; } cases[] = {
        { "0::/\n", { { "cpu.max", "max 100000\n" } }, INFINITY },
        { "0::/\n", { { "cpu.max", "350000 100000\n" } }, 3.5 },
        { "0::/\n", { { "cpu.max", "20000 100000\n" } }, 0.2 },
        { "0::/a/b\n", { { "a/b/cpu.max", "max 100000\n" }, { "a/cpu.max", "200000 50000\n" } }, 4 },
        { "0::/a/b\n", { { "a/b/cpu.max", "500000 100000\n" }, { "a/cpu.max", "700000 100000\n" } }, 5 },
        { "0::/a/b\n", { { "a/b/cpu.max", "700000 100000\n" }, { "a/cpu.max", "500000 100000\n" } }, 5 },
        { "0::/a/b\n", { { "a/c/cpu.max", "100000 100000\n" } }, INFINITY },
        { "0::/a\n", { { "a/cpu.max", "9000000000 100000\n" } }, 90000 },
        { "12:pids:/a\n4:cpu,cpuacct:/a\n0::/b\n",
          { { "cpu/a/cpu.cfs_quota_us", "250000\n" }, { "cpu/a/cpu.cfs_period_us", "100000\n" } }, 2.5 },
        { "4:cpuacct,cpu:/a\n",
          { { "cpu/a/cpu.cfs_quota_us", "250000\n" }, { "cpu/a/cpu.cfs_period_us", "50000\n" } }, 5 },
        { "4:cpu:/a\n", { { "cpu/a/cpu.cfs_quota_us", "-1\n" }, { "cpu/a/cpu.cfs_period_us", "100000\n" } },
          INFINITY },
        { "4:cpu:/a\n", { { "cpu/a/cpu.cfs_quota_us", "250000\n" } }, INFINITY },
        { "4:cpu:/a/b/c\n",
          { { "cpu/cpu.cfs_quota_us", "600000\n" }, { "cpu/cpu.cfs_period_us", "100000\n" } }, 6 },
        { "4:cpuset:/a\n",
          { { "cpu/a/cpu.cfs_quota_us", "250000\n" }, { "cpu/a/cpu.cfs_period_us", "100000\n" } }, INFINITY },
        { "4:cpu,memory:/a\n0::/b\n", { { "cpu/a/cpu.cfs_quota_us", "400000\n" },
          { "cpu/a/cpu.cfs_period_us", "100000\n" }, { "b/cpu.max", "300000 100000\n" } }, 3 },
        { "nonsense\n:\n0::\n", { { "cpu.max", "200000 100000\n" } }, 2 },
        { "0::/a\n", { { "a/cpu.max", "0 100000\n" } }, INFINITY },
        { "0::/a\n", { { "a/cpu.max", "100000 0\n" } }, INFINITY },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        begin_system();
        place_file("/proc/self/cgroup", cases[i].groups);
        for (int k = 0; k < 3 && cases[i].files[k][0]; k++) {
            char path[100];
            snprintf(path, sizeof path, "/sys/fs/cgroup/%s", cases[i].files[k][0]);
            place_file(path, cases[i].files[k][1]);
        }
        double got = group_limit(false);
        check(got == cases[i].wanted, "case %zu, %.30s: got %g processors, wanted %g", i, cases[i].groups, got,
              cases[i].wanted);
    }
    begin_system();
    check(group_limit(false) == INFINITY, "no control groups: got %g processors", group_limit(false));
}

static void test_memory(void) {
    static const struct { const char *what, *groups, *files[2][2]; double wanted; } cases[] = {
        { "no group", NULL, { { NULL } }, 3000 * 1024.0 },
        { "version 2", "0::/a/b\n", { { "a/b/memory.max", "max\n" }, { "a/memory.max", "500000\n" } }, 500000 },
        { "a greater limit", "0::/a\n", { { "a/memory.max", "5000000\n" } }, 3000 * 1024.0 },
        { "version 1", "4:memory:/a\n", { { "memory/a/memory.limit_in_bytes", "700000\n" } }, 700000 },
        { "a limit of processors", "0::/\n", { { "cpu.max", "200000 100000\n" } }, 3000 * 1024.0 },
    };
    begin_system();
    check(free_memory() == 0, "no /proc/meminfo: got %g bytes", free_memory());
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        begin_system();
        place_file("/proc/meminfo", "MemTotal:  9000 kB\nMemFree:  1000 kB\nMemAvailable:  3000 kB\nBuffers:  1 kB\n");
        if (cases[i].groups) place_file("/proc/self/cgroup", cases[i].groups);
        for (int k = 0; k < 2 && cases[i].files[k][0]; k++) {
            char path[100];
            snprintf(path, sizeof path, "/sys/fs/cgroup/%s", cases[i].files[k][0]);
            place_file(path, cases[i].files[k][1]);
        }
        check(free_memory() == cases[i].wanted, "%s: got %g free bytes, wanted %g", cases[i].what, free_memory(),
              cases[i].wanted);
    }
}

static void test_processors(void) {
    char root[100];
    snprintf(root, sizeof root, "%s/system", folder);
    system_root = root;
    test_lists();
    test_quotas();
    test_memory();
    begin_system();
    allow(0, 3);
    check_cores("four processors, of which nothing is known", 4, 4);
    for (int cpu = 0; cpu < 4; cpu++) put_cpu(cpu, cpu < 2 ? "0-1\n" : "2-3\n", NULL);
    check_cores("two cores of two threads each", 2, 4);
    begin_system();
    allow(1, 3);
    for (int cpu = 0; cpu < 4; cpu++) put_cpu(cpu, cpu < 2 ? "0-1\n" : "2-3\n", NULL);
    check_cores("three of their four threads", 2, 3);
    begin_system();
    allow(0, 7);
    for (int cpu = 0; cpu < 8; cpu++) put_cpu(cpu, NULL, cpu < 4 ? "446\n" : cpu < 7 ? "871\n" : "1024\n");
    check_cores("four small, three large and one larger core", 4, 8);
    place_file("/proc/self/cgroup", "0::/\n");
    place_file("/sys/fs/cgroup/cpu.max", "250000 100000\n");
    check_cores("the same with a quota", 2, 8);
    place_file("/sys/fs/cgroup/cpu.max", "20000 100000\n");
    check_cores("the same with a fifth of a core", 1, 8);
    begin_system();
    allow(0, 9);
    place_file("/sys/devices/cpu_core/cpus", "0-3\n");
    for (int cpu = 0; cpu < 4; cpu++) put_cpu(cpu, cpu < 2 ? "0-1\n" : "2-3\n", NULL);
    check_cores("two cores of two threads, and six small ones", 2, 10);
    begin_system();
    allow(4, 9);
    place_file("/sys/devices/cpu_core/cpus", "0-3\n");
    check_cores("small cores alone", 6, 6);
    begin_system();
    allow(0, 1499);
    allow(60000, 60001);
    check_cores("more processors than a cpu_set_t has", 1502, 1502);
    begin_system();
    allow(0, 4999);
    check_cores("more processors than threads", MAX_THREADS, MAX_THREADS);
    begin_system();
    system_root = "";
}
#else
static void test_processors(void) {}
#endif
