"""job.json: the settings a work directory belongs to, and what a change of them means.

A job is a mapping of four sections, each a mapping of settings to JSON values:

| section | what it holds | what depends on it |
|---|---|---|
| identity | the source model: fingerprint, architecture | everything |
| measure | calibration data of the measurement, seed, options measured | measurement, quantised modules, output |
| quantize | bitrates, head bits, calibration data of the quantisation | quantised modules, output |
| output | shard size, output directories | output |

``PLACES`` are settings that say where something lies, not what it is (its content has a fingerprint of its own): a model
that was moved is the same model; and how a run goes, in one entry: devices, evaluations. They are kept up to date and never
compared.

The file is written once and checked by a hash, so a damaged or edited one is noticed. Its first key marks the directory
as ours: without it nothing is ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from exl2ray.errors import JobMismatchError, StoreError, why_not_read
from exl2ray.store.records import canonical_json

JOB_FILE = "job.json"
SECTIONS = ("identity", "measure", "quantize", "output")  # each depends on those before it
PLACES = {"identity": frozenset({"in_dir", "cal_dataset"}), "output": frozenset({"run"})}  # by section
FORMAT = 1  # of the work directory; a newer one is refused
_MARKER = "exl2ray work directory"
_ID = re.compile(rb'"id": "([0-9a-f]{32})"')
ID_BYTES = 1024  # the identity stands near the beginning
_MISSING = "(not set)"
FOLLOWING = ("allocates", "numerics")  # what other settings come to; not said where one of these has changed
_START = f'{{\n "{_MARKER}": '.encode()  # first bytes of every job.json of ours, whatever happened to the rest

Job = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class StoredJob:
    """Content of job.json. ``created``: ISO 8601, UTC. ``versions``: software that started the job. ``id``: identity of the
    work directory, which stays when settings change or all is started anew; "" in those of older versions.
    """

    job: Job
    versions: dict[str, str]
    created: str
    id: str = ""


@dataclass(frozen=True)
class Change:
    """One setting that differs; a setting that is absent on one side has the value "(not set)" there."""

    section: str
    name: str
    old: Any
    new: Any


def normalise(job: Mapping[str, Mapping[str, Any]]) -> Job:
    """The job as it comes back from JSON; StoreError for unknown or missing sections and values that are not JSON."""
    if set(job) != set(SECTIONS):
        raise StoreError(f"a job has the sections {', '.join(SECTIONS)}; this one has {', '.join(map(str, job))}")
    plain = json.loads(canonical_json(job))
    for section, settings in plain.items():
        if not isinstance(settings, dict):
            raise StoreError(f"section {section} of the job is not a mapping of settings")
    return {section: plain[section] for section in SECTIONS}


def _without_places(job: Job, section: str) -> dict[str, Any]:
    return {name: value for name, value in job[section].items() if name not in PLACES.get(section, ())}


def encode_job(stored: StoredJob) -> bytes:
    body = {"job": stored.job, "versions": stored.versions, "created": stored.created}
    document = {_MARKER: FORMAT, "sha256": hashlib.sha256(canonical_json(body)).hexdigest(), "id": stored.id, **body}
    return json.dumps(document, indent=1).encode() + b"\n"


def is_marked(data: bytes) -> bool:
    """Whether these bytes begin like a job.json of ours, be the rest damaged or not."""
    return data.startswith(_START)


def stored_id(data: bytes) -> str:
    """The identity in a job.json, be the rest damaged or not; "" if there is none."""
    found = _ID.search(data[:ID_BYTES])
    return "" if found is None else found[1].decode()


def decode_job(data: bytes, name: str) -> StoredJob:
    """Inverse of ``encode_job``; StoreError naming the file for damage, edits and newer formats."""
    hint = "restore the file, or start anew with -nr"
    try:
        document = json.loads(data)
        version = document[_MARKER]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise StoreError(f"{name} is not a job file of exl2ray: {why_not_read(e)}", hint) from e
    if version != FORMAT:
        raise StoreError(
            f"{name} has work directory format {version!r}; this exl2ray knows {FORMAT}",
            "go on with the version of exl2ray that started the job, or start anew with -nr",
        )
    try:
        body = {k: document[k] for k in ("job", "versions", "created")}
        if hashlib.sha256(canonical_json(body)).hexdigest() != document["sha256"]:
            raise StoreError(f"{name} does not match its checksum: it was edited or damaged", hint)
        return StoredJob(normalise(body["job"]), dict(body["versions"]), str(body["created"]), stored_id(data))
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise StoreError(f"{name} is damaged: {why_not_read(e)}", hint) from e


def compare_jobs(old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]) -> list[Change]:
    """Settings that differ, places aside, in order of sections and names."""
    before, after = normalise(old), normalise(new)
    changes = []
    for section in SECTIONS:
        old_settings, new_settings = (_without_places(side, section) for side in (before, after))
        for name in sorted(old_settings.keys() | new_settings.keys()):
            a, b = (settings.get(name, _MISSING) for settings in (old_settings, new_settings))
            if canonical_json(a) != canonical_json(b):
                changes.append(Change(section, name, a, b))
    return changes


def mismatch(
    root: str, changes: Collection[Change], flags: Mapping[str, str], has_measurement: bool
) -> JobMismatchError:
    """The refusal of a resume with other settings: what changed, what is still of use, what to do.

    ``flags`` maps "section.name" to the flag the user knows it by.
    """
    lines = [f"{root} belongs to a job with other settings:"]
    chosen = [c for c in changes if c.name not in FOLLOWING]
    for c in chosen if any(c.section == "quantize" for c in chosen) else changes:
        name = f"{c.section}.{c.name}"
        contents = all(re.fullmatch("[0-9a-f]{64}", str(x)) for x in (c.old, c.new))
        values = "its content is another one" if contents else f"{_show(c.old)} -> {_show(c.new)}"
        line = f"  {flags.get(name, name)}: {values}"
        lines += [] if line in lines else [line]
    changed = {c.section for c in changes}
    hint = "give another directory with -o, or start anew with -nr"
    if "identity" in changed:
        reusable = "nothing in it is of use for this model"
    elif "measure" in changed:
        reusable = "the measurement and all that follows from it would have to be made again"
    else:
        done = "the measurement" if has_measurement else "the modules measured so far"
        reusable = f"{done} can still be used" + (", the quantised modules too" if changed == {"output"} else "")
        hint = "--reuse goes on in this directory with the new settings"
        if has_measurement:
            hint += f"; or give another directory with -o together with -m {root}/measurement.json"
        hint += "; -nr starts anew"
    return JobMismatchError(lines[0], hint, [*lines[1:], reusable])


def _show(value: Any) -> str:
    text = _MISSING if value in (_MISSING, None) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
