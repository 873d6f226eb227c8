"""Words that several pocket tasks share."""


def listed(text: str) -> tuple[str, ...]:
    """The items of a list written with commas, as a lexicon is easiest to read."""
    return tuple(item.strip() for item in text.split(","))


NAMES = listed(
    "Anna, Ben, Carla, David, Emma, Felix, Grace, Henry, Ida, Jack, Kate, Leo, Maria, Noah, Olga, Paul, "
    "Rosa, Simon, Tina, Victor, Alice, Oscar, Lucy, Martin, Nora, Peter, Sarah, Thomas, Clara, Hugo"
)
JOBS = listed(
    "baker, nurse, farmer, pilot, teacher, painter, doctor, driver, lawyer, waiter, sailor, singer, writer, "
    "dentist, plumber, barber, tailor, chemist, banker, gardener"
)
CITIES = listed(
    "Paris, Rome, Berlin, Madrid, London, Vienna, Dublin, Lisbon, Oslo, Prague, Athens, Cairo, Delhi, Tokyo, "
    "Lima, Boston, Chicago, Denver, Dallas, Sydney"
)
