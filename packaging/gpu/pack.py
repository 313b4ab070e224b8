"""`make gpu-pack`: archives of what a bare machine with a Hopper GPU lacks to run `vllm serve`.

The machine has Linux on x86-64, Python 3.12, PyTorch 2.11 for CUDA 13 with its Triton, transformers, and no network.
vLLM's extensions use torch's stable ABI, so the wheel runs on an older torch than it pins. What is left out: device
code for other GPUs, kernels that no dense model needs, and the parts of vLLM that serve neither text nor benchmarks.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from prune_fatbin import prune

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "gpu.lock"
ARCH = 90
PYTHON = "3.12"
GLIBC = ("2_17", "2_24", "2_27", "2_28", "2_31", "2_34")
PLATFORMS = (*(f"manylinux_{version}_x86_64" for version in GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64")
KEPT_EXTENSIONS = ("vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so")
"""Of vLLM: its own kernels (Marlin, Machete, CUTLASS among them) and FlashAttention 3."""
UNUSED = (
    "bin",
    "vllm/vllm-rs",
    "vllm/third_party/deep_gemm",
    "vllm/third_party/fmha_sm100",
    "vllm/entrypoints/serve/instrumentator/static",
    "mistral_common/data",
    "vllm/_moe_C_stable_libtorch.abi3.so",
    "vllm/_flash*_C.abi3.so",
    "vllm/_deepselect_C.abi3.so",
    "vllm/_qutlass_C.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so",
)


def main() -> None:
    """Make the archives in the output folder; exits with 1 where they are larger than --limit-mb."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the archives")
    parser.add_argument("--limit-mb", type=float, default=60.0, help="what all archives may take, 10^6 bytes")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch)
        install(site)
        trim(site)
        describe(site)
        archive(site, options.output)
    check_sizes(options.output, options.limit_mb)


def install(site: Path) -> None:
    """Install the wheels of the lock for the machine's Python."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--no-compile"]
    command += [
        "--python-version",
        PYTHON,
        "--implementation",
        "cp",
        "--abi",
        "cp312",
        "--abi",
        "abi3",
        "--abi",
        "none",
    ]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, "--target", site, "-r", LOCK], check=True)


def trim(site: Path) -> None:
    """Remove what is not used, and the device code for other GPUs."""
    for path in [path for pattern in UNUSED for path in site.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in KEPT_EXTENSIONS:
        kept, dropped = prune(site / name, ARCH)
        subprocess.run(["strip", "--strip-unneeded", site / name], check=True)
        print(f"{name}: {kept / 1e6:.1f} MB of device code for sm_{ARCH}, dropped {dropped / 1e6:.1f} MB", flush=True)


def describe(site: Path) -> None:
    """Write this package's metadata: vLLM finds the plugin by its entry point, the code stays in the checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in entries.items()))
    ]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


def archive(site: Path, output: Path) -> None:
    """Write ext (vLLM's extensions), vllm (its Python) and deps (all else), which unpack side by side."""
    extensions = [str(file.relative_to(site)) for file in sorted(site.glob("vllm/**/*.so"))]
    package = ["vllm", *(folder.name for folder in site.glob("vllm-*.dist-info"))]
    _tar(site, output / "ext.tar.xz", extensions)
    _tar(site, output / "vllm.tar.xz", ["--exclude=*.so", *package])
    _tar(site, output / "deps.tar.xz", [name for name in sorted(os.listdir(site)) if name not in package])


def _tar(site: Path, file: Path, members: list[str]) -> None:
    options = ["--use-compress-program=xz -6 -T0", "--sort=name", "--mtime=@0", "--exclude=__pycache__"]
    subprocess.run(["tar", *options, "--directory", site, "--create", "--file", file, *members], check=True)


def check_sizes(output: Path, limit_mb: float) -> None:
    """Print the archives' sizes; exit with 1 where the sum is above the limit."""
    total = 0.0
    for file in sorted(output.glob("*.tar.xz")):
        megabytes = file.stat().st_size / 1e6
        total += megabytes
        print(f"{file.name:16} {megabytes:6.1f} MB")
    print(f"{'all':16} {total:6.1f} MB of {limit_mb:.1f}")
    if total > limit_mb:
        sys.exit(f"{output}: {total:.1f} MB, more than the {limit_mb:.1f} MB given by --limit-mb")


if __name__ == "__main__":
    main()
