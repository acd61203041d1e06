"""Judges the one line that the agent prints: `calc(12 + 30) = 42`."""

import re

LINE = re.compile(r"calc\(-?\d+ [+*-] -?\d+\) = (-?\d+)")


def grade(task, result, spans):
    """1 for the right value, 0.1 for a well-formed call of any other, else 0."""
    line = LINE.fullmatch(result.stdout.strip())
    exact = line is not None and int(line[1]) == task["answer"]
    reward = 1.0 if exact else 0.1 if line else 0.0
    return {"reward": reward, "exact": float(exact), "format": float(line is not None)}
