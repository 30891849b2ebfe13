"""What `submit` sends to a job server: never a secret, neither of the environment nor of a file that lies in the checkout."""

from __future__ import annotations

import http.server
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bounded import exl2ray

pytest.importorskip("aiohttp", reason="the job client of Ray needs ray[default]")

ENVIRONMENT = {"HF_TOKEN": "hf_SECRETsecretSECRETsecretSECRET", "HUGGING_FACE_HUB_TOKEN": "hf_SECRET2",
               "AWS_ACCESS_KEY_ID": "AKIASECRET", "AWS_SECRET_ACCESS_KEY": "awsSECRET",
               "AWS_SESSION_TOKEN": "sessionSECRET", "MY_PASSWORD": "passSECRET",
               "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/SECRET.json"}  # fmt: skip
BESIDE = (".env", ".netrc", ".aws/credentials", ".git/config", "token.txt", "id_rsa", "x.pem", "secrets/hf.txt", "run.sh",
          "exl2ray/.env", "exl2ray/id_ed25519", "exl2ray/remote/tls.key")  # fmt: skip


class JobServer(http.server.ThreadingHTTPServer):
    """As much of Ray's as submitting needs; jobs end at once, without output."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.received: list[tuple[str, bytes]] = []  # (request line and headers, body)
        self.more: dict[str, str] = {}  # in the answer to a submission

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def all_text(self) -> str:
        return "\n".join(head + body.decode(errors="replace") for head, body in self.received)

    def jobs(self) -> list[dict[str, object]]:
        return [json.loads(body) for head, body in self.received if head.startswith("POST /api/jobs/")]

    def shipped(self) -> set[str]:
        found = [zipfile.ZipFile(io.BytesIO(body)) for _, body in self.received if body.startswith(b"PK")]
        return {name for z in found for name in z.namelist() if not name.endswith("/")}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: JobServer

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.received.append((f"{self.command} {self.path}\n{self.headers}", body))
        job = {"type": "SUBMISSION", "job_id": None, "submission_id": "exl2ray-1", "status": "SUCCEEDED", "entrypoint": "x",
               "message": "", "driver_exit_code": 0, "start_time": 1, "end_time": 2}  # fmt: skip
        version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "x"}
        logs = {"logs": ""} if self.path.endswith("/logs") else job
        made = {"job_id": "exl2ray-1", "submission_id": "exl2ray-1", **self.server.more}
        answer = version if self.path == "/api/version" else made if self.command == "POST" else logs
        data = json.dumps(answer).encode()
        absent = self.command == "GET" and "/packages/" in self.path
        self.send_response(404 if absent else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[JobServer]:
    with JobServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("exl2ray/__init__.py", "exl2ray/remote/token.py", "exl2ray/evaluate/tokens.py", "pyproject.toml", *BESIDE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("hf_SECRETofAfile" if name in BESIDE else "# source\n")
    return tmp_path


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_no_secret_reaches_a_job(more: list[str], server: JobServer, checkout: Path) -> None:
    convert = ["--", "convert", "-i", "hf://me/model", "-o", "s3://bucket/work", "-b", "4"]
    submit = ["submit", *more, "--address", server.address, "--working-dir", str(checkout), "--no-wait"]
    looked = exl2ray(*submit, *convert, env=ENVIRONMENT, seconds=30)
    looked.ends_with(9, "looking at the cluster failed")  # its job has been sent, and says nothing
    sent = exl2ray(*submit, "--no-check", *convert, env=ENVIRONMENT, seconds=30)
    sent.ends_with(0)
    check, job = server.jobs()
    assert "preflight" in str(check["entrypoint"])
    line = "python -m exl2ray.cli convert -i hf://me/model -o s3://bucket/work -b 4"
    assert job["entrypoint"] == " ".join([line, *more])
    assert set(job["runtime_env"]["env_vars"]) == {"RAY_JOB_STOP_WAIT_TIME_S"}  # type: ignore[index]
    assert "SECRET" not in server.all_text()
    assert "SECRET" not in looked.text + sent.text


def test_of_a_checkout_the_package_is_shipped_and_nothing_beside_it(server: JobServer, checkout: Path) -> None:
    exl2ray("submit", "--address", server.address, "--working-dir", checkout, "--no-wait", "--no-check",
            "--", "convert", "-i", "/s/m", "-o", "/s/w", seconds=30).ends_with(0)  # fmt: skip
    package = {"exl2ray/__init__.py", "exl2ray/remote/token.py", "exl2ray/evaluate/tokens.py"}
    assert server.shipped() == {*package, "pyproject.toml"}


def test_an_answer_with_other_fields_is_a_named_error(server: JobServer) -> None:
    server.more = {"unheard_of": "x"}
    run = exl2ray("submit", "--address", server.address, "--no-wait", "--no-check",
                  "--", "convert", "-i", "/s/m", "-o", "/s/w")  # fmt: skip
    run.ends_with(9, "cannot submit", "unheard_of")
