//! A part of the build script: how compiled kernels are put into the program. A card of `sm_52` loads cubins by the file, a newer
//! one PTX by the kernel; both are deflated, since a program has no use for most of them.

use std::{fmt::Write as _, fs, io::Write as _, path::Path};

use flate2::{Compression, write::DeflateEncoder};

/// Deflates `NAME.cubin`, and each kernel's part of `NAME.ptx`, in `out`; yields the file's line of `kernels.rs`.
pub(super) fn image(name: &str, out: &Path) -> Result<String, String> {
    let read = |kind: &str| {
        let path = out.join(format!("{name}.{kind}"));
        fs::read(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))
    };
    let ptx = String::from_utf8(read("ptx")?).map_err(|e| format!("{name}.ptx: {e}"))?;
    let version = version_of(&ptx).ok_or_else(|| format!("{name}.ptx has no version"))?;
    deflate(&read("cubin")?, &out.join(format!("{name}.cubin.z")))?;
    let mut line = format!(
        "Image {{ name: \"{name}\", version: {version:?}, cubin: include_bytes!(\"{name}.cubin.z\"), kernels: &["
    );
    for kernel in kernels(&ptx) {
        deflate(ptx_of(&ptx, kernel).as_bytes(), &out.join(format!("{kernel}.ptx.z")))?;
        let _ = write!(line, "(\"{kernel}\", include_bytes!(\"{kernel}.ptx.z\")), ");
    }
    line.push_str("] },\n");
    Ok(line)
}

fn deflate(bytes: &[u8], to: &Path) -> Result<(), String> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    let deflated = encoder.write_all(bytes).and_then(|()| encoder.finish());
    let written = deflated.and_then(|deflated| fs::write(to, deflated));
    written.map_err(|e| format!("cannot write {}: {e}", to.display()))
}

/// `.version 8.8`, a line before any code.
fn version_of(ptx: &str) -> Option<(u32, u32)> {
    let (major, minor) =
        ptx.lines().find_map(|line| line.strip_prefix(".version "))?.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Starts a kernel in PTX; it ends with the first line that is a brace alone.
const ENTRY: &str = ".visible .entry ";

/// The names of a file's kernels.
fn kernels(ptx: &str) -> impl Iterator<Item = &str> {
    let entries = ptx.lines().filter_map(|line| line.strip_prefix(ENTRY));
    entries.filter_map(|rest| rest.split('(').next())
}

/// The code of one kernel of a file: all that is not another kernel.
fn ptx_of(ptx: &str, name: &str) -> String {
    let mut kept = String::new();
    let mut skipping = false;
    for line in ptx.split_inclusive('\n') {
        if let Some(rest) = line.strip_prefix(ENTRY) {
            skipping = rest.split('(').next() != Some(name);
        }
        if !skipping {
            kept.push_str(line);
        }
        skipping &= line.trim_end() != "}";
    }
    kept
}
