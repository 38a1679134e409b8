"""docs/from_paper_to_code.md: the papers' equations evaluated by brute force, against the functions that train.

The oracles are plain Python: loops and sums written down from an equation as its paper prints it, over a world small
enough to enumerate. A token is 0 (the end), 1 or 2, a response has three at most, which makes 15 of them; a policy is a
table of three logits for each of the 7 prefixes that a token can follow. Tolerances are 1e-9, in double precision.
"""

import ast
import itertools
import math
import random
import re
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from tiny_models import brute_force, tiny_policy

import ppo
import train
from classifier import bradley_terry_loss
from config import Config

NAN = float("nan")
ROOT = Path(ppo.__file__).resolve().parent
PAGE = (ROOT / "docs/from_paper_to_code.md").read_text(encoding="utf-8")

# ----------------------------------------------------------------------------------------------------------------
# A world to enumerate: y = (y_0, ..., y_{T-1}), the state s_t is the prefix y_<t, the action a_t is y_t
# ----------------------------------------------------------------------------------------------------------------

VOCAB, LONGEST, END = 3, 3, 0
STATES = [state for n in range(LONGEST) for state in itertools.product(range(1, VOCAB), repeat=n)]
RESPONSES = [
    (*state, token)
    for state in STATES
    for token in range(VOCAB)
    if token == END or len(state) == LONGEST - 1  # cut at the cap
]
Table = dict[tuple[int, ...], list[float]]  # a number, or three logits, for each state


def drawn_table(seed: int) -> Table:
    draw = random.Random(seed)
    return {state: [draw.gauss(0, 1) for _ in range(VOCAB)] for state in STATES}


def probabilities(table: Table, state: tuple[int, ...]) -> list[float]:
    """softmax of the state's logits."""
    weights = [math.exp(logit) for logit in table[state]]
    return [weight / sum(weights) for weight in weights]


def logprob(table: Table, response: tuple[int, ...], t: int) -> float:
    """log π(a_t | s_t)."""
    return math.log(probabilities(table, response[:t])[response[t]])


def response_logprob(table: Table, response: tuple[int, ...]) -> float:
    """log π(y | x): that of the whole response."""
    return sum(logprob(table, response, t) for t in range(len(response)))


def steps(response: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
    """Its states and actions, (s_t, a_t)."""
    return [(response[:t], response[t]) for t in range(len(response))]


def kl(table: Table, other: Table, state: tuple[int, ...]) -> float:
    """KL[π(. | s), π'(. | s)]."""
    pairs = zip(probabilities(table, state), probabilities(other, state), strict=True)
    return sum(p * math.log(p / q) for p, q in pairs)


def drawn_numbers(seed: int) -> list[list[float]]:
    """A number for each token of each response."""
    draw = random.Random(seed)
    return [[draw.gauss(0, 1) for _ in response] for response in RESPONSES]


def per_token(function) -> list[list[float]]:
    """function(response, t) for each token of each response."""
    return [[function(response, t) for t in range(len(response))] for response in RESPONSES]


def padded(rows: list[list[float]]) -> torch.Tensor:
    """As the (batch, time) tensor that ours take: NaN where there is no token."""
    return torch.tensor([row + [NAN] * (LONGEST - len(row)) for row in rows], dtype=torch.float64)


def unpadded(x: torch.Tensor) -> list[list[float]]:
    return [row[: len(response)].tolist() for row, response in zip(x, RESPONSES, strict=True)]


MASK = ~padded([[0.0] * len(response) for response in RESPONSES]).isnan()
N_TOKENS = sum(len(response) for response in RESPONSES)
OLD, NEW, REFERENCE = drawn_table(1), drawn_table(2), drawn_table(3)
CRITIC = {state: logits[0] for state, logits in drawn_table(4).items()}  # V(s), right about nothing
SCORES = [row[0] for row in drawn_numbers(5)]  # r(x, y)


def ours_of(table: Table) -> torch.Tensor:
    """log π(a_t | s_t) as the functions of ppo.py are given it."""
    return padded(per_token(lambda response, t: logprob(table, response, t)))


def average(rows: list[list[float]]) -> float:
    """Ê_t: the mean over all tokens of a finite batch, here of all responses."""
    return sum(value for row in rows for value in row) / N_TOKENS


def ratio(response: tuple[int, ...], t: int) -> float:
    """π(a_t | s_t) / π_old(a_t | s_t)."""
    state, action = response[:t], response[t]
    return probabilities(NEW, state)[action] / probabilities(OLD, state)[action]


def gradient_of_logprob(table: Table, state: tuple[int, ...], action: int) -> list[float]:
    """∂ log π(a | s) / ∂z_b = [a = b] - π(b | s), for the three logits z of the state."""
    return [(action == b) - p for b, p in enumerate(probabilities(table, state))]


def weighted_gradient(table: Table, rows: list[list[float]], weights: list[float]) -> Table:
    """Σ_y w_y Σ_t Â_t ∇ log π(a_t | s_t), by state."""
    total = {state: [0.0] * VOCAB for state in STATES}
    for response, row, weight in zip(RESPONSES, rows, weights, strict=True):
        for (state, action), value in zip(steps(response), row, strict=True):
            for b, slope in enumerate(gradient_of_logprob(table, state, action)):
                total[state][b] += weight * value * slope
    return total


def gradient_by_ours(table: Table, rows: torch.Tensor, weights: list[float], count: int | None = None) -> Table:
    """Minus the gradient of our loss before any step, where π = π_old."""
    logits = torch.tensor([table[state] for state in STATES], dtype=torch.float64, requires_grad=True)
    numbers = torch.tensor([[STATES.index(y[:t]) if t < len(y) else 0 for t in range(LONGEST)] for y in RESPONSES])
    tokens = torch.tensor([list(y) + [END] * (LONGEST - len(y)) for y in RESPONSES])
    logprobs = ppo.token_logprobs(logits[numbers], tokens)
    q = ppo.importance_ratio(logprobs=logprobs, old_logprobs=logprobs.detach(), mask=MASK)
    scale = torch.tensor(weights, dtype=torch.float64)[:, None]
    losses, _ = ppo.policy_losses(ratio=q, advantages=scale * rows, mask=MASK, clip_range=0.2)
    (gradient,) = torch.autograd.grad(-ppo.masked_mean(losses, MASK, count), logits)
    return dict(zip(STATES, gradient.tolist(), strict=True))


def assert_same_tables(actual: Table, expected: Table, atol: float = 1e-9) -> None:
    for state in STATES:
        assert_close(actual[state], expected[state], atol)


# ----------------------------------------------------------------------------------------------------------------
# Schulman et al. 2017, Proximal Policy Optimization Algorithms
# ----------------------------------------------------------------------------------------------------------------


def test_ppo_1_and_2_the_policy_gradient():
    """ĝ = Ê_t[∇ log π Â], and the same by central differences of L^PG = Ê_t[log π Â]: our loss's before any step."""
    advantages = drawn_numbers(6)
    ours = gradient_by_ours(OLD, padded(advantages), [1.0] * len(RESPONSES))
    assert_same_tables(ours, weighted_gradient(OLD, advantages, [1 / N_TOKENS] * len(RESPONSES)))

    def objective(table: Table) -> float:
        rows = per_token(lambda response, t: logprob(table, response, t))
        return average([[p * a for p, a in zip(*pair, strict=True)] for pair in zip(rows, advantages, strict=True)])

    assert_same_tables(ours, central_differences(objective, OLD), atol=1e-8)


def central_differences(objective, table: Table, step: float = 1e-5) -> Table:
    slopes = {}
    for state in STATES:
        slopes[state] = []
        for b in range(VOCAB):
            ends = []
            for sign in (1, -1):
                moved = {name: list(logits) for name, logits in table.items()}
                moved[state][b] += sign * step
                ends.append(objective(moved))
            slopes[state].append((ends[0] - ends[1]) / (2 * step))
    return slopes


def surrogate_by_ours(advantages: list[list[float]], clip_range: float) -> float:
    """Our objective, which is minus the loss."""
    q = ppo.importance_ratio(logprobs=ours_of(NEW), old_logprobs=ours_of(OLD), mask=MASK)
    losses, _ = ppo.policy_losses(ratio=q, advantages=padded(advantages), mask=MASK, clip_range=clip_range)
    return -ppo.masked_mean(losses, MASK).item()


def test_ppo_3_and_6_the_surrogate_without_a_clip():
    """L^CPI = Ê_t[r_t(θ) Â_t], which ours is with a clip so far away that it never binds."""
    advantages = drawn_numbers(6)
    expected = average(per_token(lambda y, t: ratio(y, t) * advantages[RESPONSES.index(y)][t]))
    assert_close(surrogate_by_ours(advantages, clip_range=1e9), expected, atol=1e-9)
    assert abs(surrogate_by_ours(advantages, clip_range=0.2) - expected) > 0.1


def expected_estimate(estimator: str, state: tuple[int, ...]) -> float:
    """The mean over a ~ π_old of our estimate of KL[π_old, π] in a state."""
    old, new = (torch.tensor([probabilities(table, state)], dtype=torch.float64) for table in (OLD, NEW))
    estimates = ppo.kl_estimate(
        logprobs=old.log(), other_logprobs=new.log(), mask=torch.ones(1, VOCAB, dtype=torch.bool), estimator=estimator
    )
    return (old * estimates).sum().item()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_ppo_4_the_divergence_of_the_trust_region(estimator):
    """Ê_t[KL[π_old(. | s_t), π(. | s_t)]]: what `approx_kl_k1` and `approx_kl_k3` estimate at the tokens drawn."""
    for state in STATES:
        assert_close(expected_estimate(estimator, state), kl(OLD, NEW, state), atol=1e-9)


def test_ppo_5_and_8_the_surrogate_with_a_penalty():
    """L^KLPEN = Ê_t[r_t(θ) Â_t - β KL[π_old, π]]: our parts make it up, though no loss of ours has the second term."""
    advantages, beta = drawn_numbers(6), 0.7
    expected = average(
        per_token(lambda y, t: ratio(y, t) * advantages[RESPONSES.index(y)][t] - beta * kl(OLD, NEW, y[:t]))
    )
    divergence = average(per_token(lambda y, t: expected_estimate("k3", y[:t])))
    assert_close(surrogate_by_ours(advantages, clip_range=1e9) - beta * divergence, expected, atol=1e-9)


def test_ppo_section_4_doubles_beta_where_ours_takes_a_small_step():
    """β/2 below d_targ / 1.5 and 2 β above 1.5 d_targ, which ours is not: 256 responses move it by .512 % at most."""

    def by_the_paper(beta: float, d: float, target: float) -> float:
        return beta / 2 if d < target / 1.5 else beta * 2 if d > target * 1.5 else beta

    def by_ours(d: float) -> float:
        return ppo.adapt_kl_coef(kl_coef=1.0, kl=d, target=6.0, horizon=10_000, n_responses=256)

    for d, factor, step in [(3.0, 0.5, -0.00512), (6.0, 1.0, 0.0), (8.0, 1.0, 0.00512), (12.0, 2.0, 0.00512)]:
        assert by_the_paper(1.0, d, 6.0) == factor
        assert_close(by_ours(d) - 1, step, atol=1e-9)


@pytest.mark.parametrize("clip_range", [0.1, 0.2, 0.3])
def test_ppo_7_the_clipped_surrogate(clip_range):
    """L^CLIP = Ê_t[min(r_t(θ) Â_t, clip(r_t(θ), 1 - ε, 1 + ε) Â_t)]."""
    advantages = drawn_numbers(6)

    def term(response: tuple[int, ...], t: int) -> float:
        r, a = ratio(response, t), advantages[RESPONSES.index(response)][t]
        clipped = 1 - clip_range if r < 1 - clip_range else 1 + clip_range if r > 1 + clip_range else r
        return r * a if r * a < clipped * a else clipped * a

    assert_close(surrogate_by_ours(advantages, clip_range), average(per_token(term)), atol=1e-9)


QUERIES = [[5, 3, 8], [4, 7], [6]]
ANSWERS = [[4, 9, 1], [3, 1], [7, 2, 5, 6]]  # of the small GPT-2, whose end is 1; the last one is cut


def numbers_for(answers: list[list[int]], seed: int) -> list[list[float]]:
    draw = random.Random(seed)
    return [[draw.gauss(0, 0.4) for _ in answer] for answer in answers]


def as_rows(rows: list[list], side: str = "right", fill: float = 0) -> torch.Tensor:
    width = max(len(row) for row in rows)
    fills = [[fill] * (width - len(row)) for row in rows]
    return torch.tensor([f + row if side == "left" else row + f for row, f in zip(rows, fills, strict=True)])


def minibatch_of(**rows: list[list[float]]) -> train.Minibatch:
    return train.Minibatch(
        query_ids=as_rows(QUERIES, "left"),
        query_mask=as_rows([[True] * len(query) for query in QUERIES], "left", False),
        response_ids=as_rows(ANSWERS),
        mask=as_rows([[True] * len(answer) for answer in ANSWERS], fill=False),
        **{name: as_rows(numbers, fill=NAN) for name, numbers in rows.items()},
    )


def test_ppo_9_the_objective_with_values_and_entropy():
    """L^{CLIP+VF+S} = Ê_t[L^CLIP - c_1 (V - V^targ)² + c_2 S]: minus our loss, with c_1 = value_coef / 2, where the
    clip of the values, which the paper does not have, is too far away to bind.

    The model is asked for one token at a time (`brute_force` in tiny_models.py).
    """
    config = Config(value_coef=0.6, entropy_coef=0.2, clip_range=0.2, clip_range_value=1e9, temperature=1.0)
    policy = tiny_policy("gpt2")
    new = [brute_force(policy, query, answer, 1.0) for query, answer in zip(QUERIES, ANSWERS, strict=True)]
    noise, advantages = numbers_for(ANSWERS, 7), numbers_for(ANSWERS, 8)
    old_logprobs = [[p + d for p, d in zip(row[0], ds, strict=True)] for row, ds in zip(new, noise, strict=True)]
    targets = numbers_for(ANSWERS, 9)
    total, n_tokens = 0.0, sum(len(answer) for answer in ANSWERS)
    for i, answer in enumerate(ANSWERS):
        for t in range(len(answer)):
            r = math.exp(new[i][0][t] - old_logprobs[i][t])
            clip_term = min(r * advantages[i][t], min(max(r, 0.8), 1.2) * advantages[i][t])
            total += clip_term - 0.3 * (new[i][1][t] - targets[i][t]) ** 2 + 0.2 * new[i][2][t]
    minibatch = minibatch_of(
        old_logprobs=old_logprobs, old_values=numbers_for(ANSWERS, 10), advantages=advantages, returns=targets
    )
    loss, stats = train.minibatch_loss(policy, minibatch, n_tokens, config)
    assert_close(-loss.item(), total / n_tokens)
    assert 0 < stats["clip_fraction"] < 1 and stats["value_clip_fraction"] == 0


def values_of(response: tuple[int, ...]) -> list[float]:
    """V(s_0), ..., V(s_{T-1}), and V(s_T) = 0, where the episode has ended."""
    return [CRITIC[response[:t]] for t in range(len(response))] + [0.0]


def td_residual(rewards: list[float], values: list[float], t: int, gamma: float) -> float:
    """δ_t = r_t + γ V(s_{t+1}) - V(s_t)."""
    return rewards[t] + gamma * values[t + 1] - values[t]


REWARDS = drawn_numbers(11)


def advantages_by_ours(gamma: float, lam: float, rewards: list[list[float]] = REWARDS) -> list[list[float]]:
    values = padded([values_of(response)[:-1] for response in RESPONSES])
    advantages = ppo.estimate_advantages(rewards=padded(rewards), values=values, mask=MASK, gamma=gamma, lam=lam)
    assert (advantages[~MASK] == 0).all()
    return unpadded(advantages)


def assert_same_rows(actual: list[list[float]], expected: list[list[float]]) -> None:
    for row, wanted in zip(actual, expected, strict=True):
        assert_close(row, wanted, atol=1e-9)


def test_ppo_10_the_estimator_with_a_horizon():
    """Â_t = -V(s_t) + r_t + γ r_{t+1} + ... + γ^{T-1-t} r_{T-1} + γ^{T-t} V(s_T), V(s_T) = 0: ours with λ = 1.

    The paper prints γ^{T-t+1} before r_{T-1}, which does not continue the sum that it ends.
    """
    gamma = 0.9

    def estimate(rewards: list[float], values: list[float], t: int, last_power: int) -> float:
        end = len(rewards)
        powers = [*range(end - 1 - t), last_power]
        terms = [gamma**power * reward for power, reward in zip(powers, rewards[t:], strict=True)]
        return -values[t] + sum(terms) + gamma ** (end - t) * values[end]

    def estimates(excess: int) -> list[list[float]]:
        return [
            [estimate(row, values_of(y), t, len(row) - 1 - t + excess) for t in range(len(row))]
            for y, row in zip(RESPONSES, REWARDS, strict=True)
        ]

    assert_same_rows(advantages_by_ours(gamma, lam=1.0), estimates(excess=0))
    with pytest.raises(AssertionError):
        assert_same_rows(advantages_by_ours(gamma, lam=1.0), estimates(excess=2))  # T - t + 1, as printed


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (1.0, 0.95), (1.0, 0.0), (0.5, 1.0)])
def test_ppo_11_and_12_the_truncated_estimator(gamma, lam):
    """Â_t = δ_t + (γλ) δ_{t+1} + ... + (γλ)^{T-1-t} δ_{T-1}: term by term, as far as the response goes."""
    expected = []
    for response, rewards in zip(RESPONSES, REWARDS, strict=True):
        values, row = values_of(response), []
        for t in range(len(response)):
            estimate, factor = 0.0, 1.0
            for k in range(t, len(response)):
                estimate += factor * td_residual(rewards, values, k, gamma)
                factor *= gamma * lam
            row.append(estimate)
        expected.append(row)
    assert_same_rows(advantages_by_ours(gamma, lam), expected)


def test_ppo_algorithm_1_goes_over_all_rows_in_every_epoch():
    """K epochs of minibatches of M rows, all of them of one rollout."""
    config = Config(ppo_epochs=3, mini_batch_size=2, gradient_accumulation_steps=2, batch_size=12)
    orders = [rows.tolist() for rows in train.shuffled_steps(12, config, update_number=0)]
    assert [len(rows) for rows in orders] == [4, 4, 4] * 3
    epochs = [list(itertools.chain(*orders[start : start + 3])) for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


# ----------------------------------------------------------------------------------------------------------------
# Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation
# ----------------------------------------------------------------------------------------------------------------


def following(state: tuple[int, ...]) -> list[tuple[tuple[int, ...], float]]:
    """All responses that begin with a state, and how probable each is from there on under the old policy."""
    t = len(state)
    return [(y, math.prod(math.exp(logprob(OLD, y, k)) for k in range(t, len(y)))) for y in RESPONSES if y[:t] == state]


def discounted(rewards: list[float], t: int, gamma: float) -> float:
    """Σ_l γ^l r_{t+l}."""
    return sum(gamma**l * reward for l, reward in enumerate(rewards[t:]))  # noqa: E741


def state_rewards(response: tuple[int, ...]) -> list[float]:
    """r(s_t, a_t): of a state and an action, so that it is the same for every response that goes through them."""
    return [REFERENCE[state][action] for state, action in steps(response)]


def state_value(state: tuple[int, ...], gamma: float) -> float:
    """V^{π,γ}(s), eq. 4."""
    return sum(p * discounted(state_rewards(y), len(state), gamma) for y, p in following(state))


def action_value(state: tuple[int, ...], action: int, gamma: float) -> float:
    """Q^{π,γ}(s, a), eq. 4."""
    chosen = [(y, p) for y, p in following(state) if y[len(state)] == action]
    return sum(p * discounted(state_rewards(y), len(state), gamma) for y, p in chosen) / sum(p for _, p in chosen)


def expected_advantage(state: tuple[int, ...], action: int, rows: list[list[float]]) -> float:
    """The mean of Â_t over what follows (s_t, a_t)."""
    chosen = [(y, p) for y, p in following(state) if y[len(state)] == action]
    return sum(p * rows[RESPONSES.index(y)][len(state)] for y, p in chosen) / sum(p for _, p in chosen)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_gae_2_to_5_and_10_with_the_true_values_the_mean_is_the_advantage(gamma, lam, monkeypatch):
    """E[Â_t | s_t, a_t] = A^{π,γ} = Q^{π,γ} - V^{π,γ} where V = V^{π,γ}: for λ = 0 that is E[δ_t], eq. 10."""
    monkeypatch.setitem(globals(), "CRITIC", {state: state_value(state, gamma) for state in STATES})
    rows = advantages_by_ours(gamma, lam, [state_rewards(y) for y in RESPONSES])
    for state in STATES:
        for action in range(VOCAB):
            advantage = action_value(state, action, gamma) - state_value(state, gamma)
            assert_close(expected_advantage(state, action, rows), advantage, atol=1e-9)


def test_gae_6_to_8_and_19_lambda_1_is_just_whatever_the_values_are():
    """E[Σ_t Â_t ∇ log π] = g^γ = E[Σ_t A^{π,γ} ∇ log π] for λ = 1 with a critic that is right about nothing, and not
    for λ = 0. Our loss's gradient is that expectation, over all responses as often as they are drawn.
    """
    gamma, rewards = 0.8, [state_rewards(y) for y in RESPONSES]
    weights = [math.exp(response_logprob(OLD, y)) for y in RESPONSES]
    true = per_token(lambda y, t: action_value(y[:t], y[t], gamma) - state_value(y[:t], gamma))
    expected = weighted_gradient(OLD, true, weights)
    estimated = padded(advantages_by_ours(gamma, 1.0, rewards))
    assert_same_tables(gradient_by_ours(OLD, estimated, weights, count=1), expected)
    biased = gradient_by_ours(OLD, padded(advantages_by_ours(gamma, 0.0, rewards)), weights, count=1)
    assert max(abs(a - b) for s in STATES for a, b in zip(biased[s], expected[s], strict=True)) > 0.05


def test_gae_1_and_9_the_estimator_is_a_sum_over_an_episode_and_ours_a_mean_over_tokens():
    """ĝ = 1/N Σ_n Σ_t Â_t^n ∇ log π(a_t^n | s_t^n): of N responses with Σm tokens, Σm / N times ours."""
    rows, n = advantages_by_ours(0.9, 0.7), len(RESPONSES)
    expected = weighted_gradient(OLD, rows, [1 / n] * n)
    ours = gradient_by_ours(OLD, padded(rows), [1.0] * n)
    assert_same_tables({s: [N_TOKENS / n * slope for slope in slopes] for s, slopes in ours.items()}, expected)


def k_step(rewards: list[float], values: list[float], t: int, k: int, gamma: float) -> float:
    """Â_t^(k) = -V(s_t) + r_t + γ r_{t+1} + ... + γ^{k-1} r_{t+k-1} + γ^k V(s_{t+k}), all 0 after the end."""
    after_the_end = [0.0] * k
    rewards, values = rewards + after_the_end, values + after_the_end
    return -values[t] + sum(gamma**l * rewards[t + l] for l in range(k)) + gamma**k * values[t + k]  # noqa: E741


@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_gae_11_to_15_the_k_step_estimators(gamma):
    """Σ_{l<k} γ^l δ_{t+l} of our δ, which is our estimate with λ = 0; beyond the end eq. 15, ours with λ = 1."""
    residuals, returns = advantages_by_ours(gamma, lam=0.0), advantages_by_ours(gamma, lam=1.0)
    for i, (response, rewards) in enumerate(zip(RESPONSES, REWARDS, strict=True)):
        values = values_of(response)
        for t in range(len(response)):
            for k in range(1, 6):
                telescoped = sum(gamma**l * delta for l, delta in enumerate(residuals[i][t : t + k]))  # noqa: E741
                assert_close(telescoped, k_step(rewards, values, t, k, gamma), atol=1e-9)
            assert_close(returns[i][t], k_step(rewards, values, t, 50, gamma), atol=1e-9)


@pytest.mark.parametrize(("gamma", "lam"), [(0.8, 0.6), (1.0, 0.8), (1.0, 0.3)])
def test_gae_16_the_average_of_the_k_step_estimators_and_the_double_sum(gamma, lam):
    """(1 - λ) Σ_k λ^{k-1} Â_t^(k), cut where λ^k < 1e-13, and Σ_l (γλ)^l δ_{t+l}: both are ours."""
    n_terms = math.ceil(math.log(1e-13) / math.log(lam))
    averages, sums = [], []
    for response, rewards in zip(RESPONSES, REWARDS, strict=True):
        values, ends = values_of(response), range(len(response))
        averages.append(
            [
                (1 - lam) * sum(lam ** (k - 1) * k_step(rewards, values, t, k, gamma) for k in range(1, n_terms))
                for t in ends
            ]
        )
        sums.append(
            [
                sum((gamma * lam) ** (k - t) * td_residual(rewards, values, k, gamma) for k in ends if k >= t)
                for t in ends
            ]
        )
    ours = advantages_by_ours(gamma, lam)
    assert_same_rows(ours, sums)
    assert_same_rows(ours, averages)


def test_gae_17_and_18_the_two_ends_of_lambda():
    """GAE(γ, 0): r_t + γ V(s_{t+1}) - V(s_t). GAE(γ, 1): Σ_l γ^l r_{t+l} - V(s_t)."""
    gamma, zero, one = 0.8, advantages_by_ours(0.8, lam=0.0), advantages_by_ours(0.8, lam=1.0)
    for i, (response, rewards) in enumerate(zip(RESPONSES, REWARDS, strict=True)):
        values = values_of(response)
        for t in range(len(response)):
            assert_close(zero[i][t], rewards[t] + gamma * values[t + 1] - values[t], atol=1e-9)
            assert_close(one[i][t], discounted(rewards, t, gamma) - values[t], atol=1e-9)


def test_gae_28_what_the_values_learn():
    """Σ_n (V(s_n) - V̂_n)², V̂_t = Σ_l γ^l r_{t+l}: twice the sum of our losses, with λ = 1 and a clip that is far away.
    Footnote 2's V̂^λ = V_old + Σ_l (γλ)^l δ_{t+l} is what we have for the other λ.
    """
    gamma, values = 0.8, [values_of(response)[:-1] for response in RESPONSES]
    new = drawn_numbers(12)
    for lam in (1.0, 0.7):
        advantages = padded(advantages_by_ours(gamma, lam))
        returns = ppo.estimate_returns(advantages=advantages, values=padded(values), mask=MASK)
        if lam == 1:
            targets = [[discounted(row, t, gamma) for t in range(len(row))] for row in REWARDS]
        else:
            targets = [
                [
                    v[t] + sum((gamma * lam) ** (k - t) * td_residual(r, [*v, 0.0], k, gamma) for k in range(t, len(r)))
                    for t in range(len(r))
                ]
                for r, v in zip(REWARDS, values, strict=True)
            ]
        assert_same_rows(unpadded(returns), targets)
        losses, _ = ppo.value_losses(
            values=padded(new), old_values=padded(values), returns=returns, mask=MASK, clip_range_value=1e9
        )
        pairs = zip(itertools.chain(*new), itertools.chain(*targets), strict=True)
        assert_close(2 * losses.sum().item(), sum((v - target) ** 2 for v, target in pairs), atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------
# Ziegler et al. 2019, Stiennon et al. 2020, Ouyang et al. 2022
# ----------------------------------------------------------------------------------------------------------------


def rewards_by_ours(beta: float, scores: list[float] = SCORES) -> torch.Tensor:
    divergence = ppo.kl_estimate(logprobs=ours_of(NEW), other_logprobs=ours_of(REFERENCE), mask=MASK)
    return ppo.shape_rewards(scores=torch.tensor(scores, dtype=torch.float64), kl=divergence, mask=MASK, kl_coef=beta)


def whole_reward(table: Table, response: tuple[int, ...], beta: float) -> float:
    """R(x, y) = r(x, y) - β log(π(y | x) / ρ(y | x))."""
    pi, rho = (math.exp(response_logprob(each, response)) for each in (table, REFERENCE))
    return SCORES[RESPONSES.index(response)] - beta * math.log(pi / rho)


def test_ziegler_1_the_loss_of_a_reward_model_is_ours_for_two_options():
    """log(exp r(x, y_b) / Σ_i exp r(x, y_i)), averaged, with the sign of a loss: of its four options, ours has two."""
    pairs, chosen = [[0.3, -1.2], [2.0, 2.5], [-0.7, 0.1]], [0, 1, 0]
    terms = [math.log(math.exp(r[b]) / sum(math.exp(value) for value in r)) for r, b in zip(pairs, chosen, strict=True)]
    rewards = torch.tensor(pairs, dtype=torch.float64)
    best = torch.tensor([r[b] for r, b in zip(pairs, chosen, strict=True)], dtype=torch.float64)
    loss = bradley_terry_loss(chosen=best, rejected=rewards.sum(1) - best)
    assert_close(loss, -sum(terms) / 3)


def test_ziegler_2_the_rewards_of_a_response_sum_to_its_modified_reward():
    """And on average over all responses, to E_π[r] - β KL(π, ρ), the divergence of whole responses."""
    beta = 0.3
    sums = rewards_by_ours(beta).sum(1)
    assert_close(sums, [whole_reward(NEW, y, beta) for y in RESPONSES])
    drawn = [math.exp(response_logprob(NEW, y)) for y in RESPONSES]
    assert_close(sum(drawn), 1.0, atol=1e-9)
    divergence = sum(
        p * (response_logprob(NEW, y) - response_logprob(REFERENCE, y)) for p, y in zip(drawn, RESPONSES, strict=True)
    )
    expected = sum(p * score for p, score in zip(drawn, SCORES, strict=True)) - beta * divergence
    assert_close(sum(p * total for p, total in zip(drawn, sums.tolist(), strict=True)), expected, atol=1e-9)


def test_ziegler_section_2_2_the_price_of_kl():
    """e_t = clip((KL - KL_target) / KL_target, -.2, .2), β ← β (1 + K_β e_t): K_β = .1 is a horizon of ten rollouts."""
    beta = ours = 0.15
    for kl_now in (0.0, 3.0, 5.5, 6.3, 8.0, 40.0, 6.0):
        error = (kl_now - 6.0) / 6.0
        error = -0.2 if error < -0.2 else 0.2 if error > 0.2 else error
        beta = beta * (1 + 0.1 * error)
        ours = ppo.adapt_kl_coef(kl_coef=ours, kl=kl_now, target=6.0, horizon=5120, n_responses=512)
        assert_close(ours, beta, atol=1e-9)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_stiennon_the_loss_of_a_reward_model():
    """-E[log σ(r(x, y_i) - r(x, y_{1-i}))], i the summary that was preferred."""
    data = [((0.4, -0.3), 0), ((1.5, 2.2), 1), ((-2.0, 0.5), 0)]
    expected = -sum(math.log(sigmoid(r[i] - r[1 - i])) for r, i in data) / 3
    chosen, rejected = (torch.tensor([r[pick(i)] for r, i in data]).double() for pick in (lambda i: i, lambda i: 1 - i))
    assert_close(bradley_terry_loss(chosen=chosen, rejected=rejected), expected, atol=1e-7)


def test_stiennon_the_full_reward_is_the_return_of_the_first_token():
    """R(x, y) = r(x, y) - β log(π^RL(y | x) / π^SFT(y | x)), γ = 1: of our returns with λ = 1, the one at t = 0."""
    values = padded([values_of(response)[:-1] for response in RESPONSES])
    advantages = ppo.estimate_advantages(rewards=rewards_by_ours(0.05), values=values, mask=MASK, gamma=1.0, lam=1.0)
    returns = ppo.estimate_returns(advantages=advantages, values=values, mask=MASK)
    assert_close(returns[:, 0], [whole_reward(NEW, y, 0.05) for y in RESPONSES])


def test_instructgpt_1_the_loss_over_all_pairs_of_a_ranking():
    """-1 / (K choose 2) E[log σ(r(x, y_w) - r(x, y_l))]: ours, given all pairs of rankings of one K as rows."""
    rankings = [[1.2, 0.4, 0.5, -2.0], [0.1, 0.3, -0.2, -0.6]]  # r(x, y), from the best to the worst by the labeller
    losses, winners, losers = [], [], []
    for ranked in rankings:
        pairs = list(itertools.combinations(ranked, 2))
        assert len(pairs) == math.comb(4, 2)
        losses.append(-sum(math.log(sigmoid(w - l)) for w, l in pairs) / math.comb(4, 2))  # noqa: E741
        winners += [w for w, _ in pairs]
        losers += [loser for _, loser in pairs]
    chosen, rejected = (torch.tensor(rewards, dtype=torch.float64) for rewards in (winners, losers))
    assert_close(bradley_terry_loss(chosen=chosen, rejected=rejected), sum(losses) / 2)


def test_instructgpt_2_our_gradient_is_that_of_its_objective_without_the_pretraining_term():
    """E_{y~π}[r(x, y) - β log(π(y | x) / π^SFT(y | x))], γ = 0, by central differences: the mean over all responses
    of our loss's gradient before any step, summed over tokens. With γ = 27.8 its gradient is another one.
    """
    beta = 0.3

    def objective(table: Table, gamma: float = 0.0) -> float:
        drawn = [(math.exp(response_logprob(table, y)), y) for y in RESPONSES]
        pretraining = sum(response_logprob(table, y) for y in RESPONSES) / len(RESPONSES)  # log π(x), x ~ D_pretrain
        return sum(p * whole_reward(table, y, beta) for p, y in drawn) + gamma * pretraining

    rewards = unpadded(rewards_by_ours(beta))
    advantages = padded(advantages_by_ours(1.0, 1.0, rewards))
    weights = [math.exp(response_logprob(NEW, y)) for y in RESPONSES]
    ours = gradient_by_ours(NEW, advantages, weights, count=1)
    assert_same_tables(ours, central_differences(objective, NEW), atol=1e-8)
    mixed = central_differences(lambda table: objective(table, gamma=27.8), NEW)
    assert max(abs(a - b) for s in STATES for a, b in zip(ours[s], mixed[s], strict=True)) > 1


# ----------------------------------------------------------------------------------------------------------------
# The page
# ----------------------------------------------------------------------------------------------------------------

HEADING = re.compile(r"^### (.*)$", re.MULTILINE)
PARTS = dict(zip(HEADING.findall(PAGE), HEADING.split(PAGE)[2::2], strict=True))
SOURCE = re.compile(r"^`(\w+)` in \[(\w+\.py)\]\(\.\./(\w+\.py)\):\n\n```python\n(.*?)```", re.MULTILINE | re.DOTALL)


def source_of(file: str, name: str) -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name == name]
    assert len(nodes) == 1, f"{file} has {len(nodes)} functions {name}"
    return "\n" + textwrap.dedent("\n".join(text.splitlines()[nodes[0].lineno - 1 : nodes[0].end_lineno])) + "\n"


def shifted(block: str, by: int) -> str:
    return textwrap.indent(textwrap.dedent(block), " " * by)


def test_every_line_of_code_on_the_page_is_one_of_the_source():
    """As a whole: the lines of a block follow one another in the function that is named above it."""
    found = SOURCE.findall(PAGE)
    assert len(found) == PAGE.count("```python\n") > 15
    for name, file, linked, block in found:
        assert file == linked
        source = source_of(file, name)
        assert any("\n" + shifted(block, by) in source for by in (0, 4, 8, 12, 16)), f"{name} has no lines\n{block}"


def test_every_equation_on_the_page_names_a_test_of_this_file_and_every_test_is_named():
    tests = {name for name in globals() if re.match(r"test_(ppo|gae|ziegler|stiennon|instructgpt)_", name)}
    assert set(re.findall(r"`(test_\w+)`", PAGE)) == tests
    for title, part in PARTS.items():
        assert re.search(r"^Checked by `test_\w+`", part, re.MULTILINE), title
        assert "```math\n" in part or "Algorithm" in title, title


def numbers_on_the_page() -> set[tuple[str, int]]:
    """(paper, number of an equation), by the headings: "PPO 11 and 12: ...", "GAE 2 to 5, 10: ..."."""
    found = set()
    for title in PARTS:
        paper, numbers = re.match(r"(\w+) ?([^:]*):", title).groups()
        for first, _, last in re.findall(r"(\d+)( to (\d+))?", re.sub(r"(section|Algorithm) [\d.]+", "", numbers)):
            found |= {(paper, n) for n in range(int(first), int(last or first) + 1)}
    return found


def test_the_page_has_the_numbered_equations_of_the_papers():
    ours = numbers_on_the_page()
    assert {n for paper, n in ours if paper == "PPO"} == set(range(1, 13))
    assert {n for paper, n in ours if paper == "GAE"} == {*range(1, 20), 28}
    assert {n for paper, n in ours if paper == "Ziegler"} == {1, 2}
    assert {n for paper, n in ours if paper == "InstructGPT"} == {1, 2}


NAMES = {"PPO": "PPO", "GAE": "GAE", "Ziegler et al. 2019": "Ziegler", "Ouyang et al. 2022": "InstructGPT"}
CITED = re.compile(rf"({'|'.join(map(re.escape, NAMES))})(?: \(arXiv:[\d.]+\))?,\s+eq\. (\d+)")


def test_equations_that_the_code_names_are_on_the_page():
    """So that a reader who meets a number in a docstring finds it, and the text that it was checked against."""
    texts = {file.name: file.read_text(encoding="utf-8") for file in ROOT.glob("*.py")}
    found = [(NAMES[paper], int(number)) for text in texts.values() for paper, number in CITED.findall(text)]
    assert len(found) == sum(len(re.findall(r"\beq\. \d", text)) for text in texts.values()) >= 6
    assert set(found) <= numbers_on_the_page()


REFUSED = ("operatorname", "mbox", "phantom", "newcommand", "DeclareMathOperator", "tag", "label", "begin{cases}")


def test_the_equations_on_the_page_are_such_as_github_renders():
    r"""GitHub reads Markdown before LaTeX: only in ```math blocks and between $` and `$ do `_`, `\\` and `{` reach the
    latter. It refuses some macros, and inline math that touches a letter or a hyphen, or spans lines.
    """
    blocks = re.findall(r"^```math\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"\$`([^`\n]+)`\$", prose)
    assert len(blocks) >= 20 and len(inline) >= 20
    assert "$" not in re.sub(r"\$`[^`\n]+`\$", "", prose)
    assert not re.search(r"[\w-]\$`|`\$[\w-]", prose)
    for equation in blocks + inline:
        assert equation.count("{") == equation.count("}"), equation
        assert len(re.findall(r"\\left\b", equation)) == len(re.findall(r"\\right\b", equation)), equation
        assert not any(f"\\{macro}" in equation for macro in REFUSED), equation
    assert re.findall(r"\n\n```math\n", PAGE) and not re.search(r"[^\n]\n```math", PAGE)
