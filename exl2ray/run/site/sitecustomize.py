"""Python reads this at its start under ``exl2ray with``: EXL2 models load in every process that uses transformers.

Nothing is imported before the program itself imports transformers. Afterwards another sitecustomize, if the installation
has one, runs as it would have.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from importlib import import_module
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
AFTER = "transformers.quantizers.auto"  # where methods are registered; loaded before any model is


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != AFTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                sys.modules.setdefault(name, module)
                import_module("exl2ray.transformers")

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())


def _other_sitecustomize() -> None:
    elsewhere = [p for p in sys.path if os.path.abspath(p or ".") != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


_other_sitecustomize()
