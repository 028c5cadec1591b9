//! The engine alone, for who holds another way of asking against it: `score MODEL.gguf` reads JSON objects from standard
//! input, one a line, and answers each with one.
//!
//! | asked | answered |
//! | --- | --- |
//! | `{"text": "…"}` | `{"tokens": […]}` |
//! | `{"tokens": […], "from": 3}` | `{"logprobs": […], "greedy": […]}` of the tokens from the fourth on |
//! | `{"tokens": […], "max_tokens": 9, "stop": ["…"]}` | `{"text": "…"}`, the likeliest token each time |
//!
//! A token's score is its place in what the engine would have generated there, each prefix a request of its own: nothing
//! is shared with the way in which the engine scores a prompt.

use std::{
    env,
    error::Error,
    io::{self, BufRead, Write},
    path::Path,
};

use m40llm_engine::{Engine, EngineConfig, Event, GenerateRequest, SamplingParams, TokenLogprob};
use serde::Deserialize;
use serde_json::{Value, json};

/// Longer texts are for the server alone.
const CONTEXT: usize = 1024;

#[derive(Deserialize)]
#[serde(untagged)]
enum Asked {
    Tokens { text: String },
    Scores { tokens: Vec<u32>, from: usize },
    Text { tokens: Vec<u32>, max_tokens: usize, stop: Vec<String> },
}

/// Runs a request; its text and its tokens' scores.
fn run(engine: &Engine, request: GenerateRequest) -> Result<(String, Vec<TokenLogprob>), Box<dyn Error>> {
    let mut generation = engine.submit(request)?;
    let (mut all, mut scores) = (String::new(), Vec::new());
    while let Some(event) = generation.blocking_next() {
        match event {
            Event::Text { text, tokens } => {
                all += &text;
                scores.extend(tokens.into_iter().filter_map(|token| token.logprob));
            }
            Event::Failed(error) => return Err(error.into()),
            Event::Prompt(_) | Event::Embedding(_) | Event::Done { .. } => {}
        }
    }
    Ok((all, scores))
}

/// The log-probability of `token` after `prefix`, and whether no token is likelier.
fn score(engine: &Engine, prefix: &[u32], token: u32) -> Result<(f32, bool), Box<dyn Error>> {
    let request = GenerateRequest {
        prompt: prefix.to_vec(),
        max_tokens: Some(1),
        logprobs: Some(engine.tokenizer().vocab_size()),
        ignore_eos: true,
        ..GenerateRequest::default()
    };
    let (_, scores) = run(engine, request)?;
    let all = &scores.first().ok_or("nothing was generated")?.top;
    let own = all.iter().find(|(id, _)| *id == token).ok_or_else(|| format!("token {token} has no score"))?;
    Ok((own.1, own.1 >= all[0].1))
}

fn answer(engine: &Engine, asked: Asked) -> Result<Value, Box<dyn Error>> {
    match asked {
        Asked::Tokens { text } => Ok(json!({"tokens": engine.tokenizer().encode(&text, false, true)})),
        Asked::Scores { tokens, from } => {
            let (mut logprobs, mut greedy) = (Vec::new(), Vec::new());
            for i in from..tokens.len() {
                let (logprob, best) = score(engine, &tokens[..i], tokens[i])?;
                logprobs.push(logprob);
                greedy.push(best);
            }
            Ok(json!({"logprobs": logprobs, "greedy": greedy}))
        }
        Asked::Text { tokens, max_tokens, stop } => {
            let request = GenerateRequest {
                prompt: tokens,
                max_tokens: Some(max_tokens),
                stop,
                sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
                ..GenerateRequest::default()
            };
            Ok(json!({"text": run(engine, request)?.0}))
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let model = env::args().nth(1).ok_or("usage: score MODEL.gguf")?;
    let config = EngineConfig { ctx_size: Some(CONTEXT), ..EngineConfig::default() };
    let engine = Engine::load(Path::new(&model), &config, |_| {})?;
    for line in io::stdin().lock().lines() {
        println!("{}", answer(&engine, serde_json::from_str(&line?)?)?);
        io::stdout().flush()?;
    }
    Ok(())
}
