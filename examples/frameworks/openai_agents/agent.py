"""OpenAI's Agents SDK: one agent with a function tool, which it must use before it answers.

python agent.py "What is 12 plus 30?"
"""

import sys

from agents import Agent, ModelSettings, Runner, function_tool


@function_tool
def add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b


def main() -> None:
    agent = Agent(
        name="Calculator",
        instructions="Use the calculator, then say the result.",
        model="gpt-4o-mini",
        tools=[add],
        # For the first turn: afterwards the SDK goes back to "auto".
        model_settings=ModelSettings(
            tool_choice="required", parallel_tool_calls=False, max_tokens=200
        ),
    )
    print(Runner.run_sync(agent, sys.argv[1], max_turns=5).final_output)


if __name__ == "__main__":
    main()
