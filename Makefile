# `make demo` renders the demo script, `make test` runs the tests. Both run `setup` first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Installed in the same call, so that pip never installs the CPU wheel of onnxruntime over onnxruntime-gpu.
ONNXRUNTIME := ./packaging/onnxruntime
CLIENT := ./clients/python

# Let each module be compiled once, also where the environment turns bytecode files off: the tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo dataset-demo compiled test test-slow test-longest chaos fuzz lock resolutions audit sbom docs docs-site referees release check clean

setup: $(VENV)/.installed

# --no-compile: Python compiles the modules that are imported, which saves a minute and a half of CPU time.
$(VENV)/.installed: pyproject.toml packaging/onnxruntime/pyproject.toml $(CLIENT)/pyproject.toml
	@echo "Installing packages into $(VENV): takes minutes, downloads 3 GB, takes 7 GB of disk (4 GB with a CPU build of torch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25"  # resolves in half the time of older versions
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(ONNXRUNTIME) --editable "$(CLIENT)[mcp]" --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/vidgen demo --out out/demo

# A data set of 24 prompts, two people and two strengths of their photos: rendered, scored, reviewed, captioned, compared, exported.
DATASET := out/dataset
dataset-demo: setup
	$(BIN)/vidgen render examples/dataset/script.yaml --profile demo --out $(DATASET)/clips --score
	$(BIN)/vidgen review $(DATASET)/clips examples/dataset/reviews.json
	$(BIN)/vidgen caption $(DATASET)/clips
	$(BIN)/vidgen compare $(DATASET)/clips
	$(BIN)/vidgen export $(DATASET)/clips $(DATASET)/export --where "verdict IS DISTINCT FROM 'reject' AND likeness_worst > 0.4 AND agrees = 1" \
		--caption "{character}, {caption}" --split train=0.8,val=0.2 --split-by prompt

# Processes have one torch thread each. -rs lists skipped tests with the reason (no GPU, browser or database).
PYTEST := $(BIN)/python -m pytest --dist loadgroup --no-loadscope-reorder -rs --durations 15

# Compiles the tests and what they import. Otherwise each process of `make test` does so when it is the first to run.
compiled: setup
	@mkdir -p out
	$(BIN)/python -m pytest --collect-only -qq > out/tests.txt || (cat out/tests.txt; exit 1)

# Three processes also on two cores: these tests often wait for other processes.
test: setup
	$(PYTEST) -n 3

# Tests that take minutes: chaos, the demo models, long scripts, the worked example of CONTRIBUTING.md, the notebook.
test-slow: setup
	$(PYTEST) -n 2 -m "slow and not very_slow" -p nbmake --nbmake --nbmake-timeout 600 tests examples/library.ipynb

# About an hour: tests that scale up others, or that change only with the packages they read.
test-longest: setup
	$(PYTEST) -n 2 -m very_slow --timeout 3600 tests

# About an hour. Places of the engine that are broken on purpose; faults of GPUs, nodes, encoders, disks and inputs, two runs on one
# cluster, leases of other containers; then kills processes, nodes and drivers of a three-node cluster at 35 random moments; then 10,000
# seeds of a run in simulated time.
FAULTS := tests/batch/test_health.py tests/batch/test_faults.py tests/engine/test_inputs.py \
	tests/render/test_cache_writer.py tests/engine/test_fleet.py tests/outputs/test_lease.py tests/outputs/test_storage_faults.py \
	tests/online/test_lost_node.py tests/remote/test_farm.py
chaos: setup
	$(BIN)/python -m pytest $(FAULTS) tests/chaos -m "" --ignore tests/chaos/test_model.py
	VIDGEN_SEEDS=10000 $(PYTEST) -n 2 --timeout 7200 tests/chaos/test_model.py

# Damaged and random input for every reader of files, one minute each. FUZZ_S=600 is longer; findings are written to out/fuzz.
FUZZ_S ?= 60
FUZZ_EXAMPLES ?= 2000
DOORS := jsonl csv txt yaml parquet characters profile lora image video
fuzz: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[fuzz]"
	VIDGEN_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest tests/hostile/test_fuzz.py --timeout 3600
	mkdir -p out/fuzz
	for door in $(DOORS); do $(BIN)/python -m tests.hostile.fuzz $$door -max_total_time=$(FUZZ_S) -timeout=60 -rss_limit_mb=8192 \
		-artifact_prefix=out/fuzz/$$door- || exit 1; done

# Supply chain, see docs/supply-chain.md. `lock` takes the versions that this environment has, which the tests ran with; +cpu builds of
# torch count as their plain version.
LOCK := packaging/requirements.lock
lock: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[audit]"
	mkdir -p out
	$(BIN)/python -m pip freeze --exclude-editable | sed -e 's/+cpu//' -e '/ @ /d' > out/tested-versions.txt
	$(BIN)/uv pip compile pyproject.toml $(CLIENT)/pyproject.toml --extra postgres --extra mcp --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header \
		--constraint out/tested-versions.txt --quiet --output-file $(LOCK)

# The lowest allowed versions on Python 3.11 and the newest of everything on 3.13. TESTS: files to run instead of the default.
resolutions: setup
	.ci/resolutions $(TESTS)

# Known vulnerabilities of the locked packages. Needs the network: --strict makes a package that cannot be looked up an error.
audit: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[audit]"
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement $(LOCK)

# Software bill of materials (CycloneDX) of the locked packages, into out/sbom.json. Needs no network.
sbom: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[audit]"
	mkdir -p out
	$(BIN)/cyclonedx-py requirements $(LOCK) --output-file out/sbom.json

# Regenerates docs/openapi.json and the tables between "generated" markers in docs/.
docs: setup
	$(BIN)/python docs/field_tables.py
	VIDGEN_UPDATE_OPENAPI=1 $(BIN)/python -m pytest tests/online/test_docs_api.py

# Builds the documentation site into out/site. A warning, such as a broken reference, is an error.
docs-site: setup
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs out/site

# Suites that others wrote, see docs/conformance.md: needs npm and ffmpeg, downloads 2 GB the first time. QUICK=1: a minute. BUG=last_id or
# clip_end breaks something that two of them must find.
referees: setup
	$(BIN)/python -m tools.referees $(if $(QUICK),--quick) $(if $(BUG),--bug $(BUG))

# A release of what git has, in dist/: source distributions and wheels of package and client, SBOM, documentation site, checksums. Tests run from
# the source distribution; the wheel is installed in an empty environment (3 GB of packages) and tried.
RELEASE := out/release
release: check docs-site sbom
	@test -z "$$(git status --porcelain)" || (echo "Commit or remove these files first:"; git status --short; exit 1)
	rm -rf dist
	$(BIN)/uv build --quiet --out-dir dist
	$(BIN)/uv build --quiet --out-dir dist $(CLIENT)
	$(BIN)/python -m pytest -m "" tests/test_deploy.py::test_tests_run_from_the_source_distribution
	$(BIN)/uv venv --quiet --clear $(RELEASE)
	$(BIN)/uv pip install --quiet --python $(RELEASE) dist/vidgen_ray-*.whl
	cd $(RELEASE) && PYTHONPATH= bin/vidgen --version && echo '{"prompt": "a boat"}' > script.jsonl && PYTHONPATH= bin/vidgen validate script.jsonl
	rm -r $(RELEASE)
	cp out/sbom.json dist/
	tar --create --gzip --file dist/site.tar.gz --directory out site
	cd dist && sha256sum * > SHA256SUMS

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_names.py

clean:
	rm -rf $(VENV) out dist .pytest_cache .mypy_cache .ruff_cache
