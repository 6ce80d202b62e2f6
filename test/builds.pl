# builds.pl - what build.t and ports.t share: running many compilers, and asking what they built for the
# bits of the contract.
use strict;
use warnings;
use File::Temp qw(tempdir);
use Test::More;

our $dir   = tempdir(CLEANUP => 1);
our @rules = qw(-Wall -Wextra -Wpedantic);
our @libs  = qw(-lm -lpthread);

# The bits of contract 1: the model, --exact or not, the SHA-256 of the logits of all its ids.
our %contract = (
    "tiny"               => "39f39df698d4d1de4b008d00b3ceb1db7b0056ade305b4a4d58cd40e91921eaf",
    "tiny --exact"       => "e3f2b7a10f37de6bab905d62dd88d734b81246a88b37cedef78c55c27b3b8a74",
    "tiny-62"            => "74d6d2d141b97f4b40f2b158e7bd59e283450aa57fddafa685d31494a031e24c",
    "tiny-62 --exact"    => "cfe2cfb1038ccb2edf541d66ae2485e10a15f673df313edcce691828a78ed9c9",
    "tiny-mixed"         => "13e3d6bb17ccbbd0a5a5898eb39017f7c8b451f61f3f2e26015847beb9d3a591",
    "tiny-mixed --exact" => "8487b7a93c6546d8fc565237c92f26d0914a119dac5584f59c49be3e173676c5",
    "tiny-mixed --kv f32" => "fbaa353c02b55ea390c54f23885ce366cd7293d3b1b8bfa7bb313ebe8628f30f",
);

$ENV{$_} = "" for qw(MAKEFLAGS MFLAGS); # a make under this test has jobs of its own
our $make = tool("gmake") ? "gmake" : "make";

sub tool {
    my ($name) = @_;
    for (split /:/, $ENV{PATH}) { return 1 if -x "$_/$name" && !-d _ }
    return 0;
}

# What a command prints on both streams, and its exit status.
sub run {
    my (@command) = @_;
    my $pid = open(my $out, "-|") // die "fork: $!";
    if (!$pid) {
        open STDERR, ">&", \*STDOUT;
        exec @command or exit 127;
    }
    local $/;
    my $text = <$out> // "";
    close $out;
    return ($text, $? >> 8 || $? & 127);
}

# Runs several builds, two at a time, because compiling is most of this test. Each is [name, command];
# returns name => [what it printed, status].
sub run_all {
    my (@jobs) = @_;
    my (%running, $n);
    my $wait = sub { delete $running{ +wait } };
    for my $job (@jobs) {
        $wait->() if keys %running >= 2;
        my $log = "$dir/log-" . $n++;
        my ($name, @command) = @$job;
        my $pid = fork // die "fork: $!";
        if (!$pid) {
            open STDOUT, ">", $log;
            open STDERR, ">&", \*STDOUT;
            exec "sh", "-c", '"$@"; echo "status $?"', "sh", @command;
        }
        $running{$pid} = 1;
        push @$job, $log;
    }
    $wait->() while keys %running;
    my %result;
    for my $job (@jobs) {
        open my $f, "<", $job->[-1] or die "$job->[-1]: $!";
        my $text = do { local $/; <$f> };
        my ($status) = $text =~ s/status (\d+)\n\z// ? $1 : 1;
        $result{ $job->[0] } = [$text, $status];
    }
    return %result;
}

sub hash_of {
    my ($program, $case, @more) = @_;
    my ($model, @mode) = split / /, $case;
    my ($text) = run(@$program, "-m", "test/data/$model.gguf", "--ids", "test/data/$model.ids", "--hash",
        "-t", "2", @mode, @more);
    return $text =~ /^contract 1 .*sha256 ([0-9a-f]{64})$/m ? $1 : $text;
}

sub computes_the_contract {
    my ($name, $program, @more) = @_;
    my %wrong;
    for my $case (sort keys %contract) {
        my $got = hash_of($program, $case, @more);
        $wrong{$case} = $got if $got ne $contract{$case};
    }
    diag("$_: $wrong{$_}") for sort keys %wrong;
    return ok(!%wrong, "$name: the bits of the contract");
}

# For a host program of a test: opens nothing itself, prints the hash of a model's logits of the ids in a file.
our $print_hash = <<'END';
#include "gemma3.h"
#include <stdio.h>
#include <stdlib.h>

static int print_hash(const gemma3_model *m, const char *path)
{
    static int32_t ids[128];
    static int rows[128];
    gemma3_error err;
    gemma3_sha256 c;
    char hex[65];
    int n = 0, failed;
    FILE *f = fopen(path, "r");
    while (f && n < 128 && fscanf(f, "%d", (int *)&ids[n]) == 1) rows[n] = n, n++;
    if (f) fclose(f);
    gemma3_params p = gemma3_default_params(m);
    gemma3_state *s = gemma3_state_new(m, &p, &err);
    if (!s) return puts(err.text), 1;
    size_t n_logits = (size_t)n * (size_t)gemma3_model_config(m)->n_vocab;
    float *logits = (float *)malloc(n_logits * sizeof *logits);
    failed = gemma3_forward(s, ids, n, rows, n, logits);
    if (failed) puts(gemma3_state_error(s));
    gemma3_sha256_init(&c);
    gemma3_sha256_add_floats(&c, logits, n_logits);
    gemma3_sha256_end(&c, hex);
    puts(hex);
    free(logits);
    gemma3_state_free(s);
    return failed;
}

END

sub spew {
    my ($name, $text) = @_;
    open my $f, ">", "$dir/$name" or die "$dir/$name: $!";
    print $f $text;
    close $f;
    return "$dir/$name";
}

1;
