//! Writes `include/m40llm.h` (`make header`); its test holds the committed one equal.

use std::{fs, path::PathBuf};

/// What exports, in the order in which a C programmer wants to read it.
const SOURCES: [&str; 4] = ["status.rs", "types.rs", "model.rs", "session.rs"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn header() -> PathBuf {
    root().join("include/m40llm.h")
}

fn generate() -> String {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).expect("cbindgen.toml is right");
    // File by file, since following `mod` would ask cargo for all dependencies of all platforms.
    let builder = SOURCES.iter().fold(cbindgen::Builder::new().with_config(config), |builder, name| {
        builder.with_src(root().join("src/ffi").join(name))
    });
    let mut text = Vec::new();
    builder.generate().expect("src/ffi has an interface for C").write(&mut text);
    String::from_utf8(text).expect("a header is text")
}

fn main() {
    fs::write(header(), generate()).expect("include/m40llm.h can be written");
}

#[test]
fn the_header_is_current() {
    let committed = fs::read_to_string(header()).expect("include/m40llm.h is there");
    assert!(committed == generate(), "include/m40llm.h is not what src/ffi makes: run `make header`");
}
