# Two commands do all the set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: install quickstart test lint teacher clean

install: $(INSTALLED)

$(INSTALLED):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

quickstart: install  ## watch a student learn; results in quickstart-out/
	$(BIN)/okd-lightning quickstart --out quickstart-out

test: install  ## the whole CPU suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

teacher: install  ## make the quickstart's teacher again (several minutes)
	$(BIN)/python -m okd_lightning.quickstart.make_teacher

clean:
	rm -rf $(VENV) build dist *.egg-info runs quickstart-out
