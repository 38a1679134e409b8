"""The demonstration notebook: stored without results, and what comes out of it when it is run."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from micro import listing
from nbclient import NotebookClient

import train

ROOT = Path(train.__file__).resolve().parent
DEMO = ROOT / "notebooks/demo.ipynb"
FILES = [*ROOT.glob("*.py"), ROOT / "presets.yaml", DEMO, ROOT / "notebooks/exercises.py"]  # all that it needs
FOUND = """
import json
weights = [[p.detach().clone() for p in m.language_model.parameters()] for m in (fixed.reference, policy)]
moved = max((after - before).abs().max().item() for before, after in zip(*weights))
start = [first.kl.abs().max().item(), first.values.abs().max().item()]
print(json.dumps({"log": log, "start": start, "comparison": comparison, "moved": moved,
                  "figure": (work / "plots/training.png").exists(), "work": str(work)}))
"""


@pytest.fixture(scope="module")
def demo() -> nbformat.NotebookNode:
    return nbformat.read(DEMO, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the modules and the notebook, so that whatever is written beside them is seen."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "notebooks").mkdir()
    for file in FILES:
        shutil.copy(file, folder / file.relative_to(ROOT))
    return folder


def run(demo, project: Path, scratch: Path) -> dict:
    """What the notebook's own variables hold after a run in the folder where Jupyter starts it, and what it printed."""
    notebook = demo.copy()
    notebook.cells = [*demo.cells, nbformat.v4.new_code_cell(FOUND)]
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(project / "notebooks")}})
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(scratch))
        patch.setenv("OMP_NUM_THREADS", "1")
        client.execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    printed = {name: "".join(output.get("text", "") for output in some) for name, some in outputs.items()}
    return json.loads(notebook.cells[-1].outputs[0].text) | {"printed": printed}


def test_the_stored_notebook_is_valid_and_holds_no_results(demo):
    nbformat.validate(demo)
    assert demo.nbformat == 4
    code = [cell for cell in demo.cells if cell.cell_type == "code"]
    assert len(code) >= 8
    assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)


def test_the_loop_that_the_readme_shows_is_the_notebooks(demo):
    """Line by line, but for the comments: and the notebook is run below."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    lines = [line.partition("  #")[0].rstrip() for line in block.splitlines()]
    assert lines[0].startswith("for number in range(")
    cell = next(cell.source for cell in demo.cells if "for number in range(" in cell.source)
    assert "\n".join(lines[1:]) in cell


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_the_modules_are_found_from_the_root_and_from_the_notebooks_folder(folder, demo, project):
    setup = next(cell.source for cell in demo.cells if cell.cell_type == "code")
    code = f"{setup}\nimport config\nprint(config.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=project / folder, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == [str(project / "config.py")], done.stderr


def test_the_notebook_trains_a_policy_and_compares_it_with_its_start(demo, project, tmp_path):
    """One test, as a run takes half a minute. Over four seeds the held-out reward rose by 0.27 to 0.45."""
    found = run(demo, project, tmp_path)
    log, comparison = found["log"], found["comparison"]

    # policy and reference start equal, and all values are 0
    assert found["start"] == pytest.approx([0, 0], abs=1e-3)

    # training moves the policy, and raises the reward on held-out prompts
    assert [row["step"] for row in log] == list(range(2, 8))
    assert found["moved"] > 1e-3
    assert log[-1]["kl_k3"] > 0.5
    rise = comparison["differences"]["after"]["reward"]
    assert rise["low"] > 0 and rise["difference"] > 0.1

    # the comparison's figures
    assert comparison["n_prompts"] == 64
    before, after = (comparison["figures"][name] for name in ("before", "after"))
    assert all(math.isfinite(value) for value in [*before.values(), *after.values()])
    assert abs(before["kl"]) < 1e-3 < after["kl"]
    assert after["reward"] - before["reward"] == pytest.approx(rise["difference"])

    # the papers' equations by hand, which the cell itself compares with ppo.py; and what is said of the exercises
    by_hand = found["printed"]["by_hand_code"].splitlines()
    assert by_hand[0].split() == ["token", "reward", "value", "eq.", "16", "ratio", "eq.", "7"]
    assert len(by_hand) == 2 + 32  # the longest response has max_new_tokens
    price = re.fullmatch(r"eq\. 2: score .* is (-?[\d.]+), and the rewards add up to (-?[\d.]+)", by_hand[-1])
    assert float(price[1]) == pytest.approx(float(price[2]), abs=2e-3)
    for name in ("whiten", "gae", "loss"):
        assert found["printed"][f"{name}_check"] == "Not filled in yet: the function returns nothing.\n"

    # all of it is written into a temporary folder, and nothing beside the modules
    assert found["figure"] and Path(found["work"]).parent == tmp_path
    assert set(listing(project)) == {"notebooks", *(str(file.relative_to(ROOT)) for file in FILES)}
