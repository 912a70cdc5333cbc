# Each target makes its own environment below .venv and installs what it needs.
PYTHON ?= python3
DEV := .venv/dev/bin
DEMO := .venv/demo/bin

.PHONY: demo test lint

demo: .venv/demo/.installed
	$(DEMO)/python -m benchmarks.demo

test: .venv/dev/.installed
	OMP_NUM_THREADS=1 $(DEV)/python -m pytest -n 2 --dist loadfile

lint: .venv/dev/.installed
	$(DEV)/ruff check .
	$(DEV)/ruff format --check .
	$(DEV)/mypy

.venv/demo/.installed: pyproject.toml
	$(PYTHON) -m venv .venv/demo
	$(DEMO)/pip install --quiet --editable '.[cpu]'
	touch $@

.venv/dev/.installed: pyproject.toml
	$(PYTHON) -m venv .venv/dev
	$(DEV)/pip install --quiet --editable '.[cpu,large,video,train,export,peers,serve,ray,dev]'
	touch $@
