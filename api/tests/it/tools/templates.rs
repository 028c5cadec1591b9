//! Templates that fail, and what they are given.

use serde_json::json;

use super::says;
use crate::support::post;

#[tokio::test]
async fn the_words_of_templates_reach_the_client() {
    let refuses =
        "{% if messages[0].role != 'user' %}{{ raise_exception('Say something first!') }}{% endif %}x";
    let app = says(refuses, "Hi.", 1);
    for (path, body, param) in [
        ("/v1/chat/completions", json!({"messages": [{"role": "system", "content": "x"}]}), "messages"),
        ("/apply-template", json!({"messages": [{"role": "system", "content": "x"}]}), "messages"),
        ("/v1/responses", json!({"input": "x", "instructions": "x"}), "input"),
        (
            "/v1/messages",
            json!({"messages": [{"role": "user", "content": "x"}], "system": "x", "max_tokens": 1}),
            "messages",
        ),
    ] {
        let answer = post(&app, path, &body).await;
        let error = answer.error();
        assert_eq!((answer.status.as_u16(), &error["param"]), (400, &json!(param)), "{path}: {error}");
        assert!(error["message"].as_str().unwrap().contains("Say something first!"), "{error}");
        assert!(!answer.body.contains("raise_exception"), "{error}");
    }
    // One that fails, or does not even compile, is never another one.
    for broken in ["{{ messages.nothing.at_all }}", "{% if %}"] {
        let app = says(broken, "Hi.", 1);
        let answer =
            post(&app, "/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "x"}]}))
                .await;
        assert_eq!(
            (answer.status.as_u16(), &answer.error()["param"]),
            (400, &json!("messages")),
            "{}",
            answer.body
        );
    }
}

#[tokio::test]
async fn templates_have_their_helpers_and_arguments_in_order() {
    // Of a family whose templates see calls as they are.
    let template = "{# tools <tool_call> #}{% for m in messages %}{{ m.role.upper() }}: {{ m.content.strip() }}\
                    {% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}\
                    |{% endfor %}{{ strftime_now('%Y') }}";
    let app = says(template, "Hi.", 1);
    let body = json!({"messages": [
        {"role": "developer", "content": " be <brief> "},
        {"role": "user", "content": [{"type": "text", "text": " a"}, {"type": "text", "text": "b "}]},
        {"role": "assistant", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"z\": \"<é>\", \"a\": [1.0, true]}"}},
            {"id": "d", "type": "function", "function": {"name": "f", "arguments": {"y": null, "b": 1}}},
        ]},
    ], "tools": []});
    let answer = post(&app, "/apply-template", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let prompt = answer.json()["prompt"].as_str().unwrap().to_owned();
    let (prompt, year) = prompt.rsplit_once('|').unwrap();
    assert_eq!(
        prompt,
        "SYSTEM: be <brief>|USER: a\nb|ASSISTANT: {\"z\": \"<é>\", \"a\": [1.0, true]}{\"y\": null, \"b\": 1}"
    );
    assert!(year.parse::<u32>().unwrap() > 2024);
}
