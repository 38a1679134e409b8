"""Tabular PPO, made of ppo.py's functions only, finds the optimum that theory gives: π* ∝ ρ exp(s / β).

Both tasks are small enough to know π* exactly: a bandit (one token) and the token task of test_ppo.py (40 responses,
up to three tokens). The policy is a table of logits and the critic a table of values, one row per prefix, so nothing
but the mathematics is under test. The learning rate must fall to 0: under a constant one Adam circles the optimum
at a distance of up to .1. Each run must come close, and each run with one error put in must stay away.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_ppo import TokenTask

# The same ppo.py under another name, so without the runtime shape checks: they are on in test_ppo.py and slow.
spec = importlib.util.spec_from_file_location("ppo_without_shape_checks", Path(__file__).parents[1] / "ppo.py")
ppo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ppo)


class Bandit:
    """Five actions, one token each, no EOS: closed form throughout."""

    vocab, time, eos, beta = 5, 1, -1, 0.5
    reference = torch.tensor([[0.0, 0.5, -0.5, 1.0, -1.0]], dtype=torch.float64).log_softmax(-1)
    rewards = torch.tensor([1.0, 0.0, 0.5, -0.5, 1.5], dtype=torch.float64)
    optimum = (reference + rewards / beta).log_softmax(-1)
    value = beta * (reference + rewards / beta).logsumexp(-1).item()

    def score(self, responses: torch.Tensor) -> torch.Tensor:
        return self.rewards[responses[:, 0]]

    def prefixes(self, responses: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(responses)

    def distance(self, logits: torch.Tensor) -> float:
        """Largest error of an action's probability."""
        return (logits.softmax(-1) - self.optimum.exp()).abs().max().item()


class Tokens(TokenTask):
    def __init__(self):
        super().__init__()
        self.value = self.values[0].item()

    def distance(self, logits: torch.Tensor) -> float:
        """KL(π || π*) over all whole responses, in nats."""
        log_pi, log_best = self.log_probability(logits), self.log_probability(self.optimum)
        return (log_pi.exp() * (log_pi - log_best)).sum().item()


@dataclass
class Run:
    updates: int = 50
    responses: int = 256
    epochs: int = 4
    minibatches: int = 4
    lr: float = 0.05
    lam: float = 0.95
    seed: int = 0
    estimator: str = "k1"  # in the reward
    kl_sign: int = 1
    policy_sign: int = 1
    whiten: bool = False


def tabular_ppo(task, run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits and the values, one row per prefix, after `run.updates` rounds of sampling and learning."""
    generator = torch.Generator().manual_seed(run.seed)
    logits = task.reference.clone().requires_grad_()
    values = torch.zeros(len(logits), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, values], lr=run.lr, eps=1e-5)
    for update in range(run.updates):
        optimizer.param_groups[0]["lr"] = run.lr * (1 - update / run.updates)
        rollout = sample(task, run, logits.detach(), values.detach(), generator)
        for _ in range(run.epochs):
            order = torch.randperm(run.responses, generator=generator)
            for rows in order.chunk(run.minibatches):
                loss = minibatch_loss(task, run, logits, values, Rollout(*(tensor[rows] for tensor in rollout)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return logits.detach(), values.detach()


class Rollout(NamedTuple):
    response_ids: torch.Tensor
    mask: torch.Tensor
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor


def sample(task, run: Run, logits, values, generator) -> Rollout:
    tokens = torch.zeros(run.responses, task.time, dtype=torch.long)
    for t in range(task.time):
        state = task.prefixes(tokens)[:, t]
        tokens[:, t] = torch.multinomial(logits[state].softmax(-1), 1, generator=generator)[:, 0]
    mask = ppo.response_mask(tokens, task.eos)
    tokens = torch.where(mask, tokens, 0)
    states = task.prefixes(tokens)
    logprobs = ppo.token_logprobs(logits[states], tokens)
    ref_logprobs = ppo.token_logprobs(task.reference[states], tokens)
    kl = run.kl_sign * ppo.kl_estimate(logprobs, ref_logprobs, mask, run.estimator)
    rewards = ppo.shape_rewards(task.score(tokens), kl, mask, task.beta)
    advantages = ppo.estimate_advantages(rewards, values[states], mask, 1.0, run.lam)
    return Rollout(
        response_ids=tokens,
        mask=mask,
        logprobs=logprobs,
        values=values[states],
        advantages=ppo.masked_whiten(advantages, mask) if run.whiten else advantages,
        returns=ppo.estimate_returns(advantages, values[states], mask),
    )


def minibatch_loss(task, run: Run, logits, values, rows: Rollout) -> torch.Tensor:
    states = task.prefixes(rows.response_ids)
    logprobs = ppo.token_logprobs(logits[states], rows.response_ids)
    ratio = ppo.importance_ratio(logprobs, rows.logprobs, rows.mask)
    policy, _ = ppo.policy_losses(ratio, run.policy_sign * rows.advantages, rows.mask, 0.2)
    value, _ = ppo.value_losses(values[states], rows.values, rows.returns, rows.mask, 0.2)
    return ppo.masked_mean(policy, rows.mask) + ppo.masked_mean(value, rows.mask)


def distance_and_value_error(task, **options) -> tuple[float, float]:
    logits, values = tabular_ppo(task, Run(**options))
    return task.distance(logits), abs(values[0].item() - task.value)


def test_bandit_converges_to_the_optimum():
    """π* = (.3874, .0864, .0864, .0524, .3874) and V* = β log Z = .55065, in closed form; it starts .376 away."""
    task = Bandit()
    wanted = torch.tensor([[0.3874, 0.0864, 0.0864, 0.0524, 0.3874]], dtype=torch.float64)
    torch.testing.assert_close(task.optimum.exp(), wanted, rtol=0, atol=1e-4)
    assert abs(task.value - 0.55065) < 1e-5
    assert task.distance(task.reference) > 0.37
    distance, value_error = distance_and_value_error(task, updates=30)
    assert distance < 1e-3
    assert value_error < 1e-3


@pytest.mark.parametrize(
    ("options", "least"),
    [({"estimator": "k2"}, 0.15), ({"estimator": "k3"}, 0.15), ({"kl_sign": -1}, 0.5)],
    ids=["k2 in the reward", "k3 in the reward", "KL with the wrong sign"],
)
def test_bandit_misses_the_optimum_with_an_error(options, least):
    assert distance_and_value_error(Bandit(), updates=30, **options)[0] > least


def test_tokens_converge_to_the_optimum():
    """KL(π || π*) over whole responses falls from 2.07 nats to below .002, and V of the prompt reaches β log Z."""
    task = Tokens()
    assert task.distance(task.reference) > 2.0
    distance, value_error = distance_and_value_error(task, updates=60)
    assert distance < 2e-3
    assert value_error < 2e-3


def test_tokens_miss_the_optimum_with_k3_in_the_reward():
    assert distance_and_value_error(Tokens(), updates=60, estimator="k3")[0] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_longer_runs_come_closer_for_every_seed(seed):
    distance, value_error = distance_and_value_error(Bandit(), updates=100, seed=seed)
    assert distance < 1e-5
    assert value_error < 1e-5
    distance, value_error = distance_and_value_error(Tokens(), updates=200, seed=seed)
    assert distance < 3e-4
    assert value_error < 1e-3


@pytest.mark.slow
def test_whitened_advantages_reach_the_optimum_more_slowly():
    """At the optimum all advantages are noise, which whitening scales up to variance 1; the annealing copes with it."""
    assert distance_and_value_error(Bandit(), updates=200, whiten=True)[0] < 2e-3
    assert distance_and_value_error(Tokens(), updates=200, whiten=True)[0] < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"estimator": "k2"}, 0.5),
        ({"estimator": "abs"}, 0.5),
        ({"kl_sign": -1}, 0.5),
        ({"kl_sign": 0}, 0.5),
        ({"kl_sign": 2}, 0.1),
        ({"policy_sign": -1}, 0.5),
    ],
    ids=["k2", "abs", "KL with the wrong sign", "no KL", "KL counted twice", "ascent on the loss"],
)
def test_tokens_miss_the_optimum_with_other_errors(options, least):
    assert distance_and_value_error(Tokens(), updates=100, **options)[0] > least
