"""The prompt versions of one policy, kept in MLflow's prompt registry.

Invariant: a version is never overwritten. As with weights, MLflow counts the entries of a prompt
from 1 across runs; ours count from 0 (the agent's own prompt) within each run, and are tags.

An entry is a chat template: the system text, then the demonstrations as turns. MLflow reads
{{word}} in a template as a variable; it is stored as it stands, and `load` gives it back unchanged.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_ray.errors import UserError
from lightning_ray.policies.prompts import PromptVersion
from lightning_ray.tracking.store import open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
"""The alias of a version that was better on held-out tasks, and may be released."""

# MLflow's own tags: prompts of a run, and experiments of a prompt.
_LINKED = "mlflow.linkedPrompts"
_EXPERIMENTS = "_mlflow_experiment_ids"
_PREFIX = "lightning_ray."
_NAME = re.compile(r"[a-zA-Z0-9_.-]+")
_CHOICE = re.compile(r"prompts:/(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+))")


@dataclass(frozen=True)
class PromptEntry:
    """A prompt version as the registry holds it."""

    uri: str
    """prompts:/NAME/N, as `load` and MLflow's own `load_prompt` take it."""
    number: int
    """MLflow's own number, from 1 across runs."""
    prompt: PromptVersion
    tags: Mapping[str, str]
    """Lineage and scores, without our prefix: run, version, parent, proposer, score, ..."""
    aliases: tuple[str, ...] = ()


def prompt_name(policy: str, name: str | None) -> str:
    """The name in the registry: `name`, or POLICY-prompt, for POLICY is taken by its weights.

    Raises UserError for a name that MLflow refuses.
    """
    chosen = name if name is not None else f"{policy}-prompt"
    if not _NAME.fullmatch(chosen):
        raise UserError(
            f"prompt.name={chosen!r}: give it a name of letters, digits, dots, dashes and "
            "underscores"
        )
    return chosen


class PromptRegistry:
    """The prompt `name` in the MLflow store `uri`."""

    def __init__(self, uri: str, name: str):
        """Open it.

        Raises:
            UserError: the store cannot be opened, or the name belongs to a model.
        """
        self.name = prompt_name(name, name)
        self._client: MlflowClient = open_client(uri)
        self._refuse_model()

    def register(
        self, prompt: PromptVersion, run_id: str, tags: Mapping[str, str | int | float]
    ) -> PromptEntry:
        """Enter a version that the MLflow run `run_id` made.

        `tags` are its lineage and scores: parent, proposer, score, ... A (run, version) that is
        there already is left as it is.
        """
        for entry in self.entries(run_id):
            if entry.prompt.version == prompt.version:
                return entry
        values = {
            "run": run_id,
            "version": prompt.version,
            "policy": prompt.name,
            "kind": "prompt",
            "seed": prompt.seed,
            **tags,
        }
        run = self._client.get_run(run_id)
        made = self._client.register_prompt(
            self.name,
            _template(prompt),
            commit_message=f"{prompt.label} of run {run_id}",
            # All at once: an entry without its lineage could not be told from somebody else's.
            tags={
                **{f"{_PREFIX}{key}": str(value) for key, value in values.items()},
                _EXPERIMENTS: f",{run.info.experiment_id},",
            },
        )
        # The client's own function for this looks for the run in the process's default store.
        linked = json.loads(run.data.tags.get(_LINKED, "[]"))
        linked.append({"name": self.name, "version": str(made.version)})
        self._client.set_tag(run_id, _LINKED, json.dumps(linked))
        return self.load(f"prompts:/{self.name}/{made.version}")

    def tag(self, entry: PromptEntry, tags: Mapping[str, str | int | float]) -> None:
        """Add what became known of a version later."""
        for key, value in tags.items():
            self._client.set_prompt_version_tag(
                self.name, entry.number, f"{_PREFIX}{key}", str(value)
            )

    def set_alias(self, entry: PromptEntry, alias: str = CANDIDATE) -> None:
        """Point `alias` at a version; it leaves the one that it pointed at."""
        self._client.set_prompt_alias(self.name, alias, entry.number)

    def entries(self, run_id: str | None = None) -> list[PromptEntry]:
        """Every version that is ours, oldest first; those of one run, if it is named."""
        query = f"name = '{self.name}' and tags.`mlflow.prompt.is_prompt` = 'true'"
        found = []
        token = None
        while True:
            page = self._client.search_model_versions(query, max_results=1000, page_token=token)
            found += [entry.version for entry in page if f"{_PREFIX}version" in entry.tags]
            token = page.token
            if not token:
                break
        entries = [self.load(f"prompts:/{self.name}/{n}") for n in sorted(map(int, found))]
        return [e for e in entries if run_id is None or e.tags["run"] == run_id]

    def load(self, choice: str) -> PromptEntry:
        """The version at `prompts:/NAME/N` or `prompts:/NAME@ALIAS`.

        Raises UserError when there is none, or it is not one of ours.
        """
        return load_prompt(self._client, choice)

    def _refuse_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return
            # A prompt is no model, and MLflow says so.
            if "prompt" in str(error).lower():
                return
            raise
        if "mlflow.prompt.is_prompt" not in getattr(found, "_tags", found.tags):
            raise UserError(
                f"prompt.name={self.name}: a registered model has that name in MLflow; choose "
                "another"
            )


def load_prompt(client: "MlflowClient", choice: str) -> PromptEntry:
    """As `PromptRegistry.load`, of any name."""
    from mlflow.exceptions import MlflowException

    named = _CHOICE.fullmatch(choice)
    if named is None:
        raise UserError(f"{choice!r} names no prompt: write prompts:/NAME/N or prompts:/NAME@ALIAS")
    # Not the client's `load_prompt`: it writes to the store, to note who read what.
    try:
        if named["alias"]:
            found = client.get_prompt_version_by_alias(named["name"], named["alias"])
        else:
            found = client.get_prompt_version(named["name"], named["version"])
    except MlflowException as error:
        raise UserError(f"{choice}: {str(error).splitlines()[0]}") from error
    if found is None:
        raise UserError(f"{choice}: no such prompt version in the registry")
    return _entry(found)


def _template(prompt: PromptVersion) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": prompt.text}]
    for user, assistant in prompt.demonstrations:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return turns


def _entry(found: Any) -> PromptEntry:
    tags = {
        key.removeprefix(_PREFIX): value
        for key, value in found.tags.items()
        if key.startswith(_PREFIX)
    }
    uri = f"prompts:/{found.name}/{found.version}"
    if "version" not in tags or found.is_text_prompt:
        raise UserError(f"{uri} was not made by optimize-prompt: it names no policy and no seed")
    system, *turns = found.template
    pairs = zip(turns[::2], turns[1::2], strict=True)
    prompt = PromptVersion(
        name=tags["policy"],
        version=int(tags["version"]),
        seed=tags.get("seed", ""),
        text=system["content"],
        demonstrations=tuple((user["content"], said["content"]) for user, said in pairs),
    )
    return PromptEntry(uri, int(found.version), prompt, tags, tuple(found.aliases or ()))
