# Every target uses the project's own environment in .venv; `make setup` makes it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test lint format bench dashboard clean

setup: $(STAMP)

# The CPU build of torch comes first and by its exact version, so that nothing pulls in gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt --editable ".[dev,dashboards,nnsight]"
	touch $(STAMP)

demo: setup
	$(BIN)/python examples/ioi_patching.py --model tiny-mamba --out out/ioi

# Whole files go to one process or the other, so that what a file's tests share is made once.
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

dashboard: setup
	$(BIN)/ssminterp dashboard

clean:
	rm -rf .venv out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
