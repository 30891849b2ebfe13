"""Records what conversions write, byte for byte, and compares it with what another version of the program writes.

    python scripts/same_bytes.py record FILE [--model DIR]... [--quick]
    python scripts/same_bytes.py compare FILE [--quick]

Every model is converted at 3.0 and 4.5 bpw with each --quality and each --propagate in one process, and with the default
quality by 2 and 3 Ray workers. Kept are the SHA-256 of measurement.json and of all shards. Bytes depend on the processor's
instructions and on the version of torch: a record is good for the machine that made it. ``--quick``: one process only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = ["-r", "9", "-mr", "4", "-l", "128", "-ml", "128"]
QUALITIES, PROPAGATION = ("reference", "balanced"), ("quantized", "reference")
PROGRAM = [sys.executable, "-c", "from exl2ray.cli import program; program()"]


def cases(models: list[Path], quick: bool) -> list[tuple[Path, str, str, int]]:
    """(model, quality, propagation, workers)"""
    alone = [(m, q, p, 1) for m in models for q in QUALITIES for p in PROPAGATION]
    shared = [(m, "balanced", p, n) for m in models for p in PROPAGATION for n in (2, 3)]
    return alone if quick else alone + shared


def text() -> str:
    """The same text for every version: words of the licence in a random order."""
    return " ".join(random.Random(0).choices((ROOT / "LICENSE").read_text().split(), k=6000))


def digests(model: Path, quality: str, propagation: str, workers: int) -> dict[str, str]:
    """Relative path -> SHA-256 of all that a conversion left."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        (out / "text.txt").write_text(text())
        command = [*PROGRAM, "convert", "-i", str(model), "-o", str(out / "work"), "-cf", str(out / "{bpw}"), "-b", "3.0"]
        command += ["-b", "4.5", "--quality", quality, "--propagate", propagation, "--device", "cpu"]
        command += ["--evaluate", "never"]
        command += ["-c", str(out / "text.txt"), *ROWS]
        if workers > 1:
            command += ["--gpus", str(workers), "--executor", "ray"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{' '.join(command[2:])}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        files = [out / "work/measurement.json", *sorted(out.glob("*/output*.safetensors"))]
        return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", type=Path, action="append", help="default: models/demo")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    known = json.loads(args.file.read_text()) if args.what == "compare" else {"models": [], "bytes": {}}
    models = [Path(m) for m in known["models"]] or [m.resolve() for m in args.model or [ROOT / "models/demo"]]
    wrong = 0
    for case in cases(models, args.quick):
        name = " ".join([case[0].name, *map(str, case[1:])])
        if args.only not in name:
            continue
        start = time.monotonic()
        found = digests(*case)
        equal = args.what == "record" or found == known["bytes"].get(name)
        wrong += not equal
        known["bytes"][name] = found if args.what == "record" else known["bytes"].get(name)
        print(f"{name:48} {time.monotonic() - start:6.1f} s  {'equal' if equal else 'OTHER BYTES'}", flush=True)
        if not equal:
            print("   ", [k for k in found if found[k] != (known["bytes"].get(name) or {}).get(k)])
    if args.what == "record":
        args.file.write_text(json.dumps({"models": [str(m) for m in models], "bytes": known["bytes"]}, indent=1))
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
