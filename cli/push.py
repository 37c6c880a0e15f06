"""qoq push: a verified checkpoint onto the Hugging Face hub."""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click

from qoq.cli.output import common_options, note, print_json

# What a checkpoint consists of, beside licences. Anything else that lies in the folder is nobody's to publish.
UPLOADED = (
    *("*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja"),
    *("qoq_recipe.yaml", "qoq_report.json", "qoq_conversion.json", "README.md"),
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--message", default="Upload a W4A8KV4 checkpoint made by qoq", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Verify, say what would be uploaded, and stop.")
@common_options
def push(folder: Path, repo: str, private: bool, message: str, dry_run: bool, as_json: bool) -> None:
    """Verify checkpoint FOLDER and upload it to hub repository REPO (OWNER/NAME), which is made if need be."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    from qoq.errors import OutputError

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(f"{repo!r}: no name of a repository on the hub ({error})") from None
    files, left_out = contents(folder)
    note(f"{folder}: every tensor read, every group legal")
    for path in files:
        note(f"  {path.name:44}{path.stat().st_size / 2**20:12.2f} MiB")
    if left_out:
        note(f"not uploaded, as no part of a checkpoint: {', '.join(path.name for path in left_out)}")
    total = sum(path.stat().st_size for path in files)
    note(f"{len(files)} files, {total / 2**30:.2f} GiB, to {repo}{' (private)' if private else ''}")
    document: dict[str, Any] = {
        "folder": str(folder),
        "repo": repo,
        "private": private,
        "files": [path.name for path in files],
        "left_out": [path.name for path in left_out],
        "bytes": total,
        "url": None if dry_run else upload(folder, repo, files, private, message),
    }
    if as_json:
        print_json(document)
    elif not dry_run:
        click.echo(document["url"])


def contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files of a checkpoint that is whole, and what else lies in its folder.

    Raises:
        CheckpointError: something is wrong with it.
    """
    from qoq.errors import CheckpointError
    from qoq.model_card import LICENCE_FILES
    from qoq.verify import problems

    faults = problems(folder)
    if faults:
        more = f" (and {len(faults) - 1} more; see qoq inspect --verify)" if len(faults) > 1 else ""
        raise CheckpointError(f"nothing is uploaded: {faults[0]}{more}")
    if not (folder / "README.md").is_file():
        raise CheckpointError(f"nothing is uploaded: {folder} has no README.md, expected a model card")
    found = sorted(folder.iterdir())
    patterns = (*UPLOADED, *LICENCE_FILES)
    wanted = [path for path in found if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns)]
    return wanted, [path for path in found if path not in wanted]


def upload(folder: Path, repo: str, files: Sequence[Path], private: bool, message: str) -> str:
    """Upload files of a folder in one commit; returns where it is.

    Raises:
        OutputError: the hub, or the way to it, says no.
    """
    from huggingface_hub import HfApi

    from qoq.errors import OutputError, first_line

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if private and not api.repo_info(repo).private:  # the hub leaves one that exists as it is
            raise OutputError(f"{repo}: is public already, expected a private repository; nothing was uploaded")
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=[path.name for path in files], commit_message=message
        )
    except OutputError:
        raise
    except Exception as error:  # the hub client raises its own, httpx's and OSError
        raise OutputError(f"{repo}: the hub did not take it ({first_line(error)})") from None
    return str(commit.commit_url)
