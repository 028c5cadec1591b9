//! A failed driver call in the user's words: the call, the driver's name of the failure, what to do.

use std::fmt;

use cudarc::driver::{DriverError, sys::CUresult};

use crate::error::EngineError;

/// Says which call it was.
pub trait Call<T> {
    /// `call` names the driver's function, and what it was called for: `cuMemAlloc of the KV cache`.
    fn call(self, call: impl fmt::Display) -> Result<T, EngineError>;
}

impl<T> Call<T> for Result<T, DriverError> {
    fn call(self, call: impl fmt::Display) -> Result<T, EngineError> {
        self.map_err(|error| {
            let words = words(&call, error);
            if ends_the_context(error.0) {
                EngineError::DeviceLost(words)
            } else {
                EngineError::Backend(words)
            }
        })
    }
}

/// Failures after which the driver answers every call of this process with the same: it must be started
/// again. CUDA's documentation of `CUresult` says so of each, but for those whose device is gone.
fn ends_the_context(code: CUresult) -> bool {
    matches!(
        code,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_ECC_UNCORRECTABLE
            | CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUresult::CUDA_ERROR_DEINITIALIZED
            | CUresult::CUDA_ERROR_UNKNOWN
    )
}

fn words(call: &dyn fmt::Display, error: DriverError) -> String {
    format!("{call}: {:?}: {}", error.0, remedy(error.0))
}

fn remedy(code: CUresult) -> &'static str {
    match code {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "the device's memory is full: lower --ctx-size or --max-batch, or end what else runs there (nvidia-smi)"
        }
        CUresult::CUDA_ERROR_NO_DEVICE => {
            "the driver finds no CUDA device: see nvidia-smi, or use --backend cpu"
        }
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "the device is taken by another process in exclusive mode: end it, or nvidia-smi -c DEFAULT"
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the driver's library and its kernel module differ in version: restart the machine"
        }
        CUresult::CUDA_ERROR_ECC_UNCORRECTABLE => {
            "the card's memory has an uncorrectable error: see nvidia-smi -q -d ECC, restart, replace the card if it returns"
        }
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            "the driver is older than the compiler of these kernels: install one for CUDA 12.9 (R575) or newer"
        }
        CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND => {
            "libnvidia-ptxjitcompiler.so.1 is missing: install all of the driver's libraries"
        }
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_INVALID_PTX => {
            "this binary's kernels do not fit the device: build it anew, or use --backend cpu"
        }
        CUresult::CUDA_ERROR_LAUNCH_TIMEOUT => {
            "a kernel ran into the display's time limit: use a card that drives no display"
        }
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
        | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
        | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUresult::CUDA_ERROR_INVALID_PC
        | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUresult::CUDA_ERROR_ASSERT
        | CUresult::CUDA_ERROR_LAUNCH_FAILED
        | CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
        | CUresult::CUDA_ERROR_INVALID_VALUE => {
            "a fault of ours: start again, and please report it with the model's name and this line"
        }
        _ => "see nvidia-smi, and dmesg for lines with Xid; start again",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_call_the_code_and_a_remedy_on_one_line() {
        let failed: Result<(), _> = Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        let words = failed.call(format_args!("cuMemAlloc of {} bytes", 12)).expect_err("failed").to_string();
        assert!(words.starts_with("cuMemAlloc of 12 bytes: CUDA_ERROR_OUT_OF_MEMORY: "), "{words}");
        assert!(words.contains("--ctx-size") && words.lines().count() == 1, "{words}");
        let lost: Result<(), _> = Err(DriverError(CUresult::CUDA_ERROR_UNKNOWN));
        assert!(lost.call("cuStreamSynchronize").expect_err("failed").to_string().contains("Xid"));
    }

    #[test]
    fn a_fault_of_the_device_is_told_from_a_call_that_failed() {
        let error = |code| Err::<(), _>(DriverError(code)).call("cuLaunchKernel").expect_err("failed");
        for code in [CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, CUresult::CUDA_ERROR_ECC_UNCORRECTABLE] {
            assert!(matches!(error(code), EngineError::DeviceLost(_)), "{code:?}");
        }
        for code in [CUresult::CUDA_ERROR_OUT_OF_MEMORY, CUresult::CUDA_ERROR_INVALID_VALUE] {
            assert!(matches!(error(code), EngineError::Backend(_)), "{code:?}");
        }
    }
}
