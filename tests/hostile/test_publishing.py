"""What must never reach a Hub: uploads to one on loopback from folders in which somebody put more than a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from fake_hub import FakeHub
from published import convert_source, hub_on_loopback, write_source
from special_files import make_pipe, make_socket

from exl2ray.commands.publish import publish
from exl2ray.errors import Exl2RayError, UsageError
from exl2ray.publish.file_kinds import NEEDED, is_known, looks_secret
from exl2ray.publish.sending import Published

REPO = "me/tiny-exl2"
MARK = b"not for the public: "  # and the name of the file
OUTSIDE = b"outside of the folder"


def send(directory: Path, **settings: Any) -> Published:
    (done,) = publish([str(directory)], REPO, create=True, **settings)
    return done


def arrived(hub: FakeHub) -> dict[str, bytes]:
    return hub.repos[REPO].branches["main"].files if REPO in hub.repos else {}


def everything(hub: FakeHub) -> bytes:
    """All that the Hub holds, in one."""
    return b"\0".join([*hub.objects.values(), *arrived(hub).values()])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = write_source(tmp_path_factory.mktemp("source"))
    return convert_source(source, tmp_path_factory.mktemp("converted"), (4.0,), "never") / "4.0bpw"


@pytest.fixture
def model(converted: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; beside it ``outside.txt``."""
    (tmp_path / "outside.txt").write_bytes(OUTSIDE)
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with hub_on_loopback(monkeypatch, tmp_path) as hub:
        yield hub


# ---- names ----------------------------------------------------------------------------------------------------------

SECRETS = [
    "token.txt", "hf_token", "HF_TOKEN.json", "credentials.json", "id_rsa.txt", "id_ed25519", "prod.env", "env",
    "server.pem", "client.p12", "htpasswd", "kubeconfig", "api_key.json", "my-secrets.md", "authorized_keys",
    "passwords.txt", "service_account.json", "private.key", "_netrc", "oauth.json", "tokenizer_token.json",
    "t\u043eken.json", "\uff54\uff4f\uff4b\uff45\uff4e.json", "to\u200bken.json", "S\u00c9CRET.md", "LICENSE-token.md",
    "known_hosts", "keys.json", "wallet.dat", "cookies.txt", "backup.asc", "\u0455ecret.png",
]  # fmt: skip
FOREIGN = [
    "notes.txt", "job.json", "events.jsonl", "status.json", "adapter_config.json", "model.gguf", "pytorch_model.bin",
    "backup.zip", "core.1234", "thesis.pdf", "photo.jpg", "train.py", "config.json.bak", "CONFIG.JSON", "config.json ",
    "LICENSE.zip", "tokenizer.json~", "optimizer.pt", "new\nline.txt", "esc\x1b[2Jape.txt",
]  # fmt: skip
HIDDEN = [".env", ".netrc", ".bash_history", ".git-credentials", ".DS_Store", ".output.safetensors.0123abcd.tmp"]
FOLDERS = [".git", "logs", "checkpoints", "original"]


def test_no_name_of_a_model_looks_like_a_secret() -> None:
    names = [
        *NEEDED, "tokenization_tokens.py", "tokenizer.model.v3", "LICENSE", "merges.txt", "vocab.json", "NOTICE.md",
        "output-00001-of-00002.safetensors", "measurement.json", "qwen.tiktoken", "modeling_phi.py", "USE_POLICY.md",
        "chat_template_tools.jinja", "THIRD_PARTY_NOTICES.md", "spiece.model", "README_zh-CN.md", "LICENSE-MIT",
    ]  # fmt: skip
    assert [n for n in names if looks_secret(n)] == ["tokenization_tokens.py"]
    assert [n for n in names if not is_known(n, "")] == []


@pytest.fixture(scope="module")
def crowded(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Published, FakeHub]]:
    """One real upload from a folder with everything in it that should not go."""
    root = tmp_path_factory.mktemp("crowded")
    folder = Path(shutil.copytree(converted, root / "model"))
    for name in [*SECRETS, *FOREIGN, *HIDDEN]:
        (folder / name).write_bytes(MARK + name.encode())
    for name in FOLDERS:
        (folder / name).mkdir()
        (folder / name / "config.json").write_bytes(MARK + name.encode())
    with pytest.MonkeyPatch.context() as patch, hub_on_loopback(patch, root) as hub:
        yield send(folder), hub


@pytest.mark.parametrize("name", [*SECRETS, *FOREIGN, *HIDDEN, *FOLDERS])
def test_what_is_not_of_a_model_stays_and_is_named(crowded: tuple[Published, FakeHub], name: str) -> None:
    done, hub = crowded
    assert name in done.left_out
    assert name not in done.files
    assert name not in arrived(hub)
    assert MARK + name.encode() not in everything(hub)
    reason = {"hidden"} if name in HIDDEN else {"hidden", "a folder"} if name in FOLDERS else None
    assert done.reasons[name] in (reason or {"a name as of a secret", "a name that cannot be shown", *done.reasons.values()})
    assert name in FOLDERS or done.sizes[name] == len(MARK + name.encode())
    if name in SECRETS:
        assert done.reasons[name] == "a name as of a secret"


def test_the_model_itself_arrives_from_a_crowded_folder(crowded: tuple[Published, FakeHub], converted: Path) -> None:
    _, hub = crowded
    for name in ("config.json", "tokenizer.json", "output.safetensors"):
        assert arrived(hub)[name] == (converted / name).read_bytes()
    assert set(arrived(hub)) - {".gitattributes"} == {p.name for p in converted.iterdir() if p.name[0] != "."}


@pytest.mark.parametrize("json_lines", [False, True])
def test_a_dry_run_shows_both_lists_with_sizes(model: Path, json_lines: bool) -> None:
    (model / "token.txt").write_bytes(b"x" * 321)
    (model / "notes.txt").symlink_to("../outside.txt")
    run = exl2ray("publish", model, "--repo", REPO, "--dry-run", *(["--json"] if json_lines else []))
    run.ends_with(0)
    if json_lines:
        (entry,) = json.loads(run.out)["published"]
        assert entry["left_out"] == ["notes.txt", "token.txt"]
        assert entry["sizes"]["token.txt"] == 321
        assert entry["sizes"]["config.json"] == (model / "config.json").stat().st_size
        assert set(entry["reasons"]) == {"notes.txt", "token.txt"}
        assert "config.json" in entry["files"]
        return
    sent, _, left = run.out.partition("left out:")
    assert "config.json" in sent
    assert "token.txt" not in sent
    assert "321 B" in next(line for line in left.splitlines() if "token.txt" in line)
    assert "notes.txt" in left


# ---- links and what is not a file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "vocab.json", "merges.txt", "LICENSE", "measurement.json", "NOTICE.md"])
@pytest.mark.parametrize("kind", ["relative", "absolute", "twice", "folder"])
def test_links_out_of_the_folder_are_not_sent(hub: FakeHub, model: Path, name: str, kind: str) -> None:
    target = {"relative": "../outside.txt", "absolute": str(model.parent / "outside.txt"), "twice": "../hop", "folder": ".."}
    (model.parent / "hop").symlink_to("outside.txt")
    (model / name).symlink_to(target[kind])
    if kind == "twice" and name == "vocab.json":  # one that begins inside
        (model / name).unlink()
        (model / name).symlink_to("LICENSE")
        (model / "LICENSE").symlink_to("../outside.txt")
    done = send(model)
    assert name in done.left_out
    assert name not in arrived(hub)
    assert OUTSIDE not in everything(hub)
    assert "output.safetensors" in arrived(hub)


@pytest.mark.parametrize("name", [*sorted(NEEDED), "output.safetensors", "output-00002-of-00002.safetensors"])
def test_a_file_that_the_model_needs_is_not_left_out(hub: FakeHub, model: Path, name: str) -> None:
    (model.parent / "taken").write_bytes((model / name).read_bytes() if (model / name).exists() else b"{}")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../taken")
    with pytest.raises(UsageError, match=r"a link to .*taken, outside of the folder; without it") as e:
        send(model)
    assert name in e.value.message
    assert "a copy in place of the link" in e.value.hint
    assert hub.requests == []


def test_links_inside_of_the_folder_and_of_the_cache_are_followed(hub: FakeHub, model: Path) -> None:
    (model / "vocab.json").write_text('{"a": 1}')
    (model / "encoder.json").symlink_to("vocab.json")
    snapshot = model.parent / "models--you--tiny" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(p for p in model.iterdir() if p.name[0] != "."):
        shutil.copy(path, blobs / f"{i:x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:x}")
    done = send(snapshot)
    assert arrived(hub)["encoder.json"] == b'{"a": 1}'
    assert arrived(hub)["output.safetensors"] == (model / "output.safetensors").read_bytes()
    assert done.left_out == ()


def test_the_cache_of_another_model_is_outside(hub: FakeHub, model: Path) -> None:
    cache = model.parent / "hub"
    (cache / "models--a--a" / "blobs").mkdir(parents=True)
    (cache / "models--a--a" / "blobs" / "ff").write_bytes(OUTSIDE)
    snapshot = cache / "models--b--b" / "snapshots" / "0"
    shutil.copytree(model, snapshot)
    (snapshot / "vocab.json").symlink_to("../../../models--a--a/blobs/ff")
    assert send(snapshot).left_out == ("vocab.json",)
    assert OUTSIDE not in everything(hub)


@pytest.mark.parametrize("name", ["vocab.json", "LICENSE", "tokenizer_config.json", "README.md", "model.safetensors"])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("a pipe", make_pipe),
        ("a socket", make_socket),
        ("a device", lambda p: p.symlink_to("/dev/zero")),
        ("a circle", lambda p: p.symlink_to(p.name)),
        ("nothing", lambda p: p.symlink_to("not-there")),
        ("a folder", lambda p: p.mkdir()),
    ],
)
def test_what_is_no_file(model: Path, name: str, kind: str, make: Callable[[Path], None]) -> None:
    """Looked at without waiting for a writer, and left out; refused where the model needs a file of that name."""
    (model / name).unlink(missing_ok=True)
    make(model / name)
    run = exl2ray("publish", model, "--repo", REPO, "--dry-run")
    if name in ("vocab.json", "LICENSE"):
        run.ends_with(0, "left out", name)
    else:
        run.ends_with(UsageError.exit_code, name, "without it the model would be another one")


def test_a_huge_paper_is_left_out_unread(model: Path) -> None:
    for name in ("LICENSE", "vocab.json"):
        with (model / name).open("wb") as f:
            f.truncate(6 << 30)
    exl2ray("publish", model, "--repo", REPO, "--dry-run").ends_with(0, "LICENSE", "6.44 GB", "larger than 256 MiB")


def test_weights_of_an_unknown_name_are_not_left_out(hub: FakeHub, model: Path) -> None:
    """Loaders read every *.safetensors of a folder; verification did too."""
    (model / "output.safetensors").rename(model / "half.safetensors")
    with pytest.raises(UsageError, match=r"half\.safetensors: not known"):
        send(model)
    assert hub.requests == []
    assert "half.safetensors" in send(model, include=["half.safetensors"]).files


# ---- --include ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["token.txt", ".env", "folder", "link.txt", "t\u043eken", "id_rsa", "pipe"])
def test_include_does_not_open_every_door(hub: FakeHub, model: Path, name: str) -> None:
    path = model / name
    {"folder": path.mkdir, "link.txt": lambda: path.symlink_to("../outside.txt"), "pipe": lambda: os.mkfifo(path)}.get(
        name, lambda: path.write_bytes(OUTSIDE)
    )()
    with pytest.raises(UsageError, match="--include"):
        send(model, include=[name])
    assert hub.requests == []
    done = send(model, include=["*"])  # a pattern takes what may be taken
    assert done.left_out == (name,)
    assert OUTSIDE not in everything(hub)


def test_include_adds_a_file(hub: FakeHub, model: Path) -> None:
    (model / "notes.txt").write_bytes(b"for all to read")
    send(model, include=["notes.txt"])
    assert arrived(hub)["notes.txt"] == b"for all to read"


# ---- contents -------------------------------------------------------------------------------------------------------

LETTERS = "aB3dE5gH1jK2mN4pQ6rS7tU8vW9xY0zAbCdEfGhIj"
HELD = {
    "Hugging Face": "hf_" + LETTERS[:34],
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
    "private key ": "-----BEGIN PRIVATE KEY-----",
    "AWS access key": "AKIA" + LETTERS[:16].upper(),
    "AWS secret key": f'aws_secret_access_key = "{LETTERS[:40]}"',
    "GitHub": "ghp_" + LETTERS[:36],
    "GitHub ": "github_pat_" + LETTERS + LETTERS,
    "GitLab": "glpat-" + LETTERS[:20],
    "Slack": "xoxb-123456789012-" + LETTERS[:24],
    "Google": "AIza" + LETTERS[:35],
    "API key": "sk-proj-" + LETTERS,
}


@pytest.mark.parametrize("what", HELD)
@pytest.mark.parametrize("name", ["config.json", "README.md", "tokenizer_config.json", "LICENSE"])
def test_a_secret_in_a_file_is_found_by_file_and_line(hub: FakeHub, model: Path, what: str, name: str) -> None:
    path, secret = model / name, HELD[what]
    if name.endswith(".json"):
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({"a": 1, "b": secret, **values}, indent=1))
        line = 3
    else:
        text = path.read_text() if path.exists() else "\n"
        path.write_text(f"{text}\n{secret}\n")
        line = text.count("\n") + 2
    with pytest.raises(UsageError, match=rf"line {line}: holds what looks like an? .*{what.strip()}") as e:
        send(model)
    assert name in e.value.message
    assert not any(part in str(e.value) for part in (LETTERS[:12], LETTERS[:12].upper()))
    assert hub.requests == []


def test_examples_and_ordinary_words_are_no_secrets(hub: FakeHub, model: Path) -> None:
    with (model / "README.md").open("a") as f:
        f.write(
            "\nexport HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\nAKIAIOSFODNN7EXAMPLE\nhf_hub_download, hf_transfer\n"
            "scikit-learn: sk-learn-contrib-with-a-very-long-name-of-a-package\nBEGIN PUBLIC KEY\nghp_short\n"
            "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY\n"
        )
    send(model)
    assert b"hf_transfer" in arrived(hub)["README.md"]


# ---- while it runs --------------------------------------------------------------------------------------------------


class Acting(list[Any]):
    """A log of requests that does something at the first one whose path has ``part``."""

    def __init__(self, part: str, action: Callable[[], None]) -> None:
        super().__init__()
        self.part, self.action, self.done = part, action, False

    def append(self, entry: Any) -> None:
        super().append(entry)
        if self.part in entry[1] and not self.done:
            self.done = True
            self.action()


def _replaced(path: Path, target: Path) -> Callable[[], None]:
    def act() -> None:
        path.unlink()
        path.symlink_to(target)

    return act


@pytest.mark.parametrize("part", ["/api/models/", "/preupload/", "/objects/batch", "/commit/"])
@pytest.mark.parametrize("name", ["config.json", "output.safetensors", "tokenizer.json"])
def test_a_file_exchanged_meanwhile_is_not_sent(hub: FakeHub, model: Path, converted: Path, name: str, part: str) -> None:
    """Before the hashes are made the upload stops; afterwards what was verified is what arrives."""
    outside = model.parent / "outside.txt"
    outside.write_bytes(OUTSIDE * 1000)
    log = hub.requests = Acting(part, _replaced(model / name, outside))
    if part == "/api/models/":
        with pytest.raises(UsageError, match=f"{name}: changed while it was being published"):
            send(model)
        assert name not in arrived(hub)
    else:
        send(model)
        assert arrived(hub)[name] == (converted / name).read_bytes()
    assert log.done
    assert OUTSIDE not in everything(hub)


def test_a_shard_that_is_written_to_meanwhile(hub: FakeHub, model: Path) -> None:
    def act() -> None:
        with (model / "output.safetensors").open("r+b") as f:
            f.seek(-20, os.SEEK_END)
            f.write(OUTSIDE[:20])

    hub.requests = Acting("/api/models/", act)
    with pytest.raises(UsageError, match="changed while"):
        send(model)
    assert OUTSIDE[:20] not in everything(hub)


# ---- cards ----------------------------------------------------------------------------------------------------------

BOMB = "".join(f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10) if i else 'lol'}]\n" for i in range(12))


@pytest.mark.parametrize(
    "block",
    [
        BOMB,
        "language: " + "[" * 30_000,
        "tags:\n" + "- x\n" * 8000,
        "license: !!python/object/apply:os.system ['touch pwned']",
        "license: '" + "\\" * 30_000,
        "\u2028: \ud7ff\n? [a]\n: b",
        "a: " + "9" * 30_000,
    ],
    ids=["aliases", "deep", "many", "object", "escapes", "odd", "number"],
)
def test_hostile_front_matter(model: Path, block: str) -> None:
    (model / "README.md").write_text(f"---\n{block}\n---\n# Card\n", encoding="utf-8")
    run = exl2ray("publish", model, "--repo", REPO, "--dry-run", "--base-model", "you/tiny", cwd=model)
    run.ends_with(0, "README.md")
    assert not (model / "pwned").exists()


def test_a_card_of_many_megabytes(model: Path) -> None:
    (model / "README.md").write_text("---\nlicense: mit\n---\n" + "word " * 1_000_000)
    exl2ray("publish", model, "--repo", REPO, "--dry-run").ends_with(UsageError.exit_code, "README.md: larger than 2 MiB")


def test_errors_are_typed(model: Path) -> None:
    with pytest.raises(Exl2RayError, match="a file, not a directory"):
        send(model / "config.json")
