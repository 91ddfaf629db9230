"""Where a job runs: how many hosts it spans, which addresses this one has, where its saver's files are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from async_ckpt.core.endpoints import embedded_home
from async_ckpt.core.errors import CheckpointError
from async_ckpt.hosts import several_hosts
from async_ckpt.interfaces import address_of_host, is_here, resolve
from async_ckpt.topology import Topology, discover

DIRECTORY = Path("/nowhere/run")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Topology]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_NUM_NODES",
             "ASYNC_CKPT_LEAD")  # fmt: skip

    def launch(**variables: str) -> Topology:
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return discover()

    return launch


def test_a_job_on_one_host_meets_nobody(launched: Callable[..., Topology]) -> None:
    alone = [{}, {"WORLD_SIZE": "1", "ASYNC_CKPT_LEAD": "tcp://10.0.0.1:1"}, {"WORLD_SIZE": "8"},
             {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_NODES": "2"},
             {"WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}]  # fmt: skip
    for variables in alone:
        assert several_hosts(launched(**variables), DIRECTORY, 1) is None


def test_a_job_on_several_hosts_needs_a_way_to_tell(launched: Callable[..., Topology]) -> None:
    spread = [{"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, {"WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
              {"WORLD_SIZE": "8", "SLURM_STEP_NUM_NODES": "2"},
              {"WORLD_SIZE": "8", "ASYNC_CKPT_LEAD": "tcp://10.0.0.1:1"}]  # fmt: skip
    for variables in spread:
        with pytest.raises(
            CheckpointError, match=r"8 ranks on several hosts, and nothing tells them .*init_process_group"
        ):
            several_hosts(launched(**variables), DIRECTORY, 1)


def test_each_host_has_a_home_of_its_own_for_the_saver_also_in_a_shared_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    homes = []
    for host in ("boot-1:29", "boot-1:30", "boot-2:29"):
        monkeypatch.setattr("async_ckpt.core.endpoints.shm_identity", lambda host=host: host)
        homes.append(embedded_home(DIRECTORY))
    assert len({*homes}) == 3
    assert len({home.parent for home in homes}) == 1


def test_an_address_is_one_that_others_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    routes = {"master": "127.0.0.1", "192.0.2.1": "10.1.2.3"}
    monkeypatch.setattr("async_ckpt.interfaces._source", routes.__getitem__)
    assert address_of_host({"MASTER_ADDR": "master"}) == "10.1.2.3"
    routes["master"] = "10.9.9.9"
    assert address_of_host({"MASTER_ADDR": "master"}) == "10.9.9.9"


def test_a_host_with_nothing_but_a_loopback_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_ckpt.interfaces._source", lambda target: "127.0.0.1")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("127.0.1.1", 0))])
    with pytest.raises(CheckpointError, match="ASYNC_CKPT_LEAD=tcp://IP:0"):
        address_of_host({"MASTER_ADDR": "localhost"})


def test_which_addresses_are_here() -> None:
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")
    assert resolve("127.0.0.1") == "127.0.0.1"
    assert resolve("localhost") in ("127.0.0.1", "::1")
    with pytest.raises(CheckpointError, match="no name that is known here"):
        resolve("no-such-host.invalid")
