#!/usr/bin/env perl
# conform.t - the conformance kit: its measuring commands, and its judgement of other engines.
use strict;
use warnings;
use File::Temp qw(tempdir);
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep);

my $conform = "test/conform";
my $gemma3  = "./gemma3";
my $tiny    = "test/data/tiny.gguf";    # 443 tokens, <bos> is 3, context 512
my $ids     = "test/data/tiny.ids";
my $dir     = tempdir(CLEANUP => 1);
my ($n_vocab, $out, $err, $code) = (443);

plan skip_all => "no $conform: make conform" if !-x $conform || !-x $gemma3;

# ---- Running it ----------------------------------------------------------------------------------

sub slurp {
    my ($path) = @_;
    open my $f, "<:raw", $path or die "$path: $!";
    local $/;
    return scalar(<$f>) // "";
}

sub spew {
    my ($name, $text) = @_;
    my $path = "$dir/$name";
    open my $f, ">:raw", $path or die "$path: $!";
    print $f $text;
    close $f;
    return $path;
}

# Runs a program to its end; sets $out, $err and $code. A first argument that is a reference is stdin.
sub run {
    my $in = ref $_[0] ? spew("stdin", ${ +shift }) : "/dev/null";
    my @command = @_;
    my $pid = fork // die "fork: $!";
    if (!$pid) {
        open STDIN,  "<", $in           or die;
        open STDOUT, ">", "$dir/stdout" or die;
        open STDERR, ">", "$dir/stderr" or die;
        exec @command;
        die "exec: $!";
    }
    waitpid $pid, 0;
    $code = $? & 127 ? "signal " . ($? & 127) : $? >> 8;
    ($out, $err) = (slurp("$dir/stdout"), slurp("$dir/stderr"));
    return $out;
}

sub conform { return run(ref $_[0] ? shift : (), $conform, @_) }

# A command on the tiny model and its ids.
sub tiny { my ($command, @args) = @_; return conform($command, "-m", $tiny, "--ids", $ids, @args) }

# Wrong in the given way: exit code 2, nothing on stdout, one line on stderr.
sub refuses {
    my ($like, $what, @args) = @_;
    conform(@args);
    is($code, 2, "$what: exit code 2");
    like($err, $like, "$what: says so");
    is($out, "", "$what: nothing on stdout");
    is($err =~ tr/\n//, 1, "$what: one line") or diag($err);
}

sub near { return abs($_[0] - $_[1]) <= $_[2] * (1 + abs $_[1]) }

# Rows of logits as lists.
sub rows {
    my @x = unpack "f<*", $_[0];
    return map { [splice @x, 0, $n_vocab] } 1 .. @x / $n_vocab;
}

sub nll {
    my ($row, $id) = @_;
    my ($max, $sum) = ($row->[0], 0);
    for (@$row) { $max = $_ if $_ > $max }
    $sum += exp($_ - $max) for @$row;
    return $max - $row->[$id] + log $sum;
}

sub logits_of { return run(\"@_", $gemma3, "-m", $tiny, "--ids", "-", "--logits", "-") }

# ---- The command line ------------------------------------------------------------------------------

conform("--help");
is($code, 0, "--help");
like($out, qr/^  $_ /m, "--help has $_") for qw(nll perplexity top trace -m -p -f --ids -t -b -c
    --exact --kv --isa --no-bos --special --dir);
ok(!(grep { length > 100 } split /\n/, $out), "its lines have 100 columns at most");
conform("top", "--help");
is($code, 0, "each command has its own");
unlike($out, qr/--dir|trace/, "with the options that belong to it");
refuses(qr/which command/, "no command");
refuses(qr/no command "frobnicate"/, "an unknown command", "frobnicate");
refuses(qr/unknown option --frobnicate/, "an unknown option", "nll", "--frobnicate");
refuses(qr/unexpected argument "hello"/, "a stray word", "nll", "-p", "a", "hello");
refuses(qr/needs a text/, "no text", "nll", "-m", $tiny);
refuses(qr/contradictory/, "two texts", "nll", "-m", $tiny, "-p", "a", "-f", "b");
refuses(qr/--dir does not belong to nll/, "another command's option", "nll", "-p", "a", "--dir", "d");
refuses(qr/-t 0: expected a whole number/, "no threads", "nll", "-p", "a", "-t", 0);
refuses(qr/--kv f8: expected f16 or f32/, "--kv f8", "nll", "-m", $tiny, "-p", "a", "--kv", "f8");
refuses(qr/--isa sse9: this CPU can run .*scalar/, "--isa sse9", "nll", "-p", "a", "--isa", "sse9");
refuses(qr/cannot be opened/, "a missing model", "nll", "-m", "no such model.gguf", "-p", "a");
refuses(qr/id 443 is outside the vocabulary, 0 to 442/, "an id too many", "nll", "-m", $tiny, "--ids",
    spew("bad.ids", "3 443"));
refuses(qr/expected ids/, "words for ids", "nll", "-m", $tiny, "--ids", spew("bad.ids", "3 cat"));
refuses(qr/no tokens/, "no ids", "nll", "-m", $tiny, "--ids", spew("bad.ids", " \n"));
refuses(qr/72 tokens and the context room for 71/, "a text that is too long", "nll", "-m", $tiny,
    "--ids", $ids, "-c", 71);

# ---- Scores --------------------------------------------------------------------------------------

my @ids  = split " ", slurp($ids);
my $all  = logits_of(@ids);
my @rows = rows($all);
tiny("nll");
is($code, 0, "nll");
is($err, "", "nothing on stderr");
my @lines = split /\n/, $out;
is(scalar @lines, 71, "a line for each id but the first");
my $n_good = grep { $lines[$_] =~ /^(\d+) (\d+) (\S+)$/ && $1 == $_ + 1 && $2 == $ids[$_ + 1]
    && near($3, nll($rows[$_], $2), 1e-8) } 0 .. 70;
is($n_good, 71, "each is pos, id, nll of the id given those before");
my $nll = $out;
is(tiny("nll", @$_), $nll, "the same with @$_")
    for ["-t", 1], ["-t", 3], ["-b", 1], ["-b", 7], ["-b", 64], ["--kv", "f16"], ["--isa", "scalar"];
isnt(tiny("nll", @$_), $nll, "other numbers with @$_") for ["--exact"], ["--kv", "f32"];
is(conform(\slurp($ids), "nll", "-m", $tiny, "--ids", "-"), $nll, "ids from stdin");

tiny("top", 443);
@lines = split /\n/, $out;
is(scalar @lines, 443, "top 443");
my ($sum, $n_right, $last) = (0, 0, 9e9);
for (@lines) {
    my ($id, $text, $logit, $p) = split /\t/;
    $n_right++ if near($logit, $rows[71][$id], 1e-8) && $logit <= $last && $text =~ /^".*"$/
        && near($p, exp(-nll($rows[71], $id)), 1e-8);
    ($sum, $last) = ($sum + $p, $logit);
}
is($n_right, 443, "id, text, logit, probability, the likeliest first");
ok(near($sum, 1, 1e-8), "the probabilities add up to 1");
is(scalar(split /\n/, tiny("top", 3)), 3, "top 3");
refuses(qr/top 0: expected a whole number/, "top 0", "top", 0, "-m", $tiny, "-p", "a");
refuses(qr/top needs N/, "top alone", "top", "-m", $tiny, "-p", "a");

my $tale = "once upon a time there was a little girl who lived in a house near the forest. " x 4;
my $file = spew("tale.txt", $tale);
my @text = split " ", run($gemma3, "-m", $tiny, "--tokenize", $tale);
my ($n, $total, $squares, @running) = (0, 0, 0);
for my $piece (0 .. int(@text / 32) - 1) {
    my @part = (3, @text[32 * $piece + 1 .. 32 * $piece + 31]);
    my @r = rows(logits_of(@part));
    for my $pos (16 .. 30) {
        my $x = nll($r[$pos], $part[$pos + 1]);
        ($n, $total, $squares) = ($n + 1, $total + $x, $squares + $x * $x);
    }
    push @running, sprintf "[%d]%.4f,", $piece + 1, exp($total / $n);
}
my ($mean, $ppl) = ($total / $n, exp($total / $n));
my $error = $ppl * sqrt(($squares / $n - $mean * $mean) / ($n - 1));
conform("perplexity", "-m", $tiny, "-f", $file, "-c", 32);
is($code, 0, "perplexity");
is((split /\n/, $out)[0], join("", @running), "the running value, piece by piece");
my ($got_ppl, $got_error) = $out =~ /^ppl (\S+) \+- (\S+)$/m;
ok(near($got_ppl // 0, $ppl, 1e-6) && near($got_error // 0, $error, 1e-5),
    "ppl +- error, as computed from the logits") or diag("$out want $ppl +- $error");
refuses(qr/needs two pieces/, "perplexity of a word", "perplexity", "-m", $tiny, "-p", "girl");
refuses(qr/-c 2: perplexity needs pieces of 3/, "pieces of 2", "perplexity", "-m", $tiny, "-f", $file,
    "-c", 2);

# ---- Tensors inside ------------------------------------------------------------------------------

tiny("trace", "l_out-7,attn_norm,result_norm");
is($code, 0, "trace");
@lines = split /\n/, $out;
is(scalar(grep { /^attn_norm-[0-7] \[72\]\[64\] first \S+ \S+ \S+ last .* sum \S+ min \S+ max \S+$/ }
    @lines), 8, "a name without a layer is every layer's");
is(scalar(grep { /^l_out-7 \[72\]\[64\] / } @lines), 1, "one with a layer is one");
is(scalar @lines, 10, "nothing else is printed");
my $folder = "$dir/inside it";
tiny("trace", "l_out,result_output", "--dir", $folder);
is(scalar(() = glob "'$folder'/l_out-*.f32"), 8, "--dir: a file for each tensor");
is(-s "$folder/l_out-7.f32", 72 * 64 * 4, "raw float32");
ok(slurp("$folder/result_output.f32") eq $all, "result_output is the logits");
for my $name ("l_in", "l_out-8", "l_out-", "l_out-07", "inp_scaled-0", "attn_norm,,l_out", "l_out,", "") {
    my ($wrong) = $name =~ /^(l_in|.*\d|l_out-)$/;
    $wrong //= "";
    refuses(qr/no tensor "\Q$wrong\E"/, "trace '$name'", "trace", $name, "-m", $tiny, "--ids", $ids);
}
refuses(qr{a file/inside: Not a directory|a file: Not a directory}, "--dir of a file", "trace", "l_out",
    "-m", $tiny, "--ids", $ids, "--dir", spew("a file", ""));

# ---- Nobody reads, or nothing can be written -------------------------------------------------------

for my $job (["nll"], ["top", 443], ["trace", "l_out"]) {
    pipe my $read, my $write;
    my $pid = fork // die;
    if (!$pid) {
        open STDOUT, ">&", $write;
        open STDERR, ">", "$dir/stderr";
        close $_ for $read, $write;
        exec $conform, @$job, "-m", $tiny, "--ids", $ids;
    }
    close $_ for $read, $write;
    waitpid $pid, 0;
    is($?, 2 << 8, "@$job, a reader that goes away: exit code 2, no signal");
    is(slurp("$dir/stderr"), "", "and no word");
    SKIP: {
        skip "no /dev/full here", 2 if !-c "/dev/full";
        $code = system("$conform @$job -m $tiny --ids $ids >/dev/full 2>'$dir/stderr'") >> 8;
        is($code, 2, "@$job on a full disk: exit code 2");
        is(slurp("$dir/stderr"), "conform: standard output: No space left on device\n", "and one sentence");
    }
}

done_testing();
