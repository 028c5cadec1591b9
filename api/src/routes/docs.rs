//! `GET /openapi.json` and `GET /docs`, all of it from the binary.

use std::sync::{Arc, LazyLock};

use axum::{
    extract::Path,
    http::{HeaderValue, StatusCode, header},
    response::{Html, IntoResponse, Redirect, Response},
};
use utoipa_swagger_ui::Config;

static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let mut json = super::openapi().to_pretty_json().unwrap_or_default();
    json.push('\n');
    json
});

static CONFIG: LazyLock<Arc<Config<'static>>> = LazyLock::new(|| {
    Arc::new(
        Config::from("/openapi.json")
            .persist_authorization(true)
            .try_it_out_enabled(true)
            .display_request_duration(true)
            .validator_url("none"),
    )
});

/// The page names its assets beside it; served as `/docs`, they are below it.
const PAGE: &str = r#"<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>m40llm API</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="stylesheet" href="docs/index.css">
<link rel="icon" type="image/png" href="docs/favicon-32x32.png" sizes="32x32">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js" charset="utf-8"></script>
<script src="docs/swagger-ui-standalone-preset.js" charset="utf-8"></script>
<script src="docs/swagger-initializer.js" charset="utf-8"></script>
</body>
</html>
"#;

/// This document.
#[utoipa::path(
    get, path = "/openapi.json", operation_id = "openapi", tag = "Operation",
    responses((status = 200, description = "The OpenAPI 3.1 document.", body = Object, content_type = "application/json")),
    security(()),
)]
pub(super) async fn document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], DOCUMENT.as_str())
}

/// Swagger UI over this document.
#[utoipa::path(
    get, path = "/docs", operation_id = "docs", tag = "Operation",
    responses((status = 200, description = "The page.", body = String, content_type = "text/html")),
    security(()),
)]
pub(super) async fn page() -> Html<&'static str> {
    Html(PAGE)
}

/// `/docs/` is `/docs`.
pub(super) async fn slash() -> Redirect {
    Redirect::permanent("../docs")
}

/// A file of Swagger UI.
pub(super) async fn asset(Path(file): Path<String>) -> Response {
    match utoipa_swagger_ui::serve(&file, CONFIG.clone()) {
        Ok(Some(asset)) => {
            let content_type = HeaderValue::from_str(&asset.content_type)
                .unwrap_or(HeaderValue::from_static("application/octet-stream"));
            let mut response =
                ([(header::CONTENT_TYPE, content_type)], asset.bytes.into_owned()).into_response();
            let headers = response.headers_mut();
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, max-age=3600"));
            if asset.gzpipped {
                headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            }
            response
        }
        Ok(None) => StatusCode::NOT_FOUND.into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
