"""The command line: `llmfast <verb>`. Each verb is a file here that parses, calls the package and prints.

Bad input gives one line on stderr and exit code 2.
"""

from __future__ import annotations

import importlib

import click

import llmfast

# In the order of `llmfast --help`. A verb's file holds a command of the verb's name, and is imported when it is asked
# for: a command waits only for what it uses.
VERBS = (
    "generate",
    "chat",
    "index",
    "ask",
    "summarize",
    "embed",
    "get",
    "train",
    "finetune",
    "merge",
    "classify",
    "data",
    "tokenizer",
    "eval",
    "quantize",
    "convert",
    "consolidate",
    "lessons",
    "bench",
    "verify",
    "backends",
    "info",
)


class Verbs(click.Group):
    def list_commands(self, context: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(f"llmfast.cli.{name}"), name)
        return command


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(llmfast.__version__, prog_name="llmfast")
def cli() -> None:
    """A GPT that can be read in an afternoon and runs as fast as the machine allows."""


def main() -> None:
    """The entry point of the `llmfast` command."""
    cli(prog_name="llmfast")
