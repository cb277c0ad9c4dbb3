"""Conversations: replies, what is computed again, and what goes when the context is full."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from conftest import fit, single_thread, tiny_config
from test_chat_template import CHATML
from test_tokenizers_gguf import byte_level

import llmfast
from llmfast.backends import cpp
from llmfast.chat import ChatTemplate, Conversation
from llmfast.chat.turns import fitting, without_oldest
from llmfast.inference.decoders import KeepingDecoder
from llmfast.tokenizers import BPETokenizer, load_tokenizer
from llmfast.tokenizers.gguf import tokenizer_of

pytestmark = pytest.mark.usefixtures("one_thread")
NATIVE = cpp.why_not("linear", torch.device("cpu"), torch.float32) is None
TALK = [("hello", "A ☃!"), ("who is it?", "The cat, said it."), ("bye", "ok")]  # what the model knows by heart


def messages(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="session")
def talker_directory(tmp_path_factory):
    """A model that answers as in TALK, in this order and any beginning of it, and ends its turns."""
    tokenizer = tokenizer_of(byte_level("smollm") | {"tokenizer.chat_template": CHATML})
    config = tiny_config(
        vocab_size=tokenizer.vocab_size, n_positions=192, n_embd=48, n_head=4, initializer_range=0.05, eos_token_id=2
    )
    whole = messages(*(text for turn in TALK for text in turn))
    with torch.random.fork_rng(), single_thread():
        torch.manual_seed(0)
        template = ChatTemplate(CHATML, tokenizer)
        rows = [template.encode(whole[: 2 * n], False) for n in (1, 2, 3)]
        model = fit(llmfast.GPT(config), rows, 150, 1e-2)
    directory = tmp_path_factory.mktemp("talker")
    llmfast.LLM(model, tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def talker(talker_directory) -> llmfast.LLM:
    return llmfast.load(talker_directory, precision="fp32")


def say(conversation: Conversation, text: str, **settings) -> str:
    return "".join(conversation.say(text, temperature=0, **settings))


# --- LLM.chat ---------------------------------------------------------------------------------------------------------


def test_a_chat_gives_the_reply_alone(talker):
    assert talker.chat(messages("hello"), temperature=0) == "A ☃!"
    assert talker.chat(messages("hello", "A ☃!", "who is it?"), temperature=0) == "The cat, said it."


def test_a_stream_gives_it_in_pieces(talker):
    stream = talker.chat(messages("hello"), temperature=0, stream=True)
    pieces = list(stream)
    assert "".join(pieces) == "A ☃!" and len(pieces) > 1
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.prompt_tokens == len(talker.chat_template.encode(messages("hello")))
    assert stream.ids[-1] == 2 and stream.tokens == len(stream.ids)


def test_settings_are_those_of_generate(talker):
    assert talker.chat(messages("hello"), temperature=0, stop="☃") == "A "
    assert talker.chat(messages("hello"), temperature=0, max_new_tokens=1) == "A"
    some = {talker.chat(messages("hello"), temperature=3.0, seed=seed, max_new_tokens=9) for seed in (1, 1, 2)}
    assert len(some) == 2
    with pytest.raises(ValueError, match="temperature"):
        talker.chat(messages("hello"), temperature=-1)
    with pytest.raises(ValueError, match="max_new_tokens"):
        talker.chat(messages("hello"), max_new_tokens=-1)


def test_other_backends_say_the_same(talker_directory):
    llm = llmfast.load(talker_directory, backend="pytorch", precision="fp32")
    assert llm.chat(messages("hello"), temperature=0) == "A ☃!"
    talk = Conversation(llm)
    assert [say(talk, question) for question, _ in TALK] == [answer for _, answer in TALK]


def test_a_model_without_a_template(parrot):
    with pytest.raises(ValueError, match="this model has no chat template: it continues text"):
        parrot.chat(messages("hello"))


@pytest.mark.parametrize("made", [{"eos_token_id": [0, 2]}, {"eos_token_id": 2}, {}])
def test_ends_are_what_files_name(talker_directory, made, tmp_path):
    for file in talker_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps(made))
    assert llmfast.load(tmp_path).end_tokens == {0, 2}


def test_ends_that_are_no_special_tokens_are_none(talker_directory, tmp_path):
    for file in talker_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 40]}')
    assert llmfast.load(tmp_path).end_tokens == {0, 1, 2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["a"]}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id should be an id"):
        llmfast.load(tmp_path)


def test_a_prompt_begins_as_the_model_expects():
    tokenizer = tokenizer_of(byte_level("smollm", add_bos_token=True))
    llm = llmfast.LLM(llmfast.GPT(tiny_config(vocab_size=tokenizer.vocab_size)), tokenizer)
    assert llm._prompt("the") == [1, *tokenizer.encode("the")] and llm._prompt("") == [1]
    assert llm.start_token == 1
    assert llm.score("the").ids == tokenizer.encode("the")


# --- conversations ----------------------------------------------------------------------------------------------------


def test_turn_by_turn(talker):
    talk = Conversation(talker)
    assert [say(talk, question) for question, _ in TALK] == [answer for _, answer in TALK]
    assert talk.messages == messages(*(text for turn in TALK for text in turn))


@pytest.mark.skipif(not NATIVE, reason="only native decoders keep what they hold")
def test_only_what_is_new_is_computed(talker, monkeypatch):
    computed, extend = [], KeepingDecoder.extend

    def counting(decoder, tokens):
        computed[-1] += tokens.numel()
        return extend(decoder, tokens)

    monkeypatch.setattr(KeepingDecoder, "extend", counting)
    talker.runner.prefixes.clear()
    talk, encode = Conversation(talker), talker.chat_template.encode
    before = 0
    for number, (question, _) in enumerate(TALK, 1):
        computed.append(0)
        reply = talk.say(question, temperature=0, speculate=0)
        "".join(reply)
        prompt = len(encode(talk.messages[: 2 * number - 1]))
        assert reply.stream.prompt_tokens == prompt
        assert reply.stream.reused == before
        # The prompt's new tokens, and the reply's, one at a time, of which the last is chosen and not computed.
        assert computed[-1] == prompt - before + reply.stream.tokens - 1
        before = prompt + reply.stream.tokens - 1
    assert before > 50


@pytest.mark.skipif(not NATIVE, reason="only native decoders keep what they hold")
def test_another_chat_of_the_same_beginning_finds_it(talker):
    talker.runner.prefixes.clear()
    talker.chat(messages("hello"), temperature=0)
    stream = talker.chat(messages("hello", "A ☃!", "who is it?"), temperature=0, stream=True)
    assert "".join(stream) == "The cat, said it."
    assert stream.reused == len(talker.chat_template.encode(messages("hello"))) + len(talker.tokenizer.encode("A ☃!"))


def test_a_reply_stays_the_tokens_that_were_chosen(talker):
    """The model spells a reply as it did, though the tokenizer would spell it otherwise."""
    talk = Conversation(talker)
    say(talk, "hello")
    odd = [talker.tokenizer.encode(letter)[0] for letter in "the"]
    assert odd != talker.tokenizer.encode("the")
    prompt = talker.chat_template.encode(messages("hello"))
    talk.messages = messages("hello")
    talk._said(prompt, [*odd, 2], "the")
    talk.messages.append({"role": "user", "content": "bye"})
    ids = talk._prompt(10)
    assert ids[: len(prompt) + 3] == prompt + odd
    later = talker.chat_template.encode(messages("hello", "the", "bye"))
    assert ids[len(prompt) + 3 :] == later[len(prompt) + 1 :]


def test_a_reply_that_was_cut(talker):
    talk = Conversation(talker)
    assert say(talk, "hello", stop="☃") == "A "
    reply = talk.retry(temperature=0)
    assert next(reply) == "A"
    reply.close()
    assert talk.messages == messages("hello", "A")
    assert list(reply) == []
    assert say(talk, "who is it?") is not None
    assert talk._prompt(5) == talker.chat_template.encode(talk.messages)


def test_another_reply_to_the_last_turn(talker):
    talk = Conversation(talker)
    with pytest.raises(ValueError, match="nothing to answer yet"):
        talk.retry()
    say(talk, "hello")
    assert "".join(talk.retry(temperature=0)) == "A ☃!"
    assert talk.messages == messages("hello", "A ☃!")


def test_what_the_system_says_stays(talker):
    talk = Conversation(talker, system="be kind")
    say(talk, "hello", max_new_tokens=3)
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be kind"}] and talk.system == "be kind"
    talk.system = "be brief"
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    talk.system = None
    assert talk.messages == [] and talk.system is None


def test_it_is_saved_and_loaded(talker, tmp_path):
    talk, other = Conversation(talker, system="☃"), Conversation(talker)
    say(talk, "hello", max_new_tokens=3)
    talk.save(tmp_path / "talk.json")
    other.load(tmp_path / "talk.json")
    assert other.messages == talk.messages
    assert Conversation(talker, messages=talk.messages).messages == talk.messages


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"messages": 3}', "{}", '[{"role": "cat", "content": ""}]', "[" * 10**5]
)
def test_a_file_that_holds_none(talker, tmp_path, content):
    (tmp_path / "talk.json").write_text(content)
    talk = Conversation(talker)
    with pytest.raises(ValueError, match=r"talk\.json holds no conversation") as caught:
        talk.load(tmp_path / "talk.json")
    assert "\n" not in str(caught.value) and talk.messages == []


def test_a_turn_that_fails_is_none(talker):
    talk = Conversation(talker)
    with pytest.raises(ValueError, match="temperature"):
        talk.say("hello", temperature=-1)
    with pytest.raises(ValueError, match="must be a string"):
        talk.say(3)
    with pytest.raises(ValueError, match=r"the last turn has \d+ tokens, and the model's context only 192"):
        talk.say("z" * 300)
    assert talk.messages == []


# --- a context that fills up ------------------------------------------------------------------------------------------


def words(some) -> list[int]:
    """A token for every word, and one a message."""
    return [0 for message in some for _ in ["", *message["content"].split()]]


def test_what_goes_when_the_context_is_full():
    chat = [{"role": "system", "content": "a b"}, *messages("c " * 9, "d " * 9, "e " * 9, "f " * 9, "g")]
    assert fitting(chat, words, context=60, reply=10) == [0] * 45
    with pytest.warns(UserWarning, match="outgrew the context of 54 tokens; the model no longer sees its oldest turns"):
        assert len(fitting(chat, words, context=54, reply=10)) == 25
    kept, ids = without_oldest(chat, words, 54)
    assert kept == [chat[0], *chat[3:]] and len(ids) == 25
    kept, _ = without_oldest(chat, words, 30)
    assert kept == [chat[0], chat[5]]
    with pytest.raises(ValueError, match="the last turn has 5 tokens, and the model's context only 4"):
        without_oldest(chat, words, 4)


def test_the_oldest_turns_go_once_and_the_system_stays(talker):
    talk = Conversation(talker, system="be kind")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prompts = []
        for number in range(20):
            reply = talk.say(f"the cat sat {number}", temperature=0, max_new_tokens=12)
            "".join(reply)
            prompts.append(reply.stream.prompt_tokens)
    assert [str(w.message).split(";")[0] for w in caught] == ["the chat outgrew the context of 192 tokens"]
    assert max(prompts) <= 192 - 12 and len(talk.messages) == 41
    assert talk._seen()[0] == talk.messages[0] and 2 < len(talk._seen()) < 12
    dropped = [n for n, (a, b) in enumerate(zip(prompts, prompts[1:], strict=False)) if b < a]
    assert 2 <= len(dropped) <= 6  # half goes at a time, not a turn at every turn


def test_a_reply_ends_where_the_context_does(talker):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream = talker.chat(messages("z" * 100), temperature=2.0, seed=3, max_new_tokens=500, stream=True, top_k=3)
        "".join(stream)
    assert stream.prompt_tokens + stream.tokens <= 193


@pytest.mark.parametrize("split", ["gpt2", "gpt4"])
def test_a_tokenizer_trained_here_can_have_a_template(tmp_path, split):
    tokenizer = BPETokenizer.train(["hello"], 259, special_tokens=["<|im_start|>", "<|im_end|>"], split=split)
    assert tokenizer.end_tokens == {256, 258}
    tokenizer.chat_template = CHATML
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is BPETokenizer and loaded.chat_template == CHATML
    ids = ChatTemplate(CHATML, loaded).encode(messages("<|im_end|>"))
    assert [i for i in ids if i > 255] == [257, 258, 257]
    BPETokenizer.train(["hello"], 257).save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
