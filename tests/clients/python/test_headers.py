"""Request ids, timings and CORS."""

import pytest

CHAT = "/v1/chat/completions"
LOOPBACK = ["http://localhost:3000", "http://127.0.0.1:5173", "https://localhost", "http://[::1]:8080"]
FOREIGN = ["https://example.com", "http://localhost.example.com", "http://127.0.0.1.example.com", "null", "http://10.0.0.1"]


def test_request_ids_are_made(http):
    ids = {http.get("/health").headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nope"])
def test_a_sane_request_id_is_echoed(http, path):
    answer = http.get(path, headers={"x-request-id": "trace-4bf92f35.77_a"})
    assert answer.headers["x-request-id"] == "trace-4bf92f35.77_a"


@pytest.mark.parametrize("id_", ["x" * 2000, "a b<script>", ""], ids=["long", "odd", "empty"])
def test_an_odd_request_id_is_replaced(http, id_):
    answer = http.get("/health", headers={"x-request-id": id_})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] not in (id_, "")


def test_the_sdk_sees_the_request_id(client):
    raw = client.chat.completions.with_raw_response.create(
        model="", messages=[{"role": "user", "content": "Hi"}], max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse()._request_id == "mine-1"


def test_processing_time_is_told(http):
    answer = http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 4})
    assert float(answer.headers["openai-processing-ms"]) > 0


def preflight(http, origin):
    asked = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
    return http.options(
        CHAT,
        headers={"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": asked},
    )


@pytest.mark.parametrize("origin", LOOPBACK)
def test_preflight_from_a_loopback_page(http, origin):
    answer = preflight(http, origin)
    assert answer.status_code in (200, 204)
    assert answer.headers["access-control-allow-origin"] == origin
    allowed = {name.strip().lower() for name in answer.headers["access-control-allow-headers"].split(",")}
    assert {"authorization", "content-type", "x-stainless-lang", "x-stainless-retry-count"} <= allowed
    methods = {name.strip() for name in answer.headers["access-control-allow-methods"].split(",")}
    assert "POST" in methods
    assert "origin" in answer.headers["vary"].lower()


@pytest.mark.parametrize("origin", FOREIGN)
def test_no_permission_for_a_foreign_page(http, origin):
    assert "access-control-allow-origin" not in preflight(http, origin).headers
    assert "access-control-allow-origin" not in http.get("/v1/models", headers={"origin": origin}).headers


def test_ids_are_exposed_to_pages(http):
    answer = http.get("/v1/models", headers={"origin": LOOPBACK[0]})
    assert answer.headers["access-control-allow-origin"] == LOOPBACK[0]
    exposed = {name.strip().lower() for name in answer.headers["access-control-expose-headers"].split(",")}
    assert "x-request-id" in exposed
    # Errors are readable by a page too.
    assert http.get("/nope", headers={"origin": LOOPBACK[0]}).headers["access-control-allow-origin"] == LOOPBACK[0]
