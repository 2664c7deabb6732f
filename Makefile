# Two commands: `make demo` renders the demo script, `make test` runs the tests. Both do all the set-up they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The distribution in packaging/onnxruntime is installed in the same call, so that pip never fetches the CPU wheel of
# onnxruntime over onnxruntime-gpu; see there.
ONNXRUNTIME := ./packaging/onnxruntime

.PHONY: setup demo test chaos check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml packaging/onnxruntime/pyproject.toml
	@echo "Installing packages into $(VENV): some minutes, 3 GB and more"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(ONNXRUNTIME) --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/vidgen demo --out out/demo

# Two files at a time: tests wait for processes as often as they compute. Each has one thread of torch. What is left out, for want
# of a GPU, a browser or a database, is said at the end with the reason.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs

# Some ten minutes: nodes, processes and drivers are taken from a cluster of three nodes at 35 random moments.
chaos: setup
	$(BIN)/python -m pytest tests/chaos -m "slow or not slow"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) out dist .pytest_cache .mypy_cache .ruff_cache
