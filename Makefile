# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make demo   distil a student without data, in about a minute
#   make test   lint, types, documentation and tests
# Four more: make docs (build/site/index.html), make wheel (dist/), make bench [DEVICE=cuda] (what a step costs),
# make torture [KILLS=200] (what interruptions do to a run).
# Set-up goes to stderr, so that the last line on stdout is the demo's JSON.

PYTHON ?= python3
BIN := .venv/bin
DEVICE ?= auto
KILLS ?= 200

.PHONY: demo test check docs wheel bench torture clean

demo: .venv/installed
	@$(BIN)/python -m zskt demo

test: .venv/installed
	@scripts/check
	@scripts/test

bench: .venv/installed
	@$(BIN)/python benchmarks/step_time.py --device $(DEVICE)

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
