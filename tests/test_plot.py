"""Training curves, and the tables and bars of a comparison: the bounds that training should keep to, and the rest."""

import json

import pytest

from config import UsageError
from plot import (
    BOUNDS,
    PANELS,
    comparison_table,
    plot,
    plot_comparison,
    plot_training,
    read_json,
    reward_difference,
    sample_pairs,
    show_comparison,
)

NAMES = [name for names in PANELS.values() for name in names]


@pytest.fixture
def run(tmp_path):
    """A run of three updates in which the nth statistic of update t is n + t / 10."""
    rows = [{"step": t} | {name: n + t / 10 for n, name in enumerate(NAMES)} for t in range(3)]
    (tmp_path / "training_stats.json").write_text(json.dumps(rows))
    return tmp_path


def test_every_statistic_is_drawn_over_the_updates(run, monkeypatch):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    path = plot_training(run, "A demonstration.\nSecond line.")
    monkeypatch.undo()
    (figure,) = figures
    assert path == run / "plots/training.png" and path.read_bytes().startswith(b"\x89PNG")
    assert [axis.get_title() for axis in figure.axes] == list(PANELS)
    lines = [line for axis in figure.axes for line in axis.lines]
    assert all(line.get_xdata().tolist() == [0, 1, 2] for line in lines)
    drawn = {line.get_label(): line.get_ydata().tolist() for line in lines}
    assert drawn == {name: [n + t / 10 for t in range(3)] for n, name in enumerate(NAMES)}
    assert figure.get_supxlabel() == "A demonstration."
    assert str(run) in figure.get_suptitle()
    pyplot.close(figure)


def test_statistics_are_read_as_they_were_written(run):
    assert [row["step"] for row in read_json(run / "training_stats.json")] == [0, 1, 2]


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_folder_without_statistics_is_refused(damage, run):
    path = run / "training_stats.json"
    path.unlink() if damage == "missing" else path.write_text("[{")
    with pytest.raises(UsageError, match=r"no training_stats\.json"):
        plot_training(run)
    assert not (run / "plots").exists()


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


def test_every_bound_is_tested_on_both_sides():
    for name in BOUNDS:
        assert {verdict for other, *_, verdict in VERDICTS if other == name} == {"yes", "NO"}


def comparison(*rewards: float) -> dict:
    """One of policies p0, p1, ... with these mean rewards; intervals of 0.2 about the differences from p0."""
    figures = {
        f"p{n}": {"reward": x, "reward_std": 0.5, "reward_min": x - 1, "reward_max": x + 1, "kl": n / 2}
        for n, x in enumerate(rewards)
    }
    shifts = {f"p{n}": x - rewards[0] for n, x in enumerate(rewards) if n}
    differences = {
        name: {"reward": {"difference": shift, "low": shift - 0.1, "high": shift + 0.1}}
        for name, shift in shifts.items()
    }
    samples = [
        {"query": f"Film {k}"}
        | {f"response_{name}": f" is {name}.\n" for name in figures}
        | {f"reward_{name}": n - k for n, name in enumerate(figures)}
        for k in range(5)
    ]
    return {"n_prompts": 8, "figures": figures, "differences": differences, "samples": samples}


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


@pytest.fixture
def evaluated(run):
    """A run with a comparison of three policies on two splits."""
    splits = {"validation": comparison(1.0, 1.5, -1.0), "test": comparison(2.0, 2.5, 3.0)}
    (run / "results").mkdir()
    (run / "results/comparison.json").write_text(json.dumps({"splits": splits}))
    return run


def test_every_figure_is_drawn_with_a_bar_a_policy_and_split(evaluated, monkeypatch):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    path = plot_comparison(evaluated, "A demonstration.\nSecond line.")
    monkeypatch.undo()
    (figure,) = figures
    assert path == evaluated / "plots/comparison.png" and path.read_bytes().startswith(b"\x89PNG")
    drawn = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in drawn] == ["reward", "kl"]
    heights = [[[bar.get_height() for bar in bars] for bars in axis.containers] for axis in drawn]
    assert heights == [[[1.0, 1.5, -1.0], [2.0, 2.5, 3.0]], [[0.0, 0.5, 1.0]] * 2]
    assert [label.get_text() for label in drawn[0].get_xticklabels()] == ["p0", "p1", "p2"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["validation", "test"]
    centres = [[bar.get_x() + bar.get_width() / 2 for bar in bars] for bars in drawn[0].containers]
    assert [sum(pair) / 2 for pair in zip(*centres, strict=True)] == pytest.approx(list(drawn[0].get_xticks()))
    assert figure.get_supxlabel() == "A demonstration." and str(evaluated) in figure.get_suptitle()
    pyplot.close(figure)


def test_a_comparison_is_shown_split_by_split(evaluated, monkeypatch, capsys):
    monkeypatch.setattr("plot.plot_comparison", lambda folder, notice: f"{folder}/{notice}.png")
    show_comparison(evaluated, "drawn")
    output = capsys.readouterr().out
    first, second = output.split(f"{evaluated} on 8 test prompts\n")
    assert first.startswith(f"{evaluated} on 8 validation prompts\n")
    for part, splits in ((first, (1.0, 1.5, -1.0)), (second, (2.0, 2.5, 3.0))):
        for tell in (comparison_table, reward_difference, sample_pairs):
            assert tell(comparison(*splits)) in part
    assert output.endswith(f"figures and every sample: {evaluated}/results\ncomparison: {evaluated}/drawn.png\n")


def test_the_plot_task_draws_a_comparison_where_there_is_one(run, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("plot.plot_training", lambda folder, notice: "curves")
    monkeypatch.setattr("plot.show_comparison", lambda folder, notice: shown.append((folder, notice)))
    plot(run, "a notice")
    assert shown == [] and capsys.readouterr().out == "curves\n"
    (run / "results").mkdir()
    (run / "results/comparison.json").write_text("{}")
    plot(run, "a notice")
    assert shown == [(run, "a notice")]
