#!/usr/bin/env python3
"""Train the demo model in models/demo: a 1.7 M-parameter Llama and its tokenizer, on the built-in calibration text.

The README's commands and the tests convert it, so it has to be small, real (trained, so that quantisation error shows in
perplexity) and made from text that is ours. Some documents are held out of both tokenizer and model and stored as
``eval-tokens.npy``; the weights kept are those with the lowest held-out loss.

    python3 scripts/train_demo.py --seconds 150          # one GPU, about three minutes in all
    python3 scripts/train_demo.py --device cpu --steps 50 --out /tmp/demo

Needs torch, transformers, tokenizers and safetensors; no network and no installation of exl2ray.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from exl2ray.calibration.text import Document, builtin_documents, parse_chat  # noqa: E402

UNK, BOS, EOS = "<unk>", "<s>", "</s>"  # ids 0, 1, 2
VOCAB = 2048
POSITIONS = 2048
LENGTHS = (256, 1024, POSITIONS)  # of training rows, in turn: RoPE must have seen every distance that conversion uses
EVAL_LENGTH = 512
HELD_OUT_SHARE = 0.05  # of the documents
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)


@dataclass(frozen=True)
class Text:
    """A document as the model sees it, without BOS and EOS."""

    name: str
    family: str
    text: str


def as_text(doc: Document) -> Text:
    """Conversations are written as ``CHAT_TEMPLATE`` does; everything else stays as it is."""
    if doc.kind == "chat":
        content = "".join(f"[{role}]\n{said}\n" for role, said in parse_chat(doc).messages)
    else:
        content = doc.text
    return Text(f"{doc.kind}/{doc.name}", doc.family, content)


def split(texts: Sequence[Text], seed: int) -> tuple[list[Text], list[Text]]:
    """(training, held-out) texts. The only text of a family (language, file type) is not held out: the model would be
    asked for something that it never saw."""
    left = Counter(t.family for t in texts)
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    held: list[int] = []
    for i in order:
        if len(held) < HELD_OUT_SHARE * len(texts) and left[texts[i].family] > 1:
            held.append(i)
            left[texts[i].family] -= 1
    chosen = set(held)
    return [t for i, t in enumerate(texts) if i not in chosen], [texts[i] for i in sorted(held)]


def train_tokenizer(texts: Iterable[Text]) -> Tokenizer:
    """Byte-level BPE with ``VOCAB`` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((t.text for t in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[Text]) -> np.ndarray:
    """Ids (n,) uint16 of all texts one after the other, each between BOS and EOS."""
    encodings = tokenizer.encode_batch([t.text for t in texts], add_special_tokens=False)
    return np.array([i for e in encodings for i in (1, *e.ids, 2)], dtype=np.uint16)


def build_model(dropout: float) -> LlamaForCausalLM:
    """The untrained model. Dropout acts where Llama has none of its own: on the embedding and on what attention and MLP
    add to the residual stream."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)

    def drop(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return F.dropout(output, dropout, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)
    return model


def loss_of(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
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


def optimizer_of(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))


@dataclass(frozen=True)
class Trained:
    """Losses in nats per token; ``train_loss`` with dropout, averaged around the best step."""

    steps: int
    best_step: int
    train_loss: float
    held_out_loss: float
    seconds: float


def train(model: LlamaForCausalLM, stream: Tensor, eval_rows: Tensor, args: argparse.Namespace) -> Trained:
    """AdamW, 5 % warm-up, cosine decay to a twentieth; ends after --steps or --seconds. Leaves the best weights in
    ``model``. stream: (n,) int64 ids; eval_rows: (R, EVAL_LENGTH) int64."""
    optimizer = optimizer_of(model, args)
    offsets = torch.Generator().manual_seed(args.seed)
    best = Trained(0, 0, math.nan, math.inf, 0.0)
    weights: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    start, step, done = time.perf_counter(), 0, 0.0
    model.train()
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (done + 1e-3) / 0.05) * (0.525 + 0.475 * math.cos(math.pi * done))
        length = LENGTHS[step % len(LENGTHS)]
        first = torch.randint(0, len(stream) - length, (max(1, args.batch_tokens // length),), generator=offsets)
        rows = stream[first[:, None].to(stream.device) + torch.arange(length, device=stream.device)]
        loss = loss_of(model, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        step += 1
        elapsed = time.perf_counter() - start
        done = max(step / args.steps, elapsed / args.seconds)
        if step % args.report_every == 0 or done >= 1:
            mean, held = float(torch.stack(losses).mean()), held_out_loss(model, eval_rows)
            losses.clear()
            if not math.isfinite(mean) or not math.isfinite(held):
                raise SystemExit(f"step {step}: training loss {mean}, held-out loss {held}; lower --lr")
            mark = ""
            if held < best.held_out_loss:
                best, mark = Trained(step, step, mean, held, elapsed), " *"
                weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
            epochs = step * args.batch_tokens / len(stream)
            print(f"step {step:5d}  {elapsed:6.1f} s  epoch {epochs:6.1f}  train {mean:.4f}  held out {held:.4f}{mark}")
    model.load_state_dict(weights)
    model.eval()
    return Trained(step, best.best_step, best.train_loss, best.held_out_loss, time.perf_counter() - start)


def save(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, eval_ids: np.ndarray) -> None:
    """Float16 weights, config, tokenizer files and held-out tokens."""
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    # Loaders that do not know the spelling of transformers 5 read these two.
    config |= {"rope_theta": 10000.0, "torch_dtype": "float16"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "model_max_length": POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    np.save(out / "eval-tokens.npy", eval_ids)


def readme(trained: Trained, stream: Tensor, eval_ids: np.ndarray, held: list[Text], loss: float) -> str:
    names = "\n".join(f"* {t.name}" for t in held)
    return f"""# Demo model

A Llama with 1.7 M parameters (hidden 128, intermediate 384, 6 layers, 4 heads, 2 key/value heads, vocabulary 2048,
untied head, 2048 positions), float16, with a byte-level BPE tokenizer. It exists to be converted in seconds by the
examples and tests; as a language model it is of no use.

Made by `scripts/train_demo.py` from exl2ray's built-in calibration text: {len(stream)} training tokens,
{trained.steps} steps in {trained.seconds:.0f} s, weights of step {trained.best_step} (lowest held-out loss).

| loss | nats per token | perplexity |
|---|---|---|
| training (with dropout) | {trained.train_loss:.4f} | {math.exp(trained.train_loss):.2f} |
| held out, these float16 weights, rows of {EVAL_LENGTH} | {loss:.4f} | {math.exp(loss):.2f} |

`eval-tokens.npy`: {len(eval_ids)} held-out tokens, uint16, documents one after the other between `<s>` and `</s>`:

{names}

Neither tokenizer nor weights were trained on them, but the step was chosen on them, and a conversion with the built-in
calibration text calibrates on text that includes them.
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seconds", type=float, default=600.0, help="time limit of the training loop")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--report-every", type=int, default=25, help="steps between reports of both losses")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    training, held = split([as_text(d) for d in builtin_documents()], args.seed)
    tokenizer = train_tokenizer(training)
    stream = torch.from_numpy(encode(tokenizer, training).astype(np.int64)).to(args.device)
    eval_ids = encode(tokenizer, held)
    rows = len(eval_ids) // EVAL_LENGTH
    eval_rows = torch.from_numpy(eval_ids[: rows * EVAL_LENGTH].astype(np.int64)).view(rows, -1).to(args.device)
    model = build_model(args.dropout).to(args.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(training)} documents, {len(stream)} tokens; held out {len(held)} documents, {len(eval_ids)} tokens")
    print(f"{count} parameters on {args.device}; untrained loss {held_out_loss(model, eval_rows):.4f}")
    trained = train(model, stream, eval_rows, args)
    save(args.out, model, tokenizer, eval_ids)
    final = held_out_loss(LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device), eval_rows)
    (args.out / "README.md").write_text(readme(trained, stream, eval_ids, held, final), encoding="utf-8")
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"held-out loss of the saved weights {final:.4f}, perplexity {math.exp(final):.2f}; {args.out}: {size} bytes")


if __name__ == "__main__":
    main()
