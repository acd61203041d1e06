import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from lightning_ray.errors import UserError
from lightning_ray.policies.registry import PolicyRegistry, PolicyVersion, Weights
from lightning_ray.policies.retention import prune
from lightning_ray.tracking.store import default_uri, open_client


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sqlite store that is made once: its tables take 2 s."""
    found = default_uri(tmp_path_factory.mktemp("store"))
    open_client(found)
    return found


@pytest.fixture
def new_run(uri: str) -> Callable[[], str]:
    client = MlflowClient(uri)
    return lambda: client.create_run("0").info.run_id


@pytest.fixture
def registry(uri: str, new_run: Callable[[], str]) -> PolicyRegistry:
    return PolicyRegistry(uri, "planner", new_run())


def version(registry: PolicyRegistry, number: int, folder: Path) -> PolicyVersion:
    """Version `number`, with a folder of weights."""
    path = folder / f"{number:06d}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.safetensors").write_bytes(b"weights")
    return PolicyVersion(
        policy=registry.name,
        number=number,
        path=path,
        run_id=registry.run_id,
        parent=number - 1 if number else None,
        step=number,
        created_by="grpo",
        digest=f"sha256:{number}",
        base_model="embedded",
    )


def test_versions_are_read_as_they_were_registered(
    registry: PolicyRegistry, uri: str, tmp_path: Path
) -> None:
    made = [version(registry, number, tmp_path) for number in range(12)]
    for one in made:
        registry.register(one)
    again = PolicyRegistry(uri, registry.name, registry.run_id)
    assert again.versions() == made
    assert again.get(0) == made[0] and again.get(0).parent is None
    assert again.latest() == made[-1]


def test_registering_a_version_again_changes_nothing(
    registry: PolicyRegistry, uri: str, tmp_path: Path
) -> None:
    registry.register(version(registry, 0, tmp_path))
    registry.register(version(registry, 0, tmp_path))
    PolicyRegistry(uri, registry.name, registry.run_id).register(version(registry, 0, tmp_path))
    assert len(entries(uri, registry)) == 1


def entries(uri: str, registry: PolicyRegistry) -> list[object]:
    query = f"name = '{registry.name}' and run_id = '{registry.run_id}'"
    return list(MlflowClient(uri, uri).search_model_versions(query))


def test_a_version_made_anew_supersedes_the_earlier_one_and_leaves_it_on_record(
    registry: PolicyRegistry, uri: str, tmp_path: Path
) -> None:
    registry.register(version(registry, 0, tmp_path))
    anew = replace(version(registry, 0, tmp_path), digest="sha256:other")
    registry.register(anew)
    assert registry.versions() == [anew]
    assert registry.get(0).digest == "sha256:other"
    first, second = sorted(entries(uri, registry), key=lambda entry: int(entry.version))  # type: ignore[attr-defined]
    assert first.tags["lightning_ray.digest"] == "sha256:0"
    assert second.tags["lightning_ray.supersedes"] == str(first.version)


@pytest.mark.parametrize(
    "other", [{"parent": 5}, {"step": 9}, {"kind": "adapter"}, {"path": Path("/elsewhere")}]
)
def test_a_version_is_never_overwritten(
    registry: PolicyRegistry, tmp_path: Path, other: dict[str, object]
) -> None:
    one = version(registry, 1, tmp_path)
    registry.register(one)
    with pytest.raises(ValueError, match="never overwritten"):
        registry.register(replace(one, **other))  # type: ignore[arg-type]
    assert registry.versions() == [one]


def test_runs_of_one_policy_number_their_versions_apart(
    uri: str, new_run: Callable[[], str], tmp_path: Path
) -> None:
    first, second = (PolicyRegistry(uri, "shared v1.5", new_run()) for _ in range(2))
    for registry in (first, second, first, second):
        for number in range(2):
            registry.register(version(registry, number, tmp_path / registry.run_id))
    assert [one.number for one in first.versions()] == [0, 1]
    assert [one.number for one in second.versions()] == [0, 1]
    assert first.latest().path != second.latest().path
    with pytest.raises(ValueError, match="does not belong"):
        first.register(version(second, 2, tmp_path))


def test_an_alias_that_somebody_set_stays_where_it_is(
    registry: PolicyRegistry, uri: str, tmp_path: Path
) -> None:
    registry.register(version(registry, 0, tmp_path))
    (entry,) = entries(uri, registry)
    client = MlflowClient(uri, uri)
    client.set_registered_model_alias(registry.name, "champion", entry.version)  # type: ignore[attr-defined]
    registry.register(version(registry, 1, tmp_path))
    held = client.get_model_version_by_alias(registry.name, "champion")
    assert held.tags["lightning_ray.version"] == "0"


def test_nothing_is_copied_and_registering_is_cheap(
    registry: PolicyRegistry, uri: str, tmp_path: Path
) -> None:
    registry.register(version(registry, 0, tmp_path))
    made = [version(registry, number, tmp_path) for number in range(1, 11)]
    seconds = []
    for one in made:
        started = time.monotonic()
        registry.register(one)
        seconds.append(time.monotonic() - started)
    # 20 ms on an idle machine; the fastest of ten, so that a busy one does not decide.
    assert min(seconds) < 0.1
    (entry,) = (e for e in entries(uri, registry) if e.tags["lightning_ray.version"] == "7")  # type: ignore[attr-defined]
    assert Path(entry.source) == made[6].path
    weights = list(Path(uri.removeprefix("sqlite:///")).parent.rglob("*.safetensors"))
    assert weights == []


def test_a_version_that_is_not_there_is_refused_with_those_that_are(
    registry: PolicyRegistry, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no version"):
        registry.latest()
    registry.register(version(registry, 0, tmp_path))
    with pytest.raises(UserError, match=r"no version 4 .* it has \[0\]"):
        registry.get(4)


@pytest.mark.parametrize("name", ["", "a/b", "it's", "a:b"])
def test_a_name_that_mlflow_cannot_hold_is_refused(uri: str, name: str) -> None:
    with pytest.raises(UserError, match=r"policy\.name"):
        PolicyRegistry(uri, name, "run")


def test_retention_removes_old_weights_and_says_which(
    registry: PolicyRegistry, tmp_path: Path
) -> None:
    made = [version(registry, number, tmp_path) for number in range(8)]
    for one in made:
        registry.register(one)
    removed = prune(registry, tmp_path, keep=2, pinned={3})
    assert [one.number for one in removed] == [1, 2, 4, 5]
    assert [one.number for one in made if one.path.exists()] == [0, 3, 6, 7]
    states = {one.number: one.weights for one in registry.versions()}
    assert {number for number, state in states.items() if state is Weights.REMOVED} == {1, 2, 4, 5}
    assert prune(registry, tmp_path, keep=2, pinned={3}) == []


@pytest.mark.parametrize("keep", [1, 3, 8, 20])
@pytest.mark.parametrize("pinned", [set(), {0, 2}, {1, 5, 99}])
def test_retention_never_removes_the_base_the_newest_or_a_pinned_version(
    registry: PolicyRegistry, tmp_path: Path, keep: int, pinned: set[int]
) -> None:
    made = [version(registry, number, tmp_path) for number in range(6)]
    for one in made:
        registry.register(one)
    removed = {one.number for one in prune(registry, tmp_path, keep, pinned)}
    assert removed == set(range(6)) - {0} - set(range(6)[-keep:]) - pinned
    assert {one.number for one in made if not one.path.exists()} == removed


def test_retention_leaves_folders_that_are_not_its_own(
    registry: PolicyRegistry, tmp_path: Path
) -> None:
    own, elsewhere = tmp_path / "versions", tmp_path / "elsewhere"
    outside = replace(version(registry, 1, elsewhere), number=1)
    linked = own / "000002"
    for one in (
        version(registry, 0, own),
        outside,
        replace(version(registry, 2, elsewhere), path=linked),
        version(registry, 3, own),
    ):
        registry.register(one)
    linked.symlink_to(elsewhere / "000002")
    assert prune(registry, own, keep=1) == []
    assert outside.path.exists() and (linked / "model.safetensors").exists()
    with pytest.raises(ValueError, match="keep"):
        prune(registry, own, keep=0)


def test_retention_finishes_a_removal_that_was_cut_short(
    registry: PolicyRegistry, tmp_path: Path
) -> None:
    made = [version(registry, number, tmp_path) for number in range(3)]
    for one in made:
        registry.register(one)
    registry.mark_weights(1, Weights.REMOVED)
    assert [one.number for one in prune(registry, tmp_path, keep=1)] == [1]
    assert not made[1].path.exists()


def test_a_version_whose_weights_are_back_is_marked_present(
    registry: PolicyRegistry, tmp_path: Path
) -> None:
    for number in range(3):
        registry.register(version(registry, number, tmp_path))
    prune(registry, tmp_path, keep=1)
    assert registry.get(1).weights is Weights.REMOVED
    registry.register(version(registry, 1, tmp_path))
    assert registry.get(1).weights is Weights.PRESENT
