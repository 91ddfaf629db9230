"""The names in PromQL expressions, and those that a saver gives."""

from __future__ import annotations

import re

# As `# TYPE` lines give them: name and type.
SAVER_METRICS = {
    "async_ckpt_saver_info": "gauge",
    "async_ckpt_runs": "gauge",
    "async_ckpt_ranks": "gauge",
    "async_ckpt_saves_total": "counter",
    "async_ckpt_failures_total": "counter",
    "async_ckpt_stall_seconds": "histogram",
    "async_ckpt_copy_seconds": "histogram",
    "async_ckpt_write_seconds": "histogram",
    "async_ckpt_commit_seconds": "histogram",
    "async_ckpt_committed_bytes_total": "counter",
    "async_ckpt_queued_steps": "gauge",
    "async_ckpt_image_bytes": "gauge",
    "async_ckpt_last_commit_timestamp_seconds": "gauge",
    "async_ckpt_last_commit_step": "gauge",
    "async_ckpt_hosts": "gauge",
    "async_ckpt_host_silent_seconds": "gauge",
    "async_ckpt_host_copy_step": "gauge",
    "async_ckpt_relayed_bytes_total": "counter",
    "async_ckpt_uploads_total": "counter",
    "async_ckpt_upload_failures_total": "counter",
    "async_ckpt_uploaded_bytes_total": "counter",
    "async_ckpt_upload_seconds": "histogram",
    "async_ckpt_upload_queued_steps": "gauge",
    "async_ckpt_upload_behind_seconds": "gauge",
    "async_ckpt_last_upload_timestamp_seconds": "gauge",
    "async_ckpt_last_upload_step": "gauge",
    "async_ckpt_rejected_messages_total": "counter",
    "process_resident_memory_bytes": "gauge",
    "process_cpu_seconds_total": "counter",
    "process_start_time_seconds": "gauge",
}
_OTHERS = {"up", "node_filesystem_avail_bytes", "node_filesystem_size_bytes"}  # of Prometheus, of node_exporter
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")


def series(metrics: dict[str, str]) -> set[str]:
    """What can be asked for."""
    names = {name for name, kind in metrics.items() if kind != "histogram"}
    histograms = [name for name, kind in metrics.items() if kind == "histogram"]
    return names | {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}


def asked_for(expression: str) -> set[str]:
    """Names of series in a PromQL expression: what is neither a label, a word of the language nor a function."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    return {
        name.group()
        for name in _NAME.finditer(bare)
        if name.group() == "up" or ("_" in name.group() and not bare[name.end() :].lstrip().startswith("("))
    }


def unknown(expression: str, metrics: dict[str, str]) -> set[str]:
    return asked_for(expression) - series(metrics) - _OTHERS
