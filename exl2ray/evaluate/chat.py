"""The same questions to several models, the source first, answered greedily and token by token beside one another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from exl2ray.calibration.text import Conversation
from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer
from exl2ray.errors import CalibrationError, SourceError, UsageError
from exl2ray.evaluate.forward import OpenModel, RunOptions, checked_device, open_model
from exl2ray.evaluate.generate import Generator
from exl2ray.formats.json_file import read_json_object

MOST_PROMPT_TOKENS = 1 << 15  # all of a prompt goes through the model at once
Messages = tuple[tuple[str, str], ...]  # (role, text)


@dataclass
class Answer:
    """What a model has said so far. ``seconds`` it took, the prompt included. ``finished``: "stop", "length" or "" so far."""

    model: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    finished: str = ""
    parts: int | None = None  # number of the first token that is not the first model's; None: none so far
    common: int = 0  # characters of ``text`` before that token

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model, "text": self.text, "tokens": len(self.tokens), "finished": self.finished,
            "seconds": self.seconds, "first_difference": self.parts,
        }  # fmt: skip


class Greedy(Protocol):
    def greedy(self, prompt: list[int]) -> Iterator[int]:
        """The most probable token after ``prompt``, then the one after that; as far as a cache reaches."""


Engine = Callable[[OpenModel, str, RunOptions], Greedy]  # (model, device, options)


class Speaker:
    """A model that answers. Raises what opening and reading it raises."""

    def __init__(
        self, directory: str, device: str, tokenizer: ModelTokenizer | None, options: RunOptions, engine: Engine
    ) -> None:
        self.name = directory
        self.model = open_model(directory, options)
        self.tokenizer = tokenizer or load_tokenizer(directory, self.model.source.config, self.model.vocab_size)
        self.stops = stop_ids(self.model, self.tokenizer)
        self._generator = engine(self.model, device, options)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Ids of a conversation that ends with a question; of the last text alone for a model without chat template."""
        templates = self.tokenizer.templates
        text = messages[-1][1] if templates is None else templates.render(Conversation("", messages), reply=True)
        ids: list[int] = self.tokenizer.encode(text).tolist()
        if len(ids) > MOST_PROMPT_TOKENS:
            raise UsageError(f"the prompt has {len(ids)} tokens; at most {MOST_PROMPT_TOKENS} are taken", "shorten it")
        bos = self.model.bos_id
        if bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        if not ids:
            raise CalibrationError("the prompt is empty", "ask something")
        outside = [i for i in ids if i >= self.model.vocab_size]
        if outside:
            raise SourceError(f"{self.name}: the prompt has token {outside[0]}, the model {self.model.vocab_size} tokens")
        return ids

    def answer(self, messages: Messages, most: int) -> Iterator[Answer]:
        """The answer as it grows, a token at a time; ``most`` tokens."""
        answer = Answer(self.name)
        start = time.monotonic()
        for token in islice(self._generator.greedy(self.prompt_ids(messages)), most):
            answer.seconds = time.monotonic() - start
            if token in self.stops:
                answer.finished = "stop"
                break
            answer.tokens.append(token)
            answer.text = self.tokenizer.decode(answer.tokens)
            yield answer
        answer.finished = answer.finished or "length"
        yield answer


def stop_ids(model: OpenModel, tokenizer: ModelTokenizer) -> frozenset[int]:
    """Tokens that end a turn, as config.json, generation_config.json and the tokenizer name them."""
    found: list[Any] = [tokenizer.eos_id]
    settings: list[Mapping[str, Any]] = [model.source.config]
    generation = model.path / "generation_config.json"
    if os.path.isfile(generation):
        hint = "fetch it again, or delete it: config.json has end tokens, too"
        settings.append(read_json_object(generation, hint=hint, odd=True))
    for one in settings:
        value = one.get("eos_token_id")
        found += value if isinstance(value, list) else [value]
    return frozenset(v for v in found if type(v) is int)


class Panel:
    """Several models under the same questions. The first, usually the source, is what the others are compared with."""

    def __init__(
        self, directories: Sequence[str], device: str, options: RunOptions | None = None, engine: Engine = Generator
    ) -> None:
        checked_device(device)
        self.speakers: list[Speaker] = []
        for directory in directories:
            # one tokenizer for all: the answers are compared token by token
            tokenizer = self.speakers[0].tokenizer if self.speakers else None
            self.speakers.append(Speaker(directory, device, tokenizer, options or RunOptions(), engine))
            first, last = self.speakers[0].model, self.speakers[-1].model
            if last.vocab_size != first.vocab_size:
                raise SourceError(
                    f"{last.path} has {last.vocab_size} tokens, {first.path} {first.vocab_size}",
                    "answers are compared token by token: name a source and what was made from it",
                )

    @property
    def templated(self) -> bool:
        """Whether questions go through a chat template."""
        return self.speakers[0].tokenizer.templates is not None

    def ask(self, conversations: Sequence[Messages], most: int) -> Iterator[list[Answer]]:
        """All answers after every token of all models; ``conversations``: one for each model."""
        running = [s.answer(c, most) for s, c in zip(self.speakers, conversations, strict=True)]
        answers = [Answer(s.name) for s in self.speakers]
        while True:
            moved = False
            for i, one in enumerate(running):
                grown = next(one, None)
                if grown is not None:
                    answers[i], moved = grown, True
            if not moved:
                return
            for answer in answers[1:]:
                self._compare(answers[0], answer)
            yield answers

    def _compare(self, first: Answer, other: Answer) -> None:
        """Notes where ``other`` leaves the first model's answer; a shorter answer that has ended differs at its end."""
        if other.parts is not None:
            return
        length = min(len(first.tokens), len(other.tokens))
        if first.tokens[:length] != other.tokens[:length]:
            other.parts = next(i for i in range(length) if first.tokens[i] != other.tokens[i])
        elif length < max(len(first.tokens), len(other.tokens)) and "stop" in (first.finished, other.finished):
            other.parts = length
        else:
            other.common = len(other.text)
            return
        other.common = len(self.speakers[0].tokenizer.decode(other.tokens[: other.parts]))
