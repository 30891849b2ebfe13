"""Model cards: what they say, what they keep, and that they say it the same way every time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exl2ray.evaluate.record import Evaluation, Figure, Kind
from exl2ray.formats.source.folder import Folder
from exl2ray.publish import base_model
from exl2ray.publish.base_model import base_model_of, command, original_card, read_original
from exl2ray.publish.card import CardInfo, Making, add_evaluation, model_card, with_evaluation
from exl2ray.publish.frontmatter import read_fields, split_card, with_fields, write_block
from exl2ray.recipe import Recipe

INFO = CardInfo(
    architecture="LlamaForCausalLM",
    bits=4.0,
    achieved_bpw=3.98765,
    head_bits=6,
    file_bytes=4_700_000_000,
    files=2,
    calibration=None,
    rows=115,
    length=2048,
    making=Making(
        "exl2ray convert -i tiny", (("--damping", "0.12"),), 6.1234, 5.9876, "`--quality balanced`: all of it.", "0.1.0"
    ),
    base_model="owner/tiny",
    original=original_card("---\nlicense: mit\nlanguage: no\ntags: [gguf, poetry]\n---\n# Tiny\nIts own card.\n"),
)
EVALUATION = Evaluation(
    "tiny-4.0bpw", "tiny", 4, 512, 2044, Figure(7.5, 0.12), Figure(7.0, 0.11), kl=Figure(0.01234, 0.0004),
    top1=Figure(0.953, 0.002), kl_tail={"p99": Figure(0.12, None, 0.1, 0.15), "max": Figure(3.0)},
    kinds={"code": Kind(511, Figure(3.0, 0.1), Figure(0.02, 0.001), Figure(0.95))}, file_bytes=4_700_000_000,
    decoder_bpw=3.988, head_bpw=6.03, file_bpw=4.4,
)  # fmt: skip


def fields(card: str) -> dict[str, Any]:
    return dict(yaml.safe_load(split_card(card)[0]))


# ---- what a card says -----------------------------------------------------------------------------------------------


def test_front_matter() -> None:
    assert fields(model_card(INFO)) == {
        "base_model": "owner/tiny",
        "base_model_relation": "quantized",
        "quantized_by": "exl2ray",
        "library_name": "exllamav2",
        "license": "mit",
        "language": "no",
        "tags": ["exl2", "exllamav2", "quantized", "poetry"],
    }
    assert next(iter(fields(model_card(INFO)))) == "base_model"


def test_everything_is_on_the_card() -> None:
    card = with_evaluation(model_card(INFO), EVALUATION)
    for text in (
        "# tiny, EXL2 at 4.0 bits per weight",
        "[owner/tiny](https://huggingface.co/owner/tiny)",
        "| bits per weight | 3.988 in the decoder layers (4 requested), 6 in the output head |",
        "| size | 4.7 GB in 2 files |",
        "| calibration | built-in set, 115 rows x 2048 tokens |",
        "| perplexity on calibration rows | 6.123 (source model: 5.988) |",
        "| perplexity | 7.500 ± 0.12 | 7.000 ± 0.11 |",
        "0.0123 ± 0.0004",
        "95.30% ± 0.20%",
        "2044 predictions in 4 rows of 512 tokens",
        "```sh\nexl2ray convert -i tiny\n```",
        "| `--damping` | 0.12 |",
        'AutoModelForCausalLM.from_pretrained("DIRECTORY")',
        'python test_inference.py -m DIRECTORY -p "Once upon a time,"',
        "a version with the backend `exllamav2`, as commit `01a5915a7bfd`",
        "**Good.** Close to the source model: KL divergence 0.012 nats per token, perplexity 7.5 against 7 of the source",
        "| KL divergence, 99 % are below | 0.120 (0.100 to 0.150) | 0 |",
        "| KL divergence, maximum | 3.000 | 0 |",
        "| bits per weight: decoder, head, whole file | 3.988, 6.030, 4.400 | |",
        "| code | 511 | 3 ± 0.1 | 0.0200 ± 0.0010 | 5.0% |",
        "`--quality balanced`: all of it.",
        "## Original model card\n\n# Tiny\nIts own card.\n",
    ):
        assert text in card, text
    assert "gguf" not in card


def test_what_is_unknown_is_left_out() -> None:
    making = Making("exl2ray convert", (), None, float("nan"))
    card = model_card(CardInfo("XForCausalLM", 3.0, 3.0, 8, 1000, 1, "my|data.parquet", 5, 128, making))
    assert "base_model" not in card
    assert "license" not in card
    assert "Original model card" not in card
    assert "## Evaluation" not in card
    assert "| perplexity on calibration rows | not finite (source model: not finite) |" in card
    assert "own data (my\\|data.parquet), 5 rows" in card
    other_program = model_card(CardInfo("XForCausalLM", 3.0, 3.0, 8, 1000, 1, None, 5, 128))
    assert "How it was made" not in other_program


def test_an_evaluation_is_put_in_its_place_and_replaced() -> None:
    plain = model_card(INFO)
    once = with_evaluation(plain, EVALUATION)
    assert once != plain
    other = Evaluation("m", "", 1, 2, 3, Figure(9.9))
    assert "| perplexity | 9.900 | - |" in with_evaluation(once, other)
    assert with_evaluation(with_evaluation(once, other), EVALUATION) == once
    by_hand = with_evaluation("# By hand\n", other)
    assert by_hand.startswith("# By hand\n\n<!-- exl2ray: evaluation -->\n## Evaluation\n")
    assert with_evaluation(by_hand, other) == by_hand


# ---- of a conversion ------------------------------------------------------------------------------------------------


def test_a_conversion_writes_it(source: Path, converted: Path) -> None:
    card = (converted / "4.0bpw" / "README.md").read_text(encoding="utf-8")
    found = fields(card)
    assert found["license"] == "other"
    assert found["license_name"] == "loopback"
    assert found["language"] == ["no", "en"]
    assert found["pipeline_tag"] == "text-generation"
    assert found["tags"] == ["exl2", "exllamav2", "quantized", "poetry"]
    assert "base_model" not in found  # the source's own base model is not ours, and where it came from is not known
    assert card.endswith("## Original model card\n\n# Tiny model\n\nMade of noise. --- Really.\n")
    assert f"in 1 file |\n| calibration | own data ({'text.parquet'}), 6 rows x 128 tokens |" in card
    assert (
        "```sh\nexl2ray convert -i MODEL -o work -b 4 -cf out -c text.parquet -r 6 -mr 4 -l 128 -ml 128 -ss 0\n```" in card
    )
    assert "189 predictions in 3 rows of 64 tokens" in card  # 64 tokens have 63 successors
    assert card.count("| KL divergence from the source") == 1
    assert str(converted.parent) not in card
    assert str(source.parent) not in card
    bits = {b: (converted / f"{b}bpw" / "README.md").read_text(encoding="utf-8") for b in ("4.0", "5.0")}
    assert bits["4.0"] != bits["5.0"]
    assert len(list((converted / "4.0bpw").glob("README*"))) == 1


def test_figures_are_added_to_a_directory(models: Path) -> None:
    add_evaluation(models / "4.0bpw", EVALUATION)
    text = (models / "4.0bpw" / "README.md").read_text(encoding="utf-8")
    assert "0.0123 ± 0.0004" in text
    assert text.endswith("Made of noise. --- Really.\n")


def test_command_and_settings() -> None:
    base: dict[str, Any] = {"in_dir": "/models/a b", "out_dir": "/somewhere/work", "compile_full": "/else/{bpw}"}
    assert command(Recipe(**base), 4.125, None) == "exl2ray convert -i MODEL -o work -b 4.125 -cf out"
    changed = Recipe(
        **base, bits=(3.0, 4.0), head_bits=8, cal_dataset="/data/my text.parquet", chat_rows=False, rope_alpha=2.5,
        moe_all_experts=True, overrides=("*.v_proj=6", "*.o_proj=5"), device="cpu", objective="norm", gpus=2,
        measurement="/elsewhere/measurement.json", eval_text="/private/eval.txt", ray_address="10.0.0.1:6379",
    )  # fmt: skip
    assert command(changed, 3.0, "owner/tiny") == (
        "exl2ray convert -i tiny -o work -b 3 -cf out -hb 8 -c 'my text.parquet' -m measurement.json -ra 2.5"
        " --set '*.v_proj=6' --set '*.o_proj=5' --objective norm --no-chat-rows --moe-all-experts"
    )
    patched = command(Recipe(**base), 4.0, None, ["lm_head=8"]).splitlines()
    assert patched[1] == "exl2ray patch -o work --set lm_head=8 -cf patched"
    shown = dict(base_model.settings(changed))
    assert shown["--set"] == "*.v_proj=6 *.o_proj=5"
    assert (shown["--rope-alpha"], shown["--chat-rows"], shown["--objective-power"]) == ("2.5", "no", "2")
    assert "--measurement-length" not in shown
    assert dict(base_model.settings(Recipe(**base)))["--damping"] == "0.12"


# ---- where a model comes from ---------------------------------------------------------------------------------------


def test_base_model_from_the_cache_of_the_hub(tmp_path: Path) -> None:
    cache = tmp_path / "models--meta--Llama-3.1-8B"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert base_model_of(snapshot) == "meta/Llama-3.1-8B"
    (tmp_path / "link").symlink_to(snapshot)
    assert base_model_of(tmp_path / "link") == "meta/Llama-3.1-8B"
    assert base_model_of(tmp_path) is None
    (cache / "blobs").mkdir()
    (cache / "blobs" / "abc").write_text("# From a blob\n")
    (snapshot / "README.md").symlink_to(os.path.join("..", "..", "blobs", "abc"))
    assert read_original(snapshot).text == "# From a blob"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://huggingface.co/owner/name", "owner/name"),
        ("https://user:hf_secret@huggingface.co/owner/name.git", "owner/name"),
        ("git@hf.co:owner/my.name-7B", "owner/my.name-7B"),
        ("https://github.com/owner/name", None),
        ("https://huggingface.co.evil.example/owner/name", None),
        ("https://huggingface.co/datasets/owner/name", None),
    ],
)
def test_base_model_from_a_clone(tmp_path: Path, url: str, expected: str | None) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text(f'[core]\n\tbare = false\n[remote "origin"]\n\turl = {url}\n\tfetch = +x\n')
    assert base_model_of(tmp_path) == expected


def test_a_card_that_leads_out_of_the_model(tmp_path: Path) -> None:
    """A repository can hold links, and what they lead to would be published."""
    (tmp_path / "secret").write_text("for nobody")
    model = tmp_path / "model"
    model.mkdir()
    (model / "README.md").symlink_to("../secret")
    assert read_original(model) == base_model.NO_CARD
    (model / "README.md").unlink()
    (model / "other.md").write_text("# Fine\n")
    (model / "README.md").symlink_to("other.md")
    assert read_original(model).text == "# Fine"


# ---- cards from anybody ---------------------------------------------------------------------------------------------

DOUBLED = [f"{c}: &{c} [*{b}, *{b}]\n" for b, c in zip("abcdefghijklm", "bcdefghijklmn", strict=True)]
LAUGHS = "a: &a [x, x]\n" + "".join(DOUBLED)


@pytest.mark.parametrize(
    "block",
    [
        "license: [mit\n",
        "- a\n- list\n",
        "just text\n",
        "[" * 5000,
        "license: &x [*x]\n",
        LAUGHS + "license: *n\n",
        "license: !!python/object/apply:os.system ['touch made']\n",
        "license: {name: mit}\n",
        "license: !!python/name:os.system x\n",
        "license: ~\n",
        "license: ''\n",
        'license: "a\\x07b"\n',
        "license: " + "x" * 300 + "\n",
        "license: mit\n" * 9000,
        "? [a, b]\n: c\n",
        'license: "\\UFFFFFFFF"\n',
        "\x00\n",
    ],
    ids=range(17),
)
def test_hostile_blocks_leave_nothing(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = original_card(f"---\n{block}---\nbody\n")
    assert dict(found.fields).get("license") is None
    assert found.text in ("body", f"---\n{block}---\nbody".strip())
    assert list(tmp_path.iterdir()) == []


def test_unusable_cards(tmp_path: Path) -> None:
    assert read_original(tmp_path) == base_model.NO_CARD
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---\nnot text")
    assert "not text" in read_original(tmp_path).text
    (tmp_path / "README.md").write_bytes(b"x" * (base_model.MAX_CARD_BYTES + 1))
    assert read_original(tmp_path) == base_model.NO_CARD
    (tmp_path / "README.md").unlink()
    (tmp_path / "README.md").mkdir()
    assert read_original(tmp_path) == base_model.NO_CARD


def test_fields_are_replaced_and_the_rest_stays() -> None:
    below = "---\n# Card\n---\nnot: a field\n"
    card = f"---\nlicense: mit  # really\nbase_model:\n- a/b\n  # why\n- c/d\n\ntags:\n  - x\n{below}"
    new = with_fields(card, {"base_model": "e/f", "quantized_by": "me"})
    assert new == f"---\nbase_model: e/f\nquantized_by: me\nlicense: mit  # really\ntags:\n  - x\n{below}"
    assert with_fields("# Bare\n", {"a": "b"}) == "---\na: b\n---\n# Bare\n"


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
NAMES = st.from_regex(r"[a-z_]{1,10}", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(NAMES, WORDS | st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=4), NAMES, WORDS)
def test_blocks_come_back_as_they_were_written(block: dict[str, Any], name: str, value: str) -> None:
    card = write_block(block) + "below\n"
    assert read_fields(split_card(card)[0]) == block
    assert yaml.safe_load(split_card(card)[0]) == block
    changed = with_fields(card, {name: value})
    assert yaml.safe_load(split_card(changed)[0]) == {**block, name: value}
    assert split_card(changed)[1] == "below\n"


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
@example("license: 3\nlanguage: [en, 1, .nan, null]\ntags: [2020-01-01, x]")
@example("license: mit\ntags: {a: 1}")
def test_any_text_is_a_card(text: str) -> None:
    kept = original_card(f"---\n{text}\n---\n")
    values = [v for _, value in kept.fields for v in (value if isinstance(value, list) else [value])]
    assert all(isinstance(v, str) for v in (*values, *kept.tags))


SPACES = 1 << 16  # as many characters as are read


@pytest.mark.parametrize("text", ["\n" * SPACES, "url=" + "-hf.co:" * (SPACES // 8) + "a/b c", "url" + " " * SPACES])
def test_a_git_config_takes_no_time(tmp_path: Path, text: str) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text(text[:SPACES])
    start = time.process_time()
    assert base_model_of(tmp_path) is None
    assert time.process_time() - start < 1


def test_a_card_takes_no_time(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    start = time.process_time()
    for text in ("base_model:" + " " * SPACES, "base_model:\n" + "\t" * SPACES):
        card.write_text(text)
        assert Folder(tmp_path).base_model() is None
    assert time.process_time() - start < 1
    for text in ("base_model: a/b", "base_model: 'a/b'", "base_model:\n- a/b", 'base_model: \r\n  -  "a/b"'):
        card.write_text(text)
        assert Folder(tmp_path).base_model() == "a/b"
