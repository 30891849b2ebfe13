"""What `train_demo.py` and `train_model.py` share: a tokenizer, the training loop, the files of a small Llama."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from exl2ray.calibration.text import Document, parse_chat

UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2
POSITIONS = 2048
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@dataclass(frozen=True)
class Settings:
    """Of the loop: AdamW, ``warm_up`` of it rising, then a cosine down to ``floor`` of ``rate``. It ends after steps or
    seconds, whichever comes first. lengths: of training rows, in turn: RoPE must have seen every distance in use.
    """

    seconds: float
    rate: float
    weight_decay: float
    batch_tokens: int
    lengths: tuple[int, ...]
    warm_up: float
    floor: float
    reports: int  # of both losses; the weights are chosen among these
    seed: int
    steps: float = math.inf


@dataclass(frozen=True)
class Trained:
    """Losses in nats per token: of the last training steps before the best report, and of the held-out rows there."""

    steps: int
    tokens_seen: int
    best_step: int
    train_loss: float
    held_out_loss: float
    seconds: float


def as_text(doc: Document) -> str:
    """Conversations are written as ``CHAT_TEMPLATE`` does; everything else stays as it is."""
    if doc.kind != "chat":
        return doc.text
    return "".join(f"[{role}]\n{said}\n" for role, said in parse_chat(doc).messages)


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with ``vocab`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[UNK, BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], most: int | None = None) -> np.ndarray:
    """Ids (n,) uint16 of all texts one after the other, each cut to ``most`` tokens and between BOS and EOS."""
    parts = []
    for first in range(0, len(texts), 1000):  # a batch at a time: encodings are much larger than their ids
        for e in tokenizer.encode_batch(list(texts[first : first + 1000]), add_special_tokens=False):
            parts.append(np.array([1, *e.ids[:most], 2], dtype=np.uint16))
    return np.concatenate(parts)


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean next-token loss in nats of rows (R, T)."""
    with torch.autocast("cuda", torch.bfloat16, enabled=rows.is_cuda):
        logits = model(rows, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Loss over all rows (R, T), 16 at a time."""
    model.eval()
    total = sum(float(loss_of(model, part)) * len(part) for part in rows.split(16))
    model.train()
    return total / len(rows)


def train(
    model: LlamaForCausalLM, stream: Tensor, eval_rows: Tensor, settings: Settings, compiled: bool = False
) -> Trained:
    """Leaves the weights with the lowest held-out loss in ``model``. stream: (n,) ids; eval_rows: (R, T) int64; both on the
    model's device."""
    s = settings
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=s.rate, betas=(0.9, 0.95), fused=stream.is_cuda)
    forward = torch.compile(model) if compiled else model
    offsets = torch.Generator().manual_seed(s.seed)
    best, weights, losses = Trained(0, 0, 0, math.nan, math.inf, 0.0), {}, []
    start, step, seen, reports, done = time.perf_counter(), 0, 0, 0, 0.0
    model.train()
    while done < 1:
        cosine = (1 + s.floor + (1 - s.floor) * math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = s.rate * min(1.0, (done + 1e-3) / s.warm_up) * cosine
        length = s.lengths[step % len(s.lengths)]
        first = torch.randint(0, len(stream) - length, (max(1, s.batch_tokens // length),), generator=offsets)
        rows = stream[first[:, None].to(stream.device) + torch.arange(length, device=stream.device)].long()
        loss = loss_of(forward, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        step, seen = step + 1, seen + rows.numel()
        if step % 10 == 0 and stream.is_cuda:
            torch.cuda.synchronize()  # else the clock runs ahead of the work
        elapsed = time.perf_counter() - start
        done = max(step / s.steps, elapsed / s.seconds)
        if done * s.reports >= reports + 1 or done >= 1:
            reports += 1
            mean, held = float(torch.stack(losses).mean()), held_out_loss(model, eval_rows)
            losses.clear()
            if not math.isfinite(mean) or not math.isfinite(held):
                raise SystemExit(f"step {step}: training loss {mean}, held-out loss {held}; lower --lr")
            mark = ""
            if held < best.held_out_loss:
                best, mark = Trained(step, seen, step, mean, held, elapsed), " *"
                weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
            print(f"step {step:5d}  {elapsed:5.0f} s  epoch {seen / len(stream):5.2f}  {seen / elapsed / 1e3:.0f}k tokens/s  "
                  f"train {mean:.4f}  held out {held:.4f}{mark}", flush=True)  # fmt: skip
    model.load_state_dict(weights)
    model.eval()
    return Trained(step, seen, best.best_step, best.train_loss, best.held_out_loss, time.perf_counter() - start)


def save(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Float16 weights, config and tokenizer files."""
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    # Loaders that do not know the spelling of transformers 5 read these two.
    config |= {"rope_theta": 10000.0, "torch_dtype": "float16"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "unk_token": UNK,
        "model_max_length": POSITIONS, "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
