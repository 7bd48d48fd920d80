# make demo: install, build the kernels, run the demo.   make test: install, run all tests.
# PYTHON=python3.12 chooses the interpreter, GEFFECT_FAST_BUILD=auto|cpu|cuda|none what is built.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
DEMO_OUT ?= demo-run

# By default OpenMP's threads spin while they wait; on cores shared with other programs that turns
# minutes into hours, and it saves next to nothing elsewhere.
export OMP_WAIT_POLICY ?= passive

# The suite once more on an installation without kernels; it borrows every other package from $(VENV).
VENV_NONE := .venv-none

NATIVE := $(shell find csrc -type f)
PYTHON_FILES := $(shell find geffect_fast -name '*.py')
CPP_FILES := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE))

# What an extra of pyproject.toml asks for, read from the installed package's own metadata.
extra = $$($(BIN)/python -c 'from importlib.metadata import requires; \
	print(*(r.split(";")[0].strip() for r in requires("geffect-fast") if "$(1)" in r.partition(";")[2]))')

.DELETE_ON_ERROR:
.PHONY: help install demo test test-nobuild lint format bench clean

help:
	@echo "make demo          install into $(VENV), build the kernels, run the demo into $(DEMO_OUT)"
	@echo "make test          install and run all tests"
	@echo "make test-nobuild  all tests on an installation without native kernels"
	@echo "make lint          ruff, clang-format, mypy"
	@echo "make format        let ruff and clang-format rewrite the files"
	@echo "make bench         benchmarks, into benchmarks/results"
	@echo "make clean         remove $(VENV), builds and caches"

install: $(VENV)/installed

# Distributions that split ensurepip off still have venv itself and a pip that can fill it.
$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), 3.10 or later is needed;" \
		"run make PYTHON=python3.12 or the like" >&2; exit 1; }
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip install -qq --target "$$($(BIN)/python -c \
			'import sysconfig; print(sysconfig.get_path("purelib"))')" pip; }
	@touch $@

$(VENV)/torch: $(VENV)/created constraints.txt
	@echo "installing torch and what builds the kernels"
	@$(PIP) torch numpy "setuptools>=77" ninja
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml setup.py $(NATIVE)
	@echo "building and installing geffect_fast"
	@$(PIP) --no-build-isolation --editable .
	@$(BIN)/geffect-fast env
	@touch $@

$(VENV)/tools-%: $(VENV)/installed
	@echo "installing what '$*' needs"
	@$(PIP) $(call extra,$*)
	@touch $@

demo: $(VENV)/installed
	$(BIN)/geffect-fast demo --out $(DEMO_OUT) --overwrite

test: $(VENV)/tools-test
	$(BIN)/python -m pytest -q

$(VENV_NONE)/installed: $(VENV)/tools-test $(PYTHON_FILES)
	@echo "installing geffect_fast without kernels into $(VENV_NONE)"
	@rm -rf $(VENV_NONE) build
	@$(BIN)/python -m venv --without-pip $(VENV_NONE)
	@$(BIN)/python -c 'import sysconfig; \
		print(*sorted({sysconfig.get_path(p) for p in ("purelib", "platlib")}), sep="\n")' \
		> "$$($(VENV_NONE)/bin/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	@GEFFECT_FAST_BUILD=none $(VENV_NONE)/bin/python -m pip install -qq --no-input \
		--disable-pip-version-check --no-deps --no-build-isolation --ignore-installed .
	@touch $@

# pytest's own script, since `python -m pytest` would put this folder's package before the installed one
test-nobuild: $(VENV_NONE)/installed
	GEFFECT_FAST_BUILD=none $(VENV_NONE)/bin/python $(BIN)/pytest -q

lint: $(VENV)/tools-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/tools-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

bench: $(VENV)/tools-test
	for script in benchmarks/bench_*.py; do $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf $(VENV) $(VENV_NONE) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	rm -f geffect_fast/*.so
