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

# ---- Comparing: the forms ----------------------------------------------------------------------------

sub against { my ($other, @args) = @_; return tiny("compare", $other, "-t", 1, @args) }

sub npy {
    my ($name, $type, $shape, $data, $order) = @_;
    my $header = sprintf "{'descr': '%s', 'fortran_order': %s, 'shape': (%s), }", $type, $order // "False", $shape;
    $header .= " " x (117 - length $header) . "\n";
    return spew($name, "\x93NUMPY\x01\x00" . pack("v", length $header) . $header . $data);
}

sub safetensors {
    my ($name, $header, $data) = @_;
    return spew($name, pack("Q<", length $header) . $header . $data);
}

my $exact = run($gemma3, "-m", $tiny, "--ids", $ids, "--exact", "--logits", "-");
my @exact = unpack "f<*", $exact;
my $row   = 4 * $n_vocab;
my $base  = spew("exact.f32", $exact);

# bf16 and f16 by rounding to the nearest, which is what is meant and not what is tested
sub bf16 { return pack "v*", map { ($_ + 0x7fff + ($_ >> 16 & 1)) >> 16 & 0xffff } unpack "V*", pack "f<*", @_ }

sub half {
    return pack "v*", map {
        my ($x, $sign) = (abs, $_ < 0 ? 0x8000 : 0);
        my $e = $x > 0 ? POSIX::floor(log($x) / log 2) : -15;
        $e = -15 if $e < -14;
        my $m = $e == -15 ? $x * 2**24 : ($x / 2**$e - 1) * 1024;
        $sign + (($e + 15) << 10) + POSIX::floor($m + 0.5)
    } @_;
}

against($base);
is($code, 0, "our own numbers conform");
like($out, qr/^rows +72$/m, "all rows are compared");
like($out, qr/^max difference +0,/m, "and do not differ");
like($out, qr/^KL +mean 0, largest 0/m, "at all");
like($out, qr/^verdict +conforms: .*float32/m, "which the verdict says");
against("test/data/tiny.logits");
is($code, 0, "transformers' float32 conforms");
like($out, qr/^KL +mean \d\.\d+e-1[23], /m, "with a KL of 1e-12");
like($out, qr/^first choice agrees +100\.00 %/m, "and the same first choices");

my $f8 = pack "d<*", @exact;
for my $form (["<f4", "72, 443", $exact], ["<f4", "1, 72, 443", $exact], ["<f8", "72, 443", $f8],
    [">f4", "72, 443", pack "f>*", @exact]) {
    against(npy("a.npy", @$form));
    is($code, 0, ".npy $form->[0] ($form->[1])");
    like($out, qr/^max difference +0,/m, "is read exactly");
}
against(npy("last.npy", "<f4", "443,", substr($exact, -$row)));
is($code, 0, ".npy of the last position");
like($out, qr/^rows +1$/m, "is one row");
for my $narrow (["<f2", half(@exact), 5e-3], ["|V2", bf16(@exact), 5e-2]) {
    against(npy("narrow.npy", $narrow->[0], "72, 443", $narrow->[1]), "--no-diagnosis");
    my ($most) = $out =~ /^max difference +([0-9.e+-]+),/m;
    ok($most > 0 && $most < $narrow->[2] * 2, ".npy $narrow->[0] is read, rounded") or diag($out . $err);
}
my $entry = '"logits":{"dtype":"F32","shape":[72,443],"data_offsets":[16,' . (16 + length $exact) . ']}';
against(safetensors("a.safetensors",
    '{"__metadata__":{"made":"by \\"hand\\""},"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},' . $entry . "}",
    ("\0" x 16) . $exact));
is($code, 0, ".safetensors with a tensor of that shape") or diag($err);
like($out, qr/^max difference +0,/m, "is read exactly");
against(spew("last.bin", substr $exact, -$row));
is($code, 0, "raw float32 of the last position (llama.cpp's .bin)");
like($out, qr/^rows +1$/m, "is one row");
my $padded = join "", map { substr($exact, $_ * $row, $row) . "\0" x 256 } 0 .. 71;
against(spew("padded.f32", $padded));
is($code, 0, "a vocabulary padded by 64");
like($err, qr/note: .*padded\.f32 has 507 columns, the model 443 tokens: the first 443 are compared/, "with a note");
my $log = pack "f<*", map { my $r = $_; my $n = nll($r, 0); map { $_ - $r->[0] - $n } @$r } rows($exact);
against(spew("log.f32", $log));
is($code, 0, "log probabilities");
like($err, qr/note: .*log\.f32 holds log probabilities/, "are noticed");
against(spew("some.f32", join "", map { substr $exact, $_ * $row, $row } 5, 70), "--positions", "5,-2");
is($code, 0, "--positions says which rows a file has");
like($out, qr/^rows +2$/m, "those two");

# llama-perplexity's base file: two pieces of 32, rows 16 .. 30 of each, after <bos>
my ($codes, @pieces) = ("", [@ids[0 .. 31]], [@ids[32 .. 63]]);
for my $piece (@pieces) {
    my @r = rows(run(\"3 @{$piece}[1 .. 31]", $gemma3, "-m", $tiny, "--ids", "-", "--exact", "--logits", "-"));
    for my $r (@r[16 .. 30]) {
        my ($max, $min) = (sort { $b <=> $a } @$r)[0, -1];
        $min = $max - 16 if $min < $max - 16;
        my $lse = $r->[0] + nll($r, 0);
        my $scale = ($max - $min) / 65535;
        $codes .= pack("f<f<", $scale, $min - $lse)
            . pack("v*", (map { $_ > $min ? int(($_ - $min) / $scale + 0.5) : 0 } @$r), 0);
    }
}
sub kld { return "_logits_" . pack("V*", 32, 443, 2, @{ $_[0] }, @{ $_[1] }) . $_[2] }
my $kld = spew("base.kld", kld(@pieces, $codes));
conform("compare", $kld, "-m", $tiny, "-t", 1);
is($code, 0, "llama-perplexity's base file needs no text") or diag($err);
like($out, qr/^rows +30$/m, "all its rows are compared");
my ($kl) = $out =~ /^KL +mean (\S+),/m;
cmp_ok($kl, "<", 1e-7, "to the 16 bits of its numbers") or diag($out);
conform("compare", $kld, "-m", $tiny, "-t", 1, "--ids", spew("front.ids", "@ids[0 .. 63]"));
is($code, 0, "the text may be given beside it");

# A server's answers: 20 alternatives a position, with text or id, as choices or as of old
sub best { my ($r, $n) = @_; return (sort { $r->[$b] <=> $r->[$a] || $a <=> $b } 0 .. $#$r)[0 .. $n - 1] }
my @er = rows($exact);
my $lines = join "", map {
    my ($r, $next) = ($er[$_], $ids[ $_ + 1 ]);
    my $n = nll($r, 0) + $r->[0];
    sprintf qq({"id":%d,"token":"?","logprob":-1,"top_logprobs":[%s]}\n), $next,
        join ",", map { sprintf qq({"id":%d,"token":"\\u003f","logprob":%.9g}), $_, $r->[$_] - $n } best($r, 20)
} 40 .. 70;
against(spew("server.jsonl", $lines));
is($code, 0, "a server's JSON lines with ids") or diag($out . $err);
like($out, qr/^rows +31$/m, "are found in the text by the tokens that were chosen");
my %id_of = map { $_ => (split " ", run($gemma3, "-m", $tiny, "--no-bos", "--tokenize", $_))[0] } "g".."m";
my $old = '{"choices":[{"logprobs":{"top_logprobs":[null,' . join(",", map {
    my $r = $er[$_];
    my $n = nll($r, 0) + $r->[0];
    "{" . join(",", map { sprintf qq("%s":%.9g), $_, $r->[$id_of{$_}] - $n } sort keys %id_of) . "}"
} 0 .. 2) . "]}}]}";
against(spew("words.json", $old), "--each");
is($code, 0, "an older server's, by text, the first being null") or diag($out . $err);
like($out, qr/^position 0: .*^position 2: .*^rows +3$/sm, "are of the positions before their tokens");
against(spew("words.json", $old =~ s/"([g-m])"/"no token $1"/gr));
is($code, 2, "texts that are no tokens cannot be compared");
like($err, qr/no "top_logprobs" with tokens of the model/, "which is said");

sub wrong { my ($like, $what, $path, @args) = @_;
    refuses($like, $what, "compare", $path, "-m", $tiny, "--ids", $ids, "-t", 1, @args) }
my $nan = $exact;
substr $nan, 40, 4, pack "f<", "nan";
wrong(qr/nan\.f32: row 0, value 10 is NaN, expected a number/, "a NaN", spew("nan.f32", $nan));
wrong(qr/its shape is \[73\]\[440\]\[1\], expected \[72\]\[443\]/, "another shape",
    npy("shape.npy", "<f4", "73,440,1", "\0" x (73 * 440 * 4)));
wrong(qr/Fortran order/, "Fortran order", npy("fortran.npy", "<f4", "72, 443", $exact, "True"));
wrong(qr/NumPy type <i4/, "whole numbers", npy("int.npy", "<i4", "72, 443", $exact));
wrong(qr/NumPy type \?\[2J\?/, "a type that would clear the screen",
    npy("clear.npy", "\e[2J\n", "72, 443", $exact));
wrong(qr/31896 values of 4 bytes, but the file has 127000 bytes/, "a file cut short",
    npy("cut.npy", "<f4", "72, 443", substr $exact, 0, 127000));
wrong(qr/has 1000 bytes: raw float32 logits of 72 positions/, "no form at all", spew("x.f32", "\1" x 1000));
wrong(qr/is empty/, "an empty file", spew("empty", ""));
wrong(qr/No such file/, "no file", "$dir/nothing.npy");
wrong(qr/test is not a regular file/, "a folder", "test");
wrong(qr/--positions: the text has 72 tokens/, "a position too far", $base, "--positions", "72");
wrong(qr/--positions "x": expected whole numbers/, "words for positions", $base, "--positions", "x");
wrong(qr/no such band/, "an unknown band", $base, "--band", "f17");
wrong(qr/two tensors have the shape of logits, a and b/, "two candidates", safetensors("two.safetensors",
    '{"a":{"dtype":"F32","shape":[443],"data_offsets":[0,1772]},"b":{"dtype":"F32","shape":[1,443],' .
    '"data_offsets":[0,1772]}}', substr $exact, 0, $row));
wrong(qr/--positions: expected each after the one before/, "a position twice", spew("twice.f32", substr $exact, 0, 2 * $row),
    "--positions", "1,1");
wrong(qr/NumPy type <c16, expected f2, f4, f8, or V2/, "complex numbers", npy("c.npy", "<c16", "72, 443", $exact x 4));
wrong(qr/zeros\.f32: row 3, all its 443 values are 0, expected logits/, "a row that was never written",
    spew("zeros.f32", substr($exact, 0, 3 * $row) . "\0" x (69 * $row)));
wrong(qr/id 90000 is outside the vocabulary of 443/, "a server with other ids", spew("ids.jsonl",
    '{"top_logprobs":[{"id":90000,"logprob":-1}]}'));
wrong(qr/90 positions and the text 72 tokens/, "a server with more positions", spew("more.jsonl",
    qq({"top_logprobs":[{"id":5,"logprob":-1}]}\n) x 90));
wrong(qr/its token for position \d+ is 7, the text's is \d+: these are other ids/, "a server with another text",
    spew("text.jsonl", join "", map { qq({"id":7,"logprob":-1,"top_logprobs":[{"id":5,"logprob":-1}]}\n) } 40 .. 70));
my @other = @{ $pieces[0] };
$other[7]++;
wrong(qr/its token 7 is \d+, the text's is \d+: these are other ids/, "other ids",
    spew("other.kld", kld(\@other, $pieces[1], $codes)));
wrong(qr/other\.kld has \d+ bytes, expected \d+ for 2 pieces/, "a base file cut short",
    spew("other.kld", substr kld(@pieces, $codes), 0, -4));
refuses(qr/compare needs the text/, "no text", "compare", $base, "-m", $tiny);

# ---- Comparing: the verdict --------------------------------------------------------------------------

against($base, "--json", "--no-diagnosis");
like($out, qr/"conforms":true,"causes":\[\]/, "--json");
is(() = $out =~ /"position":/g, 72, "has every position");
against($base, "--each");
is(() = $out =~ /^position \d+: max diff 0 /mg, 72, "--each too");
my $masked = $exact;
substr $masked, 5 * $row + 4 * $_, 4, pack "f<", "-inf" for 100 .. 102;
against(spew("masked.f32", $masked), "--json", "--no-diagnosis");
is($code, 1, "logits of -infinity do not conform");
like($err, qr/note: .*masked\.f32: 3 logits are -infinity, the first at position 5: a probability of 0 /, "which is explained");
like($out, qr/"position":5,"max_diff":null,.*"kl":null/, "JSON has no infinity: null stands for it");
unlike($out, qr/\b(inf|nan)\b/, "anywhere");
my $int8 = spew("int8.f32", $all);
against($int8);
is($code, 0, "our own 8-bit activations conform");
like($out, qr/^cause +int8: /m, "and are recognised");
against($int8, "--band", "float32");
is($code, 1, "unless only float32 is allowed");
like($out, qr/^verdict +does not conform/m, "which the verdict says");
my $noise = pack "f<*", map { $_ + 8 * sin(77 * $_) } @exact;
against(spew("noise.f32", $noise));
is($code, 1, "numbers that are nobody's do not conform");
like($out, qr/^known mistakes +none explains it, alone or in pairs/m, "for no known reason");

# ---- Exporting ---------------------------------------------------------------------------------------

my $file_of = "$dir/exported";
conform("export", "-m", $tiny, "--ids", $ids, "--npy", $file_of);
is($code, 0, "export --npy") or diag($err);
ok(slurp($file_of) eq slurp(npy("same.npy", "<f4", "72, 443", $exact)) ||
    substr(slurp($file_of), 128) eq $exact, "has the bits of exact mode");
against($file_of);
is($code, 0, "and is read back");
conform("export", "-m", $tiny, "--ids", $ids, "--safetensors", $file_of, "--positions", "3,-1");
ok(substr(slurp($file_of), 264) eq substr($exact, 3 * $row, $row) . substr($exact, -$row),
    "--safetensors of some positions");
against($file_of, "--positions", "3,-1");
is($code, 0, "and is read back");
conform("export", "-m", $tiny, "--ids", spew("front.ids", "@ids[0 .. 63]"), "--kld-base", $file_of, "-c", 32);
my ($ours, $same) = (slurp($file_of), slurp($kld));
is(length $ours, length $same, "--kld-base has the size of one made by hand");
is(substr($ours, 0, 20 + 4 * 64), substr($same, 0, 20 + 4 * 64), "the same head and tokens");
my @differ = grep { abs($_->[0] - $_->[1]) > 1 }
    map { [unpack("v", substr $ours, $_, 2), unpack("v", substr $same, $_, 2)] }
    map { my $at = 276 + $_ * 896 + 8; map { $at + 2 * $_ } 0 .. 442 } 0 .. 29;
is(scalar @differ, 0, "and the same codes, but for rounding");
conform("compare", $file_of, "-m", $tiny, "-t", 1);
is($code, 0, "and is read back");
refuses(qr/export needs one of/, "no form", "export", "-m", $tiny, "-p", "a");
refuses(qr{no/where: No such file}, "a folder that is not there", "export", "-m", $tiny, "-p", "a", "--npy",
    "$dir/no/where");
refuses(qr/each after the one before/, "positions out of order", "export", "-m", $tiny, "--ids", $ids, "--npy",
    $file_of, "--positions", "5,3");
{
    my $model = spew("a model.gguf", slurp($tiny));
    refuses(qr/a model\.gguf: this is a model, which would be overwritten/, "a model", "export", "-m", $model, "-p", "a",
        "--npy", $model);
    is(slurp($model), slurp($tiny), "which is whole");
    SKIP: {
        skip "no /dev/full", 2 if !-c "/dev/full";
        refuses(qr{/dev/full: No space left}, "a full device", "export", "-m", $tiny, "-p", "a", "--npy", "/dev/full");
        ok(-c "/dev/full", "which stays a device");
    }
    my $pipe = "$dir/pipe";
    refuses(qr/pipe is not a regular file/, "a pipe", "compare", $pipe, "-m", $tiny, "--ids", $ids)
        if POSIX::mkfifo($pipe, 0600);
}
SKIP: {
    my $python = qx(python3 -c "import numpy, safetensors.numpy; print('yes')" 2>&1);
    skip "no numpy and safetensors in python3", 1 if $python ne "yes\n";
    conform("export", "-m", $tiny, "--ids", $ids, "--npy", "$dir/e.npy");
    conform("export", "-m", $tiny, "--ids", $ids, "--safetensors", "$dir/e.safetensors");
    is(qx(python3 -c "import numpy as n, safetensors.numpy as s
a = n.load('$dir/e.npy'); b = s.load_file('$dir/e.safetensors')['logits']; c = n.fromfile('$base', '<f4').reshape(72, 443)
print((a == c).all() and (b == c).all())"), "True\n", "numpy and safetensors read the same numbers");
}

# ---- Layers ------------------------------------------------------------------------------------------

my $inside = "$dir/inside";
my $all_names = "inp_scaled,attn_norm,Qcur_raw,Qcur_normed,Qcur,Vcur,kqv_out,attn_out,sa_out,ffn_geglu,l_out,result_norm";
tiny("trace", $all_names, "--exact", "--dir", $inside);
sub layers { return tiny("layers", @_, "-t", 1) }
layers($inside);
is($code, 0, "layers: our own tensors agree") or diag($err);
like($out, qr/^all 82 tensors agree; the noisiest has NMSE 0\.00e\+00$/m, "all of them");
my $changed = slurp("$inside/kqv_out-3.f32");
spew("inside/kqv_out-3.f32", pack "f<*", map { $_ * 1.01 } unpack "f<*", $changed);
layers($inside);
is($code, 1, "one that differs");
like($out, qr/^kqv_out-3 is the first that differs; Qcur-3 before it is good$/m, "is named");
like($out, qr/^between them stands: RoPE of the keys, attention: .* \(layer 3 is local\)$/m, "with what makes it");
unlike($out, qr/^attn_out-3|^kqv_out-4/m, "and nothing is said of what follows");
like($out, qr/usual with bf16.*--band bf16 goes on/, "or it is noise");
layers($inside, "--band", "bf16");
is($code, 0, "which may be allowed");
spew("inside/kqv_out-3.f32", substr $changed, 0, -4);
layers($inside);
is($code, 2, "a file of another size is wrong");
like($err, qr/kqv_out-3 has \d+ values, expected \[72\]\[128\]/, "which is said");
mkdir "$dir/states";
my $hidden = join "", map { slurp("$inside/$_.f32") } "inp_scaled", (map { "l_out-$_" } 0 .. 6), "result_norm";
npy("states/hidden_states.npy", "<f4", "9, 1, 72, 64", $hidden);
layers("$dir/states");
is($code, 0, "transformers' hidden states, the last of them normed") or diag($out . $err);
like($out, qr/^all 9 tensors agree/m, "all of them");
substr $hidden, 4 * (72 * 64 * 7), 4 * 72 * 64, substr $hidden, 4 * (72 * 64 * 6), 4 * 72 * 64;
npy("states/hidden_states.npy", "<f4", "9, 72, 64", $hidden);
layers("$dir/states");
like($out, qr/^l_out-6 is the first .* l_out-5 .*^between them stands: the whole of layer 6, which is local$/ms,
    "a layer that does nothing is found");
# Heads before or after tokens, with and without a batch of one.
mkdir "$dir/heads";
my @q = unpack "f<*", slurp("$inside/Qcur-0.f32");    # [72][4][32]
my $heads_first = pack "f<*", map { my $h = $_; map { @q[128 * $_ + 32 * $h .. 128 * $_ + 32 * $h + 31] } 0 .. 71 } 0 .. 3;
for my $layout (["72, 128", 0], ["1, 72, 128", 0], ["72, 4, 32", 0], ["1, 72, 4, 32", 0], ["1, 4, 72, 32", 1], ["4, 72, 32", 1]) {
    npy("heads/Qcur-0.npy", "<f4", $layout->[0], $layout->[1] ? $heads_first : pack "f<*", @q);
    layers("$dir/heads");
    is($code, 0, "queries as [$layout->[0]]") or diag($out . $err);
    like($out, qr/^Qcur-0 +\[72\] NMSE 0\.00e\+00/m, "are read exactly");
}
npy("heads/Qcur-0.npy", "<f4", "1, 4, 72, 32", pack "f<*", @q);
layers("$dir/heads");
is($code, 1, "values in the other order differ");
my $late_heads = pack "f<*", map { my $h = $_; map { @q[128 * $_ + 32 * $h .. 128 * $_ + 32 * $h + 31] } 60 .. 71 } 0 .. 3;
npy("heads/Qcur-0.npy", "<f4", "1, 4, 12, 32", $late_heads);
layers("$dir/heads");
is($code, 0, "heads first, of the last tokens alone") or diag($out . $err);
like($out, qr/^Qcur-0 +\[12\] NMSE 0\.00e\+00/m, "are read exactly");
npy("heads/Qcur-0.npy", "<f4", "1, 4, 4, 32", substr $late_heads, 0, 4 * 4 * 4 * 32);
layers("$dir/heads");
is($code, 2, "as many heads as tokens are ambiguous");
like($err, qr/^conform: \S+Qcur-0\.npy: Qcur-0 has the shape \[1\]\[4\]\[4\]\[32\]: as many heads as tokens/, "which is said");
for my $shape ("36, 256", "1, 8, 36, 32", "4, 32, 72") {
    npy("heads/Qcur-0.npy", "<f4", $shape, $heads_first);
    layers("$dir/heads");
    is($code, 2, "queries as [$shape] are not taken");
    like($err, qr/has the shape \[.*\], expected \[72\]\[128\], or heads before or after tokens$/, "which is said");
}
refuses(qr/no tensor has one of our names/, "a folder of something else", "layers", "test/data", "-m", $tiny,
    "--ids", $ids);

# What llama-eval-callback prints: three numbers from each end.
sub shown { my $n = $_[0]; return $n > 6 ? (0 .. 2, $n - 3 .. $n - 1) : 0 .. $n - 1 }
sub printed {
    my ($name, $op, $data, @ne) = @_;
    my $text = "common_debug_cb_eval: $name = (f32) $op(x{1, 1, 1, 1}, }) = {" . join(", ", @ne, (1) x (4 - @ne)) . "}\n";
    for my $c (shown($ne[2] // 1)) {
        for my $b (shown($ne[1])) {
            $text .= join ", ", map { sprintf "%12.4f", $data->[$_ + $ne[0] * ($b + $ne[1] * $c)] } shown($ne[0]);
            $text .= "\n...\n";
        }
    }
    return $text . "sum = 1.0\n";
}
my %x = map { $_ => [unpack "f<*", slurp("$inside/$_.f32")] } "inp_scaled", "Qcur_raw-0", "Qcur-0", "l_out-7";
my $dump = printed("inp_scaled", "SCALE", $x{"inp_scaled"}, 64, 72) . printed("Qcur-0", "MUL_MAT", $x{"Qcur_raw-0"}, 128, 72)
    . printed("Qcur-0", "RESHAPE", $x{"Qcur_raw-0"}, 32, 4, 72) . printed("Qcur-0", "ROPE", $x{"Qcur-0"}, 32, 4, 72)
    . printed("l_out-7", "ADD", [@{ $x{"l_out-7"} }[-64 .. -1]], 64, 1);
layers(spew("dump.txt", $dump));
is($code, 0, "llama-eval-callback's text, the last layer being of the last token") or diag($out . $err);
is(() = $out =~ /NMSE 0\.00e\+00/g, 5, "to its four decimals");
$x{"Qcur-0"}[5 * 128 - 1] += 1;
$x{"Qcur-0"}[$_] += 0.5 for 0 .. 31;
layers(spew("dump.txt", printed("Qcur-0", "MUL_MAT", $x{"Qcur_raw-0"}, 128, 72)
    . printed("Qcur-0", "ROPE", $x{"Qcur-0"}, 32, 4, 72)));
like($out, qr/^Qcur-0 is the first that differs; Qcur_raw-0 before it is good$/m, "queries after RoPE have their name twice");

# ---- Vectors -----------------------------------------------------------------------------------------

my @small = ("tiny", "tiny-62", "tiny-mixed", "folktales");
conform("check", @small);
is($code, 0, "check: this build conforms") or diag($out . $err);
like($out, qr/^conforms: contract 1, \w+, 4 models, \d+ prompts, \d+ rows in exact and default mode, every bit$/,
    "in one line");
refuses(qr/there are no vectors "nosuch", but tiny, tiny-62, tiny-mixed, folktales, 270m/, "unknown vectors", "check", "tiny", "nosuch");
refuses(qr/there are no vectors "nosuch"/, "unknown vectors for an engine", "check", "nosuch", "--other", "true");
refuses(qr/there are no vectors "nosuch"/, "unknown vectors to write", "vectors", $dir, "nosuch");
refuses(qr/--band f17: no such band/, "an unknown band for an engine", "check", "tiny", "--other", "true", "--band", "f17");
refuses(qr/\Q$_->[0]\E does not belong to $_->[1]/, "$_->[1] $_->[0]", $_->[1], @$_[2 .. $#$_], $_->[0], "8")
    for ["--kv", "check"], ["-p", "check"], ["-m", "vectors", "d"], ["--ids", "mistakes"], ["-c", "compare", "x"];
refuses(qr{/no/tiny\.vec: No such file or directory \(check runs in the source's folder}, "no vectors here", "check", "tiny",
    "--dir", "$dir/no");
mkdir "$dir/v";
my $vectors = slurp("test/vectors/tiny.vec");
for my $change (["row 5 [0-9a-f]{64}", "row 5 " . "0" x 64, "position 5: exact mode's logits differs"],
    ["(row 5 [0-9a-f]{64}) [0-9a-f]{64}", sub { "$1 " . "0" x 64 }, "position 5: default mode's logits differs"],
    ["(row 1 .*) \\S+\\n", sub { "$1 1.5\n" }, "position 1: nll differs"],
    ["(top 0) \\d+:", sub { "$1 7:" }, "position 0: the first 16 differs"],
    ["text 6f", "text 6e", "without-bos: the text has other ids"]) {
    my ($from, $to, $says) = @$change;
    (my $other = $vectors) =~ s/$from/ref $to ? $to->() : $to/e;
    isnt($other, $vectors, "a change: $says");
    spew("v/tiny.vec", $other);
    conform("check", "tiny", "--dir", "$dir/v");
    is($code, 1, "does not conform");
    like($out, qr/\Q$says\E$/m, "and is named");
    like($out, qr/^does not conform: /m, "the verdict is the last line");
}
for my $bad ([qr/^prompt/m, "Prompt"], [qr/^ids 3 /m, "ids 3 x "], [qr/^ids 3 /m, "ids 3 443 "], [qr/^row 1 /m, "row 0 "],
    [qr/^top 0 /m, "top 0 x"], [qr/^contract 1/m, "contract 2"]) {
    (my $other = $vectors) =~ s/$bad->[0]/$bad->[1]/;
    spew("v/tiny.vec", $other);
    refuses(qr/is not as README.md says|is of contract 2/, "a vector file with \"$bad->[1]\"", "check", "tiny", "--dir", "$dir/v");
}
(my $other_model = $vectors) =~ s/^model \S+ ./model $tiny z/m;
spew("v/tiny.vec", $other_model);
refuses(qr/tiny\.gguf is another file than the vectors are of/, "another model", "check", "tiny", "--dir", "$dir/v");
conform("vectors", "$dir/v", "tiny");
is($code, 0, "vectors");
ok(slurp("$dir/v/tiny.vec") eq $vectors, "writes the same file anew");

my $only = $vectors =~ s/^prompt length-2100.*//msr; # of these every one is judged
$only =~ s/^prompt (bytes|whitespace).*?(?=^prompt)//msg;
spew("v/tiny.vec", $only);
conform("check", "tiny", "--dir", "$dir/v", "-t", 1, "--other", "$gemma3 -m {model} --exact -t 1 --ids {ids} --logits {out}");
is($code, 0, "check --other: our own command line conforms");
is(() = $out =~ /^tiny\.vec +\S+ +(\d+) +\1 +0 +0 +100\.00 %  conforms \(float32\)$/mg, 13, "prompt by prompt");
like($out, qr/^13 of 13 prompts conform$/m, "all of them");
conform("check", "tiny", "--dir", "$dir/v", "-t", 1, "--other", "cp $base {out}", "--no-diagnosis");
is($code, 1, "an engine that gives other rows does not");
is(() = $out =~ /the command failed, or gave no logits/g, 13, "which is said of each prompt");

SKIP: {
    skip "no python3", 2 if qx(python3 --version 2>&1) !~ /^Python 3/;
    my ($reader) = slurp("test/vectors/README.md") =~ /^```python\n(.*?)^```/ms;
    cmp_ok(() = $reader =~ /\n/g, "<=", 20, "README's reader has 20 lines at most");
    my $script = spew("reader.py", $reader . <<"END");
import hashlib, struct, sys
model, prompts = read_vectors("test/vectors/tiny.vec")
p = next(p for p in prompts if p["name"] == "length-24")
n_vocab, data = int(model[2]), open(sys.argv[1], "rb").read()
rows = [data[4 * n_vocab * i:4 * n_vocab * (i + 1)] for i in range(p["n"])]
good = all(hashlib.sha256(rows[i]).hexdigest() == p["row"][i][0] for i in range(24))
good &= all(rows[pos][4 * i:4 * i + 4] == b for pos, top in p["top"].items() for i, b in top)
print(len(prompts), len(p["ids"]), good)
END
    my ($short) = $vectors =~ /^prompt length-24.*?\nids (.*?)\n/ms;
    run(\$short, $gemma3, "-m", $tiny, "--ids", "-", "--exact", "--logits", "$dir/short.f32");
    is(qx(python3 $script $dir/short.f32), "16 24 True\n", "and reads what is in the files");
}

# ---- The mistakes --------------------------------------------------------------------------------------

# Each mistake in transformers, with its numbers and not ours. make_mistakes.py made them.
my ($at, $rows_of) = (0, slurp("test/vectors/mistakes.f32"));
my %n_vocab = ("tiny" => 443, "tiny-62" => 263, "tiny-mixed" => 263);
for (grep { !/^#/ } split /\n/, slurp("test/vectors/mistakes.txt")) {
    my ($names, $model, @positions) = split;
    my $size = 4 * $n_vocab{$model} * @positions;
    my $path = spew("mistake.f32", substr $rows_of, $at, $size);
    $at += $size;
    conform("compare", $path, "-m", "test/data/$model.gguf", "--ids", "test/data/$model.ids", "-t", 1,
        "--positions", join(",", @positions), "--json");
    my ($causes) = $out =~ /"causes":\[(.*?)\]/;
    is(join("+", sort split /,/, ($causes // "") =~ tr/"//dr), join("+", sort split /\+/, $names),
        "transformers with $names: the cause is named") or diag($out =~ s/.*\],//sr . $err);
    is($code, $names eq "kv-f16" ? 0 : 1, "and " . ($names eq "kv-f16" ? "conforms" : "does not conform"));
}
is($at, length $rows_of, "that is all of them");

# The same in bf16, whose noise is larger than some mistakes.
for my $path (glob "test/vectors/bf16*.npy") {
    my ($name) = $path =~ /bf16-?(.*)\.npy/;
    against($path, "--positions", join(",", map { 3 * $_ } 0 .. 23), "--json");
    my ($causes) = $out =~ /"causes":\[(.*?)\]/;
    is(($causes // "") =~ tr/"//dr, $name, "transformers in bf16, " . ($name ? "with $name" : "which is right") . ": "
        . ($name ? "named all the same" : "no mistake is named")) or diag($out =~ s/.*\],//sr . $err);
    is($code, $name ? 1 : 0, $name ? "does not conform" : "conforms");
}

# A mistake beneath the noise of an engine's arithmetic, and the same noise without it. 24 rows of a text
# are too few to see it.
sub with_key { my ($bytes, $key, $type, $value) = @_;
    my $at = 4 + length($key) + index $bytes, $key;
    substr($bytes, $at, 4) = pack $type, $value;
    return $bytes }
sub noisy {
    my ($bits, $size, $seed) = @_;
    return pack "f<*", map { $seed = ($seed * 1103515245 + 12345) & 0x7fffffff; $_ + $size * ($seed / 2**30 - 1) }
        unpack "f<*", $bits;
}
my ($long) = $vectors =~ /^prompt length-2100.*?\nids ((?:\d+ ){600})/ms;
my $long_ids = spew("long.ids", $long);
my $eps = spew("eps.gguf", with_key(slurp($tiny), "gemma3.attention.layer_norm_rms_epsilon", "f<", 1e-5));
for my $case ([$tiny, ""], [$eps, "norm-eps"]) {
    my ($model, $name) = @$case;
    run($gemma3, "-m", $model, "-c", 600, "--ids", $long_ids, "--exact", "--logits", "$dir/long.f32");
    my $path = spew("noisy.f32", noisy(slurp("$dir/long.f32"), 0.004, 7));
    conform("compare", $path, "-m", $tiny, "--ids", $long_ids, "-t", 1, "--json");
    my ($causes) = $out =~ /"causes":\[(.*?)\]/;
    is(($causes // "") =~ tr/"//dr, $name, $name ? "a mistake far beneath the noise is named" :
        "noise alone is not taken for one") or diag($out =~ s/.*\],//sr . $err);
    is($code, $name ? 1 : 0, $name ? "and does not conform" : "and conforms");
    conform("compare", $path, "-m", $tiny, "--ids", $long_ids, "-t", 1, "--suspect", "norm-eps,window-plus-1", "--json");
    my %weight = $out =~ /"name":"(.*?)","weight":([^,}]*)/g;
    is(join(" ", sort keys %weight), "norm-eps window-plus-1", "--suspect measures those named");
    cmp_ok(abs($weight{"norm-eps"} - ($name ? 1 : 0)), "<", 0.4, "how much of it is there");
    cmp_ok(abs($weight{"window-plus-1"}), "<", 0.4, "and how little of another");
}
wrong(qr/--suspect: there is no mistake "window" \(conform mistakes lists them\)/, "an unknown suspect", $base,
    "--suspect", "norm-eps,window");
wrong(qr/--suspect: expected 8 names at most/, "too many suspects", $base, "--suspect", join ",", ("silu") x 9);
conform("mistakes");
is($code, 0, "conform mistakes");
like($out, qr/^window-plus-1 +local layers see window \+ 1 keys$/m, "has names and what they are");

# Engines in bf16 round the embedding's scale too: named, but a fault only where the rest is finer.
{
    my ($skip, @positions) = (0);
    for (grep { !/^#/ } split /\n/, slurp("test/vectors/mistakes.txt")) {
        my ($names, $model, @at) = split;
        @positions = @at;
        last if $names eq "embedding-scale-bf16";
        $skip += 4 * $n_vocab{$model} * @at;
    }
    my $bits = substr $rows_of, $skip, 4 * 263 * @positions;
    my @args = ("-m", "test/data/tiny-62.gguf", "--ids", "test/data/tiny-62.ids", "-t", 1, "--positions", join ",", @positions);
    conform("compare", spew("scale.f32", noisy($bits, 0.003, 5)), @args);
    is($code, 1, "a bf16 embedding scale beneath less noise than bf16's does not conform") or diag($out . $err);
    conform("compare", spew("scale.f32", noisy($bits, 0.008, 5)), @args);
    is($code, 0, "beneath bf16's it does") or diag($out . $err);
    like($out, qr/^cause +embedding-scale-bf16: .*^ +it stands out .*^ +engines in bf16 do so: no fault there$/ms, "but is named");
}

# The real model's activations are too large for float16, and a server tells 20 logarithms a position.
SKIP: {
    my $real = "weights/gemma-3-270m-q4_k_m.gguf";
    skip "no $real: make $real fetches it", 3 if !-f $real;
    conform("compare", "test/vectors/f16-clamp.jsonl", "-m", $real, "-p", "The capital of France is Paris. The capital of Italy is");
    is($code, 1, "the real model in transformers, clamped to float16: does not conform");
    like($out, qr/^cause +f16-clamp: /m, "because it is clamped") or diag($out . $err);
    like($err, qr/13 tokens do not go beyond the window of 512/, "a text too short for the window is noted");
}

# ---- Numbers that are none -----------------------------------------------------------------------

{
    my $bytes = slurp($tiny);
    my $info  = sub { $_[0] + length(".weight") }; # behind a tensor's name: u32 n_dims | u64 ne[] | u32 type | u64 offset
    my $norm  = $info->(index $bytes, "output_norm.weight") + length "output_norm";
    my $last  = $info->(rindex $bytes, ".weight");
    my $end   = $last + 4 + 8 * unpack("V", substr $bytes, $last, 4) + 12;
    my $data  = ($end + 31) & ~31;
    my $at    = $norm + 4 + 8 * unpack("V", substr $bytes, $norm, 4) + 4;
    substr($bytes, $data + unpack("Q<", substr $bytes, $at, 8) + 4 * 7, 4) = pack "f<", "nan";
    my $nan = spew("nan.gguf", $bytes);
    for my $job (["nll"], ["perplexity", "-c", 8]) {
        conform(@$job, "-m", $nan, "-f", spew("words.txt", "the dog and the cat " x 20));
        isnt($code, 0, "@$job: logits that are not numbers end it");
        like($err, qr/^conform: the logits at position \d+ are not numbers: no score /, "in one sentence");
        unlike($out, qr/nan/, "and no figure is made of them");
    }
}

done_testing();
