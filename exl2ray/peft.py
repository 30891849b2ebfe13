"""LoRA adapters of PEFT on EXL2 models: ``get_peft_model(model, for_exl2(LoraConfig(...)))``, and everything else is PEFT.

PEFT wraps modules that it knows, and has no list to add others to but that of a configuration. The packed linears stay as
they are: adapters lie beside them, are trained through them, and cannot be merged into them.
"""

from __future__ import annotations

from peft import LoraConfig
from peft.tuners.lora.gptq import GPTQLoraLinear

from exl2ray.run.linear import Exl2Linear


def for_exl2(config: LoraConfig) -> LoraConfig:
    """The configuration, with packed linears among the modules that PEFT can wrap.

    To load an adapter: ``PeftModel.from_pretrained(model, DIR, config=for_exl2(PeftConfig.from_pretrained(DIR)))``.
    """
    config._register_custom_module({Exl2Linear: GPTQLoraLinear})  # which asks nothing of its linear but its product
    return config
