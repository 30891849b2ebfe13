"""Who may import whom (docs/architecture.md, "Rooms and arrows"), read from the syntax trees; and what `import` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "exl2ray"
# Numerics and files know nothing of what is above them. Everything else (commands, the steps) may use every room but cuda.
ROOMS = {
    "formats": set(),
    "cuda": {"environment", "quality"},
    "store": {"formats"},
    "calibration": {"formats"},
    "model": {"cuda", "formats"},
    "quant": {"cuda", "formats", "quality"},
    "run": {"cuda", "formats"},
    "peft": {"run"},
    "transformers": {"formats", "run"},
    "vllm": {"formats", "run"},
    "evaluate": {"calibration", "formats", "model", "quant"},
    "allocation": {"calibration", "formats", "model", "quant", "recipe"},
    "publish": {"evaluate", "formats", "recipe", "remote", "terminal"},
    "report": {"evaluate", "formats", "recipe", "store", "terminal"},
    "team": {"formats", "model", "quality", "quant", "remote", "store"},
    "driver": {"quant", "store", "team"},
    "submit": {"calibration", "recipe", "remote", "store"},
    "tune": {"calibration", "devices", "driver", "evaluate", "events", "formats", "host", "model", "quant", "store", "team"},
    "remote": {"calibration", "formats", "recipe", "store", "units"},
}
EVERYWHERE = {"errors", "beneath", "stopping", "timeline", "wording", "__version__"}
ONLY_IN = {
    "gguf": {"formats"}, "ray": {"driver", "submit"}, "numba": {"cuda"}, "matplotlib": {"report"},
    "huggingface_hub": {"publish", "remote", "run"},
}  # fmt: skip
EXTERNAL_OF_CUDA = {"llvmlite", "numba", "numpy", "torch"}  # llvmlite: the code generator of numba
# What a weight may meet knows nothing of what plans, shows, publishes and submits: they may be left out of a copy.
COMPANIONS = (
    "__main__", "cli", "cli_models", "commands", "doctor", "plan", "publish", "report", "submit",
)  # fmt: skip
STILL_USED = {  # companions that the core imports all the same: to be moved, not to be added to
    "output.writing": {"publish.card", "publish.file_kinds"},
    "steps.evaluating": {"publish.card", "report.ladder"},
    "steps.job": {"plan.problems"},
    "steps.tuning": {"publish.card"},
}
HEAVY = {"torch", "ray", "matplotlib", "numba", "numpy", "pyarrow", "tokenizers", "transformers"}
LIGHT = [
    "exl2ray", "exl2ray.cli", "exl2ray.recipe", "exl2ray.errors", "exl2ray.convert", "exl2ray.formats.layout", "exl2ray.vllm",
]  # fmt: skip


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "text" not in p.relative_to(PACKAGE).parts)


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import statement, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            module = node.module or ""
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def test_the_check_sees_the_package() -> None:
    rooms = {room_of(p) for p in sources()}
    assert ROOMS.keys() <= rooms
    assert any(name == "numba.cuda" for p in sources() for _, name in imported(p))


def test_arrows_between_rooms() -> None:
    wrong = []
    for path in sources():
        room = room_of(path)
        allowed = ROOMS.get(room)
        for line, name in imported(path):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if top != "exl2ray" or target == room or target in EVERYWHERE:
                continue
            if (allowed is not None and target not in allowed) or (allowed is None and target == "cuda"):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {room} may not import {name}")
    assert wrong == []


def test_packages_that_belong_to_one_room() -> None:
    wrong = []
    for path in sources():
        for line, name in imported(path):
            top = name.split(".")[0]
            if top in ONLY_IN and room_of(path) not in ONLY_IN[top]:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: {top} is for {sorted(ONLY_IN[top])} only")
            outside = top not in EXTERNAL_OF_CUDA | {"exl2ray"} and top not in sys.stdlib_module_names
            if room_of(path) == "cuda" and outside:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line}: cuda/ may not import {top}")
    assert wrong == []


def modules() -> dict[str, Path]:
    """Every module by its name below exl2ray; a package by the name of its folder."""
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p for p in sources()}


def uses(path: Path, known: dict[str, Path], inner: bool = True) -> set[str]:
    """The modules that one imports, whatever it takes from them. ``inner``: in functions, too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {n for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    later |= {n for f in ast.walk(tree) if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.dump(f.test) for n in ast.walk(f)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (inner or node not in later):
            module = (node.module or "").partition(".")[2]
            names = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            found |= {name if name in known else module for name in names}
    return found & known.keys()


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that import each other, one after the other (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[set[str]] = []

    def visit(name: str) -> None:
        number[name] = lowest[name] = len(number)
        path.append(name)
        for other in sorted(graph[name]):
            if other not in number:
                visit(other)
            if other in path:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == number[name]:
            circle = set(path[path.index(name) :])
            del path[path.index(name) :]
            if len(circle) > 1 or name in graph[name]:
                found.append(circle)

    for name in graph:
        if name not in number:
            visit(name)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [{"a", "b", "c"}]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def test_no_import_circle() -> None:
    known = modules()
    assert circles({name: uses(path, known, inner=False) for name, path in known.items()}) == []
    assert circles({name: uses(path, known) for name, path in known.items()}) == []  # nor through imports inside of functions


def test_the_core_does_without_the_companions() -> None:
    known = modules()

    def is_companion(name: str) -> bool:
        return any(name == c or name.startswith(f"{c}.") for c in COMPANIONS)

    wrong = {}
    for name, path in known.items():
        used = {other for other in uses(path, known) if is_companion(other)} - STILL_USED.get(name, set())
        if used and not is_companion(name):
            wrong[name] = used
    assert wrong == {}


@pytest.mark.parametrize("module", LIGHT)
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom exl2ray.cli import main\nsys.argv = ['exl2ray', 'convert', '--help']\n"
        f"try:\n    main()\nexcept SystemExit:\n    pass\nprint('heavy:', *sorted({HEAVY!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--bits" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy:"
