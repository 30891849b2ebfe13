"""Several patches of one model, and conversions after them: nothing that a patch did is lost without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from convert_helpers import Quiet, contents, items, messages, recipe, run
from test_overrides import widths

from exl2ray.cli import cli
from exl2ray.convert import convert, patch
from exl2ray.errors import UsageError
from exl2ray.events import Silent
from exl2ray.formats.verify import verify_directory
from exl2ray.recipe import Recipe
from exl2ray.report.facts import read_facts

FIRST, SECOND = "*.0.*.o_proj=8", "*.1.*.v_proj=8"
ATTENTION_OUT, VALUES = "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.v_proj"


@pytest.fixture
def base(quiet: Quiet, tmp_path: Path) -> Recipe:
    """A finished conversion in ``work``, at 4 bpw in ``out``."""
    run(quiet.model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    return recipe(quiet.model, tmp_path / "work", compile_full=str(tmp_path / "out"))


def patched(base: Recipe, *texts: str, to: Path | None = None, undo: bool = False) -> Silent:
    reporter = Silent()
    patch(base, texts, reporter, compile_full=None if to is None else str(to), undo=undo)
    return reporter


def overrides(directory: Path) -> list[str]:
    found: list[str] = json.loads((directory / "config.json").read_text())["quantization_config"].get("overrides", [])
    return found


def eights(directory: Path) -> set[str]:
    return {key for key, w in widths(directory).items() if w == [8] and key != "lm_head"}


def test_patches_add_up(base: Recipe, tmp_path: Path) -> None:
    out, before = tmp_path / "out", contents(tmp_path / "out")
    assert eights(out).isdisjoint({ATTENTION_OUT, VALUES}), "else this test shows nothing"
    patched(base, FIRST)
    found = patched(base, SECOND)
    assert {ATTENTION_OUT, VALUES} <= eights(out)
    assert overrides(out) == [FIRST, SECOND]
    assert f"--set '{FIRST}' --set '{SECOND}'" in (out / "README.md").read_text()
    assert any(f"earlier patches stay: --set '{FIRST}'" in m for m in messages(found, "note"))
    assert not verify_directory(out)
    patched(base, FIRST)
    assert overrides(out) == [SECOND, FIRST], "once is enough"
    undone = patched(base, undo=True)
    assert any("without what earlier patches set" in m for m in messages(undone, "note"))
    assert contents(out) == before
    patched(base, SECOND)
    assert overrides(out) == [SECOND]
    patched(base, FIRST, undo=True)
    assert (overrides(out), VALUES in eights(out), ATTENTION_OUT in eights(out)) == ([FIRST], False, True)


def test_a_conversion_leaves_a_patched_model(base: Recipe, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", contents(tmp_path / "out")
    patched(base, FIRST)
    before = contents(out)
    for damage in (lambda: None, (out / "output.safetensors").unlink, lambda: shutil.rmtree(out)):
        damage()
        reporter = Silent()
        convert(base, reporter)
        assert items(reporter) == []
        assert contents(out) == before
        assert any(f"{out} was patched and stays so: --set '{FIRST}'; back with: exl2ray patch -o" in m
                   for m in messages(reporter, "note"))  # fmt: skip
    elsewhere = Silent()
    convert(recipe(Path(base.in_dir), Path(base.out_dir), compile_full=str(tmp_path / "new"), reuse=True), elsewhere)
    assert contents(tmp_path / "new") == plain
    assert any(f"{out} was patched (--set '{FIRST}'); {tmp_path / 'new'} is written without" in m
               for m in messages(elsewhere, "note"))  # fmt: skip


def test_a_conversion_that_has_to_begin_anew_says_what_is_lost(base: Recipe, tmp_path: Path) -> None:
    first = set((tmp_path / "work" / "quant" / "4.0" / "records").glob("model.layers.0.self_attn.*"))
    plain = contents(tmp_path / "out")
    patched(base, FIRST)
    (record,) = first
    record.unlink()
    reporter = Silent()
    convert(base, reporter)
    again = f"then patch it again: exl2ray patch -o {base.out_dir} --set '{FIRST}'"
    assert any(again in m for m in messages(reporter, "warning"))
    assert contents(tmp_path / "out") == plain
    quiet_now = Silent()
    convert(base, quiet_now)
    assert not any("patched" in m for m in [*messages(quiet_now, "warning"), *messages(quiet_now, "note")])


def test_variants_in_directories_of_their_own(base: Recipe, tmp_path: Path) -> None:
    """Each begins with the conversion's own model, and a patch of one adds to it."""
    one, two = tmp_path / "one", tmp_path / "two"
    patched(base, FIRST, to=one)
    patched(base, SECOND, to=two)
    assert (overrides(one), overrides(two), overrides(tmp_path / "out")) == ([FIRST], [SECOND], [])
    (shown,) = read_facts(base.out_dir).bitrates
    wide = {key for key, option in shown.chain.options.items() if key in (ATTENTION_OUT, VALUES) and ":8b_" in option}
    assert (shown.directory, wide) == (str(two), {VALUES}), "the report shows one model, not parts of several"
    assert shown.file_bytes == sum(p.stat().st_size for p in two.glob("*.safetensors"))
    patched(base, SECOND, to=one)
    assert overrides(one) == [FIRST, SECOND]
    patched(base, FIRST)  # of the conversion's own model
    patched(base, SECOND, to=tmp_path / "three")
    assert overrides(tmp_path / "three") == [FIRST, SECOND]


def test_without_a_directory_of_its_own(quiet: Quiet, tmp_path: Path) -> None:
    """The shards lie in the work directory, which may be moved."""
    work = tmp_path / "work"
    run(quiet.model, work)
    patched(recipe(quiet.model, work), FIRST)
    work.rename(tmp_path / "moved")
    moved = recipe(quiet.model, tmp_path / "moved")
    found = patched(moved, SECOND)
    assert any(f"earlier patches stay: --set '{FIRST}'" in m for m in messages(found, "note"))
    reporter = Silent()
    convert(moved, reporter)
    assert any("was patched and stays so" in m for m in messages(reporter, "note"))


def test_what_another_work_directory_patched(base: Recipe, quiet: Quiet, tmp_path: Path) -> None:
    """And what earlier versions did, which remembered nothing: a warning before it is replaced."""
    patched(base, FIRST)
    shutil.copytree(base.out_dir, tmp_path / "other")
    for record in (tmp_path / "other" / "quant" / "4.0" / "records").glob("patches.*"):
        record.unlink()
    other = recipe(quiet.model, tmp_path / "other", compile_full=str(tmp_path / "out"))
    found = patched(other, SECOND)
    assert any(f"made with --set '{FIRST}', is replaced by one without" in m for m in messages(found, "warning"))
    assert overrides(tmp_path / "out") == [SECOND]


def test_a_patch_of_nothing(base: Recipe) -> None:
    done = CliRunner().invoke(cli, ["patch", "-o", base.out_dir])
    assert done.exit_code == UsageError.exit_code
    assert "nothing to change" in done.output
