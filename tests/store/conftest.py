"""Stores to test against: a temporary directory, moto's S3 server, and a GCS server of ours."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import pytest
from gcs_server import GcsServer
from store_helpers import JOB

from exl2ray.store.fs import Store
from exl2ray.store.open import open_store


@pytest.fixture
def job() -> dict[str, dict[str, Any]]:
    return {section: dict(settings) for section, settings in JOB.items()}


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """URL of a fresh bucket on moto's server; AWS_* point to it for the rest of the session."""
    boto3 = pytest.importorskip("boto3")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.delenv("AWS_REGION", raising=False)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="exl2ray-tests")
        yield "s3://exl2ray-tests"
    server.stop()


@pytest.fixture
def s3_root(s3_bucket: str) -> str:
    return f"{s3_bucket}/{secrets.token_hex(6)}"


@pytest.fixture(scope="session")
def gs_bucket() -> Iterator[str]:
    """URL of a bucket on a server of ours; STORAGE_EMULATOR_HOST points to it for the rest of the session."""
    server = GcsServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.address)
        yield "gs://exl2ray-tests"
    server.close()


@pytest.fixture
def gs_root(gs_bucket: str) -> str:
    return f"{gs_bucket}/{secrets.token_hex(6)}"


@pytest.fixture(params=["local", "s3", "gs"])
def root(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    """An empty place of each kind."""
    if request.param == "local":
        return str(tmp_path / "work")
    return str(request.getfixturevalue(f"{request.param}_root"))


@pytest.fixture
def store(root: str) -> Store:
    return open_store(root)
