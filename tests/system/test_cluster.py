"""The hosts of the tests are hosts: nothing of one is seen on another but the files they share, and all of it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.system import hosts
from tests.system.hosts import SIDE, TRAINING, Cluster
from tests.system.processes import until

pytestmark = pytest.mark.skipif(bool(hosts.impossible()), reason=hosts.impossible() or "")

_LISTEN = "import socket, sys; s = socket.create_server((sys.argv[1], 7)); open(sys.argv[2], 'w'); s.accept()"
_REACH = "import socket, sys; socket.create_connection((sys.argv[1], 7), 0.5)"
_HOLD = "import os, sys; os.mkfifo('{0}/{1}'); open('{0}/{1}').read()"


def mounts(folder: Path) -> list[str]:
    """Those here at places where hosts mount something. Another test may mount elsewhere at the same time."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    places = ("/proc", "/dev/shm", "/etc/hosts")
    return [line for line in lines if (place := line.split()[1]) in places or place.startswith(str(folder))]


def reaches(cluster: Cluster, network: str) -> bool:
    """Whether a process on host 2 can connect to one on host 1."""
    first, second = cluster.hosts[:2]
    ready = cluster.folder / f"ready-{network}"
    ready.unlink(missing_ok=True)
    listening = first.popen([sys.executable, "-ISc", _LISTEN, first.address(network), str(ready)])
    until(ready.exists, "a listening process")
    try:
        second.run(sys.executable, "-ISc", _REACH, first.address(network))
    except subprocess.CalledProcessError:
        return False
    finally:
        for pid in first.pids():
            os.kill(pid, 9)
        listening.wait()
    return True


def test_hosts_share_files_alone_and_their_links_can_be_cut(folder: Path) -> None:
    before = mounts(folder)
    with Cluster(folder, 3) as cluster:
        first, second, _ = cluster.hosts
        assert [host.run("hostname").strip() for host in cluster.hosts] == ["host-1", "host-2", "host-3"]
        for place in ("/dev/shm", "$TMPDIR"):
            first.run("sh", "-c", f"touch {place}/here")
            assert "here" in first.run("sh", "-c", f"ls {place}")
            assert "here" not in second.run("sh", "-c", f"ls {place}")
        first.run("touch", str(folder / "shared"))
        assert (folder / "shared").exists()
        assert "shared" in second.run("ls", str(folder))
        assert second.run("getent", "hosts", "host-1").split()[0] == first.address()
        assert mounts(folder) == before
        assert (reaches(cluster, TRAINING), reaches(cluster, SIDE)) == (True, True)
        cluster.cut(second, SIDE)
        assert (reaches(cluster, TRAINING), reaches(cluster, SIDE)) == (True, False)
        cluster.heal(second, SIDE)
        assert (reaches(cluster, TRAINING), reaches(cluster, SIDE)) == (True, True)
        for number in range(2):
            second.popen([sys.executable, "-ISc", _HOLD.format(second.tmp, number)])
        until(lambda: len(second.pids()) >= 2, "two processes on host 2")
        assert set(second.pids()) <= set(hosts.left())
        second.lose()
        assert second.pids() == []
        assert first.alive
        first.popen([sys.executable, "-ISc", _HOLD.format(first.tmp, 9)])  # and one that the end has to find
    assert hosts.left() == []
    assert mounts(folder) == before


def fails(folder: Path) -> None:
    with Cluster(folder, 2) as cluster:
        cluster.hosts[1].popen(["sleep", "100"])
        until(cluster.hosts[1].pids, "a process on host 2")
        raise ZeroDivisionError


def test_a_block_that_fails_leaves_no_host(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fails(folder)
    assert hosts.left() == []
