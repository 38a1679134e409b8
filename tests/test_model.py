"""The policy, its value head and the frozen copy, on small random models of every family."""

import copy
import functools
import itertools

import pytest
import torch
import transformers.modeling_utils
from helpers import assert_close
from tiny_models import (
    BUILDERS,
    EOS,
    FAMILIES,
    GPT2_SIZE,
    PAD,
    VOCAB,
    brute_force,
    letter_tokenizer,
    randomise,
    tiny_gpt2,
    tiny_llama,
    tiny_policy,
    tiny_t5,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    T5Config,
)

import model
import ppo
from config import Config
from dataset import pad
from generate import sample
from hub import prepare_config
from loading import load_language_model, load_policy, new_policy, save_policy
from model import (
    PolicyModel,
    eval_mode,
    frozen_copy,
    length_groups,
    position_ids,
    score_in_passes,
    thin_entropy,
    thin_logprobs,
)
from preflight import TOLERANCES
from randomness import uniforms
from sft import new_tokenizer

CPU = torch.device("cpu")
QUERIES = [[5, 3, 8, 2, 9], [4, 7], [6], [2, 2, 10]]
RESPONSES = [[3, 9, 4, EOS], [EOS], [8, 8, 2, 6, 10, 5], [7, 3, EOS]]


def encode(policy: PolicyModel, queries=QUERIES, responses=RESPONSES, query_side: str = "") -> list[torch.Tensor]:
    """Query ids and mask, response ids and mask, padded on the sides that the family wants."""
    side = query_side or ("right" if policy.is_encoder_decoder else "left")
    return [*pad(queries, PAD, side), *pad(responses, PAD, "right")]


def assert_equals_brute_force(policy: PolicyModel, batch, responses, temperature: float = 1.0, queries=QUERIES) -> None:
    with torch.no_grad():
        scores = policy.score(*batch, temperature, with_entropy=True)
    for i, (query, response) in enumerate(zip(queries, responses, strict=True)):
        for actual, expected in zip(scores, brute_force(policy, query, response, temperature), strict=True):
            assert_close(actual[i, : len(response)], expected)


# ----------------------------------------------------------------------------------------------------------------
# score
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("family", BUILDERS)
def test_score_equals_one_token_at_a_time(family, temperature):
    """Oracle: each prefix alone, without padding, cache, mask or explicit positions; softmax of its last output."""
    policy = tiny_policy(family)
    assert_equals_brute_force(policy, encode(policy), RESPONSES, temperature)


def test_an_encoder_may_be_padded_on_either_side():
    policy = tiny_policy("t5")
    assert_equals_brute_force(policy, encode(policy, query_side="left"), RESPONSES)


def test_the_distributions_are_far_from_uniform():
    """Else the comparisons of this file would hold for almost any mistake."""
    for family in FAMILIES:
        scores = tiny_policy(family).score(*encode(tiny_policy(family)), with_entropy=True)
        real = encode(tiny_policy(family))[3]
        assert scores.entropy[real].mean() < 2.0  # log 11 = 2.40
        assert scores.logprobs[real].std() > 0.7
        assert scores.values[real].std() > 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    """More padding around the query and behind the response, and any token in it: the same numbers."""
    policy = tiny_policy(family)
    query_ids, query_mask, response_ids, mask = encode(policy)
    junk = torch.full((4, 3), 7)
    left = not policy.is_encoder_decoder
    wide_ids = torch.cat([junk, query_ids] if left else [query_ids, junk], dim=1)
    wide_mask = torch.cat([junk < 0, query_mask] if left else [query_mask, junk < 0], dim=1)
    long_ids = torch.cat([torch.where(mask, response_ids, 9), junk], dim=1)
    long_mask = torch.cat([mask, junk < 0], dim=1)
    with torch.no_grad():
        narrow = policy.score(query_ids, query_mask, response_ids, mask, with_entropy=True)
        wide = policy.score(wide_ids, wide_mask, long_ids, long_mask, with_entropy=True)
    for one, other in zip(narrow, wide, strict=True):
        assert_close(other[:, : mask.shape[1]][mask], one[mask])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_changes_only_what_comes_after_it(family):
    """log π(y_t) and V_t are conditioned on y_<t: another y_j leaves V up to and with j, and log π before j."""
    policy = tiny_policy(family)
    query_ids, query_mask, response_ids, mask = encode(policy, [[5, 3, 8], [4, 7]], [[3, 9, 4, 8, 2], [6, 6, 2, 10, 5]])
    with torch.no_grad():
        before = policy.score(query_ids, query_mask, response_ids, mask)
        for j in range(5):
            changed = response_ids.clone()
            changed[:, j] = 11 - response_ids[:, j]
            after = policy.score(query_ids, query_mask, changed, mask)
            assert_close(after.logprobs[:, :j], before.logprobs[:, :j], atol=1e-6)
            assert_close(after.values[:, : j + 1], before.values[:, : j + 1], atol=1e-6)
            assert ((after.logprobs[:, j] - before.logprobs[:, j]).abs() > 1e-2).all()
            assert ((after.values[:, j + 1 :] - before.values[:, j + 1 :]).abs() > 1e-4).all()


@pytest.mark.parametrize(("family", "needs_them"), [("gpt2", True), ("llama", False)])
def test_left_padding_needs_position_ids_where_positions_are_absolute(family, needs_them):
    """Why score passes them: without, GPT-2 counts the padding, and its logits move; rotary positions do not mind."""
    policy = tiny_policy(family)
    ids, mask = pad(QUERIES[:2], PAD, "left")
    with torch.no_grad():
        without = policy.language_model(input_ids=ids, attention_mask=mask.long()).logits[1, -1]
        alone = policy.language_model(input_ids=torch.tensor([QUERIES[1]])).logits[0, -1]
    assert ((without - alone).abs().max() > 0.1) == needs_them
    assert_close(policy.score(ids, mask, ids[:, :1], mask[:, -1:]).logprobs[1, 0], alone.log_softmax(-1)[PAD].item())


def test_position_ids_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 1, 2, 3, 4]]
    assert position_ids(mask).tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pad_token_that_is_the_eos_token_changes_nothing(family):
    """EOS first, in the middle, last and absent, and padding made of EOS."""
    policy = tiny_policy(family)
    responses = [[EOS], [4, EOS], [5, 3, 9, EOS], [6, 2, 2, 8]]
    query_ids, query_mask = pad(QUERIES, EOS, "right" if policy.is_encoder_decoder else "left")
    response_ids, mask = pad(responses, EOS, "right")
    assert torch.equal(mask, ppo.response_mask(response_ids, EOS))
    assert_equals_brute_force(policy, (query_ids, query_mask, response_ids, mask), responses)


def test_t5_labels_path_equals_the_explicit_decoder_inputs():
    """T5 builds start, y_0, ... from `labels` by itself, and its loss is the mean of -log π(y_t) over real tokens."""
    policy = tiny_policy("t5")
    query_ids, query_mask, response_ids, mask = encode(policy)
    labels = response_ids.masked_fill(~mask, -100)
    with torch.no_grad():
        scores = policy.score(query_ids, query_mask, response_ids, mask)
        output = policy.language_model(input_ids=query_ids, attention_mask=query_mask.long(), labels=labels)
    chosen = output.logits.log_softmax(-1).gather(-1, response_ids[..., None])[..., 0]
    assert_close(scores.logprobs[mask], chosen[mask])
    assert_close(output.loss, -scores.logprobs[mask].mean())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_causal_loss_is_the_mean_of_the_scored_tokens(family):
    """Transformers' own shift of labels against logits agrees with score's."""
    policy = tiny_policy(family)
    query_ids, query_mask, response_ids, mask = encode(policy)
    labels = torch.cat([query_ids * 0 - 100, response_ids.masked_fill(~mask, -100)], dim=1)
    whole = torch.cat([query_mask, mask], dim=1)
    with torch.no_grad():
        loss = policy.language_model(
            input_ids=torch.cat([query_ids, response_ids], dim=1),
            attention_mask=whole.long(),
            position_ids=position_ids(whole),
            labels=labels,
        ).loss
        assert_close(loss, -policy.score(query_ids, query_mask, response_ids, mask).logprobs[mask].mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_every_real_token_and_no_other(family):
    """The masked mean's gradient at the logits that predict y_t: (softmax - onehot) / n there, 0 beyond the mask."""
    policy = tiny_policy(family)
    query_ids, query_mask, response_ids, mask = encode(policy)
    seen = []

    def keep_gradient(module, inputs, output) -> None:
        output.retain_grad()
        seen.append(output)

    policy.language_model.get_output_embeddings().register_forward_hook(keep_gradient)
    scores = policy.score(query_ids, query_mask, response_ids, mask)
    ppo.masked_mean(-scores.logprobs, mask).backward()
    gradient = seen[0].grad
    onehot = torch.nn.functional.one_hot(response_ids, VOCAB)
    assert_close(gradient, (seen[0].softmax(-1) - onehot).detach() * mask[..., None] / mask.sum(), atol=1e-6)
    assert (gradient.abs().sum(-1) > 1e-6)[mask].all()
    assert (gradient == 0)[~mask].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_value_gradient_stops_at_the_mask(family):
    """A value's gradient at the value head: the sum of the hidden states of real tokens, and nothing else."""
    policy = tiny_policy(family)
    batch = encode(policy)
    mask, seen = batch[3], []
    policy.value_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    ppo.masked_mean(policy.score(*batch).values, mask).backward()
    assert seen[0].shape == (*mask.shape, policy.value_head.in_features)
    assert_close(policy.value_head.weight.grad[0], seen[0][mask].mean(0))
    assert_close(policy.value_head.bias.grad, [1.0])


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_score_refuses_a_temperature_that_is_not_positive(temperature):
    policy = tiny_policy("gpt2")
    with pytest.raises(ValueError, match="temperature must be above 0"):
        policy.score(*encode(policy), temperature)


def test_calling_the_policy_is_scoring():
    """`forward` takes what `score` takes: a wrapper such as DistributedDataParallel calls it, hooks and all."""
    policy, seen = tiny_policy("gpt2"), []
    policy.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    batch = encode(policy)
    called = policy(*batch, 0.7, True)
    assert len(seen) == 1 and seen[0] is called
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        logprobs, values, entropy = brute_force(policy, query, response, 0.7)
        assert_close(called.logprobs[i, : len(response)], logprobs)
        assert_close(called.values[i, : len(response)], values)
        assert_close(called.entropy[i, : len(response)], entropy)


def test_entropy_is_there_only_where_it_is_asked_for():
    policy = tiny_policy("gpt2")
    batch = encode(policy)
    assert policy.score(*batch).entropy is None
    assert score_in_passes(policy, *batch, mini_batch_size=2).entropy is None


# ----------------------------------------------------------------------------------------------------------------
# The forms that save memory equal the equations of ppo.py
# ----------------------------------------------------------------------------------------------------------------


def logits_and_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, tokens, and a weight for each of their numbers."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(2, 3, 7, dtype=torch.float64, generator=generator)
    tokens = torch.randint(7, (2, 3), generator=generator)
    weight = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(), tokens, weight


def test_thin_logprobs_and_their_gradient_are_those_of_the_equation():
    logits, tokens, weight = logits_and_tokens()
    before = logits.detach().clone()
    equation, thin = ppo.token_logprobs(logits, tokens), thin_logprobs(logits, tokens)
    assert_close(thin, equation, atol=1e-12)
    (expected,) = torch.autograd.grad((weight * equation).sum(), logits)
    (actual,) = torch.autograd.grad((weight * thin).sum(), logits)
    assert_close(actual, expected, atol=1e-12)
    assert expected.abs().max() > 0.1
    assert torch.equal(logits.detach(), before)


def test_thin_entropy_and_its_gradient_are_those_of_the_equation():
    logits, _, weight = logits_and_tokens()
    equation, thin = ppo.token_entropy(logits), thin_entropy(logits)
    assert_close(thin, equation, atol=1e-12)
    (expected,) = torch.autograd.grad((weight * equation).sum(), logits)
    (actual,) = torch.autograd.grad((weight * thin).sum(), logits)
    assert_close(actual, expected, atol=1e-12)
    assert expected.abs().max() > 0.1


def test_a_gradient_of_thin_logprobs_is_there_once():
    """It is written over what it is made of: a second one, or a gradient of it, is refused, not made wrong."""
    logits = torch.randn(1, 2, 3, requires_grad=True)
    loss = thin_logprobs(logits, torch.tensor([[0, 2]])).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = thin_logprobs(logits, torch.tensor([[0, 2]])).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"does not require grad|differentiate twice"):
        gradient.sum().backward()


# ----------------------------------------------------------------------------------------------------------------
# The output layer runs on response positions only, as the model itself would run it
# ----------------------------------------------------------------------------------------------------------------

CAUSAL = [family for family in BUILDERS if family != "t5"]


@pytest.mark.parametrize("family", BUILDERS)
def test_output_layer_runs_on_response_positions_only(family):
    policy = tiny_policy(family)
    shapes = []
    head = policy.language_model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    policy.score(*encode(policy))
    assert shapes == [(4, 6, VOCAB)]


@pytest.mark.parametrize("family", CAUSAL)
def test_log_probabilities_are_those_of_the_models_own_logits(family):
    """Oracle: the whole sequence through the language model, its own `logits` cut out and put through a softmax."""
    policy = tiny_policy(family)
    query_ids, query_mask, response_ids, mask = encode(policy)
    whole = torch.cat([query_mask, mask], dim=1)
    with torch.no_grad():
        output = policy.language_model(
            input_ids=torch.cat([query_ids, response_ids], dim=1),
            attention_mask=whole.long(),
            position_ids=position_ids(whole),
            output_hidden_states=True,
        )
        scores = policy.score(query_ids, query_mask, response_ids, mask)
        by_hand = policy.language_model.get_output_embeddings()(output.hidden_states[-1])
    first, last = query_ids.shape[1] - 1, whole.shape[1] - 1
    expected = output.logits[:, first:last].log_softmax(-1).gather(-1, response_ids[..., None])[..., 0]
    assert_close(scores.logprobs[mask], expected[mask])
    bare = by_hand[:, first:last].log_softmax(-1).gather(-1, response_ids[..., None])[..., 0]
    gap = (scores.logprobs - bare)[mask].abs().max()
    assert (gap > 0.1) == (family in ("gemma2", "granite"))  # which cap or scale what their output layer gives


# ----------------------------------------------------------------------------------------------------------------
# Value head
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_values_start_at_zero_and_their_first_loss_leaves_the_trunk_alone(family):
    policy = PolicyModel(BUILDERS[family]())
    batch = encode(policy)
    values = policy.score(*batch).values
    assert (values == 0).all()
    ((values - 1)[batch[3]] ** 2).mean().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in policy.language_model.parameters())
    assert_close(policy.value_head.bias.grad, [-2.0])
    assert policy.value_head.weight.grad.abs().max() > 0.1


@pytest.mark.parametrize("head", ["zero", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_changes_neither_values_nor_log_probabilities(family, head, tmp_path):
    policy = tiny_policy(family) if head == "random" else PolicyModel(BUILDERS[family]()).eval()
    save_policy(policy, new_tokenizer(["a"], 300, 64), tmp_path)
    loaded = load_policy(Config(), str(tmp_path), CPU).eval()
    with torch.no_grad():
        for before, after in zip(policy.score(*encode(policy))[:2], loaded.score(*encode(loaded))[:2], strict=True):
            assert torch.equal(before, after)
    assert (loaded.value_head.weight.abs().max() > 0) == (head == "random")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_policy_is_a_plain_hugging_face_model(family, tmp_path):
    policy = tiny_policy(family)
    save_policy(policy, new_tokenizer(["a"], 300, 64), tmp_path)
    factory = AutoModelForSeq2SeqLM if policy.is_encoder_decoder else AutoModelForCausalLM
    plain, report = factory.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = {"input_ids": torch.tensor([[5, 3, 8]])}
    if policy.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[PAD, 4]])
    with torch.no_grad():
        assert torch.equal(plain.eval()(**inputs).logits, policy.language_model(**inputs).logits)


# ----------------------------------------------------------------------------------------------------------------
# Dropout, dtype, activation checkpointing
# ----------------------------------------------------------------------------------------------------------------

BERT_SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA_SIZE = BERT_SIZE | {"intermediate_size": 64, "num_key_value_heads": 1, "pad_token_id": PAD}
T5_SIZE = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
RATES = {"hidden_dropout_prob": 0.4, "attention_probs_dropout_prob": 0.4}
DROPPING = {
    "gpt2": (AutoModelForCausalLM, GPT2Config(**GPT2_SIZE, resid_pdrop=0.4, embd_pdrop=0.4, attn_pdrop=0.4)),
    "llama": (AutoModelForCausalLM, LlamaConfig(**LLAMA_SIZE, attention_dropout=0.4)),
    "t5": (AutoModelForSeq2SeqLM, T5Config(**T5_SIZE, dropout_rate=0.4, decoder_start_token_id=PAD)),
    "t5 classifier": (
        AutoModelForSequenceClassification,
        T5Config(**T5_SIZE, dropout_rate=0.0, classifier_dropout=0.4, decoder_start_token_id=PAD),
    ),
    "bert": (AutoModelForSequenceClassification, BertConfig(**BERT_SIZE, **RATES, classifier_dropout=0.4)),
    "roberta": (AutoModelForSequenceClassification, RobertaConfig(**BERT_SIZE, **RATES)),
    "gpt2 classifier": (AutoModelForSequenceClassification, GPT2Config(**GPT2_SIZE, summary_first_dropout=0.4)),
}


@pytest.mark.parametrize("name", DROPPING)
def test_without_dropout_train_mode_is_deterministic(name):
    """Two forward passes in train mode are bitwise equal after it, and differ before it."""
    factory, config = DROPPING[name]
    inputs = {"input_ids": torch.tensor([[5, 3, 8, 4, EOS]])}
    if factory is AutoModelForSeq2SeqLM:
        inputs["decoder_input_ids"] = torch.tensor([[PAD, 4]])

    def repeats(settings) -> bool:
        model = randomise(factory.from_config(settings)).train()
        with torch.no_grad():
            return torch.equal(model(**inputs).logits, model(**inputs).logits)

    torch.manual_seed(0)
    assert not repeats(copy.deepcopy(config)) or name == "gpt2 classifier"  # whose rate its classifier never reads
    assert repeats(prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_policy_scores_the_same_twice_in_train_mode(family, tmp_path):
    rates = {
        "gpt2": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4},
        "llama": {"attention_dropout": 0.4},
        "t5": {"dropout_rate": 0.4},
    }
    model = BUILDERS[family](**rates[family])
    model.save_pretrained(tmp_path)
    stored = AutoConfig.from_pretrained(tmp_path)
    assert all(getattr(stored, name) == 0.4 for name in rates[family])
    policy = load_policy(Config(), str(tmp_path), CPU)
    in_eval = policy.eval().score(*encode(policy)).logprobs
    for _ in range(2):
        assert torch.equal(policy.train().score(*encode(policy)).logprobs, in_eval)


def test_a_checkpoint_in_bfloat16_is_trained_in_float32(tmp_path):
    """transformers would load it in the dtype it was stored in; the numbers are those that were stored."""
    tiny_gpt2().bfloat16().save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path), "float32", CPU)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.transformer.wte.weight, tiny_gpt2().transformer.wte.weight.bfloat16().float())
    assert {p.dtype for p in load_language_model(str(tmp_path), "bfloat16", CPU).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bfloat16_policy_scores_in_float32_within_tolerance_of_its_sampler(family, tmp_path):
    BUILDERS[family]().save_pretrained(tmp_path)
    policy = load_policy(Config(task="generate", dtype="bfloat16"), str(tmp_path), CPU)
    assert policy.language_model.dtype == torch.bfloat16
    assert policy.value_head.weight.dtype == torch.float32
    query_ids, query_mask, _, _ = encode(policy)
    drawn = sample(policy, query_ids, query_mask, uniforms(0, "sampling", 0, (4, 8)), [EOS], PAD)
    scores = policy.score(query_ids, query_mask, *drawn[:2], with_entropy=True)
    assert {x.dtype for x in scores} == {torch.float32}
    gap = (scores.logprobs - drawn.logprobs)[drawn.mask].abs().max().item()
    assert gap < TOLERANCES["bfloat16"].most
    # a softmax in bfloat16 would leave probabilities that sum to 1 only to 8 bits
    totals = sum(
        policy.score(query_ids, query_mask, torch.full_like(drawn.response_ids[:, :1], a), drawn.mask[:, :1])
        .logprobs.double()
        .exp()
        for a in range(VOCAB)
    )
    assert_close(totals.float(), torch.ones(4, 1), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_in_float64_samples_and_scores_in_float64(family):
    """The sampler's and the scorer's log-probabilities, of policy and reference, agree to its last digits."""
    policy = PolicyModel(tiny_policy(family).language_model.double())
    query_ids, query_mask, _, _ = encode(policy)
    drawn = sample(policy, query_ids, query_mask, uniforms(0, "sampling", 0, (4, 8)), [EOS], PAD)
    for each in (policy, frozen_copy(policy)):
        scores = score_in_passes(each, query_ids, query_mask, *drawn[:2], mini_batch_size=2, with_entropy=True)
        assert {x.dtype for x in (*scores, drawn.logprobs, each.value_head.weight)} == {torch.float64}
        assert_close(scores.logprobs[drawn.mask], drawn.logprobs[drawn.mask], atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_recomputes_in_train_mode_and_changes_no_gradient(family, tmp_path, monkeypatch):
    """Each layer goes through torch's checkpoint in train mode, and only there; the gradients are the same."""
    calls = []
    real = transformers.modeling_utils.checkpoint

    @functools.wraps(real)
    def counted(*args, **kwargs):
        calls.append(kwargs.get("use_reentrant"))
        return real(*args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", counted)
    save_policy(tiny_policy(family), new_tokenizer(["a"], 300, 64), tmp_path)
    gradients = []
    for switched_on in (False, True):
        policy = new_policy(Config(gradient_checkpointing=switched_on), str(tmp_path), CPU)
        policy.eval().score(*encode(policy))
        assert calls == []
        scores = policy.train().score(*encode(policy))
        assert calls == [False] * (switched_on * (4 if family == "t5" else 2))  # layers; not the reentrant kind
        (scores.logprobs + scores.values)[encode(policy)[3]].sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-4)
    assert sum(gradient.abs().sum() for gradient in gradients[0].values()) > 1


# ----------------------------------------------------------------------------------------------------------------
# The frozen reference
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_copy_stays_what_it_is(family):
    policy = tiny_policy(family).train()
    reference = frozen_copy(policy)
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    assert policy.training
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    assert own.isdisjoint(p.untyped_storage().data_ptr() for p in reference.parameters())
    batch = encode(policy)
    before = policy.score(*batch).logprobs.detach()
    assert_close(reference.score(*batch).logprobs, before, atol=1e-6)
    assert not reference.score(*batch).logprobs.requires_grad
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    policy.score(*batch).logprobs.sum().backward()
    optimizer.step()
    assert (policy.score(*batch).logprobs - before).abs().max() > 0.1
    assert_close(reference.score(*batch).logprobs, before, atol=1e-6)


def test_the_tiny_models_and_tokenizer_are_what_they_seem():
    """The builders of these tests take settings; without this, a mistyped one would go unnoticed."""
    assert tiny_llama(attention_dropout=0.4).config.attention_dropout == 0.4
    assert tiny_t5(dropout_rate=0.4).config.dropout_rate == 0.4
    assert letter_tokenizer()("abi").input_ids == [2, 3, 10]
    assert letter_tokenizer().decode([PAD, 2, 3, EOS], skip_special_tokens=True) == "ab"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pass_tokens", [1, 128])
@pytest.mark.parametrize("mini_batch_size", [1, 2, 4])
def test_rows_scored_in_passes_keep_their_places(family, mini_batch_size, pass_tokens, monkeypatch):
    """In passes of any size, halved wherever that saves anything or never: the numbers of all rows scored at once."""
    monkeypatch.setattr(model, "PASS_TOKENS", pass_tokens)
    policy = tiny_policy(family)
    batch = encode(policy)
    mask = batch[3]
    whole = policy.score(*batch, 0.7, with_entropy=True)
    parts = score_in_passes(policy, *batch, mini_batch_size, 0.7, with_entropy=True)
    for expected, actual in zip(whole, parts, strict=True):
        assert_close(actual[mask], expected[mask].detach())
        assert actual.dtype == torch.float32
    assert not parts.logprobs.requires_grad
    if mini_batch_size == 1:  # each row in a pass of its own width
        assert all((tensor[~mask] == 0).all() for tensor in parts)


def test_scoring_in_passes_is_at_temperature_1_and_without_entropy_unless_told_otherwise():
    policy = tiny_policy("gpt2")
    batch = encode(policy)
    outputs = score_in_passes(policy, *batch, mini_batch_size=4)
    assert outputs.entropy is None
    assert_close(outputs.logprobs[batch[3]], policy.score(*batch, 1.0).logprobs[batch[3]].detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_in_another_order_have_the_same_numbers_in_that_order(family, monkeypatch):
    """All that belongs to a row is reordered together, the mask included; each of the 24 orders of four rows."""
    monkeypatch.setattr(model, "PASS_TOKENS", 1)
    policy = tiny_policy(family)
    batch = encode(policy)
    expected = score_in_passes(policy, *batch, 4, with_entropy=True)
    for order in itertools.permutations(range(4)):
        rows = torch.tensor(order)
        actual = score_in_passes(policy, *(tensor[rows] for tensor in batch), 4, with_entropy=True)
        mask = batch[3][rows]
        for one, other in zip(actual, expected, strict=True):
            assert_close(one[mask], other[rows][mask])


def test_rows_share_a_pass_with_rows_of_like_length_by_hand():
    """Apart, the shorter half saves its rows times the difference of the longest: from 128 tokens on, it is."""
    lengths = [10, 74, 9, 73]
    assert length_groups(lengths, 4) == [[2, 0], [3, 1]]  # 2 x (74 - 10) = 128 tokens saved
    assert length_groups([11, 74, 9, 73], 4) == [[2, 0, 3, 1]]  # 2 x 63 = 126
    assert length_groups(lengths, 3) == [[2, 0, 3], [1]]  # 1 x (73 - 9) = 64 is too little, and no pass has four
    assert length_groups([300, 1, 150], 3) == [[1], [2], [0]]  # 1 x 299, and of the other two 1 x 150
    assert length_groups([5, 5, 5, 5, 5], 2) == [[0, 1], [2, 3], [4]]
    assert length_groups([7], 8) == [[0]]
    assert length_groups([401, 1, 150, 400], 4) == [[1], [2], [3, 0]]  # 2 x (401 - 150), and of the shorter two 149
    assert length_groups([200, 73], 2) == [[1, 0]]  # 127
    assert length_groups([200, 72], 2) == [[1], [0]]  # 128


def test_an_encoder_critic_values_the_mean_state_of_the_prompts_real_tokens():
    """Oracle: each prompt alone, without padding; the value is the same at every token of the response."""
    language_model = tiny_policy("t5").language_model
    policy = PolicyModel(language_model, language_model.get_encoder(), "encoder").eval()
    with torch.no_grad():
        policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    queries = [[5, 3, 8, 2, 9], [4, 7], [6]]
    response = pad([[3, 4], [5, 6, 7], [8]], PAD, "right")
    values = policy.score(*pad(queries, PAD, "right"), *response).values
    for query, row in zip(queries, values, strict=True):
        state = policy.critic(input_ids=torch.tensor([query])).last_hidden_state[0].mean(0)
        assert_close(row, policy.value_head(state).expand(3))


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "separate"), ("t5", "separate"), ("t5", "encoder")])
def test_a_critics_own_weights_learn_from_its_values_and_the_policys_do_not(family, kind):
    """The value loss's gradient reaches every weight of the critic's trunk that a value depends on, and no other."""
    language_model = BUILDERS[family]()
    if kind == "encoder":
        trunk = copy.deepcopy(language_model.get_encoder())
    else:
        trunk = AutoModel.from_config(language_model.config)
    policy = PolicyModel(language_model, trunk, kind)
    with torch.no_grad():
        policy.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    batch = encode(policy)
    ppo.masked_mean(policy.score(*batch).values ** 2, batch[3]).backward()
    silent = [name for name, p in trunk.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in language_model.parameters())


def test_a_critic_may_be_of_another_width_than_the_policy():
    trunk = AutoModel.from_config(tiny_gpt2(n_embd=16).config)
    policy = PolicyModel(tiny_gpt2(), trunk, "separate")
    assert policy.value_head.in_features == 16
    assert policy.score(*encode(policy)).values.shape == (4, 6)


def test_a_causal_response_goes_on_and_an_answer_begins_a_line():
    assert [tiny_policy(family).separator for family in FAMILIES] == ["", "", "\n"]


def test_a_reference_shares_what_is_frozen_and_nothing_that_trains():
    """With half of its weights frozen, and of a module with weights of both kinds, nothing."""
    policy = PolicyModel(tiny_gpt2(), mixed_precision=True)
    body = policy.language_model.transformer
    body.h[0].requires_grad_(False)
    body.h[1].mlp.requires_grad_(False)
    reference = frozen_copy(policy)
    assert reference.mixed_precision
    theirs = reference.language_model.transformer
    assert theirs.h[0] is body.h[0] and theirs.h[1].mlp is body.h[1].mlp
    assert theirs is not body and theirs.h[1] is not body.h[1] and theirs.h[1].attn is not body.h[1].attn
    places = {parameter.data_ptr() for parameter in reference.parameters()}
    assert all(p.data_ptr() not in places for p in policy.parameters() if p.requires_grad)


def test_eval_mode_is_for_a_while_only_and_ends_after_an_error_too():
    policy = tiny_policy("gpt2").train()
    with eval_mode(policy):
        assert not policy.training
        assert not policy.language_model.training
    assert policy.training
    with pytest.raises(RuntimeError), eval_mode(policy):
        raise RuntimeError
    assert policy.training
    assert policy.language_model.training
    with eval_mode(policy.eval()):
        pass
    assert not policy.training


# ----------------------------------------------------------------------------------------------------------------
# Mixed precision
# ----------------------------------------------------------------------------------------------------------------


def autocast_logprobs(policy: PolicyModel, query: list[int], response: list[int]) -> list[float]:
    """By hand: the language model alone, its products in bfloat16, the softmax in float32."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = policy.language_model(input_ids=torch.tensor([query + response[:-1]]), use_cache=False).logits
    logprobs = logits[0, len(query) - 1 :].float().log_softmax(-1)
    return [logprobs[t, token].item() for t, token in enumerate(response)]


@pytest.mark.parametrize("who", ["policy", "reference", "loaded", "new"])
def test_mixed_precision_is_on_in_scoring_and_in_sampling(who, tmp_path):
    """Of the policy, of its frozen copy, and of those that are loaded: near the plain numbers, and not the same."""
    config = Config(mixed_precision="bf16")
    policy = PolicyModel(tiny_gpt2(), mixed_precision=True).eval()
    save_policy(policy, letter_tokenizer(), tmp_path)
    if who == "reference":
        policy = frozen_copy(policy)
    elif who == "loaded":
        policy = load_policy(config, str(tmp_path), CPU).eval()
    elif who == "new":
        policy = new_policy(config, str(tmp_path), CPU).eval()
    ids, mask = torch.tensor([[5, 3, 8]]), torch.ones(1, 3, dtype=torch.bool)
    drawn = sample(policy, ids, mask, uniforms(0, "sampling", 0, (1, 8)), [EOS], PAD)
    response = drawn.response_ids[0].tolist()
    assert len(response) > 2
    expected = autocast_logprobs(policy, [5, 3, 8], response)
    exact, _, _ = brute_force(PolicyModel(tiny_gpt2()), [5, 3, 8], response, 1.0)
    with torch.no_grad():
        scored = policy.score(ids, mask, drawn.response_ids, drawn.mask).logprobs[0]
    for found, tolerance in ((scored, 1e-5), (drawn.logprobs[0], 0.05)):
        assert_close(found, expected, atol=tolerance)
        gaps = [abs(a - b) for a, b in zip(found.tolist(), exact, strict=True)]
        assert 1e-4 < max(gaps) < 0.2


def test_the_value_head_is_read_in_float32_in_mixed_precision():
    """Near 1, bfloat16 has steps of .008."""
    policy = tiny_policy("gpt2")
    policy.mixed_precision = True
    batch = encode(policy)
    with torch.no_grad():
        _, states = policy.read(*batch)
        values = policy.score(*batch).values
    assert_close(values, states.float() @ policy.value_head.weight[0] + policy.value_head.bias, atol=1e-6)


def test_a_reference_in_8_bits_has_its_policys_precision(tmp_path, monkeypatch):
    import loading

    save_policy(tiny_policy("gpt2"), letter_tokenizer(), tmp_path)
    real = loading.load_language_model
    monkeypatch.setattr(loading, "load_language_model", lambda *others, in_8bit=False, **named: real(*others, **named))
    for kind in ("no", "bf16"):
        config = Config(mixed_precision=kind, reference_in_8bit=True)
        policy = new_policy(config, str(tmp_path), CPU)
        assert loading.load_reference(config, str(tmp_path), policy).mixed_precision == (kind == "bf16")


# ----------------------------------------------------------------------------------------------------------------
# The decoder's start
# ----------------------------------------------------------------------------------------------------------------


def test_a_decoder_starts_with_its_own_token_not_with_the_padding():
    """They are one for T5, and two for BART: 3 here. Oracle: the model alone, and `generate` of transformers."""
    policy = tiny_policy("t5", decoder_start_token_id=3)
    query_ids, query_mask = encode(policy)[:2]
    expected = policy.language_model.generate(
        input_ids=query_ids,
        attention_mask=query_mask.long(),
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=EOS,
        pad_token_id=PAD,
        decoder_start_token_id=3,
    )[:, 1:]
    numbers = torch.zeros(len(query_ids), 6, dtype=torch.float64)
    drawn = sample(policy, query_ids, query_mask, numbers, [EOS], PAD, temperature=0.0)
    assert drawn.response_ids.tolist() == expected.tolist()
    other = sample(tiny_policy("t5"), query_ids, query_mask, numbers, [EOS], PAD, temperature=0.0)
    assert other.response_ids.tolist() != expected.tolist()
    response = [4, 7, 2, 5]
    ids = torch.tensor([response])
    with torch.no_grad():
        scored = policy.score(torch.tensor([[5, 3, 8]]), torch.ones(1, 3).bool(), ids, ids > 0)
    logprobs, values, _ = brute_force(policy, [5, 3, 8], response, 1.0)
    assert_close(scored.logprobs[0], logprobs)
    assert_close(scored.values[0], values)


# ----------------------------------------------------------------------------------------------------------------
# Logits of minus infinity
# ----------------------------------------------------------------------------------------------------------------


def test_a_token_that_cannot_be_drawn_adds_nothing_to_the_entropy_and_gets_no_gradient():
    """Some models forbid tokens so: 0 log 0 = 0. By hand, of three tokens that are as likely as each other, log 3."""
    logits = torch.tensor([[[1.0, 1.0, float("-inf"), 1.0]]], requires_grad=True)
    for entropy in (thin_entropy, ppo.token_entropy):
        found = entropy(logits)
        assert_close(found, [[1.0986123]])
        (gradient,) = torch.autograd.grad((found * 2).sum(), logits)
        assert gradient.isfinite().all() and gradient.abs().max() < 1e-6
    skewed = torch.tensor([[[2.0, 0.0, float("-inf")]]], requires_grad=True)
    plain = torch.tensor([[[2.0, 0.0]]], requires_grad=True)
    for entropy in (thin_entropy, ppo.token_entropy):
        (with_it,) = torch.autograd.grad(entropy(skewed).sum(), skewed)
        (without,) = torch.autograd.grad(entropy(plain).sum(), plain)
        assert_close(with_it[..., :2], without) and with_it[0, 0, 2] == 0
    logprobs = thin_logprobs(skewed, torch.tensor([[0]]))
    (gradient,) = torch.autograd.grad(logprobs.sum(), skewed)
    assert_close(gradient, [[[0.1192029, -0.1192029, 0.0]]])
