# make setup   the environment (.venv with pinned packages) and the build; the commands below begin with it
# make test    format, lint and type checks, then every test; what is drawn is the same every time
# make triton-versions  compiles every Triton kernel for every architecture by every supported version of Triton
# make quick   the sharpest tests alone, without lint: under 90 seconds on two cores
# make explore the tests that draw their inputs, with new draws and many examples (VELM_TEST_EXAMPLES)
# make demo    trains models on pictures and questions, unpatched and patched, measures whole models, draws it all in one
#              picture: six minutes, set-up included (SHORT=1: only whether numbers agree)
# make results trains the models of python_models with these kernels and in plain PyTorch
# make docs    the documentation as pages, in build/docs; warnings are errors
# make bench   the benchmarks
# make gpu     the first minutes on a GPU, without pip or network: build, check, benchmark (DEVICE=cpu rehearses it)
# make lib     the operator libraries alone, for the interpreter named by PYTHON

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Elsewhere than on a machine without a GPU, name the build of torch that fits it.
TORCH ?= torch==2.13.0
MAX_JOBS ?= $(shell nproc)
# The architectures that the CUDA library is built for here, where there is nvcc: those of the GPUs that are here, one
# where there is none, so that tests do not wait for the others; pip install . builds all.
GPU_ARCHS := $(shell tools/gpu_architectures.sh)
export VELM_CUDA_ARCHS ?= $(or $(GPU_ARCHS),80)
BUILD ?= build
PYTEST_ARGS ?=
DEMO_ARGS ?=
RESULTS_ARGS ?=
BENCH_ARGS ?=
TRITON_ARGS ?=

# Named every time, because what was configured last stays in force.
TESTING := ON
ISAS :=
CUDA := $(VELM_BUILD_CUDA)
# Without a GPU the tests want to know of the CUDA library that it compiles, links and asks for the right symbols; the
# instances left out are compiled by tests/cuda when they change.
SMALL = $(if $(GPU_ARCHS),OFF,$(TESTING))
CONFIGURE = -DVELM_TESTING=$(TESTING) -DVELM_CPU_ISAS=$(ISAS) -DVELM_BUILD_CUDA=$(CUDA) -DVELM_CUDA_SMALL=$(SMALL) \
  $(CMAKE_ARGS)

VENV := .venv
RUN := $(VENV)/bin/python
# The environment that models need, and the whole one.
MODELS := $(VENV)/.installed-models
STAMP := $(VENV)/.installed
# Python compiles what is imported; pip would compile all of it.
INSTALL := $(RUN) -m pip install --disable-pip-version-check --quiet --no-compile
DOCS = $(RUN) -m sphinx --quiet --fail-on-warning --keep-going docs build/docs
CXX_FILES = $(shell git ls-files --cached --others --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' \
  'tests/*.cpp' 'tests/*.h')

.PHONY: setup setup-models test quick explore triton-versions lint docs format demo results bench gpu lib clean

$(MODELS): requirements-models.txt pyproject.toml setup.py
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(TORCH)
	$(INSTALL) --no-deps -r requirements-models.txt
	CMAKE_ARGS="$(CONFIGURE)" PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
	  $(INSTALL) --no-build-isolation --no-deps --editable .
	touch $@

$(STAMP): $(MODELS) requirements-dev.txt
	$(INSTALL) --no-deps -r requirements-dev.txt
	touch $@

# The libraries are brought up to date every time; only what changed is compiled.
LIBRARIES = CMAKE_ARGS="$(CONFIGURE)" PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) setup.py --quiet build_ext --inplace

setup: $(STAMP)
	$(LIBRARIES)

setup-models: $(MODELS)
	$(LIBRARIES)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(DOCS)

# Pages from docs/ and the docstrings: a few seconds, without a network.
docs: setup
	$(DOCS)

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# One torch thread for each of the parallel test processes: more would only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(shell nproc) --dist worksteal $(PYTEST_ARGS)

# Hours of one core the first time; TRITON_ARGS="--versions 3.6 --arch 80 --kernel forward" compiles some of it.
triton-versions: setup
	$(RUN) -m tests.triton.versions --jobs $(MAX_JOBS) $(TRITON_ARGS)

# Numbers and special values of every operator, on the reference and the best library of this processor.
quick: setup
	OMP_NUM_THREADS=1 VELM_TEST_EXAMPLES=3 VELM_CPU_ISA=$$($(RUN) -c "from velm_kernels.backends import cpu; print(cpu.usable()[-1])") \
	  $(RUN) -m pytest -n $(shell nproc) --dist worksteal -m quick -k "not device_on_host" $(PYTEST_ARGS)

explore: setup
	OMP_NUM_THREADS=1 VELM_TEST_EXPLORE=1 $(RUN) -m pytest -n $(shell nproc) --dist worksteal -m "not slow" \
	  $(PYTEST_ARGS)

# The library of this processor alone: the demo runs on it, and a newcomer should not wait for others to be compiled.
demo: ISAS := native
demo: CUDA := 0
demo: TESTING := OFF
demo: setup-models
	$(RUN) -m python_models.demo $(if $(SHORT),--short) $(DEMO_ARGS)

# Trains every fusion and pooling of the visual question answering model, twice.
results: ISAS := native
results: CUDA := 0
results: TESTING := OFF
results: setup-models
	$(RUN) -m python_models vqa results $(RESULTS_ARGS)

bench: setup
	$(RUN) -m benchmarks $(BENCH_ARGS)

# Needs no environment of its own: a bare image with torch will do.
gpu:
	@tools/first_gpu_run.sh

lib:
	cmake -S . -B $(BUILD) -G Ninja -DPython_EXECUTABLE=$(shell $(PYTHON) -c "import sys; print(sys.executable)") \
	  -DVELM_TESTING=ON $(CMAKE_ARGS)
	cmake --build $(BUILD) --parallel $(MAX_JOBS)

clean:
	rm -rf build dist *.egg-info velm_kernels/_lib velm_kernels/_facts.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
