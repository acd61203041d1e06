"""The settings of the policies of a run, as Hydra checks them: `policy`, or `policies` by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_ray.errors import UserError


@dataclass
class UpstreamConfig:
    """An API of somebody else's that answers for a frozen policy."""

    base_url: str = ""
    """What a client of that API would be given, `/v1` included: https://HOST/v1"""
    model: str | None = None
    """The name to ask for there; null asks for the name that the agent uses."""
    api_key_env: str | None = None
    """Environment variable that holds its key, read where the job is started; null sends none."""
    input_per_million: float | None = None
    """Price of a million prompt tokens, US dollars; without any price there is no cost."""
    output_per_million: float | None = None
    """Price of a million answered tokens, US dollars."""


@dataclass
class PolicyConfig:
    """A named thing that answers model calls, and that may be trained."""

    name: str = "policy"
    """The policy's name, and that of its registered model in MLflow."""
    model: str = "embedded"
    """What version 0 is: `embedded`, a Hugging Face folder, or a Hugging Face id."""
    keep_versions: int = 3
    """Newest versions whose weights stay on disk, beside those that a checkpoint needs."""
    train: bool = True
    """Whether it learns; a frozen one stays bit for bit as it is."""
    upstream: UpstreamConfig = field(default_factory=UpstreamConfig)
    """Where upstream.base_url is set, that API answers in place of an engine of ours."""
    algorithm: dict[str, Any] = field(default_factory=dict)
    """Settings of `algorithm` that are its own when it learns, in place of the run's."""
    credit: dict[str, Any] = field(default_factory=dict)
    """Settings of `credit` that are its own."""
    learner: dict[str, Any] = field(default_factory=dict)
    """Settings of `learner` that are its own."""

    @property
    def is_upstream(self) -> bool:
        """Whether somebody else's API answers for it."""
        return bool(self.upstream.base_url)


def settle_policies(
    single: PolicyConfig, several: Mapping[str, PolicyConfig]
) -> dict[str, PolicyConfig]:
    """Every policy by name, in the order of the configuration; one at least is to be trained.

    Without `several` the run has one policy, `single`. Raises UserError for what cannot be trained
    and for values that no policy can have.
    """
    named = _named(single, several)
    for where, policy in named.items():
        if policy.is_upstream and policy.train:
            raise UserError(
                f"{where} is answered by {policy.upstream.base_url}, whose weights cannot be "
                f"trained; set {where}.train=false, or take its upstream away"
            )
    if not any(policy.train for policy in named.values()):
        key = "policies.NAME.train=true for one or more" if several else "policy.train=true"
        raise UserError(f"no policy of {_names(named)} is to be trained; set {key}")
    return {policy.name: policy for policy in named.values()}


def choose_policy(
    single: PolicyConfig, several: Mapping[str, PolicyConfig], chosen: str | None
) -> tuple[PolicyConfig, dict[str, PolicyConfig]]:
    """The policy `chosen`, and the others by name, for a job that trains no weights.

    Without `chosen`: the only policy there is, or the only one that would be trained. Raises
    UserError where that leaves several, or none of that name.
    """
    named = _named(single, several)
    policies = {policy.name: policy for policy in named.values()}
    if chosen is not None:
        found = [policies[chosen]] if chosen in policies else []
    else:
        found = [p for p in policies.values() if p.train or len(policies) == 1]
    if len(found) != 1:
        which = "name one" if chosen is None else f"there is none called {chosen!r}"
        raise UserError(f"prompt.policy: {which}; the policies are: {_names(named)}")
    still = {name: replace(policy, train=False) for name, policy in policies.items()}
    first = still.pop(found[0].name)
    return first, still


def _named(single: PolicyConfig, several: Mapping[str, PolicyConfig]) -> dict[str, PolicyConfig]:
    """Every policy, by the key that it is set under; raises UserError for impossible values."""
    if several:
        named = {f"policies.{name}": replace(p, name=name) for name, p in several.items()}
    else:
        named = {"policy": single}
    for where, policy in named.items():
        if policy.keep_versions < 1:
            raise UserError(
                f"{where}.keep_versions={policy.keep_versions}: the version in use is kept, "
                "so at least 1"
            )
        if policy.is_upstream and not policy.upstream.base_url.startswith(("http://", "https://")):
            raise UserError(f"{where}.upstream.base_url={policy.upstream.base_url}: no http(s) URL")
    return named


def _names(named: Mapping[str, PolicyConfig]) -> str:
    return ", ".join(policy.name for policy in named.values())
