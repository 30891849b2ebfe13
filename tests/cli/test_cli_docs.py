"""docs/cli.md is written from the commands, and current."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from exl2ray.cli import cli

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_current():
    spec = importlib.util.spec_from_file_location("make_cli_docs", ROOT / "scripts" / "make_cli_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.TARGET.read_text(encoding="utf-8")
    assert page == module.document(), "run python scripts/make_cli_docs.py"
    for name, command in cli.commands.items():
        section = page.partition(f"## exl2ray {name}\n")[2].partition("\n## ")[0]
        for param in command.params:
            if param.param_type_name == "option" and not param.hidden:
                assert f"`{param.opts[-1]}" in section, f"{name}: {param.opts}"
