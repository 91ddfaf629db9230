"""The real llama_cookbook on CPU ranks.

Its 0.0.5 asks accelerate for `is_ccl_available`, which accelerate 1.15 has no more; and `train` moves its batches to
`local_rank`, so that is "cpu" here.
"""

from __future__ import annotations

import accelerate.utils

if not hasattr(accelerate.utils, "is_ccl_available"):
    accelerate.utils.is_ccl_available = lambda: False

from llama_cookbook.configs import fsdp_config, train_config
from llama_cookbook.utils import fsdp_utils, train_utils

from async_ckpt.integrations import llama_cookbook

__all__ = ["fsdp_config", "fsdp_utils", "llama_cookbook", "train_config", "train_utils"]
