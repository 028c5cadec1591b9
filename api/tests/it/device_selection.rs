//! `docs/device_selection.md` shows what the program says on machines of several kinds. Each is made up here, as the program sees
//! it: the bus and the kernel's driver by a preloaded library (`machine.c`), the driver's library by one that describes
//! cards (`driver.c`). The binary is the one that everybody gets.

mod page;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::LazyLock,
};

use m40llm_engine::device::Host;
use tempfile::TempDir;

use self::page::{Shown, page, shown, words};
use crate::cli::{m40llm, model};

/// A Tesla M40 of which so many bytes are free, as `driver.c` reads it.
macro_rules! m40 {
    ($free:literal) => {
        concat!(
            "5.2 total=12079136768 free=",
            $free,
            " ecc=0 sms=24 clock=1112000 memory_clock=3004000 bus_bits=384 pci=3 Tesla M40"
        )
    };
}

/// The kinds of machine, by the headings of the page.
const MACHINES: &[(&str, Machine)] = &[
    ("Neither card nor driver", Machine::new()),
    ("A Tesla M40", Machine::with_m40(&[M40_24GB])),
    (
        "A Tesla M40 in a narrow slot that others use",
        Machine {
            bus: &[Slot { lanes: "4", ..M40_ON_BUS }],
            library: Some("13000"),
            cards: &[m40!("4100000000")],
            ..Machine::loaded("580.95.05")
        },
    ),
    (
        "An H100",
        Machine {
            bus: &[H100_ON_BUS],
            library: Some("13000"),
            cards: &[H100],
            ..Machine::loaded("580.95.05")
        },
    ),
    (
        "An H100 whose driver is older than the kernels' compiler",
        Machine {
            bus: &[H100_ON_BUS],
            library: Some("12040"),
            cards: &[H100],
            ..Machine::loaded("550.163.01")
        },
    ),
    (
        "Two cards whose UUIDs begin alike",
        Machine { library: Some("12040"), cards: &[M40_24GB, M40_24GB], ..Machine::loaded("550.163.01") },
    ),
    (
        "A card older than the kernels",
        Machine {
            library: Some("12090"),
            cards: &[
                "5.0 total=2095251456 free=2000000000 ecc=0 sms=5 clock=1084000 memory_clock=2700000 bus_bits=128 \
                      pci=1 NVIDIA GeForce GTX 750 Ti",
            ],
            ..Machine::loaded("575.64.03")
        },
    ),
    (
        "A driver older than CUDA 12.4",
        Machine {
            bus: &[M40_ON_BUS],
            library: Some("12020"),
            cards: &[M40_24GB],
            ..Machine::loaded("535.129.03")
        },
    ),
    (
        "A driver too new for the Tesla M40",
        Machine { bus: &[M40_ON_BUS], library: Some("13010"), ..Machine::loaded("590.44.01") },
    ),
    (
        "A driver too new for the Tesla M40, beside an H100",
        Machine {
            bus: &[M40_ON_BUS, H100_ON_BUS],
            library: Some("13010"),
            cards: &[H100],
            ..Machine::loaded("590.44.01")
        },
    ),
    ("A card without a driver", Machine { bus: &[M40_ON_BUS], ..Machine::new() }),
    (
        "A container without the NVIDIA runtime",
        Machine { bus: &[M40_ON_BUS], ..Machine::loaded("580.95.05") },
    ),
    (
        "A card that is hidden",
        Machine { bus: &[M40_ON_BUS], library: Some("13000"), ..Machine::loaded("580.95.05") },
    ),
    ("Too little memory for the model", Machine::with_m40(&[m40!("250000000")])),
    ("Too little memory for so long a context", Machine::with_m40(&[m40!("400000000")])),
    ("A card that others have filled", Machine::with_m40(&[m40!("1000000")])),
];

/// As `driver.c` reads them.
const M40_24GB: &str = "5.2 total=24059576320 free=23960000000 ecc=1 sms=24 clock=1112000 memory_clock=3004000 bus_bits=384 \
                        pci=3 Tesla M40 24GB";
const H100: &str = "9.0 total=85029158912 free=84510000000 ecc=1 sms=132 clock=1980000 memory_clock=2619000 bus_bits=5120 \
                    pci=4 NVIDIA H100 80GB HBM3";

const M40_ON_BUS: Slot = Slot { address: "0000:03:00.0", device: "0x17fd", lanes: "16" };
const H100_ON_BUS: Slot = Slot { address: "0000:04:00.0", device: "0x2330", lanes: "16" };

/// What the machine has.
struct Machine {
    bus: &'static [Slot],
    /// The version of the kernel's driver.
    kernel_driver: Option<&'static str>,
    /// The CUDA version of the driver's library, and the cards that it lists.
    library: Option<&'static str>,
    cards: &'static [&'static str],
}

/// A card on the bus.
struct Slot {
    address: &'static str,
    device: &'static str,
    lanes: &'static str,
}

impl Machine {
    /// Nothing.
    const fn new() -> Self {
        Self { bus: &[], kernel_driver: None, library: None, cards: &[] }
    }

    /// A kernel with a driver.
    const fn loaded(version: &'static str) -> Self {
        Self { kernel_driver: Some(version), ..Self::new() }
    }

    /// With a driver for it and a Tesla M40 in one slot.
    const fn with_m40(cards: &'static [&'static str]) -> Self {
        Self { bus: &[M40_ON_BUS], library: Some("12040"), cards, ..Self::loaded("550.163.01") }
    }

    /// Its files, as the program finds them under `MACHINE`, and the driver's library or what stands in its way.
    fn files(&self) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: String, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        fs::create_dir_all(dir.path().join("sys/bus/pci/devices")).unwrap();
        for Slot { address, device, lanes } in self.bus {
            for (name, text) in [
                ("vendor", "0x10de"),
                ("class", "0x030200"),
                ("device", device),
                ("current_link_width", lanes),
                ("max_link_width", "16"),
            ] {
                write(format!("sys/bus/pci/devices/{address}/{name}"), &format!("{text}\n"));
            }
        }
        if let Some(version) = self.kernel_driver {
            let text = format!("NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Release Build\n");
            write("proc/driver/nvidia/version".into(), &text);
        }
        for name in ["libcuda.so", "libcuda.so.1"] {
            match self.library {
                Some(_) => fs::copy(&LIBRARIES.driver, dir.path().join(name)).map(drop).unwrap(),
                // The loader stops at the first file of the name, and this one is no library.
                None => write(name.into(), ""),
            }
        }
        dir
    }

    /// The program on this machine.
    fn command(&self, files: &Path, arguments: &[&str]) -> Command {
        let mut command = m40llm(arguments);
        command.env("LD_PRELOAD", &LIBRARIES.machine).env("LD_LIBRARY_PATH", files).env("MACHINE", files);
        command.env("DRIVER_CUDA", self.library.unwrap_or_default());
        for (i, card) in self.cards.iter().enumerate() {
            command.env(format!("CARD_{i}"), card);
        }
        command
    }

    fn answer(&self, arguments: &[&str]) -> Output {
        let files = self.files();
        self.command(files.path(), arguments).output().expect("the binary starts")
    }
}

struct Libraries {
    machine: PathBuf,
    driver: PathBuf,
}

static LIBRARIES: LazyLock<Libraries> = LazyLock::new(|| {
    let compile = |name: &str| {
        let source =
            Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/it/device_selection/{name}.c"));
        let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("lib{name}.so"));
        let mut cc = Command::new("cc");
        cc.args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]);
        let built = cc.arg(source).arg("-o").arg(&library).arg("-ldl").output().expect("a C compiler, cc");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        library
    };
    Libraries { machine: compile("machine"), driver: compile("driver") }
});

#[test]
fn each_machine_says_what_the_page_shows() {
    let shown = shown(&page());
    let headings: Vec<_> = shown.keys().map(String::as_str).collect();
    let mut known: Vec<_> = MACHINES.iter().map(|(heading, _)| *heading).collect();
    known.sort_unstable();
    assert_eq!(headings, known, "headings with commands, and machines made up for them");
    for (heading, machine) in MACHINES {
        for Shown { command, answer } in &shown[*heading] {
            let words = words(command);
            let model = model();
            let words: Vec<_> = words
                .iter()
                .map(|word| if word == "model.gguf" { model.as_str() } else { word.as_str() })
                .collect();
            assert_eq!(words[0], "m40llm", "{command}");
            let output = machine.answer(&words[1..]);
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).replace(&model, "model.gguf");
            let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
            let (code, silent, said) = match words[1] {
                "devices" => (0, &stderr, &stdout),
                _ if words.contains(&"--ctx-size") => (2, &stdout, &stderr),
                _ => (1, &stdout, &stderr),
            };
            // What a model needs changes with the kernels; the page's numbers are an example.
            let numbers = |text: &str| {
                if heading.starts_with("Too little memory") {
                    text.replace(|c: char| c.is_ascii_digit(), "")
                } else {
                    text.to_owned()
                }
            };
            assert_eq!((numbers(said), silent.as_str()), (numbers(answer), ""), "{heading}: {command}");
            assert_eq!(output.status.code(), Some(code), "{heading}: {command}");
        }
    }
}

#[test]
fn this_machine_is_one_of_them() {
    let output = m40llm(&["devices", "--json"]).output().expect("the binary starts");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let note = report["note"].as_str().unwrap_or_default();
    // Where somebody's card is, the tests' `CUDA_VISIBLE_DEVICES=-1` hides it.
    let (host, text) = (Host::read(), page());
    if host == Host::default() && report["driver_cuda"].is_null() {
        assert!(text.contains(&format!("\nno CUDA device: {note}\n")), "{note:?} is not on the page");
    } else {
        assert!(note.contains("CUDA_ERROR_NO_DEVICE") || note.contains("libcuda.so.1"), "{note:?}");
    }
}

#[cfg(feature = "server")]
#[test]
fn a_server_that_took_the_cpu_says_why() {
    let machine = &MACHINES[0].1;
    let files = machine.files();
    let model = model();
    let run = ["run", &model, "--addr", "127.0.0.1:0", "--no-auth", "--ctx-size", "64"];
    let mut server = machine
        .command(files.path(), &run)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut log = BufReader::new(server.stderr.take().expect("a pipe"));
    let mut said = String::new();
    while !said.contains("listening on") && log.read_line(&mut said).expect("a log") > 0 {}
    server.kill().expect("it runs");
    server.wait().expect("it ends");
    log.read_to_string(&mut said).expect("the rest");
    let line = page();
    let line = line.lines().find(|line| line.starts_with("no CUDA device, so ")).expect("the page's line");
    assert!(said.lines().any(|logged| logged.contains("INFO") && logged.ends_with(line)), "{said}");
}
