"""Real ranks that train, save into a real S3 server, and go on from it with another number of ranks."""

from __future__ import annotations

from pathlib import Path

from async_ckpt.core.location import Url
from async_ckpt.core.manifest import MANIFEST_NAME, committed, read_manifest
from async_ckpt.core.objects import Objects
from tests.cloud.weed import Weed
from tests.system.processes import Job

_HERE = "tests.cloud.test_training"
_STEPS = 4


def save(folder: str, url: str) -> None:
    """Under FSDP2: the same weights into the store and into a directory."""
    from tests.system.training import adamw, attach, step, wrapped

    model = wrapped("fsdp2")
    optimizer = adamw(model)
    with attach(model, optimizer, directory=url, keep_last=2, timeout_s=60) as ckpt:
        assert ckpt.restore() is None
        for number in range(_STEPS):
            step(model, optimizer)
            path = ckpt.save(number, metrics={"loss": 1 / (1 + number)}, extra={"epoch": 1}).wait()
            assert path == f"{url}/checkpoint-{number}"
    with attach(model, optimizer, directory=Path(folder, "local"), timeout_s=60) as ckpt:
        ckpt.save(_STEPS - 1).wait()


def go_on(folder: str, url: str) -> None:
    """Under FSDP1, on three ranks: what is restored is saved again."""
    import torch
    import torch.distributed as dist

    import async_ckpt
    from tests.system.training import adamw, attach, full_values, refusal, step, trained, wrapped

    model = wrapped("fsdp1")
    optimizer = adamw(model)
    step(model, optimizer)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(1.0)
    assert str(async_ckpt.latest(url)) == f"{url}/checkpoint-{_STEPS - 1}"
    with attach(model, optimizer, directory=url, timeout_s=60) as ckpt:
        assert "there is no checkpoint at" in refusal(lambda: ckpt.restore(0))
        resumed = ckpt.restore()
        assert resumed is not None
        assert (resumed.step, resumed.source, resumed.path) == (_STEPS - 1, "disk", f"{url}/checkpoint-{_STEPS - 1}")
        assert (resumed.metrics, resumed.extra) == ({"loss": 1 / _STEPS}, {"epoch": 1})
        restored = full_values(model)
        older = ckpt.restore(_STEPS - 2)
        assert older is not None
        assert older.step == _STEPS - 2
        assert any(not torch.equal(value, restored[name]) for name, value in full_values(model).items())
        by_url = ckpt.restore(f"{url}/checkpoint-{_STEPS - 1}")
        assert by_url is not None
        ckpt.save(_STEPS).wait()
    dist.barrier()


def test_training_goes_on_from_the_store_on_another_number_of_ranks(
    url: Url, objects: Objects, weed: Weed, folder: Path
) -> None:
    with Job(f"{_HERE}:save", 2, folder / "first", str(url), env=weed.environment()) as job:
        job.wait()
    assert [step for step, _ in committed(str(url))] == [_STEPS - 2, _STEPS - 1]
    local = folder / "first" / "local" / f"checkpoint-{_STEPS - 1}"
    files = read_manifest(local).files
    assert "adapter_model.safetensors" in files
    assert objects.walk((url / local.name).key).keys() == {*files, MANIFEST_NAME}
    for name in files:
        assert objects.read((url / local.name / name).key) == (local / name).read_bytes(), name
    with Job(f"{_HERE}:go_on", 3, folder / "second", str(url), env=weed.environment()) as job:
        job.wait()
    again = objects.read((url / f"checkpoint-{_STEPS}" / "adapter_model.safetensors").key)
    assert again == (local / "adapter_model.safetensors").read_bytes()
