"""async_ckpt inside other people's training loops: one module a library, each in an extra of its name."""

try:
    import peft as _peft
    import torch as _torch
    import transformers as _transformers
except ImportError as _error:
    raise ImportError(f"async_ckpt.integrations: {_error}; pip install 'async-ckpt[train]'") from _error

del _peft, _torch, _transformers
