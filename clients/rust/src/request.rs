//! What is asked for. Fields that have no method here go through `extra` unchanged.

use std::time::Duration;

use serde::Serialize;
use serde_json::{json, Map, Value};

use crate::error::{Details, Error};
use crate::{builder, Answer, Result};

/// A message of a chat.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Message(Value);

impl Message {
    /// Instructions for the model.
    pub fn system(text: impl Into<String>) -> Self {
        Self::of("system", text)
    }

    /// What the user says.
    pub fn user(text: impl Into<String>) -> Self {
        Self::of("user", text)
    }

    /// What the model said.
    pub fn assistant(text: impl Into<String>) -> Self {
        Self::of("assistant", text)
    }

    /// What a function gave for the [`ToolCall`](crate::ToolCall) with this id.
    pub fn tool(id: impl Into<String>, result: impl Into<String>) -> Self {
        Self(json!({"role": "tool", "tool_call_id": id.into(), "content": result.into()}))
    }

    fn of(role: &str, text: impl Into<String>) -> Self {
        Self(json!({"role": role, "content": text.into()}))
    }
}

/// A message in the API's own JSON, for what the other constructors lack.
impl From<Value> for Message {
    fn from(json: Value) -> Self {
        Self(json)
    }
}

/// The model's turn with its tool calls, to go on behind it.
impl From<&Answer> for Message {
    fn from(answer: &Answer) -> Self {
        let mut message = json!({"role": "assistant", "content": answer.text});
        if !answer.tool_calls.is_empty() {
            let calls = answer.tool_calls.iter().map(|call| {
                let function = json!({"name": call.name, "arguments": call.arguments});
                json!({"id": call.id, "type": "function", "function": function})
            });
            message["tool_calls"] = calls.collect();
        }
        Self(message)
    }
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Tool(Value);

impl Tool {
    /// `parameters` is a JSON schema of the function's arguments.
    pub fn function(name: impl Into<String>, description: impl Into<String>, parameters: Value) -> Self {
        let function = json!({"name": name.into(), "description": description.into(), "parameters": parameters});
        Self(json!({"type": "function", "function": function}))
    }
}

/// A tool in the API's own JSON.
impl From<Value> for Tool {
    fn from(json: Value) -> Self {
        Self(json)
    }
}

/// A request of [`Client::chat`](crate::Client::chat) and [`Client::stream_chat`](crate::Client::stream_chat).
///
/// ```
/// use serde_json::json;
/// use tidewright_client::{ChatRequest, Message};
///
/// let request = ChatRequest::new("smollm2-135m", [Message::user("Name three fruits.")])
///     .max_tokens(32)
///     .temperature(0.0)
///     .extra("top_k", 40)
///     .extra("stop", json!(["\n\n"]));
/// ```
#[derive(Debug, Clone)]
pub struct ChatRequest(pub(crate) Fields);

/// A request of [`Client::complete`](crate::Client::complete) and
/// [`Client::stream_complete`](crate::Client::stream_complete).
#[derive(Debug, Clone)]
pub struct CompletionRequest(pub(crate) Fields);

#[derive(Debug, Clone)]
pub(crate) struct Fields {
    pub(crate) body: Map<String, Value>,
    pub(crate) timeout: Option<Duration>,
}

impl Fields {
    fn new(model: String, name: &str, value: Value) -> Self {
        let body = Map::from_iter([("model".to_owned(), model.into()), (name.to_owned(), value)]);
        Self { body, timeout: None }
    }

    /// What the gateway would refuse, said before anything is sent.
    pub(crate) fn check(&self) -> Result<()> {
        self.timeout.map_or(Ok(()), |timeout| builder::checked_timeout("timeout", timeout))?;
        let (param, message) = if self.body["model"] == "" {
            ("model", "Model is empty; Client::models lists those served")
        } else if self.body.get("messages") == Some(&json!([])) {
            ("messages", "Messages is empty")
        } else {
            return Ok(());
        };
        let details = Details { param: Some(param.into()), ..Details::new(message) };
        Err(Error::InvalidRequest(Box::new(details)))
    }

    fn set(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.body.insert(name.into(), value.into());
        self
    }
}

/// JSON has no NaN: as a text, the gateway refuses it and names the field.
fn number(value: f64) -> Value {
    serde_json::Number::from_f64(value).map_or_else(|| value.to_string().into(), Value::Number)
}

macro_rules! options_of_all_requests {
    ($request:ident) => {
        impl $request {
            /// Maximum tokens of the answer. Without it, the gateway's default.
            pub fn max_tokens(self, most: u32) -> Self {
                Self(self.0.set("max_tokens", most))
            }

            /// Sampling temperature; 0 is greedy.
            pub fn temperature(self, temperature: f64) -> Self {
                Self(self.0.set("temperature", number(temperature)))
            }

            /// Samples from the most likely tokens that together have this probability.
            pub fn top_p(self, share: f64) -> Self {
                Self(self.0.set("top_p", number(share)))
            }

            /// Makes sampling repeatable.
            pub fn seed(self, seed: u64) -> Self {
                Self(self.0.set("seed", seed))
            }

            /// Stops before any of these texts.
            pub fn stop<T: Into<String>>(self, texts: impl IntoIterator<Item = T>) -> Self {
                let texts: Vec<String> = texts.into_iter().map(Into::into).collect();
                Self(self.0.set("stop", texts))
            }

            /// Any other field of the gateway's API, unchanged. It wins over what the client would set itself.
            pub fn extra(self, name: impl Into<String>, value: impl Into<Value>) -> Self {
                Self(self.0.set(name, value))
            }

            /// From the call to its last byte, retries included, in place of the client's own.
            pub fn timeout(mut self, timeout: Duration) -> Self {
                self.0.timeout = Some(timeout);
                self
            }
        }
    };
}

options_of_all_requests!(ChatRequest);
options_of_all_requests!(CompletionRequest);

impl ChatRequest {
    /// To the model of this name, with the chat so far.
    pub fn new(model: impl Into<String>, messages: impl IntoIterator<Item = Message>) -> Self {
        let messages = messages.into_iter().map(|message| message.0).collect();
        Self(Fields::new(model.into(), "messages", messages))
    }

    /// Functions that the model may call.
    pub fn tools(self, tools: impl IntoIterator<Item = Tool>) -> Self {
        let tools: Value = tools.into_iter().map(|tool| tool.0).collect();
        Self(self.0.set("tools", tools))
    }
}

impl CompletionRequest {
    /// To the model of this name, to go on behind the prompt.
    pub fn new(model: impl Into<String>, prompt: impl Into<String>) -> Self {
        Self(Fields::new(model.into(), "prompt", prompt.into().into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ToolCall;

    #[test]
    fn fields_stand_in_the_body() {
        let request = ChatRequest::new("m", [Message::system("s"), Message::tool("c", "r")])
            .max_tokens(1)
            .temperature(0.5)
            .stop(["a"])
            .extra("min_p", 0.1);
        let body = json!({
            "model": "m", "max_tokens": 1, "temperature": 0.5, "stop": ["a"], "min_p": 0.1,
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "tool", "tool_call_id": "c", "content": "r"},
            ],
        });
        assert_eq!(Value::Object(request.0.body), body);
    }

    #[test]
    fn what_is_missing_is_told_before_it_is_sent() {
        let hi = || [Message::user("Hi")];
        assert!(ChatRequest::new("m", hi()).0.check().is_ok());
        assert!(ChatRequest::new("", hi()).extra("model", "m").0.check().is_ok());
        for (words, param, request) in [
            ("Model is empty", Some("model"), ChatRequest::new("", hi()).0),
            ("Model is empty", Some("model"), CompletionRequest::new("", "Hi").0),
            ("Messages is empty", Some("messages"), ChatRequest::new("m", []).0),
            ("timeout is 0", None, ChatRequest::new("m", hi()).timeout(Duration::ZERO).0),
        ] {
            let error = request.check().unwrap_err();
            assert!(matches!(error, Error::InvalidRequest(_)), "{error:?}");
            assert_eq!(error.details().param.as_deref(), param);
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn what_json_lacks_is_not_sent_as_null() {
        let request = CompletionRequest::new("m", "p").temperature(f64::NAN);
        assert_eq!(request.0.body["temperature"], json!("NaN"));
    }

    #[test]
    fn an_answer_with_calls_is_a_message() {
        let call = ToolCall { id: "c".into(), name: "f".into(), arguments: "{}".into() };
        let answer = Answer { tool_calls: vec![call], ..Answer::default() };
        let function = json!({"name": "f", "arguments": "{}"});
        let calls = json!([{"id": "c", "type": "function", "function": function}]);
        let message = json!({"role": "assistant", "content": "", "tool_calls": calls});
        assert_eq!(Message::from(&answer).0, message);
    }
}
