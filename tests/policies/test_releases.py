"""Releases: pointers that move whole, are kept, and can be moved back."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.errors import UserError
from lightning_ray.jobs.release import main
from lightning_ray.policies import PolicyRegistry, PolicyVersion, Release, Releases
from lightning_ray.policies.releases import canary, promote, rollback


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with three versions of `helper`; the weights of the second are gone."""
    folder = tmp_path_factory.mktemp("releases")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    registry = PolicyRegistry(uri, "helper", "run-a")
    for number in (0, 1, 2):
        path = folder / str(number)
        if number != 1:
            path.mkdir()
        parent = number - 1 if number else None
        registry.register(PolicyVersion("helper", number, path, "run-a", parent, number))
    return uri


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("canary"), st.integers(1, 5), st.floats(0.01, 0.99)),
        st.tuples(st.just("promote"), st.none() | st.integers(1, 5)),
        st.tuples(st.just("rollback")),
    ),
    max_size=30,
)


@given(CHANGES)
def test_whatever_is_typed_the_pointers_make_sense(changes) -> None:
    moves = {"canary": canary, "promote": promote, "rollback": rollback}
    release = Release()
    champions: list[int] = []
    for action, *arguments in changes:
        before = release
        try:
            release = moves[action](release, *arguments)
        except UserError:
            assert release == before
            continue
        assert release.champion not in (None, release.candidate)
        assert release.champion not in release.earlier
        assert (release.candidate is None) == (release.share == 0)
        assert len(set(release.earlier)) == len(release.earlier)
        if action == "promote":
            champions = [c for c in champions if c != release.champion]
            champions.append(release.champion)
        if action == "rollback" and before.candidate is None:
            champions.pop()
        # A rollback goes back the way the promotions came.
        assert release.champion == champions[-1]


def test_a_release_is_kept_with_its_reason_and_its_history(uri: str) -> None:
    releases = Releases(uri)
    releases.change("helper", promote(releases.get("helper"), 1), reason="first", by="ann")
    releases.change("helper", canary(releases.get("helper"), 3, 0.25), by="bob")
    releases.change("helper", promote(releases.get("helper"), None), reason="better", by="ann")
    now = Releases(uri).get("helper")
    assert (now.champion, now.candidate, now.earlier, now.number) == (3, None, (1,), 3)
    assert [(c.action, c.by, c.reason) for c in releases.history("helper")] == [
        ("promote", "ann", "first"),
        ("canary", "bob", ""),
        ("promote", "ann", "better"),
    ]
    assert releases.needed_of_run("helper", "run-a") == {0, 2}


def test_mlflows_aliases_follow_the_pointers(uri: str) -> None:
    from mlflow import MlflowClient

    releases = Releases(uri)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    releases.change("helper", promote(Release(), 1))
    releases.change("helper", canary(releases.get("helper"), 3, 0.5))
    assert client.get_model_version_by_alias("helper", "candidate").version == 3
    releases.change("helper", promote(releases.get("helper"), None))
    assert client.get_model_version_by_alias("helper", "champion").version == 3
    assert "candidate" not in client.get_registered_model("helper").aliases


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("9", "has no version '9'; it has 1, 2, 3"),
        ("run-b/1", "has no version 'run-b/1'"),
        ("best", "has no version 'best'"),
        ("2", "weights of version 2 of helper are no longer in"),
    ],
)
def test_a_version_that_is_not_there_is_said_so(uri: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Releases(uri).find("helper", name)


def test_versions_are_found_by_what_a_user_calls_them(uri: str) -> None:
    releases = Releases(uri)
    assert [releases.find("helper", n) for n in ("1", "run-a/0", "latest")] == [1, 1, 3]


def test_the_command_line_moves_the_pointers(uri: str, cli, capsys) -> None:
    folder = Path(uri.removeprefix("sqlite:///")).parent
    Releases(uri).change("helper", promote(Release(), 1))
    said = cli.run("release", "canary", "helper", "3", "share=0.2", f"output_dir={folder}")
    assert (said.returncode, said.stderr) == (0, "")
    assert "version 3 takes 20% of new conversations" in said.stdout
    for words, expected in (
        (("promote", "helper", "reason=it is better"), "helper: version 3 serves"),
        (("rollback", "helper"), "helper: version 1 serves"),
        (("status",), "it is better"),
    ):
        release(*words, f"output_dir={folder}")
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("promote", "nobody"), "there is no policy 'nobody'; there are: helper"),
        (("promote", "helper"), "there is no candidate to promote; name a version"),
        (("canary", "helper", "3", "share=2"), "share=2.0: the candidate's share"),
        (("canary", "helper", "3", "share=some"), "share=some: give a number"),
        (("canary", "helper"), "name the version to try"),
        (("demote", "helper"), "write status, canary, promote or rollback"),
        (("status", "colour=red"), "no such setting"),
    ],
)
def test_a_mistake_at_the_terminal_is_one_line(uri: str, words, message: str) -> None:
    Releases(uri).change("helper", promote(Release(), 1))
    with pytest.raises(UserError, match=message):
        release(*words, f"output_dir={Path(uri.removeprefix('sqlite:///')).parent}")


def release(*words: str) -> None:
    main(list(words))
