"""Who writes which bytes: each byte of a shared file is one host's, whatever the ranks own, and both ends cut alike."""

from __future__ import annotations

import itertools
import random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.pieces import MAX_PIECES, digest_of_pieces, stops_of
from async_ckpt.core.protocol import Options
from async_ckpt.core.retention_policy import Policy
from async_ckpt_saver.hosts.parts import PART_PIECE_BYTES, Plan, part_of, rest_of
from async_ckpt_saver.hosts.sessions import Session
from async_ckpt_saver.hosts.spans import Span
from async_ckpt_saver.hosts.who_writes import objection, too_many
from async_ckpt_saver.temporaries import is_temporary

MIB = 1 << 20


@st.composite
def shares(draw: st.DrawFn) -> tuple[list[int], dict[int, list[Span]]]:
    """Files whose first 10 bytes are a header, and ranks to which the stretches of the rest fall by chance."""
    random_ = random.Random(draw(st.integers()))
    sizes = [10 + random_.choice([0, 1, 7, 100, 20 * MIB]) for _ in range(random_.randint(1, 3))]
    owned: dict[int, list[Span]] = {rank: [] for rank in range(4)}
    for number, size in enumerate(sizes):
        cuts = sorted({10, size, *(random_.randint(10, size) for _ in range(random_.randint(0, 6)))})
        for start, stop in itertools.pairwise(cuts):
            owned[random_.randrange(4)].append(Span(number, start, stop))
    return sizes, owned


@given(shares())
def test_every_byte_of_a_shared_file_is_one_hosts(given_: tuple[list[int], dict[int, list[Span]]]) -> None:
    """Ranks 1 and 2 are on one other host, 3 on another, 0 is the lead's."""
    sizes, owned = given_
    hosts = {1: "b", 2: "b", 3: "c"}
    plan = Plan.of(sizes, {rank: owned[rank] for rank in hosts}, hosts)
    for host, ranks in (("b", (1, 2)), ("c", (3,))):
        assert plan.others.get(host, []) == part_of([owned[rank] for rank in ranks])  # as the relay has it
    assert plan.files == sorted({span.file for rank in hosts for span in owned[rank]})
    for number in plan.files:
        writers = [0] * sizes[number] if sizes[number] < MIB else None
        total = 0
        for pieces in (plan.own, *plan.others.values()):
            for piece in (each for each in pieces if each.file == number):
                assert piece.start // PART_PIECE_BYTES == (piece.stop - 1) // PART_PIECE_BYTES
                total += piece.stop - piece.start
                for at in range(piece.start, piece.stop) if writers is not None else ():
                    writers[at] += 1
        assert total == sizes[number]
        assert writers is None or set(writers) == {1}
    own, others = [1] * len(plan.own), {host: [2] * len(pieces) for host, pieces in plan.others.items()}
    for number, lines in plan.lines(own, others).items():
        assert stops_of(lines)[-1] == sizes[number]
    assert plan.count == sum(map(len, plan.lines(own, others).values()))
    rest = rest_of(sizes, [owned[rank] for rank in hosts], whole_files=True)
    assert sum(span.stop - span.start for span in rest) == sum(sizes) - sum(
        span.stop - span.start for rank in hosts for span in owned[rank]
    )


def test_neighbours_of_one_host_are_one_piece_up_to_8_mib() -> None:
    spans = [[Span(0, 5, 100)], [Span(0, 100, 9 * MIB)], [Span(0, 9 * MIB + 1, 9 * MIB + 2)]]
    assert part_of(spans) == [
        Span(0, 5, 8 * MIB), Span(0, 8 * MIB, 9 * MIB), Span(0, 9 * MIB + 1, 9 * MIB + 2)]  # fmt: skip


def test_hashes_of_a_part_too_few_or_too_many_are_no_checkpoint() -> None:
    plan = Plan.of([100], {1: [Span(0, 50, 100)]}, {1: "b"})
    assert plan.lines([7], {"b": [255]}) == {0: ["50 0000000000000007", "100 00000000000000ff"]}
    for own, other in (([], [1]), ([1, 2], [1]), ([1], []), ([1], [1, 2])):
        with pytest.raises(CheckpointError, match="pieces"):
            plan.lines(own, {"b": other})
    holed = Plan([100], [Span(0, 0, 49)], {"b": [Span(0, 50, 100)]})
    with pytest.raises(CheckpointError, match="do not make up"):
        holed.lines([1], {"b": [1]})


def test_the_hash_of_pieces_is_that_of_their_lines() -> None:
    lines = ["50 0000000000000007", "100 00000000000000ff"]
    text = b"50 0000000000000007\n100 00000000000000ff\n"
    assert digest_of_pieces(lines) == xxhash.xxh3_128_hexdigest(text)


@pytest.mark.parametrize(
    ("name", "step", "is_one"),
    [
        (".checkpoint-2.a1b2.tmp", 2, True),
        (".checkpoint-2.a1b2.tmp", 1, False),
        (".checkpoint-2.a1b2.trash", 2, False),
        (".checkpoint-2.a1b2.tmp/..", 2, False),
        ("../.checkpoint-2.a1b2.tmp", 2, False),
        ("checkpoint-2", 2, False),
        (".checkpoint-2..tmp", 2, False),
    ],
)
def test_a_relay_writes_into_hidden_directories_alone(name: str, step: int, is_one: bool) -> None:
    assert is_temporary(name, step) == is_one


def options(directory: str = "/runs/a", upload_to: str = "", replicas: int = 0) -> Options:
    return Options(directory, 4, 2, Policy(), 60.0, upload_to=upload_to, replicas=replicas)


def session(name: str, host: str, direct: bool = True) -> Session:
    return Session(bytes(16), host, name, 0.0, direct)


def test_all_hosts_write_or_none() -> None:
    b, c = session("b", "boot-b"), session("c", "boot-c")
    assert objection(options(), [b, b, c]) == ""
    assert "object store" in objection(options("s3://bucket/run"), [b])
    assert "tiers" in objection(options(upload_to="/second"), [b])
    assert "replicas=1" in objection(options(replicas=1), [b])
    assert "saver of c was not" in objection(options(), [b, session("c", "boot-c", direct=False)])
    assert "two savers" in objection(options(), [b, session("b", "boot-b")])


def test_parts_that_are_too_many_for_a_manifest_are_handed_over() -> None:
    """Columns of a matrix, each host with every second one: pieces of 8 bytes."""
    spans = [Span(0, start, start + 8) for start in range(0, 16 * (MAX_PIECES // 2 + 1), 16)]
    size = 16 * (MAX_PIECES // 2 + 1)
    assert "MAX_PIECES" in too_many([size], {1: spans}, {1: "b"})
    assert too_many([size], {1: spans[:1000]}, {1: "b"}) == ""
