"""docs/COMPATIBILITY.md names the versions that run here."""

import json
import re
from pathlib import Path

CLIENTS = Path(__file__).parents[1]
TABLE = CLIENTS.parents[1] / "docs" / "COMPATIBILITY.md"


def test_the_table_of_tested_clients_has_the_pinned_versions():
    pinned = dict(json.loads((CLIENTS / "node" / "package.json").read_text())["dependencies"])
    node_openai = pinned.pop("openai")
    pinned.pop("zod")
    requirements = (CLIENTS / "requirements.txt").read_text()
    python = dict(re.findall(r"^([\w-]+)==(.+)$", requirements, re.M))
    pinned |= {name: python[name] for name in ("openai", "langchain-openai", "litellm", "anthropic", "schemathesis")}
    harness = (CLIENTS / "lm_eval" / "requirements.txt").read_text()
    pinned |= re.findall(r"^(lm-eval)\[api\]==(.+)$", harness, re.M)
    text = TABLE.read_text(encoding="utf-8")
    told = set(re.findall(r"`([\w/@-]+)`\)? (?:\| )?(\d+\.\d+\.\d+)", text))
    assert told == {*pinned.items(), ("openai", node_openai)}
