"""Pocket paraphrase: the same words or others, the same roles or swapped ones. Columns of PAWS."""

import random

from moa.tasks.pocket_lexicon import NAMES, listed

# a deed told from its doer, and the same deed told from the other person
DEEDS = (
    ("sold {thing} to", "bought {thing} from"),
    ("lent {thing} to", "borrowed {thing} from"),
    ("gave {thing} to", "got {thing} from"),
    ("taught {subject} to", "learned {subject} from"),
)
THINGS = listed("a car, a boat, a house, a horse, a piano, a tent, a clock, a lamp")
SUBJECTS = listed("French, chess, music, dancing, cooking, physics, tennis, drawing")
TIMES = listed("in May, on Monday, last year, in winter, on Friday, last week, in June, at noon")


def draw_paraphrase(rng: random.Random) -> dict:
    """A deed between two people, then told from the other side (label 1) or with swapped roles (0)."""
    label = rng.randrange(2)
    doer, other = rng.sample(NAMES, 2)
    told, mirrored = rng.choice(DEEDS)
    if rng.random() < 0.5:
        told, mirrored = mirrored, told
    filled = {"thing": rng.choice(THINGS), "subject": rng.choice(SUBJECTS)}
    time = rng.choice(TIMES)
    again = mirrored if label else told
    return {
        "sentence1": f"{doer} {told.format(**filled)} {other} {time}.",
        "sentence2": f"{other} {again.format(**filled)} {doer} {time}.",
        "label": label,
    }
