"""`medfed key` and `medfed federation`: who takes part, under which keys."""

import json
from pathlib import Path
from typing import Annotated

import typer

from medfed.cli.common import AsJson, console, passphrase

key_app = typer.Typer(
    no_args_is_help=True, help="A party's own keys: make them, show them, ask to be enrolled."
)
federation_app = typer.Typer(
    no_args_is_help=True, help="The consortium's list: who takes part, under which keys."
)

KeyFile = Annotated[Path, typer.Argument(metavar="FILE", help="A key file.")]
Consortium = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Folder of the consortium's list of members.")
]
Signer = Annotated[Path, typer.Option("--key", help="The consortium's key file.")]


@key_app.command("new")
def key_new(
    name: Annotated[str, typer.Argument(help="The party, as studies name it.")],
    role: Annotated[
        str, typer.Option(help="site, aggregator, coordinator or consortium.")
    ] = "site",
    out: Annotated[
        Path | None, typer.Option(help="Key file to make; default: keys/NAME.key.")
    ] = None,
) -> None:
    """Make a party's keys, at the party, under MEDFED_PASSPHRASE or what is typed;
    the file never leaves it.
    """
    from urllib.parse import quote

    from medfed.compliance.consortium import ROLES
    from medfed.core.checks import KeyFileError
    from medfed.secure import key_files
    from medfed.secure.identity import Identity

    if role not in ROLES:
        raise KeyFileError(f"--role {role!r}; expected one of {', '.join(ROLES)}")
    made = Identity.new(name, role)
    path = out or Path("keys") / f"{quote(name, safe=' ')}.key"
    key_files.save(made, path, passphrase(twice=True))
    console().print(
        f"{path}  {role} {name}\nfingerprint {made.public.fingerprint}",
        highlight=False,
        markup=False,
    )


@key_app.command("show")
def key_show(file: KeyFile, as_json: AsJson = False) -> None:
    """Show whose keys a file holds, and their fingerprint; never the keys."""
    from medfed.secure import key_files

    public = key_files.load(file, passphrase()).public
    if as_json:
        print(
            json.dumps(
                {"name": public.name, "role": public.role, "fingerprint": public.fingerprint}
            )
        )
        return
    console().print(
        f"{public.role} {public.name}\nfingerprint {public.fingerprint}",
        highlight=False,
        markup=False,
    )


@key_app.command("request")
def key_request(
    file: KeyFile,
    out: Annotated[Path, typer.Option(help="Where to write the request.")],
    replaces: Annotated[
        Path | None, typer.Option(help="The key file that this one takes the place of.")
    ] = None,
) -> None:
    """Write an enrolment request: public keys, signed.
    Send it to the consortium, and tell it the fingerprint.
    """
    from medfed.compliance import consortium
    from medfed.core import files
    from medfed.secure import key_files

    word = passphrase()
    party = key_files.load(file, word)
    asked = consortium.request(party, key_files.load(replaces, word) if replaces else None)
    files.write(out, json.dumps(asked, indent=2) + "\n")
    console().print(f"{out}\nfingerprint {party.public.fingerprint}", highlight=False, markup=False)


@federation_app.command("new")
def federation_new(folder: Consortium, key: Signer) -> None:
    """Begin a consortium's list of members."""
    from medfed.compliance import consortium, seen
    from medfed.secure import key_files

    authority = key_files.load(key, passphrase())
    consortium.begin(folder, authority, seen.beside(key))
    console().print(
        f"{folder}: members must check this fingerprint over another channel\n"
        f"{authority.public.fingerprint}",
        highlight=False,
        markup=False,
    )


@federation_app.command("approve")
def federation_approve(
    folder: Consortium,
    request: Annotated[Path, typer.Argument(help="An enrolment request.")],
    key: Signer,
    fingerprint: Annotated[str, typer.Option(help="What the party told as its fingerprint.")],
) -> None:
    """Enrol a party whose fingerprint is what it told, or replace its keys."""
    from medfed.compliance import consortium, seen
    from medfed.core.checks import SignatureError, plain
    from medfed.secure import key_files

    try:
        asked = json.loads(request.read_text(encoding="utf-8"))
        if not isinstance(asked, dict):
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise SignatureError(
            f"{request} is no enrolment request ({plain(error)}); ask for another"
        ) from error
    authority = key_files.load(key, passphrase())
    member = consortium.approve(folder, authority, asked, fingerprint, seen.beside(key))
    console().print(
        f"enrolled {member.role} {member.name}  {member.fingerprint}", highlight=False, markup=False
    )


@federation_app.command("revoke")
def federation_revoke(
    folder: Consortium,
    name: Annotated[str, typer.Argument(help="The member.")],
    key: Signer,
    reason: Annotated[str, typer.Option(help="Why; it stays on the list.")],
) -> None:
    """Revoke a member: from now on its messages count nowhere."""
    from medfed.compliance import consortium, seen
    from medfed.secure import key_files

    authority = key_files.load(key, passphrase())
    consortium.revoke(folder, authority, name, reason, seen.beside(key))
    console().print(f"revoked {name}", highlight=False, markup=False)


@federation_app.command("show")
def federation_show(folder: Consortium, as_json: AsJson = False) -> None:
    """Check every line of a consortium's list, and show who is on it.

    A list that lacks the last line that was seen on this machine is refused: it was rolled back.
    """
    from rich.markup import escape
    from rich.table import Table

    from medfed.compliance import consortium, seen
    from medfed.privacy import places

    found = consortium.read(folder, own=places.home() / seen.READER)
    if as_json:
        members = {
            name: {"role": one.role, "fingerprint": one.fingerprint}
            for name, one in found.roster.items()
        }
        revoked = sorted(found.roster.revoked)
        print(
            json.dumps(
                {
                    "consortium": found.authority.fingerprint,
                    "list": found.tell_head(),
                    "members": members,
                    "revoked": revoked,
                },
                indent=2,
            )
        )
        return
    table = Table("member", "role", "fingerprint", box=None)
    for name, one in found.roster.items():
        table.add_row(escape(name), one.role, one.fingerprint)
    console().print(f"consortium {found.authority.fingerprint}", highlight=False)
    console().print(
        f"{len(found.hashes)} lines, head {found.head}", highlight=False, soft_wrap=True
    )
    console().print(table)
    for name in sorted(found.roster.revoked):
        console().print(f"revoked: {name}", highlight=False, markup=False)
