"""Pocket question answering: three people, one question about one of them. Columns of SQuAD."""

import random

from moa.tasks.pocket_lexicon import CITIES, JOBS, NAMES

FACTS = (
    "{name} works as a {job} in {city}.",
    "{name} is a {job} in {city}.",
    "In {city}, {name} works as a {job}.",
)
# the question, and which part of the fact answers it
QUESTIONS = (
    ("Where does {name} work?", "city"),
    ("In which city is {name}?", "city"),
    ("What is the job of {name}?", "job"),
    ("What does {name} work as?", "job"),
    ("Who works in {city}?", "name"),
    ("Who is the {job}?", "name"),
)


def draw_qa(rng: random.Random) -> dict:
    """Three facts in any order of parts; the question may be about any person and any part."""
    parts = zip(rng.sample(NAMES, 3), rng.sample(JOBS, 3), rng.sample(CITIES, 3), strict=True)
    people = [{"name": name, "job": job, "city": city} for name, job, city in parts]
    context = " ".join(rng.choice(FACTS).format(**person) for person in people)
    question, asked = rng.choice(QUESTIONS)
    person = rng.choice(people)
    answer = person[asked]
    return {
        "context": context,
        "question": question.format(**person),
        "answers": {"text": [answer], "answer_start": [context.index(answer)]},
    }
