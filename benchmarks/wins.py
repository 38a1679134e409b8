"""How often the policy after PPO has a higher reward than that before, prompt by prompt, for docs/results.md.

    python benchmarks/wins.py chat/seed-0 chat/seed-1 chat/seed-2

By the rewards of each run's last `--task evaluate`, with 95 % intervals by Wilson; equal rewards are no win.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from intervals import wilson_interval


def share_of_wins(wins: list[bool]) -> str:
    low, high = wilson_interval(sum(wins), len(wins))
    return f"{sum(wins)} of {len(wins)} = {sum(wins) / len(wins):.0%} [{low:.0%}, {high:.0%}]"


everywhere = []
for run in sys.argv[1:]:
    with open(Path(run) / "results" / "samples.csv", newline="", encoding="utf-8") as file:
        wins = [float(row["reward_after"]) > float(row["reward_before"]) for row in csv.DictReader(file)]
    print(f"{run}: {share_of_wins(wins)}")
    everywhere += wins
print(f"all: {share_of_wins(everywhere)}")
