"""Training that was stopped and restored goes on as if it had not stopped; the oracle is the uninterrupted run."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.sharding import test_dtensor
from tests.system.processes import run_cases
from tests.system.training import adamw, attach, full_values, rank, refusal, step, trained, wrapped
from tests.tiny_llama import forward, no_collectives, peft_model

STATE = "training_state/training_state.safetensors"


class Batches:
    """A loader that knows where it is, as StatefulDataLoader does; each rank has its own place."""

    def __init__(self) -> None:
        self.position = rank()

    def next(self) -> float:
        self.position += dist.get_world_size()
        return self.position / 10

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "rng": torch.arange(3) + rank(), "shape": (1, rank())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state["rng"], torch.arange(3) + rank())
        assert state["shape"] == (1, rank())
        self.position = state["position"]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw-fused": functools.partial(adamw, fused=True),
    "adamw-loop": functools.partial(adamw, foreach=False),
    "adamw-amsgrad": functools.partial(adamw, amsgrad=True),
    "sgd": lambda model: torch.optim.SGD(trained(model), lr=0.05, momentum=0.9),
    "adagrad": lambda model: torch.optim.Adagrad(trained(model), lr=0.05),
}


def adafactor(model: Any) -> torch.optim.Optimizer:
    """Rows and columns of the second moment; under FSDP1, whose parameters are flat, a whole one."""
    return torch.optim.Adafactor(trained(model), lr=0.05)


class Training:
    """Everything of a run: model, optimizer, scheduler, loader, and noise from every generator in the loss."""

    def __init__(self, kind: str, make: Callable[[Any], torch.optim.Optimizer], model: Any = None) -> None:
        self.model = wrapped(kind) if model is None else model
        self.optimizer = make(self.model)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, total_steps=30, cycle_momentum=False)
        self.batches = Batches()

    def attach(self, folder: Path) -> Any:
        return attach(
            self.model,
            self.optimizer,
            self.scheduler,
            directory=folder,
            stateful={"batches": self.batches},
            timeout_s=60,
        )

    def losses(self, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            noise = 1 + random.random() + np.random.rand() + torch.rand(()).item() + self.batches.next()
            loss = forward(self.model) * noise
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            found.append(loss.item())
        return found


def goes_on_bit_by_bit(folder: Path, kind: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(rank())
    run = Training(kind, make)
    with run.attach(folder) as ckpt:
        run.losses(3)
        with no_collectives():
            handle = ckpt.save(3)
        expected = run.losses(4)
        handle.wait()
    assert len(set(expected)) == 4
    again = Training(kind, make)
    with no_collectives():
        ckpt = again.attach(folder)
        restored = ckpt.restore()
    assert restored is not None
    assert restored.step == 3
    assert again.losses(4) == expected
    with no_collectives():
        ckpt.close()


def starts_where_nothing_had_begun(folder: Path) -> None:
    """A checkpoint from before the first step: nothing of an optimizer's state may appear out of it."""
    run = Training("fsdp2", adamw)
    with run.attach(folder) as ckpt:
        ckpt.save(0).wait()
        state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        expected = run.losses(2)
    again = Training("fsdp2", adamw)
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    with again.attach(folder) as ckpt:
        assert ckpt.restore() is not None
        assert not again.optimizer.state
        assert again.losses(2) == expected


def several_optimizers(folder: Path) -> None:
    def build() -> tuple[Any, list[torch.optim.Optimizer]]:
        model = wrapped("fsdp2")
        parameters = trained(model)
        return model, [
            torch.optim.AdamW(parameters[::2], lr=0.05),
            torch.optim.SGD(parameters[1::2], 0.05, momentum=0.9),
        ]

    def losses(model: Any, optimizers: list[torch.optim.Optimizer]) -> list[float]:
        found = []
        for _ in range(3):
            loss = forward(model)
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        return found

    model, optimizers = build()
    with attach(model, optimizers, directory=folder, timeout_s=60) as ckpt:
        losses(model, optimizers)
        handle = ckpt.save(1)
        expected = losses(model, optimizers)
        handle.wait()
    model, optimizers = build()
    with attach(model, optimizers, directory=folder, timeout_s=60) as ckpt:
        ckpt.restore()
        assert losses(model, optimizers) == expected


def any_optimizer_attaches(folder: Path) -> None:
    """One whose state cannot be saved by elements is left out, and the adapter is saved all the same."""
    model = wrapped("fsdp2")
    optimizer = torch.optim.LBFGS(trained(model))
    with attach(model, optimizer, directory=folder, timeout_s=60) as ckpt:
        path = ckpt.save(1).wait()
    if rank() == 0:
        names = safetensors.torch.load_file(path / STATE).keys()
        assert len(names) > 0
        assert all(name.startswith("rng.rank") for name in names)


def differences_are_listed(folder: Path) -> None:
    run = Training("fsdp2", adamw)
    with run.attach(folder) as ckpt:
        run.losses(1)
        ckpt.save(1).wait()
    other = Training("fsdp2", OPTIMIZERS["sgd"])
    values = full_values(other.model)
    with other.attach(folder) as ckpt:
        said = refusal(ckpt.restore)
    assert "the optimizer is a AdamW in the checkpoint, a SGD here" in said
    assert "momentum_buffer: not in the file" in said
    assert "and" in said.splitlines()[-1]
    assert not other.optimizer.state
    assert all(torch.equal(value, values[name]) for name, value in full_values(other.model).items())


def weights_alone_from_a_whole_checkpoint(folder: Path) -> None:
    run = Training("fsdp2", adamw)
    with run.attach(folder) as ckpt:
        run.losses(2)
        values = full_values(run.model)
        ckpt.save(1).wait()
    model = wrapped("ddp")
    with attach(model, directory=folder, timeout_s=60) as ckpt:
        assert ckpt.restore() is not None
    restored = full_values(model)
    assert len(restored) > 0
    assert all(torch.equal(value, values[name]) for name, value in restored.items())


def a_scaler_goes_on(folder: Path) -> None:
    def scaler() -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=8.0)

    model, before = wrapped("fsdp2"), scaler()
    before.scale(torch.ones(1))
    before.update(32.0)
    with attach(model, adamw(model), scaler=before, directory=folder, timeout_s=60) as ckpt:
        ckpt.save(1).wait()
    model, after = wrapped("fsdp2"), scaler()
    with attach(model, adamw(model), scaler=after, directory=folder, timeout_s=60) as ckpt:
        ckpt.restore()
    assert after.get_scale() == 32.0


def torchs_stateful_loader_goes_on(folder: Path) -> None:
    """Each rank has its own place in its own data."""

    def loader() -> Any:
        data = list(range(100 * rank(), 100 * rank() + 40))
        return StatefulDataLoader(data, batch_size=4, shuffle=True)

    model, batches = wrapped("fsdp2"), loader()
    iterator = iter(batches)
    for _ in range(3):
        next(iterator)
    with attach(model, stateful={"loader": batches}, directory=folder, timeout_s=60) as ckpt:
        ckpt.save(1).wait()
    expected = [batch.tolist() for batch in iterator]
    assert len(expected) == 7
    model, batches = wrapped("fsdp2"), loader()
    with attach(model, stateful={"loader": batches}, directory=folder, timeout_s=60) as ckpt:
        ckpt.restore()
    assert [batch.tolist() for batch in batches] == expected


def state_that_is_neither_json_nor_tensor_is_refused_by_its_path(folder: Path) -> None:
    class Opaque:
        def state_dict(self) -> dict[str, Any]:
            return {"worker": [{"rng": object()}]}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    said = refusal(lambda: attach(wrapped("fsdp2"), stateful={"loader": Opaque()}, directory=folder, timeout_s=60))
    assert "stateful.loader.worker[0].rng" in said
    assert not folder.exists()


def peft_wrote_it(folder: Path) -> None:
    """A directory that PEFT itself wrote: the weights, at the step that its name tells, else before the first."""
    twin = peft_model()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    expected = {name: p.detach().clone() for name, p in twin.named_parameters() if p.requires_grad}
    for name, number in (("somewhere", -1), ("checkpoint-7", 7)):
        if rank() == 0:
            twin.save_pretrained(folder / name)
        dist.barrier()
        model = wrapped("fsdp2")
        with attach(model, adamw(model), directory=folder / "runs", timeout_s=60) as ckpt:
            restored = ckpt.restore(folder / name)
            assert restored is not None
            assert (restored.step, restored.source, restored.metrics) == (number, "disk", {})
            values = full_values(model)
            assert len(values) > 0
            assert all(torch.equal(values[key], value) for key, value in expected.items())
            if number < 0:
                ckpt.save(0).wait()
            dist.barrier()


def another_base_model_is_told(folder: Path) -> None:
    def named(path: str) -> Any:
        model = peft_model()
        model.peft_config["default"].base_model_name_or_path = path
        return test_dtensor.wrap(model)

    with attach(named("org/llama-a"), directory=folder, timeout_s=60) as ckpt:
        ckpt.save(1).wait()
    with attach(named("/data/models/llama-a/"), directory=folder, timeout_s=60) as ckpt:
        assert ckpt.restore() is not None
    with attach(named("org/llama-b"), directory=folder, timeout_s=60) as ckpt:
        said = refusal(ckpt.restore)
    assert "trained on 'org/llama-a', this one is on 'org/llama-b'" in said


def diverged_replicas_are_named(folder: Path) -> None:
    """Under DDP every rank holds everything; one value changed on one rank must be found."""
    model = wrapped("ddp")
    optimizer = adamw(model)
    with attach(model, optimizer, directory=folder, timeout_s=60, verify_replicas=True) as ckpt:
        step(model, optimizer)
        assert ckpt.save(1).wait() == folder / "checkpoint-1"
        name, parameter = [each for each in model.named_parameters() if "lora_B" in each[0]][2]
        with torch.no_grad():
            before = parameter[0, 0].clone()
            parameter[0, 0] += float(rank())
        said = refusal(ckpt.save(2).wait)
        assert "differs between rank" in said
        assert name.removeprefix("module.").replace(".default", "") in said
        with torch.no_grad():
            parameter[0, 0] = before
        assert ckpt.save(3).wait() == folder / "checkpoint-3"
    assert not (folder / "checkpoint-2").exists()


def _cases() -> Iterator[tuple[str, Callable[[Path], None]]]:
    for kind in ("ddp", "fsdp2", "fsdp1", "fsdp1_flat", "fsdp2_compiled"):
        yield f"bitwise-{kind}", functools.partial(goes_on_bit_by_bit, kind=kind, make=adamw)
    for name, make in OPTIMIZERS.items():
        yield f"bitwise-fsdp2-{name}", functools.partial(goes_on_bit_by_bit, kind="fsdp2", make=make)
    for kind in ("ddp", "fsdp1"):  # torch 2.13's own Adafactor cannot step DTensors
        yield f"bitwise-{kind}-adafactor", functools.partial(goes_on_bit_by_bit, kind=kind, make=adafactor)
    for case in (starts_where_nothing_had_begun, several_optimizers, any_optimizer_attaches, differences_are_listed,
                 weights_alone_from_a_whole_checkpoint, diverged_replicas_are_named, a_scaler_goes_on,
                 torchs_stateful_loader_goes_on, state_that_is_neither_json_nor_tensor_is_refused_by_its_path,
                 peft_wrote_it, another_base_model_is_told):  # fmt: skip
        yield case.__name__, case


CASES = dict(_cases())


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("case", CASES)
def test_training_state(results: dict[str, str], folder: Path, case: str) -> None:
    if not results:
        results.update(run_cases("tests.system.test_training_state", list(CASES), 2, folder))
    if results[case]:
        pytest.fail(results[case], pytrace=False)
