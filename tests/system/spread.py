"""What the ranks of jobs on several hosts do in the tests; `test_hosts.py` and `test_lost_hosts.py` start them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import async_ckpt
from tests.system.processes import Job, until
from tests.system.training import (
    ADAPTER,
    adamw,
    attach,
    check_checkpoint,
    collectives,
    everywhere,
    full_values,
    keep,
    kept,
    rank,
    reached,
    reference,
    refusal,
    sleep_until_killed,
    step,
    wrapped,
)
from tests.tiny_llama import lora

HERE = "tests.system.spread"
LIMIT_S = 60.0
STATE = "training_state/training_state.safetensors"


class Training:
    """A model in training with saves of which `expected/<step>` in the folder tells what they must hold."""

    def __init__(self, folder: str, kind: str, **options: Any) -> None:
        self.folder = Path(folder)
        self.model = wrapped(kind)
        self.optimizer = adamw(self.model)
        before = collectives()
        self.ckpt = attach(
            self.model, self.optimizer, directory=self.folder / "run", **{"timeout_s": LIMIT_S, **options}
        )
        assert collectives() == before

    def step(self) -> None:
        step(self.model, self.optimizer)

    def expect(self, number: int) -> None:
        keep(self.folder / "expected" / str(number), reference(values=full_values(self.model)))

    def save(self, number: int) -> async_ckpt.SaveHandle:
        self.step()
        self.expect(number)
        before = collectives()
        handle = self.ckpt.save(number)
        assert collectives() == before
        return handle

    def check_restored(self, number: int) -> None:
        values = full_values(self.model)
        if rank() == 0:
            expected = kept(self.folder / "expected" / str(number))
            assert reference(values=values)[ADAPTER] == expected[ADAPTER]


def saves(folder: str, kind: str, last: str) -> None:
    """Save 1 to `last`, each but the first when told to (`tell`), and train on while it is under way."""
    training = Training(folder, kind)
    handles = []
    for number in range(1, int(last) + 1):
        told(folder, number)
        handles.append(training.save(number))
        reached(folder, f"saved-{number}-{rank()}")
        training.step()
        training.step()
        reached(folder, f"trained-{number}-{rank()}")
        if number == 1:
            handles[0].wait()  # every host knows that its slot is free, so the next two saves wait for none
            reached(folder, f"settled-1-{rank()}")
    note(folder, [outcome(handle) for handle in handles])
    training.ckpt.close()


def saves_and_goes_back(folder: str, kind: str) -> None:
    """Save 1, restore it in the same run, and save the same again."""
    training = Training(folder, kind)
    training.save(1).wait()
    training.step()
    resumed = training.ckpt.restore(1)
    assert resumed is not None
    training.check_restored(1)
    if rank() == 0:
        keep(training.folder / "expected" / "2", kept(training.folder / "expected" / "1"))
    note(folder, [resumed.source, outcome(training.ckpt.save(2))])
    training.ckpt.close()


def saves_alone(folder: str, kind: str, last: str) -> None:
    """As `saves`, but no rank waits for another after the first save, since one may be gone. All saves from the second
    on hold the same."""
    training = Training(folder, kind)
    handles = [training.save(1)]
    handles[0].wait()
    for number in range(2, int(last) + 1):
        training.expect(number)
    # Nothing that needs the other ranks comes after this.
    for number in range(2, int(last) + 1):
        told(folder, number)
        handles.append(training.ckpt.save(number))
        until(lambda: handles[-1].copy_s is not None, "our own copy")
        reached(folder, f"staged-{number}-{rank()}")
    note(folder, [outcome(handle) for handle in handles])
    training.ckpt.close()
    os._exit(0)  # what is left of gloo cannot meet at a barrier


def saves_and_waits(folder: str, kind: str, last: str) -> None:
    """Save 1 to `last` with a copy of each on a second host, and live until killed."""
    training = Training(folder, kind, replicas=1)
    for number in range(1, int(last) + 1):
        training.save(number).wait()
    sleep_until_killed()


def restores(folder: str, kind: str, number: str) -> None:
    """Go on from `number`, with copies; note from where it came. The next save holds the same."""
    training = Training(folder, kind, replicas=1)
    with torch.no_grad():
        for parameter in training.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    resumed = training.ckpt.restore()
    assert resumed is not None
    assert resumed.step == int(number)
    training.check_restored(int(number))
    if rank() == 0:
        keep(training.folder / "expected" / str(int(number) + 1), kept(training.folder / "expected" / number))
    handle = training.ckpt.save(int(number) + 1)
    note(folder, [resumed.source, outcome(handle)])
    training.ckpt.close()


def goes_on(folder: str, kind: str, number: str) -> None:
    """Restore what was saved as `number`, and save the same again as the next: all of it, the optimizer's state too."""
    training = Training(folder, kind)
    with torch.no_grad():
        for parameter in training.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    resumed = training.ckpt.restore()
    assert resumed is not None
    assert resumed.step == int(number)
    training.check_restored(int(number))
    if rank() == 0:
        keep(training.folder / "expected" / str(int(number) + 1), kept(training.folder / "expected" / number))
    training.ckpt.save(int(number) + 1).wait()
    training.ckpt.close()


def dies_and_goes_on(folder: str, kind: str) -> None:
    """At first: save 1, and rank 1 is killed. Started again: restore it, and save 2."""
    training = Training(folder, kind)
    resumed = training.ckpt.restore()
    if resumed is None:
        training.save(1).wait()
        everywhere(None)
        if rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        sleep_until_killed()
    assert resumed is not None
    training.check_restored(1)
    note(folder, [str(resumed.step), outcome(training.save(2))])
    training.ckpt.close()


def stops_after_the_same_step(folder: str, kind: str) -> None:
    """Train until told to end; note after how many steps that was."""
    training = Training(folder, kind, preemption=True)
    training.step()
    reached(folder, f"training-{rank()}")
    steps = 1
    while not training.ckpt.preempted:
        training.step()
        steps += 1
    training.expect(steps)
    handle = training.ckpt.save(steps)
    note(folder, [str(steps), outcome(handle)])
    training.ckpt.close()


def has_another_model(folder: str, kind: str, who: str) -> None:
    """Rank `who` attaches an adapter of another rank."""
    model = wrapped(kind, config=lora(r=3)) if rank() == int(who) else wrapped(kind)
    note(folder, [refusal(lambda: attach(model, directory=Path(folder, "run"), timeout_s=LIMIT_S))])


def does_not_see(folder: str, kind: str) -> None:
    """The directory is not shared: what was saved cannot be restored, on any rank."""
    training = Training(folder, kind)
    training.save(1).wait()
    note(folder, [refusal(training.ckpt.restore)])
    training.save(2).wait()
    training.ckpt.close()


def without_a_store(folder: str) -> None:
    """torch.distributed is not there: all that is known of the job is in the environment."""
    who = rank()
    torch.distributed.destroy_process_group()
    model = wrapped("plain")
    optimizer = adamw(model)
    step(model, optimizer)
    if who == 0:
        keep(Path(folder, "expected", "1"), reference(values=full_values(model)))
    ckpt = attach(model, optimizer, directory=Path(folder, "run"), timeout_s=LIMIT_S)
    handle = ckpt.save(1)
    path = Path(folder, f"said-{who}")
    path.write_text(json.dumps([outcome(handle)]))
    ckpt.close()
    os._exit(0)


def is_refused(folder: str, kind: str, timeout_s: str) -> None:
    model = wrapped(kind)
    note(folder, [refusal(lambda: attach(model, directory=Path(folder, "run"), timeout_s=float(timeout_s)))])


def one_cannot_plan(folder: str, kind: str, who: str) -> None:
    """Rank `who` has a model that cannot be saved."""
    model = wrapped(kind) if rank() != int(who) else torch.nn.Linear(2, 2)
    note(folder, [refusal(lambda: attach(model, directory=Path(folder, "run"), timeout_s=LIMIT_S))])


# --- between a rank and the test -----------------------------------------------------------------------------------


def tell(folder: Path, number: int) -> None:
    (folder / f"go-{number}").touch()


def told(folder: str, number: int) -> None:
    until(lambda: number == 1 or Path(folder, f"go-{number}").exists(), f"the word to save {number}")


def note(folder: str, said: list[str]) -> None:
    """Where the test reads it, also when this rank is gone."""
    path = Path(folder, f"said-{rank()}")
    path.with_suffix(".new").write_text(json.dumps(said))
    path.with_suffix(".new").rename(path)


def noted(folder: Path, world: int) -> list[list[str]]:
    return [json.loads((folder / f"said-{rank}").read_text()) for rank in range(world)]


def outcome(handle: async_ckpt.SaveHandle) -> str:
    """What it came to; waits for it."""
    try:
        handle.wait()
    except async_ckpt.CheckpointError as error:
        assert handle.state in ("failed", "skipped")
        return str(error)
    return handle.state


def all_reach(job: Job, mark: str) -> None:
    for number in range(job.world):
        job.reach(f"{mark}-{number}")


# --- what the test looks at ----------------------------------------------------------------------------------------


def check(folder: Path, *numbers: int) -> None:
    """Assert that these checkpoints are there, byte for byte what `save_pretrained` wrote, and nothing else is."""
    run = folder / "run"
    names = [f"checkpoint-{number}" for number in numbers]
    assert sorted(os.listdir(run)) == sorted([*names, "latest"])
    assert os.readlink(run / "latest") == names[-1]
    for number in numbers:
        check_checkpoint(run / f"checkpoint-{number}", kept(folder / "expected" / str(number)), number)


def state_of(folder: Path, number: int) -> dict[str, torch.Tensor]:
    """The optimizer's tensors in a checkpoint, whole; random numbers are a rank's own."""
    tensors = safetensors.torch.load_file(folder / "run" / f"checkpoint-{number}" / STATE)
    found = {name: tensor for name, tensor in tensors.items() if not name.startswith("rng.")}
    assert len(found) > 0
    assert any(tensor.count_nonzero() > 0 for name, tensor in found.items() if "exp_avg" in name)
    return found
