"""Importing large libraries in a process that others wait for."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def importing(without: tuple[str, ...] = ()) -> Iterator[None]:
    """What is imported meanwhile is not searched for garbage, neither then nor later.

    Modules stay. Python would look through all of them again and again while they come to be,
    which takes about a fifth of the time in which vLLM is imported, and once more in each later
    full collection; in a forked process that would also copy the memory it shares. Whatever else
    is there when this ends is kept for good as well, so it is for the beginning of a process.

    `without` names packages that others import only where they find them. They do not find these
    meanwhile, unless they are imported already; to be used where they are not called.
    """
    hidden = [name for name in without if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
        for name in hidden:
            if sys.modules.get(name, ...) is None:
                del sys.modules[name]
