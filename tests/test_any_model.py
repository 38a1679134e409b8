"""Models, tokenizers and adapters of every kind: right, or refused in a sentence. Each test keeps a right value."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import assert_close, read_log, read_stats
from micro import assert_refused, run_main
from test_adapters import logprobs, shake
from tiny_models import (
    BUILDERS,
    EOS,
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
from tokenizers import AddedToken

import generate
import ppo
import preflight
from adapters import merged
from config import Config, RunError, UsageError
from dataset import pad
from encoding import bare_ids
from generate import end_ids, sample
from hub import prepare_config
from loading import load_policy, load_tokenizer, new_policy, save_policy
from model import PolicyModel, eval_mode
from preflight import check_invariants
from prompts import Prompt
from randomness import uniforms
from run import check_saved
from train import Fixed

peft = pytest.importorskip("peft")
pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures", "no_bars")
CPU = torch.device("cpu")
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": VOCAB}
SIZE |= {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}


def save(language_model, folder: Path, tokenizer=None) -> Path:
    language_model.save_pretrained(folder)
    (tokenizer or letter_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a model, prompts and a reward, from where commands are given."""
    monkeypatch.chdir(tmp_path)
    save(tiny_llama(), tmp_path / "MODEL")
    rows = [{"text": "abcdefghi"[: 3 + number % 6]} for number in range(40)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("r.py").write_text("def reward(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n")
    return tmp_path


def command(model: str = "MODEL", **changes) -> list[str]:
    settings = {"dataset_path": "p.jsonl", "reward_fn": "r.py:reward", "n_updates": 2, "batch_size": 8}
    settings |= {"mini_batch_size": 4, "max_prompt_length": 12, "max_new_tokens": 12, "output_dir": "OUT"}
    settings |= {"eval_samples": 4} | changes
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["--task", "train", "--base_model_name", model, *flags]


# ----------------------------------------------------------------------------------------------------------------
# A folder says itself what it is
# ----------------------------------------------------------------------------------------------------------------


def make_adapter(folder: Path) -> None:
    policy = new_policy(Config(lora_r=2), "MODEL", CPU)
    shake(policy)
    save_policy(policy, letter_tokenizer(), folder)


def test_a_merged_run_gets_no_adapter_a_second_time(place):
    """What `generate` and `evaluate` load is the whole model of the folder, as transformers reads it; --final_dir has
    the same."""
    make_adapter(place / "ADAPTER")
    assert run_main(*command(peft_model_path="ADAPTER", final_dir="FINAL"), "--merge") == 0
    assert Path("FINAL/model.safetensors").read_bytes() == Path("OUT/model.safetensors").read_bytes()
    config = Config(**json.loads(Path("OUT/run_config.json").read_text()))
    policy = load_policy(config, "OUT", CPU)
    assert not hasattr(policy.language_model, "peft_config")
    plain = PolicyModel(transformers.AutoModelForCausalLM.from_pretrained("OUT"))
    assert torch.equal(logprobs(policy), logprobs(plain))
    assert run_main("--task", "generate", "--output_dir", "OUT", "--prompt", "abc") == 0


def test_a_policy_beside_an_adapters_run_is_itself(place):
    """`evaluate --policies bare=MODEL`: its responses are those of MODEL, not of MODEL under the run's adapter."""
    make_adapter(place / "ADAPTER")
    assert run_main(*command(peft_model_path="ADAPTER", learning_rate=0.01)) == 0
    assert run_main(*command(output_dir="PLAIN")) == 0
    flags = ["--policies", "bare=MODEL", "--policies", "mine=OUT", "--eval_samples", "4"]
    assert run_main("--task", "evaluate", "--output_dir", "OUT", *flags) == 0
    beside = json.loads(Path("OUT/results/comparison.json").read_text())["splits"]["test"]
    assert run_main("--task", "evaluate", "--output_dir", "PLAIN", "--policies", "bare=MODEL", *flags[4:]) == 0
    alone = json.loads(Path("PLAIN/results/comparison.json").read_text())["splits"]["test"]
    assert [row["response_bare"] for row in beside["samples"]] == [row["response_bare"] for row in alone["samples"]]
    assert beside["figures"]["mine"]["kl"] > 0.5
    for policy in beside["figures"].values():
        assert policy["length"] > 0
    assert run_main("--task", "evaluate", "--output_dir", "OUT") == 0  # before is MODEL under the run's adapter
    figures = json.loads(Path("OUT/results/comparison.json").read_text())["splits"]["test"]["figures"]
    assert abs(figures["after"]["kl"]) < beside["figures"]["mine"]["kl"] / 2


def test_a_value_head_is_read_as_it_was_trained(tmp_path):
    """The manifest says what the head reads: a run with another critic is loaded with its own all the same."""
    save(tiny_gpt2(), tmp_path / "base")
    policy = new_policy(Config(critic="separate"), str(tmp_path / "base"), CPU)
    with torch.no_grad():
        policy.value_head.weight.fill_(0.1)
    save_policy(policy, letter_tokenizer(), tmp_path / "run")
    loaded = load_policy(Config(), str(tmp_path / "run"), CPU)
    assert loaded.critic_kind == "separate" and torch.equal(loaded.value_head.weight, policy.value_head.weight)
    started = new_policy(Config(), str(tmp_path / "run"), CPU)  # a shared critic has to learn anew
    assert started.critic_kind == "shared" and not started.value_head.weight.any()


def test_an_adapter_on_an_adapters_folder_is_refused(place):
    make_adapter(place / "ADAPTER")
    with pytest.raises(UsageError, match="ADAPTER is an adapter itself; --peft_model_path ADAPTER cannot be added"):
        new_policy(Config(peft_model_path="ADAPTER"), "ADAPTER", CPU)


# ----------------------------------------------------------------------------------------------------------------
# Caches
# ----------------------------------------------------------------------------------------------------------------

HYBRIDS = {
    "lfm2": lambda: transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(**SIZE, layer_types=["conv", "full_attention"])
    ),
    "bamba": lambda: transformers.BambaForCausalLM(transformers.BambaConfig(**SIZE, attn_layer_indices=[1], **MAMBA)),
    "granite hybrid": lambda: transformers.GraniteMoeHybridForCausalLM(
        transformers.GraniteMoeHybridConfig(
            **SIZE, **MAMBA, layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=32
        )
    ),
    "jamba": lambda: transformers.JambaForCausalLM(
        transformers.JambaConfig(
            **SIZE, attn_layer_period=2, attn_layer_offset=1, num_experts=1, num_experts_per_tok=1, mamba_d_state=4
        )
    ),
}


@pytest.mark.parametrize("static", [False, True], ids=["", "static"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_rows_leave_a_cache_of_convolutions_and_state_spaces(name, static):
    """Oracle: each token anew, without cache, padding or neighbours; more than half of the rows end on the way. From a
    static cache none leaves."""
    policy = PolicyModel(randomise(HYBRIDS[name](), 1))
    prompts = [[5, 3, 8], [4, 7, 2, 6, 9], [6], [2, 2], [3, 9, 4], [8, 8], [7], [5, 6, 7]]
    query_ids, query_mask = pad(prompts, PAD, "left")
    ends = [EOS, 2, 3, 4]
    numbers = uniforms(3, "sampling", 0, (8, 12))
    drawn = sample(policy, query_ids, query_mask, numbers, eos_ids=ends, pad_id=PAD, static_cache=static)
    lengths = drawn.mask.sum(1)
    assert (lengths < drawn.mask.shape[1]).sum() > 4 and lengths.max() > lengths.median() + 1
    for row, prompt in enumerate(prompts):
        response = drawn.response_ids[row][drawn.mask[row]].tolist()
        expected, _, _ = brute_force(policy, prompt, response, 1.0)
        assert_close(drawn.logprobs[row][drawn.mask[row]], expected, atol=1e-4)


WITHOUT_A_CACHE = {
    "mamba": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4, eos_token_id=EOS)
    ),
    "openai-gpt": lambda: transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    ),
    "rwkv": lambda: transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, eos_token_id=EOS)
    ),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
        )
    ),
    "bert": lambda: transformers.BertLMHeadModel(
        transformers.BertConfig(**{name: value for name, value in SIZE.items() if name != "num_key_value_heads"})
    ),
}


@pytest.mark.parametrize("name", WITHOUT_A_CACHE)
def test_a_model_without_a_cache_is_refused_before_work_starts(name, place, capsys):
    save(WITHOUT_A_CACHE[name](), place / "OTHER")
    assert_refused(capsys, place, command("OTHER"), f"--base_model_name OTHER ({name}) gives no key/value cache")


PLAIN = {name: value for name, value in SIZE.items() if name != "num_key_value_heads"}
MISREAD = {  # positions from behind the padding's index; linear attention whose state keeps the rows that left
    "roberta": (
        lambda: transformers.RobertaForCausalLM(transformers.RobertaConfig(**PLAIN, is_decoder=True)),
        "does not count its positions from 0",
    ),
    "camembert": (
        lambda: transformers.CamembertForCausalLM(
            transformers.CamembertConfig(**PLAIN | {"pad_token_id": 2}, is_decoder=True)
        ),
        "does not count its positions from 0",
    ),
    "minimax": (
        lambda: transformers.MiniMaxForCausalLM(
            transformers.MiniMaxConfig(
                **SIZE | {"num_key_value_heads": 2},
                head_dim=16,
                layer_types=["linear_attention", "full_attention"],
                num_local_experts=2,
                num_experts_per_tok=1,
            )
        ),
        "cannot be run",
    ),
}


@pytest.mark.parametrize("name", MISREAD)
def test_a_model_that_would_be_misread_is_refused_before_work_starts(name, place, capsys):
    build, words = MISREAD[name]
    save(randomise(build(), 1), place / "OTHER")
    assert_refused(capsys, place, command("OTHER"), f"--base_model_name OTHER ({name}) {words}")


def test_a_model_that_cannot_be_sampled_is_refused_before_the_stage_before_ppo(place, capsys):
    save(WITHOUT_A_CACHE["mamba"](), place / "OTHER")
    rows = [{"text": "abc", "answer": "de"} for _ in range(40)]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*command("OTHER", dataset_path="answers.jsonl", completion_column="answer"), "--sft_first"]
    assert_refused(capsys, place, flags, "--base_model_name OTHER (mamba) gives no key/value cache")
    assert not (place / "saved_models").exists()


def test_a_model_that_cannot_be_sampled_is_refused_before_its_reward_model_is_trained(place, capsys):
    save(WITHOUT_A_CACHE["bert"](), place / "OTHER")
    rows = [{"text": "abc", "label": n % 2} for n in range(40)]
    Path("labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = command("OTHER", dataset_path="labelled.jsonl", reward_fn="")
    assert_refused(capsys, place, flags, "--base_model_name OTHER (bert) gives no key/value cache")
    assert not (place / "saved_models").exists()


def tiny_switch() -> transformers.SwitchTransformersForConditionalGeneration:
    """Its decoder has more layers than its encoder."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, num_experts=2,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, pad_token_id=PAD, eos_token_id=EOS,
        decoder_start_token_id=PAD, dropout_rate=0.0, expert_capacity=64, router_jitter_noise=0.0,
    )  # fmt: skip
    return randomise(transformers.SwitchTransformersForConditionalGeneration(config), 2)


def test_an_encoder_that_knows_no_cache_is_no_hindrance(place):
    """Switch Transformers' refuses the flag; what is sampled is the decoder."""
    save(tiny_switch(), place / "OTHER")
    assert run_main(*command("OTHER")) == 0


def tiny_modernbert() -> transformers.ModernBertDecoderForCausalLM:
    config = transformers.ModernBertDecoderConfig(
        **PLAIN, sep_token_id=EOS, cls_token_id=EOS, local_attention=8, global_attn_every_n_layers=2
    )
    return randomise(transformers.ModernBertDecoderForCausalLM(config), 1)


def test_a_decoder_without_a_configuration_of_its_own_is_measured_with_the_whole(place):
    save(tiny_modernbert(), place / "OTHER")
    assert run_main(*command("OTHER")) == 0


STATIC = {
    "a decoder of more layers than its encoder": tiny_switch,
    "windows": tiny_modernbert,
    "windows alone": lambda: randomise(
        transformers.MistralForCausalLM(transformers.MistralConfig(**SIZE, sliding_window=4)), 1
    ),
    "positions that leave out a token": lambda: tiny_m2m100(),
    "T5 with a deeper decoder": lambda: tiny_t5(num_decoder_layers=4),
    **{name: lambda name=name: BUILDERS[name]() for name in ("neox", "gemma2", "granite")},
}


@pytest.mark.parametrize("name", [*STATIC, "llama"])
def test_a_static_cache_samples_in_bfloat16_what_scoring_scores(name):
    """Under autocast rotary positions leave keys in float32, and values are in bfloat16."""
    policy = PolicyModel((STATIC | BUILDERS)[name](), mixed_precision=True)
    side = "right" if policy.is_encoder_decoder else "left"
    query_ids, query_mask = pad([[5, 4, 8], [4, 7, 2, 6, 9], [6], [2, 2]], 3, side)
    numbers = uniforms(3, "sampling", 0, (4, 12))
    drawn = sample(policy, query_ids, query_mask, numbers, eos_ids=[EOS], pad_id=3, static_cache=True)
    with eval_mode(policy):
        scored = policy.score(query_ids, query_mask, drawn.response_ids, drawn.mask)
    gaps = (scored.logprobs - drawn.logprobs)[drawn.mask].abs()
    assert drawn.mask.sum() > 8 and gaps.mean() < 0.02 and gaps.max() < 0.1


@pytest.mark.parametrize("name", STATIC)
def test_a_static_cache_changes_no_token(name):
    policy = PolicyModel(STATIC[name]())
    side = "right" if policy.is_encoder_decoder else "left"
    query_ids, query_mask = pad([[5, 4, 8], [4, 7, 2, 6, 9], [6], [2, 2], [4, 9, 4], [8, 8], [7], [5, 6, 7]], 3, side)
    numbers = uniforms(3, "sampling", 0, (8, 12))
    plain, static = (
        sample(policy, query_ids, query_mask, numbers, eos_ids=[EOS], pad_id=3, static_cache=each)
        for each in (False, True)
    )
    assert torch.equal(static.response_ids, plain.response_ids)
    assert_close(static.logprobs, plain.logprobs, atol=1e-5)


def test_a_model_that_a_static_cache_does_not_fit_is_refused_before_work_starts(place, capsys):
    """BLOOM's biases are as many as its mask has columns."""
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2, eos_token_id=EOS)
    save(randomise(transformers.BloomForCausalLM(config), 1), place / "OTHER")
    assert_refused(
        capsys, place, [*command("OTHER"), "--static_cache"], "--static_cache cannot be used with OTHER (bloom)"
    )
    assert run_main(*command("OTHER")) == 0
    capsys.readouterr()
    generate = ["--task", "generate", "--output_dir", "OUT", "--prompt", "ab"]
    assert_refused(capsys, place, [*generate, "--static_cache"], "--static_cache cannot be used with OUT (bloom)")


def test_a_model_that_is_misread_from_a_static_cache_is_refused(place, monkeypatch, capsys):
    """As one is whose prompt is told of the columns behind it: its mask is as wide as the cache from the start."""
    real = generate.first_inputs

    def too_wide(*arguments):
        inputs = real(*arguments)
        return inputs | {"attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (1, 0), value=1)[:, :-1]}

    monkeypatch.setattr(generate, "first_inputs", too_wide)
    assert_refused(
        capsys, place, [*command(), "--static_cache"], "--static_cache cannot be used with MODEL (llama): with it"
    )


def test_a_run_with_a_static_cache_is_the_run_without_and_goes_on_without(place):
    assert run_main(*command(output_dir="PLAIN")) == 0
    assert run_main(*command(), "--static_cache") == 0
    plain, static = (read_log(place / name) for name in ("PLAIN", "OUT"))
    assert [row["response"] for row in static] == [row["response"] for row in plain]
    assert run_main(*command(n_updates=3), "--resume", "--no-static_cache") == 0
    assert json.loads(Path("OUT/run_config.json").read_text())["static_cache"] is False


def test_a_family_that_does_not_leave_padding_out_is_refused():
    """RoFormer counts its positions from the first column, padding or not, and takes no others."""
    config = prepare_config(transformers.RoFormerConfig(**SIZE, is_decoder=True))
    policy = PolicyModel(randomise(transformers.RoFormerForCausalLM(config)))
    prompts = [Prompt("", ids, {}) for ids in ([5, 3, 8, 2, 9], [4, 7], [6], [2, 2, 10])]
    settings = Config(batch_size=4, mini_batch_size=4, max_new_tokens=8)
    with pytest.raises(RunError, match="three more columns of padding beside the prompts move a token's"):
        check_invariants(policy, Fixed(policy, letter_tokenizer(), {}), prompts, settings)


# ----------------------------------------------------------------------------------------------------------------
# Ends
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_ends(place):
    """The model's generation settings name 1 and 4, the letter c: as chat models do for a turn's end and a text's."""
    settings = transformers.GenerationConfig(eos_token_id=[EOS, 4], pad_token_id=PAD)
    settings.save_pretrained(place / "MODEL")
    return place


def test_every_end_that_the_generation_settings_name_ends_a_response(two_ends):
    policy = load_policy(Config(), "MODEL", CPU)
    tokenizer = load_tokenizer("MODEL")
    assert end_ids(policy.language_model, tokenizer) == [EOS, 4]
    assert run_main(*command(max_new_tokens=30, missing_eos_penalty=100)) == 0
    rows = read_log(two_ends / "OUT")
    responses = [row["response"] for row in rows]
    assert all(response.count("c") <= 1 for response in responses)
    with_c = [row for row in rows if row["response"].endswith("c")]
    assert len(with_c) > 4  # some end with 4, none goes on behind it
    assert all("c" not in response[:-1] for response in responses)
    assert min(row["ended"] for row in read_stats(two_ends / "OUT")) > 0.5


def test_both_ends_are_forbidden_before_the_least_length_and_stay_with_the_run(two_ends, capsys):
    assert run_main(*command()) == 0
    capsys.readouterr()
    generate = ["--task", "generate", "--output_dir", "OUT", "--prompt", "ab", "--num_samples", "20"]
    assert run_main(*generate, "--min_new_tokens", "12", "--max_new_tokens", "12") == 0
    responses = capsys.readouterr().out.splitlines()
    assert len(responses) == 20 and not any("c" in response for response in responses)
    assert max(len(response) for response in responses) == 14
    settings = transformers.GenerationConfig.from_pretrained("OUT")
    assert settings.eos_token_id == [EOS, 4]


def test_an_adapter_has_the_ends_and_the_tokenizer_saved_beside_it(two_ends):
    policy = new_policy(Config(lora_r=2), "MODEL", CPU)
    own = letter_tokenizer()
    own.chat_template = "the adapter's own"
    save_policy(policy, own, two_ends / "ADAPTER")
    transformers.GenerationConfig(eos_token_id=EOS).save_pretrained(two_ends / "MODEL")
    for loaded in (load_policy(Config(), "ADAPTER", CPU), new_policy(Config(peft_model_path="ADAPTER"), "MODEL", CPU)):
        assert end_ids(loaded.language_model, own) == [EOS, 4]
    assert load_tokenizer("MODEL", adapter="ADAPTER").chat_template == "the adapter's own"
    assert load_tokenizer("ADAPTER").chat_template == "the adapter's own"
    assert run_main(*command(peft_model_path="ADAPTER", n_updates=1)) == 0
    assert load_tokenizer("OUT").chat_template == "the adapter's own"  # by which the run was asked
    shutil.rmtree(two_ends / "PLAIN", ignore_errors=True)
    policy.language_model.save_pretrained("PLAIN")  # an adapter without a tokenizer
    assert load_tokenizer("MODEL", adapter="PLAIN").chat_template is None
    assert load_tokenizer("PLAIN").chat_template is None


def test_ends_beyond_the_vocabulary_are_none_and_ends_that_are_no_numbers_are_refused(two_ends):
    policy = load_policy(Config(), "MODEL", CPU)
    settings = policy.language_model.generation_config
    for named, expected in (([EOS, 50, -3], [EOS]), (4, [EOS, 4]), (None, [EOS]), ([], [EOS])):
        settings.eos_token_id = named
        assert end_ids(policy.language_model, letter_tokenizer()) == expected
    for named in ("1", ["x"], [[1]], {"q": 1}, -3.5):
        settings.eos_token_id = named
        with pytest.raises(UsageError, match=r"generation_config\.json: eos_token_id is .*, expected a number or"):
            end_ids(policy.language_model, letter_tokenizer())


def test_the_mask_ends_at_the_first_of_several_ends():
    ids = torch.tensor([[5, 4, 1, 7], [5, 1, 4, 4], [5, 6, 7, 8], [4, 4, 4, 4]])
    expected = [[True, True, False, False], [True, True, False, False], [True] * 4, [True, False, False, False]]
    assert ppo.response_mask(ids, torch.tensor([1, 4])).tolist() == expected


# ----------------------------------------------------------------------------------------------------------------
# Sizes
# ----------------------------------------------------------------------------------------------------------------

GEMMA3 = {
    "text_config": SIZE | {"head_dim": 16},
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"image_size": 28, "patch_size": 14},
    "mm_tokens_per_image": 4,
    "image_token_index": 10,
    "boi_token_index": 9,
    "eoi_token_index": 8,
}
OPT = {name: value for name, value in SIZE.items() if name not in ("intermediate_size", "num_key_value_heads")}
WIDE = {
    "gemma3 with eyes": (
        lambda: transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(**GEMMA3)),
        32,
    ),
    "opt-350m": (
        lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**OPT, ffn_dim=32, word_embed_proj_dim=16, do_layer_norm_before=False)
        ),
        16,
    ),
    "electra": (
        lambda: transformers.ElectraForCausalLM(transformers.ElectraConfig(**SIZE, embedding_size=16, is_decoder=True)),
        32,
    ),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_value_head_has_the_width_of_the_states_that_come_out(name, critic, place):
    build, width = WIDE[name]
    save(randomise(build(), 1), place / "OTHER")
    assert run_main(*command("OTHER", critic=critic)) == 0
    policy = load_policy(Config(), "OUT", CPU)
    assert policy.value_head.in_features == width
    response = [5, 3, 7, 1]
    ids, mask = torch.tensor([[4, 6]]), torch.ones(1, 2, dtype=torch.bool)
    response_ids = torch.tensor([response])
    scored = policy.score(query_ids=ids, query_mask=mask, response_ids=response_ids, response_mask=response_ids > 0)
    logprobs, values, _ = brute_force(policy, [4, 6], response, 1.0)
    assert_close(scored.logprobs[0], logprobs, atol=1e-4)
    if critic == "shared":
        assert_close(scored.values[0], values, atol=1e-4)


def test_an_idle_special_token_beyond_the_embedding_is_no_harm_until_a_text_holds_it(place, capsys):
    """As Gemma-3-1b ships: 262,145 tokens, of which the model embeds 262,144."""
    tokenizer = letter_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained("MODEL")
    assert len(tokenizer) == VOCAB + 1
    assert run_main(*command()) == 0
    capsys.readouterr()
    loaded = load_tokenizer("MODEL")
    assert bare_ids(["abc"], loaded) == [[2, 3, 4]]
    with pytest.raises(UsageError, match="the text 'ab<image>' holds the special token <image>, which the model does"):
        bare_ids(["ab<image>"], loaded)
    tokenizer.add_tokens([AddedToken("zz", special=False)])
    tokenizer.save_pretrained("MODEL")
    assert_refused(capsys, place, command(output_dir="OUT2"), "its tokenizer has 13 tokens, its model embeds 11")


# ----------------------------------------------------------------------------------------------------------------
# What is saved is what was trained
# ----------------------------------------------------------------------------------------------------------------

TIED = {
    "llama": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "t5": tiny_t5,
}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["lm_head"]),
        ("llama", ["embed_tokens"]),
        ("llama", ["lm_head", "embed_tokens", "q_proj"]),
        ("gpt2", ["lm_head"]),
        ("gpt2", ["wte"]),
        ("t5", ["lm_head"]),
        ("t5", ["embed_tokens"]),
    ],
)
def test_an_adapter_on_tied_weights_is_merged_into_one_of_the_two(family, targets, tmp_path):
    """And what is loaded again, by us and by transformers, gives the trained policy's log-probabilities."""
    settings = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    policy = PolicyModel(peft.get_peft_model(TIED[family](), settings)).eval()
    trained = logprobs(policy)
    assert_close(logprobs(PolicyModel(merged(policy.language_model))), trained, atol=1e-4)
    assert torch.equal(logprobs(policy), trained)
    save_policy(policy, letter_tokenizer(), tmp_path / "run", merge=True)
    assert_close(logprobs(load_policy(Config(), str(tmp_path / "run"), CPU)), trained, atol=1e-4)


@pytest.mark.parametrize("merge", [False, True])
def test_a_saved_policy_that_is_another_is_told_of(merge, tmp_path, capsys):
    """As it is with weights that were changed behind the run's back; an adapter is then saved as it was trained."""
    save(tiny_gpt2(), tmp_path / "base")
    config = Config(lora_r=2, merge=merge, mini_batch_size=2, max_new_tokens=8)
    policy = new_policy(config, str(tmp_path / "base"), CPU).eval()
    shake(policy)
    fixed = Fixed(policy, letter_tokenizer(), {})
    prompts = [Prompt("", [5, 3, 8], {}), Prompt("", [4], {})]
    save_policy(policy, letter_tokenizer(), tmp_path / "run", merge)
    check_saved(policy, fixed, prompts, config, tmp_path / "run")
    assert capsys.readouterr().out == ""
    shake(policy, 0.2)
    check_saved(policy, fixed, prompts, config, tmp_path / "run")
    told = capsys.readouterr().out
    assert told.startswith(f"warning: the policy in {tmp_path}/run is not the trained one: log-probabilities differ by")
    assert (tmp_path / "run/adapter").exists() == merge == (f"the adapter, not merged, is in {tmp_path}/run/ad" in told)
    if merge:
        again = load_policy(Config(), str(tmp_path / "run/adapter"), CPU)
        assert torch.equal(logprobs(again), logprobs(policy))


@pytest.mark.parametrize("settings", [{}, {"critic": "separate"}, {"lora_r": 2}, {"lora_r": 2, "merge": True}])
def test_a_run_looks_at_what_it_saved(settings, place, monkeypatch, capsys):
    """Also where the policy of another update than the last is kept."""
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items()]
    assert run_main(*command(learning_rate=0.01, eval_every=1), *flags) == 0
    assert "warning" not in capsys.readouterr().out
    real = save_policy

    def damaged(policy, *others, **named):
        real(policy, *others, **named)
        with torch.no_grad():
            policy.language_model.get_input_embeddings().weight.add_(0.5)

    monkeypatch.setattr("run.save_policy", damaged)
    assert run_main(*command(output_dir="OUT2"), *flags) == 0
    assert "warning: the policy in OUT2 is not the trained one" in capsys.readouterr().out


def test_an_adapter_that_cannot_be_folded_in_is_refused_before_training(place, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained("MODEL")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    peft.get_peft_model(model, settings).save_pretrained("ADAPTER")
    flags = [*command(peft_model_path="ADAPTER"), "--merge"]
    assert_refused(capsys, place, flags, "--merge cannot fold this adapter in: Impossible to merge LoRA")
    assert run_main(*command(peft_model_path="ADAPTER")) == 0


def tiny_m2m100() -> transformers.M2M100ForConditionalGeneration:
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    size = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    ids = {"pad_token_id": 3, "bos_token_id": 2, "eos_token_id": EOS, "decoder_start_token_id": EOS}
    settings = transformers.M2M100Config(
        vocab_size=VOCAB, max_position_embeddings=64, init_std=0.5, **size, **heads, **ids
    )
    return transformers.M2M100ForConditionalGeneration(prepare_config(settings)).eval()


def test_a_token_behind_which_sampling_and_scoring_would_differ_is_never_drawn():
    """M2M100's positions leave the pad token out, and its cache counts it."""
    policy = PolicyModel(tiny_m2m100())
    assert policy.undrawable == [3] and PolicyModel(tiny_t5()).undrawable == PolicyModel(tiny_gpt2()).undrawable == []
    queries, mask = pad([[5, 4, 8, 2, 9], [4, 7]] * 50, 3, "right")
    drawn = sample(policy, queries, mask, uniforms(0, "sampling", 0, (100, 12)), eos_ids=[EOS], pad_id=3)
    scored = policy.score(queries, mask, drawn.response_ids, drawn.mask, with_entropy=True)
    assert_close(scored.logprobs[drawn.mask], drawn.logprobs[drawn.mask], atol=1e-5)
    assert not (drawn.response_ids == 3)[drawn.mask].any()
    every = torch.arange(VOCAB)[:, None]  # as a first token
    first = policy.score(queries[:1].repeat(VOCAB, 1), mask[:1].repeat(VOCAB, 1), every, every >= 0, with_entropy=True)
    probabilities = first.logprobs[:, 0].exp()
    assert probabilities[3] == 0 and abs(probabilities.sum() - 1) < 1e-5
    assert_close(first.entropy[0, 0], -torch.special.xlogy(probabilities, probabilities).sum(), atol=1e-5)


def test_completions_beyond_the_context_are_refused(place, capsys):
    rows = [{"text": "abc" * 20, "answer": "de" * 6} for _ in range(40)]
    Path("long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(tiny_gpt2(), place / "GPT2")
    flags = ["--task", "sft", "--base_model_name", "GPT2", "--dataset_path", "long.jsonl", "--sft_steps", "2"]
    flags += ["--completion_column", "answer"]
    assert_refused(capsys, place, flags, "the longest prompt and completion have 73 tokens, and the model can read 64")
    assert run_main(*flags, "--max_prompt_length", "51") == 0


def test_a_run_is_itself_though_a_newer_folder_in_it_holds_a_policy(place):
    """As the adapter beside a model that it could not be folded into."""
    assert run_main(*command(lora_r=2)) == 0
    save_policy(load_policy(Config(), "OUT", CPU), letter_tokenizer(), place / "OUT/adapter")
    assert run_main("--task", "generate", "--output_dir", "OUT", "--prompt", "abc") == 0


def test_what_stands_beyond_a_response_is_no_difference(tmp_path, monkeypatch):
    save(tiny_gpt2(), tmp_path)
    policy = new_policy(Config(), str(tmp_path), CPU)
    real = generate.score_in_passes

    def with_junk(one, **batch):
        outputs = real(one, **batch)
        junk = torch.where(batch["response_mask"], 0.0, torch.rand(outputs.logprobs.shape) * 100)
        return outputs._replace(logprobs=outputs.logprobs + junk)

    monkeypatch.setattr(generate, "score_in_passes", with_junk)
    config = Config(max_new_tokens=12, mini_batch_size=8)
    prompts = [Prompt("", [n], {}) for n in range(2, 10)]
    assert preflight.gap_of_policies(policy, policy, Fixed(policy, letter_tokenizer(), {}), prompts, config).most < 1e-5


def test_a_run_without_memory_for_the_comparison_has_saved_its_policy(place, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("run.load_policy", full)
    assert run_main(*command()) == 0
    out = capsys.readouterr().out
    assert "the policy in OUT could not be loaded again and compared: CUDA out of memory" in out and "now try" in out


# ----------------------------------------------------------------------------------------------------------------
# The true reason
# ----------------------------------------------------------------------------------------------------------------

PROMPT_TUNING = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
}


@pytest.mark.parametrize("kind", PROMPT_TUNING)
def test_an_adapter_that_changes_no_weights_is_refused_as_what_it_is(kind, place, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained("MODEL")
    peft.get_peft_model(model, PROMPT_TUNING[kind]()).save_pretrained("ADAPTER")
    words = f"--peft_model_path ADAPTER is of the kind {kind}, which puts vectors of its own before every text"
    assert_refused(capsys, place, command(peft_model_path="ADAPTER"), words)


def test_an_adapter_of_a_model_with_more_tokens_does_not_fit(place, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained("MODEL")
    model.resize_token_embeddings(VOCAB + 5)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft.get_peft_model(model, settings).save_pretrained("ADAPTER")
    words = "--peft_model_path ADAPTER is an adapter that does not fit MODEL"
    assert_refused(capsys, place, command(peft_model_path="ADAPTER"), words, "size mismatch")


def test_an_adapter_is_no_reward_model(place, capsys):
    make_adapter(place / "ADAPTER")
    words = f"--reward_model_path ADAPTER is an adapter of {place}/MODEL without a classifier's config.json"
    assert_refused(capsys, place, command(reward_fn="", reward_model_path="ADAPTER"), words)


def test_an_encoder_decoder_without_a_start_is_refused(place, capsys):
    model = tiny_t5()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    save(model, place / "OTHER")
    words = "--base_model_name OTHER (t5): its configuration has no decoder_start_token_id to begin with"
    assert_refused(capsys, place, command("OTHER"), words)


def test_a_model_that_cannot_be_run_is_refused_in_a_sentence(place, monkeypatch, capsys):
    def broken(self, *_, **__):
        raise RuntimeError("shape '[1, 1, 32]' is invalid\nfor input")

    monkeypatch.setattr(PolicyModel, "read", broken)
    words = "--base_model_name MODEL cannot be run: shape '[1, 1, 32]' is invalid"
    assert_refused(capsys, place, command(), words)


def test_a_policy_that_starts_from_its_own_run_goes_on(place):
    """Base, adapter and value head from one folder, by --base_model_name alone."""
    assert run_main(*command(lora_r=2, learning_rate=0.01)) == 0
    saved, start = load_policy(Config(), "OUT", CPU), new_policy(Config(lora_r=2), "OUT", CPU)
    assert all(torch.equal(weight, start.state_dict()[name]) for name, weight in saved.state_dict().items())
    assert start.value_head.weight.any()
    assert run_main(*command("OUT", output_dir="OUT2", learning_rate=0.01, lora_r=2)) == 0
    first, second = (load_policy(Config(), folder, CPU) for folder in ("OUT", "OUT2"))
    assert set(first.state_dict()) == set(second.state_dict())
    assert tiny_policy("llama").state_dict().keys() < {
        name.replace("base_model.model.", "").replace(".base_layer", "") for name in second.state_dict()
    }
