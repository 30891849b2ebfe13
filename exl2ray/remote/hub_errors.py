"""What huggingface_hub raises, told apart in one place and without the token; who asked says it in words of its own.

Models (`hub`), calibration data (`hub_data`) and uploads (`exl2ray.publish.hub`) fail in the same ways, which the library
tells by class, by status, by a header, or by an error of one of three HTTP libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from exl2ray.errors import Exl2RayError
from exl2ray.remote.address import redacted
from exl2ray.remote.retry import Passing
from exl2ray.remote.token import Token, redacted_logs

Kind = Literal[
    "offline", "gated", "revision", "address", "busy", "file", "missing", "refused", "answer", "network", "other"
]
SAYS = 300  # characters of a server's message that are passed on
PASSING = (408, 429, 500, 502, 503, 504)
NETWORK = {"TransportError", "RequestException"}  # of httpx, httpx2 and requests: huggingface_hub has used all three


@dataclass(frozen=True)
class Failure:
    """kind: "busy" is a status of PASSING, "refused" a 401 or 403, "answer" any other status. status: 0 without an answer.
    says: the server's words, or the first cause; on one line, without secrets. cause: what was raised.
    """

    kind: Kind
    status: int
    says: str
    headers: Mapping[str, str]
    cause: Exception

    @property
    def name(self) -> str:
        return type(self.cause).__name__


class Refused(Exception):
    """An answer with an error's status, to a request that the library did not look at itself."""

    def __init__(self, response: Any) -> None:
        super().__init__(f"status {response.status_code}")
        self.response = response


@cache
def _masked(value: str) -> Token:
    """The token, from now on masked in what is logged: by any thread, so there is no end to it."""
    token = Token(value, "")
    redacted_logs(token).__enter__()
    return token


@contextmanager
def explained(explain: Callable[[Failure], Exception], token: Token | None = None) -> Iterator[None]:
    """Raises what ``explain`` makes of whatever goes wrong. token: the one that is used, else the stored one.

    ``from None``: causes may show the headers of requests.
    """
    from huggingface_hub import get_token

    token = token or _masked(get_token() or "\0")
    try:
        yield
    except (Exl2RayError, Passing):
        raise
    except Exception as e:  # of several HTTP libraries; their texts are not to be shown unredacted
        raise explain(failure(e, token)) from None


def failure(e: Exception, token: Token) -> Failure:
    """What an exception, or one of its causes, comes to."""
    from huggingface_hub import errors

    chain: list[BaseException] = [e]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(c, kinds) for c in chain)

    answer: Any = next((r for c in chain if (r := getattr(c, "response", None)) is not None), None)
    status, headers = int(getattr(answer, "status_code", 0) or 0), getattr(answer, "headers", None) or {}
    code, unknown = headers.get("X-Error-Code", ""), not token.value.strip("\0")
    kinds: dict[Kind, bool] = {
        "offline": among(errors.OfflineModeIsEnabled),
        "gated": code == "GatedRepo" or among(errors.GatedRepoError),
        "revision": code == "RevisionNotFound" or among(errors.RevisionNotFoundError),
        "address": among(errors.HFValidationError),
        "busy": status in PASSING,
        "file": code == "EntryNotFound" or among(errors.RemoteEntryNotFoundError),
        "missing": status == 404 or (status == 401 and (code == "RepoNotFound" or unknown)),
        "refused": status in (401, 403),
        "answer": status > 0,
        "network": among(ConnectionError, TimeoutError) or any(b.__name__ in NETWORK for c in chain for b in type(c).__mro__),
    }
    says = next((str(m) for c in chain if (m := getattr(c, "server_message", None))), "")
    says = says or headers.get("X-Error-Message", "") or ("" if status else str(chain[-1]))
    says = " ".join(redacted(token.redact(says)).split())
    says = says if len(says) <= SAYS else says[:SAYS] + "..."
    return Failure(next((k for k, holds in kinds.items() if holds), "other"), status, says, headers, e)
