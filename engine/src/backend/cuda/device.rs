//! Asks the driver what is there, and opens the device that was chosen.

use std::{fmt::Write as _, sync::Arc};

use cudarc::driver::{
    CudaContext, DriverError,
    result::{self, device as raw},
    sys::{self, CUdevice_attribute as Attribute},
};

use super::{error::Call as _, module::ptx_version};
use crate::{
    config::BackendChoice,
    device::{Code, ComputeCapability, DeviceId, DeviceInfo, Devices, Driver, Host, PciLink, choose},
    error::EngineError,
};

/// An open device: its primary context, held until this and all that was made in it is dropped.
#[derive(Debug, Clone)]
pub struct Device {
    info: DeviceInfo,
    code: Code,
    context: Arc<CudaContext>,
}

impl Device {
    /// Opens the device that was asked for, or the best one.
    pub fn open(wanted: Option<&DeviceId>, require_sm52: bool) -> Result<Self, EngineError> {
        let driver = start()?;
        let devices = (0..count()?).map(describe).collect::<Result<Vec<_>, _>>()?;
        let info = choose(&devices, wanted, require_sm52).map_err(|words| {
            let unlisted = Host::read().unlisted(&addresses(&devices));
            EngineError::Device(unlisted.map_or(words.clone(), |reason| format!("{words}; {reason}")))
        })?;
        let mut info = info.clone();
        let code = info.code().map_err(EngineError::Device)?;
        check_compiler(driver, &info, code).map_err(EngineError::Device)?;
        let context =
            CudaContext::new(info.index).call(format_args!("cuDevicePrimaryCtxRetain of {info}"))?;
        let (free, _) = context.mem_get_info().call("cuMemGetInfo")?;
        info.free_memory = Some(free as u64);
        tracing::debug!(device = %info, uuid = info.uuid, ?code, free, "device opened");
        Ok(Self { info, code, context })
    }

    /// What it is; its free memory is that of the moment of opening.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// What code it takes.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The context that all allocations, streams and modules belong to.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Bytes that nobody uses now.
    pub fn free_memory(&self) -> Result<u64, EngineError> {
        Ok(self.context.mem_get_info().call("cuMemGetInfo")?.0 as u64)
    }
}

/// Where a model is to run.
#[derive(Debug)]
pub enum Chosen {
    /// On this device.
    Device(Device),
    /// On the CPU; with the reason where a device would have been taken.
    Cpu(Option<String>),
}

/// The device that was asked for, or that there is, else the CPU.
pub fn chosen(choice: &BackendChoice) -> Result<Chosen, EngineError> {
    match choice {
        BackendChoice::Cuda { device, require_sm52 } => {
            Device::open(device.as_ref(), *require_sm52).map(Chosen::Device)
        }
        BackendChoice::Auto => Ok(match Device::open(None, false) {
            Ok(device) => Chosen::Device(device),
            Err(reason) => Chosen::Cpu(Some(reason.to_string())),
        }),
        BackendChoice::Cpu | BackendChoice::Reference => Ok(Chosen::Cpu(None)),
    }
}

/// Whether the driver can compile this binary's kernels, where that is what runs on the device.
fn check_compiler(driver: Driver, info: &DeviceInfo, code: Code) -> Result<(), String> {
    match (code, ptx_version()) {
        (Code::Ptx, Some(ptx)) => driver.check_compiler(ptx, info),
        _ => Ok(()),
    }
}

/// What `m40llm devices` shows. What the driver refuses to tell becomes the note.
pub fn list() -> Devices {
    let mut found = Devices::default();
    let driver = match start() {
        Ok(driver) => driver,
        Err(e) => {
            found.note = Some(e.to_string());
            return found;
        }
    };
    found.driver = Some(driver);
    let described = count().and_then(|n| (0..n).map(describe).collect::<Result<Vec<_>, _>>());
    match described {
        Ok(devices) => found.devices = devices,
        Err(e) => found.note = Some(e.to_string()),
    }
    for device in &mut found.devices {
        // Only a context can tell; where none can be made (exclusive mode), the amount stays unknown.
        let memory = CudaContext::new(device.index).and_then(|context| context.mem_get_info());
        device.free_memory = memory.ok().map(|(free, _)| free as u64);
    }
    let refused =
        found.devices.iter().find_map(|device| check_compiler(driver, device, device.code().ok()?).err());
    let unlisted = Host::read().unlisted(&addresses(&found.devices));
    found.note = found.note.or(refused).or(unlisted);
    found
}

fn addresses(devices: &[DeviceInfo]) -> Vec<&str> {
    devices.iter().map(|d| d.pci_address.as_str()).collect()
}

/// Loads the driver's library and initialises it.
fn start() -> Result<Driver, EngineError> {
    // cudarc panics at the first call when there is no library, so this comes first.
    // SAFETY: loading the driver's library runs its initialisers, which have no preconditions.
    if !unsafe { sys::is_culib_present() } {
        return Err(EngineError::Device(Host::read().no_library()));
    }
    let mut version = 0;
    // SAFETY: the function writes one int, and may be called before cuInit.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().call("cuDriverGetVersion")?;
    let driver = Driver::from_version(version);
    driver.check().map_err(EngineError::Device)?;
    match result::init() {
        Err(DriverError(code @ sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
            let reason = Host::read().unlisted(&[]);
            let reason = reason.unwrap_or_else(|| "the driver finds no CUDA device: see nvidia-smi".into());
            Err(EngineError::Device(format!("cuInit: {code:?}: {reason}")))
        }
        done => done.call("cuInit").map(|()| driver),
    }
}

fn count() -> Result<usize, EngineError> {
    Ok(raw::get_count().call("cuDeviceGetCount")?.max(0).cast_unsigned() as usize)
}

fn describe(index: usize) -> Result<DeviceInfo, EngineError> {
    let device = raw::get(index as i32).call(format_args!("cuDeviceGet {index}"))?;
    let attribute = |which: Attribute| -> Result<u32, EngineError> {
        // SAFETY: the device comes from cuDeviceGet.
        let value = unsafe { raw::get_attribute(device, which) };
        Ok(value.call(format_args!("cuDeviceGetAttribute {which:?}"))?.max(0).cast_unsigned())
    };
    let place = [
        Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID,
        Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID,
        Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID,
    ];
    let [domain, bus, slot] = [attribute(place[0])?, attribute(place[1])?, attribute(place[2])?];
    let pci_address = format!("{domain:04x}:{bus:02x}:{slot:02x}.0");
    Ok(DeviceInfo {
        index,
        uuid: uuid(raw::get_uuid(device).call("cuDeviceGetUuid")?.bytes.map(i8::cast_unsigned)),
        name: raw::get_name(device).call("cuDeviceGetName")?,
        link: PciLink::read(&pci_address),
        pci_address,
        compute_capability: ComputeCapability {
            major: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            minor: attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        },
        // SAFETY: the device comes from cuDeviceGet.
        total_memory: unsafe { raw::total_mem(device) }.call("cuDeviceTotalMem")? as u64,
        free_memory: None,
        ecc: attribute(Attribute::CU_DEVICE_ATTRIBUTE_ECC_ENABLED)? != 0,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        clock_khz: attribute(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?,
        memory_clock_khz: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?,
        bus_bits: attribute(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)?,
    })
}

/// As nvidia-smi prints it.
fn uuid(bytes: [u8; 16]) -> String {
    let mut text = String::from("GPU-");
    for (i, byte) in bytes.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_as_nvidia_smi_does() {
        let bytes = std::array::from_fn(|i| i as u8 * 17);
        assert_eq!(uuid(bytes), "GPU-00112233-4455-6677-8899-aabbccddeeff");
    }
}
