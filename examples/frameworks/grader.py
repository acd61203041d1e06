"""Judges what an agent printed, whichever framework it is written in."""

import re

NUMBER = re.compile(r"-?\d+")


def grade(task, result, spans):
    """1 where the last number printed is the sum, 0.1 where there is any number, else 0."""
    numbers = NUMBER.findall(result.stdout)
    exact = bool(numbers) and numbers[-1] == str(task["answer"])
    return {"reward": 1.0 if exact else 0.1 if numbers else 0.0, "exact": float(exact)}
