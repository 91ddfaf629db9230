"""A whole transformers model as the files that `save_pretrained` would write, and where their tensors lie.

transformers itself decides the names and the split: its own functions are given a skeleton of the model, unwrapped and
with meta placeholders in the tensors' places, and each tensor of their answer is recognised by identity. So no weight
is read, no hook of a wrapper runs, and tied weights, renamed keys and buffers come out as transformers has them.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn
from transformers import PreTrainedModel

from async_ckpt.core.errors import CheckpointError
from async_ckpt.sharding import Shard, find_shards
from async_ckpt.sharding.dtensor import original_class
from async_ckpt.sharding.names import join, unwrap, walk

from .contents import Contents, NamedTensor, check_storable

_FILES = "model{suffix}.safetensors"
_INDEX = "model.safetensors.index.json"


def plan_full_model(model: nn.Module, *, max_shard_size: int | str, documents: bool) -> Contents:
    """List the files that `save_pretrained(max_shard_size=...)` of the unwrapped model would write.

    Guarantee: runs no collective, uses no network, reads no tensor's data, and leaves the model and its configuration
    as they were. Every rank gets the same files with the same tensors. `model` may be wrapped by DDP, FSDP or
    `torch.compile`. The documents are config.json, generation_config.json if the model generates, the index if there
    is more than one file, and the code of a model that brings its own; with `documents` False there are none.

    Raises CheckpointError if `model` is no transformers model, and for one that cannot be saved as a copy of its
    tensors: quantised, converted or computed while it is saved.
    """
    path, owner = _find_model(model)
    _refuse_unsupported(owner)
    skeleton = _skeleton(owner, path, find_shards(model))
    saved = _list_tensors(skeleton)
    split = _split(saved, max_shard_size)
    files = {
        file: tuple(NamedTensor(name, skeleton.sources[id(saved[name])]) for name in names)
        for file, names in split.filename_to_tensors.items()
    }
    for tensors in files.values():
        for tensor in tensors:
            check_storable(tensor, "model")
    return Contents(files, _documents(owner, skeleton.root, split) if documents else {})


# --- which model ------------------------------------------------------------------------------------------------------


def _find_model(model: nn.Module) -> tuple[str, Any]:
    """The transformers model, and its canonical path in `model`: everything that `model` holds must belong to it."""
    found = next(((path, module) for path, module in walk(model) if isinstance(module, PreTrainedModel)), None)
    kind = original_class(unwrap(model)).__name__
    if found is None:
        raise CheckpointError(
            f"the model is a {kind} and holds neither a PeftModel nor a transformers PreTrainedModel, so nothing says "
            "what its checkpoint should look like; attach a transformers model, or wrap the model with "
            "peft.get_peft_model before FSDP or DDP, or give weights='trainable' or weights='all'"
        )
    path, owner = found
    prefix = join(path, "")
    outside = [name for name in find_shards(model) if not name.startswith(prefix)] if path else []
    if outside:
        raise CheckpointError(
            f"the model is a {kind} that holds a {original_class(owner).__name__} at {path!r} and {len(outside)} "
            f"tensors beside it, such as {outside[0]!r}, which save_pretrained would leave out; attach model.{path} to "
            "save that part alone"
        )
    return path, owner


def _refuse_unsupported(owner: Any) -> None:
    kind = original_class(owner).__name__
    if getattr(owner, "hf_quantizer", None) is not None or getattr(owner, "is_quantized", False):
        raise CheckpointError(
            f"the {kind} is quantised, and transformers computes what it saves of such a model; load it without a "
            "quantization_config (dequantised), or train a PEFT adapter on it, which async_ckpt can save"
        )
    if getattr(owner, "_hf_peft_config_loaded", False):
        raise CheckpointError(
            f"the {kind} has adapters that were added with add_adapter or load_adapter, of which save_pretrained saves "
            "only the active one; use peft.get_peft_model, whose adapters async_ckpt can save"
        )
    own_class: Any = original_class(owner)
    if own_class.save_pretrained is not PreTrainedModel.save_pretrained:
        raise CheckpointError(f"the {kind} has a save_pretrained of its own, which async_ckpt cannot do; save with it")
    if any("_tp_info" in vars(module) for _, module in walk(owner)):
        raise CheckpointError(
            "the model is sharded by transformers' older tensor parallelism, whose plain tensors do not say which part "
            "they are; use a transformers whose tensor parallelism makes DTensors"
        )


# --- its names --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Skeleton:
    """The model without its wrappers and its data; `sources` finds by `id` what a placeholder stands for."""

    root: Any
    sources: Mapping[int, Shard]


def _skeleton(owner: nn.Module, path: str, shards: Mapping[str, Shard]) -> _Skeleton:
    """A tree of new modules with the classes and the attributes of the live ones, which stay untouched: FSDP may have
    taken parameters out of them, and they may not be asked for a state_dict, since FSDP's hooks would run."""
    by_module: dict[str, dict[str, Shard]] = defaultdict(dict)
    for name, shard in shards.items():
        module_path, _, attribute = name.rpartition(".")
        by_module[module_path][attribute] = shard
    placeholders: dict[tuple[Hashable, bool], torch.Tensor] = {}
    sources: dict[int, Shard] = {}
    copies: dict[nn.Module, Any] = {}

    def placeholder(shard: Shard) -> torch.Tensor:
        key = (shard.identity, shard.is_buffer)  # names of one tied tensor get one placeholder
        if key not in placeholders:
            tensor = torch.empty(shard.shape, dtype=shard.dtype, device="meta")
            placeholders[key] = tensor if shard.is_buffer else nn.Parameter(tensor, requires_grad=False)
            sources[id(placeholders[key])] = shard
        return placeholders[key]

    def bare(wrapped: nn.Module, at: str) -> Any:
        module = unwrap(wrapped)
        if module in copies:
            return copies[module]
        held = by_module[at]
        skeleton: Any = object.__new__(original_class(module))
        attributes = {key: value for key, value in vars(module).items() if key not in held}
        attributes["_parameters"] = {key: placeholder(held[key]) for key in _ordered(module, held)}
        attributes["_buffers"] = {key: placeholder(shard) for key, shard in held.items() if shard.is_buffer}
        attributes["_modules"] = {
            key: child if child is None else bare(child, join(at, key)) for key, child in module._modules.items()
        }
        # Those of FSDP2 would reshard the live module.
        hooks = {key: hook for key, hook in module._state_dict_pre_hooks.items() if not _is_of_torch(hook)}
        attributes["_state_dict_pre_hooks"] = hooks
        vars(skeleton).update(attributes)
        copies[module] = skeleton
        return skeleton

    return _Skeleton(bare(owner, path), sources)


def _is_of_torch(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


def _ordered(module: nn.Module, held: Mapping[str, Shard]) -> list[str]:
    """The parameters among `held` in the order in which the module registered them: the split goes by it. Those that
    FSDP1 has taken out for the moment follow in its own order, which is the one in which it puts them back."""
    registered = [key for key in module._parameters if key in held]
    return registered + [key for key, shard in held.items() if not shard.is_buffer and key not in module._parameters]


def _list_tensors(skeleton: _Skeleton) -> dict[str, torch.Tensor]:
    """Name in the files -> placeholder, in the order in which transformers would write them."""
    root = skeleton.root
    kind = type(root).__name__
    remove_tied_weights, revert_conversion = _functions_of_transformers()
    try:
        state = root.state_dict(keep_vars=True)
        for name in root._keys_to_ignore_on_save or ():
            state.pop(name, None)
        saved: dict[str, torch.Tensor] = revert_conversion(root, remove_tied_weights(state, root))
    except Exception as error:
        raise CheckpointError(
            f"transformers could not list the tensors of the {kind}: {error!r}; if save_pretrained works for this "
            "model, save with it instead and report this"
        ) from error
    computed = [name for name, tensor in saved.items() if id(tensor) not in skeleton.sources]
    if computed:
        raise CheckpointError(
            f"{len(computed)} tensors of the {kind}, such as {computed[0]!r}, are computed when transformers saves "
            "them (experts split up, weights merged or converted), not copied from tensors of the model, which "
            "async_ckpt cannot do; save with save_pretrained, or train a PEFT adapter"
        )
    if not saved:
        raise CheckpointError(f"the {kind} has no tensors to save")
    return saved


def _functions_of_transformers() -> tuple[Any, Any]:
    try:
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict
    except ImportError as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} does not tell how it names a model's tensors ({error}); saving "
            "whole models needs transformers 5 (tested with 5.23)"
        ) from error
    return remove_tied_weights_from_state_dict, revert_weight_conversion


def _split(saved: Mapping[str, torch.Tensor], max_shard_size: int | str) -> Any:
    problem = "must be above 0" if isinstance(max_shard_size, int) and max_shard_size <= 0 else ""
    if not problem:
        try:
            return split_torch_state_dict_into_shards(
                dict(saved), filename_pattern=_FILES, max_shard_size=max_shard_size
            )
        except (ValueError, TypeError) as error:
            problem = str(error)
    raise CheckpointError(f"max_shard_size={max_shard_size!r}: {problem}; give bytes, or a string such as '5GB'")


# --- its documents ----------------------------------------------------------------------------------------------------


def _documents(owner: Any, root: Any, split: Any) -> dict[str, bytes]:
    """What save_pretrained writes beside the weights; the configuration is changed in a copy."""
    kind = type(root)
    config = copy.deepcopy(owner.config)
    config.dtype = str(root.dtype).split(".")[1]
    config.architectures = [kind.__name__]
    with tempfile.TemporaryDirectory() as folder:
        try:
            if kind.is_remote_code():
                transformers.dynamic_module_utils.custom_object_save(root, folder, config=config)
            config.save_pretrained(folder)
            if kind.can_generate():
                owner.generation_config.save_pretrained(folder)
        except ValueError as error:
            raise CheckpointError(f"save_pretrained refuses this {kind.__name__}: {error}") from error
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        documents = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    if split.is_sharded:
        metadata = {"total_parameters": root.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        documents[_INDEX] = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
    return documents
