"""Asking a server that is slow, busy, broken, away or not the right one: a real server on loopback says so."""

from __future__ import annotations

import email.utils
import socket
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llm_double import Double, Says, Step, said

from judges.llm_client import ChatClient, Server
from judges.llm_faults import NoAnswerError, RefusedError, retry_after
from judges.llm_meter import Prices
from online_dpo.errors import JudgeError

CHAT = [{"role": "user", "content": "A or B?"}]
KEY = "sk-very-secret-key"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("judges.llm_client.FIRST_WAIT_S", 0.01)


def client(url: str, **keys: Any) -> ChatClient:
    options: dict[str, Any] = {"model": "m", "base_url": url, "timeout_s": 5.0, "patience_s": 5.0, **keys}
    return ChatClient(Server(**options))


def first(step: Step | dict[str, Any], times: int = 1) -> Says:
    """`step` for the first `times` requests, then a sound answer."""
    return lambda request, number: step if number < times else said("A")


PASSING = {
    "busy": Step({"error": {"message": "slow down"}}, 429),
    "failing": Step("<html>Internal Server Error</html>", 500),
    "overloaded": Step({"error": {"message": "overloaded"}}, 503),
    "gateway": Step("", 502),
    "dropped": Step(drop=True),
    "cut off": Step(said("A"), cut=True),
    "half of JSON": Step('{"choices": [{"mess'),
    "an error page with status 200": Step("<html>Please log in</html>"),
    "no choices": Step({"choices": [], "usage": {}}),
    "an error with status 200": Step({"error": {"message": "upstream"}}),
}


@pytest.mark.parametrize("step", PASSING.values(), ids=PASSING.keys())
def test_what_passes_is_asked_again(step: Step) -> None:
    with Double(first(step, 2)) as server:
        asked = client(server.url)
        assert asked.ask(CHAT, max_tokens=4).text == "A"
        assert len(server.requests) == 3
        assert asked.meter.take() == {
            "calls": 1,
            "retries": 2,
            "prompt_tokens": 10,
            "completion_tokens": 2,
            "tokens": 12,
        }


def test_a_slow_answer_is_asked_for_again() -> None:
    with Double(first(Step(said("B"), delay=0.6))) as server:
        asked = client(server.url, timeout_s=0.2)
        assert asked.ask(CHAT, max_tokens=4).text == "A"
        assert asked.meter.take()["retries"] == 1


def test_an_answer_that_is_always_too_slow_abstains_for_now() -> None:
    """One hard prompt must not end a run; should all be slow, the share of abstentions that is allowed does."""
    with Double(lambda request, number: Step(said("A"), delay=0.5)) as server:
        with pytest.raises(NoAnswerError, match="no answer within the time limit") as raised:
            client(server.url, timeout_s=0.1, retries=1, patience_s=0.001).ask(CHAT, max_tokens=4)
        assert raised.value.passing
        assert len(server.requests) == 2


def test_what_never_has_a_valid_form_abstains_for_now() -> None:
    with Double(lambda request, number: Step("no JSON")) as server:
        with pytest.raises(NoAnswerError, match="the reply has no valid form") as raised:
            client(server.url, retries=2).ask(CHAT, max_tokens=4)
        assert raised.value.passing
        assert len(server.requests) == 3


def test_the_server_says_how_long_to_wait() -> None:
    with Double(first(Step({"error": {}}, 429, {"Retry-After": "0.4"}))) as server:
        client(server.url).ask(CHAT, max_tokens=4)
        assert server.times[1] - server.times[0] >= 0.4


def test_a_server_that_asks_for_no_pause_is_not_stormed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("judges.llm_client.FIRST_WAIT_S", 0.2)
    with Double(first(Step({"error": {}}, 503, {"Retry-After": "0"}))) as server:
        client(server.url).ask(CHAT, max_tokens=4)
        assert server.times[1] - server.times[0] >= 0.2


def test_a_server_that_asks_for_more_than_the_patience_ends_the_run_at_once() -> None:
    with Double(lambda request, number: Step({"error": {}}, 429, {"Retry-After": "3600"})) as server:
        with pytest.raises(JudgeError, match=r"status 429.*patience_s 5; it asks for 3600 s"):
            client(server.url).ask(CHAT, max_tokens=4)
        assert len(server.requests) == 1


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after({"retry-after": "7"}) == 7.0
    assert retry_after({}) is None
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    assert retry_after({"retry-after": "-3"}) is None
    soon = retry_after({"retry-after": email.utils.formatdate(time.time() + 90, usegmt=True)})
    assert soon is not None
    assert 80 < soon <= 90
    assert retry_after({"retry-after": email.utils.formatdate(time.time() - 90, usegmt=True)}) == 0.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_server_that_stays_away_ends_the_run_and_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(JudgeError) as raised:
        client(url, patience_s=0.3).ask(CHAT, max_tokens=4)
    message = str(raised.value)
    assert message.startswith(f"the model server {url}: ConnectError:")
    assert "what was answered is kept: run again when the server answers" in message


def test_a_server_that_fails_for_long_ends_the_run() -> None:
    with Double(lambda request, number: Step("", 500)) as server, pytest.raises(JudgeError, match="status 500"):
        client(server.url, patience_s=0.3).ask(CHAT, max_tokens=4)


def test_a_server_that_comes_back_is_waited_for() -> None:
    """Killed and started again at the same port: the request that failed meanwhile is answered."""
    with Double(first({})) as server:
        port = server.server.server_port
    asked = client(f"http://127.0.0.1:{port}/v1", patience_s=20.0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(asked.ask, CHAT, max_tokens=4)
        time.sleep(0.3)
        assert not answer.done()
        revived = Double.__new__(Double)
        _start_at(revived, port)
        with revived:
            assert answer.result(timeout=20).text == "A"
    assert asked.meter.take()["retries"] >= 1


def _start_at(double: Double, port: int) -> None:
    """`Double.__init__` at a port of our choice."""
    from http.server import ThreadingHTTPServer
    from unittest.mock import patch

    with patch("llm_double.ThreadingHTTPServer", lambda _, handler: ThreadingHTTPServer(("127.0.0.1", port), handler)):
        Double.__init__(double, lambda request, number: said("A"))


# --- what does not pass ---


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_the_server_refuses_abstains_for_good(status: int) -> None:
    step = Step({"error": {"message": "too long", "code": "context_length_exceeded"}}, status)
    with Double(lambda request, number: step) as server:
        with pytest.raises(RefusedError) as raised:
            client(server.url).ask(CHAT, max_tokens=4)
        assert raised.value.reason == "the server refused the request (context_length_exceeded)"
        assert not raised.value.passing
        assert len(server.requests) == 1


def test_a_reason_holds_no_text_of_the_servers_own() -> None:
    step = Step({"error": {"message": "your text '...' is bad", "code": "your text is bad\x1b[2J"}}, 400)
    with Double(lambda request, number: step) as server, pytest.raises(RefusedError) as raised:
        client(server.url).ask(CHAT, max_tokens=4)
    assert raised.value.reason == "the server refused the request (status 400)"


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (400, {"code": "unsupported_parameter", "message": "use max_completion_tokens"}, "use max_completion_tokens"),
        (401, {"message": "bad key"}, "status 401: it wants a key, and OPENAI_API_KEY holds none"),
        (403, {"message": "no"}, "status 403: it wants a key"),
        (402, {"message": "pay first"}, "status 402.*pay first"),
        (429, {"code": "insufficient_quota", "message": "pay first"}, "status 429.*pay first"),
        (501, {"message": "not made yet"}, "status 501.*not made yet"),
    ],
)
def test_what_would_fail_every_time_ends_the_run_at_once(status: int, error: dict[str, str], message: str) -> None:
    with Double(lambda request, number: Step({"error": error}, status)) as server:
        with pytest.raises(JudgeError, match=message):
            client(server.url).ask(CHAT, max_tokens=4)
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smol-135", "status 404: no model 'smol-135' (did you mean 'smol-135m'?)"),
        ("xyz", "status 404: no model 'xyz'; it has: smol-135m, qwen"),
        ("qwen", "status 404: it has the model and not this path: is base_url right?"),
    ],
)
def test_a_wrong_model_names_the_nearest(model: str, message: str) -> None:
    with Double(lambda request, number: Step({"error": {}}, 404), models=("smol-135m", "qwen")) as server:
        with pytest.raises(JudgeError) as raised:
            client(server.url, model=model).ask(CHAT, max_tokens=4)
        assert str(raised.value) == f"the model server {server.url}: {message}"


def test_secrets_are_in_no_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    for status in (401, 402, 500):
        padded = "x" * 150 + KEY
        with Double(lambda request, number, s=status, p=padded: Step({"error": {"message": p}}, s)) as server:  # type: ignore[misc] # defaults
            with pytest.raises(JudgeError) as raised:
                client(server.url, api_key_env="MY_KEY", patience_s=0.2).ask(CHAT, max_tokens=4)
            assert server.headers[0]["authorization"] == f"Bearer {KEY}"
        assert KEY[:8] not in "".join(traceback.format_exception(raised.value))
    assert KEY[:8] not in caplog.text
    assert "status 500" in caplog.text  # the warning of a server that is waited for


def test_a_message_holds_no_characters_that_a_terminal_obeys() -> None:
    step = Step({"error": {"message": "\x1b[2J\u202egone"}}, 402)
    with Double(lambda request, number: step) as server, pytest.raises(JudgeError) as raised:
        client(server.url).ask(CHAT, max_tokens=4)
    assert str(raised.value).isprintable()


# --- the request ---


def test_the_request_holds_what_was_asked_for_and_no_more() -> None:
    with Double(lambda request, number: said("A")) as server:
        client(server.url, seed=3, extra_body={"top_k": 1}).ask(CHAT, max_tokens=4, top_logprobs=5)
        client(server.url, temperature=None, token_limit="max_completion_tokens").ask(CHAT, max_tokens=4)  # noqa: S106
    assert server.requests[0] == {
        "model": "m", "messages": CHAT, "max_tokens": 4, "temperature": 0.0, "seed": 3, "logprobs": True,
        "top_logprobs": 5, "top_k": 1,
    }  # fmt: skip
    assert server.requests[1] == {"model": "m", "messages": CHAT, "max_completion_tokens": 4}
    assert server.requests[0]["messages"] == CHAT


def test_many_threads_share_one_client_and_everything_is_counted() -> None:
    with Double(lambda request, number: Step({}, 503) if number % 3 == 0 else said("A", tokens=(5, 1))) as server:
        asked = client(server.url, prices=Prices(2.0, 10.0))
        with ThreadPoolExecutor(16) as pool:
            texts = list(pool.map(lambda _: asked.ask(CHAT, max_tokens=4).text, range(100)))
    assert texts == ["A"] * 100
    spent = asked.meter.take()
    assert spent["calls"] == 100
    assert spent["calls"] + spent["retries"] == len(server.requests)
    assert spent["tokens"] == 600
    # 5 tokens at 2 and 1 at 10 a million: 20 millionths, a hundred times.
    assert spent["cost"] == pytest.approx(0.002)
    assert asked.meter.take() == {}


def test_prices_without_a_count_of_tokens_end_the_run() -> None:
    with Double(lambda request, number: said("A", tokens=None)) as server:
        assert client(server.url).ask(CHAT, max_tokens=4).text == "A"
        with pytest.raises(JudgeError, match="does not count tokens: the cost cannot be known"):
            client(server.url, prices=Prices(price_out=1.0)).ask(CHAT, max_tokens=4)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000/v1", "base_url must look like http://host:port/v1"),
        ("ftp://host/v1", "base_url must look like"),
        ("http://", "base_url must look like"),
        ("http://me:hunter2@host/v1", "must hold no user, password or query"),
        ("http://host/v1?key=hunter2", "must hold no user, password or query"),
    ],
)
def test_an_impossible_address_is_found_at_once_and_not_repeated(url: str, message: str) -> None:
    with pytest.raises(JudgeError, match=message) as raised:
        client(url)
    assert "hunter2" not in str(raised.value)


def test_the_address_comes_from_the_environment_and_the_official_one_needs_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(JudgeError, match=r"the environment variable OPENAI_API_KEY \(api_key_env\) holds no key"):
        ChatClient(Server(model="m"))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert ChatClient(Server(model="m")).url == "http://127.0.0.1:9/v1"


def test_a_key_that_was_named_must_be_there_and_fit_into_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JudgeError, match="the environment variable NO_SUCH_KEY"):
        client("http://127.0.0.1:9/v1", api_key_env="NO_SUCH_KEY")
    monkeypatch.setenv("ODD_KEY", "secret\u00e9\nsecret")
    with pytest.raises(JudgeError, match="ODD_KEY has characters that no header can hold") as raised:
        client("http://127.0.0.1:9/v1", api_key_env="ODD_KEY")
    assert "secret" not in str(raised.value)


def test_pauses_double_up_to_a_longest_and_are_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th is between half of and all of .01·2^k s, at most .08 s here; two clients do not wait alike."""
    monkeypatch.setattr("judges.llm_client.LONGEST_WAIT_S", 0.08)
    pauses: list[float] = []
    monkeypatch.setattr("judges.llm_client.time.sleep", lambda s: pauses.append(s) if s else None)
    for _ in range(2):
        with Double(first(Step("", 503), 6)) as server:
            client(server.url).ask(CHAT, max_tokens=4)
    longest = [0.01, 0.02, 0.04, 0.08, 0.08, 0.08]
    assert len(pauses) == 12
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest * 2, strict=True))
    assert pauses[:6] != pauses[6:]


def test_a_missing_package_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(JudgeError, match="the package 'openai' is not installed"):
        client("http://127.0.0.1:9/v1")
