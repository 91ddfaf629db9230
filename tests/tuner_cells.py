"""The matrix that every tuner is tried in: wrapper by dtype; and what is known not to work in it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer

from async_ckpt.adapter import plan_adapter
from async_ckpt.core.errors import CheckpointError
from tests import tuners
from tests.tiny_llama import check_plan, check_saved, from_rank_0, rank, saved_files
from tests.tuner_models import run_forward
from tests.tuners import Refusal, TunerCase

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS = (LlamaDecoderLayer, MixtralDecoderLayer)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers that become units of their own: none if a tuner shares a parameter between them, for torch wants that
    in one unit."""
    modules = list(model.named_modules(remove_duplicate=False))
    layers = {path: module for path, module in modules if isinstance(module, LAYERS)}
    units = defaultdict(set)
    for path, module in modules:
        unit = next((layer for layer in layers if path == layer or path.startswith(f"{layer}.")), None)
        for parameter in module._parameters.values():
            units[parameter].add(unit)
    units.pop(None, None)
    shared = any(len(owners) > 1 for owners in units.values())
    return [] if shared else list(layers.values())


def _fsdp2(model: Any) -> nn.Module:
    for layer in _layers(model):
        fully_shard(layer)
    return fully_shard(model)


def _fsdp1(model: Any, *, original: bool, leaves: Collection[nn.Module] = ()) -> nn.Module:
    units = {*_layers(model), *leaves}
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=CustomPolicy(lambda module: module in units),
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )


def _fsdp1_orig(model: Any) -> nn.Module:
    """Layers are the units, and the adapter's layers too where they have another dtype than the rest."""
    mixed = len({parameter.dtype for parameter in model.parameters()}) > 1
    return _fsdp1(model, original=True, leaves=_trained_leaves(model) if mixed else ())


def _fsdp1_flat(model: Any) -> nn.Module:
    """FSDP1 then wants units that are trained whole or not at all: as llama-recipes does it, each trained leaf is one.
    Where a trained tensor is no leaf's weight, all of the model is trained."""
    leaves = _trained_leaves(model)
    weights = {leaf.weight for leaf in leaves}
    if any(parameter.requires_grad and parameter not in weights for parameter in model.parameters()):
        model.requires_grad_(True)
        leaves = set()
    return _fsdp1(model, original=False, leaves=leaves)


def _trained_leaves(model: nn.Module) -> set[Any]:
    def is_trained(module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        return weight is not None and weight.requires_grad

    return {module for module in model.modules() if not module._modules and is_trained(module)}


WRAPPERS: dict[str, Callable[[Any], nn.Module]] = {
    "plain": lambda model: model,
    "DDP": DistributedDataParallel,
    "FSDP2": _fsdp2,
    "FSDP1": _fsdp1_orig,
    "FSDP1 flat": _fsdp1_flat,
}


@dataclass(frozen=True)
class Missing:
    """Cells that cannot be tried, because PEFT or torch fails there itself.

    `step`: what fails, "wrap" (nothing can be saved), or "forward" (the file is right, but one cannot train).
    `error` is searched in the exception's type and text.
    """

    wrapper: str
    dtype: str
    case: str
    step: str
    error: str
    reason: str


# Names may be patterns as of the shell. The first that fits counts.
_VIEW_ERROR = "is a view and its base or another view of its base has been modified inplace"
_OUTSIDE = "PEFT reads the weights of its layers from outside of their FSDP1 units: use use_orig_params=True"
MISSING: tuple[Missing, ...] = (
    Missing("DDP", "*", "lora, frozen", "wrap", "not needed when a module doesn't have any parameter that requires",
            "DDP refuses a model without trained parameters"),
    Missing("FSDP2", "bf16", "shadow", "forward", "uniform original parameter dtype",
            "PEFT makes some of the tuner's parameters fp32, and FSDP2 trains one dtype in a unit: convert the model"),
    Missing("*", "bf16", "lora, MonteCLoRA", "forward", "addmv input tensors must have the same dtype",
            "PEFT samples in fp32 what it multiplies with bf16"),
    Missing("FSDP1*", "*", "lora, target_parameters", "forward", _VIEW_ERROR,
            "PEFT registers a parametrization on what FSDP1 made a view: use FSDP2"),
    Missing("FSDP1 flat", "*", "lily", "forward", _VIEW_ERROR, _OUTSIDE),
    Missing("FSDP1 flat", "*", "peanut", "forward", _VIEW_ERROR, _OUTSIDE),
    Missing("FSDP1 flat", "*", "lora, VeLoRA", "forward", _VIEW_ERROR, _OUTSIDE),
    Missing("FSDP2", "*", "lora, attention of torch", "wrap", "Some parameters are not in the module tree",
            "PEFT hides the attention's parameters from FSDP2's walk: use FSDP1"),
    Missing("FSDP1 flat", "*", "lora, attention of torch", "wrap", "Found an unflattened parameter",
            "PEFT registers the attention's parameters anew: use use_orig_params=True"),
)  # fmt: skip

# What is refused under some wrappers only.
_HIDDEN = Refusal("whose parameters FSDP1 hides when use_orig_params is False", "with use_orig_params=True")
REFUSED: tuple[tuple[str, str, Refusal], ...] = (
    ("FSDP1 flat", "*modules_to_save*", _HIDDEN),
    ("FSDP1 flat", "lora, two adapters, the second", _HIDDEN),
    ("FSDP1 flat", "lora, sequence classification", _HIDDEN),
)


@dataclass(frozen=True)
class Cell:
    wrapper: str
    dtype: str
    case: str

    @property
    def name(self) -> str:
        return f"{self.wrapper} | {self.dtype} | {self.case}"

    @property
    def tuner(self) -> TunerCase:
        return tuners.CASES[self.case]

    @property
    def refused(self) -> Refusal | None:
        for wrapper, case, refusal in REFUSED:
            if fnmatchcase(self.wrapper, wrapper) and fnmatchcase(self.case, case):
                return refusal
        return self.tuner.refused

    @property
    def missing(self) -> Missing | None:
        for missing in MISSING:
            patterns = (missing.wrapper, missing.dtype, missing.case)
            if all(map(fnmatchcase, (self.wrapper, self.dtype, self.case), patterns)):
                return missing
        return None

    @property
    def outcome(self) -> str:
        """What the cell counts as, once its check went through."""
        if self.missing is not None and self.missing.step == "wrap":
            return "missing"
        return "refused" if self.refused else "saved"

    def check(self) -> None:
        """Assert what `refused` and `missing` say, and for the others that the file is PEFT's, byte by byte."""
        missing = self.missing
        if missing is not None and missing.step == "wrap":
            with _failing(missing):
                self._wrapped()
            return
        model = self._wrapped()
        if self.refused is not None:
            with pytest.raises(CheckpointError) as raised:
                plan_adapter(model, self.tuner.adapter_name, documents=rank() == 0)
            assert self.refused.reason in str(raised.value)
            assert self.refused.instead in str(raised.value)
            return
        name = self.tuner.adapter_name
        expected = self._expected()
        plan = check_saved(model, expected, name)
        if missing is not None:
            with _failing(missing):
                self._train(model)
            return
        self._train(model)
        if self.tuner.changes_in_forward:
            before, expected = expected, self._expected(trained=True)
            assert from_rank_0(str(before == expected)) == "False"
        check_plan(plan, expected, name)
        check_saved(model, expected, name)

    def _build(self) -> Any:
        # FSDP1 flattens tensors of one dtype only; PEFT makes some fp32 in a bf16 model, which one has to convert.
        dtype = DTYPES[self.dtype]
        return self.tuner.build(dtype, whole=self.wrapper.startswith("FSDP1") and "mixed" not in self.case)

    def _wrapped(self) -> nn.Module:
        return WRAPPERS[self.wrapper](self._build())

    def _train(self, model: nn.Module) -> None:
        loss = run_forward(model, **self.tuner.inputs)
        if loss.requires_grad:
            loss.backward()

    def _expected(self, *, trained: bool = False) -> dict[str, bytes]:
        """What PEFT writes for an unwrapped twin, on rank 0; asserts that no tensor is zero, as empty ones would be."""
        files, problem = {}, ""
        if rank() == 0:
            try:
                twin = self._build()
                if trained:
                    self._train(twin)
                files = saved_files(twin, self.tuner.adapter_name)
                weights = next(data for name, data in files.items() if name.endswith("adapter_model.safetensors"))
                tensors = safetensors.torch.load(weights)
                assert tensors
                zero = [
                    name for name, t in tensors.items() if t.is_floating_point() and t.numel() and not t.count_nonzero()
                ]
                assert not zero
            except Exception as error:
                problem = f"save_pretrained of the unwrapped twin: {error!r}"
        problem = from_rank_0(problem)
        assert problem == "", problem
        return files


def all_cells() -> Iterator[Cell]:
    for wrapper in WRAPPERS:
        for dtype in DTYPES:
            for case in tuners.CASES:
                yield Cell(wrapper, dtype, case)


@contextmanager
def _failing(missing: Missing) -> Iterator[None]:
    """Assert that the block raises what `missing` says; once it does not, the entry is to be removed."""
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        assert re.search(missing.error, text, re.DOTALL), f"{text}, expected {missing.error}"
    else:
        pytest.fail(f"this works now, so MISSING must not list it: {missing.reason}")


CASES: dict[str, Callable[[], None]] = {cell.name: cell.check for cell in all_cells()}
