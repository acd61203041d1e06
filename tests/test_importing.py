"""Packages are hidden from others' imports and come back; the collector is as it was."""

import gc
import subprocess
import sys
import textwrap

import pytest

from lightning_ray.importing import importing


def run(code: str) -> str:
    """What a fresh process prints, in which nothing is imported yet."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_modules_are_never_searched_for_garbage():
    printed = run("""
        import gc
        from lightning_ray.importing import importing

        before = gc.get_stats()
        with importing():
            import json, logging, decimal, email.message, http.client
            collections = [one["collections"] for one in gc.get_stats()]
        assert collections == [one["collections"] for one in before]
        assert not any(one is http.client for one in gc.get_objects())
        print(gc.isenabled(), gc.get_freeze_count() > 1000)
    """)
    assert printed == "True True"


def test_a_hidden_package_is_not_found_meanwhile_and_is_found_after():
    printed = run("""
        import importlib.util
        from lightning_ray.importing import importing

        with importing(without=("wave", "json")):
            print(importlib.util.find_spec("wave"))
        import wave
        print(wave.__name__)
    """)
    assert printed == "None\nwave"


def test_what_is_imported_already_stays_in_sight():
    import json

    with importing(without=("json",)):
        assert sys.modules["json"] is json
    assert sys.modules["json"] is json


def test_an_import_that_fails_leaves_collector_and_packages_as_they_were():
    try:
        with pytest.raises(ModuleNotFoundError), importing(without=("turtle",)):
            import no_such_module  # noqa: F401
        assert gc.isenabled()
        assert "turtle" not in sys.modules
    finally:
        gc.unfreeze()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
