# SPDX-License-Identifier: Apache-2.0
# Everything a person would type. The virtual environment is made on first use; PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := $(wildcard csrc/*/* csrc/*.cpp) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test bench lint format docs pictures wheel cuda-check gpu-check sanitize clean
.DEFAULT_GOAL := demo

$(VENV)/.deps: pyproject.toml
	@echo "Installing PyTorch and the tools into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/python tools/install_dev.py
	touch $@

$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	@echo "Building the kernels: about a minute for the CPU, three more with CUDA"
	$(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# A ViT dense and with fewer tokens on a real photograph; IMAGE=path for your own, ARGS="--help" for more.
demo: $(VENV)/.built
	$(BIN)/tokenprune demo $(if $(IMAGE),--image $(IMAGE)) $(ARGS)

test: $(VENV)/.built
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.deps
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*' 'tests/csrc/*')

format: $(VENV)/.deps
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*' 'tests/csrc/*')

docs: $(VENV)/.built
	$(BIN)/pip install --quiet "mkdocs>=1.6,<2" "mkdocs-material>=9.5,<10"
	$(BIN)/mkdocs build --strict

# The pictures of docs/methods; ARGS="--checkpoint deit_small_patch16_224-cd65a155.pth" for real weights.
pictures: $(VENV)/.built
	$(BIN)/python tools/render_pictures.py $(ARGS)

wheel: $(VENV)/.deps
	TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0;8.6;8.9;9.0a;10.0a;12.0+PTX}" $(BIN)/pip wheel --no-build-isolation --no-deps -w dist .

# Compile the CUDA kernels for every architecture; registers, spills and the instructions that carry them.
cuda-check: $(VENV)/.deps
	$(BIN)/python tools/cuda_check.py $(ARGS)

# For anybody with a GPU: build, suite on cuda, compute-sanitizer, benchmarks; logs and JSON to OUT.
gpu-check:
	bash tools/gpu_check.sh $(OUT)

# CUDA kernels on the host model and CPU kernels, under AddressSanitizer, UBSan and ThreadSanitizer.
sanitize: $(VENV)/.deps
	bash tools/sanitize.sh
	bash tools/sanitize_cpu.sh

clean:
	rm -rf build dist out site python/tokenprune_ext/*.so python/tokenprune_ext/_build_info.json $(VENV)/.built
