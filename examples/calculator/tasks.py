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
WORDINGS = {
    "plus": [
        "What is {} plus {}?",
        "How much is {} plus {}?",
        "What is the sum of {} and {}?",
    ],
    "minus": [
        "What is {} minus {}?",
        "How much is {} minus {}?",
        "What is the difference between {} and {}?",
    ],
    "times": [
        "What is {} times {}?",
        "How much is {} times {}?",
        "What is the product of {} and {}?",
    ],
}
IN_THE_PROMPT = (12, "plus", 30)


def questions(seed: int) -> Iterator[tuple[str, int]]:
    """Questions and their answers, endlessly; no two calculations are alike."""
    rng = random.Random(seed)
    seen = {IN_THE_PROMPT}
    while True:
        left, right = (rng.randrange(*rng.choice([(10, 100), (100, 1000)])) for _ in range(2))
        word = rng.choice(list(OPERATORS))
        if word == "minus" and left < right:
            left, right = right, left
        if (left, word, right) not in seen:
            seen.add((left, word, right))
            yield rng.choice(WORDINGS[word]).format(left, right), OPERATORS[word](left, right)


def main() -> None:
    source = questions(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for name, count in FILES.items():
        with (FOLDER / f"{name}.jsonl").open("w") as file:
            for index in range(count):
                question, answer = next(source)
                task = {"id": f"{name}-{index:04d}", "question": question, "answer": answer}
                file.write(json.dumps(task) + "\n")


if __name__ == "__main__":
    main()
