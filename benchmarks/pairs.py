"""Halve a file of pairs so that no prompt is in both halves, for docs/results.md: one half's reward model trains a
policy, and the other's, which never met it, judges.

    python benchmarks/pairs.py pandalm.jsonl

Writes pairs_a/ and pairs_b/, each with train.jsonl and, of a fifth of its prompts, validation.jsonl.
"""

import json
import random
import sys
from pathlib import Path

with open(sys.argv[1], encoding="utf-8") as file:
    rows = [json.loads(line) for line in file]
prompts = sorted({row["prompt"] for row in rows})
random.Random(0).shuffle(prompts)
n = len(prompts)
parts = {
    "pairs_a/train": prompts[: n * 4 // 10],
    "pairs_a/validation": prompts[n * 4 // 10 : n // 2],
    "pairs_b/train": prompts[n // 2 : n * 9 // 10],
    "pairs_b/validation": prompts[n * 9 // 10 :],
}
for name, own in parts.items():
    Path(name).parent.mkdir(exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows if row["prompt"] in own]
    Path(f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{name}: {len(lines)} pairs of {len(own)} prompts")
