"""`llmfast generate`: text from a prompt."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from typing import Any

import click

import llmfast
from llmfast.cli.common import (
    backend_option,
    common_options,
    json_schema_option,
    running_options,
    sampling_options,
)


@click.command()
@click.argument("prompt")
@click.option("-m", "--model", default="stories", show_default=True, help="Embedded name, directory, file or hub name.")
@click.option("-n", "--max-new-tokens", type=click.IntRange(min=0), default=256, show_default=True)
@sampling_options(temperature=0.8)
@click.option("--samples", type=click.IntRange(min=1), default=1, show_default=True, help="How many texts.")
@click.option("--truncate", is_flag=True, help="Keep the end of a prompt longer than the context.")
@click.option("--cache/--no-cache", default=True, help="--no-cache computes everything again for every token.")
@json_schema_option
@running_options
@click.option(
    "--logprobs", type=int, metavar="N", help="With --json: each token's log-probability, and the N likeliest."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@common_options
def generate(
    prompt: str,
    model: str,
    backend: str,
    precision: str,
    device: str,
    adapter: str | None,
    samples: int,
    cache: bool,
    stop: tuple[str, ...],
    logprobs: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Continue PROMPT (- reads it from stdin). The text streams to stdout, the speed goes to stderr."""
    if logprobs is not None and not as_json:
        raise ValueError("--logprobs needs --json, which prints them")
    if prompt == "-":
        prompt = sys.stdin.read()
    llm = llmfast.load(model, backend=backend_option(backend), precision=precision, device=device, adapter=adapter)
    settings |= {"stop": list(stop), "use_cache": cache}
    if as_json:
        start = time.perf_counter()
        made = llm.generate([prompt], num_return_sequences=samples, logprobs=logprobs, **settings)[0]
        seconds = time.perf_counter() - start
        texts = made if samples > 1 else [made]
        record = {"model": model, "prompt": prompt, "texts": texts, "seconds": seconds}
        if logprobs is not None:
            record["texts"] = [each.text for each in texts]
            record["choices"] = [[asdict(choice) for choice in each.choices] for each in texts]
        click.echo(json.dumps(record, ensure_ascii=False))
        return
    if samples > 1:
        click.echo("\n\n---\n\n".join(llm.generate(prompt, num_return_sequences=samples, **settings)))
        return

    start = time.perf_counter()
    stream = llm.stream(prompt, **settings)
    click.echo(prompt, nl=False)
    interrupted = False
    first: float | None = None
    try:
        for piece in stream:
            first = first or time.perf_counter()
            click.echo(piece, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    end = time.perf_counter()
    click.echo()
    sys.stdout.flush()
    rate = (
        f", {(stream.tokens - 1) / (end - first):,.0f} tokens/s" if first and stream.tokens > 1 and end > first else ""
    )
    waited = f", the first after {1000 * (first - start):.0f} ms" if first else ""
    click.echo(f"[{stream.tokens} tokens{waited}{rate}; {stream.how}]", err=True)
    if interrupted:
        sys.exit(130)
