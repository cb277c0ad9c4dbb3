"""The README and the pages of `docs/` say what is so: every Python and shell block in them runs, in the order of its
page and in one place, and prints what it says that it prints.

Models are small stand-ins under the names of the real ones, and training takes two steps. An output is stated in Python
in one of two ways:

    print(llmfast.__version__)
    # 0.1.0
    1 / 3  # 0.33: a literal, with as many digits as are sure

Commands that would fetch or measure are held to the command line's options only; `PARSED` says which. A block that
can't run at all stands under `<!-- not run: why -->`.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from conftest import STORY_TEXTS
from retrieval_toys import manuals, pdf
from test_inference_embedding import write_encoder

import llmfast
from llmfast.backends import _registry, cpp, pytorch
from llmfast.cli import cli
from llmfast.models.llama import Llama, LlamaConfig
from llmfast.tokenizers import BPETokenizer
from llmfast.weights import locate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"-?\d+(?:\.(\d+))?(?=$|[\s:;,.])")
FENCE = re.compile(r"(?:<!-- not run: (.+?) -->\n)?^```(python|bash|console)\n(.*?)^```", re.M | re.S)
FILE = re.compile(r"# (\w+\.py)\n")  # the first line of a block that is a file

# Where the figures that a page states are those of a real model; everywhere else a stand-in answers to its name.
REAL = {"chat.md": "smollm2", "retrieval.md": "minilm"}
# What is only parsed, and why; the options that make what remains a matter of a second.
PARSED = {
    "get": "fetches",
    "bench": "measures for minutes; tests/test_cli_bench.py runs it",
    "verify": "takes a minute; tests/test_verify.py runs the page's own commands",
    "eval blimp": "wants a data set; tests/test_evaluation_minimal_pairs.py runs it",
    "eval scaling": "trains twelve models; tests/test_evaluation_ladder.py runs it",
}
SHORT = {
    "train": "--set n_layer=1 --set n_embd=32 --set n_head=2 --set n_positions=32 --set batch_size=2 --steps 2",
    "finetune": "--set rank=2 --set max_tokens=64 --set batch_size=2 --set steps=2",
    "summarize": "--max-new-tokens 8",
    "chat": "--max-new-tokens 8",
    "ask": "--max-new-tokens 8",
}


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    not_run: str
    line: int


def blocks(page: str) -> list[Block]:
    return [
        Block(match[2], match[3], match[1] or "", page[: match.start(2)].count("\n") + 1)
        for match in FENCE.finditer(page)
    ]


# --- Python -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Output:
    """What a block says that one of its statements gives."""

    statement: ast.stmt
    text: str
    printed: bool

    def problem(self, found: object) -> str | None:
        """Why this is not `found`, or None."""
        if self.printed:
            shown, stated = portable(str(found)), portable(self.text)
        elif (number := NUMBER.match(self.text)) and isinstance(found, (int, float)):
            shown, stated = f"{found:.{len(number[1] or '')}f}", number[0]
        else:
            shown, stated = repr(found), repr(leading_literal(self.text))
        return None if shown == stated else f"it gives {shown!r}, not {stated!r}"


def portable(text: str) -> str:
    """Without what depends on the machine, and with single blanks."""
    return re.sub(r"\w+ kernels, \d+ threads", "… kernels, … threads", " ".join(text.split()))


def leading_literal(text: str) -> object:
    """The Python literal that a comment begins with, or `NotImplemented`."""
    for end in (len(text), *(match.start() for match in re.finditer(r"[:;,] ", text))):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(text[:end])
    return NotImplemented


def outputs(block: str) -> list[Output]:
    """In the order of the statements. A print without a comment line below it states nothing."""
    lines, found = block.splitlines(), []
    for statement in ast.parse(block).body:
        end = statement.end_lineno
        prints = isinstance(statement, ast.For) or (
            isinstance(statement, ast.Expr)
            and isinstance(statement.value, ast.Call)
            and ast.unparse(statement.value.func) == "print"
        )
        if prints:
            below = re.match(r"(# .*\n)+", "\n".join([*lines[end:], ""]))
            if below:
                found.append(Output(statement, re.sub(r"^# ", "", below[0], flags=re.MULTILINE), True))
        elif isinstance(statement, ast.Expr):
            comment = lines[end - 1][statement.end_col_offset or 0 :].strip().removeprefix("# ")
            if NUMBER.match(comment) or leading_literal(comment) is not NotImplemented:
                found.append(Output(statement, comment, False))
    return found


def problems(block: str, names: dict[str, Any]) -> list[str]:
    """Runs a block; what in it is not as stated."""
    stated, found = {output.statement.lineno: output for output in outputs(block)}, []
    for statement in ast.parse(block).body:
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                if isinstance(statement, ast.Expr):
                    value = eval(ast.unparse(statement), names)
                else:
                    exec("from __future__ import annotations\n" + ast.unparse(statement), names)
        except Exception as error:
            return [*found, f"{ast.unparse(statement)}: it raises {error!r}"]
        if (output := stated.get(statement.lineno)) is not None:
            problem = output.problem(printed.getvalue() if output.printed else value)
            if problem is not None:
                found.append(f"{ast.unparse(statement)}: {problem}")
    return found


# --- commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]
    variables: dict[str, str]
    stdin: str = ""
    stdout: str = ""  # the file, where there is one


def commands(block: Block) -> list[Command]:
    """Those of a shell block; in a console the lines that begin with $."""
    text = block.text.replace("\\\n", " ")
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    found = []
    for line in text.splitlines():
        stream = shlex.shlex(line, posix=True, punctuation_chars="|&>")
        stream.whitespace_split = True
        stdin, words, target = "", [], ""
        for word in [*stream, "&&"]:
            if word == "|":
                assert words[0] == "echo", f"a pipe from {words}"
                stdin, words = " ".join(words[1:]) + "\n", []
            elif word == "&&":
                *words, target = [part for part in words if part != ">"] if ">" in words else [*words, ""]
                assigned = 0
                while assigned < len(words) and re.match(r"[A-Z_]+=", words[assigned]):
                    assigned += 1
                if words:
                    variables = dict(word.split("=", 1) for word in words[:assigned])
                    found.append(Command(tuple(words[assigned:]), variables, stdin, target))
                stdin, words, target = "", [], ""
            else:
                words.append(word)
    return found


def verb(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """The command that words name, as `eval perplexity`, and what they give it; `click.UsageError` where they name
    none, or give what it does not take."""
    command, context, given, names = cli, click.Context(cli, info_name="llmfast"), list(words), []
    while isinstance(command, click.Group) and (given or not command.invoke_without_command):
        name, command, given = command.resolve_command(context, given)
        names.append(name)
        if not isinstance(command, click.Group):
            command.make_context(name, list(given), parent=context)
    return " ".join(names), given


def shell_problem(command: Command, run: bool) -> str | None:
    """Why a command is not as it should be, or None. llmfast's own run, unless `PARSED` has them; of the others it is
    looked at what they name."""
    words = command.words
    if words[0] == "torchrun" and "llmfast" in words:
        run, words = False, words[words.index("llmfast") :]
    if words[0] == "llmfast":
        try:
            name, given = verb(words[1:])
        except click.UsageError as error:
            return error.format_message()
        if not run or name in PARSED or "--store" in given:
            return None
        return failure(command, name, given)
    if words[:2] == ("pip", "install"):
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
        asked = re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", " ".join(words))))
        return next((f"no extra {extra}" for extra in asked if extra not in extras), None)
    if words[:2] == ("python", "-m"):
        assert words[2] in ("build", "llmfast.evaluation.harness"), words
        return None
    if words[0] == "python":
        script = ROOT / words[1]
        source = script.read_text(encoding="utf-8") if script.is_file() else ""
        options = [word for word in words if word.startswith("-")]
        return next((f"{words[1]} has no {option}" for option in options if f'"{option}"' not in source), None) or (
            None if source else f"no {words[1]}"
        )
    if words[0] == "pytest":
        paths = [word for word in words[1:2] if not word.startswith("-")]
        return next((f"no {path}" for path in paths if not (ROOT / path).exists()), None)
    assert words[0] == "auditwheel", f"what is {' '.join(words)}?"
    return None


def failure(command: Command, name: str, given: list[str]) -> str | None:
    short = shlex.split(SHORT.get(name, "")) if not {"--resume", "--dry-run", "--print-config"} & set(given) else []
    arguments = [*name.split(), *short, *given] if name != "train" else [name, *given, *short]
    if name in ("train", "finetune", "tokenizer train", "convert") and "--resume" not in given:
        forget(given)  # pages show one thing several ways, and these commands overwrite nothing
    result = CliRunner().invoke(cli, arguments, input=command.stdin, env=command.variables)
    if command.stdout:
        Path(command.stdout).write_text(result.stdout, encoding="utf-8")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return None if result.exit_code == 0 else f"exit code {result.exit_code}: {result.output[-500:]}"


def forget(given: list[str]) -> None:
    """Removes what stands where a command is to write."""
    for option in {"--out", "-o"} & set(given):
        out = Path(given[given.index(option) + 1])
        if out.is_symlink() or out.is_file():
            out.unlink()
        elif out.is_dir():
            shutil.rmtree(out)


# --- the place where a page runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """A random model of the Llama family with a chat template and a long context."""
    tokenizer = BPETokenizer.train(STORY_TEXTS, vocab_size=300)
    end = tokenizer.end_of_text
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            "llama", vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=4096, eos_token_id=end, bos_token_id=end,
        )  # fmt: skip
        llm = llmfast.LLM(Llama(config), tokenizer)
    directory = tmp_path_factory.mktemp("stand-ins") / "talker"
    llm.save_pretrained(directory)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("encoder")
    write_encoder(directory, context=256)
    return directory


def lay_out(place: Path, model: Path) -> None:
    """The files that the pages take as given."""
    text = "\n\n".join(STORY_TEXTS * 20) + "\n"
    for name in ("book", "my", "other", "wikitext", "tinyshakespeare", "tinystories", "notes"):
        (place / f"{name}.txt").write_text(text if name != "notes" else STORY_TEXTS[0], encoding="utf-8")
    (place / "more").mkdir()
    (place / "more" / "text.md").write_text(text, encoding="utf-8")
    with zipfile.ZipFile(place / "books.zip", "w") as archive:
        archive.writestr("one.txt", text)
    rows = [{"instruction": f"Who is friend {i}?", "output": f"Tom {i}."} for i in range(12)]
    (place / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    answers = [{"prompt": row["instruction"], "completion": row["output"]} for row in rows]
    (place / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    mail = [f"{label},the {animal} and {i}" for i in range(10) for label, animal in (("work", "dog"), ("home", "cat"))]
    (place / "mail.csv").write_text("\n".join(["label,text", *mail]), encoding="utf-8")
    (place / "new.csv").write_text("\n".join(["label,text", *mail[:4]]), encoding="utf-8")
    (place / "report.pdf").write_bytes(pdf("The dog liked to run in the park."))
    manuals(place / "manuals")
    (place / "examples").symlink_to(ROOT / "examples")
    (place / "path" / "to").mkdir(parents=True)
    for name in ("path/to/model", "path/to/gpt2", "book"):
        (place / name).symlink_to(model)
    (place / "model.gguf").symlink_to("book.gguf")  # a file of the same kind
    (place / "theirs").symlink_to("mine")  # a second adapter
    toml = re.search(r"```toml\n(preset.*?)```", (ROOT / "docs" / "training.md").read_text(encoding="utf-8"), re.S)
    assert toml is not None
    (place / "run.toml").write_text(toml[1], encoding="utf-8")


@pytest.fixture
def stage(tmp_path, monkeypatch, talker, encoder, storyteller_directory) -> Iterator[dict[str, Any]]:
    """A place to run a page in, and the names that it takes as given. Models are known by stand-ins."""
    lay_out(tmp_path, storyteller_directory)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "examples")])
    monkeypatch.setattr(sys.modules["llmfast.backends"], "_registry", dict(_registry))
    known = {"smollm2": talker, "minilm": encoder}
    monkeypatch.setattr(locate, "is_there", lambda name: True)
    monkeypatch.setattr(locate, "place_of", lambda name: known[name])
    yield {
        "known": known,
        "names": {
            "llmfast": llmfast,
            "torch": torch,
            "x": torch.zeros(3),
            "module": pytorch,
            "llm": llmfast.load(talker),
            "ids": torch.tensor([[1, 2, 3]]),
            "prompt": "Once",
            "text": "Once upon a time there was a cat.",
        },
    }


def without_figures() -> bool:
    """Whether the pages' figures, which are those of the C++ kernels, can't come out here."""
    return cpp.why_not("linear", torch.device("cpu"), torch.float32) is not None or torch.cuda.is_available()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page.read_text("utf-8"))], ids=lambda page: page.name
)
def test_every_block_runs_and_prints_what_it_says(page, stage, request):
    if page.name in REAL:
        stage["known"][REAL[page.name]] = request.getfixturevalue(REAL[page.name])  # skips where it can't be had
    if page.name == "kernels.md":
        pytest.importorskip("triton")
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{block.line}: "
        if block.language != "python":
            for command in commands(block):
                if problem := shell_problem(command, run=block.language == "bash" and not block.not_run):
                    found.append(f"{where}{' '.join(command.words)}: {problem}")
        elif file := FILE.match(block.text):  # tests/test_verify.py verifies it
            compile(block.text, file[1], "exec")
        elif not block.not_run:
            said = problems(block.text, stage["names"])
            found += [where + problem for problem in said if not without_figures() or "it raises" in problem]
    assert found == []


def shell(text: str, run: bool = False) -> list[str | None]:
    return [shell_problem(command, run) for command in commands(Block("bash", text, "", 1))]


def test_what_is_not_run_is_little():
    found = [(page.name, block) for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
    assert [(name, block.not_run) for name, block in found if block.not_run and block.language == "python"] == [
        ("evaluation.md", "lm-evaluation-harness fetches its tasks")
    ]
    assert sum(bool(block.not_run) for _, block in found) == 1
    parsed = [
        verb(c.words[1:])[0] for _, b in found if b.language == "bash" for c in commands(b) if c.words[0] == "llmfast"
    ]
    assert set(PARSED) <= {name if name in PARSED else name.split()[0] for name in parsed}
    run = [name for name in parsed if name not in PARSED]
    assert len(run) > 50 > 2 * (len(parsed) - len(run))


def test_a_wrong_command_is_noticed():
    assert (
        shell("llmfast get smollm2 && FEW=1 llmfast chat > a.txt\necho 'Hi' | llmfast chat -m x  # and so on")
        == [None] * 3
    )
    for wrong, words in (
        ("llmfast chatter", "No such command"),
        ("llmfast chat --temprature 0", "No such option"),
        ("llmfast generate --top-k many x", "is not a valid integer"),
        ("llmfast eval perplexity", "Missing argument"),
        ("llmfast lessons close 5", "No such command"),
        ('pip install -e ".[tests]"', "no extra tests"),
        ("python benchmarks/readme.py --chek", "has no --chek"),
        ("python benchmarks/read.py", "no benchmarks/read.py"),
        ("pytest bench", "no bench"),
        ("torchrun -m llmfast train a.txt --paralel ddp", "No such option"),
    ):
        (said,) = shell(wrong)
        assert said is not None and words in said
    (said,) = shell("llmfast generate x --model nowhere", run=True)
    assert said is not None and "no model 'nowhere'" in said
    (command,) = commands(Block("console", "$ echo a b | llmfast chat\nan answer\n", "", 1))
    assert command == Command(("llmfast", "chat"), {}, "a b\n")


def test_outputs_are_found_and_differences_noticed():
    readme = blocks(PAGES[0].read_text(encoding="utf-8"))
    assert len([output for block in readme if block.language == "python" for output in outputs(block.text)]) >= 4
    for right in (
        "print(1)\n# 1",
        "print('a  b')\n# a\n# b",
        "2 / 3  # 0.67: rounded",
        "'x'.upper()  # 'X'",
        "(1, 2)  # (1, 2): a pair",
    ):
        assert len(outputs(right)) == 1 and problems(right, {}) == []
    for wrong in ("print(1)\n# 2", "2 / 3  # 0.66", "-2 / 3  # 0.67", "'x'  # 'y'", "(1, 2)  # (1, 3)", "None  # 0.0"):
        assert len(problems(wrong, {})) == 1
    for silent in ("x = 1  # 2", "print(1)\n\n# 2", "abs(1)  # its magnitude", "print(1)  # 2"):
        assert outputs(silent) == []
