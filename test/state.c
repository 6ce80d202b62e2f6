/* state.c - conversations that are kept and taken up again, and states with numbers of their own:
 * what was computed is the same to the bit, and what does not fit is refused in a sentence. */
#include "../gemma3.h"

#include "fixture.h"

/* ---- Memory as a file ------------------------------------------------------------------------ */

typedef struct file {
    unsigned char *p;
    size_t n, room;          /* written; it is full at room bytes */
} file;

static int append(void *user, const void *bytes, size_t n)
{
    file *f = user;
    if (n > f->room - f->n) return -1;
    memcpy(f->p + f->n, bytes, n);
    f->n += n;
    return 0;
}

static int read_at_offset(void *user, uint64_t offset, void *buffer, size_t n)
{
    const file *f = user;
    if (offset > f->n || n > f->n - offset) return -1;
    memcpy(buffer, f->p + offset, n);
    return 0;
}

/* ---- Conversations --------------------------------------------------------------------------- */

static gemma3_model *open_model(const char *path, int exact)
{
    gemma3_options o = { .exact = exact };
    gemma3_error err = { "" };
    gemma3_model *m = gemma3_open(path, &o, &err);
    if (!m) printf("Bail out! %s\n", err.text), exit(1);
    return m;
}

static gemma3_state *new_state(const gemma3_model *m, int n_ctx, int n_batch,
                               gemma3_kv_type kv_type)
{
    gemma3_params p = gemma3_default_params(m);
    gemma3_error err = { "" };
    p.n_ctx = n_ctx, p.n_batch = n_batch, p.kv_type = kv_type;
    gemma3_state *s = gemma3_state_new(m, &p, &err);
    if (!s) printf("Bail out! %s\n", err.text), exit(1);
    return s;
}

enum { ROOM = 1 << 24 };

static file new_file(void) { return (file){ malloc(ROOM), 0, ROOM }; }

/* Takes n ids, keeps the state, takes the rest, and does the same with what was kept. */
static void same_afterwards(const fixture *x, int exact, gemma3_kv_type kv_type, int n)
{
    gemma3_model *m = open_model(x->path, exact);
    gemma3_state *s = new_state(m, 128, 64, kv_type), *other = new_state(m, x->n, 5, kv_type);
    file f = new_file();
    gemma3_error err = { "" };
    int last = x->n - n - 1;
    float *want = malloc(x->n_vocab * sizeof *want), *got = malloc(x->n_vocab * sizeof *got);
    gemma3_forward(s, x->ids, n, NULL, 0, NULL);
    if (!is_int(gemma3_state_save(s, append, &f, &err), 0, "%s: a state of %d tokens is saved",
                x->name, n))
        diag("  %s", err.text);
    gemma3_forward(other, x->ids, 2, NULL, 0, NULL); /* what is in it is forgotten */
    if (!is_int(gemma3_state_load(other, read_at_offset, &f, &err), 0,
                "and loaded into another shape"))
        diag("  %s", err.text);
    is_int(gemma3_state_pos(other), n, "it has as many tokens");
    is_bits(gemma3_state_ids(other), x->ids, n * sizeof *x->ids, "and the same");
    gemma3_forward(s, x->ids + n, x->n - n, &last, 1, want);
    gemma3_forward(other, x->ids + n, x->n - n, &last, 1, got);
    is_bits(got, want, x->n_vocab * sizeof *got, "what follows is the same to the bit");
    gemma3_state_free(s);
    gemma3_state_free(other);
    gemma3_close(m);
    free(want);
    free(got);
    free(f.p);
}

static void not_loaded(gemma3_state *s, file *f, const char *what, const char *sentence)
{
    gemma3_error err = { "" };
    int failed = gemma3_state_load(s, read_at_offset, f, &err);
    if (!ok(failed && !strcmp(err.text, sentence), "%s is refused", what))
        diag("  got  %s", failed ? err.text : "a state"), diag("  want %s", sentence);
    is_int(gemma3_state_pos(s), 0, "the state is empty");
}

static void what_does_not_fit(const fixture *x)
{
    gemma3_model *m = open_model(x->path, 0), *exact = open_model(x->path, 1);
    gemma3_model *foreign = open_model("test/data/tiny-62.gguf", 0);
    gemma3_state *s = new_state(m, 64, 64, GEMMA3_KV_F16), *t = new_state(m, 64, 64, GEMMA3_KV_F16);
    file f = new_file();
    gemma3_error err = { "" };
    gemma3_forward(s, x->ids, 20, NULL, 0, NULL);
    gemma3_state_save(s, append, &f, NULL);
    int wrong = 0;
    for (size_t n = f.n - 1; n < f.n; n = n > 300 ? n / 2 + 3 : n - 1) {
        file cut = { f.p, n, 0 };
        if (!gemma3_state_load(t, read_at_offset, &cut, &err) ||
            strcmp(err.text, "the saved state is truncated, or cannot be read"))
            wrong++;
        if (gemma3_state_pos(t)) wrong++;
    }
    is_int(wrong, 0, "a file cut anywhere is refused");
    file full = { malloc(f.n), 0, f.n - 1 };
    ok(gemma3_state_save(s, append, &full, &err) &&
           !strcmp(err.text, "the state cannot be written"),
       "a full disk is said");
    is_int(gemma3_state_pos(s), 20, "the state stays as it is");
    f.p[f.n / 2] ^= 1;
    not_loaded(t, &f, "a flipped bit", "the saved state is damaged: its SHA-256 differs");
    f.p[f.n / 2] ^= 1;
    f.p[3] ^= 1;
    not_loaded(t, &f, "another file", "this is no saved state of gemma3");
    f.p[3] ^= 1;
    f.p[16] = 9;
    not_loaded(t, &f, "another contract", "the state was saved with contract 9, expected 1");
    f.p[16] = 1;
    gemma3_state *small = new_state(m, 19, 64, GEMMA3_KV_F16);
    not_loaded(small, &f, "a state too long", "the state holds 20 tokens, the context only 19");
    gemma3_state *f32 = new_state(m, 64, 64, GEMMA3_KV_F32);
    not_loaded(f32, &f, "another KV type", "the state was saved with KV type 0, expected 1");
    gemma3_state *e = new_state(exact, 64, 64, GEMMA3_KV_F16);
    not_loaded(e, &f, "another mode", "the state was saved with exact mode 0, expected 1");
    gemma3_state *o = new_state(foreign, 64, 64, GEMMA3_KV_F16);
    not_loaded(o, &f, "another model", "the state was saved with another model or config");
    gemma3_params p = gemma3_default_params(m);
    gemma3_config c = *gemma3_model_config(m);
    c.rope_factor *= 2, p.n_ctx = 64, p.config = &c;
    gemma3_state *changed = gemma3_state_new(m, &p, &err);
    not_loaded(changed, &f, "another config", "the state was saved with another model or config");
    is_int(gemma3_state_load(t, read_at_offset, &f, &err), 0, "the file itself is good");
    gemma3_state *all[] = { s, t, small, f32, e, o, changed };
    for (int i = 0; i < 7; i++) gemma3_state_free(all[i]);
    gemma3_close(m), gemma3_close(exact), gemma3_close(foreign);
    free(f.p), free(full.p);
}

/* ---- Numbers of one's own -------------------------------------------------------------------- */

static void computed_with(const fixture *x, const gemma3_model *m, const gemma3_config *c,
                          float *logits)
{
    gemma3_params p = gemma3_default_params(m);
    gemma3_error err = { "" };
    int row = x->n - 1;
    p.n_ctx = x->n, p.config = c;
    gemma3_state *s = gemma3_state_new(m, &p, &err);
    if (!ok(s && !gemma3_forward(s, x->ids, x->n, &row, 1, logits),
            "a state has a config of its own"))
        diag("  %s", err.text);
    gemma3_state_free(s);
}

static void refused_config(const gemma3_model *m, gemma3_config c, const char *sentence)
{
    gemma3_params p = gemma3_default_params(m);
    gemma3_error err = { "" };
    p.config = &c;
    gemma3_state *s = gemma3_state_new(m, &p, &err);
    if (!ok(!s && !strcmp(err.text, sentence), "%s", sentence))
        diag("  got %s", s ? "a state" : err.text);
    gemma3_state_free(s);
}

static void configs(const fixture *x)
{
    gemma3_model *m = open_model(x->path, 1);
    gemma3_config c = *gemma3_model_config(m);
    float *want = malloc(x->n_vocab * sizeof *want), *got = malloc(x->n_vocab * sizeof *got);
    computed_with(x, m, NULL, want);
    computed_with(x, m, &c, got);
    is_bits(got, want, x->n_vocab * sizeof *got, "an unchanged copy gives the same logits");
    c.window--;
    computed_with(x, m, &c, got);
    ok(memcmp(got, want, x->n_vocab * sizeof *got) != 0, "another window gives others");
    c = *gemma3_model_config(m), c.rope_factor = 1;
    computed_with(x, m, &c, got);
    ok(memcmp(got, want, x->n_vocab * sizeof *got) != 0, "so does another RoPE factor");
    c = *gemma3_model_config(m), memset(c.is_local, 0, sizeof c.is_local);
    computed_with(x, m, &c, got);
    ok(memcmp(got, want, x->n_vocab * sizeof *got) != 0, "so do layers that see everything");
    c = *gemma3_model_config(m), c.d_ff++;
    refused_config(m, c, "a config with other shapes than the model's");
    c = *gemma3_model_config(m), c.rope_base_local = 0;
    refused_config(m, c, "a config with rope_base_local 0: expected a number from 1 to 1e+30");
    c = *gemma3_model_config(m), c.window = 0;
    refused_config(m, c, "a config with window 0: expected a number from 1 to 1.67772e+07");
    c = *gemma3_model_config(m), c.is_local[1] = 2;
    refused_config(m, c, "a config with is_local[1] 2: expected 0 or 1");
    gemma3_close(m);
    free(want), free(got);
}

int main(void)
{
    fixture tiny = fixture_load("tiny"), mixed = fixture_load("tiny-mixed");
    for (int exact = 0; exact <= 1; exact++)
        for (int kv_type = 0; kv_type <= 1; kv_type++) {
            same_afterwards(&tiny, exact, kv_type, 1);
            same_afterwards(&tiny, exact, kv_type, tiny.n / 2); /* longer than the window */
            same_afterwards(&tiny, exact, kv_type, tiny.n - 1);
            same_afterwards(&mixed, exact, kv_type, mixed.n / 2);
        }
    what_does_not_fit(&tiny);
    configs(&tiny);
    free(tiny.want), free(mixed.want);
    return done_testing();
}
