"""Secrets in the text of a file, told by the form that their makers gave them so that they can be told.

Forms that occur in ordinary text (passwords, bare hexadecimal keys) are not looked for: every hit stops an upload.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# (what it is, a part that every one has, its form)
FORMS = tuple(
    (what, part, re.compile(form))
    for what, part, form in (
        ("a private key", b"PRIVATE KEY", rb"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----"),
        ("a Hugging Face access token", b"hf_", rb"(?<![A-Za-z0-9_])hf_(?=[A-Za-z]*[0-9a-wyzA-WYZ])[A-Za-z0-9]{20,}"),
        ("a Hugging Face access token", b"api_org_", rb"(?<![A-Za-z0-9_])api_org_[A-Za-z0-9]{20,}"),
        ("an AWS access key", b"AKIA", rb"(?<![A-Z0-9])AKIA[A-Z0-9]{16}(?![A-Z0-9])(?<!EXAMPLE)"),
        ("an AWS access key", b"ASIA", rb"(?<![A-Z0-9])ASIA[A-Z0-9]{16}(?![A-Z0-9])(?<!EXAMPLE)"),
        (
            "an AWS secret key", b"ecret",
            rb"(?i:aws_?secret_?(?:access_?)?key)[\\\"']{0,2}\s{0,4}[=:]\s{0,4}[\\\"']{0,2}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])(?<!EXAMPLEKEY)",
        ),
        ("a GitHub token", b"gh", rb"(?<![A-Za-z0-9_])gh[pousr]_[A-Za-z0-9]{36,}"),
        ("a GitHub token", b"github_pat_", rb"(?<![A-Za-z0-9_])github_pat_[A-Za-z0-9_]{40,}"),
        ("a GitLab token", b"glpat-", rb"(?<![A-Za-z0-9_-])glpat-[A-Za-z0-9_-]{20,}"),
        ("a Slack token", b"xox", rb"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{20,}"),
        ("a Google API key", b"AIza", rb"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
        ("an API key", b"sk-", rb"(?<![A-Za-z0-9_-])sk-(?:proj-|ant-[a-z0-9]+-)?(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{32,}"),
        ("a PyPI token", b"pypi-AgE", rb"pypi-AgE[A-Za-z0-9_-]{40,}"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    what: str
    line: int  # from 1


def find_secret(content: bytes) -> Found | None:
    """The first of these forms in a file; None if there is none."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16
        content = content.decode("utf-16", errors="replace").encode()
    for what, part, form in FORMS:
        hit = form.search(content) if part in content else None
        if hit is not None:
            return Found(what, content.count(b"\n", 0, hit.start()) + 1)
    return None
