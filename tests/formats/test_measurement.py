"""measurement.json: exchange with the reference, and refusal of files that do not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.errors import FormatError, StoreError
from exl2ray.formats.layout import LinearShape, QParams
from exl2ray.formats.measurement import (
    Measurement,
    ModuleProfile,
    OptionProfile,
    check_against,
    parse_measurement,
    read_measurement,
    write_measurement,
)

ATTN = {"q_proj": (256, 256), "k_proj": (256, 128), "v_proj": (256, 128), "o_proj": (256, 256)}
MLP = {"gate_proj": (256, 704), "up_proj": (256, 704), "down_proj": (704, 256)}
SHAPES = {
    f"model.layers.{i}.{mode}": {role: [LinearShape(*s)] for role, s in roles.items()}
    for i in range(6)
    for mode, roles in (("self_attn", ATTN), ("mlp", MLP))
}
ENTRIES = [*SHAPES, "model.norm.norm", "lm_head.linear"]


@pytest.fixture(scope="session")
def golden(shared_dir: Path) -> Path:
    return shared_dir / "golden" / "tiny-llama-7m-measurement.json"


def test_reference_file_round_trips_to_the_same_bytes(golden: Path, tmp_path: Path) -> None:
    write_measurement(tmp_path / "m.json", read_measurement(golden))
    assert (tmp_path / "m.json").read_bytes() == golden.read_bytes()


def test_reference_file_describes_its_model(golden: Path) -> None:
    m = read_measurement(golden)
    check_against(m, ENTRIES, SHAPES)
    assert [len(m[k].options) for k in list(SHAPES)[:2]] == [19, 17]
    assert m["lm_head.linear"].slots() == []
    assert m.last_module_idx == 14


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, s: (e[:-1], s), "'lm_head.linear'"),
        (lambda e, s: ([*e, "model.layers.6.mlp"], s), "missing, first 'model.layers.6.mlp'"),
        (
            lambda e, s: (e, {**s, "model.layers.2.mlp": {"up_proj": [LinearShape(256, 704)]}}),
            "'model.layers.2.mlp' has the linears",
        ),
        (
            lambda e, s: (e, {**s, e[0]: {**s[e[0]], "q_proj": [LinearShape(256, 512)]}}),
            "'model.layers.0.self_attn', option 0: total_bits is 488192",
        ),
        (
            lambda e, s: (e, {**s, e[0]: {**s[e[0]], "q_proj": [LinearShape(256, 256, True)]}}),
            "total_bits is 488192; the model's shapes give 492288",
        ),
    ],
)
def test_measurement_of_another_model_is_refused(golden: Path, change, message: str) -> None:
    with pytest.raises(FormatError) as e:
        check_against(read_measurement(golden), *change(ENTRIES, SHAPES))
    assert message in str(e.value)
    assert "measure again" in e.value.hint


qparams = st.sampled_from(
    [
        QParams((4,), (1.0,), (128,)),
        QParams((3, 2), (0.05, 0.95), (64, 64)),
        QParams((8, 4), (0.1, 0.9), (32, 128)),
        QParams((6, 5), (0.25, 0.75), (128, 64)),
    ]
)


def options_of(roles: list[str]) -> st.SearchStrategy[tuple[OptionProfile, ...]]:
    option = st.builds(
        OptionProfile,
        st.floats(1e-6, 1.0),
        st.integers(1, 2**50),
        st.fixed_dictionaries({r: qparams for r in roles}),
    )
    return st.lists(option, min_size=1, max_size=3).map(tuple)


values = st.recursive(
    st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=4), st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=12,
)
profiles = st.one_of(
    st.builds(ModuleProfile, st.just("m.layers.0"), st.just("mlp"), options_of(["up_proj", "down_proj"])),
    st.builds(
        ModuleProfile,
        st.just("m.layers.1"),
        st.just("parallel_decoder"),
        attn=options_of(["q_proj", "o_proj"]),
        mlp=options_of(["up_proj"]),
        extra=st.dictionaries(st.text(max_size=5), values, max_size=2),
    ),
    st.builds(ModuleProfile, st.just("lm_head"), st.just("linear")),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(profiles, min_size=1, max_size=3, unique_by=lambda p: p.entry_key), st.integers(0, 500))
def test_any_measurement_round_trips(entries: list[ModuleProfile], index: int) -> None:
    m = Measurement(tuple(entries), index)
    again = parse_measurement(m.to_bytes(), "m.json")
    assert again == m
    assert again.to_bytes() == m.to_bytes() == json.dumps(m.to_json(), indent=4).encode()


def test_extra_data_stays_out_of_the_reference_part() -> None:
    option = OptionProfile(0.5, 1000, {"up_proj": QParams((4,), (1.0,), (128,))})
    with_extra = ModuleProfile("m.layers.0", "mlp", (option,), extra={"seconds": 1.5})
    obj = Measurement((with_extra,), 1).to_json()
    plain = Measurement((dataclasses.replace(with_extra, extra={}),), 1).to_json()
    assert obj["exl2ray"] == {"m.layers.0.mlp": {"seconds": 1.5}}
    assert {k: obj[k] for k in plain} == plain
    assert "exl2ray" not in plain


def test_nan_is_not_written(tmp_path: Path) -> None:
    option = OptionProfile(float("nan"), 1000, {"up_proj": QParams((4,), (1.0,), (128,))})
    with pytest.raises(FormatError, match="NaN"):
        write_measurement(tmp_path / "m.json", Measurement((ModuleProfile("m", "mlp", (option,)),), 1))
    for hidden in (float("inf"), [1.0, float("nan")], {"a": [[float("-inf")]]}):
        with pytest.raises(FormatError, match="NaN"):
            Measurement((ModuleProfile("m", "norm", extra={"x": hidden}),), 1).to_bytes()
    assert list(tmp_path.iterdir()) == []


def test_unwritable_path_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="absent"):
        write_measurement(tmp_path / "absent" / "m.json", Measurement((ModuleProfile("n", "norm"),), 0))


def test_parallel_decoder_as_the_reference_writes_it() -> None:
    p = QParams((4,), (1.0,), (128,)).to_json()
    option = {"accuracy": 0.9, "total_bits": 10, "q_proj": p}
    half = {"accuracy": 0.8, "total_bits": 20, "up_proj": p}
    entries = {"l.0.parallel_decoder": {"attn": [option], "mlp": [half]}}
    text = json.dumps({"measurement": entries, "last_module_idx": 2})
    profile = parse_measurement(text.encode(), "m.json")["l.0.parallel_decoder"]
    assert [options[0].total_bits for options in profile.slots()] == [10, 20]


def test_rotation_stands_among_our_entries(golden: Path) -> None:
    plain = read_measurement(golden)
    assert plain.rotation is None
    turned = dataclasses.replace(plain, rotation={"method": "m", "seed": 3})
    again = parse_measurement(turned.to_bytes(), "m.json")
    assert again.rotation == {"method": "m", "seed": 3}
    assert again == turned
    assert dataclasses.replace(again, rotation=None).to_bytes() == golden.read_bytes()
