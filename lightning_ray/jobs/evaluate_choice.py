"""What an evaluation is asked about: the configuration and the versions that were named.

Invariant: every mistake in them is found here, before a folder is made or Ray starts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from lightning_ray.errors import UserError
from lightning_ray.evaluation import GateConfig
from lightning_ray.jobs.compose import compose_config
from lightning_ray.policies import PolicyRegistry, PolicyVersion
from lightning_ray.policies.adapters import model_folder
from lightning_ray.policies.models import resolve_model
from lightning_ray.policies.registry import Weights
from lightning_ray.tracking.store import default_uri
from lightning_ray.training import RunFolder, TrainConfig, TrainingConfig, check_train
from lightning_ray.training.config import trained_policies

# What must be equal for engines to take on other weights without a restart.
_SHAPE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)


@dataclass
class EvaluateConfig(TrainConfig):
    """A training job's configuration, and gates; it needs no training tasks."""

    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(tasks=""))
    gate: GateConfig = field(default_factory=GateConfig)


@dataclass(frozen=True)
class Version:
    """Weights to run the tasks on."""

    label: str
    number: int
    path: Path
    others: Mapping[str, tuple[Path, int]] = field(default_factory=dict)
    """What the other policies answer with that the run trained too: folder and number, by name."""


def versions_of_run(
    words: Mapping[str, str], overrides: Sequence[str]
) -> tuple[EvaluateConfig, Version, Version | None]:
    """What a run was configured with, and the versions of it that are asked about."""
    roots = [o.removeprefix("output_dir=") for o in overrides if o.startswith("output_dir=")]
    folder = RunFolder.find(Path(roots[-1] if roots else "outputs"), words["run"], "run")
    typed = [override for override in folder.overrides() if _is_shared(override)]
    config = compose_config("train", EvaluateConfig, [*typed, *overrides])
    # Settles which policies are trained.
    check_train(config)
    _choose(config, words.get("of"))
    # Beside the run, wherever the command is typed.
    config.output_dir = str(folder.path.parent)
    mlflow_run = folder.facts().get("mlflow_run_id")
    uri = config.tracking.uri or default_uri(folder.path.parent)
    made: dict[str, list[PolicyVersion]] = {}
    if mlflow_run is not None:
        names = [policy.name for policy in trained_policies(config)]
        made = {name: PolicyRegistry(uri, name, mlflow_run).versions() for name in names}
    registered = made.pop(config.policy.name, [])
    if not registered:
        raise UserError(f"run={words['run']}: it has no version; it stopped before its first step")
    usable = [version for version in registered if _usable(version)]
    newest = str(usable[-1].number) if usable else str(registered[-1].number)
    others = {name: newest_of(name, versions) for name, versions in made.items()}
    subject = _version_of(folder, registered, "version", words.get("version", newest), others)
    against = None
    if "against" in words:
        against = _version_of(folder, registered, "against", words["against"], others)
        if against.number == subject.number:
            raise UserError(
                f"against={against.number}: version {against.number} against itself; name another"
            )
    return config, subject, against


def _choose(config: EvaluateConfig, policy: str | None) -> None:
    """Makes `policy` the one that is asked about, of those that the run trained."""
    trained = {one.name: one for one in trained_policies(config)}
    if policy is not None and policy not in trained:
        raise UserError(f"of={policy}: the run trained {', '.join(trained)}")
    if policy is not None:
        config.policy = trained[policy]


def newest_of(policy: str, versions: Sequence[PolicyVersion]) -> tuple[Path, int]:
    """The newest version of a policy whose weights are there: folder and number."""
    usable = [version for version in versions if _usable(version)]
    if not usable:
        raise UserError(f"none of the versions of {policy} has weights any more; train it again")
    return resolve_model(str(usable[-1].path)), usable[-1].number


def _is_shared(override: str) -> bool:
    """Whether a setting of a run means something here; jobs that make versions have their own."""
    key = override.lstrip("+~").partition("=")[0]
    names = {item.name for item in fields(EvaluateConfig)} | {"experiment", "hydra"}
    return key.partition(".")[0].partition("@")[0] in names


def _version_of(
    folder: RunFolder,
    registered: Sequence[PolicyVersion],
    key: str,
    word: str,
    others: Mapping[str, tuple[Path, int]],
) -> Version:
    usable = ", ".join(str(version.number) for version in registered if _usable(version))
    found = [version for version in registered if str(version.number) == word]
    if not found:
        raise UserError(
            f"{key}={word}: run {folder.run_id} has no such version; "
            f"versions with weights: {usable or 'none'}"
        )
    version = found[0]
    if not version.is_model:
        raise UserError(f"{key}={word}: version {word} is a {version.kind}, not weights")
    if not _usable(version):
        why = (
            "its weights were removed by retention (policy.keep_versions)"
            if version.weights is Weights.REMOVED
            else f"its weights are not at {version.path} any more"
        )
        raise UserError(f"{key}={word}: {why}; versions with weights: {usable or 'none'}")
    path = resolve_model(str(version.path))
    of = f" {version.policy}" if others else ""
    label = f"{folder.run_id}{of} version {version.number}"
    return Version(label, version.number, path, others)


def _usable(version: PolicyVersion) -> bool:
    return version.weights is Weights.PRESENT and version.path.is_dir()


def versions_of_models(
    words: Mapping[str, str], overrides: Sequence[str]
) -> tuple[EvaluateConfig, Version, Version | None]:
    """An experiment's model, and another one to compare it with."""
    for word in ("version", "of"):
        if word in words:
            raise UserError(f"{word}={words[word]}: of which run? add run=RUN")
    config = compose_config("train", EvaluateConfig, overrides)
    check_train(config)
    model = config.policy.model
    subject = Version(model, 0, resolve_model(model))
    if (name := words.get("against")) is None:
        return config, subject, None
    try:
        path = resolve_model(name)
    except UserError as error:
        raise UserError(
            f"against={name}: {str(error).removeprefix(f'policy.model={name}: ')}"
        ) from error
    if path == subject.path:
        raise UserError(f"against={name}: the same model as policy.model; name another")
    return config, subject, Version(name, 1, path)


def check_shapes(subject: Version, against: Version) -> None:
    """Engines take on weights of the shape they have. Raises UserError for others."""
    ours, theirs = (
        json.loads((model_folder(version.path) / "config.json").read_text())
        for version in (subject, against)
    )
    for key in _SHAPE:
        if ours.get(key) != theirs.get(key):
            raise UserError(
                f"against: {key} is {theirs.get(key)} in {against.label} and {ours.get(key)} in "
                f"{subject.label}; evaluate each, then compare with spans=RUN against=RUN"
            )
