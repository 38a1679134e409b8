"""The stages before PPO: their batches, their loss, and what they measure."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from micro import micro_config, review_texts
from tiny_models import tiny_policy
from torch import nn
from transformers import AutoTokenizer

import sft
from config import RunError, UsageError
from dataset import pad
from fitting import IGNORED, fit, length_grouped, n_steps, own_loss
from loading import load_language_model
from sft import Example, language_batch, new_language_model, perplexity, run_sft, token_pieces, train_language_model

pytest_plugins = ["micro"]
CPU = torch.device("cpu")


@pytest.fixture
def language_model(tokenizer):
    torch.manual_seed(0)
    return new_language_model(micro_config(), tokenizer).eval()


def pieces_of(texts: list[str], tokenizer, length: int) -> list[list[int]]:
    examples = token_pieces(texts, tokenizer, length)
    assert all(example.prompt == [] for example in examples)
    return [example.completion for example in examples]


def without_prompt(pieces: list[list[int]]) -> list[Example]:
    return [Example([], piece) for piece in pieces]


# ----------------------------------------------------------------------------------------------------------------
# Pieces and batches
# ----------------------------------------------------------------------------------------------------------------


def test_pieces_are_the_texts_with_eos_cut_at_the_length(tokenizer):
    texts = review_texts(20)
    end = tokenizer.eos_token_id
    whole = [[*tokenizer(text).input_ids, end] for text in texts]
    assert pieces_of(texts, tokenizer, 10_000) == whole
    pieces = pieces_of(texts, tokenizer, 7)
    expected = []
    for ids in whole:
        starts = [start for start in range(0, len(ids), 7) if start + 7 <= len(ids)]
        expected += [ids[start : start + 7] for start in starts]
        if len(ids) % 7:
            expected.append(ids[-7:])  # the last piece reaches back
    assert pieces == [piece for piece in expected if len(piece) > 1]
    assert sum(piece[-1] == end for piece in pieces) == 20


def test_a_text_without_tokens_is_left_out(tokenizer):
    (ids,) = pieces_of(["The film"], tokenizer, 100)
    assert pieces_of(["The film", ""], tokenizer, 100) == [ids]
    assert pieces_of(["The film"], tokenizer, len(ids) - 1) == [ids[:-1], ids[1:]]


def test_language_batches_ignore_padding_and_nothing_else(tokenizer):
    """Worked by hand, with a pad id that is also a real token."""
    batch = language_batch(without_prompt([[5, 6, 7], [8, 0]]), 0, False, CPU)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, 0, IGNORED]]


def test_padding_leaves_the_loss_alone(language_model):
    """A short piece beside a long one: their token mean is that of the two computed alone."""
    pieces = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14]]
    alone = [language_model(**language_batch(without_prompt([piece]), 1, False, CPU)).loss.item() for piece in pieces]
    both = language_model(**language_batch(without_prompt(pieces), 1, False, CPU)).loss.item()
    assert both == pytest.approx((6 * alone[0] + 2 * alone[1]) / 8, abs=1e-5)


@pytest.mark.parametrize(("n", "batch_size"), [(100, 7), (64, 8), (5, 9), (700, 3)])
def test_every_text_comes_once_a_pass_in_batches_of_like_length(n, batch_size):
    lengths = torch.randint(1, 50, (n,), generator=torch.Generator().manual_seed(0)).tolist()
    batches = length_grouped(lengths, batch_size, seed=0)
    number = math.ceil(n / batch_size)
    for _ in range(3):
        drawn = [next(batches) for _ in range(number)]
        assert sorted(i for batch in drawn for i in batch) == list(range(n))
        assert max(map(len, drawn)) <= batch_size
        if n <= 32 * batch_size:  # one pool: no two batches overlap in length
            spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in drawn)
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_length_grouped_changes_the_order_and_repeats_with_its_seed():
    def draw(seed: int) -> list[list[int]]:
        batches = length_grouped(list(range(40)), 4, seed)
        return [next(batches) for _ in range(20)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    first_pass = draw(0)[:10]
    second_pass = draw(0)[10:]
    assert first_pass != second_pass
    assert first_pass != sorted(first_pass)


def test_texts_of_one_length_are_batched_with_others_in_each_pass():
    """The texts are shuffled before they are sorted, so that a batch is not always of the same ones."""
    batches = length_grouped([5] * 40, 4, seed=0)
    first_pass = {frozenset(next(batches)) for _ in range(10)}
    second_pass = {frozenset(next(batches)) for _ in range(10)}
    assert first_pass.isdisjoint(second_pass)


# ----------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------


class Line(nn.Module):
    """loss = w: Adam moves w by the learning rate in every step, whatever the gradient's size."""

    device = CPU

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.seen = []
        self.modes = []

    def forward(self, scale: float, attention_mask: torch.Tensor):
        self.seen.append(self.w.item())
        self.modes.append(self.training)
        return SimpleNamespace(loss=self.w * scale)


def test_fit_warms_up_for_a_tenth_and_falls_to_zero():
    """20 steps at peak 1e-3: a half and the whole of it, then 18/18, 17/18, ... 1/18. In train mode, which a model that
    was loaded is not in, and by gradients that are cut to a norm of 1."""
    line = Line().eval()
    fit(line, iter([{"scale": 3.0, "attention_mask": torch.ones(1, 1)}] * 20), 20, 1e-3, "line")
    moves = [a - b for a, b in zip(line.seen, [*line.seen[1:], line.w.item()], strict=True)]
    assert moves == pytest.approx([5e-4, 1e-3, *(1e-3 * k / 18 for k in range(18, 0, -1))], abs=2e-6)
    assert all(line.modes) and not line.training
    assert line.w.grad.item() == pytest.approx(1.0, abs=1e-5)  # 3 before


def test_the_order_of_texts_is_drawn_by_the_seed(tokenizer, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        sft, "fit", lambda model, batches, *_, **named: drawn.append(next(batches)["input_ids"].tolist())
    )
    rows = [{"text": text} for text in review_texts(20)]
    for seed in (0, 0, 1):
        train_language_model(micro_config(seed=seed, sft_batch_size=2), rows, tokenizer, "language model")
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_loss_falls_on_a_text_that_is_memorised(language_model, tokenizer):
    pieces = pieces_of(["The film is about a lonely librarian.", "I left the cinema early."], tokenizer, 48)
    before = perplexity(language_model, without_prompt(pieces), tokenizer.pad_token_id)
    batch = language_batch(without_prompt(pieces), tokenizer.pad_token_id, False, CPU)
    recent = fit(language_model, iter([batch] * 150), 150, 3e-2, "memory")
    after = perplexity(language_model, without_prompt(pieces), tokenizer.pad_token_id)
    assert before > 100 and after < 1.5
    assert recent < math.log(before) / 2


def test_a_corpus_without_any_text_is_refused(tokenizer, monkeypatch):
    """Rather than waited for: there is no batch to draw."""
    monkeypatch.setattr(sft, "fit", lambda *_, **named: 0.0)
    with pytest.raises(UsageError, match="text"):
        train_language_model(micro_config(), [{"text": ""}] * 2, tokenizer, "language model")


def test_a_model_from_elsewhere_is_fine_tuned(chain, tmp_path):
    """With its own tokenizer; the folder it came from is left alone."""
    start = chain.root / "saved_models/tiny/sft"
    before = (start / "model.safetensors").read_bytes()
    config = micro_config(task="sft", preset="", base_model_name=str(start), output_dir=str(tmp_path / "tuned"))
    folder = run_sft(config)
    assert (start / "model.safetensors").read_bytes() == before
    model = load_language_model(str(start), "float32", CPU)
    tuned = load_language_model(str(folder), "float32", CPU)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), tuned.parameters(), strict=True))
    vocabulary = AutoTokenizer.from_pretrained(start).get_vocab()
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == vocabulary


# ----------------------------------------------------------------------------------------------------------------
# Measures
# ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_perplexity_equals_brute_force(language_model, tokenizer):
    """One token at a time, without padding, over more pieces than a batch holds."""
    texts = [text[: 4 + number % 7] for number, text in enumerate(review_texts(70))]
    pieces = pieces_of(texts, tokenizer, 12)
    assert len(pieces) > 64 and len({len(piece) for piece in pieces}) > 3
    total = 0.0
    count = 0
    for piece in pieces:
        for t in range(1, len(piece)):
            logits = language_model(torch.tensor([piece[:t]])).logits[0, -1]
            total -= logits.log_softmax(-1)[piece[t]].item()
            count += 1
    expected = math.exp(total / count)
    assert perplexity(language_model, without_prompt(pieces), tokenizer.pad_token_id) == pytest.approx(
        expected, rel=1e-5
    )


def test_a_stage_that_diverges_is_told_and_not_saved(workplace):
    with pytest.raises(RunError, match=r"the loss of the language model is .*; try a lower learning rate"):
        sft.run_sft(micro_config(task="sft", output_dir="diverged", sft_learning_rate=1e30, sft_steps=30))
    assert not Path("diverged").exists()


def test_an_encoder_decoder_is_not_trained_to_copy(t5_folder, workplace):
    config = micro_config(task="sft", base_model_name=str(t5_folder), output_dir="copy")
    with pytest.raises(UsageError, match="name the --completion_column"):
        sft.run_sft(config)


COMPLETIONS = [Example([5, 6, 7], [8, 1]), Example([5], [9, 9, 9, 1])]


def test_completions_are_learned_and_prompts_are_not():
    """Worked by hand; a causal model reads one sequence, an encoder-decoder two."""
    causal = language_batch(COMPLETIONS, 0, False, CPU)
    assert causal["input_ids"].tolist() == [[5, 6, 7, 8, 1], [5, 9, 9, 9, 1]]
    assert causal["labels"].tolist() == [[IGNORED] * 3 + [8, 1], [IGNORED, 9, 9, 9, 1]]
    both = language_batch(COMPLETIONS, 0, True, CPU)
    assert both["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert both["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert both["labels"].tolist() == [[8, 1, IGNORED, IGNORED], [9, 9, 9, 1]]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@torch.no_grad()
def test_the_loss_is_minus_the_log_probability_that_ppo_scores(family):
    """The sft loss of completions, against `PolicyModel.score` of the same responses, which knows nothing of it."""
    policy = tiny_policy(family)
    model = policy.language_model
    batch = language_batch(COMPLETIONS, 0, policy.is_encoder_decoder, CPU)
    side = "right" if policy.is_encoder_decoder else "left"
    query_ids, query_mask = pad([example.prompt for example in COMPLETIONS], 0, side)
    response_ids, mask = pad([example.completion for example in COMPLETIONS], 0, "right")
    scores = policy.score(query_ids=query_ids, query_mask=query_mask, response_ids=response_ids, response_mask=mask)
    logprobs = scores.logprobs[mask]
    assert own_loss(model, batch).item() == pytest.approx(-logprobs.mean().item(), abs=1e-5)
    assert perplexity(model, COMPLETIONS, 0) == pytest.approx(math.exp(-logprobs.mean().item()), rel=1e-5)


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    """ln 11, whatever is to be written."""
    model = tiny_policy("gpt2").language_model
    torch.nn.init.zeros_(model.lm_head.weight)
    loss = own_loss(model, language_batch(COMPLETIONS, 0, False, CPU))
    assert loss.item() == pytest.approx(2.397895, abs=1e-6)


def test_epochs_are_counted_in_steps():
    assert [n_steps(7, 0.0, 100, 8), n_steps(7, 3.0, 100, 8), n_steps(7, 0.5, 100, 8)] == [7, 38, 7]


def test_an_encoder_decoder_learns_to_answer(t5_folder, tmp_path):
    """From prompts of a template and a column of completions; the loss on them falls."""
    words = ["good film", "bad story"]
    rows = [{"question": f"the {words[n % 2]}", "answer": f"a {words[1 - n % 2]}"} for n in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = micro_config(
        task="sft",
        preset="",
        base_model_name=str(t5_folder),
        dataset_path=str(tmp_path / "rows.json"),
        prompt_column="question",
        prompt_template="see {question}",
        completion_column="answer",
        sft_steps=60,
        sft_learning_rate=1e-2,
        output_dir=str(tmp_path / "tuned"),
    )
    run_sft(config)
    tokenizer = AutoTokenizer.from_pretrained(t5_folder)
    before = load_language_model(str(t5_folder), "float32", CPU)
    after = load_language_model(str(tmp_path / "tuned"), "float32", CPU)
    examples = sft.completions(rows, config, tokenizer, ends=[])
    assert tokenizer.decode(examples[0].prompt, skip_special_tokens=True) == "see the good film"
    assert examples[0].completion[-1] == tokenizer.eos_token_id
    assert perplexity(after, examples, 0) < perplexity(before, examples, 0) / 3
