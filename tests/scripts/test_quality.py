"""The instrument for quality: variants, calibration draws, statistics of the table, and a whole comparison of small scale."""

from __future__ import annotations

import argparse
import json
import lzma
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import predicted_kl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import quality
import quality_models
import quality_sizes
import quality_table
import quality_text
import torch
from quality_calibration import Calibration, Experiment

from exl2ray.calibration.rows import ROW_CATEGORIES, Rows
from exl2ray.calibration.text import builtin_documents
from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.errors import Exl2RayError, UsageError
from exl2ray.events import Silent
from exl2ray.recipe import Recipe
from exl2ray.store.file_names import CALIBRATION
from exl2ray.store.tensors import get_tensors

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
BITS = 3.0


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = [f"Line {i} of some text, with {i * i} and {i**3 % 1009} in it and {chr(97 + i % 26) * 3}." for i in range(99)]
    path = tmp_path_factory.mktemp("data") / "lines.parquet"
    pq.write_table(pa.table({"text": text}), path)
    return path


@pytest.fixture(scope="module")
def arguments(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two variants of the demo model: the second spends fewer bits on the head."""
    work = tmp_path_factory.mktemp("work")
    return ["--model", f"demo={DEMO}", "--variant", "plain:--quality reference",
            "--variant", "small head:--quality reference -hb 4", "--bits", str(BITS), "--calibration", str(parquet),
            "--draws", "1", "--work", str(work), "--log", str(work / "log.md"), "--rows", "3",
            "--length", "128", "--cal-length", "128", "--cal-rows", "6", "--measure-rows", "3", "--match-bytes",
            "--device", "cpu", "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def results(arguments: list[str]) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    try:
        assert quality.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    return quality_table.load([Path(arguments[arguments.index("--work") + 1]) / "results.jsonl"])


def test_sizes_are_matched(results: list[dict[str, Any]]) -> None:
    plain, small = results
    assert abs(small["file_bytes"] / plain["file_bytes"] - 1) <= quality_table.SAME_BYTES
    assert small["head_bpw"] < 5 < plain["head_bpw"]
    assert small["achieved_bpw"] > plain["achieved_bpw"] + 0.2  # where the head's bits went
    assert plain["bits"] == small["bits"] == BITS
    assert small["matched_bytes"] == plain["file_bytes"]


def test_figures_of_variants(results: list[dict[str, Any]]) -> None:
    """KL is small and positive, the source is the same for all, and the measurement is shared."""
    for result in results:
        assert len(result["rows"]["kl"]) == 3
        assert 0 < np.mean(result["rows"]["kl"]) < 0.5
        assert result["rows"]["source_nll"] == results[0]["rows"]["source_nll"]
    assert results[0]["measure_seconds"] > 0
    assert results[1]["measure_seconds"] == 0


def test_second_run_does_nothing(
    results: list[dict[str, Any]], arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise Exl2RayError("converted again")

    monkeypatch.setattr(quality.Study, "convert", refuse)
    monkeypatch.setattr(quality.torch, "set_num_threads", lambda n: None)
    assert quality.main([*arguments, "--any-source"]) == 0
    table = capsys.readouterr().out
    assert table.count("| demo |") == 5  # source and two variants, and both once more in the tails
    assert "!)" not in table
    assert quality.main([*arguments, "--any-source", "--bits", "3.5"]) == 1  # another bitrate is another result


def test_log(results: list[dict[str, Any]], arguments: list[str]) -> None:
    text = Path(arguments[arguments.index("--log") + 1]).read_text()
    assert text.startswith("\n## 2")
    assert "--model demo=models/demo" in text  # relative to the checkout
    assert "| demo | lines | 3 | small head |" in text


def test_key_depends_on_what_matters(arguments: list[str]) -> None:
    study = quality.Study(quality.parse_args(arguments))
    case = study.groups()[0][0]
    other_data = Calibration.parse("builtin")
    keys = [
        study.key(case, None), study.key(case, 7), study.key(replace(case, draw=1), None),
        study.key(replace(case, bits=3.5), None), study.key(replace(case, calibration=other_data), None),
        study.key(replace(case, variant=quality.Variant("x", "--quality reference --damping 0.1")), None),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert study.key(replace(case, variant=quality.Variant("renamed", "--quality reference")), None) == keys[0]


@pytest.mark.parametrize(
    ("options", "part"),
    [("-b 4", "bits"), ("--nonsense 1", "nonsense"), ("-c x.parquet", "cal_dataset"), ("-hb 7", "-hb 7"), ("'", "quot")],
)
def test_variant_refuses(options: str, part: str) -> None:
    with pytest.raises(UsageError) as e:
        quality.Variant("v", options).recipe(DEMO, Path("w"), 3.0, "cpu", {})
    assert part in str(e.value)


def test_variant_is_parsed_as_by_convert() -> None:
    recipe = quality.Variant("v", "-hb 8 --damping 0.03 --propagate reference").recipe(DEMO, Path("w"), 3.5, "cpu", {})
    assert (recipe.head_bits, recipe.damping, recipe.propagate, recipe.bits) == (8, 0.03, "reference", (3.5,))
    assert (recipe.executor, recipe.reuse, recipe.device) == ("inline", True, "cpu")


class _Linear:
    """A job whose quantised tensors take 1000 bytes per bit, in steps of ``step``."""

    def __init__(self, step: int = 1) -> None:
        self.step, self.solved = step, 0

    def allocate(self, measurement: object, bits: float) -> Any:
        self.solved += 1
        return argparse.Namespace(bits=bits, predicted_bytes=int(1000 * bits) * 1000 // self.step * self.step)


@pytest.mark.parametrize("target", [1_500_000, 2_990_000, 3_000_000, 3_100_000, 7_000_000])
@pytest.mark.parametrize("step", [1, 2000])
def test_matched_finds_the_bitrate(target: int, step: int) -> None:
    job: Any = _Linear(step)
    plan = quality_sizes.matched(partial(job.allocate, None), job.allocate(None, 3.0), target)
    assert abs(plan.predicted_bytes - target) <= max(step, quality_sizes.MATCHED * target) + 1000
    assert job.solved <= quality_sizes.MATCH_STEPS + 1


# ---- calibration ----------------------------------------------------------------------------------------------------


def test_draws_of_a_file_are_its_rows_in_another_order(parquet: Path, tmp_path: Path) -> None:
    calibration = Calibration.parse(str(parquet))
    recipes = [calibration.recipe(Recipe("m", "w", seed=5), draw, tmp_path) for draw in (0, 1, 2, 1)]
    texts = [pq.read_table(r.cal_dataset)["text"].to_pylist() for r in recipes]
    assert recipes[0].cal_dataset == str(parquet)
    assert recipes[1] == recipes[3]
    assert [r.seed for r in recipes] == [5, 6, 7, 6]
    assert sorted(texts[0]) == sorted(texts[1]) == sorted(texts[2])
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_draws_of_the_built_in_set_are_seeds(tmp_path: Path) -> None:
    recipe = Calibration.parse("builtin").recipe(Recipe("m", "w"), 3, tmp_path)
    assert (recipe.seed, recipe.cal_dataset) == (3, None)


def test_random_and_without() -> None:
    kinds = ("web", "code", "code", "multilingual", "shuffled")
    rows = Rows(torch.arange(5 * 128).reshape(5, 128), kinds, "built-in")
    drawn = Calibration.parse("random").change("measure", rows, 50, 0)
    assert drawn.ids.shape == rows.ids.shape
    assert 40 < int(drawn.ids.max()) < 50
    assert not torch.equal(drawn.ids, Calibration.parse("random").change("quantize", rows, 50, 0).ids)
    left = Calibration.parse("builtin-without:code").change("measure", rows, 50, 0)
    assert left.kinds == ("web", "multilingual", "shuffled")
    assert torch.equal(left.ids, rows.ids[[0, 3, 4]])
    assert Calibration.parse("builtin-without:multilingual").change("measure", rows, 50, 0).kinds == kinds[:3]


@pytest.mark.parametrize("name", ["random", "builtin-without:web"])
def test_workers_get_the_changed_rows(name: str, tmp_path: Path) -> None:
    recipe = Recipe(str(DEMO), str(tmp_path / "w"), length=128, measurement_length=128, executor="inline", device="cpu")
    with Experiment(recipe, Calibration.parse(name), Silent()) as job:
        stored = get_tensors(job.work.store, CALIBRATION)
    with Experiment(replace(recipe, out_dir=str(tmp_path / "b")), Calibration.parse("builtin"), Silent()) as job:
        built_in = get_tensors(job.work.store, CALIBRATION)
    for plan, rows in stored.items():
        if name == "random":
            assert rows.shape == built_in[plan].shape
            assert 1900 < int(rows.max()) < 2048  # of 2048 words
            assert (rows == built_in[plan]).float().mean() < 0.01
        else:
            web = getattr(ROW_CATEGORIES[0], plan)
            assert torch.equal(rows, built_in[plan][web:])


@pytest.mark.parametrize("text", ["builtin-without:nothing", "missing.parquet"])
def test_calibration_refuses(text: str) -> None:
    with pytest.raises(UsageError):
        Calibration.parse(text)


# ---- statistics -----------------------------------------------------------------------------------------------------


def made(variant: str, draw: int, kl: np.ndarray, size: int = 1000, **changes: Any) -> dict[str, Any]:
    rows = {"nll": (1 + kl).tolist(), "source_nll": [1.0] * len(kl), "kl": kl.tolist(), "top1": (1 - kl).tolist()}
    return {"model": "m", "calibration": "c", "bits": 3.0, "variant": variant, "draw": draw, "rows": rows,
            "file_bytes": size, "achieved_bpw": 3.0, "quantize_seconds": 1.0, "key": f"{variant}{draw}", "source": "s",
            **changes}  # fmt: skip


def test_paired_interval_is_much_narrower_than_the_figures_own() -> None:
    rng = np.random.default_rng(1)
    base = rng.lognormal(-3, 0.5, 64)
    first = {d: made("a", d, base * (1 + 0.02 * d)) for d in (0, 1)}
    second = {d: made("b", d, base * 0.8 * (1 + 0.02 * d) * rng.normal(1, 0.01, 64)) for d in (0, 1)}
    cells, ratio = quality_table.figures(second, first)
    assert ratio == pytest.approx(0.8, abs=0.005)
    low, high = quality_table.ratio_interval(np.array(second[0]["rows"]["kl"]), np.array(first[0]["rows"]["kl"]))
    assert low < 0.8 < high
    assert high - low < 0.01
    own_low, own_high = quality_table.interval(quality_table.stack(list(first.values()), "kl"))
    assert (own_high - own_low) / base.mean() > 0.1
    assert any("(0." in c and c.count("[") == 1 for c in cells)


def test_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        low, high = quality_table.interval(rng.exponential(1.0, (1, 64)))
        hits += low < 1.0 < high
    assert 175 <= hits <= 199  # 95 % nominal; the percentile bootstrap of a skewed mean covers a little less


def test_only_shared_draws_are_compared() -> None:
    kl = np.full(8, 0.1)
    _, ratio = quality_table.figures({0: made("b", 0, kl), 1: made("b", 1, kl * 9)}, {0: made("a", 0, kl * 2)})
    assert ratio == pytest.approx(0.5)
    assert quality_table.figures({1: made("b", 1, kl)}, {0: made("a", 0, kl)})[1] is None


def test_table() -> None:
    kl = np.linspace(0.1, 0.2, 8)
    results = [made("a", 0, kl), made("b", 0, kl / 2, 1002)]
    results += [made("c", 0, kl / 4, model="n"), made("a", 0, kl, model="n")]
    text = quality_table.render(results)
    assert "| 1002 (+0.20%!) |" in text
    assert "| 1000 |" in text
    assert "| b | 0.500 (of 1) |" in text
    assert "| c | 0.250 (of 1) |" in text
    assert len({line.count("|") for line in text.split("\n\n")[0].splitlines()}) == 1


def test_load_takes_the_last_and_leaves_out_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    old, new, newer = made("a", 0, np.ones(2)), made("a", 0, np.ones(2), 7), made("b", 0, np.ones(2))
    path.write_text(f'{json.dumps(old)}\n{json.dumps(new)}\n{json.dumps(old)[:50]}')
    assert quality_table.load([path, tmp_path / "missing"]) == [new]
    quality.append(path, json.dumps(newer))  # a run that goes on
    assert quality_table.load([path]) == [new, newer]


# ---- predictions ------------------------------------------------------------------------------------------------------


def test_predictions_of_results(tmp_path: Path) -> None:
    """Means over draws; a measurement without sensitivities predicts nothing."""
    common = {"model": "m", "bits": 3.0, "source": "s", "file_bytes": 1}
    results = [
        {**common, "variant": "a", "key": "0", "predicted_kl": 0.1, "rows": {"kl": [0.1, 0.3]}},
        {**common, "variant": "a", "key": "1", "predicted_kl": 0.3, "rows": {"kl": [0.4, 0.4]}},
        {**common, "variant": "b", "key": "2", "predicted_kl": None, "rows": {"kl": [0.4]}},
        {**common, "variant": "c", "key": "3", "rows": {}},
    ]
    (point,) = predicted_kl.of_results(results)
    assert (point.series, point.kind, point.bits) == ("m", "a", 3.0)
    assert (point.predicted, point.measured) == pytest.approx((0.2, 0.3))
    file = tmp_path / "r.jsonl"
    file.write_text("\n".join(map(json.dumps, results)))
    assert predicted_kl.main([str(file), "--output", str(tmp_path / "p.svg")]) == 0
    assert "<svg" in (tmp_path / "p.svg").read_text()
    file.write_text(json.dumps(results[2]))
    assert predicted_kl.main([str(file), "--output", str(tmp_path / "q.svg")]) == 2
    assert not (tmp_path / "q.svg").exists()


def test_predictions_of_the_log() -> None:
    """The table that docs/quality.md shows as a picture, and the figures that it names."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    points = predicted_kl.of_log((docs / "log.md").read_text(encoding="utf-8"))
    assert len(points) == 9 * 3
    first = points[0]
    assert (first.series, first.kind, first.bits, first.predicted, first.measured) == (
        "tiny-llama-7m", "module", 2.6, 0.408, 0.5153,
    )  # fmt: skip
    llama, mixtral = predicted_kl.agreement(points).splitlines()
    assert llama == "tiny-llama-7m: measured over predicted 1.02 to 1.26, mean 1.10"
    assert mixtral == "tiny-mixtral-8m: measured over predicted 0.78 to 0.99, mean 0.91"
    for i in range(0, len(points), 3):
        for of in ("predicted", "measured"):
            assert getattr(points[i], of) > getattr(points[i + 1], of) > getattr(points[i + 2], of)
    assert predicted_kl.of_log("# Nothing\n") == []


def test_heldout_text_shares_nothing_with_what_is_known(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    fresh = "".join(chr(97 + (i * i * 7 + i // 13) % 26) + " " * (i % 5 == 0) for i in range(3000))
    taken = next(d.text for d in builtin_documents() if d.kind == "essays")
    (folder / "fresh.txt").write_text(fresh)
    (folder / "copied.txt").write_text("Another beginning. " + taken[200:2200])
    tuning = tmp_path / "tuning.txt.xz"
    tuning.write_bytes(lzma.compress((fresh[:1500] * 2).encode()))
    assert quality_text.main([str(tmp_path / "a.jsonl"), f"mine={folder}", "--most", "20000"]) == 0
    found = quality_text.load(tmp_path / "a.jsonl")
    assert [d.name for d in found if d.kind == "mine"] == ["fresh.txt"], "calibration text is left out"
    assert {"code", "stories", "chat", "maths"} <= {d.kind for d in found}
    assert max(sum(len(d.text) for d in found if d.kind == k) for k in {d.kind for d in found}) <= 20_000
    quality_text.main([str(tmp_path / "b.jsonl"), f"mine={folder}", "--most", "20000", "--apart-from", str(tuning)])
    assert "mine" not in {d.kind for d in quality_text.load(tmp_path / "b.jsonl")}
    with load_tokenizer(str(DEMO), {}, 4096) as tokenizer:
        ids, kinds = quality_text.heldout_rows(found, tokenizer, 64, most=3)
    assert ids.shape == (len(kinds), 64)
    assert all(kinds.count(k) == 3 for k in ("code", "stories"))


def test_figures_by_kind_and_tails() -> None:
    kl = torch.tensor([[0.1] * 99 + [5.0], [0.3] * 100, [0.4] * 100]).double()
    found = {**quality_models.figures_of({"kl": kl}, ("code", "chat", "chat")), "model": "m", "bits": 3.0, "variant": "v",
             "draw": 0}  # fmt: skip
    assert found["rows"]["kl"][1:] == [pytest.approx(0.3), pytest.approx(0.4)]
    assert found["tails"] == {"kl_p90": pytest.approx(0.4), "kl_p99": pytest.approx(0.4), "kl_p999": pytest.approx(5.0)}
    table = quality_table.by_kind([found])
    assert "| 0.1490 | 0.3500 ± 0.0500 |" in table.splitlines()[-1]
    assert "| 90 % | 99 % | 99.9 % |" in quality_table.tails([found])
