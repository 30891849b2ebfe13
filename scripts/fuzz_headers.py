#!/usr/bin/env python3
"""Fuzzes the readers of files that come from elsewhere: safetensors headers, config.json, measurement.json.

    pip install atheris
    python scripts/fuzz_headers.py -max_total_time=300 [libFuzzer options, corpus folders]

Anything but a typed error of exl2ray is a finding: the input is kept as crash-... in the current folder. So is an input that
takes more than a gigabyte or ten seconds. The first byte chooses the reader, the rest is the file.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import atheris

with atheris.instrument_imports(include=["exl2ray.formats"]):
    from exl2ray.formats.hfconfig import read_config
    from exl2ray.formats.measurement import read_measurement
    from exl2ray.formats.tensorfile import TensorFile, read_tensor

from exl2ray.errors import Exl2RayError

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
LIMITS = ["-rss_limit_mb=1024", "-timeout=10", "-max_len=4096"]


def safetensors(data: bytes) -> None:
    """A file as it is."""
    path = FOLDER / "a.safetensors"
    path.write_bytes(data)
    found = TensorFile(path)
    for info in found.tensors.values():
        read_tensor(info)


def framed(data: bytes) -> None:
    """The same with a true length in front of the header, so that the JSON behind it is reached at once."""
    size = len(data) * 3 // 4
    safetensors(struct.pack("<Q", size) + data)


def config(data: bytes) -> None:
    path = FOLDER / "config.json"
    path.write_bytes(data)
    read_config(path)


def measurement(data: bytes) -> None:
    path = FOLDER / "measurement.json"
    path.write_bytes(data)
    read_measurement(path)


READERS = (safetensors, framed, config, measurement)


def one_input(data: bytes) -> None:
    if not data:
        return
    try:
        READERS[data[0] % len(READERS)](data[1:])
    except Exl2RayError as e:
        if not e.message:
            raise AssertionError("a typed error without a message") from e


def seeds(folder: Path) -> None:
    """Sound files to start from."""
    header = b'{"__metadata__":{"format":"pt"},"a.weight":{"dtype":"F16","shape":[2,2],"data_offsets":[0,8]}}'
    folder.mkdir(exist_ok=True)
    whole = struct.pack("<Q", len(header)) + header + bytes(8)
    (folder / "safetensors").write_bytes(b"\x00" + whole)
    (folder / "framed").write_bytes(b"\x01" + header + bytes(len(header) // 3))
    (folder / "config").write_bytes(b'\x02{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "rope": {"a": 1}}')
    option = b'{"group_size": {"4": 128}, "bits": [4], "bits_prop": [1], "scale_bits": 4}'
    row = b'{"accuracy": 0.9, "total_bits": 100, "q_proj": ' + option + b"}"
    (folder / "measurement").write_bytes(
        b'\x03{"measurement": {"model.layers.0.self_attn": [' + row + b']}, "last_module_idx": 1}'
    )


if __name__ == "__main__":
    corpus = FOLDER / "seeds"
    seeds(corpus)
    atheris.Setup([sys.argv[0], *LIMITS, *sys.argv[1:], str(corpus)], one_input)
    atheris.Fuzz()
