"""The judge against a local stub: what it sends, what it keeps, and every way an endpoint can fail."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from unimodal.documents import Part
from unimodal.evaluation.judge import Endpoint, OpenAIJudge, Opinion, Question, parse_opinion

KEY = "sk-very-secret-0123"


def completion(said: Any, model: str = "stub-2024-08-06") -> dict[str, Any]:
    return {"model": model, "choices": [{"message": {"role": "assistant", "content": said}}]}


def opinion(score: int = 4, reason: str = "fine") -> dict[str, Any]:
    return completion(json.dumps({"score": score, "reason": reason}))


@dataclass
class Reply:
    status: int = 200
    body: Any = field(default_factory=opinion)
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


@dataclass
class Stub:
    """Answers the n-th request with the n-th reply, the last one for ever; the first is the judge's own greeting."""

    url: str = ""
    replies: list[Reply] = field(default_factory=lambda: [Reply()])
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    @property
    def asked(self) -> list[dict[str, Any]]:
        """All requests but the greeting."""
        return self.requests[1:]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state, lock = Stub(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                reply = state.replies[min(len(state.requests), len(state.replies) - 1)]
                state.requests.append(body)
                state.headers.append(dict(self.headers))
                state.paths.append(self.path)
            time.sleep(reply.delay)
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for name, value in {**reply.headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except BrokenPipeError:
                pass  # the judge has given up

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def make(stub: Stub, tmp_path: Path) -> Callable[..., OpenAIJudge]:
    def build(cache: str = "judge_cache.jsonl", **changes: Any) -> OpenAIJudge:
        settings: dict[str, Any] = {
            "base_url": stub.url,
            "model": "stub",
            "key_variable": "JUDGE_KEY",
            "timeout": 5.0,
            "wait": 0.01,
        }
        return OpenAIJudge(Endpoint(**settings | changes), tmp_path / cache)

    return build


def ask(text: str = "a story", **changes: Any) -> Question:
    return Question("How good is it?", (Part(text, learn=False),), **changes)


def test_what_is_sent(stub: Stub, make: Callable[..., OpenAIJudge]) -> None:
    image = Image.new("RGB", (3, 2), (255, 0, 7))
    question = Question("How good is it?", (Part("first"), Part(image), Part("last")), 1, 10)
    assert make().ask([question]) == [Opinion(4, "fine")]
    (sent,) = stub.asked
    assert sent["model"] == "stub"
    assert sent["temperature"] == 0
    system, user = sent["messages"]
    assert system["role"] == "system"
    assert system["content"].startswith("How good is it?")
    assert "1 to 10" in system["content"]
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "text"]
    head, data = user["content"][1]["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (255, 0, 7)
    assert set(stub.paths) == {"/v1/chat/completions"}
    assert {h["Authorization"] for h in stub.headers} == {f"Bearer {KEY}"}


def test_opinions_keep_the_order_of_questions(stub: Stub, make: Callable[..., OpenAIJudge]) -> None:
    judge = make(parallel=1)
    stub.replies = [Reply(), *[Reply(body=opinion(n)) for n in range(5)]]
    assert [o.score for o in judge.ask([ask(str(n)) for n in range(5)])] == [0, 1, 2, 3, 4]


def test_busy_then_good(stub: Stub, make: Callable[..., OpenAIJudge]) -> None:
    judge = make()
    stub.replies = [Reply(), Reply(429, {"error": "slow down"}), Reply(503, b"oops"), Reply(body=opinion(2))]
    assert judge.ask([ask()]) == [Opinion(2, "fine")]
    assert len(stub.asked) == 3


def test_the_servers_own_wait_is_kept_within_bounds(
    stub: Stub, make: Callable[..., OpenAIJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge, waited = make(), []
    monkeypatch.setattr(
        "unimodal.evaluation.judge.time.sleep", lambda seconds: waited.append(seconds) if seconds else None
    )
    stub.replies = [Reply(), Reply(429, {}, {"Retry-After": "7"}), Reply(429, {}, {"Retry-After": "3600"}), Reply()]
    judge.ask([ask()])
    assert waited == [7.0, 20.0]


def test_broken_for_ever_ends_with_address_and_status(stub: Stub, make: Callable[..., OpenAIJudge]) -> None:
    judge = make()
    stub.replies = [Reply(500, {"error": "no GPU"})]
    with pytest.raises(ValueError, match=r"/v1/chat/completions: status 500: .*no GPU.*sent 3 times"):
        judge.ask([ask()])
    assert len(stub.asked) == 3


def test_slow_for_ever_ends(stub: Stub, make: Callable[..., OpenAIJudge]) -> None:
    judge = make(timeout=0.15, attempts=2)
    stub.replies = [Reply(delay=0.4)]
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"no answer within 0\.15 s .sent 2 times"):
        judge.ask([ask()])
    assert time.perf_counter() - start < 3


def test_a_refusal_is_not_sent_again(stub: Stub, make: Callable[..., OpenAIJudge]) -> None:
    judge = make()
    stub.replies = [Reply(400, {"error": "image too large"})]
    with pytest.raises(ValueError, match=r"status 400: .*image too large"):
        judge.ask([ask()])
    assert len(stub.asked) == 1


def test_after_a_failure_what_waits_is_not_sent(stub: Stub, make: Callable[..., OpenAIJudge]) -> None:
    judge = make(parallel=1)
    stub.replies = [Reply(404, {})]
    with pytest.raises(ValueError, match="status 404"):
        judge.ask([ask(str(n)) for n in range(50)])
    assert len(stub.asked) < 10


def test_wrong_key_fails_at_once_and_is_not_shown(stub: Stub, make: Callable[..., OpenAIJudge], tmp_path: Path) -> None:
    stub.replies = [Reply(401, {"error": f"Incorrect API key provided: {KEY}"})]
    with pytest.raises(ValueError, match=r"status 401: .*\*\*\*") as caught:
        make()
    assert KEY not in str(caught.value)
    assert len(stub.requests) == 1
    assert not list(tmp_path.iterdir())


def test_missing_key_fails_before_anything_is_sent(
    stub: Stub, make: Callable[..., OpenAIJudge], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="key_variable: expected an API key in the environment variable JUDGE_KEY"):
        make()
    monkeypatch.setenv("JUDGE_KEY", "two\nlines")
    with pytest.raises(ValueError, match="plain characters") as caught:
        make()
    assert "lines" not in str(caught.value)
    assert not stub.requests
    make(key_variable="")
    assert "Authorization" not in stub.headers[0]


def test_missing_endpoint_fails_at_once(make: Callable[..., OpenAIJudge]) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:9/v1/chat/completions: cannot be reached"):
        make(base_url="http://127.0.0.1:9/v1", wait=30.0)
    assert time.perf_counter() - start < 5


def test_redirects_are_not_followed(stub: Stub, make: Callable[..., OpenAIJudge]) -> None:
    stub.replies = [Reply(307, {}, {"Location": "http://127.0.0.1:9/elsewhere"})]
    with pytest.raises(ValueError, match="status 307"):
        make()


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": 3}]}'])
def test_what_is_no_chat_completion_is_an_error(stub: Stub, make: Callable[..., OpenAIJudge], body: bytes) -> None:
    stub.replies = [Reply(body=body)]
    with pytest.raises(ValueError, match="expected a chat completion, got"):
        make()


@pytest.mark.parametrize(
    "said",
    [
        "", "great!", "5", '{"score": 4}', '{"score": 4.0, "reason": "x"}', '{"score": "4", "reason": "x"}',
        '{"score": true, "reason": "x"}', '{"score": 6, "reason": "x"}', '{"score": -1, "reason": "x"}',
        '{"score": 4, "reason": null}', '{"score": 4, "reason": "x", "more": 1}', 'Sure: {"score": 4, "reason": "x"}',
        '[{"score": 4, "reason": "x"}]', '{"score": NaN, "reason": "x"}',
    ],
)  # fmt: skip
def test_other_answers_are_unparsable(said: str) -> None:
    found = parse_opinion(said, 0, 5)
    assert found.score is None
    assert found.reason.startswith("unparsable: ")
    assert said[:20] in found.reason


@pytest.mark.parametrize(
    "said",
    ['{"score": 0, "reason": "x"}', ' {"reason": "x", "score": 0}\n', '```json\n{"score": 0, "reason": "x"}\n```'],
)
def test_strict_answers_are_read(said: str) -> None:
    assert parse_opinion(said, 0, 5) == Opinion(0, "x")


@pytest.mark.parametrize("content", [None, "I cannot help with that.", [{"type": "text", "text": "no"}]])
def test_an_unreadable_opinion_has_no_score(stub: Stub, make: Callable[..., OpenAIJudge], content: Any) -> None:
    judge = make()
    stub.replies = [Reply(body=completion(content))]
    (found,) = judge.ask([ask()])
    assert found.score is None
    assert len(stub.asked) == 1  # at temperature 0 it would say the same again


def test_answers_in_parts_are_joined(stub: Stub, make: Callable[..., OpenAIJudge]) -> None:
    judge = make()
    parts = [{"type": "text", "text": '{"score": 3,'}, {"type": "text", "text": ' "reason": "x"}'}]
    stub.replies = [Reply(body=completion(parts))]
    assert judge.ask([ask()]) == [Opinion(3, "x")]


def test_what_was_said_is_kept_and_not_asked_again(
    stub: Stub, make: Callable[..., OpenAIJudge], tmp_path: Path
) -> None:
    questions = [ask("one"), ask("two"), ask("one", high=9), Question("Other?", (Part("one"),))]
    first = make().ask(questions)
    assert len(stub.asked) == 4
    file = tmp_path / "judge_cache.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 4
    assert KEY not in file.read_text()
    # Killed in the middle of a line: that one is asked again, and the file is whole afterwards.
    file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    stub.requests.clear()
    assert make().ask(questions) == first
    assert len(stub.asked) == 1
    assert sorted(file.read_text().splitlines()) == sorted(lines)
    stub.requests.clear()
    make(model="another").ask(questions[:1])
    assert len(stub.asked) == 1


def test_a_cache_of_something_else_is_refused(make: Callable[..., OpenAIJudge], tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(ValueError, match=r"other\.jsonl:1: expected key and said"):
        make("other.jsonl")


def test_a_new_version_of_the_model_is_asked_afresh_and_never_mixed(
    stub: Stub, make: Callable[..., OpenAIJudge]
) -> None:
    judge = make()
    judge.ask([ask()])
    newer = Reply(body=completion('{"score": 1, "reason": "strict"}', "stub-2025-01-01"))
    stub.replies = [newer]
    assert judge.ask([ask()]) == [Opinion(4, "fine")]  # kept
    with pytest.raises(ValueError, match=r"stay stub-2024-08-06, got stub-2025-01-01"):
        judge.ask([ask("two")])
    stub.requests.clear()
    assert make().ask([ask()]) == [Opinion(1, "strict")]


def test_spec_names_the_judge_its_version_and_the_wordings(stub: Stub, make: Callable[..., OpenAIJudge]) -> None:
    spec = make().spec(["How good is it?"])
    assert spec["model"] == "stub"
    assert spec["served"] == "stub-2024-08-06"
    assert spec["prompts_sha256"] != make().spec(["How bad is it?"])["prompts_sha256"]
    assert spec == make().spec(["How good is it?"])
    assert KEY not in json.dumps(spec)
    stub.replies = [Reply(body={"choices": [{"message": {"content": "x"}}]})]
    assert make().spec([])["served"] == "not reported"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url"),
        ({"base_url": "http://"}, "base_url"),
        ({"base_url": "http://me:pw@host/v1"}, "no password"),
        ({"base_url": "http://host/v1?key=1"}, "no password"),
        ({"model": ""}, "model"),
        ({"attempts": 0}, "attempts"),
        ({"timeout": 0.0}, "timeout"),
    ],
)
def test_endpoint_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(**{"base_url": "http://host/v1", "model": "m", **changes})
    assert "pw" not in str(caught.value)
