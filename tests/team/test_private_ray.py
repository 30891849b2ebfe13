"""A Ray of one's own leaves nothing behind in the home directory, and does not write between our lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import os, time
from exl2ray.driver.starting import start_ray

class Mortal:
    def die(self):
        os.kill(os.getpid(), 9)

for answer in (7, 8):  # the second time with the token that Ray remembers
    ray = start_ray(None)
    assert ray.get(ray.remote(lambda: answer).remote()) == answer
    if answer == 8:
        try:
            ray.get(ray.remote(Mortal).remote().die.remote())
        except ray.exceptions.RayActorError:
            time.sleep(3)  # until the raylet would have reported it
    ray.shutdown()
print(len(os.environ["RAY_AUTH_TOKEN"]))
"""


@pytest.mark.slow
def test_a_private_ray_has_a_token_of_its_own(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "64"
    assert "raylet" not in done.stderr
    assert list(tmp_path.iterdir()) == []
