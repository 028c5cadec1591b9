//! `docs/COMPATIBILITY.md` is held to the OpenAPI document, and each of its claims is tried.

use std::{collections::BTreeSet, path::Path};

use serde_json::Value;

use crate::support::{Answer, post, served};

/// A row of the tables.
struct Row {
    parameter: String,
    is: String,
    value: Value,
}

/// An endpoint's table.
struct Table {
    path: String,
    /// A request that is answered.
    base: Value,
    rows: Vec<Row>,
}

fn tables() -> Vec<Table> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/COMPATIBILITY.md");
    let text = std::fs::read_to_string(path).unwrap();
    let json = |text: &str| {
        let text = text.trim().trim_matches('`');
        serde_json::from_str(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    };
    let mut tables: Vec<Table> = Vec::new();
    for line in text.lines() {
        if let Some(path) = line.strip_prefix("## POST ") {
            tables.push(Table { path: path.to_owned(), base: Value::Null, rows: Vec::new() });
        } else if let Some(table) = tables.last_mut() {
            if let Some(base) = line.strip_prefix("Tried with ") {
                table.base = json(base.trim_end_matches('.'));
            } else if line.starts_with("| `") {
                let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
                let [parameter, is, _, value] = cells[..] else { panic!("four cells: {line}") };
                table.rows.push(Row {
                    parameter: parameter.trim_matches('`').to_owned(),
                    is: is.to_owned(),
                    value: json(value),
                });
            }
        }
    }
    assert!(!tables.is_empty());
    tables
}

#[test]
fn the_tables_have_every_parameter_of_the_document() {
    let document = serde_json::to_value(m40llm::openapi()).unwrap();
    let tables = tables();
    let described: BTreeSet<&str> = tables.iter().map(|table| table.path.as_str()).collect();
    let paths = document["paths"].as_object().unwrap().iter();
    let others: BTreeSet<&str> = paths
        .filter(|(path, operations)| {
            path.starts_with("/v1/") && operations["post"]["requestBody"].is_object()
        })
        .map(|(path, _)| path.as_str())
        .collect();
    assert_eq!(described, others, "an endpoint has a table, and a table an endpoint");
    for table in &tables {
        let body = &document["paths"][&table.path]["post"]["requestBody"];
        let schema = body["content"]["application/json"]["schema"]["$ref"].as_str().unwrap();
        let properties = document.pointer(&format!("{}/properties", &schema[1..])).unwrap();
        let properties: BTreeSet<&str> = properties.as_object().unwrap().keys().map(String::as_str).collect();
        let rows: BTreeSet<&str> = table.rows.iter().map(|row| row.parameter.as_str()).collect();
        assert_eq!(rows.len(), table.rows.len(), "{}: a parameter has two rows", table.path);
        let missing: Vec<_> = properties.difference(&rows).collect();
        assert!(missing.is_empty(), "{}: without a row: {missing:?}", table.path);
        for row in &table.rows {
            assert!(["honoured", "ignored", "refused"].contains(&row.is.as_str()), "{}", row.is);
            let is_older_name = row.parameter.starts_with("guided_");
            let is_known = properties.contains(row.parameter.as_str()) || is_older_name;
            assert!(
                is_known || row.is != "honoured",
                "{}: {} is not in the document",
                table.path,
                row.parameter
            );
            assert!(!is_known || row.is != "refused", "{}: {} is in the document", table.path, row.parameter);
        }
    }
}

#[tokio::test]
async fn every_claim_holds() {
    let app = served();
    let mut wrong = Vec::new();
    for Table { path, base, rows } in tables() {
        let plain = post(&app, &path, &base).await;
        assert_eq!(plain.status, 200, "{path}: {}", plain.body);
        for Row { parameter, is, value } in rows {
            let mut body = base.clone();
            body[&parameter] = value;
            let answer = post(&app, &path, &body).await;
            let holds = if is == "ignored" {
                answer.status == 200 && said(&answer, &parameter) == said(&plain, &parameter)
            } else {
                answer.status == 400 && names(&answer.json()["error"], &parameter)
            };
            if !holds {
                let what = answer.body.chars().take(200).collect::<String>();
                wrong.push(format!("{path} {parameter} is {is}: {} {what}", answer.status));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// An error names the field, or a place within it.
fn names(error: &Value, parameter: &str) -> bool {
    let place = error["param"].as_str().or(error["message"].as_str()).unwrap_or_default();
    place.strip_prefix(parameter).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[', ':']))
}

/// An answer without what is another's each time, what a cache has saved, and the field where it is repeated.
fn said(answer: &Answer, parameter: &str) -> Value {
    fn strip(value: &mut Value, parameter: &str) {
        match value {
            Value::Object(object) => {
                let gone = ["id", "created", "created_at", "completed_at", "usage", parameter];
                object.retain(|key, _| !gone.contains(&key.as_str()));
                object.values_mut().for_each(|value| strip(value, parameter));
            }
            Value::Array(items) => items.iter_mut().for_each(|value| strip(value, parameter)),
            _ => {}
        }
    }
    let mut json = answer.json();
    strip(&mut json, parameter);
    json
}

/// What Swagger UI sends when it is pressed.
#[tokio::test]
async fn examples_of_the_document_are_answered() {
    let document = serde_json::to_value(m40llm::openapi()).unwrap();
    let mut tried = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        let media = &operations["post"]["requestBody"]["content"]["application/json"];
        // Without keys there are none to manage.
        if media.is_null() || path.starts_with("/admin/") {
            continue;
        }
        let schema = media["schema"]["$ref"].as_str().unwrap();
        let schema = document.pointer(&schema[1..]).unwrap();
        let example = [&media["example"], &schema["example"], &schema["examples"][0]];
        let example = example.into_iter().find(|example| !example.is_null());
        let example = example.unwrap_or_else(|| panic!("{path} has no example"));
        let answer = post(&served(), path, example).await;
        assert_eq!(answer.status, 200, "{path}: {example}: {}", answer.body);
        tried += 1;
    }
    assert!(tried >= 10, "only {tried} examples");
}
