"""A smolagents ToolCallingAgent: it calls tools until one of them is `final_answer`.

python agent.py "What is 12 plus 30?"
"""

import os
import sys

from smolagents import OpenAIModel, ToolCallingAgent, tool


@tool
def add(a: int, b: int) -> int:
    """Adds two whole numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def main() -> None:
    model = OpenAIModel(
        model_id="gpt-4o-mini",
        api_base=os.environ["OPENAI_BASE_URL"],
        api_key=os.environ["OPENAI_API_KEY"],
        max_tokens=200,
    )
    agent = ToolCallingAgent(tools=[add], model=model, max_steps=3, verbosity_level=0)
    print(agent.run(sys.argv[1]))


if __name__ == "__main__":
    main()
