use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use super::*;
use crate::auth::KeyLimits;

const SECOND: u64 = 1_000_000_000;

/// A clock that stands still until it is moved.
fn stopped() -> (Arc<AtomicU64>, Clock) {
    let now = Arc::new(AtomicU64::new(0));
    (Arc::clone(&now), Clock::Hand(now))
}

fn account(rpm: Option<u32>, tpm: Option<u32>, concurrency: Option<u32>) -> (Arc<AtomicU64>, Arc<Account>) {
    let (now, clock) = stopped();
    let limits = DefaultLimits { rpm, tpm, concurrency };
    (now, Arc::new(Account::new(clock, &limits)))
}

fn told(account: &Account, name: &str) -> String {
    let mut headers = HeaderMap::new();
    account.write(&mut headers);
    headers.get(name).map_or(String::new(), |v| v.to_str().unwrap().to_owned())
}

fn remaining(account: &Account) -> u64 {
    told(account, "x-ratelimit-remaining-tokens").parse().unwrap()
}

#[test]
fn requests_are_counted_and_come_back() {
    let (now, account) = account(Some(3), None, None);
    for left in ["2", "1", "0"] {
        drop(account.enter().unwrap());
        assert_eq!(told(&account, "x-ratelimit-remaining-requests"), left);
    }
    let wait = Duration::from_secs(20);
    assert_eq!(account.enter().unwrap_err(), Refused::Requests { limit: 3, wait });
    assert_eq!(told(&account, "x-ratelimit-reset-requests"), "1m0s");
    now.store(20 * SECOND - 1, Ordering::SeqCst);
    assert!(account.enter().is_err());
    now.store(20 * SECOND, Ordering::SeqCst);
    let mut entry = account.enter().unwrap();
    // The engine's queue was full.
    entry.forgive();
    assert_eq!(told(&account, "x-ratelimit-remaining-requests"), "1");
}

#[test]
fn places_are_given_back() {
    let (_, account) = account(None, None, Some(2));
    let one = account.enter().unwrap();
    let _two = account.enter().unwrap();
    assert_eq!(account.enter().unwrap_err(), Refused::Concurrent { limit: 2 });
    drop(one);
    let _three = account.enter().unwrap();
    assert!(account.enter().is_err());
}

#[test]
fn a_refusal_takes_nothing() {
    let (_, account) = account(Some(5), Some(100), Some(1));
    let entry = account.enter().unwrap();
    assert!(account.enter().is_err());
    assert_eq!(told(&account, "x-ratelimit-remaining-requests"), "4");
    drop(entry);
    let mut entry = account.enter().unwrap();
    let refused = entry.reserve(60, Output::Bounded(41)).unwrap_err();
    assert_eq!(refused, Refused::TooLarge { limit: 100, requested: 101 });
    assert_eq!(refused.wait(), None);
    assert!(entry.reserve(60, Output::Bounded(40)).is_ok());
    drop(entry);
    assert_eq!(remaining(&account), 100);
}

#[test]
fn what_is_reserved_and_not_used_is_free_again() {
    let (now, account) = account(None, Some(600), None);
    let mut entry = account.enter().unwrap();
    let allowance = entry.reserve(100, Output::Bounded(300)).unwrap().unwrap();
    assert_eq!(remaining(&account), 200);
    let mut other = account.enter().unwrap();
    let wait = Duration::from_secs(1);
    assert_eq!(
        other.reserve(10, Output::Bounded(200)).unwrap_err(),
        Refused::Tokens { limit: 600, remaining: 200, requested: 210, wait }
    );
    for _ in 0..20 {
        allowance.draw().unwrap();
    }
    assert_eq!(remaining(&account), 200, "drawn from what is held");
    entry.settle(100);
    assert_eq!(remaining(&account), 480);
    assert!(allowance.draw().is_err(), "nothing is drawn after the end");
    entry.settle(0);
    assert_eq!(remaining(&account), 480, "once");
    // One was on its way when the request was cancelled.
    allowance.give_back();
    assert_eq!(remaining(&account), 481);
    now.store(SECOND, Ordering::SeqCst);
    assert_eq!(remaining(&account), 491);
}

#[test]
fn an_open_output_goes_on_as_the_bucket_fills() {
    let (now, account) = account(None, Some(600), None);
    let mut entry = account.enter().unwrap();
    let open = Output::Open { sequences: 1, expected: OPEN_OUTPUT };
    let allowance = entry.reserve(100, open).unwrap().unwrap();
    assert_eq!(remaining(&account), 244);
    for _ in 0..500 {
        allowance.draw().unwrap();
    }
    assert_eq!(remaining(&account), 0);
    // Ten tokens a second.
    assert_eq!(allowance.draw(), Err(Duration::from_millis(100)));
    now.store(SECOND / 10, Ordering::SeqCst);
    allowance.draw().unwrap();
    assert!(allowance.draw().is_err());
    now.store(61 * SECOND, Ordering::SeqCst);
    for _ in 0..600 {
        allowance.draw().unwrap();
    }
    assert!(allowance.draw().is_err());
    entry.settle(100);
    assert_eq!(remaining(&account), 0);
}

#[test]
fn a_small_bucket_still_serves_an_open_output() {
    let (_, account) = account(None, Some(50), None);
    let open = |sequences| Output::Open { sequences, expected: sequences * OPEN_OUTPUT };
    let mut entry = account.enter().unwrap();
    assert_eq!(entry.reserve(48, open(3)).unwrap_err(), Refused::TooLarge { limit: 50, requested: 51 });
    let allowance = entry.reserve(48, open(2)).unwrap().unwrap();
    allowance.draw().unwrap();
    allowance.draw().unwrap();
    assert!(allowance.draw().is_err());
}

#[test]
fn limits_may_change_while_requests_run() {
    let (now, account) = account(None, Some(100), None);
    let mut entry = account.enter().unwrap();
    let allowance = entry.reserve(10, Output::Bounded(50)).unwrap().unwrap();
    account.update(&DefaultLimits { tpm: Some(1000), ..DefaultLimits::default() });
    assert_eq!(remaining(&account), 940);
    account.update(&DefaultLimits::default());
    allowance.draw().unwrap();
    assert_eq!(told(&account, "x-ratelimit-limit-tokens"), "");
    account.update(&DefaultLimits { tpm: Some(30), ..DefaultLimits::default() });
    now.store(SECOND, Ordering::SeqCst);
    drop(entry);
    assert_eq!(remaining(&account), 30);
}

#[test]
fn a_key_without_limits_has_the_defaults() {
    let accounts = Accounts::default();
    let key = |id: &str, limits| Key {
        id: id.into(),
        name: "a".into(),
        scopes: Vec::new(),
        created: 0,
        expires: None,
        revoked: None,
        limits,
    };
    let free = key("free", KeyLimits::default());
    let own = key("own", KeyLimits { rpm: Some(7), ..KeyLimits::default() });
    assert!(accounts.of(&free).is_none());
    let limit = |key: &Key| told(&accounts.of(key).unwrap(), "x-ratelimit-limit-requests");
    assert_eq!(limit(&own), "7");
    accounts.set_defaults(DefaultLimits { rpm: Some(100), tpm: Some(50), concurrency: None });
    assert_eq!((limit(&free), limit(&own)), ("100".into(), "7".into()));
    assert_eq!(remaining(&accounts.of(&own).unwrap()), 50);
    accounts.set_defaults(DefaultLimits::default());
    assert_eq!(limit(&free), "");
}

/// 50 callers on 5 keys; every tenth clock tick somebody reserves, draws some, and ends or is cancelled.
#[test]
fn fifty_callers_to_the_token() {
    let accounts: Vec<_> = (0..5).map(|_| account(Some(10_000), Some(20_000), Some(7))).collect();
    let used: Vec<_> = (0..5).map(|_| AtomicU64::new(0)).collect();
    let (accounts, used) = (&accounts, &used);
    thread::scope(|scope| {
        for caller in 0..50u64 {
            scope.spawn(move || {
                let mut seed = caller.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
                let mut random = |n: u64| {
                    seed ^= seed << 13;
                    seed ^= seed >> 7;
                    seed ^= seed << 17;
                    seed % n
                };
                let (_, account) = &accounts[caller as usize % 5];
                for _ in 0..200 {
                    let Ok(mut entry) = account.enter() else { continue };
                    let (prompt, wanted) = (1 + random(40), 1 + random(60));
                    let output = match random(2) {
                        0 => Output::Bounded(wanted),
                        _ => Output::Open { sequences: 1, expected: OPEN_OUTPUT },
                    };
                    let Ok(allowance) = entry.reserve(prompt, output) else { continue };
                    let allowance = allowance.unwrap();
                    let generated = (0..wanted).take_while(|_| allowance.draw().is_ok()).count() as u64;
                    // A third ends, a third is cancelled with a token under way, a third in its prompt.
                    let (prompt, generated) = match random(3) {
                        0 => {
                            entry.settle(prompt);
                            (prompt, generated)
                        }
                        1 => {
                            entry.settle(prompt);
                            drop(entry);
                            if generated > 0 {
                                allowance.give_back();
                            }
                            (prompt, generated.saturating_sub(1))
                        }
                        _ => {
                            let computed = random(prompt + 1);
                            entry.settle(computed);
                            (computed, generated)
                        }
                    };
                    used[caller as usize % 5].fetch_add(prompt + generated, Ordering::SeqCst);
                }
            });
        }
    });
    for ((_, account), used) in accounts.iter().zip(used) {
        let used = used.load(Ordering::SeqCst);
        assert!(used > 15_000, "the limit was reached: {used}");
        assert_eq!(remaining(account), 20_000 - used, "to the token, with the clock stopped");
        assert_eq!(lock(&account.state).running, 0);
    }
}
