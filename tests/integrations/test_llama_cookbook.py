"""The real llama_cookbook.utils.train_utils.train, under FSDP1 with its own policy, saving through us."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from async_ckpt import latest
from tests.integrations.cookbook import fsdp_config, fsdp_utils, llama_cookbook, train_config, train_utils
from tests.system.processes import run_cases
from tests.system.training import ADAPTER, check_checkpoint, everywhere, kept, rank, reference
from tests.tiny_llama import VOCABULARY, base_model, difference, lora, peft_model

NAMES = (ADAPTER, "adapter_config.json", "README.md")


class Tokenizer:
    """`train` decodes what it predicts in validation, and looks at none of it."""

    def batch_decode(self, tokens: Any, skip_special_tokens: bool) -> list[str]:
        return ["" for _ in tokens]


def config(folder: Path, **changes: Any) -> Any:
    chosen = {"enable_fsdp": True, "use_peft": True, "output_dir": str(folder), "num_epochs": 2, **changes}
    found = train_config()
    for name, value in chosen.items():
        assert hasattr(found, name)
        setattr(found, name, value)
    return found


def wrapped(original: bool = False) -> Any:
    """As finetuning.py wraps it; there is no CUDA device to name."""
    policy = fsdp_utils.fsdp_auto_wrap_policy(peft_model(), [LlamaDecoderLayer])
    return FullyShardedDataParallel(
        peft_model(), auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=original
    )


def batches(seed: int) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(VOCABULARY, (2, 1, 8), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row.clone()} for row in tokens]


def train(folder: Path, model: Any, chosen: Any, loader: Any = None) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.85)
    seed = 10 * rank()
    results: dict[str, Any] = train_utils.train(
        model, loader or batches(seed), batches(seed + 1), Tokenizer(), optimizer, scheduler, 1, chosen, fsdp_config(),
        local_rank="cpu", rank=rank(),
    )  # fmt: skip
    return results


def values_of(model: Any) -> dict[str, torch.Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {
            name.replace("_fsdp_wrapped_module.", ""): value.detach().clone()
            for name, value in model.named_parameters()
            if "lora" in name
        }


def each_epoch_is_a_checkpoint(folder: Path, original: bool) -> None:
    llama_cookbook.patch()
    model = wrapped(original)
    train(folder, model, config(folder, run_validation=False))
    expected = reference(values=values_of(model))
    assert latest(folder) == folder / "checkpoint-1"
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-1"]
    if rank() == 0:
        check_checkpoint(folder / "checkpoint-1", expected, 1)
        for name in NAMES:
            assert os.readlink(folder / name) == f"latest/{name}"
        assert difference((folder / ADAPTER).read_bytes(), expected[ADAPTER]) == ""
        first = (folder / "checkpoint-0" / ADAPTER).read_bytes()
        assert difference(first, expected[ADAPTER]) != ""
    PeftModel.from_pretrained(base_model(), folder)
    dist.barrier()

    again = wrapped(original)  # into the same output_dir, as whoever starts it again does
    train(folder, again, config(folder, run_validation=False, num_epochs=1))
    expected = reference(values=values_of(again))
    assert latest(folder) == folder / "checkpoint-2"
    if rank() == 0:
        assert difference((folder / ADAPTER).read_bytes(), expected[ADAPTER]) == ""


def validation_and_save_model_decide(folder: Path) -> None:
    """An epoch that is worse than the best one so far is not saved; without save_model, none is."""
    llama_cookbook.patch(slots=1)
    model = wrapped()
    losses = iter([3.0, 4.0, 2.0, 1.0, 1.0])

    def evaluation(*args: Any) -> Any:
        loss = torch.tensor(next(losses))
        return loss.exp(), loss, [], []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_utils, "evaluation", evaluation)
        train(folder, model, config(folder / "worse", num_epochs=3))
        train(folder, model, config(folder / "off", save_model=False))
    assert next(losses, None) is None
    assert sorted(path.name for path in (folder / "worse").glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-1"]
    assert not (folder / "off").exists()


def an_earlier_adapter_stays_until_there_is_a_newer(folder: Path) -> None:
    llama_cookbook.patch()
    model = wrapped()
    if rank() == 0:
        peft_model(lora()).save_pretrained(folder)
        assert not (folder / ADAPTER).is_symlink()
    dist.barrier()
    before = kept(folder)[ADAPTER]
    train(folder, model, config(folder, num_epochs=1))
    assert (folder / ADAPTER).is_symlink()
    assert (folder / ADAPTER).read_bytes() != before


class Preempting:
    """Batches without end, of which the third of the second rank signals it."""

    def __len__(self) -> int:
        return 100_000

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(len(self)):
            if (rank(), number) == (1, 3):
                os.kill(os.getpid(), signal.SIGUSR1)
            yield batches(number)[0]


def a_notice_ends_it(folder: Path) -> None:
    """The adapter is that of the last step, and a later patch does not know of it any more."""
    llama_cookbook.patch(preemption=True)
    before = signal.getsignal(signal.SIGTERM)
    model = wrapped()
    steps: list[int] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        assert train(folder, model, config(folder), Preempting()) == {}
    finally:
        hook.remove()
    assert signal.getsignal(signal.SIGTERM) == before
    counts = everywhere(len(steps))
    assert counts[0] == counts[1] >= 4
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-0"]
    expected = reference(values=values_of(model))
    if rank() == 0:
        check_checkpoint(folder / "checkpoint-0", expected, 0)
        assert difference((folder / ADAPTER).read_bytes(), expected[ADAPTER]) == ""
    llama_cookbook.patch()
    assert train(folder, model, config(folder, num_epochs=1))["avg_train_loss"] > 0


CASES: dict[str, Callable[[Path], None]] = {
    "epochs": lambda folder: each_epoch_is_a_checkpoint(folder, False),
    "epochs-original": lambda folder: each_epoch_is_a_checkpoint(folder, True),
    "decides": validation_and_save_model_decide,
    "notice": a_notice_ends_it,
    "earlier": an_earlier_adapter_stays_until_there_is_a_newer,
}


FULL = {"earlier", "epochs-original"}
SCENARIOS = [pytest.param(name, marks=pytest.mark.full if name in FULL else ()) for name in CASES]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_llama_cookbook(scenario: str, selected: set[Any], folder: Path, results: dict[str, str]) -> None:
    if not results:
        results.update(run_cases(__name__, [name for name in CASES if name in selected], 2, folder))
    assert results[scenario] == ""
