//! The kernels that the build embedded, loaded when first asked for: on the card they are written for, machine code by the
//! file; on newer ones intermediate code by the kernel, since the driver compiles it (and keeps the result in its own
//! cache on disk), which takes a third of a second each.

use std::{
    collections::HashMap,
    io::Read as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use cudarc::{
    driver::{CudaContext, CudaFunction, CudaModule},
    nvrtc::Ptx,
};
use flate2::read::DeflateDecoder;

use super::{Device, error::Call as _};
use crate::{device::Code, error::EngineError, handle::lock};

/// A kernel file as built: its name without `.cu`, machine code for `sm_52`, and by kernel intermediate code for
/// `compute_52`, of a version; the codes are deflated.
struct Image {
    name: &'static str,
    version: (u32, u32),
    cubin: &'static [u8],
    kernels: &'static [(&'static str, &'static [u8])],
}

/// The version of the intermediate code, of which a driver must be as new: 8.8 is the compiler's of CUDA 12.9.
pub fn ptx_version() -> Option<(u32, u32)> {
    IMAGES.iter().map(|image| image.version).max()
}

/// Threads that load kernels at the same time, at most.
const LOADERS: usize = 8;

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
    /// Machine code of all its kernels.
    fn cubin(&self) -> Result<Vec<u8>, EngineError> {
        self.inflated(self.cubin)
    }

    /// The intermediate code of one of its kernels, deflated; an error names those that there are.
    fn code_of(&self, kernel: &str) -> Result<&'static [u8], EngineError> {
        let found = self.kernels.iter().find(|(name, _)| *name == kernel);
        found.map(|(_, code)| *code).ok_or_else(|| {
            let known: Vec<_> = self.entries().collect();
            let (file, known) = (self.name, known.join(", "));
            EngineError::Backend(format!("{file}.cu has no kernel {kernel}; it has {known}"))
        })
    }

    /// The same as it was.
    fn ptx_of(&self, kernel: &str) -> Result<String, EngineError> {
        let broken = |_| EngineError::Backend(format!("the embedded code of {kernel} is no text"));
        String::from_utf8(self.inflated(self.code_of(kernel)?)?).map_err(broken)
    }

    /// The names of its kernels.
    fn entries(&self) -> impl Iterator<Item = &'static str> + use<> {
        self.kernels.iter().map(|(name, _)| *name)
    }

    fn inflated(&self, code: &[u8]) -> Result<Vec<u8>, EngineError> {
        let mut bytes = Vec::new();
        let read = DeflateDecoder::new(code).read_to_end(&mut bytes);
        let broken =
            |e| EngineError::Backend(format!("the embedded code of {}.cu is broken: {e}", self.name));
        read.map(|_| bytes).map_err(broken)
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
    /// By file or by kernel.
    modules: HashMap<String, Arc<CudaModule>>,
    /// Spent in loading by all threads, which for intermediate code is compiling.
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
        image.code_of(name)?;
        let module = self.module(image, name)?;
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

    /// Loads kernels before they are asked for, several at a time.
    pub fn load(&self, names: &[String]) -> Result<(), EngineError> {
        let start = Instant::now();
        let next = AtomicUsize::new(0);
        let threads = thread::available_parallelism().map_or(1, usize::from).min(LOADERS).min(names.len());
        let results: Vec<Result<(), EngineError>> = thread::scope(|scope| {
            let load = || {
                while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                    self.find(name)?;
                }
                Ok(())
            };
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(load)).collect();
            let died = |_| Err(EngineError::Backend("a thread that loaded kernels died".into()));
            running.into_iter().map(|thread| thread.join().unwrap_or_else(died)).collect()
        });
        tracing::debug!(kernels = names.len(), took = ?start.elapsed(), "kernels loaded");
        results.into_iter().collect()
    }

    fn module(&self, image: &'static Image, name: &str) -> Result<Arc<CudaModule>, EngineError> {
        let key = match self.code {
            Code::Cubin => image.name.to_owned(),
            Code::Ptx => name.to_owned(),
        };
        if let Some(module) = lock(&self.loaded).modules.get(&key) {
            return Ok(Arc::clone(module));
        }
        let start = Instant::now();
        let code = match self.code {
            Code::Cubin => Ptx::from_binary(image.cubin()?),
            Code::Ptx => Ptx::from_src(image.ptx_of(name)?),
        };
        // Not under the lock: others load meanwhile. Two that load the same do it twice, and one result is kept.
        let module = self.context.load_module(code);
        let module = module.call(format_args!("cuModuleLoadData of {}.cu ({:?})", image.name, self.code))?;
        let mut loaded = lock(&self.loaded);
        loaded.time += start.elapsed();
        Ok(Arc::clone(loaded.modules.entry(key).or_insert(module)))
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
        for image in IMAGES {
            let (name, cubin) = (image.name, image.cubin().expect("machine code"));
            // ELF, its machine EM_CUDA, and the architecture in the low byte of its flags.
            assert_eq!(&cubin[..4], b"\x7fELF", "{name}");
            assert_eq!((u16::from_le_bytes([cubin[18], cubin[19]]), cubin[48]), (190, 52), "{name}");
        }
    }

    #[test]
    fn a_kernels_code_is_whole_and_has_no_other_kernel() {
        for image in IMAGES {
            for name in image.entries() {
                let cut = image.ptx_of(name).expect("intermediate code");
                let entries: Vec<_> = cut.lines().filter(|line| line.contains(".entry ")).collect();
                assert!(
                    matches!(entries[..], [line] if line.contains(&format!(".entry {name}("))),
                    "{entries:?}"
                );
                assert_eq!(cut.matches('{').count(), cut.matches('}').count(), "{name}");
                assert!(cut.contains(".target sm_52") && !cut.contains('\0'), "{name}");
            }
        }
    }

    #[test]
    fn kernels_are_known_by_name() {
        let copy = image("copy").expect("copy.cu");
        assert_eq!(copy.entries().collect::<Vec<_>>(), ["copy_quads", "fill_random"]);
        assert!(image("nothing").err().expect("no such file").to_string().contains("copy"));
    }
}
