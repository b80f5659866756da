# make quickstart   distil a document detector end to end on this machine
# make test-fast    tests without Ray and without killed processes, under a minute
# make test         all tests but the tiers below, about five minutes
# make test-kill    training, caching and packing killed at every stage
# make test-export  prediction with exported bundles
# make test-transformers  DETRs of transformers
# make test-fuzz    random damage of files and hostile input
# make test-slurm   jobs on a real Slurm cluster that is started locally (as root)
# make lint         ruff and the layers of imports
# make bench        cost of distillation relative to training alone
# make check        everything that CI runs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUT ?= runs/quickstart
# Two processes of one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: setup quickstart test test-fast test-kill test-fuzz test-export test-transformers test-slurm test-all lint format type bench check clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed; give PYTHON=/path/to/python3.11" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray,dev]'
	touch $(READY)

quickstart: setup
	$(BIN)/graphkd quickstart --out $(OUT)

test-fast: setup
	$(PYTEST) -m fast

test: setup
	$(PYTEST)

# Each file in one process: Ray is started once for the tests of a file.
test-kill: setup
	$(PYTEST) --dist loadfile -m 'kill and not slow and not gpu and not slurm'

test-fuzz: setup
	$(BIN)/python -m pytest -m 'fuzz and not slow'

test-transformers: setup
	$(PYTEST) -m 'transformers and not slow'

test-export: setup
	$(PYTEST) --dist loadfile -m 'export and not slow'

test-slurm: setup
	$(BIN)/python -m pytest -m 'slurm and not slow and not gpu'

test-all: setup
	$(BIN)/python -m pytest -m ''

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

type: setup
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.step_cost

check: lint type test test-kill test-fuzz test-export test-transformers test-slurm
	$(BIN)/graphkd quickstart --small --out $$(mktemp -d)/quickstart

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
