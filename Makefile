# Two commands for a newcomer: `make demo` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: setup demo test test-all lint bench clean

setup: $(READY)

# Installed again only when the dependencies change; a second `make` finds the stamp and goes on.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gradlab needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "no venv module: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	@touch $@

demo: $(READY)
	$(BIN)/gradlab verify --preset smoke --out results

test: $(READY)
	$(BIN)/pytest -n auto --maxprocesses 4

test-all: $(READY)
	$(BIN)/pytest -n auto --maxprocesses 4 -m "slow or not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/cffconvert --validate

bench: $(READY)
	$(BIN)/gradlab bench --preset smoke --out results

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
