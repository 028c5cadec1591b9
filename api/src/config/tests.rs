//! All layers taken together.

use std::{path::Path, time::Duration};

use clap::Parser as _;
use m40llm_engine::{BackendChoice, DeviceId, KvType, PrefixCache, text::PromptFormat};
use tracing::level_filters::LevelFilter;

use super::{
    ConfigError,
    layers::Layers,
    serve::{ServeArgs, ServeConfig},
    values::LogFormat,
};

/// A home is there unless `env` says otherwise.
fn layers(env: &'static [(&'static str, &'static str)], toml: &str) -> Result<Layers, ConfigError> {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("m40llm.toml");
    std::fs::write(&path, toml).expect("a file");
    Layers::read_with(
        Some(&path),
        Box::new(move |name| {
            let set = env.iter().find(|(k, _)| *k == name).map(|(_, v)| v.into());
            set.or_else(|| (name == "HOME").then(|| "/home/u".into()))
        }),
    )
}

/// A command line of `run` as far as settings go.
#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    settings: ServeArgs,
}

fn flags(flags: &[&str]) -> ServeArgs {
    Line::parse_from([&["run"], flags].concat()).settings
}

fn serve(
    args: ServeArgs,
    env: &'static [(&'static str, &'static str)],
    toml: &str,
) -> Result<ServeConfig, ConfigError> {
    args.resolve_in(&layers(env, toml)?)
}

#[test]
fn a_flag_wins_over_the_environment_and_that_over_the_file() {
    let toml = "threads = 1\nctx-size = 10\nmax-batch = 100\nno-auth = true\nmodel-alias = \"filed\"\n\
                on-device-failure = \"stay\"\nenable-cublas = false";
    let env = &[
        ("M40LLM_ENABLE_CUBLAS", "1"),
        ("M40LLM_THREADS", "2"),
        ("M40LLM_CTX_SIZE", "20"),
        ("M40LLM_MODEL_ALIAS", ""),
    ];
    let args = flags(&["--threads", "3"]);
    let config = serve(args, env, toml).expect("a configuration");
    assert_eq!(config.model.engine.threads, Some(3));
    assert_eq!(config.model.engine.ctx_size, Some(20));
    assert_eq!(config.model.engine.max_batch, 100);
    assert!(config.model.engine.cublas);
    assert_eq!(config.model_alias.as_deref(), Some("filed"), "an empty variable counts as absent");
    assert!(config.vault.is_none() && !config.exit_on_failure);
}

#[test]
fn nothing_said_is_the_contracts_defaults() {
    let config = serve(ServeArgs::default(), &[], "").expect("a configuration");
    assert_eq!(config.addr.to_string(), "127.0.0.1:58439");
    assert_eq!(config.model.engine.max_queue, 256);
    assert_eq!(config.model.engine.kv_type, KvType::F16);
    assert_eq!(config.model.engine.prefix_cache, PrefixCache::PerCaller);
    assert_eq!(config.model.engine.kv_memory, None);
    assert!(!config.model.engine.cublas);
    assert_eq!(config.model.engine.backend, BackendChoice::Auto);
    assert_eq!(config.prompt_format, PromptFormat::Auto);
    let vault = config.vault.expect("keys");
    assert_eq!(vault.dir, Path::new("/home/u/.local/state/m40llm"));
    assert!(vault.signing_secret.is_none() && !config.private_docs);
    assert!(config.model.asked_device.is_empty());
    assert!(config.exit_on_failure);
    assert_eq!(config.drain_timeout, Duration::from_secs(30));
    assert_eq!((config.log_format, config.log_level), (LogFormat::Text, LevelFilter::INFO));
    assert_eq!(config.otlp_endpoint, None);
}

#[test]
fn the_collectors_usual_variable_stands_between_ours_and_the_file() {
    const TOML: &str = "otlp-endpoint = \"http://file:1\"";
    const USUAL: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://usual:1");
    let chosen = |env| {
        let config = serve(ServeArgs::default(), env, TOML).expect("a configuration");
        config.otlp_endpoint.expect("an endpoint").authority
    };
    assert_eq!(chosen(&[]), "file:1");
    assert_eq!(chosen(&[USUAL]), "usual:1");
    assert_eq!(chosen(&[USUAL, ("M40LLM_OTLP_ENDPOINT", "http://ours:1")]), "ours:1");
    let error = serve(ServeArgs::default(), &[("OTEL_EXPORTER_OTLP_ENDPOINT", "grpc://a:1")], "");
    assert!(error.expect_err("grpc").0.contains("OTEL_EXPORTER_OTLP_ENDPOINT is \"grpc://a:1\""));
}

#[test]
fn a_flag_set_to_false_overrides_the_layers_below() {
    let args = flags(&["--no-auth=false"]);
    let env = &[("M40LLM_NO_AUTH", "1")];
    assert!(serve(args, env, "no-auth = true").expect("a configuration").vault.is_some());
}

#[test]
fn whatever_asks_for_a_device_asks_for_cuda() {
    let uuid = || Some(DeviceId::Uuid("GPU-5f2c".into()));
    for (toml, choice, asked) in [
        ("backend = \"cpu\"", BackendChoice::Cpu, ""),
        (
            "device = 1",
            BackendChoice::Cuda { device: Some(DeviceId::Index(1)), require_sm52: false },
            "--device 1",
        ),
        (
            "device = \"gpu-5F2C\"",
            BackendChoice::Cuda { device: uuid(), require_sm52: false },
            "--device GPU-5f2c",
        ),
        ("require-sm52 = true", BackendChoice::Cuda { device: None, require_sm52: true }, "--require-sm52"),
        (
            "backend = \"cuda\"\ndevice = 0\nrequire-sm52 = true",
            BackendChoice::Cuda { device: Some(DeviceId::Index(0)), require_sm52: true },
            "--backend cuda --device 0 --require-sm52",
        ),
    ] {
        let model = serve(ServeArgs::default(), &[], toml).expect(toml).model;
        assert_eq!((model.engine.backend, model.asked_device.as_str()), (choice, asked), "{toml}");
    }
    for toml in ["backend = \"cpu\"\ndevice = 0", "backend = \"cpu\"\nrequire-sm52 = true"] {
        let error = serve(ServeArgs::default(), &[], toml).expect_err(toml).0;
        assert!(error.contains("backend cpu"), "{error}");
    }
}

#[test]
fn the_state_directory_follows_xdg() {
    const XDG: (&str, &str) = ("XDG_STATE_HOME", "/x");
    let dir = |env, toml| serve(ServeArgs::default(), env, toml).map(|c| c.vault.expect("keys").dir);
    assert_eq!(dir(&[XDG], ""), Ok("/x/m40llm".into()));
    assert_eq!(dir(&[("XDG_STATE_HOME", "x")], ""), Ok("/home/u/.local/state/m40llm".into()));
    assert_eq!(dir(&[XDG], "state-dir = \"/file\""), Ok("/file".into()));
    assert_eq!(dir(&[("M40LLM_STATE_DIR", "/env")], "state-dir = \"/file\""), Ok("/env".into()));
    assert!(dir(&[("HOME", "")], "").expect_err("nowhere").0.contains("--state-dir"));
}

#[test]
fn a_bad_signing_secret_is_refused_and_not_shown() {
    const LONG: (&str, &str) = ("M40LLM_SIGNING_SECRET", "0123456789abcdef0123456789abcdef");
    let error = serve(ServeArgs::default(), &[("M40LLM_SIGNING_SECRET", "hunter2")], "").expect_err("short");
    assert!(error.0.contains("M40LLM_SIGNING_SECRET") && error.0.contains("32"), "{error}");
    assert!(!error.0.contains("hunter2"), "{error}");
    let config = serve(ServeArgs::default(), &[LONG], "").expect("a configuration");
    assert!(!format!("{config:?}").contains("0123456789abcdef"));
}

#[test]
fn certificate_and_key_come_together() {
    let both = "tls-cert = \"c.pem\"\ntls-key = \"k.pem\"";
    let tls = serve(ServeArgs::default(), &[], both).expect("a configuration").tls;
    assert_eq!(tls, Some(("c.pem".into(), "k.pem".into())));
    for (given, missing) in [("tls-cert", "tls-key is not"), ("tls-key", "tls-cert is not")] {
        let toml = format!("{given} = \"x.pem\"");
        let error = serve(ServeArgs::default(), &[], &toml).expect_err(given).0;
        assert!(error.starts_with(given) && error.contains(missing), "{error}");
    }
}

#[test]
fn a_wrong_variable_is_named_with_what_is_allowed() {
    let error = serve(ServeArgs::default(), &[("M40LLM_KV_TYPE", "f8")], "").expect_err("f8");
    assert_eq!(error.0, "the environment variable M40LLM_KV_TYPE is \"f8\": allowed are f16, f32, q8");
}

#[test]
fn a_wrong_file_names_the_key_the_file_and_what_is_allowed() {
    for (toml, parts) in [
        ("thread = 2", &["\"thread\"", "m40llm.toml", "threads, kv-type"] as &[&str]),
        ("threads = \"2\"", &["\"threads\"", "m40llm.toml", "whole number"]),
        ("threads = 0", &["\"threads\"", "m40llm.toml", "from 1 to 1024"]),
        ("device = \"M40\"", &["\"device\"", "m40llm.toml", "0 to 63", "UUID"]),
        ("device = true", &["\"device\"", "m40llm.toml", "a string in quotes"]),
        ("backend = \"gpu\"", &["\"backend\"", "m40llm.toml", "auto, cuda, cpu"]),
        ("on-device-failure = \"hang\"", &["\"on-device-failure\"", "exit, stay"]),
        ("prefix-cache = \"all\"", &["\"prefix-cache\"", "shared, per-caller, off"]),
        ("drain-timeout = \"soon\"", &["\"drain-timeout\"", "30s"]),
        ("kv-memory = \"4 bananas\"", &["\"kv-memory\"", "512MB"]),
        ("log-format = \"xml\"", &["\"log-format\"", "text, json"]),
        ("log-level = \"loud\"", &["\"log-level\"", "error, warn, info, debug, trace"]),
        ("otlp-endpoint = \"https://a:4318\"", &["\"otlp-endpoint\"", "http://127.0.0.1:4318"]),
        ("no-auth = 1", &["\"no-auth\"", "m40llm.toml", "true and false"]),
        ("cors-origins = \"https://a/b\"", &["\"cors-origins\"", "https://app.example"]),
        ("addr = \"localhost\"", &["\"addr\"", "m40llm.toml", "HOST:PORT"]),
        ("[server]\naddr = \"x\"", &["\"server\"", "m40llm.toml"]),
        ("max-connections = 0", &["\"max-connections\"", "from 1 to 1048576"]),
        ("tls-cert = \"\"", &["\"tls-cert\"", "PEM file"]),
        ("threads 2", &["m40llm.toml", "line 1"]),
    ] {
        let error = layers(&[], toml).err().expect(toml).0;
        for part in parts {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
        assert_eq!(error.lines().count(), 1, "{error:?}");
    }
}
