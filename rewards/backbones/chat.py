"""Client of a language model at an OpenAI-compatible endpoint (vLLM, SGLang, a vendor's), with text and images.

Bounded concurrency; retries with growing, jittered waits that respect `Retry-After`; answers are cached on disk, keyed
by model, text, images and parameters, so that a resumed run does not pay for any request twice.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import json
import os
import random
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from rewards.errors import RewardError

Question = tuple[str, Sequence[Image.Image]]
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
MAX_ANSWER = 64 << 20
"""Bytes of an answer; a longer one is no answer of a language model."""


@dataclass(frozen=True)
class Reply:
    """What the model answered; `tokens` as `(token, {alternative: log probability})` where the endpoint gives them."""

    text: str
    tokens: tuple[tuple[str, dict[str, float]], ...] = ()


class ChatClient:
    """Client of one endpoint and model.

    endpoint: up to and without `/chat/completions`, such as `http://localhost:8000/v1`. api_key_env: the name of the
    environment variable that holds the key; None sends no key. cache: a directory of answers; None keeps none.
    params: further fields of the request, such as `seed`; the temperature is 0 unless they say otherwise. retries:
    further attempts after a temporary failure.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        model: str,
        api_key_env: str | None = None,
        cache: str | PathLike[str] | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
        max_tokens: int = 1024,
        params: dict[str, Any] | None = None,
    ) -> None:
        """Check the options; no request is sent."""
        _check_endpoint(endpoint)
        if concurrency < 1 or retries < 0:
            raise RewardError(
                f"concurrency is {concurrency} and retries {retries}; at least 1 and at least 0 are allowed"
            )
        if api_key_env is not None and not os.environ.get(api_key_env):
            raise RewardError(f"the environment variable {api_key_env} is empty; set it to the API key")
        self.url = endpoint.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.api_key_env, self.concurrency = model, api_key_env, concurrency
        self.retries, self.timeout = retries, timeout
        self.cache = None if cache is None else Path(cache).expanduser()
        self.params = {"temperature": 0, "max_tokens": max_tokens, **(params or {})}
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, questions: Sequence[Question], **params: Any) -> list[Reply]:
        """Answer questions `(text, images)` concurrently, in their order; equal questions are asked once.

        Raises:
            RewardError: the endpoint refuses, or still fails after the retries.
        """
        params = {**self.params, **params}
        keys = [self._key(question, params) for question in questions]
        distinct = dict(zip(keys, questions, strict=True))
        with ThreadPoolExecutor(max_workers=self.concurrency) as pool:
            futures = {key: pool.submit(self._answer, key, asked, params) for key, asked in distinct.items()}
            try:
                found = {key: future.result() for key, future in futures.items()}
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [found[key] for key in keys]

    def _key(self, question: Question, params: dict[str, Any]) -> str:
        text, images = question
        pixels = [
            hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest() for image in images
        ]
        identity = [self.model, hashlib.sha256(text.encode()).hexdigest(), pixels, params]
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _answer(self, key: str, question: Question, params: dict[str, Any]) -> Reply:
        kept = None if self.cache is None else self.cache / f"{key}.json"
        if kept is not None and kept.is_file():
            try:
                record = json.loads(kept.read_text(encoding="utf-8"))
                return Reply(record["text"], tuple((token, dict(others)) for token, others in record["tokens"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                kept.unlink(missing_ok=True)  # a damaged file is requested again
        reply = _read(self._post(_body(self.model, question, params)), self.url)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=kept.parent, suffix=".tmp", delete=False, encoding="utf-8"
            ) as file:
                json.dump({"model": self.model, **asdict(reply)}, file)
            os.replace(file.name, kept)
        return reply

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        key = None if self.api_key_env is None else os.environ[self.api_key_env]
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        for attempt in range(self.retries + 1):
            wait = None
            try:
                with self._opener.open(request, timeout=self.timeout) as response:
                    return json.loads(_read_text(response, key))
            except urllib.error.HTTPError as error:
                with error:
                    said = " ".join(_read_text(error, key).split())[:200]
                reason = f"status {error.code}: {said}"
                if error.code not in _AGAIN:
                    raise RewardError(f"{self.url} refused the request ({reason})") from None
                wait = _retry_after(error.headers.get("Retry-After"))
            except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
                # no connection, broken off, timed out, no JSON; its text may quote what the server said
                reason = _without_key(str(getattr(error, "reason", error)), key) or type(error).__name__
            if attempt < self.retries:
                longest = min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT)
                time.sleep(random.uniform(longest / 2, longest) if wait is None else wait)
        raise RewardError(
            f"{self.url} failed {self.retries + 1} times, the last time with: {reason}; check that the server is "
            "running"
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect, so that the answer is an error."""
        return None


def _check_endpoint(endpoint: str) -> None:
    """Refuse what is no address, and one with a password, which would stand in configs, tables and messages."""
    try:
        parts = urllib.parse.urlsplit(endpoint)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        secret = parts.username is not None or parts.password is not None
    except ValueError:  # a port that is no number, half of an IPv6 address
        known, secret = False, "@" in endpoint
    if secret:
        raise RewardError("endpoint: the address holds a user name or password; give the key by api_key_env instead")
    if not known or any(one.isspace() or not one.isprintable() for one in endpoint):
        raise RewardError(f"endpoint {endpoint!r}: give an address like http://localhost:8000/v1")


def _read_text(response: Any, key: str | None) -> str:
    """Return the text of an answer, with the key replaced where a server echoes it."""
    content = response.read(MAX_ANSWER + 1)
    if len(content) > MAX_ANSWER:
        raise ValueError(f"an answer of more than {MAX_ANSWER >> 20} MB")
    return _without_key(content.decode("utf-8", "replace"), key)


def _without_key(text: str, key: str | None) -> str:
    for form in {key, json.dumps(key)[1:-1], urllib.parse.quote(key, safe="")} if key else ():
        text = text.replace(form, "[api key]")
    return text


def _body(model: str, question: Question, params: dict[str, Any]) -> dict[str, Any]:
    text, images = question
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
    content.append({"type": "text", "text": text})
    return {"model": model, "messages": [{"role": "user", "content": content if images else text}], **params}


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _read(answer: Any, url: str) -> Reply:
    try:
        choice = answer["choices"][0]
        logprobs = (choice.get("logprobs") or {}).get("content") or []
        tokens = tuple(
            (entry["token"], {other["token"]: float(other["logprob"]) for other in entry.get("top_logprobs") or []})
            for entry in logprobs
        )
        return Reply(choice["message"]["content"] or "", tokens)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise RewardError(f"{url} returned an answer of unknown format: {str(answer)[:200]}") from error


def _retry_after(header: str | None) -> float | None:
    """Parse the header (seconds or a date) to seconds to wait, at most `_LONGEST_WAIT`."""
    if not header:
        return None
    try:
        seconds = (
            float(header) if header.strip().isdigit() else parsedate_to_datetime(header).timestamp() - time.time()
        )
    except (TypeError, ValueError):
        return None
    return min(max(seconds, 0.0), _LONGEST_WAIT)
