"""The run around the loop: preflight, `train` with everything that is logged of it, and what came of it, saved.

The algorithm is in train.py; nothing here changes what it computes.
"""

import math
import shlex
import shutil
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

import report
from checkpoint import best_of, claim_folder, move_into, notice
from config import Config, RunError, UsageError, first_line, template_fields
from device import prepare_device
from evaluation import compare, evaluate_policy
from loading import (
    load_policy,
    load_reference,
    load_tokenizer,
    merged,
    new_policy,
    one_sentence,
    save_policy,
)
from model import PolicyModel
from plot import plot_training, reward_difference, sample_pairs
from preflight import (
    check_context,
    check_invariants,
    count_parameters,
    gap_of_policies,
    is_close,
    memory_estimate,
    show_samples,
    tolerance,
)
from progress import progress, say
from prompts import Prompt, asked, batch_arithmetic, batch_of, load_all_prompts, n_rollouts
from provenance import Source, columns_read, write_record
from reward import load_reward_terms
from train import Best, Fixed, State, collect_rollout, learning_rate, new_state, train


class Prompts(NamedTuple):
    """To train on, to choose a policy by, and to judge it by: what chooses a policy cannot judge it."""

    train: list[Prompt]
    validation: list[Prompt]
    held_out: list[Prompt]


def run_ppo(config: Config, base_model: str, reward_model_path: str, folder: Path) -> None:
    """The `train` task: preflight, start-up invariants, n_updates of PPO, what came of it, and everything saved."""
    policy, fixed, prompts = load_models(config, base_model, reward_model_path)
    config = replace(config, n_updates=n_rollouts(config, len(prompts.train)))
    check_context(config, policy, prompts.train + prompts.validation + prompts.held_out)
    say_what_will_run(config, policy, base_model, len(prompts.train))
    first = batch_of(prompts.train, config.batch_size, 0, config.seed)
    gap = check_invariants(policy, fixed, first, config)
    print(
        f"start-up invariants hold: sampling = scoring (to {gap.mean:.1g} nats a token, {gap.most:.1g} at most), "
        "ratio = 1, KL to the reference = 0, more padding = the same, no dropout"
    )
    if config.merge and hasattr(policy.language_model, "merge_and_unload"):
        with one_sentence("--merge cannot fold this adapter in"):
            merged(policy.language_model)
    if config.dry_run:
        show_samples(collect_rollout(policy, fixed, first, config, update_number=0))
        return print(f"dry run: {folder} would be the run; nothing was trained or written")
    state = new_state(policy, config)
    run_updates(state, fixed, prompts, config, folder)
    if state.best:
        policy.load_state_dict(state.best.weights, strict=False)
        reward = f"a reward of {state.best.reward:.3f} on validation prompts"
        print(f"the policy of update {state.best.update} is kept, with {reward}")
    save_result(policy, fixed, config, folder)
    del state  # the moments of Adam leave room for the policy that is loaded again
    check_saved(policy, fixed, prompts.held_out, config, folder)
    show_result(policy, fixed, prompts.held_out, config, folder)


def load_models(config: Config, base_model: str, reward_model_path: str) -> tuple[PolicyModel, Fixed, Prompts]:
    """The policy, what it is held to and rewarded by, and the prompts."""
    device = prepare_device(config)
    tokenizer = load_tokenizer(base_model, adapter=config.peft_model_path)
    prompts = Prompts(*load_all_prompts(config, tokenizer))
    policy = new_policy(config, base_model, device)
    terms = load_reward_terms(config, reward_model_path, device, policy.separator)
    fixed = Fixed(reference=load_reference(config, base_model, policy), tokenizer=tokenizer, terms=terms)
    return policy, fixed, prompts


def source_of(prompts: Prompts, policy: PolicyModel, config: Config) -> Source:
    """What the run is made from."""
    rows = [prompt.row for prompt in prompts.train]
    held_out = [prompt.row for prompt in prompts.held_out]
    return Source(columns_read(config, rows[0]), rows, held_out, start=policy.language_model.name_or_path)


def say_what_will_run(config: Config, policy: PolicyModel, base_model: str, n_prompts: int) -> None:
    """Print what trains, on what, in which batches, and what memory it is likely to need."""
    precision = torch.get_float32_matmul_precision()
    print(f"{base_model}: {count_parameters(policy)}, on {policy.device}, float32 products: {precision}")
    print(batch_arithmetic(config, n_prompts))
    print(memory_estimate(config, policy))


def run_updates(state: State, fixed: Fixed, prompts: Prompts, config: Config, folder: Path) -> None:
    """Train, and log every update as it ends, into a folder that is claimed with the first of them."""
    log, timings, announced = [], [], set()
    started = time.perf_counter()
    with progress(config.n_updates, "PPO", "update") as advance:
        for rollout, stats in train(state, fixed, prompts.train, config):
            number = state.next_update - 1
            if not math.isfinite(stats["loss"]):
                raise RunError(f"the loss is {stats['loss']} at update {number}; try a lower --learning_rate")
            if number == 0:
                claim_folder(folder, config)
                write_record(folder, source_of(prompts, state.policy, config))
            row = {"step": number, **report.rollout_stats(rollout), **stats}
            row["learning_rate"] = learning_rate(config, number)
            log.append(row)
            raised = report.alarms(log, config.batch_size)
            row["alarms"] = list(raised.values())
            for name in [name for name in raised if name not in announced]:
                say(f"alarm at update {number}: {raised[name]}")
            announced |= raised.keys()
            timings.append(report.timing(number, started, rollout))
            if is_time_to_evaluate(config, state.next_update):
                row["eval_reward"] = keep_best(state, fixed, prompts.validation, config, best_of(folder))
            report.write_logs(folder, log, timings, report.log_rows(number, rollout))
            advance(report.bar_numbers(row))
            started = time.perf_counter()
    for alarm in log[-1]["alarms"]:
        print(f"alarm at the end: {alarm}")


def is_time_to_evaluate(config: Config, n_updates: int) -> bool:
    """Every --eval_every updates, and after the last one."""
    return config.eval_every > 0 and (n_updates % config.eval_every == 0 or n_updates == config.n_updates)


def keep_best(state: State, fixed: Fixed, prompts: list[Prompt], config: Config, folder: Path) -> float:
    """The policy's mean reward on held-out prompts. The best so far is noted in the state, and saved in `folder` in
    place of the one before, for the case that the run does not live to its end.
    """
    table = evaluate_policy(state.policy, fixed, prompts, config)
    reward = fmean(row["reward"] for row in table)
    if state.best is None or not reward <= state.best.reward:  # so that NaN is not kept
        save_policy(state.policy, fixed.tokenizer, folder, replaces="manifest.json", settings=config)
        trained = {name: p.detach().clone() for name, p in state.policy.named_parameters() if p.requires_grad}
        state.best = Best(reward=reward, update=state.next_update - 1, weights=trained)
    return reward


def save_result(policy: PolicyModel, fixed: Fixed, config: Config, folder: Path) -> None:
    """The policy into the run's folder, and where --final_dir says."""
    save_policy(policy, fixed.tokenizer, folder / "policy", config.merge)
    move_into(folder / "policy", folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if config.final_dir:
        final = Path(config.final_dir).resolve()
        save_policy(policy, fixed.tokenizer, final, config.merge, replaces="manifest.json")


@torch.no_grad()
def check_saved(policy: PolicyModel, fixed: Fixed, prompts: list[Prompt], config: Config, folder: Path) -> None:
    """Load the policy that was saved, and compare what it makes of a few responses with what the trained one does.

    Where they differ, it is said; and an adapter that was folded in is saved beside the model, as it was trained.
    """
    try:
        saved = load_policy(config, str(folder), policy.device)
        gap = gap_of_policies(saved, policy, fixed, prompts[: config.mini_batch_size], config)
    except (MemoryError, RuntimeError, UsageError) as error:  # the policy is there, whole, and the run has not failed
        return print(f"the policy in {folder} could not be loaded again and compared: {first_line(error)}")
    if is_close(gap, tolerance(config)):
        return
    told = (
        f"warning: the policy in {folder} is not the trained one: log-probabilities differ by up to {gap.most:.2g} nats"
    )
    if config.merge and hasattr(policy.language_model, "merge_and_unload"):
        save_policy(policy, fixed.tokenizer, folder / "adapter")
        told += f"; the adapter, not merged, is in {folder / 'adapter'}"
    print(told)


def show_result(policy: PolicyModel, fixed: Fixed, prompts: list[Prompt], config: Config, folder: Path) -> None:
    """Print what PPO has changed, on held-out prompts, and where to go on from there."""
    policies = {"before": fixed.reference, "after": policy}
    kind = "test" if config.eval_every else "validation"
    tables = {}
    for name, each in policies.items():
        tables[name] = evaluate_policy(each, fixed, prompts, config, name=f"{name}, {kind} prompts")
    comparison = compare(tables)
    print(f"\non {kind} prompts, before and after:\n{reward_difference(comparison)}\n\n{sample_pairs(comparison)}\n")
    print(f"policy, tokenizer, logs: {folder}")  # first: where there is no room for a figure, that ends the run
    print(f"training curves: {plot_training(folder, notice(config))}")
    print(f"now try: python main.py --task generate --output_dir {shlex.quote(str(folder))}{example(prompts, config)}")
    print(notice(config))


def example(prompts: list[Prompt], config: Config) -> str:
    """A flag with the first prompt that fits into a line, as a person would ask it; nothing where there is none."""
    takes_a_text = not config.prompt_template or len(template_fields(config.prompt_template)) == 1
    for prompt in prompts if takes_a_text else []:
        text = asked(prompt, config)
        if len(text) <= 200 and len(text.splitlines()) == 1:
            return f" --prompt {shlex.quote(text)}"
    return ""
