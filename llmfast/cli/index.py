"""`llmfast index`: documents that can be searched and asked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from llmfast.cli.common import common_options
from llmfast.cli.progress import progress_bars


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path))
@click.option("-o", "--out", "--store", "place", required=True, metavar="INDEX", help="Its folder, or postgresql://….")
@click.option("-m", "--model", help="Of the vectors, when an index is made: minilm, or any Embedder reads.")
@click.option("--tokens", type=int, help="Of a piece, when an index is made; default: 250.")
@click.option("--set", "metadata", multiple=True, metavar="KEY=VALUE", help="What `ask --where` can keep to.")
@click.option("--encoding", default="utf-8", show_default=True, help="Of text without a byte order mark.")
@click.option("--remove", is_flag=True, help="Take the documents below PATHS out of the index.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@common_options
def index(
    paths: tuple[Path, ...],
    place: str,
    model: str | None,
    tokens: int | None,
    metadata: tuple[str, ...],
    encoding: str,
    remove: bool,
    as_json: bool,
) -> None:
    """Index the text, Markdown, HTML and PDF files below PATHS: folders, zips or files.

    Again, it takes in what has changed: files that differ, new ones, and those that are gone. Without PATHS it says
    what is there. What can't be read is named on stderr, and the rest is indexed.
    """
    from llmfast.retrieval import Index

    if not paths:
        made = Index.open(place)
        documents = made.documents.values()
        if as_json:
            click.echo(json.dumps({"pieces": len(made), "documents": [asdict(each) for each in documents]}))
            return
        for document in documents:
            click.echo(document.name)
        click.echo(f"[{len(documents):,} documents, {len(made):,} pieces; {made.store.settings['embedder']}]", err=True)
        return
    if missing := [str(path) for path in paths if not path.exists() and not remove]:
        raise FileNotFoundError(f"no file or folder {missing[0]}")
    if remove:
        count = Index.open(place).remove(*paths)
        click.echo(json.dumps({"removed": count}) if as_json else f"removed {count:,} documents")
        return
    made = Index(place, model, tokens)
    with progress_bars() as show:
        report = made.add(
            *paths,
            metadata=pairs(metadata),
            encoding=encoding,
            progress=show,
            left_out=lambda line: click.echo(f"left out: {line}", err=True),
        )
    if as_json:
        click.echo(json.dumps(asdict(report) | {"documents": len(made.documents), "total_pieces": len(made)}))
        return
    done = [(report.added, "added"), (report.changed, "changed"), (report.removed, "removed")]
    done += [(report.unchanged, "unchanged"), (len(report.left_out), "left out")]
    said = ", ".join(f"{count:,} {what}" for count, what in done if count) or "nothing"
    click.echo(f"{said}; {len(made.documents):,} documents in {len(made):,} pieces in {place}")


def pairs(texts: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE, several times."""
    found = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not key.strip() or not sign or '"' in key:
            raise ValueError(f"{text!r} should be KEY=VALUE")
        found[key.strip()] = value.strip()
    return found
