"""PPO itself: sample, score, shape rewards, estimate advantages, update, adapt; and again.

The equations are in ppo.py, what is trained in model.py, how text is sampled in generate.py. This file goes from
the parts to the whole: what a rollout is and how one is collected, the loss of a minibatch, an update on a rollout, and
`train`, the last function, which is the whole algorithm on one screen: who knows the parts begins there. What
surrounds it (checks, logs, figures, evaluation, saving) is in run.py.

    rollout     a response to each of batch_size prompts; each update has one, and goes over it ppo_epochs times
    step        rows that share an optimizer step: mini_batch_size x gradient_accumulation_steps
    minibatch   rows that share a forward pass: at most mini_batch_size (elsewhere often called a micro-batch)

Several processes (distributed.py) share the rows, and meet three times: `collect_rollout` gathers their parts of a
rollout, `accumulate_gradient` the statistics of a step, and `update` sums their gradients. All else they do alike.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
from torchtyping import TensorType, is_float
from transformers import PreTrainedTokenizerBase

import ppo
from config import Config
from dataset import join_rows
from device import keep_freed_memory
from distributed import gathered, own_of_sorted, own_share, sum_gradients
from generate import respond, score_responses
from model import PolicyModel, length_groups
from prompts import Prompt, batch_of
from randomness import permutation, uniforms
from reward import RewardTerm, total_reward


class Fixed(NamedTuple):
    """What no update changes: who the policy is compared with, how text becomes tokens, and what is rewarded."""

    reference: PolicyModel
    tokenizer: PreTrainedTokenizerBase
    terms: dict[str, RewardTerm]


class Best(NamedTuple):
    """The policy with the highest mean reward on held-out prompts so far: its update, and the weights that train."""

    reward: float
    update: int
    weights: dict[str, torch.Tensor]


@dataclass
class State:
    """All that training changes: with it, and with what is `Fixed`, it goes on as if it had never stopped."""

    policy: PolicyModel  # with its value head and critic
    optimizer: torch.optim.Optimizer  # with Adam's moments
    kl_coef: float
    moments: ppo.Moments = field(default_factory=ppo.Moments)  # of all scores so far
    next_update: int = 0  # its number
    idle_updates: int = 0  # the latest ones, in a row, in which no step could be taken
    is_half_done: bool = False  # within an update, when some of its steps may have been taken
    best: Best | None = None  # noted by run.py


@dataclass(frozen=True)
class Rollout:
    """Prompts, responses, and what policy, reference and reward say of them. No tensor here carries gradient.

    `query` is the prompt's width in tokens (padded left for causal models, right for encoder-decoders), `time` the
    longest response's. Log-probabilities, entropy and KL are in nats; all else with a unit is in that of the reward.
    """

    query_ids: TensorType["batch", "query"]
    query_mask: TensorType["batch", "query", bool]
    response_ids: TensorType["batch", "time"]
    mask: TensorType["batch", "time", bool]
    logprobs: TensorType["batch", "time", is_float]  # by `score`, not by the sampler: a minibatch's `old_logprobs`
    sampled_logprobs: TensorType["batch", "time", is_float]  # by the sampler: the same, but for rounding
    ref_logprobs: TensorType["batch", "time", is_float]
    values: TensorType["batch", "time", is_float]
    entropy: TensorType["batch", "time", is_float]
    has_eos: TensorType["batch", bool]
    prompts: list[Prompt]
    texts: list[str]  # the responses
    raw_scores: TensorType["batch", is_float]  # the reward's terms in a weighted sum, one number a response
    term_scores: dict[str, TensorType["batch", is_float]]
    collected_at: float  # by time.perf_counter(), for timings.jsonl

    # worked out from the above in `train`
    scores: TensorType["batch", is_float] | None = None  # those trained on, one a response
    kl: TensorType["batch", "time", is_float] | None = None  # the very tensor that shaped the rewards
    rewards: TensorType["batch", "time", is_float] | None = None  # one a token
    advantages: TensorType["batch", "time", is_float] | None = None  # whitened if so configured
    returns: TensorType["batch", "time", is_float] | None = None

    def to(self, device: torch.device | str) -> "Rollout":
        """The same, with its tensors there; those of `term_scores` stay on the CPU."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if torch.is_tensor(value)})


def collect_rollout(
    policy: PolicyModel, fixed: Fixed, prompts: list[Prompt], config: Config, update_number: int
) -> Rollout:
    """Sample a response to every prompt, by that update's random numbers; what policies and reward say of each.

    Of several processes, each does so for its share of the prompts, and all get the whole rollout.
    """
    random_numbers = uniforms(config.seed, "sampling", update_number, (len(prompts), config.max_new_tokens))
    own = own_share(len(prompts))
    part = collect_part(policy, fixed, prompts[own], random_numbers[own], config)
    parts = gathered(replace(part, prompts=[]).to("cpu"))
    query_side = "right" if policy.is_encoder_decoder else "left"
    whole = join_rollouts(parts, fixed.tokenizer.pad_token_id, query_side)
    return replace(whole.to(policy.device), prompts=prompts, collected_at=time.perf_counter())


@torch.no_grad()
def collect_part(
    policy: PolicyModel,
    fixed: Fixed,
    prompts: list[Prompt],
    random_numbers: TensorType["batch", "max_new_tokens"],
    config: Config,
) -> Rollout:
    """`collect_rollout` for some prompts, with the random numbers of theirs."""
    # The ids drawn here are the ones trained on; they are never decoded and tokenised again.
    drawn = respond(policy, fixed.tokenizer, [prompt.ids for prompt in prompts], random_numbers, config)

    # Log-probabilities and values come from the very function that the update differentiates.
    own = score_responses(policy, drawn, config, with_entropy=True)
    reference = score_responses(fixed.reference, drawn, config)

    raw_scores, term_scores = total_reward(
        fixed.terms,
        prompts=[prompt.text for prompt in prompts],
        responses=drawn.texts,
        rows=[prompt.row for prompt in prompts],
        config=config,
    )
    return Rollout(
        query_ids=drawn.query_ids,
        query_mask=drawn.query_mask,
        response_ids=drawn.response_ids,
        mask=drawn.mask,
        logprobs=own.logprobs,
        sampled_logprobs=drawn.logprobs,
        ref_logprobs=reference.logprobs,
        values=own.values,
        entropy=own.entropy,
        has_eos=drawn.has_eos,
        prompts=prompts,
        texts=drawn.texts,
        raw_scores=raw_scores.to(drawn.mask.device),
        term_scores=term_scores,
        collected_at=time.perf_counter(),
    )


def join_rollouts(parts: list[Rollout], pad_id: int, query_side: str) -> Rollout:
    """Rollouts one after the other as one, prompts and responses as wide as the widest of them."""
    sides = {"query_ids": query_side, "query_mask": query_side}
    fills = {"query_ids": pad_id, "response_ids": pad_id}
    first = parts[0]
    joined = {}
    for name in [spec.name for spec in fields(first) if torch.is_tensor(getattr(first, spec.name))]:
        rows = [getattr(part, name) for part in parts]
        joined[name] = join_rows(rows, fill=fills.get(name, 0), side=sides.get(name, "right"))
    joined["prompts"] = [prompt for part in parts for prompt in part.prompts]
    joined["texts"] = [text for part in parts for text in part.texts]
    joined["term_scores"] = {name: torch.cat([part.term_scores[name] for part in parts]) for name in first.term_scores}
    return replace(first, **joined)


class Minibatch(NamedTuple):
    """The rows of a rollout that share a forward pass, with what the loss needs of them."""

    query_ids: TensorType["batch", "query"]
    query_mask: TensorType["batch", "query", bool]
    response_ids: TensorType["batch", "time"]
    mask: TensorType["batch", "time", bool]
    old_logprobs: TensorType["batch", "time", is_float]
    old_values: TensorType["batch", "time", is_float]
    advantages: TensorType["batch", "time", is_float]
    returns: TensorType["batch", "time", is_float]


def select_rows(rollout: Rollout, rows: TensorType["rows"]) -> Minibatch:
    """The rows with these numbers, without the columns that are padding in all of them."""
    query_columns = rollout.query_mask[rows].any(0)
    time_columns = rollout.mask[rows].any(0)
    return Minibatch(
        query_ids=rollout.query_ids[rows][:, query_columns],
        query_mask=rollout.query_mask[rows][:, query_columns],
        response_ids=rollout.response_ids[rows][:, time_columns],
        mask=rollout.mask[rows][:, time_columns],
        old_logprobs=rollout.logprobs[rows][:, time_columns],
        old_values=rollout.values[rows][:, time_columns],
        advantages=rollout.advantages[rows][:, time_columns],
        returns=rollout.returns[rows][:, time_columns],
    )


def minibatch_loss(
    policy: PolicyModel, minibatch: Minibatch, n_tokens: int, config: Config
) -> tuple[torch.Tensor, dict[str, float]]:
    """L = L_policy + value_coef L_value - entropy_coef H: PPO, eq. 9, negated into a loss; and its statistics.

    Means over tokens with the divisor `n_tokens`, the count of the whole step of which the minibatch may be a part:
    losses, gradients and statistics of the parts add up to those of the whole.
    """
    mask = minibatch.mask
    mean = partial(ppo.masked_mean, mask=mask, count=n_tokens)
    new = policy(
        query_ids=minibatch.query_ids,
        query_mask=minibatch.query_mask,
        response_ids=minibatch.response_ids,
        response_mask=mask,
        temperature=config.temperature,
        with_entropy=config.entropy_coef > 0,
    )

    ratio = ppo.importance_ratio(logprobs=new.logprobs, old_logprobs=minibatch.old_logprobs, mask=mask)
    policy_losses, clipped = ppo.policy_losses(
        ratio=ratio, advantages=minibatch.advantages, mask=mask, clip_range=config.clip_range
    )
    value_losses, value_clipped = ppo.value_losses(
        values=new.values,
        old_values=minibatch.old_values,
        returns=minibatch.returns,
        mask=mask,
        clip_range_value=config.clip_range_value,
    )
    policy_loss = mean(policy_losses)
    value_loss = mean(value_losses)
    loss = policy_loss + config.value_coef * value_loss
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * mean(new.entropy)

    with torch.no_grad():
        kl_from_old = partial(ppo.kl_estimate, logprobs=minibatch.old_logprobs, other_logprobs=new.logprobs, mask=mask)
        stats = {
            "loss": loss,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_fraction": mean(clipped),
            "value_clip_fraction": mean(value_clipped),
            "approx_kl_k1": mean(kl_from_old(estimator="k1")),
            "approx_kl_k3": mean(kl_from_old(estimator="k3")),
            "ratio": mean(ratio),
            "ratio_min": ratio.masked_fill(~mask, float("inf")).min(),
            "ratio_max": ratio.masked_fill(~mask, 0.0).max(),
        }
    return loss, {name: value.item() for name, value in stats.items()}


def accumulate_gradient(
    policy: PolicyModel, rollout: Rollout, rows: TensorType["rows"], config: Config
) -> dict[str, float]:
    """Add the gradient of the loss over a step's rows to the parameters', a minibatch at a time; its statistics.

    Of several processes, each adds that of its share of the rows, which may be none; the statistics are the step's.
    """
    lengths = rollout.mask.sum(1)[rows]
    n_tokens = int(lengths.sum())  # of the whole step, so that the processes' parts, too, add up
    own = own_of_sorted(lengths)
    parts = []
    for group in length_groups(lengths[own].tolist(), config.mini_batch_size):
        loss, stats = minibatch_loss(policy, select_rows(rollout, rows[own[group]]), n_tokens, config)
        loss.backward()
        parts.append(stats)
    return combine([stats for some in gathered(parts) for stats in some], sum)


def combine(parts: list[dict[str, float]], reduce) -> dict[str, float]:
    """One row of statistics from several: extremes by min and max, everything else by `reduce`."""
    special = {"ratio_min": min, "ratio_max": max}
    return {name: special.get(name, reduce)(part[name] for part in parts) for name in parts[0]}


def learning_rate(config: Config, update_number: int) -> float:
    """Linear to 0, per update: the first (number 0) has the full rate, the last one 1 / n_updates of it."""
    return config.learning_rate * (1 - update_number / config.n_updates)


def shuffled_steps(n_rows: int, config: Config, update_number: int) -> list[TensorType["rows"]]:
    """The rows of each optimizer step of an update: every epoch goes over all rows, in an order of its own."""
    step_size = config.mini_batch_size * config.gradient_accumulation_steps
    steps = []
    for epoch in range(config.ppo_epochs):
        order = permutation(config.seed, "steps", update_number, n_rows, part=epoch)
        steps += order.split(step_size)
    return steps


def update(
    policy: PolicyModel, optimizer: torch.optim.Optimizer, rollout: Rollout, config: Config, update_number: int
) -> dict[str, float]:
    """ppo_epochs passes over the rollout, an optimizer step for every few rows; the means of the steps' statistics.

    With `target_kl` (`kl_target` is another thing: for the price of KL), the update ends before a step whose k3 to the
    policy that sampled exceeds 1.5 target_kl, in nats a token; that step's statistics count. A step whose loss or
    gradient is not finite is not taken, and counted in `skipped_steps`; its statistics do not count.
    """
    policy.train()  # for activation checkpointing, which sleeps in eval mode; hub.prepare_config left no dropout
    optimizer.param_groups[0]["lr"] = learning_rate(config, update_number)
    device = rollout.mask.device
    history = []
    n_skipped = 0
    n_nonfinite_losses = 0
    for rows in shuffled_steps(len(rollout.mask), config, update_number):
        optimizer.zero_grad()
        stats = accumulate_gradient(policy, rollout, rows.to(device), config)
        sum_gradients(policy.parameters())
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        if not math.isfinite(stats["loss"] + stats["grad_norm"]):
            n_skipped += 1  # Adam would carry it into every weight, for good
            n_nonfinite_losses += not math.isfinite(stats["loss"])
            continue
        history.append(stats)
        if config.target_kl and stats["approx_kl_k3"] > 1.5 * config.target_kl:
            break
        optimizer.step()
    optimizer.zero_grad()  # nothing keeps gradients while the next rollout is sampled
    if device.type == "cpu":
        keep_freed_memory()  # else it goes back to the system, and returns page by page
    means = combine(history or [dict.fromkeys(stats, math.nan)], fmean)
    return means | {"skipped_steps": n_skipped, "nonfinite_losses": n_nonfinite_losses}


def new_state(policy: PolicyModel, config: Config) -> State:
    """Where a run begins."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, config.learning_rate, eps=1e-5, fused=True)
    return State(policy=policy, optimizer=optimizer, kl_coef=config.kl_coef)


def train(
    state: State, fixed: Fixed, prompts: Sequence[Prompt], config: Config
) -> Iterator[tuple[Rollout, dict[str, float]]]:
    """PPO: moves the state on, update by update, to the last one; yields after each its rollout and its statistics.

    All random numbers are functions of the seed and the update's number, so a run may go on from any of them.
    """
    for update_number in range(state.next_update, config.n_updates):
        # Sample responses, and score them: their tokens by policy and reference, their texts by the reward.
        batch = batch_of(prompts, config.batch_size, update_number, config.seed)
        rollout = collect_rollout(state.policy, fixed, batch, config, update_number)
        mask, values = rollout.mask, rollout.values

        # Shape: a price for every nat of KL to the reference, token by token, and the text's score on its last token.
        penalised = ppo.penalise_missing_eos(rollout.raw_scores, rollout.has_eos, config.missing_eos_penalty)
        moments = ppo.update_moments(state.moments, penalised)  # first, or the first rollout would have none
        scores = ppo.shape_scores(
            penalised,
            moments=moments if config.normalize_scores else None,
            whiten=config.whiten_scores,
            clip=config.score_clip or None,
        )
        kl = ppo.kl_estimate(
            logprobs=rollout.logprobs, other_logprobs=rollout.ref_logprobs, mask=mask, estimator=config.kl_estimator
        )
        rewards = ppo.shape_rewards(scores=scores, kl=kl, mask=mask, kl_coef=state.kl_coef)

        # Estimate: how much better was each token than expected, and what was to be expected?
        advantages = ppo.estimate_advantages(
            rewards=rewards, values=values, mask=mask, gamma=config.gamma, lam=config.lam
        )
        returns = ppo.estimate_returns(advantages=advantages, values=values, mask=mask)
        if config.whiten_advantages:
            advantages = ppo.masked_whiten(advantages, mask=mask)
        rollout = replace(rollout, scores=scores, kl=kl, rewards=rewards, advantages=advantages, returns=returns)

        # Update policy and values, several times on the same rollout.
        state.is_half_done = True
        stats = update(state.policy, state.optimizer, rollout, config, update_number)
        stats["kl_coef"] = state.kl_coef

        # Adapt the price of KL, by an estimate that is never negative.
        if config.kl_target:
            k3 = ppo.kl_estimate(
                logprobs=rollout.logprobs, other_logprobs=rollout.ref_logprobs, mask=mask, estimator="k3"
            )
            state.kl_coef = ppo.adapt_kl_coef(
                kl_coef=state.kl_coef,
                kl=k3.sum(1).mean().item(),
                target=config.kl_target,
                horizon=config.kl_horizon,
                n_responses=config.batch_size,
            )
        # Only now: where anything before has failed, the state still counts this update as not done, and `is_half_done`
        # tells whether weights may have moved.
        state.moments = moments
        state.idle_updates = state.idle_updates + 1 if math.isnan(stats["loss"]) else 0
        state.next_update = update_number + 1
        state.is_half_done = False
        yield rollout, stats
