"""Proposals by reflection: a language model reads what happened, and writes the prompt anew.

GEPA's reflective mutation (L. A. Agrawal et al., "GEPA: Reflective Prompt Evolution Can Outperform
Reinforcement Learning", 2025), with the library's own instruction to the language model.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning_ray.algorithms.prompts import Candidate, Exchange, Trial

_SHOWN = 2000
"""Characters of one text that the language model is shown."""


class Reflection:
    """Proposes what `ask` answers: a function from a prompt to a language model's answer."""

    def __init__(self, ask: Callable[[str], str]):
        self._ask = ask

    def learn(self, trials: Sequence[Trial]) -> None:
        """Nothing: only the rollouts of the prompt at hand are reflected on."""

    def propose(self, parent: Candidate, trials: Sequence[Trial]) -> Candidate | None:
        """The parent with its text written anew. Raises what `ask` raises."""
        from gepa.strategies.instruction_proposal import InstructionProposalSignature

        records = [record(trial) for trial in trials if trial.score is not None]
        if not records:
            return None
        said = InstructionProposalSignature.run(
            lm=lambda prompt: self._ask(str(prompt)),
            input_dict={"current_instruction_doc": parent.text, "dataset_with_feedback": records},
        )
        text = said["new_instruction"].strip()
        return replace(parent, text=text) if text else None


def record(trial: Trial) -> dict[str, Any]:
    """A rollout as the language model reads it: inputs, outputs, feedback."""
    rewards = ", ".join(f"{name} {value:g}" for name, value in trial.rewards.items())
    feedback = [f"Scores given by the grader: {rewards}."]
    if trial.printed.strip():
        feedback.append(f"The program that used the answer printed: {_cut(trial.printed)}")
    if trial.errors.strip():
        feedback.append(f"Its error output: {_cut(trial.errors)}")
    feedback.append(f"The task, with what its grader knows: {_cut(json.dumps(dict(trial.task)))}")
    return {
        "Inputs": _said(trial.exchanges, "asked"),
        "Generated Outputs": _said(trial.exchanges, "said"),
        "Feedback": "\n".join(feedback),
    }


def _said(exchanges: Sequence[Exchange], which: str) -> str:
    texts = [_cut(getattr(exchange, which)) for exchange in exchanges]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"Call {place}: {text}" for place, text in enumerate(texts, 1))


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else text[: _SHOWN - 4] + " ..."
