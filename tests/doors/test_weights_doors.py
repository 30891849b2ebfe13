"""Weights as people store them: other names, indexes and copies, more or fewer layers, FP8 and MXFP4.

What converts gives the logits of transformers on the same folder. Where transformers would begin with random weights (names
with the marks of a wrapper), those of the folder as it was before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bounded import exl2ray
from model_folders import (
    WHOLE,
    Change,
    Tensors,
    copied,
    edit_config,
    edited,
    our_logits,
    read_weights,
    relative_error,
    renamed,
    transformers_logits,
    write_json,
    write_sharded,
    write_weights,
)
from safetensors.torch import load_file
from torch import Tensor

from exl2ray.formats.hf import SourceModel
from exl2ray.formats.side_files import side_files
from exl2ray.model.arch import load_spec

TOLERANCE = 2e-6
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def resharded(parts: int = 2, indexed: int | None = None, index: bool = True) -> Change:
    """In ``parts`` files, with an index of ``indexed``."""

    def apply(f: Path) -> None:
        tensors = read_weights(f)
        (f / WHOLE).unlink()
        if indexed is not None:
            write_sharded(f, tensors, indexed)
            kept = (f / "model.safetensors.index.json").read_text()
            for file in f.glob("model-*.safetensors"):
                file.unlink()
        write_sharded(f, tensors, parts, index)
        if indexed is not None:
            (f / "model.safetensors.index.json").write_text(kept)

    return apply


def then(*changes: Change) -> Change:
    def apply(f: Path) -> None:
        for change in changes:
            change(f)

    return apply


def old_index(f: Path) -> None:
    """Whole weights, beside an index of shards that are gone."""
    weight_map = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(read_weights(f))}
    write_json(f / "model.safetensors.index.json", {"weight_map": weight_map})


def two_shardings(f: Path) -> None:
    """The index names two shards; three older ones lie beside, with other values."""
    tensors = read_weights(f)
    (f / WHOLE).unlink()
    write_sharded(f, {n: t * 0.5 for n, t in tensors.items()}, 3)
    write_sharded(f, tensors, 2)


def whole_and_shards(f: Path) -> None:
    write_sharded(f, {n: t * 0.5 for n, t in read_weights(f).items()}, 2)


def stored_twice(f: Path, factor: float = 1.0, index: bool = True) -> None:
    """Two shards of one model that both have the norms of the first layer, as programs that merge models write."""
    tensors = read_weights(f)
    (f / WHOLE).unlink()
    write_sharded(f, tensors, 2, index)
    for shard in sorted(f.glob("model-*.safetensors")):
        some = {n: t.clone() for n, t in load_file(shard).items()}
        again = {n: t * factor for n, t in tensors.items() if "layers.0." in n and "norm" in n and n not in some}
        write_weights(f, {**some, **again}, shard.name)


def metadata_is_null(f: Path) -> None:
    raw = (f / WHOLE).read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps({**json.loads(raw[8:size]), "__metadata__": None}).encode()
    (f / WHOLE).write_bytes(len(header).to_bytes(8, "little") + header + raw[size:])


def adapter_beside(f: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    write_weights(f, {name: torch.ones(8, 64)}, "adapter_model.safetensors")
    write_json(f / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8})


def another_layer(f: Path) -> None:
    edited(lambda t: t.update({n.replace("layers.1.", "layers.2."): w.clone() for n, w in t.items() if "layers.1." in n}))(f)


# What is changed -> (change, what has to be said; "": nothing). transformers gives the same logits.
LOADED: dict[str, tuple[Change, str]] = {
    "as saved": (lambda f: None, ""),
    "shards": (resharded(), ""),
    "shards without index": (resharded(index=False), ""),
    "index of gone shards": (old_index, "index.json is out of date, ignored"),
    "index of Mistral's files": (then(resharded(), lambda f: write_json(
        f / "consolidated.safetensors.index.json", {"weight_map": {"x": "consolidated-00001-of-00001.safetensors"}})), ""),
    "second copy in shards": (whole_and_shards, "a second copy of the weights, ignored"),
    "two shardings": (two_shardings, "model-00002-of-00003.safetensors and 1 more: a second copy"),
    "tensors that shards repeat": (stored_twice, "2 tensors are stored twice, with the same values, e.g. model.layers.0."),
    "metadata null": (metadata_is_null, ""),
    "variant": (lambda f: write_weights(f, {n: t * 2 for n, t in read_weights(f).items()}, "model.fp16.safetensors"),
                "model.fp16.safetensors: a second copy"),
    "consolidated beside": (lambda f: write_weights(f, {"wte.weight": torch.ones(4, 4)}, "consolidated.safetensors"),
                            "consolidated.safetensors: weights in another layout beside the model; left out"),
    "adapter beside": (adapter_beside, "an adapter beside the model; it is not applied"),
    "more layers than configured": (another_layer, "the weights have 3 layers, config.json says 2"),
    "layers of MTP": (then(another_layer, lambda f: edit_config(f, num_nextn_predict_layers=1)), ""),
    "no prefix": (lambda f: renamed(f, lambda n: n.removeprefix("model.")), ""),
    "prefix twice": (lambda f: renamed(f, lambda n: "model." + n), ""),
    "stale quantization_config of FP8": (lambda f: edit_config(f, quantization_config=None, compression_config={}), ""),
    "buffers": (edited(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})), ""),
    "float32": (edited(lambda t: t.update({n: w.float() for n, w in t.items()})), ""),
    "bfloat16": (edited(lambda t: t.update({n: w.bfloat16() for n, w in t.items()})), ""),
}  # fmt: skip
TIED: dict[str, tuple[Change, str]] = {
    "as saved": (lambda f: None, ""),
    "only the head stored": (edited(lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})), ""),
    "both stored": (edited(lambda t: t.update({HEAD: t[EMBED].clone()})), ""),
    "both stored, with other values": (edited(lambda t: t.update({HEAD: t[EMBED].flip(0)})), ""),
    "class without head": (then(lambda f: edit_config(f, architectures=["LlamaModel"]),
                                lambda f: renamed(f, lambda n: n.removeprefix("model."))), "by its model_type 'llama'"),
}  # fmt: skip
ALL_LOADED = [("base", n) for n in LOADED] + [("tied", n) for n in TIED]


@pytest.mark.parametrize(("model", "case"), ALL_LOADED)
def test_what_transformers_loads_is_read_alike(model: str, case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    change, said = (LOADED if model == "base" else TIED)[case]
    folder = copied(request.getfixturevalue(model), tmp_path / "model")
    change(folder)
    if case in ("adapter beside", "shards without index"):  # it wants the adapter's model from the Hub, and an index
        wanted = transformers_logits(request.getfixturevalue(model))
    else:
        wanted = transformers_logits(folder)
    assert relative_error(our_logits(folder), wanted) < TOLERANCE
    warnings = load_spec(SourceModel(folder)).warnings
    assert any(said in w for w in warnings) if said else not warnings, warnings


def inner(n: str) -> str:
    return n.replace("layers.0.", "layers.0._orig_mod.").replace("layers.1.", "layers.1._checkpoint_wrapped_module.")


MARKED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda n: "_orig_mod." + n,
    "torch.compile of layers": inner,
    "DistributedDataParallel": lambda n: "module." + n,
    "both": lambda n: "module._orig_mod." + n,
    "FSDP": lambda n: "_fsdp_wrapped_module." + n.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "merged PEFT": lambda n: "base_model.model." + n,
    "merged PEFT with base layers": lambda n: "base_model.model." + n.replace("q_proj.weight", "q_proj.base_layer.weight"),
    "text part of a larger model": lambda n: "language_model." + n,
    "its new layout": lambda n: n.replace("model.", "model.language_model.", 1),
    "another root": lambda n: "transformer." + n.removeprefix("model."),
}


@pytest.fixture(scope="session")
def base_logits(base: Path) -> Tensor:
    return our_logits(base)


@pytest.mark.parametrize("case", MARKED)
def test_names_with_marks_and_prefixes(case: str, folder: Path, base_logits: Tensor) -> None:
    renamed(folder, MARKED[case])
    assert relative_error(our_logits(folder), base_logits) == 0
    stale = {MARKED[case](n): "model-00001-of-00001.safetensors" for n in read_weights(folder)}
    write_json(folder / "model.safetensors.index.json", {"weight_map": stale})
    assert relative_error(our_logits(folder), base_logits) == 0


# ---- what cannot be read -----------------------------------------------------------------------------------------------


def without_shard(f: Path) -> None:
    resharded(3)(f)
    (f / "model-00002-of-00003.safetensors").unlink()


def shard_in_a_folder(f: Path) -> None:
    """As an index of another tool names it."""
    resharded(3)(f)
    (f / "shards").mkdir()
    name, index = "model-00002-of-00003.safetensors", f / "model.safetensors.index.json"
    (f / name).rename(f / "shards" / name)
    index.write_text(index.read_text().replace(name, f"shards/{name}"))


def cut(f: Path, **sizes: int) -> None:
    edit_config(f, **sizes)

    def change(t: Tensors) -> None:
        for name, w in t.items():
            t[name] = w[:, :86] if "down_proj" in name else w[:86] if "up_proj" in name or "gate_proj" in name else w

    edited(change)(f)


def two_copies(f: Path) -> None:
    tensors = read_weights(f)
    (f / WHOLE).unlink()
    for parts in (2, 3):
        write_sharded(f, tensors, parts, index=False)


def lora_inside(t: Tensors) -> None:
    t["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(8, 64)


# What is wrong -> (change, words of the message and hint)
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing shard": (without_shard, ("model-00002-of-00003.safetensors", "missing", "download is incomplete")),
    "missing shard, no index": (then(without_shard, lambda f: (f / "model.safetensors.index.json").unlink()),
                                ("fetch model-00002-of-00003.safetensors",)),
    "shard in a folder": (shard_in_a_folder, ("shards/model-00002-of-00003.safetensors", "move what is in shards/ beside")),
    "fewer layers": (edited(lambda t: [t.pop(n) for n in list(t) if "layers.1." in n]),
                     ("the weights have 1 layers, config.json says 2", "num_hidden_layers")),
    "no head": (edited(lambda t: t.pop("lm_head.weight")), ("lm_head.weight is missing", '"tie_word_embeddings": true')),
    "head of a classifier": (edited(lambda t: t.update({"score.weight": t.pop(HEAD)[:2]})),
                             ("lm_head.weight is missing", "gives scores, not one for words")),
    "no embedding": (edited(lambda t: t.pop("model.embed_tokens.weight")), ("model.embed_tokens.weight is missing",)),
    "weights of another family": (lambda f: renamed(f, lambda n: n.replace("input_layer", "ln").replace("embed_", "w")),
                                  ("not those of a LlamaForCausalLM", "lm_head.weight")),
    "two copies, no telling": (two_copies, ("mixes two copies of the weights",)),
    "tensors that shards repeat with other values": (lambda f: stored_twice(f, 0.5), (
        "is in both", "and not the same there", "fetch or merge it again")),
    "the same without an index": (lambda f: stored_twice(f, 0.5, index=False), ("and not the same there",)),
    "adapter inside": (edited(lora_inside), ("1 tensors of an adapter that is not merged", "merge_and_unload")),
    "two models": (edited(lambda t: t.update({"a.b." + n.removeprefix("model."): t[n].clone() for n in list(t)} | {
        "c.d." + n.removeprefix("model."): t.pop(n) for n in list(t)})), ("weights of 2 models, under 'a.b.' and 'c.d.'",)),
    "sizes no multiple of 32": (lambda f: cut(f, intermediate_size=86),
                                ("model.layers.0.mlp.down_proj has 86 input features", "EXL2 needs multiples of 32")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_cannot_be_converted(case: str, folder: Path) -> None:
    change, words = REFUSED[case]
    change(folder)
    run = exl2ray("plan", "-i", folder, "-b", "3")
    run.ends_with(3, *words)
    assert "check architectures" not in run.text


def test_sizes_no_multiple_of_32_hide_nothing_else(folder: Path, tmp_path: Path) -> None:
    cut(folder, intermediate_size=86)
    (folder / "tokenizer.json").unlink()
    exl2ray("convert", "-i", folder, "-o", tmp_path / "w", "-b", "3", "--dry-run").ends_with(
        3, "has 86 input features", "EXL2 needs multiples of 32", "tokenizer"
    )


def test_an_adapter_and_foreign_settings_stay_out_of_the_output(folder: Path) -> None:
    adapter_beside(folder)
    for name in ("quantize_config.json", "hf_quant_config.json", "model.safetensors.index.json"):
        write_json(folder / name, {"weight_map": {}})
    assert side_files(folder) == ["generation_config.json", "tokenizer.json"]
