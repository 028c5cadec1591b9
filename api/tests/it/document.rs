//! The OpenAPI document: the file, the routes and the structure agree.

use std::{collections::BTreeSet, path::Path};

use serde_json::{Value, json};

use crate::support::{get, loading};

fn document() -> Value {
    serde_json::to_value(m40llm::openapi()).unwrap()
}

#[test]
fn the_file_is_the_output() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../openapi/openapi.json");
    let file = std::fs::read_to_string(&path).unwrap();
    let ours = m40llm::openapi().to_pretty_json().unwrap() + "\n";
    assert!(file == ours, "openapi/openapi.json is stale: `m40llm openapi > openapi/openapi.json`");
}

#[tokio::test]
async fn the_route_serves_it() {
    let answer = get(&loading(), "/openapi.json").await;
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.json(), document());
}

#[test]
fn every_route_is_in_it_with_its_security() {
    let document = document();
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["components"]["securitySchemes"]["ApiKey"]["scheme"], "bearer");
    let open = json!([{}]);
    let keyed = json!([{"ApiKey": []}, {}]);
    let always_keyed = json!([{"ApiKey": []}]);
    let expected = [
        ("/v1/chat/completions", "post", &keyed),
        ("/v1/completions", "post", &keyed),
        ("/v1/embeddings", "post", &keyed),
        ("/v1/responses", "post", &keyed),
        ("/v1/messages", "post", &keyed),
        ("/v1/messages/count_tokens", "post", &keyed),
        ("/v1/models", "get", &keyed),
        ("/v1/models/{id}", "get", &keyed),
        ("/generate", "post", &keyed),
        ("/tokenize", "post", &keyed),
        ("/tokenizer_info", "get", &keyed),
        ("/detokenize", "post", &keyed),
        ("/apply-template", "post", &keyed),
        ("/health", "get", &open),
        ("/metrics", "get", &keyed),
        ("/openapi.json", "get", &open),
        ("/", "get", &open),
        ("/docs", "get", &open),
        ("/v1/usage", "get", &keyed),
        ("/admin/keys", "get", &always_keyed),
        ("/admin/keys", "post", &always_keyed),
        ("/admin/keys/{id}", "delete", &always_keyed),
        ("/admin/usage", "get", &always_keyed),
        ("/admin/drop-old-secrets", "post", &always_keyed),
        ("/admin/rotate-secret", "post", &always_keyed),
    ];
    let paths: BTreeSet<_> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(paths, expected.iter().map(|(path, ..)| *path).collect());
    for (path, method, security) in expected {
        let operation = &document["paths"][path][method];
        assert_eq!(&operation["security"], security, "{path}");
        assert!(operation["summary"].is_string() && operation["operationId"].is_string(), "{path}");
        let has = |status: &str| operation["responses"].get(status).is_some();
        assert!(has("200") || has("201"), "{path}");
        if security != &open {
            for status in ["401", "403", "500"] {
                assert!(has(status), "{path} {status}");
            }
        }
        if method == "post" {
            for status in ["400", "408", "413", "415"] {
                assert_eq!(
                    has(status),
                    operation["requestBody"].is_object() || status == "400",
                    "{path} {status}"
                );
            }
            assert_eq!(has("503"), security == &keyed, "{path}: only work waits for the model");
        }
    }
}

#[test]
fn references_resolve() {
    let document = document();
    let mut seen = 0;
    walk(&document, &mut |object| {
        if let Some(Value::String(reference)) = object.get("$ref") {
            seen += 1;
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
        }
    });
    assert!(seen > 50, "only {seen} references");
}

#[test]
fn every_schema_and_field_is_described() {
    let document = document();
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        assert!(schema["description"].is_string(), "{name}");
        for (field, schema) in schema["properties"].as_object().into_iter().flatten() {
            // An optional reference is a choice between it and null, and described within.
            let described = [&schema["description"], &schema["oneOf"][0]["description"]];
            assert!(described.iter().any(|d| d.is_string()), "{name}.{field}");
        }
    }
}

fn walk(value: &Value, visit: &mut impl FnMut(&serde_json::Map<String, Value>)) {
    match value {
        Value::Object(object) => {
            visit(object);
            object.values().for_each(|value| walk(value, visit));
        }
        Value::Array(items) => items.iter().for_each(|value| walk(value, visit)),
        _ => {}
    }
}
