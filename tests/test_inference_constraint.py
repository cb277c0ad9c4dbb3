"""Text of a form: whatever the model, it is valid by its schema, its regular expression, its grammar."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from conftest import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_conversation import messages, talker, talker_directory  # noqa: F401, fixtures

import llmfast
from llmfast.backends import cpp
from llmfast.inference.constraint import Constraint, Vocabulary, grammar_of
from llmfast.inference.decoders import NativeDecoder
from llmfast.tokenizers import BPETokenizer

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")
pytestmark = pytest.mark.usefixtures("one_thread")
NATIVE = cpp.why_not("linear", torch.device("cpu"), torch.float32) is None

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> llmfast.LLM:
    """A random model of bytes, which by itself says nothing that has a form."""
    tokenizer = BPETokenizer.train(['{"name": "a", "age": 12} true false null'] * 3, vocab_size=290)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tiny_config(vocab_size=tokenizer.vocab_size + 5, n_positions=64, n_embd=32, n_head=2)
        return llmfast.LLM(llmfast.GPT(config), tokenizer)


@pytest.fixture(scope="module")
def native(llm) -> llmfast.LLM:
    if not NATIVE:
        pytest.skip("no C++ kernels")
    packed = llmfast.inference.decoders.NativeModel(llm.config, llm.model.state_dict().items(), "fp32")
    return llmfast.LLM(llm.model, llm.tokenizer, native=packed)


def made(llm: llmfast.LLM, **form) -> str:
    """What the model adds to a prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # these texts outgrow the context
        return "".join(llm.stream("x", **{"max_new_tokens": 900, "temperature": 1.0} | form))


SIMPLE = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.tuples(st.integers(-99, 99), st.integers(0, 99)).map(
        lambda span: {"type": "integer", "minimum": span[0], "maximum": sum(span)}
    ),
    st.integers(0, 6).map(lambda longest: {"type": "string", "maxLength": longest}),
    st.lists(st.text(max_size=4) | st.integers(-9, 9), min_size=1, max_size=3).map(lambda some: {"enum": some}),
    st.text(max_size=6).map(lambda value: {"const": value}),
)  # fmt: skip


def larger(schemas):
    names = st.dictionaries(st.text(min_size=1, max_size=4), schemas, max_size=3)
    return st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, schemas, st.integers(0, 3)),
        names.map(
            lambda parts: {
                "type": "object",
                "properties": parts,
                "required": [*parts][:2],
                "additionalProperties": False,
            }  # fmt: skip
        ),
        st.lists(schemas, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
    )


@settings(max_examples=40)
@given(schema=st.recursive(SIMPLE, larger, max_leaves=5), seed=st.integers(0, 99))
def test_json_is_valid_by_its_schema(native, schema, seed):
    jsonschema.validate(json.loads(made(native, json_schema=schema, seed=seed)), schema)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}, {"speculate": 4}]
)
def test_whatever_the_settings(native, settings):
    jsonschema.validate(json.loads(made(native, json_schema=PERSON, seed=1, **settings)), PERSON)


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}, {"repetition_penalty": 1.5}])
def test_on_other_backends_too(llm, settings):
    with llmfast.use_backend("pytorch"):
        jsonschema.validate(json.loads(made(llm, json_schema=json.dumps(PERSON), seed=1, **settings)), PERSON)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": 0.5}, {"top_k": 3}, {"repetition_penalty": 1.5}]
)
def test_the_native_sampler_chooses_what_torch_does(native, settings):
    """The mask is applied in C++, and tokens that have to come are not asked for: the same text, token by token."""
    settings = {"max_new_tokens": 60, "seed": 3, "json_schema": PERSON} | settings
    text = made(native, **settings)
    with llmfast.use_backend("pytorch"):
        assert made(native, **settings) == text


def test_a_batch(native):
    texts = native.generate(["x", "yy z"], json_schema=PERSON, seed=1, max_new_tokens=50, num_return_sequences=2)
    for prompt, made_of in zip(["x", "yy z"], texts, strict=True):
        for text in made_of:
            assert text.startswith(prompt)
            jsonschema.validate(json.loads(text.removeprefix(prompt)), PERSON)


@pytest.mark.parametrize("pattern", ["[a-c]{3,5}", "(yes|no)!", r"\d{1,3}(\.\d)?", "☃+[ab]"])
def test_a_regular_expression(native, pattern):
    assert re.fullmatch(pattern, made(native, regex=pattern, seed=2, max_new_tokens=60))


def test_a_grammar(native):
    form = 'start: "sum " term ("+" term){1,3} ";"\nterm: /[0-9]{1,2}/'
    assert re.fullmatch(r"sum \d+(\+\d+){1,3};", made(native, grammar=form, seed=2))


def test_a_model_that_names_no_end(native):
    tokenizer = BPETokenizer(native.tokenizer.vocab, native.tokenizer.merges, {})
    endless = llmfast.LLM(native.model, tokenizer)
    assert re.fullmatch("[ab]{2,4}", made(endless, regex="[ab]{2,4}", seed=1, max_new_tokens=9)[:4]) is not None
    assert json.loads(made(endless, json_schema=PERSON))["age"] >= 0


def test_a_pydantic_model(native):
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", age=(int, pydantic.Field(ge=0, le=9)))
    assert person.model_validate_json(made(native, json_schema=person)).age <= 9


def test_a_chat(talker):  # noqa: F811
    reply = talker.chat(messages("hello"), json_schema=PERSON, temperature=1.0, seed=1)
    jsonschema.validate(json.loads(reply), PERSON)
    talk = llmfast.chat.Conversation(talker)
    assert "".join(talk.say("hello", regex="(A|B) ☃")) in ("A ☃", "B ☃")


@pytest.mark.skipif(not NATIVE, reason="the native decoder takes several tokens in a step")
def test_what_has_to_come_is_one_step(native, monkeypatch):
    """ "abcdefgh" has no choice after its first token: all of it goes through the weights at once, and no mask is asked
    for."""
    steps, block = [], NativeDecoder.step_block
    masks, mask = [], Constraint.mask
    monkeypatch.setattr(Constraint, "mask", lambda constraint: masks.append(1) or mask(constraint))

    def counting(decoder, tokens):
        steps.append(len(tokens))
        return block(decoder, tokens)

    monkeypatch.setattr(NativeDecoder, "step_block", counting)
    assert made(native, regex="abcdefgh[xy]") in ("abcdefghx", "abcdefghy")
    assert len(steps) == 1 and steps[0] > 5
    assert len(masks) == 2  # for the first token and the last


def test_free_text_is_what_it_was(native):
    assert native.generate("x", seed=4, max_new_tokens=20) == native.generate("x", seed=4, max_new_tokens=20)
    free = made(native, seed=4, max_new_tokens=20)
    made(native, json_schema=PERSON)
    assert made(native, seed=4, max_new_tokens=20) == free


@pytest.mark.parametrize(
    "form, message",
    [
        ({"json_schema": {"type": "cat"}}, "the text can't have this form"),
        ({"json_schema": "{"}, "json_schema is not a JSON schema"),
        ({"json_schema": 3}, "json_schema is not a JSON schema: it should be"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is not a JSON schema"),
        ({"regex": "("}, "the text can't have this form"),
        ({"regex": 3}, "regex must be a string"),
        ({"grammar": "start: nothing"}, "the text can't have this form"),
        ({"regex": "a", "grammar": "b"}, "give one of"),
    ],
)
def test_a_form_that_is_none(native, form, message):
    with pytest.raises(ValueError, match=message) as caught:
        native.stream("x", **form)
    assert "\n" not in str(caught.value)


def test_ids_have_no_form(native):
    with pytest.raises(ValueError, match="stop strings need a text prompt, not token ids, and so do forms"):
        native.generate(torch.tensor([1, 2]), regex="a")


def test_without_the_library(native, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"needs the package llguidance: pip install"):
        native.generate("x", regex="a")


def test_tokens_that_may_come():
    tokenizer = BPETokenizer.train([], 257)
    vocabulary = Vocabulary(tokenizer, tokenizer.end_tokens)
    constraint = Constraint(vocabulary, grammar_of(regex="ab?"))
    assert constraint.allowed().nonzero().flatten().tolist() == tokenizer.encode("a")
    assert constraint.forced() == tokenizer.encode("a")
    constraint.accept(tokenizer.encode("a")[0])
    assert {*constraint.allowed().nonzero().flatten().tolist()} == {*tokenizer.encode("b"), tokenizer.end_of_text}
    assert not constraint.complete
    constraint.accept(tokenizer.encode("b")[0])
    assert constraint.complete and constraint.forced() == []
    assert constraint.allowed().nonzero().flatten().tolist() == [tokenizer.end_of_text]
