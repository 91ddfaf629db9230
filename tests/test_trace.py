"""The file of events: whole whenever nobody writes, whoever dies, and nothing that hangs or fails with it is felt."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest

from async_ckpt import trace as traces
from async_ckpt.core.clock import Clock, clock
from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.protocol import Settled, Span, Traced
from async_ckpt.trace import SAVER, Trace, trace_path
from async_ckpt.trace_file import MAX_TRACE_BYTES, TraceFile, TraceFull, read_events, read_header
from tests.trace_format import names, spans, valid_events

FIRST = {"name": "first", "args": {"job": "j", "clock": {"name": "c", "epoch_ns": 7}}}


def opened(path: Path, rank: int = 0, job: str = "job") -> Trace:
    trace = Trace(path, rank, job)
    trace.open()
    return trace


def a_save(trace: Trace, step: int, slot: int = 0) -> None:
    started_s = time.perf_counter()
    trace.began(step, slot)
    trace.copied(step, time.perf_counter(), time.perf_counter(), None)
    trace.called("save", step, started_s)
    trace.settled(Settled(step=step, slot=slot, outcome="committed", bytes=5))


# --- the file ------------------------------------------------------------------------------------------------------


def test_it_is_json_after_every_append_and_an_earlier_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "save.json"
    for life in range(3):
        file = TraceFile.create(path, FIRST | {"name": f"life {life}"})
        for number in range(3):
            file.append([{"number": number}])
            assert json.loads(path.read_text()) == [FIRST | {"name": f"life {life}"},
                                                    *({"number": each} for each in range(number + 1))]  # fmt: skip
        file.close()
    assert sorted(os.listdir(path.parent)) == ["save.json", "save.json.1"]
    assert read_events(path.with_name("save.json.1"))[0]["name"] == "life 1"
    assert read_header(path).clock == Clock("c", 7)


@pytest.mark.parametrize("torn", range(1, 24))
def test_what_a_kill_left_of_an_append_is_cut_off_by_the_next(tmp_path: Path, torn: int) -> None:
    """The kill leaves any number of bytes of the append in the place of the old end."""
    path = tmp_path / "save.json"
    file = TraceFile.create(path, FIRST)
    file.append([{"n": 1}])
    whole = path.read_bytes()
    file.append([{"n": 2}, {"n": 3}])
    later = path.read_bytes()
    path.write_bytes(later[: len(whole) - 2 + torn] if torn < 22 else later[:-2])
    survivors = [event["n"] for event in read_events(path)[1:]]
    assert survivors in ([1], [1, 2], [1, 2, 3])
    other = TraceFile(path)
    other.append([{"n": 4}])
    assert [event["n"] for event in json.loads(path.read_text())[1:]] == [*survivors, 4]
    file.close()
    other.close()


def test_many_appenders_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "save.json"
    TraceFile.create(path, FIRST).close()

    def append(writer: int) -> None:
        file = TraceFile(path)
        for number in range(50):
            file.append([{"writer": writer, "number": number}] * 2)
        file.close()

    threads = [threading.Thread(target=append, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = json.loads(path.read_text())[1:]
    assert len(found) == 400
    for writer in range(4):
        mine = [event["number"] for event in found if event["writer"] == writer]
        assert mine == [number for number in range(50) for _ in range(2)]


def test_a_full_disk_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "save.json"
    file = TraceFile.create(path, FIRST)
    file.append([{"n": 1}])
    before = path.read_bytes()
    pwrite = os.pwrite
    left = [9]

    def full(fd: int, data: bytes, offset: int) -> int:
        if left[0] == 0:
            left[0] = -1
            raise OSError(28, "No space left on device")
        if left[0] > 0:
            data, left[0] = data[: left[0]], 0
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        file.append([{"n": 2}])
    assert path.read_bytes() == before
    file.close()


def test_it_has_a_greatest_size(tmp_path: Path) -> None:
    path = tmp_path / "save.json"
    file = TraceFile.create(path, FIRST)
    os.truncate(path, MAX_TRACE_BYTES - 3)
    with path.open("r+b") as end:
        end.seek(-3, os.SEEK_END)
        end.write(b"\n]\n")
    with pytest.raises(TraceFull, match=str(MAX_TRACE_BYTES)):
        file.append([{"n": 1}])
    assert path.stat().st_size == MAX_TRACE_BYTES - 3
    file.close()


@pytest.mark.parametrize("content", [b"", b"[\n", b"[\n{}\n]\n", b"[\n7\n]\n", b"no json at all\n\n"])
def test_a_foreign_file_is_none_of_ours(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "save.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="no trace of async_ckpt"):
        read_header(tmp_path / "save.json")


# --- the recorder --------------------------------------------------------------------------------------------------


def test_a_save_has_its_spans_one_within_the_other(tmp_path: Path) -> None:
    trace = opened(tmp_path / "save.json")
    for step in range(4):
        a_save(trace, step, step % 2)
    trace.close()
    events = valid_events(tmp_path / "save.json")
    assert names(events) == {
        ("rank 0", "training", "save"): 4,
        **{("rank 0", f"slot {slot}", name): 2 for slot in (0, 1) for name in ("copy", "staged", "settled")},
        **{("rank 0", f"slot {step % 2}", f"checkpoint-{step}"): 1 for step in range(4)},
    }
    whole = spans(events, "rank 0", bytes=5)
    assert [event["args"]["outcome"] for event in whole] == ["committed"] * 4
    assert abs(whole[0]["ts"] / 1e6 - time.time()) < 60, "Unix time"


def test_an_outcome_that_comes_before_the_copy_ends_and_a_save_that_never_began(tmp_path: Path) -> None:
    trace = opened(tmp_path / "save.json")
    trace.began(1, 0)
    started_s = time.perf_counter()
    trace.settled(Settled(step=1, slot=0, outcome="failed", reason="rank 1: no"))
    trace.copied(1, started_s, time.perf_counter(), "no such tensor")
    trace.began(2, 0)
    trace.not_begun(2)
    trace.not_saved(2, "failed", "no")
    trace.settled(Settled(step=2, slot=0, outcome="failed", reason="rank 0: no"))
    trace.began(3, 0)
    trace.close()
    events = valid_events(tmp_path / "save.json")
    whole = [event for event in events if event["name"].startswith("checkpoint-")]
    assert [(event["name"], event["args"]["outcome"]) for event in whole] == [
        ("checkpoint-1", "failed"), ("checkpoint-2", "failed"), ("checkpoint-3", "unknown")]  # fmt: skip
    assert names(events)["rank 0", "slot 0", "staged"] == 0
    (copy,) = [event for event in events if event["name"] == "copy"]
    assert copy["args"]["error"] == "no such tensor"
    assert copy["ts"] + copy["dur"] <= whole[0]["ts"] + whole[0]["dur"]


def test_steps_of_the_saver_that_overlap_lie_on_tracks_of_their_own(tmp_path: Path) -> None:
    trace = opened(tmp_path / "save.json")
    now_ns = time.monotonic_ns()
    for step, (start, stop) in enumerate([(0, 50), (20, 70), (50, 60), (10, 15), (70, 90)]):
        steps = [Span("gather", now_ns + start * 1000, now_ns + stop * 1000)]
        trace.heard(Traced(step=step, outcome="committed", pid=9, clock=clock(), spans=steps))
    trace.heard(Traced(step=7, outcome="failed", pid=9, clock=clock(), spans=[]))
    trace.wait_heard(7)
    trace.close()
    events = valid_events(tmp_path / "save.json")
    found = {event["name"]: event["tid"] for event in events if event["name"].startswith("checkpoint-")}
    assert found == {"checkpoint-0": 1, "checkpoint-1": 2, "checkpoint-2": 1, "checkpoint-3": 3, "checkpoint-4": 1}
    assert {event["pid"] for event in events if event["name"] == "gather"} == {SAVER}


def test_a_saver_with_another_clock_is_moved_onto_ours(tmp_path: Path) -> None:
    """As in a time namespace of its own: its monotonic clock is an hour ahead, its wall clock is ours."""
    trace = opened(tmp_path / "save.json")
    mine, hour_ns = clock(), 3600 * 10**9
    other = Clock("another", mine.epoch_ns - hour_ns)
    now_ns = time.monotonic_ns()
    for step, (found, at_ns) in enumerate([(mine, now_ns), (other, now_ns + hour_ns)]):
        spans = [Span("gather", at_ns, at_ns + 1000)]
        trace.heard(Traced(step=step, outcome="committed", pid=9, clock=found, spans=spans))
    trace.close()
    first, second = [event for event in valid_events(tmp_path / "save.json") if event["name"] == "gather"]
    assert abs(first["ts"] - second["ts"]) < 5000, "half an hour off is a failure, a clock that is read twice is none"


def test_another_rank_adds_to_the_file_of_rank_0_by_its_clock(tmp_path: Path) -> None:
    path = tmp_path / "save.json"
    first = opened(path)
    header = read_header(path)
    moved = msgspec.structs.replace(header.clock, epoch_ns=header.clock.epoch_ns + 10**15)
    text = path.read_text().replace(str(header.clock.epoch_ns), str(moved.epoch_ns))
    path.write_text(text)
    second = opened(path, rank=1)
    a_save(second, 3)
    second.close()
    first.close()
    assert os.listdir(tmp_path) == ["save.json"]
    (save,) = [event for event in valid_events(path) if event["name"] == "save"]
    assert save["pid"] == 2
    assert abs(save["ts"] / 1e6 - time.time() - 10**6) < 60, "the offset of the file, not one looked at anew"


@pytest.mark.parametrize("why", ["no file", "another job", "another host"])
def test_a_rank_that_finds_no_file_of_its_job_and_host_makes_its_own(tmp_path: Path, why: str) -> None:
    path = tmp_path / "save.json"
    if why != "no file":
        first = opened(path, job="other" if why == "another job" else "job")
        first.close()
        boot = clock().name.split()[0]
        path.write_text(path.read_text().replace(boot, "another-boot") if why == "another host" else path.read_text())
    before = path.read_bytes() if path.exists() else None
    trace = opened(path, rank=3)
    a_save(trace, 1)
    trace.close()
    assert (path.read_bytes() if path.exists() else None) == before
    assert names(valid_events(tmp_path / "save.rank-3.json"))["rank 3", "training", "save"] == 1


def test_a_file_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "blocked").write_text("a file, no directory")
    with caplog.at_level(logging.WARNING):
        trace = opened(tmp_path / "blocked" / "save.json")
        a_save(trace, 1)
        trace.wait_heard(1)  # nobody waits for what will not come
        trace.close()
    assert "the trace of rank 0" in caplog.text
    assert "blocked" in caplog.text


def test_a_file_that_hangs_holds_up_nobody_and_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = opened(tmp_path / "save.json")
    hang, entered = threading.Event(), threading.Event()
    append = TraceFile.append

    def hanging(self: TraceFile, events: list[traces.Event]) -> None:
        entered.set()
        hang.wait()
        append(self, events)

    monkeypatch.setattr(TraceFile, "append", hanging)
    trace.called("save", 0, time.perf_counter())
    assert entered.wait(10)
    for step in range(traces._MAX_QUEUED + 500):
        trace.called("save", step, time.perf_counter())
    assert trace._queue.qsize() == traces._MAX_QUEUED
    hang.set()
    trace.close()
    found = names(valid_events(tmp_path / "save.json"))
    assert found["rank 0", "training", "save"] == traces._MAX_QUEUED + 1
    assert found["rank 0", "training", "500 events left out"] == 1


def test_where_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASYNC_CKPT_TRACE", raising=False)
    assert trace_path(None) is None
    monkeypatch.setenv("ASYNC_CKPT_TRACE", "/tmp/from-environment.json")
    assert trace_path(None) == Path("/tmp/from-environment.json")
    assert trace_path("given.json") == Path.cwd() / "given.json"
    assert trace_path("") is None
