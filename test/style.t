#!/usr/bin/env perl
# style.t - what a reader is promised: short lines, short functions, few parameters, contents that say
# where things are, and a file that does not grow.
use strict;
use warnings;
use Test::More;

sub lines_of {
    my ($path) = @_;
    open my $f, "<", $path or die "$path: $!";
    my @lines = <$f>;
    chomp @lines;
    return @lines;
}

sub none { my ($found, $what) = @_; ok(!@$found, $what) or diag(map { "  $_\n" } @$found); }

my @core = qw(gemma3.c gemma3.h tokenizer.c);
my @all  = (@core, glob("test/*.c test/*.h test/*/*.c test/*/*.h"));

for my $path (@all) {
    my @lines = lines_of($path);
    my @wide = grep { length $lines[$_ - 1] > 100 } 1 .. @lines;
    none([map { "$path:$_" } @wide], "$path: no line is wider than 100 columns");
    my @untidy = grep { $lines[$_ - 1] =~ /\t|\s$/ } 1 .. @lines;
    none([map { "$path:$_" } @untidy], "$path: no tabs, nothing behind a line's end");
}

# A function begins at the margin and ends with a brace there.
for my $path (grep { /\.c$/ } @core) {
    my @lines = lines_of($path);
    my (@long, @many, $head, $start) = ();
    for my $n (1 .. @lines) {
        my $line = $lines[$n - 1];
        if (!defined $start && $line =~ /^[A-Za-z_][^;={]*\(/ && $line !~ /^(#|[A-Z_]+\(|typedef|enum|struct \w+ \{)| = \{$/) {
            ($head, $start) = ($line, $n);
        } elsif (defined $start && $line !~ /^\{/ && $n - $start < 4 && $lines[$n - 2] !~ /[{;]$/) {
            $head .= $line;
        }
        $start = undef if defined $start && $line =~ /;$/ && $line =~ /^\S.*\);$/;
        next if !defined $start || $line !~ /^\}/;
        push @long, "$path:$start: " . ($n - $start + 1) . " lines" if $n - $start + 1 > 60;
        my ($parameters) = $head =~ /\(([^()]*(?:\([^()]*\)[^()]*)*)\)\s*$/;
        my $is_trace = defined $parameters && $parameters =~ /^void \*user, const char \*name, int layer/;
        push @many, "$path:$start" if defined $parameters && !$is_trace && ($parameters =~ tr/,//) > 5;
        $start = undef;
    }
    none(\@long, "$path: no function is longer than 60 lines");
    none(\@many, "$path: no function has more than six parameters, but what gemma3.h promises")
        if $path ne "tokenizer.c";
}

for my $path (@core) {
    my ($comment, $inside, $n) = (0, 0, 0);
    for (lines_of($path)) {
        next if /^\s*$/;
        $n++;
        $inside = 1 if m{^\s*/\*};
        $comment++ if $inside || m{^\s*//};
        $inside = 0 if m{\*/};
    }
    my $least = $path eq "gemma3.c" ? 13 : 15;
    ok($comment >= $least / 100 * $n, "$path: of its lines at least $least in 100 are comments")
        or diag(sprintf "  %.1f", 100 * $comment / $n);
}

my @text = lines_of("gemma3.c");
# 4,000 lines and 175,000 bytes are the aim; these two bound what the file has, comments included.
cmp_ok(scalar @text, "<=", 5600, "gemma3.c: no more lines than it has");
cmp_ok(-s "gemma3.c", "<=", 256500, "gemma3.c: no more bytes than it has");
cmp_ok(scalar lines_of("README.md"), "<=", 150, "README.md: at most 150 lines");

my ($forward) = grep { $text[$_ - 1] =~ /^int gemma3_forward\(/ } 1 .. @text;
cmp_ok($forward // 9999, "<=", 600, "gemma3.c: the forward pass stands before line 600");

my %contents = map { m{^ \* {4,}(\d+)  (\S.*)$} ? ($1 => $2) : () } @text[0 .. 199];
my %sections = map { m{^/\* ==== (\d+)\. (.*?) =+( \*/)?$} ? ($1 => $2) : () } @text;
is_deeply(\%sections, \%contents, "gemma3.c: its sections are those of its contents");

# What hosts differ in stands in section 15: the command line is for all of them as it is.
my ($below) = join("\n", @text) =~ /^#ifndef GEMMA3_NO_MAIN\n(.*?)^#endif/ms;
my @host = grep { /^\s*#\s*(if|include\s+<(?!errno|limits|math|signal|std\w+|string))/ } split /\n/, $below // "#if";
none(\@host, "gemma3.c: the command line includes C11 and gemma3.h alone, and has no #if");
cmp_ok(($below // "") =~ tr/\n//, "<=", 800, "gemma3.c: the command line has at most 800 lines");

done_testing();
