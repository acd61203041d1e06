"""Anthropic's own client, Messages: the model uses a tool, then says the result.

python agent.py "What is 12 plus 30?"
"""

import sys

from anthropic import Anthropic

ADD = {
    "name": "add",
    "description": "Adds two whole numbers.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
SYSTEM = "Use the calculator, then say the result."


def add(a: int, b: int) -> int:
    return a + b


def main() -> None:
    client = Anthropic()
    messages = [{"role": "user", "content": sys.argv[1]}]
    reply = client.messages.create(
        model="claude-haiku-4-5",
        system=SYSTEM,
        messages=messages,
        tools=[ADD],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_tokens=200,
    )
    messages.append({"role": "assistant", "content": reply.content})
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": str(add(**block.input))}
        for block in reply.content
        if block.type == "tool_use"
    ]
    messages.append({"role": "user", "content": results or "Go on."})
    reply = client.messages.create(
        model="claude-haiku-4-5", system=SYSTEM, messages=messages, tools=[ADD], max_tokens=100
    )
    print("".join(block.text for block in reply.content if block.type == "text"))


if __name__ == "__main__":
    main()
