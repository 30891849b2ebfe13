"""The pages: commands that they show run on the demo model, and messages that they explain exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from bounded import exl2ray
from tiny_models import write_model

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))
RUN = re.compile(r"<!-- run -->\n```bash\n(.*?)```", re.S)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "cluster").rglob("*.md")])


def commands(page: Path) -> list[list[str]]:
    """The commands of the blocks that are marked to be run, in order."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in RUN.findall(text) for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", ["docs/tutorial.md"])
def test_the_commands_of_a_page_run(page: str, tmp_path: Path) -> None:
    """In an empty folder, a tiny model in place of the user's; few and short rows, so that it takes seconds and no hour."""
    write_model(tmp_path / "smollm2", max_position_embeddings=2048)
    found = commands(ROOT / page)
    assert len(found) >= 8
    for command in found:
        assert command[0] == "exl2ray"
        arguments = command[1:]
        if arguments[0] == "convert" and "-i" in arguments:
            arguments += ["-l", "128", "-ml", "128", "-r", "12", "-mr", "4"]
        if arguments[0] == "chat":
            arguments += ["--max-tokens", "8"]
        if arguments[0] in ("convert", "chat", "eval", "patch"):
            arguments += ["--device", "cpu"]
        if arguments[0] == "eval":
            arguments += ["--length", "128"]
        run = exl2ray(*arguments, cwd=tmp_path, seconds=600, memory=8 << 30)
        allowed = (0, 1) if arguments[0] in ("doctor", "plan") else (0,)  # these two report on the machine they run on
        assert run.status in allowed, f"{command}: {run}"
    assert (tmp_path / "work" / "report.html").is_file()


def test_messages_that_are_explained_exist() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(shown) >= 12
    sources = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "exl2ray").rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # adjacent string literals
    assert [text for text in shown if text not in sources] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# ---- the site ---------------------------------------------------------------------------------------------------------


def pages_of(nav: object) -> list[str]:
    """The files that a menu of mkdocs.yml names."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    assert isinstance(entries, Iterable)
    return [page for entry in entries for page in pages_of(entry)]


def test_every_page_is_in_the_menu_once() -> None:
    from site_hooks import ELSEWHERE

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    found = pages_of(settings["nav"])
    assert sorted(found) == sorted({p.name for p in (ROOT / "docs").glob("*.md")} | set(ELSEWHERE))
    assert all((ROOT / source).is_file() for source in ELSEWHERE.values())
    assert settings["validation"]["links"]["not_found"] == settings["validation"]["nav"]["omitted_files"] == "warn"
    assert "--strict" in (ROOT / "Makefile").read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as mkdocs makes them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in re.findall(r"^#+ (.*)$", prose, re.M)]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_to_headings_lead_to_one(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", text):
        other = page.parent / target if target else page
        assert anchor in anchors(other.read_text(encoding="utf-8")), f"{page.name} links to {target}#{anchor}"


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra [docs] is not installed")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "search" / "search_index.json").is_file()


def test_names_of_code_on_the_page_of_architectures_exist() -> None:
    from exl2ray.model.rules import Arch

    page = (ROOT / "docs" / "adding-an-architecture.md").read_text(encoding="utf-8")
    facts = page.partition("| field of `Arch` |")[2].partition("\n\n")[0]
    fields = [name for line in facts.splitlines() for name in re.findall(r"`([a-z_]+)[`.]", line.rpartition(" | ")[2])]
    assert len(fields) > 20
    assert [name for name in fields if name not in Arch.__dataclass_fields__] == []
    rooms = page.partition("## 4.")[2]
    for module, path in re.findall(r"`(\w+)\.(\w+(?:\.\w+)?)`", rooms):
        if path != "py":
            attrgetter(path)(import_module(f"exl2ray.model.{module}"))


def test_the_readme_names_every_command() -> None:
    from exl2ray.cli import cli

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in cli.commands if f"exl2ray {name}" not in text] == []
