//! How models write calls: by their chat template, as they were taught in its terms.

use m40llm_engine::text::ChatTemplate;

use super::{generic, hermes, llama};

/// Who writes calls alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    /// Qwen 2.5 and 3, Hermes.
    Hermes,
    /// Llama 3.1 and 3.2.
    Llama,
    /// Models whose template knows no tools, or writes calls in a way that is not read here: the gateway tells them.
    Generic,
}

/// A family's way to write a call around its JSON.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// What begins a call. One may also be the whole output, without it.
    pub(crate) open: &'static str,
    /// What ends it, if anything does but its JSON.
    pub(crate) close: &'static str,
    /// What stands between the markers and the JSON.
    pub(crate) space: &'static str,
    /// The key of a call's arguments.
    pub(crate) arguments: &'static str,
    /// A call is written without its markers, as the whole output.
    pub(crate) bare: bool,
    /// Several calls may follow one another.
    pub(crate) several: bool,
}

impl Family {
    /// The family of the model that `template` is for.
    pub(crate) fn of(template: &ChatTemplate) -> Self {
        if !template.mentions("tools") {
            Self::Generic
        } else if hermes::is_taught_by(template) {
            Self::Hermes
        } else if llama::is_taught_by(template) {
            Self::Llama
        } else {
            Self::Generic
        }
    }

    pub(crate) fn format(self) -> &'static Format {
        match self {
            Self::Hermes => &hermes::FORMAT,
            Self::Llama => &llama::FORMAT,
            Self::Generic => &generic::FORMAT,
        }
    }
}
