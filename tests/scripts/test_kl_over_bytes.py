"""The curves of KL over bytes: what counts in a table, and that the plot in the docs is that of the table in the log."""

from __future__ import annotations

from pathlib import Path

import kl_over_bytes
import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = """text
| bpw | other |
|---|---|
| 3.0 | 1 |

| bpw | file, MB | A | B |
|---|---|---|---|
| 2.5 | 10.5 | 1.5 | **0.5** (0.33) |
| 3.0 | 12.0 | - | 0.2; later 0.1 |

| bpw | file, MB | C |
"""


def test_cells_count_by_their_first_number() -> None:
    assert kl_over_bytes.of_log(TABLE) == {"A": [(10.5, 1.5)], "B": [(10.5, 0.5), (12.0, 0.2)]}
    assert kl_over_bytes.of_log("nothing") == {}
    assert kl_over_bytes.of_log(TABLE, "entry") == {}, "no such heading"
    later = f"{TABLE}\n## An entry\n\n| bpw | file, MB | D |\n|---|---|---|\n| 2 | 1 | 3 |"
    assert kl_over_bytes.of_log(later, "An entry") == {"D": [(1.0, 3.0)]}
    assert kl_over_bytes.of_log(f"## Without\n\n### Below\n\n{TABLE}", "Without") == kl_over_bytes.of_log(TABLE)
    assert kl_over_bytes.of_log(f"## Without\n\ntext\n{later[len(TABLE):]}", "Without") == {}, "that of the next entry"


def test_draws_are_averaged(tmp_path: Path) -> None:
    def result(variant: str, bits: float, draw: int, kl: float) -> dict[str, object]:
        size = int(bits * 1e6)
        return {"model": "m", "variant": variant, "bits": bits, "draw": draw, "file_bytes": size, "rows": {"kl": [kl]}}

    results = [result("v", 4.0, 0, 0.1), result("v", 4.0, 1, 0.3), result("v", 3.0, 0, 1.0)]
    assert kl_over_bytes.of_results(results, None) == {"v": [(3.0, 1.0), (4.0, pytest.approx(0.2))]}
    assert kl_over_bytes.main(["--output", str(tmp_path / "x.svg")]) == 2


@pytest.mark.parametrize(
    ("name", "entry", "count"),
    [("kl-over-bytes", "KL over bytes, two passes", 5), ("kl-over-bytes-gemma", "Gemma 3 270M without", 5)],
)
def test_the_plots_are_those_of_the_log(tmp_path: Path, name: str, entry: str, count: int) -> None:
    made = tmp_path / "made.svg"
    assert kl_over_bytes.main(["--log", str(ROOT / "docs/log.md"), "--entry", entry, "--output", str(made)]) == 0
    curves = kl_over_bytes.of_log((ROOT / "docs/log.md").read_text(encoding="utf-8"), entry)
    assert len(curves) == count
    assert made.stat().st_size > 5000
    assert (ROOT / f"docs/{name}.svg").stat().st_size == pytest.approx(made.stat().st_size, rel=0.2)
