"""The option tables are the reference's, to the last bit of their accounting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exl2ray.errors import UsageError
from exl2ray.formats.layout import QParams
from exl2ray.quant.qparams import attention_options, distinct_options, head_option, mlp_options, option_tables, parse, unique


@pytest.fixture(scope="module")
def spec(shared_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((shared_dir / "spec" / "qparams.json").read_text())
    return loaded


def groups(option: QParams, k: int) -> list[int]:
    """Groups per width, as the specification's check lists them."""
    layout = option.layout(k)
    return [layout.bits.count(b) for b in option.bits]


def test_attention_table(spec: dict[str, Any]) -> None:
    rows = attention_options()
    assert len(rows) == spec["counts"]["attn"] == 19
    for row, expected in zip(rows, spec["attn"], strict=True):
        total = 0
        for role, option in zip("qkvo", row, strict=True):
            assert option == QParams.from_json(expected[role])
            assert groups(option, 4096) == expected["check"][role]["groups"]
            assert option.layout(4096).total_bits(4096) == expected["check"][role]["total_bits"]
            total += option.layout(4096).total_bits(4096)
        assert total == expected["check"]["total_bits"]


def test_mlp_table(spec: dict[str, Any]) -> None:
    rows = mlp_options()
    assert len(rows) == spec["counts"]["mlp"] == 17
    sizes = {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    for row, expected in zip(rows, spec["mlp"], strict=True):
        bits = {}
        for role, option in zip(sizes, row, strict=True):
            assert option == QParams.from_json(expected[role])
            assert groups(option, sizes[role][0]) == expected["check"][role]["groups"]
            bits[role] = option.layout(sizes[role][0]).total_bits(sizes[role][1])
            assert bits[role] == expected["check"][role]["total_bits"]
        assert sum(bits.values()) == expected["check"]["total_bits"]
        without_gate = (bits["up"] + bits["down"]) / (2 * 4096 * 11008)
        assert without_gate == pytest.approx(expected["check"]["bpw_without_gate"], abs=1e-6)


def test_head_options(spec: dict[str, Any]) -> None:
    assert len(spec["head"]) == 6
    for bits, expected in spec["head"].items():
        option = head_option(int(bits))
        assert option == QParams.from_json(expected)
        assert groups(option, 4096) == expected["check"]["groups"]
        assert option.layout(4096).total_bits(32000) == expected["check"]["total_bits"]
    with pytest.raises(UsageError, match=r"-hb 7.*2, 3, 4, 5, 6, 8"):
        head_option(7)


@pytest.mark.parametrize("table", ["attn", "mlp", "mlp_without_gate"])
def test_unique_settings(spec: dict[str, Any], table: str) -> None:
    rows = {"attn": attention_options(), "mlp": mlp_options(), "mlp_without_gate": mlp_options(gated=False)}[table]
    expected = spec["reduced"][table]
    for j, role in enumerate(expected["map_columns"]):
        distinct, index = unique([row[j] for row in rows])
        assert [option.desc for option in distinct] == expected["unique"][role]
        assert index == [row[j] for row in expected["map"]]


@pytest.mark.parametrize(
    ("roles", "counts"),
    [
        ("q_proj k_proj v_proj o_proj", (14, 14, 15, 14)),
        ("gate_proj up_proj down_proj", (13, 13, 14)),
        ("w1 w3 w2", (13, 13, 14)),
    ],
)
def test_distinct_options_of_each_role(roles: str, counts: tuple[int, ...]) -> None:
    """What memory is reckoned with (`exl2ray.quant.memory`)."""
    assert tuple(len(distinct_options(role)) for role in roles.split()) == counts
    assert distinct_options("lm_head") == ()


def test_tables_of_a_module() -> None:
    def found(*roles: str) -> list[tuple[str, ...]]:
        return [t.roles for t in option_tables(roles)]

    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert found(*mlp, *attention) == [attention, mlp]
    assert found(*mlp[1:], *attention) == [attention, mlp[1:]]
    assert found("w2", "w1", "w3") == [("w1", "w3", "w2")]
    assert found("lm_head") == []


@pytest.mark.parametrize("text", ["", "4b_128g", "1:4b", "1:xb_128g", "0.5:4b_128g/0.5"])
def test_malformed_option_text(text: str) -> None:
    with pytest.raises(UsageError, match="not of the form"):
        parse(text)
