"""What ExLlamaV2 wants to know of a vision tower before it loads a model that has one, for text alone as well.

``transformers`` 5 saves a processor as one file, processor_config.json, where the loader looks for preprocessor_config.json;
it leaves out keys that the loader needs, and versions before it add ``Fast`` to the name of the class, which the loader does
not know. So an output gets these in the older spelling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2ray.errors import SourceError
from exl2ray.formats.json_file import as_json, read_json_object
from exl2ray.wording import some

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
IMAGES = "image_processor"  # in processor_config.json
COMMON = ("image_mean", "image_std", "resample", "rescale_factor", "size")
QWEN_KEYS = ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels")


@dataclass(frozen=True)
class Loaded:
    """types: image_processor_type that the loader takes. keys: of preprocessor_config.json that it does not do without."""

    types: tuple[str, ...]
    keys: tuple[str, ...]


GEMMA3 = Loaded(("Gemma3ImageProcessor",), COMMON)
PIXTRAL = Loaded(("PixtralImageProcessor", "PixtralImageProcessorFast"), (*COMMON, "patch_size"))
BY_TYPE = {"siglip_vision_model": GEMMA3, "pixtral": PIXTRAL}  # vision_config.model_type
BY_ARCHITECTURE = {
    "Qwen2VLForConditionalGeneration": Loaded(("Qwen2VLImageProcessor",), QWEN_KEYS),
    "Qwen2_5_VLForConditionalGeneration": Loaded(("Qwen2VLImageProcessor", "Qwen2_5_VLImageProcessor"), QWEN_KEYS),
}


def needs_preprocessor(config: Mapping[str, Any]) -> bool:
    """Whether ExLlamaV2 opens preprocessor_config.json."""
    return _of(config) is not None or "model_type" in _vision(config)


def vision_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """``vision_config`` with what the loader needs and ``transformers`` 5 puts elsewhere or leaves out."""
    vision = dict(_vision(config))
    rope = vision.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
    if vision.get("rope_theta") is None and isinstance(theta, (int, float)) and float(theta).is_integer():
        vision["rope_theta"] = int(theta)  # the loader takes integers only
    if _architecture(config) in BY_ARCHITECTURE and vision.get("patch_size") is not None:
        vision.setdefault("spatial_patch_size", vision["patch_size"])
    return vision


def vision_files(source: str | Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """preprocessor_config.json by name if the output of ``source`` needs another one than the source has; else nothing, also
    where what the source has cannot be read."""
    stored, wanted = _settings(Path(source), config)
    return {} if not wanted or wanted == stored else {PREPROCESSOR: as_json(wanted, indent=2).encode()}


def vision_doubt(source: str | Path, config: Mapping[str, Any]) -> str | None:
    """Why ExLlamaV2 would not load the output, in words."""
    _, wanted = _settings(Path(source), config)
    if wanted is None:
        return None
    loaded, what = _of(config), "is missing"
    if wanted or (Path(source) / PREPROCESSOR).is_file():
        missing = [] if loaded is None else [k for k in loaded.keys if wanted.get(k) is None]
        if loaded is not None and wanted.get("image_processor_type") not in loaded.types:
            missing.insert(0, f"image_processor_type {' or '.join(loaded.types)}")
        if not missing:
            return None
        what = f"lacks {some(missing)}"
    return (
        f"{PREPROCESSOR} {what}, and ExLlamaV2 loads no model with a vision tower without it, not even for text: fetch the "
        "file from the model's first publisher"
    )


def _settings(source: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """(what preprocessor_config.json of the source holds, what that of the output has to hold: {} if nobody knows). None for
    the second where nothing is needed, or what is there cannot be read."""
    if not needs_preprocessor(config):
        return None, None
    try:
        stored = _stored(source)
        return stored, _completed(stored or _images(source), config)
    except SourceError:  # `exl2ray.formats.side_files` tells of it
        return None, None


def _completed(images: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of images in the loader's spelling; nothing changes that it can read."""
    out, loaded = dict(images or {}), _of(config)
    if not out or loaded is None:
        return out
    name = str(out.get("image_processor_type"))
    if name not in loaded.types and name.removesuffix("Fast") in loaded.types:
        out["image_processor_type"] = name.removesuffix("Fast")
    size = out.get("size")
    if isinstance(size, Mapping):
        for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if key in loaded.keys and out.get(key) is None and size.get(edge) is not None:
                out[key] = size[edge]
    return out


def _stored(source: Path) -> dict[str, Any] | None:
    path = source / PREPROCESSOR
    return read_json_object(path, odd=True) if path.is_file() else None


def _images(source: Path) -> dict[str, Any] | None:
    path = source / PROCESSOR
    images = read_json_object(path, odd=True).get(IMAGES) if path.is_file() else None
    return images if isinstance(images, dict) else None


def _of(config: Mapping[str, Any]) -> Loaded | None:
    kind = _vision(config).get("model_type")
    return BY_ARCHITECTURE.get(_architecture(config)) or (BY_TYPE.get(kind) if isinstance(kind, str) else None)


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    vision = config.get("vision_config")
    return vision if isinstance(vision, Mapping) else {}


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [""])[0])
