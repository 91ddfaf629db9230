"""Is a file what the viewers take? The rules are those of "Trace Event Format" (the JSON array format), as far as our
events use it, read strictly: what a viewer forgives is an error here."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]

_FIELDS = {
    "X": {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"},
    "i": {"name", "cat", "ph", "ts", "s", "pid", "tid", "args"},
    "M": {"name", "ph", "pid", "tid", "args"},
}
_METADATA = {"process_name": "name", "process_sort_index": "sort_index", "thread_name": "name",
             "thread_sort_index": "sort_index"}  # fmt: skip


def valid_events(path: Path) -> list[Event]:
    """The events of `path`. Raises AssertionError, or ValueError if it is not JSON."""
    events = json.loads(path.read_text(), object_pairs_hook=_no_key_twice)
    assert isinstance(events, list)
    for event in events:
        assert set(event) == _FIELDS[event["ph"]], event
        assert isinstance(event["name"], str), event
        assert isinstance(event["args"], dict), event
        assert all(type(event[field]) is int and event[field] >= 0 for field in ("pid", "tid")), event
        if event["ph"] == "M":
            assert set(event["args"]) == {_METADATA[event["name"]]}, event
            continue
        assert all(type(event[field]) is int and 0 <= event[field] < 2**53 for field in ("ts", "dur") if field in event)
        assert event.get("s", "t") in ("g", "p", "t"), event
    _named(events)
    _nested(events)
    return events


def names(events: list[Event]) -> Counter[tuple[str, str, str]]:
    """How often what is there: counts of spans and instants by (process, track, name), without the pids."""
    processes = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    tracks = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    return Counter(
        (processes[event["pid"]].partition(" (")[0], tracks[event["pid"], event["tid"]], event["name"])
        for event in events
        if event["ph"] in ("X", "i") and event["name"] != "trace begins"
    )


def spans(events: list[Event], process: str, **args: Any) -> list[Event]:
    """Those of one process ("saver", "rank 0") whose arguments are these, in order of time; what
    begins at once is in the order of the file."""
    pids = {event["pid"] for event in events if event["name"] == "process_name"
            and event["args"]["name"].partition(" (")[0] == process}  # fmt: skip
    found = [event for event in events if event["ph"] == "X" and event["pid"] in pids
             and args.items() <= event["args"].items()]  # fmt: skip
    return sorted(found, key=lambda event: int(event["ts"]))


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), pairs
    return dict(pairs)


def _named(events: list[Event]) -> None:
    """Each process and each track has one name, said before its first event."""
    processes: set[int] = set()
    tracks: set[tuple[int, int]] = set()
    for event in events:
        key = event["pid"], event["tid"]
        if event["name"] == "process_name":
            assert event["pid"] not in processes, event
            processes.add(event["pid"])
        elif event["name"] == "thread_name":
            assert key not in tracks, event
            tracks.add(key)
        elif event["ph"] != "M" and event["name"] != "trace begins":
            assert event["pid"] in processes, event
            assert key in tracks, event


def _nested(events: list[Event]) -> None:
    """Two spans of one track lie apart, or one within the other."""
    by_track = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            by_track[event["pid"], event["tid"]].append(event)
    for track in by_track.values():
        around: list[Event] = []
        for event in sorted(track, key=lambda event: (event["ts"], -event["dur"])):
            while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
                around.pop()
            if around:
                assert event["ts"] + event["dur"] <= around[-1]["ts"] + around[-1]["dur"], (around[-1], event)
            around.append(event)
