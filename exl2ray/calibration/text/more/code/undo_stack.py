"""Undo and redo for the sheet music editor.

Commands are small objects with do() and undo(); consecutive ones may merge, so
that typing a word of lyrics is undone as a word and not letter by letter.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import Callable, Generic, Iterator, Optional, TypeVar

Doc = TypeVar("Doc")


class Command(Generic[Doc]):
    label = "Edit"

    def do(self, doc: Doc) -> None:
        raise NotImplementedError

    def undo(self, doc: Doc) -> None:
        raise NotImplementedError

    def merge(self, later: Command[Doc]) -> Optional[Command[Doc]]:
        """A command equal to this one followed by ``later``, or None if they do not belong together."""
        return None


class Group(Command[Doc]):
    def __init__(self, label: str) -> None:
        self.label = label
        self.parts: list[Command[Doc]] = []

    def do(self, doc: Doc) -> None:
        done = []
        try:
            for part in self.parts:
                part.do(doc)
                done.append(part)
        except Exception:
            for part in reversed(done):
                part.undo(doc)
            raise

    def undo(self, doc: Doc) -> None:
        for part in reversed(self.parts):
            part.undo(doc)


class History(Generic[Doc]):
    """The two stacks.

    ``limit`` bounds the number of commands kept.  When the oldest are dropped, the saved state may
    become unreachable; ``dirty`` then stays true until the next save, as it should.
    """

    def __init__(self, doc: Doc, limit: int = 500, merge_within: float = 1.0,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.doc = doc
        self.limit = limit
        self.merge_within = merge_within
        self._clock = clock
        self._past: list[Command[Doc]] = []
        self._future: list[Command[Doc]] = []
        self._saved: Optional[int] = 0      # length of _past at the last save
        self._last = float("-inf")
        self._group: Optional[Group[Doc]] = None
        self.listeners: list[Callable[[], None]] = []

    # -- state shown by the menus -----------------------------------------

    @property
    def dirty(self) -> bool:
        return self._saved != len(self._past)

    @property
    def undo_label(self) -> Optional[str]:
        return f"Undo {self._past[-1].label}" if self._past else None

    @property
    def redo_label(self) -> Optional[str]:
        return f"Redo {self._future[-1].label}" if self._future else None

    # -- actions -------------------------------------------------------------

    def execute(self, command: Command[Doc]) -> None:
        command.do(self.doc)
        if self._group is not None:
            self._group.parts.append(command)
            return
        self._remember(command)

    def _remember(self, command: Command[Doc]) -> None:
        now = self._clock()
        recent = now - self._last <= self.merge_within
        self._last = now
        if self._saved is not None and self._saved > len(self._past):
            self._saved = None              # the saved state was in the redo branch we now lose
        self._future.clear()

        if self._past and recent and self._saved != len(self._past):
            merged = self._past[-1].merge(command)
            if merged is not None:
                self._past[-1] = merged
                self._notify()
                return
        self._past.append(command)
        if len(self._past) > self.limit:
            del self._past[0]
            if self._saved is not None:
                self._saved = self._saved - 1 if self._saved else None
        self._notify()

    def undo(self) -> bool:
        if self._group is not None:
            raise RuntimeError("undo inside a group")
        if not self._past:
            return False
        command = self._past.pop()
        command.undo(self.doc)
        self._future.append(command)
        self._last = float("-inf")
        self._notify()
        return True

    def redo(self) -> bool:
        if not self._future:
            return False
        command = self._future.pop()
        command.do(self.doc)
        self._past.append(command)
        self._last = float("-inf")
        self._notify()
        return True

    def saved(self) -> None:
        self._saved = len(self._past)
        self._notify()

    @contextmanager
    def group(self, label: str) -> Iterator[None]:
        """Everything executed inside becomes one entry; an exception takes all of it back."""
        if self._group is not None:         # nested: the outer label wins
            yield
            return
        self._group = group = Group(label)
        try:
            yield
        except BaseException:
            self._group = None
            group.undo(self.doc)
            raise
        self._group = None
        if group.parts:
            self._remember(group)

    def _notify(self) -> None:
        for listener in self.listeners:
            listener()


class TypeLyric(Command["Score"]):
    label = "typing"

    def __init__(self, note_id: int, text: str) -> None:
        self.note_id, self.text = note_id, text

    def do(self, doc) -> None:
        doc.lyrics[self.note_id] = doc.lyrics.get(self.note_id, "") + self.text

    def undo(self, doc) -> None:
        doc.lyrics[self.note_id] = doc.lyrics[self.note_id][: -len(self.text)]

    def merge(self, later):
        if isinstance(later, TypeLyric) and later.note_id == self.note_id and not self.text.endswith("-"):
            return TypeLyric(self.note_id, self.text + later.text)
        return None


class Transpose(Command["Score"]):
    def __init__(self, note_ids, semitones: int) -> None:
        self.note_ids, self.semitones = tuple(note_ids), semitones
        self.label = f"transposing by {semitones:+d}"

    def do(self, doc) -> None:
        for n in self.note_ids:
            doc.pitch[n] += self.semitones

    def undo(self, doc) -> None:
        for n in self.note_ids:
            doc.pitch[n] -= self.semitones
