"""What a run says about itself: its memory before it starts, its start-up invariants, its log rows, its alarms."""

import csv
import json
import math
import time
from pathlib import Path
from statistics import fmean

import torch

from checkpoint import write_whole
from classifier import class_names
from config import Config, RunError, UsageError
from dataset import column, load_rows
from evaluation import diversity
from generate import Sample
from model import PolicyModel
from ppo import Rollout, explained_variance, importance_ratio, kl_estimate, masked_mean, select_rows
from reward import check_weights, load_reward_function

# nats, between sampling token by token and scoring at once
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
WINDOW = 128  # responses, and two rollouts, at least: alarms compare the latest so many with the first

# What a higher reward must not be bought with. Statistic: its name and its bounds in words, and whether it keeps them.
LIMITS = {
    "response_length": ("mean length in tokens", "50 to 200 % of", lambda start, now: 0.5 * start <= now <= 2 * start),
    "distinct_bigrams": ("share of distinct word pairs", "at least 60 % of", lambda start, now: now >= 0.6 * start),
    "ended": ("share of responses with EOS", "at most 20 points under", lambda start, now: now >= start - 0.2),
    "ref_perplexity": ("perplexity to the reference", "50 to 200 % of", lambda start, now: 0.5 <= now / start <= 2),
}


def check_before_training(config: Config, trains_reward: bool) -> None:
    """Refuse, before minutes of training, what would be refused after them: data, columns, weights, lengths."""
    check_weights(config)
    if config.reward_fn:
        load_reward_function(config.reward_fn)
    rows = load_rows(config, "train", None if config.dataset_path or trains_reward else 1)
    column(rows, config.prompt_column, "prompt_column", (str, list))
    load_rows(config, "validation", 1)
    if config.task == "sft" and config.completion_column:
        column(rows, config.completion_column, "completion_column")
    if trains_reward and config.chosen_column:
        column(rows, config.chosen_column, "chosen_column")
        column(rows, config.rejected_column, "rejected_column")
    elif trains_reward:
        class_names(rows, config)
    longest = config.max_prompt_length + config.max_new_tokens
    if config.task == "train" and config.trains_from_scratch and longest > config.context_length:
        raise UsageError(
            f"--max_prompt_length {config.max_prompt_length} plus --max_new_tokens {config.max_new_tokens} "
            f"is more than the {config.context_length} tokens of --context_length"
        )


def count_parameters(policy: PolicyModel) -> str:
    """How many parameters there are, and how many of them are trained where an adapter freezes the rest."""
    whole = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return f"{whole:,} parameters" + (f", of which {trained:,} are trained" if trained < whole else "")


def memory_estimate(config: Config, policy: PolicyModel) -> str:
    """Bytes that the update needs, roughly: weights, reference, gradients and Adam's two moments, activations, logits.

    Activations are taken as 18 floats a token, layer and unit of width (or a layer's inputs alone with activation
    checkpointing), logits as three (rows, response, vocab) tensors.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]  # have reference, gradient and two moments
    weight = {"float32": 4, "bfloat16": 2, "float16": 2}[config.dtype]  # of an activation
    settings = policy.language_model.config
    tokens = config.mini_batch_size * (config.max_prompt_length + config.max_new_tokens)
    floats = 2 if config.gradient_checkpointing else 18
    activations = floats * weight * tokens * settings.num_hidden_layers * settings.hidden_size
    logits = 3 * 4 * config.mini_batch_size * config.max_new_tokens * settings.vocab_size
    static = sum(p.numel() * p.element_size() for p in [*policy.parameters(), *(4 * trained)])
    return (
        f"memory, estimated: {gigabytes(static)} for {count_parameters(policy)} with reference, gradients and Adam, "
        f"{gigabytes(activations + logits)} for a forward pass of {config.mini_batch_size} rows "
        "(less with a smaller --mini_batch_size or with --gradient_checkpointing)"
    )


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


def check_invariants(policy: PolicyModel, rollout: Rollout, sampled: Sample, config: Config) -> None:
    """What must hold before the first update, on real data; raises RunError with the likely cause if it does not.

    Sampling and scoring agree on every log-probability, scoring twice gives the same (the ratio is 1), the policy is
    its reference (KL is 0), and no dropout is on.
    """
    exact = config.mixed_precision == "no" and not (config.load_in_8bit or config.load_in_4bit)
    tolerance = TOLERANCE[config.dtype] if exact else 0.5
    on = [n for n, m in policy.named_modules() if isinstance(m, torch.nn.Dropout) and m.training and m.p > 0]
    if on:
        raise RunError(f"dropout is on in {on[0]}: the same tokens would score differently every time")
    gap = torch.where(rollout.mask, (rollout.logprobs - sampled.logprobs).abs(), 0.0).max().item()
    if not gap <= tolerance:
        raise RunError(
            f"sampling and scoring disagree by {gap:.3g} nats on a token (tolerance {tolerance}): likely causes are "
            "positions that count padding, a logits processor that only one of them applies, or a wrong shift"
        )
    rows = select_rows(rollout, torch.arange(min(config.mini_batch_size, len(rollout.scores))))
    with torch.no_grad():
        again = policy(rows.query_ids, rows.query_mask, rows.response_ids, rows.mask, config.temperature).logprobs
    ratio = importance_ratio(again, rows.logprobs, rows.mask)
    if not (ratio - 1).abs().max().item() <= tolerance:
        raise RunError(f"the importance ratio is {ratio.max().item():.4f} before any update, not 1: scoring is random")
    kl = torch.where(rollout.mask, (rollout.logprobs - rollout.ref_logprobs).abs(), 0.0).max().item()
    if config.reference_in_8bit:
        print(f"policy and 8-bit reference differ by at most {kl:.3g} nats on a token before any update")
    elif not kl <= tolerance:
        raise RunError(f"policy and reference differ by {kl:.3g} nats on a token before any update: other weights")


def rollout_stats(
    rollout: Rollout, terms: dict[str, torch.Tensor], raw_scores: torch.Tensor, responses: list[str]
) -> dict[str, float]:
    """A rollout's log row: rewards in reward units, KL and entropy in nats, lengths in tokens, all over real tokens.

    `ref_perplexity` = exp(-mean log ρ(y_t)), at the sampling temperature: it rises as responses become unlike text, and
    falls as they repeat what is likely anyway.
    """
    kl = {name: kl_estimate(rollout.logprobs, rollout.ref_logprobs, rollout.mask, name) for name in ("k1", "k3")}
    return {
        "reward": raw_scores.mean().item(),
        "variance": raw_scores.var(correction=0).item(),
        **{f"reward_{name}": values.mean().item() for name, values in terms.items()},
        "score": rollout.scores.mean().item(),
        "kl": rollout.kl.sum(1).mean().item(),
        "kl_k1": kl["k1"].sum(1).mean().item(),
        "kl_k3": kl["k3"].sum(1).mean().item(),
        "value": masked_mean(rollout.values, rollout.mask).item(),
        "return": masked_mean(rollout.returns, rollout.mask).item(),
        "explained_variance": explained_variance(rollout.values, rollout.returns, rollout.mask).item(),
        "response_length": rollout.mask.sum(1).float().mean().item(),
        "distinct_bigrams": diversity(responses)["distinct_bigrams"],
        "ref_perplexity": math.exp(-masked_mean(rollout.ref_logprobs, rollout.mask).item()),
    }


def alarms(history: list[dict], batch_size: int) -> dict[str, str]:
    """What is wrong with the latest rollouts, in words, by statistic: empty as long as the reward has not risen.

    `history` holds the rows of training_stats.json. A rise is more than two standard errors of the difference.
    """
    n = max(2, math.ceil(WINDOW / batch_size))
    if len(history) < 2 * n:
        return {}
    windows, names = (history[:n], history[-n:]), ["reward", *LIMITS]
    start, now = ({name: fmean(row[name] for row in rows) for name in names} for rows in windows)
    error = math.sqrt(sum(squared_error(rows, batch_size) for rows in windows))
    if now["reward"] - start["reward"] <= 2 * error:
        return {}
    return {
        name: f"the reward rose from {start['reward']:.3g} to {now['reward']:.3g} while the {words} went from "
        f"{start[name]:.3g} to {now[name]:.3g}; expected {bounds} the start"
        for name, (words, bounds, keeps) in LIMITS.items()
        if not keeps(start[name], now[name])
    }


def squared_error(rows: list[dict], batch_size: int) -> float:
    """The mean reward's squared standard error over some rollouts, from the mean and the variance of each of them."""
    mean = fmean(row["reward"] for row in rows)
    variance = fmean(row["variance"] + row["reward"] ** 2 for row in rows) - mean**2
    return variance / (len(rows) * batch_size - 1)


def bar_numbers(stats: dict[str, float]) -> dict[str, str]:
    """The few numbers that matter, for the progress bar."""
    return {
        "reward": f"{stats['reward']:.2f}",
        "kl": f"{stats['kl_k1']:.2f}",
        "entropy": f"{stats['entropy']:.2f}",
        "length": f"{stats['response_length']:.0f}",
        "eos": f"{stats['ended']:.0%}",
    }


def timing(step: int, started: float, sampled: float, rollout: Rollout) -> dict[str, float]:
    """Seconds of an update's two halves, and response tokens a second over both."""
    now = time.perf_counter()
    return {
        "step": step,
        "seconds_rollout": sampled - started,
        "seconds_update": now - sampled,
        "tokens_per_second": rollout.mask.sum().item() / (now - started),
    }


def write_logs(folder: Path, stats: list[dict], timings: list[dict], responses: list[dict]) -> None:
    """training_stats.json and timings.json rewritten whole; training_log.csv grows by a row a response."""
    write_whole(folder / "training_stats.json", json.dumps(stats, indent=1))
    write_whole(folder / "timings.json", json.dumps(timings, indent=1))
    path = folder / "training_log.csv"
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, responses[0])
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(responses)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from None
