"""Removing sealed spans, never silently.

Invariant: what is removed is recorded durably before a byte of it is deleted, and the record stays:
`removed/N.json` (what, when, why) and `removed/N.arrow` (the ids of its rollouts) in the folder of
spans. A reader leaves a recorded file out whether it is deleted yet or not; a deletion that a crash
cut short is finished by `finish_removals`.
"""

import fcntl
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_ray.errors import InfrastructureError, UserError
from lightning_ray.spans.archive import Archive
from lightning_ray.spans.durable import sync_folder, write_durably
from lightning_ray.spans.manifests import Sealed, SealedFile

log = logging.getLogger(__name__)

REMOVED = "removed"
_DAY_NS = 24 * 3600 * 10**9


class SpansRemoved(UserError):
    """What was asked for had been removed; the message says what, when and why."""


@dataclass(frozen=True)
class Removal:
    """Sealed files of one run that are to go, or are gone, for one reason."""

    run_id: str
    reason: str
    archive: str
    paths: tuple[str, ...]
    rows: int
    bytes: int


@dataclass(frozen=True)
class Removed:
    """A removal on record."""

    number: int
    time_ns: int
    rollouts: int
    done: bool
    """Whether its files are deleted."""
    removal: Removal

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.time_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return (
            f"{self.removal.rows} spans of {self.rollouts} rollouts of run {self.removal.run_id}, "
            f"removed {when}: {self.removal.reason}"
        )


def plan_removals(
    sealed: Sequence[Sealed],
    gone: Collection[tuple[str, str]],
    *,
    now_ns: int,
    keep_days: float = 0,
    keep_bytes: int = 0,
    run_id: str | None = None,
) -> list[Removal]:
    """What the limits say is to go, by run and reason; nothing is touched.

    `gone` are (archive, path) of files that are removed already. `run_id` removes that run's files
    whatever their age. By age a segment goes when its last span began too long ago; by bytes the
    segments whose last span is the oldest go first.
    """
    chosen: dict[tuple[str, str, str], list[SealedFile]] = {}
    left: list[tuple[int, str, SealedFile]] = []
    for segment in sealed:
        for file in segment.files:
            if (segment.archive, file.path) in gone:
                continue
            if run_id is not None and file.run_id == run_id:
                reason = "removed by hand"
            elif keep_days and now_ns - segment.last_start_ns > keep_days * _DAY_NS:
                reason = f"older than spans.keep_days={keep_days:g}"
            else:
                left.append((segment.last_start_ns, segment.archive, file))
                continue
            chosen.setdefault((segment.archive, file.run_id, reason), []).append(file)
    if keep_bytes:
        total = sum(file.bytes for _, _, file in left)
        reason = f"beyond spans.keep_bytes={keep_bytes}"
        for _, archive, file in sorted(left, key=lambda one: (one[0], one[2].path)):
            if total <= keep_bytes:
                break
            total -= file.bytes
            chosen.setdefault((archive, file.run_id, reason), []).append(file)
    return [
        Removal(
            run,
            reason,
            archive,
            tuple(file.path for file in files),
            sum(file.rows for file in files),
            sum(file.bytes for file in files),
        )
        for (archive, run, reason), files in chosen.items()
    ]


def remove(
    folder: Path,
    removal: Removal,
    now_ns: int,
    open_archive: Callable[[str, Path], Archive] = Archive,
) -> Removed:
    """Records a removal in the folder of spans, then deletes its files.

    Raises UserError while another process removes, InfrastructureError when the files cannot be
    read or deleted; what was recorded stays recorded, and `finish_removals` goes on with it.
    """
    archive = open_archive(removal.archive, folder)
    ids = _rollouts_of(archive, removal.paths)
    place = folder / REMOVED
    if not place.is_dir():
        # Another shard of this store may make it now, too.
        place.mkdir(exist_ok=True)
        sync_folder(folder)
    with _alone(place):
        return _remove(folder, removal, now_ns, archive, ids)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    with open(place / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{place}: another process removes spans here; try again") from error
        yield


def _remove(
    folder: Path, removal: Removal, now_ns: int, archive: Archive, ids: pa.Array
) -> Removed:
    place = folder / REMOVED
    number = max((record.number for record in read_removed(folder)), default=0) + 1
    sink = pa.BufferOutputStream()
    table = pa.table({"rollout_id": ids})
    with pa.ipc.new_file(
        sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as w:
        w.write_table(table)
    write_durably(place / f"{number:08d}.arrow", sink.getvalue().to_pybytes())
    record = Removed(number, now_ns, len(ids), False, removal)
    _write(folder, record)
    log.warning("%s", record)
    return _finish(folder, record, archive)


def finish_removals(
    folder: Path, open_archive: Callable[[str, Path], Archive] = Archive
) -> list[Removed]:
    """Deletes what a crash left of recorded removals; returns these."""
    return [
        _finish(folder, record, open_archive(record.removal.archive, folder))
        for record in read_removed(folder)
        if not record.done
    ]


def read_removed(folder: Path) -> list[Removed]:
    """The removals on record, oldest first. Raises InfrastructureError for a damaged record."""
    found = []
    for path in sorted((folder / REMOVED).glob("*.json")):
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            removal = fields.pop("removal")
            made = Removal(**removal | {"paths": tuple(removal["paths"])})
            found.append(Removed(removal=made, **fields))
        except (ValueError, KeyError, TypeError) as error:
            raise InfrastructureError(f"{path} is no record of removed spans") from error
    return found


def gone_files(records: Iterable[Removed]) -> set[tuple[str, str]]:
    """(archive, path) of every file that is removed."""
    return {(r.removal.archive, path) for r in records for path in r.removal.paths}


def check_not_removed(folder: Path, rollout_ids: Collection[str]) -> None:
    """Raises SpansRemoved when spans of one of these rollouts were removed."""
    wanted = pa.array(sorted(set(rollout_ids)), pa.string())
    for record in read_removed(folder):
        with pa.memory_map(str(folder / REMOVED / f"{record.number:08d}.arrow")) as source:
            ids = pa.ipc.open_file(source).read_all()["rollout_id"]
            hits = ids.filter(pc.is_in(ids, value_set=wanted)).to_pylist()
        if hits:
            more = f" and {len(hits) - 1} more" if len(hits) > 1 else ""
            raise SpansRemoved(f"rollout {hits[0]}{more}: its spans are gone; {record}")


def _rollouts_of(archive: Archive, paths: Sequence[str]) -> pa.Array:
    try:
        return archive.rollouts(paths)
    except (OSError, pa.ArrowException) as error:
        raise InfrastructureError(f"sealed spans in {archive.place}: {error}") from error


def _write(folder: Path, record: Removed) -> None:
    path = folder / REMOVED / f"{record.number:08d}.json"
    write_durably(path, json.dumps(asdict(record), indent=1).encode())


def _finish(folder: Path, record: Removed, archive: Archive) -> Removed:
    try:
        for path in record.removal.paths:
            archive.delete(path)
    except (OSError, pa.ArrowException) as error:
        raise InfrastructureError(f"sealed spans in {archive.place}: {error}") from error
    done = Removed(record.number, record.time_ns, record.rollouts, True, record.removal)
    _write(folder, done)
    return done
