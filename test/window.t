#!/usr/bin/env perl
# window.t - in the real model, a window of one key too many is five hundred times smaller than 8-bit
# arithmetic's noise, and is seen beneath it. Minutes, so `make builds` runs it and `make test` not.
use strict;
use warnings;
use File::Temp qw(tempdir);
use Test::More;

my $real = "weights/gemma-3-270m-q4_k_m.gguf";
my $key  = "gemma3.attention.sliding_window";
my $dir  = tempdir(CLEANUP => 1);

plan skip_all => "no $real: make $real fetches it" if !-f $real;
plan skip_all => "no test/conform: make conform" if !-x "test/conform" || !-x "./gemma3";

sub slurp {
    my ($path) = @_;
    open my $f, "<:raw", $path or die "$path: $!";
    local $/;
    return <$f>;
}

sub spew {
    my ($name, $text) = @_;
    open my $f, ">:raw", "$dir/$name" or die "$dir/$name: $!";
    print $f $text;
    close $f or die "$dir/$name: $!";
    return "$dir/$name";
}

my ($words) = slurp("test/vectors/270m.vec") =~ /^prompt length-1024.*?\nids ((?:\d+ ){672})/ms;
my $ids = spew("ids", $words);
my $positions = join ",", 512 .. 671;
for my $window (512, 513) {
    my $model = slurp($real);
    substr($model, 4 + length($key) + index($model, $key), 4) = pack "V", $window;
    my $other = spew("other.gguf", $model);
    system("./gemma3 -m $other --obey-file --ids $ids --positions $positions --logits $dir/rows 2>$dir/err");
    my $args = "-m $real --ids $ids --positions $positions --suspect window-plus-1,window-minus-1";
    my $out = qx(test/conform compare $dir/rows $args 2>$dir/err);
    is($? >> 8, $window == 512 ? 0 : 1, "8 bits and a window of $window: "
        . ($window == 512 ? "conforms" : "does not conform")) or diag($out . slurp("$dir/err"));
    if ($window == 512) { unlike($out, qr/^cause/m, "has no mistake") }
    else { like($out, qr/^cause +window-plus-1: /m, "is seen to have one key too many") }
}

done_testing();
