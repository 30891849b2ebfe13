"""Folders that are no Hugging Face model in safetensors: what each of them is, and the one thing to do about it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from exl2ray.errors import PERMISSIONS, Exl2RayError, SourceError
from exl2ray.formats.claim import LOCK, TUNING, read_claim
from exl2ray.formats.regular import absent
from exl2ray.formats.source import training
from exl2ray.formats.source.folder import Folder
from exl2ray.formats.source.training import PICKLES, SAVE, Finding
from exl2ray.wording import some

COMPLETE = "give a folder with config.json, *.safetensors and tokenizer.json, as the Hub has them"
# What aria2, axel and lftp keep beside a file until all of its pieces are there; it has its full size before that.
DOWNLOADING = (".aria2", ".st", ".lftp-pget-status")
MERGE = "merge it first: AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW) (package peft)"


def refusal(path: str | Path, error: type[Exl2RayError] = SourceError) -> Exl2RayError | None:
    """Why the folder at ``path`` cannot hold a model in safetensors; None if it may. Reads names and small files only."""
    finding = look(Path(path))
    return None if finding is None else error(f"{path}: {finding[0]}", finding[1])


def look(path: Path) -> Finding | None:
    """As `refusal`, without the path."""
    finding = _unreadable(path)
    if finding is not None:
        return finding
    folder = Folder(path)
    for kind in KINDS:
        finding = kind(folder)
        if finding is not None:
            return finding
    return None


def look_at_output(path: Path) -> Finding | None:
    """What `look` finds of a path where an EXL2 directory should be, whose files are checked by themselves."""
    folder = Folder(path)
    return _unreadable(path) or _work_directory(folder) or _unfinished(folder) or _downloading(folder)


def _unreadable(path: Path) -> Finding | None:
    """Why nothing can be read at ``path`` as in a folder; None if it is one that can be listed."""
    hint = "give the folder that holds config.json and *.safetensors"
    try:
        os.scandir(path).close()
        if os.access(path, os.X_OK):
            return None
        return "may be listed, but nothing in it may be read", PERMISSIONS  # a folder without the right to enter it
    except NotADirectoryError:
        return _no_folder(path, hint)
    except FileNotFoundError:
        return absent(path), hint
    except OSError as e:
        return f"cannot be read: {e.strerror or e}", PERMISSIONS if isinstance(e, PermissionError) else hint
    except ValueError:  # a NUL in it
        return "not a path", hint


def _no_folder(path: Path, hint: str) -> Finding:
    if not os.path.exists(path):
        return absent(path), hint
    name = path.name.lower()
    if name.endswith(".gguf"):
        return _gguf_text("a GGUF file"), _original(Folder(path.parent))
    if name.endswith((".safetensors", ".json")):
        return "a file, not a directory", f"give its folder: {shlex.quote(str(path.parent))}"
    checkpoint = training.look(Folder(path.parent)) if name.endswith((*PICKLES, ".distcp")) else None
    if checkpoint is not None and (name.endswith(".distcp") or training.is_state(path.name)):
        return "a file of a training run, not a directory", checkpoint[1]
    if name.endswith(PICKLES):
        return "a file of PyTorch weights, not a directory", SAVE
    return "not a directory", hint


def _empty(folder: Folder) -> Finding | None:
    if folder.files or folder.folders:
        return None
    return "an empty folder", "is the download complete, and the path right? " + COMPLETE


def _unfinished(folder: Folder) -> Finding | None:
    """The output of a conversion or a tuning that runs, or was killed: config.json comes last (`exl2ray.formats.target`)."""
    if "config.json" in folder:
        return None
    if (folder.path / TUNING).is_dir():
        more = "wait for it, or run the same command again: it goes on from the last checkpoint"
        return "the output of a tuning that is not finished, not a model", more
    claim = None
    with suppress(Exl2RayError):  # a link in its place
        claim = read_claim(folder.path)
    if claim is not None and claim.job:
        again = f"run it again: exl2ray convert -o {shlex.quote(claim.work)}" if claim.work else "run the same command again"
        return "the output of a conversion that is not finished, not a model", f"wait for it, or {again}"
    if (claim is not None or (folder.path / LOCK).is_file()) and not (folder.files or folder.folders):
        return "an output of exl2ray that holds no model (yet)", "run the command that writes there (again)"
    return None


def _hub_caches(folder: Folder) -> Finding | None:
    """The Hub's cache as a whole, or the folder that it lies in ($HF_HOME)."""
    if "config.json" in folder or folder.ending(".safetensors"):
        return None
    for place in (folder, Folder(folder.path / "hub")):
        found = [n for n in place.folders if n.startswith("models--")]
        if found:
            one = _hub_cache(Folder(place.path / found[0])) if len(found) == 1 else None
            models = shlex.quote(str(place.path / found[0]))
            hint = one[1] if one is not None else f"give the snapshot of one of them: {models}/snapshots/REVISION"
            return f"the Hub's cache of {len(found)} model{'s' * (len(found) > 1)} ({some(found)}), not a model", hint
    return None


def _hub_cache(folder: Folder) -> Finding | None:
    """``models--owner--name`` of the Hub's cache: files lie two levels deeper."""
    if "snapshots" not in folder.folders or "config.json" in folder:
        return None
    snapshots = Folder(folder.path / "snapshots").folders
    main = Folder(folder.path / "refs").head("main", 100).decode("ascii", "replace").strip()
    if not snapshots:
        return "a repository in the Hub's cache, without any snapshot", "the download did not begin: fetch the model"
    revision = main if main in snapshots else snapshots[-1]
    others = f" (of {len(snapshots)})" if len(snapshots) > 1 else ""
    place = shlex.quote(str(folder.path / "snapshots" / revision))
    return f"a repository in the Hub's cache; the model is in its snapshot{others}", f"give the snapshot: {place}"


def _work_directory(folder: Folder) -> Finding | None:
    """What a conversion has with -o, given for what it has with -cf."""
    if "job.json" not in folder or "config.json" in folder or not {"measure", "quant"}.intersection(folder.folders):
        return None
    return "a work directory of exl2ray, not a model", "give the directory that the conversion had with -cf"


def _diffusion(folder: Folder) -> Finding | None:
    component = "_class_name" in folder.json("config.json")
    if "model_index.json" not in folder and not component:
        return None
    return "a diffusion pipeline (diffusers), not a language model", "EXL2 holds language models only"


def _adapter(folder: Folder) -> Finding | None:
    """A LoRA or other adapter without the model that it belongs to."""
    if "adapter_config.json" not in folder or "config.json" in folder:
        return None
    kind = folder.json("adapter_config.json").get("peft_type")
    name = "LoRA" if kind in (None, "LORA") else str(kind)[:20]
    base = folder.base_model()
    of = f" for {base}" if base else ""
    return (
        f"holds only a {name} adapter{of}, not a model: changes to weights that are elsewhere",
        MERGE,
    )


def _gguf_text(what: str) -> str:
    return f"{what}: weights as llama.cpp lays them out and mostly quantises them; they cannot be the source of an EXL2 model"


def _gguf(folder: Folder) -> Finding | None:
    found = folder.ending(".gguf")
    if not found or folder.ending(".safetensors"):
        return None
    return _gguf_text(f"holds GGUF files ({some(found, 1)})"), _original(folder)


def _other_runtime(folder: Folder) -> Finding | None:
    """Models that were built for another program."""
    if folder.ending(".safetensors"):
        return None
    for test, what in (
        (lambda f: f.ending(".onnx") or "onnx" in f.folders, "an ONNX model"),
        (lambda f: f.ending("openvino_model.xml"), "an OpenVINO model"),
        (lambda f: "mlc-chat-config.json" in f or "ndarray-cache.json" in f, "a model of MLC-LLM"),
        (lambda f: f.ending(".engine"), "engines of TensorRT-LLM"),
        (lambda f: f.ending(".nemo"), "a NeMo archive"),
        (lambda f: f.ending(".keras", ".ckpt.index") or "tf_model.h5" in f, "TensorFlow weights"),
        (lambda f: "_CHECKPOINT_METADATA" in f or "manifest.ocdbt" in f, "a checkpoint of JAX (Orbax)"),
        (lambda f: f.ending(".msgpack"), "Flax weights"),
        (lambda f: "model.bin" in f and f.ending("vocabulary.json", "vocabulary.txt"), "a model of CTranslate2"),
    ):
        if test(folder) and not _pickles(folder, but=("model.bin", "openvino_model.bin")):  # type: ignore[no-untyped-call]
            return f"{what}, without weights in safetensors", _original(folder)
    return None


def _consolidated(folder: Folder) -> Finding | None:
    """Weights as Meta and Mistral publish them beside, or in place of, those for transformers."""
    own = [n for n in folder.files if n.startswith("consolidated.")]
    if not own and "original" in folder.folders and not _pickles(folder):
        inside = Folder(folder.path / "original").files
        own = [f"original/{n}" for n in inside if n.startswith("consolidated.")]
    if not own or [n for n in folder.ending(".safetensors") if n not in own]:
        return None
    family = "llama" if own[0].endswith(".pth") else "mistral"
    script = f"src/transformers/models/{family}/convert_{family}_weights_to_hf.py"
    return (
        f"holds weights in the original format of their publisher ({own[0]}, params.json), which name and order tensors "
        "otherwise than transformers",
        f"fetch the model-*.safetensors of the same repository, or convert with {script} of transformers' "
        "repository",
    )


def _pickles(folder: Folder, but: tuple[str, ...] = ()) -> list[str]:
    """Weights that transformers may load."""
    found = [n for n in folder.ending(*PICKLES) if n not in but and not training.is_state(n)]
    return [n for n in found if not n.startswith("consolidated.")]


def _training(folder: Folder) -> Finding | None:
    return None if folder.ending(".safetensors") or _pickles(folder) else training.look(folder)


def _no_safetensors(folder: Folder) -> Finding | None:
    if folder.ending(".safetensors"):
        return None
    found = _pickles(folder)
    if found:
        return f"holds PyTorch pickles ({some(found, 1)}), and no *.safetensors file", SAVE
    inside = [n for n in folder.folders if Folder(folder.path / n).ending(".safetensors")]
    if inside and "config.json" in folder:
        place = shlex.quote(str(folder.path / inside[0]))
        whole = "config.json" in Folder(folder.path / inside[0])
        hint = f"give that folder: {place}" if whole else f"move what is in {place} beside config.json"
        return f"no *.safetensors file beside config.json; its folder {inside[0]} has some", hint
    if inside:
        place = shlex.quote(str(folder.path / inside[0]))
        many = f"holds {len(inside)} folders with models ({some(inside)}), and no model itself"
        text = many if len(inside) > 1 else f"holds no model; its folder {inside[0]} does"
        return text, f"give one of them: {place}"
    if "config.json" in folder:
        return "no *.safetensors file: there is a config.json, but no weights", "the download is incomplete: fetch them"
    return "neither config.json nor a *.safetensors file", COMPLETE


def _pointers(folder: Folder) -> Finding | None:
    found = [n for n in (*folder.ending(".safetensors"), "config.json") if folder.is_lfs_pointer(n)]
    if not found:
        return None
    verb = "are Git LFS pointers" if len(found) > 1 else "is a Git LFS pointer"
    return f"{some(found, 1)} {verb}: text in place of the file", "fetch the files: `git lfs pull` in this folder"


def _downloading(folder: Folder) -> Finding | None:
    """Weights, or what belongs to them, some of whose bytes are still zeros."""
    left = [n for n in folder.ending(*DOWNLOADING) if n[: n.rindex(".")] in folder]
    found = [n for n in left if n[: n.rindex(".")].lower().endswith((".safetensors", ".json", ".model", ".txt", ".jinja"))]
    if not found:
        return None
    name = found[0][: found[0].rindex(".")]
    text = f"the download of {name} is not finished: what downloads it keeps {some(found, 1)} until then"
    return text, "wait for it, or run the same command again: it goes on; if it did finish, delete that file"


def _no_config(folder: Folder) -> Finding | None:
    if "config.json" in folder:
        return None
    if "adapter_model.safetensors" in folder:
        return "a LoRA adapter, not a model, and without its adapter_config.json", MERGE
    return (
        "config.json is missing or not a regular file",
        "the directory must be a complete Hugging Face model: fetch config.json of the model that the weights belong to",
    )


def _original(folder: Folder) -> str:
    base = folder.base_model()
    return "start from the original weights in safetensors" + (f": {base}" if base else "")


KINDS: tuple[Callable[[Folder], Finding | None], ...] = (
    _unfinished, _empty, _hub_caches, _hub_cache, _work_directory, _diffusion, _adapter, _pointers, _downloading, _gguf,
    _other_runtime, _consolidated, _training, _no_safetensors, _no_config,
)  # fmt: skip
