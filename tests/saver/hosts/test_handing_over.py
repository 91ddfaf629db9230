"""A rank's steps from a relay to the lead, as two pure machines: every order of what can happen, with sessions that end
at any moment and leads that forget all but their journal."""

from __future__ import annotations

import copy
from collections import deque

import pytest

from async_ckpt.core.protocol import Bye, Skipped, Staged
from async_ckpt_saver.hosts.incoming import Incoming
from async_ckpt_saver.hosts.link_words import Offer
from async_ckpt_saver.hosts.outgoing import Leave, Outgoing, Report, Transfer

PIECES = 2


def staged(step: int) -> Transfer:
    return Transfer(Staged(seq=step, slot=step % 2, step=step, copy_s=0.0))


def offer(item: Transfer) -> Offer:
    said = item.staged
    return Offer(identity=b"r", slot=said.slot, step=said.step, copy_s=0.0, stall_s=0.0, record=None)


class Link:
    """`heard` is the lead's journal: what it has taken whole, in order. Words keep their order; pieces go on a lane of
    their own, so they overtake words and each other."""

    def __init__(self) -> None:
        self.out = Outgoing(PIECES)
        for item in (staged(1), Report(Skipped(seq=8, slot=0, step=2, reason="busy")), staged(3), Leave()):
            self.out.add(item)
        self.incoming = Incoming(PIECES)
        self.words: list[object] = []
        self.pieces: list[tuple[int, int]] = []
        self.answers: list[tuple[str, int]] = []
        self.heard: list[str] = []
        self.resets = 3

    def key(self) -> object:
        incoming = self.incoming.offer.step if self.incoming.offer else None
        return (tuple(map(str, self.out._queue)), self.out._said, self.out._piece, incoming,
                bytes(self.incoming._arrived), tuple(map(str, self.words)), tuple(sorted(self.pieces)),
                tuple(self.answers), tuple(self.heard), self.resets)  # fmt: skip

    def actions(self) -> list[tuple[str, int]]:
        found = [("say", 0), ("piece", 0)]
        found += [("word", 0)] if self.words else []
        found += [("answer", 0)] if self.answers else []
        found += [("arrive", n) for n in range(len(self.pieces))]
        return found + ([("reset", 0), ("new lead", 0)] if self.resets else [])

    def act(self, action: str, number: int) -> None:
        if action == "say" and (item := self.out.say()) is not None:
            self.words.append(item)
        elif action == "piece" and (piece := self.out.next_piece()) is not None:
            self.pieces.append((piece[0].step, piece[1]))
        elif action == "word":
            self.hear(self.words.pop(0))
        elif action == "arrive":
            self.arrive(*self.pieces.pop(number))
        elif action == "answer":
            self.answer(*self.answers.pop(0))
        elif action in ("reset", "new lead"):
            self.resets -= 1
            self.words, self.pieces, self.answers = [], [], []
            self.out.reset()
            if action == "new lead":
                self.incoming = Incoming(PIECES)

    def hear(self, item: object) -> None:
        if isinstance(item, Transfer):
            if f"staged {item.staged.step}" in self.heard:
                self.answers.append(("held", item.staged.step))
            else:
                self.incoming.begin(offer(item))
                self.answers.append(("wanted", item.staged.step))
        elif isinstance(item, Report):
            self.note("skipped 2")
            self.answers.append(("ack", item.message.seq))
        else:
            self.note("left")
            self.answers.append(("unknown", 0))

    def arrive(self, step: int, number: int) -> None:
        if self.incoming.expects(step, number):
            self.incoming.took(number)
            if (complete := self.incoming.complete) is not None:
                self.incoming.end()
                self.note(f"staged {complete.step}")
                self.answers.append(("held", step))

    def note(self, what: str) -> None:
        if what not in self.heard:
            self.heard.append(what)

    def answer(self, kind: str, number: int) -> None:
        if kind == "wanted":
            self.out.wanted(number)
        elif kind == "held":
            self.out.over(number)
        elif kind == "ack":
            self.out.acknowledged(number)
        else:
            self.out.unknown()

    def settle(self) -> None:
        for _ in range(60):
            for action in ("say", "piece", *(["word"] if self.words else []), *(["answer"] if self.answers else [])):
                self.act(action, 0)
            if self.pieces:
                self.act("arrive", 0)
        assert self.out.empty, self.key()


ORDER = ["staged 1", "skipped 2", "staged 3", "left"]


def test_in_every_order_of_events_all_of_it_arrives_in_order() -> None:
    first = Link()
    seen = {first.key()}
    todo = deque([first])
    while todo:
        state = todo.popleft()
        assert state.heard == ORDER[: len(state.heard)]
        finished = copy.deepcopy(state)
        finished.settle()
        assert finished.heard == ORDER
        for action in state.actions():
            following = copy.deepcopy(state)
            following.act(*action)
            if following.key() not in seen:
                seen.add(following.key())
                todo.append(following)
    assert len(seen) > 100


def test_what_is_added_twice_is_said_once() -> None:
    out = Outgoing(1)
    bye = Report(Bye(seq=9))
    for _ in range(2):
        out.add(staged(1))
        out.add(bye)
        out.add(Leave())
    assert out.say() == staged(1)
    assert out.say() is None  # until it has been heard
    out.over(1)
    assert [out.say(), out.say()] == [bye, None]
    out.acknowledged(8)
    assert out.say() is None
    out.acknowledged(9)
    assert out.say() == Leave()
    out.unknown()
    assert out.empty


def test_a_step_with_an_outcome_is_not_handed_over() -> None:
    out = Outgoing(3)
    out.add(staged(1))
    out.add(staged(2))
    out.say()
    out.over(2)
    assert out.steps == [1]
    out.wanted(2)
    assert out.next_piece() is None
    out.wanted(1)
    assert out.next_piece() == (staged(1).staged, 0)
    out.over(1)
    assert out.empty
    assert out.next_piece() is None


@pytest.mark.parametrize("count", [0, 3])
def test_a_step_is_complete_with_its_last_piece(count: int) -> None:
    incoming = Incoming(count)
    assert incoming.complete is None
    assert not incoming.expects(1, 0)
    incoming.begin(offer(staged(1)))
    for number in range(count):
        assert incoming.complete is None
        assert not incoming.expects(2, number)
        assert not incoming.expects(1, count)
        assert not incoming.expects(1, -1)
        assert incoming.expects(1, number)
        incoming.took(number)
        assert not incoming.expects(1, number)
    assert incoming.complete == offer(staged(1))
    incoming.end()
    assert incoming.complete is None
