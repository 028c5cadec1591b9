//! `m40llm bench`: prompt and decode speed through the engine, against the memory's copy speed.

mod model;
mod report;

use std::{
    fmt::Write as _,
    path::PathBuf,
    pin::pin,
    task::{self, Poll, Waker},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use m40llm_engine::{
    CallerId, Engine, Event, GenerateRequest, Generation, PrefixCache, SamplingParams, Stats,
    backend::{self, DeviceSpeed},
    model::{Mixture, NamedShape},
    trace::{KernelTrace, SharedTrace},
};

use self::{
    model::{Model, Traffic},
    report::{Measured, Report, table},
};
use super::{Tracing, load, print};
use crate::config::{ConfigError, ModelArgs, ModelConfig as ModelSettings};

/// Bytes that one copy moves each way: far more than a cache holds.
const COPY_BYTES: usize = 256 << 20;
const COPY_REPETITIONS: usize = 5;

/// Measure a model's speed on this machine
///
/// For every batch size: how fast so many prompts are read at once, and how fast so many sequences are
/// written at once, their prompts' time left out. Speeds are medians of the repetitions, after a warm-up.
/// GB/s counts the weights read once a step and the keys and values read; "of copy" compares it with
/// the speed of copying memory, measured in the same run (bytes read and bytes written). "host" is the part of
/// the decoding time in which the device waited for the host between steps, by the device's own clock; without a
/// device, the part outside the model's forward pass. On a device the run also measures large products alone.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  m40llm bench model.gguf
  m40llm bench model.gguf -p 512 -n 128 -b 1 --threads 2
  m40llm bench model.gguf -p 0 -n 64 -b 1,4,16 --depth 2048 --json
  m40llm bench --shape llama3-8b --quant q4_k_m -b 1,16 --per-kernel")]
pub(crate) struct Args {
    /// The model, a GGUF file (of a split one, the first part)
    #[arg(value_name = "MODEL.gguf", required_unless_present = "shape", conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// Instead of a file: random weights in the dimensions of a known model, such as llama3-8b
    #[arg(long, value_name = "NAME", value_parser = NamedShape::find, requires = "quant")]
    shape: Option<&'static NamedShape>,
    /// The type of a shape's weights, such as `q4_k_m`, `q8_0` or f16
    #[arg(long, value_name = "TYPE", value_parser = Mixture::find, requires = "shape")]
    quant: Option<Mixture>,
    /// Tokens in a prompt; 0 leaves the prompt tests out
    #[arg(short = 'p', long = "prompt", value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens to decode; 0 leaves the decode tests out
    #[arg(short = 'n', long = "decode", value_name = "N", default_value_t = 128)]
    decode: usize,
    /// Batch sizes: how many sequences at once
    #[arg(short = 'b', long = "batch", value_name = "LIST", value_delimiter = ',', default_value = "1,4,16",
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=512))]
    batch: Vec<usize>,
    /// Tokens that every sequence holds before a test begins
    #[arg(long, value_name = "N", default_value_t = 0)]
    depth: usize,
    /// How often each test is measured
    #[arg(short = 'r', long = "repetitions", value_name = "N", default_value_t = 3,
          value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1000))]
    repetitions: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// After the table, what each kernel took on the device; measured in further runs, as timing slows a step
    #[arg(long, conflicts_with = "json")]
    per_kernel: bool,
    #[command(flatten)]
    settings: ModelArgs,
}

/// One repetition's outcome.
#[derive(Debug, Clone, Copy)]
struct Sample {
    tokens_per_s: f64,
    gb_per_s: f64,
    host_share: Option<f64>,
}

/// Measures and prints.
pub(crate) fn execute(mut args: Args) -> anyhow::Result<()> {
    let mut config = std::mem::take(&mut args.settings).resolve()?;
    let widest = args.batch.iter().copied().max().unwrap_or(1);
    let longest = args.longest(widest)?;
    match config.engine.ctx_size {
        Some(given) if given < longest => {
            let asked = format!(
                "the tests need {longest} tokens a sequence, --ctx-size is {given}: raise it or lower -p, -n or --depth"
            );
            return Err(ConfigError(asked).into());
        }
        Some(_) => {}
        None => config.engine.ctx_size = Some(longest),
    }
    config.engine.max_batch = widest;
    // Repetitions read the same prompts.
    config.engine.prefix_cache = PrefixCache::Off;
    config.engine.max_queue = config.engine.max_queue.max(widest);
    let _tracing = Tracing::start(&mut config);
    // Before the model takes the memory that the copy wants.
    let speed = backend::device_speed(&config.engine.backend)?.unwrap_or_else(|| DeviceSpeed {
        copy_gb_per_s: copy_speed(config.engine.threads.unwrap_or_else(cores)),
        products: Vec::new(),
    });
    let model = Model::of(&args)?;
    let engine = model.load(&config)?;
    let info = engine.info();
    if info.kv_tokens < widest * longest {
        bail!(
            "{widest} sequences of {longest} tokens do not fit a cache of {} tokens: lower -b, -p, -n or --depth",
            info.kv_tokens
        );
    }
    let bench = Bench {
        traffic: model.traffic(config.engine.kv_type)?,
        copy_gb_per_s: speed.copy_gb_per_s,
        repetitions: args.repetitions,
        depth: args.depth,
        engine: &engine,
    };
    let report = Report {
        device: info.backend.clone(),
        model: model.name(),
        quant: info.quantization.clone(),
        copy_gb_per_s: bench.copy_gb_per_s,
        results: bench.all(&args)?,
        products_tflops: (!speed.products.is_empty()).then(|| speed.products.into_iter().collect()),
    };
    let text = if args.json { serde_json::to_string(&report)? + "\n" } else { table(&report, &engine) };
    print(&text)?;
    if args.per_kernel {
        drop(engine);
        print(&per_kernel(&args, &model, config)?)?;
    }
    Ok(())
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

/// Each test once more with every kernel timed: a table a test.
fn per_kernel(args: &Args, model: &Model<'_>, mut config: ModelSettings) -> anyhow::Result<String> {
    let trace = SharedTrace::default();
    config.engine.trace = Some(SharedTrace::clone(&trace));
    let engine = model.load(&config)?;
    let traffic = model.traffic(config.engine.kv_type)?;
    let bench = Bench { traffic, copy_gb_per_s: 1.0, repetitions: 1, depth: args.depth, engine: &engine };
    let mut out = String::new();
    let mut one = |title: String, run: &dyn Fn() -> anyhow::Result<Sample>| -> anyhow::Result<()> {
        run()?;
        with(&trace, KernelTrace::clear);
        run()?;
        let table = with(&trace, |trace| trace.table());
        // Writing to a String cannot fail.
        let _ = if table.lines().count() > 1 {
            write!(out, "\n{title}\n{table}")
        } else {
            writeln!(out, "\n{title}: no kernels ran on a device")
        };
        Ok(())
    };
    for &batch in &args.batch {
        if args.prompt > 0 {
            one(format!("pp{} batch {batch}", args.prompt), &|| bench.prompt(batch, args.prompt))?;
        }
        if args.decode > 0 {
            let limit = args.decode_limit(batch);
            one(format!("tg{} batch {batch}", args.decode), &|| bench.decode(batch, args.decode, limit))?;
        }
    }
    Ok(out)
}

/// A look into the trace, whose data stay valid wherever a holder may have panicked.
fn with<T>(trace: &SharedTrace, look: impl FnOnce(&mut KernelTrace) -> T) -> T {
    look(&mut trace.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

impl Args {
    /// Tokens that the longest sequence of all tests gets to.
    fn longest(&self, widest: usize) -> Result<usize, ConfigError> {
        if self.prompt == 0 && self.decode == 0 {
            return Err(ConfigError("-p 0 and -n 0 leave nothing to measure".into()));
        }
        let limit = 1 << 24;
        if [self.prompt, self.decode, self.depth].into_iter().any(|n| n > limit) {
            return Err(ConfigError(format!("-p, -n and --depth are at most {limit}")));
        }
        let prompt = if self.prompt == 0 { 0 } else { self.depth + self.prompt };
        let decode = if self.decode == 0 { 0 } else { self.depth.max(1) + self.decode_limit(widest) };
        Ok(prompt.max(decode) + 1)
    }

    /// Tokens a decoding sequence may write: while later prompts are read, earlier sequences write
    /// already, at one token a step, and a step reads at least a quarter of its 512 tokens from prompts.
    /// The last addend covers tokens whose text is held back at first, as parts of one character.
    fn decode_limit(&self, batch: usize) -> usize {
        let steps_before = if batch == 1 { 0 } else { batch * self.depth.div_ceil(128) + batch };
        self.decode + steps_before + 16
    }
}

struct Bench<'a> {
    engine: &'a Engine,
    traffic: Traffic,
    copy_gb_per_s: f64,
    repetitions: usize,
    depth: usize,
}

impl Bench<'_> {
    fn all(&self, args: &Args) -> anyhow::Result<Vec<Measured>> {
        let mut results = Vec::new();
        for &batch in &args.batch {
            if args.prompt > 0 {
                self.read_prompts(batch, args.prompt.min(64))?;
                let samples = (0..self.repetitions).map(|_| self.prompt(batch, args.prompt));
                results.push(self.median("prompt", args.prompt, batch, samples.collect::<Result<_, _>>()?));
            }
        }
        for &batch in &args.batch {
            if args.decode > 0 {
                let limit = args.decode_limit(batch);
                self.decode(batch, args.decode.min(8), limit)?;
                let samples = (0..self.repetitions).map(|_| self.decode(batch, args.decode, limit));
                results.push(self.median("decode", args.decode, batch, samples.collect::<Result<_, _>>()?));
            }
        }
        Ok(results)
    }

    fn median(
        &self,
        test: &'static str,
        n_tokens: usize,
        batch: usize,
        mut samples: Vec<Sample>,
    ) -> Measured {
        samples.sort_by(|a, b| a.tokens_per_s.total_cmp(&b.tokens_per_s));
        let Sample { tokens_per_s, gb_per_s, host_share } = samples[samples.len() / 2];
        let share_of_copy = gb_per_s / self.copy_gb_per_s;
        Measured {
            test,
            n_tokens,
            batch,
            depth: self.depth,
            tokens_per_s,
            gb_per_s,
            share_of_copy,
            host_share,
        }
    }

    /// `batch` prompts of `len` tokens read at once: how long, and in how many steps.
    fn read_prompts(&self, batch: usize, len: usize) -> anyhow::Result<(Duration, u64)> {
        let steps = self.steps();
        let start = Instant::now();
        let submitted: Vec<_> = (0..batch).map(|i| self.submit(i, len, 0)).collect::<Result<_, _>>()?;
        for mut generation in submitted {
            while next_tokens(&mut generation, self.engine)?.is_some() {}
        }
        let time = start.elapsed();
        Ok((time, self.steps() - steps))
    }

    /// Steps so far, once the engine rests.
    fn steps(&self) -> u64 {
        while self.engine.is_busy() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // The worker publishes its numbers just after the last event of a step.
        std::thread::sleep(Duration::from_millis(5));
        self.engine.stats().steps
    }

    /// Tokens `depth` to `depth + len` of each prompt: the time of the whole less that of its beginning,
    /// and their part of the whole's steps, as one step may hold tokens of both.
    fn prompt(&self, batch: usize, len: usize) -> anyhow::Result<Sample> {
        let whole = self.depth + len;
        let (mut time, steps) = self.read_prompts(batch, whole)?;
        if self.depth > 0 {
            let (beginning, _) = self.read_prompts(batch, self.depth)?;
            time = time.checked_sub(beginning).context(
                "reading the beginning of the prompt took longer than the whole: the machine is too busy to measure",
            )?;
        }
        let seconds = time.as_secs_f64();
        let bytes = steps as f64 * self.traffic.weights as f64 * len as f64 / whole as f64;
        let tokens_per_s = (batch * len) as f64 / seconds;
        Ok(Sample { tokens_per_s, gb_per_s: bytes / seconds / 1e9, host_share: None })
    }

    /// From the moment every sequence has its first token, until the last one has `n` more.
    fn decode(&self, batch: usize, n: usize, limit: usize) -> anyhow::Result<Sample> {
        let depth = self.depth.max(1);
        let mut running: Vec<_> =
            (0..batch).map(|i| self.submit(i, depth, limit)).collect::<Result<_, _>>()?;
        let ended = || anyhow::anyhow!("a sequence ended before the measurement did; lower --depth or -b");
        // Prompts are read in turns that begin with the first one, so the last one begins last.
        let last = running.last_mut().context("no batch")?;
        let mut first = 0;
        while first == 0 {
            first = next_tokens(last, self.engine)?.ok_or_else(ended)?;
        }
        let start = Instant::now();
        let (mut written, mut before) = (0, None);
        while written < n {
            written += next_tokens(last, self.engine)?.ok_or_else(ended)?;
            // The worker publishes its numbers after a step's events: by now those of the prompts' last step are in them.
            before = before.or_else(|| Some(self.engine.stats()));
        }
        let seconds = start.elapsed().as_secs_f64();
        let host_share = before.and_then(|before| host_share(&before, &self.engine.stats()));
        // Each step gave each sequence one token, provided that all of them are still running.
        if running.iter_mut().any(has_ended) {
            return Err(ended());
        }
        drop(running);
        self.steps();
        let context = depth as f64 + first as f64 + written as f64 / 2.0;
        let per_step =
            self.traffic.weights as f64 + batch as f64 * context * self.traffic.kv_per_token as f64;
        let steps_per_s = written as f64 / seconds;
        let tokens_per_s = steps_per_s * batch as f64;
        Ok(Sample { tokens_per_s, gb_per_s: steps_per_s * per_step / 1e9, host_share })
    }

    fn submit(&self, index: usize, len: usize, max_tokens: usize) -> anyhow::Result<Generation> {
        let request = GenerateRequest {
            prompt: random_tokens(index as u64, len, self.engine.info().vocab_size),
            max_tokens: Some(max_tokens),
            sampling: SamplingParams { temperature: 0.0, ..Default::default() },
            ignore_eos: true,
            // Prompts are read side by side, and end together: none decodes for long while another one is read.
            caller: CallerId(index as u64),
            ..Default::default()
        };
        Ok(self.engine.submit(request)?)
    }
}

/// The part of the steps' time in which the device waited; none where no step lies between the two.
fn host_share(before: &Stats, after: &Stats) -> Option<f64> {
    let idle = after.idle_seconds - before.idle_seconds;
    let all = idle + after.busy_seconds - before.busy_seconds;
    (all > 0.0).then(|| idle / all)
}

/// Tokens that the next event brings; `None` at the end.
fn next_tokens(generation: &mut Generation, engine: &Engine) -> anyhow::Result<Option<usize>> {
    match generation.blocking_next() {
        Some(Event::Text { tokens, .. }) => Ok(Some(tokens.len())),
        Some(Event::Prompt(_) | Event::Embedding(_)) => Ok(Some(0)),
        Some(Event::Done { .. }) => Ok(None),
        Some(Event::Failed(error)) => Err(error.into()),
        None => bail!("the engine stopped: {}", engine.failure().unwrap_or_default()),
    }
}

/// Whether the events that are there already hold the last one.
fn has_ended(generation: &mut Generation) -> bool {
    let mut context = task::Context::from_waker(Waker::noop());
    loop {
        match pin!(generation.next()).poll(&mut context) {
            Poll::Pending => return false,
            Poll::Ready(Some(Event::Text { .. } | Event::Prompt(_) | Event::Embedding(_))) => {}
            Poll::Ready(_) => return true,
        }
    }
}

/// Token ids that look like nothing in particular, the same in every run (splitmix64).
fn random_tokens(seed: u64, len: usize, vocab: usize) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (0..len).map(|_| (next() % vocab as u64) as u32).collect()
}

/// GB/s of copying memory with so many threads, bytes read and bytes written, the best of some runs.
fn copy_speed(threads: usize) -> f64 {
    // Written once beforehand, so that the pages exist.
    let source = vec![1u8; COPY_BYTES];
    let mut target = vec![2u8; COPY_BYTES];
    let part = COPY_BYTES.div_ceil(threads);
    let mut best = f64::INFINITY;
    for _ in 0..COPY_REPETITIONS {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (to, from) in target.chunks_mut(part).zip(source.chunks(part)) {
                scope.spawn(move || to.copy_from_slice(from));
            }
        });
        best = best.min(start.elapsed().as_secs_f64());
        std::hint::black_box(&mut target);
    }
    2.0 * COPY_BYTES as f64 / best / 1e9
}
