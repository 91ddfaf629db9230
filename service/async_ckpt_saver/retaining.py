"""After a commit: remove what no rule keeps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.retention_policy import Policy

from .services import Services
from .storage import Storage
from .tracing import StepTrace
from .uploader import Uploader

log = logging.getLogger(__name__)


async def retain(
    services: Services, storage: Storage, uploader: Uploader | None, policy: Policy, trace: StepTrace | None
) -> None:
    """What fails is logged: the next commit tries again."""

    def remove(held: Collection[int] = ()) -> None:
        with trace.retaining() if trace is not None else contextlib.nullcontext():
            storage.retain(policy, held)

    try:
        if uploader is not None:
            await uploader.retain(remove)
        else:
            await services.in_thread(remove, storage)
    except (OSError, CheckpointError) as error:
        log.error("retention in %s failed: %s", storage.directory, error)
