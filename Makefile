# Two targets matter: `make demo` and `make test`. Both need only Python >= 3.11.
#
#   TORCH    which PyTorch to install first, e.g. TORCH="torch==2.13.0 --index-url <your CUDA or CPU index>"
#   PYTHON   the interpreter that makes the virtual environment
#   VENV     where the virtual environment lies (created if absent)
#   SLOW     which of the slow tests `make test-slow` runs (default: all but those that start a SLURM)
#   SLURM    which of SLURM's tests `make test-slurm` runs, e.g. SLURM="-k preemption" (default: all)
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
DEMO_DATA ?= data/demo
DEMO_RUNS ?= runs
SLOW ?= tests
SLURM ?=

BIN := $(VENV)/bin

.PHONY: demo test test-slow test-slurm lint clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/make_demo_data.py --output $(DEMO_DATA)
	$(BIN)/python main.py --config configs/demo/is2re.yml --dataset.root=$(DEMO_DATA) \
		--run-dir $(DEMO_RUNS) --identifier demo-is2re
	$(BIN)/python main.py --config configs/demo/s2ef.yml --dataset.root=$(DEMO_DATA) \
		--run-dir $(DEMO_RUNS) --identifier demo-s2ef

test: $(VENV)/.installed-test lint
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m "slow and not slurm" $(SLOW)

test-slurm: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slurm -rs tests/slurm $(SLURM)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
