"""`hf-compress push` and `hf-compress verify`: models on their way to others, and what came of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_compress.cli.app import app
from hf_compress.cli.output import console, quiet_libraries

Directory = Annotated[Path, typer.Argument(help="A directory with a saved model.", show_default=False)]


@app.command()
def push(
    directory: Directory,
    repo_id: Annotated[str, typer.Argument(help='"name" or "namespace/name".', show_default=False)],
    private: Annotated[bool | None, typer.Option(help="Of a new repository.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="A branch; made where it does not exist.")] = None,
    commit_message: Annotated[str | None, typer.Option("--message", help="Title of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--pull-request", help="Open one instead of committing.")] = False,
    portable: Annotated[bool, typer.Option(help="For trust_remote_code=True where the plugin is needed.")] = False,
) -> None:
    """Put a saved model on the Hub, in one commit.

    It is loaded and compared first. Log in with `hf auth login`, or set HF_TOKEN.
    """
    from huggingface_hub import ModelCard

    from hf_compress.cli.loading import load_model
    from hf_compress.evaluation.processors import load_processor
    from hf_compress.report.card_loading import for_the_hub
    from hf_compress.report.history import read_report
    from hf_compress.storage.hub import push_to_hub
    from hf_compress.storage.manifest import CARD_FILE

    quiet_libraries()
    path = directory / CARD_FILE
    card = ModelCard.load(path) if path.exists() else None  # edited, perhaps
    if card is not None and "/" in repo_id:
        card = for_the_hub(card, directory.resolve().name, repo_id)
    commit = push_to_hub(
        load_model(str(directory), device="cpu"),
        repo_id,
        load_processor(str(directory)),
        report=read_report(directory),
        card=card,
        portable=portable,
        private=private,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    console().print(f"Pushed to {commit.pr_url or commit.commit_url}", markup=False)


@app.command()
def verify(directory: Directory) -> None:
    """Check that a saved model's files are those that were written.

    Reads every file and loads none. Exit code 2: a file is missing, changed, or one too many.
    """
    from hf_compress.storage.manifest import verify_files

    files = verify_files(directory)
    console().print(f"{len(files)} files are as they were written", style="green")
