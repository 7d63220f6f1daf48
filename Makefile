# Two commands do everything: `make quickstart` and `make test`. `make help` lists the rest.
# pip reads your own configuration (index, mirror, proxy): nothing here overrides it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TEST_PROCESSES ?= 2
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev

.PHONY: help quickstart install install-dev test test-all check format bench soak clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

quickstart: install ## install, then go from text to a served model that thinks (ARGS="--minutes 10 --no-serve")
	$(BIN)/liaoyuan quickstart $(ARGS)

install: $(INSTALLED) ## make .venv and install liaoyuan in it

install-dev: $(INSTALLED_DEV) ## the same with what the tests need

# Threads of a test wait asleep: those of two processes would else spin on the cores that the others need.
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(INSTALLED_DEV) ## run the test suite (ARGS="tests/ops -k attention")
	$(PYTEST) -m "not slow" --durations 20 $(ARGS)

test-all: $(INSTALLED_DEV) ## the same with every row of its largest tables
	$(PYTEST) $(ARGS)

check: $(INSTALLED_DEV) ## lint, format, types, and the contract that imports run downwards only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED_DEV) ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED_DEV) ## measure against peers, side by side (minutes to hours; needs an idle machine)
	set -e; for file in benchmarks/*_speed.py; do $(BIN)/python $$file $(ARGS); done

soak: $(INSTALLED_DEV) ## a server under everything at once (10,000 requests), then the quickstart with three seeds, killed and resumed
	$(BIN)/python benchmarks/engine_soak.py
	$(BIN)/python benchmarks/engine_soak.py --no-guesses
	$(BIN)/python benchmarks/soak.py $(ARGS)

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist src/*.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e .
	$(BIN)/liaoyuan ops build || echo "Everything works without the kernels, more slowly."
	touch $@

$(INSTALLED_DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev]'
	$(BIN)/liaoyuan ops build || echo "Everything works without the kernels, more slowly."
	touch $@ $(INSTALLED)
