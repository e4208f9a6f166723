# SPDX-License-Identifier: Apache-2.0
# make demo | make test | make bench | make gpu-check | make lint | make sanitize | make check-package | make clean. TORCH="torch==2.13.0" picks another torch.

PYTHON ?= python3
TORCH ?= torch>=2.10
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
BUILD_TOOLS := "setuptools>=77" "cmake>=3.18" ninja "pybind11>=2.13" numpy

.PHONY: demo test bench bench-quick gpu-check lint sanitize check-package check-abi clean

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install $(BUILD_TOOLS) "$(TORCH)"
	@touch $@

# Editable: the native libraries are built into dien_ops/, and Python changes need no new build.
$(VENV)/dien_ops: $(VENV)/torch $(SOURCES)
	$(PIP) install --no-build-isolation --editable ".[demo,test]"
	@touch $@

demo: $(VENV)/dien_ops  ## train DIEN, DIN and the base model on MovieLens-100K; tables and pictures under out/
	$(BIN)/python -m examples.demo $(DEMO)

test: $(VENV)/dien_ops  ## all tests, and the package's own check of this machine
	$(BIN)/python -m pytest $(PYTEST)
	$(BIN)/python -m dien_ops.selftest

# The rivals are in the extra `bench`; the native libraries are built already.
$(VENV)/bench: $(VENV)/dien_ops
	$(PIP) install --quiet --no-build-isolation --editable ".[bench]"
	@touch $@

BENCH_RUN := $(BIN)/python -m pytest -vv --benchmark-quiet $(BENCH)
BENCHMARKS := $(filter-out %_cuda.py,$(wildcard bench/bench_*.py))

# A run of some rows (BENCH) is nobody's result: what is committed stays as it is.
RESULTS := $(if $(BENCH),out/bench,bench/results)
README := $(if $(BENCH),,--readme README.md)

# The table comes even where a row failed (pytest's status 1, handed on). Nothing else should run meanwhile.
bench: $(VENV)/bench  ## times of the operators beside their rivals: bench/results/, README.md, pictures under out/bench
	mkdir -p $(RESULTS)
	results=$(RESULTS)/$$($(BIN)/python -m bench.machine).json; \
	  $(BENCH_RUN) --benchmark-json $$results $(BENCHMARKS); status=$$?; \
	  [ $$status -le 1 ] && $(BIN)/python -m bench.report $$results $(README) && exit $$status

bench-quick: $(VENV)/bench  ## the same with few rounds and small rows, in under a minute; writes under out/bench only
	mkdir -p out/bench
	$(BENCH_RUN) --quick --benchmark-json out/bench/quick.json $(BENCHMARKS); status=$$?; \
	  [ $$status -le 1 ] && $(BIN)/python -m bench.report out/bench/quick.json && exit $$status

# With what PYTHON has, and no environment of its own: machines with a GPU often have torch and no network.
gpu-check:  ## build, tests, compute-sanitizer and benchmarks on the GPU, in under 8 minutes; STAGES="build tests" for some
	$(PYTHON) -m bench.gpu_check $(STAGES)

$(VENV)/lint: $(VENV)/torch pyproject.toml
	$(PIP) install --quiet --group lint
	@touch $@

lint: $(VENV)/lint  ## what CI and pre-commit check: ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h')

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer; what only exercises torch's compiler is left out.
sanitize: $(VENV)/dien_ops  ## the tests of all kernels on a sanitized build
	DIEN_OPS_SANITIZE=1 $(PIP) install --quiet --no-build-isolation --no-deps --upgrade --target build/sanitized .
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=build/sanitized $(BIN)/pytest -p no:cacheprovider \
	  --ignore python_tests/test_bench.py --ignore python_tests/test_gpu_check.py --ignore python_tests/test_examples.py --ignore python_tests/test_package.py \
	  -k "not opcheck and not compile and not export and not inductor" $(PYTEST)

check-package: $(VENV)/torch  ## sdist and wheel, built in isolation, installed and run in a fresh environment
	PYTHON=$(BIN)/python TORCH="$(TORCH)" bash .ci/check_package.sh

check-abi: $(VENV)/torch  ## a wheel built with one torch runs in another: make check-abi TORCH="torch==2.13.0" OTHER_TORCH="torch==2.14.0"
	PYTHON=$(BIN)/python TORCH="$(TORCH)" OTHER_TORCH="$(OTHER_TORCH)" bash .ci/check_package.sh

clean:
	rm -rf $(VENV) build dist out *.egg-info dien_ops/*.so
