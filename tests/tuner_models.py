"""The models of the tuner catalogue: tiny, seeded, with trained-looking values in every tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from tests.tiny_llama import VOCABULARY, base_model


class ConvNet(nn.Module):
    """For the tuners that have layers of their own for convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        pixels = input_ids.to(self.head.weight.dtype).view(1, 1, 2, 4).expand(1, 3, 2, 4)
        hidden = F.relu(self.second(F.relu(self.first(pixels))))
        out: torch.Tensor = self.head(hidden.mean(dim=(2, 3)))
        return out


def llama(dtype: torch.dtype) -> nn.Module:
    return base_model(dtype)


def tied_llama(dtype: torch.dtype) -> nn.Module:
    return base_model(dtype, tie_word_embeddings=True)


def biased_llama(dtype: torch.dtype) -> nn.Module:
    return base_model(dtype, attention_bias=True, mlp_bias=True)


def conv_net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    return ConvNet().to(dtype)


def mixture(dtype: torch.dtype) -> nn.Module:
    """Its experts are three-dimensional parameters, which `target_parameters` is for."""
    torch.manual_seed(7)
    config = MixtralConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=1, intermediate_size=14, vocab_size=VOCABULARY,
        num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    return MixtralForCausalLM(config).to(dtype)


def adapted(base: nn.Module, config: PeftConfig) -> Any:
    torch.manual_seed(8)
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def randomise(model: nn.Module) -> None:
    """Give every floating-point tensor of the model other values than it was built with; the same for the same model.

    Indices and masks stay as they are: they have to be valid. A tensor with several names is filled once.
    """
    torch.manual_seed(10)
    with torch.no_grad():
        for tensor in dict.fromkeys(_floating(model)):
            tensor.copy_(torch.empty(tensor.shape).uniform_(0.05, 0.25))


def _floating(model: nn.Module) -> Iterator[torch.Tensor]:
    for _, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            yield tensor


def run_forward(model: nn.Module, **inputs: Any) -> torch.Tensor:
    """A loss on eight tokens."""
    tokens = torch.arange(8).view(1, 8) * 5 % VOCABULARY
    output = model(input_ids=tokens, **inputs)
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits.float().square().mean()
