# `make help` lists the targets; their lines come from the comments after ## below.
#
# TORCH is the build that is installed; on a machine with an NVIDIA GPU, `make demo TORCH=torch` takes the newest.

PYTHON ?= python3
TORCH ?= torch==2.13.0
OTHER_PYTHONS ?= 3.10 3.13
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo-$(subst =,-,$(TORCH))

# Builds of libddpmx share what they compile, where ccache is installed.
ifneq ($(shell command -v ccache),)
export CMAKE_C_COMPILER_LAUNCHER := ccache
export CMAKE_CXX_COMPILER_LAUNCHER := ccache
export CCACHE_DIR := $(CURDIR)/.cache/ccache
export CCACHE_BASEDIR := $(CURDIR)
export CCACHE_NOHASHDIR := 1
endif

.PHONY: help demo check quick test parts lint pytest long others docs native fuzz bench gpu-check mutations faults clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target what; do \
	  printf '%-16s %s\n' "$$target" "$$what"; done

demo: $(DEMO) ## train on real images, export, generate, judge: about seven minutes on two idle cores
	$(BIN)/python examples/fashion_mnist/demo.py

check: $(VENV)/.dev ## lint, types and the quick tests: two minutes on two idle cores, from the second time on
	@$(MAKE) --no-print-directory --jobs=2 lint quick

quick: $(VENV)/.dev
	$(BIN)/pytest --quiet --quick --numprocesses=2 --dist=loadfile --no-loadscope-reorder -m "not slow and not long"

test: $(VENV)/.dev $(VENV)/.docs ## all that is checked without a GPU at every change; `make long` has the rest
	@begun=$$(date +%s); $(MAKE) --no-print-directory parts && \
	  echo "make test took $$((($$(date +%s) - begun) / 60)) minutes"

# Linting needs one core, and so do most of the fuzzers.
parts:
	@$(MAKE) --no-print-directory --jobs=2 lint fuzz FUZZ=30
	@$(MAKE) --no-print-directory pytest
	@$(MAKE) --no-print-directory others

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(VENV)/.dev ## the tests but the long ones, in two processes
	$(BIN)/pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder -m "not long"

long: $(VENV)/.dev ## whole chains and whole demos that the other tests prove in parts: about ten minutes
	$(BIN)/pytest --numprocesses=2 -m long

# The runtime and the command line on the other Pythons, from a built wheel, without torch and onnx.
others: ## what needs no torch on the other Pythons (OTHER_PYTHONS)
	@for version in $(OTHER_PYTHONS); do PYTHON="$(PYTHON)" sh .ci/other-python "$$version" || exit 1; done

# Not --quiet: mkdocs then counts no warnings, and a dead link would pass.
docs: $(VENV)/.docs ## the documentation as a web site, in build/docs; a dead link is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

native: ## libddpmx, the runtime for C and C++, with its own tests (runtime/native/README.md)
	cmake -S runtime/native -B build/native
	cmake --build build/native --parallel 2
	ctest --test-dir build/native --output-on-failure

FUZZ ?= 600
fuzz: $(VENV)/.dev ## libddpmx's file readers under libFuzzer for ten minutes (FUZZ=seconds)
	@PYTHON=$(BIN)/python .ci/fuzz $(FUZZ)

bench: $(VENV)/.dev ## ratios of speed, measured side by side
	$(BIN)/python tests/benchmarks/startup.py
	$(BIN)/python tests/benchmarks/chain_overhead.py
	$(BIN)/python tests/benchmarks/time_table.py
	$(BIN)/python tests/benchmarks/engine_build.py
	$(BIN)/python tests/benchmarks/native.py
	$(BIN)/python tests/benchmarks/serving.py --rounds 1 --each 2
	$(BIN)/python tests/benchmarks/scale.py --rounds 3
	$(BIN)/python tests/benchmarks/peers.py --small --only diffusers ort mnn

gpu-check: $(VENV)/.dev ## everything that needs an NVIDIA GPU, in one report to paste (CHECK='--quick')
	$(BIN)/python tests/gpu/check.py $(CHECK)

mutations: $(VENV)/.dev ## 100,000 damaged files for the readers, about half an hour
	$(BIN)/python tests/mutations/run.py --count 100000

faults: $(VENV)/.dev ## 2,000 failing writes and 200 signals for the commands, about an hour
	$(BIN)/python tests/faults/run.py --count 2000
	$(BIN)/python tests/faults/signals.py --count 200

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	touch $@

$(DEMO): $(VENV)/.venv pyproject.toml
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable '.[cpu,export,demo]'
	touch $@

$(VENV)/.dev: $(DEMO)
	$(BIN)/pip install --quiet --editable '.[cpu,export,demo,dev]'
	$(BIN)/pip install --quiet tensorrt-rtx-cu13 || echo "NOT VERIFIED: TensorRT-RTX cannot be installed here, so no engine is built"
	$(BIN)/pip install --quiet --editable '.[mnn]' || echo "NOT VERIFIED: MNN cannot be installed here, so no .mnn file runs"
	touch $@ $(VENV)/.docs # dev has what the documentation needs

$(VENV)/.docs: $(VENV)/.venv pyproject.toml
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

clean: ## remove what make has installed, built and written
	rm -rf .venv .venv-* .cache build dist demo-output .pytest_cache .mypy_cache .ruff_cache
