"""An index: found by words, by meaning and by both, kept up to date, filtered, and usable after any kill."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from math import log
from pathlib import Path

import pytest
import torch
from retrieval_toys import TEXTS, ToyEmbedder, manuals

pytest.importorskip("pypdf")
pytest.importorskip("bs4")
from llmfast.files import locked
from llmfast.retrieval import Index, index, sqlite_store
from llmfast.retrieval.store import shares, words_of

TESTS = Path(__file__).parent


@pytest.fixture
def made(tmp_path):
    folder = manuals(tmp_path / "manuals")
    found = Index(tmp_path / "index", ToyEmbedder())
    found.add(folder)
    return found, folder


def names(hits) -> list[str]:
    return [hit.found.name.rpartition("/")[2] for hit in hits]


@pytest.mark.parametrize("by", ["both", "vectors", "words"])
def test_what_is_asked_for_is_found_first(made, by):
    found, _ = made
    assert names(found.search("Which button do I hold?", by=by))[0] == "router.md"
    assert names(found.search("the night train to Vienna", by=by))[0] == "trains.html"
    best = found.search("cleaning the oven when cold", by=by)[0]
    assert best.found.place == "page 1" and "Clean the oven" in best.text and best.found.kind == "pdf"
    assert (best.similarity is None) == (by == "words") and (best.matching is None) == (by == "vectors")
    assert len(found.search("the", count=2, by=by)) <= 2


def test_a_hit_names_its_place(made):
    found, folder = made
    assert found.search("button")[0].name == f"{folder}/router.md, Router › Reset, line 7"


def test_filters_keep_to_documents(made, tmp_path):
    found, _ = made
    other = tmp_path / "other.txt"
    other.write_text("A train set for the garden.")
    found.add(other, metadata={"team": "toys"})
    for where, expected in [
        ({"kind": "html"}, {"trains.html"}),
        ({"kind": ".HTML"}, {"trains.html"}),
        ({"name": "*/garden.*"}, {"garden.txt"}),
        ({"team": "toys"}, {"other.txt"}),
        ({"team": "toys", "kind": "txt"}, {"other.txt"}),
        ({"team": "none"}, set()),
    ]:
        for by in ("both", "vectors", "words"):
            hits = found.search("train garden water", 9, where, by)
            assert set(names(hits)) <= expected and (by != "vectors" or set(names(hits)) == expected)
    assert found.documents[str(other)].metadata == {"team": "toys"}


def test_again_only_what_has_changed_is_embedded(made):
    found, folder = made
    toy = found.embedder
    before = len(toy.embedded)
    report = found.add(folder)
    assert (report.unchanged, report.added, report.changed, report.pieces) == (4, 0, 0, 0)
    assert len(toy.embedded) == before
    (folder / "router.md").write_text(TEXTS["router.md"].replace("ten", "twenty"))
    (folder / "garden.txt").unlink()
    (folder / "new.txt").write_text("Bees make honey.")
    report = found.add(folder)
    assert (report.unchanged, report.added, report.changed, report.removed, report.pieces) == (2, 1, 1, 1, 2)
    assert "twenty" in found.search("button")[0].text and "ten seconds" not in str(found.search("ten seconds"))
    assert names(found.search("honey"))[0] == "new.txt" and "garden.txt" not in names(found.search("roses sun", 9))
    assert not found.search("roses", by="words")


def test_the_same_text_is_kept_once_and_goes_with_its_last_document(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("The same text.")
    found = Index(tmp_path / "index", ToyEmbedder())
    assert found.add(folder).pieces == 1 and len(found) == 1 and len(found.documents) == 2
    assert names(found.search("same", where={"name": "*b.txt"})) == ["b.txt"]
    (folder / "a.txt").unlink()
    found.add(folder)
    assert names(found.search("same")) == ["b.txt"]
    found.remove(folder / "b.txt")
    assert len(found) == 0 and found.search("same") == []
    with pytest.raises(ValueError, match="holds nothing of"):
        found.remove(folder / "b.txt")


def test_what_can_not_be_read_is_told_and_the_rest_is_there(tmp_path):
    folder = manuals(tmp_path / "manuals")
    (folder / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (folder / "blank.md").write_text("\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    told: list[str] = []
    found = Index(tmp_path / "index", ToyEmbedder())
    report = found.add(empty, folder, left_out=told.append)
    assert report.added == 4 and report.left_out == told and len(told) == 3
    assert all("\n" not in line for line in told)
    assert found.add(folder, encoding="latin-1").added == 1
    with pytest.raises(FileNotFoundError, match="nowhere"):
        found.add(folder, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="empty holds no"):
        Index(tmp_path / "second", ToyEmbedder()).add(empty)


def test_it_is_opened_again_as_it_was_made(made, tmp_path):
    found, _ = made
    found.close()
    again = Index.open(tmp_path / "index", ToyEmbedder())
    assert names(again.search("button"))[0] == "router.md" and len(again.documents) == 4
    with pytest.raises(ValueError, match="made with tokens 250, not 100"):
        Index(tmp_path / "index", ToyEmbedder(), tokens=100)
    with pytest.raises(ValueError, match="made with embedder toy, not minilm"):
        Index(tmp_path / "index", "minilm")
    with pytest.raises(FileNotFoundError, match="no index at"):
        Index.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is there already, and is no index"):
        Index(tmp_path / "manuals", ToyEmbedder())
    with pytest.raises(ValueError, match="pieces must have 8 to 256"):
        Index(tmp_path / "x", ToyEmbedder(), tokens=400)
    assert not (tmp_path / "x").exists()


def test_a_damaged_index_is_one_line(made, tmp_path):
    made[0].close()
    file = tmp_path / "index" / "index.sqlite"
    file.write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="is damaged or no index"):
        Index.open(tmp_path / "index")


def test_vectors_that_are_missing_are_noticed(made, tmp_path):
    made[0].close()
    os.truncate(tmp_path / "index" / "vectors.0", 64)
    with pytest.raises(ValueError, match="too short"):
        Index(tmp_path / "index", ToyEmbedder()).search("button")


def test_one_process_changes_it_at_a_time(made, tmp_path):
    found, folder = made
    with locked(tmp_path / "index" / "lock"), pytest.raises(ValueError, match="is being changed by process"):
        found.add(folder)


def test_a_search_goes_on_in_what_another_connection_changes(made, tmp_path):
    found, folder = made
    other = Index(tmp_path / "index", ToyEmbedder())
    assert names(other.search("button"))[0] == "router.md"
    (folder / "bees.txt").write_text("Bees make honey.")
    found.add(folder)
    assert names(other.search("honey"))[0] == "bees.txt"


def test_empty_rows_are_given_back(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    found = Index(tmp_path / "index", ToyEmbedder(), tokens=8)
    (folder / "a.txt").write_text("\n\n".join(f"w{i} a b c d e f g" for i in range(1500)))
    (folder / "b.txt").write_text("The bees make honey.")
    found.add(folder)
    assert (tmp_path / "index" / "vectors.0").stat().st_size == len(found) * 64 * 4 and len(found) > 1500
    (folder / "a.txt").write_text("Short now.")
    found.add(folder)
    found.add(folder)
    assert [file.name for file in (tmp_path / "index").glob("vectors.*")] == ["vectors.1"]
    assert (tmp_path / "index" / "vectors.1").stat().st_size == 2 * 64 * 4
    for by in ("vectors", "words"):
        assert names(found.search("honey", by=by))[0] == "b.txt"
        assert names(found.search("short now", by=by))[0] == "a.txt"


def test_a_piece_about_many_things_is_as_near_as_its_nearest_sentence(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "much.txt").write_text("Cats like milk and fish. Owls hunt mice at night. Bees make honey from flowers.")
    (folder / "little.txt").write_text("Owls are birds.")
    found = index.Index(tmp_path / "made", ToyEmbedder())
    found.add(folder)
    query = "hunt mice at night"
    hits = found.search(query)
    far, near = (dict(zip(names(some), some, strict=True)) for some in (hits, found.look_closer(query, hits)))
    much, before = near["much.txt"], far["much.txt"]
    sentence = "Owls hunt mice at night."
    vectors = ToyEmbedder().embed([sentence, query])
    assert much.quote == sentence and before.quote == ""
    assert (
        much.similarity == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)
        and much.similarity > before.similarity
    )
    assert much.score == much.evidence == pytest.approx(much.similarity + before.share)
    assert near["little.txt"].similarity == pytest.approx(far["little.txt"].similarity)  # it is one sentence
    backwards = sorted(far.values(), key=lambda hit: hit.score)
    assert [hit.quote for hit in found.look_closer(query, backwards)] == [sentence, "Owls are birds."]
    assert found.look_closer(query, []) == []


def test_both_rankings_are_ordered_by_their_evidence(made):
    found, _ = made
    hits = found.search("the night train to Vienna", 9)
    assert [hit.score for hit in hits] == sorted((hit.evidence for hit in hits), reverse=True)
    assert index.evidence(0.5, 7.0, 0.25) == 0.75 and index.evidence(None, None, 0.5) == 0.5
    assert index.evidence(-0.5, None, 0.25) == 0.25


def test_the_share_of_words_weighs_rare_ones_more(made):
    found, _ = made
    hits = {hit.found.name.rpartition("/")[2]: hit for hit in found.search("roses want the sun", 9)}
    assert hits["garden.txt"].share == 1.0 and hits["trains.html"].share == 0.0
    assert hits["garden.txt"].evidence == 1.0 + hits["garden.txt"].similarity
    rare, common, unknown = log(109.5 / 1.5), log(106.5 / 4.5), log(110.5 / 0.5)
    whole = rare + common + unknown
    expected = {7: (rare + common) / whole, 8: common / whole}
    assert shares([(1, {7}), (4, {7, 8}), (0, set())], 10, [7, 8]) == pytest.approx(expected)
    assert shares([], 10, [7]) == {7: 0.0}


def test_questions_lose_their_common_words_unless_there_are_no_others():
    assert words_of("What is the capital of France, and of France?") == ["capital", "france"]
    assert words_of("To be or not to be") == ["to", "be", "or", "not"]
    assert words_of('"; drop') == ["drop"] and words_of("?!") == []


def test_in_a_large_index_words_that_all_pieces_have_are_left_out(made, monkeypatch):
    found, _ = made
    monkeypatch.setattr(sqlite_store, "LARGE", 2)
    monkeypatch.setattr(sqlite_store, "RARE", 0.3)
    assert found.store._rare("roses want the cold sun") == ["roses", "want", "cold", "sun"]
    monkeypatch.setattr(sqlite_store, "RARE", 0.1)
    assert found.store._rare("roses want") == [] and found.search("roses want", by="words") == []
    assert names(found.search("roses want the sun"))[0] == "garden.txt"


def test_in_a_large_index_the_nearest_are_the_nearest_still(made, monkeypatch):
    found, _ = made
    store = found.store
    generator = torch.Generator().manual_seed(4)
    rows = torch.nn.functional.normalize(torch.randn(3000, 64, generator=generator), dim=1)
    vector = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    expected = (rows @ vector).topk(10)
    store._rows = (0, rows)
    best = store._nearest_by_rounded(rows, vector, 10, None)
    assert [piece for piece, _ in best] == expected.indices.tolist()
    assert [product for _, product in best] == pytest.approx(expected.values.tolist(), abs=1e-6)
    among = torch.arange(0, 3000, 7)
    chosen = store._nearest_by_rounded(rows, vector, 10, among)
    assert [p for p, _ in chosen] == (among[(rows[among] @ vector).topk(10).indices]).tolist()
    alike = rows[:1] + 1e-5 * rows  # too near to one another to be told apart in bfloat16
    store._rows = (1, alike)
    assert store._nearest_by_rounded(alike, vector, 10, None) is None
    monkeypatch.setattr(sqlite_store, "LARGE", 2)
    store._rows = None
    assert names(found.search("Which button do I hold?", by="vectors"))[0] == "router.md"


@pytest.mark.parametrize("query", ["", "  ", '"', "NEAR(", "a AND", "*", "ünïcödé 日本"])
def test_any_query_is_a_query(made, query):
    found, _ = made
    if query.strip():
        found.search(query)
    else:
        with pytest.raises(ValueError, match="the query is empty"):
            found.search(query)
    with pytest.raises(ValueError, match="by must be"):
        found.search("x", by="magic")


KILLED = """
import sys
sys.path.insert(0, sys.argv[3])
from retrieval_toys import ToyEmbedder
from llmfast.retrieval import Index, index
index.PIECES_AT_ONCE = 3
Index(sys.argv[1], ToyEmbedder()).add(sys.argv[2])
print("done")
"""


def sound(folder: Path) -> int:
    """Checks that an index is whole, and gives the number of its documents."""
    if not (folder / "index.sqlite").exists():
        return 0
    database = sqlite3.connect(folder / "index.sqlite")
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.execute("insert into words (words, rank) values ('integrity-check', 1)")
    database.rollback()
    toy = ToyEmbedder()
    store = Index(folder, toy).store
    rows = store._vectors()
    for piece, content in database.execute("select id, content from pieces"):
        torch.testing.assert_close(rows[piece], toy._vector(content))
    count = database.execute("select count(*) from documents").fetchone()[0]
    whole = "select count(distinct document) from occurrences"
    assert database.execute(whole).fetchone()[0] == count
    database.close()
    return count


def test_killed_at_any_moment_it_is_usable_and_goes_on(tmp_path):
    folder, place = tmp_path / "texts", tmp_path / "index"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:03}.txt").write_text(f"Number {i} is odd.\n\n" + "Filling words here. " * 40 + f"word{i}")
    command = [sys.executable, "-c", KILLED, str(place), str(folder), str(TESTS)]
    start = time.perf_counter()
    reference = subprocess.run([*command[:3], str(tmp_path / "whole"), *command[4:]], capture_output=True, text=True)
    took = time.perf_counter() - start
    assert reference.stdout == "done\n", reference.stderr
    generator, seen = random.Random(3), []
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        writes = place / "vectors.0"  # from its first writes on
        size, began = writes.stat().st_size if writes.exists() else 0, time.perf_counter()
        while process.poll() is None and time.perf_counter() - began < 2 * took + 10:
            if writes.exists() and writes.stat().st_size != size:
                break
            time.sleep(0.002)
        time.sleep(generator.random() * 0.15)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(sound(place))
    assert seen == sorted(seen) and seen[0] < 60
    assert subprocess.run(command, capture_output=True, text=True).stdout == "done\n"
    assert sound(place) == 60
    found = Index(place, ToyEmbedder())
    assert names(found.search("word37"))[0] == "037.txt"


def test_the_command_says_what_it_did(tmp_path, monkeypatch):
    from test_cli import run

    monkeypatch.setattr(index, "Embedder", lambda *_: ToyEmbedder())
    folder, place = manuals(tmp_path / "manuals"), str(tmp_path / "index")
    (folder / "scan.pdf").write_bytes(b"%PDF-1.4")
    result = run("index", str(folder), "-o", place, "--set", "team=home")
    assert result.code == 0 and "4 added, 1 left out; 4 documents in" in result.stdout, result.stderr
    assert "left out: " in result.stderr and "scan.pdf can't be read as PDF" in result.stderr
    listed = json.loads(run("index", "-o", place, "--json").stdout)
    assert len(listed["documents"]) == 4 and listed["documents"][0]["metadata"] == {"team": "home"}
    assert str(folder / "garden.txt") in run("index", "-o", place).stdout
    assert "removed 1 documents" in run("index", str(folder / "garden.txt"), "-o", place, "--remove").stdout
    assert json.loads(run("index", str(folder), "-o", place, "--set", "team=home", "--json").stdout)["added"] == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere", "-o", "x"], "no file or folder nowhere"),
        (["-o", "x"], "there is no index at x"),
        ([".", "-o", "x", "--set", "a"], "'a' should be KEY=VALUE"),
        ([".", "-o", "x", "--tokens", "3"], "pieces must have 8 to 256"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, arguments, said):
    from test_cli import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(index, "Embedder", lambda *_: ToyEmbedder())
    result = run("index", *arguments)
    assert result.code == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
