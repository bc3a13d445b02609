# Two commands for a newcomer: `make demo` and `make test`. Every target installs what it needs on its first run.
# VENV picks another environment folder, PYTHON another interpreter (3.11 or newer).

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# A file's tests stay in one worker, so that what its fixtures build is built once.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

PROJECTS := shared-kernels $(sort $(patsubst %/pyproject.toml,%,$(wildcard packages/*/pyproject.toml)))
SOURCES := $(wildcard shared-kernels/src packages/*/src)
TOOLS := torch "triton; platform_system == 'Linux'" hatchling editables pytest pytest-xdist pytest-timeout hypothesis ruff mypy \
	transformers accelerate peft datasets trl lm_eval kernels matplotlib pillow captum diffusers inseq scikit-learn
KEY := $(shell { grep -A1 '^TOOLS' Makefile; cat constraints.txt $(PROJECTS:%=%/pyproject.toml); } | cksum | cut -d' ' -f1)

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help venv demo test test-slow test-gpu aot lint format sync check-sync wheels bench miniatures
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

# --no-compile makes the install three times cheaper; Python compiles the few modules that are used.
venv:  ## create the environment (a no-op when it is up to date)
	@if [ "$$(cat $(VENV)/.ok 2>/dev/null)" != "$(KEY)" ]; then set -e; \
		test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
			echo "'$(PYTHON) -m venv' failed: install the venv module of your Python (Debian: python3-venv)."; exit 1; }; \
		$(BIN)/python -m pip install -q --no-compile -c constraints.txt $(TOOLS) $(PROJECTS:%=-e %); \
		echo $(KEY) > $(VENV)/.ok; \
	fi

demo: venv  ## every package does its visible thing with the miniatures; writes out/index.html
	$(BIN)/python -m examples.demo

# TRITON_INTERPRET binds when a kernel is decorated, so the interpreter tests get a run of their own.
test: venv  ## the fast tests
	$(PYTEST) -m "not slow and not gpu and not triton"
	TRITON_INTERPRET=1 $(PYTEST) -m "triton and not slow and not gpu" shared-kernels/tests

test-slow: venv  ## the tests that take minutes: real clients, training, fuzzing, clean installs
	$(PYTEST) -m "slow and not gpu and not triton" --timeout 900
	TRITON_INTERPRET=1 $(PYTEST) -m "triton and slow and not gpu" --timeout 900 shared-kernels/tests || test $$? -eq 5

test-gpu: venv  ## the tests that need a device
	$(BIN)/python -m pytest -q -m gpu

aot: venv  ## compile every kernel for three GPUs, without a GPU
	$(BIN)/python -m shared_kernels.aot --targets sm_80,sm_90,gfx942

lint: venv  ## style, formatting, types, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)
	$(BIN)/python tools/check_docs.py

format: venv  ## apply the formatter and the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sync: venv  ## rewrite the files that are copies of shared-kernels sources
	$(BIN)/python tools/sync_remote.py

check-sync: venv  ## fail when such a copy has drifted
	$(BIN)/python tools/sync_remote.py --check

wheels: venv  ## build every wheel, install each one without the others in a clean environment, use it
	$(BIN)/python tools/check_wheels.py

bench: venv  ## benchmarks on this machine
	$(BIN)/python -m benchmarks

miniatures: venv  ## retrain the small models
	$(BIN)/python -m miniatures.captioner.train --out miniatures/captioner/checkpoint
	$(BIN)/python -m miniatures.tfree.train --steps 3000 --sampled-words 4096 --out miniatures/tfree/checkpoint
	$(BIN)/python -m miniatures.scar.train
	$(BIN)/python -m miniatures.scar.evaluate
	$(BIN)/python -m miniatures.scar.report
