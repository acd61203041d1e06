"""What is said of how an agent ran, from its attempts' own spans."""

import pytest
from doctor_support import call, ended, evidence, failed, only, rewarded

from lightning_ray.doctor.finding import Level
from lightning_ray.doctor.running import check_running


def test_runs_that_end_well_need_no_change() -> None:
    seen = evidence([ended("a/1", seconds=0.5), ended("b/1", seconds=2.0, warm=True), call("a/1")])
    findings = check_running(seen)
    assert only(findings, "starts and ends").found == "2 of 2 runs exit 0, in 0.5 to 2.0 s"
    assert {f.title for f in findings if f.level is not Level.OK} == {"grader"}
    assert "environment" not in {f.title for f in findings}


@pytest.mark.parametrize(
    ("stderr", "change"),
    [
        ("ModuleNotFoundError: No module named 'crewai.tools'", "lacks 'crewai.tools'"),
        ("Traceback ...\nValueError: no", "mend what its stderr says"),
    ],
)
def test_an_agent_that_always_fails_is_missing_with_its_last_words(
    stderr: str, change: str
) -> None:
    finding = only(check_running(evidence([failed("a/1", stderr), failed("b/1", stderr)])), ENDS)
    assert finding.level is Level.MISSING and change in finding.change
    assert "2 of 2 runs fail; most often: exit code 1" in finding.found
    assert f"| {stderr.splitlines()[-1]}" in finding.found


ENDS = "starts and ends"


def test_an_agent_that_fails_now_and_then_is_a_warning() -> None:
    finding = only(check_running(evidence([failed("a/1"), ended("b/1")])), ENDS)
    assert finding.level is Level.WARNING and "1 of 2 runs fail" in finding.found


def test_a_timeout_is_told_apart() -> None:
    run = ended(status="timed_out", end="timed_out", exit_code=None, error="stopped after 60 s")
    finding = only(check_running(evidence([run])), ENDS)
    assert finding.level is Level.MISSING and "agent.timeout_s" in finding.change


@pytest.mark.parametrize(
    "stderr",
    [
        "KeyError: 'TEAM_TOKEN'",
        "the api_key must be set, or the TEAM_TOKEN environment variable",
        "Missing environment variable: TEAM_TOKEN",
        "agent.sh: 3: TEAM_TOKEN: parameter not set",
        "agent.sh: line 3: TEAM_TOKEN: unbound variable",
        "Error: TEAM_TOKEN is required",
    ],
)
def test_a_variable_that_the_agent_lacks_is_named_in_any_language(stderr: str) -> None:
    finding = only(check_running(evidence([failed(stderr=stderr)])), "environment")
    assert finding.level is Level.MISSING and "misses TEAM_TOKEN" in finding.found
    assert finding.change == "set it: +agent.env.TEAM_TOKEN=VALUE"


def test_a_variable_that_we_have_is_let_through() -> None:
    seen = evidence(
        [failed(stderr="KeyError: 'TEAM_TOKEN'")],
        agent={"inherit_env": ["PATH"]},
        ours=frozenset({"TEAM_TOKEN"}),
    )
    finding = only(check_running(seen), "environment")
    assert "'agent.inherit_env=[PATH,TEAM_TOKEN]'" in finding.change
    assert "+agent.env" not in finding.change


def test_words_of_a_run_that_went_well_are_no_missing_variable() -> None:
    findings = check_running(evidence([ended(stderr="TEAM_TOKEN is not set, going on without")]))
    assert "environment" not in {finding.title for finding in findings}


def test_what_a_grader_would_read_is_shown_and_silence_is_a_warning() -> None:
    shown = only(check_running(evidence([ended(stdout="x" * 500)])), "output")
    assert shown.level is Level.OK and "x" * 200 + "..." in shown.found
    assert "x" * 201 not in shown.found
    silent = only(check_running(evidence([ended(stdout=" \n")])), "output")
    assert silent.level is Level.WARNING


@pytest.mark.parametrize(
    ("rewards", "level", "words"),
    [
        ([("a/1", "t", 1.0), ("b/1", "t", 0.0)], Level.OK, "rewards: t: 1, 0"),
        ([("a/1", "t", 0.0), ("b/1", "t", 0.0)], Level.WARNING, "nothing"),
        ([("a/1", "t", 1.0), ("b/1", "t", 1.0)], Level.WARNING, "worth the same"),
        ([("a/1", "t", 1.0), ("b/1", "u", 0.0)], Level.WARNING, "shows no contrast"),
    ],
)
def test_rewards_are_shown_by_task_and_need_contrast(
    rewards: list[tuple[str, str, float]], level: Level, words: str
) -> None:
    rows = [ended(attempt, task) for attempt, task, _ in rewards]
    rows += [rewarded(attempt, value) for attempt, _, value in rewards]
    finding = only(check_running(evidence(rows, graded=True)), "grader")
    assert finding.level is level and words in finding.found


def test_a_grader_that_raises_is_missing_and_not_the_agents_fault() -> None:
    run = ended(status="failed", error="grader: grader failed on task 't': KeyError: 'answer'")
    findings = check_running(evidence([run], graded=True))
    assert only(findings, "grader").level is Level.MISSING
    assert "KeyError: 'answer'" in only(findings, "grader").found
    assert only(findings, ENDS).level is Level.OK


def test_rewards_of_the_stand_in_grader_are_never_shown() -> None:
    finding = only(check_running(evidence([ended("a/1"), rewarded("a/1", 0.0)])), "grader")
    assert finding.level is Level.WARNING and "none was given" in finding.found


def test_warm_starts() -> None:
    cold, warm = ended("a/1"), ended("b/1", warm=True)
    broken = ended("b/1", warm=True, status="failed", exit_code=1, error="exit code 1")
    assert "1 of 2 runs were forked" in only(check_running(evidence([cold, warm])), WARM).found
    assert only(check_running(evidence([cold, broken])), WARM).level is Level.MISSING
    never = only(check_running(evidence([cold, ended("b/1")])), WARM)
    assert never.level is Level.WARNING and "not possible" in never.found
    other = only(check_running(evidence([cold], command=["node", "agent.js"])), WARM)
    assert other.level is Level.OK
    off = evidence([cold, ended("b/1")], agent={"warm_start": False})
    assert "switched off" in only(check_running(off), WARM).found


WARM = "warm start"


def test_what_a_run_left_behind() -> None:
    seen = evidence([ended()], left_behind=["chrome (pid 7)"])
    finding = only(check_running(seen), "processes")
    assert finding.level is Level.WARNING and "chrome (pid 7)" in finding.found


def test_cost_is_that_of_the_usual_run_and_not_of_the_first() -> None:
    rows = [ended("a/1", seconds=9.0, cpu_seconds=3.0)]
    rows += [ended(f"{n}/1", warm=True, seconds=1.0, cpu_seconds=0.5) for n in "bcd"]
    rows += [call(f"{n}/1", sampled=range(10)) for n in "abcd"]
    found = only(check_running(evidence(rows, cores=2)), "cost").found
    assert "1.00 s a rollout, 500 ms" in found
    assert "about 16.0 s of 2 cores" in found and "640 tokens" in found
