"""The oracles of benchmarks/conformance.py: this project passes them all, and each refuses what is wrong."""

import json
import math

import pytest
import torch

from benchmarks import conformance
from benchmarks.conformance import CHECKS, RESULTS
from benchmarks.implementations import Batch, equal_parts, ours, rows_of

OURS = ours()
BIASED = {name for name in CHECKS if name.startswith("the same with k")}  # of any implementation that offers them


def differing(**wrong) -> set[str]:
    """The checks that an implementation like ours, but for some pieces, does not pass."""
    results = conformance.run(OURS._replace(**wrong))
    return {name for name, outcome in results.items() if outcome and not outcome["agrees"]} - BIASED


def checks(*beginnings: str) -> set[str]:
    found = {name for name in CHECKS if name.startswith(beginnings)}
    assert len(found) >= len(beginnings)
    return found


def test_ours_passes_every_check_and_has_every_piece():
    results = conformance.run(OURS)
    assert None not in results.values()
    assert {name for name, outcome in results.items() if not outcome["agrees"]} == BIASED
    kept = json.loads((RESULTS / "ours.json").read_text())
    assert kept["checks"] == results


def test_a_wrong_sign_of_the_kl_is_seen():
    def rewards(batch, kl_coef, estimator):
        return OURS.rewards(batch, -kl_coef, estimator)

    assert differing(rewards=rewards) == checks("reward: -β")
    both = {"rewards": rewards, "estimate": lambda batch, kl_coef, *rest: OURS.estimate(batch, -kl_coef, *rest)}
    assert differing(**both) == checks("reward: -β", "expected gradient with k1")


def test_k3_the_wrong_way_round_is_seen():
    def kl(logprobs, ref_logprobs, mask, estimator):
        pair = (logprobs, ref_logprobs) if estimator != "k3" else (ref_logprobs, logprobs)
        return OURS.kl(*pair, mask, estimator)

    assert differing(kl=kl) == checks("KL in the reward: k3")


def test_a_score_one_token_late_is_seen():
    def rewards(batch, kl_coef, estimator):
        plain = OURS.rewards(batch._replace(scores=torch.zeros_like(batch.scores)), kl_coef, estimator)
        late = batch.mask.sum(1).clamp(max=batch.mask.shape[1] - 1)
        return plain.scatter_add(1, late[:, None], batch.scores[:, None])

    assert differing(rewards=rewards) == checks("the score is on")


def shorter(mask: torch.Tensor) -> torch.Tensor:
    """Without the last token of each row."""
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)


def test_a_mask_off_by_one_in_the_loss_is_seen():
    seen = differing(
        loss=lambda batch, *estimates: OURS.loss(batch._replace(mask=shorter(batch.mask)), *estimates),
    )
    of_losses = checks("policy loss", "its gradient", "value loss", "clip fraction", "expected gradient with k1")
    assert seen >= of_losses - checks("clip fraction of")
    assert not seen & checks("GAE", "whitening", "reward", "the score", "a step in parts")


def test_a_mask_off_by_one_of_the_tokens_is_seen():
    def score(*arguments):
        found = OURS.score(*arguments)
        return found._replace(mask=shorter(found.mask))

    assert differing(score=score) == checks("the last token", "the first token is")  # a row is one token long


def test_log_probabilities_and_values_of_the_next_token_are_seen():
    def score(*arguments):
        found = OURS.score(*arguments)
        return found._replace(logprobs=found.logprobs.roll(-1, 1), values=found.values.roll(-1, 1))

    assert differing(score=score) == checks("log-probabilities are", "values are")


def test_a_decoder_whose_first_token_is_not_trained_is_seen():
    def score(*arguments):
        found = OURS.score_encoder_decoder(*arguments)
        return found._replace(mask=found.mask & (torch.arange(found.mask.shape[1]) > 0))

    assert differing(score_encoder_decoder=score) == checks("the first token of an encoder-decoder")


def test_whitening_over_padding_is_seen():
    def whiten(x, mask):
        return OURS.whiten(x, torch.ones_like(mask))

    expected = checks("whitening: mean", "whitening: one scale", "whitening: variance", "large numbers")
    assert differing(whiten=whiten) >= checks("whitening: mean", "whitening: one scale", "whitening: variance")
    assert differing(whiten=whiten) <= expected


def test_whitening_that_keeps_the_mean_is_seen():
    def whiten(x, mask):
        return torch.where(mask, OURS.whiten(x, mask) + x[mask].mean(), 0.0)

    assert differing(whiten=whiten) == checks("whitening: mean")


def test_whitening_with_the_unbiased_variance_is_seen():
    def whiten(x, mask):
        real = x[mask]
        deviation = (real.var(correction=0) * len(real) / (len(real) - 1)) ** 0.5 if len(real) > 1 else math.nan
        return torch.where(mask, (x - real.mean()) / deviation, 0.0)

    assert differing(whiten=whiten) == checks("whitening: variance", "whitening: one token")


def test_a_mean_of_the_parts_means_is_seen():
    def step_gradient(batch: Batch, advantages, returns, n_parts):
        parts = equal_parts(len(batch.mask), n_parts)
        found = [OURS.loss(rows_of(batch, rows), advantages[rows], returns[rows]) for rows in parts]
        return torch.cat([loss.policy_gradient / n_parts for loss in found])

    assert differing(step_gradient=step_gradient) == checks("a step in parts")


def test_a_bootstrap_at_the_length_cap_is_seen():
    def advantages(rewards, values, mask, gamma, lam):
        capped = mask.all(1)
        rewards = rewards.clone()
        rewards[capped, -1] += gamma * values[capped, -1]
        return OURS.advantages(rewards, values, mask, gamma, lam)

    assert differing(advantages=advantages) == checks("GAE = the double sum", "GAE at the length cap", "returns")


def test_values_after_the_end_that_are_read_are_seen():
    def advantages(rewards, values, mask, gamma, lam):
        ends = mask.sum(1).clamp(max=mask.shape[1] - 1)
        after = torch.where(mask.all(1), 0.0, values.gather(1, ends[:, None])[:, 0])
        last = torch.nn.functional.one_hot(mask.sum(1) - 1, mask.shape[1])
        return OURS.advantages(rewards + gamma * after[:, None] * last, values, mask, gamma, lam)

    assert differing(advantages=advantages) == checks("GAE, whatever")


def test_the_other_clip_fraction_is_named():
    def loss(batch, *estimates):
        ratio = (batch.new_logprobs - batch.old_logprobs).exp()[batch.mask]
        outside = ((ratio - 1).abs() > conformance.CLIP).double().mean().item()
        return OURS.loss(batch, *estimates)._replace(clip_fraction=outside)

    assert differing(loss=loss) == {"clip fraction: where the clip binds, of real tokens"}
    assert conformance.check_clip_fraction(OURS._replace(loss=loss)).seen == "|q-1| > ε"


def test_a_bound_on_the_ratio_is_seen():
    def loss(batch, advantages, returns):
        near = batch.old_logprobs + (batch.new_logprobs - batch.old_logprobs).clamp(max=1.0)
        return OURS.loss(batch._replace(new_logprobs=near), advantages, returns)

    assert differing(loss=loss) == checks("no further bound")


def test_a_check_that_breaks_is_a_difference_and_ends_no_run(capsys):
    def kl(*_):
        raise ValueError("no such estimator")

    assert differing(kl=kl) == checks("KL in the reward")
    assert "no such estimator" in capsys.readouterr().err


# The table


def test_the_page_has_the_table_of_what_was_run_and_every_difference_is_spoken_of():
    page = (RESULTS.parents[1] / "conformance.md").read_text()
    assert conformance.kept_table() in page


@pytest.mark.parametrize(
    "remarks",
    [
        [],
        [{"of": ["ours"], "checks": [name], "verdict": "wrong", "text": ""} for name in list(CHECKS)[:2]],
    ],
)
def test_a_difference_without_a_remark_and_a_remark_without_a_difference_are_refused(remarks):
    passed = {name: {"agrees": True, "seen": ""} for name in CHECKS}
    passed[next(iter(CHECKS))] = {"agrees": False, "seen": "1"}
    with pytest.raises(ValueError):
        conformance.table([{"implementation": "ours", "version": "1", "checks": passed}], remarks)


# The oracles themselves


def test_the_double_sum_by_hand():
    assert conformance.double_sum([3.0], [0.0], 1.0, 1.0) == [3.0]
    assert conformance.double_sum([1.0, 2.0], [0.5, 0.25], 0.9, 0.5) == pytest.approx([0.725 + 0.45 * 1.75, 1.75])


def test_the_gradient_of_the_objective_vanishes_where_it_is_known_to():
    """At π*(y) ∝ ρ(y) exp(s(y) / β), token by token; and there J = β log Σ_y ρ(y) exp(s(y) / β)."""
    _, reference, _ = conformance.enumerated()
    other = conformance.log_policy(reference)
    weights = {}
    for sentence in conformance.SENTENCES:
        logprob = sum(other[state][word] for state, word in conformance.steps(sentence))
        weights[sentence] = math.exp(logprob + conformance.told_score(sentence) / conformance.BETA)
    best = []
    for state in conformance.STATES:
        for word in conformance.WORDS:
            begun = (*state, word)
            best.append(math.log(sum(w for sentence, w in weights.items() if sentence[: len(begun)] == begun)))
    assert conformance.objective(best, reference) == pytest.approx(conformance.BETA * math.log(sum(weights.values())))
    assert conformance.true_gradient(best, reference).abs().max() < 1e-8
    assert conformance.true_gradient(reference, reference).abs().max() > 0.01
