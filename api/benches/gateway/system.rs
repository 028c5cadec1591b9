//! What the kernel tells: one clock for all processes, memory, CPU time, and leave for many sockets.

use std::{fs, io, time::Duration};

use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    time::{ClockId, clock_gettime},
};

/// Nanoseconds of `CLOCK_MONOTONIC`, which all processes of a machine share.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What a token's text begins with, and how many hexadecimal digits of its sending time follow.
pub(crate) const MARK: u8 = b'@';
pub(crate) const DIGITS: usize = 12;

/// The text of a token that is sent now. The digits last for three days of uptime, then begin again.
pub(crate) fn stamp() -> String {
    format!("{}{:0DIGITS$x} ", char::from(MARK), now() & mask())
}

/// Nanoseconds between a stamp and `received`.
pub(crate) fn delay(stamp: u64, received: u64) -> u64 {
    received.wrapping_sub(stamp) & mask()
}

const fn mask() -> u64 {
    (1 << (4 * DIGITS)) - 1
}

/// Lets this process open as many files as it may.
pub(crate) fn allow_many_files() {
    let limit = getrlimit(Resource::Nofile);
    // What stays too low shows when the connections fail.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

/// Resident bytes of a process.
pub(crate) fn resident(pid: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kb = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    kb.and_then(|kb| kb.parse::<u64>().ok())
        .map(|kb| kb * 1024)
        .ok_or_else(|| io::Error::other("no VmRSS in /proc"))
}

/// CPU time that a process has used, all of its living threads together.
pub(crate) fn cpu_time(pid: u32) -> io::Result<Duration> {
    let mut total = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end between the two calls.
        let Ok(line) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        total += line.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or_default();
    }
    Ok(Duration::from_nanos(total))
}
