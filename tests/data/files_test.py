"""Reading original files: which are read, which are left alone, and what every error says."""

import gzip
import json

import pytest

from finemem_jax import input_pipeline

# The module that the builders really use; `data/` is no package of its own.
_files = input_pipeline.builder("squad")._files

ONE, TWO = {"key": 1, "other": "a"}, {"key": 2, "other": "b"}


def _read(folder):
    return list(_files.read(str(folder), [("key", "other")], "Toy"))


def _values(folder):
    return [record.fields["key"] for record in _read(folder)]


def _lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.jsonl", _lines(ONE, TWO)),
        ("a.JSONL", _lines(ONE, TWO)),
        ("a.json", _lines(ONE, TWO)),
        ("a.json", json.dumps([ONE, TWO])),
        ("a.json", json.dumps([ONE, TWO], indent=2)),
        ("a.json", "\n\n" + json.dumps({"version": "1", "data": [ONE, TWO]}, indent=2)),
        ("a.jsonl", json.dumps({"data": [ONE, TWO]})),
        ("a.jsonl", "\n" + _lines(ONE) + "  \n\n" + _lines(TWO).strip()),
        ("a.jsonl", "\ufeff" + _lines(ONE, TWO)),
        ("a.jsonl", _lines(ONE, TWO).replace("\n", "\r\n")),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_layouts(tmp_path, name, text, packed):
    if packed:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / name).write_bytes(text.encode())
    assert _values(tmp_path) == [1, 2]


def test_single_record_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ONE, indent=1))
    assert _values(tmp_path) == [1]


def test_a_record_with_a_list_named_data_is_a_record(tmp_path):
    (tmp_path / "a.jsonl").write_text(_lines(ONE | {"data": [TWO]}))
    assert _values(tmp_path) == [1]


def test_every_file_below_the_folder_in_order_of_path(tmp_path):
    for i, name in enumerate(["b/z.jsonl", "a.jsonl", "b/c/any name.json"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_lines({"key": i, "other": ""}))
    assert _values(tmp_path) == [1, 2, 0]


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jsonl").write_text(_lines(ONE))
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/link").symlink_to(tmp_path / "elsewhere")
    assert _values(tmp_path / "source") == [1]


def test_other_formats_and_hidden_files_are_left_alone(tmp_path):
    (tmp_path / "a.jsonl").write_text(_lines(ONE))
    (tmp_path / "other.jsonl").write_text(_lines({"key": 5}) + "broken, but not ours\n")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "notes.txt").write_bytes(b"\xff")
    (tmp_path / ".hidden.json").write_bytes(b"\xff")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/b.jsonl").write_text(_lines(TWO))
    assert _values(tmp_path) == [1]


def test_pairs_of_surrogates_are_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"key": "\\ud83d\\ude00", "other": 1}')
    assert _values(tmp_path) == ["\U0001f600"]


# ---- errors: where, what, and the remedy -------------------------------------------------------------------------


def _fails(folder, *parts):
    with pytest.raises(ValueError) as caught:
        _read(folder)
    for part in parts:
        assert part in str(caught.value)


def test_no_folder(tmp_path):
    _fails("", "data.source_dir must be the folder", "files of Toy (.json, .jsonl", "Set data.source_dir")
    _fails(tmp_path / "missing", "data.source_dir must exist", "missing", "Correct it")
    (tmp_path / "a.jsonl").write_text(_lines(ONE))
    _fails(tmp_path / "a.jsonl", "data.source_dir must be a folder", "Name the folder it is in")


def test_no_file(tmp_path):
    (tmp_path / "b.jsonl").write_text(_lines({"else": 1}))
    _fails(
        tmp_path,
        *("holds no files of Toy (.json, .jsonl, .json.gz, .jsonl.gz; records with the fields key, other)", "1 files"),
        "Put the original files there, or point data.source_dir",
    )


@pytest.mark.parametrize(
    "name, data, parts",
    [
        ("a.jsonl", _lines(ONE) + "\n{'key'}\n", ["a.jsonl:3, column 2: broken JSON", "Correct the file, or move"]),
        ("a.jsonl", '{"key": 1,\n', ["a.jsonl:1, column", "broken JSON"]),
        ("a.json", "\n" + json.dumps([ONE], indent=1)[:-2] + "\n\n", ["a.json:6, column", "broken JSON"]),
        ("a.json", "[\n\n\n{]", ["a.json:4, column 2: broken JSON"]),
        ("a.json", "no json at all", ["a.json:1, column 1: broken JSON"]),
        ("a.jsonl", _lines(ONE) + "7\n", ["a.jsonl:2: expected an object, got 7. Correct the line, or move"]),
        ("a.json", json.dumps([ONE, None]), ["a.json:1, record 2: expected an object, got None"]),
        ("a.jsonl", _lines(ONE) + '{"key": "\\ud83d"}', ["a.jsonl:2", "surrogate", "Correct the text, or move"]),
        ("a.jsonl", "[" * 200_000, ["a.jsonl:1: JSON nested too deeply. Correct the file, or move"]),
    ],
)
def test_broken_lines(tmp_path, name, data, parts):
    (tmp_path / name).write_text(data)
    _fails(tmp_path, *parts)


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_not_utf8_names_the_byte(tmp_path, start):
    head = start + _lines(ONE).encode() + b'{"key": "'
    (tmp_path / "a.jsonl").write_bytes(head + b'\xe9"}')
    _fails(tmp_path, f"a.jsonl:2, byte {len(head)}: not UTF-8. Convert the file to UTF-8, or move")


def test_damaged_gzip(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(_lines(*[ONE] * 50).encode())
    for damaged in (whole[:-9], b"no gzip", whole[:20] + b"\xff" * 20):
        path.write_bytes(damaged)
        _fails(tmp_path, "a.jsonl.gz:", "truncated or damaged", "Fetch or compress it anew, or move")


def test_too_long_is_refused_with_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(_files, "MAX_LINE_BYTES", 40)
    path = tmp_path / "a.jsonl"
    path.write_text(_lines(ONE) + "x" * 1_234 + "\n")
    _fails(tmp_path, "a.jsonl:2: 1,235 bytes in one piece, more than the 40", "Write one record a line, or move")
    path.write_text(_lines(*[ONE] * 9))  # many short lines are no long line
    assert len(_read(tmp_path)) == 9
    path.unlink()
    (tmp_path / "b.json").write_text(json.dumps([ONE] * 9, indent=1))
    _fails(tmp_path, "b.json (one document): 3", "bytes in one piece", "Write one record a line, or move")


@pytest.mark.parametrize(
    "get, parts",
    [
        (lambda r: r.text("none"), ["f.jsonl:3, field at.none: expected a text, the field is missing"]),
        (lambda r: r.text("list"), ["field at.list: expected a text, got list [1]"]),
        (lambda r: r.text("blank"), ["field at.blank: expected a text that is not blank, got str ' '"]),
        (lambda r: r.items("blank"), ["field at.blank: expected a list, got str"]),
        (lambda r: r.record("list"), ["field at.list: expected an object, got list"]),
        (lambda r: r.records("list"), ["field at.list[0]: expected an object, got int 1"]),
        (lambda r: r.records("nested")[0].text("x"), ["field at.nested[0].x: expected a text, got NoneType None"]),
        (lambda r: r.record("long").text("y"), ["got list [0, 0", "..."]),
    ],
)
def test_fields(get, parts):
    fields = {"list": [1], "blank": " ", "nested": [{"x": None}], "long": {"y": [0] * 99}}
    with pytest.raises(ValueError) as caught:
        get(_files.Record(fields, "f.jsonl:3", "at."))
    for part in [*parts, "Correct it, or move the file out of data.source_dir"]:
        assert part in str(caught.value)
