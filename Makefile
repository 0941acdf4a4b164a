# Two commands do everything on a fresh machine with Python 3.11 or newer:
#   make demo   distil a student without data, in about a minute
#   make test   lint, types and tests
# Set-up goes to stderr, so that the last line on stdout is the demo's JSON.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

demo: .venv/installed
	@$(BIN)/python -m zskt demo

test: .venv/installed
	@scripts/check
	@scripts/test

check: .venv/installed
	@scripts/check

.venv/installed: pyproject.toml constraints.txt scripts/install
	@PYTHON="$(PYTHON)" scripts/install 1>&2
	@touch $@

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
