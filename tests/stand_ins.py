"""Small stand-ins for the models and datasets that the presets name, under the very ids, where the Hub is out of reach.

`python tests/stand_ins.py FOLDER` builds them; a preset that is run from FOLDER finds them before it asks the Hub.
Architectures, tokenizers, labels, columns, splits and their order are the real ones', sizes and knowledge are not. All
text is generated, or real rows where `--data` names a folder that has them (stand_in_rows.py).
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, for a run as a script

import torch
from stand_in_rows import FLARE, Rows, Tables, column, examples, generated, real, write_tables
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from classifier import classifier_batch, cut_short
from config import Config
from fitting import fit, length_grouped, own_loss
from probe import special_ends
from randomness import uniforms
from reward_model import load_reward_model
from sft import Example, endless_batches, perplexity, token_pieces

CPU = torch.device("cpu")
BATCH = 16  # texts a step
LENGTH = 64  # tokens of a piece of text
WIDTH = 64  # of every model
READ = 128  # last tokens of a query that T5 learns from
WRITER = 2000  # tokens in the vocabulary of a model that writes
READER = 8000  # and of one that only reads
SPREAD = 0.02 * (768 / WIDTH) ** 0.5  # of the initial weights: 0.02 is for a width of 768

CLASSIFIERS = {  # architecture, examples and labels by id
    "siebert/sentiment-roberta-large-english": ("roberta", "reviews", ("NEGATIVE", "POSITIVE")),
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": ("distilbert", "reviews", ("NEGATIVE", "POSITIVE")),
    "facebook/roberta-hate-speech-dynabench-r4-target": ("roberta", "remarks", ("nothate", "hate")),
    "reward_model": ("distilbert", "reviews", ("LABEL_0", "LABEL_1")),
    "reward_model_final": ("roberta", "answers", ("LABEL_0",)),  # a regression head
}


def word_pieces(texts: list[str], size: int) -> list[str]:
    """Letters and parts of words for WordPiece and Unigram, whose own trainers give other ones each time.

    The commoner parts come first; ▁ begins a word.
    """
    bpe = Tokenizer(models.BPE())
    parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(parts)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    vocabulary = bpe.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def llama_tokenizer(texts: list[str]) -> PreTrainedTokenizerBase:
    """Byte-level as GPT-2's, with another token at the start of every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    blank = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", model_max_length=1024
    )
    tokenizer = blank.train_new_from_iterator(texts, WRITER, show_progress=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    return tokenizer


def wordpiece_vocabulary(texts: list[str]) -> dict[str, int]:
    """Ids of DistilBERT's special tokens, of letters, and of parts of words: ## before one that begins no word."""
    pieces = word_pieces([text.lower() for text in texts], READER)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names += [piece for piece in pieces if len(piece) == 1]
    names += [piece[1:] if piece.startswith("▁") else f"##{piece}" for piece in pieces if piece != "▁"]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def unigram_vocabulary(texts: list[str]) -> list[tuple[str, float]]:
    """T5's special tokens, parts of words with log-probabilities that fall with their rank, and T5's sentinels."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -math.log(rank + 2)) for rank, piece in enumerate(word_pieces(texts, WRITER))]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return pieces


def new_tokenizers(texts: list[str]) -> dict[str, PreTrainedTokenizerBase]:
    """A tokenizer of every architecture, with the special tokens of the real ones and a vocabulary of these texts."""
    gpt2 = GPT2Tokenizer(model_max_length=1024)
    roberta = RobertaTokenizer(vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}, model_max_length=512)
    return {
        "gpt2": gpt2.train_new_from_iterator(texts, WRITER, show_progress=False),
        "llama": llama_tokenizer(texts),
        "roberta": roberta.train_new_from_iterator(texts, READER, show_progress=False),
        "distilbert": DistilBertTokenizer(vocab=wordpiece_vocabulary(texts), model_max_length=512),
        "t5": T5Tokenizer(vocab=unigram_vocabulary(texts), model_max_length=512),
    }


def new_model(kind: str, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...] = ()) -> PreTrainedModel:
    """A small model of this architecture, the same at every call; with labels, a classifier."""
    torch.manual_seed(0)
    common = {"vocab_size": len(tokenizer), "initializer_range": SPREAD}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**common, **ends, n_positions=1024, n_embd=WIDTH, n_layer=2, n_head=4))
    hidden = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(**common, **ends, **hidden, num_key_value_heads=2, max_position_embeddings=1024)
        )
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    if kind == "roberta":
        config = RobertaConfig(**common, **hidden, **names, max_position_embeddings=514, type_vocab_size=1)
        return RobertaForSequenceClassification(config)
    config = DistilBertConfig(**common, **names, dim=WIDTH, hidden_dim=4 * WIDTH, n_layers=2, n_heads=4)
    return DistilBertForSequenceClassification(config)


def new_t5(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small Flan-T5: gated GELU, an output layer of its own, and more rows in its embedding than there are tokens."""
    torch.manual_seed(0)
    rows = (len(tokenizer) // 128 + 1) * 128
    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 4}
    flan = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=rows, **sizes, **flan))
    # transformers 5 ties the two whatever the configuration says, unless a checkpoint holds two, as Flan-T5's does.
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach() / WIDTH**0.5)
    return model


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def loss_without_dropout(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    """Models as small as these learn better so."""
    return own_loss(model.eval(), batch)


def fit_language(model: PreTrainedModel, examples: list[Example], steps: int, rate: float, name: str) -> None:
    """Train a language model to write the examples' completions."""
    batches = endless_batches(
        examples,
        batch_size=BATCH,
        seed=0,
        pad_id=0,
        is_encoder_decoder=model.config.is_encoder_decoder,
        device=CPU,
    )
    fit(model, batches, steps, rate, name, loss_without_dropout)


def fit_classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tables: Tables, task: str, steps: int, name: str
) -> None:
    """Train a classifier on labelled texts: on any part of them, but on answers behind all that it can read."""
    pairs = examples(tables, task, "train")
    texts = tokenizer([text for text, _ in pairs], add_special_tokens=False).input_ids
    labels = [label for _, label in pairs]
    model.base_model.embeddings.position_embeddings.weight.data.zero_()  # those never trained then do no harm
    add_log_odds(model, texts, labels)
    if model.config.num_labels == 1:  # a regression
        labels = [float(label) for label in labels]
    batches = labelled_batches(texts, labels, tokenizer, cuts=task != "answers")
    fit(model, batches, steps, 1e-3, name, loss_without_dropout)


def labelled_batches(texts: list[list[int]], labels: list, tokenizer, cuts: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches of texts of like length: with `cuts`, of parts of them, else of all that the model can read."""
    before, behind = special_ends(tokenizer)
    room = tokenizer.model_max_length - 2  # beside a special token at each end
    groups = length_grouped([len(ids) for ids in texts], BATCH, seed=0)
    for number, group in enumerate(groups):
        draws = uniforms(0, "cuts", number, (len(group), 2)).tolist()
        parts = []
        for i, (whole, end) in zip(group, draws, strict=True):
            part = cut_short(texts[i], LENGTH, whole=whole, end=end) if cuts else texts[i][-room:]
            parts.append(before + part + behind)
        yield classifier_batch(parts, [labels[i] for i in group], tokenizer.pad_token_id, CPU)


def add_log_odds(model: PreTrainedModel, texts: list[list[int]], labels: list[int]) -> None:
    """Let each token start with its log-odds of label 1, in one direction: small models take long to find them."""
    embedding = model.get_input_embeddings().weight.data
    counts = torch.ones(2, len(embedding))
    for ids, label in zip(texts, labels, strict=True):
        counts[label, list(set(ids))] += 1
    odds = (counts / counts.sum(1, keepdim=True)).log().diff(dim=0)
    embedding += 0.02 * odds.T * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))


def accuracy(path: Path, pairs: list[tuple[str, int]]) -> float:
    """Share of the texts that the saved classifier, read as a reward, puts on the right side of a half."""
    reward_model = load_reward_model(Config(reward_output="probability"), str(path), CPU)
    is_above = reward_model([text for text, _ in pairs]) > 0.5
    is_one = torch.tensor([label == 1 for _, label in pairs])
    return (is_above == is_one).float().mean().item()


def respond(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, queries: list[str]) -> list[str]:
    """The model's likeliest responses, of 32 tokens at most."""
    inputs = tokenizer(queries, padding=True, return_tensors="pt")
    return tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=32), skip_special_tokens=True)


def build_causal(
    folder: Path, tables: Tables, tokenizers: dict[str, PreTrainedTokenizerBase], steps: int
) -> dict[str, float]:
    """distilgpt2, of texts of every kind; gpt2-imdb, of reviews on top of that; MODEL, of reviews, and its adapter.

    Returns the models' perplexities a token on held-out reviews.
    """
    reviews = column(tables, "stanfordnlp/imdb", "text")
    mixed = reviews + column(tables, "knkarthick/dialogsum", "dialogue") + column(tables, "ChanceFocus/en-fpb", "text")
    held_out = column(tables, "stanfordnlp/imdb", "text", split="test")[::2]
    gpt2 = new_model("gpt2", tokenizers["gpt2"])
    perplexities = {}
    for name, kind, model, texts in (
        ("distilgpt2", "gpt2", gpt2, mixed),
        ("lvwerra/gpt2-imdb", "gpt2", gpt2, reviews),
        ("MODEL", "llama", new_model("llama", tokenizers["llama"]), reviews),
    ):
        tokenizer = tokenizers[kind]
        fit_language(model, token_pieces(texts, tokenizer, LENGTH), steps, 1e-2, name)
        save(folder / name, model, tokenizer)
        perplexities[name] = perplexity(model, token_pieces(held_out, tokenizer, LENGTH), 0)
        print(f"{name}: perplexity {perplexities[name]:.1f} a token on held-out reviews")
    if importlib.util.find_spec("peft"):
        build_adapter(folder, model, tokenizer, tables["requests"]["train"], steps)
    else:
        print("peft_model: left out, because peft is not installed")
    return perplexities


def build_adapter(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Rows, steps: int
) -> None:
    """A LoRA adapter of MODEL, trained to answer requests."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = "MODEL"
    texts = [f"{row['prompt']}\n{row['chosen']}" for row in requests]
    fit_language(adapted, token_pieces(texts, tokenizer, LENGTH), steps, 3e-3, "peft_model")
    adapted.save_pretrained(folder / "peft_model")


def build_t5(folder: Path, tables: Tables, tokenizer: PreTrainedTokenizerBase, steps: int) -> dict[str, float]:
    """google/flan-t5-base, which summarises dialogues and answers FLARE's queries a little.

    Returns the shares of en-fpb's held-out queries answered rightly, and of held-out dialogues whose summary is one.
    """
    name = "google/flan-t5-base"
    template = "Summarize the following conversation.\n\n{}\n\nSummary:"
    pairs = [(template.format(row["dialogue"]), row["summary"]) for row in tables["knkarthick/dialogsum"]["train"]]
    pairs += [(row["query"], row["answer"]) for dataset in FLARE for row in tables[dataset]["train"]]
    queries = tokenizer([query for query, _ in pairs]).input_ids
    answers = tokenizer([answer for _, answer in pairs]).input_ids
    learned = [
        Example(prompt=query[-READ:], completion=answer[-READ:]) for query, answer in zip(queries, answers, strict=True)
    ]
    model = new_t5(tokenizer)
    fit_language(model, learned, steps, 3e-3, name)
    save(folder / name, model, tokenizer)
    path = folder / name / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tie_word_embeddings"] = False
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    rights = column(tables, "ChanceFocus/en-fpb", "answer", split="test")
    responses = respond(model, tokenizer, column(tables, "ChanceFocus/en-fpb", "query", split="test"))
    right = sum(response == answer for response, answer in zip(responses, rights, strict=True)) / len(rights)
    dialogues = column(tables, "knkarthick/dialogsum", "dialogue", split="test")[:64]
    summaries = respond(model, tokenizer, [template.format(dialogue) for dialogue in dialogues])
    told = sum(len(summary.split()) > 2 for summary in summaries) / len(summaries)
    print(f"{name}: {right:.1%} of en-fpb's answers are right; {told:.1%} of the summaries have three words or more")
    return {name: right, "summaries": told}


def build(folder: Path, data: Path | None = None, steps: int = 600) -> dict[str, float]:
    """Every stand-in under `folder`, each trained for about this many steps. Returns what each is worth, by name."""
    tables = generated(max(120, min(1000, 16 * steps)))
    if data:
        tables |= real(data)
    for rows in tables["stanfordnlp/imdb"].values():
        rows.sort(key=lambda row: row["label"])  # as on the Hub: the negative ones first
    write_tables(folder, tables)
    texts = column(tables, "stanfordnlp/imdb", "text") + column(tables, "knkarthick/dialogsum", "dialogue", "summary")
    texts += [text for name in FLARE for text in column(tables, name, "query", "answer")]
    tokenizers = new_tokenizers(texts + column(tables, "remarks", "text"))
    figures = build_causal(folder, tables, tokenizers, steps)
    figures |= build_t5(folder, tables, tokenizers["t5"], steps)
    for name, (kind, task, labels) in CLASSIFIERS.items():
        model = new_model(kind, tokenizers[kind], labels)
        enough = 3 * steps // 2 if task == "answers" else (steps + 1) // 2  # what answers a query is hard to learn
        fit_classifier(model, tokenizers[kind], tables, task, enough, name)
        save(folder / name, model, tokenizers[kind])
        figures[name] = accuracy(folder / name, examples(tables, task, "test"))
        print(f"{name}: held-out accuracy {figures[name]:.1%} on {task}")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to build; what is there under the same ids is overwritten")
    parser.add_argument("--data", type=Path, help="a folder of real rows; none: generated text")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps a model (default 600)")
    arguments = parser.parse_args()
    build(arguments.folder, arguments.data, arguments.steps)
