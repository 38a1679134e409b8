"""The mathematics of PPO for language models: one pure function per equation.

A prompt x is the first state, every token y_t of the response is one action, and the episode ends with the
end-of-sequence token (EOS) or at the length cap. All tensors are (batch, time) over response tokens, so nothing
here can tell a GPT-2 from a T5: column t holds the log-probability OF token y_t and the value BEFORE it.
`mask` is True on real response tokens, the EOS included, and is a prefix of every row; what stands beyond it,
even NaN, changes nothing. After two averages over real tokens, which are used throughout, the functions stand in the
order in which an update first calls them (`train` in train.py); what only the log shows comes last:

    symbol       variable          meaning                                               defined by
    y_t          response_ids      token t of the response                               -
    log π(y_t)   logprobs          under the policy that sampled (old_) or trains        token_logprobs
    log ρ(y_t)   ref_logprobs      under the frozen reference                            token_logprobs
    H_t          entropy           of the policy's whole next-token distribution         token_entropy
    s            scores            one number for the whole response                     shape_scores
    k_t          kl                estimate of KL(π || ρ) at token t                     kl_estimate
    r_t          rewards           -β k_t, plus s on the last real token                 shape_rewards
    V_t          values            expected return from the state before token t         (the model)
    Â_t          advantages        by GAE(γ, λ)                                          estimate_advantages
    R_t          returns           Â_t + V_t: what the value head learns                 estimate_returns
    q_t          ratio             π_new(y_t) / π_old(y_t)                               importance_ratio
    L^CLIP       policy_losses     clipped surrogate, as a loss                          policy_losses
    L^VF         value_losses      clipped squared error                                 value_losses
    β            kl_coef           price of one nat of KL, in reward units               adapt_kl_coef

Sources: PPO = Schulman et al. 2017 (arXiv:1707.06347); GAE = Schulman et al. 2016 (arXiv:1506.02438);
Ziegler et al. 2019 (arXiv:1909.08593); Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html).
docs/from_paper_to_code.md has the papers' equations in their own numbering and notation, each beside its lines here.
"""

from typing import NamedTuple

import torch
from torchtyping import TensorType, is_float

KL_ESTIMATORS = ("k1", "k2", "k3", "abs")


def masked_mean(
    x: TensorType["batch", "time"], mask: TensorType["batch", "time", bool], count: int | None = None
) -> TensorType[()]:
    """Mean of x over real tokens: Σ_m x / Σ m.

    `count` replaces Σ m where x is a part of what the mean is over: the parts' results then add up to the whole's mean,
    whatever the lengths in each part.
    """
    total = mask.sum().clamp(min=1) if count is None else count
    return torch.where(mask, x, 0.0).sum() / total


def masked_whiten(
    x: TensorType["batch", "time", is_float], mask: TensorType["batch", "time", bool], shift_mean: bool = True
) -> TensorType["batch", "time", is_float]:
    """Scale to variance 1, and to mean 0 if `shift_mean`, over all real tokens together, of all rows; 0 elsewhere.

    (x - μ) / sqrt(σ² + 1e-8), with the biased σ², which is finite even for a single token. Without `shift_mean`, μ is
    added back: on per-token rewards this would leave every token a constant, that is, a bonus for length or brevity.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def response_mask(
    response_ids: TensorType["batch", "time"], eos_ids: int | torch.Tensor
) -> TensorType["batch", "time", bool]:
    """True up to and including the first EOS, one of `eos_ids`, of each row: cumsum(y = EOS) - (y = EOS) = 0.

    The padding id plays no part, so a tokenizer whose pad token is its EOS token loses nothing.
    """
    is_eos = torch.isin(response_ids, eos_ids).long()
    return is_eos.cumsum(1) - is_eos == 0


def token_logprobs(
    logits: TensorType["batch", "time", "vocab", is_float], tokens: TensorType["batch", "time"]
) -> TensorType["batch", "time", is_float]:
    """log softmax(z_t)[y_t], in nats; the logits z are already divided by the temperature.

    The definition: a run takes the same numbers from `thin_logprobs` of model.py, which needs less memory.
    """
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def token_entropy(
    logits: TensorType["batch", "time", "vocab", is_float],
) -> TensorType["batch", "time", is_float]:
    """H_t = -Σ_a p_t[a] log p_t[a], p_t = softmax(z_t), in nats, between 0 and log(vocab); a logit of -inf adds 0.

    The definition: a run takes the same numbers from `thin_entropy` of model.py, which needs less memory.
    """
    finite = logits.clamp(min=torch.finfo(logits.dtype).min / 2)  # 0 log 0 = 0, where 0 x -inf would be NaN
    logprobs = finite.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def penalise_missing_eos(
    scores: TensorType["batch", is_float], has_eos: TensorType["batch", bool], penalty: float
) -> TensorType["batch", is_float]:
    """s - penalty for a response that was cut at the length cap before its EOS, s for one that ended."""
    return torch.where(has_eos, scores, scores - penalty)


class Moments(NamedTuple):
    """Count n, mean μ and S = Σ (s - μ)² of all scores so far; at the start there are none."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0


def update_moments(moments: Moments, scores: TensorType["batch"]) -> Moments:
    """The moments with a batch of m scores added to them: Chan, Golub and LeVeque 1979 (Stanford CS-TR-79-773).

    μ ← μ + d m / (n + m) and S ← S + S_b + d² n m / (n + m), with d = μ_b - μ: exact, whatever the batches' sizes.
    """
    n, m = moments.count, len(scores)
    scores = scores.double()
    batch_mean = scores.mean().item()
    batch_squares = ((scores - batch_mean) ** 2).sum().item()
    d = batch_mean - moments.mean
    return Moments(
        count=n + m,
        mean=moments.mean + d * m / (n + m),
        squares=moments.squares + batch_squares + d**2 * n * m / (n + m),
    )


def shape_scores(
    scores: TensorType["batch", is_float],
    moments: Moments | None = None,
    whiten: bool = False,
    clip: float | None = None,
) -> TensorType["batch", is_float]:
    """Turn scores into those trained on: normalise by all scores so far, or whiten over the batch; then clip to ±clip.

    `moments` give (s - μ) / sqrt(S / (n - 1) + 1e-8); without them, and without `whiten` and `clip`, s stays as it is.
    """
    if moments is not None:
        variance = moments.squares / max(moments.count - 1, 1)
        scores = (scores - moments.mean) / (variance + 1e-8) ** 0.5
    if whiten:
        column = scores[:, None]  # (batch, 1)
        scores = masked_whiten(column, torch.ones_like(column, dtype=torch.bool))[:, 0]
    return scores if clip is None else scores.clamp(-clip, clip)


def kl_estimate(
    logprobs: TensorType["batch", "time", is_float],
    other_logprobs: TensorType["batch", "time", is_float],
    mask: TensorType["batch", "time", bool],
    estimator: str = "k1",
) -> TensorType["batch", "time", is_float]:
    """Estimate KL(π || π') in nats at tokens sampled from π, with d_t = log π(y_t) - log π'(y_t): Schulman 2020.

    k1 = d: unbiased, either sign. k2 = d²/2: biased. k3 = exp(-d) - 1 + d: unbiased, never negative. abs = |d|.
    In a reward only k1 has the right optimum, π* ∝ ρ exp(s / β): E[∇log π · k] is ∇KL for k1 alone.
    0 beyond the mask. Raises ValueError for an unknown estimator.
    """
    d = torch.where(mask, logprobs - other_logprobs, 0.0)
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d**2 / 2
    if estimator == "k3":
        return torch.expm1(-d) + d  # expm1 keeps the digits that exp(-d) - 1 loses near d = 0
    if estimator == "abs":
        return d.abs()
    raise ValueError(f"kl estimator is {estimator!r}, expected one of {', '.join(KL_ESTIMATORS)}")


def shape_rewards(
    scores: TensorType["batch", is_float],
    kl: TensorType["batch", "time", is_float],
    mask: TensorType["batch", "time", bool],
    kl_coef: float,
) -> TensorType["batch", "time", is_float]:
    """r_t = -β k_t, plus the score s on the last real token: Ziegler et al. 2019, eq. 2, spread over the tokens.

    A row's rewards therefore sum to s - β Σ_t k_t. 0 beyond the mask. Raises ValueError for an empty response.
    """
    lengths = mask.sum(1)
    if (lengths == 0).any():
        raise ValueError("every response needs at least one real token (its EOS counts) to carry its score")
    last = torch.arange(mask.shape[1], device=mask.device) == lengths[:, None] - 1  # (batch, time)
    return torch.where(mask, -kl_coef * kl, 0.0) + torch.where(last, scores[:, None], 0.0)


def estimate_advantages(
    rewards: TensorType["batch", "time", is_float],
    values: TensorType["batch", "time", is_float],
    mask: TensorType["batch", "time", bool],
    gamma: float,
    lam: float,
) -> TensorType["batch", "time", is_float]:
    """Â_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} - V_t: GAE, eq. 16, as a recursion run backwards.

    rewards and values in reward units. The episode ends where the mask does: V = Â = 0 from there on, also for a
    response cut at the length cap, because the score is that of the cut text (no bootstrapping).
    Raises ValueError outside 0 <= γ, λ <= 1.
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in [0, 1], got {gamma} and {lam}")
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])  # (batch,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # δ_t
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, 0.0)  # Â_t = δ_t + γλ Â_{t+1}
        next_value = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = advantage
    return advantages


def estimate_returns(
    advantages: TensorType["batch", "time", is_float],
    values: TensorType["batch", "time", is_float],
    mask: TensorType["batch", "time", bool],
) -> TensorType["batch", "time", is_float]:
    """R_t = Â_t + V_t, the TD(λ) return (GAE, footnote 2), from advantages before whitening.

    λ = 1 gives the Monte Carlo return: GAE, eq. 28.
    """
    return torch.where(mask, advantages + values, 0.0)


def importance_ratio(
    logprobs: TensorType["batch", "time", is_float],
    old_logprobs: TensorType["batch", "time", is_float],
    mask: TensorType["batch", "time", bool],
) -> TensorType["batch", "time", is_float]:
    """q_t = exp(log π_new(y_t) - log π_old(y_t)): PPO, section 3; 1 beyond the mask, and before any update."""
    return torch.exp(torch.where(mask, logprobs - old_logprobs, 0.0))


def policy_losses(
    ratio: TensorType["batch", "time", is_float],
    advantages: TensorType["batch", "time", is_float],
    mask: TensorType["batch", "time", bool],
    clip_range: float,
) -> tuple[TensorType["batch", "time", is_float], TensorType["batch", "time", bool]]:
    """-min(q_t Â_t, clip(q_t, 1-ε, 1+ε) Â_t): PPO, eq. 7, negated into a loss; and where the clip was binding.

    The clip takes the gradient away exactly where it binds: Â > 0 and q > 1+ε, or Â < 0 and q < 1-ε. 0 beyond the
    mask, where `importance_ratio` has put 1.
    """
    advantages = torch.where(mask, advantages, 0.0)
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_losses(
    values: TensorType["batch", "time", is_float],
    old_values: TensorType["batch", "time", is_float],
    returns: TensorType["batch", "time", is_float],
    mask: TensorType["batch", "time", bool],
    clip_range_value: float,
) -> tuple[TensorType["batch", "time", is_float], TensorType["batch", "time", bool]]:
    """½ max((V - R)², (clip(V, V_old ± ε_v) - R)²), and where the clipped error was the larger one.

    The gradient is 0 where the clipped error counts: V has moved towards R, and more than ε_v away from V_old. Departs
    from PPO, eq. 9, which has the plain squared error: the clip is that of OpenAI's code (baselines, and
    lm-human-preferences for language models). 0 beyond the mask.
    """
    values = torch.where(mask, values, 0.0)
    old_values = torch.where(mask, old_values, 0.0)
    returns = torch.where(mask, returns, 0.0)
    near_old = values.clamp(old_values - clip_range_value, old_values + clip_range_value)
    unclipped = (values - returns) ** 2
    clipped = (near_old - returns) ** 2
    return torch.maximum(unclipped, clipped) / 2, clipped > unclipped


def adapt_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, n_responses: int) -> float:
    """β ← β (1 + e n / horizon), e = clip(KL / target - 1, ±0.2): Ziegler et al. 2019, section 2.2.

    kl: mean over the rollout of the KL summed over a response, in nats; n: responses in the rollout. The paper's
    gain, K_β = 0.1, is n / horizon here, as in the code that came with it. Raises ValueError for a negative kl: no KL
    is, but an average of k1 can be, by chance or where sampling and scoring disagree, and would lower β: pass an
    average of k3.
    """
    if kl < 0:
        raise ValueError(f"a KL divergence cannot be negative, got {kl}")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n_responses / horizon)


def explained_variance(
    values: TensorType["batch", "time", is_float],
    returns: TensorType["batch", "time", is_float],
    mask: TensorType["batch", "time", bool],
) -> TensorType[()]:
    """1 - Var(R - V) / Var(R) over real tokens: 1 for a critic that is right but for a constant, 0 for a constant."""

    def variance(x: torch.Tensor) -> torch.Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)
