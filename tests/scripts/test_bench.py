"""The table of times of one layer: every pass and both qualities run, and are told apart."""

from __future__ import annotations

import json

import bench
import pytest


@pytest.mark.parametrize("quality", ["reference", "balanced"])
def test_a_layer_is_timed_and_profiled(
    quality: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.SHAPES, "tiny", bench.Shape(1, 64, 96, 4, 2))  # every column is some events for the profiler
    seen = []
    quantize = bench.quantize_module
    monkeypatch.setattr(bench, "quantize_module", lambda *a, **k: (seen.append(a[5].numerics), quantize(*a, **k))[1])
    sizes = ["--measure-rows", "2", "--quantize-rows", "4", "--tokens", "64", "--repeat", "0", "--profile", "3"]
    bench.main(["--shape", "tiny", "--device", "cpu", "--passes", "measure,quantize", "--quality", quality, "--json", *sizes])
    told = capsys.readouterr()
    rows = {row["work"]: row for row in json.loads(told.out)["rows"]}
    assert set(rows) == {f"{work} {part}" for work in ("measure", "quantize") for part in ("attention", "mlp", "layer")}
    assert all(row["seconds"] > 0 for row in rows.values())
    assert rows["quantize layer"]["seconds"] == pytest.approx(
        rows["quantize attention"]["seconds"] + rows["quantize mlp"]["seconds"], abs=2e-4
    )
    assert set(seen) == {bench.PRESETS[quality]}
    assert told.err.count("profile: ") == 4, "two halves, measured and quantised"
