"""Pydantic AI: an agent with a tool, which it must use in its first step.

python agent.py "What is 12 plus 30?"
"""

import sys

from pydantic_ai import Agent, ModelSettings, RunContext, UsageLimits


def settings(context: RunContext) -> ModelSettings:
    choice = "required" if context.run_step <= 1 else "auto"
    return ModelSettings(tool_choice=choice, parallel_tool_calls=False, max_tokens=200)


agent = Agent(
    "openai:gpt-4o-mini",
    instructions="Use the calculator, then say the result.",
    model_settings=settings,
)


@agent.tool_plain
def add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b


def main() -> None:
    result = agent.run_sync(sys.argv[1], usage_limits=UsageLimits(request_limit=5))
    print(result.output)


if __name__ == "__main__":
    main()
