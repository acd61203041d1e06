"""Two agents of OpenAI's Agents SDK: a receptionist hands over to a mathematician, who has a tool.

python agent.py "What is 12 plus 30?"
"""

import sys

from agents import Agent, ModelSettings, Runner, function_tool


@function_tool
def add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b


must_call = ModelSettings(tool_choice="required", parallel_tool_calls=False, max_tokens=200)
mathematician = Agent(
    name="Mathematician",
    instructions="You are the mathematician. Use the calculator, then say the result.",
    model="gpt-4o",
    tools=[add],
    model_settings=must_call,
)
receptionist = Agent(
    name="Receptionist",
    instructions="You are the receptionist. Hand every sum over to the mathematician.",
    model="gpt-4o-mini",
    handoffs=[mathematician],
    model_settings=must_call,
)


def main() -> None:
    print(Runner.run_sync(receptionist, sys.argv[1], max_turns=6).final_output)


if __name__ == "__main__":
    main()
