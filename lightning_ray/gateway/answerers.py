"""Who answers for a policy: engines of ours, or an API of somebody else's."""

import os
import zlib
from dataclasses import dataclass

from lightning_ray.errors import UserError
from lightning_ray.policies import PolicyConfig


@dataclass(frozen=True)
class Upstream:
    """An API of somebody else's, with its key; made where the job is started."""

    base_url: str
    model: str | None
    key: str | None
    input_per_million: float | None
    output_per_million: float | None

    def __repr__(self) -> str:
        # Without the key: this may come to stand in a log.
        return f"Upstream({self.base_url!r}, model={self.model!r})"


@dataclass(frozen=True)
class Answerer:
    """What answers the calls of one policy, at one version where it is ours."""

    policy: str
    urls: tuple[str, ...] = ()
    """Base URLs of engines of ours."""
    key: str = ""
    """What an engine wants to see of its caller."""
    upstream: Upstream | None = None

    def __repr__(self) -> str:
        return f"Answerer({self.policy!r}, urls={self.urls}, upstream={self.upstream})"

    def urls_for(self, rollout_id: str) -> list[str]:
        """The engines; the first is the one that a rollout stays on, for its prefix cache.

        Rendezvous hashing (Thaler and Ravishankar, 1998): where an engine is lost, its rollouts go
        to all the others alike, and no other moves.
        """
        return sorted(self.urls, key=lambda url: zlib.crc32(f"{rollout_id} {url}".encode()))


def upstream_answerer(policy: PolicyConfig) -> Answerer:
    """The answerer of a policy with an upstream. Raises UserError when its key is not set."""
    config = policy.upstream
    key = None
    if config.api_key_env is not None:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise UserError(
                f"the policy {policy.name} is answered by {config.base_url}, whose key is to be in "
                f"the environment variable {config.api_key_env}; it is not set"
            )
    upstream = Upstream(
        config.base_url.rstrip("/"),
        config.model,
        key,
        config.input_per_million,
        config.output_per_million,
    )
    return Answerer(policy.name, upstream=upstream)
