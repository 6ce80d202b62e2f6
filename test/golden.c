/* golden.c - trained models against what transformers computes in float32, and against the bits of
 * the contract: the small one that comes with the source, and the real Gemma 3 270M, which is
 * fetched by make weights/gemma-3-270m-q4_k_m.gguf
 *
 * data/golden-*.vec have, for each text:  ids;  nll of each next id;  lse, log of the sum of exp;
 * "top POS" sixteen ids and their logits;  "row POS STEP N" every STEP-th logit. Of each model at
 * least one text is longer than twice its window.
 */
#include "../gemma3.h"

#include "fixture.h"

static const struct golden {
    const char *model, *data;
} goldens[] = {
    { "weights/gemma3-folktales-q4_0.gguf", "test/data/golden-folktales.vec" },
    { "weights/gemma-3-270m-q4_k_m.gguf", "test/data/golden-270m.vec" },
};

enum { MAX_IDS = 1200, TOP = 16 };

/* The sanitizers make the engine slow: there the short texts must do. */
#if defined(__SANITIZE_ADDRESS__)
enum { LONGEST = 30 };
#else
enum { LONGEST = MAX_IDS };
#endif

typedef struct text {
    char name[16];
    int n, n_tops, n_rows;
    int32_t ids[MAX_IDS];
    double nll[MAX_IDS], lse[MAX_IDS];
    char *top[MAX_IDS], *row[MAX_IDS]; /* after the position, NULL where there is none */
} text;

/* Hashes of logits under contract 1, in default and exact mode, of the positions that have a "row":
 * what gemma3 --ids NAME.ids --positions POS,POS,... --hash prints. */
static const struct {
    const char *name, *hash[2];
} bits[] = {
    { "start", { "fcabf20defb30ca0a17ba9cd0a3241ddec81caf6aa8874db28d5f62192cd7b70",
                   "b9d9d191e21131c31485e62c050a57177780c321c4954b4f9056155bdb1b915b" } },
    { "middle", { "d78e8ee4e1830f07fffd300186a01e0a28be855e01319c3f56f5d5c16fbf9c3f",
                    "ba4dbec807e3ea09e8fc186574a37a5ec16a4721525de3035780a443eda5864c" } },
    { "context", { "4eec861f3b07c8b188925f73ebe0c341ad1d09fcfe2894a58327e90695a67efe",
                     "8e61e7651928bb2c8b3ecd14a15a16e363091bf9265da8d1b0adc058ab22936b" } },
    { "capital", { "03a474032ad957bcc854300989558d0a69fac564f09f7265b39d0c718a7e5cc2",
                   "aa50cacd52790501e6030cecefa70cb9c88bc7679b2d23a889ab13d6d15bfa15" } },
    { "chat", { "b26314aec2ba6addadd08e1322ba2a4f26ff328f476274c3f4269c35d9fc608c",
                "681cdafb5444f898ea2d7c874a3041c720b11a1a11bf04275a7d97b35329c383" } },
    { "code", { "26359cfeadfd27eb06e102f17b5a07fb1d782bb48ecbe08b1fc055e320af6400",
                "c497fe8ca1299de99661c2a0f917bff1c107a072826ff559d05565674bdb3d2a" } },
    { "languages", { "5242fdc7fc58e059471c238a8f59fde09e03ff955d0100a3a08f4a21fa2591cb",
                     "e63042cd84bd8039c7d36c7091c02c3ccbdf3b1950f5d0e1feecc970c5fd449d" } },
    { "story", { "e5fac5e788745ab8010db5930a10f795ed008a4445367d30a6afa032b9748fc7",
                 "6e24c78ec9277996bdb37ba4ffc6188ca92e661464be68fbdf637bbb6bffce81" } },
};

/* Greedy ids after "The capital of France is", by transformers. */
static const int32_t answer[8] = { 506, 5279, 529, 506, 2891, 529, 7001, 236761 };

static void read_doubles(char *p, double *out, int n)
{
    for (int i = 0; i < n; i++) out[i] = strtod(p, &p);
}

/* The text that begins at *at, which then points behind it. 0: there is none. */
static int read_text(char **at, text *t)
{
    char *line = strstr(*at, "text ");
    memset(t, 0, sizeof *t);
    if (!line || sscanf(line, "text %15s %d", t->name, &t->n) != 2 || t->n > MAX_IDS) return 0;
    for (line = next_line(line); *line && strncmp(line, "text ", 5); line = next_line(line)) {
        char *p = line + 4;
        if (!strncmp(line, "ids ", 4))
            for (int i = 0; i < t->n; i++) t->ids[i] = (int32_t)next_int(&p);
        else if (!strncmp(line, "nll ", 4)) read_doubles(p, t->nll, t->n - 1);
        else if (!strncmp(line, "lse ", 4)) read_doubles(p, t->lse, t->n);
        else {
            int is_top = !strncmp(line, "top ", 4), pos = (int)next_int(&p);
            *(is_top ? &t->n_tops : &t->n_rows) += 1;
            (is_top ? t->top : t->row)[pos] = p;
        }
    }
    *at = line;
    return 1;
}

/* ---- Running -------------------------------------------------------------------------------- */

typedef struct engine {
    gemma3_pool *pool;
    gemma3_model *model;
    gemma3_state *state;
    float *logits;           /* [GEMMA3_MAX_UBATCH][n_vocab] */
    int n_vocab;
} engine;

static engine engine_new(const char *path, int exact, const char *isa)
{
    engine e = { NULL, NULL, NULL, NULL, 0 };
    gemma3_error err = { "" };
    int n_threads = gemma3_default_threads() > 2 ? gemma3_default_threads() : 2;
    e.pool = gemma3_pool_new(n_threads, &err);
    gemma3_options o = { .exact = exact, .isa = isa, .n_threads = n_threads,
                         .parallel_for = gemma3_pool_run, .pool = e.pool };
    if (e.pool) e.model = gemma3_open(path, &o, &err);
    if (e.model) {
        gemma3_params p = gemma3_default_params(e.model);
        p.n_ctx = MAX_IDS < gemma3_model_config(e.model)->n_ctx_train
                      ? MAX_IDS
                      : gemma3_model_config(e.model)->n_ctx_train;
        p.n_threads = n_threads, p.parallel_for = gemma3_pool_run, p.pool = e.pool;
        e.state = gemma3_state_new(e.model, &p, &err);
        e.n_vocab = gemma3_model_config(e.model)->n_vocab;
        e.logits = malloc((size_t)GEMMA3_MAX_UBATCH * e.n_vocab * sizeof *e.logits);
    }
    if (!ok(e.state && e.logits, "%s opens%s", path, exact ? " in exact mode" : "")) {
        diag("%s", err.text);
        exit(done_testing());
    }
    return e;
}

static void engine_free(engine *e)
{
    gemma3_state_free(e->state);
    gemma3_close(e->model);
    gemma3_pool_free(e->pool);
    free(e->logits);
}

/* ---- Agreement with transformers ------------------------------------------------------------ */

typedef struct seen {
    int n, n_tops, n_rows;   /* positions */
    double nll, want_nll;    /* sums */
    double kl, worst_kl;     /* sum and largest, see see_top */
    double lse, top, row;    /* largest differences */
    int other_first;         /* first choices that differ, though theirs leads by 1e-4 or more */
    gemma3_sha256 hash;      /* of the logits where there is a row */
} seen;

static double larger(double a, double b) { return a >= b ? a : b; } /* b when it is NaN */

/* The divergence is estimated from the sixteen likeliest: half the sum of p (log p - log q)^2. */
static void see_top(seen *s, const text *t, int pos, const float *row, int n_vocab)
{
    char *p = t->top[pos];
    int32_t id[TOP];
    float want[TOP];
    double kl = 0, lse = gemma3_nll(row, n_vocab, 0) + row[0];
    for (int i = 0; i < TOP; i++) id[i] = (int32_t)next_int(&p);
    for (int i = 0; i < TOP; i++) want[i] = next_bits(&p);
    for (int i = 0; i < TOP; i++) {
        double log_p = want[i] - t->lse[pos], log_q = row[id[i]] - lse;
        kl += 0.5 * exp(log_p) * (log_p - log_q) * (log_p - log_q);
        s->top = larger(s->top, fabs((double)row[id[i]] - want[i]));
    }
    s->n_tops++;
    s->kl += kl;
    s->worst_kl = larger(s->worst_kl, kl);
    s->lse = larger(s->lse, fabs(lse - t->lse[pos]));
    s->other_first += gemma3_argmax(row, n_vocab) != id[0] && want[0] - want[1] > 1e-4;
}

static void see(seen *s, const text *t, int pos, const float *row, int n_vocab)
{
    if (t->top[pos]) see_top(s, t, pos, row, n_vocab);
    if (t->row[pos]) {
        char *p = t->row[pos];
        int step = (int)next_int(&p), n = (int)next_int(&p);
        for (int i = 0; i < n; i++)
            s->row = larger(s->row, fabs((double)row[(size_t)i * step] - next_bits(&p)));
        s->n_rows++;
        gemma3_sha256_add_floats(&s->hash, row, (size_t)n_vocab);
    }
    if (pos + 1 < t->n) {
        s->nll += gemma3_nll(row, n_vocab, t->ids[pos + 1]);
        s->want_nll += t->nll[pos];
        s->n++;
    }
}

/* Takes the text a tile at a time and looks at every position that has a row and, in exact mode, at
 * those with a top. */
static int run(engine *e, const text *t, seen *s)
{
    int exact = gemma3_model_info(e->model)->exact;
    memset(s, 0, sizeof *s);
    gemma3_sha256_init(&s->hash);
    gemma3_state_reset(e->state);
    for (int i = 0; i < t->n; i += GEMMA3_MAX_UBATCH) {
        int rows[GEMMA3_MAX_UBATCH],
            n_rows = 0, n = t->n - i < GEMMA3_MAX_UBATCH ? t->n - i : GEMMA3_MAX_UBATCH;
        for (int k = 0; k < n; k++)
            if (t->row[i + k] || (exact && t->top[i + k])) rows[n_rows++] = k;
        if (gemma3_forward(e->state, t->ids + i, n, rows, n_rows, e->logits))
            return ok(0, "%s: %s", t->name, gemma3_state_error(e->state)) - 1;
        for (int r = 0; r < n_rows; r++)
            see(s, t, i + rows[r], e->logits + (size_t)r * e->n_vocab, e->n_vocab);
    }
    return 0;
}

static void has_bits(const engine *e, const text *t, seen *s)
{
    char hex[65];
    const char *isa = gemma3_model_info(e->model)->isa;
    int exact = gemma3_model_info(e->model)->exact;
    gemma3_sha256_end(&s->hash, hex);
    for (size_t i = 0; i < sizeof bits / sizeof *bits; i++)
        if (!strcmp(bits[i].name, t->name) &&
            !ok(!strcmp(hex, bits[i].hash[exact]), "%s, %s, %s: the bits of contract %d", t->name,
                exact ? "exact" : "default", isa, GEMMA3_CONTRACT))
            diag("  got %s", hex);
}

static void agrees(engine *e, const text *t)
{
    int exact = gemma3_model_info(e->model)->exact;
    const char *mode = exact ? "exact" : "default";
    seen s;
    if (run(e, t, &s)) return;
    ok(s.n_rows == t->n_rows && (!exact || s.n_tops == t->n_tops), "%s, %s: %d positions", t->name,
       mode, s.n);
    ok(s.kl / s.n_tops <= (exact ? 1e-10 : 4.5e-3), "%s, %s: mean KL to transformers is at most %g",
       t->name, mode, exact ? 1e-10 : 4.5e-3);
    is_close(s.nll / s.n, s.want_nll / s.n, exact ? 5e-6 : 0.1, "%s, %s: mean nll", t->name, mode);
    diag("%s, %s: mean KL %.2g, largest %.2g; logits differ by %.2g at most", t->name, mode,
         s.kl / s.n_tops, s.worst_kl, larger(s.top, s.row));
    has_bits(e, t, &s);
    if (!exact) return;
    ok(s.worst_kl <= 1e-9, "%s: and 1e-9 at every position", t->name);
    ok(s.other_first == 0, "%s: the same first choice", t->name);
    ok(s.top <= 4e-4 && s.row <= 4e-4, "%s: logits within 4e-4", t->name);
    ok(s.lse <= 4e-4, "%s: and the log of the sum of exp", t->name);
}

static void greedy(engine *e, const text *t)
{
    int32_t ids[8];
    int row = t->n - 1, n = 0;
    gemma3_state_reset(e->state);
    int failed = gemma3_forward(e->state, t->ids, t->n, &row, 1, e->logits);
    for (row = 0; !failed; failed = gemma3_forward(e->state, ids + n++, 1, &row, 1, e->logits)) {
        ids[n] = gemma3_argmax(e->logits, e->n_vocab);
        if (n == 7) break;
    }
    ok(!failed, "%s: eight tokens are generated", t->name);
    is_bits(ids, answer, sizeof answer, "%s: those that transformers chooses", t->name);
}

/* ---- All texts ------------------------------------------------------------------------------ */

static void computes_what_it_should(const struct golden *g)
{
    char *data = read_file(g->data, NULL), *at;
    static text t;

    engine e = engine_new(g->model, 1, NULL);
    for (at = data; read_text(&at, &t);) {
        if (t.n <= LONGEST || e.n_vocab < 10000) agrees(&e, &t);
        if (!strcmp(t.name, "capital")) greedy(&e, &t);
    }
    engine_free(&e);

    for (int i = 0; gemma3_isa_name(i); i++) { /* the best for all, the others for the shortest */
        e = engine_new(g->model, 0, gemma3_isa_name(i));
        for (at = data; read_text(&at, &t);) {
            seen s;
            if (i == 0 && (t.n <= LONGEST || e.n_vocab < 10000)) agrees(&e, &t);
            else if ((t.n < 10 || e.n_vocab < 10000) && !run(&e, &t, &s)) has_bits(&e, &t, &s);
        }
        engine_free(&e);
    }
    free(data);
}

int main(void)
{
    for (size_t k = 0; k < sizeof goldens / sizeof *goldens; k++) {
        FILE *f = fopen(goldens[k].model, "rb");
        if (f) fclose(f), computes_what_it_should(&goldens[k]);
        else if (k)
            skip(1, "no weights/gemma-3-270m-q4_k_m.gguf: make weights/gemma-3-270m-q4_k_m.gguf "
                    "fetches it");
        else ok(0, "%s, which comes with the source, is there", goldens[k].model);
    }
    return done_testing();
}
