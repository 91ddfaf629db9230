"""A job on several hosts: how its ranks find the saver of rank 0's host, which commits for all of them.

Rank 0 asks its saver to listen for the savers of the other hosts, and writes down where, and with which keys, in the
job's own store. Whoever sees the same /dev/shm as rank 0 has that saver for its own; the others' savers relay to it.
Without a store, which needs torch.distributed, the environment has to say the same on all hosts.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.keys import KeyPair, read_public, read_secret
from async_ckpt.core.location import Location, Url
from async_ckpt.core.manifest import MANIFEST_NAME
from async_ckpt.core.protocol import Lead, LeadOpen, LeadWanted
from async_ckpt.core.slots import shm_identity
from async_ckpt.core.terms import Address, Key, Name
from async_ckpt.core.transport import SECRET_VARIABLE, SERVER_VARIABLE

from .interfaces import address_of_host, is_here, resolve
from .links import Board, board_of_job
from .topology import LEAD_VARIABLE, Topology

log = logging.getLogger(__name__)

LINK_VARIABLE = "ASYNC_CKPT_LINK"  # "plain": no CURVE between hosts
_VISIBLE_S = 30.0  # for which a network filesystem may not show yet what another host has made
_POLL_S = 0.05


class Asks(Protocol):
    """What a client is to us."""

    def ask(self, message: LeadWanted, answer: type[LeadOpen], timeout_s: float) -> LeadOpen: ...


class Notice(msgspec.Struct, frozen=True):
    """What rank 0 tells the others. `reason`: why it will not attach; then nothing else is said. `public_key` and
    `secret_key` are made for this attach, and are empty where hosts have keys of their own, or none."""

    job: Name = ""
    shm: Name = ""
    endpoint: Address | None = None
    server_key: Key = b""
    public_key: Key = b""
    secret_key: Key = b""
    reason: str = ""


@dataclass(frozen=True)
class Link:
    """What the environment says. `address` is HOST, PORT; `own` and `server` are keys from files."""

    address: tuple[str, int] | None
    plain: bool
    own: KeyPair | None
    server: bytes | None

    @property
    def complete(self) -> bool:
        """No rank has to be told anything."""
        keys = self.plain or (self.own is not None and self.server is not None)
        return keys and self.address is not None and self.address[1] > 0


def read_link(environment: Mapping[str, str]) -> Link:
    """Raises CheckpointError for what the environment should not say."""
    how = environment.get(LINK_VARIABLE, "curve") or "curve"
    if how not in ("curve", "plain"):
        raise CheckpointError(
            f"{LINK_VARIABLE}={how!r}: say plain for a link without keys between hosts, or leave it out"
        )
    address = None
    if given := environment.get(LEAD_VARIABLE):
        host, _, port = given.removeprefix("tcp://").rpartition(":")
        if not given.startswith("tcp://") or not host or not (port.isascii() and port.isdigit()) or int(port) > 65_535:
            raise CheckpointError(f"{LEAD_VARIABLE}={given!r}: give tcp://HOST:PORT of rank 0's host, port 0 for any")
        address = (host.strip("[]"), int(port))
    secret, server = environment.get(SECRET_VARIABLE), environment.get(SERVER_VARIABLE)
    plain = how == "plain"
    return Link(
        address,
        plain,
        read_secret(Path(secret)) if secret and not plain else None,
        read_public(Path(server)) if server and not plain else None,
    )


class Hosts:
    """One attach of one rank. `meet` may be called again, after the saver was replaced."""

    def __init__(self, topology: Topology, attempt: int, board: Board | None, link: Link) -> None:
        self._topology, self._board, self._link = topology, board, link
        self._job = f"{topology.job}:{attempt}"
        self._notice: Notice | None = None  # as rank 0 has published it, or as another rank has read it
        self._asked: tuple[LeadWanted, KeyPair] | None = None  # by rank 0; asked again it is answered alike
        self._looks = 0
        self.relayed = False  # what this rank stages goes to the lead on another host

    def meet(self, client: Asks, timeout_s: float) -> tuple[str, Lead | None]:
        """What this attach is called, the same on every rank, and the lead, None on its own host.

        Raises CheckpointError, on the other ranks with rank 0's reason if that one cannot attach, or if nothing is
        heard of it within `timeout_s`.
        """
        if self._topology.rank == 0:
            self._open(client, timeout_s)
            return self._name(), None
        if self._board is None:
            lead = self._lead_by_environment()
        else:
            if self._notice is None:
                self._notice = self._read(self._board, timeout_s)
            lead = self._lead(self._notice)
        self.relayed = lead is not None
        return self._name(), lead

    def fail(self, reason: str) -> None:
        """Rank 0 will not attach: tell the others, unless they were told where to register and hear it there."""
        if self._topology.rank == 0 and self._board is not None and self._notice is None:
            self._publish(Notice(reason=_text(reason)))

    def attached(self) -> None:
        """Every rank is: what rank 0 had to say to the others is out of the store again."""
        if self._topology.rank == 0 and self._board is not None:
            try:
                self._board.remove("lead")
            except CheckpointError as error:
                log.warning("the keys of this attach stay in the job's store: %s", error)

    def all_see(self, checkpoint: Location, timeout_s: float, *, needed: bool = True) -> None:
        """Return when every rank sees `checkpoint`, or has it in RAM: then it is not `needed` here. Raises
        CheckpointError, on every rank, if one of them does not, or wants another one: a rank that looks for the newest
        by itself may look a moment earlier than the others."""
        self._looks += 1
        blind = self._blind(checkpoint) if needed else ""
        if self._board is None:
            if blind:
                raise CheckpointError(blind)
            return
        key = f"restore-{self._looks}"
        alike = _text(f"{key}-of-{checkpoint.name}")
        if blind:
            self._board.put(f"{key}-blind", _text(blind).encode())
        self._board.count(alike, 1)
        seen = self._board.count(key, 0 if blind else 1)
        deadline_s = time.monotonic() + timeout_s + _VISIBLE_S
        while True:
            if (reason := self._board.look(f"{key}-blind")) is not None:
                raise CheckpointError(blind or reason.decode())
            if seen >= self._topology.world:
                break
            if time.monotonic() > deadline_s:
                raise CheckpointError(
                    f"{seen} of {self._topology.world} ranks have come to restore {checkpoint} within {timeout_s:g} s: "
                    f"where a job spans hosts every rank has to call restore()"
                )
            time.sleep(_POLL_S)
            seen = self._board.count(key)
        if (same := self._board.count(alike)) != seen:
            raise CheckpointError(
                f"{same} of {seen} ranks want to restore {checkpoint.name}, this one too, and the others another "
                f"checkpoint: give all of them the same step, or 'latest'"
            )

    # --- rank 0 ----------------------------------------------------------------------------------------------------

    def _open(self, client: Asks, timeout_s: float) -> None:
        told, link = self._notice, self._link
        if self._asked is None:
            pair = self._pair()
            self._asked = LeadWanted(address=self._address(), allow=pair.public, plain=link.plain), pair
        wanted, pair = self._asked
        answer = client.ask(wanted, LeadOpen, timeout_s)
        if told is not None and (told.endpoint, told.server_key) != (answer.endpoint, answer.server_key):
            raise CheckpointError(
                f"the saver of rank 0's host was replaced while ranks attached, and the new one listens at "
                f"{answer.endpoint} instead of {told.endpoint}, or has another key: attach again"
            )
        if link.server is not None and self._board is None and answer.server_key != link.server:
            raise CheckpointError(
                f"the saver of rank 0's host has another key than the one in ${SERVER_VARIABLE} "
                f"({os.environ.get(SERVER_VARIABLE)}), by which the other hosts know it: give it ${SECRET_VARIABLE} of "
                f"the same pair, and start it again"
            )
        if told is not None:
            return
        self._notice = Notice(
            job=f"{self._job}:{secrets.token_hex(8)}" if self._board is not None else self._job,
            shm=shm_identity(),
            endpoint=answer.endpoint,
            server_key=answer.server_key,
            public_key=pair.public if link.own is None else b"",
            secret_key=pair.secret if link.own is None else b"",
        )
        log.info("the savers of the other hosts reach this one's at %s", answer.endpoint)
        if self._board is not None:
            self._publish(self._notice)

    def _pair(self) -> KeyPair:
        """By which other hosts' savers get in."""
        if self._link.plain:
            return KeyPair(b"", b"")
        if self._link.own is not None:
            return self._link.own
        return KeyPair(*zmq.curve_keypair())

    def _address(self) -> str:
        if self._link.address is not None:
            host, port = self._link.address
            host = resolve(host)
        else:
            host, port = address_of_host(os.environ), 0
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _publish(self, notice: Notice) -> None:
        assert self._board is not None
        self._notice = notice
        self._board.put("lead", msgspec.json.encode(notice))

    # --- the others ------------------------------------------------------------------------------------------------

    def _read(self, board: Board, timeout_s: float) -> Notice:
        data = board.wait_for("lead", timeout_s)
        if data is None:
            raise CheckpointError(
                f"rank 0 has not said within {timeout_s:g} s where its saver is: every rank must call "
                f"async_ckpt.attach with the same directory; see what rank 0 is doing, or raise timeout_s"
            )
        try:
            notice = msgspec.json.decode(data, type=Notice)
        except msgspec.DecodeError as error:
            raise CheckpointError(f"what rank 0 wrote into the job's store cannot be read ({error}): install the same "
                                  f"async-ckpt version on all hosts") from error  # fmt: skip
        if notice.reason:
            raise CheckpointError(f"rank 0 cannot attach: {notice.reason}")
        return notice

    def _lead(self, notice: Notice) -> Lead | None:
        if notice.shm == shm_identity():
            return None
        endpoint = self._own_endpoint() or notice.endpoint
        if not notice.server_key:
            return Lead(endpoint=str(endpoint), server_key=b"", public_key=b"", secret_key=b"")
        own = self._link.own
        if own is None and not notice.secret_key:
            raise CheckpointError(
                f"rank 0's host has keys of its own (${SECRET_VARIABLE}), this one ({socket.gethostname()}) has none: "
                f"set {SECRET_VARIABLE} on every host, or on none"
            )
        return Lead(
            endpoint=str(endpoint),
            server_key=notice.server_key,
            public_key=own.public if own is not None else notice.public_key,
            secret_key=own.secret if own is not None else notice.secret_key,
        )

    def _lead_by_environment(self) -> Lead | None:
        """`Link.complete` has made sure that everything is there."""
        link = self._link
        assert link.address is not None
        if is_here(resolve(link.address[0])):
            return None
        endpoint = str(self._own_endpoint())
        if link.plain or link.own is None or link.server is None:
            return Lead(endpoint=endpoint, server_key=b"", public_key=b"", secret_key=b"")
        return Lead(endpoint, link.server, link.own.public, link.own.secret)

    def _own_endpoint(self) -> str | None:
        """Where this host reaches the lead, if the environment says so: another address may lead there from here."""
        if self._link.address is None or self._link.address[1] == 0:
            return None
        host, port = self._link.address
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

    # --- all -------------------------------------------------------------------------------------------------------

    def _name(self) -> str:
        return self._notice.job if self._notice is not None else self._job

    def _blind(self, checkpoint: Location) -> str:
        """Why this rank cannot read `checkpoint`, "" if it can."""
        here = f"rank {self._topology.rank} on host {socket.gethostname()}"
        if isinstance(checkpoint, Url):  # all hosts see the same store, if they can look into it
            try:
                return "" if checkpoint.is_dir() else f"{here} sees no checkpoint at {checkpoint}"
            except CheckpointError as error:
                return f"{here} cannot look into the store: {error}"
        deadline_s = time.monotonic() + _VISIBLE_S
        while not _there(checkpoint):
            if time.monotonic() > deadline_s:
                return (
                    f"{here} sees no checkpoint at {checkpoint}: to restore, every host has to see the directory, on a "
                    f"filesystem that they share (NFS, Lustre, GPFS); only rank 0's host writes to it"
                )
            time.sleep(_POLL_S)
        return ""


def several_hosts(topology: Topology, directory: Location, attempt: int) -> Hosts | None:
    """None on one host. Raises CheckpointError if nothing tells the ranks of other hosts where rank 0's saver is."""
    if not topology.spans_hosts:
        return None
    link = read_link(os.environ)
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    board = board_of_job(f"async_ckpt/{name}/{attempt}")
    if board is None and not link.complete:
        raise CheckpointError(
            f"this job has {topology.world} ranks on several hosts, and nothing tells them where the saver of rank 0's "
            f"host is: call torch.distributed.init_process_group before attach, or set on every host "
            f"{LEAD_VARIABLE}=tcp://IP:PORT (of rank 0's host), {SECRET_VARIABLE} and {SERVER_VARIABLE} "
            f"(`async-ckpt-saver keygen` makes the keys)"
        )
    return Hosts(topology, attempt, board, link)


def _text(reason: str) -> str:
    """As UTF-8 can hold it: names of files may be anything."""
    return reason.encode(errors="backslashreplace").decode()


def _there(checkpoint: Path) -> bool:
    """An open directory is asked of the server anew; what was not there a moment ago may be remembered as missing."""
    try:
        os.listdir(checkpoint.parent)
        names = os.listdir(checkpoint)
    except OSError:
        return False
    return MANIFEST_NAME in names or any(name.endswith(".safetensors") for name in names)
