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
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import training  # noqa: E402
from training import POSITIONS, Trained, held_out_loss  # noqa: E402

from exl2ray.calibration.text import Document, builtin_documents  # noqa: E402

VOCAB = 2048
EVAL_LENGTH = 512
HELD_OUT_SHARE = 0.05  # of the documents


def split(texts: Sequence[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents. The only one of a family (language, file type) is not held out: the model would be
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


def readme(trained: Trained, stream: Tensor, eval_ids: np.ndarray, held: list[Document], loss: float) -> str:
    names = "\n".join(f"* {d.kind}/{d.name}" for d in held)
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
    parser.add_argument("--reports", type=int, default=60, help="reports of both losses")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    documents, held = split(builtin_documents(), args.seed)
    texts = [training.as_text(d) for d in documents]
    tokenizer = training.train_tokenizer(texts, VOCAB)
    stream = torch.from_numpy(training.encode(tokenizer, texts).astype(np.int64)).to(args.device)
    eval_ids = training.encode(tokenizer, [training.as_text(d) for d in held])
    rows = len(eval_ids) // EVAL_LENGTH
    eval_rows = torch.from_numpy(eval_ids[: rows * EVAL_LENGTH].astype(np.int64)).view(rows, -1).to(args.device)
    model = build_model(args.dropout).to(args.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(documents)} documents, {len(stream)} tokens; held out {len(held)} documents, {len(eval_ids)} tokens")
    print(f"{count} parameters on {args.device}; untrained loss {held_out_loss(model, eval_rows):.4f}")
    settings = training.Settings(
        seconds=args.seconds, steps=args.steps, rate=args.lr, weight_decay=args.weight_decay, batch_tokens=args.batch_tokens,
        lengths=(256, 1024, POSITIONS), warm_up=0.05, floor=0.05, reports=args.reports, seed=args.seed,
    )  # fmt: skip
    trained = training.train(model, stream, eval_rows, settings)
    training.save(args.out, model, tokenizer)
    np.save(args.out / "eval-tokens.npy", eval_ids)
    final = held_out_loss(LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device), eval_rows)
    (args.out / "README.md").write_text(readme(trained, stream, eval_ids, held, final), encoding="utf-8")
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"held-out loss of the saved weights {final:.4f}, perplexity {math.exp(final):.2f}; {args.out}: {size} bytes")


if __name__ == "__main__":
    main()
