"""The calculator example, whose tool keeps it waiting: log-normal, as tools that people wait for.

python slow_calculator.py "What is 12 plus 30?" MEDIAN SIGMA

MEDIAN is in seconds; SIGMA is the standard deviation of the wait's natural logarithm.
"""

import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "calculator"))

import agent

model = agent.ask


def ask_and_wait(question: str) -> str:
    """The model's reply, once the tool behind it has answered."""
    reply = model(question)
    time.sleep(random.lognormvariate(math.log(float(sys.argv[2])), float(sys.argv[3])))
    return reply


if __name__ == "__main__":
    agent.ask = ask_and_wait
    agent.main()
