"""A record read by template is what the reader of instructions makes of it, to the last bit, or is left to that one."""

import random
import re
import struct
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import lmdb
import numpy as np
import pytest
import torch

import small_data
from faenet_ocp import lmdb_records, record_objects, record_templates
from faenet_ocp.lmdb_records import decode_count, decode_record
from faenet_ocp.record_objects import fields_of, find
from faenet_ocp.record_templates import Templates
from faenet_ocp.record_tracing import Part, trace
from faenet_ocp.restricted_pickle import DAMAGE, RecordError, load


def by_instruction(value: bytes) -> dict[str, Any] | str:
    """The fields of a record, or the text of the error, without templates."""
    try:
        return fields_of(load(value, find))
    except RecordError as error:
        return str(error)


def bits(item: Any) -> Any:
    """All there is to know of a value."""
    if isinstance(item, np.ndarray):
        return item.dtype.str, item.shape, item.strides, item.flags.writeable, np.ascontiguousarray(item).tobytes()
    return type(item), struct.pack("d", item) if isinstance(item, float) else item


def all_bits(fields: dict[str, Any] | str) -> Any:
    return fields if isinstance(fields, str) else [(name, bits(item)) for name, item in fields.items()]


def assert_never_wrong(templates: Templates, value: bytes) -> bool:
    """Whether a template was used."""
    fields = templates.read(value)
    if fields is not None:
        assert all_bits(fields) == all_bits(by_instruction(value))
    return fields is not None


def make_fields(rng: np.random.Generator, atoms: int, edges: int) -> dict[str, Any]:
    """Numbers of all sizes, tensors of all kinds."""
    whole = torch.from_numpy(rng.normal(size=(atoms, 6)).astype(np.float32))
    return {
        "edge_index": torch.from_numpy(rng.integers(0, 1 << 40, (2, edges))),
        "pos": whole[:, :3].contiguous(),
        "cell": torch.from_numpy(rng.normal(size=(1, 3, 3)).astype(np.float32)),
        "columns": whole[:, 1:5:2],
        "transposed": whole.T,
        "rows": whole[atoms // 2 :],
        "natoms": atoms,
        "tags": torch.from_numpy(rng.integers(0, 3, atoms)),
        "fixed": torch.from_numpy(rng.random(atoms)) > 0.5,
        "sid": int(rng.choice([7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**40, -1])),
        "y": float(rng.choice([-0.5, np.nan, np.inf, 0.0, -0.0])),
        "y_relaxed": np.float64(rng.normal()),
        "y_init": np.float32(rng.normal()),
        "fid": np.int64(rng.integers(1 << 40)),
        "flag": bool(rng.random() > 0.5),
        "kind": str(rng.choice(["slab", "molecule"])),
        "scalar": torch.tensor(rng.normal()),
        "deep": torch.from_numpy(rng.normal(size=(2, 1, atoms, 2, 1))).half(),
    }


SIZES = [1, 2, 42, 43, 84, 85, 86, 127, 128, 255, 256, 257]
EDGES = [0, 1, 127, 128, 255, 256, 21845, 21846, 32767, 32768, 65535, 65536]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("layout", small_data.LAYOUTS)
def test_records_of_all_sizes_are_read_bit_by_bit(layout: str, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_templates, "_PRICE", 1)  # learn from every record
    rng, templates = np.random.default_rng(0), Templates()
    used, count = 0, 240
    for number in range(count):
        atoms = SIZES[number // 2 % len(SIZES)]
        edges = EDGES[int(rng.integers(6, 12) if number % 10 == 0 else rng.integers(6))]
        value = small_data.dump_record(make_fields(rng, atoms, edges), layout=layout, protocol=protocol)
        if assert_never_wrong(templates, value):
            used += 1
        else:
            templates.learn(value)
    assert used > count // 10  # sizes, sid, flag and kind make hundreds of kinds


@pytest.mark.parametrize("layout", small_data.LAYOUTS)
def test_records_of_a_file_need_few_templates(layout: str) -> None:
    rng, templates = np.random.default_rng(0), Templates()
    kept = "edge_index pos cell natoms tags y y_relaxed y_init fid rows columns".split()
    missed = 0
    for _ in range(400):
        fields = make_fields(rng, int(rng.integers(20, 300)), int(rng.integers(300, 4000)))
        fields = {name: fields[name] for name in kept} | {"sid": int(rng.integers(1 << 16, 1 << 30))}
        value = small_data.dump_record(fields, layout=layout, protocol=4)
        if not assert_never_wrong(templates, value):
            missed += 1
            templates.learn(value)
    assert missed < 40  # of atoms, where a new frame begins


def test_every_record_of_the_oc20_sample(oc20_sample) -> None:
    for path in sorted(oc20_sample.glob("**/*.lmdb")):
        templates, missed = Templates(), 0
        with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
            count = decode_count(txn.get(b"length"))
            for number in range(count):
                value = txn.get(str(number).encode())
                if not assert_never_wrong(templates, value):
                    missed += 1
                    templates.learn(value)
        assert missed < 4, path


def test_arrays_are_views_of_the_record_and_read_only() -> None:
    value = small_data.dump_record(small_data.make_fields(0))
    templates = Templates()
    templates.learn(value)
    pos = templates.read(value)["pos"]
    assert pos.base is value
    with pytest.raises(ValueError, match="read-only"):
        pos[0] = 1


def test_decode_record_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_records, "_TEMPLATES", Templates())
    first, second = (small_data.dump_record(small_data.make_fields(index, layers=3)) for index in (0, 1))
    decode_record(first)
    monkeypatch.setattr(lmdb_records, "load", None)
    assert all_bits(decode_record(second)) == all_bits(by_instruction(second))


def test_usual_storages_are_read_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    value = small_data.dump_record(small_data.make_fields(1))
    usual = all_bits(by_instruction(value))
    assert record_objects._USUAL_START in value
    monkeypatch.setattr(record_objects, "_USUAL_START", b"never")
    assert all_bits(by_instruction(value)) == usual


# Damage


@lru_cache
def parts_of(value: bytes) -> list[Part]:
    return trace(value)[0]


@lru_cache
def numbers_of(value: bytes) -> list[list[tuple[int, str]]]:
    """Where a record may differ, part by part: place and form; the elements of its storages are between the parts."""
    result, pos = [], 0
    for part in parts_of(value):
        items = struct.unpack_from(part.form, value, pos)
        places = []
        for form in re.findall(r"\d*[a-zA-Z]", part.form):
            places.append((pos, form))
            pos += struct.calcsize("<" + form)
        result.append(places[1::2])
        if part.itemsize:
            pos += items[-1] * part.itemsize
    assert pos == len(value)
    return result


def mutations(value: bytes, rng: random.Random) -> bytes:
    """A record with one to three faults, most of them where records differ."""
    parts = numbers_of(value)
    places = [place for part in parts for place in part]
    elements = [(part[-1][0] + 8, after[0][0]) for part, after in pairwise(parts)]
    damaged = bytearray(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.randrange(8)
        at, form = rng.choice(places)
        size = struct.calcsize("<" + form)
        if kind == 0:  # a number
            damaged[at : at + size] = rng.choice(
                (bytes(size), b"\xff" * size, b"\x80" * size, rng.randbytes(size), b"\x01" + bytes(size - 1))
            )
        elif kind == 1:  # a number, by little
            damaged[at] = (damaged[at] + rng.choice((-1, 1, 2, 16))) % 256
        elif kind == 2:  # its instruction, or what is near it
            damaged[(at + rng.randint(-12, 12)) % len(damaged)] = rng.randrange(256)
        elif kind == 3:  # one number in the place of another
            start, _ = rng.choice(places)
            damaged[at : at + size] = value[start : start + size]
        elif kind == 4:  # the end
            del damaged[rng.choice((-1, rng.randrange(len(damaged)))) :]
            damaged.extend(rng.choice((b"", b".", rng.randbytes(20))))
            break
        elif kind == 5:  # bytes put in or taken out
            start = rng.choice(rng.choice(elements)) + rng.randint(-3, 3)
            damaged[start : start + rng.choice((0, 1, 4, 8))] = rng.randbytes(rng.choice((0, 1, 4, 8)))
            break
        elif kind == 6:  # anywhere
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        else:  # elements
            start, end = rng.choice(elements)
            damaged[rng.randrange(start, end)] = rng.randrange(256)
    return bytes(damaged)


def coherent(value: bytes, rng: random.Random) -> bytes:
    """A record with a storage of another size, right or nearly so, and sizes of its tensor that may fit or not."""
    parts = numbers_of(value)
    index = rng.randrange(len(parts) - 1)
    (length, _), (key, _), (declared, form), (again, _), (elements, _) = parts[index][-5:]
    start, itemsize = elements + 8, parts_of(value)[index].itemsize
    (count,), (bytes_,) = struct.unpack_from("<q", value, elements), struct.unpack_from("<I", value, length)
    more = rng.choice((-count - 1, -count, -1, 1, 3, rng.randint(-count, 40)))
    new = bytearray(value)
    new[start : start + count * itemsize] = rng.randbytes(max(0, count + more) * itemsize)
    for at, code, number in ((length, "I", bytes_ + more * itemsize), (declared, form, count + more)):
        if rng.random() < 0.9:
            size = struct.calcsize("<" + code)
            new[at : at + size] = (number % 256**size).to_bytes(size, "little")
    if rng.random() < 0.9:
        struct.pack_into("<q", new, elements, count + more)
    text = rng.choice((b"9", b"\xff", b" ", b"-"))
    for at in (key, again):
        if rng.random() < 0.3:
            new[at : at + 1] = text
    after = start + max(0, count + more) * itemsize
    if rng.random() < 0.5:  # the first size of its tensor
        new[after + 7] = rng.choice((0, 1, count + more, 255)) % 256
    return bytes(new)


@pytest.mark.parametrize("change", [mutations, coherent])
@pytest.mark.parametrize("layout", small_data.LAYOUTS)
def test_damaged_records_are_read_or_refused_as_without_templates(
    layout: str, change: Callable[[bytes, random.Random], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, numbers = random.Random(0), np.random.default_rng(0)
    fields = [make_fields(numbers, atoms, 9) | {"sid": 70000} for atoms in (3, 5, 60)]
    values = [small_data.dump_record(item, layout=layout) for item in fields]
    templates = Templates()
    for value in values:
        templates.learn(value)
        assert templates.read(value) is not None
    monkeypatch.setattr(lmdb_records, "_TEMPLATES", templates)
    read = refused = 0
    for _ in range(1500):
        value = change(rng.choice(values), rng)
        used = assert_never_wrong(templates, value)
        plain = by_instruction(value)
        read += used and not isinstance(plain, str)
        refused += isinstance(plain, str)
        try:
            found: dict[str, Any] | str = decode_record(value)
        except RecordError as error:
            found = str(error)
        assert all_bits(found) == all_bits(plain)
    assert read > 60 and refused > 300


# Values with a second use, made by hand: the next record must not be read by the first use alone


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def data(*items: bytes) -> bytes:
    """A Data with fields: names and values by turns."""
    return b"ctorch_geometric.data.data\nData\n)\x81}(" + b"".join(items) + b"ub."


def storage(
    numbers: int, key: str = "123", *, key_twice: bool = False, early: bool = False, location: bytes = b""
) -> bytes:
    """The instructions for a storage.

    Args:
        numbers: in it.
        key: of it.
        key_twice: the key is also the word that says what it is.
        early: the number of elements comes before the rest.
        location: other instructions for that, which may use `numbers` (h 7).
    """
    count = b"K" + bytes((numbers,)) + b"q\x07"
    before, count = (b"]" + count + b"a", b"h\x07") if early else (b"", count)
    kind, again = (text(key) + b"q\x01", b"h\x01") if key_twice else (text("storage"), text(key))
    stream = record_objects._USUAL_START + b"\x80\x02" + before + b"(" + kind + b"ctorch\nFloatStorage\n"
    stream += again + (location or text("cpu")) + count + b"NtQ.\x80\x02]" + text(key) + b"a."
    stream += struct.pack(f"<q{numbers}f", numbers, *range(numbers))
    return b"ctorch.storage\n_load_from_bytes\nB" + struct.pack("<I", len(stream)) + stream + b"q\x63\x85R"


def tensor(source: bytes, size: bytes, stride: bytes = b"K\x01\x85", offset: bytes = b"K\x00") -> bytes:
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + source + offset + size + stride + b"\x89" + hooks + b"tR"


FLOAT64 = (
    b"cnumpy\ndtype\n(" + text("f8") + b"\x89\x88tR(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
SCALAR = b"cnumpy.core.multiarray\nscalar\n(" + FLOAT64 + b"C\x08%b%btR"


def twice(first: int, second: int) -> dict[str, tuple[bytes, bytes]]:
    """Two records that differ by one number (or two) with a use that a template must not forget."""

    def pair(make: Callable[[bytes], bytes]) -> tuple[bytes, bytes]:
        return make(bytes((first,))), make(bytes((second,)))

    def shape(n: bytes) -> bytes:
        return b"K" + n + b"\x85q\x02"

    return {
        "a number": pair(lambda n: data(text("a"), b"K" + n + b"q\x01", text("b"), b"h\x01")),
        "a number and a size": pair(
            lambda n: data(text("a"), b"K" + n + b"q\x01", text("b"), tensor(storage(4), b"h\x01\x85"))
        ),
        "a number in a list": pair(lambda n: data(text("a"), b"K" + n + b"q\x01", text("_b"), b"]h\x01a")),
        "a float": pair(lambda n: data(text("a"), b"G" + n * 8 + b"q\x01", text("b"), b"h\x01")),
        "a size, of tensors": pair(
            lambda n: data(text("a"), tensor(storage(9), shape(n)), text("b"), tensor(storage(4), b"h\x02"))
        ),
        "a size, of a hidden tensor": pair(
            lambda n: data(text("a"), tensor(storage(9), shape(n)), text("_b"), tensor(storage(4), b"h\x02"))
        ),
        "a size, of a tensor that is replaced": pair(
            lambda n: data(
                text("b"), tensor(storage(9), shape(n)), text("a"), tensor(storage(4), b"h\x02"), text("a"), b"K\x01"
            )
        ),
        "a size, as a field": pair(lambda n: data(text("a"), tensor(storage(9), shape(n)), text("b"), b"h\x02")),
        "a size, as a stride": pair(lambda n: data(text("a"), tensor(storage(9), shape(n), b"h\x02"))),
        "a size, twice in a shape": pair(
            lambda n: data(
                text("b"), b"K" + n + b"q\x01", text("a"), tensor(storage(9), b"h\x01h\x01\x86", b"K\x03K\x01\x86")
            )
        ),
        "a size, twice in a shape, and a number after it": pair(
            lambda n: data(
                text("b"),
                b"K\x02q\x01",
                text("c"),
                b"K" + n,
                text("a"),
                tensor(storage(9), b"h\x01h\x01\x86", b"K\x02K\x01\x86"),
            )
        ),
        "a size that is a number of numpy": pair(
            lambda n: data(
                text("b"),
                SCALAR.replace(b"f8", b"i8") % (n + bytes(7), b"") + b"q\x05",
                text("a"),
                tensor(storage(9), b"h\x05\x85"),
            )
        ),
        "a size, empty": pair(
            lambda n: data(text("a"), tensor(storage(9), b"K\x00K" + n + b"\x86", b"K" + n + b"K\x01\x86"))
        ),
        "a count before its key": pair(lambda n: data(text("a"), tensor(storage(ord(n), early=True), b"K\x01\x85"))),
        "a count and a size in the stream": pair(
            lambda n: data(
                text("a"),
                tensor(storage(ord(n), early=True, location=tensor(storage(4), b"h\x07\x85")), b"K\x01\x85"),
            )
        ),
        "a size, of an array": pair(
            lambda n: data(
                text("a"),
                tensor(storage(9), shape(n)),
                text("b"),
                b"cnumpy.core.numeric\n_frombuffer\n(C\x10" + bytes(16) + FLOAT64 + b"h\x02" + text("C") + b"tR",
            )
        ),
        "an offset": pair(lambda n: data(text("a"), tensor(storage(9), b"K\x05\x85", offset=b"K" + n))),
        "an offset and a field": pair(
            lambda n: data(text("b"), b"K" + n + b"q\x01", text("a"), tensor(storage(9), b"K\x05\x85", offset=b"h\x01"))
        ),
        "a storage": pair(
            lambda n: data(
                text("a"), tensor(storage(ord(n)) + b"q\x09", b"K\x01\x85"), text("b"), tensor(b"h\x09", b"K\x02\x85")
            )
        ),
        "bytes of a storage": pair(
            lambda n: data(text("a"), tensor(storage(ord(n)), b"K\x01\x85"), text("b"), b"h\x63")
        ),
        "a number of numpy": pair(lambda n: data(text("a"), SCALAR % (n * 8, b"") + b"q\x05", text("b"), b"h\x05")),
        "bytes of a number of numpy": pair(lambda n: data(text("a"), SCALAR % (n * 8, b"q\x05"), text("b"), b"h\x05")),
        "a key with another meaning": tuple(
            data(text("a"), tensor(storage(4, key), b"K\x04\x85")) for key in ("storage", "strange")
        ),
        "a key that says what it is": tuple(
            data(text("a"), tensor(storage(4, key, key_twice=True), b"K\x04\x85")) for key in ("storage", "1234567")
        ),
        "a key that is no text": tuple(
            data(text("a"), tensor(storage(4, "123").replace(b"123", key), b"K\x04\x85")) for key in (b"123", b"\xff23")
        ),
        "a name": pair(lambda n: data(text("a"), text("name") + b"q\x01", text("b"), b"h\x01", b"h\x01", b"K" + n)),
        "a frame": pair(lambda n: data(b"\x95" + n * 8, text("a"), b"K" + n)),
    }


@pytest.mark.parametrize("name", list(twice(4, 4)))
@pytest.mark.parametrize(("first", "second"), [(4, 4), (4, 2), (4, 5), (2, 3), (3, 9), (1, 200)])
def test_values_with_a_second_use(name: str, first: int, second: int) -> None:
    learned, other = twice(first, second)[name]
    templates = Templates()
    if not isinstance(by_instruction(learned), str):
        templates.learn(learned)
        assert_never_wrong(templates, learned)
    assert_never_wrong(templates, other)


def test_the_hand_made_records_become_templates_where_they_may() -> None:
    """Negative control of the cases above: they are what a template is made of."""
    used, refused = set(), set()
    for name, (first, second) in twice(2, 3).items():
        assert not isinstance(by_instruction(first), str), name
        templates = Templates()
        templates.learn(first)
        if templates.read(second) is not None:
            used.add(name)
        try:
            trace(first)
        except DAMAGE:
            refused.add(name)
    assert used == {
        "a number",
        "a number and a size",
        "a number in a list",
        "a float",
        "a size, of tensors",
        "a size, as a stride",
        "a size, empty",
        "an offset",
        "an offset and a field",
        "a storage",
        "a number of numpy",
        "a name",
        "a frame",
    }
    assert refused == {
        "a size, of a hidden tensor",
        "a size, of a tensor that is replaced",
        "a size, as a field",
        "a size, of an array",
        "a size, twice in a shape",
        "a size, twice in a shape, and a number after it",
        "a count before its key",
        "a count and a size in the stream",
        "bytes of a storage",
        "bytes of a number of numpy",
        "a key with another meaning",
        "a key that says what it is",
    }


# Cost


def test_only_usual_records_are_learned_and_few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    monkeypatch.setattr(record_templates, "trace", lambda value: traced.append(1) or trace(value))
    templates, count = Templates(), 1000
    for number in range(count):
        value = data(text("a"), b"K\x01", text(f"{number:09}"), b"]")  # a list is no usual field
        assert templates.read(value) is None
        templates.learn(value)
    assert 16 <= len(traced) <= 16 + count // 32 + 1
    usual = small_data.dump_record(small_data.make_fields(0))
    for _ in range(40):  # what came before does not keep others from being learned
        found = templates.read(usual)
        if found is None:
            templates.learn(usual)
    assert found is not None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_templates, "_PRICE", 0)
    templates = Templates()
    long = data(text("a"), text("x" * (1 << 17)))
    templates.learn(long)
    assert templates.read(long) is None
    for number in range(300):
        value = data(text("a"), text(f"{number:09}" * 2000))
        templates.learn(value)
        assert templates.read(value) is not None
        assert templates._bytes <= 1 << 21
        assert len(templates._root) <= 16
