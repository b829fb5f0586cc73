# Each target works as the only command on a fresh clone: the first one makes .venv and installs the project into it.
#   make test PYTEST_ARGS="-k schedule"     passes arguments on to pytest
#   make test JOBS=8                        runs as many tests at a time
#   make test TORCH_INDEX=URL               takes PyTorch from this package index
PYTHON ?= python3
PYTEST_ARGS ?=
TORCH_INDEX ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq $(if $(CI),--no-input)
TORCH_WANTED = import tomllib; \
    print(*(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch")))

.PHONY: help soundness demo serve-demo test check bench gpu clean

help:
	@echo "make demo    what the backend does to a small model, step by step"
	@echo "make serve-demo    a serving loop on two ranks, requests coming and going on each"
	@echo "make test    the test suite"
	@echo "make soundness  the rules against brute force on PyTorch's samples, these compiled, long fuzzing, many models"
	@echo "make check   lint, types, layers, and the documentation as a site in build/site"
	@echo "make bench   every benchmark that runs on a CPU"
	@echo "make soak    two ranks, 10,000 steps of random sizes: nothing leaks, hangs or differs"
	@echo "make gpu     the tests and benchmarks that need an accelerator, with $(PYTHON) and its PyTorch"
	@echo "make clean   remove .venv and everything else that was made here"

demo: $(STAMP)
	@$(BIN)/python -m dbo_compile demo

serve-demo: $(STAMP)
	@$(BIN)/python examples/serve.py

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not gpu" --durations=10 $(PYTEST_ARGS)

# Some 100 minutes on two cores; writes soundness.md and architectures.md in docs/results.
# SOUNDNESS_SEED=N repeats the random part of another run.
soundness: export SOUNDNESS_OP_DB := all
soundness: export SOUNDNESS_EXAMPLES := 1000
soundness: export SOUNDNESS_ROUTES := 20000
soundness: export SOUNDNESS_ARCHITECTURES := all
soundness: $(STAMP)
	@seed=$${SOUNDNESS_SEED:-$$(date +%s)}; echo "SOUNDNESS_SEED=$$seed"; \
	    SOUNDNESS_SEED=$$seed $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -v tests/soundness $(PYTEST_ARGS)

check: $(STAMP)
	@echo "ruff" && $(BIN)/ruff check --quiet .
	@echo "mypy" && $(BIN)/mypy
	@echo "layers" && $(BIN)/python -m pytest -q tests/test_layers.py
	@$(BIN)/python -m mkdocs --version >/dev/null 2>&1 || $(PIP) --editable ".[docs]" || true
	@if $(BIN)/python -m mkdocs --version >/dev/null 2>&1; then \
	    echo "docs" && NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet; \
	else echo "docs: skipped, mkdocs-material could not be installed (pip install -e '.[docs]')"; fi

bench: $(STAMP)
	@set -e; for file in benchmarks/bench_*.py; do \
	    test -f "$$file" || { echo "make bench: there is no $$file" >&2; exit 1; }; \
	    name=$$(basename "$$file" .py); echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

soak: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

# Not in .venv: a PyTorch that fits the accelerator is there already, and such machines often have no network. Nothing
# is installed into that Python either; build/gpu is there for the entry point, the code comes from the checkout.
gpu: export PYTHONPATH := build/gpu
gpu:
	@$(PYTHON) -c 'import torch; assert torch.accelerator.is_available()' 2>/dev/null || { \
	    echo "make gpu: $(PYTHON) has no PyTorch that sees an accelerator; set PYTHON to one that has" >&2; exit 1; }
	@test -f benchmarks/gpu.py || { echo "make gpu: there is no benchmarks/gpu.py" >&2; exit 1; }
	@rm -rf build/gpu
	@$(PYTHON) -m pip install -qq --no-index --no-deps --no-build-isolation --target build/gpu .
	@$(PYTHON) -m pytest tests/gpu --durations=10 $(PYTEST_ARGS)
	@$(PYTHON) -m benchmarks.gpu

clean:
	@rm -rf $(VENV) build dbo-demo dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find dbo_compile tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# PyTorch first and alone, so that TORCH_INDEX chooses its build and nothing else.
$(STAMP): pyproject.toml
	@test -x $(BIN)/python || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing PyTorch (the largest part)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$($(BIN)/python -c '$(TORCH_WANTED)')"
	@echo "installing dbo-compile and its development tools"
	@$(PIP) --editable ".[dev]"
	@touch $@
