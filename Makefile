# make demo           a healthy and an unstable run of a small ViT, watched, and one that is switched and folded
# make quick          lint, types, and the tests and doctests that are not slow
# make test           lint, types, and all tests and doctests
# make docs           the guide, and the reference from the docstrings, in build/docs/index.html
# make bench          the figures of the README, measured on this machine
# make wheel          a wheel for this platform in dist/, with the C++ library: it needs no compiler at the user's
# make gpu            on a machine with a GPU: its tests, and everything there is to measure, as gpu.md
# make test-oldest    the tests with the oldest versions that pyproject.toml allows
# make test-newest    the tests with the newest versions that there are
# make check-install  where constraints.txt installs: every promised Python and platform, from metadata only
# make lock           constraints.txt made again from pyproject.toml; LOCK=--upgrade takes the newest versions
#
# PYTHON=python3.13 takes another Python; VENV=.venv-3.13 keeps its environment beside the first one.
.PHONY: demo quick test lint tests docs bench wheel gpu test-oldest test-newest check-install lock clean
PYTHON      ?= python3
VENV        ?= .venv
CONSTRAINTS ?= constraints.txt
LOCK        ?=

BIN     = $(VENV)/bin
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null)
# The environment is made again when the Python differs, whose version the stamp names, or when a dependency list changed.
STAMP   = $(VENV)/installed-$(VERSION)

demo: $(STAMP)
	$(BIN)/python -m stabnorm.examples.demo

quick: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadgroup -m "not slow"

test: lint tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

tests: $(STAMP)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadgroup

# A warning, such as a link that leads nowhere, is an error. -E: a page is never left as an older build made it.
docs: $(STAMP)
	$(BIN)/sphinx-build -q -E -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

bench: $(STAMP)
	$(BIN)/python -m benchmarks

wheel: $(STAMP)
	STABNORM_WHEEL=library $(BIN)/python -m pip wheel --quiet --disable-pip-version-check . --no-deps --wheel-dir dist
	@ls dist

gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu

check-install: $(STAMP)
	$(BIN)/python -m tests.check_install

lock: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --universal --extra dev --no-annotate --quiet $(LOCK) \
		--custom-compile-command "make lock" --output-file constraints.txt

# Without types: what the annotations of old versions lack is no fault of ours.
test-oldest: $(STAMP)
	$(BIN)/uv pip compile pyproject.toml --python $(BIN)/python --resolution lowest-direct --only-binary :all: --quiet \
		--output-file $(VENV)/oldest.txt
	$(MAKE) tests VENV=$(VENV)-oldest CONSTRAINTS=$(VENV)/oldest.txt

test-newest:
	rm -rf $(VENV)-newest
	$(MAKE) test VENV=$(VENV)-newest CONSTRAINTS=

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@command -v $(PYTHON) > /dev/null || { echo "There is no $(PYTHON). Install Python 3.11 or newer, or name another one: make PYTHON=python3.13"; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) -e ".[dev]"
	touch $@

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("stabnorm needs Python 3.11 or newer, and this is " + sys.version + ". Name another one: make PYTHON=python3.13")
try:
    import ensurepip, venv
except ImportError:
    sys.exit("This Python cannot make a virtual environment. On Debian and Ubuntu: apt install python%d.%d-venv" % sys.version_info[:2])
endef
export CHECK_PYTHON

clean:
	rm -rf .venv .venv-* .mypy_cache .pytest_cache .ruff_cache *.egg-info build dist
