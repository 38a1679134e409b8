"""What a run leaves on disk: folders that appear whole or not at all, and where each stage's folder is."""

import csv
import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from config import Config, RunError, UsageError, first_line, to_json
from trust import check_function, check_links, remember_function

# The settings that a stage's result depends on: its data and size, always, and how it was trained.
TRAINED_ON = (
    "base_model_name",
    "dataset_path",
    "dataset_config",
    "dataset_split",
    "prompt_column",
    "prompt_template",
    "chat",
    "vocab_size",
    "context_length",
    "n_layer",
    "n_embd",
    "n_head",
    "n_reviews",
)
POLICY_MARKER = "value_head.safetensors"  # a folder that holds it holds a policy
REWARD_COLUMNS = ("label_column", "chosen_column", "rejected_column")  # more of a reward model's data
TRAINED_BY = {
    "sft": ("completion_column", "sft_epochs", "sft_steps", "sft_batch_size", "sft_learning_rate"),
    "reward": ("reward_steps", "reward_batch_size", "reward_learning_rate"),
}
NOT_LENT = (  # what a command alone can say, be it in a run's settings or not
    "allow_pickle",
    "dry_run",
    "final_dir",
    "policies",
    "prompt",
    "prompts",
    "num_samples",
    "stop",
    "output",
    "without_reward",
)
COMPLETIONS_BY = ("prompt_tokens", "max_prompt_length", "max_new_tokens", "long_prompts")  # where answers are learned


def notice(config: Config) -> str:
    """What the models trained here are and are not, and the command for the real thing; empty for any other run."""
    if not config.trains_from_scratch:
        return ""
    width = config.n_embd
    embeddings = (config.vocab_size + config.context_length) * width
    layers = config.n_layer * (12 * width + 13) * width
    last_norm = 2 * width
    value_head = width + 1
    parameters = embeddings + layers + last_norm + value_head
    if config.dataset_path:
        data = config.dataset_path
        is_not = "It is not GPT-2."
    else:
        data = "generated movie reviews"
        is_not = "Nothing was downloaded; it is neither GPT-2 nor IMDB."
    return (
        f"This is a teaching demonstration: a language model of at most {parameters:,} parameters, trained here "
        f"from scratch on {data}. {is_not} GPT-2 on IMDB is\n"
        "    python main.py --task train --preset gpt2-imdb     (downloads about 2 GB)"
    )


def beside(path: Path) -> Path:
    """A name in the same folder for what is not finished; of a long name the first letters, so that it can be one."""
    return path.with_name(f".{path.name[:50]}.{os.getpid()}.unfinished")


@contextmanager
def whole_folder(path: Path, replaces: str = "") -> Iterator[Path]:
    """Yield a scratch folder that becomes `path` when the block ends well, and is removed when it does not.

    A folder that holds the file `replaces` gives way to it. Raises RunError naming the folder if it cannot be written.
    """
    scratch = beside(path)
    try:
        scratch.mkdir(parents=True)
        yield scratch
        mode = usual_mode()
        for file in scratch.rglob("*"):
            if file.is_file():
                with suppress(OSError):  # some file systems know no modes
                    file.chmod(mode)  # safetensors lets nobody else read what it writes
                flush_to_disk(file)
        if replaces and (path / replaces).exists():
            shutil.rmtree(path)
        scratch.rename(path)
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST):
            raise RunError(
                f"{path} was made by another run meanwhile; start again, and it is used if it fits"
            ) from None
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path} cannot be written: {reason}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def usual_mode() -> int:
    """The mode of a new file, as the user's umask has it, which can be read only by setting another."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def move_into(source: Path, target: Path) -> None:
    """Move a finished folder's files into an existing one, each by a rename, so that none is ever seen half-written."""
    for file in sorted(source.iterdir()):
        file.replace(target / file.name)
    source.rmdir()


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a file aside, text in UTF-8, flush it, and rename it: a reader sees the old file or the new one."""
    scratch = beside(path)
    try:
        scratch.write_bytes(text if isinstance(text, bytes) else text.encode())
        flush_to_disk(scratch)
        scratch.replace(path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        scratch.unlink(missing_ok=True)


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


def check_writable(folder: Path) -> None:
    """Raise UsageError unless the folder, or the nearest of its parents that exists, can be written."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UsageError(f"{folder} cannot be written: {existing} is not a folder that this user may write to")


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


def starting_model(config: Config) -> str:
    """The model that PPO starts from: the sft stage's where there is one or is to be one, else --base_model_name.

    Raises UsageError for an adapter to go on with, and no model that it is for.
    """
    if config.task == "train" and config.peft_model_path and config.trains_from_scratch:
        settings = Path(config.peft_model_path) / "adapter_config.json"
        own = read_object(settings).get("base_model_name_or_path") if settings.exists() else None
        raise UsageError(
            f"--peft_model_path {config.peft_model_path} is an adapter: "
            f"say what model it is for, --base_model_name {own or 'MODEL'}"
        )
    stage = stage_folder(config, "sft")
    from_stage = config.trains_from_scratch or config.sft_first or (stage.exists() and config.task != "sft")
    return str(stage) if from_stage else config.base_model_name


def as_flags(settings: dict) -> str:
    return " ".join(f"--{name} {value!r}" for name, value in settings.items())


def trained_stage(config: Config, path: str, stage: str) -> bool:
    """Whether the stage's folder is there. Raises UsageError if it was trained with settings other than these."""
    if not Path(path).exists():
        return False
    settings = Path(path) / "run_config.json"
    before = read_object(settings) if settings.exists() else {}
    names = list(TRAINED_ON)
    if stage == "reward":
        names += REWARD_COLUMNS
    if config.trains_from_scratch or (stage == "sft" and config.sft_first):  # else they are another command's
        names += TRAINED_BY[stage]
        if stage == "sft" and config.completion_column:
            names += COMPLETIONS_BY
    had = {}
    wanted = {}
    for name in names:
        value = getattr(config, name)
        if name in before and before[name] != value:
            had[name] = before[name]
            wanted[name] = value
    if had:
        raise UsageError(
            f"{path} was trained with {as_flags(had)}, and this run asks for {as_flags(wanted)}; "
            "give the flags that it has, or a --run_name of its own to this run"
        )
    return True


def run_of(entry: str) -> tuple[str, str]:
    """Name and folder of a run given as NAME=FOLDER, or as a folder alone, in whose own name there may be a `=`."""
    name, sign, folder = entry.partition("=")
    if sign and not Path(entry).is_dir():
        return name, folder
    return Path(entry).name, entry


def best_of(run: Path) -> Path:
    """Where a run keeps the best policy so far, until it ends."""
    return run / "checkpoints" / "best"


def run_above(folder: Path) -> Path:
    """The run whose best policy so far the folder is; any other folder is itself."""
    run = Path(os.path.normpath(folder / ".." / ".."))
    is_best = folder.resolve() == best_of(run).resolve() and (run / "run_config.json").exists()
    return run if is_best else folder


def policy_folder(path: str) -> str:
    """The folder of a run's policy: the best so far where training is not over. Any other path is itself."""
    best = best_of(Path(path))
    is_unfinished = (best / POLICY_MARKER).exists() and not (Path(path) / POLICY_MARKER).exists()
    return str(best) if is_unfinished else path


def newest_run(output_dir: str, name: str = "", preset: str = "", marker: str = POLICY_MARKER) -> Path:
    """The newest run that holds the file `marker`: output_dir or one in it, else one of that name or preset, or any.

    Where none of them is over, it is the newest of what they hold as their best so far. Raises UsageError if there is
    nothing.
    """
    if output_dir:
        own = Path(output_dir)
        if marker != POLICY_MARKER:
            own = run_above(own)  # which has the logs
        is_one = (own / marker).exists() or (best_of(own) / marker).exists()
        folders = [own] if is_one else list(own.glob("*"))
        problem = f"--output_dir {output_dir} holds"
    else:
        place = name.partition("{")[0] or f"{preset}*"
        folders = list(Path("saved_models").glob(f"{place}/**/ppo*"))
        problem = "saved_models/ holds"
        if preset:
            problem = f"--preset {preset}: {problem}"
        if name:
            problem = f"--run_name {name}: {problem}"
    runs = [folder for folder in folders if (folder / marker).exists()]
    runs = runs or [best_of(folder) for folder in folders if (best_of(folder) / marker).exists()]
    if not runs and output_dir and run_above(own) != own and (run_above(own) / marker).exists():
        raise UsageError(f"{problem} no policy any more: that run is over, and has it in {run_above(own)}")
    if not runs:
        if output_dir and (run_above(Path(output_dir)) / "run_config.json").exists():
            raise UsageError(
                f"{problem} a run that was not finished, and no policy: with --eval_every it has the best so far"
            )
        raise UsageError(f"{problem} no trained run; run `python main.py --task train` first")
    return max(runs, key=lambda run: (run / marker).stat().st_mtime)


def run_settings(settings: dict) -> dict:
    """The settings of a finished run, as the base of the tasks that use it; takes its folder out of `settings`.

    The folder may have come from anywhere: raises UsageError for links out of it, and for a reward function that the
    task would run because the folder names it.
    """
    folder = settings.pop("output_dir", "")
    name = settings.pop("run_name", "")
    preset = settings.pop("preset", "")
    marker = POLICY_MARKER
    if settings["task"] == "plot":
        marker = "training_stats.json"
        policies = settings.get("policies", ())
        if policies and not folder:
            _, folder = run_of(policies[0])
    run = newest_run(folder, name=name, preset=preset, marker=marker)
    check_links(run_above(run), "output_dir")
    own = read_object(run / "run_config.json")
    asks_reward = settings["task"] == "evaluate" or (settings.get("output") and not settings.get("without_reward"))
    if asks_reward and "reward_fn" not in settings and own.get("reward_fn"):
        check_function(str(own["reward_fn"]), run)
    return {name: value for name, value in own.items() if name not in NOT_LENT} | {"output_dir": str(run)}


def read_object(path: Path) -> dict:
    """The JSON object in a file. Raises UsageError if it is missing, unreadable, or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} cannot be read: it holds a {type(found).__name__}, expected an object")
    return found


def is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def check_final_dir(config: Config) -> None:
    """Raise UsageError if --final_dir is --output_dir, or holds anything but a policy put there before."""
    final = Path(config.final_dir)
    if final.exists():
        is_policy = (final / "manifest.json").exists() and not (final / "run_config.json").exists()
        can_be_filled = is_empty_folder(final) and final.resolve() != Path.cwd()
        if not is_policy and not can_be_filled:
            raise UsageError(f"--final_dir {final} holds something else than a final policy; name another folder")
    if config.output_dir and final.resolve() == Path(config.output_dir).resolve():
        raise UsageError("--final_dir is --output_dir, expected a folder of its own")


def new_ppo_folder(config: Config) -> Path:
    """The folder of a new PPO run: --output_dir, which must not hold one yet, or the first free ppo, ppo-2, ...

    Raises UsageError if --output_dir holds files already, --final_dir anything but a policy put there before, or if the
    folder could not be written.
    """
    if config.final_dir:
        check_final_dir(config)
    if config.output_dir:
        folder = Path(config.output_dir)
        if folder.exists() and not is_empty_folder(folder):
            raise UsageError(f"--output_dir {folder} is not empty; name a new folder, so that nothing is overwritten")
    else:
        folder = config.run_folder / "ppo"
        number = 1
        while folder.exists():
            number += 1
            folder = config.run_folder / f"ppo-{number}"
    check_writable(folder)
    return folder


def write_manifest(folder: Path, loader: str, base: str, critic: str) -> None:
    """manifest.json: the line of Python that loads what the folder holds, what its value head reads, and every file
    with its SHA-256.

    `loader` is a call on a place, `{}`; with an adapter in the folder, `base` is where the model under it is.
    """
    loads_with = loader.format("FOLDER")
    if base != str(folder):
        loads_with = f"peft.PeftModel.from_pretrained({loader.format(repr(base))}, FOLDER)"
    hashes = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            hashes[file.relative_to(folder).as_posix()] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest = {"loads_with": loads_with, "critic": critic, "sha256": hashes}
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=2))


def claim_folder(folder: Path, config: Config) -> None:
    """Make a run's folder, with its settings and the notice in it.

    Raises RunError if another run has put something there since its name was chosen.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error.strerror}") from None
    if any(folder.iterdir()):
        raise RunError(f"{folder} has been taken by another run meanwhile; start again")
    write_settings(folder, config)
    if config.reward_fn:
        remember_function(config.reward_fn)


def write_settings(folder: Path, config: Config) -> None:
    """Leave in a run's folder its settings, by which the tasks that use a run go, and the notice."""
    write_whole(folder / "run_config.json", to_json(config))
    text = notice(config)
    if text:
        write_whole(folder / "NOTICE.txt", text + "\n")
