"""Served answers: the text that a seed has alone, clients at once, guards, kills and stops."""

import json
import re
import shutil
import signal
import socket
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

import pytest
from described import find
from helpers import codex, counts, free_port, start, wait_until, write_model
from starlette.testclient import TestClient
from test_lab import CHROMIUM, FLAGS

from codex_nb.cli.serve import _identity, bind
from codex_nb.core.artifacts import MANIFEST, read_manifest
from codex_nb.core.repro import set_determinism
from codex_nb.data.documents import Message
from codex_nb.data.tokenizer import Tokenizer
from codex_nb.deploy import batch_engine, server
from codex_nb.deploy.batch_engine import BatchEngine
from codex_nb.deploy.openai_api import ServedModel
from codex_nb.deploy.server import Guard, make_app, run_server
from codex_nb.eval.eval_config import GenerateConfig
from codex_nb.eval.generate import generate, generate_batch, reply
from codex_nb.model.model_registry import load_model
from codex_nb.model.portable_mode import in_portable_dtype

DIGEST = "0123456789abcdef" * 4
TALK = [{"role": "user", "content": "Who mended it?"}]
SECRET = "-".join(("correct", "horse", "battery"))
SHAPE = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
SHAPE |= dict(intermediate_size=32, max_position_embeddings=1 << 20)


@pytest.fixture(scope="module")
def endless(small_model, tmp_path_factory):
    "A model whose greedy text never ends, with a context of a million tokens."
    folder = tmp_path_factory.mktemp("endless") / "endless"
    tokenizer = Tokenizer(small_model, "")
    write_model(folder, "llama", sharper=5, vocab_size=tokenizer.vocab_size, **SHAPE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(small_model / name, folder / name)
    return folder


@contextmanager
def opened(folder, **limits):
    "An engine with a model, and what is said of it."
    engine = BatchEngine(load_model(folder), Tokenizer(folder, ""), **limits)
    cfg = GenerateConfig(max_new_tokens=16)
    try:
        yield engine, ServedModel("small", DIGEST, engine.context, cfg)
    finally:
        engine.close()


@contextmanager
def on_a_port(engine, served, **guard):
    "The address of a server in a thread."
    listener, servers = bind("127.0.0.1", 0, False), SimpleQueue()
    app = Guard(make_app(engine, served), **guard)
    given = (app, engine, listener, 0.2, servers.put)
    thread = threading.Thread(target=run_server, args=given)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.start()
    running = servers.get(timeout=60)
    try:
        yield address
    finally:
        running.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def no_network(monkeypatch):
    "Nothing but loopback can be reached."
    connect = socket.socket.connect

    def only_here(self, address):
        is_far = self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1")
        assert not is_far, address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


def client(address, key="none"):
    from openai import OpenAI

    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=60)


def test_eight_clients_at_once_get_what_each_gets_alone(small_model, no_network):
    prompts = ["One day", "The lamp", "A", "Who mended it", "So", "By the river it", "I", "We saw"]
    lines = []
    with opened(small_model) as (engine, served):
        with on_a_port(engine, served, log=lines.append) as address:
            openai = client(address)

            def ask(i):
                given = dict(model="small", prompt=prompts[i], seed=i, max_tokens=10 + i)
                if i % 2:
                    return openai.completions.create(**given)
                given |= dict(stream=True, stream_options={"include_usage": True})
                return list(openai.completions.create(**given))

            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(ask, range(8)))
            talk = openai.chat.completions.create(model="small", messages=TALK, seed=4, n=2)
            assert [m.id for m in openai.models.list()] == ["small"]
        model, tokenizer = engine.model, engine.tokenizer
    for i, answer in enumerate(answers):
        cfg = GenerateConfig(max_new_tokens=10 + i)
        (alone,) = generate_batch(model, tokenizer, [prompts[i]], cfg, seed=i)
        parts = answer if isinstance(answer, list) else [answer]
        choices = [c for part in parts for c in part.choices]
        assert "".join(c.text for c in choices) == alone.text
        assert choices[-1].finish_reason == {"end": "stop"}.get(alone.finish_reason, "length")
        origin = {"weights_digest": DIGEST, "determinism": "off", "seed": i}
        assert all(part.model_extra["codex_nb"] == origin for part in parts)
        assert parts[-1].system_fingerprint == f"fp_{DIGEST[:12]}"
        usage = parts[-1].usage
        assert usage.completion_tokens == len(alone.ids)
        assert usage.prompt_tokens == len(tokenizer.encode(prompts[i])) + 1
    messages = [Message(**m) for m in TALK]
    cfg = GenerateConfig(max_new_tokens=16)
    expected = "".join(reply(model, tokenizer, messages, cfg, 4)[0])  # as `codex-nb chat`
    assert talk.choices[0].message.content == expected != talk.choices[1].message.content
    assert len(lines) == 10 and not any("lamp" in line or "river" in line for line in lines)
    assert all(
        re.fullmatch(r"(GET|POST) /v1/\S+ 200(, \d+ \+ \d+ tokens)?, \d+ ms", x) for x in lines
    )


def texts_of(engine, requests):
    "The texts of jobs that are asked for at once."
    asked = []
    for prompt, settings, seed in requests:
        pieces = SimpleQueue()
        job = engine.prepare(prompt, GenerateConfig(**settings), seed, "0")
        job.notify = pieces.put
        asked.append((job, pieces))
    engine.submit([job for job, _ in asked])
    texts = []
    for _, pieces in asked:
        parts = [pieces.get(timeout=60)]
        while not parts[-1].is_last:
            parts.append(pieces.get(timeout=60))
        texts.append("".join(p.text + p.error for p in parts))
    return texts


REQUESTS = [
    ("One day", dict(max_new_tokens=9), 0),
    ("The lamp by the river", dict(max_new_tokens=14, temperature=1.2, top_p=0.9), 1),
    ("A", dict(max_new_tokens=5, repetition_penalty=1.3), 2),
    (None, dict(max_new_tokens=12, temperature=0.0), 3),
]


@pytest.mark.parametrize("kind", ["gpt2", "mistral", "portable"])
def test_models_of_each_kind_share_steps_without_a_change(kind, small_model, tmp_path):
    "Learned positions, a sliding window that cannot be joined, and arithmetic that is exact."
    folder, tokenizer = small_model, Tokenizer(small_model, "")
    if kind != "portable":
        shape = dict(n_embd=16, n_layer=2, n_head=2) if kind == "gpt2" else SHAPE
        shape |= dict(sliding_window=4) if kind == "mistral" else {}
        folder = tmp_path / kind
        write_model(folder, kind, sharper=3, vocab_size=tokenizer.vocab_size, **shape)
    model = load_model(folder)
    if kind == "portable":
        set_determinism("portable")
        model = in_portable_dtype(model)
    try:
        engine = BatchEngine(model, tokenizer)
        texts = texts_of(engine, REQUESTS)
        engine.close()
        alone = [generate(model, tokenizer, p, GenerateConfig(**c), s) for p, c, s in REQUESTS]
    finally:
        set_determinism("off")
    assert texts == alone and len({*texts}) == len(texts)


def test_a_crowd_is_refused_and_a_failed_step_costs_its_batch_only(
    small_model, monkeypatch, capsys
):
    with opened(small_model, max_batch=1, max_waiting=1) as (engine, served):
        web = TestClient(make_app(engine, served), "http://127.0.0.1")
        assert web.post("/v1/completions", json=dict(prompt="A")).status_code == 200
        answer = web.post("/v1/completions", json=dict(prompt="A", n=2))
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "server_busy"

        def fail(self):
            raise RuntimeError("memory ran out")

        with monkeypatch.context() as patch:
            patch.setattr(batch_engine.BatchDecoder, "next_logits", fail)
            answer = web.post("/v1/completions", json=dict(prompt="A"))
            assert answer.status_code == 503 and "memory ran out" in answer.text
            answer = web.post("/v1/completions", json=dict(prompt="A", stream=True))
            assert "memory ran out" in answer.text and "[DONE]" not in answer.text
        assert web.post("/v1/completions", json=dict(prompt="A")).status_code == 200
    assert "codex-nb: the model failed: memory ran out" in capsys.readouterr().err


def test_nothing_is_generated_for_a_client_that_has_left(endless):
    with opened(endless) as (engine, served), on_a_port(engine, served) as address:
        for stream in (True, False):
            body = json.dumps(dict(prompt="A", max_tokens=100_000, temperature=0, stream=stream))
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
            head += f"{len(body)}\r\nContent-Type: application/json\r\n\r\n"
            s = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 60)
            s.sendall((head + body).encode())
            wait_until(lambda: engine.unfinished)
            if stream:
                assert s.recv(100).startswith(b"HTTP/1.1 200")
            s.close()
            wait_until(lambda: not engine.unfinished)


REFUSED = {
    "another page": (403, "no name of this server", dict(headers={"Host": "example.org"})),
    "no host": (403, "no name of this server", dict(headers={"Host": ""})),
    "a form": (415, "Content-Type", dict(headers={"Content-Type": "text/plain"})),
    "no JSON": (400, "the body is not JSON", dict(content=b"{")),
    "too much": (413, "4,194,304 bytes", dict(content=b" " * 5_000_000)),
    "tools": (400, "tools: is not supported here", dict(json=dict(prompt="a", tools=[{}]))),
    "another model": (404, "ask for 'small'", dict(json=dict(prompt="a", model="other"))),
    "too long": (400, "model's context 64", dict(json=dict(prompt="word " * 99))),
    "too many tokens": (400, "model's context has 64", dict(json=dict(prompt="a", max_tokens=64))),
    "an empty prompt": (400, "the prompt is empty", dict(json=dict(prompt=""))),
    "an unknown id": (400, "the prompt has the id 9999", dict(json=dict(prompt=[9999]))),
}


def test_what_is_refused_has_a_status_and_a_message(small_model, monkeypatch):
    faults, lines = [], []
    with opened(small_model) as (engine, served):
        guard = Guard(make_app(engine, served), log=lines.append, report=faults.append)
        web = TestClient(guard, "http://127.0.0.1:8000", raise_server_exceptions=False)
        for name, (status, message, given) in REFUSED.items():
            headers = {"Content-Type": "application/json"} | given.pop("headers", {})
            if "json" in given:
                given["content"] = json.dumps(given.pop("json"))
            answer = web.post("/v1/completions", headers=headers, **({"content": "{}"} | given))
            error = answer.json()["error"]
            assert (answer.status_code, message in error["message"]) == (status, True), (
                name,
                error,
            )
            assert error["type"] == "invalid_request_error"
        for method, route, status in (("GET", "/v1/completions", 405), ("GET", "/x%0A", 404)):
            answer = web.request(method, route)
            assert (
                answer.status_code == status
                and "the routes are" in answer.json()["error"]["message"]
            )
        asked = {"Origin": "http://example.org", "Access-Control-Request-Method": "POST"}
        answer = web.options("/v1/completions", headers=asked)
        assert answer.status_code == 405
        assert not any(h.startswith("access-control") for h in answer.headers)
        assert not faults

        def break_down(*given):
            raise KeyError("here")

        monkeypatch.setattr(server, "make_jobs", break_down)
        answer = web.post("/v1/completions", json=dict(prompt="a"))
        assert answer.status_code == 500 and "a fault of the server" in answer.text
        assert answer.json()["error"]["type"] == "server_error" and len(faults) == 1
    assert len(lines) == len(REFUSED) + 4 and not any("word" in line for line in lines)


def test_a_token_is_asked_for(small_model, no_network):
    import openai

    with opened(small_model) as (engine, served):
        with on_a_port(engine, served, token=SECRET) as address:
            given = dict(model="small", messages=TALK, seed=1, max_tokens=2)
            assert client(address, SECRET).chat.completions.create(**given).choices
            for key in ("none", SECRET[:-1], SECRET + "x"):
                with pytest.raises(openai.AuthenticationError):
                    client(address, key).chat.completions.create(**given)
            with pytest.raises(openai.BadRequestError, match="tools: is not supported here") as e:
                client(address, SECRET).chat.completions.create(**given, tools=[{"a": 1}])
            assert e.value.param == "tools"
            with pytest.raises(openai.NotFoundError, match="ask for 'small'"):
                client(address, SECRET).models.retrieve("other")


def test_a_token_is_no_option_and_others_are_let_in_with_one_only(small_model, tmp_path):
    done = codex("serve", small_model, "--host", "192.0.2.1", home=tmp_path)
    assert done.returncode == 1 and "set CODEX_NB_TOKEN or give --token-file" in done.stderr
    done = codex("serve", small_model, home=tmp_path, **{"CODEX_NB_TOKEN": "short"})
    assert done.returncode == 1 and "give at least 16 letters" in done.stderr
    done = codex("serve", small_model, "--token", SECRET, home=tmp_path)
    assert done.returncode == 2 and "No such option" in done.stderr


def serve(folder, port, home, *words):
    "The command as a process, once it answers; its output goes into files."
    process = start("codex-nb", "serve", folder, "--port", port, "--device", "cpu", *words,
                    home=home, fresh=False)  # fmt: skip

    def answers():
        assert process.poll() is None, process.communicate()
        try:
            address = f"http://127.0.0.1:{port}/health"
            return urllib.request.urlopen(address, timeout=10).status == 200
        except OSError:
            return False

    wait_until(answers)
    return process


def test_a_server_is_killed_started_again_and_stopped_in_an_answer(endless, tmp_path, no_network):
    import openai

    port, given = (
        free_port(),
        dict(model="endless", prompt="A", seed=1, temperature=1, max_tokens=8),
    )
    first = serve(endless, port, tmp_path)
    asked = client(f"http://127.0.0.1:{port}")
    before = asked.completions.create(**given)
    taken = codex("serve", endless, "--port", port, home=tmp_path)
    message = f"--port: {port} is in use at 127.0.0.1; give another, or 0 for a free one"
    assert taken.returncode == 1 and message in taken.stderr
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    second = serve(endless, port, tmp_path, "--grace", "0.2")
    after = asked.completions.create(**given)
    assert after.choices[0].text == before.choices[0].text
    assert after.model_extra == before.model_extra and after.id != before.id
    given |= dict(temperature=0, max_tokens=100_000, stream=True)
    stream = asked.completions.create(**given)
    assert next(stream).choices
    second.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        list(stream)
    out, err = second.communicate()
    assert second.returncode == 0 and err.endswith("codex-nb: stopped\n") and "Traceback" not in err
    assert out.startswith(f"http://127.0.0.1:{port} serves endless, weights ")
    assert "try it: curl" in out
    for number, code in counts([], [(signal.SIGINT, 130)]):
        third = serve(endless, port, tmp_path)
        third.send_signal(number)
        assert third.wait(60) == code


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_the_page_chats_in_a_browser_and_reaches_nothing_else(endless, monkeypatch):
    from playwright.sync_api import expect, sync_playwright

    markup = "<img src=x onerror=alert(1)><b>bold</b>"
    monkeypatch.setattr(server, "_judged", lambda policy, text, reason: judged(text, reason))

    async def judged(text, reason):
        return text + markup, "stop"

    with opened(endless) as (engine, served), sync_playwright() as p:
        with on_a_port(engine, served, token=SECRET) as address:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page, asked, wrong = browser.new_page(), [], []
            page.on("request", lambda r: asked.append(r.url))
            page.on("pageerror", lambda e: wrong.append(str(e)))
            page.on("dialog", lambda d: wrong.append(d.message))
            page.goto(address)
            expect(page.get_by_role("alert")).to_contain_text("this server wants a token")
            page.get_by_label("Token", exact=True).fill(SECRET)
            page.get_by_label("Seed").fill("3")
            page.get_by_label("Most tokens").fill("9")
            for k in (1, 2):
                page.get_by_label("Message").fill(f"Who <i>mended</i> it {k}?")
                page.get_by_label("Message").press("Enter")
                answer = page.locator("article.assistant").nth(k - 1)
                expect(answer).to_contain_text("seed 3, ended by stop")
                expect(answer).to_contain_text(markup)
            expect(page.get_by_role("heading", name="small")).to_be_visible()
            expect(page.locator("article.user").first).to_contain_text("<i>mended</i> it 1?")
            assert page.locator("article img, article b, article i").count() == 0
            page.get_by_label("Most tokens").fill("2000000")
            page.get_by_label("Message").fill("Too much")
            page.get_by_role("button", name="Send").click()
            expect(page.get_by_role("alert")).to_contain_text("2000000 are asked for")
            expect(page.get_by_label("Message")).to_have_value("Too much")
            page.get_by_role("button", name="Begin again").click()
            assert page.locator("article").count() == 0
            browser.close()
    assert not wrong and asked and all(url.startswith((address, "data:")) for url in asked)


def test_an_answer_of_an_adapter_names_its_base(described_runs, tmp_path):
    home = described_runs / "plain"
    base, folder = (
        sorted((find(home, end) / "checkpoints").iterdir())[-1] for end in ("trained", "tuned")
    )
    alone = shutil.copytree(folder, tmp_path / "alone")
    (alone / MANIFEST).unlink()  # as from elsewhere: the base is the one that it names
    for adapter in (folder, alone):
        served = ServedModel(context=8, **_identity("a", adapter, Tokenizer(adapter, "")))
        assert served.origin()["base_digest"] == read_manifest(base).digest
        assert served.digest != served.base_digest
    served = ServedModel(context=8, **_identity("a", base, Tokenizer(base, "")))
    assert "base_digest" not in served.origin()
