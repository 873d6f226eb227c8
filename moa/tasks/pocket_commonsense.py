"""Pocket common sense: the tool that serves, the step that comes first, the place that is large enough.

Columns of PIQA. In every pair the wrong solution is the right one of another goal, or its steps in the wrong
order, so that no solution is likelier in itself.
"""

import random

from moa.tasks.pocket_lexicon import listed

# a tool, what it does, and what it does that to
USES = tuple(
    (tool, listed(verbs), listed(things))
    for tool, verbs, things in (
        ("a knife", "slice, cut up", "bread, cheese, cake, meat, melon, ham"),
        ("a hammer", "pound, flatten", "plank, board, metal sheet, stake, fence, tile"),
        ("a needle", "sew, mend", "shirt, dress, curtain, sock, pillow, coat"),
        ("a brush", "varnish, coat", "wall, door, chair, shelf, toy, gate"),
        ("a hose", "water, rinse", "lawn, garden, hedge, rose, tree, patio"),
        ("a broom", "tidy, clear", "floor, path, porch, stair, hall, yard"),
        ("a ladder", "reach, inspect", "roof, attic, chimney, gutter, loft, treetop"),
        ("a sieve", "strain, sift", "flour, pasta, tea, sugar, juice, sand"),
        ("a wrench", "tighten, loosen", "bolt, nut, pipe, tap, wheel, valve"),
        ("a rope", "tie up, tow", "boat, horse, log, sledge, car, bundle"),
    )
)
# what comes first, what comes after, and what it is done to
STEPS = tuple(
    (first, then, listed(things))
    for first, then, things in (
        ("peel", "eat", "orange, banana, mango, egg, prawn, melon, kiwi, carrot"),
        ("fill", "seal", "jar, bag, envelope, bottle, box, bucket, crate, tube"),
        ("measure", "cut", "plank, cloth, pipe, carpet, rope, wire, ribbon, tile"),
        ("sand", "paint", "chair, table, shelf, door, bench, gate, stool, cupboard"),
        ("wash", "iron", "shirt, skirt, dress, sheet, blouse, apron, scarf, napkin"),
        ("open", "read", "letter, book, parcel, folder, message, diary, map, card"),
        ("plug in", "switch on", "lamp, radio, kettle, fan, heater, toaster, mixer, drill"),
        ("unlock", "enter", "house, office, shed, cabin, car, garage, vault, cellar"),
        ("thaw", "cook", "chicken, fish, steak, turkey, sausage, burger, crab, lamb"),
        ("melt", "pour", "butter, chocolate, wax, lead, gold, sugar, fat, plastic"),
        ("weigh", "post", "parcel, letter, package, box, gift, crate, envelope, book"),
        ("catch", "release", "mouse, bird, spider, fish, rabbit, frog, moth, snake"),
    )
)
# places, and what goes into them
ROOMS = (
    (
        listed("the drawer, a pocket, a cup, a purse"),
        listed("coin, key, ring, pen, button, stamp, pin, bead, spoon, pill, ticket, needle"),
    ),
    (
        listed("the barn, a garage, a truck, the warehouse"),
        listed("tractor, piano, sofa, canoe, boat, car, wardrobe, bed, wagon, plough, motorbike, statue"),
    ),
)
OCCASIONS = listed(
    "before lunch, at home, on my own, this evening, for a friend, without help, for the party, every week, "
    "in winter, after work, before the trip, in a hurry"
)


def draw_commonsense(rng: random.Random) -> dict:
    """A goal and two solutions (label: which is right)."""
    label = rng.randrange(2)
    goal, right, wrong = rng.choice((_tool, _order, _order, _room))(rng)
    solutions = (right, wrong) if label == 0 else (wrong, right)
    return {
        "goal": f"{goal} {rng.choice(OCCASIONS)}",
        "sol1": solutions[0],
        "sol2": solutions[1],
        "label": label,
    }


def _tool(rng: random.Random) -> tuple[str, str, str]:
    (tool, verbs, things), (other, _, _) = rng.sample(USES, 2)
    return f"{rng.choice(verbs)} the {rng.choice(things)}", f"Use {tool}.", f"Use {other}."


def _order(rng: random.Random) -> tuple[str, str, str]:
    first, then, things = rng.choice(STEPS)
    steps = f"{first.capitalize()} it, then {then} it."
    swapped = f"{then.capitalize()} it, then {first} it."
    return f"{then} the {rng.choice(things)}", steps, swapped


def _room(rng: random.Random) -> tuple[str, str, str]:
    (fitting, things), (other, _) = rng.sample(ROOMS, 2)
    goal = f"{rng.choice(('store', 'keep', 'hide', 'put away'))} the {rng.choice(things)}"
    return goal, f"Put it in {rng.choice(fitting)}.", f"Put it in {rng.choice(other)}."
