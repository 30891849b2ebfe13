"""Structural check and summary of EXL2 directories: sound ones pass, every broken rule is found and named."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exl2ray.errors import FormatError, SourceError
from exl2ray.evaluate.forward import open_model
from exl2ray.formats.claim import LOCK, TUNING, Claim, write_claim
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.layout import LinearShape
from exl2ray.formats.summary import inspect_directory
from exl2ray.formats.verify import verify_directory

L0 = "model.layers.0"


def test_reference_output_lacks_only_the_tokenizer(shared_dir: Path) -> None:
    problems = verify_directory(shared_dir / "golden" / "tiny-llama-7m-exl2-3.0bpw")
    assert [str(p) for p in problems] == ["[side-file] tokenizer.json: missing"]


@pytest.mark.parametrize("limit_bytes", [0, 20_000])
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_our_output_has_no_problem(build, tmp_path: Path, kind: str, limit_bytes: int) -> None:
    model = build[kind]()
    path = model.write(tmp_path / "out", limit_bytes)
    assert (len(list(path.glob("output-*.safetensors"))) > 1) == (limit_bytes > 0)
    assert verify_directory(path, model.shapes) == []
    assert Exl2Model(path).keys() == sorted(model.shapes)


def zeros(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable:
    def apply(m) -> None:
        m.tensors[name] = change(m.tensors[name])

    return apply


def put(name: str, tensor: torch.Tensor) -> Callable:
    return lambda m: m.tensors.update({name: tensor})


def drop(prefix: str) -> Callable:
    return lambda m: m.drop(prefix)


def settings(**changes: object) -> Callable:
    return lambda m: m.config.update(changes)


def biased_mlp(m) -> None:
    for i in range(2):
        m.linear(f"model.layers.{i}.mlp.up_proj", LinearShape(64, 96, True), 5)


def plain_up(m) -> None:
    m.drop(f"{L0}.mlp.up_proj")
    m.tensors[f"{L0}.mlp.up_proj.weight"] = zeros(96, 64)


def all_plain(m) -> None:
    for key, shape in m.shapes.items():
        m.drop(key)
        m.tensors[f"{key}.weight"] = zeros(shape.out_features, shape.in_features)


def quantised_router(m) -> None:
    m.drop(f"{L0}.block_sparse_moe.gate")
    m.linear(f"{L0}.block_sparse_moe.gate", LinearShape(64, 32), 1)


def beside(name: str, text: str) -> Callable:
    return lambda m: m.side_files.update({name: text})


# model kind, change, rule, tensor or file named, part of the message
CASES = {
    "quantization_config": ("llama", settings(quantization_config=None), "config", "config.json", "missing"),
    "quant_method": ("llama", settings(quantization_config={}), "config", "config.json", "not 'exl2'"),
    "two architectures": ("llama", settings(architectures=["A", "B"]), "config", "config.json", "exactly one"),
    "tokenizer": ("llama", lambda m: m.side_files.clear(), "side-file", "tokenizer.json", "missing"),
    "preprocessor": (
        "llama",
        settings(vision_config={"model_type": "pixtral"}),
        "side-file",
        "preprocessor_config.json",
        "missing",
    ),
    "half a tokenizer": ("llama", beside("tokenizer.json", '{"model": {"vo'), "side-file", "tokenizer.json", "valid JSON"),
    "settings": ("llama", beside("generation_config.json", "[]"), "side-file", "generation_config.json", "a JSON object"),
    "no q_invperm": ("llama", drop("lm_head.q_invperm"), "linear", "lm_head", "missing q_invperm"),
    "no q_weight": ("llama", drop("lm_head.q_weight"), "linear", "lm_head", "missing q_weight"),
    "groups int32": ("llama", replace("lm_head.q_groups", torch.Tensor.int), "linear", "lm_head", "torch.int32"),
    "bias bfloat16": (
        "llama",
        put("lm_head.bias", zeros(128, dtype=torch.bfloat16)),
        "linear",
        "lm_head",
        "bias is torch.bfloat16",
    ),
    "permutation": ("llama", replace("lm_head.q_invperm", torch.zeros_like), "linear", "lm_head", "not a permutation"),
    "ascending widths": (
        "llama",
        put("lm_head.q_groups", torch.tensor([3, 0, 4, 3], dtype=torch.int16)),
        "linear",
        "lm_head",
        "widths increase",
    ),
    "unpadded": ("llama", replace("lm_head.q_weight", lambda t: t[:, :100]), "linear", "lm_head", "100 columns"),
    "nothing quantised": ("llama", all_plain, "linear", "out", "no quantised linear"),
    "other heads": ("llama", settings(head_dim=64), "block", f"{L0}.self_attn.o_proj", "heads of 64 need"),
    "mixed block": ("llama", plain_up, "block", f"{L0}.mlp", "not quantised, first model.layers.0.mlp.up_proj"),
    "missing v_proj": ("llama", drop(f"{L0}.self_attn.v_proj"), "block", f"{L0}.self_attn", "has only"),
    "mlp bias order": ("llama", biased_mlp, "block", f"{L0}.mlp.up_proj", "natural order"),
    "mlp widths": (
        "llama",
        lambda m: m.linear(f"{L0}.mlp.up_proj", LinearShape(64, 128), 1),
        "block",
        f"{L0}.mlp.up_proj",
        "128 columns",
    ),
    "missing expert": ("mixtral", drop(f"{L0}.block_sparse_moe.experts.1"), "block", f"{L0}.block_sparse_moe", "[1]"),
    "missing layer": ("llama", drop("model.layers.1"), "layer", "model.layers.1", "all tensors"),
    "missing norm": (
        "llama",
        drop("model.layers.1.input_layernorm"),
        "layer",
        "model.layers.1",
        "missing input_layernorm",
    ),
    "bias in one layer": (
        "llama",
        put(f"{L0}.self_attn.q_proj.bias", zeros(64)),
        "layer",
        "model.layers.1",
        "q_proj.bias",
    ),
    "too many layers": ("llama", settings(num_hidden_layers=1), "layer", "model.layers.1", "1 layers only"),
    "layer count": ("llama", settings(num_hidden_layers="two"), "layer", "config.json", "two"),
    "router missing": ("mixtral", drop(f"{L0}.block_sparse_moe.gate"), "router", f"{L0}.block_sparse_moe.gate", "miss"),
    "router quantised": ("mixtral", quantised_router, "router", f"{L0}.block_sparse_moe.gate", "not be quantised"),
    "router shape": (
        "mixtral",
        put(f"{L0}.block_sparse_moe.gate.weight", zeros(4, 64)),
        "router",
        f"{L0}.block_sparse_moe.gate",
        "3 experts",
    ),
    "fused qkv": ("llama", put(f"{L0}.self_attn.qkv_proj.weight", zeros(192, 64)), "fused", "qkv_proj", "left over"),
    "fused gate_up": ("llama", put(f"{L0}.mlp.gate_up_proj.weight", zeros(192, 64)), "fused", "gate_up", "left over"),
    "fused source name": (
        "llama",
        put("transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight", zeros(192, 64)),
        "fused",
        "Wqkv",
        "left over",
    ),
    "fused experts": ("mixtral", put(f"{L0}.block_sparse_moe.experts.w1", zeros(288, 64)), "fused", "w1", "left over"),
    "norm float64": ("llama", replace("model.norm.weight", torch.Tensor.double), "plain", "model.norm", "F64"),
    "norm width": ("llama", put("model.norm.weight", zeros(32)), "plain", "model.norm", "hidden_size is 64"),
    "norm of two dimensions": ("llama", put("model.norm.weight", zeros(1, 64)), "plain", "model.norm", "2 dimensions"),
    "embedding of three": (
        "llama", put("model.embed_tokens.weight", zeros(1, 100, 64)), "plain", "embed_tokens", "3 dimensions",
    ),
    "a size beyond all": ("llama", settings(intermediate_size=1e300), "config", "config.json", "intermediate_size is 1e+300"),
    "a size of text": (
        "llama", settings(num_hidden_layers="2"), "config", "config.json", "num_hidden_layers is 2, not a size",
    ),
    "head_dim": (
        "llama",
        lambda m: m.tensors.update({f"model.layers.{i}.self_attn.q_norm.weight": zeros(64) for i in range(2)}),
        "plain",
        "q_norm",
        "head_dim is 32",
    ),
    "embedding overflow": (
        "llama",
        put("model.embed_tokens.weight", torch.full((100, 64), 1e5, dtype=torch.bfloat16)),
        "plain",
        "model.embed_tokens",
        "not finite in float16",
    ),
    "norm nan": ("llama", put("model.norm.weight", zeros(64) / 0), "plain", "model.norm", "not finite"),
    "no head": ("llama", drop("lm_head"), "head", "lm_head", "not tied"),
    "no embedding": ("llama", drop("model.embed_tokens"), "head", "model.embed_tokens", "missing"),
    "no final norm": ("llama", drop("model.norm"), "head", "model.norm", "missing"),
    "head bias": ("llama", put("lm_head.bias", zeros(128)), "head", "lm_head.bias", "must not"),
    "vocabulary": ("llama", settings(vocab_size=200), "head", "lm_head", "vocab_size 200"),
    "expected width": (
        "llama",
        lambda m: m.shapes.update({"lm_head": LinearShape(64, 160)}),
        "expected",
        "lm_head",
        "instead of [64, 160]",
    ),
    "expected bias": (
        "llama",
        lambda m: m.shapes.update({f"{L0}.self_attn.q_proj": LinearShape(64, 64, True)}),
        "expected",
        f"{L0}.self_attn.q_proj",
        "lacks the bias",
    ),
    "expected missing": (
        "llama",
        lambda m: m.shapes.update({f"{L0}.mlp.extra": LinearShape(64, 64)}),
        "expected",
        f"{L0}.mlp.extra",
        "missing",
    ),
    "surplus": ("llama", lambda m: m.shapes.pop("lm_head"), "expected", "lm_head", "no linear of the model"),
}


@pytest.mark.parametrize("case", CASES)
def test_broken_rule_is_found(build, tmp_path: Path, case: str) -> None:
    kind, change, rule, named, message = CASES[case]
    model = build[kind]()
    change(model)
    problems = verify_directory(model.write(tmp_path / "out"), model.shapes)
    hits = [p for p in problems if p.rule == rule and named in p.tensor + p.file and message in p.message]
    assert hits, [str(p) for p in problems]


def test_a_tokenizer_that_was_not_fetched(build, tmp_path: Path) -> None:
    directory = build["llama"]().write(tmp_path / "out")
    (directory / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (found,) = verify_directory(directory)
    assert (found.rule, found.file) == ("side-file", "tokenizer.json")
    assert found.message == "a Git LFS pointer, not the file itself; run `git lfs pull` in the model's folder"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: (m.drop("lm_head"), m.config.update(tie_word_embeddings=True)),
        lambda m: (m.drop("lm_head"), m.tensors.update({"lm_head.weight": zeros(100, 64)})),
        lambda m: m.tensors.update({f"{L0}.self_attn.rotary_emb.inv_freq": zeros(16, dtype=torch.float64)}),
        lambda m: m.tensors.update({"visual.blocks.0.attn.qkv.weight": zeros(3, 3, dtype=torch.float64)}),
        lambda m: m.tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}),
        lambda m: m.tensors.update({f"{L0}.mlp.up_proj.weight": zeros(96, 64)}),
    ],
    ids=["tied", "plain head", "inverse frequencies", "vision dtype", "bfloat16 norm", "harmless leftover"],
)
def test_what_loaders_accept_is_no_problem(tiny_llama, tmp_path: Path, change) -> None:
    change(tiny_llama)
    assert verify_directory(tiny_llama.write(tmp_path / "out")) == []


def test_biased_mlp_in_natural_order_is_no_problem(tiny_llama, tmp_path: Path) -> None:
    biased_mlp(tiny_llama)
    for i in range(2):
        tiny_llama.linear(f"model.layers.{i}.mlp.down_proj", LinearShape(96, 64), 3, identity=True)
    assert verify_directory(tiny_llama.write(tmp_path / "out"), tiny_llama.shapes) == []


def test_unreadable_files(tiny_llama, tmp_path: Path) -> None:
    path = tiny_llama.write(tmp_path / "out", limit_bytes=20_000)
    first, second = sorted(path.glob("output-*"))[:2]
    second.write_bytes(second.read_bytes()[:-1])
    problems = verify_directory(path)
    assert any(p.rule == "file" and p.file == second.name and "do not fit" in p.message for p in problems)
    (path / "copy.safetensors").write_bytes(first.read_bytes())
    problems = verify_directory(path)
    assert any(p.rule == "file" and "also in" in p.message and p.tensor for p in problems)
    assert verify_directory(tmp_path / "absent")[0].message.startswith("does not exist")


@pytest.mark.parametrize("harm", ["cut short", "empty", "gone", "pointer"])
def test_what_only_a_lost_shard_held_is_counted_beside_it(tiny_llama, tmp_path: Path, harm: str) -> None:
    path = tiny_llama.write(tmp_path / "out", limit_bytes=20_000)
    shard = sorted(path.glob("output-*"))[1]
    content = {"cut short": shard.read_bytes()[:-1], "empty": b"", "pointer": b"version https://git-lfs.github.com/spec/v1\n"}
    shard.unlink()
    if harm in content:
        shard.write_bytes(content[harm])
    cause, rest = verify_directory(path, tiny_llama.shapes)
    assert (cause.rule, cause.file) == (rest.rule, rest.file) == ("file", shard.name)
    wanted = {"gone": "missing; fetch it", "pointer": "a Git LFS pointer, not the file itself; run `git lfs pull`"}
    assert wanted.get(harm, "fetch") in cause.message
    assert str(path) not in cause.message
    assert "layers, modules or tensors are missing, in" in rest.message
    with pytest.raises(FormatError, match=shard.name):
        inspect_directory(path)


def test_a_folder_without_weights_has_one_problem(tmp_path: Path) -> None:
    (problem,) = verify_directory(tmp_path)
    assert str(problem).startswith(f"[file] {tmp_path}: an empty folder; ")


@pytest.mark.parametrize(
    ("claim", "also", "words"),
    [
        (Claim("x", job="j", work="/my/work dir"), "output-00001-of-00002.safetensors",
         ("the output of a conversion that is not finished", "exl2ray convert -o '/my/work dir'")),
        (Claim("x", job="j"), "", ("the output of a conversion that is not finished", "run the same command again")),
        (None, f"{TUNING}/state.json", ("the output of a tuning that is not finished", "goes on from the last checkpoint")),
        (Claim("x", job="j", work="/out"), f"{TUNING}/state.json", ("of a tuning that is not finished", "wait for it")),
        (Claim("x"), "", ("holds no model (yet)", "run the command that writes there")),
        (None, LOCK, ("holds no model (yet)", "run the command that writes there")),
    ],
)  # fmt: skip
def test_an_output_that_is_not_finished_is_called_so(
    tmp_path: Path, claim: Claim | None, also: str, words: tuple[str, str]
) -> None:
    if claim is not None:
        write_claim(tmp_path, claim)
    if also:
        (tmp_path / also).parent.mkdir(exist_ok=True)
        (tmp_path / also).write_bytes(b"")
    (problem,) = verify_directory(tmp_path)
    assert all(w in str(problem) for w in words)
    with pytest.raises(SourceError, match=re.escape(words[0])) as caught:
        open_model(tmp_path)
    assert words[1] in caught.value.hint


def test_layer_numbers_cannot_exhaust_memory(tiny_llama, tmp_path: Path) -> None:
    tiny_llama.tensors["model.layers.999999.mlp.up_proj.weight"] = zeros(96, 64)
    tiny_llama.tensors[f"model.layers.{'9' * 900}.mlp.up_proj.weight"] = zeros(96, 64)
    tiny_llama.config["num_hidden_layers"] = 10**15
    problems = verify_directory(tiny_llama.write(tmp_path / "out"))
    assert any("num_hidden_layers" in p.message for p in problems)
    assert len(problems) < 20


# -- summary -------------------------------------------------------------------------------------------------------


def test_summary_of_the_reference_output(shared_dir: Path) -> None:
    s = inspect_directory(shared_dir / "golden" / "tiny-llama-7m-exl2-3.0bpw")
    assert 2.95 < s.decoder_bpw < 3.0
    assert s.head_bpw == pytest.approx(7381088 / (256 * 4096))
    assert s.settings["bits"] == 3.0
    assert s.files == {"output.safetensors": 4704478}
    assert len(s.linears) == 43
    assert s.linears[-1].key == "lm_head"
    assert s.linears[-1].layout == "128 x 8b/128 + 128 x 6b/128"
    with (s.path / "output.safetensors").open("rb") as f:
        header_bytes = 8 + struct.unpack("<Q", f.read(8))[0]
    assert sum(x.nbytes for x in s.linears) + s.plain_bytes + header_bytes == s.total_bytes


def test_summary_orders_experts_by_number(tiny_mixtral, tmp_path: Path) -> None:
    for e in range(3, 11):
        for role, shape in (("w1", (64, 96)), ("w3", (64, 96)), ("w2", (96, 64))):
            tiny_mixtral.linear(f"{L0}.block_sparse_moe.experts.{e}.{role}", LinearShape(*shape), e)
    s = inspect_directory(tiny_mixtral.write(tmp_path / "out"))
    keys = [x.key for x in s.linears]
    assert keys.index(f"{L0}.block_sparse_moe.experts.9.w3") < keys.index(f"{L0}.block_sparse_moe.experts.10.w1")
    assert list(s.layer_bpw()) == [0, 1]
    assert all(x.total_bits == 8 * x.nbytes for x in s.linears)


def test_summary_refuses_a_source_model(shared_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no quantised linear"):
        inspect_directory(shared_dir / "models" / "tiny-llama-7m")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(FormatError, match=r"no \*\.safetensors"):
        inspect_directory(tmp_path)
