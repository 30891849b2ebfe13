"""Folders that are no source of an EXL2 model: each is named as what it is, with the one thing to do, before any work."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded import exl2ray
from model_folders import edit_config, edited, read_weights, write_json, write_weights

from exl2ray.errors import PERMISSIONS, FormatError, SourceError
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.source.kinds import refusal
from exl2ray.formats.verify import verify_directory
from exl2ray.model.arch import load_spec
from exl2ray.publish.selection import read_folder
from exl2ray.terminal.pasted import missing_folder

Change = Callable[[Path], Any]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 4976698672\n"


def no_weights(f: Path) -> None:
    (f / "model.safetensors").unlink()


def only(*names: str, content: bytes = b"\0" * 64) -> Change:
    """The folder holds these files and nothing else."""

    def change(f: Path) -> None:
        for p in f.iterdir():
            p.unlink()
        for name in names:
            (f / name).parent.mkdir(parents=True, exist_ok=True)
            (f / name).write_bytes(content)

    return change


def instead(*names: str, content: bytes = b"\0" * 64) -> Change:
    """These files in place of the weights."""

    def change(f: Path) -> None:
        no_weights(f)
        for name in names:
            (f / name).parent.mkdir(parents=True, exist_ok=True)
            (f / name).write_bytes(content)

    return change


def adapter(f: Path, kind: str = "LORA") -> None:
    only()(f)
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.randn(8, 64)}
    write_weights(f, lora, "adapter_model.safetensors")
    write_json(f / "adapter_config.json", {"peft_type": kind, "base_model_name_or_path": "some/base", "r": 8})


def cache(f: Path, revisions: tuple[str, ...] = ("abc",), main: str = "") -> None:
    """As the Hub's cache lays out a repository."""
    files = list(f.iterdir())
    for name in revisions:
        (f / "snapshots" / name).mkdir(parents=True)
        for p in files:
            os.link(p, f / "snapshots" / name / p.name)
    for p in files:
        p.unlink()
    (f / "snapshots").mkdir(exist_ok=True)
    (f / "refs").mkdir()
    if main:
        (f / "refs" / "main").write_text(main + "\n")


def inside(f: Path, *names: str) -> None:
    """The Hub's cache of these models."""
    files = f.with_name("files")
    f.rename(files)
    for name in names:
        shutil.copytree(files, f / name)
        cache(f / name)
    (f / "version.txt").write_text("1")


def beside(ending: str) -> Change:
    """What a program for downloading keeps beside a file that has its full size and not all of its bytes."""
    return lambda f: (f / f"model.safetensors{ending}").write_bytes(b"\0" * 64)


def parent(f: Path, *names: str) -> None:
    files = list(f.iterdir())
    for name in names:
        (f / name).mkdir()
        for p in files:
            os.link(p, f / name / p.name)
    for p in files:
        p.unlink()


def model_index(f: Path) -> None:
    only("unet/diffusion_pytorch_model.safetensors")(f)
    write_json(f / "model_index.json", {"_class_name": "StableDiffusionPipeline"})


def card(f: Path, change: Change) -> None:
    change(f)
    (f / "README.md").write_text("---\nlicense: mit\nbase_model:\n- owner/original\n---\n# A model\n")


# What lies there -> (change of a sound model, words of message and hint)
FOLDERS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "empty": (only(), ("an empty folder",)),
    "readme alone": (only("README.md"), ("neither config.json nor a *.safetensors file",)),
    "GGUF": (only("m-Q4_K_M.gguf", "m-Q8_0.gguf"), ("GGUF", "m-Q4_K_M.gguf and 1 more", "original weights")),
    "GGUF beside config": (instead("model.gguf"), ("GGUF", "original weights")),
    "GGUF whose card names the original": (lambda f: card(f, instead("model.gguf")), ("owner/original",)),
    "pickles": (instead("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
                ("PyTorch pickles (pytorch_model-00001-of-00002.bin and 1 more)", "save_pretrained")),
    "a .pt file": (instead("model.pt"), ("PyTorch pickles (model.pt)", "save_pretrained")),
    "training leftovers": (instead("training_args.bin"), ("no *.safetensors file", "state of a training run")),
    "state of all ranks": (only("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json"),
                           ("state of a training run (optimizer.pt and 3 more)", "trainer.save_model")),
    "FSDP": (only("pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata", "optimizer_0/__0_0.distcp",
                  "scheduler.pt", "rng_state_0.pth"),
             ("FSDP saves it (pytorch_model_fsdp_0)", "accelerate merge-weights ", "model/pytorch_model_fsdp_0 NEW")),
    "FSDP beside config": (instead("pytorch_model_fsdp_0/__0_0.distcp"), ("FSDP", "accelerate merge-weights ")),
    "FSDP, the pieces": (only("__0_0.distcp", "__1_0.distcp", ".metadata"),
                         ("FSDP saves it (__0_0.distcp and 1 more)", "accelerate merge-weights ", "model NEW")),
    "FSDP, a run": (only("checkpoint-20/pytorch_model_fsdp_0/__0_0.distcp",
                         "checkpoint-100/pytorch_model_fsdp_0/__0_0.distcp"),
                    ("FSDP", "accelerate merge-weights ", "checkpoint-100/pytorch_model_fsdp_0 NEW")),
    "FSDP, one file": (only("pytorch_model_fsdp.bin", "optimizer.bin"),
                       ("FSDP saves them (pytorch_model_fsdp.bin)", "to pytorch_model.bin, then", "save_pretrained")),
    "FSDP, a file of each rank": (only("pytorch_model_fsdp_rank0.bin", "pytorch_model_fsdp_rank1.bin"), ("FULL_STATE_DICT",)),
    "DeepSpeed": (only("latest", "zero_to_fp32.py", "trainer_state.json", "global_step99/mp_rank_00_model_states.pt",
                       "global_step100/mp_rank_00_model_states.pt",
                       "global_step100/zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state_0.pth"),
                  ("DeepSpeed (global_step100 and 1 more)", "deepspeed.utils.zero_to_fp32 ", "--safe_serialization")),
    "DeepSpeed, a step": (only("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
                          ("DeepSpeed (bf16_zero_pp_rank_0", "zero_to_fp32 ", "--safe_serialization -t model")),
    "DeepSpeed of accelerate": (instead("pytorch_model/mp_rank_00_model_states.pt", "latest"),
                                ("DeepSpeed (pytorch_model)",)),
    "GPT-NeoX": (only("latest", "global_step9/layer_00-model_00-model_states.pt", "global_step9/mp_rank_00_model_states.pt"),
                 ("DeepSpeed (global_step9)", "convert_neox_to_hf.py")),
    "Megatron": (only("latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"),
                 ("Megatron (iter_0000100)", "AutoBridge", "model/iter_0000100")),
    "Megatron, a step": (only("__0_0.distcp", ".metadata", "common.pt", "metadata.json"), ("Megatron", "AutoBridge")),
    "NeMo, a folder": (only("weights/__0_0.distcp", "context/model.yaml"), ("a checkpoint of NeMo", "llm.export_ckpt")),
    "weights beside a state": (instead("pytorch_model.bin", "global_step1/mp_rank_00_model_states.pt", "optimizer.pt"),
                               ("PyTorch pickles (pytorch_model.bin)", "save_pretrained")),
    "Meta's files": (only("params.json", "consolidated.00.pth", "tokenizer.model"),
                     ("original format of their publisher (consolidated.00.pth", "convert_llama_weights_to_hf.py")),
    "Meta's files, a folder deeper": (instead("original/params.json", "original/consolidated.00.pth"),
                                      ("(original/consolidated.00.pth", "convert_llama_weights_to_hf.py")),
    "Mistral's files": (only("params.json", "consolidated.safetensors", "tekken.json"),
                        ("consolidated.safetensors", "convert_mistral_weights_to_hf.py", "model-*.safetensors")),
    "adapter": (adapter, ("only a LoRA adapter for some/base", "merge_and_unload")),
    "another adapter": (lambda f: adapter(f, "IA3"), ("only a IA3 adapter", "merge_and_unload")),
    "hub cache": (cache, ("Hub's cache", "snapshots/abc")),
    "hub cache with two": (lambda f: cache(f, ("aaa", "bbb", "ccc"), "bbb"), ("Hub's cache", "(of 3)", "snapshots/bbb")),
    "hub caches": (lambda f: inside(f, "models--a--b", "models--c--d"), ("cache of 2 models (models--a--b, models--c--d)",
                                                                         "model/models--a--b/snapshots/REVISION")),
    "hub caches, one": (lambda f: inside(f, "models--a--b"), ("Hub's cache of 1 model", "models--a--b/snapshots/abc")),
    "home of the hub": (lambda f: inside(f, "hub/models--a--b"), ("Hub's cache of 1 model", "models--a--b/snapshots/abc")),
    "hub cache without any": (lambda f: cache(f, ()), ("Hub's cache, without any snapshot",)),
    "folder of models": (lambda f: parent(f, "one", "two"), ("2 folders with models (one, two)", "model/one")),
    "model one level deeper": (lambda f: parent(f, "fp16"), ("its folder fp16 does", "model/fp16")),
    "diffusion pipeline": (model_index, ("diffusion pipeline", "language models only")),
    "diffusion component": (lambda f: edit_config(f, _class_name="UNet2DConditionModel"), ("diffusion pipeline",)),
    "half a download": (beside(".aria2"), ("download of model.safetensors is not finished", "model.safetensors.aria2")),
    "half a download of axel": (beside(".st"), ("is not finished", "model.safetensors.st")),
    "half a download of lftp": (beside(".lftp-pget-status"), ("is not finished", "delete that file")),
    "LFS pointer": (lambda f: (f / "model.safetensors").write_bytes(LFS), ("Git LFS pointer", "git lfs pull")),
    "ONNX": (instead("onnx/model.onnx"), ("ONNX", "original weights")),
    "OpenVINO": (instead("openvino_model.xml", "openvino_model.bin"), ("OpenVINO",)),
    "MLC": (instead("mlc-chat-config.json", "params_shard_0.dat"), ("MLC-LLM",)),
    "TensorRT": (instead("rank0.engine"), ("TensorRT-LLM",)),
    "CTranslate2": (instead("model.bin", "vocabulary.json"), ("CTranslate2",)),
    "TensorFlow": (instead("tf_model.h5"), ("TensorFlow",)),
    "Flax": (instead("flax_model.msgpack"), ("Flax",)),
    "TensorFlow, old": (only("model.ckpt.index", "model.ckpt.data-00000-of-00001"), ("TensorFlow",)),
    "Orbax": (only("_CHECKPOINT_METADATA", "manifest.ocdbt", "d/0123"), ("JAX (Orbax)",)),
    "NeMo": (only("model.nemo"), ("NeMo",)),
    "weights without config": (lambda f: (f / "config.json").unlink(), ("config.json is missing", "fetch config.json")),
    "config without weights": (no_weights, ("no *.safetensors file", "download is incomplete")),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_no_source_is_named(case: str, folder: Path) -> None:
    change, words = FOLDERS[case]
    change(folder)
    for error in (SourceError, FormatError):
        with pytest.raises(error) as e:
            (SourceModel if error is SourceError else Exl2Model)(folder)
        for word in (str(folder), *words):
            assert word in str(e.value), (word, str(e.value))
        assert e.value.hint
        assert "check" not in e.value.hint.split()


FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "GGUF": ("model.gguf", ("a GGUF file",)),
    "weights": ("model.safetensors", ("a file, not a directory", "give its folder: ")),
    "config": ("config.json", ("a file, not a directory", "give its folder: ")),
    "pickle": ("pytorch_model.bin", ("a file of PyTorch weights",)),
    "piece of FSDP": ("__0_0.distcp", ("a file of a training run", "accelerate merge-weights ")),
    "piece of DeepSpeed": ("mp_rank_00_model_states.pt", ("a file of a training run", "zero_to_fp32 ")),
    "state": ("optimizer.pt", ("a file of a training run", "trainer.save_model")),
    "text": ("notes.txt", ("not a directory",)),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_in_place_of_a_folder(case: str, tmp_path: Path) -> None:
    name, words = FILES[case]
    (tmp_path / name).write_bytes(b"x" * 100)
    error = refusal(tmp_path / name)
    assert error is not None
    assert all(word in str(error) for word in (name, *words)), str(error)


def test_a_folder_that_may_not_be_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Any, *more: Any, **named: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", denied)
    monkeypatch.setattr(os, "stat", denied)
    error = refusal(folder)
    assert error is not None
    assert "cannot be read: Permission denied" in str(error)
    assert error.hint == PERMISSIONS
    assert "cannot be read: Permission denied" in verify_directory(folder)[0].message
    missing = missing_folder(str(folder))
    assert missing.message == f"-i {folder}: cannot be read: Permission denied"
    assert missing.hint == PERMISSIONS
    monkeypatch.undo()
    assert "does not exist" in str(missing_folder(str(tmp_path / "gone")))


def test_a_work_directory_in_place_of_the_model(folder: Path) -> None:
    only("job.json", "events.jsonl", "measure/records", "calibration.safetensors")(folder)
    words = "a work directory of exl2ray, not a model"
    assert words in str(refusal(folder))
    assert words in verify_directory(folder)[0].message
    with pytest.raises(FormatError, match=words) as e:
        read_folder(folder)
    assert "-cf" in e.value.hint


# ---- quantised already -------------------------------------------------------------------------------------------------


def replaced(*tensors: tuple[str, torch.dtype], config: Any = None, files: dict[str, Any] | None = None) -> Change:
    """Every projection's weight gives way to tensors with these ends and dtypes."""

    def change(f: Path) -> None:
        found = {}
        for name, t in read_weights(f).items():
            if "_proj" not in name:
                found[name] = t
            else:
                for end, dtype in tensors:
                    found[name.removesuffix(".weight") + end] = torch.ones(4, 8).to(dtype)
        write_weights(f, found)
        edit_config(f, **(config or {}))
        for name, value in (files or {}).items():
            write_json(f / name, value)

    return change


def method(name: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **settings}}


I32, I8, U8, U32, F16, I64 = torch.int32, torch.int8, torch.uint8, torch.uint32, torch.float16, torch.int64
F8 = torch.float8_e4m3fn
GPTQ = ((".qweight", I32), (".qzeros", I32), (".scales", F16))
PACKED = ((".weight_packed", I32), (".weight_scale", F16), (".weight_shape", I64))
GROUP = {"group_0": {"weights": {"num_bits": 4, "type": "int"}, "input_activations": None}}
PACK_QUANTIZED = method("compressed-tensors", format="pack-quantized", config_groups=GROUP)
QUANTISED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "EXL2": (replaced((".q_weight", I32), (".q_scale", I32), config=method("exl2", bits=3.0)),
             ("an EXL2 model already (3 bits)",)),
    "EXL3": (replaced((".trellis", I32), (".suh", F16), config=method("exl3", bits=4.0)), ("an EXL3 model", "4 bits")),
    "GPTQ": (replaced(*GPTQ, (".g_idx", I32), config=method("gptq", bits=4)), ("a GPTQ model already (4 bits)",)),
    "old GPTQ": (replaced(*GPTQ, files={"quantize_config.json": {"bits": 8}}), ("a GPTQ model already (8 bits)",)),
    "GPTQ without a word": (replaced(*GPTQ), ("GPTQ or AWQ",)),
    "AWQ": (replaced(*GPTQ, config=method("awq", bits=4, group_size=128)), ("an AWQ model already (4 bits)",)),
    "old AWQ": (replaced(*GPTQ, files={"quant_config.json": {"w_bit": 4}}), ("an AWQ model already (4 bits)",)),
    "AutoRound": (replaced(*GPTQ, config=method("auto-round", bits=2)), ("AutoRound", "2 bits")),
    "bitsandbytes 4": (
        replaced((".weight", U8), (".weight.absmax", U8), (".weight.quant_state.bitsandbytes__nf4", U8),
                 config=method("bitsandbytes", load_in_4bit=True)), ("a bitsandbytes model already (4 bits)",)),
    "bitsandbytes 8": (replaced((".weight", I8), (".SCB", torch.float32), config=method("bitsandbytes", load_in_8bit=True)),
                       ("bitsandbytes", "8 bits")),
    "HQQ": (replaced((".W_q", U8), config=method("hqq", quant_config={"weight_quant_params": {"nbits": 3}})),
            ("HQQ", "3 bits")),
    "AQLM": (replaced((".codes", I8), (".codebooks", F16), config=method("aqlm")), ("an AQLM model already",)),
    "compressed-tensors": (replaced(*PACKED, config=PACK_QUANTIZED),
                           ("compressed-tensors model already (pack-quantized, 4 bits)",)),
    "compressed int8": (replaced((".weight", I8), (".weight_scale", F16), config=method(
        "compressed-tensors", format="int-quantized", config_groups={"g": {"weights": {"num_bits": 8}}})),
                        ("int-quantized, 8 bits",)),
    "NVFP4": (replaced((".weight_packed", U8), (".weight_scale", F8), (".weight_global_scale", F16),
                       config=method("compressed-tensors", format="nvfp4-pack-quantized")), ("NVFP4",)),
    "EETQ": (replaced((".weight", I8), (".weight_scales", F16), config=method("eetq")), ("an EETQ model",)),
    "torchao": (replaced((".weight_qdata", U8), (".weight_scale", F16), config=method("torchao", quant_type="int4")),
                ("torchao",)),
    "Quanto": (replaced((".weight._data", I8), (".weight._scale", F16), config=method("quanto", weights="int4")),
               ("Quanto", "4 bits")),
    "MLX": (replaced((".weight", U32), (".scales", F16), config={"quantization": {"group_size": 64, "bits": 4}}),
            ("an MLX model already (4 bits)",)),
    "VPTQ": (replaced((".centroids.weight", F16), (".indices", I32), config=method("vptq")), ("VPTQ",)),
    "unknown": (replaced((".weight", I8), config=method("brandnew")), ("a brandnew model already",)),
    "unknown and silent": (replaced((".weight", U32)), ("quantised (packed integers)",)),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_source_is_named(case: str, folder: Path) -> None:
    change, words = QUANTISED[case]
    change(folder)
    (folder / "README.md").write_text("---\nbase_model: owner/original\n---\n")
    with pytest.raises(SourceError) as e:
        SourceModel(folder)
    for word in (*words, "start from the original weights: owner/original"):
        assert word in str(e.value), (word, str(e.value))


def test_what_config_says_is_of_no_account_where_weights_are_plain(folder: Path) -> None:
    edit_config(folder, **method("bitsandbytes", load_in_4bit=True))
    source = SourceModel(folder)
    assert source.dtype("model.layers.0.mlp.up_proj.weight") == "F16"
    assert any("its weights are plain numbers" in note for note in source.notes)


def test_weights_that_are_rounded_while_the_model_runs(folder: Path) -> None:
    """transformers gives other logits than those of the stored weights."""
    edit_config(folder, **method("bitnet", linear_class="autobitlinear", quantization_mode="online"))
    with pytest.raises(SourceError, match=r"(?s)BitNet model that rounds its weights.*remove quantization_config"):
        SourceModel(folder)


def test_one_table_of_integers_makes_no_quantised_model(folder: Path) -> None:
    """A plain model was refused for a buffer that nobody reads; what is read as a weight is still told."""
    edited(lambda t: t.update({"model.buckets.weight": torch.ones(8, 8, dtype=I32)}))(folder)
    load_spec(SourceModel(folder))
    edited(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.ones(96, 64, dtype=I8)}))(folder)
    run = exl2ray("plan", "-i", folder, "-b", "4", "--device", "cpu", "-l", "128", "-ml", "128")
    run.ends_with(3, "model.layers.1.mlp.up_proj.weight has dtype I8; floating-point numbers are needed")


# ---- other kinds of models ---------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, ("a classifier or reward model",)),
    "tagger": ({"architectures": ["LlamaForTokenClassification"]}, ("a tagger",)),
    "encoder": ({"architectures": ["BertModel"], "model_type": "bert"}, ("'BertModel'", "an encoder, as for embeddings")),
    "masked": ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, ("an encoder that fills gaps",)),
    "vision": ({"architectures": ["CLIPModel"], "model_type": "clip"}, ("'CLIPModel'", "a vision model")),
    "translation": ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True},
                    ("an encoder and a decoder",)),
    "unsupported": ({"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}, ("GptOssForCausalLM", "supported: ")),
    "no name at all": ({"architectures": None, "model_type": None}, ("architectures is None", "LlamaForCausalLM")),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_models_that_are_no_known_language_model(case: str, folder: Path) -> None:
    changes, words = OTHERS[case]
    edit_config(folder, **changes)
    exl2ray("plan", "-i", folder, "-b", "4").ends_with(3, *words)


# ---- the same answer everywhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["GGUF", "pickles", "adapter", "hub cache", "LFS pointer"])
def test_plan_dry_run_and_convert_say_the_same(case: str, folder: Path, tmp_path: Path) -> None:
    change, words = FOLDERS[case]
    change(folder)
    where = ("-o", tmp_path / "work", "-cf", tmp_path / "out", "-b", "4", "--device", "cpu")
    for command, *flags in (("plan",), ("convert", "--dry-run"), ("convert",)):
        exl2ray(command, "-i", folder, *where, *flags).ends_with(3, *words)
    assert not (tmp_path / "work").exists()
    exl2ray("eval", "--model", folder).ends_with(3, *words)
    exl2ray("inspect", folder).ends_with(8, *words)


def test_inspect_names_another_way_of_quantising(folder: Path) -> None:
    QUANTISED["GPTQ"][0](folder)
    exl2ray("inspect", folder).ends_with(8, "a GPTQ model", "4 bits", "not an EXL2 one")
    exl2ray("eval", "--model", folder).ends_with(3, "a GPTQ model", "original weights")
    exl2ray("verify", folder).ends_with(8, "quant_method is 'gptq'")


def test_an_exl2_source_is_refused_before_work(folder: Path, tmp_path: Path) -> None:
    QUANTISED["EXL2"][0](folder)
    where = ("-o", tmp_path / "work", "-cf", tmp_path / "out", "-b", "4", "--device", "cpu")
    exl2ray("plan", "-i", folder, "-b", "4").ends_with(3, "is an EXL2 model already (3 bits)", "original weights")
    exl2ray("convert", "-i", folder, *where).ends_with(3, "is an EXL2 model already (3 bits)")
    assert not (tmp_path / "work").exists()
    exl2ray("verify", folder, "-i", folder).ends_with(3, "is an EXL2 model already")
