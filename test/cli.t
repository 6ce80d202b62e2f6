#!/usr/bin/env perl
# cli.t - the command line: every option, exit codes, and what goes to which stream.
use strict;
use warnings;
use Cwd ();
use Digest::SHA qw(sha256_hex);
use File::Temp qw(tempdir);
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep time);

my $gemma3 = "./gemma3";
my $tiny   = "test/data/tiny.gguf";       # 443 tokens, <bos> is 3, context 512
my $base   = "test/data/tiny-62.gguf";    # no chat template
my $real   = "weights/gemma-3-270m-q4_k_m.gguf";
my $dir    = tempdir(CLEANUP => 1);
my ($n_vocab, $out, $err, $code) = (443);

plan skip_all => "no ./gemma3: make" if !-x $gemma3;

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

# Starts gemma3 with stdin from one file, stdout to another (undef: closed).
sub start {
    my ($in, $to, @args) = @_;
    my $pid = fork // die "fork: $!";
    return $pid if $pid;
    open STDIN,  "<", $in           or die;
    open STDERR, ">", "$dir/stderr" or die;
    if (defined $to) { open STDOUT, ">", $to or die } else { close STDOUT }
    exec $gemma3, @args;
    die "exec: $!";
}

# Runs it to its end; sets $out, $err and $code. A first argument that is a reference is the stdin.
sub run {
    my $in = ref $_[0] ? spew("stdin", ${ +shift }) : "/dev/null";
    waitpid start($in, "$dir/stdout", @_), 0;
    $code = $? & 127 ? "signal " . ($? & 127) : $? >> 8;
    ($out, $err) = (slurp("$dir/stdout"), slurp("$dir/stderr"));
    return $out;
}

# Ends a process that should have ended by itself. Returns its status, -1 when it had to be killed.
sub status_of {
    my ($pid, $seconds) = @_;
    for (1 .. $seconds * 20) {
        return $? if waitpid($pid, POSIX::WNOHANG()) == $pid;
        sleep 0.05;
    }
    kill KILL => $pid;
    waitpid $pid, 0;
    return -1;
}

# The same through a shell, whose redirections perl's open has not.
sub sh {
    my ($redirections, @args) = @_;
    my $line = join " ", map { "'$_'" } $gemma3, "-m", $tiny, @args;
    $code = system("$line $redirections") >> 8;
    return $code;
}

sub tiny { return run(ref $_[0] ? shift : (), "-m", $tiny, @_) }

# Wrong in the given way: nothing on stdout, one line on stderr.
sub refuses {
    my ($want_code, $like, $what, @args) = @_;
    run(@args);
    is($code, $want_code, "$what: exit code $want_code");
    like($err, $like, "$what: says so");
    is($out, "", "$what: nothing on stdout");
    is($err =~ tr/\n//, 1, "$what: one line") or diag($err);
}

# Rows of logits as lists.
sub rows {
    my @x = unpack "f<*", $_[0];
    return map { [splice @x, 0, $n_vocab] } 1 .. @x / $n_vocab;
}

sub argmax {
    my ($row) = @_;
    my $best = 0;
    $row->[$_] > $row->[$best] and $best = $_ for 0 .. $#$row;
    return $best;
}

# ---- About ---------------------------------------------------------------------------------------

run("--version");
is($code, 0, "--version");
like($out, qr/^gemma3\.c \d+\.\d+\.\d+, numeric contract 1\n$/, "names the version and the contract's");
is($err, "", "and nothing on stderr");

run("--help");
is($code, 0, "--help");
for my $option (qw(-m -p -f --ids -i -n -c -t -b --temp --top-k --top-p --min-p --repeat-penalty
    --seed --out-ids --exact --isa --kv --no-repack --obey-file --system --state --stop --logits --positions --hash
    --tokenize --no-bos --detokenize --special --info --version --help)) {
    like($out, qr/^  \Q$option\E /m, "--help has $option");
}
ok(!(grep { length > 100 } split /\n/, $out), "its lines have 100 columns at most");

run("--isa", "list");
my @isas = split /\n/, $out;
is($code, 0, "--isa list");
is($isas[-1], "scalar", "ends with what every CPU has");
ok(!(grep { !/^(scalar|avx2|avx512|avx512vnni|neon|dotprod|i8mm)$/ } @isas), "and names kernels");

tiny("--info");
is($code, 0, "--info");
my %info = (n_layers => 8, d_model => 64, d_ff => 96, n_heads => 4, n_kv_heads => 2,
    head_dim => 32, n_vocab => 443, n_ctx_train => 512, window => 8, rope_base_global => 1000000,
    rope_base_local => 10000, rope_factor => 8, embedding_scale => 8, contract => 1,
    mode => "default", rms_eps => "9.99999997e-07", "global layers" => 5);
like($out, qr/^$_ +\Q$info{$_}\E\b/m, "$_ is $info{$_}") for sort keys %info;
# one global layer of 512 slots, seven rings of 8 + 64 - 1; K and V, 2 heads of 32, 2 bytes
my $kv_bytes = (512 + 7 * 71) * 2 * 2 * 32 * 2;
like($out, qr/^KV cache +$kv_bytes bytes for -c 512 in f16$/m, "the cache's bytes");
like($out, qr/^weights +\d+ bytes/m, "the weights'");
tiny("--info", "-t", 1);
my ($one) = $out =~ /^scratch and tables +(\d+) bytes for -c 512 -b 64 -t 1$/m;
tiny("--info", "-t", 4);
my ($four) = $out =~ /^scratch and tables +(\d+) bytes for -c 512 -b 64 -t 4$/m;
ok($one && $four && $four > $one, "the scratch's, which grows with threads");
tiny("--info", "-b", 1, "--exact");
$kv_bytes = (512 + 7 * 8) * 2 * 2 * 32 * 4;
like($out, qr/^KV cache +$kv_bytes bytes for -c 512 in f32$/m, "a batch of 1 needs less of it");

# a name that would clear the screen
(my $named = slurp($tiny)) =~ s/(general\.name.{12})(.)(.)(.)/$1\e[\xff/s;
run("-m", spew("named.gguf", $named), "--info");
like($out, qr/^name +\?\[/m, "what the file's name is made of is printable");
unlike($out, qr/[\x00-\x09\x0b-\x1f\x7f]/, "all of it");

# ---- Wrong command lines -------------------------------------------------------------------------

refuses(2, qr/nothing to do/, "no prompt", "-m", $tiny);
refuses(2, qr/unknown option --frobnicate/, "an unknown option", "-m", $tiny, "--frobnicate");
refuses(2, qr/unknown option -p TEXT/, "an option and its value in one word", "-m", $tiny, "-p TEXT");
refuses(1, qr/the name of a file to write is empty/, "no name", "-m", $tiny, "-p", "a", "--logits", "");
run(\"hi\0there\n", "-m", "weights/gemma3-folktales-q4_0.gguf", "-i");
is($code, 1, "a zero byte in a chat's line");
like($err, qr/^gemma3: standard input: a zero byte in a line$/m, "says so");
refuses(2, qr/unknown option --per/, "a part of an option that has moved", "-m", $tiny, "--per");
refuses(2, qr/unexpected argument "hello"/, "a stray word", "-m", $tiny, "hello");
refuses(2, qr/unexpected argument "ores"/, "a word of the help", "-m", $tiny, "ores");
refuses(2, qr/-p needs a value/, "-p without text", "-m", $tiny, "-p");
refuses(2, qr/contradictory/, "two prompts", "-m", $tiny, "-p", "a", "-f", "b");
refuses(2, qr/contradictory/, "two jobs", "-m", $tiny, "-p", "a", "--info");
refuses(2, qr/--exact takes no value/, "a value for a flag", "-m", $tiny, "-p", "a", "--exact=1");
for my $bad (["-n", "x"], ["-n", "1.5"], ["-n", "-3"], ["-c", "0"], ["-t", "0"], ["-t", "1000"],
    ["-b", "0"], ["--temp", "-1"], ["--temp", "warm"], ["--temp", "nan"], ["--top-k", "-1"],
    ["--top-p", "1.5"], ["--min-p", "2"], ["--seed", "-1"], ["--seed", "1e9"],
    ["--seed", "18446744073709551616"], ["-n", "99999999999999999999"], ["-n", ""], ["--repeat-penalty", "0"]) {
    refuses(2, qr/^gemma3: $bad->[0] .*expected a (whole )?number from/, "@$bad", "-m", $tiny,
        "-p", "a", @$bad);
}
refuses(2, qr/--kv f8: expected f16 or f32/, "--kv f8", "-m", $tiny, "-p", "a", "--kv", "f8");
refuses(1, qr/instruction set "sse9" is unknown or this CPU does not have it/, "--isa sse9", "-m", $tiny,
    "-p", "a", "--isa", "sse9");
refuses(2, qr/--positions "0,x": expected whole numbers/, "--positions 0,x", "-m", $tiny, "-p",
    "a", "--hash", "--positions", "0,x");
refuses(2, qr/--positions needs/, "--positions alone", "-m", $tiny, "-p", "a", "--positions", "0");
refuses(2, qr/--system needs -i/, "--system without -i", "-m", $tiny, "-p", "a", "--system", "b");
refuses(2, qr/need -p, -f or --ids/, "--hash of a chat", "-m", $tiny, "-i", "--hash");
for my $moved ("--nll", "--perplexity", "--top", "--trace", "--trace-dir") {
    my ($option, $job) = $moved =~ /^(--(\w+)[\w-]*)/;
    refuses(2, qr{^gemma3: $option is now `test/conform $job` \(make conform\)}, "$moved, which has moved",
        "-m", $tiny, "-p", "a", $moved, "1");
}
refuses(2, qr/--stop: 32 of them are possible/, "33 texts to stop at", "-m", $tiny, "-p", "a",
    map { ("--stop", $_) } 1 .. 33);
refuses(2, qr/--stop: expected a text of 1 to 1000 bytes/, "an empty one", "-m", $tiny, "-p", "a", "--stop", "");

# ---- Jobs that fail ------------------------------------------------------------------------------

my $ids = "test/data/tiny.ids";
refuses(1, qr/no such model\.gguf cannot be opened: No such file/, "a missing model", "-m",
    "no such model.gguf", "-p", "a");
refuses(1, qr/test is not a regular file/, "a folder", "-m", "test", "-p", "a");
refuses(1, qr/cli\.t is not a GGUF file/, "another file", "-m", "test/cli.t", "-p", "a");
refuses(1, qr/empty has 0 bytes/, "an empty file", "-m", spew("empty", ""), "-p", "a");
refuses(1, qr/cut\.gguf is truncated/, "half a model", "-m",
    spew("cut.gguf", substr slurp($tiny), 0, 100000), "-p", "a");
refuses(1, qr/no such text: No such file/, "a missing text", "-m", $tiny, "-f", "no such text");
refuses(1, qr/\.ids: id 443 is outside the vocabulary, 0 to 442/, "an id too many", "-m", $tiny,
    "--ids", spew("bad.ids", "3 443"), "--hash");
refuses(1, qr/id -1 is outside/, "a negative id", "-m", $tiny, "--ids", spew("bad.ids", "3 -1"));
refuses(1, qr/expected ids .* found "cat/, "words for ids", "-m", $tiny, "--ids",
    spew("bad.ids", "3 cat"));
refuses(1, qr/found "\?\[2Jab\xc3\xa4c\?\?\xef\xbf\xbd\?"$/m, "what is shown of them is printable", "-m",
    $tiny, "--ids", spew("bad.ids", "3 \e[2Jab\xc3\xa4c\xc2\x9b\x7f\xc3\x1b"));
open my $huge, ">", "$dir/huge.txt" or die;
truncate $huge, 600 << 20;
close $huge;
refuses(1, qr/huge\.txt: 629145600 bytes, expected at most 536870912/, "a text of 600 MB", "-m", $tiny, "-f",
    "$dir/huge.txt");
unlink "$dir/huge.txt";
refuses(1, qr/no tokens/, "no ids", "-m", $tiny, "--ids", spew("bad.ids", " \n"));
refuses(1, qr/prompt has 72 tokens and the context room for 71/, "a prompt that is too long",
    "-m", $tiny, "--ids", $ids, "-c", 71);
refuses(1, qr/--positions 72: the prompt has 72/, "a position too far", "-m", $tiny, "--ids", $ids,
    "--hash", "--positions", "0,72");
refuses(1, qr/outside the vocabulary/, "--detokenize 443", "-m", $tiny, "--detokenize", "443");
refuses(1, qr/found "two 5"/, "--detokenize of words", "-m", $tiny, "--detokenize", "3 two 5");
for my $list ("5,0", "3,3", "0,-72") {
    refuses(1, qr/--positions: expected them to ascend, found \d+ after \d+/, "--positions $list", "-m", $tiny,
        "--ids", $ids, "--hash", "--positions", $list);
}

SKIP: {
    skip "no /dev/full here", 10 if !-c "/dev/full";
    refuses(1, qr{/dev/full: No space left}, "--logits on a full disk", "-m", $tiny, "--ids", $ids,
        "--logits", "/dev/full");
    for my $job ([], ["--hash"]) {
        waitpid start("/dev/null", "/dev/full", "-m", $tiny, "--ids", $ids, "--logits", "-", @$job), 0;
        is($? >> 8, 1, "--logits - on a full disk, @$job: exit code 1");
        is(slurp("$dir/stderr"), "gemma3: standard output: No space left on device\n", "and one sentence");
    }
    waitpid start("/dev/null", "/dev/full", "-m", $tiny, "-p", "a", "-n", 5), 0;
    is($? >> 8, 1, "text on a full disk: exit code 1");
    like(slurp("$dir/stderr"), qr/standard output: No space left/, "and says why");
}
waitpid start("/dev/null", undef, "-m", $tiny, "-p", "a", "-n", 5), 0;
is($? >> 8, 1, "stdout closed: exit code 1");
like(slurp("$dir/stderr"), qr/standard output: /, "and says so");
for my $job (["--logits", "-"], ["--logits", "-", "--positions", "0,5"], ["-n", 100, "--seed", 3]) {
    pipe my $read, my $write;
    my $pid = fork // die;
    if (!$pid) {
        open STDOUT, ">&", $write;
        open STDERR, ">", "$dir/stderr";
        close $_ for $read, $write;
        exec $gemma3, "-m", $tiny, "--ids", $ids, @$job;
    }
    close $_ for $read, $write;
    waitpid $pid, 0;
    is($?, 256, "@$job, a reader that goes away: exit code 1, no signal");
    is(slurp("$dir/stderr"), "", "and no word");
}

# ---- Files that are there already ----------------------------------------------------------------

POSIX::mkfifo("$dir/fifo", 0600);
is(status_of(start("/dev/null", "$dir/stdout", "-m", "$dir/fifo", "-p", "a"), 10) >> 8, 1,
    "a FIFO is no model, and is not waited for");
like(slurp("$dir/stderr"), qr/fifo is not a regular file/, "which is said");

my $copy = spew("the model.gguf", slurp($tiny));
link $copy, "$dir/its other name";
for my $name ($copy, "$dir/its other name") {
    refuses(1, qr/this is a model, which would be overwritten/, "--logits onto the model", "-m", $copy, "--ids", $ids, "--logits", $name);
    ok(slurp($copy) eq slurp($tiny), "which stays as it was");
}
my $keep = spew("keep.bin", "old");
refuses(1, qr/--positions 72/, "a job that fails", "-m", $tiny, "--ids", $ids, "--logits", $keep, "--positions", 72);
is(slurp($keep), "old", "leaves the old output alone");
$code = system("ulimit -f 10; $gemma3 -m $tiny --ids $ids --logits '$keep' 2>'$dir/stderr'") >> 8;
is($code, 1, "and one whose file grows beyond its limit");
like(slurp("$dir/stderr"), qr/^gemma3: \Q$keep\E: File too large\n$/, "which is said");
is(slurp($keep), "old", "the old output is there");
tiny("--ids", $ids, "--logits", $keep, "--positions", "-1");
is(-s $keep, $n_vocab * 4, "a job that succeeds replaces it");
symlink $keep, "$dir/link";
tiny("--ids", $ids, "--logits", "$dir/link", "--positions", "0,1");
ok(-l "$dir/link" && -s $keep == 2 * $n_vocab * 4, "through a symbolic link too");
is(scalar(grep { /\.part$/ } glob "'$dir'/*"), 0, "and nothing else is left");
{
    my $pid = start("/dev/null", "$dir/stdout", "-m", $tiny, "--ids", $ids, "--logits", "$dir/fifo");
    open my $f, "<:raw", "$dir/fifo";
    local $/;
    my $bytes = <$f>;
    is(status_of($pid, 10), 0, "--logits into a FIFO");
    is(length $bytes, 72 * $n_vocab * 4, "writes into it");
    ok(-p "$dir/fifo", "which stays one");
}

# Streams that are closed: nothing may get their numbers.
sh(">&- 2>$dir/stderr", "--ids", $ids, "--hash");
is($code, 1, "stdout closed and something to say: exit code 1");
like(slurp("$dir/stderr"), qr/^gemma3: standard output: [^\n]*\n$/, "which is said");
sh(">&- 2>&- <&-", "--ids", $ids, "--logits", "$dir/closed.bin");
is($code, 0, "all streams closed and nothing to say");
is(-s "$dir/closed.bin", 72 * $n_vocab * 4, "the logits are whole");
sh("<&- >$dir/stdout 2>$dir/stderr", "-f", "-");
is($code, 1, "stdin closed and to be read: exit code 1");

# ---- Tokens --------------------------------------------------------------------------------------

sub ids_of { return split " ", tiny("--tokenize", @_) }

is(tiny("--tokenize", "the cat"), join(" ", 3, ids_of("the cat", "--no-bos")) . "\n",
    "--tokenize: <bos> and ids on one line");
is($code, 0, "exit code 0");
is($err, "", "nothing on stderr");
tiny("--detokenize", join " ", ids_of("the girl\n\n went  home\xe2\x82\xac"));
is($out, "the girl\n\n went  home\xe2\x82\xac", "--detokenize gives the bytes back");
is(tiny("--detokenize", "3,3"), "", "<bos> is no text");
is(tiny("--detokenize", "3 261", "--special"), "<bos><end_of_turn>", "unless --special");
is(join(" ", ids_of("<end_of_turn>", "--special")), "3 261", "--special reads control tokens");
ok(ids_of("<end_of_turn>") > 2, "which are plain text otherwise");
my $poem = spew("a poem.txt", "the dog\nand the cat\n");
is(tiny("--tokenize", "-f", $poem), tiny("--tokenize", "the dog\nand the cat\n"),
    "--tokenize -f of a path with a space");
my $piped = tiny(\"the dog\nand the cat\n", "--tokenize", "-f", "-");
is($piped, tiny("--tokenize", "-f", $poem), "and of stdin");
is(tiny("--tokenize="), "3\n", "no text is <bos>");

# ---- Logits --------------------------------------------------------------------------------------

my @ids = split " ", slurp($ids);
my $all = tiny("--ids", $ids, "--logits", "-");
is($code, 0, "--logits -");
is(length $all, 72 * 443 * 4, "has a row for every id, none added");
is($err, "", "and nothing is generated");
my @rows = rows($all);
tiny("--ids", $ids, "--hash");
is($out, "contract 1 mode default kv f16 sha256 " . sha256_hex($all) . "\n",
    "--hash is the SHA-256 of the same bytes");
my $hash = $out;

for my $options (["-t", 1], ["-t", 2], ["-t", 3], ["-t", 8], ["-b", 1], ["-b", 7], ["-b", 64],
    ["-c", 72], ["-c", 500], ["--no-repack"], ["--kv", "f16"], map { ["--isa", $_] } @isas) {
    is(tiny("--ids", $ids, "--hash", @$options), $hash, "the same with @$options");
}
tiny(\slurp($ids), "--ids", "-", "--hash");
is($out, $hash, "ids from stdin");
my %other = (hash_of($hash) => "default f16");
for my $how (["--exact"], ["--kv", "f32"], ["--exact", "--kv", "f16"]) {
    tiny("--ids", $ids, "--hash", @$how);
    my ($mode, $kv) = ("@$how" =~ /exact/ ? "exact" : "default",
        "@$how" eq "--exact" || "@$how" eq "--kv f32" ? "f32" : "f16");
    like($out, qr/^contract 1 mode $mode kv $kv sha256 /, "@$how is mode $mode, cache $kv");
    ok(!$other{ hash_of($out) }++, "and other bits");
}
sub hash_of { return $_[0] =~ /sha256 (\w{64})$/ ? $1 : "none" }

tiny("--ids", $ids, "--exact", "--logits", "$dir/exact logits");
is($out, "", "--logits FILE: nothing on stdout");
my ($worst, @want) = (0, unpack "f<*", slurp("test/data/tiny.logits"));
my @got = unpack "f<*", slurp("$dir/exact logits");
for (0 .. $#want) { my $d = abs($got[$_] - $want[$_]); $worst = $d if $d > $worst }
ok(@got == @want && $worst < 2e-4, "--exact: transformers' logits within 2e-4");

my $row_bytes = $n_vocab * 4;
my $picked = tiny("--ids", $ids, "--positions", "0,5,-1", "--logits", "-");
ok($picked eq join("", map { substr $all, $_ * $row_bytes, $row_bytes } 0, 5, 71),
    "--positions: these rows, from the end when negative");
tiny("--ids", $ids, "--positions", "0 3 -2", "--hash");
is(hash_of($out), sha256_hex(map { substr $all, $_ * $row_bytes, $row_bytes } 0, 3, 70),
    "--positions also picks what is hashed");
tiny("--ids", $ids, "--logits", "-", "--hash", "-n", 3, "--out-ids");
ok($out eq $all, "--logits -: nothing else goes to stdout");
like($err, qr/^contract 1 .*\n\d+ \d+ \d+\n/, "the rest goes to stderr");
ok(tiny("-p", "the cat", "--logits", "-") eq tiny(\join(" ", ids_of("the cat")), "--ids", "-",
    "--logits", "-"), "-p is completed as it stands, after <bos>");
ok(tiny("-p", "the cat", "--no-bos", "--logits", "-") eq
    tiny(\join(" ", ids_of("the cat", "--no-bos")), "--ids", "-", "--logits", "-"), "--no-bos");

# ---- Text ----------------------------------------------------------------------------------------

my @prompt = ids_of("the little girl");
my @chosen;
for (1 .. 12) {
    my @all = (@prompt, @chosen);
    push @chosen, argmax(rows(tiny(\"@all", "--ids", "-", "--positions", "-1", "--logits", "-")));
}
is(tiny("-p", "the little girl", "--temp", 0, "-n", 12, "--out-ids"), "@chosen\n",
    "greedy: the argmax of the logits again and again");
like($err, qr{^prompt \d+ tokens, .* tokens/s; generated 12 tokens}, "the speed goes to stderr");
my $text = tiny("-p", "the little girl", "--temp", 0, "-n", 12);
is($code, 0, "exit code 0");
tiny("--detokenize", "@chosen");
(my $whole = $out) =~ s/[\x80-\xff]//g;
(my $ascii = $text) =~ s/[\x80-\xff]//g;
is($ascii, $whole, "the text is the ids' text");
is(tiny("-p", "a", "-n", 0), "", "-n 0 is nothing");
is($code, 0, "and no failure");

my @sampling = ("-p", "the", "-n", 80);
$text = tiny(@sampling);
is(tiny(@sampling), $text, "a fixed seed by default");
is(tiny(@sampling, qw(--temp 1 --top-k 64 --top-p 0.95 --min-p 0 --repeat-penalty 1 --seed 42 -b 64
    -c 512)), $text, "the defaults are what --help says");
isnt(tiny(@sampling, "--seed", 7), $text, "another seed is another text");
isnt(tiny(@sampling, "--temp=0.01"), $text, "--temp=T is understood too");
isnt(tiny(@sampling, "--top-k", 2), $text, "--top-k");
isnt(tiny(@sampling, "--top-p", 0.1), $text, "--top-p");
isnt(tiny(@sampling, "--min-p", 0.9), $text, "--min-p");
isnt(tiny(@sampling, "--repeat-penalty", 3), $text, "--repeat-penalty");
my $n_invalid = 0;
for my $seed (1 .. 8) {
    my $copy = tiny(@sampling, "--seed", $seed);
    $n_invalid++ if !utf8::decode($copy);
}
is($n_invalid, 0, "text is whole UTF-8 characters");

my $stop = substr $text, 20, 4;
tiny(@sampling, "--stop", "no such thing", "--stop", $stop);
is($out, substr($text, 0, index $text, $stop), "--stop ends before its text");
tiny(@sampling[0, 1], "--hash");
like($out, qr/^contract \S.*\n$/, "--hash generates nothing");
my ($short, $long) = (substr($text, 24, 4), substr($text, 20, 8));
for my $order ([$short, $long], [$long, $short]) {
    tiny(@sampling, map { ("--stop", $_) } @$order);
    is($out, substr($text, 0, index $text, $long), "of texts that end together the longer one stops");
}
tiny(@sampling[0, 1], "--hash", "-n", 3, "--out-ids");
like($out, qr/^contract .*\n\d+ \d+ \d+\n$/, "unless -n is given");
tiny("-p", "the", "-c", 12, "--seed", 3);
is($code, 0, "without -n until the context is full");
like($err, qr/the context of 12 tokens is full/, "which is said");
tiny(\"the", "-f", "-", "-n", 80);
is($out, $text, "-f - reads stdin");
tiny("--detokenize", join " ", ids_of("h\xc3\xa9 \xe4\xbd\xa0"));
is($out, "h\xc3\xa9 \xe4\xbd\xa0", "UTF-8 arguments");
spew("my model.gguf", slurp($tiny));
is(run("-m", "$dir/my model.gguf", "--ids", $ids, "--hash"), $hash, "a path with a space");

# ---- Chat ----------------------------------------------------------------------------------------

my @chat = ("-i", "--temp", 0, "-n", 10, "--out-ids");
sub answer_to {    # what --ids gives for a text of turns
    my @all = ids_of($_[0], "--special");
    tiny(\"@all", "--ids", "-", "--temp", 0, "-n", 10, "--out-ids");
    return $out;
}
sub text_of { (my $ids = $_[0]) =~ s/\n//; return tiny("--detokenize", $ids, "--special") }
my $first = answer_to("<start_of_turn>user\nthe cat<end_of_turn>\n<start_of_turn>model\n");
tiny(\"the cat\n", @chat);
is($code, 0, "-i");
is($out, $first, "the turn is what the template makes of it");
is(() = $err =~ /not trained to chat/g, 0, "a model with a template was trained to chat");
tiny(\" the cat \n/clear\n\nthe cat\n/quit\nthe dog\n", @chat);
is($out, $first . $first, "/clear forgets, an empty line is nothing, /quit ends");
tiny(\"the cat\r\n", @chat);
is($out, $first, "a line may end as on Windows");
tiny(\"the\rcat\n", @chat);
is($out, answer_to("<start_of_turn>user\nthe\rcat<end_of_turn>\n<start_of_turn>model\n"),
    "within it a carriage return is a character");
tiny(\"the cat\n", @chat, "--system", "you are a dog");
is($out, answer_to("<start_of_turn>user\nyou are a dog\n\nthe cat<end_of_turn>\n" .
    "<start_of_turn>model\n"), "--system is put before the first turn");
tiny(\"the cat\nthe dog\n", @chat);
my @turns = split /\n/, $out;
my @history = (ids_of("<start_of_turn>user\nthe cat<end_of_turn>\n<start_of_turn>model\n",
    "--special"), split(" ", $first), ids_of("<end_of_turn>\n<start_of_turn>user\nthe dog" .
    "<end_of_turn>\n<start_of_turn>model\n", "--special", "--no-bos"));
is($turns[1], tiny(\"@history", "--ids", "-", "--temp", 0, "-n", 10, "--out-ids") =~ s/\n//r,
    "the second turn comes after the first and its answer");
run(\"a\nb\n", "-m", $base, "-i", "-n", 2);
is(() = $err =~ /no chat template in the file: this may be a base model, not trained to chat/g, 1,
    "a file without template says once that the model may not have been trained to chat");
tiny(\"the cat\nthe dog\nthe girl\n", "-i", "-c", 40, "--temp", 0);
is($code, 0, "a full context ends a chat cleanly");
like($err, qr/the context of 40 tokens is full/, "and says so");

# Ctrl-C: the model answers for minutes; then the next line is read.
{
    spew("stdin", "the cat\n/clear\nthe cat\n/quit\n");
    my @long = ("-m", $tiny, "-i", "-c", 60000, "--seed", 5, "--top-k", 0, "--temp", 0);
    my $pid = start("$dir/stdin", "$dir/stdout", @long);
    my $n_sent = 0;
    for (1 .. 200) {
        sleep 0.05;
        last if waitpid($pid, 1) == $pid && ($n_sent += 1000);
        if ($_ % 6 == 0 && -s "$dir/stdout") { kill INT => $pid; $n_sent++ }
    }
    my $ended = $n_sent >= 1000;
    if (!$ended) { kill KILL => $pid; waitpid $pid, 0 }
    ok($ended && $? == 0, "Ctrl-C stops the answer, not the program") or diag("status $?");
    cmp_ok($n_sent % 1000, ">=", 2, "once for each answer") if $ended;
    like(slurp("$dir/stderr"), qr/^prompt \d+ tokens/m, "and the chat ends as usual");
}

# Ctrl-C while a line is awaited ends the program, as it ends any other.
{
    pipe my $read, my $write;
    my $pid = fork // die;
    if (!$pid) {
        open STDIN, "<&", $read;
        open STDOUT, ">", "$dir/stdout";
        open STDERR, ">", "$dir/stderr";
        close $_ for $read, $write;
        exec $gemma3, "-m", $tiny, @chat;
    }
    close $read;
    syswrite $write, "the cat\nonce upon";
    for (1 .. 200) { last if -s "$dir/stdout"; sleep 0.05 }
    sleep 0.3;
    kill INT => $pid;
    is(status_of($pid, 10) & 127, POSIX::SIGINT(), "Ctrl-C while a line is awaited ends the chat");
    is(slurp("$dir/stdout"), $first, "whose answers are out");
}

# ---- Files, texts and machines that are not as they should be --------------------------------------

# Where things are in a GGUF: key => offset of its value (of an array: of its first element),
# "tensor NAME" => offset of its data, and where keys, the directory and the alignment after it end.
sub gguf {
    my ($b) = @_;
    my @size = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8);
    my ($n_tensors, $n_keys) = unpack "x8 Q<2", $b;
    my ($at, %is) = (24);
    my $number = sub { my ($form, $n) = @_; $at += $n; return unpack $form, substr $b, $at - $n, $n };
    my $string = sub { my $n = $number->("Q<", 8); $at += $n; return substr $b, $at - $n, $n };
    for (1 .. $n_keys) {
        my ($name, $type, $n) = ($string->(), $number->("V", 4), 1);
        ($type, $n) = ($number->("V", 4), $number->("Q<", 8)) if $type == 9;
        $is{$name} = $at;
        if ($type == 8) { $string->() for 1 .. $n }
        else            { $at += $n * $size[$type] }
    }
    $is{"end of keys"} = $at;
    my %offset;
    for (1 .. $n_tensors) {
        my $name = $string->();
        $at += 8 * $number->("V", 4) + 4;
        $offset{"tensor $name"} = $number->("Q<", 8);
    }
    $is{"end of directory"} = $at;
    $at = int(($at + 31) / 32) * 32;
    return (%is, data => $at, map { ($_ => $at + $offset{$_}) } keys %offset);
}

# A copy of a model with bytes changed: (name of the copy, original, offset => bytes ...).
sub edited {
    my ($name, $model, %bytes) = @_;
    my $b = slurp($model);
    substr($b, $_, length $bytes{$_}) = $bytes{$_} for keys %bytes;
    return spew($name, $b);
}

# A copy with one more key of type float32.
sub with_key {
    my ($name, $model, $key, $value) = @_;
    my ($b, $n_keys) = (slurp($model), 0);
    my %is = gguf($b);
    my $data = substr $b, $is{data};
    my $head = substr($b, 0, $is{"end of keys"}) . pack("Q</a V f<", $key, 6, $value) .
        substr $b, $is{"end of keys"}, $is{"end of directory"} - $is{"end of keys"};
    substr($head, 16, 8) = pack "Q<", 1 + unpack "Q<", substr $head, 16, 8;
    return spew($name, $head . "\0" x (-length($head) % 32) . $data);
}

# A --stop text that is one token, also of a control token, which prints nothing.
{
    my $small = "weights/gemma3-folktales-q4_0.gguf";
    my $b = slurp($small);
    my ($the) = split " ", run("-m", $small, "--no-bos", "--tokenize", " the");
    my %is = gguf($b);
    my $at = index $b, pack("Q</a", "\xe2\x96\x81the"), $is{"tokenizer.ggml.tokens"};
    my $control = edited("control.gguf", $small, $at + 8 => "<abcd>",
        $is{"tokenizer.ggml.token_type"} + 4 * $the => pack "V", 3);
    my @story = ("-m", $control, "-p", "Once upon a time", "-n", 60, "--temp", 0);
    my ($until) = run(@story, "--out-ids") =~ /^(.*?) $the /;
    ok(length($until // ""), "a story has the control token");
    run(@story, "--out-ids", "--stop", "no such", "--stop", "<abcd>");
    is($out, "$until\n", "--stop with the text of a control token ends there");
    is(run(@story, "--stop", "<abcd>"), run("-m", $control, "--detokenize", $until), "printing what came before");
    unlike(run(@story, "--special", "--stop", "<abcd>"), qr/<abcd>/, "with --special too");
}

# Numbers that are none.
{
    my %is = gguf(slurp($tiny));
    my $nan = edited("nan.gguf", $tiny, $is{"tensor blk.3.ffn_norm.weight"} + 4 * 7 => pack "f<", "nan");
    my $says = qr/^gemma3: logits are not numbers at position \d+: try --kv f32 or --exact; the first tensor that holds what is none is ffn_norm-3$/m;
    run("-m", $nan, "-p", "the cat", "-n", 6);
    is($code, 1, "logits that are not numbers: exit code 1");
    like($err, $says, "one sentence, with the position, what to try, and the first tensor");
    unlike($err, qr/generated/, "and nothing about what was generated");
    run(\"the cat\nthe dog\n", "-m", $nan, "-i");
    is($code, 1, "in a chat too");
    is(() = $err =~ /$says/g, 1, "once");
    run("-m", $nan, "--ids", $ids, "--hash", "--exact");
    is($code, 1, "--hash of them");
    like($err, qr/^gemma3: logits are not numbers at position 0; the first tensor that holds what is none is ffn_norm-3$/m,
        "there is nothing to try beyond --exact");
    like($out, qr/^contract 1 mode exact kv f32 sha256 \w{64}$/, "is printed all the same");
    my $at = $is{"tensor blk.2.attn_norm.weight"};
    my $large = edited("large.gguf", $tiny, $at =>
        pack "f<*", map { $_ * 1e7 } unpack "f<64", substr slurp($tiny), $at, 256);
    run("-m", $large, "-p", "the cat", "-n", 6);
    is($code, 1, "values beyond what an F16 cache holds: exit code 1");
    like($err, qr/try --kv f32 or --exact; the first tensor that holds what is none is (kqv_out|attn_out)\S*-2$/m, "says what to try");
    for my $how (["--kv", "f32"], ["--exact"]) {
        run("-m", $large, "-p", "the cat", "-n", 6, @$how);
        is($code, 0, "and @$how is right");
    }
}

# <bos> in the text.
{
    is(tiny("--tokenize", "<bos>the cat", "--special"), tiny("--tokenize", "the cat"), "--special: a text's own <bos> is the one");
    like($err, qr/^$/, "without it nothing is said");
    tiny("--tokenize", "<bos>the cat", "--special");
    like($err, qr/^gemma3: the text begins with <bos>: no other is put before it\n$/, "with it there is a note");
    is(tiny("--tokenize", "<bos>the cat", "--special", "--no-bos"), tiny("--tokenize", "the cat"), "--no-bos: the same");
    is($err, "", "and no note");
    my ($hash) = tiny("-p", "the cat", "--hash");
    is(tiny("-p", "<bos>the cat", "--special", "--hash"), $hash, "so are its logits");
    is(scalar(() = tiny("--tokenize", "<bos><bos>", "--special") =~ /\b3\b/g), 2, "two in the text stay two");
}

# Chat templates that ask for something else, turns of several lines, a full context.
{
    my ($b, %is) = (slurp($tiny), gguf(slurp($tiny)));
    my $at = $is{"tokenizer.chat_template"};
    my $template = substr $b, $at + 8, unpack "Q<", substr $b, $at, 8;
    my $with = sub {
        my ($name, $from, $to) = @_;
        (my $t = $template) =~ s/\Q$from\E/$to/g;
        return edited("$name.gguf", $tiny, $at + 8 => $t);
    };
    run(\"the cat\n", "-m", $with->("chatml", "<start_of_turn>", "<|im_start|>**"), @chat);
    like($err, qr/^gemma3: the file's chat template has no <start_of_turn>: turns here are Gemma's, without more$/m,
        "a template that is not Gemma's is named");
    is($out, $first, "and the turns are Gemma's");
    for my $word ("tools", "developer", "source_lang_code") {
        run(\"the cat\n", "-m", $with->($word, substr($template, 0, length $word), $word), @chat);
        like($err, qr/^gemma3: the file's chat template asks for $word: turns here are Gemma's, without more$/m, "one that asks for $word");
    }
    tiny(\"the cat\n", @chat);
    unlike($err, qr/template/, "of Gemma's own nothing is said");
    my $lines = answer_to("<start_of_turn>user\nthe cat\nand\n\nthe dog<end_of_turn>\n<start_of_turn>model\n");
    tiny(\"the cat\\\nand\\\n\\\nthe dog\n", @chat);
    is($out, $lines, "a line that ends in \\ goes on in the next");
    tiny(\"the cat\\\r\nand\\\r\n\\\r\nthe dog\r\n", @chat);
    is($out, $lines, "with the line ends of Windows too");
    tiny(\"the cat\\", @chat);
    is($out, answer_to("<start_of_turn>user\nthe cat\\<end_of_turn>\n<start_of_turn>model\n"), "at the end of all lines it is a \\");
    tiny(\"the cat\n", "-i", "-c", 20, "--top-k", 1);
    like($err, qr/^gemma3: the context of 20 tokens is full; \/clear starts again, -c gives more$/m,
        "an answer that fills the context says what helps");
}

# --state: computed once.
{
    my $state = "$dir/kept state";
    my $n_read = sub { return $err =~ /^prompt (\d+) tokens/m ? $1 : -1 };
    my @go = ("--temp", 0, "-n", 8, "--repeat-penalty", 1.3, "--out-ids");
    my $long = "once upon a time there was a little girl who lived in the forest";
    my $want = tiny("-p", $long, @go);
    my $n = $n_read->();
    is(tiny("-p", $long, @go, "--state", $state), $want, "--state: the same text");
    is($n_read->(), $n, "all of the prompt is computed");
    my $kept = slurp($state);
    is(tiny("-p", $long, @go, "--state", $state), $want, "and again from the file");
    is($n_read->(), 1, "but for the last token nothing is computed");
    is(tiny("-p", "$long with a cat", @go, "--state", $state), tiny("-p", "$long with a cat", @go), "a longer text");
    ok(slurp($state) eq $kept, "leaves the file");
    tiny("-p", "$long with a cat", @go, "--state", $state);
    cmp_ok($n_read->(), "<", 8, "and computes what is new");
    is(tiny("-p", "the cat", @go, "--state", $state), tiny("-p", "the cat", @go), "another text");
    ok(slurp($state) ne $kept, "is computed and kept instead");
    is(scalar(grep { /\.part$/ } glob "'$dir'/*"), 0, "no half file is left");

    my @kind = (@chat, "--system", "you are a dog who lives in the forest", "--state", "$dir/system state");
    my @plain = (@chat, "--system", "you are a dog who lives in the forest");
    my $dog = tiny(\"the cat\n", @plain);
    $n = $n_read->();
    is(tiny(\"the cat\n", @kind), $dog, "a system text, computed");
    is(tiny(\"the cat\n", @kind), $dog, "and read");
    cmp_ok($n_read->(), "<", $n / 2, "which saves its tokens");
    is(tiny(\"the girl\n/clear\nthe cat\n", @kind), tiny(\"the girl\n/clear\nthe cat\n", @plain), "for every turn that is the first");
    my $nothing = tiny(\"\f\n", @chat);
    is(tiny(\"\f\n", @chat, "--state", "$dir/empty state"), $nothing, "a turn of nothing, computed and then read") for 1, 2;
    refuses(1, qr/the model\.gguf: .+/, "--state of a model", "-m", $tiny, "-p", $long, "--state", $copy);
    ok(slurp($copy) eq slurp($tiny), "which stays as it was");
    refuses(1, qr/cut state: .+/, "half a state", "-m", $tiny, "-p", $long, "--state", spew("cut state", substr slurp($state), 0, -3));
    refuses(2, qr/--state is not for --logits and --hash/, "--state with --hash", "-m", $tiny, "-p", $long, "--hash", "--state", $state);
}

# Memory, contexts, byte-order marks, locales.
SKIP: {
    my $limited = "ulimit -v 600000 && exec $gemma3";
    skip "no ulimit -v here", 2 if system("$limited --version >/dev/null 2>&1");
    $code = system("sh -c '$limited -m $tiny -t 1 -p a -c 16777216' >$dir/stdout 2>$dir/stderr") >> 8;
    is($code, 1, "more memory than there may be: exit code 1");
    like(slurp("$dir/stderr"), qr/^gemma3: out of memory: -c 16777216 needs \d{4,} MB beside 0 MB of weights, and this process may use 585 MB$/m,
        "which is said before it is tried");
}
tiny("-p", "a", "-n", 1, "-c", 600);
like($err, qr/^gemma3: -c 600 goes beyond the 512 tokens the model was trained on \(RoPE factor 8\): what it writes after them may make no sense$/m,
    "-c beyond what the model was trained on is said");
tiny("-p", "a", "-n", 1, "-c", 512);
unlike($err, qr/trained/, "up to it is not");
is(tiny("--ids", spew("bom.ids", "\xef\xbb\xbf" . slurp($ids)), "--hash"), $hash, "ids after a byte-order mark");
refuses(1, qr/found "\xef\xbb\xbf3"/, "which is none elsewhere", "-m", $tiny, "--ids", spew("bom.ids", "3 \xef\xbb\xbf3"));
SKIP: {
    mkdir "$dir/locales";
    skip "no locale with a decimal comma", 3
        if system("localedef -i de_DE -f UTF-8 '$dir/locales/de_DE.UTF-8' >/dev/null 2>&1");
    local %ENV = (%ENV, LOCPATH => "$dir/locales", LC_ALL => "de_DE.UTF-8");
    is(qx(perl -MPOSIX -Mlocale -e 'setlocale(LC_ALL, ""); printf "%.1f", 0.5'), "0,5", "a decimal comma");
    is(tiny(@sampling, "--temp=0.01"), do { local $ENV{LC_ALL} = "C"; tiny(@sampling, "--temp=0.01") }, "is nothing to --temp 0.01");
    like(tiny("--info"), qr/^rms_eps +9\.99999997e-07$/m, "nor to what is printed");
}
like(tiny("--info"), qr/^query_scale +0\.176776692 \(default\)$/m, "--info marks what is not in the file");
unlike($out, qr/^d_model .*\(/m, "and nothing else");
SKIP: {
    skip "no $real", 6 if !-f $real;
    my $capped = with_key("capped.gguf", $real, "gemma3.final_logit_softcapping", 30);
    my @job = ("-p", "Paris is the capital of", "--hash", "-c", 64);
    my $hash = run("-m", $real, @job);
    is($err, "", "of a right file nothing is said");
    is(run("-m", $capped, @job), $hash, "a key that contradicts the model's definition is not obeyed");
    like($err, qr/^gemma3: .*final_logit_softcapping.*\n$/, "which is said");
    like(run("-m", $capped, "--info"), qr/^final_softcap +0 \(overridden\)$/m, "and marked by --info");
    isnt(run("-m", $capped, @job, "--obey-file"), $hash, "--obey-file obeys it");
    like($err, qr/^gemma3: .*final_logit_softcapping is 30, .*: it is obeyed\n$/, "and says so");
    unlink $capped;
}

# ---- The model that comes with the source ----------------------------------------------------------

run("-p", "Once upon a time", "--hash");
my ($published) = slurp("README.md") =~ /^    (contract \d+ mode default .* sha256 [0-9a-f]{64})$/m;
is($out, "$published\n", "without -m the small model is used, and its hash is what README.md publishes");
run("-p", "Once upon a time", "--seed", 1, "-n", 60);
like($out, qr/^(?:\W*[A-Za-z]+){20}/, "it tells a story");
{
    mkdir "$dir/bin";
    my $top = Cwd::getcwd();
    symlink "$top/gemma3", "$dir/bin/tale";
    symlink "tale", "$dir/bin/tale of tales";
    for my $start ("'$dir/bin/tale'", "'../bin/tale of tales'", "PATH='/no such folder:$dir/bin:$top' tale",
        "PATH='$top:/bin' gemma3", "cd ../bin; PATH= './tale of tales'", "cd ../bin; PATH=:/bin tale") {
        mkdir "$dir/elsewhere";
        my $line = qx(cd '$dir/elsewhere'; $start -p 'Once upon a time' --hash 2>&1);
        is($line, "$published\n", "so is it when the program is started as $start");
    }
}
my $round = join "", map { chr } 0 .. 255;
run("--detokenize", run("--tokenize", "--no-bos", "-f", spew("bytes", $round)) =~ s/\n//r);
is($out, $round, "any bytes are its text: they round-trip through its tokens");

# ---- The benchmark -------------------------------------------------------------------------------

SKIP: {
    skip "no test/bench: make test/bench", 3 if !-x "test/bench";
    my $table = qx(test/bench $tiny -t 2 -r 1 -p 8 -n 2 -d 16 2>&1);
    is($?, 0, "the benchmark runs");
    like($table, qr/^\| $_ /m, "and has a row for $_") for "prompt pp8", "decode tg2 after 16";
}

# ---- The real one --------------------------------------------------------------------------------

SKIP: {
    skip "no $real: make $real fetches it", 2 if !-f $real;
    run("-m", $real, "--exact", "-p", "The capital of France is", "--temp", 0, "-n", 8);
    is($out, " the capital of the country of France.", "the real model goes on");
    run("-m", $real, "--exact", "-p", "The capital of France is", "--temp", 0, "-n", 8, "--out-ids");
    is($out, "506 5279 529 506 2891 529 7001 236761\n", "with transformers' ids");
}
done_testing();
