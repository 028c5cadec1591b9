//! `GET /v1/models` and `GET /v1/models/{id}`.

use axum::{
    Json,
    extract::{Path, State},
};

use super::{ReadFailures, failures};
use crate::{
    app::AppState,
    auth::Identity,
    error::ApiError,
    openai::models::{Model, ModelList, ModelMeta},
};

/// Failures of routes that need the loaded model.
pub(super) struct ModelFailures;

impl utoipa::IntoResponses for ModelFailures {
    fn responses() -> std::collections::BTreeMap<String, utoipa::openapi::RefOr<utoipa::openapi::Response>> {
        let mut all = ReadFailures::responses();
        all.extend(failures(&[503]));
        all
    }
}

/// Failures of routes that name a model.
struct NamedFailures;

impl utoipa::IntoResponses for NamedFailures {
    fn responses() -> std::collections::BTreeMap<String, utoipa::openapi::RefOr<utoipa::openapi::Response>> {
        let mut all = ModelFailures::responses();
        all.extend(failures(&[404]));
        all
    }
}

/// List the models: the one that is loaded, if the key may use it.
#[utoipa::path(
    get, path = "/v1/models", operation_id = "listModels", tag = "OpenAI",
    responses((status = 200, description = "The models.", body = ModelList), ModelFailures),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn list(
    State(state): State<AppState>,
    identity: Identity,
) -> Result<Json<ModelList>, ApiError> {
    let mut data = vec![describe(&state)?];
    data.retain(|model| identity.may_use(&model.id));
    Ok(Json(ModelList { object: "list", data }))
}

/// Describe a model.
#[utoipa::path(
    get, path = "/v1/models/{id}", operation_id = "retrieveModel", tag = "OpenAI",
    params(("id" = String, Path, description = "The model's id.", example = "smollm2-135m-instruct-q4_1")),
    responses((status = 200, description = "The model.", body = Model), NamedFailures),
    security(("ApiKey" = []), ()),
)]
pub(super) async fn retrieve(
    State(state): State<AppState>,
    identity: Identity,
    Path(id): Path<String>,
) -> Result<Json<Model>, ApiError> {
    if !identity.may_use(&id) {
        return Err(ApiError::model_not_allowed(&id));
    }
    state.check_model(Some(&id))?;
    Ok(Json(describe(&state)?))
}

/// As [`retrieve`], for an id such as `owner/name`.
pub(super) async fn retrieve_with_slash(
    state: State<AppState>,
    identity: Identity,
    Path((owner, name)): Path<(String, String)>,
) -> Result<Json<Model>, ApiError> {
    retrieve(state, identity, Path(format!("{owner}/{name}"))).await
}

fn describe(state: &AppState) -> Result<Model, ApiError> {
    let model = state.model()?;
    let info = model.engine.info();
    Ok(Model {
        id: state.config().model_id.clone(),
        object: "model",
        created: state.config().created,
        owned_by: "m40llm",
        meta: ModelMeta {
            context_length: info.ctx_size,
            context_length_train: info.ctx_train,
            parameters: info.parameters,
            quantization: info.quantization.clone(),
            architecture: info.architecture.clone(),
            name: info.name.clone(),
            size_bytes: info.size_bytes,
            vocab_size: info.vocab_size,
            embedding_length: info.embedding_length,
        },
    })
}
