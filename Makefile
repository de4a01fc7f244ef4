# `make demo` and `make test` work as the first command after a checkout: they make .venv, install
# the dependencies, compile the kernels and run. Needs Python >= 3.11 with venv, g++ and make.
PYTHON      ?= python3
CONSTRAINTS ?= constraints.txt
BIN         := .venv/bin
SOURCES     := $(shell find csrc -type f 2>/dev/null)
CXX_SOURCES := $(filter %.h %.inc %.cpp %.cu,$(SOURCES) $(wildcard benchmarks/gpu/prototype/*) $(wildcard tests/*.h tests/*.cpp))
THREADS     ?= 1
TESTS       ?= tests
WORKERS     ?= auto
# A file stays in one process (its module fixtures are built once), in the order of tests/conftest.py;
# WORKERS=0 is one process.
PYTEST      := $(BIN)/python -m pytest -q -rs -n $(WORKERS) --maxprocesses 8 --dist loadfile \
               --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help dev test test-all test-isa neon test-torch test-python demo bench bench-quick bench-all bench-ops peers trained trained-quick readme-tables gpu sanitize fuzz lint format clang-format type wheel clean clean-venv

help:
	@echo "make demo          install, build, then a pruned edge detector and masked RN50 -> demo-report/"
	@echo "make test          install, build, then every test that is not slow (TESTS=tests/test_ops.py)"
	@echo "make test-all      the slow tests too"
	@echo "make test-isa      the suite once per instruction set of this CPU (ISA=avx2 ...)"
	@echo "make neon          the kernels for 64-bit Arm under emulation (installs the tools if it may)"
	@echo "make test-torch    the suite on another torch, in build/torch-VERSION (VERSION=2.15.0)"
	@echo "make test-python   the wheel on another Python, in build/python-VERSION (PYTHON=python3.13)"
	@echo "make dev           install and build only (editable)"
	@echo "make bench         time the RN50 trunk: dense variants against accelerated (THREADS=1)"
	@echo "make bench-quick   a first look at this machine, < 3 minutes -> bench-results/"
	@echo "make bench-all     the whole suite, < 30 minutes -> benchmarks/results/MACHINE/"
	@echo "make peers         environments of the other engines, pinned (PEERS=onnxruntime ...)"
	@echo "make trained       trained networks pruned on photographs: agreement, times, freezing; hours"
	@echo "make trained-quick every step of that with a few crops and steps, minutes -> build/trained-quick"
	@echo "make readme-tables rewrite the generated tables of README.md and docs/"
	@echo "make gpu           check and time everything for a GPU, < 9 minutes; needs torch and triton only"
	@echo "make sanitize      the native code under address and undefined-behaviour sanitizers, < 6 minutes"
	@echo "make fuzz          damaged packs, arguments and files, SECONDS=600 each, SEED=1"
	@echo "make lint          ruff check, ruff format --check, clang-format --dry-run if present"
	@echo "make format        ruff and clang-format, in place"
	@echo "make type          mypy, if installed"
	@echo "make wheel         one abi3 wheel in dist/"
	@echo "make clean         build outputs; make clean-venv also removes .venv"

.venv/.deps: requirements.txt $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "$(PYTHON) is missing or older than 3.11. Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
	  "$(PYTHON) has no venv module. On Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt -c $(CONSTRAINTS)
	@touch $@

# PATH: torch's build looks for ninja there. The newest source decides; Python files are editable.
.venv/.built: .venv/.deps setup.py pyproject.toml $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

dev: .venv/.built

test: .venv/.built
	$(PYTEST) -m "not slow" $(TESTS)

test-all: .venv/.built
	$(PYTEST) tests

test-isa: .venv/.built
	$(BIN)/python tests/run_isa.py $(ISA)

NEON_PACKAGES := g++-aarch64-linux-gnu qemu-user
neon: .venv/.built
	@if command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -q && apt-get install -y -q $(NEON_PACKAGES); \
	else echo "A cross compiler and an emulator are missing. On Debian or Ubuntu:" \
	  "sudo apt-get install $(NEON_PACKAGES)" >&2; exit 1; fi
	$(BIN)/python -m pytest -q -rs -k neon tests/test_csrc.py tests/test_csrc_ops.py tests/test_csrc_planes.py \
	  tests/test_csrc_sizes.py

test-torch:
	$(PYTHON) tests/run_torch.py $(VERSION) $(filter-out tests,$(TESTS))

# The wheel is made by .venv; PYTHON is the one that it is then installed for.
test-python: wheel
	$(BIN)/python tests/run_python.py $(PYTHON) "$$(ls -t dist/*.whl | head -n 1)"

demo: .venv/.built
	$(BIN)/opentrans demo

bench: .venv/.built
	$(BIN)/opentrans bench trunk --mask global:0.90 --size 224 --threads $(THREADS)

bench-quick: .venv/.built
	mkdir -p bench-results
	$(BIN)/opentrans bench all --quick -o bench-results

bench-all: .venv/.built
	$(BIN)/opentrans bench all -o benchmarks/results

# pytest-benchmark's view of single cases; CASES is an expression for -k.
bench-ops: .venv/.built
	$(BIN)/python -m pytest -q benchmarks/bench_ops.py --benchmark-group-by=group -k "$(CASES)"

peers: .venv/.built
	$(BIN)/opentrans bench peers $(PEERS) --setup

# Downloads weights and photographs once; every cell is stored when it is done, and not run again.
STUDY := $(BIN)/python benchmarks/trained
trained: .venv/.built
	for network in hed resnet50-half; do \
	  $(STUDY)/study.py --network $$network && $(STUDY)/latency.py --network $$network \
	  && $(STUDY)/freezing.py --network $$network || exit 1; done
	$(STUDY)/alpha.py
	$(MAKE) readme-tables

QUICK := --network hed --quick --out build/trained-quick --work build/trained-quick/work
trained-quick: .venv/.built
	$(STUDY)/study.py $(QUICK)
	$(STUDY)/latency.py --rounds 2 --dense eager $(QUICK)
	$(STUDY)/freezing.py $(QUICK)

readme-tables: .venv/.built
	$(BIN)/python benchmarks/report_tables.py
	$(BIN)/python benchmarks/ovs_tables.py

# No network, no build: runs from the tree with a Python that has torch for CUDA. GPU_PYTHON=...
GPU_PYTHON ?= $(shell test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON))
gpu:
	$(GPU_PYTHON) benchmarks/gpu/run.py $(GPU_ARGS)

# g++ alone: the sanitized build goes to build/sanitize and is loaded beside the package.
sanitize: .venv/.built
	OMP_NUM_THREADS=1 $(BIN)/python tests/sanitize.py

SECONDS ?= 600
SEED    ?= 1
fuzz: .venv/.built
	$(BIN)/python tests/fuzz_ops.py --seconds $(SECONDS) --seed $(SEED)
	$(BIN)/python tests/fuzz_files.py --seconds $(SECONDS) --seed $(SEED)

lint: .venv/.deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@if command -v clang-format >/dev/null; then clang-format --dry-run --Werror $(CXX_SOURCES); \
	  else echo "clang-format is not installed: C++ formatting was not checked"; fi

format: .venv/.deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@if command -v clang-format >/dev/null; then $(MAKE) clang-format; fi

clang-format:
	clang-format -i $(CXX_SOURCES)

type: .venv/.deps
	@$(BIN)/python -m mypy --version >/dev/null 2>&1 || { echo \
	  "mypy is not installed: $(BIN)/python -m pip install mypy" >&2; exit 1; }
	$(BIN)/python -m mypy

# build/lib* would carry modules into the wheel that the source tree no longer has.
wheel: .venv/.deps
	rm -rf build/lib* build/bdist*
	PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/python -m pip wheel . --no-build-isolation --no-deps -w dist

clean:
	rm -rf build dist demo-report *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f opentrans_kernels/*.so opentrans_kernels/_build.json .venv/.built

clean-venv: clean
	rm -rf .venv
