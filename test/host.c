/* host.c - what the program asks of the system it runs on: what a container leaves of the machine,
 * files under their real names, and threads that run every task once. */
#define GEMMA3_NO_MAIN
#include "../gemma3.c"

#include "tap.h"

#if defined(_WIN32)
int main(void) { skip_all("control groups are Linux's"); }
#else

static char top[] = "/tmp/gemma3-host-XXXXXX";

/* Makes a file of one line in the pretended system, and the folders it lies in. */
static void put(const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", top, name);
    for (char *cut = strchr(path + strlen(top) + 1, '/'); cut; cut = strchr(cut + 1, '/')) {
        *cut = 0;
        mkdir(path, 0777);
        *cut = '/';
    }
    FILE *f = fopen(path, "w");
    fprintf(f, "%s\n", text);
    fclose(f);
}

static struct limits limits_in(const char *self, const char *root)
{
    char a[512], b[512];
    struct limits l = {1e9, 1e18};
    snprintf(a, sizeof a, "%s/%s", top, self);
    snprintf(b, sizeof b, "%s/%s", top, root);
    limit_by_groups(a, b, &l);
    return l;
}

static void allows(const char *self, const char *root, double cpus, double bytes, const char *what)
{
    struct limits l = limits_in(self, root);
    ok(l.cpus == cpus && l.bytes == bytes, "%s", what);
    if (l.cpus != cpus || l.bytes != bytes) diag("  cpus %g, bytes %g", l.cpus, l.bytes);
}

static void control_groups(void)
{
    double no_cpus = 1e9, no_bytes = 1e18; /* no limit */
    put("own", "0::/");
    put("deep", "0::/a/b");
    put("old", "5:cpuset:/\n4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n1:name=systemd:/docker/"
               "x\n0::/docker/x");
    put("damaged", "0:\n:\n\n0::");

    put("v2/cpu.max", "max 100000");
    put("v2/memory.max", "max");
    allows("own", "v2", no_cpus, no_bytes, "\"max\" is no limit");
    put("v2/cpu.max", "150000 50000");
    put("v2/memory.max", "500000000");
    allows("own", "v2", 3, 5e8, "version 2: quota over period, whatever the period");
    allows("deep", "v2", 3, 5e8, "a group whose folder is not to be seen: what is above it");
    put("v2/a/cpu.max", "25000 100000");
    put("v2/a/memory.max", "max");
    put("v2/a/b/cpu.max", "max 100000");
    put("v2/a/b/memory.max", "400000000");
    allows("deep", "v2", 0.25, 4e8, "nested groups: the least of all above");
    put("v2/a/b/c/cpu.max", "1000 100000");
    allows("deep", "v2", 0.25, 4e8, "and none of those below");

    put("v1/cpu,cpuacct/docker/x/cpu.cfs_quota_us", "-1");
    put("v1/cpu,cpuacct/docker/x/cpu.cfs_period_us", "100000");
    put("v1/memory/docker/x/memory.limit_in_bytes", "9223372036854771712");
    allows("old", "v1", no_cpus, no_bytes, "version 1 without limits");
    put("v1/cpu,cpuacct/docker/x/cpu.cfs_quota_us", "50000");
    put("v1/cpu,cpuacct/docker/x/cpu.cfs_period_us", "20000");
    put("v1/memory/memory.limit_in_bytes", "300000000");
    allows("old", "v1", 2.5, 3e8, "version 1: a folder for each list of controllers");
    allows("damaged", "v2", 3, 5e8, "lines that are none are passed over");
    allows("absent", "v2", no_cpus, no_bytes, "a system without control groups");
    put("v2/cpu.max", "0 0");
    put("v2/memory.max", "");
    allows("own", "v2", no_cpus, no_bytes, "nonsense is no limit");

    ok(gemma3_default_threads() >= 1, "one thread at least: %d", gemma3_default_threads());
    ok(gemma3_memory_limit() > 1 << 20, "this machine has memory: %zu bytes",
       gemma3_memory_limit());
}

/* ---- Files ----------------------------------------------------------------------------------- */

static void files(void)
{
    char real_top[512], one[600], other[600], to[600], real[600];
    FILE *f;
    ok(!gemma3_real_path(top, real_top, sizeof real_top), "a folder has a real path");
    snprintf(one, sizeof one, "%s/one", real_top);
    snprintf(other, sizeof other, "%s/\xc3\xb6", real_top);
    snprintf(to, sizeof to, "%s/link", real_top);
    is_int(gemma3_file_size(one), -1, "no file has no size");
    is_int(gemma3_file_size(top), -2, "a folder is none");
    put("one", "one");
    put("\xc3\xb6", "the other");
    is_int(gemma3_file_size(other), 10, "a file has one");
    is_int(gemma3_rename(one, other), 0, "a file gets the name of another");
    is_int(gemma3_file_size(other), 4, "which it replaces");
    is_int(gemma3_rename(one, other), -1, "what is not there gets none");
    ok(symlink(other, to) == 0 && !gemma3_real_path(to, real, sizeof real) && !strcmp(real, other),
       "a link's real path is what it leads to");
    ok(!gemma3_real_path("no such", real, sizeof real) && !strcmp(real, "no such"),
       "that of what is not there is its name");
    ok(gemma3_real_path(to, real, strlen(other)) == -1 && errno == ENAMETOOLONG,
       "a real path without room is refused");
    f = gemma3_fopen(to, "rb");
    ok(f && fgetc(f) == 'o' && !gemma3_is_terminal(f), "a file opens, and is no terminal");
    if (f) fclose(f);
    is_int(gemma3_remove(other), 0, "a file can be removed");
    ok(!gemma3_fopen(other, "rb") && errno == ENOENT, "and does not open any more");
    double then = gemma3_seconds();
    usleep(2000);
    double passed = gemma3_seconds() - then;
    ok(passed >= 0.002 && passed < 60, "seconds pass: %g", passed);
}

/* ---- Threads --------------------------------------------------------------------------------- */

enum { MAX_TASKS = 40 };

struct count {
    int n_threads;
    atomic_int runs[MAX_TASKS], in_use[GEMMA3_MAX_THREADS], wrong;
};

static void count_task(void *arg, int i, int worker)
{
    struct count *c = arg;
    if (worker < 0 || worker >= c->n_threads || atomic_fetch_add(&c->in_use[worker], 1))
        atomic_fetch_add(&c->wrong, 1);
    atomic_fetch_add(&c->runs[i], 1);
    if (i % 7 == 0) sched_yield();
    atomic_fetch_sub(&c->in_use[worker], 1);
}

/* Rounds follow each other closely, so that workers come late to many of them. */
static int rounds(gemma3_pool *pool, int n_threads, int n_rounds)
{
    static struct count zero;
    int n_wrong = 0;
    for (int r = 0; r < n_rounds; r++) {
        struct count c = zero;
        int n = r % MAX_TASKS + 1;
        c.n_threads = n_threads;
        gemma3_pool_run(pool, n, count_task, &c);
        for (int i = 0; i < MAX_TASKS; i++) n_wrong += c.runs[i] != (i < n);
        n_wrong += c.wrong;
        if (r % 1000 == 0) usleep(2000); /* long enough for workers to fall asleep */
    }
    return n_wrong;
}

static void *rounds_main(void *pool) { return (void *)(intptr_t)rounds(pool, 3, 3000); }

static void pools(void)
{
    const int sizes[] = {1, 2, 3, 7};
    for (int k = 0; k < 4; k++) {
        gemma3_pool *pool = gemma3_pool_new(sizes[k], NULL);
        is_int(rounds(pool, sizes[k], 5000), 0,
               "%d threads: every task once, no worker twice at a time", sizes[k]);
        gemma3_pool_free(pool);
    }
    int n_wrong_at_end = 0;
    for (int k = 0; k < 1000; k++) {
        struct count c = {.n_threads = 3};
        gemma3_pool *short_lived = gemma3_pool_new(3, NULL);
        for (int r = 0; r <= k % 3; r++) gemma3_pool_run(short_lived, 3, count_task, &c);
        gemma3_pool_free(short_lived);
        for (int i = 0; i < 3; i++) n_wrong_at_end += c.runs[i] != k % 3 + 1;
    }
    is_int(n_wrong_at_end, 0, "workers that are late when a pool ends run nothing again");
    gemma3_pool *pool = gemma3_pool_new(3, NULL);
    pthread_t other;
    void *n_wrong;
    pthread_create(&other, NULL, rounds_main, pool);
    int mine = rounds(pool, 3, 3000);
    pthread_join(other, &n_wrong);
    is_int(mine + (intptr_t)n_wrong, 0, "two callers take turns");
    gemma3_pool_free(pool);
}

int main(void)
{
    char remove_top[64];
    if (!mkdtemp(top)) skip_all("no folder in /tmp");
    control_groups();
    files();
    snprintf(remove_top, sizeof remove_top, "rm -r %s", top);
    ok(system(remove_top) == 0, "(the pretended system is gone)");
    pools();
    return done_testing();
}
#endif
