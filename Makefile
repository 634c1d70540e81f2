# make            builds ./qlora with what is here, and says what it found
# make test       proves the build: no Python, no network, a few minutes
# make bench      speed and memory as shares of what this machine can do
# make asan tsan  the tests under the sanitizers
# make fuzz       every reader of foreign bytes under libFuzzer (clang), FUZZ_SECONDS=20 each
# make install    PREFIX=/usr/local
#
# CC=clang picks the compiler, CUDA=0 leaves the GPU out, WERROR=1 makes warnings errors,
# ARCH= builds for any processor of this kind instead of for this one.

PREFIX ?= /usr/local
ARCH ?= $(shell $(CC) -march=native -E -x c /dev/null >/dev/null 2>&1 && echo -march=native)
CUDA ?= 1
OPT ?= -O3
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wconversion $(if $(WERROR),-Werror)
FLAGS = -std=c11 $(OPT) -g $(ARCH) $(WARN) $(CFLAGS)
LIBS = -lm -pthread $(LDFLAGS)
SOURCES = qlora.c qlora.h
TESTS = $(wildcard test/*.c)

NVCC := $(if $(filter-out 0,$(CUDA)),$(shell command -v nvcc 2>/dev/null || ls $(CUDA_HOME)/bin/nvcc 2>/dev/null))
SIMD = $(shell $(CC) $(ARCH) -dM -E -x c /dev/null 2>/dev/null | awk \
    '/__AVX512BF16__/{b=1} /__AVX512F__/{f=1} /__AVX2__/{a=1} /__ARM_NEON /{n=1} \
     END{print b ? "AVX-512 BF16" : f ? "AVX-512" : a ? "AVX2" : n ? "NEON" : "plain"}')

all: qlora

qlora: $(SOURCES) Makefile
	@echo "compiler: $(CC) ($$($(CC) -dumpversion)); SIMD: $(SIMD);" \
	      "CUDA: $(if $(filter 0,$(CUDA)),left out,$(if $(NVCC),nvcc found but there is no qlora.cu here: CPU build,nvcc not found: CPU build))"
	$(CC) $(FLAGS) -DQLORA_MAIN -o $@ qlora.c $(LIBS)

build:
	mkdir -p build

build/test: $(SOURCES) $(TESTS) | build
	$(CC) $(FLAGS) -Wno-unused-function -o $@ test/test.c $(LIBS)

# The same kernels in double, for finite differences.
build/test64: $(SOURCES) $(TESTS) | build
	$(CC) $(FLAGS) -Wno-unused-function -DQLORA_REAL_DOUBLE -o $@ test/test.c $(LIBS)

# Other people's programs: qlora.c and qlora.h alone, from C and from C++.
build/vendor_c: $(SOURCES) test/vendor.c | build
	$(CC) $(FLAGS) -I. -o $@ test/vendor.c qlora.c $(LIBS)

build/vendor.o: $(SOURCES) | build
	$(CC) $(FLAGS) -c -o $@ qlora.c

build/vendor_cpp: build/vendor.o test/vendor.cpp
	$(CXX) -std=c++17 $(WARN) $(CFLAGS) -I. -o $@ test/vendor.cpp build/vendor.o $(LIBS)

test: qlora build/test build/test64 build/vendor_c
	@CXX="$(CXX)" MAKE="$(MAKE)" sh test/run.sh

build/bench: $(SOURCES) test/bench/bench.c | build
	$(CC) $(FLAGS) -Wno-unused-function -o $@ test/bench/bench.c $(LIBS)

build/bench_text: $(SOURCES) test/bench/bench_text.c | build
	$(CC) $(FLAGS) -Wno-unused-function -o $@ test/bench/bench_text.c $(LIBS)

# Tokenisers beside Hugging Face's, where Python has them; PYTHON=venv/bin/python says which Python.
PYTHON ?= python3
bench: build/bench build/bench_text
	build/bench
	build/bench_text build/bench-text
	@$(PYTHON) -c 'import tokenizers; tokenizers.Tokenizer' 2>/dev/null && \
	    $(PYTHON) test/bench/bench_tokenizers.py build/bench-text || \
	    echo "tokenizers of Hugging Face: not in $(PYTHON)"

# For test/reference/check_tokenizers.py.
build/tokenize_many: $(SOURCES) test/reference/tokenize_many.c | build
	$(CC) $(FLAGS) -Wno-unused-function -o $@ test/reference/tokenize_many.c $(LIBS)

FUZZ_TARGETS = json regex tokenizer_json tokenizer_model vocab_json encode safetensors chat_template dataset
FUZZ_SECONDS ?= 20
FUZZ_FLAGS = -std=c11 -O2 -g $(WARN) -Wno-unused-function \
    -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all

build/fuzz-%: $(SOURCES) test/fuzz/fuzz.c | build
	clang $(FUZZ_FLAGS) -DFUZZ_TARGET=$* -o $@ test/fuzz/fuzz.c $(LIBS)

fuzz: $(FUZZ_TARGETS:%=build/fuzz-%)
	python3 test/fuzz/seeds.py build/seeds
	@for t in $(FUZZ_TARGETS); do mkdir -p build/corpus/$$t; echo "fuzz $$t"; \
	    build/fuzz-$$t -max_total_time=$(FUZZ_SECONDS) -timeout=10 -rss_limit_mb=4096 -max_len=4096 \
	        -artifact_prefix=build/$$t- -print_final_stats=1 build/corpus/$$t build/seeds/$$t \
	        >build/fuzz-log 2>&1 || { tail -n 60 build/fuzz-log; exit 1; }; \
	    grep -E 'DONE|number_of_executed' build/fuzz-log; done

# The sanitizers run the same tests, built apart.
asan:
	$(MAKE) sanitize NAME=asan OPT=-O1 SANITIZE="-fsanitize=address,undefined -fno-sanitize-recover=all"

tsan:
	$(MAKE) sanitize NAME=tsan OPT=-O1 SANITIZE="-fsanitize=thread"

sanitize: | build
	$(CC) $(FLAGS) -Wno-unused-function $(SANITIZE) -o build/test-$(NAME) test/test.c $(LIBS)
	build/test-$(NAME)

install: qlora
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include
	install -m 755 qlora $(DESTDIR)$(PREFIX)/bin
	install -m 644 qlora.h $(DESTDIR)$(PREFIX)/include

clean:
	rm -rf build qlora

.PHONY: all test bench fuzz asan tsan sanitize install clean
