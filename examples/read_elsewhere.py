"""Read a checkpoint of async_ckpt without async_ckpt: with safetensors, with torch.distributed.checkpoint, with PEFT.

    python examples/read_elsewhere.py runs/zen/latest

Prints what each reader finds in the adapter and in the training state, and fails if they disagree.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader


def by_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                tensors[name] = file.get_tensor(name)
    return tensors


def by_dcp(folder: Path) -> dict[str, torch.Tensor]:
    """As on any rank of a torch job; here in one process. With DTensors in the dict each rank reads its own part."""
    described = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()}
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """So that a NaN, which some states hold, equals itself."""
    return tensor.reshape(-1).view(torch.uint8)


def compare(folder: Path) -> int:
    plain, distributed = by_safetensors(folder), by_dcp(folder)
    if not plain or plain.keys() != distributed.keys():
        raise SystemExit(f"{folder}: {len(plain)} tensors by safetensors, {len(distributed)} by torch")
    for name, tensor in plain.items():
        if not torch.equal(as_bytes(tensor), as_bytes(distributed[name])):
            raise SystemExit(f"{folder}: {name} differs between the readers")
    return len(plain)


def main() -> None:
    checkpoint = Path(sys.argv[1])
    print(f"{compare(checkpoint)} tensors of the adapter: safetensors and torch.distributed.checkpoint agree")
    if (checkpoint / "training_state").exists():
        print(f"{compare(checkpoint / 'training_state')} tensors of the training state: both agree")


if __name__ == "__main__":
    main()
