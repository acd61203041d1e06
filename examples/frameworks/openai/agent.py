"""OpenAI's own client, chat completions: the model calls a tool, then says the result.

python agent.py "What is 12 plus 30?"
"""

import json
import sys

from openai import OpenAI

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def add(a: int, b: int) -> int:
    return a + b


def main() -> None:
    client = OpenAI()
    messages = [
        {"role": "system", "content": "Use the calculator, then say the result."},
        {"role": "user", "content": sys.argv[1]},
    ]
    reply = client.chat.completions.create(
        model="gpt-4o-mini",
        messages=messages,
        tools=[ADD],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
    )
    message = reply.choices[0].message
    messages.append(message)
    for call in message.tool_calls or []:
        result = add(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    reply = client.chat.completions.create(
        model="gpt-4o-mini", messages=messages, tools=[ADD], max_tokens=100
    )
    print(reply.choices[0].message.content)


if __name__ == "__main__":
    main()
