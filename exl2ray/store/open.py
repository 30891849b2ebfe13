"""From the name of a work directory to its store."""

from __future__ import annotations

from exl2ray.errors import StoreError
from exl2ray.store.fs import Store
from exl2ray.store.local import LocalStore


def open_store(root: str) -> Store:
    """Store for a local path (also ``file://``), ``s3://bucket/prefix`` or ``gs://bucket/prefix``; touches nothing.

    S3 honours AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, AWS_REGION, AWS_DEFAULT_REGION and the credential variables
    and files of the AWS SDK; gs:// honours GOOGLE_APPLICATION_CREDENTIALS and STORAGE_EMULATOR_HOST.
    """
    path = local_path(root)
    if path is not None:
        return LocalStore(path)
    from exl2ray.store.object_store import ObjectStore  # pyarrow.fs takes a while to load

    return ObjectStore(root)


def local_path(root: str) -> str | None:
    """The path of a local store, None for an object store. Raises StoreError for a name that is neither."""
    if not root:
        raise StoreError("the work directory's name is empty", "give a directory with -o")
    scheme, separator, rest = root.partition("://")
    if not separator or scheme == "file":
        return rest if separator else root
    if scheme in ("s3", "gs"):
        return None
    raise StoreError(f"{root}: cannot store under {scheme}://", "use a local path, s3:// or gs://")
