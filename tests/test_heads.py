"""Reward models of every kind: a text's reward is its own, by the head's own nonlinearity, on the text it learned."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers import assert_close, read_log, read_table
from micro import micro_config, run_main
from test_any_model import command, place  # noqa: F401  a fixture
from tiny_models import BUILDERS, letter_tokenizer, randomise, tiny_llama
from tokenizers import processors
from transformers import AutoModelForSequenceClassification

import classifier
import reward_model
from classifier import pair_batches
from config import Config, RunError, UsageError
from loading import load_tokenizer
from probe import context_length
from reward import load_reward_terms
from reward_model import joined, length_batches, load_reward_model, padding_is_harmless, reward_from_logits, text_logits
from sft import new_tokenizer

pytest_plugins = ["micro"]
pytestmark = pytest.mark.usefixtures("no_figures", "no_bars")
CPU = torch.device("cpu")
VOCAB = 280
PAD = 1  # of the tokenizer below
SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 2, "pad_token_id": PAD, "num_labels": 2}
POSITIONS = SIZE | {"max_position_embeddings": 80}
XLNET = {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32, "pad_token_id": PAD}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": VOCAB}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "eos_token_id": 0}
BART |= {"max_position_embeddings": 80, "pad_token_id": PAD}
GPT2 = {"vocab_size": VOCAB, "n_positions": 80, "n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": PAD}
HEADS = {
    "gpt2": transformers.GPT2Config(**GPT2),
    "gpt-neo": transformers.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        max_position_embeddings=80,
        pad_token_id=PAD,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global"], 2]],
    ),
    "llama": transformers.LlamaConfig(**POSITIONS),
    "opt": transformers.OPTConfig(**POSITIONS, ffn_dim=32),
    "bloom": transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=2, pad_token_id=PAD),
    "bert": transformers.BertConfig(**POSITIONS),
    "roberta": transformers.RobertaConfig(**POSITIONS),
    "mpnet": transformers.MPNetConfig(**POSITIONS),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=VOCAB, dim=32, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=80, pad_token_id=PAD
    ),
    "electra": transformers.ElectraConfig(**POSITIONS, embedding_size=16),
    "deberta-v2": transformers.DebertaV2Config(**POSITIONS, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "bart": transformers.BartConfig(**BART),
    "t5": transformers.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=PAD,
        eos_token_id=0,
        decoder_start_token_id=PAD,
    ),
    # the last column, padding or not; the whole row's frequencies; neighbours
    "xlnet": transformers.XLNetConfig(**XLNET),
    "fnet": transformers.FNetConfig(**POSITIONS),
    "convbert": transformers.ConvBertConfig(**POSITIONS, conv_kernel_size=3, embedding_size=32),
}
MIXERS = ("xlnet", "fnet", "convbert")  # whose texts share a pass only with those of the same length
TEXTS = ["b", "a longer text than that", "ccc", "dd dd", "abcdefghij", "", "dd dd e"]


def save_head(name: str, folder: Path, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(HEADS[name]))
    randomise(model, 3)
    for key, value in settings.items():
        setattr(model.config, key, value)
    model.save_pretrained(folder)
    tokenizer = new_tokenizer(["zz"], 300, 1000)
    ends = [("<|endoftext|>", 0)] if name in ("bart", "t5") else []
    if ends:  # their heads read the state at the end of the text
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|endoftext|>", special_tokens=ends
        )
    tokenizer.save_pretrained(folder)
    return model


def settings(**changes) -> Config:
    return micro_config(**{"reward_label": "1", "reward_output": "logit"} | changes)


@pytest.mark.parametrize("name", HEADS)
def test_a_texts_reward_does_not_depend_on_those_beside_it(name, tmp_path, monkeypatch):
    """Oracle: the model alone on the text's ids, without a mask. In any batch, order and side of padding, whatever the
    tokenizer pads with."""
    model = save_head(name, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), "reward_model_path", writes=False)
    expected = []
    with torch.no_grad():
        for text in TEXTS:
            expected.append(model(torch.tensor([tokenizer(text or " ").input_ids])).logits[0, 1].item())
    assert torch.tensor(expected).std() > 0.02
    for side, pad_token in (("right", "<|pad|>"), ("left", "<|pad|>"), ("left", "<|endoftext|>")):
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": side, "pad_token": pad_token}))
        rewards = load_reward_model(settings(), str(tmp_path), CPU)
        assert_close(rewards(TEXTS), expected, atol=1e-4)
        assert_close(rewards(TEXTS[::-1]), expected[::-1], atol=1e-4)
        assert_close(torch.cat([rewards([text]) for text in TEXTS]), expected, atol=1e-4)
        monkeypatch.setattr("reward_model.text_logits", lambda *a, **k: text_logits(*a, **k | {"batch_size": 3}))
        assert_close(rewards(TEXTS), expected, atol=1e-4)
        monkeypatch.undo()


@pytest.mark.parametrize("name", HEADS)
def test_only_heads_that_padding_would_disturb_do_without(name, tmp_path):
    model = save_head(name, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), "reward_model_path", writes=False)
    assert padding_is_harmless(model, tokenizer) == (name not in MIXERS)


@pytest.mark.parametrize("pad_id", [None, -1, VOCAB + 7, 5])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neo"])
def test_a_configurations_pad_id_may_be_none_beyond_the_embedding_or_another_than_the_tokenizers(
    pad_id, name, tmp_path
):
    """The head finds a text's last token by it: none of its texts may end in another place in a batch than alone."""
    model = save_head(name, tmp_path, pad_token_id=pad_id)
    model.config.pad_token_id = PAD if pad_id is None or not 0 <= pad_id < VOCAB else pad_id
    tokenizer = load_tokenizer(str(tmp_path), "reward_model_path", writes=False)
    texts = [text for text in TEXTS if text]
    with torch.no_grad():
        expected = [model(torch.tensor([tokenizer(text).input_ids])).logits[0, 1].item() for text in texts]
    rewards = load_reward_model(settings(), str(tmp_path), CPU)
    assert_close(rewards(texts), expected, atol=1e-4)


def test_texts_of_one_length_share_a_pass():
    lengths = [3, 5, 3, 3, 5, 7]
    assert length_batches(lengths, 2, equal=True) == [[0, 2], [3], [1, 4], [5]]
    assert length_batches(lengths, 4, equal=False) == [[0, 2, 3, 1], [4, 5]]


# ----------------------------------------------------------------------------------------------------------------
# Nonlinearities
# ----------------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([[2.0, -0.1885, 1.5]])
INDEPENDENT = {"logit": -0.1885, "probability": 0.4530140, "logprob": -0.7918322, "margin": -0.1885}
EXCLUSIVE = {"logit": -0.1885, "probability": 0.0652181, "logprob": -2.7300190, "margin": -2.6625770}


@pytest.mark.parametrize("output", INDEPENDENT)
def test_labels_that_may_all_be_true_have_a_sigmoid_each(output):
    """By hand: σ(-.1885) = .453; beside exp(2) and exp(1.5), a softmax would give .065."""
    assert_close(
        reward_from_logits(LOGITS, 1, output, problem_type="multi_label_classification"),
        [INDEPENDENT[output]],
        atol=1e-5,
    )
    assert_close(reward_from_logits(LOGITS, 1, output), [EXCLUSIVE[output]], atol=1e-5)


@pytest.mark.parametrize("problem_type", [None, "single_label_classification", "multi_label_classification"])
def test_the_configuration_says_which_nonlinearity_is_the_heads_own(problem_type, tmp_path):
    model = save_head("bert", tmp_path, problem_type=problem_type)
    tokenizer = load_tokenizer(str(tmp_path), "reward_model_path", writes=False)
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("a film").input_ids])).logits[0]
    expected = logits.sigmoid()[1] if problem_type == "multi_label_classification" else logits.softmax(-1)[1]
    rewards = load_reward_model(settings(reward_output="probability"), str(tmp_path), CPU)
    assert_close(rewards(["a film"])[0], expected)


def test_a_classifier_that_gives_no_number_is_named(tmp_path):
    model = save_head("bert", tmp_path)
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    rewards = load_reward_model(settings(), str(tmp_path), CPU)
    with pytest.raises(RunError, match=f"--reward_model_path {tmp_path} gives nan for 'a film', expected a finite"):
        rewards(["a film"])


# ----------------------------------------------------------------------------------------------------------------
# The text that was learned
# ----------------------------------------------------------------------------------------------------------------


def test_pairs_are_scored_in_ppo_as_they_were_learned(place, capsys):  # noqa: F811
    """The same logits for the same prompt and answer, whatever policy wrote it; a classifier from elsewhere reads what
    the policy's own text is."""
    rows = [{"text": "abc", "chosen": "de" * (1 + n % 3), "rejected": "fg"} for n in range(40)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    letters = letter_tokenizer()
    letters.add_tokens(["\n"])
    tiny_llama(vocab_size=12).save_pretrained("MODEL")
    letters.save_pretrained("MODEL")
    arguments = ["--base_model_name", "MODEL", "--dataset_path", "pairs.jsonl", "--chosen_column", "chosen"]
    assert run_main("--task", "reward", *arguments, "--reward_steps", "3", "--output_dir", "REWARD") == 0
    assert json.loads(Path("REWARD/config.json").read_text())["prompt_response_separator"] == "\n"
    model = AutoModelForSequenceClassification.from_pretrained("REWARD")
    tokenizer = load_tokenizer("REWARD", "reward_model_path", writes=False)
    learned = text_logits(model, tokenizer, joined(["abc", "abc"], ["de", "dede"], "\n"))[:, 0]
    for separator in ("", "\n"):
        (term,) = load_reward_terms(micro_config(reward_model_path="REWARD"), "REWARD", CPU, separator).values()
        assert_close(term(["abc", "abc"], ["de", "dede"], [{}, {}]), learned)
    without = text_logits(model, tokenizer, ["abcde"])[0, 0]
    assert abs(without - learned[0]) > 1e-3
    capsys.readouterr()


@pytest.mark.parametrize(("family", "between"), [("llama", ""), ("t5", "\n")])
def test_prompt_and_response_are_scored_with_what_stands_between_them_for_the_policy(family, between, place):  # noqa: F811
    """In training, evaluation and generation: by a classifier that reads a line's end, against its own logits."""
    letters = letter_tokenizer()
    letters.add_tokens(["\n"])
    config = transformers.GPT2Config(vocab_size=len(letters), n_embd=32, n_layer=1, n_head=2, pad_token_id=0)
    model = randomise(transformers.GPT2ForSequenceClassification(config), 2)
    model.save_pretrained("REWARD")
    letters.save_pretrained("REWARD")
    BUILDERS[family]().save_pretrained("MODEL")
    assert run_main(*command(reward_fn="", reward_model_path="REWARD")) == 0
    assert run_main("--task", "evaluate", "--output_dir", "OUT") == 0
    asked = ["--prompt", "abc", "--prompt", "hi", "--output", "out.jsonl"]
    assert run_main("--task", "generate", "--output_dir", "OUT", *asked) == 0
    scored = [(row["query"], row["response"], row["reward"]) for row in read_log(place / "OUT")]
    table = read_table(place / "OUT/results/test_results_p.csv")
    scored += [(row["query"], row["response_after"], row["reward_after"]) for row in table]
    lines = Path("out.jsonl").read_text().splitlines()
    scored += [tuple(json.loads(line)[name] for name in ("prompt", "response", "reward")) for line in lines]
    assert len(scored) == 16 + 4 + 2
    for prompt, response, found in scored:
        expected = text_logits(model, letters, [prompt + between + response])[0, 1].item()
        assert float(found) == pytest.approx(expected, abs=1e-4)
        other = text_logits(model, letters, [prompt + {"": "\n", "\n": ""}[between] + response])[0, 1].item()
        assert abs(other - expected) > 1e-3


def test_a_long_text_of_a_reward_model_keeps_its_first_special_token(tmp_path):
    """BERT's head reads the state at [CLS]; in training and in PPO the same ids."""
    tokenizer = new_tokenizer(["zz"], 300, 1000)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|pad|>", special_tokens=[("<|endoftext|>", 0), ("<|pad|>", 1)]
    )
    rows = [{"text": "abcdefgh", "chosen": "ij", "rejected": "kl"}]
    config = micro_config(chosen_column="chosen", reward_batch_size=1)
    batch = next(pair_batches(rows=rows, config=config, tokenizer=tokenizer, length=6, device=CPU))
    bare = tokenizer("abcdefgh\nij", add_special_tokens=False).input_ids
    assert batch["input_ids"][0].tolist() == [0, *bare[-4:], 1]
    read = []

    class Watching:
        device = CPU
        config = transformers.PretrainedConfig(num_labels=2, pad_token_id=1)

        def __call__(self, input_ids, attention_mask):
            read.append(input_ids[0].tolist())
            return transformers.modeling_outputs.SequenceClassifierOutput(logits=torch.zeros(len(input_ids), 2))

    tokenizer.model_max_length = 6
    text_logits(Watching(), tokenizer, ["abcdefgh\nij"])
    assert read == [[0, *bare[-4:], 1]]


@pytest.mark.parametrize("name", ["roberta", "mpnet", "bert", "gpt2"])
def test_a_text_at_the_limit_is_read(name, tmp_path):
    model = save_head(name, tmp_path)
    rewards = load_reward_model(settings(), str(tmp_path), CPU)
    limit = context_length(model)
    assert limit == (78 if name in ("roberta", "mpnet") else 80)
    end = "x" * (limit - 1)
    assert rewards(["b" + end])[0] == rewards(["a" * 50 + "b" + end])[0]
    assert rewards(["b" + end])[0] != rewards(["c" + end])[0]


def test_an_unknown_label_is_refused_before_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somewhere"}))
    with pytest.raises(UsageError, match=r"is an adapter of somewhere without a classifier's config\.json"):
        load_reward_model(settings(reward_label="nothing"), str(tmp_path), CPU)


def test_a_run_is_rewarded_by_a_classifier_that_pads_on_the_left(place):  # noqa: F811
    """Each logged reward is the classifier's on that text alone."""
    tokenizer = letter_tokenizer()
    tokenizer.padding_side = "left"
    config = transformers.GPT2Config(vocab_size=11, n_positions=64, n_embd=32, n_layer=2, n_head=2, pad_token_id=0)
    model = randomise(transformers.GPT2ForSequenceClassification(config), 2)
    model.save_pretrained("REWARD")
    tokenizer.save_pretrained("REWARD")
    assert run_main(*command(reward_fn="", reward_model_path="REWARD")) == 0
    for row in read_log(place / "OUT"):
        ids = letter_tokenizer()(row["query"] + row["response"]).input_ids
        with torch.no_grad():
            alone = model(torch.tensor([ids])).logits[0, 1].item()
        assert float(row["reward"]) == pytest.approx(alone, abs=1e-4)


def test_a_classifier_is_read_without_dropout_and_in_float32_however_it_was_stored(tmp_path):
    model = save_head("bert", tmp_path, hidden_dropout_prob=0.5, classifier_dropout=0.5)
    tokenizer = load_tokenizer(str(tmp_path), "reward_model_path", writes=False)
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("a film").input_ids])
    with torch.no_grad():
        exact = model.float().eval()(ids).logits[0, 1]
        coarse = model.to(torch.bfloat16)(ids).logits[0, 1]
    rewards = load_reward_model(settings(), str(tmp_path), CPU)
    assert_close(rewards(["a film"])[0], exact)
    assert abs(coarse.float() - exact) > 1e-4


def test_a_classifier_in_8_bits_reads_a_text_at_a_time(tmp_path, monkeypatch):
    """Its products round by the largest numbers of the whole batch."""
    save_head("bert", tmp_path)
    seen = []
    monkeypatch.setattr("reward_model.quantized", lambda *_, **__: {})
    real = reward_model.text_logits
    monkeypatch.setattr(
        reward_model, "text_logits", lambda *a, **k: (seen.append(k.get("batch_size")), real(*a, **k))[1]
    )
    for in_8bit in (False, True):
        load_reward_model(settings(reward_in_8bit=in_8bit), str(tmp_path), CPU)(["a", "b"])
    assert seen == [None, 1]


@pytest.mark.parametrize("names", [{0: "a", 5: "b"}, {0: "a", 1: 2}])
def test_labels_that_are_no_names_of_the_logits_are_refused(names):
    with pytest.raises(UsageError, match=r"id2label is .*, expected a name for each of 0, 1"):
        reward_model.label_index(names, "a")


def test_a_label_in_its_own_case_comes_first():
    labels = {0: "x", 1: "X", 2: "y"}
    assert [reward_model.label_index(labels, name) for name in ("x", "X", "Y", "2")] == [0, 1, 2, 2]


@pytest.mark.parametrize("name", ["fnet", "bert"])
def test_an_encoder_is_trained_and_judged_as_ppo_will_read_it(name, place, monkeypatch, capsys):  # noqa: F811
    """With its closing special token, without an EOS; the held-out logits are those of the reward in PPO."""
    tokenizer = new_tokenizer(["zz"], 300, 1000)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|pad|>", special_tokens=[("<|endoftext|>", 0), ("<|pad|>", 1)]
    )
    tokenizer.eos_token = None
    config = copy.deepcopy(HEADS[name])
    config.problem_type = "multi_label_classification"  # of what it was used for before
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained("BASE")
    tokenizer.save_pretrained("BASE")
    rows = [{"text": ("good " if n % 2 else "bad ") * (1 + n % 7), "label": n % 2} for n in range(80)]
    rows += [{"text": "", "label": n % 2} for n in range(40)]  # of which no batch may consist
    Path("lab.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = []
    real = classifier.text_logits
    monkeypatch.setattr(
        classifier,
        "text_logits",
        lambda m, t, texts, **k: (judged.append((texts, real(m, t, texts, **k))), judged[-1][1])[1],
    )
    arguments = ["--base_model_name", "BASE", "--dataset_path", "lab.jsonl", "--reward_batch_size", "4"]
    arguments += ["--reward_steps", "30", "--reward_learning_rate", "1e-3", "--output_dir", "REWARD"]
    assert run_main("--task", "reward", *arguments) == 0
    loaded = load_tokenizer("REWARD", "reward_model_path", writes=False)
    assert loaded("a").input_ids[-1] == 1
    texts, logits = judged[0]
    assert_close(load_reward_model(settings(), "REWARD", CPU)(texts), logits[:, 1], atol=1e-4)
