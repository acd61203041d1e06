"""Reading a store's folder without the store, and SQL over what is read."""

import pytest
from spans_support import row

from lightning_ray.errors import UserError
from lightning_ray.spans import query, read_folder, to_batch
from lightning_ray.spans.segment import SegmentWriter


@pytest.fixture
def spans(tmp_path):
    for number, value in ((1, 0.25), (2, 0.75)):
        writer = SegmentWriter(tmp_path / f"{number:08d}.arrows")
        writer.append(
            to_batch([row(f"s{number}", f"r{number}/1", value=value, attributes={"by": "grader"})])
        )
        writer.close()
    return read_folder(tmp_path)


def test_a_folder_is_read_as_one_table(spans):
    assert spans["attempt_id"].to_pylist() == ["r1/1", "r2/1"]


def test_sql_answers_as_arrow(spans):
    answer = query(spans, "SELECT avg(value) AS mean FROM spans WHERE value > ?", [0.0])
    assert answer.to_pylist() == [{"mean": 0.5}]


def test_attributes_are_json_for_sql(spans):
    answer = query(spans, "SELECT attributes->>'by' AS by FROM spans LIMIT 1")
    assert answer.to_pylist() == [{"by": "grader"}]


@pytest.mark.parametrize(
    "sql", ["SELECT nothing FROM spans", "SELECT * FROM read_text('/etc/hosts')"]
)
def test_a_query_that_cannot_be_run_is_a_users_mistake(spans, sql):
    with pytest.raises(UserError, match="the query cannot be run"):
        query(spans, sql)


def test_a_folder_without_spans_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no spans in"):
        read_folder(tmp_path)
