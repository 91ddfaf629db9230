"""`run`: the saver itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .. import exit_codes
from ..memory import no_collections, one_heap
from ..settings import (
    BIND,
    CURVE_ALLOW,
    CURVE_SECRET,
    GRACE,
    HTTP,
    KEEP_IMAGE,
    LEASE,
    LOG_LEVEL,
    ROOT,
    SHARED_FS,
    Setting,
    require,
)
from .options import add_file, add_settings, effective

if TYPE_CHECKING:
    from ..http_listener import Address

HELP = "serve the ranks of this host until SIGTERM"
EXAMPLE = """\
async-ckpt-saver run --bind ipc:///run/async-ckpt/saver.sock --root /data/runs
  then, in training: async_ckpt.attach(model, directory="/data/runs/llama3", saver="ipc:///run/async-ckpt/saver.sock")"""

GROUPS: dict[str, tuple[Setting, ...]] = {
    "where": (BIND, ROOT),
    "keys": (CURVE_SECRET, CURVE_ALLOW),
    "time": (KEEP_IMAGE, GRACE, LEASE),
    "hosts": (SHARED_FS,),
    "eyes": (HTTP, LOG_LEVEL),
}
SETTINGS = tuple(setting for group in GROUPS.values() for setting in group)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    add_settings(parser, GROUPS)
    process = parser.add_argument_group("process, as attach starts it")
    process.add_argument("--embedded", action="store_true", help="exit when no run needs this saver any more")
    process.add_argument("--detach", action="store_true", help="go on in the background, in a session of its own")


def run(options: argparse.Namespace) -> int:
    values = effective(options, SETTINGS)
    require(values, BIND, ROOT)

    one_heap()
    with no_collections():
        import asyncio
        import logging

        import uvloop

        from async_ckpt.core.transport import EndpointInUse

        from ..naming import NamingFormatter
        from ..roots import Roots
        from ..server import Config, Server

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(NamingFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=values["log_level"].value.upper(), handlers=[handler])
    keep_image_s = values["keep_image_s"].value
    config = Config(
        bind=values["bind"].value,
        roots=Roots.parse(values["root"].value),
        embedded=options.embedded,
        curve_secret=_path(values["curve_secret"].value),
        curve_allow=_path(values["curve_allow"].value),
        http=_address(values["http"].value),
        keep_image_s=keep_image_s,
        grace_s=values["grace_s"].value,
        lease_s=values["lease_s"].value,
        direct=values["shared_fs"].value == "direct",
        orphan_image_s=min(20.0, keep_image_s) if options.embedded else keep_image_s,
    )

    async def serve() -> None:
        await Server(config).serve()

    try:
        if sys.version_info >= (3, 11):
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve())
        else:
            uvloop.install()
            asyncio.run(serve())
    except EndpointInUse as error:
        logging.error("%s", error)
        return exit_codes.IN_USE
    return exit_codes.OK


def _address(text: str) -> Address | None:
    if not text:
        return None
    from ..http_listener import parse_address  # most savers have no listener

    return parse_address(text)


def _path(text: str) -> Path | None:
    return Path(text) if text else None
