# SPDX-License-Identifier: Apache-2.0
# make demo | make test | make bench | make lint | make sanitize | make test-cuda-host | make cuda-report | make gpu-check |
# make check-package | make clean. TORCH="torch==2.13.0" picks another torch; DIEN_OPS_CUDA=off builds without CUDA where there is nvcc.

PYTHON ?= python3
TORCH ?= torch>=2.10
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CODE := $(shell find csrc cmake -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/*) $(CODE)
BUILD_TOOLS := "setuptools>=77" "cmake>=3.18" ninja "pybind11>=2.13" numpy

.PHONY: demo test test-cuda-host cuda-report gpu-check bench bench-quick lint sanitize check-package check-abi clean FORCE

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	$(PIP) install $(BUILD_TOOLS) "$(TORCH)"
	@touch $@

# What setup.py takes from the environment: a change of it is a new build.
SETTINGS := DIEN_OPS_CUDA=$(DIEN_OPS_CUDA) TORCH_CUDA_ARCH_LIST=$(TORCH_CUDA_ARCH_LIST)
$(VENV)/settings: $(VENV)/torch FORCE
	@echo "$(SETTINGS)" | cmp --silent - $@ || echo "$(SETTINGS)" > $@

# Editable: the native libraries are built into dien_ops/, and Python changes need no new build.
$(VENV)/dien_ops: $(VENV)/torch $(VENV)/settings $(SOURCES)
	$(PIP) install --no-build-isolation --editable ".[demo,test]"
	@touch $@

demo: $(VENV)/dien_ops  ## train DIEN, DIN and the base model on MovieLens-100K; tables and pictures under out/
	$(BIN)/python -m examples.demo $(DEMO)

test: $(VENV)/dien_ops  ## all tests, and the package's own check of this machine
	$(BIN)/python -m pytest $(PYTEST)
	$(BIN)/python -m dien_ops.selftest
	$(MAKE) test-cuda-host

# The CUDA kernels as C++, in a build tree of their own. The argument: with sanitizers, ON or OFF.
HOST_EXECUTOR_TESTS := $(foreach name,host_executor cuda_primitives gru* attention* activation_unit* dice* aux_loss embedding* optim*,$(wildcard python_tests/test_$(name).py))
host_executor = build/host-executor-sanitize-$(1)/libdien_ops_cuda_host.so
define build_host_executor
	$(BIN)/cmake -S . -B $(dir $(host_executor)) -G Ninja --log-level=NOTICE -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DDIEN_OPS_CUDA=off -DDIEN_OPS_SANITIZE=$(1)
	$(BIN)/cmake --build $(dir $(host_executor)) --target dien_ops_cuda_host $(if $(MAX_JOBS),--parallel $(MAX_JOBS))
endef

test-cuda-host: $(VENV)/dien_ops  ## the CUDA kernels' tests without a GPU: the same .cu files, run on the CPU
	$(call build_host_executor,OFF)
	$(BIN)/python -m pytest --host-executor $(call host_executor,OFF) $(HOST_EXECUTOR_TESTS) $(PYTEST)

cuda-report: $(VENV)/dien_ops  ## registers, stack and spills of the CUDA kernels; fails where one spills
	DIEN_OPS_TARGETS="all dien_ops_cuda_test" $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python .ci/cuda_report.py

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

bench-quick: $(VENV)/bench  ## the same with few rounds and small rows, in two to three minutes; writes under out/bench only
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
	$(BIN)/clang-format --dry-run --Werror $(CODE)

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer; what only exercises torch's compiler is left out.
SANITIZED := LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
  PYTHONPATH=build/sanitized $(BIN)/pytest -p no:cacheprovider
WITHOUT_COMPILER := not opcheck and not compile and not export and not inductor
# Of the CUDA kernels' tests not those that repeat one path many times, nor those of what is above the kernels.
SANITIZED_HOST_TESTS := $(filter-out %_drop_in.py %gru_module.py %embedding_module.py %_transforms.py %_weights.py,$(HOST_EXECUTOR_TESTS))
ONCE := not errs_at_most and not gradcheck and not order_of_threads

sanitize: $(VENV)/dien_ops  ## the tests of all kernels on a sanitized build, those of the CUDA kernels too
	DIEN_OPS_SANITIZE=1 DIEN_OPS_CUDA=off \
	  $(PIP) install --quiet --no-build-isolation --no-deps --upgrade --target build/sanitized .
	$(SANITIZED) -k "$(WITHOUT_COMPILER)" $(PYTEST) $(foreach name,bench bench_rivals gpu_check examples package,--ignore python_tests/test_$(name).py)
	$(call build_host_executor,ON)
	$(SANITIZED) -k "$(WITHOUT_COMPILER) and $(ONCE)" --host-executor $(call host_executor,ON) $(SANITIZED_HOST_TESTS) $(PYTEST)

check-package: $(VENV)/torch  ## sdist and wheel, built in isolation, installed and run in a fresh environment
	PYTHON=$(BIN)/python TORCH="$(TORCH)" bash .ci/check_package.sh

check-abi: $(VENV)/torch  ## a wheel built with one torch runs in another: make check-abi TORCH="torch==2.13.0" OTHER_TORCH="torch==2.14.0"
	PYTHON=$(BIN)/python TORCH="$(TORCH)" OTHER_TORCH="$(OTHER_TORCH)" bash .ci/check_package.sh

clean:
	rm -rf $(VENV) build dist out *.egg-info dien_ops/*.so
