"""`make gpu-pack-model`: the demo's model at W4A4KV4 as files small enough to carry one by one, model.1of2 and so on.

Together they are one archive of a folder `model`, the checkpoint that the stage `answer` of a GPU run serves.
"""

import argparse
import subprocess
from pathlib import Path

from benchmarks.common.models import quantized

RECIPE = Path(__file__).with_name("model.yaml")


def main() -> None:
    """Quantize the model and write the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the parts")
    parser.add_argument("--part-mb", type=float, default=58.0, help="the largest part, 10^6 bytes")
    options = parser.parse_args()
    checkpoint = quantized("gpu", "--recipe", RECIPE)
    options.output.mkdir(parents=True, exist_ok=True)
    for file in options.output.glob("model.*of*"):
        file.unlink()
    command = ["tar", "--create", "--use-compress-program=xz -6 -T0", "--sort=name", "--mtime=@0"]
    command += [f"--transform=s/^{checkpoint.name}/model/", "--directory", str(checkpoint.parent), checkpoint.name]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    size = int(options.part_mb * 1e6)
    parts = [archive[start : start + size] for start in range(0, len(archive), size)]
    for number, part in enumerate(parts, 1):
        digits = f"{number:0{len(str(len(parts)))}}"  # names in order
        file = options.output / f"model.{digits}of{len(parts)}"
        file.write_bytes(part)
        print(f"{file} {len(part) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
