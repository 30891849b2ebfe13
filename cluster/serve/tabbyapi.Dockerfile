# TabbyAPI with ExLlamaV2 0.3.2, the last version of it, which loads EXL2 models on GPUs from Ampere on:
#
#   docker build -f cluster/serve/tabbyapi.Dockerfile -t REGISTRY/tabbyapi-exl2:0.3.2 cluster/serve
#   docker run --rm --gpus all -p 127.0.0.1:5000:5000 -v /data/out:/models:ro \
#       REGISTRY/tabbyapi-exl2:0.3.2 --model-name M-4.0bpw --max-seq-len 8192
#
# Keys for the API are made at the first start and printed; -v KEYS.yml:/app/api_tokens.yml keeps your own.
#
# What is known of the commit: its pyproject.toml, read in a stored copy of the repository, asks in the extra [cu12] for
# exllamav2 0.3.2, torch 2.8.0 and flash-attn 2.8.3, all built for CUDA 12.8, for Python 3.10 to 3.13. What is not: whether
# it is the last one that does. Not built here: that needs github.com and a GPU.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ARG TABBYAPI_COMMIT=01a5915a7bfd46d2cff6b20bade7f289024b11f6
WORKDIR /app
RUN git init -q . \
    && git fetch -q --depth 1 https://github.com/theroyallab/tabbyAPI "${TABBYAPI_COMMIT}" \
    && git checkout -q FETCH_HEAD
RUN python3 -m venv /venv \
    && /venv/bin/pip install --no-cache-dir ".[cu12]" \
    && /venv/bin/python -c "from importlib.metadata import version as v; found = [v(p).split('+')[0] for p in ('exllamav2', 'torch')]; assert found == ['0.3.2', '2.8.0'], found"

EXPOSE 5000
ENTRYPOINT ["/venv/bin/python", "main.py", "--host", "0.0.0.0", "--model-dir", "/models"]
