"""What Prometheus is told. Counters and histograms grow with each save that settles, gauges are read when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .status import SaverStatus, SaveStatus
from .upload_status import UploadedStep

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Buckets: memory takes milliseconds when all is well, storage from milliseconds to minutes.
_MEMORY_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0, 120.0)
_STORAGE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """`status` gives the present. Names are a contract: alerts and dashboards of `deploy/` are made of them."""

    def __init__(self, status: Callable[[], SaverStatus]) -> None:
        self._registry = registry = CollectorRegistry()
        self._saves = Counter("async_ckpt_saves", "Saves that have settled.", ["outcome"], registry=registry)
        self._failures = Counter("async_ckpt_failures", "Saves not committed, by cause.", ["cause"], registry=registry)
        self._committed_bytes = Counter("async_ckpt_committed_bytes", "Bytes committed to storage.", registry=registry)
        self._stall = self._histogram("stall", "What a save cost the training thread of the slowest rank.", _MEMORY_S)
        self._copy = self._histogram("copy", "Copy of a rank's shards into shared memory, slowest rank.", _MEMORY_S)
        self._write = self._histogram("write", "Writing and syncing the files of a checkpoint.", _STORAGE_S)
        self._commit = self._histogram("commit", "Manifest, rename and syncing the directories.", _STORAGE_S)
        self._upload = self._histogram("upload", "Copying a checkpoint to the second tier.", _STORAGE_S)
        self._uploads = Counter("async_ckpt_uploads", "Uploads to a second tier.", ["outcome"], registry=registry)
        self._upload_failures = Counter(
            "async_ckpt_upload_failures", "Uploads that failed, by cause.", ["cause"], registry=registry
        )
        self._uploaded_bytes = Counter("async_ckpt_uploaded_bytes", "Bytes in second tiers.", registry=registry)
        for outcome in ("committed", "skipped", "failed"):
            self._saves.labels(outcome)  # a rate needs the zero before the first one
        for outcome in ("uploaded", "failed", "dropped"):
            self._uploads.labels(outcome)
        ProcessCollector(registry=registry)
        registry.register(_Present(status))

    def _histogram(self, phase: str, text: str, buckets_s: tuple[float, ...]) -> Histogram:
        return Histogram(f"async_ckpt_{phase}_seconds", text, buckets=buckets_s, registry=self._registry)

    def observe(self, save: SaveStatus) -> None:
        """A save has settled."""
        self._saves.labels(save.outcome).inc()
        if save.staged:
            self._stall.observe(max(rank.stall_s for rank in save.staged))
            self._copy.observe(max(rank.copy_s for rank in save.staged))
        if save.outcome == "committed":
            self._committed_bytes.inc(save.bytes)
            self._write.observe(save.write_s)
            self._commit.observe(save.commit_s)
        else:
            self._failures.labels(save.cause).inc()

    def observe_upload(self, upload: UploadedStep) -> None:
        """An upload has ended, or will not be made."""
        self._uploads.labels(upload.outcome).inc()
        if upload.outcome == "uploaded":
            self._uploaded_bytes.inc(upload.bytes)
            self._upload.observe(upload.upload_s)
        elif upload.outcome == "failed":
            self._upload_failures.labels(upload.cause).inc()

    def exposition(self) -> bytes:
        return generate_latest(self._registry)


class _Present:
    """A collector in the sense of prometheus_client."""

    def __init__(self, status: Callable[[], SaverStatus]) -> None:
        self._status = status

    def describe(self) -> list[Metric]:
        return []  # or the registry would ask for the status before there is one

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        runs = status.runs
        info = GaugeMetricFamily("async_ckpt_saver_info", "This saver.", labels=["version", "endpoint", "root"])
        info.add_metric([status.version, status.endpoint, status.root], 1)
        yield info
        alive = sum(rank.alive for run in runs for rank in run.ranks)
        yield GaugeMetricFamily("async_ckpt_runs", "Runs in shared memory, kept ones too.", value=len(runs))
        yield GaugeMetricFamily("async_ckpt_ranks", "Ranks that live.", value=alive)
        queued = sum(len(run.queue) for run in runs)
        yield GaugeMetricFamily("async_ckpt_queued_steps", "Steps not committed yet.", value=queued)
        held_bytes = sum(run.image_bytes for run in runs)
        yield GaugeMetricFamily("async_ckpt_image_bytes", "Shared memory that runs hold.", value=held_bytes)
        yield from _last_commits(status)
        yield from _hosts(status)
        yield from _uploads(status)
        rejected = CounterMetricFamily("async_ckpt_rejected_messages", "Messages not understood.", labels=["cause"])
        for cause, count in status.rejected_messages.items():
            rejected.add_metric([cause], count)
        yield rejected


def _hosts(status: SaverStatus) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        "async_ckpt_hosts", "Savers of other hosts that relay to this one.", value=len(status.hosts)
    )
    silent = GaugeMetricFamily("async_ckpt_host_silent_seconds", "Since a relay was last heard.", labels=["host"])
    copy = GaugeMetricFamily("async_ckpt_host_copy_step", "The step a relay keeps a copy of in RAM.", labels=["host"])
    for name in sorted({host.name for host in status.hosts}):  # a saver of each, or several on one host
        here = [host for host in status.hosts if host.name == name]
        silent.add_metric([name], max(host.silent_s for host in here))
        steps = [host.copy_step for host in here if host.copy_step is not None]
        if steps:
            copy.add_metric([name], max(steps))
    yield silent
    yield copy
    relayed = CounterMetricFamily("async_ckpt_relayed_bytes", "Bytes that relays have handed over to this saver.")
    relayed.add_metric([], status.relayed_bytes)
    yield relayed


def _last_commits(status: SaverStatus) -> Iterator[Metric]:
    at = GaugeMetricFamily(
        "async_ckpt_last_commit_timestamp_seconds", "When the newest step was committed.", labels=["directory"]
    )
    step = GaugeMetricFamily("async_ckpt_last_commit_step", "The newest step committed.", labels=["directory"])
    for run in status.runs:
        if run.last_commit_age_s is not None and run.last_commit_step is not None:
            at.add_metric([run.directory], status.now_unix_s - run.last_commit_age_s)
            step.add_metric([run.directory], run.last_commit_step)
    yield at
    yield step


def _uploads(status: SaverStatus) -> Iterator[Metric]:
    labels = ["directory"]
    queued = GaugeMetricFamily("async_ckpt_upload_queued_steps", "Steps not in the second tier yet.", labels=labels)
    behind = GaugeMetricFamily(
        "async_ckpt_upload_behind_seconds", "How long the second tier has lacked the newest steps.", labels=labels
    )
    at = GaugeMetricFamily("async_ckpt_last_upload_timestamp_seconds", "When a step was uploaded last.", labels=labels)
    step = GaugeMetricFamily("async_ckpt_last_upload_step", "The step uploaded last.", labels=labels)
    for each in status.uploads:
        queued.add_metric([each.directory], len(each.queued) + (each.uploading is not None))
        behind.add_metric([each.directory], each.behind_s)
        if each.last_upload_age_s is not None and each.last_upload_step is not None:
            at.add_metric([each.directory], status.now_unix_s - each.last_upload_age_s)
            step.add_metric([each.directory], each.last_upload_step)
    yield from (queued, behind, at, step)
