"""What `make gpu-pack` and `gpu-pack-model` write: pruned device code, archives that unpack side by side, and parts."""

import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks.common.models import ROOT

sys.path.insert(0, str(ROOT / "packaging" / "gpu"))

import pack_model
from pack import check_sizes, describe
from prune_fatbin import CONTAINER, CUBIN, ENTRY, MAGIC, PTX, prune

SECTION = b".nv_fatbin\0"


def entry(kind: int, arch: int, code: bytes) -> bytes:
    return ENTRY.pack(kind, 0, ENTRY.size, len(code), arch) + code


def container(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return CONTAINER.pack(MAGIC, 1, CONTAINER.size, len(body)) + body


def library(*containers: bytes) -> bytes:
    """An ELF file of a header, one section with containers, the names of sections, and the table of both."""
    body, names = b"".join(containers), b"\0" + SECTION
    table = 64 + len(body) + len(names)
    header = bytearray(64)
    header[0x28:0x30] = table.to_bytes(8, "little")
    header[0x3A:0x40] = b"".join(value.to_bytes(2, "little") for value in (40, 2, 1))
    sections = [(1, 1, 0, 0, 64, len(body)), (0, 3, 0, 0, 64 + len(body), len(names))]
    packed = b"".join(
        b"".join(value.to_bytes(size, "little") for value, size in zip(section, (4, 4, 8, 8, 8, 8), strict=True))
        for section in sections
    )
    return bytes(header) + body + names + packed


def pruned(tmp_path: Path, *containers: bytes) -> tuple[bytes, tuple[int, int]]:
    file = tmp_path / "library.so"
    file.write_bytes(library(*containers))
    found = prune(file, 90)
    return file.read_bytes(), found


def test_of_each_container_the_wanted_code_is_kept_where_it_was(tmp_path: Path) -> None:
    own, other = entry(CUBIN, 90, b"hopper--"), entry(CUBIN, 80, b"ampere--" * 4)
    first, second = container(other, own), container(own)
    after, (kept, dropped) = pruned(tmp_path, first, second)
    assert (kept, dropped) == (2 * len(own), len(other))
    assert len(after) == len(library(first, second))
    shrunk = CONTAINER.pack(MAGIC, 1, CONTAINER.size, len(own)) + own + bytes(len(other))
    assert after == library(shrunk, second)


@pytest.mark.parametrize(
    ("entries", "wanted"),
    [
        ([entry(PTX, 80, b"old ptx-"), entry(PTX, 90, b"new ptx-"), entry(PTX, 100, b"too new-")], 1),
        ([entry(CUBIN, 100, b"blackwell" * 8), entry(CUBIN, 120, b"small---")], 1),
    ],
    ids=["the newest PTX that it takes", "the smallest of what it cannot use"],
)
def test_without_machine_code_something_is_left(tmp_path: Path, entries: list[bytes], wanted: int) -> None:
    after, (kept, _) = pruned(tmp_path, container(*entries))
    assert kept == len(entries[wanted])
    assert entries[wanted] in after


def test_a_broken_entry_is_refused(tmp_path: Path) -> None:
    broken = bytearray(container(entry(CUBIN, 90, b"hopper--")))
    broken[CONTAINER.size + 4 : CONTAINER.size + 8] = (0).to_bytes(4, "little")
    with pytest.raises(ValueError, match="bytes, 40 are left"):
        pruned(tmp_path, bytes(broken))


def test_the_plugin_is_found_by_its_entry_point(tmp_path: Path) -> None:
    describe(tmp_path)
    code = "from importlib.metadata import entry_points as e, version as v; print(v('infoquant-vllm'), *e(group='{}'))"
    command = [sys.executable, "-c", code.format("vllm.general_plugins")]
    done = subprocess.run(command, env={"PYTHONPATH": str(tmp_path)}, check=True, capture_output=True, text=True)
    assert "infoquant_vllm:register" in done.stdout


def test_too_large_a_pack_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ext.tar.xz").write_bytes(bytes(2_000_000))
    check_sizes(tmp_path, 2.5)
    with pytest.raises(SystemExit, match=r"2\.0 MB, more than the 1\.5 MB"):
        check_sizes(tmp_path, 1.5)


def test_archives_unpack_once_into_one_folder(tmp_path: Path) -> None:
    site, model = tmp_path / "site", tmp_path / "model"
    for name, members in {
        ".gpu/deps.tar.xz": ["a.py"],
        ".gpu/vllm.tar.xz": ["vllm/b.py"],
        "whole.xz": ["model/c"],
    }.items():
        archive = tmp_path / name
        archive.parent.mkdir(exist_ok=True)
        with tarfile.open(archive, "w:xz") as opened:
            for member in members:
                (tmp_path / "file").write_text(member)
                opened.add(tmp_path / "file", member)
    whole = (tmp_path / "whole.xz").read_bytes()
    (tmp_path / ".gpu-model").mkdir()
    (tmp_path / ".gpu-model" / "model.1of2").write_bytes(whole[:50])
    script = (ROOT / "packaging" / "gpu" / "unpack.sh").read_text()
    script = script.replace("/tmp/infoquant-site", str(site)).replace("/tmp/infoquant-model", str(model))
    run = ["bash", "-e", "-c", f"{script}\necho $PYTHONPATH"]
    subprocess.run(run, cwd=tmp_path, check=True)
    assert not model.exists()
    (tmp_path / ".gpu-model" / "model.2of2").write_bytes(whole[50:])
    (site / "a.py").write_text("kept")
    done = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"{site}:{tmp_path}"
    assert (model / "model" / "c").read_text() == "model/c"
    assert ((site / "a.py").read_text(), (site / "vllm" / "b.py").read_text()) == ("kept", "vllm/b.py")


def test_a_model_in_parts_is_unpacked_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, there = tmp_path / "smollm2-gpu", tmp_path / "there"
    checkpoint.mkdir()
    weights = random.Random(0).randbytes(11_000)
    (checkpoint / "model.safetensors").write_bytes(weights)
    monkeypatch.setattr(pack_model, "quantized", lambda *_: checkpoint)
    monkeypatch.setattr("sys.argv", ["pack_model", str(tmp_path / ".gpu-model"), "--part-mb", "0.001"])
    pack_model.main()
    assert len(list((tmp_path / ".gpu-model").iterdir())) >= 11
    script = (ROOT / "packaging" / "gpu" / "unpack.sh").read_text().replace("/tmp/infoquant", str(there))
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    assert (tmp_path / "there-model" / "model" / "model.safetensors").read_bytes() == weights
