"""What the Hub refuses an upload, said with a hint, and the token, which no output shows."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, FakeHub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from published import REPO, send

from exl2ray.cli import cli
from exl2ray.commands.publish import publish
from exl2ray.errors import HubError, StoreError, UsageError
from exl2ray.formats.hub_names import is_repository
from exl2ray.remote.address import parse
from exl2ray.remote.hub_data import parse_address
from exl2ray.remote.token import read_token


def test_a_token_that_is_not_valid(hub: FakeHub, models: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO)
    other = tmp_path / "token"
    other.write_text("hf_ThisOneIsNotValid\n")
    with pytest.raises(HubError, match="answers 401") as e:
        send(models / "4.0bpw", token_file=str(other))
    assert f"--token-file {other}" in e.value.hint
    assert "hf_ThisOneIsNotValid" not in str(e.value)
    given = [authorization for _, path, authorization in hub.requests if REPO in path]  # its tools ask for more of their own
    assert given == ["Bearer hf_ThisOneIsNotValid"]


@pytest.mark.parametrize(
    ("path", "status", "hint"),
    [
        ("/commit/", 403, "needs write access"),
        ("/commit/", 412, "changed the repository"),
        ("/commit/", 500, "run the same command again"),
        ("/preupload/", 404, "is --repo right"),
        ("/batch", 413, "storage"),
    ],
)
def test_refusals_have_hints(hub: FakeHub, models: Path, path: str, status: int, hint: str) -> None:
    """Servers that repeat the token in their messages included."""
    hub.add_repo(REPO)
    hub.fail[path] = (status, f"no, said to Bearer {TOKEN}", 99)
    with pytest.raises(HubError, match=f"answers {status}") as e:
        send(models / "4.0bpw")
    assert hint in e.value.hint
    assert TOKEN not in str(e.value)
    assert e.value.__cause__ is None
    assert e.value.__suppress_context__


def test_no_token(hub: FakeHub, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UsageError, match="no access token"):
        send(models / "4.0bpw")
    for content in ("", "two words of text", "hf_abc\ndefghij", "gr\u00fc\u00dfe123", "x" * 5000):
        (tmp_path / "token").write_text(content, encoding="utf-8")
        for dry_run in (True, False):
            with pytest.raises(UsageError, match="this is no access token") as e:
                send(models / "4.0bpw", token_file=str(tmp_path / "token"), dry_run=dry_run)
            assert not content or content not in str(e.value)
    assert hub.requests == []
    (tmp_path / "token").write_text("hf_abcdefgh\n", encoding="utf-8-sig")
    assert read_token(tmp_path / "token").value == "hf_abcdefgh"


def test_offline(hub: FakeHub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as e:
        send(models / "4.0bpw")
    assert "HF_HUB_OFFLINE" in e.value.hint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://me:hunter2@127.0.0.1:9")  # nobody listens there
    with pytest.raises(HubError, match=r"@127\.0\.0\.1:9 cannot be reached") as e:
        send(models / "4.0bpw")
    assert "is there a network" in e.value.hint
    assert "hunter2" not in str(e.value)
    assert hub.requests == []


def test_interrupted(hub: FakeHub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from exl2ray.errors import Interrupted
    from exl2ray.publish.hub import Hub

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hub.add_repo(REPO)
    monkeypatch.setattr(Hub, "commit", stop)
    with pytest.raises(Interrupted) as e:
        send(models / "4.0bpw")
    assert "run the same command again" in e.value.hint


@pytest.mark.parametrize("outcome", ["success", "refused", "unforeseen"])
def test_the_token_is_in_no_output(hub: FakeHub, models: Path, outcome: str) -> None:
    """Of the whole program; where no server repeats it, with all logs of all libraries switched on."""
    hub.add_repo(REPO)
    if outcome == "refused":
        hub.fail["/preupload/"] = (403, f"not with {TOKEN}", 99)
    if outcome == "unforeseen":
        hub.fail["/revision/"] = (200, f"{TOKEN} is no object", 99)
    level, logs = (1, {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug"}) if outcome == "success" else (20, {})
    code = f"import logging; logging.basicConfig(level={level}); from exl2ray.cli import main; main()"
    words = ["publish", str(models / "4.0bpw"), "--repo", REPO, "--debug", "--json"]
    environment = {**os.environ, **logs, "HF_HUB_DISABLE_XET": "1"}
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, timeout=600)
    assert ran.returncode == (0 if outcome == "success" else HubError.exit_code), ran.stderr[-3000:]
    assert TOKEN not in ran.stdout + ran.stderr
    assert "preupload" in ran.stderr or outcome == "unforeseen"  # the logs are really on
    assert any(a == f"Bearer {TOKEN}" for _, _, a in hub.requests)
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(lines) == 1
    if outcome == "success":
        (entry,) = lines[0]["published"]
        assert (entry["repo"], entry["branch"], entry["changed"]) == (REPO, "main", True)
    else:
        assert (lines[0]["event"], lines[0]["code"]) == ("error", HubError.exit_code)


def test_logs_are_masked_and_left_alone_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    from exl2ray.remote.token import Token, redacted_logs

    token, log = Token("hf_secret_in_a_log", "test"), logging.getLogger("somebody.else")
    before = logging.getLogRecordFactory()
    with caplog.at_level(logging.DEBUG), redacted_logs(token):
        log.info("Authorization: Bearer %s", token.value)
        log.info("%d of two", token.value)  # does not fit
        try:
            raise ValueError(f"bad header {token.value}")
        except ValueError:
            log.exception("failed")
    assert token.value not in caplog.text
    assert caplog.text.count("<token>") >= 2
    assert "Bearer <token>" in caplog.text
    assert logging.getLogRecordFactory() is before
    assert token.value not in repr(token)


@pytest.mark.parametrize("repo", ["me/x--y", "me/x..y", "me/x.git", "me/x-", "me./x", "me", "me/x/y", "-me/x"])
def test_names_that_the_hub_refuses_are_refused_before_anything_is_looked_at(repo: str, tmp_path: Path) -> None:
    with pytest.raises(HFValidationError):
        validate_repo_id(repo if repo != "me" else "me/")
    with pytest.raises(UsageError, match="not the name of a repository"):
        publish([str(tmp_path)], repo)
    with pytest.raises(UsageError, match="not of the form hf://"):
        parse(f"hf://{repo}" if repo != "me/x/y" else "hf://me--x/y")
    with pytest.raises(UsageError, match="not the address of a data set"):
        parse_address(f"hf://datasets/{repo}" if repo != "me/x/y" else "hf://datasets/me--x/y")
    assert not is_repository(repo)
    assert is_repository("me/x-y_z.1")


def test_git_s_long_names_of_branches_are_no_revisions() -> None:
    with pytest.raises(UsageError, match="refs/heads/a/b is no revision") as e:
        parse("hf://me/x@refs/heads/a/b")
    assert "give -i hf://me/x@a%2Fb" in e.value.hint
    assert parse("hf://me/x@a%2Fb").revision == "a/b"
    assert parse("hf://me/x@refs/pr/3/sub").revision == "refs/pr/3"


def test_a_work_directory_that_has_nothing_to_send(models: Path, tmp_path: Path) -> None:
    for place, why in ((tmp_path, "has neither measurement"), (tmp_path / "absent", "does not exist")):
        with pytest.raises(StoreError, match=why):
            publish([str(models / "4.0bpw")], REPO, dry_run=True, work=str(place))


def test_flags_without_a_token_value() -> None:
    """There is no flag that takes the token itself: command lines end up in histories and process lists."""
    flags = {name for p in cli.commands["publish"].params for name in p.opts}
    assert {f for f in flags if "token" in f} == {"--token-file"}
