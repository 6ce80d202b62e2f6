/* claims.c - what is proven of the parser and of the arithmetic of sizes, for every value at once:
 * each claim_ function calls the code as the parser does and says what must hold then.
 *
 * test/prove/prove.py runs them symbolically. any() is any number, any_file() any address with any
 * number of bytes, of any content, behind it. The prover sees to it that nothing but those bytes is
 * read through it, that no call of broken() can be reached, and no trap of the compiler's for
 * undefined behaviour (gcc -fsanitize-undefined-trap-on-error: signed overflow, shifts, indices,
 * null, pointers that wrap).
 *
 * A function that is proven is not run again inside others: what its claim says of it stands in for
 * it (in prove.py: take, find_tensor, shown, sentence).
 */
#define GEMMA3_NO_MAIN
#define GEMMA3_NO_FILE
#include "../../gemma3.c"

/* The prover's own, of which the compiler may know nothing; run as a program, they do nothing. */
#define OPAQUE __attribute__((noipa))
OPAQUE uint64_t any(void);
OPAQUE uint64_t any(void) { return 0; }
OPAQUE const uint8_t *any_file(size_t size);
OPAQUE const uint8_t *any_file(size_t size) { return size ? NULL : (const uint8_t *)""; }
OPAQUE int is_readable(const void *p, size_t n);
OPAQUE int is_readable(const void *p, size_t n) { return p && n; }
OPAQUE void broken(void);
OPAQUE void broken(void) { abort(); }
OPAQUE void impossible(void);
OPAQUE void impossible(void) { exit(0); }

static void must(int holds) { if (!holds) broken(); }
static void assume(int holds) { if (!holds) impossible(); }

/* Where prove.py finds what it must know of structs. */
extern const size_t layout[];
const size_t layout[] = {offsetof(struct cursor, p), offsetof(struct cursor, left),
                         offsetof(struct cursor, failed), offsetof(struct tensor, type),
                         offsetof(struct tensor, ne), offsetof(struct tensor, offset)};

static struct opening opened;

/* ---- The cursor ---- */

struct spot {
    const uint8_t *data;
    size_t size, left;
    struct cursor c;
};

/* A cursor may stand anywhere in any file, at its end too, and may have failed. */
static void anywhere(struct spot *f)
{
    f->size = any(), f->left = any();
    assume(f->size <= (size_t)1 << 46 && f->left <= f->size);
    f->data = any_file(f->size);
    int failed = (int)any();
    assume(failed == 0 || failed == 1);
    f->c = (struct cursor){f->data + (f->size - f->left), f->left, failed};
}

/* What every step leaves: it has not left the file, nor moved back. */
static void is_inside(const struct spot *f, const struct cursor *c)
{
    must(c->left <= f->left);
    must(c->p == f->data + (f->size - c->left));
}

void claim_take(void);
void claim_take(void)
{
    struct spot f;
    anywhere(&f);
    int failed = f.c.failed;
    uint64_t n = any();
    const uint8_t *p = take(&f.c, n), *begin = f.data + (f.size - f.left);
    is_inside(&f, &f.c);
    must(f.c.failed == (failed || n > f.left));
    must(p == (f.c.failed ? NULL : begin));
    must(f.c.left == f.left - (f.c.failed ? 0 : n));
}

void claim_take_numbers(void);
void claim_take_numbers(void)
{
    struct spot f;
    anywhere(&f);
    take_u32(&f.c);
    is_inside(&f, &f.c);
    take_int(&f.c, 8);
    is_inside(&f, &f.c);
}

static void is_text(struct string s) { must(s.n == 0 || is_readable(s.text, s.n)); }

void claim_take_string(void);
void claim_take_string(void)
{
    struct spot f;
    anywhere(&f);
    struct string s = take_string(&f.c);
    is_inside(&f, &f.c);
    is_text(s);
    if (f.c.failed) must(s.n == 0);
}

/* ---- Pairs and infos ---- */

/* Of the strings of an array two are read: each finds the cursor where any other may find it, so
 * that what holds for them holds for all. */
void claim_read_kv(void);
void claim_read_kv(void)
{
    struct spot f;
    struct kv kv;
    anywhere(&f);
    int refused = read_kv(&opened, &f.c, &kv);
    is_inside(&f, &f.c);
    is_inside(&f, &kv.value);
    is_text(kv.key);
    if (refused || f.c.failed) return;
    must(kv.element < KV_TYPES && kv.element != KV_ARRAY);
    must(kv.type == KV_ARRAY || (kv.type == kv.element && kv.count == 1));
    if (kv.element == KV_STRING) return;
    must(kv.count <= kv.value.left);
    must(kv.count * kv_types[kv.element].bytes <= kv.value.left);
}

void claim_read_tensor(void);
void claim_read_tensor(void)
{
    struct spot f;
    struct tensor t;
    anywhere(&f);
    read_tensor(&opened, &f.c, &t);
    is_inside(&f, &f.c);
    is_text(t.name);
}

/* A name is at most 79 letters in a message, whatever it is. (Where it reads does not depend on
 * what, so that it is enough to run it over one letter.) */
void claim_shown(void);
void claim_shown(void)
{
    struct spot f;
    anywhere(&f);
    size_t n = any();
    const char *text = (const char *)take(&f.c, n);
    if (!text) return;
    struct shown out = shown((struct string){text, n});
    must(out.text[sizeof out.text - 1] == 0);
}

/* ---- Binding ---- */

static struct gemma3_model model;
static const uint8_t *weights;
static uint8_t *const arena = (uint8_t *)4096;

/* n bytes at p lie in the room that the model's memory has. */
static void is_room(const void *p, size_t n)
{
    size_t begin = (size_t)((uintptr_t)p - (uintptr_t)arena);
    must(begin <= opened.arena.size && n <= opened.arena.size - begin);
}

static int any_read(void *user, uint64_t offset, void *to, size_t n)
{
    (void)user;
    must(offset <= opened.from.size && n <= opened.from.size - offset);
    is_room(to, n);
    return (int)any();
}

static void any_dequantize(const struct matrix *w, int row, int n, float *out)
{
    must(row == 0 && n == 1);
    is_room(out, sizeof *out * (size_t)w->cols);
    size_t begin = (size_t)((uintptr_t)w->data - (uintptr_t)weights);
    if (begin > opened.from.n_data || w->row_bytes > opened.from.n_data - begin)
        is_room(w->data, w->row_bytes);
}

static const struct kernels any_kernels = {.dequantize = any_dequantize};

/* What a tensor of any type, shape and offset is bound to: all of its rows lie in the file. (Nor
 * can their bytes wrap: a row has at most 4 << 20 of them, and there are at most 1 << 24 rows.)
 * Room for a norm's floats is there: lay_out_model has counted it. */
static void bind_any(int is_norm)
{
    const float *norm = NULL;
    struct matrix w = {0};
    struct weight s = {.name = "blk.0.attn_q.weight", .rows = (int)any(), .cols = (int)any()};
    assume(s.rows >= is_norm && s.rows <= (is_norm ? 1 : 1 << 24));
    assume(s.cols >= 1 && s.cols <= (is_norm ? 1 << 20 : 256));
    if (is_norm) s.norm = &norm;
    else s.w = &w;
    opened.m = &model;
    opened.kernels = &any_kernels;
    opened.from.name = "x";
    opened.from.size = any(), opened.from.n_data = any(), opened.from.read = any_read;
    assume(opened.from.size <= (uint64_t)1 << 46 && opened.from.n_data <= opened.from.size);
    opened.from.data = weights = any_file(opened.from.n_data);
    opened.data = any();
    assume(opened.data <= (uint64_t)1 << 47);
    opened.alignment = 1; /* which lets every offset pass that any other does */
    opened.arena = (struct arena){.base = arena, .used = 0, .size = any()};
    assume(opened.arena.size <= (size_t)1 << 46);
    assume(opened.arena.size >= (size_t)4 * (size_t)s.cols + 63);
    if (bind(&opened, &s) || is_norm) return;
    must(w.rows >= 1 && w.rows <= 1 << 24 && w.cols == s.cols && (!s.rows || w.rows == s.rows));
    must(w.row_bytes >= 1 && w.row_bytes <= (size_t)4 << 20);
    uint64_t n = w.row_bytes * (uint64_t)w.rows;
    must(w.offset <= opened.from.size && n <= opened.from.size - w.offset);
    if (!w.data) return;
    uint64_t begin = (uint64_t)((uintptr_t)w.data - (uintptr_t)weights);
    must(begin == w.offset && begin <= opened.from.n_data && n <= opened.from.n_data - begin);
}

void claim_bind_matrix(void);
void claim_bind_matrix(void) { bind_any(0); }
void claim_bind_norm(void);
void claim_bind_norm(void) { bind_any(1); }

/* ---- Sizes ---- */

/* They do not wrap: what is too large stays too large. */
void claim_plus(void);
void claim_plus(void)
{
    size_t a = any(), b = any(), sum = plus(a, b);
    must(sum >= a && sum >= b);
    must(sum == SIZE_MAX || sum - a == b);
}

/* The product is checked for factors below 32 and any other number. */
void claim_times(void);
void claim_times(void)
{
    size_t a = any(), b = any();
    assume(b < 32);
    size_t product = times(a, b);
    must(product == SIZE_MAX || b == 0 || a <= SIZE_MAX / b);
    must(product == SIZE_MAX || product == a * b);
}

/* A piece of memory lies behind those before it and within what the block has. */
void claim_piece(void);
void claim_piece(void)
{
    size_t used = any(), size = any(), count = any();
    assume(used <= size && size <= (size_t)1 << 46);
    struct arena a = {.base = arena, .used = used, .size = size};
    uint8_t *p = piece(&a, count, 1);
    must(a.used >= used);
    if (!p) return;
    must(p == arena + used && a.used <= size);
    must(count <= size - used);
}

/* What encoding n bytes needs is never less than it uses. */
void claim_encode_work(void);
void claim_encode_work(void)
{
    size_t n = any(), work = gemma3_encode_work(n);
    must(work == SIZE_MAX || (n <= (size_t)1 << 29 && work >= 28 * n));
}

int main(void) { return 0; }
