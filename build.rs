//! The engine's build script. Without feature `cuda` it does nothing. With it, every `kernels/NAME.cu` becomes
//! `NAME.ptx` (`compute_52`, for the driver's own compiler on newer cards) and `NAME.cubin` (`sm_52`) in `OUT_DIR`,
//! and `kernels.rs` there lists them for `include!`: the cubins whole, the PTX by the kernel, all deflated (`.z`), since
//! a program has no use for most of it.
//!
//! The compiler is CUDA 12, the last series that knows `sm_52`: NVRTC or nvcc for the PTX, ptxas for the cubin.
//! Compiling takes seconds a file, so results are kept in `target/kernel-cache` under a hash of all that went in.

fn main() {
    println!("cargo::rerun-if-changed=../build.rs");
    #[cfg(feature = "cuda")]
    if let Err(message) = cuda::build() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

#[cfg(feature = "cuda")]
#[path = "kernels/embed.rs"]
mod embed;

#[cfg(feature = "cuda")]
#[expect(clippy::disallowed_methods, reason = "a build script is told everything by its environment")]
mod cuda {
    use std::{
        collections::BTreeSet,
        env,
        ffi::{CString, OsString, c_char, c_int, c_void},
        fs,
        hash::{DefaultHasher, Hash as _, Hasher as _},
        path::{Path, PathBuf},
        process::Command,
        ptr,
        sync::Mutex,
        thread,
    };

    use libloading::Library;

    const FLAGS: [&str; 2] = ["--gpu-architecture=compute_52", "--std=c++17"];
    const PTXAS_FLAGS: [&str; 1] = ["-arch=sm_52"];
    const REMEDY: &str =
        "run `make cuda-toolchain`, which installs one into .cuda/, or build without feature cuda";

    type Result<T> = std::result::Result<T, String>;

    pub(super) fn build() -> Result<()> {
        let root = manifest_parent()?;
        let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: build with cargo")?);
        let kernels = root.join("kernels");
        println!("cargo::rerun-if-changed={}", kernels.display());
        for name in ["M40LLM_CUDA_HOME", "CUDA_HOME"] {
            println!("cargo::rerun-if-env-changed={name}");
        }
        let toolchain = Toolchain::find(&root, &|name| env::var_os(name))?;
        println!("cargo::rerun-if-changed={}", toolchain.ptxas.display());

        let sources = files(&kernels, "cu")?;
        let cache = out.ancestors().nth(4).unwrap_or(&out).join("kernel-cache");
        fs::create_dir_all(&cache).map_err(|e| format!("cannot make {}: {e}", cache.display()))?;
        // What a kernel file that is gone has left behind would be taken for one that is there.
        for kind in ["cubin", "ptx", "z"] {
            for old in files(&out, kind)? {
                fs::remove_file(&old).map_err(|e| format!("cannot remove {}: {e}", old.display()))?;
            }
        }
        compile_all(&sources, &toolchain, &cache, &out)?;

        let images: Result<String> = sources.iter().map(|s| super::embed::image(&stem(s), &out)).collect();
        write(&out.join("kernels.rs"), format!("[\n{}]", images?).as_bytes())
    }

    fn manifest_parent() -> Result<PathBuf> {
        let manifest =
            env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set: build with cargo")?;
        let parent = Path::new(&manifest).parent().ok_or("the engine has no parent directory")?;
        Ok(parent.to_owned())
    }

    /// Compiles on all cores, from the end: `small` and `skinny` take as long as all others, and one of them begun last
    /// would leave the other cores idle. The first error in the order of the files is the one told.
    fn compile_all(sources: &[PathBuf], toolchain: &Toolchain, cache: &Path, out: &Path) -> Result<()> {
        let open = Mutex::new(sources.iter().enumerate().rev());
        let results = Mutex::new(vec![Ok(()); sources.len()]);
        let worker = || loop {
            let Some((i, source)) = open.lock().ok().and_then(|mut open| open.next()) else { return };
            let result = compile(source, toolchain, cache, out);
            if let Ok(mut results) = results.lock() {
                results[i] = result;
            }
        };
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, usize::from).min(sources.len()) {
                scope.spawn(worker);
            }
        });
        results.into_inner().map_err(|_| "a compiling thread panicked")?.into_iter().collect()
    }

    fn compile(source: &Path, toolchain: &Toolchain, cache: &Path, out: &Path) -> Result<()> {
        let name = stem(source);
        let kept = cache.join(format!("{name}-{:016x}", key(source, toolchain)?));
        let [ptx, cubin] = ["ptx", "cubin"].map(|kind| kept.with_extension(kind));
        // The cubin comes last, so that its presence stands for both.
        if !cubin.is_file() {
            // Beside the target and with a name of this process: another build may be at the same file.
            let scratch = |kind: &str| cache.join(format!("{name}-{}.{kind}", std::process::id()));
            toolchain.to_ptx(source, &scratch("ptx"))?;
            toolchain.to_cubin(&scratch("ptx"), &scratch("cubin"))?;
            drop_older(cache, &name);
            rename(&scratch("ptx"), &ptx)?;
            rename(&scratch("cubin"), &cubin)?;
        }
        copy(&ptx, &out.join(format!("{name}.ptx")))?;
        copy(&cubin, &out.join(format!("{name}.cubin")))
    }

    /// Removes what the cache holds of a kernel file's earlier versions, once they are a day old: another build may be
    /// reading them. Only for tidiness, so a failure changes nothing.
    fn drop_older(cache: &Path, name: &str) {
        for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
            let path = entry.path();
            let hash = stem(&path).strip_prefix(name).and_then(|rest| rest.strip_prefix('-')).map(str::len);
            let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|time| time.elapsed().ok());
            if hash == Some(16) && age.is_some_and(|age| age.as_secs() > 24 * 3600) {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// A hash of the source, the headers it includes, the flags and the compiler.
    fn key(source: &Path, toolchain: &Toolchain) -> Result<u64> {
        let mut hasher = DefaultHasher::new();
        (FLAGS, PTXAS_FLAGS, &toolchain.version, matches!(toolchain.front, Front::Nvcc(_))).hash(&mut hasher);
        let mut open = vec![source.to_owned()];
        let mut seen = BTreeSet::new();
        while let Some(path) = open.pop() {
            if !seen.insert(path.clone()) {
                continue;
            }
            let text =
                fs::read_to_string(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
            text.hash(&mut hasher);
            for line in text.lines() {
                let line = line.trim_start().strip_prefix('#').map(str::trim_start);
                let name =
                    line.and_then(|l| l.strip_prefix("include")?.trim().strip_prefix('"')?.split('"').next());
                open.extend(name.map(|name| path.with_file_name(name)));
            }
        }
        Ok(hasher.finish())
    }

    /// What makes PTX out of CUDA C++.
    #[derive(Debug)]
    enum Front {
        Nvrtc(PathBuf),
        Nvcc(PathBuf),
    }

    #[derive(Debug)]
    struct Toolchain {
        front: Front,
        ptxas: PathBuf,
        include: PathBuf,
        /// As ptxas prints it.
        version: String,
    }

    impl Toolchain {
        /// `M40LLM_CUDA_HOME` if set, else the first that will do of `.cuda`, `CUDA_HOME` and `/usr/local/cuda`.
        fn find(root: &Path, env: &dyn Fn(&str) -> Option<OsString>) -> Result<Self> {
            let set = |name: &str| env(name).filter(|v| !v.is_empty()).map(PathBuf::from);
            if let Some(home) = set("M40LLM_CUDA_HOME") {
                return Self::at(&home).map_err(|e| {
                    format!("M40LLM_CUDA_HOME has no usable CUDA compiler: {e}; unset it, then {REMEDY}")
                });
            }
            let places = [Some(root.join(".cuda")), set("CUDA_HOME"), Some("/usr/local/cuda".into())];
            let mut reasons = Vec::new();
            for place in places.into_iter().flatten() {
                match Self::at(&place) {
                    Ok(found) => return Ok(found),
                    Err(reason) => reasons.push(reason),
                }
            }
            Err(format!(
                "feature cuda needs a CUDA 12 compiler: {REMEDY} (looked at: {})",
                reasons.join("; ")
            ))
        }

        /// In the wheels' layout or a toolkit's.
        fn at(home: &Path) -> Result<Self> {
            let wheels = home.join("nvidia");
            // conda and distributions keep libraries and headers under targets/x86_64-linux.
            let targets: Vec<_> =
                fs::read_dir(home.join("targets")).into_iter().flatten().flatten().collect();
            let targets: Vec<_> = targets.into_iter().map(|entry| entry.path()).collect();
            let first = |paths: &[PathBuf]| paths.iter().find(|p| p.exists()).cloned();
            let with_targets = |fixed: Vec<PathBuf>, tail: &str| -> Vec<PathBuf> {
                fixed.into_iter().chain(targets.iter().map(|t| t.join(tail))).collect()
            };

            let ptxas = first(&[wheels.join("cuda_nvcc/bin/ptxas"), home.join("bin/ptxas")]);
            let ptxas = ptxas.ok_or_else(|| format!("{} has no ptxas", home.display()))?;
            let version = version(&ptxas)?;
            let header = with_targets(
                vec![wheels.join("cuda_runtime/include/cuda_fp16.h"), home.join("include/cuda_fp16.h")],
                "include/cuda_fp16.h",
            );
            let header = first(&header).ok_or_else(|| format!("{} has no cuda_fp16.h", home.display()))?;
            let nvrtc = with_targets(
                vec![
                    wheels.join("cuda_nvrtc/lib/libnvrtc.so.12"),
                    home.join("lib64/libnvrtc.so.12"),
                    home.join("lib/libnvrtc.so.12"),
                ],
                "lib/libnvrtc.so.12",
            );
            let front = match (first(&nvrtc), first(&[home.join("bin/nvcc")])) {
                (Some(nvrtc), _) => Front::Nvrtc(nvrtc),
                (None, Some(nvcc)) => Front::Nvcc(nvcc),
                (None, None) => {
                    return Err(format!("{} has neither libnvrtc.so.12 nor nvcc", home.display()));
                }
            };
            Ok(Self { front, ptxas, include: header.with_file_name(""), version })
        }

        fn to_ptx(&self, source: &Path, ptx: &Path) -> Result<()> {
            let kernels = source.parent().unwrap_or(Path::new("."));
            let includes = [kernels, &self.include].map(|dir| format!("-I{}", dir.display()));
            match &self.front {
                Front::Nvrtc(library) => {
                    let options: Vec<_> = FLAGS.iter().map(|f| (*f).to_owned()).chain(includes).collect();
                    write(ptx, &nvrtc(library, source, &options)?)
                }
                Front::Nvcc(nvcc) => {
                    let mut command = Command::new(nvcc);
                    command.args(["-ptx", "-Wno-deprecated-gpu-targets"]).args(FLAGS).args(includes);
                    run(command.arg("-o").arg(ptx).arg(source), source)
                }
            }
        }

        fn to_cubin(&self, ptx: &Path, cubin: &Path) -> Result<()> {
            run(Command::new(&self.ptxas).args(PTXAS_FLAGS).arg(ptx).arg("-o").arg(cubin), ptx)
        }
    }

    /// What ptxas says of itself, if it is of a series that compiles for `sm_52`.
    fn version(ptxas: &Path) -> Result<String> {
        let output = Command::new(ptxas).arg("--version").output();
        let output = output.map_err(|e| format!("{} does not run: {e}", ptxas.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let release = text.split_once("release ").and_then(|(_, rest)| rest.split([',', ' ', '\n']).next());
        let major = release.and_then(|r| r.split('.').next()?.parse::<u32>().ok());
        match (major, release) {
            (Some(12), _) => Ok(text),
            (Some(13..), Some(release)) => Err(format!(
                "{} is of CUDA {release}, which cannot compile for sm_52 (CUDA 12 is the last that can)",
                ptxas.display()
            )),
            (_, Some(release)) => Err(format!("{} is of CUDA {release}; CUDA 12 is wanted", ptxas.display())),
            _ => Err(format!("{} does not tell its version", ptxas.display())),
        }
    }

    /// Runs a compiler; its messages become the error's, or warnings.
    fn run(command: &mut Command, source: &Path) -> Result<()> {
        let program = command.get_program().to_string_lossy().into_owned();
        let output = command.output().map_err(|e| format!("{program} does not run: {e}"))?;
        let said =
            [output.stdout, output.stderr].map(|s| String::from_utf8_lossy(&s).trim().to_owned()).join("\n");
        if !output.status.success() {
            return Err(format!(
                "{program} cannot compile {}: {}\n{}",
                source.display(),
                output.status,
                said.trim()
            ));
        }
        warn(&said);
        Ok(())
    }

    fn warn(said: &str) {
        // That old architectures will go is why the version is checked; no need to say it for every file.
        let known = |line: &&str| line.trim().is_empty() || line.contains("Architectures prior to");
        for line in said.lines().filter(|line| !known(line)) {
            println!("cargo::warning={line}");
        }
    }

    type Program = *mut c_void;

    /// CUDA C++ to PTX by the library: it needs no host compiler.
    fn nvrtc(library: &Path, source: &Path, options: &[String]) -> Result<Vec<u8>> {
        let text = fs::read(source).map_err(|e| format!("cannot read {}: {e}", source.display()))?;
        let c_string = |bytes: Vec<u8>| CString::new(bytes).map_err(|e| format!("{}: {e}", source.display()));
        let text = c_string(text)?;
        let name = c_string(source.as_os_str().as_encoded_bytes().to_vec())?;
        let options: Vec<_> =
            options.iter().map(|o| c_string(o.clone().into_bytes())).collect::<Result<_>>()?;
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let failed = |call: &str, code: c_int| format!("{call} of {}: error {code}", library.display());
        // SAFETY: NVRTC's initialisers have no preconditions.
        let lib = unsafe { Library::new(library) }
            .map_err(|e| format!("cannot load {}: {e}", library.display()))?;

        let mut program: Program = ptr::null_mut();
        // SAFETY: the signatures below are those of nvrtc.h in CUDA 12. `text`, `name` and `options` outlive the calls,
        // and each buffer is as long as NVRTC said before it fills it.
        unsafe {
            let create: libloading::Symbol<
                '_,
                unsafe extern "C" fn(
                    *mut Program,
                    *const c_char,
                    *const c_char,
                    c_int,
                    *const *const c_char,
                    *const *const c_char,
                ) -> c_int,
            > = symbol(&lib, "nvrtcCreateProgram")?;
            let compile: libloading::Symbol<
                '_,
                unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
            > = symbol(&lib, "nvrtcCompileProgram")?;
            let destroy: libloading::Symbol<'_, unsafe extern "C" fn(*mut Program) -> c_int> =
                symbol(&lib, "nvrtcDestroyProgram")?;
            let code = create(&raw mut program, text.as_ptr(), name.as_ptr(), 0, ptr::null(), ptr::null());
            if code != 0 {
                return Err(failed("nvrtcCreateProgram", code));
            }
            let code = compile(program, options.len() as c_int, options.as_ptr());
            let log = read(&lib, program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
                .map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
            let ptx = read(&lib, program, "nvrtcGetPTXSize", "nvrtcGetPTX");
            destroy(&raw mut program);
            if code != 0 {
                return Err(format!("NVRTC cannot compile {}:\n{}", source.display(), log?));
            }
            warn(&log?);
            ptx
        }
    }

    unsafe fn symbol<'lib, T>(lib: &'lib Library, name: &str) -> Result<libloading::Symbol<'lib, T>> {
        // SAFETY: the caller names the function's type.
        unsafe { lib.get(name.as_bytes()) }.map_err(|e| format!("NVRTC lacks {name}: {e}"))
    }

    /// One of NVRTC's pairs of functions, of a size and of the bytes; their final zero is left out.
    unsafe fn read(lib: &Library, program: Program, size: &str, bytes: &str) -> Result<Vec<u8>> {
        // SAFETY: both have these types, and the program is a live one.
        unsafe {
            let size_of: libloading::Symbol<'_, unsafe extern "C" fn(Program, *mut usize) -> c_int> =
                symbol(lib, size)?;
            let fill: libloading::Symbol<'_, unsafe extern "C" fn(Program, *mut c_char) -> c_int> =
                symbol(lib, bytes)?;
            let mut length = 0;
            let code = size_of(program, &raw mut length);
            let mut buffer = vec![0_u8; length];
            if code != 0 || length > 0 && fill(program, buffer.as_mut_ptr().cast()) != 0 {
                return Err(format!("{bytes} failed"));
            }
            buffer.pop_if(|last| *last == 0);
            Ok(buffer)
        }
    }

    fn files(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
        let entries = fs::read_dir(dir).map_err(|e| format!("cannot list {}: {e}", dir.display()))?;
        let mut found: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        found.retain(|path| path.extension().is_some_and(|e| e == extension));
        found.sort();
        Ok(found)
    }

    fn stem(path: &Path) -> String {
        path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn write(path: &Path, bytes: &[u8]) -> Result<()> {
        fs::write(path, bytes).map_err(|e| format!("cannot write {}: {e}", path.display()))
    }

    fn copy(from: &Path, to: &Path) -> Result<()> {
        fs::copy(from, to)
            .map(drop)
            .map_err(|e| format!("cannot copy {} to {}: {e}", from.display(), to.display()))
    }

    fn rename(from: &Path, to: &Path) -> Result<()> {
        fs::rename(from, to).map_err(|e| format!("cannot rename {} to {}: {e}", from.display(), to.display()))
    }

    /// Run by the engine's integration tests, which include this file.
    #[cfg(test)]
    mod tests {
        use super::*;

        /// An executable that is a shell script, written by another process: one that this process had open for writing
        /// could not be run while any of its children still holds it.
        fn program(path: &Path, script: &str) {
            fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            let write = format!("printf '#!/bin/sh\n%s\n' \"$1\" > '{0}' && chmod +x '{0}'", path.display());
            let done = Command::new("sh").args(["-c", &write, "sh", script]).status().expect("sh runs");
            assert!(done.success());
        }

        const PTXAS: &str =
            "if [ \"$1\" = --version ]; then echo 'Cuda compilation tools, release 12.9, V12.9.86'; exit; fi";

        /// A toolkit with nvcc, and headers where conda has them.
        fn toolkit(home: &Path, ptxas: &str) {
            program(&home.join("bin/ptxas"), ptxas);
            program(
                &home.join("bin/nvcc"),
                "while [ \"$1\" != -o ]; do echo \"$1\"; shift; done > ptx; mv ptx \"$2\"",
            );
            let include = home.join("targets/x86_64-linux/include");
            fs::create_dir_all(&include).expect("a directory");
            fs::write(include.join("cuda_fp16.h"), "").expect("a header");
        }

        fn find(root: &Path, home: &Path) -> Result<Toolchain> {
            Toolchain::find(root, &|name| (name == "M40LLM_CUDA_HOME").then(|| home.into()))
        }

        #[test]
        fn what_is_missing_is_named_with_the_remedy() {
            let dir = tempfile::tempdir().expect("a directory");
            let error = find(dir.path(), &dir.path().join("home")).expect_err("nothing there");
            assert!(error.contains("no ptxas") && error.contains("make cuda-toolchain"), "{error}");
            toolkit(&dir.path().join("home"), PTXAS);
            fs::remove_file(dir.path().join("home/bin/nvcc")).expect("it was there");
            let error = find(dir.path(), &dir.path().join("home")).expect_err("half of it");
            assert!(error.contains("neither libnvrtc.so.12 nor nvcc"), "{error}");
        }

        #[test]
        fn cuda_13_is_refused_as_it_cannot_compile_for_the_card() {
            let dir = tempfile::tempdir().expect("a directory");
            toolkit(dir.path(), "echo 'Cuda compilation tools, release 13.0, V13.0.48'");
            let error = find(dir.path(), dir.path()).expect_err("13");
            assert!(error.contains("CUDA 13.0") && error.contains("sm_52"), "{error}");
        }

        #[test]
        fn the_named_toolkit_wins_and_without_one_the_projects_own_does() {
            let dir = tempfile::tempdir().expect("a directory");
            let [own, named] = [".cuda", "named"].map(|name| dir.path().join(name));
            toolkit(&own, PTXAS);
            toolkit(&named, PTXAS);
            assert_eq!(find(dir.path(), &named).expect("named").ptxas, named.join("bin/ptxas"));
            assert_eq!(find(dir.path(), Path::new("")).expect("own").ptxas, own.join("bin/ptxas"));
        }

        #[test]
        fn nvcc_gets_the_flags_and_a_compilers_message_becomes_the_error() {
            let dir = tempfile::tempdir().expect("a directory");
            toolkit(dir.path(), &format!("{PTXAS}\necho 'ptxas fatal: no' >&2; exit 1"));
            let toolchain = find(dir.path(), dir.path()).expect("a toolkit");
            let (source, ptx) = (dir.path().join("a.cu"), dir.path().join("a.ptx"));
            toolchain.to_ptx(&source, &ptx).expect("nvcc runs");
            let told = fs::read_to_string(&ptx).expect("arguments");
            let include = format!("-I{}/", dir.path().join("targets/x86_64-linux/include").display());
            for flag in ["-ptx", "--gpu-architecture=compute_52", "--std=c++17", &include] {
                assert!(told.lines().any(|line| line == flag), "{told} lacks {flag}");
            }
            let error = toolchain.to_cubin(&ptx, &dir.path().join("a.cubin")).expect_err("it fails");
            assert!(error.contains("ptxas fatal: no") && error.contains("a.ptx"), "{error}");
        }

        #[test]
        fn a_result_is_kept_until_something_that_went_in_changes() {
            let dir = tempfile::tempdir().expect("a directory");
            toolkit(dir.path(), PTXAS);
            let toolchain = find(dir.path(), dir.path()).expect("a toolkit");
            let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("a file");
            let key = || key(&dir.path().join("a.cu"), &toolchain).expect("a key");
            put("a.cu", "#include \"a.cuh\"\n#include <cuda_fp16.h>\n");
            put("a.cuh", "# include \"b.cuh\" // and so on\n");
            put("b.cuh", "#include \"a.cuh\"\n");
            put("c.cuh", "");
            let first = key();
            put("c.cuh", "int c;");
            assert_eq!(key(), first, "a header that is not included");
            put("b.cuh", "int b;");
            assert_ne!(key(), first, "a header of a header");
        }
    }
}
