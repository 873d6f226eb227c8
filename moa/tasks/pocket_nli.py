"""Pocket inference: who keeps what where, and what follows from it. Columns of MNLI."""

import random

from moa.tasks.pocket_lexicon import NAMES, listed

KINDS = {
    "fruit": listed("apples, pears, plums, cherries, lemons"),
    "tools": listed("hammers, saws, drills, shovels, axes"),
    "birds": listed("ducks, geese, hens, parrots, doves"),
    "furniture": listed("chairs, tables, beds, sofas, desks"),
    "clothes": listed("shirts, coats, skirts, scarves, socks"),
    "flowers": listed("roses, tulips, lilies, daisies, violets"),
    "vehicles": listed("trucks, vans, buses, tractors, cars"),
    "instruments": listed("violins, pianos, flutes, drums, guitars"),
}
NUMBERS = listed("two, three, four, five, six, seven, eight, nine")
COLOURS = listed("red, white, black, green, yellow, brown")
PLACES = listed("garden, barn, kitchen, cellar, office, garage, shop, attic")

# what the premise says, what it denies, and what it leaves open
ENTAILED = (
    "{name} has some {kind}.",
    "There are {things} in the {place}.",
    "The {things} are {colour}.",
)
CONTRADICTED = (
    "{name} has no {kind}.",
    "There are no {things} in the {place}.",
    "The {things} are not {colour}.",
)
OPEN = (
    "{name} has some {other_kind}.",
    "{name} has no {other_kind}.",
    "The {things} were cheap.",
    "{name} will sell the {things}.",
    "{name} bought the {things} last week.",
)


def draw_nli(rng: random.Random) -> dict:
    """A premise and what it says (label 0), leaves open (1) or denies (2)."""
    label = rng.randrange(3)
    kind, other_kind = rng.sample(sorted(KINDS), 2)
    parts = {
        "name": rng.choice(NAMES),
        "number": rng.choice(NUMBERS),
        "colour": rng.choice(COLOURS),
        "things": rng.choice(KINDS[kind]),
        "place": rng.choice(PLACES),
        "kind": kind,
        "other_kind": other_kind,
    }
    hypothesis = rng.choice((ENTAILED, OPEN, CONTRADICTED)[label])
    return {
        "premise": "{name} keeps {number} {colour} {things} in the {place}.".format(**parts),
        "hypothesis": hypothesis.format(**parts),
        "label": label,
    }
