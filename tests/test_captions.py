"""walt.data.captions: what is read, and the line that is named when it cannot be."""

from __future__ import annotations

import json

import pytest

from walt.data.captions import check_captions, read_captions
from walt.errors import WaltError

EXPECTED = {"a/one.mp4": "A cat, running", "two.mp4": 'Zwei "große" Hunde'}
CSV = 'file,caption\r\na/one.mp4,"A cat, running"\r\n\r\n./two.mp4,"Zwei ""große"" Hunde"\r\n'
JSONL = """{"file": "a/one.mp4", "caption": "A cat, running", "fps": 8}

{"caption": "Zwei \\"große\\" Hunde", "file": "two.mp4"}"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(("name", "text"), [("c.csv", CSV), ("c.jsonl", JSONL), ("c.JSONL", JSONL)])
def test_both_forms(tmp_path, name, text, encoding):
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_captions(tmp_path / name) == EXPECTED


def test_other_columns_and_any_order(tmp_path):
    (tmp_path / "c.csv").write_text("id,caption,file\n1,red,a.mp4\n")
    assert read_captions(tmp_path / "c.csv") == {"a.mp4": "red"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", b"name,text\na,b\n", r"c\.csv, line 1: the header is 'name,text', expected file,caption"),
        ("c.csv", b"", "line 1: the header is ''"),
        ("c.csv", b"file,caption\na,b\nc\n", "line 3: 1 fields, expected 2"),
        ("c.csv", b"file,caption\na,b,c\n", "line 2: 3 fields, expected 2"),
        ("c.csv", b'file,caption\na,"b\n', "line 2: unexpected end of data"),
        ("c.csv", b'file,caption\na,"one\ntwo"\nb, \n', "line 4: caption is ' ', expected a text"),
        ("c.csv", b"file,caption\na,b\n./a,c\n", "line 3: a has a caption already"),
        ("c.csv", b"file,caption\n", "holds no caption"),
        ("c.csv", b"file,caption\na,\xff\n", "is not UTF-8: invalid start byte at byte 15"),
        ("c.jsonl", b'{"file": "a", "caption": "b"}\n{"file": "c"', "line 2: not JSON"),
        ("c.jsonl", b'["a", "b"]', "line 1: a list, expected"),
        ("c.jsonl", b'\n{"file": "a"}', "line 2: caption is None, expected a text"),
        ("c.jsonl", b'{"file": 3, "caption": "b"}', "line 1: file is 3, expected a text"),
        ("c.jsonl", b'{"file": "a", "caption": "\\ud800 b"}', r"caption is '\\ud800 b', which is no Unicode text"),
        ("c.txt", b"a b", r"must be in a file that ends in \.csv or \.jsonl"),
    ],
)
def test_errors_name_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WaltError, match=message):
        read_captions(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(WaltError, match=r"cannot read .*nowhere\.csv: No such file"):
        read_captions(tmp_path / "nowhere.csv")


def test_names_are_compared_in_one_form(tmp_path):
    (tmp_path / "c.csv").write_text("file,caption\ncafe\u0301/a.mp4,x\n b\\ c.mp4 ,y\n", encoding="utf-8")
    assert read_captions(tmp_path / "c.csv") == {"caf\xe9/a.mp4": "x", "b/ c.mp4": "y"}
    (tmp_path / "c.csv").write_text("file,caption\ncafe\u0301,x\ncaf\xe9,y\n", encoding="utf-8")
    with pytest.raises(WaltError, match="line 3: caf\xe9 has a caption already"):
        read_captions(tmp_path / "c.csv")


@pytest.mark.parametrize(
    ("caption", "file"),
    [("A b.MP4", "a\xa0b.mp4"), ("it's.mp4", "it\u2019s.mp4"), ("a-b.mp4", "a\u2013b.mp4"), ("a.mp4", "a\u200b.mp4")],
)
def test_names_that_look_alike_are_told_apart(caption, file):
    difference = f"{caption!a} is not {file!a}"
    with pytest.raises(WaltError, match="none of the 1 captions names a file") as error:
        check_captions({caption}, {file, "other.mp4"}, print)
    assert difference in str(error.value)
    lines: list[str] = []
    check_captions({caption, "c"}, {file, "c"}, lines.append)
    assert lines[2:] == [difference]


@pytest.mark.parametrize("caption", ["two\nlines", "nul\0inside", "🎈👩\u200d🚀", "cafe\u0301"])
def test_any_text_is_read_as_it_is(tmp_path, caption):
    (tmp_path / "c.jsonl").write_text(json.dumps({"file": "a", "caption": caption}), encoding="utf-8")
    (tmp_path / "c.csv").write_text(f'file,caption\na,"{caption}"\n', encoding="utf-8")
    assert read_captions(tmp_path / "c.jsonl") == read_captions(tmp_path / "c.csv") == {"a": caption}


def test_what_has_no_partner_is_listed():
    lines: list[str] = []
    check_captions({"a", "b"}, {"a", "b"}, lines.append)
    assert lines == []
    check_captions({"a", "z"}, {"a", *(f"f{i}" for i in range(7))}, lines.append)
    assert lines == ["1 captions without a file: z", "7 files without a caption: f0, f1, f2, f3, f4 and 2 more"]
    with pytest.raises(WaltError, match="none of the 1 captions names a file of the folder: they name z; it holds a"):
        check_captions({"z"}, {"a"}, lines.append)
