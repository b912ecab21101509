// Calls of run.c that can fail, counted and made to fail. Included before ../run.c, whose own calls they become, and
// again after it, which gives the names back.
//
// A failure is as real as can be: where a stream has to fail, what is under it is exchanged for /dev/full or for a
// directory, so that its error flag is set by the C library itself.

#ifndef FAULTS
#define FAULTS

enum { MEMORY = 1, INPUT = 2, OUTPUT = 4, ALL_CALLS = 7 };  // kinds of calls

static struct {
    int kinds;           // those that count
    size_t n;            // how many there were
    size_t failing;      // the number of the first that fails; 0 = none
    bool for_good;       // and all after it
    int signal;          // the call does not fail, but this signal comes before it
    const char *failed;  // the name of the first that did
    int live;            // blocks, maps and streams that there are
} faults = { MEMORY, 0, 0, false, 0, "", 0 };

static bool fault(int kind, const char *name) {
    if (!(kind & faults.kinds)) return false;
    bool now = ++faults.n == faults.failing;
    if (now) faults.failed = name;
    if (now && faults.signal) raise(faults.signal);
    return !faults.signal && faults.failing && (faults.for_good ? faults.n >= faults.failing : now);
}

static bool fails_with(int error, int kind, const char *name) {
    if (!fault(kind, name)) return false;
    errno = error;
    return true;
}

// Puts another file under a stream, or back what was there.
static int exchange(FILE *f, const char *path, int flags) {
    int kept = dup(fileno(f)), other = open(path, flags);
    if (other >= 0) dup2(other, fileno(f)), close(other);
    return kept;
}

static void put_back(FILE *f, int kept) {
    int error = errno;
    dup2(kept, fileno(f));
    close(kept);
    errno = error;
}

static void *alive(void *p) {
    faults.live += p != NULL;
    return p;
}

static void *fault_calloc(size_t n, size_t size) {
    return fails_with(ENOMEM, MEMORY, "calloc") ? NULL : alive(calloc(n, size));
}

static void *fault_realloc(void *p, size_t n) {
    if (fails_with(ENOMEM, MEMORY, "realloc")) return NULL;
    return p ? realloc(p, n) : alive(realloc(p, n));
}

static void fault_free(void *p) {
    faults.live -= p != NULL;
    free(p);
}

static void *fault_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset) {
    void *p = fails_with(ENOMEM, MEMORY, "mmap") ? MAP_FAILED : mmap(at, n, protection, flags, file, offset);
    faults.live += p != MAP_FAILED;
    return p;
}

static int fault_munmap(void *p, size_t n) {
    faults.live--;
    return munmap(p, n);
}

static char *fault_strdup(const char *s) { return fails_with(ENOMEM, MEMORY, "strdup") ? NULL : alive(strdup(s)); }

static char *fault_realpath(const char *path, char *to) {
    if (fails_with(ENOMEM, MEMORY, "realpath")) return NULL;
    return to ? realpath(path, to) : alive(realpath(path, NULL));
}

static int fault_open(const char *path, int flags, ...) {
    int error = flags & O_CREAT ? ENOSPC : EMFILE;
    if (fails_with(error, flags & O_CREAT ? OUTPUT : INPUT, "open")) return -1;
    return open(path, flags, 0666);
}

static int fault_fstat(int file, struct stat *info) {
    return fails_with(EIO, INPUT, "fstat") ? -1 : fstat(file, info);
}

static int fault_stat(const char *path, struct stat *info) {
    return fails_with(EIO, INPUT, "stat") ? -1 : stat(path, info);
}

static int fault_access(const char *path, int mode) {
    return fails_with(EIO, INPUT, "access") ? -1 : access(path, mode);
}

static const char *system_root = "";  // the folder that stands for / in paths below /proc and /sys

static FILE *fault_fopen(const char *path, const char *mode) {
    char moved[1000];
    if (!strncmp(path, "/proc/", 6) || !strncmp(path, "/sys/", 5)) {
        snprintf(moved, sizeof moved, "%s%s", system_root, path);
        path = moved;
    }
    if (fails_with(ENOMEM, MEMORY, "fopen") || fails_with(EMFILE, *mode == 'r' ? INPUT : OUTPUT, "fopen")) return NULL;
    return alive(fopen(path, mode));
}

static FILE *fault_fdopen(int file, const char *mode) {
    return fails_with(ENOMEM, MEMORY, "fdopen") ? NULL : alive(fdopen(file, mode));
}

static size_t fault_fread(void *to, size_t size, size_t n, FILE *f) {
    if (!fault(INPUT, "fread")) return fread(to, size, n, f);
    int kept = exchange(f, "/", O_RDONLY);
    n = fread(to, size, n, f);
    put_back(f, kept);
    return n;
}

static ssize_t fault_getline(char **line, size_t *n, FILE *f) {
    if (fails_with(ENOMEM, MEMORY, "getline")) return -1;
    faults.live += !*line;
    if (!fault(INPUT, "getline")) return getline(line, n, f);
    int kept = exchange(f, "/", O_RDONLY);
    ssize_t length = getline(line, n, f);
    put_back(f, kept);
    return length;
}

static size_t fault_fwrite(const void *from, size_t size, size_t n, FILE *f) {
    if (!fault(OUTPUT, "fwrite")) return fwrite(from, size, n, f);
    int kept = exchange(f, "/dev/full", O_WRONLY);
    size_t done = fwrite(from, size, n, f);
    if (fflush(f)) done = 0;
    put_back(f, kept);
    return done;
}

static int fault_fflush(FILE *f) {
    if (!fault(OUTPUT, "fflush")) return fflush(f);
    int kept = exchange(f, "/dev/full", O_WRONLY);
    int result = fflush(f);
    put_back(f, kept);
    return result;
}

static int fault_fclose(FILE *f) {
    bool fails = fault(OUTPUT, f == stdout ? "fclose(stdout)" : "fclose");
    faults.live -= f != stdout;  // which nobody opened here
    int result = fclose(f);
    if (fails) errno = EIO;
    return fails ? EOF : result;
}

static int fault_fsync(int file) { return fails_with(EIO, OUTPUT, "fsync") ? -1 : fsync(file); }

static int fault_fchmod(int file, mode_t mode) {
    return fails_with(EPERM, OUTPUT, "fchmod") ? -1 : fchmod(file, mode);
}

static int fault_rename(const char *from, const char *to) {
    return fails_with(EXDEV, OUTPUT, "rename") ? -1 : rename(from, to);
}

#ifdef __linux__
enum { MOST_ALLOWED = 6000 };
static int allowed_cpus[MOST_ALLOWED];  // in place of the process's own, where there is a system_root; then -1, ...

static int fault_sched_getaffinity(pid_t process, size_t n, cpu_set_t *set) {
    if (!*system_root) return sched_getaffinity(process, n, set);
    memset(set, 0, n);
    for (int i = 0; i < MOST_ALLOWED && allowed_cpus[i] >= 0; i++) CPU_SET_S(allowed_cpus[i], n, set);
    return 0;
}
#define sched_getaffinity fault_sched_getaffinity
#endif

static size_t n_isatty;  // how often it was asked

static int fault_isatty(int file) { return n_isatty++, isatty(file); }

#define calloc fault_calloc
#define realloc fault_realloc
#define free fault_free
#define mmap fault_mmap
#define munmap fault_munmap
#define strdup fault_strdup
#define realpath fault_realpath
#define open fault_open
#define fstat fault_fstat
#define stat(path, info) fault_stat(path, info)
#define access fault_access
#define fopen fault_fopen
#define fdopen fault_fdopen
#define fread fault_fread
#define getline fault_getline
#define fwrite fault_fwrite
#define fflush fault_fflush
#define fclose fault_fclose
#define fsync fault_fsync
#define fchmod fault_fchmod
#define rename fault_rename
#define isatty fault_isatty
#else
#undef calloc
#undef realloc
#undef free
#undef mmap
#undef munmap
#undef strdup
#undef realpath
#undef open
#undef fstat
#undef stat
#undef access
#undef fopen
#undef fdopen
#undef fread
#undef getline
#undef fwrite
#undef fflush
#undef fclose
#undef fsync
#undef fchmod
#undef rename
#undef isatty
#undef sched_getaffinity
#endif
