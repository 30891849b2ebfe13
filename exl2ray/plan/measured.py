"""The measurement of -m: does it belong to this model, and does an allocation follow from it?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from exl2ray.allocation.planning import has_sensitivities, linear_groups
from exl2ray.errors import FormatError, UsageError
from exl2ray.formats.layout import LinearShape
from exl2ray.formats.measurement import Measurement, check_against, read_measurement
from exl2ray.model.spec import ModelSpec
from exl2ray.recipe import Recipe
from exl2ray.wording import shown


def expected_measurement(spec: ModelSpec) -> tuple[list[str], dict[str, dict[str, list[LinearShape]]]]:
    """What a measurement of this model must hold: entries, and the linears of each role."""
    shapes: dict[str, dict[str, list[LinearShape]]] = {}
    for module in spec.modules:
        if module.quantized:
            roles = shapes.setdefault(module.profile_key, {})
            for x in module.linears:
                roles.setdefault(x.role, []).append(LinearShape(x.in_features, x.out_features, x.has_bias))
    return [m.profile_key for m in spec.modules if m.kind != "embedding"], shapes


def measured(recipe: Recipe, spec: ModelSpec | None) -> Measurement:
    """The measurement of -m, complete for this model and this kind of allocation."""
    path = recipe.measurement or ""
    measurement = read_measurement(path)
    if spec is not None:
        with naming(path):
            check_against(measurement, *expected_measurement(spec))
            check_rotation(measurement, spec, path)
            if recipe.allocation == "linear" or has_sensitivities(spec, measurement):
                linear_groups(spec, measurement)
    return measurement


@contextmanager
def naming(path: str) -> Iterator[None]:
    """What is found wrong with a measurement within is said with the file that it came from."""
    try:
        yield
    except FormatError as e:
        raise FormatError(f"-m {path}: {e.message.removeprefix('measurement: ')}", e.hint) from e


def check_rotation(measurement: Measurement, spec: ModelSpec, path: str) -> None:
    """UsageError unless the measured model is rotated like the one that is to be quantised: their linears differ."""
    wanted = spec.rotation_entry.get("rotation")
    if measurement.rotation == wanted:
        return
    if measurement.rotation is None:
        raise UsageError(f"-m {path}: measured without --rotate", "leave out --rotate, or measure again without -m")
    if wanted is None:
        raise UsageError(f"-m {path}: measured with --rotate", "give --rotate here too, or measure again without -m")
    raise UsageError(f"-m {path}: measured with another rotation, {shown(measurement.rotation)}", "measure again without -m")
