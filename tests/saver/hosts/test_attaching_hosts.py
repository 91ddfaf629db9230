"""Attaching on several hosts: who cannot take part is an error on every rank, and whatever is killed on the way, the
ranks that are left attach."""

from __future__ import annotations

import signal
from pathlib import Path

import msgspec
import pytest

from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.processes import process_of
from async_ckpt.core.protocol import (
    Granted,
    ImageFile,
    Layout,
    LayoutSent,
    LayoutWanted,
    Options,
    Ready,
    Refuse,
    Refused,
    Started,
)
from async_ckpt.core.retention_policy import Policy
from tests.saver.hosts.two_hosts import FILE, Job, Rank, hosts, possible, status_of
from tests.saver.hosts.wire import Wire
from tests.saver.saver_process import until

pytestmark = pytest.mark.skipif(not possible(), reason="needs the right to make mount namespaces (root)")


def attached(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.ready()
    for rank in ranks:
        rank.peer.hear(Started)


def test_a_relay_reserves_what_its_ranks_own_and_no_more(folder: Path) -> None:
    with hosts(folder, folder / "root") as made:
        job = Job(made, folder / "root/run").start()
        try:
            sizes = []
            for host in made:
                image = host.runs()[0] / "slot-0" / FILE.path
                assert image.stat().st_size == FILE.total_bytes
                sizes.append(image.stat().st_blocks * 512)
            assert sizes[0] >= FILE.total_bytes
            assert FILE.total_bytes // 2 - 8192 <= sizes[1] <= FILE.total_bytes // 2 + 4 * 4096
        finally:
            job.close()


@pytest.mark.parametrize("small", [0, 1], ids=["lead", "relay"])
def test_a_host_without_room_is_an_error_on_every_rank(folder: Path, small: int) -> None:
    with hosts(folder, folder / "root", small=small) as made:
        job = Job(made, folder / "root/run")
        try:
            for rank in job.ranks:
                reason = rank.peer.hear(Refused).reason
                assert "/dev/shm" in reason
                assert "bytes available" in reason
            until(lambda: not any(host.runs() for host in made), "nothing is left of the run")
        finally:
            job.close()


@pytest.mark.parametrize(
    ("victim", "when"),
    [("lead", "registered"), ("relay", "registered"), pytest.param("lead", "granted", marks=pytest.mark.full),
     pytest.param("relay", "granted", marks=pytest.mark.full)],
)  # fmt: skip
def test_a_saver_that_is_killed_while_ranks_attach(folder: Path, victim: str, when: str) -> None:
    """Those of a run that had not started hear that it is not known, and attach anew, as on one host."""
    with hosts(folder, folder / "root", lease_s=3.0) as made:
        near, far = (Rank(host, n, 2, folder / "root/run") for n, host in enumerate(made))
        killed = made[victim == "relay"]
        try:
            lead = near.lead()
            far.register(lead)
            if when == "granted":
                near.register()
                for rank in (near, far):
                    rank.peer.hear(Granted)
            else:
                until(lambda: "relay" in made[0].saver.said(), "the relay is connected")
            killed.kill()
            killed.start()
            if when == "granted":
                for rank in (near, far):
                    until(lambda rank=rank: unknown(rank), f"rank {rank.rank} hears that its run is not known")  # type: ignore[misc]
                made[0].kill()  # and all that it had heard of this attach
                made[0].start()
                lead = near.lead()
            elif victim == "relay":
                until(lambda: not far.peer.alive().known, "the rank hears of it")
            near.register(job="again" if when == "granted" else "job")
            if when == "granted" or victim == "relay":
                far.register(lead, job="again" if when == "granted" else "job")
            attached([near, far])
        finally:
            near.close()
            far.close()


def unknown(rank: Rank) -> bool:
    rank.peer.say(Ready())
    return not rank.peer.alive().known


def test_ranks_of_a_relay_that_is_killed_before_the_start_attach_through_the_next(folder: Path) -> None:
    """One after the other: its run is opened when both are there, and for both."""
    with hosts(folder, folder / "root", lease_s=3600.0) as made:
        near, *far = (Rank(made[n > 0], n, 3, folder / "root/run") for n in range(3))
        try:
            lead = near.lead()
            near.register()
            for rank in far:
                rank.register(lead)
            near.ready()
            for rank in far:
                rank.peer.hear(Granted)
            made[1].kill()
            made[1].start()
            for rank in far:
                until(lambda rank=rank: unknown(rank), "the rank hears that its run is not known")  # type: ignore[misc]
                rank.register(lead)
                until(lambda rank=rank: rank.peer.alive().known, "it is attaching again")  # type: ignore[misc]
            for rank in far:
                rank.ready()
            assert len({rank.granted.run for rank in far if rank.granted is not None}) == 1
            assert near.granted is not None
            for rank in (near, *far):
                rank.peer.hear(Started)
        finally:
            for rank in (near, *far):
                rank.close()


@pytest.mark.parametrize("when", ["before the next is there", "before it reaches the lead", "afterwards"])
def test_a_rank_that_dies_when_its_relay_was_killed_before_the_start_ends_it_for_all(folder: Path, when: str) -> None:
    """At once: by the lease the lead would wait for an hour."""
    with hosts(folder, folder / "root", lease_s=3600.0) as made:
        near, far = (Rank(host, n, 2, folder / "root/run") for n, host in enumerate(made))
        try:
            lead = near.lead()
            wire = Wire(lead.endpoint)
            far.register(msgspec.structs.replace(lead, endpoint=wire.endpoint))
            near.register()
            for rank in (near, far):
                rank.peer.hear(Granted)
            made[1].kill()
            if when == "before the next is there":
                far.kill()
            elif when == "before it reaches the lead":
                wire.cut()
            made[1].start()
            if when != "before the next is there":
                until(lambda: not far.peer.alive().known, "the next relay tells its rank to attach again")
                far.kill()
            if when == "before it reaches the lead":
                for _ in range(2):  # by then the relay has looked at its processes
                    far.peer.alive()
            wire.let_go()
            assert "rank 1 died while attaching" in near.peer.hear(Refused).reason
            until(lambda: not any(host.runs() for host in made), "nothing is left of the run")
        finally:
            near.close()
            far.close()
            wire.close()


def test_a_rank_that_dies_while_attaching_ends_it_for_the_other_host(folder: Path) -> None:
    with hosts(folder, folder / "root") as made:
        near, far = (Rank(host, n, 3, folder / "root/run") for n, host in enumerate(made))
        try:
            far.register(near.lead())
            near.register()
            until(lambda: [host.ranks for host in status_of(made[0])] == [1], "the lead knows of rank 1")
            far.kill()
            assert "rank 1 died while attaching" in near.peer.hear(Refused).reason
        finally:
            near.close()
            far.close()


def test_a_rank_that_dies_before_its_host_reaches_the_lead_ends_it_as_well(folder: Path) -> None:
    with hosts(folder, folder / "root") as made:
        near, far = (Rank(host, n, 3, folder / "root/run") for n, host in enumerate(made))
        try:
            lead = near.lead()
            made[0].saver.process.send_signal(signal.SIGSTOP)
            try:
                far.register(lead)
                until(lambda: far.peer.alive().known, "the relay knows of rank 1")
                far.kill()
                for _ in range(2):  # by then the relay has looked at its processes
                    far.peer.alive()
            finally:
                made[0].saver.process.send_signal(signal.SIGCONT)
            near.register()
            assert "rank 1 cannot take part: it died while attaching" in near.peer.hear(Refused).reason
        finally:
            near.close()
            far.close()


def test_a_rank_that_cannot_take_part_says_so_to_every_host(folder: Path) -> None:
    with hosts(folder, folder / "root") as made:
        near, far = (Rank(host, n, 2, folder / "root/run") for n, host in enumerate(made))
        try:
            lead = near.lead()
            near.register()
            options = Options(str(folder / "root/run"), 2, 2, Policy(), 60.0)
            far.peer.say(
                Refuse(options=options, job="job", rank=1, process=process_of(1), reason="no adapter", lead=lead)
            )
            for rank in (near, far):
                assert "no adapter" in rank.peer.hear(Refused).reason
        finally:
            near.close()
            far.close()


def test_another_model_on_another_host_is_named(folder: Path) -> None:
    with hosts(folder, folder / "root") as made:
        near, far = (Rank(host, n, 2, folder / "root/run") for n, host in enumerate(made))
        try:
            far.register(near.lead(), layout_hash="another")
            near.register()
            far.peer.hear(LayoutWanted)
            other = plan_file(FILE.path, [TensorSpec("c", "F32", (4,))])
            far.peer.say(LayoutSent(layout=Layout((ImageFile(other.path, other.header, other.total_bytes),), {})))
            for rank in (near, far):
                assert "rank 1 has no tensor" in rank.peer.hear(Refused).reason
        finally:
            near.close()
            far.close()
