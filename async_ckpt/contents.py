"""What a checkpoint holds besides the training state: files of named tensors, and documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from async_ckpt.core.errors import CheckpointError

from .sharding import Shard

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


@dataclass(frozen=True)
class NamedTensor:
    """`name` is the tensor's name in the file, `shard` its source in the model."""

    name: str
    shard: Shard


@dataclass(frozen=True)
class Contents:
    """Paths are relative to the checkpoint directory. `files` are safetensors files that each save fills anew;
    `documents` are the same in every save, and empty on ranks that do not have to write them. What `version` returns
    changes when other tensors or documents would have to be written than these. `base_models` says, by the path of an
    adapter's configuration, which model it was trained on."""

    files: Mapping[str, tuple[NamedTensor, ...]]
    documents: dict[str, bytes]
    version: Callable[[], object] = lambda: None
    base_models: Mapping[str, str] = field(default_factory=dict)


def joined(several: Sequence[Contents]) -> Contents:
    """One checkpoint that holds all of them. What two of them have to say of one document is the same."""
    files = {path: tensors for contents in several for path, tensors in contents.files.items()}
    documents = {path: content for contents in reversed(several) for path, content in contents.documents.items()}
    bases = {path: name for contents in several for path, name in contents.base_models.items()}
    return Contents(files, documents, lambda: [contents.version() for contents in several], bases)


def check_storable(tensor: NamedTensor, owner: str) -> None:
    """Raise CheckpointError unless `tensor`, of the `owner` ("adapter", "model"), has bytes that can be copied."""
    local = tensor.shard.local()
    if local.is_meta:
        raise CheckpointError(
            f"tensor {tensor.name!r} of the {owner} is on the meta device: it has no values yet; materialise the "
            f"{owner} (to_empty and initialise, or load it) before attach()"
        )
    if type(local) is not torch.Tensor or tensor.shard.dtype not in SAFETENSORS_DTYPE:
        raise CheckpointError(
            f"tensor {tensor.name!r} of the {owner} is a {type(local).__name__} of dtype {tensor.shard.dtype}, which "
            f"cannot be copied into a safetensors file; keep the {owner} in plain floating-point tensors"
        )
