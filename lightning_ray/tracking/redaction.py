"""Keeping secrets out of what is logged.

Invariant: a value whose own name, or the name of anything it lies in, matches a secret's, leaves
`masked` as `***`. What is masked wrongly costs a glance into the configuration file; what is not
masked wrongly costs a key, so the names are matched widely.
"""

import re
from collections.abc import Mapping
from typing import Any

from lightning_ray.tracking.store import without_password

MASK = "***"

_SECRET = re.compile(r"key|token|secret|passw|credential|authorization|cookie", re.IGNORECASE)
_TOKENIZER = re.compile(r"tokenizer", re.IGNORECASE)
_TOKENS = re.compile(r"tokens(?![a-z])", re.IGNORECASE)
_CHOICES = frozenset({"inexact_tokens"})
"""Settings of ours that are one of a few words, and so cannot hold a secret."""
_NAMES = frozenset({"env_names"})
"""Settings of ours that hold names of variables, never what is in them."""


def masked(config: Any) -> Any:
    """A copy of a nested configuration with its secrets replaced by `***`.

    A leaf is secret where a name on the way to it matches *key*, *token*, *secret*, *passw*,
    *credential*, *authorization* or *cookie*. Spared are empty values, switches, counts (numbers
    called `...tokens`) and tokenizers, and settings of ours that are a choice of words or names of
    variables. Passwords inside URLs are masked wherever they stand.
    """
    return _masked(config, ())


def _masked(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, Mapping):
        return {key: _masked(item, (*names, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item, names) for item in value]
    if value is None or isinstance(value, bool) or value == "" or not _NAMES.isdisjoint(names):
        return value
    if any(_is_secret(name, value) for name in names):
        return MASK
    return without_password(value) if isinstance(value, str) else value


def _is_secret(name: str, value: Any) -> bool:
    if name in _CHOICES:
        return False
    rest = _TOKENIZER.sub("", name)
    if isinstance(value, int | float):
        rest = _TOKENS.sub("", rest)
    return bool(_SECRET.search(rest))
