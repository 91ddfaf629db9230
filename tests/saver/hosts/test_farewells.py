"""Whoever is gone is said to be, until the lead has heard it, and nobody else."""

from __future__ import annotations

from async_ckpt_saver.hosts.farewells import Farewells

LEASE_S = 30.0
A, B = b"a", b"b"


class Said:
    """A link that is up or down: what is said while it is down is lost."""

    def __init__(self) -> None:
        self.up = True
        self.heard: list[bytes] = []
        self.farewells = Farewells(lambda left: self.heard.append(left.identity) if self.up else None)

    def session(self) -> None:
        self.up = True
        self.farewells.session_began()


def test_what_was_said_while_the_link_was_down_is_said_again_in_each_session_until_it_is_answered() -> None:
    said = Said()
    said.up = False
    said.farewells.gone(A)
    assert said.heard == []
    for count in (1, 2):
        said.session()
        assert said.heard == [A] * count
    said.farewells.answered(A)
    said.session()
    assert (said.heard, bool(said.farewells)) == ([A, A], False)


def test_who_attaches_again_is_not_gone() -> None:
    said = Said()
    said.farewells.expect([A, B], 0.0)
    said.farewells.back(A)
    assert A not in said.farewells
    said.farewells.gone(B)
    said.farewells.back(B)
    said.session()
    assert (said.heard, bool(said.farewells)) == ([B], False)


def test_who_does_not_come_back_within_a_lease_is_taken_for_gone() -> None:
    said = Said()
    said.farewells.expect([A], 100.0)
    said.farewells.tick(100.0 + LEASE_S, 0.0, LEASE_S)
    assert said.heard == []
    said.farewells.tick(100.5 + LEASE_S, 0.0, LEASE_S)
    assert said.heard == [A]


def test_a_lead_that_is_silent_for_a_lease_is_not_waited_for() -> None:
    said = Said()
    said.up = False
    said.farewells.gone(A)
    said.farewells.tick(1.0, LEASE_S, LEASE_S)
    assert said.farewells
    said.farewells.tick(2.0, LEASE_S + 1, LEASE_S)
    assert not said.farewells
