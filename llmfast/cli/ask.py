"""`llmfast ask`: questions about your own documents."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

import llmfast
from llmfast.cli.common import BAD_INPUT, backend_option, common_options, in_options, running_options, sampling_options


@click.command()
@click.argument("question", required=False)
@click.option("-i", "--index", "--store", "place", required=True, metavar="INDEX", help="As `llmfast index` made it.")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Name, directory, .gguf file or hub name.")
@click.option("-k", "--sources", type=click.IntRange(1, 50), default=3, show_default=True, help="At most.")
@click.option("--where", multiple=True, metavar="KEY=VALUE", help="Only documents of this name (*, ?), kind, or --set.")
@click.option("--threshold", type=float, help="Evidence (0 to 2) needed to answer; default: 1.0, 0 always answers.")
@click.option("--show-context", is_flag=True, help="Print what was found, with its evidence, on stderr.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=1), default=200, show_default=True, help="Of it.")
@sampling_options(temperature=0.0)
@running_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@common_options
def ask(
    question: str | None,
    place: str,
    model: str,
    sources: int,
    where: tuple[str, ...],
    threshold: float | None,
    show_context: bool,
    backend: str,
    precision: str,
    device: str,
    adapter: str | None,
    stop: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Answer QUESTION from the documents of an index, with numbered sources.

    Without QUESTION every line of stdin is one, and a question may follow on the one before it.
    """
    from llmfast.cli.index import pairs
    from llmfast.retrieval import Index, Questions
    from llmfast.retrieval.answering import THRESHOLD

    index = Index.open(place)
    llm = llmfast.load(model, backend=backend_option(backend), precision=precision, device=device, adapter=adapter)
    about = Questions(llm, index, sources, THRESHOLD if threshold is None else threshold, pairs(where))
    settings |= {"stop": list(stop) or None}

    def answer(text: str) -> None:
        made = about.ask(text, **settings)
        if show_context:
            for hit in made.hits:
                click.echo(f"[evidence {hit.evidence:.2f}] {hit.name}\n{hit.text}\n", err=True)
        if as_json:
            whole = "".join(made)
            shown = [
                {"source": number, "name": hit.name, "text": hit.text, "quote": hit.quote}
                for number, hit in enumerate(made.sources, 1)
            ]
            record = {"question": text, "answer": whole, "answered": made.answered, "evidence": made.evidence}
            click.echo(json.dumps(record | {"sources": shown}, ensure_ascii=False))
            return
        try:
            for piece in made:
                click.echo(piece, nl=False)
                sys.stdout.flush()
        finally:
            made.close()
            click.echo()
        for number, hit in enumerate(made.sources, start=1):
            click.echo(f"  [{number}] {hit.name}: “{' '.join(hit.quote.split())}”")

    if question is not None:
        answer(question)
        return
    from llmfast.cli.chat import line_reader, lines_of_a_pipe

    at_a_terminal = sys.stdin.isatty()
    read = line_reader() if at_a_terminal else lines_of_a_pipe
    while True:
        try:
            text = read()
            if text.strip():
                answer(text)
        except EOFError:
            return
        except KeyboardInterrupt:
            if not at_a_terminal:
                raise
        except BAD_INPUT as error:
            if not at_a_terminal:
                raise
            click.echo(in_options(" ".join(str(error).split())), err=True)
