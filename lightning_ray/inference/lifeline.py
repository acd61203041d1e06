"""What vLLM's own processes are taught: to end with the engine's actor, to wait asleep, to keep
short blocks, and a head in float32 (`heads.py`).

vLLM runs its core and its workers in child processes. When Ray kills the actor, they would be left
behind. And they wait for each other awake: for a second after every message, which on a processor
is always, each spins on a shared counter, and takes from the agents (or from the forward pass
itself) the core that they need. vLLM loads this plugin (entry point `vllm.general_plugins`) in each
of them. And of a prompt that was read before they keep whole blocks only, on a processor of no less
than 32 tokens, which of short prompts is half.
"""

import ctypes
import multiprocessing
import os
import signal

LIFELINE = "LIGHTNING_RAY_LIFELINE"
"""Set to "1" in the environment of an engine's actor and so in that of its children."""

SPIN = "LIGHTNING_RAY_SPIN_S"
"""Set to how long such a process waits awake, seconds, where vLLM's own second is too long."""

BLOCK_TOKENS = "LIGHTNING_RAY_BLOCK_TOKENS"
"""Set to what the blocks of a processor's cache may be multiples of, tokens, where vLLM's own 32 is
too much."""

HEADS = "LIGHTNING_RAY_KEEP_HEADS"
"""Set where heads are computed on a processor."""

LOOK_EVERY_MS = 10
"""Who waits asleep looks this often whether there is something after all: no more than a hundredth
of a processor's time."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def teach() -> None:
    """vLLM calls this early in each of its processes."""
    tie()
    if os.environ.get(LIFELINE) == "1":
        look_often()
    if SPIN in os.environ:
        wait_asleep(float(os.environ[SPIN]))
    if BLOCK_TOKENS in os.environ:
        keep_blocks_of(int(os.environ[BLOCK_TOKENS]))
    if HEADS in os.environ and multiprocessing.parent_process() is not None:
        # In the actor itself nothing is computed.
        from lightning_ray.inference.heads import keep_heads

        keep_heads()


def wait_asleep(spin_s: float) -> None:
    """Messages between vLLM's processes are waited for awake for `spin_s`, and then asleep.

    Waking takes a tenth of a millisecond; a forward pass on a processor takes a hundred times that.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    # Of `busy_loop_s`, its one parameter with a default, which nobody passes.
    SpinCondition.__init__.__defaults__ = (spin_s,)


def look_often() -> None:
    """Who waits asleep for a message looks for itself every LOOK_EVERY_MS.

    vLLM may lose what is to wake a sleeper: it keeps one such word on its way at a time, and drops
    another that is sent before the first was read. It looks for itself every 5 s, for as long as
    which an engine would stand still.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = LOOK_EVERY_MS


def keep_blocks_of(tokens: int) -> None:
    """The keys and values of a processor are kept in blocks of a multiple of `tokens`, 16 or 32.

    vLLM has kernels for both (`vec16` and `vec`, among which it chooses by the size of the blocks)
    and lists the sizes of the second alone.
    """
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    def supported(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(tokens)]

    CPUAttentionBackend.get_supported_kernel_block_sizes = staticmethod(supported)


def tie() -> None:
    """Has this process end with the one that started it.

    Does nothing in the actor itself: its parent's threads come and go, and the kernel watches one.
    """
    if multiprocessing.parent_process() is not None:
        end_with_parent()


def end_with_parent() -> None:
    """Asks the kernel to kill this process when the thread that started it ends.

    Does nothing outside our engines, nor where the kernel is not Linux's.
    """
    if os.environ.get(LIFELINE) != "1" or os.uname().sysname != "Linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
