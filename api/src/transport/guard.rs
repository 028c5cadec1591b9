//! Which names the server answers to, and the headers that every response carries.

use std::net::{Ipv4Addr, Ipv6Addr};

use axum::{
    extract::{Request, State},
    http::{HeaderValue, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use crate::{
    app::AppState,
    error::{ApiError, shorten},
};

/// For everything but the documentation and the page at `/`, which says what it needs: nothing is loaded, nothing is framed.
const NOTHING: HeaderValue = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
/// For Swagger UI: its own files and calls to this server. It sets styles in markup.
const DOCS: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// The layer: refuses names that are not this machine's where that matters, and adds headers.
pub(crate) async fn guard(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let config = state.config();
    let is_docs = request.uri().path().starts_with("/docs");
    // Browsers remember it for a name, with all its ports: not for one that other servers share.
    let secure = config.tls.is_some() && hosts(&request).any(|host| !is_loopback(host));
    let mut response = match own_name(&state).and_then(|own| foreign(&request, own)) {
        Some(host) => ApiError::foreign_host(&shorten(host)).into_response(),
        None => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(if is_docs { DOCS } else { NOTHING });
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    if secure {
        headers.insert(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
    }
    response
}

/// The host that the server was told to listen on, while no key protects it.
fn own_name(state: &AppState) -> Option<&str> {
    state.config().local_host.as_deref().filter(|_| !state.gate().asks_for_keys())
}

/// The name of another machine that `request` is for. A page of `evil.example` may have that name
/// resolved to 127.0.0.1: to the browser this server is then a part of that page's site, and the name is
/// all that tells.
fn foreign<'r>(request: &'r Request, own: &str) -> Option<&'r str> {
    hosts(request).find(|host| !is_loopback(host) && !is_bare(host) && !host.eq_ignore_ascii_case(own))
}

/// True for a name without a dot, such as a host file's or a container's: nobody on the Internet can have
/// one.
fn is_bare(host: &str) -> bool {
    !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// The hosts that a request names, without ports: in its line and in its `Host` headers.
fn hosts(request: &Request) -> impl Iterator<Item = &str> {
    let headers = request.headers().get_all(header::HOST).iter();
    // What is no text is nobody's name.
    let named = headers.map(|value| value.to_str().unwrap_or("?")).map(without_port);
    request.uri().host().into_iter().chain(named)
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
        _ => authority,
    }
}

/// True for the names and addresses of the machine itself, in every browser and resolver.
pub(crate) fn is_loopback(host: &str) -> bool {
    if let Some(v6) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        return v6.parse::<Ipv6Addr>().is_ok_and(|ip| ip.is_loopback());
    }
    let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    name == "localhost"
        || name.ends_with(".localhost")
        || name.parse::<Ipv4Addr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn request(line: &str, hosts: &[&str]) -> Request {
        let mut request = Request::get(line);
        for host in hosts {
            request = request.header(header::HOST, *host);
        }
        request.body(Body::empty()).expect("a request")
    }

    #[test]
    fn only_this_machines_names_are_its_own() {
        for host in [
            "localhost",
            "LOCALHOST:58439",
            "localhost.",
            "app.localhost:1",
            "127.0.0.1:58439",
            "127.9.9.9",
            "[::1]",
            "[::1]:58439",
            "box.lan:58439",
            "BOX.lan",
            "workstation:58439",
        ] {
            assert_eq!(foreign(&request("/health", &[host]), "box.lan"), None, "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:58439",
            "localhost.evil.example",
            "127.0.0.1.evil.example:80",
            "10.0.0.1",
            "[::2]:1",
            "0.0.0.0:58439",
            "evil.example.",
            "é",
            "",
        ] {
            assert!(foreign(&request("/health", &[host]), "box.lan").is_some(), "{host}");
        }
    }

    #[test]
    fn every_name_of_a_request_counts() {
        assert_eq!(foreign(&request("/", &[]), "x"), None, "HTTP/1.0 without a name is no browser");
        assert_eq!(foreign(&request("/", &["localhost", "evil.example"]), "x"), Some("evil.example"));
        assert_eq!(foreign(&request("http://evil.example/", &["localhost"]), "x"), Some("evil.example"));
        assert_eq!(foreign(&request("http://localhost:1/", &["localhost"]), "x"), None);
    }
}
