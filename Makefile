# One environment, one package, installed once and again only when something compiled has changed.
#
#   make demo        the whole job in a few minutes: train, save, convert, load, generate, compare
#   make test        everything but the slow tests
#   make bench       each op beside PyTorch eager and torch.compile
#   make sanitize    the GPU tests under compute-sanitizer; needs a GPU
#   make budgets     compile the GPU kernels and write down what they need: registers, accesses, instructions (minutes)
#
# PYTHON=python3.12   the interpreter that makes the environment
# VENV=~/envs/mine    use (or make) that environment; a torch that is already in it stays
# TORCH=torch         what to install where there is no torch yet (the newest; a requirement as pip takes it)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
BENCH_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq
SAY := @printf '\n==> %s\n'
STAMP := $(VENV)/.megatron_kernels
TEST_STAMP := $(VENV)/.megatron_kernels-test
SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.txt) setup.py pyproject.toml

.PHONY: help install demo test test-slow lint bench sanitize budgets clean
help:
	@awk '!/^#/ {exit} {sub(/^# ?/, ""); print}' Makefile

# An environment that serves another checkout, or whose library was cleaned away, is out of date whatever its time stamp says.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
else ifeq ($(wildcard megatron_kernels/_C_cpu*),)
.PHONY: $(STAMP)
endif

$(PY):
	$(SAY) "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo '*' > $(VENV)/.gitignore

# The build must see the torch it will run with, so torch comes first and the package is built without isolation.
$(STAMP): $(SOURCES) | $(PY)
	@$(PY) -c 'import importlib.metadata as m; print("\n==> Keeping torch", m.version("torch"))' 2>/dev/null || { \
	  printf '\n==> %s\n' 'Installing $(TORCH) (200 MB, or several GB where pip finds a CUDA build)'; \
	  $(PY) -m pip install '$(TORCH)'; }
	$(SAY) "Compiling and installing megatron_kernels (half a minute)"
	@$(PIP) 'setuptools>=77' ninja
	@$(PIP) --no-build-isolation --editable .
	@printf '%s\n' '$(CURDIR)' > $@

# Also the CUDA kernels as functions on the CPU, which only tests need.
$(TEST_STAMP): pyproject.toml $(SOURCES) | $(STAMP)
	$(SAY) "Installing what the tests and linters need"
	@$(PY) -c 'from importlib.metadata import requires; print(*(r.replace(" and extra == \"test\"", "").replace("; extra == \"test\"", "") \
	  for r in requires("megatron-kernels") if "extra ==" in r), sep="\n")' > $(VENV)/test-requirements.txt
	@$(PIP) -r $(VENV)/test-requirements.txt
	$(SAY) "Compiling the CUDA kernels for the CPU"
	@MK_SIMT=1 $(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	$(SAY) "Running the demo"
	@$(VENV)/bin/megatron-kernels demo

test: $(TEST_STAMP)
	$(PY) -m pytest -q -m 'not slow' $(PYTEST_ARGS)

test-slow: $(TEST_STAMP)
	$(PY) -m pytest -q -m slow $(PYTEST_ARGS)

lint: $(TEST_STAMP)
	$(PY) -m ruff check .
	$(PY) -m mypy

sanitize: $(TEST_STAMP)
	$(PY) tests/sanitize.py

budgets: $(TEST_STAMP)
	$(PY) tests/cubins.py --write
	$(PY) tests/triton_resources.py --write

bench: $(STAMP)
	$(PY) -m benchmarks.ops --device cpu $(BENCH_ARGS)

clean:
	rm -rf build dist *.egg-info megatron_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
