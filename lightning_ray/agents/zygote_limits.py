"""Watching how much memory and how many processes the runs of a zygote hold.

A limit is on a run's whole process group. The kernel has no such limit without a control group of
our own, and none of its limits of one process will do: RLIMIT_AS counts address space, of which
runtimes reserve far more than they use, RLIMIT_DATA counts the stacks of threads that are never
touched, and RLIMIT_NPROC counts everything else that the user runs. So the group is looked at,
often, and ended when it holds too much; it can be over for as long as lies between two looks.

Invariant: a run is said to be over a limit only if its processes, counted once each, were.

Standard library only, and nothing newer than Python 3.9: the agent's interpreter is not ours.
"""

from __future__ import annotations

import os
import time

LOOK_EVERY_S = 0.05


class Watch:
    """The limits of the runs, by the process that leads each one's group."""

    def __init__(self) -> None:
        self._limits: dict[int, tuple[int | None, int | None]] = {}
        self._next = 0.0

    def add(self, leader: int, memory: int | None, processes: int | None) -> None:
        """Watch a group. Bytes of memory and a number of processes; None is no limit."""
        if memory is not None or processes is not None:
            self._limits[leader] = (memory, processes)

    def remove(self, leader: int) -> None:
        """Watch a group no longer. Harmless when repeated."""
        self._limits.pop(leader, None)

    def wait_ms(self, longest: int) -> int:
        """Milliseconds until the next look, at most `longest`."""
        if not self._limits:
            return longest
        left = (self._next - time.monotonic()) * 1000
        return max(0, min(longest, int(left) + 1))

    def over(self) -> list[tuple[int, str, int]]:
        """(leader, "memory" or "processes", how much) of groups over a limit, if a look is due."""
        if not self._limits or time.monotonic() < self._next:
            return []
        found = []
        for leader, members in _groups(self._limits).items():
            memory, processes = self._limits[leader]
            held = [bytes_held for _, bytes_held in members]
            if processes is not None and len(held) > processes:
                found.append((leader, "processes", len(held)))
            elif memory is not None and sum(held) > memory:
                # A page that several of them share has been counted for each; this is dearer. What
                # some give up while the others are read would be counted twice: read it again.
                once = min(held_together(members), held_together(members))
                if once > memory:
                    found.append((leader, "memory", once))
        self._next = time.monotonic() + LOOK_EVERY_S
        return found


def _groups(leaders: dict[int, tuple[int | None, int | None]]) -> dict[int, list[tuple[int, int]]]:
    """(pid, resident bytes) of the living processes of each of these groups."""
    groups: dict[int, list[tuple[int, int]]] = {leader: [] for leader in leaders}
    page = os.sysconf("SC_PAGE_SIZE")
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            # One system call each; only those of ours are read.
            group = os.getpgid(int(name))
            if group not in groups:
                continue
            with open(f"/proc/{name}/statm", "rb") as file:
                size, resident = file.read().split()[:2]
        except OSError:
            continue  # it ended meanwhile
        if size != b"0":  # which a zombie has
            groups[group].append((int(name), int(resident) * page))
    return groups


def held_together(members: list[tuple[int, int]]) -> int:
    """Bytes that these processes hold together, of pages that they share a part each."""
    return sum(_proportional(pid, resident) for pid, resident in members)


def _proportional(pid: int, resident: int) -> int:
    """Bytes of a process, pages that it shares divided among those who do.

    0 if it has ended. `resident`, if this cannot be read: it has taken on other rights, or the
    kernel does not say.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resident if _lives(pid) else 0


def _lives(pid: int) -> bool:
    """Whether a process still has memory; an ended one that nobody has waited for has none."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return file.read().split()[0] != b"0"
    except OSError:
        return False
