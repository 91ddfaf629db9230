"""`attach(trace=...)`: what ranks and saver did on one time line, with exact counts, also after a kill of either."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.system.processes import Job, Scenario, run_together, the_saver, until
from tests.system.training import adamw, attach, reached, sleep_until_killed, step, wrapped
from tests.trace_format import Event, names, spans, valid_events

_HERE = "tests.system.test_timeline"
_FILES = ("adapter_model.safetensors", "training_state/training_state.safetensors", "README.md", "adapter_config.json",
          "training_state/training_state.json")  # fmt: skip
# In this order, within a checkpoint of the saver.
_WRITES = [f"{call} {file}" for file in _FILES for call in ("write", "fsync")]
_STEPS = ["gather", "queued", "commit", "prepare", *_WRITES,
          "manifest", "fsync directories", "rename", "fsync parent", "latest", "retention"]  # fmt: skip


def saves(folder: str, count: str, *pauses: str) -> None:
    """`count` saves, each waited for; before the last, and after it is staged, the test may want to do something."""
    model = wrapped("fsdp2")
    optimizer = adamw(model)
    trace = None if "ASYNC_CKPT_TRACE" in os.environ else Path(folder, "save.json")
    ckpt = attach(model, optimizer, directory=Path(folder, "run"), keep_last=2, timeout_s=60, trace=trace)
    resumed = ckpt.restore()
    first = resumed.step + 1 if resumed is not None else 1
    for number in range(first, first + int(count)):
        last = number == first + int(count) - 1
        if last and "before" in pauses:
            reached(folder, f"before-{ckpt.rank}")
            until(Path(folder, "go").exists, "the test's word")
        step(model, optimizer)
        handle = ckpt.save(number)
        if last and "staged" in pauses:
            handle.staged()
            reached(folder, f"staged-{ckpt.rank}")
            sleep_until_killed()
        handle.wait()
    step(model, optimizer)
    ckpt.close()


def of_the_saver(events: list[Event], number: int) -> list[str]:
    whole, *steps = spans(events, "saver", step=number)
    assert whole["name"] == f"checkpoint-{number}"
    return [event["name"] for event in steps]


def counts(folder: Path) -> None:
    with Job(f"{_HERE}:saves", 2, folder, "4") as job:
        job.wait()
    assert sorted(os.listdir(folder / "run")) == ["checkpoint-3", "checkpoint-4", "latest"]
    events = valid_events(folder / "save.json")
    expected: Counter[tuple[str, str, str]] = Counter()
    for rank in ("rank 0", "rank 1"):
        expected[rank, "training", "save"] = expected[rank, "training", "fence"] = 4
        for slot in ("slot 0", "slot 1"):
            expected |= Counter({(rank, slot, name): 2 for name in ("copy", "staged", "settled")})
        expected |= Counter({(rank, f"slot {(number + 1) % 2}", f"checkpoint-{number}"): 1 for number in (1, 2, 3, 4)})
    found = names(events)
    assert {key: count for key, count in found.items() if key[0] != "saver"} == expected
    assert found["saver", "lane 1", "commit"] + found["saver", "lane 2", "commit"] == 4
    for number in (1, 2, 3, 4):
        assert sorted(of_the_saver(events, number)) == sorted(_STEPS)
        assert [name for name in of_the_saver(events, number) if name not in ("gather", "queued")] == _STEPS[2:]
        on_one_line(events, number)


def on_one_line(events: list[Event], number: int) -> None:
    """One clock for all: no rank is told of a commit before it is made, and none is made before all have staged."""
    commit, rename = (
        next(event for event in spans(events, "saver", step=number) if event["name"] == name)
        for name in ("commit", "rename")
    )
    staged = [event["ts"] for event in events if event["name"] == "staged" and event["args"]["step"] == number]
    settled = [event["ts"] for event in events if event["name"] == "settled" and event["args"]["step"] == number]
    assert len(staged) == len(settled) == 2
    assert max(staged) <= commit["ts"] < rename["ts"] < min(settled)


def trainers_killed(folder: Path) -> None:
    """The file is whole without anyone's help; the next life keeps it and begins another."""
    file = folder / "save.json"

    def told() -> bool:
        return names(valid_events(file))["saver", "lane 1", "retention"] == 2

    with Job(f"{_HERE}:saves", 2, folder, "3", "before", "staged") as job:
        job.reach("before-0")
        job.reach("before-1")
        until(told, "the saver's last word on step 2")
        (folder / "go").touch()
        job.reach("staged-0")
        job.reach("staged-1")
        until(lambda: sum(event["name"] == "staged" for event in valid_events(file)) == 6, "six staged in the file")
        job.kill()
    events = valid_events(file)
    for number in (1, 2):
        assert of_the_saver(events, number) == _STEPS
    assert [event["name"] for event in spans(events, "rank 1", step=3)] == ["save", "copy"]
    until(lambda: (folder / "run/checkpoint-3/async_ckpt.json").exists(), "the commit of what was staged")
    with Job(f"{_HERE}:saves", 2, folder, "1") as job:
        job.wait()
    assert valid_events(folder / "save.json.1") == events
    assert [event["args"]["step"] for event in spans(valid_events(file), "saver") if event["name"] == "commit"] == [4]


def saver_killed(folder: Path) -> None:
    """The next saver knows from the journal that somebody keeps a trace. The variable says where."""
    file = folder / "deep" / "from-environment.json"
    with Job(f"{_HERE}:saves", 2, folder, "2", "before", env={"ASYNC_CKPT_TRACE": str(file)}) as job:
        job.reach("before-0")
        job.reach("before-1")
        os.kill(the_saver(folder), signal.SIGKILL)
        (folder / "go").touch()
        job.wait()
    events = valid_events(file)
    assert of_the_saver(events, 2) == _STEPS, job.printed()
    on_one_line(events, 2)


_SCENARIOS: dict[str, Scenario] = {each.__name__: each for each in (counts, trainers_killed, saver_killed)}
_results: dict[str, str] = {}


@pytest.mark.parametrize("scenario", _SCENARIOS)
def test_trace(scenario: str, selected: set[str], folder: Path) -> None:
    if not _results:
        chosen = {name: run for name, run in _SCENARIOS.items() if name in selected}
        _results.update(run_together(chosen, folder, 3))
    assert _results[scenario] == ""
