"""`--push_to_hub`: what a task has made goes into a repository of the user's on the Hub, which is private if it is new.

Whether that can be is asked before any work, and nothing is made there until there is something to put into it.
"""

import glob
import shlex
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, disable_progress_bars, validate_repo_id

from adapters import base_of
from card import CARD, RELIABILITY_FIGURE, TRAINING_FIGURE
from config import Config, RunError, UsageError, first_line
from files import MANIFEST, read_object
from folders import stage_folder
from hub import hub_error, one_sentence


def check_push(config: Config, base_model: str) -> None:
    """Raise UsageError if --push_to_hub could not be done: for a name that is none, where nobody is logged in or may
    write there, where there are files already, and for an adapter of a model that nobody else has.
    """
    name = config.push_to_hub
    if not name:
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UsageError(
            f"--push_to_hub {name!r} can name no repository, expected NAME or OWNER/NAME of letters, digits, -, _ and ."
        ) from None
    check_base_is_public(config, base_model)
    if hub_error():
        raise UsageError(f"--push_to_hub {name}: {hub_error()}")
    with one_sentence(f"--push_to_hub {name} cannot be used"):
        check_is_empty(repository(name))


def adapted_base(config: Config, base_model: str) -> str:
    """The model that the result is to be an adapter of, which alone is saved; "" for a whole model."""
    if config.trains_from_scratch and config.task != "train":
        return ""
    start = base_model
    if start == str(stage_folder(config, "sft")) and not Path(start).exists() and config.base_model_name:
        start = config.base_model_name  # what the stage to come will be an adapter of, too
    base = base_of(start)
    is_adapted = config.has_adapter or base != start
    rounds = config.load_in_8bit or config.load_in_4bit or config.dtype != "float32"
    saves_whole = not rounds if config.task == "reward" else config.merge
    return base if is_adapted and not saves_whole else ""


def check_base_is_public(config: Config, base_model: str) -> None:
    """Raise UsageError where an adapter alone would be uploaded, of a model that is on this disk."""
    base = adapted_base(config, base_model)
    if base and (Path(base).is_dir() or base == str(stage_folder(config, "sft"))):
        way = "weights in float32" if config.task == "reward" else "--merge"
        raise UsageError(
            f"--push_to_hub {config.push_to_hub} would get an adapter of {base}, a folder that nobody else has: "
            f"expected {way}, by which the whole model is saved, or a --base_model_name of the Hub"
        )


def repository(name: str) -> str:
    """OWNER/NAME, of the user where no owner is named. Raises UsageError if nobody is logged in, or may not write."""
    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        user = api.whoami()
    except LocalTokenNotFoundError:
        raise UsageError(
            f"--push_to_hub {name}: nobody is logged in to {constants.ENDPOINT}; run `hf auth login`, or set HF_TOKEN"
        ) from None
    owner, _, own_name = name.rpartition("/")
    owner = owner or user["name"]
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UsageError(
            f"--push_to_hub {name}: {user['name']} is logged in with a token that may only read; run `hf auth login` "
            "with one that may write"
        )
    readers = [each["name"] for each in user.get("orgs", []) if each.get("roleInOrg") == "read"]
    writers = [user["name"], *(each["name"] for each in user.get("orgs", []) if each["name"] not in readers)]
    if owner not in writers:
        raise UsageError(
            f"--push_to_hub {name}: {user['name']} is logged in, who may not write there; expected one of "
            f"{', '.join(f'{writer}/{own_name}' for writer in writers)}"
        )
    return f"{owner}/{own_name}"


def check_is_empty(repo: str) -> None:
    """Raise UsageError for a repository that holds something: nothing that is there is written over."""
    try:
        files = HfApi(endpoint=constants.ENDPOINT).list_repo_files(repo)
    except RepositoryNotFoundError:
        return
    found = [file for file in files if file != ".gitattributes"]  # which every one has
    if found:
        others = f" and {len(found) - 1} other files" if found[1:] else ""
        raise UsageError(
            f"--push_to_hub {repo} holds {found[0]}{others} already; name a new repository, or an empty one, so that "
            "nothing is overwritten"
        )


def public_files(folder: Path) -> list[str]:
    """The files of a folder that are uploaded: those of its manifest (model, tokenizer, value head), the card with its
    figure. Not the state of the run, nor its logs and settings, nor what is known of its rows.
    """
    names = [*read_object(folder / MANIFEST)["sha256"], MANIFEST, CARD]
    figures = [name for name in (TRAINING_FIGURE, RELIABILITY_FIGURE) if (folder / name).exists()]
    return sorted([*names, *figures])


def push(folder: Path, name: str) -> None:
    """Upload a finished folder, and print where it is.

    Raises RunError, which says how it is done again, where that fails: what has been trained is in the folder.
    """
    files = public_files(folder)
    if sys.stderr is None or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        repo = repository(name)
        check_is_empty(repo)
        api = HfApi(endpoint=constants.ENDPOINT)
        url = api.create_repo(repo, private=True, exist_ok=True)
        patterns = [glob.escape(file) for file in files]
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=patterns, commit_message="Upload the model")
    except Exception as error:  # whatever the library's HTTP client raises
        again = by_hand(folder, name, files)
        raise RunError(f"{folder} is done, and its upload failed ({first_line(error)}); try again: {again}") from None
    print(f"uploaded: {url}")


def by_hand(folder: Path, name: str, files: list[str]) -> str:
    """The command of the Hub's library that uploads the same files."""
    included = " ".join(f"--include {shlex.quote(file)}" for file in files)
    return f"hf upload {name} {shlex.quote(str(folder))} . --private {included}"
