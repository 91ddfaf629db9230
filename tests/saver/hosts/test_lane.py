"""Every order of deliveries, beats and lost connections of a small lane: nothing is lost, doubled or out of order."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import pytest

from async_ckpt_saver.hosts.lane import Lane
from async_ckpt_saver.hosts.link_words import Beat, Held, Left, Missing, Said, decode_from_lead, decode_from_relay


class Line:
    """Two ends, and what is under way between them. `heard` is what each end has taken."""

    def __init__(self, words: int, breaks: int, window_bytes: int) -> None:
        self.words = words
        self.ends = (Lane(window_bytes), Lane(window_bytes))
        self.ways: tuple[deque[Any], deque[Any]] = (deque(), deque())
        self.heard: tuple[list[bytes], list[bytes]] = ([], [])
        self.left = [words, 1]  # words that each end still has to put
        self.breaks = breaks

    def key(self) -> object:
        return (
            *tuple(
                (
                    end.sent,
                    end.received,
                    end._complained,
                    end._told,
                    tuple(entry.seq for entry in end._waiting),
                    tuple(entry.seq for entry in end._unheard),
                    tuple(self.ways[number]),
                    tuple(self.heard[number]),
                    self.left[number],
                )
                for number, end in enumerate(self.ends)
            ),
            self.breaks,
        )

    def actions(self) -> list[tuple[str, int]]:
        found = [("deliver", number) for number in (0, 1) if self.ways[number]]
        found += [("put", number) for number in (0, 1) if self.left[number]]
        found += [
            ("beat", number) for number in (0, 1) if not any(isinstance(each, Beat) for each in self.ways[number])
        ]
        if self.breaks and any(self.ways):
            found.append(("break", 0))
        return found

    def act(self, action: str, number: int) -> None:
        if action == "put":
            self.left[number] -= 1
            identity = b"%d" % (self.left[number] + 1)
            word: Said = Left(identity=identity) if number == 0 else Held(identity=identity, step=1)
            self.ends[number].put(word)
            self.flush(number)
        elif action == "beat":
            self.ways[number].append(self.ends[number].beat())
        elif action == "break":
            self.breaks -= 1
            for way in self.ways:
                way.clear()
        else:
            self.deliver(number, self.ways[number].popleft())

    def flush(self, number: int) -> None:
        for entry in self.ends[number].take():
            decode = decode_from_relay if number == 0 else decode_from_lead
            self.ways[number].append(decode(entry.word))

    def deliver(self, number: int, word: Any) -> None:
        other = 1 - number
        end = self.ends[other]
        answer = None
        if isinstance(word, Beat):
            answer = end.hear_beat(word)
        elif isinstance(word, Missing):
            end.hear_missing(word)
        elif end.hear(word.seq):
            self.heard[other].append(word.identity)
        else:
            answer = end.complaint(word.seq)
        if answer is not None:
            self.ways[other].append(answer)
        self.flush(other)

    def check(self) -> None:
        expected = [b"%d" % number for number in range(self.words, 0, -1)]
        assert self.heard[1] == expected[: len(self.heard[1])]
        assert self.heard[0] in ([], [b"1"])

    def settle(self) -> None:
        """Without further losses, a few beats are enough."""
        for number in (0, 1):
            while self.left[number]:
                self.act("put", number)
        for _ in range(6):
            for number in (0, 1):
                self.act("beat", number)
            while any(self.ways):
                for number in (0, 1):
                    if self.ways[number]:
                        self.act("deliver", number)
        assert (len(self.heard[1]), len(self.heard[0])) == (self.words, 1)
        assert all(end.idle for end in self.ends)


@pytest.mark.parametrize(
    ("words", "breaks", "window_bytes", "every"),
    [(2, 1, 1, 40), (2, 1, 1 << 20, 40), *(pytest.param(3, 2, size, 1, marks=pytest.mark.full) for size in (1, 99))],
)
def test_whatever_is_lost_is_said_again(words: int, breaks: int, window_bytes: int, every: int) -> None:
    """`every`: how many of the states are brought to their end."""
    first = Line(words, breaks, window_bytes)
    seen = {first.key()}
    todo = deque([first])
    while todo:
        state = todo.popleft()
        state.check()
        if len(seen) % every == 0:
            copy.deepcopy(state).settle()
        for action in state.actions():
            following = copy.deepcopy(state)
            following.act(*action)
            if following.key() not in seen and sum(map(len, following.ways)) <= 4:
                seen.add(following.key())
                todo.append(following)
    assert len(seen) > 1000


def test_no_more_than_the_window_is_under_way() -> None:
    lane = Lane(window_bytes=100)
    for _ in range(3):
        lane.put(Left(identity=b"a"), bytes(60))
    sent = list(lane.take())
    assert [entry.seq for entry in sent] == [1, 2]  # the second found room left
    assert not lane.room
    lane.hear_beat(Beat(sent=0, received=1))
    assert [entry.seq for entry in lane.take()] == [3]
    lane.hear_beat(Beat(sent=0, received=3))
    assert lane.idle
    assert lane.room


def test_a_beat_that_claims_what_was_never_said_is_passed_over() -> None:
    lane = Lane()
    lane.put(Left(identity=b"a"))
    list(lane.take())
    lane.hear_beat(Beat(sent=0, received=7))
    lane.hear_missing(Missing(received=7))
    assert [entry.seq for entry in lane.take()] == [1]
