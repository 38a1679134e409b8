"""What came of a run, to be read and looked at: tables and figures of its training curves and its evaluation."""

import io
import json
import math
import textwrap
from pathlib import Path
from statistics import fmean

from config import UsageError
from files import check_writable, read_rows, write_whole
from folders import STATS, last_name, run_of
from intervals import wilson_interval
from progress import say
from trust import check_links

PANELS = {  # quantity and unit: the columns of training_stats.jsonl that are drawn; reward has its terms, too
    "reward": ["reward"],
    "KL (nats a response)": ["kl_k1", "kl_k3"],
    "entropy (nats a token)": ["entropy"],
    "policy loss": ["policy_loss"],
    "value loss": ["value_loss"],
    "clipped (share of tokens)": ["clip_fraction", "value_clip_fraction"],
    "response length (tokens)": ["response_length"],
}
UNITS = {
    "kl": "(nats a response)",
    "length": "(tokens)",
    "vocabulary": "(different words)",
    "distinct_words": "(share of words)",
    "distinct_bigrams": "(share of pairs)",
    "repetition": "(share of words)",
    "ended": "(share of responses)",
    "positive": "(share of responses)",
    "perplexity": "(a token)",
    "reference_perplexity": "(a token)",
    "rouge1": "(F1)",
    "rouge2": "(F1)",
    "rougeL": "(F1)",
}
COLOURS = ("#332288", "#e69f00", "#117733", "#56b4e9", "#999999", "#000000")  # of runs; far apart to any eye
DASHES = ("-", "--", ":", "-.")  # of the columns in one panel, and of runs when the colours have all been used
MARKERS = "osD^"  # beside the dashes
MOST_RUNS = len(COLOURS) * len(DASHES)  # that can be told apart
MOST_POINTS = 50  # of a curve
BAND = {"linewidth": 7, "alpha": 0.3, "solid_capstyle": "butt"}  # of a paired difference
PLACES = ("task", "output_dir", "final_dir", "run_name", "policies")  # settings that say where a run is, not what

FRONTIER_CAPTION = "Reward against KL: the way there, faint, and as a point the mean of the last fifth of the updates."
MEANS_OF_UPDATES_CAPTION = f" Of more than {MOST_POINTS} updates, the means of neighbouring ones are drawn."
MEANS_CAPTION = (
    "Lines: 95 % intervals over prompts, of a share by Wilson, else by bootstrap. Figures of all responses together "
    "(vocabulary, distinct words and pairs) have none."
)
DIFFERENCES_CAPTION = (
    " Bands: those of the difference prompt by prompt, drawn from the dotted line on; where one crosses it, no "
    "difference has been shown."
)
RELIABILITY_CAPTION = "Each point is a bin's rows at their mean certainty; 95 % intervals by Wilson."

# What training may do to a text and no more: a rising reward with broken text is a failure.
BOUNDS = {
    "reward": ("higher", lambda before, after: after > before),
    "positive": ("on the built-in reviews, at least 90 %", lambda before, after: after >= 0.9),
    "length": ("70 to 130 % of before", lambda before, after: 0.7 <= after / before <= 1.3),
    "distinct_bigrams": ("at least 60 % of before", lambda before, after: after >= 0.6 * before),
    "ended": ("at most 10 points under before", lambda before, after: after >= before - 0.1),
    "kl": ("at most 15 nats", lambda before, after: after <= 15),
    "perplexity": ("at most 1.5 x before", lambda before, after: after <= 1.5 * before),
}


def read_json(path: Path, pick):
    """What `pick` takes from a file that a run left. Raises UsageError if there is none, or it is damaged."""
    try:
        return pick(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path.parent} holds no {path.name} of a run, or a damaged one") from None


def read_curves(run: Path) -> dict[str, list[float]]:
    """The columns of a run's statistics that are drawn. Raises UsageError if it has none, or they are damaged."""
    path = run / STATS
    try:
        return mean_columns(read_rows(path))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{run} holds no {path.name} of a run, or a damaged one") from None


def verdict(name: str, before: float, after: float, paired: dict | None = None) -> str:
    """What a figure should be after training and whether it is; nothing for one without a bound.

    `paired` is its difference prompt by prompt: a reward that has not risen beyond its interval has not been shown to.
    """
    if name not in BOUNDS:
        return ""
    bound, holds = BOUNDS[name]
    answer = "yes" if holds(before, after) else "NO"
    if name == "reward" and paired and paired["low"] <= 0 <= paired["high"]:
        answer = "not shown, as the difference's 95 % interval holds 0"
    return f"   {bound}: {answer}"


def differences_from_first(name: str, first: str, differences: dict[str, dict]) -> str:
    """Each policy's difference from the first in one figure, for those that have it prompt by prompt."""
    parts = []
    for policy, paired in differences.items():
        if name in paired:
            difference = paired[name]
            interval = f"[{difference['low']:+.3f}, {difference['high']:+.3f}]"
            parts.append(f"   {policy} - {first} {difference['difference']:+.3f} {interval}")
    return "".join(parts)


def comparison_table(comparison: dict) -> str:
    """A line a figure, a column a policy; least and greatest values are left to the file, and those of the value head,
    which is untrained before PPO. Beside two, the bound on the second and whether it holds; beside more, each one's
    paired difference from the first, with its 95 % interval.
    """
    figures = comparison["figures"]
    first = next(iter(figures))
    left_out = {"value", "value_std"}
    names = [name for name in figures[first] if name not in left_out and not name.endswith(("_min", "_max"))]
    width = max(10, *(len(policy) + 2 for policy in figures))
    heading = " " * 24 + "".join(f"{policy:>{width}}" for policy in figures)
    if len(figures) == 2:
        heading += "   should be"
    lines = [heading]
    for name in names:
        values = [own[name] for own in figures.values()]
        line = f"{name:24}" + "".join(f"{value:{width}.3f}" for value in values)
        if len(figures) == 2:
            before, after = values
            (paired,) = comparison["differences"].values()
            line += verdict(name, before, after, paired.get(name))
        elif len(figures) > 2:
            line += differences_from_first(name, first, comparison["differences"])
        lines.append(line)
    return "\n".join(lines)


def reward_difference(comparison: dict) -> str:
    """A line a policy after the first: both mean rewards on the same prompts, and the interval of the difference."""
    figures = comparison["figures"]
    first, *others = figures
    before = figures[first]["reward"]
    lines = []
    for name in others:
        after = figures[name]["reward"]
        difference = comparison["differences"][name]["reward"]
        lines.append(
            f"reward on {comparison['n_prompts']} held-out prompts: {before:.3f} {first}, {after:.3f} {name}; "
            f"difference {difference['difference']:+.3f}, "
            f"95 % interval [{difference['low']:+.3f}, {difference['high']:+.3f}]"
        )
    return "\n".join(lines)


def telling_samples(comparison: dict, count: int = 3) -> list[dict]:
    """A few of a comparison's samples; those to which all policies respond alike come last."""

    def all_respond_alike(row: dict) -> bool:
        responses = {row[f"response_{name}"] for name in comparison["figures"]}
        return len(responses) == 1

    return sorted(comparison["samples"], key=all_respond_alike)[:count]


def sample_pairs(comparison: dict, count: int = 3) -> str:
    """A few prompts with each policy's response to it and the reward."""
    names = list(comparison["figures"])
    lines = []
    for row in telling_samples(comparison, count):
        lines.append(f"prompt  {row['query']!r}")
        for name in names:
            reward = row[f"reward_{name}"]
            response = row[f"response_{name}"].strip()
            lines.append(f"  {name:6} ({reward:+.2f}) {response}")
    return "\n".join(lines)


def new_figure(n_panels: int, height: float = 2.4) -> list:
    """The panels of a figure, three a row, of a height in inches."""
    from matplotlib.figure import Figure  # a quarter of a second and 20 MB, for the end of a run

    rows = math.ceil(n_panels / 3)
    columns = min(n_panels, 3)
    figure = Figure((0.8 + 3 * columns, 1 + height * rows), layout="constrained")
    return [figure.add_subplot(rows, columns, place) for place in range(1, n_panels + 1)]


def save_figure(figure, path: Path, title: str, caption: str = "", notice: str = "") -> Path:
    """Write a figure with a title, and under it a caption and the notice's gist. All text is drawn letter by letter:
    a name or a setting with `$` in it is no formula.

    Raises UsageError for a folder that cannot be written, RunError if the disk is full.
    """
    from matplotlib.text import Text

    width = figure.get_figwidth()
    figure.suptitle(textwrap.fill(title, int(12 * width)), fontsize=10)
    first_line = notice.partition("\n")[0]
    gist = first_line.rpartition(".")[0]  # the sentence that the next line goes on with is left out
    notes = [textwrap.fill(note, int(16 * width)) for note in (caption, gist) if note]
    figure.supxlabel("\n".join(notes), fontsize=7)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    check_writable(path.parent)
    path.parent.mkdir(exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_whole(path, image.getvalue())
    return path


# ----------------------------------------------------------------------------------------------------------------
# Training curves
# ----------------------------------------------------------------------------------------------------------------


def mean_columns(rows: list[dict], most: int = MOST_POINTS) -> dict[str, list[float]]:
    """The columns to be drawn, each value the mean of as many neighbouring updates as leave at most so many points."""
    names = ["step"]
    for columns in PANELS.values():
        names += columns
    names += [name for name in rows[0] if name.startswith("reward_")]
    size = math.ceil(len(rows) / most)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return {name: [fmean(row[name] for row in block) for block in blocks] for name in names}


def training_panels(stats: dict[str, dict[str, list[float]]]) -> dict[str, list[str]]:
    """The columns in each panel by its label: behind the reward, each of its terms that is not all of it everywhere.

    With several runs, whose lines differ in their dashes, a column has a panel of its own.
    """
    panels = {"reward": ["reward"]}
    for own in stats.values():
        for name, values in own.items():
            if name.startswith("reward_") and values != own["reward"]:
                panels[name] = [name]
    for label, columns in PANELS.items():
        if len(stats) == 1 or len(columns) == 1:
            panels[label] = columns
        else:
            unit = label[label.index("(") :]
            panels |= {f"{name} {unit}": [name] for name in columns}
    return panels


def draw_curves(axis, columns: list[str], own: dict[str, list[float]], number: int) -> None:
    """A run's curves in one panel: a column a dash; of a single update, points; of a term that it has not, nothing."""
    turn, colour = divmod(number, len(COLOURS))
    missing = [math.nan] * len(own["step"])
    marker = MARKERS[turn] if len(own["step"]) == 1 else ""
    for column, dash in zip(columns, DASHES[turn:], strict=False):
        values = own.get(column, missing)
        axis.plot(own["step"], values, color=COLOURS[colour], linestyle=dash, marker=marker, linewidth=1.2)


def draw_frontier(axis, own: dict[str, list[float]], number: int) -> None:
    """A run's way through KL and reward, and the point where it ends: where it is on average in its last fifth."""
    turn, colour = divmod(number, len(COLOURS))
    n_last = math.ceil(len(own["step"]) / 5)
    kl = fmean(own["kl_k1"][-n_last:])
    reward = fmean(own["reward"][-n_last:])
    axis.plot(own["kl_k1"], own["reward"], DASHES[turn], color=COLOURS[colour], linewidth=0.8, alpha=0.4)
    axis.plot(kl, reward, MARKERS[turn], color=COLOURS[colour])


def differing_settings(runs: dict[str, Path], most: int = 6) -> dict[str, str]:
    """Each run's values of the settings that are not the same for all of them, in words; of many the first few."""
    settings = {name: read_json(run / "run_config.json", lambda content: content | {}) for name, run in runs.items()}
    everything = dict.fromkeys(key for own in settings.values() for key in own if key not in PLACES)
    first = next(iter(settings.values()))
    differing = [key for key in everything if any(own.get(key) != first.get(key) for own in settings.values())]
    words = {}
    for name, own in settings.items():
        parts = [f"{key} {'none' if own.get(key) in ('', None) else own[key]}" for key in differing[:most]]
        if len(differing) > most:
            parts.append(f"and {len(differing) - most} more")
        words[name] = ", ".join(parts)
    return words


def add_legend_of_runs(figure, runs: dict[str, Path]) -> None:
    """A line and a point a run, its name, and its values of the settings in which the runs differ."""
    from matplotlib.lines import Line2D

    handles = []
    for number, (name, words) in enumerate(differing_settings(runs).items()):
        turn, colour = divmod(number, len(COLOURS))
        label = textwrap.fill(f"{name}: {words}" if words else name, 36)
        look = {"color": COLOURS[colour], "linestyle": DASHES[turn], "marker": MARKERS[turn], "markersize": 4}
        handles.append(Line2D([], [], label=label, **look))
    n_lines = sum(handle.get_label().count("\n") + 1 for handle in handles)
    columns = math.ceil(n_lines / 40)
    figure.set_figwidth(figure.get_figwidth() + 2.7 * columns)
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8, handlelength=3, ncols=columns)


def plot_training(folder: Path, notice: str = "", runs: dict[str, Path] | None = None) -> Path:
    """Draw a run's curves into its plots/training.png, or those of named runs into plots/runs.png; return the path."""
    path = folder / "plots" / ("runs.png" if runs else "training.png")
    runs = runs or {folder.name: folder}
    stats = {name: read_curves(run) for name, run in runs.items()}
    panels = training_panels(stats)
    *axes, frontier = new_figure(len(panels) + 1)
    for number, own in enumerate(stats.values()):
        for axis, columns in zip(axes, panels.values(), strict=True):
            draw_curves(axis, columns, own, number)
        draw_frontier(frontier, own, number)
    for axis, (label, columns) in zip(axes, panels.items(), strict=True):
        axis.set_xlabel("update")
        axis.set_ylabel(label, fontsize=min(10, 280 / len(label)))  # points: no longer than its panel is high
        axis.locator_params(axis="x", integer=True)
        if len(columns) > 1:
            axis.legend(axis.lines[: len(columns)], columns, fontsize=8, handlelength=2.5)
    frontier.set(xlabel="KL (nats a response)", ylabel="reward")
    if len(runs) > 1:
        add_legend_of_runs(frontier.figure, runs)
    title = f"PPO: {len(runs)} runs" if len(runs) > 1 else f"PPO: {last_name(folder)}"
    is_averaged = any(own["step"][0] > 0 for own in stats.values())
    caption = FRONTIER_CAPTION + MEANS_OF_UPDATES_CAPTION if is_averaged else FRONTIER_CAPTION
    notice = notice if len(runs) == 1 else ""  # it is that of one of them
    return save_figure(frontier.figure, path, title, caption, notice)


# ----------------------------------------------------------------------------------------------------------------
# Comparisons
# ----------------------------------------------------------------------------------------------------------------


def splits_of(content: dict) -> dict[str, dict]:
    """The splits of a comparison.json. Raises LookupError if there is none, or a part of one is missing."""
    splits = content["splits"]
    names = ("n_prompts", "figures", "intervals", "differences", "samples")
    if not splits:
        raise LookupError("splits")
    return {split: {name: part[name] for name in names} for split, part in splits.items()}


def drawn_figures(policies: dict[str, dict[str, float]]) -> list[str]:
    """The figures that have a panel: a quantity once, and of policies alone.

    That is no spread, no reward term that is all of the reward of every policy, no value, as the head of a policy
    before PPO is untrained, and not `unique_token_ratio`, which is 1 - `repetition`.
    """
    names = []
    for name in next(iter(policies.values())):
        is_spread = name.endswith(("_std", "_min", "_max"))
        is_the_reward = name.startswith("reward_") and all(own[name] == own["reward"] for own in policies.values())
        if not is_spread and not is_the_reward and name not in ("value", "unique_token_ratio"):
            names.append(name)
    return names


def draw_quantity(axis, name: str, splits: dict[str, dict]) -> None:
    """One figure's panel: a row a policy, in which each split has a point with its interval, and behind it the interval
    of the difference from the first policy, about the first one's mean.
    """
    for number, part in enumerate(splits.values()):
        first, *others = part["figures"]
        mean = part["figures"][first][name]
        colour = COLOURS[number]
        if others:
            axis.axvline(mean, color=colour, linestyle=":", linewidth=1)
        for place, (policy, own) in enumerate(part["figures"].items()):
            row = place + 0.4 * (number - (len(splits) - 1) / 2)
            paired = part["differences"].get(policy, {}).get(name)
            if paired:
                ends = [mean + paired["low"], mean + paired["high"]]
                if "share" in UNITS.get(name, ""):  # of which there is none below 0 or above 1
                    ends = [min(max(end, 0), 1) for end in ends]
                axis.plot(ends, [row, row], color=colour, **BAND)
            if name in part["intervals"][policy]:
                axis.plot(part["intervals"][policy][name], [row, row], color=colour, linewidth=1.2)
            axis.plot(own[name], row, MARKERS[number], color=colour, markersize=4)
    axis.set(xlabel=f"{name} {UNITS.get(name, '')}".strip(), ylim=(len(part["figures"]) - 0.5, -0.5))
    axis.locator_params(axis="x", nbins=5)


def add_legend_of_comparison(figure, splits: dict[str, dict]) -> None:
    """What the marks are, of those that there are."""
    from matplotlib.lines import Line2D

    handles = []
    for number, (split, part) in enumerate(splits.items()):
        label = f"{split}: mean of\n{part['n_prompts']} prompts and\nits 95 % interval"
        handles.append(Line2D([], [], color=COLOURS[number], marker=MARKERS[number], markersize=4, label=label))
    first, *others = next(iter(splits.values()))["figures"]
    if others:
        colour = COLOURS[0] if len(splits) == 1 else "gray"
        first = textwrap.fill(first, 24)
        label = f"95 % interval of the\ndifference from\n{first}"
        handles.append(Line2D([], [], color=colour, label=label, **BAND))
        handles.append(Line2D([], [], color=colour, label=first, linestyle=":", linewidth=1))
    if len(handles) > 1:
        figure.set_figwidth(figure.get_figwidth() + 2)
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8, labelspacing=1)


def plot_comparison(folder: Path, notice: str = "") -> Path:
    """Draw results/comparison.json into plots/comparison.png: a panel a figure, a row a policy, a colour a split."""
    splits = read_json(folder / "results/comparison.json", splits_of)
    figures = next(iter(splits.values()))["figures"]
    names = drawn_figures(figures)
    labels = [textwrap.fill(policy, 24) for policy in figures]
    n_lines = max(label.count("\n") + 1 for label in labels)
    row_height = max(0.08 + 0.12 * len(splits), 0.16 * n_lines)
    axes = new_figure(len(names), height=0.8 + row_height * len(figures))
    for place, (axis, name) in enumerate(zip(axes, names, strict=True)):
        draw_quantity(axis, name, splits)
        axis.set_yticks(range(len(figures)), labels if place % 3 == 0 else [""] * len(figures), fontsize=9)
    add_legend_of_comparison(axes[0].figure, splits)
    counts = " and ".join(f"{part['n_prompts']} {split}" for split, part in splits.items())
    title = f"{last_name(folder)}: means over {counts} prompts"
    caption = MEANS_CAPTION + DIFFERENCES_CAPTION if len(figures) > 1 else MEANS_CAPTION
    return save_figure(axes[0].figure, folder / "plots/comparison.png", title, caption, notice)


def show_comparison(folder: Path, notice: str = "") -> None:
    """Print what results/comparison.json says of each split, and draw it."""

    def text_of(content: dict) -> str:
        parts = []
        for split, comparison in splits_of(content).items():
            parts.append(f"{folder} on {comparison['n_prompts']} {split} prompts")
            parts += [comparison_table(comparison), reward_difference(comparison), sample_pairs(comparison)]
        return "\n".join(parts)

    say(read_json(folder / "results/comparison.json", text_of))
    print(f"figures and every sample: {folder / 'results'}")
    print(f"comparison: {plot_comparison(folder, notice)}")


def say_figures(folder: Path, runs: dict[str, Path]) -> None:
    """What a dry run says of the `plot` task: which runs' curves could be drawn, and where."""
    for run in runs.values() or [folder]:
        stats = read_curves(run)
        print(f"dry run: the curves of {run}, {len(stats['step'])} points each, would be drawn into {folder / 'plots'}")
    check_writable(folder / "plots")


def plot(folder: Path, notice: str = "", policies: tuple[str, ...] = (), dry_run: bool = False) -> None:
    """The `plot` task: a run's curves and comparison again, or the curves of several: NAME=FOLDER, or FOLDER alone."""
    runs = {}
    for entry in policies:
        name, run = run_of(entry)
        check_links(Path(run), "policies")
        runs[name] = Path(run)
    if len(set(runs.values())) < len(policies):
        raise UsageError(f"--policies {' '.join(policies)}: expected NAME=FOLDER of each run, each of them once")
    if len(runs) > MOST_RUNS:
        raise UsageError(f"--policies names {len(runs)} runs, expected at most {MOST_RUNS}: no more can be told apart")
    if dry_run:
        return say_figures(folder, runs)
    print(plot_training(folder, notice, runs))
    if not runs and (folder / "results/comparison.json").exists():
        show_comparison(folder, notice)


def reliability_bins(probabilities: list[float], right: list[bool], lowest: float, bins: int = 10) -> list[dict]:
    """Of each bin of equal width between `lowest` and 1 that has rows: its edges, rows, their mean certainty, the share
    that is right, and that one's 95 % interval.
    """
    width = (1 - lowest) / bins
    rows_of = [[] for _ in range(bins)]
    for probability, is_right in zip(probabilities, right, strict=True):
        number = int((probability - lowest) / width)
        rows_of[min(max(number, 0), bins - 1)].append((probability, is_right))
    found = []
    for number, rows in enumerate(rows_of):
        if rows:
            n_right = sum(is_right for _, is_right in rows)
            low, high = wilson_interval(n_right, len(rows))
            certainty = fmean(probability for probability, _ in rows)
            edge = lowest + number * width
            own = {"left": edge, "width": width, "count": len(rows), "certainty": certainty}
            found.append(own | {"share": n_right / len(rows), "low": low, "high": high})
    return found


def plot_reliability(
    folder: Path, probabilities: list[float], right: list[bool], n_labels: int = 2, notice: str = ""
) -> Path:
    """Draw how often a classifier is right against how certain it is: on the diagonal if its certainty is honest.

    Of n_labels, the likeliest has a probability of 1 / n_labels at least.
    """
    from matplotlib.figure import Figure

    lowest = 1 / n_labels
    bins = reliability_bins(probabilities, right, lowest)
    figure = Figure((5, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([lowest, 1], [lowest, 1], color="gray", linestyle="--", linewidth=0.8, label="as right as certain")
    for number, own in enumerate(bins):
        label = "" if number else "share that is right, 95 % interval"
        ends = [[own["share"] - own["low"]], [own["high"] - own["share"]]]
        upper.errorbar(own["certainty"], own["share"], ends, fmt="o", color=COLOURS[0], capsize=3, label=label)
        lower.bar(own["left"], own["count"], own["width"], align="edge", color=COLOURS[0], edgecolor="white")
        centre = own["left"] + own["width"] / 2
        lower.annotate(own["count"], (centre, own["count"]), ha="center", va="bottom", fontsize=7)
    upper.set(ylabel="share that is right")
    upper.legend(frameon=False, fontsize=8)
    lower.set(xlabel="certainty: probability of the likeliest label", ylabel="rows", xlim=(lowest, 1))
    lower.margins(y=0.2)
    n_right, certainty = sum(right), fmean(probabilities)
    title = f"{last_name(folder)}: {n_right} of {len(right)} held-out rows right; mean certainty {certainty:.1%}"
    return save_figure(figure, folder / "plots/reliability.png", title, RELIABILITY_CAPTION, notice)
