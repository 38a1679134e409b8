"""What came of a run, to be read and looked at: tables and figures of its training curves and its evaluation."""

import io
import json
import math
import textwrap
from pathlib import Path
from statistics import fmean

from checkpoint import check_writable, run_of, write_whole
from config import UsageError

PANELS = {  # quantity and unit: the columns of training_stats.json that are drawn; reward has its terms, too
    "reward": ["reward"],
    "KL (nats a response)": ["kl_k1", "kl_k3"],
    "entropy (nats a token)": ["entropy"],
    "policy loss": ["policy_loss"],
    "value loss": ["value_loss"],
    "clipped (share of tokens)": ["clip_fraction", "value_clip_fraction"],
    "response length (tokens)": ["response_length"],
}
UNITS = {"kl": "(nats)", "length": "(tokens)", "vocabulary": "(words)", "ended": "(share)", "positive": "(share)"}
COLOURS = ("#332288", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#000000", "#d55e00", "#999999")  # of runs, policies
MARKERS = "osD^vPX*"  # of runs
DASHES = ("-", ":")  # of the columns in one panel

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
    """A line a figure, a column a policy; least and greatest values are left to the file. Beside two, the bound on the
    second and whether it holds; beside more, each one's paired difference from the first, with its 95 % interval.
    """
    figures = comparison["figures"]
    first = next(iter(figures))
    names = [name for name in figures[first] if not name.endswith(("_min", "_max"))]
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


def sample_pairs(comparison: dict, count: int = 3) -> str:
    """A few prompts with each policy's response to it and the reward; those to which all respond alike come last."""
    names = list(comparison["figures"])

    def all_respond_alike(row: dict) -> bool:
        responses = {row[f"response_{name}"] for name in names}
        return len(responses) == 1

    lines = []
    for row in sorted(comparison["samples"], key=all_respond_alike)[:count]:
        lines.append(f"prompt  {row['query']!r}")
        for name in names:
            reward = row[f"reward_{name}"]
            response = row[f"response_{name}"].strip()
            lines.append(f"  {name:6} ({reward:+.2f}) {response}")
    return "\n".join(lines)


def new_figure(n_panels: int) -> list:
    """The panels of a figure, three a row."""
    from matplotlib.figure import Figure  # a quarter of a second and 20 MB, for the end of a run

    rows = math.ceil(n_panels / 3)
    columns = min(n_panels, 3)
    figure = Figure((0.8 + 3 * columns, 1 + 2.4 * rows), layout="constrained")
    return [figure.add_subplot(rows, columns, place) for place in range(1, n_panels + 1)]


def save_figure(panel, path: Path, title: str, notice: str = "") -> Path:
    """Write a panel's figure with the panel's labels, a title and the notice's gist.

    Raises UsageError for a folder that cannot be written, RunError if the disk is full.
    """
    figure = panel.figure
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.suptitle(textwrap.fill(title, int(12 * figure.get_figwidth())), fontsize=10)
    first_line = notice.partition("\n")[0]
    gist = first_line.rpartition(".")[0]  # the sentence that the next line goes on with is left out
    figure.supxlabel(gist, wrap=True, fontsize=7)
    check_writable(path.parent)
    path.parent.mkdir(exist_ok=True)
    image = io.BytesIO()
    figure.savefig(image, dpi=120, format="png")
    write_whole(path, image.getvalue())
    return path


def mean_columns(rows: list[dict], most: int = 50) -> dict[str, list[float]]:
    """The columns to be drawn, each value the mean of as many neighbouring updates as leave at most so many points."""
    names = ["step"]
    for columns in PANELS.values():
        names += columns
    names += [name for name in rows[0] if name.startswith("reward_")]
    size = math.ceil(len(rows) / most)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    return {name: [fmean(row[name] for row in block) for block in blocks] for name in names}


def training_panels(stats: dict[str, dict[str, list[float]]]) -> dict[str, list[str]]:
    """The columns in each panel by its label: behind the reward, each of its terms that is not all of it everywhere."""
    panels = {"reward": ["reward"]}
    for own in stats.values():
        for name, values in own.items():
            if name.startswith("reward_") and values != own["reward"]:
                panels[name] = [name]
    return panels | PANELS


def draw_curves(axis, columns: list[str], own: dict[str, list[float]], colour: str, marker: str) -> None:
    """A run's curves in one panel. Of a term that the run has not, there is a line without points."""
    missing = [math.nan] * len(own["step"])
    for column, dash in zip(columns, DASHES, strict=False):
        values = own.get(column, missing)
        axis.plot(own["step"], values, dash, color=colour, marker=marker, markersize=4, markevery=5, linewidth=1)


def draw_frontier(axis, own: dict[str, list[float]], name: str, colour: str, marker: str) -> None:
    """A run's way through KL and reward, and the point where it ends: where it is on average in its last fifth."""
    n_last = math.ceil(len(own["step"]) / 5)
    kl = fmean(own["kl_k1"][-n_last:])
    reward = fmean(own["reward"][-n_last:])
    axis.plot(own["kl_k1"], own["reward"], color=colour, alpha=0.3)
    axis.plot(kl, reward, marker, color=colour, label=name)


def plot_training(folder: Path, notice: str = "", runs: dict[str, Path] | None = None) -> Path:
    """Draw a run's curves into its plots/training.png, or those of named runs into plots/runs.png; return the path."""
    path = folder / "plots" / ("runs.png" if runs else "training.png")
    runs = runs or {folder.name: folder}
    stats = {name: read_json(run / "training_stats.json", mean_columns) for name, run in runs.items()}
    panels = training_panels(stats)
    *axes, frontier = new_figure(len(panels) + 1)
    for number, (name, own) in enumerate(stats.items()):
        colour = COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        for axis, columns in zip(axes, panels.values(), strict=True):
            draw_curves(axis, columns, own, colour, marker)
        draw_frontier(frontier, own, name, colour, marker)
    for axis, (label, columns) in zip(axes, panels.items(), strict=True):
        axis.set(xlabel="update", ylabel=label)
        axis.locator_params(axis="x", integer=True)
        if len(columns) > 1:
            axis.legend(axis.lines[: len(columns)], columns)
    frontier.set(xlabel="KL (nats a response)", ylabel="reward")
    folders = ", ".join(str(run) for run in runs.values())
    return save_figure(frontier, path, f"PPO: {folders}", notice)


def drawn_figures(policies: dict[str, dict[str, float]]) -> list[str]:
    """The figures that have a panel: no spread, and no reward term that is all of the reward of every policy."""
    names = []
    for name in next(iter(policies.values())):
        is_spread = name.endswith(("_std", "_min", "_max"))
        is_the_reward = name.startswith("reward_") and all(own[name] == own["reward"] for own in policies.values())
        if not is_spread and not is_the_reward:
            names.append(name)
    return names


def half_interval(figures: dict[str, float], name: str, n: int) -> float:
    """1.96 standard errors of a mean over n prompts, or of a share that is not 0 or 1; NaN for anything else."""
    mean = figures[name]
    if f"{name}_std" in figures:
        deviation = figures[f"{name}_std"]
    elif UNITS.get(name) == "(share)" and 0 < mean < 1:
        deviation = math.sqrt(mean * (1 - mean))
    else:
        return math.nan
    return 1.96 * deviation / math.sqrt(n - 1)


def draw_bars(axis, name: str, splits: dict[str, dict]) -> None:
    """One figure's panel: the splits side by side, and in each a bar a policy with its interval."""
    policies = next(iter(splits.values()))["figures"]
    width = 0.8 / len(policies)
    for number, policy in enumerate(policies):
        places = []
        heights = []
        errors = []
        for place, part in enumerate(splits.values()):
            own = part["figures"][policy]
            places.append(place + (number + 0.5) * width - 0.4)
            heights.append(own[name])
            errors.append(half_interval(own, name, part["n_prompts"]))
        colour = COLOURS[number % len(COLOURS)]
        axis.bar(places, heights, width, yerr=errors, ecolor="gray", capsize=3, color=colour, label=policy)
    unit = UNITS.get(name, "")
    axis.set(ylabel=f"{name} {unit}", xticks=range(len(splits)), xticklabels=splits)


def plot_comparison(folder: Path, notice: str = "") -> Path:
    """Draw results/comparison.json into plots/comparison.png: a panel a figure, a bar a policy and split."""
    splits = read_json(folder / "results/comparison.json", lambda content: content["splits"])
    names = drawn_figures(next(iter(splits.values()))["figures"])
    axes = new_figure(len(names))
    for axis, name in zip(axes, names, strict=True):
        draw_bars(axis, name, splits)
    return save_figure(axes[-1], folder / "plots/comparison.png", f"evaluation, 95 % intervals: {folder}", notice)


def show_comparison(folder: Path, notice: str = "") -> None:
    """Print what results/comparison.json says of each split, and draw it."""

    def text_of(content: dict) -> str:
        parts = []
        for split, comparison in content["splits"].items():
            parts.append(f"{folder} on {comparison['n_prompts']} {split} prompts")
            parts += [comparison_table(comparison), reward_difference(comparison), sample_pairs(comparison)]
        if not parts:
            raise LookupError("splits")
        return "\n".join(parts)

    print(read_json(folder / "results/comparison.json", text_of))
    print(f"figures and every sample: {folder / 'results'}")
    print(f"comparison: {plot_comparison(folder, notice)}")


def say_figures(folder: Path, runs: dict[str, Path]) -> None:
    """What a dry run says of the `plot` task: which runs' curves could be drawn, and where."""
    for run in runs.values() or [folder]:
        stats = read_json(run / "training_stats.json", mean_columns)
        print(f"dry run: the curves of {run}, {len(stats['step'])} points each, would be drawn into {folder / 'plots'}")
    check_writable(folder / "plots")


def plot(folder: Path, notice: str = "", policies: tuple[str, ...] = (), dry_run: bool = False) -> None:
    """The `plot` task: a run's curves and comparison again, or the curves of several: NAME=FOLDER, or FOLDER alone."""
    runs = {}
    for entry in policies:
        name, run = run_of(entry)
        runs[name] = Path(run)
    if len(set(runs.values())) < len(policies):
        raise UsageError(f"--policies {' '.join(policies)}: expected NAME=FOLDER of each run, each of them once")
    if dry_run:
        return say_figures(folder, runs)
    print(plot_training(folder, notice, runs))
    if not runs and (folder / "results/comparison.json").exists():
        show_comparison(folder, notice)


def plot_reliability(folder: Path, probabilities: list[float], right: list[bool], bins: int = 10) -> Path:
    """Draw how often a classifier is right against how certain it is: on the diagonal if its certainty is honest."""
    from sklearn.calibration import calibration_curve  # here, as it takes a second to import

    shares, certainties = calibration_curve(y_true=right, y_prob=probabilities, n_bins=bins)
    [axis] = new_figure(1)
    axis.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    axis.plot(certainties, shares, "o")
    axis.set(xlabel="certainty", ylabel="share that is right")
    return save_figure(axis, folder / "plots/reliability.png", f"{folder}: {len(right)} held-out rows")
