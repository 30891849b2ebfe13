"""What makes the result of a conversion doubtful and can be seen before it starts, apart from weights that hold nothing.

Each is a sentence for people. None of them stops a conversion: a random model, or text of one character, may be what somebody
wants to convert; but nobody should have to find out afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exl2ray.calibration.rows import Rows
from exl2ray.calibration.soundness import row_warnings
from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import CalibrationError, SourceError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.hfconfig import config_value, legacy_config
from exl2ray.formats.vision import vision_doubt
from exl2ray.model.class_defaults import defaults_of
from exl2ray.model.spec import ModelSpec
from exl2ray.model.weights import FLOAT_DTYPES

COMPARED_BYTES = 512 << 20  # of a head and an embedding: larger ones are compared at places
PLACES, PLACE_ROWS = 256, 16
FREQUENT = 512  # tokens whose rows in embedding and head are looked at
NEAR_BYTES = 1 << 18  # that are read at once to look at some of the rows in them
LONG_CONTEXT = 8192  # positions from which RoPE without a base of its own is unusual
DEFAULT_THETA = 10000.0
LARGE_VOCABULARY = 100_000  # tokens; smaller ones may be of languages that leave no room for English words
MOST_A_WORD = 1.6
PLAIN_ENGLISH = (
    "The people who lived in the small village near the river had always known that the winter would be long. Every morning "
    "they went out to look at the water, and every evening they came back to talk about what they had seen. Nobody could say "
    "when the ice would break, but everyone agreed that it had never been so late in the year before."
)
PASSES = {"measure": "calibration rows of the measurement", "quantize": "calibration rows of the quantisation"}


def calibration_doubts(rows: Mapping[str, Rows]) -> list[str]:
    """Rows with hardly any text in them."""
    return [text for name, r in rows.items() for text in row_warnings(r.ids, PASSES.get(name, name))]


def tokenizer_doubts(tokenizer: ModelTokenizer) -> list[str]:
    """What is wrong with a tokenizer that can be used."""
    return [*broken_template(tokenizer), *small_pieces(tokenizer)]


def broken_template(tokenizer: ModelTokenizer) -> list[str]:
    """A chat template that is none: conversations are calibrated on as plain text, and the output can hold none at all."""
    if tokenizer.templates is None:
        return []
    try:
        tokenizer.templates.compile()
    except CalibrationError as e:
        what = e.message.removeprefix("the ").removeprefix("chat template").lstrip(": ")
        return [f"the model's chat template cannot be used ({what}), and is copied into the output as it is: fetch it again"]
    return []


def small_pieces(tokenizer: ModelTokenizer) -> list[str]:
    """A large vocabulary that cuts plain English words to pieces: its merges or scores were lost on the way, and the model
    never saw such text. Gemma's 262 thousand tokens take 1.08 a word of this text, and 2.18 in the tokenizer that
    transformers 5.17 makes of a GGUF file; a vocabulary of 2048 takes 1.4.
    """
    if tokenizer.vocab_size < LARGE_VOCABULARY:
        return []
    each = len(tokenizer.encode(PLAIN_ENGLISH)) / len(PLAIN_ENGLISH.split())
    if each <= MOST_A_WORD:
        return []
    return [
        f"{tokenizer.path}: {each:.1f} tokens for a plain English word, where a vocabulary of {tokenizer.vocab_size} needs "
        "1.1: it cuts words to pieces that the model was hardly trained on, as tokenizers do that were converted wrongly; "
        "take tokenizer.json from the model's first publisher"
    ]


def model_doubts(source: SourceModel, spec: ModelSpec, rows: Mapping[str, Rows]) -> list[str]:
    """Where config.json and weights contradict each other, or what the calibration text needs is empty."""
    checks = (head_beside_tied_embedding, default_rope_base, stored_frequencies, no_preprocessor)
    out = [text for check in checks if (text := check(source, spec)) is not None]
    return out + empty_token_rows(source, spec, rows)


def head_beside_tied_embedding(source: SourceModel, spec: ModelSpec) -> str | None:
    """tie_word_embeddings and a head that is stored all the same. Equal: nothing to say."""
    head, embedding = spec.linears[-1].weight.name, spec.modules[0].plain[0].stored.name
    flag = config_value(source.config, "tie_word_embeddings")
    if not spec.hyper.tie_embeddings or flag is False or spec.tied or head not in source or embedding not in source:
        return None
    if source.shape(head) == source.shape(embedding) and _equal(source, head, embedding):
        return None
    how = "tie_word_embeddings is true" if flag else f"{spec.arch.name} ties its head"
    return (
        f"config.json: {how}, but {head} is stored and is not {embedding}: the stored one is used, as ExLlamaV2 and "
        "transformers 5 do; transformers 4 takes the embedding. If the two were trained apart, set tie_word_embeddings to "
        f"false; if not, remove {head}"
    )


def _equal(source: SourceModel, a: str, b: str) -> bool:
    """Whether two tensors of one shape hold the same values; of large ones evenly spaced rows are compared."""
    count = source.shape(a)[0]
    step = max(1, (16 << 20) // max(1, source.nbytes(a) // max(1, count)))
    slices = [slice(i, i + step) for i in range(0, count, step)]
    if source.nbytes(a) > COMPARED_BYTES:
        slices = [slice(i * (count - PLACE_ROWS) // (PLACES - 1), None) for i in range(PLACES)]
        slices = [slice(s.start, s.start + PLACE_ROWS) for s in slices]
    return all(torch.equal(source.load(a, s).float(), source.load(b, s).float()) for s in slices)


def default_rope_base(source: SourceModel, spec: ModelSpec) -> str | None:
    """A long context, and nothing in config.json of how positions are encoded."""
    config = legacy_config(source.config)
    keys = ("rope_theta", "rope_scaling", "rope_parameters")
    attention = config.get("attn_config")
    given = config_value(config, *keys) is not None or (isinstance(attention, Mapping) and "rope_theta" in attention)
    known = "rope_theta" in defaults_of(spec.arch, config)
    if given or known or spec.hyper.rope is None or spec.hyper.max_seq_len <= LONG_CONTEXT:
        return None
    return (
        f"config.json has no rope_theta, so that {DEFAULT_THETA:g} is taken, but max_position_embeddings is "
        f"{spec.hyper.max_seq_len}: models of such a context have a larger one; is the key missing?"
    )


def no_preprocessor(source: SourceModel, spec: ModelSpec) -> str | None:
    """A vision tower without the settings that ExLlamaV2 reads before it loads anything."""
    return vision_doubt(source.path, source.config)


def stored_frequencies(source: SourceModel, spec: ModelSpec) -> str | None:
    """Old checkpoints hold the frequencies of RoPE: base and head size of config.json can be compared with them."""
    rope, config = spec.hyper.rope, legacy_config(source.config)
    name = next((n for n in source.names() if n.endswith("rotary_emb.inv_freq")), None)
    if rope is None or name is None or config_value(config, "rope_scaling") is not None:
        return None
    values = source.load(name).flatten() if len(source.shape(name)) == 1 else torch.empty(0)
    if values.dtype not in FLOAT_DTYPES or len(values) < 2 or not 0 < float(values[-1]) < float(values[0]):
        return None
    theta = float(config_value(config, "rope_theta") or DEFAULT_THETA)
    stored = float((values[0].double() / values[-1].double()) ** (len(values) / (len(values) - 1)))
    partial = float(config_value(config, "partial_rotary_factor") or 1.0)
    wrong = []
    if 2 * len(values) != round(spec.hyper.head_dim * partial):
        wrong.append(f"heads of {2 * len(values)} channels (config.json: {spec.hyper.head_dim})")
    elif abs(stored / theta - 1) > 0.2:  # stored in float16 or bfloat16, perhaps
        wrong.append(f"rope_theta {stored:.3g} (config.json: {theta:g})")
    return f"{name} was made for {wrong[0]}: config.json does not belong to these weights" if wrong else None


def empty_token_rows(source: SourceModel, spec: ModelSpec, rows: Mapping[str, Rows]) -> list[str]:
    """Tokens of the calibration text that the embedding or the head has nothing but zeros for."""
    ids = [r.ids[r.ids >= 0] for r in rows.values()]
    if not ids:
        return []
    counts = torch.bincount(torch.cat(ids))
    frequent = counts.topk(min(FREQUENT, int((counts > 0).sum()))).indices.sort().values
    names = [spec.modules[0].plain[0].stored.name]
    head = spec.linears[-1].weight
    names += [head.name] if head.transpose and not head.ranges and head.name not in names else []
    out = []
    for name in names:
        empty = _zero_rows(source, name, frequent.tolist()) if name in source else []
        if empty and len(empty) < len(frequent):  # all of them: a tensor of zeros, which has a warning of its own
            shown = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
            out.append(
                f"{name} holds nothing but zeros for {len(empty)} of the {len(frequent)} most frequent tokens of the "
                f"calibration text ({shown}): the tokenizer is of another model, or the checkpoint is damaged"
            )
    return out


def _zero_rows(source: SourceModel, name: str, wanted: Sequence[int]) -> list[int]:
    """Those of the rows ``wanted``, in order, that have nothing but zeros; rows that lie close together are read at once."""
    count = source.shape(name)[0]
    near = max(1, NEAR_BYTES * count // max(1, source.nbytes(name)))
    left, out = [t for t in wanted if t < count], []
    while left:
        first = left[0]
        together, left = [t for t in left if t < first + near], [t for t in left if t >= first + near]
        with contextlib.suppress(SourceError):
            values: Tensor = source.load(name, slice(first, together[-1] + 1))
            out += [t for t in together if not bool(values[t - first].any())]
    return out
