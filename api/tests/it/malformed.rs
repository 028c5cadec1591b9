//! Files that are no usable model, given to the binary as a user would.

use std::{fs, process::Command};

use crate::gguf_files::malformed::{incomplete, malformed, write_into};

/// Each ends in exit code 1 and one line, in less than a gigabyte of address space.
#[test]
fn malformed_files_end_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let wrong = [malformed(), incomplete()].concat();
    assert!(wrong.len() >= 40, "only {} files", wrong.len());
    let mut paths = write_into(folder.path(), &wrong);
    paths.push(folder.path().join("absent.gguf"));
    paths.push(folder.path().to_owned());
    fs::write(folder.path().join("text.gguf"), "This is a text.\n").unwrap();
    paths.push(folder.path().join("text.gguf"));
    for path in paths {
        // The limit turns a larger allocation into an abort, which is no exit code 1.
        let output = Command::new("sh")
            .args(["-c", r#"ulimit -v 1000000 && exec "$0" generate "$1" hello --threads 1"#])
            .arg(env!("CARGO_BIN_EXE_m40llm"))
            .arg(&path)
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        let name = path.display();
        assert_eq!(output.status.code(), Some(1), "{name}: {error}");
        assert_eq!(error.lines().count(), 1, "{name}: {error}");
        assert!(error.len() > 20 && !error.contains("panicked"), "{name}: {error}");
        assert!(output.stdout.is_empty(), "{name} printed to stdout");
    }
}
