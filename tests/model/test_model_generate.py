"""Text token by token, with the keys and values of earlier tokens kept, against a forward pass over the whole text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest
import torch
from oracles import ORACLES, Oracle

from exl2ray.evaluate.forward import RunOptions, open_model, run_model
from exl2ray.evaluate.generate import Generator
from exl2ray.model.half import KeyValues

TOKENS = 24  # more than the windows of the random models that have one


@pytest.mark.parametrize("name", ORACLES)
def test_every_token_is_that_of_the_whole_text(oracle: Callable[[str], Oracle], name: str) -> None:
    model = open_model(oracle(name).path, RunOptions(dtype=torch.float32))
    prompt = torch.randint(3, model.vocab_size, (7,), generator=torch.Generator().manual_seed(5)).tolist()
    bos = [] if model.bos_id is None else [model.bos_id]
    made = list(islice(Generator(model, "cpu").greedy(bos + prompt), TOKENS))
    assert len(made) == TOKENS
    whole = run_model(model, torch.tensor([prompt + made]), "cpu")
    logits = whole.logits(slice(0, 1), slice(len(prompt) - 1, len(prompt) + TOKENS - 1))[0]
    best = logits.max(-1).values
    chosen = logits[torch.arange(TOKENS), torch.tensor(made)]
    assert float((best - chosen).max()) < 1e-4 * float(logits.abs().max()) + 1e-6


def test_keys_and_values_lie_where_there_is_room_for_more() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 2, 23, size, generator=generator) for size in (4, 6))
    past, places = KeyValues(room=8), set()
    for first, stop in ((0, 5), (5, 6), (6, 8), (8, 9), (9, 23)):
        found = past.extend(keys[:, :, first:stop], values[:, :, first:stop])
        assert past.length == stop
        assert torch.equal(found[0], keys[:, :, :stop])
        assert torch.equal(found[1], values[:, :, :stop])
        places.add(found[0].data_ptr())
    assert len(places) == 3, "moved twice: for the 9th token and for the 17th"
