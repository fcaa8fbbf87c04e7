"""Messages: what was packed comes out, and whatever else arrives is a CodecError and
nothing worse.
"""

import json
import struct
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from medfed.core import codec
from medfed.core.checks import CodecError

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.dictionaries(st.text().filter(lambda key: key != "medfed"), JSON, max_size=4)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8]
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(SHAPES)
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randint(0, 200, shape, generator=generator).to(dtype)


def _message() -> bytes:
    return codec.encode(
        {"round": 3, "names": ["å", "b"]}, {"w": torch.arange(5.0), "n": torch.tensor(7)}
    )


def _only_a_codec_error(payload: bytes) -> bool:
    """Return whether it was refused; any other exception fails the test."""
    try:
        codec.decode(payload)
    except CodecError:
        return True
    return False


def _is_ours(header: str) -> bool:
    try:
        told = json.loads(header)
    except ValueError:
        return False
    return (
        isinstance(told, dict)
        and type(told.get("medfed")) is int
        and told["medfed"] == codec.VERSION
    )


def _raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@given(
    HEADERS,
    st.dictionaries(
        st.text(st.characters(codec="ascii"), min_size=1, max_size=5), tensors(), max_size=4
    ),
)
def test_what_was_packed_comes_out(header: dict[str, Any], packed: dict[str, Tensor]) -> None:
    told, unpacked = codec.decode(codec.encode(header, packed))
    assert told == {"medfed": codec.VERSION, **header}
    assert unpacked.keys() == packed.keys()
    for name, tensor in packed.items():
        assert (unpacked[name].dtype, unpacked[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(unpacked[name], tensor)


ROWS = st.sampled_from(
    [(torch.float32, 5), (torch.int64, 4), (torch.float32, 0), (torch.float64, 1)]
)


@given(st.lists(HEADERS, min_size=1, max_size=4), ROWS, st.integers(0, 9))
def test_a_stack_of_rows_is_written_and_read_as_each_alone(
    headers: list[dict[str, Any]], kind: tuple[torch.dtype, int], seed: int
) -> None:
    dtype, width = kind
    generator = torch.Generator().manual_seed(seed)
    row_KM = torch.randn(len(headers), width, generator=generator).mul_(1000).to(dtype)
    rows = codec.RowFormat("row", row_KM[0])
    messages = rows.encode(headers, row_KM)
    assert messages == [
        codec.encode(header, {"row": row}) for header, row in zip(headers, row_KM, strict=True)
    ]
    read_KM = torch.zeros_like(row_KM)
    assert [rows.decode(m, row) for m, row in zip(messages, read_KM, strict=True)] == [
        codec.decode(m)[0] for m in messages
    ]
    assert torch.equal(read_KM, row_KM)


def test_a_strided_row_is_written_as_it_reads() -> None:
    row_KM = torch.arange(12.0).reshape(3, 4).T
    assert codec.RowFormat("row", row_KM[0]).encode([{}] * 4, row_KM) == [
        codec.encode({}, {"row": r}) for r in row_KM
    ]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"x" * 200,
        codec.encode({}, {"row": torch.zeros(6)}),
        codec.encode({}, {"row": torch.zeros(5, dtype=torch.float64)}),
        codec.encode({}, {"row": torch.zeros(5, 1)}),
        codec.encode({}, {"other": torch.zeros(5)}),
        codec.encode({}, {"row": torch.zeros(5), "z": torch.zeros(1)}),
        codec.encode({}, {"row": torch.zeros(5)})[:-1],
        codec.encode({}, {"row": torch.zeros(5)}) + b"0",
        _raw(
            b'{"__metadata__":{"header":7},"row":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}   ',
            bytes(20),
        ),
    ],
)
def test_what_is_no_such_row_is_left_to_decode(message: bytes) -> None:
    place = torch.full((5,), 3.0)
    assert codec.RowFormat("row", torch.zeros(5)).decode(message, place) is None
    assert place.tolist() == [3.0] * 5


def test_a_row_of_another_version_is_refused() -> None:
    message = codec.encode({}, {"row": torch.zeros(5)}).replace(b'medfed\\": 1', b'medfed\\": 2')
    place = torch.full((5,), 3.0)
    with pytest.raises(CodecError, match="version=2"):
        codec.RowFormat("row", torch.zeros(5)).decode(message, place)
    assert place.tolist() == [3.0] * 5


@given(st.data())
def test_a_flipped_byte_of_a_row_message_reads_as_decode_reads_it_or_not_at_all(
    data: st.DataObject,
) -> None:
    message = bytearray(codec.encode({"loss": 0.5}, {"row": torch.arange(5.0)}))
    at = data.draw(st.integers(0, len(message) - 1))
    message[at] ^= data.draw(st.integers(1, 255))
    place = torch.zeros(5)
    try:
        report = codec.RowFormat("row", place).decode(bytes(message), place)
    except CodecError:
        return
    if report is not None:
        told, tensors = codec.decode(bytes(message))
        assert report == told
        assert place.numpy().tobytes() == tensors["row"].numpy().tobytes()


def test_every_bit_of_a_float_survives() -> None:
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38])
    _, unpacked = codec.decode(codec.encode({}, {"x": values}))
    assert torch.equal(unpacked["x"].view(torch.int32), values.view(torch.int32))


def test_views_are_packed_as_they_read() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    _, unpacked = codec.decode(
        codec.encode({}, {"t": table.T, "row": table[1], "e": torch.ones(1).expand(3)})
    )
    assert torch.equal(unpacked["t"], table.T)
    assert unpacked["row"].tolist() == [4, 5, 6, 7]
    assert unpacked["e"].tolist() == [1, 1, 1]


def test_unpacked_tensors_share_no_memory() -> None:
    message = _message()
    _, one = codec.decode(message)
    _, two = codec.decode(message)
    one["w"].fill_(9)
    assert two["w"].tolist() == [0, 1, 2, 3, 4]
    assert message == _message()


def test_the_same_content_gives_the_same_bytes() -> None:
    assert _message() == _message()


def test_a_header_that_is_no_json_number_is_refused_at_the_sender() -> None:
    with pytest.raises(ValueError, match="JSON"):
        codec.encode({"loss": float("nan")})


def test_every_truncation_is_refused() -> None:
    message = _message()
    assert all(_only_a_codec_error(message[:end]) for end in range(len(message)))


def test_bytes_appended_are_refused() -> None:
    assert _only_a_codec_error(_message() + b"\0")


def test_no_flipped_bit_raises_anything_else() -> None:
    message = _message()
    refused = 0
    for bit in range(8 * len(message)):
        flipped = bytearray(message)
        flipped[bit // 8] ^= 1 << bit % 8
        refused += _only_a_codec_error(bytes(flipped))
    assert refused > 8 * len(message) // 4  # the header is most of it; numbers cannot tell


@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    assert _only_a_codec_error(garbage)


@given(JSON)
def test_any_json_in_place_of_the_layout_is_refused(layout: Any) -> None:
    assert _only_a_codec_error(_raw(json.dumps(layout).encode()))


@given(st.text() | JSON.map(json.dumps))
def test_any_text_in_place_of_the_header_is_refused(header: str) -> None:
    assert _only_a_codec_error(save({}, metadata={"header": header})) != _is_ours(header)


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        "1",
        "null",
        '"text"',
        "{}",
        "[" * 100_000,
        '{"medfed":' * 50_000,
        "9" * 5000,
        '{"medfed": "1"}',
        '{"medfed": true}',
        '{"medfed": 1.0}',
        '[["medfed", 1]]',
    ],
    ids=lambda header: header[:12],
)
def test_a_header_of_another_kind_is_refused(header: str) -> None:
    assert _only_a_codec_error(save({"w": torch.zeros(2)}, metadata={"header": header}))


@pytest.mark.parametrize(
    "layout",
    [
        b"[" * 100_000,
        b'{"__metadata__":' * 20_000,
        b'{"__metadata__":{"header":5}}',
        b'{"__metadata__":null}',
        b"{}",
        b"null",
        b"\xff\xfe",
    ],
    ids=lambda layout: repr(layout[:24]),
)
def test_a_layout_of_another_kind_is_refused(layout: bytes) -> None:
    assert _only_a_codec_error(_raw(layout))


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "I4", "C128", "OBJECT", "", "F8_E8M0"])
@pytest.mark.parametrize("shape", [[8], [16], [2**62, 4], [-1], [], ["8"]])
def test_a_strange_type_or_shape_is_refused(dtype: str, shape: list[Any]) -> None:
    header = {
        "__metadata__": {"header": json.dumps({"medfed": codec.VERSION})},
        "w": {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]},
    }
    _only_a_codec_error(_raw(json.dumps(header).encode(), bytes(8)))


@pytest.mark.parametrize("offsets", [[0, 4], [0, 12], [4, 12], [8, 0], [-8, 0], [0, 2**63]])
def test_offsets_that_do_not_fit_are_refused(offsets: list[int]) -> None:
    header = {
        "__metadata__": {"header": json.dumps({"medfed": codec.VERSION})},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": offsets},
    }
    assert _only_a_codec_error(_raw(json.dumps(header).encode(), bytes(8)))


def test_a_header_length_beyond_the_message_is_refused() -> None:
    assert _only_a_codec_error(struct.pack("<Q", 2**63 - 1) + b"{}")


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "VERSION", 2)
    message = _message()
    monkeypatch.undo()
    with pytest.raises(CodecError, match="version=2; expected 1"):
        codec.decode(message)


def test_a_pickle_is_refused() -> None:
    assert _only_a_codec_error(b"\x80\x04\x95" + bytes(40))


def test_rows_of_one_length_are_stacked_in_order() -> None:
    rows = [torch.arange(3.0), torch.arange(3.0) + 10]
    assert codec.as_rows(rows).tolist() == [[0, 1, 2], [10, 11, 12]]


def test_rows_of_different_lengths_are_refused() -> None:
    with pytest.raises(CodecError, match=r"\(2,\), \(3,\)"):
        codec.as_rows([torch.zeros(3), torch.zeros(2)])
    with pytest.raises(CodecError):
        codec.as_rows([torch.zeros(4), torch.zeros(2, 2)])
