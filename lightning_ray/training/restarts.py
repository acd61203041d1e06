"""How often parts may die before a run gives up: a cause that stays would go on for ever."""

from lightning_ray.errors import InfrastructureError


class Restarts:
    """Counts the parts that died since a run last came further than it ever was."""

    def __init__(self, most: int):
        self._most = most
        self._count = 0
        self._reached = -1

    def count(self, what: str, step: int) -> None:
        """One more died while `step` steps were trained; `what` says which, and of what.

        Steps that are trained again, from a checkpoint, are no progress. Raises InfrastructureError
        for one more than may be.
        """
        if step > self._reached:
            self._count, self._reached = 0, step
        self._count += 1
        if self._count > self._most:
            raise InfrastructureError(
                f"parts died {self._count} times with no step in between "
                f"(training.max_restarts={self._most}); the last: {what}"
            )
