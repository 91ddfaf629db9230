"""Ranks of several hosts make one checkpoint: real savers, each with its own /dev/shm, and a link."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from async_ckpt.core.protocol import Bye, Ping, Uploaded
from async_ckpt.core.slots import links_path
from tests.saver.hosts.two_hosts import FILE, Job, content, hosts, possible
from tests.saver.saver_process import until

pytestmark = pytest.mark.skipif(not possible(), reason="needs the right to make mount namespaces (root)")


@pytest.mark.parametrize("plain", [False, True])
def test_a_checkpoint_of_two_hosts_is_whole_and_nothing_is_left_after_the_goodbye(folder: Path, plain: bool) -> None:
    with hosts(folder, folder / "root") as (lead, relay):
        job = Job([lead, relay, relay], folder / "root/run", plain=plain).start()
        try:
            for step, slot in ((1, 0), (2, 1), (3, 0)):
                for rank in job.ranks:
                    rank.stage(step, slot)
                job.committed(step)
            for rank in job.ranks:
                rank.peer.say(Bye(seq=99))
            until(lambda: not lead.runs() and not relay.runs(), "no run in shared memory")
            noted = lead.seen_from_here(links_path(lead.endpoint))
            assert noted.stat().st_mode & 0o777 == 0o600  # with its keys
            for host in (lead, relay):
                host.saver.process.terminate()
                host.saver.process.wait(30)
                assert not host.seen_from_here("/dev/shm/async-ckpt-" + str(os.getuid())).exists()
        finally:
            job.close()


def test_ranks_of_both_hosts_hear_of_the_copy_in_the_second_tier(folder: Path) -> None:
    second = folder / "root/second"
    with hosts(folder, folder / "root") as (lead, relay):
        job = Job([lead, relay], folder / "root/run", upload_to=str(second)).start()
        try:
            for rank in job.ranks:
                rank.stage(1)
            job.committed(1)
            expected = Uploaded(step=1, outcome="uploaded", url=f"{second}/checkpoint-1")
            until((second / "checkpoint-1").exists, "the copy")
            for rank in job.ranks:
                for _ in range(2):  # what was said when it ended may have been passed over
                    rank.peer.say(Ping(unsettled=[], not_uploaded=[1]))
                    assert rank.peer.hear(Uploaded) == expected
            assert (second / "checkpoint-1" / FILE.path).read_bytes() == content(1)
            for rank in job.ranks:
                rank.peer.say(Bye(seq=99))
            until(lambda: not lead.runs() and not relay.runs(), "no run in shared memory")
        finally:
            job.close()
