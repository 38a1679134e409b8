"""LoRA, 8-bit weights and the critics: what is shared, what is trained, what is saved."""

import json

import pytest
import torch
from test_model import QUERIES, RESPONSES, encode
from tiny_models import BUILDERS, FAMILIES, letter_tokenizer, tiny_gpt2, tiny_t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from config import Config, UsageError
from dataset import pad
from loading import load_policy, load_reference, save_policy
from model import frozen_copy

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")


@pytest.fixture(params=FAMILIES)
def base(request, tmp_path):
    """The folder of a random model."""
    BUILDERS[request.param]().save_pretrained(tmp_path / "base")
    letter_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def shake(policy, scale: float = 0.3) -> None:
    """Move every weight that is trained."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def logprobs(policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.score(*encode(policy)).logprobs


@pytest.mark.parametrize("trained_before", [False, True])
def test_the_reference_is_a_frozen_adapter_on_the_same_weights(base, tmp_path, trained_before):
    """KL 0 at the start, with a new adapter and with the user's trained one; afterwards only the policy moves."""
    config = Config(lora_r=4)
    plain = logprobs(load_policy(Config(), str(base), CPU))
    policy = load_policy(config, str(base), CPU)
    assert torch.equal(logprobs(policy), plain)  # a new adapter changes nothing
    if trained_before:
        shake(policy)
        save_policy(policy, letter_tokenizer(), tmp_path / "mine")
        config = Config(peft_model_path=str(tmp_path / "mine"))
        policy = load_policy(config, str(base), CPU)
        assert (logprobs(policy) - plain).abs().max() > 0.1
    reference = load_reference(config, str(base), policy)
    start = logprobs(reference)
    assert torch.equal(start, logprobs(policy))
    own = {p.data_ptr() for p in policy.language_model.parameters() if p.requires_grad}
    frozen = {p.data_ptr() for p in policy.language_model.parameters() if not p.requires_grad}
    theirs = {p.data_ptr() for p in reference.language_model.parameters()}
    assert own and own.isdisjoint(theirs) and frozen <= theirs
    assert not any(p.requires_grad for p in reference.parameters())

    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    policy.score(*encode(policy)).logprobs.sum().backward()
    optimizer.step()
    assert (logprobs(policy) - start).abs().max() > 0.05
    assert torch.equal(logprobs(reference), start)
    assert all(p.requires_grad == (p.data_ptr() in own) for p in policy.language_model.parameters())


def test_what_was_saved_loads_with_plain_peft_as_the_manifest_says(base, tmp_path):
    policy = load_policy(Config(lora_r=4), str(base), CPU).eval()
    shake(policy)
    save_policy(policy, letter_tokenizer(), tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    names = {"transformers": __import__("transformers"), "peft": peft, "FOLDER": str(tmp_path / "run")}
    plain = eval(manifest["loads_with"], names).eval()
    assert "adapter_model.safetensors" in manifest["sha256"] and not (tmp_path / "run/model.safetensors").exists()
    again = load_policy(Config(), str(tmp_path / "run"), CPU)
    assert torch.equal(logprobs(again), logprobs(policy))
    states = [{n: p for n, p in model.named_parameters() if "lora" in n} for model in (plain, policy.language_model)]
    assert states[0] and all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert torch.equal(again.value_head.weight, policy.value_head.weight)


def test_a_merged_policy_needs_no_peft(base, tmp_path):
    policy = load_policy(Config(lora_r=4), str(base), CPU).eval()
    shake(policy)
    before = logprobs(policy)
    save_policy(policy, letter_tokenizer(), tmp_path / "run", merge=True)
    assert not (tmp_path / "run/adapter_config.json").exists()
    factory = AutoModelForSeq2SeqLM if policy.is_encoder_decoder else AutoModelForCausalLM
    assert "peft" not in json.loads((tmp_path / "run/manifest.json").read_text())["loads_with"]
    assert "lora" not in " ".join(factory.from_pretrained(tmp_path / "run").state_dict())
    torch.testing.assert_close(logprobs(load_policy(Config(), str(tmp_path / "run"), CPU)), before, rtol=0, atol=1e-4)
    assert torch.equal(logprobs(policy), before)  # merging was done on a copy


def test_an_adapter_of_another_model_is_refused_in_one_sentence(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    other = load_policy(Config(lora_r=4), str(tmp_path / "base"), CPU)
    save_policy(other, letter_tokenizer(), tmp_path / "adapter")
    tiny_t5().save_pretrained(tmp_path / "t5")
    with pytest.raises(UsageError, match=r"--peft_model_path .*adapter is ") as refusal:
        load_policy(Config(peft_model_path=str(tmp_path / "adapter")), str(tmp_path / "t5"), CPU)
    assert "\n" not in str(refusal.value)


# ----------------------------------------------------------------------------------------------------------------
# 8-bit weights
# ----------------------------------------------------------------------------------------------------------------


def test_a_policy_in_8_bits_is_trained_through_its_adapter(tmp_path):
    """Near the policy in full precision; its reference shares its weights and has KL 0; only the adapter moves."""
    pytest.importorskip("bitsandbytes")
    tiny_gpt2().save_pretrained(tmp_path / "base")
    full = logprobs(load_policy(Config(), str(tmp_path / "base"), CPU))
    policy = load_policy(Config(lora_r=4, load_in_8bit=True), str(tmp_path / "base"), CPU)
    assert any(p.dtype == torch.int8 for p in policy.parameters())
    mask = encode(policy)[3]
    gap = (logprobs(policy) - full)[mask].abs().max()
    assert 0 < gap < 0.5
    reference = frozen_copy(policy)
    torch.testing.assert_close(logprobs(reference), logprobs(policy), rtol=0, atol=1e-6)
    start = logprobs(reference)
    shake(policy)
    assert (logprobs(policy) - start)[mask].abs().max() > 0.1
    torch.testing.assert_close(logprobs(reference), start, rtol=0, atol=1e-6)


def test_8_bits_without_an_adapter_are_refused():
    with pytest.raises(UsageError, match="--lora_r"):
        Config(load_in_8bit=True)
    with pytest.raises(UsageError, match="--lora_r"):
        Config(dtype="bfloat16")


# ----------------------------------------------------------------------------------------------------------------
# Critics
# ----------------------------------------------------------------------------------------------------------------


def values(policy, responses=RESPONSES) -> torch.Tensor:
    with torch.no_grad():
        return policy.score(*encode(policy, responses=responses)).values


def with_random_head(config: Config, folder) -> object:
    policy = load_policy(config, str(folder), CPU).eval()
    with torch.no_grad():
        policy.value_head.weight.copy_(torch.randn(policy.value_head.weight.shape, generator=torch.Generator()))
    return policy


def test_a_separate_critic_starts_as_the_trunk_and_then_goes_its_own_way(base):
    policy = with_random_head(Config(critic="separate"), base)
    shared = load_policy(Config(), str(base), CPU).eval()
    shared.value_head.load_state_dict(policy.value_head.state_dict())
    mask = encode(policy)[3]
    before = values(policy)
    torch.testing.assert_close(before[mask], values(shared)[mask], rtol=0, atol=1e-5)
    shake(policy.language_model)
    assert torch.equal(values(policy), before)
    policy.score(*encode(policy)).logprobs.sum().backward()
    assert all(p.grad is None for p in policy.critic.parameters())
    shake(policy.critic)
    assert (values(policy) - before)[mask].abs().max() > 0.1


def test_an_encoder_critic_values_the_prompt_alone(tmp_path):
    """The same for every token of a response and for every response; another prompt has another value."""
    tiny_t5().save_pretrained(tmp_path / "base")
    policy = with_random_head(Config(critic="encoder", lam=1.0), tmp_path / "base")
    baseline = values(policy)
    assert torch.equal(baseline, baseline[:, :1].expand_as(baseline))
    others = [[(token + 3) % 9 + 2 for token in response] for response in RESPONSES]
    torch.testing.assert_close(values(policy, others), baseline, rtol=0, atol=1e-6)
    assert baseline[:, 0].std() > 0.1
    with torch.no_grad():
        for row, query in enumerate(QUERIES):  # the mean over the real tokens, each prompt alone and without padding
            ids, mask = pad([query], 0, "right")
            states = policy.critic(input_ids=ids, attention_mask=mask.long()).last_hidden_state[0]
            expected = policy.value_head(states.mean(0)).item()
            assert baseline[row, 0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("critic", "lam"), [("separate", 0.95), ("encoder", 1.0)])
def test_a_critic_is_saved_and_comes_back(critic, lam, tmp_path):
    tiny_t5().save_pretrained(tmp_path / "base")
    config = Config(critic=critic, lam=lam)
    policy = with_random_head(config, tmp_path / "base")
    shake(policy.critic)
    save_policy(policy, letter_tokenizer(), tmp_path / "run")
    assert torch.equal(values(load_policy(config, str(tmp_path / "run"), CPU).eval()), values(policy))
    assert any(
        name.startswith("critic/") for name in json.loads((tmp_path / "run/manifest.json").read_text())["sha256"]
    )


def test_an_encoder_critic_asks_for_lambda_one():
    with pytest.raises(UsageError, match=r"--critic encoder .* --lam 1 only, not 0\.95"):
        Config(critic="encoder")
