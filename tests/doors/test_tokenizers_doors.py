"""Tokenizers as people have them: ids are those of transformers on the same folder, and what is odd is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from tokenizer_folders import BASE, ROWS, TEXTS, load, put, token_folder
from tokenizers import Tokenizer

from exl2ray.calibration.chat_text import plain_chat
from exl2ray.calibration.output_files import tokenizer_output
from exl2ray.calibration.rows import builtin_rows
from exl2ray.calibration.text import Conversation
from exl2ray.calibration.tokenizer_files import read_tokenizer_files
from exl2ray.errors import SourceError

transformers = pytest.importorskip("transformers")

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MARKERS = {"<|im_start|>": BASE, "<|im_end|>": BASE + 1}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return token_folder(tmp_path)


def token(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, **FLAGS, **flags}


def in_file(folder: Path, *entries: tuple[str, int]) -> None:
    """Added tokens of tokenizer.json itself."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [{"id": i, **token(text)} for text, i in entries]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def decoder(*entries: tuple[int, dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(i): entry for i, entry in entries}, **more}


OBJECT = {"__type": "AddedToken", "content": "<a>", "lstrip": True}
SAME: dict[str, dict[str, Any]] = {
    "nothing added": {},
    "added_tokens.json": {"added_tokens.json": MARKERS},
    "added_tokens.json, in another order": {"added_tokens.json": dict(reversed(MARKERS.items()))},
    "added_tokens_decoder": {
        "tokenizer_config.json": decoder((BASE, token("<|im_start|>")), (BASE + 1, token("<|im_end|>")))
    },
    "decoder, in another order": {
        "tokenizer_config.json": decoder((BASE + 1, token("<|im_end|>")), (BASE, token("<|im_start|>")))
    },
    "decoder with flags": {
        "tokenizer_config.json": decoder(
            (BASE, token("<|im_start|>", rstrip=True)), (BASE + 1, token("<|im_end|>", lstrip=True))
        )
    },
    "decoder, not special": {
        "tokenizer_config.json": decoder((BASE, token("<tool>", special=False, normalized=True)))
    },
    "decoder and added_tokens.json": {
        "tokenizer_config.json": decoder((BASE, token("<|im_start|>")), (BASE + 1, token("<|im_end|>"))),
        "added_tokens.json": MARKERS,
    },
    "decoder that repeats the vocabulary": {
        "tokenizer_config.json": decoder((0, token("<unk>")), (1, token("<s>")), (2, token("</s>")), (BASE, token("[PAD]")))
    },
    "special_tokens_map.json": {"special_tokens_map.json": {"pad_token": "[PAD]", "eos_token": "</s>"}},
    "decoder and special_tokens_map.json": {
        "tokenizer_config.json": decoder((BASE, token("<|im_start|>"))), "special_tokens_map.json": {"pad_token": "[PAD]"}
    },
    "special_tokens_map.json, objects": {"special_tokens_map.json": {"pad_token": token("[PAD]", lstrip=True)}},
    "pad_token of the settings": {"tokenizer_config.json": {"pad_token": "[PAD]"}},
    "several special tokens": {"tokenizer_config.json": {"mask_token": "<b>", "pad_token": "<a>", "eos_token": "<c>"}},
    "additional_special_tokens": {"tokenizer_config.json": {"additional_special_tokens": ["<a>", "<b>"]}},
    "extra_special_tokens": {"tokenizer_config.json": {"extra_special_tokens": ["<b>", "<a>"]}},
    "named as a model that sees has them": {"tokenizer_config.json": {"image_token": "<b>", "boi_token": OBJECT}},
    "named in an object": {"tokenizer_config.json": {"model_specific_special_tokens": {"x_token": "<a>"}}},
    "named in objects": {"tokenizer_config.json": {"z_token": "<c>", "extra_special_tokens": {"y": "<b>"}}},
    "added and special": {
        "added_tokens.json": MARKERS, "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "[PAD]"}
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_ids_of_transformers(name: str, folder: Path) -> None:
    for file, value in SAME[name].items():
        put(folder, file, value)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    with load(folder) as ours:
        assert ours.warnings == ()
        for text in TEXTS:
            assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False), text
        assert [ids.tolist() for ids in ours.encode_batch(TEXTS)] == [ours.encode(t).tolist() for t in TEXTS]
    # What ExLlamaV2 reads of the output: tokenizer.json, and added_tokens.json beside it.
    loader = Tokenizer.from_file(str(folder / "tokenizer.json"))
    written = tokenizer_output(folder, ours).get("added_tokens.json")
    listed = json.loads(written) if written else SAME[name].get("added_tokens.json", {})
    for text, token_id in listed.items():
        assert theirs.convert_tokens_to_ids(text) == token_id
    missing = [t for t in theirs.get_vocab() if loader.token_to_id(t) is None]
    assert set(missing) <= set(listed)


# name: (files, words of the only warning)
NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "a hole": ({"added_tokens.json": {"<a>": BASE, "<c>": BASE + 2}}, "'<c>' (stated 261, would be 260)"),
    "an id of the vocabulary": ({"added_tokens.json": {"<a>": 5}}, "'<a>' (stated 5, would be 259)"),
    "another id than the vocabulary's": ({"added_tokens.json": {"<s>": 7}}, "'<s>' (stated 7, would be 1)"),
    "one id twice": ({"added_tokens.json": {"<a>": BASE, "<b>": BASE}}, "'<b>' (stated 259, would be 260)"),
    "two files that disagree": (
        {"added_tokens.json": {"<a>": BASE + 1}, "tokenizer_config.json": decoder((BASE, token("<a>")))},
        "'<a>' (stated 260, would be 259)",
    ),
    "beyond the embedding": ({"added_tokens.json": {f"<{i}>": BASE + i for i in range(14)}}, "1 added tokens have no emb"),
    "no place for a pad token": (
        {"added_tokens.json": {f"<{i}>": BASE + i for i in range(13)}, "tokenizer_config.json": {"pad_token": "[PAD]"}},
        "no embedding row left for them: '[PAD]'",
    ),
    "no such token": ({"tokenizer_config.json": {"eos_token": 5}}, "eos_token 5 is not a token"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_tokens_that_do_not_fit_are_named(name: str, folder: Path) -> None:
    files, words = NAMED[name]
    for file, value in files.items():
        put(folder, file, value)
    with load(folder) as tokenizer:
        (warning,) = tokenizer.warnings
        assert words in warning
        assert tokenizer.vocab_size <= ROWS


def test_agreeing_tokens_stay_when_others_do_not(folder: Path) -> None:
    put(folder, "added_tokens.json", {"<a>": BASE, "<x>": 3, "<c>": BASE + 2, "<b>": BASE + 1})
    with load(folder) as tokenizer:
        assert tokenizer.encode("<a><b><c>").tolist() == [BASE, BASE + 1, BASE + 2]
        assert tokenizer.added == {"<a>": BASE, "<b>": BASE + 1, "<c>": BASE + 2}
    assert json.loads(tokenizer_output(folder, tokenizer)["added_tokens.json"]) == tokenizer.added


def test_ids_that_the_library_changes(folder: Path) -> None:
    in_file(folder, ("<a>", 265))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    with load(folder) as tokenizer:
        assert tokenizer.encode("<a>").tolist() == theirs.encode("<a>", add_special_tokens=False) == [BASE]
        assert "'<a>' has id 259 for all loaders, not 265" in tokenizer.warnings[0]


# name: (files, config, (BOS, EOS), words of the warnings)
ENDS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int | None, int | None], list[str]]] = {
    "in added_tokens.json": (
        {"added_tokens.json": MARKERS, "tokenizer_config.json": {"eos_token": "<|im_end|>"}}, {}, (1, 260), []
    ),
    "in special_tokens_map.json": (
        {"special_tokens_map.json": {"bos_token": "A", "eos_token": token("B")}}, {}, (35, 36), []
    ),
    "list with strangers": ({}, {"eos_token_id": [400, 7, -1, 2]}, (1, 7), ["eos_token_id 400, -1 has no embedding row"]),
    "all strangers": ({}, {"bos_token_id": 272, "eos_token_id": [300]}, (None, None), ["token_id 272", "token_id 300"]),
    "stranger, but a text": (
        {"tokenizer_config.json": {"eos_token": "</s>"}}, {"eos_token_id": 999}, (1, 2), ["eos_token_id 999"]
    ),
    "generation_config.json": (
        {"generation_config.json": {"eos_token_id": [2, 272]}}, {}, (1, 2), ["generation_config.json: eos_token_id 272"]
    ),
    "texts in generation_config.json": (
        {"generation_config.json": {"bos_token_id": 1, "eos_token_id": ["2", 2]}}, {}, (1, 2), ["eos_token_id is '2', not an"]
    ),
    "padding without a row": ({}, {"pad_token_id": 272}, (1, 2), ["config.json: pad_token_id 272 has no embedding row"]),
    "negative pad token": ({}, {"pad_token_id": -1}, (1, 2), []),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_end_tokens(name: str, folder: Path) -> None:
    files, config, ids, warnings = ENDS[name]
    for file, value in files.items():
        put(folder, file, value)
    with load(folder, **config) as tokenizer:
        assert (tokenizer.bos_id, tokenizer.eos_id) == ids
        assert len(tokenizer.warnings) == len(warnings)
        for words, warning in zip(warnings, tokenizer.warnings, strict=True):
            assert words in warning


def test_surplus_tokens_matter_where_a_row_holds_them(folder: Path) -> None:
    """Random rows stay below the embedding; a chat template with a surplus marker is named with its row."""
    in_file(folder, ("<|im_start|>", BASE), ("<|im_end|>", BASE + 1), ("<pad>", BASE + 2))
    with load(folder, rows=BASE + 2) as tokenizer:
        assert "1 added tokens have no embedding row (the model has 261): '<pad>' (261)" in tokenizer.warnings[0]
        rows = builtin_rows(tokenizer, "measure", 128, 0, BASE + 2)
        assert int(rows.ids.max()) < BASE + 2
    put(folder, "tokenizer_config.json", {"chat_template": CHATML})
    with load(folder, rows=BASE) as tokenizer:
        with pytest.raises(SourceError, match=r"\(chat\) .* holds token '<\|im_(start|end)\|>' with token id 2(59|60)") as e:
            builtin_rows(tokenizer, "measure", 128, 0, BASE)
        assert "--no-chat-rows" in e.value.hint
        builtin_rows(tokenizer, "measure", 128, 0, BASE, chat_rows=False)


MORE = "additional_chat_templates"
TEMPLATES: dict[str, tuple[dict[str, str], Any, str | None]] = {
    "string": ({}, "A", "A"),
    "list": ({}, [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "C"}], "C"),
    "object": ({}, {"tool_use": "B", "default": "C"}, "C"),
    "processor's, several": ({"chat_template.json": '{"chat_template": {"default": "G"}}'}, None, "G"),
    "file first": ({"chat_template.jinja": "D"}, "A", "D"),
    "byte order mark": ({"chat_template.jinja": "\ufeffD"}, None, "D"),
    "additional folder": ({f"{MORE}/default.jinja": "E", f"{MORE}/rag.jinja": "F"}, None, "E"),
    "additional beside": ({"chat_template.jinja": "D", f"{MORE}/rag.jinja": "F"}, None, "D"),
    "none": ({}, None, None),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_places_of_templates(name: str, folder: Path) -> None:
    files, setting, expected = TEMPLATES[name]
    put(folder, "tokenizer_config.json", {} if setting is None else {"chat_template": setting})
    for file, text in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text, encoding="utf-8")
    found = read_tokenizer_files(folder)
    assert found.chat_template == expected
    assert not found.warnings


@pytest.mark.parametrize(
    ("setting", "said"),
    [({"tool_use": "B", "rag": "C"}, "has 'tool_use', 'rag' and no 'default'"),
     ([{"name": "tool_use", "template": "B"}], "has 'tool_use' and no 'default'"),
     ({"default": 5}, "is {'default': 5}, not a text"), (5, "is 5, not a text")],
)  # fmt: skip
def test_templates_of_which_none_is_for_chats_are_told(setting: Any, said: str, folder: Path) -> None:
    put(folder, "tokenizer_config.json", {"chat_template": setting})
    found = read_tokenizer_files(folder)
    assert found.chat_template is None
    assert [said in w and "become plain text" in w for w in found.warnings] == [True]
    with load(folder) as tokenizer:
        assert found.warnings[0] in tokenizer.warnings
    (folder / "chat_template.jinja").write_text("D")
    assert not read_tokenizer_files(folder).warnings


def test_template_with_added_markers(folder: Path) -> None:
    put(folder, "added_tokens.json", MARKERS)
    put(folder, "tokenizer_config.json", {"chat_template": CHATML})
    chat = Conversation("t", (("user", "Hi"), ("assistant", "Hello")))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": role, "content": content} for role, content in chat.messages]
    with load(folder) as tokenizer:
        assert tokenizer.templates is not None
        text = tokenizer.templates.render(chat)
        assert text == theirs.apply_chat_template(messages, tokenize=False) != plain_chat(chat)
        assert tokenizer.encode(text).tolist()[0] == BASE


def test_output_of_a_conversion(folder: Path, base: Path, copy_of: Callable[[Path], Path]) -> None:
    """The output's added_tokens.json has what only tokenizer_config.json of the source names."""
    model = copy_of(base)
    put(model, "tokenizer_config.json", decoder((BASE, token("<|im_start|>")), (BASE + 1, token("<|im_end|>"))))
    flags = ["-b", "4", "-l", "128", "-ml", "128", "--device", "cpu", "--executor", "inline", "--quality", "reference",
             "--evaluate", "never"]  # fmt: skip
    out, work = folder / "out", folder / "work"
    for _ in range(2):  # the second run finds everything done
        exl2ray("convert", "-i", model, "-o", work, "-cf", out, *flags, seconds=60).ends_with(0)
        assert json.loads((out / "added_tokens.json").read_text()) == MARKERS


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda source: Path(shutil.copytree(source, tmp_path / "copy"))
