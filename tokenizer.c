/* tokenizer.c - Gemma's tokenizer: text to ids and back, exactly as Hugging Face's does it.
 *
 * A vocabulary is a list of pieces of text, each with a score. Text becomes ids in two steps.
 *
 * 1. Whole tokens. Some pieces are taken wherever the text spells them, the longest first: runs of
 *    line ends and of tabs, HTML tags, <unused7>. They are called added tokens. The tokens that
 *    carry meaning for the model, such as <start_of_turn>, are among them, but count only when the
 *    caller says so: what a user types must not be able to end the user's turn.
 *
 * 2. Merging. What lies between is cut into characters, with U+2581 (drawn here as _) for a space.
 *    Then, again and again, of all neighbours that together spell a piece, the pair whose piece has
 *    the highest score is joined; of equal ones the leftmost. What is left is the answer. A
 *    character that is no piece is written as its UTF-8 bytes, <0xE2> and so on, which are not
 *    merged.
 *
 * Example 1. "a\n\nthe cat" holds the added token "\n\n" (108), which parts "a" from "the cat":
 *
 *     t h e _ c a t      "he" scores -5, "at" -8, "_c" -11, "th" -100, "ca" -2790
 *     t he _ c a t       "at" is next; "the" has come up with -943
 *     t he _ c at        "_c"; "cat", which has come up too, has only -8813
 *     t he _c at         "the", and last "_cat" with -5372
 *     the _cat           no pair spells a piece: 236746 108 1437 5866
 *
 * Example 2. "x  \r" has no added token. Runs of spaces are joined before anything else, to as many
 * as 31, so it is x __ \r, and "\r" is no piece: "x" 236781, two spaces 138, <0x0D> 251.
 *
 * The pairs wait in a heap, so n characters take O(n log n) steps even for a million equal letters.
 * A pair in the heap may be out of date, because a neighbour was joined to something else in the
 * meantime; it is recognised when it comes out, by its length, and thrown away.
 *
 * Which tokens are added ones is decided by their text, and only for unknown texts by the file's
 * type: published files disagree about types (Google's call <start_of_turn> a normal piece), and
 * small vocabularies have the same tokens under other ids. No id is written in this file.
 */
#include "gemma3.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(GEMMA3_NO_ERROR_TEXT)
/* Instead of snprintf, which takes 8 KB of a Cortex-M7's flash, more than this file does. The
 * formats vanish too: nothing reads them. */
static int no_sentence(char *text, size_t n, const char *format, ...)
{
    return (void)n, (void)format, *text = 0;
}
#undef snprintf
#define snprintf no_sentence
#endif

enum {
    MAX_VOCAB = 1 << 24,     /* pieces; Gemma 3 has 262,145 */
    MAX_RUN = 31,            /* the longest run of spaces, line ends or tabs that is one token */
    /* bytes encoded at once, so that indices fit in 32 bits and sizes in a size_t */
    MAX_TEXT = sizeof(size_t) > 4 ? 1 << 29 : 1 << 27,
    ALIGN = 16,              /* bytes, as no type here needs more */
};

/* What a piece is good for. */
enum kind {
    NORMAL,                  /* made of characters by merging */
    SPACES,                  /* a run of 2 to 31 spaces */
    ADDED,                   /* taken as a whole wherever the text spells it */
    SPECIAL,                 /* the same, but only with GEMMA3_SPECIAL; decodes to nothing */
    BYTE,                    /* <0x00> to <0xFF> */
    UNUSED,                  /* never produced */
};

/* It lies in the caller's memory, and behind it bucket, sorted and kind. The pieces whose text has
 * the hash of bucket b are sorted[bucket[b]] to before sorted[bucket[b + 1]]. */
struct gemma3_tokenizer {
    gemma3_vocab vocab;
    uint32_t n_buckets;          /* a power of two */
    uint32_t *bucket;            /* [n_buckets + 1] */
    int32_t *sorted;             /* [n_vocab] ids, those of a bucket in the order of compare */
    unsigned char *kind;         /* [n_vocab] enum kind */
    uint32_t longest_added[256]; /* bytes of the longest whole token that begins with this byte */
    int32_t byte[256];           /* id of <0x00> .. <0xFF>, or -1 */
    int32_t spaces[MAX_RUN + 1]; /* id of a run of [1] .. [31] spaces, or -1 */
    int32_t eos, start_of_turn, end_of_turn, im_end; /* found by text, or -1 */
};

/* ---- Text ------------------------------------------------------------------------------------ */

/* U+2581, a space in the vocabulary. */
static int is_space_mark(const char *text, size_t n)
{
    return n >= 3 && memcmp(text, "\xE2\x96\x81", 3) == 0;
}

/* Bytes the first byte of a UTF-8 character announces, 0 when no character begins so. */
static int utf8_announced(unsigned char first)
{
    if (first < 0x80) return 1;
    if (first < 0xC2 || first > 0xF4) return 0; /* a later byte, overlong, or beyond U+10FFFF */
    return first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

/* 1 when next may be byte number i (1, 2 or 3) of a character that begins with first. */
static int utf8_continues(unsigned char first, int i, unsigned char next)
{
    unsigned char low = 0x80, high = 0xBF;
    if (i == 1 && first == 0xE0) low = 0xA0;  /* below: overlong */
    if (i == 1 && first == 0xED) high = 0x9F; /* above: surrogates */
    if (i == 1 && first == 0xF0) low = 0x90;  /* below: overlong */
    if (i == 1 && first == 0xF4) high = 0x8F; /* above: beyond U+10FFFF */
    return next >= low && next <= high;
}

/* Bytes of the character at text, of which there are n > 0; 0 when it is not valid UTF-8. */
static int utf8_length(const char *text, size_t n)
{
    const unsigned char *p = (const unsigned char *)text;
    int length = utf8_announced(p[0]);
    if ((size_t)length > n) return 0;
    for (int i = 1; i < length; i++)
        if (!utf8_continues(p[0], i, p[i])) return 0;
    return length;
}

/* 1 when word is in list, where each word is parted from the next by a space. */
static int is_listed(const char *list, const char *word, size_t n)
{
    while (*list) {
        size_t length = strcspn(list, " ");
        if (length == n && memcmp(list, word, n) == 0) return 1;
        list += length + (list[length] == ' ');
    }
    return 0;
}

/* ---- What each piece is ---------------------------------------------------------------------- */

/* The tokens that Gemma's tokenizer marks as special, and the seven of FunctionGemma (Google's page
 * "FunctionGemma formatting and best practices"). */
static const char special_texts[] =
    "<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> "
    "<image_soft_token> <start_function_declaration> <end_function_declaration> "
    "<start_function_call> <end_function_call> <start_function_response> <end_function_response> "
    "<escape>";

/* Gemma has an opening and a closing token for each of these tags. */
static const char html_tags[] =
    "table caption thead tbody tfoot tr th td h1 h2 h3 h4 h5 h6 blockquote strong em b i u s sub "
    "sup code a html body img span bbox ul li div iframe footer";

static int is_run_of(char c, const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (text[i] != c) return 0;
    return 1;
}

/* How many spaces text is, when it is nothing else. Converters write runs of spaces, and only
 * those, as themselves instead of as U+2581. */
static size_t run_of_spaces(const char *text, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; count++) {
        if (text[i] != ' ' && !is_space_mark(text + i, n - i)) return 0;
        i += text[i] == ' ' ? 1 : 3;
    }
    return count;
}

/* The byte that a text such as <0x0A> stands for, or -1. */
static int byte_value(const char *text, size_t n)
{
    static const char digits[] = "0123456789ABCDEF";
    if (n != 6 || memcmp(text, "<0x", 3) != 0 || text[5] != '>') return -1;
    const char *high = memchr(digits, text[3], 16), *low = memchr(digits, text[4], 16);
    return high && low ? (int)(high - digits) * 16 + (int)(low - digits) : -1;
}

/* <unused0> and so on. */
static int is_unused_token(const char *text, size_t n)
{
    if (n < 9 || memcmp(text, "<unused", 7) != 0 || text[n - 1] != '>') return 0;
    for (size_t i = 7; i < n - 1; i++)
        if (text[i] < '0' || text[i] > '9') return 0;
    return 1;
}

/* <b>, </b> and so on. */
static int is_html_tag(const char *text, size_t n)
{
    size_t begin = n > 1 && text[1] == '/' ? 2 : 1;
    return n > begin + 1 && text[0] == '<' && text[n - 1] == '>' &&
           is_listed(html_tags, text + begin, n - begin - 1);
}

/* The text decides; the file's type only where the text says nothing. */
static enum kind kind_of(const gemma3_vocab *v, int32_t id)
{
    const char *text = v->text[id];
    size_t n = v->length[id];
    if (n == 0) return UNUSED;
    if (n == 3 && is_space_mark(text, n)) return NORMAL;
    if (text[0] == '<' || text[0] == '[') {
        if (byte_value(text, n) >= 0) return BYTE;
        if (is_listed(special_texts, text, n)) return SPECIAL;
        if (is_unused_token(text, n) || is_html_tag(text, n)) return ADDED;
        if (is_listed("<mask> [multimodal]", text, n)) return ADDED;
    }
    if (n <= MAX_RUN && (is_run_of('\n', text, n) || is_run_of('\t', text, n))) return ADDED;
    size_t spaces = run_of_spaces(text, n);
    if (spaces >= 2 && spaces <= MAX_RUN) return SPACES;
    int32_t type = v->type[id];
    if (type == 2 || type == 3) return SPECIAL;
    if (type == 4) return ADDED;
    return type == 5 || type == 6 ? UNUSED : NORMAL; /* 6, but the text names no byte */
}

/* ---- Finding a piece by its text ------------------------------------------------------------- */

static const uint32_t hash_of_nothing = 2166136261u;
/* FNV-1a, going on from the hash of what stands before text. So the hash of two pieces needs no
 * copy of their text, and those of all beginnings of a text cost no more than the whole's. */
static uint32_t hash_on(uint32_t hash, const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++) hash = (hash ^ (unsigned char)text[i]) * 16777619u;
    return hash;
}

/* Whether a piece stands before (< 0) or behind (> 0) the text a b, or has it: by length first. */
static int compare(const gemma3_vocab *v, int32_t id, const char *a, size_t n_a, const char *b,
                   size_t n_b)
{
    if (v->length[id] != n_a + n_b) return v->length[id] < n_a + n_b ? -1 : 1;
    int order = memcmp(v->text[id], a, n_a);
    return order ? order : memcmp(v->text[id] + n_a, b, n_b);
}

/* (The lowest bits of FNV-1a alone are too much alike.) */
static uint32_t *bucket_of(const gemma3_tokenizer *t, uint32_t hash)
{
    return &t->bucket[(hash ^ hash >> 15) & (t->n_buckets - 1)];
}

/* The first piece with the text a b, or -1. A bucket has one or two pieces; but it may have all of
 * them, as whoever writes a vocabulary can choose texts with one hash. So it is sorted and halved,
 * and no vocabulary costs more than n log n to build. */
static int32_t find_parts(const gemma3_tokenizer *t, uint32_t hash, const char *a, size_t n_a,
                          const char *b, size_t n_b)
{
    const uint32_t *bucket = bucket_of(t, hash);
    uint32_t low = bucket[0], high = bucket[1];
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (compare(&t->vocab, t->sorted[middle], a, n_a, b, n_b) < 0) low = middle + 1;
        else high = middle;
    }
    int32_t id = low < bucket[1] ? t->sorted[low] : -1;
    return id >= 0 && compare(&t->vocab, id, a, n_a, b, n_b) == 0 ? id : -1;
}

/* The normal piece that two pieces spell together, or -1. */
static int32_t join(const gemma3_tokenizer *t, int32_t left, int32_t right)
{
    const char *a = t->vocab.text[left], *b = t->vocab.text[right];
    size_t n_a = t->vocab.length[left], n_b = t->vocab.length[right];
    uint32_t hash = hash_on(hash_on(hash_of_nothing, a, n_a), b, n_b);
    int32_t id = find_parts(t, hash, a, n_a, b, n_b);
    return id >= 0 && t->kind[id] == NORMAL ? id : -1;
}

/* The piece with this text, but for runs of spaces, or -1. */
static int32_t find_text(const gemma3_tokenizer *t, const char *text, size_t n)
{
    return find_parts(t, hash_on(hash_of_nothing, text, n), text, n, "", 0);
}

int32_t gemma3_find(const gemma3_tokenizer *t, const char *text, size_t n)
{
    size_t spaces = run_of_spaces(text, n);
    return spaces >= 2 && spaces <= MAX_RUN ? t->spaces[spaces] : find_text(t, text, n);
}

/* ---- Building a tokenizer -------------------------------------------------------------------- */

/* The first aligned address at mem or, less than ALIGN bytes, after it. */
static void *align(void *mem)
{
    return (char *)mem + (ALIGN - (uintptr_t)mem % ALIGN) % ALIGN;
}

/* As many buckets as give each one or two pieces. */
static uint32_t buckets_for(int n_vocab)
{
    uint32_t n = 1;
    while (n < (uint32_t)n_vocab / 2) n *= 2;
    return n;
}

size_t gemma3_tokenizer_size(const gemma3_vocab *v)
{
    if (v->n_vocab < 1 || v->n_vocab > MAX_VOCAB) return 0;
    return ALIGN + sizeof(gemma3_tokenizer) + (buckets_for(v->n_vocab) + 1) * sizeof(uint32_t) +
           (size_t)v->n_vocab * (sizeof(int32_t) + 1);
}

/* 0 when value lies in low .. high. */
static int check(gemma3_error *err, const char *what, long value, long low, long high)
{
    if (value >= low && value <= high) return 0;
    if (!err) return -1;
    snprintf(err->text, sizeof err->text, "tokenizer: %s: found %ld, expected %ld to %ld", what,
             value, low, high);
    return -1;
}

static int check_vocab(const gemma3_vocab *v, gemma3_error *err)
{
    if (check(err, "number of tokens", v->n_vocab, 1, MAX_VOCAB) ||
        check(err, "bos_token_id", v->bos, -1, v->n_vocab - 1) ||
        check(err, "eos_token_id", v->eos, -1, v->n_vocab - 1) ||
        check(err, "unknown_token_id", v->unknown, -1, v->n_vocab - 1))
        return -1;
    for (int32_t id = 0; id < v->n_vocab; id++)
        if (v->length[id] > GEMMA3_PIECE_MAX) {
            char what[64];
            snprintf(what, sizeof what, "bytes in the text of token %ld", (long)id);
            return check(err, what, (long)v->length[id], 0, GEMMA3_PIECE_MAX);
        }
    return 0;
}

/* Notes what each piece is; from the last to the first, so that of equal ones the lowest counts. */
static void note_kinds(gemma3_tokenizer *t)
{
    const gemma3_vocab *v = &t->vocab;
    memset(t->byte, -1, sizeof t->byte);
    memset(t->spaces, -1, sizeof t->spaces);
    memset(t->longest_added, 0, sizeof t->longest_added);
    for (int32_t id = v->n_vocab; id-- > 0;) {
        const char *text = v->text[id];
        uint32_t n = v->length[id];
        enum kind kind = kind_of(v, id);
        t->kind[id] = (unsigned char)kind;
        if (kind == BYTE) t->byte[byte_value(text, n)] = id;
        if (kind == SPACES) t->spaces[run_of_spaces(text, n)] = id;
        if (kind == NORMAL && n == 3 && is_space_mark(text, n)) t->spaces[1] = id;
        if (kind != ADDED && kind != SPECIAL) continue;
        uint32_t *longest = &t->longest_added[(unsigned char)text[0]];
        if (*longest < n) *longest = n;
    }
}

/* Of equal texts, which a hostile vocabulary may have, the lower id stands first. */
static int is_before(const gemma3_vocab *v, int32_t a, int32_t b)
{
    int order = compare(v, a, v->text[b], v->length[b], "", 0);
    return order ? order < 0 : a < b;
}

/* Heap sort, which no order of the pieces makes slow. First the heap grows, from its middle to its
 * top; then, again and again, the top goes behind the end and the last id takes its place. */
static void sort_ids(const gemma3_vocab *v, int32_t *ids, uint32_t n)
{
    for (uint32_t begin = n / 2; n > 1;) {
        int32_t id;
        if (begin > 0) id = ids[--begin];
        else id = ids[--n], ids[n] = ids[0];
        uint32_t i = begin;
        for (uint32_t child; (child = 2 * i + 1) < n; i = child) {
            if (child + 1 < n && is_before(v, ids[child], ids[child + 1])) child++;
            if (!is_before(v, id, ids[child])) break;
            ids[i] = ids[child];
        }
        ids[i] = id;
    }
}

/* Puts the pieces in their buckets: first counts them, then fills each from its end. Runs of spaces
 * are left out, as they are written in more than one way. */
static void fill_buckets(gemma3_tokenizer *t)
{
    const gemma3_vocab *v = &t->vocab;
    memset(t->bucket, 0, (t->n_buckets + 1) * sizeof *t->bucket);
    for (int fill = 0; fill < 2; fill++) {
        for (int32_t id = 0; id < v->n_vocab; id++) {
            if (v->length[id] == 0 || t->kind[id] == SPACES) continue;
            uint32_t *bucket = bucket_of(t, hash_on(hash_of_nothing, v->text[id], v->length[id]));
            if (fill) t->sorted[--*bucket] = id;
            else ++*bucket;
        }
        for (uint32_t b = 0; !fill && b < t->n_buckets; b++) t->bucket[b + 1] += t->bucket[b];
    }
    for (uint32_t b = 0; b < t->n_buckets; b++)
        sort_ids(v, t->sorted + t->bucket[b], t->bucket[b + 1] - t->bucket[b]);
}

gemma3_tokenizer *gemma3_tokenizer_init(const gemma3_vocab *v, void *mem, size_t size,
                                        gemma3_error *err)
{
    if (check_vocab(v, err)) return NULL;
    size_t needed = gemma3_tokenizer_size(v);
    if (!mem || size < needed) {
        if (err)
            snprintf(err->text, sizeof err->text,
                     "tokenizer: found %lu bytes of memory, expected %lu",
                     (unsigned long)(mem ? size : 0), (unsigned long)needed);
        return NULL;
    }
    gemma3_tokenizer *t = align(mem);
    t->vocab = *v;
    t->n_buckets = buckets_for(v->n_vocab);
    t->bucket = (uint32_t *)(t + 1);
    t->sorted = (int32_t *)(t->bucket + t->n_buckets + 1);
    t->kind = (unsigned char *)(t->sorted + v->n_vocab);
    note_kinds(t);
    fill_buckets(t);
    t->eos = gemma3_find(t, "<eos>", 5);
    t->start_of_turn = gemma3_find(t, "<start_of_turn>", 15);
    t->end_of_turn = gemma3_find(t, "<end_of_turn>", 13);
    t->im_end = gemma3_find(t, "<|im_end|>", 10);
    return t;
}

const gemma3_vocab *gemma3_tokenizer_vocab(const gemma3_tokenizer *t) { return &t->vocab; }

int gemma3_is_stop(const gemma3_tokenizer *t, int32_t id)
{
    if (id < 0) return 0;
    for (int i = 0; i < t->vocab.n_stop; i++)
        if (id == t->vocab.stop[i]) return 1;
    return id == t->vocab.eos || id == t->eos || id == t->end_of_turn || id == t->im_end;
}

/* ---- Merging --------------------------------------------------------------------------------- */

/* A stretch of text between two added tokens is a linked list of symbols, first one per character.
 * A symbol's index never changes, so the smaller index is further left. */
struct symbol {
    int32_t prev, next;      /* -1 at the ends */
    int32_t id;              /* the piece it is so far, -1 after it was joined to its left */
};

struct pair {
    int32_t left;            /* the pair is this symbol and its next one */
    int32_t id;              /* the piece they make together */
};

struct encoder {
    const gemma3_tokenizer *t;
    struct symbol *symbol;   /* [bytes of text], the stretch in work */
    int32_t n_symbols;
    struct pair *heap;       /* [2 * bytes of text], the best pair on top */
    int32_t n_pairs;
    int32_t *ids;            /* [max_ids], the answer so far */
    int n_ids, max_ids, too_many;
    size_t n_spaces;         /* spaces read and not yet in the stretch */
    int after_unknown;       /* the last character became <unk> */
};

/* Which of two pairs is joined first. */
static int is_better(const gemma3_vocab *v, struct pair a, struct pair b)
{
    float score_a = v->score[a.id], score_b = v->score[b.id];
    return score_a > score_b || (score_a == score_b && a.left < b.left);
}

/* Adds the pair that begins at symbol left, if its two symbols make a piece. At most 2n pairs wait
 * at once: n - 1 at first, and each of n - 1 joins takes one out and puts two in. */
static void push_pair(struct encoder *e, int32_t left)
{
    int32_t right = left < 0 ? -1 : e->symbol[left].next;
    if (right < 0) return;
    struct pair new = {left, join(e->t, e->symbol[left].id, e->symbol[right].id)};
    if (new.id < 0) return;
    int32_t i = e->n_pairs++;
    for (int32_t parent; i > 0; i = parent) {
        parent = (i - 1) / 2;
        if (!is_better(&e->t->vocab, new, e->heap[parent])) break;
        e->heap[i] = e->heap[parent];
    }
    e->heap[i] = new;
}

/* Takes the best pair out. */
static struct pair pop_pair(struct encoder *e)
{
    const gemma3_vocab *v = &e->t->vocab;
    struct pair best = e->heap[0], last = e->heap[--e->n_pairs];
    int32_t i = 0;
    for (int32_t child; (child = 2 * i + 1) < e->n_pairs; i = child) {
        if (child + 1 < e->n_pairs && is_better(v, e->heap[child + 1], e->heap[child])) child++;
        if (!is_better(v, e->heap[child], last)) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = last;
    return best;
}

/* A pair is out of date when one of its symbols was joined to another in the meantime. Its left end
 * stays where it was, so it is the same text, and hence the same piece, if it is as long. */
static int is_current(const struct encoder *e, struct pair p)
{
    const uint32_t *length = e->t->vocab.length;
    const struct symbol *left = &e->symbol[p.left];
    return left->id >= 0 && left->next >= 0 &&
           length[left->id] + length[e->symbol[left->next].id] == length[p.id];
}

static void put_id(struct encoder *e, int32_t id)
{
    if (e->n_ids < e->max_ids) e->ids[e->n_ids++] = id;
    else e->too_many = 1;
}

/* Merges the stretch, writes its ids and begins a new one. */
static void end_stretch(struct encoder *e)
{
    for (int32_t i = 0; i + 1 < e->n_symbols; i++) push_pair(e, i);
    while (e->n_pairs > 0) {
        struct pair p = pop_pair(e);
        if (!is_current(e, p)) continue;
        struct symbol *left = &e->symbol[p.left], *right = &e->symbol[left->next];
        left->id = p.id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) e->symbol[left->next].prev = p.left;
        push_pair(e, left->prev);
        push_pair(e, p.left);
    }
    for (int32_t i = e->n_symbols > 0 ? 0 : -1; i >= 0; i = e->symbol[i].next)
        put_id(e, e->symbol[i].id);
    e->n_symbols = 0;
}

/* ---- Text to ids ----------------------------------------------------------------------------- */

/* A character that is a normal piece joins the stretch. */
static void add_symbol(struct encoder *e, int32_t id)
{
    int32_t i = e->n_symbols++;
    e->symbol[i] = (struct symbol){i - 1, -1, id};
    if (i > 0) e->symbol[i - 1].next = i;
    e->after_unknown = 0;
}

/* A token that takes no part in merging ends the stretch. */
static void add_token(struct encoder *e, int32_t id)
{
    end_stretch(e);
    put_id(e, id);
    e->after_unknown = 0;
}

/* A character that is no piece: its bytes, or, without tokens for all of them, <unk>, and that once
 * for any number of such characters in a row. */
static void add_unknown(struct encoder *e, const char *text, size_t n)
{
    int all = 1;
    for (size_t i = 0; i < n; i++) all = all && e->t->byte[(unsigned char)text[i]] >= 0;
    for (size_t i = 0; all && i < n; i++) add_token(e, e->t->byte[(unsigned char)text[i]]);
    if (!all && e->t->vocab.unknown >= 0 && !e->after_unknown) {
        add_token(e, e->t->vocab.unknown);
        e->after_unknown = 1;
    }
}

/* The longest run among n spaces that is one token. */
static size_t longest_run(const gemma3_tokenizer *t, size_t n)
{
    size_t run = n < MAX_RUN ? n : MAX_RUN;
    while (run > 1 && t->spaces[run] < 0) run--;
    return run;
}

/* Hugging Face's list of merges begins with those of spaces, so runs form before any word, from the
 * left, each as long as can be. A last single space may still become the beginning of a word. (A
 * vocabulary without U+2581 gets <0x20>, where Hugging Face's would get three bytes.) */
static void add_spaces(struct encoder *e)
{
    while (e->n_spaces > 0) {
        size_t run = longest_run(e->t, e->n_spaces);
        if (run > 1) add_token(e, e->t->spaces[run]);
        else if (e->t->spaces[1] >= 0) add_symbol(e, e->t->spaces[1]);
        else add_unknown(e, " ", 1);
        e->n_spaces -= run;
    }
}

/* Bytes of the longest added token that text begins with, and its id; 0 when there is none. A run
 * of spaces is one only where the text itself spells it with U+2581: Hugging Face looks for added
 * tokens before it replaces spaces. */
static size_t match_token(const gemma3_tokenizer *t, const char *text, size_t n, int flags,
                          int32_t *id)
{
    size_t longest = t->longest_added[(unsigned char)text[0]], matched = 0, marks = 0;
    uint32_t hash = hash_of_nothing;
    for (size_t length = 1; length <= longest && length <= n; length++) {
        hash = hash_on(hash, text + length - 1, 1);
        int32_t found = find_parts(t, hash, text, length, "", 0);
        int kind = found < 0 ? UNUSED : t->kind[found];
        if (kind != ADDED && !(kind == SPECIAL && flags & GEMMA3_SPECIAL)) continue;
        *id = found;
        matched = length;
    }
    while (marks < MAX_RUN && is_space_mark(text + 3 * marks, n - 3 * marks)) marks++;
    size_t run = longest_run(t, marks);
    if (run < 2 || 3 * run <= matched) return matched;
    *id = t->spaces[run];
    return 3 * run;
}

/* A whole text; at its end nothing is left open. */
static void add_text(struct encoder *e, const char *text, size_t n, int flags)
{
    while (n > 0 && !e->too_many) {
        int32_t id = -1;
        size_t length = match_token(e->t, text, n, flags, &id);
        if (length > 0) {
            add_spaces(e);
            add_token(e, id);
        } else if (text[0] == ' ' || is_space_mark(text, n)) {
            e->n_spaces++;
            length = text[0] == ' ' ? 1 : 3;
        } else {
            add_spaces(e);
            length = (size_t)utf8_length(text, n);
            if (length == 0) length = 1; /* a byte that begins no character */
            id = find_text(e->t, text, length);
            if (id >= 0 && e->t->kind[id] == NORMAL) add_symbol(e, id);
            else add_unknown(e, text, length);
        }
        text += length;
        n -= length;
    }
    add_spaces(e);
    end_stretch(e);
}

size_t gemma3_encode_work(size_t n)
{
    return n > MAX_TEXT ? SIZE_MAX
                        : ALIGN + n * (sizeof(struct symbol) + 2 * sizeof(struct pair));
}

/* 0, or -2 when n_work bytes are too few for stretches of n bytes. */
static int begin(struct encoder *e, const gemma3_tokenizer *t, size_t n, int32_t *ids, int max_ids,
                 void *work, size_t n_work)
{
    size_t needed = gemma3_encode_work(n);
    if (needed == SIZE_MAX || n_work < needed || !work) return -2;
    *e = (struct encoder){.t = t, .ids = ids, .max_ids = max_ids};
    e->symbol = align(work);
    e->heap = (struct pair *)(e->symbol + n);
    return 0;
}

int gemma3_encode_in(const gemma3_tokenizer *t, const char *text, size_t n, int flags, int32_t *ids,
                     int max_ids, void *work, size_t n_work)
{
    struct encoder e;
    if (begin(&e, t, n, ids, max_ids, work, n_work)) return -2;
    if ((flags & GEMMA3_BOS) && t->vocab.bos >= 0 && t->vocab.add_bos) add_token(&e, t->vocab.bos);
    add_text(&e, text, n, flags);
    return e.too_many ? -1 : e.n_ids;
}

#ifndef GEMMA3_NO_FILE /* what follows allocates */

int gemma3_encode(const gemma3_tokenizer *t, const char *text, size_t n, int flags, int32_t *ids,
                  int max_ids)
{
    size_t n_work = gemma3_encode_work(n);
    void *work = n_work == SIZE_MAX ? NULL : malloc(n_work);
    int result = gemma3_encode_in(t, text, n, flags, ids, max_ids, work, n_work);
    free(work);
    return result;
}

/* ---- Gemma's chat turns ---------------------------------------------------------------------- */

/* What Python's str.strip removes, which is what the template's trim is. */
static const char white_space[] =
    "\t\n\v\f\r\x1C\x1D\x1E\x1F \xC2\x85" /* the last is U+0085 */
    u8"\u00A0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200A"
    u8"\u2028\u2029\u202F\u205F\u3000";

/* Bytes of the white space character that text begins with, 0 when it is another one. */
static size_t white_space_length(const char *text, size_t n)
{
    char character[5] = "";
    int length = utf8_length(text, n);
    memcpy(character, text, (size_t)length);
    return character[0] && strstr(white_space, character) ? (size_t)length : 0;
}

/* Leaves white space at either end out of text. */
static const char *trim(const char *text, size_t *n)
{
    for (size_t k; *n > 0 && (k = white_space_length(text, *n)) > 0; *n -= k) text += k;
    while (*n > 0) {
        size_t k = 1; /* bytes of the last character */
        while (k < *n && k < 4 && (text[*n - k] & 0xC0) == 0x80) k++;
        if (white_space_length(text + *n - k, k) != k) break;
        *n -= k;
    }
    return text;
}

/* Ids of a turn whose text, from "user" to before <end_of_turn>, is ready-made. */
static int encode_turn(struct encoder *e, const char *turn, size_t n, int first)
{
    const gemma3_tokenizer *t = e->t;
    if (first && t->vocab.bos >= 0) add_token(e, t->vocab.bos);
    if (!first) add_text(e, "\n", 1, 0);
    add_token(e, t->start_of_turn);
    add_text(e, turn, n, 0);
    add_token(e, t->end_of_turn);
    add_text(e, "\n", 1, 0);
    add_token(e, t->start_of_turn);
    add_text(e, "model\n", 6, 0);
    return e->too_many ? -1 : e->n_ids;
}

/* The turn is put together before it is encoded, because tokens reach across its parts: a system
 * text that ends with a line end makes one token with the two line ends after it. */
int gemma3_encode_turn(const gemma3_tokenizer *t, const char *system, const char *text, int first,
                       int32_t *ids, int max_ids)
{
    if (t->start_of_turn < 0 || t->end_of_turn < 0) return -3;
    size_t n_text = strlen(text), n_system = first && system ? strlen(system) + 2 : 0;
    text = trim(text, &n_text);
    if (n_system > MAX_TEXT / 4 || n_text > MAX_TEXT / 4) return -2;
    size_t n = 5 + n_system + n_text, n_work = gemma3_encode_work(n + 6);
    char *turn = malloc(n + n_work); /* no wrap: n is at most half of MAX_TEXT and a few */
    if (!turn) return -2;
    memcpy(turn, "user\n", 5);
    if (n_system > 0) {
        memcpy(turn + 5, system, n_system - 2);
        memcpy(turn + 5 + n_system - 2, "\n\n", 2);
    }
    memcpy(turn + 5 + n_system, text, n_text);
    struct encoder e;
    begin(&e, t, n + 6, ids, max_ids, turn + n, n_work); /* cannot fail with this memory */
    int result = encode_turn(&e, turn, n, first);
    free(turn);
    return result;
}

#endif

/* ---- Ids to text ----------------------------------------------------------------------------- */

int gemma3_decode(const gemma3_tokenizer *t, int32_t id, int flags, char *out)
{
    if (id < 0 || id >= t->vocab.n_vocab) return 0;
    const char *text = t->vocab.text[id];
    size_t n = t->vocab.length[id], length = 0;
    enum kind kind = (enum kind)t->kind[id];
    if (kind == UNUSED || (kind == SPECIAL && !(flags & GEMMA3_SPECIAL))) return 0;
    if (kind == BYTE) {
        *(unsigned char *)out = (unsigned char)byte_value(text, n);
        return 1;
    }
    for (size_t i = 0; i < n;) {
        int mark = is_space_mark(text + i, n - i);
        out[length++] = mark ? ' ' : text[i];
        i += mark ? 3 : 1;
    }
    return (int)length;
}

/* What of a character has come when it turns out not to continue is one invalid thing, and becomes
 * one U+FFFD, as in Python and as Unicode recommends. */
int gemma3_utf8_end(gemma3_utf8 *u, char out[8])
{
    if (u->n == 0) return 0;
    u->n = 0;
    memcpy(out, "\xEF\xBF\xBD", 3);
    return 3;
}

int gemma3_utf8_push(gemma3_utf8 *u, unsigned char byte, char out[8])
{
    int n = 0;
    if (u->n > 0 && !utf8_continues(u->byte[0], u->n, byte)) n = gemma3_utf8_end(u, out);
    u->byte[u->n++] = byte;
    int announced = utf8_announced(u->byte[0]);
    if (announced == 0) return n + gemma3_utf8_end(u, out + n);
    if (u->n < announced) return n;
    memcpy(out + n, u->byte, (size_t)announced);
    u->n = 0;
    return n + announced;
}
