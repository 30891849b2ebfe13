"""EXL2 models in vLLM: installing exl2ray is enough, ``vllm serve DIR`` then loads them, whatever wrote them.

``register`` is an entry point of the group ``vllm.general_plugins``, which vLLM calls in each of its processes, whatever
model it is to serve: so it imports nothing that takes time, and where it cannot do its work it says so and lets vLLM go on.
`config.py` is what vLLM asks which layer is quantised, `layers.py` linears and heads, `experts.py` mixtures of experts.
"""

from __future__ import annotations

import logging


def register() -> None:
    """Makes the quantisation method "exl2" known to the vLLM of this process; harmless when repeated."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from exl2ray.vllm.config import Exl2Config

        register_quantization_config("exl2")(Exl2Config)
    except (ImportError, AttributeError, TypeError, ValueError) as e:
        logging.getLogger(__name__).warning("exl2ray: no EXL2 models in this vLLM, which is not one that it knows: %s", e)
