"""Invented names for simulated institutions."""

from itertools import islice, product

_PLACES = (
    "Northfield",
    "St. Brigid",
    "Harbour View",
    "Lakeside",
    "Elmwood",
    "Riverbend",
    "St. Cosmas",
    "Highmoor",
)
_KINDS = (
    "University Hospital",
    "General",
    "Clinic",
    "Community Hospital",
    "Medical Centre",
    "Infirmary",
)


def create_medical_device_names(count: int = 4) -> list[str]:
    """Return `count` different names of invented institutions,
    always the same ones in the same order.

    The brief's function. The first four are the sites of the bundled breast-cancer study.
    """
    if count < 0:
        raise ValueError(f"count={count}; expected 0 or more")
    diagonal = [(place, _KINDS[i % 4]) for i, place in enumerate(_PLACES)]
    others = [pair for pair in product(_PLACES, _KINDS) if pair not in diagonal]
    names = [f"{place} {kind}" for place, kind in [*diagonal, *others]]
    numbered = (f"{name} {number}" for number in range(2, count + 2) for name in names)
    return [*names[:count], *islice(numbered, max(0, count - len(names)))]
