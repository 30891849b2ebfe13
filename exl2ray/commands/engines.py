"""Programs that answer in ``exl2ray chat`` in place of eval's own forward pass.

The own one is the default: it needs nothing installed, runs everything that ``eval`` runs, and is the fastest on a CPU:
SmolLM2-135M at 4.0 bits, one thread, 12 tokens after a prompt of 38 took 1.3 s, in transformers with packed linears 5.4 s,
the same tokens. There weights stay packed, so that a model answers that does not fit into memory in float16. Not compared on
a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from exl2ray.errors import Exl2RayError, SourceError, UsageError
from exl2ray.evaluate.forward import OpenModel, RunOptions, checked_device
from exl2ray.evaluate.generate import Generator

PAGE = 256  # tokens; ExLlamaV2's cache is a number of them
CACHE_TOKENS = 1 << 15  # at most


def engine(name: str, model: OpenModel, device: str, options: RunOptions) -> Generator | Transformers | ExLlamaV2:
    """What generates tokens of ``model``. Raises UsageError for an engine that is not there or cannot do what is asked."""
    if name == "exl2ray":
        return Generator(model, device, options)
    if options.rope_scale is not None or options.rope_alpha is not None:
        raise UsageError(f"--engine {name} takes RoPE from config.json", "leave out --rope-scale and --rope-alpha")
    return Transformers(model, device) if name == "transformers" else ExLlamaV2(model, device)


class Transformers:
    """A model in Hugging Face transformers; EXL2 directories through `exl2ray.transformers`, weights packed."""

    def __init__(self, model: OpenModel, device: str) -> None:
        try:
            import transformers

            import exl2ray.transformers  # noqa: F401  # registers the format
        except ImportError as e:
            raise UsageError(f"--engine transformers: {e}", 'pip install "exl2ray[transformers]"') from e
        self.device = checked_device(device)
        dtype = torch.float32 if self.device.type == "cpu" else torch.float16
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        with _named(model.path, "transformers"):
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model.path, dtype=dtype)
            self._model: Any = loaded.to(self.device).eval()

    def greedy(self, prompt: list[int]) -> Iterator[int]:
        """As `Generator.greedy`."""
        ids, cache = torch.tensor([prompt], device=self.device), None
        while True:
            with torch.inference_mode():
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
            yield int(ids)


class ExLlamaV2:
    """A model in ExLlamaV2 0.3.x, on all GPUs that it needs; through its documented generator of single jobs."""

    def __init__(self, model: OpenModel, device: str) -> None:
        if device not in ("auto", "cuda") or not torch.cuda.is_available():
            raise UsageError(
                f"--engine exllamav2 --device {device}: ExLlamaV2 runs on CUDA GPUs, and chooses among them itself",
                "leave out --device; CUDA_VISIBLE_DEVICES limits the choice",
            )
        os.environ.setdefault("EXLLAMA_NO_SDPA", "1")  # without flash-attn its attention through SDPA is not causal
        try:
            import exllamav2
            import exllamav2.generator as generator
        except (ImportError, OSError, RuntimeError) as e:  # it compiles its extension as it is imported
            text = f"--engine exllamav2: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
            raise UsageError(text, "install exllamav2 0.3.2 for your torch and CUDA, or leave out --engine") from e
        self._job = generator.ExLlamaV2DynamicJob
        self._tokens = min(model.spec.hyper.max_seq_len, CACHE_TOKENS) // PAGE * PAGE
        if not self._tokens:
            raise UsageError(f"{model.path}: --engine exllamav2 needs a context of {PAGE} tokens", "leave out --engine")
        with _named(model.path, "ExLlamaV2"):
            config = exllamav2.ExLlamaV2Config(str(model.path))
            config.arch_compat_overrides()
            loaded = exllamav2.ExLlamaV2(config)
            cache = exllamav2.ExLlamaV2Cache(loaded, max_seq_len=self._tokens, lazy=True)
            loaded.load_autosplit(cache)
            tokenizer = exllamav2.ExLlamaV2Tokenizer(config)
            paged = torch.cuda.get_device_capability(0) >= (8, 0) and _has_flash_attention()
            self._generator = generator.ExLlamaV2DynamicGenerator(
                model=loaded, cache=cache, tokenizer=tokenizer, max_batch_size=1, paged=paged
            )
        self._settings = generator.ExLlamaV2Sampler.Settings()
        self._settings.temperature, self._settings.top_k, self._settings.top_p = 1.0, 1, 0.0
        self._settings.token_repetition_penalty = 1.0

    def greedy(self, prompt: list[int]) -> Iterator[int]:
        """As `Generator.greedy`, as far as the cache reaches; UsageError for a prompt that fills it."""
        room = self._tokens - len(prompt)
        if room < 1:
            raise UsageError(f"the prompt has {len(prompt)} tokens; the cache of --engine exllamav2 holds {self._tokens}")
        job = self._job(
            input_ids=torch.tensor([prompt]), max_new_tokens=room, gen_settings=self._settings, stop_conditions=[]
        )
        self._generator.enqueue(job)
        try:
            while self._generator.num_remaining_jobs():
                for result in self._generator.iterate():
                    tokens = result.get("token_ids") if result["stage"] == "streaming" else None
                    yield from [] if tokens is None else tokens.flatten().tolist()
        finally:
            self._generator.clear_queue()  # whoever listens has heard enough


def _has_flash_attention() -> bool:
    from importlib.util import find_spec

    return find_spec("flash_attn") is not None


@contextmanager
def _named(path: Path, program: str) -> Iterator[None]:
    """Errors of another program while it loads a model become a SourceError that names the model and the program."""
    try:
        yield
    except Exl2RayError:
        raise
    except Exception as e:
        first = (str(e).splitlines() or [""])[0] or type(e).__name__
        raise SourceError(f"{path}: {program} cannot load it: {first}", "leave out --engine") from e
