# Every target sets up what it needs. Nothing but Python 3.11+, pip, git and make has to be there.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
WORKERS ?= 2
PACKAGES := activations_cache saes probe
# Two test processes on two cores: one thread each is faster than four that fight.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test test-all lint format bench docs notebook setup clean

help: ## List the targets.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## Create the virtual environment.

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about two minutes, once)"
	@if command -v uv >/dev/null 2>&1; then \
	  uv venv --allow-existing --python "$(PYTHON)" $(VENV) && \
	  uv pip install --python $(BIN)/python -c constraints.txt -e ".[dev,notebooks]"; \
	else \
	  "$(PYTHON)" -m venv $(VENV) && \
	  $(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e ".[dev,notebooks]"; \
	fi
	@touch $@

demo: $(VENV)/.ready ## Walk the whole road on a model with a known secret; ends with the report and the edited model.
	$(BIN)/probe demo --out $(OUT)

test: $(VENV)/.ready ## The tests that every change must pass.
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-all: $(VENV)/.ready ## All tests, the slow ones too.
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(VENV)/.ready ## Style, types, import order.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready ## Apply the style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready ## Measure against the peers; prints tables, writes them to runs/bench.
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python -m benchmarks.memory --out runs/bench/memory.json
	$(BIN)/python -m benchmarks.reading --out runs/bench/reading.json
	$(BIN)/python -m benchmarks.shuffle --out runs/bench/shuffle.json
	$(BIN)/python -m benchmarks.capture --out runs/bench/capture.json

docs: $(VENV)/.ready ## Build the documentation into site/, links checked.
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

notebook: $(VENV)/.ready ## Open JupyterLab in notebooks/.
	$(BIN)/jupyter lab notebooks

clean: ## Remove what the other targets made (organisms in the user's cache folder stay).
	rm -rf $(VENV) runs site build dist .cache *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
