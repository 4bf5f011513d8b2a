# One command for each habit; CONTRIBUTING.md says when to use which.
# Another environment than .venv: make test VENV=/path/to/venv

VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

CXX_FILES := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h')
ASAN_SITE := $(abspath build/asan/site)
# What reaches every kernel and every place of the bindings, on every instruction set.
ASAN_TESTS := $(addprefix tests/test_,$(addsuffix .py,rules errors intervals varlen kvcache few_queries \
	layer_kernels nan_contract halves sizes threads into determinism empty extremes))

.PHONY: setup rebuild test test-isa format lint typecheck check bench neighbour \
	test-cpp test-asan test-tsan test-clang test-neon tidy clean

setup: ## the environment, the build tools and an editable install that rebuilds on import
	test -x $(BIN)/python || python3 -m venv $(VENV)
	pip install "scikit-build-core>=0.11" "pybind11>=3" "cmake>=3.24" "ninja>=1.11"
	pip install --no-build-isolation -e ".[dev]" -Cbuild-dir=build/editable \
		-Ceditable.rebuild=true -Ceditable.verbose=false -Cinstall.strip=false

rebuild: ## compile what changed now (an import would do the same)
	cmake --build build/editable
	cmake --install build/editable --prefix build/editable/install/platlib

test: ## the whole suite
	pytest

test-isa: ## one instruction set: make test-isa ISA=avx2
	FUSEDATTN_ISA=$(ISA) pytest

format: ## rewrite Python and C++ in the house style
	ruff format .
	ruff check --fix .
	clang-format -i $(CXX_FILES)

lint: ## the same, only looking
	ruff check .
	ruff format --check .
	clang-format --dry-run --Werror $(CXX_FILES)

typecheck: ## types of the package, the tests and the stub of the extension
	mypy
	python -m mypy.stubtest fusedattn._core

check: lint typecheck test ## what continuous integration asks first

bench: ## the table of docs/benchmarks.md
	fusedattn bench

neighbour: ## attention and np.matmul sharing the cores
	fusedattn bench --neighbour

test-cpp: ## the kernel tables without Python
	cmake --preset debug -DFUSEDATTN_PYTHON=OFF
	cmake --build --preset debug
	ctest --preset debug

test-asan: ## the core's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	pip install --no-deps --upgrade --target $(ASAN_SITE) . -Ccmake.args=--preset=asan \
		-Ccmake.build-type=RelWithDebInfo -Cinstall.strip=false -Cbuild-dir=build/asan/cmake
	PYTHONPATH=$(ASAN_SITE) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libstdc++.so)" \
		python -m pytest -q -s -p no:cacheprovider $(ASAN_TESTS)

test-tsan: ## the pool, the turns of backward and the layers under ThreadSanitizer
	cmake --preset tsan
	cmake --build --preset tsan
	ctest --preset tsan

test-clang: ## the kernel and its tests with clang, warnings as errors
	cmake --preset clang
	cmake --build --preset clang
	ctest --preset clang

test-neon: ## the kernel tables on 64-bit Arm, emulated
	cmake --preset aarch64
	cmake --build --preset aarch64
	ctest --preset aarch64

tidy: ## clang-tidy over the C++ sources
	cmake --preset clang-tidy
	cmake --build --preset clang-tidy --clean-first

clean:
	rm -rf build
