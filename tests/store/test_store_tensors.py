"""Tensor files of the work directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exl2ray.errors import StoreError
from exl2ray.store.faults import MissingFileError
from exl2ray.store.fs import Store
from exl2ray.store.local import LocalStore
from exl2ray.store.records import FileRef
from exl2ray.store.tensors import get_tensors, joined, put_tensors

REL = "measure/states/lm_head.safetensors"


def example() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "half": torch.randn(3, 5, generator=g).half(),
        "bf16": torch.randn(7, generator=g).bfloat16(),
        "packed": torch.randint(-(2**31), 2**31 - 1, (4, 32), generator=g, dtype=torch.int32),
        "short": torch.arange(4, dtype=torch.int16),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 8),
    }


def test_round_trip(store: Store) -> None:
    ref = put_tensors(store, REL, example())
    assert ref == FileRef(REL, store.sha256(REL), store.size(REL))
    back = get_tensors(store, REL, expect=ref)
    assert back.keys() == example().keys()
    for name, t in example().items():
        assert back[name].dtype == t.dtype
        assert torch.equal(back[name], t)


def test_small_neighbours_are_joined() -> None:
    parts = [memoryview(bytes([i]) * n) for i, n in enumerate((3, 5, 100, 64, 1, 63, 200, 2))]
    found = list(joined(parts, small=64))
    assert [p.nbytes for p in found] == [8, 100, 64, 64, 200, 2]
    assert b"".join(found) == b"".join(parts)
    assert found[1] is parts[2]  # not copied


def test_bytes_do_not_depend_on_order_or_memory_layout(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {"t": base.T, "row": base[1], "all": base, "same": base}
    plain = {"same": base.clone(), "all": base.clone(), "row": base[1].clone(), "t": base.T.contiguous()}
    assert put_tensors(store, "a", views).sha256 == put_tensors(store, "b", plain).sha256
    assert torch.equal(get_tensors(store, "a")["t"], base.T)


def test_writing_to_a_mapped_tensor_does_not_touch_the_file(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    ref = put_tensors(store, REL, {"x": torch.ones(1000)})
    get_tensors(store, REL)["x"].zero_()
    assert torch.equal(get_tensors(store, REL, expect=ref)["x"], torch.ones(1000))


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
@pytest.mark.parametrize("expected", [True, False])
def test_truncated_file_is_an_error_naming_it(store: Store, keep: int, expected: bool) -> None:
    ref = put_tensors(store, REL, example())
    store.put(REL, store.get(REL)[:keep])
    with pytest.raises(StoreError, match=r"lm_head\.safetensors") as caught:
        get_tensors(store, REL, expect=ref if expected else None)
    assert "delete this file" in caught.value.hint


def test_altered_file_and_wrong_reference(store: Store) -> None:
    ref = put_tensors(store, REL, example())
    data = bytearray(store.get(REL))
    data[-1] ^= 1
    store.put(REL, bytes(data))
    with pytest.raises(StoreError, match="SHA-256"):
        get_tensors(store, REL, expect=ref)
    store.put("other", b"")
    with pytest.raises(StoreError, match="asked for with the reference of"):
        get_tensors(store, "other", expect=put_tensors(store, REL, example()))


def test_missing_file_and_nothing_to_write(store: Store) -> None:
    with pytest.raises(MissingFileError, match="lm_head"):
        get_tensors(store, REL)
    with pytest.raises(StoreError, match="no tensors"):
        put_tensors(store, REL, {})
