/* claims.c - what is proven of the parser's cursor and of the arithmetic of sizes, for every value
 * of the arguments: each claim_ function calls the code as the parser does and says what must hold
 * then.
 *
 * test/prove/prove.py runs them symbolically. data is any address and size any number of bytes
 * behind it; the prover sees to it that nothing but those bytes is read through it, that no call
 * of broken() can be reached, and no trap of the compiler's for undefined behaviour (gcc
 * -fsanitize-undefined-trap-on-error: signed overflow, shifts, indices, null, pointers that wrap).
 */
#define GEMMA3_NO_MAIN
#define GEMMA3_NO_FILE
#include "../../gemma3.c"

void broken(void);
void broken(void) { abort(); }
static void must(int holds) { if (!holds) broken(); }

/* A cursor may stand anywhere in the file, at its end too. */
static struct cursor standing_at(const uint8_t *data, size_t size, size_t at, int failed)
{
    return (struct cursor){data + at, size - at, failed};
}

/* What every step leaves: it has not left the file, nor moved back. */
static void is_inside(const struct cursor *c, const uint8_t *data, size_t size, size_t at)
{
    size_t now = (size_t)((uintptr_t)c->p - (uintptr_t)data);
    must(now <= size && c->left == size - now);
    must(now >= at);
}

void claim_take(const uint8_t *data, size_t size, size_t at, int failed, uint64_t n);
void claim_take(const uint8_t *data, size_t size, size_t at, int failed, uint64_t n)
{
    struct cursor c = standing_at(data, size, at, failed);
    const uint8_t *p = take(&c, n);
    is_inside(&c, data, size, at);
    must(!failed || !p);
    must(!p == (c.failed != 0) || n == 0);
    if (!p) return;
    must(p == data + at && n <= size - at);
    const volatile uint8_t *byte = p;
    if (n > 0) (void)byte[0], (void)byte[n - 1];
}

void claim_take_numbers(const uint8_t *data, size_t size, size_t at, int failed);
void claim_take_numbers(const uint8_t *data, size_t size, size_t at, int failed)
{
    struct cursor c = standing_at(data, size, at, failed);
    take_u32(&c);
    is_inside(&c, data, size, at);
    take_int(&c, 8);
    is_inside(&c, data, size, at);
}

void claim_take_string(const uint8_t *data, size_t size, size_t at, int failed);
void claim_take_string(const uint8_t *data, size_t size, size_t at, int failed)
{
    struct cursor c = standing_at(data, size, at, failed);
    struct string s = take_string(&c);
    is_inside(&c, data, size, at);
    if (c.failed) must(s.n == 0);
    if (c.failed) return;
    size_t begin = (size_t)((uintptr_t)s.text - (uintptr_t)data);
    must(begin <= size && s.n <= size - begin);
}

/* Sizes do not wrap: what is too large stays too large. The product is checked for factors below
 * 32 and any other number. */
void claim_plus(size_t a, size_t b);
void claim_plus(size_t a, size_t b)
{
    size_t sum = plus(a, b);
    must(sum >= a && sum >= b);
    must(sum == SIZE_MAX || sum - a == b);
}

void claim_times(size_t a, size_t b);
void claim_times(size_t a, size_t b)
{
    size_t product = times(a, b);
    must(product == SIZE_MAX || b == 0 || a <= SIZE_MAX / b);
    must(product == SIZE_MAX || product == a * b);
}

/* A piece of memory lies behind those before it and within what the block has. */
void claim_piece(size_t used, size_t size, size_t count);
void claim_piece(size_t used, size_t size, size_t count)
{
    uint8_t *base = (uint8_t *)4096;
    struct arena a = {.base = base, .used = used, .size = size};
    uint8_t *p = piece(&a, count, 1);
    must(a.used >= used);
    if (!p) return;
    must(p == base + used && a.used <= size);
    must(count <= size - used);
}

/* What encoding n bytes needs is never less than it uses. */
void claim_encode_work(size_t n);
void claim_encode_work(size_t n)
{
    size_t work = gemma3_encode_work(n);
    must(work == SIZE_MAX || (n <= (size_t)1 << 29 && work >= n));
}

int main(void) { return 0; }
