"""`status`: what a living saver does."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import exit_codes
from ..settings import BIND, SettingsError
from .options import add_file, add_settings, effective
from .output import age, has_rich, size, table

if TYPE_CHECKING:
    from ..status import RankStatus, RunStatus, SaverStatus, SaveStatus
    from ..upload_status import UploadStatus

HELP = "ask a living saver for its runs and their last saves"
EXAMPLE = "async-ckpt-saver status --bind ipc:///run/async-ckpt/saver.sock --watch"

_WATCH_S = 1.0
_SAVES_SHOWN = 8
_RANKS_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory",
        nargs="?",
        metavar="DIR|URL",
        help="a training directory: asks the saver that attach started",
    )
    add_file(parser)
    add_settings(parser, {"which saver, without DIR": (BIND,)})
    parser.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C or the saver's end")
    parser.add_argument("--json", action="store_true", help="all of it; with --watch one line each time")
    parser.add_argument(
        "--timeout-s", type=float, default=5.0, metavar="SECONDS", help="how long to wait for it (default: 5)"
    )


def run(options: argparse.Namespace) -> int:
    from ..asking import asking

    endpoint = _endpoint(options)
    with asking(endpoint) as asker:
        if not options.watch:
            print(_json(asker.status(options.timeout_s)) if options.json else render(asker.status(options.timeout_s)))
            return exit_codes.OK
        try:
            _watch(lambda: asker.status(options.timeout_s), options.json)
        except KeyboardInterrupt:
            return exit_codes.OK
    return exit_codes.OK


def render(status: SaverStatus) -> str:
    """For people: one block a run."""
    head = (f"saver {status.pid} at {status.endpoint}\n"
            f"  up {age(status.uptime_s)}, {size(status.rss_bytes)} of memory, version {status.version}\n"
            f"  root {status.root}")  # fmt: skip
    rejected = [f"{count} {cause}" for cause, count in status.rejected_messages.items() if count]
    if rejected:
        head += f"\n  rejected messages: {', '.join(rejected)}"
    for host in status.hosts:
        head += (f"\n  host {host.name} relays {_ranks(host.ranks)}: {size(host.relayed_bytes)} handed over, heard "
                 f"{age(host.silent_s)} ago")  # fmt: skip
        if host.copy_step is not None:
            head += f", keeps a copy of step {host.copy_step} in RAM"
    runs = [_run(run, status.now_unix_s) for run in [*status.runs, *status.ended]]
    uploads = [_uploads(each, status.now_unix_s) for each in status.uploads]
    return "\n\n".join([head, *(runs or ["no runs"]), *uploads])


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def describe_ranks(ranks: Sequence[RankStatus]) -> str:
    """All of a few; of many only how many there are, and who is gone."""
    texts = [f"{rank.rank} (pid {rank.pid}{'' if rank.alive else ', gone'})" for rank in ranks]
    if len(ranks) <= _RANKS_SHOWN:
        return ", ".join(texts)
    gone = [text for rank, text in zip(ranks, texts, strict=True) if not rank.alive]
    more = [f"{len(gone) - _RANKS_SHOWN} more"] if len(gone) > _RANKS_SHOWN else []
    return "; ".join([f"{len(ranks)}, {len(ranks) - len(gone)} alive", *gone[:_RANKS_SHOWN], *more])


def _endpoint(options: argparse.Namespace) -> str:
    if options.directory is not None:
        from async_ckpt.core.endpoints import embedded_endpoint
        from async_ckpt.core.location import Url, location_of

        directory = location_of(options.directory)
        return embedded_endpoint(directory if isinstance(directory, Url) else directory.expanduser().resolve())
    endpoint = effective(options, (BIND,))["bind"].value or os.environ.get("ASYNC_CKPT_SAVER")
    if not endpoint:
        raise SettingsError("which saver? give a training directory, --bind ENDPOINT, or ASYNC_CKPT_BIND")
    return str(endpoint)


def _watch(ask: Callable[[], SaverStatus], as_json: bool) -> None:
    if as_json or not sys.stdout.isatty() or not has_rich():
        while True:
            status = ask()
            print(_json(status, one_line=True) if as_json else render(status), flush=True)
            time.sleep(_WATCH_S)
    from rich.live import Live
    from rich.text import Text

    def screen(status: SaverStatus) -> Text:
        text = Text(f"{render(status)}\n\nevery {_WATCH_S:g} s; Ctrl-C ends this, not the saver", no_wrap=True)
        text.highlight_regex(r"^\S.*", "bold")
        text.highlight_regex(r"\bfailed.*|\bgone\b|last error: .*|rejected messages: .*", "red")
        text.highlight_regex(r"\bskipped.*|waiting: .*", "yellow")
        return text

    with Live(screen(ask()), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_S)
            live.update(screen(ask()), refresh=True)


def _json(status: SaverStatus, *, one_line: bool = False) -> str:
    import msgspec

    data = msgspec.json.encode(status)
    return (data if one_line else msgspec.json.format(data, indent=2)).decode()


def _run(run: RunStatus, now_unix_s: float) -> str:
    slots = [f"{slot.slot}: {f'step {slot.step}' if slot.step is not None else '/'.join(sorted(set(slot.phases)))}"
             for slot in run.slots]  # fmt: skip
    last = "none yet" if run.last_commit_age_s is None else f"{age(run.last_commit_age_s)} ago"
    failed = ", ".join(f"{count} {cause}" for cause, count in run.failures.items())
    lines = [
        f"{run.directory}  {run.state}, job {run.job.strip(':')}",
        f"  ranks {describe_ranks(run.ranks)}",
        f"  slots {'  '.join(slots)}",
        f"  {run.committed} committed, {size(run.committed_bytes)}, last {last}"
        + (f"; not committed: {failed}" if failed else "")
        + (f"; waiting: steps {run.queue}" if run.queue else ""),
    ]
    if run.hosts_write:
        lines.append("  every host writes its own part")
    if run.not_direct:
        lines.append(f"  hosts hand over what they hold, in spite of --shared-fs direct: {run.not_direct}")
    if run.last_error:
        lines.append(f"  last error: {run.last_error}")
    rows = [_save(save, now_unix_s) for save in reversed(run.saves[-_SAVES_SHOWN:])]
    if rows:
        shown = table((">step", ">age", ">stage", ">copy", ">write", ">commit", ">size", "outcome"), rows)
        lines += [f"  {line}" for line in shown.splitlines()]
    return "\n".join(lines)


def _uploads(uploads: UploadStatus, now_unix_s: float) -> str:
    last = "none yet" if uploads.last_upload_age_s is None else f"{age(uploads.last_upload_age_s)} ago"
    failed = ", ".join(f"{count} {cause}" for cause, count in uploads.failures.items())
    lines = [
        f"{uploads.directory} -> {uploads.url}",
        f"  {uploads.uploaded} uploaded, {size(uploads.uploaded_bytes)}, last {last}"
        + (f"; {uploads.dropped} dropped for newer ones" if uploads.dropped else "")
        + (f"; failed: {failed}" if failed else "")
        + (f"; under way: step {uploads.uploading}" if uploads.uploading is not None else "")
        + (f"; waiting: steps {uploads.queued}" if uploads.queued else "")
        + (f"; behind for {age(uploads.behind_s)}" if uploads.behind_s else ""),
    ]
    if uploads.last_error:
        lines.append(f"  last error: {uploads.last_error}")
    rows = [
        (
            str(each.step),
            age(now_unix_s - each.started_unix_s),
            f"{each.upload_s:.1f} s" if each.outcome == "uploaded" else "",
            size(each.bytes) if each.outcome == "uploaded" else "",
            each.outcome if not each.cause else f"{each.outcome} ({each.cause})",
        )
        for each in reversed(uploads.uploads[-_SAVES_SHOWN:])
    ]
    if rows:
        lines += [f"  {line}" for line in table((">step", ">age", ">upload", ">size", "outcome"), rows).splitlines()]
    return "\n".join(lines)


def _save(save: SaveStatus, now_unix_s: float) -> tuple[str, ...]:
    """Stage: from the first rank's report to the last one's; copy: the slowest rank's."""
    stage_s = max((each.at_unix_s for each in save.staged), default=save.started_unix_s) - save.started_unix_s
    copy_s = max((each.copy_s for each in save.staged), default=0.0)
    done = save.outcome == "committed"
    return (
        str(save.step),
        age(now_unix_s - save.started_unix_s),
        f"{stage_s * 1e3:.1f} ms",
        f"{copy_s * 1e3:.1f} ms",
        f"{save.write_s * 1e3:.1f} ms" if done else "",
        f"{save.commit_s * 1e3:.1f} ms" if done else "",
        size(save.bytes) if done else "",
        save.outcome if not save.cause else f"{save.outcome} ({save.cause})",
    )
