"""What a learner would get: exact tokens, how turns continue each other, how they were sampled."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from lightning_ray.doctor.evidence import Evidence
from lightning_ray.doctor.exchange import Asked
from lightning_ray.doctor.finding import Finding, missing, ok, warning
from lightning_ray.spans import SpanStatus
from lightning_ray.trajectories import TokenTree, rebuild_trees

_CUT_SHARE = 0.25
"""From this share of answers cut by a length limit on, it is worth a warning."""


def check_learning(seen: Evidence) -> list[Finding]:
    """Every finding about the tokens; none where no call reached a model."""
    calls = seen.calls
    if not calls:
        if not seen.answered:
            return []
        return [
            missing(
                "tokens",
                "requests were answered, but the model sampled nothing for any of them",
                "have the agent ask for text: chat, completions, Responses or Messages",
            )
        ]
    trees, inexact = rebuild_trees(seen.spans)
    return [
        _tokens(calls, inexact),
        _turns(seen, trees),
        *_sampling(calls),
        _contrast(seen, calls),
        *_lengths(seen, calls),
        *_aborted(calls),
    ]


def _tokens(calls: Sequence[dict[str, Any]], inexact: dict[str, str]) -> Finding:
    title = "tokens"
    reasons = list(inexact.values())
    reasons += [f"call {c['span_id']} has no version" for c in calls if c["version"] is None]
    reasons += [f"call {c['span_id']} has no logprobs" for c in calls if c["logprobs"] is None]
    if reasons:
        return missing(
            title,
            f"not exact in {len(reasons)} places: {reasons[0]}",
            "a call must be sampled by an engine of ours to be learnt from",
        )
    sampled = sum(len(call["logprobs"]) for call in calls)
    given = sum(call["attributes"].get("prompt_tokens", 0) for call in calls)
    return ok(
        title,
        f"exact: {len(calls)} calls with ids, logprobs and version; {given} tokens in, "
        f"{sampled} sampled",
    )


def _turns(seen: Evidence, trees: Sequence[TokenTree]) -> Finding:
    title = "turns"
    several = [tree for tree in trees if len(tree.calls) > 1]
    if not several:
        return ok(title, "one call a run: each is a sequence of its own")
    later = sum(len(tree.calls) - 1 for tree in several)
    # A tree's first call continues none.
    going_on = sum(parent is not None for tree in several for parent in tree.parents)
    found = f"{going_on} of {later} later calls continue an earlier one token by token"
    if going_on == later:
        return ok(title, f"{found}: a run is one sequence")
    exchanges = seen.by_attempt()
    by_text = sum(
        _continue([exchange.asked for exchange in exchanges.get(tree.attempt_id, ())])
        for tree in several
    )
    if by_text > going_on:
        return warning(
            title,
            f"{found}, though {by_text} repeat the earlier messages: the chat template or the "
            "agent writes them differently from what was sampled",
            "each such call becomes a sequence of its own, exact but computed anew; a model whose "
            "template repeats its answers as they were costs less",
        )
    return warning(
        title,
        f"{found}: the agent rewrites its context, or asks about different things",
        "nothing, where that is meant: each such call becomes a sequence of its own with the run's "
        "reward; where it is not, keep the history and append to it",
    )


def _continue(asked: Sequence[Asked]) -> int:
    """How many requests repeat an earlier one's messages, then the model's answer to them."""
    return sum(
        any(_repeats(request, earlier) for earlier in asked[:place])
        for place, request in enumerate(asked)
    )


def _repeats(request: Asked, earlier: Asked) -> bool:
    length = len(earlier.messages)
    return (
        length < len(request.messages)
        and request.messages[:length] == earlier.messages
        and request.replies[length]
    )


def _sampling(calls: Sequence[dict[str, Any]]) -> list[Finding]:
    title = "sampling"
    told = [call["attributes"].get("sampling", {}) for call in calls]
    findings = []
    greedy = sum(params.get("temperature") == 0 for params in told)
    seeded = sum("seed" in params for params in told)
    fixed = sum(params.get("temperature") == 0 or "seed" in params for params in told)
    if fixed:
        how = " and ".join(
            f"{count} of {len(told)} calls {what}"
            for count, what in ((greedy, "use temperature 0"), (seeded, "set a seed"))
            if count
        )
        found = f"{how}: runs of one task say the same there, so nothing can be compared"
        change = "sample at temperature 1, without a seed, while training"
        findings.append((missing if fixed == len(told) else warning)(title, found, change))
    tempered = Counter(
        params["temperature"] for params in told if params.get("temperature") not in (None, 0, 1)
    )
    if tempered:
        values = ", ".join(f"{value:g}" for value in sorted(tempered))
        findings.append(
            warning(
                title,
                f"temperature {values} in {sum(tempered.values())} of {len(told)} calls; the "
                "learner computes probabilities at 1",
                "sample at temperature 1 while training, so that both mean the same distribution",
            )
        )
    narrowed = sum(params.get("top_p", 1) < 1 or params.get("top_k", 0) > 0 for params in told)
    if narrowed:
        findings.append(
            warning(
                title,
                f"top_p or top_k cut the choice of tokens in {narrowed} of {len(told)} calls",
                "leave them out while training: what is never sampled is never learnt about",
            )
        )
    many = sum(params.get("n", 1) > 1 for params in told)
    if many:
        findings.append(
            warning(
                title,
                f"{many} answers were sampled several at a time (n above 1)",
                "ask for one: all of them get the run's reward, whichever the agent used",
            )
        )
    if not findings:
        findings.append(ok(title, "temperature 1, no seed, no cut of the choice of tokens"))
    return findings


def _contrast(seen: Evidence, calls: Sequence[dict[str, Any]]) -> Finding:
    title = "contrast"
    said: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for call in calls:
        sampled = len(call["logprobs"] or ())
        tokens = call["token_ids"] or []
        said[call["attempt_id"]].append(tuple(tokens[len(tokens) - sampled :]))
    tasks: dict[str, list[list[tuple[int, ...]]]] = defaultdict(list)
    for run in seen.runs:
        tasks[run.task_id].append(said.get(run.attempt_id, []))
    repeated = [answers for answers in tasks.values() if len(answers) > 1]
    if not repeated:
        return warning(
            title, "no task was run twice", "look whether two runs of a task differ: samples=2"
        )
    apart = sum(any(other != answers[0] for other in answers) for answers in repeated)
    found = f"the runs of {apart} of {len(repeated)} tasks differ in what the model said"
    if apart:
        return ok(title, found)
    return warning(title, found, "see `sampling`; where nothing is said of it, try samples=8")


def _lengths(seen: Evidence, calls: Sequence[dict[str, Any]]) -> list[Finding]:
    title = "answer length"
    cut = [call for call in calls if call["finish_reason"] == "length"]
    share = len(cut) / len(calls)
    if share < _CUT_SHARE:
        return [ok(title, f"{len(cut)} of {len(calls)} answers end at a limit")]
    full = sum(
        call["attributes"].get("prompt_tokens", 0) + len(call["logprobs"] or ())
        >= seen.max_model_len
        for call in cut
    )
    limits = sorted({call["attributes"].get("sampling", {}).get("max_tokens", 0) for call in cut})
    found = f"{len(cut)} of {len(calls)} answers are cut ({share:.0%})"
    if full * 2 > len(cut):
        change = f"the context is full: inference.max_model_len={2 * seen.max_model_len}"
        return [warning(title, f"{found} at {seen.max_model_len} tokens in all", change)]
    found += f", at max_tokens {', '.join(map(str, limits[:3]))}"
    change = "raise it in the agent if answers need more; a weak model that rambles learns to stop"
    return [warning(title, found, change)]


def _aborted(calls: Sequence[dict[str, Any]]) -> list[Finding]:
    left = sum(call["status"] == SpanStatus.ABORTED for call in calls)
    if not left:
        return []
    return [
        warning(
            "abandoned calls",
            f"the agent went away before the end of {left} of {len(calls)} answers",
            "read answers to their end, or raise the client's timeout; they are not learnt from",
        )
    ]
