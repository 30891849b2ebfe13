"""Folders and command lines that nobody thought of first: absent keys, stray tensors, clutter, what pasting does to flags."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bounded import exl2ray
from model_folders import (
    WHOLE,
    copied,
    edit_config,
    edited,
    our_logits,
    read_weights,
    relative_error,
    transformers_logits,
    write_json,
    write_sharded,
    write_weights,
)
from tiny_models import write_text

from exl2ray.errors import UsageError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.source.architecture_name import BY_MODEL_TYPE
from exl2ray.given_paths import refuse_unexpanded
from exl2ray.model.arch import load_spec
from exl2ray.model.class_defaults import CLASS_DEFAULTS
from exl2ray.model.hyper import Hyper, loader_config, resolve_hyper
from exl2ray.model.table import ARCHITECTURES
from exl2ray.recipe import Recipe
from exl2ray.terminal.pasted import missing_folder_hint, usage_hint

Change = Callable[[Path], Any]
NOT_IN_TRANSFORMERS = {"Yi", "gemmoe", "index", "internlm2", "minicpm", "orion"}
FAMILIES = sorted(set(BY_MODEL_TYPE) - NOT_IN_TRANSFORMERS)
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 300, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "norm_topk_prob": True,
}  # fmt: skip
# Not decided by an absent key: ids are the tokenizer's too; ties are found by which of the two tensors is stored.
OTHER = {"bos_token_id", "tie_embeddings"}
# transformers and the loader run nothing of the kind, or refuse the family's default
REFUSED_DEFAULTS = {("qwen3_moe", "norm_topk_prob"), ("qwen3_moe", "num_experts_per_tok")}


# ---- absent keys of config.json ----------------------------------------------------------------------------------------


def hyper_of(kind: str, config: dict[str, Any]) -> Hyper:
    name = BY_MODEL_TYPE[kind]
    return resolve_hyper(ARCHITECTURES[name], {**config, "architectures": [name], "model_type": kind})


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_absent_key_means_what_transformers_takes(kind: str) -> None:
    """Every key of the family left out, one after the other, and all but the sizes at once."""
    cls = type(transformers.AutoConfig.for_model(kind))
    whole = json.loads(json.dumps(cls().to_dict()))
    nested = "text_config" in whole
    text = {k: v for k, v in (whole["text_config"] if nested else whole).items() if k != "layer_types"}
    text |= {k: v for k, v in SIZES.items() if k in text}
    vision = {"vision_config": {"model_type": "pixtral"}} if kind in ("llava", "mistral3") else {}
    compared = 0
    for left_out in (*text, None):
        if left_out == "model_type" or (kind, left_out) in REFUSED_DEFAULTS:
            continue
        some = {k: v for k, v in text.items() if (k in SIZES if left_out is None else k != left_out)}
        if nested:
            some = {"text_config": {**some, "model_type": text["model_type"]}, **vision}
        filled = json.loads(json.dumps(cls.from_dict(json.loads(json.dumps(some))).to_dict()))
        of_text = filled.get("text_config", filled)
        if left_out == "num_key_value_heads" and of_text["num_key_value_heads"] > SIZES["num_attention_heads"]:
            continue  # no model has more key/value heads than heads
        wanted = hyper_of(kind, filled)
        found = hyper_of(kind, some)
        differing = {f.name for f in fields(Hyper) if getattr(found, f.name) != getattr(wanted, f.name)} - OTHER
        assert not differing, (left_out, {d: (getattr(found, d), getattr(wanted, d)) for d in differing})
        written = loader_config(ARCHITECTURES[BY_MODEL_TYPE[kind]], {**some, "architectures": [BY_MODEL_TYPE[kind]]})
        again = resolve_hyper(ARCHITECTURES[BY_MODEL_TYPE[kind]], {**written, "architectures": [BY_MODEL_TYPE[kind]]})
        assert again == found
        compared += 1
    assert compared > 10 or kind == "dbrx"


def test_every_family_of_transformers_has_defaults() -> None:
    text = {"gemma3": "gemma3_text", "qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
    assert {text.get(k, k) for k in FAMILIES} - {"llava", "mistral3"} == set(CLASS_DEFAULTS)


def without(*keys: str) -> Change:
    return lambda f: edit_config(f, **dict.fromkeys(keys))


ABSENT: dict[str, tuple[str, dict[str, Any], Change]] = {
    "eps": ("Llama", {"rms_norm_eps": 1e-6}, without("rms_norm_eps")),
    "key/value heads, Mistral": ("Mistral", {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 16},
                                 without("num_key_value_heads")),
    "heads": ("Llama", {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 8}, without("num_attention_heads")),
    "experts": ("Mixtral", {"num_local_experts": 8}, without("num_local_experts", "num_experts_per_tok")),
    "GLM-4": ("Glm4", {"head_dim": 128, "attention_bias": True}, without("head_dim", "rms_norm_eps", "rope_parameters",
                                                                          "attention_bias", "num_key_value_heads")),
    "nearly all": ("Llama", {"rms_norm_eps": 1e-6}, lambda f: write_json(f / "config.json", {
        k: v for k, v in json.loads((f / "config.json").read_text()).items()
        if k in SIZES or k in ("architectures", "model_type")})),
}  # fmt: skip


@pytest.mark.parametrize("case", ABSENT)
def test_models_whose_config_leaves_keys_out(case: str, families: Callable[..., Path]) -> None:
    family, config, change = ABSENT[case]
    folder = families(family, **config)
    change(folder)
    assert relative_error(our_logits(folder), transformers_logits(folder)) < 3e-6


def test_an_absent_size_that_does_not_fit_is_named(folder: Path) -> None:
    edit_config(folder, vocab_size=None)
    exl2ray("plan", "-i", folder, "-b", "4").ends_with(3, "vocab_size is absent, and 32000 by default", "add vocab_size")


# ---- weights and clutter -----------------------------------------------------------------------------------------------


def added(**tensors: torch.Tensor) -> Change:
    return edited(lambda t: t.update({n.replace("__", "."): w for n, w in tensors.items()}))


def copies_below(f: Path) -> None:
    for name in ("original", "fp32", "onnx", ".ipynb_checkpoints", "checkpoint-500"):
        (f / name).mkdir()
        write_weights(f / name, {n: t * 2 for n, t in read_weights(f).items()})


def clutter(f: Path) -> None:
    cache = f / ".cache/huggingface/download"
    cache.mkdir(parents=True)
    (f / ".git").mkdir()
    for path in (f / ".DS_Store", f / "._model.safetensors", f / "Thumbs.db", cache / "model.safetensors.lock",
                 cache / "abc.incomplete", f / "model-00001-of-00002.safetensors.part",
                 f / "training_args.bin", f / "optimizer.pt", f / "m.Q4_K_M.gguf", f / "imatrix.dat"):  # fmt: skip
        path.write_bytes(b"\0\5\x16\7")


def pickles_beside(f: Path) -> None:
    torch.save({n: t * 2 for n, t in read_weights(f).items()}, f / "pytorch_model.bin")
    write_json(f / "pytorch_model.bin.index.json", {"weight_map": {"x": "pytorch_model-00001-of-00002.bin"}})


def dotted_index(f: Path) -> None:
    tensors = read_weights(f)
    (f / WHOLE).unlink()
    write_sharded(f, tensors, 2)
    path = f / f"{WHOLE}.index.json"
    index = json.loads(path.read_text())
    write_json(path, {**index, "weight_map": {n: f"./{file}" for n, file in index["weight_map"].items()}})


def line_ends(f: Path) -> None:
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        (f / name).write_bytes((f / name).read_bytes().replace(b"\n", b"\r\n"))


LAYER = "model__layers__0__self_attn__"
# Nothing is to be said about any of these.
QUIET: dict[str, Change] = {
    "frequencies of RoPE, float64": added(**{LAYER + "rotary_emb__inv_freq": torch.ones(8).double()}),
    "tables of RoPE": added(**{LAYER + "rotary_emb__cos_cached": torch.ones(4, 8),
                               LAYER + "rotary_emb__sin_cached": torch.ones(4, 8)}),
    "complex frequencies": added(freqs_cis=torch.polar(torch.ones(4, 4), torch.ones(4, 4))),
    "masks": added(**{LAYER + "masked_bias": torch.tensor(-1e4)}),
    "positions": added(model__position_ids=torch.arange(10)[None]),
    "all float64": edited(lambda t: t.update({n: w.double() for n, w in t.items()})),
    "norms float64": edited(lambda t: t.update({n: w.double() for n, w in t.items() if "norm" in n})),
    "three dtypes": edited(lambda t: t.update({
        n: w.float() if "norm" in n else w.bfloat16() if "layers.0" in n else w for n, w in t.items()})),
    "copies in folders below": copies_below,
    "clutter": clutter,
    "pickles beside": pickles_beside,
    "an index with ./": dotted_index,
    "line ends of Windows": line_ends,
    "torch_dtype": lambda f: edit_config(f, dtype=None, torch_dtype="bfloat16"),
    "torch.float16": lambda f: edit_config(f, dtype="torch.float16"),
    "code of its own": lambda f: edit_config(f, auto_map={"AutoModelForCausalLM": "modeling_x.MyLlama"}),
    "tensor parallel": lambda f: edit_config(f, pretraining_tp=2),
    "swish": lambda f: edit_config(f, hidden_act="swish"),
}  # fmt: skip


@pytest.mark.parametrize("case", QUIET)
def test_folders_that_need_no_word(case: str, folder: Path) -> None:
    QUIET[case](folder)
    if case == "torch.float16":  # transformers does not read this spelling, which other programs write
        edit_config(copied(folder, folder.parent / "plain"), dtype="float16")
        wanted = transformers_logits(folder.parent / "plain")
    else:
        wanted = transformers_logits(folder)
    assert relative_error(our_logits(folder), wanted) < 3e-6
    assert load_spec(SourceModel(folder)).warnings == ()


def test_upper_case_names(folder: Path, base: Path) -> None:
    (folder / WHOLE).rename(folder / WHOLE.upper())
    assert torch.equal(our_logits(folder), our_logits(base))


# ---- where folders are, and what people type ---------------------------------------------------------------------------

FLAGS = ("-b", "4", "-l", "128", "-ml", "128", "-r", "2", "-mr", "2", "--device", "cpu", "--quality", "reference",
         "--evaluate", "never")  # fmt: skip


def test_a_snapshot_of_the_hubs_cache_of_float64(base: Path, tmp_path: Path) -> None:
    """All files are links to blobs: nothing is said of them. Norms in float64 become float16 in the output."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = Path(shutil.copytree(base, repository / "blobs"))
    QUIET["norms float64"](blobs)
    for file in sorted(blobs.iterdir()):
        os.symlink(f"../../blobs/{file.name}", snapshot / file.name)
    data = write_text(tmp_path / "text.parquet")
    place = tmp_path / "a folder (v1) ü 模型"
    place.mkdir()
    for source, out in ((snapshot, place / "one-{bpw}bpw"), (Path("link"), Path("two"))):
        if not source.is_absolute():
            os.symlink(snapshot, place / source)
        work = place / f"work-{out.name[:3]}"
        run = exl2ray("convert", "-i", f"{source}/", "-o", work, "-cf", f"{out}/", "-c", data, *FLAGS, cwd=place, seconds=60)
        run.ends_with(0)
        assert "are links out of" not in run.text
        made = place / str(out).replace("{bpw}", "4.0")
        exl2ray("verify", made, "-i", snapshot).ends_with(0, "sound")


def test_a_source_that_others_own_and_nobody_may_write(folder: Path, tmp_path: Path) -> None:
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    exl2ray("plan", "-i", folder, "-o", tmp_path / "w", "-cf", tmp_path / "o", *FLAGS[:6]).ends_with(0)
    folder.chmod(0o755)


PLACES: dict[str, tuple[tuple[str, ...], str]] = {
    "target is the source": (("-i", "M", "-o", "W", "-cf", "M"), "the output directory (-cf) is the source model (-i)"),
    "target is the source, otherwise written": (("-i", "M/", "-o", "W", "-cf", "./W/../M"), "is the source model (-i)"),
    "work directory is the source": (("-i", "M", "-o", "M", "-cf", "O"), "the work directory (-o) is the source model (-i)"),
    "target is the work directory": (("-i", "M", "-o", "W", "-cf", "W"), "is the work directory (-o)"),
    "a measurement that is a folder": (("-i", "M", "-o", "W", "-cf", "O", "-m", "M"), "-m M: is a directory"),
    "a dash of print": (("\u2013i", "M", "-o", "W"), "a dash of print"),
    "source in quotes": (("-i", "~/M", "-o", "W", "-cf", "O"), "the shell leaves ~ and variables as they are"),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_that_cannot_be(case: str, folder: Path) -> None:
    folder.rename(folder.parent / "M")
    arguments, words = PLACES[case]
    run = exl2ray("convert", *arguments, "-b", "4", "--dry-run", cwd=folder.parent, env={"HOME": str(folder.parent)})
    run.ends_with(2, words)


UNEXPANDED = [
    (("status", "~/w"), "WORKDIR ~/w", "give {home}/w"), (("status", "$HOME/w"), "WORKDIR $HOME/w", "give {home}/w"),
    (("plan", "-i", "{home}", "-o", "~/w"), "-o ~/w", "give {home}/w"),
    (("plan", "-i", "{home}", "-o", "w", "-cf", "${{HOME}}/o"), "-cf ${{HOME}}/o", "give {home}/o"),
    (("solve", "-i", "{home}", "-m", "~/m.json"), "-m ~/m.json", "give {home}/m.json"),
    (("eval", "M", "--text", "~/t.txt"), "--text ~/t.txt", "give {home}/t.txt"),
    (("tune", "M", "--reference", "$HOME", "-o", "o"), "--reference $HOME", "give {home}"),
    (("convert", "-i", "{home}", "-o", "C:\\My w", "-b", "4"), "-o C:\\My w: a path of Windows", "in WSL give '/mnt/c/My w'"),
    (("verify", "d:/models/x"), "d:/models/x: a path of Windows", "in WSL give /mnt/d/models/x"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says", "hint"), UNEXPANDED, ids=lambda x: x[0] if isinstance(x, tuple) else "")
def test_what_the_shell_did_not_expand_becomes_no_folder(
    arguments: tuple[str, ...], says: str, hint: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    given = [a.format(home=home) for a in arguments]
    run = exl2ray(*given, cwd=tmp_path, env={"HOME": str(home)})
    run.ends_with(2, says.format(home=home), hint.format(home=home))
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


def test_what_is_there_under_such_a_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("~", "$HOME", "c:"):
        (tmp_path / name).mkdir()
    for path in ("~/w", "$HOME/w", "c:/w", "c:", "a~/b", "w$", "$UNSET/x", "hf://a/$HOME", "{bpw}"):
        refuse_unexpanded("-o", path)


@pytest.mark.parametrize(("path", "why"), [("a\0b", "zero byte"), ("a\ud800", "half a character"), ("x" * 300, "300 bytes")])
def test_what_no_file_system_takes(path: str, why: str) -> None:
    for name in ("in_dir", "out_dir", "compile_full", "output_measurement", "measurement"):
        with pytest.raises(UsageError, match=why):
            Recipe(**{"in_dir": "m", "out_dir": "w", name: path})


def test_hints_for_pasted_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usage_hint(["-i", "m", "-o", "w"], "exl2ray") == "the command comes first: exl2ray convert -i m -o w"
    assert usage_hint(["convert.py", "-i", "m"], "exl2ray") == "the command comes first: exl2ray convert -i m"
    for argv in (["convert", "--wrong"], ["convert", "-b", "3", "-b", "4", "-x"], ["convert", "-o", str(tmp_path), "-x"]):
        assert usage_hint(argv, "exl2ray convert") == "see exl2ray convert --help"
    assert "behind --: " in usage_hint(["submit", "convert", "-i", "m"], "exl2ray submit")
    assert usage_hint(["submit", "-x", "--", "convert"], "exl2ray submit") == "see exl2ray submit --help"
    for bits in (["-b", "3", "4.5"], ["-b", "3,4.5"], ["--bits=3,4.5"], ["-b", "3 4.5"], ["-b", "3;4.5"], ["-b", "3, 4.5"]):
        hint = usage_hint(["convert", "-i", "m", *bits, "-o", "w"], "exl2ray convert")
        assert hint == "a number with each -b: -b 3 -b 4.5"
    assert usage_hint(["plan", "-b", "3bpw"], "exl2ray plan") == "a number with each -b: -b 3"
    for size in (["-ss", "8GB"], ["-ss=8g"], ["--shard_size", "8192 MiB"], ["--shard-size=8192M"]):
        assert usage_hint(["convert", "-i", "m", *size], "exl2ray convert") == "-ss is a number of MiB: -ss 8192"
    for gpus in (["--gpus", "0,1"], ["--gpus=0,1"]):
        assert "CUDA_VISIBLE_DEVICES=0,1 exl2ray" in usage_hint(["convert", "-i", "m", *gpus], "exl2ray convert")
    assert "CUDA_VISIBLE_DEVICES=1 exl2ray" in usage_hint(["eval", "--device", "cuda:1"], "exl2ray eval")
    assert usage_hint(["convert", "--gpus", "2", "-x"], "exl2ray convert") == "see exl2ray convert --help"
    for model in (str(tmp_path), "hf://me/model"):
        assert usage_hint(["convert", model, "-b", "3"], "exl2ray convert") == f"a model is given with its flag: -i {model}"
    monkeypatch.setenv("MODELS", str(tmp_path))
    assert str(tmp_path) in missing_folder_hint("$MODELS")
    assert "config.json" in missing_folder_hint("$MODELS/gone")
    exl2ray("-i", "m", "-o", "w").ends_with(2, "the command comes first: exl2ray convert -i m -o w")
    exl2ray("convert", "-i", "m", "-o", "w", "-b", "3", "4").ends_with(2, "extra argument (4)", "with each -b: -b 3 -b 4")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for command in (("plan", "-b", "3", "-i"), ("eval",), ("chat", "--prompt", "x")):
        exl2ray(*command, tmp_path / "link").ends_with(2 if "-i" in command else 3, "gone, which does not exist")
