"""Ties vLLM's own processes to the engine's actor, so that none outlives it.

vLLM runs its core and its workers in child processes. When Ray kills the actor, they would be left
behind, spinning. vLLM loads this plugin (entry point `vllm.general_plugins`) in each of them.
"""

import ctypes
import multiprocessing
import os
import signal

LIFELINE = "LIGHTNING_RAY_LIFELINE"
"""Set to "1" in the environment of an engine's actor and so in that of its children."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tie() -> None:
    """Asks the kernel to kill this process when the one that started it dies.

    Does nothing outside our engines, in the actor itself (its parent's threads come and go, and the
    kernel watches the thread), nor where the kernel is not Linux's.
    """
    ours = os.environ.get(LIFELINE) == "1" and multiprocessing.parent_process() is not None
    if not ours or os.uname().sysname != "Linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
