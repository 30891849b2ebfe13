"""Names of the files in a model's folder: which belong to a model, which look like those of secrets.

What is not known stays at home. The list has what loaders open by name, and the papers that come with a model; it was made
from the folders that are published, and is read in no other place.
"""

from __future__ import annotations

import re
import unicodedata

from exl2ray.formats.side_files import TEMPLATES

CARD = "README.md"

# What the model does not work without, or works differently: such a file is sent, or nothing is.
NEEDED = frozenset(
    (
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
        "preprocessor_config.json", "processor_config.json", CARD,
    )
)  # fmt: skip
WEIGHTS = re.compile(r"(?:output|model)(?:-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
# Exact, since loaders are: other tokenizer files, vocabularies, indexes, code and settings of processors.
FUNCTIONAL = re.compile(
    r"(?:output|model)\.safetensors\.index\.json|measurement\.json|configuration\.json|params\.json|tekken\.json"
    r"|vocab\.(?:json|txt|bpe)|merges\.txt|encoder\.json|(?:spiece|spm|bpe|sentencepiece(?:\.bpe)?)\.model"
    r"|tokenizer\.model\.v\d{1,3}(?:m\d)?|[A-Za-z][\w-]{0,40}\.tiktoken|chat_template[\w-]{0,40}\.jinja"
    rf"|{TEMPLATES}/[\w-]{{1,60}}\.jinja"
    r"|(?:video|image|audio)_(?:pre)?processor_config\.json|feature_extractor_config\.json"
    r"|(?:modeling|configuration|tokenization|processing|image_processing|video_processing|feature_extraction"
    r"|generation)_\w{1,60}\.py",
    re.ASCII,
)
PAPERS = re.compile(
    r"(?:README|MODEL_?CARD|CHANGELOG)(?:[_.-][A-Za-z]{2}(?:[_-][A-Za-z]{2,4})?)?\.md"
    r"|(?:(?:THIRD[_ -]?PARTY[_ -]?)?(?:LICEN[CS]E|NOTICE|COPYING|COPYRIGHT)S?"
    r"|(?:ACCEPTABLE_)?USE_POLICY|USAGE_POLICY|TERMS_OF_USE|CITATION|AUTHORS)"
    r"(?:[-_ ][\w-]{1,40})?(?:\.(?:md|txt|rst|html|pdf|cff))?",
    re.ASCII | re.IGNORECASE,
)
PICTURE = re.compile(r".+\.(?:png|jpe?g|gif|webp|svg)", re.IGNORECASE)


def is_known(name: str, card: str) -> bool:
    """Whether a file of this name belongs to a model. ``card``: text of README.md, whose pictures do too."""
    if name in NEEDED or WEIGHTS.fullmatch(name) or FUNCTIONAL.fullmatch(name) or PAPERS.fullmatch(name):
        return True
    return bool(PICTURE.fullmatch(name)) and re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", card) is not None


def is_needed(name: str) -> bool:
    """Whether the model is another one without this file. Every shard is read by loaders, whatever its name."""
    return name in NEEDED or name.endswith(".safetensors")


# ---- secrets ---------------------------------------------------------------------------------------------------------

NO_SECRETS = frozenset(("special_tokens_map.json", "added_tokens.json"))
# What is left of a name without these words is looked at.
HARMLESS = re.compile(
    r"tokeni[sz](?:ers?|ed|ing|ation)|tiktoken|key(?:boards?|words?|frames?|notes?)|(?:mon|tur|don|hot)keys?"
)
SECRET = re.compile(
    r"secret|credential|passw|passphrase|htpasswd|kubeconfig|netrc|pgpass|token|keytab|keystore|key|cookie|oauth|wallet"
    r"|^id_|known_hosts|^_?env$|\.env(?:$|[._-])|^env\.|(?:^|[^a-z])auth(?:$|[^a-z])|service[ _-]?account|^rclone\.conf"
    r"|\.(?:pem|p12|pfx|p8|jks|kdbx?|ppk|asc|gpg|pgp|crt|cer|der|ovpn|rdp|jwk|jwt|age|htaccess|tfstate|tfvars)(?:$|\.)"
)
# Letters of other alphabets that look like Latin ones, after case folding.
LOOKALIKES = str.maketrans(
    "\u0430\u0441\u0501\u0435\u0456\u0458\u043a\u043c\u043d\u043e\u0440\u0442\u0443\u0445\u0455\u04bb\u051b\u051d"
    "\u03b1\u03b5\u03b9\u03ba\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7\u0131\u0261\u217c\u217e\u0578\u057d\u0585\u2010\u2013\u2024",
    "acdeijkmhopt" "yxshqw" "aeikvoptuxigldnuo--.",
)  # fmt: skip


def folded(name: str) -> str:
    """``name`` in small Latin letters, as far as it looks like them: no case, accents, widths or invisible characters."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", name).casefold())
    visible = (c for c in plain if not unicodedata.combining(c) and unicodedata.category(c) not in ("Cf", "Cc"))
    return "".join(visible).translate(LOOKALIKES)


def looks_secret(name: str) -> bool:
    """Whether a name is one that people give to passwords, keys and tokens. A few good files share that fate."""
    if name in NO_SECRETS:
        return False
    return bool(SECRET.search(HARMLESS.sub("", folded(name))))
