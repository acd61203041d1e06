"""What the subcommands of `lightning-ray spans` share: their words, and the folder of a run."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_ray.errors import UserError
from lightning_ray.spans import has_spans

OUTPUT_DIR = "outputs"
"""Folder that holds runs, unless output_dir= is typed."""


def output_dir(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder of runs that output_dir= names, and the other words."""
    roots = [word.removeprefix("output_dir=") for word in words if word.startswith("output_dir=")]
    rest = [word for word in words if not word.startswith("output_dir=")]
    return Path(roots[-1] if roots else OUTPUT_DIR), rest


def spans_folder(output_dir: Path, run: str) -> Path:
    """The folder of spans that `run` names. Raises UserError when there is none."""
    for candidate in (output_dir / run / "spans", Path(run) / "spans", Path(run)):
        if has_spans(candidate):
            return candidate
    known = sorted(path.parent.name for path in output_dir.glob("*/spans"))
    there = f"the runs there are: {', '.join(known[-5:])}" if known else "no run is there"
    raise UserError(
        f"{run}: no run in {output_dir} and no folder of spans; {there}; another folder of runs is "
        "output_dir=FOLDER"
    )


def parse(
    arguments: Sequence[str], files: Sequence[str], switch: str | None = None
) -> tuple[list[str], dict[str, str], bool]:
    """Words, options that take a file, and whether the switch was typed. Raises UserError."""
    words: list[str] = []
    options: dict[str, str] = {}
    switched = False
    rest = iter(arguments)
    for word in rest:
        name, equals, value = word.partition("=")
        if word == switch:
            switched = True
        elif name in files:  # --json FILE or --json=FILE
            file = value if equals else next(rest, "")
            if not file or file.startswith("--") or ("=" in file and "://" not in file):
                raise UserError(f"{name} needs a file: {name} FILE")
            options[name] = file
        elif word.startswith("--"):
            known = ", ".join([f"{option} FILE" for option in files] + ([switch] if switch else []))
            raise UserError(f"no option {word}; there are {known}")
        else:
            words.append(word)
    return words, options, switched


def console() -> Console:
    """Where tables are printed."""
    # Piped into a file or a pager a table is as wide as it needs to be.
    made = Console()
    return made if made.is_terminal else Console(width=200)
