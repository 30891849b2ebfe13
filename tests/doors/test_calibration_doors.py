"""Calibration data as people have them: every kind of file gives the rows that its texts give, and what was taken is said."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bounded import exl2ray
from tiny_models import write_model

from exl2ray.calibration.data.sources import check_place, choose_files, local_source, split_column
from exl2ray.calibration.data.stream import CalibrationData
from exl2ray.calibration.rows import Rows
from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer
from exl2ray.errors import CalibrationError, UsageError

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
TEXTS = [f"document {i} says: a quiet harbour, {'boats and gulls, ' * (i % 5)}evening." for i in range(60)]
ASKED = [f"What is the number {i}?" for i in range(40)]
ANSWERS = [f"It is {i}, which follows {i - 1}." for i in range(40)]
CHATS = [f"<user>{q}\n<assistant>{a}\n" for q, a in zip(ASKED, ANSWERS, strict=True)]
PAIRED = list(zip(ASKED, ANSWERS, strict=True))
ROLES = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in zip(ASKED, ANSWERS, strict=True)]
SHARED = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in zip(ASKED, ANSWERS, strict=True)]
LISTS = [{"role": ["user", "assistant"], "content": [q, a]} for q, a in zip(ASKED, ANSWERS, strict=True)]
PARTS = [[{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat] for chat in ROLES]
NUMBERS = list(range(60))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_model(tmp_path_factory.mktemp("model") / "m")
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Iterator[ModelTokenizer]:
    config = json.loads((model / "config.json").read_text())
    with load_tokenizer(model, config, config["vocab_size"]) as loaded:
        yield loaded


def rows_of(tokenizer: ModelTokenizer, *places: str | Path, rows: int = 4, length: int = 128) -> Rows:
    with CalibrationData([local_source(str(p)) for p in places], tokenizer) as data:
        return data.rows(rows, length, "-r", "-l", 1 << 20)


def expected(tokenizer: ModelTokenizer, texts: Sequence[str], rows: int = 4, length: int = 128) -> list[list[int]]:
    """Section 3 of the algorithm: each document by itself, the streams concatenated."""
    ids = np.concatenate([tokenizer.encode(t) for t in texts])[: rows * length]
    return [[int(i) for i in row] for row in ids.reshape(rows, length)]


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def lines(values: Sequence[Any]) -> str:
    return "".join(json.dumps(v) + "\n" for v in values)


# ---- Parquet ----------------------------------------------------------------------------------------------------------

TEXT = pa.array(TEXTS)
META = pa.array([{"pile_set_name": "x"}] * 60)
COLUMNS: dict[str, tuple[dict[str, Any], str, list[str]]] = {  # columns, what stands behind FILE, texts
    "one column of any name": ({"whatever": TEXT}, "", TEXTS),
    "text and a struct, as in the Pile": ({"text": TEXT, "meta": META}, "", TEXTS),
    "text and numbers": ({"id": NUMBERS, "text": TEXT, "score": [0.5] * 60}, "", TEXTS),
    "content and numbers": ({"content": TEXT, "size": NUMBERS}, "", TEXTS),
    "Text in capitals": ({"n": NUMBERS, "Text": TEXT}, "", TEXTS),
    "text, other strings and numbers": ({"url": ["http://x"] * 60, "text": TEXT, "n": NUMBERS}, "", TEXTS),
    "the only strings, of any name": ({"n": NUMBERS, "strange name": TEXT}, "", TEXTS),
    "an all-null column": ({"text": TEXT, "meta": pa.nulls(60)}, "", TEXTS),
    "strings alone are joined": ({"a": TEXT, "b": ["x y"] * 60}, "", [f"{t} x y" for t in TEXTS]),
    "strings alone, null and empty cells": (
        {"a": [None if i % 3 else t for i, t in enumerate(TEXTS)], "b": [""] * 59 + ["b"]}, "",
        [" ".join(p for p in (None if i % 3 else t, "b" if i == 59 else "") if p is not None) for i, t in enumerate(TEXTS)]),
    "strings and nulls alone": ({"a": TEXT, "n": pa.nulls(60), "b": ["z"] * 60}, "", [f"{t} z" for t in TEXTS]),
    "several strings beside numbers": ({"a": TEXT, "b": ["z"] * 60, "n": NUMBERS}, "", [f"{t} z" for t in TEXTS]),
    "large strings": ({"text": TEXT.cast(pa.large_string()), "n": NUMBERS}, "", TEXTS),
    "string views": ({"text": TEXT.cast(pa.string_view()), "n": NUMBERS}, "", TEXTS),
    "a dictionary": ({"text": TEXT.dictionary_encode(), "n": NUMBERS}, "", TEXTS),
    "strings stored as binary": ({"text": TEXT.cast(pa.binary()), "n": NUMBERS}, "", TEXTS),
    "lists of strings": ({"sentences": [[t, "and on"] for t in TEXTS], "n": NUMBERS}, "", [f"{t}\nand on" for t in TEXTS]),
    "lists of lists": ({"text": [[[t], ["b", "c"]] for t in TEXTS]}, "", [f"{t}\nb\nc" for t in TEXTS]),
    "a chosen column": ({"text": ["no"] * 60, "story": TEXT}, ":story", TEXTS),
    "a column with a colon": ({"text": ["no"] * 60, "a:b": TEXT}, ":a:b", TEXTS),
    "a column with a dot": ({"text": ["no"] * 60, "a.b": TEXT}, ":a.b", TEXTS),
    "two chosen columns": ({"a": TEXT, "b": ["no"] * 60, "c": ["z"] * 60}, ":a,c", [f"{t} z" for t in TEXTS]),
    "all columns, as the reference": ({"text": TEXT, "n": NUMBERS}, ":*", [f"{t} {i}" for i, t in enumerate(TEXTS)]),
    "messages": ({"messages": ROLES}, "", CHATS),
    "messages beside strings": ({"prompt": ASKED, "id": ["x"] * 40, "messages": ROLES}, "", CHATS),
    "ShareGPT": ({"conversations": SHARED, "n": NUMBERS[:40]}, "", CHATS),
    "ShareGPT and system prompts": (
        {"conversations": SHARED, "system": ["Be brief.", None] * 20}, "",
        [c if i % 2 else f"<system>Be brief.\n{c}" for i, c in enumerate(CHATS)]),
    "a struct of lists": ({"conversations": LISTS}, "", CHATS),
    "messages of parts": ({"messages": PARTS}, "", CHATS),
    "messages of any name": ({"talk": ROLES, "n": NUMBERS[:40]}, "", CHATS),
    "a chosen conversation": ({"text": ["no"] * 40, "chosen": ROLES}, ":chosen", CHATS),
    "question and answer": ({"question": ASKED, "answer": ANSWERS, "n": NUMBERS[:40]}, "", CHATS),
    "pairs of strings alone are joined": (
        {"question": ASKED, "answer": ANSWERS}, "", [f"{q} {a}" for q, a in zip(ASKED, ANSWERS, strict=True)]),
    "pairs asked for as messages": ({"question": ASKED, "answer": ANSWERS}, ":messages", CHATS),
}  # fmt: skip


@pytest.mark.parametrize("case", COLUMNS)
def test_columns_of_parquet(case: str, tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    columns, behind, texts = COLUMNS[case]
    rows = rows_of(tokenizer, f"{parquet(tmp_path / 'x.parquet', columns)}{behind}")
    assert rows.ids.tolist() == expected(tokenizer, [t for t in texts if t])
    used = {c for t in rows.taken for c in t.columns}
    assert used | {c for t in rows.taken for c in t.ignored} == set(columns)


def test_documents_of_megabytes_stay_whole(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    text = "".join(f"line {i} without end " for i in range(4000))  # no line end, 80 kB
    rows = rows_of(tokenizer, parquet(tmp_path / "x.parquet", {"text": [text] * 3}), rows=20, length=1000)
    assert rows.ids.tolist() == expected(tokenizer, [text] * 3, 20, 1000)


def test_both_passes_read_one_stream(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"text": TEXTS})
    with CalibrationData([local_source(str(path))], tokenizer) as data:
        measured, quantised = (data.rows(n, 128, "-r", "-l", 1 << 20) for n in (2, 6))
    assert measured.ids.tolist() == quantised.ids[:2].tolist()
    assert measured.digest != quantised.digest
    assert [t.tokens for t in (*measured.taken, *quantised.taken)] == [256, 768]


# ---- other kinds --------------------------------------------------------------------------------------------------------

OBJECTS = [{"id": i, "text": t} for i, t in enumerate(TEXTS)]
PAIRS = [{"instruction": q, "input": "", "output": a} for q, a in zip(ASKED, ANSWERS, strict=True)]
WHOLE = "\n".join(TEXTS)
FILES: dict[str, tuple[str, str, list[str]]] = {  # name, content, texts
    "JSON lines": ("a.jsonl", lines(OBJECTS), TEXTS),
    "JSON lines of strings": ("a.jsonl", lines(TEXTS), TEXTS),
    "JSON lines of lists of messages": ("a.jsonl", lines(ROLES), CHATS),
    "JSON lines, blank ones between": ("a.ndjson", lines(OBJECTS).replace("\n", "\n\n"), TEXTS),
    "JSON lines, Windows": ("a.jsonl", lines(OBJECTS).replace("\n", "\r\n"), TEXTS),
    "JSON lines, byte order mark": ("a.jsonl", "\ufeff" + lines(OBJECTS), TEXTS),
    "JSON lines, no end of line": ("a.jsonl", lines(OBJECTS).rstrip("\n"), TEXTS),
    "JSON lines, some without text": ("a.jsonl", lines([x for o in OBJECTS for x in (o, {"id": 7}, {"text": None})]), TEXTS),
    "JSON lines, ShareGPT": ("a.jsonl", lines([{"id": "x", "conversations": c} for c in SHARED]), CHATS),
    "JSON lines, ShareGPT and system prompts": (
        "a.jsonl", lines([{"conversations": c, "system": "" if i % 2 else "Be brief."} for i, c in enumerate(SHARED)]),
        [c if i % 2 else f"<system>Be brief.\n{c}" for i, c in enumerate(CHATS)]),
    "JSON lines, a developer's prompt": (
        "a.jsonl", lines([{"messages": [{"role": "developer", "content": "Be brief."}, *m], "system": "no"} for m in ROLES]),
        [f"<system>Be brief.\n{c}" for c in CHATS]),
    "JSON lines, instruction and output": ("a.jsonl", lines(PAIRS), CHATS),
    "JSON lines, system prompts": (
        "a.jsonl", lines([{"system_prompt": "Be brief.", "question": q, "response": a} for q, a in PAIRED]),
        [f"<system>Be brief.\n{c}" for c in CHATS]),
    "JSON lines in a .json": ("a.json", lines(OBJECTS), TEXTS),
    "JSON lines without an ending": ("data", lines(OBJECTS), TEXTS),
    "JSON list of objects": ("a.json", json.dumps(OBJECTS), TEXTS),
    "JSON list of strings": ("a.json", json.dumps(TEXTS, indent=1), TEXTS),
    "JSON list, other alphabets": (
        "a.json", json.dumps(["größer 漢字 🙂 " * 9000] * 8, ensure_ascii=False), ["größer 漢字 🙂 " * 9000] * 8),
    "JSON list of pairs": ("a.json", json.dumps(PAIRS), CHATS),
    "JSON object with a list": ("a.json", json.dumps({"version": 1, "data": OBJECTS}), TEXTS),
    "text": ("a.txt", WHOLE, [WHOLE]),
    "text, Windows": ("a.txt", WHOLE.replace("\n", "\r\n"), [WHOLE]),
    "text, byte order mark": ("a.txt", "\ufeff" + WHOLE, [WHOLE]),
    "Markdown": ("a.md", "# Title\n\n" + WHOLE, ["# Title\n\n" + WHOLE]),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_kinds_of_files(case: str, tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    name, content, texts = FILES[case]
    (tmp_path / name).write_bytes(content.encode())
    assert rows_of(tokenizer, tmp_path / name).ids.tolist() == expected(tokenizer, texts)


@pytest.mark.parametrize(
    ("ending", "compress"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress),
     ("zst", lambda d: pa.compress(d, "zstd", asbytes=True))],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_compressed_files(
    name: str, ending: str, compress: Callable[[bytes], bytes], tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    content = {"a.jsonl": lines(OBJECTS), "a.json": json.dumps(OBJECTS), "a.txt": WHOLE}[name]
    (tmp_path / f"{name}.{ending}").write_bytes(compress(content.encode()))
    texts = [WHOLE] if name == "a.txt" else TEXTS
    assert rows_of(tokenizer, tmp_path / f"{name}.{ending}").ids.tolist() == expected(tokenizer, texts)


# ---- several files ------------------------------------------------------------------------------------------------------


def shards(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    for i in range(3):
        parquet(root / "data" / f"train-{i:05d}-of-00003.parquet", {"text": TEXTS[i * 20 : i * 20 + 20]})
    parquet(root / "data" / "test-00000-of-00001.parquet", {"text": ["never"] * 9})
    (root / "README.md").write_text("# not data")
    (root / "dataset_infos.json").write_text("{}")
    return root


def test_a_folder_is_one_data_set(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    rows = rows_of(tokenizer, shards(tmp_path / "set"))
    assert rows.ids.tolist() == expected(tokenizer, TEXTS)
    assert any("1 files of other splits than train are left out" in n for n in rows.notes)
    assert sum(t.tokens for t in rows.taken) == 4 * 128


def test_a_pattern_and_a_column(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    rows = rows_of(tokenizer, f"{shards(tmp_path / 'set')}/data/train-*.parquet:text")
    assert rows.ids.tolist() == expected(tokenizer, TEXTS)


def test_several_sources_take_turns(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    a = parquet(tmp_path / "a.parquet", {"text": TEXTS})
    (tmp_path / "b.jsonl").write_text(lines(ROLES))
    rows = rows_of(tokenizer, a, tmp_path / "b.jsonl", rows=6)
    first, second = expected(tokenizer, TEXTS, 3), expected(tokenizer, CHATS, 3)
    assert rows.ids.tolist() == [row for pair in zip(first, second, strict=True) for row in pair]
    assert rows.kinds == ("-c a.parquet", "-c b.jsonl") * 3


def test_a_short_source_leaves_its_turns_to_others(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words, " * 15)
    count = len(tokenizer.encode("a few words, " * 15)) // 128
    rows = rows_of(tokenizer, tmp_path / "short.txt", parquet(tmp_path / "a.parquet", {"text": TEXTS}), rows=5)
    assert rows.kinds.count("-c short.txt") == count < 2
    with pytest.raises(CalibrationError, match="2 sources: -r 999 x -l 128 needs"):
        rows_of(tokenizer, tmp_path / "short.txt", tmp_path / "a.parquet", rows=999)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["a.parquet", "b.jsonl"], ["a.parquet"]),
        (["b.jsonl.gz", "c.json"], ["b.jsonl.gz"]),
        (["train.jsonl", "test.jsonl", "dev.jsonl"], ["train.jsonl"]),
        (["test.parquet", "validation.parquet"], ["test.parquet", "validation.parquet"]),
        (["trainer_state/x.txt", "notes.md"], ["trainer_state/x.txt"]),
        (["b.parquet", "a.parquet"], ["a.parquet", "b.parquet"]),
        (["constrained.json", "attest.json", "train.json"], ["attest.json", "constrained.json", "train.json"]),
    ],
)
def test_files_of_a_folder(names: list[str], kept: list[str]) -> None:
    assert choose_files(names, "-c x")[0] == kept


# ---- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "place", "column"),
    [
        ("a.parquet", "a.parquet", None),
        ("a.parquet:text", "a.parquet", "text"),
        ("a.parquet:x:y", "a.parquet", "x:y"),
        ("a:b.parquet", "a:b.parquet", None),
        ("a:b.parquet:text", "a:b.parquet", "text"),
        (r"C:\data\x.parquet", r"C:\data\x.parquet", None),
        (r"C:\data\x.parquet:text", r"C:\data\x.parquet", "text"),
        ("absent.parquet:text", "absent.parquet:text", None),
        ("a.parquet:text.parquet", "a.parquet:text.parquet", None),
    ],
)
def test_paths_with_colons(
    given: str, place: str, column: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.parquet", "a:b.parquet", r"C:\data\x.parquet", "a.parquet:text.parquet"):
        (tmp_path / name).touch()
    assert split_column(given) == (place, column)


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        ("x.parquet:none", UsageError, r"has no column 'none'; its columns are text, n, meta"),
        ("x.parquet:meta", UsageError, r"column 'meta' is other"),
        ("x.parquet:", UsageError, "names no column"),
        ("nothing.parquet", UsageError, "does not exist"),
        ("x.parquet:*", UsageError, r"column 'meta' is other, which cannot be joined"),
        ("a.txt:text", UsageError, "a text file has no columns"),
        ("a.xls", CalibrationError, "is of a kind that is not read"),
        ("none/*.parquet", UsageError, "does not exist"),
    ],
)
def test_what_cannot_be_is_told(
    place: str, error: type[Exception], message: str, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    parquet(tmp_path / "x.parquet", {"text": TEXTS, "n": NUMBERS, "meta": META})
    (tmp_path / "a.txt").write_text(WHOLE)
    (tmp_path / "a.xls").write_text("text\n" + WHOLE)
    with pytest.raises(error, match=message):
        rows_of(tokenizer, tmp_path / place)


def test_several_places_in_one_flag_are_told(tmp_path: Path) -> None:
    a, b = tmp_path / "a.parquet", tmp_path / "b.txt"
    a.touch()
    b.touch()
    for between in (",", " ", ", "):
        with pytest.raises(UsageError, match=f"a place with each -c: -c {a} -c {b}"):
            check_place(f"{a}{between}{b}")


# ---- the command line ---------------------------------------------------------------------------------------------------

FEW = ("-r", "4", "-mr", "2", "-l", "128", "-ml", "128")


def test_plan_says_what_is_taken(model: Path, tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"text": TEXTS, "n": NUMBERS})
    run = exl2ray("plan", "-i", model, "-b", "4", "-c", path, *FEW, "--device", "cpu")
    run.ends_with(0, "quantisation calibrates on", "column text", "512 tokens", "ignored columns: n")
    run = exl2ray("plan", "-i", model, "-b", "4", "-c", path, *FEW, "--device", "cpu", "--json")
    found = json.loads(run.out)["calibration"]
    tokens = {"measurement": 256, "quantisation": 512}
    assert [(f["pass"], f["columns"], f["tokens"]) for f in found] == [(p, ["text"], n) for p, n in tokens.items()]


def test_calibration_shows_the_sources(model: Path, tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"text": TEXTS, "n": NUMBERS})
    (tmp_path / "b.jsonl").write_text(lines(ROLES))
    run = exl2ray("calibration", "-i", model, "-c", path, "-c", tmp_path / "b.jsonl", *FEW)
    run.ends_with(0, "x.parquet (Parquet): column text", "b.jsonl (JSON lines): conversations, 4 documents")


TINY = ("-b", "4", *FEW, "--device", "cpu", "--executor", "inline", "--quality", "reference", "--evaluate", "never")


def test_a_job_with_several_sources_is_resumed(model: Path, tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", {"text": TEXTS, "story": TEXTS})
    (tmp_path / "b.txt").write_text(WHOLE)
    work, out = tmp_path / "work", tmp_path / "out"
    both = ("-c", f"{path}:story", "-c", tmp_path / "b.txt")  # names of columns and several places are kept
    exl2ray("convert", "-i", model, "-o", work, *both, *TINY, "-cf", out, seconds=60).ends_with(0)
    stored = json.loads((work / "job.json").read_text())["job"]
    assert stored["identity"]["cal_dataset"] == [f"{path}:story", str(tmp_path / "b.txt")]
    assert stored["measure"]["cal_dataset"] != stored["quantize"]["cal_dataset"]
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["calibration"]["dataset"] == "x.parquet:story, b.txt"
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    exl2ray("convert", "-o", work, "--device", "cpu", "--executor", "inline", seconds=60).ends_with(0)
    assert {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")} == before
    other = exl2ray("convert", "-i", model, "-o", work, "-c", path, *TINY, "-cf", out, "--dry-run")
    other.ends_with(7, "-c")
    (tmp_path / "b.txt").write_text(WHOLE.replace("quiet", "loud"))
    exl2ray("convert", "-o", work, "--device", "cpu", "--executor", "inline", "--dry-run").ends_with(7, "-c")


def test_text_behind_what_was_taken_is_no_other_job(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    digests = set()
    for texts in (TEXTS, [*TEXTS, "more"], ["other", *TEXTS[1:]]):
        (tmp_path / "a.jsonl").write_text(lines(texts))
        digests.add(rows_of(tokenizer, tmp_path / "a.jsonl").digest)
    assert len(digests) == 2


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.json", "x.jsonl.gz"])
def test_texts_to_evaluate_on(name: str, tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    from exl2ray.evaluate.tokens import load_tokens

    content = {"x.jsonl": lines(OBJECTS).encode(), "x.json": json.dumps(TEXTS).encode()}
    content["x.jsonl.gz"] = gzip.compress(content["x.jsonl"])
    if name in content:
        (tmp_path / name).write_bytes(content[name])
    else:
        parquet(tmp_path / name, {"text": TEXTS, "n": NUMBERS})
    ids = load_tokens(tmp_path / name, tokenizer, rows=3, length=100)
    assert ids.tolist() == expected(tokenizer, TEXTS, 3, 100)
