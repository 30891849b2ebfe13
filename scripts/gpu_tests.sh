#!/usr/bin/env bash
# Runs the tests that need a CUDA GPU. Extra arguments go to pytest, e.g. -k exllamav2.
# With the exllamav2 package installed, its extension is compiled at the first import (2-3 minutes on 16 cores).
set -euo pipefail
cd "$(dirname "$0")/.."
export EXLLAMA_NO_SDPA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}" MAX_JOBS="${MAX_JOBS:-$(nproc)}"
export ORACLE_SCALE="${ORACLE_SCALE:-4}"  # widths of the random models: the smallest are too narrow for its kernels
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec python3 -m pytest tests -m gpu -rs -s "$@"
