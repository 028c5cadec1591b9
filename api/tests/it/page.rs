//! The page at `/`: what comes with it, and that its policy is about what is in it.

use axum::{body::Body, http::Method};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use sha2::{Digest as _, Sha256};

use crate::support::{Answer, get, loading, request, send};

/// The text between the first `open` and the `close` after it.
fn between<'t>(text: &'t str, open: &str, close: &str) -> &'t str {
    let (_, rest) = text.split_once(open).unwrap_or_else(|| panic!("no {open}"));
    rest.split_once(close).unwrap_or_else(|| panic!("no {close}")).0
}

/// The parts of the policy, by name.
fn directive<'a>(answer: &'a Answer, name: &str) -> Vec<&'a str> {
    let policy = answer.header("content-security-policy");
    let found = policy.split(';').map(str::trim).find_map(|d| d.strip_prefix(name)).unwrap_or_else(|| {
        panic!("no {name} in {policy}");
    });
    found.split_whitespace().collect()
}

#[tokio::test]
async fn its_policy_names_its_script_and_style_by_their_hashes() {
    let page = get(&loading(), "/").await;
    assert_eq!((page.status.as_u16(), page.header("content-type")), (200, "text/html; charset=utf-8"));
    let hash = |text: &str| format!("'sha256-{}'", STANDARD.encode(Sha256::digest(text)));
    for (name, open, close) in
        [("script-src", "<script type=\"module\">", "</script>"), ("style-src", "<style>", "</style>")]
    {
        assert_eq!(directive(&page, name), [hash(between(&page.body, open, close))], "{name}");
    }
    assert_eq!(directive(&page, "default-src"), ["'none'"]);
    assert_eq!(directive(&page, "connect-src"), ["'self'"]);
    assert_eq!(directive(&page, "frame-ancestors"), ["'none'"]);
    assert_eq!(directive(&page, "require-trusted-types-for"), ["'script'"]);
    assert_eq!(page.header("x-content-type-options"), "nosniff");
    assert_eq!(page.header("x-frame-options"), "DENY");
}

/// What the policy would refuse is not in it; nor is any address but its own.
#[tokio::test]
async fn it_is_small_and_needs_nothing_else() {
    let page = get(&loading(), "/").await.body;
    assert!(page.len() < 40 << 10, "{} bytes", page.len());
    for wrong in [" style=", " onclick=", " onsubmit=", "javascript:", "innerHTML", "eval(", "https://"] {
        assert!(!page.contains(wrong), "{wrong}");
    }
    // Names of XML are no addresses.
    assert_eq!(page.matches("http://").count(), page.matches("http://www.w3.org/").count());
}

#[tokio::test]
async fn what_a_browser_has_it_need_not_fetch_again() {
    let app = loading();
    let page = get(&app, "/").await;
    let tag = page.header("etag");
    assert!(tag.len() > 10 && tag.starts_with('"') && tag.ends_with('"'), "{tag}");
    assert_eq!(page.header("cache-control"), "no-cache");
    for known in [tag.to_owned(), format!("W/{tag}"), format!("\"other\", {tag}"), "*".to_owned()] {
        let asked = request(Method::GET, "/", &[("if-none-match", &known)], Body::empty());
        let answer = send(&app, asked).await;
        assert_eq!((answer.status.as_u16(), answer.body.as_str()), (304, ""), "{known}");
        for same in ["etag", "cache-control", "content-security-policy"] {
            assert_eq!(answer.header(same), page.header(same));
        }
    }
    let asked = request(Method::GET, "/", &[("if-none-match", "\"other\"")], Body::empty());
    assert_eq!(send(&app, asked).await.body, page.body);
}

#[tokio::test]
async fn head_has_the_same_headers() {
    let app = loading();
    let page = get(&app, "/").await;
    let head = send(&app, request(Method::HEAD, "/", &[], Body::empty())).await;
    assert_eq!((head.status.as_u16(), head.body.as_str()), (200, ""));
    for same in ["etag", "cache-control", "content-type", "content-security-policy", "content-length"] {
        assert_eq!(head.header(same), page.header(same), "{same}");
    }
    assert_eq!(head.header("content-length"), page.body.len().to_string());
}

/// A refusal is no page and gets no page's policy.
#[tokio::test]
async fn other_methods_are_refused() {
    let answer = send(&loading(), request(Method::POST, "/", &[], Body::empty())).await;
    assert_eq!((answer.status.as_u16(), answer.header("allow")), (405, "GET,HEAD"));
    answer.error();
    assert!(!answer.header("content-security-policy").contains("script-src"));
}
