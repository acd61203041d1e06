"""A new MLflow store is a copy of an empty one, and what MLflow itself would have made."""

import sqlite3
from pathlib import Path

import pytest
from small_disk import SmallDisk

from lightning_ray.tracking.store import default_uri, open_client
from lightning_ray.tracking.tables import give_tables


def contents(file: Path) -> tuple[dict[str, list[str]], list[tuple[str, ...]]]:
    """The lines that made each table and index, and the schema's version.

    Lines are sorted: MLflow writes the constraints of a table in any order.
    """
    with sqlite3.connect(file) as database:
        made = database.execute("SELECT name, sql FROM sqlite_master").fetchall()
        version = database.execute("SELECT version_num FROM alembic_version").fetchall()
    lines = {name: sorted(x.strip(" ,") for x in (sql or "").splitlines()) for name, sql in made}
    return lines, version


def test_a_copied_store_is_the_one_that_mlflow_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, copied, made = tmp_path / "cache", tmp_path / "copied", tmp_path / "made"
    monkeypatch.setenv("LIGHTNING_RAY_CACHE", str(cache))
    client = open_client(default_uri(copied))
    run = client.create_run(client.create_experiment("one"))
    client.log_metric(run.info.run_id, "reward", 0.5)
    assert client.get_run(run.info.run_id).data.metrics == {"reward": 0.5}
    (kept,) = cache.iterdir()
    assert kept.suffix == ".db"
    # A cache that cannot be: a file is in its place.
    monkeypatch.setenv("LIGHTNING_RAY_CACHE", str(kept))
    assert [one.name for one in open_client(default_uri(made)).search_experiments()] == ["Default"]
    assert contents(copied / "mlflow.db") == contents(made / "mlflow.db")
    for folder in (cache, copied, made):
        assert not list(folder.glob(".new-*"))


def test_the_empty_store_has_nobodys_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_RAY_CACHE", str(tmp_path / "cache"))
    for name in ("first", "second"):
        client = open_client(default_uri(tmp_path / name))
        assert [one.name for one in client.search_experiments()] == ["Default"]
        client.create_experiment(name)
        (default,) = [e for e in client.search_experiments() if e.name == "Default"]
        assert default.experiment_id == "0"


def test_what_is_there_is_never_touched(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_bytes(b"somebody's")
    give_tables(file)
    assert file.read_bytes() == b"somebody's"


def test_a_cache_without_room_keeps_nobody_from_a_store(
    tmp_path: Path, small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_RAY_CACHE", str(small_disk.folder))
    client = open_client(default_uri(tmp_path / "outputs"))
    assert [one.name for one in client.search_experiments()] == ["Default"]
    assert not list(small_disk.folder.glob("*.db"))
