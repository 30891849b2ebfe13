"""Names inside a work directory, and which of them are ours to delete.

    job.json  job-<n>.json          settings now, and earlier ones of a directory that was reused
    driver.lock                     who works here
    calibration.safetensors
    measure/records|states/         one record per measured module; sparse states at module boundaries
    measurement.json
    quant/<bpw>/tensors|records|states/   tensors of modules until they are in the shards, which lie beside them
    quant/<bpw>/solved/             the model as it was quantised, where it is tuned afterwards
    quant/written/tensors|records/  text that the source wrote to be tuned on
    quant/<bpw>/tune/  tune.json    how far the tuning is, and what came of it
    output*.safetensors             the compiled shards, where no output directory was given: the same files as in tensors/
    events.jsonl  events/           one line per event (events/ on object stores)
    evaluation.json  ladder.png     the finished models compared
    report.html  logs/  nonce/
    source.json  source/            of a model that is elsewhere: what it was, its small files, blocks of its shards
"""

from __future__ import annotations

import re

CALIBRATION = "calibration.safetensors"
MEASUREMENT = "measurement.json"
LOCK_FILE = "driver.lock"
EVENTS = "events.jsonl"
LOGS = "logs"
NONCE = "nonce"
SOURCE_FILE = "source.json"
SOURCE_FOLDER = "source"
MEASURE = "measure"  # kind of the measurement's records
SOLVED = "solved"  # below a bitrate: the model before it is tuned
REFERENCE_KIND = "quant/reference"  # kind of the checkpoints of the source model's states on the quantisation rows
# Keys of records that are no module's.
CALIBRATION_KEY = "calibration"  # of the rows of tokens; every job has one
SOURCE_KEY = "source"  # of the source's files
PERPLEXITY = "perplexity"  # of a finished model, where its head's record has none
OUTPUT = "output"  # of the files of a written model
PATCHES = "patches"  # of what models were patched with
NOT_MODULES = re.compile(r"states-.*|sensitivity-.*|calibration|source|perplexity|output|patches")
FOLDERS = ("measure", "quant", "events", "logs", "nonce", "source")

_OURS = re.compile(
    r"job(-\d+)?\.json|calibration\.safetensors|measurement\.json|plan\.json|events\.jsonl"
    r"|report\.html|evaluation\.json|ladder\.png"
    r"|output(-\d{5}-of-\d{5})?\.safetensors"
    r"|(measure|quant/[^/]+)/(records/[^/]+\.json|(states|tensors)/[^/]+\.safetensors)"
    r"|quant/[^/]+/(solved/(additional_chat_templates/)?[^/]+|tune/((states|nonce|homes|written)/(.+/)?)?[^/]+|tune\.json)"
    r"|source\.json|source/[^/]+|source/(additional_chat_templates|blocks)/[^/]+"
    r"|events/[^/]+\.jsonl|nonce/[^/]+\.json|logs/(.+/)?[^/]+\.(log|out|err|txt|json|jsonl)"
)

_FOLDERS_OF_OURS = re.compile(
    r"measure|quant|events|logs|nonce|source(/(additional_chat_templates|blocks))?|(measure|quant/[^/]+)(/(records|states|tensors))?|quant/[^/]+/(output|tune(/(states|nonce|homes|written)(/.+)?)?|solved(/additional_chat_templates)?)"
)


def is_ours(rel: str) -> bool:
    """Whether a file of this name, in a directory marked as ours, was made by exl2ray."""
    return _OURS.fullmatch(rel) is not None


def is_place_of_ours(rel: str) -> bool:
    """Whether exl2ray keeps a file, or a folder, under this name: nothing else should stand there."""
    return is_ours(rel) or rel.startswith("logs/") or _FOLDERS_OF_OURS.fullmatch(rel) is not None


def is_within_ours(rel: str) -> bool:
    """Whether this path in a work directory lies where exl2ray keeps, and deletes, what is its own."""
    first = rel.partition("/")[0]
    return is_place_of_ours(rel) or is_ours(first) or first in (LOCK_FILE, *FOLDERS)


def quant_kind(bpw: float) -> str:
    """Kind of the records of one bitrate: "quant/4.0"."""
    return f"quant/{float(bpw)!r}"
