"""Hooks of mkdocs.yml: pages of the site that lie elsewhere in the repository, where their own files are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"clusters.md": "cluster/README.md"}  # page of the site -> its file


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that lead there in the repository lead to the page on the site."""
    for page, source in ELSEWHERE.items():
        markdown = markdown.replace(f"](../{source}", f"]({page}")
    return markdown
