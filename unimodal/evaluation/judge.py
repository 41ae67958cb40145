"""A model as a judge, behind any endpoint that speaks OpenAI's chat completions (vLLM, SGLang, llama.cpp, OpenAI ...).

A judge gives one whole number and a reason. What it said is kept on disk, so that scoring goes on where it stopped and
costs nothing the second time. Nothing is guessed: an endpoint that fails ends the scoring with its name and status, and an
answer that cannot be read is an opinion without a score, which whoever asked has to count.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from unimodal.documents import Part, read_json_lines
from unimodal.images import image_data_uri

_LONGEST_WAIT = 20.0  # seconds that a server may make us wait between two attempts
_SHOWN = 200  # characters of a server's message
_FORMAT = (
    'Answer with one JSON object and nothing else: {{"score": a whole number from {low} to {high}, '
    '"reason": one short sentence}}.'
)
_GREETING = "This is a test of the connection. The score is 1."


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is and how patient we are.

    Args:
        base_url: address up to and with the version, such as http://localhost:8000/v1.
        model: name that the endpoint knows the judge by.
        key_variable: environment variable that holds the API key; "" for an endpoint without one.
        timeout: seconds until one request is given up.
        attempts: how often a request is sent when the server is busy (429), broken (5xx) or slow.
        wait: seconds before the second attempt; twice as many before each further one.
        parallel: requests under way at once.
    """

    base_url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    attempts: int = 3
    wait: float = 1.0
    parallel: int = 4

    def __post_init__(self) -> None:
        """Refuse what could not work, and addresses that hold a password: they are printed."""
        parsed = urlsplit(self.base_url)
        if parsed.scheme not in ("http", "https") or not parsed.hostname:
            raise ValueError(f"base_url: expected http://... or https://..., got {self.base_url!r}")
        if "@" in parsed.netloc or parsed.query:
            raise ValueError(
                "base_url: expected no password or query in it (the key belongs into an environment variable)"
            )
        if not self.model:
            raise ValueError("model: expected the judge's name, got an empty one")
        if self.timeout <= 0 or self.attempts < 1 or self.wait < 0 or self.parallel < 1:
            raise ValueError(
                "timeout, attempts, wait, parallel: expected > 0, >= 1, >= 0 and >= 1, "
                f"got {self.timeout}, {self.attempts}, {self.wait} and {self.parallel}"
            )

    @property
    def address(self) -> str:
        """Where requests go."""
        return f"{self.base_url.rstrip('/')}/chat/completions"


@dataclass(frozen=True)
class Question:
    """One thing to judge.

    Attributes:
        instructions: what is judged and what the scores mean.
        parts: the texts and images that are judged, in reading order.
        low: least score.
        high: greatest score.
    """

    instructions: str
    parts: tuple[Part, ...]
    low: int = 0
    high: int = 5


@dataclass(frozen=True)
class Opinion:
    """What a judge says; `score` is None where its answer could not be read, and `reason` then shows the answer."""

    score: int | None
    reason: str


class OpenAIJudge:
    """Asks an endpoint at temperature 0.

    Making one sends a short request: a wrong key or address shows before anything is generated.

    Args:
        endpoint: where it is.
        cache: JSONL file of all that was said before; made when needed.

    Attributes:
        served: model and version as the server reports it.

    Raises:
        ValueError: no API key, no such endpoint, or one that refuses; with its address and status, never with the key.
    """

    name = "openai-chat"

    def __init__(self, endpoint: Endpoint, cache: Path) -> None:
        self.endpoint, self._cache = endpoint, cache
        self._key = _api_key(endpoint.key_variable)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # No redirects: the key would travel with them.
        self._client = httpx2.Client(timeout=endpoint.timeout, headers=headers, follow_redirects=False)
        self._lock = threading.Lock()
        self._known = _read_cache(cache)
        _, self.served = self._complete(_request(endpoint.model, Question(_GREETING, (), 1, 1)))

    def spec(self, wordings: Sequence[str]) -> dict[str, Any]:
        """What scores depend on: the judge, its version, and the texts that it was asked with.

        Args:
            wordings: the instructions that questions are made of.
        """
        texts = json.dumps([_FORMAT, *wordings])
        return {
            "name": self.name,
            "model": self.endpoint.model,
            "served": self.served,
            "temperature": 0,
            "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest(),
        }

    def ask(self, questions: Sequence[Question]) -> list[Opinion]:
        """An opinion a question, in order; several requests are under way at once.

        Raises:
            ValueError: the endpoint failed for good, or began to serve another model.
        """
        with ThreadPoolExecutor(self.endpoint.parallel) as pool:
            futures = [pool.submit(self._opinion, question) for question in questions]
            try:
                return [future.result() for future in futures]
            except ValueError:
                pool.shutdown(cancel_futures=True)  # what has not been sent is not sent
                raise

    def _opinion(self, question: Question) -> Opinion:
        request = _request(self.endpoint.model, question)
        key = hashlib.sha256(json.dumps([self.endpoint.address, self.served, request]).encode()).hexdigest()
        with self._lock:
            said = self._known.get(key)
        if said is None:
            said, served = self._complete(request)
            if served != self.served:
                raise ValueError(
                    f"{self.endpoint.address}: expected the judge to stay {self.served}, got {served} while scoring"
                )
            with self._lock:
                self._known[key] = said
                _append(self._cache, {"key": key, "served": served, "said": said})
        return parse_opinion(said, question.low, question.high)

    def _complete(self, request: Mapping[str, Any]) -> tuple[str, str]:
        """What the model said, and which model the server says it is."""
        response = self._send(request)
        try:
            body = response.json()
            content, served = body["choices"][0]["message"]["content"], body.get("model")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ValueError(
                f"{self.endpoint.address}: expected a chat completion, got {self._shown(response.text)}"
            ) from None
        if isinstance(content, list):  # some servers answer in parts
            content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
        return content if isinstance(content, str) else "", str(served or "not reported")

    def _send(self, request: Mapping[str, Any]) -> httpx2.Response:
        """The first good response within the allowed attempts."""
        address, problem = self.endpoint.address, ""
        for attempt in range(self.endpoint.attempts):
            pause = self.endpoint.wait * 2**attempt
            try:
                response = self._client.post(address, json=request)
            except httpx2.TimeoutException:
                problem = f"no answer within {self.endpoint.timeout:g} s"
            except httpx2.HTTPError as error:
                raise ValueError(f"{address}: cannot be reached: {self._shown(str(error))}") from None
            else:
                if response.status_code == 200:
                    return response
                problem = f"status {response.status_code}: {self._shown(response.text)}"
                if response.status_code != 429 and response.status_code < 500:
                    raise ValueError(f"{address}: {problem}")
                pause = max(pause, _retry_after(response))
            if attempt + 1 < self.endpoint.attempts:
                time.sleep(min(pause, _LONGEST_WAIT))
        raise ValueError(f"{address}: {problem} (sent {self.endpoint.attempts} times)")

    def _shown(self, text: str) -> str:
        """A server's message on one line; servers repeat keys that they refuse, we do not."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:_SHOWN] or "an empty answer"


def parse_opinion(said: str, low: int, high: int) -> Opinion:
    """Read {"score": int, "reason": str}, alone or inside one code fence; anything else is an opinion without a score."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", said, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else said)
    except (json.JSONDecodeError, RecursionError):
        found = None
    if isinstance(found, dict) and found.keys() == {"score", "reason"}:
        score, reason = found["score"], found["reason"]
        if type(score) is int and low <= score <= high and isinstance(reason, str):
            return Opinion(score, reason)
    return Opinion(None, f"unparsable: {' '.join(said.split())[:_SHOWN] or 'an empty answer'}")


def _request(model: str, question: Question) -> dict[str, Any]:
    instructions = f"{question.instructions}\n\n{_FORMAT.format(low=question.low, high=question.high)}"
    content: list[dict[str, Any]] = []
    for part in question.parts:
        if part.is_image:
            content.append({"type": "image_url", "image_url": {"url": image_data_uri(part.image)}})
        else:
            content.append({"type": "text", "text": part.text})
    content = content or [{"type": "text", "text": "Go on."}]
    messages = [{"role": "system", "content": instructions}, {"role": "user", "content": content}]
    return {"model": model, "temperature": 0, "messages": messages}


def _api_key(variable: str) -> str:
    """The key, "" where none is wanted."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"key_variable: expected an API key in the environment variable {variable}, got none")
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"key_variable: expected a key of plain characters in {variable}, got others")
    return key


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks for; 0 where it names none (a date is not read)."""
    value = response.headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) else 0.0


def _read_cache(path: Path) -> dict[str, str]:
    """What was said, by the hash of the request."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):  # killed while writing: the last line is not whole
        path.write_bytes(data[: data.rfind(b"\n") + 1])
    known = {}
    for line in read_json_lines(path):
        key, said = line.record.get("key"), line.record.get("said")
        if not isinstance(key, str) or not isinstance(said, str):
            raise ValueError(f"{line.where}: expected key and said of a judge's cache, got {sorted(line.record)}")
        known[key] = said
    return known


def _append(path: Path, record: Mapping[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
