"""Small stand-ins for the models and datasets that the presets name, under the very ids, where the Hub is out of reach.

`python tests/stand_ins.py FOLDER` builds them; a preset that is run from FOLDER finds them before it asks the Hub.
Architectures, tokenizers, labels, columns, splits and their order are the real ones', sizes and knowledge are not. All
text is generated, or real rows where `--data` names a folder that has them (stand_in_rows.py).
"""

import argparse
import importlib.util
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project, for a run as a script

import torch
from stand_in_rows import FLARE, Rows, Tables, column, examples, generated, real, write_tables
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
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

from classifier import classifier_batch
from config import Config
from dataset import pad
from reward import load_reward_model
from sft import IGNORED, fit, language_batch, length_grouped, perplexity, token_pieces

CPU = torch.device("cpu")
BATCH, LENGTH, WIDTH = 16, 128, 64  # texts a step, tokens a text, width of every model
SPREAD = 0.02 * (768 / WIDTH) ** 0.5  # of the initial weights: 0.02 is for a width of 768

CLASSIFIERS = {  # architecture, examples and labels by id
    "siebert/sentiment-roberta-large-english": ("roberta", "reviews", ("NEGATIVE", "POSITIVE")),
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": ("distilbert", "reviews", ("NEGATIVE", "POSITIVE")),
    "facebook/roberta-hate-speech-dynabench-r4-target": ("roberta", "remarks", ("nothate", "hate")),
    "reward_model": ("distilbert", "reviews", ("LABEL_0", "LABEL_1")),
    "reward_model_final": (
        "roberta",
        "answers",
        ("LABEL_0",),
    ),  # a regression head: 1 if right, else 0; still at chance
}


def new_tokenizers(texts: list[str]) -> dict[str, PreTrainedTokenizerBase]:
    """A tokenizer of every architecture, with the special tokens of the real ones and a vocabulary of these texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    llama = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "model_max_length": 1024}
    roberta = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    blank = {
        "gpt2": GPT2Tokenizer(model_max_length=1024),
        "llama": PreTrainedTokenizerFast(tokenizer_object=bpe, **llama),
        "roberta": RobertaTokenizer(vocab=roberta, model_max_length=512),
    }
    trained = {name: one.train_new_from_iterator(texts, 2000, show_progress=False) for name, one in blank.items()}
    bos = trained["llama"].bos_token
    trained["llama"].backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, trained["llama"].bos_token_id)]
    )
    return trained | word_tokenizers(texts)


def word_tokenizers(texts: list[str]) -> dict[str, PreTrainedTokenizerBase]:
    """WordPiece and Unigram of the commonest words and every letter: their own trainers give another one each time."""
    counts = Counter(re.findall(r"\w+|[^\w\s]", " ".join(texts)))
    lower = Counter(re.findall(r"\w+|[^\w\s]", " ".join(texts).lower()))
    letters = sorted(set("".join([*counts, *lower])))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    pieces += [word for word, _ in lower.most_common(1500)]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *((letter, -12.0) for letter in letters)]
    scores += [(f"▁{word}", math.log(count / counts.total())) for word, count in counts.most_common(1500)]
    scores += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    wordpiece = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return {
        "distilbert": DistilBertTokenizer(vocab=wordpiece, model_max_length=512),
        "t5": T5Tokenizer(vocab=scores, model_max_length=512),
    }


def new_model(kind: str, tokenizer: PreTrainedTokenizerBase, labels: tuple[str, ...] = ()) -> PreTrainedModel:
    """A small model of this architecture, the same at every call; with labels, a classifier."""
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    common = {"vocab_size": len(tokenizer), "initializer_range": SPREAD}
    hidden = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**common, **ends, n_positions=1024, n_embd=WIDTH, n_layer=2, n_head=4))
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(**common, **ends, **hidden, num_key_value_heads=2, max_position_embeddings=1024)
        )
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


def fit_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], steps: int, name: str
) -> None:
    """Train a causal model on texts."""
    pieces = token_pieces(texts, tokenizer, LENGTH)
    groups = length_grouped(list(map(len, pieces)), BATCH, torch.Generator().manual_seed(0))
    fit(model, (language_batch([pieces[i] for i in group], 0, False, CPU) for group in groups), steps, 3e-3, name)


def fit_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], steps: int, name: str
) -> None:
    """Train an encoder-decoder on sources, of which it reads the last tokens, and targets."""
    sources, targets = (tokenizer(list(texts)).input_ids for texts in zip(*pairs, strict=True))
    sources, targets = ([ids[-LENGTH:] for ids in side] for side in (sources, targets))

    def batch(group: list[int]) -> dict[str, torch.Tensor]:
        ids, mask = pad([sources[i] for i in group], 0, "right")
        labels, _ = pad([targets[i] for i in group], IGNORED, "right")
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    groups = length_grouped(list(map(len, sources)), BATCH, torch.Generator().manual_seed(0))
    fit(model, map(batch, groups), steps, 3e-3, name)


def fit_classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, int]], steps: int, name: str
) -> None:
    """Train a classifier on texts, of which it reads the first token and the last ones, and labels."""
    texts = [ids[:1] + ids[1:][1 - LENGTH :] for ids in tokenizer([text for text, _ in pairs]).input_ids]
    kind = float if model.config.num_labels == 1 else int
    groups = length_grouped(list(map(len, texts)), BATCH, torch.Generator().manual_seed(0))
    batches = (
        classifier_batch([texts[i] for i in group], [kind(pairs[i][1]) for i in group], tokenizer.pad_token_id, CPU)
        for group in groups
    )
    fit(model, batches, steps, 1e-3, name)


def accuracy(path: Path, pairs: list[tuple[str, int]]) -> float:
    """Share of the texts that the saved classifier, read as a reward, puts on the right side of a half."""
    rewards = load_reward_model(Config(reward_output="probability"), str(path), CPU)([text for text, _ in pairs])
    return ((rewards > 0.5) == torch.tensor([label == 1 for _, label in pairs])).float().mean().item()


def exact_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> float:
    """Share of the rows whose answer is the model's likeliest response."""
    queries = tokenizer([row["query"] for row in rows], padding=True, return_tensors="pt")
    responses = tokenizer.batch_decode(model.generate(**queries, max_new_tokens=8), skip_special_tokens=True)
    return sum(map(str.__eq__, responses, (row["answer"] for row in rows))) / len(rows)


def build_causal(folder: Path, tables: Tables, tokenizers: dict[str, PreTrainedTokenizerBase], steps: int) -> None:
    """distilgpt2, which knows texts of every kind; gpt2-imdb and MODEL, which know reviews; and MODEL's adapter."""
    reviews = column(tables, "stanfordnlp/imdb", "text")
    mixed = reviews + column(tables, "knkarthick/dialogsum", "dialogue") + column(tables, "ChanceFocus/en-fpb", "text")
    held_out = column(tables, "stanfordnlp/imdb", "text", split="test")[::2]
    for name, kind, texts in (
        ("distilgpt2", "gpt2", mixed),
        ("lvwerra/gpt2-imdb", "gpt2", reviews),
        ("MODEL", "llama", reviews),
    ):
        model, tokenizer = new_model(kind, tokenizers[kind]), tokenizers[kind]
        fit_texts(model, tokenizer, texts, steps, name)
        save(folder / name, model, tokenizer)
        print(f"{name}: perplexity {perplexity(model, token_pieces(held_out, tokenizer, LENGTH), 0):.1f} on reviews")
    if importlib.util.find_spec("peft"):
        build_adapter(folder, model, tokenizer, tables["requests"]["train"], steps)
    else:
        print("peft_model: left out, because peft is not installed")


def build_adapter(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, requests: Rows, steps: int
) -> None:
    """A LoRA adapter of MODEL, trained to answer requests."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = "MODEL"
    texts = [f"{row['prompt']}\n{row['chosen']}" for row in requests]
    fit_texts(adapted, tokenizer, texts, steps, "peft_model")
    adapted.save_pretrained(folder / "peft_model")


def build_t5(folder: Path, tables: Tables, tokenizer: PreTrainedTokenizerBase, steps: int) -> None:
    """google/flan-t5-base, which summarises dialogues and answers FLARE's queries a little."""
    name, template = "google/flan-t5-base", "Summarize the following conversation.\n\n{}\n\nSummary:"
    pairs = [(template.format(row["dialogue"]), row["summary"]) for row in tables["knkarthick/dialogsum"]["train"]]
    pairs += [(row["query"], row["answer"]) for dataset in FLARE for row in tables[dataset]["train"]]
    model = new_t5(tokenizer)
    fit_pairs(model, tokenizer, pairs, steps, name)
    save(folder / name, model, tokenizer)
    settings = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(settings | {"tie_word_embeddings": False}, indent=2)
    (folder / name / "config.json").write_text(text, encoding="utf-8")
    share = exact_answers(model, tokenizer, tables["ChanceFocus/en-fpb"]["test"])
    print(f"{name}: {share:.1%} of en-fpb's answers are right")


def build(folder: Path, data: Path | None = None, steps: int = 300) -> dict[str, float]:
    """Every stand-in under `folder`, each trained for about this many steps. Returns the classifiers' accuracies."""
    tables = generated(max(200, min(3000, 16 * steps))) | (real(data) if data else {})
    for rows in tables["stanfordnlp/imdb"].values():
        rows.sort(key=lambda row: row["label"])  # as on the Hub: the negative ones first
    write_tables(folder, tables)
    texts = column(tables, "stanfordnlp/imdb", "text") + column(tables, "knkarthick/dialogsum", "dialogue", "summary")
    texts += [text for name in FLARE for text in column(tables, name, "query", "answer")]
    tokenizers = new_tokenizers(texts + column(tables, "remarks", "text"))
    build_causal(folder, tables, tokenizers, steps)
    build_t5(folder, tables, tokenizers["t5"], steps)
    accuracies = {}
    for name, (kind, task, labels) in CLASSIFIERS.items():
        model = new_model(kind, tokenizers[kind], labels)
        fit_classifier(model, tokenizers[kind], examples(tables, task, "train"), steps, name)
        save(folder / name, model, tokenizers[kind])
        accuracies[name] = accuracy(folder / name, examples(tables, task, "test"))
        print(f"{name}: held-out accuracy {accuracies[name]:.1%} on {task}")
    return accuracies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where to build; what is there under the same ids is overwritten")
    parser.add_argument("--data", type=Path, help="a folder of real rows; none: generated text")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps a model (default 300)")
    arguments = parser.parse_args()
    build(arguments.folder, arguments.data, arguments.steps)
