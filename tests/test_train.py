"""The loop: what a rollout holds, what an update does, and that the two together find the optimum theory gives."""

import copy
import itertools
import json
import math
import statistics
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from tiny_models import BUILDERS, EOS, FAMILIES, PAD, letter_tokenizer, tiny_gpt2, tiny_policy
from transformers import AutoModel

import generate
import model
import ppo
import report
import train
from config import Config, RunError
from dataset import Prompt, pad
from device import prepare_device
from loading import load_policy, save_policy
from model import PolicyModel, frozen_copy
from report import rollout_stats

QUERIES = [[5, 3, 8, 2, 9], [4, 7], [6], [2, 2, 10]]


def assert_close(actual, expected, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=0, atol=atol)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**overrides) -> Config:
    small = {"batch_size": 16, "mini_batch_size": 16, "ppo_epochs": 1, "max_new_tokens": 8, "max_grad_norm": 1e9}
    return Config(**(small | overrides))


def prompts_of(queries: list[list[int]]) -> list[Prompt]:
    tokenizer = letter_tokenizer(40)
    return [Prompt(tokenizer.decode(ids), ids, {"number": i}) for i, ids in enumerate(queries)]


def without_shape_checks(monkeypatch) -> None:
    """Take the runtime shape checks off for a long test: they take twice the time of the rest, and are on elsewhere."""
    for module in (ppo, model, generate, train, model.PolicyModel):
        for name, value in vars(module).items():
            code = getattr(value, "__code__", None)
            if code and Path(code.co_filename).parent.name == "typeguard":
                monkeypatch.setattr(module, name, value.__wrapped__)


def count_a(prompts: list[str], responses: list[str], rows: list[dict]) -> torch.Tensor:
    return torch.tensor([float(response.count("a")) for response in responses])


def models_of(policy: PolicyModel, **terms) -> train.Models:
    return train.Models(policy, frozen_copy(policy), letter_tokenizer(), terms or {"a": count_a})


def other_policy(family: str) -> PolicyModel:
    """A policy some way from `tiny_policy(family)`, so that a KL between the two is not 0."""
    policy = tiny_policy(family)
    generator = seeded(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return policy


def collect(policy: PolicyModel, config: Config, reference: PolicyModel | None = None) -> train.Collected:
    models = models_of(policy)._replace(reference=reference or frozen_copy(policy))
    queries = (QUERIES * config.batch_size)[: config.batch_size]
    return train.collect_rollout(models, prompts_of(queries), config, config.kl_coef, seeded())


# ----------------------------------------------------------------------------------------------------------------
# collect_rollout
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_carries_no_gradient_and_no_hole(family):
    policy = other_policy(family).train()
    collected = collect(policy, settings(mini_batch_size=4), frozen_copy(tiny_policy(family)))
    assert policy.training
    rollout = collected.rollout
    for field in fields(rollout):
        tensor = getattr(rollout, field.name)
        assert not tensor.requires_grad
        assert len(tensor) == 16
        assert tensor.isfinite().all()
    lengths = rollout.mask.sum(1)
    assert lengths.min() < 4
    assert lengths.max() == 8
    for name in ("kl", "rewards", "advantages", "returns"):
        assert (getattr(rollout, name)[~rollout.mask] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollouts_numbers_are_those_of_policy_and_reference(family):
    """All rows scored at once, at the sampling temperature; the rollout scored them in forward passes of four."""
    policy, reference = other_policy(family), frozen_copy(tiny_policy(family))
    rollout = collect(policy, settings(mini_batch_size=4, temperature=0.7), reference).rollout
    batch = (rollout.query_ids, rollout.query_mask, rollout.response_ids, rollout.mask)
    with torch.no_grad():
        own, theirs = policy.score(*batch, 0.7), reference.score(*batch, 0.7)
    mask = rollout.mask
    assert_close(rollout.logprobs[mask], own.logprobs[mask], atol=3e-5)
    assert_close(rollout.values[mask], own.values[mask], atol=3e-5)
    assert_close(rollout.ref_logprobs[mask], theirs.logprobs[mask], atol=3e-5)
    assert_close(rollout.kl[mask], (rollout.logprobs - rollout.ref_logprobs)[mask], atol=0)
    assert rollout.kl.sum(1).mean() > 0.05
    assert torch.equal(mask, ppo.response_mask(rollout.response_ids, EOS))


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_of_a_row_sum_to_its_score_less_the_price_of_its_kl(family):
    """Row by row, in plain Python: -β k_t on every token, the score on the last real one, GAE, whitening over all."""
    config = settings(kl_coef=0.3, missing_eos_penalty=0.7, lam=0.9, gamma=0.95)
    collected = collect(other_policy(family), config, frozen_copy(tiny_policy(family)))
    rollout, raw = collected.rollout, []
    ids, lengths = rollout.response_ids.tolist(), rollout.mask.sum(1).tolist()
    for i, n in enumerate(lengths):
        response = ids[i][:n]
        assert EOS not in response[:-1]
        text = "".join("..abcdefghi"[token] for token in response if token > EOS)
        assert collected.responses[i] == text
        assert collected.rewards[i].item() == collected.terms["a"][i].item() == text.count("a")
        score = text.count("a") - (0.0 if response[-1] == EOS else 0.7)
        assert_close(rollout.scores[i], score, atol=1e-6)
        kl = rollout.kl[i, :n].tolist()
        assert_close(rollout.rewards[i].sum(), score - 0.3 * sum(kl))
        assert_close(rollout.rewards[i, n - 1], score - 0.3 * kl[-1])
        assert_close(rollout.rewards[i, : n - 1], torch.tensor([-0.3 * k for k in kl[:-1]]))
        values, advantages = [*rollout.values[i, :n].tolist(), 0.0], [0.0]
        for t in reversed(range(n)):
            delta = rollout.rewards[i, t].item() + 0.95 * values[t + 1] - values[t]
            advantages.insert(0, delta + 0.95 * 0.9 * advantages[0])
        raw.append(advantages[:n])
        assert_close(rollout.returns[i, :n], torch.tensor([a + v for a, v in zip(raw[i], values, strict=False)]))
    pooled = torch.tensor([a for row in raw for a in row], dtype=torch.float64)
    whitened = (pooled - pooled.mean()) / (pooled.var(correction=0) + 1e-8).sqrt()
    assert_close(rollout.advantages[rollout.mask], whitened.float())
    assert len(set(lengths)) > 3
    assert {ids[i][n - 1] == EOS for i, n in enumerate(lengths)} == {True, False}


def test_without_whitening_advantages_are_those_of_gae():
    rollout = collect(other_policy("gpt2"), settings(whiten_advantages=False)).rollout
    plain = ppo.estimate_advantages(rollout.rewards, rollout.values, rollout.mask, 1.0, 0.95)
    assert torch.equal(rollout.advantages, plain)
    assert_close(rollout.returns[rollout.mask], (plain + rollout.values)[rollout.mask], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_before_any_update_the_kl_is_zero_and_the_ratio_one(family):
    policy = tiny_policy(family)
    config = settings(kl_coef=0.5, mini_batch_size=4)
    collected = collect(policy, config)
    rollout = collected.rollout
    assert (rollout.kl == 0).all()
    assert collected.stats["kl"] == collected.stats["kl_k1"] == collected.stats["kl_k3"] == 0
    assert_close(rollout.rewards.sum(1), rollout.scores, atol=0)
    assert_close(collected.sampled.logprobs[rollout.mask], rollout.logprobs[rollout.mask], atol=3e-5)
    stats = train.update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), rollout, config, seeded())
    for name in ("ratio", "ratio_min", "ratio_max"):
        assert abs(stats[name] - 1) < 1e-5
    assert abs(stats["approx_kl_k1"]) < 1e-6
    assert abs(stats["approx_kl_k3"]) < 1e-9
    assert stats["clip_fraction"] == stats["value_clip_fraction"] == 0


def test_a_reward_sees_prompts_responses_and_the_rows_of_the_data():
    policy, seen = tiny_policy("gpt2"), []

    def term(prompts, responses, rows) -> torch.Tensor:
        seen.append((prompts, responses, rows))
        return torch.arange(4.0)

    models = models_of(policy, first=term, second=count_a)
    config = settings(batch_size=4, mini_batch_size=4, reward_weights="first=2,second=-0.5")
    collected = train.collect_rollout(models, prompts_of(QUERIES), config, 0.1, seeded())
    assert seen == [(["dbgah", "cf", "e", "aai"], collected.responses, [{"number": i} for i in range(4)])]
    counts = torch.tensor([response.count("a") for response in collected.responses])
    assert_close(collected.rewards, 2 * torch.arange(4.0) - 0.5 * counts, atol=1e-6)
    assert_close(collected.stats["reward"], collected.rewards.mean().item(), atol=1e-6)
    assert_close(collected.stats["reward_first"], 1.5, atol=0)
    assert_close(collected.stats["reward_second"], counts.float().mean().item(), atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_rollout_adds_its_penalised_scores_to_the_moments_and_is_scored_by_them(normalize):
    """Sixteen scores, less .7 without an EOS, to two of 2 and 6 (μ = 4, S = 8); statistics in plain Python."""
    config = settings(missing_eos_penalty=0.7, normalize_scores=normalize)
    prompts = prompts_of(QUERIES * 4)
    collected = train.collect_rollout(models_of(other_policy("gpt2")), prompts, config, 0.1, seeded(), (2, 4.0, 8.0))
    rollout = collected.rollout
    ended = ((rollout.response_ids == EOS) & rollout.mask).any(1).tolist()
    scores = [x - 0.7 * (not end) for x, end in zip(collected.rewards.tolist(), ended, strict=True)]
    assert {True, False} == set(ended) and len(set(scores)) > 2
    every = [2.0, 6.0, *scores]
    n, mean, squares = collected.moments
    assert n == 18
    assert_close(mean, statistics.mean(every))
    assert_close((squares / 17) ** 0.5, statistics.stdev(every))
    wanted = [(x - statistics.mean(every)) / statistics.stdev(every) for x in scores] if normalize else scores
    assert_close(rollout.scores, torch.tensor(wanted))
    assert_close(rollout.rewards.sum(1), torch.tensor(wanted))  # the KL to the policy's own copy is 0


def test_statistics_of_a_rollout_by_brute_force():
    """Means over real tokens, sums over a response averaged over rows, shares of rows."""
    policy, reference = other_policy("gpt2"), frozen_copy(tiny_policy("gpt2"))
    collected = collect(policy, settings(kl_estimator="k3"), reference)
    rollout, stats = collected.rollout, collected.stats
    rows = [slice(0, n) for n in rollout.mask.sum(1).tolist()]
    d = [(rollout.logprobs[i, real] - rollout.ref_logprobs[i, real]).tolist() for i, real in enumerate(rows)]
    k1 = sum(map(sum, d)) / 16
    k3 = sum(torch.tensor(x).neg().exp().sub(1).add(torch.tensor(x)).sum().item() for x in d) / 16
    assert_close(stats["kl_k1"], k1)
    assert_close(stats["kl_k3"], k3)
    assert_close(stats["kl"], k3)  # of the estimator that shaped the rewards
    n_tokens = sum(map(len, d))
    assert stats["response_length"] == n_tokens / 16
    assert_close(stats["value"], sum(rollout.values[i, real].sum().item() for i, real in enumerate(rows)) / n_tokens)
    assert_close(stats["return"], sum(rollout.returns[i, real].sum().item() for i, real in enumerate(rows)) / n_tokens)
    ended = [EOS in rollout.response_ids[i, real].tolist() for i, real in enumerate(rows)]
    assert 0 < stats["ended"] == sum(ended) / 16 < 1
    with torch.no_grad():
        batch = (rollout.query_ids, rollout.query_mask, rollout.response_ids, rollout.mask)
        entropy = policy.score(*batch, with_entropy=True).entropy
    assert_close(stats["entropy"], entropy[rollout.mask].mean().item())
    nll = -sum(rollout.ref_logprobs[i, real].sum().item() for i, real in enumerate(rows)) / n_tokens
    assert_close(stats["ref_perplexity"], math.exp(nll), atol=1e-4)
    assert nll > 1


# ----------------------------------------------------------------------------------------------------------------
# update
# ----------------------------------------------------------------------------------------------------------------


def moved(rollout: ppo.Rollout) -> ppo.Rollout:
    """As if the sampling policy had been another: ratios spread around 1, some beyond the clip range."""
    noise = torch.randn(rollout.mask.shape, generator=seeded(4))
    return replace(
        rollout,
        logprobs=rollout.logprobs + torch.where(rollout.mask, 0.3 * noise, 0.0),
        values=rollout.values + torch.where(rollout.mask, 0.3 * noise, 0.0),
    )


def weights(policy: PolicyModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()


def gradient_of(policy: PolicyModel, rollout: ppo.Rollout, config: Config) -> tuple[torch.Tensor, dict]:
    """The gradient that an update of a single step has at its step, and its statistics."""
    optimizer, gradients = torch.optim.SGD(policy.parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.flatten() for p in policy.parameters()))
    stats = train.update(policy, optimizer, rollout, config, seeded())
    return torch.cat(gradients), stats


def step_of(policy: PolicyModel, rollout: ppo.Rollout, config: Config, seed: int = 0) -> tuple[torch.Tensor, dict]:
    """What an update adds to the weights under plain gradient descent at rate 1, and its statistics."""
    start, optimizer = weights(policy), torch.optim.SGD(policy.parameters(), lr=1e-3)
    stats = train.update(policy, optimizer, rollout, config, seeded(seed))
    return (weights(policy) - start) / 1e-3, stats


@pytest.mark.parametrize("parts", [2, 4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_minibatch_in_parts_gives_the_gradient_and_statistics_of_the_whole(family, parts):
    """The parts have unequal numbers of tokens, so a mean of the parts' means would be another one."""
    rollout = moved(collect(tiny_policy(family), settings()).rollout)
    whole, stats = gradient_of(tiny_policy(family), rollout, settings(entropy_coef=0.1))
    split = settings(entropy_coef=0.1, mini_batch_size=16 // parts, gradient_accumulation_steps=parts)
    in_parts, their_stats = gradient_of(tiny_policy(family), rollout, split)
    scale = whole.abs().max().item()
    assert scale > 0.1
    assert_close(in_parts / scale, whole / scale)
    for name, value in stats.items():
        assert abs(their_stats[name] - value) < 1e-5, name
    assert 0 < stats["clip_fraction"] < 1
    assert stats["ratio_min"] < 0.8
    assert stats["ratio_max"] > 1.2


def test_the_loss_by_brute_force():
    """PPO's three terms token by token in plain Python; its gradient by central differences along a random line."""
    config = settings(batch_size=4, mini_batch_size=4, value_coef=0.3, entropy_coef=0.2, temperature=0.8)
    policy = tiny_policy("gpt2")
    rollout = moved(collect(policy, config).rollout)
    n_tokens = int(rollout.mask.sum())
    loss, stats = train.minibatch_loss(policy, rollout, n_tokens, config)
    batch = (rollout.query_ids, rollout.query_mask, rollout.response_ids, rollout.mask)
    with torch.no_grad():
        new = policy.score(*batch, 0.8, with_entropy=True)
    policy_loss = value_loss = entropy = 0.0
    clipped = 0
    for i, t in rollout.mask.nonzero().tolist():
        ratio = (new.logprobs[i, t] - rollout.logprobs[i, t]).exp().item()
        advantage = rollout.advantages[i, t].item()
        surrogates = ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage
        policy_loss -= min(surrogates) / n_tokens
        clipped += surrogates[1] < surrogates[0]
        value, old, target = (x[i, t].item() for x in (new.values, rollout.values, rollout.returns))
        near = old + min(max(value - old, -0.2), 0.2)
        value_loss += 0.5 * max((value - target) ** 2, (near - target) ** 2) / n_tokens
        entropy += new.entropy[i, t].item() / n_tokens
    assert_close(loss.item(), policy_loss + 0.3 * value_loss - 0.2 * entropy)
    assert_close(stats["loss"], loss.item(), atol=0)
    assert_close(stats["policy_loss"], policy_loss)
    assert_close(stats["value_loss"], value_loss)
    assert_close(stats["clip_fraction"], clipped / n_tokens)
    assert clipped > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_exactly_the_real_tokens(family):
    """At the logits: not 0 at every real token, the first and the EOS included; 0 beyond the mask."""
    policy = tiny_policy(family)
    config = settings(clip_range=0.9)
    rollout = collect(policy, config).rollout
    seen = []

    def keep_gradient(module, inputs, output) -> None:
        output.retain_grad()
        seen.append(output)

    policy.language_model.get_output_embeddings().register_forward_hook(keep_gradient)
    loss, _ = train.minibatch_loss(policy, rollout, int(rollout.mask.sum()), config)
    loss.backward()
    size = seen[0].grad.abs().sum(-1)
    assert (size[rollout.mask] > 0).all()
    assert (size[~rollout.mask] == 0).all()


def test_the_first_minibatch_has_ratio_one_and_the_mean_advantage_as_loss():
    policy = tiny_policy("gpt2")
    rollout = collect(policy, settings(whiten_advantages=False)).rollout
    _, stats = step_of(policy, rollout, settings())
    assert abs(stats["ratio_min"] - 1) < 1e-5
    assert abs(stats["ratio_max"] - 1) < 1e-5
    mean = rollout.advantages[rollout.mask].mean().item()
    assert abs(mean) > 0.05
    assert_close(stats["policy_loss"], -mean)
    value_loss = 0.5 * ((rollout.values - rollout.returns)[rollout.mask] ** 2).mean().item()
    assert_close(stats["value_loss"], value_loss)
    assert_close(stats["loss"], -mean + 0.1 * value_loss)


def test_a_step_raises_what_was_better_than_expected_and_lowers_what_was_worse():
    policy = tiny_policy("gpt2")
    rollout = collect(policy, settings()).rollout
    train.update(policy, torch.optim.SGD(policy.parameters(), lr=1e-4), rollout, settings(value_coef=0.0), seeded())
    with torch.no_grad():
        new = policy.score(rollout.query_ids, rollout.query_mask, rollout.response_ids, rollout.mask)
    gain = (new.logprobs - rollout.logprobs) * rollout.advantages
    assert gain[rollout.mask].mean() > 1e-4


def test_the_value_head_learns_the_returns():
    policy = tiny_policy("gpt2")
    config = settings(value_coef=1.0, clip_range_value=100.0, ppo_epochs=30)
    rollout = collect(policy, config).rollout
    rollout = replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    before = ppo.explained_variance(rollout.values, rollout.returns, rollout.mask)
    train.update(policy, torch.optim.Adam(policy.parameters(), lr=2e-3), rollout, config, seeded())
    with torch.no_grad():
        values = policy.score(rollout.query_ids, rollout.query_mask, rollout.response_ids, rollout.mask).values
    assert before < 0.2
    assert ppo.explained_variance(values, rollout.returns, rollout.mask) > 0.8


def test_the_entropy_bonus_is_subtracted_from_the_loss_and_raises_the_entropy():
    config = settings(value_coef=0.0)
    policy = tiny_policy("gpt2")
    collected = collect(policy, config)
    rollout = replace(collected.rollout, advantages=torch.zeros_like(collected.rollout.advantages))
    without, stats = step_of(policy, rollout, config)
    assert stats["loss"] == 0
    assert (without == 0).all()
    start = collected.stats["entropy"]
    _, stats = step_of(policy, rollout, replace(config, entropy_coef=0.3))
    assert_close(stats["loss"], -0.3 * start)
    with torch.no_grad():
        new = policy.score(rollout.query_ids, rollout.query_mask, rollout.response_ids, rollout.mask, 1.0, True)
    assert new.entropy[rollout.mask].mean().item() > start + 1e-4


@pytest.mark.parametrize("noise", ["symmetric", "none"])
def test_target_kl_ends_an_update_before_the_step(noise):
    """With ratios of exp(.5) and exp(-.5) on neighbouring tokens, k1 has mean 0; k3 is .128 = cosh .5 - 1, whatever
    the sign. A target of .05 allows 1.5 x .05, and a target of .1 allows 1.5 x .1."""
    policy = tiny_policy("gpt2")
    rollout = collect(policy, settings()).rollout
    queries = [getattr(rollout, field.name)[rollout.mask.sum(1) == 8] for field in fields(rollout)]
    rollout = ppo.Rollout(*queries)
    assert rollout.mask.all()
    sign = torch.tensor([1.0, -1.0] * 4).expand_as(rollout.logprobs)
    if noise == "symmetric":
        rollout = replace(rollout, logprobs=rollout.logprobs + 0.5 * sign)
    for target, goes_on in ((0.05, noise == "none"), (0.1, True), (0.0, True)):
        config = settings(target_kl=target, clip_range_value=10.0, ppo_epochs=3)
        step, stats = step_of(tiny_policy("gpt2"), rollout, config)
        assert (step.abs().max() > 1e-3) == goes_on
        if not goes_on:
            assert (step == 0).all()
            assert_close(stats["approx_kl_k1"], 0.0)
            assert_close(stats["approx_kl_k3"], 0.1276260)


def test_target_kl_keeps_the_steps_taken_before():
    """Stopped in the third minibatch: two steps, and the means of three minibatches' statistics."""
    policy, seen = tiny_policy("gpt2"), []
    rollout = collect(policy, settings()).rollout
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    real = train.minibatch_loss

    def drifting(*args):
        loss, stats = real(*args)
        seen.append("loss")
        return loss, stats | {"approx_kl_k3": 0.01 * seen.count("loss")}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "minibatch_loss", drifting)
        config = settings(mini_batch_size=4, ppo_epochs=4, target_kl=0.0199)
        stats = train.update(policy, optimizer, rollout, config, seeded())
    assert seen == ["loss", "step", "loss", "step", "loss"]
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert_close(stats["approx_kl_k3"], 0.02, atol=1e-9)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_pass_uses_every_row_once_in_a_new_order(accumulation, monkeypatch):
    policy = tiny_policy("gpt2")
    rollout = collect(policy, settings()).rollout
    seen, steps = [], []
    real = ppo.select_rows
    monkeypatch.setattr(ppo, "select_rows", lambda rollout, rows: (seen.append(rows.tolist()), real(rollout, rows))[1])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: steps.append(len(seen)))
    config = settings(mini_batch_size=4, gradient_accumulation_steps=accumulation, ppo_epochs=3)
    train.update(policy, optimizer, rollout, config, seeded())
    assert [len(rows) for rows in seen] == [4] * 12
    passes = [[row for rows in seen[i : i + 4] for row in rows] for i in (0, 4, 8)]
    assert all(sorted(order) == list(range(16)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    assert steps == list(range(accumulation, 13, accumulation))


def plain_update(policy: PolicyModel, rollout: ppo.Rollout, config: Config) -> None:
    """The update as one would first write it: whole minibatches, padding and all, autograd's own derivatives, Adam."""
    optimizer = torch.optim.Adam(policy.parameters(), config.learning_rate, eps=1e-5, fused=False, foreach=False)
    generator, rows_a_step = seeded(), config.mini_batch_size * config.gradient_accumulation_steps
    for _ in range(config.ppo_epochs):
        for rows in torch.randperm(len(rollout.scores), generator=generator).split(rows_a_step):
            part = ppo.Rollout(*(getattr(rollout, field.name)[rows] for field in fields(rollout)))
            mask, n = part.mask, part.mask.sum()
            inputs = model.causal_inputs(part.query_ids, part.query_mask, part.response_ids, mask, None)[0]
            output = policy.language_model(**inputs, output_hidden_states=True, use_cache=False)
            width = mask.shape[1]
            distribution = torch.log_softmax(output.logits[:, -width:], -1)
            logprobs = distribution.gather(-1, part.response_ids[..., None])[..., 0]
            values = policy.value_head(output.hidden_states[-1][:, -width:])[..., 0]
            ratio = torch.exp(torch.where(mask, logprobs - part.logprobs, 0.0))
            surrogate = torch.minimum(ratio * part.advantages, ratio.clamp(0.8, 1.2) * part.advantages)
            near = part.values + (values - part.values).clamp(-0.2, 0.2)
            errors = torch.maximum((values - part.returns) ** 2, (near - part.returns) ** 2)
            entropy = -(distribution.exp() * distribution).sum(-1)
            losses = -surrogate + config.value_coef * errors / 2 - config.entropy_coef * entropy
            optimizer.zero_grad()
            (torch.where(mask, losses, 0.0).sum() / n).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm, foreach=False)
            optimizer.step()


def ragged_rollout(policy: PolicyModel) -> ppo.Rollout:
    """64 rows of 1 to 40 tokens, as a policy not far from this one would have drawn them."""
    query = pad(QUERIES * 16, PAD, "left")
    mask = torch.arange(40) < torch.randint(1, 41, (64, 1), generator=seeded(1))
    response_ids = torch.randint(2, 11, (64, 40), generator=seeded(2))
    scores = model.score_rows(policy, *query, response_ids, mask, 64)
    advantages, noise = (torch.randn(64, 40, generator=seeded(seed)) for seed in (3, 5))
    others = {name: torch.zeros(64, 40) for name in ("kl", "rewards", "ref_logprobs")} | {"scores": torch.zeros(64)}
    tensors = {"logprobs": scores.logprobs, "values": scores.values, "advantages": advantages, "returns": noise}
    return moved(ppo.Rollout(*query, response_ids, mask, **tensors, **others))


@pytest.mark.parametrize("precision", ["highest", "auto"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_equals_the_plain_one(accumulation, precision, tmp_path):
    """Rows in passes of like length, a sparse gradient of the embedding, a gradient written in place, fused Adam, the
    matrix products and the attention that go with the precision; the plain one always has torch's own defaults."""
    save_policy(tiny_policy("gpt2"), letter_tokenizer(), tmp_path)
    size = {"batch_size": 64, "mini_batch_size": 32 // accumulation, "gradient_accumulation_steps": accumulation}
    config = settings(**size, ppo_epochs=2, entropy_coef=0.1, max_grad_norm=1.0, learning_rate=1e-3)
    ours, plain = (load_policy(config, str(tmp_path), torch.device("cpu")) for _ in range(2))
    assert ours.language_model.get_input_embeddings().sparse
    plain.language_model.get_input_embeddings().sparse = False
    rollout, start = ragged_rollout(ours), weights(ours)
    first = torch.randperm(64, generator=seeded())[:32]
    assert len(model.length_groups(rollout.mask.sum(1)[first].tolist(), 32 // accumulation)) == 2
    optimizer = torch.optim.Adam(ours.parameters(), 1e-3, eps=1e-5, fused=True)
    prepare_device(Config(device="cpu", matmul_precision=precision))
    train.update(ours, optimizer, rollout, config, seeded())
    prepare_device(Config(device="cpu", matmul_precision="highest"))
    plain_update(plain, rollout, config)
    change = weights(plain) - start
    assert change.norm() > 0.1
    assert (weights(ours) - weights(plain)).norm() < 1e-5 * weights(plain).norm()
    assert (weights(ours) - weights(plain)).norm() < 1e-3 * change.norm()


def test_gradients_are_clipped_as_one_vector_once_a_step():
    policy = tiny_policy("gpt2")
    rollout = collect(policy, settings()).rollout
    free, _ = gradient_of(tiny_policy("gpt2"), rollout, settings())
    assert free.norm() > 0.2
    for accumulation in (1, 4):
        config = settings(
            max_grad_norm=0.1, mini_batch_size=16 // accumulation, gradient_accumulation_steps=accumulation
        )
        clipped, _ = gradient_of(tiny_policy("gpt2"), rollout, config)
        assert_close(clipped.norm(), 0.1)
        assert_close(clipped, free * 0.1 / free.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_finite_whatever_stands_beyond_the_mask(family):
    """Padding columns full of NaN, infinities and other tokens: the same step and the same statistics."""
    rollout = moved(collect(tiny_policy(family), settings()).rollout)
    step, stats = gradient_of(tiny_policy(family), rollout, settings(entropy_coef=0.1))
    dirty, dirty_stats = gradient_of(tiny_policy(family), widened(rollout), settings(entropy_coef=0.1))
    assert step.isfinite().all()
    assert_close(dirty / step.abs().max(), step / step.abs().max())
    for name, value in stats.items():
        assert abs(dirty_stats[name] - value) < 1e-5, name


def widened(rollout: ppo.Rollout) -> ppo.Rollout:
    """Three more columns behind the responses, and everything beyond the mask changed, except where it must be 0."""
    mask = torch.nn.functional.pad(rollout.mask, (0, 3))
    junk = {"response_ids": 7, "logprobs": 50.0, "ref_logprobs": float("nan"), "values": float("inf")}
    junk |= {"advantages": float("nan"), "returns": -1e9, "kl": 0.0, "rewards": 0.0}
    wide = {
        name: torch.where(mask, torch.nn.functional.pad(getattr(rollout, name), (0, 3)), value)
        for name, value in junk.items()
    }
    return replace(rollout, mask=mask, **wide)


def test_statistics_do_not_see_padding():
    """Three more columns of anything behind the responses leave every number of the log as it was."""
    collected = collect(other_policy("gpt2"), settings(), frozen_copy(tiny_policy("gpt2")))
    rollout, wide = collected.rollout, widened(collected.rollout)
    texts = (collected.terms, collected.rewards, collected.responses)
    before, after = (rollout_stats(r, *texts) for r in (rollout, wide))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert {"explained_variance", "ref_perplexity"} <= before.keys()


def test_statistics_of_an_update_are_means_over_its_minibatches():
    parts = [{"loss": 1.0, "ratio_min": 0.5, "ratio_max": 1.5}, {"loss": 4.0, "ratio_min": 0.7, "ratio_max": 1.2}]
    assert train.combine(parts, statistics.fmean) == {"loss": 2.5, "ratio_min": 0.5, "ratio_max": 1.5}
    assert train.combine(parts, sum) == {"loss": 5.0, "ratio_min": 0.5, "ratio_max": 1.5}


# ----------------------------------------------------------------------------------------------------------------
# Updates in a row
# ----------------------------------------------------------------------------------------------------------------


def test_the_learning_rate_falls_linearly_and_starts_full():
    config = settings(n_updates=4, learning_rate=2.0)
    assert [train.learning_rate(config, step) for step in range(4)] == [2.0, 1.5, 1.0, 0.5]


def run(tmp_path, config: Config, policy: PolicyModel | None = None, n_prompts: int = 4, term=count_a) -> list[dict]:
    """`run_updates` with its batches drawn in turn; the rows of training_stats.json."""
    policy = policy or PolicyModel(tiny_gpt2())
    prompts = prompts_of((QUERIES * n_prompts)[:n_prompts])
    batches = train.prompt_batches(prompts, config.batch_size, seeded())
    train.run_updates(models_of(policy, letter=term), batches, [], config, seeded(), tmp_path)
    return json.loads((tmp_path / "training_stats.json").read_text())


def test_a_runs_steps_use_the_learning_rate_of_their_update(tmp_path, monkeypatch):
    used, real = [], train.update

    def spy(policy, optimizer, *args):
        used.append([optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["eps"]])
        return real(policy, optimizer, *args)

    monkeypatch.setattr(train, "update", spy)
    rows = run(tmp_path, settings(n_updates=4, learning_rate=1e-3, batch_size=4, mini_batch_size=4))
    assert used == [[1e-3, 1e-5], [0.75e-3, 1e-5], [0.5e-3, 1e-5], [0.25e-3, 1e-5]]
    assert [row["learning_rate"] for row in rows] == [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]


def test_a_run_logs_every_response(tmp_path):
    config = settings(n_updates=2, batch_size=4, mini_batch_size=4)
    rows = run(tmp_path, config)
    lines = (tmp_path / "training_log.csv").read_text().splitlines()
    assert lines[0] == "step,query,response,reward,reward_letter"
    cells = [line.split(",") for line in lines[1:]]
    assert [cell[0] for cell in cells] == ["0"] * 4 + ["1"] * 4
    for step in (0, 1):
        own = [cell for cell in cells if cell[0] == str(step)]
        assert sorted(cell[1] for cell in own) == ["aai", "cf", "dbgah", "e"]
        assert all(float(cell[3]) == float(cell[4]) == cell[2].count("a") for cell in own)
        assert_close(rows[step]["reward"], sum(float(cell[3]) for cell in own) / 4)
    timings = json.loads((tmp_path / "timings.json").read_text())
    assert [timing["step"] for timing in timings] == [0, 1]
    assert all(timing["tokens_per_second"] > 0 for timing in timings)


def test_a_run_normalises_by_all_scores_so_far(tmp_path):
    """The mean score of a step, from every raw reward logged up to it; the first rollout's own mean is therefore 0."""
    config = settings(n_updates=3, batch_size=4, mini_batch_size=4, learning_rate=3e-3, normalize_scores=True)
    rows = run(tmp_path, config)
    logged = [line.split(",") for line in (tmp_path / "training_log.csv").read_text().splitlines()[1:]]
    rewards = [float(cells[3]) for cells in logged]
    for step, row in enumerate(rows):
        so_far = rewards[: 4 * step + 4]
        wanted = (statistics.mean(so_far[-4:]) - statistics.mean(so_far)) / statistics.stdev(so_far)
        assert_close(row["score"], wanted)
        assert_close(row["reward"], statistics.mean(so_far[-4:]))
    assert abs(rows[0]["score"]) < 1e-6 < abs(rows[1]["score"]) + abs(rows[2]["score"])


def test_an_alarm_is_logged_at_every_step_and_printed_at_its_first(tmp_path, monkeypatch, capsys):
    """Two kinds, of which one comes and goes: the log has both wherever they are, and the bar says each once."""
    script = [{}, {"length": "too short"}, {}, {"length": "shorter", "ended": "cut"}, {"ended": "cut off"}]
    seen = []

    def alarms(history: list[dict], batch_size: int) -> dict[str, str]:
        seen.append([row["step"] for row in history])
        assert batch_size == 4
        assert {
            "reward",
            "variance",
            "response_length",
            "distinct_bigrams",
            "ended",
            "ref_perplexity",
        } <= history[-1].keys()
        return script[len(history) - 1]

    monkeypatch.setattr(report, "alarms", alarms)
    rows = run(tmp_path, settings(n_updates=5, batch_size=4, mini_batch_size=4))
    assert [row["alarms"] for row in rows] == [[], ["too short"], [], ["shorter", "cut"], ["cut off"]]
    assert seen == [list(range(n)) for n in (1, 2, 3, 4, 5)]
    said = [line for line in capsys.readouterr().out.splitlines() if line]
    assert said == ["alarm at update 1: too short", "alarm at update 3: cut"]


def few_letters(prompts, responses, rows) -> torch.Tensor:
    return -torch.tensor([float(len(response)) for response in responses])


def test_a_policy_that_falls_silent_for_its_reward_is_told_on(tmp_path, monkeypatch, capsys):
    """A point lost for every letter and no price of KL: a letter or none is left of five, and the alarm says so."""
    without_shape_checks(monkeypatch)
    options = {"learning_rate": 3e-3, "ppo_epochs": 4, "batch_size": 32, "mini_batch_size": 16, "max_grad_norm": 1}
    monkeypatch.setattr(report, "WINDOW", 64)
    config = settings(n_updates=8, kl_coef=0.0, **options)
    rows = run(tmp_path, config, n_prompts=32, term=few_letters)
    lengths = [row["response_length"] for row in rows]
    latest = [(a + b) / 2 for a, b in itertools.pairwise(lengths)]
    alarmed = [row["step"] for row in rows if any("mean length in tokens" in text for text in row["alarms"])]
    assert alarmed == [step for step in range(3, 8) if latest[step - 1] < latest[0] / 2] != []
    said = capsys.readouterr().out
    assert said.count("the mean length in tokens went from") == 1
    assert f"alarm at update {alarmed[0]}: the reward rose from" in said


def test_the_same_reward_at_a_price_of_kl_raises_no_alarm(tmp_path, monkeypatch, capsys):
    without_shape_checks(monkeypatch)
    options = {"learning_rate": 3e-3, "ppo_epochs": 4, "batch_size": 32, "mini_batch_size": 16, "max_grad_norm": 1}
    monkeypatch.setattr(report, "WINDOW", 64)
    config = settings(n_updates=8, kl_coef=5.0, **options)
    rows = run(tmp_path, config, n_prompts=32, term=few_letters)
    assert [row["alarms"] for row in rows] == [[]] * 8
    assert rows[-1]["reward"] > rows[0]["reward"]
    assert "alarm" not in capsys.readouterr().out


def test_two_equal_runs_are_equal(tmp_path):
    """Same seeds, same weights and log; the timings are kept apart."""
    logs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        policy = PolicyModel(tiny_gpt2())
        logs.append((run(folder, settings(n_updates=3, learning_rate=1e-3), policy), weights(policy)))
    assert logs[0][0] == logs[1][0]
    assert torch.equal(logs[0][1], logs[1][1])
    assert not torch.equal(logs[0][1], weights(PolicyModel(tiny_gpt2())))


def test_a_kl_target_adapts_the_coefficient_from_the_next_update_on(tmp_path):
    """β is multiplied by 1 + 16 e / 160: with KL 0 in the first rollout, e = -.2, so by .98."""
    rows = run(tmp_path, settings(n_updates=3, kl_coef=0.1, kl_target=1.0, kl_horizon=160, learning_rate=1e-9))
    assert_close([row["kl_coef"] for row in rows], [0.1, 0.098, 0.09604], atol=1e-9)


def test_a_kl_target_reads_k3_which_is_never_negative(tmp_path, monkeypatch):
    seen, real = [], ppo.adapt_kl_coef
    monkeypatch.setattr(ppo, "adapt_kl_coef", lambda kl_coef, kl, *args: (seen.append(kl), real(kl_coef, kl, *args))[1])
    rows = run(tmp_path, settings(n_updates=3, kl_target=1.0, learning_rate=3e-3, kl_estimator="abs"))
    assert seen == [row["kl_k3"] for row in rows]
    assert all(abs(rows[-1]["kl_k3"] - rows[-1][name]) > 1e-3 for name in ("kl", "kl_k1"))


def test_a_run_whose_sampler_and_scorer_disagree_stops_before_the_first_update(tmp_path, monkeypatch):
    """The sampler at another temperature than the scorer; nothing has been trained or written then."""
    real = generate.sampling_options
    monkeypatch.setattr(generate, "sampling_options", lambda config: real(config) | {"temperature": 0.5})
    policy = PolicyModel(tiny_gpt2())
    start = weights(policy)
    with pytest.raises(RunError, match="sampling and scoring disagree"):
        run(tmp_path, settings(), policy)
    assert torch.equal(weights(policy), start)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    def infinite(prompts, responses, rows) -> torch.Tensor:
        return torch.full((len(responses),), float("inf"))

    with pytest.raises(RunError, match="the loss is nan at update 0; try a lower --learning_rate"):
        run(tmp_path, settings(), term=infinite)


@pytest.mark.parametrize(
    "family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow), pytest.param("t5", marks=pytest.mark.slow)]
)
def test_the_reward_of_a_small_model_rises(family, tmp_path, monkeypatch):
    """A point for every letter a, of which there are few at first: most of the eight tokens, a few updates later."""
    without_shape_checks(monkeypatch)
    config = settings(
        n_updates=10, learning_rate=3e-3, ppo_epochs=4, batch_size=32, mini_batch_size=16, kl_coef=0.01, max_grad_norm=1
    )
    rows = run(tmp_path, config, PolicyModel(BUILDERS[family]()), n_prompts=32)
    assert rows[0]["reward"] < 2
    assert rows[-1]["reward"] > 4
    assert rows[-1]["kl_k3"] > 0.5


# ----------------------------------------------------------------------------------------------------------------
# End to end: the optimum of the KL-regularised objective, π* ∝ ρ exp(s / β), is known exactly
# ----------------------------------------------------------------------------------------------------------------

LETTERS, LONGEST, BETA = 8, 3, 0.5
TASK_PROMPTS = [[5, 3, 6], [2, 4]]  # of different lengths, so that one is padded


def every_response() -> list[list[int]]:
    """All 1 + 7 + 49 that end, and the 343 that are cut off at three tokens."""
    others = [token for token in range(LETTERS) if token != EOS]
    ended = [[*body, EOS] for n in range(LONGEST) for body in itertools.product(others, repeat=n)]
    return ended + [list(body) for body in itertools.product(others, repeat=LONGEST)]


RESPONSES = every_response()


def task_score(prompts: list[str], responses: list[str], rows: list[dict]) -> torch.Tensor:
    """Token 7 (f) is worth 1, token 3 (b) costs .5, token 4 (c) is worth .3."""
    return torch.tensor([text.count("f") - 0.5 * text.count("b") + 0.3 * text.count("c") for text in responses])


@torch.no_grad()
def log_probability(policy: PolicyModel) -> torch.Tensor:
    """log π(y | x) of every prompt and every response that there is."""
    query_ids, query_mask = pad(TASK_PROMPTS, PAD, "right" if policy.is_encoder_decoder else "left")
    ids, mask = pad(RESPONSES, PAD, "right")
    rows = []
    for i in range(len(TASK_PROMPTS)):
        logprobs = policy.score(query_ids[[i] * 400], query_mask[[i] * 400], ids, mask).logprobs
        rows.append(torch.where(mask, logprobs, 0.0).double().sum(1))
    return torch.stack(rows)


def optimum(reference: PolicyModel) -> torch.Tensor:
    """log π*(y | x), with the score less 1 for a response without EOS."""
    tokenizer = letter_tokenizer(LETTERS)
    texts = [tokenizer.decode(response, skip_special_tokens=True) for response in RESPONSES]
    penalty = torch.tensor([float(EOS not in response) for response in RESPONSES])
    return (log_probability(reference) + (task_score([], texts, []) - penalty) / BETA).log_softmax(1)


@dataclass
class Distances:
    """KL(π || π*) per prompt, in nats over whole responses: before and after training."""

    start: list[float]
    end: list[float]


def critic_of(language_model, kind: str):
    """A trunk of the critic's own with the language model's weights, as `loading.load_critic` makes it, or None."""
    if kind == "shared":
        return None
    if kind == "encoder":
        return copy.deepcopy(language_model.get_encoder())
    trunk = AutoModel.from_config(language_model.config)
    own = {name.removeprefix("transformer."): weights for name, weights in language_model.state_dict().items()}
    trunk.load_state_dict({name: own[name] for name in trunk.state_dict()})
    return trunk


def distances_after_training(family: str, n_updates: int, learning_rate: float, seed: int = 0, **options) -> Distances:
    """Run collect_rollout and update n_updates times on 64 copies of each prompt."""
    config = Config(
        **{
            "batch_size": 128,
            "mini_batch_size": 32,
            "ppo_epochs": 4,
            "n_updates": n_updates,
            "learning_rate": learning_rate,
            "kl_coef": BETA,
            "max_new_tokens": LONGEST,
            "missing_eos_penalty": 1.0,
            "whiten_advantages": False,
            **options,
        }
    )
    language_model = BUILDERS[family](vocab_size=LETTERS)
    policy = PolicyModel(language_model, critic_of(language_model, config.critic), config.critic)
    reference, tokenizer = frozen_copy(policy), letter_tokenizer(LETTERS)
    models = train.Models(policy, reference, tokenizer, {"task": task_score})
    prompts = [Prompt(tokenizer.decode(ids), ids, {}) for ids in TASK_PROMPTS] * 64
    best, generator = optimum(reference), seeded(seed)

    def distance() -> list[float]:
        log_pi = log_probability(policy)
        assert_close(log_pi.exp().sum(1), torch.ones(2, dtype=torch.float64))
        return (log_pi.exp() * (log_pi - best)).sum(1).tolist()

    start = distance()
    optimizer = torch.optim.Adam(policy.parameters(), learning_rate, eps=1e-5, fused=True)
    for step in range(n_updates):
        rollout = train.collect_rollout(models, prompts, config, BETA, generator).rollout
        optimizer.param_groups[0]["lr"] = train.learning_rate(config, step)
        train.update(policy, optimizer, rollout, config, generator)
    return Distances(start, distance())


def test_there_are_four_hundred_responses():
    assert len(RESPONSES) == len({tuple(response) for response in RESPONSES}) == 400


def test_ppo_finds_the_optimum_of_a_small_task(monkeypatch):
    """A random GPT-2 on two prompts: the whole path, from sampling to the optimizer's step, comes within .03 nats."""
    without_shape_checks(monkeypatch)
    distances = distances_after_training("gpt2", n_updates=60, learning_rate=1.5e-3)
    assert min(distances.start) > 0.5
    assert max(distances.end) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", FAMILIES)
def test_ppo_finds_the_optimum_with_every_family(family, seed, monkeypatch):
    without_shape_checks(monkeypatch)
    distances = distances_after_training(family, n_updates=120, learning_rate=1e-3, seed=seed)
    assert min(distances.start) > 0.5
    assert max(distances.end) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("family", "critic", "lam"), [("gpt2", "separate", 0.95), ("t5", "separate", 0.95), ("t5", "encoder", 1.0)]
)
def test_ppo_finds_the_optimum_with_a_critic_of_its_own(family, critic, lam, seed, monkeypatch):
    """A baseline of the prompt alone leaves more variance: it comes within .05 nats, one that reads on within .03."""
    without_shape_checks(monkeypatch)
    distances = distances_after_training(family, 120, 1e-3, seed=seed, critic=critic, lam=lam)
    assert min(distances.start) > 0.5
    assert max(distances.end) < (0.05 if critic == "encoder" else 0.03)


def drop_the_end(real):
    """A loss that does not train the EOS token."""

    def loss(policy, rows, *args):
        return real(policy, replace(rows, mask=rows.mask & (rows.response_ids != EOS)), *args)

    return loss


def shift_values(real):
    """Advantages that take a token's value from the state after it."""

    def advantages(rewards, values, mask, *args):
        later = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
        return real(rewards, torch.where(mask.roll(-1, 1), later, 0.0), mask, *args)

    return advantages


ERRORS = {
    "KL with the wrong sign": (ppo, "kl_estimate", lambda real: lambda *args: -real(*args)),
    "k3 in the reward": (ppo, "kl_estimate", lambda real: lambda p, q, mask, _: real(p, q, mask, "k3")),
    "no KL": (ppo, "kl_estimate", lambda real: lambda *args: 0 * real(*args)),
    "value of the state after the token": (ppo, "estimate_advantages", shift_values),
    "advantages with the wrong sign": (ppo, "estimate_advantages", lambda real: lambda *args: -real(*args)),
    "EOS not trained": (train, "minibatch_loss", drop_the_end),
    "sampling at another temperature": (
        generate,
        "sampling_options",
        lambda real: lambda config: real(config) | {"temperature": 0.5},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS)
def test_ppo_misses_the_optimum_with_an_error(error, monkeypatch):
    """The same run as the one that comes within .03 nats, with one mistake put in."""
    without_shape_checks(monkeypatch)
    module, name, mistake = ERRORS[error]
    monkeypatch.setattr(module, name, mistake(getattr(module, name)))
    assert max(distances_after_training("gpt2", n_updates=60, learning_rate=1.5e-3).end) > 0.05
