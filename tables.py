"""A trace of explain.py in a terminal: aligned tables of 100 columns, with a legend that has the equations."""

import os
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple

from progress import visible

WIDTH = 100  # columns of a terminal
BOLD, DIM, RED, GREEN, YELLOW = "1", "2", "31", "32", "33"  # as ANSI numbers them


class Column(NamedTuple):
    """What stands above it, the number's name in the trace, what it is, and how a number is coloured."""

    heading: str
    name: str
    meaning: str  # with the settings' names in braces
    colour: Callable[[dict], str] = lambda token: ""


def sign_colour(token: dict) -> str:
    return GREEN if token["whitened"] > 0 else RED


def branch_colour(token: dict) -> str:
    return YELLOW if token["is_clipped"] else ""


KL = {"k1": "d", "k2": "d^2 / 2", "k3": "exp(-d) - 1 + d", "abs": "|d|"}
ROLLOUT = (
    Column("logprob", "logprob", "log π(y_t) of the token, by the policy that sampled it, in nats"),
    Column("ref", "ref_logprob", "log ρ(y_t), by the frozen reference"),
    Column("kl", "kl", "k_t = {k}, d = logprob - ref: an estimate of KL(π || ρ)"),
    Column("entropy", "entropy", "H_t of all that could have come next, in nats"),
    Column("value", "value", "V_t: the return expected before the token"),
    Column("r_kl", "reward_kl", "-β k_t, the first part of the reward r_t; β = {kl_coef:.4g}"),
    Column("r_score", "reward_score", "s on the last token, the other part"),
    Column("td", "td_error", "δ_t = r_t + γ V_t+1 - V_t; γ = {gamma:g}, and V = 0 after the end"),
    Column("adv", "advantage", "Â_t = Σ_l (γλ)^l δ_t+l; λ = {lam:g}"),
    Column("whitened", "whitened", "{whitening}", sign_colour),
    Column("return", "return", "R_t = adv + value: what the value learns"),
)
EPOCH = (
    Column("logprob", "logprob", "log π_new(y_t), by the policy after the epoch"),
    Column("ratio", "ratio", "q_t = π_new(y_t) / π(y_t)"),
    Column("loss", "policy_loss", "max(-q Â, -clip(q, {low:g}, {high:g}) Â), Â = whitened"),
    Column("branch", "branch", "which of the two: where it is the clipped one, the gradient is 0", branch_colour),
    Column("share", "share", "loss / {n_tokens} tokens of the batch: the shares add up to the policy loss"),
    Column("value", "value", "V_t by the new value head"),
    Column("change", "value_change", "V_t now - V_t then; its loss counts it up to ± {clip_range_value:g}"),
)


def text_of(trace: dict, in_colour: bool) -> str:
    """All of a trace: what was asked and answered, the rollout, the update epoch by epoch, what it did."""
    paint = painted if in_colour else plain
    parts = [paint(wrapped(trace["title"]), BOLD) + "".join("\n" + wrapped(line) for line in lines_of(trace["note"]))]
    for number, row in enumerate(trace["rows"]):
        parts += row_parts(row, trace, paint, has_legend=number == 0)
    parts.append(outcome(trace))
    return "\n\n".join(parts) + "\n"


def lines_of(text: str) -> list[str]:
    return [visible(line, keep="") for line in text.splitlines()]


def is_coloured() -> bool:
    """Whether standard output is a terminal that shows colours, and nobody has asked for none (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def plain(text: str, colour: str) -> str:
    return text


# --------------------------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------------------------


def row_parts(row: dict, trace: dict, paint: Callable, has_legend: bool) -> list[str]:
    """A response: who said what, its rollout's table, and one for each epoch, with what the columns are below the first
    of each kind; which tokens became likelier.
    """
    tokens = row["tokens"]
    parts = [paint(f"row {row['row']}", BOLD) + "\n" + said(row)]
    parts.append(paint("rollout", BOLD) + "\n" + table(tokens, ROLLOUT, tokens, paint) + "\n" + balance(row, trace))
    parts += [legend(ROLLOUT, trace, paint)] * has_legend
    for number, epoch in enumerate(row["epochs"][1:], 1):
        title = paint(f"after epoch {number} of {len(row['epochs']) - 1}", BOLD)
        parts.append(title + "\n" + table(tokens, EPOCH, epoch["tokens"], paint))
        parts += [legend(EPOCH, trace, paint)] * (has_legend and number == 1)
    parts.append(likelier(row))
    return parts


def said(row: dict) -> str:
    """Prompt, response and score, each from a line of its own on."""
    terms = ", ".join(f"{name} {value:.4g}" for name, value in row["terms"].items())
    end = "ended by itself" if row["has_eos"] else "cut at the length cap"
    score = f"{row['score']:.4g} is trained on; {terms}; {end}"
    named = {"prompt": row["prompt"], "response": row["response"], "score": score}
    return "\n".join(wrapped(f"{name:10}{visible(text, keep='')}", " " * 10) for name, text in named.items())


def balance(row: dict, trace: dict) -> str:
    """What a response's rewards add up to."""
    kl, reward = (sum(token[name] for token in row["tokens"]) for name in ("kl", "reward"))
    return f"rewards: score {row['score']:.4f} - {trace['settings']['kl_coef']:.4g} x kl {kl:.4f} = {reward:.4f}"


def likelier(row: dict, most: int = 4) -> str:
    """The tokens whose probabilities the update has moved most, each way."""
    ratios = [token["ratio"] for token in row["epochs"][-1]["tokens"]]
    order = sorted(range(len(ratios)), key=lambda t: ratios[t])
    lines = []
    for name, places in (("likelier", order[::-1]), ("less likely", order)):
        moved = [t for t in places[:most] if abs(ratios[t] - 1) > 0.005 and (ratios[t] > 1) == (name == "likelier")]
        shown = ", ".join(f"{t} {quoted(row['tokens'][t]['text'])} x{ratios[t]:.3g}" for t in moved)
        lines.append(wrapped(f"{name:13}{shown or 'none'}", " " * 13))
    return "\n".join(lines)


def outcome(trace: dict) -> str:
    """What the update did to all of its batch, in a few lines."""
    batch = trace["batch"]
    before, after = batch["epochs"][0], batch["epochs"][-1]

    def course(name: str) -> str:
        return f"{before[name]:.4f} -> {after[name]:.4f}"

    lines = [
        f"the update, over all {batch['n_tokens']} tokens of its {batch['n_rows']} responses:",
        f"KL to the sampler {after['kl_k3']:.4f} nats a token (k3), ratio {after['ratio_min']:.3g} to "
        f"{after['ratio_max']:.3g}, {after['clip_fraction']:.1%} of tokens clipped;",
        f"policy loss {course('policy_loss')}, value loss {course('value_loss')}, |value - return| "
        f"{course('value_error')}",
    ]
    return "\n".join(map(wrapped, lines))


def legend(columns: Sequence[Column], trace: dict, paint: Callable) -> str:
    """A line a column: what it is, with the settings filled in."""
    known = trace["settings"] | trace["batch"]
    known |= {"k": KL[known["kl_estimator"]], "low": 1 - known["clip_range"], "high": 1 + known["clip_range"]}
    scale = trace["whitening"]
    whitened = "(adv - {mean:.4g}) / sqrt({variance:.4g} + 1e-8), over {n_tokens} tokens: what is trained on"
    known["whitening"] = whitened.format_map(scale) if scale else "= adv, as --no_whiten_advantages asks"
    lines = [f"  {column.heading:10}{column.meaning.format_map(known)}" for column in columns]
    return "\n".join(paint(line, DIM) for line in lines)


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, drop_whitespace=True, break_on_hyphens=False)


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def table(tokens: list[dict], columns: Sequence[Column], numbers: list[dict], paint: Callable) -> str:
    """A line a token: its place, itself, its numbers. Above a column of small ones is the power of ten they are in."""
    places = [str(t) for t in range(len(tokens))]
    found = [cells([token[column.name] for token in numbers]) for column in columns]
    units = [unit for _, unit in found]
    widths = [
        max(len(text) for text in (column.heading, unit, *texts))
        for column, (texts, unit) in zip(columns, found, strict=True)
    ]
    room = WIDTH - len(places[-1]) - 1 - sum(widths) - len(widths)
    texts = [clipped_to(quoted(token["text"]), max(8, min(18, room))) for token in tokens]
    first_width = max(8, *(columns_of(text) for text in texts))

    def line(place: str, text: str, entries: Sequence[str]) -> str:
        filled = [f"{entry:>{width}}" for entry, width in zip(entries, widths, strict=True)]
        return " ".join([f"{place:>{len(places[-1])}}", text + " " * (first_width - columns_of(text)), *filled])

    lines = [paint(line("", "token", [column.heading for column in columns]), BOLD)]
    if any(units):
        lines.append(paint(line("", "", units).rstrip(), DIM))
    for t, token in enumerate(numbers):
        entries = [texts_of[t] for texts_of, _ in found]
        plain_line = line(places[t], texts[t], entries)
        lines.append(coloured(plain_line, columns, token, widths, paint).rstrip())
    return "\n".join(lines)


def coloured(line: str, columns: Sequence[Column], token: dict, widths: list[int], paint: Callable) -> str:
    """The line with its cells painted: they are its last characters, as wide as the widths say."""
    end = len(line)
    for column, width in zip(reversed(columns), reversed(widths), strict=True):
        start = end - width
        line = line[:start] + paint(line[start:end], column.colour(token)) + line[end:]
        end = start - 1
    return line


def cells(values: list) -> tuple[list[str], str]:
    """A column's numbers with as many digits as its largest one needs, and the power of ten that they are in, if any;
    words as they are.
    """
    if isinstance(values[0], str):
        return ["" if value == "unclipped" else value for value in values], ""
    largest = max((abs(value) for value in values if value == value), default=0.0)
    if largest >= 1e4:
        return [f"{value:.2e}" for value in values], ""
    power = 0
    while 0 < largest * 10**power < 0.01 and power < 9:
        power += 3
    digits = 3 if largest * 10**power < 10 else 2 if largest < 100 else 1
    texts = [f"{round(value * 10**power, digits) + 0.0:.{digits}f}" for value in values]  # + 0.0: no -0.000
    return ["0" if value == 0 else text for value, text in zip(values, texts, strict=True)], f"10^-{power}" * (
        power > 0
    )


def quoted(text: str) -> str:
    """A token in quotes, so that its spaces are seen, and with escapes for what a terminal would obey."""
    return f'"{visible(text, keep="")}"'


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes: letters of East Asia two, marks on a letter none."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    none = sum(
        unicodedata.combining(letter) > 0 or unicodedata.category(letter) in ("Mn", "Me", "Cf") for letter in text
    )
    return len(text) + wide - none


def clipped_to(text: str, width: int) -> str:
    """The text, or as much of it as has room, with dots in place of the rest."""
    if columns_of(text) <= width:
        return text
    while columns_of(text) > width - 2:
        text = text[:-1]
    return text + ".."
