/* faults.c - a machine that fails: in each job of the program the n-th allocation, file, thread, or
 * read or write of a stream is refused, for every n, once and for good; disks are full after n
 * bytes, inputs end in an error.
 *
 * Whatever fails, the program either does its job, to the byte, or says one sentence, exits with 1,
 * leaves what it wrote to standard output a beginning of what is right and no half file, and has
 * given back all memory. (A write that is refused once, with success afterwards, may leave a hole
 * in standard output: stdio has forgotten those bytes, and exit code 1 says so.) The linker puts
 * the functions here before those of the C library (--wrap), so that it is the own objects of the
 * program that are tested.
 */
#define _GNU_SOURCE 1
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../gemma3.h"
#include "tap.h"
#include "tiny.h"

/* A process takes 3 ms to begin and end, and 20 under a sanitizer. */
#if defined(__SANITIZE_ADDRESS__)
enum { IS_SLOW = 1 };
#else
enum { IS_SLOW = 0 };
#endif

/* ---- Faults ---------------------------------------------------------------------------------- */

enum { MEMORY, FILES, THREADS, SYSTEM, READS, WRITES, KINDS };
static const char *const kind_names[KINDS] = {"allocation", "file", "thread", "call of the system",
                                              "read of a stream", "write of a stream"};

static _Atomic int watching, calls[KINDS], live_blocks, live_maps;
static int kind_to_fail = -1, first_to_fail, fails_for_good;

/* 1 when this call is one of those that fail. */
static int fails(int kind, int error)
{
    if (!watching) return 0;
    int n = atomic_fetch_add(&calls[kind], 1);
    if (kind != kind_to_fail || (fails_for_good ? n < first_to_fail : n != first_to_fail)) return 0;
    errno = error;
    return 1;
}

/* Blocks that are not given back, by address: what the program did not allocate is none of its. */
enum { MAX_BLOCKS = 4096 };
static void *block[MAX_BLOCKS];
static pthread_mutex_t block_lock = PTHREAD_MUTEX_INITIALIZER;

static void exchange(void *from, void *to)
{
    if (!watching || (!from && !to)) return;
    pthread_mutex_lock(&block_lock);
    for (int i = 0; i < MAX_BLOCKS; i++)
        if (block[i] == from) {
            block[i] = to;
            live_blocks += (to != NULL) - (from != NULL);
            break;
        }
    pthread_mutex_unlock(&block_lock);
}

#define REAL(result, name, ...) \
    result __real_##name(__VA_ARGS__); \
    result __wrap_##name(__VA_ARGS__)

REAL(void *, malloc, size_t n)
{
    void *p = fails(MEMORY, ENOMEM) ? NULL : __real_malloc(n);
    exchange(NULL, p);
    return p;
}

REAL(void *, calloc, size_t n, size_t size)
{
    void *p = fails(MEMORY, ENOMEM) ? NULL : __real_calloc(n, size);
    exchange(NULL, p);
    return p;
}

REAL(void *, realloc, void *old, size_t n)
{
    if (fails(MEMORY, ENOMEM)) return NULL;
    void *p = __real_realloc(old, n);
    if (p) exchange(old, p);
    return p;
}

REAL(char *, strdup, const char *s)
{
    char *p = fails(MEMORY, ENOMEM) ? NULL : __real_strdup(s);
    exchange(NULL, p);
    return p;
}

REAL(char *, realpath, const char *path, char *out)
{
    char *p = fails(MEMORY, ENOMEM) ? NULL : __real_realpath(path, out);
    if (!out) exchange(NULL, p);
    return p;
}

REAL(void, free, void *p)
{
    exchange(p, NULL);
    __real_free(p);
}

/* What stdio asks of the system, call by call: a stream over a stream, of few bytes at once, so
 * that there are many calls. (Only glibc lets standard streams be others.) */
enum { AT_ONCE = IS_SLOW ? 512 : 64 };
FILE *__real_fopen(const char *path, const char *mode);
int __real_fclose(FILE *f);

#if defined(__GLIBC__)
static ssize_t read_stream(void *f, char *p, size_t n)
{
    if (fails(READS, EIO)) return -1;
    size_t got = fread(p, 1, n, f);
    return ferror((FILE *)f) ? -1 : (ssize_t)got;
}

static ssize_t write_stream(void *f, const char *p, size_t n)
{
    return fails(WRITES, ENOSPC) ? 0 : (ssize_t)fwrite(p, 1, n, f);
}

static int seek_stream(void *f, off64_t *at, int whence)
{
    if (fseeko(f, *at, whence)) return -1;
    *at = ftello(f);
    return 0;
}

static int close_stream(void *f) { return __real_fclose(f); }

static FILE *failing(FILE *f, const char *mode)
{
    static char buffer[16][AT_ONCE]; /* no more are open at once */
    static int n;
    const cookie_io_functions_t io = {read_stream, write_stream, seek_stream, close_stream};
    if (!f) return NULL;
    setvbuf(f, NULL, _IONBF, 0);
    FILE *over = fopencookie(f, mode, io);
    if (over) setvbuf(over, buffer[n++ % 16], _IOFBF, AT_ONCE);
    return over;
}

static void make_standard_streams_fail(void)
{
    stdin = failing(stdin, "r");
    stdout = failing(stdout, "w");
}
#else
static FILE *failing(FILE *f, const char *mode) { return (void)mode, f; }
static void make_standard_streams_fail(void) {}
#endif

/* Of the many files about the machine, which may all be missing, a few stand for all. */
static int counts(const char *path)
{
    static int n;
    return strncmp(path, "/sys/", 5) || n++ < 4;
}

/* With large files some names are others. */
#define OPEN_FILE(name) \
    REAL(FILE *, name, const char *path, const char *mode) \
    { \
        if (!watching || !counts(path)) return __real_##name(path, mode); \
        return fails(FILES, EMFILE) ? NULL : failing(__real_##name(path, mode), mode); \
    }
OPEN_FILE(fopen)
OPEN_FILE(fopen64)

int __wrap_fclose(FILE *f);
int __wrap_fclose(FILE *f)
{
    int failed = fails(FILES, EIO);
    return __real_fclose(f) || failed ? EOF : 0;
}

REAL(int, fflush, FILE *f)
{
    int failed = f != stderr && fails(FILES, EIO);
    return __real_fflush(f) || failed ? EOF : 0;
}

#define OPEN(name) \
    int __real_##name(const char *path, int flags, ...); \
    int __wrap_##name(const char *path, int flags, ...); \
    int __wrap_##name(const char *path, int flags, ...) \
    { \
        va_list args; \
        va_start(args, flags); \
        int mode = flags & O_CREAT ? va_arg(args, int) : 0; \
        va_end(args); \
        return fails(FILES, EMFILE) ? -1 : __real_##name(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

REAL(int, rename, const char *from, const char *to)
{
    return fails(FILES, EACCES) ? -1 : __real_rename(from, to);
}

#define FSTAT(name) \
    REAL(int, name, int fd, struct stat *st) \
    { \
        return fails(SYSTEM, EIO) ? -1 : __real_##name(fd, st); \
    }
FSTAT(fstat)
FSTAT(fstat64)

#define MMAP(name) \
    REAL(void *, name, void *at, size_t n, int protection, int flags, int fd, off_t offset) \
    { \
        if (fails(SYSTEM, ENOMEM)) return MAP_FAILED; \
        void *p = __real_##name(at, n, protection, flags, fd, offset); \
        live_maps += watching && p != MAP_FAILED; \
        return p; \
    }
MMAP(mmap)
MMAP(mmap64)

REAL(int, munmap, void *p, size_t n)
{
    live_maps -= watching;
    return __real_munmap(p, n);
}

REAL(int, madvise, void *p, size_t n, int advice)
{
    return fails(SYSTEM, EINVAL) ? -1 : __real_madvise(p, n, advice);
}

REAL(int, sched_getaffinity, pid_t pid, size_t n, void *set)
{
    return fails(SYSTEM, EPERM) ? -1 : __real_sched_getaffinity(pid, n, set);
}

REAL(int, pthread_create, pthread_t *t, const pthread_attr_t *a, void *(*run)(void *), void *arg)
{
    return fails(THREADS, EAGAIN) ? EAGAIN : __real_pthread_create(t, a, run, arg);
}

/* ---- Running the program --------------------------------------------------------------------- */

typedef struct outcome {
    int status, blocks, maps, descriptors; /* not given back */
    int calls[KINDS];
    char *out, *err, *file;  /* what stands in standard output, standard error, --logits' file */
    size_t n_out, n_file;
    int has_file;
} outcome;

static char folder[] = "/tmp/gemma3-faults-XXXXXX";
static char model[64], text[64], ids[64], logits[64], out_path[64], err_path[64], in_path[64];
static char state[64];

int __real_main(int argc, char **argv);

/* The library as a program: logits of a text, as bits. It may not want to know what is wrong. */
static int library_main(const char *path, int is_quiet)
{
    gemma3_error said = { "something failed" }, *err = is_quiet ? NULL : &said;
    gemma3_pool *pool = NULL;
    gemma3_state *s = NULL;
    int32_t token[16];
    float row[TINY_CHAT_VOCAB];
    int n = -1, last = 0;
    gemma3_model *m = gemma3_open(path, NULL, err);
    if (m && (pool = gemma3_pool_new(3, err)) != NULL) {
        gemma3_params p = gemma3_default_params(m);
        p.n_ctx = 16, p.n_threads = 3, p.parallel_for = gemma3_pool_run, p.pool = pool;
        s = gemma3_state_new(m, &p, err);
    }
    if (s) n = gemma3_encode_turn(gemma3_model_tokenizer(m), NULL, "ab", 1, token, 16);
    if (n == -2) snprintf(said.text, sizeof said.text, "out of memory for a turn");
    if (n > 0 && gemma3_forward(s, token, n, &last, 1, row)) n = -1;
    for (int i = 0; n > 0 && i < TINY_CHAT_VOCAB; i++) printf("%a\n", (double)row[i]);
    if (n >= 0 && (fflush(stdout) || ferror(stdout))) {
        snprintf(said.text, sizeof said.text, "standard output");
        n = -1;
    }
    if (n < 0) fprintf(stderr, "gemma3: %s\n", said.text);
    gemma3_state_free(s);
    gemma3_pool_free(pool);
    gemma3_close(m);
    return n < 0;
}

/* Of a whole file, "" when there is none. */
static char *contents(const char *path, size_t *n)
{
    char *p = calloc(1, 1 << 17);
    FILE *f = fopen(path, "rb");
    *n = f ? fread(p, 1, (1 << 17) - 1, f) : 0;
    if (f) fclose(f);
    return p;
}

/* In the child: main, between two counts, which go back through the pipe. Who leaves by exit leaves
 * giving back to the system; what nobody could find any more is the leak checker's to see. */
static int report_to, first_free, has_left;

static void report(int by_exit)
{
    int count[KINDS + 3], now = dup(0);
    watching = 0;
    close(now);
    for (int i = 0; i < KINDS; i++) count[i] = calls[i];
    count[KINDS] = by_exit ? 0 : live_blocks;
    count[KINDS + 1] = by_exit ? 0 : live_maps;
    count[KINDS + 2] = by_exit ? 0 : now - first_free;
    has_left = 1;
    if (write(report_to, count, sizeof count) != (ssize_t)sizeof count) _exit(99);
}

void __real_exit(int code) __attribute__((noreturn));
void __wrap_exit(int code) __attribute__((noreturn));
void __wrap_exit(int code)
{
    if (watching && !has_left) report(1);
    __real_exit(code);
}

static void be_the_program(char **args, int to)
{
    int argc = 0;
    while (args[argc]) argc++;
    report_to = to;
    first_free = dup(0);
    close(first_free);
    make_standard_streams_fail();
    watching = 1;
    int is_library = !strcmp(args[0], "library");
    int code = is_library ? library_main(args[1], argc > 2) : __real_main(argc, args);
    report(0);
    __real_exit(code);
}

static int open_at(const char *path, int flags, int fd)
{
    int got = open(path, flags, 0600);
    return got < 0 || dup2(got, fd) < 0 || close(got) ? -1 : 0;
}

/* Standard input is in_path, or a pipe that holds n_piped bytes of it and then an error. */
static int open_input(long n_piped)
{
    size_t n;
    int end[2];
    if (n_piped < 0) return open_at(in_path, O_RDONLY, 0);
    char *bytes = contents(in_path, &n);
    if (pipe(end) || write(end[1], bytes, (size_t)n_piped) != n_piped) return -1;
    free(bytes);
    fcntl(end[0], F_SETFL, O_NONBLOCK); /* whose writer neither writes nor goes away */
    return dup2(end[0], 0);
}

static outcome run_with(char **args, rlim_t most_bytes, long n_piped)
{
    outcome o = { .status = -1 };
    int from[2], count[KINDS + 3] = { 0 };
    unlink(logits);
    fflush(stdout);
    if (pipe(from)) exit(1);
    pid_t child = fork();
    if (child == 0) {
        struct rlimit limit = { most_bytes, most_bytes };
        close(from[0]);
        if (open_input(n_piped) || open_at(out_path, O_CREAT | O_TRUNC | O_WRONLY, 1)) _exit(98);
        if (most_bytes == RLIM_INFINITY && open_at(err_path, O_CREAT | O_TRUNC | O_WRONLY, 2))
            _exit(97);
        if (most_bytes != RLIM_INFINITY && dup2(from[1], 2) < 0) _exit(96); /* no file: no limit */
        setrlimit(RLIMIT_FSIZE, &limit);
        be_the_program(args, from[1]);
    }
    close(from[1]);
    if (most_bytes != RLIM_INFINITY) {
        char said[4096];
        ssize_t n, all = 0;
        while ((n = read(from[0], said + all, sizeof said - 1 - (size_t)all)) > 0) all += n;
        all -= (ssize_t)sizeof count; /* the report comes last */
        if (all >= 0) memcpy(count, said + all, sizeof count);
        o.err = calloc(1, sizeof said);
        if (all > 0) memcpy(o.err, said, (size_t)all);
    } else if (read(from[0], count, sizeof count) != (ssize_t)sizeof count) {
        o.blocks = -1;
    }
    close(from[0]);
    waitpid(child, &o.status, 0);
    size_t n;
    if (!o.err) o.err = contents(err_path, &n);
    o.out = contents(out_path, &o.n_out);
    o.has_file = access(logits, F_OK) == 0;
    o.file = contents(logits, &o.n_file);
    memcpy(o.calls, count, sizeof o.calls);
    o.blocks = count[KINDS], o.maps = count[KINDS + 1], o.descriptors = count[KINDS + 2];
    return o;
}

static outcome run(char **args) { return run_with(args, RLIM_INFINITY, -1); }

static void forget(outcome *o)
{
    free(o->out);
    free(o->err);
    free(o->file);
}

/* NULL, or what is wrong with an outcome when right is what it should be without faults. */
static const char *trouble(const outcome *o, const outcome *right)
{
    static char what[200];
    if (!WIFEXITED(o->status)) {
        snprintf(what, sizeof what, "ends by signal %d", WTERMSIG(o->status));
        return what;
    }
    int code = WEXITSTATUS(o->status), n_lines = 0;
    for (const char *p = o->err; (p = strstr(p, "gemma3: ")) != NULL; p++) n_lines += p == o->err ||
        p[-1] == '\n';
    if (o->blocks || o->maps || o->descriptors) {
        snprintf(what, sizeof what, "%d blocks, %d mappings, %d files are not given back",
                 o->blocks, o->maps,
                 o->descriptors);
        return what;
    }
    if (code == 0 && (o->n_out != right->n_out || memcmp(o->out, right->out, o->n_out)))
        return "another output, exit code 0";
    if (code == 0 && (o->n_file != right->n_file || memcmp(o->file, right->file, o->n_file)))
        return "another file, exit code 0";
    if (code == 0) return NULL;
    snprintf(what, sizeof what, "exit code %d and %d sentences: %.100s", code, n_lines, o->err);
    if (code != 1 || n_lines != 1) return what;
    int has_hole = kind_to_fail == WRITES && !fails_for_good;
    if (o->n_out > right->n_out || (!has_hole && memcmp(o->out, right->out, o->n_out)))
        return "a wrong output before the failure";
    int is_whole = o->n_file == right->n_file && !memcmp(o->file, right->file, o->n_file);
    return o->has_file && !is_whole ? "a half file is left" : NULL;
}

/* ---- The jobs -------------------------------------------------------------------------------- */

typedef struct job {
    const char *name, *in;   /* what standard input holds */
    char *args[24];
} job;

static job jobs[] = {
    {"a continuation", "", {"gemma3", "-m", model, "-p", "ab", "-n", "4", "-c", "16", "-t", "2",
                            "--seed", "7"}},
    {"a text from a file", "", {"gemma3", "-m", model, "-f", text, "-n", "2", "-c", "64", "-t", "1",
                                "--temp", "0"}},
    {"a text from stdin", "ab ab", {"gemma3", "-m", model, "-f", "-", "-n", "2", "-c", "16", "-t",
                                    "1", "--repeat-penalty", "1.5"}},
    {"ids from stdin", "2 5 31\n6", {"gemma3", "-m", model, "--ids", "-", "--hash", "-t", "1"}},
    {"a hash", "", {"gemma3", "-m", model, "--ids", ids, "--hash", "-c", "16", "-t", "3",
                    "--exact"}},
    {"logits", "", {"gemma3", "-m", model, "--ids", ids, "--logits", logits, "-c", "16", "-t",
                    "1"}},
    {"some logits", "", {"gemma3", "-m", model, "--ids", ids, "--logits", logits, "--positions",
                         "0,2", "-t", "1"}},
    {"logits to stdout", "", {"gemma3", "-m", model, "--ids", ids, "--logits", "-", "-t", "1",
                              "--no-repack"}},
    {"a chat", "use\nmodel\n", {"gemma3", "-m", model, "-i", "-n", "3", "-c", "64", "-t", "1",
                                "--system", "ab", "--stop", "ab"}},
    {"ids of a text", "", {"gemma3", "-m", model, "--tokenize", "the user", "--special"}},
    {"text of ids", "", {"gemma3", "-m", model, "--detokenize", "2 5 6 7 31"}},
    {"what a file is", "", {"gemma3", "-m", model, "--info"}},
    {"a state that is kept", "", {"gemma3", "-m", model, "-p", "ab", "-n", "2", "-c", "16", "-t",
                                  "1", "--state", logits}},
    {"a state that was kept", "", {"gemma3", "-m", model, "-p", "ab ab", "-n", "2", "-c", "16",
                                   "-t", "1", "--state", state}},
    {"the library", "", {"library", model}},
    {"the library, asked for no sentences", "", {"library", model, "quiet"}},
    {"the kernels", "", {"gemma3", "--isa", "list"}},
};

static void write_file(const char *path, const void *p, size_t n)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(p, 1, n, f) != n || fclose(f)) exit(1);
}

/* For the job that takes it up. */
static void keep_a_state(void)
{
    char *args[] = {"gemma3", "-m", model, "-p", "ab", "-n", "1", "-c", "16", "--state", state,
                    NULL};
    write_file(in_path, "", 0);
    outcome o = run(args);
    ok(WIFEXITED(o.status) && !WEXITSTATUS(o.status) && !access(state, R_OK), "a state is kept");
    forget(&o);
}

/* Every call of every kind fails once, and from then on. */
static void every_call_fails(job *j)
{
    kind_to_fail = -1;
    write_file(in_path, j->in, strlen(j->in));
    outcome right = run(j->args);
    if (!ok(WIFEXITED(right.status) && WEXITSTATUS(right.status) == 0 && !trouble(&right, &right),
            "%s: done where nothing fails", j->name))
        diag("  %s", trouble(&right, &right) ? trouble(&right, &right) : right.err);
    for (kind_to_fail = 0; kind_to_fail < KINDS; kind_to_fail++) {
        int n_wrong = 0, n_refused = 0, n = right.calls[kind_to_fail];
        for (first_to_fail = 0; first_to_fail < n; first_to_fail++)
            for (fails_for_good = 0; fails_for_good < 2; fails_for_good++) {
                outcome o = run(j->args);
                const char *what = trouble(&o, &right);
                if (what && n_wrong++ < 4)
                    diag("%s %d%s: %s", kind_names[kind_to_fail], first_to_fail,
                         fails_for_good ? " and all later ones" : "", what);
                n_refused += WIFEXITED(o.status) && WEXITSTATUS(o.status) == 1;
                forget(&o);
            }
        if (n > 0)
            is_int(n_wrong, 0, "%s: each %s of %d fails, once and for good: a sentence (%d times) "
                   "or "
                   "the right answer", j->name, kind_names[kind_to_fail], n, n_refused);
    }
    kind_to_fail = -1;
    forget(&right);
}

/* What is named for output is a model; that it is one cannot be read. */
static void no_model_is_overwritten(void)
{
    char *args[] = {"gemma3", "-m", model, "--ids", ids, "--logits", state, "-t", "1", NULL};
    size_t n_model, n;
    char *bytes = contents(model, &n_model);
    int n_wrong = 0, n_calls = 1;
    for (int i = -1; i < n_calls; i++)
        for (fails_for_good = 0; fails_for_good < 2; fails_for_good++) {
            write_file(state, bytes, n_model);
            kind_to_fail = i < 0 ? -1 : READS, first_to_fail = i;
            outcome o = run(args);
            char *left = contents(state, &n);
            n_wrong += WEXITSTATUS(o.status) != 1 || n != n_model || memcmp(left, bytes, n);
            if (i < 0) n_calls = o.calls[READS];
            free(left);
            forget(&o);
        }
    kind_to_fail = -1;
    is_int(n_wrong, 0, "no model is overwritten by logits, also where each of %d reads fails",
           n_calls);
    free(bytes);
}

/* An input that ends in an error after n bytes, for every n. */
static void every_input_fails(job *j)
{
    write_file(in_path, j->in, strlen(j->in));
    outcome right = run(j->args);
    int n_wrong = 0;
    long n = 0;
    for (; n <= (long)strlen(j->in); n++) {
        outcome o = run_with(j->args, RLIM_INFINITY, n);
        const char *what = trouble(&o, &right);
        if (!what && WEXITSTATUS(o.status) != 1) what = "exit code 0";
        if (what && n_wrong++ < 4) diag("an error after %ld bytes: %s", n, what);
        forget(&o);
    }
    is_int(n_wrong, 0, "%s: an input that ends in an error after 0 to %ld bytes", j->name, n - 1);
    forget(&right);
}

/* Of sizes, each that is small and every so many others. */
enum { STEP = IS_SLOW ? 61 : 13 };

/* A disk that takes n bytes of each file, for every n up to what is needed. */
static void every_full_disk(job *j)
{
    write_file(in_path, j->in, strlen(j->in));
    outcome right = run(j->args);
    size_t needed = right.n_out > right.n_file ? right.n_out : right.n_file;
    int n_wrong = 0;
    for (size_t n = 0; n <= needed; n += n < 16 || n + STEP > needed ? 1 : STEP) {
        outcome o = run_with(j->args, n, -1);
        const char *what = trouble(&o, &right);
        if (!what && WEXITSTATUS(o.status) != (n < needed)) what = "another exit code";
        if (what && n_wrong++ < 4) diag("a disk of %zu bytes: %s", n, what);
        forget(&o);
    }
    is_int(n_wrong, 0, "%s on a disk that is full after 0 to %zu bytes", j->name, needed - 1);
    forget(&right);
}


int __wrap_main(int argc, char **argv);
int __wrap_main(int argc, char **argv)
{
    (void)argc, (void)argv;
    if (!mkdtemp(folder)) skip_all("no folder for files");
    char *const path[] = {model, text, ids, logits, out_path, err_path, in_path, state};
    static const char *const name[] = {"m.gguf", "text", "ids", "logits", "out", "err", "in",
                                       "state"};
    for (int i = 0; i < 8; i++) snprintf(path[i], 64, "%s/%s", folder, name[i]);
    tiny t = tiny_chat();
    bytes b = tiny_file(&t);
    write_file(model, b.p, b.n);
    write_file(text, "the user \xc3\xa9 ab", 14);
    write_file(ids, "2 5 31\n6", 8);
    keep_a_state();
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++) every_call_fails(&jobs[i]);
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++)
        if (i == 0 || i == 4 || i == 5 || i == 7) every_full_disk(&jobs[i]);
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++)
        if (*jobs[i].in) every_input_fails(&jobs[i]);
    no_model_is_overwritten();
    for (int i = 0; i < 8; i++) unlink(path[i]);
    rmdir(folder);
    free(b.p);
    tiny_free(&t);
    return done_testing();
}
