"""Write 2,250 openings of children's stories to openings.jsonl, for docs/results.md."""

import itertools
import json
import random

starts = [
    "Once upon a time, there was",
    "One day, there was",
    "There once was",
    "In a small house lived",
    "Near the sea lived",
]
starts += ["Long ago, there was", "One morning, there was", "In the garden was", "In a big town lived"]
who = ["a little girl named Lily", "a boy named Tim", "a big dog named Max", "a cat named Kitty", "a bird named Bob"]
who += ["a girl named Sue", "an old man named Joe", "a rabbit named Hop", "a little bear named Ted", "a boy named Ben"]
then = ["liked to play in the park", "went to the big forest", "found a shiny box", "had a red ball", "saw a new toy"]
then += ["wanted to help", "went to the lake", "was looking for a friend", "had a small boat", "heard a loud noise"]
then += ["was very hungry", "lost a toy", "had a new hat", "saw a tree", "found a key", "wanted to fly", "was alone"]
then += ["had a bad dream", "saw a storm", "got a gift", "fell in the mud", "made a cake", "broke a cup", "met a frog"]
then += ["saw the moon"]
all_openings = []
for start, name, more in itertools.product(starts, who, then):
    pronoun = "She" if "girl" in name else "He" if "boy" in name or "man" in name else "It"
    all_openings.append(f"{start} {name}. {pronoun} {more}.")
random.Random(0).shuffle(all_openings)
with open("openings.jsonl", "w") as file:
    for text in all_openings:
        file.write(json.dumps({"text": text}) + "\n")
print(len(all_openings))
