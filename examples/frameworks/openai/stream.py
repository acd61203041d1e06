"""OpenAI's own client, chat completions as a stream: the tool call, then the answer as it comes.

python stream.py "What is 12 plus 30?"
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
    with client.chat.completions.stream(
        model="gpt-4o-mini",
        messages=messages,
        tools=[ADD],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        stream_options={"include_usage": True},
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    messages.append(message)
    for call in message.tool_calls or []:
        result = add(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    chunks = client.chat.completions.create(
        model="gpt-4o-mini", messages=messages, tools=[ADD], max_tokens=100, stream=True
    )
    for chunk in chunks:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
