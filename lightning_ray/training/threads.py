"""Work in threads that end with the process: whoever presses Ctrl-C does not wait for them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


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
