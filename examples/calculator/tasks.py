"""Makes train.jsonl and heldout.jsonl: arithmetic questions in words, no two alike.

    python examples/calculator/tasks.py [SEED]

The committed files are those of seed 0.
"""

import json
import operator
import random
import sys
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
FILES = {"train": 1024, "heldout": 128}
OPERATORS = {"plus": operator.add, "minus": operator.sub, "times": operator.mul}
IN_THE_PROMPT = (12, "plus", 30)


def questions(seed: int) -> Iterator[tuple[int, str, int]]:
    """Distinct (left, operator, right), both numbers of two or three digits, endlessly."""
    rng = random.Random(seed)
    seen = {IN_THE_PROMPT}
    while True:
        left, right = (rng.randrange(*rng.choice([(10, 100), (100, 1000)])) for _ in range(2))
        word = rng.choice(list(OPERATORS))
        if word == "minus" and left < right:
            left, right = right, left
        if (left, word, right) not in seen:
            seen.add((left, word, right))
            yield left, word, right


def main() -> None:
    source = questions(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for name, count in FILES.items():
        with (FOLDER / f"{name}.jsonl").open("w") as file:
            for index in range(count):
                left, word, right = next(source)
                task = {
                    "id": f"{name}-{index:04d}",
                    "question": f"What is {left} {word} {right}?",
                    "answer": OPERATORS[word](left, right),
                }
                file.write(json.dumps(task) + "\n")


if __name__ == "__main__":
    main()
