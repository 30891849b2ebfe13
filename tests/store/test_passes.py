"""How far a job is, told from its event log: running, stopped, resumed, with other settings, and damaged."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_helpers import status_of

from exl2ray.report.time_spent import read_timeline
from exl2ray.store.event_log import moment, timed
from exl2ray.store.file_names import quant_kind
from exl2ray.store.passes import PassStatus, passes
from exl2ray.store.records import Record, hash_inputs
from exl2ray.store.status import read_status
from exl2ray.store.workdir import WorkDir

START = 1_800_000_000.0
WANTED = ["measure", "quantize 4.0", "compile 4.0"]


class Story:
    """A log, written as the driver would."""

    def __init__(self) -> None:
        self.now, self.events = START, list[dict[str, Any]]()

    def tell(self, name: str, after: float = 0.0, **fields: Any) -> Story:
        self.now += after
        time = datetime.fromtimestamp(self.now, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.events.append({"time": time, "host": "a", "pid": 1, "name": name, "fields": fields})
        return self

    def opened(self, *changed: str) -> Story:
        return self.tell("opened", mode="created", changed=list(changed))

    def items(self, stage: str, first: int, last: int, of: int, seconds: float, *workers: str) -> Story:
        for done in range(first, last + 1):
            worker = workers[done % len(workers)]
            key = f"module {done}"
            self.tell("started", method="measure", key=key, worker=worker,
                      bits=None if stage == "measure" else float(stage.split()[1]))  # fmt: skip
            self.tell("item", seconds, stage=stage, key=key, done=done, items=of, seconds=seconds * len(workers),
                      worker=worker, workers=len(workers))  # fmt: skip
        return self

    def status(self, running: bool, later: float = 0.0, **records: int) -> dict[str, PassStatus]:
        return {p.name: p for p in passes(self.events, WANTED, records, running, self.now + later)}


def test_a_running_pass() -> None:
    story = Story().opened().tell("stage", stage="measure", items=12, done=0).items("measure", 1, 6, 12, 5.0, "a:1", "a:2")
    story.tell("started", method="enter", key="module 7", bits=None, worker="a:2")
    found = story.status(True, later=3.0)
    p = found["measure"]
    assert (p.state, p.done, p.items, p.queue) == ("running", 6, 12, 6)
    assert (p.seconds, p.seconds_per_item, p.eta_seconds) == (33.0, 5.0, 27.0)
    assert [(w.name, w.items, w.seconds_per_item, w.doing) for w in p.workers] == [
        ("a:1", 3, 10.0, ""), ("a:2", 3, 10.0, "enter module 7"),
    ]  # fmt: skip
    assert [found[n].state for n in WANTED[1:]] == ["waiting", "waiting"]


@pytest.mark.parametrize("set_by", [315_360_000.0, -86_400.0])
def test_a_clock_that_is_set_meanwhile(set_by: float) -> None:
    """By a time server, say, while a pass runs: forward for good, and for one event."""
    story = Story().opened().tell("stage", stage="measure", items=12, done=0).items("measure", 1, 6, 12, 5.0, "a:1")
    right = story.status(True, later=3.0)["measure"]
    for since, until in ((7, len(story.events)), (7, 8)):
        shifted = Story()
        for i, event in enumerate(story.events):
            at = moment(event["time"])
            assert at is not None
            shifted.now = at + (set_by if since <= i < until else 0.0)
            shifted.tell(event["name"], **event["fields"]).events[-1]["clock"] = at - START + 9.0
        assert shifted.status(True, later=3.0)["measure"] == right
        timeline = read_timeline(shifted.events)
        assert timeline is not None
        assert timeline.seconds == pytest.approx(30.0)


def test_a_process_number_that_comes_again_after_a_boot() -> None:
    story = Story().opened().tell("stage", stage="measure", items=12, done=0)
    for event in story.events:
        event["clock"] = 5e6
    story.now += 1000.0
    story.opened().tell("stage", 1.0, stage="measure", items=12, done=6)
    for i, event in enumerate(story.events[2:]):
        event["clock"] = 20.0 + i
    assert [when - START for when, _ in timed(story.events)] == pytest.approx([0.0, 0.0, 1000.0, 1001.0])


@pytest.mark.parametrize("clock", ["x", None, -1.0, 1e300, float("nan"), True, [3]])
def test_clocks_that_are_none_are_passed_over(clock: Any) -> None:
    story = Story().opened().tell("stage", 2.0, stage="measure", items=12, done=0)
    story.events[1]["clock"] = clock
    assert [when - START for when, _ in timed(story.events)] == pytest.approx([0.0, 2.0])


def test_nothing_is_claimed_before_the_second_item() -> None:
    story = Story().opened().tell("stage", stage="measure", items=12, done=0).items("measure", 1, 1, 12, 5.0, "a:1")
    assert story.status(True)["measure"].eta_seconds is None


def test_a_dead_job_says_what_going_on_would_take() -> None:
    story = Story().opened().tell("stage", stage="measure", items=12, done=0).items("measure", 1, 6, 12, 5.0, "a:1")
    story.tell("started", method="enter", key="module 7", bits=None, worker="a:1")
    p = story.status(False, later=1e6)["measure"]
    assert (p.state, p.seconds, p.eta_seconds) == ("stopped", 30.0, 30.0)
    assert [w.doing for w in p.workers] == [""]


def test_a_pass_of_a_dead_run_does_not_run_because_another_does() -> None:
    story = Story().opened().tell("stage", stage="measure", items=12, done=0).items("measure", 1, 6, 12, 5.0, "a:1")
    assert story.opened().status(True)["measure"].state == "stopped"
    story.tell("stage", 20.0, stage="measure", items=12, done=7).items("measure", 8, 9, 12, 4.0, "a:9")
    p = story.status(True)["measure"]
    assert (p.state, p.done, p.seconds_per_item) == ("running", 9, 4.0)
    assert [w.name for w in p.workers] == ["a:9"]


def test_a_finished_job() -> None:
    story = Story().opened().tell("stage", stage="measure", items=2, done=0).items("measure", 1, 2, 2, 5.0, "a:1")
    story.tell("stage", stage="quantize 4.0", items=3, done=0).items("quantize 4.0", 1, 3, 3, 2.0, "a:1 + a:2")
    story.tell("written", bits=4.0, directory="/out", files=[])
    found = story.opened().status(False)  # run once more: nothing to do
    assert [found[n].state for n in WANTED] == ["finished"] * 3
    assert found["quantize 4.0"].workers[0].name == "a:1 + a:2"
    assert (found["measure"].queue, found["measure"].eta_seconds) == (0, None)


def test_a_clock_that_is_set_back_makes_no_negative_times() -> None:
    """`status` showed -1e+04 s."""
    story = Story().opened().tell("stage", stage="measure", items=12, done=0).items("measure", 1, 3, 12, 5.0, "a:1")
    story.now -= 7200.0
    story.items("measure", 4, 6, 12, 5.0, "a:1")
    for found in (story.status(True), story.status(False), story.status(True, later=-7200.0)):
        p = found["measure"]
        figures = [p.seconds, p.seconds_per_item, p.eta_seconds, *(w.seconds_per_item for w in p.workers)]
        assert [n for n in figures if n is not None and n < 0] == []
        assert p.done == 6
    story.opened().tell("stage", stage="measure", items=12, done=6).items("measure", 7, 7, 12, 5.0, "a:1")
    assert story.status(True)["measure"].seconds == 5.0


def test_other_settings_leave_the_measurement() -> None:
    story = Story().opened().tell("stage", stage="measure", items=2, done=0).items("measure", 1, 2, 2, 5.0, "a:1")
    story.tell("stage", stage="quantize 4.0", items=3, done=0).items("quantize 4.0", 1, 3, 3, 2.0, "a:1")
    story.tell("written", bits=4.0).opened("quantize.head_bits")
    found = story.status(True)
    assert [found[n].state for n in WANTED] == ["finished", "waiting", "waiting"]


def test_passes_come_in_the_order_of_the_job() -> None:
    """Also those that only the log knows of, and bitrates in the order of the job."""
    story = Story().opened().tell("written", bits=6.0).tell("stage", stage="quantize 6.0", items=3, done=3)
    story.tell("stage", stage="later", items=1, done=0)
    story.tell("stage", stage="sensitivity", items=1, done=0).tell("stage", stage="measure", items=2, done=0)
    names = [p.name for p in passes(story.events, ["measure", "quantize 4.0", "quantize 3.0", "compile 4.0"], {}, True, 0.0)]
    assert names == [
        "measure", "sensitivity", "quantize 4.0", "quantize 3.0", "quantize 6.0", "compile 4.0", "compile 6.0", "later",
    ]  # fmt: skip


def test_the_sensitivities_are_a_pass_where_options_are_chosen_by_them(root: str, job: dict[str, dict[str, Any]]) -> None:
    job["quantize"]["allocates"] = "linear"
    with WorkDir.create_or_resume(root, job, resume=True, versions={}) as work:
        assert [(p.name, p.state) for p in status_of(work).passes][:2] == [("measure", "waiting"), ("sensitivity", "waiting")]
        work.store.put("measurement.json", b"{}")
        assert [p.state for p in status_of(work).passes][:2] == ["finished", "waiting"]
        work.records.commit(Record("measure", "sensitivity-lm_head", hash_inputs(), {}))
        assert [p.state for p in status_of(work).passes][:2] == ["finished", "finished"]


def test_records_count_where_the_log_is_gone() -> None:
    for complete, state in (((), "stopped"), (("measure",), "finished")):
        found = {p.name: p for p in passes([], WANTED, {"measure": 5}, False, START, complete)}
        assert (found["measure"].state, found["measure"].done, found["measure"].items) == (state, 5, None)


def test_a_bitrate_that_was_complete_before_others_were_added() -> None:
    """Its modules are not announced again, its files are."""
    story = Story().opened("quantize.bits").tell("written", bits=4.0)
    found = {p.name: p for p in passes(story.events, WANTED, {"quantize 4.0": 13}, False, START)}
    assert [(found[n].state, found[n].done) for n in WANTED[1:]] == [("finished", 13), ("finished", 1)]


JSON = st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=2), max_leaves=3)
FIELDS = st.dictionaries(st.sampled_from(["stage", "key", "done", "items", "seconds", "worker", "workers", "bits"]), JSON)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "time": st.sampled_from(["2026-01-01T00:00:00.000Z", "2026-01-01T00:00:09.000Z", "x", ""]),
                "name": st.sampled_from(["opened", "stage", "item", "started", "written", "other"]),
                "fields": FIELDS | JSON,
            }
        ),
        max_size=12,
    )
)
def test_any_log_is_read(events: list[dict[str, Any]]) -> None:
    for p in passes(events, WANTED, {}, True, START):
        assert p.eta_seconds is None or p.eta_seconds >= 0
        assert p.state in ("waiting", "running", "stopped", "finished")


def test_only_modules_are_counted(root: str, job: dict[str, dict[str, Any]]) -> None:
    with WorkDir.create_or_resume(root, job, resume=True, versions={}) as work:
        keys = {"measure": ["calibration", "states-4", "model.layers.0.mlp"], quant_kind(4): ["lm_head", "perplexity",
                "states-2-7"], "quant/reference": ["states-3"]}  # fmt: skip
        for kind, names in keys.items():
            for key in names:
                work.records.commit(Record(kind, key, hash_inputs(), {}))
        work.event("stage", stage="measure", items=2, done=0)
        work.event("item", stage="measure", key="model.layers.0.mlp", done=1, items=2, seconds=1.0, worker="a:1", workers=1)
        assert status_of(work).records == {"measure": 1, "quant/4.0": 1}
    found = read_status(root)
    assert found.records == {"measure": 1, "quant/4.0": 1}
    assert [(p.name, p.state, p.done) for p in found.passes] == [
        ("measure", "stopped", 1), ("quantize 4.0", "stopped", 1), ("compile 4.0", "waiting", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("field", ["measurement", "measure_only"])
def test_passes_that_the_job_does_not_have(tmp_path: Any, job: dict[str, dict[str, Any]], field: str) -> None:
    section = "measure" if field == "measurement" else "output"
    job[section][field] = "/m.json"
    root = str(tmp_path / "work")
    WorkDir.create_or_resume(root, job, resume=True, versions={}).close()
    names = [p.name for p in read_status(root).passes]
    assert names == (["quantize 4.0", "compile 4.0"] if field == "measurement" else ["measure"])
