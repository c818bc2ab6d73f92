# Two commands do all the set-up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TEST_WORKERS ?= 2
SHELL := /bin/bash
INSTALLED := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: install quickstart test test-portable test-newest test-oldest golden soak fuzz lint docs teacher clean

install: $(INSTALLED)

$(INSTALLED):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

quickstart: install  ## watch a student learn; results in quickstart-out/
	$(BIN)/okd-lightning quickstart --out quickstart-out

test: install  ## the whole CPU suite, a process for each of TEST_WORKERS
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# Every pair of settings occurs: vector instructions, threads, and oneDNN's kernels (OKD_ONEDNN).
PORTABLE := default:1:0 default:2:1 avx2:1:1 avx2:2:0 :1:1 :2:0
NUMERIC := advantages callbacks/methods divergences engines losses metrics rollouts sharding teachers \
  callbacks/test_shelf_formulas.py models/test_causal_lm.py records/test_packing.py \
  $(addprefix callbacks/measures/test_,evaluation.py paper_measures.py) \
  $(addprefix training/test_,ddp.py invariance.py module.py own_classes.py)

test-portable: install  ## numeric tests on each kind of CPU kernel, with one thread and two
	set -e; for run in $(PORTABLE); do \
	  IFS=: read -r isa threads onednn <<< "$$run"; echo "kernels: $${isa:-best}, threads: $$threads, oneDNN: $$onednn"; \
	  env $${isa:+ATEN_CPU_CAPABILITY=$$isa} OMP_NUM_THREADS=$$threads OKD_ONEDNN=$$onednn \
	    $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist loadfile $(addprefix tests/,$(NUMERIC)); \
	done

# Tests of what calls transformers, PEFT, Lightning and jsonargparse: a few CPU minutes.
VERSIONED := $(addprefix tests/,models/test_loading.py models/test_causal_lm.py models/shrinking engines/test_engine.py \
    callbacks/methods/test_okd_training.py callbacks/monitors/test_watching_parallel.py \
    records/test_packing.py training/test_resume.py) \
  $(addprefix tests/commands/test_,okd_runs.py export.py adapter_export.py shrink.py)
TEST_TOOLS := pytest pytest-xdist hypothesis beartype
TORCH := $(shell grep '^torch==' constraints.txt)

test-newest:  ## the newest releases that pyproject.toml allows, but for torch
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet $(TORCH)
	.venv-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager -e . $(TEST_TOOLS) $(TORCH)
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile $(VERSIONED)

# (old releases of jaxtyping come too late for its option in addopts)
test-oldest:  ## the lower bounds of pyproject.toml, but for torch; old releases may warn
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/lower_bounds.py > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet $(TORCH)
	.venv-oldest/bin/pip install --quiet -c .venv-oldest/constraints.txt -e . $(TEST_TOOLS) $(TORCH)
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -W default -o addopts=-ra -n $(TEST_WORKERS) --dist loadfile $(VERSIONED)

golden: install  ## write this platform's golden runs anew, on purpose only
	OKD_GOLDEN=write OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/golden

VLLM := .venv-vllm
VLLM_INSTALLED := $(VLLM)/.installed-$(shell cat pyproject.toml requirements-vllm.txt | cksum | cut -d' ' -f1)

$(VLLM_INSTALLED):
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.txt
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

test-vllm: $(VLLM_INSTALLED)  ## against real servers of a CPU build of vLLM, started on 127.0.0.1
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m real_vllm tests/engines/test_vllm_server.py \
	  tests/real_vllm

soak: install  ## kill runs with SIGKILL and compare them with runs left alone (about ten minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --kills 20
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --kills 6 --ranks 2
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --hang 10
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py --torchrun

fuzz: install  ## give hostile rows, templates, model folders, servers and configs (some minutes)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz_program.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: install  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

teacher: install  ## make the quickstart's teacher again (about ten minutes)
	$(BIN)/python -m okd_lightning.commands.quickstart.task build/quickstart
	OMP_NUM_THREADS=1 $(BIN)/okd-lightning fit --config quickstart_teacher \
	  --model.tokenizer okd_lightning/commands/quickstart/tokenizer \
	  --data.train build/quickstart/teacher_train.jsonl \
	  --data.val okd_lightning/commands/quickstart/data/val.jsonl
	$(BIN)/okd-lightning export --out okd_lightning/commands/quickstart/teacher \
	  --ckpt_path runs/quickstart_teacher/checkpoints/last.ckpt

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest $(VLLM) build dist *.egg-info runs quickstart-out
