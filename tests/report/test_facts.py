"""What a report reads from a work directory, compared with what was put there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_helpers import Model, choice, profile, write_chain, write_events, write_job, write_measurement

from exl2ray.errors import FormatError, StoreError
from exl2ray.evaluate.record import parse_evaluations
from exl2ray.formats.json_file import as_number
from exl2ray.formats.layout import QParams
from exl2ray.quant.qparams import attention_options, mlp_options
from exl2ray.report.allocation import allocation_of
from exl2ray.report.facts import group_notes, read_facts
from exl2ray.report.time_spent import busy_share, read_timeline
from exl2ray.report.values import layer_of, nominal_bpw, parse_option, role_of
from exl2ray.store.file_names import quant_kind
from exl2ray.store.open import open_store
from exl2ray.store.records import Record, Records, hash_inputs

ALL_OPTIONS = [q for row in (*attention_options(), *mlp_options()) for q in row]


def test_a_finished_job(small_work: Path) -> None:
    facts = read_facts(str(small_work))
    model = Model(6)
    assert facts.problems == ()
    assert [b.bits for b in facts.bitrates] == [3.0, 4.5]
    first = facts.bitrates[0]
    assert (first.decoder_bpw, first.directory) == (2.9987, "/out/imitation-3bpw")
    assert len(first.chain.modules) == first.modules == 13
    assert first.chain.modules[-1].key == "lm_head.linear"
    assert [m.layer for m in first.chain.modules[:-1]] == [i for i in range(6) for _ in range(2)]
    assert first.chain.perplexity == pytest.approx(5.2 + 4 / 9)
    assert first.chain.nbytes == sum(f.stat().st_size for f in (small_work / "quant/3.0/tensors").iterdir())
    measured = {p.entry_key: p for p in (profile(model, m) for m in model.modules())}
    for i, m in zip(choice(model, 3.0), first.chain.modules[:-1], strict=True):
        expected = 1 - (measured[m.key].options or ())[i].accuracy
        assert m.error == pytest.approx(1.1 * expected)


def test_allocation_counts_what_is_stored(small_work: Path) -> None:
    facts = read_facts(str(small_work))
    allocation, model = facts.bitrates[1].allocation, Model(6)
    assert allocation.exact
    assert allocation.roles == ("q", "k", "v", "o", "gate", "up", "down")
    for i, module in zip(choice(model, 4.5), model.modules(), strict=True):
        option = (profile(model, module).options or ())[i]
        for key, s in model.linears(module).items():
            bits = option.params[key.rpartition(".")[2]].layout(s.in_features).total_bits(s.padded_out)
            found = allocation.bpw[layer_of(module) or 0, role_of(key)]
            assert found == pytest.approx(bits / (s.in_features * s.padded_out))


def test_curves_know_the_weights_of_their_modules(small_work: Path) -> None:
    curves = {c.key: c for c in read_facts(str(small_work)).curves}
    assert len(curves) == 12
    assert curves["model.layers.0.self_attn"].weights == 128 * (128 + 32 + 32 + 128)
    assert curves["model.layers.5.mlp"].weights == 3 * 128 * 384


def test_half_a_conversion_shows_what_there_is(tmp_path: Path) -> None:
    store, model = open_store(str(tmp_path)), Model(6)
    write_job(store, model, (3.0,))
    write_events(store, model, (3.0,), 2)
    write_chain(store, model, write_measurement(store, model), 3.0, modules=5)
    found = read_facts(str(tmp_path)).bitrates[0]
    assert (len(found.chain.modules), found.modules) == (5, 13)
    assert found.allocation.layers == (0, 1, 2)
    assert len(found.allocation.bpw) == 2 * 7 + 4
    assert not found.allocation.exact  # no tensors tell the shapes
    assert found.chain.perplexity is None


def test_half_a_measurement_comes_from_records(tmp_path: Path) -> None:
    store, model = open_store(str(tmp_path)), Model(6)
    write_job(store, model, (3.0,))
    write_measurement(store, model, complete=False)
    facts = read_facts(str(tmp_path))
    assert [c.key for c in facts.curves] == model.modules()[:6]
    assert (facts.bitrates, facts.timeline) == ((), None)


def test_the_newest_record_of_a_module_counts(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_job(store, Model(1), (3.0,))
    key, records = "model.layers.0.mlp", Records(store)
    for i, created in enumerate((5.0, 9.0, 7.0)):
        digest = hash_inputs(i=i)
        records.commit(Record(quant_kind(3.0), key, digest, {"error": 0.1 * created}, created=created))
    chain = read_facts(str(tmp_path)).bitrates[0].chain
    assert [m.error for m in chain.modules] == [pytest.approx(0.9)]
    assert chain.superseded == 2


def test_experts_and_notes(moe_work: Path) -> None:
    facts = read_facts(str(moe_work))
    model = Model(4, experts=8)
    assert list(facts.experts) == ["measurement", "quantisation at 4.5 bpw"]
    module = "model.layers.2.block_sparse_moe"
    assert facts.experts["measurement"][2] == tuple(e["tokens"] for e in model.coverage(module))
    assert facts.experts["quantisation at 4.5 bpw"][2] == tuple(e["tokens"] for e in model.coverage(module + "q"))
    texts = {n.text: n.count for n in facts.notes}
    assert texts["w13.3: 7 tokens, completed from all"] == 4
    assert texts["w2.5: no token, rounded"] == 8
    assert texts["a worker was lost: the worker died: SIGKILL"] == 1
    assert not any("coverage in words" in text for text in texts)


def test_notes_that_differ_in_numbers_are_one() -> None:
    notes = group_notes([("a", "w2.1: 5 tokens"), ("b", "w2.17: 0 tokens"), ("a", "other"), ("b", "w2.3: 1 tokens")])
    assert [(n.text, n.places, n.count) for n in notes] == [("w2.1: 5 tokens", ("a", "b"), 3), ("other", ("a",), 1)]


# ---- the event log --------------------------------------------------------------------------------------------------


def event(seconds: float, name: str, **fields: object) -> dict[str, object]:
    return {"time": f"2025-03-01T00:{int(seconds) // 60:02d}:{seconds % 60:06.3f}Z", "name": name, "fields": fields}


def started(at: float, method: str, key: str, worker: str, bits: float | None = None) -> dict[str, object]:
    return event(at, "started", method=method, key=key, worker=worker, bits=bits)


def item(at: float, stage: str, key: str) -> dict[str, object]:
    return event(at, "item", stage=stage, key=key)


def test_timeline_of_two_runs() -> None:
    found = read_timeline([
        event(0, "opened"), event(5, "stage", stage="measure", items=2),
        started(5, "enter", "a", "w1"), started(6, "measure", "a", "w1"), started(6, "enter", "b", "w2"),
        item(10, "measure", "a"), started(10, "measure", "b", "w2"), event(14, "note", message="killed after this"),
        event(1000, "opened"), event(1001, "stage", stage="measure", items=2), started(1001, "measure", "b", "w3"),
        item(1004, "measure", "b"), event(1004, "stage", stage="quantize 3.0", items=1),
        started(1004, "join", "a", "w3", 3.0), started(1005, "chain", "a", "w3", 3.0), started(1005, "chain", "a", "w1", 3.0),
        item(1009, "quantize 3.0", "a"),
    ])  # fmt: skip
    assert found is not None
    assert found.seconds == pytest.approx(14 + 9)  # the night between the runs is left out
    assert found.runs == (0, 14)
    stages = {s.name: s for s in found.stages}
    assert stages["measure"].wall_seconds == pytest.approx(5 + 3)
    assert stages["measure"].worker_seconds == pytest.approx(1 + 4 + 4 + 4 + 3)
    assert (stages["measure"].workers, stages["measure"].finished) == (3, 2)
    assert stages["quantize 3.0"].worker_seconds == pytest.approx(1 + 4 + 4)
    assert stages["quantize 3.0"].mean_busy == pytest.approx(9 / 5)
    w1, w2, w3 = 23 - 5, 14 - 6, 8
    assert busy_share(found) == pytest.approx((1 + 4 + 4 + 4 + 4 + 3 + 5) / (w1 + w2 + w3))


def test_a_lost_worker_ends_its_work() -> None:
    found = read_timeline([
        event(0, "opened"), event(0, "stage", stage="measure", items=2), started(0, "measure", "a", "w1"),
        started(0, "measure", "b", "w2"), event(3, "lost", key="a", method="measure", reason="?"), item(8, "measure", "b"),
    ])  # fmt: skip
    assert found is not None
    assert {s.worker: s.end for s in found.spans} == {"w1": 3, "w2": 8}


@pytest.mark.parametrize("time", ["yesterday", None, 12, "2025-13-01T00:00:00Z"])
def test_a_log_without_times(time: object) -> None:
    assert read_timeline([]) is None
    assert read_timeline([{"time": time, "name": 3, "fields": []}]) is None


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ALL_OPTIONS[:40:3], ids=lambda q: q.desc)
def test_descriptions_of_options_are_read_back(option: QParams) -> None:
    assert parse_option(option.desc) == option


@pytest.mark.parametrize("text", ["", "s4", "1:4b_32g", "x:4b_32g s4", "0.5:4b_32g s4", "1:7b_32g s4", "1:4b_33g s4",
                                  "1e400:4b_32g s4", "1:4b_32g/1:4b_32g s4"])  # fmt: skip
def test_other_text_is_no_option(text: str) -> None:
    assert parse_option(text) is None


@given(st.text(max_size=40))
@settings(max_examples=200)
def test_no_text_breaks_the_readers_of_names(text: str) -> None:
    assert parse_option(text) is None or nominal_bpw(parse_option(text)) > 0  # type: ignore[arg-type]
    layer = layer_of(text)
    assert layer is None or 0 <= layer < 10**6
    assert isinstance(role_of(text), str)


def test_nominal_bits_are_close_to_the_stored_ones_of_a_large_linear() -> None:
    for option in ALL_OPTIONS:
        stored = option.layout(8192).total_bits(28672) / (8192 * 28672)
        assert nominal_bpw(option) == pytest.approx(stored, abs=0.03)


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), 10**400, [1]])
def test_what_is_no_number(value: object) -> None:
    assert as_number(value) is None


def test_names_of_all_families_mean_the_same_projections() -> None:
    assert role_of("model.layers.0.block_sparse_moe.experts.11.w3") == role_of("h.0.mlp.c_fc") == "up"
    assert (role_of("h.0.attn.c_proj"), role_of("h.0.mlp.c_proj")) == ("o", "down")
    assert (layer_of("h.12.attn.c_proj"), layer_of("model.layers.7.mlp.experts.3.w1"), layer_of("lm_head")) == (12, 7, None)
    options = {"model.layers.0.mlp.up_proj": "1:4b_128g s4", "lm_head": "1:6b_128g s4"}
    assert allocation_of(options, {}).bpw == {(0, "up"): 4 + 4 / 128}


# ---- what is not a sound work directory -----------------------------------------------------------------------------


def test_no_work_directory(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"no job\.json"):
        read_facts(str(tmp_path))


def test_damaged_records_do_not_hide_the_others(small_work: Path, tmp_path: Path) -> None:
    root = tmp_path / "work"
    shutil.copytree(small_work, root)
    records = sorted((root / "quant/3.0/records").iterdir())
    records[0].write_bytes(records[0].read_bytes()[:50])
    (root / "quant/3.0/records/zz.json").write_text('{"record": []}')
    next((root / "quant/4.5/tensors").iterdir()).unlink()
    (root / "quant/junk/records").mkdir(parents=True)
    (root / "quant/junk/records/a.json").write_text("{}")
    facts = read_facts(str(root))
    assert [len(b.chain.modules) for b in facts.bitrates] == [12, 12]
    assert len(facts.problems) == 3
    assert str(records[0].name) in " ".join(facts.problems)


DAMAGE = {
    "job.json": b'{\n "exl2ray work directory": 1, "sha256": "?"}',
    "measurement.json": b'{"measurement": {"model.layers.0.mlp": [1]}, "last_module_idx": 0}',
    "events.jsonl": b'\x00\xff\n{"time": 1}\n{"time": "?", "host": 1, "pid": 2, "name": ["x"], "fields": {"bits": 1e999}}\n',
    "evaluation.json": b'{"results": [{"perplexity": {"value": "high"}}]}',
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_shortens_the_report(small_work: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "work"
    shutil.copytree(small_work, root)
    (root / name).write_bytes(DAMAGE[name])
    facts = read_facts(str(root))
    assert facts.problems
    assert len(facts.bitrates) == 2


def test_values_of_other_types_are_left_out(tmp_path: Path) -> None:
    """Records with a sound checksum that no version of ours would write."""
    store = open_store(str(tmp_path))
    write_job(store, Model(1), (3.0,))
    payloads = [
        {"error": "small", "notes": "none", "options": ["x"], "experts": {"0": 1}},
        {"error": True, "notes": [1, None], "options": {"model.layers.1.mlp.up_proj": 4}, "experts": [{"tokens": "7"}]},
        {"error": -(10**400), "options": {"model.layers.9999999999.up_proj": "1:4b_32g s4"}, "experts": [3]},
        {"profile": []},
    ]
    for i, payload in enumerate(payloads):
        records = Records(store)
        records.commit(Record(quant_kind(3.0), f"model.layers.{i}.mlp", hash_inputs(i=i), payload, created="x"))  # type: ignore[arg-type]
        records.commit(Record("measure", f"model.layers.{i}.mlp", hash_inputs(i=i), {"profile": payload}))
    lines = [
        {"time": "2025-03-01T00:00:00Z", "host": "h", "pid": 1, "name": name, "fields": fields}
        for name in ("opened", "stage", "started", "item", "allocated", "written", "lost", "note", "retry")
        for fields in ([], None, {"bits": "x", "choice": 7, "worker": [1], "notes": 3}, {"bits": 3, "choice": [10**9, "a"]})
    ]
    store.put("events.jsonl", "\n".join(json.dumps(line) for line in lines).encode())
    facts = read_facts(str(tmp_path))
    modules = facts.bitrates[0].chain.modules
    assert [(m.error, m.experts, m.options) for m in modules[:2]] == [(None, (), {}), (None, (), {})]
    assert facts.experts == {}
    assert facts.curves == ()


@pytest.mark.parametrize("text", [
    b"", b"[]", b'{"results": 3}', b'{"results": [3]}', b'{"results": [{}]}',
    b'{"results": [{"perplexity": {"value": NaN}}]}',
    b'{"results": [{"perplexity": {"value": 5}, "file_bytes": -1, "linears_bpw": 3}]}',
    b'{"results": [{"perplexity": {"value": 5}, "kl_tail": {"p99": {"value": "x"}}}]}',
    b'{"results": [{"perplexity": {"value": 5}, "kinds": {"code": 3}}]}',
    b'{"results": [{"perplexity": {"value": 5}, "file_bytes": 10, "linears_bpw": 3, "top1_agreement": {"value": 7}}]}',
])  # fmt: skip
def test_what_is_no_evaluation(text: bytes) -> None:
    with pytest.raises(FormatError, match="file X"):
        parse_evaluations(text, "file X")
