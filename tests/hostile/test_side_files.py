"""Files beside the weights, which are copied along: sizes, counts and kinds are looked at before anything is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from small_sources import write_source
from workdir_cases import Conversion

from exl2ray.errors import Exl2RayError, SourceError
from exl2ray.formats.json_file import MIB
from exl2ray.formats.side_files import (
    MOST_FILES,
    NEEDED,
    OTHER_BYTES,
    TEMPLATES,
    TOTAL_BYTES,
    _pieces,
    copy_side_files,
    examine_side_files,
    needed_files,
    stale_side_files,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "model"))


def plan(model: Path) -> Any:
    return exl2ray("plan", "-i", model, "-b", "4", "-l", "128", "-ml", "128", "--device", "cpu")


def dry_run(model: Path) -> Any:
    return exl2ray("convert", "-i", model, "-o", model.with_name("work"), "-cf", model.with_name("target"), "-b", "4", "-l",
                   "128", "-ml", "128", "--device", "cpu", "--executor", "inline", "--dry-run")  # fmt: skip


def sparse(path: Path, size: int = 6 << 30) -> None:
    with path.open("wb") as f:
        f.truncate(size)


@pytest.mark.parametrize("look", [plan, dry_run])
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json", "chat_template.jinja", "merges.txt"])
def test_a_huge_file_that_the_model_needs(name: str, look: Callable[[Path], Any], model: Path) -> None:
    sparse(model / name)
    look(model).ends_with(3, name, f"larger than {NEEDED[name]} bytes")


@pytest.mark.parametrize("name", sorted(set(NEEDED) - {"config.json", "adapter_config.json"}))
def test_every_kind_has_a_limit(name: str, model: Path) -> None:
    sparse(model / name, NEEDED[name])
    assert examine_side_files(model).refused == ()
    sparse(model / name, NEEDED[name] + 1)
    (refused,) = examine_side_files(model).refused
    assert f"{name}: {NEEDED[name] + 1} bytes" in refused.message


@pytest.mark.parametrize("look", [plan, dry_run])
@pytest.mark.parametrize("name", ["README.md", "LICENSE", "report.pdf", "modeling_x.py", "eval_results.json"])
def test_a_huge_file_that_it_does_not(name: str, look: Callable[[Path], Any], model: Path) -> None:
    sparse(model / name)
    look(model).ends_with(0, "not copied into the output, larger than 32 MiB", f"{name} (6144 MiB)")


NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (os.mkfifo, "a FIFO"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "a device"),
    "a link to itself": (lambda p: p.symlink_to(p.name), "a link"),
    "a link to nothing": (lambda p: p.symlink_to("../../blobs/0123"), "a link"),
}


@pytest.mark.parametrize("kind", NO_FILES)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "LICENSE"])
def test_what_is_no_file_is_named(name: str, kind: str, model: Path) -> None:
    make, says = NO_FILES[kind]
    make(model / name)
    dry_run(model).ends_with(0, "not regular files", f"{name} ({says}")


def test_many_files_that_are_each_small_enough(model: Path) -> None:
    for i in range(TOTAL_BYTES // OTHER_BYTES + 3):
        sparse(model / f"{i:02d}.txt", OTHER_BYTES)
    dry_run(model).ends_with(0, "beyond 1000 files or 1024 MiB together")
    found = examine_side_files(model)
    assert sum(found.sizes.values()) <= TOTAL_BYTES
    assert "tokenizer.json" in found.sizes
    assert "and 1 more" in found.warnings[0]  # 32.txt to 34.txt, and one for the tokenizer's own bytes


def test_more_names_than_a_model_has(model: Path) -> None:
    for i in range(MOST_FILES):
        (model / f"a{i}").touch()
    found = examine_side_files(model)
    assert len(found.sizes) == MOST_FILES
    assert "tokenizer.json" in found.sizes
    dry_run(model).ends_with(0, "beyond 1000 files")


def test_a_name_that_would_draw_on_the_terminal(model: Path) -> None:
    sparse(model / "\x1b[2J\u202ea\nb.txt", OTHER_BYTES + 1)
    run = plan(model)
    run.ends_with(0, "larger than 32 MiB")
    assert not set(run.out + run.err) & set("\x1b\u202e")


@pytest.mark.parametrize("size", [0, 1, MIB, 2 * MIB + 1])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_that_changes_its_size_is_not_copied(size: int, change: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * size)
    assert b"".join(_pieces(tmp_path / "x", size)) == b"x" * size
    if size + change >= 0:
        with pytest.raises(SourceError, match="written to while"):
            list(_pieces(tmp_path / "x", size + change))


def test_it_converts_without_them_and_then_writes_nothing(made: Conversion, tmp_path: Path) -> None:
    model = Path(shutil.copytree(made.model, tmp_path / "model"))
    sparse(model / "report.pdf")
    os.mkfifo(model / "preprocessor_config.json")
    work, target = made.copy_of_work(tmp_path / "work"), tmp_path / "target"
    reporters = [made.convert(work, target, in_dir=str(model))[1] for _ in range(2)]
    for reporter in reporters:
        told = [f["message"] for name, f in reporter.events if name == "warning"]
        assert sum("report.pdf" in m or "preprocessor_config.json" in m for m in told) == 2
    assert not {"report.pdf", "preprocessor_config.json"} & {p.name for p in target.iterdir()}
    assert not [f for name, f in reporters[1].events if name == "stage"]


@pytest.fixture
def with_templates(model: Path) -> Path:
    """The model with two chat templates in the folder of such, and what belongs to none."""
    folder = model / TEMPLATES
    folder.mkdir()
    for name in ("default.jinja", "tool_use.jinja", ".hidden.jinja", "notes.txt"):
        (folder / name).write_text(name)
    (folder / "deeper.jinja").mkdir()
    return model


COPIED = {f"{TEMPLATES}/default.jinja", f"{TEMPLATES}/tool_use.jinja"}


def test_chat_templates_in_their_folder_are_of_the_model(with_templates: Path, tmp_path: Path) -> None:
    assert {n for n in examine_side_files(with_templates).sizes if "/" in n} == COPIED
    names = copy_side_files(with_templates, tmp_path / "out")
    assert {n for n in names if "/" in n} == COPIED
    assert {p.name for p in (tmp_path / "out" / TEMPLATES).iterdir()} == {"default.jinja", "tool_use.jinja"}
    assert stale_side_files(with_templates, tmp_path / "out") == []
    before = needed_files(with_templates)
    (with_templates / TEMPLATES / "tool_use.jinja").write_text("another one")
    assert needed_files(with_templates) != before
    assert stale_side_files(with_templates, tmp_path / "out") == [f"{TEMPLATES}/tool_use.jinja"]


def test_chat_templates_in_their_folder_are_bounded(with_templates: Path) -> None:
    sparse(with_templates / TEMPLATES / "default.jinja")
    dry_run(with_templates).ends_with(3, f"{TEMPLATES}/default.jinja", f"larger than {MIB} bytes")


def test_chat_templates_of_elsewhere_are_not_copied(with_templates: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of somebody")
    (with_templates / TEMPLATES / "default.jinja").unlink()
    (with_templates / TEMPLATES / "default.jinja").symlink_to(tmp_path / "secret")
    dry_run(with_templates).ends_with(3, "outside of the model's folder", f"{TEMPLATES}/default.jinja")
    shutil.rmtree(with_templates / TEMPLATES)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.jinja").write_text("of somebody")
    (with_templates / TEMPLATES).symlink_to(tmp_path / "more")
    dry_run(with_templates).ends_with(3, "outside of the model's folder", f"{TEMPLATES}/x.jinja")


def test_chat_templates_are_written_beside_the_model_and_nowhere_else(made: Conversion, tmp_path: Path) -> None:
    model, target = Path(shutil.copytree(made.model, tmp_path / "model")), tmp_path / "target"
    (model / TEMPLATES).mkdir()
    (model / TEMPLATES / "rag.jinja").write_text("{{ messages }}")
    work = made.copy_of_work(tmp_path / "work")
    (tmp_path / "elsewhere").mkdir()
    target.mkdir()
    (target / TEMPLATES).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Exl2RayError, match=f"{TEMPLATES}.*link"):
        made.convert(work, target, in_dir=str(model))
    (target / TEMPLATES).unlink()
    for _ in range(2):
        made.convert(work, target, in_dir=str(model))
        assert (target / TEMPLATES / "rag.jinja").read_text() == "{{ messages }}"
    assert not list((tmp_path / "elsewhere").iterdir())
    (target / TEMPLATES / "rag.jinja").unlink()
    made.convert(work, target, in_dir=str(model))
    assert (target / TEMPLATES / "rag.jinja").is_file()


def test_what_a_conversion_left_in_the_source_is_not_of_the_next_one(model: Path) -> None:
    for name in ("measurement.json", "evaluation.json", "job_new.json"):
        (model / name).write_text("{}")
    found = set(examine_side_files(model).sizes)
    assert "tokenizer.json" in found
    assert not {"measurement.json", "evaluation.json", "job_new.json"} & found
