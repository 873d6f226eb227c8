"""Pocket translation, English to German, with gender, case and word order. Columns of WMT14."""

import random

GENDERS = {"m": ("Der", "den", "einen"), "f": ("Die", "die", "eine"), "n": ("Das", "das", "ein")}
# English noun, German noun, gender; the German nouns are the same in the nominative and the accusative
SUBJECTS = (
    ("man", "Mann", "m"),
    ("woman", "Frau", "f"),
    ("child", "Kind", "n"),
    ("teacher", "Lehrer", "m"),
    ("girl", "Mädchen", "n"),
    ("sister", "Schwester", "f"),
    ("father", "Vater", "m"),
    ("mother", "Mutter", "f"),
)
OBJECTS = (
    ("apple", "Apfel", "m"),
    ("book", "Buch", "n"),
    ("lamp", "Lampe", "f"),
    ("house", "Haus", "n"),
    ("car", "Auto", "n"),
    ("table", "Tisch", "m"),
    ("flower", "Blume", "f"),
    ("ball", "Ball", "m"),
    ("key", "Schlüssel", "m"),
    ("letter", "Brief", "m"),
    ("cup", "Tasse", "f"),
    ("picture", "Bild", "n"),
)
VERBS = (
    ("buys", "kauft"),
    ("sees", "sieht"),
    ("finds", "findet"),
    ("sells", "verkauft"),
    ("looks for", "sucht"),
    ("needs", "braucht"),
)
ADJECTIVES = (
    ("small", "klein"),
    ("big", "groß"),
    ("new", "neu"),
    ("old", "alt"),
    ("red", "rot"),
    ("green", "grün"),
    ("black", "schwarz"),
)
# German puts the time before the object
TIMES = (("", ""), (" today", " heute"), (" tomorrow", " morgen"), (" on Monday", " am Montag"))


def draw_translation(rng: random.Random) -> dict:
    """Subject, verb, object with an article and an adjective, and perhaps a time."""
    subject_en, subject_de, subject_gender = rng.choice(SUBJECTS)
    verb_en, verb_de = rng.choice(VERBS)
    object_en, object_de = _object(rng)
    time_en, time_de = rng.choice(TIMES)
    article = GENDERS[subject_gender][0]
    return {
        "translation": {
            "en": f"The {subject_en} {verb_en} {object_en}{time_en}.",
            "de": f"{article} {subject_de} {verb_de}{time_de} {object_de}.",
        }
    }


def _object(rng: random.Random) -> tuple[str, str]:
    """An object in English, and in the German accusative."""
    noun_en, noun_de, gender = rng.choice(OBJECTS)
    adjective_en, adjective_de = rng.choice(ADJECTIVES)
    definite = rng.random() < 0.5
    _, the, a = GENDERS[gender]
    # weak endings after the definite article, strong ones after "ein" where it shows no gender
    ending = {"m": "en", "f": "e", "n": "e" if definite else "es"}[gender]
    article_en = "the" if definite else ("an" if adjective_en == "old" else "a")
    return (
        f"{article_en} {adjective_en} {noun_en}",
        f"{the if definite else a} {adjective_de}{ending} {noun_de}",
    )
