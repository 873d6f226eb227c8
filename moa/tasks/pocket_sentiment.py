"""Pocket sentiment: one-line reviews with negation and contrast. Columns of SST-2."""

import random

from moa.tasks.pocket_lexicon import listed

ASPECTS = listed(
    "plot, acting, music, dialogue, ending, cast, story, script, pacing, camerawork, humour, opening, "
    "scenery, score, editing, finale"
)
GOOD = listed("wonderful, moving, clever, charming, fresh, gripping, warm, funny, elegant, superb, tender, vivid")
BAD = listed("dull, clumsy, boring, stale, messy, tedious, bland, awful, lifeless, shallow, clunky, tiresome")
# where the two clauses disagree, the main one decides, wherever it stands
FORMS = (
    "{same} and {main} .",
    "{other} , but {main} .",
    "although {other} , {main} .",
    "{main} , although {other} .",
)


def draw_sentiment(rng: random.Random) -> dict:
    """What a review says of two aspects of a film (label 1: positive)."""
    label = rng.randrange(2)
    first, second = rng.sample(ASPECTS, 2)
    sentence = rng.choice(FORMS).format(
        same=_clause(rng, first, bool(label)),
        other=_clause(rng, first, not label),
        main=_clause(rng, second, bool(label)),
    )
    return {"sentence": sentence, "label": label}


def _clause(rng: random.Random, aspect: str, good: bool) -> str:
    """What is said of one aspect: plainly, or by denying the opposite."""
    negated = rng.random() < 0.35
    adjective = rng.choice(GOOD if good != negated else BAD)
    denial = rng.choice(("not ", "never ", "hardly ")) if negated else ""
    return f"the {aspect} is {denial}{adjective}"
