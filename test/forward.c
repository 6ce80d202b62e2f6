/* forward.c - the whole model on three small random ones: it agrees with transformers at every
 * position, and its bits depend on nothing but the file, the ids, the mode and the cache's type.
 *
 * tiny: grouped heads, window 8 over 72 tokens, RoPE factor 8. tiny-62: 27B's query scale.
 * tiny-mixed: every tensor type, a head of its own, softcap, most keys missing.
 */
#define _POSIX_C_SOURCE 200809L
#include "../gemma3.h"

#include "fixture.h"

#include <fenv.h>
#include <limits.h>
#include <pthread.h>

enum { DEFAULT, EXACT };

/* How one run differs from the plainest. Zero: the plainest. */
typedef struct setting {
    int mode, no_repack, chunk, n_batch, n_threads, n_ctx;
    int kv;                  /* 0: the mode's own, else 1 + gemma3_kv_type */
    const char *isa;
} setting;

/* ---- Running ------------------------------------------------------------------------------- */

static gemma3_model *open_model(const fixture *f, setting s)
{
    gemma3_options o = { .exact = s.mode == EXACT, .no_repack = s.no_repack, .isa = s.isa };
    gemma3_error err = { "" };
    gemma3_model *m = gemma3_open(f->path, &o, &err);
    if (!m) diag("%s: %s", f->path, err.text);
    return m;
}

static gemma3_params params_of(const fixture *f, const gemma3_model *m, setting s)
{
    gemma3_params p = gemma3_default_params(m);
    p.n_ctx = s.n_ctx ? s.n_ctx : f->n;
    if (s.n_batch) p.n_batch = s.n_batch;
    if (s.kv) p.kv_type = (gemma3_kv_type)(s.kv - 1);
    return p;
}

/* Logits of all positions, the ids given chunk at a time. */
static int run_state(gemma3_state *st, const fixture *f, int chunk, float *out)
{
    int rows[128];
    for (int i = 0; i < 128; i++) rows[i] = i;
    if (chunk == 0) chunk = f->n;
    for (int i = 0; i < f->n; i += chunk) {
        int n = f->n - i < chunk ? f->n - i : chunk;
        if (gemma3_forward(st, f->ids + i, n, rows, n, out + (size_t)i * f->n_vocab)) {
            diag("%s", gemma3_state_error(st));
            return -1;
        }
    }
    return 0;
}

static int run_model(const gemma3_model *m, const fixture *f, setting s, float *out)
{
    gemma3_error err = { "" };
    gemma3_params p = params_of(f, m, s);
    gemma3_pool *pool = NULL;
    if (s.n_threads > 1) {
        pool = gemma3_pool_new(s.n_threads, &err);
        p.pool = pool, p.parallel_for = gemma3_pool_run, p.n_threads = s.n_threads;
    }
    gemma3_state *st = gemma3_state_new(m, &p, &err);
    if (!st) diag("%s", err.text);
    int failed = !st || run_state(st, f, s.chunk, out);
    gemma3_state_free(st);
    gemma3_pool_free(pool);
    return failed ? -1 : 0;
}

static float *new_logits(const fixture *f)
{
    return calloc((size_t)f->n * f->n_vocab, sizeof(float));
}

static size_t logits_bytes(const fixture *f)
{
    return (size_t)f->n * f->n_vocab * sizeof(float);
}

/* Logits of all positions in new memory; NaN everywhere when something fails. */
static float *run(const fixture *f, setting s)
{
    float *out = new_logits(f);
    gemma3_model *m = open_model(f, s);
    if (!m || run_model(m, f, s, out)) memset(out, 0xff, logits_bytes(f));
    gemma3_close(m);
    return out;
}

static void same_bits(const fixture *f, setting s, const float *want, const char *what)
{
    float *got = run(f, s);
    is_bits(got, want, logits_bytes(f), "%s, %s: %s", f->name,
            s.mode == EXACT ? "exact" : "default", what);
    free(got);
}

/* ---- Agreement ----------------------------------------------------------------------------- */

static void exact_mode_agrees_with_transformers(const fixture *f)
{
    float *got = run(f, (setting){ .mode = EXACT });
    agreement a = agree(f->want, got, f->n, f->n_vocab);
    ok(a.mean_kl <= 1e-10, "%s, exact: mean KL to transformers float32 is at most 1e-10", f->name);
    ok(a.max_kl <= 1e-9, "%s, exact: and 1e-9 at every position", f->name);
    ok(a.other_argmax == 0, "%s, exact: same first choice", f->name);
    ok(a.max_diff <= 2e-4, "%s, exact: logits within 2e-4", f->name);
    diag("%s, exact: mean KL %.2g, largest %.2g, largest difference of logits %.2g", f->name,
         a.mean_kl, a.max_kl, a.max_diff);
    if (!(a.mean_kl <= 1e-10))
        for (int i = 0; i < f->n; i++) {
            size_t row = (size_t)i * f->n_vocab;
            diag("  position %d: KL %.3g", i, divergence(f->want + row, got + row, f->n_vocab));
        }
    free(got);
}

static void default_mode_is_near(const fixture *f, double least, double most)
{
    float *got = run(f, (setting){ .mode = DEFAULT });
    agreement a = agree(f->want, got, f->n, f->n_vocab);
    ok(a.mean_kl >= least && a.mean_kl <= most,
       "%s, default: mean KL %.3g is in %g .. %g", f->name, a.mean_kl, least, most);
    free(got);
}

/* Version 1 of the contract in four hashes: a change of any bit is a change of the contract. */
static void bits_are_those_of_the_contract(const fixture *f, const char *const hash[4])
{
    for (int i = 0; i < 4; i++) {
        setting s = { .mode = i / 2, .kv = 1 + i % 2 };
        float *got = run(f, s);
        gemma3_sha256 c;
        char hex[65];
        gemma3_sha256_init(&c);
        gemma3_sha256_add_floats(&c, got, (size_t)f->n * f->n_vocab);
        gemma3_sha256_end(&c, hex);
        ok(strcmp(hex, hash[i]) == 0, "%s, %s, %s cache: the bits of contract %d", f->name,
           i / 2 ? "exact" : "default", i % 2 ? "F32" : "F16", GEMMA3_CONTRACT);
        if (strcmp(hex, hash[i])) diag("  got %s", hex);
        free(got);
    }
}

static void half_precision_cache_costs_little(const fixture *f)
{
    for (int mode = DEFAULT; mode <= EXACT; mode++) {
        float *half = run(f, (setting){ .mode = mode, .kv = 1 + GEMMA3_KV_F16 });
        float *single = run(f, (setting){ .mode = mode, .kv = 1 + GEMMA3_KV_F32 });
        agreement a = agree(single, half, f->n, f->n_vocab);
        ok(a.mean_kl > 0 && a.mean_kl < (mode == EXACT ? 1e-5 : 1e-2),
           "%s, %s: an F16 cache changes the logits by a mean KL of %.2g", f->name,
           mode == EXACT ? "exact" : "default", a.mean_kl);
        float *own = run(f, (setting){ .mode = mode });
        is_bits(own, mode == EXACT ? single : half, logits_bytes(f),
                "%s: the mode's own cache is %s", f->name, mode == EXACT ? "F32" : "F16");
        free(half), free(single), free(own);
    }
}

/* ---- What the bits do not depend on -------------------------------------------------------- */

static void nothing_else_changes_a_bit(const fixture *f, int mode)
{
    char what[64];
    float *want = run(f, (setting){ .mode = mode, .isa = "scalar" });

    static const int chunks[] = { 1, 2, 3, 7, 8, 9, 16, 31, 63, 64, 65 };
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
        snprintf(what, sizeof what, "the prompt in pieces of %d", chunks[i]);
        same_bits(f, (setting){ .mode = mode, .chunk = chunks[i] }, want, what);
    }
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
        snprintf(what, sizeof what, "a batch of %d, its ring as small", chunks[i]);
        same_bits(f, (setting){ .mode = mode, .n_batch = chunks[i] }, want, what);
    }
    for (int t = 1; t <= 8; t++) {
        snprintf(what, sizeof what, "%d threads", t);
        same_bits(f, (setting){ .mode = mode, .n_threads = t }, want, what);
        snprintf(what, sizeof what, "%d threads, one token at a time", t);
        same_bits(f, (setting){ .mode = mode, .n_threads = t, .chunk = 1 }, want, what);
    }
    same_bits(f, (setting){.mode = mode, .no_repack = 1}, want, "weights as they lie in the file");
    same_bits(f, (setting){ .mode = mode, .n_ctx = 200 }, want, "a longer context");
    for (int i = 0; gemma3_isa_name(i); i++) {
        for (int no_repack = 0; no_repack <= 1; no_repack++)
            for (int chunk = 0; chunk <= 7; chunk += chunk ? 6 : 1) {
                snprintf(what, sizeof what, "--isa %s, pieces of %d%s", gemma3_isa_name(i),
                         chunk ? chunk : f->n, no_repack ? ", not repacked" : "");
                same_bits(f, (setting){ .mode = mode, .isa = gemma3_isa_name(i), .chunk = chunk,
                                        .no_repack = no_repack }, want, what);
            }
    }
    free(want);
}

static void rows_asked_for_are_rows_of_all(const fixture *f)
{
    setting s = { .mode = DEFAULT };
    float *all = run(f, s), *some = new_logits(f);
    gemma3_model *m = open_model(f, s);
    gemma3_params p = params_of(f, m, s);
    gemma3_state *st = gemma3_state_new(m, &p, NULL);
    const int rows[] = { 0, 5, 6, f->n - 1 };
    int failed = gemma3_forward(st, f->ids, f->n, rows, 4, some);
    ok(!failed, "%s: four rows are computed", f->name);
    for (int i = 0; i < 4; i++)
        is_bits(some + (size_t)i * f->n_vocab, all + (size_t)rows[i] * f->n_vocab,
                f->n_vocab * sizeof(float), "%s: row %d alone", f->name, rows[i]);
    gemma3_state_reset(st);
    const int last = f->n / 3 - 1;
    failed = gemma3_forward(st, f->ids, f->n / 3, NULL, 0, NULL) ||
             gemma3_forward(st, f->ids + f->n / 3, f->n / 3, &last, 1, some);
    ok(!failed, "%s: no rows is a number of rows", f->name);
    is_bits(some, all + (size_t)(2 * (f->n / 3) - 1) * f->n_vocab, f->n_vocab * sizeof(float),
            "%s: and what follows is the same", f->name);
    gemma3_state_free(st);
    gemma3_close(m);
    free(all), free(some);
}

static void a_reset_state_is_a_new_one(const fixture *f)
{
    setting s = { .mode = DEFAULT };
    float *want = run(f, s), *got = new_logits(f);
    gemma3_model *m = open_model(f, s);
    gemma3_params p = params_of(f, m, s);
    gemma3_state *st = gemma3_state_new(m, &p, NULL);
    int failed = run_state(st, f, 5, got);
    is_int(gemma3_state_pos(st), f->n, "%s: position after the sequence", f->name);
    gemma3_state_reset(st);
    is_int(gemma3_state_pos(st), 0, "%s: position after a reset", f->name);
    failed |= run_state(st, f, 11, got);
    ok(!failed, "%s: runs twice", f->name);
    is_bits(got, want, logits_bytes(f), "%s: a reset state computes the same", f->name);
    gemma3_state_free(st);
    gemma3_close(m);
    free(want), free(got);
}

typedef struct talk {
    const gemma3_model *m;
    const fixture *f;
    int chunk, failed;
    float *out;
    gemma3_pool *pool;       /* shared, or NULL: none */
} talk;

static void *talk_main(void *arg)
{
    talk *t = arg;
    for (int i = 0; i < 3; i++)
        t->failed |= run_model(t->m, t->f, (setting){ .chunk = t->chunk }, t->out) != 0;
    return NULL;
}

static void two_states_share_a_model(const fixture *f)
{
    float *want = run(f, (setting){ .mode = DEFAULT });
    gemma3_model *m = open_model(f, (setting){ .mode = DEFAULT });
    talk t[2] = { { m, f, 1, 0, new_logits(f), NULL }, { m, f, 9, 0, new_logits(f), NULL } };
    pthread_t thread[2];
    for (int i = 0; i < 2; i++) pthread_create(&thread[i], NULL, talk_main, &t[i]);
    for (int i = 0; i < 2; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < 2; i++) {
        ok(!t[i].failed, "%s: thread %d ran", f->name, i);
        is_bits(t[i].out, want, logits_bytes(f), "%s: two states at once, thread %d", f->name, i);
        free(t[i].out);
    }
    gemma3_close(m);
    free(want);
}

static void *pooled_talk_main(void *arg)
{
    talk *t = arg;
    gemma3_params p = params_of(t->f, t->m, (setting){ .chunk = t->chunk });
    p.pool = t->pool, p.parallel_for = gemma3_pool_run, p.n_threads = 3;
    gemma3_state *st = gemma3_state_new(t->m, &p, NULL);
    for (int i = 0; i < 20 && !t->failed; i++, gemma3_state_reset(st))
        t->failed = run_state(st, t->f, t->chunk, t->out);
    gemma3_state_free(st);
    return NULL;
}

static void two_states_share_a_pool(const fixture *f)
{
    float *want = run(f, (setting){ .mode = DEFAULT });
    gemma3_model *m = open_model(f, (setting){ .mode = DEFAULT });
    gemma3_pool *pool = gemma3_pool_new(3, NULL);
    talk t[2] = { { m, f, 8, 0, new_logits(f), pool }, { m, f, 9, 0, new_logits(f), pool } };
    pthread_t thread[2];
    for (int i = 0; i < 2; i++) pthread_create(&thread[i], NULL, pooled_talk_main, &t[i]);
    for (int i = 0; i < 2; i++) pthread_join(thread[i], NULL);
    for (int i = 0; i < 2; i++) {
        is_bits(t[i].out, want, logits_bytes(f), "%s: one pool for two threads, thread %d", f->name,
                i);
        free(t[i].out);
    }
    gemma3_pool_free(pool);
    gemma3_close(m);
    free(want);
}

/* Flush-to-zero and denormals-are-zero of this thread; -1 asks. Returns what it was, -1: no such
 * bits. */
static int flush_to_zero(int on)
{
#if defined(HAVE_X86)
    unsigned bits = 0x8040, old = _mm_getcsr();
    if (on >= 0) _mm_setcsr(on ? old | bits : old & ~bits);
    return (old & bits) == bits;
#elif defined(__aarch64__)
    uint64_t bits = 1 << 24, old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    if (on >= 0) __asm__ volatile("msr fpcr, %0" : : "r"(on ? old | bits : old & ~bits));
    return (old & bits) != 0;
#else
    (void)on;
    return -1;
#endif
}

/* The caller may have left another rounding mode, or subnormal numbers off; that is neither used,
 * by this thread or by those of a pool, nor lost. */
static void the_callers_arithmetic_is_not_used(const fixture *f)
{
    for (int mode = DEFAULT; mode <= EXACT; mode++) {
        float *want = run(f, (setting){ .mode = mode }), *got = new_logits(f);
        setting s = { .mode = mode, .n_threads = 2 };
        fesetround(FE_UPWARD);
        gemma3_model *m = open_model(f, s);
        int failed = !m || run_model(m, f, s, got), round = fegetround();
        fesetround(FE_TONEAREST);
        ok(!failed && round == FE_UPWARD, "%s: the rounding mode is restored", f->name);
        is_bits(got, want, logits_bytes(f), "%s: and was not used", f->name);
        memset(got, 0, logits_bytes(f));
        if (flush_to_zero(-1) < 0) skip(2, "no flush-to-zero known on this CPU");
        else {
            flush_to_zero(1);
            failed = run_model(m, f, s, got);
            int flushed = flush_to_zero(0);
            ok(!failed && flushed == 1, "%s: flush-to-zero is restored", f->name);
            is_bits(got, want, logits_bytes(f), "%s: and was not used", f->name);
        }
        gemma3_close(m);
        free(want), free(got);
    }
}

static void a_file_in_memory_is_a_file(const fixture *f)
{
    setting s = { .mode = DEFAULT };
    float *want = run(f, s), *got = new_logits(f);
    size_t size;
    char *data = read_file(f->path, &size);
    gemma3_error err = { "" };
    for (int no_repack = 0; no_repack <= 1; no_repack++) {
        gemma3_options o = { .no_repack = no_repack };
        gemma3_model *m = gemma3_open_memory(data, size, f->path, &o, &err);
        if (!ok(m != NULL && run_model(m, f, s, got) == 0, "%s: opens from memory", f->name))
            diag("%s", err.text);
        is_bits(got, want, logits_bytes(f), "%s: the same from memory%s", f->name,
                no_repack ? ", not repacked" : "");
        gemma3_close(m);
    }
    free(data), free(want), free(got);
}

/* ---- Memory -------------------------------------------------------------------------------- */

static void a_state_lives_in_the_callers_memory(const fixture *f)
{
    setting s = { .mode = DEFAULT, .n_batch = 16 };
    float *want = run(f, s), *got = new_logits(f);
    gemma3_model *m = open_model(f, s);
    gemma3_params p = params_of(f, m, s);
    size_t size = gemma3_state_size(m, &p);
    gemma3_error err = { "" };
    ok(size > gemma3_kv_bytes(gemma3_model_config(m), &p), "%s: a state is more than its cache",
       f->name);
    for (int shift = 0; shift <= 65; shift += shift < 4 ? 1 : 61) {
        unsigned char *mem = malloc(size + 256);
        memset(mem, 0xA5, size + 256);
        gemma3_state *st = gemma3_state_init(m, &p, mem + shift, size, &err);
        ok(st != NULL, "%s: %zu bytes at an offset of %d suffice", f->name, size, shift);
        if (!st) diag("%s", err.text);
        if (st && run_state(st, f, 0, got) == 0)
            is_bits(got, want, logits_bytes(f), "%s: the same there", f->name);
        int touched = 0;
        for (int i = 0; i < shift; i++) touched |= mem[i] != 0xA5;
        for (size_t i = size + shift; i < size + 256; i++) touched |= mem[i] != 0xA5;
        ok(!touched, "%s: and nothing around it is written", f->name);
        free(mem);
    }
    char *mem = malloc(size);
    ok(!gemma3_state_init(m, &p, mem, size - 1, &err), "%s: one byte less does not", f->name);
    ok(err.text[0] != 0, "%s: it says: %s", f->name, err.text);
    free(mem);
    gemma3_close(m);
    free(want), free(got);
}

static void the_caches_size_follows_the_window(const fixture *f)
{
    gemma3_model *m = open_model(f, (setting){ .mode = DEFAULT });
    const gemma3_config *c = gemma3_model_config(m);
    gemma3_params p = gemma3_default_params(m);
    int n_global = 0;
    for (int l = 0; l < c->n_layers; l++) n_global += !c->is_local[l];
    size_t token = (size_t)2 * c->n_kv_heads * c->head_dim * 2; /* bytes of K and V in F16 */
    p.n_ctx = 100, p.n_batch = 4;
    size_t small = gemma3_kv_bytes(c, &p);
    p.n_ctx = 200;
    size_t large = gemma3_kv_bytes(c, &p);
    is_int(large - small, 100 * token * n_global, "%s: only global layers grow with the context",
           f->name);
    size_t want = token * (100 * n_global + (c->window + 3) * (c->n_layers - n_global));
    ok(small >= want && small < want + 64 * (size_t)c->n_layers * 2,
       "%s: a local layer holds window + batch - 1 tokens (%zu bytes in all, at least %zu)",
       f->name, small, want);
    p.kv_type = GEMMA3_KV_F32;
    ok(gemma3_kv_bytes(c, &p) >= 2 * large - 64 * (size_t)c->n_layers * 2,
       "%s: F32 takes twice F16", f->name);
    gemma3_close(m);
}

/* ---- Mistakes ------------------------------------------------------------------------------ */

static void what_cannot_be_done_is_refused(const fixture *f)
{
    setting s = { .mode = DEFAULT };
    float *want = run(f, s), *got = new_logits(f);
    gemma3_model *m = open_model(f, s);
    gemma3_params p = params_of(f, m, s);
    gemma3_state *st = gemma3_state_new(m, &p, NULL);
    int32_t bad[3] = { f->ids[0], f->n_vocab, f->ids[1] };
    is_int(gemma3_forward(st, bad, 3, NULL, 0, NULL), -1, "%s: an id past the vocabulary", f->name);
    ok(gemma3_state_error(st)[0], "%s: it says: %s", f->name, gemma3_state_error(st));
    bad[1] = -1;
    is_int(gemma3_forward(st, bad, 3, NULL, 0, NULL), -1, "%s: a negative id", f->name);
    is_int(gemma3_forward(st, f->ids, -1, NULL, 0, NULL), -1, "%s: minus one token", f->name);
    ok(!strcmp(gemma3_state_error(st), "-1 tokens were given, expected 0 or more"),
       "%s: has its own sentence", f->name);
    is_int(gemma3_state_pos(st), 0, "%s: nothing was appended", f->name);
    ok(run_state(st, f, 0, got) == 0, "%s: the state is still good", f->name);
    is_int(gemma3_forward(st, f->ids, 1, NULL, 0, NULL), -1, "%s: a full context", f->name);
    ok(gemma3_state_error(st)[0], "%s: it says: %s", f->name, gemma3_state_error(st));
    is_int(gemma3_state_pos(st), f->n, "%s: nothing was appended", f->name);
    is_bits(got, want, logits_bytes(f), "%s: and the logits are right", f->name);
    gemma3_state_free(st);

    gemma3_error err = { "" };
    gemma3_config *c = (gemma3_config *)(uintptr_t)gemma3_model_config(m), own = *c;
    gemma3_params large = p;
    c->n_kv_heads = INT_MAX, large.n_ctx = 1 << 24;
    memset(c->is_local, 0, sizeof c->is_local);
    ok(gemma3_kv_bytes(c, &large) == SIZE_MAX && gemma3_state_size(m, &large) == SIZE_MAX,
       "%s: a size beyond all addresses does not wrap", f->name);
    ok(!gemma3_state_new(m, &large, &err) && strstr(err.text, "more memory than"),
       "%s: and is refused", f->name);
    ok(!gemma3_state_init(m, &large, got, SIZE_MAX, &err) && strstr(err.text, "more memory than"),
       "%s: whatever memory is given", f->name);
    *c = own;
    p.n_ctx = 0;
    ok(!gemma3_state_new(m, &p, &err) && err.text[0], "%s: no context: %s", f->name, err.text);
    gemma3_options o = { .isa = "abacus" };
    err.text[0] = 0;
    ok(!gemma3_open(f->path, &o, &err) && err.text[0], "%s: kernels unheard of: %s", f->name,
       err.text);
    gemma3_close(m);
    free(want), free(got);
}

/* ---- The cache forgets --------------------------------------------------------------------- */

/* With local layers alone, position 0 reaches layers * (window - 1) tokens far and no further. */
static void a_local_layer_forgets_what_left_the_window(const fixture *f)
{
    setting s = { .mode = DEFAULT };
    gemma3_model *m = open_model(f, s);
    gemma3_config *c = (gemma3_config *)gemma3_model_config(m);
    for (int l = 0; l < c->n_layers; l++) c->is_local[l] = 1;
    fixture other = *f;
    other.ids[0] = f->ids[0] + 1;
    size_t row = f->n_vocab * sizeof(float);
    for (int chunk = 0; chunk <= 10; chunk += 5) {
        float *a = new_logits(f), *b = new_logits(f);
        s.chunk = chunk, s.n_batch = chunk ? chunk : 512;
        int failed = run_model(m, f, s, a) || run_model(m, &other, s, b);
        int reach = c->n_layers * (c->window - 1), differ = 0;
        for (int i = 0; i < reach - 3; i++)
            differ += memcmp(a + (size_t)i * f->n_vocab, b + (size_t)i * f->n_vocab, row) != 0;
        ok(!failed && differ == reach - 3, "%s: position 0 is seen %d tokens on", f->name,
           reach - 4);
        size_t rest = (size_t)(f->n - reach - 1) * row;
        is_bits(a + (size_t)(reach + 1) * f->n_vocab, b + (size_t)(reach + 1) * f->n_vocab, rest,
                "%s: and no further than %d, in pieces of %d", f->name, reach, chunk);
        free(a), free(b);
    }
    gemma3_close(m);
}

/* ---- Looking inside ------------------------------------------------------------------------ */

static const char *const labels[] = {
    "inp_scaled", "attn_norm", "Qcur_raw", "Kcur_raw", "Vcur", "Qcur_normed", "Kcur_normed", "Qcur",
    "Kcur", "kqv_out", "attn_out", "attn_post_norm", "sa_out", "ffn_norm", "ffn_gate", "ffn_up",
    "ffn_geglu", "ffn_out", "ffn_post_norm", "l_out", "result_norm", "result_output" };
enum { N_LABELS = sizeof labels / sizeof *labels };

typedef struct seen {
    int rows[N_LABELS];      /* of each label, over all layers */
    int unknown, misplaced, pos, wrong_shape;
    const gemma3_config *c;
    float *logits;           /* [positions][n_vocab] */
} seen;

static int width_of(const gemma3_config *c, const char *name)
{
    if (!strncmp(name, "Qcur", 4) || !strcmp(name, "kqv_out")) return c->n_heads * c->head_dim;
    if (!strncmp(name, "Kcur", 4) || !strcmp(name, "Vcur")) return c->n_kv_heads * c->head_dim;
    if (!strcmp(name, "ffn_gate") || !strcmp(name, "ffn_up") || !strcmp(name, "ffn_geglu"))
        return c->d_ff;
    return !strcmp(name, "result_output") ? c->n_vocab : c->d_model;
}

static void look(void *user, const char *name, int layer, int pos, int n, int width, float *data)
{
    seen *s = user;
    int k = 0;
    while (k < N_LABELS && strcmp(labels[k], name)) k++;
    if (k == N_LABELS) { s->unknown++; return; }
    int outside = !strcmp(name, "inp_scaled") || !strncmp(name, "result", 6);
    s->misplaced += outside ? layer != -1 : layer < 0 || layer >= s->c->n_layers;
    s->misplaced += pos != s->pos;
    s->wrong_shape += width != width_of(s->c, name);
    s->rows[k] += n;
    if (!strcmp(name, "result_output")) {
        memcpy(s->logits + (size_t)pos * width, data, (size_t)n * width * sizeof *data);
        s->pos += n;
    }
}

static void a_trace_shows_every_layer_and_changes_nothing(const fixture *f)
{
    setting s = { .mode = DEFAULT };
    float *want = run(f, s), *got = new_logits(f), *traced = new_logits(f);
    gemma3_model *m = open_model(f, s);
    const gemma3_config *c = gemma3_model_config(m);
    seen sight = { .c = c, .logits = traced };
    gemma3_params p = params_of(f, m, s);
    p.trace = look, p.trace_user = &sight;
    gemma3_state *st = gemma3_state_new(m, &p, NULL);
    ok(run_state(st, f, 7, got) == 0, "%s: runs with a trace", f->name);
    is_bits(got, want, logits_bytes(f), "%s: it changes nothing", f->name);
    is_bits(traced, want, logits_bytes(f), "%s: result_output is the logits", f->name);
    for (int k = 0; k < N_LABELS; k++) {
        int outside = !strcmp(labels[k], "inp_scaled") || !strncmp(labels[k], "result", 6);
        is_int(sight.rows[k], f->n * (outside ? 1 : c->n_layers), "%s: %s of every token%s",
               f->name, labels[k], outside ? "" : " and layer");
    }
    is_int(sight.unknown, 0, "%s: no other names", f->name);
    int n_named = 0, in_layers;
    const char *label;
    for (; (label = gemma3_trace_label(n_named, &in_layers)); n_named++) {
        int k = 0;
        while (k < N_LABELS && strcmp(labels[k], label)) k++;
        ok(k < N_LABELS && in_layers == (sight.rows[k] > f->n), "%s: %s is announced", f->name,
           label);
    }
    is_int(n_named, N_LABELS, "%s: and no other", f->name);
    is_int(sight.misplaced, 0, "%s: at its layer and position", f->name);
    is_int(sight.wrong_shape, 0, "%s: of its width", f->name);
    gemma3_state_free(st);
    gemma3_close(m);
    free(want), free(got), free(traced);
}

/* The heads of layer 0's first token: position 0 turns nothing, so before and after rope is the
 * same there and, at every other position, only the length of each pair. */
typedef struct turned {
    float normed[2][8 * 128]; /* Q and K */
    int n_same, n_other, n_longer, half;
} turned;

static void look_at_heads(void *user, const char *name, int layer, int pos, int n, int width,
                          float *x)
{
    turned *t = user;
    int k = name[0] == 'K';
    if (layer != 0 || pos != 0 || n != 8 || (strncmp(name, "Qcur", 4) && strncmp(name, "Kcur", 4)))
        return;
    if (strstr(name, "_raw")) return;
    size_t size = (size_t)n * width;
    if (!strcmp(name + 4, "_normed")) {
        memcpy(t->normed[k], x, size * sizeof *x);
        return;
    }
    t->n_same += !memcmp(t->normed[k], x, width * sizeof *x);
    t->n_other += memcmp(t->normed[k] + width, x + width, width * sizeof *x) != 0;
    for (size_t i = 0; i < size; i++) {
        size_t j = i % (2 * t->half) < (size_t)t->half ? i + t->half : i - t->half;
        double before = hypot(t->normed[k][i], t->normed[k][j]), after = hypot(x[i], x[j]);
        t->n_longer += !(fabs(before - after) <= 1e-6 * (1 + before));
    }
}

static void normed_heads_are_those_before_rope(const fixture *f)
{
    gemma3_model *m = open_model(f, (setting){ .mode = DEFAULT });
    gemma3_params p = params_of(f, m, (setting){ .mode = DEFAULT });
    turned t = { .half = gemma3_model_config(m)->head_dim / 2 };
    p.trace = look_at_heads, p.trace_user = &t;
    gemma3_state *st = gemma3_state_new(m, &p, NULL);
    ok(st && !gemma3_forward(st, f->ids, 8, NULL, 0, NULL), "%s: eight tokens", f->name);
    is_int(t.n_same, 2, "%s: Qcur_normed and Kcur_normed at position 0 are Qcur and Kcur", f->name);
    is_int(t.n_other, 2, "%s: not so at position 1", f->name);
    is_int(t.n_longer, 0, "%s: where each pair has turned and kept its length", f->name);
    gemma3_state_free(st);
    gemma3_close(m);
}

/* A mistake from outside: the feed-forward of every layer forgets its post-norm's branch. */
static void silence(void *user, const char *name, int layer, int pos, int n, int width, float *x)
{
    (void)layer, (void)pos;
    if (!strcmp(name, user)) memset(x, 0, (size_t)n * width * sizeof *x);
}

static void what_a_trace_changes_is_computed_with(const fixture *f)
{
    gemma3_model *m = open_model(f, (setting){ .mode = DEFAULT });
    gemma3_params p = params_of(f, m, (setting){ .mode = DEFAULT });
    float *want = run(f, (setting){ .mode = DEFAULT }), *got = new_logits(f);
    for (int i = 0; i < N_LABELS; i++) {
        p.trace = silence, p.trace_user = (void *)(uintptr_t)labels[i];
        gemma3_state *st = gemma3_state_new(m, &p, NULL);
        ok(st && !run_state(st, f, 0, got) && memcmp(want, got, logits_bytes(f)),
           "%s: zeros in place of %s change the logits", f->name, labels[i]);
        gemma3_state_free(st);
    }
    gemma3_close(m);
    free(want), free(got);
}

typedef struct first_row {
    int pos, n, calls;
} first_row;

static void look_at_rows(void *user, const char *name, int layer, int pos, int n, int width,
                         float *x)
{
    first_row *r = user;
    (void)layer, (void)width, (void)x;
    if (!strncmp(name, "result_", 7)) r->pos = pos, r->n = n, r->calls++;
}

static void results_are_of_the_rows_asked_for(const fixture *f)
{
    gemma3_model *m = open_model(f, (setting){ .mode = DEFAULT });
    gemma3_params p = params_of(f, m, (setting){ .mode = DEFAULT });
    first_row r = { 0, 0, 0 };
    p.trace = look_at_rows, p.trace_user = &r;
    gemma3_state *st = gemma3_state_new(m, &p, NULL);
    float *some = new_logits(f);
    const int rows[2] = { 2, 5 };
    int failed = gemma3_forward(st, f->ids, 4, NULL, 0, NULL) ||
                 gemma3_forward(st, f->ids + 4, 8, rows, 2, some);
    ok(!failed && r.calls == 2, "%s: result_norm and result_output come when rows are asked for",
       f->name);
    is_int(r.n, 2, "%s: as many", f->name);
    is_int(r.pos, 6, "%s: with the first one's position", f->name);
    gemma3_state_free(st);
    gemma3_close(m);
    free(some);
}

/* ---- The configuration --------------------------------------------------------------------- */

static void missing_keys_have_their_defaults(const fixture *mixed)
{
    gemma3_model *m = open_model(mixed, (setting){ .mode = DEFAULT });
    const gemma3_config *c = gemma3_model_config(m);
    is_int(c->head_dim, 32, "head_dim follows from attn_q");
    is_int(c->n_kv_heads, 1, "n_kv_heads follows from attn_k");
    is_close(c->rms_eps, 1e-6f, 0, "rms_eps");
    is_close(c->rope_base_global, 1e6, 0, "the global layers' RoPE base");
    is_close(c->rope_base_local, 1e4, 0, "the local layers' RoPE base");
    is_close(c->rope_factor, 1, 0, "the RoPE factor");
    is_close(c->final_softcap, 10, 0, "the softcap is read");
    ok(c->is_local[0] && !c->is_local[1] && c->is_local[2] && !c->is_local[3],
       "the pattern of layers may be a list");
    gemma3_close(m);
}

typedef struct mistake {
    const char *what;
    void (*make)(gemma3_config *c);
} mistake;

static void wider_window(gemma3_config *c) { c->window++; }
static void other_factor(gemma3_config *c) { c->rope_factor = 1; }
static void other_global_base(gemma3_config *c) { c->rope_base_global = 1e4f; }
static void other_local_base(gemma3_config *c) { c->rope_base_local = 1e6f; }
static void other_query_scale(gemma3_config *c) { c->query_scale *= 2; }
static void other_eps(gemma3_config *c) { c->rms_eps = 1e-2f; }
static void other_embedding_scale(gemma3_config *c) { c->embedding_scale = 1; }
static void softcap(gemma3_config *c) { c->final_softcap = 5; }
static void first_layer_global(gemma3_config *c) { c->is_local[0] = 0; }
static void all_layers_local(gemma3_config *c) { memset(c->is_local, 1, sizeof c->is_local); }

/* A test that could not see these would prove little: each is far outside what exact mode
 * allows. */
static void every_number_of_the_configuration_counts(const fixture *f)
{
    static const mistake mistakes[] = {{"a window wider by one", wider_window},
                                       {"no RoPE factor", other_factor},
                                       {"the local base in global layers", other_global_base},
                                       {"the global base in local layers", other_local_base},
                                       {"another query scale", other_query_scale},
                                       {"another eps", other_eps},
                                       {"no embedding scale", other_embedding_scale},
                                       {"a softcap", softcap},
                                       {"a first layer that is global", first_layer_global},
                                       {"no global layer", all_layers_local}};
    for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++) {
        float *got = new_logits(f);
        gemma3_model *m = open_model(f, (setting){ .mode = EXACT });
        mistakes[i].make((gemma3_config *)(uintptr_t)gemma3_model_config(m));
        int failed = run_model(m, f, (setting){ .mode = EXACT }, got);
        agreement a = agree(f->want, got, f->n, f->n_vocab);
        ok(!failed && a.mean_kl > 1e-8, "%s: %s would be seen, mean KL %.2g", f->name,
           mistakes[i].what, a.mean_kl);
        gemma3_close(m);
        free(got);
    }
}

int main(void)
{
    fixture tiny = fixture_load("tiny"), deep = fixture_load("tiny-62"),
            mixed = fixture_load("tiny-mixed");
    static const char *const tiny_hash[4] = {
        "39f39df698d4d1de4b008d00b3ceb1db7b0056ade305b4a4d58cd40e91921eaf",
        "ca4322491cfdc5fcd93711096cce72cb61bd0d1a0322161b1f1a0b39e9ba1882",
        "d89fc98f9e77d5def61b5d4df53bde956b066b80fd354e2d756837f58b206645",
        "e3f2b7a10f37de6bab905d62dd88d734b81246a88b37cedef78c55c27b3b8a74" };
    static const char *const deep_hash[4] = {
        "74d6d2d141b97f4b40f2b158e7bd59e283450aa57fddafa685d31494a031e24c",
        "8ee137fc42011140cd22cf45c6583a8bac2a36de8abefbf9b1468e31f326e6f9",
        "fe85d1f39907f67ed2fc69a4b9dbfdc761c7f8cbed7ab406c6cd1224f3e2a791",
        "cfe2cfb1038ccb2edf541d66ae2485e10a15f673df313edcce691828a78ed9c9" };
    static const char *const mixed_hash[4] = {
        "13e3d6bb17ccbbd0a5a5898eb39017f7c8b451f61f3f2e26015847beb9d3a591",
        "fbaa353c02b55ea390c54f23885ce366cd7293d3b1b8bfa7bb313ebe8628f30f",
        "216ee0d7404f1e21c7546ad74a6f8903a77fa9d41d4ea8200b6708f13d1ccd09",
        "8487b7a93c6546d8fc565237c92f26d0914a119dac5584f59c49be3e173676c5" };

    diag("kernels of this CPU:");
    for (int i = 0; gemma3_isa_name(i); i++) diag("  %s", gemma3_isa_name(i));
    missing_keys_have_their_defaults(&mixed);
    exact_mode_agrees_with_transformers(&tiny);
    exact_mode_agrees_with_transformers(&deep);
    exact_mode_agrees_with_transformers(&mixed);
    default_mode_is_near(&tiny, 1e-6, 1);
    default_mode_is_near(&deep, 1e-6, 1);
    default_mode_is_near(&mixed, 1e-6, 1);
    bits_are_those_of_the_contract(&tiny, tiny_hash);
    bits_are_those_of_the_contract(&deep, deep_hash);
    bits_are_those_of_the_contract(&mixed, mixed_hash);
    half_precision_cache_costs_little(&tiny);
    half_precision_cache_costs_little(&mixed);
    for (int mode = DEFAULT; mode <= EXACT; mode++) {
        nothing_else_changes_a_bit(&tiny, mode);
        nothing_else_changes_a_bit(&mixed, mode);
        nothing_else_changes_a_bit(&deep, mode);
    }
    rows_asked_for_are_rows_of_all(&tiny);
    rows_asked_for_are_rows_of_all(&mixed);
    a_reset_state_is_a_new_one(&tiny);
    two_states_share_a_model(&tiny);
    two_states_share_a_pool(&tiny);
    the_callers_arithmetic_is_not_used(&tiny);
    a_file_in_memory_is_a_file(&tiny);
    a_file_in_memory_is_a_file(&mixed);
    a_state_lives_in_the_callers_memory(&tiny);
    the_caches_size_follows_the_window(&tiny);
    what_cannot_be_done_is_refused(&tiny);
    a_local_layer_forgets_what_left_the_window(&tiny);
    a_trace_shows_every_layer_and_changes_nothing(&tiny);
    normed_heads_are_those_before_rope(&tiny);
    what_a_trace_changes_is_computed_with(&tiny);
    results_are_of_the_rows_asked_for(&tiny);
    every_number_of_the_configuration_counts(&tiny);
    free(tiny.want), free(deep.want), free(mixed.want);
    return done_testing();
}
