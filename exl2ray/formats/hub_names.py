"""Names on the Hugging Face Hub: repositories, ``owner/name``, and the branches that exl2ray makes in them."""

from __future__ import annotations

import re

from exl2ray.errors import UsageError

_REPOSITORY = re.compile(
    r"(?!.*(?:--|\.\.|\.git$))\w[\w.-]{0,95}(?<![.-])/\w[\w.-]{0,95}(?<![.-])", re.ASCII
)  # as huggingface_hub has it
# Names that git takes, without those that need care in URLs and shells, that git keeps for itself (HEAD, refs/heads/...), and
# that the Hub takes for a commit. A pull request, refs/pr/1, is written to like a branch.
_BRANCH = re.compile(
    r"(?!.*(?:\.\.|//|/\.|\.lock(?:/|$)|\./))(?!HEAD$|[0-9a-f]{40}$|refs/(?!pr/[0-9]+$))[A-Za-z0-9_][\w./+-]{0,99}(?<![./])",
    re.ASCII,
)


def is_repository(name: str) -> bool:
    """Whether a repository can have this name; nothing is asked of the Hub."""
    return _REPOSITORY.fullmatch(name) is not None


def check_repository(flag: str, name: str) -> None:
    """UsageError for a name that no repository has."""
    if not is_repository(name):
        raise UsageError(f"{flag} {name}: not the name of a repository", "it is OWNER/NAME, as in the Hub's addresses")


def check_branch(flag: str, name: str) -> None:
    """UsageError for a name that git or the Hub does not take for a branch."""
    if _BRANCH.fullmatch(name):
        return
    short = name.removeprefix("refs/heads/")
    hint = f"give the branch alone: {short}" if short != name else "letters, digits, '.', '-' and '_' will do: 4.0bpw"
    raise UsageError(f"{flag} {name}: not a name for a branch", hint)
