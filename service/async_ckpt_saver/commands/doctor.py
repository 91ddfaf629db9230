"""`doctor`: will a saver work here?"""

from __future__ import annotations

import argparse

from .. import exit_codes
from ..settings import BIND, ROOT
from .options import add_file, add_settings, effective

HELP = "examine this machine: shared memory, limits, storage, endpoint, clock, versions"
EXAMPLE = "async-ckpt-saver doctor --root /data/runs --bind ipc:///run/async-ckpt/saver.sock"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    add_settings(parser, {"also look at": (ROOT, BIND)})
    parser.add_argument("--json", action="store_true", help="a list of {check, verdict, found, advice}")


def run(options: argparse.Namespace) -> int:
    values = effective(options, (ROOT, BIND))

    import msgspec

    from ..examination import examine
    from ..roots import Roots

    root = values["root"].value
    roots = Roots.parse(root).all if root else []
    findings = []
    for finding in examine(roots, values["bind"].value):
        findings.append(finding)
        if not options.json:
            print(f"{finding.verdict:<5} {finding.check:<13} {finding.found}", flush=True)
            if finding.advice:
                print(f"{'':<20}{finding.advice}")
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(findings), indent=2).decode())
    return exit_codes.FOUND if any(finding.verdict == "fail" for finding in findings) else exit_codes.OK
