"""Chat templates of models that see, and of publishers who use all that transformers gives a template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from bounded import exl2ray
from model_folders import write_json

from exl2ray.calibration.chat_text import ChatRenderer
from exl2ray.calibration.conversion import converted_json
from exl2ray.calibration.text import Conversation
from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.calibration.tokenizer_files import read_tokenizer_files
from exl2ray.errors import CalibrationError, SourceError
from exl2ray.formats.side_files import UNREAD, broken_side_files

TALK = Conversation("", (("user", "Hello there"), ("assistant", "Hi")))
SYSTEM = Conversation("", (("system", "Be kind."), *TALK.messages))
FEW = ("-l", "128", "-ml", "128")
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    "{% elif p['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
)
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}" + PARTS


def test_a_template_that_wants_the_parts_of_a_message() -> None:
    assert ChatRenderer(PARTS, {}).render(TALK) == "<user>Hello there<assistant>Hi"
    assert ChatRenderer(PARTS, {}).render(SYSTEM) == "<system>Be kind.<user>Hello there<assistant>Hi"
    assert ChatRenderer(NO_SYSTEM, {}).render(SYSTEM) == "<user>Be kind.\n\nHello there<assistant>Hi"


def test_what_fails_in_every_way_is_told_as_of_plain_messages() -> None:
    template = "{{ raise_exception('as text' if messages[0].content is string else 'in parts') }}"
    with pytest.raises(CalibrationError, match="as text"):
        ChatRenderer(template, {}).render(TALK)
    with pytest.raises(CalibrationError, match="as text"):
        ChatRenderer(template, {}).render(SYSTEM)
    with pytest.raises(CalibrationError, match="is missing"):
        ChatRenderer("nothing", {}).render(Conversation("", (("system", "alone"),)))


@pytest.mark.parametrize(
    ("arguments", "options"),
    [("", {}), ("indent=2", {"indent": 2}), ("separators=(',', ':')", {"separators": (",", ":")}),
     ("sort_keys=True, ensure_ascii=True", {"sort_keys": True, "ensure_ascii": True})],
)  # fmt: skip
def test_tojson_takes_what_that_of_transformers_takes(arguments: str, options: dict[str, Any]) -> None:
    template = "{% for m in messages %}{{ {'z': 'ü', 'a': [1, 2]} | tojson(" + arguments + ") }}{{ m.content }}{% endfor %}"
    value = json.dumps({"z": "ü", "a": [1, 2]}, **{"ensure_ascii": False, **options})
    assert ChatRenderer(template, {}).render(TALK) == f"{value}Hello there{value}Hi"


MARKED = [
    "{% for m in messages %}{% generation %}\n{{ m.content }}\n{% endgeneration %}\n{% endfor %}",
    "{% for m in messages %}\n  {%- generation %}\n  {{ m.content }}\n  {%- endgeneration -%}\n  {% endfor %}",
    "{%- for m in messages -%}{%+ generation -%} {{ m.content }}{%- endgeneration +%}\n{%- endfor -%}",
    "{% set x = 'a' %}{% for m in messages %}{% generation %}{% set x = 'b' %}{{ m.content }}{% endgeneration %}"
    "{{ x }}{% endfor %}",
    "{{ image_token }}{{ seen_token }}{{ x_token }}{{ y }}{{ mask_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
]


@pytest.mark.parametrize("template", MARKED)
def test_line_ends_and_names_are_those_of_transformers(template: str, folder: Path) -> None:
    """Beside the tag that marks what is trained on; and special tokens under the names that a model gives them."""
    settings = {"chat_template": template, "image_token": "<s>", "seen_token": {"__type": "AddedToken", "content": "</s>"},
                "broken_token": {"content": "A"}, "x_token": None, "extra_special_tokens": {"y": "B"}}  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings)
    messages = [{"role": role, "content": content} for role, content in TALK.messages]
    wanted = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    with load_tokenizer(folder, json.loads((folder / "config.json").read_text()), 259) as tokenizer:
        assert tokenizer.templates is not None
        assert tokenizer.templates.render(TALK) == wanted


def template_of(folder: Path) -> str | None:
    return read_tokenizer_files(folder).chat_template


def test_the_template_of_a_processor(folder: Path) -> None:
    """Models that see have theirs in chat_template.json; anything else that is there goes first."""
    write_json(folder / "chat_template.json", {"chat_template": PARTS})
    assert template_of(folder) == PARTS
    write_json(folder / "chat_template.json", {"other": 1})
    assert template_of(folder) is None
    (folder / "chat_template.json").write_text("{")
    with pytest.raises(SourceError, match=r"chat_template.json: not valid JSON"):
        template_of(folder)
    (folder / "chat_template.jinja").write_text("mine")
    assert template_of(folder) == "mine"


def test_a_vocabulary_of_mistral_names_the_package(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exl2ray.calibration import conversion
    from exl2ray.calibration.limited import ChildError

    class Child:
        def __init__(self, kind: str) -> None:
            pass

        def ask(self, *_: Any, **__: Any) -> Any:
            raise ChildError("ImportError: MistralConverter requires the mistral-common library but it was not found")

        def close(self) -> None:
            pass

    monkeypatch.setattr(conversion, "LimitedProcess", Child)
    (folder / "tokenizer.json").unlink()
    write_json(folder / "tekken.json", {"vocab": []})
    with pytest.raises(SourceError, match="of Mistral") as e:
        converted_json(folder)
    assert "pip install mistral-common" in e.value.hint


def test_files_that_are_copied_unread_are_looked_at(folder: Path) -> None:
    """Whoever loads the result would fail on them, and blame the result."""
    (folder / "chat_template.jinja").write_text(PARTS)  # so that chat_template.json is not read
    for content in ("{}", '{"do_sample": true, "temperature": NaN}'):
        for name in UNREAD:
            (folder / name).write_text(content)
        assert broken_side_files(folder) == []
    for content, says in (('{"a": ', "not valid JSON: cut off"), ("[1]", "a JSON object is needed, this is a list")):
        for name in UNREAD:
            (folder / name).write_text(content)
        told = broken_side_files(folder)
        assert len(told) == len(UNREAD)
        assert all(f"{name}: {says}" in text for name, text in zip(UNREAD, told, strict=True))
    told = [f"{name}: a JSON object is needed" for name in UNREAD]
    exl2ray("plan", "-i", folder, "-b", "4", *FEW).ends_with(0, *told, "fetch it again, or delete it")


def test_a_template_that_cannot_be_compiled_is_a_warning(folder: Path, tmp_path: Path) -> None:
    """Also where the calibration has no conversations: the result could hold none."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    plan = ("plan", "-i", folder, "-b", "4", *FEW, "-c", tmp_path / "text.txt", "-r", "2", "-mr", "2")
    says = "the model's chat template cannot be used ("
    (folder / "chat_template.jinja").write_text(PARTS)
    assert says not in exl2ray(*plan).text
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    exl2ray(*plan).ends_with(0, f"{says}TemplateSyntaxError", "copied into the output")
