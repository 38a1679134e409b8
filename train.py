"""The loop: sample, score, shape rewards, estimate advantages, update, log; and again.

Read `train` first, then `collect_rollout` and `update`. The equations are in ppo.py, the models in model.py.
"""

import math
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import ppo
import report
from checkpoint import claim_folder, move_into, notice
from config import Config, RunError
from dataset import Prompt, batch_arithmetic, load_prompts, n_rollouts, prompt_batches
from device import keep_freed_memory, prepare_device
from evaluation import compare, evaluate_policy
from generate import Sample, check_context, eval_mode, respond
from loading import load_policy, load_reference, load_tokenizer, save_policy
from model import PolicyModel, length_groups, score_rows
from plot import plot_training, reward_difference, sample_pairs
from reward import RewardTerm, load_reward_terms, total_reward


class Models(NamedTuple):
    """All that a rollout needs: who acts, who it is compared with, how text becomes tokens, and what is rewarded."""

    policy: PolicyModel
    reference: PolicyModel
    tokenizer: PreTrainedTokenizerBase
    terms: dict[str, RewardTerm]


class Collected(NamedTuple):
    """A rollout with what the log wants to know of it; only `rollout` is trained on."""

    rollout: ppo.Rollout
    sampled: Sample
    responses: list[str]
    terms: dict[str, torch.Tensor]
    rewards: torch.Tensor  # raw weighted sum of the terms, before `shape_scores`
    stats: dict[str, float]
    moments: tuple[int, float, float]  # of all scores so far, these included: what the next rollout goes on from


class Best(NamedTuple):
    """The policy with the highest mean reward on held-out prompts so far: its update, and the weights that train."""

    reward: float
    step: int
    weights: dict[str, torch.Tensor]


@torch.no_grad()
def collect_rollout(
    models: Models,
    prompts: list[Prompt],
    config: Config,
    kl_coef: float,
    generator: torch.Generator,
    moments: tuple[int, float, float] = (0, 0.0, 0.0),
) -> Collected:
    """Sample a response to every prompt and work out, without gradient, all that the update will need."""
    policy, reference, tokenizer, terms = models

    # 1. Sample. The ids drawn here are the ones trained on; they are never decoded and tokenised again.
    *query, sampled, responses = respond(policy, tokenizer, [p.ids for p in prompts], config, generator)
    response_ids, mask = sampled.response_ids, sampled.mask

    # 2. Log-probabilities and values, by the very function that the update differentiates.
    batch, how = (*query, response_ids, mask), (config.mini_batch_size, config.temperature)
    with eval_mode(policy):
        logprobs, values, entropy = score_rows(policy, *batch, *how, with_entropy=True)
    ref_logprobs = score_rows(reference, *batch, *how).logprobs

    # 3. Score the text, then spread the score and the KL over the tokens.
    rewards, term_rewards = total_reward(terms, [p.text for p in prompts], responses, [p.row for p in prompts], config)
    has_eos = ((response_ids == tokenizer.eos_token_id) & mask).any(1)
    raw = (rewards.to(mask.device), has_eos, config.missing_eos_penalty)
    moments = ppo.update_moments(moments, ppo.shape_scores(*raw))  # before their use, so that a first rollout has some
    running = moments if config.normalize_scores else None
    scores = ppo.shape_scores(*raw, config.whiten_scores, config.score_clip or None, running)
    kl = ppo.kl_estimate(logprobs, ref_logprobs, mask, config.kl_estimator)
    token_rewards = ppo.shape_rewards(scores, kl, mask, kl_coef)

    # 4. Advantages and returns.
    advantages = ppo.estimate_advantages(token_rewards, values, mask, config.gamma, config.lam)
    returns = ppo.estimate_returns(advantages, values, mask)
    if config.whiten_advantages:
        advantages = ppo.masked_whiten(advantages, mask)
    rollout = ppo.Rollout(*batch, logprobs, ref_logprobs, values, scores, kl, token_rewards, advantages, returns)
    stats = report.rollout_stats(rollout, term_rewards, rewards, responses)
    stats |= {"entropy": ppo.masked_mean(entropy, mask).item(), "ended": has_eos.float().mean().item()}
    return Collected(rollout, sampled, responses, term_rewards, rewards, stats, moments)


def minibatch_loss(
    policy: PolicyModel, rows: ppo.Rollout, n_tokens: int, config: Config
) -> tuple[torch.Tensor, dict[str, float]]:
    """L = L_policy + value_coef L_value - entropy_coef H: PPO, eq. 9, negated into a loss.

    Token means with the divisor `n_tokens`, the count of the whole minibatch of which `rows` may be a part: losses,
    gradients and statistics of the parts add up to those of the whole.
    """
    batch = (rows.query_ids, rows.query_mask, rows.response_ids, rows.mask)
    new = policy(*batch, config.temperature, with_entropy=config.entropy_coef > 0)
    ratio = ppo.importance_ratio(new.logprobs, rows.logprobs, rows.mask)
    policy_losses, clipped = ppo.policy_losses(ratio, rows.advantages, rows.mask, config.clip_range)
    value_losses, value_clipped = ppo.value_losses(
        new.values, rows.values, rows.returns, rows.mask, config.clip_range_value
    )
    mean = partial(ppo.masked_mean, mask=rows.mask, count=n_tokens)
    policy_loss, value_loss = mean(policy_losses), mean(value_losses)
    loss = policy_loss + config.value_coef * value_loss
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * mean(new.entropy)
    with torch.no_grad():
        stats = {
            "loss": loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_fraction": mean(clipped.float()),
            "value_clip_fraction": mean(value_clipped.float()),
            "approx_kl_k1": mean(ppo.kl_estimate(rows.logprobs, new.logprobs, rows.mask, "k1")),
            "approx_kl_k3": mean(ppo.kl_estimate(rows.logprobs, new.logprobs, rows.mask, "k3")),
            "ratio": mean(ratio),
            "ratio_min": ratio.masked_fill(~rows.mask, float("inf")).min(),
            "ratio_max": ratio.masked_fill(~rows.mask, 0.0).max(),
        }
    return loss, {name: value.item() for name, value in stats.items()}


def combine(parts: list[dict[str, float]], reduce) -> dict[str, float]:
    """One row of statistics from several: extremes by min and max, everything else by `reduce`."""
    special = {"ratio_min": min, "ratio_max": max}
    return {name: special.get(name, reduce)(part[name] for part in parts) for name in parts[0]}


def update(
    policy: PolicyModel,
    optimizer: torch.optim.Optimizer,
    rollout: ppo.Rollout,
    config: Config,
    generator: torch.Generator,
) -> dict[str, float]:
    """ppo_epochs passes over the rollout, an optimizer step a minibatch; returns means over every minibatch.

    Every pass draws a new order. With `target_kl`, a minibatch whose k3 to the sampling policy exceeds 1.5 target_kl
    is not stepped on, and ends the update.
    """
    policy.train()  # no dropout anywhere: for activation checkpointing, which sleeps in eval mode
    lengths, step_rows = rollout.mask.sum(1), config.mini_batch_size * config.gradient_accumulation_steps
    orders = (torch.randperm(len(lengths), generator=generator) for _ in range(config.ppo_epochs))
    minibatches = []
    for rows in (rows.to(lengths.device) for order in orders for rows in order.split(step_rows)):
        n_tokens = int(lengths[rows].sum())
        optimizer.zero_grad()
        parts = []
        for part in length_groups(lengths[rows].tolist(), config.mini_batch_size):
            loss, stats = minibatch_loss(policy, ppo.select_rows(rollout, rows[part]), n_tokens, config)
            loss.backward()
            parts.append(stats)
        minibatches.append(combine(parts, sum))
        if config.target_kl and minibatches[-1]["approx_kl_k3"] > 1.5 * config.target_kl:
            break
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
    optimizer.zero_grad()  # nothing keeps gradients while the next rollout is sampled
    if lengths.device.type == "cpu":
        keep_freed_memory()
    return combine(minibatches, fmean)


def learning_rate(config: Config, step: int) -> float:
    """Linear to 0, per update: the first (step 0) has the full rate, the last one 1 / n_updates of it."""
    return config.learning_rate * (1 - step / config.n_updates)


def train(config: Config, base_model: str, reward_model_path: str, folder: Path) -> None:
    """The `train` task: preflight, start-up invariants, n_updates of PPO, what came of it, and everything saved."""
    models, prompts = load_models(config, base_model, reward_model_path)
    config = replace(config, n_updates=n_rollouts(config, len(prompts)))
    validation = load_prompts(config, models.tokenizer, "validation", config.eval_samples)
    # what chooses a policy cannot judge it
    held_out = load_prompts(config, models.tokenizer, "test", config.eval_samples) if config.eval_every else validation
    check_context(config, models.policy)
    products = f"on {models.policy.value_head.weight.device}, float32 products: {torch.get_float32_matmul_precision()}"
    print(f"{base_model}: {report.count_parameters(models.policy)}, {products}")
    print(f"{batch_arithmetic(config, len(prompts))}\n{report.memory_estimate(config, models.policy)}")
    generator = torch.Generator().manual_seed(config.seed)
    batches = prompt_batches(prompts, config.batch_size, generator)
    if config.dry_run:
        return dry_run(models, next(batches), config, generator)
    best = run_updates(models, batches, validation, config, generator, folder)
    if config.eval_every:
        models.policy.load_state_dict(best.weights, strict=False)
        print(f"the policy of update {best.step} is kept, with a reward of {best.reward:.3f} on validation prompts")
    save_policy(models.policy, models.tokenizer, folder / "policy", config.merge)
    move_into(folder / "policy", folder)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if config.final_dir:
        save_policy(models.policy, models.tokenizer, Path(config.final_dir).resolve(), config.merge, "manifest.json")
    policies = {"before": models.reference, "after": models.policy}
    comparison = compare({n: evaluate_policy(p.eval(), *models[1:], held_out, config) for n, p in policies.items()})
    print(f"\n{reward_difference(comparison)}\n\n{sample_pairs(comparison)}\n")
    print(f"policy, tokenizer, logs: {folder}\ntraining curves: {plot_training(folder, notice(config))}")
    print(f"now try: python main.py --task generate --output_dir {folder} --prompt {shlex.quote(held_out[0].text)}")
    print(notice(config))


def run_updates(
    models: Models,
    batches: Iterator,
    validation: list[Prompt],
    config: Config,
    generator: torch.Generator,
    folder: Path,
) -> Best:
    """n_updates of rollout and update, each logged as it ends; returns the best policy on the validation prompts."""
    policy, kl_coef, moments, best = models.policy, config.kl_coef, (0, 0.0, 0.0), Best(-math.inf, 0, {})
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, config.learning_rate, eps=1e-5, fused=True)
    log, timings, announced = [], [], set()
    bar = tqdm(range(config.n_updates), desc="PPO", unit="update")
    for step in bar:
        started = time.perf_counter()
        batch = next(batches)
        collected = collect_rollout(models, batch, config, kl_coef, generator, moments)
        moments = collected.moments
        if step == 0:
            report.check_invariants(policy, collected.rollout, collected.sampled, config)
            claim_folder(folder, config)
        sampled = time.perf_counter()
        optimizer.param_groups[0]["lr"] = rate = learning_rate(config, step)
        stats = update(policy, optimizer, collected.rollout, config, generator)
        if not math.isfinite(stats["loss"]):
            raise RunError(f"the loss is {stats['loss']} at update {step}; try a lower --learning_rate")
        log.append({"step": step, **collected.stats, **stats, "kl_coef": kl_coef, "learning_rate": rate})
        raised = report.alarms(log, config.batch_size)
        log[-1]["alarms"] = list(raised.values())
        for name in [name for name in raised if name not in announced]:
            bar.write(f"alarm at update {step}: {raised[name]}")
        announced |= raised.keys()
        timings.append(report.timing(step, started, sampled, collected.rollout))
        if config.eval_every and ((step + 1) % config.eval_every == 0 or step + 1 == config.n_updates):
            best = keep_best(models, validation, config, folder / "checkpoints/best", log[-1], best)
        if config.kl_target:
            kl, n = collected.stats["kl_k3"], config.batch_size
            kl_coef = ppo.adapt_kl_coef(kl_coef, kl, config.kl_target, config.kl_horizon, n)
        report.write_logs(folder, log, timings, log_rows(step, batch, collected))
        bar.set_postfix(report.bar_numbers(collected.stats), refresh=False)
    return best


def keep_best(models: Models, prompts: list[Prompt], config: Config, folder: Path, row: dict, best: Best) -> Best:
    """Note the mean reward on held-out prompts in the log row; the best policy so far is saved in `folder`, in place
    of the one before, for the case that the run does not live to its end.
    """
    table = evaluate_policy(models.policy.eval(), *models[1:], prompts, config)
    row["eval_reward"] = fmean(own["reward"] for own in table)
    if row["eval_reward"] <= best.reward:
        return best
    save_policy(models.policy, models.tokenizer, folder, replaces="manifest.json")
    weights = {name: p.detach().clone() for name, p in models.policy.named_parameters() if p.requires_grad}
    return Best(row["eval_reward"], row["step"], weights)


def log_rows(step: int, prompts: list[Prompt], collected: Collected) -> list[dict]:
    """A rollout's rows of training_log.csv: what was asked, what was answered, what it earned."""
    columns = {"reward": collected.rewards, **{f"reward_{name}": x for name, x in collected.terms.items()}}
    return [
        {"step": step, "query": prompt.text, "response": response, **{name: x[i].item() for name, x in columns.items()}}
        for i, (prompt, response) in enumerate(zip(prompts, collected.responses, strict=True))
    ]


def load_models(config: Config, base_model: str, reward_model_path: str) -> tuple[Models, list[Prompt]]:
    """Policy, frozen reference, tokenizer and reward terms, and the prompts to train on."""
    device = prepare_device(config)
    tokenizer = load_tokenizer(base_model)
    prompts = load_prompts(config, tokenizer, "train", None if config.epochs else config.n_updates * config.batch_size)
    policy = load_policy(config, base_model, device)
    terms = load_reward_terms(config, reward_model_path, device, policy.separator)
    return Models(policy, load_reference(config, base_model, policy), tokenizer, terms), prompts


def dry_run(models: Models, prompts: list[Prompt], config: Config, generator: torch.Generator) -> None:
    """Everything but the update: one rollout, the invariants, three samples with their rewards."""
    collected = collect_rollout(models, prompts, config, config.kl_coef, generator)
    report.check_invariants(models.policy, collected.rollout, collected.sampled, config)
    print("start-up invariants hold: sampling = scoring, ratio = 1, KL to the reference = 0, no dropout")
    for i in range(min(3, len(prompts))):
        terms = ", ".join(f"{name} {values[i].item():.3f}" for name, values in collected.terms.items())
        print(f"prompt {prompts[i].text!r}\n  response {collected.responses[i]!r}\n  {terms}")
