//! What the scheduler does, and what of it nobody may notice: outputs, to the bit.

use std::time::{Duration, Instant};

use m40llm_engine::{
    CallerId, Engine, EngineConfig, EngineError, Event, GenerateRequest, PrefixCache, SamplingParams,
    SubmitError,
};

use crate::engine::{collect, demo_model};

fn load(config: EngineConfig) -> Engine {
    load_places(4, config)
}

fn load_places(max_batch: usize, config: EngineConfig) -> Engine {
    Engine::load(&demo_model(), &EngineConfig { ctx_size: Some(1024), max_batch, ..config }, |_| {}).unwrap()
}

/// A prompt of some 300 tokens that others may begin with.
fn preamble() -> String {
    "The lighthouse keeper writes down what the weather does, hour after hour, in a thick book. ".repeat(16)
}

fn request(engine: &Engine, text: &str, seed: Option<u64>) -> GenerateRequest {
    let sampling = match seed {
        Some(_) => SamplingParams { seed, ..SamplingParams::default() },
        None => SamplingParams::greedy(),
    };
    GenerateRequest {
        prompt: engine.tokenizer().encode(text, true, true),
        max_tokens: Some(20),
        sampling,
        ignore_eos: true,
        ..GenerateRequest::default()
    }
}

#[test]
fn a_beginning_in_the_cache_changes_nothing_but_the_count() {
    let (fresh, cached) = (
        load(EngineConfig { prefix_cache: PrefixCache::Off, ..EngineConfig::default() }),
        load(EngineConfig::default()),
    );
    for (i, tail) in ["It rained.", "The sun", "It rained. At noon"].into_iter().enumerate() {
        for seed in [None, Some(5)] {
            let work = request(&fresh, &(preamble() + tail), seed);
            let expected = collect(fresh.submit(work.clone()).unwrap());
            let answer = collect(cached.submit(work.clone()).unwrap());
            assert_eq!(expected.ids, answer.ids, "{tail:?}, {seed:?}");
            assert_eq!(expected.usage.cached_tokens, 0);
            let whole_blocks = (work.prompt.len() - 1) / 32 * 32;
            let found = answer.usage.cached_tokens;
            let first = i == 0 && seed.is_none();
            assert!(if first { found == 0 } else { found + 32 >= whole_blocks }, "{found} of {whole_blocks}");
        }
    }
    let mut others = request(&cached, &preamble(), None);
    others.caller = CallerId(7);
    let answer = collect(cached.submit(others.clone()).unwrap());
    assert_eq!(answer.usage.cached_tokens, 0, "another caller's prompt was found");
    assert!(collect(cached.submit(others).unwrap()).usage.cached_tokens > 0);
}

#[test]
fn an_answer_is_part_of_what_the_next_turn_finds() {
    let engine = load(EngineConfig::default());
    let first = request(&engine, &preamble(), None);
    let answer = collect(engine.submit(first.clone()).unwrap());
    let prompt = [&first.prompt[..], &answer.ids, &first.prompt[..5]].concat();
    let known = (first.prompt.len() + answer.ids.len() - 1) / 32 * 32;
    let next = collect(engine.submit(GenerateRequest { prompt, ..first }).unwrap());
    assert_eq!(next.usage.cached_tokens, known);
}

#[test]
fn choices_are_what_each_would_be_alone_and_their_prompt_is_computed_once() {
    let engine = load(EngineConfig { prefix_cache: PrefixCache::Off, ..EngineConfig::default() });
    // More than there are places.
    let work: Vec<_> = (0..6).map(|seed| request(&engine, &preamble(), Some(seed))).collect();
    let alone: Vec<_> = work.iter().map(|w| collect(engine.submit(w.clone()).unwrap()).ids).collect();
    let blocks = work[0].prompt.len().div_ceil(32);
    let mut generations = engine.submit_choices(work.clone()).unwrap();
    generations.iter_mut().take(4).for_each(|g| drop(g.blocking_next()));
    let used = engine.stats().kv_blocks_used;
    // The prompt's, and for each choice its copy of the last one and one to grow into.
    assert!(used <= blocks + 2 * 6, "{used} blocks for a prompt of {blocks}");
    let together: Vec<_> = generations.into_iter().map(|g| collect(g).ids).collect();
    assert!(
        alone.iter().zip(&together).all(|(a, t)| a.ends_with(t) && t.len() + 1 >= a.len()),
        "{alone:?}\n{together:?}"
    );
    let mut different = work;
    different[1].prompt.pop();
    assert!(engine.submit_choices(different).is_err());
}

#[test]
fn who_would_wait_too_long_is_refused_at_once_and_told_how_long() {
    let engine = load_places(1, EngineConfig::default());
    let endless = GenerateRequest { max_tokens: Some(900), ..request(&engine, "Once", None) };
    assert_eq!(
        engine.submit(request(&engine, "Once", None)).map(collect).unwrap().usage.completion_tokens,
        20
    );
    // The gauges follow the last events by a moment.
    let until = Instant::now() + Duration::from_secs(5);
    while engine.stats().running > 0 {
        assert!(Instant::now() < until, "{:?}", engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut running = engine.submit(endless.clone()).unwrap();
    running.blocking_next();
    let waits = |most| engine.submit(GenerateRequest { max_wait: Some(most), ..endless.clone() });
    let refused = waits(Duration::ZERO).unwrap_err();
    let SubmitError::WouldWait { predicted, .. } = refused else { panic!("{refused}") };
    assert!(predicted > Duration::ZERO, "a place is taken, and was held for a while by the one before");
    assert_eq!(running.queue_position(), 0);
    let queued = waits(Duration::from_secs(3600)).unwrap();
    assert_eq!(queued.queue_position(), 1);
    assert_eq!(waits(Duration::from_secs(3600)).unwrap().queue_position(), 2);
    assert!(queued.predicted_first_token() > Duration::ZERO && engine.next_place() > Duration::ZERO);
}

#[test]
fn an_end_reaches_who_runs_and_who_waits() {
    let engine = load_places(1, EngineConfig::default());
    let endless = GenerateRequest { max_tokens: Some(900), ..request(&engine, "Once", None) };
    let mut generations = [engine.submit(endless.clone()).unwrap(), engine.submit(endless.clone()).unwrap()];
    generations[0].blocking_next();
    engine.end();
    for generation in &mut generations {
        let last = std::iter::from_fn(|| generation.blocking_next()).last();
        assert!(matches!(last, Some(Event::Failed(EngineError::Ended))), "{last:?}");
    }
    assert_eq!(engine.submit(endless).unwrap_err(), SubmitError::Draining);
    // The gauge follows the last events by a moment.
    let until = Instant::now() + Duration::from_secs(5);
    while engine.stats().kv_blocks_used > 0 {
        assert!(Instant::now() < until, "{:?}", engine.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
}
