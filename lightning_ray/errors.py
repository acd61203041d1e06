"""The errors that every room may raise.

A `UserError` is for the person at the terminal: one line that says what is wrong and what to
change. Commands print it without a traceback and exit with 2. Everything else is a defect or a
fault of the machine and keeps its traceback.
"""


class LightningRayError(Exception):
    """Base of every exception that this package raises on purpose."""


class UserError(LightningRayError):
    """Something the user can mend; the message says what is wrong and what to change."""


class InfrastructureError(LightningRayError):
    """A part of the system failed (an engine, a store, the network), not the agent.

    Never turned into a reward: a rollout that meets one is retried or left out and counted.
    """


class PartLostError(InfrastructureError):
    """A part died whose work goes on from the last checkpoint once it has been started anew."""


def own_error(error: BaseException) -> BaseException:
    """What an actor raised on purpose, as it raised it; else the error with Ray's account of it.

    Ray wraps what a task raised in errors with a `cause`, one for each task that it went through.
    """
    cause: BaseException = error
    while isinstance(inner := getattr(cause, "cause", None), BaseException):
        cause = inner
    return cause if isinstance(cause, LightningRayError) else error
