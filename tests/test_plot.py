"""Figures hold what the files hold; tables of a comparison: the bounds that training should keep to."""

import json
import math
import os
from itertools import combinations

import pytest
from matplotlib.figure import Figure

from config import Config, RunError, UsageError, to_json
from intervals import wilson_interval
from main import main
from plot import (
    BOUNDS,
    MOST_RUNS,
    PANELS,
    comparison_table,
    differing_settings,
    mean_columns,
    plot,
    plot_comparison,
    plot_reliability,
    plot_training,
    reward_difference,
    sample_pairs,
    show_comparison,
)

NAMES = [name for names in PANELS.values() for name in names]


def statistics(n_updates: int, shift: float = 0.0, **terms) -> list[dict]:
    """Rows in which the nth statistic of update t is n + t / 10 + shift, and a term what its function says of t."""
    return [
        {"step": t}
        | {name: n + t / 10 + shift for n, name in enumerate(NAMES)}
        | {f"reward_{name}": value(t) for name, value in terms.items()}
        | {"alarms": ["a text"]}
        for t in range(n_updates)
    ]


def write_run(folder, rows: list[dict]):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training_stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run_config.json").write_text(to_json(Config()))
    return folder


@pytest.fixture
def run(tmp_path):
    """A run of three updates."""
    return write_run(tmp_path / "run", statistics(3))


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures that would be written, in that order: rendering takes long."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: saved.append(self))
    return saved


def points(line) -> list[tuple[float, float]]:
    return [tuple(point) for point in line.get_xydata().tolist()]


def texts(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_every_statistic_is_drawn_over_the_updates(run, figures):
    path = plot_training(run, "A demonstration. Of three\nSecond line.")
    (figure,) = figures
    *panels, frontier = figure.axes
    assert path == run / "plots/training.png"
    assert [axis.get_ylabel() for axis in panels] == list(PANELS) and {a.get_xlabel() for a in panels} == {"update"}
    for axis, names in zip(panels, PANELS.values(), strict=True):
        assert [points(line) for line in axis.lines] == [
            [(t, NAMES.index(name) + t / 10) for t in range(3)] for name in names
        ]
        assert len({line.get_linestyle() for line in axis.lines}) == len(names)
        assert {line.get_marker() for line in axis.lines} == {""}
        assert (texts(axis.get_legend()) if axis.get_legend() else []) == (names if len(names) > 1 else [])
        assert all(tick == int(tick) for tick in axis.get_xticks())
    assert (frontier.get_xlabel(), frontier.get_ylabel()) == ("KL (nats a response)", "reward")
    assert figure.legends == []
    assert figure.get_supxlabel().endswith("\nA demonstration") and figure.get_suptitle() == f"PPO: {run.name}"


def test_a_figure_says_where_its_curves_are_means(tmp_path, figures):
    for n_updates in (50, 51):
        plot_training(write_run(tmp_path / "run", statistics(n_updates)))
    told = ["means of neighbouring" in figure.get_supxlabel().replace("\n", " ") for figure in figures]
    assert told == [False, True]


def test_a_run_of_one_update_is_seen(tmp_path, figures):
    plot_training(write_run(tmp_path / "run", statistics(1)))
    *panels, _ = figures[0].axes
    assert all(line.get_marker() == "o" for axis in panels for line in axis.lines)


def test_a_term_has_a_panel_unless_it_is_the_reward(tmp_path, figures):
    reward = lambda t: NAMES.index("reward") + t / 10  # noqa: E731
    plot_training(write_run(tmp_path / "alone", statistics(2, reward_model=reward)))
    plot_training(write_run(tmp_path / "half", statistics(2, reward_model=lambda t: 2 * reward(t))))
    plot_training(write_run(tmp_path / "sum", statistics(2, reward_model=lambda t: t + 5, length=lambda t: -t)))
    drawn = [
        [axis.get_ylabel() for axis in figure.axes[:-1] if axis.get_ylabel().startswith("reward")] for figure in figures
    ]
    assert drawn == [["reward"], ["reward", "reward_reward_model"], ["reward", "reward_reward_model", "reward_length"]]
    assert [points(axis.lines[0]) for axis in figures[2].axes[1:3]] == [[(0, 5), (1, 6)], [(0, 0), (1, -1)]]


# ----------------------------------------------------------------------------------------------------------------
# Several runs
# ----------------------------------------------------------------------------------------------------------------


def look_of(line) -> tuple[str, str]:
    return line.get_color(), line.get_linestyle()


def test_several_runs_are_drawn_over_each_other(tmp_path, figures):
    """Each has one colour in all panels, of which each column has its own; the second alone has a term of its own."""
    shifts = {"low": 0.0, "middle": 3.0, "high": -2.0}
    runs = {name: write_run(tmp_path / name, statistics(3, shift)) for name, shift in shifts.items()}
    write_run(runs["middle"], statistics(3, 3.0, length=lambda t: -t))
    assert plot_training(runs["high"], "", runs) == runs["high"] / "plots/runs.png"
    (figure,) = figures
    *panels, frontier = figure.axes
    reward, term, *others = panels
    assert [axis.get_ylabel() for axis in panels] == [
        "reward",
        "reward_length",
        "kl_k1 (nats a response)",
        "kl_k3 (nats a response)",
        "entropy (nats a token)",
        "policy loss",
        "value loss",
        "clip_fraction (share of tokens)",
        "value_clip_fraction (share of tokens)",
        "response length (tokens)",
    ]
    for axis, name in zip([reward, *others], NAMES, strict=True):
        assert [points(line) for line in axis.lines] == [
            [(t, pytest.approx(NAMES.index(name) + t / 10 + shift)) for t in range(3)] for shift in shifts.values()
        ]
    length = [line.get_ydata().tolist() for line in term.lines]
    assert length[1] == [0, -1, -2] and all(math.isnan(value) for values in (length[0], length[2]) for value in values)
    looks = [[look_of(line) for line in axis.lines] for axis in panels]
    assert len({colour for colour, _ in looks[0]}) == 3 and all(own == looks[0] for own in looks)
    assert [look_of(way) for way in frontier.lines[::2]] == looks[0]
    (legend,) = figure.legends
    assert [look_of(line) for line in legend.get_lines()] == looks[0] and texts(legend) == list(runs)
    assert [(runs[name] / "plots").exists() for name in runs] == [False, False, True]


def test_as_many_runs_as_are_drawn_are_told_apart(tmp_path, figures):
    """By colour and dashes, in a panel and in the legend; by colour and marker where they end. One more is refused."""
    runs = {str(k): write_run(tmp_path / str(k), statistics(2, k)) for k in range(MOST_RUNS + 1)}
    assert MOST_RUNS > 12
    with pytest.raises(UsageError, match=f"names {MOST_RUNS + 1} runs, expected at most {MOST_RUNS}: no more can be"):
        plot(tmp_path, "", tuple(str(run) for run in runs.values()))
    del runs[str(MOST_RUNS)]
    plot_training(tmp_path, "", runs)
    (figure,) = figures
    looks = [look_of(line) for line in figure.axes[0].lines]
    assert len(set(looks)) == MOST_RUNS
    (legend,) = figure.legends
    assert [look_of(line) for line in legend.get_lines()] == looks
    ends = [(line.get_color(), line.get_marker()) for line in figure.axes[-1].lines[1::2]]
    assert len(set(ends)) == MOST_RUNS
    assert ends == [(line.get_color(), line.get_marker()) for line in legend.get_lines()]


def test_the_legend_names_the_settings_that_differ(tmp_path, figures):
    """Those of what was done, not where it was put; of many the first six."""
    settings = {"a": {"kl_coef": 0.1, "reward_fn": ""}, "b": {"kl_coef": 0.0, "reward_fn": "f.py:f"}}
    runs = {name: write_run(tmp_path / name, statistics(2)) for name in settings}
    for name, own in settings.items():
        (runs[name] / "run_config.json").write_text(to_json(Config(output_dir=name, run_name=name, **own)))
    words = {"a": "reward_fn none, kl_coef 0.1", "b": "reward_fn f.py:f, kl_coef 0.0"}
    assert differing_settings(runs) == words
    plot_training(runs["a"], "", runs)
    (legend,) = figures[0].legends
    assert [text.replace("\n", " ") for text in texts(legend)] == [f"{name}: {words[name]}" for name in runs]
    many = Config(seed=2, n_updates=7, batch_size=8, mini_batch_size=4, ppo_epochs=1, learning_rate=1.0, gamma=0.5)
    (runs["b"] / "run_config.json").write_text(to_json(many))
    assert differing_settings(runs)["b"] == (
        "seed 2, n_updates 7, batch_size 8, mini_batch_size 4, ppo_epochs 1, learning_rate 1.0, and 2 more"
    )
    (runs["b"] / "run_config.json").write_text("[]")
    with pytest.raises(UsageError, match=r"b holds no run_config\.json of a run, or a damaged one"):
        differing_settings(runs)


def test_a_run_is_a_point_where_its_last_fifth_was(tmp_path, figures):
    """Of ten updates the last two, of three the last one; behind it the way there."""
    rows = statistics(10)
    for row, kl, reward in zip(rows, range(10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 4], strict=True):
        row |= {"kl_k1": kl, "reward": reward}
    runs = {"long": write_run(tmp_path / "long", rows), "short": write_run(tmp_path / "short", statistics(3))}
    plot_training(runs["long"], "", runs)
    way, end, short_way, short_end = figures[0].axes[-1].lines
    assert points(way) == [(row["kl_k1"], row["reward"]) for row in rows]
    assert points(end) == [(8.5, 6.0)] and end.get_marker() == "o"
    assert points(short_way)[-1:] == points(short_end) == [(NAMES.index("kl_k1") + 0.2, 0.2)]
    assert way.get_marker() == "None" and way.get_alpha() < 0.5


@pytest.mark.parametrize(
    ("n_updates", "steps"),
    [(1, [0]), (50, list(range(50))), (51, [*(t + 0.5 for t in range(0, 50, 2)), 50]), (120, list(range(1, 120, 3)))],
)
def test_a_long_run_is_drawn_as_means_of_neighbours(n_updates, steps):
    columns = mean_columns(statistics(n_updates, length=lambda t: t * t))
    assert set(columns) == {"step", *NAMES, "reward_length"}
    assert columns["step"] == steps
    assert columns["entropy"] == pytest.approx([NAMES.index("entropy") + step / 10 for step in steps])
    if n_updates == 120:
        assert columns["reward_length"][:2] == pytest.approx([(0 + 1 + 4) / 3, (9 + 16 + 25) / 3])


def as_lines(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


DAMAGES = {
    "missing": None,
    "broken": "[{\n",
    "empty": "",
    "a list": "[]\n",
    "numbers": "1\n2\n",
    "a column lost": as_lines([*statistics(2), {"step": 2}]),
    "text": as_lines([statistics(1)[0] | {"entropy": "high"}]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_without_whole_statistics_is_refused(damage, run, tmp_path):
    broken = write_run(tmp_path / "broken", statistics(3))
    path = broken / "training_stats.jsonl"
    path.unlink() if DAMAGES[damage] is None else path.write_text(DAMAGES[damage])
    for plotted in (lambda: plot_training(broken), lambda: plot(run, "", (str(run), f"b={broken}"))):
        with pytest.raises(UsageError, match=r"broken holds no training_stats\.jsonl of a run, or a damaged one$"):
            plotted()
    assert not (broken / "plots").exists() and not (run / "plots").exists()


def test_a_folder_that_cannot_be_written_is_refused(run):
    (run / "plots").write_text("")
    with pytest.raises(UsageError, match="plots cannot be written"):
        plot_training(run)


def test_a_figure_for_which_there_is_no_room_is_told_and_not_begun(run, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"training\.png cannot be written: No space left on device"):
        plot_training(run)
    assert list((run / "plots").iterdir()) == []


def test_runs_are_named_on_the_command_line(tmp_path, monkeypatch, capsys):
    """NAME=FOLDER, in which the folder may have an equals sign, or FOLDER alone; the run that is there is the home."""
    monkeypatch.chdir(tmp_path)
    for name in ("home", "sweep/0.1", "sweep/kl=0.2"):
        write_run(tmp_path / name, statistics(2))
    given = []
    monkeypatch.setattr("plot.plot_training", lambda folder, notice, runs: given.append((folder, runs)) or "drawn")
    policies = ["--policies", "sweep/0.1/", "--policies", "0.2=sweep/kl=0.2"]
    assert main(["--task", "plot", "--output_dir", "home", *policies]) == 0
    paths = {"0.1": "sweep/0.1", "0.2": "sweep/kl=0.2"}
    assert [(str(folder), {name: str(path) for name, path in runs.items()}) for folder, runs in given] == [
        ("home", paths)
    ]
    assert capsys.readouterr() == ("drawn\n", "using home\n")
    for twice in ("0.1=home", "other=sweep/0.1"):
        assert main(["--task", "plot", "--output_dir", "home", *policies, "--policies", twice]) == 2
        assert "expected NAME=FOLDER of each run, each of them once" in capsys.readouterr().err
    assert len(given) == 1


def boxes(figure) -> list:
    """What is on a figure, each with its labels: panels, legend, title and notice."""
    figure.draw_without_rendering()
    parts = [*figure.legends, figure._suptitle, figure._supxlabel]
    return [axis.get_tightbbox() for axis in figure.axes] + [part.get_window_extent() for part in parts]


def test_the_reliability_figure_has_a_point_a_bin_of_certainty(tmp_path, figures):
    """Two labels: bins of .05 from .5 on. One of two right, one of one, two of two; how many is under the points."""
    plot_reliability(tmp_path, [0.56, 0.59, 0.72, 1.0, 0.99], [True, False, True, True, True], notice="Small. And")
    upper, lower = figures[0].axes
    diagonal, *_ = upper.lines
    assert diagonal.get_xydata().tolist() == [[0.5, 0.5], [1, 1]]
    marks = [container.lines[0].get_xydata().tolist() for container in upper.containers]
    assert marks == [[pytest.approx([0.575, 0.5])], [pytest.approx([0.72, 1.0])], [pytest.approx([0.995, 1.0])]]
    for container, (count, n) in zip(upper.containers, [(1, 2), (1, 1), (2, 2)], strict=True):
        (whisker,) = container.lines[2][0].get_segments()
        assert [end[1] for end in whisker] == pytest.approx(wilson_interval(count, n))
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in lower.patches]
    assert bars == [pytest.approx(bar) for bar in [(0.55, 0.05, 2), (0.7, 0.05, 1), (0.95, 0.05, 2)]]
    assert [text.get_text() for text in lower.texts] == ["2", "1", "2"]
    assert lower.get_xlim() == upper.get_xlim() == (0.5, 1.0)
    title = figures[0].get_suptitle().replace("\n", " ")
    assert title == f"{tmp_path.name}: 4 of 5 held-out rows right; mean certainty 77.2%"
    assert figures[0].get_supxlabel().endswith("Wilson.\nSmall")


def test_of_more_labels_the_likeliest_may_be_less_certain(tmp_path, figures):
    """Of four labels from .25 on; a certainty that rounding puts outside stands at the edge."""
    plot_reliability(tmp_path, [0.25 - 1e-9, 1 + 1e-9], [False, True], n_labels=4)
    upper, lower = figures[0].axes
    assert upper.get_xlim() == (0.25, 1.0)
    assert [bar.get_x() for bar in lower.patches] == [pytest.approx(0.25), pytest.approx(0.925)]


def test_nothing_on_a_figure_overlaps_or_is_cut_off(tmp_path, evaluated, figures):
    """Twelve runs with long names and four terms, every panel with long tick labels; policies with long names."""
    terms = {name: lambda t: -123.4567 * t for name in ("reward_model", "reward_fn", "repetition", "length")}
    runs = {}
    for k in range(12):
        folder = tmp_path / f"saved_models/distilgpt2-imdb/ppo-{k}"
        runs[f"kl_coef 0.00{k}, a seed of its own"] = write_run(folder, statistics(60, 1e-3 * k, **terms))
    notice = (
        "A teaching demonstration: " + "a language model, trained here from scratch on generated movie reviews. " * 3
    )
    plot_training(folder, notice, runs)
    plot_training(folder, notice)
    plot_comparison(evaluated, notice)
    path = evaluated / "results/comparison.json"
    path.write_text(path.read_text().replace("p0", "a policy of its own " * 3))
    plot_comparison(evaluated, notice)
    plot_reliability(folder, [0.6, 0.9, 0.95], [True, False, True], notice=notice)
    assert len(figures) == 5
    for figure in figures:
        width, height = figure.bbox.size
        for one, other in combinations([box for box in boxes(figure) if box.width and box.height], 2):
            assert not one.padded(-2).overlaps(other)
        for box in boxes(figure):
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1


# ----------------------------------------------------------------------------------------------------------------
# Comparisons
# ----------------------------------------------------------------------------------------------------------------

VERDICTS = [
    ("positive", 0.5, 0.9, "yes"),
    ("positive", 0.95, 0.89, "NO"),
    ("length", 10.0, 7.0, "yes"),
    ("length", 10.0, 6.9, "NO"),
    ("length", 10.0, 13.0, "yes"),
    ("length", 10.0, 13.1, "NO"),
    ("distinct_bigrams", 0.5, 0.3, "yes"),
    ("distinct_bigrams", 0.5, 0.29, "NO"),
    ("ended", 0.75, 0.66, "yes"),
    ("ended", 0.75, 0.64, "NO"),
    ("kl", 0.0, 15.0, "yes"),
    ("kl", 0.0, 15.1, "NO"),
    ("perplexity", 4.0, 6.0, "yes"),
    ("perplexity", 4.0, 6.1, "NO"),
    ("reward", 0.1, 0.2, "yes"),
    ("reward", 0.2, 0.2, "NO"),
]


@pytest.mark.parametrize(("name", "before", "after", "verdict"), VERDICTS)
def test_the_table_says_whether_each_bound_holds(name, before, after, verdict):
    figures = {"before": {name: before}, "after": {name: after}}
    heading, line = comparison_table({"figures": figures, "differences": {"after": {}}}).splitlines()
    assert heading.split() == ["before", "after", "should", "be"]
    assert line.split()[:3] == [name, f"{before:.3f}", f"{after:.3f}"]
    assert line.endswith(f": {verdict}")


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.2, "yes"), (-0.01, 0.2, "not shown, as the difference's 95 % interval holds 0"), (-0.2, -0.1, "NO")],
)
def test_a_reward_within_the_interval_of_its_difference_has_not_been_shown_to_rise(low, high, verdict):
    rise = (low + high) / 2
    figures = {"before": {"reward": 1.0}, "after": {"reward": 1.0 + rise}}
    paired = {"after": {"reward": {"difference": rise, "low": low, "high": high}}}
    *_, line = comparison_table({"figures": figures, "differences": paired}).splitlines()
    assert line.endswith(f"higher: {verdict}")


def test_every_bound_is_tested_on_both_sides():
    for name in BOUNDS:
        assert {verdict for other, *_, verdict in VERDICTS if other == name} == {"yes", "NO"}


def comparison(*rewards: float) -> dict:
    """One of policies p0, p1, ... with these mean rewards; intervals of 0.2 about the differences from p0."""
    figures = {
        f"p{n}": {"reward": x, "reward_std": 0.5, "reward_min": x - 1, "reward_max": x + 1, "value": n, "kl": n / 2}
        for n, x in enumerate(rewards)
    }
    shifts = {f"p{n}": x - rewards[0] for n, x in enumerate(rewards) if n}
    differences = {
        name: {"reward": {"difference": shift, "low": shift - 0.1, "high": shift + 0.1}}
        for name, shift in shifts.items()
    }
    intervals = {name: {"reward": [own["reward"] - 0.3, own["reward"] + 0.2]} for name, own in figures.items()}
    samples = [
        {"query": f"Film {k}"}
        | {f"response_{name}": f" is {name}.\n" for name in figures}
        | {f"reward_{name}": n - k for n, name in enumerate(figures)}
        for k in range(5)
    ]
    parts = {"figures": figures, "intervals": intervals, "differences": differences, "samples": samples}
    return {"n_prompts": 8} | parts


def test_a_table_of_two_leaves_out_extremes_and_has_no_verdict_without_a_bound():
    _, *lines = comparison_table(comparison(1.0, 2.0)).splitlines()
    assert [line.split() for line in lines] == [
        ["reward", "1.000", "2.000", "higher:", "yes"],
        ["reward_std", "0.500", "0.500"],
        ["kl", "0.000", "0.500", "at", "most", "15", "nats:", "yes"],
    ]


def test_a_table_of_three_has_paired_differences_from_the_first():
    heading, *lines = comparison_table(comparison(1.0, 1.5, -1.0)).splitlines()
    assert heading.split() == ["p0", "p1", "p2"]
    assert [" ".join(line.split()) for line in lines] == [
        "reward 1.000 1.500 -1.000 p1 - p0 +0.500 [+0.400, +0.600] p2 - p0 -2.000 [-2.100, -1.900]",
        "reward_std 0.500 0.500 0.500",
        "kl 0.000 0.500 1.000",
    ]


def test_a_table_of_one_has_its_figures_alone():
    heading, *lines = comparison_table(comparison(1.0)).splitlines()
    assert heading.split() == ["p0"]
    assert [line.split() for line in lines] == [["reward", "1.000"], ["reward_std", "0.500"], ["kl", "0.000"]]
    assert reward_difference(comparison(1.0)) == ""


def test_long_names_widen_the_table():
    figures = {name: {"kl": 1.0} for name in ("a", "the-longest-name")}
    heading, line = comparison_table({"figures": figures, "differences": {"the-longest-name": {}}}).splitlines()
    assert heading.index("the-longest-name") + 16 == line.index("   at most") and heading.split()[0] == "a"


def test_the_differences_are_printed_with_means_and_intervals():
    assert reward_difference(comparison(1.0, 1.5, -1.0)).splitlines() == [
        "reward on 8 held-out prompts: 1.000 p0, 1.500 p1; difference +0.500, 95 % interval [+0.400, +0.600]",
        "reward on 8 held-out prompts: 1.000 p0, -1.000 p2; difference -2.000, 95 % interval [-2.100, -1.900]",
    ]


def test_samples_stand_one_below_the_other():
    text = sample_pairs(comparison(1.0, 2.0))
    assert text.count("prompt  ") == 3
    assert text.splitlines()[3:6] == ["prompt  'Film 1'", "  p0     (-1.00) is p0.", "  p1     (+0.00) is p1."]
    changed = comparison(1.0, 2.0)
    changed["samples"][0] |= {"response_p0": " is.", "response_p1": " is."}
    order = [line for line in sample_pairs(changed, count=99).splitlines() if line.startswith("prompt")]
    assert order[0] == "prompt  'Film 1'" and order[-1] == "prompt  'Film 0'"


@pytest.fixture
def evaluated(run):
    """A run with a comparison of three policies on two splits."""
    splits = {"validation": comparison(1.0, 1.5, -1.0), "test": comparison(2.0, 2.5, 3.0) | {"n_prompts": 26}}
    for part in splits.values():
        part["figures"] = {n: own | {"reward_reward_model": own["reward"]} for n, own in part["figures"].items()}
    (run / "results").mkdir()
    (run / "results/comparison.json").write_text(json.dumps({"splits": splits}))
    return run


def drawn_marks(axis) -> dict[str, list]:
    """What a panel of a comparison holds: means as (x, y), intervals and bands as (from, to, y), lines' places."""
    marks = {"means": [], "intervals": [], "bands": [], "lines": []}
    for line in axis.lines:
        x, y = line.get_xdata(), line.get_ydata()
        if line.get_linestyle() == ":":
            marks["lines"].append(x[0])
        elif len(x) == 1:
            marks["means"].append((x[0], y[0]))
        else:
            assert y[0] == y[1]
            marks["intervals" if line.get_linewidth() < 2 else "bands"].append((x[0], x[1], y[0]))
    return marks


def test_every_figure_is_drawn_with_a_point_a_policy_and_split(evaluated, figures):
    """Means in rows of a policy, each with its interval; behind it the paired difference, about the first one's mean.

    The one term is the reward, the value head of a policy before PPO is untrained, and KL has no interval here.
    """
    path = plot_comparison(evaluated, "A demonstration.\nSecond line.")
    (figure,) = figures
    assert path == evaluated / "plots/comparison.png"
    assert [axis.get_xlabel() for axis in figure.axes] == ["reward", "kl (nats a response)"]
    reward, kl = (drawn_marks(axis) for axis in figure.axes)
    means = [(1.0, -0.2), (1.5, 0.8), (-1.0, 1.8), (2.0, 0.2), (2.5, 1.2), (3.0, 2.2)]
    assert reward["means"] == [pytest.approx(mean) for mean in means]
    assert reward["intervals"] == [pytest.approx((x - 0.3, x + 0.2, y)) for x, y in means]
    assert reward["bands"] == [pytest.approx((x - 0.1, x + 0.1, y)) for x, y in means if y > 0.5]
    assert reward["lines"] == [1.0, 2.0]
    assert [x for x, _ in kl["means"]] == [0, 0.5, 1] * 2 and kl["lines"] == [0, 0]
    assert kl["intervals"] == kl["bands"] == []
    first, second = figure.axes
    assert first.get_ylim() == second.get_ylim() == (2.5, -0.5)
    assert [label.get_text() for label in first.get_yticklabels()] == ["p0", "p1", "p2"]
    (legend,) = figure.legends
    assert [text.replace("\n", " ") for text in texts(legend)] == [
        "validation: mean of 8 prompts and its 95 % interval",
        "test: mean of 26 prompts and its 95 % interval",
        "95 % interval of the difference from p0",
        "p0",
    ]
    assert len({line.get_color() for line in first.lines}) == 2
    assert "8 validation and 26 test prompts" in figure.get_suptitle().replace("\n", " ")
    caption = figure.get_supxlabel().replace("\n", " ")
    assert caption.endswith(" A demonstration") and figure.get_suptitle().startswith(f"{evaluated.name}: means")
    assert "Wilson, else by bootstrap" in caption and "where one crosses it, no difference has been shown" in caption


def test_a_band_of_shares_ends_where_shares_do(evaluated, figures):
    path = evaluated / "results/comparison.json"
    content = json.loads(path.read_text())
    for part in content["splits"].values():
        for number, (name, own) in enumerate(part["figures"].items()):
            own["ended"] = 0.9 + number / 20
            if number:
                part["differences"][name]["ended"] = {"difference": number / 20, "low": 0.01, "high": 0.2}
    path.write_text(json.dumps(content))
    plot_comparison(evaluated)
    assert [band[:2] for band in drawn_marks(figures[0].axes[-1])["bands"]] == [pytest.approx((0.91, 1.0))] * 4


def test_one_policy_has_no_legend_and_no_differences(evaluated, figures):
    (evaluated / "results/comparison.json").write_text(json.dumps({"splits": {"test": comparison(1.0)}}))
    plot_comparison(evaluated)
    marks = drawn_marks(figures[0].axes[0])
    assert figures[0].legends == [] and marks["lines"] == marks["bands"] == []
    assert (marks["means"], marks["intervals"]) == ([(1.0, 0.0)], [(0.7, 1.2, 0.0)])
    assert "difference" not in figures[0].get_supxlabel()


def test_two_reward_terms_are_drawn_beside_their_sum_and_every_quantity_once(evaluated, figures):
    path = evaluated / "results/comparison.json"
    content = json.loads(path.read_text())
    for part in content["splits"].values():
        for own in part["figures"].values():
            own |= {"reward_reward_model": own["reward"] + 1, "reward_length": -1, "reward_length_std": 0.1}
            own |= {"unique_token_ratio": 0.75, "repetition": 0.25}
    path.write_text(json.dumps(content))
    plot_comparison(evaluated)
    names = [axis.get_xlabel() for axis in figures[0].axes]
    terms = ["reward_reward_model", "reward_length"]
    assert names == ["reward", "kl (nats a response)", *terms, "repetition (share of words)"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"splits": {}}', '{"splits": {"test": {"figures": {}}}}'])
def test_a_damaged_comparison_is_refused(content, evaluated):
    (evaluated / "results/comparison.json").write_text(content)
    with pytest.raises(UsageError, match=r"results holds no comparison\.json of a run, or a damaged one"):
        show_comparison(evaluated)


def test_a_comparison_is_shown_split_by_split(evaluated, monkeypatch, capsys):
    monkeypatch.setattr("plot.plot_comparison", lambda folder, notice: f"{folder}/{notice}.png")
    show_comparison(evaluated, "drawn")
    output = capsys.readouterr().out
    first, second = output.split(f"{evaluated} on 26 test prompts\n")
    assert first.startswith(f"{evaluated} on 8 validation prompts\n")
    splits = json.loads((evaluated / "results/comparison.json").read_text())["splits"].values()
    for part, split in zip((first, second), splits, strict=True):
        for tell in (comparison_table, reward_difference, sample_pairs):
            assert tell(split) in part
    assert output.endswith(f"figures and every sample: {evaluated}/results\ncomparison: {evaluated}/drawn.png\n")


def test_the_plot_task_draws_a_comparison_where_there_is_one(run, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("plot.plot_training", lambda folder, notice, runs: "curves")
    monkeypatch.setattr("plot.show_comparison", lambda folder, notice: shown.append((folder, notice)))
    plot(run, "a notice")
    assert shown == [] and capsys.readouterr().out == "curves\n"
    (run / "results").mkdir()
    (run / "results/comparison.json").write_text("{}")
    plot(run, "a notice")
    assert shown == [(run, "a notice")]
    plot(run, "a notice", (str(run),))
    assert len(shown) == 1


def test_figures_are_written_where_the_task_says(evaluated, capsys):
    plot(evaluated)
    output = capsys.readouterr().out
    for name in ("training.png", "comparison.png"):
        assert f"{evaluated}/plots/{name}\n" in output
        assert (evaluated / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_shown_of_a_comparison_cannot_steer_the_terminal(evaluated, monkeypatch, capsys):
    monkeypatch.setattr("plot.plot_comparison", lambda folder, notice: "figure")
    steered = (evaluated / "results/comparison.json").read_text().replace(" is p1.", r" is \u001b[2J\u202e p1.")
    (evaluated / "results/comparison.json").write_text(steered)
    show_comparison(evaluated)
    output = capsys.readouterr().out
    assert output.count(r" is \x1b[2J\u202e p1.") == 6
    assert not set(output) & set("\x1b\u202e")


def test_a_dollar_in_a_name_or_a_setting_is_no_formula(tmp_path):
    """Drawn, as only then a formula would be read: this one breaks matplotlib's grammar."""
    name = r"$^$ \frac"
    runs = {each: write_run(tmp_path / each.replace("\\", ""), statistics(1)) for each in (name, "b")}
    (runs["b"] / "run_config.json").write_text(to_json(Config(prompt_template="{text} for $_$")))
    assert plot_training(runs[name], "", runs).exists()
    (runs[name] / "results").mkdir()
    both = comparison(1.0, 2.0)
    for part in ("figures", "intervals", "differences"):
        both[part] = {f"{policy} {name}": own for policy, own in both[part].items()}
    (runs[name] / "results/comparison.json").write_text(json.dumps({"splits": {name: both}}))
    assert plot_comparison(runs[name]).exists()
