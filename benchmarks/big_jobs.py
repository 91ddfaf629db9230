"""What a save of a big job costs, from the constants that this run has measured. Put into docs/scale.md by `report`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from .catalogue import MAIN_SHAPE

_RANKS_A_HOST = 8
_MANY_RANKS = 8000
_WORDS_A_SAVE = 2  # a rank's Staged and Settled
_JOBS = (
    ("Llama-3-70B, LoRA r16 all-linear, bf16", "1120 tensors", 414e6),
    ("the same with AdamW's state", "4480 tensors", 1.24e9),
    ("Llama-3-405B, LoRA r16 all-linear, bf16", "1764 tensors", 1.14e9),
    ("the same with AdamW's state", "7056 tensors", 3.4e9),
    ("Llama-3-70B whole, bf16", "723 tensors", 141e9),
)


@dataclass(frozen=True)
class Constants:
    """Bytes a second: one rank's copy with all ranks copying, one stream to the disk. Of the saver: seconds of CPU, all
    threads, for a rank's save, a rank's registration and a byte committed; the bytes of a registration."""

    copy: float
    write: float
    save_s: float
    register_s: float
    register_bytes: float
    commit_s_a_byte: float | None

    @classmethod
    def of(cls, run: dict[str, Any], rows: list[dict[str, Any]]) -> Constants:
        """`rows` are those of `scale`: the one with the most ranks counts, where a commit's fixed cost is nothing."""
        main, most = run["shapes"][MAIN_SHAPE], max(rows, key=lambda row: int(row["ranks"]))
        ranks = most["ranks"]
        return cls(
            copy=main["bytes"] / main["world"] / median(main["limits"]["memcpy"]),
            write=main["bytes"] / median(main["limits"]["write O_DIRECT, fdatasync"]),
            save_s=most["save_cpu_s"] / ranks,
            register_s=most["registering_cpu_s"] / ranks,
            register_bytes=most["sent_bytes"] / ranks,
            commit_s_a_byte=run["saver"].get("commit_cpu_s_a_byte"),
        )


def big_jobs(run: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    return "\n".join(_lines(Constants.of(run, rows)))


def _lines(found: Constants) -> Iterator[str]:
    a_byte = found.commit_s_a_byte
    bytes_cpu = "a byte, not measured" if a_byte is None else f"image / {1e-9 / a_byte:.1f} GB/s"
    formulas = (
        ("image", "tensors' bytes + header", "per slot, in /dev/shm of each host"),
        ("copy", f"image / ranks of the host / {found.copy / 1e9:.1f} GB/s", "in each rank, while training goes on"),
        ("write", f"image / {found.write / 1e9:.1f} GB/s", "one stream of O_DIRECT to this machine's disk"),
        ("messages", f"{_WORDS_A_SAVE} a rank and save", "Staged, Settled; and Ping and Pong each second"),
        ("saver CPU", f"{found.save_s * 1e6:.0f} us a rank + {bytes_cpu}", "all threads; hashing, O_DIRECT's own work"),
        (
            "register",
            f"{found.register_bytes / 1e3:.0f} KB and {found.register_s * 1e3:.1f} ms a rank",
            "once, at attach",
        ),
    )
    yield "```"
    for name, formula, what in formulas:
        yield f"{name:<10} = {formula:<42} {what}"
    yield "```"
    yield ""
    yield f"| job | what is saved | image | on a host of {_RANKS_A_HOST} ranks: copy a rank | write | messages a save |"
    yield "|---|---|---|---|---|---|"
    for job, tensors, nbytes in _JOBS:
        copy_s, write_s = nbytes / _RANKS_A_HOST / found.copy, nbytes / found.write
        yield (
            f"| {job} | {tensors} | {_size(nbytes)} | {_time(copy_s)} | {_time(write_s)} "
            f"| {_WORDS_A_SAVE * _RANKS_A_HOST} |"
        )
    yield ""
    yield (
        f"A single saver with {_MANY_RANKS} ranks, by these constants: {_size(_MANY_RANKS * found.register_bytes)} of "
        f"registrations and {_time(_MANY_RANKS * found.register_s)} to take them up; {_WORDS_A_SAVE * _MANY_RANKS} "
        f"messages and {_time(_MANY_RANKS * found.save_s)} of CPU a save."
    )


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3g} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{seconds * 1e3:.0f} ms"
