"""The command: where the page goes, what is said, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from report_helpers import Model, evaluation, write_job

from exl2ray.cli import cli
from exl2ray.errors import StoreError
from exl2ray.formats.files import refuse_special
from exl2ray.store.file_names import is_ours
from exl2ray.store.open import open_store


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["report", *map(str, args)])


@pytest.fixture
def work(tmp_path: Path) -> Path:
    root = tmp_path / "work"
    write_job(open_store(str(root)), Model(1), (3.0,))
    return root


def test_the_page_is_a_file_of_the_work_directory(work: Path) -> None:
    result = run(work)
    assert result.exit_code == 0, result.output
    assert (work / "report.html").read_text().startswith("<!doctype html>")
    assert is_ours("report.html")
    assert str(work / "report.html") in result.output


def test_output_and_json(work: Path, tmp_path: Path) -> None:
    result = run(work, "-o", tmp_path / "page.html", "--json")
    found = json.loads(result.stdout)
    assert found == {
        "report": str(tmp_path / "page.html"), "bytes": (tmp_path / "page.html").stat().st_size,
        "sections": ["summary", "notes", "settings"], "problems": [],
    }  # fmt: skip
    assert [p.name for p in work.iterdir()] == ["job.json"]
    run(work, "-o", tmp_path)
    assert (tmp_path / "report.html").is_file()


def test_an_evaluation_from_a_file(work: Path, tmp_path: Path) -> None:
    file = tmp_path / "eval.json"
    file.write_text(json.dumps(evaluation((3.0,))))
    result = run(work, "--eval", file, "-o", tmp_path / "page.html", "--paths")
    assert result.exit_code == 0, result.output
    assert "/out/imitation-3bpw" in (tmp_path / "page.html").read_text()


def test_refusals(work: Path, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x.txt").write_text("x")
    assert run(tmp_path / "foreign").exit_code == 7
    assert run(tmp_path / "missing").exit_code == 7
    assert run(work, "-o", tmp_path / "no" / "page.html").exit_code == 7
    assert run(work, "--eval", tmp_path / "none.json").exit_code == 8
    (tmp_path / "bad.json").write_text("{}")
    result = run(work, "--eval", tmp_path / "bad.json")
    assert result.exit_code == 8
    assert "bad.json: 'results' is missing" in result.output
    assert sorted(p.name for p in (tmp_path / "foreign").iterdir()) == ["x.txt"]
    assert [p.name for p in work.iterdir()] == ["job.json"]


def test_a_page_takes_the_place_of_an_earlier_page_only(work: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "report.html").write_text("<!doctype html>\n<html><title>Spending in EXL</title>")
    for given, file in (("notes.txt", "notes.txt"), ("site", "site/report.html")):
        before = (tmp_path / file).read_text()
        result = run(work, "-o", tmp_path / given)
        assert result.exit_code == 7
        assert f"{tmp_path / file} is there already, and is no report: it would be overwritten" in result.output
        assert "name another file with -o" in result.output
        assert (tmp_path / file).read_text() == before
    (tmp_path / "empty").write_text("")
    for _ in range(2):
        result = run(work, "-o", tmp_path / "empty")
        assert result.exit_code == 0, result.output
    assert (tmp_path / "empty").read_text().startswith("<!doctype html>")


def test_a_page_does_not_take_the_place_of_a_pipe_or_device(work: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = run(work, "-o", tmp_path / "pipe")
    assert result.exit_code == 7
    assert "a FIFO, whose place a file would take" in result.output
    assert (tmp_path / "pipe").is_fifo()
    assert run(work, "-o", "/dev/null").exit_code == 7
    for name in ("/dev/null", "/dev/stdout"):
        with pytest.raises(StoreError, match="whose place a file would take"):
            refuse_special(name, "-o")
