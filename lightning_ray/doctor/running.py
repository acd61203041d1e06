"""How the agent ran: its end, its environment, its output, its rewards, its starts and its cost."""

import re
import statistics
from collections import Counter, defaultdict

from lightning_ray.agents.command import python_script
from lightning_ray.doctor.evidence import Evidence, Run
from lightning_ray.doctor.finding import Finding, missing, ok, warning

STEP = 64
"""Rollouts of a training step of the default size."""
_TAIL_LINES = 4
_SHOWN = 200

_NAME = r"([A-Z][A-Z0-9_]{2,})"
_LACKED = [
    re.compile(pattern)
    for pattern in (
        rf"KeyError: '{_NAME}'",
        rf"{_NAME}['\"`]? environment variable",
        rf"environment variable[s]?:? ['\"`]?{_NAME}",
        rf"{_NAME}: (?:unbound variable|parameter (?:not set|null))",
        rf"{_NAME}['\"`]? (?:is not set|not set|is required|must be set)",
    )
]
_NO_MODULE = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'")


def check_running(seen: Evidence) -> list[Finding]:
    """Every finding about the runs themselves."""
    return [
        _ends(seen),
        *_environment(seen),
        _output(seen),
        _rewards(seen),
        *_starts(seen),
        *_left_behind(seen),
        *_cost(seen),
    ]


def _ends(seen: Evidence) -> Finding:
    title = "starts and ends"
    runs, bad = seen.runs, [run for run in seen.runs if not run.finished]
    if not runs:
        return missing(title, "no run was reported", "look at what the workers say, and try again")
    if not bad:
        low, high = min(run.seconds for run in runs), max(run.seconds for run in runs)
        return ok(title, f"{len(runs)} of {len(runs)} runs exit 0, in {low:.1f} to {high:.1f} s")
    reasons = Counter(_reason(run) for run in bad)
    (reason, _), *_ = reasons.most_common(1)
    example = next(run for run in bad if _reason(run) == reason)
    found = f"{len(bad)} of {len(runs)} runs fail; most often: {reason}"
    tail = "\n".join(f"| {line}" for line in example.stderr.strip().splitlines()[-_TAIL_LINES:])
    found += f"\n{tail}" if tail else ""
    change = _mend(example)
    if len(bad) == len(runs):
        return missing(title, found, change)
    return warning(title, found, f"{change}; such a rollout is retried, then left out of training")


def _reason(run: Run) -> str:
    return (run.error.splitlines() or ["the agent was not started"])[0]


def _mend(run: Run) -> str:
    if run.end == "timed_out":
        return "set agent.timeout_s above what a run takes, or find out what it waits for"
    if run.end == "over_limit":
        return "raise the limit that it is over, or find out what it needs so much for"
    if module := _NO_MODULE.search(run.stderr):
        return (
            f"the interpreter that runs Lightning Ray lacks {module[1]!r}: name the agent's own "
            "in place of python, /path/to/venv/bin/python say"
        )
    if _lacked(run):
        return "give it the environment that it needs (see below)"
    if run.end == "exited":
        return "an agent must exit 0 for its run to count; mend what its stderr says"
    return "run the command by hand and see that it ends"


def _lacked(run: Run) -> set[str]:
    """Variables that the agent says it has not got."""
    return {name for pattern in _LACKED for name in pattern.findall(run.stderr)}


def _environment(seen: Evidence) -> list[Finding]:
    names = sorted(set().union(*(_lacked(run) for run in seen.runs if not run.finished)))
    if not names:
        return []
    inherited = [name for name in names if name in seen.ours]
    unset = [name for name in names if name not in seen.ours]
    changes = []
    if inherited:
        listed = ",".join([*seen.agent.inherit_env, *inherited])
        changes.append(
            f"let it through from your environment: 'agent.inherit_env=[{listed}]' "
            f"(the list with {', '.join(inherited)} added)"
        )
    if unset:
        changes.append("set it: " + " ".join(f"+agent.env.{name}=VALUE" for name in unset))
    found = (
        f"the agent misses {', '.join(names)}: its environment holds what agent.inherit_env and "
        "agent.env list and nothing else"
    )
    return [missing("environment", found, "; ".join(changes))]


def _output(seen: Evidence) -> Finding:
    title = "output"
    texts = [run.stdout.strip() for run in seen.runs if run.finished]
    if not any(texts):
        return warning(
            title,
            "stdout is empty",
            "print the result, or judge it in the grader by files or by the spans",
        )
    longest = max(texts, key=len)
    shown = " ".join(longest.split())
    cut = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."
    return ok(title, f"stdout for a grader to judge: {cut!r}")


def _rewards(seen: Evidence) -> Finding:
    title = "grader"
    if not seen.graded:
        return warning(
            title,
            "none was given, so rewards were not looked at; training needs one",
            "write one (docs/agents.md) and try it: grader=my_grader.py:grade",
        )
    failed = [run for run in seen.runs if run.error.startswith("grader:")]
    if failed:
        found = f"it fails in {len(failed)} of {len(seen.runs)} runs: {failed[0].error}"
        return missing(title, found, "mend the grader; a failure is never a reward of 0")
    by_task: dict[str, list[float]] = defaultdict(list)
    for run in seen.runs:
        if "reward" in run.rewards:
            by_task[run.task_id].append(run.rewards["reward"])
    if not by_task:
        return missing(title, "no run came to a reward", "mend what keeps the runs from ending")
    shown = "; ".join(
        f"{task}: {', '.join(f'{reward:g}' for reward in rewards)}"
        for task, rewards in by_task.items()
    )
    apart = any(len(set(rewards)) > 1 for rewards in by_task.values())
    every = {reward for rewards in by_task.values() for reward in rewards}
    if apart:
        return ok(title, f"rewards: {shown}")
    if max(map(len, by_task.values())) == 1:
        return warning(
            title,
            f"rewards: {shown}; one run a task shows no contrast",
            "look at more than one run of a task: samples=4",
        )
    found = f"rewards: {shown}; runs of one task are all worth the same"
    if len(every) == 1 and every <= {0.0}:
        return warning(
            title,
            f"{found}, nothing",
            "look at more runs (count=8 samples=8); where all stay 0 there is nothing to learn "
            "from: easier tasks, an example in the prompt, partial credit, or finetune first",
        )
    return warning(title, found, "look at more runs: count=8 samples=8; learning needs contrast")


def _starts(seen: Evidence) -> list[Finding]:
    title = "warm start"
    finished = [run for run in seen.runs if run.finished]
    if python_script(seen.agent.command) is None:
        return [ok(title, "no Python script: each run is started as the command it is")]
    if not seen.agent.warm_start:
        return [ok(title, "switched off (agent.warm_start=false)")]
    warm = [run for run in seen.runs if run.warm]
    if warm and finished and not any(run.finished for run in warm):
        return [
            missing(
                title,
                f"{len(warm)} warm runs fail where a cold one does not",
                "agent.warm_start=false, and tell us what the agent does when it is imported",
            )
        ]
    if warm:
        return [ok(title, f"{len(warm)} of {len(seen.runs)} runs were forked, libraries loaded")]
    if len(finished) < 2:
        return []
    return [
        warning(
            title,
            "not possible: every run starts an interpreter and imports its libraries",
            "see why with cluster.log_to_driver=true: a library that runs a thread when it is "
            "imported, or a run that does not exit normally",
        )
    ]


def _left_behind(seen: Evidence) -> list[Finding]:
    if not seen.left_behind:
        return [ok("processes", "none outlives its run")]
    found = f"left running after their run: {', '.join(seen.left_behind)}"
    change = "have the agent end what it starts; a process with a session of its own is not ended"
    return [warning("processes", found, change)]


def _cost(seen: Evidence) -> list[Finding]:
    finished = [run for run in seen.runs if run.finished]
    if not finished:
        return []
    # What most rollouts of a training run are like: the first ones only learn the imports.
    usual = [run for run in finished if run.warm] or finished
    found = f"{statistics.median(run.seconds for run in usual):.2f} s a rollout"
    cpu = [run.cpu_seconds for run in usual if run.cpu_seconds is not None]
    tokens = sum(len(call["logprobs"] or ()) for call in seen.calls) / len(seen.runs)
    if cpu:
        each = statistics.median(cpu)
        found += f", {each * 1000:.0f} ms of processor time of the agent's own"
        share = f"about {STEP * each / seen.cores:.1f} s of {seen.cores} cores for the agents and "
    else:
        share = ""
    found += f", {tokens:.0f} sampled tokens; a step of {STEP}: {share}{STEP * tokens:.0f} tokens"
    return [ok("cost", found)]
