//! CUDA devices as data: how one is named, described, chosen and judged. Pure functions, in every build; the driver
//! is asked in `backend::cuda`.

mod host;
mod memory;

use std::{fmt, str::FromStr};

pub use host::{Driver, Host, PciCard, PciLink};
pub use memory::{Need, RESERVE_BYTES, room};

/// The compute capability that the kernels are written for.
pub const TARGET: ComputeCapability = ComputeCapability { major: 5, minor: 2 };

/// Major and minor; ordered as the cards are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ComputeCapability {
    /// The architecture: 5 is Maxwell.
    pub major: u32,
    /// Within it.
    pub minor: u32,
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What a user calls a device by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceId {
    /// Its place in the driver's list.
    Index(usize),
    /// The beginning of its UUID, `GPU-` and lower-case digits.
    Uuid(String),
}

/// A driver lists far fewer; a larger number is a slip of the finger.
const MAX_INDEX: usize = 63;

impl FromStr for DeviceId {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "a number from 0 to {MAX_INDEX}, or a UUID such as GPU-5f2c (its beginning is enough), is allowed"
            )
        };
        if let Some(digits) = s.get(..4).filter(|p| p.eq_ignore_ascii_case("gpu-")).map(|p| &s[p.len()..]) {
            let valid = (1..=36).contains(&digits.len())
                && digits.starts_with(|c: char| c.is_ascii_hexdigit())
                && digits.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
            return if valid {
                Ok(Self::Uuid(format!("GPU-{}", digits.to_ascii_lowercase())))
            } else {
                Err(wrong())
            };
        }
        s.parse().ok().filter(|n| *n <= MAX_INDEX).map(Self::Index).ok_or_else(wrong)
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => write!(f, "{index}"),
            Self::Uuid(uuid) => f.write_str(uuid),
        }
    }
}

/// What runs on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The machine code for [`TARGET`] that the binary holds.
    Cubin,
    /// The intermediate code, compiled by the driver when it is loaded.
    Ptx,
}

/// A device as the driver describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceInfo {
    /// Its place in the driver's list.
    pub index: usize,
    /// `GPU-` and 32 digits in five groups, as nvidia-smi prints it.
    pub uuid: String,
    /// The product's name.
    pub name: String,
    /// Where it sits: `0000:03:00.0`.
    pub pci_address: String,
    /// How it is connected, where the system tells.
    pub link: Option<PciLink>,
    /// What code it understands.
    pub compute_capability: ComputeCapability,
    /// Memory in bytes, without what ECC takes.
    pub total_memory: u64,
    /// What of it nobody uses, when that was asked: it takes a context on the device.
    pub free_memory: Option<u64>,
    /// Whether memory is protected by ECC.
    pub ecc: bool,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Highest clock of the multiprocessors, in kHz.
    pub clock_khz: u32,
    /// Highest clock of the memory, in kHz.
    pub memory_clock_khz: u32,
    /// Width of the memory bus, in bits.
    pub bus_bits: u32,
}

impl DeviceInfo {
    /// What would run there, or why nothing can.
    pub fn code(&self) -> Result<Code, String> {
        match self.compute_capability {
            cc if cc < TARGET => {
                Err(format!("{self} has compute capability {cc}; the kernels need {TARGET} or newer"))
            }
            TARGET => Ok(Code::Cubin),
            _ => Ok(Code::Ptx),
        }
    }

    /// Bytes a second that the memory moves at most: GDDR and HBM transfer twice a clock.
    pub fn peak_bandwidth(&self) -> f64 {
        2.0 * f64::from(self.memory_clock_khz) * 1e3 * f64::from(self.bus_bits) / 8.0
    }

    /// GDDR has no bits of its own for ECC, which takes them from the data's room. HBM, with its wider bus, has.
    fn ecc_costs(&self) -> bool {
        self.ecc && self.bus_bits <= 512
    }

    /// What a user should know who runs on this device, one line each.
    pub fn notices(&self) -> Vec<String> {
        let mut notices = Vec::new();
        if self.compute_capability > TARGET {
            notices.push(format!(
                "{self} has compute capability {}: the kernels are written for {TARGET} (Tesla M40), and the driver \
                 translates them; right, but not the fastest for this card",
                self.compute_capability
            ));
        }
        if self.ecc_costs() {
            notices.push(format!(
                "{self} has ECC on, which takes a sixteenth of its memory and some of its bandwidth; `nvidia-smi -i {} -e 0` \
                 and a restart turn it off",
                self.index
            ));
        }
        if let Some(free) = self.free_memory {
            let taken = self.total_memory.saturating_sub(free);
            if taken > BUSY_BYTES.max(self.total_memory / 8) {
                notices.push(format!(
                    "{self} is in use by others: {} of its {} are taken; see nvidia-smi",
                    gigabytes(taken),
                    gigabytes(self.total_memory)
                ));
            }
        }
        if let Some(link) = self.link.filter(|link| link.width < link.most) {
            notices.push(format!(
                "{self} has {} of its {} PCIe lanes: models load more slowly, answers do not; another slot, or the riser, may \
                 give it more",
                link.width, link.most
            ));
        }
        notices
    }
}

/// More than our own context and a desktop take.
const BUSY_BYTES: u64 = 1 << 30;

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "device {} ({})", self.index, self.name)
    }
}

/// `11.2 GB`, in the decimal units that cards are sold in.
fn gigabytes(bytes: u64) -> String {
    format!("{:.1} GB", bytes as f64 / 1e9)
}

/// What is there.
#[derive(Debug, Clone, Default)]
pub struct Devices {
    /// The driver's library, when there is one that serves.
    pub driver: Option<Driver>,
    /// In the driver's order, with their free memory.
    pub devices: Vec<DeviceInfo>,
    /// What keeps a device from being used, when something does: one line.
    pub note: Option<String>,
}

/// The device that was asked for; without a wish the first one of [`TARGET`], else the first newer one.
pub fn choose<'a>(
    devices: &'a [DeviceInfo],
    wanted: Option<&DeviceId>,
    require_sm52: bool,
) -> Result<&'a DeviceInfo, String> {
    let listed = || {
        let names = devices.iter().map(|d| format!("{} {} ({})", d.index, d.name, d.compute_capability));
        format!("the driver lists {}", names.collect::<Vec<_>>().join(", "))
    };
    if devices.is_empty() {
        return Err("the driver lists no CUDA device".into());
    }
    let is_target = |d: &&DeviceInfo| d.compute_capability == TARGET;
    let device = match wanted {
        Some(id) => named(devices, id)?.ok_or_else(|| format!("no such CUDA device; {}", listed()))?,
        None if require_sm52 => devices
            .iter()
            .find(is_target)
            .ok_or_else(|| format!("no device has compute capability {TARGET}; {}", listed()))?,
        None => {
            let usable = devices.iter().find(is_target).or_else(|| devices.iter().find(|d| d.code().is_ok()));
            usable.unwrap_or(&devices[0])
        }
    };
    if require_sm52 && !is_target(&device) {
        return Err(format!("{device} has compute capability {}, not {TARGET}", device.compute_capability));
    }
    device.code().map(|_| device)
}

fn named<'a>(devices: &'a [DeviceInfo], id: &DeviceId) -> Result<Option<&'a DeviceInfo>, String> {
    let is_meant = |d: &&DeviceInfo| match id {
        DeviceId::Index(index) => d.index == *index,
        DeviceId::Uuid(prefix) => d.uuid.starts_with(prefix.as_str()),
    };
    let mut found = devices.iter().filter(is_meant);
    match (found.next(), found.next()) {
        (Some(a), Some(b)) => Err(format!("{} and {} both begin so: write more of it", a.uuid, b.uuid)),
        (one, _) => Ok(one),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn card(index: usize, name: &str, (major, minor): (u32, u32)) -> DeviceInfo {
        DeviceInfo {
            index,
            uuid: format!("GPU-{index}f2c4a1e-0000-1111-2222-333344445555"),
            name: name.into(),
            pci_address: format!("0000:0{index}:00.0"),
            link: Some(PciLink { width: 16, most: 16 }),
            compute_capability: ComputeCapability { major, minor },
            total_memory: 12_079_136_768,
            free_memory: None,
            ecc: false,
            multiprocessors: 24,
            clock_khz: 1_112_000,
            memory_clock_khz: 3_004_000,
            bus_bits: 384,
        }
    }

    fn host() -> Vec<DeviceInfo> {
        vec![card(0, "Tesla K80", (3, 7)), card(1, "NVIDIA H100", (9, 0)), card(2, "Tesla M40", (5, 2))]
    }

    fn id(s: &str) -> DeviceId {
        s.parse().expect(s)
    }

    #[test]
    fn a_device_is_named_by_its_number_or_the_beginning_of_its_uuid() {
        assert_eq!(id("0"), DeviceId::Index(0));
        assert_eq!(id("gpu-5F2C"), DeviceId::Uuid("GPU-5f2c".into()));
        assert_eq!(id("GPU-5f2c4a1e-0000-1111-2222-333344445555").to_string().len(), 40);
        for wrong in [
            "",
            "-1",
            "64",
            "1.5",
            "GPU-",
            "GPU--1",
            "GPU-xyz",
            "M40",
            "GPU-5f2c4a1e-0000-1111-2222-3333444455556",
        ] {
            let error = wrong.parse::<DeviceId>().expect_err(wrong);
            assert!(error.contains("0 to 63") && error.contains("GPU-"), "{error}");
        }
    }

    #[test]
    fn without_a_wish_the_target_comes_first_and_then_what_is_newer() {
        let devices = host();
        assert_eq!(choose(&devices, None, false).expect("the M40").index, 2);
        assert_eq!(choose(&devices, None, true).expect("the M40").index, 2);
        assert_eq!(choose(&devices[..2], None, false).expect("the H100").index, 1);
        let error = choose(&devices[..2], None, true).expect_err("no M40");
        assert!(error.contains("5.2") && error.contains("1 NVIDIA H100 (9.0)"), "{error}");
        let error = choose(&devices[..1], None, false).expect_err("too old");
        assert!(error.contains("Tesla K80") && error.contains("3.7"), "{error}");
        assert!(choose(&[], None, false).expect_err("none").contains("no CUDA device"));
    }

    #[test]
    fn a_named_device_is_taken_or_refused_never_another() {
        let devices = host();
        assert_eq!(choose(&devices, Some(&id("1")), false).expect("the H100").index, 1);
        assert_eq!(choose(&devices, Some(&id("GPU-2f2c")), false).expect("the M40").index, 2);
        for (wanted, require, parts) in [
            ("3", false, &["no such", "2 Tesla M40 (5.2)"] as &[&str]),
            ("GPU-9", false, &["no such"]),
            ("0", false, &["Tesla K80", "3.7", "5.2"]),
            ("1", true, &["NVIDIA H100", "9.0, not 5.2"]),
        ] {
            let error = choose(&devices, Some(&id(wanted)), require).expect_err(wanted);
            for part in parts {
                assert!(error.contains(part), "{error:?} lacks {part:?}");
            }
        }
        let mut twins = host();
        twins[1].uuid = "GPU-2f2c9999".into();
        let error = choose(&twins, Some(&id("GPU-2f2c")), false).expect_err("two");
        assert!(error.contains("write more"), "{error}");
    }

    #[test]
    fn the_target_runs_machine_code_and_newer_cards_the_drivers_translation() {
        assert_eq!(card(0, "Tesla M40", (5, 2)).code(), Ok(Code::Cubin));
        assert_eq!(card(0, "Tegra X1", (5, 3)).code(), Ok(Code::Ptx));
        assert_eq!(card(0, "NVIDIA H100", (9, 0)).code(), Ok(Code::Ptx));
        assert!(card(0, "GTX 750 Ti", (5, 0)).code().is_err());
        assert!((card(0, "Tesla M40", (5, 2)).peak_bandwidth() - 288.4e9).abs() < 1e8);
    }

    #[test]
    fn notices_say_what_costs_speed_or_memory_and_nothing_else() {
        let mut m40 = card(0, "Tesla M40", (5, 2));
        m40.free_memory = Some(m40.total_memory - (200 << 20));
        assert_eq!(m40.notices(), Vec::<String>::new());
        m40.ecc = true;
        m40.free_memory = Some(m40.total_memory / 2);
        let notices = m40.notices().join("\n");
        assert!(notices.contains("ECC") && notices.contains("in use by others: 6.0 GB"), "{notices}");
        m40.link = Some(PciLink { width: 4, most: 16 });
        assert!(m40.notices().join("\n").contains("4 of its 16 PCIe lanes"), "{:?}", m40.notices());
        // HBM keeps its check bits beside the data: ECC costs nothing there.
        let mut h100 = card(1, "NVIDIA H100", (9, 0));
        (h100.ecc, h100.bus_bits) = (true, 5120);
        let notices = h100.notices();
        assert!(notices.len() == 1 && notices[0].contains("Tesla M40"), "{notices:?}");
    }
}
