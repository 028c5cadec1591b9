//! Chat templates against Hugging Face (goldens/templates.json, made by scripts/goldens/templates.py).

use m40llm_engine::{
    gguf::{Metadata, Value},
    text::{ChatTemplate, PromptFormat, TextError, Tokenizer},
};
use serde_json::{Value as Json, json};

use super::vocabularies::{golden, root, vocabulary};

fn render(template: &ChatTemplate, messages: &Json) -> Result<String, TextError> {
    template.render(messages.as_array().unwrap(), None, true, None)
}

fn compiled(source: &str) -> ChatTemplate {
    ChatTemplate::from_source(source, "<s>", "</s>").unwrap()
}

/// What `source` prints with one message in reach.
fn printed(source: &str) -> Result<String, String> {
    let messages =
        json!([{"role": "user", "content": " Hi, there ", "n": 3, "d": {"b": 1, "a": [true, null, 1.5]}}]);
    render(&compiled(source), &messages).map_err(|error| error.to_string())
}

/// Every case of the golden file in one template.
fn check_prompts(name: &str, template: &ChatTemplate) {
    let golden = golden("templates.json");
    let expected = golden["templates"][name]["prompts"].as_array().unwrap();
    let mut wrong = Vec::new();
    for (case, expected) in golden["cases"].as_array().unwrap().iter().zip(expected) {
        let messages = case["messages"].as_array().unwrap();
        let tools = case.get("tools").map(|tools| tools.as_array().unwrap().as_slice());
        let prompt = case.get("add_generation_prompt").is_none_or(|value| value == true);
        let got = template.render(messages, tools, prompt, case["extra"].as_object());
        let right = match (&got, expected) {
            (Ok(got), Json::String(expected)) => got == expected,
            (Err(TextError::Rejected(got)), Json::Object(error)) => {
                error["error"].as_str().is_none_or(|expected| got == expected)
            }
            _ => false,
        };
        if !right {
            wrong.push(format!("{}: {got:?}\n  not {expected}", case["name"]));
        }
    }
    assert!(wrong.is_empty(), "{name}:\n{}", wrong.join("\n"));
}

fn fetched(name: &str) -> ChatTemplate {
    let path = root().join(format!("models/vocabs/templates/{name}.jinja"));
    let source = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}; run scripts/fetch-vocabs.sh", path.display()));
    let golden = golden("templates.json");
    let special = |key: &str| golden["templates"][name][key].as_str().unwrap().to_owned();
    ChatTemplate::from_source(&source, &special("bos"), &special("eos")).unwrap()
}

fn chosen(format: PromptFormat, name: &'static str) -> ChatTemplate {
    let vocabulary = vocabulary(name);
    ChatTemplate::choose(format, &vocabulary.metadata, &vocabulary.tokenizer).unwrap().unwrap()
}

#[test]
fn smollm2_prompts_are_hugging_faces() {
    check_prompts("smollm2", &chosen(PromptFormat::Auto, "smollm2"));
}

#[test]
fn qwen2_prompts_are_hugging_faces() {
    check_prompts("qwen2.5-coder", &chosen(PromptFormat::Template, "qwen2.5-coder"));
}

#[test]
fn llama_3_prompts_are_hugging_faces() {
    check_prompts("llama-3", &fetched("llama-3"));
}

#[test]
fn llama_3_1_prompts_are_hugging_faces() {
    check_prompts("llama-3.1", &fetched("llama-3.1"));
}

#[test]
fn llama_3_2_prompts_are_hugging_faces() {
    check_prompts("llama-3.2", &fetched("llama-3.2"));
}

#[test]
fn qwen3_prompts_are_hugging_faces() {
    check_prompts("qwen3", &fetched("qwen3"));
}

#[test]
fn mistral_nemo_prompts_are_hugging_faces() {
    check_prompts("mistral-nemo", &fetched("mistral-nemo"));
}

#[test]
fn our_own_templates_print_the_same_in_jinja2() {
    // SmolLM2's vocabulary is ChatML's; llama-bpe's has Llama 3's BOS and no template of its own.
    check_prompts("chatml", &chosen(PromptFormat::QwenChat, "smollm2"));
    let vocabulary = vocabulary("llama-bpe");
    let template =
        ChatTemplate::choose(PromptFormat::Auto, &vocabulary.metadata, &vocabulary.tokenizer).unwrap();
    check_prompts("llama3", &template.unwrap());
}

#[test]
fn python_is_spoken() {
    for (source, expected) in [
        ("{{ messages[0].content.strip().split(', ') }}", "['Hi', 'there']"),
        (
            "{{ 'a b  c'.split() }}{{ 'xay'.replace('a', '') }}{{ 'ab'.title() ~ 'Ab'.upper() }}",
            "['a', 'b', 'c']xyAbAB",
        ),
        ("{{ 'abc'[-1] }}{{ 'abc'[1:] }}{{ 'abc'[::-1] }}{{ messages[-1].role }}", "cbccbauser"),
        ("{{ 'abc'.startswith('ab') and not 'abc'.endswith(('x', 'y')) }}{{ 'abc'.find('c') }}", "True2"),
        (
            "{{ 'prefix'.removeprefix('pre') }}{{ '<b>'.lstrip('<').rstrip('>') }}{{ ','.join(['a', 'b']) }}",
            "fixba,b",
        ),
        ("{% for k, v in messages[0].d.items() %}{{ k }}={{ v }};{% endfor %}", "b=1;a=[True, None, 1.5];"),
        ("{{ messages[0].d.get('z', 'none') }}{{ messages[0].d.keys() | list }}", "none['b', 'a']"),
        ("{{ messages[0].d | tojson }}", r#"{"b": 1, "a": [true, null, 1.5]}"#),
        (
            "{{ messages[0].d | tojson(indent=2) }}",
            "{\n  \"b\": 1,\n  \"a\": [\n    true,\n    null,\n    1.5\n  ]\n}",
        ),
        (
            "{{ messages[0].d | tojson(separators=(',', ':'), sort_keys=true) }}",
            r#"{"a":[true,null,1.5],"b":1}"#,
        ),
        (
            r#"{{ "é<&>'\"\n\u007f" | tojson }}{{ 'é🦙' | tojson(ensure_ascii=true) }}"#,
            "\"é<&>'\\\"\\n\u{7f}\"\"\\u00e9\\ud83e\\udd99\"",
        ),
        ("{{ 1e100 | tojson }} {{ 0.00001 | tojson }} {{ 100.0 | tojson }}", "1e+100 1e-05 100.0"),
        (
            "{% set ns = namespace(n=0) %}{% for x in range(9) %}{% if x == 5 %}{% break %}{% endif %}{% if x is odd %}{% continue %}{% endif %}{% set ns.n = ns.n + x %}{% endfor %}{{ ns.n }}",
            "6",
        ),
        (
            "{{ undefined_thing }}|{{ undefined_thing is defined }}|{{ 'x' in messages[0] }}|{{ tools is none }}",
            "|False|False|True",
        ),
        (
            "{{ 'a' is iterable }}{{ 'a' is sequence }}{{ 'a' is mapping }}{{ messages[0].d is mapping }}{{ 1 is string }}",
            "TrueTrueFalseTrueFalse",
        ),
        (
            "{{ true }} {{ none }} {{ 1.0 }} {{ [1, 'a', none] }} {{ bos_token }}{{ eos_token }}",
            "True None 1.0 [1, 'a', None] <s></s>",
        ),
        ("  {% if true %}  \n  x\n  {%- endif %}\ny\n", "  \n  xy"),
        ("{% generation %}{{ 'x' }}{%- endgeneration -%} y", "xy"),
        ("{% macro f(a, b='c') %}{{ a }}{{ b }}{% endmacro %}{{ f('x') }}", "xc"),
        ("{{ strftime_now('%Y') | int > 2024 }}", "True"),
        ("{{ '{% generation %}' }}", "{% generation %}"),
    ] {
        assert_eq!(printed(source).as_deref(), Ok(expected), "{source}");
    }
}

#[test]
fn what_python_refuses_is_refused() {
    for source in [
        "{{ nothing.attribute }}",
        "{{ messages[0].nothing.attribute }}",
        "{{ 'a' + 1 }}",
        "{{ nothing() }}",
        "{{ nothing | tojson }}",
        "{{ 'a' | no_such_filter }}",
        "{{ 'a'.no_such_method() }}",
    ] {
        let result = ChatTemplate::from_source(source, "", "")
            .and_then(|t| render(&t, &json!([{"role": "user", "content": "x"}])));
        assert!(result.is_err(), "{source}: {result:?}");
    }
}

#[test]
fn raise_exception_gives_its_own_words() {
    let error = render(&compiled("{{ raise_exception('Roles must alternate!') }}"), &json!([])).unwrap_err();
    assert!(matches!(error, TextError::Rejected(message) if message == "Roles must alternate!"));
    let nested =
        "{% macro f() %}{{ raise_exception('Inside') }}{% endmacro %}{% for x in [1] %}{{ f() }}{% endfor %}";
    let error = render(&compiled(nested), &json!([])).unwrap_err();
    assert!(matches!(&error, TextError::Rejected(message) if message == "Inside"), "{error}");
}

#[test]
fn runaway_templates_end() {
    let start = std::time::Instant::now();
    for source in [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ 'x' * 99999999999 }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    ] {
        let error = render(&compiled(source), &json!([])).unwrap_err();
        assert!(matches!(error, TextError::Rejected(_)), "{source}: {error}");
    }
    assert!(start.elapsed().as_secs() < 20, "{:?}", start.elapsed());
}

#[test]
fn a_long_conversation_is_no_runaway() {
    let messages: Vec<Json> =
        (0..2000).map(|i| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "content": "word ".repeat(800)})).collect();
    let template = chosen(PromptFormat::Auto, "qwen2.5-coder");
    assert!(template.render(&messages, None, true, None).unwrap().len() > 8_000_000);
}

#[test]
fn messages_come_in_several_forms() {
    let template = compiled("{% for m in messages %}{{ m.role }}:{{ m | tojson }}\n{% endfor %}");
    let messages = json!([
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": null, "tool_calls": []},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{\"z\": 1, \"a\": [1.0]}"}}]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
    ]);
    let expected = r#"system:{"role": "system", "content": "ab"}
assistant:{"role": "assistant", "content": ""}
assistant:{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"z": 1, "a": [1.0]}}}], "content": ""}
assistant:{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}
"#;
    assert_eq!(render(&template, &messages).unwrap(), expected);

    let knows = compiled(
        "{% for m in messages %}{{ 'D' if m.role == 'developer' }}{{ m.content is none }}{% endfor %}",
    );
    assert!(knows.knows_developer() && !template.knows_developer());
    let messages = json!([{"role": "developer", "content": "x"}, {"role": "assistant", "content": null, "tool_calls": [{}]}]);
    assert_eq!(render(&knows, &messages).unwrap(), "DFalseTrue");

    for (bad, word) in [
        (json!(["text"]), "object"),
        (json!([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), "image_url"),
    ] {
        let error = render(&template, &bad).unwrap_err();
        assert!(matches!(&error, TextError::Rejected(message) if message.contains(word)), "{error}");
    }
}

#[test]
fn rendered_prompts_are_known_by_their_markers() {
    let chatml = chosen(PromptFormat::Auto, "smollm2");
    assert!(chatml.is_rendered("<|im_start|>user\nhi<|im_end|>\n"));
    assert!(!chatml.is_rendered("[INST] hi [/INST] <|start_header_id|>"));
    assert!(!chatml.is_rendered("What is 2 < 3 | 4?"));
    assert!(chosen(PromptFormat::Llama3Chat, "smollm2").is_rendered("<|start_header_id|>user"));
    let markers = fetched("mistral-nemo");
    assert!(markers.is_rendered("[INST]hi[/INST]"));
}

/// A model's metadata with a vocabulary of a few tokens and these keys beside it.
fn model(pairs: &[(&str, &str)], tokens: &[&str]) -> (Metadata, Tokenizer) {
    let strings = |list: &[&str]| Value::Strings(list.iter().map(ToString::to_string).collect());
    let mut all = vec![
        ("tokenizer.ggml.model".to_owned(), Value::String("gpt2".into())),
        ("tokenizer.ggml.tokens".to_owned(), strings(tokens)),
        ("tokenizer.ggml.merges".to_owned(), strings(&[])),
    ];
    all.extend(pairs.iter().map(|(key, value)| (key.to_string(), Value::String(value.to_string()))));
    let metadata = Metadata::from_pairs(all);
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    (metadata, tokenizer)
}

#[test]
fn the_right_template_is_chosen() {
    use PromptFormat::{Auto, Llama3Chat, QwenChat, Raw, Template};
    let own = ("tokenizer.chat_template", "own");
    let prompt = |pairs: &[(&str, &str)], tokens: &[&str], format| {
        let (metadata, tokenizer) = model(pairs, tokens);
        let template =
            ChatTemplate::choose(format, &metadata, &tokenizer).map_err(|error| error.to_string())?;
        Ok(template.map(|template| render(&template, &json!([{"role": "user", "content": "x"}])).unwrap()))
    };
    let chatml = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n".to_owned();
    let llama3 = "<|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n";
    let is = |text: &str| Ok::<_, String>(Some(text.to_owned()));

    assert_eq!(prompt(&[own], &["a"], Auto), is("own"));
    assert_eq!(prompt(&[own], &["a"], Template), is("own"));
    assert_eq!(prompt(&[own], &["a"], Raw), Ok(None));
    assert_eq!(prompt(&[own], &["a"], QwenChat), is(&chatml));
    assert_eq!(prompt(&[own], &["a"], Llama3Chat), is(llama3));
    assert_eq!(prompt(&[("tokenizer.ggml.pre", "llama-bpe")], &["<|im_start|>"], Auto), is(llama3));
    assert_eq!(prompt(&[("tokenizer.ggml.pre", "qwen2")], &["<|im_start|>"], Auto), is(&chatml));
    assert_eq!(prompt(&[("tokenizer.chat_template", " ")], &["<|im_start|>"], Auto), is(&chatml));
    for (format, tokens) in [(Auto, ["a"]), (Template, ["<|im_start|>"])] {
        let error = prompt(&[], &tokens, format).unwrap_err();
        assert!(
            ["raw", "llama3-chat", "qwen-chat", "--prompt-format"].iter().all(|word| error.contains(word)),
            "{error}"
        );
    }
    let broken = prompt(&[("tokenizer.chat_template", "{% if %}")], &["<|im_start|>"], Auto).unwrap_err();
    assert!(broken.starts_with("the chat template does not compile") && !broken.contains('\n'), "{broken}");
}

#[test]
fn requests_with_tools_take_the_template_for_them() {
    let pairs = [
        ("tokenizer.chat_template", "plain"),
        ("tokenizer.chat_template.tool_use", "{{ tools | length }} tools"),
    ];
    let (metadata, tokenizer) = model(&pairs, &["a"]);
    let template = ChatTemplate::choose(PromptFormat::Auto, &metadata, &tokenizer).unwrap().unwrap();
    let tools = [json!({"type": "function"})];
    assert_eq!(template.render(&[], Some(&tools), true, None).unwrap(), "1 tools");
    assert_eq!(template.render(&[], Some(&[]), true, None).unwrap(), "plain");
    assert_eq!(template.render(&[], None, true, None).unwrap(), "plain");
}
