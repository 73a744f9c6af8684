# Everything a developer runs; `make` alone lists it.
#
# Environments are made when they are missing, and again when their pins or pyproject.toml change.
#   PYTHON=python3.12 make .venv            another interpreter
#   make test PYTEST_ARGS="-k prelu -x"     arguments for every pytest run
#   make test WORKERS=4                     test processes (default: one a core, 8 at most)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
WORKERS ?= auto
PYTEST_ARGS ?=

FOLDERS := fusednn kernels autograd layers optim
SOURCES := pyproject.toml README.md LICENSE $(FOLDERS)

# Kernels in the interpreter are many small operations: threads within one would only get in the other workers' way.
# $(call pytest,ENVIRONMENT,MARKERS)
pytest = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -m "$(2)" -n $(WORKERS) --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- Environments ----------------------------------------------------------------------------------------------------

.PHONY: .venv
.venv: .venv/.complete ## the environment to develop in, with an editable install

# Build tools first, from the pins: otherwise pip would fetch the newest for the build.
.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,demo,models]'
	touch $@

# torchvision's wheels are built for CUDA: beside a CPU build of torch their import fails, and with it transformers' and
# timm's.  So they stay out of the environment; tests of their layers find them here, and declare what is missing.
# What the scripts in examples/libraries are written for besides is found here, too, without what it would bring along.
.build/models/.complete: .venv/.complete
	rm -rf .build/models
	.venv/bin/python -m pip install --quiet --no-deps --constraint constraints.txt --target .build/models timm torchvision \
		accelerate kernels lightning-utilities pytorch-lightning torchmetrics
	touch $@

# In front of a command, which then finds them.
MODELS := PYTHONPATH=.build/models

.venv-oldest/.complete: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --requirement constraints-oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# numpy as in constraints-oldest.txt, for the same reason; torch 2.11 wants setuptools below 82.
.venv-oldest-torch/.complete: pyproject.toml
	$(PYTHON) -m venv .venv-oldest-torch
	.venv-oldest-torch/bin/python -m pip install --quiet torch==2.11.0 'numpy<2.4' 'setuptools>=77,<82' wheel
	.venv-oldest-torch/bin/python -m pip install --quiet --no-build-isolation --editable '.[dev,demo]'
	touch $@

NEWEST_TORCH ?= 2.14.1
.venv-newest/.complete: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet torch==$(NEWEST_TORCH) 'setuptools>=77' wheel
	.venv-newest/bin/python -m pip install --quiet --no-build-isolation --editable '.[dev,demo]'
	touch $@

# --- Use -------------------------------------------------------------------------------------------------------------

.PHONY: demo bench bench-docs baseline check
demo: .venv/.complete ## train a network on handwritten digits, stock beside fusednn
	.venv/bin/python -m fusednn demo

bench: .venv/.complete ## run the benchmarks: timings on a GPU, counts without one
	.venv/bin/python -m fusednn bench

# The sources have to be committed: results name the commit that they are of.
bench-docs: .venv/.complete ## counts, predictions and compile-time resources anew, and the documents made of them
	rm -f bench/results/counted.json
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv/bin/python -m fusednn bench -q --resume bench/results/counted.json
	.venv/bin/python -m fusednn bench predict
	.venv/bin/python -m fusednn bench resources
	.venv/bin/python -m fusednn bench report --docs

baseline: .venv/.complete ## write down bytes, launches, registers and spills that tests hold new ones against
	OMP_NUM_THREADS=1 .venv/bin/python -m fusednn bench baseline

check: .venv/.complete ## compile every kernel, check the machine code, and test every layer and optimizer
	.venv/bin/python -m fusednn check

# Beside the environment: tests don't need them.
.build/docs/.complete: .venv/.complete
	rm -rf .build/docs
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --target .build/docs furo myst-parser sphinx
	touch $@

.PHONY: docs
docs: .build/docs/.complete ## the site, from the pages and the docstrings, into .build/site; warnings are errors
	PYTHONPATH=.build/docs .venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs .build/site
	@echo .build/site/index.html

.PHONY: recipe
recipe: .venv/.complete ## train the recipe's ladder and write docs/recipe.md; takes minutes
	.venv/bin/python docs/recipe.py

# --- Tests -----------------------------------------------------------------------------------------------------------

.PHONY: test test-all test-interpreter test-stock test-compiled test-thorough test-oldest test-oldest-torch test-newest test-gpu lint
test: lint test-compiled test-interpreter test-stock ## lint, and each test in its three modes; needs no GPU, but gcc

test-all: test test-thorough ## all cases of all tests

# Of a grid of cases `make test` takes a few (tests/support/sample.py).
QUICK := not thorough and not grid

# Compiled kernels are kept in .cache: the first run takes minutes longer.
test-compiled: .build/models/.complete ## the suite on kernels compiled for a GPU, on a virtual one (tests/vgpu)
	$(MODELS) FUSEDNN_VGPU=80 $(call pytest,.venv,$(QUICK))
	$(MODELS) FUSEDNN_VGPU=90 $(call pytest,.venv,compiled and $(QUICK)) tests/test_vgpu_checks.py tests/test_compiled.py \
		-k "products or conv or linear"

# Compiled kernels are quicker, and show more.  What the interpreter alone can do is count bytes, and do without gcc: where
# there is none, it runs everything.
test-interpreter: .build/models/.complete
	$(MODELS) TRITON_INTERPRET=1 $(call pytest,.venv,$(if $(shell command -v gcc),(interpreter or smoke) and )$(QUICK))

test-stock: .build/models/.complete
	$(MODELS) TRITON_INTERPRET=0 $(call pytest,.venv,$(QUICK))

test-thorough: PYTEST_ARGS += $(if $(PART),--part $(PART))
test-thorough: .build/models/.complete ## what `make test` leaves out for time; PART=1/3 takes the first of three parts
	$(MODELS) TRITON_INTERPRET=1 $(call pytest,.venv,not (interpreter or smoke) or thorough or grid)
	$(MODELS) TRITON_INTERPRET=0 $(call pytest,.venv,thorough or grid)
	$(MODELS) FUSEDNN_VGPU=80 $(call pytest,.venv,compiled and thorough or grid)

test-oldest: .venv-oldest/.complete ## compile check and smoke tests with the oldest supported Triton
	TRITON_INTERPRET=0 $(call pytest,.venv-oldest,compiles and not thorough)
	TRITON_INTERPRET=1 $(call pytest,.venv-oldest,smoke)

test-oldest-torch: .venv-oldest-torch/.complete ## the suite with the oldest PyTorch, which brings gigabytes of CUDA packages
	TRITON_INTERPRET=1 $(call pytest,.venv-oldest-torch,not thorough)
	TRITON_INTERPRET=0 $(call pytest,.venv-oldest-torch,not thorough and not compiles)

test-newest: .venv-newest/.complete ## the same with the newest PyTorch and its Triton; NEWEST_TORCH chooses another
	TRITON_INTERPRET=0 $(call pytest,.venv-newest,not thorough)
	TRITON_INTERPRET=1 $(call pytest,.venv-newest,smoke)

SEED ?= 0
NUMBER ?= 20
SINCE ?=
PLANTED ?=
.PHONY: mutants
mutants: .build/models/.complete ## faults put in on purpose: which do the tests notice?  SEED, NUMBER, FOLDERS, SINCE, PLANTED choose
	$(MODELS):tests .venv/bin/python -m mutants --seed $(SEED) --number $(NUMBER) $(if $(SINCE),--since $(SINCE)) \
		$(if $(PLANTED),--planted) $(filter-out fusednn,$(FOLDERS))

test-gpu: ## the suite on the GPU, with the machine's own python3, torch, triton and pytest; needs no network
	$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no GPU here")'
	$(PYTHON) -m pip install --no-index --no-deps --no-build-isolation --editable .
	TRITON_INTERPRET=0 $(PYTHON) -m pytest tests -m "not compiles" $(PYTEST_ARGS)

# The type checker can't follow an editable install, nor know that kernels/ is fusednn.kernels: it gets a real install.
# Its messages are turned back to the sources' paths.
lint: .venv/.complete ## ruff, and mypy on the installed package
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	rm -rf .build/source .build/installed
	mkdir -p .build/source
	cp -R $(SOURCES) .build/source
	.venv/bin/python -m pip install --quiet --no-index --no-deps --no-build-isolation --no-compile \
		--target .build/installed .build/source
	cd .build && MYPYPATH=installed ../.venv/bin/mypy --config-file ../pyproject.toml --cache-dir mypy_cache \
		--package fusednn | sed -E 's,^installed/fusednn/(kernels|autograd|layers|optim)/,\1/,; s,^installed/,,'

.PHONY: clean
clean: ## remove what the targets made, except the environments
	rm -rf .build build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .benchmarks demo-output
	find $(FOLDERS) tests bench examples -name __pycache__ -prune -exec rm -rf {} +
