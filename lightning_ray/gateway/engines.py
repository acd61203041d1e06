"""Asking engines: a rollout's own one, and another when that is dead.

Invariant: a call goes to another engine only before a byte of a reply came, so an agent never sees
the halves of two answers.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import aiohttp
import ray

from lightning_ray.errors import InfrastructureError
from lightning_ray.gateway.answerers import Answerer

log = logging.getLogger(__name__)

DOWN_S = 5.0
"""How long an engine that did not answer is asked after the others, seconds."""
ASK_AGAIN_S = 0.5
FIND_S = 5.0
"""How long to wait for who knows where engines are, seconds."""

Moved = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses of a policy's engines, if they are others than at the beginning."""


class Engines:
    """Which engines answer, as one replica of the door has seen it."""

    def __init__(self, moved: Moved | None = None) -> None:
        """`moved` says where engines are that are no longer where they were."""
        self._down: dict[str, float] = {}
        self._moved = moved
        self._now_at: dict[str, Answerer] = {}
        self._asked_at: dict[str, float] = {}

    def order(self, answerer: Answerer, rollout_id: str) -> list[str]:
        """The engines in the order in which a rollout's call is to ask them."""
        now = time.monotonic()
        urls = self._now_at.get(answerer.policy, answerer).urls_for(rollout_id)
        return sorted(urls, key=lambda url: self._down.get(url, 0.0) > now)

    async def ask(
        self,
        session: aiohttp.ClientSession,
        method: str,
        answerer: Answerer,
        rollout_id: str,
        path: str,
        headers: Mapping[str, str],
        wait_s: float = 0.0,
        **options: Any,
    ) -> aiohttp.ClientResponse:
        """The beginning of the reply of the first engine that gives one.

        While none can be reached, one that died may be replaced, at its address or elsewhere: they
        are asked again for `wait_s` seconds. Raises aiohttp.ClientError when none answers then
        either.
        """
        deadline = time.monotonic() + wait_s
        while True:
            failed: aiohttp.ClientError | None = None
            for url in self.order(answerer, rollout_id):
                # Twice: the first connection may be an old one, which the engine closed meanwhile.
                for _ in range(2):
                    try:
                        return await session.request(method, url + path, headers=headers, **options)
                    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                        failed = error
                        break
                    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                        failed = error
                self._down[url] = time.monotonic() + DOWN_S
                log.warning("the engine at %s does not answer: %s", url, failed)
                if await self._moved_on(answerer):
                    break
            assert failed is not None
            if time.monotonic() >= deadline:
                # No timeout of the call's: that it has is another thing.
                raise aiohttp.ClientConnectionError(str(failed)) from failed
            await asyncio.sleep(ASK_AGAIN_S)

    async def _moved_on(self, answerer: Answerer) -> bool:
        """Whether the engines are found to be elsewhere now; asked now and then."""
        policy, now = answerer.policy, time.monotonic()
        if self._moved is None or now < self._asked_at.get(policy, 0.0) + ASK_AGAIN_S:
            return False
        self._asked_at[policy] = now
        try:
            async with asyncio.timeout(FIND_S):
                urls = tuple(await self._moved(policy))
        except (InfrastructureError, ray.exceptions.RayError, TimeoutError) as error:
            log.info("nobody says where the engines of %s are: %s", policy, error)
            return False
        if not urls or urls == self._now_at.get(policy, answerer).urls:
            return False
        self._now_at[policy] = replace(answerer, urls=urls)
        return True
