from html.parser import HTMLParser

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.tracking import trajectory_page
from lightning_ray.tracking.trajectory_page import AttemptInfo, readable, render_trajectory_page
from lightning_ray.trajectories.batch import SEQUENCE_SCHEMA

HOSTILE = "</span><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
VOCABULARY = {0: "What", 1: " is", 2: "\n", 3: "calc", 4: "(", 5: HOSTILE, 6: "�", 7: ""}


class Page(HTMLParser):
    """The tags of a page and the tokens in it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tokens: list[dict[str, str]] = []
        self.text = ""
        self._open: list[bool] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "span":
            self._open.append("data-tip" in found)
            if "data-tip" in found:
                self.tokens.append({**found, "text": ""})

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1]:
            self.tokens[-1]["text"] += data


def row(ids: list[int], prompt: int, advantage: float, attempt: str = "r1/1") -> dict[str, object]:
    sampled = len(ids) - prompt
    return {
        "group_id": "g",
        "rollout_id": "r1",
        "attempt_id": attempt,
        "policy": "policy",
        "token_ids": ids,
        "trainable": [False] * prompt + [True] * sampled,
        "logprobs": [0.0] * prompt + [-0.5] * sampled,
        "versions": [-1] * prompt + [7] * sampled,
        "calls": [-1] * prompt + [0] * sampled,
        "advantages": [0.0] * prompt + [advantage] * sampled,
    }


def page(
    *rows: dict[str, object], info: dict[str, AttemptInfo] | None = None, title: str = "t"
) -> Page:
    table = pa.Table.from_pylist(list(rows), schema=SEQUENCE_SCHEMA)
    return Page(render_trajectory_page(table, VOCABULARY.__getitem__, info or {}, title=title))


def test_each_token_shows_its_logprob_version_and_credit() -> None:
    found = page(row([0, 1, 3, 4], prompt=2, advantage=1.25), row([3], 0, -0.625, "r1/2"))
    assert [token["text"] for token in found.tokens] == ["What", " is", "calc", "(", "calc"]
    masked, sampled, opposed = found.tokens[0], found.tokens[2], found.tokens[4]
    assert masked["class"] == "t masked"
    assert "not trained on" in masked["data-tip"] and "style" not in masked
    assert sampled["class"] == "t gain" and "--c:1.0" in sampled["style"]
    assert sampled["data-tip"] == (
        "token 3 · logprob -0.500 (p 0.607) · advantage +1.250 · version 7"
    )
    assert opposed["class"] == "t loss" and "--c:0.5" in opposed["style"]


def test_an_attempt_shows_its_task_result_rewards_and_version() -> None:
    info = {"r1/1": AttemptInfo("12 plus 30", "42", {"exact": 1.0, "format": 0.25})}
    text = page(row([0, 3], 1, 0.0), info=info).text
    for shown in (
        "r1/1",
        "version 7",
        "12 plus 30",
        "42",
        "exact 1",
        "format 0.25",
        "1 of 2 tokens",
    ):
        assert shown in text


def test_hostile_text_is_shown_and_never_run() -> None:
    info = {HOSTILE: AttemptInfo(HOSTILE, HOSTILE, {HOSTILE: 1.0})}
    hostile = {**row([5, 5], 1, 1.0, attempt=HOSTILE), "policy": HOSTILE}
    found = page(hostile, info=info, title=HOSTILE)
    plain = page(row([0, 0], 1, 1.0), info={"r1/1": AttemptInfo("", "", {"x": 1.0})})
    assert found.tags == plain.tags
    assert "script" not in found.tags and "img" not in found.tags
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert [token["text"] for token in found.tokens] == [HOSTILE, HOSTILE]
    assert found.text.count("<script>alert(1)</script>") == 9, "every place that shows it"


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    found = page(row([0, 3], 1, 1.0))
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not {"src", "href"} & {name for name, _ in found.attributes}


def test_a_part_of_a_character_and_an_empty_token_are_visible() -> None:
    found = page(row([6, 7, 2], 0, 1.0))
    assert [token["text"] for token in found.tokens] == ["▯", "⟨7⟩", "↵\n"]
    assert "part of a character" in found.tokens[0]["data-tip"]


def test_a_trajectory_without_anything_known_or_sampled_is_shown() -> None:
    assert "0 of 2 tokens" in page(row([0, 1], 2, 0.0)).text
    assert "No trajectories" in page().text


def test_a_long_trajectory_is_cut_and_says_so() -> None:
    more = 5
    found = page(row([0] * (trajectory_page.MAX_TOKENS + more), 1, 1.0))
    assert len(found.tokens) == trajectory_page.MAX_TOKENS
    assert f"{more} more tokens are not shown" in found.text


@given(st.text())
def test_readable_text_cannot_turn_the_page_round(text: str) -> None:
    shown = readable(text, 1)
    assert shown
    assert not set(shown) & set("\u202e\u202d\u2066\u200b\x00\x1b\r\ufffd")
