"""The models of the tuner catalogue: tiny, seeded, with trained-looking values in every tensor."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.tiny_llama import VOCABULARY, base_model, lora


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


class AttentionNet(nn.Module):
    """torch's own attention keeps its projections as parameters without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.table(input_ids)
        out: torch.Tensor = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return out


def llama(dtype: torch.dtype) -> nn.Module:
    return base_model(dtype)


def llama_without_cache(dtype: torch.dtype) -> nn.Module:
    return base_model(dtype, use_cache=False)


def tied_llama(dtype: torch.dtype) -> nn.Module:
    return base_model(dtype, tie_word_embeddings=True)


def biased_llama(dtype: torch.dtype) -> nn.Module:
    return base_model(dtype, attention_bias=True, mlp_bias=True)


def classifier(dtype: torch.dtype) -> nn.Module:
    config = base_model().config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(7)
    return LlamaForSequenceClassification(config).to(dtype)


def encoder_decoder(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    config = T5Config(
        d_model=24, d_kv=8, d_ff=37, num_layers=2, num_heads=3, vocab_size=VOCABULARY, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).to(dtype)


def torch_attention(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    return AttentionNet().to(dtype)


def conv_net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    return ConvNet().to(dtype)


def mixture(dtype: torch.dtype) -> nn.Module:
    """Its experts are three-dimensional parameters, which `target_parameters` is for."""
    torch.manual_seed(7)
    config = MixtralConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=1, intermediate_size=16, vocab_size=VOCABULARY,
        num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    return MixtralForCausalLM(config).to(dtype)


@functools.cache
def experts() -> dict[str, str]:
    """Two saved LoRA adapters, which X-LoRA mixes. The folder stays for as long as this process."""
    folder = tempfile.TemporaryDirectory()
    paths = {str(number): f"{folder.name}/{number}" for number in range(2)}
    for path in paths.values():
        adapted(llama(torch.float32), lora()).save_pretrained(path)
    _FOLDERS.append(folder)
    return paths


_FOLDERS: list[Any] = []


class KMeans:
    """What AdaMSS asks of scikit-learn, where that is not installed: any clusters will do."""

    def __init__(self, n_clusters: int, **_: Any) -> None:
        self._clusters = n_clusters

    def fit_predict(self, rows: Any) -> Any:
        return np.arange(len(rows)) % self._clusters


@contextmanager
def clustering() -> Iterator[None]:
    """Within the block there is a scikit-learn, the real one or what AdaMSS needs of it."""
    if importlib.util.find_spec("sklearn") is not None:
        yield
        return
    cluster = ModuleType("sklearn.cluster")
    cluster.KMeans = KMeans  # type: ignore[attr-defined]
    stand_in = {"sklearn": ModuleType("sklearn"), cluster.__name__: cluster}
    sys.modules |= stand_in
    try:
        yield
    finally:
        for name in stand_in:
            del sys.modules[name]


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
    torch.manual_seed(12)
    tokens = torch.arange(8).view(1, 8) * 5 % VOCABULARY
    output = model(input_ids=tokens, **inputs)
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits.float().square().mean()
