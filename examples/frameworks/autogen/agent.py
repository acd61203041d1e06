"""AutoGen's AssistantAgent with a tool that it may use; the answer is streamed.

python agent.py "What is 12 plus 30?"
"""

import asyncio
import sys

from autogen_agentchat.agents import AssistantAgent
from autogen_ext.models.openai import OpenAIChatCompletionClient


async def add(a: int, b: int) -> int:
    """Adds two whole numbers."""
    return a + b


async def main() -> None:
    model_client = OpenAIChatCompletionClient(model="gpt-4o-mini", max_tokens=200)
    agent = AssistantAgent(
        name="calculator",
        model_client=model_client,
        tools=[add],
        system_message="Use the calculator, then say the result.",
        reflect_on_tool_use=True,
        model_client_stream=True,
    )
    result = await agent.run(task=sys.argv[1])
    print(result.messages[-1].content)
    await model_client.close()


if __name__ == "__main__":
    asyncio.run(main())
