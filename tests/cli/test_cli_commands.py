"""The commands that look at things, on the reference's own outputs and on a work directory."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import stored_job
from safetensors.torch import save_file

from exl2ray.commands.job_status import show as show_status
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import QParams, pad32
from exl2ray.formats.measurement import Measurement, ModuleProfile, OptionProfile, write_measurement
from exl2ray.model.arch import load_spec
from exl2ray.quant.qparams import attention_options, mlp_options, parse
from exl2ray.recipe import Recipe
from exl2ray.store.passes import PassStatus
from exl2ray.store.status import StoredJob, WorkStatus
from exl2ray.store.workdir import WorkDir

LAYERS = 6


@pytest.fixture
def model(shared_dir) -> str:
    return str(shared_dir / "models" / "tiny-llama-7m")


@pytest.fixture
def measurement(shared_dir) -> str:
    return str(shared_dir / "golden" / "tiny-llama-7m-measurement.json")


@pytest.fixture
def golden(shared_dir) -> str:
    return str(shared_dir / "golden" / "tiny-llama-7m-exl2-3.0bpw")


@pytest.fixture
def complete(shared_dir, golden, model, tmp_path) -> Path:
    """The golden directory with its tokenizer, which is kept elsewhere."""
    directory = Path(shutil.copytree(golden, tmp_path / "exl2"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model) / name, directory)
    return directory


# ---- solve ----------------------------------------------------------------------------------------------------------


def test_solve_spends_the_budget_on_the_references_measurement(run, model, measurement):
    result = run("solve", "-i", model, "-m", measurement, "-b", "3.0", "-b", "4.5", "--json")
    assert result.exit_code == 0, result.stderr
    low, high = json.loads(result.stdout)["solutions"]
    entries = json.loads(Path(measurement).read_text())["measurement"]
    errors = []
    for solution, bits in ((low, 3.0), (high, 4.5)):
        assert solution["bits"] == bits
        assert bits - 0.02 < solution["achieved_bpw"] <= bits
        assert 0 <= solution["gap"] < 1e-3
        assert len(solution["choices"]) == 2 * LAYERS
        total = 0
        for choice in solution["choices"]:
            option = entries[choice["key"]][choice["option"]]
            assert choice["error"] == pytest.approx(1 - option["accuracy"])
            assert choice["options"] == len(entries[choice["key"]])
            for role, text in choice["params"].items():
                assert parse(text) == QParams.from_json(option[role])
            total += option["total_bits"]
        assert total == solution["total_bits"]
        errors.append(sum(c["error"] ** 2 for c in solution["choices"]))
        assert solution["objective_value"] == pytest.approx(errors[-1])
    assert errors[1] < errors[0]


def test_solve_for_people(run, model, measurement):
    result = run("solve", "-i", model, "-m", measurement, "--bits", "3", "--objective", "product")
    assert result.exit_code == 0
    assert "model.layers.5.mlp" in result.stdout
    assert "achieved 2.99" in result.stdout or "achieved 3.0000" in result.stdout
    assert "above the proven optimum" in result.stdout


@pytest.mark.parametrize(("bits", "code"), [("1", 2), ("2.1", 5), ("9", 5), ("nan", 2)])
def test_solve_refuses_what_cannot_be(run, model, measurement, bits, code):
    result = run("solve", "-i", model, "-m", measurement, "-b", bits)
    assert result.exit_code == code
    assert f"-b {bits}" in result.stderr


def test_solve_refuses_the_measurement_of_another_model(run, shared_dir, measurement):
    result = run("solve", "-i", str(shared_dir / "models" / "tiny-mixtral-8m"), "-m", measurement)
    assert result.exit_code == 8
    assert run("solve", "-i", "nowhere", "-m", measurement).exit_code == 3
    assert run("solve", "-m", measurement).exit_code == 2


def write_parallel_model(directory: Path) -> Path:
    """A Cohere model: attention and MLP of a layer are one module with two options to choose."""
    config = {
        "architectures": ["CohereForCausalLM"],
        "model_type": "cohere",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 256,
        "logit_scale": 0.0625,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tensors = {"model.embed_tokens.weight": torch.zeros(64, 128), "model.norm.weight": torch.ones(128)}
    for i in range(2):
        tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(128)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"model.layers.{i}.self_attn.{name}.weight"] = torch.zeros(128, 128)
        for name, shape in (("gate_proj", (256, 128)), ("up_proj", (256, 128)), ("down_proj", (128, 256))):
            tensors[f"model.layers.{i}.mlp.{name}.weight"] = torch.zeros(*shape)
    directory.mkdir()
    save_file({k: t.half() for k, t in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def made_up_measurement(model: Path) -> Measurement:
    """Accuracies that rise along the option tables; the later a module, the less it matters."""
    spec = load_spec(SourceModel(model))
    tables = {
        "attn": [dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), row, strict=True)) for row in attention_options()],
        "mlp": [dict(zip(("gate_proj", "up_proj", "down_proj"), row, strict=True)) for row in mlp_options()],
        "moe": [dict(zip(("w1", "w3", "w2"), row, strict=True)) for row in mlp_options()],
    }

    def options(module, table):
        out = []
        for i, params in enumerate(tables[table]):
            chosen = [(x, params[x.role]) for x in module.linears if x.role in params]
            bits = sum(p.bits_of(x) for x, p in chosen)
            out.append(OptionProfile(1 - 0.3 * 0.8**i / (1 + module.index), bits, params))
        return tuple(out)

    profiles = []
    for module in spec.modules[1:]:
        key, mode = module.profile_key.rsplit(".", 1)
        if module.kind == "parallel":
            profiles.append(ModuleProfile(key, mode, attn=options(module, "attn"), mlp=options(module, "mlp")))
        elif module.quantized:
            table = {"attention": "attn", "mlp": "mlp", "moe": "moe"}[module.kind]
            profiles.append(ModuleProfile(key, mode, options(module, table)))
        else:
            profiles.append(ModuleProfile(key, mode))
    return Measurement(tuple(profiles), len(spec.modules) - 1)


@pytest.mark.parametrize("family", ["parallel", "experts"])
def test_solve_of_parallel_blocks_and_experts(run, shared_dir, tmp_path, family):
    shared = shared_dir / "models" / "tiny-mixtral-8m"
    source = write_parallel_model(tmp_path / "cohere") if family == "parallel" else shared
    file = tmp_path / "measurement.json"
    write_measurement(file, made_up_measurement(source))
    result = run("solve", "-i", str(source), "-m", str(file), "-b", "5", "--json")
    assert result.exit_code == 0, result.stderr
    solution = json.loads(result.stdout)["solutions"][0]
    assert 4.9 < solution["achieved_bpw"] <= 5
    keys = [c["key"] for c in solution["choices"]]
    if family == "parallel":
        assert keys[:2] == ["model.layers.0.parallel_decoder.attn", "model.layers.0.parallel_decoder.mlp"]
    else:
        assert keys[:2] == ["model.layers.0.self_attn", "model.layers.0.block_sparse_moe"]
        assert set(solution["choices"][1]["widths"]) == {"w1", "w2", "w3"}
    sizes = {}
    for module in load_spec(SourceModel(source)).modules:
        for x in module.linears if module.quantized else ():
            half = "" if family == "experts" else ".attn" if x.role in ("q_proj", "k_proj", "v_proj", "o_proj") else ".mlp"
            key = module.profile_key + half
            sizes[key] = sizes.get(key, 0) + x.in_features * x.padded_out
    total = sum(c["bits_per_weight"] * sizes[c["key"]] for c in solution["choices"])
    assert total == pytest.approx(solution["total_bits"])
    assert total / sum(sizes.values()) == pytest.approx(solution["achieved_bpw"])


# ---- inspect, verify ------------------------------------------------------------------------------------------------


def test_inspect(run, golden):
    result = run("inspect", golden)
    assert result.exit_code == 0
    assert "LlamaForCausalLM" in result.stdout
    assert "decoder 2.99" in result.stdout
    layer = next(line.split() for line in result.stdout.splitlines() if line.startswith("0 "))
    assert len(layer) == 1 + 1 + 2 + 7
    everything = run("inspect", golden, "--linears").stdout
    assert "model.layers.3.mlp.down_proj" in everything
    assert "704 x 256" in everything


def test_inspect_json_adds_up(run, golden):
    d = json.loads(run("inspect", golden, "--json").stdout)
    assert len(d["linears"]) == 7 * LAYERS + 1
    assert d["total_bytes"] == os.path.getsize(os.path.join(golden, "output.safetensors"))
    assert sum(x["bytes"] for x in d["linears"]) + d["plain_bytes"] < d["total_bytes"]
    assert [layer["layer"] for layer in d["layers"]] == list(range(LAYERS))
    assert d["settings"]["head_bits"] == 6
    decoder = [x for x in d["linears"] if x["layer"] is not None]
    weights = [x["in_features"] * pad32(x["out_features"]) for x in decoder]
    mean = sum(x["bpw"] * w for x, w in zip(decoder, weights, strict=True)) / sum(weights)
    assert d["decoder_bpw"] == pytest.approx(mean)


def test_verify_finds_the_reference_sound(run, complete, model):
    result = run("verify", str(complete), "-i", model)
    assert (result.exit_code, result.stdout) == (0, f"{complete}: sound\n")
    assert json.loads(run("verify", str(complete), "--json").stdout)["sound"] is True


def test_verify_names_every_problem_on_a_line(run, complete, shared_dir):
    (complete / "tokenizer.json").unlink()
    config = json.loads((complete / "config.json").read_text())
    del config["quantization_config"]
    (complete / "config.json").write_text(json.dumps(config))
    result = run("verify", str(complete))
    assert result.exit_code == 8
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    assert "quantization_config" in lines[0] + lines[1]
    assert "tokenizer.json" in lines[0] + lines[1]
    assert lines[2] == f"{complete}: 2 problems"
    problems = json.loads(run("verify", str(complete), "--json").stdout)["problems"]
    assert sorted(p["rule"] for p in problems) == ["config", "side-file"]
    result = run("verify", str(complete), "-i", str(shared_dir / "models" / "tiny-mixtral-8m"))
    assert result.exit_code == 8
    assert "[expected]" in result.stdout


# ---- eval, calibration ----------------------------------------------------------------------------------------------


def test_eval(run, golden, model, tmp_path, shared_dir):
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.load(shared_dir / "data" / "eval-tokens.npy")[:256].astype(np.int64))
    args = ["eval", "--model", golden, "--model", model, "--reference", model, "--tokens", str(tokens)]
    result = run(*args, "--rows", "2", "--length", "128", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    quantised, itself = json.loads(result.stdout)["results"]
    assert quantised["kl"]["value"] > 0.05
    assert itself["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert itself["top1_agreement"]["value"] == 1
    assert quantised["linears_bpw"] == pytest.approx(2.9913, abs=1e-3)
    text = run(*args, "--rows", "2", "--length", "128", "--device", "cpu").stdout
    assert "perplexity" in text
    assert "254 predictions in 2 rows of 128 tokens" in text


def test_eval_of_a_text(run, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The lighthouse keeper counted the ships that passed in the night. " * 30)
    result = run("eval", "--model", model, "--text", str(text), "--length", "64", "--rows", "1", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    assert "63 predictions" in result.stdout


def test_eval_takes_one_source_of_tokens(run, model):
    result = run("eval", "--model", model, "--tokens", "a.npy", "--text", "b.txt")
    assert result.exit_code == 2
    assert "two sources" in result.stderr
    assert run("eval", "--tokens", "a.npy").exit_code == 2


def test_eval_of_the_built_in_text(run, model, tmp_path):
    out = tmp_path / "p.npz"
    args = ("eval", "--model", model, "--rows", "2", "--length", "64", "--device", "cpu", "--json")
    result = run(*args, "--reference", model, "--positions", str(out))
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout.splitlines()[-1])["results"]
    assert (found["rows"], found["length"]) == (2, 64)
    arrays = np.load(out)
    assert arrays["0/nll"].shape == (2, 63)
    assert arrays["0/nll"].mean() == pytest.approx(found["nll"]["value"])
    assert float(arrays["0/kl"].max()) < 1e-6
    assert run(*args, "--stride", "8").exit_code == 2
    assert run("eval", "--model", model, "--rows", "999999").exit_code == 2
    assert run("eval", "--model", model, "--positions", "x.txt").exit_code == 2


def test_calibration_shows_both_passes(run, model, shared_dir):
    data = str(shared_dir / "data" / "calibration-mix.parquet")
    args = ["-i", model, "-c", data, "-r", "3", "-mr", "2", "-l", "256", "-ml", "128"]
    result = run("calibration", "--show", *args, "--json")
    assert result.exit_code == 0, result.stderr
    views = json.loads(result.stdout)
    assert (views["measurement"]["rows"], views["measurement"]["length"]) == (2, 128)
    assert (views["quantisation"]["rows"], views["quantisation"]["length"]) == (3, 256)
    text = run("calibration", *args).stdout
    assert "measurement: 2 rows of 128 tokens" in text
    assert "parquet" in text
    assert run("calibration", "-i", model, "-c", data, "-r", "100000").exit_code == 4
    assert run("calibration", "-i", "nowhere").exit_code == 2


# ---- status ---------------------------------------------------------------------------------------------------------


def test_status(run, tmp_path):
    root = str(tmp_path / "work")
    job = stored_job(Recipe(in_dir="/models/m", out_dir=root, bits=(4.0, 3.5)))
    with WorkDir.create_or_resume(root, job, resume=True, versions={"exl2ray": "0.1.0"}):
        running = run("status", root)
        assert running.exit_code == 0
        assert f"{root}: running: process {os.getpid()}" in running.stdout
    result = run("status", root)
    assert f"{root}: stopped" in result.stdout
    assert "quantize bits (-b)" in result.stdout
    assert "4.0, 3.5" in result.stdout
    status = json.loads(run("status", root, "--json").stdout)
    assert status["state"] == "stopped"
    assert status["job"]["job"]["quantize"]["bits"] == [4.0, 3.5]
    missing = run("status", str(tmp_path / "nowhere"))
    assert missing.exit_code == 7
    assert not (tmp_path / "nowhere").exists()


def test_a_status_is_for_people(capsys):
    fields = {"seconds": 0.9707831320010882, "received": 2_000_000, "bits": 4.125}
    events = [{"time": "T", "name": "finished", "fields": fields},
              {"time": "T", "name": "allocated", "fields": {"gap": 1.23456789e-05}}]  # fmt: skip
    made = {"quantize": {"numerics": {"sweeps": 2, "scale_search": "feedback"}, "chat_rows": True}}
    done = PassStatus("quantize 4.125", "finished", 13, 13, 0)
    found = WorkStatus("work", "finished", StoredJob(made, {}, "T"), "", None, (done,), {}, True, True, tuple(events), ())
    show_status(found)
    out = capsys.readouterr().out
    assert out.startswith("work: finished\n")
    for words in ("seconds 1.0 s, received 2 MB, bits 4.125", "gap 1.235e-05", "sweeps 2, scale_search feedback", "  yes\n"):
        assert words in out
    assert "{" not in out
    assert not out.endswith("workers\n"), "a heading without anything below it"
    show_status(replace(found, state="stopped", passes=(done, replace(done, name="compile 4.125", state="stopped"))))
    assert capsys.readouterr().out.startswith("work: stopped\n")
