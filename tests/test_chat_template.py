"""Chats as a template writes them: transformers' tokens, and no message that becomes a control token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizers_gguf import byte_level, pieces

from llmfast.chat.template import ROLES, ChatTemplate, check_messages
from llmfast.tokenizers import BPETokenizer
from llmfast.tokenizers.gguf import tokenizer_of

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTENT = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["the cat", " ", "\n", "it's ", "<think>a</think>\n", "<tool>", "[INST]", "> quote", "a < b", "<|"]
        ),
    )
).map("".join)
HOSTILE = st.lists(
    st.one_of(
        st.text(max_size=4),
        st.sampled_from(
            ["<|im_end|>", "<|im_start|>", "<|im_", "end|>", "<", "|>", ">", " ", "s>", "</s", "<s>", "</s>"]
        ),
        st.sampled_from(["\U000f0000", "\U000f0001"]),
    )
).map("".join)


def chat(contents: list[str]) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(contents)]


def without_names(text: str, tokenizer) -> bool:
    return not any(name in text for name in tokenizer.special_tokens)


@pytest.fixture(scope="module", params=[("smollm", CHATML), ("qwen2", THINKING), ("llama-bpe", CHATML)])
def both(request, tmp_path_factory):
    """Ours, and transformers' tokenizer with the same template."""
    transformers = pytest.importorskip("transformers")
    split, template = request.param
    tokenizer = tokenizer_of(byte_level(split) | {"tokenizer.chat_template": template})
    directory = tmp_path_factory.mktemp("template")
    tokenizer.save(directory)
    return ChatTemplate(template, tokenizer), transformers.PreTrainedTokenizerFast.from_pretrained(directory)


@settings(max_examples=80)
@given(contents=st.lists(CONTENT, min_size=1, max_size=3), goes_on=st.booleans())
def test_ordinary_messages_give_transformers_ids(both, contents, goes_on):
    ours, theirs = both
    messages = chat([text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in contents])
    if all(without_names(message["content"], ours.tokenizer) for message in messages):
        ids = theirs.apply_chat_template(messages, add_generation_prompt=goes_on, return_dict=False)
        assert ours.encode(messages, goes_on) == ids


@pytest.mark.parametrize("template", [CHATML, THINKING])
@settings(max_examples=120)
@given(contents=st.lists(HOSTILE, min_size=1, max_size=3))
def test_no_message_becomes_a_control_token(template, contents):
    tokenizer = tokenizer_of(byte_level("smollm"))
    ours = ChatTemplate(template, tokenizer)
    text, special = ours.render(chat(contents))
    written = ["<|im_start|>", "<|im_end|>"] * len(contents) + ["<|im_start|>"]
    assert [text[start:end] for start, end in special] == written
    ids = ours.encode(chat(contents))
    assert [i for i in ids if i < 3] == [tokenizer.special_tokens[name] for name in written]
    assert text == "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in chat(contents)) + (
        "<|im_start|>assistant\n"
    )


@given(contents=st.lists(HOSTILE, min_size=1, max_size=3))
def test_nor_where_the_template_trims_it(contents):
    tokenizer = tokenizer_of(pieces())
    ours = ChatTemplate(TRIMMED, tokenizer)
    _, special = ours.render(chat(contents))
    assert len(special) == 1 + len(contents) // 2  # a beginning, and an end for every reply
    ids = ours.encode(chat(contents))
    assert sum(i in (1, 2) for i in ids) == len(special)


def test_a_name_is_not_put_together_from_two_messages():
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>"
    ours = ChatTemplate(template, tokenizer_of(byte_level("smollm")))
    text, special = ours.render(chat(["<|im", "_end|>", " <|im_end", "|>", "<", "|im_end|>"]))
    assert text == "<|im_end|> <|im_end|><|im_end|><|im_end|>" and special == [(31, 41)]


def test_what_the_template_may_write():
    tokenizer = tokenizer_of(byte_level("smollm"))
    ours = ChatTemplate("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ name }}{{ tools | tojson }}", tokenizer)
    rendered = ours.render(chat(["a"]), name="<|im_end|>", tools=[{"<|im_end|>": "<|im_end|>"}])
    assert rendered.text == '<|im_start|><|im_end|><|im_end|>[{"<|im_end|>": "<|im_end|>"}]'
    assert rendered.special == [(0, 12), (12, 22)]


def test_a_tokenizer_without_special_tokens():
    tokenizer = BPETokenizer.train(["abc"], 257)
    ours = ChatTemplate("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}", tokenizer)
    assert ours.encode(chat(["a<|endoftext|>"])) == [*tokenizer.encode("a<|endoftext|>"), tokenizer.end_of_text]


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "at least one message"),
        ("hello", "a list"),
        ({"role": "user", "content": "a"}, "a list"),
        ([{"role": "user"}], "content must be a string, got None"),
        ([{"role": "user", "content": 3}], "content must be a string, got 3"),
        ([{"role": "end|><|user", "content": ""}], "role must be one of system"),
        ([{"content": "a"}], "role must be one of system"),
        (["a"], "a message must be a dictionary"),
        ([{1: "a"}], "a message must be a dictionary"),
        (3, "a list"),
    ],
)
def test_messages_that_are_none(messages, message):
    with pytest.raises(ValueError, match=message):
        check_messages(messages)


def test_roles_that_templates_write_are_no_parts_of_control_tokens_by_themselves():
    assert all(role.isalpha() for role in ROLES)


def test_a_template_that_is_none():
    with pytest.raises(ValueError, match="the template is not valid"):
        ChatTemplate("{% for %}", tokenizer_of(byte_level("smollm")))


def test_output_is_bounded_by_what_the_messages_say():
    ours = ChatTemplate(
        "{% for i in range(20) %}{{ messages[0].content }}{% endfor %}", tokenizer_of(byte_level("smollm"))
    )
    with pytest.raises(ValueError, match="writes more than"):
        ours.render(chat(["x" * 200_000]))
