"""Judges the last line that the two models came to: the number, alone."""


def grade(task, result, spans):
    """1 for the right number, 0.1 where the planner's call could be run, else 0."""
    answer = result.stdout.strip()
    planned = not answer.startswith("no plan")
    exact = answer == str(task["answer"])
    reward = 1.0 if exact else 0.1 if planned else 0.0
    return {"reward": reward, "exact": float(exact), "planned": float(planned)}
