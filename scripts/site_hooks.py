"""Hooks of mkdocs.yml: pages of the site that lie elsewhere in the repository, where their own files are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"clusters.md": "cluster/README.md", "serving.md": "cluster/serve/README.md"}  # page of the site -> its file


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for page, source in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that lead there in the repository lead to the page on the site, from wherever they stand."""
    name = page.file.src_uri
    folder = (ROOT / ELSEWHERE.get(name, f"docs/{name}")).parent
    pages = {(ROOT / source).resolve(): there for there, source in ELSEWHERE.items()}

    def on_the_site(link: re.Match[str]) -> str:
        there = pages.get((folder / link[1]).resolve())
        return f"]({there}" if there else link[0]

    return re.sub(r"\]\(([^)#\s]+)", on_the_site, markdown)
