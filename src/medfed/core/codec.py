"""Messages between parties: a small header and named tensors as bytes, by safetensors. Nothing is
ever unpickled.

A cohort's rows are one message each. All of one shape, they differ in header and numbers alone, so
that a stack of them is written and read around what safetensors has said once (`RowFormat`): the
same bytes, a tenth of the time.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from medfed.core.checks import CodecError

VERSION = 1
"""Version of the message format; a message of another version is refused."""


def encode(header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> bytes:
    """Pack a JSON-able header and tensors into bytes."""
    text = _text(header)
    arrays = {
        name: np.asarray(tensor.numpy(), order="C") for name, tensor in (tensors or {}).items()
    }
    return safetensors.numpy.save(arrays, metadata={"header": text})


def encode_each(header: Mapping[str, Any], name: str, tensor_K: Tensor) -> list[bytes]:
    """Return what `encode` makes of one header and each row of a tensor [K, ...], called `name`; K
    messages at once.
    """
    if len(tensor_K) == 0:
        return []
    return RowFormat(name, tensor_K[0]).encode([header] * len(tensor_K), tensor_K)


def decode_alike(payloads: Sequence[bytes]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Unpack messages that differ in their numbers alone: the header they share, and each tensor
    stacked, [K, ...].

    None where they differ in more. Raises CodecError as `decode` does.
    """
    if not payloads:
        return None
    first = payloads[0]
    start = 8 + int.from_bytes(first[:8], "little")
    if any(len(one) != len(first) or one[:start] != first[:start] for one in payloads):
        return None
    header, tensors = decode(first)
    body_KB = np.frombuffer(b"".join(one[start:] for one in payloads), np.uint8).reshape(
        len(payloads), -1
    )
    told = json.loads(first[8:start])
    stacked = {}

    for name, tensor in tensors.items():
        begin, end = told[name]["data_offsets"]
        own_KB = np.array(body_KB[:, begin:end], order="C")
        stacked[name] = (
            torch.from_numpy(own_KB).view(tensor.dtype).reshape(len(payloads), *tensor.shape)
        )

    return header, stacked


def decode(payload: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Unpack what `encode` packed; the tensors share no memory with anything else.

    Raises CodecError if the bytes are truncated, not a message, or of another version.
    """
    try:
        tensors = safetensors.torch.load(payload)
        size = int.from_bytes(payload[:8], "little")
        header = json.loads(json.loads(payload[8 : 8 + size])["__metadata__"]["header"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CodecError(
            f"a message of {len(payload)} bytes cannot be read ({error}); ask its sender again"
        ) from error
    return _check_version(header), tensors


_JSON = json.JSONEncoder(allow_nan=False)  # `json.dumps` would make one for every message


def _text(header: Mapping[str, Any]) -> str:
    return _JSON.encode({"medfed": VERSION, **header})


def _check_version(header: Any) -> dict[str, Any]:
    """Return a header of this version; raise CodecError for any other."""
    version = header.get("medfed") if isinstance(header, dict) else None
    if type(version) is not int or version != VERSION:  # JSON's true and 1.0 are no version
        raise CodecError(
            f"message version={version!r}; expected {VERSION}. Run the same medfed everywhere."
        )
    checked: dict[str, Any] = header
    return checked


class RowFormat:
    """Messages of one tensor `name` [M], of one type: what `encode` writes for each, the frame
    worked out once.
    """

    def __init__(self, name: str, like_M: Tensor) -> None:
        message = encode({}, {name: like_M})
        head = message[8 : 8 + int.from_bytes(message[:8], "little")].rstrip(b" ")
        self.before, self.behind = head.split(json.dumps(_text({})).encode())
        self.bytes = like_M.numel() * like_M.element_size()

    def encode(self, headers: Sequence[Mapping[str, Any]], row_KM: Tensor) -> list[bytes]:
        """Pack a header with each row: the same bytes as `encode(header, {name: row})`."""
        numbers = row_KM.contiguous().numpy().reshape(-1).view(np.uint8).data
        messages: list[bytes] = []
        for k, header in enumerate(headers):
            head = self.before + json.dumps(_text(header)).encode() + self.behind
            head += b" " * (-len(head) % 8)
            row = numbers[k * self.bytes : (k + 1) * self.bytes]
            messages.append(b"".join((len(head).to_bytes(8, "little"), head, row)))
        return messages

    def decode(self, payload: bytes, row_M: Tensor) -> dict[str, Any] | None:
        """Return the header of such a message, and write its numbers into `row_M`; None where it is
        another message.

        Raises CodecError if the header is of another version. What is no message at all is
        `decode`'s to refuse.
        """
        start = 8 + int.from_bytes(payload[:8], "little")
        head = payload[8:start].rstrip(b" ")
        framed = head.startswith(self.before) and head.endswith(self.behind)
        if not framed or len(payload) != start + self.bytes or start % 8:
            return None

        try:
            text = json.loads(head[len(self.before) : len(head) - len(self.behind)])
            if not isinstance(text, str):
                return None
            header = _check_version(json.loads(text))
        except (ValueError, RecursionError):
            return None

        if self.bytes:
            row_M.numpy().view(np.uint8)[:] = np.frombuffer(payload, np.uint8, offset=start)
        return header


def as_rows(tensors: list[Tensor]) -> Tensor:
    """Stack rows of equal length into message_KM; raise CodecError where lengths differ."""
    lengths = sorted({tuple(t.shape) for t in tensors})
    if len(lengths) != 1:
        raise CodecError(
            f"rows of different shapes {lengths} in one round; every site must run the same study"
        )
    return torch.stack(tensors)


def as_tensor(data: bytes) -> Tensor:
    """Return bytes as a tensor [N] (uint8), to travel in a message."""
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor [N] (uint8); raise CodecError where it is none."""
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        raise CodecError(
            f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}; expected bytes. Ask its "
            "sender again."
        )
    return tensor.numpy().tobytes()
