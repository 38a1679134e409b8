"""The sampler: greedy against transformers' own, sampled against the softmax, and what becomes of rows that end."""

import gc
import math
import re
import weakref
from functools import partial

import pytest
import torch
from helpers import assert_close
from tiny_models import EOS, FAMILIES, PAD, VOCAB, brute_force, letter_tokenizer, next_token, tiny_policy
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import generate
import ppo
from config import Config, RunError
from dataset import pad
from generate import Sample, draw, respond, sample
from model import PolicyModel, frozen_copy
from prompts import Prompt
from randomness import uniforms
from sft import new_tokenizer
from train import Fixed, collect_rollout

pytest_plugins = ["micro"]
QUERIES = [[5, 3, 8, 2, 9], [4, 7], [6], [2, 2, 10]]
UNIFORMS = uniforms(3, "sampling", 0, (4, 12))
NEVER = -1  # an EOS id that no token has


def encode(policy: PolicyModel, queries=QUERIES, pad_id: int = PAD) -> list[torch.Tensor]:
    return [*pad(queries, pad_id, "right" if policy.is_encoder_decoder else "left")]


def sampled(
    policy: PolicyModel, query_ids, query_mask, time: int, eos_id: int, pad_id: int, seed: int = 0, **options
) -> Sample:
    """`sample` with the random numbers that belong to the seed."""
    numbers = uniforms(seed, "sampling", 0, (len(query_ids), time))
    return sample(policy, query_ids, query_mask, numbers, eos_ids=[eos_id], pad_id=pad_id, **options)


# ----------------------------------------------------------------------------------------------------------------
# A static cache
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_static_cache_all_steps_have_the_same_shapes_and_draw_the_same(family):
    """Rows end on the way, most of them, and those that go on draw what they do without."""
    policy, shapes = tiny_policy(family), []
    numbers = uniforms(11, "sampling", 0, (8, 12))
    plain = respond(policy, letter_tokenizer(), QUERIES * 2, numbers, Config(max_new_tokens=12))
    assert (plain.mask.sum(1) < plain.mask.shape[1]).sum() > 4

    def note(module, args, inputs) -> None:
        given = {name: value.shape for name, value in inputs.items() if torch.is_tensor(value)}
        cache = inputs["past_key_values"]
        own = cache.self_attention_cache if family == "t5" else cache
        shapes.append((given, [layer.keys.shape for layer in own.layers if layer.is_initialized]))

    policy.language_model.register_forward_pre_hook(note, with_kwargs=True)
    static = respond(policy, letter_tokenizer(), QUERIES * 2, numbers, Config(max_new_tokens=12, static_cache=True))
    assert torch.equal(static.response_ids, plain.response_ids) and torch.equal(static.mask, plain.mask)
    assert_close(static.logprobs, plain.logprobs, atol=1e-5)
    assert len(shapes) == plain.mask.shape[1] and shapes[1:] == shapes[1:2] * (len(shapes) - 1)


@pytest.mark.parametrize("prompt", [3, 50])
def test_prompts_of_about_a_length_have_steps_of_one_shape(prompt):
    """So that a graph that was captured for a rollout serves for the next."""
    policy, widths = tiny_policy("llama"), set()
    policy.language_model.register_forward_pre_hook(
        lambda module, args, inputs: widths.add(inputs["attention_mask"].shape[1]), with_kwargs=True
    )
    for length in (prompt, prompt + 1):
        config = Config(max_new_tokens=12, static_cache=True)
        respond(policy, letter_tokenizer(), [[5] * length], uniforms(0, "sampling", 0, (1, 12)), config)
    assert widths == {prompt, prompt + 1, 64}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_is_gone_when_the_responses_are_there(family, monkeypatch):
    """Not when Python looks for cycles the next time, of which it knows nothing of a GPU's memory."""
    made, real = [], generate.roomy_cache
    monkeypatch.setattr("generate.roomy_cache", lambda *a: (made.append(weakref.ref(cache := real(*a))), cache)[1])
    gc.disable()
    try:
        config = Config(max_new_tokens=12, static_cache=True)
        respond(tiny_policy(family), letter_tokenizer(), QUERIES, UNIFORMS, config)
        assert made and [own() for own in made] == [None] * len(made)
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("is_mixed", [False, True], ids=["", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_a_static_cache_is_captured_once(family, is_mixed, monkeypatch):
    """One graph, without a break, serves for all steps: what `replayed` asks of a GPU's compiler."""
    policy, graphs = tiny_policy(family), []
    policy.mixed_precision = is_mixed

    def capture(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(policy.language_model.forward, backend=capture, fullgraph=True, dynamic=False)
    plain = respond(policy, letter_tokenizer(), QUERIES, UNIFORMS, Config(max_new_tokens=12))
    monkeypatch.setattr("generate.replayed", lambda _: compiled)
    static = respond(policy, letter_tokenizer(), QUERIES, UNIFORMS, Config(max_new_tokens=12, static_cache=True))
    assert len(graphs) == 1
    assert is_mixed or torch.equal(static.response_ids, plain.response_ids)


# ----------------------------------------------------------------------------------------------------------------
# Greedy
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(family, training, checkpointing):
    """Oracle: `generate` in eval mode without checkpointing. In train mode with it, the cache would be lost silently
    and `generate` itself would give other tokens."""
    policy = tiny_policy(family)
    query_ids, query_mask = encode(policy)
    expected = policy.language_model.generate(
        input_ids=query_ids,
        attention_mask=query_mask.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    expected = expected[:, 1:] if policy.is_encoder_decoder else expected[:, query_ids.shape[1] :]
    if checkpointing:
        policy.language_model.activation_checkpointing_enable({"use_reentrant": False})
    policy.train(training)
    drawn = sampled(policy, query_ids, query_mask, 12, EOS, PAD, temperature=0.0)
    assert drawn.response_ids.tolist() == expected.tolist()
    assert policy.training == policy.language_model.training == training
    assert len(set(expected.flatten().tolist())) > 3  # else a wrong cache could go unnoticed
    assert (drawn.logprobs == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_likeliest_token_at_every_step(family):
    """Oracle: the whole prefix anew for every token, without cache and without padding."""
    policy = tiny_policy(family)
    drawn = sampled(policy, *encode(policy), 6, NEVER, PAD, temperature=0.0)
    for query, response in zip(QUERIES, drawn.response_ids.tolist(), strict=True):
        for t in range(6):
            assert response[t] == next_token(policy, query, response[:t])[0].argmax().item()


# ----------------------------------------------------------------------------------------------------------------
# Frequencies
# ----------------------------------------------------------------------------------------------------------------

DRAWS = 4000
CHI_SQUARED = 29.6  # exceeded once in a thousand draws of chi-squared with 10 degrees of freedom, fewer with fewer


def chi_squared(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Σ (observed - expected)² / expected, tokens expected fewer than 5 times pooled into one."""
    observed = torch.bincount(tokens, minlength=len(probabilities)).double()
    expected = probabilities.double() * len(tokens)
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum().clamp(min=1)[None]])
    return ((observed - expected) ** 2 / expected).sum().item()


def naive_truncation(logits: list[float], top_k: int, top_p: float) -> list[bool]:
    """Which tokens may be drawn: go through them from the likeliest on, and stop after k, or once p is reached."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    order = order[:top_k] if top_k else order
    weights = [math.exp(logits[i]) for i in order]
    kept, reached = [False] * len(logits), 0.0
    for token, weight in zip(order, weights, strict=True):
        if reached < top_p:
            kept[token] = True
        reached += weight / sum(weights)
    return kept


@pytest.mark.parametrize(
    ("family", "temperature", "top_k", "top_p"),
    [
        *((family, temperature, 0, 1.0) for family in FAMILIES for temperature in (1.0, 0.7)),
        ("gpt2", 1.0, 4, 1.0),
        ("gpt2", 1.0, 0, 0.8),
        ("gpt2", 0.7, 5, 0.9),
    ],
)
def test_sampled_frequencies_match_the_softmax(family, temperature, top_k, top_p):
    """First tokens, and second tokens behind the likeliest first one; a token that is cut off is never drawn."""
    policy = tiny_policy(family, seed=3)
    with torch.no_grad():
        policy.language_model.get_output_embeddings().weight.mul_(0.5)  # leaves every token likely enough to turn up
    query = encode(policy, [QUERIES[0]] * DRAWS)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    ids = sampled(policy, *query, 2, NEVER, PAD, **options).response_ids
    first = ids[:, 0].mode().values.item()
    for tokens, before in ((ids[:, 0], []), (ids[ids[:, 0] == first, 1], [first])):
        logits = next_token(policy, QUERIES[0], before)[0] / temperature
        kept = torch.tensor(naive_truncation(logits.tolist(), top_k, top_p))
        probabilities = logits.masked_fill(~kept, float("-inf")).softmax(-1)
        assert chi_squared(tokens, probabilities) < CHI_SQUARED
        assert set(tokens.tolist()) <= set(kept.nonzero()[:, 0].tolist())
        if top_k == 0 and top_p == 1:
            assert kept.all()
            assert set(tokens.tolist()) >= set((probabilities > 10 / len(tokens)).nonzero()[:, 0].tolist())
        else:
            assert not kept.all()


def test_every_token_of_a_large_vocabulary_can_be_drawn():
    """No hidden top-k: transformers' own default keeps 50 tokens."""
    policy = tiny_policy("gpt2", vocab_size=200, eos_token_id=EOS)
    with torch.no_grad():
        policy.language_model.lm_head.weight.mul_(0.1)
    policy.language_model.generation_config.top_k = 5
    policy.language_model.generation_config.temperature = 0.1
    ids = sampled(policy, *encode(policy, [[5]] * DRAWS), 1, NEVER, PAD).response_ids
    assert len(ids.unique()) == 200


@pytest.mark.parametrize("top_k", [0, 1, 3, 8, 20])
@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 0.999, 1.0])
def test_truncation_equals_a_naive_loop(top_k, top_p):
    """The middle of each kept token's interval draws it, with its share of their mass: no other token has a share."""
    for logits in 2 * torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        kept = torch.tensor(naive_truncation(logits.tolist(), top_k, top_p)).nonzero()[:, 0]
        shares = logits[kept].softmax(0)
        tokens, logprobs = draw(logits.expand(len(kept), 8), shares.cumsum(0) - shares / 2, top_k=top_k, top_p=top_p)
        assert tokens.tolist() == kept.tolist()
        assert_close(logprobs, shares.log())


def test_truncation_by_hand():
    """Probabilities .5, .25, .125, .125: top_p .7 needs two tokens, .76 three, and .5 exactly one."""
    logits = torch.tensor([[0.25, 0.125, 0.5, 0.125]]).log().expand(1000, 4)
    uniforms = torch.arange(1000, dtype=torch.float64) / 1000

    def kept(top_k: int, top_p: float) -> list[int]:
        return draw(logits, uniforms, top_k=top_k, top_p=top_p)[0].unique().tolist()

    assert kept(0, 0.7) == [0, 2]
    assert len(kept(0, 0.76)) == 3
    assert kept(0, 0.5) == kept(0, 0.01) == kept(1, 1.0) == [2]
    assert kept(2, 0.6) == [2]  # top_p counts among what top_k left, where token 2 has .667
    assert kept(2, 0.7) == [0, 2]
    assert kept(0, 1.0) == [0, 1, 2, 3]


def test_draw_inverts_the_cumulative_distribution():
    """Probabilities .2, .5, .3: u in [0, .2) is token 0, [.2, .7) token 1, [.7, 1) token 2."""
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 1e-12], dtype=torch.float64)
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(6, 3)
    tokens, logprobs = draw(logits, uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    assert_close(logprobs, torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3, 0.3]).log())


def test_draw_at_the_very_edges_never_takes_an_impossible_token():
    """u = 0 with leading zero probabilities, u just below 1 with trailing ones, and a u that is exactly a boundary."""
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0]]).log().expand(4, 4)
    tokens, logprobs = draw(logits, torch.tensor([0.0, 0.5, 0.4999999, 1 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [1, 2, 1, 2]
    assert_close(logprobs, [math.log(0.5)] * 4)


def test_draw_with_temperature_and_truncation_by_hand():
    """Odds 1 : 2 : 4 squared at temperature .5 are 1 : 4 : 16; without the least likely, 4 : 16."""
    logits = torch.tensor([1.0, 2.0, 4.0]).log().expand(4, 3)
    uniforms = torch.tensor([0.047, 0.048, 0.238, 0.239], dtype=torch.float64)  # boundaries 1/21 and 5/21
    tokens, logprobs = draw(logits, uniforms, temperature=0.5)
    assert tokens.tolist() == [0, 1, 1, 2]
    assert_close(logprobs, (torch.tensor([1, 4, 4, 16]) / 21).log())
    tokens, logprobs = draw(logits.square(), torch.full((4,), 0.99, dtype=torch.float64), temperature=2.0)
    assert_close(logprobs, (logits.square() / 2).log_softmax(-1)[:, 2])
    tokens, logprobs = draw(logits, torch.tensor([0.0, 0.19, 0.21, 0.99], dtype=torch.float64), 0.5, top_k=2)
    assert tokens.tolist() == [1, 1, 2, 2]
    assert_close(logprobs, torch.tensor([0.2, 0.2, 0.8, 0.8]).log())


def test_draw_keeps_tokens_that_are_rarer_than_float32_can_tell():
    """A token of probability 1e-9 at the end: a u in its interval finds it; sums in float32 reach 1 before it."""
    logits = torch.tensor([[1.0, 1e-9]]).log()
    tokens, logprobs = draw(logits, torch.tensor([1 - 0.5e-9], dtype=torch.float64))
    assert tokens.tolist() == [1]
    assert_close(logprobs, [math.log(1e-9)], atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------
# The sampling contract
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_sampler_and_score_give_the_same_log_probabilities(family, temperature):
    policy = tiny_policy(family)
    query = encode(policy, QUERIES * 4)
    drawn = sampled(policy, *query, 12, EOS, PAD, temperature=temperature)
    with torch.no_grad():
        scored = policy.score(*query, *drawn[:2], temperature).logprobs
        other = policy.score(*query, *drawn[:2], 1.7 - temperature).logprobs
    assert_close(drawn.logprobs[drawn.mask], scored[drawn.mask], atol=2e-5)
    assert (drawn.logprobs - other)[drawn.mask].abs().mean() > 0.05
    lengths = drawn.mask.sum(1)
    assert lengths.min() < 4
    assert lengths.max() > 6  # rows of every length, so that some left the batch early


@pytest.mark.parametrize("family", FAMILIES)
def test_sampled_log_probabilities_equal_brute_force(family):
    policy = tiny_policy(family)
    drawn = sampled(policy, *encode(policy), 8, EOS, PAD, temperature=0.7)
    for i, query in enumerate(QUERIES):
        real = drawn.mask[i]
        expected = brute_force(policy, query, drawn.response_ids[i, real].tolist(), 0.7)[0]
        assert_close(drawn.logprobs[i, real], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_t_of_a_row_is_drawn_by_number_t_of_its_random_numbers(family):
    """Oracle: the whole prefix anew for every token, and the first token whose cumulative probability exceeds u."""
    policy, random_numbers = tiny_policy(family), uniforms(3, "sampling", 0, (4, 6))
    drawn = sample(policy, *encode(policy), random_numbers, [EOS], PAD, temperature=0.7)
    for query, row, response, mask in zip(QUERIES, random_numbers, drawn.response_ids, drawn.mask, strict=True):
        before = []
        for u, token in zip(row.tolist(), response[mask].tolist(), strict=False):
            cumulative = (next_token(policy, query, before)[0].double() / 0.7).softmax(-1).cumsum(-1)
            assert token == int((cumulative <= u).sum())
            before.append(token)
    assert drawn.mask.sum() > 10


def test_logits_that_are_no_numbers_give_a_token_and_a_log_probability_that_is_none():
    """So that it is the start-up check that stops the run and says why, not an index beyond the vocabulary."""
    tokens, logprobs = draw(torch.full((2, 3), float("nan")), torch.tensor([0.0, 0.9], dtype=torch.float64))
    assert ((tokens >= 0) & (tokens < 3)).all()
    assert logprobs.isnan().all()


def test_sampling_carries_no_gradient():
    policy = tiny_policy("gpt2")
    drawn = sampled(policy, *encode(policy), 4, EOS, PAD)
    assert not any(x.requires_grad for x in drawn)


# ----------------------------------------------------------------------------------------------------------------
# Rows that end
# ----------------------------------------------------------------------------------------------------------------


def forward_batch_sizes(policy: PolicyModel) -> list[int]:
    """A list to which every later forward pass of the language model adds its number of rows."""
    sizes = []
    policy.language_model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(len(output.logits)), with_kwargs=True
    )
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_sampled_as_if_it_were_alone(family):
    """Alone, with its own row of the random numbers, it is the same: neither its neighbours, nor the padding that they
    bring, nor their leaving changes it."""
    policy, rows, time = tiny_policy(family), QUERIES * 3, 16
    numbers = uniforms(5, "sampling", 0, (len(rows), time))
    sizes = forward_batch_sizes(policy)
    drawn = sampled(policy, *encode(policy, rows), time, EOS, PAD, seed=5)
    assert sizes[0] == len(rows)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) >= 2
    lengths = drawn.mask.sum(1)
    for step, size in enumerate(sizes):
        running = int((lengths > step).sum())  # rows that have not ended before this step
        assert running <= size <= max(2 * running, 1)
    for i, query in enumerate(rows):
        alone = sample(policy, *encode(policy, [query]), numbers[i : i + 1], [EOS], PAD)
        n = lengths[i]
        assert alone.response_ids[0].tolist() == drawn.response_ids[i, :n].tolist()
        assert_close(alone.logprobs[0], drawn.logprobs[i, :n])


@pytest.mark.parametrize("family", FAMILIES)
def test_two_halves_of_a_batch_draw_the_rows_of_the_whole(family):
    """As two processes would: each makes the numbers of the whole batch and keeps its own rows."""
    policy, rows = tiny_policy(family), QUERIES * 2
    whole = sampled(policy, *encode(policy, rows), 8, EOS, PAD)
    for half in (slice(0, 4), slice(4, 8)):
        numbers = uniforms(0, "sampling", 0, (8, 8))[half]
        part = sample(policy, *encode(policy, rows[half]), numbers, [EOS], PAD)
        width = part.mask.shape[1]
        assert part.mask.tolist() == whole.mask[half, :width].tolist()
        assert part.response_ids.tolist() == whole.response_ids[half, :width].tolist()
        assert not whole.mask[half, width:].any()
    assert whole.response_ids[:4].tolist() != whole.response_ids[4:].tolist()


class Successor(PreTrainedModel):
    """A language model whose next token is always the previous one plus 1, and whose cache is what it has read."""

    def __init__(self, vocab_size: int):
        super().__init__(PreTrainedConfig(vocab_size=vocab_size, hidden_size=4))
        self.anchor = nn.Parameter(torch.zeros(1))  # a model without parameters has no device
        self.read = []

    def forward(self, input_ids, attention_mask, position_ids, use_cache, past_key_values=None, logits_to_keep=0, **_):
        cache = past_key_values or Rows(input_ids[:, :0])
        cache.ids = torch.cat([cache.ids, input_ids], dim=1)
        assert cache.ids.shape == attention_mask.shape
        assert torch.equal(position_ids[:, -1], attention_mask.sum(1) - 1)
        self.read.append(tuple(input_ids.shape))
        logits = torch.full((*input_ids.shape, self.config.vocab_size), -50.0)
        logits.scatter_(-1, (input_ids[..., None] + 1) % self.config.vocab_size, 50.0)
        states = (torch.zeros(*input_ids.shape, 4),)
        return CausalLMOutputWithPast(logits=logits[:, -logits_to_keep:], past_key_values=cache, hidden_states=states)


class Rows:
    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def reorder_cache(self, rows: torch.Tensor) -> None:
        self.ids = self.ids[rows]


def counting_policy() -> PolicyModel:
    policy = PolicyModel(Successor(12))
    policy.language_model.read.clear()
    return policy


def test_a_policy_that_counts():
    """Worked by hand: prompts that end in 3, 6, 8 and 1; the end is 9, the padding 0, and at most five tokens fit."""
    policy = counting_policy()
    query = pad([[2, 3], [4, 5, 6], [8], [11, 1]], 0, "left")
    drawn = sampled(policy, *query, 5, eos_id=9, pad_id=0)
    assert drawn.response_ids.tolist() == [[4, 5, 6, 7, 8], [7, 8, 9, 0, 0], [9, 0, 0, 0, 0], [2, 3, 4, 5, 6]]
    assert drawn.mask.sum(1).tolist() == [5, 3, 1, 5]
    assert_close(drawn.logprobs, torch.zeros(4, 5))
    assert policy.language_model.read == [(4, 3), (4, 1), (4, 1), (4, 1), (4, 1)]  # two of four is not most of them


def test_a_policy_that_counts_loses_rows_that_ended():
    """Five prompts; after the first step three have ended, and after the third one more: 5, 2, 2, 2 rows computed."""
    policy = counting_policy()
    query = pad([[8], [8], [2, 3], [8], [6]], 0, "left")
    drawn = sampled(policy, *query, 4, eos_id=9, pad_id=0)
    nine = [9, 0, 0, 0]
    assert drawn.response_ids.tolist() == [nine, nine, [4, 5, 6, 7], nine, [7, 8, 9, 0]]
    assert policy.language_model.read == [(5, 2), (2, 1), (2, 1), (2, 1)]


def test_sampling_stops_when_every_row_has_ended():
    policy = counting_policy()
    drawn = sampled(policy, *pad([[7], [8]], 0, "left"), 10, eos_id=9, pad_id=0)
    assert drawn.response_ids.tolist() == [[8, 9], [9, 0]]
    assert len(policy.language_model.read) == 2


def test_a_token_behind_the_end_is_neither_real_nor_a_second_end():
    """With an EOS drawn first, the counting policy goes on to 10, 11, ... while the others need it to."""
    policy = counting_policy()
    drawn = sampled(policy, *pad([[8], [2], [2]], 0, "left"), 3, eos_id=9, pad_id=0)
    assert drawn.response_ids.tolist() == [[9, 0, 0], [3, 4, 5], [3, 4, 5]]
    assert drawn.mask.tolist() == [[True, False, False], [True] * 3, [True] * 3]
    assert policy.language_model.read == [(3, 1), (3, 1), (3, 1)]


def test_each_steps_tokens_are_reported_when_they_are_drawn():
    policy, steps = counting_policy(), []
    query = pad([[7], [2]], 0, "left")
    sampled(
        policy, *query, 3, 9, 0, on_tokens=lambda ids: steps.append((ids.tolist(), len(policy.language_model.read)))
    )
    assert steps == [([8, 3], 1), ([9, 4], 2), ([10, 5], 3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_ends_with_the_first_eos_whatever_the_pad_token(family):
    policy = tiny_policy(family)
    masks = []
    for pad_id in (PAD, EOS):
        drawn = sampled(policy, *encode(policy, QUERIES * 8, pad_id), 9, EOS, pad_id)
        assert torch.equal(drawn.mask, ppo.response_mask(drawn.response_ids, EOS))
        assert (drawn.response_ids[~drawn.mask] == pad_id).all()
        assert (drawn.logprobs[~drawn.mask] == 0).all()
        ended = (drawn.response_ids == EOS).any(1)
        last = drawn.mask.sum(1) - 1
        assert ended.any()
        assert not ended.all()
        assert (drawn.response_ids.gather(1, last[:, None])[:, 0][ended] == EOS).all()
        assert (last[~ended] == 8).all()
        masks.append(drawn.mask)
    assert torch.equal(*masks)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_minimum_length_holds_back_the_end(family):
    """No EOS among the first tokens, drawn from what remains; after them it comes as always."""
    policy = tiny_policy(family)
    query = encode(policy, QUERIES * 16)
    free = sampled(policy, *query, 6, EOS, PAD)
    held = sampled(policy, *query, 6, EOS, PAD, min_new_tokens=3)
    assert free.mask.sum(1).min() == 1
    assert held.mask.sum(1).min() == 4
    logits = next_token(policy, QUERIES[0], [])[0]
    logits[EOS] = float("-inf")
    assert_close(held.logprobs[0, 0], logits.log_softmax(-1)[held.response_ids[0, 0]])


def test_no_response_is_longer_than_max_new_tokens():
    policy = tiny_policy("gpt2")
    for longest in (1, 2, 7):
        drawn = sampled(policy, *encode(policy), longest, NEVER, PAD)
        assert drawn.response_ids.shape == (4, longest)
        assert drawn.mask.all()


def test_a_seed_decides_what_is_drawn():
    policy = tiny_policy("gpt2")
    torch.manual_seed(1)
    one, same, other = (sampled(policy, *encode(policy, QUERIES * 4), 8, EOS, PAD, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.response_ids, same.response_ids)
    assert torch.equal(one.logprobs, same.logprobs)
    assert one.response_ids.tolist() != other.response_ids.tolist()
    state = torch.get_rng_state()
    sampled(policy, *encode(policy), 8, EOS, PAD)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


# ----------------------------------------------------------------------------------------------------------------
# From prompts to text
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_respond_pads_samples_and_decodes(family):
    policy = tiny_policy(family)
    config = Config(max_new_tokens=6, temperature=0.7, batch_size=4, mini_batch_size=4)
    drawn = respond(policy, letter_tokenizer(), QUERIES, uniforms(0, "sampling", 0, (4, 6)), config)
    query_ids, query_mask = encode(policy)
    assert torch.equal(drawn.query_ids, query_ids)
    assert torch.equal(drawn.query_mask, query_mask)
    expected = sampled(policy, query_ids, query_mask, 6, EOS, PAD, temperature=0.7)
    assert torch.equal(drawn.response_ids, expected.response_ids)
    assert torch.equal(drawn.mask, expected.mask)
    assert torch.equal(drawn.logprobs, expected.logprobs)
    steps = []
    respond(policy, letter_tokenizer(), QUERIES, uniforms(0, "sampling", 0, (4, 6)), config, on_tokens=steps.append)
    assert len(steps) == drawn.mask.shape[1]
    for text, ids in zip(drawn.texts, drawn.response_ids.tolist(), strict=True):
        assert text == "".join("..abcdefghi"[i] for i in ids if i > EOS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_that_are_no_numbers_are_told_with_the_weight_that_is_none(family, temperature):
    policy = tiny_policy(family)
    config = Config(task="generate", max_new_tokens=3, temperature=temperature)
    answer = partial(respond, policy, letter_tokenizer(), QUERIES, uniforms(0, "sampling", 0, (4, 3)), config)
    answer()
    name, weight = list(policy.language_model.named_parameters())[-1]
    with torch.no_grad():
        weight[0] = math.nan
    with pytest.raises(RunError, match=rf"are no numbers, as its weight {re.escape(name)} holds NaN or infinity"):
        answer()


def test_logits_that_overflow_are_told():
    policy = tiny_policy("gpt2")
    with torch.no_grad():
        policy.language_model.transformer.ln_f.weight.fill_(3e38)
    with pytest.raises(RunError, match=r"are no numbers: its logits overflow; try a higher --temperature or another"):
        respond(policy, letter_tokenizer(), QUERIES, uniforms(0, "sampling", 0, (4, 3)), Config(max_new_tokens=3))


def test_a_rollout_trains_on_the_sampled_ids_not_on_their_text_tokenised_again():
    """A byte-level tokenizer with merges: most sampled sequences are not those that their own text would become."""
    tokenizer = new_tokenizer(["the film was good, the film was bad"] * 8, 300, 64)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    policy = tiny_policy("gpt2", vocab_size=len(tokenizer), **ends)
    with torch.no_grad():
        policy.language_model.lm_head.weight.mul_(0.3)
    config = Config(max_new_tokens=12, batch_size=4, mini_batch_size=4)
    prompts = [Prompt(text, tokenizer(text).input_ids, {}) for text in ("the", "a film", "good", "was")]
    seen = []

    def term(_, responses, rows) -> torch.Tensor:
        seen.extend(responses)
        return torch.zeros(len(responses))

    fixed = Fixed(frozen_copy(policy), tokenizer, {"zero": term})
    rollout = collect_rollout(policy, fixed, prompts, config, 0)
    query = encode(policy, [prompt.ids for prompt in prompts], tokenizer.pad_token_id)
    expected = sampled(policy, *query, 12, *ends.values())
    assert torch.equal(rollout.response_ids, expected.response_ids)
    assert torch.equal(rollout.mask, expected.mask)
    assert seen == rollout.texts
    drawn = [ids[keep].tolist() for ids, keep in zip(expected.response_ids, expected.mask, strict=True)]
    again = [tokenizer(text).input_ids for text in seen]
    assert sum(one != other for one, other in zip(drawn, again, strict=True)) == 4
    assert any("\ufffd" in text for text in seen)  # bytes that are no character: the text cannot bring them back


def test_a_vocabulary_of_eleven_is_enough():
    """The comparisons of this file take the vocabulary's size from the models."""
    assert {tiny_policy(family).language_model.config.vocab_size for family in FAMILIES} == {VOCAB}
