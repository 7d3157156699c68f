# make demo    distil students on real images by several methods, print the tables, draw the plots
# make test    lint, types, all tests
# make bench   benchmarks with their correctness gate
# make fuzz    every public function on ten thousand inputs against the definitions
# make sanitize  the same with kernels that look for misused memory and undefined behaviour
# make counts  instructions, barriers and registers of the GPU kernels, without a GPU: a quarter of an hour
# make docs    the documentation, into build/site
# make wheels  sdist and wheel, tried in fresh environments without a compiler, for each of WHEELS_TORCH
# make gpu     on a machine with a GPU: build, tests, benchmarks, sanitizers, into RESULTS; again: the rest
#
# Each does its whole set-up first: a virtual environment in .venv, the pinned dependencies of
# constraints.txt, the C++ build. `make test PYTHON=python3 NO_VENV=1` uses the interpreter at hand
# and installs nothing; it builds the extension in place if it can.

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
BENCH_ARGS ?=
FUZZ_EXAMPLES ?= 1000
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
PYTEST_ARGS ?=
RESULTS ?= build/gpu
GPU_ARGS ?=
WHEELS_TORCH ?= 2.10 2.13

ifeq ($(NO_VENV),1)
RUN := $(PYTHON)
READY := build/in-place
SIDE_BY_SIDE :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/ready
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
endif

SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)
CPP := $(wildcard $(addprefix csrc/,*.h *.cpp cpu/*.h cpu/*.cpp cuda/*.h cuda/*.cpp cuda/*.cuh cuda/*.cu)) \
	$(wildcard tests/*.cpp tests/cuda_shim/*.h tests/cuda_shim/*.cpp)
INSTALL := $(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: all demo test lint types fuzz sanitize bench counts docs wheels gpu info format clean
all: test

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: the extension compiles against it, and an unpinned resolve could bring another.
$(VENV)/torch: $(VENV)/bin/python constraints.txt
	$(INSTALL) torch
	$(INSTALL) numpy setuptools wheel ninja
	@touch $@

$(VENV)/ready: $(VENV)/torch $(SOURCES)
	$(INSTALL) --no-build-isolation -e ".[test,lint,benchmark,distill,docs]"
	@touch $@

build/in-place: $(SOURCES)
	$(RUN) setup.py -q build_ext --inplace || echo "no extension: the PyTorch backend serves"
	@mkdir -p build && touch $@

demo: $(READY)
	$(RUN) -m pc_kernels.distill compare --config digits $(DEMO_ARGS)

test: lint types $(READY)
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS)

ifeq ($(NO_VENV),1)
lint types:
else
lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP)

types: $(READY)
	$(RUN) -m mypy
endif

# So many examples of each.
fuzz: $(READY)
	FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(RUN) -m pytest tests/test_fuzz*.py $(PYTEST_ARGS)

# In a folder of its own, since Python looks for packages where it is started. The interpreter itself is
# not sanitized: the library comes first, and leaks are not looked for.
sanitize: $(READY)
	CFLAGS="-g1 $(SANITIZERS)" LDFLAGS="$(SANITIZERS)" $(RUN) setup.py -q build \
		--build-lib build/sanitized --build-temp build/sanitized-objects
	cd build/sanitized && ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$(foreach l,libasan libstdc++,$$($(CXX) -print-file-name=$l.so))" \
		FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(if $(NO_VENV),$(PYTHON),$(abspath $(RUN))) -m pytest \
		$(CURDIR)/tests/test_fuzz*.py $(PYTEST_ARGS)

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: $(READY)
	$(RUN) benchmarks/run.py $(BENCH_ARGS)

docs: $(READY)
	$(RUN) -m mkdocs build --strict

wheels: $(READY)
ifneq ($(NO_VENV),1)
	$(INSTALL) ".[wheels]"
endif
	$(RUN) tests/wheels.py --torch $(WHEELS_TORCH)

# Builds the extensions itself, for the GPU at hand.
ifeq ($(NO_VENV),1)
gpu:
else
gpu: $(READY)
endif
	$(RUN) tests/gpu/run.py --results $(RESULTS) $(GPU_ARGS)

# Instructions and barriers of the GPU kernels, from their machine code: the tables of docs/gpu.md.
counts: $(READY)
	$(RUN) tests/kernel_counts.py
	$(RUN) tests/cuda_counts.py

info: $(READY)
	$(RUN) -m pc_kernels.info

clean:
	rm -rf $(VENV) build *.egg-info pc_kernels/_C*.so pc_kernels/_build.json
