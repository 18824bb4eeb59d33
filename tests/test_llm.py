"""The language model's reports, against a real server on this machine that misbehaves."""

from __future__ import annotations

import doctest
import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import common.llm
from common.io import CaseError
from common.lesion_reports import LesionReport, RuleReportWriter
from common.llm import OpenAIReportWriter, ReportWriterError, accept, endpoint

KEY = "sk-very-secret"
GOOD: dict[str, Any] = {
    "organ": "liver",
    "lesion": "liver tumor",
    "attributes": {
        "enhancement status": "enhanced CT,",
        "shape": "irregular",
        "density": "low density lesion",
        "density variations": "heterogeneous",
        "CT value": "61 HU",
        "surface characteristics": "ill-defined margin",
        "relationship with adjacent organs": "no close relationship with surrounding organs",
        "specific features": "presence of decreased density areas",
        "cavity": "within the parenchymal organ",
    },
    "size_mm": [24, 22, 20],
}


class Server(ThreadingHTTPServer):
    """Answers with one reply of its list after the other, the last for ever, and keeps what it was asked.

    A reply is a status and a body, or with headers; a body is bytes, or what the model says.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple] = []
        self.requests: list[dict[str, Any]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
        reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        status, content, headers = (*reply, {})[:3]
        if status == "hang":
            self.server.released.wait(10)
            return
        if not isinstance(content, bytes):
            said = {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
            content = json.dumps(said).encode()
        self.send_response(200 if status == "drip" else status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        for byte in content if status == "drip" else ():
            if self.server.released.wait(0.05):
                return
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
        if status != "drip":
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No environment of the user's, and no waiting: the waits asked for."""
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    waits: list[float] = []
    monkeypatch.setattr(common.llm.time, "sleep", waits.append)
    return waits


def writer(server: Server, *replies: tuple, **settings: Any) -> OpenAIReportWriter:
    server.replies = list(replies)
    return OpenAIReportWriter(**{"base_url": server.url, "model": "m", "key": KEY, "fallback": False} | settings)


def said(**changes: Any) -> str:
    return json.dumps({"lesions": [{**GOOD, **changes}]})


def test_examples():
    assert doctest.testmod(common.llm).failed == 0


def test_a_good_answer(server):
    report = writer(server, (200, said()))(LesionReport("liver"), seed=5, extent_mm=(200, 180, 150))
    assert (report.organ, report.lesion, report.source) == ("liver", "liver tumor", "llm")
    assert report.size_mm == (24, 22, 20)
    assert report.attributes["density"] == "hypodense lesion"
    assert report.attributes["CT value"] == "61 HU"
    (asked,) = server.requests
    assert asked["path"] == "/v1/chat/completions"
    assert asked["key"] == f"Bearer {KEY}"
    assert asked["response_format"] == {"type": "json_object"}
    assert (asked["model"], asked["seed"]) == ("m", 5)
    prompt = " ".join(message["content"] for message in asked["messages"])
    for word in ("liver", "[200, 180, 150]", "hypodense lesion", "within the parenchymal organ", "size_mm"):
        assert word in prompt
    assert KEY not in prompt


@pytest.mark.parametrize(
    "text", [f"```json\n{said()}\n```", f"```\n{said()}```", f"Sure!\n{said()}\nDone.", json.dumps(GOOD)]
)
def test_code_fences_and_small_talk(server, text):
    assert writer(server, (200, text), retries=0)(LesionReport("liver"), seed=0).source == "llm"


def test_what_the_user_says_wins(server):
    wish = LesionReport(
        "liver", "liver cyst", {"density": "hyperdense lesion", "shape": "cystic"}, (9.0, 8.0, 7.0), "upper"
    )
    answer = said(attributes={**GOOD["attributes"], "density": "isodense lesion", "shape": "a star"})
    report = writer(server, (200, answer), retries=0)(wish, seed=0)
    assert (report.lesion, report.size_mm, report.location) == ("liver cyst", (9, 8, 7), "upper")
    assert wish.attributes.items() <= report.attributes.items()
    assert report.attributes["surface characteristics"] == "ill-defined margin", "the rest is the model's"
    prompt = server.requests[0]["messages"][1]["content"]
    assert '"density": "hyperdense lesion"' in prompt
    assert "[9.0, 8.0, 7.0]" in prompt


def test_what_the_model_leaves_out_is_drawn(server):
    """The reference's training fails on reports of language models, which lack the CT value."""
    short = {key: value for key, value in GOOD["attributes"].items() if key != "CT value"}
    report = writer(server, (200, said(attributes=short)))(LesionReport("liver"), seed=0)
    assert report.attributes["CT value"].endswith(" HU")
    assert report.source == "llm"


FAULTS = {
    "500": (500, b"oops"),
    "503": (503, b""),
    "429": (429, b"slow down"),
    "no json": (200, b"<html>proxy</html>"),
    "other json": (200, b'{"error": "none"}'),
    "no choices": (200, b'{"choices": []}'),
    "null": (200, None),
    "cut off": (200, said()[:90]),
    "body cut off": (200, b'{"choices": [{"message"', {"Content-Length": "4000"}),
    "prose": (200, "I cannot help with that."),
    "list": (200, "[1]"),
    "schema": (200, said(sise=3)),
    "no organ": (200, json.dumps({"lesions": [{"size_mm": [1, 2, 3]}]})),
    "wrong organ": (200, said(organ="spleen", lesion="")),
    "unknown organ": (200, said(organ="elbow")),
    "two lesions": (200, json.dumps({"lesions": [GOOD, GOOD]})),
    "oversize": (200, said(size_mm=[24, 300, 20])),
    "no size": (200, said(size_mm=None)),
    "zero size": (200, said(size_mm=[0, 1, 1])),
    "words": (200, said(attributes={"density": "very dark"})),
    "cavity": (200, said(attributes={"cavity": "wall thickening"})),
    "ct value": (200, said(attributes={"CT value": "dark"})),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_and_then_a_good_answer(server, quick, fault):
    report = writer(server, FAULTS[fault], (200, said()))(LesionReport("liver"), seed=0, extent_mm=(200, 180, 150))
    assert report.source == "llm"
    assert report.size_mm == (24, 22, 20)
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays(server, caplog, fault):
    call = {"seed": 3, "extent_mm": (200, 180, 150)}
    with pytest.raises(ReportWriterError, match="3 tries"):
        writer(server, FAULTS[fault], retries=2)(LesionReport("liver"), **call)
    assert len(server.requests) == 3
    with caplog.at_level(logging.WARNING):
        report = writer(server, FAULTS[fault], retries=0, fallback=True)(LesionReport("liver"), **call)
    assert report == RuleReportWriter()(LesionReport("liver"), **call)
    assert report.source == "rules"
    assert "the rules write this report of a lesion in liver" in caplog.text


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("wrong organ", ["liver", "spleen"]),
        ("oversize", ["24 x 300 x 20 mm", "200 x 180 x 150"]),
        ("words", ["'very dark'", "density"]),
        ("schema", ["lesions[0].sise", "size_mm"]),
        ("cavity", ["within the parenchymal organ"]),
        ("cut off", ["cut off"]),
    ],
)
def test_the_model_is_told_what_was_wrong(server, quick, fault, words):
    writer(server, FAULTS[fault], (200, said()))(LesionReport("liver"), seed=0, extent_mm=(200, 180, 150))
    answer, complaint = server.requests[1]["messages"][2:]
    assert (answer["role"], answer["content"]) == ("assistant", FAULTS[fault][1])
    assert complaint["role"] == "user"
    for word in words:
        assert word in complaint["content"]
    assert quick == [], "no need to wait before asking better"


def test_waits_grow_and_a_server_may_ask_for_its_own(server, quick):
    writer(server, (500, b""), (502, b""), (429, b"", {"Retry-After": "7"}), (200, said()))(
        LesionReport("liver"), seed=0
    )
    assert quick == [1.0, 2.0, 7.0]
    quick.clear()
    writer(server, (429, b"", {"Retry-After": "86400"}), (503, b"", {"Retry-After": "soon"}), (200, said()))(
        LesionReport("liver"), seed=0
    )
    assert quick == [60.0, 2.0]


def test_no_wait_after_the_last_try(server, quick):
    with pytest.raises(ReportWriterError):
        writer(server, (500, b""), retries=1)(LesionReport("liver"), seed=0)
    assert quick == [1.0]


@pytest.mark.parametrize("kind", ["hang", "drip"])
def test_time_outs(server, kind):
    """Also one that sends a byte now and then, which no time-out of a socket ends."""
    start = time.monotonic()
    with pytest.raises(ReportWriterError, match="timed out"):
        writer(server, (kind, said()), timeout=0.3, retries=1)(LesionReport("liver"), seed=0)
    assert time.monotonic() - start < 5
    assert writer(server, (kind, said()), (200, said()), timeout=0.3)(LesionReport("liver"), seed=0).source == "llm"


def test_an_endless_answer(server):
    with pytest.raises(ReportWriterError, match="far more"):
        writer(server, (200, b"x" * 2**21), retries=0)(LesionReport("liver"), seed=0)


def test_nobody_answers():
    lost = OpenAIReportWriter("http://127.0.0.1:9", "m", retries=1, fallback=False)
    with pytest.raises(ReportWriterError, match="does not answer"):
        lost(LesionReport("liver"), seed=0)


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "base_url and model"), (400, "supports")],
)
def test_our_own_faults_are_not_repeated(server, quick, status, advice):
    reply = (status, json.dumps({"error": {"message": f"bad key {KEY}"}}).encode())
    with pytest.raises(ReportWriterError, match=advice) as error:
        writer(server, reply)(LesionReport("liver"), seed=0)
    assert f"status {status}" in str(error.value)
    assert len(server.requests) == 1
    assert quick == []


def test_the_key_is_never_told(server, caplog):
    with caplog.at_level(logging.DEBUG):
        for status in (401, 500):
            model = writer(server, (status, f"bad {KEY}".encode()), fallback=True, retries=1)
            model(LesionReport("liver"), seed=0)
            with pytest.raises(ReportWriterError) as error:
                writer(server, (status, f"bad {KEY}".encode()), retries=1)(LesionReport("liver"), seed=0)
            assert KEY not in f"{error.value} {error.value.__cause__} {model} {model!r}"
            assert "***" in str(error.value)
        writer(server, (200, f"no JSON, but {KEY}"), fallback=True, retries=0)(LesionReport("liver"), seed=0)
    assert caplog.text
    assert KEY not in caplog.text


def test_the_key_stays_with_its_host(server):
    other = Server()
    threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
    other.replies = [(200, said())]
    moved = (302, b"", {"Location": f"http://localhost:{other.server_port}/v1/chat/completions"})
    with pytest.raises(ReportWriterError):
        writer(server, moved, retries=0)(LesionReport("liver"), seed=0)
    assert all(request["key"] is None for request in other.requests)
    other.shutdown()
    other.server_close()


def test_without_a_key(server):
    writer(server, (200, said()), key="")(LesionReport("liver"), seed=0)
    assert server.requests[0]["key"] is None


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/chat/completions/"])
def test_the_path_is_not_doubled(server, path):
    """The reference takes the whole endpoint for the base URL and asks for .../chat/completions/chat/completions."""
    writer(server, (200, said()), base_url=server.url + path)(LesionReport("liver"), seed=0)
    assert server.requests[0]["path"] == "/v1/chat/completions"


def test_other_paths_stay():
    assert endpoint("https://x.org/v1beta/openai/") == "https://x.org/v1beta/openai/chat/completions"
    assert endpoint("https://x.org/a?api-version=2") == "https://x.org/a/chat/completions?api-version=2"


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "http://", f"https://me:{KEY}@x.org/v1"])
def test_wrong_urls(url):
    with pytest.raises(ValueError, match="base_url must be http") as error:
        OpenAIReportWriter(url, "m")
    assert KEY not in str(error.value)


def test_settings_of_the_environment(server, monkeypatch):
    with pytest.raises(ValueError, match="OPENAI_MODEL"):
        OpenAIReportWriter()
    with pytest.raises(ValueError, match="timeout 0"):
        OpenAIReportWriter(model="m", timeout=0)
    assert OpenAIReportWriter(model="m").url == "https://api.openai.com/v1/chat/completions"
    for name, value in {"BASE_URL": server.url, "API_KEY": KEY, "MODEL": "other"}.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    server.replies = [(200, said())]
    OpenAIReportWriter()(LesionReport("liver"), seed=0)
    assert (server.requests[0]["model"], server.requests[0]["key"]) == ("other", f"Bearer {KEY}")


def test_impossible_wishes_are_refused_before_anybody_is_asked(server):
    model = writer(server, (200, said()), fallback=True)
    with pytest.raises(CaseError, match="not in the scan"):
        model(LesionReport("liver"), seed=0, present=[1])
    with pytest.raises(CaseError, match="does not fit"):
        model(LesionReport("liver", size_mm=(50, 50, 50)), seed=0, extent_mm=(40, 40, 40))
    assert server.requests == []


def test_both_writers_are_called_alike(server):
    call = {"seed": 1, "present": [5, 104], "extent_mm": (200.0, 180.0, 150.0)}
    for write, source in ((RuleReportWriter(), "rules"), (writer(server, (200, said())), "llm")):
        report = write(LesionReport("liver"), **call)
        assert (report.organ, report.source) == ("liver", source)


def test_an_answer_may_name_an_organ_by_an_alias():
    wish = LesionReport("urinary bladder")
    answer = {"organ": "Bladder", "lesion": "cancer", "size_mm": [9, 9, 9]}
    assert accept(json.dumps(answer), wish).lesion == "bladder cancer"
    lobes = LesionReport("lung upper lobe left", organs=("lung upper lobe left", "lung lower lobe left"))
    assert accept(json.dumps({"organ": "left lower lobe", "size_mm": [9, 9, 9]}), lobes).organs == lobes.organs
