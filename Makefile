# Two targets matter: `make demo` and `make test`. Both need only Python >= 3.11.
#
#   TORCH    which PyTorch to install first, e.g. TORCH="torch==2.13.0 --index-url <your CUDA or CPU index>"
#   PYTHON   the interpreter that makes the virtual environment
#   VENV     where the virtual environment lies (created if absent)
#   JOBS     processes that share the quick tests
#   TESTS    what `make nightly` runs of the slow tests, e.g. TESTS="tests/slurm -k preemption" (default: all)
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TESTS ?= tests
DEMO_DATA ?= data/demo
DEMO_RUNS ?= runs

BIN := $(VENV)/bin
# A process that runs out of tests takes half of what another has left: files stay together, and both end together.
QUICK := pytest -m "not slow" -n $(JOBS) --dist worksteal --durations=10

.PHONY: demo test nightly coverage lint clean

demo: $(VENV)/.installed
	$(BIN)/python scripts/make_demo_data.py --output $(DEMO_DATA)
	$(BIN)/python main.py --config configs/demo/is2re.yml --dataset.root=$(DEMO_DATA) \
		--run-dir $(DEMO_RUNS) --identifier demo-is2re
	$(BIN)/python main.py --config configs/demo/s2ef.yml --dataset.root=$(DEMO_DATA) \
		--run-dir $(DEMO_RUNS) --identifier demo-s2ef

# mypy runs beside the tests; it speaks only if it finds something.
test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/mypy >$(VENV)/mypy.log 2>&1 & types=$$!; \
	$(BIN)/python -m $(QUICK); status=$$?; \
	wait $$types || { cat $(VENV)/mypy.log; status=1; }; \
	exit $$status

nightly: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow --durations=20 $(TESTS)

coverage: $(VENV)/.installed-test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m $(QUICK)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	$(BIN)/coverage json --quiet -o $(VENV)/coverage.json
	@$(BIN)/python -c 'import json; t = json.load(open("$(VENV)/coverage.json"))["totals"]; \
		print("lines {percent_statements_covered:.1f} %, branches {percent_branches_covered:.1f} %".format(**t))'

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

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist .coverage* .pytest_cache .mypy_cache .ruff_cache
