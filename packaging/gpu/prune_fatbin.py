"""Keep in a library's CUDA fat binaries only what GPUs of one compute capability can use.

A fat binary is a container of cubins (machine code for one architecture) and PTX (which the driver compiles). Of
each container the cubins for the wanted architecture stay; without one, the newest PTX that the architecture can
take; without either, the smallest entry, which such a GPU could not use before either. Containers shrink in place:
the size in their header is lowered and zeros follow, so that no other offset in the library changes.
"""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = 0xBA55ED50
SECTIONS = (".nv_fatbin", "__nv_relfatbin")
CONTAINER = struct.Struct("<IHHQ")
"""Magic, version, bytes of this header, bytes of the entries behind it."""
ENTRY = struct.Struct("<HHIQ12xI")
"""Kind, version, bytes of this header, bytes of the code behind it, architecture."""
PTX, CUBIN = 1, 2


class Entry(NamedTuple):
    """One architecture's code: `whole` is the header and the code."""

    kind: int
    arch: int
    whole: bytes


def prune(file: Path, arch: int) -> tuple[int, int]:
    """Rewrite the ELF library `file` for compute capability `arch` (90 for 9.0); return bytes kept and dropped."""
    library = bytearray(file.read_bytes())
    kept = dropped = 0
    for offset, size in list(_fatbin_sections(library)):
        for begin, end in list(_containers(library, offset, offset + size)):
            chosen = b"".join(entry.whole for entry in _wanted(list(_entries(library, begin, end)), arch))
            library[begin:end] = chosen + bytes(end - begin - len(chosen))
            struct.pack_into("<Q", library, begin - 8, len(chosen))  # the last field of the container's header
            kept, dropped = kept + len(chosen), dropped + end - begin - len(chosen)
    file.write_bytes(library)
    return kept, dropped


def _fatbin_sections(library: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """(offset, size) of the sections of a 64-bit ELF file that hold fat binaries."""
    (table,) = struct.unpack_from("<Q", library, 0x28)
    size, count, names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", library, table + index * size) for index in range(count)]
    for name, _, _, _, offset, length in headers:
        begin = headers[names][4] + name
        if library[begin : library.index(b"\0", begin)].decode() in SECTIONS:
            yield offset, length


def _containers(library: bytes | bytearray, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Where each container's entries begin and end."""
    while begin + CONTAINER.size <= end:
        magic, _, header, size = CONTAINER.unpack_from(library, begin)
        if magic != MAGIC:
            begin += 8
            continue
        yield begin + header, begin + header + size
        begin += header + size


def _entries(library: bytes | bytearray, begin: int, end: int) -> Iterator[Entry]:
    while begin + ENTRY.size <= end:
        kind, _, header, size, arch = ENTRY.unpack_from(library, begin)
        if not header or begin + header + size > end:
            raise ValueError(f"entry at {begin:#x}: {header} + {size} bytes, {end - begin} are left in its container")
        yield Entry(kind, arch, bytes(library[begin : begin + header + size]))
        begin += header + size


def _wanted(entries: list[Entry], arch: int) -> list[Entry]:
    if not entries:
        return []
    cubins = [entry for entry in entries if entry.kind == CUBIN and entry.arch == arch]
    ptx = [entry for entry in entries if entry.kind == PTX and entry.arch <= arch]
    if cubins:
        return cubins
    return [max(ptx, key=lambda entry: entry.arch) if ptx else min(entries, key=lambda entry: len(entry.whole))]


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(name, "kept {:,} bytes of device code, dropped {:,}".format(*prune(Path(name), int(sys.argv[1]))))
