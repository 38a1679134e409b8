"""The command line: parse, seed, run the stages a task needs, dispatch."""

import os
import sys

if __name__ == "__main__":
    import _signal  # `signal` itself takes as long to import as Python to start

    def stop_at_once(*_) -> None:
        os.write(2, b"error: interrupted\n")
        os._exit(130)

    is_interruptible = _signal.getsignal(_signal.SIGINT) is not _signal.SIG_IGN  # as of a job in the background
    if is_interruptible:
        _signal.signal(_signal.SIGINT, stop_at_once)  # until there is something to put in order

import signal
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait collapse on a shared core
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # but some microseconds of it halve sampling's time with a small model
os.environ.setdefault("USE_HUB_KERNELS", "NO")  # they are code, that transformers may fetch without a word
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # kernels kept, one a shape, some with 9 MB of room

from arguments import parse_args
from config import USES_A_RUN, Config, RunError, UsageError, describe
from files import clear_leftovers, file_and_name, format_of
from folders import (
    interrupted_runs,
    new_ppo_folder,
    new_stage_folder,
    notice,
    run_above,
    run_settings,
    stage_folder,
    starting_model,
)
from progress import say, tell, visible

N_PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says; see distributed.py
PROCESS = int(os.environ.get("RANK", 0)) if N_PROCESSES > 1 else 0  # this one's number

OUT_OF_MEMORY = (
    "out of memory; less is needed with a smaller --mini_batch_size (and a larger --gradient_accumulation_steps), "
    "--max_new_tokens or --max_prompt_length, or with --gradient_checkpointing"
)


def run(config: Config) -> None:
    """Run one task. Each task's modules are imported in its branch, so that --help does not wait for torch."""
    if config.dry_run:
        sys.dont_write_bytecode = True  # a reward function is not compiled beside itself
    check_processes(config)
    base_model, reward_model = starting_model(config), config.reward_model_path or str(stage_folder(config, "reward"))
    if config.task not in USES_A_RUN:
        return run_training(config, base_model, reward_model)
    if config.output_dir:
        tell(f"using {config.output_dir}")
    if config.task == "explain":
        return run_explain(config, base_model, reward_model)
    if config.task == "generate":
        from ask import generate

        begin()
        return generate(config, reward_model)
    from plot import plot, show_comparison

    if config.task == "plot":
        begin()
        return plot(Path(config.output_dir), notice(config), config.policies, config.dry_run)
    from evaluation import evaluate

    begin()
    evaluate(config, base_model, reward_model)
    if not config.dry_run:
        show_comparison(run_above(Path(config.output_dir)), notice(config))


def begin() -> None:
    """Let an interruption be raised where the work is, which puts in order what it has begun. It is not raised among
    imports, some of which drop it and go on.
    """
    if __name__ == "__main__" and is_interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def check_files(config: Config) -> None:
    """Raise UsageError for a file that is not here, at once: what reads it waits for torch."""
    if config.dataset_path:
        format_of(config.dataset_path)
    if config.reward_fn and config.task == "train":
        file_and_name(config.reward_fn)


def run_training(config: Config, base_model: str, reward_model: str) -> None:
    """The task sft, reward or train, and before it the stages whose folders are not there yet."""
    check_files(config)
    folder = new_ppo_folder(config) if config.task == "train" else new_stage_folder(config)
    begins_a_run = config.task == "train" and not config.resume
    others = interrupted_runs(config.run_folder) if begins_a_run else []
    print(*filter(None, [notice(config), describe(config), *others]), sep="\n")
    import torch

    from distributed import from_first, processes
    from prompts import with_prompt_column
    from push import check_push, push
    from run import run_ppo
    from trackers import check_tracker

    if PROCESS == 0:
        check_push(config, base_model)
        if config.task == "train":
            check_tracker(config, folder)
    begin()
    if PROCESS == 0 and not config.dry_run:
        clear_leftovers(config.run_folder)
        if config.task == "train" and config.final_dir:
            final = Path(config.final_dir).absolute()
            clear_leftovers(final.parent, final.name)
    with processes():
        config = with_prompt_column(config)
        missing = from_first(partial(run_stages, config, base_model, reward_model))
        if config.task == "train" and missing:
            print(
                f"dry run: {folder} would be the run; nothing was trained or written, and without "
                f"{' and '.join(missing)} the start-up invariants, the room for the longest prompt and a rollout's "
                "rewards are not checked"
            )
        elif config.task == "train":
            torch.manual_seed(config.seed)
            run_ppo(config, base_model, reward_model, folder)
    if config.push_to_hub and PROCESS == 0 and not config.dry_run:
        push(folder, config.push_to_hub)


def run_explain(config: Config, base_model: str, reward_model: str) -> None:
    """The task explain, and before it, where it is of no run, the stages that `train` would begin with. On standard
    output is the table alone.
    """
    import torch

    from explain import asked_rows, explain, training_config
    from prompts import with_prompt_column

    rows = asked_rows(config)
    config = training_config(config)
    begin()
    with redirect_stdout(sys.stderr):
        missing = []
        if not config.output_dir:
            print(*filter(None, [notice(config), describe(config)]), sep="\n")
            config = with_prompt_column(config)
            missing = run_stages(config, base_model, reward_model)
        torch.manual_seed(config.seed)  # as before a run's first update
        text = explain(config, rows, base_model, reward_model) if not missing else ""
    print(text or f"dry run: without {' and '.join(missing)} there is no update to look at\n", end="")


def run_stages(config: Config, base_model: str, reward_model: str) -> list[str]:
    """The stages sft and reward, where they are the task, or come before it and are not there yet; the models that are
    still missing, as a dry run trains none.
    """
    import torch

    from classifier import run_reward
    from preflight import check_before_training
    from provenance import overlaps_of_named, usable_stage
    from reward import needs_reward_model
    from sft import run_sft

    wants_reward = config.task == "train" and needs_reward_model(config) and not config.reward_model_path
    trains_reward = config.task == "reward" or (wants_reward and not usable_stage(config, reward_model, "reward"))
    check_before_training(config, trains_reward)
    for note in overlaps_of_named(config):
        say(note)
    wants_model = base_model == str(stage_folder(config, "sft"))
    trains_model = config.task == "sft" or (wants_model and not usable_stage(config, base_model, "sft"))
    for path in [base_model] * trains_model + [reward_model] * trains_reward:
        if config.task == "train" and config.resume:
            print(f"note: {path} is not there, as seen from this folder, and is trained again")
    if trains_model:
        torch.manual_seed(config.seed)  # for every stage, so that its result does not hang on those before it
        run_sft(config)
    missing = [base_model] if trains_model and config.dry_run else []
    if trains_reward and missing:
        print(f"dry run: {reward_model} would be a reward model of {base_model}; its data alone can be checked now")
    elif trains_reward:
        torch.manual_seed(config.seed)
        run_reward(config, base_model)
    return missing + ([reward_model] if trains_reward and config.dry_run else [])


def check_processes(config: Config) -> None:
    """Raise UsageError for what several processes cannot do together."""
    if N_PROCESSES == 1:
        return
    if config.task != "train":
        raise UsageError(
            f"--task {config.task} is work for one process, and torchrun has started {N_PROCESSES}; "
            f"expected python main.py --task {config.task} ..., or --task train"
        )
    if config.batch_size < N_PROCESSES:
        raise UsageError(
            f"--batch_size {config.batch_size} leaves some of the {N_PROCESSES} processes without a prompt; "
            f"expected {N_PROCESSES} at least, or fewer processes (torchrun --nproc_per_node)"
        )


@contextmanager
def heard_once() -> Iterator[None]:
    """Of several processes, which all would say the same, let the first alone be heard; errors come after the block."""
    if PROCESS == 0:
        yield
        return
    with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        yield


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 for a request that cannot be met and 1 for work that failed, with one sentence on standard error.

    As in a shell, 128 and the signal's number for an interruption, and for a reader of the output that has gone away.
    """
    try:
        with heard_once():
            run(parse_args(arguments, run_settings))
        sys.stdout.flush()  # here a full disk can still be told
        return 0
    except (UsageError, RunError) as error:
        message, exit_code = str(error), error.exit_code
    except (MemoryError, RuntimeError) as error:
        shortage = ("out of memory", "can't allocate memory", "not enough memory")
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in shortage):
            raise
        message, exit_code = OUT_OF_MEMORY, 1
    except BrokenPipeError:
        return 141  # 128 and SIGPIPE, which not every system has
    except OSError as error:
        if error.errno is None:  # a library's own, and no answer of the system
            raise
        place = error.filename or "standard output, a file or a folder cannot be used"  # of a stream no name is given
        message, exit_code = f"{place}: {error.strerror}", 1
    except KeyboardInterrupt:
        message, exit_code = "interrupted", 128 + signal.SIGINT
    with suppress(OSError):
        who = f"error in process {PROCESS}" if PROCESS else "error"
        print(f"{who}: {visible(message, keep='')}\n", end="", file=sys.stderr)  # at once, as others may write there
    return exit_code


def open_streams() -> None:
    """What is printed in letters that the output's encoding lacks is written as an escape; a stream that is closed is
    the null device, lest the next file that is opened takes its place and what is printed goes into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Have the interpreter not try again, at its end, to write what could not be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # ValueError of one that a reward function has closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    open_streams()
    exit_code = main()
    if is_interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to be put in order
    close_streams()
    sys.exit(exit_code)
