"""A ``tokenizer.json`` as the tokenizers library reads it, with the tokens that other files of the model add to it.

Runs in the child of `exl2ray.calibration.limited`. The library numbers added tokens itself, whatever id a file states: one
after the other, after the vocabulary. A token gets a place here only where the id that it gets is the one that is stated;
anything else would show the model tokens that it has never seen there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SHOWN_TOKENS = 20  # of each kind in a report
Stated = tuple[int, str, dict[str, bool]]  # id, text, FLAGS
ADDED_LIST = re.compile(r'"added_tokens"\s*:\s*(?=\[)')


class LoadedTokenizer:
    """The tokenizer, and what became of the tokens that are to be added."""

    def __init__(
        self,
        text: str,  # content of tokenizer.json
        stated: Sequence[Stated],  # tokens with their ids, from files beside it
        named: Sequence[tuple[str, dict[str, bool]]],  # special tokens without a stated id
        rows: int,  # of the model's embedding
    ) -> None:
        self._text, self._rows = text, rows
        self.tokenizer = self._read()
        self.renumbered = _renumbered(text, self.tokenizer)
        self.base = self.tokenizer.get_vocab(with_added_tokens=False)
        self.disagreeing: list[tuple[str, int, int | None]] = []  # text, stated id, id that it has or would get
        self.without_row: list[str] = []
        self.added = self._add_stated(stated)
        self._add_named(named)

    def report(self) -> dict[str, Any]:
        """What the parent needs to know, as JSON can say it: `exl2ray.calibration.tokenizer` checks the vocabulary by it."""
        in_file = {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items()}
        plain = [(i, t) for t, i in self.base.items() if t not in in_file]
        everything = [*plain, *((i, t) for t, i in in_file.items())]
        surplus = sorted((i, t) for t, i in in_file.items() if i >= self._rows)
        return {
            "highest": max(everything, default=None),
            "base_highest": max(plain, default=None),
            "surplus": surplus[:SHOWN_TOKENS],
            "surplus_count": len(surplus),
            "renumbered": self.renumbered[:SHOWN_TOKENS],
            "added": [(t.content, i) for t, i in self.added],
            "disagreeing": self.disagreeing,
            "without_row": self.without_row[:SHOWN_TOKENS],
        }

    def _read(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self._text)
        # Some files store these; both would change the ids of long texts behind our back.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):  # of training: merges left out at random
            tokenizer.model.dropout = None
        return tokenizer

    def _rebuild(self, tokens: Iterable[AddedToken]) -> None:
        """The tokenizer with these tokens added: none can be taken out of one."""
        self.tokenizer = self._read()
        self.tokenizer.add_tokens(list(tokens))

    def _add_stated(self, stated: Sequence[Stated]) -> list[tuple[AddedToken, int]]:
        present = {t.content: i for i, t in self.tokenizer.get_added_tokens_decoder().items()}
        missing: dict[str, int] = {}
        flags: dict[str, dict[str, bool]] = {}
        for token_id, text, its_flags in sorted(stated, key=lambda entry: entry[0]):
            found = present.get(text, self.base.get(text))
            if found is not None and found != token_id:
                self.disagreeing.append((text, token_id, found))
            elif text and text not in present:
                if text in missing and missing[text] != token_id:
                    self.disagreeing.append((text, token_id, missing[text]))
                else:
                    missing.setdefault(text, token_id)
                    flags.setdefault(text, its_flags)
        wanted = [(AddedToken(t, **{k: flags[t][k] for k in FLAGS if k in flags[t]}), i) for t, i in missing.items()]
        while wanted:
            self.tokenizer.add_tokens([token for token, _ in wanted])
            got = [self.tokenizer.token_to_id(token.content) for token, _ in wanted]
            wrong = next((n for n, (_, i) in enumerate(wanted) if got[n] != i), None)
            if wrong is None:
                break
            # The first that does not agree would have got the next free id: of the others those agree that continue there.
            self.disagreeing.append((wanted[wrong][0].content, wanted[wrong][1], got[wrong]))
            kept, following = wanted[:wrong], got[wrong] or 0
            for token, i in wanted[wrong + 1 :]:
                if token.content in self.base:
                    kept.append((token, i))
                elif i == following:
                    kept.append((token, i))
                    following += 1
                else:
                    self.disagreeing.append((token.content, i, None))
            wanted = kept
            self.tokenizer = self._read()
        return wanted

    def _add_named(self, named: Sequence[tuple[str, dict[str, bool]]]) -> None:
        """Special tokens without a stated id follow all others, as transformers adds them, while there are embedding rows."""
        present = {t.content for t in self.tokenizer.get_added_tokens_decoder().values()}
        first: dict[str, dict[str, bool]] = {}
        for text, flags in named:
            if text not in present:
                first.setdefault(text, flags)
        tokens = [AddedToken(t, **{**{k: f[k] for k in FLAGS if k in f}, "special": True}) for t, f in first.items()]
        if not tokens:
            return
        self.tokenizer.add_tokens(tokens)
        ids = [self.tokenizer.token_to_id(t.content) for t in tokens]
        kept = [(t, i) for t, i in zip(tokens, ids, strict=True) if i is not None and i < self._rows]
        if len(kept) < len(tokens):
            without = {t.content for t in tokens} - {t.content for t, _ in kept}
            self.without_row = [t.content for t in tokens if t.content in without]
            self._rebuild([t for t, _ in [*self.added, *kept]])
        self.added = [*self.added, *kept]


def _renumbered(text: str, tokenizer: Tokenizer) -> list[tuple[str, int, int | None]]:
    """Added tokens of the file whose stated id is not the one that the library gives them."""
    for match in ADDED_LIST.finditer(text):
        try:
            entries, _ = json.JSONDecoder().raw_decode(text, match.end())
            pairs = [(e["content"], e["id"]) for e in entries]
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
        return [(t, i, tokenizer.token_to_id(t)) for t, i in pairs if tokenizer.token_to_id(t) != i]
    return []
