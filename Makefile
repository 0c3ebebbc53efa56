# make lib builds the operator libraries into the source tree (velm_kernels/_lib) for the interpreter named by PYTHON.
PYTHON ?= python3
BUILD ?= build
MAX_JOBS ?= $(shell nproc)

.PHONY: lib
lib:
	cmake -S . -B $(BUILD) -G Ninja -DPython_EXECUTABLE=$(shell $(PYTHON) -c "import sys; print(sys.executable)") \
	  -DVELM_TESTING=ON $(CMAKE_ARGS)
	cmake --build $(BUILD) --parallel $(MAX_JOBS)
