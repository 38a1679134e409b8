"""What a run leaves on disk: folders that appear whole or not at all, and where each stage's folder is."""

import csv
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from config import Config, RunError, UsageError


def notice(config: Config) -> str:
    """What the models trained here are and are not, and the command for the real thing; empty for any other run."""
    if not config.trains_from_scratch:
        return ""
    width = config.n_embd
    layers = config.n_layer * (12 * width + 13) * width
    parameters = (config.vocab_size + config.context_length + 2) * width + layers + width + 1  # with the value head
    data = config.dataset_path or "generated movie reviews"
    is_not = "It is not GPT-2." if config.dataset_path else "Nothing was downloaded; it is neither GPT-2 nor IMDB."
    return (
        f"This is a teaching demonstration: a language model of at most {parameters:,} parameters, trained here "
        f"from scratch on {data}. {is_not} GPT-2 on IMDB is\n"
        "    python main.py --task train --preset gpt2-imdb     (downloads about 2 GB)"
    )


@contextmanager
def whole_folder(path: Path, replaces: str = "") -> Iterator[Path]:
    """Yield a scratch folder that becomes `path` when the block ends well, and is removed when it does not.

    A folder that holds the file `replaces` gives way to it. Raises RunError naming the folder if it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        for file in scratch.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        if replaces and (path / replaces).exists():
            shutil.rmtree(path)
        scratch.rename(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def move_into(source: Path, target: Path) -> None:
    """Move a finished folder's files into an existing one, each by a rename, so that none is ever seen half-written."""
    for file in sorted(source.iterdir()):
        file.replace(target / file.name)
    source.rmdir()


def write_whole(path: Path, text: str) -> None:
    """Write a text file aside, flush it, and rename it: a reader sees the old file or the new one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        scratch.write_text(text, encoding="utf-8")
        flush_to_disk(scratch)
        scratch.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from None


def write_table(path: Path, rows: list[dict], columns: list[str] | None = None) -> None:
    """Write rows as a CSV file, whole, with a heading: every column of the first row, or the given ones of them."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns or list(rows[0]), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, buffer.getvalue())


def flush_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def stage_folder(config: Config, stage: str) -> Path:
    """Where the language model (`sft`) or reward model (`reward`) trained here is, or will be."""
    if config.task == stage and config.output_dir:
        return Path(config.output_dir)
    return config.run_folder / stage


def new_stage_folder(config: Config) -> Path:
    """The folder of a stage that is about to be trained. Raises UsageError if it is there, or cannot be written."""
    folder = stage_folder(config, config.task)
    if folder.exists():
        raise UsageError(f"{folder} exists already; name another --output_dir, so that nothing is overwritten")
    check_writable(folder)
    return folder


def trained_stage(config: Config, path: str, stage: str) -> bool:
    """Whether the stage's folder is there. Raises UsageError if it was trained with settings other than these."""
    settings = Path(path) / "run_config.json"
    if not Path(path).exists():
        return False
    before = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    shared = (
        "base_model_name",
        "dataset_path",
        "dataset_split",
        "prompt_column",
        "prompt_template",
        "vocab_size",
        "context_length",
        "n_layer",
        "n_embd",
        "n_head",
        "n_reviews",
    )
    names = [*shared, "label_column", "chosen_column", "rejected_column"] if stage == "reward" else [*shared]
    if config.trains_from_scratch or (stage == "sft" and config.sft_first):  # else they are another command's
        stages = [spec.name for spec in dataclasses.fields(config) if spec.metadata["group"] == "stages"]
        names += [name for name in stages if name.startswith(f"{stage}_") and name != "sft_first"]
        names += ["completion_column"] * (stage == "sft")
    other = [name for name in names if before.get(name, getattr(config, name)) != getattr(config, name)]
    if other:
        flags = " ".join(f"--{name} {before[name]!r}" for name in other)
        wanted = " ".join(f"--{name} {getattr(config, name)!r}" for name in other)
        raise UsageError(
            f"{path} was trained with {flags}, and this run asks for {wanted}; give the flags that it has, "
            "or a --run_name of its own to this run"
        )
    return True


def new_ppo_folder(config: Config) -> Path:
    """The folder of a new PPO run: --output_dir, which must not hold one yet, or the first free ppo, ppo-2, ...

    Raises UsageError if --output_dir holds files already, --final_dir anything but a policy put there before, or if the
    folder could not be written.
    """
    final = Path(config.final_dir)
    if config.final_dir and final.exists():
        is_policy = (final / "manifest.json").exists() and not (final / "run_config.json").exists()
        if not is_policy and (not final.is_dir() or any(final.iterdir()) or final.resolve() == Path.cwd()):
            raise UsageError(f"--final_dir {final} holds something else than a final policy; name another folder")
    if config.final_dir and config.output_dir and final.resolve() == Path(config.output_dir).resolve():
        raise UsageError("--final_dir is --output_dir, expected a folder of its own")
    if config.output_dir:
        folder = Path(config.output_dir)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"--output_dir {folder} is not empty; name a new folder, so that nothing is overwritten")
    else:
        names = ["ppo", *(f"ppo-{number}" for number in range(2, 10_000))]
        folder = next(config.run_folder / name for name in names if not (config.run_folder / name).exists())
    check_writable(folder)
    return folder


def claim_folder(folder: Path) -> None:
    """Make a run's folder. Raises RunError if another run has put something there since its name was chosen."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error.strerror}") from None
    if any(folder.iterdir()):
        raise RunError(f"{folder} has been taken by another run meanwhile; start again")


def check_writable(folder: Path) -> None:
    """Raise UsageError unless the folder, or the nearest of its parents that exists, can be written."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"{folder} cannot be written: {existing} is not a folder that this user may write to")
