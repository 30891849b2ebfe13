"""A model at an address becomes a folder: small files fetched, shards registered, both kept in the work directory.

``local(in_dir)`` gives the folder. In a work directory, ``source/`` holds the small files and ``source.json``, which says
which commit and which objects the job began with: a resume, and every worker, begins from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from exl2ray.errors import StoreError, why_not_read
from exl2ray.formats.elsewhere import Mount, mount_at, register
from exl2ray.formats.file_states import FileState
from exl2ray.formats.json_file import parse_json_object
from exl2ray.formats.side_files import TEMPLATES
from exl2ray.recipe import Recipe
from exl2ray.remote.address import Address, is_remote, parse
from exl2ray.remote.block_cache import Blocks
from exl2ray.remote.hub import Repository
from exl2ray.remote.listing import Listing
from exl2ray.remote.objects import Bucket
from exl2ray.stopping import at_the_end
from exl2ray.store.faults import MissingFileError
from exl2ray.store.file_names import SOURCE_FILE, SOURCE_FOLDER
from exl2ray.store.fs import Store
from exl2ray.store.open import open_store
from exl2ray.store.temporary import abandoned, hold
from exl2ray.store.trust import others_who_write
from exl2ray.units import parse_size

BLOCKS = f"{SOURCE_FOLDER}/blocks"
TEMP_PREFIX, LOCK = "exl2ray-source-", ".in-use"  # of the folder, and of the file in it that its process holds
CACHE_BYTES = 20 * 10**9
FORMAT = 1
MAX_FOLDERS = 100


@dataclass
class Opened:
    """A source in this process. asked: address as it was given. small: contents of the small files."""

    asked: Address
    listing: Listing
    mount: Mount
    blocks: Blocks
    small: dict[str, bytes]
    notes: list[str]


_opened: dict[str, Opened] = {}  # by what was asked for, and by the address with the commit
_lock = threading.Lock()


def local(in_dir: str, work: str = "", fresh: bool = False, cache_bytes: int = CACHE_BYTES, flag: str = "-i") -> str:
    """The folder of a model: ``in_dir`` itself, or one that stands for an address.

    work: the work directory, which may know the commit already (unless ``fresh``). cache_bytes: what may be kept of the
    shards on this disk. Raises what reading the address raises, and UsageError for what is none.
    """
    if not is_remote(in_dir):
        return in_dir
    with _lock:
        if in_dir not in _opened:
            asked = parse(in_dir, flag)
            opened = None if fresh else _remembered(asked, work, cache_bytes)
            opened = opened or _looked_up(asked, cache_bytes)
            _opened[in_dir] = _opened[str(opened.listing.address)] = opened
        return str(_opened[in_dir].mount.folder)


def keep(folder: str | Path, work: Store) -> list[str]:
    """Puts what a resume and the workers need into the work directory. Returns notes. Nothing for an ordinary folder."""
    opened = _at(folder)
    if opened is None:
        return []
    manifest = _manifest(opened)
    if not work.exists(SOURCE_FILE) or work.get(SOURCE_FILE) != manifest:
        for name, data in opened.small.items():
            work.put(f"{SOURCE_FOLDER}/{name}", data)
        work.put(SOURCE_FILE, manifest)
    root = work.local_path(BLOCKS)
    if root is not None:
        opened.blocks.root = root
    return opened.notes


def cached_bytes(folder: str | Path) -> int:
    """The most that is kept of the shards of a folder on this disk."""
    opened = _at(folder)
    return 0 if opened is None else min(opened.blocks.limit, sum(f.size for f in opened.mount.files.values()))


def localised(recipe: Recipe) -> Recipe:
    """``recipe`` with the folder of its model as ``in_dir``."""
    if not is_remote(recipe.in_dir):
        return recipe
    bound = parse_size(recipe.source_cache, "--source-cache")
    return replace(recipe, in_dir=local(recipe.in_dir, recipe.out_dir, recipe.no_resume, bound))


def _at(folder: str | Path) -> Opened | None:
    mount = mount_at(folder)
    return next((o for o in _opened.values() if o.mount is mount), None) if mount is not None else None


# ---- opening ------------------------------------------------------------------------------------------------------------


def _place(address: Address, blocks: Blocks) -> Repository | Bucket:
    return Repository(address, blocks) if address.scheme == "hf" else Bucket(address, blocks)


def _looked_up(asked: Address, cache_bytes: int) -> Opened:
    """From the place itself."""
    blocks = Blocks(None, cache_bytes)
    listing = _place(asked, blocks).listing()
    chosen, notes = listing.small()
    return _made(asked, listing, {e.name: listing.fetch(e) for e in chosen}, blocks, notes)


def _remembered(asked: Address, work: str, cache_bytes: int) -> Opened | None:
    """From a work directory that began with this address; None if there is none, or others can have written it."""
    if not work or (not is_remote(work) and not os.path.isdir(work)) or others_who_write(work) is not None:
        return None
    store = open_store(work)
    try:
        found = parse_json_object(store.get(SOURCE_FILE), store.full_name(SOURCE_FILE), StoreError)
    except MissingFileError:
        return None
    if found.get("asked") != str(asked) and found.get("address") != str(asked):
        return None
    blocks = Blocks(store.local_path(BLOCKS), cache_bytes)
    try:
        address = parse(str(found["address"]))
        if (address.scheme, address.place, address.path) != (asked.scheme, asked.place, asked.path):
            return None
        if address.scheme == "hf" and not address.pinned:
            return None
        entries = tuple(FileState(**e) for e in found["entries"])
        folders, hashes = tuple(map(str, found["folders"])), dict(found["small"])
        small = {}
        for name, expected in hashes.items():
            small[name] = store.get(f"{SOURCE_FOLDER}/{name}")
            if hashlib.sha256(small[name]).hexdigest() != expected:
                raise StoreError(f"{store.full_name(SOURCE_FOLDER)}/{name}: not as it was fetched", "restore it, or -nr")
    except (KeyError, TypeError, ValueError, AttributeError, MissingFileError) as e:
        text = f"{store.full_name(SOURCE_FILE)}: broken: {why_not_read(e)}"
        raise StoreError(text, "-nr starts over") from e
    place = _place(address, blocks)
    listing = Listing(address, entries, folders, place.fetch, place.open)
    return _made(asked, listing, small, blocks, [])


def _made(asked: Address, listing: Listing, small: dict[str, bytes], blocks: Blocks, notes: list[str]) -> Opened:
    _sweep()
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix=TEMP_PREFIX)))
    at_the_end(partial(_remove, folder, os.getpid()))
    with suppress(OSError):  # without locks it is there to stay if this process is killed
        hold(folder, LOCK)
    for name, data in small.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    if blocks.root is None:
        blocks.root = folder / ".blocks"
    files = {e.name: listing.open(e) for e in listing.shards()}
    folders = tuple(f for f in listing.folders if f != TEMPLATES)
    mount = Mount(folder, str(listing.address), files, listing.others(), folders)
    register(mount)
    for name in folders[:MAX_FOLDERS]:  # what is in them is only named
        inside = tuple(e.name.partition("/")[2] for e in listing.entries if e.name.startswith(f"{name}/"))
        (folder / name).mkdir(exist_ok=True)
        register(Mount(folder / name, f"{mount.address}/{name}", {}, tuple(n for n in inside if "/" not in n)))
    return Opened(asked, listing, mount, blocks, small, notes)


def _remove(folder: Path, process: int) -> None:
    """And what the workers on this machine had, which are killed."""
    if os.getpid() == process:  # not in a fork of it
        shutil.rmtree(folder, ignore_errors=True)
        _sweep()


def _sweep() -> None:
    """Removes the folders of processes that were killed."""
    for folder in abandoned(Path(tempfile.gettempdir()), TEMP_PREFIX, LOCK):
        shutil.rmtree(folder, ignore_errors=True)


def _manifest(opened: Opened) -> bytes:
    value: dict[str, Any] = {
        "format": FORMAT,
        "asked": str(opened.asked),
        "address": str(opened.listing.address),
        "entries": [asdict(e) for e in opened.listing.entries if "/" not in e.name or e.name in opened.small],
        "folders": list(opened.listing.folders),
        "small": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(opened.small.items())},
    }
    return json.dumps(value, indent=1).encode()

