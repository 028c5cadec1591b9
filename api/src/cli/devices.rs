//! `m40llm devices`: the CUDA devices of this machine, and what would run on each.

use std::fmt::Write as _;

use m40llm_engine::{
    backend,
    device::{Code, DeviceInfo, Devices},
};
use serde::Serialize;

use super::print;

/// List the CUDA devices, and what would run on each
///
/// Exit code 0 whether there are devices or not; without one, a line says why.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  m40llm devices
  m40llm devices --json
  m40llm run model.gguf --device 1
  m40llm run model.gguf --device GPU-5f2c")]
pub(crate) struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Newest CUDA interface of the driver, when there is one that serves.
    driver_cuda: Option<String>,
    devices: Vec<Entry>,
    /// What keeps a device from being used.
    note: Option<String>,
}

#[derive(Debug, Serialize)]
struct Entry {
    index: usize,
    uuid: String,
    name: String,
    pci_address: String,
    /// Lanes in use and lanes that the card has; null where the system does not tell.
    pci_lanes: Option<[u32; 2]>,
    compute_capability: String,
    total_memory_bytes: u64,
    /// Null where another process holds the device exclusively.
    free_memory_bytes: Option<u64>,
    ecc: bool,
    multiprocessors: u32,
    clock_mhz: u32,
    peak_gb_per_s: f64,
    /// `cubin` (machine code for it), `ptx` (compiled by the driver) or `none`.
    kernels: &'static str,
    /// Why nothing runs there, or what to know.
    notices: Vec<String>,
}

/// Asks the driver, then prints as text or as JSON.
pub(crate) fn execute(args: &Args) -> anyhow::Result<()> {
    let report = report(backend::devices());
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { describe(&report) };
    Ok(print(&text)?)
}

fn report(found: Devices) -> Report {
    Report {
        driver_cuda: found.driver.map(|d| format!("{}.{}", d.cuda.0, d.cuda.1)),
        devices: found.devices.iter().map(entry).collect(),
        note: found.note,
    }
}

fn entry(device: &DeviceInfo) -> Entry {
    let code = device.code();
    let kernels = match code {
        Ok(Code::Cubin) => "cubin",
        Ok(Code::Ptx) => "ptx",
        Err(_) => "none",
    };
    Entry {
        index: device.index,
        uuid: device.uuid.clone(),
        name: device.name.clone(),
        pci_address: device.pci_address.clone(),
        pci_lanes: device.link.map(|link| [link.width, link.most]),
        compute_capability: device.compute_capability.to_string(),
        total_memory_bytes: device.total_memory,
        free_memory_bytes: device.free_memory,
        ecc: device.ecc,
        multiprocessors: device.multiprocessors,
        clock_mhz: device.clock_khz / 1000,
        peak_gb_per_s: device.peak_bandwidth() / 1e9,
        kernels,
        notices: code.err().into_iter().chain(device.notices()).collect(),
    }
}

fn describe(report: &Report) -> String {
    let gigabytes = |bytes: u64| format!("{:.1} GB", bytes as f64 / 1e9);
    let mut out = String::new();
    // Writing to a String cannot fail.
    if report.devices.is_empty() {
        let note = report.note.as_deref().unwrap_or("the driver lists none");
        let _ = writeln!(out, "no CUDA device: {note}");
        return out;
    }
    for d in &report.devices {
        let _ = writeln!(out, "{}  {}  {}", d.index, d.name, d.uuid);
        let mut line = |name: &str, text: String| {
            let _ = writeln!(out, "   {name:<20}{text}");
        };
        line("compute capability", d.compute_capability.clone());
        let kernels = match d.kernels {
            "cubin" => "sm_52 machine code: this is the card they are written for",
            "ptx" => "compute_52 code, compiled by the driver when it is loaded",
            _ => "none",
        };
        line("kernels", kernels.to_owned());
        let free = d.free_memory_bytes.map_or("an unknown part".into(), gigabytes);
        let ecc = if d.ecc { "on" } else { "off" };
        line("memory", format!("{free} free of {}, ECC {ecc}", gigabytes(d.total_memory_bytes)));
        line("bandwidth", format!("{:.0} GB/s at most", d.peak_gb_per_s));
        if let Some([width, most]) = d.pci_lanes {
            line("PCIe", format!("{width} of {most} lanes"));
        }
        line("multiprocessors", format!("{} at up to {} MHz", d.multiprocessors, d.clock_mhz));
        for notice in &d.notices {
            line("notice", notice.clone());
        }
    }
    let driver = report.driver_cuda.as_deref().unwrap_or("unknown");
    let _ = writeln!(out, "\nThe driver offers CUDA {driver}.");
    if let Some(note) = &report.note {
        let _ = writeln!(out, "Besides: {note}.");
    }
    out
}

#[cfg(test)]
mod tests {
    use m40llm_engine::device::{ComputeCapability, Driver, PciLink};

    use super::*;

    fn card(index: usize, name: &str, major: u32, minor: u32) -> DeviceInfo {
        DeviceInfo {
            index,
            uuid: format!("GPU-{index}f2c4a1e-0000-1111-2222-333344445555"),
            name: name.into(),
            pci_address: format!("0000:0{index}:00.0"),
            link: (index < 2).then_some(PciLink { width: 8, most: 16 }),
            compute_capability: ComputeCapability { major, minor },
            total_memory: 12_079_136_768,
            free_memory: Some(11_900_000_000),
            ecc: index == 0,
            multiprocessors: 24,
            clock_khz: 1_112_000,
            memory_clock_khz: 3_004_000,
            bus_bits: 384,
        }
    }

    #[test]
    fn every_device_is_listed_with_what_runs_there() {
        let devices =
            vec![card(0, "Tesla M40", 5, 2), card(1, "NVIDIA H100", 9, 0), card(2, "Tesla K80", 3, 7)];
        let found = Devices { driver: Some(Driver { cuda: (13, 0) }), devices, note: None };
        let report = report(found);
        assert_eq!(report.devices.iter().map(|d| d.kernels).collect::<Vec<_>>(), ["cubin", "ptx", "none"]);
        let text = describe(&report);
        for part in [
            "0  Tesla M40  GPU-0f2c4a1e-0000-1111-2222-333344445555",
            "11.9 GB free of 12.1 GB, ECC on",
            "288 GB/s",
            "8 of 16 lanes",
            "24 at up to 1112 MHz",
            "need 5.2 or newer",
            "offers CUDA 13.0",
        ] {
            assert!(text.contains(part), "{text} lacks {part:?}");
        }
    }

    #[test]
    fn no_device_is_one_line() {
        let text = describe(&report(Devices { note: Some("no card".into()), ..Devices::default() }));
        assert_eq!(text, "no CUDA device: no card\n");
    }
}
