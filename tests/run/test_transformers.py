"""EXL2 models in transformers: logits of ``eval``'s own forward pass, every family and form, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exl2_models import divergence, losses_of_training, tokens, write_exl2
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompileConfig

import exl2ray.transformers
from exl2ray.errors import FormatError
from exl2ray.evaluate.forward import run_model
from exl2ray.run.linear import Exl2Linear

ROOT = Path(__file__).resolve().parents[2]


def load(path: Path, dtype: torch.dtype = torch.float32, **options: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


def expected(path: Path, ids: torch.Tensor, bos: bool) -> torch.Tensor:
    """Families that need BOS get it from ``run_model``, which does not return its position."""
    return run_model(path, ids[:, 1:] if bos else ids, "cpu").logits(slice(None), slice(None))


@torch.inference_mode()
def agrees(path: Path, dtype: torch.dtype = torch.float32, bos: bool = False, limit: float = 1e-6) -> torch.nn.Module:
    ids = tokens()
    model = load(path, dtype)
    logits = model(ids).logits.float()
    assert divergence(expected(path, ids, bos), logits[:, 1:] if bos else logits) < limit
    return model


QWEN3_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16, "norm_topk_prob": True,
}  # fmt: skip
CASES = {
    "llama": ("Llama", {}),
    "two bits": ("Llama", {"widths": (3, 2)}),
    "three bits": ("Llama", {"widths": (3,)}),
    "all widths": ("Llama", {"widths": (8, 6, 5, 4, 3, 2), "hidden_size": 192, "intermediate_size": 224}),
    "eight bits": ("Llama", {"widths": (8,), "head": 8}),
    "head in float16": ("Llama", {"head": None}),
    "vocabulary not a multiple of 32": ("Llama", {"vocab_size": 275, "head": 8}),
    "tied, head of 8 bits": ("Llama", {"tie_word_embeddings": True, "head": 8}),
    "tied, head in float16": ("Llama", {"tie_word_embeddings": True, "head": None}),
    "several files": ("Llama", {"files": 3}),
    "biases": ("Qwen2", {}),
    "mixtral": ("Mixtral", {"widths": (5, 4)}),
    "qwen3-moe": ("Qwen3Moe", QWEN3_MOE),
    "norms of heads": ("Qwen3", {"head_dim": 16}),
    "fused in the source": ("Phi3", {}),
    "glm-4": ("Glm4", {"head_dim": 16}),
    "cohere, its logits scaled": ("Cohere", {"tie_word_embeddings": True, "logit_scale": 0.25}),
    "gemma": ("Gemma", {"head_dim": 16, "head": 8, "tie_word_embeddings": True}),
    "gemma 3": ("Gemma3", {"head_dim": 16, "head": 8, "tie_word_embeddings": True, "query_pre_attn_scalar": 16}),
    "gemma 2": ("Gemma2", {"head_dim": 16, "tie_word_embeddings": True, "query_pre_attn_scalar": 16}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_eval(case: str, tmp_path: Path) -> None:
    family, config = CASES[case]
    agrees(write_exl2(tmp_path, family, **config), bos=family.startswith(("Gemma", "Cohere")))


def unpacked(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with ordinary linears of the weights that the loader of ExLlamaV2 makes."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Exl2Linear):
            plain = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            weight = module.weight_matrix(torch.float16)[:, : module.out_features]
            plain.weight.data = weight.T.to(model.dtype, copy=True)
            model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_costs_no_more_than_that_of_plain_linears(dtype: torch.dtype, tmp_path: Path) -> None:
    """80 rows by unpacked weights, 16 by the fused kernel. bfloat16 has three bits less than float16: 64 times the KL."""
    model, ids = load(write_exl2(tmp_path), dtype), tokens()
    wanted = expected(tmp_path, ids, False)

    def both() -> list[float]:
        return [divergence(wanted[:, :n], model(ids[:, :n]).logits.float()) for n in (40, 8)]

    packed = both()
    unpacked(model)
    for ours, plain in zip(packed, both(), strict=True):
        assert plain < (1e-4 if dtype == torch.float16 else 1e-2)
        assert ours < 1.5 * plain + 1e-6


def test_a_model_made_by_exllamav2(shared_dir: Path) -> None:
    """Within what its stored logits are rounded to; test_golden.py says the same of ``eval``."""
    path = shared_dir / "golden/tiny-llama-7m-exl2-3.0bpw"
    with np.load(shared_dir / "golden/exllamav2-0.3.2.npz") as golden, torch.inference_mode():
        ids, wanted = torch.from_numpy(golden["logits/ids"]), torch.from_numpy(golden["logits/exl2-3.0bpw"]).float()
        logits = load(path)(ids.long()).logits[:, ::8]
    assert float((logits - wanted).abs().max()) < 0.05
    assert divergence(wanted, logits) < 1e-4


def generated(model: torch.nn.Module, **options: object) -> torch.Tensor:
    return model.generate(tokens()[:1].to(model.device), max_new_tokens=12, do_sample=False, eos_token_id=None, **options)


def test_generating_with_a_compiled_static_cache_and_without_any(tmp_path: Path) -> None:
    """``eager`` traces as the default does, and leaves out the C++ compiler; on GPUs transformers compiles unasked."""
    model = load(write_exl2(tmp_path))
    compiled = CompileConfig(backend="eager", mode="default", fullgraph=True)
    compiled._compile_all_devices = True
    plain = generated(model, use_cache=False)
    assert plain.shape == (1, 52)
    assert torch.equal(plain, generated(model, cache_implementation="static", disable_compile=True))
    torch._dynamo.utils.counters.clear()
    assert torch.equal(plain, generated(model, cache_implementation="static", compile_config=compiled))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def over_two(first: int | str, second: int | str) -> dict[str, int | str]:
    """A device map for two layers."""
    begin = {f"model.{name}": first for name in ("embed_tokens", "rotary_emb", "layers.0")}
    return {**begin, "model.layers.1": second, "model.norm": second, "lm_head": second}


@pytest.mark.parametrize(("family", "config"), [("Mixtral", {}), ("Qwen3", {"head_dim": 16})])
def test_what_lies_on_the_disk_is_read_back(family: str, config: dict[str, object], tmp_path: Path) -> None:
    path = write_exl2(tmp_path / "model", family, **config)
    options = {"device_map": over_two("cpu", "disk"), "offload_folder": tmp_path / "offloaded", "offload_buffers": True}
    with torch.inference_mode():
        model = load(path, **options)
        assert model.lm_head.q_weight.is_meta
        assert torch.equal(model(tokens()).logits, load(path)(tokens()).logits)
        assert generated(model, cache_implementation="static").shape == (1, 52)
    assert model.lm_head._packed is None  # nothing is kept of what was read back


def test_saving_writes_the_same_tensors_and_loads_again(tmp_path: Path) -> None:
    first = write_exl2(tmp_path / "a", "Mixtral", files=2)
    model = load(first, torch.float16)
    model.save_pretrained(tmp_path / "b")
    before = {n: t for f in first.glob("*.safetensors") for n, t in load_file(f).items()}
    after = {n: t for f in (tmp_path / "b").glob("*.safetensors") for n, t in load_file(f).items()}
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)
    settings = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (first, tmp_path / "b")]
    assert settings[0] == settings[1]
    ids = tokens()
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "b", torch.float16)(ids).logits, model(ids).logits)


class Lora(torch.nn.Module):
    def __init__(self, base: Exl2Linear) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(torch.randn(4, base.in_features) / 8)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


def test_adapters_are_trained_through_packed_linears(tmp_path: Path) -> None:
    model = load(write_exl2(tmp_path)).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
    losses = losses_of_training(model)
    assert sum(p.requires_grad for p in model.parameters()) == 4
    assert losses[-1] < losses[0] - 0.01


def broken(path: Path, name: str, change: object) -> Path:
    from safetensors.torch import save_file

    tensors = load_file(path / "output.safetensors")
    if change is None:
        del tensors[name]
    else:
        change(tensors[name])  # type: ignore[operator]
    save_file(tensors, path / "output.safetensors")
    return path


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.layers.1.mlp.up_proj.q_scale", None, "missing q_scale"),
        ("model.layers.0.self_attn.q_proj.q_invperm", lambda t: t.zero_(), "not a permutation"),
        ("model.layers.0.self_attn.q_proj.q_scale_max", lambda t: t.fill_(float("nan")), "NaN"),
        ("model.norm.weight", None, "norm"),
    ],
)
def test_what_verify_refuses_is_refused(name: str, change: object, words: str, tmp_path: Path) -> None:
    path = broken(write_exl2(tmp_path), name, change)
    with pytest.raises(FormatError, match=words):
        load(path)


def test_a_config_of_another_size_is_refused(tmp_path: Path) -> None:
    path = write_exl2(tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(FormatError, match="config says 128"):
        load(path)


def test_a_stale_index_of_the_source_is_no_matter(tmp_path: Path) -> None:
    path = write_exl2(tmp_path)
    (path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"x": "model-1.safetensors"}}')
    agrees(path)


def test_a_program_that_knows_nothing_of_it_loads_the_model(tmp_path: Path) -> None:
    path = write_exl2(tmp_path)
    code = "from transformers import AutoModelForCausalLM as A; "
    code += f"print(type(A.from_pretrained({str(path)!r}).lm_head).__name__)"
    program = [sys.executable, "-c", "from exl2ray.cli import main; main()", "with", "python", "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["Exl2Linear"], done.stderr


def test_with_hands_on_the_exit_status_and_names_what_is_missing() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", "from exl2ray.cli import main; main()", "with"]
    assert subprocess.run([*program, "-c", "raise SystemExit(7)"], env=env).returncode == 7
    done = subprocess.run([*program, "no-such-program-here"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no-such-program-here" in done.stderr


def test_the_module_registers_the_method() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert AUTO_QUANTIZER_MAPPING["exl2"] is exl2ray.transformers.Exl2Quantizer
    assert shutil.which("python") is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_on_a_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    """A prompt goes through unpacked weights, single tokens through the fused kernel."""
    path = write_exl2(tmp_path, widths=(8, 6, 5, 4, 3, 2), hidden_size=192, intermediate_size=224, head=8)
    model = load(path, dtype, device_map="cuda")
    ids = tokens()
    limit = 1e-4 if dtype == torch.float16 else 1e-2
    with torch.inference_mode():
        wanted = expected(path, ids, False)
        assert divergence(wanted, model(ids.cuda()).logits.float().cpu()) < limit
        assert divergence(wanted[:, :1], model(ids[:, :1].cuda()).logits.float().cpu()) < limit
    assert model.lm_head.q_weight.is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generate_records_the_decoding_on_a_gpu(tmp_path: Path) -> None:
    """Needs the C compiler that Triton wants. The compiler rounds in other places, so tokens may part after a while."""
    model = load(write_exl2(tmp_path), torch.float16, device_map="cuda")
    ids = tokens().cuda()
    options = {
        "max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "cache_implementation": "static",
        "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    plain = model.generate(ids, disable_compile=True, **options)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(2):  # again with what was recorded
        found = model.generate(ids, **options)
        assert len(found.logits) == 12
        for a, b in zip(plain.logits[:2], found.logits[:2], strict=True):  # of the prompt, and of the first that is compiled
            assert divergence(a.float(), b.float()) < 1e-4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_over_two_gpus(tmp_path: Path) -> None:
    path = write_exl2(tmp_path, widths=(8, 6, 5, 4, 3, 2), hidden_size=192, intermediate_size=224, head=8)
    model = load(path, torch.float16, device_map=over_two(0, 1))
    ids = tokens()
    assert model.lm_head.q_weight.device.index == 1
    with torch.inference_mode():
        wanted = expected(path, ids, False)
        for n in (40, 1, 8):
            assert divergence(wanted[:, :n], model(ids[:, :n].to("cuda:0")).logits.float().cpu()) < 1e-4
    assert generated(model, cache_implementation="static", disable_compile=True).shape == (1, 52)
