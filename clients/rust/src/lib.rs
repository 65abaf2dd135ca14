//! Async client of Tidewright's gateway, which serves large language models.
//!
//! A [`Client`] keeps one pool of connections: make one, and clone it where it is needed. It answers whole or as a
//! [`Stream`] of [`Event`]s, tries again where that is safe, and says by its [`Error`] what to change.
//!
//! ```no_run
//! use tidewright_client::{ChatRequest, Client, Event, Message};
//!
//! # async fn run() -> tidewright_client::Result<()> {
//! let client = Client::builder().build()?; // TIDEWRIGHT_URL and TIDEWRIGHT_KEY, if they are set
//! let request = ChatRequest::new("smollm2-135m", [Message::user("Name three fruits.")]).max_tokens(32);
//!
//! let answer = client.chat(request.clone()).await?;
//! println!("{}", answer.text);
//!
//! let mut stream = client.stream_chat(request).await?;
//! while let Some(event) = stream.next().await {
//!     if let Event::Text(text) = event? {
//!         print!("{text}");
//!     }
//! }
//! println!("{:?}", stream.answer().usage);
//! # Ok(())
//! # }
//! ```
//!
//! # What it does by itself
//!
//! - **Retries**: up to [`max_retries`](ClientBuilder::max_retries) times while nothing of an answer's body has come:
//!   failed connections and the statuses 408, 409, 429, 500, 502, 503 and 504. It waits as `Retry-After` says, else with
//!   exponential backoff. A client that has retried a lot lately stops, so that it does not multiply an outage.
//! - **Timeout**: [`timeout`](ClientBuilder::timeout) counts from the call to the last byte. The gateway is told, and
//!   ends by itself a little before, with what it has: [`Answer::ended_by`] is then `timeout`. If it is overloaded,
//!   [`Error::TimedOut`] may come first.
//! - **Cancelling**: drop the [`Stream`], or the future of a call. The connection closes, and the gateway stops.
//! - **Backpressure**: a stream that is not polled is not read. The gateway then waits, and no queue grows.
//! - **Redirects** are refused: the key goes to the host that was named, and to no other.
//!
//! # Features
//!
//! `native-tls` (the default) or `rustls`: which TLS `https://` uses. One of them is needed.
//!
//! It runs on tokio. The gateway's WebSocket sessions are left out: they would bring a second HTTP stack into the crate.
//! A stream that breaks is [`Error::Interrupted`], with what came; it is not resumed.

#![warn(unreachable_pub)]

#[cfg(not(any(feature = "native-tls", feature = "rustls")))]
compile_error!("tidewright-client needs one of its features `native-tls` (the default) and `rustls`");

mod answer;
mod builder;
mod client;
mod error;
mod failures;
mod request;
mod retry;
mod sse;
mod stream;
mod transport;
mod wire;

pub use answer::{Answer, Event, Model, ToolCall, ToolCallDelta, Usage};
pub use builder::ClientBuilder;
pub use client::Client;
pub use error::{Details, Error};
pub use request::{ChatRequest, CompletionRequest, Message, Tool};
pub use stream::Stream;

/// What all calls return.
pub type Result<T, E = Error> = std::result::Result<T, E>;
