# make demo    train on real images, export, generate, judge (about eleven minutes on two cores)
# make test    everything that is checked without a GPU
# make native  libddpmx, the runtime for C and C++, with its own tests (runtime/native/README.md)
# make fuzz    its file readers under libFuzzer for ten minutes; FUZZ=30 seconds in make test
# make bench   ratios measured side by side
# make gpu-check   everything that needs an NVIDIA GPU, in one report to paste (tests/gpu/README.md); CHECK='--quick'
# make mutations   100,000 damaged files for the readers, about half an hour (make test: 2,000)
#
# TORCH is the build that is installed; on a machine with an NVIDIA GPU, `make demo TORCH=torch` takes the newest.

PYTHON ?= python3
TORCH ?= torch==2.13.0
OTHER_PYTHONS ?= 3.10 3.13
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo-$(subst =,-,$(TORCH))

.PHONY: demo test lint pytest others native fuzz bench gpu-check mutations clean

demo: $(DEMO)
	$(BIN)/python examples/fashion_mnist/demo.py

test: $(VENV)/.dev
	@$(MAKE) --no-print-directory --jobs=2 lint fuzz FUZZ=30
	@$(MAKE) --no-print-directory pytest
	@$(MAKE) --no-print-directory others

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(VENV)/.dev
	$(BIN)/pytest --numprocesses=2 --dist=loadfile

# The runtime and the command line on the other Pythons, from a built wheel, without torch and onnx.
others:
	@for version in $(OTHER_PYTHONS); do PYTHON="$(PYTHON)" sh .ci/other-python "$$version" || exit 1; done

native:
	cmake -S runtime/native -B build/native
	cmake --build build/native --parallel 2
	ctest --test-dir build/native --output-on-failure

FUZZ ?= 600
fuzz: $(VENV)/.dev
	@PYTHON=$(BIN)/python .ci/fuzz $(FUZZ)

bench: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/startup.py
	$(BIN)/python tests/benchmarks/chain_overhead.py
	$(BIN)/python tests/benchmarks/time_table.py
	$(BIN)/python tests/benchmarks/engine_build.py
	$(BIN)/python tests/benchmarks/native.py
	$(BIN)/python tests/benchmarks/peers.py --small --only diffusers ort

gpu-check: $(VENV)/.dev
	$(BIN)/python tests/gpu/check.py $(CHECK)

mutations: $(VENV)/.dev
	$(BIN)/python tests/mutations/run.py --count 100000

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
	touch $@

clean:
	rm -rf .venv .venv-* .cache build dist demo-output .pytest_cache .mypy_cache .ruff_cache
