# `make demo` renders the demo script, `make test` runs the tests. Both run `setup` first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Installed in the same call, so that pip never installs the CPU wheel of onnxruntime over onnxruntime-gpu.
ONNXRUNTIME := ./packaging/onnxruntime

.PHONY: setup demo test chaos check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml packaging/onnxruntime/pyproject.toml
	@echo "Installing packages into $(VENV): takes minutes, downloads at least 3 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(ONNXRUNTIME) --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/vidgen demo --out out/demo

# Two workers with one torch thread each: tests often wait for processes. -rs lists skipped tests with the reason (no GPU, browser or
# database).
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs

# About ten minutes. Kills processes, nodes and drivers of a three-node cluster at 35 random moments.
chaos: setup
	$(BIN)/python -m pytest tests/chaos -m "slow or not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) out dist .pytest_cache .mypy_cache .ruff_cache
