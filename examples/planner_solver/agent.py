"""Two models work on a question: a planner writes the calculator call, a solver the answer.

python agent.py "What is 12 plus 30?"
42
"""

import operator
import os
import re
import sys

from openai import OpenAI

PLANNER = os.environ.get("PLANNER_MODEL", "planner-mini")
SOLVER = os.environ.get("SOLVER_MODEL", "solver-mini")
PLAN = [
    {"role": "system", "content": "Turn each question into a calculator expression."},
    {"role": "user", "content": "What is 12 plus 30?"},
    {"role": "assistant", "content": "calc(12 + 30)"},
]
SOLVE = [
    {"role": "system", "content": "Answer each question with the calculator's number."},
    {"role": "user", "content": "What is 12 plus 30? The calculator says 42."},
    {"role": "assistant", "content": "42"},
]
CALL = re.compile(r"calc\(\s*(-?\d+)\s*([+*-])\s*(-?\d+)\s*\)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def ask(model: str, messages: list[dict[str, str]], question: str) -> str:
    """A model's reply to a question."""
    reply = OpenAI().chat.completions.create(
        model=model,
        messages=[*messages, {"role": "user", "content": question}],
        max_tokens=20,
    )
    return (reply.choices[0].message.content or "").strip()


def main() -> None:
    question = sys.argv[1]
    plan = ask(PLANNER, PLAN, question)
    call = CALL.fullmatch(plan)
    if call is None:
        print(f"no plan: {plan}")
        return
    left, sign, right = call.groups()
    result = OPERATORS[sign](int(left), int(right))
    print(ask(SOLVER, SOLVE, f"{question} The calculator says {result}."))


if __name__ == "__main__":
    main()
