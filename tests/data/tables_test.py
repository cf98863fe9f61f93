"""Reading tables, marked lines and records: what is read, and what is left alone."""

import re

import pytest

from finemem_jax import input_pipeline

_tables = input_pipeline.builder("nlu")._tables
LAYOUTS = [{"name", "age"}, {"name", "born"}]


def _read(path, text, read_file=_tables.rows, how=LAYOUTS):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [record.fields for record in read_file(path, how)]


def test_commas_semicolons_or_tabs_divide(tmp_path):
    for text in ("name,age\nAda,3\n", "\ufeffname;age\r\n\r\n Ada ; 3", '\n"age"\t"name"\n3\t"Ada"\n'):
        assert _read(tmp_path / "a", text) == [{"name": "Ada", "age": "3"}]


def test_cells_in_quotes_may_hold_all_but_line_breaks(tmp_path):
    text = 'born;name\n1900;"A; ""B"", C"\n'
    assert _read(tmp_path / "a", text) == [{"born": "1900", "name": 'A; "B", C'}]
    for row, number in (('"1900;A\nB"', 1), ("1900;A;B", 3), ("1900;" + "A" * 200_000, 0)):
        with pytest.raises(ValueError, match=rf"a:3, field row: expected 2 columns \(born, name\), not {number}, got"):
            _read(tmp_path / "a", f"{text}{row}\n")


def test_other_tables_are_left_alone(tmp_path):
    for text in ("", "\n", "name\nAda\n", "Name,Age\nAda,3\n", b"n\xe4me,age\n", b"\xff\xfen\0", "a\rb", "A" * 200_000):
        assert _read(tmp_path / "a", text) == []


def test_marked_lines(tmp_path):
    def read(path, encoding):
        return _tables.marked_lines(path, re.compile("#[0-9]+"), encoding)

    assert _read(tmp_path / "a", b"\n#1\n\n \tb\xe9 \n", read, "latin-1") == [{"line": "#1"}, {"line": " \tbé "}]
    assert _read(tmp_path / "a", b"#1 \n#2\n", read, "utf-8") == []
    with pytest.raises(ValueError, match="a:2, byte 4: not UTF-8"):
        _read(tmp_path / "a", b"#1\nb\xe9\n", read, "utf-8")


def test_records(tmp_path):
    path, ada = tmp_path / "a.jsonl", '{"name": "Ada", "born": 1900}\n'
    assert _read(path, ada + "{}", _tables._files.records) == [{"name": "Ada", "born": 1900}, {}]
    assert _read(path, "{}\n" + ada, _tables._files.records) == _read(path, "7\n" + ada, _tables._files.records) == []
    with pytest.raises(ValueError, match="a.jsonl:2: expected an object, got 7"):
        _read(path, ada + "7\n", _tables._files.records)
