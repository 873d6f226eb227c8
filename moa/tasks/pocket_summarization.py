"""Pocket summarization: a short local news item and its headline. Columns of CNN/DailyMail."""

import random

from moa.tasks.pocket_lexicon import CITIES, JOBS, NAMES

# what happened, as the article tells it and as the headline does
EVENTS = (
    ("won the chess cup", "wins chess cup"),
    ("opened a small museum", "opens museum"),
    ("found a lost painting", "finds painting"),
    ("saved a drowning dog", "saves dog"),
    ("broke the swimming record", "breaks swimming record"),
    ("planted a hundred trees", "plants trees"),
    ("built a wooden bridge", "builds bridge"),
    ("sold the old theatre", "sells theatre"),
    ("wrote a book about bees", "writes bee book"),
    ("lost the city election", "loses election"),
    ("repaired the church clock", "repairs church clock"),
    ("caught a giant fish", "catches giant fish"),
)
SETTINGS = (
    "It was a busy day in {city}.",
    "Rain fell on {city} all morning.",
    "The streets of {city} were full.",
    "{city} woke up to clear skies.",
)
DISTRACTORS = (
    "Traffic was slow.",
    "A band played until late.",
    "Coffee was sold out by noon.",
    "Children waved small flags.",
    "The mayor was not there.",
    "Neighbours were surprised.",
    "Nobody was hurt.",
    "A train was delayed.",
)


def draw_summarization(rng: random.Random) -> dict:
    """Four sentences in any order; the headline joins who, what and where, which no sentence does."""
    name, job, city = rng.choice(NAMES), rng.choice(JOBS), rng.choice(CITIES)
    happened, headline = rng.choice(EVENTS)
    sentences = [
        rng.choice(SETTINGS).format(city=city),
        f"{name}, a local {job}, {happened}.",
        *rng.sample(DISTRACTORS, 2),
    ]
    rng.shuffle(sentences)
    return {
        "article": " ".join(sentences),
        "highlights": f"{job.capitalize()} {name} {headline} in {city}.",
    }
