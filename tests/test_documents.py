"""Files to documents: every kind of file, streams cut anywhere, and clear words about what can't be read."""

import json
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast import documents
from llmfast.documents import Part, find_sources, read_text, split_documents
from llmfast.tokenizers import BPETokenizer

END = "<|endoftext|>"


def read(*paths, encoding="utf-8") -> list[Part]:
    return [part for source in find_sources(paths, encoding) for part in source.parts()]


def texts(*paths) -> list[str]:
    return [part.text for part in read(*paths)]


@pytest.fixture
def small(monkeypatch):
    """Blocks of a few bytes, so that every file has many."""
    monkeypatch.setattr(documents, "BLOCK", 7)


# --- text -------------------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    (tmp_path / "a.txt").write_text("\n One.\n\nTwo ☃\n ", "utf-8")
    assert read(tmp_path / "a.txt") == [Part("\n One.\n\nTwo ☃\n ")]


def test_separators_make_documents_without_the_blank_around_them(tmp_path, small):
    (tmp_path / "a.txt").write_text(f"One.\nTwo.\n{END}\n\n Three ☃. \n{END}\n{END}\nFour{END}Five", "utf-8")
    assert texts(tmp_path / "a.txt") == ["One.\nTwo.", "Three ☃.", "Four", "Five"]


@pytest.mark.parametrize("content", ["", " \n\t\n", END, f"\n{END}\n\n{END} "])
def test_blank_files_and_documents_are_left_out(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert read(tmp_path / "a.txt") == []


@pytest.mark.parametrize("name", ["novel", "novel.raw", "novel.md"])
def test_a_file_that_is_named_itself_is_text_whatever_its_suffix(tmp_path, name):
    (tmp_path / name).write_text("text")
    assert texts(tmp_path / name) == ["text"]


def test_line_ends_and_byte_order_marks_are_made_one(tmp_path, small):
    (tmp_path / "a.txt").write_bytes("\ufeffabcdef\r\nghi\rjkl\r\r\nend\r".encode())
    assert texts(tmp_path / "a.txt") == ["abcdef\nghi\njkl\n\nend\n"]


PIECES = st.lists(st.sampled_from(["a", "word", " ", "\n", "\n\n", "é", "☃", "🎉", END, END[:5], ".\n"]), max_size=40)


@settings(max_examples=150)
@given(pieces=PIECES)
def test_documents_are_the_same_wherever_blocks_and_parts_end(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(pieces), "utf-8")
    whole = texts(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", 3)
        patch.setattr(documents, "PART", 16)
        found, document = [], ""
        for part in read(path):
            document += part.text
            if part.ends:
                found.append(document)
                document = ""
    assert document == ""  # the last part ends
    # What stands before a cut is given on before it is known whether a separator follows the blank after it.
    assert [text.strip() for text in found if text.strip()] == [text.strip() for text in whole]
    assert not any(END in text for text in found)


def test_a_long_document_comes_in_parts_whose_tokens_are_those_of_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART", 400)
    lines = [f"Line {i}: don't  stop,\n{'' if i % 3 else chr(10)}  the 1{i} cats…" for i in range(200)]
    text = "\n".join(lines)
    (tmp_path / "a.txt").write_text(text, "utf-8")
    parts = read(tmp_path / "a.txt")
    assert len(parts) > 10 and [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
    assert "".join(part.text for part in parts) == text
    tokenizer = BPETokenizer.train([text], 400)
    assert [i for part in parts for i in tokenizer.encode(part.text)] == tokenizer.encode(text)


def test_a_text_without_line_ends_is_cut_before_a_blank_and_one_without_blanks_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PART", 50)
    (tmp_path / "a.txt").write_text("word " * 60)
    parts = texts(tmp_path / "a.txt")
    assert len(parts) > 3 and all(part.startswith(" ") for part in parts[1:])
    (tmp_path / "b.txt").write_text("x" * 300)
    assert len(texts(tmp_path / "b.txt")) > 3 and "".join(texts(tmp_path / "b.txt")) == "x" * 300


# --- what is not UTF-8 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["", "abc", "☃" * 30, "a" * 6])
@pytest.mark.parametrize("bad", [b"\xe8t", b"\xff", b"\xc3"])  # the last ends in the middle of a character
def test_bytes_that_are_not_utf8_are_named_with_their_place(tmp_path, small, before, bad):
    (tmp_path / "a.txt").write_bytes(before.encode() + bad)
    with pytest.raises(ValueError, match=f"a.txt is not utf-8: byte {len(before.encode())} .0x") as error:
        read(tmp_path / "a.txt")
    assert "--encoding latin-1" in str(error.value)


def test_another_encoding_can_be_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("très".encode("latin-1"))
    assert read(tmp_path / "a.txt", encoding="latin-1") == [Part("très")]
    (tmp_path / "b.txt").write_bytes("très".encode("utf-16"))
    assert read(tmp_path / "b.txt", encoding="utf-16") == [Part("très")]
    with pytest.raises(ValueError, match="encoding 'klingon' is not known"):
        read(tmp_path / "a.txt", encoding="klingon")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_says_how_to_read_the_rest(tmp_path, small, encoding):
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    (tmp_path / "a.txt").write_bytes(f"{mark}très long ☃\r\nend".encode(encoding))
    assert read(tmp_path / "a.txt") == [Part("très long ☃\nend")]
    (tmp_path / "a.jsonl").write_bytes(f'{mark}{{"text": "☃"}}\r\n'.encode(encoding))
    assert texts(tmp_path / "a.jsonl") == ["☃"]


@pytest.mark.parametrize("wide", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["The cat saw the dog. " * 9, "Кот видит собаку. " * 9, "Ça va? Très bien, naïf."])
@pytest.mark.parametrize("tried", ["utf-8", "latin-1"])
def test_text_full_of_zero_bytes_is_told_its_encoding_and_never_latin_1(tmp_path, wide, text, tried):
    (tmp_path / "a.txt").write_bytes(text.encode(wide))
    with pytest.raises(ValueError, match=f"a.txt has a zero byte in every few.*--encoding {wide}`") as error:
        read(tmp_path / "a.txt", encoding=tried)
    assert "latin-1" not in str(error.value)
    assert read(tmp_path / "a.txt", encoding=wide) == [Part(text)]


def test_what_is_full_of_zero_bytes_otherwise_is_no_text(tmp_path):
    for content in (bytes(range(7)) * 40, b"\xff" + bytes(99), b"\x7fELF" + bytes(5) + b"\xe8" + bytes(7)):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"a.txt is no text: it is full of zero bytes$"):
            read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"one \0 in a long line is a character like others: " + b"word " * 20)
    assert "\0" in texts(tmp_path / "a.txt")[0]


@pytest.mark.parametrize("encoding", ["rot13", "hex", "undefined", "", "a\0b", "klingon"])
def test_what_is_no_encoding_of_text_is_refused(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("text")
    for reader in (find_sources, lambda paths, encoding: read_text(*paths, encoding)):
        with pytest.raises(ValueError, match="is not known; try utf-8"):
            reader([tmp_path / "a.txt"], encoding)


def test_a_text_is_the_same_to_whoever_reads_it(tmp_path, small):
    path = tmp_path / "a.txt"
    path.write_bytes(f"\ufeffOne.\r\nTwo. \r\n{END}\r\n\r\n Three.{END}\r\n".encode())
    assert read_text(path) == f"One.\nTwo. \n{END}\n\n Three.{END}\n"
    assert split_documents(read_text(path)) == texts(path) == ["One.\nTwo.", "Three."]
    assert split_documents("x" * (documents.PART + 5) + END + "y") == ["x" * (documents.PART + 5), "y"]


# --- jsonl ------------------------------------------------------------------------------------------------------


def test_a_line_of_jsonl_is_a_document_and_its_prompt_stands_apart(tmp_path, small):
    records = [{"text": "One\n☃ line\u2028sep"}, {"prompt": "Q: 1+1?\n", "completion": "2", "more": 5}, {"text": " "}]
    lines = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    (tmp_path / "a.jsonl").write_text("\r\n".join([*lines[:1], "", *lines[1:]]), "utf-8")
    assert read(tmp_path / "a.jsonl") == [Part("One\n☃ line\u2028sep"), Part("2", "Q: 1+1?\n")]


def test_a_separator_in_jsonl_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": f"a{END}b"}))
    assert texts(tmp_path / "a.jsonl") == [f"a{END}b"]


def test_half_a_surrogate_pair_in_jsonl_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b\\ud83c\\udf89"}')
    assert texts(tmp_path / "a.jsonl") == ["a\ufffdb🎉"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not valid JSON"),
        ("[1]", 'needs a string "text", or "prompt" and "completion"'),
        ("{}", "needs a string"),
        ('{"text": 5}', "needs a string"),
        ('{"prompt": "a"}', "needs a string"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line)
    with pytest.raises(ValueError, match=f"a.jsonl, line 3: {message}"):
        read(tmp_path / "a.jsonl")


def test_a_line_of_jsonl_has_a_longest_length(tmp_path, small, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_LINE", 40)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n' * 9 + '{"text": "a longer one that is still good"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 10 is longer than 40 characters"):
        read(tmp_path / "a.jsonl")
    monkeypatch.setattr(documents, "LONGEST_LINE", 43)
    assert len(read(tmp_path / "a.jsonl")) == 10


# --- folders and zips -------------------------------------------------------------------------------------------


def test_a_folder_is_read_in_the_order_of_its_names_at_every_depth(tmp_path):
    for name in ["b.txt", "a/z.txt", "a/y.md", "c.jsonl", ".hidden.txt", ".git/x.txt", "image.png", "a/b/deep.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"text": name}) if name.endswith("jsonl") else name
        (tmp_path / name).write_text(content)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("inner/2.txt", "zip 2")
        archive.writestr("inner/1.txt", "zip 1")
        archive.writestr("inner/3.jsonl", '{"text": "zip 3"}')
        archive.writestr("__MACOSX/1.txt", "rubbish")
        archive.writestr("README", "not taken")
    inside = ["zip 1", "zip 2", "zip 3"]
    assert texts(tmp_path) == ["a/b/deep.txt", "a/y.md", "a/z.txt", "b.txt", *inside, "c.jsonl"]
    assert texts(tmp_path / "b.zip", tmp_path / "b.txt") == [*inside, "b.txt"]  # files stay in the order given


def test_the_place_in_a_zip_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/bad.txt", b"ok \xff")
    with pytest.raises(ValueError, match="a.zip/in/bad.txt is not utf-8: byte 3"):
        read(tmp_path / "a.zip")


def test_a_damaged_zip_is_named(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"no zip at all")
    with pytest.raises(ValueError, match="a.zip can't be unpacked"):
        read(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "some text " * 100)
    content = bytearray(path.read_bytes())
    content[45:55] = bytes(10)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.zip/a.txt can't be unpacked"):
        read(path)


def test_a_zip_that_unpacks_to_more_than_text_does_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.txt", "a" * 1_000_000)
        archive.writestr("good.txt", "".join(map(str, range(50_000))))
    assert len(texts(tmp_path / "a.zip")) == 2  # small enough to do no harm
    monkeypatch.setattr(documents, "UNPACKED_BYTES", 100_000)
    with pytest.raises(ValueError, match=r"a.zip/bomb.txt unpacks to 1,000,000 bytes, over 200 times"):
        read(tmp_path / "a.zip")


def test_paths_that_lead_to_no_text_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder .*nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no .txt, .md, .jsonl, .zip"):
        read(tmp_path)
    with pytest.raises(ValueError, match="no files were given"):
        read()
