"""Finding, answering and shortening, measured: figures that are known by hand, and clear errors for bad files."""

import json

import pytest
from retrieval_toys import ToyEmbedder
from test_retrieval_answering import Echo, Talk

from llmfast.evaluation import answers, intervals, retrieval, summaries
from llmfast.evaluation.intervals import mean_of
from llmfast.evaluation.retrieval import Ranked, passages_of
from llmfast.evaluation.squad import exact, f1, read_squad
from llmfast.retrieval import answering
from llmfast.retrieval.pieces import sentences, statements

PARAGRAPHS = [
    "The tower was built in 1889. It is 330 metres tall. Mr. Eiffel built it.",
    "Bees make honey. They store it in wax.",
    "Rivers flow to the sea. The Danube flows through Vienna.",
]
ASKED = [
    ("When was the tower built?", 0, "1889"),
    ("How tall is the tower?", 0, "330 metres"),
    ("What do bees make?", 1, "honey"),
    ("Which river flows through Vienna?", 2, "The Danube"),
]


@pytest.fixture
def file(tmp_path):
    data = []
    for number, context in enumerate(PARAGRAPHS):
        asked = [(q, a) for q, p, a in ASKED if p == number]
        qas = [{"question": q, "answers": [{"text": a, "answer_start": context.index(a)}]} for q, a in asked]
        data.append({"paragraphs": [{"context": context, "qas": [*qas, {"question": "?", "answers": []}]}]})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": data}))
    return path


def test_squad_is_read(file):
    found = read_squad(file)
    assert found.paragraphs == PARAGRAPHS and found.articles == [0, 1, 2]
    assert [(q.text, q.paragraph, q.answers[0]) for q in found.questions] == ASKED
    assert PARAGRAPHS[0][found.questions[1].start :].startswith("330 metres")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"data": 3}', '{"data": []}', '{"data": [{"paragraphs": [{"qas": []}]}]}']
)
def test_what_is_not_squad_is_one_line(tmp_path, content):
    from test_cli import run

    path = tmp_path / "x.json"
    path.write_text(content)
    result = run("eval", "retrieval", str(path))
    assert result.code == 2 and "x.json" in result.stderr and len(result.stderr.splitlines()) == 1


def test_sentences_begin_where_they_stand():
    text = PARAGRAPHS[1] + ' "Who?" she said. Done'
    assert [sentence for _, sentence in sentences(text)] == [
        "Bees make honey.",
        "They store it in wax.",
        '"Who?" she said.',
        "Done",
    ]
    assert all(text[start:].startswith(sentence) for start, sentence in sentences(text))
    assert statements("Lights. Green: all is well. Red. Call for help at once! Thanks.") == [
        "Lights. Green: all is well.",
        "Red. Call for help at once! Thanks.",
    ]
    assert statements("Two words.") == ["Two words."] and statements(" ") == []
    assert sentences("A title\n \nand a line\nwith more.\n") == [(0, "A title"), (10, "and a line\nwith more.")]


def test_the_right_sentence_holds_the_answer(file):
    found = read_squad(file)
    texts, articles, right = passages_of(found, by_sentence=True)
    assert all(question.answers[0] in texts[number] for question, number in zip(found.questions, right, strict=True))
    assert len(texts) == len(articles) and articles[right[3]] == 2
    assert passages_of(found)[2] == [0, 0, 1, 2]


def test_answers_are_compared_as_squad_does():
    assert exact("The  Danube!", ("danube",)) == 1.0 and exact("Danube river", ("danube", "rhine")) == 0.0
    assert f1("the river Danube", ("Danube", "x")) == pytest.approx(2 / 3)
    assert f1("nothing", ("Danube",)) == 0.0 and f1("", ("the",)) == 1.0


def test_a_mean_has_an_interval():
    mean = mean_of([0.0, 1.0] * 50)
    assert mean.value == 0.5 and mean.count == 100
    assert mean.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02) and mean.high == pytest.approx(0.6, abs=0.02)
    assert mean == mean_of([0.0, 1.0] * 50) and str(mean).startswith("0.5000 (0.")
    assert mean_of([3.0, 3.0]) == intervals.Mean(3.0, 3.0, 3.0, 2)
    with pytest.raises(ValueError, match="no values"):
        mean_of([])


def test_ranks_give_recall_and_reciprocal_ranks():
    ranked = Ranked([1, 2, None, 11, 5])
    assert [ranked.recall(k).value for k in (1, 5, 20)] == [0.2, 0.6, 0.8]
    assert ranked.reciprocal().value == pytest.approx((1 + 1 / 2 + 1 / 5) / 5)


def test_passages_are_found_and_missed(file):
    found = read_squad(file)
    texts, articles, right = passages_of(found)
    result = retrieval.evaluate(ToyEmbedder(), [q.text for q in found.questions], texts, right, articles)
    assert result.rankings["words"].ranks == [1, 1, 1, 1] and result.rankings["both"].recall(1).value == 1.0
    assert all(a > b for a, b in zip(result.evidence, result.without_passage, strict=True))
    threshold, said = result.said_absent(result.without_article, 1.0)
    assert threshold == pytest.approx(min(result.evidence)) and said.value == 1.0


def test_answers_come_from_memory_from_the_index_and_from_the_paragraph(file, monkeypatch):
    monkeypatch.setattr(answering, "Conversation", Talk)

    class Copying(Echo):
        """Copies the answer from the prompt, if it is there."""

        def chat(self, messages, max_new_tokens, **settings):
            asked = messages[-1]["content"]
            return next((a for q, _, a in ASKED if q in asked and a in asked), "no idea")

    monkeypatch.setattr(
        Talk, "say", lambda self, text, *_, **__: iter([self.llm.chat([{"content": text}], 9)]), raising=True
    )
    result = answers.evaluate(Copying(), ToyEmbedder(), read_squad(file))
    assert {way: (a.exact.value, a.f1.value) for way, a in result.items()} == {
        "closed book": (0.0, 0.0),
        "retrieval": (1.0, 1.0),
        "right paragraph": (1.0, 1.0),
    }
    assert len(answers.evaluate(Copying(), ToyEmbedder(), read_squad(file), sample=2)["retrieval"].texts) == 2
    assert answers.sample_of([1, 2, 3, 4], 2) == sorted(answers.sample_of([1, 2, 3, 4], 2))


def test_summaries_are_scored_beside_the_first_lines(tmp_path):
    pytest.importorskip("rouge_score")
    path = tmp_path / "dialogues.jsonl"
    lines = [{"dialogue": "the cat sat\nb\nc\nnever seen", "summary": "the cat sat"}, {"text": "x", "summary": "y"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    examples = summaries.read_examples(path)
    assert summaries.first_turns(examples[0].text) == "the cat sat\nb\nc"
    found = summaries.evaluate(Echo("the cat sat"), examples)
    assert found["model"]["rouge2"].value == 0.5
    assert found["baseline"]["rouge1"].value == pytest.approx((2 * 3 / (3 + 5)) / 2)
    path.write_text('{"dialogue": "x"}')
    with pytest.raises(ValueError, match="line 1: needs a string"):
        summaries.read_examples(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no lines"):
        summaries.read_examples(path)


def test_the_commands_print_tables_and_json(file, monkeypatch, tmp_path):
    pytest.importorskip("rouge_score")
    from test_cli import run

    import llmfast

    monkeypatch.setattr(answering, "Conversation", Talk)
    monkeypatch.setattr(llmfast, "Embedder", lambda *_, **__: ToyEmbedder())
    echo = Echo("honey")
    echo.precision = "q8_0"
    monkeypatch.setattr(llmfast, "load", lambda *_, **__: echo)
    echo.chat = lambda *_, **__: "honey"
    facts = json.loads(run("eval", "retrieval", str(file), "--json").stdout)
    assert facts["rankings"]["words"]["R@1"]["value"] == 1.0 and facts["passages"] == 3
    by_sentence = run("eval", "retrieval", str(file), "--by-sentence").stdout
    assert "both" in by_sentence and "article not in the index: said so" in by_sentence
    ways = json.loads(run("eval", "qa", str(file), "--json").stdout)["ways"]
    assert ways["right paragraph"]["exact"]["value"] == 0.25
    assert "closed book" in run("eval", "qa", str(file), "--sample", "2").stdout
    dialogues = tmp_path / "d.jsonl"
    dialogues.write_text('{"dialogue": "bees make honey", "summary": "honey"}')
    echo.chat = lambda *_, **__: iter(["honey"])
    facts = json.loads(run("eval", "summaries", str(dialogues), "--json").stdout)
    assert facts["scores"]["model"]["rouge1"]["value"] == 1.0 and facts["model"] == "smollm2"
    assert "baseline" in run("eval", "summaries", str(dialogues)).stdout
