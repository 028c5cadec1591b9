//! The kernels that the build embedded, loaded file by file when first asked for: machine code on the card they are
//! written for; on newer ones intermediate code, which the driver compiles (and keeps in its own cache on disk).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use cudarc::{
    driver::{CudaContext, CudaFunction, CudaModule},
    nvrtc::Ptx,
};

use super::{Device, error::Call as _};
use crate::{device::Code, error::EngineError, handle::lock};

/// A kernel file as built: its name without `.cu`, machine code for `sm_52`, intermediate code for `compute_52`.
struct Image {
    name: &'static str,
    cubin: &'static [u8],
    ptx: &'static str,
}

static IMAGES: &[Image] = &include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

fn image(file: &str) -> Result<&'static Image, EngineError> {
    IMAGES.iter().find(|image| image.name == file).ok_or_else(|| {
        let known: Vec<_> = IMAGES.iter().map(|image| image.name).collect();
        EngineError::Backend(format!(
            "no kernel file {file}.cu in this binary; there are {}",
            known.join(", ")
        ))
    })
}

impl Image {
    /// The names of its kernels.
    fn entries(&self) -> impl Iterator<Item = &'static str> + use<> {
        let after = self.ptx.split(".entry ").skip(1);
        after.filter_map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next())
    }
}

/// The kernels on one device.
pub struct Kernels {
    context: Arc<CudaContext>,
    code: Code,
    loaded: Mutex<Loaded>,
}

#[derive(Default)]
struct Loaded {
    modules: HashMap<&'static str, Arc<CudaModule>>,
    /// Spent in loading, which for intermediate code is compiling.
    time: Duration,
}

impl Kernels {
    /// Nothing is loaded yet.
    pub fn new(device: &Device) -> Self {
        Self { context: Arc::clone(device.context()), code: device.code(), loaded: Mutex::default() }
    }

    /// The kernel `name` of `kernels/FILE.cu`. Loads the file at its first use: ask before the first step, and keep it.
    pub fn function(&self, file: &str, name: &str) -> Result<CudaFunction, EngineError> {
        let image = image(file)?;
        if !image.entries().any(|entry| entry == name) {
            let known: Vec<_> = image.entries().collect();
            return Err(EngineError::Backend(format!(
                "{file}.cu has no kernel {name}; it has {}",
                known.join(", ")
            )));
        }
        let module = self.module(image)?;
        module.load_function(name).call(format_args!("cuModuleGetFunction {name}"))
    }

    /// The kernel `name`, whichever file has it, and its name for as long as the program runs.
    pub fn find(&self, name: &str) -> Result<(&'static str, CudaFunction), EngineError> {
        let found = IMAGES.iter().find_map(|image| Some((image, image.entries().find(|e| *e == name)?)));
        let (image, name) = found.ok_or_else(|| {
            EngineError::Backend(format!("no kernel {name} in this binary: this is a fault of ours"))
        })?;
        Ok((name, self.function(image.name, name)?))
    }

    fn module(&self, image: &'static Image) -> Result<Arc<CudaModule>, EngineError> {
        let mut loaded = lock(&self.loaded);
        if let Some(module) = loaded.modules.get(image.name) {
            return Ok(Arc::clone(module));
        }
        let start = Instant::now();
        let code = match self.code {
            Code::Cubin => Ptx::from_binary(image.cubin.to_vec()),
            Code::Ptx => Ptx::from_src(image.ptx),
        };
        let module = self.context.load_module(code);
        let module = module.call(format_args!("cuModuleLoadData of {}.cu ({:?})", image.name, self.code))?;
        let took = start.elapsed();
        loaded.time += took;
        tracing::debug!(file = image.name, code = ?self.code, ?took, total = ?loaded.time, "kernels loaded");
        loaded.modules.insert(image.name, Arc::clone(&module));
        Ok(module)
    }

    /// Time spent in loading so far, which for [`Code::Ptx`] is the driver's compiling.
    pub fn load_time(&self) -> Duration {
        lock(&self.loaded).time
    }
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernels").field("code", &self.code).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_file_is_embedded_in_both_codes() {
        let sources =
            std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../kernels")).expect("kernels/");
        let mut sources: Vec<_> = sources
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
            .filter_map(|name| name.strip_suffix(".cu").map(str::to_owned))
            .collect();
        sources.sort();
        let names: Vec<_> = IMAGES.iter().map(|image| image.name).collect();
        assert_eq!(names, sources);
        for Image { name, cubin, ptx } in IMAGES {
            assert!(ptx.contains(".target sm_52") && !ptx.contains('\0'), "{name}");
            // ELF, its machine EM_CUDA, and the architecture in the low byte of its flags.
            assert_eq!(&cubin[..4], b"\x7fELF", "{name}");
            assert_eq!((u16::from_le_bytes([cubin[18], cubin[19]]), cubin[48]), (190, 52), "{name}");
        }
    }

    #[test]
    fn kernels_are_known_by_name() {
        let copy = image("copy").expect("copy.cu");
        assert_eq!(copy.entries().collect::<Vec<_>>(), ["copy_quads", "fill_random"]);
        assert!(image("nothing").err().expect("no such file").to_string().contains("copy"));
    }
}
