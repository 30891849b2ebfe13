"""GGUF files of a source model: against plain dequantisation, against transformers' own reading, and broken ones."""

from __future__ import annotations

import json
import struct
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import jsonschema
import numpy as np
import pytest
import tiny_models
import torch
from bounded import exl2ray
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

from exl2ray.errors import Exl2RayError, FormatError, SourceError, UnknownArchitectureError
from exl2ray.evaluate.compare import evaluate_many
from exl2ray.evaluate.forward import open_model, run_model
from exl2ray.evaluate.gguf_model import open_gguf
from exl2ray.evaluate.record import parse_evaluation
from exl2ray.formats.gguf import GgufTensor, read_gguf

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
GEMMA = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
Twins = tuple[Path, Path]


def gguf_name(name: str, changes: dict[str, str]) -> str:
    stem, _, end = name.rpartition(".")
    table = {**NAMES, **changes}
    if not stem.startswith("model.layers."):
        return f"{table[stem]}.{end}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{table[rest]}.{end}"


def write_gguf(
    path: Path, model: Path, kind: Type = Type.F16, arch: str = "llama", pairs: bool = True, plus: float = 0.0,
    theta: float | None = None, more: dict[str, tuple[int, ...]] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Writes ``model`` as llama.cpp's converter lays it out, linears and embedding in ``kind``; returns those tensors as they
    are after it, under the names of the source."""
    config = json.loads((model / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(config["num_hidden_layers"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_context_length(config["max_position_embeddings"])
    w.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-5))
    w.add_rope_freq_base(theta or (config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    w.add_vocab_size(config["vocab_size"])
    w.add_tokenizer_model("gpt2")
    w.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    w.add_string("general.long", "x" * 5000)
    after, experts = {}, {}
    changes = GEMMA if arch.startswith("gemma") else {}
    for name, tensor in load_file(model / "model.safetensors").items():
        data = tensor.float().numpy()
        if data.ndim == 1:
            stored, raw_kind = data + plus if "norm" in name else data, Type.F32
        else:
            stored, raw_kind = gguf.quants.quantize(data, kind), kind
            back = gguf.quants.dequantize(stored, kind)
            after[name] = torch.from_numpy(back.reshape(data.shape).copy())
        n = {"q_proj": heads, "k_proj": kv}.get(name.split(".")[-2], 0) if pairs else 0
        if n:  # halves of a head become pairs; rows are quantised apart, so they may be moved afterwards
            stored = stored.reshape(n, 2, len(stored) // n // 2, *stored.shape[1:]).swapaxes(1, 2).reshape(stored.shape)
        if ".experts." in name:
            layer, number, role = name.split(".")[2], int(name.split(".")[5]), name.split(".")[6].removesuffix("_proj")
            experts.setdefault(f"blk.{layer}.ffn_{role}_exps.weight", {})[number] = stored
            continue
        w.add_tensor(gguf_name(name, changes), np.ascontiguousarray(stored), raw_dtype=raw_kind)
    for name, found in experts.items():
        w.add_tensor(name, np.stack([found[i] for i in range(len(found))]), raw_dtype=kind)
    for name, shape in (more or {}).items():
        w.add_tensor(name, np.zeros(shape, np.float32), raw_dtype=Type.F32)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return after


@pytest.mark.parametrize("kind", [Type.F16, Type.Q8_0, Type.Q4_0, Type.BF16])
def test_logits_are_those_of_plain_dequantisation(tmp_path: Path, twins: Twins, ids: torch.Tensor, kind: Type) -> None:
    after = write_gguf(tmp_path / "m.gguf", twins[0], kind)
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({**load_file(twins[0] / "model.safetensors"), **after}, plain / "model.safetensors")
    (plain / "config.json").write_bytes((twins[0] / "config.json").read_bytes())
    opened = open_gguf(tmp_path / "m.gguf", open_model(twins[1]))  # an EXL2 directory has the config as well
    everything = (slice(None), slice(None))
    assert torch.equal(run_model(opened, ids, "cpu").logits(*everything), run_model(plain, ids, "cpu").logits(*everything))
    result = evaluate_many([opened], twins[0], ids, "cpu")[0]
    assert result.kl is not None
    assert (abs(result.kl.value) < 1e-9) == (kind == Type.F16)
    bits = {Type.F16: 16.0, Type.Q8_0: 8.5, Type.Q4_0: 4.5, Type.BF16: 16.0}[kind]
    assert (result.size.linears_bpw, result.size.head_bpw) == (bits, bits)
    assert result.size.file_bytes == (tmp_path / "m.gguf").stat().st_size
    assert opened.notes == ()


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"arch": "qwen2", "pairs": False},
    "Qwen3": {"arch": "qwen3", "pairs": False},
    "Qwen3Moe": {"arch": "qwen3moe", "pairs": False},
    "Gemma2": {"arch": "gemma2", "pairs": False, "plus": 1.0},
    "Phi3": {"arch": "phi3", "pairs": False},
    "Starcoder2": {"arch": "starcoder2", "pairs": False},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "Qwen3": {"head_dim": 16},
    "Qwen3Moe": {
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True,
    },
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "Starcoder2": {"tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_read_as_transformers_reads_them(tmp_path: Path, ids: torch.Tensor, family: str) -> None:
    """The same file through transformers' own GGUF support: a layout that the writer above had wrong would show there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny_models.write_model(tmp_path / "hf", family, **SETTINGS.get(family, {}))
    write_gguf(tmp_path / "m.gguf", model, **FAMILIES[family])
    opened = open_gguf(tmp_path / "m.gguf", open_model(model))
    found = run_model(opened, ids, "cpu").logits(slice(None), slice(None))
    config = AutoConfig.from_pretrained(model)
    oracle: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", config=config, dtype=torch.float32)
    with torch.inference_mode():
        bos = torch.full((len(ids), 1), opened.bos_id) if opened.bos_id is not None else ids[:, :0]
        expected = oracle(torch.cat([bos, ids], dim=1)).logits[:, bos.shape[1] :]
    assert float((found - expected).abs().max()) < 2e-3
    result = evaluate_many([opened], model, ids, "cpu")[0]
    assert result.kl is not None
    assert abs(result.kl.value) < 1e-6
    assert opened.notes == ()


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K, Type.IQ4_XS])
def test_rows_of_blocks(tmp_path: Path, kind: Type) -> None:
    """Types that the package cannot write: blocks of random bits with sound scales, read in pieces."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (6, 2, size), dtype=np.uint8)
    scale = np.array([0.01], dtype=np.float16).view(np.uint8)
    for at in {Type.Q4_K: (0, 2), Type.Q6_K: (size - 2,), Type.IQ4_XS: (0,)}[kind]:
        raw[..., at : at + 2] = scale
    (tmp_path / "x").write_bytes(b"head" + raw.tobytes())
    t = GgufTensor("t", tmp_path / "x", kind.name, (2, 3, 2 * block), 4, raw.size, block, size)
    expected = gguf.quants.dequantize(raw.reshape(6, -1), kind)
    assert np.isfinite(expected).all()
    assert expected.std() > 0
    assert np.array_equal(t.load().numpy(), expected)
    assert np.array_equal(t.load(2, 3).numpy(), expected[2:5])


def test_on_the_curve_beside_exl2(tmp_path: Path) -> None:
    model = tiny_models.write_model(tmp_path / "hf", "Llama")
    write_gguf(tmp_path / "q8.gguf", model, Type.Q8_0)
    write_gguf(tmp_path / "q4.gguf", model, Type.Q4_0)
    ids = np.random.default_rng(0).integers(3, tiny_models.VOCAB, (3, 32))
    np.save(tmp_path / "ids.npy", ids)
    words = ("eval", "--reference", "hf", "--tokens", "ids.npy", "--device", "cpu", "--gguf", "q8.gguf", "--gguf", "q4.gguf")
    run = exl2ray(*words, "--json", "--plot", "curve.svg", cwd=tmp_path)
    run.ends_with(0)
    found = json.loads(run.out)
    jsonschema.validate(found, json.loads(resources.files("exl2ray.evaluate").joinpath("results.schema.json").read_text()))
    q8, q4 = (parse_evaluation(r, "x") for r in found["results"])
    assert q8.is_gguf
    assert (q8.model, q4.model) == ("q8.gguf", "q4.gguf")
    assert q8.kl is not None
    assert q4.kl is not None
    assert 0 < 20 * q8.kl.value < q4.kl.value
    assert q8.file_bytes > q4.file_bytes
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    exl2ray("eval", "--gguf", "q8.gguf", cwd=tmp_path).ends_with(2, "--gguf needs the model", "--reference")
    exl2ray("eval", "q8.gguf", "--reference", "hf", cwd=tmp_path).ends_with(2, "give it as --gguf FILE")
    (tmp_path / "short.gguf").write_bytes((tmp_path / "q4.gguf").read_bytes()[:-100])
    exl2ray(*words[:-1], "short.gguf", cwd=tmp_path).ends_with(8, "the file has", "fetch it again")


def test_other_models_are_named(tmp_path: Path, twins: Twins) -> None:
    like, file = open_model(twins[0]), tmp_path / "m.gguf"

    def refused(error: type[Exl2RayError], *words: str, model: Path = twins[0], **settings: Any) -> None:
        write_gguf(file, model, **settings)
        with pytest.raises(error) as caught:
            open_gguf(file, like)
        assert all(w in str(caught.value) for w in (*words, "m.gguf"))

    refused(SourceError, "architecture 'qwen2'", "'llama' there", arch="qwen2")
    edited = tmp_path / "edited"
    edited.mkdir()
    tensors = load_file(twins[0] / "model.safetensors")
    config = json.loads((twins[0] / "config.json").read_text())

    def edit(tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
        save_file(tensors, edited / "model.safetensors")
        (edited / "config.json").write_text(json.dumps({**config, **changes}))
        return edited

    refused(SourceError, "block_count is 3, not 2", model=edit(tensors, num_hidden_layers=3))
    short = {**tensors, "lm_head.weight": tensors["lm_head.weight"][:64].clone()}
    refused(SourceError, "not a GGUF of the model in", "lm_head.weight has shape (64, 64)", model=edit(short))
    less = {k: v for k, v in tensors.items() if "1.mlp.up" not in k}
    refused(SourceError, "not a GGUF of the model in", "up_proj.weight", model=edit(less))
    write_gguf(file, edit({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 1.1}))
    assert "not that of" in open_gguf(file, like).notes[0]
    refused(SourceError, "holds no tensors", model=edit({}))
    cohere = tiny_models.write_model(tmp_path / "cohere", "Cohere")
    with pytest.raises(UnknownArchitectureError, match="supported: Llama"):
        open_gguf(file, open_model(cohere))


def header(tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(s: bytes) -> bytes:
    return struct.pack("<Q", len(s)) + s


def listed(kind: int, count: int) -> bytes:
    return text(b"k") + struct.pack("<IIQ", 9, kind, count)


def entry(name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


BROKEN: list[tuple[bytes, str]] = [
    (b"version https://git-lfs.github.com/spec", "not a GGUF file"),
    (header(version=1, rest=bytes(9)), "version 1;"),
    (header(version=3 << 24), "big-endian"),
    (header(tensors=1 << 60), "at most"),
    (header(keys=1), "should follow"),
    (header(keys=2, rest=2 * (text(b"a") + struct.pack("<II", 4, 7))), "'a' is there twice"),
    (header(keys=1, rest=struct.pack("<Q", 1 << 62)), "should follow"),
    (header(keys=1, rest=listed(8, 1 << 62) + text(b"x")), "should follow"),
    (header(keys=1, rest=listed(4, 1 << 62)), "should follow"),
    (header(keys=1, rest=listed(9, 1)), "a list of values of type 9"),
    (header(keys=1, rest=text(b"k") + struct.pack("<I", 77)), "type 77"),
    (header(keys=1, rest=text(b"\xff\xfe")), "not UTF-8"),
    (header(keys=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 24)), "general.alignment is 24"),
    (header(1, rest=entry(shape=())), "0 dimensions"),
    (header(1, rest=entry(shape=(32, 1 << 50))), "has shape"),
    (header(1, rest=entry(kind=9999)), "number 9999"),
    (header(1, rest=entry(kind=Type.Q8_K, shape=(256,))), "type Q8_K"),
    (header(1, rest=entry(kind=Type.Q4_0, shape=(33,))), "no multiple of Q4_0's 32"),
    (header(1, rest=entry()), "the file has"),
    (header(1, rest=entry(offset=8) + bytes(400)), "not aligned"),
    (header(2, rest=entry(b"a") + entry(b"b") + bytes(400)), "within the one before"),
    (header(2, rest=entry(b"a") + entry(b"a", offset=128) + bytes(400)), "there twice"),
]


@pytest.mark.parametrize(("raw", "says"), BROKEN, ids=[says for _, says in BROKEN])
def test_headers_are_not_believed(tmp_path: Path, raw: bytes, says: str) -> None:
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(FormatError, match=says) as caught:
        read_gguf(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)


def test_a_file_cut_anywhere_is_an_error(tmp_path: Path, twins: Twins) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file, twins[0], Type.Q8_0)
    raw = file.read_bytes()
    start = min(t.begin for t in read_gguf(file).tensors.values())
    for cut in [*range(0, start, 37), start, len(raw) - 33]:
        file.write_bytes(raw[:cut])
        with pytest.raises(FormatError):
            read_gguf(file)
    file.write_bytes(raw)
    tensor = read_gguf(file).tensors["output.weight"]
    file.write_bytes(raw[: tensor.begin + 5])
    with pytest.raises(FormatError, match="it was longer when opened"):
        tensor.load()


def test_parts(tmp_path: Path, twins: Twins, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    like = open_model(twins[0])
    write_gguf(tmp_path / "whole.gguf", twins[0], Type.Q8_0)
    whole = read_gguf(tmp_path / "whole.gguf")
    names = sorted(whole.tensors)
    paths = [tmp_path / f"m-{i + 1:05}-of-00002.gguf" for i in range(2)]
    for i, (path, part) in enumerate(zip(paths, (names[:5], names[5:]), strict=True)):
        w = gguf.GGUFWriter(path, "llama")
        w.add_uint16("split.count", 2)
        w.add_uint16("split.no", i)
        for name in part:
            t = whole.tensors[name]
            raw = np.fromfile(t.file, np.uint8, t.nbytes, offset=t.begin).reshape(*t.shape[:-1], -1)
            data = raw.view(np.float32) if t.type == "F32" else raw
            w.add_tensor(name, data, raw_dtype=Type[t.type])
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
    found, expected = (run_model(open_gguf(p, like), ids, "cpu").states for p in (paths[0], tmp_path / "whole.gguf"))
    assert torch.equal(found, expected)
    with pytest.raises(SourceError, match="give the first one"):
        open_gguf(paths[1], like)
    paths[1].unlink()
    with pytest.raises(SourceError, match="1 of 2 parts are missing"):
        open_gguf(paths[0], like)
    other = paths[0].rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="which its name does not"):
        open_gguf(other, like)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Exl2RayError, match=r"exl2ray\[gguf\]") as caught:
        open_gguf(other, like)
    assert caught.value.exit_code == 2


def test_what_llama_cpp_would_do_otherwise_is_told(tmp_path: Path, twins: Twins) -> None:
    like, path = open_model(twins[0]), tmp_path / "m.gguf"
    write_gguf(path, twins[0], theta=5e6)
    assert ["rope.freq_base is 5e+06" in note for note in open_gguf(path, like).notes] == [True]
    write_gguf(path, twins[0], more={"blk.0.attn_q.bias": (64,), "blk.7.attn_norm.weight": (64,)})
    assert ["holds 2 tensors" in note for note in open_gguf(path, like).notes] == [True]
    write_gguf(path, twins[0], more={"blk.0.ffn_gate_exps.weight": (4096, 1, 1)})
    with pytest.raises(SourceError, match="of 4096 experts, the model has none"):
        open_gguf(path, like)
    write_gguf(path, twins[0], more={"blk.00.attn_norm.weight": (64,)})
    with pytest.raises(FormatError, match="twice"):
        open_gguf(path, like)
