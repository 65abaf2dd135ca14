//! What the gateway answers: whole, and the events of a stream. Unknown fields are ignored.

use serde::Deserialize;

/// A whole answer, or what a stream's events add up to so far.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Calls of functions that the model asks for.
    pub tool_calls: Vec<ToolCall>,
    /// `stop`, `length`, `tool_calls`, or another that the gateway names.
    pub finish_reason: Option<String>,
    /// Why the gateway ended it early: `timeout`, for example.
    pub ended_by: Option<String>,
    /// Tokens of prompt and answer.
    pub usage: Option<Usage>,
    /// Names the request in the gateway's logs.
    pub request_id: Option<String>,
    /// `decoder`, or `fallback` while the smaller model answers.
    pub served_by: Option<String>,
    /// The model's name.
    pub model: Option<String>,
}

/// A call of a function that the model asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ToolCall {
    /// To name it in [`Message::tool`](crate::Message::tool).
    pub id: String,
    /// The function's.
    pub name: String,
    /// JSON, as the model wrote it: parse it with care.
    pub arguments: String,
}

/// Tokens of prompt and answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: u64,
    /// Of the answer.
    pub completion_tokens: u64,
    /// Of both.
    pub total_tokens: u64,
}

/// One step of a [`Stream`](crate::Stream).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The next piece of the text.
    Text(String),
    /// The next piece of a tool call.
    ToolCall(ToolCallDelta),
    /// The model's answer is whole.
    Finish {
        /// As in [`Answer::finish_reason`].
        reason: String,
        /// As in [`Answer::ended_by`].
        ended_by: Option<String>,
    },
    /// Tokens of prompt and answer, at the end.
    Usage(Usage),
}

/// A piece of a tool call: the arguments of one `index` join to the whole.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ToolCallDelta {
    /// Which of several calls.
    pub index: u64,
    /// In a call's first piece.
    pub id: Option<String>,
    /// In a call's first piece.
    pub name: Option<String>,
    /// The next piece of the JSON.
    pub arguments: Option<String>,
}

/// An entry of [`Client::models`](crate::Client::models).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Model {
    /// Its name, for requests.
    pub id: String,
    /// Whose it is.
    #[serde(default)]
    pub owned_by: Option<String>,
}

/// Adds the events of a stream up to an [`Answer`].
#[derive(Debug, Default)]
pub(crate) struct Sum {
    pub(crate) answer: Answer,
    /// Of `answer.tool_calls`, sorted.
    indices: Vec<u64>,
    /// Bytes that it keeps, about.
    pub(crate) size: usize,
}

/// What a tool call costs beside its texts.
const SIZE_OF_CALL: usize = 64;

impl Sum {
    pub(crate) fn add(&mut self, event: &Event) {
        match event {
            Event::Text(text) => {
                self.answer.text.push_str(text);
                self.size += text.len();
            }
            Event::ToolCall(delta) => self.add_call(delta),
            Event::Finish { reason, ended_by } => {
                self.answer.finish_reason = Some(reason.clone());
                self.answer.ended_by.clone_from(ended_by);
            }
            Event::Usage(usage) => self.answer.usage = Some(usage.clone()),
        }
    }

    fn add_call(&mut self, delta: &ToolCallDelta) {
        let place = match self.indices.binary_search(&delta.index) {
            Ok(place) => place,
            Err(place) => {
                self.indices.insert(place, delta.index);
                self.answer.tool_calls.insert(place, ToolCall::default());
                self.size += SIZE_OF_CALL;
                place
            }
        };
        let call = &mut self.answer.tool_calls[place];
        for (whole, piece) in
            [(&mut call.id, &delta.id), (&mut call.name, &delta.name), (&mut call.arguments, &delta.arguments)]
        {
            let piece = piece.as_deref().unwrap_or_default();
            whole.push_str(piece);
            self.size += piece.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(index: u64, id: Option<&str>, arguments: &str) -> Event {
        Event::ToolCall(ToolCallDelta {
            index,
            id: id.map(String::from),
            name: id.map(|_| "f".into()),
            arguments: Some(arguments.into()),
        })
    }

    #[test]
    fn calls_add_up_by_index_whatever_their_order() {
        let mut sum = Sum::default();
        for event in [delta(7, Some("b"), "{"), delta(2, Some("a"), "["), delta(7, None, "}"), delta(2, None, "]")] {
            sum.add(&event);
        }
        let calls: Vec<_> = sum.answer.tool_calls.iter().map(|call| (&*call.id, &*call.arguments)).collect();
        assert_eq!(calls, [("a", "[]"), ("b", "{}")]);
        assert_eq!(sum.size, 2 * (SIZE_OF_CALL + 4));
    }

    #[test]
    fn a_wild_index_takes_no_room() {
        let mut sum = Sum::default();
        sum.add(&delta(u64::MAX, Some("a"), "{}"));
        assert_eq!(sum.answer.tool_calls.len(), 1);
    }
}
