"""A long run: what an update takes, in memory, files and bytes, does not grow with the updates before it."""

import json
import os
import shutil
from pathlib import Path
from statistics import median

import pytest
from faults import forked
from helpers import read_log, read_stats
from micro import flags, run_main

import report
from files import read_rows

pytest_plugins = ["micro"]

N_UPDATES = 2000


def used() -> dict[str, int]:
    """What this process holds and has written so far."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {
        "kilobytes": int(status["VmRSS"].split()[0]),
        "files": len(os.listdir("/proc/self/fd")),
        "written": int(io["wchar"]),
    }


@pytest.mark.slow
def test_two_thousand_updates_take_no_more_than_the_first(workplace, no_figures):
    """With every log and a tracker, a checkpoint every 50 updates and a look at held-out prompts every 100."""

    def work() -> int:
        real, seen = report.write_logs, []

        def noted(*arguments) -> None:
            before = used()["written"]
            real(*arguments)
            now = used()
            seen.append(now | {"logged": now["written"] - before})

        report.write_logs = noted
        code = run_main(
            "--task",
            "train",
            "--log_with",
            "tensorboard",
            *flags(n_updates=N_UPDATES, output_dir="run", save_every=50, eval_every=100, learning_rate=1e-5),
        )
        Path("used.json").write_text(json.dumps(seen))
        return code

    assert forked(work) == 0
    seen = json.loads(Path("used.json").read_text())
    kilobytes, files, logged = ([row[name] for row in seen] for name in ("kilobytes", "files", "logged"))
    assert len(seen) == N_UPDATES
    assert kilobytes[-1] <= 1.05 * kilobytes[199], (kilobytes[199], kilobytes[-1])
    assert files[199] == files[-1]
    early, late = median(logged[10:60]), median(logged[-50:])
    assert late <= 1.05 * early, (early, late)

    run = Path("run")
    assert [row["step"] for row in read_stats(run)] == list(range(N_UPDATES))
    assert len(read_log(run)) == 4 * N_UPDATES
    seconds = [row["seconds_rollout"] + row["seconds_update"] for row in read_rows(run / report.TIMINGS)]
    print(f"{kilobytes[199]} kB at update 200, {kilobytes[-1]} at the end; {files[-1]} files all along")
    print(f"{early:.0f} bytes of logs an update at first, {late:.0f} at the end")
    print(f"{median(seconds[100:300]):.4f} s an update at first, {median(seconds[-200:]):.4f} at the end")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_1950", "step_2000"]
    shutil.rmtree(run)
