"""What describes the server: models, health, metrics, the OpenAPI document, the documentation page."""

import json
import re
import subprocess
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import openapi_spec_validator
import pytest
from prometheus_client.parser import text_string_to_metric_families

ROUTES = {
    "/v1/chat/completions": "post", "/v1/completions": "post", "/v1/models": "get", "/v1/models/{id}": "get",
    "/generate": "post", "/tokenize": "post", "/detokenize": "post", "/apply-template": "post", "/health": "get",
    "/metrics": "get", "/openapi.json": "get", "/docs": "get",
}  # fmt: skip


def test_models(client, server):
    (model,) = client.models.list().data
    assert model.id == server.model_id
    assert model.object == "model"
    assert model.owned_by
    assert client.models.retrieve(model.id) == model


def test_models_raw(http, server):
    first, second = http.get("/v1/models").json(), http.get("/v1/models").json()
    assert first == second
    assert first["object"] == "list"
    (entry,) = first["data"]
    assert http.get(f"/v1/models/{server.model_id}").json() == entry
    assert isinstance(entry["created"], int) and entry["created"] > 0
    meta = entry["meta"]
    flat = json.dumps(meta)
    assert server.ctx in meta.values(), flat
    assert [value for value in meta.values() if isinstance(value, int) and value > 100_000_000], flat
    assert re.search(r"Q4_|Q8_0|F16|Q5_|Q6_K", flat), flat


def test_health(http):
    answer = http.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok"}


def test_the_binary_asks_for_health(server):
    asked = subprocess.run([server.binary, "health", "--addr", server.url.removeprefix("http://")], capture_output=True)
    assert asked.returncode == 0, asked.stderr
    nobody = subprocess.run([server.binary, "health", "--addr", "127.0.0.1:9"], capture_output=True)
    assert nobody.returncode == 1
    assert len(nobody.stderr.decode().splitlines()) == 1


def samples(http) -> dict[str, float]:
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = list(text_string_to_metric_families(answer.text))
    assert families
    for family in families:
        assert family.documentation, f"{family.name} has no HELP"
        assert family.type != "unknown", f"{family.name} has no TYPE"
    values: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0) + sample.value
    return values


def test_metrics_parse_and_count(http):
    before = samples(http)
    assert all(name.startswith(("m40llm_", "process_")) for name in before)
    http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3}).raise_for_status()
    after = samples(http)
    grown = {name for name in after if after[name] > before.get(name, 0)}
    assert [name for name in grown if "request" in name], grown
    assert [name for name in grown if "token" in name], grown


@pytest.fixture(scope="module")
def document(http) -> dict:
    answer = http.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/json")
    return answer.json()


def test_the_document_is_openapi_3_1(document):
    assert document["openapi"].startswith("3.1")
    openapi_spec_validator.validate(document)


def test_the_document_is_the_committed_one_and_the_binarys(document, server):
    committed = Path(__file__).parents[3] / "openapi" / "openapi.json"
    printed = subprocess.run([server.binary, "openapi"], capture_output=True, check=True).stdout
    assert json.loads(committed.read_text(encoding="utf-8")) == document
    assert json.loads(printed) == document


def test_every_route_is_documented_with_its_security(document):
    schemes = document["components"]["securitySchemes"]
    assert [scheme for scheme in schemes.values() if scheme["type"] == "http" and scheme["scheme"] == "bearer"]
    for path, method in ROUTES.items():
        operation = document["paths"][path][method]
        assert operation.get("summary") or operation.get("description"), path
        security = operation.get("security", document.get("security"))
        assert security is not None, f"{path} says nothing of its security"
        if path != "/health":
            assert any(set(choice) & set(schemes) for choice in security) or path in ("/docs", "/openapi.json"), path
        codes = set(operation["responses"])
        assert "200" in codes, path
        if method == "post":
            assert "400" in codes, path
    ids = [operation["operationId"] for item in document["paths"].values() for operation in item.values()]
    assert len(ids) == len(set(ids))


def test_examples_in_the_document_are_accepted(http, document, server):
    """What 'Try it out' sends is a request that works."""
    for path, method in ROUTES.items():
        content = document["paths"][path][method].get("requestBody", {}).get("content", {})
        media = content.get("application/json", {})
        examples = [media["example"]] if "example" in media else [e["value"] for e in media.get("examples", {}).values()]
        for example in examples:
            example = {key: value for key, value in example.items() if key != "model"}
            with http.stream(method.upper(), path, json=example) as answer:
                assert answer.status_code == 200, (path, example, answer.read())


def test_docs_need_nothing_from_elsewhere(http, server):
    page = http.get("/docs", follow_redirects=True)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assets = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert [asset for asset in assets if asset.endswith(".js")]
    texts = [page.text]
    for asset in assets:
        url = urljoin(str(page.url), asset)
        assert urlsplit(url).netloc == urlsplit(server.url).netloc, asset
        answer = http.get(url)
        assert answer.status_code == 200, asset
        if asset.endswith("initializer.js"):
            texts.append(answer.text)
    for text in texts:
        assert not re.search(r'["\'(]https?://(?!localhost|127\.0\.0\.1)', text)
