# make demo   a healthy and an unstable run of a small ViT, watched, and one that is switched and folded
# make test   lint, types, tests and doctests
# make bench  the figures of the README, measured on this machine
# make gpu    on a machine with a GPU: its tests, and everything there is to measure, as gpu.md
.PHONY: demo test bench gpu clean
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

demo: $(VENV)/installed
	$(BIN)/python -m examples.demo

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

gpu: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu

# The stamp is newer than what it was made from, so a changed dependency list installs again.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "stabnorm needs Python >= 3.10, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache *.egg-info build dist
