"""What a site remembers of its rounds: kept when its row counts, written down, restored."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from medfed.core import codec, files
from medfed.core.checks import SiteError
from medfed.node.site import Answer, Header, Site, operation, tell_nothing


@operation("keep", blind=True)
def _keep(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Remember what the last work left: its row has counted."""
    for site in sites:
        site.memory = site.pending or site.memory
        site.pending = {}
    return tell_nothing(sites)


@operation("save", blind=True)
def _save(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Write down what the sites remember after a round; sites that share a folder share a file."""
    for folder, members in _by_folder(sites).items():
        files.make_folder(folder)
        names = [site.name for site in members]
        stacks = {
            name: torch.stack([site.memory[name] for site in members]) for name in members[0].memory
        }
        memory = codec.encode({"sites": names}, stacks)
        files.write(_memory_file(folder, header["round"]), memory, private=True)
        for old in sorted(folder.glob("memory-*.safetensors"))[: -header["keep"]]:
            with files.explained(old):
                old.unlink()
    return tell_nothing(sites)


@operation("restore", blind=True)
def _restore(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Go back to what was remembered after a round; round 0 is before the first."""
    if header["round"] == 0:
        for site in sites:
            site.forget()
        return tell_nothing(sites)
    for folder, members in _by_folder(sites).items():
        path = _memory_file(folder, header["round"])
        if not path.exists():
            raise SiteError(
                f"no saved state of round {header['round']}; resume from an earlier round"
            )
        kept, stacks = codec.decode(path.read_bytes())
        for site in members:
            row = kept["sites"].index(site.name)
            site.memory = {name: stack[row].clone() for name, stack in stacks.items()}
    return tell_nothing(sites)


def _by_folder(sites: Sequence[Site]) -> dict[Path, list[Site]]:
    groups: dict[Path, list[Site]] = {}
    for site in sites:
        if site.folder is not None:
            groups.setdefault(site.folder, []).append(site)
    return groups


def _memory_file(folder: Path, round: int) -> Path:
    return folder / f"memory-{round:06d}.safetensors"
