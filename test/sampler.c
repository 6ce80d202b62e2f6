/* sampler.c - choosing tokens: the stored choices of an independent simulation, what each option
 * does by itself, the figures made of logits, and SHA-256. */
#define GEMMA3_NO_MAIN
#include "../gemma3.c"

#include "fixture.h"

#include <fenv.h>

enum { MAX_VOCAB = 4096 };

static gemma3_candidate scratch[MAX_VOCAB];

/* A sampler that changes nothing: temperature 1, all tokens. */
static gemma3_sampler plain(uint64_t seed)
{
    gemma3_sampler s = gemma3_sampler_new(seed);
    s.top_k = 0, s.top_p = 1;
    return s;
}

/* Sampling changes the logits of ids that the penalty is for: it gets a copy. */
static int32_t next(gemma3_sampler *s, const float *logits, int n)
{
    static float copy[MAX_VOCAB];
    memcpy(copy, logits, (size_t)n * sizeof *copy);
    return gemma3_sample(s, copy, n, scratch);
}

static float next_uniform(gemma3_sampler *s) /* xorshift64*, its upper 24 bits */
{
    uint64_t x = s->rng;
    x ^= x >> 12;
    x ^= x << 25;
    x ^= x >> 27;
    s->rng = x;
    return (float)(x * 0x2545F4914F6CDD1D >> 40) / 16777216.0f;
}

/* ---- The stored sequences -------------------------------------------------------------------- */

static void is_sequence(char **text, const float *rows, int n_rows, int n_vocab)
{
    gemma3_sampler s = gemma3_sampler_new(strtoull(*text, text, 10));
    s.temperature = strtof(*text, text);
    s.top_k = (int)next_int(text);
    s.top_p = strtof(*text, text);
    s.min_p = strtof(*text, text);
    s.repeat_penalty = strtof(*text, text);
    int n = (int)next_int(text), n_same = 0;
    for (int i = 0; i < n; i++) {
        int32_t id = next(&s, rows + i % n_rows * n_vocab, n_vocab);
        n_same += id == next_int(text);
        gemma3_sampler_accept(&s, id);
    }
    is_int(n_same, n, "temperature %g, top-k %d, top-p %g, min-p %g, penalty %g: the same choices",
           s.temperature, s.top_k, s.top_p, s.min_p, s.repeat_penalty);
}

static void stored_sequences(void)
{
    static float rows[3 * MAX_VOCAB];
    char *data = read_file("test/data/sampler.vec", NULL), *p = strstr(data, "\nlogits ") + 8;
    int n_rows = (int)next_int(&p), n_vocab = (int)next_int(&p), n_cases = 0;
    for (int i = 0; i < n_rows * n_vocab; i++) rows[i] = next_bits(&p);
    while ((p = strstr(p, "\ncase "))) {
        p += 6;
        is_sequence(&p, rows, n_rows, n_vocab);
        n_cases++;
    }
    is_int(n_cases, 9, "all of them");
    free(data);
}

/* ---- Each option by itself ------------------------------------------------------------------- */

static void greedy(void)
{
    const float nan = float_of(0x7fc00000), inf = float_of(0x7f800000);
    const float ties[] = { 1, 3, 3, 2 }, with_nan[] = { nan, -5, nan, -4 }, none[] = { nan, nan };
    const float low[] = { nan, -inf, -inf }, high[] = { 1, inf, inf };
    is_int(gemma3_argmax(ties, 4), 1, "of equal ones the lowest id is the largest");
    is_int(gemma3_argmax(with_nan, 4), 3, "what is not a number never wins");
    is_int(gemma3_argmax(none, 2), 0, "nor when there is nothing else: then it is id 0");
    is_int(gemma3_argmax(low, 3), 0, "-infinity does not win either");
    gemma3_sampler s = plain(1);
    s.temperature = 0;
    is_int(next(&s, ties, 4), 1, "temperature 0 takes the largest");
    is_int(next(&s, with_nan, 4), 3, "which is a number");
    s.temperature = 1;
    is_int(next(&s, high, 3), 1, "an infinite logit is chosen at any temperature");
    is_int(next(&s, none, 2), 0, "without any number the choice is id 0");
    int n_numbers = 0;
    for (int i = 0; i < 100; i++) n_numbers += next(&s, with_nan, 4) % 2;
    is_int(n_numbers, 100, "what is not a number is never drawn");
    s.top_k = 1;
    for (int i = 0; i < 100; i++) n_numbers += next(&s, ties, 4) == 1;
    is_int(n_numbers, 200, "top-k 1 is greedy, ties to the lower id");
}

/* The set of ids that come up in many draws, as bits. */
static unsigned drawn(gemma3_sampler s, const float *logits, int n)
{
    unsigned set = 0;
    for (int i = 0; i < 20000; i++) set |= 1u << next(&s, logits, n);
    return set;
}

static void restrictions(void)
{
    /* probabilities 1/2, 1/4, 1/8, 1/16, 1/32, 1/32, in another order */
    const float half = 0.693147182f;
    const float logits[] = { -3 * half, -5 * half, -1 * half, -5 * half, -2 * half, -4 * half };
    gemma3_sampler s = plain(3);
    is_int(drawn(s, logits, 6), 0x3f, "without restriction everything is drawn");
    s.top_k = 2;
    is_int(drawn(s, logits, 6), 0x14, "top-k 2 leaves two");
    s.top_k = 5;
    is_int(drawn(s, logits, 6), 0x37, "of equal ones the lower id is left");
    s.top_k = 100;
    is_int(drawn(s, logits, 6), 0x3f, "a top-k above the vocabulary leaves all");
    s = plain(4);
    s.top_p = 0.74f;
    is_int(drawn(s, logits, 6), 0x14, "top-p 0.74 leaves 1/2 and 1/4");
    s.top_p = 0.76f;
    is_int(drawn(s, logits, 6), 0x15, "top-p 0.76 leaves 1/8 too");
    s.top_p = 0;
    is_int(drawn(s, logits, 6), 0x04, "top-p 0 leaves one");
    s = plain(5);
    s.min_p = 0.2f;
    is_int(drawn(s, logits, 6), 0x15, "min-p 0.2 leaves those with a fifth of the largest");
    s.min_p = 1;
    is_int(drawn(s, logits, 6), 0x04, "min-p 1 leaves one");
}

static void probabilities(void)
{
    const float logits[] = { 0, 0.693147182f, 1.38629436f }; /* 1/7, 2/7, 4/7 */
    for (int hot = 0; hot <= 1; hot++) {
        double total = hot ? 1 + sqrt(2) + 2 : 7, n[3] = { 0 };
        gemma3_sampler s = plain(11);
        if (hot) s.temperature = 2;
        for (int i = 0; i < 40000; i++) n[next(&s, logits, 3)] += 1.0 / 40000;
        for (int i = 0; i < 3; i++)
            is_close(n[i], (hot ? pow(2, i / 2.0) : pow(2, i)) / total, 0.01,
                     "temperature %d: id %d comes as often as it should", 1 + hot, i);
    }
}

static void repeat_penalty(void)
{
    const float logits[] = { 3, 2, 1, -1 };
    gemma3_sampler s = plain(1);
    s.temperature = 0;
    s.repeat_penalty = 2;
    is_int(next(&s, logits, 4), 0, "nothing has been seen");
    gemma3_sampler_accept(&s, 0);
    is_int(next(&s, logits, 4), 1, "3 / 2 is less than 2");
    for (int i = 0; i < 5; i++) gemma3_sampler_accept(&s, 1);
    is_int(next(&s, logits, 4), 0, "an id seen five times is penalised once: 3 / 2 against 2 / 2");
    const float negative[] = { -1, -1.5f };
    is_int(next(&s, negative, 2), 0, "negative logits become more so: -2 and -3");
    gemma3_sampler_accept(&s, -7);
    gemma3_sampler_accept(&s, 1 << 30);
    is_int(next(&s, logits, 4), 0, "ids outside the vocabulary do not matter");
    for (int i = 0; i < 61; i++) gemma3_sampler_accept(&s, 3);
    is_int(next(&s, logits, 4), 0, "after 63 others an id is out of the window of 64");
    s = plain(1);
    s.temperature = 0, s.repeat_penalty = 2;
    gemma3_sampler_accept(&s, 0);
    for (int i = 0; i < 63; i++) gemma3_sampler_accept(&s, 3);
    is_int(next(&s, logits, 4), 1, "and after 63 in the same window it still counts");
    gemma3_sampler_accept(&s, 3);
    is_int(next(&s, logits, 4), 0, "but not after 64");
    for (int i = 0; i < 1000; i++) gemma3_sampler_accept(&s, i % 2);
    is_int(next(&s, logits, 4), 0, "a thousand ids later too");
}

/* None but the k best is chosen, and a seed decides everything. */
static void many_tokens(void)
{
    static float logits[MAX_VOCAB];
    uint32_t random = 1;
    for (int i = 0; i < MAX_VOCAB; i++) {
        random = random * 1664525 + 1013904223;
        logits[i] = (float)(random >> 22) / 128; /* many ties */
    }
    for (int k = 1; k <= MAX_VOCAB; k = 3 * k + 1) {
        gemma3_sampler s = plain(9), t = plain(9), u = plain(10);
        int n_outside = 0, n_same = 0, n_other = 0;
        s.top_k = t.top_k = u.top_k = k;
        s.temperature = t.temperature = u.temperature = 8;
        for (int i = 0; i < 300; i++) {
            int32_t id = next(&s, logits, MAX_VOCAB);
            int n_before = 0;
            for (int j = 0; j < MAX_VOCAB; j++)
                n_before += logits[j] > logits[id] || (logits[j] == logits[id] && j < id);
            n_outside += n_before >= k;
            n_same += id == next(&t, logits, MAX_VOCAB);
            n_other += id != next(&u, logits, MAX_VOCAB);
        }
        ok(n_outside == 0 && n_same == 300 && (k == 1 || n_other > 0),
           "top-k %d of %d: only the best, the same with the same seed", k, MAX_VOCAB);
    }
}

/* At a high temperature neighbouring logits have equal weights; the logits still order them. */
static void order_is_by_logit(void)
{
    const float near[] = { 1, 1.00000012f }, penalized[] = { 1, 2 };
    int n_first = 0, n_low = 0;
    for (int seed = 0; seed < 200; seed++) {
        gemma3_sampler s = plain(seed), copy = s;
        float u = next_uniform(&copy);
        s.temperature = 100;
        int32_t id = next(&s, near, 2);
        if (u < 0.5f) n_low++, n_first += id == 1;
    }
    ok(n_low > 50 && n_first == n_low, "of equal weights the larger logit comes first");
    gemma3_sampler s = plain(1);
    s.temperature = 100, s.top_p = 0, s.repeat_penalty = 2;
    gemma3_sampler_accept(&s, 1);
    is_int(next(&s, penalized, 2), 0, "of equal logits, after the penalty, the lower id");
    s = plain(1);
    s.temperature = 1000, s.top_p = 0.2f;
    const float five[] = { 5, 5.00000048f, 5.00000095f, 5.00000143f, 5.00000191f };
    is_int(drawn(s, five, 5), 0x10, "top-p keeps the larger logit of equal weights");
}

/* Rule 8 in its plainest form: everything sorted, then summed. */
static int by_order(const void *a, const void *b)
{
    const gemma3_candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id - y->id;
}

static int32_t plainly(gemma3_sampler *s, const float *logits, int n)
{
    static gemma3_candidate c[MAX_VOCAB];
    static float e[MAX_VOCAB];
    float lane[16] = { 0 }, sum = 0, kept = 0;
    for (int i = 0; i < n; i++) {
        c[i] = (gemma3_candidate){ logits[i], i };
        for (int j = 0; j < GEMMA3_PENALTY_WINDOW && j < s->n_last; j++)
            if (s->last[j] == i) {
                float r = s->repeat_penalty;
                c[i].logit = logits[i] > 0 ? logits[i] / r : logits[i] * r;
                break;
            }
        if (isnan(c[i].logit)) c[i].logit = -float_of(0x7f800000);
    }
    qsort(c, n, sizeof *c, by_order);
    int n_left = s->top_k && s->top_k < n ? s->top_k : n, k = 0;
    if (n_left == 1 || isinf(c[0].logit)) return c[0].id;
    for (int i = 0; i < n; i++) e[i] = 0;
    for (int i = 0; i < n_left; i++)
        e[c[i].id] = exp_f32((c[i].logit - c[0].logit) / s->temperature);
    for (int i = 0; i < n; i++) lane[i % 16] += e[i];
    float limit = s->top_p * join_lanes(lane);
    while (k < n_left && (k == 0 || sum < limit)) sum += e[c[k++].id];
    for (int i = 0; i < k; i++) kept += e[c[i].id] >= s->min_p ? e[c[i].id] : 0;
    float u = next_uniform(s) * kept;
    int32_t id = c[0].id;
    sum = 0;
    for (int i = 0; i < k && !(sum > u); i++)
        if (e[c[i].id] >= s->min_p) sum += e[c[i].id], id = c[i].id;
    return id;
}

/* A row of one of five kinds: a few values many times, neighbouring floats, spread as a model's,
 * rising, with NaN and infinities. */
static void fill(float *logits, int n, int kind, uint32_t *random)
{
    for (int j = 0; j < n; j++) {
        uint32_t r = *random = *random * 1664525 + 1013904223;
        switch (kind) {
        case 0:  logits[j] = (float)(r >> 24) / 16; break;
        case 1:  logits[j] = float_of(0x40400000 + (r >> 26)); break;
        case 2:  logits[j] = (float)log((r + 1.0) / 4294967297.0) * 3; break;
        case 3:  logits[j] = (float)j / 256; break;
        default: logits[j] = r >> 29 ? (float)(r >> 8 & 0xffff) / 8192 - 4 :
                             float_of(r >> 28 & 1 ? 0x7fc00000 : 0xff800000);
        }
    }
}

/* Short and long rows, every option; ids are accepted, so that the penalty has something to do. */
static void as_the_plainest_form(void)
{
    static const int top_k[] = { 0, 20, 64, 0, 1, 1500, 300 };
    static const float top_p[] = { 0.9f, 1, 0.95f, 0.5f, 0.999f }, min_p[] = { 0, 0, 0.1f, 0.01f };
    static const float temperature[] = { 1, 1.5f, 40, 0.3f }, penalty[] = { 1, 1.3f, 0.7f };
    static float logits[MAX_VOCAB];
    uint32_t random = 7;
    int n_same = 0, n = 0;
    for (int i = 0; i < 600; i++) {
        int n_vocab = i % 3 ? 1 + i : MAX_VOCAB;
        fill(logits, n_vocab, i % 5, &random);
        gemma3_sampler s = plain((uint64_t)i);
        s.top_k = top_k[i % 7], s.top_p = top_p[i / 2 % 5], s.min_p = min_p[i / 3 % 4];
        s.temperature = temperature[i / 5 % 4], s.repeat_penalty = penalty[i / 11 % 3];
        for (int j = 0; j < 80; j++) gemma3_sampler_accept(&s, i * j % (2 * n_vocab));
        gemma3_sampler t = s;
        for (int k = 0; k < 3; k++, n++) {
            int32_t id = next(&s, logits, n_vocab);
            n_same += id == plainly(&t, logits, n_vocab) && s.rng == t.rng;
            gemma3_sampler_accept(&s, id);
            gemma3_sampler_accept(&t, id);
        }
    }
    is_int(n_same, n, "choices are those of sorting everything");
}

/* ---- Figures --------------------------------------------------------------------------------- */

static void figures(void)
{
    static float logits[MAX_VOCAB];
    for (int i = 0; i < MAX_VOCAB; i++) logits[i] = 3;
    is_close(gemma3_nll(logits, MAX_VOCAB, 17), log(MAX_VOCAB), 1e-13, "nll of equal logits");
    double sum = 0, worst = 0;
    for (int i = 0; i < MAX_VOCAB; i++)
        logits[i] = (float)((i * 2654435761u >> 7) % 1000) / 20 - 30;
    for (int i = 0; i < MAX_VOCAB; i++) sum += exp((double)logits[i]);
    for (int i = 0; i < MAX_VOCAB; i++)
        worst = fmax(worst, fabs(gemma3_nll(logits, MAX_VOCAB, i) - (log(sum) - logits[i])));
    ok(worst < 1e-12, "nll of every token of a wild row");
    const float two[] = { 0, -1000 };
    is_close(gemma3_nll(two, 2, 1), 1000, 0, "nll of the impossible is finite");
    const float bad[] = { 0, float_of(0x7fc00000) };
    ok(isnan(gemma3_nll(bad, 2, 0)), "a logit that is not a number shows");
    worst = 0;
    for (double x = -700; x < 700; x += 0.37) worst = fmax(worst, fabs(gemma3_exp(x) / exp(x) - 1));
    ok(worst < 1e-15, "exp is the C library's within 1e-15");
    worst = 0;
    for (double x = 1e-300; x < 1e300; x *= 1.37) {
        double l = log(x);
        worst = fmax(worst, fabs(gemma3_log(x) - l) / fmax(1, fabs(l)));
    }
    ok(worst < 1e-15, "and log");
}

/* Rule 9's sum by its definition. */
static double sum_exp_defined(const float *logits, int n, float max)
{
    double lane[16] = { 0 };
    for (int j = 0; j < n; j++) lane[j % 16] += exp_double((double)logits[j] - max);
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++) lane[j] += lane[j + step];
    return lane[0];
}

/* Rows of any length and spread; some with what is no number, or far below the largest. */
static void sums_of_scores(void)
{
    static float logits[MAX_VOCAB];
    static const float spread[] = { 1, 30, 600, 690, 710, 2000, 1e30f };
    uint32_t random = 5;
    for (int k = 0; k < N_KERNELS; k++) {
        int n_same = 0, n_rows = 0;
        if (!cpu_has(all_kernels[k]->name)) {
            skip(1, all_kernels[k]->name);
            continue;
        }
        for (int row = 0; row < 700; row++, n_rows++) {
            int n = row % 10 ? 1 + row : MAX_VOCAB - row % 64;
            for (int j = 0; j < n; j++) {
                random = random * 1664525 + 1013904223;
                logits[j] = (float)(random >> 8) * -0x1p-24f * spread[row % 7];
            }
            if (row % 11 == 1) logits[n / 2] = float_of(0xff800000);
            if (row % 13 == 1) logits[n / 2] = float_of(0x7fc00000);
            if (row % 17 == 1) logits[n / 2] = float_of(0x7f800000);
            for (int j = 0; row % 19 == 1 && j < n; j += 7) logits[j] = -690 - (float)(j % 3) / 64;
            float max = largest_of(logits, n);
            double want = sum_exp_defined(logits, n, max);
            double got = all_kernels[k]->sum_exp(logits, n, max);
            n_same += !memcmp(&got, &want, sizeof got) || (isnan(got) && isnan(want));
        }
        is_int(n_same, n_rows, "%s: the sum under a score is the definition's, bit for bit",
               all_kernels[k]->name);
    }
}

static void rounding_of_the_caller(void)
{
#if defined(FE_UPWARD)
    static float logits[MAX_VOCAB];
    for (int i = 0; i < MAX_VOCAB; i++) logits[i] = (float)((i * 2654435761u >> 7) % 1000) / 100;
    gemma3_sampler s = plain(1), t = plain(1);
    s.temperature = t.temperature = 1.3f;
    int n_same = 0;
    double want = gemma3_nll(logits, MAX_VOCAB, 5);
    for (int i = 0; i < 50; i++) {
        int32_t id = next(&s, logits, MAX_VOCAB);
        fesetround(FE_UPWARD);
        n_same += id == next(&t, logits, MAX_VOCAB);
        double got = gemma3_nll(logits, MAX_VOCAB, 5);
        n_same += fegetround() == FE_UPWARD && !memcmp(&got, &want, sizeof got);
        fesetround(FE_TONEAREST);
    }
    is_int(n_same, 100, "the caller's rounding changes no choice and no figure, and stays");
#else
    skip(1, "this machine has one rounding");
#endif
}

/* ---- SHA-256 --------------------------------------------------------------------------------- */

static void is_sha256(const char *text, size_t n, size_t step, const char *want, const char *what)
{
    gemma3_sha256 c;
    char hex[65];
    gemma3_sha256_init(&c);
    for (size_t i = 0; i < n; i += step)
        gemma3_sha256_add(&c, text + i, n - i < step ? n - i : step);
    gemma3_sha256_end(&c, hex);
    if (!ok(!strcmp(hex, want), "SHA-256 of %s", what)) diag("  got %s", hex);
}

static void sha256(void)
{
    static const char two_blocks[] = "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq";
    static const char want[] = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
    is_sha256("", 0, 1,
              "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
              "nothing");
    is_sha256("abc", 3, 1,
              "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
              "abc");
    is_sha256(two_blocks, 56, 56,
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
              "56 bytes, whose length needs a block of its own");
    char *a = malloc(1000000);
    memset(a, 'a', 1000000);
    is_sha256(a, 1000000, 1000000, want, "a million times a");
    is_sha256(a, 1000000, 63, want, "the same in pieces of 63");
    is_sha256(a, 1000000, 129, want, "the same in pieces of 129");
    free(a);
    const float x[] = { 1, -2.5f };
    gemma3_sha256 c, d;
    char got[65], same[65];
    gemma3_sha256_init(&c);
    gemma3_sha256_add_floats(&c, x, 2);
    gemma3_sha256_end(&c, got);
    gemma3_sha256_init(&d);
    gemma3_sha256_add(&d, "\0\0\x80\x3f\0\0\x20\xc0", 8);
    gemma3_sha256_end(&d, same);
    ok(!strcmp(got, same), "floats are added as little-endian bytes");
}

int main(void)
{
    stored_sequences();
    greedy();
    restrictions();
    probabilities();
    repeat_penalty();
    many_tokens();
    order_is_by_logit();
    as_the_plainest_form();
    figures();
    sums_of_scores();
    rounding_of_the_caller();
    sha256();
    return done_testing();
}
