"""A rank's side of a preemption: all ranks stop after the same optimizer step, agreed on through the saver.

The client's thread answers for the rank whatever the training thread is doing, so the agreement takes a round trip and
needs no collective. The other half is `async_ckpt_saver/preemption.py`.
"""

from __future__ import annotations

import logging
import threading
import time

import torch

from async_ckpt.core.protocol import Promise, PromiseWanted, StopAfter

from .client import Client
from .handle import SaveHandle
from .notices import Notices
from .steps import Boundaries, Numbers

log = logging.getLogger(__name__)

_REPEAT_S = 1.0
# A saver that was killed is missed after 3 s and replaced within two more; then 20 s of a grace of 30 s are left.
_AGREE_S = 10.0


class Stand:
    """What a rank has begun, promised and heard. Pure.

        free --promise--> promised --stop heard--> stopping
          ^                  |
          +---- withdraw ----+

    `begun`: optimizer steps begun. `promised`: how many there were at the promise to begin one more at most. `stop`:
    the agreed number.
    """

    def __init__(self) -> None:
        self.begun = 0
        self.promised: int | None = None
        self.stop: int | None = None

    @property
    def at_limit(self) -> bool:
        """Nothing may be begun, nor said about being preempted, before the agreement is heard."""
        return self.promised is not None and self.begun > self.promised

    @property
    def preempted(self) -> bool:
        return self.stop is not None and self.begun >= self.stop

    def begin(self) -> None:
        assert not self.at_limit
        self.begun += 1

    def promise(self) -> None:
        """What was promised stays until it is withdrawn, so that it may be said again."""
        if self.promised is None and self.stop is None:
            self.promised = self.begun

    def withdraw(self) -> None:
        self.promised = None

    def hear(self, steps: int | None) -> bool:
        """False if this rank had lost patience and has begun those steps meanwhile: it has to promise anew."""
        limit = self.begun if self.promised is None else self.promised
        if steps is not None and self.stop is None and steps <= limit:
            return False
        if self.stop is None:
            self.stop = steps
        self.promised = None
        return True


class Preemption:
    """Made in the main thread, where it listens to signals until `close`. Everything else is thread-safe."""

    def __init__(self) -> None:
        self._stand = Stand()
        self._changed = threading.Condition()
        self._boundaries = Boundaries()
        self._numbers = Numbers()
        self._client: Client | None = None
        self._incarnation: str | None = None
        self._promised_s: float | None = None  # when this rank first heard of the preemption
        self._said_s = 0.0
        self._held_off = False  # there was no agreement with this saver: only if somebody asks again
        self._saved_steps: int | None = None  # optimizer steps begun at the last save
        self._final: SaveHandle | None = None
        self._inferred = False
        self._notices = Notices(self._wake)

    # --- for the training thread -----------------------------------------------------------------------------------

    @property
    def preempted(self) -> bool:
        """The agreed step is done. Turns true at the same step on every rank; waits for the agreement if it has to."""
        with self._changed:
            self._await_agreement()
            return self._stand.preempted

    @property
    def due(self) -> bool:
        """The parameters are those of the agreed step, and nobody has saved them yet."""
        return self.preempted and self._stand.begun == self._stand.stop and self._saved_steps != self._stand.begun

    def begins(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the step that `optimizer` is about to make begins a new step of the training."""
        return self._boundaries.begins(optimizer)

    def begin(self, optimizer: torch.optim.Optimizer) -> None:
        """Count a step that `optimizer` is about to make."""
        if self._boundaries.begins(optimizer):
            with self._changed:
                self._await_agreement()
                self._stand.begin()
        self._boundaries.step(optimizer)

    def number(self, newest: int | None) -> int:
        """What to call a save of the agreed step that the user does not make; above `newest`."""
        number = self._numbers.of(self._stand.begun)
        return number if newest is None else max(number, newest + 1)

    def restored(self, number: int) -> None:
        self._numbers.restored(self._stand.begun, number)

    def saved(self, handle: SaveHandle, *, due: bool, inferred: bool) -> None:
        """A save has begun. `due`: it is the one to resume from. `inferred`: the user did not make it."""
        self._saved_steps = self._stand.begun
        if not inferred:
            self._numbers.saved(self._stand.begun, handle.step)
        if due:
            self._final, self._inferred = handle, inferred
            log.warning("preemption: step %d is saved to resume from%s", handle.step,
                        "; its number is inferred from earlier saves" if inferred else "")  # fmt: skip

    def stands_for(self, step: int) -> SaveHandle | None:
        """The save that was made in the user's stead, if it has taken the number `step` or one above."""
        return self._final if self._inferred and self._final is not None and step <= self._final.step else None

    @property
    def unchanged(self) -> bool:
        """No step was begun since the last save."""
        return self._saved_steps == self._stand.begun

    def settled(self, step: int) -> None:
        final = self._final
        if final is not None and final.step == step and final.state == "committed":
            passed_s = time.monotonic() - (self._promised_s or 0.0)
            log.warning("preemption: step %d is committed, %.1f s after the notice", step, passed_s)

    # --- for whoever runs the conversation -------------------------------------------------------------------------

    def join(self, client: Client) -> None:
        """From now on the ranks talk through `client`; what was said through an earlier one is said again."""
        with self._changed:
            self._client, self._incarnation = client, None

    def lost(self) -> None:
        """There is no saver any more to agree through: nobody waits for it."""
        with self._changed:
            self._client = None
            self._stand.withdraw()
            self._changed.notify_all()

    def close(self) -> None:
        """Signals do again what they did before; `preempted` stays what it is."""
        self._notices.close()
        self.lost()

    # --- called by signals and by the client's thread --------------------------------------------------------------

    def _wake(self) -> None:
        client = self._client
        if client is not None:
            client.wake()

    def on_turn(self, incarnation: str | None) -> None:
        """Once a second at least, and soon after a signal."""
        with self._changed:
            if self._client is None:
                return
            another = incarnation != self._incarnation
            self._incarnation = incarnation
            self._held_off = self._held_off and not another
            if self._stand.stop is None and self._notices.received is not None and not self._held_off:
                self._promise(f"{self._notices.received} received")
            now_s = time.monotonic()
            waiting = self._stand.promised is not None and now_s - self._said_s >= _REPEAT_S
            # Whoever has heard tells another saver, for the earlier one may have died before it had told everybody.
            if waiting or (another and (self._stand.promised, self._stand.stop) != (None, None)):
                self._say(now_s)

    def on_word(self, word: PromiseWanted | StopAfter) -> None:
        """From the saver."""
        with self._changed:
            if isinstance(word, PromiseWanted):
                self._promise("another rank is to be preempted")
                self._say(time.monotonic())
                return
            new = self._stand.stop is None
            if not self._stand.hear(word.steps):
                self._held_off = False
                self._promise(f"the agreement on step {word.steps} came too late")
                self._say(time.monotonic())
                return
            self._held_off = word.steps is None
            if new and word.steps is None:
                log.warning("preemption: no step to stop after, since a rank has left")
            elif new:
                log.warning("preemption: all ranks stop after optimizer step %d; this one has begun %d",
                            word.steps, self._stand.begun)  # fmt: skip
            self._changed.notify_all()

    def _promise(self, why: str) -> None:
        if self._stand.promised is None and self._stand.stop is None:
            if self._promised_s is None:
                self._promised_s = time.monotonic()
            log.warning("preemption: %s after %d optimizer steps; the ranks agree on one to stop after",
                        why, self._stand.begun)  # fmt: skip
        self._stand.promise()

    def _say(self, now_s: float) -> None:
        self._said_s = now_s
        if self._client is not None:
            self._client.post(Promise(steps=self._stand.promised, stop=self._stand.stop))

    def _await_agreement(self) -> None:
        """Bounded: a training that goes on without its last checkpoint is better than one that hangs."""
        deadline_s = time.monotonic() + _AGREE_S
        while self._stand.at_limit:
            now_s = time.monotonic()
            if now_s >= deadline_s:
                log.error("preemption: not all ranks answered within %g s; training goes on", _AGREE_S)
                self._stand.withdraw()
                self._held_off = True
                self._say(now_s)
            else:
                self._changed.wait(deadline_s - now_s)
