"""An agent whose tools are those of an MCP server, which it starts itself.

python agent.py "What is 12 plus 30?"
"""

import asyncio
import json
import sys
from pathlib import Path

from mcp import Client, StdioServerParameters, stdio_client
from openai import AsyncOpenAI

SERVER = StdioServerParameters(
    command=sys.executable, args=[str(Path(__file__).with_name("server.py"))]
)


async def main() -> None:
    client = AsyncOpenAI()
    messages = [
        {"role": "system", "content": "Use the calculator, then say the result."},
        {"role": "user", "content": sys.argv[1]},
    ]
    async with Client(stdio_client(SERVER)) as server:
        tools = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.input_schema,
                },
            }
            for tool in (await server.list_tools()).tools
        ]
        reply = await client.chat.completions.create(
            model="gpt-4o-mini",
            messages=messages,
            tools=tools,
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=200,
        )
        message = reply.choices[0].message
        messages.append(message)
        for call in message.tool_calls or []:
            result = await server.call_tool(call.function.name, json.loads(call.function.arguments))
            text = "".join(part.text for part in result.content if part.type == "text")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
    reply = await client.chat.completions.create(
        model="gpt-4o-mini", messages=messages, tools=tools, max_tokens=100
    )
    print(reply.choices[0].message.content)


if __name__ == "__main__":
    asyncio.run(main())
