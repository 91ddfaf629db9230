"""A driver of Ray Train, in a process of its own: `python -m tests.integrations.ray_job FOLDER`. Two workers train; in
their first life one of them is killed right behind the save of `KILL`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

STEPS, KILL = 6, 4


def train(config: dict[str, Any]) -> None:
    import ray.train

    import async_ckpt
    from tests.system.training import adamw, everywhere, full_values, keep, reference, step, wrapped

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    from ray_train import report

    folder = Path(config["folder"])
    rank = ray.train.get_context().get_world_rank()
    model = wrapped("fsdp2")
    optimizer = adamw(model)
    ckpt = async_ckpt.attach(model, optimizer, directory=folder / "run", timeout_s=60)
    resumed = ckpt.restore()
    life = {"pid": os.getpid(), "step": resumed.step, "source": resumed.source} if resumed else {"pid": os.getpid()}
    with (folder / f"lives-{rank}").open("a") as lives:
        lives.write(json.dumps(life) + "\n")
    before = None
    for number in range(resumed.step + 1 if resumed else 1, STEPS + 1):
        step(model, optimizer)
        keep(folder / "expected" / str(number), reference(values=full_values(model)))
        save = ckpt.save(number, metrics={"step": number})
        if resumed is None and number == KILL:
            save.staged()
            everywhere("staged")
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        if before is not None:
            report(*before)
        before = save, {"step": number}
    if before is not None:
        report(*before)
    ckpt.close()


def main(folder: Path) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    ray.init(
        address="local", num_cpus=3, include_dashboard=False, object_store_memory=100 << 20, _temp_dir=str(folder / "r")
    )
    trainer = TorchTrainer(
        train,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(
            storage_path=str(folder),
            name="run",
            failure_config=FailureConfig(max_failures=1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    result = trainer.fit()
    told = {
        "checkpoint": None if result.checkpoint is None else result.checkpoint.path,
        "metrics": result.metrics,
        "best": [checkpoint.path for checkpoint, _ in result.best_checkpoints],
        "error": repr(result.error),
    }
    (folder / "result.json").write_text(json.dumps(told))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
