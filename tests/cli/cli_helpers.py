"""Jobs as work directories store them."""

from __future__ import annotations

from typing import Any

from exl2ray.recipe import Recipe


def stored_job(recipe: Recipe, **identity: Any) -> dict[str, dict[str, Any]]:
    """The job of a recipe as a conversion stores it, with the fingerprint of a model that nobody reads."""
    facts = {"fingerprint": "f" * 64, "architecture": "LlamaForCausalLM", "in_dir": recipe.in_dir, **identity}
    job = recipe.job(facts, "c" * 64 if recipe.cal_dataset else None)
    job["measure"]["measurement"] = recipe.measurement
    return job
