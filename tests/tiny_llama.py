"""A Llama small enough to be built hundreds of times, with sizes that no world size divides; and the oracle for it.

The oracle is PEFT's `save_pretrained` of an unwrapped twin: it knows nothing of wrappers and nothing of async_ckpt.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from async_ckpt.adalora import SelectedShard
from async_ckpt.adapter import AdapterPlan, plan_adapter
from async_ckpt.contents import SAFETENSORS_DTYPE
from async_ckpt.core.layout import TensorSpec, plan_file
from async_ckpt.core.region import Region
from async_ckpt.sharding import Shard

VOCABULARY = 51
TARGETS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def lora(**changes: Any) -> LoraConfig:
    """r=1, so that some shards are empty, and r=5, so that they are uneven."""
    return LoraConfig(
        **{
            "r": 1,
            "rank_pattern": {"gate_proj": 5},
            "target_modules": TARGETS,
            "init_lora_weights": False,
            "task_type": "CAUSAL_LM",
            **changes,
        }
    )


def base_model(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(7)
    config = LlamaConfig(
        **{
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 37,
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 2,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    return LlamaForCausalLM(config).to(dtype)


def peft_model(config: PeftConfig | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same weights each time it is called with the same arguments, on every rank."""
    base = base_model(dtype, **changes)
    torch.manual_seed(8)
    model = get_peft_model(base, config or lora(), autocast_adapter_dtype=False)
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name or "lora_magnitude" in name:
            nn.init.uniform_(parameter)
    return model


def forward(model: nn.Module) -> torch.Tensor:
    """A loss on a batch that differs between ranks."""
    tokens = (torch.arange(8).view(1, 8) * 5 + rank()) % VOCABULARY
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def evaluate(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        loss = forward(model)
    model.train()
    return loss


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        forward(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def reference(
    config: PeftConfig | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    **changes: Any,
) -> dict[str, bytes]:
    """What `save_pretrained` writes for an unwrapped twin, with `values` as its trained parameters. On rank 0 only."""
    if rank() != 0:
        return {}
    return saved_files(with_values(peft_model(config, **changes), values), adapter_name)


def with_values(twin: Any, values: Mapping[str, torch.Tensor] | None) -> Any:
    """Set trained parameters of the twin, all of them and by name; each kind must have changed, or nothing is shown."""
    trained = {name: parameter for name, parameter in twin.named_parameters() if parameter.requires_grad}
    if values is not None:
        assert values.keys() == trained.keys()
        changed = {name for name, value in values.items() if not torch.equal(trained[name], value)}
        assert any("lora_A" in name for name in changed)
        assert any("lora_B" in name for name in changed)
        with torch.no_grad():
            for name, value in values.items():
                trained[name].copy_(value)
    return twin


def saved_files(twin: Any, adapter_name: str = "default") -> dict[str, bytes]:
    """The files that `save_pretrained` writes; asserts that no lora_B is zero, which every empty tensor would equal."""
    with tempfile.TemporaryDirectory() as folder:
        twin.save_pretrained(folder, selected_adapters=[adapter_name])
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    assert all(p.count_nonzero() > 0 for name, p in twin.named_parameters() if "lora_B" in name)
    return files


def check_saved(model: nn.Module, expected: Mapping[str, bytes], adapter_name: str = "default") -> AdapterPlan:
    """Plan the wrapped `model` anew, and assert that what we would write is `expected`, byte by byte."""
    before = tree_of(model)
    with no_collectives():
        plan = plan_adapter(model, adapter_name, documents=rank() == 0)
        for tensor in plan.tensors:
            tensor.shard.local()
    assert tree_of(model) == before
    check_plan(plan, expected, adapter_name)
    return plan


def check_plan(plan: AdapterPlan, expected: Mapping[str, bytes], adapter_name: str = "default") -> None:
    """Assert that the bytes that all ranks hold now are the file in `expected`, which only rank 0 has to know."""
    assert len(plan.tensors) > 0
    folder = "" if adapter_name == "default" else f"{adapter_name}/"
    weights = f"{folder}adapter_model.safetensors"
    assert bool(plan.documents) == (rank() == 0)
    assert plan.subfolder == folder.rstrip("/")
    held = gathered([tensor.shard for tensor in plan.tensors])
    verdict = ""
    if rank() == 0:
        try:
            tensors = [assembled(tensor.shard, pieces) for tensor, pieces in zip(plan.tensors, held, strict=True)]
            verdict = difference(file_of(plan, tensors), expected[weights])
        except AssertionError as error:
            verdict = str(error)
        documents = {name: content for name, content in expected.items() if name != weights}
        if normal(plan.documents) != normal(documents):
            verdict += f"documents {normal(plan.documents)}, expected {normal(documents)}"
    verdict = from_rank_0(verdict)
    assert verdict == "", verdict
    shards = [tensor.shard for tensor in plan.tensors if not isinstance(tensor.shard, SelectedShard)]
    with no_collectives() as operators:
        views = [shard.local() for shard in shards]
        assert all(shard.local() is view for shard, view in zip(shards, views, strict=True))
    assert operators == [], "a repeated local() must not run any operator of torch"


def normal(documents: Mapping[str, bytes]) -> dict[str, Any]:
    """adapter_config.json as JSON, its lists sorted: PEFT dumps sets in any order. Other files as they are."""
    normalised: dict[str, Any] = dict(documents)
    for name in documents:
        if name.endswith(".json"):
            items = json.loads(documents[name]).items()
            normalised[name] = [
                (key, sorted(map(str, value)) if isinstance(value, list) else value) for key, value in items
            ]
    return normalised


def file_of(plan: AdapterPlan, tensors: list[torch.Tensor]) -> bytes:
    """adapter_model.safetensors with these values, in the plan's order."""
    specs = [TensorSpec(t.name, SAFETENSORS_DTYPE[t.shard.dtype], t.shard.shape) for t in plan.tensors]
    layout = plan_file("adapter_model.safetensors", specs)
    values = {spec.name: tensor.contiguous().view(-1) for spec, tensor in zip(specs, tensors, strict=True)}
    data = [values[extent.spec.name].view(torch.uint8) for extent in layout.extents]
    return layout.header + torch.cat(data).numpy().tobytes()


def difference(written: bytes, expected: bytes) -> str:
    """ "" if both safetensors files are the same bytes, else how they differ."""
    if written == expected:
        return ""
    ours, theirs = safetensors.torch.load(written), safetensors.torch.load(expected)
    if ours.keys() != theirs.keys():
        return f"missing {sorted(theirs.keys() - ours.keys())}, superfluous {sorted(ours.keys() - theirs.keys())}"
    kinds = {name for name in ours if (ours[name].shape, ours[name].dtype) != (theirs[name].shape, theirs[name].dtype)}
    values = {name for name in ours.keys() - kinds if not torch.equal(ours[name], theirs[name])}
    return f"other shape or dtype: {sorted(kinds)}; other values: {sorted(values)}; else the header"


Piece = tuple[Region, tuple[int, ...], torch.dtype, torch.Tensor]


def gathered(shards: list[Shard]) -> list[list[Piece]]:
    """For each shard what all ranks hold of it, on rank 0: by the test, with a collective of its own."""
    mine: list[Piece] = []
    for shard in shards:
        local = shard.local()
        assert tuple(local.shape) == shard.region.sizes
        assert local.dtype == shard.dtype
        assert not local.requires_grad
        mine.append((shard.region, shard.shape, shard.dtype, local.clone()))
    if not dist.is_initialized():
        return [[piece] for piece in mine]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, everything if rank() == 0 else None)
    return [list(pieces) for pieces in zip(*everything, strict=True)] if rank() == 0 else []


def assembled(shard: Shard, pieces: list[Piece]) -> torch.Tensor:
    """The global tensor. Asserts that the regions of all ranks cover it and agree where they overlap."""
    assert {(shape, dtype) for _, shape, dtype, _ in pieces} == {(shard.shape, shard.dtype)}
    whole = torch.zeros(shard.shape, dtype=shard.dtype)
    covered = torch.zeros(shard.shape, dtype=torch.bool)
    for region, _, _, piece in pieces:
        if region.numel == 0:
            continue
        place: Any = tuple(slice(at, at + size) for at, size in zip(region.offsets, region.sizes, strict=True))
        target, marks = (whole.view(-1), covered.view(-1)) if region.flat else (whole, covered)
        assert torch.equal(target[place][marks[place]], piece[marks[place]]), f"{shard.name}: replicas differ"
        target[place] = piece
        marks[place] = True
    assert bool(covered.all()), f"{shard.name}: nobody holds {int((~covered).sum())} of {covered.numel()} elements"
    return whole


def from_rank_0(text: str) -> str:
    """The same on every rank, so that all of them pass or fail."""
    texts = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(texts)
    return texts[0]


def tree_of(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_collectives() -> Iterator[list[str]]:
    """Assert that the block communicates nothing; yields the names of the operators that it ran."""
    with _Recorder() as recorder, _forbidden_calls():
        yield recorder.operators
    assert [name for name in recorder.operators if "c10d" in name] == []


@contextmanager
def _forbidden_calls() -> Iterator[None]:
    """Collectives of torch.distributed raise, so that ones without tensors are noticed as well."""
    names = ["all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier", "broadcast",
             "broadcast_object_list", "gather", "gather_object", "reduce_scatter_tensor", "scatter", "send", "recv",
             "new_group", "monitored_barrier"]  # fmt: skip
    originals = {name: getattr(dist, name) for name in names}
    try:
        for name in names:
            setattr(dist, name, functools.partial(_forbidden, name))
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _forbidden(name: str, *args: Any, **kwargs: Any) -> Any:
    raise AssertionError(f"{name} was called")


Case = Callable[[], None]
