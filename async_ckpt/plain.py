"""State of schedulers, scalers and data loaders as JSON and back: no pickle, and a refusal that names the place.

JSON has no tuples, no keys but strings, no infinities and no tensors: these become objects with one key, "$tuple",
"$items", "$counter", "$float", "$bytes" or "$tensor". Whatever else is not JSON is refused.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import check_depth

MAX_TENSOR_BYTES = 1 << 20  # larger ones would make every save slow: they belong into the model or the optimizer


def to_plain(path: str, value: Any) -> Any:
    """`value` in terms of JSON. Raises CheckpointError naming `path` and what lies there, also if it is nested too
    deep."""
    try:
        plain = _to_plain(path, value)
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deep, or in itself: make it flatter") from None
    check_depth(plain, path)
    return plain


def _to_plain(path: str, value: Any) -> Any:
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, torch.Tensor):
        return _tensor(path, value)
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, Counter):
        return {"$counter": _items(path, value)}
    if isinstance(value, dict | OrderedDict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _to_plain(f"{path}.{key}", item) for key, item in value.items()}
        return {"$items": _items(path, value)}
    if isinstance(value, tuple):
        return {"$tuple": _list(path, value)}
    if isinstance(value, list | deque):
        return _list(path, value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # numpy's scalars
        return _to_plain(path, value.item())
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    raise CheckpointError(
        f"{path} is a {kind}, which is neither JSON nor a tensor, and nothing is pickled: keep it out of state_dict(), "
        f"or in it as numbers and strings"
    )


def from_plain(value: Any) -> Any:
    """The inverse of `to_plain`. Raises CheckpointError if `value` was not made by it."""
    check_depth(value, "the training state")
    return _from_plain(value)


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: _from_plain(item) for key, item in value.items()}
    ((kind, content),) = value.items()
    try:
        return _DECODERS[kind](content)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"the training state holds {kind} with content that cannot be read: {error!r}") from error


def _list(path: str, value: Any) -> list[Any]:
    return [_to_plain(f"{path}[{index}]", item) for index, item in enumerate(value)]


def _items(path: str, value: dict[Any, Any]) -> list[list[Any]]:
    return [[_to_plain(f"{path}.{key}", key), _to_plain(f"{path}.{key}", item)] for key, item in value.items()]


def _tensor(path: str, value: torch.Tensor) -> dict[str, Any]:
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.numel() * value.element_size() > MAX_TENSOR_BYTES:
        raise CheckpointError(f"{path} is a {type(value).__name__} of shape {list(value.shape)}; at most "
                              f"{MAX_TENSOR_BYTES} bytes of a plain tensor are kept here")  # fmt: skip
    host = value.detach().cpu().contiguous()
    content = bytes(host.reshape(-1).view(torch.uint8).tolist()) if host.numel() else b""
    dtype = str(value.dtype).removeprefix("torch.")
    return {"$tensor": {"dtype": dtype, "shape": list(value.shape), "data": base64.b64encode(content).decode()}}


def _to_tensor(content: dict[str, Any]) -> torch.Tensor:
    dtype = getattr(torch, content["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {content['dtype']!r}")
    data = bytearray(base64.b64decode(content["data"], validate=True))
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.clone().reshape(content["shape"])


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": lambda content: tuple(_from_plain(item) for item in content),
    "$items": lambda content: {_from_plain(key): _from_plain(item) for key, item in content},
    "$counter": lambda content: Counter({_from_plain(key): _from_plain(item) for key, item in content}),
    "$float": float,
    "$bytes": lambda content: base64.b64decode(content, validate=True),
    "$tensor": _to_tensor,
}
