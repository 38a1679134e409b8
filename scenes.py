"""What the `explain` task looks at: the state before an update, of a model or of a run, and what it is trained with."""

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from adapters import adapter_to_add
from ask import make_all_prompts
from checkpoint import Began, check_reference, newest_before, read_numbers, restore
from config import NO_UPDATE, Config
from device import prepare_device
from evaluation import tell_what_is_named
from files import read_rows
from folders import STATS
from loading import load_tokenizer, new_policy
from model import PolicyModel
from preflight import check_context, check_static_cache, prompt_room
from progress import tell
from prompts import Prompt, n_rollouts, pass_order
from provenance import check_same_rows, other_start
from report import RESPONSES
from run import load_models, load_start, source_of
from train import Fixed, Rollout, State, new_state


class Scene(NamedTuple):
    """Where an update begins; or where what it begins with can be had from, by the run's updates up to it."""

    state: State
    fixed: Fixed
    prompts: Sequence[Prompt]
    config: Config
    title: str
    note: str


def scene_of(config: Config, asked: list[dict], base_model: str, reward_model_path: str) -> Scene:
    """What the flags ask for: an update of a run, or a first one of a run's policy or of a model, on its data's prompts
    or on those that were given.
    """
    if config.output_dir:
        tell_what_is_named(config)
        for note in other_start(Path(config.output_dir)):
            tell(note)
    if config.update != NO_UPDATE:
        return scene_of_run(config, base_model, reward_model_path)
    if asked:
        policy, fixed, prompts, config = with_own_prompts(config, asked, base_model, reward_model_path)
    else:
        policy, fixed, prompts, config = with_data(config, base_model, reward_model_path)
    title, note = f"the first update of {base_model}", "The policy is its own reference, as before any update."
    if config.output_dir:
        policy = new_policy(config, config.output_dir, policy.device)
        title = f"an update of {config.output_dir}"
        note = "As the first of a run that begins with this policy: Adam is new, the learning rate the full one."
    check_static_cache(config, policy)
    return Scene(new_state(policy, config), fixed, prompts, config, title, note)


def with_data(
    config: Config, base_model: str, reward_model_path: str, began: Began | None = None
) -> tuple[PolicyModel, Fixed, Sequence[Prompt], Config]:
    """What a run begins with, the prompts of its data, and its settings with the number of its updates."""
    policy, fixed, prompts = load_models(config, base_model, reward_model_path, began)
    check_context(config, policy, *prompts)
    if config.update != NO_UPDATE:
        check_same_rows(Path(config.output_dir), source_of(prompts, base_model, config))
    return policy, fixed, prompts.train, replace(config, n_updates=n_rollouts(config, len(prompts.train)))


def with_own_prompts(
    config: Config, asked: list[dict], base_model: str, reward_model_path: str
) -> tuple[PolicyModel, Fixed, Sequence[Prompt], Config]:
    """What a run begins with, the prompts that were given, and settings by which they are the batch, in their order,
    and an epoch is one step of all of them.
    """
    batch = {"batch_size": len(asked), "gradient_accumulation_steps": math.ceil(len(asked) / config.mini_batch_size)}
    config = replace(config, task="explain", prompt_tokens=0, **batch)  # tokens: 0, as the prompts are whole
    device = prepare_device(config)
    tokenizer = load_tokenizer(base_model, adapter=adapter_to_add(config, base_model))
    policy, fixed = load_start(config, base_model, reward_model_path, tokenizer, device)
    prompts = make_all_prompts(asked, config, tokenizer, prompt_room(config, policy))
    order = pass_order(n=len(prompts), number_of_pass=0, seed=config.seed)  # by which `train` takes them
    return policy, fixed, [prompts[place] for place in order.argsort()], config


def scene_of_run(config: Config, base_model: str, reward_model_path: str) -> Scene:
    """A run at the newest of its checkpoints that is not after the update, or at its beginning where there is none:
    all random numbers are functions of the seed and the update's number, so that it goes on from there as it did.
    """
    run, number = Path(config.output_dir), config.update
    checkpoint = newest_before(run, number)
    any_checkpoint = checkpoint or newest_before(run, sys.maxsize)  # the same in all is what the run began with
    began = read_numbers(any_checkpoint)["began"] if any_checkpoint else None
    policy, fixed, prompts, config = with_data(config, base_model, reward_model_path, began)
    config = replace(config, n_updates=planned_updates(config).get(number, config.n_updates))
    state = new_state(policy, config)
    if began:
        check_reference(fixed.reference.language_model, began, run)
    if checkpoint:
        restore(state, checkpoint, config)
    since = number - state.next_update
    note = f"Recomputed from {checkpoint or 'the beginning of the run'}"
    if since:
        note += f", over {since} update{'s' * (since > 1)}"
    if since and not checkpoint:
        note += ", as no checkpoint is near"
    return Scene(state, fixed, prompts, config, f"update {number} of {run}", note + ".")


def planned_updates(config: Config) -> dict[int, int]:
    """How many updates the run at --output_dir was to have when it made each of them, by the learning rates that it
    logged: it may have been resumed with more.
    """
    planned = {}
    for row in read_rows(Path(config.output_dir) / STATS):
        number, rate = row["step"], row.get("learning_rate", 0)
        left = rate / config.learning_rate  # 1 - number / planned
        if number > 0 and 0 < left < 1:
            planned[number] = max(round(number / (1 - left)), number + 1)
    return planned


def compared_with_log(run: Path, rollout: Rollout, stats: dict[str, float], rows: Sequence[int]) -> str:
    """In a line, whether the responses, their scores and the update's statistics are those that the run has logged."""
    number = stats["step"]
    logged = logged_rows(run / RESPONSES, number)
    differences = []
    for row in rows:
        if row >= len(logged):
            differences.append(f"it has no row {row} of that update")
        elif rollout.texts[row] != logged[row]["response"]:
            differences.append(f"the response of row {row} was {logged[row]['response']!r}")
        elif rollout.raw_scores[row].item() != float(logged[row]["reward"]):
            differences.append(f"the score of row {row} was {logged[row]['reward']}")
    moved = differing_statistics(run, stats)
    if moved:
        more = f" ({len(moved) - 1} more of its statistics differ)" if len(moved) > 1 else ""
        differences.append(f"the update's {moved[0]}{more}")
    if differences:
        return f"It differs from what {run / RESPONSES} and {STATS} have: {'; '.join(differences)}."
    return f"Response, score and statistics are those of {run / RESPONSES} and {STATS}."


def differing_statistics(run: Path, stats: dict[str, float]) -> list[str]:
    """Those of an update that are not what the run has logged, but for the rounding of several processes."""
    [logged] = [row for row in read_rows(run / STATS) if row["step"] == stats["step"]]
    found = []
    for name, value in stats.items():
        before = logged.get(name, value)
        if repr(before) != repr(value) and not math.isclose(before, value, rel_tol=1e-4, abs_tol=1e-6):
            found.append(f"{name} was {before:.4g}, and is {value:.4g}")
    return found


def logged_rows(path: Path, number: int) -> list[dict]:
    """The rows of an update in the log of the responses; none where there is no log."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["step"] == str(number)]
