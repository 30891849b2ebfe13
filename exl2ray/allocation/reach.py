"""Which bitrates the options reach for a model, and what --nearest makes of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from exl2ray.allocation.knapsack import nearest_reachable
from exl2ray.allocation.overrides import Override, parse_overrides
from exl2ray.allocation.planning import option_bits
from exl2ray.errors import Exl2RayError
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import ModelSpec
from exl2ray.recipe import Recipe


def reachable_slots(spec: ModelSpec, overrides: Sequence[Override] = ()) -> list[tuple[list[int], int]]:
    """(total bits of each option, weights) of every slot that is allocated, with the options for the lowest bitrates."""
    return [slot for module in spec.modules for slot in option_bits(module, overrides, low=True)]


def within_reach(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with bitrates that its model can have, if it asks for --nearest; and what that changed, in words.

    A model or --set that cannot be read leaves it as it is: the checks of a conversion say what is wrong.
    """
    if not recipe.nearest or recipe.output_measurement is not None:
        return recipe, []
    try:
        spec = load_spec(SourceModel(recipe.in_dir))
        slots = reachable_slots(spec, parse_overrides(recipe.overrides, spec))
    except Exl2RayError:
        return recipe, []
    taken = {b: nearest_reachable(b, slots) for b in recipe.bits}
    notes = [f"-b {b:g} is out of reach of this model: --nearest takes {n:g}" for b, n in taken.items() if n != b]
    return replace(recipe, bits=tuple(dict.fromkeys(taken.values()))), notes
