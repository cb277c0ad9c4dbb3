"""Questions answered from an index: the sources are those of the prompt, and what is not there is said to be not."""

import json

import pytest
from retrieval_toys import ToyEmbedder, manuals

pytest.importorskip("pypdf")
pytest.importorskip("bs4")
import llmfast
from llmfast.retrieval import Index, Questions, answering, ask, summarize
from llmfast.retrieval.answering import NOT_THERE, turn

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "


class Echo:
    """A chat model of 400 tokens, a word each, that answers every prompt alike; it keeps what it was asked."""

    class config:
        context = 400

    end_tokens = frozenset()

    def __init__(self, says: str = "ten seconds"):
        self.says, self.prompts, self.stops, self.chats = says, [], [], []
        self.chat_template = self

    # --- a tokenizer and a template ---

    def need_tokenizer(self):
        return self

    def encode(self, text, special=()):
        return list(range(len(text.split()))) if isinstance(text, str) else self.encode(text[-1]["content"])

    # --- a model ---

    def chat(self, messages, max_new_tokens, stream=True, **settings):
        self.chats.append((messages[-1]["content"], max_new_tokens, settings))
        says = self.says
        return iter(says if isinstance(says, list) else [says])


class Talk:
    """The place of a `Conversation`."""

    def __init__(self, llm):
        self.llm, self.said = llm, []

    def say(self, text, max_new_tokens, stop, **settings):
        self.llm.prompts.append(text)
        self.llm.stops.append(stop)
        return iter([self.llm.says])


@pytest.fixture
def index(tmp_path):
    made = Index(tmp_path / "index", ToyEmbedder())
    made.add(manuals(tmp_path / "manuals"))
    return made


@pytest.fixture
def echo(monkeypatch):
    monkeypatch.setattr(answering, "Conversation", Talk)
    return Echo()


def test_an_answer_names_the_sources_that_were_in_the_prompt(index, echo):
    answer = ask(echo, index, "For how many seconds do I hold the button on the back?")
    assert answer.text == "ten seconds" and answer.answered and answer.evidence >= 1.0
    assert answer.sources[0].found.name.endswith("router.md") and len(answer.sources) <= 3
    assert echo.prompts == [answer.prompt] and echo.stops == ["\n\n"]
    assert ask(echo, index, "button", stop=["."]).answered and echo.stops[-1] == ["."]
    for number, hit in enumerate(answer.sources, start=1):
        assert hit.text in answer.prompt and (len(answer.sources) == 1 or f"[{number}] " in answer.prompt)
    assert answer.prompt.endswith("Question: For how many seconds do I hold the button on the back?")


def test_what_the_documents_do_not_say_is_not_asked_of_the_model(index, echo):
    answer = ask(echo, index, "Who wrote the symphony of psalms?")
    assert answer.text == NOT_THERE and not answer.answered and answer.sources == [] and echo.prompts == []
    always = Questions(echo, index, threshold=0.0).ask("Who wrote the symphony of psalms?")
    assert "".join(always) == "ten seconds"
    nothing = Questions(echo, index, threshold=0.0, where={"kind": "docx"}).ask("button")
    assert "".join(nothing) == NOT_THERE


def test_a_follow_up_is_understood_by_the_question_before_it(index, echo):
    about = Questions(echo, index)
    assert not about.ask("For how long?").answered
    list(about.ask("Do I hold the button on the back for seconds?"))
    follow_up = about.ask("For how long?")
    assert follow_up.answered and follow_up.sources[0].found.name.endswith("router.md")
    assert not about.ask("Who wrote the symphony of psalms in Salzburg and Vienna long ago, perhaps?").answered


def test_sources_are_as_many_as_fit(index, echo, monkeypatch):
    monkeypatch.setattr(answering, "RELEVANT", 0.0)
    many = Questions(echo, index, sources=4, threshold=0.0)
    assert len(many.ask("train button water oven", max_new_tokens=5).sources) == 4
    echo.config = type("config", (), {"context": 60})
    few = Questions(echo, index, sources=4, threshold=0.0)
    assert 1 <= len(few.ask("train button water oven", max_new_tokens=5).sources) < 4
    with pytest.raises(ValueError, match="sources must be at least 1"):
        Questions(echo, index, sources=0)


def test_what_is_much_farther_from_the_question_is_no_source(index, echo):
    answer = Questions(echo, index).ask("Does the night train to Vienna leave at nine?")
    assert [hit.found.kind for hit in answer.sources] == ["html"] and len(answer.hits) == 5
    assert [hit.quote for hit in answer.sources] == ["The night train to Vienna leaves at nine."]
    assert Questions(echo, index).ask("Who wrote the symphony of psalms?").sources == []


def test_one_source_has_no_number():
    assert turn(["a"], "b?") == "a\n\nQuestion: b?"
    assert turn(["a", "c"], "b?") == "[1] a\n\n[2] c\n\nQuestion: b?"


def test_a_short_text_is_summarised_at_once():
    echo = Echo("short")
    assert summarize(echo, "one two three", max_new_tokens=7, seed=1) == "short"
    assert echo.chats == [
        ("Summarize the following text in one to three sentences.\n\none two three", 7, {"temperature": 0.0, "seed": 1})
    ]


def test_a_long_text_is_summarised_in_parts_and_then_the_summaries():
    echo, seen = Echo("a summary"), []
    text = "\n\n".join(f"p{i} " + "word " * 18 for i in range(12))
    summary = summarize(echo, text, 10, 100, lambda *stage: seen.append(stage))
    assert summary == "a summary" and len(echo.chats) == len(seen) + 1 >= 4
    assert seen[0] == ("parts of the text", 0, len(seen))
    assert all(f"p{i} " in "".join(part for part, *_ in echo.chats[:-1]) for i in range(12))
    assert echo.chats[-1][0].endswith("\n\n".join(["a summary"] * len(seen)))


def test_summaries_that_do_not_shorten_end():
    with pytest.raises(ValueError, match="no shorter"):
        summarize(Echo("word " * 120), "one two three four five " * 40, 10, 100)
    with pytest.raises(ValueError, match="no text"):
        summarize(Echo(), " \n")


def test_the_commands(index, tmp_path, monkeypatch):
    from test_cli import run

    monkeypatch.setattr(answering, "Conversation", Talk)
    loaded: list[dict] = []
    monkeypatch.setattr(llmfast, "load", lambda *_, **settings: loaded.append(settings) or Echo())
    monkeypatch.setattr("llmfast.retrieval.index.Embedder", lambda *_: ToyEmbedder())
    place = str(tmp_path / "index")
    result = run("ask", "For how many seconds do I hold the button on the back?", "--index", place, "--show-context")
    assert result.code == 0, result.stderr
    assert result.stdout.splitlines()[0] == "ten seconds" and "  [1] " in result.stdout and "router.md" in result.stdout
    assert "[evidence " in result.stderr and "Hold the button" in result.stderr
    assert run("ask", "Clean the oven?", "--index", place, "--adapter", "mine").code == 0
    assert [settings["adapter"] for settings in loaded] == [None, "mine"]
    record = json.loads(run("ask", "Who wrote the symphony?", "--index", place, "--json").stdout)
    assert record["answer"] == NOT_THERE and not record["answered"] and record["sources"] == []
    pdf_only = run("ask", "Clean the oven?", "--index", place, "--where", "kind=pdf", "--json")
    assert {source["name"].rpartition("/")[2] for source in json.loads(pdf_only.stdout)["sources"]} <= {
        "oven.pdf, page 1",
        "oven.pdf, page 3",
    }
    for arguments, said in [
        (["ask", "x", "--index", "nowhere"], "there is no index at nowhere"),
        (["ask", " ", "--index", place], "the query is empty"),
        (["summarize", "nowhere.txt"], "no file nowhere.txt"),
        (["summarize", __file__], "is none of .txt"),
    ]:
        result = run(*arguments)
        assert result.code == 2 and said in result.stderr and len(result.stderr.splitlines()) == 1
    page = tmp_path / "manuals" / "trains.html"
    assert run("summarize", str(page)).stdout == "ten seconds\n"
    assert json.loads(run("summarize", str(page), "--json").stdout)["summary"] == "ten seconds"


def test_a_real_model_answers_from_its_sources(index, smollm2):
    llm = llmfast.load(smollm2)
    answer = ask(llm, index, "How long do I hold the button on the back?", max_new_tokens=20)
    assert "ten seconds" in answer.text and answer.sources[0].quote.startswith("Hold the button"), answer.text
    about = Questions(llm, index)
    assert "".join(about.ask("When does the night train to Vienna leave?", 20, temperature=0))
    list(about.ask("And how much are bicycles on the train?", 20, temperature=0))
    said = [message["content"] for message in about.conversation.messages]
    assert "night train" in said[-4] and "Bicycles travel free" in said[-2]
    assert summarize(llm, "The cat sat on the mat. " * 10, max_new_tokens=20)
