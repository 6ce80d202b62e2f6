#!/usr/bin/env perl
# coverage.pl - which lines and branches the tests reach, from what gcov counted (make coverage).
#
# Every program that was run has counted the sources it was compiled from; a line or a branch is
# reached when one of them reached it. Of the GGUF parser and the tokenizer all branches are listed
# that none has reached, of the rest of gemma3.c the lines. Lines that a comment excuses, beside or
# above them (/* not reached: ... */), are left out.
use strict;
use warnings;
use JSON::PP;

my (%line, %branch);
for my $data (@ARGV) {
    open my $gcov, "-|", "gcov", "--json-format", "--branch-probabilities", "--stdout",
        $data or die;
    local $/;
    my $json = <$gcov> // next;
    for my $file (@{ decode_json($json)->{files} }) {
        # (a test has the name of what it tests: test/tokenizer.c, test/../gemma3.c)
        my ($source) = $file->{file} =~ m{^(?:test/\.\./)?(gemma3\.c|tokenizer\.c)$} or next;
        for my $l (@{ $file->{lines} }) {
            my ($n, @counts) = ($l->{line_number}, map { $_->{count} } @{ $l->{branches} });
            $line{$source}{$n} += $l->{count};
            # the same text compiled again has the same branches; another instance of it has others
            my $seen = $branch{$source}{$n}{ scalar @counts } //= [];
            $seen->[$_] += $counts[$_] for 0 .. $#counts;
        }
    }
}

my $wrong = 0;
for my $source ("gemma3.c", "tokenizer.c") {
    open my $f, "<", $source or die "$source: $!";
    my @text = ("", <$f>);
    my ($section, %reached, %all, @missed) = ("");
    for my $n (1 .. $#text) {
        $section = "$1. $2" if $text[$n] =~ m{^/\* ==== (\d+)\. (.*?) =+};
        next if !exists $line{$source}{$n} || $text[$n] =~ /not reached:/ ||
            $text[$n - 1] =~ m{^\s*/\* not reached:.*\*/$};
        my $part = $source eq "gemma3.c" ? $section : $source;
        my $is_parser = $source eq "tokenizer.c" || $section =~ /GGUF|Opening/;
        $all{$part}[0]++;
        $reached{$part}[0]++ if $line{$source}{$n};
        my @branches = map { @$_ } values %{ $branch{$source}{$n} };
        $all{$part}[1] += @branches;
        $reached{$part}[1] += my $taken = grep { $_ } @branches;
        my $is_missed = $is_parser ? $taken < @branches || !$line{$source}{$n} : !$line{$source}{
            $n};
        push @missed, [$n, scalar @branches, $taken] if $is_missed;
    }
    my @sum = (0, 0, 0, 0);
    for my $part (sort { no warnings "numeric"; $a + 0 <=> $b + 0 } keys %all) {
        my ($l, $b) = map { $all{$part}[$_] // 0 } 0, 1;
        my ($rl, $rb) = map { $reached{$part}[$_] // 0 } 0, 1;
        $sum[$_] += ($rl, $l, $rb, $b)[$_] for 0 .. 3;
        printf "%-44.44s %5.1f %% of %4d lines  %5.1f %% of %4d branches\n", $part || "(before)",
            100 * $rl / ($l || 1), $l, 100 * $rb / ($b || 1), $b;
    }
    printf "%-44s %5.1f %% of %4d lines  %5.1f %% of %4d branches\n", "$source, all",
        100 * $sum[0] / $sum[1],
        $sum[1], 100 * $sum[2] / ($sum[3] || 1), $sum[3];
    printf "  not reached: %s:%d: %d of %d branches: %s", $source, @$_[0, 2, 1],
        $text[$_->[0]] for @missed;
    $wrong++ if $sum[0] < 0.95 * $sum[1];
}
exit $wrong;
