"""Work beside other work: it is waited for, however that ends."""

import threading
import time

import pytest

from lightning_ray.training.threads import meanwhile


def test_work_beside_what_fails_has_ended_when_that_is_told() -> None:
    ended = threading.Event()

    def work() -> None:
        time.sleep(0.2)
        ended.set()

    with pytest.raises(KeyboardInterrupt), meanwhile(work, "work", 30.0):
        raise KeyboardInterrupt
    assert ended.is_set()


def test_what_it_raised_is_for_the_future_to_tell() -> None:
    def work() -> None:
        raise OSError("no room")

    with meanwhile(work, "work", 30.0) as done, pytest.raises(OSError, match="no room"):
        done.result(30.0)


def test_work_that_does_not_end_is_waited_for_so_long_and_no_longer() -> None:
    go_on = threading.Event()
    begun = time.monotonic()
    with meanwhile(lambda: go_on.wait(30.0) and None, "work", 0.2):
        pass
    assert 0.2 <= time.monotonic() - begun < 20.0
    go_on.set()
