"""Uploads to a Hub on loopback: what arrives, what is refused, and that the token is seen by nobody else."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from fake_hub import TOKEN, FakeHub
from published import REPO, send

from exl2ray.cli import cli
from exl2ray.errors import FormatError, HubError, UsageError
from exl2ray.formats.side_files import TEMPLATES
from exl2ray.wording import file_size


def fields(card: bytes) -> dict[str, Any]:
    return dict(yaml.safe_load(card.decode().split("---\n")[1]))


def local(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if not p.name.startswith(".")}


# ---- what arrives ---------------------------------------------------------------------------------------------------


def test_a_directory_arrives_on_main(hub: FakeHub, models: Path) -> None:
    (done,) = send(models / "4.0bpw", create=True, private=True)
    repo = hub.repos[REPO]
    arrived, sent = repo.branches["main"].files, local(models / "4.0bpw")
    assert repo.private
    assert {n: c for n, c in arrived.items() if n not in (".gitattributes", "README.md")} == {
        n: c for n, c in sent.items() if n != "README.md"
    }
    assert fields(arrived["README.md"]) == {**fields(sent["README.md"]), "quantized_by": "me"}
    assert (done.branch, done.changed, set(done.files)) == ("main", True, set(sent))
    assert done.url == f"{hub.url}/{REPO}/commit/{repo.branches['main'].sha}"
    assert repo.branches["main"].messages == [f"EXL2 at 4.0 bits per weight (exl2ray {version()})"]


def version() -> str:
    from exl2ray import __version__

    return __version__


def test_only_the_hub_itself_gets_the_token(hub: FakeHub, models: Path) -> None:
    hub.add_repo(REPO)
    send(models / "4.0bpw")
    given = {authorization for _, path, authorization in hub.requests if REPO in path}  # its tools ask for more of their own
    assert given == {f"Bearer {TOKEN}"}
    stored = [authorization for _, path, authorization in hub.requests if path.startswith("/storage/")]
    assert stored == [""]


def test_several_directories_get_a_branch_each_and_a_list_on_main(hub: FakeHub, models: Path) -> None:
    hub.add_repo(REPO)
    evaluation = models / "eval.json"
    evaluation.write_text(json.dumps({"results": [result(str(models / "5.0bpw"))]}))
    send(models / "4.0bpw", models / "5.0bpw", base_model="source/tiny", evaluations=[str(evaluation)])
    branches = hub.repos[REPO].branches
    assert set(branches) == {"main", "4.0bpw", "5.0bpw"}
    for name in ("4.0bpw", "5.0bpw"):
        assert branches[name].files["output.safetensors"] == (models / name / "output.safetensors").read_bytes()
        card = fields(branches[name].files["README.md"])
        assert (card["base_model"], card["base_model_relation"]) == ("source/tiny", "quantized")
    assert b"| 0.0123 " in branches["5.0bpw"].files["README.md"]
    assert b"0.0123" not in branches["4.0bpw"].files["README.md"]
    main = branches["main"].files
    assert set(main) == {".gitattributes", "README.md"}
    index = fields(main["README.md"])
    assert (index["base_model"], index["license"], index["language"]) == ("source/tiny", "other", ["no", "en"])
    rows = [line for line in main["README.md"].decode().splitlines() if line.startswith("| [")]
    assert [r.split("]")[0] for r in rows] == ["| [4.0bpw", "| [5.0bpw"]
    assert rows[0].endswith("| - | - | - | - |")
    assert "| 0.0123 | - | 5.0% |" in rows[1]


def test_the_evaluation_of_a_ladder(hub: FakeHub, converted: Path) -> None:
    hub.add_repo(REPO)
    send(converted / "4.0bpw", converted / "5.0bpw", evaluations=[str(converted / "work" / "evaluation.json")])
    card = hub.repos[REPO].branches["main"].files["README.md"].decode()
    assert [line.count("| - ") for line in card.splitlines() if line.startswith("| [")] == [0, 0]
    sent = hub.repos[REPO].branches["4.0bpw"].files["README.md"].decode()
    written = (converted / "4.0bpw" / "README.md").read_text(encoding="utf-8")
    assert sent.partition("---\n#")[2] == written.partition("---\n#")[2]  # the figures were there already


def test_measurement_evaluation_and_plot_go_along(hub: FakeHub, converted: Path) -> None:
    """measurement.json to main, each result to its branch, all of them and the plot to main; nothing says where they lay."""
    hub.add_repo(REPO)
    (one, two) = send(converted / "4.0bpw", converted / "5.0bpw", work=str(converted / "work"), base_model="source/tiny")
    branches = hub.repos[REPO].branches
    main = branches["main"].files
    assert set(main) == {".gitattributes", "README.md", "measurement.json", "evaluation.json", "ladder.png"}
    assert json.loads(main["measurement.json"]) == json.loads((converted / "work" / "measurement.json").read_bytes())
    assert main["ladder.png"].startswith(b"\x89PNG")
    assert b"![Size against quality](ladder.png)" in main["README.md"]
    schema = json.loads(resources.files("exl2ray.evaluate").joinpath("results.schema.json").read_text())
    both = ["4.0bpw", "5.0bpw"]
    for done, name, models in ((one, "4.0bpw", both[:1]), (two, "5.0bpw", both[1:]), (None, "main", both)):
        found = json.loads(branches[name].files["evaluation.json"])
        jsonschema.validate(found, schema)
        assert [(r["model"], r["reference"]) for r in found["results"]] == [(m, "source/tiny") for m in models]
        if done is not None:
            assert {"evaluation.json", "ladder.png"} <= set(done.files)
            assert "measurement.json" not in done.files
    for branch in branches.values():
        for name, content in branch.files.items():
            assert str(converted).encode() not in content, name


def test_a_dry_run_says_what_goes_to_main(converted: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    send(models / "4.0bpw", models / "5.0bpw", work=str(converted / "work"), dry_run=True)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "branch main" in line]
    assert all(f", {name} (" in told for name in ("evaluation.json", "ladder.png", "measurement.json"))
    send(models / "4.0bpw", work=str(converted / "work"), dry_run=True)
    assert "branch main" not in capsys.readouterr().err


def test_extras_stay_if_that_is_wanted(converted: Path, models: Path) -> None:
    work = str(converted / "work")
    (alone,) = send(models / "4.0bpw", work=work, dry_run=True)
    assert set(alone.files) - {p.name for p in (models / "4.0bpw").iterdir()} == {
        "measurement.json", "evaluation.json", "ladder.png",
    }  # fmt: skip
    assert alone.sizes["measurement.json"] > 1000
    (without,) = send(models / "4.0bpw", work=work, dry_run=True, extras=False)
    assert set(without.files) == {p.name for p in (models / "4.0bpw").iterdir() if p.name[0] != "."}
    (models / "4.0bpw" / "measurement.json").write_text('{"mine": 1}')
    (own,) = send(models / "4.0bpw", work=work, dry_run=True)
    assert own.sizes["measurement.json"] == 11  # what lies in the folder is what is sent


def test_the_card_says_how_to_load_what_was_published(hub: FakeHub, models: Path) -> None:
    hub.add_repo(REPO)
    send(models / "4.0bpw", models / "5.0bpw")
    for name in ("4.0bpw", "5.0bpw"):
        card = hub.repos[REPO].branches[name].files["README.md"].decode()
        assert f'from_pretrained("{REPO}", revision="{name}")' in card
        assert f"hf download {REPO} --revision {name} --local-dir DIRECTORY" in card
    assert f'from_pretrained("{REPO}", revision="4.0bpw")' in hub.repos[REPO].branches["main"].files["README.md"].decode()


def test_branches_of_one_bitrate_are_told_apart_by_their_heads(models: Path) -> None:
    config = models / "5.0bpw" / "config.json"
    changed = json.loads(config.read_text())
    head = json.loads((models / "4.0bpw" / "config.json").read_text())["quantization_config"]["head_bits"]
    changed["quantization_config"] |= {"bits": 4.0, "head_bits": 8}
    config.write_text(json.dumps(changed))
    found = send(models / "4.0bpw", models / "5.0bpw", dry_run=True)
    assert [p.branch for p in found] == [f"4.0bpw-h{head}", "4.0bpw-h8"]
    (alone,) = send(models / "5.0bpw", branch="{bpw}bpw-h{head}", dry_run=True)
    assert alone.branch == "4.0bpw-h8"


def test_the_list_on_main_grows_and_foreign_cards_stay(hub: FakeHub, models: Path) -> None:
    hub.add_repo(REPO)
    send(models / "5.0bpw", branch="{bpw}bpw")
    first = hub.repos[REPO].branches["main"].files["README.md"].decode()
    hub.repos[REPO].branches["main"].files["README.md"] = first.replace("# tiny-exl2", "# My tiny one").encode()
    send(models / "4.0bpw", branch="{bpw}bpw")
    card = hub.repos[REPO].branches["main"].files["README.md"].decode()
    assert card.index("[4.0bpw]") < card.index("[5.0bpw]")
    assert "# My tiny one" in card
    hub.add_repo("me/other", **{"README.md": b"# By hand\n"})
    send(models / "4.0bpw", repo="me/other", branch="four")
    assert hub.repos["me/other"].branches["main"].files["README.md"] == b"# By hand\n"
    assert b"# By hand" not in hub.repos["me/other"].branches["four"].files["README.md"]


def test_a_card_on_main_that_cannot_be_read_is_not_replaced(hub: FakeHub, models: Path) -> None:
    hub.add_repo(REPO, **{"README.md": b"# By hand\n"})
    hub.fail["/resolve/"] = (403, "later", 99)
    with pytest.raises(HubError, match=r"reading README\.md of branch main"):
        send(models / "4.0bpw", branch="four")
    assert hub.repos[REPO].branches["main"].files["README.md"] == b"# By hand\n"


def test_a_second_time_nothing_changes(hub: FakeHub, models: Path) -> None:
    hub.add_repo(REPO)
    send(models / "4.0bpw", models / "5.0bpw")
    received = list(hub.received)
    again = send(models / "4.0bpw", models / "5.0bpw")
    assert [p.changed for p in again] == [False, False]
    assert hub.received == received
    assert [len(b.messages) for b in hub.repos[REPO].branches.values()] == [1, 1, 1]


def test_shards_of_an_earlier_upload_are_removed(hub: FakeHub, models: Path) -> None:
    stale = {"output-00001-of-00002.safetensors": b"a", "output-00002-of-00002.safetensors": b"b", "notes.txt": b"c"}
    hub.add_repo(REPO, **stale)
    send(models / "4.0bpw")
    arrived = hub.repos[REPO].branches["main"].files
    assert [n for n in arrived if n.endswith(".safetensors")] == ["output.safetensors"]
    assert arrived["notes.txt"] == b"c"


def test_resumes_after_a_broken_connection(hub: FakeHub, models: Path) -> None:
    """The shard has arrived, the commit has not: the second time only the commit is sent."""
    hub.add_repo(REPO)
    hub.fail["/commit/"] = (0, "", 1)
    with pytest.raises(HubError, match="broke off") as e:
        send(models / "4.0bpw")
    assert "what has arrived is not sent again" in e.value.hint
    assert "output.safetensors" not in hub.repos[REPO].branches["main"].files
    assert len(hub.received) == 1
    send(models / "4.0bpw")
    assert "output.safetensors" in hub.repos[REPO].branches["main"].files
    assert len(hub.received) == 1


def result(model: str) -> dict[str, Any]:
    figure = {"perplexity": 7.5, "reference_perplexity": 7.0, "kl": 0.0123, "top1_agreement": 0.95}
    figures = {name: {"value": value, "standard_error": value / 100} for name, value in figure.items()}
    return {"model": model, "rows": 4, "length": 128, "predictions": 508, **figures}


def test_a_directory_without_a_card_gets_one(hub: FakeHub, models: Path) -> None:
    """As other converters leave it."""
    hub.add_repo(REPO)
    (models / "4.0bpw" / "README.md").unlink()
    send(models / "4.0bpw")
    card = hub.repos[REPO].branches["main"].files["README.md"].decode()
    assert fields(card.encode())["quantized_by"] == "me"
    assert "| own data (text.parquet), 6 rows x 128 tokens |" in card
    assert "converted with exl2ray" not in card
    assert not (models / "4.0bpw" / "README.md").exists()


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_nothing_is_sent_when_one_directory_is_unsound(hub: FakeHub, models: Path) -> None:
    hub.add_repo(REPO)
    (models / "5.0bpw" / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"1 rule .* broken:\n.*tokenizer\.json"):
        send(models / "4.0bpw", models / "5.0bpw")
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    ["model.gguf", "pytorch_model.bin", "job.json", "events.jsonl", "id_rsa", "key.pem", "logs/", "wallet.dat", "a\nb.txt"],
)
def test_foreign_files_are_left_out_and_named(models: Path, name: str) -> None:
    path = models / "4.0bpw" / name.rstrip("/")
    if name.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(b"x")
    (done,) = send(models / "4.0bpw", dry_run=True)
    assert done.left_out == (path.name,)
    assert done.reasons[path.name]
    assert path.name not in done.files


def test_chat_templates_in_their_folder_are_sent(hub: FakeHub, models: Path, tmp_path: Path) -> None:
    folder = models / "4.0bpw" / TEMPLATES
    folder.mkdir()
    for name in ("tool_use.jinja", "notes.txt", ".env"):
        (folder / name).write_bytes(name.encode())
    (done,) = send(models / "4.0bpw", create=True)
    assert f"{TEMPLATES}/tool_use.jinja" in done.files
    assert set(done.left_out) == {f"{TEMPLATES}/notes.txt", f"{TEMPLATES}/.env"}
    assert hub.repos[REPO].branches["main"].files[f"{TEMPLATES}/tool_use.jinja"] == b"tool_use.jinja"
    shutil.rmtree(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "tool_use.jinja").write_bytes(b"of somebody")
    folder.symlink_to(tmp_path / "elsewhere")
    (done,) = send(models / "4.0bpw", dry_run=True)
    assert done.left_out == (TEMPLATES,)


def test_included_and_hidden_files(models: Path) -> None:
    for name in ("notes.weird", ".env", "LICENSE", "tokenizer.model", "picture.png", "other.png"):
        (models / "4.0bpw" / name).write_bytes(b"x")
    with (models / "4.0bpw" / "README.md").open("a") as card:
        card.write("\n![what it does](picture.png)\n")
    (done,) = send(models / "4.0bpw", dry_run=True, include=["*.weird"])
    assert {"notes.weird", "LICENSE", "tokenizer.model", "picture.png"} < set(done.files)
    assert done.left_out == (".env", "other.png")
    assert done.sizes["notes.weird"] == 1
    assert done.url == ""
    with pytest.raises(UsageError, match=r"--include \*\.strange: there is no such file"):
        send(models / "4.0bpw", dry_run=True, include=["*.strange"])


def test_a_file_with_the_token_in_it(hub: FakeHub, models: Path, tmp_path: Path) -> None:
    hub.add_repo(REPO)
    (models / "4.0bpw" / "special_tokens_map.json").write_text('{"a":\n "my.own.hub/token"}')
    (tmp_path / "token").write_text("my.own.hub/token")
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=r"special_tokens_map\.json: holds the access token") as e:
            send(models / "4.0bpw", token_file=str(tmp_path / "token"), dry_run=dry_run)
        assert "my.own.hub/token" not in str(e.value)
    (models / "4.0bpw" / "special_tokens_map.json").write_text(f'{{"a":\n "{TOKEN}"}}')
    with pytest.raises(UsageError, match=r"special_tokens_map\.json, line 2: .* a Hugging Face access token") as e:
        send(models / "4.0bpw")
    assert TOKEN not in str(e.value)
    assert hub.requests == []


def test_repositories_that_do_not_fit(hub: FakeHub, models: Path) -> None:
    with pytest.raises(HubError, match="no such repository") as e:
        send(models / "4.0bpw")
    assert "--create" in e.value.hint
    hub.add_repo(REPO)
    with pytest.raises(UsageError, match="exists and is public"):
        send(models / "4.0bpw", create=True, private=True)
    hub.add_repo("me/full", **{"model-00001-of-00009.safetensors": b"w"})
    for branch in (None, "4.0bpw"):
        with pytest.raises(UsageError, match="weights of another model: model-00001"):
            send(models / "4.0bpw", repo="me/full", branch=branch)
    assert set(hub.repos["me/full"].branches) == {"main"}
    with pytest.raises(UsageError, match="not the name of a repository"):
        send(models / "4.0bpw", repo="just-a-name")


@pytest.mark.parametrize(
    "branch",
    ["a..b", "-x", "a b", "x.lock", "/x", "x/", "", "refs/heads/*", "a~1", "HEAD", "a" * 40, "refs/tags/v1", "refs/pr/x"],
)
def test_names_that_git_refuses(models: Path, branch: str) -> None:
    with pytest.raises(UsageError, match="not a name for a branch"):
        send(models / "4.0bpw", branch=branch, dry_run=True)


def test_git_s_long_name_of_a_branch(models: Path) -> None:
    """The Hub has branches by their short names, and would refuse it when all is hashed."""
    with pytest.raises(UsageError, match="refs/heads/main: not a name for a branch") as e:
        send(models / "4.0bpw", branch="refs/heads/main", dry_run=True)
    assert "give the branch alone: main" in e.value.hint
    assert send(models / "4.0bpw", branch="refs/pr/1", dry_run=True)[0].branch == "refs/pr/1"


def test_two_directories_on_one_branch(models: Path) -> None:
    with pytest.raises(UsageError, match="same branch"):
        send(models / "4.0bpw", models / "5.0bpw", branch="x", dry_run=True)
    shutil.copytree(models / "4.0bpw", models / "again")  # the same bitrate, and the same head
    with pytest.raises(UsageError, match="same branch"):
        send(models / "4.0bpw", models / "again", dry_run=True)


def test_an_evaluation_of_something_else(models: Path) -> None:
    path = models / "eval.json"
    path.write_text(json.dumps({"results": [result("elsewhere/3.0bpw")]}))
    with pytest.raises(UsageError, match=r"is about elsewhere/3\.0bpw"):
        send(models / "4.0bpw", evaluations=[str(path)], dry_run=True)
    path.write_text('{"results": [{"model": "x", "perplexity": {"value": null}}]}')
    with pytest.raises(FormatError, match="'perplexity' has no finite 'value'"):
        send(models / "4.0bpw", evaluations=[str(path)], dry_run=True)


def test_a_card_that_the_hub_refuses(hub: FakeHub, models: Path) -> None:
    hub.add_repo(REPO)
    card = models / "4.0bpw" / "README.md"
    card.write_text(card.read_text().replace("license: other", "license: forbidden"))
    with pytest.raises(FormatError, match="does not take the card"):
        send(models / "4.0bpw")
    assert hub.received == []  # before anything large was sent


# ---- the program ----------------------------------------------------------------------------------------------------


def test_dry_run_as_text(models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    words = ["publish", str(models / "4.0bpw"), str(models / "5.0bpw"), "--repo", REPO, "--dry-run"]
    with pytest.raises(SystemExit) as e:
        cli.main(words)
    assert e.value.code == 0
    out, err = capsys.readouterr()
    assert f"{REPO}, branch main: README.md with the list of branches would go there" in err
    lines = out.splitlines()
    for branch in ("4.0bpw", "5.0bpw"):
        assert any(line.endswith(f"would go to {REPO}, branch {branch}:") for line in lines)
    weights = file_size((models / "4.0bpw" / "output.safetensors").stat().st_size)
    listed = [line.split() for line in lines if line.startswith("  ")]
    assert ["output.safetensors", *weights.split()] in listed
    assert {"README.md", "config.json", "tokenizer.json"} < {w for w, *_ in listed}
