"""Keys and passwords stay where they are; rewards run no code beside a model."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from chat_server import serve

from rewards import RewardError
from rewards.backbones.chat import ChatClient
from rewards.backbones.hf import load_pretrained

KEY = 'sk-se"cret/1234'


@pytest.fixture
def client(monkeypatch, tmp_path):
    monkeypatch.setenv("THE_KEY", KEY)
    with serve(lambda text, images: text) as server:
        options = {"endpoint": server.url, "model": "m", "api_key_env": "THE_KEY", "cache": tmp_path / "cache"}
        yield server, ChatClient(retries=0, **options), tmp_path / "cache"


def test_an_echoed_key_is_shown_nowhere(client):
    server, chat, cache = client
    echo = json.dumps({"error": f"Authorization: Bearer {KEY}"}).encode()
    for body in (echo, f"Bearer {KEY} {'x' * 300}".encode(), json.dumps([KEY]).encode()):
        server.failures.append(body)  # an answer of unknown format, or no JSON
        with pytest.raises(RewardError) as caught:
            chat.ask([("question", [])])
        shown = f"{caught.value} {caught.value.__cause__}"
        assert "sk-se" not in shown and "1234" not in shown
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    (reply,) = chat.ask([(f"say {KEY}", [])])  # the model repeats what it was told
    assert reply.text == "say [api key]"
    assert all("1234" not in file.read_text() for file in cache.iterdir())


@pytest.mark.parametrize(
    "endpoint", ["http://u:pass123@localhost:1/v1", "https://pass123@host/v1", "http://u:pass123@[::1/v1"]
)
def test_passwords_in_addresses_are_refused_without_being_shown(endpoint):
    with pytest.raises(RewardError, match="endpoint") as caught:
        ChatClient(endpoint=endpoint, model="m")
    assert "pass123" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["http://", "http://x:port/v1", "http://a b/v1", "http://[::1/v1"])
def test_other_texts_are_no_addresses(endpoint):
    with pytest.raises(RewardError, match="give an address"):
        ChatClient(endpoint=endpoint, model="m")


def test_deep_and_huge_answers_are_errors(client):
    server, chat, _ = client
    for body in (b"[" * 200_000, b'{"a": ' + b"9" * 6000 + b"}"):
        server.failures.append(body)
        with pytest.raises(RewardError, match="failed 1 times"):
            chat.ask([("q", [])])


@pytest.mark.parametrize("kind", ["AutoTokenizer", "AutoConfig", "AutoProcessor"])
def test_code_beside_a_model_is_neither_run_nor_asked_for(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    entry = {"model_type": "made_up", "auto_map": {kind: "evil.C" if kind != "AutoTokenizer" else ["evil.C", None]}}
    for file in ("config.json", "tokenizer_config.json", "processor_config.json"):
        (tmp_path / file).write_text(json.dumps(entry))
    with pytest.raises(RewardError):
        load_pretrained(kind, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_every_auto_class_is_told_to_trust_no_code():
    """Each `AutoX.from_pretrained` in the sources says so, or goes through `load_pretrained`, which does."""
    root, found = Path(__file__).parents[2], 0
    for package in ("mmalign", "pipelines", "rewards"):
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = node.func if isinstance(node, ast.Call) else None
                if isinstance(called, ast.Attribute) and called.attr in ("from_pretrained", "from_config"):
                    if isinstance(called.value, ast.Name) and called.value.id.startswith("Auto"):
                        if called.value.id in ("AutoencoderTiny", "AutoencoderKL"):
                            continue
                        trust = next((one.value for one in node.keywords if one.arg == "trust_remote_code"), None)
                        assert isinstance(trust, ast.Constant) and trust.value is False, path
                        found += 1
    assert found >= 1
