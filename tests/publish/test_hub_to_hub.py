"""``convert --publish``: from a repository on a Hub to another one, stopped on the way, and with nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from bounded import Run, exl2ray
from fake_hub import TOKEN, FakeHub, Handler
from fake_hub import serving as taking
from model_hub import ModelHub
from model_hub import serving as giving
from published import write_source
from tiny_models import write_text

from exl2ray.commands.hub_to_hub import Wishes, convert
from exl2ray.errors import UsageError
from exl2ray.events import Silent
from exl2ray.recipe import Recipe

REPO, SOURCE = "me/tiny-exl2", "source/tiny"
QUICK = ("-mr", "2", "-r", "3", "-l", "128", "-ml", "128", "--device", "cpu", "--executor", "inline", "--quality",
         "reference")  # fmt: skip
KEPT = {"job.json", "events.jsonl", "published.json", "driver.lock"}  # with --clean


@pytest.fixture
def hubs(tmp_path: Path) -> Iterator[tuple[ModelHub, FakeHub]]:
    """One Hub, as a client sees it: (where the source is, where models are sent to)."""
    pytest.importorskip("huggingface_hub", reason="the extra [hub] is not installed")
    source = ModelHub()
    source.add(SOURCE, write_source(tmp_path / "models"))

    class Both(Handler):
        def _handle(self) -> None:
            if SOURCE not in self.path:
                return super()._handle()
            connection = HTTPConnection(source.url.removeprefix("http://"), timeout=30)
            connection.request(self.command, self.path, headers=dict(self.headers))
            answer = connection.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("server", "date"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            connection.close()

    with giving(source), taking(FakeHub(), Both) as target:
        yield source, target


@pytest.fixture
def job(hubs: tuple[ModelHub, FakeHub], tmp_path: Path) -> Callable[..., Run]:
    """Runs the conversion of the source in an empty folder."""
    env = {"HF_ENDPOINT": hubs[1].url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
           "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip
    np.save(tmp_path / "eval.npy", np.random.default_rng(0).integers(3, 259, (3, 64)))
    text = write_text(tmp_path / "text.parquet")
    (tmp_path / "here").mkdir()

    def run(*words: str, publish: str = REPO, **more: str) -> Run:
        given = ("-i", f"hf://{SOURCE}", "-b", "4", "-b", "5", "-c", text, "--eval-text", tmp_path / "eval.npy", *QUICK)
        place, environment = tmp_path / "here", {**env, **more}
        done = exl2ray("convert", *given, "--publish", publish, *words, seconds=60, cwd=place, env=environment)
        assert TOKEN not in done.out + done.err
        return done

    return run


def weights(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*.safetensors"))


def test_from_hub_to_hub_with_a_stop_on_the_way(
    hubs: tuple[ModelHub, FakeHub], job: Callable[..., Run], tmp_path: Path
) -> None:
    source, target = hubs
    here = tmp_path / "here" / "tiny-exl2"
    target.fail["/commit/5.0bpw"] = (0, "", 1)
    job("--clean", "--json").ends_with(10)
    assert set(target.repos[REPO].branches) == {"main", "4.0bpw", "5.0bpw"}
    assert "output.safetensors" not in target.repos[REPO].branches["5.0bpw"].files
    assert (here / "5.0bpw" / "output.safetensors").is_file()  # nothing goes before all has arrived
    sent = list(target.received)

    done = job("--clean", "--json")
    done.ends_with(0)
    events = [json.loads(line) for line in done.out.splitlines()]
    assert not any(e["event"] == "item" for e in events)  # nothing is computed again
    assert [e["event"] for e in events].count("done") == 1
    branches = target.repos[REPO].branches
    assert target.received[: len(sent)] == sent
    for name in ("4.0bpw", "5.0bpw"):
        assert "output.safetensors" in branches[name].files
        card = branches[name].files["README.md"].decode()
        assert f"base_model: {SOURCE}" in card
        assert f'from_pretrained("{REPO}", revision="{name}")' in card
    assert {"measurement.json", "evaluation.json", "ladder.png"} < set(branches["main"].files)
    assert weights(tmp_path / "here") == []
    assert sorted(p.name for p in here.iterdir()) == ["work"]
    assert {p.name for p in (here / "work").rglob("*") if p.is_file()} <= KEPT

    asked, count = len(source.asked), len(target.requests)
    again = job("--clean")
    again.ends_with(0, "published already", f"{REPO}/commit/")
    assert (len(source.asked), len(target.requests)) == (asked, count)  # it need not even look


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ({"publish": "no-owner"}, 2, "not the name of a repository"),
        ({"HF_TOKEN": ""}, 2, "no access token"),
        ({"HF_TOKEN": "hf_ThisOneIsNotValid"}, 10, "answers 401"),
    ],
)
def test_what_would_stop_the_upload_stops_the_job_before_it_computes(
    job: Callable[..., Run], tmp_path: Path, words: dict[str, str], status: int, says: str
) -> None:
    job(**words).ends_with(status, says)
    assert not list((tmp_path / "here").rglob("job.json"))


def test_a_public_repository_is_not_taken_for_a_private_one(hubs: tuple[ModelHub, FakeHub], job: Callable[..., Run]) -> None:
    hubs[1].add_repo(REPO)
    job("--private").ends_with(2, "exists and is public")


def test_a_model_that_was_patched_since_is_published_again(
    hubs: tuple[ModelHub, FakeHub], job: Callable[..., Run], tmp_path: Path
) -> None:
    _, target = hubs
    job().ends_with(0)
    before = target.repos[REPO].branches["4.0bpw"].files["output.safetensors"]
    work = next(tmp_path.rglob("job.json")).parent
    job().ends_with(0, "published already")
    place = {"HF_ENDPOINT": target.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    chosen = ("--set", "*.0.*.o_proj=8", "-b", "4", "--device", "cpu")
    exl2ray("patch", "-o", work, *chosen, cwd=tmp_path / "here", env=place, seconds=60).ends_with(0)
    again = job()
    again.ends_with(0, "was patched and stays so")
    assert "published already" not in again.out
    assert target.repos[REPO].branches["4.0bpw"].files["output.safetensors"] != before
    job().ends_with(0, "published already")


def test_flags_that_need_a_repository(tmp_path: Path) -> None:
    for flag in ("--clean", "--private"):
        exl2ray("convert", "-i", "m", "-o", "w", flag, cwd=tmp_path).ends_with(2, "are for --publish")
    exl2ray("convert", "-i", "m", cwd=tmp_path).ends_with(2, "-o")


def test_a_name_that_no_repository_has_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    for more in ((), ("--dry-run",)):
        given = ("convert", "-i", "m", "-b", "4", "-o", "w", "-cf", "out", "--publish", "tiny", *more)
        exl2ray(*given, cwd=tmp_path).ends_with(2, "--publish tiny: not the name of a repository")
    with pytest.raises(UsageError, match="not the name of a repository"):
        convert(Recipe(in_dir="m", out_dir=str(tmp_path / "w"), bits=(4.0,)), Wishes("tiny"), Silent())
    assert not (tmp_path / "w").exists()


def test_files_of_others_stay(tmp_path: Path) -> None:
    """What --clean did not publish it does not delete, and says so."""
    from exl2ray.commands.hub_to_hub import _clean
    from exl2ray.store.open import open_store

    out, work = tmp_path / "out", tmp_path / "work"
    for folder, names in ((out, ("output.safetensors", "notes.txt")), (work, ("job.json", "report.html", "thesis.pdf"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("x")
    told: list[str] = []
    reporter = type("Told", (), {"event": lambda self, name, **f: told.append(f["message"]), "close": lambda self: None})()
    _clean(open_store(str(work)), [{"directory": str(out), "files": ["output.safetensors", "README.md"]}], reporter)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]
    assert sorted(p.name for p in work.iterdir()) == ["job.json", "thesis.pdf"]
    assert "notes.txt" in told[0]
