"""The command line of the saver."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from async_ckpt.core.errors import CheckpointError

EXIT_ERROR = 1
EXIT_IN_USE = 3

_EXAMPLE = """\
example:
  async-ckpt-saver run --bind ipc:///run/async-ckpt/saver.sock --root /data/runs
  then, in training: async_ckpt.attach(model, directory="/data/runs/llama3", saver="ipc:///run/async-ckpt/saver.sock")
"""


def main(arguments: list[str] | None = None) -> int:
    """Exit codes: 0 ended as asked, 1 error, 2 wrong usage, 3 another saver holds the endpoint; ended by a signal, the
    process dies of that signal."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=getattr(options, "log_level", "info").upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    try:
        options.verb(options)
    except CheckpointError as error:
        from async_ckpt.core.transport import EndpointInUse

        logging.error("%s", error)
        return EXIT_IN_USE if isinstance(error, EndpointInUse) else EXIT_ERROR
    except OSError as error:
        logging.error("%s", error)
        return EXIT_ERROR
    return 0


def _run(options: argparse.Namespace) -> None:
    import uvloop  # after the arguments are parsed: --help and usage errors should be quick

    from .server import Config, Server

    config = Config(
        bind=options.bind,
        root=Path(options.root),
        embedded=options.embedded,
        curve_secret=options.curve_secret,
        curve_allow=options.curve_allow,
        keep_image_s=options.keep_image_s,
        orphan_image_s=min(20.0, options.keep_image_s) if options.embedded else options.keep_image_s,
    )

    async def serve() -> None:
        await Server(config).serve()

    if sys.version_info >= (3, 11):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())
    else:
        uvloop.install()
        asyncio.run(serve())


def _keygen(options: argparse.Namespace) -> None:
    from async_ckpt.core.keys import generate

    for path in generate(options.path):
        print(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="async-ckpt-saver",
        description="Commits the checkpoints that training ranks stage in shared memory.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    run = verbs.add_parser(
        "run",
        help="serve the ranks of this host until SIGTERM",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.set_defaults(verb=_run)
    run.add_argument(
        "--bind", required=True, metavar="ENDPOINT", help="ipc:// and an absolute path, or tcp://HOST:PORT"
    )
    run.add_argument("--root", required=True, metavar="DIR", help="nothing is ever written outside DIR")
    run.add_argument(
        "--keep-image-s",
        type=float,
        default=900.0,
        metavar="SECONDS",
        help="keep the newest checkpoint of a dead job in RAM for its restart (default: %(default)g)",
    )
    run.add_argument(
        "--curve-secret",
        type=Path,
        default=os.environ.get("ASYNC_CKPT_CURVE_SECRET"),
        metavar="FILE",
        help="for tcp: this saver's keys, from keygen (default: $ASYNC_CKPT_CURVE_SECRET)",
    )
    run.add_argument(
        "--curve-allow",
        type=Path,
        default=os.environ.get("ASYNC_CKPT_CURVE_ALLOW"),
        metavar="DIR",
        help="for tcp: the *.key files of the clients that may connect (default: $ASYNC_CKPT_CURVE_ALLOW)",
    )
    run.add_argument("--embedded", action="store_true", help="exit when no run needs this saver any more")
    run.add_argument("--detach", action="store_true", help="go on in the background, in a session of its own")
    run.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    keygen = verbs.add_parser("keygen", help="make a pair of CURVE keys for tcp; nothing is overwritten")
    keygen.set_defaults(verb=_keygen)
    keygen.add_argument(
        "path", type=Path, metavar="PATH", help="makes PATH.key (public) and PATH.key_secret (mode 0600)"
    )
    return parser
