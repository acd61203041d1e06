"""OpenAI's own client, the Responses API: the model calls a tool, then streams its answer.

python responses.py "What is 12 plus 30?"
"""

import json
import sys

from openai import OpenAI

ADD = {
    "type": "function",
    "name": "add",
    "description": "Adds two whole numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "strict": True,
}


def add(a: int, b: int) -> int:
    return a + b


def main() -> None:
    client = OpenAI()
    said = [{"role": "user", "content": sys.argv[1]}]
    response = client.responses.create(
        model="gpt-4o-mini",
        instructions="Use the calculator, then say the result.",
        input=said,
        tools=[ADD],
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=200,
    )
    said += response.output
    for item in response.output:
        if item.type == "function_call":
            result = add(**json.loads(item.arguments))
            output = {"type": "function_call_output", "call_id": item.call_id}
            said.append({**output, "output": str(result)})
    events = client.responses.create(
        model="gpt-4o-mini",
        instructions="Use the calculator, then say the result.",
        input=said,
        tools=[ADD],
        max_output_tokens=100,
        stream=True,
    )
    for event in events:
        if event.type == "response.output_text.delta":
            print(event.delta, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
