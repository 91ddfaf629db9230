"""Real messages in any order, and junk, to a Hub with real slots and storage: promises hold, and it never raises."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from async_ckpt.core.claims import pack_claims
from async_ckpt.core.manifest import committed, read_manifest
from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import (
    Ack,
    Bye,
    Claim,
    Failed,
    Granted,
    LayoutSent,
    Ping,
    Pong,
    Ready,
    Refuse,
    Rejected,
    SaveRecord,
    Settled,
    Skipped,
    Staged,
    encode,
)
from async_ckpt.core.region import Region
from async_ckpt.core.slots import Phase, SlotPaths, StateFile, read_journals
from tests.fuzz.messages import FuzzedSaver
from tests.saver.saver_process import FILE, LAYOUT, register

WORLD = 2
RANKS = st.integers(0, WORLD - 1)
SLOTS = st.integers(0, 2)  # one more than there are
STEPS = st.integers(0, 5)


class Conversations(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ackpt-"))
        self.saver = FuzzedSaver(self.root)
        self.job = 0
        self.runs: set[str] = set()
        self.staged: set[tuple[str, int, int]] = set()  # run, rank, step: as the journal was told
        self.sequence = 0

    def say(self, rank: int, message: object) -> None:
        self.saver.receive(b"%d-%d" % (self.job, rank), encode(message))  # type: ignore[arg-type]
        self.saver.settle()
        self.runs |= {answer.run for answer in self.saver.answers if isinstance(answer, Granted)}

    def seq(self) -> int:
        self.sequence += 1
        return self.sequence

    @rule(rank=RANKS, world=st.sampled_from([WORLD, WORLD, WORLD, 1, 3]), hash=st.sampled_from("hhhx"))
    def registers(self, rank: int, world: int, hash: str) -> None:  # noqa: A002
        message = register(self.root / "run", job=str(self.job))
        self.say(rank, msgspec.structs.replace(
            message, rank=rank, options=msgspec.structs.replace(message.options, world=world), layout_hash=hash,
            layout=LAYOUT if rank == 0 else None,
            claims=pack_claims([FILE], [Claim(0, 0, Region(False, (rank * 4,), (4,)))])[0],
        ))  # fmt: skip

    @rule()
    def all_come_to_start(self) -> None:
        for rank in range(WORLD):
            self.registers(rank, WORLD, "h")
        for rank in range(WORLD):
            self.say(rank, Ready())

    @rule()
    def a_new_job_comes(self) -> None:
        self.job += 1

    @rule(rank=RANKS)
    def is_ready(self, rank: int) -> None:
        self.say(rank, Ready())

    @rule(rank=RANKS, slot=st.integers(0, 1), step=STEPS, honest=st.booleans(), told=st.booleans())
    def stages(self, rank: int, slot: int, step: int, honest: bool, told: bool) -> None:
        """`honest`: its cell says so too. Not `told`: its message is lost."""
        run = next((run for run in sorted(self.runs) if Path(run).exists()), None)
        if honest and run is not None:
            paths = SlotPaths(Path(run), slot)
            if not paths.state.exists():
                return
            state = StateFile(paths.state)
            if state.cell(rank).step < step:  # ranks go on, they do not go back
                paths.write_record(rank, SaveRecord(step, {}, None, {}))
                state.mark(rank, Phase.STAGED, step)
                self.staged.add((Path(run).name, rank, step))
            state.close()
        if told:
            self.say(rank, Staged(seq=self.seq(), slot=slot, step=step, copy_s=0.0))

    @rule(rank=RANKS, slot=st.integers(0, 1), step=STEPS)
    def says_twice_what_it_has_staged(self, rank: int, slot: int, step: int) -> None:
        """Then it is answered, whatever is known of the step, so that no rank repeats itself for ever."""
        answers, word = self.saver.answers, Staged(seq=self.seq(), slot=slot, step=step, copy_s=0.0)
        before = len(answers)
        self.say(rank, word)
        self.say(rank, word)
        acknowledged = Ack(seq=word.seq) in answers[before:]
        assert acknowledged or any(isinstance(each, Settled | Rejected | Pong) for each in answers[before:])

    @rule(rank=RANKS, slot=SLOTS, step=STEPS, kind=st.sampled_from([Skipped, Failed]))
    def does_not_stage(self, rank: int, slot: int, step: int, kind: type[Skipped | Failed]) -> None:
        self.say(rank, kind(seq=self.seq(), slot=slot, step=step, reason="busy"))

    @rule(rank=RANKS)
    def leaves(self, rank: int) -> None:
        self.say(rank, Bye(seq=self.seq()))

    @rule(rank=RANKS)
    def dies(self, rank: int) -> None:
        self.saver.hub._process_gone(b"%d-%d" % (self.job, rank))
        self.saver.settle()

    @rule(rank=RANKS)
    def refuses(self, rank: int) -> None:
        options = register(self.root / "run").options
        process = process_of(os.getpid())
        self.say(rank, Refuse(options=options, job=str(self.job), rank=rank, process=process, reason="no adapter"))

    @rule(rank=RANKS, steps=st.lists(STEPS, max_size=3))
    def pings(self, rank: int, steps: list[int]) -> None:
        before = len(self.saver.answers)
        self.say(rank, Ping(unsettled=steps))
        assert any(isinstance(answer, Pong) for answer in self.saver.answers[before:])

    @rule(rank=RANKS)
    def sends_a_layout(self, rank: int) -> None:
        self.say(rank, LayoutSent(layout=LAYOUT))

    @rule(rank=RANKS, junk=st.binary(max_size=60))
    def says_junk(self, rank: int, junk: bytes) -> None:
        before = self.saver.services.rejections.counts["unreadable"]
        self.saver.receive(b"%d-%d" % (self.job, rank), junk)
        assert self.saver.services.rejections.counts["unreadable"] == before + 1

    @rule()
    def the_saver_is_replaced(self) -> None:
        """By one that has nothing but what lies in shared memory and on disk."""
        endpoint, answers = self.saver.endpoint, self.saver.answers
        self.saver.loop.run_until_complete(self.saver.hub.drain())
        self.saver.loop.close()
        self.saver = FuzzedSaver(self.root)
        self.saver.endpoint = self.saver.services.endpoint = endpoint
        self.saver.answers = answers
        self.saver.hub.adopt()
        self.saver.settle()

    @invariant()
    def only_what_every_rank_staged_is_committed(self) -> None:
        for step, path in committed(self.root / "run"):
            run = read_manifest(path).run
            assert {(run, rank, step) for rank in range(WORLD)} <= self.staged

    @invariant()
    def what_is_said_to_be_committed_is_on_disk(self) -> None:
        said = {answer.path for answer in self.saver.answers if isinstance(answer, Settled) and answer.path}
        assert all(Path(path, "async_ckpt.json").exists() for path in said)

    @invariant()
    def nothing_lies_beside_the_checkpoints(self) -> None:
        assert {path.name for path in self.root.iterdir()} <= {"run"}
        if (self.root / "run").exists():
            names = {path.name for path in (self.root / "run").iterdir()}
            assert all(name == "latest" or name.startswith("checkpoint-") for name in names), names

    def teardown(self) -> None:
        self.saver.close()
        assert list(read_journals(self.saver.endpoint)) == []
        shutil.rmtree(self.root)


Conversations.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestConversations = Conversations.TestCase
