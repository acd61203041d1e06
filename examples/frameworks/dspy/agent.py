"""DSPy: a ReAct module that calls tools until it submits an answer.

python agent.py "What is 12 plus 30?"
"""

import sys

import dspy


def add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b


def main() -> None:
    # Without its cache: an answer that is remembered from another run was not sampled in this one.
    dspy.configure(
        lm=dspy.LM("openai/gpt-4o-mini", max_tokens=200, cache=False),
        adapter=dspy.ChatAdapter(use_native_function_calling=True),
    )
    react = dspy.ReActV2("question -> answer: int", tools=[add], max_iters=2)
    print(react(question=sys.argv[1]).answer)


if __name__ == "__main__":
    main()
