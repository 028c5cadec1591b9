//! `{"name": …, "parameters": {…}}` as the whole answer, perhaps after `<|python_tag|>`: Llama 3.1 and 3.2.

use m40llm_engine::text::ChatTemplate;

use super::family::Format;

/// One call: the models' own templates refuse messages with more.
pub(super) const FORMAT: Format = Format {
    open: "<|python_tag|>",
    close: "",
    space: "",
    arguments: "parameters",
    bare: true,
    several: false,
};

/// Whether the template tells the model so.
pub(super) fn is_taught_by(template: &ChatTemplate) -> bool {
    template.mentions(FORMAT.open) || template.mentions(r#"{"name": function name, "parameters": "#)
}
