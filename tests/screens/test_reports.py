"""The page of a claim: whole, readable without a network, and nothing in it is taken for markup."""

from html.parser import HTMLParser
from typing import Any

import pytest

from medfed.screens.reports import claim_lines, privacy_page

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='y'>",
    "a & b",
    "</table>",
    "[bold]x[/]",
]
CLAIM: dict[str, Any] = {
    "study": "heart",
    "claimed": True,
    "epsilon": 0.98765432,
    "delta": 1e-6,
    "target": {"epsilon": 1.0, "delta": 1e-6},
    "unit": "patient",
    "adjacency": "add or remove one patient",
    "trust_model": "nobody",
    "mechanism": "Gaussian",
    "clipping": {"kind": "automatic", "norm": 1.5, "slack": 2**-12},
    "noise": {"multiplier": {"a": 4.2, "b": 6.1}, "grid": "C x 1e-06", "sd_in_grid_steps": 4e6},
    "sampling": "everybody",
    "steps_per_round": {"a": 3, "b": 5},
    "rounds": {"planned": 10, "spare": 1, "paid": 9},
    "charge_scope": "a round",
    "patients": {"declared": 1234, "one_over_n": 1 / 1234, "delta_below_one_over_n": True},
    "accountant": {"name": "exact", "version": "dp-accounting 0.6.0"},
    "second_accountant": {"name": "another", "epsilon": 1.0123},
    "composition": {
        "meaning": "this run",
        "ledger": {"epsilon_all_runs": 0.98765432, "head": "abc123"},
    },
    "random_generator": "AES",
    "unprotected": ["sizes", "who took part"],
    "assumptions": ["one site each"],
    "audit": None,
}
ITEMS = {
    "epsilon", "delta", "unit", "adjacency", "trust model", "mechanism", "clipping", "noise multiplier", "grid",
    "sampling", "rounds", "accountant", "second accountant", "composition", "ledger", "random generator",
    "not protected", "assumptions", "audit",
}  # fmt: skip


class _Page(HTMLParser):
    """Collects the tags, the texts and the addresses of a page; a tag that is closed was opened
    last.
    """

    VOID = ("meta",)

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_every_item_has_a_line() -> None:
    lines = dict(claim_lines(CLAIM))
    assert set(lines) == ITEMS and all(lines.values())
    assert (
        lines["epsilon"] == "0.987654 (target 1)"
        and "1/n is 0.00081 for 1,234 declared patients" in lines["delta"]
    )
    assert (
        lines["noise multiplier"] == "a 4.2, b 6.1"
        and "noised steps in a round: a 3, b 5" in lines["rounds"]
    )
    assert (
        lines["rounds"].startswith("10 planned; payments: 9")
        and lines["not protected"] == "sizes; who took part"
    )
    assert "head abc123" in lines["ledger"] and lines["audit"].startswith("none yet")


def test_an_audit_is_told_part_by_part() -> None:
    audit = {
        "parts": [
            {"name": "canaries", "told": "57 of 100"},
            {"name": "membership", "told": "nothing"},
        ]
    }
    assert (
        dict(claim_lines({**CLAIM, "audit": audit}))["audit"]
        == "canaries: 57 of 100; membership: nothing"
    )


def test_many_sites_are_counted_not_listed() -> None:
    noise = {**CLAIM["noise"], "multiplier": {f"device {i}": 4.2 for i in range(3000)}}
    assert dict(claim_lines({**CLAIM, "noise": noise}))["noise multiplier"].endswith(
        "and 2992 more"
    )


def test_a_page_is_whole_and_needs_no_network() -> None:
    page = _Page(privacy_page(CLAIM))
    assert page.tags.count("tr") == page.tags.count("th") == page.tags.count("td") == len(ITEMS)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not any(name in ("href", "src") for name, _ in page.attributes)
    text = "".join(page.texts)
    assert "Privacy of heart" in text and "0.988" in text and "chance of 1e-06" in text


def test_a_page_without_a_claim_says_so() -> None:
    seeded = {**CLAIM, "claimed": False, "epsilon": None, "second_accountant": None}
    seeded["composition"] = {**CLAIM["composition"], "ledger": None}
    text = "".join(_Page(privacy_page(seeded)).texts)
    assert "Nothing is claimed" in text and "nothing is claimed" in text and "factor" not in text
    assert set(dict(claim_lines(seeded))) == ITEMS - {"second accountant", "ledger"}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_and_never_markup(name: str) -> None:
    hostile = {
        **CLAIM,
        "study": name,
        "unprotected": [name],
        "noise": {**CLAIM["noise"], "multiplier": {name: 1.0}},
    }
    page = _Page(privacy_page(hostile))
    plain = _Page(privacy_page(CLAIM))
    assert page.tags == plain.tags and page.attributes == plain.attributes
    assert "".join(page.texts).count(name) == 4  # title, heading, noise, not protected
