"""PPO itself: what a rollout holds, what a minibatch's loss is, what an update does, and what `train` makes of them."""

import copy
import inspect
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from helpers import assert_close
from tiny_models import BUILDERS, EOS, FAMILIES, PAD, letter_tokenizer, tiny_gpt2, tiny_policy
from torch.nn.functional import pad as widen

import generate
import model
import ppo
import train
from config import Config
from dataset import pad
from device import prepare_device
from evaluation import evaluate_policy
from loading import new_policy, save_policy
from model import PolicyModel, frozen_copy
from prompts import Prompt, batch_arithmetic, batch_of
from randomness import permutation, uniforms
from report import rollout_stats
from train import Fixed, Minibatch, Rollout, State, new_state

QUERIES = [[5, 3, 8, 2, 9], [4, 7], [6], [2, 2, 10]]
NOT_AT_ALL = 1e-30  # a learning rate: no weight but 0 is moved by it


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def settings(**overrides) -> Config:
    small = {
        "batch_size": 16,
        "mini_batch_size": 16,
        "ppo_epochs": 1,
        "max_new_tokens": 8,
        "max_grad_norm": 1e9,
        "n_updates": 1,
        "learning_rate": NOT_AT_ALL,
    }
    return Config(**(small | overrides))


def prompts_of(queries: list[list[int]]) -> list[Prompt]:
    tokenizer = letter_tokenizer(40)
    return [Prompt(tokenizer.decode(ids), ids, {"number": i}) for i, ids in enumerate(queries)]


def count_a(prompts: list[str], responses: list[str], rows: list[dict]) -> torch.Tensor:
    return torch.tensor([float(response.count("a")) for response in responses])


def fixed_for(policy: PolicyModel, **terms) -> Fixed:
    """The policy as it is for a reference, letters for tokens, and a point for every a where no term is given."""
    return Fixed(reference=frozen_copy(policy), tokenizer=letter_tokenizer(), terms=terms or {"a": count_a})


def other_policy(family: str) -> PolicyModel:
    """A policy some way from `tiny_policy(family)`, so that a KL between the two is not 0."""
    policy = tiny_policy(family)
    generator = seeded(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return policy


def train_all(
    policy: PolicyModel, config: Config, fixed: Fixed | None = None, state: State | None = None, n_prompts: int = 4
) -> tuple[State, list[tuple[Rollout, dict]]]:
    """The state after all updates, and each update's rollout and statistics."""
    prompts = prompts_of((QUERIES * n_prompts)[:n_prompts])
    state = state or new_state(policy, config)
    return state, list(train.train(state, fixed or fixed_for(policy), prompts, config))


def first_rollout(policy: PolicyModel, config: Config, reference: PolicyModel | None = None) -> Rollout:
    """A rollout as the first update has it; the policy stays as it is."""
    fixed = fixed_for(policy)._replace(reference=reference or frozen_copy(policy))
    _, [(rollout, _), *_] = train_all(copy.deepcopy(policy), config, fixed)
    return rollout


def tensors_of(rollout: Rollout) -> dict[str, torch.Tensor]:
    everything = {field.name: getattr(rollout, field.name) for field in fields(rollout)}
    return {name: value for name, value in everything.items() if torch.is_tensor(value)}


def inputs_of(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return rollout.query_ids, rollout.query_mask, rollout.response_ids, rollout.mask


# ----------------------------------------------------------------------------------------------------------------
# A rollout
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollout_carries_no_gradient_and_no_hole(family):
    rollout = first_rollout(other_policy(family).train(), settings(mini_batch_size=4), frozen_copy(tiny_policy(family)))
    assert len(tensors_of(rollout)) == 16
    for name, tensor in tensors_of(rollout).items():
        assert not tensor.requires_grad, name
        assert len(tensor) == 16, name
        assert tensor.isfinite().all(), name
    lengths = rollout.mask.sum(1)
    assert lengths.min() < 4
    assert lengths.max() == 8
    for name in ("kl", "rewards", "advantages", "returns"):
        assert (getattr(rollout, name)[~rollout.mask] == 0).all()


def test_collecting_leaves_the_policy_in_the_mode_that_it_had():
    for training in (True, False):
        policy = tiny_policy("gpt2").train(training)
        train.collect_rollout(
            policy, fixed_for(policy), prompts_of(QUERIES), settings(batch_size=4, mini_batch_size=4), 0
        )
        assert policy.training == policy.language_model.training == training


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rollouts_numbers_are_those_of_policy_and_reference(family):
    """All rows scored at once, at the sampling temperature; the rollout scored them in forward passes of four."""
    policy, reference = other_policy(family), frozen_copy(tiny_policy(family))
    rollout = first_rollout(policy, settings(mini_batch_size=4, temperature=0.7), reference)
    with torch.no_grad():
        own = policy.score(*inputs_of(rollout), 0.7, with_entropy=True)
        theirs = reference.score(*inputs_of(rollout), 0.7)
    mask = rollout.mask
    assert_close(rollout.logprobs[mask], own.logprobs[mask], atol=3e-5)
    assert_close(rollout.values[mask], own.values[mask], atol=3e-5)
    assert_close(rollout.entropy[mask], own.entropy[mask], atol=3e-5)
    assert_close(rollout.ref_logprobs[mask], theirs.logprobs[mask], atol=3e-5)
    assert_close(rollout.kl[mask], (rollout.logprobs - rollout.ref_logprobs)[mask], atol=0)
    assert rollout.kl.sum(1).mean() > 0.05
    assert torch.equal(mask, ppo.response_mask(rollout.response_ids, EOS))


def test_what_is_stored_is_what_an_update_computes_and_not_what_the_sampler_says(monkeypatch):
    """A sampler that rounds is .3 nats off on every token, as one in few bits may be: the ratio is still 1."""
    real = train.respond

    def off(*args):
        drawn = real(*args)
        return drawn._replace(logprobs=drawn.logprobs - 0.3)

    monkeypatch.setattr(train, "respond", off)
    policy = tiny_policy("gpt2")
    _, [(rollout, stats)] = train_all(policy, settings())
    with torch.no_grad():
        again = policy.score(*inputs_of(rollout)).logprobs
    assert_close([stats["ratio_min"], stats["ratio_max"]], [1.0, 1.0])
    assert_close(rollout.logprobs[rollout.mask], again[rollout.mask])
    assert_close((rollout.logprobs - rollout.sampled_logprobs)[rollout.mask].mean(), 0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_of_a_row_sum_to_its_score_less_the_price_of_its_kl(family):
    """Row by row, in plain Python: -β k_t on every token, the score on the last real one, GAE, whitening over all."""
    config = settings(kl_coef=0.3, missing_eos_penalty=0.7, lam=0.9, gamma=0.95)
    rollout = first_rollout(other_policy(family), config, frozen_copy(tiny_policy(family)))
    raw = []
    ids, lengths = rollout.response_ids.tolist(), rollout.mask.sum(1).tolist()
    for i, n in enumerate(lengths):
        response = ids[i][:n]
        assert EOS not in response[:-1]
        text = "".join("..abcdefghi"[token] for token in response if token > EOS)
        assert rollout.texts[i] == text
        assert rollout.raw_scores[i].item() == rollout.term_scores["a"][i].item() == text.count("a")
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


def test_a_rollout_draws_by_the_seed_and_the_number_of_its_update():
    policy, before = tiny_policy("gpt2"), time.perf_counter()
    rollout = train.collect_rollout(policy, fixed_for(policy), prompts_of(QUERIES), settings(seed=5), 7)
    assert before < rollout.collected_at < time.perf_counter()
    query_ids, query_mask = pad(QUERIES, PAD, "left")
    expected = generate.sample(policy, query_ids, query_mask, uniforms(5, "sampling", 7, (4, 8)), [EOS], PAD)
    assert torch.equal(rollout.response_ids, expected.response_ids)


def test_a_pad_token_that_is_the_eos_token_ends_no_response():
    """Padding made of EOS stands behind ended responses alone; one that was cut has none."""
    tokenizer = letter_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    policy = tiny_policy("gpt2")
    fixed, prompts = fixed_for(policy), prompts_of(QUERIES * 4)
    expected = train.collect_rollout(policy, fixed, prompts, settings(), 0).has_eos
    rollout = train.collect_rollout(policy, fixed._replace(tokenizer=tokenizer), prompts, settings(), 0)
    assert torch.equal(rollout.has_eos, expected)
    assert {True, False} == set(expected.tolist())


def test_entropy_is_worked_out_in_an_update_only_where_there_is_a_bonus_for_it(monkeypatch):
    rollout, seen, real = first_rollout(tiny_policy("gpt2"), settings()), [], model.thin_entropy
    monkeypatch.setattr(model, "thin_entropy", lambda logits: (seen.append(len(logits)), real(logits))[1])
    gradient_of(tiny_policy("gpt2"), rollout, settings())
    assert seen == []
    gradient_of(tiny_policy("gpt2"), rollout, settings(entropy_coef=0.1))
    assert sum(seen) == 16


def test_without_whitening_advantages_are_those_of_gae():
    rollout = first_rollout(other_policy("gpt2"), settings(whiten_advantages=False))
    plain = ppo.estimate_advantages(rollout.rewards, rollout.values, rollout.mask, 1.0, 0.95)
    assert torch.equal(rollout.advantages, plain)
    assert_close(rollout.returns[rollout.mask], (plain + rollout.values)[rollout.mask], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_before_any_update_the_kl_is_zero_and_the_ratio_one(family):
    policy = tiny_policy(family)
    _, [(rollout, stats)] = train_all(policy, settings(kl_coef=0.5, mini_batch_size=4))
    assert (rollout.kl == 0).all()
    figures = rollout_stats(rollout)
    assert figures["kl"] == figures["kl_k1"] == figures["kl_k3"] == 0
    assert_close(rollout.rewards.sum(1), rollout.scores, atol=0)
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

    config = settings(batch_size=4, mini_batch_size=4, reward_weights="first=2,second=-0.5")
    fixed = fixed_for(policy, first=term, second=count_a)
    rollout = train.collect_rollout(policy, fixed, prompts_of(QUERIES), config, 0)
    assert seen == [(["dbgah", "cf", "e", "aai"], rollout.texts, [{"number": i} for i in range(4)])]
    counts = torch.tensor([response.count("a") for response in rollout.texts])
    assert_close(rollout.raw_scores, 2 * torch.arange(4.0) - 0.5 * counts, atol=1e-6)
    assert_close(rollout.term_scores["first"], torch.arange(4.0), atol=0)
    assert_close(rollout.term_scores["second"], counts, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_rollouts_penalised_scores_are_added_to_the_moments_and_normalised_by_them(normalize):
    """Sixteen scores, less .7 without an EOS, to two of 2 and 6 (μ = 4, S = 8); statistics in plain Python."""
    config = settings(missing_eos_penalty=0.7, normalize_scores=normalize)
    policy = other_policy("gpt2")
    state = replace(new_state(policy, config), moments=ppo.Moments(2, 4.0, 8.0))
    state, [(rollout, _)] = train_all(policy, config, state=state)
    ended = ((rollout.response_ids == EOS) & rollout.mask).any(1).tolist()
    scores = [x - 0.7 * (not end) for x, end in zip(rollout.raw_scores.tolist(), ended, strict=True)]
    assert {True, False} == set(ended) and len(set(scores)) > 2
    every = [2.0, 6.0, *scores]
    n, mean, squares = state.moments
    assert n == 18
    assert_close(mean, statistics.mean(every))
    assert_close((squares / 17) ** 0.5, statistics.stdev(every))
    wanted = [(x - statistics.mean(every)) / statistics.stdev(every) for x in scores] if normalize else scores
    assert_close(rollout.scores, torch.tensor(wanted))
    assert_close(rollout.rewards.sum(1), torch.tensor(wanted))  # the KL to the policy's own copy is 0


def test_nothing_in_a_rollout_is_changed_by_its_update_or_shares_memory(monkeypatch):
    """Rewards built in place on the KL, or values written over, would corrupt what is logged and trained on next."""
    before, real = {}, train.update

    def watched(policy, optimizer, rollout, *args):
        before.update({name: tensor.clone() for name, tensor in tensors_of(rollout).items()})
        return real(policy, optimizer, rollout, *args)

    monkeypatch.setattr(train, "update", watched)
    config = settings(ppo_epochs=3, mini_batch_size=4, learning_rate=1e-2, entropy_coef=0.1, whiten_advantages=False)
    policy = other_policy("gpt2")
    state, [(rollout, _)] = train_all(policy, config, fixed_for(tiny_policy("gpt2")))
    assert state.optimizer.state
    tensors = tensors_of(rollout)
    assert tensors.keys() == before.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name]), name
    owners = [*tensors.values(), *policy.parameters()]
    owners += [moment for own in state.optimizer.state.values() for moment in own.values()]
    places = [tensor.untyped_storage().data_ptr() for tensor in owners]
    assert len(set(places)) == len(places)


# ----------------------------------------------------------------------------------------------------------------
# Minibatches
# ----------------------------------------------------------------------------------------------------------------


def numbered_rollout(query_mask) -> Rollout:
    """Four responses of lengths 2, 4, 1, 3; all elements of all tensors are different numbers, so none is mistaken."""
    query_mask = torch.tensor(query_mask, dtype=torch.bool)
    mask = torch.arange(5) < torch.tensor([2, 4, 1, 3])[:, None]
    start, values = 1, {}
    for name, tensor in tensors_of(first_rollout(tiny_policy("gpt2"), settings())).items():
        shape = query_mask.shape if name.startswith("query") else mask.shape
        shape = shape[:1] if tensor.dim() == 1 else shape
        if tensor.dtype == torch.bool:
            continue
        values[name] = torch.arange(start, start + math.prod(shape), dtype=tensor.dtype).view(shape)
        start += math.prod(shape)
    values |= {"query_mask": query_mask, "mask": mask, "has_eos": mask[:, 0]}
    return Rollout(**values, prompts=[], texts=[], term_scores={}, collected_at=0.0)


LEFT_PADDED = [[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
RIGHT_PADDED = [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("query_mask", "rows", "query_columns", "length"),
    [
        (LEFT_PADDED, [2, 0], [2, 3], 2),
        (LEFT_PADDED, [0, 3], [3], 3),
        (LEFT_PADDED, [3, 1, 0, 2], [1, 2, 3], 4),
        (RIGHT_PADDED, [2, 0], [0, 1], 2),
        (RIGHT_PADDED, [2], [0, 1], 1),
        (RIGHT_PADDED, [1, 1, 3], [0, 1, 2], 4),
    ],
)
def test_select_rows_takes_rows_in_order_and_drops_columns_of_padding(query_mask, rows, query_columns, length):
    """Worked by hand, for prompts padded on either side."""
    rollout = numbered_rollout(query_mask)
    minibatch = train.select_rows(rollout, torch.tensor(rows))
    for name, cut in minibatch._asdict().items():
        whole = getattr(rollout, name.removeprefix("old_"))
        columns = query_columns if name.startswith("query") else range(length)
        assert cut.tolist() == [[whole[row, column].item() for column in columns] for row in rows], name
        assert cut.dtype == whole.dtype, name


def test_a_rollout_cannot_be_changed():
    rollout = numbered_rollout(LEFT_PADDED)
    with pytest.raises(AttributeError):
        rollout.kl = rollout.rewards


# ----------------------------------------------------------------------------------------------------------------
# The loss and its gradient
# ----------------------------------------------------------------------------------------------------------------


def whole_minibatch(rollout: Rollout) -> tuple[Minibatch, int]:
    """All rows, and the number of their tokens."""
    return train.select_rows(rollout, torch.arange(len(rollout.mask))), int(rollout.mask.sum())


def moved(rollout: Rollout) -> Rollout:
    """As if the sampling policy had been another: ratios spread around 1, some beyond the clip range."""
    noise = torch.randn(rollout.mask.shape, generator=seeded(4))
    return replace(
        rollout,
        logprobs=rollout.logprobs + torch.where(rollout.mask, 0.3 * noise, 0.0),
        values=rollout.values + torch.where(rollout.mask, 0.3 * noise, 0.0),
    )


def weights(policy: PolicyModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()


def gradient_of(policy: PolicyModel, rollout: Rollout, config: Config) -> tuple[torch.Tensor, dict]:
    """The gradient that an update of a single step has at its step, and its statistics."""
    optimizer, gradients = torch.optim.SGD(policy.parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.flatten() for p in policy.parameters()))
    stats = train.update(policy, optimizer, rollout, config, 0)
    return torch.cat(gradients), stats


def step_of(policy: PolicyModel, rollout: Rollout, config: Config) -> tuple[torch.Tensor, dict]:
    """What an update adds to the weights under plain gradient descent at rate 1, and its statistics."""
    start = weights(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    stats = train.update(policy, optimizer, rollout, replace(config, learning_rate=1e-3), 0)
    return (weights(policy) - start) / 1e-3, stats


@pytest.mark.parametrize("parts", [2, 4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_in_parts_has_the_gradient_and_statistics_of_the_whole(family, parts):
    """The parts have unequal numbers of tokens, so a mean of the parts' means would be another one."""
    rollout = moved(first_rollout(tiny_policy(family), settings()))
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_a_rollouts_rows_does_not_change_the_gradient(family, monkeypatch):
    """Everything of a row moves together, the mask included: rows are grouped by length, in passes of any width."""
    monkeypatch.setattr(model, "PASS_TOKENS", 1)
    rollout = moved(first_rollout(tiny_policy(family), settings()))
    order = torch.randperm(16, generator=seeded(3))
    reordered = replace(rollout, **{name: tensor[order] for name, tensor in tensors_of(rollout).items()})
    expected, stats = gradient_of(tiny_policy(family), rollout, settings(entropy_coef=0.1))
    actual, their_stats = gradient_of(tiny_policy(family), reordered, settings(entropy_coef=0.1))
    assert_close(actual / expected.abs().max(), expected / expected.abs().max())
    assert their_stats == pytest.approx(stats, abs=1e-5)


def test_the_loss_by_brute_force():
    """PPO's three terms, token by token in plain Python."""
    config = settings(batch_size=4, mini_batch_size=4, value_coef=0.3, entropy_coef=0.2, temperature=0.8)
    policy = tiny_policy("gpt2")
    rollout = moved(first_rollout(policy, config))
    n_tokens = int(rollout.mask.sum())
    loss, stats = train.minibatch_loss(policy, *whole_minibatch(rollout), config)
    with torch.no_grad():
        new = policy.score(*inputs_of(rollout), 0.8, with_entropy=True)
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
    log_ratios = [(rollout.logprobs - new.logprobs)[i, t].item() for i, t in rollout.mask.nonzero().tolist()]
    assert_close(stats["approx_kl_k1"], sum(log_ratios) / n_tokens)
    assert_close(stats["approx_kl_k3"], sum(math.exp(-d) - 1 + d for d in log_ratios) / n_tokens)
    assert_close(stats["ratio_min"], math.exp(-max(log_ratios)))
    assert_close(stats["ratio_max"], math.exp(-min(log_ratios)))


@pytest.mark.parametrize("shift", [0.2, -0.2])
def test_the_extremes_of_the_ratio_are_those_of_real_tokens(shift):
    """All ratios on one side of 1, which is what stands beyond the mask: exp(-.2) = .819, exp(.2) = 1.221."""
    policy = tiny_policy("gpt2")
    rollout = first_rollout(policy, settings())
    assert not rollout.mask.all()
    rollout = replace(rollout, logprobs=rollout.logprobs - shift)
    _, stats = train.minibatch_loss(policy, *whole_minibatch(rollout), settings())
    assert_close([stats["ratio_min"], stats["ratio"], stats["ratio_max"]], [math.exp(shift)] * 3)


def test_the_gradient_of_the_loss_by_central_differences(monkeypatch):
    """Along random lines through the weights, in double precision: (L(θ + h v) - L(θ - h v)) / 2h.

    Of a GPT-2: Llama and T5 compute their norms in single precision whatever the rest is in.
    """
    config = settings(batch_size=4, mini_batch_size=4, value_coef=0.3, entropy_coef=0.2, temperature=0.8)
    policy = tiny_policy("gpt2")
    rollout = moved(first_rollout(policy, config))
    in_double = {name: x.double() for name, x in tensors_of(rollout).items() if x.is_floating_point()}
    minibatch, n_tokens = whole_minibatch(replace(rollout, **in_double))
    policy.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # score takes logits to single precision
    parameters = list(policy.parameters())
    loss, _ = train.minibatch_loss(policy, minibatch, n_tokens, config)
    gradients = torch.autograd.grad(loss, parameters)
    generator = seeded(8)
    for _ in range(5):
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        losses = []
        for step in (1e-6, -2e-6):  # to θ + h v, then to θ - h v
            with torch.no_grad():
                for parameter, along in zip(parameters, direction, strict=True):
                    parameter += step * along
                losses.append(train.minibatch_loss(policy, minibatch, n_tokens, config)[0].item())
        with torch.no_grad():
            for parameter, along in zip(parameters, direction, strict=True):
                parameter += 1e-6 * along
        slope = sum((g * v).sum().item() for g, v in zip(gradients, direction, strict=True))
        assert abs(slope) > 0.01
        assert_close((losses[0] - losses[1]) / 2e-6, slope, atol=1e-6 * max(1, abs(slope)))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_exactly_the_real_tokens(family):
    """At the logits: not 0 at every real token, the first and the EOS included; 0 beyond the mask."""
    policy = tiny_policy(family)
    config = settings(clip_range=0.9)
    rollout = first_rollout(policy, config)
    seen = []

    def keep_gradient(module, inputs, output) -> None:
        output.retain_grad()
        seen.append(output)

    policy.language_model.get_output_embeddings().register_forward_hook(keep_gradient)
    loss, _ = train.minibatch_loss(policy, *whole_minibatch(rollout), config)
    loss.backward()
    size = seen[0].grad.abs().sum(-1)
    assert size.shape == rollout.mask.shape
    assert (size[rollout.mask] > 0).all()
    assert (size[~rollout.mask] == 0).all()


def test_the_first_step_has_ratio_one_and_the_mean_advantage_as_loss():
    policy = tiny_policy("gpt2")
    rollout = first_rollout(policy, settings(whiten_advantages=False))
    _, stats = step_of(policy, rollout, settings())
    assert abs(stats["ratio_min"] - 1) < 1e-5
    assert abs(stats["ratio_max"] - 1) < 1e-5
    mean = rollout.advantages[rollout.mask].mean().item()
    assert abs(mean) > 0.05
    assert_close(stats["policy_loss"], -mean)
    value_loss = 0.5 * ((rollout.values - rollout.returns)[rollout.mask] ** 2).mean().item()
    assert_close(stats["value_loss"], value_loss)
    assert_close(stats["loss"], -mean + 0.1 * value_loss)


# ----------------------------------------------------------------------------------------------------------------
# update
# ----------------------------------------------------------------------------------------------------------------


def test_a_step_raises_what_was_better_than_expected_and_lowers_what_was_worse():
    policy = tiny_policy("gpt2")
    rollout = first_rollout(policy, settings())
    config = settings(value_coef=0.0, learning_rate=1e-4)
    train.update(policy, torch.optim.SGD(policy.parameters(), lr=0.0), rollout, config, 0)
    with torch.no_grad():
        new = policy.score(*inputs_of(rollout))
    gain = (new.logprobs - rollout.logprobs) * rollout.advantages
    assert gain[rollout.mask].mean() > 1e-4


def test_the_value_head_learns_the_returns():
    policy = tiny_policy("gpt2")
    config = settings(value_coef=1.0, clip_range_value=100.0, ppo_epochs=30, learning_rate=2e-3)
    rollout = first_rollout(policy, settings())
    rollout = replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    before = ppo.explained_variance(rollout.values, rollout.returns, rollout.mask)
    train.update(policy, torch.optim.Adam(policy.parameters()), rollout, config, 0)
    with torch.no_grad():
        values = policy.score(*inputs_of(rollout)).values
    assert before < 0.2
    assert ppo.explained_variance(values, rollout.returns, rollout.mask) > 0.8


def test_the_entropy_bonus_is_subtracted_from_the_loss_and_raises_the_entropy():
    config = settings(value_coef=0.0)
    policy = tiny_policy("gpt2")
    rollout = first_rollout(policy, config)
    rollout = replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    without, stats = step_of(policy, rollout, config)
    assert stats["loss"] == 0
    assert (without == 0).all()
    start = rollout.entropy[rollout.mask].mean().item()
    _, stats = step_of(policy, rollout, replace(config, entropy_coef=0.3))
    assert_close(stats["loss"], -0.3 * start)
    with torch.no_grad():
        new = policy.score(*inputs_of(rollout), with_entropy=True)
    assert new.entropy[rollout.mask].mean().item() > start + 1e-4


@pytest.mark.parametrize("noise", ["symmetric", "none"])
def test_target_kl_ends_an_update_before_the_step(noise):
    """With ratios of exp(.5) and exp(-.5) on neighbouring tokens, k1 has mean 0; k3 is .128 = cosh .5 - 1, whatever
    the sign. A target of .05 allows 1.5 x .05, and a target of .1 allows 1.5 x .1."""
    rollout = first_rollout(tiny_policy("gpt2"), settings())
    full = rollout.mask.sum(1) == 8
    rollout = replace(rollout, **{name: tensor[full] for name, tensor in tensors_of(rollout).items()})
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


def test_target_kl_keeps_the_steps_taken_before(monkeypatch):
    """Stopped in the third step: two are taken, and the statistics are the means of three."""
    policy, seen = tiny_policy("gpt2"), []
    rollout = first_rollout(policy, settings())
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: seen.append("step"))
    real = train.minibatch_loss

    def drifting(*args):
        loss, stats = real(*args)
        seen.append("loss")
        return loss, stats | {"approx_kl_k3": 0.01 * seen.count("loss")}

    monkeypatch.setattr(train, "minibatch_loss", drifting)
    config = settings(mini_batch_size=4, ppo_epochs=4, target_kl=0.0199)
    stats = train.update(policy, optimizer, rollout, config, 0)
    assert seen == ["loss", "step", "loss", "step", "loss"]
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert_close(stats["approx_kl_k3"], 0.02, atol=1e-9)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_epoch_uses_every_row_once_in_a_new_order(accumulation, monkeypatch):
    policy = tiny_policy("gpt2")
    rollout = first_rollout(policy, settings())
    seen, steps = [], []
    real = train.select_rows
    monkeypatch.setattr(train, "select_rows", lambda whole, rows: (seen.append(rows.tolist()), real(whole, rows))[1])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: steps.append(len(seen)))
    config = settings(mini_batch_size=4, gradient_accumulation_steps=accumulation, ppo_epochs=3)
    train.update(policy, optimizer, rollout, config, 0)
    assert [len(rows) for rows in seen] == [4] * 12
    epochs = [[row for rows in seen[i : i + 4] for row in rows] for i in (0, 4, 8)]
    assert all(sorted(order) == list(range(16)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3
    assert steps == list(range(accumulation, 13, accumulation))


def test_an_update_does_what_the_batch_arithmetic_says():
    """Counted at the model and at the optimizer, and read from the printed line."""
    config = settings(batch_size=16, mini_batch_size=2, gradient_accumulation_steps=4, ppo_epochs=3)
    said = re.search(
        r"epochs (\d+) x optimizer steps (\d+) x rows (\d+), at most (\d+) in a forward pass",
        batch_arithmetic(config, 16),
    )
    epochs, steps, rows, most = map(int, said.groups())
    policy, passes, steps_taken = tiny_policy("gpt2"), [], []
    rollout = first_rollout(policy, settings())
    policy.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["response_ids"])), with_kwargs=True
    )
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: steps_taken.append(sum(passes)))
    train.update(policy, optimizer, rollout, config, 0)
    assert max(passes) == most
    assert steps_taken == [rows * (i + 1) for i in range(epochs * steps)]


def test_an_update_is_in_train_mode_and_what_collects_is_in_eval_mode():
    """Activation checkpointing sleeps in eval mode, and would lose the cache of a sampler in train mode."""
    policy, modes = tiny_policy("gpt2").eval(), []
    policy.language_model.register_forward_pre_hook(
        lambda module, *_: modes.append((torch.is_grad_enabled(), module.training))
    )
    train_all(policy, settings(n_updates=2))  # the second rollout finds the policy in train mode
    assert set(modes) == {(False, False), (True, True)}


def test_memory_that_an_update_freed_is_kept_for_the_next_one(monkeypatch):
    kept = []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: kept.append(1))
    train_all(tiny_policy("gpt2"), settings(n_updates=2))
    assert kept == [1, 1]


def test_the_rows_of_every_step_are_a_function_of_seed_update_and_epoch():
    config = settings(seed=5, batch_size=16, mini_batch_size=4, ppo_epochs=2)
    steps = train.shuffled_steps(16, config, 7)
    assert [len(rows) for rows in steps] == [4] * 8
    for epoch in (0, 1):
        order = permutation(5, "steps", 7, 16, part=epoch)
        assert torch.equal(torch.cat(steps[4 * epoch : 4 * epoch + 4]), order)


def plain_update(policy: PolicyModel, rollout: Rollout, config: Config) -> None:
    """The update as one would first write it: all of a step's rows at once, padding and all, autograd's own
    derivatives, Adam."""
    optimizer = torch.optim.Adam(policy.parameters(), config.learning_rate, eps=1e-5, fused=False, foreach=False)
    width = rollout.mask.shape[1]
    whole = tensors_of(rollout)
    for rows in train.shuffled_steps(len(rollout.mask), config, 0):
        part = {name: tensor[rows] for name, tensor in whole.items()}
        mask, n = part["mask"], part["mask"].sum()
        ids = torch.cat([part["query_ids"], part["response_ids"]], dim=1)[:, :-1]
        reads = torch.cat([part["query_mask"], mask], dim=1)[:, :-1]
        output = policy.language_model(
            input_ids=ids,
            attention_mask=reads.long(),
            position_ids=(reads.long().cumsum(1) - 1).clamp(min=0),
            output_hidden_states=True,
            use_cache=False,
        )
        distribution = torch.log_softmax(output.logits[:, -width:], -1)
        logprobs = distribution.gather(-1, part["response_ids"][..., None])[..., 0]
        values = policy.value_head(output.hidden_states[-1][:, -width:])[..., 0]
        ratio = torch.exp(torch.where(mask, logprobs - part["logprobs"], 0.0))
        surrogate = torch.minimum(ratio * part["advantages"], ratio.clamp(0.8, 1.2) * part["advantages"])
        near = part["values"] + (values - part["values"]).clamp(-0.2, 0.2)
        errors = torch.maximum((values - part["returns"]) ** 2, (near - part["returns"]) ** 2)
        entropy = -(distribution.exp() * distribution).sum(-1)
        losses = -surrogate + config.value_coef * errors / 2 - config.entropy_coef * entropy
        optimizer.zero_grad()
        (torch.where(mask, losses, 0.0).sum() / n).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm, foreach=False)
        optimizer.step()


def ragged_rollout(policy: PolicyModel) -> Rollout:
    """64 rows of 1 to 40 tokens, as a policy not far from this one would have drawn them."""
    query_ids, query_mask = pad(QUERIES * 16, PAD, "left")
    mask = torch.arange(40) < torch.randint(1, 41, (64, 1), generator=seeded(1))
    response_ids = torch.randint(2, 11, (64, 40), generator=seeded(2))
    outputs = model.score_in_passes(policy, query_ids, query_mask, response_ids, mask, 64, with_entropy=True)
    advantages, returns = (torch.randn(64, 40, generator=seeded(seed)) for seed in (3, 5))
    nothing = torch.zeros(64, 40)
    rollout = Rollout(
        query_ids=query_ids,
        query_mask=query_mask,
        response_ids=response_ids,
        mask=mask,
        logprobs=outputs.logprobs,
        sampled_logprobs=outputs.logprobs,
        ref_logprobs=outputs.logprobs,
        values=outputs.values,
        entropy=outputs.entropy,
        has_eos=mask[:, -1],
        prompts=[],
        texts=[],
        raw_scores=nothing[:, 0],
        term_scores={},
        collected_at=0.0,
        scores=nothing[:, 0],
        kl=nothing,
        rewards=nothing,
        advantages=advantages,
        returns=returns,
    )
    return moved(rollout)


@pytest.mark.parametrize("precision", ["highest", "auto"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_equals_the_plain_one(accumulation, precision, tmp_path):
    """Rows in passes of like length, a sparse gradient of the embedding, a gradient written in place, fused Adam, the
    matrix products and the attention that go with the precision; the plain one always has torch's own defaults."""
    save_policy(tiny_policy("gpt2"), letter_tokenizer(), tmp_path)
    size = {"batch_size": 64, "mini_batch_size": 32 // accumulation, "gradient_accumulation_steps": accumulation}
    config = settings(**size, ppo_epochs=2, entropy_coef=0.1, max_grad_norm=1.0, learning_rate=1e-3)
    ours, plain = (new_policy(config, str(tmp_path), torch.device("cpu")) for _ in range(2))
    assert ours.language_model.get_input_embeddings().sparse
    plain.language_model.get_input_embeddings().sparse = False
    rollout, start = ragged_rollout(ours), weights(ours)
    first = train.shuffled_steps(64, config, 0)[0]
    assert len(model.length_groups(rollout.mask.sum(1)[first].tolist(), 32 // accumulation)) >= 2
    optimizer = torch.optim.Adam(ours.parameters(), eps=1e-5, fused=True)
    prepare_device(Config(device="cpu", matmul_precision=precision))
    train.update(ours, optimizer, rollout, config, 0)
    prepare_device(Config(device="cpu", matmul_precision="highest"))
    plain_update(plain, rollout, config)
    change = weights(plain) - start
    assert change.norm() > 0.1
    assert (weights(ours) - weights(plain)).norm() < 1e-5 * weights(plain).norm()
    assert (weights(ours) - weights(plain)).norm() < 1e-3 * change.norm()


def test_gradients_are_clipped_as_one_vector_once_a_step():
    rollout = first_rollout(tiny_policy("gpt2"), settings())
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
    rollout = moved(first_rollout(tiny_policy(family), settings()))
    step, stats = gradient_of(tiny_policy(family), rollout, settings(entropy_coef=0.1))
    dirty, dirty_stats = gradient_of(tiny_policy(family), widened(rollout), settings(entropy_coef=0.1))
    assert step.isfinite().all()
    assert_close(dirty / step.abs().max(), step / step.abs().max())
    for name, value in stats.items():
        assert abs(dirty_stats[name] - value) < 1e-5, name


def widened(rollout: Rollout) -> Rollout:
    """Three more columns behind the responses, and everything beyond the mask changed, except where it must be 0."""
    mask = widen(rollout.mask, (0, 3))
    junk = {"response_ids": 7} | dict.fromkeys(
        ("logprobs", "sampled_logprobs", "ref_logprobs", "values", "returns"), float("nan")
    )
    junk |= {"advantages": float("nan"), "entropy": float("nan"), "kl": 0.0, "rewards": 0.0}
    wide = {name: torch.where(mask, widen(getattr(rollout, name), (0, 3)), value) for name, value in junk.items()}
    return replace(rollout, mask=mask, **wide)


def test_statistics_do_not_see_padding():
    """Three more columns of anything behind the responses leave every number of the log as it was."""
    rollout = first_rollout(other_policy("gpt2"), settings(), frozen_copy(tiny_policy("gpt2")))
    before, after = rollout_stats(rollout), rollout_stats(widened(rollout))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert {"explained_variance", "ref_perplexity", "entropy"} <= before.keys()


def test_statistics_of_an_update_are_means_over_its_steps():
    parts = [{"loss": 1.0, "ratio_min": 0.5, "ratio_max": 1.5}, {"loss": 4.0, "ratio_min": 0.7, "ratio_max": 1.2}]
    assert train.combine(parts, statistics.fmean) == {"loss": 2.5, "ratio_min": 0.5, "ratio_max": 1.5}
    assert train.combine(parts, sum) == {"loss": 5.0, "ratio_min": 0.5, "ratio_max": 1.5}


# ----------------------------------------------------------------------------------------------------------------
# train
# ----------------------------------------------------------------------------------------------------------------


def test_the_learning_rate_falls_linearly_and_starts_full():
    config = settings(n_updates=4, learning_rate=2.0)
    assert [train.learning_rate(config, number) for number in range(4)] == [2.0, 1.5, 1.0, 0.5]


@pytest.mark.parametrize("kind", ["shared", "separate", "half of it frozen"])
def test_updates_move_every_weight_that_trains_and_no_other(kind):
    """Those of a critic of its own as well."""
    policy = tiny_policy("gpt2")
    if kind == "separate":
        policy = PolicyModel(tiny_gpt2(), tiny_gpt2().transformer, "separate")
    if kind == "half of it frozen":
        policy.language_model.transformer.h[0].requires_grad_(False)
    start = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    train_all(policy, settings(n_updates=2, learning_rate=1e-3))
    moved = {name for name, parameter in policy.named_parameters() if not torch.equal(parameter, start[name])}
    assert moved == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert (len(moved) < len(start)) == (kind == "half of it frozen")


def test_each_update_uses_its_own_learning_rate():
    config = settings(n_updates=4, learning_rate=1e-3, batch_size=4, mini_batch_size=4)
    policy, used = tiny_policy("gpt2"), []
    state = new_state(policy, config)
    state.optimizer.register_step_pre_hook(lambda optimizer, *_: used.append(dict(optimizer.param_groups[0])))
    train_all(policy, config, state=state)
    assert [group["lr"] for group in used] == [1e-3, 0.75e-3, 0.5e-3, 0.25e-3]
    assert {(group["eps"], group["betas"], group["weight_decay"]) for group in used} == {(1e-5, (0.9, 0.999), 0)}


def test_the_equations_stand_in_the_order_in_which_an_update_first_calls_them(monkeypatch):
    """As ppo.py says of itself; the two averages come before all others, and what only the log shows comes last."""
    called = []

    def noted(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        return call

    defined = [name for name, value in vars(ppo).items() if inspect.isfunction(value) and value.__module__ == "ppo"]
    for name in defined:
        monkeypatch.setattr(ppo, name, noted(name, getattr(ppo, name)))
    monkeypatch.setattr(generate, "response_mask", ppo.response_mask)
    monkeypatch.setattr(model, "thin_logprobs", noted("token_logprobs", model.thin_logprobs))
    monkeypatch.setattr(model, "thin_entropy", noted("token_entropy", model.thin_entropy))
    train_all(tiny_policy("gpt2"), settings(kl_target=1.0, batch_size=4, mini_batch_size=4))
    first_calls = [name for name in dict.fromkeys(called) if not name.startswith("masked_")]
    assert ["masked_mean", "masked_whiten", *first_calls, "explained_variance"] == defined


def test_each_update_has_the_prompts_of_its_number_and_seed():
    """Not of the seed's number and the update's seed."""
    config = settings(n_updates=3, seed=5, batch_size=4, mini_batch_size=4)
    prompts = prompts_of([[2 + n % 9, 2 + n // 9] for n in range(20)])
    policy = tiny_policy("gpt2")
    state = train.new_state(policy, config)
    updates = list(train.train(state, fixed_for(policy), prompts, config))
    for number, (rollout, _) in enumerate(updates):
        assert [p.ids for p in rollout.prompts] == [p.ids for p in batch_of(prompts, 4, number, 5)]


@pytest.mark.parametrize("change", [{"score_clip": 0.5}, {"whiten_scores": True}, {"kl_estimator": "k2"}])
def test_how_scores_and_kl_are_shaped_is_as_configured(change):
    """Against the equations, on the rollout itself; the second update's, where policy and reference differ."""
    config = settings(n_updates=2, batch_size=4, mini_batch_size=4, learning_rate=3e-3, **change)
    _, [_, (rollout, _)] = train_all(tiny_policy("gpt2"), config)
    scores = rollout.raw_scores
    if "score_clip" in change:
        assert scores.abs().max() > 0.5
        scores = scores.clamp(-0.5, 0.5)
    if "whiten_scores" in change:
        scores = (scores - scores.mean()) / scores.std(correction=0)
    assert_close(rollout.scores, scores)
    log_ratio = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
    kl = log_ratio.square() / 2 if "kl_estimator" in change else log_ratio
    assert kl.abs().max() > 1e-3
    assert_close(rollout.kl, kl)


def test_a_kl_target_adapts_the_coefficient_from_the_next_update_on():
    """β is multiplied by 1 + 16 e / 160: with KL 0 in the first rollout, e = -.2, so by .98."""
    config = settings(n_updates=3, kl_coef=0.1, kl_target=1.0, kl_horizon=160, batch_size=16, mini_batch_size=4)
    state, updates = train_all(tiny_policy("gpt2"), config)
    assert_close([stats["kl_coef"] for _, stats in updates], [0.1, 0.098, 0.09604], atol=1e-9)
    assert_close(state.kl_coef, 0.09604 * 0.98, atol=1e-9)


def test_rewards_pay_the_price_of_kl_that_was_adapted():
    """Each update's own, not the one that the run began with: a row's rewards sum to its score less that x its KL."""
    config = settings(n_updates=3, kl_coef=0.5, kl_target=1e-3, kl_horizon=16, learning_rate=3e-3)
    _, updates = train_all(tiny_policy("gpt2"), config)
    for rollout, stats in updates:
        assert_close(rollout.rewards.sum(1), rollout.scores - stats["kl_coef"] * rollout.kl.sum(1))
    rollout, stats = updates[-1]
    assert (abs(stats["kl_coef"] - 0.5) * rollout.kl.sum(1)).abs().max() > 0.01


def test_a_coefficient_without_a_target_stays():
    state, updates = train_all(tiny_policy("gpt2"), settings(n_updates=2, kl_coef=0.1))
    assert [stats["kl_coef"] for _, stats in updates] == [0.1, 0.1] == [state.kl_coef] * 2


def test_a_kl_target_reads_k3_which_is_never_negative(monkeypatch):
    seen, real = [], ppo.adapt_kl_coef
    monkeypatch.setattr(ppo, "adapt_kl_coef", lambda **settings: (seen.append(settings["kl"]), real(**settings))[1])
    config = settings(n_updates=3, kl_target=1.0, learning_rate=3e-3, kl_estimator="abs")
    _, updates = train_all(tiny_policy("gpt2"), config)
    rows = [rollout_stats(rollout) for rollout, _ in updates]
    assert seen == [row["kl_k3"] for row in rows]
    assert all(abs(rows[-1]["kl_k3"] - rows[-1][name]) > 1e-3 for name in ("kl", "kl_k1"))


def test_a_run_normalises_by_all_scores_so_far():
    """The mean score of an update, from every raw score up to it; the first rollout's own mean is therefore 0."""
    config = settings(n_updates=3, batch_size=4, mini_batch_size=4, learning_rate=3e-3, normalize_scores=True)
    _, updates = train_all(tiny_policy("gpt2"), config)
    so_far = []
    for rollout, _ in updates:
        own = rollout.raw_scores.tolist()
        so_far += own
        wanted = (statistics.mean(own) - statistics.mean(so_far)) / statistics.stdev(so_far)
        assert_close(rollout.scores.mean().item(), wanted)
    assert updates[0][0].scores.mean().abs() < 1e-6


@pytest.mark.parametrize(
    "family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow), pytest.param("t5", marks=pytest.mark.slow)]
)
def test_the_reward_of_a_small_model_rises(family):
    """A point for every letter a, of which there are few at first: most of the eight tokens, a few updates later."""
    size = {"batch_size": 32, "mini_batch_size": 16, "n_updates": 10, "ppo_epochs": 4}
    config = settings(**size, learning_rate=3e-3, kl_coef=0.01, max_grad_norm=1)
    _, updates = train_all(PolicyModel(BUILDERS[family]()), config, n_prompts=32)
    rows = [rollout_stats(rollout) for rollout, _ in updates]
    assert rows[0]["reward"] < 2
    assert rows[-1]["reward"] > 4
    assert rows[-1]["kl_k3"] > 0.5


# ----------------------------------------------------------------------------------------------------------------
# A state, and random numbers that need no memory
# ----------------------------------------------------------------------------------------------------------------

WHOLE = {
    "n_updates": 4,
    "batch_size": 8,
    "mini_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "ppo_epochs": 2,
    "learning_rate": 1e-3,
    "kl_target": 1.0,
    "kl_horizon": 50,
    "normalize_scores": True,
}


def copy_of(state: State) -> State:
    """A state that shares nothing: the weights, Adam's moments, and all the rest."""
    policy = copy.deepcopy(state.policy)
    optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5, fused=True)
    optimizer.load_state_dict(copy.deepcopy(state.optimizer.state_dict()))
    return replace(state, policy=policy, optimizer=optimizer)


def states_of(config: Config) -> list[State]:
    """Copies of the state before the first update and after each."""
    policy = tiny_policy("gpt2")
    fixed, state = fixed_for(policy), new_state(policy, config)
    copies = [copy_of(state)]
    for _ in train.train(state, fixed, prompts_of(QUERIES), config):
        copies.append(copy_of(state))
    return copies


def assert_same_end(actual: State, expected: State) -> None:
    assert torch.equal(weights(actual.policy), weights(expected.policy))
    for one, other in zip(actual.optimizer.state.values(), expected.optimizer.state.values(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert (actual.kl_coef, actual.moments, actual.next_update) == (
        expected.kl_coef,
        expected.moments,
        expected.next_update,
    )


@pytest.mark.parametrize("begun", [1, 3])
def test_a_state_is_all_that_it_takes_to_go_on(begun):
    """From a copy of the state between two updates, the same weights, moments and coefficient come out, to the bit."""
    config = settings(**WHOLE)
    states = states_of(config)
    resumed, updates = train_all(None, config, fixed_for(tiny_policy("gpt2")), state=copy_of(states[begun]))
    assert len(updates) == 4 - begun
    assert_same_end(resumed, states[-1])


def forget_moments_of_adam(state: State) -> None:
    state.optimizer = torch.optim.Adam(state.policy.parameters(), eps=1e-5, fused=True)


FORGET = {
    "weights": lambda state: state.policy.load_state_dict(tiny_policy("gpt2").state_dict()),
    "Adam's moments": forget_moments_of_adam,
    "kl_coef": lambda state: setattr(state, "kl_coef", 0.05),
    "moments of the scores": lambda state: setattr(state, "moments", ppo.Moments()),
    "number of the update": lambda state: setattr(state, "next_update", 2),
}


@pytest.mark.parametrize("forgotten", FORGET)
def test_no_part_of_a_state_can_be_left_out(forgotten):
    config = settings(**WHOLE)
    states = states_of(config)
    state = copy_of(states[3])
    FORGET[forgotten](state)
    resumed, _ = train_all(None, config, fixed_for(tiny_policy("gpt2")), state=state)
    with pytest.raises(AssertionError):
        assert_same_end(resumed, states[-1])


def test_update_seven_draws_the_same_whether_or_not_there_were_others_before_it(monkeypatch):
    """Prompts, responses and the order of the rows; the policy is the same, as the learning rate moves nothing."""
    orders, real = [], train.select_rows
    monkeypatch.setattr(train, "select_rows", lambda whole, rows: (orders.append(rows.tolist()), real(whole, rows))[1])
    config = settings(n_updates=8, batch_size=6, mini_batch_size=2, ppo_epochs=2)
    policy = tiny_policy("gpt2")
    _, updates = train_all(policy, config)
    with_others, their_orders = updates[7][0], orders[-6:]
    orders.clear()
    _, [(alone, _)] = train_all(policy, config, state=replace(new_state(policy, config), next_update=7))
    assert [prompt.ids for prompt in alone.prompts] == [prompt.ids for prompt in with_others.prompts]
    assert torch.equal(alone.response_ids, with_others.response_ids)
    assert orders == their_orders
    previous = updates[6][0]
    assert previous.texts != alone.texts


def test_a_validation_between_updates_changes_nothing():
    config = settings(**WHOLE)
    policy = tiny_policy("gpt2")
    fixed, state = fixed_for(policy), new_state(policy, config)
    for _ in train.train(state, fixed, prompts_of(QUERIES), config):
        assert len(evaluate_policy(policy, fixed, prompts_of(QUERIES * 3), config)) == 12
    assert_same_end(state, states_of(config)[-1])


def test_the_global_generator_is_left_alone():
    policy, config = tiny_policy("gpt2"), settings(**WHOLE)
    fixed, before = fixed_for(policy), torch.get_rng_state()
    train_all(policy, config, fixed)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_draws_other_responses():
    one, other = (first_rollout(tiny_policy("gpt2"), settings(seed=seed)) for seed in (0, 1))
    assert one.texts != other.texts
