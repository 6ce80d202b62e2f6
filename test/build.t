#!/usr/bin/env perl
# build.t - the sources build everywhere without a warning, and every build computes the same bits.
#
# Compilers and optimisation levels of this machine; AVX-512 through SIMDe's portable intrinsics where
# the CPU lacks it (TEST_SIMDE=1: anywhere). What a machine has no tool for is skipped by name. Other
# machines: ports.t.
use strict;
use warnings;
use Cwd qw(getcwd);
use Test::More;
require "./test/builds.pl";
our ($dir, @rules, @libs, %contract);

my $top = getcwd();

my @compilers = grep { tool($_) } qw(gcc clang);
@compilers = ($ENV{CC} // "cc") if !@compilers;
my $cc = tool("cc") ? "cc" : $compilers[0];

# ---- Compilers and optimisation levels -----------------------------------------------------------

my @builds = ([$cc, "-O2"]);
for my $compiler (@compilers) {
    push @builds, [$compiler, "-std=gnu17", "-O0"], [$compiler, "-std=c11", "-O2"],
        [$compiler, "-std=gnu17", "-O3"], [$compiler, "-std=c11", "-O3", "-march=native", "-ffp-contract=on"];
}
my ($i, @jobs) = (0);
for my $build (@builds) {
    my @warn = @$build == 2 ? () : @rules;
    push @jobs, ["@$build", @$build, @warn, "-o", "$dir/gemma3-" . $i++, "gemma3.c", "tokenizer.c", @libs];
}
my %built = run_all(@jobs);
for my $k (0 .. $#builds) {
    my $name = "@{$builds[$k]}";
    my ($text, $status) = @{ $built{$name} };
    SKIP: {
        skip "$name: this compiler does not know its CPU", 2 if $status && $text =~ /native/;
        is($text, "", "$name: builds without a word");
        skip "$name was not built", 1 if $status;
        computes_the_contract($name, ["$dir/gemma3-$k"]);
    }
}

for my $isa (split /\n/, (run("$dir/gemma3-0", "--isa", "list"))[0]) {
    computes_the_contract("--isa $isa", ["$dir/gemma3-0"], "--isa", $isa);
}

# What a command line may allow the compiler, the source takes back.
my @loose = map { my $c = $_; map { [$c, "-O2", @$_] } ["-freciprocal-math"], ["-funsafe-math-optimizations"],
    ["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"] } @compilers;
my %loose = run_all(map { ["@{$loose[$_]}", @{$loose[$_]}, "-w", "-o", "$dir/loose-$_", "gemma3.c", "tokenizer.c",
    @libs] } 0 .. $#loose);
for my $k (0 .. $#loose) {
    my $name = "@{$loose[$k]}";
    ok(!$loose{$name}[1], "$name: builds") or diag($loose{$name}[0]);
    is(hash_of(["$dir/loose-$k"], "tiny --exact"), $contract{"tiny --exact"}, "$name: the bits of the contract");
}

for my $compiler (@compilers) {
    my ($text, $status) = run($compiler, "-ffast-math", "-fsyntax-only", "gemma3.c");
    ok($status && $text =~ /without -ffast-math/, "$compiler -ffast-math is refused");
}

# ---- The library: no globals, no main, no files, C++ ---------------------------------------------

# Names of the writable variables of an object file. Position-dependent code, so that constant tables
# of pointers count as constants.
sub globals {
    my ($object) = @_;
    my ($text) = run("nm", $object);
    return join " ", sort map { /^\S* +[bBdDCsSgG] (\S+)$/ ? $1 : () } split /\n/, $text;
}

@jobs = ();
for my $compiler (@compilers) {
    for my $source (qw(gemma3 tokenizer)) {
        push @jobs, ["$compiler $source.c", $compiler, "-std=gnu17", "-O1", "-fno-pic", @rules, "-c", "-o",
            "$dir/$compiler-$source.o", "$source.c"];
    }
    push @jobs, ["$compiler -DGEMMA3_NO_MAIN", $compiler, "-std=c11", "-O1", "-fno-pic", @rules,
        "-DGEMMA3_NO_MAIN", "-c", "-o", "$dir/$compiler-library.o", "gemma3.c"];
    push @jobs, ["$compiler -DGEMMA3_NO_MAIN -DGEMMA3_NO_FILE", $compiler, "-std=c11", "-O1", "-fno-pic", @rules,
        "-DGEMMA3_NO_MAIN", "-DGEMMA3_NO_FILE", "-c", "-o", "$dir/$compiler-board.o", "gemma3.c"];
}
my %objects = run_all(@jobs);
is("@{$objects{$_}}", " 0", "$_: compiles without a word") for sort keys %objects;

SKIP: {
    skip "no nm", 4 * @compilers if !tool("nm");
    for my $compiler (@compilers) {
        is(globals("$dir/$compiler-gemma3.o"), "interrupted",
            "$compiler: the program's one global is what Ctrl-C sets");
        is(globals("$dir/$compiler-$_.o"), "", "$compiler: no globals in the $_") for qw(library board tokenizer);
    }
}

# The command line is a program like any other over the library: what stands below its line compiles where
# there is nothing but gemma3.h, and links with the library's objects.
{
    open my $f, "<", "gemma3.c" or die "gemma3.c: $!";
    my ($below) = do { local $/; <$f> } =~ /^(#ifndef GEMMA3_NO_MAIN\n.*^#endif)\n/ms;
    mkdir "$dir/alone";
    symlink "$top/gemma3.h", "$dir/alone/gemma3.h";
    spew("alone/main.c", "$below\n");
    for my $compiler (@compilers) {
        my ($text, $status) = run($compiler, "-std=gnu17", "-O1", "-fno-pic", "-no-pie", @rules, "-o", "$dir/alone/gemma3",
            "$dir/alone/main.c", "$dir/$compiler-library.o", "$dir/$compiler-tokenizer.o", @libs);
        is($text, "", "$compiler: the command line alone builds over gemma3.h without a word");
        SKIP: {
            skip "not built", 1 if $status;
            computes_the_contract("$compiler: the command line alone", ["$dir/alone/gemma3"]);
        }
    }
}

# A host program: opens a file's bytes in memory and prints the hash of its logits.
my $host = spew("host.c", <<'END');
#include "gemma3.h"
#include <stdio.h>
#include <stdlib.h>

static unsigned char file[1 << 20];
static int32_t ids[128];
static int rows[128];

int main(int argc, char **argv)
{
    FILE *f = fopen(argv[1], "rb"), *g = fopen(argv[2], "r");
    int n = 0;
    if (argc != 3 || !f || !g) return 2;
    size_t size = fread(file, 1, sizeof file, f);
    while (n < 128 && fscanf(g, "%d", (int *)&ids[n]) == 1) rows[n] = n, n++;
    gemma3_error err;
    gemma3_model *m = gemma3_open_memory(file, size, argv[1], NULL, &err);
    if (!m) { puts(err.text); return 1; }
    gemma3_params p = gemma3_default_params(m);
    gemma3_state *s = gemma3_state_new(m, &p, &err);
    if (!s) { puts(err.text); return 1; }
    size_t n_logits = (size_t)n * gemma3_model_config(m)->n_vocab;
    float *logits = (float *)malloc(n_logits * sizeof *logits);
    if (gemma3_forward(s, ids, n, rows, n, logits)) { puts(gemma3_state_error(s)); return 1; }
    gemma3_sha256 c;
    char hex[65];
    gemma3_sha256_init(&c);
    gemma3_sha256_add_floats(&c, logits, n_logits);
    gemma3_sha256_end(&c, hex);
    puts(hex);
    free(logits);
    gemma3_state_free(s);
    gemma3_close(m);
    fclose(f), fclose(g);
    return 0;
}
END

sub host_computes_the_contract {
    my ($name, @command) = @_;
    my ($text, $status) = run(@command);
    is($text, "", "$name: builds and links without a word");
    SKIP: {
        skip "not built", 1 if $status;
        my ($got) = run("$dir/host", "test/data/tiny.gguf", "test/data/tiny.ids");
        is($got, "$contract{tiny}\n", "$name: computes the bits of the contract");
    }
}

host_computes_the_contract("without files and threads, linked to nothing but libm",
    $cc, "-std=c11", "-O1", @rules, "-I.", "-DGEMMA3_NO_MAIN", "-DGEMMA3_NO_FILE", "-o", "$dir/host", $host,
    "gemma3.c", "tokenizer.c", "-lm");

SKIP: {
    my ($cxx) = grep { tool($_) } qw(c++ g++ clang++);
    skip "no C++ compiler", 3 if !$cxx;
    my ($text) = run($cxx, "-std=c++11", @rules, "-x", "c++", "-I.", "-c", "-o", "$dir/host.o", $host);
    is($text, "", "$cxx: gemma3.h is C++ too");
    host_computes_the_contract("a C++ program", $cc, "-no-pie", "-o", "$dir/host", "$dir/host.o",
        "$dir/$compilers[0]-library.o", "$dir/$compilers[0]-tokenizer.o", @libs);
}

# ---- AVX-512 without AVX-512 ---------------------------------------------------------------------

sub simde_header {
    return <<'END';
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>
#include <simde/x86/f16c.h>
#include <string.h>

/* What some versions of SIMDe lack or misspell, as two halves of AVX2. */
struct halves { __m256 ps[2]; };
static inline __m512 simde_join(struct halves h) { __m512 x; memcpy(&x, &h, 64); return x; }
static inline __m512 simde_int_to_float(__m512i a)
{
    __m256i i[2];
    memcpy(i, &a, 64);
    return simde_join((struct halves){ { _mm256_cvtepi32_ps(i[0]), _mm256_cvtepi32_ps(i[1]) } });
}
static inline __m512 simde_half_to_float(__m256i a)
{
    return simde_join((struct halves){ { _mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                                         _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1)) } });
}
static inline __m512i simde_u16_to_int(__m256i a)
{
    __m256i i[2] = { _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                     _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1)) };
    __m512i x;
    memcpy(&x, i, 64);
    return x;
}
static inline __m256 simde_half_of(__m512 a, int half)
{
    struct halves h;
    memcpy(&h, &a, 64);
    return h.ps[half];
}
static inline __m512 simde_mask3_fmadd(__m512 a, __m512 b, __m512 c, unsigned mask)
{
    float x[16], y[16], z[16];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int j = 0; j < 16; j++)
        if (mask >> j & 1) z[j] = __builtin_fmaf(x[j], y[j], z[j]);
    memcpy(&c, z, 64);
    return c;
}
static inline __m512 simde_maskz_loadu(unsigned mask, const float *p)
{
    __m512 a;
    float x[16] = { 0 };
    for (int j = 0; j < 16; j++)
        if (mask >> j & 1) x[j] = p[j];
    memcpy(&a, x, 64);
    return a;
}
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps
#undef _mm512_mask3_fmadd_ps
#undef _mm512_maskz_loadu_ps
#define _mm512_shuffle_f32x4(a, b, c) simde_mm512_shuffle_f32x4(a, b, c)
#define _mm512_shuffle_ps(a, b, c) simde_mm512_shuffle_ps(a, b, c)
#define _mm512_mask3_fmadd_ps(a, b, c, k) simde_mask3_fmadd(a, b, c, k)
#define _mm512_maskz_loadu_ps(k, p) simde_maskz_loadu(k, p)
#undef _mm512_madd_epi16
#undef _mm512_extractf32x8_ps
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtepu16_epi32
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_cvtepi32_ps(a) simde_int_to_float(a)
#define _mm512_cvtph_ps(a) simde_half_to_float(a)
#define _mm512_cvtepu16_epi32(a) simde_u16_to_int(a)
#define _mm512_extractf32x8_ps(a, half) simde_half_of(a, half)
END
}

# A copy of the sources whose intrinsics are SIMDe's functions, built for AVX2 and FMA alone (without
# FMA, SIMDe's fmadd would round twice).
SKIP: {
    my ($list) = run("$dir/gemma3-0", "--isa", "list");
    skip "AVX-512 through SIMDe: this CPU has AVX-512 and its kernels were tested themselves", 2
        if $list =~ /avx512vnni/ && !$ENV{TEST_SIMDE};
    skip "AVX-512 through SIMDe: this CPU has no AVX2", 2 if $list !~ /avx2/;
    skip "AVX-512 through SIMDe: no libsimde-dev", 2 if !-e "/usr/include/simde/x86/avx512.h";
    mkdir "$dir/test";
    symlink "$top/test/data", "$dir/test/data";
    symlink "$top/$_", "$dir/$_" for qw(gemma3.h tokenizer.c test/kernels.c test/tap.h test/fixture.h);
    open my $f, "<", "gemma3.c" or die "gemma3.c: $!";
    my $source = do { local $/; <$f> };
    $source =~ s/,avx512\w+//g;
    $source =~ s/__builtin_cpu_supports\("avx512\w*"\)/1/g;
    $source =~ s/#include <immintrin.h>/#include "simde.h"/;
    spew("simde.h", simde_header());
    spew("gemma3.c", $source);
    my ($text, $status) = run($cc, "-std=gnu17", "-O1", "-w", "-Wno-psabi", "-mavx2", "-mfma", "-mf16c", "-o", "$dir/simde-kernels",
        "$dir/test/kernels.c", "tokenizer.c", @libs);
    is($text, "", "AVX-512 through SIMDe: builds");
    skip "not built", 1 if $status;
    ($text, $status) = run("$dir/simde-kernels");
    is($status, 0, "AVX-512 through SIMDe: every kernel is its definition");
    diag(grep { /^not ok|^#/ } map { "$_\n" } split /\n/, $text) if $status;
}

done_testing();
