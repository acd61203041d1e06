"""The versions that a run made, as a line of a comparison: from which, how many, the newest."""

from dataclasses import dataclass

from lightning_ray.policies import PolicyRegistry, PolicyVersion
from lightning_ray.policies.registry import Weights
from lightning_ray.tracking.store import open_client

_SHOWN = 6


@dataclass(frozen=True)
class Lineage:
    """How the newest version of a policy came about in one run."""

    policy: str
    count: int
    """Versions of the run, the base included."""
    chain: tuple[int, ...]
    """From the base to the newest version, each made from the one before it."""
    base_model: str
    step: int
    """The step after which the newest was made."""
    created_by: str
    kind: str
    weights: str
    """Whether the newest version's weights can be read."""

    def words(self) -> str:
        """One line of plain text."""
        numbers = [str(number) for number in self.chain]
        if len(numbers) > _SHOWN:
            numbers = [*numbers[:3], "...", *numbers[-2:]]
        base = f" ({self.base_model})" if self.base_model else ""
        numbers[0] += base
        return (
            f"{self.policy}: {' > '.join(numbers)}; {self.count} in all, the newest {self.kind} of "
            f"step {self.step} by {self.created_by or 'an unknown maker'}, {self.weights}"
        )


def lineages(uri: str, run_id: str) -> list[Lineage]:
    """One for each policy that the MLflow run `run_id` made versions of, by policy name."""
    client = open_client(uri)
    entries = client.search_model_versions(f"run_id = '{run_id}'", max_results=1000)
    names = sorted({entry.name for entry in entries})
    found = [(name, PolicyRegistry(uri, name, run_id).versions()) for name in names]
    return [_lineage(name, versions) for name, versions in found if versions]


def _lineage(policy: str, versions: list[PolicyVersion]) -> Lineage:
    by_number = {version.number: version for version in versions}
    newest = versions[-1]
    chain = [newest.number]
    while (parent := by_number[chain[0]].parent) in by_number and parent not in chain:
        assert parent is not None
        chain.insert(0, parent)
    return Lineage(
        policy=policy,
        count=len(versions),
        chain=tuple(chain),
        base_model=by_number[chain[0]].base_model,
        step=newest.step,
        created_by=newest.created_by,
        kind=newest.kind,
        weights="present" if newest.weights is Weights.PRESENT else newest.weights.value,
    )
