"""All that happens to one directory whose checkpoints another host's saver commits: `desk.Desk`, for a relay.

(Register) -> attaching --Share for each rank--> live --handed over, every rank gone--> nothing
                  +-- Refused, by the lead --> nothing
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import msgspec

from async_ckpt.core.errors import CheckpointError
from async_ckpt.core.protocol import (
    FromRank,
    FromSaver,
    Granted,
    LayoutSent,
    LayoutWanted,
    Lead,
    Ping,
    Pong,
    Refuse,
    Refused,
    Register,
    Rejected,
    decode_from_saver,
    encode,
)
from async_ckpt.core.slots import Peer

from ..image import RunImage
from ..services import Services
from ..status import RunStatus
from ..watch import ProcessWatch
from .farewells import Farewells
from .link_words import Held, OfCopies, Opened, PartFailed, Said, Say, Share, Tell, Wanted, WritePart
from .relay_image import create_relay_image, grants_of
from .relay_run import RelayRun

log = logging.getLogger(__name__)

_REMEMBER_S = 20.0  # how long an answer to a rank that withdrew is waited for
_GIVEN_UP = 1.5  # leases of silence, after which the lead has surely given this host's ranks up


class _Attaching(msgspec.Struct):
    message: Register
    since_s: float
    share: Share | None = None


class RelayDesk:
    """`key` is its name among desks."""

    def __init__(self, key: str, directory: str, lead: Lead, services: Services, watch: ProcessWatch) -> None:
        assert services.dial is not None
        self.key, self.directory = key, directory
        self._lead = lead
        self._services = services
        self._watch = watch
        self._attaching: dict[bytes, _Attaching] = {}
        self._withdrawn: dict[bytes, tuple[Refuse, float]] = {}
        self._opened: dict[str, Opened] = {}
        self._opening: set[str] = set()
        self._runs: list[RelayRun] = []
        self._incarnation = ""
        self._ran = False  # ranks have been served: what is kept here is of their job
        self._link = services.dial(lead, self)
        self._farewells = Farewells(self._link.say)

    @property
    def empty(self) -> bool:
        return not (self._attaching or self._withdrawn or self._runs or self._farewells or self._awaits_end)

    @property
    def registering(self) -> bool:
        return bool(self._attaching)

    @property
    def serving(self) -> bool:
        return bool(self._attaching) or any(run.living or run.to_write for run in self._runs)

    @property
    def _awaits_end(self) -> bool:
        """The copy here is needed no more if the job ends as it should: the lead will say so, if it lives."""
        held = self._services.copies.held(self.directory) is not None
        return self._ran and held and self._link.silent_s <= self._services.lease_s

    def close(self) -> None:
        self._link.close()

    # --- from the hub ----------------------------------------------------------------------------------------------

    def register(self, identity: bytes, message: Register) -> None:
        run = self._run_of(identity)
        if run is not None:
            if message.rank == run.ranks[identity]:
                run.grant(message.rank)
            else:
                self._services.reject(identity, "unexpected", f"rank {run.ranks[identity]} says it is {message.rank}")
            return
        if identity in self._attaching:
            return  # said twice, because the answer takes time
        self._farewells.back(identity)
        self._attaching[identity] = _Attaching(message, self._services.now_s())
        self._watch.add(identity, message.process)
        self._say_register(identity, message)

    def withdraw(self, identity: bytes, message: Refuse) -> None:
        """A rank that cannot take part: the lead tells all others."""
        self._withdrawn[identity] = message, self._services.now_s()
        self._say(identity, msgspec.structs.replace(message, lead=None))

    def receive(self, identity: bytes, message: FromRank) -> bool:
        """False, and nothing has been done, if `identity` is not known here (`knows`)."""
        run = self._run_of(identity)
        if run is not None:
            run.receive(run.ranks[identity], message)
        elif not self.knows(identity):
            return False
        elif identity in self._farewells:
            self._services.send(identity, Pong(incarnation=self._services.incarnation, known=False))
        elif isinstance(message, Ping):
            self._services.send(identity, Pong(incarnation=self._services.incarnation, known=True))
        elif isinstance(message, LayoutSent):
            self._say(identity, message)
        else:
            self._services.reject(identity, "unexpected", f"a {type(message).__name__} of a rank that is attaching")
        return True

    def knows(self, identity: bytes) -> bool:
        waiting = identity in self._attaching or identity in self._withdrawn or identity in self._farewells
        return waiting or self._run_of(identity) is not None

    def process_gone(self, identity: bytes) -> None:
        run = self._run_of(identity)
        if run is not None and run.started:
            run.died(run.ranks[identity])
            return
        attaching = self._attaching.pop(identity, None)
        if attaching is not None and not self._incarnation:
            self._died_unheard(identity, attaching.message)
            return
        self._farewells.gone(identity)
        if run is not None:
            self._abandon(run, f"rank {run.ranks[identity]} died while attaching")

    def _died_unheard(self, identity: bytes, message: Register) -> None:
        """The lead has not been reached yet. Told nothing, it would wait for this rank as for one that is late."""
        self.withdraw(identity, Refuse(options=message.options, job=message.job, rank=message.rank,
                                       process=message.process, reason="it died while attaching"))  # fmt: skip

    def launcher_gone(self, run_path: Path) -> None:
        """No image outlives its ranks here."""

    def adopt(self, image: RunImage) -> None:
        self._install(image, None).recover()

    def expect(self, peers: list[Peer]) -> None:
        """Ranks whose run had not started when an earlier saver was killed: it is gone, and they register again."""
        self._farewells.expect([peer.identity for peer in peers], self._services.now_s())
        for peer in peers:
            self._watch.add(peer.identity, peer.process)

    def status(self) -> list[RunStatus]:
        return [run.status("relayed") for run in self._runs]

    def tick(self) -> None:
        now_s, silent_s = self._services.now_s(), self._link.silent_s
        for identity, each in list(self._attaching.items()):
            patience_s = each.message.options.timeout_s
            if now_s - each.since_s > patience_s and silent_s > patience_s:
                self._refuse(
                    identity,
                    f"the lead at {self._lead.endpoint}, the saver of rank 0's host, does not answer: can this host "
                    f"reach it there?",
                )
        self._withdrawn = {
            identity: (message, since_s)
            for identity, (message, since_s) in self._withdrawn.items()
            if now_s - since_s <= _REMEMBER_S
        }
        self._farewells.tick(now_s, silent_s, self._services.lease_s)
        for run in list(self._runs):
            if not run.living and silent_s > self._services.lease_s:
                log.error("the lead at %s has been silent for %.0f s: what the ranks of %s have staged here is lost",
                          self._lead.endpoint, silent_s, self.directory)  # fmt: skip
                run.end()
            elif run.started and silent_s > _GIVEN_UP * self._services.lease_s:
                run.give_up(
                    f"the lead at {self._lead.endpoint}, the saver of rank 0's host, has not been heard of for "
                    f"{silent_s:.0f} s, and goes on without this host: attach again when it can be reached"
                )

    # --- from the link ---------------------------------------------------------------------------------------------

    def link_open(self, incarnation: str) -> None:
        replaced = self._incarnation not in ("", incarnation)
        self._incarnation = incarnation
        self._services.copies.session_began(self._link, self.directory)  # before the ranks register
        for run in list(self._runs):
            if not run.started and replaced:  # the new lead does not know it, and removes what it had of it
                self._drop(run)
            else:
                run.session_began()
        self._farewells.session_began()
        for identity, each in self._attaching.items():
            each.share = None
            self._say_register(identity, each.message)
        for identity, (message, _) in self._withdrawn.items():
            self._say(identity, msgspec.structs.replace(message, lead=None))

    def link_denied(self, reason: str) -> None:
        log.error("%s", reason)
        for identity in [*self._attaching, *self._withdrawn]:
            self._refuse(identity, reason)

    def link_room(self) -> None:
        for run in list(self._runs):
            run.pump()

    def link_word(self, word: Said) -> None:
        if isinstance(word, Opened):
            self._opened[word.run] = word
            return
        if isinstance(word, OfCopies):
            self._services.copies.lead_word(self._link, self.directory, word)
            return
        identity, run = word.identity, self._run_of(word.identity)
        if isinstance(word, Tell):
            try:
                self._tell(identity, run, decode_from_saver(word.payload))
            except msgspec.DecodeError as error:
                log.error("the lead at %s sent what cannot be read: %s", self._lead.endpoint, error)
        elif isinstance(word, Share):
            if identity in self._attaching:
                self._attaching[identity].share = word
                self._open_if_shared(word.run)
        elif isinstance(word, Wanted | Held) and run is not None:
            run.transfer_word(run.ranks[identity], word)
        elif isinstance(word, WritePart) and run is not None:
            run.parts.word(word)
        elif isinstance(word, WritePart):
            reason = f"{socket.gethostname()} has nothing of this run any more"
            self._link.say(PartFailed(identity=identity, name=word.name, reason=reason))

    def _tell(self, identity: bytes, run: RelayRun | None, message: FromSaver) -> None:
        if run is not None:
            run.hear(run.ranks[identity], message)
        elif isinstance(message, Pong | Rejected) and identity in self._farewells:
            self._farewells.answered(identity)
        elif isinstance(message, Refused) and (identity in self._attaching or identity in self._withdrawn):
            self._refuse(identity, message.reason)
        elif isinstance(message, LayoutWanted | Rejected) and identity in self._attaching:
            self._services.send(identity, message)

    def _refuse(self, identity: bytes, reason: str) -> None:
        if self._attaching.pop(identity, None) is not None:
            self._watch.discard(identity)
        self._withdrawn.pop(identity, None)
        self._services.send(identity, Refused(reason=reason))

    def _say_register(self, identity: bytes, message: Register) -> None:
        self._say(identity, msgspec.structs.replace(message, lead=None, launcher=None))

    def _say(self, identity: bytes, message: FromRank) -> None:
        self._link.say(Say(identity=identity, payload=encode(message)))

    # --- runs ------------------------------------------------------------------------------------------------------

    def _run_of(self, identity: bytes) -> RelayRun | None:
        for run in self._runs:
            if identity in run.ranks:
                return run
        return None

    def _open_if_shared(self, name: str) -> None:
        """As soon as every rank of this host is there, one that attaches again after its saver was replaced too."""
        opened = self._opened.get(name)
        if opened is None or name in self._opening:
            return
        members = {identity: each for identity, each in self._attaching.items()
                   if each.share is not None and each.share.run == name}  # fmt: skip
        if {each.share.rank for each in members.values() if each.share is not None} == {*opened.ranks}:
            self._opening.add(name)
            self._services.spawn(self._open(opened, members))

    async def _open(self, opened: Opened, members: dict[bytes, _Attaching]) -> None:
        shared = [(each.share, each.message.process) for each in members.values() if each.share is not None]
        first = next(iter(members.values())).message
        try:
            image = await self._services.in_thread(
                lambda: create_relay_image(self._services, self._lead, opened, shared)
            )
        except Exception as error:
            if not isinstance(error, CheckpointError):
                log.exception("cannot open a run in %s", self.directory)
            self._cannot_open(members, first, str(error) or repr(error))
            return
        finally:
            self._opening.discard(opened.run)
            self._opened.pop(opened.run, None)
        if any(self._attaching.get(identity) is not each for identity, each in members.items()):
            image.remove()  # a rank died or was refused in the meantime
            return
        for identity in members:
            del self._attaching[identity]
        grants = grants_of(image, [share for share, _ in shared])
        run = self._install(image, grants)
        for rank in grants:
            run.grant(rank)

    def _cannot_open(self, members: dict[bytes, _Attaching], first: Register, reason: str) -> None:
        """Every rank of the job hears it, by the lead."""
        for identity in members:
            refuse = Refuse(options=first.options, job=first.job, rank=first.rank, process=first.process, reason=reason)
            self._say(identity, refuse)

    def _install(self, image: RunImage, grants: dict[int, Granted] | None) -> RelayRun:
        run = RelayRun(
            self._services,
            image,
            self._link,
            grants=grants,
            on_end=lambda: self._drop(run),
            on_fail=lambda reason: self._abandon(run, reason),
        )
        self._runs.append(run)
        self._ran = True
        for peer in image.record.peers:
            self._watch.add(peer.identity, peer.process)
        return run

    def _abandon(self, run: RelayRun, reason: str) -> None:
        """A granted run that did not come to start."""
        if run in self._runs:
            log.warning("run %s abandoned: %s", run.image.path, reason)
            for identity in run.ranks:
                self._services.send(identity, Refused(reason=reason))
            self._drop(run)

    def _drop(self, run: RelayRun) -> None:
        if run not in self._runs:
            return
        self._runs.remove(run)
        for identity in run.ranks:
            self._watch.discard(identity)
        if run.started:
            self._services.ended.append(run.status("ended"))
        log.info("run %s of %s ended here", run.image.path, self.directory)
        run.image.remove()
