"""lightning-ray evaluate: how good a version is, or what recorded spans say.

    lightning-ray evaluate run=RUN                      # its last version on its held-out tasks
    lightning-ray evaluate run=RUN version=24 against=0 gate.max_regression=0.02
    lightning-ray evaluate run=RUN of=solver version=8  # of several that it trained, this one's
    lightning-ray evaluate experiment=calculator policy.model=FOLDER against=FOLDER
    lightning-ray evaluate spans=RUN where="version = 24"   # no agent runs

Ends with status 3 where a gate is not met.
"""

from collections.abc import Sequence

from lightning_ray.errors import UserError

WORDS = ("run", "of", "version", "against", "spans", "where", "against_where")
_OF_SPANS = ("where", "against_where")


def main(arguments: Sequence[str]) -> None:
    """Runs an evaluation. Raises UserError for what the user can mend, SystemExit(3) for gates."""
    words, overrides = split_words(arguments)
    if "spans" in words:
        for word in ("run", "of", "version"):
            if word in words:
                raise UserError(f"{word}=... runs the agent, spans=... does not: leave out one")
        # Imported late: measuring spans needs neither Ray nor torch.
        from lightning_ray.jobs.evaluate_spans import evaluate_spans

        evaluate_spans(words, overrides)
        return
    for word in _OF_SPANS:
        if word in words:
            raise UserError(f"{word}=...: a condition on spans; add spans=RUN or spans=FOLDER")
    if "run" not in words and not any(o.startswith("experiment=") for o in overrides):
        raise UserError("evaluate what? run=RUN, experiment=NAME, or spans=RUN|FOLDER")
    from lightning_ray.jobs.evaluate_version import evaluate_version

    evaluate_version(words, overrides)


def split_words(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own words by name, and the settings. Raises UserError for an empty word."""
    words: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name in WORDS and equals:
            if not value.strip():
                raise UserError(f"{argument}: a value is needed")
            words[name] = value
        else:
            overrides.append(argument)
    return words, overrides
