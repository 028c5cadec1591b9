//! Wire types of Anthropic's Messages: what its clients send and what they parse, and nothing else.
//!
//! As with OpenAI's, an explicit `null` is the same as an absent field, and unknown fields are ignored.

mod answer;
mod request;

pub use self::{
    answer::{
        ContentBlock, Delta, InputTokens, Message, MessageEvent, MessageUsage, OutputTokensDetails, Problem,
        StopReason,
    },
    request::{
        Block, BlocksSchema, CountTokensRequest, InputMessage, MessagesRequest, OutputConfig, Thinking, Tool,
        ToolChoice,
    },
};
