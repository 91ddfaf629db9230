"""What one batched copy is given: targets and sources, grouped by device, cut so that the copy runs at full speed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Batch = tuple[list[torch.Tensor], list[torch.Tensor]]  # targets and sources, in parallel

_LINE_BYTES = 64  # a cache line, and the widest vector register
_WORTH_BYTES = 1 << 16  # below half of this a second entry in the batch costs more than it saves


@dataclass(frozen=True)
class Prepared:
    """`devices`: what lies on each device; `host`: what does not, of `host_bytes` bytes."""

    devices: dict[torch.device, Batch]
    host: Batch
    host_bytes: int

    @classmethod
    def of(cls, targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> Prepared:
        host: Batch = ([], [])
        devices: dict[torch.device, Batch] = {}
        for target, source in zip(targets, sources, strict=True):
            on = devices.setdefault(source.device, ([], [])) if source.is_cuda else host
            on[0].append(target)
            on[1].append(source)
        return cls(devices, aligned(host), sum(source.nbytes for source in host[1]))

    def __add__(self, other: Prepared) -> Prepared:
        devices = dict(self.devices)
        for device, batch in other.devices.items():
            devices[device] = joined(devices[device], batch) if device in devices else batch
        return Prepared(devices, joined(self.host, other.host), self.host_bytes + other.host_bytes)


def joined(first: Batch, second: Batch) -> Batch:
    return first[0] + second[0], first[1] + second[1]


def aligned(batch: Batch) -> Batch:
    """The same copy, with every large contiguous target cut where a cache line begins.

    A file's header has any multiple of 8 bytes, so the tensors behind it lie askew: every second vector store would
    touch two cache lines, which costs a third of the copy's time.
    """
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for target, source in zip(*batch, strict=True):
        for part, of in _cut(target, source):
            targets.append(part)
            sources.append(of)
    return targets, sources


def _cut(target: torch.Tensor, source: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    askew_bytes = -target.data_ptr() % _LINE_BYTES
    askew, odd = divmod(askew_bytes, target.element_size())
    both_flat = target.is_contiguous() and source.is_contiguous()
    if not askew or odd or not both_flat or target.nbytes < _WORTH_BYTES:
        return [(target, source)]
    target, source = target.view(-1), source.view(-1)
    return [(target[:askew], source[:askew]), (target[askew:], source[askew:])]
