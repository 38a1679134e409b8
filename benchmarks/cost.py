"""How a PPO step's time and memory grow with batch, response length, model and vocabulary: a table and a figure.

    python benchmarks/cost.py costs/

One of four things grows at a time, from a small base; with the batch its minibatch. Each point is a run of step.py in a
process of its own, for the memory's sake. Beside what was measured stands what theory gives: time in proportion to the
matrix products that floor.py counts. A slope is that of the logarithms, 1 for what doubles with its cause. Some ten
minutes on two cores.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.floor import Size, flops, matrix_products

BASE = Size(256, 4, 4, 4096, batch=16, minibatch=16, query_len=16, response_len=32, ppo_epochs=2)
SERIES = {  # what grows: its unit, and the sizes of the four points
    "batch": ("responses", [BASE._replace(batch=n, minibatch=n) for n in (8, 16, 32, 64)]),
    "response_len": ("tokens", [BASE._replace(response_len=n) for n in (16, 32, 64, 128)]),
    "hidden": ("width", [BASE._replace(hidden=n) for n in (128, 256, 512, 1024)]),
    "vocab": ("tokens", [BASE._replace(vocab=n) for n in (2048, 8192, 32768, 65536)]),
}


def measure(size: Size, steps: int) -> dict:
    """Seconds of a step, its peak memory in MB and that above the part that no batch makes larger, and its GFLOP."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in size._asdict().items()]
    flags += ["--matmul-precision=auto"]  # as a run has it
    script = Path(__file__).with_name("step.py")
    done = subprocess.run([sys.executable, script, *flags, f"--steps={steps}"], capture_output=True, text=True)
    if done.returncode:
        *_, reason = [f"exit code {done.returncode}", *done.stderr.splitlines()]
        sys.exit(f"error: step.py {' '.join(flags)}: {reason}")
    report = json.loads(done.stdout)
    above = report["peak_rss_mb"] - sum(report["static_mb"].values())
    gflop = sum(map(flops, matrix_products(size).values())) / 1e9
    return {"seconds": report["total_s"], "memory_mb": report["peak_rss_mb"], "above_static_mb": above, "gflop": gflop}


def slope(xs: list[float], ys: list[float]) -> float:
    """Of log y over log x, by least squares."""
    u, v = ([math.log(value) for value in values] for values in (xs, ys))
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    products = sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True))
    return products / sum((a - mean_u) ** 2 for a in u)


def table(results: dict[str, list[dict]]) -> str:
    lines = [f"{'':14}{'':>8}{'s':>9}{'GFLOP':>10}{'MB':>9}{'MB above static':>17}"]
    for name, rows in results.items():
        for row in rows:
            numbers = f"{row['seconds']:9.3f}{row['gflop']:10.1f}{row['memory_mb']:9.0f}{row['above_static_mb']:17.0f}"
            lines.append(f"{name:14}{row[name]:8}{numbers}")
        slopes = {key: slope([row[name] for row in rows], [row[key] for row in rows]) for key in ("seconds", "gflop")}
        lines.append(f"{'':14}{'slope':>8}{slopes['seconds']:9.2f}{slopes['gflop']:10.2f}")
    return "\n".join(lines)


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """Seconds, and time in proportion to the counted products through the last point; below them, memory."""
    figure = Figure((12, 6), layout="constrained")
    for column, (name, rows) in enumerate(results.items()):
        xs, last = [row[name] for row in rows], rows[-1]
        above, below = (figure.add_subplot(2, 4, 4 * row + column + 1) for row in range(2))
        above.loglog(xs, [row["seconds"] for row in rows], "o-", color="#332288", label="measured")
        theory = [row["gflop"] / last["gflop"] * last["seconds"] for row in rows]
        above.loglog(xs, theory, ":", color="black", label="as the matrix products")
        above.set_xticks(xs, labels=xs)
        above.xaxis.minorticks_off()
        below.plot(xs, [row["memory_mb"] for row in rows], "o-", color="#332288", label="peak")
        below.plot(xs, [row["above_static_mb"] for row in rows], "s-", color="#e69f00", label="above static")
        for axis, unit in ((above, "seconds"), (below, "MB")):
            axis.set(xlabel=f"{name} ({SERIES[name][0]})", ylabel=unit)
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where cost.json, cost.txt and cost.png are written")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a point")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, (_, sizes) in SERIES.items():
        results[name] = [{name: getattr(size, name)} | measure(size, args.steps) for size in sizes]
        print(table({name: results[name]}), flush=True)
        (args.folder / "cost.json").write_text(json.dumps(results, indent=1))
    (args.folder / "cost.txt").write_text(table(results) + "\n")
    draw(results, args.folder / "cost.png")


if __name__ == "__main__":
    main()
