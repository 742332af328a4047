# make lab    set up, then open JupyterLab on the first notebook
# make test   set up, then run the tests and the notebooks
# make bench  set up, then measure this machine against transformers
# make bench-offload      packed models inside hard limits, random weights in the shapes of V2-Lite and V2: 4 GB, 12 GB, and
#                         16 GiB in place of a card; takes 20 GB of disk. LLAMA=PYTHON GGUF=FILE add llama.cpp
# make bench-offload-gpu  the 236B shape in 16 GiB and V2-Lite's in 4 GiB of GPU memory
# make bench-gpu          every kernel: right on this GPU, then timed; decoding, prompts and batches of V2-Lite's shape
# make lint   ruff over everything
# Variables: PYTHON=python3.12 (3.11 to 3.13), VENV=.venv, ARGS="further arguments"

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup lab test bench shapes bench-offload bench-offload-gpu bench-gpu lint

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit( \
		f"Python {v[0]}.{v[1]} is not supported; say make PYTHON=python3.12, for example (3.11 to 3.13)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[notebooks,test]' -c constraints.txt
	@touch $@

lab: setup
	$(BIN)/workbench lab $(ARGS)

# one thread: the shapes of the tests are too small to share, and two processes spinning on two cores cost tenfold
test: export OMP_NUM_THREADS ?= 1
test: export TOKENIZERS_PARALLELISM ?= false
test: export HF_HUB_OFFLINE ?= 1
test: setup
	$(BIN)/python -m pytest -q --nbmake --nbmake-timeout=120 --nbmake-kernel=python3 tests notebooks $(ARGS)

bench: setup
	$(BIN)/workbench bench cpu $(ARGS)

SHAPES ?= runs/shapes
OFFLOAD := $(BIN)/workbench bench offload --save --checkpoint $(SHAPES)
LIKEWISE := $(if $(LLAMA),--llama $(LLAMA) --gguf $(GGUF))

shapes: setup
	$(BIN)/workbench synth v2 $(SHAPES)/v2 --shared
	$(BIN)/workbench synth v2-lite $(SHAPES)/v2-lite

bench-offload: shapes
	$(OFFLOAD)/v2-lite --ram 4GB
	$(OFFLOAD)/v2-lite --ram 12GB $(LIKEWISE)
	$(OFFLOAD)/v2 --vram 16GiB --ram 1500MB --context 8192 --cache q6 --prompt 8 --tokens 4
	$(BIN)/python -m workbench.benchmarks.table

bench-offload-gpu: shapes
	$(OFFLOAD)/v2 --dtype bfloat16 --device cuda --vram 16GiB --ram 100GiB --context 8192 --cache q6
	$(OFFLOAD)/v2-lite --dtype bfloat16 --device cuda --vram 4GiB --ram 16GiB
	$(BIN)/python -m workbench.benchmarks.table

# GPU_PYTHON: a Python that has torch with CUDA, triton and this package, where the one of VENV has not
GPU_PYTHON ?= $(BIN)/python
ON_GPU := --dtype bfloat16 --device cuda --save

bench-gpu:
	$(GPU_PYTHON) -m pytest -q tests/kernels tests/test_graph.py
	$(GPU_PYTHON) -m workbench bench kernels --save
	$(GPU_PYTHON) -m workbench bench decode --shape v2-lite $(ON_GPU)
	$(GPU_PYTHON) -m workbench bench prefill --shape v2-lite $(ON_GPU)
	$(GPU_PYTHON) -m workbench bench batch --shape v2-lite $(ON_GPU)
	$(GPU_PYTHON) -m workbench.benchmarks.table

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
