"""EXL2 models in vLLM, on a CPU: log-probabilities of ``eval``'s forward pass, over HTTP and otherwise (make test-vllm)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exl2_models import tokens, write_exl2

from exl2ray.evaluate.forward import open_model, run_model

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "models/demo"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
ENVIRONMENT = {
    **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
}  # fmt: skip
SIZES = {"hidden_size": 128, "intermediate_size": 224, "head_dim": 32}  # heads of a size that vLLM's attention takes
Done = subprocess.CompletedProcess[str]
LIMITS = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 5e-3}
# family, config, dtype, eager or compiled, ranks
CASES: dict[str, tuple[str, dict[str, Any], str, str, int]] = {
    "compiled": ("Llama", {}, "float32", "compiled", 1),
    "two and three bits": ("Llama", {"widths": (3, 2)}, "float32", "eager", 1),
    "eight bits": ("Llama", {"widths": (8,), "head": 8}, "float32", "eager", 1),
    "all widths, biases": ("Qwen2", {"widths": (8, 6, 5, 4, 3, 2)}, "float32", "eager", 1),
    "several files, odd vocabulary": ("Llama", {"files": 3, "vocab_size": 275, "head": 8}, "float32", "eager", 1),
    "tied, head of 8 bits": ("Llama", {"tie_word_embeddings": True, "head": 8}, "float32", "eager", 1),
    "tied, head in float16": ("Llama", {"tie_word_embeddings": True, "head": None}, "float32", "eager", 1),
    "gemma 3": ("Gemma3", {"tie_word_embeddings": True, "head": 8, "query_pre_attn_scalar": 32}, "float32", "eager", 1),
    "norms of heads": ("Qwen3", {}, "float32", "eager", 1),
    "fused in the source": ("Phi3", {}, "float32", "eager", 1),
    "mixtral": ("Mixtral", {"widths": (5, 4)}, "float32", "eager", 1),
    "gemma 2": ("Gemma2", {"tie_word_embeddings": True, "head": None, "query_pre_attn_scalar": 32}, "float32", "eager", 1),
    "float16": ("Llama", {}, "float16", "eager", 1),
    "bfloat16": ("Llama", {}, "bfloat16", "eager", 1),
    "two ranks, biases, odd vocabulary": ("Qwen2", {"vocab_size": 275, "num_key_value_heads": 1}, "float32", "eager", 2),
    "two ranks, experts": ("Mixtral", {"widths": (5, 4)}, "float32", "eager", 2),
}


def expected(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of ``eval``'s forward where a token is predicted; families with BOS: from the second one on."""
    bos = open_model(path).bos_id is not None
    logits = run_model(path, ids[:, 1:] if bos else ids, "cpu").logits(slice(None), slice(None))
    return logits[:, :-1].double().log_softmax(-1)


def divergence(wanted: torch.Tensor, found: Any) -> float:
    q = torch.from_numpy(np.asarray(found, np.float64))[:, -wanted.shape[1] :, : wanted.shape[2]]
    return float((wanted.exp() * (wanted - q)).sum(-1).mean())


def ask(path: Path, out: Path, dtype: str = "float32", mode: str = "eager", ranks: int = 1) -> Done:
    env = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/run")])}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if ranks > 1 else {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    program = [sys.executable, str(Path(__file__).with_name("ask_vllm.py")), str(path), str(out), dtype, mode, str(ranks)]
    return subprocess.run(program, env=env, capture_output=True, text=True, timeout=600)


def agrees(path: Path, out: Path, dtype: str = "float32", mode: str = "eager", ranks: int = 1) -> None:
    done = ask(path, out, dtype, mode, ranks)
    assert done.returncode == 0, done.stderr[-6000:]
    with np.load(out) as answer:
        assert divergence(expected(path, tokens()), answer["logprobs"]) < LIMITS[dtype]
        if dtype == "float32":
            whole = torch.cat([tokens(), torch.from_numpy(answer["continued"])], dim=1)
            best = expected(path, whole).argmax(-1)[:, -8:]
            assert torch.equal(best, whole[:, -8:])


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_eval(case: str, tmp_path: Path) -> None:
    family, config, dtype, mode, ranks = CASES[case]
    if ranks > len(os.sched_getaffinity(0)):
        pytest.skip(f"{ranks} ranks need as many cores")
    agrees(write_exl2(tmp_path / "model", family, **{**SIZES, **config}), tmp_path / "out.npz", dtype, mode, ranks)


def converted(source: Path, out: Path, *flags: str) -> Path:
    program = [sys.executable, "-m", "exl2ray.cli", "convert", "-i", str(source), "-o", str(out / "work"), "-b", "4.0"]
    program += ["-cf", str(out / "4.0bpw"), "-r", "8", "-mr", "4", "--quality", "reference", "--device", "cpu", *flags]
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return out / "4.0bpw"


def test_a_stale_index_of_the_source_is_no_matter(tmp_path: Path) -> None:
    path = write_exl2(tmp_path / "model", **SIZES)
    (path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"x": "model-1.safetensors"}}')
    agrees(path, tmp_path / "out.npz")


def test_a_head_that_vllm_has_no_place_for_is_told_of(tmp_path: Path) -> None:
    path = write_exl2(tmp_path / "model", "Gemma2", tie_word_embeddings=True, query_pre_attn_scalar=32, **SIZES)
    done = ask(path, tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr[-6000:]
    assert "lm_head of the file is not used" in done.stderr + done.stdout


def test_models_of_other_kinds_are_served_as_before(tmp_path: Path) -> None:
    done = ask(DEMO, tmp_path / "out.npz")
    assert done.returncode == 0, done.stderr[-6000:]
    with np.load(tmp_path / "out.npz") as answer:
        assert divergence(expected(DEMO, tokens()), answer["logprobs"]) < 1e-6


def change(path: Path, **config: Any) -> Path:
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, **config}))
    return path


def test_what_verify_refuses_ends_before_anything_is_loaded(tmp_path: Path) -> None:
    done = ask(change(write_exl2(tmp_path / "model", **SIZES), num_hidden_layers=3), tmp_path / "out.npz")
    assert done.returncode != 0
    assert "not a sound EXL2 model" in done.stderr
    assert "init_worker" not in done.stderr


def test_a_config_that_contradicts_the_file(tmp_path: Path) -> None:
    done = ask(change(write_exl2(tmp_path / "model", **SIZES), intermediate_size=192), tmp_path / "out.npz")
    assert done.returncode != 0
    assert "gate_proj: 128 x 224 in the file; vLLM's layer has 128 x 192" in done.stderr
    assert "process_weights_after_loading" not in done.stderr


@contextmanager
def served(path: Path, log: Path) -> Iterator[str]:
    """Address of the server of ``vllm serve``, which is ended afterwards with all of its processes.

    By its module: the command of vllm-cpu 0.32.0 looks for a package called vllm, and does not start.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    program += ["--host", "127.0.0.1", "--port", str(port)]
    program += ["--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "4", "--max-logprobs", "-1"]
    program += ["--enforce-eager"]
    with log.open("w") as f:
        process = subprocess.Popen(program, env=ENVIRONMENT, stdout=f, stderr=f, start_new_session=True)
    try:
        end = time.monotonic() + 400
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < end, log.read_text()[-6000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except (urllib.error.URLError, OSError):
        return False


def complete(url: str, model: Path, ids: list[int]) -> Any:
    """One prompt over the API of OpenAI, in token ids, with the log-probabilities of all words at each of its positions."""
    asked = {"model": str(model), "prompt": ids, "max_tokens": 8, "temperature": 0, "prompt_logprobs": -1}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)["choices"][0]


def serves(path: Path, log: Path) -> None:
    ids = tokens()
    with served(path, log) as url:
        choices = [complete(url, path, row) for row in ids.tolist()]
    found = [[[e[i]["logprob"] for i in sorted(e, key=int)] for e in choice["prompt_logprobs"][1:]] for choice in choices]
    assert divergence(expected(path, ids), found) < 1e-6
    assert all(choice["text"] for choice in choices)


def test_the_demo_model_over_http(tmp_path: Path) -> None:
    serves(converted(DEMO, tmp_path, "-l", "256", "-ml", "256"), tmp_path / "log")


def test_a_model_made_by_exllamav2_over_http(shared_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(shared_dir / "golden/tiny-llama-7m-exl2-3.0bpw", path)
    for file in (shared_dir / "models/tiny-llama-7m").glob("token*"):
        shutil.copy(file, path)
    serves(path, tmp_path / "log")
