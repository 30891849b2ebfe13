"""Loading the built-in text: order, errors, and that the folder and the packed archive give the same documents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from exl2ray.calibration.rows import ROW_CATEGORIES
from exl2ray.calibration.text import (
    ARCHIVE,
    KINDS,
    Document,
    builtin_documents,
    load_archive,
    load_tree,
    pack_text,
    parse_chat,
)
from exl2ray.errors import CalibrationError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    for rel, text in {
        "unicode/z.txt": "ﬁ ½ 🎻",
        "essays/b.txt": "Second.\r\nline",
        "essays/a.txt": "First.",
        "code/x.py": "print('é')\n",
        "code/__pycache__/x.cpython-311.pyc": "",
        "essays/.hidden": "no",
        "more/essays/c.txt": "Third.",
    }.items():
        (root / rel).parent.mkdir(parents=True, exist_ok=True)
        (root / rel).write_bytes(text.encode())
    return root


def test_tree_and_archive_agree(tree: Path, tmp_path: Path) -> None:
    documents = load_tree(tree)
    assert [(d.kind, d.name) for d in documents] == [
        ("essays", "a.txt"), ("essays", "b.txt"), ("essays", "c.txt"), ("code", "x.py"), ("unicode", "z.txt"),
    ]  # fmt: skip
    assert documents[1].text == "Second.\r\nline"
    assert [d.more for d in documents] == [False, False, True, False, False]
    archive = pack_text(tmp_path / ARCHIVE, tree)
    assert load_archive(archive.read_bytes(), archive) == documents


def test_archive_bytes_depend_on_text_only(tree: Path, tmp_path: Path) -> None:
    first = pack_text(tmp_path / "1", tree).read_bytes()
    (tree / "essays" / "a.txt").touch()
    assert pack_text(tmp_path / "2", tree).read_bytes() == first


@pytest.mark.slow
def test_wheel_build_step_packs_the_text(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    calibration = tmp_path / "lib" / "exl2ray" / "calibration"
    assert not (calibration / "text").exists()
    packed = load_archive((calibration / ARCHIVE).read_bytes(), calibration / ARCHIVE)
    assert packed == load_tree(ROOT / "exl2ray" / "calibration" / "text")


def test_broken_archive(tree: Path, tmp_path: Path) -> None:
    data = pack_text(tmp_path / "a", tree).read_bytes()
    for bad in (b"", b"not xz", data[: len(data) // 2], data[:30] + bytes(20) + data[50:]):
        with pytest.raises(CalibrationError, match="broken text archive"):
            load_archive(bad, Path("text.tar.xz"))


def test_stray_files_are_refused(tree: Path) -> None:
    (tree / "recipes").mkdir()
    (tree / "recipes" / "soup.txt").write_text("Boil.")
    with pytest.raises(CalibrationError, match=r"recipes/soup\.txt"):
        load_tree(tree)


def test_text_that_is_not_utf8_is_refused(tree: Path) -> None:
    (tree / "essays" / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match=r"essays/latin\.txt: not UTF-8 at byte 3"):
        load_tree(tree)


def test_families() -> None:
    assert Document("multilingual", "de_brief.txt", "").family == "de"
    assert Document("code", "a.RS", "").family == "code:.rs"
    assert Document("essays", "a.txt", "").family == "essays"


def _chat(*messages: tuple[str, str]) -> Document:
    obj = {"title": "t", "messages": [{"role": r, "content": c} for r, c in messages]}
    return Document("chat", "x.json", json.dumps(obj))


def test_chat_is_parsed() -> None:
    chat = parse_chat(_chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")))
    assert chat.messages == (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize(
    "doc",
    [
        Document("chat", "x.json", "{"),
        Document("chat", "x.json", "[]"),
        Document("chat", "x.json", '{"title": "t", "messages": [{"role": "user"}]}'),
        Document("chat", "x.json", '{"title": "t", "messages": [{"role": "user", "content": 3}]}'),
        _chat(),
        _chat(("system", "only")),
        _chat(("user", "Hi")),
        _chat(("assistant", "Hello"), ("user", "Hi")),
        _chat(("user", "Hi"), ("system", "late"), ("assistant", "x")),
        _chat(("user", "Hi"), ("assistant", " ")),
    ],
)
def test_bad_chats_are_refused_by_name(doc: Document) -> None:
    with pytest.raises(CalibrationError, match=r"chat/x\.json"):
        parse_chat(doc)


def test_builtin_text_is_complete(builtin: tuple[Document, ...]) -> None:
    """Every kind has documents, no two are equal, none is nearly empty, and all conversations are well formed."""
    assert {d.kind for d in builtin} == set(KINDS)
    assert len({d.text for d in builtin}) == len(builtin)
    assert all(len(d.text.strip()) > 80 for d in builtin)
    for doc in builtin:
        if doc.kind == "chat":
            parse_chat(doc)
        if doc.kind == "multilingual":
            assert 2 <= len(doc.family) <= 3
            assert doc.family.islower()


# Characters of a token, by set of rows, in the vocabulary of 262144 tokens of Gemma 3, which needs the most text of all.
LONGEST_TOKENS = {"web": 3.74, "articles": 4.35, "code": 3.21, "stories": 3.89, "chat": 3.34, "formats": 2.51,
                  "multilingual": 2.99, "technical": 3.12}  # fmt: skip
REPEATED = {"letters": 0.01, "chat": 0.04, "code": 0.04, "formats": 0.04, "multilingual": 0.005}  # catalogues have headers


def test_the_larger_set_fills_all_rows_without_repeating_itself() -> None:
    """115 x 2048 tokens of the largest vocabulary: no second pass over a kind, and nothing that a generator made."""
    usual, every = builtin_documents(), builtin_documents(more=True)
    assert set(usual) < set(every)
    assert not any(d.more for d in usual), "what the bytes of conversions depend on"
    for category in ROW_CATEGORIES:
        if category.kinds:
            characters = sum(len(d.text) for d in every if d.kind in category.kinds)
            assert characters >= 2048 * category.quantize * LONGEST_TOKENS[category.name], category.name
    for kind in KINDS:
        seen: set[str] = set()
        again = total = 0
        for text in (" ".join(d.text.split()) for d in every if d.kind == kind):
            passages = [text[i : i + 40] for i in range(0, len(text) - 39, 8)]
            again, total = again + sum(p in seen for p in passages), total + len(passages)
            seen.update(text[i : i + 40] for i in range(len(text) - 39))
        assert again / total <= REPEATED.get(kind, 0.002), f"{kind}: {again} of {total} passages of 40 characters"


def test_every_document_of_the_larger_set_is_sound() -> None:
    more = [d for d in builtin_documents(more=True) if d.more]
    assert len(more) > 40
    assert len({d.text[:200] for d in more}) == len(more)
    for d in more:
        assert d.text.endswith("\n"), d.name
        assert "�" not in d.text, d.name
        if d.kind == "chat":
            parse_chat(d)
        if d.name.endswith(".py"):
            compile(d.text, d.name, "exec")
