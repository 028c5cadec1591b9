//! `m40llm inspect`: what a GGUF file holds and what it needs, without loading its weights.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use m40llm_engine::{
    gguf::{Gguf, TensorInfo},
    info::quantization,
    model::ModelConfig,
    text::{ChatTemplate, PromptFormat, Tokenizer},
};
use serde::Serialize;

use super::{memory::Plan, print};

/// Show what a model file holds and what memory it needs
///
/// Reads the file's header only: architecture, quantisation, tokenizer, chat template, and a memory plan
/// for cards of 12 and 24 GB. A file that could not be served is refused with the reason.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  m40llm inspect model.gguf
  m40llm inspect model.gguf --json | jq '.memory.cards[0].max_context'")]
pub(crate) struct Args {
    /// The model, a GGUF file (of a split one, the first part)
    #[arg(value_name = "MODEL.gguf")]
    model: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    file: String,
    name: Option<String>,
    architecture: String,
    quantization: String,
    parameters: u64,
    #[serde(flatten)]
    dimensions: Dimensions,
    /// By type: how many tensors, how many bytes.
    tensors: BTreeMap<&'static str, Tensors>,
    tokenizer: TokenizerReport,
    chat_template: TemplateReport,
    memory: Plan,
}

#[derive(Debug, Serialize)]
struct Dimensions {
    /// The context the model was trained for.
    context_length: usize,
    embedding_length: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    feed_forward_length: usize,
    vocab_size: usize,
}

#[derive(Debug, Default, Serialize)]
struct Tensors {
    count: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct TokenizerReport {
    model: String,
    pre: Option<String>,
    vocab_size: usize,
    bos: Option<String>,
    eos: Option<String>,
    end_of_generation: Vec<String>,
}

#[derive(Debug, Serialize)]
struct TemplateReport {
    /// `model` (its own), `builtin` (known for its tokenizer) or `none`.
    source: &'static str,
    /// The template's length in characters, when the file has one.
    characters: Option<usize>,
    /// Why there is none.
    problem: Option<String>,
}

/// Reads, then prints as text or as JSON.
pub(crate) fn execute(args: &Args) -> anyhow::Result<()> {
    let report = report(&args.model).with_context(|| format!("cannot use {}", args.model.display()))?;
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { describe(&report) };
    Ok(print(&text)?)
}

fn report(path: &Path) -> anyhow::Result<Report> {
    let file = Gguf::open(path)?;
    let metadata = file.metadata();
    let model = ModelConfig::from_gguf(&file)?;
    let shape = &model.shape;
    let tokenizer = Tokenizer::from_metadata(metadata)?;
    let mut tensors = BTreeMap::<_, Tensors>::new();
    for tensor in file.tensors() {
        let entry = tensors.entry(tensor.dtype.name()).or_default();
        entry.count += 1;
        entry.bytes += bytes_of(tensor);
    }
    let weights_bytes = tensors.values().map(|t| t.bytes).sum();
    let text = |key: &str| -> anyhow::Result<Option<String>> { Ok(metadata.str(key)?.map(str::to_owned)) };
    Ok(Report {
        file: path.display().to_string(),
        name: text("general.name")?,
        quantization: quantization(&file),
        parameters: file.tensors().iter().map(|t| t.dims.iter().product::<usize>() as u64).sum(),
        memory: Plan::new(&model, weights_bytes),
        dimensions: Dimensions {
            context_length: model.ctx_train,
            embedding_length: shape.dim,
            layers: shape.layers,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            feed_forward_length: shape.ffn_dim,
            vocab_size: shape.vocab,
        },
        architecture: model.architecture,
        tensors,
        chat_template: template(&file, &tokenizer)?,
        tokenizer: TokenizerReport {
            model: text("tokenizer.ggml.model")?.unwrap_or_default(),
            pre: text("tokenizer.ggml.pre")?,
            vocab_size: tokenizer.vocab_size(),
            bos: tokenizer.bos().map(|id| tokenizer.token_text(id).to_owned()),
            eos: tokenizer.eos().map(|id| tokenizer.token_text(id).to_owned()),
            end_of_generation: (0..tokenizer.vocab_size() as u32)
                .filter(|id| tokenizer.is_end_of_generation(*id))
                .map(|id| tokenizer.token_text(id).to_owned())
                .collect(),
        },
    })
}

fn bytes_of(tensor: &TensorInfo) -> u64 {
    let rows = tensor.dims[1..].iter().product::<usize>();
    (rows * tensor.dtype.row_bytes(tensor.dims[0])) as u64
}

fn template(file: &Gguf, tokenizer: &Tokenizer) -> anyhow::Result<TemplateReport> {
    let own = file.metadata().str("tokenizer.chat_template")?;
    let (source, problem) = match ChatTemplate::choose(PromptFormat::Auto, file.metadata(), tokenizer) {
        Ok(Some(_)) if own.is_some() => ("model", None),
        Ok(Some(_)) => ("builtin", None),
        Ok(None) => ("none", None),
        Err(error) => ("none", Some(error.to_string())),
    };
    Ok(TemplateReport { source, characters: own.map(|t| t.chars().count()), problem })
}

fn describe(report: &Report) -> String {
    let mut out = String::new();
    let d = &report.dimensions;
    let mut line = |name: &str, text: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{name:<16}{text}");
    };
    line("file", report.file.clone());
    line("name", report.name.clone().unwrap_or_else(|| "(none)".into()));
    line("architecture", report.architecture.clone());
    line("quantisation", report.quantization.clone());
    line("parameters", format!("{:.1} M", report.parameters as f64 / 1e6));
    line("context", format!("{} tokens", d.context_length));
    line(
        "shape",
        format!(
            "{} layers, width {}, {} heads of {} ({} for keys and values), feed-forward {}",
            d.layers, d.embedding_length, d.heads, d.head_dim, d.kv_heads, d.feed_forward_length
        ),
    );
    for (name, tensors) in &report.tensors {
        line("tensors", format!("{:>4} {name:<8}{:>9}", tensors.count, mib(tensors.bytes)));
    }
    let t = &report.tokenizer;
    let pre = t.pre.as_deref().map(|pre| format!(" (pre-tokenizer {pre})")).unwrap_or_default();
    line("tokenizer", format!("{}{pre}, {} tokens", t.model, t.vocab_size));
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".into());
    line("special tokens", format!("begin {}, end {}", or_none(&t.bos), or_none(&t.eos)));
    line("ends a turn", t.end_of_generation.join(" "));
    let c = &report.chat_template;
    line(
        "chat template",
        match (&c.problem, c.source, c.characters) {
            (Some(problem), ..) => format!("none: {}", crate::config::one_line(problem)),
            (None, "model", Some(n)) => format!("the model's own, {n} characters"),
            (None, source, _) => source.to_owned(),
        },
    );
    out + &describe_memory(&report.memory)
}

fn describe_memory(plan: &Plan) -> String {
    let kv = plan.kv_bytes_per_token;
    let mut out = format!(
        "\nMemory on a card: weights {}, scratch about {}, keys and values {} bytes a token (f16) or {} (q8)\n",
        mib(plan.weights_bytes),
        mib(plan.scratch_bytes),
        kv.f16,
        kv.q8
    );
    for card in &plan.cards {
        let head =
            format!("{} GB card, {} usable (ECC on, driver loaded)", card.gigabytes, mib(card.usable_bytes));
        let _ = if card.fits {
            writeln!(
                out,
                "\n{head}: one sequence of up to {} tokens (f16) or {} (q8); cache {} or {} tokens in all",
                card.max_context.f16, card.max_context.q8, card.cache_tokens.f16, card.cache_tokens.q8
            )
        } else {
            writeln!(out, "\n{head}: the model does not fit")
        };
        let _ = writeln!(out, "{:>10}{:>14}{:>14}", "context", "kv f16", "kv q8");
        for at in &card.contexts {
            let cell = |bytes, fits| if fits { mib(bytes) } else { "too much".to_owned() };
            let f16 = cell(at.total_bytes.f16, at.fits_f16);
            let q8 = cell(at.total_bytes.q8, at.fits_q8);
            let _ = writeln!(out, "{:>10}{f16:>14}{q8:>14}", at.context);
        }
    }
    out
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
