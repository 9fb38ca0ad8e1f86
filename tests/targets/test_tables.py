"""Tables are read in parts, and the parts are the whole table."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from occfeat_targets.sources import tables
from occfeat_targets.sources.keyframe import DatasetError
from occfeat_targets.sources.tables import Tables, read_records

# Texts that look like the border between two records, and records in records.
TEXTS = st.sampled_from(["", "},{", '"},\n{"', "[{", "}]", "\\", "ü", "a"])
VALUES = st.recursive(
    TEXTS | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
)


@given(
    records=st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), min_size=1, max_size=30),
    block=st.integers(1, 60),
    indent=st.sampled_from([None, 0, 1]),
    ascii_only=st.booleans(),
)
def test_a_table_read_in_parts_of_any_size_is_the_whole_table(tmp_path_factory, records, block, indent, ascii_only):
    file = tmp_path_factory.mktemp("table") / "scene.json"
    file.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_BLOCK", block)
        assert list(read_records(file)) == records


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'[{"token": "a"}, {"token": "b"', r"scene\.json \(30 bytes\) is no complete JSON file"),
        (b'[{"token": "a"} {"token": "b"}]', "is no complete JSON file"),
        (b'[{"token": "a"}, {"token": "b"}] x', "is no complete JSON file"),
        (b'[{"token": "a"}, {"token": "\xff"}]', "is no complete JSON file"),
        (b'[{"token": "a"}, 3, {"token": "b"}]', "is no list of records"),
        (b'{"token": "a"}', "is no list of records"),
        (b"", r"\(0 bytes\) is no complete JSON file"),
        (b"[ ]", "has no records"),
    ],
)
def test_a_table_that_is_damaged_anywhere_is_named(tmp_path, monkeypatch, content, fault, block):
    monkeypatch.setattr(tables, "_BLOCK", block)
    file = tmp_path / "scene.json"
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=fault) as raised:
        list(read_records(file))
    assert "\n" not in str(raised.value) and str(raised.value).endswith("re-extract the tables")


def test_only_the_needed_records_and_fields_are_kept(tmp_path):
    records = [{"token": str(i), "value": i, "other": "x"} for i in range(9)]
    (tmp_path / "sample.json").write_text(json.dumps(records))
    loaded = Tables(tmp_path)
    loaded.load("sample", lambda record: record["value"] % 3 == 0, ("value",))
    assert [dict(record) for record in loaded.all("sample")] == [{"value": 0}, {"value": 3}, {"value": 6}]
    assert loaded.has("sample", "3") and not loaded.has("sample", "4")
    with pytest.raises(DatasetError, match=r"sample.json, token 4: no such record; re-extract the tables"):
        loaded.get("sample", "4")
    with pytest.raises(DatasetError, match=r"sample.json, token 0: the record has no key 'colour'; re-extract"):
        loaded.load("sample", lambda record: record["colour"])
