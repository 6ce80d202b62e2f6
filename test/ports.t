#!/usr/bin/env perl
# ports.t - the unedited files on other machines: each build whose compiler is installed runs under the
# emulator that is installed, and computes the bits of the contract: default, exact, and with an F32 cache.
# A table at the end says what ran. What a machine has no tool for is skipped by name. TEST_ALL_PORTS=1
# adds targets that take long to build.
use strict;
use warnings;
use Cwd qw(getcwd);
use File::Path qw(make_path);
use Test::More;
require "./test/builds.pl";
our ($dir, @rules, @libs, %contract, $print_hash, $make);

my @zig = $ENV{ZIG} ? ($ENV{ZIG}) : tool("zig") ? ("zig") :
    (run("python3", "-m", "ziglang", "version"))[1] == 0 ? qw(python3 -m ziglang) : ();
my $top = getcwd();
my %table; # port => what became of it

$ENV{WINEDEBUG} //= "-all";
sub gcc { my ($triple, @flags) = @_; return ["$triple-gcc", qw(-O1 -static), @flags] } # built by make
sub zig { my ($triple, @flags) = @_; return @zig ? [@zig, "cc", "-target", $triple, qw(-std=c11 -O1), @flags] : ["zig"] }

# name, compiler with its flags, emulator, remark. Without an emulator the build is all there is to test.
my @ports = (
    ["aarch64 Linux, gcc", gcc("aarch64-linux-gnu"), [qw(qemu-aarch64 -cpu max)]],
    ["armv7 Linux, gcc", gcc("arm-linux-gnueabihf"), ["qemu-arm"], "32 bits"],
    ["i686 Linux, gcc", gcc("i686-linux-gnu", qw(-msse2 -mfpmath=sse)), ["qemu-i386"], "32 bits"],
    ["riscv64 Linux, gcc", gcc("riscv64-linux-gnu"), ["qemu-riscv64"]],
    ["s390x Linux, gcc", gcc("s390x-linux-gnu"), ["qemu-s390x"], "big-endian"],
    ["x86_64 Windows, gcc", gcc("x86_64-w64-mingw32"), ["wine"]],
    ["x86_64 Linux, musl, clang", zig("x86_64-linux-musl"), []],
    ["mips Linux, musl, clang", zig("mips-linux-musleabihf"), ["qemu-mips"], "big-endian, 32 bits, no FMA"],
    ["aarch64 macOS", zig("aarch64-macos"), undef],
    ["x86_64 macOS", zig("x86_64-macos"), undef],
    ["x86_64 FreeBSD", zig("x86_64-freebsd"), undef],
    ["x86_64 NetBSD", zig("x86_64-netbsd"), undef],
);
push @ports, (
    ["powerpc64 Linux, musl, clang", zig("powerpc64-linux-musl"), ["qemu-ppc64"], "big-endian"],
    ["riscv32 Linux, musl, clang", zig("riscv32-linux-musl"), ["qemu-riscv32"], "32 bits"],
    ["loongarch64 Linux, musl, clang", zig("loongarch64-linux-musl"), ["qemu-loongarch64"]],
    ["armv5 Linux, musl, clang", zig("arm-linux-musleabi"), ["qemu-arm"], "32 bits, floats in software"],
    ["aarch64_be Linux, musl, clang", zig("aarch64_be-linux-musl"), ["qemu-aarch64_be"], "big-endian"],
    ["x86_64 OpenBSD", zig("x86_64-openbsd"), undef],
    ["aarch64 Windows, clang", zig("aarch64-windows-gnu"), undef],
) if $ENV{TEST_ALL_PORTS};

sub slurp { my ($path) = @_; open my $f, "<:raw", $path or return "no $path"; local $/; return scalar <$f> }
sub folder { my ($name) = @_; $name =~ s/\W+/-/g; return "$dir/$name" }
sub program { my ($name) = @_; return folder($name) . "/gemma3" . ($name =~ /Windows/ ? ".exe" : "") }

# What `make CC=...` does for this compiler; clang and zig by hand.
sub job {
    my ($name, $compiler) = @{ $_[0] };
    my ($cc, @flags) = @$compiler;
    make_path(folder($name));
    return [$name, @$compiler, @rules, "-o", program($name), "gemma3.c", "tokenizer.c", @libs] if $cc !~ /-gcc$/;
    symlink "$top/$_", folder($name) . "/$_" for qw(Makefile gemma3.c gemma3.h tokenizer.c);
    return [$name, $make, "-s", "-C", folder($name), "CC=$cc", "CFLAGS=@flags", "gemma3"];
}
my @jobs = map { job($_) } grep { tool($_->[1][0]) } @ports;
my %built = run_all(@jobs);

my $gemma3 = "$dir/host-gemma3";
run($ENV{CC} // "cc", "-O1", "-o", $gemma3, "gemma3.c", "tokenizer.c", @libs);

for my $port (@ports) {
    my ($name, $compiler, $emulator, $remark) = @$port;
    SKIP: {
        $table{$name} = "skipped: no $compiler->[0]";
        skip "$name: no $compiler->[0]", 2 if !$built{$name};
        my ($text, $status) = @{ $built{$name} };
        $table{$name} = $status || $text ? "does not build" : "builds without a word";
        is($text, "", "$name: builds without a word");
        skip "$name was not built", 1 if $status;
        skip "$name: nothing here can run it", 1 if !$emulator;
        if (@$emulator && !tool($emulator->[0])) {
            $table{$name} = "builds; skipped: no $emulator->[0]";
            skip "$name: no $emulator->[0]", 1;
        }
        my $same = computes_the_contract($name, [@$emulator, program($name)]);
        $table{$name} = ($same ? "computes the bits" : "WRONG BITS") . ($remark ? " ($remark)" : "");
    }
}

# ---- aarch64: its kernels, and what a command line may say about the CPU --------------------------

SKIP: {
    my $port = "aarch64 Linux, gcc";
    skip "no aarch64 build was run", 8 if $table{$port} !~ /bits/;
    my $kernels = "$dir/aarch64-kernels";
    my @build = (@{ gcc("aarch64-linux-gnu") }, "-std=c11", @rules, "-o", $kernels, "test/kernels.c", "tokenizer.c", @libs);
    is((run(@build))[0], "", "aarch64: the test of the kernels builds without a word");
    my @max = qw(qemu-aarch64 -cpu max);
    my ($list) = run(@max, program($port), "--isa", "list");
    like($list, qr/^(i8mm\n)?dotprod\nneon\nscalar\n$/, "aarch64: a CPU with everything has all kernels");
    for my $isa (split /\n/, $list) {
        computes_the_contract("aarch64 --isa $isa", [@max, program($port)], "--isa", $isa);
    }
    my ($text, $status) = run(@max, $kernels);
    is($status, 0, "aarch64: every kernel is its definition");
    diag(grep { /^not ok|^#/ } map { "$_\n" } split /\n/, $text) if $status;

    my @old = qw(qemu-aarch64 -cpu cortex-a53);
    ($list) = run(@old, program($port), "--isa", "list");
    is($list, "neon\nscalar\n", "aarch64: an old CPU has neon alone");
    is(hash_of([@old, program($port)], "tiny-mixed"), $contract{"tiny-mixed"}, "aarch64: and computes the bits");
    ($text, $status) = run(@old, program($port), "-m", "test/data/tiny.gguf", "-p", "a", "-n", "1", "--isa", "dotprod");
    ok($status && $text =~ /instruction set "dotprod" is unknown or this CPU/, "aarch64: and refuses kernels it lacks");
}

my @cpus = qw(-march=armv8-a+crypto -march=armv8.2-a+fp16 -march=armv8.4-a -mcpu=cortex-a53 -mcpu=cortex-a76
    -mcpu=neoverse-n1 -mcpu=neoverse-v1 -mcpu=a64fx -mcpu=thunderx2t99);
push @cpus, qw(-march=armv8-a -march=armv8-a+fp16 -march=armv8.1-a -march=armv8.2-a -march=armv8.2-a+dotprod
    -march=armv8.2-a+sve -march=armv8.3-a -march=armv8.5-a -march=armv8.6-a -march=armv9-a -mcpu=cortex-a53+crypto
    -mcpu=cortex-a55 -mcpu=cortex-a72 -mcpu=cortex-a72+crypto -mcpu=cortex-a78 -mcpu=cortex-x2 -mcpu=neoverse-n2
    -mcpu=ampere1 -mcpu=tsv110 -mcpu=neoverse-512tvb -mcpu=cortex-r82 -mcpu=saphira) if $ENV{TEST_ALL_PORTS};
my %arm = (gcc => ["aarch64-linux-gnu-gcc"],
    clang => [qw(clang --target=aarch64-linux-gnu -I/usr/aarch64-linux-gnu/include)]);
for my $compiler (sort keys %arm) {
    my @command = (@{ $arm{$compiler} }, qw(-std=c11 -O0 -w -c -DGEMMA3_NO_MAIN -o /dev/null));
    SKIP: {
        skip "aarch64 settings: no $command[0]", 1 if !tool($command[0]) || !tool("aarch64-linux-gnu-gcc");
        my @now = $compiler eq "gcc" || $ENV{TEST_ALL_PORTS} ? @cpus : qw(-mcpu=neoverse-n1 -mcpu=cortex-a53);
        my %result = run_all(map { [$_, @command, $_, "gemma3.c"] } @now);
        my @bad = grep { "@{$result{$_}}" ne " 0" && $result{$_}[0] !~ /unsupported|unknown (target|value)|does not support/ }
            @now;
        ok(!@bad, "aarch64, $compiler: builds for " . @now . " CPUs and architectures") or
            diag(map { "$_: $result{$_}[0]" } @bad);
    }
}

# ---- A caller who has changed how floats work, and builds that cannot keep the contract ------------

my $strange = spew("strange.c", $print_hash . <<'END');
/* Rounds up and flushes subnormal numbers, then asks for logits; says whether that is still so. */
#if defined(__arm__)
static void set(unsigned x) { __asm__ volatile("vmsr fpscr, %0" : : "r"(x)); }
static unsigned get(void) { unsigned x; __asm__ volatile("vmrs %0, fpscr" : "=r"(x)); return x; }
#else
static void set(unsigned long x) { __asm__ volatile("msr fpcr, %0" : : "r"(x)); }
static unsigned long get(void) { unsigned long x; __asm__ volatile("mrs %0, fpcr" : "=r"(x)); return x; }
#endif
enum { STRANGE = 1 << 25 | 1 << 24 | 1 << 22 }; /* default NaN, flush to zero, round up */

int main(int argc, char **argv)
{
    gemma3_error err;
    set(STRANGE);
    gemma3_model *m = gemma3_open(argv[1], NULL, &err);
    if (!m) { puts(err.text); return 1; }
    int failed = print_hash(m, argv[argc - 1]);
    puts((get() & 0x07c00000) == STRANGE ? "still" : "lost");
    return failed;
}
END
for (["aarch64", gcc("aarch64-linux-gnu")], ["arm", gcc("arm-linux-gnueabihf")]) {
    my ($cpu, $compiler) = @$_;
    SKIP: {
        skip "a caller's float state on $cpu: no compiler or no emulator", 1
            if !tool($compiler->[0]) || !tool("qemu-$cpu");
        run(@$compiler, "-w", "-I.", "-DGEMMA3_NO_MAIN", "-o", "$dir/strange-$cpu", $strange, "gemma3.c", "tokenizer.c",
            @libs);
        is((run("qemu-$cpu", "$dir/strange-$cpu", "test/data/tiny.gguf", "test/data/tiny.ids"))[0],
            "$contract{tiny}\nstill\n", "$cpu: a caller's rounding and flushing are not used, and not lost");
    }
}

SKIP: {
    my @clang = qw(clang --target=i386-linux-gnu -march=pentium3 -mno-sse2 -std=c11 -O1 -w -I/usr/i686-linux-gnu/include);
    skip "doubles on the x87: no clang, i686 or qemu-i386", 2
        if !tool("clang") || !tool("i686-linux-gnu-gcc") || !tool("qemu-i386");
    my ($text, $status) = (0, 0);
    for my $source (qw(gemma3 tokenizer)) {
        ($text, $status) = run(@clang, "-c", "-o", "$dir/x87-$source.o", "$source.c");
        last if $status;
    }
    is($status, 0, "i686 with SSE alone: builds") or diag($text);
    run("i686-linux-gnu-gcc", "-static", "-o", "$dir/x87", "$dir/x87-gemma3.o", "$dir/x87-tokenizer.o", @libs);
    ($text) = run("qemu-i386", "$dir/x87", "-m", "test/data/tiny.gguf", "-p", "a");
    like($text, qr/cannot keep the numeric contract: doubles are wider than double/, "and refuses itself");
}

# ---- Files larger than 2 GB, and than the address space, where pointers have 32 bits --------------

# tiny.gguf with the later half of its weights `gap` bytes further on; between them nothing is written.
sub far_weights {
    my ($path, $gap) = @_;
    my $bytes = slurp("test/data/tiny.gguf");
    my ($end, @tensors) = (0);
    while ($bytes =~ /((?:blk\.\d+\.\w+|token_embd|output_norm)\.weight)/g) {
        my ($at, $n) = ($-[0], length $1);
        next if unpack("Q<", substr $bytes, $at - 8, 8) != $n;
        my $offset = $at + $n + 8 + 8 * unpack "L<", substr $bytes, $at + $n, 4; # after n_dims, dims, type
        push @tensors, [$offset, unpack "Q<", substr $bytes, $offset, 8];
        $end = $offset + 8;
    }
    @tensors = sort { $a->[1] <=> $b->[1] } @tensors;
    splice @tensors, 0, @tensors / 2;
    substr $bytes, $_->[0], 8, pack "Q<", $_->[1] + $gap for @tensors;
    my $cut = int(($end + 31) / 32) * 32 + $tensors[0][1];
    open my $f, ">:raw", $path or die "$path: $!";
    print $f substr $bytes, 0, $cut;
    seek $f, $gap, 1 or return 0;
    print $f substr $bytes, $cut;
    return close $f && -s $path == length($bytes) + $gap;
}

SKIP: {
    my $port = "armv7 Linux, gcc";
    skip "no 32-bit build was run", 4 if $table{$port} !~ /bits/;
    skip "no file of 5 GB can be made here", 4
        if !far_weights("$dir/2.gguf", 2_400_000_000) || !far_weights("$dir/5.gguf", 5_000_000_000);
    my ($text) = run("qemu-arm", program($port), "-m", "$dir/2.gguf", "--ids", "test/data/tiny.ids", "--hash");
    like($text, qr/sha256 $contract{tiny}$/, "32 bits: weights beyond 2 GB are mapped");
    ($text) = run("qemu-arm", program($port), "-m", "$dir/5.gguf", "-p", "a");
    like($text, qr/5\.gguf has 5000\d{6} bytes: more than this machine can address/,
        "32 bits: a model larger than the address space gets a sentence");
    my $reader = spew("reader.c", "#define _FILE_OFFSET_BITS 64\n#define _XOPEN_SOURCE 700\n" . $print_hash . <<'END');
/* Opens a model of which only the first bytes are in memory. */
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

static int read_file(void *user, uint64_t offset, void *buffer, size_t n)
{
    return pread(*(int *)user, buffer, n, (off_t)offset) != (ssize_t)n;
}

int main(int argc, char **argv)
{
    static unsigned char first[1 << 16];
    struct stat st;
    gemma3_error err;
    int fd = open(argv[1], O_RDONLY);
    if (fd < 0 || fstat(fd, &st) || pread(fd, first, sizeof first, 0) < 0) return 2;
    gemma3_source from = {.data = first, .n_data = sizeof first, .size = (uint64_t)st.st_size,
                          .read = read_file, .user = &fd, .name = argv[1]};
    gemma3_model *m = gemma3_open_source(&from, NULL, &err);
    if (!m) { puts(err.text); return 1; }
    return print_hash(m, argv[argc - 1]);
}
END
    ($text) = run(@{ gcc("arm-linux-gnueabihf") }, "-w", "-I.", "-DGEMMA3_NO_MAIN", "-o", "$dir/reader", $reader,
        "gemma3.c", "tokenizer.c", @libs);
    is($text, "", "32 bits: a program with a read function builds");
    ($text) = run("qemu-arm", "$dir/reader", "$dir/5.gguf", "test/data/tiny.ids");
    is($text, "$contract{tiny}\n", "32 bits: and reads weights beyond 4 GB");
}

# ---- Windows -------------------------------------------------------------------------------------

SKIP: {
    my $port = "x86_64 Windows, gcc";
    skip "no Windows build was run", 12 if $table{$port} !~ /bits/;
    my @program = ("wine", program($port));
    my $deep = "$dir/" . join "/", ("d" x 100) x 3;
    make_path($deep);
    my $name = "$dir/M\xc3\xa4rchen \xe9\x9b\xaa.gguf";
    symlink "$top/test/data/tiny.gguf", $_ for $name, "$deep/long.gguf";
    for ($name, "$deep/long.gguf") {
        my ($text, $status) = run(@program, "-m", $_, "-p", "a", "-n", "1", "--hash");
        like($text, qr/sha256/, "Windows: a path that is " . (/long/ ? "longer than 260 letters" : "not ASCII"));
    }
    my $say = "Gr\xc3\xbc\xc3\x9fe \xe9\x9b\xaa * \"x\"";
    my ($want) = run($gemma3, "-m", "test/data/tiny.gguf", "--tokenize", $say);
    my ($got)  = run(@program, "-m", "test/data/tiny.gguf", "--tokenize", $say);
    is($got, $want, "Windows: arguments in UTF-8, taken as they are");
    chomp(my $ids = $want);
    ($got) = run(@program, "-m", "test/data/tiny.gguf", "--detokenize", $ids);
    is($got, $say, "Windows: text out in UTF-8");

    my @logits = ("-m", "test/data/tiny.gguf", "--ids", "test/data/tiny.ids", "--logits");
    run($gemma3, @logits, "$dir/want");
    run(@program, "-m", "test/data/tiny.gguf", "-p", "a", "--logits", "$dir/got");
    run(@program, @logits, "$dir/got");
    ok(slurp("$dir/got") eq slurp("$dir/want"), "Windows: a file replaces another");
    run("sh", "-c", '"$@" - >"$0" 2>"$0.err"', "$dir/got2", @program, @logits);
    ok(slurp("$dir/got2") eq slurp("$dir/want"), "Windows: bytes on stdout are those bytes");
    ($got) = run(@program, "-m", "$dir/none.gguf", "-p", "a");
    like($got, qr/none\.gguf cannot be opened: No such file or directory/, "Windows: says why a file does not open");
    SKIP: {
        skip "no file of 5 GB can be made here", 1 if !far_weights("$dir/5.gguf", 5_000_000_000);
        ($got) = run(@program, "-m", "$dir/5.gguf", "--ids", "test/data/tiny.ids", "--hash");
        like($got, qr/sha256 $contract{tiny}\r?$/m, "Windows: weights beyond 4 GB");
    }

    # At a console, whose ReadFile is as on Windows 10, where it gives 0 for a letter that is not ASCII.
    my $imitation = spew("imitation.c", <<'END');
#include <stdio.h>
#include <io.h>
int imitated_getchar(void)
{
    int c = fgetc(stdin);
    return c >= 0x80 && _isatty(0) ? 0 : c;
}
END
    my @mingw = qw(x86_64-w64-mingw32-gcc -w -O1 -static -o);
    is((run(@mingw, "$dir/console.exe", "test/console.c"))[0], "", "Windows: a program that types builds");
    run(@mingw, "$dir/typed.exe", "-Dgetchar=imitated_getchar", $imitation, "gemma3.c", "tokenizer.c");
    my @chat = (qw(-m test/data/tiny.gguf -i --seed 5 --top-k 0 --temp), 3, "-n", 10, "--out-ids");
    my $keys = spew("keys", "$say\n" . "\xe9\x9b\xaa\xf0\x9f\x98\x80" x 200 . "\n");
    my ($text, $bad) = run("wine", "$dir/console.exe", $keys, "$dir/typed", "$dir/typed.exe", "--version");
    skip "no console here", 2 if $bad;
    run("wine", "$dir/console.exe", $keys, "$dir/typed", "$dir/typed.exe", @chat, "-c", 8000);
    run("sh", "-c", '"$@" <"$0" >"$0.want" 2>"$0.err"', $keys, $gemma3, @chat, "-c", 8000);
    is(slurp("$dir/typed"), slurp("$keys.want"), "Windows: letters typed at a console, whichever they are");
    $keys = spew("keys", "the cat\n^C\nthe dog\n^C\n/quit\n");
    ($text, $bad) = run("wine", "$dir/console.exe", $keys, "$dir/typed", program($port), qw(-m test/data/tiny.gguf
        -i --seed 5 --top-k 0 --temp 0 -c 60000 --out-ids));
    is($bad, 0, "Windows: Ctrl-C ends an answer, not the chat");
    is(() = slurp("$dir/typed") =~ /\n/g, 2, "Windows: once for each answer");
}

# clang-cl's language and conventions, with headers like MSVC's: those of Wine for msvcrt.dll,
# which lack sig_atomic_t.
SKIP: {
    my ($name, $headers) = ("x86_64 Windows, clang-cl", "/usr/include/wine/wine");
    $table{$name} = "skipped: no clang, mingw-w64, wine or libwine-dev";
    skip "$name: no clang, mingw-w64, wine or libwine-dev", 3
        if !tool("clang") || !tool("x86_64-w64-mingw32-gcc") || !tool("wine") || !-d "$headers/msvcrt";
    my @clang = (qw(clang --target=x86_64-pc-windows-msvc -D_MSVCR_VER=0 -Dsig_atomic_t=int -std=c11 -O1), @rules, "-isystem",
        "$headers/msvcrt", "-isystem", "$headers/windows");
    my %objects = run_all(map { [$_, @clang, "-c", "-o", "$dir/$_.obj", "$_.c"] } qw(gemma3 tokenizer));
    is($objects{gemma3}[0] . $objects{tokenizer}[0], "", "$name: builds without a word");
    my $names = spew("msvc.s", ".globl __chkstk, _fltused\n__chkstk: jmp ___chkstk_ms\n_fltused: .long 0\n");
    is((run("x86_64-w64-mingw32-gcc", "-static", "-o", "$dir/clang-cl.exe", "$dir/gemma3.obj", "$dir/tokenizer.obj",
        $names))[0], "", "$name: links");
    my $same = computes_the_contract($name, ["wine", "$dir/clang-cl.exe"]);
    $table{$name} = $same ? "computes the bits" : "WRONG BITS";
}

# ---- Boards without an operating system ----------------------------------------------------------

my @folktales = ("-m", "weights/gemma3-folktales-q4_0.gguf", "--hash", "-p");
my ($default) = (run($gemma3, @folktales, "Once upon a time"))[0] =~ /([0-9a-f]{64})/;
my ($exact)   = (run($gemma3, @folktales, "Once", "--exact"))[0] =~ /([0-9a-f]{64})/;
my %board = (
    m7   => ["Cortex-M7",  "arm-none-eabi-gcc",         "qemu-system-arm"],
    m55  => ["Cortex-M55", "arm-none-eabi-gcc",         "qemu-system-arm"],
    rv32 => ["rv32imac",   "riscv64-unknown-elf-gcc",   "qemu-system-riscv32"],
    rv64 => ["rv64gc",     "riscv64-unknown-elf-gcc",   "qemu-system-riscv64"],
);
my @boards = grep { tool($board{$_}[1]) && tool($board{$_}[2]) } sort keys %board;
my %ran = run_all(map { [$_, "test/board/run", $_] } @boards);
for my $b (sort keys %board) {
    my ($name, @needs) = @{ $board{$b} };
    SKIP: {
        $table{"board: $name"} = "skipped: no $needs[0] or no $needs[1]";
        skip "$name: no $needs[0] or no $needs[1]", 3 if !$ran{$b};
        my ($text, $status) = @{ $ran{$b} };
        my $same = like($text, qr/^default $default\nOnce upon a time, .*\n/m, "$name: the story and its hash");
        $same &= like($text, qr/^exact $exact$/m, "$name: the hash in exact mode");
        my ($stack) = $text =~ /^bytes of stack used: (\d+)$/m;
        cmp_ok($stack, "<", 4096, "$name: less than 4 KB of stack");
        $table{"board: $name"} = ($same ? "computes the bits" : "WRONG BITS") . ", $stack bytes of stack";
    }
}

# Helium's vectors of floats flush subnormal numbers. The source forbids gcc to make any: without that line a
# build must find out.
SKIP: {
    skip "Helium's floats: no arm-none-eabi-gcc or no qemu-system-arm", 1 if !$ran{m55};
    my $helium = folder("helium");
    make_path("$helium/test");
    symlink "$top/$_", "$helium/$_" for qw(test/board weights gemma3.h tokenizer.c);
    spew("helium/gemma3.c", slurp("gemma3.c") =~ s/^#pragma GCC optimize\("no-tree-vectorize"\).*\n//mr);
    my ($text) = run("$helium/test/board/run", "m55");
    like($text, qr/^this build cannot keep the numeric contract: the product with floats is wrong$/m,
        "Cortex-M55 with vectors of floats: refuses itself");
}

diag(sprintf "%-32s %s", $_, $table{$_}) for sort keys %table;
done_testing();
