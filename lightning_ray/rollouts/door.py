"""Whether the door answers, asked when an agent has failed: then it may not have been the agent.

A door that has died can tell nobody whose calls it cut off or refused. A replica that begins says
so to the queue (`RolloutQueue.door_opened`) before it answers; an attempt that ends before that
finds the door closed here. Where several replicas share the address another one answers at once:
what a client that does not call again makes of the one that died counts.
"""

import asyncio
import time

import aiohttp

DESCRIPTION = "/openapi.json"
"""The door describes itself there, to anybody."""
TRY_S = 5.0
TRIES = 2
"""Before a door that says nothing is closed: it may be busy. One that nobody listens at is."""
RETRY_EVERY_S = 0.5
_NOBODY_BEHIND = frozenset({502, 503, 504})
"""What a proxy says that has lost the door."""


async def closed(url: str, wait_s: float) -> str:
    """Why the door did not answer; empty when it did, at the first question.

    Comes back when it answers again, at most `wait_s` seconds later: until then no agent gets far.
    """
    deadline = time.monotonic() + wait_s
    first = why = await _ask(url + DESCRIPTION)
    while why and time.monotonic() < deadline:
        await asyncio.sleep(RETRY_EVERY_S)
        why = await _ask(url + DESCRIPTION)
    return first


async def _ask(url: str) -> str:
    limits = aiohttp.ClientTimeout(total=TRY_S)
    for _ in range(TRIES):
        try:
            # A connection of its own: one that is kept would say nothing of who listens now.
            async with aiohttp.ClientSession(timeout=limits) as session, session.get(url) as reply:
                if reply.status in _NOBODY_BEHIND:
                    return f"the gateway answered {reply.status}"
                return ""
        except TimeoutError:
            continue
        except aiohttp.ClientError as error:
            return f"the gateway did not answer: {error}"
    return f"the gateway did not answer within {TRIES} x {TRY_S:g} s"
