"""From files to examples: tasks, bad rows by their lines, and what is held out."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.chat.template import ChatTemplate
from llmfast.finetuning.configuration import DataSettings, FinetuningConfig
from llmfast.finetuning.conversations import PLAIN_TEMPLATE
from llmfast.finetuning.examples import WIDTH, Example, ExampleBatches, ExampleLoader, following, padded
from llmfast.finetuning.preparing import prepare, sides_of
from llmfast.finetuning.records import LONGEST_ROW, read_records
from llmfast.tokenizers import BPETokenizer
from llmfast.training.dataset import IGNORED


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(["### User ### Assistant the cat sat"], vocab_size=270)


def made(path, tokenizer, context=64, seed=0, **settings):
    template = ChatTemplate(PLAIN_TEMPLATE, tokenizer)
    return prepare(path, DataSettings(**settings), seed, context, tokenizer, template, tokenizer.end_of_text)


def written(path, content):
    path.write_text(content if isinstance(content, str) else "\n".join(map(json.dumps, content)), "utf-8")
    return path


TABLE = "label,text\n" + "".join(f"{'ab'[i % 2]},text {i}\n" for i in range(20))

# --- bad data: one clear line each --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.jsonl", "\n\n", "a.jsonl is empty"),
        ("a.txt", " ", "a.txt is empty"),
        ("a.csv", "label,text\n", "has a header and no rows"),
        ("a.csv", "label;text\nx;y\n", "its header has one column, 'label;text': is it separated otherwise?"),
        ("a.csv", "label,text\nx,y\nx,y,z\n", "line 3: it has 3 columns, and the header 2"),
        ("a.csv", "label,label\nx,y\n", "must name each column once"),
        ("a.csv", "id,score,price\n1,2,3\n", "a.csv has the fields id, score, price: say which is the text"),
        ("a.csv", "label,text\nspam,x\nspam,y\n", "every row has the label 'spam'"),
        ("a.csv", "label,text\nspam,x\nham,y\nSpam,z\n", r"'spam' \(line 2\) and 'Spam' \(line 4\) differ only"),
        ("a.csv", "label,text\nspam,x\nham,\n", "line 3: its text is empty"),
        ("a.csv", "label,text\nspam,x\n,y\nham,z\n", r"line 3: its label \(label\) is empty"),
        ("a.csv", "label,text\n" + "".join(f"{i},x\n" for i in range(9)), "has 9 different values in 9 rows"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1: it should be an object"),
        ("a.jsonl", '{"question": "x", "answer": "y"}\n', "line 1: it has the fields question, answer; a record needs"),
        ("a.jsonl", '{"prompt": "x", "completion": "y"}\n\n{"prompt": "x"}\n', "line 3: a record needs"),
        ("a.json", '{"text": "x"}', "should hold a list of records"),
        ("a.json", "[]", "holds no records"),
        ("a.jsonl", '{"text": "' + "x" * (2 << 20) + '"}\n', "line 1: it has 2,097,164 characters, and a row at most"),
        ("a.csv", "label,text\na," + "x" * (2 << 20) + "\n", "line 2: it has 2,097,154 characters, and a row at most"),
    ],
)
def test_bad_data_gets_one_clear_line(name, content, message, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        made(written(tmp_path / name, content), tokenizer)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_several_bad_rows_are_named_in_one_line(tokenizer, tmp_path):
    rows = [{"prompt": "x", "completion": "" if i in (1, 3, 4, 5, 6) else "y"} for i in range(9)]
    with pytest.raises(ValueError, match="line 2: its completion is empty; line 4: .*; line 5: .*; and 2 more$"):
        made(written(tmp_path / "a.jsonl", rows), tokenizer)


def test_what_can_not_be_read_is_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        made(tmp_path / "none.csv", tokenizer)
    with pytest.raises(ValueError, match="is a folder"):
        made(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="to classify takes .csv"):
        made(written(tmp_path / "a.txt", "hello"), tokenizer, task="classify")
    with pytest.raises(ValueError, match="validation and test must leave something"):
        FinetuningConfig().replace({"validation": 0.5, "test": 0.5})


# --- tables -------------------------------------------------------------------------------------------------------


def test_a_quotation_mark_is_a_character_of_tab_separated_rows(tmp_path):
    rows = read_records(written(tmp_path / "a.tsv", 'label\ttext\nham\tsay "hi\nspam\t"x\n'))
    assert [row.fields["text"] for row in rows] == ['say "hi', '"x'] and rows[1].place == "line 3"
    rows = read_records(written(tmp_path / "a.csv", 'label,text\nham,"two\nlines, here"\nspam,x\n'))
    assert rows[0].fields["text"] == "two\nlines, here" and [row.place for row in rows] == ["line 2", "line 4"]
    assert LONGEST_ROW < 2 << 20


def test_a_label_is_predicted_at_the_last_token_alone(tokenizer, tmp_path):
    examples = made(written(tmp_path / "a.csv", TABLE), tokenizer, validation=0.25, test=0.25)
    assert examples.task == "classify" and examples.labels == ("a", "b")
    assert [len(part) for part in examples.parts().values()] == [10, 5, 5]
    for example in [e for part in examples.parts().values() for e in part]:
        number = int(example.place.removeprefix("line ")) - 2
        assert example.ids.tolist() == [tokenizer.end_of_text, *tokenizer.encode(f"text {number}")]
        assert example.targets.tolist() == [IGNORED] * (len(example.ids) - 1) + [number % 2]


@pytest.mark.parametrize("header", ["Label,SMS", "category,whatever", "foo,text"])
def test_fields_are_found_by_their_names(header, tokenizer, tmp_path):
    path = written(tmp_path / "a.csv", TABLE.replace("label,text", header))
    assert made(path, tokenizer).labels == ("a", "b")


def test_fields_can_be_named(tokenizer, tmp_path):
    rows = [{"id": str(i), "said": f"text {i}", "kind": "xy"[i % 2], "label": "?"} for i in range(8)]
    path = written(tmp_path / "a.jsonl", rows)
    assert made(path, tokenizer, text_field="said", label_field="kind").labels == ("x", "y")
    with pytest.raises(ValueError, match="has no field 'sad', but id, said, kind, label"):
        made(path, tokenizer, text_field="sad", label_field="kind")


def test_what_is_too_long_is_cut_dropped_or_an_error(tokenizer, tmp_path):
    path = written(tmp_path / "a.csv", TABLE + "a," + "long " * 50 + "\n")
    cut = made(path, tokenizer, max_tokens=16, validation=0.0)
    assert max(len(e.ids) for e in cut.train) == 16 and len(cut.train) == 21
    assert all(e.targets[-1] != IGNORED for e in cut.train) and "line 22" in cut.notes[0]
    assert len(made(path, tokenizer, max_tokens=16, validation=0.0, too_long="drop").train) == 20
    with pytest.raises(ValueError, match=r"line 22: it has \d+ tokens, and max_tokens is 16"):
        made(path, tokenizer, max_tokens=16, too_long="error")
    rows = [{"prompt": "p" * 40, "completion": "c"}, *({"prompt": "p", "completion": "c" * i} for i in range(1, 9))]
    kept = made(written(tmp_path / "b.jsonl", rows), tokenizer, max_tokens=16, validation=0.0).train
    assert [e.place for e in kept] == [f"line {n}" for n in range(2, 10)]  # nothing of the first would count


# --- text ---------------------------------------------------------------------------------------------------------


def test_of_a_text_the_end_is_held_out_and_every_token_is_predicted_once(tokenizer, tmp_path):
    text = "".join(f"the cat sat {i}. " for i in range(60))
    examples = made(written(tmp_path / "a.txt", text), tokenizer, max_tokens=16, validation=0.1, test=0.1)
    ids = [tokenizer.end_of_text, *tokenizer.encode(text)]
    parts = list(examples.parts().values())
    predicted = [t for part in parts for e in part for t in e.targets.tolist()]
    assert predicted.count(IGNORED) == 0 and len(predicted) == len(ids) - len(parts)
    assert [sum(map(len, (e.ids for e in part))) + 1 for part in parts][1:] == [len(ids) // 10] * 2
    assert max(len(e.ids) for e in examples.train) == 16
    assert np.array_equal(examples.train[0].targets[:5], ids[1:6])


def test_a_text_that_is_too_short_to_learn_much_from_is_said_to_be(tokenizer, tmp_path):
    notes = [made(written(tmp_path / f"{n}.txt", "the cat sat. " * n), tokenizer).notes for n in (50, 5000)]
    assert len(notes[0]) == 1 and "tokens to train on" in notes[0][0] and not notes[1]


def test_of_several_documents_whole_ones_are_held_out(tokenizer, tmp_path):
    examples = made(written(tmp_path / "a.jsonl", [{"text": f"doc {i}"} for i in range(10)]), tokenizer, validation=0.3)
    assert examples.task == "text" and [len(part) for part in examples.parts().values()] == [7, 3, 0]
    assert all(e.targets[-1] == tokenizer.end_of_text for e in examples.train)


# --- what is held out ---------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40), st.integers(0, 5))
def test_a_group_is_on_one_side_and_the_shares_are_kept(groups, seed):
    sides = sides_of(groups, 0.2, 0.2, seed)
    assert sides == sides_of(groups, 0.2, 0.2, seed)
    for group in set(groups):
        assert len({s for s, g in zip(sides, groups, strict=True) if g == group}) == 1
    assert "train" in sides
    if len(set(groups)) == len(groups) > 4:
        assert sides.count("validation") == sides.count("test") == max(1, round(0.2 * len(groups)))


def test_rows_that_are_the_same_are_on_one_side(tokenizer, tmp_path):
    rows = [{"instruction": f"ask {i % 5}", "output": "x"} for i in range(50)]
    examples = made(written(tmp_path / "a.jsonl", rows), tokenizer, validation=0.2)
    sides = [{e.ids.tobytes() for e in part} for part in (examples.train, examples.validation)]
    assert not sides[0] & sides[1] and len(examples.validation) == 10


def test_rows_are_grouped_by_a_field(tokenizer, tmp_path):
    rows = [{"instruction": f"ask {i}", "output": "x", "who": f"person {i % 5}"} for i in range(50)]
    path = written(tmp_path / "a.jsonl", rows)
    examples = made(path, tokenizer, validation=0.2, group="who")
    who = {(int(e.place.removeprefix("line ")) - 1) % 5 for e in examples.validation}
    assert len(who) == 1 and len(examples.validation) == 10
    with pytest.raises(ValueError, match="no field 'whom' to group by; it has instruction, output, who"):
        made(path, tokenizer, group="whom")


# --- batches ------------------------------------------------------------------------------------------------------


def some(count):
    return [following(range(1, 3 + i % 7), [True] * (2 + i % 7), f"{i}") for i in range(count)]


@pytest.mark.parametrize("world", [1, 3])
def test_every_example_is_seen_once_an_epoch(world):
    examples = [Example(np.full(2 + i % 7, i + 1, np.int32), np.full(2 + i % 7, i + 1, np.int32)) for i in range(23)]
    loaders = [ExampleLoader(examples, 4, seed=1, rank=r, world_size=world) for r in range(world)]
    for epoch in range(2):
        seen = []
        for step in range(6 * epoch, 6 * epoch + 6):
            batches = [loader.batch(step) for loader in loaders]
            assert len({len(ids) for ids, _ in batches}) == 1
            for ids, targets in batches:
                seen += [int(row[0]) for row, t in zip(ids, targets, strict=True) if (t != IGNORED).any()]
        assert sorted(seen) == list(range(1, 24))
    one, other = (ExampleLoader(examples, 4, seed=s) for s in (1, 2))
    assert (
        one.batch(0)[0].tolist() != one.batch(6)[0].tolist() and one.batch(0)[0].tolist() != other.batch(0)[0].tolist()
    )


def test_widths_are_few_and_none_is_wider_than_the_longest():
    examples = [following(range(1, 3 + i % 37), [True] * (2 + i % 37)) for i in range(70)]
    loader, batches = ExampleLoader(examples, 5), ExampleBatches(examples, tokens=100)
    widths = [loader.batch(step)[0].shape[1] for step in range(loader.steps_per_epoch)]
    widths += [batches[index][0].shape[1] for index in range(len(batches))]
    assert max(widths) == 37 and {*widths} <= {*range(WIDTH, 37, WIDTH), 37} and len({*widths}) > 2
    assert sum(len(batch[0]) * batch[0].shape[1] for batch in map(loader.batch, range(14))) == loader.tokens_per_epoch()


def test_like_lengths_share_a_batch():
    loader = ExampleLoader(some(70), 10)
    widths = [set((targets != IGNORED).sum(1).tolist()) for _, targets in map(loader.batch, range(7))]
    assert all(len(width) == 1 for width in widths)


def test_evaluation_scores_every_example_once_in_an_order_that_it_knows():
    batches = ExampleBatches(some(20), padding=99, tokens=24)
    assert sorted(batches.order) == list(range(20))
    lengths = [int((row != IGNORED).sum()) for _, targets in batches for row in targets]
    assert lengths == [len(some(20)[i].ids) for i in batches.order]
    assert all(ids.numel() <= 24 for ids, _ in batches)
    ids, targets = padded(some(3), 99)
    assert ids.tolist() == [[1, 99, 99], [1, 2, 99], [1, 2, 3]] and targets[0].tolist() == [2, IGNORED, IGNORED]
