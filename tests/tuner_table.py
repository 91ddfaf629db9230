"""docs/tuners.md: what the catalogue says, and what each adapter's plan says of where its tensors lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch

from async_ckpt.adalora import SelectedShard
from async_ckpt.adapter import plan_adapter
from async_ckpt.contents import NamedTensor
from async_ckpt.core.errors import CheckpointError
from async_ckpt.special_tuners import prompt_source
from tests.tuner_cells import DTYPES, MISSING, REFUSED, WRAPPERS, Cell
from tests.tuners import CASES, TunerCase

PATH = Path(__file__).parent.parent / "docs" / "tuners.md"

INTRODUCTION = """\
<!-- Written by `python -m tests.tuners` from tests/tuners.py; do not edit. -->
# Tuners

Which of PEFT's tuners async_ckpt saves, byte for byte as `save_pretrained` of an unwrapped model does, as tested with
PEFT {peft} and torch {torch}: every line in float32 and bfloat16. `make test-all` runs all {cells} combinations.

PEFT itself says which tensors belong in the file. Nearly always they are parameters and persistent buffers of the model
(buffers are copied before `save` returns, and rank 0's are written). A *special case* is a tensor that PEFT does not
take from the state dict as it is, so that async_ckpt has a rule of its own for it.

How it is tried: tiny models with random values, one forward and backward, no optimizer step; two gloo ranks on CPUs.
Decoder layers are the FSDP units, or the root alone where a tuner shares a parameter between layers. For FSDP1 the
model is converted to one dtype first (but for "mixed dtypes"); FSDP1 flat trains the whole model where a trained tensor
is no module's weight. AdaMSS gets stand-in clusters where scikit-learn is not installed.
"""

MARKS = {
    "wrap": "[m] torch cannot wrap such a model:",
    "forward": "[f] the file is right, but there PEFT or torch fails in the forward:",
}


def table() -> str:
    return "\n".join([*_lines(), ""])


def _lines() -> Iterator[str]:
    version, cells = torch.__version__.partition("+")[0], len(WRAPPERS) * len(DTYPES) * len(CASES)
    yield INTRODUCTION.format(peft=peft.__version__, torch=version, cells=cells)
    yield f"| tuner | tensors, and how they are found | {' | '.join(WRAPPERS)} |"
    yield "|---" * (len(WRAPPERS) + 2) + "|"
    for name, case in CASES.items():
        if case.refused is None:
            columns = [_column(wrapper, name) for wrapper in WRAPPERS]
            yield f"| {name} | {_found(case)} | {' | '.join(columns)} |"
    yield ""
    yield from _notes()
    yield ""
    yield "## Refused"
    yield ""
    yield "What PEFT computes while it saves is no copy of the model's tensors. attach then raises `CheckpointError`:"
    yield ""
    yield "| tuner | the error, which says what to do |"
    yield "|---|---|"
    for name, case in CASES.items():
        if case.refused is not None:
            yield f"| {name} | {_refusal(case)} |"
    yield ""
    yield (
        "`save_pretrained(path_initial_model_for_weight_conversion=...)` has no counterpart: convert a checkpoint "
        "after training."
    )


def _notes() -> Iterator[str]:
    """What the marks in the table stand for."""
    yield "[r] refused by attach, with this reason:"
    yield ""
    for wrapper, pattern, refusal in REFUSED:
        yield f"- {wrapper}, {pattern}: {refusal.reason}; {refusal.instead}"
    for step, mark in MARKS.items():
        yield ""
        yield mark
        yield ""
        for missing in MISSING:
            if missing.step == step:
                patterns = (missing.wrapper, missing.dtype, missing.case)
                yield f"- {', '.join(pattern for pattern in patterns if pattern != '*')}: {missing.reason}"


def _column(wrapper: str, case: str) -> str:
    cells = [Cell(wrapper, dtype, case) for dtype in DTYPES]
    marks = ["[r]" for cell in cells if cell.refused] or ["yes" for cell in cells if cell.outcome == "saved"]
    marks += [MARKS[cell.missing.step][:3] for cell in cells if cell.missing]
    return " ".join(dict.fromkeys(marks))


def _found(case: TunerCase) -> str:
    model = case.build()
    plan = plan_adapter(model, case.adapter_name, documents=False)
    special = {tensor.name for tensor in plan.tensors if _is_special(case, model, tensor)}
    ordinary = [tensor for tensor in plan.tensors if tensor.name not in special]
    buffers = sum(tensor.shard.is_buffer for tensor in ordinary)
    counts = {"parameter": len(ordinary) - buffers, "buffer": buffers, "special case": len(special)}
    return ", ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in counts.items() if count)


def _is_special(case: TunerCase, model: Any, tensor: NamedTensor) -> bool:
    config = model.peft_config[case.adapter_name]
    if isinstance(tensor.shard, SelectedShard) or tensor.name.endswith("shira_indices"):
        return True
    return prompt_source(config, case.adapter_name, tensor.name) is not None


def _refusal(case: TunerCase) -> str:
    try:
        plan_adapter(case.build(), case.adapter_name, documents=False)
    except CheckpointError as error:
        return str(error)
    raise AssertionError(f"{case.name} is not refused")
