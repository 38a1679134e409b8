"""The run around the loop: preflight, `train` with everything that is logged and saved of it, and what came of it.

The algorithm is in train.py; nothing here changes what it computes.
"""

import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

import report
from adapters import adapter_to_add, merged
from card import write_run_card
from checkpoint import (
    BYTES_A_SECOND,
    Began,
    check_reference,
    in_order,
    is_time_to_save,
    n_bytes,
    newest_checkpoint,
    parameters_hash,
    read_numbers,
    remove_outdated,
    restore,
    save_state,
    trained_weights,
)
from config import BrokenPolicy, Config, RunError, Stopped, UsageError, first_line, template_fields
from device import choose_precision, prepare_device, set_precision, work_of_run
from distributed import from_first, gathered, is_first, size
from evaluation import compare, evaluate_policy
from files import append_row, cut_rows, move_into, read_object, read_rows
from folders import POLICY_MARKER, STATS, best_of, claimed, how_to_resume, notice
from hub import one_sentence
from loading import count_parameters, load_policy, load_reference, load_tokenizer, new_policy, save_policy
from model import PolicyModel
from plot import plot_training, reward_difference, sample_pairs
from preflight import (
    Gap,
    check_context,
    check_invariants,
    check_static_cache,
    gap_of_policies,
    is_close,
    memory_estimate,
    show_samples,
    tolerance,
)
from progress import progress, say, tell
from prompts import (
    Prompt,
    asked,
    batch_arithmetic,
    batch_of,
    load_all_prompts,
    most_prompts,
    n_rollouts,
    rows_of,
    separator_of,
)
from provenance import Source, check_same_rows, columns_read, write_record
from reward import load_reward_terms
from signals import requests_to_stop
from trackers import NO_TRACKING, Tracking, tracking
from train import Best, Fixed, State, collect_rollout, learning_rate, new_state, train

MOST_IDLE_UPDATES = 3  # in a row, without a step: then the run ends


class Prompts(NamedTuple):
    """To train on, to choose a policy by, and to judge it by: what chooses a policy cannot judge it."""

    train: Sequence[Prompt]
    validation: Sequence[Prompt]
    held_out: Sequence[Prompt]


def run_ppo(config: Config, base_model: str, reward_model_path: str, folder: Path) -> None:
    """The `train` task: preflight, start-up invariants, n_updates of PPO, what came of it, and everything saved."""
    newest = in_order(folder)[:1]
    checkpoint = newest_checkpoint(folder) if config.resume else None
    numbers = read_numbers(checkpoint) if checkpoint else None
    began = numbers["began"] if numbers else None
    policy, fixed, prompts = load_models(config, base_model, reward_model_path, began)
    config = replace(config, n_updates=n_rollouts(config, len(prompts.train)))
    check_context(config, policy, *prompts)
    check_static_cache(config, policy)
    say_what_will_run(config, policy, base_model, len(prompts.train))
    first = batch_of(prompts.train, config.batch_size, 0, config.seed)
    gap = check_invariants(policy, fixed, first, config)
    same_start = "" if config.reference_in_8bit else "KL to the reference = 0, "
    print(
        f"start-up invariants hold: sampling = scoring (to {gap.mean:.1g} nats a token, {gap.most:.1g} at most), "
        f"ratio = 1, {same_start}more padding = the same, no dropout"
    )
    if config.merge and hasattr(policy.language_model, "merge_and_unload"):
        with one_sentence("--merge cannot fold this adapter in"):
            merged(policy.language_model)
    source = source_of(prompts, base_model, config)
    state = new_state(policy, config)
    if checkpoint:
        resume(state, fixed, checkpoint, began, source, config)
    elif config.resume:
        print(f"{folder} has no checkpoint: it begins again")
    if config.dry_run:
        show_samples(collect_rollout(policy, fixed, first, config, update_number=state.next_update))
        return print(f"dry run: {folder} would be the run; nothing was trained or written")
    began = began or what_it_began_with(fixed, config)
    if not is_first():
        run_updates(state, fixed, prompts, config, folder, began)
        return keep_result(state, fixed, prompts, config, folder)
    with claimed(folder, config):
        if checkpoint is None:
            write_record(folder, source)
        elif in_order(folder)[:1] != newest:
            raise RunError(f"{folder} has gone on in another process meanwhile; start again")
        report.cut_logs(folder, state.next_update, numbers["log_bytes"] if numbers else 0)
        if checkpoint:
            remove_outdated(folder, state.next_update, max(1, config.keep_checkpoints))
        with tracking(config, folder, state.next_update) as tracker:
            try:
                run_updates(state, fixed, prompts, config, folder, began, tracker)
            except (Stopped, BrokenPolicy):
                raise
            except RunError as error:
                raise with_a_way_on(error, folder) from error
            with told_what_is_left(folder):
                keep_result(state, fixed, prompts, config, folder, tracker)
            report.finish_logs(folder)


def what_it_began_with(fixed: Fixed, config: Config) -> Began:
    return Began(
        reference=parameters_hash(fixed.reference.language_model),
        n_prompts=most_prompts(config),
        matmul_precision=torch.get_float32_matmul_precision(),
    )


def resume(state: State, fixed: Fixed, checkpoint: Path, began: Began, source: Source, config: Config) -> None:
    """Bring the state to where the checkpoint was, and say so. Raises UsageError if models or data are others now."""
    run = checkpoint.parents[1]
    check_reference(fixed.reference.language_model, began, run)
    check_same_rows(run, source)
    restore(state, checkpoint, config)
    print(f"{run} goes on after {state.next_update} of {config.n_updates} updates")
    before = read_object(run / "run_config.json")["n_updates"]
    if before != config.n_updates:
        rate = learning_rate(config, state.next_update)
        print(f"--n_updates was {before}: the learning rate, which falls to 0 over all updates, goes on at {rate:.3g}")


def keep_result(
    state: State, fixed: Fixed, prompts: Prompts, config: Config, folder: Path, tracker: Tracking = NO_TRACKING
) -> None:
    """Save the policy, or the best that there was, check what was saved, and show what has changed."""
    policy = state.policy
    if state.best:
        policy.load_state_dict(state.best.weights, strict=False)
        reward = f"a reward of {state.best.reward:.3f} on validation prompts"
        print(f"the policy of update {state.best.update} is kept, with {reward}")
    state.optimizer.state.clear()  # the moments of Adam leave room for the policy that is loaded again
    if is_first():
        save_result(policy, fixed, config, folder)
        check_saved(policy, fixed, prompts.held_out, config, folder)
    show_result(policy, fixed, prompts.held_out, config, folder, tracker)


def load_models(
    config: Config, base_model: str, reward_model_path: str, began: Began | None = None
) -> tuple[PolicyModel, Fixed, Prompts]:
    """The policy, what it is held to and rewarded by, and the prompts; of a run that is resumed as it `began`."""
    if began:
        config = replace(config, matmul_precision=began.matmul_precision)
    device = prepare_device(config)
    tokenizer = load_tokenizer(base_model, adapter=adapter_to_add(config, base_model))
    prompts = Prompts(*load_all_prompts(config, tokenizer, began.n_prompts if began else most_prompts(config)))
    policy, fixed = load_start(config, base_model, reward_model_path, tokenizer, device)
    return policy, fixed, prompts


def load_start(
    config: Config, base_model: str, reward_model_path: str, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[PolicyModel, Fixed]:
    """The policy that a run begins with, and what it is held to and rewarded by."""
    policy = new_policy(config, base_model, device)
    precision = from_first(partial(choose_precision, policy.language_model, work_of_run(config), config))
    set_precision(precision, config, device)
    terms = load_reward_terms(config, reward_model_path, device, separator_of(policy, config))
    return policy, Fixed(reference=load_reference(config, base_model, policy), tokenizer=tokenizer, terms=terms)


def source_of(prompts: Prompts, base_model: str, config: Config) -> Source:
    """What the run is made from."""
    rows, held_out = rows_of(prompts.train), rows_of(prompts.held_out)
    return Source(columns_read(config, rows[0]), rows, held_out, start=base_model)


def say_what_will_run(config: Config, policy: PolicyModel, base_model: str, n_prompts: int) -> None:
    """Print what trains, on what, in which batches, and what memory it is likely to need."""
    precision = torch.get_float32_matmul_precision()
    print(f"{base_model}: {count_parameters(policy)}, on {policy.device}, float32 products: {precision}")
    print(batch_arithmetic(config, n_prompts))
    if size() > 1:
        print(f"{size()} processes, each with its share of a rollout's prompts and of a step's rows")
    print(memory_estimate(config, policy))


def run_updates(
    state: State,
    fixed: Fixed,
    prompts: Prompts,
    config: Config,
    folder: Path,
    began: Began,
    tracker: Tracking = NO_TRACKING,
) -> None:
    """Train, log every update as it ends, and save the state now and then, and before the run ends for any reason."""
    history = from_first(lambda: report.remembered(read_rows(folder / STATS), config.batch_size))
    announced = set()
    save = saver(state, config, folder, began)
    evaluate = partial(keep_best, state, fixed, prompts.validation, config, best_of(folder))
    if history and is_time_to_evaluate(config, state.next_update) and "eval_reward" not in history[-1]:
        history[-1]["eval_reward"] = evaluate()
        if is_first():
            note_late_evaluation(history[-1], state, began, config, folder)
    with requests_to_stop() as stop, progress(config.n_updates, "PPO", "update", state.next_update) as advance:
        started = time.perf_counter()
        for rollout, stats in saved_before_an_error(train(state, fixed, prompts.train, config), save, folder):
            row = report.log_row(state.next_update - 1, rollout, stats, config)
            history = report.remembered([*history, row], config.batch_size)
            announce(row, report.alarms(history, config.batch_size), announced)
            timing = report.timing(row["step"], started, rollout)
            failure = stale_sampler(row, config)
            if is_time_to_evaluate(config, state.next_update):
                try:
                    row["eval_reward"] = evaluate()
                except RunError as error:
                    failure = error
            if is_first():
                report.write_logs(folder, row, timing, report.log_rows(row["step"], rollout))
            tracker.log(row["step"], row)
            advance(report.bar_numbers(row))
            if failure:
                save(at_once=True)
                raise failure
            ending = reason_to_end(state, max(gathered(stop())), config, folder)
            from_first(partial(save, at_once=ending is not None))
            if ending:
                raise ending
            started = time.perf_counter()
    for alarm in history[-1]["alarms"]:
        print(f"alarm at the end: {alarm}")


def note_late_evaluation(row: dict, state: State, began: Began, config: Config, folder: Path) -> None:
    """Put a held-out reward, which could not be had when the row was written, where it would be: first into the state,
    so that it is asked again if the process ends in between.
    """
    if config.keep_checkpoints:
        save_state(state, began, report.flush_logs(folder), folder, config.keep_checkpoints)
    cut_rows(folder / STATS, state.next_update - 1)
    append_row(folder / STATS, row)


def announce(row: dict, raised: dict[str, str], announced: set[str]) -> None:
    """Put the alarms that are raised into the row, and say those of a kind that there has not been."""
    row["alarms"] = list(raised.values())
    for name in [name for name in raised if name not in announced]:
        say(f"alarm at update {row['step']}: {raised[name]}")
    announced.update(raised)


def saver(state: State, config: Config, folder: Path, began: Began) -> Callable[[bool], None]:
    """A function that saves the state where it has moved on, if it is time to, or `at_once`. Of several processes, the
    first one does, and the others wait for it: one that ended meanwhile would have it ended.
    """
    saved = state.next_update
    saved_at = time.monotonic()
    cost = n_bytes(state) / BYTES_A_SECOND

    def save(at_once: bool = False) -> None:
        nonlocal saved, saved_at, cost
        if not is_first():
            return
        now = time.monotonic()
        is_due = at_once or is_time_to_save(config, state.next_update, now - saved_at, cost)
        if not is_due or not config.keep_checkpoints or saved == state.next_update or state.is_half_done:
            return
        save_state(state, began, report.flush_logs(folder), folder, config.keep_checkpoints)
        saved = state.next_update
        saved_at = time.monotonic()
        cost = saved_at - now

    return save


def saved_before_an_error(updates: Iterator, save: Callable[[bool], None], folder: Path) -> Iterator:
    """The updates; where one of them fails before its first step, the state is saved as it was before it, unless it is
    the policy itself that is broken.
    """
    try:
        yield from updates
    except BrokenPolicy as error:
        before = "".join(f"; what it was before is in {path}" for path in in_order(folder)[:1])
        raise BrokenPolicy(f"{error}{before}") from error
    except RunError:
        save(at_once=True)
        raise
    except Exception:  # as memory that has run out
        save(at_once=True)
        if in_order(folder):
            tell(f"what was trained before is saved: {how_to_resume(folder)}")
        raise


@contextmanager
def told_what_is_left(folder: Path) -> Iterator[None]:
    """Where the work after the updates is interrupted, say how it is done."""
    try:
        yield
    except KeyboardInterrupt:
        if in_order(folder):
            tell(f"all updates are done, and saved; what comes after them: {how_to_resume(folder)}")
        raise


def with_a_way_on(error: RunError, folder: Path) -> RunError:
    """The error, with how the run goes on if something is saved of it."""
    if not in_order(folder):
        return error
    return RunError(f"{error}; what was trained before is saved: {how_to_resume(folder)}")


def stale_sampler(row: dict, config: Config) -> RunError | None:
    """What ends a run under --static_cache whose sampler no longer draws from what is scored: what a GPU has captured
    may go stale, and says nothing.
    """
    gap = Gap(mean=row["sampling_gap"], most=row["sampling_gap_max"])
    if not config.static_cache or is_close(gap, tolerance(config)):
        return None
    return RunError(
        f"at update {row['step']} sampling and scoring differ by {gap.mean:.2g} nats a token, and {gap.most:.2g} at "
        "most: what was sampled with --static_cache is not the policy's; expected --no-static_cache"
    )


def reason_to_end(state: State, signal_number: int, config: Config, folder: Path) -> RunError | None:
    """Why a run must end before its time, if it must, and how it goes on."""
    done = f"after {state.next_update} of {config.n_updates} updates"
    is_saved = config.keep_checkpoints or in_order(folder)
    saved = f"how it goes on: {how_to_resume(folder)}" if is_saved else "nothing is saved of it"
    if signal_number:
        return Stopped(f"stopped {done}, as {signal.Signals(signal_number).name} asked; {saved}", signal_number)
    if state.idle_updates >= MOST_IDLE_UPDATES:
        return RunError(
            f"stopped {done}: in the last {state.idle_updates} no loss or gradient was finite, and no step was taken; "
            "the weights are those before them; try a lower --learning_rate"
        )
    return None


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
        if is_first():
            save_policy(state.policy, fixed.tokenizer, folder, replaces="manifest.json", settings=config)
        trained = {name: weight.detach().clone() for name, weight in trained_weights(state.policy).items()}
        state.best = Best(reward=reward, update=state.next_update - 1, weights=trained)
    return reward


def save_result(policy: PolicyModel, fixed: Fixed, config: Config, folder: Path) -> None:
    """The policy into the run's folder, and where --final_dir says."""
    save_policy(policy, fixed.tokenizer, folder / "policy", config.merge, replaces=".")
    move_into(folder / "policy", folder, last=POLICY_MARKER)
    shutil.rmtree(best_of(folder), ignore_errors=True)
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


def show_result(
    policy: PolicyModel, fixed: Fixed, prompts: list[Prompt], config: Config, folder: Path, tracker: Tracking
) -> None:
    """Print what PPO has changed, on held-out prompts, and where to go on from there."""
    policies = {"before": fixed.reference, "after": policy}
    kind = "test" if config.eval_every else "validation"
    tables = {}
    for name, each in policies.items():
        tables[name] = evaluate_policy(each, fixed, prompts, config, name=f"{name}, {kind} prompts")
    if not is_first():
        return
    comparison = compare(tables)
    say(f"\non {kind} prompts, before and after:\n{reward_difference(comparison)}\n\n{sample_pairs(comparison)}\n")
    tracker.log_samples(config.n_updates - 1, comparison["samples"])
    write_run_card(folder, config, comparison, kind, report.least_to_compare(config.batch_size))
    print(f"policy, tokenizer, logs: {folder}")  # first: where there is no room for a figure, that ends the run
    print(f"training curves: {plot_training(folder, notice(config))}")
    print(f"now try: python main.py --task generate --output_dir {shlex.quote(str(folder))}{example(prompts, config)}")
    print(notice(config))


def example(prompts: list[Prompt], config: Config) -> str:
    """A flag with the first prompt that fits into a line, as a person would ask it, and has no letter that a terminal
    or a shell would obey; nothing where there is none.
    """
    takes_a_text = not config.prompt_template or len(template_fields(config.prompt_template)) == 1
    for prompt in prompts if takes_a_text else []:
        text = asked(prompt, config)
        if len(text) <= 200 and text.isprintable():
            return f" --prompt {shlex.quote(text)}"
    return ""
