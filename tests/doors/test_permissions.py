"""Files and folders that this user may not read or enter: named as that, before work, by every command; never a traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bounded import exl2ray
from model_folders import read_weights, write_sharded
from rounded_models import write_rounded

from exl2ray.formats.side_files import examine_side_files

DENIED = "Permission denied"
LOOK = "look at the permissions of it"
FAST = ("-b", "4", "-l", "128", "-ml", "128", "--device", "cpu", "--executor", "inline", "--evaluate", "never")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 499723\n"


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that may be neither listed nor entered."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    yield folder
    folder.chmod(0o700)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "tokenizer_config.json"]
)
def test_a_file_of_the_model(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / name).chmod(0)
    run = exl2ray("convert", "-i", folder, "-o", tmp_path / "w", "-cf", tmp_path / "o", *FAST, "--dry-run", ordinary=True)
    run.ends_with(3, name, DENIED, LOOK)


def test_a_file_that_a_model_does_not_need_is_left_out(folder: Path, tmp_path: Path) -> None:
    """It was found when everything had been quantised."""
    (folder / "paper.pdf").write_bytes(b"%PDF" * 20)
    (folder / "paper.pdf").chmod(0)
    run = exl2ray("convert", "-i", folder, "-o", tmp_path / "w", "-cf", tmp_path / "o", *FAST, "--dry-run", ordinary=True)
    run.ends_with(0, "not copied into the output, this user may not read them: paper.pdf")


def test_a_folder_that_may_be_listed_and_not_entered(folder: Path) -> None:
    """It was called empty."""
    folder.chmod(0o444)
    for command in (("plan", "-i"), ("eval",), ("inspect",), ("verify",)):
        exl2ray(*command, folder, ordinary=True).ends_with(8 if command[0] in ("inspect", "verify") else 3, LOOK,
                                                           "may be listed, but nothing in it may be read")  # fmt: skip
    folder.chmod(0o700)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_link_to_where_this_user_may_not_look(name: str, folder: Path, closed: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(closed / name)
    exl2ray("plan", "-i", folder, *FAST[:6], ordinary=True).ends_with(3, name, DENIED, LOOK)


def test_shards_in_a_folder_below(folder: Path) -> None:
    tensors = read_weights(folder)
    (folder / "model.safetensors").unlink()
    write_sharded(folder, tensors, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    (folder / "below").mkdir(mode=0)
    index.write_text(index.read_text().replace("model-00002", "below/model-00002"))
    exl2ray("plan", "-i", folder, *FAST[:6], ordinary=True).ends_with(3, "below/model-00002-of-00002.safetensors")
    (folder / "below").chmod(0o700)


PLACES: dict[str, tuple[int, Callable[[Path, Path], list[str | Path]]]] = {
    "-i": (2, lambda m, c: ["convert", "-i", c / "m", "-o", m.parent / "w", *FAST]),
    "-o": (7, lambda m, c: ["convert", "-i", m, "-o", c / "w", *FAST]),
    "-o itself": (7, lambda m, c: ["convert", "-i", m, "-o", c, *FAST]),
    "-cf": (7, lambda m, c: ["convert", "-i", m, "-o", m.parent / "w", "-cf", c / "o", *FAST]),
    "-cf itself": (7, lambda m, c: ["convert", "-i", m, "-o", m.parent / "w", "-cf", c, *FAST]),
    "-c": (2, lambda m, c: ["convert", "-i", m, "-o", m.parent / "w", "-c", c / "a.txt", *FAST]),
    "-c with a column": (2, lambda m, c: ["convert", "-i", m, "-o", m.parent / "w", "-c", f"{c}/a.jsonl:text", *FAST]),
    "-m": (2, lambda m, c: ["convert", "-i", m, "-o", m.parent / "w", "-m", c / "m.json", *FAST]),
    "-om": (7, lambda m, c: ["convert", "-i", m, "-o", m.parent / "w", "-om", c / "m.json", *FAST]),
    "-om, a folder": (7, lambda m, c: ["convert", "-i", m, "-o", m.parent / "w", "-om", c, *FAST]),
    "--eval-text": (4, lambda m, c: ["convert", "-i", m, "-o", m.parent / "w", "-cf", m.parent / "o", "--eval-text",
                                     c / "a.txt", *FAST[:-1], "always"]),
    "eval": (3, lambda m, c: ["eval", c / "m"]),
    "eval of a GGUF": (3, lambda m, c: ["eval", c / "m.gguf"]),
    "eval --tokens": (4, lambda m, c: ["eval", m, "--tokens", c / "a.npy"]),
    "eval --text": (4, lambda m, c: ["eval", m, "--text", c / "a.txt"]),
    "eval --positions": (2, lambda m, c: ["eval", m, "--positions", c / "a" / "p.npz"]),
    "eval --gguf": (8, lambda m, c: ["eval", "--gguf", c / "m.gguf", "--reference", m]),
    "chat --prompts": (2, lambda m, c: ["chat", m, "--prompts", c / "q.txt"]),
    "report -o": (7, lambda m, c: ["report", m.parent, "-o", c / "r.html"]),
    "status": (7, lambda m, c: ["status", c / "w"]),
    "solve": (8, lambda m, c: ["solve", "-i", m, "-m", c / "m.json"]),
    "calibration": (2, lambda m, c: ["calibration", "-i", m, "-c", c / "a.txt"]),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_a_place_that_may_not_be_entered(case: str, folder: Path, closed: Path) -> None:
    status, line = PLACES[case]
    run = exl2ray(*line(folder, closed), ordinary=True)
    run.ends_with(status, str(closed))
    assert "does not exist" not in run.text, str(run)
    assert not list(folder.parent.glob("w*/*"))  # nothing was begun


def test_a_pointer_of_git_beside_the_weights(folder: Path) -> None:
    """A clone without LFS whose weights were fetched by hand: the output had a tokenizer.model that nothing can read."""
    (folder / "picture.png").write_text(POINTER)
    found = examine_side_files(folder)
    assert not found.refused
    assert "picture.png" not in found.sizes
    assert found.warnings == ("not copied into the output, Git LFS pointers in place of the files: picture.png",)
    (folder / "tokenizer.model").write_text(POINTER)
    exl2ray("plan", "-i", folder, *FAST[:6]).ends_with(3, "tokenizer.model: a Git LFS pointer", "git lfs pull")


def test_a_program_that_cannot_be_run(closed: Path, tmp_path: Path) -> None:
    """`with`: a script without a first line, and one in a folder that may not be entered."""
    script = tmp_path / "script"
    script.write_bytes(b"\0\1 no program\n")
    script.chmod(0o755)
    exl2ray("with", script).ends_with(2, str(script), "cannot be run", "as in #!/bin/sh")
    exl2ray("with", closed / "p.py", ordinary=True).ends_with(2, "no such program")


def test_what_may_not_be_looked_at_is_not_said_to_be_there(folder: Path, closed: Path) -> None:
    run = exl2ray("eval", folder, "--plot", closed / "p.png", ordinary=True)
    run.ends_with(7, "--plot", "cannot be written", DENIED)
    assert "is there already" not in run.text


def test_a_plot_that_cannot_be_written_is_refused_before_work(folder: Path, closed: Path) -> None:
    closed.chmod(0o555)
    for flag, name in (("--plot", "p.png"), ("--positions", "p.npz")):
        run = exl2ray("eval", folder, flag, closed / name, "--rows", "9999", ordinary=True)
        run.ends_with(7, f"{flag} {closed / name}: closed is not a directory that can be written")


def test_a_work_directory_that_may_not_be_entered(closed: Path) -> None:
    """The hint was to give another one with -o, which `status` does not have."""
    for command in ("status", "report"):
        run = exl2ray(command, closed, ordinary=True)
        run.ends_with(7, str(closed), DENIED, LOOK)
        assert "with -o" not in run.err


def test_a_link_beside_a_model_that_is_published(folder: Path, closed: Path, tmp_path: Path) -> None:
    """It ended in a traceback."""
    model = write_rounded(folder, tmp_path / "exl2")
    (model / "notes.md").symlink_to(closed / "notes.md")
    run = exl2ray("publish", model, "--repo", "somebody/model", "--dry-run", ordinary=True)
    run.ends_with(0, "notes.md", "left out")
