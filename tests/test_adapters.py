"""LoRA, weights in 8 and 4 bits and the critics: what is shared, what is trained, what is saved, what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file
from test_model import QUERIES, RESPONSES, encode
from tiny_models import BUILDERS, FAMILIES, letter_tokenizer, tiny_gpt2, tiny_granite, tiny_t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from config import Config, UsageError
from dataset import pad
from loading import load_language_model, load_policy, load_reference, new_policy, quantized, save_policy
from model import PolicyModel, frozen_copy

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


def score(policy, responses=RESPONSES):
    query_ids, query_mask, response_ids, response_mask = encode(policy, responses=responses)
    return policy.score(
        query_ids=query_ids, query_mask=query_mask, response_ids=response_ids, response_mask=response_mask
    )


def mask_of(policy) -> torch.Tensor:
    """True on the responses' real tokens."""
    return encode(policy)[3]


def logprobs(policy) -> torch.Tensor:
    with torch.no_grad():
        return score(policy).logprobs


@pytest.mark.parametrize("trained_before", [False, True])
def test_the_reference_is_a_frozen_adapter_on_the_same_weights(base, tmp_path, trained_before):
    """KL 0 at the start, with a new adapter and with the user's trained one; afterwards only the policy moves."""
    config = Config(lora_r=4)
    plain = logprobs(load_policy(Config(), str(base), CPU))
    policy = new_policy(config, str(base), CPU)
    assert torch.equal(logprobs(policy), plain)  # a new adapter changes nothing
    if trained_before:
        shake(policy)
        save_policy(policy, letter_tokenizer(), tmp_path / "mine")
        config = Config(peft_model_path=str(tmp_path / "mine"))
        policy = new_policy(config, str(base), CPU)
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
    score(policy).logprobs.sum().backward()
    optimizer.step()
    assert (logprobs(policy) - start).abs().max() > 0.05
    assert torch.equal(logprobs(reference), start)
    assert all(p.requires_grad == (p.data_ptr() in own) for p in policy.language_model.parameters())


def test_a_new_adapter_has_the_rank_and_the_scale_that_are_asked_for(base):
    """Its output is scaled by 12 / 3."""
    policy = new_policy(Config(lora_r=3, lora_alpha=12), str(base), CPU)
    shapes = [weight.shape for name, weight in policy.named_parameters() if "lora_A" in name]
    assert shapes and {shape[0] for shape in shapes} == {3}
    layers = [layer for layer in policy.modules() if isinstance(layer, peft.tuners.lora.LoraLayer)]
    assert {scale for layer in layers for scale in layer.scaling.values()} == {4.0}


@pytest.mark.parametrize("kind", ["new", "loaded", "of a run"])
def test_an_adapter_drops_nothing_in_train_mode(kind, base, tmp_path):
    """Whatever it was trained with: an update would else score other numbers than the rollout, at random."""
    settings = peft.LoraConfig(r=4, lora_dropout=0.5, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(load_language_model(str(base), "float32", CPU), settings)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path / "mine")
    config = Config(lora_r=4) if kind == "new" else Config(peft_model_path=str(tmp_path / "mine"))
    if kind == "of a run":
        policy = load_policy(Config(), str(tmp_path / "mine"), CPU)
    else:
        policy = new_policy(config, str(base), CPU)
    shake(policy)
    with torch.no_grad():
        in_eval = score(policy.eval()).logprobs
        assert all(torch.equal(score(policy.train()).logprobs, in_eval) for _ in range(2))


def test_what_was_saved_loads_with_plain_peft_as_the_manifest_says(base, tmp_path):
    policy = new_policy(Config(lora_r=4), str(base), CPU).eval()
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
    policy = new_policy(Config(lora_r=4), str(base), CPU).eval()
    shake(policy)
    before = logprobs(policy)
    save_policy(policy, letter_tokenizer(), tmp_path / "run", merge=True)
    assert not (tmp_path / "run/adapter_config.json").exists()
    factory = AutoModelForSeq2SeqLM if policy.is_encoder_decoder else AutoModelForCausalLM
    assert "peft" not in json.loads((tmp_path / "run/manifest.json").read_text())["loads_with"]
    assert "lora" not in " ".join(factory.from_pretrained(tmp_path / "run").state_dict())
    assert_close(logprobs(load_policy(Config(), str(tmp_path / "run"), CPU)), before, atol=1e-4)
    assert torch.equal(logprobs(policy), before)  # merging was done on a copy


def new_adapter(base: Path, folder: Path) -> str:
    """The folder of an adapter that was trained on a base model."""
    policy = new_policy(Config(lora_r=4), str(base), CPU)
    shake(policy)
    save_policy(policy, letter_tokenizer(), folder)
    return str(folder)


def refusal_of(config: Config, base: Path) -> str:
    with pytest.raises(UsageError) as refusal:
        new_policy(config, str(base), CPU)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("other", ["gpt2", "t5"])
def test_an_adapter_of_another_model_is_refused_even_if_it_would_fit(other, tmp_path):
    """By the name in its adapter_config.json, which the sentence says may be changed: then it is taken, if it fits."""
    tiny_gpt2().save_pretrained(tmp_path / "base")
    BUILDERS[other](seed=1).save_pretrained(tmp_path / "other")
    adapter = new_adapter(tmp_path / "base", tmp_path / "adapter")
    config = Config(peft_model_path=adapter)
    sentence = refusal_of(config, tmp_path / "other")
    assert sentence.startswith(
        f"--peft_model_path {adapter} is an adapter of {tmp_path}/base, not of {tmp_path}/other;"
    )
    settings = Path(adapter) / "adapter_config.json"
    assert str(settings) in sentence
    settings.write_text(settings.read_text().replace(f"{tmp_path}/base", "anywhere/other"))
    if other == "gpt2":
        new_policy(config, str(tmp_path / "other"), CPU)
    else:
        assert "anywhere/other, not of" in refusal_of(config, tmp_path / "other")


@pytest.mark.parametrize("settings", [{"n_embd": 16}, {"n_layer": 1}, {"n_layer": 3}])
def test_an_adapter_of_a_model_with_the_same_name_and_other_weights_is_refused(settings, tmp_path):
    """Also where every weight that both have is alike, and only some are left over or missing."""
    tiny_gpt2().save_pretrained(tmp_path / "here/base")
    tiny_gpt2(**settings).save_pretrained(tmp_path / "there/base")
    adapter = new_adapter(tmp_path / "there/base", tmp_path / "adapter")
    sentence = refusal_of(Config(peft_model_path=adapter), tmp_path / "here/base")
    assert sentence.startswith(
        f"--peft_model_path {adapter} is an adapter of {tmp_path}/there/base, not of {tmp_path}/here"
    )
    assert ("size mismatch" if "n_embd" in settings else "weights for other layers") in sentence


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_the_whole_of_an_adapter_is_refused_without_asking_the_hub(missing, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", lambda: pytest.fail("the Hub is asked"))
    tiny_gpt2().save_pretrained(tmp_path / "base")
    adapter = new_adapter(tmp_path / "base", tmp_path / "adapter")
    (Path(adapter) / missing).unlink()
    assert f"--peft_model_path {adapter} lacks" in refusal_of(Config(peft_model_path=adapter), tmp_path / "base")
    (Path(adapter) / missing).write_text("damaged")
    assert f"--peft_model_path {adapter} is a" in refusal_of(Config(peft_model_path=adapter), tmp_path / "base")


def test_a_run_is_saved_as_an_adapter_of_the_model_that_it_was_put_on(tmp_path):
    """Not of where the adapter was first trained, which may not be there any more."""
    tiny_gpt2().save_pretrained(tmp_path / "there/base")
    tiny_gpt2().save_pretrained(tmp_path / "here/base")
    adapter = new_adapter(tmp_path / "there/base", tmp_path / "adapter")
    policy = new_policy(Config(peft_model_path=adapter), str(tmp_path / "here/base"), CPU).eval()
    save_policy(policy, letter_tokenizer(), tmp_path / "run")
    (tmp_path / "there").rename(tmp_path / "gone")
    assert torch.equal(logprobs(load_policy(Config(), str(tmp_path / "run"), CPU).eval()), logprobs(policy))


@pytest.mark.parametrize("damage", ["{", '{"peft_type": "LORA"}', "[]"])
def test_a_run_whose_adapters_settings_are_damaged_is_refused(damage, tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "base")
    new_adapter(tmp_path / "base", tmp_path / "run")
    (tmp_path / "run/adapter_config.json").write_text(damage)
    assert refusal_of(Config(), tmp_path / "run").startswith(f"{tmp_path}/run/adapter_config.json cannot be read: ")


def test_lora_on_a_model_that_peft_does_not_know_is_refused(tmp_path):
    tiny_granite().save_pretrained(tmp_path)
    sentence = refusal_of(Config(lora_r=4), tmp_path)
    assert sentence.startswith(f"--lora_r 4 finds no place in {tmp_path} (") and "--peft_model_path" in sentence


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    tiny_gpt2().save_pretrained(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for settings in ({"lora_r": 4, "load_in_8bit": True}, {"lora_r": 4, "load_in_4bit": True}):
        assert "pip install bitsandbytes" in refusal_of(Config(**settings), tmp_path)
    for settings in ({"lora_r": 4}, {"peft_model_path": "adapter"}):
        assert "pip install peft" in refusal_of(Config(**settings), tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_is_in_float32_whatever_its_base_is_in_and_trains(base, tmp_path, dtype):
    """A new one as one that was saved in the base's own dtype; its gradient and its step are not rounded."""
    name = str(dtype).removeprefix("torch.")
    path = new_adapter(base, tmp_path / "adapter")
    weights = load_file(f"{path}/adapter_model.safetensors")
    save_file({key: value.to(dtype) for key, value in weights.items()}, f"{path}/adapter_model.safetensors")
    for settings in ({"lora_r": 4}, {"peft_model_path": path}):
        policy = new_policy(Config(dtype=name, **settings), str(base), CPU).eval()
        dtypes = {p.requires_grad: p.dtype for p in policy.language_model.parameters()}
        assert dtypes == {True: torch.float32, False: dtype} and policy.value_head.weight.dtype == torch.float32
        before = {key: value.clone() for key, value in policy.state_dict().items()}
        step_on(policy, 1e-4)
        moved = {key for key, value in policy.state_dict().items() if not torch.equal(value, before[key])}
        assert moved == {
            key for key in before if "lora_B" in key or ("lora_A" in key and "peft_model_path" in settings)
        }


def step_on(policy, rate: float) -> None:
    """An optimizer step that makes the responses likelier."""
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=rate)
    loss = -score(policy).logprobs[mask_of(policy)].sum()
    loss.backward()
    optimizer.step()


# ----------------------------------------------------------------------------------------------------------------
# Weights in 8 and 4 bits
# ----------------------------------------------------------------------------------------------------------------


# bitsandbytes 0.50.2 decodes its 4 bits wrongly on some CPUs where rows are not whole blocks of 64 numbers
WHOLE_BLOCKS = {
    "gpt2": {"n_embd": 64},
    "llama": {"hidden_size": 64},
    "t5": {"d_model": 64, "d_kv": 32},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bits", "apart"), [("load_in_8bit", 0.5), ("load_in_4bit", 2.5)])
def test_a_policy_in_few_bits_is_trained_through_its_adapter(bits, apart, family, tmp_path, caplog):
    """Near the policy in full precision; its reference shares its weights and has KL 0; only the adapter moves; what is
    saved is the adapter, for plain peft; and the library is silent."""
    BUILDERS[family](**WHOLE_BLOCKS[family]).save_pretrained(tmp_path / "base")
    full = logprobs(load_policy(Config(), str(tmp_path / "base"), CPU))
    config = Config(lora_r=4, **{bits: True})
    policy = new_policy(config, str(tmp_path / "base"), CPU).eval()
    kinds = {p.dtype for p in policy.language_model.parameters() if not p.requires_grad}
    assert {"load_in_8bit": torch.int8, "load_in_4bit": torch.uint8}[bits] in kinds
    mask = mask_of(policy)
    start = logprobs(policy)
    assert 0 < (start - full)[mask].abs().mean() < apart / 4 and (start - full)[mask].abs().max() < apart
    reference = frozen_copy(policy)
    assert_close(logprobs(reference), start, atol=1e-6)

    frozen = {n: p.clone() for n, p in policy.language_model.named_parameters() if not p.requires_grad}
    adapter = {n: p.clone() for n, p in policy.named_parameters() if "lora_B" in n}
    policy.train()
    for _ in range(3):
        step_on(policy, 0.05)
    now = dict(policy.language_model.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in frozen.items())
    moved = dict(policy.named_parameters())
    assert adapter and not any(torch.equal(moved[name], weight) for name, weight in adapter.items())
    after = logprobs(policy.eval())
    assert (after - start)[mask].sum() > 1
    assert_close(logprobs(reference), start, atol=1e-6)

    save_policy(policy, letter_tokenizer(), tmp_path / "run")
    again = load_policy(Config(**{bits: True, "lora_r": 4}), str(tmp_path / "run"), CPU).eval()
    assert_close(logprobs(again), after, atol=1e-6)
    factory = AutoModelForSeq2SeqLM if policy.is_encoder_decoder else AutoModelForCausalLM
    plain = peft.PeftModel.from_pretrained(factory.from_pretrained(tmp_path / "base"), tmp_path / "run")
    ours = {name: weight for name, weight in policy.language_model.named_parameters() if "lora" in name}
    theirs = dict(plain.named_parameters())
    assert ours and all(torch.equal(theirs[name], weight) for name, weight in ours.items())
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_few_bits_an_update_scores_as_sampling_does(bits, family, tmp_path):
    """In eval mode bitsandbytes rounds activations to 8 bits as well; and a token does not hang on its neighbours."""
    BUILDERS[family](**WHOLE_BLOCKS[family]).save_pretrained(tmp_path / "base")
    policy = new_policy(Config(lora_r=4, **{bits: True}), str(tmp_path / "base"), CPU)
    mask = mask_of(policy)
    in_eval = logprobs(policy.eval())
    assert_close(logprobs(policy.train())[mask], in_eval[mask], atol=1e-5)
    names = ("query_ids", "query_mask", "response_ids", "response_mask")
    for row in range(len(mask)):
        alone = {name: tensor[row : row + 1] for name, tensor in zip(names, encode(policy), strict=True)}
        with torch.no_grad():
            assert_close(policy.eval()(**alone).logprobs[0][mask[row]], in_eval[row][mask[row]], atol=1e-5)


@pytest.mark.parametrize("start", ["base", "adapter on it", "adapter's folder"])
def test_a_reference_in_8_bits_is_what_its_policy_starts_as(start, tmp_path):
    """Under the adapter that the policy starts with: near its numbers, and far from those of the base model alone."""
    tiny_gpt2(**WHOLE_BLOCKS["gpt2"]).save_pretrained(tmp_path / "base")
    plain = logprobs(load_policy(Config(), str(tmp_path / "base"), CPU))
    before = new_policy(Config(lora_r=4), str(tmp_path / "base"), CPU)
    shake(before, 0.2)
    save_policy(before, letter_tokenizer(), tmp_path / "mine")
    path = tmp_path / ("mine" if start == "adapter's folder" else "base")
    adapter = str(tmp_path / "mine") if start == "adapter on it" else ""
    config = Config(reference_in_8bit=True, peft_model_path=adapter)
    policy = new_policy(config, str(path), CPU).eval()
    own, mask = logprobs(policy), mask_of(policy)
    reference = load_reference(config, str(path), policy)
    theirs = logprobs(reference)
    assert torch.int8 in {parameter.dtype for parameter in reference.parameters()}
    assert 0 < (theirs - own)[mask].abs().mean() < 0.1
    assert ((own - plain)[mask].abs().mean() > 0.5) == (start != "base")
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    shake(policy)
    assert torch.equal(logprobs(reference), theirs)


def test_weights_that_were_saved_in_8_bits_score_alike_in_training_too(tmp_path):
    """No flag says that they are."""
    BUILDERS["llama"](**WHOLE_BLOCKS["llama"]).save_pretrained(tmp_path / "base")
    load_language_model(str(tmp_path / "base"), "float32", CPU, in_8bit=True).save_pretrained(tmp_path / "small")
    policy = new_policy(Config(lora_r=4), str(tmp_path / "small"), CPU)
    mask = mask_of(policy)
    assert_close(logprobs(policy.train())[mask], logprobs(policy.eval())[mask], atol=1e-6)
    assert {module.state.threshold for module in policy.modules() if hasattr(module, "state")} == {0.0}


def test_4_bits_are_those_of_normally_distributed_weights():
    """NF4, whose levels are a normal distribution's quantiles, rounds such weights less than FP4 does."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weights = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    errors = {}
    for kind in ("fp4", "nf4"):
        packed, state = bitsandbytes.functional.quantize_4bit(weights, quant_type=kind)
        errors[kind] = (bitsandbytes.functional.dequantize_4bit(packed, state) - weights).square().mean().item()
    assert min(errors, key=errors.get) == quantized(CPU, False, True)["quantization_config"].bnb_4bit_quant_type


@pytest.mark.parametrize("family", FAMILIES)
def test_4_bit_weights_stay_as_they_are_on_a_cpu_with_a_faster_layout(family, tmp_path, monkeypatch):
    """On processors with AVX-512 for bfloat16 a pass without gradient would lay them out anew, rounded once more, and a
    gradient would no longer pass. Such a processor is feigned here."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", lambda *_: pytest.fail("laid out anew"))
    BUILDERS[family]().save_pretrained(tmp_path)
    policy = new_policy(Config(lora_r=4, load_in_4bit=True), str(tmp_path), CPU).eval()
    assert torch.equal(logprobs(policy), logprobs(policy))


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_an_adapter_is_not_merged_into_weights_of_few_bits(bits):
    with pytest.raises(UsageError, match="--merge would round the adapter"):
        Config(lora_r=4, merge=True, **{bits: True})


def test_8_bits_without_an_adapter_are_refused():
    for bits in ("load_in_8bit", "load_in_4bit"):
        with pytest.raises(UsageError, match="--lora_r"):
            Config(**{bits: True})
    with pytest.raises(UsageError, match="--lora_r"):
        Config(dtype="bfloat16")


# ----------------------------------------------------------------------------------------------------------------
# Critics
# ----------------------------------------------------------------------------------------------------------------


def values(policy, responses=RESPONSES) -> torch.Tensor:
    with torch.no_grad():
        return score(policy, responses).values


def with_random_head(config: Config, folder) -> object:
    policy = new_policy(config, str(folder), CPU).eval()
    with torch.no_grad():
        policy.value_head.weight.copy_(torch.randn(policy.value_head.weight.shape, generator=torch.Generator()))
    return policy


def test_a_separate_critic_starts_as_the_trunk_and_then_goes_its_own_way(base):
    policy = with_random_head(Config(critic="separate"), base)
    shared = load_policy(Config(), str(base), CPU).eval()
    shared.value_head.load_state_dict(policy.value_head.state_dict())
    mask = mask_of(policy)
    before = values(policy)
    assert_close(before[mask], values(shared)[mask])
    shake(policy.language_model)
    assert torch.equal(values(policy), before)
    score(policy).logprobs.sum().backward()
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
    assert_close(values(policy, others), baseline, atol=1e-6)
    assert baseline[:, 0].std() > 0.1
    with torch.no_grad():
        for row, query in enumerate(QUERIES):  # the mean over the real tokens, each prompt alone and without padding
            ids, mask = pad([query], 0, "right")
            states = policy.critic(input_ids=ids, attention_mask=mask.long()).last_hidden_state[0]
            expected = policy.value_head(states.mean(0)).item()
            assert baseline[row, 0].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["separate", "encoder"])
def test_a_critic_of_its_own_drops_nothing_in_train_mode(kind, tmp_path):
    """Be it new, from a base model with dropout, or a run's: else every update would learn other values, at random."""
    tiny_t5(dropout_rate=0.4).save_pretrained(tmp_path / "base")
    config = Config(critic=kind, lam=1.0)
    policy = with_random_head(config, tmp_path / "base")
    save_policy(policy, letter_tokenizer(), tmp_path / "run")
    stored = tmp_path / "run/critic/config.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"dropout_rate": 0.4}))
    for each in (
        policy,
        load_policy(config, str(tmp_path / "run"), CPU),
        new_policy(config, str(tmp_path / "run"), CPU),
    ):
        in_eval = values(each.eval())
        assert in_eval.std() > 0.1
        assert all(torch.equal(values(each.train()), in_eval) for _ in range(2))


@pytest.mark.parametrize("critic", ["shared", "separate", "encoder"])
def test_a_critic_is_saved_and_comes_back(critic, tmp_path):
    """With its value head, to be asked or to be trained on."""
    tiny_t5().save_pretrained(tmp_path / "base")
    config = Config(critic=critic, lam=1.0)
    policy = with_random_head(config, tmp_path / "base")
    shake(policy)
    save_policy(policy, letter_tokenizer(), tmp_path / "run")
    for back in (load_policy, new_policy):
        assert torch.equal(values(back(config, str(tmp_path / "run"), CPU).eval()), values(policy))
    files = json.loads((tmp_path / "run/manifest.json").read_text())["sha256"]
    assert any(name.startswith("critic/") for name in files) == (critic != "shared")


def test_an_encoder_critic_asks_for_lambda_one():
    with pytest.raises(UsageError, match=r"--critic encoder .* --lam 1 only, not 0\.95"):
        Config(critic="encoder")


def test_an_adapter_names_its_modules_in_an_order_that_is_the_same_in_every_process(tmp_path):
    """peft keeps them in a set, whose order hangs on the process's hashes: equal runs would not be equal files."""
    settings = peft.LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", target_modules=["v", "q", "o", "k", "wi"])
    save_policy(PolicyModel(peft.get_peft_model(tiny_t5(), settings)), letter_tokenizer(), tmp_path / "run")
    saved = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert saved["target_modules"] == ["k", "o", "q", "v", "wi"]
