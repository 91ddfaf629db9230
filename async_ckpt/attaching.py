"""attach(): from a model to a running Checkpointer."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import platform
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.limits import MAX_SLOTS, MAX_TIMEOUT_S
from async_ckpt.core.location import Location
from async_ckpt.core.protocol import (
    PROTOCOL,
    Granted,
    Lead,
    Options,
    Refuse,
    Register,
)
from async_ckpt.core.retention_policy import KeepBest, Policy
from async_ckpt.core.slots import shm_identity
from async_ckpt.core.transport import transport_of

from .checkpointer import Checkpointer
from .client import Client, SaverRestarted
from .embedded import EmbeddedSaver
from .hosts import Hosts, several_hosts
from .joined import Joined, Settings
from .mapped import Slot
from .notices import require_main_thread
from .plain_model import Weights
from .plan import Plan, Selection, plan_checkpoint
from .preemption import Preemption
from .staging import Staging
from .tiers import DEFAULT, places_of
from .topology import Topology, discover
from .trace import Trace, trace_path
from .training_state import Stateful, make_parts

if TYPE_CHECKING:
    from async_ckpt.core.keys import ClientKeys

log = logging.getLogger(__name__)

_SAVER_VARIABLE = "ASYNC_CKPT_SAVER"
_REFUSE_S = 10.0
_attempts: Counter[Location] = Counter()  # ranks attach equally often, so this tells their attempts apart
_attached: set[Location] = set()


def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    scheduler: Stateful | None = None,
    *,
    directory: str | os.PathLike[str] = DEFAULT,
    tiers: Sequence[str | os.PathLike[str]] | None = None,
    saver: str | None = None,
    adapter_name: str | Sequence[str] = "default",
    max_shard_size: int | str = "50GB",
    weights: Weights = "auto",
    slots: int = 2,
    when_busy: Literal["wait", "skip"] = "wait",
    staging: Literal["overlap", "sync"] = "overlap",
    keep_last: int | None = None,
    keep_every: int | None = None,
    keep_best: KeepBest | None = None,
    timeout_s: float = 600.0,
    scaler: Stateful | None = None,
    stateful: Mapping[str, Stateful] | None = None,
    files: Mapping[str, bytes] | None = None,
    verify_replicas: bool = False,
    preemption: bool = False,
    trace: str | os.PathLike[str] | None = None,
    replicas: int = 0,
) -> Checkpointer:
    """Prepare checkpoints of the PEFT adapter in `model`, or of the whole model if it is a transformers model without
    one; afterwards `save` costs next to nothing.

    Guarantee: no collective, no gather, no GPU memory; every byte that is saved is owned by exactly one rank, or
    every rank raises. Call it on all ranks, before or after the first forward, on the model as it is: plain, or
    wrapped by DDP, FSDP1, FSDP2 or torch.compile.

    `adapter_name`: one, or several that go into one checkpoint. `directory`: gets `checkpoint-<step>/` and `latest`; or
    a URL, `s3://bucket/prefix`, `gs://...` or `az://...`, which gets no `latest`: the newest is.
    `tiers`: instead of `directory` two places, `["/local/ckpt", "s3://bucket/run"]`: a save is committed to the first,
    a directory of this host, and copied to the second behind the training; `restore` takes the newest of both.
    `saver`: the endpoint of a running `async-ckpt-saver`; else the environment's ASYNC_CKPT_SAVER; else one is started
    on this host, which ends by itself. `slots`: snapshots that may be under way at once, each as large as a checkpoint,
    in /dev/shm. `when_busy`: what `save` does when all are. `staging`: "overlap" copies while training goes on, "sync"
    within `save`. `keep_last`, `keep_every`, `keep_best=("eval_loss", "min", 2)`: which checkpoints stay; by default
    all. `timeout_s`: how long any call waits for other ranks, for a slot, or for storage. `max_shard_size`: how a whole
    model is split into files, as `save_pretrained` understands it. `weights`: "trainable" or "all" saves the parameters
    of any module, of torchtitan's or your own, by their own names in `model.safetensors`.

    `verify_replicas`: hash what several ranks hold alike (under DDP everything) at each save, and fail the save, naming
    the tensor, if ranks have diverged; on CUDA the fence then waits on the host.

    `optimizer` (one or several), `scheduler`, `scaler` (a GradScaler) and `stateful` (`{"dataloader": loader}`: any
    object with a state_dict, one a rank) are saved and restored with the weights, and random numbers with them: at the
    same world size training goes on bit by bit as if it had not stopped. Without them only the weights are saved.

    Ranks of several hosts make one checkpoint: `directory` is written by rank 0's host alone, and to restore, every
    host has to see it. They find each other by torch.distributed, if it is initialised, or by ASYNC_CKPT_LEAD.

    `replicas` 1: a second host keeps a copy of the newest committed checkpoint in its /dev/shm, so that after the loss
    of any one host the job that comes back restores from RAM on every rank, and reads no more than the manifest from
    storage. It takes room for one checkpoint on that host, for two while a newer one arrives.

    `files` (path -> bytes, as rank 0 gives them) lie beside the weights in every checkpoint: a tokenizer, a licence.

    `preemption`: SIGTERM or SIGUSR1 on any rank means that the job will be ended. All ranks then agree, without a
    collective, on one optimizer step, at which `Checkpointer.preempted` turns true and which is saved. Ranks must make
    their optimizer steps alike, and attach in the main thread. The same signal more than 5 s later acts as it did
    before.

    `trace`: a file that gets what ranks and saver did and when, as Chrome trace events for ui.perfetto.dev; else the
    environment's ASYNC_CKPT_TRACE. An earlier file of that name is kept as `<name>.1`. Nothing that goes wrong with it
    is more than a warning.

    Raises CheckpointError, on every rank with the same reason, saying what to change.
    """
    places = places_of(directory, tiers)
    path, second = places.first, places.second
    _check_arguments(slots, when_busy, staging, timeout_s, replicas)
    if weights not in ("auto", "trainable", "all"):
        raise CheckpointError(f"weights={weights!r}: give 'auto', 'trainable' or 'all'")
    if preemption:
        require_main_thread()
    policy = Policy(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
    if path in _attached:
        raise CheckpointError(f"{path} is attached already in this process: close() the earlier Checkpointer first")
    topology = discover()
    names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
    upload_to = "" if second is None else str(second)
    options = Options(
        str(path), topology.world, slots, policy, float(timeout_s), verify_replicas, preemption, upload_to, replicas
    )
    if replicas and not topology.spans_hosts and topology.rank == 0:
        log.warning("replicas=1 protects nothing here: all ranks are on one host, and there is no other to keep a copy")
    endpoint = saver or os.environ.get(_SAVER_VARIABLE)
    if not names:
        raise CheckpointError("adapter_name is empty: name at least one adapter")
    embedded = None if endpoint else EmbeddedSaver(path, second)
    transport = transport_of(endpoint or embedded.endpoint)  # type: ignore[union-attr]
    keys = _read_keys() if transport.encrypted else None

    traced = trace_path(trace)
    tracer = Trace(traced, topology.rank, topology.job) if traced is not None else None

    def make_plan() -> Plan:
        parts = make_parts(optimizer, scheduler, scaler, stateful)
        selection = Selection(names, max_shard_size, weights)
        return plan_checkpoint(model, selection, parts, files, rank=topology.rank, world=topology.world)

    def join() -> Joined:
        _attempts[path] += 1
        hosts = several_hosts(topology, path, _attempts[path])
        identity = _Identity(options, f"{topology.job}:{_attempts[path]}", topology, tracer is not None)
        if embedded is not None and topology.world > 1:  # alone, what cannot be planned is an error before any start
            threading.Thread(target=_start_early, args=(embedded,), name="async-ckpt-start", daemon=True).start()
        plan = _plan(make_plan, topology)
        with contextlib.ExitStack() as failing:
            if hosts is not None:
                failing.push(_telling(hosts))
            client = Client(transport, embedded, keys)
            failing.callback(client.close)
            joined = _join(client, identity, plan, hosts, overlap=staging == "overlap")
            failing.pop_all()
        return joined

    with contextlib.ExitStack() as failing:
        if tracer is not None:
            tracer.open()  # rank 0 makes the file, so that it is there when the others have joined
            failing.callback(tracer.close)
        joined = join()
        failing.pop_all()
    where = f"the saver's log, {embedded.log_path}" if embedded is not None else f"the log of the saver at {endpoint}"
    settings = Settings(path, places.given, topology.rank, when_busy, float(timeout_s), where, second)
    _attached.add(path)
    return Checkpointer(
        model,
        settings,
        joined,
        preemption=Preemption() if preemption else None,
        rejoin=join,
        on_close=lambda: _attached.discard(path),
        trace=tracer,
    )


def _start_early(embedded: EmbeddedSaver) -> None:
    """The saver starts while this rank plans. The client waits for it, and says what is wrong if it does not come."""
    with contextlib.suppress(CheckpointError):
        embedded.ensure()


def _read_keys() -> ClientKeys | None:
    from async_ckpt.core.keys import client_keys  # only tcp needs them

    return client_keys(os.environ)


def _telling(hosts: Hosts) -> Callable[..., None]:
    """The end of an attach that failed on this rank."""

    def tell(kind: object, error: BaseException | None, trace: object) -> None:
        try:
            hosts.fail(str(error) or repr(error))
        except CheckpointError as lost:
            log.warning("the other ranks could not be told: %s", lost)

    return tell


@dataclass(frozen=True)
class _Identity:
    options: Options
    job: str
    topology: Topology
    trace: bool
    lead: Lead | None = None


def _check_arguments(slots: int, when_busy: str, staging: str, timeout_s: float, replicas: int) -> None:
    if not isinstance(replicas, int) or isinstance(replicas, bool) or replicas not in (0, 1):
        raise CheckpointError(f"replicas={replicas!r}: give 0, or 1 for a copy in the RAM of a second host")
    if not isinstance(slots, int) or isinstance(slots, bool) or not 1 <= slots <= MAX_SLOTS:
        raise CheckpointError(f"slots={slots!r}: give a number from 1 to {MAX_SLOTS}")
    if when_busy not in ("wait", "skip"):
        raise CheckpointError(f"when_busy={when_busy!r}: give 'wait' or 'skip'")
    if staging not in ("overlap", "sync"):
        raise CheckpointError(f"staging={staging!r}: give 'overlap' or 'sync'")
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise CheckpointError(f"timeout_s={timeout_s!r}: give a number of seconds above 0, at most {MAX_TIMEOUT_S:g}")


def _plan(make: Callable[[], Plan], topology: Topology) -> Plan | CheckpointError:
    """What cannot be saved is an error that the other ranks have to hear of, so it is not raised yet."""
    try:
        return make()
    except CheckpointError as error:
        if topology.world == 1:
            raise
        return error
    except Exception as error:  # the other ranks must not wait for one that fails in a way that nobody foresaw
        failure = CheckpointError(f"planning the checkpoint failed: {error!r}")
        failure.__cause__ = error
        if topology.world == 1:
            raise failure from error
        return failure


def _join(
    client: Client, identity: _Identity, plan: Plan | CheckpointError, hosts: Hosts | None, *, overlap: bool
) -> Joined:
    topology, timeout_s = identity.topology, identity.options.timeout_s
    if hosts is not None:
        job, lead = hosts.meet(client, timeout_s)
        identity = replace(identity, job=job, lead=lead)

    def refuse(reason: str) -> None:
        message = Refuse(
            options=identity.options, job=identity.job, rank=topology.rank, process=topology.process, reason=reason,
            lead=identity.lead,
        )  # fmt: skip
        client.refuse(message, _REFUSE_S)

    if isinstance(plan, CheckpointError):
        refuse(str(plan))
        raise plan
    granted = client.register(_registration(identity, plan), plan.layout, timeout_s)
    try:
        staging = _map(granted, plan, topology.rank, overlap=overlap)
    except Exception as error:
        refuse(f"cannot map its slots: {error!r}")
        raise CheckpointError(f"rank {topology.rank} cannot map its slots in {granted.run}: {error}") from error
    try:
        started = client.ready(timeout_s)
        if hosts is not None:
            hosts.attached()
        return Joined(plan, staging, client, started, hosts)
    except SaverRestarted:
        staging.close()
        return _join(client, identity, plan, hosts, overlap=overlap)
    except BaseException:
        staging.close()
        raise


def _registration(identity: _Identity, plan: Plan) -> Register:
    topology = identity.topology
    return Register(
        protocol=PROTOCOL,
        options=identity.options,
        job=identity.job,
        rank=topology.rank,
        process=topology.process,
        launcher=topology.launcher,
        shm=shm_identity(),
        layout_hash=plan.layout_hash,
        layout=plan.layout if topology.rank == 0 else None,
        claims=plan.claims,
        lead=identity.lead,
        versions=_versions() if topology.rank == 0 else {},
        trace=identity.trace and topology.rank == 0,
    )


def _map(granted: Granted, plan: Plan, rank: int, *, overlap: bool) -> Staging:
    parts = [plan.parts[index] for index in granted.owned]
    slots = [Slot(Path(granted.run), index, parts) for index in range(len(granted.slot_directories))]
    replicated = [plan.parts[index] for index in granted.replicated]
    return Staging(rank, slots, parts, overlap=overlap, replicated=replicated)


def _versions() -> dict[str, str]:
    names = ("async-ckpt", "torch", "peft", "transformers")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
