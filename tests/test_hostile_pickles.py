"""Files of `torch.save` that lie, are damaged or hold code: nothing in them runs, and one line says what is wrong."""

from __future__ import annotations

import itertools
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from common.weights import pickles
from common.weights.checkpoint import open_checkpoint
from tests.fuzz.pickles import STRUCTURE, archive, mutated_file, opened
from tests.test_hostile_files import CASES, Harm, little_memory, refused


def read_all(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    for name in checkpoint:
        checkpoint.tensor(name).float().sum()


def saved(path: Path) -> bytes:
    tensors = {"a.weight": torch.ones(2, 3), "b": torch.zeros(3, dtype=torch.bfloat16), "c": torch.arange(4)[1:]}
    torch.save(tensors | {"p": torch.nn.Parameter(torch.ones(1)), "f": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    return path.read_bytes()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "a.pth"
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict()
    kept = layers | {"half": torch.ones(2, dtype=torch.float16), "eight": torch.ones(2).to(torch.float8_e5m2)}
    torch.save(kept, path, pickle_protocol=protocol)
    checkpoint = open_checkpoint(path)
    assert checkpoint.keys() == kept.keys()
    assert all(torch.equal(checkpoint.tensor(name).float(), kept[name].float()) for name in kept)
    torch.save(layers, path, pickle_protocol=protocol)  # a table with an attribute
    assert open_checkpoint(path).keys() == layers.keys()


def test_mutated_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    content = saved(path)
    outcomes = set()
    with little_memory():
        for variant in itertools.islice(mutated_file(content, seed=5), 5 * CASES):
            path.write_bytes(variant)
            if variant.startswith(pickles.MAGIC):  # others may be of the format before 1.6, which torch reads
                outcomes.add(refused(lambda: read_all(path), path))
    assert outcomes == {True, False}


MKDIR = b"cos\nmkdir\n"
CALLS = {
    "reduce": MKDIR + b"X%b\x85R.",
    "named on the stack": b"X\x02\x00\x00\x00osX\x05\x00\x00\x00mkdir\x93X%b\x85R.",
    "instance": b"(X%bios\nmkdir\n.",
    "object": b"(" + MKDIR + b"X%bo.",
    "new object": MKDIR + b"X%b\x85\x81.",
    "state": b"ccollections\nOrderedDict\n)R" + MKDIR + b"X%b\x85Rb.",
    "in a reference": MKDIR + b"X%b\x85RQ.",
    "a builtin": b"c__builtin__\neval\nX%b\x85R.",
    "an attribute of what is known": b"X\x0b\x00\x00\x00collectionsX\x0f\x00\x00\x00OrderedDict.pop\x93X%b\x85R.",
}


@pytest.mark.parametrize("way", CALLS)
def test_no_way_of_calling_runs_code(tmp_path: Path, way: str) -> None:
    path, marker = tmp_path / "a.pth", tmp_path / "done"
    said = str(marker).encode()
    table = b"\x80\x02" + CALLS[way].replace(b"X%b", b"X" + len(said).to_bytes(4, "little") + said)
    path.write_bytes(archive(table, {}))
    assert refused(lambda: read_all(path), path) and not marker.exists()


def test_the_ways_of_calling_do_run_code_in_pythons_own_machine(tmp_path: Path) -> None:
    """So that the test above cannot pass by pickles that no machine would run."""
    for way in ("reduce", "named on the stack", "instance", "object", "state"):
        marker = tmp_path / way
        said = str(marker).encode()
        table = b"\x80\x04" + CALLS[way].replace(b"X%b", b"X" + len(said).to_bytes(4, "little") + said)
        with suppress(Exception):
            pickle.loads(table)
        assert marker.exists(), way


def test_objects_of_other_kinds_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for value, name in ((Harm(tmp_path / "done"), "mkdir"), (tmp_path, "pathlib"), ({1, 2}, "EMPTY_SET|set")):
        torch.save({"a": value}, path)
        assert refused(lambda: read_all(path), path)
        with pytest.raises(ValueError, match=rf"holds .*({name}).*not loaded"):
            read_all(path)
    assert not (tmp_path / "done").exists()


CRAFTED = {
    "what the next file is read with": b"ctorch\nFloatStorage\n}X\x05\x00\x00\x00dtypeX\x03\x00\x00\x00F64sb.",
    "keys in keys": b"})" + b"\x85" * 1_000_000 + b"Ns.",
    "values in values": b"}X\x01\x00\x00\x00a)" + b"\x85" * 1_000_000 + b"s.",
    "a table in itself": b"}q\x00X\x01\x00\x00\x00ah\x00s.",
    "no end": b"}",
    "nothing to take": b"\x85.",
    "no mark": b"}u.",
    "an endless text": b"X\xff\xff\xff\x7fabc.",
    "an endless number": b"\x8b\xff\xff\xff\x7f\x01.",
    "a number of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "half an item": b"}(X\x01\x00\x00\x00au.",
    "an extension": b"\x82\x01.",
    "a buffer": b"\x97.",
    "a name that is none": b"ctorch\n\xff\xfe\n.",
}


@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_tables(tmp_path: Path, case: str) -> None:
    path = tmp_path / "a.pth"
    before = dict(pickles._KNOWN)
    path.write_bytes(archive(b"\x80\x02" + CRAFTED[case], {"0": bytes(8)}))
    with little_memory():
        assert refused(lambda: read_all(path), path)
    assert before == pickles._KNOWN and pickles._KNOWN["torch", "FloatStorage"].dtype == "F32"


def lying(content: bytes, old: bytes, new: bytes) -> bytes:
    table, records = opened(content)
    assert table.count(old) == 1
    return archive(table.replace(old, new), records)


def test_shapes_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(2, 3)}, path)
    content = path.read_bytes()
    shape = b"K\x02K\x03\x86"
    for sides in (b"K\x02K\x04\x86", b"J\xff\xff\xff\xffK\x03\x86", b"K\x02X\x01\x00\x00\x003\x86", b"K\x06\x85"):
        path.write_bytes(lying(content, shape, sides))
        assert refused(lambda: read_all(path), path)
    large = b"\x8a\x08" + (1 << 62).to_bytes(8, "little")
    path.write_bytes(lying(content, shape, b"K\x00" + large + b"\x86"))
    assert refused(lambda: read_all(path), path), "no elements, yet sides that no tensor has"


def test_tables_that_unpack_to_much_more_than_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(archive(b"\x80\x02" + b"}0" * (400 << 20 >> 1), {}, compressed=True))
    assert path.stat().st_size < 4 << 20
    with little_memory():
        assert refused(lambda: read_all(path), path)


def test_records_that_are_compressed_or_of_another_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(64)}, path)
    table, records = opened(path.read_bytes())
    path.write_bytes(archive(table, records, compressed=True))
    assert refused(lambda: read_all(path), path)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"data.pkl": table, "byteorder": b"big"}.items():
            file.writestr(f"{STRUCTURE}/{name}", data)
    assert refused(lambda: read_all(path), path)
