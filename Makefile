# make demo: install, build the kernels, run the demo.   make test: install, run the tests.
# PYTHON=python3.12 chooses the interpreter, GEFFECT_FAST_BUILD=auto|cpu|cuda|none what is built,
# JOBS=4 how many tests run side by side.
# gpu and gpu-* use $(PYTHON) as it is: no virtual environment, no downloads.
# GPU_OUT=folder is where `make gpu` leaves logs and figures, GPU_STEPS="test engines" what it runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt
DEMO_OUT ?= demo-run

# By default OpenMP's threads spin while they wait. On cores shared with other programs spinning turns
# minutes into hours; elsewhere it saves next to nothing.
export OMP_WAIT_POLICY ?= passive

# Many short processes import the package's modules, so their bytecode is kept.
unexport PYTHONDONTWRITEBYTECODE

# Tests run side by side, neighbours together, and a worker without tests takes some from the others.
# The models are so small that one thread a worker is fastest. Some tests wait for processes that they
# start, so there is one worker more than there are cores. A test that hangs is named after ten minutes.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n + 1 : 8)))
SIDE_BY_SIDE = -n $(JOBS) --dist worksteal --timeout 600

# The suite once more on an installation without kernels; it borrows every other package from $(VENV).
VENV_NONE := .venv-none

# The C++ kernels under AddressSanitizer and UBSan, beside the kernels that $(VENV) serves. Both
# sanitizers are g++'s, and must be loaded before Python. Leaks are not checked, as Python itself never
# frees some of its memory.
SANITIZED := build/sanitize
SANITIZE := GEFFECT_FAST_BUILD=sanitize CXX=g++
WITH_SANITIZERS = $(SANITIZE) PYTHONPATH="$(CURDIR)/$(SANITIZED)/lib" OMP_NUM_THREADS=2 \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)"

NATIVE := $(shell find csrc -type f)
PYTHON_FILES := $(shell find geffect_fast -name '*.py' -o -name '*.jinja')
CPP_FILES := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE) $(shell find tests/cuda_shim -type f))

# The requirements of an extra on this Python, from the installed metadata, not an old one in this
# folder (-I).
extra = $$($(BIN)/python -I -c 'from importlib.metadata import requires; \
	from packaging.requirements import Requirement; \
	print(*(str(r).split(";")[0] for r in map(Requirement, requires("geffect-fast")) \
		if r.marker and r.marker.evaluate({"extra": "$(1)"}) and not r.marker.evaluate({"extra": ""})))')

.DELETE_ON_ERROR:
.PHONY: help install demo readme docs dist matrix test test-all test-nobuild lint format cuda-check sanitize bench gpu gpu-build gpu-test gpu-bench gpu-engines clean

help:
	@echo "make demo          install into $(VENV), build the kernels, run the demo into $(DEMO_OUT)"
	@echo "make readme        compare outputs in README and the docs with what their commands print"
	@echo "make docs          the docs as a site, into build/docs; dead links fail"
	@echo "make test          install and run the tests, without those that take long"
	@echo "make test-all      all of them"
	@echo "make test-nobuild  tests of what calls the kernels, on an installation without them"
	@echo "make lint          ruff, clang-format, mypy"
	@echo "make format        let ruff and clang-format rewrite the files"
	@echo "make cuda-check    compile the CUDA kernels for every GPU target; needs nvcc, no GPU"
	@echo "make sanitize      the C++ kernels' tests under AddressSanitizer and UBSan; needs g++"
	@echo "make bench         benchmarks, into benchmarks/results"
	@echo "make gpu           build, test and time everything on the GPU that is here, in six minutes"
	@echo "make gpu-test      build the CUDA kernels for the GPU that is here and test them"
	@echo "make gpu-bench     the same, and time them"
	@echo "make gpu-engines   the same, and time whole profiles"
	@echo "make dist          sdist and wheel into dist/, each tried in a fresh environment; minutes"
	@echo "make matrix        try that wheel with MATRIX='--python python3.12 --torch 2.14.0'"
	@echo "make clean         remove $(VENV), builds and caches"

install: $(VENV)/installed

# Distributions without ensurepip still have venv itself, and a pip that can install into it.
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

# Installations run one after the other, even where make runs targets side by side. CUTLASS may be
# installed already without the packages that its Python side needs, of which pip would complain.
$(VENV)/tools-%: $(VENV)/installed
	@echo "installing what '$*' needs"
	@flock $(VENV) $(PIP) --no-warn-conflicts $(call extra,$*)
	@touch $@

# Only the headers are installed: the package's dependencies serve its Python side.
$(VENV)/tools-cuda: $(VENV)/installed
	@echo "installing the CUTLASS headers"
	@flock $(VENV) $(PIP) --no-deps $(call extra,cuda)
	@touch $@

demo: $(VENV)/tools-evaluate
	$(BIN)/geffect-fast demo --out $(DEMO_OUT) --overwrite

# Checks that the shown outputs are those of the commands above them; without --check the script
# puts them in place.
readme: $(VENV)/installed
	$(BIN)/python tools/readme_outputs.py --check

# mkdocs.yml is strict: a broken link or anchor fails, and so does a page that is in no menu.
docs: $(VENV)/tools-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --site-dir build/docs

# All tests but the slow ones: whole demos, examples and benchmarks, runs that are killed over and over,
# all architectures in every way, CUDA kernels thread by thread.
test: $(VENV)/tools-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "not slow"

test-all: $(VENV)/tools-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(SIDE_BY_SIDE)

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

# The tests of code that calls the ops, and each command once; other code does not depend on the
# provider of the ops. The values of the reference are tested beside those of the kernels. The
# architectures that differ most are enough.
WITHOUT_KERNELS = tests/ops/test_op_backend.py tests/ops/test_op_contract.py tests/capture \
	tests/engines/test_directions.py tests/engines/test_forward_sums.py tests/measure/test_check.py \
	tests/measure/test_check_deviations.py tests/measure/test_resolve.py tests/test_cli.py \
	tests/test_functional.py

# pytest's own script: `python -m pytest` would put this folder's package before the installed one.
test-nobuild: $(VENV_NONE)/installed
	GEFFECT_FAST_BUILD=none OMP_NUM_THREADS=1 \
		$(VENV_NONE)/bin/python $(BIN)/pytest -q $(SIDE_BY_SIDE) $(WITHOUT_KERNELS) \
		-k "not every_architecture or of_five"

lint: $(VENV)/tools-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/mypy

format: $(VENV)/tools-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

cuda-check: $(VENV)/tools-cuda
	$(BIN)/python tools/cuda_check.py --jobs $(JOBS)

$(SANITIZED)/built: $(VENV)/tools-test setup.py $(NATIVE) $(PYTHON_FILES)
	@echo "building geffect_fast with sanitizers into $(@D)"
	@rm -rf $(@D)/lib && mkdir -p $(@D)
	@$(SANITIZE) $(BIN)/python setup.py --quiet egg_info --egg-base $(@D) \
		build --build-base $(@D) --build-lib $(@D)/lib >$(@D)/log 2>&1 || { cat $(@D)/log; exit 1; }
	@touch $@

# Sanitizers report to file descriptor 2, which pytest must not capture. Whole architectures are left
# out: they call kernels in no other way than the samples of the ops. The values are tested once more
# with the instructions of an old processor.
UNDER_SANITIZERS = $(BIN)/pytest -q $(SIDE_BY_SIDE) --capture=sys \
	-k "not shim and not reference and not every_architecture"
sanitize: $(SANITIZED)/built
	@$(WITH_SANITIZERS) $(BIN)/geffect-fast env
	@$(WITH_SANITIZERS) $(BIN)/python tools/sanitizer_check.py
	@$(WITH_SANITIZERS) $(UNDER_SANITIZERS) tests/ops/test_op_values.py \
		tests/ops/test_op_contract.py tests/ops/test_norm_parts.py tests/test_functional.py
	@$(WITH_SANITIZERS) ATEN_CPU_CAPABILITY=default $(UNDER_SANITIZERS) tests/ops/test_op_values.py \
		tests/ops/test_norm_parts.py

dist: $(VENV)/tools-dist
	$(BIN)/python tools/dist.py

matrix: $(VENV)/installed
	$(BIN)/python tools/matrix.py $(MATRIX)

bench: $(VENV)/tools-test
	for script in $(filter-out %/bench_gpu.py %/bench_gpu_engines.py,$(wildcard benchmarks/bench_*.py)); do $(BIN)/python "$$script" || exit 1; done

# The TORCH_CUDA_ARCH_LIST for the GPUs of this machine.
GPUS_HERE = import torch; n = torch.cuda.device_count(); \
	found = sorted({torch.cuda.get_device_capability(i) for i in range(n)}); \
	print(*("%d.%d%s" % (*c, "a" if c == (9, 0) else "") for c in found), sep=";")

gpu-build:
	@targets="$${TORCH_CUDA_ARCH_LIST:-$$($(PYTHON) -c '$(GPUS_HERE)')}"; \
	test -n "$$targets" || \
		{ echo "error: $(PYTHON) sees no GPU; set TORCH_CUDA_ARCH_LIST to build for one" >&2; exit 1; }; \
	echo "building the CUDA kernels for $$targets"; \
	GEFFECT_FAST_BUILD=cuda TORCH_CUDA_ARCH_LIST="$$targets" \
		$(PYTHON) setup.py --quiet build_ext --inplace

gpu-test: gpu-build
	$(PYTHON) -m pytest -q tests/gpu

gpu-bench: gpu-build
	$(PYTHON) benchmarks/bench_gpu.py

gpu-engines: gpu-build
	$(PYTHON) benchmarks/bench_gpu_engines.py

# All steps in one command, the most important first. Every step has seconds of its own and a log, and
# a step that fails keeps none of the others from running. Figures of benchmarks that had less than
# their full time go to $(GPU_OUT), not to benchmarks/results.
GPU_OUT ?= build/gpu
GPU_STEPS ?= build test engines bench
GPU_SECONDS_build ?= 120
GPU_SECONDS_test ?= 80
GPU_SECONDS_engines ?= 100
GPU_SECONDS_bench ?= 60
GPU_RUN_build = $(MAKE) --no-print-directory gpu-build
GPU_RUN_test = $(PYTHON) -m pytest -q tests/gpu
GPU_RUN_engines = $(PYTHON) benchmarks/bench_gpu_engines.py --out "$(GPU_OUT)" \
	--budget $$(($(GPU_SECONDS_engines) - 15))
GPU_RUN_bench = $(PYTHON) benchmarks/bench_gpu.py --out "$(GPU_OUT)" \
	--budget $$(($(GPU_SECONDS_bench) - 15))

define gpu_step
	echo "gpu-$(1): $(GPU_OUT)/$(1).log"; begun=$$(date +%s); \
	timeout -k 10 $(GPU_SECONDS_$(1)) $(GPU_RUN_$(1)) >"$(GPU_OUT)/$(1).log" 2>&1; code=$$?; \
	took="$$(($$(date +%s) - begun)) s"; said=$$(tail -n 1 "$(GPU_OUT)/$(1).log"); \
	case $$code in \
		0) summary="$$summary\ngpu-$(1): passed in $$took: $$said";; \
		124|137) summary="$$summary\ngpu-$(1): FAILED, over its $(GPU_SECONDS_$(1)) s"; failed=1;; \
		*) summary="$$summary\ngpu-$(1): FAILED ($$code) in $$took: $$said"; failed=1;; \
	esac; \
	tail -n $(GPU_SHOWN) "$(GPU_OUT)/$(1).log";
endef

# The number of lines of a log that are shown when its step ends.
GPU_SHOWN ?= 60

gpu:
	@mkdir -p "$(GPU_OUT)"; failed=0; summary=; \
	$(foreach step,$(GPU_STEPS),$(call gpu_step,$(step))) \
	printf "\n%b\n" "$$summary"; exit $$failed

clean:
	rm -rf $(VENV) $(VENV_NONE) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	rm -f geffect_fast/*.so
