"""Files by which the output's tokenizer gives the ids that its calibration text had.

ExLlamaV2 reads ``tokenizer.json`` and ``added_tokens.json``. Tokens that the source names elsewhere, and vocabularies that
were converted, must therefore be written there.
"""

from __future__ import annotations

import json
from pathlib import Path

from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.calibration.tokenizer_files import optional_json


def tokenizer_output(source: str | Path, tokenizer: ModelTokenizer) -> dict[str, bytes]:
    """Names and contents of files that belong into the output in place of the source's; empty for most models.

    ``tokenizer`` may be closed. Raises SourceError for an added_tokens.json that cannot be read.
    """
    out = {}
    if tokenizer.converted is not None:
        out["tokenizer.json"] = tokenizer.converted
    listed = optional_json(Path(source) / "added_tokens.json")
    # What the file states against the tokenizer's own ids would be wrong for who believes it.
    kept = {token: i for token, i in listed.items() if token not in tokenizer.rejected}
    wanted = {**kept, **tokenizer.added}
    if wanted != listed:
        out["added_tokens.json"] = json.dumps(wanted, ensure_ascii=False, indent=2).encode()
    return out
