//! What holds for the streams of all routes, over an engine that a test holds by the hand.

use std::sync::mpsc;

use axum::{Router, body::Body, http::Method};
use http_body_util::BodyExt as _;
use m40llm::{AppState, ServerConfig};
use m40llm_engine::{
    Engine, EngineConfig, EngineError, Event, FinishReason, TokenLogprob, TokenOut, Usage, source::Submitted,
};
use serde_json::{Value, json};
use tokio::time::{Duration, Instant};
use tower::ServiceExt as _;

use crate::{
    scripted::{End, says},
    support::{Answer, MODEL, post, request, send},
};

/// A way to ask for a stream.
#[derive(Debug, Clone, Copy)]
struct Route {
    path: &'static str,
    accept: &'static str,
}

const fn route(path: &'static str) -> Route {
    Route { path, accept: "*/*" }
}

const CHAT: Route = route("/v1/chat/completions");
const COMPLETIONS: Route = route("/v1/completions");
const RESPONSES: Route = route("/v1/responses");
const MESSAGES: Route = route("/v1/messages");
const NDJSON: Route = route("/generate");
const NATIVE: Route = Route { path: "/generate", accept: "text/event-stream" };
const ROUTES: [Route; 6] = [CHAT, COMPLETIONS, RESPONSES, MESSAGES, NDJSON, NATIVE];

impl Route {
    /// `hi`, and these fields.
    fn body(self, fields: &Value) -> Value {
        let mut body = match self.path {
            "/v1/chat/completions" => json!({"messages": [{"role": "user", "content": "hi"}]}),
            "/v1/messages" => json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}),
            "/v1/responses" => json!({"input": "hi"}),
            _ => json!({"prompt": "hi"}),
        };
        body["stream"] = true.into();
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        body
    }

    fn request(self, fields: &Value) -> axum::http::Request<Body> {
        let headers = [("content-type", "application/json"), ("accept", self.accept)];
        request(Method::POST, self.path, &headers, self.body(fields).to_string())
    }

    async fn stream(self, app: &Router, fields: &Value) -> Answer {
        send(app, self.request(fields)).await
    }

    /// The objects of a stream, comments and the like left out.
    fn objects(body: &str) -> Vec<Value> {
        let lines = body.lines().filter(|line| line.starts_with(['d', '{']) && *line != "data: [DONE]");
        let objects = lines.map(|line| serde_json::from_str(line.trim_start_matches("data: ")).unwrap());
        objects
            .filter(|object: &Value| {
                object["type"] != "ping" && *object != json!({"output": "", "done": false})
            })
            .collect()
    }

    /// The new text in an object, if there is some.
    fn text(self, object: &Value) -> &str {
        let text = match self.path {
            "/v1/chat/completions" => &object["choices"][0]["delta"]["content"],
            "/v1/completions" => &object["choices"][0]["text"],
            "/v1/responses" => &object["delta"],
            "/v1/messages" => &object["delta"]["text"],
            _ => &object["output"],
        };
        text.as_str().unwrap_or_default()
    }

    /// What is sent when nothing happens.
    fn filler(self) -> &'static str {
        match (self.path, self.accept) {
            ("/v1/messages", _) => "event: ping\ndata: {\"type\":\"ping\"}\n\n",
            ("/generate", "*/*") => "{\"output\":\"\",\"done\":false}\n",
            _ => ": keep-alive\n\n",
        }
    }
}

fn over(engine: Engine) -> Router {
    let state = AppState::loading(ServerConfig::new(MODEL, 1_700_000_000));
    state.set_engine(engine);
    m40llm::app(state)
}

/// What an engine is told to do next, with the request that it has.
type Step = Box<dyn FnOnce(&Submitted) + Send>;

/// A server whose engine does one step after another as they are sent, and then waits for the next.
fn led() -> (Router, mpsc::Sender<Step>) {
    let (steps, inbox) = mpsc::channel::<Step>();
    let engine = Engine::from_source(&EngineConfig::default(), move |jobs| {
        while let Some(job) = jobs.recv() {
            while !job.is_cancelled() {
                let Ok(step) = inbox.recv() else { return };
                step(&job);
            }
        }
    });
    (over(engine.unwrap()), steps)
}

fn token(text: &'static str) -> Step {
    Box::new(move |job| {
        job.send(Event::Text { text: text.into(), tokens: vec![TokenOut { id: 97, logprob: None }] });
    })
}

async fn frame(body: &mut Body) -> String {
    let frame = body.frame().await.expect("the stream goes on").unwrap();
    String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap()
}

/// On a clock that runs ahead as soon as nobody has anything to do: while the engine waits for its next step.
#[tokio::test(start_paused = true)]
async fn headers_wait_a_quarter_of_a_minute_for_the_first_token_and_comments_fill_the_silence() {
    for route in ROUTES {
        let (app, steps) = led();
        let start = Instant::now();
        let response = app.clone().oneshot(route.request(&json!({}))).await.unwrap();
        // Timers are as exact as a millisecond.
        let quarters = |n: u32| {
            let (elapsed, due) = (start.elapsed(), Duration::from_secs(15) * n);
            assert!((due..due + Duration::from_millis(20)).contains(&elapsed), "{route:?}: {n}: {elapsed:?}");
        };
        quarters(1);
        assert_eq!(response.status(), 200);
        let mut body = response.into_body();
        // In the midst of the prompt.
        let mut first = String::new();
        while !first.ends_with(route.filler()) {
            first += &frame(&mut body).await;
        }
        quarters(2);
        assert!(first.starts_with(route.filler()) || !Route::objects(&first).is_empty(), "{first}");
        for n in 3..5 {
            assert_eq!(frame(&mut body).await, route.filler());
            quarters(n);
        }
        // In the midst of the answer.
        steps.send(token("so")).unwrap();
        let mut next = frame(&mut body).await;
        while next == route.filler() {
            next = frame(&mut body).await;
        }
        assert!(Route::objects(&next).iter().any(|object| route.text(object) == "so"), "{route:?}: {next}");
        let before = Instant::now();
        assert_eq!(frame(&mut body).await, route.filler());
        assert!(before.elapsed() >= Duration::from_millis(14_900), "{route:?}: {:?}", before.elapsed());
        // What fails now has its status already.
        steps
            .send(Box::new(|job| {
                job.send(Event::Failed(EngineError::Backend("on purpose".into())));
            }))
            .unwrap();
        let rest = body.collect().await.unwrap().to_bytes();
        check_failure(route, std::str::from_utf8(&rest).unwrap());
    }
}

/// One object with `error`, and nothing behind it.
fn check_failure(route: Route, stream: &str) {
    let objects = Route::objects(stream);
    let failed: Vec<&Value> = objects.iter().filter(|object| !object["error"].is_null()).collect();
    assert_eq!(failed.len(), 1, "{route:?}: {stream}");
    assert_eq!(failed[0], objects.last().unwrap(), "{route:?}: {stream}");
    let error = &failed[0]["error"];
    assert_eq!(
        (&error["type"], &error["param"], &error["code"]),
        (&json!("server_error"), &Value::Null, &Value::Null)
    );
    assert!(error["message"].as_str().unwrap().contains("on purpose"), "{stream}");
    assert!(!stream.contains("[DONE]") && !stream.contains("\"done\":true"), "{stream}");
    assert!(!stream.contains("response.completed") && !stream.contains("message_stop"), "{stream}");
}

#[tokio::test]
async fn failures_have_their_status_before_the_first_token_and_are_one_event_after_it() {
    for route in ROUTES {
        for stream in [true, false] {
            let answer = route.stream(&says(&[], End::Failure), &json!({"stream": stream})).await;
            assert_eq!(
                (answer.status.as_u16(), &answer.error()["type"]),
                (500, &json!("server_error")),
                "{route:?}"
            );
        }
        let answer = route.stream(&says(&["a"], End::Failure), &json!({})).await;
        assert_eq!(answer.status, 200);
        check_failure(route, &answer.body);
        let whole = route.stream(&says(&["a"], End::Failure), &json!({"stream": false})).await;
        assert_eq!(
            (whole.status.as_u16(), &whole.error()["type"]),
            (500, &json!("server_error")),
            "{route:?}"
        );
    }
}

#[tokio::test]
async fn line_breaks_of_other_worlds_are_escaped_in_every_stream() {
    const ODD: &[&str] = &["a\u{85}b", "\u{2028}", "\u{2029}c\r\nd", "\u{1F980}"];
    for route in ROUTES {
        let answer = route.stream(&says(ODD, End::Stop(None)), &json!({})).await;
        assert!(
            !answer.body.contains(['\u{85}', '\u{2028}', '\u{2029}', '\r']),
            "{route:?}: {}",
            answer.body
        );
        let objects = Route::objects(&answer.body);
        let text: String = objects.iter().map(|object| route.text(object)).collect();
        assert_eq!(text, ODD.concat(), "{route:?}");
        assert_eq!(answer.header("cache-control"), "no-cache");
        assert_eq!(answer.header("x-accel-buffering"), "no");
        let content_type = if route.path == "/generate" && route.accept == "*/*" {
            "application/x-ndjson; charset=utf-8"
        } else {
            "text/event-stream; charset=utf-8"
        };
        assert_eq!(answer.header("content-type"), content_type);
        assert!(answer.header("x-request-id").starts_with("req_"));
        let done = answer.body.ends_with("\n\ndata: [DONE]\n\n");
        assert_eq!(done, ["/v1/chat/completions", "/v1/completions"].contains(&route.path), "{route:?}");
    }
}

/// A model to which some tokens, its own among them, are impossible.
fn impossible() -> Router {
    let engine = Engine::from_source(&EngineConfig::default(), |inbox| {
        while let Some(job) = inbox.recv() {
            let scored = |logprob| TokenLogprob {
                logprob,
                top: vec![(98, -0.5), (99, f32::NEG_INFINITY), (100, f32::NAN)],
            };
            if job.request.prompt_logprobs.is_some() {
                let tokens =
                    [None, Some(f32::NEG_INFINITY)].map(|p| TokenOut { id: 104, logprob: Some(scored(p)) });
                job.send(Event::Prompt(tokens.into()));
            }
            let out = TokenOut { id: 97, logprob: Some(scored(Some(f32::NEG_INFINITY))) };
            job.send(Event::Text { text: "a".into(), tokens: vec![out] });
            let usage = Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens: 1 };
            job.send(Event::Done { reason: FinishReason::Length, matched: None, usage, ending: None });
        }
    });
    over(engine.unwrap())
}

#[tokio::test]
async fn impossible_tokens_have_a_finite_log_probability() {
    let floor = json!(-9999.0);
    let app = impossible();
    let chat = json!({"logprobs": true, "top_logprobs": 3});
    let check_chat = |entry: &Value| {
        assert_eq!(entry["logprob"], floor);
        let top: Vec<&Value> =
            entry["top_logprobs"].as_array().unwrap().iter().map(|t| &t["logprob"]).collect();
        assert_eq!(top, [&json!(-0.5), &floor, &floor]);
    };
    let whole = |route: Route, fields: &Value| {
        let mut fields = fields.clone();
        fields["stream"] = false.into();
        let app = app.clone();
        async move { route.stream(&app, &fields).await.json() }
    };
    check_chat(&whole(CHAT, &chat).await["choices"][0]["logprobs"]["content"][0]);
    let objects = Route::objects(&CHAT.stream(&app, &chat).await.body);
    check_chat(objects.iter().find_map(|o| o["choices"][0]["logprobs"]["content"].get(0)).unwrap());
    check_chat(
        &whole(RESPONSES, &json!({"top_logprobs": 3})).await["output"][0]["content"][0]["logprobs"][0],
    );

    let legacy = json!({"logprobs": 3, "echo": true});
    let expected = json!([null, -9999.0, -9999.0]);
    let answer = whole(COMPLETIONS, &legacy).await;
    let logprobs = &answer["choices"][0]["logprobs"];
    assert_eq!(logprobs["token_logprobs"], expected);
    assert_eq!(logprobs["top_logprobs"][2], json!({"a": -9999.0, "b": -0.5, "c": -9999.0, "d": -9999.0}));
    let objects = Route::objects(&COMPLETIONS.stream(&app, &legacy).await.body);
    let lists = objects.iter().filter_map(|o| o["choices"][0]["logprobs"]["token_logprobs"].as_array());
    assert_eq!(json!(lists.flatten().collect::<Vec<_>>()), expected);
}

/// The role once, before all else; every chunk of one answer, and no other answer's.
#[tokio::test]
async fn an_answers_chunks_share_what_is_the_answers() {
    let app = says(&["a", "b"], End::Stop(None));
    let mut ids = Vec::new();
    for (route, fields) in [
        (CHAT, json!({"n": 2, "stream_options": {"include_usage": true}})),
        (COMPLETIONS, json!({"prompt": ["x", "y"], "n": 2, "stream_options": {"include_usage": true}})),
    ] {
        let mut whole = fields.clone();
        whole["stream"] = false.into();
        whole.as_object_mut().unwrap().remove("stream_options");
        let whole = route.stream(&app, &whole).await.json();
        let chunks = Route::objects(&route.stream(&app, &fields).await.body);
        for chunk in &chunks {
            for field in ["id", "created", "model", "system_fingerprint"] {
                assert!(!chunk[field].is_null(), "{field}");
                assert_eq!(chunk[field], chunks[0][field], "{field}");
            }
            assert_eq!(chunk["system_fingerprint"], whole["system_fingerprint"]);
            assert_eq!(chunk["model"], whole["model"]);
        }
        let (totals, pieces) = chunks.split_last().unwrap();
        assert!(pieces.iter().all(|chunk| chunk.get("usage").is_some_and(Value::is_null)));
        assert_eq!(
            (&totals["choices"], &totals["usage"]),
            (&json!([]), &whole["usage"]),
            "all choices, all prompts"
        );
        assert!(totals["usage"]["prompt_tokens_details"]["cached_tokens"].is_u64());
        let choices = whole["choices"].as_array().unwrap().len();
        for index in 0..choices {
            let own: Vec<&Value> =
                pieces.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == index).collect();
            let (last, rest) = own.split_last().unwrap();
            assert_eq!(last["finish_reason"], "stop");
            assert!(rest.iter().all(|choice| choice["finish_reason"].is_null()));
            let roles = own.iter().filter(|choice| choice["delta"].get("role").is_some()).count();
            assert_eq!(roles, usize::from(route.path == CHAT.path));
        }
        ids.extend([chunks[0]["id"].clone(), whole["id"].clone()]);
    }
    ids.sort_by_key(Value::to_string);
    ids.dedup();
    assert_eq!(ids.len(), 4, "each answer has its own: {ids:?}");
}

/// Checks that cost nothing come before the grammar, which may cost seconds.
#[tokio::test]
async fn grammars_are_compiled_last_and_never_for_a_count() {
    let app = says(&["x"], End::Stop(None));
    let bad = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#"}}});
    let tool =
        json!({"type": "object", "properties": {"a": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}});
    let long = "x".repeat(5000);
    let context = json!("context_length_exceeded");
    for (route, fields, param, code) in [
        (CHAT, json!({"response_format": bad}), "response_format.json_schema.schema", &Value::Null),
        (CHAT, json!({"response_format": bad, "top_logprobs": 1}), "top_logprobs", &Value::Null),
        (
            CHAT,
            json!({"response_format": bad, "messages": [{"role": "user", "content": long}]}),
            "messages",
            &context,
        ),
        (CHAT, json!({"response_format": bad, "max_tokens": 5000}), "messages", &context),
        (COMPLETIONS, json!({"regex": "a(", "best_of": 0}), "best_of", &Value::Null),
        (COMPLETIONS, json!({"regex": "a(", "prompt": long}), "prompt", &context),
        (
            RESPONSES,
            json!({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"$ref": "#"}}}, "input": long}),
            "input",
            &context,
        ),
        (
            MESSAGES,
            json!({"tools": [{"name": "f", "input_schema": tool}]}),
            "tools[0].input_schema",
            &Value::Null,
        ),
    ] {
        let answer = route.stream(&app, &fields).await;
        let error = answer.error();
        assert_eq!(
            (answer.status.as_u16(), &error["param"], &error["code"]),
            (400, &json!(param), code),
            "{error}"
        );
    }
    let counted = json!({"messages": [{"role": "user", "content": long}], "tools": [{"name": "f", "input_schema": tool}]});
    let counted = post(&app, "/v1/messages/count_tokens", &counted).await;
    assert_eq!(counted.status, 200, "{}", counted.body);
    assert!(counted.json()["input_tokens"].as_u64() > Some(5000));
}
