from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.tracking.redaction import MASK, masked

SECRET_WORDS = st.sampled_from(
    ["api_key", "HF_TOKEN", "client-secret", "dbPassword", "credentials", "Authorization"]
)
PREFIXES = st.text("abcxyz_", max_size=6)
HIDDEN = "hunter2-never-shown"


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@given(prefix=PREFIXES, word=SECRET_WORDS, suffix=PREFIXES, depth=st.integers(0, 3))
def test_a_secret_is_masked_at_any_depth(prefix: str, word: str, suffix: str, depth: int) -> None:
    config: object = {f"{prefix}{word}{suffix}": HIDDEN}
    for level in range(depth):
        config = {f"level{level}": [config]}
    assert leaves(masked(config)) == [MASK]


@given(word=SECRET_WORDS, inner=PREFIXES.filter(bool))
def test_everything_below_a_secret_name_is_masked(word: str, inner: str) -> None:
    assert leaves(masked({word: {inner: HIDDEN, "list": [HIDDEN, 7]}})) == [MASK, MASK, MASK]


def test_settings_that_only_sound_secret_are_shown() -> None:
    config = {
        "max_new_tokens": 20,
        "tokens": 1.5,
        "tokenizer": "folder/tokenizer",
        "keep_versions": 3,
        "api_key": None,
        "use_token": True,
        "password": "",
        "hygiene": {"inexact_tokens": "drop"},
        "agent": {"env_names": {"AGL_KEY": "OPENAI_API_KEY"}},
    }
    assert masked(config) == config


def test_numbers_are_masked_where_they_are_no_counts() -> None:
    assert masked({"password": 12345, "key": 7, "tokens": "abc"}) == {
        "password": MASK,
        "key": MASK,
        "tokens": MASK,
    }


def test_a_password_inside_a_url_is_masked() -> None:
    shown = masked({"tracking": {"uri": f"postgresql://me:{HIDDEN}@db:5432/runs"}})
    assert shown == {"tracking": {"uri": "postgresql://me:***@db:5432/runs"}}


def test_the_configuration_itself_is_left_alone() -> None:
    config = {"api_key": HIDDEN, "list": [{"token": HIDDEN}]}
    masked(config)
    assert config == {"api_key": HIDDEN, "list": [{"token": HIDDEN}]}
