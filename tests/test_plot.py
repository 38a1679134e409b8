"""The training curves."""

import json

import pytest

from config import UsageError
from plot import PANELS, plot_training, read_stats

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
    assert [row["step"] for row in read_stats(run)] == [0, 1, 2]


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_folder_without_statistics_is_refused(damage, run):
    path = run / "training_stats.json"
    path.unlink() if damage == "missing" else path.write_text("[{")
    with pytest.raises(UsageError, match=r"no training_stats\.json"):
        plot_training(run)
    assert not (run / "plots").exists()
