"""What the SDK makes of keys and their limits, against a server of its own that asks for keys."""

import json
import os
import socket
import subprocess
import time

import httpx
import openai
import pytest

RPM, TPM = 12, 2000


@pytest.fixture(scope="module")
def limited(server, tmp_path_factory):
    """The address of a server with one limited key, and the key."""
    state = tmp_path_factory.mktemp("state")
    flags = ["--state-dir", str(state)]
    make = [server.binary, "keys", "create", "--name", "sdk", "--rpm", str(RPM), "--tpm", str(TPM), "--json"]
    made = subprocess.run([*make, *flags], check=True, capture_output=True, text=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:%d" % free.getsockname()[1]
    run = [server.binary, "run", server.model, "--addr", address, "--ctx-size", "512", *flags]
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(run, stdout=nowhere, stderr=nowhere)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"http://{address}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert process.poll() is None and time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.2)
        yield f"http://{address}/v1", json.loads(made.stdout)["key"]
    finally:
        process.terminate()
        process.wait(30)


def client(limited, retries):
    url, key = limited
    return openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=120)


def complete(client, **more):
    return client.completions.with_raw_response.create(model="", prompt="1, 2, 3,", max_tokens=1, **more)


def test_a_wrong_key_is_an_authentication_error(limited):
    url, key = limited
    for wrong in ["none", key[:-4] + "AAAA", key.replace("sk-m40-", "sk-")]:
        with pytest.raises(openai.AuthenticationError) as refused:
            client((url, wrong), 5).models.list()
        assert (refused.value.code, refused.value.type) == ("invalid_api_key", "invalid_request_error")
        assert refused.value.response.headers["www-authenticate"] == "Bearer"
    assert [model.id for model in client(limited, 0).models.list()]


def test_a_key_without_the_scope_is_denied(limited):
    with pytest.raises(openai.PermissionDeniedError) as refused:
        client(limited, 5).get("/../admin/keys", cast_to=object)
    assert (refused.value.code, refused.value.type) == ("insufficient_scope", "permission_error")


def test_too_large_a_request_is_not_tried_again(limited):
    started = time.monotonic()
    with pytest.raises(openai.RateLimitError) as refused:
        client(limited, 5).completions.create(model="", prompt="1, 2, 3,", max_tokens=300, n=8)
    assert time.monotonic() - started < 2
    assert refused.value.code == "rate_limit_exceeded"
    assert "Request too large" in refused.value.message
    assert "retry-after" not in refused.value.response.headers


def test_the_sdk_waits_as_long_as_it_is_told(limited):
    hasty, patient = client(limited, 0), client(limited, 2)
    with pytest.raises(openai.RateLimitError) as refused:
        for _ in range(3 * RPM):
            answer = complete(hasty)
            assert answer.headers["x-ratelimit-limit-requests"] == str(RPM)
            assert answer.headers["x-ratelimit-limit-tokens"] == str(TPM)
    headers = refused.value.response.headers
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.value.type == "rate_limit_error"
    wait = int(headers["retry-after-ms"]) / 1000
    assert 1 <= wait <= 60 / RPM + 1
    assert int(headers["retry-after"]) - 1 < wait <= int(headers["retry-after"])
    started = time.monotonic()
    answer = complete(patient)
    assert answer.retries_taken == 1, "one wait is enough"
    assert answer.parse().usage.completion_tokens == 1
    assert time.monotonic() - started >= wait - 0.5
