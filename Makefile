# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make demo   distil a student without data, in about a minute
#   make test   lint, types, documentation and tests
# Three more: make docs (build/site/index.html), make wheel (dist/), make bench [DEVICE=cuda] (what a step costs).
# Mutated files and command lines: make fuzz [CASES=10000]; an hour of short runs in one process: make soak [SECONDS=3600]
# What interruptions do to a run: make torture [KILLS=200]
# Set-up goes to stderr, so that the last line on stdout is the demo's JSON.

PYTHON ?= python3
BIN := .venv/bin
DEVICE ?= auto
KILLS ?= 200
CASES ?= 10000
SECONDS ?= 3600

.PHONY: demo test check docs wheel bench fuzz soak torture clean

demo: .venv/installed
	@$(BIN)/python -m zskt demo

test: .venv/installed
	@scripts/check
	@scripts/test

bench: .venv/installed
	@$(BIN)/python benchmarks/step_time.py --device $(DEVICE)

fuzz: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --cases $(CASES)

soak: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --seconds $(SECONDS)

torture: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py --kills $(KILLS)

check: .venv/installed
	@scripts/check

docs: .venv/installed
	@scripts/docs

wheel: .venv/installed
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

.venv/installed: pyproject.toml constraints.txt scripts/install
	@PYTHON="$(PYTHON)" scripts/install 1>&2
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
