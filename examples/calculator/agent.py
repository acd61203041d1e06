"""Answers an arithmetic question: the model writes a calculator call, this program runs it.

python agent.py "What is 12 plus 30?"
calc(12 + 30) = 42
"""

import operator
import re
import sys

from openai import OpenAI

MESSAGES = [
    {"role": "system", "content": "Turn each question into a calculator expression."},
    {"role": "user", "content": "What is 12 plus 30?"},
    {"role": "assistant", "content": "calc(12 + 30)"},
]
CALL = re.compile(r"calc\(\s*(-?\d+)\s*([+*-])\s*(-?\d+)\s*\)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def ask(question: str) -> str:
    """The model's reply to a question."""
    reply = OpenAI().chat.completions.create(
        model="gpt-4o-mini",
        messages=[*MESSAGES, {"role": "user", "content": question}],
        max_tokens=20,
    )
    return reply.choices[0].message.content or ""


def calculate(left: int, sign: str, right: int) -> int:
    """The calculator tool."""
    return OPERATORS[sign](left, right)


def main() -> None:
    reply = ask(sys.argv[1])
    call = CALL.fullmatch(reply.strip())
    if call is None:
        print("no tool call:", " ".join(reply.split()))
        return
    left, sign, right = int(call[1]), call[2], int(call[3])
    print(f"calc({left} {sign} {right}) = {calculate(left, sign, right)}")


if __name__ == "__main__":
    main()
