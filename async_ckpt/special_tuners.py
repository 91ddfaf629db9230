"""The tuners whose tensors PEFT does not pick from the state dict: where they lie, and which cannot be copied."""

from __future__ import annotations

from typing import Any

from torch import nn

from async_ckpt.core.errors import CheckpointError

from .sharding import Shard
from .sharding.names import join, walk
from .sharding.replicated import BufferShard

# Prompt learning: PEFT saves what the prompt encoder answers. For these kinds that is one of its parameters as it is.
# Kinds are compared by name: older versions of PEFT lack some of them.
_EMBEDDING = {"prompt_embeddings": "embedding.weight"}
_PROMPT_SOURCES = {
    "PROMPT_TUNING": _EMBEDDING,
    "PREFIX_TUNING": _EMBEDDING,
    "MULTITASK_PROMPT_TUNING": {
        **_EMBEDDING,
        "prefix_task_cols": "prefix_task_cols",
        "prefix_task_rows": "prefix_task_rows",
    },
    "CARTRIDGE": {"prompt_embeddings": "trainable_embedding"},
}


def kind_of(config: Any) -> str:
    """PEFT's name of the tuner, such as "LORA"."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def refuse_computed(peft_model: Any, config: Any, adapter_name: str) -> None:
    """Raise CheckpointError for a tuner of which PEFT would save values that no tensor of the model holds."""
    kind = kind_of(config)
    prompt = f"tensor 'prompt_embeddings' of adapter {adapter_name!r} ({kind})"
    if getattr(config, "prefix_projection", False):
        raise CheckpointError(
            f"{prompt} is computed by a projection when PEFT saves it, which async_ckpt cannot do; "
            "use prefix_projection=False"
        )
    if kind == "CARTRIDGE" and config.num_frozen_tokens:
        raise CheckpointError(
            f"{prompt} is joined from two parameters when PEFT saves it, which async_ckpt cannot do; "
            "set num_frozen_tokens=0, or save with save_pretrained"
        )
    if config.is_prompt_learning and kind not in _PROMPT_SOURCES:
        raise CheckpointError(
            f"{prompt} is computed by the prompt encoder when PEFT saves it, which async_ckpt cannot do; "
            "use prompt tuning or prefix tuning, or save with save_pretrained"
        )
    if kind == "ADAPTION_PROMPT" and peft_model.base_model._active_adapter != adapter_name:
        raise CheckpointError(
            f"adapter {adapter_name!r} ({kind}) is not the active one, and PEFT keeps the prompts of inactive "
            f"adapters outside of the model; call set_adapter({adapter_name!r}) before wrapping the model"
        )


def prompt_source(config: Any, adapter_name: str, name: str) -> str | None:
    """The parameter, below the PeftModel, that a prompt learning adapter's tensor `name` is a copy of."""
    attribute = _PROMPT_SOURCES.get(kind_of(config), {}).get(name)
    return f"prompt_encoder.{adapter_name}.{attribute}" if attribute else None


def instead_of(config: Any) -> str:
    """What to do about a tensor that PEFT computes."""
    if getattr(config, "save_only_topk_weights", False):
        return "use save_only_topk_weights=False"
    return "save with save_pretrained"


def plain_attributes(tree: nn.Module, path: str) -> dict[int, Shard]:
    """By object id, the tensors that PEFT saves although no module registers them: the indices of ShiRA.

    They are chosen when the adapter is made and then stay; every rank has them whole, as it has buffers.
    """
    found: dict[int, Shard] = {}
    for module_path, module in walk(tree):
        indices = vars(module).get("shira_indices", {})
        for key, tensor in indices.items():
            name = join(path, join(module_path, f"shira_indices.{key}"))
            found[id(tensor)] = BufferShard(name, indices, key, tensor)
    return found
