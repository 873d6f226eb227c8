"""Reading generated text: which choice it names, what it shares with an answer, where its sentences end."""

import re
import string
from collections import Counter
from collections.abc import Sequence


def parse_choice(text: str, choices: Sequence[str]) -> int | None:
    """Which choice a generated text names: the first that stands in it as whole words, whatever its case.

    Where two start at the same place the longer one is meant ("not entailment" before "not").
    None when the text names no choice; count those, they are the unparsable rate.
    """
    said = _folded(text)
    found = []
    for index, choice in enumerate(map(_folded, choices)):
        match = re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", said) if choice else None
        if match:
            found.append((match.start(), -len(choice), index))
    return min(found)[2] if found else None


def answer_tokens(text: str) -> list[str]:
    """`normalize_answer` of the official SQuAD v1.1 script, then split at white space."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of token precision and recall, 0 to 100, as the official SQuAD v1.1 script has it.

    It is 0 when nothing is shared, two empty answers included (torchmetrics says 100 there).
    """
    said, wanted = answer_tokens(prediction), answer_tokens(answer)
    shared = (Counter(said) & Counter(wanted)).total()
    return 200.0 * shared / (len(said) + len(wanted)) if shared else 0.0


def one_sentence_a_line(text: str) -> str:
    """Break a text after . ! ? followed by white space, as ROUGE-Lsum wants it; line breaks stay."""
    return "\n".join(line for line in re.split(r"(?<=[.!?])\s+|\n+", text.strip()) if line)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
