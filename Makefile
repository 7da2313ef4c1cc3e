# One vocabulary of tasks, the same here and in CI. `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HOME ?= $(CURDIR)/.cache/huggingface
export EASE_DATA_DIR ?= $(firstword $(wildcard data ../shared/data) data)

.PHONY: demo test check docs bench clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

demo: $(READY)  ## train, export, verify, generate, measure
	PATH="$(CURDIR)/$(BIN):$$PATH" sh scripts/demo.sh

test: $(READY)
	$(BIN)/pytest -m 'not slow' $(PYTEST_ARGS)

test-slow: $(READY)
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/make_cli.py --check

docs: $(READY)  ## rewrite docs/cli.md from --help
	$(BIN)/python docs/make_cli.py

bench: $(READY)  ## training beside transformers' Trainer, its memory; engine overhead a segment call, on the demo bundle
	$(BIN)/pip install --quiet -e '.[bench]'
	$(BIN)/python bench/training.py --json runs/bench/training.json
	$(BIN)/python bench/overhead.py runs/demo/bundle

clean:
	rm -rf $(VENV) .venv-runtime .cache runs/demo
