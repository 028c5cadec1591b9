"""What schemathesis is told about this API beside its document. Two failures are left out, each for the reason
that `filter_failure` gives; no other response is kept from a check.

run.sh sets TEST_BINARY and TEST_STATE, the state directory of a server that asks for keys.
"""

import json
import os
import subprocess
import time

import schemathesis
from schemathesis.core.failures import ServerError
from schemathesis.openapi.checks import MissingHeaderNotRejected

LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
ERROR = {"$ref": "#/components/schemas/ErrorBody"}


@schemathesis.auth()
class Key:
    """A key that may do everything, and another when a request with it comes back as 401.

    That happens: revoking keys is among what is tried.
    """

    def get(self, case, context) -> str:
        create = [os.environ["TEST_BINARY"], "keys", "create", "--name", "schemathesis", "--json"]
        scopes = ["--scope", "inference", "--scope", "metrics", "--scope", "admin"]
        made = subprocess.run(
            [*create, *scopes, "--state-dir", os.environ["TEST_STATE"]], check=True, capture_output=True, text=True
        )
        time.sleep(1)  # by when a running server knows it
        return json.loads(made.stdout)["key"]

    def set(self, case, key: str, context) -> None:
        case.headers["Authorization"] = f"Bearer {key}"


@schemathesis.hook
def before_load_schema(context, raw_schema: dict) -> None:
    """Says in JSON Schema what the document says of streams by custom.

    There, as in OpenAI's own document, a stream's schema is that of the JSON in one event or line. Without
    this, an event itself would be held against it. Every event is checked: it is that JSON, an error (and
    then the last), or the closing `[DONE]`.
    """
    for path in raw_schema["paths"].values():
        for operation in path.values():
            for response in operation.get("responses", {}).values():
                content = response.get("content", {})
                for media, wrap in (("text/event-stream", event), ("application/x-ndjson", lines)):
                    if media in content:
                        content[media]["schema"] = wrap({"anyOf": [content[media]["schema"], ERROR]})


def event(payload: dict) -> dict:
    parsed = {"type": "string", "contentMediaType": "application/json", "contentSchema": payload}
    return {
        "type": "object",
        "properties": {"data": {"if": {"const": "[DONE]"}, "else": parsed}},
        "required": ["data"],
    }


def lines(payload: dict) -> dict:
    return {"type": "array", "items": payload, "minItems": 1}


@schemathesis.deserializer("application/x-ndjson")
def ndjson(context, response) -> list:
    text = response.content.decode()
    if not text.endswith("\n"):
        raise ValueError("the last line has no end")
    return [json.loads(line) for line in text.split("\n")[:-1]]


@schemathesis.hook
def map_body(context, body):
    """Outputs of at most eight tokens, so that many requests fit into the time.

    Values that are no counts stay as they are, to be refused; ../python has the long ones and the absent.
    """
    if not isinstance(body, dict) or not {"messages", "prompt", "input"} & set(body):
        return body
    asked = [name for name in LENGTHS if name in body] or ["max_tokens" if "input" not in body else "max_output_tokens"]
    return body | {name: 8 for name in asked if is_long(body.get(name))}


def is_long(count) -> bool:
    return count is None or (isinstance(count, int | float) and not isinstance(count, bool) and count > 8)


@schemathesis.hook
def filter_failure(context, failure, case, response) -> bool:
    """Two right answers that checks take for wrong ones.

    429 is as good an answer as 401 to who comes without a key, and comes too often: `missing_required_header`
    knows 401 only. And `max_wait_ms` asks for a 503 when the wait would be longer.
    """
    throttled = response.status_code == 429 and "without a valid API key" in response.text
    asked_for = response.status_code == 503 and '"message":"max_wait_ms: ' in response.text
    return not (
        (throttled and isinstance(failure, MissingHeaderNotRejected))
        or (asked_for and isinstance(failure, ServerError))
    )
