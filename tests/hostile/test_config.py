"""Numbers in config.json that no model has: an error at once, whatever they would take if they were believed."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from oracles import ORACLES
from small_sources import LLAMA, MIXTRAL, write_exl2, write_source

from exl2ray.errors import SourceError
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.hyper import loader_config

HUGE = 2**31 - 1
NAN, INFINITE, BELOW = "<NaN>", "<1e999>", "<-Infinity>"  # json.dumps writes neither as files have them
DRY = ("-b", "4", "--device", "cpu", "--executor", "inline", "-l", "128", "-ml", "128", "--dry-run")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "llama": write_source(root / "llama"), "mixtral": write_source(root / "mixtral", MIXTRAL),
        "exl2": write_exl2(root / "exl2"), "exl2 mixtral": write_exl2(root / "exl2-mixtral", MIXTRAL),
    }  # fmt: skip


@pytest.fixture
def spoiled(models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a model with another config; weights are links, so that a case costs no room."""

    def make(name: str, **changes: Any) -> Path:
        directory = tmp_path / "model"
        directory.mkdir()
        for path in models[name].iterdir():
            os.link(path, directory / path.name)
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").unlink()
        text = json.dumps(config)
        for value in (NAN, INFINITE, BELOW):
            text = text.replace(f'"{value}"', value[1:-1])
        (directory / "config.json").write_text(text)
        return directory

    return make


def scaled(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, **settings}}


LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 2048, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {"original_max_position_embeddings": 2048, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"num_hidden_layers": HUGE}, "num_hidden_layers is 2147483647, but the weights hold 2 layers"),
    "layers, a few thousand": ({"num_hidden_layers": 9000}, "num_hidden_layers is 9000, but the weights hold 2 layers"),
    "layers, a few": ({"num_hidden_layers": 40}, "the weights have 2 layers, config.json says 40"),
    "layers beyond integers": ({"num_hidden_layers": 10**30}, "which no model has"),
    "layers infinite": ({"num_hidden_layers": INFINITE}, "num_hidden_layers is 1e999"),
    "layers as text": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; an integer is needed"),
    "layers 2.5": ({"num_hidden_layers": 2.5}, "an integer is needed"),
    "layers true": ({"num_hidden_layers": True}, "an integer is needed"),
    "layers null": ({"num_hidden_layers": None}, "num_hidden_layers"),
    "layers none": ({"num_hidden_layers": 0}, "a positive integer is needed"),
    "layers negative": ({"num_hidden_layers": -HUGE}, "a positive integer is needed"),
    "head_dim": ({"head_dim": HUGE - 1}, "head_dim is 2147483646, but no tensor of the weights is larger than 272"),
    "hidden": ({"hidden_size": HUGE}, "hidden_size is 2147483647, but no tensor"),
    "MLP": ({"intermediate_size": HUGE}, "intermediate_size is 2147483647, but no tensor"),
    "vocabulary": ({"vocab_size": HUGE}, "vocab_size is 2147483647, but no tensor"),
    "heads": ({"num_attention_heads": HUGE}, "num_attention_heads is 2147483647, but no tensor"),
    "key/value heads": ({"num_key_value_heads": HUGE}, "num_key_value_heads is 2147483647, but no tensor"),
    "more heads than width": ({"num_attention_heads": 128}, "128 attention heads cannot share"),
    "key/value heads that do not divide": ({"num_key_value_heads": 3}, "cannot share 3 key/value heads"),
    "context": ({"max_position_embeddings": 10**30}, "max_position_embeddings"),
    "context negative": ({"max_position_embeddings": -1}, "max_position_embeddings"),
    "base 0": ({"rope_theta": 0}, "rope_theta is 0"),
    "base 1 with yarn": ({"rope_theta": 1.0, **scaled("yarn", **YARN)}, "rope_theta is 1"),
    "base negative": ({"rope_theta": -10000.0}, "rope_theta is -10000"),
    "base 1e-300": ({"rope_theta": 1e-300}, "rope_theta is 1e-300"),
    "base huge": ({"rope_theta": 1e300}, "rope_theta"),
    "base NaN": ({"rope_theta": NAN}, "rope_theta is NaN"),
    "base minus infinite": ({"rope_theta": BELOW}, "rope_theta is -Infinity"),
    "hidden NaN": ({"hidden_size": NAN}, "hidden_size is NaN; an integer is needed"),
    "tied NaN": ({"tie_word_embeddings": NAN}, "tie_word_embeddings is NaN; true or false is needed"),
    "activation NaN": ({"hidden_act": NAN}, "the activation is NaN"),
    "architecture NaN": ({"architectures": [NAN], "model_type": NAN}, "architectures is [NaN], and model_type"),
    "kind of scaling NaN": (scaled(NAN, factor=2.0), "rope_scaling type 'NaN' is unknown"),
    "longrope, factor NaN": (scaled("longrope", **{**LONG, "long_factor": [NAN] * 8}), "that are not numbers"),
    "base infinite": ({"rope_theta": INFINITE}, "rope_theta is 1e999"),
    "base a long list": ({"rope_theta": ["x"] * 200_000}, "rope_theta is ['x', 'x'"),
    "base in two spellings": ({"rope_parameters": {"rope_theta": ["x"] * 200_000}}, "rope_theta is 10000.0, but"),
    "factor 0": (scaled("linear", factor=0), "rope_scaling.factor is 0"),
    "factor NaN": (scaled("linear", factor=NAN), "rope_scaling.factor is NaN"),
    "factor 1e300": (scaled("linear", factor=1e300), "rope_scaling.factor is 1e+300"),
    "yarn, factor negative": (scaled("yarn", **{**YARN, "factor": -4}), "rope_scaling.factor is -4"),
    "yarn, trained length 0": (scaled("yarn", **{**YARN, "original_max_position_embeddings": 0}), "is 0; a positive"),
    "llama3, equal bounds": (scaled("llama3", **{**LLAMA3, "high_freq_factor": 1.0}), "low_freq_factor 1 is not smaller"),
    "llama3, tiny bound": (scaled("llama3", **{**LLAMA3, "low_freq_factor": 1e-308}), "low_freq_factor is 1e-308"),
    "longrope, trained length 1": (scaled("longrope", **{**LONG, "original_max_position_embeddings": 1}), "from 2 to"),
    "longrope, factors too many": (scaled("longrope", **{**LONG, "long_factor": [1.0] * 100_000}), "100000 entries"),
    "longrope, factor 0": (scaled("longrope", **{**LONG, "long_factor": [0.0] * 8}), "long_factor holds entries"),
    "scaling a text": ({"rope_scaling": "\x1b[31mred"}, "rope_scaling is '\\x1b[31mred'; an object is needed"),
    "scaling a text in two spellings": (
        {"rope_scaling": "linear", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "rope_scaling is 'linear'; an object is needed",
    ),
    "longrope, factors too few": (scaled("longrope", **{**LONG, "long_factor": [1.0] * 7}), "7 entries; 8 numbers"),
    "longrope, no list": (scaled("longrope", **{**LONG, "long_factor": 1.0}), "long_factor has 1.0; 8 numbers"),
    "two kinds of scaling": ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "rope_scaling has type 'linear' and"),
    "rotated share of no dimension": ({"partial_rotary_factor": 0.01}, "RoPE rotates 0 of "),
    "scaling of no kind": (scaled("x" * 5000), "is unknown"),
    "rotated share": ({"partial_rotary_factor": 2.0}, "partial_rotary_factor is 2.0"),
    "eps as text": ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; a finite number is needed"),
    "eps negative": ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
    "eps huge": ({"rms_norm_eps": 1e30}, "rms_norm_eps is 1e+30"),
    "multiplier huge": ({"attention_multiplier": 1e300}, "attention_multiplier is 1e+300"),
    "scalar negative": ({"query_pre_attn_scalar": -4}, "query_pre_attn_scalar is -4"),
    "logits divided by nearly 0": ({"logits_scaling": 1e-308}, "logits_scaling is 1e-308"),
    "architecture of many letters": ({"architectures": ["A" * 100_000]}, "is not supported"),
    "architectures in each other": ({"architectures": [["LlamaForCausalLM"]]}, "architectures is [['LlamaForCausalLM']]"),
}  # fmt: skip
MIXTRAL_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"num_local_experts": HUGE}, "num_local_experts is 2147483647, but no tensor"),
    "experts, fewer than dimensions": ({"num_local_experts": 272}, "in 2 layers these are 1632 matrices"),
    "experts, some": ({"num_local_experts": 100}, "is missing"),
    "experts per token": ({"num_experts_per_tok": 5}, "5 experts per token, but only 4 experts"),
    "experts none": ({"num_local_experts": 0}, "a positive integer is needed"),
}


def refused(directory: Path, words: str) -> None:
    """A SourceError with ``words`` at once, of one screen whatever is in the file."""
    start = time.process_time()
    with pytest.raises(SourceError) as e:
        load_spec(SourceModel(directory))
    assert time.process_time() - start < 1
    assert words in str(e.value)
    assert e.value.hint
    assert len(str(e.value)) < 2000
    assert "\x1b" not in str(e.value)


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_at_once(case: str, spoiled: Callable[..., Path]) -> None:
    changes, words = CASES[case]
    refused(spoiled("llama", **changes), words)


@pytest.mark.parametrize("case", MIXTRAL_CASES)
def test_counts_of_experts_are_refused_at_once(case: str, spoiled: Callable[..., Path]) -> None:
    changes, words = MIXTRAL_CASES[case]
    refused(spoiled("mixtral", **changes), words)


SAMPLE = ("layers", "layers, a few", "layers infinite", "head_dim", "vocabulary", "base 0", "base 1 with yarn", "eps as text")


@pytest.mark.parametrize("case", SAMPLE)
def test_a_dry_run_ends_with_it(case: str, spoiled: Callable[..., Path], tmp_path: Path) -> None:
    changes, words = CASES[case]
    run = exl2ray("convert", "-i", spoiled("llama", **changes), "-o", tmp_path / "work", *DRY)
    run.ends_with(3, words)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("case", ["layers", "layers, a few", "head_dim", "eps huge"])
def test_plan_lists_it(case: str, spoiled: Callable[..., Path]) -> None:
    changes, words = CASES[case]
    exl2ray("plan", "-i", spoiled("llama", **changes), "-b", "4").ends_with(3, words)


EXL2_COMMANDS: dict[str, tuple[tuple[str, ...], int]] = {  # a sound inspection does not need the counts
    "eval": (("eval", "--device", "cpu", "--length", "32", "--rows", "1", "--model"), 3),
    "verify": (("verify",), 8),
    "inspect": (("inspect",), 0),
}


@pytest.mark.parametrize("command", EXL2_COMMANDS)
@pytest.mark.parametrize(
    ("model", "key"),
    [("exl2", "num_hidden_layers"), ("exl2", "head_dim"), ("exl2", "vocab_size"), ("exl2 mixtral", "num_local_experts")],
)
def test_quantised_models_are_bounded_alike(command: str, model: str, key: str, spoiled: Callable[..., Path]) -> None:
    arguments, status = EXL2_COMMANDS[command]
    directory = spoiled(model, **{key: HUGE})
    exl2ray(*arguments, directory).ends_with(status, *([key] if command == "eval" else []))


def test_the_models_are_sound_as_they_are(models: dict[str, Path]) -> None:
    """What the cases above refuse is what they changed."""
    for name in ("llama", "mixtral"):
        exl2ray("plan", "-i", models[name], "-b", "4").ends_with(0)
    for name in ("exl2", "exl2 mixtral"):
        exl2ray("verify", models[name]).ends_with(0, "sound")


FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "FIFO": (os.mkfifo, "a FIFO, not a regular file"),
    "directory": (Path.mkdir, "not a regular file"),
    "of 6 GB": (lambda p: (p.touch(), os.truncate(p, 6 << 30)), "larger than"),
    "of zeros": (lambda p: p.write_bytes(bytes(1 << 20)), "only zeros"),
    "UTF-16": (lambda p: p.write_bytes(json.dumps(LLAMA).encode("utf-16")), "UTF-16"),
    "LFS pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"), "git lfs pull"),
    "deep": (lambda p: p.write_text('{"a":' * 100_000), "nested too deeply"),
    "deep, and valid": (lambda p: p.write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    "a number of 100 000 digits": (lambda p: p.write_text('{"hidden_size": ' + "9" * 100_000 + "}"), "100000 digits"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_config_that_is_no_json_is_named(case: str, spoiled: Callable[..., Path], tmp_path: Path) -> None:
    make, words = FILES[case]
    directory = spoiled("llama")
    (directory / "config.json").unlink()
    make(directory / "config.json")
    refused(directory, words)
    if case in ("FIFO", "of 6 GB", "deep"):
        exl2ray("convert", "-i", directory, "-o", tmp_path / "work", *DRY).ends_with(3, words)
        exl2ray("verify", directory).ends_with(8, words)


# ---- every key of every family -------------------------------------------------------------------------------------------

NESTED: list[Any] = []
for _ in range(50):
    NESTED = [NESTED]
VALUES: list[Any] = [
    None, True, False, "text", "", "\x1b[31m", [], {}, -1, 0, 1, 2, 3, HUGE, HUGE + 1, 10**30, -(10**30), 10**299, 1e308,
    -1e308, 1e-308, 0.5, -0.0, math.nan, math.inf, NESTED, ["x"] * 10**6, {"a": NESTED}, [0] * 3, [1e308] * 16,
    {"rope_type": "yarn"},
    {"type": "su", "rope_type": "yarn"}, {"rope_type": "llama3", **{k: 0 for k in LLAMA3}}, {"rope_type": ["x"]},
]  # fmt: skip
KEYS = (
    "attention_bias", "attention_multiplier", "attn_config", "attn_logit_softcapping", "bos_token_id", "dim_model_base",
    "ffn_config", "final_logit_softcapping", "head_dim", "hidden_act", "layer_types", "logit_scale", "logits_scaling",
    "max_sequence_length", "max_window_layers", "mlp_bias", "moe_intermediate_size", "model_max_length", "n_inner",
    "norm_head", "num_key_value_heads", "original_max_position_embeddings", "partial_rotary_factor", "quantization_config",
    "query_pre_attn_scalar",
    "residual_multiplier", "rope_parameters", "rope_scaling", "rope_theta", "scale_depth", "scale_emb", "sliding_window",
    "sliding_window_pattern", "text_config", "tie_word_embeddings", "use_qk_norm", "use_sliding_window", "vision_config",
)  # fmt: skip
CASES_PER_FAMILY = 25


def keys_of(config: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*before, key)
        if isinstance(value, dict) and len(before) < 2:
            yield from keys_of(value, (*before, key))


def changed(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    out = dict(config)
    out[path[0]] = value if len(path) == 1 else changed(out.get(path[0]) or {}, path[1:], value)
    return out


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], SourceModel]:
    root = tmp_path_factory.mktemp("families")
    return lambda name: SourceModel(ORACLES[name](root / name).path)


@pytest.mark.parametrize("name", ORACLES)
def test_any_value_of_any_key_is_taken_or_refused(name: str, oracle: Callable[[str], SourceModel]) -> None:
    """Drawn with a fixed seed from all keys and values; each is described or a SourceError, in short time and words."""
    source = oracle(name)
    base, draw = source.config, random.Random(name)
    paths = sorted({*keys_of(base), *((k,) for k in KEYS)} - {("architectures",)})
    refusals: dict[tuple[str, ...], str] = {}
    for _ in range(CASES_PER_FAMILY):
        path, value = draw.choice(paths), draw.choice(VALUES)
        source.config = changed(base, path, value)
        start = time.process_time()
        try:
            spec = load_spec(source, misfits=[])
            loader_config(spec.arch, source.config)
        except SourceError as e:
            refusals[path] = str(e)
        except Exception as e:
            raise AssertionError(f"{'.'.join(path)} = {value!r:.80}") from e
        assert time.process_time() - start < 2, (path, f"{value!r:.80}")
    assert refusals
    assert max(map(len, refusals.values())) < 2000
