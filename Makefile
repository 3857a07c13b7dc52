# Two commands matter: `make demo` and `make test`. Everything they need is made on the way.
PYTHON ?= python3
VENV ?= .venv
# CPU-only users can name PyTorch's CPU index: make demo TORCH_INDEX="--index-url <address>"
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
BIN := $(VENV)/bin
# The wheel for a machine without network could be found by --find-links in pip's own configuration.
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f 2>/dev/null) CMakeLists.txt setup.py

.PHONY: all setup models demo test torture lint format bench bench-record bench-docs bench-peers wheel-test clean help

help:
	@echo "make demo     a real model answers from spliced memories (first run sets everything up)"
	@echo "make test     the test suite"
	@echo "make torture  the control plane under a thousand deaths, races and random worlds (an hour)"
	@echo "make lint     ruff, mypy, clang-format"
	@echo "make bench    everything measured on this machine, quickly; report in bench-results/"
	@echo "make bench-peers  sets up the systems that benches compare with (vLLM 3.4 GB, llama.cpp)"
	@echo "make bench-record  the committed results and the documentation's numbers, anew; bench-docs: the numbers alone"
	@echo "make wheel-test   builds the wheel and tries it in a clean environment"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(PIP) install $(TORCH) $(TORCH_INDEX)
	@touch $@

$(VENV)/.deps: pyproject.toml requirements.lock $(VENV)/.torch
	$(PIP) install -c requirements.lock -r requirements.lock
# hnswlib comes as source only; without it indices are exact. Not for this machine's processor alone.
	HNSWLIB_NO_NATIVE=1 $(PIP) install --quiet hnswlib==0.8.0 || echo "hnswlib was not built: no C++ compiler?"
# What adapters are compared with in tests; all else that it needs is there already.
	$(PIP) install --quiet --no-deps peft==0.21.2 accelerate==1.15.0 || echo "peft is missing: tests against it are skipped"
	@touch $@

$(VENV)/.built: $(VENV)/.deps $(NATIVE)
	$(PIP) install --no-build-isolation --no-deps --quiet -e .
	@touch $@

setup: $(VENV)/.built

models: setup
	$(BIN)/memos-engine models pull smollm2
	$(BIN)/memos-engine models pull minilm

demo: models
	$(BIN)/memos-engine demo

test: models
	$(BIN)/pytest -q

torture: setup
	MEMOS_ENGINE_TEST_KILLS=1000 MEMOS_ENGINE_TEST_CAS=8x1000 MEMOS_ENGINE_TEST_PAIRS=10000 \
	MEMOS_ENGINE_TEST_TRIPLES=100000 MEMOS_ENGINE_TEST_STEPS=10000 \
	$(BIN)/pytest -q --durations=10 tests/memory

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*')

bench: models
	$(BIN)/memos-engine bench all --quick --out bench-results

# The committed record and the pages made of it: on a quiet machine, for about two hours.
bench-record: models
	$(BIN)/memos-engine bench all --resume --out bench/results
	$(BIN)/memos-engine bench budget --simulate --resume --out bench/results
	mkdir -p docs/img
	cp bench/results/budget-kept.png bench/results/budget-quality.png docs/img/
	cp bench/results/ttft-engine-*.png docs/img/ttft.png
	cp bench/results/quality-3.png docs/img/quality.png
	rm -f bench/results/all.json bench/results/report.html bench/results/*.png
	$(MAKE) bench-docs

bench-docs: setup
	$(BIN)/python -m memos_engine.bench.docs README.md docs/benchmarks.md docs/scheduling.md docs/parameter-memory.md

bench-peers: setup
	$(BIN)/memos-engine bench peers --install

wheel-test: setup
	$(BIN)/python tests/wheel_check.py

clean:
	rm -rf build dist *.egg-info $(VENV) memos_engine/*.so
