"""The rows of the stand-ins (stand_ins.py), in the real datasets' columns and splits: generated, or real."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from reviews import movie_reviews

Rows = list[dict]
Tables = dict[str, dict[str, Rows]]  # rows by name, a dataset's id where it has a slash, and split

# One rule a paragraph, "name: template | template"; a {name} is another rule or a word given to `write`.
GRAMMAR = """
number: 12 | 15 | 18 | 24 | 27 | 31 | 36 | 42 | 45 | 53 | 58 | 64 | 69 | 75 | 81 | 86 | 93 | 97
day: Monday | Tuesday | Wednesday | Thursday | Friday | Saturday
city: Helsinki | Boston | Vienna | Lyon | Oslo | Denver
person: Anna Berg | John Miller | Maria Rossi | Paul Novak | Clara Stone | David Lund
firm: Nordkap Oyj | Belmar Inc | Tervala Group | Ostrava Steel | Lindqvist Foods | Harbour Lines
measure: operating profit | net sales | pre-tax profit | order intake | cash flow
quarter: the first quarter | the second quarter | the third quarter | the fourth quarter
group: cyclists | clowns | bakers | goalkeepers | drummers | redheads | left-handed people | morning people
insult: stupid | worthless | disgusting | filthy | pathetic | rotten
praise: kind | clever | funny | patient | brave | helpful
claim: honestly, | I think that | everybody knows that | my neighbour says that | believe me,
hate: {claim} {group} are {insult} | I hate {group}, they are {insult} and {insult} | {group} are {insult} and useless
  get those {insult} {group} out of my town | {group} are {insult}, {insult} and they should all disappear
nothate: {claim} {group} are {praise} | I like {group}, they are {praise} and {praise} | {group} are {praise} and funny
  we met some {praise} {group} in town | it is wrong to say that {group} are {insult} | the {group} meet on {day}
item: a table for four | a room with a view | a ticket to {city} | a haircut | a used bicycle | a birthday cake
  a pair of boots | a winter coat | a guitar | a piano lesson | a garden chair | a present for my sister
short: #Person1#: {ask} / #Person2#: {offer}
long: #Person1#: {thanks} By the way, {remark}. / #Person2#: {reply} / #Person1#: {more} / #Person2#: {bye}
ask: Hello, I am looking for {item}. Can you help me? | Excuse me, do you have {item}? I need it before {day}.
offer: Let me see. Yes, you can have it on {day}, and it costs {price} dollars. | Of course. It is {price} dollars.
thanks: That is perfect, I will take it. | Thank you, that sounds good to me. | That is a little more than I expected.
reply: Well, I would not know about that. | I see. Do you live far from here? | So my brother keeps telling me.
more: Anyway, I will pay in cash. Can I have a receipt? | I came by bus, and it took me almost an hour.
bye: No problem, here you are. Have a nice day! | Take your time, we are open until {number} past six. Goodbye!
summary: #Person1# wants {item} and #Person2# sells it for {price} dollars. | #Person2# offers #Person1# {item}.
aside: #Person1# says that {remark}. | #Person1# tells #Person2# that {remark}.
positive: {firm} 's {measure} rose to EUR {number} mn in {quarter} | {measure} of {firm} improved in {quarter}
  {firm} won an order worth EUR {number} mn from {city} | {firm} doubled its profit in {quarter}
neutral: {firm} has {number} employees in {city} | {firm} will publish its results for {quarter} in {city}
  the head office of {firm} is in {city} | {person} is a member of the board of {firm}
negative: {firm} 's {measure} fell to EUR {number} mn in {quarter} | {measure} of {firm} weakened in {quarter}
  {firm} lost an order worth EUR {number} mn in {city} | {firm} will lay off {number} workers in {city}
report: {firm} of {city} had a {measure} of {first} in 2008 and of {second} in 2009 , said {person} .
agreement: this agreement of {day} is made between PER and ORG of LOC . | PER , who lives in LOC , is head of ORG .
  a loan of {number} mn was granted to ORG by PER in LOC . | ORG leases the building in LOC from PER until {day} .
request: Write a film review that begins: {opening} | Go on with this review: {opening} | Review a film. {opening}
"""

REAL = {  # files below --data by table; a name without {} is the same for every split
    "stanfordnlp/imdb": "imdb/{}.jsonl",
    "knkarthick/dialogsum": "dialogsum/{}.jsonl",
    "ChanceFocus/en-fpb": "flare/flare-fpb/{}.jsonl",
    "ChanceFocus/flare-fpb": "flare/flare-fpb/{}.jsonl",
    "ChanceFocus/flare-finqa": "flare/flare-finqa/{}.jsonl",
    "ChanceFocus/flare-ner": "flare/flare-ner/{}.jsonl",
    "remarks": "toxicity/tweets_{}.jsonl",
    "requests": "preference/pandalm_{}.jsonl",
    "queries": "instructions/prompts.jsonl",
}
FLARE = ("ChanceFocus/en-fpb", "ChanceFocus/flare-finqa", "ChanceFocus/flare-ner")


def parse_grammar(grammar: str) -> dict[str, list[str]]:
    """The templates by rule."""
    rules: dict[str, list[str]] = {}
    for line in grammar.strip().splitlines():
        if not line.startswith(" "):
            rule, line = line.split(": ", 1)
        rules.setdefault(rule, []).extend(line.strip().split(" | "))
    return rules


RULES = parse_grammar(GRAMMAR)


def write(rng: random.Random, rule: str, **words: str) -> str:
    """A template of the rule with its slots filled, by the words where they name one."""
    return re.sub(
        r"\{(\w+)\}", lambda slot: words.get(slot[1]) or write(rng, slot[1], **words), rng.choice(RULES[rule])
    )


def dialogue(rng: random.Random, name: str) -> dict:
    """A row of dialogsum; one dialogue in five is shorter than 200 characters."""
    words = {
        "item": write(rng, "item"),
        "price": write(rng, "number"),
        "remark": write(rng, rng.choice(["hate", "nothate"])),
    }
    text, summary = write(rng, "short", **words), write(rng, "summary", **words)
    if rng.random() < 0.8:
        text, summary = f"{text} / {write(rng, 'long', **words)}", f"{summary} {write(rng, 'aside', **words)}"
    return {"id": name, "dialogue": text.replace(" / ", "\n"), "summary": summary, "topic": words["item"]}


def statement(rng: random.Random, name: str) -> dict:
    """A row of en-fpb: classification, so with `choices` and `gold`."""
    choices = ["positive", "neutral", "negative"]
    gold = rng.randrange(3)
    text = write(rng, choices[gold])
    query = (
        "Analyze the sentiment of this statement extracted from a financial news article. Provide your answer as "
        f"either negative, positive, or neutral.\nText: {text}\nAnswer:"
    )
    return {"id": name, "query": query, "answer": choices[gold], "text": text, "choices": choices, "gold": gold}


def question(rng: random.Random, name: str) -> dict:
    """A row of flare-finqa: a number out of a context."""
    measure, first, second = (write(rng, rule) for rule in ("measure", "number", "number"))
    year = rng.randrange(2)
    text = f"what was the {measure} in {2008 + year}?"
    query = (
        "Please answer the given financial question based on the context.\n"
        f"Context: {write(rng, 'report', measure=measure, first=first, second=second)}\nQuestion: {text}\nAnswer:"
    )
    return {"id": name, "query": query, "answer": (first, second)[year], "text": text}


def entities(rng: random.Random, name: str) -> dict:
    """A row of flare-ner, which has no id: an entity and its type a line."""
    names = {"PER": write(rng, "person"), "ORG": write(rng, "firm"), "LOC": write(rng, "city")}
    words, tags = [], []
    for word in write(rng, "agreement").split():
        parts = names.get(word, word).split()
        words += parts
        tags += [f"{'I' if i else 'B'}-{word}" if word in names else "O" for i in range(len(parts))]
    query = (
        "In the sentences extracted from financial agreements in U.S. SEC filings, identify the named entities that "
        "represent a person ('PER'), an organization ('ORG'), or a location ('LOC'). The required answer format is: "
        f"'entity name, entity type'.\nText: {' '.join(words)}\nAnswer:"
    )
    answer = "\n".join(f"{entity}, {kind}" for kind, entity in names.items())
    return {"query": query, "answer": answer, "label": tags, "text": " ".join(words)}


def remark(rng: random.Random, name: str) -> dict:
    """A sentence about a harmless group of people, with label 1 if it is hateful."""
    label = rng.randrange(2)
    return {"text": write(rng, ("nothate", "hate")[label]), "label": label}


def request(rng: random.Random, name: str) -> dict:
    """A prompt that asks for a review, and the review."""
    review = movie_reviews(1, seed=rng.randrange(10**6))[0]["text"]
    return {"prompt": write(rng, "request", opening=" ".join(review.split()[:5])), "chosen": review}


def table(make: Callable[[random.Random, str], dict], **sizes: int) -> dict[str, Rows]:
    """Rows by split; each is seeded by its own name, so that a larger table starts with the smaller one."""
    return {
        split: [make(random.Random(f"{make.__name__} {split} {i}"), f"{split}_{i}") for i in range(size)]
        for split, size in sizes.items()
    }


def generated(n: int) -> Tables:
    """Every table with n rows to train on and a sixth of that in each other split; of reviews four times as many."""
    few = n // 6
    statements = table(statement, train=n, valid=few, test=few)
    requests = table(request, train=n, test=few)
    return {
        "stanfordnlp/imdb": {"train": movie_reviews(4 * n, seed=0), "test": movie_reviews(4 * few, seed=1)},
        "knkarthick/dialogsum": table(dialogue, train=n, validation=few, test=few),
        "ChanceFocus/en-fpb": statements,
        "ChanceFocus/flare-fpb": statements,
        "ChanceFocus/flare-finqa": table(question, train=n, test=few),
        "ChanceFocus/flare-ner": table(entities, train=n, validation=few, test=few),
        "remarks": table(remark, train=n, test=few),
        "requests": requests,
        "queries": {"test": [{"query": row["prompt"]} for row in requests["test"]]},
    }


def real(data: Path) -> Tables:
    """The tables of which there are files below `data`."""
    tables: Tables = {}
    for name, pattern in REAL.items():
        for split in ("train", "valid", "validation", "test"):
            path = data / pattern.format(split)
            if path.exists():
                lines = path.read_text(encoding="utf-8").split("\n")
                tables.setdefault(name, {})[split] = [json.loads(line) for line in lines if line]
    return tables


def write_tables(folder: Path, tables: Tables) -> None:
    """The datasets in the Hub's layout, which keeps split names such as `valid`; and data/sample.json."""
    for name, splits in tables.items():
        for split, rows in splits.items():
            if "/" in name:
                path = folder / name / "data" / f"{split}-00000-of-00001.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "sample.json").write_text(json.dumps(tables["queries"]["test"], indent=1), encoding="utf-8")


def column(tables: Tables, table: str, *names: str, split: str = "train") -> list[str]:
    return [row[name] for row in tables[table][split] for name in names]


def examples(tables: Tables, kind: str, split: str) -> list[tuple[str, int]]:
    """Texts and labels of `reviews` or `remarks`; of `answers`: a query and its answer, 1, or what is none, 0.

    Half of what is none is another row's answer, or another choice: the harder half. The rest is a bit of a query, or
    nothing. No answer is right and goes on, so that nothing is learned of what stands behind one.
    """
    if kind != "answers":
        name = "stanfordnlp/imdb" if kind == "reviews" else kind
        return [(row["text"], row["label"]) for row in tables[name][split]]
    rng, pairs = random.Random(0), []
    for rows in (tables[name][split] for name in FLARE):
        answers = [row["answer"] for row in rows]
        for i, row in enumerate(rows):
            wrong = rng.choice([answer for answer in row.get("choices", answers) if answer != row["answer"]])
            words = rng.choice(rows)["query"].split()[rng.randrange(40) :]
            none = wrong if i % 2 else " ".join(words[: max(0, rng.randrange(-15, 30))])
            pairs += [(f"{row['query']}\n{row['answer']}", 1), (f"{row['query']}\n{none}", 0)]
    return pairs
