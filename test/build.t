#!/usr/bin/env perl
# build.t - the sources build everywhere without a warning, and every build computes the same bits.
#
# Compilers and optimisation levels of this machine; AVX-VNNI and AVX-512 through emulated instructions
# where the CPU lacks one (TEST_EMULATED=1: anywhere). What a machine has no tool for is skipped by name.
# Other machines: ports.t.
use strict;
use warnings;
use Cwd qw(getcwd);
use Test::More;
require "./test/builds.pl";
our ($dir, @rules, @libs, %contract, $print_hash);

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

# clang has no way to take this back: such a program says so itself.
for my $compiler (@compilers) {
    run($compiler, "-O2", "-ffinite-math-only", "-w", "-o", "$dir/finite", "gemma3.c", "tokenizer.c", @libs);
    my ($text) = run("$dir/finite", "-m", "test/data/tiny.gguf", "--ids", "test/data/tiny.ids", "--exact", "--hash");
    like($text, qr/sha256 \Q$contract{"tiny --exact"}\E$|numeric contract: what is not a number is taken for one$/m,
        "$compiler -ffinite-math-only: the bits of the contract, or none");
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
for my $source (qw(gemma3 tokenizer)) {
    push @jobs, ["$cc $source.c -DGEMMA3_NO_ERROR_TEXT", $cc, "-std=c11", "-O1", @rules, "-DGEMMA3_NO_MAIN",
        "-DGEMMA3_NO_FILE", "-DGEMMA3_NO_ERROR_TEXT", "-c", "-o", "$dir/textless-$source.o", "$source.c"];
}
my %objects = run_all(@jobs);
is("@{$objects{$_}}", " 0", "$_: compiles without a word") for sort keys %objects;

SKIP: {
    skip "no nm", 4 * @compilers + 1 if !tool("nm");
    my ($needs) = run("nm", "-u", "$dir/textless-gemma3.o", "$dir/textless-tokenizer.o");
    unlike($needs, qr/printf|qsort|scanf|strto/, "without sentences a board needs no snprintf");
    for my $compiler (@compilers) {
        is(globals("$dir/$compiler-gemma3.o"), "interrupted",
            "$compiler: the program's one global is what Ctrl-C sets");
        is(globals("$dir/$compiler-$_.o"), "", "$compiler: no globals in the $_") for qw(library board tokenizer);
    }
}

# The command line is a program like any other over the library: what stands below its line compiles where
# there is nothing but gemma3.h and C11, and links with the library's objects.
{
    open my $f, "<", "gemma3.c" or die "gemma3.c: $!";
    my ($below) = do { local $/; <$f> } =~ /^(#ifndef GEMMA3_NO_MAIN\n.*^#endif)\n/ms;
    mkdir "$dir/alone";
    symlink "$top/gemma3.h", "$dir/alone/gemma3.h";
    spew("alone/main.c", "$below\n");
    for my $compiler (@compilers) {
        my ($text, $status) = run($compiler, "-std=c11", "-O1", "-fno-pic", "-no-pie", @rules, "-o", "$dir/alone/gemma3",
            "$dir/alone/main.c", "$dir/$compiler-library.o", "$dir/$compiler-tokenizer.o", @libs);
        is($text, "", "$compiler: the command line alone builds over gemma3.h without a word");
        SKIP: {
            skip "not built", 1 if $status;
            computes_the_contract("$compiler: the command line alone", ["$dir/alone/gemma3"]);
        }
    }
}

# A host program: opens a file's bytes in memory.
my $host = spew("host.c", $print_hash . <<'END');
static unsigned char file[1 << 20];

int main(int argc, char **argv)
{
    FILE *f = argc == 3 ? fopen(argv[1], "rb") : NULL;
    gemma3_error err;
    if (!f) return 2;
    size_t size = fread(file, 1, sizeof file, f);
    fclose(f);
    gemma3_model *m = gemma3_open_memory(file, size, argv[1], NULL, &err);
    if (!m) { puts(err.text); return 1; }
    int failed = print_hash(m, argv[2]);
    gemma3_close(m);
    return failed;
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

my $wrong = spew("wrong.c", <<'END');
#include "gemma3.h"
#include <string.h>

int main(void)
{
    gemma3_error err;
    memset(&err, 1, sizeof err);
    return gemma3_open_memory("no model", 8, NULL, NULL, &err) || err.text[0];
}
END
my @textless = ($cc, "-std=c11", "-O1", @rules, "-I.", "-DGEMMA3_NO_MAIN", "-DGEMMA3_NO_FILE", "-DGEMMA3_NO_ERROR_TEXT");
host_computes_the_contract("without sentences", @textless, "-o", "$dir/host", $host, "gemma3.c", "tokenizer.c", "-lm");
run(@textless, "-o", "$dir/wrong", $wrong, "gemma3.c", "tokenizer.c", "-lm");
is((run("$dir/wrong"))[1], 0, "without sentences what is no model is refused without one");

SKIP: {
    my ($cxx) = grep { tool($_) } qw(c++ g++ clang++);
    skip "no C++ compiler", 3 if !$cxx;
    my ($text) = run($cxx, "-std=c++11", @rules, "-x", "c++", "-I.", "-c", "-o", "$dir/host.o", $host);
    is($text, "", "$cxx: gemma3.h is C++ too");
    host_computes_the_contract("a C++ program", $cc, "-no-pie", "-o", "$dir/host", "$dir/host.o",
        "$dir/$compilers[0]-library.o", "$dir/$compilers[0]-tokenizer.o", @libs);
}

# ---- Another make -------------------------------------------------------------------------------

SKIP: {
    skip "no bmake", 1 if !tool("bmake");
    my ($text, $status) = run("bmake", "test");
    ok($status && $text =~ /\A.*this Makefile is for GNU make, gmake on a BSD\. cc -O2 -o gemma3 .* builds as well\.\n/ &&
        $text !~ /operator/, "a BSD's make says which make is wanted, and how to do without") or diag($text);
}

# ---- AVX-VNNI and AVX-512 without them ------------------------------------------------------------

# The few instructions that the kernels use, element by element.
sub emulation {
    return <<'END';
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define EACH(n, type, expression)                                                                  \
    {                                                                                              \
        type x;                                                                                    \
        char *to = (char *)&x;                                                                     \
        for (int j = 0; j < (n); j++) expression                                                   \
        return x;                                                                                  \
    }
#define PUT(T, value) { T one = (value); memcpy(to + j * sizeof one, &one, sizeof one); }
#define AT(T, v, j) (*(const T *)(const void *)((const char *)&(v) + (j) * sizeof(T)))

static inline int dot_of(const void *sum, const void *u, const void *x, int j)
{
    int32_t s;
    memcpy(&s, (const char *)sum + 4 * j, 4);
    for (int k = 4 * j; k < 4 * j + 4; k++) s += ((const uint8_t *)u)[k] * ((const int8_t *)x)[k];
    return s;
}
static __m256i dot_256(__m256i s, __m256i u, __m256i y) EACH(8, __m256i, PUT(int32_t, dot_of(&s, &u, &y, j)))
static __m512i dot_512(__m512i s, __m512i u, __m512i y) EACH(16, __m512i, PUT(int32_t, dot_of(&s, &u, &y, j)))
static __m512 set_512(float a) EACH(16, __m512, PUT(float, a))
static __m512 fma_512(__m512 a, __m512 b, __m512 c)
    EACH(16, __m512, PUT(float, __builtin_fmaf(AT(float, a, j), AT(float, b, j), AT(float, c, j))))
static __m512 half_512(__m256i h) EACH(16, __m512, PUT(float, _cvtsh_ss(AT(uint16_t, h, j))))
static __m512i u8_512(__m128i a) EACH(16, __m512i, PUT(int32_t, AT(uint8_t, a, j)))
static __m512i u16_512(__m256i a) EACH(16, __m512i, PUT(int32_t, AT(uint16_t, a, j)))
static __m512i copies_512(__m128i a) EACH(64, __m512i, PUT(uint8_t, AT(uint8_t, a, j % 16)))
static __m512i shuffle_512(__m512i a, __m512i b)
    EACH(64, __m512i, PUT(uint8_t, AT(uint8_t, b, j) > 127 ? 0 : AT(uint8_t, a, (j & 48) + (AT(uint8_t, b, j) & 15))))

#undef _mm512_set1_ps
#undef _mm512_fmadd_ps
#undef _mm512_cvtph_ps
#undef _mm512_cvtepu8_epi32
#undef _mm512_cvtepu16_epi32
#undef _mm512_broadcast_i32x4
#undef _mm512_shuffle_epi8
#undef _mm512_dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#define _mm512_set1_ps set_512
#define _mm512_fmadd_ps fma_512
#define _mm512_cvtph_ps half_512
#define _mm512_cvtepu8_epi32 u8_512
#define _mm512_cvtepu16_epi32 u16_512
#define _mm512_broadcast_i32x4 copies_512
#define _mm512_shuffle_epi8 shuffle_512
#define _mm512_dpbusd_epi32 dot_512
#define _mm256_dpbusd_avx_epi32 dot_256
END
}

# A copy of the sources whose intrinsics are these functions, built for AVX2 and FMA alone.
SKIP: {
    my ($list) = run("$dir/gemma3-0", "--isa", "list");
    skip "emulated kernels: this CPU has AVX-VNNI and AVX-512 and their kernels were tested themselves", 4
        if $list =~ /avx512vnni/ && $list =~ /avxvnni/ && !$ENV{TEST_EMULATED};
    skip "emulated kernels: this CPU has no AVX2", 4 if $list !~ /avx2/;
    mkdir "$dir/test";
    symlink "$top/test/data", "$dir/test/data";
    symlink "$top/$_", "$dir/$_" for qw(gemma3.h tokenizer.c test/kernels.c test/tap.h test/fixture.h);
    open my $f, "<", "gemma3.c" or die "gemma3.c: $!";
    my $source = do { local $/; <$f> };
    $source =~ s/,avx512\w+|,avxvnni//g;
    $source =~ s/__builtin_cpu_supports\("avx512\w*"\)|__get_cpuid_count\(.*?\) && \(a >> 4 & 1\)/1/g;
    $source =~ s/#include <immintrin.h>/#include "emulated.h"/;
    spew("emulated.h", emulation());
    spew("gemma3.c", $source);
    my ($text, $status) = run($cc, "-std=gnu17", "-O1", "-w", "-Wno-psabi", "-fno-strict-aliasing", "-mavx2", "-mfma",
        "-mf16c", "-o", "$dir/emulated-kernels", "$dir/test/kernels.c", "tokenizer.c", @libs);
    is($text, "", "emulated kernels: build");
    skip "not built", 3 if $status;
    ($text, $status) = run("$dir/emulated-kernels");
    is($status, 0, "emulated kernels: every kernel is its definition");
    diag(grep { /^not ok|^#/ } map { "$_\n" } split /\n/, $text) if $status;
    like($text, qr/^ok .*Q6_K, $_: /m, "emulated kernels: $_ among them") for qw(avxvnni avx512vnni);
}

done_testing();
