"""Before a run: what a site tells of its table, how it encodes its rows, and how it joins."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medfed.compliance import consortium
from medfed.core import codec
from medfed.core.checks import SiteError, some
from medfed.core.flat import fingerprint
from medfed.core.streams import Streams
from medfed.data import answers, preprocess, surveys
from medfed.data.encoding import Encoding
from medfed.data.features import open_columns
from medfed.data.federated import Rows
from medfed.data.site_table import SiteTable
from medfed.learn import zoo
from medfed.node.site import Answer, Header, Liars, Site, operation, table_of, tell_nothing
from medfed.planning import rates
from medfed.planning.building import build_model, find_path
from medfed.planning.joining import Joining
from medfed.planning.resolved import resolve
from medfed.planning.terms import party_of
from medfed.privacy import guarantee as guarantees
from medfed.secure.chain import Follower
from medfed.secure.identity import Identity, Post
from medfed.study import LARGEST


@operation("survey")
def _survey(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    return [codec.encode({"survey": tell_survey(site)}) for site in sites]


def tell_survey(site: Site) -> dict[str, Any]:
    """Return what a site tells of its table; under a privacy claim only what is public anyway."""
    table = table_of(site)
    study = site.study
    if not guarantees.asked(study):
        return surveys.survey(table, study.data)
    held_out = study.sites.kind == "device" and bool(table.test.all())
    if study.data.test_is_public:
        test = int((table.test & table.taking_part()).sum())
    else:
        test = int(held_out)
    return surveys.public_survey(
        table, study.data, 0 if held_out else guarantees.declared_size(study, site.name), test
    )


@operation("answer")
def _answer_question(
    sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]
) -> list[Answer]:
    if guarantees.asked(sites[0].study):
        raise SiteError(
            "a question about records has no answer under a privacy claim; use "
            "data.preprocess='dictionary'"
        )
    tables = [table_of(site) for site in sites]
    names = header["names"]
    logs = header["logs"]
    answer_K = answers.answer_each(tables, header["question"], names, logs, dict(tensors))
    return list(codec.encode_each({}, "answer", answer_K))


@operation("prepare")
def _prepare(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    encoding = Encoding.from_json(header["encoding"])
    model = build_model(sites[0].study, encoding)
    if fingerprint(zoo.select_fixed(model)) != header["fixed"]:
        raise SiteError(
            "the model's frozen parts or buffers are not the coordinator's; run the same code "
            "everywhere"
        )
    path = find_path(sites[0].study, encoding, model).path
    if guarantees.asked(sites[0].study):
        _check_encoding(sites[0], encoding)
    facts = resolve(
        sites[0].study, header["sizes"], header["clients"], zoo.count(model), encoding.digest()
    )
    guarantee = facts.guarantee
    tables = [table_of(site) for site in sites]
    for table in tables:
        table.sorted_words.clear()  # nothing more is asked
    for site, table, rows in zip(sites, tables, _encode(tables, encoding), strict=True):
        site.encoding = encoding
        site.model = model
        site.path = path
        site.guarantee = guarantee
        site.facts = facts
        site.links = facts.links
        site.party = None  # what it agreed to was for other facts: it must be asked to join anew
        held = torch.tensor(table.test)
        counts = torch.tensor(table.taking_part())
        keyed = replace(rows, key=_patient_keys(site, table)) if guarantee else rows
        site.train = keyed.at(~held & counts)
        site.test = rows.at(held & counts)
        told = header["sizes"].get(site.name)
        if guarantee is None and told and told["train"] != len(site.train):
            raise SiteError(
                f"the coordinator says {told['train']} training rows for site {site.name!r}, "
                "which has others"
            )
        site.liars = Liars.of(site.study, header["clients"])
        site.forget()
        if site.name in site.liars.names:
            site.train = site.liars.teach(site.name, site.train, encoding)
    if not rates.left_open(sites[0].study):
        return tell_nothing(sites)
    batch = sites[0].study.training.batch_size
    return [codec.encode({"bend": rates.bend(site.train.x, batch)}) for site in sites]


@operation("identify", blind=True)
def _identify(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Tell each site's public keys."""
    return [codec.encode({"public": consortium.to_json(_own_keys(site).public)}) for site in sites]


def _own_keys(site: Site) -> Identity:
    if site.identity is None:
        site.identity = consortium.own_keys(site.study, site.name, "site")
    return site.identity


@operation("join", blind=True)
def _join(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Join a run: sign the study as the site has it,
    and work out for itself what its rounds agree on.

    Whose keys count is the consortium's list to say, where the site's own study names one, and else
    the coordinator. A run is joined once: by the same coordinator, on the same facts, or not again.
    """
    members = consortium.members_of(sites[0].study, [site.name for site in sites])
    joining = Joining.read(header, members)
    answers: list[Answer] = []
    for site in sites:
        if site.record is None:
            site.record = consortium.record_of(site.study, site.name)
        facts = site.facts
        joining.refuse_others(facts)
        joining.commit(site.record, facts)
        follower = Follower(
            Post(_own_keys(site), joining.roster),
            site.study.digest(),
            joining.run,
            joining.coordinator,
            site.record,
            bytes.fromhex(facts.digest),
        )
        site.party = party_of(facts, follower)
        answers.append(codec.encode({}, {"signed": codec.as_tensor(follower.agree())}))

    return answers


def _check_encoding(site: Site, encoding: Encoding) -> None:
    """Refuse, under a claim, an encoding that is not the site's own dictionary's.

    A coordinator that leaves out a label, or cuts a range, could else read from an error whether
    anybody has it. For a column that is open in the site's own study any range will do: whatever
    the values are, they are held to it.
    """
    given = {column.name: column.found for column in encoding.columns if column.found}
    found = {name: given[name] for name in open_columns(site.study) if name in given}
    if not all(map(_is_range, found.values())):
        raise SiteError(
            "the coordinator sends a range that is none; expected two numbers within 3e38, low "
            "below high"
        )
    if len(found) < len(open_columns(site.study)):
        raise SiteError(
            "the coordinator sends no range for some open columns; give every party the same "
            "study file"
        )

    own = preprocess.agree(
        {site.name: tell_survey(site)}, site.study.data, _refuse_to_ask, public=True, found=found
    )
    columns = {column.name: column for column in own.columns}
    strange = [
        column.name for column in encoding.columns if column != columns.get(column.name, column)
    ]
    if strange or encoding.target != own.target or not encoding.public:
        raise SiteError(
            f"the coordinator's encoding of {some(strange or [encoding.target.name])} is not "
            "that of the study's data dictionary; give every party the same study file"
        )


def _is_range(ends: Sequence[object]) -> bool:
    """Say whether a range that was found can be one that is declared."""
    numbers = [end for end in ends if isinstance(end, float) and abs(end) <= LARGEST]
    return len(ends) == len(numbers) == 2 and numbers[0] < numbers[1]


def _refuse_to_ask(*_: object) -> Tensor:
    raise SiteError("a public encoding asks nothing of patients")


def _encode(tables: Sequence[SiteTable], encoding: Encoding) -> Iterable[Rows]:
    """Encode all records of each table, gaps filled from its own training records; many small
    tables in one go.
    """
    if not encoding.public and sum(map(len, tables)) > _SMALL * len(tables):
        return (
            encoding.encode(table, np.ones(len(table), dtype=bool), ~table.test) for table in tables
        )
    every = SiteTable.join(tables)
    sizes = [len(table) for table in tables]
    site_N = np.repeat(np.arange(len(tables)), sizes)
    rows = encoding.encode(every, np.ones(len(every), dtype=bool), ~every.test, site_N)
    parts = zip(torch.split(rows.x, sizes), torch.split(rows.y, sizes), tables, strict=True)
    return [Rows(x, y, torch.from_numpy(table.patient)) for x, y, table in parts]


_SMALL = 1000
"""Rows of a table on average, up to which tables are laid end to end before they are encoded."""


def _patient_keys(site: Site, table: SiteTable) -> Tensor:
    """Return the stream of each record's patient:
    a function of who it is, whoever else is at the site.
    """
    seed = Streams(site.study.study.seed)
    return torch.tensor([seed.key("patient", who) for who in table.ids], dtype=torch.int64)[
        table.patient
    ]
