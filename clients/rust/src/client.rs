//! The calls.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::HeaderValue;
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::time::Instant;

use crate::request::Fields;
use crate::retry::Budget;
use crate::transport::Call;
use crate::wire::{Body, ModelList};
use crate::{failures, wire, Answer, ChatRequest, ClientBuilder, CompletionRequest, Model, Result, Stream};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A client of one gateway, with one pool of connections. Clones share both; it may be used from many tasks at once.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) http: reqwest::Client,
    /// Without `/v1` and a slash at its end.
    pub(crate) base: String,
    pub(crate) key: Option<String>,
    pub(crate) authorization: Option<HeaderValue>,
    pub(crate) max_retries: u32,
    pub(crate) timeout: Duration,
    pub(crate) idle_timeout: Duration,
    pub(crate) max_answer_bytes: usize,
    pub(crate) budget: Budget,
}

impl fmt::Debug for Client {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = out.debug_struct("Client");
        shown.field("base_url", &self.0.base).finish_non_exhaustive() // not the key
    }
}

impl Client {
    /// Options, and then [`build`](ClientBuilder::build).
    pub fn builder() -> ClientBuilder {
        ClientBuilder::default()
    }

    pub(crate) fn from_parts(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    /// The whole answer to a chat.
    ///
    /// # Errors
    /// Any [`Error`](crate::Error) but `Interrupted`.
    pub async fn chat(&self, request: ChatRequest) -> Result<Answer> {
        self.whole(CHAT, request.0).await
    }

    /// The answer to a chat, as it is made. It waits for the first byte, and until then it retries.
    ///
    /// # Errors
    /// Any [`Error`](crate::Error) but `Interrupted`, which only the stream itself gives.
    pub async fn stream_chat(&self, request: ChatRequest) -> Result<Stream> {
        self.stream(CHAT, request.0).await
    }

    /// The whole answer to a prompt.
    ///
    /// # Errors
    /// As [`chat`](Self::chat).
    pub async fn complete(&self, request: CompletionRequest) -> Result<Answer> {
        self.whole(COMPLETIONS, request.0).await
    }

    /// The answer to a prompt, as it is made.
    ///
    /// # Errors
    /// As [`stream_chat`](Self::stream_chat).
    pub async fn stream_complete(&self, request: CompletionRequest) -> Result<Stream> {
        self.stream(COMPLETIONS, request.0).await
    }

    /// The models that are served.
    ///
    /// # Errors
    /// As [`chat`](Self::chat).
    pub async fn models(&self) -> Result<Vec<Model>> {
        let call = self.call(Method::GET, "/v1/models", None);
        let (list, _) = self.json::<ModelList>(&call, self.0.max_retries).await?;
        Ok(list.data)
    }

    /// Whether the gateway can take requests now. It is asked once.
    ///
    /// # Errors
    /// There is no gateway, or no answer of one.
    pub async fn health(&self) -> Result<bool> {
        let call = self.call(Method::GET, "/health/ready", None);
        match self.json::<serde_json::Value>(&call, 0).await {
            Ok(_) => Ok(true),
            Err(error) if error.details().status == Some(503) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn whole(&self, path: &'static str, mut fields: Fields) -> Result<Answer> {
        fields.check()?;
        fields.body.remove("stream"); // what streams is another method
        let call = self.call(Method::POST, path, Some(fields));
        let (body, request_id) = self.json::<Body>(&call, self.0.max_retries).await?;
        let answer = body.into_answer();
        let mut answer = answer.map_err(|why| failures::another_shape(&self.0.url(&call), &why, request_id.clone()))?;
        answer.request_id = request_id;
        Ok(answer)
    }

    async fn stream(&self, path: &'static str, mut fields: Fields) -> Result<Stream> {
        fields.check()?;
        fields.body.insert("stream".into(), true.into());
        let options = fields.body.entry("stream_options");
        options.or_insert_with(|| json!({"include_usage": true}));
        let mut call = self.call(Method::POST, path, Some(fields));
        call.streams = true;
        let begun = self.0.begin(&call, self.0.max_retries).await?;
        Ok(Stream::new(begun, self.clone(), self.0.url(&call), call.deadline))
    }

    fn call(&self, method: Method, path: &'static str, fields: Option<Fields>) -> Call {
        let own = fields.as_ref().and_then(|fields| fields.timeout);
        let timeout = own.map_or(self.0.timeout, |own| own.min(crate::builder::LONGEST_TIMEOUT));
        Call {
            method,
            path,
            body: fields.map(|fields| fields.body),
            streams: false,
            timeout,
            deadline: Instant::now() + timeout,
        }
    }

    async fn json<T: DeserializeOwned>(&self, call: &Call, max_retries: u32) -> Result<(T, Option<String>)> {
        let begun = self.0.begin(call, max_retries).await?;
        let request_id = begun.request_id.clone();
        let body = self.0.rest(begun, call).await?;
        match wire::parse(&body) {
            Ok(value) => Ok((value, request_id)),
            Err(why) => Err(failures::another_shape(&self.0.url(call), &why, request_id)),
        }
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }
}
