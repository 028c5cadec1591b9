//! The engine from submit to the last event, over a real model.

use std::{
    path::PathBuf,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use m40llm_engine::{
    Engine, EngineConfig, Event, FinishReason, GenerateRequest, SamplingParams, SubmitError, Usage,
    text::Detokenizer,
};

/// The demo model; `scripts/fetch-model.sh smollm2` puts it there.
pub(crate) fn demo_model() -> PathBuf {
    let path =
        PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../models/smollm2-135m-instruct-q4_1.gguf"));
    assert!(path.exists(), "{} is missing: run scripts/fetch-model.sh smollm2", path.display());
    path
}

fn load(config: &EngineConfig) -> Engine {
    Engine::load(&demo_model(), config, |_| {}).unwrap()
}

/// One engine for the tests that need nothing special of it.
fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE
        .get_or_init(|| load(&EngineConfig { ctx_size: Some(1024), max_batch: 8, ..EngineConfig::default() }))
}

pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) ids: Vec<u32>,
    reason: FinishReason,
    matched: Option<usize>,
    /// The token that ended it.
    ending: Option<u32>,
    pub(crate) usage: Usage,
}

pub(crate) fn collect(mut generation: m40llm_engine::Generation) -> Answer {
    let (mut text, mut ids) = (String::new(), Vec::new());
    loop {
        match generation.blocking_next().expect("a last event") {
            Event::Text { text: piece, tokens } => {
                text += &piece;
                ids.extend(tokens.iter().map(|t| t.id));
            }
            Event::Prompt(_) | Event::Embedding(_) => {}
            Event::Done { reason, matched, ending, usage } => {
                return Answer { text, ids, reason, matched, ending: ending.map(|token| token.id), usage };
            }
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

fn request(prompt: &str, max_tokens: usize, sampling: SamplingParams) -> GenerateRequest {
    let prompt = engine().tokenizer().encode(prompt, true, true);
    GenerateRequest { prompt, max_tokens: Some(max_tokens), sampling, ..GenerateRequest::default() }
}

fn chat(question: &str) -> String {
    format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn answers_a_question_and_stops_by_itself() {
    let answer = collect(
        engine()
            .submit(request(&chat("What is the capital of France?"), 64, SamplingParams::greedy()))
            .unwrap(),
    );
    assert_eq!(answer.text, "The capital of France is Paris.");
    assert_eq!((answer.reason, answer.matched), (FinishReason::Stop, None));
    assert_eq!(answer.usage.completion_tokens, answer.ids.len() + 1, "the end-of-turn token counts");
    let mut detokenizer = Detokenizer::default();
    let text: String =
        answer.ids.iter().map(|&id| detokenizer.push(engine().tokenizer().token_bytes(id))).collect();
    assert_eq!(text, answer.text);
}

#[test]
fn concurrent_requests_get_what_they_would_get_alone() {
    let prompts: Vec<String> =
        ["the sea", "a list of primes", "Rust", "Paris in spring", "bread", "two cats", "rain", "0, 1, 1, 2"]
            .iter()
            .enumerate()
            .map(|(i, topic)| chat(&format!("Tell me about {topic}. {}", "Go on. ".repeat(i * 9))))
            .collect();
    for sampling in [SamplingParams::greedy(), SamplingParams { seed: Some(11), ..SamplingParams::default() }]
    {
        let submit = |p: &String| engine().submit(request(p, 24, sampling.clone())).unwrap();
        let alone: Vec<_> = prompts.iter().map(|p| collect(submit(p)).ids).collect();
        let together: Vec<_> = prompts.iter().map(submit).collect();
        let together: Vec<_> = together.into_iter().map(|g| collect(g).ids).collect();
        assert_eq!(alone, together, "{sampling:?}");
    }
}

#[test]
fn stop_strings_end_the_text_before_them() {
    let full = collect(
        engine().submit(request(&chat("Count from one to ten."), 40, SamplingParams::greedy())).unwrap(),
    );
    // A stop string from the middle, cut so that it crosses token borders.
    let chars: Vec<char> = full.text.chars().collect();
    let stop: String = chars[chars.len() / 2..chars.len() / 2 + 5].iter().collect();
    let expected = &full.text[..full.text.find(&stop).unwrap()];
    let mut stopped = request(&chat("Count from one to ten."), 40, SamplingParams::greedy());
    stopped.stop = vec!["never in there".into(), stop];
    let answer = collect(engine().submit(stopped).unwrap());
    assert_eq!((answer.text.as_str(), answer.reason), (expected, FinishReason::Stop));
    assert_eq!((answer.matched, answer.ending), (Some(1), None));
    assert!(full.ids.starts_with(&answer.ids));
}

#[test]
fn limits_are_told_apart() {
    let long = request(&chat("Write a long story."), 5, SamplingParams::greedy());
    let answer = collect(engine().submit(long).unwrap());
    assert_eq!((answer.reason, answer.usage.completion_tokens), (FinishReason::Length, 5));
    assert_eq!(answer.ending, None);

    let said = chat("What is the capital of France?") + "The capital of France is Paris.";
    let answer = collect(engine().submit(request(&said, 5, SamplingParams::greedy())).unwrap());
    assert_eq!((answer.reason, answer.usage.completion_tokens), (FinishReason::Stop, 1));
    assert_eq!((answer.text.as_str(), answer.ending), ("", engine().tokenizer().eos()));

    let mut none = request("Hello", 0, SamplingParams::greedy());
    none.prompt_logprobs = Some(3);
    let mut generation = engine().submit(none.clone()).unwrap();
    let Some(Event::Prompt(tokens)) = generation.blocking_next() else { panic!("no scores") };
    assert_eq!(tokens.iter().map(|t| t.id).collect::<Vec<_>>(), none.prompt);
    assert!(matches!(generation.blocking_next(), Some(Event::Done { reason: FinishReason::Length, .. })));
    assert!(generation.blocking_next().is_none());

    let refused = |prompt: Vec<u32>, max_tokens| {
        engine().submit(GenerateRequest { prompt, max_tokens, ..GenerateRequest::default() }).unwrap_err()
    };
    assert_eq!(
        refused(vec![1; 1000], Some(25)),
        SubmitError::ContextLength { prompt: 1000, requested: 1025, limit: 1024 }
    );
    assert!(matches!(refused(vec![1; 1024], None), SubmitError::ContextLength { .. }));
    assert!(matches!(refused(vec![], None), SubmitError::InvalidPrompt(_)));
    assert!(matches!(refused(vec![49152], None), SubmitError::InvalidPrompt(_)));
}

#[test]
fn the_context_ends_a_generation() {
    let small = load(&EngineConfig { ctx_size: Some(40), max_batch: 1, ..EngineConfig::default() });
    let mut endless = request("Once upon a time", 0, SamplingParams::greedy());
    endless.max_tokens = None;
    endless.ignore_eos = true;
    let prompt = endless.prompt.len();
    let answer = collect(small.submit(endless).unwrap());
    assert_eq!((answer.reason, answer.usage.completion_tokens), (FinishReason::Length, 40 - prompt));
}

#[test]
fn the_queue_time_is_what_a_request_waited() {
    let own = load(&EngineConfig { ctx_size: Some(512), max_batch: 1, ..EngineConfig::default() });
    let endless = || GenerateRequest { ignore_eos: true, ..request("Once", 500, SamplingParams::greedy()) };
    let mut running = own.submit(endless()).unwrap();
    running.blocking_next();
    let at_once = running.timings().queue().expect("it runs");
    let since = Instant::now();
    let mut waiting = own.submit(endless()).unwrap();
    thread::sleep(Duration::from_millis(60));
    let timings = waiting.timings();
    assert_eq!(timings.queue(), None, "it waits for the only place");
    drop(running);
    waiting.blocking_next();
    let queue = timings.queue().expect("it runs");
    assert!(queue >= Duration::from_millis(60) && queue <= since.elapsed(), "{queue:?}");
    assert!(queue > at_once);
    drop(waiting);
    assert_eq!(timings.queue(), Some(queue), "it stays");
}

#[test]
fn dropping_a_generation_frees_its_blocks_and_the_queue_is_bounded() {
    let config = EngineConfig { ctx_size: Some(512), max_batch: 1, max_queue: 2, ..EngineConfig::default() };
    let own = load(&config);
    let endless = || GenerateRequest { ignore_eos: true, ..request("Once", 500, SamplingParams::greedy()) };
    let mut running = own.submit(endless()).unwrap();
    running.blocking_next();
    let queued = [own.submit(endless()).unwrap(), own.submit(endless()).unwrap()];
    assert_eq!(own.submit(endless()).unwrap_err(), SubmitError::QueueFull(2));
    wait_until("two wait", || own.stats().waiting == 2);
    assert!(own.stats().kv_blocks_used > 0);
    drop((running, queued));
    wait_until("the blocks are back", || own.stats().kv_blocks_used == 0 && !own.is_busy());
    own.drain();
    assert_eq!(own.submit(endless()).unwrap_err(), SubmitError::Draining);
}

#[test]
fn a_full_pool_pauses_streams_without_changing_them() {
    // Four sequences of up to 8 blocks over 4 · 3 blocks: they cannot all stay.
    let block = 32 * 30 * 2 * 3 * 64 * 2; // tokens, layers, K and V, heads, width, bytes
    let config = EngineConfig {
        ctx_size: Some(256),
        max_batch: 4,
        kv_memory: Some(12 * block),
        ..EngineConfig::default()
    };
    let tight = load(&config);
    wait_until("the pool is there", || tight.stats().kv_blocks_total == 12);
    let work = |i: usize| GenerateRequest {
        ignore_eos: true,
        ..request(&chat(&format!("Story number {i}.")), 150, SamplingParams::greedy())
    };
    let alone: Vec<_> = (0..4).map(|i| collect(tight.submit(work(i)).unwrap()).ids).collect();
    let together: Vec<_> = (0..4).map(|i| tight.submit(work(i)).unwrap()).collect();
    let together: Vec<_> = together.into_iter().map(|g| collect(g).ids).collect();
    assert_eq!(alone, together);
    assert!(tight.stats().preemptions > 0, "the pool was not too small");
}
