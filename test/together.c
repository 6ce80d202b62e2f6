/* together.c - many at once: states on one model, states on one pool, processes on one file; and
 * how the program ends when it is told to. The numbers never depend on any of it. (make threads
 * runs this under ThreadSanitizer.)
 */
#define _XOPEN_SOURCE 700
#include "../gemma3.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tap.h"
#include "tiny.h"

enum { STATES = 6, ROUNDS = 12, V = TINY_CHAT_VOCAB };

static const int32_t ids[7] = { 2, 5, 31, 6, 7, 20, 11 };
static char folder[] = "/tmp/gemma3-together-XXXXXX", path[64];

typedef struct task {
    const gemma3_model *m;
    gemma3_pool *pool;       /* NULL: no threads of its own */
    float logits[V];
    int32_t chosen, n_ids;
    int failed;
} task;

/* A prompt, a token at a time after it, a choice, and a text: all that states do. */
static void *converse(void *arg)
{
    task *t = arg;
    gemma3_params p = gemma3_default_params(t->m);
    p.n_ctx = 16;
    if (t->pool) p.n_threads = 3, p.parallel_for = gemma3_pool_run, p.pool = t->pool;
    gemma3_candidate scratch[V];
    gemma3_state *s = gemma3_state_new(t->m, &p, NULL);
    for (int round = 0; s && round < ROUNDS; round++) {
        int row = 4;
        gemma3_sampler sampler = gemma3_sampler_new(7);
        gemma3_state_reset(s);
        t->failed |= gemma3_forward(s, ids, 5, &row, 1, t->logits);
        for (int i = 5; i < 7; i++) row = 0, t->failed |= gemma3_forward(s, ids + i, 1, &row, 1,
                                                                         t->logits);
        t->chosen = gemma3_sample(&sampler, t->logits, V, scratch);
        int32_t text[64];
        t->n_ids = gemma3_encode(gemma3_model_tokenizer(t->m), "the user\n\n ab", 13, GEMMA3_BOS,
                                 text, 64);
    }
    t->failed |= !s;
    gemma3_state_free(s);
    return NULL;
}

static int same(const task *a, const task *b)
{
    return !a->failed && !b->failed && a->chosen == b->chosen && a->n_ids == b->n_ids &&
           !memcmp(a->logits, b->logits, sizeof a->logits);
}

static void states_on_threads(const gemma3_model *m, gemma3_pool *pool, const task *want,
                              const char *what)
{
    task t[STATES];
    pthread_t thread[STATES];
    int n_same = 0;
    for (int i = 0; i < STATES; i++) {
        t[i] = (task){ .m = m, .pool = pool };
        if (pthread_create(&thread[i], NULL, converse, &t[i])) exit(1);
    }
    for (int i = 0; i < STATES; i++) pthread_join(thread[i], NULL), n_same += same(&t[i], want);
    is_int(n_same, STATES, "%d threads, each with its state on one model, %s: the same numbers",
           STATES, what);
}

/* Opened by several processes at once, which all compute. */
static void processes_on_one_file(const task *want)
{
    pid_t child[4];
    int n_same = 0;
    fflush(stdout);
    for (int i = 0; i < 4; i++) {
        child[i] = fork();
        if (child[i]) continue;
        gemma3_error err;
        const gemma3_options o = { .no_repack = i & 1 };
        gemma3_model *m = gemma3_open(path, &o, &err);
        task t = { .m = m };
        if (m) converse(&t);
        int good = m && same(&t, want);
        gemma3_close(m);
        _exit(!good);
    }
    for (int i = 0; i < 4; i++) {
        int status;
        n_same += waitpid(child[i], &status, 0) == child[i] && WIFEXITED(status) &&
            !WEXITSTATUS(status);
    }
    is_int(n_same, 4, "4 processes open one file at once: the same numbers");
}

/* ---- How the program ends -------------------------------------------------------------------- */

/* Its status within ten seconds; -1 when it had to be killed. */
static int ended(pid_t child)
{
    int status;
    const struct timespec a_while = { 0, 20000000 };
    for (int i = 0; i < 500; i++) {
        if (waitpid(child, &status, WNOHANG) == child) return status;
        nanosleep(&a_while, NULL);
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return -1;
}

/* The program in a session of its own, at a terminal of which we hold the other end. */
static pid_t start_at_terminal(int *other_end)
{
    *other_end = posix_openpt(O_RDWR | O_NOCTTY);
    const char *name = *other_end < 0 || grantpt(*other_end) || unlockpt(*other_end) ? NULL
                     : ptsname(*other_end);
    pid_t child = name ? fork() : -1;
    if (child) return child;
    signal(SIGINT, SIG_DFL); /* whoever runs tests in the background may have them ignored */
    signal(SIGHUP, SIG_DFL);
    setsid();
    int fd = open(name, O_RDWR); /* becomes the session's terminal */
    if (fd < 0 || dup2(fd, 0) < 0 || dup2(fd, 1) < 0 || dup2(fd, 2) < 0) _exit(98);
    if (fd > 2) close(fd);
    close(*other_end);
    execl("./gemma3", "gemma3", "-m", path, "-i", "-c", "64", "-n", "4", "-t", "1", (char *)NULL);
    _exit(99);
}

/* Waits for the chat's question. */
static int asks(int fd)
{
    char c, last = 0;
    while (read(fd, &c, 1) == 1) {
        if (last == '>' && c == ' ') return 1;
        last = c;
    }
    return 0;
}

static void a_terminal_that_closes(void)
{
    int fd;
    pid_t child = start_at_terminal(&fd);
    if (child < 0) {
        skip(1, "no pseudo-terminals here");
        return;
    }
    int asked = asks(fd);
    close(fd);
    int status = ended(child);
    ok(asked && status != -1 && ((WIFSIGNALED(status) && WTERMSIG(status) == SIGHUP) ||
                                 (WIFEXITED(status) && WEXITSTATUS(status) <= 1)),
       "a chat whose terminal closes ends (status %d)", status);
}

static void an_interrupt_at_the_question(void)
{
    int fd;
    pid_t child = start_at_terminal(&fd);
    if (child < 0) {
        skip(1, "no pseudo-terminals here");
        return;
    }
    int asked = asks(fd), sent = write(fd, "\3", 1) == 1, status = -1;
    for (int i = 0; i < 2 && status == -1; i++) { /* some ask whether it is meant */
        int seconds = 0;
        while (seconds++ < 100 && waitpid(child, &status, WNOHANG) != child) {
            const struct timespec a_while = { 0, 20000000 };
            status = -1;
            nanosleep(&a_while, NULL);
        }
        if (status == -1) sent = write(fd, "\3", 1) == 1;
    }
    if (status == -1) status = ended(child);
    ok(asked && sent && status != -1 && ((WIFSIGNALED(status) && WTERMSIG(status) == SIGINT) ||
                                         (WIFEXITED(status) && WEXITSTATUS(status) <= 1)),
       "Ctrl-C at a chat's question ends it (status %d)", status);
    close(fd);
}

/* Whoever shortens a model's file takes pages away that a chat has mapped: it cannot go on, and
 * says so. (A program that links the library gets SIGBUS: test/hostile.c.) */
static void a_model_that_shrinks_under_a_chat(const bytes *b)
{
    char model[80], c = 0, said[400] = "";
    int in[2], out[2], err[2];
    snprintf(model, sizeof model, "%s/shrinks.gguf", folder);
    FILE *f = fopen(model, "wb");
    int failed = !f || fwrite(b->p, 1, b->n, f) != b->n || fclose(f);
    failed = failed || pipe(in) || pipe(out) || pipe(err);
    fflush(stdout);
    pid_t child = failed ? -1 : fork();
    if (child == 0) {
        if (dup2(in[0], 0) < 0 || dup2(out[1], 1) < 0 || dup2(err[1], 2) < 0) _exit(98);
        close(in[1]);
        execl("./gemma3", "gemma3", "-m", model, "--no-repack", "-i", "-c", "64", "-n", "4", "-t",
              "1", (char *)NULL);
        _exit(99);
    }
    close(in[0]), close(out[1]), close(err[1]);
    failed = failed || write(in[1], "ab\n", 3) != 3;
    while (!failed && c != '\n') failed = read(out[0], &c, 1) != 1; /* until it has answered */
    failed = failed || truncate(model, 0) || write(in[1], "ab\n", 3) != 3;
    close(in[1]);
    int status = child > 0 ? ended(child) : -1;
    ssize_t n = child > 0 ? read(err[0], said, sizeof said - 1) : 0;
    close(out[0]), close(err[0]);
    ok(!failed && n > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 1 &&
           strstr(said, "gemma3: the model's file can no longer be read"),
       "a chat whose model is shortened ends with a sentence and exit code 1 (status %d): %.*s",
       status, (int)strcspn(said, "\n"), said);
    unlink(model);
}

/* argv of a megabyte, in pieces as large as the system takes. */
static void long_arguments(void)
{
    enum { PIECE = 120000, PIECES = 9 };
    char *args[8 + 2 * PIECES] = { "gemma3", "-m", path, "-c", "64", "-p" };
    static char text[PIECE + 1];
    memset(text, 'a', PIECE);
    for (int job = 0; job < 2; job++) {
        int n = 6;
        args[n++] = text;
        for (int i = 1; job && i < PIECES; i++) args[n++] = "--stop", args[n++] = text;
        args[n] = NULL;
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            int null = open("/dev/null", O_RDWR);
            if (dup2(null, 0) < 0 || dup2(null, 1) < 0 || dup2(null, 2) < 0) _exit(98);
            execv("./gemma3", args);
            _exit(99);
        }
        int status = ended(child);
        int code = status != -1 && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
        ok(code == 1 || code == 2,
           "%d arguments of %d bytes: a sentence and exit code %d", job ? PIECES : 1, PIECE,
           code);
    }
}

int main(void)
{
    tiny t = tiny_chat();
    bytes b = tiny_file(&t);
    gemma3_error err;
    if (!mkdtemp(folder)) skip_all("no folder for a file");
    snprintf(path, sizeof path, "%s/m.gguf", folder);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(b.p, 1, b.n, f) != b.n || fclose(f)) return 1;
    gemma3_model *m = gemma3_open(path, NULL, &err);
    gemma3_pool *pool = gemma3_pool_new(3, &err);
    task want = { .m = m };
    if (m && pool) converse(&want);
    if (ok(m && pool && !want.failed, "a state alone computes")) {
        states_on_threads(m, NULL, &want, "without a pool");
        states_on_threads(m, pool, &want, "which share a pool of 3");
    }
    gemma3_pool_free(pool);
    gemma3_close(m);
    processes_on_one_file(&want);
    if (access("./gemma3", X_OK) == 0) {
        a_terminal_that_closes();
        an_interrupt_at_the_question();
        long_arguments();
        a_model_that_shrinks_under_a_chat(&b);
    } else skip(5, "no ./gemma3: make");
    unlink(path);
    rmdir(folder);
    free(b.p);
    tiny_free(&t);
    return done_testing();
}
