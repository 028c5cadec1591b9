//! Spans of `tracing` as a collector wants them: with ids, times and attributes.
//!
//! A layer gathers each span of ours in the registry and hands it to the exporter when it closes. Where
//! nothing is exported the layer is absent, and [`annotate`] does nothing.

use std::{
    borrow::Cow,
    fmt,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use tracing::{
    Span, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{
    Layer, Registry,
    filter::filter_fn,
    layer::{Context, Filter},
    registry::LookupSpan,
};

use super::{otlp::Exporter, trace_context::TraceParent};

/// A span under way, and then as it is exported.
#[derive(Debug)]
pub(super) struct SpanData {
    trace: u128,
    span: u64,
    parent: Option<u64>,
    /// A request's span has come from outside, the others are its parts.
    is_request: bool,
    /// Whether it is exported at all.
    sampled: bool,
    name: Cow<'static, str>,
    began: SystemTime,
    since: Instant,
    nanos: u64,
    attributes: Vec<(&'static str, Value)>,
    error: Option<&'static str>,
}

impl SpanData {
    fn begin(name: &'static str, parent: Option<(u128, u64, bool)>) -> Self {
        let (trace, span) = (random(), random() as u64);
        let (trace, parent, sampled) = match parent {
            Some((trace, span, sampled)) => (trace, Some(span), sampled),
            None => (trace, None, true),
        };
        Self {
            trace,
            span,
            parent,
            is_request: parent.is_none(),
            sampled,
            name: Cow::Borrowed(name),
            began: SystemTime::now(),
            since: Instant::now(),
            nanos: 0,
            attributes: Vec::new(),
            error: None,
        }
    }

    /// Makes it a part of its caller's trace. Before it has parts of its own.
    pub(super) fn continue_from(&mut self, caller: TraceParent) {
        (self.trace, self.parent, self.sampled) = (caller.trace, Some(caller.span), caller.sampled);
    }

    pub(super) fn rename(&mut self, name: String) {
        self.name = Cow::Owned(name);
    }

    /// Adds an attribute.
    pub(super) fn set(&mut self, key: &'static str, value: impl Into<Value>) {
        self.attributes.push((key, value.into()));
    }

    /// It ends by an error of this name.
    pub(super) fn fail(&mut self, error: &'static str) {
        self.error = Some(error);
    }

    /// The span in OTLP's JSON: ids in hexadecimal, 64-bit numbers as strings.
    pub(super) fn to_json(&self) -> Value {
        let start = self.began.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
        let attributes: Vec<Value> = self
            .attributes
            .iter()
            .map(|(key, value)| {
                let value = match value {
                    Value::Bool(b) => json!({"boolValue": b}),
                    Value::Number(n) if n.is_f64() => json!({"doubleValue": n}),
                    Value::Number(n) => json!({"intValue": n.to_string()}),
                    Value::String(s) => json!({"stringValue": s}),
                    other => json!({"stringValue": other.to_string()}),
                };
                json!({"key": key, "value": value})
            })
            .collect();
        let mut span = json!({
            "traceId": format!("{:032x}", self.trace),
            "spanId": format!("{:016x}", self.span),
            "name": self.name,
            // Server, internal.
            "kind": if self.is_request { 2 } else { 1 },
            "startTimeUnixNano": start.to_string(),
            "endTimeUnixNano": (start + self.nanos).to_string(),
            "attributes": attributes,
        });
        if let Some(parent) = self.parent {
            span["parentSpanId"] = format!("{parent:016x}").into();
        }
        if let Some(error) = self.error {
            span["status"] = json!({"code": 2, "message": error});
        }
        span
    }
}

/// Random bits, never all zero.
fn random() -> u128 {
    uuid::Uuid::new_v4().as_u128()
}

/// Changes what will be exported of `span`; nothing where it is not exported.
pub(super) fn annotate(span: &Span, change: impl FnOnce(&mut SpanData)) {
    span.with_subscriber(|(id, dispatch)| {
        if let Some(span) = dispatch.downcast_ref::<Registry>().and_then(|registry| registry.span(id))
            && let Some(data) = span.extensions_mut().get_mut::<SpanData>()
        {
            change(data);
        }
    });
}

/// Our spans, whatever is logged: the gateway's, and the engine's of level debug.
pub(super) fn ours<S: Subscriber>() -> impl Filter<S> {
    filter_fn(|meta| meta.is_span() && meta.target().starts_with("m40llm"))
        .with_max_level_hint(LevelFilter::DEBUG)
}

/// Gathers spans for the exporter.
pub(super) struct Spans(pub(super) Exporter);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let parent = span.parent().and_then(|parent| {
            let parent = parent.extensions();
            parent.get::<SpanData>().map(|data| (data.trace, data.span, data.sampled))
        });
        let mut data = SpanData::begin(attributes.metadata().name(), parent);
        attributes.record(&mut Fields(&mut data));
        span.extensions_mut().insert(data);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(data) = span.extensions_mut().get_mut::<SpanData>()
        {
            values.record(&mut Fields(data));
        }
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        if let Some(mut data) = span.extensions_mut().remove::<SpanData>()
            && data.sampled
        {
            data.nanos = data.since.elapsed().as_nanos() as u64;
            self.0.send(data);
        }
    }
}

/// Fields become attributes by their own names, but for the request's id.
struct Fields<'a>(&'a mut SpanData);

impl Fields<'_> {
    fn set(&mut self, field: &Field, value: impl Into<Value>) {
        let key = if field.name() == "id" { "m40llm.request_id" } else { field.name() };
        self.0.set(key, value);
    }
}

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.set(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.set(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.set(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.set(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.set(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.set(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_in_otlps_json() {
        let mut span = SpanData::begin("request", None);
        assert!(span.sampled && span.is_request);
        let child = SpanData::begin("queue", Some((span.trace, span.span, false)));
        assert_eq!((child.trace, child.parent, child.sampled), (span.trace, Some(span.span), false));
        span.continue_from(TraceParent { trace: 0xab, span: 0xcd, sampled: true });
        span.rename("GET /health".into());
        span.set("a", "text");
        span.set("b", 5);
        span.fail("overloaded");
        span.nanos = 7;
        let json = span.to_json();
        assert_eq!(json["traceId"], "000000000000000000000000000000ab");
        assert_eq!(json["parentSpanId"], "00000000000000cd");
        assert_eq!(json["spanId"].as_str().unwrap().len(), 16);
        assert_eq!((&json["name"], &json["kind"]), (&json!("GET /health"), &json!(2)));
        assert_eq!(
            json["attributes"],
            json!([{"key": "a", "value": {"stringValue": "text"}}, {"key": "b", "value": {"intValue": "5"}}])
        );
        assert_eq!(json["status"], json!({"code": 2, "message": "overloaded"}));
        let time = |key: &str| json[key].as_str().unwrap().parse::<u64>().unwrap();
        assert_eq!(time("endTimeUnixNano") - time("startTimeUnixNano"), 7);
        let child = child.to_json();
        assert_eq!(child["kind"], 1);
        assert!(child.get("status").is_none());
    }
}
