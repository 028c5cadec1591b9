//! `<tool_call>` around `{"name": …, "arguments": {…}}`: Qwen 2.5 and 3, Hermes.

use m40llm_engine::text::ChatTemplate;

use super::family::Format;

pub(super) const FORMAT: Format = Format {
    open: "<tool_call>",
    close: "</tool_call>",
    space: "\n",
    arguments: "arguments",
    bare: false,
    several: true,
};

/// Whether the template writes calls so. Qwen 3 Coder has the same markers around XML.
pub(super) fn is_taught_by(template: &ChatTemplate) -> bool {
    template.mentions(FORMAT.open) && !template.mentions("<function=")
}
