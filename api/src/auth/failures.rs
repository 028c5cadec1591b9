//! Who guesses keys. An address that fails too often in a window is told to wait, with no more work than a
//! look into a table; a valid key from the same address is served all the same, as the key is looked at first.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long failures are counted.
pub(crate) const WINDOW: Duration = Duration::from_secs(10);

/// Most addresses remembered; who could fill this has more addresses than it takes to guess from.
const ADDRESSES: usize = 65_536;

/// Failures by address.
#[derive(Debug)]
pub(crate) struct Failures {
    allowed: u32,
    windows: Mutex<HashMap<Option<IpAddr>, Window>>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    until: Instant,
    failures: u32,
}

impl Failures {
    /// So many are allowed in a [`WINDOW`].
    pub(crate) fn new(allowed: u32) -> Self {
        Self { allowed, windows: Mutex::default() }
    }

    /// Counts a failure; tells how long the address has to wait when it has had more than are allowed.
    pub(crate) fn count(&self, peer: Option<IpAddr>, now: Instant) -> Result<(), Duration> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        let peer = peer.map(network);
        if windows.len() >= ADDRESSES && !windows.contains_key(&peer) {
            windows.retain(|_, window| window.until > now);
            if windows.len() >= ADDRESSES {
                windows.clear();
            }
        }
        let fresh = Window { until: now + WINDOW, failures: 0 };
        let window = windows.entry(peer).or_insert(fresh);
        if window.until <= now {
            *window = fresh;
        }
        window.failures = window.failures.saturating_add(1);
        if window.failures > self.allowed { Err(window.until - now) } else { Ok(()) }
    }
}

/// What one subscriber has: an IPv4 address, or the 2⁶⁴ IPv6 addresses of a network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            std::net::Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_ends_when_it_says() {
        let failures = Failures::new(3);
        let peer = Some(IpAddr::from([10, 0, 0, 1]));
        let start = Instant::now();
        for _ in 0..3 {
            assert_eq!(failures.count(peer, start), Ok(()));
        }
        let later = start + Duration::from_secs(4);
        assert_eq!(failures.count(peer, later), Err(Duration::from_secs(6)));
        assert_eq!(failures.count(Some(IpAddr::from([10, 0, 0, 2])), later), Ok(()), "another address");
        assert_eq!(failures.count(None, later), Ok(()));
        assert_eq!(failures.count(peer, start + WINDOW), Ok(()));
    }

    #[test]
    fn a_network_is_one_guesser() {
        let failures = Failures::new(1);
        let now = Instant::now();
        let peer = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        assert!(failures.count(peer("2001:db8::1"), now).is_ok());
        assert!(failures.count(peer("2001:db8::ffff:2"), now).is_err());
        assert!(failures.count(peer("2001:db8:0:1::1"), now).is_ok());
        assert!(failures.count(peer("::ffff:10.0.0.1"), now).is_ok());
        assert!(failures.count(peer("10.0.0.1"), now).is_err(), "one address in two spellings");
    }

    #[test]
    fn the_table_is_bounded() {
        let failures = Failures::new(1);
        let now = Instant::now();
        for n in 0..ADDRESSES as u32 + 10 {
            let _ = failures.count(Some(IpAddr::from(n.to_be_bytes())), now);
        }
        assert!(failures.windows.lock().unwrap().len() <= ADDRESSES);
    }
}
