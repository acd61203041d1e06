"""The settings of the policies of a run, as Hydra checks them: `policy`, or `policies` by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
    input_per_million: float = 0.0
    """Price of a million prompt tokens, for the cost on the span."""
    output_per_million: float = 0.0
    """Price of a million answered tokens."""


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

    @property
    def is_upstream(self) -> bool:
        """Whether somebody else's API answers for it."""
        return bool(self.upstream.base_url)


def settle_policies(
    single: PolicyConfig, several: Mapping[str, PolicyConfig]
) -> tuple[PolicyConfig, dict[str, PolicyConfig]]:
    """The policy that is trained, and the frozen ones by name.

    Without `several` the run has one policy, `single`. Raises UserError for what cannot be trained
    and for values that no policy can have.
    """
    if not several:
        several = {single.name: single}
    named = {name: replace(policy, name=name) for name, policy in several.items()}
    for name, policy in named.items():
        where = "policy" if policy.name == single.name and len(named) == 1 else f"policies.{name}"
        if policy.keep_versions < 1:
            raise UserError(
                f"{where}.keep_versions={policy.keep_versions}: the version in use is kept, "
                "so at least 1"
            )
        if policy.is_upstream and policy.train:
            raise UserError(
                f"{where} is answered by {policy.upstream.base_url}, whose weights cannot be "
                f"trained; set {where}.train=false, or take its upstream away"
            )
        if policy.is_upstream and not policy.upstream.base_url.startswith(("http://", "https://")):
            raise UserError(f"{where}.upstream.base_url={policy.upstream.base_url}: no http(s) URL")
    trained = [policy for policy in named.values() if policy.train]
    if len(trained) != 1:
        names = ", ".join(policy.name for policy in trained) or "none"
        raise UserError(
            f"one policy of {', '.join(named)} is to be trained, and {names} would be; "
            "set policies.NAME.train=true for one and false for the others"
        )
    return trained[0], {name: policy for name, policy in named.items() if not policy.train}
