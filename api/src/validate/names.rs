//! Other endpoints' requests become chat requests; what is wrong with those is told in the words of the one asked.

use crate::error::ApiError;

/// What the fields of a chat request are called in the request that it was made of.
#[derive(Debug)]
pub(super) struct Names {
    /// Fields that have another name; the first that fits counts.
    fields: &'static [(&'static str, &'static str)],
    /// What the parameters in a tool's definition are called.
    parameters: &'static str,
    /// Where each message came from.
    messages: Vec<String>,
}

impl Names {
    pub(super) fn new(
        fields: &'static [(&'static str, &'static str)],
        parameters: &'static str,
        messages: Vec<String>,
    ) -> Self {
        Self { fields, parameters, messages }
    }

    /// The error about the request as it came.
    pub(super) fn tell(&self, error: ApiError) -> ApiError {
        error.renamed(|param| self.of(param))
    }

    /// What a chat request's field is called there.
    pub(super) fn of(&self, param: &str) -> String {
        let message = param.strip_prefix("messages[").and_then(|rest| rest.split_once(']'));
        if let Some(origin) = message.and_then(|(i, _)| self.messages.get(i.parse::<usize>().ok()?)) {
            return origin.clone();
        }
        // Definitions of tools have no level `function` elsewhere.
        let param = match param.split_once("].function") {
            Some((list, rest)) if param.starts_with("tool") => {
                let parameters = rest.strip_prefix(".parameters");
                parameters
                    .map_or(format!("{list}]{rest}"), |rest| format!("{list}].{}{rest}", self.parameters))
            }
            _ => param.to_owned(),
        };
        let renamed = self.fields.iter().find_map(|(chat, own)| {
            let rest = param.strip_prefix(chat)?;
            (rest.is_empty() || rest.starts_with(['.', '['])).then(|| format!("{own}{rest}"))
        });
        renamed.unwrap_or(param)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_have_the_names_of_the_request() {
        let names = Names::new(
            &[
                ("format.inner", "shape"),
                ("format", "text.shape"),
                ("messages", "input"),
                ("tool_choice.allowed_tools", "tool_choice"),
            ],
            "input_schema",
            vec!["instructions".into(), "input[0]".into()],
        );
        for (chat, own) in [
            ("format.inner.x", "shape.x"),
            ("format.kind", "text.shape.kind"),
            ("formats", "formats"),
            ("messages", "input"),
            ("messages[0].role", "instructions"),
            ("messages[1].content[2]", "input[0]"),
            ("tools[3].type", "tools[3].type"),
            ("tools[3].function.name", "tools[3].name"),
            ("tools[3].function.parameters.properties.x", "tools[3].input_schema.properties.x"),
            ("tool_choice.allowed_tools.tools[0].function.name", "tool_choice.tools[0].name"),
            ("temperature", "temperature"),
        ] {
            assert_eq!(names.of(chat), own, "{chat}");
        }
        let error = names.tell(ApiError::invalid("format.kind", "it is odd")).body().error;
        assert_eq!(
            (error.param.as_deref(), &*error.message),
            (Some("text.shape.kind"), "text.shape.kind: it is odd")
        );
    }
}
