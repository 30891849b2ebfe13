"""Checkpoints of a training run: weights in pieces, one for each rank, and the program that puts them together."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from exl2ray.formats.source.folder import Folder
from exl2ray.formats.tensorfile import TensorInfo
from exl2ray.wording import some

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SAVE = (
    "load it with transformers and write it anew: "
    "AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(NEW), and the same with AutoTokenizer"
)
BESIDE = "; put config.json and the tokenizer's files of the base model beside them"
# Pickles that go on with a training, of the Trainer and of accelerate, for one rank or for all.
STATE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|dl_state_dict|common)([_-]\d+)*\.(bin|pt|pth)"
)
FSDP_FILE = re.compile(r"pytorch_model_fsdp(_\d+)?(_rank\d+)?\.bin")
FSDP_FOLDER = re.compile(r"pytorch_model_fsdp_\d+")
DEEPSPEED_FILE = re.compile(r"(bf16_|fp16_)?(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt")
DEEPSPEED_FOLDER = re.compile(r"global_step\d+")
PIPELINE_FILE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
MEGATRON_FILE = re.compile(r"model_(optim_)?rng\.pt")
MEGATRON_FOLDER = re.compile(r"iter_\d{7,}")
RUN = re.compile(r"(checkpoint|step|epoch)[-_]?\d+")  # one of the checkpoints in the folder of a run

Finding = tuple[str, str]  # (what it is and why that cannot work, what to do)


def is_state(name: str) -> bool:
    """Whether a pickle belongs to a checkpoint of training, and is no model that transformers would load by itself."""
    return any(p.fullmatch(name) for p in (STATE, FSDP_FILE, DEEPSPEED_FILE, PIPELINE_FILE, MEGATRON_FILE))


def look(folder: Folder) -> Finding | None:
    """What a folder without weights that transformers loads holds of a training run; None for nothing of the kind."""
    latest = sorted((n for n in folder.folders if RUN.fullmatch(n)), key=_number)[-1:]
    for place in (folder, *(Folder(folder.path / n) for n in latest)):
        for kind in (_megatron, _deepspeed, _distributed, _fsdp_file):
            finding = kind(place)
            if finding is not None:
                return finding
    found = [n for n in folder.files if is_state(n)]
    if not found:
        return None
    return (
        f"holds the state of a training run ({some(found, 1)}), and no *.safetensors file with its model",
        "give the folder that the run saved its model to, with trainer.save_model(NEW) or save_pretrained(NEW); "
        "if this is a download, fetch the *.safetensors files",
    )


def _megatron(folder: Folder) -> Finding | None:
    steps = sorted(n for n in folder.folders if MEGATRON_FOLDER.fullmatch(n))
    nemo = {"weights", "context"} <= set(folder.folders)
    own = [n for n in folder.files if MEGATRON_FILE.fullmatch(n)] or ("common.pt" in folder and folder.ending(".distcp"))
    inside = [n for n in folder.folders if re.fullmatch(r"mp_rank_\d+(_\d+)*", n)]
    if nemo and "config.json" not in folder:
        place = shlex.quote(str(folder.path))
        return (
            "a checkpoint of NeMo (weights, context), not a model in safetensors",
            f"export it with NeMo: llm.export_ckpt(path={place}, target='hf', output_path=NEW)",
        )
    marks = steps or own or inside or [n for n in folder.files if n == "latest_checkpointed_iteration.txt"]
    if not marks:
        return None
    place = str(folder.path / steps[-1] if steps else folder.path)
    return (
        f"a checkpoint of training with Megatron ({some(marks, 1)}), "
        "not a model in safetensors",
        f"export it with Megatron Bridge: AutoBridge.from_hf_pretrained(BASE).export_ckpt({place!r}, NEW)",
    )


def _deepspeed(folder: Folder) -> Finding | None:
    """``global_step100`` with the pieces of all ranks, or the folder that holds it; accelerate calls it pytorch_model."""
    own = _ranks(folder)
    steps = [n for n in folder.folders if DEEPSPEED_FOLDER.fullmatch(n) or _ranks(Folder(folder.path / n))]
    if not own and not steps:
        return None
    tag = folder.path.name if own else max(steps, key=_number)
    root = Folder(folder.path.parent) if own else folder
    what = f"a checkpoint of training with DeepSpeed ({some(own or steps, 1)}), not a model in safetensors"
    if any(PIPELINE_FILE.fullmatch(n) for n in own or Folder(root.path / tag).files):
        return what, "it is cut by layers, for pipelines: convert it with tools/ckpts/convert_neox_to_hf.py of GPT-NeoX"
    which = "" if "latest" in root else f" -t {shlex.quote(tag)}"
    place = shlex.quote(str(root.path))
    command = f"python -m deepspeed.utils.zero_to_fp32 {place} NEW --safe_serialization{which}"
    return what, f"make safetensors of it: {command}{BESIDE}"


def _ranks(folder: Folder) -> list[str]:
    return [n for n in folder.files if DEEPSPEED_FILE.fullmatch(n) or PIPELINE_FILE.fullmatch(n)]


def _distributed(folder: Folder) -> Finding | None:
    """``*.distcp`` files: the distributed checkpoints of PyTorch, as FSDP has them."""
    own = folder.ending(".distcp")
    others = [] if own else [n for n in folder.folders if FSDP_FOLDER.fullmatch(n) or _pieces(folder, n)]
    if not own and not others:
        return None
    place = shlex.quote(str(folder.path if own else folder.path / others[0]))
    return (
        f"a distributed checkpoint of PyTorch, as training with FSDP saves it ({some(own or others, 1)}), "
        "not a model in safetensors",
        f"make safetensors of it: accelerate merge-weights {place} NEW{BESIDE}",
    )


def _pieces(folder: Folder, name: str) -> list[str]:
    """Those of weights in a folder of this name; an optimizer's are the only ones of another name."""
    return [] if name.startswith("optim") else Folder(folder.path / name).ending(".distcp")


def _fsdp_file(folder: Folder) -> Finding | None:
    found = [n for n in folder.files if FSDP_FILE.fullmatch(n)]
    if not found:
        return None
    what = f"holds weights as training with FSDP saves them ({some(found, 1)}), and no *.safetensors file"
    if "_rank" in found[0]:
        return what, "each file has one rank's part: save again from the same run with fsdp_state_dict_type: FULL_STATE_DICT"
    return what, f"rename {found[0]} to pytorch_model.bin, then {SAVE}"


def not_gathered(tensors: Mapping[str, TensorInfo], folder: Folder) -> Finding | None:
    """Weights of which most are empty: what ZeRO-3 leaves in each process while a model is trained, saved as it is."""
    empty = sorted(name for name, info in tensors.items() if 0 in info.shape)
    if 2 * len(empty) <= len(tensors):
        return None
    pieces = _deepspeed(folder)
    return (
        f"{len(empty)} of {len(tensors)} tensors are empty, e.g. {empty[0]}: training with DeepSpeed (ZeRO-3) saves a model "
        "so if it does not gather the weights before",
        pieces[1] if pieces else "save it again from the same run with stage3_gather_16bit_weights_on_model_save: true, or "
        "make safetensors of one of its checkpoints with python -m deepspeed.utils.zero_to_fp32",
    )


def _number(name: str) -> tuple[int, str]:
    """For sorting: the last number in a name."""
    digits = re.findall(r"\d+", name)
    return (int(digits[-1]) if digits else -1, name)
