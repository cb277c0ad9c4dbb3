"""Which tokens of a record count in the loss, form by form."""

import pytest
from test_chat_template import CHATML, THINKING
from test_tokenizers_gguf import byte_level

from llmfast.chat.template import ChatTemplate
from llmfast.finetuning.conversations import (
    PLAIN_TEMPLATE,
    encode_chat,
    encode_completion,
    form_of,
    messages_of,
)
from llmfast.tokenizers import BPETokenizer
from llmfast.tokenizers.gguf import tokenizer_of

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say hi."},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "And bye, <|im_end|> too?"},
    {"role": "assistant", "content": "\nBye."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(byte_level("smollm") | {"tokenizer.chat_template": CHATML})


def shown(turns, tokenizer, marks="[]") -> str:
    """The text, with what counts in brackets."""
    text, before = "", False
    for token, counts in zip(turns.ids, turns.counts, strict=True):
        text += (marks[not counts] if counts != before else "") + tokenizer.decode([token])
        before = counts
    return text + (marks[1] if before else "")


def test_of_a_chat_what_the_assistant_says_counts_with_the_token_that_ends_its_turn(tokenizer):
    turns = encode_chat(ChatTemplate(CHATML, tokenizer), MESSAGES)
    assert shown(turns, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"
        "[Hi!<|im_end|>]\n<|im_start|>user\nAnd bye, <|im_end|> too?<|im_end|>\n<|im_start|>assistant\n"
        "[\nBye.<|im_end|>]\n"
    )


def test_a_prompt_has_the_tokens_that_the_model_is_given_when_it_answers(tokenizer):
    template = ChatTemplate(CHATML, tokenizer)
    turns = encode_chat(template, MESSAGES)
    for number, message in enumerate(MESSAGES):
        if message["role"] == "assistant":
            prompt = template.encode(MESSAGES[:number])
            assert (
                turns.ids[: len(prompt)] == prompt and turns.counts[len(prompt)] and not turns.counts[len(prompt) - 1]
            )


def test_what_a_message_spells_does_not_become_a_special_token(tokenizer):
    turns = encode_chat(ChatTemplate(CHATML, tokenizer), MESSAGES)
    assert turns.ids.count(tokenizer.special_tokens["<|im_end|>"]) == len(MESSAGES)


def test_an_earlier_turn_that_the_template_writes_otherwise_counts_as_it_is_written(tokenizer):
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>two twos</think>\nFour."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "<think>yes</think>\nYes."},
    ]
    turns = encode_chat(ChatTemplate(THINKING, tokenizer), messages)
    assert "[Four.<|im_end|>]" in shown(turns, tokenizer) and shown(turns, tokenizer).endswith("[Yes.<|im_end|>]\n")


def test_a_template_that_writes_a_chat_otherwise_when_it_is_answered_is_an_error(tokenizer):
    strange = "{{ messages | length }}" + CHATML  # no chat begins as a longer one does
    with pytest.raises(ValueError, match="writes what comes before the last answer otherwise"):
        encode_chat(ChatTemplate(strange, tokenizer), MESSAGES[1:3])


def test_the_plain_template_ends_the_assistants_turns_with_an_end_of_text():
    tokenizer = BPETokenizer.train(["### User Assistant hello there"], vocab_size=270)
    turns = encode_chat(ChatTemplate(PLAIN_TEMPLATE, tokenizer), MESSAGES[1:4] + MESSAGES[4:])
    assert shown(turns, tokenizer) == (
        "### User\nSay hi.\n\n### Assistant\n[Hi!<|endoftext|>]\n\n"
        "### User\nAnd bye, <|im_end|> too?\n\n### Assistant\n[Bye.<|endoftext|>]"
    )


def test_every_form_becomes_the_same_messages():
    wanted = [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}]
    assert messages_of({"messages": wanted}) == wanted
    turns = [{"from": "human", "value": "Add.\n\n1, 2"}, {"from": "gpt", "value": "3"}]
    assert messages_of({"conversations": turns}) == wanted
    assert messages_of({"instruction": "Add.", "input": "1, 2", "output": "3"}) == wanted
    assert messages_of({"instruction": "Add.", "input": "", "output": "3"})[0]["content"] == "Add."
    system = [{"role": "system", "content": "Be kind."}]
    assert messages_of({"messages": wanted}, system="Be kind.") == system + wanted
    assert messages_of({"messages": system + wanted}, system="Be rude.") == system + wanted
    assert messages_of({"messages": [*wanted, {"role": "user", "content": "and?"}]}) == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": "hello"}, "a chat must be a list"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "role must be one of"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the assistant says nothing"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "is empty"),
        ({"conversations": []}, "a list of at least one turn"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, 'must have a "from"'),
        ({"instruction": "x", "output": None}, "its output must be text, got None"),
        ({"instruction": 3, "output": "x"}, "its instruction must be text, got 3"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(fields, message):
    with pytest.raises(ValueError, match=message):
        messages_of(fields)


def test_of_a_prompt_and_its_completion_the_second_counts_to_its_end(tokenizer):
    turns = encode_completion(tokenizer, {"prompt": "One plus one is", "completion": " two."})
    assert shown(turns, tokenizer) == "One plus one is[ two.<|endoftext|>]"
    with pytest.raises(ValueError, match="completion is empty"):
        encode_completion(tokenizer, {"prompt": "One", "completion": ""})


def test_forms_are_told_by_their_fields():
    assert form_of({"messages": []}) == form_of({"instruction": "", "output": "", "more": 1}) == "chat"
    assert form_of({"prompt": "", "completion": ""}) == "completion"
    assert form_of({"text": ""}) == "text" and form_of({"label": "x"}) is None
