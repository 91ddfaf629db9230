"""A PEFT adapter as the list of tensors that its checkpoint holds, and where each of them lies in the live model.

PEFT itself decides the names: it is called once on the unwrapped tree with meta placeholders in the tensors' places,
and each tensor of its answer is recognised by identity. So no weight is read, no hook of a wrapper runs, and every
tuner whose file holds copies of parameters works without a rule of its own.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel, PeftType
from peft.utils import get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from async_ckpt.core.errors import CheckpointError
from async_ckpt.sharding import Shard, find_shards
from async_ckpt.sharding.dtensor import original_class
from async_ckpt.sharding.fsdp1 import FlatShard
from async_ckpt.sharding.names import join, spliced, unwrap, walk

# What safetensors calls the dtypes of torch. Two 4-bit floats in a byte are left out: the shapes differ.
SAFETENSORS_DTYPE: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    SAFETENSORS_DTYPE[torch.float8_e8m0fnu] = "F8_E8M0"

# Prompt learning: PEFT saves what the prompt encoder answers. For these kinds that is its embedding as it is.
_COPIED_PROMPTS = frozenset({PeftType.PROMPT_TUNING, PeftType.PREFIX_TUNING, PeftType.MULTITASK_PROMPT_TUNING})
_PROMPT_SOURCES = {
    "prompt_embeddings": "embedding.weight",
    "prefix_task_cols": "prefix_task_cols",
    "prefix_task_rows": "prefix_task_rows",
}


@dataclass(frozen=True)
class AdapterTensor:
    """`name` is the tensor's name in adapter_model.safetensors, `shard` its source in the model."""

    name: str
    shard: Shard


@dataclass(frozen=True)
class AdapterPlan:
    """What a checkpoint of one adapter consists of.

    `subfolder` is where PEFT puts the adapter: "" for the one named "default", else its name. `documents` maps paths
    relative to the checkpoint directory to their contents: adapter_config.json, in the subfolder, and README.md.
    """

    subfolder: str
    tensors: tuple[AdapterTensor, ...]
    documents: dict[str, bytes]


def plan_adapter(model: nn.Module, adapter_name: str = "default", *, documents: bool) -> AdapterPlan:
    """List the tensors that PEFT's `save_pretrained` would write for this adapter, each with its local shard.

    Guarantee: runs no collective, uses no network, and leaves the model and its configuration as they were. Every rank
    gets the same names, shapes and dtypes in the same order. `model` may be wrapped by DDP, FSDP or `torch.compile`, or
    contain the PeftModel. With `documents` False the plan's `documents` are empty: only one rank has to write them.

    Raises CheckpointError if there is no such adapter, and for what cannot be saved as a copy of the model's tensors.
    """
    path, peft_model = _find_peft_model(model)
    config = _config_of(peft_model, adapter_name)
    shards = find_shards(model)
    _refuse_unsupported(peft_model, config, adapter_name, shards)
    subfolder = "" if adapter_name == "default" else adapter_name
    with spliced(peft_model) as tree:
        sources = _name_tensors(tree, path, config, adapter_name, shards)
        files = _write_documents(tree, config, subfolder) if documents else {}
    if not sources:
        raise CheckpointError(
            f"adapter {adapter_name!r} ({_kind(config)}) has no tensors to save; check that its target_modules match "
            "the model's module names"
        )
    tensors = tuple(AdapterTensor(name, shards[source]) for name, source in sorted(sources.items()))
    for tensor in tensors:
        _check_storable(tensor)
    if config.peft_type == PeftType.ADALORA:
        tensors = tuple(AdapterTensor(tensor.name, _FullRankShard(tensor.shard, config)) for tensor in tensors)
    return AdapterPlan(subfolder, tensors, files)


def _find_peft_model(model: nn.Module) -> tuple[str, Any]:
    """The PeftModel, and its canonical path in `model`."""
    found = {module: path for path, module in reversed(list(walk(model))) if isinstance(module, PeftModel)}
    if len(found) == 1:
        ((peft_model, path),) = found.items()
        return path, peft_model
    kind = type(unwrap(model)).__name__
    if not found:
        raise CheckpointError(
            f"the model is a {kind} without a PeftModel in it, and saving full models is not supported yet; wrap it "
            "with peft.get_peft_model before FSDP or DDP"
        )
    raise CheckpointError(
        f"the {kind} holds {len(found)} PeftModels, at {', '.join(sorted(found.values()))}; pass the one to be saved"
    )


def _config_of(peft_model: Any, adapter_name: str) -> Any:
    configs: dict[str, Any] = peft_model.peft_config
    if adapter_name not in configs:
        raise CheckpointError(
            f"the model has no adapter named {adapter_name!r}; it has {', '.join(map(repr, sorted(configs)))}: pass "
            "one of these as adapter_name"
        )
    if "/" in adapter_name or "\\" in adapter_name:  # it becomes a folder of the checkpoint, and must stay inside
        raise CheckpointError(
            f"adapter name {adapter_name!r} is no plain folder name; add the adapter under another one"
        )
    return configs[adapter_name]


def _refuse_unsupported(peft_model: Any, config: Any, adapter_name: str, shards: Mapping[str, Shard]) -> None:
    prompt = f"tensor 'prompt_embeddings' of adapter {adapter_name!r} ({_kind(config)})"
    if getattr(config, "prefix_projection", False):
        raise CheckpointError(
            f"{prompt} is computed by a projection when PEFT saves it, which async_ckpt cannot do; "
            "use prefix_projection=False"
        )
    if config.is_prompt_learning and config.peft_type not in _COPIED_PROMPTS:
        raise CheckpointError(
            f"{prompt} is computed by the prompt encoder when PEFT saves it, which async_ckpt cannot do; "
            "use prompt tuning or prefix tuning, or save with save_pretrained"
        )
    if config.peft_type == PeftType.ADALORA and config.rank_pattern is not None:
        raise _reduced_rank(f"adapter {adapter_name!r}")
    modules = [module for _, module in walk(peft_model)]
    if any(hasattr(module, "_tp_info") for module in modules):
        raise CheckpointError(
            "the model is sharded by transformers' older tensor parallelism, whose plain tensors do not say which part "
            "they are; use a transformers whose tensor parallelism makes DTensors"
        )
    flattened = any(isinstance(shard, FlatShard) and not shard.uses_orig_params for shard in shards.values())
    for module in modules if flattened else []:
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            raise CheckpointError(
                f"adapter {adapter_name!r} has modules_to_save {config.modules_to_save}, whose parameters FSDP1 hides "
                "when use_orig_params is False; wrap the model with use_orig_params=True"
            )


def _name_tensors(tree: Any, path: str, config: Any, adapter_name: str, shards: Mapping[str, Shard]) -> dict[str, str]:
    """File name -> canonical name, as PEFT tells it for the unwrapped `tree`, which lies at `path` in the model."""
    prefix = join(path, "")
    names = {name.removeprefix(prefix): name for name in shards if name.startswith(prefix)}
    placeholders = {
        local: torch.empty(shards[name].shape, dtype=shards[name].dtype, device="meta") for local, name in names.items()
    }
    embeddings = True if _vocabulary_was_resized(tree, config) else "auto"
    with _registered(tree, placeholders), _asked_for_names_only(config):
        try:
            saved = get_peft_model_state_dict(
                tree, state_dict=placeholders, adapter_name=adapter_name, save_embedding_layers=embeddings
            )
        except Exception as error:
            raise CheckpointError(
                f"PEFT could not list the tensors of adapter {adapter_name!r} ({_kind(config)}): {error!r}; if "
                "save_pretrained works for this model, save with it instead and report this"
            ) from error
    known = {id(placeholder): names[local] for local, placeholder in placeholders.items()}
    sources = {}
    for name, tensor in saved.items():
        source = known.get(id(tensor))
        if source is None and config.is_prompt_learning and name in _PROMPT_SOURCES:
            source = names.get(f"prompt_encoder.{adapter_name}.{_PROMPT_SOURCES[name]}")
        if source is None:
            raise CheckpointError(
                f"tensor {name!r} of adapter {adapter_name!r} ({_kind(config)}) is computed when PEFT saves it, not "
                "copied from a tensor of the model, which async_ckpt cannot do; save with save_pretrained"
            )
        sources[name] = source
    return sources


@contextmanager
def _registered(tree: nn.Module, placeholders: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the block every placeholder's name is registered in its module.

    FSDP1 takes parameters out of their modules while a unit is unsharded, and PEFT asks the modules in modules_to_save
    for their names: without this a tensor could be missing from the file.
    """
    modules = dict(walk(tree))
    added: list[tuple[nn.Module, str]] = []
    try:
        for name, placeholder in placeholders.items():
            path, _, attribute = name.rpartition(".")
            module = modules[path]
            if attribute not in module._parameters and attribute not in module._buffers:
                module._parameters[attribute] = nn.Parameter(placeholder, requires_grad=False)
                added.append((module, attribute))
        yield
    finally:
        for module, attribute in added:
            del module._parameters[attribute]


@contextmanager
def _asked_for_names_only(config: Any) -> Iterator[None]:
    """Within the block PEFT neither asks the model hub nor runs a prompt encoder; `config` is restored afterwards."""
    before = dict(vars(config))
    try:
        config.base_model_name_or_path = None
        if config.is_prompt_learning:
            config.inference_mode = True
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)


def _vocabulary_was_resized(peft_model: Any, config: Any) -> bool:
    """Whether the embeddings must be saved because their size is not the base model's, by PEFT's own rule.

    PEFT asks the model hub for the base model's configuration. Here only the local folder or the hub's cache counts,
    where it lies on every host that loaded the model: ranks must not differ because one of them reached the network.
    """
    model_id = config.base_model_name_or_path
    vocabulary = getattr(getattr(peft_model, "config", None), "vocab_size", None)
    if not model_id or not vocabulary:
        return False
    file: Any = os.path.join(model_id, "config.json")
    if not os.path.exists(file):
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in {"1", "true", "yes", "on", "y", "t"}:
            return False  # what PEFT assumes when it may not ask
        try:
            file = try_to_load_from_cache(model_id, "config.json")
        except ValueError:  # neither a folder nor a name that the hub allows
            return False
    if not isinstance(file, str):
        return False
    base = type(peft_model.config).from_pretrained(os.path.dirname(file))
    return bool(base.vocab_size != vocabulary)


def _write_documents(tree: Any, config: Any, subfolder: str) -> dict[str, bytes]:
    """adapter_config.json and README.md as PEFT writes them into a directory that was empty."""
    config = copy.deepcopy(config)
    base = tree.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = vars(base).get("name_or_path") or None
    config.inference_mode = True
    auto_mapping = None
    if config.task_type is None:
        base_class = original_class(base)
        auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    with tempfile.TemporaryDirectory() as folder:
        tree.create_or_update_model_card(folder)
        config.save_pretrained(os.path.join(folder, subfolder), auto_mapping_dict=auto_mapping)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _check_storable(tensor: AdapterTensor) -> None:
    local = tensor.shard.local()
    if local.is_meta:
        raise CheckpointError(
            f"tensor {tensor.name!r} of the adapter is on the meta device: it has no values yet; materialise the "
            "adapter (to_empty and initialise, or load it) before attach()"
        )
    if type(local) is not torch.Tensor or tensor.shard.dtype not in SAFETENSORS_DTYPE:
        raise CheckpointError(
            f"tensor {tensor.name!r} of the adapter is a {type(local).__name__} of dtype {tensor.shard.dtype}, which "
            "cannot be copied into a safetensors file; keep the adapter in plain floating-point tensors"
        )


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _reduced_rank(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} is an AdaLoRA adapter whose ranks were reduced (rank_pattern is set): PEFT then saves selected rows "
        "of lora_A, lora_B and lora_E, which async_ckpt cannot do yet; save with save_pretrained from here on"
    )


class _FullRankShard(Shard):
    """A tensor of AdaLoRA, which may be copied whole only until the first rank is reduced."""

    def __init__(self, shard: Shard, config: Any) -> None:
        super().__init__(shard.name, shard.shape, shard.dtype, shard.region)
        self._shard = shard
        self._config = config

    @property
    def is_buffer(self) -> bool:
        return self._shard.is_buffer

    def local(self) -> torch.Tensor:
        if self._config.rank_pattern is not None:
            raise _reduced_rank(f"{self.name!r}")
        return self._shard.local()
