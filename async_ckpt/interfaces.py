"""Which addresses this host has."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator, Mapping

from async_ckpt.core.errors import CheckpointError

_ANYWHERE = ("192.0.2.1", "2001:db8::1")  # for documentation: there is nobody, and nothing is sent to them


def address_of_host(environment: Mapping[str, str]) -> str:
    """The IP address by which the other hosts of this job reach this one: of the interface that leads to MASTER_ADDR,
    or else to the world. Raises CheckpointError if there is none but the loopback."""
    for address in _candidates(environment.get("MASTER_ADDR")):
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            return address
    raise CheckpointError(
        "no address is known by which other hosts reach this one: set ASYNC_CKPT_LEAD=tcp://IP:0 with the address of "
        "an interface of rank 0's host"
    )


def resolve(host: str) -> str:
    """The first IP address of a name. Raises CheckpointError."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise CheckpointError(f"{host!r} is no address of a host, and no name that is known here: {error}") from error


def is_here(address: str) -> bool:
    """Whether `address` is one of this host's own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _candidates(master: str | None) -> Iterator[str]:
    for target in (master, *_ANYWHERE):
        if target:
            with contextlib.suppress(OSError):
                yield _source(target)
    with contextlib.suppress(OSError):
        for found in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM):
            yield str(found[4][0])


def _source(target: str) -> str:
    """From which address a packet to `target` would go; none is sent."""
    family, kind, _, _, where = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)
        return str(probe.getsockname()[0])
