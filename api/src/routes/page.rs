//! `GET /`: a page to try the model with, and to see how the server is doing.
//!
//! One document: its style and its script stand in it, and its policy names both by their hashes. So a browser
//! has all of it or nothing, runs what was built here only, and no further path needs to be open.

use std::sync::LazyLock;

use axum::{
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use sha2::{Digest as _, Sha256};

const MARKUP: &str = include_str!("../page/page.html");
const STYLE: &str = include_str!("../page/page.css");
/// One module in two files.
const SCRIPT: &str = concat!(include_str!("../page/server.js"), "\n", include_str!("../page/chat.js"));

static PAGE: LazyLock<Page> = LazyLock::new(Page::new);

struct Page {
    document: String,
    policy: HeaderValue,
    /// Changes with the document, and only with it.
    tag: HeaderValue,
}

impl Page {
    fn new() -> Self {
        let document = MARKUP.replace("{{style}}", STYLE).replace("{{script}}", SCRIPT);
        // Nothing but this style and this script; calls to this server; and no text becomes markup, whatever a
        // model says.
        let policy = format!(
            "default-src 'none'; script-src '{}'; style-src '{}'; img-src data:; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
             trusted-types 'none'",
            hash(SCRIPT),
            hash(STYLE)
        );
        let tag = format!("\"{}\"", &hash(&document)[7..29]);
        Self { document, policy: ascii(&policy), tag: ascii(&tag) }
    }
}

/// A text's hash as policies write it.
fn hash(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text)))
}

fn ascii(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("base64 and words")
}

/// A page to chat with the model, with the server's figures.
#[utoipa::path(
    get, path = "/", operation_id = "page", tag = "Operation",
    responses(
        (status = 200, description = "The page.", body = String, content_type = "text/html"),
        (status = 304, description = "`If-None-Match` has the page's `ETag`: it is still the same."),
    ),
    security(()),
)]
pub(super) async fn page(headers: HeaderMap) -> Response {
    let page = &*PAGE;
    // The same headers on 304: what a browser has kept gets those.
    let common = [
        (header::CONTENT_SECURITY_POLICY, page.policy.clone()),
        (header::ETAG, page.tag.clone()),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    if headers.get_all(header::IF_NONE_MATCH).iter().any(|tags| names(tags, &page.tag)) {
        return (StatusCode::NOT_MODIFIED, common).into_response();
    }
    let html = HeaderValue::from_static("text/html; charset=utf-8");
    (common, [(header::CONTENT_TYPE, html)], page.document.as_str()).into_response()
}

/// Whether an `If-None-Match` has `tag` in its list; a proxy that compresses makes it a weak one.
fn names(tags: &HeaderValue, tag: &HeaderValue) -> bool {
    let Ok(tags) = tags.to_str() else { return false };
    tags.split(',').map(str::trim).any(|t| t == "*" || t.strip_prefix("W/").unwrap_or(t) == tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_compared_as_lists() {
        let tag = HeaderValue::from_static("\"a\"");
        let has = |tags| names(&HeaderValue::from_static(tags), &tag);
        assert!(has("\"a\"") && has("W/\"a\"") && has("\"b\", \"a\"") && has("*"));
        assert!(!has("\"b\"") && !has("a") && !has("") && !has("\"a"));
    }

    /// The document is put together by words that the parts themselves must not hold.
    #[test]
    fn the_parts_do_not_end_one_another() {
        for part in [STYLE, SCRIPT] {
            assert!(!part.contains("</") && !part.contains("<!--") && !part.contains("{{"));
        }
        let document = &PAGE.document;
        assert!(!document.contains("{{"));
        assert_eq!((document.matches("<script").count(), document.matches("<style").count()), (1, 1));
    }
}
