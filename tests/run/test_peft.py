"""LoRA adapters of PEFT on packed linears: trained, saved, loaded again; the model under them stays as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exl2_models import losses_of_training, tokens, write_exl2
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft", reason="needs peft: pip install 'exl2ray[dev]'")

import exl2ray.transformers  # noqa: E402
from exl2ray.peft import for_exl2  # noqa: E402


def test_an_adapter_is_trained_saved_and_loaded_again(tmp_path: Path) -> None:
    assert exl2ray.transformers
    path = write_exl2(tmp_path / "model")

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(), for_exl2(settings))
    before = model(tokens()).logits.detach()
    packed = {n: t.clone() for n, t in model.state_dict().items() if n.endswith("q_weight")}
    losses = losses_of_training(model)
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(t, packed[n]) for n, t in model.state_dict().items() if n in packed)
    with torch.inference_mode():
        after = model(tokens()).logits
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, before)
        model.save_pretrained(tmp_path / "adapter")
        config = for_exl2(peft.PeftConfig.from_pretrained(tmp_path / "adapter"))
        again = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter", config=config)
        assert torch.equal(again(tokens()).logits, after)
        assert model.generate(tokens()[:1], max_new_tokens=4).shape[0] == 1
