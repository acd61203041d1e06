"""The roster of running attempts: between processes, with no room, and after a restart."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import SmallDisk

from lightning_ray.rollouts import RosterReader
from lightning_ray.rollouts.capabilities import digest
from lightning_ray.rollouts.roster import NOWHERE, SEATS, Roster, make_roster

ANOTHER = """
import sys
from pathlib import Path
from lightning_ray.rollouts import RosterReader
from lightning_ray.rollouts.capabilities import digest
reader = RosterReader(Path(sys.argv[1]))
for line in sys.stdin:
    seat, name = line.split()
    print(reader.sits(int(seat), digest(name)), flush=True)
"""


def test_another_process_sees_at_once_who_runs_and_who_no_longer_does(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "running")
    with subprocess.Popen(
        [sys.executable, "-c", ANOTHER, str(roster.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None and other.stdout is not None

        def seen(seat: int, name: str) -> str:
            other.stdin.write(f"{seat} {name}\n")
            other.stdin.flush()
            return other.stdout.readline().strip()

        for turn in range(50):
            seat = roster.take(digest(f"one-{turn}"))
            assert seen(seat, f"one-{turn}") == "True"
            assert seen(seat, "guess") == "False"
            roster.leave(seat)
            assert seen(seat, f"one-{turn}") == "False"
        # A queue that restarts empties the same file.
        seat = roster.take(digest("before"))
        again = Roster(roster.path)
        assert seen(seat, "before") == "False"
        assert seen(again.take(digest("after")), "after") == "True"


def test_whoever_finds_no_seat_has_none(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "running")
    seats = [roster.take(digest(str(number))) for number in range(SEATS)]
    assert sorted(seats) == list(range(SEATS))
    assert roster.take(digest("late")) == NOWHERE
    roster.leave(NOWHERE)
    assert not RosterReader(roster.path).sits(NOWHERE, digest("late"))
    roster.leave(seats[7])
    assert roster.take(digest("late")) == seats[7]


def test_a_disk_without_room_leaves_the_queue_without_a_roster(
    small_disk: SmallDisk, caplog: pytest.LogCaptureFixture
) -> None:
    assert make_roster(small_disk.folder / "running") is None
    assert list(small_disk.folder.iterdir()) == []
    assert "No space left" in caplog.text


def test_a_roster_that_was_removed_says_no(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "running")
    reader = RosterReader(roster.path)
    seat = roster.take(digest("one"))
    assert reader.sits(seat, digest("one"))
    roster.path.unlink()
    assert not reader.sits(seat, digest("one"))


def test_only_its_user_can_read_it(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "running")
    assert os.stat(roster.path).st_mode & 0o777 == 0o600
