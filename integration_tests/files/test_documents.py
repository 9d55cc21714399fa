# SPDX-License-Identifier: Apache-2.0
"""JSON from anywhere is a value, or an error that names the file."""

import pytest

from diffusers_ternary.files import parse_json_object, read_json


def test_a_json_object_is_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": [1, 2.5, "ü"]}', encoding="utf-8")
    assert read_json(file) == {"a": [1, 2.5, "ü"]}
    assert read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[1]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
    ],
    ids=["empty", "cut off", "not UTF-8", "a huge number", "deep list", "deep object", "a list", "null"],
)
def test_everything_else_names_the_file(tmp_path, content, message):
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"broken\.json .*{message}.*Restore the file"):
        read_json(file)
    with pytest.raises(ValueError, match=r"the source .*Write it again"):
        parse_json_object(content, source="the source", remedy="Write it again.")
