"""Answers an arithmetic question, in the style of an agent for Agent Lightning 1.0.

Its variables are that trainer's: AGL_OPENAI_BASE_URL and AGL_KEY for the model, AGL_EVENT_URL for
the reward that it gives itself, and QUESTION and ANSWER from the task.
"""

import asyncio
import operator
import os
import re

import httpx
from openai import AsyncOpenAI

CALL = re.compile(r"calc\((-?\d+) ([+*-]) (-?\d+)\)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
MESSAGES = [
    {"role": "system", "content": "Turn each question into a calculator expression."},
    {"role": "user", "content": "What is 12 plus 30?"},
    {"role": "assistant", "content": "calc(12 + 30)"},
]


def judge(reply: str, answer: int) -> tuple[float, str]:
    """(reward, why) of a model's reply."""
    call = CALL.fullmatch(reply.strip())
    if call is None:
        return 0.0, "no calculator call"
    value = OPERATORS[call[2]](int(call[1]), int(call[3]))
    return (1.0, "right") if value == answer else (0.1, f"{value} is not {answer}")


class Agent:
    async def run(self) -> None:
        key = os.environ["AGL_KEY"]
        async with AsyncOpenAI(base_url=os.environ["AGL_OPENAI_BASE_URL"], api_key=key) as client:
            reply = await client.chat.completions.create(
                model="auto",
                messages=[*MESSAGES, {"role": "user", "content": os.environ["QUESTION"]}],
                max_tokens=20,
            )
        value, reason = judge(reply.choices[0].message.content or "", int(os.environ["ANSWER"]))
        async with httpx.AsyncClient(timeout=10) as http:
            response = await http.post(
                os.environ["AGL_EVENT_URL"],
                json={"event_type": "reward", "data": {"value": value, "reason": reason}},
                headers={"Authorization": f"Bearer {key}"},
            )
            response.raise_for_status()


if __name__ == "__main__":
    asyncio.run(Agent().run())
