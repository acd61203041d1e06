"""Keeping secrets out of the spans that others send.

Invariant: the value of an attribute that is called like a header with a credential, a key or a
password is stored as `***`, also inside a map or a JSON text that is itself a value; so are
passwords in URLs, and the secret part of an attempt's address. Texts are searched by RE2, a column
at a time: in linear time whatever was sent, and without a Python object per row.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

MASK = "***"

# Token counts (`gen_ai.usage.input_tokens`) and tokenizers are no secrets, so `token` alone is one
# only as a whole word behind what it opens.
_NAMES = (
    r"authorization|api[-_. ]?key|passw(?:or)?d|passwd|secret|credential|cookie|private[-_.]?key|"
    r"access[-_.]?key|(?:access|auth|bearer|refresh|session|security|id|csrf|xsrf)[-_.]?token|"
    r"auth[-_.]header"
)
_NAME = re.compile(rf"(?:{_NAMES})|(?:^|[._-])token$", re.IGNORECASE)

# In a text that is JSON, or the print of a dictionary: "name": "value", however often the quotes
# are escaped, and "name": ["value", ...].
_QUOTE = r"""\\{0,8}["']"""
_PAIR = (
    rf"""(?i)({_QUOTE}[^"'\\]{{0,60}}(?:{_NAMES})[^"'\\]{{0,60}}{_QUOTE}\s*[:,]\s*\[?\s*{_QUOTE})"""
    r"""[^"'\\]+"""
)
_IN_TEXT = (
    (_PAIR, rf"\1{MASK}"),
    (r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}", rf"\1{MASK}"),
    (r"\bsk-[A-Za-z0-9_-]{16,}", MASK),
    # The capability in an attempt's base URL, which HTTP instrumentation records with the URL.
    (r"(/a/)[A-Za-z0-9_-]{32}\b", rf"\1{MASK}"),
    (r"""(://[^/\s:@"']*:)[^/\s@"']+@""", rf"\1{MASK}@"),
)

# Most rows have nothing of the kind, and are looked at once.
_SUSPECT = rf"(?i){_NAMES}|bearer|basic|\bsk-|/a/|://"


@lru_cache(maxsize=4096)
def is_secret(name: str) -> bool:
    """Whether an attribute of this name holds a secret."""
    return _NAME.search(name[-200:]) is not None


def masked(name: str, value: Any) -> Any:
    """An attribute's value (plain JSON types) without what its names say is secret."""
    if value is None or isinstance(value, bool):
        return value
    if is_secret(name):
        return MASK
    if isinstance(value, list):
        # Numbers and texts in a list are called like the list.
        nested = any(isinstance(item, list | dict) for item in value)
        return [masked(name, item) for item in value] if nested else value
    if isinstance(value, dict):
        return {key: masked(key, item) for key, item in value.items()}
    return value


def mask_columns(columns: Mapping[str, pa.Array]) -> dict[str, pa.Array]:
    """Columns of texts (string) without what looks like a secret in them; JSON stays JSON."""
    # As one, because making a pattern ready costs as much as looking through a thousand texts.
    texts = pa.concat_arrays(list(columns.values()))
    suspect = pc.match_substring_regex(texts, pattern=_SUSPECT)
    if not pc.any(suspect).as_py():
        return dict(columns)
    suspect = pc.fill_null(suspect, False)
    found = texts.filter(suspect)
    for pattern, replacement in _IN_TEXT:
        found = pc.replace_substring_regex(found, pattern=pattern, replacement=replacement)
    texts = pc.replace_with_mask(texts, suspect, found)
    masked_columns, begin = {}, 0
    for name, column in columns.items():
        # Copied: a slice would take all of the texts along wherever it is sent.
        masked_columns[name] = pa.concat_arrays([texts.slice(begin, len(column))])
        begin += len(column)
    return masked_columns
