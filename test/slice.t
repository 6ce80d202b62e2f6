#!/usr/bin/env perl
# slice.t - a vocabulary cut to what a text needs: the same tokens, and the same bits in the rows kept.
use strict;
use warnings;
use File::Temp qw(tempdir);
use Test::More;

my $dir   = tempdir(CLEANUP => 1);
my $model = "weights/gemma3-folktales-q4_0.gguf";

sub slurp { my ($path) = @_; open my $f, "<:raw", $path or die "$path: $!"; local $/; return scalar <$f> }
sub spew  { my ($path, $text) = @_; open my $f, ">:raw", $path or die "$path: $!"; print $f $text }
sub ids   { return split ' ', `./gemma3 -m $_[0] --tokenize -f $dir/text` }

plan skip_all => "no gguf package for python3" if system("python3 -c 'import gguf' 2>$dir/err") != 0;
spew("$dir/text", substr slurp("weights/heldout.txt"), 0, 2000);
is(system("python3 weights/slice.py $model $dir/small.gguf $dir/text >$dir/out"), 0, "the vocabulary is cut");
like(slurp("$dir/out"), qr/^\d{3} of 4096 tokens/, "to a part of it");
ok(-s "$dir/small.gguf" < 0.85 * -s $model, "which makes the file smaller");

my @old = split ' ', slurp("$dir/small.gguf.ids");
my @ids = ids("$dir/small.gguf");
is("@old[@ids]", join(" ", ids($model)), "the text is cut into the same tokens");

my @first = @ids[0 .. 39];
spew("$dir/new-ids", "@first");
spew("$dir/old-ids", "@old[@first]");
for my $mode ("", "--exact") {
    system("./gemma3 -m $dir/small.gguf --ids $dir/new-ids $mode --logits $dir/new") == 0 or die;
    system("./gemma3 -m $model --ids $dir/old-ids $mode --logits $dir/old") == 0 or die;
    my @new  = unpack "(a" . 4 * @old . ")*", slurp("$dir/new");
    my @all  = unpack "(a16384)*", slurp("$dir/old");
    my @kept = map { my @row = unpack "(a4)*", $_; join "", @row[@old] } @all;
    ok(@new == 40 && "@new" eq "@kept", "the logits of the rows kept are the same bits" . ($mode && ", exact"));
}
done_testing();
