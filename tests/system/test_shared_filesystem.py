"""Two hosts whose common directory is two mounts of one network filesystem: two `weed mount`s of one filer."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloud.weed import Weed
from tests.system.hosts import Cluster, impossible
from tests.system.processes import until
from tests.system.spread import HERE, check, noted

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(bool(impossible()), reason=impossible() or ""),
    pytest.mark.skipif(not os.access("/dev/fuse", os.W_OK), reason="needs FUSE"),
]


@contextlib.contextmanager
def mounted(weed: Weed, folder: Path) -> Iterator[Path]:
    folder.mkdir()
    command = weed.mount_command(folder)
    with (weed.folder / f"{folder.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=weed.folder)
    try:
        until(lambda: os.path.ismount(folder) or process.poll() is not None, f"{folder} is mounted")
        assert process.poll() is None, (weed.folder / f"{folder.name}.log").read_text()
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)
        process.terminate()
        process.wait(30)


def test_two_hosts_on_a_network_filesystem(folder: Path) -> None:
    """Commits by the lead are whole for the other host, which restores them by its own mount."""
    run = folder / "run"
    run.mkdir()
    with Weed(folder / "weed") as weed, contextlib.ExitStack() as stack:
        mounts = [stack.enter_context(mounted(weed, folder / name)) for name in ("m0", "m1")]
        shared = [mount / "shared" for mount in mounts]
        shared[0].mkdir()
        until(shared[1].is_dir, "the other mount shows it")
        with Cluster(folder, 2) as cluster:
            for host, mine in zip(cluster.hosts, shared, strict=True):
                host.run("mount", "--bind", str(mine), str(run))
            for target, number in (("saves", "1"), ("goes_on", "1")):
                with cluster.job(f"{HERE}:{target}", [1, 1], "fsdp2", number) as job:
                    job.wait()
        assert not any(run.iterdir()), "what was written lies on the network filesystem"
        subprocess.run(["mount", "--bind", str(shared[1]), str(run)], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", str(run)], check=True)
        check(folder, 1, 2)
    assert noted(folder, 2) == [["committed"]] * 2
