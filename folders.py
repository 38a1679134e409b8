"""Which folder is whose: each stage's, a new run's, the newest run's, that of a run to go on with."""

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from config import NO_UPDATE, TRAINING, Config, RunError, UsageError, to_json
from files import (
    MANIFEST,
    check_writable,
    clear_leftovers,
    described_files,
    flush,
    is_empty_folder,
    is_locked,
    locked,
    read_object,
    whole_lines,
    write_whole,
)
from progress import tell
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
    "system",
    "vocab_size",
    "context_length",
    "n_layer",
    "n_embd",
    "n_head",
    "n_reviews",
)
POLICY_MARKER = "value_head.safetensors"  # a folder that holds it holds a policy
STATS = "training_stats.jsonl"  # grows by a row an update
FINISHED = "training_stats.json"  # the same rows as a list, written when a run is over: it needs no resuming
OF_CONVERSATIONS = ("chat", "system")  # which whole texts have no use for
REWARD_COLUMNS = ("label_column", "chosen_column", "rejected_column")  # more of a reward model's data
TRAINED_BY = {
    "sft": ("completion_column", "sft_epochs", "sft_steps", "sft_batch_size", "sft_learning_rate"),
    "reward": ("reward_steps", "reward_batch_size", "reward_learning_rate"),
}
NOT_LENT = (  # what a command alone can say, be it in a run's settings or not
    "allow_pickle",
    "dry_run",
    "final_dir",
    "push_to_hub",
    "policies",
    "prompt",
    "prompts",
    "update",
    "row",
    "num_samples",
    "stop",
    "output",
    "without_reward",
)
KEPT_BACK = ("allow_pickle", "final_dir", "log_with", "push_to_hub")  # by which a run resumed could write elsewhere
COMPLETIONS_BY = ("prompt_tokens", "max_prompt_length", "max_new_tokens", "long_prompts")  # where answers are learned


def last_name(path: str | Path) -> str:
    """Of a place on this disk, what others may see: its own name, and not where it is."""
    return os.path.basename(os.path.abspath(path))


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
        data = last_name(config.dataset_path) if Path(config.dataset_path).exists() else config.dataset_path
        is_not = "It is not GPT-2."
    else:
        data = "generated movie reviews"
        is_not = "Nothing was downloaded; it is neither GPT-2 nor IMDB."
    return (
        f"This is a teaching demonstration: a language model of at most {parameters:,} parameters, trained here "
        f"from scratch on {data}. {is_not} GPT-2 on IMDB is\n"
        "    python main.py --task train --preset gpt2-imdb     (downloads about 2 GB)"
    )


def stage_folder(config: Config, stage: str) -> Path:
    """Where the language model (`sft`) or reward model (`reward`) trained here is, or will be."""
    if config.task == stage and config.output_dir:
        return Path(config.output_dir)
    return config.run_folder / stage


def new_stage_folder(config: Config) -> Path:
    """The folder of a stage that is about to be trained. Raises UsageError if it is there, or cannot be written."""
    folder = stage_folder(config, config.task)
    if folder.exists():
        raise UsageError(
            f"{folder} exists already; name another --output_dir, or move it away, so that nothing is overwritten"
        )
    check_writable(folder)
    return folder


def starting_model(config: Config) -> str:
    """The model that PPO starts from: the sft stage's where there is one or is to be one, else --base_model_name.

    Raises UsageError for an adapter to go on with, and no model that it is for.
    """
    if config.task in TRAINING and config.peft_model_path and config.trains_from_scratch:
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
        if not config.chosen_column:
            names = [name for name in names if name not in OF_CONVERSATIONS]
    if config.trains_from_scratch or (stage == "sft" and config.sft_first):  # else they are another command's
        names += TRAINED_BY[stage]
        if stage == "sft" and (config.completion_column or config.chat):
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
        folders = run_folders(name, preset)
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
                f"{problem} a run that was not finished, and no policy: --task train --resume goes on with it; with "
                "--eval_every it has the best so far"
            )
        raise UsageError(f"{problem} no trained run; run `python main.py --task train` first")
    return max(runs, key=lambda run: (run / marker).stat().st_mtime)


def run_folders(name: str, preset: str) -> list[Path]:
    """The folders of PPO runs under saved_models/: those of that name or preset, or all."""
    place = name.partition("{")[0] or f"{preset}*"
    return list(Path("saved_models").glob(f"{place}/**/ppo*"))


def is_ppo_run(folder: Path) -> bool:
    """Whether a folder is that of a PPO run, be it only begun; not a stage's, nor that of a best policy so far."""
    holds_a_model = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    return (folder / "run_config.json").exists() and ((folder / STATS).exists() or not holds_a_model)


def was_interrupted(run: Path) -> bool:
    """Whether a folder is that of a PPO run which was not finished, and which no process is at work on."""
    if not is_ppo_run(run) or (run / FINISHED).exists():
        return False
    return not is_locked(run)


def run_to_resume(output_dir: str, name: str, preset: str) -> Path:
    """The run to go on with: output_dir, or the newest of that name or preset, or of any, that was interrupted.

    Raises UsageError if there is none.
    """
    if output_dir:
        if not is_ppo_run(Path(output_dir)):
            raise UsageError(f"--resume: --output_dir {output_dir} holds no run of PPO that could go on")
        return Path(output_dir)
    runs = [folder for folder in run_folders(name, preset) if was_interrupted(folder)]
    if not runs:
        raise UsageError(
            "--resume: saved_models/ holds no run that was interrupted; one that is over is named by --output_dir, and "
            "goes on with a larger --n_updates"
        )
    return max(runs, key=lambda run: (run / "run_config.json").stat().st_mtime)


def how_to_resume(run: Path) -> str:
    """The command by which a run goes on, with what has to be given again."""
    command = f"python main.py --task train --resume --output_dir {shlex.quote(str(run))}"
    with suppress(UsageError):
        settings = read_object(run / "run_config.json")
        for name in KEPT_BACK:
            value = settings.get(name)
            if value:
                command += f" --{name}" if value is True else f" --{name} {shlex.quote(str(value))}"
    return command


def interrupted_runs(folder: Path) -> list[str]:
    """A sentence for each run in a folder that was interrupted: how far it came, and how to go on with it."""
    notes = []
    for run in sorted(folder.glob("ppo*")):
        if was_interrupted(run):
            done = len(whole_lines(run / STATS))
            with suppress(UsageError):  # of a damaged one there is nothing to go on with
                n_updates = read_object(run / "run_config.json").get("n_updates")
                notes.append(f"note: {run} was interrupted after {done} of {n_updates} updates: {how_to_resume(run)}")
    return notes


def is_of_a_run(settings: dict) -> bool:
    """Whether `explain` is asked about a run: one is named, or an update of one; or there is one that is over, and no
    other model is named.
    """
    if settings.get("output_dir") or settings.get("update", NO_UPDATE) != NO_UPDATE:
        return True
    if settings.get("base_model_name"):
        return False
    runs = run_folders(settings.get("run_name", ""), settings.get("preset", ""))
    return any((folder / POLICY_MARKER).exists() for folder in runs)


def run_settings(settings: dict) -> dict:
    """The settings of a run, as the base of the tasks that use it; takes its folder out of `settings`. Nothing
    where `explain` is asked about no run.

    The folder may have come from anywhere: raises UsageError for links out of it, and for a reward function that the
    task would run because the folder names it.
    """
    task = settings.get("task", "train")
    if task == "explain" and not is_of_a_run(settings):
        return {}
    folder = settings.pop("output_dir", "")
    if task == "train":
        run = run_to_resume(folder, name=settings.get("run_name", ""), preset=settings.get("preset", ""))
    else:
        name = settings.pop("run_name", "")
        preset = settings.pop("preset", "")
        marker = POLICY_MARKER
        if task == "plot":
            marker = STATS
            policies = settings.get("policies", ())
            if policies and not folder:
                _, folder = run_of(policies[0])
        if task == "explain" and settings.get("update", NO_UPDATE) != NO_UPDATE:
            marker = STATS
        run = newest_run(folder, name=name, preset=preset, marker=marker)
    check_links(run_above(run), "output_dir")
    own = read_object(run / "run_config.json")
    writes_rewards = settings.get("output") and not settings.get("without_reward")
    asks_reward = task in ("train", "evaluate", "explain") or writes_rewards
    if asks_reward and "reward_fn" not in settings and own.get("reward_fn"):
        check_function(str(own["reward_fn"]), run)
    kept_back = NOT_LENT
    if task == "train":
        kept_back = KEPT_BACK
        for name in kept_back:
            if own.get(name) and name not in settings:
                tell(f"note: --{name} {own[name]} of {run} has to be given again with --resume, if it is wanted still")
    return {name: value for name, value in own.items() if name not in kept_back} | {"output_dir": str(run)}


def check_final_dir(config: Config) -> None:
    """Raise UsageError if --final_dir is --output_dir, or holds anything but a policy put there before."""
    final = Path(config.final_dir)
    if final.exists():
        is_policy = (final / MANIFEST).exists() and not (final / "run_config.json").exists()
        can_be_filled = is_empty_folder(final) and final.resolve() != Path.cwd()
        if not is_policy and not can_be_filled:
            raise UsageError(f"--final_dir {final} holds something else than a final policy; name another folder")
    if config.output_dir and final.resolve() == Path(config.output_dir).resolve():
        raise UsageError("--final_dir is --output_dir, expected a folder of its own")


def check_can_be_resumed(run: Path, config: Config) -> None:
    """Raise UsageError if there is nothing to go on with in a run, or another process is at it."""
    if is_locked(run):
        raise UsageError(f"--resume: another process is at work on {run}")
    before = read_object(run / "run_config.json")
    grows = config.n_updates > before.get("n_updates", 0) or config.epochs > before.get("epochs", 0)
    if (run / FINISHED).exists() and not grows:
        raise UsageError(
            f"--resume: {run} is over, with {before.get('n_updates')} updates; a larger --n_updates goes on with it"
        )
    if (run / FINISHED).exists() and not any((run / "checkpoints").glob("step_*")):
        raise UsageError(f"--resume: {run} is over, and has no checkpoint to go on from (--keep_checkpoints)")


def new_ppo_folder(config: Config) -> Path:
    """The folder of a new PPO run: --output_dir, which must not hold one yet, or the first free ppo, ppo-2, ...; with
    --resume that of the run to go on with.

    Raises UsageError if --output_dir holds files already, --final_dir anything but a policy put there before, or if the
    folder could not be written.
    """
    if config.final_dir:
        check_final_dir(config)
    if config.resume:
        folder = Path(config.output_dir)
        check_can_be_resumed(folder, config)
    elif config.output_dir:
        folder = Path(config.output_dir)
        if was_interrupted(folder):
            raise UsageError(
                f"--output_dir {folder} holds a run that was interrupted; {how_to_resume(folder)} goes on with it, or "
                "name a new folder"
            )
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


def loading_line(loader: str, folder: Path, base: str) -> str:
    """The line of Python that loads what the folder holds.

    `loader` is a call on a place, `{}`; with an adapter in the folder, `base` is where the model under it is.
    """
    if base == str(folder):
        return loader.format("FOLDER")
    return f"peft.PeftModel.from_pretrained({loader.format(repr(base))}, FOLDER)"


def write_manifest(folder: Path, loader: str, base: str, **facts) -> None:
    """manifest.json: the `loading_line`, facts that loading needs, such as what a value head reads, and every file with
    its SHA-256.
    """
    hashes = {name: file["sha256"] for name, file in described_files(folder).items()}
    manifest = {"loads_with": loading_line(loader, folder, base), **facts, "sha256": hashes}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=2))


@contextmanager
def claimed(folder: Path, config: Config) -> Iterator[None]:
    """Have a run's folder to oneself while it is trained: a new one, with its settings and the notice in it, or the one
    that is resumed, with the settings as they are now and without what a dead process has begun.

    Raises RunError if another process has it. What fails before there is a row in the log leaves nothing.
    """
    was_there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error.strerror}") from None
    with locked(folder) as is_free:
        if config.resume and not is_free:
            raise RunError(f"--resume: another process has begun to work on {folder} meanwhile")
        if not is_free or not (config.resume or is_empty_folder(folder)):
            raise RunError(f"{folder} has been taken by another run meanwhile; start again")
        for place in (folder, folder / "checkpoints", folder / "plots"):
            clear_leftovers(place)
        flush(folder.parent)
        (folder / FINISHED).unlink(missing_ok=True)
        write_settings(folder, replace(config, resume=False))
        if config.reward_fn:
            remember_function(config.reward_fn)
        try:
            yield
        except BaseException:
            if not config.resume and not (folder / STATS).exists():
                leave_nothing(folder, was_there)
            raise


def leave_nothing(folder: Path, was_there: bool) -> None:
    """Empty the folder of a run that has come to nothing, and remove it if it was not there before."""
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
        else:
            shutil.rmtree(path)
    if not was_there:
        folder.rmdir()


def write_settings(folder: Path, config: Config) -> None:
    """Leave in a run's folder its settings, by which the tasks that use a run go, and the notice."""
    write_whole(folder / "run_config.json", to_json(config))
    text = notice(config)
    if text:
        write_whole(folder / "NOTICE.txt", text + "\n")
