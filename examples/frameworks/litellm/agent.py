"""LiteLLM: one `completion` call for every provider; the model calls a tool, then says the result.

python agent.py "What is 12 plus 30?"
"""

import json
import sys

import litellm

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
    messages = [
        {"role": "system", "content": "Use the calculator, then say the result."},
        {"role": "user", "content": sys.argv[1]},
    ]
    reply = litellm.completion(
        model="openai/gpt-4o-mini",
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
    chunks = litellm.completion(
        model="openai/gpt-4o-mini", messages=messages, tools=[ADD], max_tokens=100, stream=True
    )
    for chunk in chunks:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
