"""Work in threads that end with the process: whoever presses Ctrl-C does not wait for them."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait


def begin(work: Callable[[], None], name: str) -> "Future[None]":
    """Begins some work; the future has its end, or what it raised."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (raised again by the future)
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


@contextlib.contextmanager
def meanwhile(work: Callable[[], None], name: str, limit_s: float) -> "Iterator[Future[None]]":
    """Does some work beside what is done inside; what it uses may be ended afterwards.

    However that ends, the work is waited for, `limit_s` seconds at most; what it raised is for the
    future to tell.
    """
    future = begin(work, name)
    try:
        yield future
    finally:
        wait([future], limit_s)
