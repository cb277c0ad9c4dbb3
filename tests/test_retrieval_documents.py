"""Files to blocks to pieces: structure and places are kept, sizes are bounded, and what can't be read says why."""

import io
import os
import sys
import zipfile

import pytest
from retrieval_toys import TEXTS, manuals, pdf

pytest.importorskip("pypdf")
pytest.importorskip("bs4")
from llmfast.retrieval import blocks
from llmfast.retrieval.blocks import Block, read_blocks
from llmfast.retrieval.files import documents_below, read_file
from llmfast.retrieval.pieces import pieces_of


def count(text: str) -> int:
    return len(text.split())


def test_text_has_paragraphs_with_their_lines():
    data = b"\xef\xbb\xbfOne.\r\nStill one.\r\n\r\n \r\nTwo.\n\n\nThree."
    found = read_blocks(data, "a.txt")
    assert found == [
        Block("One.\nStill one.", (), "line 1"),
        Block("Two.", (), "line 5"),
        Block("Three.", (), "line 8"),
    ]


def test_markdown_stands_under_its_headings():
    found = read_blocks(TEXTS["router.md"].encode() + b"\n# Other\n\n- a\n- b\n\n```\n# no heading\n```\n", "r.md")
    assert found[0] == Block("A box with lights.", ("Router",), "line 3")
    assert found[1] == Block("Hold the button on the back for ten seconds.", ("Router", "Reset"), "line 7")
    assert found[2] == Block("- a\n- b", ("Other",), "line 11")
    assert found[3] == Block("```\n# no heading\n```", ("Other",), "line 14")


def test_html_is_what_is_read_of_a_page():
    found = read_blocks(TEXTS["trains.html"].encode(), "t.html")
    assert found == [
        Block("The night train to Vienna leaves at nine.", ("Trains",)),
        Block("Bicycles travel free.", ("Trains",)),
    ]
    page = "<meta charset=latin-1><p>a<b>b</b>&amp;<br>c</p><!-- no --><pre>x\n  y</pre><p>é</p>".encode("latin-1")
    assert [block.text for block in read_blocks(page, "t.htm")] == ["ab&\nc", "x\n y", "é"]
    deep = b"<div>" * 30_000 + b"deep" + b"</div>" * 30_000
    assert [block.text for block in read_blocks(deep, "d.html")] == ["deep"]


def test_pdf_has_pages():
    found = read_blocks(pdf("Bake bread.", "", "Clean it."), "o.pdf")
    assert found == [Block("Bake bread.", (), "page 1"), Block("Clean it.", (), "page 3")]
    assert blocks._unwrapped("a hy-\nphen and\na line.\nNext\n\nOther") == "a hyphen and a line.\nNext\n\nOther"


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("p.pdf", pdf("", ""), "its pages are pictures, or blank"),
        ("p.pdf", b"%PDF-1.4 nonsense", "p.pdf can't be read as PDF"),
        ("p.pdf", b"", "p.pdf can't be read as PDF"),
        ("a.txt", b" \n\n", "a.txt holds no text"),
        ("a.txt", "Grüße aus Köln".encode("latin-1"), "a.txt is not utf-8.*latin-1"),
        ("a.md", b"\x00\x01" * 500, "a.md"),
        ("a.html", b"<meta charset=nonsense><p>x", "encoding 'nonsense' is not known"),
    ],
)
def test_what_holds_no_text_says_why(name, data, said):
    with pytest.raises(ValueError, match=said) as error:
        read_blocks(data, name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module, name", [("pypdf", "a.pdf"), ("bs4", "a.html")])
def test_a_library_that_is_missing_is_named(monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{name} needs {module}, which pip install"):
        read_blocks(pdf("x"), name)


def test_a_pdf_that_does_not_end_is_given_up(monkeypatch):
    import threading

    never = threading.Event()
    monkeypatch.setattr(blocks, "SECONDS", 0.1)
    monkeypatch.setattr(blocks, "_pages", lambda data, name: iter(lambda: never.wait(5), None))
    with pytest.raises(ValueError, match="took over 0 s"):
        read_blocks(pdf("x"), "slow.pdf")


def test_text_is_bounded(monkeypatch):
    monkeypatch.setattr(blocks, "MOST_TEXT", 1000)
    with pytest.raises(ValueError, match="characters of text"):
        read_blocks(b"word " * 300, "a.txt")
    monkeypatch.setattr(blocks, "MOST_PARAGRAPH", 40)
    assert [len(block.text) for block in read_blocks(b"x" * 90, "a.txt")] == [40, 40, 10]


def test_a_folder_and_a_zip_hold_the_same_documents(tmp_path):
    folder = manuals(tmp_path / "manuals")
    (folder / ".hidden.txt").write_text("no")
    (folder / "picture.png").write_bytes(b"no")
    with zipfile.ZipFile(tmp_path / "manuals.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    left_out: list[str] = []
    names = ["garden.txt", "oven.pdf", "router.md", "trains.html"]
    for path in (folder, tmp_path / "manuals.zip"):
        found = list(documents_below(path, left_out.append))
        assert [name.rpartition("/")[2] for _, name, _ in found] == names
        files = [read_file(*each) for each in found]
        assert [file.data for file in files] == [(folder / name).read_bytes() for name in names]
        assert files[1].kind == "pdf" and files[1].path.startswith(str(tmp_path))
    assert not left_out


def test_what_can_not_be_looked_into_is_left_out_in_one_line(tmp_path):
    folder = manuals(tmp_path / "manuals")
    (folder / "broken.zip").write_bytes(b"PK nonsense")
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.txt", bytes(1 << 28))
    left_out: list[str] = []
    assert len(list(documents_below(folder, left_out.append))) == 4
    assert len(left_out) == 2 and "bomb.txt unpacks to" in left_out[0] and "broken.zip can't be unpacked" in left_out[1]
    with pytest.raises(ValueError, match="is none of"):
        list(documents_below(__file__, left_out.append))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no"):
        list(documents_below(tmp_path / "empty", left_out.append))
    with pytest.raises(FileNotFoundError):
        list(documents_below(tmp_path / "nowhere", left_out.append))


def test_a_file_that_changes_or_is_too_large_is_left_out(tmp_path):
    folder = manuals(tmp_path / "manuals")
    large = folder / "large.txt"
    with open(large, "wb") as file:
        file.truncate(2 << 30)  # takes no room on the disk
    sources = {name: each for each in documents_below(folder, print) for name in [os.path.basename(each[1])]}
    with pytest.raises(ValueError, match=r"large\.txt has 2,147 MB, more than"):
        read_file(*sources["large.txt"])
    path, name, source = sources["garden.txt"]

    class Growing:
        path, member, size = source.path, None, 0

        def opened(self):
            with open(source.path, "ab") as more:
                more.write(b"more")
            return source.opened()

    with pytest.raises(ValueError, match=r"garden\.txt changed while it was read"):
        read_file(path, name, Growing())
    (folder / "garden.txt").unlink()
    with pytest.raises(ValueError, match=r"garden\.txt can't be read: No such file"):
        read_file(path, name, source)


def test_pieces_hold_whole_paragraphs_under_their_headings():
    found = [Block("one two", ("A",), "line 1"), Block("three four", ("A",), "line 3"), Block("five", ("B",), "line 5")]
    pieces = list(pieces_of(found, count, 10, 2))
    assert [(p.text, p.heading, p.place) for p in pieces] == [
        ("one two\n\nthree four", "A", "line 1"),
        ("five", "B", "line 5"),
    ]
    assert pieces[0].content == "A\none two\n\nthree four"
    assert len({piece.digest for piece in pieces}) == 2


def test_a_long_paragraph_is_divided_between_sentences_and_overlaps():
    text = "A b c. D e f g. H i. J k l m n."
    pieces = [piece.text for piece in pieces_of([Block(text)], count, 7, 2)]
    assert pieces == ["A b c. D e f g.", "H i. J k l m n."]
    pieces = [piece.text for piece in pieces_of([Block(text)], count, 6, 2)]
    assert pieces == ["A b c.", "D e f g. H i.", "J k l m n."]
    pieces = [piece.text for piece in pieces_of([Block("A b. C d. E f. G h.")], count, 5, 2)]
    assert pieces == ["A b. C d.", "C d. E f.", "E f. G h."]


@pytest.mark.parametrize("overlap", [0, 10])
def test_no_piece_is_longer_than_asked_and_no_word_is_lost(overlap):
    words = [f"w{i}" for i in range(500)]
    text = " ".join(word + ("." if i % 37 == 36 else "") for i, word in enumerate(words))
    texts = [Block(text[:900], ("h",), "1"), Block(text[900:], ("h",), "2"), Block("x" * 300, (), "3")]
    pieces = list(pieces_of(texts, lambda text: count(text) if "x" not in text else len(text), 20, overlap))
    assert all(count(piece.text) <= 20 for piece in pieces)
    joined = " ".join(piece.text for piece in pieces)
    for word in text[:900].split() + text[900:].split():
        assert word in joined
    repeated = sum(word.startswith("w") for word in joined.split()) - len(text[:900].split() + text[900:].split())
    assert (repeated > 0, joined.count("x") > 300) == (overlap > 0, overlap > 0)


def test_overlap_must_be_less_than_a_piece():
    with pytest.raises(ValueError, match="overlap must be less"):
        list(pieces_of([Block("a")], count, 5, 5))


def test_pdf_toys_are_read_by_others_too():
    import pypdf

    assert len(pypdf.PdfReader(io.BytesIO(pdf("a", "b"))).pages) == 2
