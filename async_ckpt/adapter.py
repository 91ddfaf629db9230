"""A PEFT adapter as the list of tensors that its checkpoint holds, and where each of them lies in the live model.

PEFT itself decides the names: it is called once on the unwrapped tree with meta placeholders in the tensors' places,
and each tensor of its answer is recognised by identity. So no weight is read, no hook of a wrapper runs, and every
tuner whose file holds copies of parameters works without a rule of its own.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from async_ckpt.core.errors import CheckpointError
from async_ckpt.sharding import Shard, find_shards
from async_ckpt.sharding.dtensor import original_class
from async_ckpt.sharding.fsdp1 import FlatShard
from async_ckpt.sharding.names import join, listed_quickly, spliced, unwrap, walk

from . import adalora
from .adalora import Pattern
from .contents import Contents, NamedTensor, check_storable
from .special_tuners import instead_of, kind_of, plain_attributes, prompt_source, refuse_computed

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class AdapterPlan:
    """What a checkpoint of one adapter consists of.

    `subfolder` is where PEFT puts the adapter: "" for the one named "default", else its name. `documents` maps paths
    relative to the checkpoint directory to their contents: adapter_config.json, in the subfolder, and README.md.
    """

    subfolder: str
    tensors: tuple[NamedTensor, ...]
    documents: dict[str, bytes]
    version: Callable[[], object]
    base_model: str | None

    @property
    def contents(self) -> Contents:
        folder = f"{self.subfolder}/" if self.subfolder else ""
        bases = {f"{folder}{CONFIG_FILE}": self.base_model} if self.base_model else {}
        return Contents({f"{folder}{ADAPTER_FILE}": self.tensors}, self.documents, self.version, bases)


def holds_adapters(model: nn.Module) -> bool:
    """Whether there is a PeftModel in `model`, however that is wrapped."""
    return any(isinstance(module, PeftModel) for _, module in walk(model))


def plan_adapter(
    model: nn.Module, adapter_name: str = "default", *, documents: bool, shards: Mapping[str, Shard] | None = None
) -> AdapterPlan:
    """List the tensors that PEFT's `save_pretrained` would write for this adapter, each with its local shard.

    Guarantee: runs no collective, uses no network, and leaves the model and its configuration as they were. Every rank
    gets the same names, shapes and dtypes in the same order. `model` may be wrapped by DDP, FSDP or `torch.compile`, or
    contain the PeftModel. With `documents` False the plan's `documents` are empty: only one rank has to write them.
    `shards`: `find_shards(model)`, if that is known.

    Raises CheckpointError if there is no such adapter, and for what cannot be saved as a copy of the model's tensors.
    """
    path, peft_model = _find_peft_model(model, adapter_name)
    config = _config_of(peft_model, adapter_name)
    shards = find_shards(model) if shards is None else shards
    refuse_computed(peft_model, config, adapter_name)
    _refuse_unmappable(peft_model, config, adapter_name, shards)
    subfolder = "" if adapter_name == "default" else adapter_name
    reduced = adalora.reduced_pattern(config, adapter_name)
    with spliced(peft_model) as tree:
        sources = _name_tensors(tree, path, config, adapter_name, shards)
        files = _write_documents(tree, config, subfolder, reduced) if documents else {}
    if not sources:
        raise CheckpointError(
            f"adapter {adapter_name!r} ({kind_of(config)}) has no tensors to save; check that its target_modules match "
            "the model's module names"
        )
    selection = adalora.Selection(reduced or {})
    tensors = tuple(NamedTensor(name, selection.apply(name, shard)) for name, shard in sorted(sources.items()))
    for tensor in tensors:
        check_storable(tensor, "adapter")
    base_model = _base_model(peft_model, config)
    return AdapterPlan(subfolder, tensors, files, lambda: adalora.version(config), base_model)


def _find_peft_model(model: nn.Module, adapter_name: str) -> tuple[str, Any]:
    """The PeftModel, and its canonical path in `model`."""
    found: dict[Any, str] = {}
    for path, module in walk(model):
        if isinstance(module, PeftModel):
            found.setdefault(module, path)
    if len(found) == 1:
        ((peft_model, path),) = found.items()
        return path, peft_model
    kind = type(unwrap(model)).__name__
    if not found:
        raise CheckpointError(
            f"the model is a {kind} without a PeftModel in it, so it has no adapter named {adapter_name!r}; wrap it "
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


def _refuse_unmappable(peft_model: Any, config: Any, adapter_name: str, shards: Mapping[str, Shard]) -> None:
    modules = [module for _, module in walk(peft_model)]
    if any("_tp_info" in vars(module) for module in modules):
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


def _name_tensors(
    tree: Any, path: str, config: Any, adapter_name: str, shards: Mapping[str, Shard]
) -> dict[str, Shard]:
    """File name -> source, as PEFT tells it for the unwrapped `tree`, which lies at `path` in the model."""
    prefix = join(path, "")
    names = {name.removeprefix(prefix): name for name in shards if name.startswith(prefix)}
    placeholders = {
        local: torch.empty(shards[name].shape, dtype=shards[name].dtype, device="meta") for local, name in names.items()
    }
    embeddings = True if _vocabulary_was_resized(tree, config) else "auto"
    with _registered(tree, placeholders), _asked_for_names_only(config), listed_quickly(tree):
        try:
            saved = get_peft_model_state_dict(
                tree, state_dict=placeholders, adapter_name=adapter_name, save_embedding_layers=embeddings
            )
        except Exception as error:
            raise CheckpointError(
                f"PEFT could not list the tensors of adapter {adapter_name!r} ({kind_of(config)}): {error!r}; if "
                "save_pretrained works for this model, save with it instead and report this"
            ) from error
    known = {id(placeholder): shards[names[local]] for local, placeholder in placeholders.items()}
    known |= plain_attributes(tree, path)
    sources = {}
    for name, tensor in saved.items():
        source = known.get(id(tensor))
        if source is None and (local := prompt_source(config, adapter_name, name)) in names:
            source = shards[names[local]]
        if source is None:
            raise CheckpointError(
                f"tensor {name!r} of adapter {adapter_name!r} ({kind_of(config)}) is computed when PEFT saves it, not "
                f"copied from a tensor of the model, which async_ckpt cannot do; {instead_of(config)}"
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
        if kind_of(config) == "ADALORA":
            config.rank_pattern = None  # all names; what is kept of them is selected afterwards
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


def _base_model(peft_model: Any, config: Any) -> str | None:
    """As PEFT fills it in: what the configuration says, else where the base model was loaded from."""
    if config.base_model_name_or_path is not None:
        return str(config.base_model_name_or_path)
    return vars(unwrap(peft_model.get_base_model())).get("name_or_path") or None


def _write_documents(tree: Any, config: Any, subfolder: str, reduced: Pattern | None) -> dict[str, bytes]:
    """adapter_config.json and README.md as PEFT writes them into a directory that was empty."""
    config = copy.deepcopy(config)
    base = tree.get_base_model()
    config.base_model_name_or_path = _base_model(tree, config)
    config.inference_mode = True
    if reduced is not None:
        config.rank_pattern = reduced
    auto_mapping = None
    if config.task_type is None:
        base_class = original_class(base)
        auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    with tempfile.TemporaryDirectory() as folder:
        tree.create_or_update_model_card(folder)
        config.save_pretrained(os.path.join(folder, subfolder), auto_mapping_dict=auto_mapping)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
