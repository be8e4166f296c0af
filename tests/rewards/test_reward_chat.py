"""The client of chat endpoints, against a server on this machine: requests, retries, concurrency, cache."""

import time
from email.utils import formatdate
from types import SimpleNamespace

import pytest
from chat_server import serve
from PIL import Image

from rewards import RewardError
from rewards.backbones import chat
from rewards.backbones.chat import ChatClient
from rewards.language.contrast import make_contrast


@pytest.fixture
def server():
    with serve(lambda text, images: f"{text}, {len(images)} images") as running:
        yield running


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between attempts, none of them waited for."""
    found = []
    monkeypatch.setattr(chat, "time", SimpleNamespace(sleep=found.append, time=time.time))
    return found


def client(server, **options):
    return ChatClient(endpoint=server.url, model="judge", **options)


RED = Image.new("RGB", (3, 2), "red")


def test_what_is_sent(server, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    one = client(server, api_key_env="A_KEY", max_tokens=7, params={"seed": 3})
    (reply,) = one.ask([("Which colour?", [RED])], logprobs=True)
    assert reply.text == "Which colour?, 1 images" and reply.tokens == ()
    (body,), (headers,) = server.bodies, server.headers
    assert server.paths == ["/v1/chat/completions"] and headers["Authorization"] == "Bearer secret"
    kinds = [part["type"] for part in body.pop("messages")[0]["content"]]
    assert kinds == ["image_url", "text"]
    assert body == {"model": "judge", "temperature": 0, "max_tokens": 7, "seed": 3, "logprobs": True}
    client(server).ask([("No key", [])])
    assert "Authorization" not in server.headers[1] and server.bodies[1]["messages"][0]["content"] == "No key"


def test_answers_in_order_equal_questions_asked_once_and_never_more_at_once_than_allowed(server):
    server.delay = 0.02
    questions = [(f"question {k % 9}", []) for k in range(20)]
    replies = client(server, concurrency=3).ask(questions)
    assert [reply.text for reply in replies] == [f"question {k % 9}, 0 images" for k in range(20)]
    assert len(server.bodies) == 9 and 1 < server.most_at_once <= 3


def test_passing_failures_are_tried_again_with_growing_waits(server, waits):
    server.failures = [500, 503, b"no JSON at all", 429]
    assert client(server).ask([("a", [])])[0].text == "a, 0 images"
    assert len(server.bodies) == 5 and len(waits) == 4
    assert all(0.25 * 2**k <= wait <= 0.5 * 2**k for k, wait in enumerate(waits)), waits


def test_retry_after_is_respected_and_bounded(server, waits):
    later = formatdate(time.time() + 30, usegmt=True)
    server.failures = [(429, {"Retry-After": "7"}), (503, {"Retry-After": later}), (429, {"Retry-After": "9999"})]
    client(server).ask([("a", [])])
    assert waits[0] == 7 and 25 <= waits[1] <= 30 and waits[2] == 60


def test_lasting_failures_are_errors(server, waits):
    server.failures = [500] * 3
    with pytest.raises(
        RewardError,
        match="failed 3 times, the last time with: status 500: .*on order.*check that the server is running",
    ):
        client(server, retries=2).ask([("a", [])])
    server.failures = [401]
    with pytest.raises(RewardError, match="refused the request .status 401: .*on order"):
        client(server).ask([("a", [])])
    server.failures = [(302, {"Location": "http://127.0.0.1:1/elsewhere"})]
    with pytest.raises(RewardError, match="refused the request .status 302"):
        client(server).ask([("a", [])])
    server.failures = [b'{"choices": []}']
    with pytest.raises(RewardError, match="returned an answer of unknown format"):
        client(server).ask([("a", [])])
    with pytest.raises(RewardError, match="failed 1 times"):
        ChatClient(endpoint="http://127.0.0.1:9/v1", model="m", retries=0).ask([("a", [])])


def test_answers_are_kept_on_disk(server, tmp_path):
    cache = tmp_path / "deep" / "cache"
    kept = client(server, cache=cache)
    asked = [("a", [RED]), ("a", [Image.new("RGB", (2, 3), "red")]), ("a", []), ("b", [])]
    first = kept.ask(asked)
    assert len(server.bodies) == 4 and len(list(cache.iterdir())) == 4
    assert kept.ask(asked) == first and len(server.bodies) == 4
    assert {path.suffix for path in cache.iterdir()} == {".json"}, "no temporary file is left"
    kept.ask([("b", [])], temperature=1)
    client(server, cache=cache, params={"seed": 1}).ask([("b", [])])
    ChatClient(endpoint=server.url, model="other", cache=cache).ask([("b", [])])
    assert len(server.bodies) == 7, "other parameters, another model"
    for path in cache.iterdir():
        path.write_text(path.read_text()[:-5])
    assert kept.ask(asked) == first and len(server.bodies) == 11, "what is damaged is asked for again"
    assert kept.ask(asked) == first and len(server.bodies) == 11, "and mended"
    server.failures = [400]
    with pytest.raises(RewardError):
        kept.ask([("c", [])])
    assert kept.ask([("c", [])])[0].text == "c, 0 images", "failures are not kept"


def test_log_probabilities(tmp_path):
    def answer(text, images):
        token = {"token": "4", "logprob": -0.5, "top_logprobs": [{"token": "4", "logprob": -0.5}]}
        return {"message": {"content": "4"}, "logprobs": {"content": [token, {"token": "."}]}}

    with serve(answer) as server:
        for _ in range(2):  # asked, and read from disk
            (reply,) = client(server, cache=tmp_path).ask([("a", [])])
            assert reply.tokens == (("4", {"4": -0.5}), (".", {}))
        assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "localhost:8000"}, "an address like http://localhost:8000/v1"),
        ({"endpoint": "http://x", "concurrency": 0}, "concurrency is 0"),
        ({"endpoint": "http://x", "api_key_env": "NO_SUCH_KEY"}, "environment variable NO_SUCH_KEY is empty"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(RewardError, match=message):
        ChatClient(model="m", **options)


def test_contrast_prompts_of_a_language_model():
    with serve(lambda text, images: "1. a blue cat\n- A red cat.\n\n“two red cats”\na dog") as server:
        contrast = make_contrast({"endpoint": server.url, "model": "m", "count": 2})
        assert contrast("a red cat") == ["a blue cat", "two red cats"]
        assert "a red cat" in server.bodies[0]["messages"][0]["content"]
