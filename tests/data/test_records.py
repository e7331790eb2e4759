"""Records are read as pickle reads them, and nothing in a record can run, be imported, or fill the memory."""

import contextlib
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

import small_data
from faenet_ocp.common.checks import RecordError
from faenet_ocp.data.records import decode_count, decode_record


def same(ours, theirs) -> bool:
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.numpy()
    if isinstance(theirs, np.ndarray):
        return isinstance(ours, np.ndarray) and ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    return type(ours) is type(theirs) and ours == theirs


def assert_same(ours: dict, theirs: dict) -> None:
    theirs = {name: item for name, item in theirs.items() if item is not None}
    assert ours.keys() == theirs.keys()
    for name, item in theirs.items():
        assert same(ours[name], item), name


# Reading


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("layout", small_data.LAYOUTS)
def test_both_layouts_and_all_protocols_of_python_3_are_read_exactly(layout, protocol):
    fields = small_data.make_fields(3)
    assert_same(decode_record(small_data.dump_record(fields, layout=layout, protocol=protocol)), fields)


def test_every_record_of_the_oc20_sample_is_read_as_pickle_reads_it(oc20_sample):
    files = sorted(oc20_sample.glob("**/*.lmdb"))
    assert len(files) >= 10
    for path in files:
        with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env, env.begin() as txn:
            count = decode_count(txn.get(b"length"))
            assert count == env.stat()["entries"] - 1
            for number in range(count):
                value = txn.get(str(number).encode())
                assert_same(decode_record(value), pickle.loads(value).__dict__)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8],
)
def test_tensors_of_every_dtype_shape_and_stride(dtype):
    whole = (torch.arange(24.0).view(4, 6) + 1).to(dtype)
    fields = {
        "whole": whole,
        "transposed": whole.T,
        "rows": whole[1:3],
        "columns": whole[:, 2:5:2],
        "scalar": whole[2, 3],
        "empty": whole[:0],
        "deep": whole.view(2, 2, 3, 2).permute(3, 0, 2, 1),
        "truth": whole > 3,
    }
    assert_same(decode_record(small_data.dump_record(fields)), fields)


def test_an_expanded_tensor_is_refused_because_its_copy_could_have_any_size():
    with pytest.raises(RecordError, match=r"shape \(9,\) in a storage of 1 elements"):
        decode_record(small_data.dump_record({"pos": torch.ones(1).expand(9)}))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_numpy_numbers_and_arrays(protocol):
    array = np.arange(6.0).reshape(2, 3)
    fields = {"f": array, "fortran": np.asfortranarray(array), "big": array.astype(">i4"), "flag": array > 2}
    scalars = {"y": np.float64(-1.25), "y32": np.float32(0.5), "sid": np.int64(2**40), "ok": np.bool_(True)}
    read = decode_record(small_data.dump_record(fields | scalars, protocol=protocol))
    for name, item in fields.items():
        assert np.array_equal(read[name], item), name
    assert {name: read[name] for name in scalars} == {"y": -1.25, "y32": 0.5, "sid": 2**40, "ok": True}


def test_results_cannot_be_written_to():
    read = decode_record(small_data.dump_record({"pos": torch.zeros(2, 3)}))
    with pytest.raises(ValueError, match="read-only"):
        read["pos"][0] = 1


@pytest.mark.parametrize(
    ("value", "count"),
    [(0, 0), (10**7, 10**7), (np.int64(5), 5), (torch.tensor(4), 4), ("3", 3)]
    + [(value, None) for value in (-1, 2.5, "x3", None, True, [1], torch.zeros(2))],
)
def test_counts(value, count):
    if count is not None:
        assert decode_count(pickle.dumps(value)) == count
    else:
        with pytest.raises(RecordError, match="no number of records"):
            decode_count(pickle.dumps(value))


# Refusing. A canary file shows whether something ran.


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced

    def __call__(self):
        raise AssertionError  # only so that the result of a call can be named as a function


def in_data(item, protocol: int = 4) -> bytes:
    """A record with an item as one of its fields."""
    return small_data.dump_record({"pos": torch.zeros(1, 3), "y": item}, protocol=protocol)


def with_payload(payload: bytes, elements: int = 6) -> bytes:
    """A record with a tensor whose storage is `payload`."""
    storage = Calls(torch.storage._load_from_bytes, payload)
    return in_data(Calls(torch._utils._rebuild_tensor_v2, storage, 0, (elements,), (1,), False, {}))


def poisoned_zip(gadget) -> bytes:
    source, target = io.BytesIO(), io.BytesIO()
    torch.save(torch.arange(6.0).untyped_storage(), source)
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, pickle.dumps(gadget, 2) if name.endswith("data.pkl") else archive.read(name))
    return target.getvalue()


def legacy_stream(*, third=None, fourth=None) -> bytes:
    """The nested stream of a tensor, with one of its pickles replaced."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [0x1950A86A20F9469CFC6C, 1001, third or system, fourth or "storage", ["1"]]
    return b"".join(pickle.dumps(part, 2) for part in parts) + struct.pack("<q6f", 6, *range(6))


def body(item) -> bytes:
    """The instructions that put an item on the stack."""
    return pickle.dumps(item, 2)[2:-1]


def gadgets(canary: Path) -> dict[str, bytes]:
    """Records that create the canary file when unpickled, by many ways."""
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    system = Calls(os.system, command)
    return {
        "os.system": in_data(system),
        "eval": in_data(Calls(eval, code)),
        "getattr chain": in_data(Calls(Calls(getattr, Calls(__import__, "os"), "system"), command)),
        "Popen": in_data(Calls(subprocess.check_call, ["touch", str(canary)])),
        "not Data": pickle.dumps(system),
        "state of Data": DATA + body(system) + b"b.",
        "argument of Data": DATA[:-2] + body((system,)) + b"\x81.",
        "nested pickle": with_payload(pickle.dumps(system)),
        "nested system info": with_payload(legacy_stream(third=system)),
        "nested storage": with_payload(legacy_stream(fourth=system)),
        "nested zip": with_payload(poisoned_zip(system)),
        "INST": b"(S'touch %s'\nios\nsystem\n." % str(canary).encode(),
        "OBJ": b"(" + body(os.system) + body(command) + b"o.",
        "numpy array of objects": in_data(np.array([system], dtype=object)),
    }


DATA = b"ctorch_geometric.data.data\nData\n)\x81"
GADGETS = list(gadgets(Path("canary")))


@pytest.mark.parametrize("name", GADGETS)
def test_gadgets_are_refused_and_nothing_runs(name, tmp_path):
    canary = tmp_path / "canary"
    with pytest.raises(RecordError) as caught:
        decode_record(gadgets(canary)[name])
    assert not canary.exists()
    assert "damaged" not in str(caught.value)  # refused for what it is, not for being unreadable


@pytest.mark.parametrize("name", sorted(set(GADGETS) - {"nested zip"}))  # torch.load has a list of its own there
def test_the_gadgets_do_run_in_pickle(name, tmp_path):
    """Negative control."""
    canary = tmp_path / "canary"
    with contextlib.suppress(Exception):  # what happens after the gadget does not matter
        pickle.loads(gadgets(canary)[name])
    assert canary.exists()


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (in_data(Calls(os.system, "true")), f"{os.system.__module__}.system"),
        (in_data(Calls(eval, "1")), "builtins.eval"),
        (in_data(Path("x")), "pathlib"),
        (with_payload(legacy_stream(fourth=Calls(os.getcwd))), f"{os.getcwd.__module__}.getcwd"),
        (b"cthis_module_is_not\nthere\n.", "this_module_is_not.there"),
    ],
)
def test_the_refused_name_is_in_the_message(record, named):
    with pytest.raises(RecordError, match=f"names {named}.*refused"):
        decode_record(record)


def test_a_named_module_is_not_imported():
    module = "this"  # of the standard library: would print when imported
    sys.modules.pop(module, None)
    with pytest.raises(RecordError, match=r"this\.s"):
        decode_record(b"c" + module.encode() + b"\ns\n.")
    assert decode_record(in_data(5))["y"] == 5
    assert module not in sys.modules


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (TENSOR + b"}X\x01\x00\x00\x00aK\x01sb.", "state for a Function"),
        (TENSOR + b"N}X\x0c\x00\x00\x00__defaults__)s\x86b.", "state for a Function"),
        (b"ctorch_geometric.data.data\nData\n}b.", "state for a ClassMark|torch_geometric.data.data.Data"),
        (DATA + b"N}X\x09\x00\x00\x00__class__Ns\x86b.", "state is no dict"),
        (b"ctorch_geometric.data.data\nData\n)R.", "call of torch_geometric.data.data.Data"),
        (b"ctorch_geometric.data.data\nData\nK\x01\x85\x81.", "made with arguments"),
        (b"ctorch_geometric.data.data\nData.__init__\n.", "is no pickled"),
        (DATA + b"]a.", "list items for a Instance"),
        (DATA + b"X\x01\x00\x00\x00aNs.", "items for a Instance"),
        (b"cnumpy\nndarray\n)\x81.", "is no pickled"),
        (b"}K\x01K\x02s.", "dict with a key of type int"),
        (b"\x82\x01.", "not allowed"),
        (b"P1\n.", "not allowed"),
        (b"K\x01Q.", "persistent id"),
        (b"I1\n.", "not allowed"),
        (b"K\x05.", "is no pickled torch_geometric Data but a int"),
        (in_data(1) + b"x", "goes on after its end"),
        (b"", "damaged at byte 0"),
    ],
)
def test_hand_made_pickles_that_reach_for_attributes_calls_or_other_instructions(record, message):
    with pytest.raises(RecordError, match=message):
        decode_record(record)


def test_attributes_named_like_methods_stay_data():
    names = ("build", "attributes", "cls", "pos")
    state = dict.fromkeys(names, 7) | {"__setstate__": 7, "__class__": 7, "__dict__": {"a": 1}}
    assert decode_record(DATA + body(state) + b"b.") == dict.fromkeys(names, 7)
    assert decode_record(in_data(3))["y"] == 3


# Sizes: refused before anything is allocated


def long_put() -> bytes:
    return b"\x80\x04K\x01r\xff\xff\xff\xff."


def nested_tuples() -> bytes:
    doubled = b"K\x01" + b"".join(b"\x94h" + bytes((n,)) + b"\x86" for n in range(60))
    return b"\x80\x04}" + doubled + b"Ns."


def _nested(depth: int) -> tuple:
    return (1,) if depth == 0 else (nested := _nested(depth - 1), nested)


BOMBS = {
    "memo index": long_put(),
    "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.",
    "BINBYTES": b"\x80\x04B" + struct.pack("<I", 2**32 - 1) + b"abc.",
    "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"abc.",
    "BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", 2**61) + b"abc.",
    "LONG4": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",
    "tuples that take for ever to hash": nested_tuples(),
    "tuples that take for ever to print": nested_tuples()[:-3] + b"R.",
    "tensor shape": in_data(
        Calls(torch._utils._rebuild_tensor_v2, torch.zeros(1).untyped_storage(), 0, (2**40,), (0,), False, {})
    ),
    "tensor shape of nested tuples": in_data(
        Calls(torch._utils._rebuild_tensor_v2, torch.zeros(1).untyped_storage(), 0, _nested(40), (0,), False, {})
    ),
    "storage size": with_payload(legacy_stream().replace(struct.pack("<q", 6), struct.pack("<q", 2**60))),
    "dimensions": in_data(torch.zeros(1), 2).replace(b"K\x01\x85", b"(" + b"K\x01" * 3000 + b"t", 1),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", list(BOMBS))
def test_declared_sizes_are_checked_before_anything_is_made(name):
    tracemalloc.start()
    try:
        with pytest.raises(RecordError):
            decode_record(BOMBS[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 + 20 * len(BOMBS[name])


# Damage


def test_a_record_cut_anywhere_is_an_error():
    value = small_data.dump_record({"pos": torch.rand(3, 3), "natoms": 3, "y": -0.5})
    for size in range(len(value)):
        with pytest.raises(RecordError):
            decode_record(value[:size])


@pytest.mark.parametrize("layout", small_data.LAYOUTS)
def test_flipped_bytes_give_an_error_or_a_result_and_nothing_else(layout):
    value = small_data.dump_record(small_data.make_fields(0, edges=False), layout=layout)
    rng = random.Random(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(value)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            fields = decode_record(bytes(damaged))
        except RecordError:
            refused += 1
        else:
            assert all(isinstance(name, str) for name in fields)
    assert 300 < refused < 2900  # both happen: flips of a number's bytes are not seen here
