//! What the machine says without the driver's library: NVIDIA's cards on the bus, and the kernel driver's version.
//! Enough to tell a missing card from a missing, an old, or a too new driver.

use std::{fs, path::Path};

use super::DeviceInfo;

/// The last driver branch that runs Maxwell cards.
const LAST_MAXWELL_BRANCH: u32 = 580;
/// CUDA 12.4: the driver interface that the engine uses.
const OLDEST_CUDA: (u32, u32) = (12, 4);
/// The first branch that offers it.
const OLDEST_BRANCH: u32 = 550;

/// The driver's library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Driver {
    /// Newest CUDA interface that it offers.
    pub cuda: (u32, u32),
}

impl Driver {
    /// From `cuDriverGetVersion`: 12040 is 12.4.
    pub fn from_version(version: i32) -> Self {
        let version = version.max(0).cast_unsigned();
        Self { cuda: (version / 1000, version % 1000 / 10) }
    }

    /// Refuses what lacks functions that the engine calls.
    pub fn check(self) -> Result<(), String> {
        if self.cuda >= OLDEST_CUDA {
            return Ok(());
        }
        let ((major, minor), (old_major, old_minor)) = (OLDEST_CUDA, self.cuda);
        Err(format!(
            "cuDriverGetVersion: the driver offers CUDA {old_major}.{old_minor} and {major}.{minor} is needed: install \
             branch R{OLDEST_BRANCH} or newer (R{LAST_MAXWELL_BRANCH} is the last for Tesla M40)"
        ))
    }

    /// Refuses to have code compiled that is newer than the driver's own compiler. `ptx` is that code's version.
    pub fn check_compiler(self, ptx: (u32, u32), device: &DeviceInfo) -> Result<(), String> {
        // CUDA 12.6 had no PTX version of its own: up to 12.5 the second numbers are equal, from 12.7 on one apart.
        let needed = match ptx {
            (8, minor) => (12, if minor > 5 { minor + 1 } else { minor }),
            (major, minor) => (major + 4, minor),
        };
        if self.cuda >= needed {
            return Ok(());
        }
        let ((has_major, has_minor), (major, minor)) = (self.cuda, needed);
        Err(format!(
            "{device} has compute capability {}, for which the driver compiles the kernels: it offers CUDA \
             {has_major}.{has_minor} and {major}.{minor} is needed: install branch R{} or newer",
            device.compute_capability,
            branch_of(needed)
        ))
    }
}

/// The first driver branch that offers a CUDA of the 12 series: R550 has 12.4, R575 has 12.9.
fn branch_of((_, minor): (u32, u32)) -> u32 {
    OLDEST_BRANCH + 5 * minor.saturating_sub(OLDEST_CUDA.1)
}

/// An NVIDIA display or compute card on the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciCard {
    /// `0000:03:00.0`.
    pub address: String,
    /// The device's number at NVIDIA.
    pub device: u16,
}

impl PciCard {
    /// Chips GM200, GM204 and GM206, which are compute capability 5.2.
    fn is_target(&self) -> bool {
        matches!(self.device, 0x13c0..=0x143f | 0x17c0..=0x17ff)
    }

    fn name(&self) -> &'static str {
        match self.device {
            0x17fd => "a Tesla M40",
            0x13f2 => "a Tesla M60",
            0x1431 => "a Tesla M4",
            _ if self.is_target() => "a Maxwell card",
            _ => "an NVIDIA card",
        }
    }
}

/// What the machine says without the driver's library.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Host {
    /// NVIDIA's cards on the bus.
    pub cards: Vec<PciCard>,
    /// Version of the loaded kernel driver: `580.95.05`.
    pub kernel_driver: Option<String>,
}

impl Host {
    /// Reads `/sys` and `/proc`.
    pub fn read() -> Self {
        let version = fs::read_to_string("/proc/driver/nvidia/version").ok();
        Self { cards: cards(Path::new(DEVICES)), kernel_driver: version.as_deref().and_then(kernel_driver) }
    }

    fn branch(&self) -> Option<u32> {
        self.kernel_driver.as_deref()?.split('.').next()?.parse().ok()
    }

    /// A card on the bus that the driver does not list, told with the likely reason. `listed`: the addresses that it lists.
    pub fn unlisted(&self, listed: &[&str]) -> Option<String> {
        let missing = |card: &&PciCard| !listed.iter().any(|a| a.eq_ignore_ascii_case(&card.address));
        let card = self.cards.iter().filter(missing).max_by_key(|card| card.is_target())?;
        let found = format!("{} is at {} on the bus, but", card.name(), card.address);
        Some(match (&self.kernel_driver, self.branch()) {
            (Some(version), Some(branch)) if branch > LAST_MAXWELL_BRANCH && card.is_target() => format!(
                "{found} driver {version} does not run Maxwell: install branch R{LAST_MAXWELL_BRANCH}, the last that does"
            ),
            (Some(version), _) => format!(
                "{found} driver {version} does not list it: see `nvidia-smi` and `dmesg`, and whether \
                 CUDA_VISIBLE_DEVICES or the container hides it"
            ),
            (None, _) => format!(
                "{found} no NVIDIA kernel driver is loaded: install one (R{OLDEST_BRANCH} to R{LAST_MAXWELL_BRANCH} for Tesla M40)"
            ),
        })
    }

    /// Why there is no driver library to load.
    pub fn no_library(&self) -> String {
        let remedy = "in a container, run it with the NVIDIA runtime";
        match (&self.kernel_driver, self.cards.first()) {
            (Some(version), _) => {
                format!(
                    "libcuda.so.1 is not found, though kernel driver {version} is loaded: install its libraries; {remedy}"
                )
            }
            (None, Some(card)) => format!(
                "libcuda.so.1 is not found, though {} is at {} on the bus: install NVIDIA's driver (R{OLDEST_BRANCH} to \
                 R{LAST_MAXWELL_BRANCH} for Tesla M40); {remedy}",
                card.name(),
                card.address
            ),
            (None, None) => "no NVIDIA card and no driver (libcuda.so.1) are on this machine".into(),
        }
    }
}

/// Lanes of a card's connection to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciLink {
    /// In use now.
    pub width: u32,
    /// That the card has.
    pub most: u32,
}

impl PciLink {
    /// Of the card at `address`; `None` where the system does not tell, as in most virtual machines.
    pub fn read(address: &str) -> Option<Self> {
        link(&Path::new(DEVICES).join(address.to_ascii_lowercase()))
    }
}

/// What the system knows of the bus.
const DEVICES: &str = "/sys/bus/pci/devices";

fn link(card: &Path) -> Option<PciLink> {
    let lanes = |name: &str| fs::read_to_string(card.join(name)).ok()?.trim().parse().ok();
    let link = PciLink { width: lanes("current_link_width")?, most: lanes("max_link_width")? };
    // 0 and 255 stand for unknown.
    (1..=32).contains(&link.width).then_some(link).filter(|link| (1..=32).contains(&link.most))
}

/// `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue …`: the first word that is a version.
fn kernel_driver(text: &str) -> Option<String> {
    let is_version = |word: &&str| {
        let mut parts = word.split('.');
        parts.clone().count() >= 2 && parts.all(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))
    };
    text.lines().next()?.split_whitespace().find(is_version).map(str::to_owned)
}

fn cards(devices: &Path) -> Vec<PciCard> {
    let hex = |path: &Path, name: &str| {
        let text = fs::read_to_string(path.join(name)).ok()?;
        u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
    };
    let mut cards: Vec<_> = fs::read_dir(devices)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            // Class 0300 is VGA, 0302 a 3D controller: the others of NVIDIA's are audio, USB and bridges.
            let is_card =
                hex(&path, "vendor")? == 0x10de && matches!(hex(&path, "class")? >> 8, 0x0300 | 0x0302);
            let device = u16::try_from(hex(&path, "device")?).ok()?;
            is_card.then(|| PciCard { address: entry.file_name().to_string_lossy().into_owned(), device })
        })
        .collect();
    cards.sort_by(|a, b| a.address.cmp(&b.address));
    cards
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::tests::card;

    fn host(device: u16, driver: Option<&str>) -> Host {
        let card = PciCard { address: "0000:03:00.0".into(), device };
        Host { cards: vec![card], kernel_driver: driver.map(str::to_owned) }
    }

    #[test]
    fn a_driver_older_than_the_interface_is_refused() {
        assert_eq!(Driver::from_version(12040).check(), Ok(()));
        assert_eq!(Driver::from_version(13000), Driver { cuda: (13, 0) });
        let error = Driver::from_version(12020).check().expect_err("12.2");
        assert!(error.contains("12.2") && error.contains("R550") && error.contains("R580"), "{error}");
        assert!(Driver::from_version(-1).check().is_err());
    }

    #[test]
    fn a_driver_older_than_the_kernels_compiler_is_told_for_cards_that_want_them_compiled() {
        let h100 = card(1, "NVIDIA H100", (9, 0));
        let check = |version, ptx| Driver::from_version(version).check_compiler(ptx, &h100);
        assert_eq!(
            (check(12090, (8, 8)), check(13000, (8, 8)), check(12050, (8, 5))),
            (Ok(()), Ok(()), Ok(()))
        );
        for (version, ptx, parts) in [
            (12080, (8, 8), ["device 1 (NVIDIA H100)", "12.8 and 12.9", "R575"]),
            (12040, (8, 5), ["compute capability 9.0", "12.4 and 12.5", "R555"]),
            (12040, (8, 6), ["compute capability 9.0", "12.4 and 12.7", "R565"]),
        ] {
            let error = check(version, ptx).expect_err("too old");
            for part in parts {
                assert!(error.contains(part), "{error:?} lacks {part:?}");
            }
        }
    }

    #[test]
    fn the_kernel_drivers_version_is_found_in_both_of_its_forms() {
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version:";
        assert_eq!(kernel_driver(closed).as_deref(), Some("535.129.03"));
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  590.44.01  Release Build";
        assert_eq!(kernel_driver(open).as_deref(), Some("590.44.01"));
        assert_eq!(kernel_driver(""), None);
    }

    #[test]
    fn a_driver_too_new_for_maxwell_is_told_apart_from_one_that_hides_a_card() {
        let words = host(0x17fd, Some("590.44.01")).unlisted(&[]).expect("not listed");
        assert!(
            words.contains("Tesla M40") && words.contains("590.44.01") && words.contains("R580"),
            "{words}"
        );
        let words = host(0x17fd, Some("580.95.05")).unlisted(&[]).expect("not listed");
        assert!(words.contains("CUDA_VISIBLE_DEVICES"), "{words}");
        let words = host(0x2330, Some("590.44.01")).unlisted(&[]).expect("not listed");
        assert!(words.contains("an NVIDIA card") && !words.contains("Maxwell"), "{words}");
        let words = host(0x17fd, None).unlisted(&[]).expect("not listed");
        assert!(words.contains("no NVIDIA kernel driver"), "{words}");
        assert_eq!(host(0x17fd, Some("580.95.05")).unlisted(&["0000:03:00.0"]), None);
        assert_eq!(Host::default().unlisted(&[]), None);
    }

    #[test]
    fn a_missing_library_is_explained_by_what_else_is_there() {
        assert!(Host::default().no_library().contains("no NVIDIA card"));
        assert!(host(0x17fd, None).no_library().contains("a Tesla M40 is at 0000:03:00.0"));
        assert!(host(0x17fd, Some("580.95.05")).no_library().contains("580.95.05"));
    }

    #[test]
    fn cards_are_told_from_the_bus_by_vendor_and_class() {
        let dir = tempfile::tempdir().expect("a directory");
        for (address, vendor, class, device) in [
            ("0000:03:00.0", "0x10de\n", "0x030200\n", "0x17fd\n"),
            ("0000:03:00.1", "0x10de\n", "0x040300\n", "0x0fba\n"),
            ("0000:01:00.0", "0x102b\n", "0x030000\n", "0x0534\n"),
            ("0000:02:00.0", "0x10de\n", "nonsense", "0x17fd\n"),
        ] {
            let path = dir.path().join(address);
            fs::create_dir(&path).expect("a directory");
            for (name, text) in [("vendor", vendor), ("class", class), ("device", device)] {
                fs::write(path.join(name), text).expect("a file");
            }
        }
        assert_eq!(cards(dir.path()), host(0x17fd, None).cards);
        assert_eq!(cards(Path::new("/nowhere")), vec![]);
    }

    #[test]
    fn the_width_of_a_link_is_read_where_the_system_tells_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let with = |width: &str, most: &str| {
            fs::write(dir.path().join("current_link_width"), width).expect("a file");
            fs::write(dir.path().join("max_link_width"), most).expect("a file");
            link(dir.path())
        };
        assert_eq!(with("4\n", "16\n"), Some(PciLink { width: 4, most: 16 }));
        for unknown in [("255\n", "255\n"), ("0\n", "16\n"), ("16\n", "255\n"), ("x", "16")] {
            assert_eq!(with(unknown.0, unknown.1), None, "{unknown:?}");
        }
        assert_eq!(link(Path::new("/nowhere")), None);
    }
}
