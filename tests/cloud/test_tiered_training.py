"""Real ranks with two tiers: the machine is lost, and another number of ranks goes on from the store."""

from __future__ import annotations

import shutil
from pathlib import Path

from async_ckpt.core.location import Url
from async_ckpt.core.manifest import MANIFEST_NAME, committed, read_manifest
from async_ckpt.core.objects import Objects
from tests.cloud.weed import Weed
from tests.system.processes import Job, until

_HERE = "tests.cloud.test_tiered_training"
_STEPS = 3


def save(folder: str, url: str) -> None:
    """Under FSDP2, into this host's directory; the embedded saver uploads behind."""
    from tests.system.training import adamw, attach, step, wrapped

    model = wrapped("fsdp2")
    optimizer = adamw(model)
    local = Path(folder, "local")
    with attach(model, optimizer, tiers=[local, url], keep_last=2, timeout_s=60) as ckpt:
        assert ckpt.restore() is None
        for number in range(_STEPS):
            step(model, optimizer)
            handle = ckpt.save(number, metrics={"loss": 1 / (1 + number)})
            assert handle.wait() == local / f"checkpoint-{number}"
            assert handle.uploaded() == f"{url}/checkpoint-{number}"
        assert ckpt.stats()["uploaded"] == _STEPS
        here = ckpt.restore()
        assert here is not None
        assert (here.step, here.path) == (_STEPS - 1, local / f"checkpoint-{_STEPS - 1}")
        step(model, optimizer)
        late = ckpt.save(_STEPS)
        late.wait()
    assert late.state == "committed"  # its upload goes on


def go_on(folder: str, url: str) -> None:
    """Under FSDP1, on three ranks of a machine that has nothing."""
    import torch
    import torch.distributed as dist

    from tests.system.training import adamw, attach, step, trained, wrapped

    model = wrapped("fsdp1")
    optimizer = adamw(model)
    step(model, optimizer)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(1.0)
    local = Path(folder, "local")
    with attach(model, optimizer, tiers=[local, url], timeout_s=60) as ckpt:
        resumed = ckpt.restore()
        assert resumed is not None
        assert (resumed.step, resumed.source, resumed.path) == (_STEPS, "disk", f"{url}/checkpoint-{_STEPS}")
        assert ckpt.next_step == _STEPS + 1
        again = ckpt.save(_STEPS + 1)
        assert again.uploaded() == f"{url}/checkpoint-{_STEPS + 1}"
        older = ckpt.restore(_STEPS - 1)  # only the store has it
        assert older is not None
        assert older.path == f"{url}/checkpoint-{_STEPS - 1}"
    dist.barrier()


def test_a_lost_machine_goes_on_from_the_store_on_another_number_of_ranks(
    url: Url, objects: Objects, weed: Weed, folder: Path
) -> None:
    with Job(f"{_HERE}:save", 2, folder / "first", str(url), env=weed.environment()) as job:
        job.wait()
    local = folder / "first" / "local"
    assert [step for step, _ in committed(local)][-1] == _STEPS
    # The embedded saver goes on after its ranks have left.
    until(lambda: [step for step, _ in committed(str(url))][-1] == _STEPS, "the last step in the store")
    for step in (_STEPS - 1, _STEPS):
        files = read_manifest(local / f"checkpoint-{step}").files
        assert "adapter_model.safetensors" in files
        assert objects.walk((url / f"checkpoint-{step}").key).keys() == {*files, MANIFEST_NAME}
        for name in [*files, MANIFEST_NAME]:
            there = objects.read((url / f"checkpoint-{step}" / name).key)
            assert there == (local / f"checkpoint-{step}" / name).read_bytes(), name
    adapter = (local / f"checkpoint-{_STEPS}" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(local)
    with Job(f"{_HERE}:go_on", 3, folder / "second", str(url), env=weed.environment()) as job:
        job.wait()
    again = objects.read((url / f"checkpoint-{_STEPS + 1}" / "adapter_model.safetensors").key)
    assert again == adapter
