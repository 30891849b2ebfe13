from dataclasses import dataclass, field

import pytest

from undo_stack import Command, History, Transpose, TypeLyric


@dataclass
class FakeScore:
    lyrics: dict = field(default_factory=dict)
    pitch: dict = field(default_factory=lambda: {1: 60, 2: 64, 3: 67})


class Clock:
    t = 0.0

    def __call__(self):
        return self.t


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def history(clock):
    return History(FakeScore(), clock=clock)


def type_word(history, note, word):
    for letter in word:
        history.execute(TypeLyric(note, letter))


def test_fast_typing_is_one_step(history):
    type_word(history, 1, "glo")
    assert history.doc.lyrics[1] == "glo"
    history.undo()
    assert history.doc.lyrics[1] == ""
    assert history.undo_label is None


def test_a_pause_starts_a_new_step(history, clock):
    type_word(history, 1, "glo")
    clock.t += 5
    type_word(history, 1, "ri")
    history.undo()
    assert history.doc.lyrics[1] == "glo"


def test_a_hyphen_ends_the_syllable(history):
    type_word(history, 1, "glo-ri-a")
    for expected in ("glo-ri-", "glo-", ""):
        history.undo()
        assert history.doc.lyrics[1] == expected


def test_redo_is_lost_after_a_new_edit(history):
    history.execute(Transpose([1], 2))
    history.undo()
    assert history.redo_label == "Redo transposing by +2"
    history.execute(Transpose([2], -1))
    assert history.redo_label is None
    assert not history.redo()
    assert history.doc.pitch == {1: 60, 2: 63, 3: 67}


class TestDirty:
    def test_clean_at_first(self, history):
        assert not history.dirty

    def test_undo_back_to_the_save_is_clean(self, history):
        history.execute(Transpose([1], 1))
        history.saved()
        history.execute(Transpose([1], 1))
        assert history.dirty
        history.undo()
        assert not history.dirty
        history.undo()
        assert history.dirty

    def test_branching_away_from_the_save(self, history):
        history.execute(Transpose([1], 1))
        history.execute(Transpose([1], 1))
        history.saved()
        history.undo()
        history.execute(Transpose([3], 7))
        # same length of the stack as when it was saved, and yet a different piece
        assert history.dirty

    def test_typing_does_not_merge_across_a_save(self, history):
        type_word(history, 1, "al")
        history.saved()
        type_word(history, 1, "le")
        history.undo()
        assert history.doc.lyrics[1] == "al"
        assert not history.dirty

    def test_forgotten_save(self):
        history = History(FakeScore(), limit=3)
        for _ in range(5):
            history.execute(Transpose([1], 1))
        while history.undo():
            assert history.dirty
        assert history.doc.pitch[1] == 62


class Broken(Command):
    def do(self, doc):
        raise ZeroDivisionError


def test_group_is_taken_back_on_error(history):
    with pytest.raises(ZeroDivisionError):
        with history.group("reharmonise"):
            history.execute(Transpose([1, 2, 3], 5))
            history.execute(TypeLyric(2, "x"))
            history.execute(Broken())
    assert history.doc.pitch == {1: 60, 2: 64, 3: 67}
    assert history.undo_label is None


def test_nested_groups_are_one_step(history):
    with history.group("outer"):
        history.execute(Transpose([1], 1))
        with history.group("inner"):
            history.execute(Transpose([2], 1))
    assert history.undo_label == "Undo outer"
    history.undo()
    history.redo()
    assert history.doc.pitch == {1: 61, 2: 65, 3: 67}


def test_empty_group_leaves_no_trace(history):
    with history.group("nothing"):
        pass
    assert not history.dirty


def test_listeners_hear_everything(history):
    heard = []
    history.listeners.append(lambda: heard.append(history.undo_label))
    history.execute(Transpose([1], 2))
    history.undo()
    history.redo()
    assert heard == ["Undo transposing by +2", None, "Undo transposing by +2"]
