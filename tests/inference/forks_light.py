"""What a test has preloaded in place of vLLM, and what it has its processes do."""

import os
import time
from multiprocessing.connection import Connection

from lightning_ray.inference import forks, lifeline

lifeline.end_with_parent()

FORKED_FROM = os.getpid()


def tell(pipe: Connection) -> None:
    """Says what it was forked from, and with which environment."""
    pipe.send((FORKED_FROM, os.getpid(), os.getppid(), dict(os.environ)))


def have_told(pipe: Connection) -> None:
    """Has one that it starts itself say so."""
    os.environ["SINCE"] = "later"
    process = forks._context().Process(target=tell, args=(pipe,))
    process.start()
    process.join(30)


def stay(pipe: Connection) -> None:
    """Says who it is, and goes on for ever."""
    lifeline.tie()
    pipe.send((os.getppid(), os.getpid()))
    time.sleep(600)
