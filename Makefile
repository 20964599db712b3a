# Everything runs in .venv, which each target sets up as far as it needs, from nothing but Python 3.10 or newer.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Stamps say what is installed, so that a second run is quick. Another TORCH is another stamp.
TORCH_STAMP := $(VENV)/.installed-$(subst =,-,$(TORCH))
STAMP := $(VENV)/.installed
CONSTRAINTS := $(VENV)/torch.txt

.PHONY: help demo test proof check lint format clean

help:  ## say what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | awk -F'|' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: $(STAMP)-base  ## make a training plan for a small GPT from this machine's real memory
	$(BIN)/autobatch probe examples/char_gpt.py:workload --target 1024 --device cpu --memory-limit 1GiB --output plan.json

# One thread for each of several workers: OpenMP's threads spin while they wait, so that two processes with two threads
# each take three times as long on two cores.
test: $(STAMP)-test  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadgroup $(ARGS)

proof: $(STAMP)-test  ## prove answers at the edge of memory in fresh processes (minutes)
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(STAMP)-base  ## compare the memory of the examples' training steps with the committed baseline
	$(BIN)/autobatch check $(ARGS)

lint: $(STAMP)-dev  ## check style, types and the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)-dev  ## bring the code into the project's style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what the other targets made
	rm -rf $(VENV) plan.json build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("autobatch needs Python 3.10 or newer, but $(PYTHON) is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch first and alone, and then held where it is: the newest torchvision would bring another.
$(TORCH_STAMP): $(VENV)/.created
	@echo "Installing $(TORCH) into $(VENV), once; this takes a few minutes."
	$(PIP) install "$(TORCH)"
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch").split("+")[0])' > $(CONSTRAINTS)
	@rm -f $(STAMP)-base $(STAMP)-dev $(STAMP)-test
	@touch $@

$(STAMP)-base: $(TORCH_STAMP) pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) -e .
	@touch $@

$(STAMP)-dev: $(TORCH_STAMP) pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

$(STAMP)-test: $(TORCH_STAMP) pyproject.toml
	$(PIP) install -c $(CONSTRAINTS) -e ".[dev,huggingface,vision,lightning,accelerate,examples]"
	@touch $@
