//! The gateway's JSON, as far as this client reads it, and what it means.

use serde::de::DeserializeOwned;
use serde::Deserialize;
use serde_json::Value;

use crate::answer::{Answer, Event, ToolCall, ToolCallDelta, Usage};

#[derive(Deserialize)]
pub(crate) struct Body {
    model: Option<String>,
    served_by: Option<String>,
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    index: u64,
    message: Option<Content>,
    delta: Option<Content>,
    text: Option<String>,
    finish_reason: Option<String>,
    ended_by: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Content {
    content: Option<String>,
    tool_calls: Option<Vec<Call>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Call {
    index: u64,
    id: Option<String>,
    function: Option<Function>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Function {
    name: Option<String>,
    arguments: Option<String>,
}

/// The `error` of an answer, or of an event.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct ErrorBody {
    pub(crate) message: Option<String>,
    pub(crate) kind: Option<String>,
    pub(crate) code: Option<String>,
    pub(crate) param: Option<String>,
}

impl From<Value> for ErrorBody {
    fn from(error: Value) -> Self {
        let text = |name: &str| match &error[name] {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        };
        Self { message: text("message"), kind: text("type"), code: text("code"), param: text("param") }
    }
}

#[derive(Deserialize)]
pub(crate) struct ModelList {
    pub(crate) data: Vec<crate::Model>,
}

/// Says what is wrong without quoting the JSON, which may be long.
pub(crate) fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

/// The error of a body in the API's shape. Triton's own errors, for example, have another.
pub(crate) fn error_of(json: &[u8]) -> Option<ErrorBody> {
    let error = parse::<Body>(json).ok()?.error?;
    error.is_object().then(|| error.into())
}

impl Body {
    /// As a whole answer.
    pub(crate) fn into_answer(self) -> Result<Answer, String> {
        let choice = self.choices.into_iter().flatten().find(|choice| choice.index == 0);
        let choice = choice.ok_or("it has no choices")?;
        if choice.text.is_none() && choice.message.is_none() {
            return Err("its choice has neither text nor message".into());
        }
        let message = choice.message.unwrap_or_default();
        Ok(Answer {
            text: choice.text.or(message.content).unwrap_or_default(),
            tool_calls: message.tool_calls.into_iter().flatten().map(Call::into_call).collect(),
            finish_reason: choice.finish_reason,
            ended_by: choice.ended_by,
            usage: self.usage,
            request_id: None,
            served_by: self.served_by,
            model: self.model,
        })
    }

    /// As an event of a stream: the error that ends it, or what it adds. Of several choices it reads the first.
    pub(crate) fn into_events(self, answer: &mut Answer) -> Result<Vec<Event>, ErrorBody> {
        if let Some(error) = self.error {
            return Err(error.into());
        }
        answer.model = self.model.or(answer.model.take());
        answer.served_by = self.served_by.or(answer.served_by.take());
        let mut events = Vec::new();
        for choice in self.choices.into_iter().flatten().filter(|choice| choice.index == 0) {
            let delta = choice.delta.unwrap_or_default();
            let text = choice.text.or(delta.content).filter(|text| !text.is_empty());
            events.extend(text.map(Event::Text));
            events.extend(delta.tool_calls.into_iter().flatten().map(Call::into_delta));
            events.extend(choice.finish_reason.map(|reason| Event::Finish { reason, ended_by: choice.ended_by }));
        }
        events.extend(self.usage.map(Event::Usage));
        Ok(events)
    }
}

impl Call {
    fn into_call(self) -> ToolCall {
        let function = self.function.unwrap_or_default();
        ToolCall {
            id: self.id.unwrap_or_default(),
            name: function.name.unwrap_or_default(),
            arguments: function.arguments.unwrap_or_default(),
        }
    }

    fn into_delta(self) -> Event {
        let function = self.function.unwrap_or_default();
        Event::ToolCall(ToolCallDelta {
            index: self.index,
            id: self.id,
            name: function.name,
            arguments: function.arguments,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_other_shapes_are_not_the_gateways() {
        assert_eq!(error_of(br#"{"error": "Not Found"}"#), None);
        assert_eq!(error_of(b"<html>"), None);
        let error = error_of(br#"{"error": {"message": "no", "code": 7, "param": null}}"#).unwrap();
        assert_eq!((error.message.as_deref(), error.code.as_deref(), error.param), (Some("no"), Some("7"), None));
    }

    #[test]
    fn of_several_choices_the_first_is_read() {
        let json = br#"{"choices": [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]}"#;
        assert_eq!(parse::<Body>(json).unwrap().into_answer().unwrap().text, "a");
        let events = parse::<Body>(json).unwrap().into_events(&mut Answer::default()).unwrap();
        assert_eq!(events, [Event::Text("a".into())]);
    }
}
