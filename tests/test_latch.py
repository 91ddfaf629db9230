from __future__ import annotations

import threading

from async_ckpt.latch import Latch


def test_it_opens_once_for_all_who_wait_and_for_all_who_come_later() -> None:
    latch, passed = Latch(), []
    threads = [threading.Thread(target=lambda: passed.append(latch.wait(30))) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert not latch.is_set()
    assert not latch.wait(0)
    assert not latch.wait(-1)
    assert passed == []
    setters = [threading.Thread(target=latch.set) for _ in range(8)]
    for thread in setters:
        thread.start()
    for thread in [*threads, *setters]:
        thread.join(30)
    assert passed == [True] * 8
    assert latch.is_set()
    assert latch.wait()
    assert latch.wait(0)


def test_a_timeout_of_any_length_is_accepted() -> None:
    latch = Latch()
    latch.set()
    latch.set()
    assert latch.wait(1e300)
