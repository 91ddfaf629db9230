"""Do the parts that the ranks hold make up every tensor, and who copies what more than one rank holds? Pure.

Guarantee: if `assign_owners` returns, each element of each tensor is owned by exactly one claim; otherwise it raises
CheckpointError naming the first tensor that is not whole. A wrong file cannot follow from a granted run.

Thousands of ranks hold a thousand runs each, so what is done for every run is done inside C functions, a stretch of the
line at a time. The proof of a stretch: sort the starts, sort the ends. The runs tile it if and only if each start is
the end before it. (Each end is some run's, and lies behind that run's start. So the last start can only belong to the
last end, the one before it to the one before, and so on.)
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from async_ckpt.core.claims import Line
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.layout import FileLayout
from async_ckpt.core.protocol import Claims

from .boxes import Holders, check_boxes, gather_boxes
from .owners import Pattern, Shared, share_out

# They bound the memory that the proof takes: with few ranks to what lies free in a young process anyway; with many to
# 64 runs of each, since with fewer it would take longer to find where a stretch begins.
_FEW_RUNS, _RUNS_A_PATTERN, _MOST_RUNS = 1 << 11, 1 << 6, 1 << 18
_INT_BYTES = 8


class Ownership(msgspec.Struct, frozen=True):
    """For each rank the numbers of its claims that it owns, and of those that other ranks hold as well. Ranks may share
    a list."""

    owned: dict[int, list[int]]
    replicated: dict[int, list[int]]


def assign_owners(files: Sequence[FileLayout], claims: Mapping[int, Claims]) -> Ownership:
    """Who writes what.

    Raises CheckpointError if a claim does not fit its tensor, or if claims leave a gap or overlap without being equal.
    Replicas (equal claims) go to the rank with the fewest bytes so far, largest first (LPT).
    """
    line = Line.of(files)
    patterns = _patterns(claims)
    for pattern in patterns:
        _check_runs(line, pattern)
    boxes = gather_boxes(line, {rank: (len(each.starts) // _INT_BYTES, each.boxes) for rank, each in claims.items()})
    for number, holders in boxes.items():
        within = line.starts[number], line.starts[number + 1]
        if any(operator.ne(*pattern.between(*within)) for pattern in patterns):
            raise _not_whole(line, patterns, (number, number + 1), boxes)
        check_boxes(line, number, holders)
    shared: list[Shared] = []
    for stretch in _stretches(line, patterns):
        shared += _check_stretch(line, patterns, stretch, boxes)
    owned, replicated = share_out(line, patterns, shared, boxes)
    return Ownership(owned, replicated)


def _patterns(claims: Mapping[int, Claims]) -> list[Pattern]:
    """Replicas say the same: each kind of claims is looked at once."""
    ranks: dict[tuple[bytes, bytes], list[int]] = defaultdict(list)
    for rank, each in sorted(claims.items()):
        if len(each.starts) != len(each.lengths) or len(each.starts) % _INT_BYTES:
            raise CheckpointError(f"rank {rank} claims runs with {len(each.starts)} bytes of starts and "
                                  f"{len(each.lengths)} of lengths")  # fmt: skip
        ranks[each.starts, each.lengths].append(rank)
    return [
        Pattern(who, memoryview(starts).cast("q"), memoryview(lengths).cast("q"))
        for (starts, lengths), who in ranks.items()
    ]


def _check_runs(line: Line, pattern: Pattern) -> None:
    starts, lengths = pattern.starts, pattern.lengths
    if not starts:
        return
    ends = pattern.ends(0, len(starts))
    in_order = all(map(operator.le, ends, starts[1:]))
    if min(lengths) > 0 and in_order and starts[0] >= 0 and ends[-1] <= line.starts[-1]:
        return
    raise CheckpointError(f"rank {pattern.ranks[0]} claims runs that are empty, out of order, or beyond the last "
                          f"of the {line.starts[-1]} elements of all tensors")  # fmt: skip


def _stretches(line: Line, patterns: Sequence[Pattern]) -> Iterator[tuple[int, int]]:
    """Tensors [first, last), so few that their runs on all ranks fit into memory."""
    tensors = len(line.extents)
    runs = sum(len(pattern.starts) for pattern in patterns)
    at_once = min(max(_FEW_RUNS, len(patterns) * _RUNS_A_PATTERN), _MOST_RUNS)
    step = max(1, tensors * at_once // max(runs, 1))
    for first in range(0, tensors, step):
        yield first, min(first + step, tensors)


def _check_stretch(
    line: Line, patterns: Sequence[Pattern], stretch: tuple[int, int], boxes: Mapping[int, Holders]
) -> list[Shared]:
    """Raises CheckpointError unless every tensor of the stretch is whole. Returns what several patterns hold."""
    first, last = stretch
    begin, end = line.starts[first], line.starts[last]
    starts: list[int] = []
    ends: list[int] = []
    for number in boxes:
        if first <= number < last:
            starts.append(line.starts[number])
            ends.append(line.starts[number + 1])
    for pattern in patterns:
        low, high = pattern.between(begin, end)
        starts += pattern.starts[low:high].tolist()
        ends += pattern.ends(low, high)
    runs = len(starts)
    if _tiles(line, stretch, sorted(starts), sorted(ends)):
        return []
    counts = Counter(zip(starts, ends, strict=True))
    if len(counts) == runs or not _tiles(line, stretch, sorted(s for s, _ in counts), sorted(e for _, e in counts)):
        raise _not_whole(line, patterns, stretch, boxes)
    several = {run for run, count in counts.items() if count > 1}
    return _holders(patterns, (begin, end), several)


def _tiles(line: Line, stretch: tuple[int, int], starts: list[int], ends: list[int]) -> bool:
    first, last = stretch
    begin, end = line.starts[first], line.starts[last]
    if begin == end:
        return not starts
    if not starts or starts[0] != begin or ends[-1] != end or starts[1:] != ends[:-1]:
        return False
    # No run may reach from one tensor into the next: each tensor begins where some run does.
    begins = set(line.starts[first:last])
    begins.discard(end)  # that of empty tensors at the end
    return begins.issubset(starts)


def _holders(patterns: Sequence[Pattern], between: tuple[int, int], several: set[tuple[int, int]]) -> list[Shared]:
    holders: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    ordered = sorted(several)
    for which, pattern in enumerate(patterns):
        low, high = pattern.between(*between)
        for run in ordered:
            index = bisect.bisect_left(pattern.starts, run[0], low, high)
            if index < high and pattern.starts[index] == run[0] and run[0] + pattern.lengths[index] == run[1]:
                holders[run].append((which, index))
                low = index + 1
    return [Shared(start, end - start, who) for (start, end), who in holders.items()]


def _not_whole(
    line: Line, patterns: Sequence[Pattern], stretch: tuple[int, int], boxes: Mapping[int, Holders]
) -> CheckpointError:
    """Which tensor it is. Only now is each of them looked at by itself."""
    for number in range(*stretch):
        spec, begin, end = line.extents[number].spec, line.starts[number], line.starts[number + 1]
        runs: set[tuple[int, int]] = set()
        for pattern in patterns:
            low, high = pattern.between(begin, end)
            mine = list(zip(pattern.starts[low:high].tolist(), pattern.ends(low, high), strict=True))
            if mine and mine[-1][1] > end:
                return CheckpointError(f"rank {pattern.ranks[0]} claims elements of tensor {spec.name!r} beyond its "
                                       f"{spec.numel}")  # fmt: skip
            runs.update((start - begin, stop - begin) for start, stop in mine)
        ordered = sorted(runs)
        if ordered and number in boxes:
            return CheckpointError(f"tensor {spec.name!r} is sharded in two different ways on different ranks: by "
                                   f"elements or rows {ordered[:2]}, and {list(boxes[number])[:2]}")  # fmt: skip
        if number in boxes or not spec.numel:
            continue
        if not ordered:
            return CheckpointError(f"no rank holds tensor {spec.name!r} of shape {list(spec.shape)}: it would be "
                                   f"missing in the file")  # fmt: skip
        for one, next_one in itertools.pairwise(ordered):
            if one[1] > next_one[0]:
                return CheckpointError(f"tensor {spec.name!r}: two ranks hold parts that overlap but differ: elements "
                                       f"{one[0]}-{one[1]} and {next_one[0]}-{next_one[1]}")  # fmt: skip
        covered = sum(stop - start for start, stop in ordered)
        if covered != spec.numel:
            return CheckpointError(f"tensor {spec.name!r}: the ranks hold {covered} of its {spec.numel} elements; "
                                   f"the rest is on no rank that registered")  # fmt: skip
    return CheckpointError("the ranks' claims do not make up every tensor")
