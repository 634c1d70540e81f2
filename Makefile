# make            builds ./qlora with what is here, and says what it found
# make test       proves the build: no Python, no network, no GPU, a few minutes
# make test-gpu   the same comparisons on a real GPU
# make bench      speed and memory as shares of what this machine can do; bench-gpu: of a GPU
# make asan tsan  the tests under the sanitizers
# make fuzz       every reader of foreign bytes under libFuzzer (clang), FUZZ_SECONDS=20 each
# make install    PREFIX=/usr/local
#
# CC=clang picks the compiler, CUDA=0 leaves the GPU out, GPU_ARCH=native or 75, 80, 90, ... builds
# for that GPU alone, CUDA_HOME= says where the CUDA Toolkit is, WERROR=1 makes warnings errors,
# ARCH= builds for any processor of this kind instead of for this one.

PREFIX ?= /usr/local
ARCH ?= $(shell $(CC) -march=native -E -x c /dev/null >/dev/null 2>&1 && echo -march=native)
CUDA ?= 1
OPT ?= -O3
WARN = -Wall -Wextra -Wpedantic -Wshadow -Wconversion $(if $(WERROR),-Werror)
# No contraction: the same bits from gcc, clang and qlora.cu, where a product and a sum are two roundings.
FLAGS = -std=c11 -ffp-contract=off $(OPT) -g $(ARCH) $(WARN) $(CFLAGS)
LIBS = -lm -pthread $(LDFLAGS)
SOURCES = qlora.c qlora.h
TESTS = $(wildcard test/*.c)

SIMD = $(shell $(CC) $(ARCH) -dM -E -x c /dev/null 2>/dev/null | awk \
    '/__AVX512BF16__/{b=1} /__AVX512F__/{f=1} /__AVX2__/{a=1} /__ARM_NEON /{n=1} \
     END{print b ? "AVX-512 BF16" : f ? "AVX-512" : a ? "AVX2" : n ? "NEON" : "plain"}')

# The CUDA Toolkit: nvcc in CUDA_HOME, on the PATH or where it is usually installed.
NVCC := $(if $(filter-out 0,$(CUDA)),$(firstword \
    $(if $(CUDA_HOME),$(wildcard $(CUDA_HOME)/bin/nvcc)) $(shell command -v nvcc 2>/dev/null) \
    $(wildcard /usr/local/cuda/bin/nvcc)))
CUDA_HOME ?= $(if $(NVCC),$(patsubst %/bin/nvcc,%,$(realpath $(NVCC))))
# Machine code for each generation this nvcc knows, and PTX for those that come after.
GPU_ARCH ?= $(if $(NVCC),$(filter $(shell $(NVCC) --list-gpu-arch | sed s/compute_//),75 80 90 100 120))
GPU_CODE = $(if $(filter native,$(GPU_ARCH)),-arch=native,$(foreach a,$(GPU_ARCH),\
    -gencode=arch=compute_$(a),code=sm_$(a)) -gencode=arch=compute_$(lastword $(GPU_ARCH)),code=compute_$(lastword $(GPU_ARCH)))
NVCC_FLAGS = -std=c++17 -O3 -lineinfo --threads 0 $(GPU_CODE) -Xcompiler=-Wall,-Wextra \
    $(if $(WERROR),-Werror all-warnings -Xcompiler=-Werror)
CUDA_LIBS = -L$(CUDA_HOME)/lib64 -lcudart_static -lstdc++ -ldl -lrt

WITH_CUDA = $(if $(NVCC),-DQLORA_CUDA)
CUDA_OBJECT = $(if $(NVCC),build/qlora_cuda.o)

all: qlora

qlora: $(SOURCES) $(CUDA_OBJECT) Makefile
	@echo "compiler: $(CC) ($$($(CC) -dumpversion)); SIMD: $(SIMD);" \
	      "CUDA: $(if $(filter 0,$(CUDA)),left out,$(if $(NVCC),$(NVCC)$(comma) GPUs $(GPU_ARCH) and newer,nvcc not found: CPU build))"
	$(CC) $(FLAGS) -DQLORA_MAIN $(WITH_CUDA) -o $@ qlora.c $(CUDA_OBJECT) $(if $(NVCC),$(CUDA_LIBS)) $(LIBS)
comma = ,

build/qlora_cuda.o: qlora.cu qlora.h | build
	$(NVCC) $(NVCC_FLAGS) -c -o $@ qlora.cu

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

# qlora.cu on the CPU: the unchanged file with its launches rewritten, compiled by the C++ compiler
# against test/cuda/cuda_on_cpu.h. In E go the objects; SANITIZE adds a sanitizer.
E ?= build/emulated
EMULATE = $(CXX) -std=c++17 -O1 -g -fno-strict-aliasing -ffp-contract=off -Itest/cuda/include -I. \
    -I$(E) -Wall -Wextra $(if $(WERROR),-Werror) $(SANITIZE)
EMULATOR = $(wildcard test/cuda/*.h test/cuda/include/*.h) test/cuda/translate.sh
EMULATED_TESTS = $(E)/test_ops $(E)/test_gpu $(E)/selftest

HAVE_CXX = $(shell command -v $(CXX) 2>/dev/null)

test: qlora build/test build/test64 build/vendor_c $(if $(HAVE_CXX),$(EMULATED_TESTS))
	@CXX="$(HAVE_CXX)" MAKE="$(MAKE)" E="$(E)" sh test/run.sh

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

$(E):
	mkdir -p $@

$(E)/qlora_emulated.cpp: qlora.cu test/cuda/translate.sh | $(E)
	sh test/cuda/translate.sh qlora.cu > $@

$(E)/selftest.cpp: test/cuda/selftest.cu test/cuda/translate.sh | $(E)
	sh test/cuda/translate.sh test/cuda/selftest.cu > $@

$(E)/selftest: $(E)/selftest.cpp $(EMULATOR)
	$(EMULATE) -o $@ $(E)/selftest.cpp -ldl -pthread

# Each op against the CPU's of the same name.
$(E)/test_ops: $(E)/qlora_emulated.cpp $(wildcard test/cuda/test_*) test/cuda/cpu_ops.c $(SOURCES) $(EMULATOR)
	$(CC) $(FLAGS) $(SANITIZE) -Wno-unused-function -c -o $(E)/cpu_ops.o test/cuda/cpu_ops.c
	$(EMULATE) -o $@ test/cuda/test_ops.cpp $(E)/cpu_ops.o $(LIBS) -ldl

# Whole models.
$(E)/test_gpu: $(E)/qlora_emulated.cpp $(TESTS) $(SOURCES) $(EMULATOR)
	$(CC) $(FLAGS) $(SANITIZE) -Wno-unused-function -DQLORA_CUDA -DCUDA_ON_CPU -c -o $(E)/tests.o test/test.c
	$(EMULATE) -o $@ $(E)/qlora_emulated.cpp $(E)/tests.o $(LIBS) -ldl

emulated: $(EMULATED_TESTS)

# The same tests on a real GPU.
build/test_ops: qlora.cu $(wildcard test/cuda/test_*) test/cuda/cpu_ops.c $(SOURCES) | build
	$(CC) $(FLAGS) -Wno-unused-function -c -o build/cpu_ops.o test/cuda/cpu_ops.c
	$(NVCC) $(NVCC_FLAGS) -I. -x cu -c -o build/test_ops.o test/cuda/test_ops.cpp
	$(NVCC) -o $@ build/test_ops.o build/cpu_ops.o -lpthread -ldl -lm

build/test_gpu: $(TESTS) $(SOURCES) build/qlora_cuda.o
	$(CC) $(FLAGS) -Wno-unused-function -DQLORA_CUDA -o $@ test/test.c build/qlora_cuda.o $(CUDA_LIBS) $(LIBS)

test-gpu: build/test_ops build/test_gpu
	build/test_ops
	build/test_gpu

# It contains qlora.cu, to time single kernels.
build/bench_gpu: test/bench/bench_gpu.cu qlora.cu $(SOURCES) | build
	$(CC) $(FLAGS) -DQLORA_CUDA -c -o build/qlora_host.o qlora.c
	$(NVCC) $(NVCC_FLAGS) -I. -o $@ test/bench/bench_gpu.cu build/qlora_host.o -lpthread -ldl -lm

bench-gpu: qlora build/bench_gpu
	build/bench_gpu

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

.PHONY: all test emulated test-gpu bench bench-gpu fuzz asan tsan sanitize install clean
