/* tap.h - tests that speak TAP, the Test Anything Protocol, for prove.
 *
 *     ok(cond, "a claim about %s", what);          returns cond, so: if (!ok(p, "opens")) return;
 *     is_int(got, want, "..."); is_close(got, want, tolerance, "..."); is_bits(got, want, n, "");
 *     diag("a remark"); skip(3, "why these three are left out"); skip_all("why the file is");
 *     return done_testing();                        at the end of main
 *
 * The plan is printed last, so that a crash is a failure.
 */
#ifndef TAP_H
#define TAP_H

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int tap_run, tap_failed;

#define ok(cond, ...) tap_ok((cond) != 0, __FILE__, __LINE__, #cond, __VA_ARGS__)
#define is_int(got, want, ...) tap_int(got, want, __FILE__, __LINE__, #got, __VA_ARGS__)
#define is_close(got, want, tol, ...)                                                              \
    tap_close(got, want, tol, __FILE__, __LINE__, #got, __VA_ARGS__)
#define is_bits(got, want, n, ...) tap_bits(got, want, n, __FILE__, __LINE__, #got, __VA_ARGS__)

static inline void diag(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("# ");
    vprintf(format, args);
    printf("\n");
    fflush(stdout);
    va_end(args);
}

static inline int tap_line(int pass, const char *file, int line, const char *what,
                           const char *format, va_list args)
{
    printf("%sok %d - ", pass ? "" : "not ", ++tap_run);
    vprintf(format, args);
    printf("\n");
    tap_failed += !pass;
    if (!pass) printf("#   failed at %s:%d: %s\n", file, line, what);
    fflush(stdout);
    return pass;
}

static inline int tap_ok(int pass, const char *file, int line, const char *what,
                         const char *format, ...)
{
    va_list args;
    va_start(args, format);
    tap_line(pass, file, line, what, format, args);
    va_end(args);
    return pass;
}

static inline int tap_int(long long got, long long want, const char *file, int line,
                          const char *what, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    tap_line(got == want, file, line, what, format, args);
    va_end(args);
    if (got != want) diag("  got %lld, want %lld", got, want);
    return got == want;
}

/* Within tol; a NaN is close to nothing. */
static inline int tap_close(double got, double want, double tol, const char *file, int line,
                            const char *what, const char *format, ...)
{
    int pass = got == want || fabs(got - want) <= tol;
    va_list args;
    va_start(args, format);
    tap_line(pass, file, line, what, format, args);
    va_end(args);
    if (!pass) diag("  got %.9g, want %.9g, off by %.3g > %.3g", got, want, got - want, tol);
    return pass;
}

static inline int tap_bits(const void *got, const void *want, size_t n, const char *file, int line,
                           const char *what, const char *format, ...)
{
    const unsigned char *a = got, *b = want;
    size_t i = 0, differ = 0;
    while (i < n && a[i] == b[i]) i++;
    for (size_t j = i; j < n; j++) differ += a[j] != b[j];
    va_list args;
    va_start(args, format);
    tap_line(i == n, file, line, what, format, args);
    va_end(args);
    if (i < n) diag("  %zu of %zu bytes differ, the first at %zu: got %02x, want %02x",
                    differ, n, i, a[i], b[i]);
    return i == n;
}

/* n tests that cannot be run here count as passed. */
static inline void skip(int n, const char *why)
{
    while (n-- > 0) printf("ok %d # SKIP %s\n", ++tap_run, why);
    fflush(stdout);
}

/* Before any test: the whole file cannot be run here. */
static inline void skip_all(const char *why)
{
    printf("1..0 # SKIP %s\n", why);
    exit(0);
}

static inline int done_testing(void)
{
    printf("1..%d\n", tap_run);
    fflush(stdout);
    return tap_failed != 0;
}

#endif
