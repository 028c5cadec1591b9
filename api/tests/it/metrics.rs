//! `/metrics`, its page in docs/METRICS.md and the dashboard say the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use axum::{Router, body::Body, http::Method};
use m40llm::{AppState, ServerConfig, observe::Refusal};
use m40llm_engine::EngineConfig;
use serde_json::{Value, json};

use crate::{
    source::{self, Pace},
    support::{MODEL, get, post, request, send},
};

fn document(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn state() -> AppState {
    let state = AppState::loading(ServerConfig::new(MODEL, 1_700_000_000));
    let config = EngineConfig { ctx_size: Some(64), ..EngineConfig::default() };
    state.set_engine(source::engine(&config, Pace::default()));
    state
}

/// A family's type, labels and meaning.
type Family = (String, BTreeSet<String>, String);

/// The families of a page in the Prometheus text format.
fn families(page: &str) -> BTreeMap<String, Family> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    for line in page.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            current = String::from(name);
            let new = families.insert(current.clone(), (String::new(), BTreeSet::new(), help.to_owned()));
            assert!(new.is_none(), "{name} comes twice");
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            assert_eq!(name, current);
            families.get_mut(name).unwrap().0 = String::from(kind);
        } else {
            let family = families.get_mut(&current).expect("a sample after its family's head");
            let name = line.split(['{', ' ']).next().unwrap();
            let suffix = name.strip_prefix(&current).unwrap_or_else(|| panic!("{line} under {current}"));
            let allowed: &[&str] =
                if family.0 == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(allowed.contains(&suffix), "{line}");
            let labels = line.split_once('{').map_or("", |(_, rest)| rest.split_once('}').unwrap().0);
            let names = labels
                .split("\",")
                .filter_map(|label| label.split_once('='))
                .map(|(name, _)| name.to_owned());
            family.1.extend(names);
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap_or_else(|e| panic!("{line}: {e}"));
        }
    }
    families
}

/// The rows of the table whose first cell is a metric's name.
fn documented() -> BTreeMap<String, Family> {
    let text = document("METRICS.md");
    let names = |cell: &str| cell.split('`').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>();
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |"));
    let rows =
        rows.map(|row| row.split('|').map(str::trim).collect::<Vec<_>>()).filter(|cells| cells.len() == 4);
    rows.map(|cells| {
        let name = cells[0].trim_end_matches('`').to_owned();
        (name, (cells[1].to_owned(), names(cells[2]).into_iter().collect(), cells[3].to_owned()))
    })
    .collect()
}

#[tokio::test]
async fn the_page_and_its_description_are_equal() {
    let app = m40llm::app(state());
    get(&app, "/health").await;
    let page = get(&app, "/metrics").await.body;
    let (found, written) = (families(&page), documented());
    assert!(written.len() > 20, "{written:?}");
    for (name, family) in &found {
        assert_eq!(Some(family), written.get(name), "{name} in docs/METRICS.md");
    }
    assert_eq!(found.len(), written.len(), "docs/METRICS.md has metrics that there are not: {written:?}");
    let build = format!(
        "\nm40llm_build_info{{version=\"{}\",revision=\"{}\",cuda=\"{}\"}} 1\n",
        env!("CARGO_PKG_VERSION"),
        option_env!("M40LLM_REVISION").unwrap_or(""),
        cfg!(feature = "cuda")
    );
    assert!(page.contains(&build), "{build}");
    // Words of ours that label samples are listed too.
    let text = document("METRICS.md");
    for label in ["outcome", "reason", "kind", "result"] {
        let needle = format!("{label}=\"");
        let values: BTreeSet<&str> =
            page.lines().filter_map(|line| Some(line.split_once(&needle)?.1.split_once('"')?.0)).collect();
        let row = text.lines().find(|line| line.starts_with(&format!("| `{label}` |"))).unwrap();
        let listed: BTreeSet<&str> = row.split('`').skip(3).step_by(2).collect();
        assert_eq!(values, listed, "{label}");
    }
}

/// Every string under a key of this name.
fn strings<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                match value.as_str() {
                    Some(text) if name == key => found.push(text),
                    _ => strings(value, key, found),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| strings(value, key, found)),
        _ => {}
    }
}

#[tokio::test]
async fn the_dashboard_asks_for_metrics_that_there_are() {
    let page = get(&m40llm::app(state()), "/metrics").await.body;
    let families = families(&page);
    let dashboard: Value = serde_json::from_str(&document("grafana/m40llm.json")).unwrap();
    assert_eq!(dashboard["uid"], "m40llm");
    let mut queries = Vec::new();
    strings(&dashboard["panels"], "expr", &mut queries);
    strings(&dashboard["templating"], "query", &mut queries);
    assert!(queries.len() > 20);
    let mut asked = BTreeSet::new();
    for query in &queries {
        let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for word in words.filter(|word| word.starts_with("m40llm_") || word.starts_with("process_")) {
            let family = ["_bucket", "_sum", "_count", ""]
                .iter()
                .find_map(|suffix| families.get_key_value(word.strip_suffix(suffix)?))
                .unwrap_or_else(|| panic!("{word} is no metric: {query}"));
            asked.insert(family.0.as_str());
        }
    }
    for name in families.keys() {
        assert!(asked.contains(name.as_str()), "the dashboard shows nothing of {name}");
    }
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<u64> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "two panels have the same id");
}

/// The value of a sample.
async fn value(app: &Router, sample: &str) -> u64 {
    let page = get(app, "/metrics").await.body;
    let line = page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{sample} is missing:\n{page}")).parse().unwrap()
}

#[tokio::test]
async fn requests_count_by_how_they_ended() {
    let state = state();
    let app = m40llm::app(state.clone());
    let body = json!({"prompt": "hello", "max_tokens": 3});
    post(&app, "/v1/completions", &body).await;
    post(&app, "/v1/completions", &json!({"prompt": "hi", "max_tokens": 2, "n": 2, "stream": true})).await;
    post(&app, "/v1/completions", &json!({"prompt": "hello", "temperature": 9})).await;
    post(&app, "/v1/nothing", &body).await;
    let head = request(Method::HEAD, "/docs", &[], Body::empty());
    assert_eq!(send(&app, head).await.status, 200);
    state.metrics().count_refused(Refusal::InvalidKey);
    for (sample, wanted) in [
        ("m40llm_outcomes_total{outcome=\"length\"}", 2),
        ("m40llm_outcomes_total{outcome=\"refused\"}", 1),
        ("m40llm_outcomes_total{outcome=\"failed\"}", 0),
        ("m40llm_refused_total{reason=\"invalid_key\"}", 1),
        ("m40llm_tokens_total{kind=\"prompt\"}", 7),
        ("m40llm_tokens_total{kind=\"generated\"}", 7),
        ("m40llm_queue_seconds_count", 3),
        ("m40llm_time_to_first_token_seconds_count", 2),
        ("m40llm_inter_token_seconds_count", 4),
        ("m40llm_generation_seconds_count", 3),
        ("m40llm_requests_in_flight", 1),
        ("m40llm_ready", 1),
        ("m40llm_requests_total{route=\"/docs\",method=\"HEAD\",status=\"200\"}", 1),
        ("m40llm_requests_total{route=\"/v1/completions\",method=\"POST\",status=\"400\"}", 1),
    ] {
        assert_eq!(value(&app, sample).await, wanted, "{sample}");
    }
    state.drain();
    assert_eq!(value(&app, "m40llm_ready").await, 0);
    post(&app, "/v1/completions", &body).await;
    assert_eq!(
        value(&app, "m40llm_outcomes_total{outcome=\"refused\"}").await,
        2,
        "a server that ends refuses"
    );
}

#[tokio::test]
async fn whoever_goes_is_counted_as_gone() {
    use tower::ServiceExt as _;

    let slow = Pace { step: std::time::Duration::from_millis(20), ..Pace::default() };
    let state = AppState::loading(ServerConfig::new(MODEL, 1_700_000_000));
    state.set_engine(source::engine(&EngineConfig { ctx_size: Some(4096), ..EngineConfig::default() }, slow));
    let app = m40llm::app(state);
    let begin = |stream: bool| {
        let body = json!({"prompt": "hello", "max_tokens": 2000, "stream": stream}).to_string();
        let headers = [("content-type", "application/json")];
        app.clone().oneshot(request(Method::POST, "/v1/completions", &headers, body))
    };
    // Before there is an answer, and in the midst of one.
    assert!(tokio::time::timeout(std::time::Duration::from_millis(50), begin(false)).await.is_err());
    let streaming = begin(true).await.unwrap();
    assert_eq!(value(&app, "m40llm_requests_in_flight").await, 2);
    drop(streaming);
    let of = |status: u16| {
        format!("m40llm_requests_total{{route=\"/v1/completions\",method=\"POST\",status=\"{status}\"}}")
    };
    assert_eq!(value(&app, &of(499)).await, 1);
    assert_eq!(value(&app, &of(200)).await, 1);
    assert_eq!(value(&app, "m40llm_outcomes_total{outcome=\"cancelled\"}").await, 2);
    assert_eq!(value(&app, "m40llm_requests_in_flight").await, 1);
    let delivered = value(&app, "m40llm_tokens_total{kind=\"generated\"}").await;
    assert!((2..1000).contains(&delivered), "{delivered}");
}
