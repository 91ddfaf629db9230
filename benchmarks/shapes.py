"""What is saved: LoRA adapters of Llama-3-70B's layers under FSDP2, with the base model on meta."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """LoRA of rank `lora_rank` on all linear layers of `layers` decoder layers: 14 tensors a layer, in bf16.

    `adamw`: its state is saved too. `ways` are measured `repetitions` times each, `loops` of them beside a training
    loop. `restores`: whether reading is measured as well.
    """

    name: str
    title: str
    world: int
    layers: int
    lora_rank: int
    ways: tuple[str, ...]
    repetitions: int
    loops: int
    adamw: bool = False
    restores: bool = False
    scale: int = 1  # the model's widths are divided by it

    @property
    def tensors(self) -> int:
        return self.layers * 14 * (4 if self.adamw else 1)


@dataclass(frozen=True)
class Subject:
    """One rank's part of a model: `parameters` are those that are saved, by name."""

    model: Any
    optimizer: torch.optim.Optimizer | None
    parameters: Mapping[str, DTensor]

    @property
    def locals(self) -> list[torch.Tensor]:
        return [parameter._local_tensor for parameter in self.parameters.values()]

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that is to be saved, flat, as DTensors: what the other libraries are given at each save. Cheaper
        than `model.state_dict()`, which their documentation calls and which would hold the base model too."""
        found: dict[str, torch.Tensor] = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        if self.optimizer is not None:
            for name, parameter in self.parameters.items():
                for key, value in self.optimizer.state[parameter].items():
                    found[f"optim.{name}.{key}"] = value
        return found


def build(shape: Shape) -> Subject:
    """The model of `shape`, sharded over all ranks; values are random and the same in every run."""
    config = LlamaConfig(
        hidden_size=8192 // shape.scale,
        intermediate_size=28672 // shape.scale,
        num_attention_heads=64,
        num_key_value_heads=8,
        num_hidden_layers=shape.layers,
        vocab_size=1024,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config).to(torch.bfloat16)
        model = get_peft_model(base, LoraConfig(r=shape.lora_rank, target_modules="all-linear"))
    torch.manual_seed(0)
    _materialise(model)
    frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, ignored_params=frozen)
    fully_shard(model, ignored_params=frozen)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(parameters) == shape.layers * 14
    optimizer = _stepped(parameters.values()) if shape.adamw else None
    return Subject(model, optimizer, parameters)


def local_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def total_bytes(subject: Subject) -> int:
    """What a checkpoint has to hold: the bytes of all tensors, on all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in subject.state().values())


def _materialise(model: nn.Module) -> None:
    """Give the adapter storage; PEFT leaves it where the base model is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                values = torch.randn(parameter.shape, dtype=torch.float32).to(device, torch.bfloat16)
                setattr(module, name, nn.Parameter(values))


def _stepped(parameters: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    dist.barrier()
    return optimizer
