"""One HTML page of sample trajectories: what was sampled, how likely it was, what credit it got.

Invariant: the page stands alone (no request leaves it) and shows text, never runs it: the model's
and the agent's output reach the page only through the template's escaping.
"""

import math
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined

MAX_TOKENS = 8192
"""Tokens shown of one trajectory; the page says how many more there are."""

_TEMPLATE = "trajectory_page.html"
_PIECE = "\N{WHITE VERTICAL RECTANGLE}"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class AttemptInfo:
    """What the page says about an attempt beside its tokens; all of it is shown as plain text."""

    task: str
    """The task, as JSON or as words."""
    result: str = ""
    """What the agent printed."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Its rewards by name."""


@dataclass(frozen=True)
class _Token:
    text: str
    tip: str
    kind: str
    """"masked", "gain", "loss" or "even"."""
    credit: float
    """Strength of the credit against the strongest on the page, 0 to 1."""
    doubt: float
    """How unlikely the token was: 1 - its probability, 0 to 1."""


@dataclass(frozen=True)
class _Trajectory:
    attempt_id: str
    policy: str
    versions: str
    info: AttemptInfo | None
    tokens: list[_Token]
    hidden: int
    sampled: int
    advantage: float | None


def render_trajectory_page(
    table: pa.Table,
    decode: Callable[[int], str],
    info: Mapping[str, AttemptInfo],
    *,
    title: str = "Sample trajectories",
) -> str:
    """The page for the rows of `table` (`SEQUENCE_SCHEMA`), in their order, as HTML.

    `decode` gives the text of one token id, special tokens included. A token that is a part of a
    character, so that its text is U+FFFD, is shown as a box. `info` is looked up by attempt id; an
    attempt that it lacks is shown with its tokens alone.
    """
    rows = table.to_pylist()
    credits = [abs(value) for row in rows for value in row["advantages"] if math.isfinite(value)]
    strongest = max(credits, default=0.0) or 1.0
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        title=title,
        trajectories=[_trajectory(row, decode, info, strongest) for row in rows],
    )


def readable(text: str, token_id: int) -> str:
    """A token's text, with what a browser would swallow, reorder or break shown as a sign.

    Newlines keep breaking the line, behind a sign of their own. Control and format characters
    (which could turn the page's text round) become `\\u` escapes.
    """
    if not text:
        return f"⟨{token_id}⟩"
    if _REPLACEMENT in text:
        text = text.replace(_REPLACEMENT, _PIECE)
    shown = []
    for character in text:
        if character == "\n":
            shown.append("↵\n")
        elif character == "\t":
            shown.append("⇥\t")
        elif unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            shown.append(f"\\u{ord(character):04x}")
        else:
            shown.append(character)
    return "".join(shown)


def _trajectory(
    row: dict[str, Any],
    decode: Callable[[int], str],
    info: Mapping[str, AttemptInfo],
    strongest: float,
) -> _Trajectory:
    columns = ("token_ids", "trainable", "logprobs", "versions", "advantages")
    cells = list(zip(*(row[name] for name in columns), strict=True))
    versions = sorted({version for _, trainable, _, version, _ in cells if trainable})
    gains = [advantage for _, trainable, _, _, advantage in cells if trainable]
    return _Trajectory(
        attempt_id=row["attempt_id"],
        policy=row["policy"],
        versions=", ".join(map(str, versions)),
        info=info.get(row["attempt_id"]),
        tokens=[_token(*cell, decode=decode, strongest=strongest) for cell in cells[:MAX_TOKENS]],
        hidden=max(0, len(cells) - MAX_TOKENS),
        sampled=len(gains),
        advantage=sum(gains) / len(gains) if gains else None,
    )


def _token(
    token_id: int,
    trainable: bool,
    logprob: float,
    version: int,
    advantage: float,
    *,
    decode: Callable[[int], str],
    strongest: float,
) -> _Token:
    decoded = decode(token_id)
    tip = f"token {token_id}"
    if _REPLACEMENT in decoded:
        tip += " · part of a character"
    text = readable(decoded, token_id)
    if not trainable:
        return _Token(text, f"{tip} · not trained on", "masked", 0.0, 0.0)
    tip += f" · logprob {logprob:.3f} (p {math.exp(logprob):.3f})"
    tip += f" · advantage {advantage:+.3f} · version {version}"
    kind = "gain" if advantage > 0 else "loss" if advantage < 0 else "even"
    credit = min(1.0, abs(advantage) / strongest) if math.isfinite(advantage) else 1.0
    doubt = 1.0 - min(1.0, math.exp(logprob)) if not math.isnan(logprob) else 1.0
    return _Token(text, tip, kind, round(credit, 3), round(doubt, 3))
