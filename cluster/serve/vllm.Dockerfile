# vLLM that serves EXL2 models, by the plugin in exl2ray:
#
#   docker build -f cluster/serve/vllm.Dockerfile -t REGISTRY/exl2ray-vllm:0.1.0 .
#   docker run --rm --gpus all --ipc=host -p 127.0.0.1:8000:8000 -v /data/out/M-4.0bpw:/model:ro \
#       REGISTRY/exl2ray-vllm:0.1.0 /model --served-model-name M --max-model-len 8192
#
# vLLM's layers are no stable interface: its version and the bound of the extra [vllm] in pyproject.toml belong together.
# vLLM 0.32.0 asks for torch 2.13.0 and numba 0.65.0, which the image has with a CUDA that fits them. Ray, for
# rayservice.yaml, is that of cluster/Dockerfile. Not built here: that needs a registry and a GPU.
ARG VLLM_VERSION=0.32.0
FROM vllm/vllm-openai:v${VLLM_VERSION}

COPY pyproject.toml setup.py README.md /src/
COPY exl2ray /src/exl2ray
ARG VLLM_VERSION
ARG RAY_VERSION=2.60.0
# What the image has stays as it is: pip adds what is missing, or fails.
RUN python3 -m pip list --format=freeze \
        | grep -E '^(vllm|torch|torchvision|torchaudio|numba|numpy|transformers)==' > /tmp/kept.txt \
    && grep -qE "^vllm==${VLLM_VERSION}([+.]|$)" /tmp/kept.txt \
    && python3 -m pip install --no-cache-dir -c /tmp/kept.txt "/src[cuda,vllm]" "ray[default,serve]==${RAY_VERSION}" \
    && rm -rf /src /tmp/kept.txt \
    && exl2ray --version

# Compiled kernels outlive the processes of a container; no usage statistics.
ENV NUMBA_CACHE_DIR=/tmp/numba-cache \
    RAY_USAGE_STATS_ENABLED=0 \
    VLLM_NO_USAGE_STATS=1
ENTRYPOINT ["vllm", "serve"]
