"""The mathematics of ppo.py, equation by equation, against oracles that share no code with it.

The oracles are of four kinds, and each test names its own: worked by hand; brute force, that is loops over plain
Python floats; exact enumeration of every response of a small task, which leaves no sampling noise; and arrays
recorded from TRL 0.11.4 (data/README.md). Tolerances are absolute, 1e-9 in double precision unless stated.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_close

import ppo

NAN = float("nan")


def f64(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def assert_equal(actual: torch.Tensor, expected) -> None:
    assert actual.tolist() == torch.as_tensor(expected).tolist()


def prefix_mask(lengths, time: int | None = None) -> torch.Tensor:
    return torch.arange(time or max(lengths)) < torch.tensor(lengths)[:, None]


def full_mask(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def fill_beyond(x: torch.Tensor, mask: torch.Tensor, value: float = NAN) -> torch.Tensor:
    return x.masked_fill(~mask, value)


def rows_of(x: torch.Tensor, mask: torch.Tensor) -> list[list[float]]:
    """The real tokens of every row as plain Python numbers."""
    return [row[: int(keep.sum())].tolist() for row, keep in zip(x, mask, strict=True)]


# ----------------------------------------------------------------------------------------------------------------
# m_t = 1 up to and including the first EOS
# ----------------------------------------------------------------------------------------------------------------

EOS, PAD = 1, 0
RESPONSES = [[5, 6, EOS, PAD, PAD], [5, EOS, 7, EOS, 9], [5, 6, 7, 8, 9], [EOS, 3, 3, 3, 3], [5, 6, 7, 8, EOS]]


def test_response_mask_ends_with_the_first_eos():
    """Worked by hand: EOS in the middle, twice, absent, first, last."""
    mask = ppo.response_mask(torch.tensor(RESPONSES), EOS)
    assert mask.dtype == torch.bool
    assert_equal(mask, prefix_mask([3, 2, 5, 1, 5]))


def test_response_mask_keeps_the_eos_when_the_pad_token_is_the_eos_token():
    """Worked by hand; "everything before the first pad" would give lengths 2, 0 and 4 here."""
    mask = ppo.response_mask(torch.tensor([[5, 6, EOS, EOS, EOS], [EOS] * 5, [5, 6, 7, 8, EOS]]), EOS)
    assert_equal(mask, prefix_mask([3, 1, 5]))


def test_response_mask_equals_brute_force_on_every_short_response():
    responses = list(itertools.product(range(3), repeat=4))
    lengths = [response.index(EOS) + 1 if EOS in response else 4 for response in responses]
    assert_equal(ppo.response_mask(torch.tensor(responses), EOS), prefix_mask(lengths))


# ----------------------------------------------------------------------------------------------------------------
# masked mean: Σ_m x / Σ m
# ----------------------------------------------------------------------------------------------------------------


def test_masked_mean_by_hand_with_nan_in_the_padding():
    x, mask = f64([1.0, 2.0, NAN], [6.0, NAN, NAN]), prefix_mask([2, 1], 3)
    assert_close(ppo.masked_mean(x, mask), 3.0)


def test_masked_mean_of_a_mask_is_a_fraction():
    flags = torch.tensor([[True, False, True], [False, True, True]])
    assert_close(ppo.masked_mean(flags, prefix_mask([2, 1], 3)), 1 / 3, atol=1e-7)


def test_masked_mean_of_nothing_is_zero_and_of_one_token_that_token():
    x = f64([5.0, NAN], [NAN, NAN])
    assert_close(ppo.masked_mean(x, prefix_mask([0, 0], 2)), 0.0)
    assert_close(ppo.masked_mean(x, prefix_mask([1, 0], 2)), 5.0)


def test_masked_mean_gradient_is_shared_equally_by_the_real_tokens():
    x = f64([1.0, 2.0, NAN], [6.0, NAN, NAN]).requires_grad_()
    ppo.masked_mean(x, prefix_mask([2, 1], 3)).backward()
    assert_close(x.grad, f64([1 / 3, 1 / 3, 0.0], [1 / 3, 0.0, 0.0]))


def test_losses_are_averaged_over_tokens_and_not_over_responses():
    """Worked by hand: five tokens with losses 1, 1, 1, 1, 10 and ten with 1 nine times and 10; 33/15 = 2.2, whereas
    the mean of the two rows' means is (2.8 + 1.9) / 2 = 2.35. `count` makes the parts add up to the former."""
    x = f64([1.0] * 4 + [10.0] + [NAN] * 5, [1.0] * 9 + [10.0])
    mask = prefix_mask([5, 10])
    assert_close(ppo.masked_mean(x, mask), 2.2)
    parts = [(x[:1], mask[:1]), (x[1:], mask[1:])]
    assert_close(sum(ppo.masked_mean(*part, count=15) for part in parts), 2.2)
    assert_close(sum(ppo.masked_mean(*part) for part in parts) / 2, 2.35)


# ----------------------------------------------------------------------------------------------------------------
# whitening: (x - μ) / sqrt(σ² + 1e-8), biased σ²
# ----------------------------------------------------------------------------------------------------------------


def test_whiten_by_hand():
    """[1, 2, 3, 4] has μ = 2.5 and biased σ² = 1.25; the padding holds 99."""
    x, mask = f64([1.0, 2.0, 99.0], [3.0, 4.0, 99.0]), prefix_mask([2, 2], 3)
    expected = f64([-1.3416407811, -0.4472135937, 0.0], [0.4472135937, 1.3416407811, 0.0])
    assert_close(ppo.masked_whiten(x, mask), expected)
    shifted = f64([1.1583592189, 2.0527864063, 0.0], [2.9472135937, 3.8416407811, 0.0])
    assert_close(ppo.masked_whiten(x, mask, shift_mean=False), shifted)


def test_whiten_equals_brute_force_over_the_real_tokens():
    x, mask = (
        torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        prefix_mask([6, 4, 1, 3]),
    )
    tokens = [value for row in rows_of(x, mask) for value in row]
    mean = sum(tokens) / len(tokens)
    variance = sum((value - mean) ** 2 for value in tokens) / len(tokens)
    expected = [[(value - mean) / math.sqrt(variance + 1e-8) for value in row] for row in rows_of(x, mask)]
    whitened = ppo.masked_whiten(fill_beyond(x, mask), mask)
    for row, wanted in zip(rows_of(whitened, mask), expected, strict=True):
        assert_close(f64(*row), wanted, atol=1e-12)
    assert_equal(whitened[~mask], [0.0] * 10)


def test_whitened_mean_is_0_and_biased_variance_1():
    x, mask = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), prefix_mask([5, 2, 4])
    real = ppo.masked_whiten(7 * x + 3, mask)[mask]
    assert_close(real.mean(), 0.0)
    assert_close((real**2).mean(), 1.0, atol=1e-8)
    assert_close(ppo.masked_whiten(7 * x + 3, mask, shift_mean=False)[mask].mean(), (7 * x + 3)[mask].mean())


def test_whiten_epsilon_stands_inside_the_root():
    """Worked by hand: ±1e-4 has σ² = 1e-8, and 1e-4 / sqrt(2e-8) = 1 / sqrt(2)."""
    x = f64([-1e-4, 1e-4])
    assert_close(ppo.masked_whiten(x, full_mask(x)), f64([-math.sqrt(0.5), math.sqrt(0.5)]))


@pytest.mark.parametrize("x", [f64([4.2]), f64([4.2, 4.2, 4.2]), f64([4.2, NAN])], ids=["one", "constant", "padded"])
def test_whiten_of_a_single_or_a_constant_token_is_0(x):
    """Bessel's correction would divide by 0 for the single one."""
    mask = ~x.isnan()
    assert_close(ppo.masked_whiten(x, mask), torch.zeros_like(x))
    assert_close(ppo.masked_whiten(x, mask, shift_mean=False), 4.2 * mask.double())


def test_whiten_is_over_the_whole_batch_it_is_given():
    """Worked by hand: [1, 2, 3, 10] has μ = 4, σ² = 12.5; its halves whitened apart would both be (-1, 1)."""
    x = f64([1.0, 2.0], [3.0, 10.0])
    s = math.sqrt(12.5 + 1e-8)
    assert_close(ppo.masked_whiten(x, full_mask(x)), f64([-3 / s, -2 / s], [-1 / s, 6 / s]))
    for half in x:
        assert_close(ppo.masked_whiten(half[None], full_mask(half[None])), f64([-1.0, 1.0]), atol=1e-7)


def test_whitening_rewards_without_shifting_the_mean_pays_for_brevity():
    """Worked by hand: equal scores 1, lengths 2 and 8, no KL: μ = .2, σ = .4, so a token without a score earns
    -.5 + .2 = -.3, the last one 2 + .2, and the two responses -.3 + 2.2 = 1.9 and -7 * .3 + 2.2 = .1."""
    mask = prefix_mask([2, 8])
    rewards = ppo.shape_rewards(f64(1.0, 1.0), torch.zeros(2, 8, dtype=torch.float64), mask, 0.1)
    assert_close(ppo.masked_whiten(rewards, mask, shift_mean=False).sum(1), f64(1.9, 0.1), atol=1e-6)
    assert_close(ppo.masked_whiten(rewards, mask).sum(1), f64(1.5, -1.5), atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------
# log π(y_t) and H_t
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "logprob", "entropy"),
    [
        (0.5, -0.34075295, 0.91828377),
        (0.7, -0.54171545, 1.13921626),
        (1.0, -0.74366838, 1.26830149),
        (2.0, -1.03659219, 1.35926156),
    ],
)
def test_logprob_and_entropy_of_one_raised_logit(temperature, logprob, entropy):
    """Worked by hand: z = (1, 0, 0, 0) / τ."""
    logits = f64([[1.0, 0.0, 0.0, 0.0]]) / temperature
    assert_close(ppo.token_logprobs(logits, torch.tensor([[0]])), [[logprob]], atol=1e-8)
    assert_close(ppo.token_logprobs(logits, torch.tensor([[2]])), [[logprob - 1 / temperature]], atol=1e-8)
    assert_close(ppo.token_entropy(logits), [[entropy]], atol=1e-8)


def test_entropy_lies_between_0_and_log_vocab():
    """A certain token and a uniform distribution, worked by hand."""
    assert_close(ppo.token_entropy(f64([[100.0, 0.0, 0.0, 0.0], [3.0] * 4])), [[0.0, math.log(4)]])


def test_logprobs_and_entropy_equal_brute_force():
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(2, 3, 5, dtype=torch.float64, generator=generator)
    tokens = torch.randint(5, (2, 3), generator=generator)
    logprobs, entropy = ppo.token_logprobs(logits, tokens), ppo.token_entropy(logits)
    for b, t in itertools.product(range(2), range(3)):
        weights = [math.exp(z) for z in logits[b, t].tolist()]
        probabilities = [weight / sum(weights) for weight in weights]
        assert_close(logprobs[b, t], math.log(probabilities[tokens[b, t]]))
        assert_close(entropy[b, t], -sum(p * math.log(p) for p in probabilities))


def test_logprobs_of_all_tokens_are_a_distribution_whatever_the_size_of_the_logits():
    """A constant added to all logits of a token changes nothing, not even 1000, where exp overflows."""
    logits = torch.randn(1, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).expand(1, 6, 6)
    every_token = torch.arange(6)[None]
    logprobs = ppo.token_logprobs(logits, every_token)
    assert_close(logprobs.exp().sum(), 1.0)
    assert_close(ppo.token_logprobs(logits + 1000, every_token), logprobs)
    assert_close(ppo.token_entropy(logits + 1000), ppo.token_entropy(logits))


def test_gradients_of_logprob_and_entropy():
    """∂ log π(y) / ∂z_a = [a = y] - π_a and ∂H / ∂z_a = -π_a (log π_a + H), both textbook results."""
    logits = f64([[0.3, -1.0, 0.8]]).requires_grad_()
    p = torch.softmax(logits.detach(), -1)
    (gradient,) = torch.autograd.grad(ppo.token_logprobs(logits, torch.tensor([[2]])).sum(), logits)
    assert_close(gradient, f64([[0.0, 0.0, 1.0]]) - p)
    entropy = ppo.token_entropy(logits)
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert_close(gradient, -p * (p.log() + entropy.detach()[..., None]))


# ----------------------------------------------------------------------------------------------------------------
# k_t: estimators of KL(π || ρ)
# ----------------------------------------------------------------------------------------------------------------

PI, RHO = f64([0.5, 0.3, 0.2]), f64([0.2, 0.5, 0.3])


def expected_kl(pi: torch.Tensor, rho: torch.Tensor, estimator: str, power: int = 1) -> torch.Tensor:
    """E_π[k^power], by enumeration of the tokens."""
    return (pi.detach() * ppo.kl_estimate(pi.log(), rho.log(), full_mask(pi), estimator) ** power).sum()


@pytest.mark.parametrize(
    ("estimator", "at_half", "at_minus_half"),
    [("k1", 0.5, -0.5), ("k2", 0.125, 0.125), ("k3", 0.1065306597, 0.1487212707), ("abs", 0.5, 0.5)],
)
def test_kl_estimators_at_one_token(estimator, at_half, at_minus_half):
    """Worked by hand at d = log π - log ρ = ±.5: k3 = exp(-d) - 1 + d; exp(d) - 1 - d, its mirror image, is wrong."""
    kl = ppo.kl_estimate(f64([-1.0, -1.0]), f64([-1.5, -0.5]), full_mask(PI[:, :2]), estimator)
    assert_close(kl, f64([at_half, at_minus_half]))


def test_kl_estimate_is_k1_unless_told_otherwise():
    assert_close(ppo.kl_estimate(f64([-1.0]), f64([-1.5]), prefix_mask([1])), f64([0.5]))
    assert ppo.KL_ESTIMATORS == ("k1", "k2", "k3", "abs")


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    """Exact expectations over three tokens; the divergence itself is PyTorch's."""
    kl = torch.nn.functional.kl_div(RHO.log(), PI.log(), reduction="sum", log_target=True)
    assert_close(kl, 0.2238046572)
    assert_close(expected_kl(PI, RHO, "k1"), kl)
    assert_close(expected_kl(PI, RHO, "k3"), kl)
    assert_close(expected_kl(PI, RHO, "k2"), 0.2654787944)
    mirrored = (PI * ppo.kl_estimate(RHO.log(), PI.log(), full_mask(PI), "k3")).sum()
    assert_close(mirrored, 0.3395286761)  # the arguments the wrong way round: χ² - KL
    assert_close(mirrored, ((PI - RHO) ** 2 / RHO).sum() - kl)


def test_k3_is_never_negative_and_varies_less_than_k1():
    """Exact standard deviations under π, for distributions far apart and close together."""
    near = f64([0.52, 0.29, 0.19]), f64([0.5, 0.3, 0.2])
    for (pi, rho), k1_std, k3_std in [((PI, RHO), 0.693, 0.095), (near, 0.0404, 2.6e-4)]:
        for estimator, std in [("k1", k1_std), ("k3", k3_std)]:
            mean, square = expected_kl(pi, rho, estimator), expected_kl(pi, rho, estimator, power=2)
            assert_close((square - mean**2).sqrt(), std, atol=0.02 * std)
        assert (ppo.kl_estimate(pi.log(), rho.log(), full_mask(pi), "k3") >= 0).all()
    assert_close(expected_kl(*near, "k1"), 8.176e-4, atol=1e-7)


def test_k3_keeps_its_digits_in_single_precision():
    """At d = 1e-4, k3 = 5.0e-9; exp(-d) - 1 + d rounds to a negative number in float32."""
    d = torch.tensor([[1e-4]])
    assert (torch.exp(-d) - 1 + d).item() < 0
    k3 = ppo.kl_estimate(d, torch.zeros_like(d), full_mask(d), "k3")
    assert k3.dtype == torch.float32
    assert_close(k3, [[5.0e-9]], atol=1e-11)


@pytest.mark.parametrize("estimator", ppo.KL_ESTIMATORS)
def test_kl_is_exactly_0_for_equal_policies_and_beyond_the_mask(estimator):
    mask = prefix_mask([3, 1])
    logprobs = fill_beyond(f64([-0.1, -2.0, -7.0], [-3.0, 0.0, 0.0]), mask)
    assert_equal(ppo.kl_estimate(logprobs, logprobs, mask, estimator), torch.zeros(2, 3))


def test_kl_estimators_as_losses():
    """Differentiated, the estimators are no longer what they were on average: the expected gradient of k1 is 0, that
    of k2 is ∇KL(π || ρ), that of k3 is ∇KL(ρ || π)."""
    theta = f64([0.4, -0.3, 0.1]).requires_grad_()
    pi = theta.softmax(-1)
    reverse, forward = (pi * (pi / RHO).log()).sum(), (RHO * (RHO / pi).log()).sum()
    for estimator, divergence in [("k1", None), ("k2", reverse), ("k3", forward)]:
        (gradient,) = torch.autograd.grad(expected_kl(pi, RHO, estimator), theta, retain_graph=True)
        wanted = torch.zeros(1, 3)
        if divergence is not None:
            (wanted,) = torch.autograd.grad(divergence, theta, retain_graph=True)
        assert_close(gradient, wanted)


def test_kl_estimate_of_an_update_is_that_of_old_against_new():
    """Worked by hand: log π_new - log π_old = (.1, -.2, .05, 0) at tokens sampled from the old policy."""
    change = f64([0.1, -0.2, 0.05, 0.0])
    for estimator, value in [("k1", 0.0125), ("k2", 0.0065625), ("k3", 0.0062931919)]:
        kl = ppo.kl_estimate(torch.zeros_like(change), change, full_mask(change), estimator)
        assert_close(ppo.masked_mean(kl, full_mask(kl)), value)


def test_k1_is_negative_where_sampling_and_scoring_disagree():
    """Greedy sampling only ever sees token 0 of π = (.4, .35, .25), whose k1 against ρ = (.5, .3, .2) is log .8 < 0;
    over π's own samples the same estimator averages to the KL, which is positive."""
    pi, rho = f64([0.4, 0.35, 0.25]), f64([0.5, 0.3, 0.2])
    assert_close(ppo.kl_estimate(pi.log(), rho.log(), full_mask(pi))[0, 0], -0.2231435513)
    assert_close(expected_kl(pi, rho, "k1"), 0.4 * math.log(0.8) + 0.35 * math.log(7 / 6) + 0.25 * math.log(1.25))


@pytest.mark.parametrize("estimator", ["k4", "kl", "K1", ""])
def test_unknown_kl_estimator_is_refused(estimator):
    with pytest.raises(ValueError, match=rf"^kl estimator is '{estimator}', expected one of k1, k2, k3, abs$"):
        ppo.kl_estimate(PI, RHO, full_mask(PI), estimator)


# ----------------------------------------------------------------------------------------------------------------
# s: one score per response
# ----------------------------------------------------------------------------------------------------------------

HAS_EOS = torch.tensor([True, False, True, False])


def test_scores_are_left_alone_by_default():
    scores = f64(1.5, -20.0, 0.0, 3.0)
    assert_equal(ppo.shape_scores(scores), scores)


def test_missing_eos_penalty_is_subtracted_from_responses_that_were_cut():
    assert_equal(ppo.penalise_missing_eos(f64(1.5, 1.5, 0.0, 3.0), HAS_EOS, 2.0), [1.5, -0.5, 0.0, 1.0])


def test_scores_are_clipped_on_both_sides():
    assert_equal(ppo.shape_scores(f64(12.0, -12.0, 10.0, 3.0), clip=10.0), [10.0, -10.0, 10.0, 3.0])


def test_scores_are_whitened_over_the_batch():
    """Worked by hand: (1, 2, 3, 4) has μ = 2.5, σ² = 1.25. A single response whitens to 0."""
    wanted = f64(-1.3416407811, -0.4472135937, 0.4472135937, 1.3416407811)
    assert_close(ppo.shape_scores(f64(1.0, 2.0, 3.0, 4.0), whiten=True), wanted)
    assert_close(ppo.shape_scores(f64(5.0), whiten=True), f64(0.0))


def test_scores_are_whitened_then_clipped():
    """Worked by hand: μ = -9/8, σ² = 81·7/64; the last one whitens to -sqrt(7) and is clipped to -2, the others to
    1/sqrt(7). The other way round, the last one would be -2 before and other numbers after."""
    shaped = ppo.shape_scores(f64(*[0.0] * 7, -9.0), whiten=True, clip=2.0)
    assert_close(shaped, f64(*[1 / math.sqrt(7)] * 7, -2.0), atol=1e-8)


NO_SCORES = ppo.Moments()


def test_running_moments_by_hand():
    """(1, 2, 3, 4): μ = 2.5, S = 5. With (10, 20), μ = 40/6 and S = 530 - 40²/6; σ is unbiased."""
    first = ppo.update_moments(NO_SCORES, f64(1.0, 2.0, 3.0, 4.0))
    assert first == (4, 2.5, 5.0)
    n, mean, squares = ppo.update_moments(first, f64(10.0, 20.0))
    assert n == 6
    assert_close(f64(mean, (squares / 5) ** 0.5), f64(6.6666666667, 7.2571803524))


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 1, 6], [1, 11]])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_running_moments_equal_those_of_all_scores_at_once(sizes, offset):
    """NumPy's mean and unbiased deviation of the whole; far from 0 too, where E[s²] - μ² would lose every digit."""
    scores = offset + torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moments = NO_SCORES
    for part in scores.split(sizes):
        moments = ppo.update_moments(moments, part)
    assert moments.count == 12
    deviation = (moments.squares / 11) ** 0.5
    assert_close(f64(moments.mean, deviation), f64(np.mean(scores.numpy()), np.std(scores.numpy(), ddof=1)))


def test_running_moments_are_those_of_doubles():
    """(2²⁴, 1, 1) in single precision, where 2²⁴ + 1 is 2²⁴: μ = 5592406 and S = 11184810² + 2 · 5592405²."""
    moments = ppo.update_moments(NO_SCORES, torch.tensor([2.0**24, 1.0, 1.0]))
    assert moments == (3, 5592406.0, 187649962104150.0)


def test_two_equal_or_nearly_equal_scores_are_normalised_by_hand():
    """Of two scores 1 and 3, S / (n - 1) is 2; of three equal ones 0, and 1e-8 is all there is under the root."""
    shaped = ppo.shape_scores(f64(1.0, 3.0), moments=ppo.Moments(2, 2.0, 2.0))
    assert_close(shaped, f64(-1.0, 1.0) / (2 + 1e-8) ** 0.5)
    assert_close(ppo.shape_scores(f64(1e-4, 0.0), moments=ppo.Moments(3, 0.0, 0.0)), f64(1.0, 0.0))


def test_scores_are_normalised_by_the_moments_of_the_run():
    """Worked by hand: (10 - 40/6) / 7.2571803524 and (20 - 40/6) / 7.2571803524; whitened they would be -1 and 1."""
    shaped = ppo.shape_scores(f64(10.0, 20.0), moments=ppo.Moments(6, 40 / 6, 530 - 1600 / 6))
    assert_close(shaped, f64(0.4593152121, 1.8372608484), atol=1e-8)


def test_normalising_a_single_or_a_constant_score_gives_0():
    for scores in (f64(5.0), f64(5.0, 5.0, 5.0)):
        moments = ppo.update_moments(NO_SCORES, scores)
        assert_close(ppo.shape_scores(scores, moments=moments), torch.zeros_like(scores))


def test_scores_are_normalised_then_clipped():
    """Worked by hand: μ = 1 and σ = 2 make (1, 5, 5, -1) into (0, 2, 2, -1), of which 2 is clipped."""
    shaped = ppo.shape_scores(f64(1.0, 5.0, 5.0, -1.0), clip=1.5, moments=ppo.Moments(5, 1.0, 16.0))
    assert_close(shaped, f64(0.0, 1.5, 1.5, -1.0), atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------
# r_t = -β k_t, plus s on the last real token
# ----------------------------------------------------------------------------------------------------------------


def test_rewards_by_hand():
    """d = (.3, -.1, .25), β = .1, s = 2 gives r = (-.03, .01, 1.975), whose sum is 2 - .1 * .45 = 1.955."""
    kl, mask = f64([0.3, -0.1, 0.25, NAN], [7.0, NAN, NAN, NAN]), prefix_mask([3, 1], 4)
    rewards = ppo.shape_rewards(f64(2.0, -1.0), kl, mask, kl_coef=0.1)
    assert_close(rewards, f64([-0.03, 0.01, 1.975, 0.0], [-1.7, 0.0, 0.0, 0.0]))
    assert_close(rewards.sum(1), f64(1.955, -1.7))


def test_rewards_of_a_row_sum_to_the_score_minus_the_price_of_its_kl():
    generator = torch.Generator().manual_seed(5)
    kl, scores = (
        torch.randn(5, 7, dtype=torch.float64, generator=generator),
        torch.randn(5, generator=generator).double(),
    )
    mask = prefix_mask([7, 5, 3, 2, 1])
    rewards = ppo.shape_rewards(scores, fill_beyond(kl, mask), mask, 0.3)
    for row, length in enumerate([7, 5, 3, 2, 1]):
        assert_close(rewards[row].sum(), scores[row] - 0.3 * sum(kl[row, :length].tolist()))
        assert_close(rewards[row, length - 1], scores[row] - 0.3 * kl[row, length - 1])
        assert_equal(rewards[row, length:], [0.0] * (7 - length))


def test_without_kl_the_only_reward_is_the_score_on_the_last_real_token():
    mask = prefix_mask([2, 4, 1])
    zero = torch.zeros(3, 4, dtype=torch.float64)
    rewards = ppo.shape_rewards(f64(2.0, -3.0, 4.0), zero, mask, 0.1)
    assert_equal(rewards, [[0, 2.0, 0, 0], [0, 0, 0, -3.0], [4.0, 0, 0, 0]])


def test_an_empty_response_is_refused():
    message = r"^every response needs at least one real token \(its EOS counts\) to carry its score$"
    with pytest.raises(ValueError, match=message):
        ppo.shape_rewards(f64(1.0, 1.0), f64([0.1, 0.1], [0.1, 0.1]), prefix_mask([2, 0]), 0.1)


# ----------------------------------------------------------------------------------------------------------------
# Â_t = Σ_l (γλ)^l δ_{t+l} and R_t = Â_t + V_t
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        (1.0, 0.95, (0.14675, 0.365, 0.7)),
        (1.0, 1.0, (0.2, 0.4, 0.7)),
        (1.0, 0.0, (-0.2, -0.3, 0.7)),
        (0.9, 0.95, (-0.0104325, 0.2685, 0.7)),
        (0.0, 0.95, (-0.6, -0.6, 0.7)),
    ],
)
def test_gae_by_hand(gamma, lam, expected):
    """r = (-.1, -.2, 1), V = (.5, .4, .3): δ = (-.2, -.3, .7) for γ = 1, and so on backwards. Nothing is bootstrapped
    after the last token: were its next value .6, the last advantage would be 1.3 and not .7."""
    rewards, values = f64([-0.1, -0.2, 1.0]), f64([0.5, 0.4, 0.3])
    advantages = ppo.estimate_advantages(rewards, values, full_mask(values), gamma, lam)
    assert_close(advantages, f64(expected))
    assert_close(ppo.estimate_returns(advantages, values, full_mask(values)), f64(expected) + values)


def ragged_rewards_and_values(lengths=(7, 5, 3, 1)):
    generator = torch.Generator().manual_seed(6)
    mask = prefix_mask(lengths)
    rewards, values = (torch.randn(mask.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return fill_beyond(rewards, mask), fill_beyond(values, mask), mask


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.7), (1.0, 0.95), (1.0, 0.0), (0.5, 1.0)])
def test_gae_equals_brute_force_on_ragged_rows(gamma, lam):
    """The definition, as a double sum over plain Python floats, with NaN in the padding."""
    rewards, values, mask = ragged_rewards_and_values()
    advantages = ppo.estimate_advantages(rewards, values, mask, gamma, lam)
    returns = ppo.estimate_returns(advantages, values, mask)
    for b, (r, v) in enumerate(zip(rows_of(rewards, mask), rows_of(values, mask), strict=True)):
        n = len(r)
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - v[t] for t in range(n)]
        expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
        assert_close(advantages[b], f64(*expected, *[0.0] * (7 - n)))
        assert_close(returns[b], f64(*(a + x for a, x in zip(expected, v, strict=True)), *[0.0] * (7 - n)))


def test_gae_with_lambda_1_telescopes_to_reward_to_go_minus_value():
    rewards, values, mask = ragged_rewards_and_values()
    advantages = ppo.estimate_advantages(rewards, values, mask, 1.0, 1.0)
    returns = ppo.estimate_returns(advantages, values, mask)
    for b, row in enumerate(rows_of(rewards, mask)):
        assert_close(returns[b, : len(row)], f64(*(sum(row[t:]) for t in range(len(row)))), atol=1e-12)


def test_gae_leaves_nothing_beyond_the_mask_whatever_stands_there():
    rewards, values, mask = ragged_rewards_and_values()
    reference = ppo.estimate_advantages(rewards.nan_to_num(0.0), values.nan_to_num(0.0), mask, 0.9, 0.8)
    for filling in (NAN, 1e6, math.inf):
        filled = fill_beyond(rewards, mask, filling), fill_beyond(values, mask, filling)
        advantages = ppo.estimate_advantages(*filled, mask, 0.9, 0.8)
        assert_equal(advantages, reference)
        assert_equal(advantages[~mask], [0.0] * 12)
        assert_equal(ppo.estimate_returns(fill_beyond(advantages, mask), filled[1], mask)[~mask], [0.0] * 12)


@pytest.mark.parametrize(("gamma", "lam"), [(-0.1, 0.5), (1.1, 0.5), (0.5, -0.1), (0.5, 1.1), (NAN, 0.5), (0.5, NAN)])
def test_discounts_outside_0_to_1_are_refused(gamma, lam):
    with pytest.raises(ValueError, match=rf"^gamma and lam must lie in \[0, 1\], got {gamma} and {lam}$"):
        ppo.estimate_advantages(PI, PI, full_mask(PI), gamma, lam)


@pytest.mark.parametrize(("gamma", "lam"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_discounts_of_exactly_0_and_1_are_allowed(gamma, lam):
    advantages = ppo.estimate_advantages(PI, torch.zeros_like(PI), full_mask(PI), gamma, lam)
    r = PI[0].tolist()
    assert_close(advantages, f64([sum(r[t:]) if gamma * lam else r[t] for t in range(3)]))


# ----------------------------------------------------------------------------------------------------------------
# q_t = π_new(y_t) / π_old(y_t) and L^CLIP = -min(q Â, clip(q, 1-ε, 1+ε) Â)
# ----------------------------------------------------------------------------------------------------------------


def policy_loss_and_gradient(log_ratio, advantages, mask, clip_range=0.2):
    """L^CLIP per token, where the clip binds, and the gradient of its sum with respect to log π_new."""
    logprobs = log_ratio.clone().requires_grad_()
    ratio = ppo.importance_ratio(logprobs, torch.zeros_like(log_ratio), mask)
    losses, binding = ppo.policy_losses(ratio, advantages, mask, clip_range)
    (gradient,) = torch.autograd.grad(torch.where(mask, losses, 0.0).sum(), logprobs)
    return losses.detach(), binding, gradient


def test_ratio_by_hand():
    ratio = ppo.importance_ratio(f64([-1.0, -2.0, NAN]), f64([-1.5, -2.0, NAN]), prefix_mask([2], 3))
    assert_close(ratio, f64([1.6487212707, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "gradient", "binds"),
    [
        (1, 0.5, -0.5, -0.5, False),
        (1, 0.79, -0.79, -0.79, False),
        (1, 1, -1, -1, False),
        (1, 1.19, -1.19, -1.19, False),
        (1, 1.21, -1.2, 0, True),
        (1, 3, -1.2, 0, True),
        (-1, 0.5, 0.8, 0, True),
        (-1, 0.79, 0.8, 0, True),
        (-1, 0.81, 0.81, 0.81, False),
        (-1, 0.9, 0.9, 0.9, False),
        (-1, 1, 1, 1, False),
        (-1, 1.5, 1.5, 1.5, False),
        (-1, 3, 3, 3, False),
        (0, 0.5, 0, 0, False),
        (0, 3, 0, 0, False),
    ],
)
def test_clipped_surrogate_table(advantage, ratio, loss, gradient, binds):
    """Worked by hand, ε = .2: figure 1 of the PPO paper, in numbers. A gradient of 0 is exactly 0."""
    log_ratio = f64([ratio]).log()
    losses, binding, slope = policy_loss_and_gradient(log_ratio, f64([advantage]), full_mask(log_ratio))
    assert_close(losses, f64([loss]))
    assert_close(slope, f64([gradient]), atol=0 if gradient == 0 else 1e-9)
    assert_equal(binding, [[binds]])


@pytest.mark.parametrize(("advantage", "ratio"), [(1.0, 1.25), (-1.0, 0.75)])
def test_clip_does_not_bind_at_its_very_edge(advantage, ratio):
    """1.25 and .75 are exact in binary, so ε = .25 puts q on the edge itself."""
    q, mask = f64([ratio]).requires_grad_(), prefix_mask([1])
    losses, binding = ppo.policy_losses(q, f64([advantage]), mask, clip_range=0.25)
    (gradient,) = torch.autograd.grad(losses.sum(), q)
    assert_equal(losses.detach(), [[-ratio * advantage]])
    assert_equal(gradient, [[-advantage]])
    assert_equal(binding, [[False]])


def test_policy_losses_equal_brute_force():
    generator = torch.Generator().manual_seed(7)
    mask = prefix_mask([9, 6, 1])
    log_ratio = fill_beyond(0.5 * torch.randn(3, 9, dtype=torch.float64, generator=generator), mask)
    advantages = fill_beyond(torch.randn(3, 9, dtype=torch.float64, generator=generator), mask)
    losses, binding, gradient = policy_loss_and_gradient(log_ratio, advantages, mask, clip_range=0.3)
    for b, t in itertools.product(range(3), range(9)):
        wanted_loss, wanted_gradient, binds = 0.0, 0.0, False
        if mask[b, t]:
            a, q = advantages[b, t].item(), math.exp(log_ratio[b, t].item())
            wanted_loss = -min(q * a, min(max(q, 0.7), 1.3) * a)
            binds = (a > 0 and q > 1.3) or (a < 0 and q < 0.7)
            wanted_gradient = 0.0 if binds else -a * q
        assert_close(losses[b, t], wanted_loss)
        assert_close(gradient[b, t], wanted_gradient)
        assert binding[b, t].item() is binds
    assert 0 < binding.sum() < mask.sum() / 2


def test_clip_fraction_counts_binding_clips_only():
    """Worked by hand: of q = (.5, 1.5, .5, 1.5) all lie outside 1 ± .2, but with Â = (1, 1, -1, -1) two clips bind."""
    log_ratio = f64([0.5, 1.5, 0.5, 1.5]).log()
    binding = policy_loss_and_gradient(log_ratio, f64([1.0, 1.0, -1.0, -1.0]), full_mask(log_ratio))[1]
    assert_close(ppo.masked_mean(binding, full_mask(log_ratio)), 0.5)
    assert_equal(binding, [[False, True, True, False]])


def test_before_any_update_the_loss_is_minus_the_mean_advantage():
    """q = 1 to the last bit, no clip binds, and the loss is 0 for whitened advantages."""
    generator = torch.Generator().manual_seed(8)
    mask = prefix_mask([5, 3, 1])
    logprobs, advantages = (torch.randn(3, 5, generator=generator).double() for _ in range(2))
    ratio = ppo.importance_ratio(logprobs, logprobs.clone(), mask)
    assert_equal(ratio, torch.ones(3, 5))
    losses, binding = ppo.policy_losses(ratio, advantages, mask, 0.2)
    assert_close(ppo.masked_mean(losses, mask), -advantages[mask].mean())
    assert not binding.any()
    losses, _ = ppo.policy_losses(ratio, ppo.masked_whiten(advantages, mask), mask, 0.2)
    assert_close(ppo.masked_mean(losses, mask), 0.0, atol=1e-12)


def test_before_any_update_the_gradient_is_that_of_the_vanilla_policy_gradient():
    """∇ mean(-Â q) = ∇ mean(-Â log π) at q = 1: -Â / Σm at every real token and 0 elsewhere."""
    generator = torch.Generator().manual_seed(9)
    mask = prefix_mask([5, 3, 1])
    logprobs, advantages = (torch.randn(3, 5, generator=generator).double() for _ in range(2))
    logprobs.requires_grad_()
    losses, _ = ppo.policy_losses(ppo.importance_ratio(logprobs, logprobs.detach(), mask), advantages, mask, 0.2)
    (gradient,) = torch.autograd.grad(ppo.masked_mean(losses, mask), logprobs)
    assert_close(gradient, torch.where(mask, -advantages / 9, 0.0))


# ----------------------------------------------------------------------------------------------------------------
# L^VF = ½ max((V - R)², (V_old + clip(V - V_old, ±ε_v) - R)²)
# ----------------------------------------------------------------------------------------------------------------


def value_loss_and_gradient(values, old_values, returns, mask, clip_range_value=0.2):
    values = values.clone().requires_grad_()
    losses, binding = ppo.value_losses(values, old_values, returns, mask, clip_range_value)
    (gradient,) = torch.autograd.grad(losses.sum(), values)
    return losses.detach(), binding, gradient


@pytest.mark.parametrize(
    ("old", "new", "target", "loss", "gradient", "binds"),
    [
        (0, 0.1, 1, 0.405, -0.9, False),
        (0, 0.5, 1, 0.32, 0, True),
        (0, 0.5, -1, 1.125, 1.5, False),
        (0, -0.5, 1, 1.125, -1.5, False),
        (0, -0.5, -1, 0.32, 0, True),
        (0, 0.5, 0.5, 0.045, 0, True),
        (0, 0.5, 0.15, 0.06125, 0.35, False),
        (1, 1.5, 2, 0.32, 0, True),
        (1, 1, 1, 0, 0, False),
    ],
)
def test_clipped_value_loss_table(old, new, target, loss, gradient, binds):
    """Worked by hand, ε_v = .2: no gradient for a value that has already moved past the clip towards its return."""
    arguments = f64([new]), f64([old]), f64([target]), prefix_mask([1])
    losses, binding, slope = value_loss_and_gradient(*arguments)
    assert_close(losses, f64([loss]))
    assert_close(slope, f64([gradient]), atol=0 if gradient == 0 else 1e-9)
    assert_equal(binding, [[binds]])


@pytest.mark.parametrize(("new", "target"), [(0.25, 1.0), (-0.25, -1.0)])
def test_value_clip_does_not_bind_at_its_very_edge(new, target):
    """.25 is exact in binary: the value stands on the edge of the clip, short of its return, and still learns."""
    losses, binding, slope = value_loss_and_gradient(f64([new]), f64([0.0]), f64([target]), prefix_mask([1]), 0.25)
    assert_equal(losses, [[0.75**2 / 2]])
    assert_equal(slope, [[new - target]])
    assert_equal(binding, [[False]])


def test_a_clip_that_cannot_bind_is_not_counted():
    """V_old + (V - V_old) is not always V in float32: of values nearer than the range to the old, 3 in 100 would be."""
    values, old_values, returns = 0.3 * torch.randn(3, 200, 200, generator=torch.Generator().manual_seed(0))
    mask = (values - old_values).abs() < 0.199
    _, clipped = ppo.value_losses(values, old_values, returns, mask, clip_range_value=0.2)
    assert mask.sum() > 10_000 and not clipped.any()


def test_value_losses_equal_brute_force():
    generator = torch.Generator().manual_seed(10)
    mask = prefix_mask([9, 6, 1])
    new, old, target = (
        fill_beyond(torch.randn(3, 9, dtype=torch.float64, generator=generator), mask) for _ in range(3)
    )
    losses, binding, gradient = value_loss_and_gradient(new, old, target, mask, clip_range_value=0.5)
    for b, t in itertools.product(range(3), range(9)):
        wanted_loss, wanted_gradient, binds = 0.0, 0.0, False
        if mask[b, t]:
            v, v_old, r = new[b, t].item(), old[b, t].item(), target[b, t].item()
            near = min(max(v, v_old - 0.5), v_old + 0.5)
            binds = abs(near - r) > abs(v - r)
            wanted_loss = max((v - r) ** 2, (near - r) ** 2) / 2
            wanted_gradient = 0.0 if binds else v - r
        assert_close(losses[b, t], wanted_loss)
        assert_close(gradient[b, t], wanted_gradient)
        assert binding[b, t].item() is binds
    assert 0 < binding.sum() < mask.sum()


# ----------------------------------------------------------------------------------------------------------------
# 1 - Var(R - V) / Var(R)
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [((1.0, 2.0, 3.0), 1.0), ((9.0, 9.0, 9.0), 0.0), ((3.0, 2.0, 1.0), -3.0), ((1.5, 2.0, 2.5), 0.75)],
)
def test_explained_variance_by_hand(values, expected):
    """R = (1, 2, 3) has variance 2/3; the errors of the third critic, (-2, 0, 2), have 8/3."""
    mask = prefix_mask([2, 1], 3)
    returns = f64([1.0, 2.0, NAN], [3.0, NAN, NAN])
    critic = f64([values[0], values[1], NAN], [values[2], NAN, NAN])
    assert_close(ppo.explained_variance(critic, returns, mask), expected)


def test_explained_variance_stays_finite_for_constant_returns():
    """Worked by hand: the variance of the returns, 0, is replaced by 1e-8; that of the errors is 2e-8."""
    values = f64([1.0 + math.sqrt(2e-8), 1.0 - math.sqrt(2e-8)])
    assert_close(ppo.explained_variance(values, f64([5.0, 5.0]), full_mask(values)), -1.0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------
# β ← β (1 + clip(KL / target - 1, ±.2) n / horizon)
# ----------------------------------------------------------------------------------------------------------------


def adapt(kl_coef: float, kl: float) -> float:
    return ppo.adapt_kl_coef(kl_coef, kl, target=6.0, horizon=10_000, n_responses=256)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.0, 0.198976), (3.0, 0.198976), (6.0, 0.2), (7.0, 0.2 * (1 + 0.0256 / 6)), (7.2, 0.201024), (99.0, 0.201024)],
)
def test_kl_coef_steps(kl, expected):
    """Worked by hand: .2 * (1 + e * .0256), e between -.2 and .2."""
    assert_close(adapt(0.2, kl), expected, atol=1e-9)


def test_kl_coef_over_many_steps():
    """100 steps of +.512 %: .2 * 1.00512^100; one step up and one down do not cancel; doubling takes 136 steps."""
    kl_coef = 0.2
    for step in range(1, 137):
        kl_coef = adapt(kl_coef, 12.0)
        if step == 100:
            assert_close(kl_coef, 0.3332894, atol=1e-7)
        assert (kl_coef >= 0.4) == (step == 136)
    assert_close(adapt(adapt(0.2, 12.0), 0.0), 0.2 * (1 - 0.00512**2), atol=1e-9)


def test_kl_coef_refuses_a_negative_kl():
    with pytest.raises(ValueError, match=r"^a KL divergence cannot be negative, got -0\.5$"):
        adapt(0.2, -0.5)


def test_shapes_are_checked_while_testing():
    """A (2, 1) mask would broadcast silently; the axis names in the signatures catch it."""
    with pytest.raises(TypeError):
        ppo.masked_mean(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))


# ----------------------------------------------------------------------------------------------------------------
# All equations together: what must not change the result
# ----------------------------------------------------------------------------------------------------------------


def random_batch(lengths=(6, 1, 4, 2), seed: int = 11) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = prefix_mask(lengths)

    def noise(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(mask.shape, dtype=torch.float64, generator=generator)

    logprobs = -(noise() ** 2)
    return {
        "mask": mask,
        "scores": noise()[:, 0],
        "logprobs": logprobs,
        "ref_logprobs": logprobs + noise(0.3),
        "values": noise(),
        "new_logprobs": logprobs + noise(0.3),
        "new_values": noise(),
    }


def on_tokens(change, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`change` applied to the tensors of shape (batch, time); the others as they are."""
    return {name: change(tensor) if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}


def one_update(batch, whiten: bool = True, count: int | None = None) -> dict[str, torch.Tensor]:
    """Every equation from the log-probabilities to the gradients, in the order of ppo.py."""
    mask, old_logprobs, values = batch["mask"], batch["logprobs"], batch["values"]
    logprobs, new_values = (batch[name].clone().requires_grad_() for name in ("new_logprobs", "new_values"))
    out = {"kl": ppo.kl_estimate(old_logprobs, batch["ref_logprobs"], mask)}
    out["rewards"] = ppo.shape_rewards(batch["scores"], out["kl"], mask, kl_coef=0.2)
    raw = ppo.estimate_advantages(out["rewards"], values, mask, gamma=0.99, lam=0.9)
    out["returns"] = ppo.estimate_returns(raw, values, mask)
    out["advantages"] = ppo.masked_whiten(raw, mask) if whiten else raw
    out["ratio"] = ppo.importance_ratio(logprobs, old_logprobs, mask)
    out["policy_losses"], out["policy_clipped"] = ppo.policy_losses(out["ratio"], out["advantages"], mask, 0.2)
    out["value_losses"], out["value_clipped"] = ppo.value_losses(new_values, values, out["returns"], mask, 0.2)
    loss = ppo.masked_mean(out["policy_losses"], mask, count) + ppo.masked_mean(out["value_losses"], mask, count)
    out["policy_gradient"], out["value_gradient"] = torch.autograd.grad(loss, (logprobs, new_values))
    return {name: tensor.detach() for name, tensor in (out | {"loss": loss}).items()}


@pytest.mark.parametrize("filling", [NAN, math.inf, -1e9])
def test_what_stands_beyond_the_mask_changes_nothing(filling):
    """Neither values nor gradients, to the last bit; and all of them are 0 there (the ratio 1)."""
    batch = random_batch()
    mask = batch["mask"]
    filled = on_tokens(lambda x: fill_beyond(x, mask, filling), batch) | {"mask": mask}
    expected, actual = one_update(batch), one_update(filled)
    for name, tensor in actual.items():
        assert_equal(tensor, expected[name])
        if tensor.dim() == 2:
            assert (tensor[~mask] == (name == "ratio")).all(), name
    assert (actual["policy_gradient"][mask] != 0).any()


def test_columns_of_padding_change_nothing():
    batch = random_batch()
    wider = on_tokens(lambda x: torch.cat([x, torch.ones(4, 3)], 1), batch) | {"mask": prefix_mask([6, 1, 4, 2], 9)}
    expected = one_update(batch)
    for name, tensor in on_tokens(lambda x: x[:, :6], one_update(wider)).items():
        assert_close(tensor, expected[name], atol=1e-12)


def test_a_batch_is_its_rows_one_by_one():
    """Without whitening, which is over the batch; each row alone in its own width."""
    batch = random_batch()
    together = one_update(batch, whiten=False, count=13)
    for row, length in enumerate((6, 1, 4, 2)):
        part = {name: x[row : row + 1, :length] if x.dim() == 2 else x[row : row + 1] for name, x in batch.items()}
        for name, tensor in one_update(part, whiten=False, count=13).items():
            if name != "loss":
                assert_close(tensor[0], together[name][row, :length], atol=1e-12)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1)])
def test_minibatches_with_the_whole_count_add_up_to_the_whole(sizes):
    """In value and in gradient; their own means do not."""
    batch = random_batch()
    whole = one_update(batch, whiten=False)
    parts = list(zip(*(tensor.split(sizes) for tensor in batch.values()), strict=True))
    parts = [dict(zip(batch, part, strict=True)) for part in parts]
    counted = [one_update(part, whiten=False, count=int(batch["mask"].sum())) for part in parts]
    assert_close(sum(part["loss"] for part in counted), whole["loss"], atol=1e-12)
    for name in ("policy_gradient", "value_gradient"):
        assert_close(torch.cat([part[name] for part in counted]), whole[name], atol=1e-12)
    means = sum(one_update(part, whiten=False)["loss"] for part in parts) / len(parts)
    assert abs(means - whole["loss"]) > 0.01


def test_the_order_of_the_rows_does_not_matter():
    batch, order = random_batch(), torch.tensor([2, 0, 3, 1])
    expected = on_tokens(lambda x: x[order], one_update(batch))
    for name, tensor in one_update({name: tensor[order] for name, tensor in batch.items()}).items():
        assert_close(tensor, expected[name], atol=1e-12)


def test_a_single_token_gives_finite_numbers():
    """One response of one token: whitened, its advantage is 0; raw, it is s - β k - V."""
    batch = random_batch(lengths=(1,))
    for tensor in one_update(batch).values():
        assert tensor.isfinite().all()
    assert_equal(one_update(batch)["advantages"], [[0.0]])
    d = (batch["logprobs"] - batch["ref_logprobs"]).item()
    expected = batch["scores"].item() - 0.2 * d - batch["values"].item()
    assert_close(one_update(batch, whiten=False)["advantages"], [[expected]])


def test_inputs_are_left_as_they_were():
    batch = random_batch()
    copies = {name: tensor.clone() for name, tensor in batch.items()}
    one_update(batch)
    for name, tensor in batch.items():
        assert_equal(tensor, copies[name])


def test_single_precision_stays_single_precision():
    batch = {
        name: tensor.float() if tensor.dtype == torch.float64 else tensor for name, tensor in random_batch().items()
    }
    expected = one_update(random_batch())
    for name, tensor in one_update(batch).items():
        assert tensor.dtype in (torch.float32, torch.bool), name
        assert_close(tensor, expected[name].double(), atol=2e-6)


# ----------------------------------------------------------------------------------------------------------------
# A bandit: one token, every quantity in closed form
# ----------------------------------------------------------------------------------------------------------------

THETA, REWARD, BETA = f64(0.4, -0.3, 0.1, -0.2), f64(1.0, 0.0, 0.5, 2.0), 0.7
REFERENCE = f64(0.0, 0.5, -0.5, 0.2).softmax(0)


def bandit_objective(pi: torch.Tensor, reward=REWARD, beta=BETA) -> torch.Tensor:
    """J(π) = E_π[r] - β KL(π || ρ)."""
    return (pi * (reward - beta * (pi / REFERENCE).log())).sum()


def bandit_gradient(estimator: str, baseline: float = 0.0, theta=THETA) -> torch.Tensor:
    """E_π of minus PPO's gradient before any update, over all four actions as a batch of one-token responses."""
    theta = theta.clone().requires_grad_()
    actions = torch.arange(4)[:, None]
    logprobs = ppo.token_logprobs(theta.expand(4, 1, 4), actions)
    old, mask = logprobs.detach(), full_mask(actions)
    kl = ppo.kl_estimate(old, REFERENCE.log()[:, None], mask, estimator)
    rewards = ppo.shape_rewards(REWARD, kl, mask, BETA)
    advantages = ppo.estimate_advantages(rewards, torch.full_like(rewards, baseline), mask, 1.0, 0.95)
    losses, _ = ppo.policy_losses(ppo.importance_ratio(logprobs, old, mask), old.exp() * advantages, mask, 0.2)
    return -torch.autograd.grad(ppo.masked_mean(losses, mask, count=1), theta)[0]


@pytest.mark.parametrize("baseline", [0.0, 3.7])
def test_expected_gradient_with_k1_in_the_reward_is_that_of_the_objective(baseline):
    """Closed form: ∂J/∂θ_a = π_a (f_a - Σ_b π_b f_b), f_a = r_a - β log(π_a / ρ_a); any baseline leaves it."""
    pi = THETA.softmax(0)
    f = REWARD - BETA * (pi / REFERENCE).log()
    assert_close(bandit_objective(pi), 0.7766605695)
    closed_form = pi * (f - (pi * f).sum())
    assert_close(closed_form, f64(-0.0389757878, -0.0478714986, -0.1990416148, 0.2858889012))
    assert_close(bandit_gradient("k1", baseline), closed_form, atol=1e-12)


@pytest.mark.parametrize(("estimator", "error", "cosine"), [("k2", 0.123, 0.858), ("k3", 0.133, 0.838)])
def test_expected_gradient_with_k2_or_k3_in_the_reward_is_another_one(estimator, error, cosine):
    """Exact, by enumeration: largest error of a coordinate, and cosine with the objective's gradient."""
    wrong, right = bandit_gradient(estimator), bandit_gradient("k1")
    assert_close((wrong - right).abs().max(), error, atol=1e-3)
    assert_close(torch.cosine_similarity(wrong, right, dim=0), cosine, atol=1e-3)


def bandit_optimum(reward=REWARD, beta=BETA) -> torch.Tensor:
    """π* ∝ ρ exp(r / β)."""
    return torch.softmax(REFERENCE.log() + reward / beta, 0)


def test_at_the_optimum_every_action_earns_the_same():
    """r_a - β log(π*_a / ρ_a) = β log Z for every a, and J(π*) - J(π) = β KL(π || π*): closed forms."""
    optimum, pi = bandit_optimum(), THETA.softmax(0)
    assert_close(optimum, f64(0.1473051597, 0.0582028850, 0.0437381464, 0.7507538089))
    kl = ppo.kl_estimate(optimum.log()[:, None], REFERENCE.log()[:, None], full_mask(optimum[:, None]))
    rewards = ppo.shape_rewards(REWARD, kl, full_mask(kl), BETA)
    assert_close(rewards, f64(*[[1.2914610168]] * 4))
    gap = bandit_objective(optimum) - bandit_objective(pi)
    assert_close(gap, 0.5148004472)
    assert_close(gap, BETA * (pi * (pi / optimum).log()).sum(), atol=1e-12)
    assert_close(bandit_optimum(REWARD + 5), optimum, atol=1e-12)
    assert_close(bandit_optimum(3 * REWARD, 3 * BETA), optimum, atol=1e-12)


@pytest.mark.parametrize("estimator", ppo.KL_ESTIMATORS)
def test_only_k1_has_the_optimum_as_its_fixed_point(estimator):
    largest = bandit_gradient(estimator, theta=bandit_optimum().log()).abs().max()
    if estimator == "k1":
        assert_close(largest, 0.0, atol=1e-12)
    else:
        assert largest > 0.03


# ----------------------------------------------------------------------------------------------------------------
# A task of several tokens, small enough to enumerate
# ----------------------------------------------------------------------------------------------------------------


class TokenTask:
    """One prompt, tokens 0 to 3 with 0 = EOS, at most 3 of them: 40 responses, 27 of them cut at the cap.

    A random reference and a random score for each response. A state is a prefix, numbered like the nodes of a tree of
    arity 4. The padding holds the EOS itself. `optimum` and `values` are π* and V* by the soft Bellman equation,
    V*(s) = β log Σ_a ρ(a|s) exp(Q*(s, a) / β), where Q* is V* of the next state, or the score at the end.
    """

    vocab, time, eos, beta = 4, 3, 0, 0.5

    def __init__(self, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.reference = torch.randn(21, 4, dtype=torch.float64, generator=generator).log_softmax(-1)
        table = torch.randn(64, dtype=torch.float64, generator=generator)  # by the response's digits
        rows, lengths = [], []
        for tokens in itertools.product(range(4), repeat=3):
            length = tokens.index(0) + 1 if 0 in tokens else 3
            if not any(tokens[length:]):
                rows.append(tokens)
                lengths.append(length)
        self.responses, self.mask = torch.tensor(rows), prefix_mask(lengths)
        self.score_table = table
        self.scores = self.score(self.responses)
        self.states = self.prefixes(self.responses)
        self.optimum = self.reference.clone()
        self.values = torch.zeros(21, dtype=torch.float64)
        self._solve(())

    def score(self, responses: torch.Tensor) -> torch.Tensor:
        return self.score_table[responses @ torch.tensor([16, 4, 1])]

    def prefixes(self, responses: torch.Tensor) -> torch.Tensor:
        """The state before each token: children of node n are 4 n + 1 to 4 n + 4."""
        states = [torch.zeros(len(responses), dtype=torch.long)]
        for t in range(2):
            states.append(4 * states[-1] + 1 + responses[:, t])
        return torch.stack(states, 1)

    def _solve(self, prefix: tuple[int, ...]) -> torch.Tensor:
        if len(prefix) == 3 or 0 in prefix:
            return self.score(torch.tensor([prefix + (0,) * (3 - len(prefix))]))[0]
        state = int(self.prefixes(torch.tensor([prefix + (0,) * (3 - len(prefix))]))[0, len(prefix)])
        q = torch.stack([self._solve((*prefix, token)) for token in range(4)])
        soft = self.reference[state] + q / self.beta
        self.values[state] = self.beta * soft.logsumexp(0)
        self.optimum[state] = soft.log_softmax(0)
        return self.values[state]

    def logprobs(self, table: torch.Tensor) -> torch.Tensor:
        """log π(y_t) of all responses under a table of logits per state."""
        return ppo.token_logprobs(table[self.states], self.responses)

    def log_probability(self, table: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask, self.logprobs(table), 0.0).sum(1)

    def objective(self, table: torch.Tensor) -> torch.Tensor:
        """J(π) = Σ_y π(y) (s(y) - β log(π(y) / ρ(y)))."""
        log_pi, log_rho = self.log_probability(table), self.log_probability(self.reference)
        return (log_pi.exp() * (self.scores - self.beta * (log_pi - log_rho))).sum()

    def advantages(self, table, values, lam, estimator="k1", kl_sign=1, score_at=None) -> torch.Tensor:
        kl = ppo.kl_estimate(self.logprobs(table), self.logprobs(self.reference), self.mask, estimator)
        rewards = ppo.shape_rewards(
            self.scores, kl_sign * kl, score_at if score_at is not None else self.mask, self.beta
        )
        return ppo.estimate_advantages(rewards, values, self.mask, 1.0, lam)

    def policy_gradient(self, table, values, lam, estimator="k1", weights=1.0) -> torch.Tensor:
        """E_π over all responses of minus PPO's gradient, summed over tokens, before any update."""
        table = table.clone().requires_grad_()
        logprobs = self.logprobs(table)
        old = logprobs.detach()
        advantages = self.advantages(table.detach(), values, lam, estimator)
        weights = (self.log_probability(table.detach()).exp() * weights)[:, None]
        ratio = ppo.importance_ratio(logprobs, old, self.mask)
        losses, _ = ppo.policy_losses(ratio, weights * advantages, self.mask, 0.2)
        return -torch.autograd.grad(ppo.masked_mean(losses, self.mask, count=1), table)[0]


TASK = TokenTask()


def test_the_enumerated_task_is_what_it_says():
    """The soft Bellman values against the definition of π* over whole responses, which needs no recursion."""
    assert TASK.responses.shape == (40, 3)
    assert int((TASK.mask.all(1) & (TASK.responses[:, 2] != 0)).sum()) == 27
    assert_equal(ppo.response_mask(TASK.responses, 0), TASK.mask)
    log_rho = TASK.log_probability(TASK.reference)
    assert_close(log_rho.exp().sum(), 1.0)
    joint = log_rho + TASK.scores / TASK.beta
    assert_close(TASK.values[0], TASK.beta * joint.logsumexp(0))
    assert_close(TASK.log_probability(TASK.optimum), joint.log_softmax(0))
    assert_close(TASK.objective(TASK.optimum), TASK.values[0])


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_at_the_soft_optimum_every_advantage_vanishes(lam):
    """π*, ρ and V* through the KL, the rewards and GAE: r_t + V*_{t+1} - V*_t = 0 at every token of every response,
    whatever λ. Any error of sign, index, mask or scale in the chain shows up here, as the next test shows."""
    assert_close(TASK.advantages(TASK.optimum, TASK.values[TASK.states], lam), torch.zeros(40, 3), atol=1e-12)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_errors_in_the_chain_show_up_at_the_soft_optimum(lam):
    optimum, values = TASK.optimum, TASK.values[TASK.states]
    scale = values.abs().max()
    after_the_token = torch.cat([values[:, 1:], torch.zeros(40, 1)], 1)
    one_early = TASK.mask & (torch.arange(3) < (TASK.mask.sum(1) - 1).clamp(min=1)[:, None])
    wrong = {
        "KL subtracted with the wrong sign": TASK.advantages(optimum, values, lam, kl_sign=-1),
        "value read after its token": TASK.advantages(optimum, after_the_token, lam),
        "score one token early": TASK.advantages(optimum, values, lam, score_at=one_early),
        "no KL": TASK.advantages(optimum, values, lam, kl_sign=0),
        "k2": TASK.advantages(optimum, values, lam, "k2"),
        "k3": TASK.advantages(optimum, values, lam, "k3"),
        "abs": TASK.advantages(optimum, values, lam, "abs"),
    }
    for name, advantages in wrong.items():
        assert advantages.abs().max() > scale / 2, name


OTHER = torch.randn(21, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(12)).log_softmax(-1)
CRITIC = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(13))


def test_expected_policy_gradient_is_that_of_the_objective():
    """Exact: PPO's gradient, summed over tokens and averaged over all 40 responses, is ∇J; with λ = 1 and the same
    critic for the same state, whatever that critic says."""
    table = OTHER.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(TASK.objective(table), table)
    for values in (torch.zeros(40, 3, dtype=torch.float64), CRITIC.flatten()[:21][TASK.states]):
        assert_close(TASK.policy_gradient(OTHER, values, lam=1.0), gradient, atol=1e-12)
    assert gradient.abs().max() > 0.1


def test_averaging_within_each_response_first_is_not_the_gradient_of_the_objective():
    """Exact: dividing by each response's own length turns the direction, even on average."""
    values = torch.zeros(40, 3, dtype=torch.float64)
    right = TASK.policy_gradient(OTHER, values, 1.0).flatten()
    per_response = TASK.policy_gradient(OTHER, values, 1.0, weights=1 / TASK.mask.sum(1)).flatten()
    assert torch.cosine_similarity(right, per_response, dim=0) < 0.99


def test_at_the_optimum_only_a_wrong_critic_with_lambda_below_1_has_a_gradient():
    """Exact: V* gives 0 for every λ; a constant critic gives 0 for λ = 1 only, for then the baseline cancels."""
    exact, constant = TASK.values[TASK.states], torch.full((40, 3), TASK.values[0].item(), dtype=torch.float64)
    for lam in (0.0, 0.95, 1.0):
        assert_close(TASK.policy_gradient(TASK.optimum, exact, lam), torch.zeros(21, 4), atol=1e-12)
    assert_close(TASK.policy_gradient(TASK.optimum, constant, 1.0), torch.zeros(21, 4), atol=1e-12)
    assert TASK.policy_gradient(TASK.optimum, constant, 0.95).abs().max() > 1e-3
    assert TASK.policy_gradient(TASK.optimum, constant, 0.0).abs().max() > 1e-2


# ----------------------------------------------------------------------------------------------------------------
# TRL 0.11.4, recorded
# ----------------------------------------------------------------------------------------------------------------

RECORDED = np.load(Path(__file__).parent / "data" / "trl_0_11_4_oracle.npz")
CASES = sorted({name.split("/")[0] for name in RECORDED.files})
NAMES = {"kl": "k1", "abs": "abs", "mse": "k2"}  # TRL's name of an estimator -> ours


class TRL:
    """One recorded case; every row's response is moved to the front, where our masks begin."""

    def __init__(self, case: str):
        self.case = case
        self.config = {"kl_penalty": "kl", "gamma": 1.0, "lam": 0.95} | json.loads(str(RECORDED[f"{case}/in/cfg"]))
        masks = RECORDED[f"{case}/in/masks"].astype(bool)
        self.rows = [np.flatnonzero(row) for row in masks]
        self.mask = prefix_mask([len(row) for row in self.rows])
        self.n = int(self.mask.sum())
        self.tolerance = 1e-9 if RECORDED[f"{case}/in/logprobs"].dtype == np.float64 else 1e-5

    def __getitem__(self, name: str) -> torch.Tensor:
        array = RECORDED[f"{self.case}/{name}"]
        if array.ndim < 2:
            return torch.as_tensor(array)
        shifted = np.zeros((*self.mask.shape, *array.shape[2:]), array.dtype)
        for row, columns in enumerate(self.rows):
            shifted[row, : len(columns)] = array[row, columns]
        return torch.as_tensor(shifted)

    def close(self, actual: torch.Tensor, name: str, atol: float = 0.0) -> None:
        assert_close(actual.detach(), self[name].double(), atol=max(atol, self.tolerance))

    def unbiased(self, whitened: torch.Tensor) -> torch.Tensor:
        """From our biased variance to TRL's unbiased one, which it computes in single precision."""
        return whitened * math.sqrt((self.n - 1) / self.n)


@pytest.fixture(params=CASES)
def trl(request) -> TRL:
    return TRL(request.param)


def test_trl_kl_estimators(trl):
    for theirs, ours in NAMES.items():
        kl = ppo.kl_estimate(trl["in/logprobs"], trl["in/ref_logprobs"], trl.mask, ours)
        trl.close(kl, f"out/kl_penalty_{theirs}")


def test_trl_rewards_advantages_and_returns(trl):
    estimator, values = NAMES[trl.config["kl_penalty"]], trl["in/values"]
    kl = ppo.kl_estimate(trl["in/logprobs"], trl["in/ref_logprobs"], trl.mask, estimator)
    trl.close(kl.sum(1).mean(), "out/stat/objective/kl")
    rewards = ppo.shape_rewards(trl["in/scores"], kl, trl.mask, kl_coef=0.2)
    trl.close(rewards, "out/rewards")
    trl.close(ppo.masked_mean(rewards, trl.mask), "out/masked_mean_rewards")
    advantages = ppo.estimate_advantages(rewards, values, trl.mask, trl.config["gamma"], trl.config["lam"])
    trl.close(advantages, "out/advantages_raw")
    returns = ppo.estimate_returns(advantages, values, trl.mask)
    trl.close(returns, "out/returns")
    trl.close(ppo.masked_mean(returns, trl.mask), "out/stat/returns/mean")
    trl.close(trl.unbiased(ppo.masked_whiten(advantages, trl.mask)), "out/advantages_whitened", atol=1e-6)
    mean = ppo.masked_mean(advantages, trl.mask)
    kept = ppo.masked_whiten(advantages, trl.mask, shift_mean=False)
    trl.close(torch.where(trl.mask, trl.unbiased(kept - mean) + mean, 0.0), "out/whiten_noshift", atol=1e-6)


def test_trl_policy_loss_its_gradient_and_statistics(trl):
    logprobs = trl["in/new_logprobs"].requires_grad_()
    ratio = ppo.importance_ratio(logprobs, trl["in/logprobs"], trl.mask)
    trl.close(torch.where(trl.mask, ratio, 0.0), "out/stat/policy/ratio")
    losses, binding = ppo.policy_losses(ratio, trl["out/advantages_whitened"], trl.mask, 0.2)
    loss = ppo.masked_mean(losses, trl.mask)
    trl.close(loss, "out/loss_policy")
    trl.close(torch.autograd.grad(loss, logprobs)[0], "out/grad_new_logprobs")
    trl.close(ppo.masked_mean(binding, trl.mask), "out/stat/policy/clipfrac", atol=1e-7)
    for statistic, estimator in [("approxkl", "k2"), ("policykl", "k1")]:
        kl = ppo.kl_estimate(trl["in/logprobs"], logprobs, trl.mask, estimator)
        trl.close(ppo.masked_mean(kl, trl.mask), f"out/stat/policy/{statistic}")


def test_trl_value_loss_its_gradient_and_clip_fraction(trl):
    values = trl["in/new_values"].requires_grad_()
    losses, binding = ppo.value_losses(values, trl["in/values"], trl["out/returns"], trl.mask, 0.2)
    loss = 0.1 * ppo.masked_mean(losses, trl.mask)
    trl.close(loss, "out/loss_value_times_vf_coef")
    trl.close(torch.autograd.grad(loss, values)[0], "out/grad_new_values")
    trl.close(ppo.masked_mean(binding, trl.mask), "out/stat/val/clipfrac", atol=1e-7)


def test_trl_entropy(trl):
    entropy = ppo.token_entropy(trl["in/new_logits"])
    trl.close(torch.where(trl.mask, entropy, 0.0), "out/entropy_per_token")
    trl.close(ppo.masked_mean(entropy, trl.mask), "out/stat/policy/entropy")


def test_trl_adaptive_kl_controller(trl):
    """KL = 0, 3, 6, 6.9, 9, 100 in turn, and one step with the case's own KL, which we refuse where it is negative."""
    kl_coef = 0.2
    for kl, expected in zip((0.0, 3.0, 6.0, 6.9, 9.0, 100.0), trl["out/kl_ctl_trace"][:6].tolist(), strict=True):
        kl_coef = ppo.adapt_kl_coef(kl_coef, kl, 6.0, 10_000.0, 256)
        assert_close(kl_coef, expected, atol=1e-9)
    kl = trl["out/stat/objective/kl"].item()
    if kl < 0:
        with pytest.raises(ValueError, match="cannot be negative"):
            ppo.adapt_kl_coef(0.2, kl, 6.0, 10_000.0, len(trl.rows))
    else:
        step = ppo.adapt_kl_coef(0.2, kl, 6.0, 10_000.0, len(trl.rows))
        assert_close(step, trl["out/kl_coef_after"].item(), atol=1e-7)
