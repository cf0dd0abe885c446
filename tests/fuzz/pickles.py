"""Files of `torch.save` that are damaged or lie: the archive, what its table says, and the operations that say it."""

from __future__ import annotations

import io
import itertools
import pickletools
import random
import struct
import zipfile
from collections.abc import Iterator, Mapping

from tests.fuzz.documents import damaged

STRUCTURE = "m"
"""The folder inside of the archive."""
_NUMBERS = (-1, 0, 1, 2, 7, 255, 2**31 - 1, -(2**31))
_CODES = tuple(op.code.encode("latin-1") for op in pickletools.opcodes)


def archive(table: bytes, records: Mapping[str, bytes], compressed: bool = False) -> bytes:
    """A file of `torch.save` around a pickle. records: bytes by the names under `data/`."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        file.writestr(f"{STRUCTURE}/data.pkl", table)
        file.writestr(f"{STRUCTURE}/byteorder", b"little")
        for name, data in records.items():
            file.writestr(f"{STRUCTURE}/data/{name}", data)
    return out.getvalue()


def opened(content: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The pickle and the records of a file."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        names = file.namelist()
        table = next(name for name in names if name.endswith("/data.pkl"))
        records = {name.rpartition("/")[2]: file.read(name) for name in names if "/data/" in name}
        return file.read(table), records


def mutated_file(content: bytes, seed: int) -> Iterator[bytes]:
    """Endless variants of a whole file."""
    draw = random.Random(seed)
    table, records = opened(content)
    while True:
        kind = draw.randrange(6)
        if kind == 0:
            yield damaged(content, draw)
        elif kind == 1:
            name = draw.choice([*records])
            lost = draw.choice([{}, {name: records[name][: draw.randrange(len(records[name]) + 1)]}])
            yield archive(table, {key: data for key, data in records.items() if key != name} | lost)
        elif kind == 2:
            yield archive(damaged(table, draw), records, compressed=draw.random() < 0.1)
        else:
            yield archive(_edited(table, draw), records)


def _edited(table: bytes, draw: random.Random) -> bytes:
    """The pickle with one to three operations lost, doubled, put in, or saying another number."""
    places = [place for _, _, place in pickletools.genops(table)] + [len(table)]
    operations = [table[begin:end] for begin, end in itertools.pairwise(places)]
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(operations))
        made = draw.choice(
            [
                [],
                [operations[at]] * 2,
                [draw.choice(operations), operations[at]],
                [draw.choice(_CODES), operations[at]],
                [b"J" + struct.pack("<i", draw.choice(_NUMBERS))],
                [b"\x8a\x10" + draw.randbytes(16)],
            ]
        )
        operations[at : at + 1] = made
    return b"".join(operations)
