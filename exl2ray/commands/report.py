"""``exl2ray report``: one HTML page about a work directory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exl2ray.errors import StoreError
from exl2ray.formats.files import atomic_file, refuse_other, refuse_special
from exl2ray.report.facts import read_facts
from exl2ray.report.page import is_page, render
from exl2ray.store.open import open_store
from exl2ray.terminal.console import show_text
from exl2ray.wording import file_size

REPORT = "report.html"


@dataclass(frozen=True)
class Written:
    """report: path of the page. sections: what it has. problems: what was left out of it, in words."""

    report: str
    bytes: int
    sections: tuple[str, ...]
    problems: tuple[str, ...]


def report(work_dir: str, output: str | None, evaluations: Sequence[str], show_paths: bool = False) -> Written:
    """Writes the report to ``output``, else to report.html in the work directory; ``show_paths``: whole paths of folders.

    Raises StoreError if there is no work directory, the page cannot be written or would take the place of something else
    than an earlier one, FormatError for an unusable evaluation.
    """
    target = None if output is None else Path(output) / REPORT if os.path.isdir(output) else Path(output)
    if target is not None:
        refuse_special(target, "-o")
        refuse_other(target, "-o", "report", is_page)
        if not os.path.isdir(target.parent):
            raise StoreError(f"{target}: there is no directory {target.parent}", "create it, or choose another -o")
    facts = read_facts(work_dir, evaluations)
    page, sections = render(facts, show_paths)
    data = page.encode()
    if target is None:
        store = open_store(work_dir)
        store.put(REPORT, data)
        path = store.full_name(REPORT)
    else:
        with atomic_file(target) as f:
            f.write(data)
        path = str(target)
    return Written(path, len(data), sections, facts.problems)


def show(written: Written) -> None:
    for problem in written.problems:
        show_text(f"left out: {problem}")
    show_text(f"{written.report}: {file_size(written.bytes)}, {', '.join(written.sections)}")
