"""A rank of a test's job: a real process joined by gloo, forked where its imports are loaded already."""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from tests.ranks import ROOT

NAMESPACE_VARIABLE = "ASYNC_CKPT_TEST_NAMESPACE"  # the mount namespace that a rank of this job lives in
_PRELOADED = ["tests.system.training"]


@functools.cache
def fork_server(environment: Callable[[], dict[str, str]]) -> Any:
    """The one server of this session, whose `environment` is this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = dict(os.environ)
    try:
        os.environ.update(environment())
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def rendezvous(world: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def be_rank(target: str, folder: str, args: Sequence[str], variables: dict[str, str], log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = None
    if namespace := variables.get(NAMESPACE_VARIABLE):
        from tests.system.faults import enter

        enter(namespace)
    if host := variables.get("ASYNC_CKPT_TEST_HOST"):
        from tests.system import hosts

        hosts.enter(host)
    os.chdir(ROOT)
    with _ending():
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(folder, *args)
        dist.barrier()


@contextlib.contextmanager
def _ending() -> Iterator[None]:
    """No teardown, which may abort under FSDP1."""
    status = 1
    try:
        yield
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
